"""Write a data set's folder: shards as images arrive, `dataset.json` last, so a partial data set cannot be opened.

A pack that was killed resumes where it stopped: finished shards are verified and kept, and the packer continues with
the first image that is in none of them.
"""

import csv
import errno
import io
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from arraytp import __version__
from arraytp.data.journal import Finished, Journal, Skipped
from arraytp.data.manifest import FILE_NAME, Manifest, ShardEntry, SplitEntry, manifest_text
from arraytp.data.shards import Images, Labels, Room, damage, write_shard
from arraytp.data.statistics import PixelSums, mean_and_std, pixel_sums
from arraytp.disk import HeldError, open_locked
from arraytp.errors import UnreadableError, UserError
from arraytp.files import write_file

SHARD_BYTES = 2**26
_MARKER = ".arraytp-pack"
SKIPPED_NAME = "skipped.csv"
_REMOVED = re.compile(r"\.nfs[0-9a-f]+")
_OWN_FILES = re.compile(r"([a-z][a-z0-9_]*-[0-9]{5}\.h5|dataset\.json|skipped\.csv)(\..*partial)?")


@dataclass(frozen=True)
class Description:
    """A data set before its images are known: the fields of `dataset.json` that the packer provides.

    `fingerprint` changes with everything else that determines the images and their order, such as the state of the
    source's files; a pack that was killed resumes only if it is unchanged.
    """

    name: str
    shape: tuple[int, int, int]
    classes: Sequence[str]
    source: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


class DatasetWriter:
    """Takes images split by split and writes them as shards; memory holds two shards, and the file of one.

    A thread writes one shard while the next is being filled. Use it through `writing`, which finishes or cleans up.
    """

    def __init__(
        self,
        folder: Path,
        description: Description,
        journal: Journal,
        finished: Sequence[Finished],
        rooms: tuple[Room, Room],
        *,
        compression: bool,
    ) -> None:
        self.folder, self.description = folder, description
        self.skipped: list[Skipped] = [skipped for shard in finished for skipped in shard.skipped]
        self._journal, self._compression = journal, compression
        self._splits: dict[str, list[ShardEntry]] = {}
        for shard in finished:
            self._splits.setdefault(shard.split, []).append(shard.entry)
        self._split = finished[-1].split if finished else ""
        self._sums: PixelSums | None = finished[-1].sums if finished else None
        self._noted = len(self.skipped)
        self._filling, self._stored = rooms
        self._shard_images, self._filled = len(rooms[0].labels), 0
        self._thread = ThreadPoolExecutor(1, "write")
        self._storing: Future[None] | None = None

    def taken(self, split: str) -> int:
        """Return how many of the split's rows an earlier call has processed, skipped files included."""
        skipped = sum(name == split for name, _, _ in self.skipped)
        return skipped + sum(entry.count for entry in self._splits.get(split, []))

    def add(self, split: str, images: Images, labels: Labels) -> None:
        """Append images (n, H, W, C) uint8 and labels (n,) integer, in this order, to a split.

        A split is finished once another one is begun. UserError for images of another shape or labels out of range.
        """
        if not len(images) and split in self._splits:
            return
        self._turn_to(split)
        self._check(split, images, labels)
        done = 0
        while done < len(images):
            take = min(len(images) - done, self._shard_images - self._filled)
            self._filling.images[self._filled : self._filled + take] = images[done : done + take]
            self._filling.labels[self._filled : self._filled + take] = labels[done : done + take]
            self._filled += take
            done += take
            if self._filled == self._shard_images:
                self._write_shard()

    def skip(self, split: str, path: str, reason: str) -> None:
        """Record for `skipped.csv` a file that was left out; it counts as the split's next row in `taken`."""
        self._turn_to(split)
        # File names need not be valid text.
        self.skipped.append((split, path.encode("utf-8", "backslashreplace").decode("utf-8"), reason))

    def _turn_to(self, split: str) -> None:
        if split == self._split:
            return
        self._write_shard()
        if split in self._splits:
            raise ValueError(f"split {split!r} was finished before another one was begun")
        self._split = split
        self._splits[split] = []

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
        """Hand the filled shard to the thread, once the thread has written the previous one."""
        if not self._filled:
            return
        self._await_shard()
        self._filling, self._stored = self._stored, self._filling
        images, labels = self._stored.images[: self._filled], self._stored.labels[: self._filled]
        self._storing = self._thread.submit(self._store, self._split, images, labels, self.skipped[self._noted :])
        self._noted = len(self.skipped)
        self._filled = 0

    def _await_shard(self) -> None:
        if self._storing is not None:
            self._storing.result()

    def _store(self, split: str, images: Images, labels: Labels, skipped: list[Skipped]) -> None:
        entries = self._splits[split]
        path = self.folder / f"{split}-{len(entries):05d}.h5"
        if split == "train":
            sums = pixel_sums(images)
            self._sums = sums if self._sums is None else self._sums.plus(sums)
        entry = write_shard(path, images, labels, compression=self._compression)
        self._journal.append(Finished(split=split, entry=entry, skipped=skipped, sums=self._sums))
        entries.append(entry)

    def close(self) -> None:
        """Wait for the shard that is being written; errors are ignored."""
        self._thread.shutdown()

    def finish(self) -> Manifest:
        """Write the remaining images, `skipped.csv` if files were, and `dataset.json`; UserError for an empty split."""
        self._write_shard()
        self._await_shard()
        empty = [split for split in ("train", *self._splits) if not self._splits.get(split)]
        if empty:
            raise UserError(f"{self.folder}: no image for split {empty[0]!r}; nothing was packed")
        if self.skipped:
            table = io.StringIO()
            csv.writer(table).writerows([("path", "reason"), *(skipped[1:] for skipped in self.skipped)])
            write_file(self.folder / SKIPPED_NAME, table.getvalue().encode())
        assert self._sums is not None
        mean, std = mean_and_std(self._sums)
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
        write_file(self.folder / FILE_NAME, manifest_text(manifest).encode("ascii"))
        return manifest


