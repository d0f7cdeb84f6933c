"""Parts of a training step as CUDA graphs: the host launches one graph instead of a hundred kernels.

A graph repeats the launches of the run that it was captured from: the same kernels on the same memory with the same
scalar arguments. So everything that differs from step to step must be written to fixed memory first: images, labels,
and the numbers of `arraytp.fast.parallel.Workspace.number`. Kernels, order and results are those of a run without
graphs, bit for bit.

A part is one graph, or several on several ranks, where a graph ends at each sum over ranks, which is not captured.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from arraytp.backend import Array, first_line
from arraytp.fast.parallel import Workspace
from arraytp.ops.solve import Cholesky, Factors, PseudoInverse

R = TypeVar("R")
Launches = list[Callable[[], object]]
# For how many sets of arrays graphs are kept; more occur only if the arrays have new addresses in every step.
MOST = 64


@dataclass
class _Known:
    """A part that has run with some arrays: how many buffers there were then, launches that repeat it, its result."""

    made: int
    launches: Launches | None = None
    returned: Any = None


class Graphs:
    """The captured parts of an experiment's steps.

    Parameters
    ----------
    workspace : Workspace
        Holds the buffers that the parts compute in.
    on : bool
        Whether to capture anything; on a device only.

    Attributes
    ----------
    refused : map of str to str
        Parts whose capture failed, and why.
    """

    def __init__(self, workspace: Workspace, on: bool) -> None:
        self.on, self.refused, self._said = on, dict[str, str](), set[str]()
        self._workspace, self._known = workspace, dict[Any, _Known]()
        # Launches of the part that is being captured.
        self._launches: Launches | None = None
        if on:
            workspace.captured, workspace.between = self.run, self.between
            xp = workspace.backend.xp
            # The legacy stream cannot be captured, and a stream that synchronises with it would end a capture.
            self._stream = xp.cuda.Stream(non_blocking=True)

    def takes(self, part: str) -> bool:
        """Tell whether a part is captured."""
        return self.on and part not in self.refused

    def news(self) -> list[str]:
        """Return a message for each part whose capture failed, unless an earlier call has returned it."""
        fresh = [part for part in self.refused if self.on and part not in self._said]
        self._said.update(fresh)
        return [f"{part}: not captured as a CUDA graph: {self.refused[part]}" for part in fresh]

    def run(self, part: str, arrays: Sequence[Array], work: Callable[[], R], samples: Hashable = None) -> R:
        """Return what `work` returns; it runs the first time, is captured the second, and is launched from then on.

        A part within a part that is being captured is captured with it.

        Parameters
        ----------
        part : str
            Name of the part.
        arrays : sequence of arrays
            Those that `work` reads and writes besides the workspace's buffers. Every set of arrays has its own graph.
        work : () → object
            Launches kernels and changes nothing on the host but the workspace. A graph returns the same arrays with
            each launch. If a capture fails, the workspace's buffers are dropped, since nothing was computed into them,
            and `work` is called again.
        samples : hashable, optional
            Which samples of the batch `work` computes with, if not all: on several ranks its `arraytp.ranks.Part`.
            Every value has its own graph.
        """
        if self._launches is not None or not self.takes(part):
            return work()
        key = part, samples, *((array.data.ptr, array.shape) for array in arrays)
        known, made = self._known.get(key), self._workspace.made
        if known is None or known.made != made:
            # A buffer that has grown has new memory, which a graph captured before would not use.
            returned = work()
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[key] = _Known(self._workspace.made)
            return returned
        launches = known.launches or self._capture(part, known, work)
        if launches is None:
            del self._known[key]
            self._workspace.forget()
            return work()
        for launch in launches:
            launch()
        return known.returned  # type: ignore[no-any-return]

    def between(self, work: Callable[[], object]) -> None:
        """Run work that no graph can capture; during a capture, end the graph, queue the work, begin a new graph."""
        if self._launches is None:
            work()
            return
        self._launches += [self._stream.end_capture().launch, work]
        self._stream.begin_capture()

    def _capture(self, part: str, known: _Known, work: Callable[[], object]) -> Launches | None:
        """Capture a part and return its launches; None if that failed."""
        backend = self._workspace.backend
        with self._stream, backend.xp.cuda.using_allocator(backend.graph_pool(part).malloc):
            self._stream.begin_capture()
            self._launches = launches = Launches()
            try:
                known.returned = work()
            except Exception as error:
                self.refused[part] = first_line(error)
            finally:
                self._launches = None
            try:
                launches.append(self._stream.end_capture().launch)
            except Exception as error:
                self.refused.setdefault(part, first_line(error))
        known.launches = None if part in self.refused else launches
        return known.launches


def arrays_of(factors: Factors | PseudoInverse) -> list[Array]:
    """Return the arrays that solving with these factors reads; those of the network may be left out."""
    if isinstance(factors, PseudoInverse):
        return arrays_of(factors.gram)
    return [factors.triangle] if isinstance(factors, Cholesky) else [factors.matrix, factors.lu, factors.pivots]
