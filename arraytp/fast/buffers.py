"""Arrays that are made at first use and used again: scratch and results, not state."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arraytp.backend import Array, Backend


class Buffers:
    """Arrays by owner and name. Every module that computes has an owner's view of its own: see `of`."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._flat: dict[Any, Array] = {}
        self._cached: dict[Any, Array] = {}

    def of(self, owner: object) -> "Scratch":
        """Return the owner's view: its names mean nothing to others."""
        return Scratch(self, owner)

    def array(self, key: object, shape: Sequence[int], dtype: Any) -> Array:
        """Return a C-contiguous array with undefined content; the same memory for the same key."""
        size = int(np.prod(shape))
        flat = self._flat.get((key, np.dtype(dtype)))
        if flat is None or flat.size < size:
            flat = self._flat[(key, np.dtype(dtype))] = self.backend.xp.empty(size, dtype=dtype)
        return flat[:size].reshape(shape)

    def cached(self, key: object, length: int, make: Callable[[], Array]) -> Array:
        """Return the first `length` rows of what `make` once made for this key; made anew when it has fewer."""
        array = self._cached.get(key)
        if array is None or len(array) < length:
            array = self._cached[key] = make()
        return array[:length]

    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(array.nbytes for array in itertools.chain(self._flat.values(), self._cached.values()))


@dataclass(frozen=True)
class Scratch:
    """An owner's view of buffers."""

    buffers: Buffers
    owner: object

    def array(self, name: object, shape: Sequence[int], dtype: Any) -> Array:
        """Return a C-contiguous array with undefined content; the same memory for the same name."""
        return self.buffers.array((self.owner, name), shape, dtype)

    def filled(self, name: object, shape: Sequence[int], dtype: Any, value: float) -> Array:
        """Return an array that held `value` everywhere when it was made; for borders that are never written to."""
        key = (name, tuple(shape[1:]), np.dtype(dtype), value)
        return self.cached(key, shape[0], lambda: self.buffers.backend.xp.full(shape, value, dtype=dtype))

    def cached(self, name: object, length: int, make: Callable[[], Array]) -> Array:
        """Return the first `length` rows of what `make` once made for this name; made anew when it has fewer."""
        return self.buffers.cached((self.owner, name), length, make)
