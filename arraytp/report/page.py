"""One interactive HTML page that compares runs: sortable table, curves with values, angles, configs, machines.

Bokeh draws it, and Bokeh's script is part of the page, so that the page needs no network.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.embed import file_html
from bokeh.layouts import column, gridplot
from bokeh.models import ColumnDataSource, HoverTool, TabPanel, Tabs
from bokeh.models.widgets.markups import Div
from bokeh.models.widgets.tables import DataTable, NumberFormatter, StringFormatter, TableColumn
from bokeh.plotting import figure
from bokeh.resources import INLINE

from arraytp.report.angles import Reference, block_series, common_blocks, has_angles, hidden_mean, references
from arraytp.report.figures import write_bytes
from arraytp.report.panels import Series
from arraytp.report.reading import Result, splits_of
from arraytp.report.seeds import averaged
from arraytp.report.style import Look, looks
from arraytp.report.tables import records

_WIDTH = 1100
_CURVES = {
    "train_top1": "train top-1 (%)",
    "{split}_top1": "{split} top-1 (%)",
    "train_loss": "train loss",
    "{split}_loss": "{split} loss",
}


def write_page(results: Sequence[Result], path: Path) -> Path:
    """Write the page and return its path; UserError if it cannot be written."""

    def heading(text: str) -> Div:
        return Div(text=f"<h2>{text}</h2>")

    runs = averaged(results)
    given = looks(runs)
    shown = list(zip(runs, given, strict=True))
    splits = splits_of(runs)
    curves = [
        _lines(
            [((run.metrics["epoch"], run.metrics[name.format(split=run.split)]), look, run.label)
             for run, look in shown],
            "epoch", label.format(split=splits), width=_WIDTH // 2,
        )
        for name, label in _CURVES.items()
    ]  # fmt: skip
    tabs = [
        TabPanel(
            child=_lines(series, "training step", f"angle to {reference.name}'s update (°)", width=_WIDTH),
            title=f"{title} to {reference.name}",
        )
        for reference in references(runs)
        for title, series in _angle_series(runs, given, reference).items()
        if series
    ]
    layout = column(
        Div(text=f"<h1>{len(results)} run{'s' * (len(results) != 1)} compared</h1>"),
        _table(records(results)),
        heading("Angle to BP's update during training"),
        Tabs(tabs=tabs) if tabs else Div(text="Not measured."),
        heading("Loss and accuracy"),
        gridplot(curves, ncols=2, toolbar_location=None),
        heading("Settings that differ"),
        _table(_differences(results)) if len(results) > 1 else Div(text="There is one run."),
        heading("Environment"),
        _table([_environment(result) for result in results]),
    )
    return write_bytes(file_html(layout, INLINE, title="arraytp report").encode(), path, "give another --html file")


def _angle_series(
    runs: Sequence[Result], given: Sequence[Look], reference: Reference
) -> dict[str, list[tuple[Series, Look, str]]]:
    """Return the angles of all runs that have any, for the mean of the hidden blocks and for each block."""
    shown = [(run, look) for run, look in zip(runs, given, strict=True) if has_angles(run, reference)]
    angles = {"mean of the hidden blocks": [(hidden_mean(run, reference), look, run.label) for run, look in shown]}
    for n, block in enumerate(common_blocks(runs)):
        angles[block] = [(block_series(run, n, reference), look, run.label) for run, look in shown]
    return angles


def _lines(series: Sequence[tuple[Series, Look, str]], x: str, y: str, width: int) -> Any:
    """Draw lines that show their values at the pointer; a click on a run's name in the legend hides the run."""
    plot = figure(width=width, height=340, x_axis_label=x, y_axis_label=y, tools="pan,wheel_zoom,box_zoom,reset,save")
    for (steps, values), look, label in series:
        data = {"x": steps, "y": values, "run": [label] * len(steps)}
        dash: Any = "solid" if isinstance(look.dash, str) else [round(4 * part) for part in look.dash[1]]
        plot.line("x", "y", source=data, color=look.colour, line_dash=dash, line_width=2, legend_label=label)
        plot.scatter("x", "y", source=data, color=look.colour, size=4, legend_label=label)
    plot.add_tools(HoverTool(tooltips=[("run", "@run"), (x, "@x{0,0}"), (y, "@y{0.00}")]))
    if series:
        plot.legend.click_policy = "hide"
        plot.legend.location = "right"
        plot.add_layout(plot.legend[0], "right")
    return plot


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    """Return a table that can be sorted by a click on a column's name; columns without any value are left out."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    names = [name for name in keys if any(row[name] not in (None, "") for row in rows)]
    columns = []
    for name in names:
        numbers = all(row[name] is None or isinstance(row[name], int | float) for row in rows)
        whole = all(isinstance(row[name], int) for row in rows)
        formatter = NumberFormatter(format="0,0" if whole else "0,0.00") if numbers else StringFormatter()
        longest = max(len(name), *(len(str(row[name])) for row in rows if not numbers), 7)
        columns.append(
            TableColumn(field=name, title=name.replace("_", " "), formatter=formatter, width=8 * longest + 16)
        )
    data = {name: [np.nan if row[name] is None else row[name] for row in rows] for name in names}
    height = min(30 + 26 * len(rows), 500)
    return DataTable(
        source=ColumnDataSource(data),
        columns=columns,
        width=_WIDTH,
        height=height,
        index_position=None,
        autosize_mode="none",
        reorderable=False,
    )


def _differences(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for every key in which the runs' configs differ."""
    flat = [dict(_flat(result.config)) for result in results]
    keys = sorted({key for config in flat for key in config})
    rows: list[dict[str, Any]] = [
        {"key": key, **{result.label: str(config.get(key, "")) for result, config in zip(results, flat, strict=True)}}
        for key in keys
    ]
    return [row for row in rows if len({text for name, text in row.items() if name != "key"}) > 1]


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _environment(result: Result) -> dict[str, Any]:
    summary = result.summary or {}
    versions = summary.get("versions", {})
    return {"run": result.label, "device": str(summary.get("device", "")), **{k: str(v) for k, v in versions.items()}}
