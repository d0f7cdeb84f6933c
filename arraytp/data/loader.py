"""Batches of a split: order, augmentation and normalisation as functions of seed, epoch and position only."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from arraytp.backend import Array
from arraytp.data import augment, prepare
from arraytp.data.background import BUFFERS, worked_ahead
from arraytp.data.dataset import Dataset
from arraytp.data.order import memory_order, pool_plan
from arraytp.data.pool import Pool
from arraytp.data.shards import Images, Labels
from arraytp.errors import UserError

Take = Callable[[int, Images, Labels], None]
"""Writes the images and labels of the positions from a given one on."""

Batches = Generator[tuple[Array, Array], None, None]

_Buffer = tuple[npt.NDArray[Any], Labels]
_Span = tuple[int, int]


class Loader:
    """The batches of one split of a data set.

    An epoch takes every image once; its last batch may be smaller. Batches are a function of (seed, epoch, position),
    so an epoch can be entered at any batch. A split of at most `in_memory_bytes` is read and verified at once; a
    larger one is streamed through a pool.

    Parameters
    ----------
    dataset : Dataset
    split : str
    batch_size : int
    seed : int
    shuffle : bool
        Otherwise images come in the files' order.
    mean, std : sequence of float, optional
        Of each channel, pixels in [0, 1]: images become (x/255 - mean)/std. By default x/255.
    flip : float
        Probability of mirroring left and right.
    crop_padding : int
        Random crop out of the image padded by so many replicated edge pixels.
    dtype : dtype
        Of the images: float32 or float64.
    in_memory_bytes : int
    pool_images : int
        Images in the pool when streaming.
    to_device : callable, optional
        Copies an array of the host to a device, where images are then augmented and normalised. By default all is
        done on the host.

    Raises
    ------
    UserError
        No such split, a damaged shard, or `mean` and `std` that do not fit the channels.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flip: float = 0.0,
        crop_padding: int = 0,
        dtype: npt.DTypeLike = np.float32,
        in_memory_bytes: int = 2**32,
        pool_images: int = 16384,
        to_device: Callable[[npt.NDArray[Any]], Array] | None = None,
    ) -> None:
        self.dataset, self.split, self.batch_size = dataset, split, batch_size
        self.dtype = np.dtype(dtype)
        self.streamed = dataset.nbytes(split) > in_memory_bytes
        self._seed, self._shuffle = seed, shuffle
        self._flip, self._padding, self._augments = flip, crop_padding, bool(flip or crop_padding)
        self._scale, self._shift = _checked_normalisation(dataset, mean, std)
        self._pool_images, self._to_device = pool_images, to_device
        self._chunks = dataset.chunks(split)
        self._memory = None if self.streamed else dataset.load(split)

    @property
    def count(self) -> int:
        """The number of images of an epoch."""
        return self.dataset.counts[self.split]

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch."""
        return -(-self.count // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Batches:
        """Iterate over an epoch from batch `start` on.

        A thread prepares up to two batches ahead; it ends when the iterator is exhausted or closed, so wrap the
        iterator in `contextlib.closing` where the loop may be left early. **A batch on the host is valid until the
        next but one is requested**; then its memory is used again.

        Yields
        ------
        images : array of shape (b, H, W, C), `dtype`
        labels : array of shape (b,), int64

        Raises
        ------
        UserError
            A shard is damaged; nothing of the damaged rows is yielded.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"batch {start} of an epoch with {self.steps_per_epoch}")
        starts = range(start * self.batch_size, self.count, self.batch_size)
        spans = [(first, min(first + self.batch_size, self.count)) for first in starts]
        take = self._taker(epoch, start * self.batch_size)
        draws = augment.draw(self._seed, epoch, self.count, self._flip, self._padding) if self._augments else None
        if self._to_device is not None:
            return self._device_batches(spans, take, draws, self._to_device)
        return self._host_batches(spans, take, draws)

    def _host_batches(self, spans: list[_Span], take: Take, draws: augment.Draws | None) -> Batches:
        shape = self.dataset.shape
        augmenter = prepare.augmenter(shape, self._padding)
        normalise = prepare.normaliser(self._scale, self._shift, shape, self.dtype)
        step = prepare.slice_images(shape)
        scratch = np.empty((step, *shape), np.uint8)

        def work(span: _Span, buffer: _Buffer) -> tuple[Array, Array]:
            first, last = span
            images, labels = buffer[0][: last - first], buffer[1][: last - first]
            for low in range(0, len(images), step):
                part = slice(low, min(low + step, len(images)))
                rows = scratch[: part.stop - low]
                take(first + low, rows, labels[part])
                if draws is not None:
                    rows = augmenter(rows, draws.part(first + low, first + part.stop))
                normalise(rows, images[part])
            return images, labels

        return worked_ahead(spans, work, self._buffers(self.dtype))

    def _device_batches(
        self,
        spans: list[_Span],
        take: Take,
        draws: augment.Draws | None,
        to_device: Callable[[npt.NDArray[Any]], Array],
    ) -> Batches:
        scale, shift = (to_device(values.astype(self.dtype)) for values in (self._scale, self._shift))

        def work(span: _Span, buffer: _Buffer) -> tuple[_Span, Images, Labels]:
            first, last = span
            images, labels = buffer[0][: last - first], buffer[1][: last - first]
            take(first, images, labels)
            return span, images, labels

        with closing(worked_ahead(spans, work, self._buffers(np.uint8))) as prepared:
            for (first, last), host_images, labels in prepared:
                images = to_device(host_images)
                if draws is not None:
                    flips, rows, columns = map(to_device, draws.part(first, last))
                    images = augment.flip_images(images, flips)
                    images = augment.crop_images(images, rows, columns, self._padding) if self._padding else images
                yield augment.normalise(images, scale, shift), to_device(labels)

    def _buffers(self, dtype: npt.DTypeLike) -> list[_Buffer]:
        size = min(self.batch_size, self.count)
        return [(np.empty((size, *self.dataset.shape), dtype), np.empty(size, np.int64)) for _ in range(BUFFERS)]

    def _taker(self, epoch: int, position: int) -> Take:
        """Return what takes an epoch's images from a position on."""
        if self._memory is None:
            plan = pool_plan(self._chunks, self._pool_images, self._seed, epoch, shuffle=self._shuffle)
            return Pool(self.dataset, self.split, plan, position).take
        all_images, all_labels = self._memory
        order = memory_order(self.count, self._seed, epoch, shuffle=self._shuffle)

        def take(start: int, images: Images, labels: Labels) -> None:
            rows = order[start : start + len(images)]
            # The rows are in range; with any other mode NumPy copies into a buffer first.
            np.take(all_images, rows, axis=0, out=images, mode="clip")
            np.take(all_labels, rows, out=labels, mode="clip")

        return take


def _checked_normalisation(
    dataset: Dataset, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    channels = dataset.shape[2]
    means = [0.0] * channels if mean is None else list(mean)
    stds = [1.0] * channels if std is None else list(std)
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            raise UserError(f"normalisation of {dataset.name}: {len(values)} values of {name}, expected {channels}")
        if not np.isfinite(values).all():
            raise UserError(f"normalisation of {dataset.name}: {name} is {values}, expected finite numbers")
    if min(stds) <= 0:
        raise UserError(f"normalisation of {dataset.name}: std is {stds}, expected numbers above 0")
    return augment.scale_and_shift(means, stds)
