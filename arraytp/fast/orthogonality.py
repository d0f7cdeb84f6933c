"""Keep weight matrices nearly semi-orthogonal (GP paper, 2.1 and 2.3): E and the regulariser.

E = WWᵀ − I, or WᵀW − I for a matrix with more rows than columns (`arraytp.ops.excess`), is used in the regulariser's
gradient and by rules that invert W. `GramErrors` computes it once per step for both.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from arraytp.backend import Array
from arraytp.fast.dealing import Piece, piece, run_dealt
from arraytp.fast.parallel import Workspace, even_slices
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import GramErrors as AnyGramErrors
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import add_excess_product, excess_rows, is_tall
from arraytp.options import SGD, Adam, Regularised

OWNER = "orthogonality"
# Two tasks at order 1024, so that threads end together; measured: 5 % slower than one task for E, 2 % for E W.
PART = 512


class GramErrors:
    """E^n of a network's matrices, as defined in `arraytp.ops.excess`.

    Each is computed when it is first asked for; on the host by half a product, since E is symmetric. The arrays are
    valid until those of another network are asked for.

    Parameters
    ----------
    workspace : Workspace
    network : Network
        Its weights must not change meanwhile.
    computed : map of n to array, optional
        The E^n that are computed already.
    """

    def __init__(self, workspace: Workspace, network: Network, computed: Mapping[int, Array] | None = None) -> None:
        self._network, self._workspace = network, workspace
        self._computed: dict[int, Array] = {**(computed or {})}

    def of(self, positions: Iterable[int]) -> Mapping[int, Array]:
        """Return E of the blocks at these positions."""
        positions = list(positions)
        own = self._workspace.of(OWNER)
        pieces: list[Piece] = []
        for n in positions:
            if n not in self._computed:
                w = as_matrix(self._network.weights[n])
                order = min(w.shape)
                e = self._computed[n] = own.filled(("E", n), (order, order), w.dtype, 0.0)
                for rows in _parts(order, self._workspace):
                    width = (rows.stop - rows.start) + 2 * (order - rows.stop)
                    work = max(w.shape) * (rows.stop - rows.start) * width
                    pieces.append(piece(work, partial(excess_rows, w, rows, e), e[rows, rows.start :]))
        run_dealt(self._workspace, pieces, self._network.weights[0].dtype)
        return {n: self._computed[n] for n in positions}


def regularised(blocks: Sequence[Block], on: Regularised) -> list[int]:
    """Return the blocks that the regulariser acts on: those with a square W, or all but the first."""
    if on == "all-but-first":
        return list(range(1, len(blocks)))
    return [n for n, block in enumerate(blocks) if block.is_square]


def strength_at(optimizer: SGD | Adam, step: int) -> float:
    """Return the λ of a step, counted from 0: with `orthogonality_every` n, nλ at every n-th step and 0 between."""
    every = optimizer.orthogonality_every
    return 0.0 if (step + 1) % every else every * optimizer.orthogonality


def add_orthogonality(
    strength: float,
    network: Network,
    weight_gradients: list[Array],
    errors: AnyGramErrors,
    workspace: Workspace,
    on: Regularised = "square",
) -> None:
    """Add λ·4 E W, or λ·4 W E, the gradient of λ‖E‖², to that of the loss (GP paper; there W is square).

    E = WWᵀ − I, or WᵀW − I if W has more rows than columns. This takes 2 K O min(K, O) operations per matrix of K rows
    and O columns, besides those of E. λ is not scaled to the loss's reduction: the authors' values are for the loss
    summed over the batch.

    Parameters
    ----------
    strength : float
        λ.
    network : Network
    weight_gradients : list of arrays of the weights' shapes and dtype, C-contiguous
        Those of the regularised blocks are changed in place, the others are left as they are.
    errors : GramErrors
        E of the network's present weights.
    workspace : Workspace
    on : {"square", "all-but-first"}
        See `regularised`.
    """
    pieces: list[Piece] = []
    for n, e in errors.of(regularised(network.blocks, on)).items():
        w, g = as_matrix(network.weights[n]), as_matrix(weight_gradients[n])
        for part in _parts(max(w.shape), workspace):
            task = partial(add_excess_product, 4 * strength, e, w, part, g)
            out = g[part] if is_tall(w) else g[:, part]
            pieces.append(piece(2 * len(e) * out.size, task, out))
    run_dealt(workspace, pieces, network.weights[0].dtype)


def _parts(order: int, workspace: Workspace) -> list[slice]:
    return even_slices(order, -(-order // PART) if workspace.backend.on_host else 1)
