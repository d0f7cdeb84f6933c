"""Tables that compare runs: aligned text or Markdown for readers, CSV with every digit for programs."""

import csv
import io
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from arraytp.report.angles import BP, GNT, BlockAngle, Reference, block_angles, common_blocks, references
from arraytp.report.reading import Result
from arraytp.report.seeds import averaged, deviation, each_seed

_LONGEST_LABEL = 28
_NARROWEST = 60
_NOT_MEASURED = "\N{EN DASH}"
_HEADERS = ["run", "rule", "epochs", "train loss", "test top-1", "best top-1", "test top-5", "images/s"]
SPLITS = ("test", "validation")
_UNITS = {BP: "angle°", GNT: "GNT°"}
_METRICS = ("train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5")


def comparison_table(results: Sequence[Result], width: int | None = None) -> str:
    """Return the comparison as aligned text: one row per run, then notes on what the numbers mean.

    Runs of several seeds are one row, mean ± standard deviation. Lines have at most `width` characters, by default the
    width of the terminal, or 100 without one; angles that do not fit beside the rest follow in tables of their own.
    """
    results = averaged(results)
    if width is None:
        width = max(shutil.get_terminal_size().columns, _NARROWEST) if sys.stdout.isatty() else 100
    parts = _within(list(zip(*_cells(results), strict=True)), width)
    notes = [textwrap.fill(note, width, subsequent_indent="  ") for note in _notes(results)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


def markdown_table(results: Sequence[Result]) -> str:
    """Return the same table and notes in Markdown."""
    results = averaged(results)
    headers, *rows = _cells(results)
    rule = ["---" if header in ("run", "rule") else "---:" for header in headers]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [headers, rule, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([*lines, *(f"\n{note.replace('*', chr(92) + '*')}" for note in _notes(results))]) + "\n"


def csv_table(results: Sequence[Result]) -> str:
    """Return the comparison as CSV, unrounded: an empty cell was not measured, nan is undefined."""
    file = io.StringIO()
    rows = records(results)
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the CSV; None where nothing was measured."""
    blocks, against = common_blocks(results), references(results)
    return [_record(result, blocks, against) for result in results]


def _record(result: Result, blocks: Sequence[str], against: Sequence[Reference]) -> dict[str, Any]:
    summary = result.summary or {}
    record: dict[str, Any] = {"run": result.label, "rule": result.rule, "seed": result.config.get("seed")}
    record |= {"finished": "yes" if result.finished else "no", "epochs": _epochs_done(result)}
    record |= {f"final_{name}": _given(_last(result, name)) for name in _METRICS}
    record |= {f"best_{split}_top1": _given(_best(result)) if split == result.split else None for split in SPLITS}
    record |= {name: summary.get(name) for name in ("images_per_second", "peak_memory_mb")}
    for reference in against:
        for name, angle in zip(blocks, _angles(result, reference, len(blocks)), strict=True):
            key = reference.column.replace("deg", name.replace(" ", "_"))
            mean, deviation = (angle.mean, angle.deviation) if angle else (None, None)
            record |= {key: mean, f"{key}_sd": deviation}
    return record


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """Return the header and one row per run, as text; angles come last."""
    blocks = common_blocks(results) if any(result.angles["block"].size for result in results) else []
    against = references(results)
    rows = [[*_HEADERS, *(f"{name} {_UNITS[reference]}" for reference in against for name in blocks)]]
    for result in results:
        angles = [angle for reference in against for angle in _angles(result, reference, len(blocks))]
        rows.append([*_performance(result), *(_angle(angle, bool(result.seeds)) for angle in angles)])
    return rows


def _performance(result: Result) -> list[str]:
    speed = (result.summary or {}).get("images_per_second")
    done, planned = _epochs_done(result), result.epochs_planned
    loss = _last(result, "train_loss")
    return [
        result.label,
        result.rule,
        str(done) if result.summary is not None else f"{done} of {planned}",
        _spread(result, lambda run: _last(run, "train_loss"), ".3f" if 0.01 <= abs(loss) < 1e5 else ".2e"),
        _spread(result, lambda run: _last(run, "test_top1"), ".2f"),
        _spread(result, _best, ".2f"),
        _spread(result, lambda run: _last(run, "test_top5"), ".2f"),
        _number(math.nan if speed is None else speed, ",.0f"),
    ]


def _spread(result: Result, number: Callable[[Result], float], form: str) -> str:
    """Return a number of a run, or mean ± standard deviation over seeds."""
    values = each_seed(result, number)
    mean = _number(float(values.mean()), form)
    return f"{mean} ± {deviation(values):{form}}" if len(values) > 1 and mean != _NOT_MEASURED else mean


def _angle(angle: BlockAngle | None, spread: bool) -> str:
    if angle is None:
        return _NOT_MEASURED
    if angle.undefined == angle.measured or math.isnan(angle.mean):
        return "undef."
    shown = f" ± {angle.deviation:.1f}" if spread and not math.isnan(angle.deviation) else ""
    return f"{angle.mean:.1f}{shown}{'*' if angle.undefined else ''}"


def _number(value: float, form: str) -> str:
    return _NOT_MEASURED if math.isnan(value) else format(value, form)


def _given(value: float) -> float | None:
    return None if math.isnan(value) else value


def _last(result: Result, name: str) -> float:
    values = result.metrics[name]
    return float(values[-1]) if values.size else math.nan


def _best(result: Result) -> float:
    values = result.metrics[f"{result.split}_top1"]
    return float(np.nanmax(values)) if not np.isnan(values).all() else math.nan


def _epochs_done(result: Result) -> int:
    epochs = result.metrics["epoch"]
    return int(epochs[-1]) if epochs.size else 0


def _angles(result: Result, reference: Reference, count: int) -> list[BlockAngle | None]:
    """Return the angles of `count` blocks to a reference; None where the run has none."""
    angles = [] if reference is GNT and not result.against_gnt else block_angles(result, reference)[:count]
    return [*(angle if angle.measured else None for angle in angles), *[None] * (count - len(angles))]


def _notes(results: Sequence[Result]) -> list[str]:
    notes = ["top-1, top-5: accuracy in percent, test at the end of the last epoch, best over all epochs of test."]
    validated = [result.label for result in results if result.split == "validation"]
    if validated:
        notes.append(f"Of images held out for validation instead of test: the best of {', '.join(validated)}.")
    angles = [(result, angle) for result in results for angle in block_angles(result)]
    if any(angle.measured for _, angle in angles):
        notes.append("angle°: mean angle in degrees between the weight update and BP's on the same batch and weights.")
    else:
        notes.append("There are no angles to BP.")
    if GNT in references(results):
        notes.append("GNT°: the same to the update by Gauss-Newton targets.")
    partly = [result.label for result, angle in angles if 0 < angle.undefined < angle.measured]
    if partly:
        notes.append(f"*: without the steps at which an update was zero or not finite ({', '.join(_unique(partly))}).")
    never = [result.label for result, angle in angles if 0 < angle.undefined == angle.measured]
    if never:
        notes.append(f"undef.: at every step an update was zero or not finite ({', '.join(_unique(never))}).")
    if counts := [f"{len(result.seeds)} ({result.label})" for result in results if len(result.seeds) > 1]:
        notes.append(f"±: standard deviation over seeds (n − 1), seeds: {', '.join(counts)}.")
    unfinished = [label for result in results if not result.finished for label in result.missing or [result.label]]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    return notes


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _within(columns: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the columns as one table if it fits, else the angles in tables of their own that repeat the names."""
    tables, fixed = [[*columns]], len(_HEADERS)
    if _widest(_lines(columns)) > width:
        tables = [[*columns[:fixed]]]
        for column in columns[fixed:]:
            if len(tables) == 1 or _widest(_lines([*tables[-1], column])) > width:
                tables.append([columns[0]])
            tables[-1].append(column)
    return ["\n".join(_lines(table)) for table in tables]


def _lines(columns: Sequence[Sequence[str]]) -> list[str]:
    headers, *rows = zip(*columns, strict=True)
    two_lines = ["\n".join(header.rsplit(" ", 1)) if " " in header else f"\n{header}" for header in headers]
    wrapped = [["\n".join(textwrap.wrap(cell, _LONGEST_LABEL)) for cell in row] for row in rows]
    return aligned(two_lines, wrapped, [n for n, header in enumerate(headers) if header in ("run", "rule")])


def _widest(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Return the lines of a table: headers, a rule, rows; all columns except those in `left` are right-aligned."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for n, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if n in left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
