"""File access in the face of concurrent writers, power failures and errors of the operating system."""

import errno
import fcntl
import os
import re
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from arraytp.errors import UnreadableError, UserError

# Another process holds the lock; where record locks emulate flock, the error is EACCES.
_HELD = (errno.EAGAIN, errno.EACCES)
# Seconds to wait for the first byte from a pipe.
_PATIENCE = 2.0
_ERRNO = re.compile(r"errno = ([0-9]+)")


class HeldError(Exception):
    """Another process has locked the file."""


def open_locked(path: Path) -> tuple[BinaryIO, bool]:
    """Open a file for reading and writing, creating it if missing, and lock out all others that open it this way.

    Returns the file, unchanged and at its beginning, and whether it is locked: on a file system without locks, nobody
    is kept out. Closing the file releases the lock, however the process ends. HeldError if another process holds it.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            locked = _lock(file)
            if _is_at(file, path):
                return file, locked
        except BaseException:
            file.close()
            raise
        # The former holder of the lock has moved or removed the file: the one locked here is not what others open.
        file.close()


def remove_locked(file: BinaryIO, path: Path) -> None:
    """Remove a file opened by `open_locked`, then close it, so that others can open a new one."""
    with file, suppress(OSError):
        path.unlink()


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise HeldError from None
        # ENOLCK, EIO, EOPNOTSUPP, ENOSYS, 524 …: network file systems have many errors for having no locks.
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; some network file systems do so by themselves and refuse the call."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def system_words(error: BaseException) -> str:
    """Return the operating system's message for an error of its own; "" for an error in the file's content.

    After too many open files, missing permissions or a lost server, nothing need be wrong with the file. HDF5 reports
    the system's errors in the middle of its own text.
    """
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if not isinstance(error, OSError):
        return ""
    match = _ERRNO.search(str(error))
    number = error.errno or (int(match[1]) if match else 0)
    return os.strerror(number) if number else ""


@contextmanager
def telling_damage(path: Path, unreadable: str, damaged: str) -> Iterator[None]:
    """Raise UnreadableError for the system's errors, and UserError for anything else wrong with an HDF5 file.

    Both texts have a placeholder {} for the error's message. A file that the system cannot read need not be damaged.
    """
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        if words := system_words(error):
            raise UnreadableError(f"{path}: {unreadable.format(words)}") from error
        raise UserError(f"{path}: {damaged.format(' '.join(str(error).split()))}") from error


def read_small(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes; UserError if it is larger, or a pipe without a writer."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode) and not select.select([file], [], [], _PATIENCE)[0]:
            raise UserError(f"{path}: is a pipe without a writer; give a file")
        os.set_blocking(file.fileno(), True)
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: holds more than {most:,} bytes; is it the right file?")
    return content


def refuse_special(path: Path) -> None:
    """Raise UserError for a pipe, socket or device, on which a reader could wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        # The error is reported when the file is opened.
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is a pipe or device; give a file")


def real(path: Path) -> Path:
    """Return the absolute path with links resolved; a link to itself stays, and is reported when it is opened."""
    return Path(os.path.realpath(path))
