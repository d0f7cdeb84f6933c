"""Threads that share the work of a step, and the arrays that they use.

A step is cut into tasks whose number and extent depend on shapes alone, never on the number of threads; every task
writes to places of its own. So the result is the same, bit for bit, on one thread or many. While tasks run, the BLAS
library is held to one thread per task: the samples of a task stay in a core's cache from one operation to the next.
"""

import copy
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import threadpoolctl

from arraytp.backend import NUMPY, Array, Backend
from arraytp.ranks import ALONE, Ranks

Task = Callable[[], object]
# Each lane sums up its own gradient; tiles are parts of one product.
LANES, LANE_BYTES = 4, 4 << 20
TILES, TILE_WIDTH = 4, 256


class Buffers:
    """Arrays that are allocated at first use and reused: scratch and results, not state.

    Every module that computes has its own buffers, `of` its name, so that its "rows" are no other module's.
    """

    def __init__(self, backend: Backend, made: list[int] | None = None) -> None:
        self.backend = backend
        # How many arrays have been allocated so far, over all owners.
        self.made = [0] if made is None else made
        self._flat: dict[Any, Array] = {}
        self._cached: dict[Any, Array] = {}
        self._owned: dict[Hashable, Buffers] = {}

    def of(self, owner: Hashable) -> "Buffers":
        """Return the owner's buffers."""
        if owner not in self._owned:
            self._owned[owner] = Buffers(self.backend, self.made)
        return self._owned[owner]

    def array(self, name: Hashable, shape: Sequence[int], dtype: Any) -> Array:
        """Return a C-contiguous array with undefined content; the same memory for the same name."""
        size, key = math.prod(shape), (name, np.dtype(dtype))
        if key not in self._flat or self._flat[key].size < size:
            self._flat[key] = self.backend.xp.empty(size, dtype=dtype)
            self.made[0] += 1
        return self._flat[key][:size].reshape(shape)

    def cached(self, name: Hashable, length: int, make: Callable[[], Array]) -> Array:
        """Return the first `length` rows of this name's array; `make` makes it at first use or if it is too short."""
        if name not in self._cached or len(self._cached[name]) < length:
            self._cached[name] = make()
            self.made[0] += 1
        return self._cached[name][:length]

    def filled(self, name: Hashable, shape: Sequence[int], dtype: Any, value: float) -> Array:
        """Return an array that was filled with `value` when it was allocated; for borders that are never written to."""
        key = (name, tuple(shape[1:]), np.dtype(dtype), value)
        return self.cached(key, shape[0], lambda: self.backend.xp.full(shape, value, dtype=dtype))

    def forget(self) -> None:
        """Drop all arrays, so that they are allocated anew."""
        for held in (self._flat, self._cached, self._owned):
            held.clear()
        self.made[0] += 1

    def nbytes(self) -> int:
        """Return the bytes held."""
        held: list[Any] = [*self._flat.values(), *self._cached.values()]
        return int(sum(array.nbytes for array in held)) + sum(buffers.nbytes() for buffers in self._owned.values())


