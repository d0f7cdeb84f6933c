"""Tasks, slices and workspaces."""

import threading
import time

import numpy as np
import pytest
import strict_device
from hypothesis import given
from hypothesis import strategies as st

from arraytp.backend import Backend
from arraytp.fast.parallel import Workspace, default_threads, even_slices, slices


@given(count=st.integers(0, 50), length=st.integers(1, 20))
def test_slices_cover_everything_once_in_order(count, length):
    found = slices(count, length)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start == length for part in found[:-1])


@given(start=st.integers(0, 20), count=st.integers(0, 50), length=st.integers(1, 20))
def test_slices_may_start_later(start, count, length):
    found = slices(start + count, length, start)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(start, start + count))


@given(count=st.integers(1, 50), parts=st.integers(0, 20))
def test_even_slices_cover_everything_once_with_lengths_that_differ_by_one(count, parts):
    found = even_slices(count, parts)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(count))
    lengths = {part.stop - part.start for part in found}
    assert max(lengths) - min(lengths) <= 1
    assert len(found) == max(1, min(parts, count))


def test_workspaces_beside_have_arrays_of_their_own_which_the_first_counts_and_drops():
    """Otherwise a graph of all parts would keep using dropped arrays. All share the arrays of `number`."""
    workspace = Workspace(threads=1)
    beside = [workspace.beside(), workspace.beside()]
    own, made, held = [each.of("a").array("b", (3,), float) for each in beside], workspace.made, workspace.nbytes()
    assert not np.shares_memory(*own)
    assert (made, held) == (2, 48)
    number = beside[0].number("rate", 2.0, float)
    assert workspace.number("rate", 3.0, float) is not number
    assert number.tolist() == beside[1].number("rate", 3.0, float).tolist() == [3]
    workspace.forget()
    assert workspace.nbytes() == 0
    assert workspace.made > made
    assert beside[0].number("rate", 3.0, float).tolist() == [3]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_runs_once_with_scratch_of_its_own(threads):
    workspace, done, lock = Workspace(threads=threads), [], threading.Lock()

    def task(number):
        def run():
            own = workspace.scratch.of("test").array("own", (1000,), float)
            own.fill(number)
            with lock:
                done.append((number, own.sum() == 1000 * number))

        return run

    workspace.run([task(n) for n in range(20)])
    assert sorted(done) == [(n, True) for n in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_task_reaches_the_caller_and_the_workspace_goes_on(threads):
    workspace, done = Workspace(threads=threads), []

    def bad():
        raise FloatingPointError("bad task")

    with pytest.raises(FloatingPointError, match="bad task"):
        workspace.run([bad, bad, bad])
    workspace.run([lambda: done.append(1)] * 4)
    assert done == [1] * 4


def test_an_error_ends_what_is_not_begun_and_waits_for_what_is():
    """Otherwise a thread would still compute in the next step's buffers, with BLAS no longer held to one thread."""
    workspace, begun, done = Workspace(threads=2), threading.Event(), []

    def task():
        if threading.current_thread() is threading.main_thread():
            begun.wait(10)
            raise FloatingPointError("bad task")
        begun.set()
        time.sleep(0.05)
        done.append("helper")

    with pytest.raises(FloatingPointError, match="bad task"):
        workspace.run([task, task, *[lambda: done.append("late")] * 4])
    assert done == ["helper"]


def test_no_tasks_are_no_error():
    Workspace(threads=2).run([])


def test_a_device_runs_tasks_in_order_on_one_thread():
    workspace, order = Workspace(Backend("strict", strict_device), threads=4), []
    assert workspace.threads == 1
    workspace.run([lambda n=n: order.append((n, threading.current_thread())) for n in range(5)])
    assert order == [(n, threading.main_thread()) for n in range(5)]


@pytest.mark.parametrize(
    ("value", "wanted"), [("3", 3), ("1", 1), ("0", None), ("", None), ("many", None), ("²", None), ("2,1", 2)]
)
def test_the_number_of_threads_is_that_of_openmp_or_the_cores(monkeypatch, value, wanted):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(7))
    assert default_threads() == (wanted or 7)
    assert Workspace(threads=2).threads == 2
