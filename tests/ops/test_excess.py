"""E = WWᵀ − I in parts, its norm, and its product with W: against the plain formula, on host and device."""

import itertools

import numpy as np
import pytest
from samples import close, rng, well_conditioned

from arraytp.ops.excess import add_excess_product, excess_norm, excess_rows, is_tall


def excess_of(place, w, cuts=()):
    order = min(w.shape)
    out, bounds = place.backend.xp.zeros((order, order), dtype=w.dtype), (0, *cuts, order)
    for start, stop in itertools.pairwise(bounds):
        excess_rows(place.put(w), slice(start, stop), out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("order", "cuts"), [(1, ()), (7, ()), (7, (3,)), (40, (1, 12, 39))])
def test_rows_of_the_excess_are_the_formulas(place, order, cuts, dtype):
    """On the host, only the entries on and above the diagonal are computed; those below are 0."""
    w = rng(order).standard_normal((order, order)).astype(dtype)
    wanted = w @ w.T - np.eye(order, dtype=dtype)
    found = place.get(excess_of(place, w, cuts))
    assert found.dtype == dtype
    close(found, np.triu(wanted) if place.backend.on_host else wanted, 1e-5 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize(("shape", "cuts"), [((7, 1), ()), ((9, 5), (2,)), ((5, 9), (2,)), ((90, 40), (1, 12, 39))])
def test_of_the_smaller_side_where_a_matrix_is_not_square(place, shape, cuts):
    w = rng(1, *shape).standard_normal(shape)
    wide = w.T if shape[0] > shape[1] else w
    wanted = wide @ wide.T - np.eye(len(wide))
    assert is_tall(w) == (shape[0] > shape[1])
    close(place.get(excess_of(place, w, cuts)), np.triu(wanted) if place.backend.on_host else wanted, 1e-13)
    g, out = rng(2).standard_normal(shape), None
    out, bounds = place.backend.asarray(g.copy()), (0, 1, max(shape))
    for start, stop in itertools.pairwise(bounds):
        add_excess_product(0.5, excess_of(place, w), place.put(w), slice(start, stop), out)
    close(place.get(out), g + 0.5 * (w @ wanted if is_tall(w) else wanted @ w), 1e-13)


@pytest.mark.parametrize("order", [1, 2, 30])
def test_the_norm_is_the_whole_matrixs(place, order):
    w = rng(order).standard_normal((order, order))
    assert float(excess_norm(excess_of(place, w))) == pytest.approx(np.linalg.norm(w @ w.T - np.eye(order)), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_has_no_small_norm(place, value):
    w = np.eye(5, dtype="float32")
    w[2, 1] = value
    with np.errstate(all="ignore"):
        assert not float(excess_norm(excess_of(place, w))) < 1e10


@pytest.mark.parametrize("cuts", [(), (2, 7)])
def test_the_product_is_added_by_columns(place, cuts):
    w, g = well_conditioned(11, 3, 0), rng(5).standard_normal((11, 11))
    out, bounds = place.backend.asarray(g.copy()), (0, *cuts, 11)
    for start, stop in itertools.pairwise(bounds):
        add_excess_product(0.5, excess_of(place, w), place.put(w), slice(start, stop), out)
    close(place.get(out), g + 0.5 * (w @ w.T - np.eye(11)) @ w, 1e-13)
