"""Pack the official IDX files of MNIST, Fashion-MNIST and KMNIST, gzipped or not."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arraytp.data.shards import Images, Labels
from arraytp.data.writer import Description, writing
from arraytp.data_prep.options import PackOptions, check_limits, chosen_rows
from arraytp.errors import UserError

SHAPE = (28, 28, 1)
_PREFIXES = {"train": "train", "test": "t10k"}
_DIMENSIONS = {"images": 3, "labels": 1}
_UNSIGNED_BYTE = 8
_GZIP = b"\x1f\x8b"
_MOST_ENTRIES = 2**20
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

CLASSES: Mapping[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": tuple(_FASHION.split(",")),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}


def read_idx(path: Path, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], str]:
    """Read an IDX file of unsigned bytes, gzipped or not: its header first, then no more than the header states.

    `shape` is the shape of each entry: (28, 28) for images (N, 28, 28), () for labels (N,). Returns the array and the
    SHA-256 of the decompressed content. UserError if it is not such a file, is damaged, too short or too long.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP
            with gzip.GzipFile(fileobj=raw) if packed else raw as file:
                return _read_idx(path, file, shape)
    except EOFError:
        raise UserError(f"{path}: truncated gzip file; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_idx(path: Path, file: io.BufferedIOBase, entry: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], str]:
    dimensions = 1 + len(entry)
    start = file.read(4 + 4 * dimensions)
    shape = _checked_header(path, start, dimensions)
    if shape[1:] != entry:
        raise UserError(f"{path}: images of {shape[1:]} pixels, expected {entry}")
    if shape[0] > _MOST_ENTRIES:
        raise UserError(f"{path}: its header promises {shape[0]:,} entries, expected at most {_MOST_ENTRIES:,}")
    promised = int(np.prod(shape))
    # One byte more shows that the file is too long; asking for it also makes gzip verify its own checksum.
    content = file.read(promised + 1)
    if len(content) != promised:
        short = len(content) < promised
        length = (
            f"{'truncated' if short else 'too long'}: {len(start) + len(content)} bytes{'' if short else ' or more'}"
        )
        raise UserError(f"{path}: {length}, its header {shape} needs {len(start) + promised}")
    array = np.frombuffer(content, np.uint8).reshape(shape)
    return array, hashlib.sha256(start + content).hexdigest()


def _checked_header(path: Path, start: bytes, dimensions: int) -> tuple[int, ...]:
    """Return the shape that the first bytes of a file state."""
    if not start:
        raise UserError(f"{path}: is empty; fetch it again")
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if start[:4] != magic:
        page = "a web page, not the file itself; fetch it again" if start.lstrip()[:1] == b"<" else None
        raise UserError(f"{path}: {page or f'starts with 0x{start[:4].hex()}, expected the IDX magic 0x{magic.hex()}'}")
    if len(start) < 4 + 4 * dimensions:
        raise UserError(f"{path}: ends within its header, {len(start)} bytes of {4 + 4 * dimensions}")
    return tuple(int(size) for size in np.frombuffer(start, ">u4", dimensions, offset=4))


def find_file(folder: Path, split: str, kind: str) -> Path:
    """Find an official file of a kind, `images` or `labels`, in either spelling, gzipped or not; UserError if none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold the four official files")
    dimensions = _DIMENSIONS[kind]
    # Some copies name the labels `idx3`, like the images.
    numbers = (dimensions, 3) if kind == "labels" else (dimensions,)
    names = [
        f"{_PREFIXES[split]}-{kind}{dot}idx{number}-ubyte{end}"
        for number in numbers
        for end in ("", ".gz")
        for dot in ("-", ".")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {names[0]} (also looked for {', '.join(names[1:])})")


def read_split(folder: Path, split: str, classes: int) -> tuple[Images, Labels, dict[str, str]]:
    """Read a split's two files: images (N, 28, 28, 1), labels (N,) int64, and the files' names with their SHA-256.

    UserError if a file is missing or damaged, or images and labels do not fit together.
    """
    image_path, label_path = find_file(folder, split, "images"), find_file(folder, split, "labels")
    images, image_sum = read_idx(image_path, SHAPE[:2])
    labels, label_sum = read_idx(label_path, ())
    if len(images) != len(labels):
        raise UserError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    if not len(images):
        raise UserError(f"{image_path}: holds no image")
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise UserError(f"{label_path}: label {wrong[0]} (from 0) is {labels[wrong[0]]}, expected 0 to {classes - 1}")
    files = {image_path.name.removesuffix(".gz"): image_sum, label_path.name.removesuffix(".gz"): label_sum}
    return images[..., None], labels.astype(np.int64), files


def pack(source: str, src: Path, dst: Path, options: PackOptions) -> None:
    """Pack a folder of official files; train images are shuffled, test images keep the files' order.

    UserError if a file is missing or damaged, a limit exceeds the number of images, or `dst` is not free.
    """
    check_limits(options, _PREFIXES)
    classes = CLASSES[source]
    splits = {}
    files: dict[str, str] = {}
    for split in _PREFIXES:
        images, labels, sums = read_split(src, split, len(classes))
        splits[split] = images, labels, chosen_rows(split, labels, options)
        files |= sums
    made = {"packer": source, "limits": dict(options.limits), "seed": options.seed, "sha256": files}
    description = Description(options.name or source, SHAPE, classes, made)
    with writing(dst, description, compression=options.compression, shard_images=options.shard_images) as writer:
        for split, (images, labels, rows) in splits.items():
            rest = rows[writer.taken(split) :]
            writer.add(split, images[rest], labels[rest])
