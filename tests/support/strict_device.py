"""A test double of a device array module: NumPy inside, and at least as strict as CuPy on the outside.

Code that runs on it does not rely on anything that only the host can do. It refuses

- every implicit conversion to NumPy: `np.asarray(x)`, `np.exp(x)`, `np.concatenate([x])`, `host[...] = x`;
- host arrays and lists as operands, indices, values or outputs; Python numbers and NumPy scalars are taken, as by
  CuPy;
- functions, methods and keywords that it does not define. Those that it defines were looked up in CuPy's reference.

It differs from NumPy where CuPy does: reductions and elements are arrays of shape (), `asarray` and `asnumpy` copy,
flags report only contiguity. It is stricter than CuPy in three ways: memory of `empty` is full of NaN (or the largest
integer), so that reading it shows; views made by `as_strided` cannot be written to; NumPy's ufuncs are not dispatched
to the device.

`reads` counts what makes the host wait for the device: `asnumpy`, `item`, `float(x)`, `bool(x)`, masks as an index, and
cuSOLVER's info, which CuPy's LU functions look at.
`writes` counts what the host copies to it: `asarray` of anything but a device array, `set`.
"""

import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np

__version__ = np.__version__

bool_, uint8, uint32, uint64, int32, int64 = np.bool_, np.uint8, np.uint32, np.uint64, np.int32, np.int64
float32, float64 = np.float32, np.float64
inf, nan, pi, newaxis = np.inf, np.nan, np.pi, None

reads, writes = Counter(), Counter()
_SCALARS = (bool, int, float, np.generic)


class ndarray:
    """An array of the double. Made by the module's functions only."""

    __slots__ = ("_host",)
    __hash__ = None

    def __init__(self, host):
        if not isinstance(host, np.ndarray):
            raise TypeError("use asarray")
        self._host = host

    # What NumPy calls when it meets a foreign array.

    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion to a NumPy array; use asnumpy")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """Serve `numpy_scalar * device_array` and nothing else."""
        scalars = [isinstance(x, np.generic) for x in inputs]
        if method != "__call__" or kwargs or len(inputs) != 2 or sum(scalars) != 1:
            raise TypeError(f"numpy.{ufunc.__name__} was called on a device array")
        return _wrap(ufunc(*map(_operand, inputs)))

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} was called on a device array")

    # Explicit conversions.

    def item(self):
        reads["item"] += 1
        return self._host.item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        return bool(self.item())

    def __repr__(self):
        return f"strict_device.{self._host!r}"

    # Attributes.

    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))
    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    T = property(lambda self: ndarray(self._host.T))

    @property
    def flags(self):
        found = self._host.flags
        return SimpleNamespace(c_contiguous=found.c_contiguous, f_contiguous=found.f_contiguous)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # Views and copies.

    def __getitem__(self, key):
        key = _index(key)
        return ndarray(self._host[(*key, ...)]) if _is_basic(key) else _wrap(self._host[key])

    def __setitem__(self, key, value):
        self._host[_index(key)] = _operand(value)

    def reshape(self, *shape):
        return ndarray(self._host.reshape(*shape))

    def transpose(self, *axes):
        return ndarray(self._host.transpose(*axes))

    def ravel(self):
        return ndarray(self._host.ravel())

    def view(self, dtype):
        return ndarray(self._host.view(np.dtype(dtype)))

    def copy(self):
        return ndarray(self._host.copy())

    def astype(self, dtype, *, copy=True):
        return ndarray(self._host.astype(dtype, copy=copy))

    def fill(self, value):
        if not isinstance(value, _SCALARS):
            raise TypeError(f"fill takes a number, not {type(value).__name__}")
        self._host.fill(value)

    # Reductions: arrays of shape (), not NumPy scalars.

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce(np.sum, self, out, axis=axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce(np.mean, self, out, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis=None, out=None, keepdims=False):
        return _reduce(np.max, self, out, axis=axis, keepdims=keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return _reduce(np.min, self, out, axis=axis, keepdims=keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return _reduce(np.any, self, out, axis=axis, keepdims=keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return _reduce(np.all, self, out, axis=axis, keepdims=keepdims)

    def argmax(self, axis=None):
        return _reduce(np.argmax, self, None, axis=axis)


def _wrap(host):
    """Return an array of the double for what NumPy returned; NumPy scalars become arrays of shape ()."""
    return ndarray(np.asarray(host))


def _operand(value, *, scalars=True):
    """Return the NumPy value of an operand, or refuse it."""
    if isinstance(value, ndarray):
        return value._host
    if scalars and isinstance(value, _SCALARS):
        return value
    raise TypeError(f"a device array met a {type(value).__module__}.{type(value).__name__}; use asarray")


def _index(key):
    """Return an index as a tuple of what NumPy takes; arrays in it must be of the double."""
    return tuple(_index_part(part) for part in (key if isinstance(key, tuple) else (key,)))


def _index_part(part):
    if part is None or part is Ellipsis or isinstance(part, slice | int | np.integer):
        return part
    host = _operand(part, scalars=False)
    if host.dtype == bool:
        reads["mask"] += 1
    return host


def _is_basic(key):
    """Tell whether an index gives a view."""
    return not any(isinstance(part, np.ndarray) or part is Ellipsis for part in key)


def _out(out):
    return {} if out is None else {"out": _operand(out, scalars=False)}


def _reduce(function, array, out, **kwargs):
    found = function(_operand(array, scalars=False), **kwargs, **_out(out))
    return _wrap(found) if out is None else out


# Operators.


def _binary(name, function):
    def method(self, other):
        return _wrap(function(self._host, _operand(other)))

    def reflected(self, other):
        return _wrap(function(_operand(other), self._host))

    def in_place(self, other):
        function(self._host, _operand(other), out=self._host)
        return self

    setattr(ndarray, f"__{name}__", method)
    setattr(ndarray, f"__r{name}__", reflected)
    if name != "matmul":
        setattr(ndarray, f"__i{name}__", in_place)


def _comparison(name, function):
    setattr(ndarray, f"__{name}__", lambda self, other: _wrap(function(self._host, _operand(other))))


for _name, _function in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "pow": np.power, "matmul": np.matmul, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "rshift": np.right_shift,
}.items():  # fmt: skip
    _binary(_name, _function)
for _name, _function in {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}.items():  # fmt: skip
    _comparison(_name, _function)
ndarray.__neg__ = lambda self: _wrap(np.negative(self._host))
ndarray.__invert__ = lambda self: _wrap(np.invert(self._host))


# Element-wise functions: operands and `out`, no `where`.


def _ufunc(function):
    def call(*operands, out=None):
        found = function(*map(_operand, operands), **_out(out))
        return _wrap(found) if out is None else out

    call.__name__ = function.__name__
    return call


for _function in (
    np.add, np.subtract, np.multiply, np.divide, np.negative, np.absolute, np.sign, np.maximum, np.minimum, np.sqrt,
    np.square, np.exp, np.expm1, np.log, np.log1p, np.tanh, np.rint, np.greater, np.greater_equal, np.less,
    np.less_equal, np.equal, np.not_equal, np.logical_and, np.logical_or, np.logical_not, np.isfinite, np.isnan,
    np.isinf, np.cos, np.sin, np.copysign,
):  # fmt: skip
    globals()[_function.__name__] = _ufunc(_function)


# Making arrays.


def asarray(a, dtype=None):
    """Copy from the host, or return a device array as it is unless its dtype changes."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == np.dtype(dtype) else a.astype(dtype)
    writes["asarray"] += 1
    return ndarray(np.array(a, dtype=dtype, order="C"))


