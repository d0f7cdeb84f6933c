"""Gaussian noise that depends on its key alone: not on the order of calls, nor on the number of threads."""

import numpy as np

from arraytp.backend import Array, array_module, draw_normal
from arraytp.streams import sequence, stream

# Samples that share a random stream on the host: small enough to share a batch's noise among threads.
CHUNK = 16
# Which noise of an iteration: that of the block's input, that of its output.
EPSILON, ETA = 0, 1


def gaussian(out: Array, sigma: float, first: int, seed: int, *key: int) -> Array:
    """Fill an array with numbers from N(0, σ²) in its dtype.

    The host draws each chunk of samples from a stream of its own. A device draws the whole array from one stream that
    is made anew from the key, so that nothing goes from host to device or back; it has other numbers than the host,
    and numbers of a part are not those that the part has in the whole.

    Parameters
    ----------
    out : array of shape (B, …), C-contiguous
        Samples `first` … `first` + B − 1 of a batch.
    sigma : float
    first : int
        A multiple of `CHUNK`, so that on the host parts of a batch have the numbers that they have in the whole.
    seed : int
        The run's seed.
    *key : int
        What the noise is for: step, block, iteration, and which of the iteration's noises. The number of the first
        chunk is added.

    Returns
    -------
    array
        `out`.

    Raises
    ------
    ValueError
        If `first` is within a chunk.
    """
    if first % CHUNK:
        raise ValueError(f"noise for samples from {first} on: must be a multiple of {CHUNK}")
    if array_module(out) is np:
        for start in range(0, len(out), CHUNK):
            part = out[start : start + CHUNK]
            stream(seed, "noise", *key, (first + start) // CHUNK).standard_normal(out=part, dtype=part.dtype)
    else:
        draw_normal(out, sequence(seed, "noise", *key, first // CHUNK))
    out *= out.dtype.type(sigma)
    return out
