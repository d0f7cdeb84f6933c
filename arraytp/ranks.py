"""Processes that share a run: who is who, sums over all of them, and ending together. One process needs none of it.

Under a launcher (mpiexec, srun) they speak by MPI; without one nothing of MPI is imported. A step on R ranks is the
step on one: each rank has a part of every global batch, and what is summed over samples is summed over ranks.
"""

import atexit
import functools
import importlib
import math
import operator
import os
import pickle
import sys
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from arraytp.errors import FailedElsewhereError, UserError, UserErrors

# By launcher: the variables that hold the number of processes, and which one this is.
LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)
LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
# Seconds in which ranks that end by the same error come to know of each other, and between two looks.
_PATIENCE, _PAUSE = 5.0, 0.02
# Seconds in which a rank that hears of a failure ends what it waits for, if the one that failed has.
_GRACE = 0.5
# How much of what ranks do together is remembered; a rank that sends to all goes on before they receive.
_REMEMBERED = 64
# Into how many parts `train.exact` cuts a batch, whatever the number of ranks, which divides it.
PARTS = 8
# Bytes of which a sum over ranks is begun while others are still computed: latency is a sixth of it at 100 Gb/s.
MESSAGE = 4 << 20
# Elements that the host sums over the parts at once: they fit a core's cache.
STRETCH = 1 << 14


if TYPE_CHECKING:
    # The command line looks here before it needs NumPy.
    from arraytp.backend import Array

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run, this one among them."""

    rank: int
    size: int
    sums_on_device: bool

    def __hash__(self) -> int:
        """Return what tells this object from others."""

    def sum(self, buffer: "Array", in_order: bool = False) -> None:
        """Replace an array, C-contiguous, by its sum over the ranks.

        `in_order` is in the order of `pairwise`, for a multiple of `PARTS` elements.
        """

    def begin_sum(self, buffer: "Array") -> Callable[[], None]:
        """Begin to sum as `sum`, others before it is waited for, too; return what waits."""

    def exchange(self, segments: "Array") -> None:
        """Let every rank have each rank's row of an array of the host, C-contiguous, of as many rows as ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """Return what went wrong on every rank, None where nothing did; all call this once it has on any of them.

        Those that wait for a rank that has failed, in any of the above, leave with `FailedElsewhereError`. Empty if
        `limited` and some do not come within seconds.
        """


class Alone:
    """One process."""

    rank, size, sums_on_device = 0, 1, False

    def sum(self, buffer: "Array", in_order: bool = False) -> None:
        """Leave the buffer: it is the sum."""

    def begin_sum(self, buffer: "Array") -> Callable[[], None]:
        """Leave the buffer."""
        return lambda: None

    def exchange(self, segments: "Array") -> None:
        """Leave the only row."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """Return the only rank's."""
        return [own]


ALONE = Alone()


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank; a UserError on some ranks is everyone's, the first rank's of them."""
    if ranks.size == 1:
        return work()
    result, problem = None, ""
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    problems = ranks.gather(problem)
    failed = [rank for rank, each in enumerate(problems) if each]
    if not failed:
        return cast(T, result)
    where = f"rank {failed[0]}: " if failed[0] else ""
    raise UserErrors([where + line for line in problems[failed[0]].split("\n")])


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first and the end of a rank's part of so many samples; parts differ by at most one sample."""
    return count * rank // size, count * (rank + 1) // size


@dataclass(frozen=True)
class Part:
    """A part of a global batch of `size` samples that is computed alone: a rank's, or in exact mode one of `PARTS`."""

    ranks: Ranks
    size: int
    number: int
    exact: bool = False

    @property
    def first(self) -> int:
        """The place of the part's first sample in the global batch."""
        return share(self.size, self.number, PARTS if self.exact else self.ranks.size)[0]

    @property
    def count(self) -> int:
        """The samples of the part."""
        first, end = share(self.size, self.number, PARTS if self.exact else self.ranks.size)
        return end - first

    @property
    def empty(self) -> bool:
        """Whether there is no sample; one of the rank's own making is computed with, which counts nothing."""
        return self.count == 0


