"""Ranks, the processes that share a run: sums over all of them, and failing together. One process needs none of it.

A step on R ranks is the same as on one: each rank has a part of every global batch, and sums over samples are summed
over ranks, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from arraytp.errors import UserError, UserErrors

# Parts into which `train.exact` cuts a batch, whatever the number of ranks, which must divide it.
PARTS = 8
# Once this many bytes have gathered, their sum over ranks begins while further arrays are computed. At 100 Gb/s,
# latency is a sixth of the time of a sum of this size.
MESSAGE = 4 << 20
# Elements that the host sums over the parts at a time: they fit into a core's cache.
STRETCH = 1 << 14

if TYPE_CHECKING:
    # The command line imports this module before it needs NumPy.
    from arraytp.backend import Array

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run, this one among them."""

    rank: int
    size: int
    sums_on_device: bool

    def __hash__(self) -> int:
        """Return a hash that distinguishes this object from others."""

    def sum(self, buffer: "Array", in_order: bool = False) -> None:
        """Replace a C-contiguous array by its sum over the ranks.

        `in_order` adds in the order of `pairwise`, and requires a multiple of `PARTS` elements.
        """

    def begin_sum(self, buffer: "Array") -> Callable[[], None]:
        """Begin a `sum`, which may overlap with others, and return a function that waits for it."""

    def exchange(self, segments: "Array") -> None:
        """Send each rank's row of a C-contiguous host array, with as many rows as ranks, to all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """Return every rank's problem, None for a rank without one; all ranks call this once any of them has failed.

        A rank that waits for a failed one, in any of the methods above, leaves with `FailedElsewhereError`. The list is
        empty if `limited` and some ranks do not call this within seconds.
        """


class Alone:
    """One process."""

    rank, size, sums_on_device = 0, 1, False

    def sum(self, buffer: "Array", in_order: bool = False) -> None:
        """Leave the buffer unchanged: it is the sum."""

    def begin_sum(self, buffer: "Array") -> Callable[[], None]:
        """Leave the buffer unchanged."""
        return lambda: None

    def exchange(self, segments: "Array") -> None:
        """Leave the only row unchanged."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        """Return the only rank's problem."""
        return [own]


ALONE = Alone()


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank; if any ranks raise UserError, all raise that of the first of these."""
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
    """Return the start and end of a rank's part of `count` samples; parts differ by at most one sample."""
    return count * rank // size, count * (rank + 1) // size


@dataclass(frozen=True)
class Part:
    """A part of a global batch of `size` samples that is computed alone: a rank's, or in exact mode one of `PARTS`.

    With `together`, in exact mode: a rank's share of `PARTS`, computed at once with the same bits as each alone.
    """

    ranks: Ranks
    size: int
    number: int
    exact: bool = False
    together: bool = False

    @property
    def _bounds(self) -> tuple[int, int]:
        return share(self.size, self.number, PARTS if self.exact and not self.together else self.ranks.size)

    @property
    def first(self) -> int:
        """The index of the part's first sample in the global batch."""
        return self._bounds[0]

    @property
    def count(self) -> int:
        """The number of samples in the part."""
        first, end = self._bounds
        return end - first

    @property
    def rows(self) -> list[slice]:
        """For each of the parts computed `together`, the slice of this part's samples that belongs to it."""
        if self.empty:
            return [slice(0, 1)]
        each = [share(self.size, number, PARTS) for number in range(PARTS) if self._has(number)]
        return [slice(first - self.first, end - self.first) for first, end in each]

    def _has(self, number: int) -> bool:
        return number * self.ranks.size // PARTS == self.number

    @property
    def empty(self) -> bool:
        """Whether there is no sample; the rank then computes with a blank one that does not count."""
        return self.count == 0


def parts_of(ranks: Ranks, size: int, exact: bool, together: bool = False) -> list[Part]:
    """Return the parts of a global batch of `size` samples that this rank computes."""
    count = PARTS // ranks.size if exact and not together else 1
    return [Part(ranks, size, ranks.rank * count + number, exact, together) for number in range(count)]


