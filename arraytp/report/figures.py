"""Figures of result folders as PNG files: of one run, and of several compared."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arraytp.errors import UserError
from arraytp.files import write_file
from arraytp.report import panels
from arraytp.report.angles import GNT, common_blocks, has_angles, references
from arraytp.report.reading import Result, read_result, splits_of
from arraytp.report.seeds import averaged
from arraytp.report.style import RC, Look, legend_columns, literal, looks, rule_colour, wrapped
from arraytp.report.tables import csv_table, markdown_table

# With more epochs, accuracy is clearer over epochs than over steps.
_FEW_EPOCHS = 5
RUN_FIGURES = ("learning_curves.png", "angles_over_time.png", "feedback_angles.png", "angles_per_block.png")
LAST_FIGURE = RUN_FIGURES[-1]
"""Written last: if it exists, so do all other figures of the run."""
ELSEWHERE = "`arraytp report --out` draws elsewhere"
_TITLE_WIDTH = 76


def write_figures(result: Result | Path | str, out: Path | str | None = None) -> list[Path]:
    """Write one run's learning_curves.png, angles_per_block.png and, where measured, angles_over_time.png.

    If feedback weights were compared with forward weights, feedback_angles.png is written, too. The files go to the
    folder `out`, created if missing, or to `figures` in the result folder. Returns their paths. Raises UserError as
    `read_result` does, and also if a file cannot be written.
    """
    run = result if isinstance(result, Result) else read_result(result)
    folder = Path(out) if out is not None else run.path / "figures"
    makers = {"learning_curves.png": learning_curves}
    if any(has_angles(run, reference) for reference in references([run])):
        makers["angles_over_time.png"] = angles_over_time
    if not np.isnan(run.feedback["angle_deg"]).all():
        makers["feedback_angles.png"] = feedback_angles
    makers[LAST_FIGURE] = angles_per_block
    with matplotlib.rc_context(RC):
        return [save_figure(make(run), folder / name) for name, make in makers.items()]


def write_comparison(results: Sequence[Result], out: Path | str) -> list[Path]:
    """Write comparison.png, comparison.md and comparison.csv of several runs into the folder `out`; return the paths.

    Raises UserError if they cannot be written.
    """
    folder = Path(out)
    with matplotlib.rc_context(RC):
        picture = save_figure(comparison(results), folder / "comparison.png")
    markdown = write_bytes(markdown_table(results).encode(), folder / "comparison.md")
    table = write_bytes(csv_table(results).encode(), folder / "comparison.csv")
    return [picture, markdown, table]


def learning_curves(result: Result) -> Figure:
    """Draw loss and accuracy over the epochs, training dashed, test or validation solid."""
    figure = new_figure(9.6, 3.9, f"{literal(result.label)}: loss and accuracy")
    left, right = figure.subplots(1, 2)
    colour = rule_colour(result)
    curves = (("train", Look(colour, (0, (4, 1.5)))), (result.split, Look(colour)))
    drawn = [panels.epoch_line(left, result, look, f"{kind}_loss", kind) for kind, look in curves]
    panels.finish_epochs(left, [result], "loss", any(drawn))
    panels.fit_to_training(left)
    drawn = [
        panels.epoch_line(right, result, look, f"{kind}_top{k}", f"{kind} top-{k}", alpha)
        for k, alpha in ((1, 1.0), (5, 0.4))
        for kind, look in curves
    ]
    panels.finish_epochs(right, [result], "accuracy (%)", any(drawn))
    panels.fit_to_training(right)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def angles_per_block(result: Result) -> Figure:
    """Draw the mean angle to BP's update of every block."""
    figure = new_figure(7.2, 4.2, f"{literal(result.label)}: angle to BP's update per block, mean ± s.d.")
    axes = figure.subplots()
    panels.angle_bars(axes, [result], [Look(rule_colour(result))], result.blocks)
    axes.set_xlabel("block, from the input's to the output's")
    return figure


