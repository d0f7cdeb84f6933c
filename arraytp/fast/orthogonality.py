"""Keeping square weight matrices near orthogonal ones (GP paper, 2.1 and 2.3): E = WWᵀ − I and the regulariser.

E is the gradient's larger half and what a rule inverts W through. `GramErrors` computes it once a step for both.
"""

from collections.abc import Iterable, Mapping
from functools import partial

from arraytp.backend import Array
from arraytp.fast.buffers import Buffers
from arraytp.fast.parallel import Task, Workspace, even_slices
from arraytp.model.blocks import Network
from arraytp.model.passes import GramErrors as AnyGramErrors
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import add_excess_product, excess_rows

OWNER = "orthogonality"
# Two tasks for a matrix of order 1024, so that threads end together; measured: 5 % slower than one for E, 2 % for E W.
PART = 512


class GramErrors:
    """E^n = W^n(W^n)ᵀ − I of a network's square matrices, as `arraytp.ops.excess` has it.

    Each is computed when it is first asked for: n³ operations a matrix of order n, half a product, since WWᵀ is
    symmetric. The arrays are valid until those of another network are asked for.

    Parameters
    ----------
    network : Network
        Its weights must stay as they are meanwhile.
    workspace : Workspace
    """

    def __init__(self, network: Network, workspace: Workspace) -> None:
        self._network, self._workspace = network, workspace
        self._computed: dict[int, Array] = {}

    def of(self, positions: Iterable[int]) -> Mapping[int, Array]:
        """Return E of the blocks at these positions."""
        positions = list(positions)
        own = self._workspace.of(OWNER)
        tasks: list[tuple[int, Task]] = []
        for n in positions:
            if n not in self._computed:
                w = as_matrix(self._network.weights[n])
                e = self._computed[n] = own.filled(("E", n), w.shape, w.dtype, 0.0)
                for rows in _parts(len(w), self._workspace):
                    work = len(w) * (rows.stop - rows.start) * (len(w) - rows.start)
                    tasks.append((work, partial(_error_task, w, rows, e)))
        self._workspace.run(_largest_first(tasks))
        return {n: self._computed[n] for n in positions}


def add_orthogonality(
    strength: float, network: Network, weight_gradients: list[Array], errors: AnyGramErrors, workspace: Workspace
) -> None:
    """Add λ·4(WWᵀ − I)W, the gradient of λ‖WWᵀ − I‖², to that of the loss where a matrix W is square (GP paper).

    2n³ operations a matrix of order n besides those of E. λ stands beside g as it is: the authors' values go with the
    loss summed over the batch.

    Parameters
    ----------
    strength : float
        λ.
    network : Network
    weight_gradients : list of arrays of the weights' shapes and dtype, C-contiguous
        Those of square matrices are added to in place, others left.
    errors : GramErrors
        Of the network's present weights.
    workspace : Workspace
    """
    square = [n for n, block in enumerate(network.blocks) if block.is_square]
    tasks: list[tuple[int, Task]] = []
    for n, e in errors.of(square).items():
        w, g = as_matrix(network.weights[n]), as_matrix(weight_gradients[n])
        for columns in _parts(len(w), workspace):
            task = partial(_product_task, 4 * strength, e, w, columns, g)
            tasks.append((len(w) ** 2 * (columns.stop - columns.start), task))
    workspace.run(_largest_first(tasks))


def _parts(order: int, workspace: Workspace) -> list[slice]:
    return even_slices(order, -(-order // PART) if workspace.backend.on_host else 1)


def _largest_first(tasks: list[tuple[int, Task]]) -> list[Task]:
    return [task for _, task in sorted(tasks, key=lambda entry: entry[0], reverse=True)]


def _error_task(w: Array, rows: slice, out: Array, scratch: Buffers) -> None:
    excess_rows(w, rows, out)


def _product_task(factor: float, e: Array, w: Array, columns: slice, g: Array, scratch: Buffers) -> None:
    add_excess_product(factor, e, w, columns, g)