class RankSums:
    """Sums over all samples of a batch, in one buffer, to which arrays are added one after another.

    `parts` are this rank's. The buffer `flat` is large enough for all arrays and has the dtype to sum in; in exact mode
    it has a multiple of `PARTS` elements. `engine` provides the arrays' `backend`, `in_slices` and `between`.
    """

    def __init__(self, parts: Sequence[Part], flat: "Array", engine: Any) -> None:
        self._parts, self._flat, self._engine = parts, flat, engine
        self._end, self._begun, self._summed = 0, 0, list["Array"]()
        # Functions that wait for the sums that have begun.
        self._waits = list[Callable[[], None]]()
        ranks, on_host = parts[0].ranks, engine.backend.on_host
        self._at_once = ranks.size > 1 and not parts[0].exact and (ranks.sums_on_device or on_host)

    def add(self, arrays: "Sequence[Sequence[Array]]", flags: int = 0) -> None:
        """Sum the next arrays over the parts; begin the sum over ranks once `MESSAGE` bytes have gathered.

        In exact mode, and for device arrays that ranks sum through the host, that sum waits for `finished`.

        `arrays` has the arrays of every part or, for one computed `together`, of each of its `Part.rows`. A part
        without samples adds zeros, except for the last `flags` arrays, which do not depend on samples.
        """
        of_samples = len(arrays[0]) - flags
        for number, of_parts in enumerate(zip(*arrays, strict=True)):
            like = of_parts[0]
            stretch = STRETCH if self._engine.backend.on_host else like.size
            start, self._end = self._end, self._end + like.size
            total = self._flat[start : self._end]
            if len(of_parts) == self._parts[0].ranks.size == 1 and like.dtype == total.dtype:
                self._summed.append(like)
                continue
            # Summed in the buffer's dtype here, too, so that rounding does not depend on how many parts a rank has.
            cast = [each.reshape(-1).astype(total.dtype, copy=False) for each in of_parts]
            parts = [*self._parts] * (len(cast) // len(self._parts))
            of_rank = number >= of_samples
            terms = [each if of_rank or not part.empty else None for part, each in zip(parts, cast, strict=True)]
            self._engine.in_slices(like.size, partial(_add_up, total, terms, stretch))
            self._summed.append(total.reshape(like.shape))
        if self._at_once and (self._end - self._begun) * self._flat.itemsize >= MESSAGE:
            self._engine.between(partial(self._begin, slice(self._begun, self._end)))
            self._begun = self._end

    def finished(self) -> "list[Array]":
        """Return the sums over all ranks, in the order in which the arrays were added.

        They are views of the buffer; arrays of its dtype, from a single rank's only part, are returned themselves.
        """
        if self._begun:
            self._engine.between(partial(self._end_all, slice(self._begun, self._end)))
        elif self._parts[0].ranks.size > 1:
            self._flat[self._end :] = 0
            self._engine.between(self._sum)
        return self._summed

    def _begin(self, added: slice) -> None:
        """Begin the sum over ranks of what was added since the last such sum began."""
        self._waits.append(self._parts[0].ranks.begin_sum(self._flat[added]))

    def _end_all(self, last: slice) -> None:
        """Sum what was added last, and wait for all sums that have begun."""
        if last.start < last.stop:
            self._begin(last)
        while self._waits:
            self._waits.pop(0)()

    def _sum(self) -> None:
        ranks, flat, exact = self._parts[0].ranks, self._flat, self._parts[0].exact
        host = flat if ranks.sums_on_device and not exact else self._engine.backend.to_host(flat)
        ranks.sum(host, in_order=exact)
        if host is not flat:
            flat.set(host)


def _add_up(total: "Array", terms: "Sequence[Array | None]", stretch: int, part: slice) -> None:
    """Write the sum of all terms (None is 0) over the elements of `part` to `total`, `stretch` at a time."""
    for first in range(part.start, part.stop, stretch):
        own = slice(first, min(first + stretch, part.stop))
        total[own] = pairwise([total.dtype.type(0) if term is None else term[own] for term in terms])


def pairwise(parts: "Sequence[Array]") -> "Array":
    """Return ((p0 + p1) + (p2 + p3)) + … for 2^k arrays: the same bits wherever they are added."""
    while len(parts) > 1:
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
