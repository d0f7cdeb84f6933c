"""What `--backend cupy` says if something is wrong with CuPy, driver, device or memory; with a fake CuPy."""

import importlib.metadata
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from arraytp.backend import NUMPY, Backend, add_product, batched_product, batched_solve, get_backend
from arraytp.config import parse_config
from arraytp.errors import UserError
from arraytp.ops import kernels
from arraytp.training.plan import plan


class RuntimeFailure(RuntimeError):
    pass


class CompileException(Exception):
    pass


class Fake:
    """A fake CuPy whose parts fail with the given errors."""

    def __init__(self, devices=2, count_error=None, compute_error=None, use_error=None, free=2**30):
        self.used, self.__version__ = [], "0"
        self._devices, self._count_error, self._compute_error = devices, count_error, compute_error
        self._use_error = use_error
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                CUDARuntimeError=RuntimeFailure,
                getDeviceCount=self.count,
                memGetInfo=lambda: (free, 8000),
                getDevice=lambda: 0,
                getDeviceProperties=lambda number: {"name": b"Fake 8"},
            ),
            compiler=SimpleNamespace(CompileException=CompileException),
            Device=lambda number: SimpleNamespace(use=lambda: self.use(number)),
            MemoryPool=lambda allocator: SimpleNamespace(total_bytes=lambda: 0),
        )

    def use(self, number):
        if self._use_error is not None:
            raise self._use_error
        self.used.append(number)

    def count(self):
        if self._count_error is not None:
            raise self._count_error
        return self._devices

    def ones(self, shape):
        if self._compute_error is not None:
            raise self._compute_error
        return __import__("numpy").ones(shape)

    def get_default_memory_pool(self):
        return SimpleNamespace(total_bytes=lambda: 6000)


@pytest.fixture
def fake(monkeypatch):
    """Install a fake CuPy as the module `cupy`."""

    def install(*packages, **settings):
        made = Fake(**settings)
        monkeypatch.setitem(sys.modules, "cupy", made)
        found = {"cupy": list(packages or ("cupy-cuda12x",))}
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: found)
        return made

    return install


