"""Noise is a function of its key, not of the order of calls, nor of how a batch is cut."""

import itertools

import numpy as np
import pytest
import strict_device

from arraytp.backend import NUMPY
from arraytp.ops.noise import CHUNK, _philox, counter_key, counter_normal, gaussian

SHAPE = (3 * CHUNK + 5, 4, 3)


def drawn(shape=SHAPE, first=0, sigma=1.0, key=(7, 1, 2, 3), dtype="float64", backend=NUMPY):
    return backend.to_host(gaussian(backend.xp.empty(shape, dtype), sigma, first, *key))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_numbers_of_a_key_are_always_the_same(computer, dtype):
    found = drawn(dtype=dtype, sigma=0.3, backend=computer.backend)
    drawn(dtype=dtype, key=(7, 1, 2, 4), backend=computer.backend)
    np.testing.assert_array_equal(found, drawn(dtype=dtype, sigma=0.3, backend=computer.backend))
    assert found.dtype == dtype


def test_a_device_draws_without_the_host():
    """An upload of noise in every iteration would make the device wait for the host."""
    out = strict_device.empty(SHAPE)
    before = strict_device.reads.total(), strict_device.writes.total()
    gaussian(out, 0.3, 0, 7, 1, 2, 3)
    assert (strict_device.reads.total(), strict_device.writes.total()) == before


def test_the_words_are_philoxs():
    """The first words of key 0 as the authors publish them (Random123, kat_vectors)."""
    assert _philox(np, 0, 1, 0)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    first, second = _philox(np, 0, 2, 1 << 40)
    assert set(first.tolist()).isdisjoint(second.tolist())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (50, 41)])
def test_a_device_has_the_numbers_that_the_host_computes_from_the_key(device, shape, dtype, tolerance):
    """Up to the rounding of ln, cos and sin, a device's noise can be reproduced without a device."""
    found = drawn(shape, sigma=0.3, dtype=dtype, backend=device.backend)
    wanted = counter_normal(np.empty(shape, dtype), 0.3, counter_key(7, 2, 3), number=1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_the_key_of_a_counter_has_64_bits():
    keys = {counter_key(7, n) for n in range(1000)}
    assert len(keys) == len({key & 0xFFFFFFFF for key in keys}) == len({key >> 32 for key in keys}) == 1000


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cuts", [[CHUNK], [3 * CHUNK, CHUNK, 2 * CHUNK], [5, 6, 40], [CHUNK - 1, 3 * CHUNK + 1]])
def test_parts_have_the_numbers_that_they_have_in_the_whole(computer, cuts, dtype):
    """Cuts may be within chunks, and parts drawn in any order: each rank draws only the noise of its own samples."""
    whole, bounds = drawn(dtype=dtype, backend=computer.backend), sorted({0, *cuts, SHAPE[0]})
    order = sorted(itertools.pairwise(bounds), key=lambda part: part[0] * 7 % 11)
    for start, stop in order:
        part = drawn((stop - start, *SHAPE[1:]), start, dtype=dtype, backend=computer.backend)
        np.testing.assert_array_equal(part, whole[start:stop])


def test_every_part_of_the_key_and_every_chunk_has_numbers_of_its_own(computer):
    keys = [(7, 1, 2, 3), (8, 1, 2, 3), (7, 0, 2, 3), (7, 1, 3, 3), (7, 1, 2, 0), (7, 1, 2)]
    firsts = [(key, first) for key in keys for first in (0, CHUNK)]
    chunks = [drawn((CHUNK, 8), first, key=key, backend=computer.backend) for key, first in firsts]
    for i, a in enumerate(chunks):
        for b in chunks[:i]:
            assert not np.intersect1d(a, b).size


def test_the_numbers_are_normal(computer):
    """A million numbers: moments within five of their standard errors."""
    x, sigma = drawn((1000, 1000), sigma=0.2, backend=computer.backend), 0.2
    z, error = x / sigma, 1e-3
    assert abs(z.mean()) < 5 * error
    assert abs((z**2).mean() - 1) < 5 * error * np.sqrt(2)
    assert abs((z**3).mean()) < 5 * error * np.sqrt(15)
    assert abs((z**4).mean() - 3) < 5 * error * np.sqrt(96)


def test_sigma_scales_the_same_numbers():
    np.testing.assert_allclose(drawn(sigma=0.25), 0.25 * drawn(), rtol=1e-15)
