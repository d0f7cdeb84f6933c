"""Options of every packer, and the choice and order of the images it takes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from arraytp.data.manifest import MAX_SHARDS
from arraytp.data.shards import Labels
from arraytp.errors import UserError
from arraytp.streams import stream

Resize = Literal["stretch", "shorter-crop"]
Exif = Literal["apply", "ignore"]


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack; `limits` maps a split to how many of its images to take.

    The last four are for packers that decode image files: `size` is (H, W), or None for the images' own size; `resize`
    is as in `decode.fit`; more than `max_skipped` broken files are an error; `exif` says whether images are rotated
    according to their EXIF data, and None leaves this to the packer.
    """

    name: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    compression: bool = False
    shard_images: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    resize: Resize = "stretch"
    max_skipped: int = 0
    exif: Exif | None = None


def take_evenly(labels: Labels, limit: int) -> npt.NDArray[np.int64]:
    """Choose `limit` rows evenly by class: the first of each class, then the second of each, …; in ascending order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return np.sort(np.lexsort((labels, rank))[:limit])


def chosen_rows(split: str, labels: Labels, options: PackOptions) -> npt.NDArray[np.int64]:
    """Return the rows of a split to pack, in the order to pack them: train images are shuffled, others are not.

    UserError if the split's limit exceeds its number of images, or its shards would outnumber the available names.
    """
    limit = options.limits.get(split, len(labels))
    if limit > len(labels):
        raise UserError(f"--limit {split}={limit}: there are only {len(labels)} {split} images")
    if options.shard_images and limit > MAX_SHARDS * options.shard_images:
        raise UserError(
            f"--shard-images {options.shard_images}: {limit:,} {split} images are more than {MAX_SHARDS:,} shards; "
            f"give at least {-(-limit // MAX_SHARDS)}"
        )
    rows = take_evenly(labels, limit)
    return stream(options.seed, "shuffle").permutation(rows) if split == "train" else rows


def check_limits(options: PackOptions, splits: Collection[str]) -> None:
    """Raise UserError if a limit names a split that does not exist."""
    for split, limit in options.limits.items():
        if split not in splits:
            raise UserError(f"--limit {split}={limit}: there is no split {split!r}; the splits are {', '.join(splits)}")
