"""Exact inverses of square blocks, G(F(x)) = x (GP paper, Equation 3 and Algorithm 2), and W⁺ of any, on threads.

`arraytp.model.plain.block_inverse` is the plain form. `arraytp.fast.factors` factorises W once per step and block.
Dense blocks and the literal form solve for each row if there are few rows; otherwise the part of W⁻¹ that is
needed is formed. For W⁺, dense blocks have the same choice; convolutions always form it.
"""

from collections.abc import Callable
from functools import partial

from arraytp.backend import Array, array_module, matrix_product
from arraytp.fast.dealing import piece, run_dealt
from arraytp.fast.modules import transposed
from arraytp.fast.parallel import Workspace, even_slices
from arraytp.fast.passes import pool_adjoint, product, row_product_tasks, scaled
from arraytp.model.blocks import Block
from arraytp.model.passes import At, Gradients
from arraytp.ops.excess import is_tall
from arraytp.ops.patches import col2im, coverage
from arraytp.ops.solve import (
    Cholesky,
    Factors,
    PseudoInverse,
    gram_solve,
    inverse_rows,
    right_solve,
    symmetric_solve,
    transposed_rows,
)

OWNER = "inverse"
SLICES = 4
# Measured: slices of 64 rows take a sixth longer.
SOLVE_ROWS = 128


def inverse(workspace: Workspace, at: At, factors: Factors, y: Array) -> Array:
    """Return the input for which the block's output would be y: `At.inverse`."""
    block, x, order = at.block, at.s, len(factors.matrix)
    out = workspace.of((OWNER, at.batch.results, at.n)).array("x", x.shape, x.dtype)
    formed = y.size // len(x) * _count(at) > order**2
    matrix = _for_all_parts(at, "W⁻¹", lambda: first_rows(workspace, factors, order)) if formed else None
    others, f_inverse = _other_windows(workspace, block, x), block.activation.inverse
    assert f_inverse is not None

    def samples(part: slice) -> None:
        z = (f_inverse(y[part]) - at.bias).reshape(-1, order)
        patches = right_solve(factors, z) if matrix is None else matrix_product(z, matrix)
        if block.window is None:
            out[part] = patches.reshape(out[part].shape)
        else:
            out[part] = col2im(patches.reshape(y[part].shape), block.window)
            out[part] -= others * x[part]

    count = SLICES if workspace.backend.on_host else 1
    parts = _row_slices(workspace, len(x)) if block.window is None else even_slices(len(x), count)
    workspace.run([partial(samples, part) for part in _alone(workspace) or parts])
    return out


def backward_through_inverse(
    workspace: Workspace, at: At, ds: Array, factors: Factors, scale: float | Array | None
) -> Gradients:
    """Return dW, db and (D ⊙ ds) W⁻¹: `At.backward` with W⁻¹ in place of Wᵀ.

    Auxiliary units have ds = 0, so only the rows of W⁻¹ that belong to the units handed on are needed.
    """
    block, x, units = at.block, at.s, at.block.next_shape[-1]
    if block.window is not None or _count(at) >= units:

        def through() -> Array:
            rows = first_rows(workspace, factors, units, block.window is not None)
            return array_module(rows).ascontiguousarray(rows.T).reshape(*block.weight_shape[:-1], units)

        return at.backward(ds, _for_all_parts(at, "(W⁻¹)ᵀ", through), scale)
    if isinstance(factors, Cholesky):
        dweight, dbias, dx = at.backward(ds, factors.matrix.reshape(block.weight_shape), scale)
        assert dx is not None
        _solve_rows(workspace, lambda rows: symmetric_solve(factors, rows), dx.reshape(len(x), -1))
        return dweight, dbias, dx
    dweight, dbias, _ = at.backward(ds, None, scale)
    dz = _dz(workspace, at, ds, scale)
    _solve_rows(workspace, lambda rows: right_solve(factors, rows), dz)
    return dweight, dbias, dz.reshape(x.shape)


def backward_through_pseudo_inverse(
    workspace: Workspace, at: At, ds: Array, inverse: PseudoInverse, scale: float | Array | None
) -> Gradients:
    """Return dW, db and (D ⊙ unpool ds) W⁺: `At.backward` with W⁺ in place of Wᵀ."""
    if is_formed(at, inverse):
        through = _for_all_parts(at, "(W⁺)ᵀ", lambda: transposed_inverse(workspace, at.block, inverse))
        return at.backward(ds, through, scale)
    dweight, dbias, _ = at.backward(ds, None, scale)
    return dweight, dbias, _solved(workspace, at, _dz(workspace, at, ds, scale), inverse)


def carry(workspace: Workspace, at: At, d: Array, inverse: PseudoInverse) -> Array:
    """Return (unpool d) W⁺, of s^n's shape: `At.carry`."""
    block, d = at.block, d.reshape(at.output.shape)

    def unpooled(part: slice, out: Array) -> None:
        out[...] = pool_adjoint(block, d[part], None if at.index is None else at.index[part], workspace.scratch)

    if is_formed(at, inverse):
        through = _for_all_parts(at, "(W⁺)ᵀ", lambda: transposed_inverse(workspace, block, inverse))
        return transposed(workspace, at, through, unpooled)
    own = workspace.of((OWNER, at.batch.results, at.n)).array("dz", d.shape, d.dtype)
    own[...] = d
    return _solved(workspace, at, own, inverse)