def parts_of(ranks: Ranks, size: int, exact: bool) -> list[Part]:
    """Return the parts of a global batch of `size` samples that this rank computes."""
    count = PARTS // ranks.size if exact else 1
    return [Part(ranks, size, ranks.rank * count + number, exact) for number in range(count)]


class RankSums:
    """Sums over all samples of a batch, in one buffer, to which arrays are added one after another.

    `parts` are this rank's. `flat` has room for all arrays and the dtype to sum in; in exact mode a multiple of `PARTS`
    elements. `engine` has the arrays' `backend`, `in_slices` and `between`.
    """

    def __init__(self, parts: Sequence[Part], flat: "Array", engine: Any) -> None:
        self._parts, self._flat, self._engine = parts, flat, engine
        self._end, self._begun, self._summed = 0, 0, list["Array"]()
        # What waits for the sums that have begun.
        self._waits = list[Callable[[], None]]()
        ranks, on_host = parts[0].ranks, engine.backend.on_host
        self._at_once = ranks.size > 1 and not parts[0].exact and (ranks.sums_on_device or on_host)

    def add(self, arrays: "Sequence[Sequence[Array]]") -> None:
        """Take the next arrays of every part, and sum them over the parts; begin the sum over ranks of large ones."""
        for of_parts in zip(*arrays, strict=True):
            like = of_parts[0]
            stretch = STRETCH if self._engine.backend.on_host else like.size
            start, self._end = self._end, self._end + like.size
            total = self._flat[start : self._end]
            # In the buffer's dtype already here: with fewer parts per rank, sums are rounded to it more often.
            cast = [each.reshape(-1).astype(total.dtype, copy=False) for each in of_parts]
            terms = [None if part.empty else each for part, each in zip(self._parts, cast, strict=True)]
            self._engine.in_slices(like.size, partial(_add_up, total, terms, stretch))
            self._summed.append(total.reshape(like.shape))
        if self._at_once and (self._end - self._begun) * self._flat.itemsize >= MESSAGE:
            self._engine.between(partial(self._begin, slice(self._begun, self._end)))
            self._begun = self._end

    def finished(self) -> "list[Array]":
        """Return the sums over all ranks, as parts of the buffer."""
        if self._begun:
            self._engine.between(partial(self._end_all, slice(self._begun, self._end)))
        elif self._parts[0].ranks.size > 1:
            self._flat[self._end :] = 0
            self._engine.between(self._sum)
        return self._summed

    def _begin(self, added: slice) -> None:
        """Begin the sum over ranks of what was added since the last one began."""
        self._waits.append(self._parts[0].ranks.begin_sum(self._flat[added]))

    def _end_all(self, last: slice) -> None:
        """Sum what was added last, and wait for what has begun."""
        if last.start < last.stop:
            self._begin(last)
        while self._waits:
            self._waits.pop(0)()

    def _sum(self) -> None:
        ranks, flat, exact = self._parts[0].ranks, self._flat, self._parts[0].exact
        host = flat if ranks.sums_on_device and not exact else self._engine.backend.to_host(flat)
        ranks.sum(host, in_order=exact)
        if host is not flat:
            flat[...] = self._engine.backend.asarray(host)


def _add_up(total: "Array", terms: "Sequence[Array | None]", stretch: int, part: slice) -> None:
    """Write the sum of some elements of all terms, None being 0, so many at a time."""
    for first in range(part.start, part.stop, stretch):
        own = slice(first, min(first + stretch, part.stop))
        total[own] = pairwise([total.dtype.type(0) if term is None else term[own] for term in terms])


