"""Exact inverses of square blocks, G(F(x)) = x (GP paper, Equation 3 and Algorithm 2), in slices shared by threads.

`arraytp.model.network.block_inverse` is the plain form. W is factorised once per step and block: near an orthogonal
matrix by Cholesky, W⁻¹ = Wᵀ(WWᵀ)⁻¹, else by LU. Where fewer rows are to be carried through W⁻¹ than it has rows of
interest, they are solved for; else those rows of W⁻¹ are formed and multiplied.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.errors import IllConditionedError, NonFiniteError, UserError
from arraytp.fast.orthogonality import excess_of
from arraytp.fast.parallel import Buffers, Workspace, even_slices
from arraytp.fast.passes import backward
from arraytp.model.network import Block, ForwardPass, Network
from arraytp.ops.activations import activation_backward, activation_inverse, activation_range
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import excess_norm
from arraytp.ops.patches import col2im, coverage
from arraytp.ops.solve import (
    NEAR_ORTHOGONAL,
    Cholesky,
    Factors,
    cholesky,
    condition,
    factor,
    inverse_rows,
    right_solve,
    symmetric_solve,
)

SLICES = 4
# Measured: 64 rows a slice take a sixth longer.
SOLVE_ROWS = 128
INVERTIBLE = ("linear", "leaky-relu", "elu", "tanh")


def check_invertible(blocks: tuple[Block, ...]) -> None:
    """Refuse blocks after the first that have no inverse.

    Raises
    ------
    UserError
        For a pool, an activation without inverse, or a weight matrix that is not square; names block and remedy.
    """
    for n, block in enumerate(blocks[1:], start=1):
        where = f"network block {n} ({block.label}): rule gait-prop inverts every block but the first, and "
        inputs, outputs = int(np.prod(block.weight_shape[:-1])), block.out_shape[-1]
        if block.pool is not None:
            raise UserError(f"{where}max-pooling has no inverse; use a convolution with a stride instead")
        if block.activation not in INVERTIBLE:
            raise UserError(
                f"{where}{block.activation} has no inverse; use leaky-relu or linear (all values), elu (values above "
                "-1) or tanh (between -1 and 1)"
            )
        if not block.is_square:
            raise UserError(
                f"{where}a weight matrix of {inputs}x{outputs} is not square; it needs {inputs} units in all, those "
                "not passed on as auxiliary ones: network.square: true sees to that"
            )


def check_range(block: Block, n: int, y: Array) -> None:
    """Refuse outputs y of block n that its activation cannot have, and that f⁻¹ would make infinite or NaN.

    Only ELU and tanh are looked at: the other activations reach every number.

    Raises
    ------
    NonFiniteError
        Names the block, the value, the range and what would help. NaN passes: it is no matter of the range.
    """
    low, high = activation_range(block.activation)
    if (low, high) == (-math.inf, math.inf):
        return
    for value in (float(y.min()), float(y.max())):
        if value <= low or value >= high:
            raise NonFiniteError(
                f"block {n} ({block.label}): a nudged activation of {value:.9g} is beyond the range of "
                f"{block.activation}, above {low:g}{f' and below {high:g}' if math.isfinite(high) else ''}, so that "
                "it has no inverse; use a smaller rule.gamma or rule.eta, smaller weights so that units do not "
                "saturate, activation leaky-relu, or rule.form: difference"
            )


def factor_blocks(
    network: Network, workspace: Workspace, excess: Mapping[int, Array] | None = None
) -> dict[int, Factors]:
    """Factorise the weight matrix of every block but the first, one task a block.

    Parameters
    ----------
    network : Network
    workspace : Workspace
        Holds the result until the next call.
    excess : mapping of int to array, optional
        WWᵀ − I of these blocks, where the caller has it; `arraytp.fast.orthogonality.excess_of`.

    Raises
    ------
    IllConditionedError
        If a condition number is beyond what the dtype can carry, 1 / machine epsilon; names the block and the number.
    """
    inner = range(1, len(network))
    if excess is None:
        excess = excess_of({n: network.weights[n] for n in inner}, workspace)
    triangles = {n: workspace.array(("triangle", n), e.shape, e.dtype) for n, e in excess.items()}
    found: dict[int, tuple[Factors, float]] = {}

    def task(n: int, scratch: Buffers) -> None:
        w = as_matrix(network.weights[n])
        if excess_norm(excess[n]) <= NEAR_ORTHOGONAL:
            found[n] = cholesky(w, excess[n], triangles[n]), 1
        else:
            factors = factor(w)
            found[n] = factors, condition(factors)

    workspace.run([partial(task, n) for n in sorted(inner, key=lambda n: network.weights[n].size, reverse=True)])
    for n in sorted(found):
        dtype, estimate = network.weights[n].dtype, found[n][1]
        if estimate > 1 / np.finfo(dtype).eps:
            raise IllConditionedError(
                f"block {n} ({network.blocks[n].label}): the weight matrix cannot be inverted in {dtype}: its "
                f"condition number is {estimate:.1e}, at most {1 / np.finfo(dtype).eps:.1e} can be; network.init: "
                "orthogonal and optimizer.orthogonality keep it near 1"
            )
    return {n: factors for n, (factors, _) in found.items()}


def inverse(
    block: Block, factors: Factors, bias: Array, y: Array, x: Array, workspace: Workspace, key: object
) -> Array:
    """Return G(y), the input of a block whose output is y: `arraytp.model.network.block_inverse`.

    Parameters
    ----------
    block : Block
    factors : Factors
        Of its weight matrix.
    bias : array of shape (O,)
    y : array of shape (B, *out_shape)
        Near the block's output, auxiliary units included.
    x : array of shape (B, *in_shape)
        The block's input in the forward pass.
    workspace : Workspace
    key : object
        Names the buffer of the result, which is valid until the next call with this key.

    Returns
    -------
    array of x's shape
    """
    out = workspace.array((key, "x"), x.shape, x.dtype)
    order = len(factors.matrix)
    matrix = None if y.size // order <= order else first_rows(factors, order, workspace)
    others = _other_windows(block, x, workspace)

    def samples(part: slice, scratch: Buffers) -> None:
        z = (activation_inverse(y[part], block.activation) - bias).reshape(-1, order)
        patches = right_solve(factors, z) if matrix is None else z @ matrix
        if block.window is None:
            out[part] = patches.reshape(out[part].shape)
        else:
            out[part] = col2im(patches.reshape(y[part].shape), block.window)
            out[part] -= others * x[part]

    parts = _row_slices(len(x), workspace) if block.window is None else even_slices(len(x), SLICES)
    workspace.run([partial(samples, part) for part in parts])
    return out


def backward_through_inverse(
    block: Block, factors: Factors, ds: Array, passed: ForwardPass, n: int, workspace: Workspace, key: object
) -> tuple[Array, Array, Array]:
    """Return dW, db and (D ⊙ ds) W⁻¹ of block n: `arraytp.fast.passes.backward` with W⁻¹ in place of Wᵀ.

    Parameters as there; auxiliary units have ds = 0, so that only the rows of W⁻¹ count that belong to passed units.
    """
    s, x, units = passed.s[n + 1], passed.x[n], block.passed_shape[-1]
    if block.window is not None or len(x) >= units:
        rows = first_rows(factors, units, workspace)
        carrier = array_module(rows).ascontiguousarray(rows.T).reshape(*block.weight_shape[:-1], units)
        dweight, dbias, dx = backward(block, ds, s, None, x, carrier, workspace, key)
        return dweight, dbias, dx
    if isinstance(factors, Cholesky):
        weight = factors.matrix.reshape(block.weight_shape)
        dweight, dbias, dx = backward(block, ds, s, None, x, weight, workspace, key)
        assert dx is not None
        _solve_rows(lambda rows: symmetric_solve(factors, rows), dx.reshape(len(x), -1), workspace)
        return dweight, dbias, dx
    dweight, dbias, _ = backward(block, ds, s, None, x, None, workspace, key)
    dz = workspace.array((key, "solved"), s.shape, s.dtype)
    dz[:, units:] = 0
    activation_backward(ds.reshape(len(x), units), s[:, :units], block.activation, out=dz[:, :units])
    _solve_rows(lambda rows: right_solve(factors, rows), dz, workspace)
    return dweight, dbias, dz.reshape(x.shape)


def first_rows(factors: Factors, count: int, workspace: Workspace) -> Array:
    """Return the first `count` rows of W⁻¹, of shape (count, n): what `count` units of the output say of the input."""
    rows = workspace.array("inverse rows", (count, len(factors.matrix)), factors.matrix.dtype)

    def task(part: slice, scratch: Buffers) -> None:
        rows[part] = inverse_rows(factors, part)

    workspace.run([partial(task, part) for part in _row_slices(count, workspace)])
    return rows


def _solve_rows(solve: Callable[[Array], Array], rows: Array, workspace: Workspace) -> None:
    """Replace the rows by what `solve` makes of them."""

    def task(part: slice, scratch: Buffers) -> None:
        rows[part] = solve(rows[part])

    workspace.run([partial(task, part) for part in _row_slices(len(rows), workspace)])


def _row_slices(count: int, workspace: Workspace) -> list[slice]:
    return even_slices(count, max(2, count // SOLVE_ROWS) if workspace.backend.on_host else 1)


def _other_windows(block: Block, x: Array, workspace: Workspace) -> Array:
    """Return n_x − 1 of a convolution: windows over each pixel besides the first."""
    window = block.window
    if window is None:
        return None
    return workspace.shared.cached(("n_x", window, str(x.dtype)), 1, lambda: coverage(window, x) - x.dtype.type(1))
