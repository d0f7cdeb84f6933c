"""Losses of logits against labels, softmax cross-entropy and squared error, and the rank of the label.

Both compare with y = (1 − e) onehot(label) + e/M, e the label smoothing. Dimensions: B batch, M classes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from arraytp.backend import Array, array_module

Reduction = Literal["sum", "mean"]


def cross_entropy_forward(
    logits: Array, labels: Array, reduction: Reduction, smoothing: float = 0.0
) -> tuple[Array, tuple[Array, Array, float]]:
    """Return −Σ y log softmax(logits), summed over the batch or divided by B; without smoothing −Σ log p[label].

    Parameters
    ----------
    logits : array of shape (B, M)
    labels : array of int64 of shape (B,)
        0 ≤ label < M, to be checked by the caller.
    reduction : {"sum", "mean"}
        `sum` is the GP paper's code, `mean` the DTP paper's.
    smoothing : float
        e, from 0 to below 1 (Szegedy et al. 2016).

    Returns
    -------
    loss : array of shape ()
    cache : tuple
        Log-probabilities (B, M), labels and e, for `cross_entropy_backward`.
    """
    xp = array_module(logits, labels)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_probabilities[xp.arange(len(labels)), labels].sum()
    if smoothing:
        number = loss.dtype.type
        loss = number(1 - smoothing) * loss - number(smoothing / logits.shape[1]) * log_probabilities.sum()
    return _reduced(loss, labels, reduction), (log_probabilities, labels, smoothing)


def cross_entropy_backward(cache: tuple[Array, Array, float], reduction: Reduction) -> Array:
    """Return ∂L/∂logits = softmax − y, of shape (B, M), divided by B for the mean."""
    log_probabilities, labels, smoothing = cache
    dlogits = array_module(log_probabilities).exp(log_probabilities)
    _subtract_targets(dlogits, labels, smoothing)
    return _reduced(dlogits, labels, reduction)


def squared_error_forward(
    logits: Array, labels: Array, reduction: Reduction, smoothing: float = 0.0
) -> tuple[Array, tuple[Array, Array]]:
    """Return ½ Σ ‖logits − y‖², summed over the batch or divided by B; parameters as in `cross_entropy_forward`.

    With the ½, and without a mean over the classes, the gradient is s^N − y: a step of β = 1 down it has y as target.

    Returns
    -------
    loss : array of shape ()
    cache : tuple of arrays
        logits − y (B, M) and labels, for `squared_error_backward`.
    """
    difference = logits.copy()
    _subtract_targets(difference, labels, smoothing)
    loss = array_module(logits, labels).square(difference).sum() * logits.dtype.type(0.5)
    return _reduced(loss, labels, reduction), (difference, labels)


def squared_error_backward(cache: tuple[Array, Array], reduction: Reduction) -> Array:
    """Return ∂L/∂logits = logits − y, of shape (B, M), divided by B for the mean."""
    difference, labels = cache
    return _reduced(difference.copy(), labels, reduction)


class Loss(NamedTuple):
    """A loss: `forward(logits, labels, reduction, smoothing)` → L, cache; `backward(cache, reduction)` → dlogits."""

    forward: Callable[[Array, Array, Reduction, float], tuple[Array, Any]]
    backward: Callable[[Any, Reduction], Array]


LOSSES = {
    "cross-entropy": Loss(cross_entropy_forward, cross_entropy_backward),
    "mse": Loss(squared_error_forward, squared_error_backward),
}
"""By their names in configs."""


def _subtract_targets(array: Array, labels: Array, smoothing: float) -> None:
    """Subtract y from an array of shape (B, M), in place."""
    xp, number = array_module(array, labels), array.dtype.type
    if smoothing:
        array -= number(smoothing / array.shape[1])
    array[xp.arange(len(labels)), labels] -= number(1 - smoothing)


def _reduced(total: Array, labels: Array, reduction: Reduction) -> Array:
    """Return a sum over the batch, or divide it by B for the mean; in place where it is a whole array."""
    if reduction == "mean":
        total /= total.dtype.type(len(labels))
    return total


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
