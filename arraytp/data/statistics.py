"""Mean and standard deviation per channel, exact, from counts of the 256 pixel values."""

import math

import numpy as np
import numpy.typing as npt

# NumPy counts 8-byte copies of the values; so many of them stay in the cache.
_SLICE_PIXELS = 2**18


def pixel_counts(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count the pixel values of images (N, H, W, C): (C, 256) int64."""
    channels = images.shape[-1]
    pixels = images.reshape(-1, channels)
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(pixels), _SLICE_PIXELS):
        part = pixels[start : start + _SLICE_PIXELS]
        for channel in range(channels):
            counts[channel] += np.bincount(part[:, channel], minlength=256)
    return counts


def mean_and_std(counts: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return mean and population standard deviation of each channel, pixels in [0, 1].

    Sums are exact integers, so neither the order of the images nor their number costs accuracy.
    """
    means, stds = [], []
    for row in counts:
        values = [int(count) for count in row]
        total = sum(values)
        first = sum(value * count for value, count in enumerate(values))
        second = sum(value * value * count for value, count in enumerate(values))
        means.append(first / total / 255)
        stds.append(math.sqrt(total * second - first * first) / total / 255)
    return means, stds
