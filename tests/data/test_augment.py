import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arraytp.data import augment, prepare


def naive_flip_and_crop(images, draws, padding):
    """One pixel at a time: flip, then crop out of the image whose border is repeated."""
    out = np.empty_like(images)
    count, height, width, _ = images.shape
    for n in range(count):
        for i in range(height):
            for j in range(width):
                y = min(max(i + draws.rows[n] - padding, 0), height - 1)
                x = min(max(j + draws.columns[n] - padding, 0), width - 1)
                out[n, i, j] = images[n, y, width - 1 - x if draws.flips[n] else x]
    return out


sizes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 100))
def test_both_ways_to_augment_equal_the_naive_loops(size, padding, flip, seed):
    images = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    images.flags.writeable = False
    draws = augment.draw(seed, 0, size[0], flip, padding)
    expected = naive_flip_and_crop(images, draws, padding)
    readable = augment.crop_images(augment.flip_images(images, draws.flips), draws.rows, draws.columns, padding)
    assert readable.dtype == np.uint8
    assert np.array_equal(readable, expected)
    augmenter = prepare.augmenter(size[1:], padding)
    augmenter.images[: len(images)] = images
    assert np.array_equal(augmenter(draws), expected)


def test_the_crop_equals_numpy_padding_and_slicing():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 6, 3), dtype=np.uint8)
    draws = augment.draw(3, 0, 9, 0, 4)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    cropped = augment.crop_images(images, draws.rows, draws.columns, 4)
    for n in range(9):
        row, column = draws.rows[n], draws.columns[n]
        assert np.array_equal(cropped[n], padded[n, row : row + 8, column : column + 6])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (1.0,)), ((0.5,), (0.5,)), ((0.49, 0.48, 0.45), (0.2, 0.19, 0.6)), ((0.5,) * 3, (0.2,) * 3)],
)
def test_normalisation_is_mean_and_deviation_of_pixels_in_zero_to_one(dtype, mean, std):
    channels = len(mean)
    images = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1), channels, axis=3)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    scale, shift = augment.scale_and_shift(mean, std)
    # Product and sum round once each, at numbers up to (1 + mean) / std.
    tolerance = 4 * np.finfo(dtype).eps / min(std)
    readable = augment.normalise(images, scale.astype(dtype), shift.astype(dtype))
    fast = np.empty(images.shape, dtype)
    prepare.normaliser(scale, shift, dtype)(images, fast)
    for result in (readable, fast):
        assert result.dtype == dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)
    assert np.array_equal(readable, fast)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_longer_than_the_parts_and_patterns_are_normalised_to_the_same_bits(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 331, 401, channels), dtype=np.uint8)
    images.flags.writeable = False
    scale, shift = (np.random.default_rng(n).normal(size=channels).astype(np.float32) for n in (1, 2))
    fast = np.empty(images.shape, np.float32)
    prepare.normaliser(scale, shift, np.float32)(images, fast)
    assert np.array_equal(fast, augment.normalise(images, scale, shift))


def test_gathered_rows_are_those_rows_and_one_alone_is_not_copied():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 3, 2), dtype=np.uint8)
    room = np.empty((4, 4, 3, 2), np.uint8)
    rows = np.array([7, 0, 7])
    assert np.array_equal(prepare.gather(images, rows, room), images[rows])
    alone = prepare.gather(images, rows[:1], room)
    assert np.array_equal(alone, images[7:8])
    assert np.shares_memory(alone, images)


def test_draws_have_the_stated_probabilities_and_range():
    draws = augment.draw(0, 0, 20000, 0.3, 4)
    # Three standard deviations of the mean.
    assert abs(draws.flips.mean() - 0.3) < 3 * np.sqrt(0.21 / 20000)
    for offsets in (draws.rows, draws.columns):
        counts = np.bincount(offsets)
        assert len(counts) == 9
        assert abs(counts - 20000 / 9).max() < 4 * np.sqrt(20000 / 9)
    assert abs(np.corrcoef(draws.rows, draws.columns)[0, 1]) < 0.03
    assert not np.array_equal(draws.rows, augment.draw(0, 1, 20000, 0.3, 4).rows)
    assert not np.array_equal(draws.rows, augment.draw(1, 0, 20000, 0.3, 4).rows)
