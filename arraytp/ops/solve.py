"""Solving with a weight matrix: factors once, any number of right-hand sides (GP paper, Equation 3).

Dimensions: n order of the matrix, R rows. The equation solved is x W = y, with x and y of shape (R, n): rows are
samples or positions, as everywhere. LAPACK is column-major, so it sees a C-contiguous W as Wᵀ, and y as yᵀ: no array is
copied into another order.

Any square W has LU factors. For one near an orthogonal matrix, the Cholesky factor of WWᵀ = I + E, with E of
`arraytp.ops.excess`, is cheaper: W⁻¹ = Wᵀ(I + E)⁻¹.

A W of K rows and O columns has a pseudo-inverse W⁺ = Wᵀ(WWᵀ)⁻¹ or (WᵀW)⁻¹Wᵀ, whichever exists, and a ridge inverse
Wᵀ(WWᵀ + rI)⁻¹ = (WᵀW + rI)⁻¹Wᵀ, r > 0. Both use factors of the smaller Gram matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.linalg import get_lapack_funcs

from arraytp.backend import (
    Array,
    add_product,
    array_module,
    batched_product,
    batched_solve,
    divide_rows,
    factorise,
    matrix_product,
)
from arraytp.errors import NonFiniteError
from arraytp.ops import kernels
from arraytp.ops.blas import blas
from arraytp.ops.excess import is_tall

NEAR_ORTHOGONAL = 0.8
"""Up to this ‖E‖, the eigenvalues of WWᵀ lie between 0.2 and 1.8, so its condition number is at most 9 and that of W at
most 3: solving with WWᵀ costs at most one of the dtype's digits."""
Room: TypeAlias = Callable[[str, tuple[int, ...], Any], Array]
"""(name, shape, dtype) → an array with undefined content."""
# Steps of the condition number's estimate; LAPACK's own takes at most 5 and stops once the estimate stops growing.
DEVICE_STEPS = 3


@dataclass(frozen=True)
class Cholesky:
    """The Cholesky factor of WWᵀ, or of WᵀW for a W with more rows than columns.

    Parameters
    ----------
    matrix : array of shape (n, n), or (K, O) with min(K, O) = n
        W.
    triangle : array of shape (n, n)
        As LAPACK's potrf returns it: the upper triangle in row-major order; the rest is not read.
    """

    matrix: Array
    triangle: Array


@dataclass(frozen=True)
class LU:
    """LU factors of Wᵀ.

    Parameters
    ----------
    matrix : array of shape (n, n)
        W.
    lu, pivots : arrays of shape (n, n) and (n,)
        As LAPACK's getrf returns them. On a device, `pivots` is the row order that results from them.
    norm : array of shape () or float
        ‖Wᵀ‖₁, the largest sum of absolute values of a row of W.
    """

    matrix: Array
    lu: Array
    pivots: Array
    norm: Array


Factors = Cholesky | LU


@dataclass(frozen=True)
class PseudoInverse:
    """W⁺ = Wᵀ(WWᵀ + rI)⁻¹ = (WᵀW + rI)⁻¹Wᵀ, r ≥ 0.

    Parameters
    ----------
    matrix : array of shape (K, O)
        W.
    gram : Factors
        Factors of WWᵀ + rI, or of WᵀW + rI for a W with more rows than columns.
    """

    matrix: Array
    gram: Factors


def cholesky(matrix: Array, excess: Array, out: Array, ridge: float = 0) -> Cholesky:
    """Factorise I + E + rI for a W with ‖E‖ ≤ `NEAR_ORTHOGONAL`; n³/3 operations.

    Parameters
    ----------
    matrix, excess : arrays of shape (n, n), or (K, O) and (n, n), C-contiguous
        W and E; not modified.
    out : array of shape (n, n), C-contiguous
        Overwritten: it becomes the triangle.
    ridge : float
        r, 0 for the inverse and the pseudo-inverse.
    """
    xp, order = array_module(matrix), len(excess)
    out[...] = excess
    out.reshape(-1)[:: order + 1] += 1 + ridge
    if xp is np:
        blas("potrf", "L", order, out)
    else:
        factorise("potrf", out)
    return Cholesky(matrix, out)


