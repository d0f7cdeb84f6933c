"""Decode image files on all cores and pack them; sources differ only in their plan."""

import errno
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL

from arraytp.data.shards import Images, Labels
from arraytp.data.writer import DatasetWriter, Description, writing
from arraytp.data_prep.decode import BrokenImageError, decode, fit, room_for
from arraytp.data_prep.files import Files, fingerprint
from arraytp.data_prep.options import Exif, PackOptions, check_limits, chosen_rows
from arraytp.errors import UnreadableError, UserError

BLOCK_BYTES = 2**23
_BLOCKS_AHEAD = 2
_TASK_IMAGES = 16
# Errors of one file alone; all others, such as a lost server, are temporary failures of the system.
_OWN_ERRORS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
)

Rows = npt.NDArray[np.int64]
Broken = list[tuple[int, str]]


@dataclass(frozen=True)
class Plan:
    """The images of each split: `splits` maps a split to rows of `files.names` (n,) and labels (n,), int64."""

    files: Files
    classes: Sequence[str]
    splits: Mapping[str, tuple[Rows, Labels]]


@dataclass(frozen=True)
class _Block:
    """Images that are being decoded, in order; `images` is complete when all `tasks` are done."""

    images: Images
    rows: Rows
    labels: Labels
    tasks: list[Future[Broken]]


@dataclass(frozen=True)
class _Decoder:
    files: Files
    size: tuple[int, int]
    options: PackOptions

    def into(self, rows: Rows, out: Images) -> Broken:
        """Decode files into `out` (n, H, W, 3); return the positions of broken ones, with reasons."""
        broken = []
        for position, row in enumerate(rows):
            try:
                self._into_one(int(row), out[position])
            except BrokenImageError as error:
                broken.append((position, str(error)))
        return broken

    def _into_one(self, row: int, out: Images) -> None:
        content = _read(self.files, row)
        with room_for(content):
            self._fit_into(row, content, out)

    def _fit_into(self, row: int, content: bytes, out: Images) -> None:
        # A separate function, so that its images are freed when it returns, before their room is given back.
        image = decode(content, self.options.exif or "apply")
        self._check_size(row, (image.height, image.width))
        out[...] = fit(image, self.size, self.options.resize)

    def _check_size(self, row: int, size: tuple[int, int]) -> None:
        if self.options.size is None and size != self.size:
            raise UserError(
                f"{self.files.root}: {self.files.names[row]!r} has {size[0]}x{size[1]} pixels, another image has "
                f"{self.size[0]}x{self.size[1]}; give --size HxW"
            )


def _read(files: Files, row: int) -> bytes:
    """Read an image file; BrokenImageError if only this one cannot be read, UnreadableError if the system fails."""
    try:
        return files.read(row)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        if error.errno in _OWN_ERRORS:
            raise BrokenImageError(reason) from error
        raise UnreadableError(
            f"{files.root}: {files.names[row]!r} {reason}; the same pack goes on where it stopped"
        ) from error


def pack_images(plan: Plan, dst: Path, options: PackOptions, source: dict[str, Any], workers: int | None = None) -> int:
    """Decode the images of a plan, on all cores or with `workers` threads, and write the data set.

    The data set is named "images" unless `options.name` is given; EXIF is applied unless `options.exif` says otherwise.
    `source` describes the images' origin in `dataset.json`, and the settings of the packing are added to it. Returns
    the number of broken files, which are listed in `skipped.csv`. UserError if too many files are broken, the images
    differ in size and no size is given, or `dst` is not free. UnreadableError or MemoryError if the system fails; the
    same call then resumes.
    """
    check_limits(options, plan.splits)
    chosen = {}
    for split, (rows, labels) in plan.splits.items():
        order = chosen_rows(split, labels, options)
        chosen[split] = rows[order], labels[order]
    with warnings.catch_warnings():
        # Pillow warns about damaged EXIF data and the like without naming the file; the image is usable nevertheless.
        warnings.filterwarnings("ignore", module="PIL")
        size = options.size or _first_size(plan, options.exif or "apply")
        decoder = _Decoder(plan.files, size, options)
        made = source | {
            "limits": dict(options.limits),
            "seed": options.seed,
            "resize": options.resize if options.size else None,
            "exif": options.exif or "apply",
            "pillow": PIL.__version__,
        }
        description = Description(
            options.name or "images", (*size, 3), plan.classes, made, _state(plan, chosen, options)
        )
        with writing(dst, description, compression=options.compression, shard_images=options.shard_images) as writer:
            for split, (rows, labels) in chosen.items():
                rest = slice(writer.taken(split), None)
                for block in _blocks(decoder, rows[rest], labels[rest], workers or len(os.sched_getaffinity(0))):
                    _add(writer, plan.files, split, block, options.max_skipped)
            return len(writer.skipped)


def _state(plan: Plan, chosen: Mapping[str, tuple[Rows, Labels]], options: PackOptions) -> str:
    """Return a fingerprint of what would be packed: files, their order and labels, and when packing would give up."""
    # By name, not row: a new file that is not an image may shift the rows.
    orders = (
        f"{split} {label} {plan.files.names[row]}"
        for split, (rows, labels) in chosen.items()
        for row, label in zip(rows, labels, strict=True)
    )
    return fingerprint([plan.files.state, str(options.max_skipped), *orders])


def _first_size(plan: Plan, exif: Exif) -> tuple[int, int]:
    for rows, _ in plan.splits.values():
        for row in rows:
            try:
                image = decode(_read(plan.files, int(row)), exif)
            except BrokenImageError:
                continue
            return image.height, image.width
    raise UserError(f"{plan.files.root}: none of its image files can be decoded")


def _blocks(decoder: _Decoder, rows: Rows, labels: Labels, workers: int) -> Iterator[_Block]:
    """Yield decoded blocks in order, while the next ones are being decoded."""
    height, width = decoder.size
    length = max(1, BLOCK_BYTES // (height * width * 3))
    pool = ThreadPoolExecutor(workers, "decode")
    waiting: deque[_Block] = deque()
    try:
        for start in range(0, len(rows), length):
            part = rows[start : start + length]
            images = np.empty((len(part), height, width, 3), np.uint8)
            tasks = [
                pool.submit(decoder.into, part[i : i + _TASK_IMAGES], images[i : i + _TASK_IMAGES])
                for i in range(0, len(part), _TASK_IMAGES)
            ]
            waiting.append(_Block(images, part, labels[start : start + length], tasks))
            if len(waiting) > _BLOCKS_AHEAD:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _add(writer: DatasetWriter, files: Files, split: str, block: _Block, max_skipped: int) -> None:
    """Wait for a block and write it, without its broken files."""
    start = 0
    for number, task in enumerate(block.tasks):
        for position, reason in task.result():
            broken = number * _TASK_IMAGES + position
            writer.add(split, block.images[start:broken], block.labels[start:broken])
            start = broken + 1
            name = files.names[block.rows[broken]]
            writer.skip(split, name, reason)
            if len(writer.skipped) > max_skipped:
                raise UserError(
                    f"{files.root}: broken file {name!r}: {reason}; that makes {len(writer.skipped)}, more than "
                    f"--max-skipped {max_skipped}"
                )
    writer.add(split, block.images[start:], block.labels[start:])
