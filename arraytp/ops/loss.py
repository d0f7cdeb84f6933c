"""Softmax cross-entropy from logits, and the rank of the label.

Dimensions: B batch, M classes.
"""

from typing import Literal

from arraytp.backend import Array, array_module


def cross_entropy_forward(
    logits: Array, labels: Array, reduction: Literal["sum", "mean"]
) -> tuple[Array, tuple[Array, Array]]:
    """Return −Σ log softmax(logits)[label], summed over the batch or divided by B.

    Parameters
    ----------
    logits : array of shape (B, M)
    labels : array of int64 of shape (B,)
        0 ≤ label < M, to be checked by the caller.
    reduction : {"sum", "mean"}
        `sum` is the GP paper's code, `mean` the DTP paper's.

    Returns
    -------
    loss : array of shape ()
    cache : tuple of arrays
        log-probabilities (B, M) and labels, for `cross_entropy_backward`.
    """
    xp = array_module(logits, labels)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_probabilities[xp.arange(len(labels)), labels].sum()
    return (loss if reduction == "sum" else loss / loss.dtype.type(len(labels))), (log_probabilities, labels)


def cross_entropy_backward(cache: tuple[Array, Array], reduction: Literal["sum", "mean"]) -> Array:
    """Return ∂L/∂logits = softmax − onehot, of shape (B, M), divided by B for the mean."""
    log_probabilities, labels = cache
    xp = array_module(log_probabilities)
    dlogits = xp.exp(log_probabilities)
    dlogits[xp.arange(len(labels)), labels] -= dlogits.dtype.type(1)
    if reduction == "mean":
        dlogits /= dlogits.dtype.type(len(labels))
    return dlogits


def label_rank(logits: Array, labels: Array) -> Array:
    """Return how many classes come before the label when logits are sorted; a tie goes to the lower class index.

    A sample is correct in its top k when its rank is below k.

    Parameters
    ----------
    logits : array of shape (B, M)
    labels : array of int64 of shape (B,)

    Returns
    -------
    array of int64 of shape (B,)
        M for a sample with a NaN among its logits.
    """
    xp = array_module(logits, labels)
    own = logits[xp.arange(len(labels)), labels][:, None]
    earlier = xp.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return xp.where(xp.isnan(logits).any(axis=1), logits.shape[1], rank)
