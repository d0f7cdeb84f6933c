"""Read result folders: every number as it was written, damage reported with file and line."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arraytp.config.document import encodable, read_document
from arraytp.disk import real
from arraytp.errors import UserError
from arraytp.model.architectures import NAMED
from arraytp.model.shapes import block_labels
from arraytp.training import tables

Columns = dict[str, NDArray[np.float64]]

# Walking over so many files and folders takes a second.
_MOST_ENTRIES = 100_000
# More than any network has; a larger number comes from damage, and must not have labels made for it.
_MOST_BLOCKS = 10_000


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run's result folder.

    `metrics`, `steps`, `angles` and `feedback` are the columns of the CSV files, float64 (rows,), without rows if the
    file is missing. `config` and `summary` are the parsed config.yml and summary.json; `summary` is None while the run
    has not finished. In the mean of several seeds (`arraytp.report.seeds`), `seeds` are the runs that were averaged,
    and `missing` the labels of those that have not finished.
    """

    path: Path
    label: str
    config: dict[str, Any]
    metrics: Columns
    steps: Columns
    angles: Columns
    feedback: Columns
    summary: dict[str, Any] | None
    seeds: "tuple[Result, ...]" = ()
    missing: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The learning rule's name."""
        return str(self.config["rule"]["name"])

    @property
    def split(self) -> str:
        """The split that every epoch was evaluated on: test or validation."""
        return "validation" if self.config["train"].get("validation") else "test"

    @property
    def against_gnt(self) -> bool:
        """Whether updates were also compared with those by Gauss-Newton targets."""
        compare = self.config.get("compare")
        against = compare.get("against") if isinstance(compare, dict) else None
        return isinstance(against, list) and "gnt" in against

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary is not None and not self.missing

    @property
    def epochs_planned(self) -> int:
        """How many epochs the config asks for."""
        return int(self.config["train"]["epochs"])

    @property
    def blocks_are_named(self) -> bool:
        """Whether the run has written labels for its blocks, which it does at its end."""
        return bool((self.summary or {}).get("blocks"))

    @property
    def blocks(self) -> list[str]:
        """Short labels of the blocks, from the input's on.

        If the run has written none, these are labels for the measured blocks: those of the config's network or, if it
        has another number of blocks, `block n`.
        """
        if self.summary and self.blocks_are_named:
            return list(self.summary["blocks"])
        numbers = np.concatenate([self.angles["block"], self.feedback["block"]])
        count = int(numbers.max()) + 1 if numbers.size else 0
        labels = _planned_labels(self.config.get("network"))
        return labels if len(labels) == count else numbered_blocks(count)


def numbered_blocks(count: int) -> list[str]:
    """Return labels for blocks without labels of their own, counted from 0 as in every file."""
    return [f"block {n}" for n in range(count)]


def _planned_labels(network: Any) -> list[str]:
    """Return the block labels of a config's network, none for a network that this version does not know."""
    name, blocks = (network.get("name"), network.get("blocks")) if isinstance(network, dict) else (None, None)
    if isinstance(blocks, list):
        return block_labels([block["type"] for block in blocks if isinstance(block, dict) and "type" in block])
    return block_labels([layer.type for layer in NAMED[name](1)]) if isinstance(name, str) and name in NAMED else []


def read_results(folders: Sequence[Path | str]) -> list[Result]:
    """Read the result folders among `folders` and those at any depth inside the others, such as a run's variants.

    Labels are paths relative to the folders' common parent. Inside a folder BP comes first, since the other rules are
    measured against it, then the others by name; studies beside runs are left out. Raises UserError as `read_result`
    does, and also for a folder that neither is nor contains a result folder.
    """
    paths = {real(path): path for folder in folders for path in _expand(Path(folder))}
    parent = common_parent(list(paths))
    return [read_result(path, place.relative_to(parent).as_posix()) for place, path in paths.items()]


def common_parent(paths: Sequence[Path]) -> Path:
    """Return the deepest folder that holds all of the (absolute) paths, each at least one level down."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def _expand(folder: Path) -> list[Path]:
    if (folder / "config.yml").is_file() or not folder.is_dir():
        return [folder]
    inside = list(_holding_results(folder))
    if not inside:
        raise UserError(f"{folder} is not a result folder: neither it nor a folder in it holds a config.yml")
    inside = [path for path in inside if not _is_study(path)] or inside
    return in_order(inside, folder)


def splits_of(results: Sequence[Result]) -> str:
    """Return the splits that these runs' epochs were evaluated on, such as "test or validation"."""
    return " or ".join(sorted({result.split for result in results}))


