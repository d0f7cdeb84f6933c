"""Make results.json and the table of index.md, and store the runs behind them compactly in the repository.

    python docs/results/collect.py                         # from the root: make both files
    python docs/results/collect.py keep NAME FOLDER…       # keep result folders as runs/NAME/seed-<n>.zip

published.csv has a row for each published number. Our number is in the row or, if `runs` names a metric of kept runs,
as in `mnist-bp:test_top1`, it is the mean of that metric over the runs' last epochs; verdict and hours are then
computed too.
"""

import csv
import io
import json
import statistics
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
# The files kept of a result folder, if they exist: BP has no angles and no feedback, an unfinished run no summary.
# after.csv belongs to runs without train.score_train whose loss and accuracy on all training images were measured
# outside the run, after some of its epochs.
FILES = ("config.yml", "metrics.csv", "after.csv", "angles.csv", "feedback.csv", "summary.json")


@dataclass(frozen=True)
class Kept:
    """One kept run: its last epoch's metrics, and its files' text by name."""

    files: dict[str, str]

    @property
    def last(self) -> dict[str, float]:
        """The last row of metrics.csv, with after.csv's training numbers of that epoch, and the best test accuracy."""
        rows = self._rows("metrics.csv")
        best = max(row["test_top1"] for row in rows)
        after = {row["epoch"]: row for row in self._rows("after.csv")}
        return rows[-1] | after.get(rows[-1]["epoch"], {}) | {"best_test_top1": best}

    def _rows(self, file: str) -> list[dict[str, float]]:
        rows = csv.DictReader(io.StringIO(self.files.get(file, "")))
        return [{name: float(cell) for name, cell in row.items()} for row in rows]


def keep(name: str, folders: list[Path]) -> None:
    """Archive the kept files of result folders, with the same bytes each time."""
    for folder in folders:
        config = YAML(typ="safe").load(folder / "config.yml")
        place = HERE / "runs" / name / f"seed-{config['seed']}.zip"
        place.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in FILES:
                if (folder / file).is_file():
                    text = (folder / file).read_text(encoding="utf-8")
                    # The location of the data set is not part of the result.
                    text = text.replace(config["data"]["dataset"], f"data/{Path(config['data']['dataset']).name}")
                    archive.writestr(zipfile.ZipInfo(file), text, zipfile.ZIP_DEFLATED)


def kept(name: str) -> list[Kept]:
    """Return the kept runs of one name, by seed."""
    runs = []
    for place in sorted((HERE / "runs" / name).glob("seed-*.zip")):
        with zipfile.ZipFile(place) as archive:
            runs.append(Kept({file: archive.read(file).decode() for file in archive.namelist()}))
    if not runs:
        raise SystemExit(f"published.csv: {name}: docs/results/runs/{name} holds no kept run")
    return runs


def verdict(published: float, deviation: float, ours: float, seeds: int = 1) -> str:
    """Say whether ours is within two standard deviations, or within one point if there is one seed or no deviation."""
    tolerance = 2 * deviation if seeds > 1 and deviation else max(2 * deviation, 1.0)
    return "reproduced" if abs(ours - published) <= tolerance else "not reproduced"


def epochs_of(command: str) -> int:
    """Return the epochs that a row's config asks for."""
    return int(YAML(typ="safe").load(HERE.parents[1] / command.split()[2])["train"]["epochs"])


def computed(row: dict[str, str]) -> dict[str, str]:
    """Return a row of published.csv with our numbers, computed from its kept runs if it names any."""
    if not row["runs"]:
        return row
    name, _, metric = row["runs"].partition(":")
    lasts = [run.last for run in kept(name)]
    values, done, planned = (
        [last[metric] for last in lasts],
        min(last["epoch"] for last in lasts),
        epochs_of(row["command"]),
    )
    mean = statistics.fmean(values)
    found = verdict(float(row["published"]), float(row["published_sd"] or 0), mean, len(values))
    return row | {
        "ours": f"{mean:.2f}",
        "ours_sd": f"{statistics.stdev(values):.2f}" if len(values) > 1 else "",
        "seeds": str(len(values)),
        "verdict": found if done >= planned else f"unfinished: epoch {done:.0f} of {planned}",
        "hours": f"{statistics.fmean(last['seconds'] for last in lasts) / 3600:.1f}",
    }


def read() -> list[dict[str, str]]:
    """Return all rows of published.csv, with our numbers where they are computed."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        return [computed(row) for row in csv.DictReader(file)]


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
    """Return the new content of both files."""
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
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2], [Path(folder) for folder in sys.argv[3:]])
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")
