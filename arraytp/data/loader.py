"""Batches of a split: order, augmentation and normalisation as functions of seed, epoch and position only."""

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from arraytp.backend import NUMPY, Array, Backend, Upload, copy_stream
from arraytp.data import augment, prepare
from arraytp.data.background import BUFFERS, worked_ahead
from arraytp.data.dataset import Dataset
from arraytp.data.division import Division
from arraytp.data.order import Rows, memory_order, pool_plan
from arraytp.data.pool import Pool
from arraytp.data.shards import Images, Labels, Room
from arraytp.errors import UserError
from arraytp.ranks import share

Batches = Generator[tuple[Array, Array], None, None]

_Span = tuple[int, int]
_MOST_THREADS = 2


class _Source(Protocol):
    """The store of an epoch's images: rows of `images` (R, H, W, C) uint8 and `labels` (R,) int64."""

    @property
    def images(self) -> Images: ...
    @property
    def labels(self) -> Labels: ...

    def claim(self, start: int, stop: int) -> Rows:
        """Return the rows of positions `start` to `stop` − 1; called in order of position.

        The rows keep their images until they are released.
        """

    def release(self, rows: Rows) -> None:
        """Release claimed rows; any thread may call this."""


class _Memory(NamedTuple):
    """A split in memory, and the row at each position."""

    images: Images
    labels: Labels
    order: Rows

    def claim(self, start: int, stop: int) -> Rows:
        return self.order[start:stop]

    def release(self, rows: Rows) -> None:
        pass


@dataclass
class _HostBuffer:
    """Arrays for a batch, the rows of the source that it is read from, and the workspace of one thread."""

    rows: Rows
    images: npt.NDArray[Any]
    labels: Labels
    augmenter: prepare.Augmenter


class _DeviceBuffer(NamedTuple):
    """The uploads of a batch's images and labels to the device."""

    images: Upload
    labels: Upload


