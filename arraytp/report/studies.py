"""Tables and figures of studies: feedback trained alone, θ frozen, several seeds (see `arraytp.training.study`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from arraytp.disk import real
from arraytp.errors import UserError
from arraytp.report.angles import common_labels
from arraytp.report.figures import new_figure, save_figure, write_bytes
from arraytp.report.reading import Columns, read_csv
from arraytp.report.seeds import deviation, over_seeds
from arraytp.report.style import RC, RULE_COLOURS, literal, shades
from arraytp.training.tables import DRIFT_COLUMNS, FEEDBACK_COLUMNS

Floats = NDArray[np.float64]
STUDY_FIGURES = ("alignment.png", "drift.png", "updates.png")
LAST_STUDY_FIGURE = STUDY_FIGURES[-1]
"""Written last: if it exists, so do all other files of the study."""
AGAIN = "--resume draws it again"


@dataclass(frozen=True)
class StudyResult:
    """The contents of a study's folder.

    `updates` (seeds, N) is the angle between the rule's and BP's update of every block, in degrees, after the last
    round. `angle` and `distance` (seeds, R, blocks with feedback) are those between ω and θ after each number of
    `iterations` (R,), NaN where there is nothing to compare. In a study of drift they are the angle to BP's update and
    the drift ‖WWᵀ − I‖/√K of all blocks, and `iterations` are training steps.
    """

    label: str
    blocks: list[str]
    updates: Floats
    iterations: Floats
    angle: Floats
    distance: Floats
    feedback_blocks: list[int]
    seconds: float
    drift: bool = False
    rule: str = ""


def write_study(folders: Sequence[Path], out: Path) -> str:
    """Write the table and the figures of one or several studies into the folder `out`; return the table.

    The files are study.md, figures/updates.png and, where there is something to draw, figures/alignment.png and
    figures/drift.png. Raises UserError if a folder's files are missing or damaged, or if the new ones cannot be
    written.
    """
    studies = _alike([read_study(folder) for folder in folders])
    table = study_table(studies)
    write_bytes(f"{table}\n".encode(), out / "study.md", AGAIN)
    with matplotlib.rc_context(RC):
        feedback, drifts = ([s for s in studies if s.drift is kind] for kind in (False, True))
        if any(np.isfinite(study.angle).any() and len(study.iterations) > 1 for study in feedback):
            save_figure(alignment_figure(feedback), out / "figures" / "alignment.png", AGAIN)
        if drifts:
            save_figure(drift_figure(drifts), out / "figures" / "drift.png", AGAIN)
        save_figure(update_figure(studies), out / "figures" / LAST_STUDY_FIGURE, AGAIN)
    return table


def _alike(studies: Sequence[StudyResult]) -> list[StudyResult]:
    """Pad `updates` with NaN, so that all studies have the same number of blocks."""
    count = max(len(study.blocks) for study in studies)
    return [
        replace(study, updates=np.pad(study.updates, ((0, 0), (0, count - len(study.blocks))), constant_values=np.nan))
        for study in studies
    ]


def read_study(folder: Path) -> StudyResult:
    """Read a study's folder; an error names the damaged file."""
    summary, updates = _read_summary(folder / "summary.json")
    drift = summary.get("kind") == "drift"
    file, columns = ("drift.csv", DRIFT_COLUMNS) if drift else ("feedback.csv", FEEDBACK_COLUMNS)
    tables = _read_tables([folder / f"seed-{n}" / file for n in range(len(updates))], columns)
    blocks = np.unique(tables[0]["block"]).astype(int).tolist()
    angle, distance = (
        np.stack([table[name].reshape(-1, len(blocks)) for table in tables])
        for name in ("angle_deg", "drift_rms" if drift else "distance")
    )
    return StudyResult(
        label=real(folder).name,
        blocks=summary["blocks"],
        updates=updates,
        iterations=tables[0]["step"][:: len(blocks)],
        angle=angle,
        distance=distance,
        feedback_blocks=blocks,
        seconds=summary["seconds"],
        drift=drift,
        rule=str(summary.get("rule", "")),
    )


