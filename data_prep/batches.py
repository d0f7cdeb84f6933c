"""Read the official pickled batches of CIFAR and ImageNet 32×32 without letting a pickle run any code.

A pickle names the functions that rebuild its content. In these files they are the ones for a NumPy array of bytes; each
is replaced here by a stand-in that only keeps its arguments, and every other name is refused. NumPy itself receives
nothing but the raw bytes and a checked shape.
"""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np

from arraytp.data.shards import Images, Labels
from arraytp.errors import UserError


class _RefusedError(Exception):
    """The pickle names something that official batches do not."""


class _Type:
    """Stand-in for `numpy.dtype`: keeps the type's code and byte order."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        self.code = _text(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        """Keep the byte order; fields and flags have no meaning for numbers."""
        if isinstance(state, tuple) and len(state) > 1:
            self.order = _text(state[1])


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Array:
    """Stand-in for a `numpy.ndarray` under construction: keeps shape, type and raw content."""

    def __init__(self, *_initial: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, *_axes: Any) -> _Array:
    """Replace `numpy._core.numeric._frombuffer`, by which protocol 5 pickles arrays."""
    array = _Array()
    array.state = (1, shape, kind, order != "C", bytes(content) if isinstance(content, bytearray) else content)
    return array


class _Bytes(bytes):
    """Stand-in for `_codecs.encode`, by which Python 3 pickles bytes for Python 2."""

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
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}
_INTEGERS = frozenset(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))
# The limit on the bytes in a batch: the largest of ImageNet 32×32 has 394 MB.
_MOST_BYTES = 2**29
_LOOKED_AT = 2**22


# The Python implementation: the C one allocates a table as long as the largest memo index in the pickle.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in, or refuse."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"names {module}.{name}")
        return _ADMITTED[module, name]

    _encoded = 0

    def _encode(self, text: Any, encoding: Any) -> _Bytes:
        """Encode text as bytes; the total is limited, because a pickle may request this again and again."""
        encoded = _Bytes(text, encoding)
        self._encoded += len(encoded)
        if self._encoded > _MOST_BYTES:
            raise _RefusedError(f"makes more than {_MOST_BYTES:,} bytes")
        return encoded


class _Bounded:
    """A file that is never asked for more bytes than are left in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        file.seek(0)
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size - self._file.tell()))


def read_batch(
    file: BinaryIO, where: Path | str, label_key: str, classes: int, first_label: int
) -> tuple[Images, Labels]:
    """Read an official batch: a dict with `data`, an array (N, 3072) of bytes, and labels under `label_key`.

    Labels in the file are `first_label` to `first_label + classes - 1`. Returns images (N, 32, 32, 3), a view that is
    not contiguous (the file has 1024 red, 1024 green and 1024 blue values in row-major order), and labels (N,) int64
    from 0.

    UserError if the pickle names anything that such a batch does not, is damaged or truncated, or is not such a batch.
    OSError if it cannot be read.
    """
    content = _load(file, where)
    data, labels = content.get("data"), content.get(label_key)
    if isinstance(labels, _Array):
        labels = _integers(labels, where, label_key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        keys = ", ".join(repr(key) for key in content) or "nothing"
        raise UserError(f"{where}: expected an array 'data' and a list {label_key!r}, found {keys}")
    images = images_of_planes(_rows(data, where))
    return images, checked_labels(labels, len(images), classes, first_label, where)


def _load(file: BinaryIO, where: Path | str) -> dict[str, Any]:
    try:
        content = _Unpickler(cast(BinaryIO, _Bounded(file)), encoding="bytes").load()
    except _RefusedError as error:
        file.seek(0)
        refuse_text_transfer(file.read(_LOOKED_AT), where)
        raise UserError(f"{where}: refused: the pickle {error}, which official batches do not") from None
    # A failed read does not mean that the file is damaged.
    except OSError:
        raise
    # A damaged pickle can raise undocumented exceptions, anything from EOFError to MemoryError.
    except Exception as error:
        file.seek(0)
        refuse_text_transfer(file.read(_LOOKED_AT), where)
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: damaged or truncated pickle ({text}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, expected a batch (a dict)")
    if not all(isinstance(key, bytes | str) for key in content):
        raise UserError(f"{where}: has keys that are not text, expected a batch")
    # Python 2 wrote the keys as bytes.
    return {_text(key): value for key, value in content.items()}


def refuse_text_transfer(start: bytes, where: Path | str) -> None:
    """Raise UserError if every line end in the first bytes of a damaged file has become a Windows one."""
    ends = start.count(b"\n")
    if ends > 3 and start.count(b"\r\n") == ends:
        raise UserError(
            f"{where}: was transferred as text: every line end in it has become \\r\\n; fetch it again, as binary"
        )


def _integers(array: _Array, where: Path | str, key: str) -> list[int]:
    """Return the content of an array of integers (N,)."""
    match array.state:
        case (_, (int(count),), _Type(code=str(code), order=str(order)), False | 0, bytes(raw)) if code.lstrip(
            "<>|="
        ) in _INTEGERS and len(raw) == count * int(code[-1]):
            given = code[0] if code[0] in "<>" else order if order in "<>" else "<"
            return np.frombuffer(raw, given + code.lstrip("<>|=")).tolist()  # type: ignore[no-any-return]
    raise UserError(f"{where}: {key!r} is not an array of integers (N,) with its whole content")


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
    """Return labels as an array that counts from 0; UserError unless there is one in range for each image."""
    if len(labels) != count:
        raise UserError(f"{where}: {len(labels)} labels for {count} images")
    last = first_label + classes - 1
    for position, label in enumerate(labels):
        if type(label) is not int or not first_label <= label <= last:
            # The text of nested lists may not fit into memory.
            shown = str(label)[:40] if isinstance(label, str | bytes | int | float) else f"a {type(label).__name__}"
            raise UserError(f"{where}: label {position} (from 0) is {shown!r}, expected {first_label} to {last}")
    return np.array(labels, np.int64) - first_label