class Loader:
    """The batches of one split of a data set.

    An epoch takes every image once; its last batch may be smaller. Batches are a function of (seed, epoch, position),
    so an epoch can start at any batch. A split of at most `in_memory_bytes` is read and verified up front; a larger one
    is streamed through a pool.

    Parameters
    ----------
    dataset : Dataset or Division
    split : str
    batch_size : int
    seed : int
    shuffle : bool
        If false, images come in the files' order.
    mean, std : sequence of float, optional
        Of each channel, pixels in [0, 1]: images become (x/255 - mean)/std. By default x/255.
    flip : float
        Probability of mirroring left and right.
    crop_padding : int
        Number of replicated edge pixels added on every side before a random crop to the original size.
    dtype : dtype
        Dtype of the images: float32 or float64.
    in_memory_bytes : int
    pool_images : int
        Images in the pool when streaming.
    share : (rank, ranks)
        Yield only one reader's part of each batch. The parts are disjoint, differ in size by at most one image, and
        make up the batch when concatenated in the order of the ranks.
    backend : Backend
        On a device, images are transferred as uint8 and then augmented and normalised there.

    Raises
    ------
    UserError
        If there is no such split, a shard is damaged, or `mean` or `std` is invalid or does not match the channels.
    """

    def __init__(
        self,
        dataset: Dataset | Division,
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
        share: tuple[int, int] = (0, 1),
        backend: Backend = NUMPY,
    ) -> None:
        self.dataset, self.split, self.batch_size = dataset, split, batch_size
        self.dtype = np.dtype(dtype)
        self.streamed = dataset.nbytes(split) > in_memory_bytes
        self._seed, self._shuffle = seed, shuffle
        self._flip, self._padding, self._augments = flip, crop_padding, bool(flip or crop_padding)
        self._scale, self._shift = _checked_normalisation(dataset, mean, std)
        self._pool_images, self._share, self._backend = pool_images, share, backend
        self._threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._chunks = dataset.chunks(split)
        self._memory = None if self.streamed else dataset.load(split)
        self._stream: Any = None if backend.on_host else copy_stream(backend)
        # Memory of finished epochs, reused by the next: the system is slow to clear newly allocated memory.
        self._spare_memory: list[Room] = []
        self._spare_buffers: list[_HostBuffer] = []

    @property
    def count(self) -> int:
        """The number of images of an epoch."""
        return self.dataset.counts[self.split]

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch."""
        return -(-self.count // self.batch_size)

    def in_order(self, batch_size: int) -> "Loader":
        """Return a loader of the same images in the files' order, neither flipped nor cropped, sharing their memory."""
        loader = copy(self)
        loader.batch_size, loader._shuffle = batch_size, False
        loader._flip, loader._padding, loader._augments = 0.0, 0, False
        # Not shared: buffers have the size of a batch, and those of a loader that crops have room for borders.
        loader._spare_memory, loader._spare_buffers = [], []
        return loader

    def sizes(self, start: int = 0) -> list[int]:
        """Return the number of images of every batch of an epoch, from batch `start` on, summed over all readers."""
        starts = range(start * self.batch_size, self.count, self.batch_size)
        return [min(self.batch_size, self.count - first) for first in starts]

    def batches(self, epoch: int, start: int = 0) -> Batches:
        """Iterate over an epoch from batch `start` on.

        Threads prepare batches ahead of time; they end when the iterator is exhausted or closed, so wrap the iterator
        in `contextlib.closing` if the loop may end early. **A batch on the host is valid until the next but one is
        requested**; its memory is then reused.

        Yields
        ------
        images : array of shape (b, H, W, C), `dtype`
        labels : array of shape (b,), int64

        Raises
        ------
        UserError
            If a shard is damaged; damaged rows are never yielded.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"batch {start} of an epoch with {self.steps_per_epoch}")
        starts = range(start * self.batch_size, self.count, self.batch_size)
        spans = [self._part(first, min(first + self.batch_size, self.count)) for first in starts]
        source = self._source(epoch, spans)
        draws = augment.draw(self._seed, epoch, self.count, self._flip, self._padding) if self._augments else None
        batches = self._host_batches if self._backend.on_host else self._device_batches
        return batches(spans, source, draws)

    def _host_batches(self, spans: list[_Span], source: _Source, draws: augment.Draws | None) -> Batches:
        shape, size = self.dataset.shape, self._most_images()
        normalise = prepare.normaliser(self._scale, self._shift, shape, self.dtype)
        step = prepare.slice_images(shape)

        def fill(span: _Span, buffer: _HostBuffer) -> None:
            buffer.rows = source.claim(*span)

        def work(span: _Span, buffer: _HostBuffer) -> tuple[Array, Array]:
            first, last = span
            images, labels = buffer.images[: last - first], buffer.labels[: last - first]
            np.take(source.labels, buffer.rows, out=labels, mode="clip")
            for low in range(first, last, step):
                part = slice(low - first, min(low + step, last) - first)
                rows, room = buffer.rows[part], buffer.augmenter.images
                if draws is None:
                    normalise.take(source.images, rows, room, images[part])
                else:
                    prepare.gather(source.images, rows, room)
                    normalise(buffer.augmenter(draws.part(low, low + len(rows))), images[part])
            source.release(buffer.rows)
            return images, labels

        def ended(free: list[_HostBuffer]) -> None:
            self._keep(source)
            self._spare_buffers[:] = free

        spare, self._spare_buffers = self._spare_buffers, []
        buffers = spare + [
            _HostBuffer(
                rows=np.empty(0, np.int64),
                images=np.empty((size, *shape), self.dtype),
                labels=np.empty(size, np.int64),
                augmenter=prepare.augmenter(shape, self._padding),
            )
            for _ in range(BUFFERS - len(spare))
        ]
        return worked_ahead(spans, fill, work, buffers, self._threads, ended)

    def _device_batches(self, spans: list[_Span], source: _Source, draws: augment.Draws | None) -> Batches:
        to_device, stream = self._backend.asarray, self._stream
        size = self._most_images()
        scale, shift = (to_device(values.astype(self.dtype)) for values in (self._scale, self._shift))

        def fill(span: _Span, buffer: _DeviceBuffer) -> None:
            for upload in buffer:
                upload.await_room()
            rows = source.claim(*span)
            prepare.gather(source.images, rows, buffer.images.host)
            np.take(source.labels, rows, out=buffer.labels.host[: len(rows)], mode="clip")
            source.release(rows)

        def work(span: _Span, buffer: _DeviceBuffer) -> tuple[_Span, _DeviceBuffer]:
            for upload in buffer:
                upload.send(span[1] - span[0])
            return span, buffer

        shapes = ((size, *self.dataset.shape), np.dtype(np.uint8)), ((size,), np.dtype(np.int64))
        buffers = [
            _DeviceBuffer(*(Upload(self._backend, stream, shape, dtype) for shape, dtype in shapes))
            for _ in range(BUFFERS)
        ]

        def ended(_: list[_DeviceBuffer]) -> None:
            self._keep(source)
            # The buffers' memory is about to be freed, and copies of batches never requested may still be in progress.
            stream.synchronize()

        ahead = worked_ahead(spans, fill, work, buffers, self._threads, ended)
        with closing(ahead) as prepared:
            for (first, last), buffer in prepared:
                images, labels = (upload.received(last - first) for upload in buffer)
                if draws is not None:
                    flips, top, left = map(to_device, draws.part(first, last))
                    images = augment.flip_images(images, flips)
                    images = augment.crop_images(images, top, left, self._padding) if self._padding else images
                batch = augment.normalise(images, scale, shift), labels.copy()
                for upload in buffer:
                    upload.release()
                yield batch

    def _most_images(self) -> int:
        """Return the number of images that a reader's part of a batch has at most."""
        return -(-min(self.batch_size, self.count) // self._share[1])

    def _source(self, epoch: int, spans: list[_Span]) -> _Source:
        """Return the source of an epoch's images at the positions in `spans`."""
        if self._memory is None:
            plan = pool_plan(self._chunks, self._pool_images, self._seed, epoch, shuffle=self._shuffle)
            # Each thread may hold this reader's part of one batch.
            held = self._threads * self._most_images()
            memory = self._spare_memory.pop() if self._spare_memory else None
            return Pool(self.dataset, self.split, plan, spans, held, memory)
        return _Memory(*self._memory, memory_order(self.count, self._seed, epoch, shuffle=self._shuffle))

    def _keep(self, source: _Source) -> None:
        """Keep the memory of a pool whose epoch has ended."""
        if isinstance(source, Pool):
            self._spare_memory[:] = [source.memory]

    def _part(self, first: int, last: int) -> _Span:
        """Return this reader's part of a batch."""
        start, stop = share(last - first, *self._share)
        return first + start, first + stop


def _checked_normalisation(
    dataset: Dataset | Division, mean: Sequence[float] | None, std: Sequence[float] | None
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
