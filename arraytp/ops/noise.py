"""Gaussian noise that depends on its key alone: not on the order of calls, nor on the number of threads."""

import itertools

import numpy as np

from arraytp.backend import Array, array_module, draw_normal
from arraytp.streams import sequence, stream

# Samples that share a random stream on the host: small enough to share a batch's noise among threads.
CHUNK = 16
# Which noise of an iteration: that of the block's input, that of its output.
EPSILON, ETA = 0, 1


def chunks(count: int, first: int = 0) -> list[slice]:
    """Cut samples `first` … `first` + count − 1 of a batch where chunks begin; slices count from the first of them."""
    bounds = sorted({0, *range(-first % CHUNK, count, CHUNK), count})
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def gaussian(out: Array, sigma: float, first: int, seed: int, *key: int) -> Array:
    """Fill an array with numbers from N(0, σ²) in its dtype.

    The host draws each chunk of samples from a stream of its own. A device draws the whole array from one stream that
    is made anew from the key, so that nothing goes from host to device or back; it has other numbers than the host,
    and numbers of a part are not those that the part has in the whole.

    Parameters
    ----------
    out : array of shape (B, …), C-contiguous
        Samples `first` … `first` + B − 1 of a batch. On the host they have the numbers that they have in the whole.
    sigma : float
    first : int
    seed : int
        The run's seed.
    *key : int
        What the noise is for: step, block, iteration, and which of the iteration's noises. The number of the first
        chunk is added.

    Returns
    -------
    array
        `out`.
    """
    if array_module(out) is np:
        for part in chunks(len(out), first):
            chunk, before = divmod(first + part.start, CHUNK)
            generator = stream(seed, "noise", *key, chunk)
            # The numbers of the chunk's samples before these.
            generator.standard_normal(before * out[0].size, dtype=out.dtype)
            generator.standard_normal(out=out[part], dtype=out.dtype)
    else:
        draw_normal(out, sequence(seed, "noise", *key, first))
    out *= out.dtype.type(sigma)
    return out
