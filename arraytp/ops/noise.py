"""Gaussian noise that does not depend on the order of calls, on threads or on devices."""

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.streams import stream

# Samples that share a random stream: small enough to share a batch's noise among threads and devices.
CHUNK = 16


def gaussian(out: Array, sigma: float, first: int, seed: int, *key: int) -> Array:
    """Fill an array with numbers from N(0, σ²), each chunk of samples from a stream of its own.

    The numbers are drawn by the host in the array's dtype, the same for every backend.

    Parameters
    ----------
    out : array of shape (B, …), C-contiguous
        Samples `first` … `first` + B − 1 of a batch.
    sigma : float
    first : int
        A multiple of `CHUNK`, so that parts of a batch have the numbers that they have in the whole.
    seed : int
        The run's seed.
    *key : int
        What the noise is for: step, block, iteration, and which of the iteration's noises. The chunk's number is added.

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
    xp = array_module(out)
    for start in range(0, len(out), CHUNK):
        part = out[start : start + CHUNK]
        generator = stream(seed, "noise", *key, (first + start) // CHUNK)
        if xp is np:
            generator.standard_normal(out=part, dtype=part.dtype)
        else:
            part[...] = xp.asarray(generator.standard_normal(part.shape, dtype=part.dtype))
    out *= out.dtype.type(sigma)
    return out
