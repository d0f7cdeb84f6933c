"""A data set as the rest of the package sees it: names, counts, statistics and verified rows."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from arraytp.data.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest
from arraytp.data.order import Rows
from arraytp.data.shards import (
    Images,
    Labels,
    Room,
    Shard,
    check_labels,
    check_size,
    damage,
    open_shard,
    read_rows,
    rows_per_range,
)
from arraytp.errors import UserError

_EMBEDDED = Path(__file__).parent / "embedded"
_READ_ROWS = 256
_READ_BYTES = 2**23


@dataclass(frozen=True)
class Dataset:
    """A folder of shards whose `dataset.json` has been checked.

    Every row is verified each time it is read; see `arraytp.data.shards`.
    """

    folder: Path
    manifest: Manifest
    _opened: dict[str, Shard] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.manifest.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        height, width, channels = self.manifest.shape
        return height, width, channels

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return tuple(self.manifest.classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the train split, pixels in [0, 1]."""
        return tuple(self.manifest.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the train split, pixels in [0, 1]."""
        return tuple(self.manifest.std)

    @property
    def digest(self) -> str:
        """SHA-256 over shape, classes, and the checksums of all images and labels; the same wherever the folder is."""
        splits = {
            name: [[shard.count, shard.checksum] for shard in split.shards]
            for name, split in self.manifest.splits.items()
        }
        text = json.dumps([self.shape, self.classes, splits], sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each split."""
        return {name: split.count for name, split in self.manifest.splits.items()}

    def nbytes(self, split: str) -> int:
        """Bytes of the split's pixels in memory."""
        return self._entries(split)[-1][1] * int(np.prod(self.shape))

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        """Read and verify rows, 0 ≤ start ≤ stop ≤ counts[split]: images (n, H, W, C) uint8, labels (n,) int64.

        UserError if there is no such split, or a shard is missing or damaged; the message names the shard and the rows.
        """
        total = self._entries(split)[-1][1]
        if not 0 <= start <= stop <= total:
            raise ValueError(f"rows {start} to {stop} of a split with {total}")
        room = Room.of(stop - start, self.shape)
        self.read_into(split, start, *room)
        return room

    def read_into(self, split: str, start: int, images: Images, labels: Labels) -> None:
        """Read len(images) rows, beginning at `start`, into C-contiguous arrays; otherwise like `read`."""
        stop = start + len(images)
        for entry, end in self._entries(split):
            first = end - entry.count
            low, high = max(start, first), min(stop, end)
            if low < high:
                shard = self._open(entry)
                read_rows(shard, low - first, high - first, images[low - start : high - start])
                labels[low - start : high - start] = shard.labels[low - first : high - first]

    def pick(self, split: str, rows: Rows, images: Images, labels: Labels) -> None:
        """Read increasing `rows` like `read_into`, skipping full checksum ranges that contain none of them."""
        apart = np.flatnonzero(np.diff(rows) > rows_per_range(int(np.prod(self.shape)))) + 1
        for first, stop in pairwise([0, *apart, len(rows)] if len(rows) else []):
            run, part = rows[first:stop] - rows[first], slice(first, stop)
            if run[-1] == len(run) - 1:
                self.read_into(split, int(rows[first]), images[part], labels[part])
            else:
                raw, known = self.read(split, int(rows[first]), int(rows[stop - 1]) + 1)
                images[part], labels[part] = raw[run], known[run]

    def load(self, split: str) -> tuple[Images, Labels]:
        """Read a whole split, like `read`."""
        return self.read(split, 0, self._entries(split)[-1][1])

    def labels(self, split: str) -> Labels:
        """Return the labels of a split, (N,) int64, as stored; a label is verified only when its image is read.

        UserError like `read`, and for a label out of range, so that counts of the labels need one entry per class at
        most.
        """
        shards = [self._open(entry) for entry, _ in self._entries(split)]
        for shard in shards:
            check_labels(shard, 0, shard.count)
        return np.concatenate([shard.labels for shard in shards])

    def chunks(self, split: str) -> list[tuple[int, int]]:
        """Return row ranges (start, stop) that are cheap to read: whole checksum ranges, about 256 rows or 8 MiB each.

        Opens every shard of the split, so a damaged header is reported here.
        """
        ranges = []
        # Larger chunks would not stay in the processor's caches until they are copied into the pool.
        rows = min(_READ_ROWS, max(1, _READ_BYTES // int(np.prod(self.shape))))
        for entry, end in self._entries(split):
            step = self._open(entry).range_rows
            step *= -(-rows // step)
            ranges += [(row, min(row + step, end)) for row in range(end - entry.count, end, step)]
        return ranges

    def problems(self) -> Iterator[str]:
        """Read everything and yield one line for each damaged shard or range of rows."""
        for split in self.manifest.splits:
            for entry, _ in self._entries(split):
                yield from damage(self.folder / entry.file, entry, self.shape, len(self.classes))

    def _entries(self, split: str) -> list[tuple[ShardEntry, int]]:
        """Return each shard of the split with the row after its last."""
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"{self.folder / FILE_NAME}: no split {split!r}, it has {known}")
        shards = self.manifest.splits[split].shards
        ends = np.cumsum([entry.count for entry in shards])
        return [(entry, int(end)) for entry, end in zip(shards, ends, strict=True)]

    def _open(self, entry: ShardEntry) -> Shard:
        if entry.file not in self._opened:
            self._opened[entry.file] = open_shard(self.folder / entry.file, entry, self.shape, len(self.classes))
        return self._opened[entry.file]


def embedded_names() -> tuple[str, ...]:
    """Return the names of the data sets that come with the package."""
    return tuple(sorted(path.parent.name for path in _EMBEDDED.glob(f"*/{FILE_NAME}")))


def open_dataset(name_or_path: str | Path) -> Dataset:
    """Open a data set that comes with the package, by name, or a folder made by `arraytp data pack`.

    The name of an embedded data set means that data set in whatever folder a config is read: a folder of the same name
    must be given as `./NAME`. UserError if there is no such data set, its `dataset.json` is damaged, or a shard is
    missing or has the wrong size.
    """
    dataset = find_dataset(name_or_path)
    for split in dataset.manifest.splits.values():
        for entry in split.shards:
            check_size(dataset.folder / entry.file, entry)
    return dataset


def find_dataset(name_or_path: str | Path) -> Dataset:
    """Open a data set without checking its shards; otherwise like `open_dataset`."""
    folder = _folder(name_or_path)
    return Dataset(folder, read_manifest(folder))


def _folder(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and name_or_path in embedded_names():
        return _EMBEDDED / name_or_path
    if not str(name_or_path).strip():
        raise UserError(f"data set {str(name_or_path)!r}: the name is empty; give a folder")
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"data set {folder}: is a file, expected the folder that arraytp data pack made")
    names = ", ".join(embedded_names())
    raise UserError(f"data set {str(name_or_path)!r}: no such folder, and not one that comes with arraytp ({names})")
