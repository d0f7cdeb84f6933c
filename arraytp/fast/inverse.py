"""Exact inverses of square blocks, G(F(x)) = x (GP paper, Equation 3 and Algorithm 2), and W⁺ of any, by threads.

`arraytp.model.plain.block_inverse` is the plain form. W is factorised once per step and block: near an orthogonal
matrix by Cholesky, W⁻¹ = Wᵀ(WWᵀ)⁻¹, else by LU. Where fewer rows are to be carried through W⁻¹ than it has rows of
interest, they are solved for; else those rows of W⁻¹ are formed and multiplied. W⁺ goes in the same ways by the smaller
of WWᵀ and WᵀW.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from arraytp.backend import Array, array_module, matrix_product
from arraytp.fast.dealing import Piece, agreed_numbers, piece, run_dealt
from arraytp.fast.modules import transposed
from arraytp.fast.orthogonality import GramErrors
from arraytp.fast.parallel import Workspace, even_slices
from arraytp.fast.passes import pool_adjoint, product, scaled
from arraytp.model.blocks import Block, Network
from arraytp.model.inverse import GRAM, check_condition
from arraytp.model.passes import At, Batch, Gradients
from arraytp.model.passes import GramErrors as AnyGramErrors
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import excess_norm, is_tall
from arraytp.ops.patches import col2im, coverage
from arraytp.ops.solve import (
    LU,
    NEAR_ORTHOGONAL,
    Cholesky,
    Factors,
    PseudoInverse,
    cholesky,
    condition,
    factor,
    factor_gram,
    gram_solve,
    inverse_rows,
    right_solve,
    symmetric_solve,
    transposed_rows,
)

OWNER = "inverse"
SLICES = 4
# Measured: 64 rows a slice take a sixth longer.
SOLVE_ROWS = 128


def inverses(workspace: Workspace, batch: Batch) -> Mapping[int, Factors]:
    """Factorise the weight matrix of every block but the first, one task a block: `Batch.inverses`."""
    return Factorising(workspace, batch.network, batch.gram_errors).finished()


def pseudo_inverses(workspace: Workspace, batch: Batch, ridge: float) -> Mapping[int, PseudoInverse]:
    """Factorise the smaller Gram matrix of every block but the first: `Batch.pseudo_inverses`."""
    return Factorising(workspace, batch.network, batch.gram_errors, ridge).pseudo_inverses()


def begin(workspace: Workspace, network: Network) -> dict[object, Callable[[], Any]]:
    """Launch what the step before asked for, on a device: `Batch.begun` of the next.

    The host reads the numbers by which it chooses and refuses while the device computes what was launched meanwhile.
    """
    asked, workspace.near = workspace.near, {}
    if not asked:
        return {}

    def measure() -> tuple[Mapping[int, Array], Mapping[int, Array]]:
        errors = GramErrors(workspace, network).of(range(1, len(network)))
        return errors, {n: excess_norm(e) for n, e in errors.items()}

    computed, norms = workspace.captured("E", network.weights, measure)
    errors = GramErrors(workspace, network, computed)
    begun: dict[object, Callable[[], Any]] = {"gram errors": lambda: errors}
    for ridge, near in asked.items():
        factorising = Factorising(workspace, network, errors, ridge, (near, norms))
        begun["inverses", ridge] = factorising.finished if ridge is None else factorising.pseudo_inverses
    return begun


class Factorising:
    """Cholesky factors of I + E + rI near semi-orthogonal matrices, LU factors of the others, a task a block.

    Ranks deal the tasks out. On a device the host would wait for ‖E‖, which the choice goes by, and again for the
    condition numbers. So it launches all of them by a choice that it takes to be the right one, reads both at once, and
    begins again if it was not.

    Parameters
    ----------
    workspace : Workspace
    network : Network
    errors : GramErrors
        Of it.
    ridge : float, optional
        r: for factors of the smaller Gram matrix in place of those of W.
    begun : pair of maps of n, optional
        The choice to begin with, and ‖E‖; by default the choice is the last one for this r, if there is any. Not on the
        host.
    """

    def __init__(
        self,
        workspace: Workspace,
        network: Network,
        errors: AnyGramErrors,
        ridge: float | None = None,
        begun: tuple[Mapping[int, bool], Mapping[int, Array]] | None = None,
    ) -> None:
        self._workspace, self._network, self._ridge = workspace, network, ridge
        self._own, self._errors = workspace.of((OWNER, ridge)), errors.of(range(1, len(network)))
        self._order = sorted(self._errors, key=lambda n: network.weights[n].size, reverse=True)
        self._norms, self._factors, self._conditions = dict[int, Array](), dict[int, Factors](), dict[int, Array]()
        self._read: Callable[[], list[float]] | None = None
        if begun is None:
            workspace.run([partial(self._measure, n) for n in self._order])
            self._near: Mapping[int, bool] = workspace.near.get(ridge, {})
        else:
            self._near, self._norms = begun[0], {**begun[1]}
        if self._near.keys() == self._errors.keys():
            self._factorise(self._near)
            self._read = workspace.backend.reading([*self._measured(), *self._conditions.values()])

    def finished(self) -> Mapping[int, Factors]:
        """Return the factors by n; raises as `Batch.inverses`."""
        numbers, count = self._workspace.backend.numbers, len(self._order)
        if self._read is None:
            self._factorise(self._choice(numbers(self._measured())))
            found = numbers([*self._conditions.values()])
        else:
            read = self._read()
            chosen, found = self._choice(read[:count]), read[count:]
            if chosen != self._near:
                self._factorise(chosen)
                found = numbers([*self._conditions.values()])
        if not self._workspace.backend.on_host:
            self._workspace.near[self._ridge] = self._near
        what = "the weight matrix" if self._ridge is None else GRAM
        for n, number in sorted(zip(self._conditions, found, strict=True)):
            check_condition(self._network.blocks[n], n, self._network.weights[n].dtype, number, what)
        return {n: self._factors[n] for n in sorted(self._factors)}

    def pseudo_inverses(self) -> Mapping[int, PseudoInverse]:
        """Return W⁺ by n; raises as `Batch.pseudo_inverses`."""
        return {n: PseudoInverse(self._matrix(n), gram) for n, gram in self.finished().items()}

    def _matrix(self, n: int) -> Array:
        return as_matrix(self._network.weights[n])

    def _measure(self, n: int) -> None:
        self._norms[n] = excess_norm(self._errors[n])

    def _measured(self) -> list[Array]:
        return [self._norms[n] for n in self._order]

    def _choice(self, norms: list[float]) -> dict[int, bool]:
        """Return which matrices are near semi-orthogonal ones."""
        least = sum(e.nbytes for e in self._errors.values())
        agreed = agreed_numbers(self._workspace, norms, sum(map(self._operations, self._order)), least)
        return {n: norm <= NEAR_ORTHOGONAL for n, norm in zip(self._order, agreed, strict=True)}

    def _factorise(self, near: Mapping[int, bool]) -> None:
        """Factorise by a choice, and estimate the condition numbers of what has LU factors."""
        self._near, self._factors, self._conditions = near, {}, {}
        run_dealt(self._workspace, [self._task(n) for n in self._order], self._network.weights[0].dtype)
        far = {n: held for n in self._order if isinstance(held := self._factors[n], LU)}
        arrays = [array for held in far.values() for array in (held.lu, held.pivots, held.norm)]

        def estimate() -> Mapping[int, Array]:
            found = dict[int, Array]()
            self._workspace.run([partial(_estimate, n, held, found) for n, held in far.items()])
            return found

        self._conditions = self._workspace.captured("condition numbers", arrays, estimate) if far else {}

    def _factorise_one(self, n: int) -> None:
        w, ridge, e = self._matrix(n), self._ridge, self._errors[n]
        if self._near[n]:
            self._factors[n] = cholesky(w, e, self._triangle(n), ridge or 0)
            return

        def room(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
            return self._own.array((name, n), shape, dtype)

        self._factors[n] = factor(w, room) if ridge is None else factor_gram(w, ridge, room)

    def _triangle(self, n: int) -> Array:
        return self._own.array(("triangle", n), self._errors[n].shape, self._errors[n].dtype)

    def _arrays(self, n: int) -> list[Array]:
        of_gram = self._ridge is not None
        if n not in self._factors:
            w = self._matrix(n)
            self._factors[n] = Cholesky(w, self._triangle(n)) if self._near[n] else _room_for_lu(w, of_gram)
        held = self._factors[n]
        if isinstance(held, Cholesky):
            return [held.triangle]
        return [held.lu.T, held.pivots, held.norm, *([held.matrix] if of_gram else [])]

    def _operations(self, n: int) -> int:
        """Return the operations for LU factors, the most that there can be."""
        side = len(self._errors[n])
        longest: int = max(self._matrix(n).shape)
        return 2 * side**3 // 3 + (self._ridge is not None) * 2 * side**2 * longest

    def _task(self, n: int) -> Piece:
        side, factorised, written = len(self._errors[n]), partial(self._factorise_one, n), partial(self._arrays, n)
        if self._near[n]:
            return Piece(side**3 // 3, side**2, factorised, written)
        size = side**2 * (1 + (self._ridge is not None)) + side + 1
        return Piece(self._operations(n), size, factorised, written)


def _estimate(n: int, factors: LU, found: dict[int, Array]) -> None:
    found[n] = condition(factors)


def _room_for_lu(w: Array, of_gram: bool) -> LU:
    """Return LU factors of W, or of its smaller Gram matrix, to be filled in."""
    shape, dtype = (min(w.shape), min(w.shape)), w.dtype
    matrix = np.empty(shape, dtype) if of_gram else w
    return LU(matrix, np.empty(shape, dtype).T, np.empty(shape[0], np.int32), np.empty((), dtype))


def inverse(workspace: Workspace, at: At, factors: Factors, y: Array) -> Array:
    """Return the input with which the block's output would be y: `At.inverse`."""
    block, x, order = at.block, at.s, len(factors.matrix)
    out = workspace.of((OWNER, at.batch.results, at.n)).array("x", x.shape, x.dtype)
    formed = y.size // order > order
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
    workspace.run([partial(samples, part) for part in parts])
    return out


