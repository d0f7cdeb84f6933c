"""Means and standard deviations over runs that differ only in their seed.

Such runs lie in folders `seed-<n>` beside each other, as `arraytp run --seeds` writes them. Standard deviations are
those of a sample, with n − 1.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arraytp.disk import real
from arraytp.report.reading import Columns, Result

Floats = NDArray[np.float64]
SEED = re.compile(r"seed-(\d+)")
SEED_COLUMNS = ("variant", "seed", "final_test_top1", "final_test_top5", "best_test_top1", "best_test_top5")


def averaged(results: Sequence[Result]) -> list[Result]:
    """Return the results with runs of several seeds replaced by one that has their means and holds them as `seeds`.

    Only finished runs are averaged, unless there are none.
    """
    groups: dict[tuple[Path, str], list[Result]] = {}
    for result in results:
        groups.setdefault((_beside(result), _settings(result)), []).append(result)
    return [_mean(runs) if len(runs) > 1 else runs[0] for runs in groups.values()]


def _beside(result: Result) -> Path:
    """Return the folder that holds the seeds of a run, or the run's own folder if it is not one of several seeds."""
    place = real(result.path)
    return place.parent if SEED.fullmatch(place.name) else place


def _settings(result: Result) -> str:
    """Return the config without its seed as text, which is the same for all seeds."""
    return repr({**result.config, "seed": None})


def _mean(runs: Sequence[Result]) -> Result:
    place = real(runs[0].path).parent
    above = runs[0].label.rpartition("/")[0] or place.name
    finished = [run for run in runs if run.finished]
    counted = finished or list(runs)
    speeds = [speed for run in finished if (speed := (run.summary or {}).get("images_per_second")) is not None]
    summary = counted[0].summary
    if summary is not None:
        summary = summary | {"images_per_second": float(np.mean(speeds)) if speeds else None}
    return replace(
        runs[0],
        path=place,
        label=above,
        metrics=_mean_columns([run.metrics for run in counted]),
        steps=_mean_columns([run.steps for run in counted]),
        angles=_mean_columns([run.angles for run in counted]),
        feedback=_mean_columns([run.feedback for run in counted]),
        summary=summary,
        seeds=tuple(counted),
        missing=tuple(run.label for run in runs if not run.finished),
    )


def _mean_columns(tables: Sequence[Columns]) -> Columns:
    """Return the means of the rows that all tables have."""
    return {name: over_seeds([table[name] for table in tables])[0] for name in tables[0]}


def over_seeds(values: Sequence[Floats] | Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation over runs, up to the length of the shortest; NaN where any value is NaN."""
    length = min(map(len, values))
    stacked = np.stack([each[:length] for each in values])
    # The squares of a diverged run's losses may overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return stacked.mean(axis=0), deviation(stacked)


def deviation(values: Floats) -> Floats:
    """Return the standard deviation over the first axis, that of the runs; NaN for a single run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def each_seed(result: Result, number: Callable[[Result], float]) -> Floats:
    """Return a number for each of a result's seeds, or for the result itself if it is a single run."""
    return np.array([number(run) for run in result.seeds or (result,)])


def seeds_table(results: Sequence[Result], latest: Sequence[Result], home: Path) -> str:
    """Return seeds.csv, a row for every run in a folder [<variant>/]seed-<n> of `home`.

    Cells of a run that has not finished are empty. Runs beside the `latest` ones are left out if they have other
    settings.
    """
    settings = {_beside(result): _settings(result) for result in latest}
    file, own = io.StringIO(), real(home)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(SEED_COLUMNS)
    for result in results:
        # The folder's real path or, if a link leads out of `home`, the link's path.
        place = real(result.path)
        inside = place.relative_to(own) if place.is_relative_to(own) else result.path.relative_to(home)
        match = SEED.fullmatch(inside.name)
        if match and settings.get(_beside(result), _settings(result)) == _settings(result):
            variant = inside.parent.as_posix().removeprefix(".")
            writer.writerow([variant, int(match[1]), *(_final_and_best(result) if result.finished else [""] * 4)])
    return file.getvalue()


def _final_and_best(result: Result) -> list[float]:
    top1, top5 = result.metrics["test_top1"], result.metrics["test_top5"]
    best = int(np.nanargmax(result.metrics[f"{result.split}_top1"]))
    return [float(values[row]) for row in (-1, best) for values in (top1, top5)]
