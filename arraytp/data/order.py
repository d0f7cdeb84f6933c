"""In which order an epoch takes its images: a function of seed and epoch only, known before any image is read.

In memory an epoch is one permutation. Streamed, chunks of rows come in random order into a pool, and each chunk
takes the places of as many randomly chosen images as have just left; the pool is planned with row numbers alone,
so an epoch can be entered at any position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arraytp.streams import stream

Rows = npt.NDArray[np.int64]


def memory_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> Rows:
    """Return the row at each position of an epoch, (count,) int64."""
    return stream(seed, "shuffle", epoch).permutation(count) if shuffle else np.arange(count)


@dataclass(frozen=True)
class PoolPlan:
    """An epoch of streaming.

    Attributes
    ----------
    chunks : array of shape (K, 2), int64
        First row and row after the last of each chunk, in the order of reading. The rows in this order are
        the *arrivals*.
    arrived : array of shape (K + 1,), int64
        Arrivals before each chunk.
    capacity : int
        Places in the pool: the arrivals of the first whole chunks.
    places : array of shape (N,), int64
        The place that the image at each position leaves. Arrival j goes to place j if j < capacity, else to
        places[j - capacity].
    """

    chunks: Rows
    arrived: Rows
    capacity: int
    places: Rows

    def due(self, chunk: int) -> int:
        """Return the position before which a chunk must be in the pool, and after which it may come in.

        Zero for the chunks that fill the pool first.
        """
        return max(0, int(self.arrived[chunk + 1]) - self.capacity)

    def arrival_rows(self) -> Rows:
        """Return the row of each arrival, (N,) int64."""
        lengths = np.diff(self.arrived)
        return np.repeat(self.chunks[:, 0] - self.arrived[:-1], lengths) + np.arange(self.arrived[-1])


def pool_plan(chunks: Sequence[tuple[int, int]], pool_images: int, seed: int, epoch: int, *, shuffle: bool) -> PoolPlan:
    """Plan an epoch of streaming.

    Parameters
    ----------
    chunks : sequence of (start, stop)
        All rows of the split, in order.
    pool_images : int
        The pool holds at least this many images, and at least one chunk; at most the split.
    seed, epoch : int
    shuffle : bool
        Otherwise rows come in order.
    """
    table = np.array(chunks, np.int64)
    generator = stream(seed, "shuffle", epoch)
    if shuffle:
        table = table[generator.permutation(len(table))]
    arrived = np.concatenate(([0], np.cumsum(table[:, 1] - table[:, 0])))
    total = int(arrived[-1])
    needed = min(total, max(pool_images, int(np.diff(arrived).max())))
    first = int(np.searchsorted(arrived, needed))
    capacity = int(arrived[first])
    if not shuffle:
        return PoolPlan(table, arrived, capacity, np.arange(total) % capacity)
    leaving = [
        generator.choice(capacity, int(arrived[chunk + 1] - arrived[chunk]), replace=False)
        for chunk in range(first, len(table))
    ]
    return PoolPlan(table, arrived, capacity, np.concatenate([*leaving, generator.permutation(capacity)]))


def pool_content(plan: PoolPlan, position: int) -> tuple[Rows, int]:
    """Return what the pool holds when the images before `position` have left.

    Returns
    -------
    arrivals : array of shape (capacity,), int64
        The arrival in each place; -1 where it has left.
    chunk : int
        The next chunk to come in.
    """
    chunk = int(np.searchsorted(plan.arrived - plan.capacity, position, side="right")) - 1
    replaced = int(plan.arrived[chunk]) - plan.capacity
    arrivals = np.arange(plan.capacity)
    # Of several arrivals in one place the last one counts, which is how NumPy assigns.
    arrivals[plan.places[:replaced]] = plan.capacity + np.arange(replaced)
    arrivals[plan.places[replaced:position]] = -1
    return arrivals, chunk
