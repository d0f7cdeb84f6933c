"""Flip, edge-padded crop and normalisation, on either array module; random numbers are drawn on the host.

These functions are the readable definitions. On a device they are what runs; on the host, `arraytp.data.prepare`
computes the same results faster.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from arraytp.backend import Array, array_module
from arraytp.streams import stream

Floats = npt.NDArray[np.float64]


class Draws(NamedTuple):
    """Random draws for each image: `flips` (N,) bool; `rows`, `columns` (N,) int64, the top left corner of the crop."""

    flips: npt.NDArray[np.bool_]
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> "Draws":
        """Return the draws for images `start` to `stop` − 1."""
        return Draws(self.flips[start:stop], self.rows[start:stop], self.columns[start:stop])


def draw(seed: int, epoch: int, count: int, flip: float, padding: int) -> Draws:
    """Draw the augmentation of every position of an epoch of `count` images.

    `flip` is the probability of a flip. Crops start at rows and columns 0 to 2·padding of the padded image.
    """
    generator = stream(seed, "augment", epoch)
    flips = generator.random(count) < flip
    rows, columns = generator.integers(0, 2 * padding + 1, (2, count))
    return Draws(flips, rows, columns)


def flip_images(images: Array, flips: Array) -> Array:
    """Mirror left and right where `flips` (B,) bool is true: images (B, H, W, C) → the same shape and dtype."""
    xp = array_module(images, flips)
    return xp.where(flips[:, None, None, None], images[:, :, ::-1, :], images)


def crop_images(images: Array, rows: Array, columns: Array, padding: int) -> Array:
    """Pad each image by replicating its edge pixels, then crop it to its original size.

    `images` and the result are (B, H, W, C), of the same dtype. `rows` and `columns`, (B,) int64 from 0 to 2·padding,
    are the top left corners of the crops in the images padded by `padding` pixels on every side.
    """
    xp = array_module(images, rows, columns)
    batch, height, width, channels = images.shape
    # A padding pixel equals the nearest pixel of the image, so clipped indices replace an explicit padded image.
    y = xp.clip(xp.arange(height)[None, :] + rows[:, None] - padding, 0, height - 1)
    x = xp.clip(xp.arange(width)[None, :] + columns[:, None] - padding, 0, width - 1)
    line = xp.arange(batch)[:, None] * height + y
    pixel = line[:, :, None] * width + x[:, None, :]
    flat = xp.reshape(images, (batch * height * width, channels))
    return xp.reshape(xp.take(flat, xp.reshape(pixel, (-1,)), axis=0), images.shape)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Floats, Floats]:
    """Return scale and shift (C,) float64 so that (x/255 - mean)/std = x·scale + shift."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    return scale, -np.asarray(mean, np.float64) / np.asarray(std, np.float64)


def normalise(images: Array, scale: Array, shift: Array) -> Array:
    """Return images·scale + shift: images (B, H, W, C) uint8, scale and shift (C,) of the dtype of the result."""
    xp = array_module(images, scale, shift)
    return xp.asarray(images, dtype=scale.dtype) * scale + shift
