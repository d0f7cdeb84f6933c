"""Plot the angle to BP's update and the test accuracy of several runs against seconds of training.

    python runs/benchmarks/angle_over_seconds.py DIR… --out FILE.png

Each DIR is a result folder, or a folder of them. Seconds are steps divided by the run's own steps per second
(summary.json), so evaluation and angles do not count. Runs are comparable if the machine was otherwise idle.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from arraytp.report.angles import has_angles, hidden_mean
from arraytp.report.figures import new_figure, save_figure
from arraytp.report.reading import Result, read_results
from arraytp.report.style import RC, looks


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    results = read_results(arguments.folders)
    with matplotlib.rc_context(RC):
        figure = new_figure(10, 4.2)
        angles, accuracy = figure.subplots(1, 2)
        for result, look in zip(results, looks(results), strict=True):
            style = {"color": look.colour, "linestyle": look.dash, "label": result.label, "markersize": 3.5}
            per_second, per_epoch = steps_per_second(result), steps_per_epoch(result)
            if has_angles(result):
                steps, mean = hidden_mean(result)
                angles.plot((steps + 1) / per_second, mean, **style)
            epochs = result.metrics["epoch"][1:]
            accuracy.plot(epochs * per_epoch / per_second, result.metrics["test_top1"][1:], marker="o", **style)
        finish(angles, "Angle to BP's update, mean of hidden blocks (°)")
        finish(accuracy, "Test top-1 (%)")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save_figure(figure, arguments.out)


def steps_per_second(result: Result) -> float:
    """Return the run's own steps per second."""
    if result.summary is None:
        raise SystemExit(f"{result.path}: has no summary.json: the run has not ended")
    return float(result.summary["steps_per_second"])


def steps_per_epoch(result: Result) -> float:
    """Return the steps per epoch of a finished run."""
    return float(result.summary["steps"]) / float(result.metrics["epoch"][-1])


def finish(axes: Axes, title: str) -> None:
    """Label the axes, with a logarithmic scale of seconds."""
    axes.set_xscale("log")
    axes.set(xlabel="seconds of training", title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
