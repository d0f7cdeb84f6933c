"""A training split in two parts: images for training, and images held out for validation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arraytp.data.dataset import Dataset
from arraytp.data.order import Rows
from arraytp.data.shards import Images, Labels, Room
from arraytp.streams import stream

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Division:
    """The splits `train` and `validation` of a data set, read like a `Dataset`.

    `rows` maps each split to its rows of the data set's training split, in increasing order.
    """

    dataset: Dataset
    rows: Mapping[str, Rows]

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.dataset.shape

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each split."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def nbytes(self, split: str) -> int:
        """Bytes of the split's pixels in memory."""
        return len(self.rows[split]) * int(np.prod(self.shape))

    def chunks(self, split: str) -> list[tuple[int, int]]:
        """Return the position ranges (start, stop) of the split, each within one chunk of the data set."""
        edges = [(start, stop) for start, stop in self.dataset.chunks(TRAIN)]
        positions = np.searchsorted(self.rows[split], edges)
        return [(int(start), int(stop)) for start, stop in positions if start < stop]

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        """Read the images and labels at positions `start` to `stop` − 1; otherwise like `Dataset.read`."""
        room = Room.of(stop - start, self.shape)
        self.pick(split, np.arange(start, stop), *room)
        return room

    def pick(self, split: str, positions: Rows, images: Images, labels: Labels) -> None:
        """Read increasing `positions`; otherwise like `Dataset.pick`."""
        self.dataset.pick(TRAIN, self.rows[split][positions], images, labels)

    def load(self, split: str) -> tuple[Images, Labels]:
        """Read a whole split, chunk by chunk."""
        images, labels = Room.of(len(self.rows[split]), self.shape)
        for start, stop in self.chunks(split):
            self.pick(split, np.arange(start, stop), images[start:stop], labels[start:stop])
        return images, labels


def divide(dataset: Dataset, count: int) -> Division:
    """Hold out `count` images of the training split; raises like `Dataset.labels`."""
    held = held_out(dataset.labels(TRAIN), count)
    kept = np.setdiff1d(np.arange(dataset.counts[TRAIN]), held, assume_unique=True)
    return Division(dataset, {TRAIN: kept, VALIDATION: held})


def held_out(labels: npt.NDArray[np.int64], count: int) -> Rows:
    """Choose `count` rows at random, stratified by class: count · n_c/n of each, rounded by largest remainders.

    The rows, in increasing order, depend on labels and count alone, not on a run's seed, so all seeds, rules and
    settings hold out the same images.
    """
    shares, remainders = np.divmod(count * np.bincount(labels), len(labels))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    chosen = [
        stream(0, "validation", label).permutation(np.flatnonzero(labels == label))[:share]
        for label, share in enumerate(shares)
    ]
    return np.sort(np.concatenate(chosen))
