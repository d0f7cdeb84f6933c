"""One shard file: HDF5 with `images`, `labels` and one checksum per range of rows.

`checksums[r]` is the CRC-32 of range r's image bytes followed by its labels as little-endian int64; a range is
`range_rows` consecutive rows. Every range is verified when it is read, and `dataset.json` holds the SHA-256 of
`checksums`, so a shard that was replaced by another is detected too.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from arraytp.data.chunks import check_chunks, piece_offset, read_chunk, read_whole
from arraytp.data.manifest import ShardEntry
from arraytp.disk import telling_damage
from arraytp.errors import UnreadableError, UserError
from arraytp.files import write_file

FORMAT = "arraytp-shard"
VERSION = 1
RANGE_BYTES = 2**20
MAX_RANGE_ROWS = 256

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
ReadRows = Callable[[int, int, Images], None]


class Room(NamedTuple):
    """Memory for images (n, H, W, C) uint8 and their labels (n,) int64."""

    images: Images
    labels: Labels

    @classmethod
    def of(cls, count: int, shape: tuple[int, int, int]) -> "Room":
        """Allocate memory for `count` images of a shape (H, W, C)."""
        return cls(np.empty((count, *shape), np.uint8), np.empty(count, np.int64))


@dataclass(frozen=True)
class Shard:
    """An opened shard: everything but the images, which stay in the file.

    `labels` (count,) int64 are not yet verified; `offset` is where uncompressed images start in the file, in
    bytes, and None where the images are stored in chunks.
    """

    path: Path
    shape: tuple[int, int, int]
    classes: int
    range_rows: int
    labels: Labels
    checksums: npt.NDArray[np.uint32]
    offset: int | None

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.labels)


def range_checksum(images: Images, labels: Labels) -> int:
    """CRC-32 of a range: image bytes (n, H, W, C), then labels (n,) as little-endian int64."""
    return isal_zlib.crc32(labels.astype("<i8").data, isal_zlib.crc32(np.ascontiguousarray(images).data))


def rows_per_range(image_bytes: int) -> int:
    """Return how many images share a checksum: at most 256, and at most 1 MiB of them."""
    return max(1, min(MAX_RANGE_ROWS, RANGE_BYTES // image_bytes))


def write_shard(path: Path, images: Images, labels: Labels, *, compression: bool) -> ShardEntry:
    """Write images (N, H, W, C) and labels (N,) by `arraytp.files.write_file`, and drop the file from the page cache.

    The bytes depend on the arguments and on the HDF5 and zlib libraries only. With `compression`, images are gzipped in
    chunks of one range each; otherwise they are stored contiguously. Returns the shard's entry in `dataset.json`.
    """
    rows = rows_per_range(images[0].nbytes)
    starts = range(0, len(images), rows)
    checksums = np.array([range_checksum(images[i : i + rows], labels[i : i + rows]) for i in starts], dtype="<u4")
    chunk = min(rows, len(images))
    packed = {"compression": "gzip", "compression_opts": 9}
    # Shuffling bytes helps labels of eight bytes; pixels have one byte, so there is nothing to shuffle.
    image_layout = packed | {"chunks": (chunk, *images.shape[1:])} if compression else {}
    label_layout = packed | {"shuffle": True, "chunks": (len(labels),)} if compression else {}
    # In memory first: once the disk is full, HDF5 cannot close a file cleanly, and may abort the process.
    image = io.BytesIO()
    # The v110 format has checksums over HDF5's own structures.
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["range_rows"] = rows
        file.create_dataset("labels", data=labels.astype("<i8"), **label_layout)
        file.create_dataset("checksums", data=checksums)
        file.create_dataset("images", data=images, **image_layout)
    write_file(path, image.getbuffer())
    _leave_cache(path)
    return ShardEntry(file=path.name, count=len(images), bytes=path.stat().st_size, checksum=_digest(checksums))


def _leave_cache(path: Path) -> None:
    """Drop a file from the page cache, so that the next file can reuse its memory.

    A data set larger than memory would evict everything else; and on a virtual machine, touching memory for the first
    time costs more than decoding.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(checksums: npt.NDArray[np.uint32]) -> str:
    return hashlib.sha256(checksums.astype("<u4").tobytes()).hexdigest()


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raise UserError unless a shard exists and has the size given in `dataset.json`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: shard is missing (rows 0 to {entry.count - 1})") from None
    except OSError as error:
        raise UnreadableError(f"{path}: shard cannot be read: {error.strerror}") from error
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "not the one that was packed"
        raise UserError(f"{path}: shard is {what}: {size} bytes, expected {entry.bytes} (rows 0 to {entry.count - 1})")


def _telling_damage(path: Path, rows: str) -> AbstractContextManager[None]:
    damaged = f"shard is damaged, {rows} cannot be read: {{}}"
    return telling_damage(path, f"shard cannot be read: {{}} ({rows})", damaged)


