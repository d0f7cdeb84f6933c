"""`arraytp audit`: everything that can be checked about a config's network, data and rule, in a table."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from arraytp.audit import Check, audit
from arraytp.commands.shared_options import VARIANT, check_json, overriding_but_dtype, settings, write_json
from arraytp.config import Config, load_config
from arraytp.errors import UserError
from arraytp.report.tables import aligned
from arraytp.training.plan import Plan, plan_variant

HEADERS = ("what", "by", "function", "error", "tolerance", "verdict")
Line = tuple[str, Check]


@click.command(short_help="Check the math of a config: gradients, inverses, theorems.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help="Also write the table to this file."
)
@VARIANT
@overriding_but_dtype
def command(
    config: Path, json_path: Path | None, variant: str | None, backend: str | None, overrides: tuple[str, ...]
) -> int:
    """Check everything that can be checked about the network, data and rule of CONFIG, every variant in turn.

    Prints one line per check: what is checked, the equation, the function, the error and the tolerance. Computes in
    float64 on a small batch. The exit status is 1 if a check fails. docs/audit.md explains the lines.
    """
    if json_path is not None:
        check_json(json_path, "checks")
    plans = _plans(config, settings(overrides, backend), variant)
    records = {}
    for name, planned in plans.items():
        for note in planned.notes:
            click.echo(f"arraytp: note: {name}: {note}", err=True)
        started = time.monotonic()
        try:
            lines = _audited(name, planned)
        except MemoryError as error:
            raise UserError(f"{config}: not enough memory: {error}") from error
        seconds = time.monotonic() - started
        records[name] = _record(planned, lines, seconds)
        click.echo(_table(name, planned.config, lines, seconds))
    if json_path is not None:
        write_json(json_path, records)
    return int(any(record["failed"] for record in records.values()))


def _plans(path: Path, overrides: list[str], variant: str | None) -> dict[str, Plan]:
    """Plan all variants to be audited, which checks them, before any is audited."""
    configs = load_config(path, overrides, variant).variants
    return {name or config.name: plan_variant(path, name, config) for name, config in configs.items()}


def _audited(name: str, planned: Plan) -> list[Line]:
    """Return all lines, showing the audit's progress on a terminal."""
    lines: list[Line] = []
    console = Console(stderr=True, highlight=False, force_terminal=sys.stderr.isatty())
    with console.status(f"{name}: auditing") as status:
        for family, check in audit(planned):
            lines.append((family, check))
            failed = sum(each.verdict == "fail" for _, each in lines)
            status.update(f"{name}: {family}, {len(lines)} lines{f', {failed} failed' if failed else ''}")
    return lines


def _counts(lines: Sequence[Line]) -> dict[str, int]:
    verdicts = Counter(check.verdict for _, check in lines)
    return {"passed": verdicts["pass"], "failed": verdicts["fail"], "information": verdicts["info"]}


def _record(planned: Plan, lines: Sequence[Line], seconds: float) -> dict[str, Any]:
    config = planned.config
    return {
        "name": config.name,
        "rule": config.rule.name,
        "network": config.network.name,
        "dataset": planned.dataset.name,
        "backend": config.backend,
        "seconds": seconds,
        **_counts(lines),
        "checks": [{"family": family, **asdict(check), "verdict": check.verdict} for family, check in lines],
    }


def _table(name: str, config: Config, lines: Sequence[Line], seconds: float) -> str:
    """Return the lines of one variant, family by family."""
    header, rule, *rows = _fitting([_cells(check) for _, check in lines])
    shown, former = [f"{name}: rule {config.rule.name}, {config.backend}, float64", header], ""
    for (family, _), row in zip(lines, rows, strict=True):
        if family != former:
            shown.append(f"─ {family} ".ljust(len(rule), "─"))
            former = family
        shown.append(row)
    counts = _counts(lines)
    shown += [
        f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['information']} for information; "
        f"{seconds:.0f} s",
        "",
    ]
    return "\n".join(shown)


def _cells(check: Check) -> tuple[str, ...]:
    tolerance = "" if check.tolerance is None else f"{check.tolerance:.1e}" if check.tolerance else "0"
    error = f"{check.error:.4g}" if check.verdict == "info" else f"{check.error:.1e}" if check.error else "0"
    verdict = "FAIL" if check.verdict == "fail" else check.verdict
    return check.what, check.source, check.function, error, tolerance, verdict


def _fitting(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the table's lines, with the columns that fit on a terminal; elsewhere, with all."""
    columns, room = list(HEADERS), shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for unwanted in ("", "function", "by", "tolerance"):
        columns = [header for header in columns if header != unwanted]
        cells = [[row[HEADERS.index(header)] for header in columns] for row in rows]
        left = [n for n, header in enumerate(columns) if header not in ("error", "tolerance")]
        table = aligned(columns, cells, left)
        if room is None or max(map(len, table)) <= room:
            break
    return table
