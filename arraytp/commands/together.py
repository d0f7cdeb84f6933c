"""Ranks that share runs: check their number, check that all were given the same, and end together on an error."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from arraytp.config.difference import first_difference
from arraytp.errors import FailedElsewhereError, NonFiniteError, RunError, UserError, UserErrors
from arraytp.launcher import world
from arraytp.mpi_ranks import Mpi
from arraytp.ranks import ALONE, PARTS, Ranks
from arraytp.training.plan import Plan

# Arguments that say which config to use, and what to change in it.
_OF_CONFIG = ("config", "configs", "backend", "dtype", "overrides")


def all_ranks() -> Ranks:
    """Return the processes of this command; UserError, on all of them, if their commands or options differ.

    Configs may have different paths on different machines: `check_ranks` compares their content.
    """
    everyone, context = world(), click.get_current_context()
    options = [each for each in context.command.params if each.name not in _OF_CONFIG]
    own = {each.opts[0]: str(context.params.get(each.name or "")) for each in options}
    given = everyone.gather({"the command": context.info_name} | own)
    for rank, theirs in enumerate(given):
        for name, value in given[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"rank {rank} was given something different from rank 0: {name} is {theirs.get(name)} there and "
                    f"{value} here"
                )
    return everyone


def grouped(everyone: Ranks, ranks_per_run: int | None) -> Ranks:
    """Return the ranks that share this one's runs: all, or a group of `ranks_per_run`, which divides their number."""
    if ranks_per_run is None or ranks_per_run == everyone.size:
        return everyone
    if everyone.size == 1:
        raise UserError(
            f"--ranks-per-run {ranks_per_run}: one process was launched; use mpiexec or srun to start a multiple of "
            f"{ranks_per_run}"
        )
    if everyone.size % ranks_per_run:
        raise UserError(
            f"--ranks-per-run {ranks_per_run}: {everyone.size} ranks were launched, which is not a multiple of it"
        )
    assert isinstance(everyone, Mpi)
    return everyone.split(ranks_per_run)


def check_ranks(everyone: Ranks, ranks: Ranks, plans: Sequence[Plan]) -> None:
    """Raise UserError, on all ranks, if some would have nothing to do or were given other configs or data."""
    if everyone.size == 1:
        return
    given = everyone.gather([(plan.config, plan.dataset.digest) for plan in plans])
    for rank, theirs in enumerate(given):
        for (config, digest), (other, other_digest) in zip(given[0], theirs, strict=False):
            difference = first_difference(config, other, free=())
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
        study, batch = plan.config.study, min(plan.config.train.batch_size, plan.train_images)
        what = f"train.batch_size: a batch has {batch} images" if study is None else f"study.seeds: {study.seeds} seeds"
        if ranks.size > (batch if study is None else study.seeds):
            raise UserError(
                f"{what}, fewer than the {ranks.size} ranks that share them; start fewer, or use --ranks-per-run"
            )


@contextmanager
def failing_together(ranks: Ranks, label: str, limited: bool = False) -> Iterator[None]:
    """While entered, let an error of any rank end the work on all of them, which can then go on together.

    All raise the same UserErrors or RunError, which names the run and the rank; the traceback of an unforeseen error is
    printed, too. A single process raises its own error. With `limited`, so does a rank that the others do not join
    within seconds, for example because they wait for NCCL on a device.
    """
    if ranks is ALONE:
        yield
        return
    problem: Exception | None = None
    told = None
    try:
        yield
        # Wait for all: the first rank may fail in what it alone does at the end.
        ranks.gather(None)
    except FailedElsewhereError as error:
        problem = error
    except Exception as error:
        foreseen = isinstance(error, UserError | NonFiniteError)
        problem, told = error, (isinstance(error, UserError), foreseen, str(error) if foreseen else repr(error))
    if problem is None:
        return
    everyone = ranks.problems(told, limited)
    if not everyone:
        raise problem
    rank, (users, foreseen, text) = next((rank, each) for rank, each in enumerate(everyone) if each is not None)
    if rank == ranks.rank and not foreseen:
        traceback.print_exception(problem)
    where = f"{label}: rank {rank}: " if rank else f"{label}: "
    lines = [where + line.removeprefix(f"{label}: ") for line in text.split("\n")]
    raise UserErrors(lines) if users else RunError("; ".join(lines))
