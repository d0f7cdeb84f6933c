"""Pack any tree split/class/image, in a folder or a tar archive."""

import os
import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from arraytp.data_prep.files import Files, is_image, open_files
from arraytp.data_prep.images import Plan, pack_images
from arraytp.data_prep.options import PackOptions
from arraytp.errors import UserError

_SPLIT = re.compile("[a-z][a-z0-9_]*")


def image_rows(files: Files) -> Iterable[tuple[int, str]]:
    """Yield the row and name of every image file, except hidden files and those in hidden folders."""
    for row, name in enumerate(files.names):
        if is_image(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts):
            yield row, name


def in_order(classes: Collection[str]) -> list[str]:
    """Return classes in alphabetical order, or in numerical order, 9 before 10, if all are numbers."""
    return sorted(classes, key=int if all(name.isdecimal() for name in classes) else None)


def plan_tree(files: Files, leave: Container[int] = (), given: Mapping[int, tuple[str, str]] | None = None) -> Plan:
    """Plan a tree split/class/image; a label is the class's position among the train classes, sorted by `in_order`.

    Rows in `leave` are ignored; `given` holds the split and class of rows that lie elsewhere. UserError if any other
    image lies elsewhere, there are no train images, or another split has a class without train images.
    """
    rows_of: dict[str, dict[str, list[int]]] = {}
    for row, name in image_rows(files):
        if row in leave:
            continue
        if given and row in given:
            split, place = given[row]
            rows_of.setdefault(split, {}).setdefault(place, []).append(row)
            continue
        parts = PurePosixPath(name).parts
        if len(parts) == 3 and not parts[1].isprintable():
            raise UserError(f"{files.root}: the class {parts[1]!r} has a character that cannot be printed; rename it")
        if len(parts) != 3 or not _SPLIT.fullmatch(parts[0]):
            raise UserError(
                f"{files.root}: {name!r} is not split/class/image, the split in small letters, such as train/cat/1.jpg"
            )
        rows_of.setdefault(parts[0], {}).setdefault(parts[1], []).append(row)
    if "train" not in rows_of:
        raise UserError(f"{files.root}: no image train/class/…, found splits: {', '.join(rows_of) or 'none'}")
    classes = in_order(rows_of["train"])
    splits = {}
    # Train first: the order of the splits in dataset.json should not depend on their names.
    for split in sorted(rows_of, key=lambda name: (name != "train", name)):
        foreign = sorted(set(rows_of[split]) - set(classes))
        if foreign:
            raise UserError(f"{files.root}: class {foreign[0]!r} of split {split!r} has no train image")
        rows = [rows_of[split].get(name, []) for name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in rows])
        splits[split] = np.array([row for part in rows for row in part], np.int64), labels.astype(np.int64)
    return Plan(files, classes, splits)


def _own_name(src: Path) -> str:
    """Return the name of a folder, or of an archive without its extensions; UserError if it cannot name a data set."""
    last = Path(os.path.abspath(src)).name
    name = last if src.is_dir() else last.partition(".")[0]
    if not (name.strip() and name.isprintable()):
        raise UserError(f"{src}: {name!r} is not a name of printable characters, which the data set needs; give --name")
    return name


def pack(src: Path, dst: Path, options: PackOptions) -> int:
    """Pack a tree of images; return how many broken files were skipped.

    The data set is named after `src` unless `options` gives a name. UserError if that is impossible, or like
    `plan_tree`, `open_files` and `pack_images`.
    """
    name = options.name or _own_name(src)
    with open_files(src, dst) as files:
        plan = plan_tree(files)
        return pack_images(plan, dst, replace(options, name=name), {"packer": "folder", "files": src.name})
