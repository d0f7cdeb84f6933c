"""Device kernels against array code, at sizes that are not multiples of a thread block's, and on difficult numbers."""

import inspect

import numpy as np
import pytest
from samples import rng

from arraytp.backend import NUMPY, get_backend
from arraytp.fast.parallel import Workspace
from arraytp.ops import kernels, pool
from arraytp.ops.activations import ACTIVATIONS
from arraytp.ops.loss import LOSSES, loss_and_score
from arraytp.ops.noise import counter_normal
from arraytp.ops.patches import make_window
from arraytp.optim import Twins, adam_rates, apply_updates, init_optimizer
from arraytp.options import SGD, Adam

HEIGHT, WIDTH, BATCH = 3, 4, 2
POOLS = [None, make_window(HEIGHT, WIDTH, 2, 2, 0), make_window(HEIGHT, WIDTH, 3, 2, 1), make_window(3, 4, 2, 1, 1)]
WINDOWS = [*POOLS[1:], make_window(HEIGHT, WIDTH, 1, 3, 0)]
UNPOOLS = ("overwrite", "accumulate")
HARD = ("wide", "tied", "huge", "tiny", "nan", "inf", "strided")
# Empty arrays do not occur here: a network has at least one weight, and a batch at least one image.
NEVER_EMPTY = ("collapse", "sgd", "adam", "loss_and_score")


class Draw:
    """Draws a backend's arrays, with the same numbers on the host and on a device."""

    def __init__(self, backend, dtype, kind):
        self.xp, self.dtype, self.kind, self.backend, self._drawn = backend.xp, np.dtype(dtype), kind, backend, 0

    def __call__(self, *shape, positive=False):
        """Return an array of the kind; if that is "nan" or "inf", about a ninth of its numbers are NaN or infinite."""
        self._drawn += 1
        generator = rng(11, self._drawn)
        values = generator.standard_normal(shape)
        if self.kind == "tied":
            values = np.rint(values)
        if self.kind in ("huge", "tiny"):
            values *= 1e9 if self.kind == "huge" else 1e-30
        if self.kind in ("nan", "inf"):
            signs = 1 if positive else generator.choice([-1, 1], shape)
            values = np.where(generator.random(shape) < 1 / 9, float(self.kind) * signs, values)
        values = (abs(values) if positive else values).astype(self.dtype)
        if self.kind != "strided":
            return self.xp.asarray(values)
        apart = self.xp.empty((*shape, 2), self.dtype)[..., 0]
        apart[...] = self.xp.asarray(values)
        return apart

    def room(self, *shape, dtype=None):
        """Return an array to write to."""
        return self.xp.full(shape, 7, dtype or self.dtype)


def shapes(window, n):
    """Return the shapes before and after a pool."""
    before = (BATCH if n else 0, HEIGHT, WIDTH, n or 1)
    return before, before if window is None else (before[0], window.out_height, window.out_width, before[3])


def maxima(draw, window, n):
    """Return the positions of a pool's maxima, some of which windows share."""
    before, after = shapes(window, n)
    if window is None:
        return None
    chosen = pool.max_pool_forward(np.rint(rng(5).standard_normal(before)), window)[1]
    assert chosen.shape == after
    return draw.xp.asarray(chosen)


def im2col(draw, n):
    for window in WINDOWS:
        before, after = shapes(window, n)
        yield kernels.im2col(draw(*before), window, draw.room(*after[:3], window.kernel**2 * after[3]))


def col2im(draw, n):
    for window in WINDOWS:
        before, after = shapes(window, n)
        yield kernels.col2im(draw(*after[:3], window.kernel**2 * after[3]), window, draw.room(*before))


def activate(draw, n):
    for f in ACTIVATIONS.values():
        for window in POOLS:
            before, after = shapes(window, n)
            for with_base in (False, True):
                z, bias = draw.xp.ascontiguousarray(draw(*before)), draw(before[3])
                base = draw(*before) if with_base else None
                out, index = draw.room(*after), draw.room(*after, dtype=np.uint8)
                kernels.activate(f, window, z, bias, out, None if window is None else index, base)
                yield out
                # On the host, a window with NaN, which ends a run, or with −inf alone has no index of a maximum.
                if draw.kind not in ("nan", "inf"):
                    yield index


