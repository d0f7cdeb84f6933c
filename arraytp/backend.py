"""The array module that computes, NumPy or CuPy. No other module imports CuPy by name."""

import ctypes
import importlib
import importlib.metadata
import re
import resource
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np

from arraytp.errors import UserError

Array: TypeAlias = Any
"""An array of the computing backend: `numpy.ndarray` or `cupy.ndarray`."""

# Bytes. With less memory free, CUDA libraries may fail to initialise.
LEAST_ROOM = 256 * 2**20
# Bytes, as NVIDIA recommends for its largest devices.
CUBLAS_WORKSPACE = 32 << 20
# Values of cuBLAS' cublasMath_t.
DEFAULT_MATH, TF32_MATH = 0, 3


def array_module(*arrays: Array) -> Any:
    """Return the module (NumPy or CuPy) that all arrays belong to; TypeError if they belong to different ones."""
    names = {type(array).__module__.partition(".")[0] for array in arrays}
    if len(names) != 1:
        raise TypeError(
            f"arrays of {' and '.join(sorted(names))} cannot be mixed: move all to one backend with Backend.asarray"
        )
    return sys.modules[names.pop()]


def _device_linalg(array: Array) -> Any:
    """Return the module with `lu_factor` and `solve_triangular` for a device array."""
    return importlib.import_module(array_module(array).__name__ + "x.scipy.linalg")


def factorise(routine: Literal["potrf", "getrf"], matrix: Array) -> Array | None:
    """Factorise a C-contiguous device matrix in place by a LAPACK routine, which sees its transpose.

    Returns
    -------
    array of int32, or None
        The pivots of getrf, counted from 0. LAPACK's info is not read back: a singular matrix shows in its factors.
    """
    xp, order = array_module(matrix), len(matrix)
    if xp.__name__ != "cupy":
        if routine == "potrf":
            matrix[...] = xp.linalg.cholesky(matrix).T
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            lu, pivots = _device_linalg(matrix).lu_factor(matrix.T, check_finite=False)
        matrix[...] = lu.T
        return pivots
    solver, handle = importlib.import_module("cupy_backends.cuda.libs.cusolver"), xp.cuda.device.get_cusolver_handle()
    name = f"{'s' if matrix.dtype.itemsize == 4 else 'd'}{routine}"
    # potrf factorises the lower triangle (CUBLAS_FILL_MODE_LOWER = 0) of what it sees: the upper one of `matrix`.
    sizes = (0, order) if routine == "potrf" else (order, order)
    length = getattr(solver, f"{name}_bufferSize")(handle, *sizes, matrix.data.ptr, order)
    room, info = xp.empty(length, matrix.dtype), xp.empty(1, np.int32)
    if routine == "potrf":
        getattr(solver, name)(handle, *sizes, matrix.data.ptr, order, room.data.ptr, length, info.data.ptr)
        return None
    pivots = xp.empty(order, np.int32)
    getattr(solver, name)(handle, *sizes, matrix.data.ptr, order, room.data.ptr, pivots.data.ptr, info.data.ptr)
    return pivots - 1


def divide_rows(
    rows: Array, triangle: Array, lower: bool = False, transposed: bool = False, unit: bool = False
) -> Array:
    """Replace rows by rows T⁻¹ (or rows T⁻ᵀ, if `transposed`), T a triangle of a device matrix, in one cuBLAS call.

    Parameters
    ----------
    rows : array of shape (R, n), C-contiguous
    triangle : array of shape (n, n), C-contiguous or the transpose of a C-contiguous array
        Only its lower or upper triangle is read; with `unit`, its diagonal is taken to be 1.
    """
    xp, number = array_module(rows, triangle), ctypes.c_float if rows.dtype.itemsize == 4 else ctypes.c_double
    if xp.__name__ != "cupy":
        solve = _device_linalg(rows).solve_triangular
        rows[...] = solve(triangle, rows.T, trans=int(not transposed), lower=lower, unit_diagonal=unit).T
        return rows
    # cuBLAS is column-major: it sees rowsᵀ, and the transpose of a C-contiguous triangle.
    if triangle.flags.c_contiguous:
        lower, transposed = not lower, not transposed
    count, order = rows.shape
    _call_cublas(
        "trsm_v2", rows, 0, int(not lower), int(not transposed), int(unit), order, count, ctypes.byref(number(1)),
        ctypes.c_void_p(triangle.data.ptr), order, ctypes.c_void_p(rows.data.ptr), order,
    )  # fmt: skip
    return rows


