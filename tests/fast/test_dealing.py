"""Dealing out tasks: which rank gets which, when it pays, and that every rank ends up with all results."""

from functools import partial

import numpy as np
import pytest
from fake_ranks import on_ranks

from arraytp.backend import NUMPY
from arraytp.fast import dealing
from arraytp.fast.dealing import Piece, deal, pays, piece, run_dealt
from arraytp.fast.parallel import Workspace


def nothing():
    """Do nothing."""


def weighing(*operations, size=1):
    return [Piece(work, size, nothing, tuple) for work in operations]


def test_the_largest_left_goes_to_the_rank_with_least_to_do():
    hands = deal(weighing(9, 5, 4, 3, 1), 2)
    assert [[each.operations for each in hand] for hand in hands] == [[9, 3], [5, 4, 1]]
    assert [len(hand) for hand in deal(weighing(2, 1), 3)] == [1, 1, 0]


def test_it_is_worth_it_where_the_busiest_rank_saves_more_than_sending_takes():
    """Two ranks save 8 of 16 operations; at 200 per number and thread, that pays for less than 0.04 numbers."""
    hands = deal(weighing(8, 8), 2)
    assert pays(hands, 7.9 / dealing.OPERATIONS_PER_NUMBER)
    assert not pays(hands, 8 / dealing.OPERATIONS_PER_NUMBER)
    assert not pays([weighing(16), []], 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_rank_has_what_all_tasks_wrote_each_done_once(size, threads, monkeypatch):
    """Test parts of rows and of columns, other dtypes, several arrays per task, and more ranks than tasks."""
    monkeypatch.setattr(dealing, "OPERATIONS_PER_NUMBER", 0)
    done = []

    def work(ranks):
        workspace = Workspace(NUMPY, threads)
        workspace.deal_among(ranks)
        rows, columns, whole = np.zeros((4, 6)), np.zeros((6, 4)).T, np.zeros((2, 3), np.float32)
        pivots = np.zeros(3, np.int32)

        def write(number, *arrays):
            done.append(number)
            for array in arrays:
                array[...] = number + np.arange(array.size).reshape(array.shape)

        pieces = [piece(5, partial(write, n, rows[part]), rows[part]) for n, part in enumerate((slice(3), slice(3, 4)))]
        pieces += [piece(7, partial(write, 2, columns[:, 1:]), columns[:, 1:])]
        pieces += [Piece(3, 9, partial(write, 3, whole, pivots), lambda: [whole, pivots])]
        run_dealt(workspace, pieces, np.float64)
        assert ranks.exchanges == (size > 1)
        return rows, columns, whole, pivots

    results = on_ranks(size, work)
    assert sorted(done) == [0, 1, 2, 3]
    rows, columns, whole, pivots = results[0]
    np.testing.assert_array_equal(rows, np.vstack([np.arange(18).reshape(3, 6), 1 + np.arange(6)]))
    np.testing.assert_array_equal(columns, np.hstack([np.zeros((4, 1)), 2 + np.arange(20).reshape(4, 5)]))
    np.testing.assert_array_equal(whole, 3 + np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(pivots, [3, 4, 5])
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_small_tasks_are_done_by_everyone():
    """Nothing is sent, and no buffer is held for sending."""

    def work(ranks):
        workspace, out = Workspace(NUMPY, 1), np.zeros(5)
        workspace.deal_among(ranks)
        run_dealt(workspace, [piece(100, partial(out.fill, 1), out)] * 2, out.dtype)
        return out.sum(), ranks.exchanges, workspace.nbytes()

    assert on_ranks(2, work) == [(5, 0, 0), (5, 0, 0)]
