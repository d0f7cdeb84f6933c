"""The host's fast path from uint8 rows to a normalised batch: `arraytp.data.augment` with preallocated buffers.

It works in slices that stay in the cache, copies whole image rows, and allocates no array of batch size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arraytp.data.augment import Draws
from arraytp.data.shards import Images

Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.int64]
_SLICE_BYTES = 3 * 2**18
_GATHERED_BYTES = 2**16
_PATTERN_VALUES = 2**14


@dataclass(frozen=True)
class Normaliser:
    """Scale and shift for a few rows of an image, or all: as many values as fit into the first two cache levels.

    If all channels agree, `scale` and `shift` are single numbers. A `shift` of None means 0.
    """

    values: int
    scale: Floats
    shift: Floats | None

    def __call__(self, images: Images, out: Floats) -> None:
        """Write images·scale + shift, images (n, H, W, C) uint8, into `out` of the same shape, C-contiguous."""
        np.copyto(out, images)
        self._scale(out)

    def take(self, images: Images, rows: Rows, room: Images, out: Floats) -> None:
        """Write images[rows]·scale + shift into `out` (n, H, W, C); small images are gathered in `room` first."""
        if images[0].nbytes < _GATHERED_BYTES:
            np.copyto(out, gather(images, rows, room))
        else:
            for row, place in zip(rows.tolist(), out, strict=True):
                place[...] = images[row]
        self._scale(out)

    def _scale(self, images: Floats) -> None:
        lines = images.reshape(-1, self.values)
        np.multiply(lines, self.scale, out=lines)
        if self.shift is not None:
            np.add(lines, self.shift, out=lines)


def normaliser(
    scale: npt.NDArray[np.float64], shift: npt.NDArray[np.float64], shape: tuple[int, int, int], dtype: npt.DTypeLike
) -> Normaliser:
    """Return a normaliser of images (H, W, C); `scale` and `shift` (C,) are those of `augment.scale_and_shift`."""
    height, width, channels = shape
    rows = max(
        n for n in range(1, height + 1) if n == 1 or (height % n == 0 and n * width * channels <= _PATTERN_VALUES)
    )
    if (scale == scale[0]).all() and (shift == shift[0]).all():
        spread = scale[0].astype(dtype), shift[0].astype(dtype)
    else:
        spread = np.tile(scale, rows * width).astype(dtype), np.tile(shift, rows * width).astype(dtype)
    return Normaliser(rows * width * channels, spread[0], spread[1] if shift.any() else None)


def gather(images: Images, rows: Rows, room: Images) -> Images:
    """Copy images[rows] into the first places of `room`, and return these."""
    # The rows are in range; with any other mode NumPy copies into a buffer first.
    return np.take(images, rows, axis=0, out=room[: len(rows)], mode="clip")


@dataclass(frozen=True)
class Augmenter:
    """Flip and crop of at most `slice_images` images at a time.

    `images` (n, H, W, C) holds the input, in a buffer with `padding` extra pixels before and after. There are two
    further views of the buffer: `pixels` (n, H, W), each of C bytes, and `windows`, whose element i is the W·C bytes
    from byte i of the buffer on, so that cropping is one gather of whole image rows. Where a crop reaches beyond its
    image's edge, the gather brings pixels of another row, which are then overwritten by the edge pixel. `cropped`
    holds the result.
    """

    padding: int
    images: Images
    pixels: npt.NDArray[np.void]
    windows: npt.NDArray[np.void]
    cropped: Images

    def __call__(self, draws: Draws) -> Images:
        """Flip and crop the first len(draws.flips) images of `images`, which are overwritten; return the result."""
        count, height, width, channels = len(draws.flips), *self.images.shape[1:]
        _mirror(self.images, np.flatnonzero(draws.flips))
        if not self.padding:
            return self.images[:count]
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
        """Write the padding pixels left and right of the image; `y` (n, H) is the row that each row was taken from."""
        width = cropped.shape[2]
        for step in range(1, self.padding + 1):
            beyond = min(step, width)
            for which, edge, columns in (
                (np.flatnonzero(moved == -step), 0, slice(beyond)),
                (np.flatnonzero(moved == step), width - 1, slice(width - beyond, None)),
            ):
                cropped[which, :, columns] = self.pixels[which[:, None], y[which], edge][:, :, None]


def _mirror(images: Images, which: npt.NDArray[np.intp]) -> None:
    """Mirror the images `which` in place, channel by channel: copying pixels of a few bytes each would be slow."""
    taken = images[which]
    mirrored = np.empty_like(taken)
    for channel in range(images.shape[3]):
        mirrored[..., channel] = taken[:, :, ::-1, channel]
    images[which] = mirrored


def augmenter(shape: tuple[int, int, int], padding: int) -> Augmenter:
    """Allocate the workspaces for images of a shape (H, W, C)."""
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
    """Return how many images of a shape (H, W, C) are processed at a time."""
    return max(1, _SLICE_BYTES // int(np.prod(shape)))
