"""Work on θ alone, dealt out among ranks: each does some of the tasks, and gets what the others' tasks wrote.

Largest first, each task goes to the rank that has least to do so far. That pays if the operations saved (W in all, W_r
on rank r, so W − max W_r) take longer than sending all results, P numbers padded to equal segments:

    W − max W_r > `OPERATIONS_PER_NUMBER` · threads of a rank · P

Shapes alone decide, so all ranks decide alike. A task's result does not depend on which rank computes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arraytp.backend import Array
from arraytp.fast.parallel import Task, Workspace

OWNER = "dealing"
# 50 GFLOP/s of a thread in single precision against 4 bytes at 1 GB/s between two processes; 25 against 8 in double.
OPERATIONS_PER_NUMBER = 200


@dataclass(frozen=True)
class Piece:
    """A task and what it alone writes.

    Parameters
    ----------
    operations, size : int
        Of the task, and elements that it writes.
    task : () → object
    arrays : () → sequence of arrays of any strides
        What the task has written, or room for it.
    """

    operations: int
    size: int
    task: Task
    arrays: Callable[[], Sequence[Array]]


def piece(operations: int, task: Task, out: Array) -> Piece:
    """Return the piece of a task that writes one array."""
    return Piece(operations, out.size, task, lambda: [out])


def run_dealt(workspace: Workspace, pieces: Sequence[Piece], dtype: Any) -> None:
    """Do all tasks, on several ranks each some of them where that is faster; `dtype` is that of most arrays.

    All ranks call this together with tasks of the same sizes.
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
    """Return numbers by which all ranks choose between tasks: the first rank's, if such tasks could be dealt out.

    Each has them from its own processor, and those of another kind may round them to the other side of a threshold.
    `operations` are the most that all tasks can have, and `size` the fewest numbers that they write.
    """
    if not _deals(workspace) or operations <= OPERATIONS_PER_NUMBER * workspace.rank_threads * size:
        return numbers
    first: list[float] = workspace.ranks.broadcast(numbers)
    return first


def _deals(workspace: Workspace) -> bool:
    return workspace.ranks.size > 1 and workspace.backend.on_host and not workspace.busy


def deal(pieces: Sequence[Piece], ranks: int) -> list[list[Piece]]:
    """Give each piece to the rank with least to do so far, the first of several."""
    hands: list[list[Piece]] = [[] for _ in range(ranks)]
    for each in pieces:
        min(hands, key=_operations).append(each)
    return hands


def pays(hands: Sequence[Sequence[Piece]], threads_times_numbers: float) -> bool:
    """Tell whether dealing out saves more time than sending the results takes."""
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
