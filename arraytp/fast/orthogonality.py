"""Keeping square weight matrices near orthogonal ones (GP paper, 2.1 and 2.3): E = WWᵀ − I and the regulariser.

E is the gradient's larger half and what a rule inverts W through. A step that needs both computes it once: by
`excess_of`, before the rule, whose updates and the optimiser's step then take it as an argument.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from arraytp.backend import Array
from arraytp.fast.parallel import Buffers, Task, Workspace, even_slices
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import add_excess_product, excess_rows

# Two tasks for a matrix of order 1024, so that threads end together; measured: 5 % slower than one for E, 2 % for E W.
PART = 512
Key = TypeVar("Key", bound=Hashable)


def excess_of(weights: Mapping[Key, Array], workspace: Workspace) -> dict[Key, Array]:
    """Return E = WWᵀ − I, as `arraytp.ops.excess` has it, of square weight matrices.

    n³ operations a matrix of order n: half a product, since WWᵀ is symmetric.

    Parameters
    ----------
    weights : mapping to arrays
        By the position of their block; kernels are (k·k·C, O) matrices.
    workspace : Workspace
        Holds the result until the next call for these positions.
    """
    found: dict[Key, Array] = {}
    tasks: list[tuple[int, Task]] = []
    for n, weight in weights.items():
        w = as_matrix(weight)
        found[n] = workspace.shared.filled(("excess", n), w.shape, w.dtype, 0.0)
        for rows in _parts(len(w), workspace):
            work = len(w) * (rows.stop - rows.start) * (len(w) - rows.start)
            tasks.append((work, partial(_excess_task, w, rows, found[n])))
    workspace.run(_largest_first(tasks))
    return found


def add_orthogonality(
    strength: float,
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    workspace: Workspace,
    excess: Mapping[int, Array] | None = None,
) -> None:
    """Add λ·4(WWᵀ − I)W, the gradient of λ‖WWᵀ − I‖², to that of the loss where a matrix W is square (GP paper).

    2n³ operations a matrix of order n besides those of E. λ stands beside g as it is: the authors' values go with the
    loss summed over the batch.

    Parameters
    ----------
    strength : float
        λ.
    parameters, gradients : sequences of arrays of the same shapes and dtype, C-contiguous
        Weight and bias of one block after the other. Gradients of square matrices are added to in place, others left.
    workspace : Workspace
    excess : mapping of int to array, optional
        E of these weights by position of the block; computed where it is missing.
    """
    tasks: list[tuple[int, Task]] = []
    square = {p: theta for p, theta in enumerate(parameters) if theta.ndim > 1 and _is_square(theta)}
    given = {p: excess[p // 2] for p in square if excess and p // 2 in excess}
    missing = excess_of({("parameter", p): theta for p, theta in square.items() if p not in given}, workspace)
    for p, theta in square.items():
        w, g = as_matrix(theta), as_matrix(gradients[p])
        e = given[p] if p in given else missing[("parameter", p)]
        for columns in _parts(len(w), workspace):
            task = partial(_product_task, 4 * strength, e, w, columns, g)
            tasks.append((len(w) ** 2 * (columns.stop - columns.start), task))
    workspace.run(_largest_first(tasks))


def _is_square(theta: Array) -> bool:
    rows, columns = as_matrix(theta).shape
    return bool(rows == columns)


def _parts(order: int, workspace: Workspace) -> list[slice]:
    return even_slices(order, -(-order // PART) if workspace.backend.on_host else 1)


def _largest_first(tasks: list[tuple[int, Task]]) -> list[Task]:
    return [task for _, task in sorted(tasks, key=lambda entry: entry[0], reverse=True)]


def _excess_task(w: Array, rows: slice, out: Array, scratch: Buffers) -> None:
    excess_rows(w, rows, out)


def _product_task(factor: float, excess: Array, w: Array, columns: slice, g: Array, scratch: Buffers) -> None:
    add_excess_product(factor, excess, w, columns, g)
