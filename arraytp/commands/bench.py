"""`arraytp bench`: where the time of a training step goes, against what this machine's matrix product could do."""

import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from arraytp.config import Config, load_config
from arraytp.data.loader import Batches
from arraytp.errors import UserError
from arraytp.experiment import Experiment, build
from arraytp.fused import forward, product
from arraytp.network import block_flops
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward

PARTS = ("load", "forward", "loss", "updates", "optimizer")
WARM_UP = 2
PEAK_SIZE, PEAK_ROUNDS = 2048, 5


@click.command(short_help="Time the steps of a config, part by part.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Steps to time.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file, too.")
@click.option("--backend", type=click.Choice(["numpy", "cupy"]), help="Array module; overrides the config.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Number format; overrides the config.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Override any key; repeatable.")
def command(
    config: Path, steps: int, json_path: Path | None, backend: str | None, dtype: str | None, overrides: tuple[str, ...]
) -> None:
    """Time training steps of CONFIG, every variant in turn.

    Prints milliseconds by part, GFLOP/s of the matrix products, the fraction of what one large matrix product reaches
    on this machine, and peak memory.
    """
    settings = [*overrides]
    settings += [f"backend={backend}"] if backend else []
    settings += [f"dtype={dtype}"] if dtype else []
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise UserError(f"--json {json_path}: there is no folder {json_path.parent}")
    figures = {}
    for name, variant in load_config(config, settings).variants.items():
        figures[name or variant.name] = measured = measure(variant, steps)
        click.echo(_table(name or variant.name, measured))
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Time training steps of a config.

    Parameters
    ----------
    config : Config
    steps : int

    Returns
    -------
    dict
        Median milliseconds of each part and of the step, images/s, GFLOP/s, that of one large product, memory in MB.
    """
    experiment = build(config)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    epoch = 0
    while len(seconds["load"]) < steps + WARM_UP:
        with closing(experiment.train_loader.batches(epoch)) as batches:
            _time_epoch(experiment, batches, seconds, steps + WARM_UP)
        epoch += 1
    medians = {part: statistics.median(values[WARM_UP:] or values) for part, values in seconds.items()}
    step = sum(medians.values())
    batch = min(config.train.batch_size, experiment.train_loader.count)
    network = experiment.network
    flops = sum(block_flops(block) for block in network.blocks) + experiment.rule.product_flops(config.rule, network)
    rate, peak = batch * flops / step / 1e9, peak_rate(experiment) / 1e9
    return {
        "rule": config.rule.name,
        "batch": batch,
        "steps": steps,
        "milliseconds": {part: 1e3 * value for part, value in medians.items()} | {"step": 1e3 * step},
        "images_per_second": batch / step,
        "gflops": rate,
        "peak_gflops": peak,
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
        product(a, b, out, experiment.workspace)
        laps.lap("product")
    return float(2 * PEAK_SIZE**3 / min(seconds["product"]))


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


def _time_epoch(experiment: Experiment, batches: Batches, seconds: dict[str, list[float]], limit: int) -> None:
    """Do training steps part by part, as `Experiment.step` does them, until the epoch or the limit ends."""
    config, network, workspace = experiment.config, experiment.network, experiment.workspace
    laps = _Laps(experiment, seconds)
    for images, labels in batches:
        laps.lap("load")
        experiment.passed = passed = forward(network, images, workspace)
        laps.lap("forward")
        _, cache = cross_entropy_forward(passed.logits, labels, config.loss.reduction)
        dlogits = cross_entropy_backward(cache, config.loss.reduction)
        laps.lap("loss")
        experiment.updates = experiment.rule.updates(
            config.rule, experiment.rule_state, network, passed, dlogits, workspace
        )
        experiment.proposed = True
        laps.lap("updates")
        experiment.apply()
        laps.lap("optimizer")
        if len(seconds["load"]) >= limit:
            return


def _table(name: str, figures: dict[str, Any]) -> str:
    times = figures["milliseconds"]
    lines = [f"{name} ({figures['rule']}): batch {figures['batch']}, median of {figures['steps']} steps"]
    lines += [f"  {part:10} {times[part]:9.2f} ms {100 * times[part] / times['step']:6.1f} %" for part in PARTS]
    lines.append(f"  {'step':10} {times['step']:9.2f} ms {figures['images_per_second']:10,.0f} images/s")
    lines.append(
        f"  {figures['gflops']:.0f} GFLOP/s in matrix products, {100 * figures['fraction_of_peak']:.0f} % of the "
        f"{figures['peak_gflops']:.0f} of one large product ({figures['threads']} threads, {figures['device']})"
    )
    lines.append(
        f"  buffers {figures['buffers_mb']:.0f} MB, peak memory of the process {figures['peak_memory_mb']:.0f} MB"
    )
    return "\n".join(lines)
