"""Which array module computes: NumPy or CuPy. Nothing else in the package knows CuPy's name."""

import importlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from arraytp.errors import UserError

Array: TypeAlias = Any
"""An array of the computing backend: `numpy.ndarray` or `cupy.ndarray`."""


def array_module(*arrays: Array) -> Any:
    """Return the module (NumPy, CuPy) that all of the arrays belong to.

    Raises
    ------
    TypeError
        If the arrays live on different devices.
    """
    names = {type(array).__module__.partition(".")[0] for array in arrays}
    if len(names) != 1:
        raise TypeError(
            f"arrays of {' and '.join(sorted(names))} cannot be mixed: move all to one backend with Backend.asarray"
        )
    return sys.modules[names.pop()]


def device_linalg(array: Array) -> Any:
    """Return the module with `lu_factor`, `lu_solve` and `solve_triangular` for an array of a device.

    For CuPy it is cupyx.scipy.linalg.
    """
    return importlib.import_module(array_module(array).__name__ + "x.scipy.linalg")


def add_product(a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> Array:
    """Write α a b + β out of matrices of a device to `out`, C-contiguous, and return it: one launch of cuBLAS."""
    if array_module(a, b, out).__name__ == "cupy":
        return importlib.import_module("cupy.cublas").gemm("N", "N", a, b, out, alpha, beta)
    number = out.dtype.type
    out[...] = number(alpha) * (a @ b) + (number(beta) * out if beta else number(0))
    return out


@dataclass(frozen=True)
class Backend:
    """An array module and the few things that differ between host and device.

    Parameters
    ----------
    name : str
        "numpy" or "cupy".
    xp : module
        The array module.
    """

    name: str
    xp: Any

    @property
    def on_host(self) -> bool:
        """Whether the arrays are in the host's memory, where threads share the work in slices of the batch."""
        return self.name == "numpy"

    def asarray(self, array: Array) -> Array:
        """Move an array of the host to the device; no copy on the CPU."""
        return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        """Move an array of the device to the host; no copy on the CPU."""
        return array if isinstance(array, np.ndarray) else np.asarray(self.xp.asnumpy(array))

    def numbers(self, arrays: Sequence[Array]) -> list[float]:
        """Return arrays of shape () and one dtype as numbers; from a device in one copy."""
        return self.to_host(self.xp.stack(arrays)).tolist() if arrays else []

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if not self.on_host:
            self.xp.cuda.get_current_stream().synchronize()

    def peak_memory(self) -> int:
        """Return the largest memory used so far in bytes: of the process on the CPU, held by CuPy's pool on a GPU."""
        if self.on_host:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(self.xp.get_default_memory_pool().total_bytes())

    def device(self) -> str:
        """Name the device."""
        if self.on_host:
            return "CPU"
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.runtime.getDevice())
        return str(properties["name"].decode())

    def versions(self) -> dict[str, str]:
        """Return the versions of the array modules in use."""
        return {"numpy": np.__version__} | ({} if self.on_host else {self.name: self.xp.__version__})


class Upload:
    """A round-trip place for arrays that go from the host to a device while it computes.

    The host writes `host` after `await_room`, `send` copies it on a stream of its own, `received` gives the device's
    copy to the current stream until `release`. None of these makes the host wait for the device's computations.

    Parameters
    ----------
    backend : Backend
        Of a device.
    stream : stream
        Made by `copy_stream`.
    shape : tuple of int
    dtype : dtype
    """

    def __init__(self, backend: Backend, stream: Any, shape: tuple[int, ...], dtype: Any) -> None:
        pinned = importlib.import_module(backend.xp.__name__ + "x").empty_pinned
        # Copies from pinned memory alone overlap with computation.
        self.host: np.ndarray = pinned(shape, dtype)
        self._xp, self._stream = backend.xp, stream
        self._device = self._xp.empty(shape, dtype)
        self._copied: Any = None
        # Before the first copy, whatever used the device's memory last must be done.
        self._free = self._xp.cuda.get_current_stream().record()

    def await_room(self) -> None:
        """Wait until the last copy has read `host`, so that it can be written to."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, count: int) -> None:
        """Begin to copy the first rows of `host`, when the device has done with those before."""
        self._stream.wait_event(self._free)
        self._device[:count].set(self.host[:count], stream=self._stream)
        self._copied = self._stream.record()

    def received(self, count: int) -> Array:
        """Return the first rows on the device; what the current stream does with them waits for the copy."""
        self._xp.cuda.get_current_stream().wait_event(self._copied)
        return self._device[:count]

    def release(self) -> None:
        """Let the next copy come once all has run that the current stream was asked for so far."""
        self._free = self._xp.cuda.get_current_stream().record()


def copy_stream(backend: Backend) -> Any:
    """Return a stream of a device on which copies run beside computation."""
    return backend.xp.cuda.Stream(non_blocking=True)


NUMPY = Backend("numpy", np)


def get_backend(name: str) -> Backend:
    """Return the backend of a name.

    Parameters
    ----------
    name : {"numpy", "cupy"}

    Raises
    ------
    UserError
        If CuPy is not installed or finds no CUDA device.
    """
    if name == "numpy":
        return NUMPY
    try:
        cupy: ModuleType = importlib.import_module("cupy")
    except ImportError as error:
        raise UserError(
            f"backend cupy: CuPy cannot be imported ({error}); install arraytp[cuda12] or arraytp[cuda13], "
            "or use --backend numpy"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UserError(f"backend cupy: no CUDA device can be used ({error}); use --backend numpy") from error
    if devices == 0:
        raise UserError("backend cupy: this machine has no CUDA device; use --backend numpy")
    return Backend("cupy", cupy)
