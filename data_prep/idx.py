"""Pack the official IDX files of MNIST, Fashion-MNIST and KMNIST, gzipped or not."""

import gzip
import hashlib
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

CLASSES: Mapping[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}


def read_idx(path: Path, dimensions: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Read an IDX file of unsigned bytes.

    Parameters
    ----------
    path : Path
        Gzipped if the name ends in `.gz`.
    dimensions : int
        3 for images (N, H, W), 1 for labels (N,).

    Returns
    -------
    array : array of uint8
    sha256 : str
        Of the content, unpacked.

    Raises
    ------
    UserError
        The file is not such a file, is damaged, too short or too long.
    """
    content = _content(path)
    if not content:
        raise UserError(f"{path}: is empty; fetch it again")
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise UserError(f"{path}: starts with 0x{content[:4].hex()}, expected the IDX magic 0x{magic.hex()}")
    if len(content) < header:
        raise UserError(f"{path}: ends within its header, {len(content)} bytes of {header}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise UserError(f"{path}: {what}: {len(content)} bytes, its header {shape} needs {expected}")
    array = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return array, hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except EOFError:
        raise UserError(f"{path}: truncated gzip file; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def find_file(folder: Path, split: str, kind: str) -> Path:
    """Find an official file of a kind, `images` or `labels`, in either spelling, gzipped or not.

    Raises
    ------
    UserError
        The folder or the file is not there; the message names the one expected.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold the four official files")
    dimensions = _DIMENSIONS[kind]
    names = [f"{_PREFIXES[split]}-{kind}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {names[0]} (also looked for {', '.join(names[1:])})")


def read_split(folder: Path, split: str, classes: int) -> tuple[Images, Labels, dict[str, str]]:
    """Read a split's two files.

    Returns
    -------
    images : array of shape (N, 28, 28, 1), uint8
    labels : array of shape (N,), int64
    files : dict
        File name, without `.gz`, to the SHA-256 of its content.

    Raises
    ------
    UserError
        A file is missing or damaged, or images and labels do not fit together.
    """
    image_path, label_path = find_file(folder, split, "images"), find_file(folder, split, "labels")
    images, image_sum = read_idx(image_path, _DIMENSIONS["images"])
    labels, label_sum = read_idx(label_path, _DIMENSIONS["labels"])
    if images.shape[1:] != SHAPE[:2]:
        raise UserError(f"{image_path}: images of {images.shape[1:]} pixels, expected {SHAPE[:2]}")
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

    Parameters
    ----------
    source : {"mnist", "fashion-mnist", "kmnist"}
    src, dst : Path
    options : PackOptions

    Raises
    ------
    UserError
        An official file is missing or damaged, a limit is more than there is, or `dst` is not free.
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