def _for_all_parts(at: At, name: str, form: Callable[[], Array]) -> Array:
    """Return what `form` computes from θ alone; several parts of a batch, each computed alone, share one copy."""
    if len(at.batch.every) == 1:
        return form()
    # A copy, since the next block's takes the same memory.
    formed: Array = at.batch.once((name, at.n), lambda _: form().copy())
    return formed


def is_formed(at: At, inverse: PseudoInverse) -> bool:
    """Tell whether W⁺ is formed: for convolutions, and if forming it solves for no more rows than there are samples."""
    return at.block.window is not None or _count(at) >= max(inverse.matrix.shape)


def _count(at: At) -> int:
    """Return the number of samples that decides: that of the pass, or of all ranks if parts are computed together."""
    part = at.batch.part
    return len(at.batch) if part is not None and part.together else len(at.s)


def _solved(workspace: Workspace, at: At, dz: Array, inverse: PseudoInverse) -> Array:
    """Return dz W⁺ of a dense block by solving for its rows; dz may be overwritten."""
    matrix, x = inverse.matrix, at.s
    dx = workspace.of((OWNER, at.batch.results, at.n)).array("ds", (len(x), len(matrix)), x.dtype)

    def solve(rows: Array) -> Array:
        return gram_solve(inverse, rows)

    if is_tall(matrix):
        _solve_rows(workspace, solve, dz)
    if workspace.part_rows:
        workspace.run(row_product_tasks(workspace.part_rows, dz, matrix.T, dx))
    else:
        product(workspace, dz, matrix.T, dx)
    if not is_tall(matrix):
        _solve_rows(workspace, solve, dx)
    return dx.reshape(x.shape)


def transposed_inverse(workspace: Workspace, block: Block, inverse: PseudoInverse) -> Array:
    """Return (W⁺)ᵀ, of the block's weight_shape."""
    matrix = inverse.matrix
    rows = workspace.of(OWNER).array("transposed", (max(matrix.shape), min(matrix.shape)), matrix.dtype)

    def task(part: slice) -> None:
        rows[part] = transposed_rows(inverse, part)

    _form(workspace, rows, task, block.window is not None)
    formed = rows if is_tall(matrix) else array_module(rows).ascontiguousarray(rows.T)
    return formed.reshape(block.weight_shape)


def _dz(workspace: Workspace, at: At, ds: Array, scale: float | Array | None) -> Array:
    """Return D ⊙ (scale · ds) of a dense block, of shape (B, out), 0 for auxiliary units."""
    units, output = at.block.next_shape[-1], at.output
    dz = workspace.of((OWNER, at.batch.results, at.n)).array("dz", output.shape, output.dtype)
    dz[:, units:] = 0
    ds = ds.reshape(len(output), units)
    ds = ds if scale is None else scaled(ds, scale, dz[:, :units])
    at.block.activation.backward(ds, output[:, :units], out=dz[:, :units])
    return dz


def first_rows(workspace: Workspace, factors: Factors, count: int, dealt: bool = False) -> Array:
    """Return the first `count` rows of W⁻¹, of shape (count, n): those of the first `count` units of the output.

    `dealt` lets the ranks divide the work, which is right only where every rank calls this.
    """
    rows = workspace.of(OWNER).array("rows", (count, len(factors.matrix)), factors.matrix.dtype)

    def task(part: slice) -> None:
        rows[part] = inverse_rows(factors, part)

    _form(workspace, rows, task, dealt)
    return rows


def _form(workspace: Workspace, rows: Array, task: Callable[[slice], None], dealt: bool) -> None:
    """Let `task` write the rows of an inverse slice by slice, all of them on every rank or dealt out."""
    parts, width = _row_slices(workspace, len(rows)), rows.shape[1]
    pieces = [piece(2 * (part.stop - part.start) * width**2, partial(task, part), rows[part]) for part in parts]
    if dealt:
        run_dealt(workspace, pieces, rows.dtype)
    else:
        workspace.run([each.task for each in pieces])


def _solve_rows(workspace: Workspace, solve: Callable[[Array], Array], rows: Array) -> None:
    """Replace the rows, in place, by the result of `solve`."""

    def task(part: slice) -> None:
        before = rows[part]
        if (after := solve(before)) is not before:
            before[...] = after

    workspace.run([partial(task, part) for part in _alone(workspace) or _row_slices(workspace, len(rows))])


def _alone(workspace: Workspace) -> list[slice]:
    """Return the rows of each non-empty part if several parts of a batch are computed at once, else an empty list."""
    return [rows for rows in workspace.part_rows if rows.start < rows.stop]


def _row_slices(workspace: Workspace, count: int) -> list[slice]:
    return even_slices(count, max(2, count // SOLVE_ROWS) if workspace.backend.on_host else 1)


def _other_windows(workspace: Workspace, block: Block, x: Array) -> Array:
    """Return n_x − 1 for a convolution with n_x windows over each pixel; None for a dense block."""
    window = block.window
    if window is None:
        return None
    return workspace.of(OWNER).cached(("n_x", window, str(x.dtype)), 1, lambda: coverage(window, x) - x.dtype.type(1))