def _read_summary(path: Path) -> tuple[dict[str, Any], Floats]:
    """Return a study's summary and its angles of updates (seeds, N)."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or not summary.keys() >= {"blocks", "seeds", "seconds"}:
            raise ValueError("not an object with blocks, seeds and seconds")
        updates = np.array([seed["update_angle_deg"] for seed in summary["seeds"]], dtype=np.float64)
        if updates.ndim != 2 or updates.shape[1] != len(summary["blocks"]):
            raise ValueError(f"update_angle_deg has the shape {updates.shape}, blocks is {summary['blocks']}")
        summary["seconds"] = float(summary["seconds"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}; delete it, and --resume writes it again") from error
    return summary, updates


def _read_tables(paths: list[Path], columns: Sequence[str]) -> list[Columns]:
    """Return the tables of all seeds, which must have the same steps and blocks."""
    tables = []
    for path in paths:
        remedy = f"delete {path.parent}, and --resume does the seed again"
        try:
            tables.append(read_csv(path, columns, ("step", "block"), unfinished=False))
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        rows, first = len(tables[-1]["step"]), len(tables[0]["step"])
        if not rows:
            raise UserError(f"{path}: is missing or has no rows; {remedy}")
        steps, blocks = (len(np.unique(tables[-1][key])) for key in ("step", "block"))
        if rows != steps * blocks:
            raise UserError(f"{path}: {rows} rows, not {blocks} blocks at each of {steps} steps; {remedy}")
        if any(not np.array_equal(tables[-1][key], tables[0][key]) for key in ("step", "block")):
            raise UserError(
                f"{path}: {rows} rows, not those of {paths[0]}, which has {first}; delete the damaged one's folder, "
                "and --resume does the seed again"
            )
    return tables


def study_table(studies: Sequence[StudyResult]) -> str:
    """Return a Markdown table with one row per study, mean ± standard deviation over the seeds."""
    blocks = common_labels([study.blocks for study in studies])
    kinds = {study.drift for study in studies}
    last = ["ω to θ, last block (°)", "distance"]
    if kinds == {True}:
        last = ["last block (°)", "its drift"]
    elif True in kinds:
        last = ["last block, ω to θ or of drift (°)", "distance or drift"]
    head = ["study", "seeds", *(f"update {label} (°)" for label in blocks), *last, "s"]
    rows = [
        [
            study.label.replace("|", "\\|"),
            str(len(study.updates)),
            *(_mean(study.updates[:, n]) for n in range(len(blocks))),
            _mean(study.angle[:, -1, -1]),
            _mean(study.distance[:, -1, -1], 4 if study.drift else 2),
            f"{study.seconds:.0f}",
        ]
        for study in studies
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def update_figure(studies: Sequence[StudyResult]) -> Any:
    """Draw the angle between the rule's and BP's update, a group per study, a bar per block (DTP paper, Figure 3)."""
    figure = new_figure(
        max(6.0, 1.5 * len(studies) + 2.5), 4.2, "Angle between the rule's update and BP's, mean ± s.d."
    )
    axes = figure.subplots()
    blocks = common_labels([study.blocks for study in studies])
    width, spreads = 0.8 / len(blocks), [over_seeds(study.updates) for study in studies]
    for n, (label, colour) in enumerate(zip(blocks, shades(len(blocks)), strict=True)):
        places = np.arange(len(studies)) + width * (n + 0.5 - len(blocks) / 2)
        means, deviations = ([float(each[n]) for each in of] for of in zip(*spreads, strict=True))
        axes.bar(places, means, 0.92 * width, color=colour, label=label)
        axes.errorbar(places, means, deviations, fmt="none", ecolor="#444444", capsize=2)
    axes.set_xticks(range(len(studies)), [literal(study.label).replace("-", "\n") for study in studies])
    axes.set(ylabel="angle (°)", ylim=(0, None))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside right center", title="block")
    return figure


def alignment_figure(studies: Sequence[StudyResult]) -> Any:
    """Draw angle and relative distance between ω and θ over the iterations, mean ± s.d. (DTP paper, Figure 2)."""
    figure = new_figure(9.6, 3.9, "Feedback weight ω against forward weight θ, mean ± s.d. over the seeds")
    left, right = figure.subplots(1, 2)
    lines = [
        (study, position)
        for study in studies
        for position in range(len(study.feedback_blocks))
        if np.isfinite(study.angle[:, :, position]).all() and np.ptp(study.angle[:, :, position], axis=1).max() > 0
    ]
    rules = [study.rule for study, _ in lines]
    # Several lines of one rule need colours of their own.
    own = len(set(rules)) == len(rules) and all(rule in RULE_COLOURS for rule in rules)
    colours = [RULE_COLOURS[rule] for rule in rules] if own else shades(len(lines))
    for (study, position), colour in zip(lines, colours, strict=True):
        label = f"{literal(study.label)}, {study.blocks[study.feedback_blocks[position]]}"
        _band(left, study.iterations, study.angle[:, :, position], colour, label)
        _band(right, study.iterations, study.distance[:, :, position], colour, label)
    left.set(xlabel="iterations of feedback training", ylabel="angle (°)", ylim=(0, None))
    right.set(xlabel="iterations of feedback training", ylabel="relative distance", ylim=(0, None))
    # Passed explicitly, because Matplotlib leaves out labels that begin with an underscore.
    labels = [str(line.get_label()) for line in left.lines]
    figure.legend(left.lines, labels, loc="outside lower center", ncols=min(len(labels), 3) or 1)
    return figure


def drift_figure(studies: Sequence[StudyResult]) -> Any:
    """Draw each block's angle to BP's update over its drift, means over seeds, a panel per study (GP paper, Figure 5).

    If the first block has no drift because its matrix is not square, it is drawn over the drift of the second.
    """
    figure = new_figure(3.6 * len(studies), 3.8, "Angle to BP's update over the drift of the weights")
    panels = figure.subplots(1, len(studies), squeeze=False, sharey=True)[0]
    blocks = common_labels([study.blocks for study in studies])
    looks = list(zip(blocks, shades(len(blocks)), strict=True))
    for axes, study in zip(panels, studies, strict=True):
        angle, drift = study.angle.mean(axis=0), study.distance.mean(axis=0)
        for n, (label, colour) in enumerate(looks[: len(study.blocks)]):
            over = drift[:, 1 if n == 0 and np.isnan(drift[:, 0]).all() else n]
            axes.plot(over, angle[:, n], color=colour, marker="o", markersize=3, label=label)
        axes.set(title=literal(study.label), xlabel="drift ‖WWᵀ − I‖/√K")
        axes.tick_params(axis="x", labelrotation=30)
    panels[0].set_ylabel("angle (°)")
    deepest = max(range(len(studies)), key=lambda number: len(studies[number].blocks))
    figure.legend(*panels[deepest].get_legend_handles_labels(), loc="outside right center", title="block")
    return figure


def _band(axes: Axes, iterations: Floats, values: Floats, colour: str, label: str) -> None:
    mean, spread = over_seeds(values)
    axes.plot(iterations, mean, color=colour, label=label)
    axes.fill_between(iterations, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def _mean(values: Floats, digits: int = 1) -> str:
    if not np.isfinite(values).all():
        return "—"
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"
