"""What `cupyx.scipy.linalg` is to CuPy: factors and solves of the strict device double."""

import warnings

import scipy.linalg
import strict_device as device


def lu_factor(a, overwrite_a=False, check_finite=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        lu, pivots = scipy.linalg.lu_factor(device._operand(a, scalars=False).copy(), check_finite=check_finite)
    return device._wrap(lu), device._wrap(pivots)


def lu_solve(lu_and_piv, b, trans=0, overwrite_b=False, check_finite=True):
    """Solve; like cuSOLVER, say nothing of a singular matrix."""
    lu, pivots = (device._operand(array, scalars=False) for array in lu_and_piv)
    getrs = scipy.linalg.get_lapack_funcs("getrs", (lu,))
    return device._wrap(getrs(lu, pivots, device._operand(b, scalars=False), trans=trans)[0])


def solve_triangular(a, b, trans=0, lower=False, unit_diagonal=False, overwrite_b=False, check_finite=True):
    a, b = (device._operand(array, scalars=False) for array in (a, b))
    return device._wrap(scipy.linalg.solve_triangular(a, b, trans, lower, unit_diagonal, check_finite=check_finite))
