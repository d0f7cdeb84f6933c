"""`arraytp run`: configs in, result folders, tables and figures out."""

import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import click

from arraytp.commands.holding import Holds
from arraytp.commands.shared_options import VARIANT, check_folder, overriding, settings
from arraytp.commands.together import all_ranks, check_ranks, failing_together, grouped
from arraytp.config import dump_config, load_config
from arraytp.config.document import encodable
from arraytp.config.problems import LARGEST_INTEGER
from arraytp.device_ranks import connected
from arraytp.errors import Interrupted, NonFiniteError, RunError, UserError, one_line
from arraytp.files import write_file
from arraytp.launcher import launched
from arraytp.mpi_ranks import Mpi
from arraytp.ranks import Ranks, agreed
from arraytp.report import read_results, write_comparison, write_figures, write_study
from arraytp.report.figures import LAST_FIGURE, RUN_FIGURES
from arraytp.report.reading import in_order
from arraytp.report.seeds import seeds_table
from arraytp.report.studies import LAST_STUDY_FIGURE, STUDY_FIGURES
from arraytp.report.tables import comparison_table
from arraytp.signals import StopRequest
from arraytp.training.build import build_planned
from arraytp.training.checkpoint import check_owner, read_owner
from arraytp.training.loop import Run
from arraytp.training.plan import Plan, check_seeds, plan_variant
from arraytp.training.study import check_seeds_done, run_study

MOST_SEEDS = 1000
OWN_FILES = ("config.yml", "metrics.csv", "steps.csv", "angles.csv", "feedback.csv", "summary.json", "checkpoint.h5")
OWN_FIGURES = (*RUN_FIGURES, *STUDY_FIGURES)


@dataclass(frozen=True)
class Asked:
    """Options that apply to all jobs."""

    resume: bool
    fresh: bool
    quiet: bool


@dataclass(frozen=True, eq=False)
class Job:
    """One run of one variant: what to train, where its results go, and whether to use the plain primitives."""

    plan: Plan
    label: str
    folder: Path
    plain: bool
    home: Path
    of_seeds: bool

    @property
    def study(self) -> bool:
        """Whether the config asks for a study instead of training."""
        return self.plan.config.study is not None

    @property
    def finished(self) -> bool:
        """Whether the folder has the results of all epochs and steps, or of all seeds, of this config."""
        study = self.plan.config.study
        seeds = range(study.seeds if study is not None else 0)
        tables = () if self.study else ("metrics.csv",)
        names = ("config.yml", "summary.json", *tables, *(f"seed-{n}/summary.json" for n in seeds))
        written = all((self.folder / name).exists() for name in names)
        return written and read_owner(self.folder)[0] == self.plan.config


