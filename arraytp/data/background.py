"""One thread that works ahead, into a few buffers that go round."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Buffer = TypeVar("Buffer")
Result = TypeVar("Result")

BUFFERS = 4
_HELD = 2


def worked_ahead(
    jobs: Iterable[Job], work: Callable[[Job, Buffer], Result], buffers: Sequence[Buffer]
) -> Generator[Result, None, None]:
    """Yield work(job, buffer) for each job in order, computed by a thread that is up to two results ahead.

    A result is valid until the next but one is requested; then its buffer is used again. The thread ends when
    the iterator is exhausted or closed, and an exception in it is raised here in place of the result.

    Parameters
    ----------
    jobs : iterable
    work : callable
    buffers : sequence of length `BUFFERS`
        Two for the results that are in use, two for those to come.
    """
    free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Result, Buffer] | Exception | None] = queue.SimpleQueue()
    stop = threading.Event()
    for buffer in buffers:
        free.put(buffer)
    arguments = (iter(jobs), work, free, ready, stop)
    # A daemon, so that an iterator nobody closed does not keep the process alive.
    thread = threading.Thread(target=_work, args=arguments, name="arraytp-loader", daemon=True)
    thread.start()
    held: deque[Buffer] = deque()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            held.append(item[1])
            yield item[0]
            if len(held) == _HELD:
                free.put(held.popleft())
    finally:
        stop.set()
        free.put(buffers[0])
        # The garbage collector may close a forgotten iterator from the very thread.
        if thread is not threading.current_thread():
            thread.join()


def _work(
    jobs: Iterator[Job],
    work: Callable[[Job, Buffer], Result],
    free: "queue.SimpleQueue[Buffer]",
    ready: "queue.SimpleQueue[tuple[Result, Buffer] | Exception | None]",
    stop: threading.Event,
) -> None:
    try:
        for job in jobs:
            buffer = free.get()
            if stop.is_set():
                return
            ready.put((work(job, buffer), buffer))
        ready.put(None)
    except Exception as error:
        ready.put(error)