def matrix_product(a: Array, b: Array) -> Array:
    """Return the matrix product a b; on a device by `add_product`."""
    xp = array_module(a, b)
    return a @ b if xp is np else add_product(a, b, xp.empty((len(a), b.shape[1]), a.dtype))


def add_product(a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> Array:
    """Write α a b + β out to the device matrix `out`, each of whose rows is contiguous, in one cuBLAS call."""
    xp = array_module(a, b, out)
    if xp.__name__ != "cupy":
        number = out.dtype.type
        out[...] = number(alpha) * (a @ b) + (number(beta) * out if beta else number(0))
        return out
    assert a.dtype == b.dtype == out.dtype
    # cuBLAS is column-major and sees the transpose of a C-contiguous matrix, so it computes outᵀ = bᵀ aᵀ.
    (a, a_op, a_step), (b, b_op, b_step), (_, out_op, out_step) = (_column_major(matrix) for matrix in (a, b, out))
    assert not out_op
    number, pointers = (
        ctypes.c_float if out.dtype.itemsize == 4 else ctypes.c_double,
        [ctypes.c_void_p(array.data.ptr) for array in (a, b, out)],
    )
    (rows, columns), factors = out.shape, [ctypes.byref(number(value)) for value in (alpha, beta)]
    _call_cublas(
        "gemm_v2", out, b_op, a_op, columns, rows, a.shape[1], factors[0], pointers[1], b_step, pointers[0], a_step,
        factors[1], pointers[2], out_step,
    )  # fmt: skip
    return out


def batched_product(a: Array, b: Array) -> Array:
    """Return a b for every sample, of shapes (B, m, k) and (B, k, n), each with one of its last two axes contiguous."""
    xp = array_module(a, b)
    if xp.__name__ != "cupy":
        return a @ b
    (count, rows, inner), columns = a.shape, b.shape[2]
    out = xp.empty((count, rows, columns), a.dtype)
    (a_first, a_op, a_step), (b_first, b_op, b_step) = _column_major(a[0]), _column_major(b[0])
    # A copy made by `_column_major` would hold the first sample only.
    assert (a_first.data.ptr, b_first.data.ptr) == (a.data.ptr, b.data.ptr)
    number, size = ctypes.c_float if a.dtype.itemsize == 4 else ctypes.c_double, a.dtype.itemsize
    jumps = [ctypes.c_longlong(array.strides[0] // size) for array in (a, b, out)]
    pointers = [ctypes.c_void_p(array.data.ptr) for array in (a, b, out)]
    _call_cublas(
        "gemmStridedBatched", out, b_op, a_op, columns, rows, inner, ctypes.byref(number(1)), pointers[1], b_step,
        jumps[1], pointers[0], a_step, jumps[0], ctypes.byref(number(0)), pointers[2], columns, jumps[2], count,
    )  # fmt: skip
    return out


def batched_solve(matrices: Array, y: Array) -> Array:
    """Return the solution x of A x = y for every sample, by LU factors; shapes (B, n, n) and (B, n)."""
    xp = array_module(matrices, y)
    if xp.__name__ != "cupy":
        return xp.linalg.solve(matrices, y[:, :, None])[:, :, 0]
    (count, order), integer = y.shape, np.dtype(np.int32)
    # Transposed, since cuBLAS is column-major.
    factors, x = matrices.transpose(0, 2, 1).copy(), y.copy()
    pivots, info, of_solving = xp.empty((count, order), integer), xp.empty(count, integer), ctypes.c_int()
    ranges = [(array.data.ptr, array.data.ptr + array.nbytes, array.strides[0]) for array in (factors, x)]
    # Pointers are computed on the device, so that a captured graph copies nothing from the host.
    places = [xp.arange(*each, dtype=np.uintp) for each in ranges]
    of_factors, of_x = [ctypes.c_void_p(each.data.ptr) for each in places]
    held = ctypes.c_void_p(pivots.data.ptr)
    _call_cublas("getrfBatched", x, order, of_factors, order, held, ctypes.c_void_p(info.data.ptr), count)
    _call_cublas("getrsBatched", x, 0, order, 1, of_factors, order, held, of_x, order, ctypes.byref(of_solving), count)
    return x


def _call_cublas(routine: str, of: Array, *arguments: Any) -> None:
    """Call a cuBLAS routine on the current stream, in the precision of the array `of`."""
    xp = array_module(of)
    library, handle, workspace = _cublas(xp.cuda.runtime.getDevice())
    _check_cublas(library.cublasSetStream_v2(handle, ctypes.c_void_p(xp.cuda.get_current_stream().ptr)))
    # Otherwise cuBLAS would allocate a workspace for every capture.
    _check_cublas(
        library.cublasSetWorkspace_v2(handle, ctypes.c_void_p(workspace.data.ptr), ctypes.c_size_t(workspace.nbytes))
    )
    letter = "S" if of.dtype.itemsize == 4 else "D"
    _check_cublas(getattr(library, f"cublas{letter}{routine}")(handle, *arguments))


def _column_major(matrix: Array) -> tuple[Array, int, int]:
    """Return a matrix or its copy, cuBLAS' operation (0 for contiguous rows, 1 for columns), and leading dimension."""
    size = matrix.dtype.itemsize
    if matrix.flags.c_contiguous:
        return matrix, 0, matrix.shape[1]
    if matrix.strides[1] == size:
        return matrix, 0, matrix.strides[0] // size
    if matrix.strides[0] == size:
        return matrix, 1, matrix.strides[1] // size
    return _column_major(matrix.copy())


@cache
def _cublas(device: int) -> tuple[Any, Any, Array]:
    """Return cuBLAS, a handle of our own on a device, and its workspace: CuPy refuses its own during a capture."""
    cupy = importlib.import_module("cupy")
    library = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
    handle = ctypes.c_void_p()
    _check_cublas(library.cublasCreate_v2(ctypes.byref(handle)))
    return library, handle, cupy.empty(CUBLAS_WORKSPACE, dtype=np.uint8)


@cache
def _graph_pools(xp: Any) -> defaultdict[str, Any]:
    return defaultdict(partial(_pool_that_keeps, xp))


def _pool_that_keeps(xp: Any) -> Any:
    """Return a memory pool that returns nothing to the device: graphs go on writing to its free blocks."""

    def allocated(size: int) -> Any:
        try:
            return xp.cuda.MemoryPointer(xp.cuda.Memory(size), 0)
        except xp.cuda.runtime.CUDARuntimeError as error:
            # If this were CuPy's own error, the pool would return all free blocks to the device and try again.
            raise MemoryError(f"{size:,} bytes: {first_line(error)}") from error

    pool = xp.cuda.MemoryPool(allocated)
    # The pool would do the same on reaching the limit set by CUPY_GPU_MEMORY_LIMIT.
    pool.set_limit(size=0)
    return pool


def _check_cublas(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS returned status {status}")


@dataclass(frozen=True)
class Backend:
    """An array module ("numpy" or "cupy"), its device's number, and what differs between host and device."""

    name: str
    xp: Any
    number: int = 0

    @property
    def on_host(self) -> bool:
        """Whether arrays are in host memory, where threads share the work in slices of the batch."""
        return self.name == "numpy"

    def asarray(self, array: Array) -> Array:
        """Move a host array to the device; no copy on the CPU."""
        return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        """Move a device array to the host; no copy on the CPU."""
        return array if isinstance(array, np.ndarray) else np.asarray(self.xp.asnumpy(array))

    def numbers(self, arrays: Sequence[Array]) -> list[float]:
        """Return arrays of shape () and one dtype as Python numbers, with a single copy from a device."""
        return self.reading(arrays)()

    def reading(self, arrays: Sequence[Array]) -> Callable[[], list[float]]:
        """Begin `numbers`; the function returned gives them, and waits for their copy only, not for later launches."""
        if not arrays:
            return list
        stacked = self.xp.stack(arrays)
        if self.on_host:
            return stacked.tolist  # type: ignore[no-any-return]
        held = importlib.import_module(self.xp.__name__ + "x").empty_pinned(stacked.shape, stacked.dtype)
        stacked.get(out=held, blocking=False)
        copied = self.xp.cuda.get_current_stream().record()

        def numbers() -> list[float]:
            copied.synchronize()
            return held.tolist()  # type: ignore[no-any-return]

        return numbers

    def use_device(self) -> None:
        """Make this the calling thread's current device; every thread starts with device 0."""
        if not self.on_host:
            self.xp.cuda.Device(self.number).use()

    def use_tf32(self, on: bool) -> None:
        """Set whether float32 products round their factors to TF32's 11 significant bits or use all 24."""
        if self.name == "cupy":
            library, handle, _ = _cublas(self.number)
            _check_cublas(library.cublasSetMathMode(handle, TF32_MATH if on else DEFAULT_MATH))

    def synchronize(self) -> None:
        """Wait until the device has finished all work on the current stream."""
        if not self.on_host:
            self.xp.cuda.get_current_stream().synchronize()

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: on the CPU the process's, on a GPU the total that CuPy's pools hold."""
        if self.on_host:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pools = self.xp.get_default_memory_pool(), *_graph_pools(self.xp).values()
        return sum(int(pool.total_bytes()) for pool in pools)

    def graph_pool(self, part: str) -> Any:
        """Return a device's memory pool for graph captures of a part of a step.

        Every launch of a graph writes to memory that was freed during its capture, so no other part's results may lie
        there. The free blocks of the device's default pool are first returned to the device to make room.
        """
        self.xp.get_default_memory_pool().free_all_blocks()
        return _graph_pools(self.xp)[part]

    def memory_words(self, error: MemoryError, batch: int, key: str = "train.batch_size") -> str:
        """Return an out-of-memory message, on a device with its memory and a batch size, set by `key`, that may fit."""
        asked = re.search(r"allocating ([\d,]+) bytes", str(error))
        if self.on_host or asked is None:
            return f"not enough memory: {error}"
        size, held = int(asked[1].replace(",", "")), self.peak_memory()
        _, total = self.xp.cuda.runtime.memGetInfo()
        # All memory but the weights' grows with the batch, and the step may not have reached its largest array.
        fits = max(1, min(batch // 2, batch * total // (held + size)))
        return (
            f"not enough memory: {key} {batch} does not fit into the {total:,} bytes of {self.device()}: {size:,} "
            f"bytes were asked for beside {held:,} in use; try {key}={fits}"
        )

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
    """A staging buffer for arrays that are copied from the host to a device while it computes.

    The host writes to `host` after `await_room`; `send` copies it on a separate stream, made by `copy_stream`; the
    current stream may use the device's copy from `received` to `release`. Only `await_room` makes the host wait, for
    the last copy.
    """

    def __init__(self, backend: Backend, stream: Any, shape: tuple[int, ...], dtype: Any) -> None:
        pinned = importlib.import_module(backend.xp.__name__ + "x").empty_pinned
        # Only copies from pinned memory overlap with computation.
        self.host: np.ndarray = pinned(shape, dtype)
        self._backend, self._xp, self._stream = backend, backend.xp, stream
        self._device = self._xp.empty(shape, dtype)
        self._copied: Any = None
        # The first copy must wait for whatever used this device memory last.
        self._free = self._xp.cuda.get_current_stream().record()

    def await_room(self) -> None:
        """Wait until the last copy has read `host`, so that `host` can be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, count: int) -> None:
        """Start to copy the first `count` rows of `host` once the device no longer needs the previous ones."""
        self._backend.use_device()
        self._stream.wait_event(self._free)
        self._device[:count].set(self.host[:count], stream=self._stream)
        self._copied = self._stream.record()

    def received(self, count: int) -> Array:
        """Return the first `count` rows on the device; the current stream waits for the copy."""
        self._xp.cuda.get_current_stream().wait_event(self._copied)
        return self._device[:count]

    def release(self) -> None:
        """Let the next copy start once the current stream has finished its work so far."""
        self._free = self._xp.cuda.get_current_stream().record()


def copy_stream(backend: Backend) -> Any:
    """Return a device stream for copies that overlap with computation."""
    return backend.xp.cuda.Stream(non_blocking=True)


NUMPY = Backend("numpy", np)


def get_backend(name: str, device: int | None = None, rank: int = 0) -> Backend:
    """Return the backend named numpy or cupy; by default, ranks are assigned to devices in turn.

    UserError if there is no such device, if CuPy is not installed or installed twice, or if it finds no CUDA device,
    driver or libraries that it can compute with.
    """
    if name == "numpy":
        return NUMPY
    packages = sorted(set(importlib.metadata.packages_distributions().get("cupy", [])))
    if len(packages) > 1:
        raise UserError(
            f"backend cupy: {' and '.join(packages)} are installed, and each overwrites parts of the other; uninstall "
            f"all of them, then install one: arraytp[cuda12] or arraytp[cuda13]"
        )
    try:
        cupy: ModuleType = importlib.import_module("cupy")
    except ImportError as error:
        raise UserError(
            f"backend cupy: CuPy cannot be imported ({first_line(error)}); install arraytp[cuda12] or arraytp[cuda13], "
            "or use --backend numpy"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        remedy = "use --backend numpy"
        if "InsufficientDriver" in str(error):
            remedy = f"update the driver, install the CuPy that fits it (arraytp[cuda12] is the older one), or {remedy}"
        raise UserError(f"backend cupy: no CUDA device can be used ({first_line(error)}); {remedy}") from error
    if devices == 0:
        raise UserError("backend cupy: this machine has no CUDA device; use --backend numpy")
    if device is not None and device >= devices:
        raise UserError(f"device: {device}: this machine has {devices}, counted from 0; at most {devices - 1} can be")
    backend = Backend("cupy", cupy, rank % devices if device is None else device)
    try:
        backend.use_device()
        # CuPy loads the compiler and cuBLAS on first use; `_cublas` then opens the library that CuPy has loaded.
        ones = cupy.ones((2, 2))
        float(add_product(ones @ ones, ones, cupy.ones((2, 2))).sum())
    except (ImportError, OSError, RuntimeError, MemoryError, cupy.cuda.compiler.CompileException) as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_occupied(cupy, error)):
            raise UserError(
                f"backend cupy: device {backend.number} has no room left ({first_line(error)}); another process may "
                "hold it or its memory; choose another device, or use --backend numpy"
            ) from error
        raise UserError(
            f"backend cupy: CuPy cannot compute ({first_line(error)}); install it with CUDA's libraries and headers, "
            "as arraytp[cuda12] and arraytp[cuda13] do, or use --backend numpy"
        ) from error
    return backend


def _is_occupied(cupy: Any, error: RuntimeError) -> bool:
    """Tell whether an error arose because another process holds the device, or nearly all of its memory."""
    if any(word in str(error) for word in ("DevicesUnavailable", "MemoryAllocation")):
        return True
    try:
        free, _ = cupy.cuda.runtime.memGetInfo()
    except RuntimeError:
        return False
    # Without memory for its handle, cuBLAS only says that it is not initialised.
    return bool(free < LEAST_ROOM)


def first_line(error: Exception) -> str:
    """Return the first non-empty line of an error's message, or the error's type if there is no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