def in_order(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Return the paths inside a folder in the order of tables: BP first, then by name, with lr-2 before lr-10."""
    return sorted(paths, key=lambda path: [(name != "bp", _natural(name)) for name in path.relative_to(folder).parts])


def _is_study(folder: Path) -> bool:
    try:
        tree = read_document(folder / "config.yml").tree
    except UserError:
        return False
    return isinstance(tree, dict) and "study" in tree


def _holding_results(folder: Path) -> Iterator[Path]:
    """Yield the folders at any depth that hold a config.yml; links and unreadable folders are skipped."""
    seen = 0
    for place, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > _MOST_ENTRIES:
            raise UserError(
                f"{folder}: holds more than {_MOST_ENTRIES:,} files and folders; give one nearer to the results"
            )
        if "config.yml" in files:
            yield Path(place)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts lr-2 before lr-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_result(folder: Path | str, label: str | None = None) -> Result:
    """Read one result folder; the run may be unfinished. By default, the label is the folder's name.

    The folder must hold config.yml and, if the run has finished, metrics.csv; other files may be missing. While there
    is no summary.json, a last CSV line without a line end is still being written, and is left out. Raises UserError if
    this is not a result folder, if it holds a study, or if a file is damaged; the message names the file and the line.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}; give a result folder written by `arraytp run`")
    if not (path / "config.yml").is_file():
        raise UserError(f"{path} is not a result folder: it holds no config.yml")
    label = label or real(path).name
    if not encodable(label):
        raise UserError(f"{str(path)!r}: the folder's name is not UTF-8 text, so figures cannot show it; rename it")
    config = _read_config(path / "config.yml")
    if "study" in config:
        raise UserError(
            f"{path}: holds a study, not a training run; its table is study.md and its figures are in figures/, there "
            "or beside the variants"
        )
    summary = _read_summary(path / "summary.json")
    unfinished = summary is None
    columns = tables.METRICS_COLUMNS + (tables.VALIDATION_COLUMNS if config["train"].get("validation") else ())
    result = Result(
        path=path,
        label=label,
        config=config,
        metrics=read_csv(path / "metrics.csv", columns, ("epoch",), unfinished),
        steps=read_csv(path / "steps.csv", tables.STEPS_COLUMNS, ("step",), unfinished),
        angles=read_csv(path / "angles.csv", tables.ANGLES_COLUMNS + tables.GNT_COLUMNS, ("step", "block"), unfinished),
        feedback=read_csv(path / "feedback.csv", tables.FEEDBACK_COLUMNS, ("step", "block"), unfinished),
        summary=summary,
    )
    _check_epochs(path / "metrics.csv", result.metrics["epoch"])
    for name, table in (("metrics.csv", result.metrics), ("steps.csv", result.steps)):
        _check_range(path / name, table, [column for column in table if column[-4:] in ("top1", "top5")], 100)
    for name, table in (("angles.csv", result.angles), ("feedback.csv", result.feedback)):
        _check_range(path / name, table, [column for column in table if column.endswith("angle_deg")], 180)
        _check_blocks(path / name, table)
        highest = max(table["block"], default=-1)
        if result.blocks_are_named and highest >= len(result.blocks):
            raise UserError(f"{path / name}: block {highest:g}, but summary.json names {len(result.blocks)} blocks")
    _check_ends(result)
    return result


def _check_epochs(path: Path, epochs: NDArray[np.float64]) -> None:
    """Refuse a table that lacks an epoch before its last."""
    for due, epoch in enumerate(epochs):
        if epoch != due:
            raise UserError(f"{path}, line {due + 2}: epoch is {epoch:g}, but {due} is due; rows are missing")


def _check_blocks(path: Path, table: Columns) -> None:
    for line, block in enumerate(table["block"], start=2):
        if block >= _MOST_BLOCKS:
            raise UserError(f"{path}, line {line}: block is {block:g}, and no network has as many")


def _check_range(path: Path, table: Columns, names: Sequence[str], most: float) -> None:
    """Refuse numbers that are not between 0 and `most`: percentages up to 100, angles up to 180."""
    for name in names:
        for line, value in enumerate(table[name], start=2):
            # Rounding may exceed the limits a little.
            if not (math.isnan(value) or -0.001 <= value <= most + 0.001):
                raise UserError(f"{path}, line {line}: {name} is {value:g}, not from 0 to {most:g} (undefined is nan)")


