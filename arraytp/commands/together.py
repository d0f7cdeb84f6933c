"""What several ranks have to be before they share runs: of a number that fits, and of one mind."""

from collections.abc import Sequence

from arraytp.config.difference import first_difference
from arraytp.errors import UserError
from arraytp.ranks import PARTS, Mpi, Ranks
from arraytp.training.plan import Plan


def grouped(everyone: Ranks, ranks_per_run: int | None) -> Ranks:
    """Return the ranks that share this one's runs: all, or a group of so many, of which they must be a multiple."""
    if ranks_per_run is None or ranks_per_run == everyone.size:
        return everyone
    if everyone.size % ranks_per_run:
        raise UserError(
            f"--ranks-per-run {ranks_per_run}: {everyone.size} ranks were launched, which is not a multiple of it"
        )
    assert isinstance(everyone, Mpi)
    return everyone.split(ranks_per_run)


def check_ranks(everyone: Ranks, ranks: Ranks, plans: Sequence[Plan]) -> None:
    """Refuse, on all ranks alike, ranks that would have nothing to do or were given different things."""
    if everyone.size == 1:
        return
    given = everyone.gather([(plan.config, plan.dataset.digest) for plan in plans])
    for rank, theirs in enumerate(given):
        for (config, digest), (other, other_digest) in zip(given[0], theirs, strict=False):
            difference = first_difference(config, other)
            if not difference and digest != other_digest:
                difference = f"other images or labels in data.dataset {config.data.dataset}"
            if difference:
                raise UserError(f"rank {rank} was given something different from rank 0: {difference}")
        if len(theirs) != len(given[0]):
            raise UserError(f"rank {rank} was given {len(theirs)} runs, but rank 0 {len(given[0])}")
    for plan in plans:
        if plan.config.train.exact and PARTS % ranks.size:
            raise UserError(
                f"train.exact: {ranks.size} ranks share a run, but not evenly the {PARTS} parts that a batch is cut "
                "into; start 1, 2, 4 or 8, or use --ranks-per-run"
            )
        study, batch = plan.config.study, min(plan.config.train.batch_size, plan.dataset.counts["train"])
        what = f"train.batch_size: a batch has {batch} images" if study is None else f"study.seeds: {study.seeds} seeds"
        if ranks.size > (batch if study is None else study.seeds):
            raise UserError(
                f"{what}, fewer than the {ranks.size} ranks that share them; start fewer, or use --ranks-per-run"
            )
