"""The host's fast path from uint8 rows to a normalised batch: the definitions of `arraytp.data.augment` with buffers.

It works in slices that stay in the cache, copies whole image rows, and allocates no array of batch size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arraytp.data.augment import Draws
from arraytp.data.shards import Images

Floats = npt.NDArray[np.floating]
_SLICE_BYTES = 3 * 2**18


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

    `images` (n, H, W, C) is a workspace with room for `padding` pixels before and behind it. Two views show it
    otherwise: `pixels` (n, H, W), each of C bytes, and `windows`, whose element i is the W·C bytes from byte i of the
    room on, so that cropping is one gather of whole image rows. Where a row is moved beyond its image's edge, the
    gather brings pixels of another row, which are then overwritten by the edge's. `cropped` takes the result.
    """

    padding: int
    images: Images
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
        np.copyto(self.images[:count], images)
        _mirror(images, flipped, self.images)
        y = np.clip(np.arange(height) + (draws.rows - self.padding)[:, None], 0, height - 1)
        lines = np.arange(count)[:, None] * height + y
        starts = (lines * width + draws.columns[:, None]) * channels
        cropped = self.cropped[:count]
        cropped.reshape(-1).view(self.windows.dtype)[:] = self.windows[starts.reshape(-1)]
        self._replicate_edges(cropped.view(self.pixels.dtype)[..., 0], y, draws.columns - self.padding)
        return cropped

    def _replicate_edges(
        self, cropped: npt.NDArray[np.void], y: npt.NDArray[np.int64], moved: npt.NDArray[np.int64]
    ) -> None:
        """Write the pixels of the padding: y (n, H) is the row that each row was taken from."""
        width = cropped.shape[2]
        for step in range(1, self.padding + 1):
            beyond = min(step, width)
            for which, edge, columns in (
                (np.flatnonzero(moved == -step), 0, slice(beyond)),
                (np.flatnonzero(moved == step), width - 1, slice(width - beyond, None)),
            ):
                cropped[which, :, columns] = self.pixels[which[:, None], y[which], edge][:, :, None]


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
    margin = padding * channels
    room = np.zeros(count * height * width * channels + 2 * margin, np.uint8)
    images = room[margin : room.size - margin].reshape(count, *shape)
    pixels = images.view(np.dtype((np.void, channels)))[..., 0]
    row = np.dtype((np.void, width * channels))
    windows: npt.NDArray[np.void] = np.ndarray((room.size - row.itemsize + 1,), row, room, strides=(1,))
    return Augmenter(padding, images, pixels, windows, np.empty((count, *shape), np.uint8))


def slice_images(shape: tuple[int, int, int]) -> int:
    """Return how many images of a shape (H, W, C) are worked on at a time."""
    return max(1, _SLICE_BYTES // int(np.prod(shape)))
