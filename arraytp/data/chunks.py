"""Arrays of a shard, as the writer stores them: contiguous, or gzipped in chunks of whole rows.

HDF5 itself decompresses a whole chunk, however large the result. Here, a chunk must decompress to exactly its expected
size. Layouts that the writer never produces, such as data stored in other files, are refused.
"""

from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

_DEFLATE, _SHUFFLE = 1, 2


def read_whole(dataset: h5py.Dataset) -> npt.NDArray[Any]:
    """Read an array that is contiguous or a single chunk; ValueError if it is stored otherwise."""
    if dataset.chunks is None:
        piece_offset(dataset)
        return np.asarray(dataset[()])
    check_chunks(dataset, len(dataset))
    return np.frombuffer(read_chunk(dataset, 0), dataset.dtype)


def piece_offset(dataset: h5py.Dataset) -> int:
    """Return the offset of a contiguous array in its file, in bytes; ValueError if the array is stored otherwise."""
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"{dataset.name} is not in the file in one piece")
    return int(offset)


def check_chunks(dataset: h5py.Dataset, rows: int) -> None:
    """Raise ValueError unless an array is gzipped in chunks of `rows` rows."""
    if dataset.chunks != (rows, *dataset.shape[1:]):
        raise ValueError(f"{dataset.name} is in chunks of {dataset.chunks}, expected {(rows, *dataset.shape[1:])}")
    if _filters(dataset) not in ([_DEFLATE], [_SHUFFLE, _DEFLATE]):
        raise ValueError(f"{dataset.name} is packed by the filters {_filters(dataset)}, expected gzip")


def _filters(dataset: h5py.Dataset) -> list[int]:
    made = dataset.id.get_create_plist()
    return [made.get_filter(i)[0] for i in range(made.get_nfilters())]


def read_chunk(dataset: h5py.Dataset, first: int) -> bytes:
    """Decompress the chunk that begins at row `first` of an array that passed `check_chunks`; the last is padded."""
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    mask, packed = dataset.id.read_direct_chunk((first, *(0 for _ in dataset.shape[1:])))
    unpacker = isal_zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, size + 1)
    # Type checkers do not know isal's own exception class.
    except Exception as error:
        raise ValueError(f"{dataset.name} cannot be unpacked: {error}") from error
    if mask or len(content) != size or not unpacker.eof:
        raise ValueError(f"{dataset.name} holds more or less than a chunk should")
    if _filters(dataset)[0] == _SHUFFLE:
        return np.frombuffer(content, np.uint8).reshape(dataset.dtype.itemsize, -1).T.tobytes()
    return bytes(content)
