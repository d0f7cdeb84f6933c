"""Studies of several seeds: feedback trained alone on one batch, θ random and frozen (DTP paper, Sections 5.1 and 5.2).

For a study of kind drift, every seed runs `arraytp.training.drift`. For a study of kind feedback, every seed runs

    θ random, [biases 0], one batch of train.batch_size images
    for round = 1 … rounds: the rule trains its feedback on the batch, rule.feedback.iterations at a time

and writes to `seed-<n>` of the result folder, with steps counted in iterations: feedback.csv, the angle and relative
distance between ω and θ before the first and after every round (the Jacobian matching condition, Figure 2); angles.csv,
the angle between the rule's updates and BP's before the first and after the last round (the gradient matching property,
Figure 3); and summary.json when the seed is done. The folder's own summary.json collects all seeds.
"""

import json
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arraytp import __version__
from arraytp.backend import Array
from arraytp.config import dump_config
from arraytp.config.difference import FREE_IN_A_STUDY, config_of, first_difference
from arraytp.errors import Interrupted, NonFiniteError, UserError
from arraytp.files import write_json
from arraytp.optim import at_block
from arraytp.ranks import ALONE, Ranks
from arraytp.signals import StopRequest
from arraytp.training.build import build_planned
from arraytp.training.compare import is_finite
from arraytp.training.drift import drift_seed
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan
from arraytp.training.progress import Progress
from arraytp.training.step import Step
from arraytp.training.tables import ANGLES_COLUMNS, FEEDBACK_COLUMNS, GNT_COLUMNS, CsvTable


def run_study(
    planned: Plan,
    folder: Path,
    label: str,
    stop: StopRequest,
    quiet: bool = False,
    plain: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Run every seed that is not done yet, and write summary.json; the folder must exist.

    A seed's numbers depend on the config alone, so a seed that was stopped halfway is simply run again. Each rank runs
    its own seeds, and the first rank writes summary.json.

    Raises Interrupted when a stop was requested, keeping the seeds done so far; NonFiniteError if feedback weights
    diverge or, in a study of drift, the loss does; and UserError if the summary of a finished seed is damaged.
    """
    study = planned.config.study
    if study is None:
        raise ValueError("the config has no section study")
    own, stopped, called = {}, 0, label
    for n in range(ranks.rank, study.seeds, ranks.size):
        place, seeded = _seed_folder(folder, n), _of_seed(planned, n)
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: is a file, but a seed's results need a folder; delete it")
        if not (place / "summary.json").exists():
            place.mkdir(exist_ok=True)
            started, called = time.monotonic(), f"{label} seed {n + 1}/{study.seeds}"
            do_seed = drift_seed if study.kind == "drift" else _seed
            try:
                measured = stop.at_once(partial(do_seed, seeded, place, called, quiet, plain))
            except Interrupted as error:
                stopped = error.signal_number
                break
            except NonFiniteError as error:
                # The path names variant and seed.
                raise type(error)(f"{place}: {error}") from None
            of_seed = {"seed": seeded.config.seed, "config": dump_config(seeded.config), "data": seeded.dataset.digest}
            of_seed |= {**measured, "seconds": round(time.monotonic() - started, 1)}
            write_json(place / "summary.json", of_seed)
        own[n] = _read_seed(place / "summary.json", seeded)
    outcomes = ranks.gather((own, stopped, called))
    for _, number, where in outcomes:
        if number:
            raise Interrupted(f"{where}: stopped; the seeds before it are done", number)
    done = dict(sorted(each for seeds, *_ in outcomes for each in seeds.items()))
    if ranks.rank:
        return
    config = planned.config
    summary = {
        "name": config.name,
        "rule": config.rule.name,
        "kind": study.kind,
        "blocks": [block.label for block in planned.blocks],
        "seeds": list(done.values()),
        "seconds": sum(seed["seconds"] for seed in done.values()),
        "versions": {"arraytp": __version__, **planned.backend.versions()},
        "device": planned.backend.device(),
    }
    write_json(folder / "summary.json", summary)


def check_seeds_done(planned: Plan, folder: Path) -> None:
    """Refuse to continue a study if a finished seed is damaged or has another config or other data.

    The UserError names the file and what differs.
    """
    assert planned.config.study is not None
    for n in range(planned.config.study.seeds):
        path = _seed_folder(folder, n) / "summary.json"
        if path.exists():
            _read_seed(path, _of_seed(planned, n))


def _seed_folder(folder: Path, n: int) -> Path:
    return folder / f"seed-{n}"


def _of_seed(planned: Plan, n: int) -> Plan:
    return replace(planned, config=replace(planned.config, seed=planned.config.seed + n))


def _seed(planned: Plan, folder: Path, label: str, quiet: bool, plain: bool) -> dict[str, Any]:
    """Train feedback on one seed's batch, write its tables and return the entries of its summary."""
    experiment = build_planned(planned, plain)
    with experiment.steady():
        return _studied(experiment, folder, label, quiet)


def _studied(experiment: Experiment, folder: Path, label: str, quiet: bool) -> dict[str, Any]:
    study = experiment.config.study
    assert study is not None
    if not study.biases:
        for bias in experiment.network.biases:
            bias.fill(0)
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches)
    angles = CsvTable(folder / "angles.csv", ANGLES_COLUMNS + (GNT_COLUMNS if experiment.against_gnt else ()))
    feedback = CsvTable(folder / "feedback.csv", FEEDBACK_COLUMNS)
    angles.restart([])
    feedback.restart([])
    step = experiment.forward(images, labels)
    _measure_updates(experiment, step, angles, 0)
    losses = _measure_feedback(experiment, [], feedback, 0)
    per_round = _most_iterations(experiment)
    # Rounds without iterations would all have the same step in the tables.
    rounds = study.rounds if per_round else 0
    with Progress(label, 1, max(rounds, 1), quiet=quiet) as progress:
        for round_ in range(1, rounds + 1):
            losses = _measure_feedback(experiment, experiment.train_feedback(step), feedback, round_ * per_round)
            progress.step(len(labels))
    if rounds:
        _measure_updates(experiment, step, angles, rounds * per_round)
    for table in (angles, feedback):
        table.keep()
    last = [row.split(",") for row in angles.rows[-len(experiment.network.blocks) :]]
    pairs = experiment.compare_feedback(losses)
    return {
        "update_angle_deg": [float(row[3]) for row in last],
        "feedback_block": [pair.block for pair in pairs],
        "feedback_angle_deg": [pair.angle_deg for pair in pairs],
        "feedback_distance": [pair.distance for pair in pairs],
    }


