"""The panels of figures: each draws results into given axes, with gaps where a number is undefined."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from arraytp.report.angles import BP, SHOWN_AS_ZERO, Reference, block_angles, block_series, has_angles, hidden_mean
from arraytp.report.reading import Result
from arraytp.report.seeds import over_seeds
from arraytp.report.style import NOTE_COLOUR, Look, note, shades, wrapped

_MOST_MARKED = 30
_MOST_RAW = 80
_MANY_EPOCHS = 10
_RIGHT_ANGLE = 90.0

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"Places and values of a line."


def angle_bars(axes: Axes, results: Sequence[Result], looks: Sequence[Look], blocks: Sequence[str]) -> None:
    """Draw each block's mean angle and standard deviation over the run, one bar per run."""
    shown = [(result, look) for result, look in zip(results, looks, strict=True) if has_angles(result)]
    if not shown:
        note(axes, _no_angles(results))
        return
    width = 0.8 / max(len(shown), 1.3)
    highest = 0.0
    summaries = [block_angles(result) for result, _ in shown]
    for n, ((result, look), angles) in enumerate(zip(shown, summaries, strict=True)):
        means = np.array([angle.mean for angle in angles])
        deviations = np.array([angle.deviation for angle in angles])
        places = np.arange(len(angles)) + width * (n + 0.5 - len(shown) / 2)
        axes.bar(places, means, width * 0.92, color=look.colour, label=result.label)
        error: dict[str, Any] = {"elinewidth": 1.0, "capsize": min(30 * width / len(blocks), 4), "capthick": 1.0}
        axes.errorbar(places, means, deviations, fmt="none", ecolor="#444444", **error)
        for place in places[np.isnan(means)]:
            axes.text(place, 1, "undefined", rotation=90, ha="center", va="bottom", color=look.colour, fontsize=8)
        highest = max(highest, *np.nan_to_num(means + np.nan_to_num(deviations)))
    for n in range(len(blocks)):
        if all(angles[n].mean < SHOWN_AS_ZERO for angles in summaries if n < len(angles)):
            axes.annotate("0°", (n, 0), (0, 3), textcoords="offset points", ha="center", color=NOTE_COLOUR, fontsize=9)
    axes.set_xticks(range(len(blocks)), blocks)
    if sum(len(block) + 2 for block in blocks) > 44:
        axes.tick_params(axis="x", labelrotation=40)
    axes.grid(visible=False, axis="x")
    axes.set(xlim=(-0.6, len(blocks) - 0.4), ylabel=_to(BP))
    _angle_limits(axes, highest)


def angle_lines(axes: Axes, results: Sequence[Result], looks: Sequence[Look], reference: Reference = BP) -> None:
    """Draw the mean angle of the hidden blocks over the training steps, one line per run."""
    shown = [(result, look) for result, look in zip(results, looks, strict=True) if has_angles(result, reference)]
    series = [(hidden_mean(result, reference), look, result.label) for result, look in shown]
    _draw_angles(axes, series, _no_angles(results, reference), _to(reference))
    for result, look in shown:
        if result.seeds:
            _band(axes, [hidden_mean(run, reference) for run in result.seeds], look)


def block_lines(axes: Axes, result: Result, reference: Reference = BP) -> None:
    """Draw one run's angle over the training steps, one line per block."""
    looks = [Look(colour) for colour in shades(len(result.blocks))]
    named = enumerate(zip(looks, result.blocks, strict=True))
    series = [(block_series(result, n, reference), look, label) for n, (look, label) in named]
    shown = series if has_angles(result, reference) else []
    _draw_angles(axes, shown, _no_angles([result], reference), _to(reference))


