"""The tables of a result folder, kept as text so that a checkpoint can hold them exactly."""

from dataclasses import dataclass, field
from pathlib import Path

from arraytp.files import write_file

METRICS_COLUMNS = (
    "epoch", "seconds", "lr", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
)  # fmt: skip
# With train.validation, these follow the others; only the last epoch then has values for the test split.
VALIDATION_COLUMNS = ("validation_loss", "validation_top1", "validation_top5")
STEPS_COLUMNS = ("step", "epoch", "train_loss", "train_top1", "train_top5")
ANGLES_COLUMNS = ("step", "epoch", "block", "angle_deg", "distance")
GNT_COLUMNS = ("gnt_angle_deg",)
OPTIMUM_COLUMNS = ("optimum_distance",)
DRIFT_COLUMNS = ("step", "block", "loss", "angle_deg", "own_deg", "drift_rms", "drift_largest")
FEEDBACK_COLUMNS = ("step", "epoch", "block", "loss", "angle_deg", "distance", "ratio")
# Tables of earlier versions, or without GNT, lack these.
NEWER_COLUMNS = ("ratio", *GNT_COLUMNS)


@dataclass
class CsvTable:
    """A CSV file that grows row by row; numbers are written so that they read back exactly.

    Unless `written`, the rows are kept in memory only.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[str] = field(default_factory=list)
    written: bool = True

    def restart(self, rows: list[str]) -> None:
        """Write the file again with the given rows; columns that rows of an earlier version lack become nan."""
        self.rows = [row + ",nan" * (len(self.columns) - 1 - row.count(",")) for row in rows]
        if self.written:
            write_file(self.path, "".join(f"{line}\n" for line in (",".join(self.columns), *self.rows)).encode())

    def keep(self) -> None:
        """Force all rows to disk, where appended ones may not be yet, because a summary must not outlive them."""
        self.restart(self.rows)

    def append(self, *values: float) -> None:
        """Add a row to the table and to the file's end."""
        row = ",".join(repr(value) for value in values)
        self.rows.append(row)
        if self.written:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")


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