def _check_ends(result: Result) -> None:
    """Check a finished run's tables against its summary: a table cut at the end of a line looks complete by itself."""
    summary, epochs = result.summary or {}, result.metrics["epoch"]
    written = {name for name in ("metrics", "steps", "angles", "feedback") if (result.path / f"{name}.csv").is_file()}
    if result.summary is not None:
        if "metrics" not in written:
            raise UserError(
                f"{result.path / 'metrics.csv'}: is missing, but summary.json says that the run has "
                f"{summary['epochs']} epochs; `arraytp run --resume` writes it again from a checkpoint"
            )
        last = int(epochs[-1]) if epochs.size else None
        if last != summary["epochs"]:
            raise UserError(
                f"{result.path / 'metrics.csv'}: ends with {'its header' if last is None else f'epoch {last}'}, but "
                f"summary.json says that the run has {summary['epochs']}; one of the two is not the run's"
            )
    compare = result.config.get("compare")
    every = compare.get("every") if isinstance(compare, dict) else None
    if not (isinstance(every, int) and every > 0 and isinstance(summary.get("steps"), int) and result.blocks_are_named):
        return
    if "steps" in written and len(result.steps["step"]) != summary["steps"] // every:
        raise UserError(
            f"{result.path / 'steps.csv'}: {len(result.steps['step'])} rows, but one after every {every} of "
            f"{summary['steps']} steps makes {summary['steps'] // every}; rows are missing or of another run"
        )
    times = -(-summary["steps"] // every)
    is_measured = result.rule != "bp" or result.against_gnt
    angles, measured = result.angles["step"].size, times * len(result.blocks) if is_measured else 0
    if "angles" in written and angles != measured:
        raise UserError(
            f"{result.path / 'angles.csv'}: {angles} rows, but {len(result.blocks)} blocks every {every} of "
            f"{summary['steps']} steps make {measured}; rows are missing or of another run"
        )
    trained = result.feedback["step"].size
    # A network of one block has no feedback to train.
    if "feedback" in written and times and len(result.blocks) > 1 and (trained % times or not trained):
        raise UserError(
            f"{result.path / 'feedback.csv'}: {trained} rows, but every {every} of {summary['steps']} steps each block "
            f"has one, {times} in all; rows are missing or of another run"
        )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; the file is damaged") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_config(path: Path) -> dict[str, Any]:
    tree = read_document(path).tree
    for section, key in (("rule", "name"), ("train", "epochs")):
        inner = tree.get(section) if isinstance(tree, dict) else None
        if not isinstance(inner, dict) or key not in inner:
            raise UserError(f"{path}: {section}.{key} is missing; a result folder's config.yml holds the whole config")
    if type(tree["train"]["epochs"]) is not int:
        raise UserError(f"{path}: train.epochs is {tree['train']['epochs']!r}, not a whole number")
    return dict(tree)


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; the file is damaged") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path}: holds a {type(summary).__name__}, not an object with the run's summary")
    epochs = summary.get("epochs")
    if type(epochs) is not int:
        raise UserError(f"{path}: epochs is {epochs!r}, not a whole number; a finished run's summary has its epochs")
    blocks = summary.get("blocks", [])
    if not isinstance(blocks, list) or not all(isinstance(label, str) for label in blocks):
        raise UserError(f"{path}: blocks is {blocks!r}, not a list of labels")
    speed = summary.get("images_per_second")
    if speed is not None and not isinstance(speed, int | float):
        raise UserError(f"{path}: images_per_second is {speed!r}, not a number")
    return summary


def read_csv(path: Path, expected: Sequence[str], key: Sequence[str], unfinished: bool) -> Columns:
    """Read the expected columns of a table; those of a missing file are empty. A UserError names file and line.

    The columns `key` hold whole numbers ≥ 0; the first never decreases, and no combination occurs twice. While
    `unfinished`, a last line without a line end is left out.
    """
    if not path.is_file():
        return {name: np.empty(0) for name in expected}
    *lines, rest = _text(path).split("\n")
    if rest and not unfinished:
        raise UserError(f"{path}, line {len(lines) + 1}: the line has no end; the file was cut")
    rows = [line.split(",") for line in lines]
    if not rows and unfinished:
        return {name: np.empty(0) for name in expected}
    header = rows[0] if rows else []
    missing = [name for name in expected if name not in header and name not in tables.NEWER_COLUMNS]
    if missing:
        raise UserError(f"{path}, line 1: the header lacks {', '.join(missing)}; expected {','.join(expected)}")
    values = [_numbers(path, line, header, row) for line, row in enumerate(rows[1:], start=2)]
    table = np.array(values, dtype=np.float64).reshape(len(values), len(header))
    undefined = np.full(len(values), np.nan)
    result = {name: table[:, header.index(name)] if name in header else undefined for name in expected}
    _check_key(path, result, key)
    return result


def _numbers(path: Path, line: int, header: Sequence[str], row: Sequence[str]) -> list[float]:
    if len(row) != len(header):
        raise UserError(f"{path}, line {line}: {len(row)} values, but the header names {len(header)}")
    numbers: list[float] = []
    for name, cell in zip(header, row, strict=True):
        try:
            numbers.append(float(cell))
        except ValueError:
            raise UserError(f"{path}, line {line}: {name} is {cell!r}, not a number (undefined is nan)") from None
    return numbers


def _check_key(path: Path, table: Columns, key: Sequence[str]) -> None:
    seen: set[tuple[float, ...]] = set()
    last = 0.0
    for line, values in enumerate(zip(*(table[name] for name in key), strict=True), start=2):
        for name, value in zip(key, values, strict=True):
            if not (value >= 0 and float(value).is_integer()):
                raise UserError(f"{path}, line {line}: {name} is {value:g}, not a whole number from 0 on")
        named = ", ".join(f"{name} {value:.0f}" for name, value in zip(key, values, strict=True))
        if values[0] < last:
            raise UserError(f"{path}, line {line}: {named} comes after {key[0]} {last:.0f}; rows must be in order")
        if values in seen:
            raise UserError(f"{path}, line {line}: {named} occurs twice")
        seen.add(values)
        last = values[0]