def _most_iterations(experiment: Experiment) -> int:
    """Return the number of iterations per round of the block that has the most."""
    assert experiment.rule.feedback is not None
    training = experiment.rule.feedback.settings(experiment.config.rule)
    blocks = len(experiment.feedback_pairs())
    return max((int(at_block(training.iterations, n)) for n in range(blocks)), default=0)


def _measure_updates(experiment: Experiment, step: Step, table: CsvTable, iterations: int) -> None:
    for each in experiment.compare(step, experiment.updates(step)):
        table.append(iterations, 0, *each.numbers)


def _measure_feedback(
    experiment: Experiment, losses: list[Array | None], table: CsvTable, iterations: int
) -> list[Array | None]:
    """Add the rows of a round; NonFiniteError for diverged feedback."""
    for pair, (_, omega, _) in zip(experiment.compare_feedback(losses), experiment.feedback_pairs(), strict=True):
        if not is_finite(omega):
            raise NonFiniteError(
                f"feedback of block {pair.block} diverged within {iterations} iterations; a smaller "
                "rule.feedback.optimizer.lr may help"
            )
        table.append(iterations, 0, *pair.numbers)
    return losses


def _read_seed(path: Path, planned: Plan) -> dict[str, Any]:
    """Read the summary of a finished seed, without its config and digest; refuse one that does not fit the plan."""
    blocks = len(planned.blocks)
    try:
        seed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(seed, dict) or not seed.keys() >= {"update_angle_deg", "seconds"}:
            raise ValueError("not an object with update_angle_deg and seconds")
        shape = np.array(seed["update_angle_deg"], np.float64).shape
        if shape != (blocks,):
            raise ValueError(f"update_angle_deg has the shape {shape}, not ({blocks},)")
        seed["seconds"] = float(seed["seconds"])
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}; delete it, and --resume does the seed again") from error
    # Summaries of earlier versions record neither config nor data.
    stored, digest = seed.pop("config", None), seed.pop("data", planned.dataset.digest)
    if stored is None and not (owner := path.parents[1] / "config.yml").exists():
        raise UserError(f"{path}: does not say which config it is of, and {owner} is missing; --fresh starts over")
    there = config_of(str(stored), f"{path}: its config") if stored is not None else planned.config
    if difference := first_difference(there, planned.config, FREE_IN_A_STUDY):
        raise UserError(f"{path}: is of another config ({difference}); --fresh starts over")
    if digest != planned.dataset.digest:
        data = planned.config.data.dataset
        raise UserError(f"{path}: is of other images or labels than {data} holds now; --fresh starts over")
    return seed