class Workspace:
    """A backend, the buffers of a run, and the threads that share its work.

    Parameters
    ----------
    backend : Backend
        Where the arrays live.
    threads : int, optional
        Default: `OMP_NUM_THREADS` if set, else the cores this process may use. On a device tasks run one after
        another on its stream, and this is ignored.
    """

    def __init__(self, backend: Backend = NUMPY, threads: int | None = None) -> None:
        self.backend = backend
        self.threads = (threads or default_threads()) if backend.on_host else 1
        self._pool = ThreadPoolExecutor(self.threads - 1, "arraytp") if self.threads > 1 else None
        self.shared, self._thread, self._scratch = Buffers(backend), threading.local(), list[Buffers]()
        # The buffers of the workspaces that `beside` returned, and buffers that all of them share.
        self._beside, self._held = list[Buffers](), Buffers(backend, self.shared.made)
        self.most_lanes = LANES
        # The rows of each part if several parts of a batch are computed at once (`arraytp.ranks.Part.rows`).
        self.part_rows: Sequence[slice] = ()
        self.ranks: Ranks = ALONE
        self.rank_threads = self.threads
        # An owner's buffers that all threads share: for results, not for a task's scratch.
        self.of = self.shared.of
        self._numbers: dict[Hashable, float] = {}
        # (part, arrays, work) → what `work` returns: `arraytp.fast.graphs.Graphs.run`, if there are any graphs.
        self.captured: Callable[[str, Sequence[Array], Callable[[], Any]], Any] = _launched
        # Runs work that no graph can capture: `arraytp.fast.graphs.Graphs.between`.
        self.between: Callable[[Callable[[], object]], object] = _done
        # By r of the ridge inverse, None for W⁻¹: for each n, whether W^n was nearly semi-orthogonal when last asked.
        self.near: dict[float | None, Mapping[int, bool]] = {}

    @property
    def scratch(self) -> Buffers:
        """The buffers that only the current thread writes to."""
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = Buffers(self.backend, self.shared.made)
            self._scratch.append(self._thread.scratch)
        return self._thread.scratch  # type: ignore[no-any-return]

    def beside(self) -> Self:
        """Return a workspace for one of several parts of a batch: on the same threads, with results of its own.

        All parts share the arrays of `number`.
        """
        other = copy.copy(self)
        other.shared, other.most_lanes = Buffers(self.backend, self.shared.made), 1
        other.of = other.shared.of
        self._beside.append(other.shared)
        return other

    def deal_among(self, ranks: Ranks) -> None:
        """Let these ranks share work that depends on θ alone (`arraytp.fast.dealing`); all must call this together."""
        self.ranks, self.rank_threads = ranks, max(ranks.gather(self.threads))

    @property
    def busy(self) -> bool:
        """Whether the present thread is doing one of several tasks."""
        return getattr(self._thread, "busy", False)

    def lanes(self, weight_bytes: int, batch: int) -> list[slice]:
        """Cut the batch into lanes; each lane sums up its own gradient. There are fewer lanes for large weights."""
        if self.most_lanes == 1:
            return [slice(0, batch)]
        return even_slices(batch, max(2, min(self.most_lanes, LANE_BYTES // weight_bytes)))

    @property
    def made(self) -> int:
        """How many arrays the buffers have allocated so far: while it does not change, no buffer has moved."""
        return self.shared.made[0]

    def number(self, name: Hashable, value: float, dtype: Any) -> Array:
        """Return an array of shape (1,) from which kernels read a number; the same memory for the same name."""
        held = self._held.array(name, (1,), dtype)
        if self._numbers.get(name) != value:
            held.fill(value)
            self._numbers[name] = value
        return held

    def forget(self) -> None:
        """Drop all buffers and numbers; arrays that are still referenced elsewhere stay valid."""
        for buffers in self._all:
            buffers.forget()
        self._numbers.clear()

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks and wait for them; on a device, or if called from within a task, run them one after another.

        After an error no further task is started, and the error is raised once no task is running.
        """
        if not self.backend.on_host or self.busy:
            for task in tasks:
                task()
            return
        with one_blas_thread():
            queue, lock = iter(tasks), threading.Lock()
            helpers = range(min(self.threads, len(tasks)) - 1)
            futures = [self._pool.submit(self._work, queue, lock) for _ in helpers if self._pool is not None]
            try:
                self._work(queue, lock)
            finally:
                wait(futures)
            for future in futures:
                future.result()

    def _work(self, queue: Iterator[Task], lock: threading.Lock) -> None:
        """Run tasks from the queue until it is empty."""
        self._thread.busy = True
        try:
            while True:
                with lock:
                    task = next(queue, None)
                if task is None:
                    return
                task()
        except BaseException:
            with lock:
                for _ in queue:
                    pass
            raise
        finally:
            self._thread.busy = False

    def nbytes(self) -> int:
        """Return the bytes that all buffers hold."""
        return sum(buffers.nbytes() for buffers in self._all)

    @property
    def _all(self) -> list[Buffers]:
        return [self.shared, self._held, *self._beside, *self._scratch]


def _launched(part: str, arrays: Sequence[Array], work: Callable[[], Any]) -> Any:
    return work()


def _done(work: Callable[[], object]) -> None:
    work()


def slices(stop: int, length: int, start: int = 0) -> list[slice]:
    """Cut range(start, stop) into slices of `length`, the last one maybe shorter."""
    return [slice(first, min(first + length, stop)) for first in range(start, stop, length)]


def even_slices(count: int, parts: int) -> list[slice]:
    """Cut range(count) into at most `parts` slices whose lengths differ by at most 1."""
    parts = max(1, min(parts, count))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def tiles(count: int) -> list[slice]:
    """Cut one side of a product so that threads share it and packing the other factor stays cheap."""
    return even_slices(count, min(TILES, count // TILE_WIDTH))


def asked_threads() -> int | None:
    """Return the number in `OMP_NUM_THREADS`, the first one of a list; None unless it is positive."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) or None if first.isascii() and first.isdecimal() else None


def default_threads() -> int:
    """Return what `OMP_NUM_THREADS` asks for, else the number of cores that this process may use."""
    return asked_threads() or len(os.sched_getaffinity(0))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold the BLAS libraries to one thread per caller, in a third of the time that threadpoolctl's own limit takes."""
    libraries = _blas().lib_controllers
    former = [library.get_num_threads() for library in libraries]
    for library in libraries:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, threads in zip(libraries, former, strict=True):
            library.set_num_threads(threads)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Find the BLAS libraries of this process once: looking for them takes milliseconds."""
    return threadpoolctl.ThreadpoolController().select(user_api="blas")