LIBRARY = "libcublas.so.12: cannot open shared object file: No such file or directory"
CASES = {
    "two packages": (
        [("cupy-cuda12x", "cupy-cuda13x"), {}],
        ["cupy-cuda12x and cupy-cuda13x are installed", "uninstall all of them"],
    ),
    "an old driver": (
        [(), {"count_error": RuntimeFailure("cudaErrorInsufficientDriver: CUDA driver version is insufficient")}],
        ["cudaErrorInsufficientDriver", "update the driver", "arraytp[cuda12]"],
    ),
    "no driver": ([(), {"count_error": RuntimeFailure("cudaErrorNoDevice: no device")}], ["cudaErrorNoDevice"]),
    "no device": ([(), {"devices": 0}], ["this machine has no CUDA device"]),
    "no libraries": ([(), {"compute_error": ImportError(f"\n{LIBRARY}\nmore")}], [f"({LIBRARY})", "arraytp[cuda12]"]),
    "no compiler": ([(), {"compute_error": RuntimeError("CuPy failed to load libnvrtc.so.12")}], ["libnvrtc.so.12"]),
    "no memory": (
        [(), {"compute_error": MemoryError("Out of memory allocating 512 bytes")}],
        ["device 0", "512 bytes"],
    ),
    "held by another process": (
        [(), {"use_error": RuntimeFailure("cudaErrorDevicesUnavailable: all CUDA-capable devices are busy")}],
        ["device 0 has no room left (cudaErrorDevicesUnavailable", "another process may hold it"],
    ),
    "no room for a context": (
        [(), {"use_error": RuntimeFailure("cudaErrorMemoryAllocation: out of memory")}],
        ["device 0 has no room left (cudaErrorMemoryAllocation"],
    ),
    "no room for cuBLAS": (
        [(), {"compute_error": RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"), "free": 2**27}],
        ["device 0 has no room left (CUBLAS_STATUS_NOT_INITIALIZED)"],
    ),
    "no cuBLAS": (
        [(), {"compute_error": RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")}],
        ["CuPy cannot compute (CUBLAS_STATUS_NOT_INITIALIZED)"],
    ),
    "no headers": ([(), {"compute_error": CompileException("fill.cu(3): error: no file\nmore")}], ["fill.cu(3)"]),
}


@pytest.mark.parametrize(("settings", "words"), CASES.values(), ids=CASES)
def test_what_keeps_cupy_from_computing_is_one_line(fake, settings, words):
    packages, options = settings
    fake(*packages, **options)
    with pytest.raises(UserError) as caught:
        get_backend("cupy")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("backend cupy: ")
    assert all(word in str(caught.value) for word in words)


def test_the_device_is_chosen_by_its_number_or_by_rank(fake):
    made = fake(devices=3)
    numbers = [get_backend("cupy", *which).number for which in ((None, 0), (None, 4), (2, 0), (0, 1))]
    assert numbers == made.used == [0, 1, 2, 0]
    with pytest.raises(UserError, match="device: 3: this machine has 3, counted from 0; at most 2 can be"):
        get_backend("cupy", 3)


def test_an_array_that_does_not_fit_is_named_with_a_batch_that_may():
    error = MemoryError("Out of memory allocating 4,000 bytes (allocated so far: 6,000 bytes).")
    said = Backend("cupy", Fake()).memory_words(error, 128)
    assert said == (
        "not enough memory: train.batch_size 128 does not fit into the 8,000 bytes of Fake 8: 4,000 bytes were asked "
        "for beside 6,000 in use; try train.batch_size=64"
    )
    assert "batch_size=1" in Backend("cupy", Fake()).memory_words(error, 1)
    in_evaluation = Backend("cupy", Fake()).memory_words(error, 128, "train.eval_batch_size")
    assert in_evaluation.startswith("not enough memory: train.eval_batch_size 128 does not fit")
    assert in_evaluation.endswith("try train.eval_batch_size=64")
    assert NUMPY.memory_words(MemoryError("no room"), 128) == "not enough memory: no room"


def test_a_kernel_that_does_not_compile_is_one_line():
    def fail(*arguments, **options):
        raise CompileException("arraytp_x.cu(7): error: what?\n1 error detected")

    made = Fake()
    made.ElementwiseKernel = lambda *text, **options: fail
    with pytest.raises(UserError, match=r"the kernel arraytp_x does not compile \(arraytp_x.cu\(7\): error: what\?\)"):
        kernels._made(made, "arraytp_x", "T x", "T y", "y = x", "")(1, 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "tf32: true: is for products of backend cupy in float32, not numpy in float32"),
        ({"backend": "cupy", "dtype": "float64"}, "not cupy in float64; leave it out, or use --backend cupy"),
        ({"backend": "cupy", "rule": {"name": "gait-prop", "inverse": "pseudo"}}, "rule gait-prop inverts weights"),
        ({"backend": "cupy", "rule": {"name": "ridge-tp"}}, "rule ridge-tp inverts weights"),
    ],
)
def test_tf32_is_for_what_has_it_and_can_do_with_it(changed, said):
    settings = {
        "tf32": True, "data": {"dataset": "fashion-mnist-10k"}, "network": {"name": "lenet"},
        "optimizer": {"name": "sgd", "lr": 0.1}, "train": {"epochs": 1, "batch_size": 2}, **changed,
    }  # fmt: skip
    with pytest.raises(UserError, match=said):
        plan(parse_config(settings).variants[""], NUMPY)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_on_a_device_takes_any_layout(dtype):
    """Contiguous factors, transposes, rows of a wider array and strided ones, into the rows of a wider array."""
    backend, rng = get_backend("cupy"), np.random.default_rng(0)
    put = backend.asarray
    layouts = (
        put,
        lambda x: put(np.ascontiguousarray(x.T)).T,
        lambda x: put(np.tile(x, (1, 2)))[:, : x.shape[1]],
        lambda x: put(np.repeat(np.repeat(x, 2, axis=0), 2, axis=1))[::2, ::2],
    )
    for rows, inner, columns in ((7, 6, 5), (1, 6, 5), (7, 1, 5), (7, 6, 1), (1, 1, 1)):
        a, b, c = (
            rng.standard_normal(shape).astype(dtype) for shape in ((rows, inner), (inner, columns), (rows, columns))
        )
        for first in layouts:
            for second in layouts:
                out = layouts[2](c)
                add_product(first(a), second(b), out, 2.0, 0.5)
                np.testing.assert_allclose(backend.to_host(out), 2 * a @ b + 0.5 * c, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_and_solutions_of_every_sample(dtype):
    """For one sample and several, with transposed and strided factors; solutions are CuPy's, bit for bit."""
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    for count in (1, 5):
        a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((count, 3, 7), (count, 7, 4)))
        wide = np.zeros((count, 6, 14), dtype)
        wide[:, ::2, :7] = a
        firsts = cupy.asarray(a), cupy.asarray(wide)[:, ::2, :7], cupy.asarray(a.transpose(0, 2, 1)).transpose(0, 2, 1)
        for first in firsts:
            for second in (cupy.asarray(b), cupy.asarray(b.transpose(0, 2, 1).copy()).transpose(0, 2, 1)):
                found = batched_product(first, second).get()
                np.testing.assert_allclose(found, a @ b, rtol=1e-5, atol=1e-5)
        matrices, y = cupy.asarray(rng.standard_normal((count, 6, 6)).astype(dtype)), cupy.asarray(b[:, :6, 0].copy())
        wanted = cupy.linalg.solve(matrices, y[:, :, None])[:, :, 0]
        before = matrices.copy(), y.copy()
        np.testing.assert_array_equal(batched_solve(matrices, y).get(), wanted.get())
        for array, former in zip((matrices, y), before, strict=True):
            np.testing.assert_array_equal(array.get(), former.get())
