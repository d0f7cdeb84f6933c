"""Streams differ if their seed, purpose or key differs in anything."""

import itertools

import numpy as np
import pytest

from arraytp.streams import stream

PURPOSES = ("init", "feedback", "noise", "shuffle", "augment")


def test_equal_names_give_equal_numbers():
    np.testing.assert_array_equal(stream(3, "noise", 1, 2).random(5), stream(3, "noise", 1, 2).random(5))


def test_streams_that_differ_in_anything_share_no_number():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    drawn = [stream(seed, purpose, *key).integers(0, 2**63, 20)
             for seed, purpose, key in itertools.product((0, 1), PURPOSES, keys)]  # fmt: skip
    assert len(np.unique(np.concatenate(drawn))) == 20 * len(drawn)


def test_an_unknown_purpose_is_refused():
    with pytest.raises(KeyError):
        stream(0, "luck")


def test_the_numbers_of_a_stream_are_these():
    """Past runs can be repeated only as long as these numbers do not change."""
    assert stream(0, "init", 0, 0).integers(0, 2**32, 3).tolist() == [3591138182, 2877781896, 3269687644]