def feedback_lines(axes: Axes, result: Result) -> None:
    """Draw one run's angle between feedback and forward weights over the training steps, one line per block."""
    looks, table = [Look(colour) for colour in shades(len(result.blocks))], result.feedback
    series = [
        ((table["step"][rows], table["angle_deg"][rows]), looks[n], result.blocks[n])
        for n in map(int, np.unique(table["block"]))
        if not np.isnan(table["angle_deg"][rows := table["block"] == n]).all()
    ]
    _draw_angles(axes, series, "not measured", "angle of feedback to forward weight (°)")


def _draw_angles(axes: Axes, series: Sequence[tuple[Series, Look, str]], empty: str, ylabel: str) -> None:
    defined = [angles[~np.isnan(angles)] for (_, angles), _, _ in series]
    undefined = [label for angles, (_, _, label) in zip(defined, series, strict=True) if not angles.size]
    gap = f"undefined at every step: {', '.join(undefined)}"
    if len(undefined) == len(series):
        note(axes, wrapped(gap) if undefined else empty)
        return
    for (steps, angles), look, label in series:
        _draw_series(axes, steps, angles, look, label)
    axes.set(xlabel="training step", ylabel=ylabel)
    _number_steps(axes)
    _angle_limits(axes, max(angles.max() for angles in defined if angles.size))
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    if undefined:
        axes.text(0.01, 0.04, wrapped(gap), transform=axes.transAxes, color=NOTE_COLOUR, fontsize=8)


