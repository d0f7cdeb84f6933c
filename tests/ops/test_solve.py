"""Solving with W, or with its smaller Gram matrix: against products, NumPy's inverses and its condition number."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import close, rng, well_conditioned

from arraytp.backend import NUMPY
from arraytp.errors import NonFiniteError
from arraytp.ops.excess import excess_rows
from arraytp.ops.solve import (
    NEAR_ORTHOGONAL,
    PseudoInverse,
    cholesky,
    condition,
    damped_gauss_newton,
    factor,
    factor_gram,
    gram_solve,
    inverse_rows,
    right_solve,
    transposed_rows,
)


@given(order=st.integers(1, 30), rows=st.integers(1, 9), number=st.sampled_from([1, 1e2, 1e4]), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_solutions_times_the_matrix_are_the_right_hand_sides(place, order, rows, number, seed):
    w, x = well_conditioned(order, number, seed), rng(seed, 2).standard_normal((rows, order))
    found = place.get(right_solve(factor(place.put(w)), place.put(x @ w)))
    close(found, x, 1e-14 * 30 * number)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-12)])
def test_solving_with_an_orthogonal_matrix_is_multiplying_with_its_transpose(place, dtype, tolerance):
    """In float32 this takes iterative refinement: the triangular factors alone lose two digits at order 600."""
    w = well_conditioned(600, 1, 0).astype(dtype)
    y = rng(3).standard_normal((5, 600)).astype(dtype)
    found = place.get(right_solve(factor(place.put(w)), place.put(y)))
    assert found.dtype == dtype
    close(found, y @ w.T, tolerance)


def test_solving_for_rows_of_the_identity_gives_rows_of_the_inverse(place):
    w = well_conditioned(12, 10, 0)
    factors = factor(place.put(w))
    for rows in (slice(0, 1), slice(0, 12), slice(3, 5)):
        close(place.get(inverse_rows(factors, rows)), np.linalg.inv(w)[rows], 1e-12)


LOPSIDED = np.eye(20)
LOPSIDED[:, 0] += 100


@pytest.mark.parametrize(
    "w",
    [
        well_conditioned(20, 1, 1),
        well_conditioned(256, 1, 1),
        0.01 * well_conditioned(20, 1e3, 1),
        30 * well_conditioned(20, 1e9, 1),
        LOPSIDED,
        LOPSIDED.T.copy(),
        np.eye(1),
    ],
    ids=["orthogonal", "large orthogonal", "small", "ill", "rows and columns apart", "columns and rows apart", "one"],
)
def test_the_condition_number_is_estimated_within_its_norms(place, w):
    """The condition number is that of the norm of the largest row sum, and is estimated from below."""
    exact = np.linalg.cond(w, np.inf)
    assert exact / 1.5 <= float(condition(factor(place.put(w)))) <= exact * 1.001


@given(order=st.integers(2, 40), number=st.sampled_from([1, 1e3, 1e8]), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_a_device_estimates_the_condition_number_as_well_as_lapack(device, order, number, seed):
    """In 1000 draws it was never below 0.72 of LAPACK's estimate. Both estimate from below."""
    w = well_conditioned(order, number, seed)
    found, lapack = float(condition(factor(device.put(w)))), float(condition(factor(w)))
    assert lapack * 0.5 <= found <= np.linalg.cond(w, np.inf) * 1.001


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_singular_matrix_has_a_condition_number_beyond_its_dtype(place, dtype):
    w = rng(1).standard_normal((6, 6)).astype(dtype)
    w[4] = 0
    with np.errstate(all="ignore"):
        assert float(condition(factor(place.put(w)))) > 1 / np.finfo(dtype).eps


def test_a_matrix_that_is_not_finite_has_no_condition_number(place):
    w = np.eye(3)
    w[1, 1] = np.nan
    with np.errstate(all="ignore"):
        assert np.isnan(float(condition(factor(place.put(w)))))