def _checked_seeds(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> int | tuple[int, ...] | None:
    """Return the number of seeds, or the seeds themselves."""
    if value is None:
        return None
    numbers = [word.strip() for word in value.removesuffix(",").split(",")]
    if not all(word.isascii() and word.isdecimal() for word in numbers):
        raise UserError(f"--seeds {value}: must be a number of seeds, or seeds such as 0,1,2")
    if any(len(word) > len(str(LARGEST_INTEGER)) or int(word) > LARGEST_INTEGER for word in numbers):
        raise UserError(f"--seeds {value}: a seed is at most {LARGEST_INTEGER}")
    seeds = tuple(int(word) for word in numbers)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {value}: names a seed twice")
    if "," in value:
        return seeds
    if not 1 <= seeds[0] <= MOST_SEEDS:
        raise UserError(f"--seeds {value}: must be a number of seeds from 1 to {MOST_SEEDS}, or seeds such as 0,1,2")
    return seeds[0]


@click.command(short_help="Train the given configs and write result folders.")
@click.argument("configs", nargs=-1, metavar="CONFIG...", type=click.Path(path_type=Path))
@VARIANT
@overriding
@click.option("--out", metavar="DIR", callback=check_folder, help="Result folder; default results/<config name>.")
@click.option("--resume", is_flag=True, help="Continue stopped runs and skip finished ones.")
@click.option("--fresh", is_flag=True, help="Start over and replace existing results.")
@click.option("--quiet", is_flag=True, help="No progress, only the final table.")
@click.option("--seeds", metavar="N|a,b,c", callback=_checked_seeds, help="Run every variant with each of these seeds.")
@click.option(
    "--ranks-per-run", type=click.IntRange(min=1), metavar="P", help="Do several runs at a time, each on P ranks."
)
@click.option("--plain", is_flag=True, help="Compute with the readable primitives, whole batches at a time.")
def command(
    configs: tuple[Path, ...],
    variant: str | None,
    backend: str | None,
    dtype: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    fresh: bool,
    quiet: bool,
    seeds: int | tuple[int, ...] | None,
    ranks_per_run: int | None,
    plain: bool,
) -> int:
    """Train the given CONFIG files and write result folders.

    A config with variants writes one folder per variant into the result folder. --seeds 5 (starting from the config's
    seed) or --seeds 0,1,2 writes one folder seed-<n> per seed. If one of several runs fails, a line names it; the
    others continue.

    Under mpiexec or srun, all ranks share a run. With --ranks-per-run, groups of P ranks take the next run that is
    left.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU writes a checkpoint and stops. The same command with --resume
    continues from it. With --plain, numbers are the same up to rounding, and a run takes several times as long.
    """
    if not configs:
        raise UserError(
            "give a config, such as runs/quickstart.yml in a clone; `arraytp init my.yml` writes one to start from"
        )
    if resume and fresh:
        raise UserError("--resume and --fresh exclude each other: continue, or start over")
    overridden = settings(overrides, backend, dtype)
    everyone = all_ranks()
    batches = agreed(
        everyone, lambda: [_jobs(path, overridden, variant, out, len(configs) > 1, plain, seeds) for path in configs]
    )
    jobs = [job for batch in batches for job in batch]
    _refuse_one_place_twice(jobs)
    ranks = grouped(everyone, ranks_per_run)
    check_ranks(everyone, ranks, [job.plan for job in jobs])
    asked = Asked(resume, fresh, quiet)
    try:
        with Holds() as held:
            agreed(everyone, lambda: _hold(jobs, asked, held) if everyone.rank == 0 else None)
            with StopRequest(tells=everyone.rank == 0) as stop:
                status = _run_all(jobs, stop, asked, held, everyone, ranks)
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: {_command_to_resume()}", error.signal_number) from error
    if everyone.rank == 0:
        _report(batches)
    return status


def _hold(jobs: Sequence[Job], asked: Asked, held: Holds) -> None:
    """Hold the folders, check that nothing in them would be overwritten, and print the notes of the plans."""
    for job in jobs:
        held.take(job.folder)
    _check_folders(jobs, asked.resume, asked.fresh)
    for job in jobs:
        for note in job.plan.notes:
            click.echo(f"arraytp: note: {job.label}: {note}", err=True)


def _jobs(
    path: Path,
    overrides: list[str],
    only: str | None,
    out: Path | None,
    several: bool,
    plain: bool,
    seeds: int | tuple[int, ...] | None,
) -> list[Job]:
    """Check a file's variants, or `only` one; return their jobs. Each of `several` configs has a folder in `out`."""
    file = load_config(path, overrides, only)
    folder = Path("results", file.name) if out is None else out / file.name if several else out
    jobs = []
    for variant, config in file.variants.items():
        planned = plan_variant(path, variant, config)
        place = folder / variant if variant else folder
        if not encodable(os.path.basename(os.path.realpath(place))):
            raise UserError(f"{str(place)!r}: the folder's name is not UTF-8 text, so figures cannot show it")
        label = variant or file.name
        if seeds is None:
            jobs.append(Job(planned, label, place, plain, folder, of_seeds=False))
            continue
        if config.study is not None:
            raise UserError(f"--seeds: {path} is a study, which has seeds of its own; set study.seeds")
        if isinstance(seeds, int):
            check_seeds(f"--seeds {seeds}", config.seed, seeds)
        for seed in range(config.seed, config.seed + seeds) if isinstance(seeds, int) else seeds:
            seeded = replace(planned, config=replace(config, seed=seed))
            jobs.append(Job(seeded, f"{label} seed {seed}", place / f"seed-{seed}", plain, folder, of_seeds=True))
    return jobs


def _refuse_one_place_twice(jobs: Sequence[Job]) -> None:
    folders = [os.path.realpath(job.folder) for job in jobs]
    homes = {os.path.realpath(job.home) for job in jobs if job.home != job.folder}
    for job, folder in zip(jobs, folders, strict=True):
        if folders.count(folder) > 1 or folder in homes:
            raise UserError(f"{job.folder}: two of the configs write their results here; give them different names")


def _check_folders(jobs: Sequence[Job], resume: bool, fresh: bool) -> None:
    """Refuse jobs that would overwrite results or mix those of two configs."""
    for job in jobs:
        if job.folder.exists() and not job.folder.is_dir():
            raise UserError(f"{job.folder}: is a file; --out needs a folder")
        if job.folder.is_symlink() and not job.folder.exists():
            raise UserError(f"{job.folder}: is a link that leads nowhere; --out needs a folder")
        if job.of_seeds and _holds_results(job.folder.parent):
            raise UserError(
                f"{job.folder.parent}: holds results of a run without --seeds; --out selects another folder"
            )
        if not job.of_seeds and any(job.folder.glob("seed-*/config.yml")):
            raise UserError(f"{job.folder}: holds results of a run with --seeds; --out selects another folder")
        _refuse_hiding(job)
        if fresh or not (_holds_results(job.folder) or (job.study and any(job.folder.glob("seed-*/summary.json")))):
            continue
        if not resume:
            raise UserError(
                f"{job.folder}: holds results already; --resume continues them, --fresh starts over, "
                "--out selects another folder"
            )
        # Each finished seed of a study has its own config, so a lost config.yml does no harm.
        if not job.study or (job.folder / "config.yml").exists():
            check_owner(job.folder, job.plan)
        if job.study:
            check_seeds_done(job.plan, job.folder)
        elif _lost_checkpoint(job):
            raise UserError(
                f"{job.folder}: has finished, but checkpoint.h5, from which it would go on, is missing; --fresh starts "
                "over"
            )


def _holds_results(folder: Path) -> bool:
    return any((folder / name).exists() for name in OWN_FILES)


def _holds_a_run(folder: Path) -> bool:
    """Tell whether a run has begun in a folder; a config.yml alone may be the user's own."""
    return any((folder / name).exists() for name in OWN_FILES if name != "config.yml")


def _refuse_hiding(job: Job) -> None:
    """Refuse a run above others and variants below a run: what has a config.yml is one run to `arraytp report`."""
    of_variant = (job.folder.parent if job.of_seeds else job.folder) != job.home
    if of_variant and _holds_a_run(job.home):
        raise UserError(f"{job.home}: holds results of a run without variants; --out selects another folder")
    if of_variant or job.of_seeds or _holds_a_run(job.folder):
        return
    below = (*job.folder.glob("*/config.yml"), *job.folder.glob("*/seed-*/config.yml"))
    if any(_holds_a_run(path.parent) for path in below if not path.parent.is_symlink()):
        raise UserError(f"{job.folder}: holds folders with results of other runs; --out selects another folder")


def _lost_checkpoint(job: Job) -> bool:
    """Tell whether a finished run that is to go on would start over, because its checkpoint is missing."""
    there = (job.folder / "summary.json").exists() and not (job.folder / "checkpoint.h5").exists()
    return there and not job.finished


def _run_all(jobs: Sequence[Job], stop: StopRequest, asked: Asked, held: Holds, everyone: Ranks, ranks: Ranks) -> int:
    """Do all jobs and return the exit status; if one of several runs fails, the others go on."""
    if ranks is everyone:
        return _run_some(jobs, jobs, stop, asked, held, ranks, list(jobs) if asked.fresh else [])
    assert isinstance(everyone, Mpi)
    # From here on, each group holds the folders of its own runs.
    held.close()
    left = []
    if asked.fresh and everyone.rank == 0:
        for number, job in enumerate(jobs):
            try:
                _clear(job)
            except OSError:
                left.append(number)
    # The group that takes such a job tries to clear it again, and reports why it cannot.
    uncleared = [jobs[number] for number in everyone.broadcast(left)]
    turns, interrupted, status = everyone.turns(ranks), None, 0
    stop.elsewhere = turns.heard
    try:
        mine = (jobs[number] for number in turns.below(len(jobs)))
        status = _run_some(mine, jobs, stop, asked, held, ranks, uncleared)
    except Interrupted as error:
        interrupted = error
        turns.end(error.signal_number)
    turns.close(lambda: stop.signal if stop.requested else 0)
    outcomes = everyone.gather((status, interrupted.signal_number if interrupted else 0, str(interrupted or "")))
    number = max(signal_number for _, signal_number, _ in outcomes)
    if number:
        raise Interrupted("; ".join(dict.fromkeys(text for _, _, text in outcomes if text)), number)
    return max(int(status) for status, _, _ in outcomes)


def _run_some(
    mine: Iterable[Job],
    jobs: Sequence[Job],
    stop: StopRequest,
    asked: Asked,
    held: Holds,
    ranks: Ranks,
    uncleared: list[Job],
) -> int:
    status, grouped = 0, mine is not jobs
    for job in mine:
        # A group clears only its own job.
        clears = [each for each in uncleared if each is job] if grouped else uncleared
        try:
            with failing_together(ranks, job.label, limited=not job.plan.backend.on_host):
                _do(job, clears, stop, asked, held, ranks)
        except (UserError, NonFiniteError, RunError) as error:
            if not (grouped or job.of_seeds or len(jobs) > 1):
                raise
            if ranks.rank == 0:
                text = one_line(str(error)).removeprefix(f"{job.label}: ")
                click.echo(f"arraytp: error: {job.label}: {text}", err=True)
            status = max(status, 2 if isinstance(error, UserError) else 1)
    return status


def _do(job: Job, uncleared: list[Job], stop: StopRequest, asked: Asked, held: Holds, ranks: Ranks) -> None:
    """Do a job; before the first that can begin, remove the former results of all `uncleared` jobs."""
    first = ranks.rank == 0
    if ranks.broadcast(agreed(ranks, lambda: first and asked.resume and job.finished)):
        if first:
            _write_config(job)
            if not _drawn(job):
                _draw(job)
        return
    with warnings.catch_warnings():
        # The loop checks loss and weights itself; NumPy's warnings of overflow would bury its messages.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            run = None
            if not job.study:
                sharing, note = connected(ranks, job.plan.backend)
                if note and first:
                    click.echo(f"arraytp: note: {job.label}: {note}", err=True)
                experiment = agreed(ranks, lambda: build_planned(job.plan, job.plain, sharing))
                run = Run(experiment, job.folder, job.label, asked.quiet)
            agreed(ranks, lambda: _claim(job, uncleared, asked, held) if first else None)
            _train(job, run, stop, asked, ranks)
        except MemoryError as error:
            train = job.plan.config.train
            key, size = "train.batch_size", train.batch_size
            if run is not None and run.evaluating:
                key, size = "train.eval_batch_size", train.eval_batch_size
            raise UserError(f"{job.label}: {job.plan.backend.memory_words(error, size, key)}") from error
        except OSError as error:
            hint = "; make room, and --resume goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            place = error.filename or job.folder
            raise UserError(f"{place}: cannot be written: {error.strerror or error}{hint}") from error


def _claim(job: Job, uncleared: list[Job], asked: Asked, held: Holds) -> None:
    """Make and hold a job's folder, and check it again: another command may have written to it since the first check.

    The former results of all `uncleared` jobs are removed at once, so that none of them passes for finished after a
    stop. A problem with another job's folder is reported when its turn comes.
    """
    for each in [each for each in uncleared if each is not job]:
        with suppress(OSError, UserError):
            _take(each, asked.resume, True, held)
            _clear(each)
            uncleared.remove(each)
    own = job in uncleared
    if own:
        # Cleared in its own turn or not at all: later jobs must not remove what someone else may have written since.
        uncleared.remove(job)
    _take(job, asked.resume, own, held)
    if own:
        _clear(job)


def _take(job: Job, resume: bool, clears: bool, held: Holds) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    held.take(job.folder)
    _check_folders([job], resume, clears)


def _clear(job: Job) -> None:
    for folder in (job.folder, *job.folder.glob("seed-*")):
        for name in (*OWN_FILES, *(f"figures/{name}" for name in OWN_FIGURES)):
            with suppress(NotADirectoryError):
                (folder / name).unlink(missing_ok=True)


def _train(job: Job, run: Run | None, stop: StopRequest, asked: Asked, ranks: Ranks) -> None:
    """Train a run to its end, or do a study, keeping the seeds that are already done.

    The folder is not touched before the run is known to start.
    """
    first, resumes = ranks.rank == 0, False
    if run is not None and (resumes := ranks.broadcast(asked.resume and (job.folder / "checkpoint.h5").exists())):
        run.resume()
    agreed(ranks, lambda: _begin(job, asked.quiet) if first else None)
    if run is None:
        run_study(job.plan, job.folder, job.label, stop, asked.quiet or not first, job.plain, ranks)
    else:
        if not resumes:
            run.start()
        run.train(stop)
    if first:
        _draw(job)


def _draw(job: Job) -> None:
    """Write the figures of a finished job, and the table of a study."""
    if job.study:
        write_study([job.folder], job.folder)
    else:
        write_figures(job.folder)


def _begin(job: Job, quiet: bool) -> None:
    """Mark the folder as that of an unfinished run, and print its name."""
    if not quiet:
        click.echo(f"{job.label}: results go to {job.folder}", err=True)
    (job.folder / "summary.json").unlink(missing_ok=True)
    _write_config(job)


def _drawn(job: Job) -> bool:
    """Tell whether the folder's figures show its present results, and not those of an earlier run."""
    figure = job.folder / "figures" / (LAST_STUDY_FIGURE if job.study else LAST_FIGURE)
    try:
        return figure.stat().st_mtime_ns >= (job.folder / "summary.json").stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _write_config(job: Job) -> None:
    """Write config.yml unless it already has exactly this content; someone may have edited it."""
    path, content = job.folder / "config.yml", dump_config(job.plan.config).encode()
    if not path.exists() or path.read_bytes() != content:
        write_file(path, content)


def _report(batches: list[list[Job]]) -> None:
    """Print one table of all results and one per study; draw a comparison of each config's runs if it has several."""
    alike = [[job for job in batch if job.study is kind] for batch in batches for kind in (True, False)]
    for jobs in filter(None, alike):
        # A run that could not begin has no config.yml, and a study that failed has no summary.json to draw.
        needed, home = "summary.json" if jobs[0].study else "config.yml", jobs[0].home
        folders = [job.folder for job in jobs if (job.folder / needed).exists()]
        if not folders:
            continue
        if jobs[0].study:
            click.echo(write_study(folders, home))
        elif len(jobs) > 1 or jobs[0].of_seeds:
            results = read_results(folders)
            write_comparison(results, home)
            if jobs[0].of_seeds:
                beside = [path.parent for each in ("", "*/") for path in home.glob(f"{each}seed-*/config.yml")]
                every = read_results(in_order(beside, home))
                write_file(home / "seeds.csv", seeds_table(every, results, home).encode())
    trained = [
        job.folder for batch in batches for job in batch if not job.study and (job.folder / "config.yml").exists()
    ]
    if trained:
        click.echo(comparison_table(read_results(trained)))
    for jobs in batches:
        click.echo(f"results: {jobs[0].home}")


def _command_to_resume() -> str:
    """Return the command line that started this process, with its launcher, and with --resume instead of --fresh.

    A script that changes a rule to mimic other code is named itself: `arraytp run` would go on without the change.
    """
    script, *words = sys.argv
    program = ["arraytp", words.pop(0)] if words[:1] == ["run"] else ["python", script]
    words = [word for word in words if not re.fullmatch(r"--(fresh|resume)", word)]
    processes, _ = launched()
    by_srun = os.environ.get("SLURM_STEP_NUM_TASKS") == str(processes)
    launcher = [] if processes == 1 else ["srun"] if by_srun else ["mpiexec", "-n", str(processes)]
    return shlex.join([*launcher, *program, "--resume", *words])
