"""Buffers: arrays that are allocated at first use and reused, by owner and name."""

import numpy as np

from arraytp.backend import NUMPY
from arraytp.fast.parallel import Buffers


def test_a_buffer_is_made_once_and_grows_when_it_must():
    buffers = Buffers(NUMPY)
    first = buffers.array("a", (4, 5), np.float32)
    assert np.shares_memory(buffers.array("a", (2, 5), np.float32), first)
    assert not np.shares_memory(buffers.array("b", (4, 5), np.float32), first)
    assert not np.shares_memory(buffers.array("a", (4, 5), np.float64), first)
    assert buffers.nbytes() == 80 + 80 + 160
    assert buffers.array("a", (3, 10), np.float32).flags.c_contiguous
    assert buffers.nbytes() == 120 + 80 + 160


def test_a_filled_buffer_keeps_its_border():
    own = Buffers(NUMPY).of("test")
    array = own.filled("a", (2, 4, 4), float, -np.inf)
    array[:, 1:3, 1:3] = 5
    again = own.filled("a", (2, 4, 4), float, -np.inf)
    assert np.shares_memory(again, array)
    again[:, 1:3, 1:3] = -np.inf
    assert (again == -np.inf).all()
    assert not np.shares_memory(own.filled("a", (2, 4, 4), float, 0.0), array)
    assert (own.filled("a", (5, 4, 4), float, -np.inf) == -np.inf).all()


def test_a_name_is_its_owners_alone():
    """Otherwise two modules with a buffer of the same name would overwrite each other's numbers."""
    buffers = Buffers(NUMPY)
    one, other = (buffers.of(owner) for owner in ("one", "other"))
    assert not np.shares_memory(one.array("a", (3,), float), other.array("a", (3,), float))
    assert np.shares_memory(one.array("a", (3,), float), buffers.of("one").array("a", (3,), float))
    assert not np.shares_memory(one.filled("a", (3,), float, 0.0), other.filled("a", (3,), float, 0.0))


def test_what_is_cached_is_made_again_only_when_there_is_too_little():
    own, made = Buffers(NUMPY).of("test"), []

    def rows(count):
        made.append(count)
        return np.arange(count)

    for count in (4, 2, 4, 5, 3):
        np.testing.assert_array_equal(own.cached("rows", count, lambda count=count: rows(count)), np.arange(count))
    assert made == [4, 5]
