"""Make the table and the figure of docs/results/field.md from the runs of runs/field/comparison.yml.

    python runs/benchmarks/field_comparison.py RESULTS [--figure FILE.png] [--steps 6]

RESULTS has a folder <variant>/seed-<n> for every run; unfinished runs are left out. Angles are means over the hidden
blocks, the measurements in the second half of the run, and the seeds. With `--steps`, steps of each rule alternate with
steps of BP; the ratios of their processor times on one thread go to comparison-steps.csv beside the config.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

# Steps are timed on one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from arraytp.config import Config, load_config
from arraytp.report.angles import BP, GNT, Reference, hidden_mean
from arraytp.report.figures import new_figure, save_figure
from arraytp.report.panels import angle_lines
from arraytp.report.reading import Result, read_result
from arraytp.report.style import RC, Look, looks
from arraytp.training.build import build

FIELD = Path(__file__).parents[1] / "field"
CONFIG, TRIALS, STEPS = (FIELD / name for name in ("comparison.yml", "comparison-trials.csv", "comparison-steps.csv"))
Runs = dict[str, list[Result]]


def main() -> None:
    """Print the table; draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    variants, runs = load_config(CONFIG).variants, ended(given.results)
    if given.steps:
        ratios = {name: cost(config, variants["bp"], given.steps) for name, config in variants.items()}
        STEPS.write_text("".join(f"{name},{ratio:.3f}\n" for name, ratio in ratios.items()), encoding="utf-8")
    trials = {row["variant"]: float(row["validation_top1"]) for row in rows(TRIALS) if row["chosen"]}
    costs = {row["variant"]: float(row["cost"]) for row in rows(STEPS, "variant", "cost")}
    print("| variant | rate | best trial (%) | seeds | test top-1 (%) | angle to BP (°) | to GNT (°) | step, × BP |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sorted(variants, key=lambda name: (-top1(runs.get(name)), -trials.get(name, 0))):
        results, values = runs.get(name, []), accuracies(runs.get(name, []))
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        cells = [name, f"{variants[name].optimizer.lr:g}", number(trials.get(name), ".1f"), str(len(values) or "")]
        cells += [number(top1(results) or None, ".2f") + spread]
        cells += [number(late(results, reference), ".1f") for reference in (BP, GNT)]
        print(f"| {' | '.join([*cells, number(costs.get(name), '.2f')])} |")
    if given.figure and runs:
        with matplotlib.rc_context(RC):
            save_figure(drawn(dict(sorted(runs.items(), key=lambda pair: -top1(pair[1]))), costs), given.figure)


def number(value: float | None, form: str) -> str:
    """Return a number as text, or nothing."""
    return "" if value is None or np.isnan(value) else format(value, form)


def rows(path: Path, *names: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file, which has a header unless `names` are given; no rows if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, names or None))


def ended(folder: Path) -> Runs:
    """Return the runs that have ended, by variant."""
    runs: Runs = {}
    for path in sorted(folder.glob("*/seed-*")):
        if (path / "summary.json").is_file():
            runs.setdefault(path.parent.name, []).append(read_result(path, path.parent.name))
    return runs


def top1(results: Sequence[Result] | None) -> float:
    """Return the mean test top-1; 0 without runs."""
    return float(np.mean(accuracies(results))) if results else 0.0


def accuracies(results: Sequence[Result]) -> list[float]:
    """Return test top-1 of every run at its end."""
    return [float(result.metrics["test_top1"][-1]) for result in results]


def late(results: Sequence[Result], reference: Reference) -> float:
    """Return the mean angle over the second half of the runs that were compared with `reference`; nan for BP to BP."""
    means = []
    for result in results:
        steps, angles = hidden_mean(result, reference)
        if angles.size and (result.rule != "bp" or reference is GNT) and not np.isnan(angles).all():
            means.append(float(np.nanmean(angles[steps >= steps[-1] / 2])))
    return float(np.mean(means)) if means else float("nan")


def cost(config: Config, bp: Config, steps: int) -> float:
    """Return the processor time of a rule's step divided by that of BP's, medians over alternating steps."""
    taken = stepper(config), stepper(bp)
    pairs = [[step() for step in taken] for _ in range(steps + 1)]
    own, other = np.median(pairs[1:], axis=0)
    return float(own / other)


def stepper(config: Config) -> Callable[[], float]:
    """Return a function that trains on one batch and returns its processor time in seconds."""
    experiment = build(config)
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = (array.copy() for array in next(batches))

    def step() -> float:
        started = time.process_time()
        experiment.step(images, labels)
        return time.process_time() - started

    return step


def drawn(runs: Runs, costs: dict[str, float]) -> matplotlib.figure.Figure:
    """Draw both angles of the first seed over the steps, and the accuracy and cost of every variant."""
    firsts = [results[0] for results in runs.values()]
    given = looks(firsts)
    figure = new_figure(11, 6 + 0.22 * len(runs))
    axes = figure.subplot_mosaic([["A"] * 3, ["B", "C", "D"]], height_ratios=[5, 1 + 0.22 * len(runs)])
    for letter, reference, of in (("A", BP, ", mean of the hidden blocks"), ("B", GNT, "")):
        angle_lines(axes[letter], firsts, given, reference)
        axes[letter].set_title(f"$\\bf{{{letter}}}$   Angle to {reference.name}'s update{of}")
    values = [accuracies(results) for results in runs.values()]
    bars(axes["C"], list(runs), [float(np.mean(each)) for each in values], given, "Test top-1 (%)")
    axes["C"].set_xlim(left=max(0, min(map(min, values)) - 5))
    bars(axes["D"], list(runs), [costs.get(name, np.nan) for name in runs], given, "Step, in steps of BP")
    axes["D"].set_xscale("log", subs=[1, 2, 5])
    axes["D"].set_xlim(left=0.5)
    axes["D"].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes["D"].xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes["C"].set_title("$\\bf{C}$   Test accuracy")
    axes["D"].set_title("$\\bf{D}$   Processor time per step")
    handles = [axes["C"].plot([], [], color=look.colour, linestyle=look.dash)[0] for look in given]
    figure.legend(handles, list(runs), loc="outside right center")
    return figure


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], given: Sequence[Look], label: str) -> None:
    """Draw a bar for each variant, the first on top, with its number."""
    places = -np.arange(len(names))
    axes.barh(places, values, color=[look.colour for look in given])
    for place, value in zip(places, values, strict=True):
        if np.isfinite(value):
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.set_xlabel(label)


if __name__ == "__main__":
    main()
