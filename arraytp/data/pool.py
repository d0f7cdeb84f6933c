"""The shuffle pool of a streamed epoch: images wait here between their chunk's reading and their turn."""

import numpy as np

from arraytp.data.dataset import Dataset
from arraytp.data.order import PoolPlan, pool_content
from arraytp.data.shards import Images, Labels


class Pool:
    """A streamed epoch from a position on; it reads ahead no more than the plan says.

    Parameters
    ----------
    dataset : Dataset
    split : str
    plan : PoolPlan
    position : int
        The first image that will be taken.

    Raises
    ------
    UserError
        A chunk that is needed at once is damaged.
    """

    def __init__(self, dataset: Dataset, split: str, plan: PoolPlan, position: int) -> None:
        longest = int(np.diff(plan.arrived).max())
        self._dataset, self._split, self._plan = dataset, split, plan
        self._images = np.empty((plan.capacity, *dataset.shape), np.uint8)
        self._labels = np.empty(plan.capacity, np.int64)
        self._chunk_images = np.empty((longest, *dataset.shape), np.uint8)
        self._chunk_labels = np.empty(longest, np.int64)
        arrivals, self._next = pool_content(plan, position)
        self._restore(arrivals)

    def take(self, start: int, images: Images, labels: Labels) -> None:
        """Write the images and labels of the positions from `start` on; later calls are for later positions."""
        plan, done = self._plan, 0
        while done < len(images):
            while self._due() <= start + done:
                self._let_in()
            end = min(len(images), self._due() - start)
            places = plan.places[start + done : start + end]
            np.take(self._images, places, axis=0, out=images[done:end], mode="clip")
            np.take(self._labels, places, out=labels[done:end], mode="clip")
            done = end

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
        """Put the next chunk where as many images have left."""
        images, labels = self._read(self._next)
        due = self._plan.due(self._next)
        places = self._plan.places[due - len(images) : due]
        self._images[places] = images
        self._labels[places] = labels
        self._next += 1

    def _restore(self, arrivals: np.ndarray) -> None:
        """Fill the pool with given arrivals, each chunk read once."""
        places = np.flatnonzero(arrivals >= 0)
        chunks = np.searchsorted(self._plan.arrived, arrivals[places], side="right") - 1
        for chunk in np.unique(chunks):
            here = places[chunks == chunk]
            rows = arrivals[here] - self._plan.arrived[chunk]
            images, labels = self._read(int(chunk))
            self._images[here] = images[rows]
            self._labels[here] = labels[rows]
