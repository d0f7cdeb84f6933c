import gc
import threading
import time

import pytest

from arraytp.data.background import BUFFERS, worked_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "arraytp-loader"]


def buffers():
    return [[] for _ in range(BUFFERS)]


def mark(job, buffer):
    buffer[:] = [job]
    return buffer


def test_results_come_in_order_and_the_thread_ends():
    assert [result[0] for result in worked_ahead(range(20), mark, buffers())] == list(range(20))
    assert threads() == []


def test_a_result_stays_until_the_next_but_one_is_requested():
    held = []
    for number, result in enumerate(worked_ahead(range(30), mark, buffers())):
        time.sleep(0.001)
        held.append(result)
        assert result == [number]
        if number:
            assert held[-2] == [number - 1]


def test_the_thread_works_ahead_by_two_and_no_more():
    done = []
    results = worked_ahead(range(30), lambda job, _: done.append(job), buffers())
    next(results)
    deadline = time.monotonic() + 5
    while len(done) < BUFFERS and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert done == [0, 1, 2, 3]
    results.close()


def test_only_the_given_buffers_are_used():
    given = buffers()
    seen = {id(result) for result in worked_ahead(range(50), mark, given)}
    assert seen == {id(buffer) for buffer in given}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closing_early_ends_the_thread(steps):
    results = worked_ahead(range(10**9), mark, buffers())
    for _ in range(steps):
        next(results)
    results.close()
    assert threads() == []


def test_an_iterator_that_is_forgotten_ends_its_thread():
    results = worked_ahead(range(10**9), mark, buffers())
    next(results)
    assert len(threads()) == 1
    del results
    gc.collect()
    assert threads() == []


def test_an_exception_in_the_thread_surfaces_with_its_own_type_in_its_turn():
    def work(job, buffer):
        if job == 3:
            raise LookupError("job 3")
        return job

    results = worked_ahead(range(9), work, buffers())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="job 3"):
        next(results)
    assert threads() == []


def test_an_exception_of_the_jobs_surfaces_too():
    def jobs():
        yield 1
        raise LookupError("jobs")

    with pytest.raises(LookupError, match="jobs"):
        list(worked_ahead(jobs(), mark, buffers()))


def test_nothing_to_do_is_nothing_yielded():
    assert list(worked_ahead([], mark, buffers())) == []
    assert threads() == []
