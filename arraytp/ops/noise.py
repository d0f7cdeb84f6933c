"""Gaussian noise that depends on its key alone: not on the order of calls, nor on the number of threads."""

import itertools
from typing import Any

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.ops.kernels import has_kernels, kernel
from arraytp.streams import sequence, stream

# Samples that share a random stream on the host: few enough to divide a batch's noise among threads.
CHUNK = 16
# The noises of an iteration: that of the block's input and that of its output.
EPSILON, ETA = 0, 1


def chunks(count: int, first: int = 0) -> list[slice]:
    """Cut samples `first` … `first` + count − 1 of a batch at chunk boundaries; the slices count from `first`."""
    bounds = sorted({0, *range(-first % CHUNK, count, CHUNK), count})
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def gaussian(out: Array, sigma: float, first: int, seed: int, number: Any, *key: int) -> Array:
    """Fill an array with numbers from N(0, σ²) in its dtype.

    The host draws each chunk of samples from its own stream, with the number of the chunk appended to the key. A device
    computes the array from the key by `counter_normal`, so that nothing goes from host to device or back; its numbers
    differ from the host's. On both, a part of a batch has the same numbers as in the whole batch.

    Parameters
    ----------
    out : array of shape (B, …), C-contiguous
        Samples `first` … `first` + B − 1 of a batch.
    sigma : float
    first : int
    seed : int
        The run's seed.
    number : int
        Number of the step. On a device, it may be an array of uint64 of shape (1,), read when the kernel runs.
    *key : int
        What the noise is for: block, iteration, and which of the iteration's noises.

    Returns
    -------
    array
        `out`.
    """
    if array_module(out) is np:
        for part in chunks(len(out), first):
            chunk, before = divmod(first + part.start, CHUNK)
            generator = stream(seed, "noise", number, *key, chunk)
            # Skip the numbers of the chunk's earlier samples.
            generator.standard_normal(before * out[0].size, dtype=out.dtype)
            generator.standard_normal(out=out[part], dtype=out.dtype)
        out *= out.dtype.type(sigma)
        return out
    return counter_normal(out, sigma, counter_key(seed, *key), first * (out.size // len(out)), number)


def counter_key(seed: int, *key: int) -> int:
    """Return the 64-bit key of a noise for `counter_normal`."""
    return int(sequence(seed, "noise", *key).generate_state(1, np.uint64)[0])


def counter_normal(out: Array, sigma: float, key: int, start: int = 0, number: Any = 0) -> Array:
    """Fill an array with numbers from N(0, σ²) that depend only on their place, key and number: not on state or order.

    Philox 4×32-10 (Salmon et al. 2011) turns a counter into four random words. The counter's lower half counts from 0,
    its upper half is `number`. In float32 each word gives one uniform number, in float64 two words give one of 53 bits.
    The Box–Muller transform turns two uniform numbers into two normal ones:

        √(−2 ln u) cos 2πv,  √(−2 ln u) sin 2πv

    The words are the same on the host and on a device; the numbers differ by the rounding of ln, cos and sin.

    Parameters
    ----------
    out : array of float32 or float64, C-contiguous
    sigma : float
    key : int
        64 bits.
    start : int
        How many numbers come before, so that a part has the same numbers as in the whole.
    number : int or, on a device, array of uint64 of shape (1,)

    Returns
    -------
    array
        `out`.
    """
    xp, scalar, each = array_module(out), out.dtype.type, 16 // out.dtype.itemsize
    first, before = divmod(start, each)
    count = -(-(before + out.size) // each)
    if has_kernels(out):
        inputs = "uint64 key, raw uint64 number, uint64 first, int64 before, int64 size, T sigma"
        upper = xp.full((1,), number, dtype=np.uint64) if isinstance(number, int) else number
        draw = kernel(out, f"normal_{out.dtype}", inputs, "raw T out", _UNIFORM[each] + _BOX_MULLER, _PHILOX)
        draw(key, upper, first, before, out.size, scalar(sigma), out.reshape(-1), size=count)
        return out
    u = _uniform(_philox(xp, first, count, key, number), out.dtype)
    radius, angle = xp.sqrt(xp.log(u[:, ::2]) * scalar(-2)), u[:, 1::2] * scalar(2 * np.pi)
    normal = xp.stack([radius * xp.cos(angle), radius * xp.sin(angle)], axis=-1) * scalar(sigma)
    out.reshape(-1)[...] = normal.reshape(-1)[before : before + out.size]
    return out


def _philox(xp: Any, first: int, count: int, key: int, number: int = 0) -> Array:
    """Return the words of some counters, as uint64 of shape (count, 4)."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    counters = xp.arange(first, first + count, dtype=np.uint64)
    upper = [xp.full((count,), word, dtype=np.uint64) for word in (number & 0xFFFFFFFF, number >> 32)]
    x = [counters & low, counters >> high, *upper]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> high) ^ x[1] ^ np.uint64(keys[0]), b & low, (a >> high) ^ x[3] ^ np.uint64(keys[1]), a & low]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return xp.stack(x, axis=1)


def _uniform(words: Array, dtype: np.dtype) -> Array:
    """Return uniform numbers in (0, 1], four or two per counter, of shape (count, 4 or 2)."""
    if dtype.itemsize == 4:
        return (words.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-32)
    first, second = words[:, ::2] >> np.uint64(5), words[:, 1::2] >> np.uint64(6)
    return (first.astype(dtype) * dtype.type(2.0**26) + second.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-53)


_PHILOX = """
__device__ void philox(unsigned long long count, unsigned long long number, unsigned long long key, unsigned int* x) {
    unsigned int k0 = (unsigned int)key, k1 = (unsigned int)(key >> 32);
    x[0] = (unsigned int)count; x[1] = (unsigned int)(count >> 32);
    x[2] = (unsigned int)number; x[3] = (unsigned int)(number >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
        const unsigned int y0 = (unsigned int)(b >> 32) ^ x[1] ^ k0, y2 = (unsigned int)(a >> 32) ^ x[3] ^ k1;
        x[0] = y0; x[1] = (unsigned int)b; x[2] = y2; x[3] = (unsigned int)a;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
}
"""
_UNIFORM = {
    4: """
    unsigned int x[4];
    philox(first + i, number[0], key, x);
    T u[4];
    const int pairs = 2;
    for (int j = 0; j < 4; ++j) u[j] = (T(x[j]) + T(0.5)) * T(2.3283064365386963e-10);
    """,
    2: """
    unsigned int x[4];
    philox(first + i, number[0], key, x);
    T u[2];
    const int pairs = 1;
    for (int j = 0; j < 2; ++j)
        u[j] = (T(x[2 * j] >> 5) * 67108864.0 + T(x[2 * j + 1] >> 6) + 0.5) * 1.1102230246251565e-16;
    """,
}
_BOX_MULLER = """
    for (int j = 0; j < pairs; ++j) {
        const T radius = sqrt(T(-2) * log(u[2 * j])), angle = T(6.283185307179586) * u[2 * j + 1];
        const long long at = (long long)i * 2 * pairs + 2 * j - before;
        if (at >= 0 && at < size) out[at] = sigma * (radius * cos(angle));
        if (at + 1 >= 0 && at + 1 < size) out[at + 1] = sigma * (radius * sin(angle));
    }
"""
