"""Fused device kernels against their array code on the host; on the strict double, the array code runs instead.

`test_every_kernel.py` adds sizes and numbers that are difficult for a kernel.
"""

import itertools
from collections import namedtuple

import numpy as np
import pytest
from samples import rng

from arraytp.backend import NUMPY, add_product
from arraytp.fast.parallel import Workspace
from arraytp.ops import kernels
from arraytp.ops.activations import ACTIVATIONS
from arraytp.ops.patches import make_window
from arraytp.optim import Twins, apply_updates, init_optimizer
from arraytp.options import SGD, Adam

Place = namedtuple("Place", ("put", "get", "backend"))
BATCH, CHANNELS = 3, 4
WINDOWS = [(6, 7, 3, 2, 1), (5, 6, 3, 1, 1), (8, 8, 2, 2, 0), (7, 5, 5, 1, 2), (6, 6, 3, 3, 1), (9, 4, 2, 3, 0)]
windows = pytest.mark.parametrize("sizes", WINDOWS, ids=str)
activations = pytest.mark.parametrize("name", ACTIVATIONS)
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 2e-6)])
POOLS = [None, make_window(6, 8, 2, 2, 0), make_window(6, 8, 3, 2, 1), make_window(6, 8, 3, 1, 1)]
pools = pytest.mark.parametrize("pool", POOLS, ids=["none", "2/2", "3/2", "3/1"])


def normal(shape, dtype="float64", key=0):
    return rng(3, key).standard_normal(shape).astype(dtype)


def same(device, function, arrays, out, tolerance, index=None):
    """Run a function on the host and on the device; its results must agree, indices exactly."""
    results = []
    for put, get, xp in (
        (np.array, np.asarray, np),
        (device.put, device.get, device.backend.xp),
    ):
        outs = [xp.empty(shape, dtype) for shape, dtype in out]
        function(*(None if array is None else put(array) for array in arrays), *outs)
        results.append([get(array) for array in outs])
    for wanted, found in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    return results[0]


def pooled(pool):
    """Return the shapes before and after a pool."""
    before = (BATCH, 6, 8, CHANNELS)
    return before, before if pool is None else (BATCH, pool.out_height, pool.out_width, CHANNELS)


def outputs(pool, name, dtype, key=0):
    """Return z, s and the maxima of a pool on the host."""
    before, after = pooled(pool)
    z, s = normal(before, dtype, key), np.empty(after, dtype)
    index = None if pool is None else np.empty(after, np.uint8)
    kernels.activate(ACTIVATIONS[name], pool, z.copy(), np.zeros(CHANNELS, dtype), s, index)
    return z, s, index


@dtypes
@windows
def test_patches_and_their_adjoint(device, sizes, dtype, tolerance):
    window = make_window(*sizes)
    x = normal((BATCH, *sizes[:2], CHANNELS), dtype)
    shape = (BATCH, window.out_height, window.out_width, window.kernel**2 * CHANNELS)
    same(device, lambda x, out: kernels.im2col(x, window, out), [x], [(shape, dtype)], 0)
    same(device, lambda d, out: kernels.col2im(d, window, out), [normal(shape, dtype)], [(x.shape, dtype)], tolerance)


@dtypes
@activations
@pools
@pytest.mark.parametrize("with_base", [False, True])
def test_bias_pool_and_activation(device, pool, name, with_base, dtype, tolerance):
    before, after = pooled(pool)
    z, base, bias = (normal(shape, dtype, key) for key, shape in enumerate((before, before, (CHANNELS,))))
    z[0, 0, 0], z[0, 0, 1] = 0, 0

    def run(z, bias, base, out, *index):
        kernels.activate(ACTIVATIONS[name], pool, z, bias, out, index[0] if index else None, base)

    out = [(after, dtype)] + ([] if pool is None else [(after, np.uint8)])
    same(device, run, [z, bias, base if with_base else None], out, tolerance)


@dtypes
@activations
@pools
@pytest.mark.parametrize("scaled", ["no", "by a number", "by samples"])
@pytest.mark.parametrize("units", [CHANNELS, 3])
def test_gradients_through_activation_and_pool(device, pool, name, scaled, units, dtype, tolerance):
    (before, after), (_, s, index) = pooled(pool), outputs(pool, name, dtype)
    ds, scale = normal((*after[:-1], units), dtype, 5), {"no": None, "by a number": 0.7}.get(scaled)
    scales = normal((BATCH,), dtype, 6) if scaled == "by samples" else None

    def run(ds, s, index, scales, out):
        f = ACTIVATIONS[name]
        kernels.unpool_gradient(f, pool, ds, s, index, scale if scales is None else scales, out)

    same(device, run, [ds, s, index, scales], [(before, dtype)], tolerance)