def factor(matrix: Array, room: Room | None = None) -> LU:
    """Factorise W, C-contiguous and of shape (n, n); 2n³/3 operations. A singular W shows in `condition`.

    `room` provides the arrays of the factors on a device; without it, they are allocated.
    """
    xp, order = array_module(matrix), len(matrix)
    norm = xp.absolute(matrix).sum(axis=1).max()
    if xp is not np:
        room = room or _made(xp)
        held = room("norm", (), matrix.dtype)
        held[...] = norm
        lu = room("lu", matrix.shape, matrix.dtype)
        lu[...] = matrix
        return LU(matrix, lu.T, kernels.row_order(factorise("getrf", lu), room("order", (order,), np.int32)), held)
    getrf = get_lapack_funcs("getrf", (matrix,))
    lu, pivots, _ = getrf(matrix.T)
    return LU(matrix, lu, pivots, norm)


def factor_gram(matrix: Array, ridge: float, room: Room | None = None) -> LU:
    """Factorise WWᵀ + rI, or WᵀW + rI for a W with more rows than columns: any W, C-contiguous, of shape (K, O)."""
    xp, wide = array_module(matrix), matrix.T if is_tall(matrix) else matrix
    if xp is np:
        gram = wide @ wide.T
    else:
        room = room or _made(xp)
        gram = add_product(wide, wide.T, room("gram", (len(wide), len(wide)), matrix.dtype))
    gram.reshape(-1)[:: len(gram) + 1] += ridge
    return factor(gram, room)


def _made(xp: Any) -> Room:
    return lambda name, shape, dtype: xp.empty(shape, dtype)


def gram_solve(inverse: PseudoInverse, z: Array) -> Array:
    """Return z (WWᵀ + rI)⁻¹, or z (WᵀW + rI)⁻¹, of z's shape (R, n); z is C-contiguous and may be overwritten."""
    if isinstance(inverse.gram, Cholesky):
        return symmetric_solve(inverse.gram, z)
    return right_solve(inverse.gram, z)


def transposed_rows(inverse: PseudoInverse, rows: slice) -> Array:
    """Return some rows of (W⁺)ᵀ if W has more rows than columns, else some rows of W⁺; shape (R, n)."""
    matrix = inverse.matrix if is_tall(inverse.matrix) else inverse.matrix.T
    return gram_solve(inverse, matrix[rows].copy())


def damped_gauss_newton(jacobian: Array, e: Array, damping: float) -> Array:
    """Return Jᵀ (J Jᵀ + γI)⁻¹ e of every sample, of shape (B, D): the damped Gauss-Newton change for an error e.

    J Jᵀ is computed in J's dtype, so a γ far below its rounding error, ε tr(J Jᵀ)/C, has no effect; the C×C systems are
    solved in float64.

    Parameters
    ----------
    jacobian : array of shape (B, C, D)
        J of every sample.
    e : array of shape (B, C)
    damping : float
        γ > 0.

    Raises
    ------
    NonFiniteError
        If a system is singular. Not checked on a device.
    """
    gram = batched_product(jacobian, jacobian.transpose(0, 2, 1)).astype(np.float64)
    gram.reshape(len(e), -1)[:, :: e.shape[1] + 1] += damping
    try:
        v = batched_solve(gram, e.astype(np.float64)).astype(jacobian.dtype)
    except np.linalg.LinAlgError:
        raise NonFiniteError(
            f"J Jᵀ + γI of Gauss-Newton targets has no inverse with γ = damping = {damping:g}; use a larger one"
        ) from None
    return batched_product(v[:, None], jacobian)[:, 0]


def right_solve(factors: Factors, y: Array) -> Array:
    """Return x with x W = y, both of shape (R, n); 2Rn² operations by LU factors, 4Rn² by a Cholesky factor.

    In float32 one step of iterative refinement, x + (y − x W) W⁻¹, triples those of LU: without it the triangular
    factors' own condition costs two digits (measured: orthogonal W of order 1024, relative error 2e-5 before, 3e-7
    after). A Cholesky factor needs no refinement: its error is 4e-7 at every ‖E‖ for which it is used.

    Parameters
    ----------
    factors : Factors
        Of W.
    y : array of shape (R, n), C-contiguous
    """
    if isinstance(factors, Cholesky):
        return symmetric_solve(factors, matrix_product(y, factors.matrix.T))
    x = _substitute(factors, y)
    if y.dtype == np.float32:
        x = x + _substitute(factors, y - matrix_product(x, factors.matrix))
    return x


