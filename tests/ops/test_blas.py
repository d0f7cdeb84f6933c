"""BLAS and LAPACK routines called by address: layout, refusals, threads (results: test_excess.py and test_solve.py)."""

import threading

import numpy as np
import pytest
from samples import close, rng

from arraytp.ops.blas import blas


def test_a_row_major_array_is_its_transpose_to_a_routine():
    """This also holds for parts of larger arrays, whose leading dimension is that of the whole array."""
    w, out = rng(1).standard_normal((6, 9)), np.zeros((5, 8))
    blas("syrk", "L", "T", 3, 4, 2.0, w[1:4, 2:6], 0.0, out[1:4, 3:6])
    wanted = np.zeros((5, 8))
    wanted[1:4, 3:6] = np.triu(2 * w[1:4, 2:6] @ w[1:4, 2:6].T)
    close(out, wanted, 1e-14)


def test_an_indefinite_matrix_has_no_cholesky_factor():
    with pytest.raises(np.linalg.LinAlgError, match="spotrf fails with INFO = 2"):
        blas("potrf", "L", 2, np.diag(np.array([1, -1], "float32")))


@pytest.mark.parametrize("out", [np.zeros((3, 3), "float32"), np.zeros((3, 6))[:, ::2]])
def test_arrays_that_a_routine_would_misread_are_refused(out):
    with pytest.raises(ValueError, match=r"syrk needs arrays of one dtype with contiguous rows, not float64 .*strides"):
        blas("syrk", "L", "T", 3, 3, 1.0, np.eye(3), 0.0, out)
    assert not out.any()


def test_other_threads_go_on_while_a_routine_computes():
    """If the routine held the interpreter's lock, the other thread could not count before the routine is done.

    On a busy machine the other thread may get no core during a given call, so one of 20 calls is enough.
    """
    w, out, counted, done = np.ones((1500, 1500)), np.zeros((1500, 1500)), [0], threading.Event()
    while_computing = []

    def count():
        while not done.is_set():
            counted[0] += 1

    other = threading.Thread(target=count)
    other.start()
    try:
        for _ in range(20):
            # Python's threads take turns of 5 ms; if a routine held the lock, no turn would fall within it.
            before = counted[0]
            blas("syrk", "L", "T", 1500, 1500, 1.0, w, 0.0, out)
            while_computing.append(counted[0] - before)
            if while_computing[-1] > 1000:
                break
    finally:
        done.set()
        other.join()
    assert max(while_computing) > 1000
