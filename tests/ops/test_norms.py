"""Row norms against the formula in double precision, also where squares overflow or vanish, and of rows of zeros."""

import numpy as np
import pytest
from samples import rng

from arraytp.ops import norms
from arraytp.ops.norms import row_norms


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_are_the_formulas_whatever_the_size(place, dtype, size):
    """A plain sum of squares of 1e-30 is 0 in float32, and of 1e30 infinite."""
    rows = (size * rng(1).standard_normal((5, 7))).astype(dtype)
    found, zero = row_norms(place.put(rows))
    assert found.dtype == dtype
    assert not place.get(zero).any()
    exact = np.linalg.norm(rows.astype("float64"), axis=1)
    np.testing.assert_allclose(place.get(found), exact, rtol=1e-6 if dtype == "float32" else 1e-14)


def test_a_row_of_zeros_is_told_and_has_the_norm_1(place):
    """The norm 1 keeps quotients by it finite."""
    rows = rng(2).standard_normal((4, 3))
    rows[[1, 3]] = 0
    found, zero = row_norms(place.put(rows))
    np.testing.assert_array_equal(place.get(zero), [False, True, False, True])
    np.testing.assert_array_equal(place.get(found)[[1, 3]], 1)


def test_what_is_below_the_least_normal_number_counts_as_zero(place):
    """A subnormal number has few digits left, and its reciprocal may be infinite."""
    rows = np.full((1, 3), np.finfo("float32").tiny / 4, "float32")
    found, zero = row_norms(place.put(rows))
    assert place.get(zero).all()
    assert place.get(found).item() == 1


@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_rows_are_cut_without_a_trace(monkeypatch, elements):
    rows = rng(3).standard_normal((9, 6))
    rows[4] = 0
    wanted = row_norms(rows)
    monkeypatch.setattr(norms, "HOST_ELEMENTS", elements)
    for found, exact in zip(row_norms(rows), wanted, strict=True):
        np.testing.assert_array_equal(found, exact)
