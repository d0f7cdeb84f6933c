import gc
import threading
import time

import pytest

from arraytp.data import background
from arraytp.data.background import BUFFERS


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def worked_ahead(request):
    """`worked_ahead` with a given number of threads; by default, `fill` does nothing."""

    def call(jobs, work, buffers, fill=lambda job, buffer: None):
        return background.worked_ahead(jobs, fill, work, buffers, request.param)

    call.threads = request.param
    return call


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("arraytp-loader")]


def buffers():
    return [[] for _ in range(BUFFERS)]


def mark(job, buffer):
    buffer[:] = [job]
    return buffer


def test_results_come_in_order_and_the_threads_end(worked_ahead):
    assert [result[0] for result in worked_ahead(range(20), mark, buffers())] == list(range(20))
    assert threads() == []


def test_a_result_stays_until_the_next_but_one_is_requested(worked_ahead):
    held = []
    for number, result in enumerate(worked_ahead(range(30), mark, buffers())):
        time.sleep(0.001)
        held.append(result)
        assert result == [number]
        if number:
            assert held[-2] == [number - 1]


def test_the_threads_work_ahead_by_two_and_no_more(worked_ahead):
    done = []
    results = worked_ahead(range(30), lambda job, _: done.append(job), buffers())
    next(results)
    deadline = time.monotonic() + 5
    while len(done) < BUFFERS and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(done) == [0, 1, 2, 3]
    results.close()


def test_only_the_given_buffers_are_used(worked_ahead):
    given = buffers()
    seen = {id(result) for result in worked_ahead(range(50), mark, given)}
    assert seen == {id(buffer) for buffer in given}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closing_early_ends_the_threads(worked_ahead, steps):
    results = worked_ahead(range(10**9), mark, buffers())
    for _ in range(steps):
        next(results)
    results.close()
    assert threads() == []


def test_an_iterator_that_is_forgotten_ends_its_threads(worked_ahead):
    results = worked_ahead(range(10**9), mark, buffers())
    next(results)
    assert 1 <= len(threads()) <= worked_ahead.threads
    del results
    gc.collect()
    assert threads() == []


def test_an_exception_in_the_thread_surfaces_with_its_own_type_in_its_turn(worked_ahead):
    def work(job, buffer):
        if job == 3:
            raise LookupError("job 3")
        return job

    results = worked_ahead(range(9), work, buffers())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="job 3"):
        next(results)
    assert threads() == []


def test_an_exception_of_the_jobs_surfaces_too(worked_ahead):
    def jobs():
        yield 1
        raise LookupError("jobs")

    with pytest.raises(LookupError, match="jobs"):
        list(worked_ahead(jobs(), mark, buffers()))


def test_nothing_to_do_is_nothing_yielded(worked_ahead):
    assert list(worked_ahead([], mark, buffers())) == []
    assert threads() == []


def test_buffers_are_filled_one_at_a_time_in_order_and_worked_on_at_the_same_time(worked_ahead):
    filled, filling, working, together = [], [], [], []

    def fill(job, buffer):
        filling.append(job)
        time.sleep(0.0005)
        assert filling == [job]
        filling.remove(job)
        filled.append(job)
        buffer[:] = [job]

    def work(job, buffer):
        working.append(job)
        # Jobs take unequal times, so that later ones are done first.
        time.sleep(0.004 * (job % 3))
        together.append(len(working))
        working.remove(job)
        return buffer

    results = [result[0] for result in worked_ahead(range(30), work, buffers(), fill)]
    assert results == filled == list(range(30))
    assert (max(together) > 1) == (worked_ahead.threads > 1)


def test_an_exception_while_filling_surfaces_in_its_turn(worked_ahead):
    def fill(job, buffer):
        if job == 3:
            raise LookupError("job 3")

    results = worked_ahead(range(9), lambda job, buffer: job, buffers(), fill)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="job 3"):
        next(results)
    assert threads() == []