def array(obj, dtype=None):
    return asarray(obj, dtype).copy()


def asnumpy(a):
    """Copy to the host."""
    reads["asnumpy"] += 1
    return _operand(a, scalars=False).copy()


def empty(shape, dtype=float):
    """Return memory whose content must not be read: NaN, or the largest integer."""
    dtype = np.dtype(dtype)
    return full(shape, nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max, dtype)


def full(shape, fill_value, dtype=None):
    return ndarray(np.full(shape, fill_value, dtype))


def zeros(shape, dtype=float):
    return full(shape, 0, dtype)


def ones(shape, dtype=float):
    return full(shape, 1, dtype)


def eye(N, *, dtype=float):
    return ndarray(np.eye(N, dtype=dtype))


def empty_like(prototype):
    return empty(prototype.shape, prototype.dtype)


def zeros_like(a):
    return ndarray(np.zeros_like(_operand(a, scalars=False)))


def ones_like(a):
    return ndarray(np.ones_like(_operand(a, scalars=False)))


def arange(start, stop=None, step=1, dtype=None):
    """Return a range; unlike NumPy, CuPy casts start and step too, and refuses values that the dtype cannot hold."""
    found = np.arange(start, stop, step) if stop is not None else np.arange(start)
    if dtype is not None and found.size:
        np.dtype(dtype).type(0 if stop is None else start), np.dtype(dtype).type(step)
    return ndarray(found if dtype is None else found.astype(dtype))


def ascontiguousarray(a, dtype=None):
    return ndarray(np.ascontiguousarray(_operand(a, scalars=False), dtype))


# Joining, choosing, shaping.


def stack(tup, axis=0):
    return ndarray(np.stack([_operand(a, scalars=False) for a in tup], axis))


def concatenate(tup, axis=0):
    return ndarray(np.concatenate([_operand(a, scalars=False) for a in tup], axis))