def backward_through_inverse(
    workspace: Workspace, at: At, ds: Array, factors: Factors, scale: float | Array | None
) -> Gradients:
    """Return dW, db and (D ⊙ ds) W⁻¹: `At.backward` with W⁻¹ in place of Wᵀ.

    Auxiliary units have ds = 0, so that only the rows of W⁻¹ count that belong to units that are handed on.
    """
    block, x, units = at.block, at.s, at.block.next_shape[-1]
    if block.window is not None or len(x) >= units:

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
    """Return what depends on θ alone; for several parts of a batch, which are computed alone, formed only once."""
    if len(at.batch.every) == 1:
        return form()
    # The next block's takes the same memory.
    formed: Array = at.batch.once((name, at.n), lambda _: form().copy())
    return formed


def is_formed(at: At, inverse: PseudoInverse) -> bool:
    """Tell whether W⁺ is formed: for convolutions, and for as many samples as W⁺ has rows to be solved for."""
    return at.block.window is not None or len(at.s) >= max(inverse.matrix.shape)


def _solved(workspace: Workspace, at: At, dz: Array, inverse: PseudoInverse) -> Array:
    """Return dz W⁺ of a dense block by solving for its rows; dz may be overwritten."""
    matrix, x = inverse.matrix, at.s
    dx = workspace.of((OWNER, at.batch.results, at.n)).array("ds", (len(x), len(matrix)), x.dtype)

    def solve(rows: Array) -> Array:
        return gram_solve(inverse, rows)

    if is_tall(matrix):
        _solve_rows(workspace, solve, dz)
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
    """Return the first `count` rows of W⁻¹, of shape (count, n): what `count` units of the output say of the input.

    `dealt` if all ranks form them: whether a rank does may depend on how many samples it has.
    """
    rows = workspace.of(OWNER).array("rows", (count, len(factors.matrix)), factors.matrix.dtype)

    def task(part: slice) -> None:
        rows[part] = inverse_rows(factors, part)

    _form(workspace, rows, task, dealt)
    return rows