@contextmanager
def writing(
    folder: Path, description: Description, *, compression: bool = False, shard_images: int | None = None
) -> Iterator[DatasetWriter]:
    """Write a data set: `with writing(...) as writer: writer.add(...)`; the block's end writes `dataset.json`.

    The block must begin each split at row `writer.taken(split)`: a call that was killed or interrupted, or that failed
    for lack of disk space, memory or a server, leaves its finished shards without `dataset.json`, and the next call for
    the same data set continues after them and ends with the same bytes. Any other exception removes what was written.

    `folder` is new, empty, or left by a call that did not finish; leftovers of another data set are replaced. A shard
    has `shard_images` images, by default as many as fit into 64 MiB. UserError if the folder holds something else, is
    being written by another process or cannot be written, or if memory cannot hold two shards.
    """
    shard_images = shard_images or max(1, SHARD_BYTES // int(np.prod(description.shape)))
    versions = {"arraytp": __version__, "hdf5": h5py.version.hdf5_version, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    identity = [asdict(description), compression, shard_images, versions]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; a data set needs a folder")
    rooms = _two_rooms(folder, shard_images, description.shape)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_files(folder)
        with _locked_marker(folder) as marker:
            # Another process may have finished between the first check and the lock.
            _refuse_foreign_files(folder)
            journal = Journal(marker, identity)
            finished = _sound_shards(folder, description, journal.read())
            if (folder / FILE_NAME).exists() and not finished:
                if not marker.seek(0, os.SEEK_END):
                    # This marker is our own, new and empty: the process that finished has removed its marker.
                    (folder / _MARKER).unlink()
                raise UserError(_occupied(folder))
            journal.restart(finished)
            _remove_own_files(folder, keep=[shard.entry.file for shard in finished])
            writer = DatasetWriter(folder, description, journal, finished, rooms, compression=compression)
            yield from _written(writer)
            (folder / _MARKER).unlink()
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from error
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _two_rooms(folder: Path, shard_images: int, shape: tuple[int, int, int]) -> tuple[Room, Room]:
    try:
        return Room.of(shard_images, shape), Room.of(shard_images, shape)
    except (MemoryError, ValueError) as error:
        height, width, channels = shape
        raise UserError(
            f"{folder}: two shards of {shard_images} images of {height}x{width}x{channels} do not fit into memory; use "
            "a smaller --shard-images"
        ) from error


def _written(writer: DatasetWriter) -> Iterator[DatasetWriter]:
    """Yield the writer and finish; remove what was written after an error that the same input would cause again."""
    try:
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()
    except (OSError, UnreadableError, MemoryError):
        raise
    except Exception:
        _remove_own_files(writer.folder)
        (writer.folder / _MARKER).unlink()
        raise


def _sound_shards(folder: Path, description: Description, finished: list[Finished]) -> list[Finished]:
    """Return the finished shards that precede the first whose file is not as it was written."""
    for number, shard in enumerate(finished):
        if any(damage(folder / shard.entry.file, shard.entry, description.shape, len(description.classes))):
            return finished[:number]
    return finished


def _cannot_write(folder: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or folder}: cannot be written: {reason}"
    return f"{folder}: cannot be written: {reason}; make room and run the same pack again, it goes on where it stopped"


def _occupied(folder: Path) -> str:
    return f"{folder}: already holds a data set; remove it or choose another folder"


def _refuse_foreign_files(folder: Path) -> None:
    # A network file system keeps a name for a removed file that is still open, such as an archive being unpacked.
    names = sorted(path.name for path in folder.iterdir() if not _REMOVED.fullmatch(path.name))
    leftovers = _MARKER in names
    # If the marker is still there, the call that wrote the data set was killed at its very end.
    if FILE_NAME in names and not leftovers:
        raise UserError(_occupied(folder))
    foreign = [name for name in names if name != _MARKER and not (leftovers and _OWN_FILES.fullmatch(name))]
    if foreign:
        raise UserError(f"{folder}: not empty (it holds {foreign[0]!r}); choose a new or empty folder")


def _locked_marker(folder: Path) -> BinaryIO:
    """Open and lock the journal; on a file system without locks, nothing keeps a second pack out."""
    try:
        return open_locked(folder / _MARKER)[0]
    except HeldError:
        raise UserError(f"{folder}: another process is packing into this folder") from None


def _remove_own_files(folder: Path, keep: Collection[str] = ()) -> None:
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name) and path.name not in keep:
            path.unlink()
