"""Threads that work ahead, into a few buffers that go round."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")
Buffer = TypeVar("Buffer")
Result = TypeVar("Result")

BUFFERS = 4
_HELD = 2


def worked_ahead(
    jobs: Iterable[Job],
    fill: Callable[[Job, Buffer], None],
    work: Callable[[Job, Buffer], Result],
    buffers: Sequence[Buffer],
    threads: int,
    ended: Callable[[list[Buffer]], None] = lambda free: None,
) -> Generator[Result, None, None]:
    """Yield work(job, buffer) for each job in order, computed by threads that are up to two results ahead.

    A result is valid until the next but one is requested; then its buffer is used again. `fill` is called before `work`
    for the same job, for one job at a time and in their order; `work` for several at a time. There are `BUFFERS`
    buffers: two for the results in use, two for those to come.

    The threads end when the iterator is exhausted or closed, and an exception in one is raised here in place of the
    result. `ended` is then called with the buffers of results that are not valid any more, once no thread works; never
    where the garbage collector closes the iterator in one of them.
    """
    line = _Line(iter(jobs), fill, work)
    for buffer in buffers:
        line.free.put(buffer)
    # Daemons, so that an iterator nobody closed does not keep the process alive.
    helpers = [threading.Thread(target=line.run, name="arraytp-loader", daemon=True) for _ in range(threads)]
    for helper in helpers:
        helper.start()
    held: deque[Buffer] = deque()
    try:
        while (item := line.begun.get()) is not None:
            result, buffer = item
            held.append(buffer)
            yield result.result()
            if len(held) == _HELD:
                line.free.put(held.popleft())
    finally:
        line.stop.set()
        for buffer in buffers:
            line.free.put(buffer)
        # The garbage collector may close a forgotten iterator from one of the very threads.
        if threading.current_thread() not in helpers:
            for helper in helpers:
                helper.join()
            ended([buffer for buffer in buffers if not any(buffer is other for other in held)])


@dataclass(frozen=True)
class _Line(Generic[Job, Buffer, Result]):
    """What the threads share; whoever holds `turn` takes the next job."""

    jobs: Iterator[Job]
    fill: Callable[[Job, Buffer], None]
    work: Callable[[Job, Buffer], Result]
    free: "queue.SimpleQueue[Buffer]" = field(default_factory=queue.SimpleQueue)
    begun: "queue.SimpleQueue[tuple[Future[Result], Buffer] | None]" = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        while (item := self._next()) is not None:
            job, buffer, result = item
            try:
                result.set_result(self.work(job, buffer))
            except Exception as error:
                self.stop.set()
                result.set_exception(error)

    def _next(self) -> tuple[Job, Buffer, Future[Result]] | None:
        with self.turn:
            if self.stop.is_set():
                return None
            buffer = self.free.get()
            result: Future[Result] = Future()
            try:
                for job in self.jobs:
                    if self.stop.is_set():
                        return None
                    self.fill(job, buffer)
                    self.begun.put((result, buffer))
                    return job, buffer, result
                self.begun.put(None)
            except Exception as error:
                result.set_exception(error)
                self.begun.put((result, buffer))
            self.stop.set()
            return None
