"""Deal out work that depends on θ alone among the ranks: each runs some of the tasks and receives the others' results.

Tasks are assigned largest first, each to the rank with the least work so far. Dealing out pays if the operations saved
(W in total, W_r on rank r, hence W − max W_r) take longer than exchanging all results, P numbers with the ranks'
segments padded to equal length:

    W − max W_r > `OPERATIONS_PER_NUMBER` · threads of a rank · P

The decision depends on shapes alone, so all ranks reach the same one. A task's result does not depend on the rank that
computes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arraytp.backend import Array
from arraytp.fast.parallel import Task, Workspace

OWNER = "dealing"
# In single precision a thread does 50 GFLOP/s and a number has 4 bytes, in double 25 and 8; 1 GB/s between processes.
OPERATIONS_PER_NUMBER = 200


@dataclass(frozen=True)
class Piece:
    """A task and the arrays that it alone writes.

    Parameters
    ----------
    operations, size : int
        The task's operations, and the number of elements that it writes.
    task : () → object
    arrays : () → sequence of arrays of any strides
        The arrays that the task has written, or on other ranks those that take its results.
    """

    operations: int
    size: int
    task: Task
    arrays: Callable[[], Sequence[Array]]


def piece(operations: int, task: Task, out: Array) -> Piece:
    """Return the piece of a task that writes one array."""
    return Piece(operations, out.size, task, lambda: [out])


def run_dealt(workspace: Workspace, pieces: Sequence[Piece], dtype: Any) -> None:
    """Run all tasks, dealt out among the ranks where that is faster; `dtype` is that of most arrays.

    All ranks must call this together, with tasks of the same sizes.
    """
    pieces, ranks = sorted(pieces, key=lambda each: each.operations, reverse=True), workspace.ranks
    hands = deal(pieces, ranks.size)
    width = max(sum(each.size for each in hand) for hand in hands)
    if not _deals(workspace) or not pays(hands, workspace.rank_threads * ranks.size * width):
        workspace.run([each.task for each in pieces])
        return
    segments = workspace.of(OWNER).array("segments", (ranks.size, width), dtype)
    workspace.run([each.task for each in hands[ranks.rank]])
    for array, part in _places(hands[ranks.rank], segments[ranks.rank]):
        part.reshape(array.shape)[...] = array
    ranks.exchange(segments)
    for rank, hand in enumerate(hands):
        for array, part in _places(hand, segments[rank]) if rank != ranks.rank else ():
            array[...] = part.reshape(array.shape)


def agreed_numbers(workspace: Workspace, numbers: list[float], operations: int, size: int) -> list[float]:
    """Return the numbers by which all ranks choose their tasks: rank 0's, if the tasks could be dealt out.

    Each rank computes them itself, and a different kind of processor may round them to the other side of a threshold.
    `operations` is an upper bound on the operations of all tasks, `size` a lower bound on the numbers that they write.
    """
    if not _deals(workspace) or operations <= OPERATIONS_PER_NUMBER * workspace.rank_threads * size:
        return numbers
    first: list[float] = workspace.ranks.broadcast(numbers)
    return first


def _deals(workspace: Workspace) -> bool:
    return workspace.ranks.size > 1 and workspace.backend.on_host and not workspace.busy


def deal(pieces: Sequence[Piece], ranks: int) -> list[list[Piece]]:
    """Give each piece to the rank with the least work so far; ties go to the first rank."""
    hands: list[list[Piece]] = [[] for _ in range(ranks)]
    for each in pieces:
        min(hands, key=_operations).append(each)
    return hands


def pays(hands: Sequence[Sequence[Piece]], threads_times_numbers: float) -> bool:
    """Tell whether dealing out saves more time than exchanging the results takes."""
    loads = [*map(_operations, hands)]
    return sum(loads) - max(loads) > OPERATIONS_PER_NUMBER * threads_times_numbers


def _operations(hand: Sequence[Piece]) -> int:
    return sum(each.operations for each in hand)


def _places(hand: Sequence[Piece], segment: Array) -> list[tuple[Array, Array]]:
    """Return the arrays of a rank's pieces, each with its place in the rank's segment."""
    arrays, end, places = [array for each in hand for array in each.arrays()], 0, []
    for array in arrays:
        places.append((array, segment[end : end + array.size]))
        end += array.size
    return places
