"""`arraytp bench`: where the time of a training step goes, against this machine's peak rate of matrix products."""

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from arraytp.backend import Array
from arraytp.commands.shared_options import VARIANT, check_json, overriding, settings, write_json
from arraytp.commands.together import all_ranks, check_ranks, failing_together
from arraytp.config import load_config
from arraytp.data.loader import Batches
from arraytp.errors import NonFiniteError, UserError
from arraytp.model.blocks import block_flops
from arraytp.ranks import ALONE, Ranks, agreed
from arraytp.rules import RULES
from arraytp.rules.feedback import only_block
from arraytp.training.build import build_planned
from arraytp.training.compare import finite_blocks
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan, plan_variant
from arraytp.training.step import Step

PARTS = ("load", "forward", "feedback", "updates", "optimizer")
WARM_UP = 2
PEAK_SIZE, PEAK_ROUNDS = 2048, 5


@click.command(short_help="Time the steps of a config, part by part.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Steps to time.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file.")
@VARIANT
@overriding
def command(
    config: Path,
    steps: int,
    json_path: Path | None,
    variant: str | None,
    backend: str | None,
    dtype: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Time training steps of CONFIG, every variant in turn.

    Prints milliseconds by part, GFLOP/s of the matrix products, the fraction of what one large matrix product reaches
    on this machine, and peak memory. Under mpiexec or srun, also the share of a step that sums over ranks take.
    """
    if json_path is not None:
        check_json(json_path, "milliseconds")
    ranks, figures = all_ranks(), {}
    configs = load_config(config, settings(overrides, backend, dtype), variant).variants
    plans = agreed(
        ranks, lambda: {name or each.name: plan_variant(config, name, each) for name, each in configs.items()}
    )
    check_ranks(ranks, ranks, list(plans.values()))
    for name, planned in plans.items():
        with failing_together(ranks, name, limited=not planned.backend.on_host), warnings.catch_warnings():
            # `measure` reports weights that are not finite.
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                figures[name] = measure(planned, steps, ranks)
            except MemoryError as error:
                words = planned.backend.memory_words(error, planned.config.train.batch_size)
                raise UserError(f"{name}: {words}") from error
        if ranks.rank == 0:
            click.echo(_table(name, figures[name]))
    if json_path is not None and ranks.rank == 0:
        write_json(json_path, figures)


def measure(planned: Plan, steps: int, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Time training steps of a plan: median milliseconds of each part and their sum, rates, memory in MB.

    `ranks` share the steps. Times are this rank's, but those of sums are means over ranks; GFLOP/s are of all ranks.
    """
    config, sums = planned.config, _TimedSums(ranks, planned.backend.synchronize)
    experiment = build_planned(planned, ranks=sums if ranks.size > 1 else ranks)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    batch, epoch = min(config.train.batch_size, experiment.train_loader.count), 0
    while len(seconds["load"]) < steps + WARM_UP:
        with closing(experiment.train_loader.batches(epoch)) as batches:
            last = _time_epoch(experiment, batches, seconds, steps + WARM_UP, sums, batch)
        epoch += 1
    # Only weights are checked, which are the same on every rank.
    if not all(finite_blocks(experiment.network)):
        done = len(seconds["load"])
        raise NonFiniteError(f"{config.name}: not finite after {done} steps; a smaller optimizer.lr may help")
    medians = {part: statistics.median(values[WARM_UP:]) for part, values in seconds.items()}
    step = sum(medians.values())
    network = experiment.network
    rule = experiment.rule
    flops = sum(map(block_flops, network.blocks)) + rule.flops(config.rule, network)
    if rule.feedback is not None:
        flops += rule.feedback.flops(config.rule, network)
    rate, peak = batch * flops / step / 1e9, sum(ranks.gather(peak_rate(experiment))) / 1e9
    waited = statistics.median(sums.of_steps[WARM_UP:])
    waited, share = (statistics.fmean(values) for values in zip(*ranks.gather((waited, waited / step)), strict=True))
    return {
        "rule": config.rule.name,
        "batch": batch,
        "steps": steps,
        "milliseconds": {part: 1e3 * value for part, value in medians.items()} | {"step": 1e3 * step},
        "images_per_second": batch / step,
        "ranks": ranks.size,
        "sums": {"milliseconds": 1e3 * waited, "share": share, "per_step": sums.count / len(sums.of_steps)},
        "gflops": rate,
        "peak_gflops": peak,
        "feedback_gflops": _feedback_rates(experiment, last),
        "fraction_of_peak": rate / peak,
        "buffers_mb": experiment.workspace.nbytes() / 2**20,
        "peak_memory_mb": experiment.plan.backend.peak_memory() / 2**20,
        "threads": experiment.workspace.threads,
        "device": experiment.plan.backend.device(),
        "versions": experiment.plan.backend.versions(),
    }


def peak_rate(experiment: Experiment) -> float:
    """Return the floating-point operations per second of one large matrix product in the run's dtype and threads."""
    xp, dtype = experiment.plan.backend.xp, experiment.config.dtype
    a = xp.ones((PEAK_SIZE, PEAK_SIZE), dtype=dtype)
    b, out = xp.ones_like(a), xp.empty_like(a)
    seconds: dict[str, list[float]] = {"product": []}
    laps = _Laps(experiment, seconds)
    for _ in range(PEAK_ROUNDS):
        experiment.engine.product(a, b, out)
        laps.lap("product")
    return float(2 * PEAK_SIZE**3 / min(seconds["product"]))


def _feedback_rates(experiment: Experiment, step: Step) -> dict[str, float]:
    """Return GFLOP/s of the matrix products of feedback training on a batch, block by block.

    Without numbers for a closed form, whose products are not those of single blocks.
    """
    feedback, rates, options = experiment.rule.feedback, {}, cast(Any, experiment.config.rule)
    if feedback is None or feedback.expected(options):
        return {}
    for n, *_ in experiment.feedback_pairs():
        training = only_block(feedback.settings(options), n, len(experiment.network))
        alone = replace(options, feedback=training)
        flops = len(step.batch) * feedback.flops(alone, experiment.network)
        seconds: dict[str, list[float]] = {"feedback": []}
        laps = _Laps(experiment, seconds)
        experiment.train_feedback(step, alone)
        laps.lap("feedback")
        rates[experiment.network.blocks[n].label] = flops / seconds["feedback"][0] / 1e9
    return rates


class _Laps:
    """A stopwatch that waits for the device at the end of every part."""

    def __init__(self, experiment: Experiment, seconds: dict[str, list[float]]) -> None:
        self._synchronize, self._seconds = experiment.plan.backend.synchronize, seconds
        self._start = time.perf_counter()

    def lap(self, part: str) -> None:
        self._synchronize()
        now = time.perf_counter()
        self._seconds[part].append(now - self._start)
        self._start = now


class _TimedSums:
    """Ranks that time their sums, including the wait for the slowest rank."""

    def __init__(self, ranks: Ranks, synchronize: Callable[[], None]) -> None:
        self._ranks, self._synchronize = ranks, synchronize
        self.of_steps: list[float] = []
        self.count, self._seconds = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)

    def sum(self, *arguments: Any, **options: Any) -> None:
        self._time(self._ranks.sum, *arguments, **options)

    def begin_sum(self, buffer: Array) -> Callable[[], None]:
        # Does not wait for the device, whose work may overlap with the sum.
        self.count += 1
        return partial(self._time, self._ranks.begin_sum(buffer), counts=0)

    def exchange(self, *arguments: Any) -> None:
        self._time(self._ranks.exchange, *arguments)

    def _time(self, call: Callable[..., None], *arguments: Any, counts: int = 1, **options: Any) -> None:
        self._synchronize()
        started = time.perf_counter()
        call(*arguments, **options)
        self._synchronize()
        self._seconds += time.perf_counter() - started
        self.count += counts

    def lap(self) -> None:
        self.of_steps.append(self._seconds)
        self._seconds = 0.0


