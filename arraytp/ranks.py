"""Processes that share a run: who is who, sums over all of them, and ending together. One process needs none of it.

A step on R ranks is the step on one: each rank has a part of every global batch, and what is summed over samples is
summed over ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from arraytp.errors import UserError, UserErrors

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
    """A part of a global batch of `size` samples that is computed alone: a rank's, or in exact mode one of `PARTS`.

    `together` in exact mode: those of `PARTS` that are the rank's, computed at once to the bits of each alone.
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
        """The place of the part's first sample in the global batch."""
        return self._bounds[0]

    @property
    def count(self) -> int:
        """The samples of the part."""
        first, end = self._bounds
        return end - first

    @property
    def rows(self) -> list[slice]:
        """Which of the samples each of the parts has that are computed `together`."""
        if self.empty:
            return [slice(0, 1)]
        each = [share(self.size, number, PARTS) for number in range(PARTS) if self._has(number)]
        return [slice(first - self.first, end - self.first) for first, end in each]

    def _has(self, number: int) -> bool:
        return number * self.ranks.size // PARTS == self.number

    @property
    def empty(self) -> bool:
        """Whether there is no sample; one of the rank's own making is computed with, which counts nothing."""
        return self.count == 0


def parts_of(ranks: Ranks, size: int, exact: bool, together: bool = False) -> list[Part]:
    """Return the parts of a global batch of `size` samples that this rank computes."""
    count = PARTS // ranks.size if exact and not together else 1
    return [Part(ranks, size, ranks.rank * count + number, exact, together) for number in range(count)]


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

    def add(self, arrays: "Sequence[Sequence[Array]]", flags: int = 0) -> None:
        """Take the next arrays of every part, and sum them over the parts; begin the sum over ranks of large ones.

        Of a part computed `together`, those of each of `Part.rows` may be given. A part without samples adds zeros,
        but for the last `flags` arrays, which are not of samples.
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
            # In the buffer's dtype already here: with fewer parts per rank, sums are rounded to it more often.
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
            flat.set(host)


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