def near_orthogonal(order, norm, seed=0, lopsided=False):
    """Return W with this ‖WWᵀ − I‖, spread evenly over all directions or, if lopsided, in one that W shrinks."""
    left, right = (np.linalg.qr(rng(seed, 4, i).standard_normal((order, order)))[0] for i in (0, 1))
    excess = rng(seed, 5).choice([-1.0, 1], order) * norm / order**0.5
    if lopsided:
        excess = np.append(-norm, np.zeros(order - 1))
    return np.ascontiguousarray(left * np.sqrt(1 + excess) @ right)


def cholesky_of(place, w):
    xp, there = place.backend.xp, place.put(w)
    excess = xp.zeros(w.shape, dtype=w.dtype)
    excess_rows(there, slice(0, len(w)), excess)
    return cholesky(there, excess, xp.empty(w.shape, dtype=w.dtype))


@pytest.mark.parametrize("order", [1, 2, 50])
@pytest.mark.parametrize("norm", [0, 0.3, NEAR_ORTHOGONAL])
def test_a_cholesky_factor_solves_as_lu_and_numpy_do(place, order, norm):
    w, y = near_orthogonal(order, norm), rng(6).standard_normal((4, order))
    factors = cholesky_of(place, w)
    found = place.get(right_solve(factors, place.put(y)))
    close(found, np.linalg.solve(w.T, y.T).T, 1e-13)
    close(found, place.get(right_solve(factor(place.put(w)), place.put(y))), 1e-13)
    close(place.get(inverse_rows(factors, slice(0, order))), np.linalg.inv(w), 1e-13)
    np.testing.assert_array_equal(place.get(factors.matrix), w)


@pytest.mark.parametrize("norm", [0, 0.05, 0.3, NEAR_ORTHOGONAL])
@pytest.mark.parametrize("lopsided", [False, True])
def test_up_to_the_limit_a_cholesky_factor_loses_no_digit_of_a_float32(norm, lopsided):
    """Measured at order 300: 3e-7 for every norm, both for random rows and for the row that W⁻¹ amplifies most."""
    place = SimpleNamespace(put=np.array, backend=NUMPY)
    w = near_orthogonal(300, norm, lopsided=lopsided).astype("float32")
    weak = np.linalg.svd(w.astype("float64"))[2][-1:]
    for y in (rng(7).standard_normal((5, 300)), weak):
        exact = np.linalg.solve(w.T.astype("float64"), y.astype("float32").T.astype("float64")).T
        found = right_solve(cholesky_of(place, w), y.astype("float32"))
        assert found.dtype == np.float32
        assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("near", [True, False])
def test_the_pseudo_inverse_is_that_of_the_singular_values(place, shape, ridge, near):
    """With r = 0 it is the Moore–Penrose inverse. A nearly semi-orthogonal W has a Cholesky factor, any other LU."""
    u, sigma, v = np.linalg.svd(rng(*shape).standard_normal(shape), full_matrices=False)
    sigma = np.linspace(0.9, 1.1, len(sigma)) if near else sigma
    w = np.ascontiguousarray((u * sigma) @ v)
    wanted = (v.T * (sigma / (sigma**2 + ridge))) @ u.T
    order, put = min(shape), place.put(w)
    gram = w.T @ w if shape[0] > shape[1] else w @ w.T
    if near:
        out = place.backend.xp.empty((order, order), dtype=w.dtype)
        e = gram - np.eye(order)
        factors = cholesky(put, place.put(np.triu(e) if place.backend.on_host else e), out, ridge)
    else:
        factors = factor_gram(put, ridge)
    inverse = PseudoInverse(put, factors)
    rows = place.get(transposed_rows(inverse, slice(1, max(shape))))
    close(rows, (wanted.T if shape[0] > shape[1] else wanted)[1:], 1e-12)
    z = rng(3).standard_normal((5, order))
    solved = place.get(gram_solve(inverse, place.backend.asarray(z.copy())))
    close(solved, z @ np.linalg.inv(gram + ridge * np.eye(order)), 1e-12)
    if not ridge:
        close(wanted, np.linalg.pinv(w), 1e-12)


def test_a_damping_that_leaves_a_system_singular_is_named():
    same = np.ones((1, 3, 4), np.float32)
    with pytest.raises(NonFiniteError, match=r"has no inverse with γ = damping = 1e-20; use a larger one"):
        damped_gauss_newton(same, np.ones((1, 3), np.float32), 1e-20)
