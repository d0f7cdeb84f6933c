"""Factors of the weights, once per step and block: for W⁻¹ of W or WWᵀ, for W⁺ of the smaller of WWᵀ and WᵀW.

A nearly semi-orthogonal W gets the Cholesky factor of that Gram matrix (W⁻¹ = Wᵀ(WWᵀ)⁻¹); any other gets LU factors,
of W for W⁻¹ and of the Gram matrix for W⁺, and a check of their condition number. `arraytp.fast.inverse` solves with
the factors.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from arraytp.backend import Array
from arraytp.fast.dealing import Piece, agreed_numbers, run_dealt
from arraytp.fast.orthogonality import GramErrors
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Network
from arraytp.model.inverse import GRAM, check_condition
from arraytp.model.passes import Batch, Begun
from arraytp.model.passes import GramErrors as AnyGramErrors
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import excess_norm
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
)

OWNER = "factors"


def inverses(workspace: Workspace, batch: Batch) -> Mapping[int, Factors]:
    """Factorise the weight matrix of every block but the first, one task per block: `Batch.inverses`."""
    return Factorising(workspace, batch.network, batch.gram_errors).finished()


def pseudo_inverses(workspace: Workspace, batch: Batch, ridge: float) -> Mapping[int, PseudoInverse]:
    """Factorise the smaller Gram matrix of every block but the first: `Batch.pseudo_inverses`."""
    return Factorising(workspace, batch.network, batch.gram_errors, ridge).pseudo_inverses()


def begin(workspace: Workspace, network: Network) -> Begun:
    """Launch on a device, for a step about to begin, what the step before it asked for: the new step's `Batch.begun`.

    The host reads the numbers that decide which factors are used, and whether a matrix is refused as ill-conditioned,
    while the device computes what has been launched since.
    """
    asked = dict(workspace.near)
    # Cleared in place: the workspaces that `beside` returned share this dictionary.
    workspace.near.clear()
    if not asked:
        return {}

    def measure() -> tuple[Mapping[int, Array], Mapping[int, Array]]:
        errors = GramErrors(workspace, network).of(range(1, len(network)))
        return errors, {n: excess_norm(e) for n, e in errors.items()}

    computed, norms = workspace.captured("E", network.weights, measure)
    errors = GramErrors(workspace, network, computed)
    begun: Begun = {("gram errors",): lambda: errors}
    for ridge, near in asked.items():
        factorising = Factorising(workspace, network, errors, ridge, (near, norms))
        begun["inverses", ridge] = factorising.finished if ridge is None else factorising.pseudo_inverses
    return begun


class Factorising:
    """Cholesky factors of I + E + rI for nearly semi-orthogonal matrices, LU factors for the others; a task per block.

    The tasks are dealt out among the ranks. On a device the host would have to wait for ‖E‖, which decides between the
    two, and again for the condition numbers. So it guesses the choice, launches everything, reads both at once, and
    factorises again if the guess was wrong.

    Parameters
    ----------
    workspace : Workspace
    network : Network
    errors : GramErrors
        E of the network's weights.
    ridge : float, optional
        r; if given, the smaller Gram matrix plus rI is factorised in place of W.
    begun : pair of maps of n, optional
        The guessed choice, and ‖E‖; on a device only. By default ‖E‖ is computed here, and the guess is the last choice
        for this r, if there is one.
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
        self._finished: Mapping[int, Factors] | None = None
        if begun is None:
            workspace.run([partial(self._measure, n) for n in self._order])
            self._near: Mapping[int, bool] = workspace.near.get(ridge, {})
        else:
            self._near, self._norms = begun[0], {**begun[1]}
        if self._near.keys() == self._errors.keys():
            self._factorise(self._near)
            self._read = workspace.backend.reading([*self._measured(), *self._conditions.values()])

    def finished(self) -> Mapping[int, Factors]:
        """Return the factors by n; raises as `Batch.inverses`. Cached: a step that compares updates asks twice."""
        if self._finished is None:
            self._finished = self._finish()
        return self._finished

    def _finish(self) -> Mapping[int, Factors]:
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
        """Return, by n, whether the matrix is nearly semi-orthogonal."""
        least = sum(e.size for e in self._errors.values())
        agreed = agreed_numbers(self._workspace, norms, sum(map(self._operations, self._order)), least)
        return {n: norm <= NEAR_ORTHOGONAL for n, norm in zip(self._order, agreed, strict=True)}

    def _factorise(self, near: Mapping[int, bool]) -> None:
        """Factorise as `near` says, and estimate the condition numbers of the matrices with LU factors."""
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
        """Return the operations for LU factors, an upper bound for either kind."""
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
