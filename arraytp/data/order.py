"""The order in which an epoch takes its images: a function of seed and epoch only, known before any image is read.

A split in memory is permuted as a whole. When streaming, chunks of rows enter a pool in random order, and each chunk
replaces as many randomly chosen images, which leave the pool; the pool is planned from row numbers alone, so an epoch
can start at any position.
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
    """A streamed epoch.

    `chunks` (K, 2) holds the first row and the row after the last of each chunk, in the order of reading; the rows in
    this order are the *arrivals*. `arrived` (K + 1,) counts the arrivals before each chunk and, last, all of them. The
    pool has `capacity` places, which the first few chunks fill exactly. `leaving` (N,) is the arrival that leaves the
    pool at each position.
    """

    chunks: Rows
    arrived: Rows
    capacity: int
    leaving: Rows

    def due(self, chunk: int) -> int:
        """Return the position at which a chunk enters the pool, after the images at all earlier positions have left.

        Zero for the chunks that fill the pool initially.
        """
        return max(0, int(self.arrived[chunk + 1]) - self.capacity)

    def arrival_rows(self) -> Rows:
        """Return the row of each arrival, (N,) int64."""
        lengths = np.diff(self.arrived)
        return np.repeat(self.chunks[:, 0] - self.arrived[:-1], lengths) + np.arange(self.arrived[-1])


def pool_plan(chunks: Sequence[tuple[int, int]], pool_images: int, seed: int, epoch: int, *, shuffle: bool) -> PoolPlan:
    """Plan a streamed epoch over `chunks` (start, stop), which cover all rows of the split in order.

    The pool holds at least `pool_images` images and at least the largest chunk, but no more than the split. Without
    `shuffle`, the rows come in order.
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