def _form(workspace: Workspace, rows: Array, task: Callable[[slice], None], dealt: bool) -> None:
    """Let `task` write slices of the rows of an inverse, on each rank or dealt out."""
    parts, width = _row_slices(workspace, len(rows)), rows.shape[1]
    pieces = [piece(2 * (part.stop - part.start) * width**2, partial(task, part), rows[part]) for part in parts]
    if dealt:
        run_dealt(workspace, pieces, rows.dtype)
    else:
        workspace.run([each.task for each in pieces])


def _solve_rows(workspace: Workspace, solve: Callable[[Array], Array], rows: Array) -> None:
    """Replace the rows by what `solve` makes of them."""

    def task(part: slice) -> None:
        before = rows[part]
        if (after := solve(before)) is not before:
            before[...] = after

    workspace.run([partial(task, part) for part in _row_slices(workspace, len(rows))])


def _row_slices(workspace: Workspace, count: int) -> list[slice]:
    return even_slices(count, max(2, count // SOLVE_ROWS) if workspace.backend.on_host else 1)


def _other_windows(workspace: Workspace, block: Block, x: Array) -> Array:
    """Return n_x − 1 of a convolution: windows over each pixel besides the first."""
    window = block.window
    if window is None:
        return None
    return workspace.of(OWNER).cached(("n_x", window, str(x.dtype)), 1, lambda: coverage(window, x) - x.dtype.type(1))
