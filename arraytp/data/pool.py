"""The shuffle pool of a streamed epoch: images wait here between their chunk's reading and their turn."""

import threading
from typing import NamedTuple

import numpy as np

from arraytp.data.dataset import Dataset
from arraytp.data.division import Division
from arraytp.data.order import PoolPlan, Rows, pool_content
from arraytp.data.shards import Images, Labels


class Memory(NamedTuple):
    """The arrays of a pool: `images` (R, H, W, C) uint8 and `labels` (R,) int64."""

    images: Images
    labels: Labels


class Pool:
    """A streamed epoch from a position on; it reads ahead no more than the plan says.

    An image that leaves its place stays where it lies, in a row of `images` (R, H, W, C) and `labels` (R,), until that
    row is released: so threads can use it there, while the next chunk comes into rows that are free.

    Parameters
    ----------
    dataset : Dataset or Division
    split : str
    plan : PoolPlan
    position : int
        The first image that will be taken.
    held : int
        At most so many images have left and are not released.
    memory : Memory, optional
        Of an earlier pool of the split that nobody uses any more; replaced where it is too small.

    Raises
    ------
    UserError
        A chunk that is needed at once is damaged.
    """

    def __init__(
        self,
        dataset: Dataset | Division,
        split: str,
        plan: PoolPlan,
        position: int,
        held: int,
        memory: Memory | None = None,
    ) -> None:
        longest = int(np.diff(plan.arrived).max())
        self._dataset, self._split, self._plan, self._position = dataset, split, plan, position
        count = plan.capacity + held
        if memory is None or len(memory.images) < count:
            memory = Memory(np.empty((count, *dataset.shape), np.uint8), np.empty(count, np.int64))
        self.memory = memory
        self._row_of_place = np.arange(plan.capacity)
        self._freeing = threading.Lock()
        self._chunk_images = np.empty((longest, *dataset.shape), np.uint8)
        self._chunk_labels = np.empty(longest, np.int64)
        arrivals, self._next = pool_content(plan, position)
        spare = np.arange(plan.capacity, plan.capacity + held)
        self._free = np.concatenate((np.flatnonzero(arrivals < 0), spare))
        self._restore(arrivals)

    @property
    def images(self) -> Images:
        """The rows' images."""
        return self.memory.images

    @property
    def labels(self) -> Labels:
        """The rows' labels."""
        return self.memory.labels

    def claim(self, start: int, stop: int) -> Rows:
        """Return the rows of the images at some positions; later calls are for later positions.

        Images at positions that are left out are gone.
        """
        self.release(self._leave(start))
        return self._leave(stop)

    def release(self, rows: Rows) -> None:
        """Give rows back that are not needed any more; any thread may."""
        with self._freeing:
            self._free = np.concatenate((self._free, rows))

    def _leave(self, stop: int) -> Rows:
        """Let all images before a position leave, and chunks come in as they are due; return the images' rows."""
        left = [self._free[:0]]
        while self._position < stop:
            while self._due() <= self._position:
                self._let_in()
            end = min(stop, self._due())
            left.append(self._row_of_place[self._plan.places[self._position : end]])
            self._position = end
        return np.concatenate(left)

    def _due(self) -> int:
        """Return the position before which the next chunk must come in; behind the epoch when all have."""
        plan = self._plan
        return plan.due(self._next) if self._next < len(plan.chunks) else len(plan.places) + 1

    def _read(self, chunk: int) -> tuple[Images, Labels]:
        first, last = self._plan.chunks[chunk]
        images, labels = self._chunk_images[: last - first], self._chunk_labels[: last - first]
        self._dataset.read_into(self._split, int(first), images, labels)
        return images, labels

    def _let_in(self) -> None:
        """Give the places of as many images as have left to the next chunk."""
        images, labels = self._read(self._next)
        due = self._plan.due(self._next)
        with self._freeing:
            rows, self._free = np.split(self._free, [len(images)])
        self.images[rows] = images
        self.labels[rows] = labels
        self._row_of_place[self._plan.places[due - len(images) : due]] = rows
        self._next += 1

    def _restore(self, arrivals: Rows) -> None:
        """Fill the pool with given arrivals, each chunk read once."""
        places = np.flatnonzero(arrivals >= 0)
        chunks = np.searchsorted(self._plan.arrived, arrivals[places], side="right") - 1
        for chunk in np.unique(chunks):
            filled = places[chunks == chunk]
            rows = arrivals[filled] - self._plan.arrived[chunk]
            images, labels = self._read(int(chunk))
            self.images[filled] = images[rows]
            self.labels[filled] = labels[rows]
