"""Pack ImageNet 32×32: the official pickles `train_data_batch_1` to `train_data_batch_10` and `val_data`."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from arraytp.data.shards import Images, Labels
from arraytp.data.writer import Description, writing
from arraytp.data_prep.batches import read_batch
from arraytp.data_prep.files import file_state, fingerprint
from arraytp.data_prep.imagenet import find_class_map, read_class_map
from arraytp.data_prep.options import PackOptions, check_limits, chosen_rows
from arraytp.errors import UnreadableError, UserError

SHAPE = (32, 32, 3)
CLASSES = 1000
BATCHES = {"train": tuple(f"train_data_batch_{number}" for number in range(1, 11)), "val": ("val_data",)}
_IMAGE_BYTES = 3072
_BLOCK_IMAGES = 4096


def _read(path: Path) -> tuple[Images, Labels]:
    try:
        with path.open("rb") as file:
            return read_batch(file, path, "labels", CLASSES, 1)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise UnreadableError(f"{path}: damaged, or larger than the memory that is free") from error
        raise


def _find(src: Path) -> dict[str, list[Path]]:
    """Find the files in a folder, or in those that the official archives extract to: one for train, one for val."""
    folders = (src, src / "Imagenet32_train", src / "Imagenet32_val")
    batches: dict[str, list[Path]] = {}
    for split, names in BATCHES.items():
        batches[split] = []
        for name in names:
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is None:
                raise UserError(f"{src}: no {name}, expected train_data_batch_1 to _10 and val_data")
            batches[split].append(path)
    return batches


def _spool(paths: list[Path], file: BinaryIO) -> Labels:
    """Append the images of batches to a file, one batch in memory at a time; return all labels."""
    labels = []
    for path in paths:
        images, part = _read(path)
        for start in range(0, len(images), _BLOCK_IMAGES):
            file.write(np.ascontiguousarray(images[start : start + _BLOCK_IMAGES]).data)
        labels.append(part)
    file.flush()
    return np.concatenate(labels)


def _in_order(file: BinaryIO, order: Labels) -> Iterator[tuple[Images, Labels]]:
    """Read the rows of a spooled file in a given order, block by block: yield the images and their rows."""
    for start in range(0, len(order), _BLOCK_IMAGES):
        rows = order[start : start + _BLOCK_IMAGES]
        content = b"".join(os.pread(file.fileno(), _IMAGE_BYTES, int(row) * _IMAGE_BYTES) for row in rows)
        yield np.frombuffer(content, np.uint8).reshape(-1, *SHAPE), rows


def _classes(src: Path, devkit: Path | None, dst: Path) -> list[str]:
    """Return the classes in the order of the files' numbers: wnids if there is a devkit, otherwise the numbers."""
    class_map = find_class_map(src, devkit, dst)
    if class_map is None:
        return [str(number) for number in range(1, CLASSES + 1)]
    wnids = read_class_map(class_map)
    if sorted(wnids) != list(range(1, CLASSES + 1)):
        raise UserError(f"{class_map.where}: numbers {len(wnids)} classes, expected 1 to {CLASSES}")
    return [wnids[number] for number in range(1, CLASSES + 1)]


def pack(src: Path, dst: Path, options: PackOptions, devkit: Path | None = None) -> None:
    """Pack a folder of official files.

    The classes are wnids if ImageNet's devkit is in `src` or `devkit`, so that the set can be compared with ImageNet;
    otherwise they are named "1" to "1000", as the files number them.

    Memory holds one batch. While a split is packed, its pixels take disk space a second time, in an unnamed file in
    `dst`. UserError if a file is missing, damaged or hostile, a limit exceeds the number of images, or `dst` is not
    free.
    """
    check_limits(options, BATCHES)
    batches = _find(src)
    made = {"packer": "imagenet32", "limits": dict(options.limits), "seed": options.seed}
    classes = _classes(src, devkit, dst)
    state = fingerprint(file_state(path) for paths in batches.values() for path in paths)
    description = Description(options.name or "imagenet32", SHAPE, classes, made, state)
    with writing(dst, description, compression=options.compression, shard_images=options.shard_images) as writer:
        for split, paths in batches.items():
            with tempfile.TemporaryFile(dir=dst) as file:
                labels = _spool(paths, file)
                order = chosen_rows(split, labels, options)
                for images, rows in _in_order(file, order[writer.taken(split) :]):
                    writer.add(split, images, labels[rows])
