"""Make results.json and the table of index.md: `python docs/results/collect.py` from the root.

published.csv has a row for each published number. Our number is in the row or, where `summaries` names them, the mean
of a metric over kept summary.json files: `PATTERN:KEY`, as in `runs/cifar10-bp/*/summary.json:final.test_top1`.
"""

import csv
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def verdict(published: float, deviation: float, ours: float) -> str:
    """Say whether ours is within two standard deviations of the published number or, without any, within one point."""
    return "reproduced" if abs(ours - published) <= (2 * deviation if deviation else 1.0) else "not reproduced"


def measured(summaries: str) -> list[float]:
    """Return the metric that a row names, of every kept summary."""
    pattern, _, key = summaries.rpartition(":")
    values = []
    for file in sorted(HERE.glob(pattern)):
        value = json.loads(file.read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[part]
        values.append(float(value))
    if not values:
        raise SystemExit(f"published.csv: {summaries}: there is no such summary")
    return values


def read() -> list[dict[str, str]]:
    """Return all rows of published.csv, with our numbers where they are computed."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["summaries"]:
            values = measured(row["summaries"])
            row["ours"], row["seeds"] = f"{statistics.fmean(values):.2f}", str(len(values))
            row["ours_sd"] = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            published, deviation = float(row["published"]), float(row["published_sd"] or 0)
            row["verdict"] = verdict(published, deviation, statistics.fmean(values))
    return rows


def number(text: str) -> float | str | None:
    """Read a cell: a number, a bound such as "≤ 35", or None where it is empty."""
    try:
        return float(text)
    except ValueError:
        return text or None


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table of index.md."""
    lines = ["| paper | data | number | paper | ours | seeds | verdict | command | hours |", "|" + "---|" * 9]
    for row in rows:
        published, ours = (" ± ".join(filter(None, [row[key], row[f"{key}_sd"]])) for key in ("published", "ours"))
        result = f"[{row['verdict']}]({row['page']}.md)" if row["page"] else row["verdict"]
        cells = [f"{row['paper']}, {row['place']}", row["data"], row["what"], published, ours, row["seeds"], result]
        lines.append(f"| {' | '.join([*cells, '`' + row['command'] + '`', row['hours']])} |")
    return "\n".join(lines) + "\n"


def made() -> dict[Path, str]:
    """Return both files' new content."""
    rows = read()
    entries = [{key: number(text) for key, text in row.items()} for row in rows]
    index = HERE / "index.md"
    before, _, rest = index.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return {
        HERE / "results.json": json.dumps(entries, indent=1, ensure_ascii=False) + "\n",
        index: before + BEGIN + table(rows) + END + after,
    }


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")