def open_shard(path: Path, entry: ShardEntry, shape: tuple[int, int, int], classes: int) -> Shard:
    """Open a shard of images (H, W, C) and labels below `classes`, and compare it with `dataset.json`.

    UserError if it is missing, damaged, of another version, or not the shard that `dataset.json` names.
    """
    check_size(path, entry)
    with _telling_damage(path, f"rows 0 to {entry.count - 1}"), _opened(path) as file:
        _check_header(path, file, entry, shape)
        return Shard(
            path=path,
            shape=shape,
            classes=classes,
            range_rows=int(file.attrs["range_rows"]),
            labels=read_whole(file["labels"]).astype(np.int64),
            checksums=read_whole(file["checksums"]),
            offset=_images_offset(file),
        )


def _images_offset(file: h5py.File) -> int | None:
    images = file["images"]
    if images.chunks is None:
        return piece_offset(images)
    check_chunks(images, min(int(file.attrs["range_rows"]), len(images)))
    return None


def _opened(path: Path) -> h5py.File:
    # Finished shards are never written to, and many network file systems do not support locks.
    return h5py.File(path, "r", locking=False)


def _check_header(path: Path, file: h5py.File, entry: ShardEntry, shape: tuple[int, int, int]) -> None:
    # The checksums below identify the file. The text of `format` is for other readers and is not read here: HDF5 keeps
    # it in a heap without a checksum, and can loop forever over a damaged one.
    version = file.attrs.get("version")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version} is unknown, this arraytp reads version {VERSION}")
    images, labels, checksums = file["images"], file["labels"], file["checksums"]
    if images.shape != (entry.count, *shape) or images.dtype != np.uint8:
        raise UserError(
            f"{path}: images are {images.dtype} {images.shape}, dataset.json says uint8 {(entry.count, *shape)}"
        )
    if labels.shape != (entry.count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers ({entry.count},)")
    rows = int(file.attrs["range_rows"])
    if rows < 1 or checksums.shape != (-(-entry.count // rows),) or _digest(read_whole(checksums)) != entry.checksum:
        raise UserError(
            f"{path}: not the shard that dataset.json names, or its checksums are damaged (rows 0 to {entry.count - 1})"
        )


def read_rows(shard: Shard, start: int, stop: int, out: Images) -> None:
    """Read rows start … stop − 1 into `out`, C-contiguous, and verify every range they lie in, with its labels.

    UserError if rows are damaged or a label is out of range.
    """
    step = shard.range_rows
    with _reader(shard) as read:
        for first in range(start - start % step, stop, step):
            last = min(first + step, shard.count)
            inside = start <= first and last <= stop
            rows = out[first - start : last - start] if inside else np.empty((last - first, *shard.shape), np.uint8)
            with _telling_damage(shard.path, f"rows {first} to {last - 1}"):
                read(first, last, rows)
            _verify(shard, first, last, rows)
            if not inside:
                low, high = max(first, start), min(last, stop)
                out[low - start : high - start] = rows[low - first : high - first]


def damage(path: Path, entry: ShardEntry, shape: tuple[int, int, int], classes: int) -> Iterator[str]:
    """Read a whole shard and yield a line for each damaged range of rows, or one line if it cannot be opened.

    UnreadableError if the system fails to read it.
    """
    try:
        shard = open_shard(path, entry, shape, classes)
    except UnreadableError:
        raise
    except UserError as error:
        yield str(error)
        return
    out = np.empty((shard.range_rows, *shard.shape), np.uint8)
    for first in range(0, shard.count, shard.range_rows):
        last = min(first + shard.range_rows, shard.count)
        try:
            read_rows(shard, first, last, out[: last - first])
        except UnreadableError:
            raise
        except UserError as error:
            yield str(error)


def _verify(shard: Shard, first: int, last: int, images: Images) -> None:
    labels = shard.labels[first:last]
    if range_checksum(images, labels) != shard.checksums[first // shard.range_rows]:
        raise UserError(
            f"{shard.path}: rows {first} to {last - 1} do not match their checksum; pack the data set again"
        )
    check_labels(shard, first, last)


def check_labels(shard: Shard, first: int, last: int) -> None:
    """Raise UserError, which names the row, for a label out of range in rows first … last − 1."""
    labels = shard.labels[first:last]
    wrong = np.flatnonzero((labels < 0) | (labels >= shard.classes))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{shard.path}: row {first + row} has label {labels[row]}, expected 0 to {shard.classes - 1} "
            f"(rows {first} to {last - 1})"
        )


@contextmanager
def _reader(shard: Shard) -> Iterator[ReadRows]:
    """Yield a function that reads rows into an array.

    The file is opened anew for each call, so no handle is carried across a fork. Plain reads detect a file that was
    truncated meanwhile, where a memory map would kill the process.
    """
    if shard.offset is None:
        with _telling_damage(shard.path, f"rows 0 to {shard.count - 1}"):
            file = _opened(shard.path)
        with file:
            images = file["images"]

            def unpack(first: int, last: int, out: Images) -> None:
                content = np.frombuffer(read_chunk(images, first), np.uint8)
                out[...] = content[: out.size].reshape(out.shape)

            yield unpack
        return
    image_bytes, offset = int(np.prod(shard.shape)), shard.offset
    with _telling_damage(shard.path, f"rows 0 to {shard.count - 1}"):
        raw = shard.path.open("rb")
    with raw:

        def read(first: int, last: int, out: Images) -> None:
            raw.seek(offset + first * image_bytes)
            if raw.readinto(out.data.cast("B")) < out.nbytes:
                raise OSError("the file ends too early")

        yield read