def angles_over_time(result: Result) -> Figure:
    """Draw the angle to BP's update, and to GNT's where measured, of every block over the training steps."""
    drawing = [partial(panels.block_lines, reference=reference) for reference in references([result])]
    return _over_time(result, "angle of the update", drawing)


def feedback_angles(result: Result) -> Figure:
    """Draw the angle between feedback and forward weights of every block over the training steps."""
    return _over_time(result, "angle of feedback to forward weights", [panels.feedback_lines])


def _over_time(result: Result, what: str, drawing: Sequence[Callable[[Axes, Result], None]]) -> Figure:
    figure = new_figure(2.2 + 5 * len(drawing), 4.2, f"{literal(result.label)}: {what} during training")
    named: dict[str, Any] = {}
    for axes, draw in zip(figure.subplots(1, len(drawing), squeeze=False)[0], drawing, strict=True):
        draw(axes, result)
        named |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if named:
        figure.legend(list(named.values()), list(named), loc="outside right center", title="block")
    return figure


def comparison(results: Sequence[Result]) -> Figure:
    """Draw panels of the angle over the steps (the largest), the angle per block, and accuracies over the epochs.

    If no run has more than a few epochs, training accuracy is drawn over the steps instead. If updates were also
    compared with GNT's, another panel shows that angle over the steps. Runs of several seeds are one line with a band
    of mean ± standard deviation.
    """
    results = [replace(result, label=literal(result.label)) for result in averaged(results)]
    given, blocks = looks(results), common_blocks(results)
    labels = [wrapped(result.label) for result in results]
    columns = legend_columns(labels, width=110)
    rows = -(-len(labels) // columns) * max((label.count("\n") + 1 for label in labels), default=1)
    figure = new_figure(10, 7.4 + 0.22 * rows)
    with_gnt = GNT in references(results)
    few = all(run.steps["step"].size > 1 and run.metrics["epoch"].size <= _FEW_EPOCHS + 1 for run in results)
    layout = f"{'AAEE' if with_gnt else 'AAAA'};{'BBCC' if few else 'BBCD'}"
    drawn = figure.subplot_mosaic(layout, height_ratios=[1.25, 1])
    panels.angle_lines(drawn["A"], results, given)
    if with_gnt:
        panels.angle_lines(drawn["E"], results, given, GNT)
    panels.angle_bars(drawn["B"], results, given, blocks)
    splits = splits_of(results)
    if few:
        panels.step_lines(drawn["C"], results, given)
    else:
        drawn["D"].sharey(drawn["C"])
        panels.epoch_lines(drawn["C"], results, given, "train_top1", "train top-1 (%)")
        panels.epoch_lines(drawn["D"], results, given, "{split}_top1", f"{splits} top-1 (%)")
        panels.fit_to_training(drawn["C"], drawn["D"])
    titles = {
        "A": "Angle to BP's update during training, mean of the hidden blocks",
        "B": "Angle to BP's update per block, mean ± s.d.",
        "C": f"Training accuracy; ring: {splits} accuracy at the end" if few else "Training accuracy",
        "D": f"{splits} accuracy".capitalize(),
    }
    if with_gnt:
        titles |= {"A": "Angle to BP's update, mean of hidden blocks", "E": "Angle to GNT's, mean of hidden blocks"}
    # The panels are lettered in reading order.
    for letter, (panel, axes) in zip("ABCDE", drawn.items(), strict=False):
        axes.set_title(f"$\\bf{{{letter}}}$   {titles[panel]}")
    example = drawn["C"]
    handles = [example.plot([], [], color=look.colour, linestyle=look.dash, linewidth=2.4)[0] for look in given]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure, sizes in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(wrapped(title, _TITLE_WIDTH), x=0.02, ha="left", fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path, remedy: str = ELSEWHERE) -> Path:
    """Write a figure as PNG with `write_bytes`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_bytes(buffer.getvalue(), path, remedy)


def write_bytes(content: bytes, path: Path, remedy: str = ELSEWHERE) -> Path:
    """Write a file, creating its folder if missing, and return its path; raise UserError with the remedy on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error
    return path
