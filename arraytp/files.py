"""Files that are replaced only when the new one is complete and on the disk."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from arraytp.disk import HeldError, flush_folder, open_locked, real
from arraytp.errors import UserError

# Seconds to wait for another process that writes the same file, and between two attempts.
_PATIENCE, _PAUSE = 5.0, 0.02


def json_safe(value: Any) -> Any:
    """Return a tree of dicts and lists with None for NaN and infinities, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as `replacing` does; NaN and infinities become null."""
    write_file(path, (json.dumps(json_safe(dict(content)), indent=2) + "\n").encode())


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def check_output(option: str, path: Path, example: str, is_ours: Callable[[], bool], ours: str) -> None:
    """Raise UserError unless an option's file can be written and, if it exists, is one of ours."""
    if not real(path).parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file, for example {path / example}")
    if path.exists() and not is_ours():
        raise UserError(f"{option} {path}: exists and is not {ours}; give another file")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it replaces the file at `path` only when it is complete and on the disk.

    If two processes write the same file, the second waits; the file is always the complete output of one of them.
    OSError if, for example, the disk is full or another process does not finish; the former file is then kept.
    """
    file, partial = _open_partial(path)
    with file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            # Removed while the lock is held: afterwards the name may be another process's.
            partial.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


def _open_partial(path: Path) -> tuple[BinaryIO, Path]:
    """Open the file that is to replace another; its name is fixed, so that one left behind is used again."""
    partial = path.with_name(path.name + ".partial")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            file, locked = open_locked(partial)
        except HeldError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process is writing it", str(path)) from None
            time.sleep(_PAUSE)
            continue
        if locked:
            return file, partial
        # Without locks, only a unique name keeps one process's bytes apart from another's.
        file.close()
        partial.unlink(missing_ok=True)
        own = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
        return own.open("w+b"), own
