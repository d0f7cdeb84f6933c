"""Read the official pickled batches of CIFAR and ImageNet 32×32 without letting a pickle run any code.

A pickle names the functions that build what it holds. In these files they are NumPy's for an array of bytes; each is
answered here by a stand-in that keeps what it is given, and every other name is refused. NumPy itself sees nothing but
the raw bytes and a shape that has been checked.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from arraytp.data.shards import Images, Labels
from arraytp.errors import UserError


class _RefusedError(Exception):
    """The pickle names what official batches do not."""


class _Type:
    """Stands for `numpy.dtype`: keeps the type's code."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Byte order, fields and flags: of no meaning for bytes."""


class _Array:
    """Stands for `numpy.ndarray` while it is built: keeps shape, type and raw content."""

    def __init__(self, *_initial: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Bytes(bytes):
    """Stands for `_codecs.encode`, which is how Python 3 writes bytes for Python 2."""

    def __new__(cls, text: Any, encoding: Any) -> Self:
        if not isinstance(text, str) or encoding != "latin1":
            raise _RefusedError("encodes something other than bytes")
        return super().__new__(cls, text.encode("latin-1"))

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("sets a state of bytes")


_ADMITTED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Bytes,
}


# The one in Python: that in C makes a table as long as the largest number that the pickle gives a value.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in, or refuse."""
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"names {module}.{name}")
        return _ADMITTED[module, name]


def read_batch(
    file: BinaryIO, where: Path | str, label_key: str, classes: int, first_label: int
) -> tuple[Images, Labels]:
    """Read an official batch: a dict with `data`, an array (N, 3072) of bytes, and a list of labels.

    Parameters
    ----------
    file : binary file
    where : Path or str
        For messages.
    label_key : str
        The key of the labels.
    classes, first_label : int
        Labels in the file are `first_label` to `first_label + classes - 1`.

    Returns
    -------
    images : array of shape (N, 32, 32, 3), uint8
        A view, not contiguous: the file has 1024 red, 1024 green and 1024 blue values in row-major order.
    labels : array of shape (N,), int64
        From 0.

    Raises
    ------
    UserError
        The pickle names anything that such a batch does not hold, is damaged or truncated, or its content is not such a
        batch.
    """
    content = _load(file, where)
    data, labels = content.get("data"), content.get(label_key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        found = ", ".join(repr(key) for key in content) or "nothing"
        raise UserError(f"{where}: expected an array 'data' and a list {label_key!r}, found {found}")
    images = images_of_planes(_rows(data, where))
    return images, checked_labels(labels, len(images), classes, first_label, where)


def _load(file: BinaryIO, where: Path | str) -> dict[str, Any]:
    try:
        content = _Unpickler(file, encoding="bytes").load()
    except _RefusedError as error:
        raise UserError(f"{where}: refused: the pickle {error}, which official batches do not") from None
    # What a damaged pickle can raise is not documented, and is anything from EOFError to MemoryError.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: damaged or truncated pickle ({text}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, expected a batch (a dict)")
    # Python 2 wrote the keys as bytes.
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _rows(data: _Array, where: Path | str) -> Images:
    """Return the content of an array of bytes (N, 3072), row-major."""
    match data.state:
        case (_, (int(count), 3072), _Type(code="u1" | "|u1"), False | 0, bytes(raw)) if len(raw) == count * 3072:
            return np.frombuffer(raw, np.uint8).reshape(count, 3072)
    raise UserError(f"{where}: 'data' is not a row-major array of bytes (N, 3072) with its whole content")


def images_of_planes(rows: Images) -> Images:
    """View rows of three planes (N, 3072) as images (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def checked_labels(labels: Sequence[Any], count: int, classes: int, first_label: int, where: Path | str) -> Labels:
    """Return labels as an array that counts from 0.

    Raises
    ------
    UserError
        There are more or fewer than images, or one is out of range or no integer.
    """
    if len(labels) != count:
        raise UserError(f"{where}: {len(labels)} labels for {count} images")
    last = first_label + classes - 1
    for position, label in enumerate(labels):
        if type(label) is not int or not first_label <= label <= last:
            raise UserError(
                f"{where}: label {position} (from 0) is {str(label)[:40]!r}, expected {first_label} to {last}"
            )
    return np.array(labels, np.int64) - first_label
