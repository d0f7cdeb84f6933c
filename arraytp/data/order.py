"""In which order an epoch takes its images: a function of seed and epoch only, known before any image is read.

In memory an epoch is one permutation. Streamed, chunks of rows come in random order into a pool, and each chunk
takes the places of as many randomly chosen images as have just left; the pool is planned with row numbers alone,
so an epoch can be entered at any position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    `chunks` (K, 2) are first row and row after the last of each chunk, in the order of reading; the rows in this order
    are the *arrivals*, `arrived` (K + 1,) of them before each chunk. The pool has `capacity` places: the arrivals of
    the first whole chunks. `leaving` (N,) is the arrival that leaves at each position.
    """

    chunks: Rows
    arrived: Rows
    capacity: int
    leaving: Rows

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
    """Plan an epoch of streaming of chunks (start, stop) that are all rows of the split, in order.

    The pool holds at least `pool_images` images and one chunk; at most the split. Without `shuffle` rows come in order.
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
        return PoolPlan(table, arrived, capacity, np.arange(total))
    content, leaving = np.arange(capacity), np.empty(total, np.int64)
    for start, stop in pairwise(arrived[first:].tolist()):
        places = generator.choice(capacity, stop - start, replace=False)
        leaving[start - capacity : stop - capacity] = content[places]
        content[places] = np.arange(start, stop)
    leaving[total - capacity :] = content[generator.permutation(capacity)]
    return PoolPlan(table, arrived, capacity, leaving)
