import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arraytp.data import augment, prepare


def naive_flip_and_crop(images, draws, padding):
    """Flip and then crop images with replicated edge pixels, one pixel at a time."""
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
    [
        ((0.0,), (1.0,)),
        ((0.5,), (0.5,)),
        ((0.0, 0.48), (0.2, 0.19)),
        ((0.49, 0.48, 0.45), (0.2, 0.19, 0.6)),
        ((0.5,) * 3, (0.2,) * 3),
    ],
)
def test_normalisation_is_mean_and_deviation_of_pixels_in_zero_to_one(dtype, mean, std):
    channels = len(mean)
    images = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1), channels, axis=3)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    scale, shift = augment.scale_and_shift(mean, std)
    # The product and the sum round once each, at values of up to (1 + mean) / std.
    tolerance = 4 * np.finfo(dtype).eps / min(std)
    readable = augment.normalise(images, scale.astype(dtype), shift.astype(dtype))
    fast = np.empty(images.shape, dtype)
    prepare.normaliser(scale, shift, images.shape[1:], dtype)(images, fast)
    for result in (readable, fast):
        assert result.dtype == dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)
    assert np.array_equal(readable, fast)


@pytest.mark.parametrize("shape", [(224, 224, 3), (331, 40, 2), (6, 9000, 3), (2, 3, 1), (64, 96, 4)])
def test_images_of_any_size_are_normalised_to_the_same_bits(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    images.flags.writeable = False
    scale, shift = np.random.default_rng(1).normal(size=(2, shape[2])).astype(np.float32)
    fast = np.empty(images.shape, np.float32)
    prepare.normaliser(scale, shift, shape, np.float32)(images, fast)
    assert np.array_equal(fast, augment.normalise(images, scale, shift))


@pytest.mark.parametrize("shape", [(5, 4, 3), (224, 160, 3)], ids=["gathered", "where they lie"])
def test_taken_rows_are_normalised_to_the_same_bits(shape):
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    images.flags.writeable = False
    scale, shift = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    rows = np.array([4, 0, 4])
    out = np.full((4, *shape), 7, np.float32)
    room = np.empty((5, *shape), np.uint8)
    prepare.normaliser(scale, shift, shape, np.float32).take(images, rows, room, out[:3])
    assert np.array_equal(out[:3], augment.normalise(images[rows], scale, shift))
    assert (out[3] == 7).all()


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
