import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.data.order import memory_order, pool_plan


@st.composite
def splits(draw):
    """Chunks that cover rows 0 … N−1, like those of several shards."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    ends = np.cumsum(lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


def order_of(plan):
    """The row at each position."""
    return plan.arrival_rows()[plan.leaving].tolist()


@given(splits(), st.integers(1, 60), st.integers(0, 3), st.booleans())
def test_a_streamed_epoch_takes_every_row_once(chunks, pool_images, epoch, shuffle):
    order = order_of(pool_plan(chunks, pool_images, 5, epoch, shuffle=shuffle))
    count = chunks[-1][1]
    assert sorted(order) == list(range(count))
    if not shuffle:
        assert order == list(range(count))


@given(splits(), st.integers(1, 60), st.booleans())
def test_an_image_is_in_the_pool_when_it_leaves_and_the_pool_is_never_too_full(chunks, pool_images, shuffle):
    plan = pool_plan(chunks, pool_images, 5, 0, shuffle=shuffle)
    chunk_of = np.repeat(np.arange(len(chunks)), np.diff(plan.arrived))
    for position, arrival in enumerate(plan.leaving):
        assert plan.due(chunk_of[arrival]) <= position
    for chunk in range(len(chunks)):
        assert plan.arrived[chunk + 1] - plan.due(chunk) <= plan.capacity


def test_the_order_is_the_one_that_earlier_versions_had():
    """Checkpoints store the position in an epoch, not the order; if that changed, a resumed run would repeat images."""
    chunks = [(start, start + 10) for start in range(0, 200, 10)]
    assert order_of(pool_plan(chunks, 45, 1, 2, shuffle=True))[100:106] == [78, 77, 199, 45, 85, 48]


@given(splits(), st.integers(1, 60))
def test_the_pool_is_no_larger_than_asked_for_but_for_one_chunk(chunks, pool_images):
    plan = pool_plan(chunks, pool_images, 5, 0, shuffle=True)
    longest = max(stop - start for start, stop in chunks)
    assert plan.capacity < max(pool_images, longest) + longest
    assert plan.capacity >= min(pool_images, chunks[-1][1])


@pytest.mark.parametrize("pool_images", [30, 100, 10**6])
def test_streaming_mixes_rows_from_all_over_the_split(pool_images):
    chunks = [(start, start + 10) for start in range(0, 1000, 10)]
    order = np.array(order_of(pool_plan(chunks, pool_images, 0, 0, shuffle=True)))
    # Independent rows correlate with their position by about 1/√1000 = 0.03.
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    assert np.mean(np.diff(order) == 1) < 0.05


def test_orders_differ_between_epochs_and_seeds_and_repeat_otherwise():
    chunks = [(start, start + 10) for start in range(0, 200, 10)]

    def streamed(seed, epoch):
        return order_of(pool_plan(chunks, 50, seed, epoch, shuffle=True))

    def in_memory(seed, epoch):
        return memory_order(200, seed, epoch, shuffle=True).tolist()

    for order in (streamed, in_memory):
        assert order(1, 0) == order(1, 0)
        assert order(1, 0) != order(1, 1)
        assert order(1, 0) != order(2, 0)
        assert sorted(order(1, 0)) == list(range(200))


def test_an_order_in_memory_that_is_not_shuffled_is_the_files_own():
    assert memory_order(5, 0, 0, shuffle=False).tolist() == [0, 1, 2, 3, 4]
