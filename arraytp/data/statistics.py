"""Mean and standard deviation per channel, exact, from counts of the 256 pixel values."""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

# Pillow makes a copy of 4 bytes a pixel; so many pixels stay in the cache.
_SLICE_PIXELS = 2**17
_RGB = 3


def pixel_counts(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count the pixel values of images (N, H, W, C): (C, 256) int64.

    By Pillow's histogram, which is three times as fast as NumPy's bincount.
    """
    _, _, width, channels = images.shape
    pixels = images.reshape(-1, width, channels)
    step = max(1, _SLICE_PIXELS // width)
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step]
        if channels == _RGB:
            counts += np.array(Image.fromarray(part).histogram()).reshape(counts.shape)
        else:
            counts += [Image.fromarray(np.ascontiguousarray(part[..., c])).histogram() for c in range(channels)]
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
