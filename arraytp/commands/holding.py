"""Result folders that a command holds, so that no other writes to them."""

import errno
from pathlib import Path
from typing import BinaryIO, Self

import click

from arraytp.disk import HeldError, open_locked, remove_locked
from arraytp.errors import UserError

LOCK_NAME = ".arraytp-run"
# Where this process must not write, it can do no harm.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Holds:
    """While entered, the folders taken are this process's own; each holds a file `.arraytp-run` for so long."""

    def __init__(self) -> None:
        self._held: dict[Path, BinaryIO] = {}
        self._warned = False

    def __enter__(self) -> Self:
        """Hold nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give all folders back."""
        self.give_back()

    def give_back(self) -> None:
        """Let others have all folders."""
        for folder, file in self._held.items():
            remove_locked(file, folder / LOCK_NAME)
        self._held = {}

    def take(self, folder: Path) -> None:
        """Hold a folder, if it exists and is not held yet; UserError if another process holds it."""
        if folder in self._held or not folder.is_dir():
            return
        try:
            self._held[folder], locked = open_locked(folder / LOCK_NAME)
        except HeldError:
            raise UserError(f"{folder}: another run is writing here; wait for it, or --out another folder") from None
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
            return
        if not locked and not self._warned:
            self._warned = True
            click.echo(
                f"arraytp: note: {folder}: this file system has no locks; do not start a second run here", err=True
            )
