"""Sharing the work of a step among threads.

A step is cut into tasks whose number and extent depend on shapes alone, never on the number of threads; every task
writes to places of its own. So the result is the same, bit for bit, on one thread or many. While tasks run, the BLAS
library is held to one thread per task: the samples of a task stay in a core's cache from one operation to the next.
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import threadpoolctl

from arraytp.backend import NUMPY, Backend
from arraytp.fast.buffers import Buffers, Scratch

Task = Callable[[Buffers], None]


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
        self.shared = Buffers(backend)
        self._scratch = [Buffers(backend) for _ in range(self.threads)]
        self._pool = ThreadPoolExecutor(self.threads - 1, "arraytp") if self.threads > 1 else None

    def of(self, owner: Hashable) -> Scratch:
        """Return an owner's view of the buffers that all threads share: for results, not for a task's scratch."""
        return self.shared.of(owner)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks, each with the scratch buffers of the thread that it runs on, and wait for them."""
        if not self.backend.on_host:
            for task in tasks:
                task(self._scratch[0])
            return
        with _one_blas_thread():
            queue, lock = iter(tasks), threading.Lock()
            helpers = min(self.threads, len(tasks)) - 1
            futures = [
                self._pool.submit(_work, queue, lock, scratch)
                for scratch in self._scratch[1 : helpers + 1]
                if self._pool is not None
            ]
            try:
                _work(queue, lock, self._scratch[0])
            finally:
                for future in futures:
                    future.result()

    def nbytes(self) -> int:
        """Return the bytes that all buffers hold."""
        return sum(buffers.nbytes() for buffers in (self.shared, *self._scratch))


def _work(queue: Iterator[Task], lock: threading.Lock, scratch: Buffers) -> None:
    """Run tasks from the queue until it is empty."""
    while True:
        with lock:
            task = next(queue, None)
        if task is None:
            return
        task(scratch)


def slices(stop: int, length: int, start: int = 0) -> list[slice]:
    """Cut range(start, stop) into slices of `length`, the last one maybe shorter."""
    return [slice(first, min(first + length, stop)) for first in range(start, stop, length)]


def even_slices(count: int, parts: int) -> list[slice]:
    """Cut range(count) into at most `parts` slices whose lengths differ by at most 1."""
    parts = max(1, min(parts, count))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def default_threads() -> int:
    """Return `OMP_NUM_THREADS` if it is a positive number, else the number of cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Hold the BLAS libraries to one thread per caller, as threadpoolctl's own limit does in three times the time."""
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
