"""E, the deviation of a matrix from semi-orthogonality, which the regulariser, W⁻¹ and W⁺ share.

Dimensions: W has K rows and O columns. E = WWᵀ − I of order n = K unless W is tall, K > O; then E = WᵀW − I of order
n = O. So its order is W's smaller side, and E = 0 if W's rows (columns, if tall) are orthonormal. It is symmetric: on
the host, only the entries on and above the diagonal are computed and read, and the others stay 0; on a device, all
entries are computed.
"""

import numpy as np

from arraytp.backend import Array, add_product, array_module
from arraytp.ops.blas import blas


def is_tall(w: Array) -> bool:
    """Tell whether W has more rows than columns, so that its smaller Gram matrix is WᵀW."""
    return len(w) > int(w.shape[1])


def excess_rows(w: Array, rows: slice, out: Array) -> None:
    """Write some rows of E.

    Parameters
    ----------
    w : array of shape (K, O), C-contiguous
        W.
    rows : slice
    out : array of shape (n, n), C-contiguous
        E; on the host, its entries below the diagonal must be 0 and stay so.
    """
    n, height = len(out), rows.stop - rows.start
    if array_module(w) is not np:
        wide = w.T if is_tall(w) else w
        add_product(wide[rows], wide.T, out[rows])
    elif is_tall(w):
        blas("syrk", "L", "N", height, len(w), 1.0, w[:, rows], 0.0, out[rows, rows])
        np.matmul(w[:, rows].T, w[:, rows.stop :], out=out[rows, rows.stop :])
    else:
        blas("syrk", "L", "T", height, w.shape[1], 1.0, w[rows], 0.0, out[rows, rows])
        np.matmul(w[rows], w[rows.stop :].T, out=out[rows, rows.stop :])
    out.reshape(-1)[rows.start * (n + 1) : (rows.stop - 1) * (n + 1) + 1 : n + 1] -= 1


def excess_norm(excess: Array) -> Array:
    """Return the Frobenius norm ‖E‖, of shape (); NaN or infinite if E has such entries."""
    xp, flat = array_module(excess), excess.reshape(-1)
    squares = xp.dot(flat, flat)
    if xp is not np:
        return xp.sqrt(squares)
    diagonal = flat[:: len(excess) + 1]
    return np.sqrt(2 * float(squares) - float(np.dot(diagonal, diagonal)))


def add_excess_product(factor: float, excess: Array, w: Array, part: slice, out: Array) -> None:
    """Add a part of factor · E W, or of factor · W E where W is tall, to the same part of `out`, in place.

    W and `out` are of shape (K, O), C-contiguous; the part lies along the longer side: columns of E W, rows of W E.
    """
    n, length = len(excess), part.stop - part.start
    if is_tall(w):
        if array_module(w) is not np:
            add_product(w[part], excess, out[part], factor, 1.0)
        else:
            blas("symm", "L", "L", n, length, float(factor), excess, w[part], 1.0, out[part])
    elif array_module(w) is not np:
        add_product(excess, w[:, part], out[:, part], factor, 1.0)
    else:
        blas("symm", "R", "L", length, n, float(factor), excess, w[:, part], 1.0, out[:, part])