def unpool_gradient(draw, n):
    for f in ACTIVATIONS.values():
        for window in POOLS:
            before, after = shapes(window, n)
            for units in {after[3], max(1, after[3] - 2)}:
                for scale in (None, 0.7, draw(before[0])):
                    given = draw(*after[:3], units), draw(*after), maxima(draw, window, n)
                    yield kernels.unpool_gradient(f, window, *given, scale, draw.room(*before))


def unpool_input(draw, n):
    for f in ACTIVATIONS.values():
        for window in POOLS:
            for mode in UNPOOLS:
                (before, after), index = shapes(window, n), maxima(draw, window, n)
                yield kernels.unpool_input(f, window, draw(*after), index, mode, draw.room(*before))


def unpool_difference(draw, n):
    for f in ACTIVATIONS.values():
        for window in POOLS:
            for mode in UNPOOLS:
                (before, after), index = shapes(window, n), maxima(draw, window, n)
                given = draw(*after), draw(*after), index, mode, draw.room(*before)
                yield kernels.unpool_difference(f, window, *given)


def slope_products(draw, n):
    for f in ACTIVATIONS.values():
        for window in POOLS:
            for mode in UNPOOLS:
                (before, after), index = shapes(window, n), maxima(draw, window, n)
                out = draw.room(*before), draw.room(*before)
                kernels.slope_products(f, window, draw(*after), index, mode, *out)
                yield from out


def collapse(draw, n):
    for momentum in (0.0, 0.9):
        omega, theta, v = (draw(2, 2, n or 1, n) for _ in range(3))
        if draw.kind == "strided":
            omega, v = (draw.xp.ascontiguousarray(array) for array in (omega, v))
        # With larger coefficients, the iterations diverge.
        c, b = (draw.xp.minimum(draw(2, 2, 1, n, positive=True), 1) for _ in range(2))
        if kernels.has_kernels(omega):
            kernels.collapse(omega, theta, v if momentum else None, c, b, momentum, 1e-3, 5)
        else:
            wide = [array.astype(np.float64) for array in (omega, theta, v, c, b)]
            w, theta, speed, c, b = wide
            speed = speed if momentum else np.zeros_like(speed)
            for _ in range(5):
                speed = momentum * speed + c * w - b * theta
                w = w - 1e-3 * speed
            omega, v = w.astype(draw.dtype), speed.astype(draw.dtype) if momentum else v
        # Iterations may subtract infinite numbers where the matrix power adds them, so infinity counts as NaN.
        yield from (draw.xp.where(draw.xp.isfinite(array), array, array.dtype.type(np.nan)) for array in (omega, v))


def row_order(draw, n):
    pivots = [int(rng(7, i).integers(i, n)) for i in range(n)]
    yield kernels.row_order(draw.xp.asarray(np.array(pivots, np.int32)), draw.room(n, dtype=np.int32))


def steps(optimizer):
    """Return steps of an optimiser, with and without a twin."""

    def case(draw, n):
        for with_twin in (False, True):
            parameters = [draw.xp.ascontiguousarray(draw(BATCH, n)), draw.xp.ascontiguousarray(draw(n))]
            twin = draw.xp.ascontiguousarray(draw(BATCH, n))
            state = init_optimizer(optimizer, parameters)
            twins = Twins({0: twin}, 0.1) if with_twin else None
            for _ in range(2):
                gradients = [draw.xp.ascontiguousarray(draw(*each.shape)) for each in parameters]
                apply_updates(optimizer, 0.1, state, parameters, gradients, Workspace(draw.backend), twins)
            yield from (*parameters, twin, *(moment for held in state.moments for moment in held))

    return case


def rates(draw, n):
    for keras in (False, True):
        out, optimizer = draw.room(n, 2), Adam(lr=0.3, epsilon_form="keras" if keras else "pytorch")
        if kernels.has_kernels(out):
            betas = optimizer.beta1, optimizer.beta2
            kernels.adam_rates(draw.xp.full(1, 4, np.uint64), n, betas, 0.3, keras, out)
        else:
            out[...] = np.reshape([adam_rates(optimizer, 0.3, 4 * n + k + 1) for k in range(n)], (n, 2))
        yield out


