import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.data.statistics import mean_and_std, pixel_sums

SIDES = st.integers(1, 70)


def expected_sums(images):
    values = images.astype(np.int64)
    return (
        images[..., 0].size,
        tuple(values.sum(axis=(0, 1, 2)).tolist()),
        tuple((values**2).sum(axis=(0, 1, 2)).tolist()),
    )


@given(st.integers(1, 5), SIDES, SIDES, st.integers(1, 4), st.integers(0, 2**32))
def test_sums_are_those_of_integers(count, height, width, channels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    assert pixel_sums(images) == expected_sums(images)


@pytest.mark.parametrize(
    "shape", [(3000, 1, 1, 1), (2000, 3, 4, 1), (900, 8, 8, 3), (2, 2000, 2, 3), (1, 3, 90_000, 1)]
)
def test_the_largest_values_are_summed_exactly(shape):
    images = np.full(shape, 255, np.uint8)
    images[-1, -1, -1, -1] = 254
    assert pixel_sums(images) == expected_sums(images)


def test_parts_add_up_to_the_whole():
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    whole = pixel_sums(images[:2]).plus(pixel_sums(images[2:]))
    assert whole == pixel_sums(images)
    mean, std = mean_and_std(whole)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-14)
