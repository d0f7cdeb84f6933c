"""Norms of rows, computed without overflow or underflow."""

import numpy as np

from arraytp.backend import Array, array_module

# Elements of rows processed at once on the host, so that temporaries stay small.
HOST_ELEMENTS = 1 << 16


def row_norms(rows: Array) -> tuple[Array, Array]:
    """Return ‖row‖₂ of every row, and which rows count as 0: those whose entries are all below the dtype's `tiny`.

    Parameters
    ----------
    rows : array of shape (B, size)

    Returns
    -------
    norms : array of shape (B,)
        1 for a row that counts as 0.
    zero : array of bool of shape (B,)
    """
    xp, number = array_module(rows), rows.dtype.type
    length = max(1, HOST_ELEMENTS // max(1, rows.shape[1])) if xp is np else len(rows)
    norms, zero = xp.empty(len(rows), dtype=rows.dtype), xp.empty(len(rows), dtype=bool)
    for first in range(0, len(rows), length):
        part = rows[first : first + length]
        largest = xp.absolute(part).max(axis=1)
        zero[first : first + length] = largest < number(np.finfo(rows.dtype).tiny)
        safe = xp.where(zero[first : first + length], number(1), largest)
        # Divided by the largest entry first: its square may be too small for the dtype.
        norm = safe * xp.sqrt(xp.square(part / safe[:, None]).sum(axis=1))
        norms[first : first + length] = xp.where(zero[first : first + length], number(1), norm)
    return norms, zero
