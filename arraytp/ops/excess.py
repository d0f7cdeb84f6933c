"""E = WWᵀ − I, how far a square matrix is from an orthogonal one: what the regulariser and W⁻¹ = Wᵀ(I + E)⁻¹ share.

Dimensions: n order of the matrix. E is symmetric: on the host it is an array of which only the entries on and above the
diagonal are computed and read, the others stay 0; on a device the whole of it is computed.
"""

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.ops.blas import blas


def excess_rows(w: Array, rows: slice, out: Array) -> None:
    """Write some rows of E.

    Parameters
    ----------
    w : array of shape (n, n), C-contiguous
        W.
    rows : slice
    out : array of shape (n, n), C-contiguous
        E; on the host zeros below the diagonal, which are left so.
    """
    n, height = len(w), rows.stop - rows.start
    if array_module(w) is not np:
        array_module(w).matmul(w[rows], w.T, out=out[rows])
    else:
        blas("syrk", "L", "T", height, n, 1.0, w[rows], 0.0, out[rows, rows])
        np.matmul(w[rows], w[rows.stop :].T, out=out[rows, rows.stop :])
    out.reshape(-1)[rows.start * (n + 1) : (rows.stop - 1) * (n + 1) + 1 : n + 1] -= 1


def excess_norm(excess: Array) -> Array:
    """Return ‖E‖ of shape (), the root of the sum of all squared entries; NaN or infinite where E has such."""
    xp, flat = array_module(excess), excess.reshape(-1)
    squares = xp.dot(flat, flat)
    if xp is not np:
        return xp.sqrt(squares)
    diagonal = flat[:: len(excess) + 1]
    return np.sqrt(2 * float(squares) - float(np.dot(diagonal, diagonal)))


def add_excess_product(factor: float, excess: Array, w: Array, columns: slice, out: Array) -> None:
    """Add some columns of factor · E W to those of `out`, in place; all of shape (n, n), C-contiguous."""
    n, width = len(w), columns.stop - columns.start
    if array_module(w) is not np:
        out[:, columns] += w.dtype.type(factor) * (excess @ w[:, columns])
    else:
        blas("symm", "R", "L", width, n, float(factor), excess, w[:, columns], 1.0, out[:, columns])
