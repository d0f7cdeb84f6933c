"""BLAS and LAPACK routines for symmetric matrices, callable from several threads at once.

SciPy's wrappers of these routines hold the interpreter lock while they compute, so that threads wait for each other
(those of LU do not). SciPy publishes the addresses of all routines for compiled code, as `scipy.linalg.cython_blas` and
`cython_lapack`; ctypes calls them without the lock.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

_TYPES: dict[str, tuple[str, Any]] = {"float32": ("s", ctypes.c_float), "float64": ("d", ctypes.c_double)}


def blas(name: str, *arguments: str | int | float | np.ndarray) -> None:
    """Call a routine on row-major matrices.

    Parameters
    ----------
    name : {"syrk", "symm", "potrf", "potrs"}
        Without the type letter, which follows from the arrays.
    arguments : letters, int, float and arrays of two axes, of one dtype
        In the routine's order, without leading dimensions and INFO. The routine is column-major: a row-major array is
        passed as its transpose, so "L" (lower) names the upper triangle here.

    Raises
    ------
    ValueError
        If the rows of an array are not contiguous, or the dtypes differ.
    numpy.linalg.LinAlgError
        If the routine fails, as potrf does for a matrix that is not positive definite.
    """
    arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
    dtype = arrays[0].dtype
    if any(array.dtype != dtype or array.strides[1] != array.itemsize for array in arrays):
        given = ", ".join(f"{array.dtype} with strides {array.strides}" for array in arrays)
        raise ValueError(f"{name} needs arrays of one dtype with contiguous rows, not {given}")
    letter, number = _TYPES[str(dtype)]
    passed: list[Any] = []
    for argument in arguments:
        if isinstance(argument, str):
            passed.append(argument.encode())
        elif isinstance(argument, np.ndarray):
            leading = argument.strides[0] // argument.itemsize if len(argument) > 1 else argument.shape[1]
            passed += [argument.ctypes.data, ctypes.byref(ctypes.c_int(leading))]
        else:
            passed.append(ctypes.byref(ctypes.c_int(argument) if isinstance(argument, int) else number(argument)))
    info = ctypes.c_int(0)
    if name.startswith("po"):
        passed.append(ctypes.byref(info))
    _routine(letter + name)(*passed)
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK's {letter}{name} fails with INFO = {info.value}")


@cache
def _routine(name: str) -> Callable[..., None]:
    """Return the function at the address that SciPy publishes; its parameters are pointers, as in Fortran."""
    module = cython_lapack if name[1:].startswith("po") else cython_blas
    capsule = ctypes.py_object(module.__pyx_capi__[name])
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_pointer.restype = ctypes.c_char_p, ctypes.c_void_p
    signature: bytes = get_name(capsule)
    address: int = get_pointer(capsule, ctypes.c_char_p(signature))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))(address)