def _number_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw_series(axes: Axes, steps: NDArray[np.float64], angles: NDArray[np.float64], look: Look, label: str) -> None:
    """Draw a line; if there are many measurements, draw it pale, with their running mean on top."""
    marker = "o" if steps.size <= _MOST_MARKED else ""
    if steps.size <= _MOST_RAW:
        axes.plot(steps, angles, color=look.colour, linestyle=look.dash, marker=marker, markersize=3.5, label=label)
        return
    axes.plot(steps, angles, color=look.colour, linewidth=0.6, alpha=0.3)
    mean = running_mean(angles, steps.size // 40, apart=steps[0] == 0)
    axes.plot(steps, mean, color=look.colour, linestyle=look.dash, label=label)


def running_mean(values: NDArray[np.float64], reach: int, apart: bool = False) -> NDArray[np.float64]:
    """Return the mean of each value and the defined ones among `reach` neighbours on either side; NaN stays NaN.

    With `apart` the first value stays as it is and counts for no other: angles at step 0 are of untrained feedback.
    """
    first, window, defined = int(apart), np.ones(2 * reach + 1), np.isfinite(values)
    counted = defined & (np.arange(values.size) >= first)
    total = np.convolve(np.where(counted, values, 0.0), window, mode="full")[reach : reach + values.size]
    count = np.convolve(counted, window, mode="full")[reach : reach + values.size]
    return np.concatenate([values[:first], np.where(defined, total / np.maximum(count, 1), np.nan)[first:]])


def epoch_lines(axes: Axes, results: Sequence[Result], looks: Sequence[Look], column: str, ylabel: str) -> None:
    """Draw a column of metrics.csv over the epochs, one line per run; {split} in it is the run's evaluation split."""
    # Where one run is long, the marks of a short one would run into each other.
    marked = all(result.metrics["epoch"].size <= _MOST_MARKED for result in results)
    drawn = [
        epoch_line(axes, result, look, column.format(split=result.split), result.label, marked=marked)
        for result, look in zip(results, looks, strict=True)
    ]
    finish_epochs(axes, results, ylabel, any(drawn))


def step_lines(axes: Axes, results: Sequence[Result], looks: Sequence[Look]) -> None:
    """Draw training accuracy over the steps, one line per run, and its last test or validation accuracy as a ring."""
    for result, look in zip(results, looks, strict=True):
        steps, last = result.steps["step"], (result.summary or {}).get("steps", np.nan)
        _draw_series(axes, steps, result.steps["train_top1"], look, result.label)
        if result.seeds:
            _band(axes, [(run.steps["step"], run.steps["train_top1"]) for run in result.seeds], look)
        style: dict[str, Any] = {"facecolors": "none", "edgecolors": look.colour, "linewidths": 2, "zorder": 3}
        axes.scatter(last, result.metrics[f"{result.split}_top1"][-1:], s=60, clip_on=False, **style)
    axes.set(xlabel="training step", ylabel="top-1 (%)")
    _number_steps(axes)


def epoch_line(
    axes: Axes, result: Result, look: Look, column: str, label: str, alpha: float = 1.0, marked: bool = True
) -> bool:
    """Draw one column of one run; return whether there was anything to draw."""
    epochs, values = result.metrics["epoch"], result.metrics[column]
    if np.isnan(values).all():
        return False
    marker = "o" if marked and epochs.size <= _MOST_MARKED else ""
    style: dict[str, Any] = {"linestyle": look.dash, "marker": marker, "markersize": 3.5, "alpha": alpha}
    axes.plot(epochs, values, color=look.colour, label=label, **style)
    if result.seeds:
        _band(axes, [(run.metrics["epoch"], run.metrics[column]) for run in result.seeds], look)
    return True


def _band(axes: Axes, series: Sequence[Series], look: Look) -> None:
    """Draw mean ± standard deviation of one line's values over seeds."""
    mean, deviation = over_seeds([values for _, values in series])
    places = series[0][0][: len(mean)]
    axes.fill_between(places, mean - deviation, mean + deviation, color=look.colour, alpha=0.2, linewidth=0)


def finish_epochs(axes: Axes, results: Sequence[Result], ylabel: str, drawn: bool) -> None:
    """Label the axes over epochs, or note that there is nothing to draw."""
    if not drawn:
        note(axes, "not measured")
        return
    last = max(max(result.metrics["epoch"], default=0.0) for result in results)
    margin = max(0.03 * last, 0.1 if last else 0.6)
    axes.set(xlabel="epoch", ylabel=ylabel, xlim=(-margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def fit_to_training(*panels: Axes) -> None:
    """Fit the y axis of one panel, or the one that several share, to the values after epoch 0.

    That is done over many epochs if the untrained network's values would take up more than half of the axis, and no
    run has only those.
    """
    lines = [np.asarray(line.get_xydata()) for axes in panels for line in axes.lines]
    bands = [np.asarray(path.vertices) for axes in panels for band in axes.collections for path in band.get_paths()]
    defined = [points[np.isfinite(points).all(axis=1)] for points in (*lines, *bands)]
    if not lines or any(points[:, 0].max(initial=0) <= 0 for points in defined):
        return
    epochs, values = np.concatenate(defined).T
    trained = values[epochs > 0]
    span = np.ptp(trained)
    if epochs.max() >= _MANY_EPOCHS and 0 < span < np.ptp(values) / 2:
        panels[0].set_ylim(trained.min() - 0.05 * span, trained.max() + 0.05 * span)


def _to(reference: Reference) -> str:
    return f"angle to {reference.name}'s update (°)"


def _no_angles(results: Sequence[Result], reference: Reference = BP) -> str:
    only_bp = reference is BP and results and all(result.rule == "bp" for result in results)
    return "0° by definition: this is BP" if only_bp else "not measured"


def _angle_limits(axes: Axes, highest: float) -> None:
    """Start the axis at 0°; if angles come near 90°, mark it as the angle of an unrelated update."""
    if highest <= 0.55 * _RIGHT_ANGLE:
        axes.set_ylim(0, max(highest * 1.1, 1.0))
        return
    axes.set_ylim(0, max(highest + 8, 98))
    axes.axhline(_RIGHT_ANGLE, color="#999999", linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)
    style: dict[str, Any] = {"color": NOTE_COLOUR, "fontsize": 8, "ha": "right", "va": "bottom", "zorder": 5}
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(1, max(_RIGHT_ANGLE, highest) + 1.5, "90°: unrelated", transform=axes.get_yaxis_transform(), **style)
