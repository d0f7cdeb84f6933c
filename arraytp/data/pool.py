"""The shuffle pool of a streamed epoch, where images wait for their turn after their chunk is read."""

import threading
from collections.abc import Sequence

import numpy as np

from arraytp.data.dataset import Dataset
from arraytp.data.division import Division
from arraytp.data.order import PoolPlan, Rows
from arraytp.data.shards import Room


class Pool:
    """The images of a streamed epoch at given positions, read ahead only as far as the plan requires.

    A claimed image stays in its row of `images` (R, H, W, C) and `labels` (R,) until that row is released, so threads
    can use it in place while the next chunk is read into free rows.

    `spans` (start, stop) are the positions that will be claimed, in order; images at other positions do not enter the
    pool. At most `held` claimed images may be unreleased at a time. `memory` of an earlier pool of the split is reused
    unless it is too small.
    """

    def __init__(
        self,
        dataset: Dataset | Division,
        split: str,
        plan: PoolPlan,
        spans: Sequence[tuple[int, int]],
        held: int,
        memory: Room | None = None,
    ) -> None:
        self._dataset, self._split, self._plan = dataset, split, plan
        positions = np.concatenate([np.arange(*span) for span in spans] or [plan.leaving[:0]])
        self._arrivals = np.sort(plan.leaving[positions])
        self._file_rows = plan.arrival_rows()[self._arrivals]
        self._of_chunk = np.searchsorted(self._arrivals, plan.arrived)
        waiting = self._of_chunk[1:] - np.searchsorted(positions, plan.arrived[1:] - plan.capacity)
        count = int(waiting.max()) + held
        if memory is None or len(memory.images) < count:
            memory = Room.of(count, dataset.shape)
        self.memory = memory
        self.images, self.labels = memory
        self._free, self._freeing = np.arange(count), threading.Lock()
        self._row_of_arrival = np.empty(len(plan.leaving), np.int64)
        self._next = 0
        longest = int(np.diff(self._of_chunk).max())
        self._chunk = Room.of(longest, dataset.shape)

    def claim(self, start: int, stop: int) -> Rows:
        """Return the rows of positions `start` to `stop` − 1, later ones with each call; UserError for damaged data."""
        while self._next < len(self._plan.chunks) and self._plan.due(self._next) < stop:
            self._let_in(slice(*self._of_chunk[self._next : self._next + 2]))
            self._next += 1
        return self._row_of_arrival[self._plan.leaving[start:stop]]

    def release(self, rows: Rows) -> None:
        """Release rows that are no longer needed; any thread may call this."""
        with self._freeing:
            self._free = np.concatenate((self._free, rows))

    def _let_in(self, part: slice) -> None:
        """Read one chunk's arrivals, the slice `part` of those needed, into free rows."""
        file_rows = self._file_rows[part]
        images, labels = self._chunk.images[: len(file_rows)], self._chunk.labels[: len(file_rows)]
        self._dataset.pick(self._split, file_rows, images, labels)
        with self._freeing:
            rows, self._free = np.split(self._free, [len(file_rows)])
        self.images[rows], self.labels[rows] = images, labels
        self._row_of_arrival[self._arrivals[part]] = rows
