"""Result folders that a process holds, so that no other writes to them."""

import errno
import resource
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import click

from arraytp.disk import HeldError, open_locked, remove_locked
from arraytp.errors import UserError

LOCK_NAME = ".arraytp-run"
# A folder that this process cannot write to needs no lock.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
# Files that a run may have open besides its locks: shards, modules being imported, pipes.
_OTHER_FILES = 256


class Holds(ExitStack):
    """Reserve the folders taken for this process while entered; each contains a file `.arraytp-run` meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._held: set[Path] = set()
        self._warned = False

    def take(self, folder: Path) -> None:
        """Hold a folder, if it exists and is not held yet; UserError if another process holds it."""
        if folder in self._held or not folder.is_dir():
            return
        _allow_files(len(self._held) + 1 + _OTHER_FILES)
        try:
            file, locked = open_locked(folder / LOCK_NAME)
        except HeldError:
            raise UserError(f"{folder}: another run is writing here; wait for it, or --out another folder") from None
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
            return
        self._held.add(folder)
        self.callback(self._give_back, folder, file)
        if not locked and not self._warned:
            self._warned = True
            click.echo(
                f"arraytp: note: {folder}: this file system has no locks; do not start a second run here", err=True
            )

    def _give_back(self, folder: Path, file: BinaryIO) -> None:
        self._held.remove(folder)
        remove_locked(file, folder / LOCK_NAME)


def _allow_files(count: int) -> None:
    """Let this process have `count` files open at a time, or as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
