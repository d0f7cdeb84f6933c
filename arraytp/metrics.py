"""The tables of a result folder, kept as text so that a checkpoint can hold them exactly; how its files are written."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from arraytp.disk import HeldError, flush_folder, open_locked

METRICS_COLUMNS = (
    "epoch", "seconds", "lr", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
)  # fmt: skip
ANGLES_COLUMNS = ("step", "epoch", "block", "angle_deg", "distance")
FEEDBACK_COLUMNS = ("step", "epoch", "block", "loss", "angle_deg", "distance")
# Seconds to wait for another process that writes the same file, and between two looks.
_PATIENCE, _PAUSE = 5.0, 0.02


@dataclass
class CsvTable:
    """A CSV file that grows by rows; numbers are written so that they read back exactly.

    Parameters
    ----------
    path : Path
    columns : tuple of str
    rows : list of str
        Without line ends.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[str] = field(default_factory=list)

    def restart(self, rows: list[str]) -> None:
        """Write the file anew with the given rows."""
        self.rows = rows
        write_file(self.path, "".join(f"{line}\n" for line in (",".join(self.columns), *rows)).encode())

    def append(self, *values: float) -> None:
        """Add a row to the table and to the file's end."""
        row = ",".join(repr(value) for value in values)
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to; the one of that name is replaced only when the new one is complete and on the disk.

    Of two processes that write the same file, the second waits; what is there is always one's or the other's, whole.

    Raises
    ------
    OSError
        If the disk is full, say, or another process does not come to an end; the former file is still there.
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
            # While the lock is held: afterwards the name may be another process's.
            partial.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


def _open_partial(path: Path) -> tuple[BinaryIO, Path]:
    """Open the file that is to replace another; its name is the same each time, so that one left behind is taken up."""
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
        # Without locks, only a name of its own keeps a process's bytes apart from another's.
        file.close()
        partial.unlink(missing_ok=True)
        own = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
        return own.open("w+b"), own


@dataclass
class Totals:
    """Sums over the images seen so far in an epoch, in float64 and in the order of the batches."""

    loss: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    images: int = 0

    def add(self, loss: float, top1: float, top5: float, images: int) -> None:
        """Add a batch's sums."""
        self.loss += loss
        self.top1 += top1
        self.top5 += top5
        self.images += images

    def means(self) -> tuple[float, float, float]:
        """Return mean loss, top-1 and top-5 accuracy in percent; NaN without images."""
        if not self.images:
            return float("nan"), float("nan"), float("nan")
        return self.loss / self.images, 100 * self.top1 / self.images, 100 * self.top5 / self.images
