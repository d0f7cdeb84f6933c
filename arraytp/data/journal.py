"""The journal of a pack: its settings and its finished shards, so that a killed pack can continue.

The first line is a checksum of what is packed and how; each further line describes one finished shard as JSON. Only a
line that ends in a newline counts: a process that is killed while writing loses that line and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from arraytp.data.manifest import ShardEntry, SplitName
from arraytp.data.statistics import PixelSums

Skipped = tuple[SplitName, str, str]
"""Split, path and reason of a file that was left out."""


class Finished(BaseModel):
    """A shard that is on disk.

    `skipped` are the files left out since the previous shard, in the order of the source; `sums` are over all train
    images up to and including this shard, None before the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: SplitName
    entry: ShardEntry
    skipped: list[Skipped]
    sums: PixelSums | None


class Journal:
    """The journal in an open file; a journal of another `identity`, a JSON document, counts as empty."""

    def __init__(self, file: BinaryIO, identity: Any) -> None:
        text = json.dumps(identity, sort_keys=True)
        self._file, self._head = file, hashlib.sha256(text.encode("ascii")).hexdigest().encode("ascii") + b"\n"

    def read(self) -> list[Finished]:
        """Return the finished shards, up to the first line that is incomplete or invalid."""
        self._file.seek(0)
        lines = iter(self._file.readlines())
        return list(_parsed(lines)) if next(lines, b"") == self._head else []

    def restart(self, finished: list[Finished]) -> None:
        """Truncate the journal after the `finished` shards, which are the first of those that `read` returned."""
        self._file.seek(0)
        if finished:
            for _ in range(1 + len(finished)):
                self._file.readline()
            self._file.truncate()
        else:
            self._file.truncate(0)
            self._write(self._head)

    def append(self, finished: Finished) -> None:
        """Add a shard that is already on disk."""
        self._write(finished.model_dump_json().encode() + b"\n")

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(lines: Iterator[bytes]) -> Iterator[Finished]:
    for line in lines:
        try:
            if line.endswith(b"\n"):
                yield Finished.model_validate_json(line)
        except ValidationError:
            return