def pairwise(parts: "Sequence[Array]") -> "Array":
    """Return ((p0 + p1) + (p2 + p3)) + …, of a power of two of arrays: the same bits wherever they are added."""
    while len(parts) > 1:
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def launched() -> tuple[int, int]:
    """Return the number of processes that the launcher reports, and the number of this one; 1 and 0 without a launcher.

    A batch script or shell of Slurm is no process of a step, although the number of the job's tasks is set there.
    """
    for size, rank in LAUNCHERS:
        if size == "SLURM_NTASKS" and "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
            continue
        if os.environ.get(size, "").isdecimal():
            place = os.environ.get(rank, "")
            return int(os.environ[size]), int(place) if place.isdecimal() else 0
    return 1, 0


def local_rank() -> int:
    """Return this process's number among those on this host, as the launcher reports it; 0 without a launcher."""
    given = (os.environ.get(name, "") for name in LOCAL_RANKS) if launched()[0] > 1 else ()
    return next((int(value) for value in given if value.isdecimal()), 0)


@functools.cache
def world() -> Ranks:
    """Return all processes that the launcher has started; imports MPI if they are several.

    UserError if mpi4py is missing, or the processes do not see each other.
    """
    size, _ = launched()
    if size == 1:
        return ALONE
    (says, *_) = (name for name, _ in LAUNCHERS if os.environ.get(name) == str(size))
    try:
        with warnings.catch_warnings():
            # Of a launcher of another MPI, in seven lines of each process.
            warnings.simplefilter("ignore", RuntimeWarning)
            mpi: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{size} processes were launched ({says}), but mpi4py cannot be imported ({error}); install arraytp[mpi] "
            "for this machine's MPI, or arraytp[mpi,mpich] where it has none"
        ) from error
    if mpi.COMM_WORLD.size == 1:
        library = " ".join(mpi.Get_library_version().split("\n")[0].split())
        raise UserError(
            f"{size} processes were launched ({says}), but each sees only itself and would write into one folder: "
            f"mpi4py speaks {library}, another MPI than the launcher's; use the mpiexec that belongs to it or another "
            "srun --mpi, or build mpi4py with the launcher's MPI"
        )
    return Mpi(mpi, mpi.COMM_WORLD)


