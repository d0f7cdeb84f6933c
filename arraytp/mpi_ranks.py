"""Ranks that communicate by MPI, and the turns that groups of them take."""

import atexit
import math
import operator
import os
import pickle
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from arraytp.errors import FailedElsewhereError
from arraytp.ranks import Ranks, pairwise

if TYPE_CHECKING:
    # The command line imports this module before it needs NumPy.
    from arraytp.backend import Array

# Seconds within which ranks that end by the same error learn of each other, and between two polls.
PATIENCE, PAUSE = 5.0, 0.02
# Seconds for which a rank that hears of a failure goes on waiting for an operation, which the failed rank may have
# joined before it failed.
_GRACE = 0.5
# How many of the last collective operations are remembered. Ranks may be ahead of others by several: a broadcast does
# not wait for its receivers, and a rank that sums while it computes begins a sum for each part of a step. A rank that
# has failed can take part only in remembered operations, and the others would wait for it for ever in any other, so
# this is many times what a step of the deepest network needs.
_REMEMBERED = 4096


class Mpi:
    """Ranks that communicate by MPI, given the module mpi4py.MPI and a communicator."""

    sums_on_device = False

    def __init__(self, mpi: Any, communicator: Any) -> None:
        self._mpi, self._communicator = mpi, communicator
        # Errors have a communicator of their own, so that no sum that others wait for can intercept them.
        self._errors = communicator.Dup()
        # Collective operations: how many have begun, the last of them, and those that have not completed.
        self._begun, self._last, self._open = 0, deque[Any](maxlen=_REMEMBERED), list[Any]()
        self._cried = array("b", [0])
        self._cry = self._errors.Irecv(self._cried)
        atexit.register(self._deafen)
        self.rank, self.size = communicator.rank, communicator.size
        cores = os.uname().nodename, sorted(os.sched_getaffinity(0))
        # How many ranks run on the same cores.
        self.sharing = self.gather(cores).count(cores)

    def sum(self, buffer: "Array", in_order: bool = False) -> None:
        """See `Ranks.sum`."""
        if in_order:
            self._sum_in_order(buffer)
        else:
            self.begin_sum(buffer)()

    def begin_sum(self, buffer: "Array") -> Callable[[], None]:
        """See `Ranks.begin_sum`."""
        return partial(self._wait, self._begin("Iallreduce", self._mpi.IN_PLACE, buffer))

    def _sum_in_order(self, buffer: "Array") -> None:
        """Give each rank its segment of all buffers, let it add these up, and gather the sums."""
        segments = buffer.copy().reshape(self.size, -1)
        self._wait(self._begin("Ialltoall", buffer, segments))
        self._wait(self._begin("Iallgather", pairwise(segments), buffer))

    def exchange(self, segments: "Array") -> None:
        """See `Ranks.exchange`."""
        self._wait(self._begin("Iallgather", self._mpi.IN_PLACE, segments))

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        own, lengths = pickle.dumps(value), array("q", [0] * self.size)
        self._wait(self._begin("Iallgather", array("q", [len(own)]), lengths))
        longest = max(lengths)
        everyone = bytearray(self.size * longest)
        self._wait(self._begin("Iallgather", own.ljust(longest), everyone))
        return [pickle.loads(everyone[rank * longest : (rank + 1) * longest]) for rank in range(self.size)]

    def broadcast(self, value: Any) -> Any:
        """See `Ranks.broadcast`."""
        own = bytearray(pickle.dumps(value) if self.rank == 0 else b"")
        length = array("q", [len(own)])
        self._wait(self._begin("Ibcast", length))
        own = own or bytearray(length[0])
        self._wait(self._begin("Ibcast", own))
        return pickle.loads(own)

    def _begin(self, operation: str, *buffers: Any) -> Any:
        """Begin a collective operation without waiting for it."""
        views = (None if each is self._mpi.IN_PLACE else memoryview(each) for each in buffers)
        self._last.append((operation, [None if view is None else (view.format, view.nbytes) for view in views]))
        self._begun += 1
        for request, _ in self._open:
            # MPI makes progress only when called.
            request.Test()
        # mpi4py does not keep the buffers alive.
        self._open.append((getattr(self._communicator, operation)(*buffers), buffers))
        return self._open[-1]

    def _wait(self, begun: Any) -> None:
        """Wait for a collective operation; `FailedElsewhereError` if another rank reports that it has failed."""
        heard = math.inf
        while not begun[0].Test():
            if self._cry.Test():
                heard = min(heard, time.monotonic())
                if time.monotonic() - heard > _GRACE:
                    raise FailedElsewhereError("another rank has failed")
            # Ranks may share cores; MPI's own waiting yields, too.
            os.sched_yield()
        self._open = [each for each in self._open if each is not begun]

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """See `Ranks.problems`."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        cry = array("b", [1])
        crying = [self._errors.Isend(cry, rank) for rank in others] if own is not None else []
        if not self.all_end(PATIENCE if limited else math.inf):
            return []
        everyone = self._errors.allgather((own, self._begun, [*self._last]))
        for rank in others:
            if everyone[rank][0] is not None:
                self._cry.Wait()
                self._cry = self._errors.Irecv(self._cried)
        # MPI cannot cancel operations that others have begun, so take part in them with blank buffers.
        _, furthest, last = max(everyone, key=operator.itemgetter(1))
        for operation, buffers in last[len(last) - (furthest - self._begun) :]:
            blank = (array(each[0], bytes(each[1])) if each else self._mpi.IN_PLACE for each in buffers)
            self._begin(operation, *blank)
        self._mpi.Request.Waitall([*crying, *(request for request, _ in self._open)])
        self._open.clear()
        return [problem for problem, *_ in everyone]

    def _deafen(self) -> None:
        """Cancel the pending receive before MPI is finalised."""
        if self._cry != self._mpi.REQUEST_NULL:
            self._cry.Cancel()
            self._cry.Wait()

    def all_end(self, patience: float = PATIENCE) -> bool:
        """Tell whether all ranks call this within `patience` seconds."""
        request, deadline = self._errors.Ibarrier(), time.monotonic() + patience
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE)
        return True

    def split(self, size: int) -> "Mpi":
        """Return the group of `size` ranks that this one belongs to."""
        return Mpi(self._mpi, self._communicator.Split(self.rank // size, self.rank))

    def turns(self, group: Ranks) -> "Turns":
        """Return the turns that groups of these ranks take; all ranks call this together."""
        return Turns(self._mpi, self._communicator, group)

    def abort(self, status: int) -> None:
        """End all ranks."""
        self._mpi.COMM_WORLD.Abort(status)


class Turns:
    """Numbers from 0 on, each for the group of ranks that asks first: a counter in the first rank's memory.

    A group that ends by a signal tells the others: every rank sends one word, the signal's number or 0, to the first
    rank of each other group. The communicator spans all groups; `group` is this rank's.
    """

    def __init__(self, mpi: Any, communicator: Any, group: Ranks) -> None:
        self._mpi, self._communicator, self._group = mpi, communicator, group
        item = array("q", [0]).itemsize
        self._window = mpi.Win.Allocate(item if communicator.rank == 0 else 0, item, comm=communicator)
        if communicator.rank == 0:
            self._window.Lock(0)
            self._window.Put(array("q", [0]), 0)
            self._window.Unlock(0)
        others = [rank for rank in range(communicator.size) if rank // group.size != communicator.rank // group.size]
        self._firsts = [rank for rank in others if rank % group.size == 0]
        heard_from = others if group.rank == 0 else []
        self._heard, self._word = memoryview(array("q", [0] * len(heard_from))), array("q", [0])
        self._receiving = [communicator.Irecv(self._heard[n : n + 1], rank) for n, rank in enumerate(heard_from)]
        self._sending: list[Any] | None = None
        communicator.Barrier()

    def below(self, count: int) -> Iterator[int]:
        """Yield the numbers below `count` that fall to this group."""
        while (turn := int(self._group.broadcast(self._add(1)))) < count:
            yield turn

    def heard(self) -> int:
        """Return the number of the signal that ended another group, 0 if none has."""
        self._mpi.Request.Testsome(self._receiving)
        return max(self._heard, default=0)

    def end(self, number: int) -> None:
        """End all turns because of a signal, and tell the other groups."""
        self._add(1 << 32)
        self._tell(number)

    def close(self, stopped: Callable[[], int]) -> None:
        """Wait for all groups, and end them if `stopped` returns the number of a signal."""
        closed = self._communicator.Ibarrier()
        while not closed.Test():
            if self._sending is None and (number := stopped()):
                self.end(number)
            # MPI's own waiting would take a core from ranks that still compute.
            time.sleep(PAUSE)
        self._tell(0)
        self._mpi.Request.Waitall([*self._receiving, *(self._sending or [])])
        self._window.Free()

    def _tell(self, number: int) -> None:
        """Send the word, once."""
        if self._sending is None:
            self._word[0] = number
            self._sending = [self._communicator.Isend(self._word, rank) for rank in self._firsts]

    def _add(self, number: int) -> int:
        """Add to the counter on behalf of the group; return what it was before."""
        before = array("q", [0])
        if self._group.rank == 0:
            self._window.Lock(0)
            self._window.Fetch_and_op(array("q", [number]), before, 0, 0, self._mpi.SUM)
            self._window.Unlock(0)
        return int(before[0])
