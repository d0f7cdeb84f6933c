"""The pool's promise to threads: claimed rows stay unchanged until they are released."""

import numpy as np
import pytest

from arraytp.data.order import pool_plan
from arraytp.data.pool import Pool

BATCH = 40


@pytest.fixture
def plan(tiny):
    return pool_plan(tiny.chunks("train"), 300, seed=1, epoch=0, shuffle=True)


@pytest.fixture
def expected(tiny, plan):
    """Images of the epoch in order."""
    images, _ = tiny.load("train")
    return images[plan.arrival_rows()[plan.leaving]]


@pytest.mark.parametrize("start", [0, 37, 310, 560])
def test_claimed_rows_stay_as_they_are_while_later_chunks_come_in(tiny, plan, expected, start):
    pool = Pool(tiny, "train", plan, [(start, 600)], 3 * BATCH)
    claimed = []
    for first in range(start, 600, BATCH):
        claimed.append((first, pool.claim(first, min(first + BATCH, 600))))
        for position, rows in claimed:
            assert np.array_equal(pool.images[rows], expected[position : position + len(rows)])
        if len(claimed) == 3:
            # Not the oldest, because threads finish in any order.
            pool.release(claimed.pop(1)[1])
    assert len(pool.images) == min(plan.capacity, 600 - start) + 3 * BATCH


def test_images_of_other_readers_take_no_room(tiny, plan, expected):
    spans = [(first + 30, first + BATCH) for first in range(5, 600 - BATCH, BATCH)]
    pool = Pool(tiny, "train", plan, spans, 10)
    for start, stop in spans:
        rows = pool.claim(start, stop)
        assert np.array_equal(pool.images[rows], expected[start:stop])
        pool.release(rows)
    assert len(pool.images) < plan.capacity / 3