class Mpi:
    """Ranks that speak by MPI: the module mpi4py.MPI and a communicator."""

    sums_on_device = False

    def __init__(self, mpi: Any, communicator: Any) -> None:
        self._mpi, self._communicator = mpi, communicator
        # Errors are told on a way of their own, which no sum that others wait in can take up.
        self._errors = communicator.Dup()
        # What was begun together, how much of it, the last of it, and what of it has not ended.
        self._begun, self._last, self._open = 0, deque[Any](maxlen=_REMEMBERED), list[Any]()
        self._cried = array("b", [0])
        self._cry = self._errors.Irecv(self._cried)
        atexit.register(self._deafen)
        self.rank, self.size = communicator.rank, communicator.size
        cores = os.uname().nodename, sorted(os.sched_getaffinity(0))
        # How many ranks have the same cores.
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
        """Give each rank its segment of all buffers, let it add them up, and gather the segments."""
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
        """Begin what ranks do together, without waiting for it."""
        views = (None if each is self._mpi.IN_PLACE else memoryview(each) for each in buffers)
        self._last.append((operation, [None if view is None else (view.format, view.nbytes) for view in views]))
        self._begun += 1
        for request, _ in self._open:
            # MPI moves on with it only when called.
            request.Test()
        # mpi4py does not keep the buffers.
        self._open.append((getattr(self._communicator, operation)(*buffers), buffers))
        return self._open[-1]

    def _wait(self, begun: Any) -> None:
        """Wait for what ranks do together; `FailedElsewhereError` if another one cries that it has failed."""
        heard = math.inf
        while not begun[0].Test():
            if self._cry.Test():
                heard = min(heard, time.monotonic())
                if time.monotonic() - heard > _GRACE:
                    raise FailedElsewhereError("another rank has failed")
            # Where ranks share cores; MPI's own waiting does so, too.
            os.sched_yield()
        self._open = [each for each in self._open if each is not begun]

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """See `Ranks.problems`."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        cry = array("b", [1])
        crying = [self._errors.Isend(cry, rank) for rank in others] if own is not None else []
        if not self.all_end(_PATIENCE if limited else math.inf):
            return []
        everyone = self._errors.allgather((own, self._begun, [*self._last]))
        for rank in others:
            if everyone[rank][0] is not None:
                self._cry.Wait()
                self._cry = self._errors.Irecv(self._cried)
        # MPI cannot take back what others have begun: take part in it with anything.
        _, furthest, last = max(everyone, key=operator.itemgetter(1))
        for operation, buffers in last[len(last) - (furthest - self._begun) :]:
            blank = (array(each[0], bytes(each[1])) if each else self._mpi.IN_PLACE for each in buffers)
            self._begin(operation, *blank)
        self._mpi.Request.Waitall([*crying, *(request for request, _ in self._open)])
        self._open.clear()
        return [problem for problem, *_ in everyone]

    def _deafen(self) -> None:
        """Let go of what was to be received, before MPI ends."""
        if self._cry != self._mpi.REQUEST_NULL:
            self._cry.Cancel()
            self._cry.Wait()

    def all_end(self, patience: float = _PATIENCE) -> bool:
        """Tell whether all ranks call this within some seconds."""
        request, deadline = self._errors.Ibarrier(), time.monotonic() + patience
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        return True

    def split(self, size: int) -> "Mpi":
        """Return the group of so many ranks that this one belongs to."""
        return Mpi(self._mpi, self._communicator.Split(self.rank // size, self.rank))

    def turns(self, group: Ranks) -> "Turns":
        """Return the turns that groups of these ranks take; all ranks call this together."""
        return Turns(self._mpi, self._communicator, group)

    def abort(self, status: int) -> None:
        """End all ranks."""
        self._mpi.COMM_WORLD.Abort(status)


class Turns:
    """Numbers from 0 on, each for the group of ranks that asks first: a counter in the first rank's memory.

    A group that ends by a signal tells the others: every rank sends one word to the first rank of each other group. The
    communicator is of all groups, `group` this rank's.
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
        """Return the number of the signal that ended another group, 0 while none did."""
        self._mpi.Request.Testsome(self._receiving)
        return max(self._heard, default=0)

    def end(self, number: int) -> None:
        """Let nobody have a turn any more, because of a signal."""
        self._add(1 << 32)
        self._tell(number)

    def close(self, stopped: Callable[[], int]) -> None:
        """Wait for all groups; a signal, whose number `stopped` returns, ends them."""
        closed = self._communicator.Ibarrier()
        while not closed.Test():
            if self._sending is None and (number := stopped()):
                self.end(number)
            # MPI's own waiting would take a core from those that still compute.
            time.sleep(_PAUSE)
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


@functools.cache
def failed_alone() -> bool:
    """Tell, to a process that ends by an error, whether others of its world do not; all of them must be ended then."""
    ranks = _known_world()
    return isinstance(ranks, Mpi) and not ranks.all_end()


def speaks() -> bool:
    """Tell a process that ends by an error whether it is the one to say so: the first, or one that fails alone."""
    return launched()[1] == 0 or failed_alone()


def end_all(status: int) -> None:
    """End the other processes if this one fails alone: they would wait for it."""
    ranks = _known_world()
    if isinstance(ranks, Mpi) and failed_alone():
        sys.stdout.flush()
        sys.stderr.flush()
        ranks.abort(status)


def _known_world() -> Ranks:
    """Return the world if this process has met it."""
    return world() if world.cache_info().currsize else ALONE


def threads_of(ranks: Ranks) -> int | None:
    """Return how many threads a rank should use: its share of the cores that it and others of its host may use.

    None for one process, and where OMP_NUM_THREADS says it. Ranks of other runs take their share, too.
    """
    everyone = _known_world()
    sharing = everyone.sharing if isinstance(everyone, Mpi) else ranks.size
    if sharing == 1 or os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, len(os.sched_getaffinity(0)) // sharing)