def where(condition, x, y):
    return _wrap(np.where(_operand(condition, scalars=False), _operand(x), _operand(y)))


def clip(a, a_min, a_max):
    return _wrap(np.clip(_operand(a, scalars=False), _operand(a_min), _operand(a_max)))


def take(a, indices, axis=None):
    return _wrap(np.take(_operand(a, scalars=False), _operand(indices), axis=axis))


def reshape(a, newshape):
    return ndarray(np.reshape(_operand(a, scalars=False), newshape))


def broadcast_to(array, shape):
    return ndarray(np.broadcast_to(_operand(array, scalars=False), shape))


def matmul(x1, x2, /, *, out=None):
    found = np.matmul(_operand(x1, scalars=False), _operand(x2, scalars=False), **_out(out))
    return _wrap(found) if out is None else out


def dot(a, b):
    return _wrap(np.dot(_operand(a, scalars=False), _operand(b, scalars=False)))


def einsum(subscripts, /, *operands):
    return _wrap(np.einsum(subscripts, *(_operand(a, scalars=False) for a in operands)))


def copyto(dst, src, *, where=None):
    mask = True if where is None else _operand(where, scalars=False)
    np.copyto(_operand(dst, scalars=False), _operand(src), where=mask)


def _norm(x):
    return _wrap(np.linalg.norm(_operand(x, scalars=False)))


def _as_strided(x, shape=None, strides=None):
    return ndarray(np.lib.stride_tricks.as_strided(_operand(x, scalars=False), shape, strides, writeable=False))


def _cholesky(a):
    """Return the factor, or NaN if there is none: like CuPy's, it raises no error."""
    host = _operand(a, scalars=False)
    try:
        return _wrap(np.linalg.cholesky(host))
    except np.linalg.LinAlgError:
        return _wrap(np.full_like(host, nan))


def _svd(a, full_matrices=True):
    return tuple(map(_wrap, np.linalg.svd(_operand(a, scalars=False), full_matrices=full_matrices)))


def _solve(a, b):
    return _wrap(np.linalg.solve(_operand(a, scalars=False), _operand(b, scalars=False)))


linalg = SimpleNamespace(norm=_norm, cholesky=_cholesky, svd=_svd, solve=_solve)
lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=_as_strided))


# What a Backend asks of a device.


class Event:
    """A point in a stream's work; waiting for it does the work up to there."""

    def __init__(self, stream, number):
        self._stream, self._number = stream, number

    def synchronize(self):
        self._stream._run_to(self._number)


class Stream:
    """Work that is done as late as possible: when somebody waits for it. Only then is the host's memory read.

    `waited` are the streams whose events it was told to wait for.
    """

    def __init__(self, null=False, non_blocking=False):
        self._work, self._done, self._lock, self.waited = [], 0, threading.RLock(), []

    ptr = property(id)

    def record(self):
        return Event(self, len(self._work))

    def wait_event(self, event):
        self.waited.append(event._stream)
        event.synchronize()

    def synchronize(self):
        self._run_to(len(self._work))

    def _run_to(self, number):
        with self._lock:
            while self._done < number:
                self._work[self._done]()
                self._done += 1


current_stream = Stream()


def _set(self, arr, stream=None):
    """Copy from the host: at once or, on a stream, later, for which the host's array must be pinned."""
    if not isinstance(arr, np.ndarray) or arr.shape != self.shape or arr.dtype != self.dtype:
        raise TypeError("set takes a host array of the same shape and dtype")
    writes["set"] += 1
    if stream is None:
        self._host[...] = arr
    elif not any(np.shares_memory(arr, place) for place in pinned):
        raise TypeError("a copy on a stream from memory that is not pinned")
    else:
        stream._work.append(lambda: self._host.__setitem__(..., arr))


def _get(self, *, out, blocking=True):
    """Copy to pinned memory of the host on the current stream, and wait for it or not."""
    if out.shape != self.shape or out.dtype != self.dtype or not any(np.shares_memory(out, place) for place in pinned):
        raise TypeError("get takes pinned memory of the same shape and dtype")
    reads["get"] += 1
    current_stream._work.append(lambda: out.__setitem__(..., self._host))
    if blocking:
        current_stream.synchronize()


ndarray.set, ndarray.get = _set, _get
pinned = []
cuda = SimpleNamespace(
    Stream=Stream,
    Device=lambda device=None: SimpleNamespace(use=lambda: None),
    MemoryPool=lambda allocator=None: SimpleNamespace(total_bytes=lambda: 0),
    get_current_stream=lambda: current_stream,
    runtime=SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceProperties=lambda device: {"name": b"strict double", "uuid": bytes([device])},
    ),
)


def get_default_memory_pool():
    return cuda.MemoryPool()