def symmetric_solve(factors: Cholesky, z: Array) -> Array:
    """Return z (WWᵀ)⁻¹, of z's shape (R, n); z is C-contiguous and may be overwritten; 2Rn² operations."""
    if array_module(z) is not np:
        # WWᵀ = UᵀU.
        return divide_rows(divide_rows(z, factors.triangle), factors.triangle, transposed=True)
    blas("potrs", "L", len(factors.triangle), len(z), factors.triangle, z)
    return z


def _substitute(factors: LU, y: Array, transposed: bool = False) -> Array:
    """Return x with x W = y, or x Wᵀ = y, by the two triangular factors."""
    xp, lu, order = array_module(y), factors.lu, factors.pivots
    if xp is not np and not transposed:
        # Wᵀ with its rows reordered is L U.
        x = divide_rows(xp.take(y, order, axis=1), lu, lower=True, transposed=True, unit=True)
        return divide_rows(x, lu, transposed=True)
    if xp is not np:
        x = xp.empty(y.shape, y.dtype)
        x[:, order] = divide_rows(divide_rows(y.copy(), lu), lu, lower=True, unit=True)
        return x
    getrs = get_lapack_funcs("getrs", (y,))
    # SciPy's wrapper increments the pivots in place and decrements them again, so threads cannot share them.
    x, _ = getrs(factors.lu, factors.pivots.copy(), y.T, trans=int(transposed))
    return x.T


def inverse_rows(factors: Factors, rows: slice) -> Array:
    """Return some rows of W⁻¹, of shape (R, n)."""
    xp, matrix = array_module(factors.matrix), factors.matrix
    if isinstance(factors, Cholesky):
        return symmetric_solve(factors, matrix.T[rows].copy())
    order = len(matrix)
    unit = xp.zeros((rows.stop - rows.start, order), dtype=matrix.dtype)
    unit.reshape(-1)[rows.start :: order + 1] = 1
    return right_solve(factors, unit)


def condition(factors: LU) -> Array:
    """Return an estimate from below of the condition number ‖W‖·‖W⁻¹‖ in the largest-row-sum norm, of shape ().

    It is Hager's and Higham's estimate (LAPACK's gecon on the host), rarely too small by more than a factor of 3. It is
    infinite for a singular matrix and NaN for one that is not finite. On a device, nothing is read back.
    """
    xp = array_module(factors.lu)
    if xp is not np:
        inverse_norm = _inverse_norm(factors)
        number = factors.norm * xp.where(xp.isfinite(inverse_norm), inverse_norm, xp.inf)
        return xp.where(xp.isfinite(factors.norm), number, xp.nan)
    norm = float(factors.norm)
    if not np.isfinite(norm):
        return np.float64("nan")
    gecon = get_lapack_funcs("gecon", (factors.lu,))
    reciprocal, _ = gecon(factors.lu, norm)
    return np.float64(1 / float(reciprocal) if reciprocal > 0 else "inf")


def _inverse_norm(factors: LU) -> Array:
    """Return an estimate of ‖W⁻ᵀ‖₁, the largest ‖x‖₁ / ‖y‖₁ among some x W = y, without reading back at which y.

    ‖x‖₁ is convex in y, so its maximum over ‖y‖₁ ≤ 1 is at a unit vector. Each step takes the unit vector along which
    it grows most from the last y (Hager 1984); a final y of alternating signs catches what these miss (Higham 1988).
    """
    xp, order, dtype = array_module(factors.lu), len(factors.lu), factors.lu.dtype
    places = xp.arange(order)
    y, most = xp.full((1, order), 1 / order, dtype=dtype), xp.zeros((), dtype)
    for _ in range(DEVICE_STEPS):
        x = _substitute(factors, y)
        most = xp.maximum(most, xp.absolute(x).sum())
        growth = _substitute(factors, xp.where(x < 0, dtype.type(-1), dtype.type(1)), transposed=True)
        y = (places == xp.absolute(growth).argmax()).astype(dtype)[None]
    alternating = (1 - 2 * (places % 2)) * (1 + places / max(1, order - 1))
    last = xp.absolute(_substitute(factors, alternating.astype(dtype)[None])).sum() * dtype.type(2 / (3 * order))
    return xp.maximum(most, last)
