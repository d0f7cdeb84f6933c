"""Threads that compute results ahead of time, into a few buffers used in turn."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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
    """Yield work(job, buffer) for each job in order, computed ahead of time by threads.

    A result is valid until the next but one is requested; its buffer is then reused. For each job, `fill` is called
    before `work`. Calls to `fill` run one at a time, in the order of the jobs; calls to `work` may run concurrently.
    There are `BUFFERS` buffers: two for the results in use, two for those to come.

    The threads end when the iterator is exhausted or closed; an exception in a thread is raised here in place of the
    result. Once all threads have ended, `ended` is called with the buffers that hold no valid result. It is not called
    if the garbage collector closes the iterator from within one of the threads.
    """
    workers: list[threading.Thread] = []
    pool = ThreadPoolExecutor(threads, "arraytp-loader", lambda: workers.append(threading.current_thread()))

    def one(job: Job, buffer: Buffer, before: threading.Event, filled: threading.Event) -> Result:
        try:
            before.wait()
            fill(job, buffer)
        finally:
            filled.set()
        return work(job, buffer)

    waiting, free, held = iter(jobs), deque(buffers), deque[Buffer]()
    ahead = deque[tuple[Future[Result], Buffer]]()
    filled = threading.Event()
    filled.set()
    try:
        while True:
            for job in islice(waiting, len(free)):
                before, filled, buffer = filled, threading.Event(), free.popleft()
                ahead.append((pool.submit(one, job, buffer, before, filled), buffer))
            if not ahead:
                return
            result, buffer = ahead.popleft()
            held.append(buffer)
            yield result.result()
            if len(held) == _HELD:
                free.append(held.popleft())
    finally:
        # The garbage collector may close an abandoned iterator from within one of these threads.
        own = threading.current_thread() in workers
        pool.shutdown(wait=not own, cancel_futures=True)
        if not own:
            ended([buffer for buffer in buffers if not any(buffer is other for other in held)])
