"""The host's fast path from uint8 rows to a normalised batch: the definitions of `arraytp.data.augment` with buffers.

It works in slices that stay in the cache, copies whole image rows, and allocates no array of batch size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arraytp.data.augment import Draws
from arraytp.data.shards import Images

Floats = npt.NDArray[np.floating]
_SLICE_BYTES = 3 * 2**17


@dataclass(frozen=True)
class Normaliser:
    """Scale and shift for one image, either spread over its H·W·C values or, where all channels agree, one number."""

    scale: Floats
    shift: Floats

    def __call__(self, images: Images, out: Floats) -> None:
        """Write images·scale + shift, images (n, H, W, C) uint8, into `out` of the same shape."""
        flat = out.reshape(len(out), -1)
        np.copyto(flat, images.reshape(flat.shape))
        np.multiply(flat, self.scale, out=flat)
        if self.shift.any():
            np.add(flat, self.shift, out=flat)


def normaliser(
    scale: npt.NDArray[np.float64], shift: npt.NDArray[np.float64], shape: tuple[int, int, int], dtype: npt.DTypeLike
) -> Normaliser:
    """Prepare to normalise images of a shape (H, W, C); `scale` and `shift` (C,) as `augment.scale_and_shift` gives."""
    pixels = shape[0] * shape[1]
    if (scale == scale[0]).all() and (shift == shift[0]).all():
        return Normaliser(scale[0].astype(dtype), shift[0].astype(dtype))
    return Normaliser(np.tile(scale, pixels).astype(dtype), np.tile(shift, pixels).astype(dtype))


@dataclass(frozen=True)
class Augmenter:
    """Flip and crop of at most `slice_images` images at a time.

    `padded` (n, H, W + 2·padding, C) is a workspace with two views on it: `pixels` (n, H, W + 2·padding), each of C
    bytes, and `windows`, whose element i is the W·C bytes from byte i on, so that cropping is one gather of whole
    image rows. `cropped` takes the result.
    """

    padding: int
    padded: Images
    pixels: npt.NDArray[np.void]
    windows: npt.NDArray[np.void]
    cropped: Images

    def __call__(self, images: Images, draws: Draws) -> Images:
        """Return images (n, H, W, C) uint8 flipped and cropped; they are used as workspace, too."""
        flipped = np.flatnonzero(draws.flips)
        if not self.padding:
            _mirror(images, flipped, images)
            return images
        count, height, width, channels = images.shape
        padding, padded = self.padding, self.padded[:count]
        centre = padded[:, :, padding : padding + width]
        centre[...] = images
        _mirror(images, flipped, centre)
        pixels = self.pixels[:count]
        pixels[:, :, :padding] = pixels[:, :, padding : padding + 1]
        pixels[:, :, padding + width :] = pixels[:, :, padding + width - 1 : padding + width]
        y = np.clip(np.arange(height) + (draws.rows - padding)[:, None], 0, height - 1)
        lines = np.arange(count)[:, None] * height + y
        starts = (lines * padded.shape[2] + draws.columns[:, None]) * channels
        cropped = self.cropped[:count]
        cropped.reshape(-1).view(self.windows.dtype)[:] = self.windows[starts.reshape(-1)]
        return cropped


def _mirror(images: Images, which: npt.NDArray[np.intp], out: Images) -> None:
    """Write the mirrored images into `out`, which may be `images`; channel by channel, as pixels are short to copy."""
    taken = images[which]
    mirrored = np.empty_like(taken)
    for channel in range(images.shape[3]):
        mirrored[..., channel] = taken[:, :, ::-1, channel]
    out[which] = mirrored


def augmenter(shape: tuple[int, int, int], padding: int) -> Augmenter:
    """Make the workspaces for images of a shape (H, W, C)."""
    height, width, channels = shape
    count = slice_images(shape)
    padded = np.empty((count, height, width + 2 * padding, channels), np.uint8)
    pixels = padded.view(np.dtype((np.void, channels)))[..., 0]
    row = np.dtype((np.void, width * channels))
    windows: npt.NDArray[np.void] = np.ndarray((padded.size - row.itemsize + 1,), row, padded, strides=(1,))
    return Augmenter(padding, padded, pixels, windows, np.empty((count, *shape), np.uint8))


def slice_images(shape: tuple[int, int, int]) -> int:
    """Return how many images of a shape (H, W, C) are worked on at a time."""
    return max(1, _SLICE_BYTES // int(np.prod(shape)))