def _time_epoch(
    experiment: Experiment, batches: Batches, seconds: dict[str, list[float]], limit: int, sums: _TimedSums, batch: int
) -> Step:
    """Do training steps part by part, as `Experiment.step` does them, until the epoch or the limit ends.

    An epoch's last batch is left out if it has fewer than `batch` images. Returns the last step.
    """
    laps = _Laps(experiment, seconds)
    with experiment.steady():
        for size, (images, labels) in zip(experiment.train_loader.sizes(), batches, strict=True):
            if size < batch:
                break
            laps.lap("load")
            step = experiment.forward(images, labels, size)
            laps.lap("forward")
            experiment.train_feedback(step)
            laps.lap("feedback")
            updates = experiment.updates(step)
            laps.lap("updates")
            experiment.apply(step, updates)
            laps.lap("optimizer")
            sums.lap()
            if len(seconds["load"]) >= limit:
                break
    return step


def _table(name: str, figures: dict[str, Any]) -> str:
    times = figures["milliseconds"]
    lines = [f"{name} ({figures['rule']}): batch {figures['batch']}, median of {figures['steps']} steps"]
    shown = [part for part in PARTS if part != "feedback" or RULES[figures["rule"]].feedback]
    lines += [f"  {part:10} {times[part]:9.2f} ms {100 * times[part] / times['step']:6.1f} %" for part in shown]
    lines.append(f"  {'step':10} {times['step']:9.2f} ms {figures['images_per_second']:10,.0f} images/s")
    if figures["ranks"] > 1:
        sums = figures["sums"]
        share = f"{sums['milliseconds']:9.2f} ms {100 * sums['share']:6.1f} %, waiting included"
        lines.append(f"  {'of it sums':10} {share}; {sums['per_step']:.3g} per step, over {figures['ranks']} ranks")
    lines.append(
        f"  {figures['gflops']:.0f} GFLOP/s in matrix products, {100 * figures['fraction_of_peak']:.0f} % of the "
        f"{figures['peak_gflops']:.0f} of one large product ({figures['threads']} threads, {figures['device']})"
    )
    lines += [
        f"  feedback of {label:8} {rate:5.0f} GFLOP/s, {100 * rate / figures['peak_gflops']:3.0f} %"
        for label, rate in figures["feedback_gflops"].items()
    ]
    lines.append(
        f"  buffers {figures['buffers_mb']:.0f} MB, peak memory of the process {figures['peak_memory_mb']:.0f} MB"
    )
    return "\n".join(lines)
