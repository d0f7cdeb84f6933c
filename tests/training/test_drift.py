"""How far a weight matrix is from orthogonal."""

import math

import numpy as np
import pytest

from arraytp.training.drift import drift


@pytest.mark.parametrize("shape", [(12, 12), (5, 9), (9, 5), (2, 3, 2, 4)])
def test_drift_is_that_of_the_singular_values(shape):
    w = np.random.default_rng(sum(shape)).standard_normal(shape)
    change = np.linalg.svd(w.reshape(-1, shape[-1]), compute_uv=False) ** 2 - 1
    found, largest = drift(w)
    assert found == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-12)
    # ARPACK's tolerance.
    assert largest == pytest.approx(np.abs(change).max(), rel=1e-3)


def test_an_orthogonal_matrix_has_none_and_one_of_order_1_its_own():
    assert drift(np.eye(5)) == (0, 0)
    assert drift(np.array([[2.0]])) == (3, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_no_error_of_arpack(bad):
    assert not any(map(math.isfinite, drift(np.full((3, 3), bad))))
