"""The pool's promise to threads: rows that are claimed stay as they are until they are released."""

import numpy as np
import pytest

from arraytp.data.order import pool_content, pool_plan
from arraytp.data.pool import Pool

BATCH = 40


@pytest.fixture
def plan(tiny):
    return pool_plan(tiny.chunks("train"), 300, seed=1, epoch=0, shuffle=True)


@pytest.fixture
def expected(tiny, plan):
    """Images of the epoch in order, from the plan's own account of what the pool holds."""
    images, _ = tiny.load("train")
    rows = [plan.arrival_rows()[pool_content(plan, n)[0][plan.places[n]]] for n in range(600)]
    return images[rows]


@pytest.mark.parametrize("start", [0, 37, 310, 560])
def test_claimed_rows_stay_as_they_are_while_later_chunks_come_in(tiny, plan, expected, start):
    held = 3 * BATCH
    pool = Pool(tiny, "train", plan, start, held)
    claimed = []
    for first in range(start, 600, BATCH):
        claimed.append((first, pool.claim(first, min(first + BATCH, 600))))
        for position, rows in claimed:
            assert np.array_equal(pool.images[rows], expected[position : position + len(rows)])
        if len(claimed) == 3:
            # Not the oldest: threads end in any order.
            pool.release(claimed.pop(1)[1])
    assert len(pool.images) == plan.capacity + held


def test_positions_of_other_readers_are_passed_over(tiny, plan, expected):
    pool = Pool(tiny, "train", plan, 5, 2 * BATCH)
    for first in range(5, 600 - BATCH, BATCH):
        rows = pool.claim(first + 30, first + BATCH)
        assert np.array_equal(pool.images[rows], expected[first + 30 : first + BATCH])
        pool.release(rows)
