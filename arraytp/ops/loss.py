"""Losses of logits against labels, softmax cross-entropy and squared error, and the rank of the label.

On a device, `loss_and_score` computes all of this in one kernel, which tests check against the array code.

Both losses compare with y = (1 − e) onehot(label) + e/M, with label smoothing e. Dimensions: B batch, M classes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.ops.kernels import has_kernels, kernel

Reduction = Literal["sum", "mean"]
# Rank of a label that cannot be ranked, so that it is in no top k.
UNRANKED = 1 << 24


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
        `sum` as in the GP paper's code, `mean` as in the DTP paper's.
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

    With the ½, and without a mean over the classes, the gradient is s^N − y, so that β = 1 gives the output target y.

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
    """Return a sum over the batch as it is or, for the mean, divided by B; arrays are divided in place."""
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
        `UNRANKED` for a sample with a NaN among its logits.
    """
    xp = array_module(logits, labels)
    own = logits[xp.arange(len(labels)), labels][:, None]
    earlier = xp.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return xp.where(xp.isnan(logits).any(axis=1), UNRANKED, rank)


class Scored(NamedTuple):
    """What `loss_and_score` returns: L of shape (), ∂L/∂logits of shape (B, M), and totals of shape (3,) and float64.

    The totals are the loss summed over samples, and how many labels rank first and how many among the first five.
    """

    loss: Array
    dlogits: Array
    totals: Array


def loss_and_score(
    name: str, logits: Array, labels: Array, reduction: Reduction, smoothing: float = 0.0, share: float = 1.0,
    size: int | None = None,
) -> Scored:  # fmt: skip
    """Return a loss of `LOSSES`, its gradient, and the score of the labels; one launch on a device.

    Parameters
    ----------
    logits : array of shape (B, M)
    labels : array of int64 of shape (B,)
        On a device, the loss is NaN if a label is not from 0 to M − 1.
    reduction, smoothing
        As in `cross_entropy_forward`.
    share : float
        Factor of a mean and of its gradient: these samples' share of the batch.
    size : int, optional
        Number of samples in the whole batch; by default, these are all of them.
    """
    xp, mean, size = array_module(logits, labels), reduction == "mean", size or len(labels)
    if has_kernels(logits):
        divisors = (len(labels), share, size) if mean else (1, 1, 1)
        return _fused(name, logits, labels, smoothing, *divisors)
    compute = LOSSES[name]
    loss, cache = compute.forward(logits, labels, reduction, smoothing)
    dlogits = compute.backward(cache, reduction)
    if mean and share != 1:
        loss, dlogits = (array * array.dtype.type(share) for array in (loss, dlogits))
    rank = label_rank(logits, labels)
    sums = loss * size if mean else loss, (rank < 1).sum(), (rank < 5).sum()
    return Scored(loss, dlogits, xp.stack([xp.asarray(part, dtype=xp.float64) for part in sums]))


_THREADS = 512
# A warp processes one sample at a time, and its lanes share the classes. All sums have a fixed order.
_ROWS = f"""
    const int lane = i & 31, warps = {_THREADS} / 32;
    double sum = 0, first = 0, five = 0;
    for (int b = i / 32; b < B; b += warps) {{
        const ptrdiff_t at = (ptrdiff_t)b * M;
        const long long label = labels[b];
        const bool known = label >= 0 && label < M;
        const T own = known ? x[at + label] : T(0) / T(0);
        bool bad = own != own;
        int rank = 0;
        T norm = 0, terms = 0;
        %s
        for (int c = lane; c < M; c += 32) {{
            const T v = x[at + c];
            bad = bad || v != v;
            rank += v > own || (v == own && c < label);
            %s
            d[at + c] = t / rows * share;
        }}
        rank = together(bad ? {UNRANKED} : rank);
        terms = together(terms);
        sum += known ? %s : own;
        first += rank < 1;
        five += rank < 5;
    }}
    __shared__ double parts[3][{_THREADS // 32}];
    if (lane == 0) {{ parts[0][i / 32] = sum; parts[1][i / 32] = first; parts[2][i / 32] = five; }}
    __syncthreads();
    if (i == 0) {{
        for (int k = 0; k < 3; ++k) {{
            double all = 0;
            for (int w = 0; w < warps; ++w) all += parts[k][w];
            totals[k] = k ? all : all / rows * share * size;
            if (k == 0) loss[0] = T(all / rows * share);
        }}
    }}
"""
# The code before the loop over the classes, for ∂L/∂logit of one class, and for a sample's loss.
_TERMS = {
    "cross-entropy": ("""
        T most = x[at];
        for (int c = lane; c < M; c += 32) { const T v = x[at + c]; most = v > most ? v : most; }
        for (int k = 16; k; k /= 2) { const T v = __shfl_xor_sync(0xffffffff, most, k); most = v > most ? v : most; }
        for (int c = lane; c < M; c += 32) norm += exp(x[at + c] - most);
        norm = log(together(norm));""",
        "const T l = v - most - norm, t = exp(l) - off - (c == label ? on : T(0)); terms += l;",
        "-on * (own - most - norm) - (off > 0 ? off * terms : T(0))"),
    "mse": ("", "const T t = v - off - (c == label ? on : T(0)); terms += t * t;", "T(0.5) * terms"),
}  # fmt: skip
_TOGETHER = """
template <typename T> __device__ T together(T v) {
    for (int k = 16; k; k /= 2) v += __shfl_xor_sync(0xffffffff, v, k);
    return v;
}
"""


def _fused(name: str, logits: Array, labels: Array, smoothing: float, rows: int, share: float, size: int) -> Scored:
    xp, number, (count, classes) = array_module(logits, labels), logits.dtype.type, logits.shape
    scored = Scored(xp.empty(1, logits.dtype), xp.empty_like(logits), xp.empty(3, np.float64))
    inputs = "raw T x, raw int64 labels, int32 B, int32 M, T on, T off, T rows, T share, float64 size"
    made = kernel(logits, f"score_{name.replace('-', '_')}", inputs, "raw T loss, raw T d, raw float64 totals",
                  _ROWS % _TERMS[name], _TOGETHER)  # fmt: skip
    made(
        logits, labels, count, classes, number(1 - smoothing), number(smoothing / classes), number(rows),
        number(share), size, *scored, size=_THREADS, block_size=_THREADS,
    )  # fmt: skip
    return scored._replace(loss=scored.loss.reshape(()))