def normal(draw, n):
    for start in (0, 3):
        yield counter_normal(draw.room(n), 0.3, 2**63 + 5, start, 2**40 + 1)


def losses(draw, n):
    for name in LOSSES:
        for smoothing in (0.0, 0.1):
            for count, classes in ((n, 7), (3, n)):
                labels = draw.xp.asarray(rng(8).integers(0, classes, count))
                yield from loss_and_score(name, draw(count, classes), labels, "mean", smoothing)


EVERY = {
    "im2col": im2col,
    "col2im": col2im,
    "activate": activate,
    "unpool_gradient": unpool_gradient,
    "unpool_input": unpool_input,
    "unpool_difference": unpool_difference,
    "slope_products": slope_products,
    "collapse": collapse,
    "row_order": row_order,
    "sgd": steps(SGD(lr=0.1, momentum=0.9, weight_decay=0.01)),
    "adam": steps(Adam(lr=0.1, weight_decay=0.01)),
    "adam_rates": rates,
    "counter_normal": normal,
    "loss_and_score": losses,
}


def test_every_kernel_is_here():
    """`EVERY` holds the kernels of kernels.py, and the two that are in the modules of what they compute."""
    public = {name for name, each in vars(kernels).items() if inspect.isfunction(each) and name[0] != "_"}
    own = {name for name in public if getattr(kernels, name).__module__ == kernels.__name__}
    assert own - {"has_kernels", "kernel"} | {"counter_normal", "loss_and_score"} == EVERY.keys()


def scattered(t, index, window, mode="accumulate"):
    """Return `max_unpool` by scattering, as on the host: products with 0 would spread NaN and inf to other pixels."""
    out = np.empty((len(t), window.height, window.width, t.shape[-1]), t.dtype)
    scatter = pool.max_unpool_scatter if mode == "overwrite" else pool.max_pool_scatter
    corner = pool.window_corners(len(t), window, t.shape[-1])
    scatter(np.ascontiguousarray(t), index, window, corner, np.empty(t.shape, np.intp), out)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_kernel_is_its_array_code(name, dtype, tolerance, monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(kernels, "max_pool_backward", scattered)
    monkeypatch.setattr(kernels, "max_unpool", scattered)
    device = get_backend("cupy")
    for n, kind in [*((n, "odd") for n in (0, 1, 31, 33, 1025)), *((33, kind) for kind in HARD)]:
        if n == 0 and name in NEVER_EMPTY:
            continue
        monkeypatch.setattr(kernels, "MOST_COUNTED", 0 if kind == "wide" else 2**31)
        found = [device.to_host(array) for array in EVERY[name](Draw(device, dtype, kind), n)]
        expected = [np.asarray(array) for array in EVERY[name](Draw(NUMPY, dtype, kind), n)]
        for which, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), (n, kind, which)
            bound = tolerance * np.abs(other[np.isfinite(other)]).max(initial=0)
            message = f"result {which} of size {n}, {kind}"
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=bound, err_msg=message)


@pytest.mark.parametrize("operation", ["im2col", "activate"])
def test_indices_are_wide_where_any_array_is(monkeypatch, operation):
    """Whichever of input and output is larger must decide whether 32-bit indices suffice."""
    names = []
    monkeypatch.setattr(kernels, "has_kernels", lambda _: True)
    monkeypatch.setattr(kernels, "kernel", lambda _, name, *given: names.append(name) or (lambda *given: None))
    monkeypatch.setattr(kernels, "MOST_COUNTED", 50)
    if operation == "im2col":
        window = make_window(8, 8, 1, 2, 0)
        kernels.im2col(np.zeros((1, 8, 8, 1)), window, np.zeros((1, 4, 4, 1)))
    else:
        window, out = make_window(7, 7, 2, 1, 1), np.zeros((1, 8, 8, 1))
        kernels.activate(ACTIVATIONS["tanh"], window, np.zeros((1, 7, 7, 1)), np.zeros(1), out, out.astype(np.uint8))
    assert ["wide" in name for name in names] == [True]