@dtypes
@activations
@pools
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
def test_unpooled_values_and_differences(device, pool, name, unpool, dtype, tolerance):
    (before, _), (_, s, index) = pooled(pool), outputs(pool, name, dtype)
    f, delta = ACTIVATIONS[name], 0.3 * normal(s.shape, dtype, 7)
    same(device, lambda t, index, out: kernels.unpool_input(f, pool, t, index, unpool, out), [s + delta, index],
         [(before, dtype)], tolerance)  # fmt: skip
    same(device, lambda s, delta, index, out: kernels.unpool_difference(f, pool, s, delta, index, unpool, out),
         [s, delta, index], [(before, dtype)], tolerance)  # fmt: skip


@dtypes
@activations
@pools
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
def test_products_of_slopes(device, pool, name, unpool, dtype, tolerance):
    (before, _), (_, s, index) = pooled(pool), outputs(pool, name, dtype)
    f = ACTIVATIONS[name]
    same(device, lambda s, index, n, m: kernels.slope_products(f, pool, s, index, unpool, n, m), [s, index],
         [(before, dtype), (before, dtype)], 4 * tolerance)  # fmt: skip


@activations
def test_what_is_not_a_number_stays_so(device, name):
    """A maximum or a comparison that drops NaN would hide a run that has diverged."""
    pool, f, bias = POOLS[1], ACTIVATIONS[name], np.zeros(CHANNELS)
    for value, which in itertools.product((np.nan, np.inf), (None, pool)):
        (_before, after), z = pooled(which), normal((BATCH, 6, 8, CHANNELS))
        z[1, 1, 1, 1] = value
        index = None if which is None else device.backend.xp.empty(after, np.uint8)
        out, there = device.backend.xp.empty(after), device.put(z)
        with np.errstate(all="ignore"):
            kernels.activate(f, which, there, device.put(bias), out, index)
        wanted = np.zeros(after, bool)
        wanted[(1, 0, 0, 1) if which else (1, 1, 1, 1)] = True
        np.testing.assert_array_equal(np.isnan(device.get(out)), wanted if np.isnan(value) else False)


@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (-0.5, 1), (2, 0.25)])
def test_products_are_added(device, alpha, beta, dtype, tolerance):
    a, b, out = normal((4, 5), dtype), normal((5, 3), dtype, 1), normal((4, 3), dtype, 2)
    for left, right in ((device.put(a), device.put(b)), (device.put(a.T.copy()).T, device.put(b.T.copy()).T)):
        there = device.put(out)
        assert add_product(left, right, there, alpha, beta) is there
        np.testing.assert_allclose(device.get(there), alpha * (a @ b) + beta * out, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1),
        SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
        Adam(lr=0.1, weight_decay=0.01),
        Adam(lr=0.1, epsilon_form="keras"),
    ],
    ids=["sgd", "momentum", "adam", "keras"],
)
@pytest.mark.parametrize("with_twin", [False, True])
def test_steps_of_the_optimisers(device, optimizer, with_twin, dtype, tolerance):
    """Three steps on a weight and a bias, the weight with or without an array that shares its steps."""
    shapes, results = [(3, 5, 7), (7,), (3, 5, 7)], []
    for place in (Place(np.array, np.asarray, NUMPY), device):
        *parameters, twin = (place.put(normal(shape, dtype, key)) for key, shape in enumerate(shapes))
        state, twins = init_optimizer(optimizer, parameters), Twins({0: twin}, 0.1) if with_twin else None
        for step in range(3):
            gradients = [place.put(normal(shape, dtype, 10 + step)) for shape in shapes[:2]]
            apply_updates(optimizer, 0.1, state, parameters, gradients, Workspace(place.backend), twins)
        moments = [moment for held in state.moments for moment in held]
        results.append([place.get(array) for array in (*parameters, twin, *moments)])
    for wanted, found in zip(*results, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=10 * tolerance, atol=10 * tolerance)
