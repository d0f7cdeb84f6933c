"""Write a data set's folder: shards as the images come, `dataset.json` last, so half a data set cannot be opened."""

import csv
import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arraytp.data.manifest import FILE_NAME, Manifest, ShardEntry, SplitEntry, manifest_text
from arraytp.data.shards import Images, Labels, replace_durably, write_shard
from arraytp.data.statistics import mean_and_std, pixel_counts
from arraytp.errors import UserError

SHARD_BYTES = 2**26
_MARKER = ".arraytp-pack"
SKIPPED_NAME = "skipped.csv"
_OWN_FILES = re.compile(r"([a-z][a-z0-9_]*-[0-9]{5}\.h5|dataset\.json|skipped\.csv)(\.tmp)?")


@dataclass(frozen=True)
class Description:
    """What a data set is, before its images are known: the fields of `dataset.json` that the packer gives."""

    name: str
    shape: tuple[int, int, int]
    classes: Sequence[str]
    source: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetWriter:
    """Takes images split by split and writes them as shards; memory holds one shard.

    Use it through `writing`, which finishes or cleans up.
    """

    folder: Path
    description: Description
    compression: bool
    shard_images: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _splits: dict[str, list[ShardEntry]] = field(default_factory=dict)
    _split: str = ""
    _images: Images = field(default_factory=lambda: np.empty((0, 1, 1, 1), np.uint8))
    _labels: Labels = field(default_factory=lambda: np.empty(0, np.int64))
    _filled: int = 0
    _counts: npt.NDArray[np.int64] | int = 0

    def add(self, split: str, images: Images, labels: Labels) -> None:
        """Append images (n, H, W, C) uint8 and labels (n,) integer, in this order, to a split.

        A split is finished when another one is begun.

        Raises
        ------
        UserError
            The images' shape is not the data set's, or a label is out of range.
        """
        if split != self._split:
            self._begin(split)
        self._check(split, images, labels)
        if split == "train":
            self._counts = self._counts + pixel_counts(images)
        done = 0
        while done < len(images):
            take = min(len(images) - done, self.shard_images - self._filled)
            self._images[self._filled : self._filled + take] = images[done : done + take]
            self._labels[self._filled : self._filled + take] = labels[done : done + take]
            self._filled += take
            done += take
            if self._filled == self.shard_images:
                self._write_shard()

    def skip(self, path: str, reason: str) -> None:
        """Note a file that was left out, for `skipped.csv`."""
        self.skipped.append((path, reason))

    def _begin(self, split: str) -> None:
        self._write_shard()
        if split in self._splits:
            raise ValueError(f"split {split!r} was finished before another one was begun")
        self._split = split
        self._splits[split] = []
        self._images = np.empty((self.shard_images, *self.description.shape), np.uint8)
        self._labels = np.empty(self.shard_images, np.int64)

    def _check(self, split: str, images: Images, labels: Labels) -> None:
        if images.shape[1:] != self.description.shape or images.dtype != np.uint8 or labels.shape != (len(images),):
            raise UserError(
                f"{split}: images are {images.dtype} {images.shape} with labels {labels.shape}, "
                f"expected uint8 (N, {', '.join(map(str, self.description.shape))}) with labels (N,)"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.description.classes)))
        if len(wrong):
            raise UserError(
                f"{split}: label {labels[wrong[0]]} is out of range, expected 0 to {len(self.description.classes) - 1}"
            )

    def _write_shard(self) -> None:
        if not self._filled:
            return
        entries = self._splits[self._split]
        path = self.folder / f"{self._split}-{len(entries):05d}.h5"
        images, labels = self._images[: self._filled], self._labels[: self._filled]
        entries.append(write_shard(path, images, labels, compression=self.compression))
        self._filled = 0

    def finish(self) -> Manifest:
        """Write what is left, `skipped.csv` if a file was skipped, and `dataset.json`.

        Raises
        ------
        UserError
            There are no train images, or a split is empty.
        """
        self._write_shard()
        empty = [split for split in ("train", *self._splits) if not self._splits.get(split)]
        if empty:
            raise UserError(f"{self.folder}: no image for split {empty[0]!r}; nothing was packed")
        if self.skipped:
            self._write_skipped()
        mean, std = mean_and_std(np.asarray(self._counts))
        manifest = Manifest(
            name=self.description.name,
            shape=list(self.description.shape),
            classes=list(self.description.classes),
            mean=mean,
            std=std,
            splits={
                split: SplitEntry(count=sum(entry.count for entry in entries), shards=entries)
                for split, entries in self._splits.items()
            },
            source=self.description.source,
        )
        temporary = self.folder / f"{FILE_NAME}.tmp"
        temporary.write_text(manifest_text(manifest), encoding="ascii")
        replace_durably(temporary, self.folder / FILE_NAME)
        return manifest

    def _write_skipped(self) -> None:
        path = self.folder / SKIPPED_NAME
        temporary = path.with_name(f"{SKIPPED_NAME}.tmp")
        # Names of files need not be text.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows([("path", "reason"), *self.skipped])
        replace_durably(temporary, path)


@contextmanager
def writing(
    folder: Path, description: Description, *, compression: bool = False, shard_images: int | None = None
) -> Iterator[DatasetWriter]:
    """Write a data set: `with writing(...) as writer: writer.add(...)`; the block's end writes `dataset.json`.

    An exception in the block removes what was written. After a kill, the shards stay without `dataset.json`,
    cannot be opened, and are replaced by the next call.

    Parameters
    ----------
    folder : Path
        New, empty, or left by a call that was killed.
    description : Description
    compression : bool
        Gzip the shards.
    shard_images : int, optional
        Images per shard; by default as many as 64 MiB hold.

    Raises
    ------
    UserError
        The folder holds something else, is being written by another process, or cannot be written.
    """
    image_bytes = int(np.prod(description.shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_files(folder)
        with (folder / _MARKER).open("w") as marker:
            _lock(folder, marker.fileno())
            # Another process may have finished between the first look and the lock.
            _refuse_foreign_files(folder)
            _remove_own_files(folder)
            writer = DatasetWriter(folder, description, compression, shard_images or max(1, SHARD_BYTES // image_bytes))
            try:
                yield writer
                writer.finish()
            except BaseException:
                _remove_own_files(folder)
                raise
            finally:
                (folder / _MARKER).unlink()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error


def _refuse_foreign_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    if FILE_NAME in names:
        raise UserError(f"{folder}: already holds a data set; remove it or choose another folder")
    leftovers = _MARKER in names
    foreign = [name for name in names if name != _MARKER and not (leftovers and _OWN_FILES.fullmatch(name))]
    if foreign:
        raise UserError(f"{folder}: not empty (it holds {foreign[0]!r}); choose a new or empty folder")


def _lock(folder: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is packing into this folder") from None


def _remove_own_files(folder: Path) -> None:
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
