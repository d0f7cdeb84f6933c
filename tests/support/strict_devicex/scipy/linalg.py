"""What `cupyx.scipy.linalg` is to CuPy: factors and solves of the strict device double."""

import warnings

import numpy as np
import scipy.linalg
import strict_device as device


def lu_factor(a, overwrite_a=False, check_finite=True):
    """Factorise; of a singular matrix CuPy warns by a RuntimeWarning."""
    device.reads["info"] += 2
    host = device._operand(a, scalars=False)
    if check_finite and not np.isfinite(host).all():
        raise ValueError("array must not contain infs or NaNs")
    getrf = scipy.linalg.get_lapack_funcs("getrf", (host,))
    lu, pivots, info = getrf(host)
    if info > 0:
        warnings.warn(f"Diagonal number {info} is exactly zero. Singular matrix.", RuntimeWarning, stacklevel=2)
    return device._wrap(lu), device._wrap(pivots)


def solve_triangular(a, b, trans=0, lower=False, unit_diagonal=False, overwrite_b=False, check_finite=False):
    """Solve; like cuBLAS, say nothing of a singular matrix."""
    a, b = (device._operand(array, scalars=False) for array in (a, b))
    trsm = scipy.linalg.get_blas_funcs("trsm", (a, b))
    return device._wrap(trsm(1.0, a, b, lower=lower, trans_a=trans, diag=unit_diagonal))
