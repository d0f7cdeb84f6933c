"""Files that are replaced only when the new one is complete and on the disk."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def json_safe(value: Any) -> Any:
    """Return a tree of dicts and lists with NaN and infinities as null, which is what JSON can say."""
    if isinstance(value, dict):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as `replacing` does; NaN and infinities are null."""
    write_file(path, (json.dumps(json_safe(dict(content)), indent=2) + "\n").encode())


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to; the one of that name is replaced only when the new one is complete and on the disk.

    Raises
    ------
    OSError
        If the disk is full, say; the former file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
