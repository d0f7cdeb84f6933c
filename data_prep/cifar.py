"""Pack CIFAR-10 and CIFAR-100: the official python or binary files, as a tar archive or extracted."""

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arraytp.data.shards import Images, Labels
from arraytp.data.writer import Description, writing
from arraytp.data_prep.batches import checked_labels, images_of_planes, read_batch, refuse_text_transfer
from arraytp.data_prep.files import Files, open_files
from arraytp.data_prep.options import PackOptions, check_limits, chosen_rows
from arraytp.errors import UserError

SHAPE = (32, 32, 3)
_PIXELS = 3072
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class _Layout:
    """How a data set is laid out in its official files.

    `folders` are those of the python and the binary version, `batches` the files of each split, without the extension;
    in the binary version a row has `label_bytes` labels, of which the last is used.
    """

    classes: tuple[str, ...]
    folders: tuple[str, str]
    batches: Mapping[str, tuple[str, ...]]
    label_key: str
    label_bytes: int


LAYOUTS = {
    "cifar10": _Layout(
        tuple(_CIFAR10.split()),
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        "labels",
        1,
    ),
    "cifar100": _Layout(
        tuple(_CIFAR100.split()),
        ("cifar-100-python", "cifar-100-binary"),
        {"train": ("train",), "test": ("test",)},
        "fine_labels",
        2,
    ),
}

_Reader = Callable[[bytes, str, _Layout], tuple[Images, Labels]]


def read_pickled(content: bytes, where: str, layout: _Layout) -> tuple[Images, Labels]:
    """Read a batch of the python version; see `read_batch`."""
    return read_batch(io.BytesIO(content), where, layout.label_key, len(layout.classes), 0)


def read_binary(content: bytes, where: str, layout: _Layout) -> tuple[Images, Labels]:
    """Read a batch of the binary version: rows of one label (CIFAR-100: coarse, fine) and 3072 values in colour planes.

    UserError if the file is empty or not a whole number of rows, or a label is out of range.
    """
    row_bytes = layout.label_bytes + _PIXELS
    if not content or len(content) % row_bytes:
        refuse_text_transfer(content, where)
        raise UserError(f"{where}: {len(content)} bytes are not a whole number of rows of {row_bytes}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
    labels = checked_labels(rows[:, layout.label_bytes - 1].tolist(), len(rows), len(layout.classes), 0, where)
    return images_of_planes(rows[:, layout.label_bytes :]), labels


def _find(files: Files, layout: _Layout) -> tuple[_Reader, dict[str, list[int]]]:
    """Find the version that exists, in its folder or in `files.root` itself, and the rows of each split's files."""
    for folder, ending, reader in ((layout.folders[0], "", read_pickled), (layout.folders[1], ".bin", read_binary)):
        for prefix in (f"{folder}/", ""):
            names = {split: [f"{prefix}{name}{ending}" for name in names] for split, names in layout.batches.items()}
            rows = {split: [files.find(name) for name in names[split]] for split in names}
            rows_of = {split: [row for row in part if row is not None] for split, part in rows.items()}
            if not any(rows_of.values()):
                continue
            for split, part in rows.items():
                if None in part:
                    raise UserError(f"{files.root}: no {names[split][part.index(None)]}, but other batches are there")
            return reader, rows_of
    first = next(iter(layout.batches.values()))[0]
    raise UserError(f"{files.root}: no {layout.folders[0]}/{first} and no {layout.folders[1]}/{first}.bin")


def pack(source: str, src: Path, dst: Path, options: PackOptions) -> None:
    """Pack official files, CIFAR-100 with its fine labels; train images are shuffled, test images keep their order.

    `src` is a tar archive, the official folder, or a folder that contains it. UserError if a file is missing, damaged
    or hostile, a limit exceeds the number of images, or `dst` is not free.
    """
    check_limits(options, ("train", "test"))
    layout = LAYOUTS[source]
    sums = {}
    splits = {}
    with open_files(src, dst) as files:
        reader, rows_of = _find(files, layout)
        for split, rows in rows_of.items():
            parts = []
            for row in rows:
                content = files.content(row)
                sums[files.names[row].rpartition("/")[2]] = hashlib.sha256(content).hexdigest()
                parts.append(reader(content, f"{src}: {files.names[row]}", layout))
            images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            splits[split] = images, labels, chosen_rows(split, labels, options)
    made = {"packer": source, "limits": dict(options.limits), "seed": options.seed, "sha256": sums}
    description = Description(options.name or source, SHAPE, layout.classes, made)
    with writing(dst, description, compression=options.compression, shard_images=options.shard_images) as writer:
        for split, (images, labels, order) in splits.items():
            rest = order[writer.taken(split) :]
            writer.add(split, images[rest], labels[rest])
