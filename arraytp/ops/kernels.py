"""Fused element-wise kernels of a device, one launch each: all but products, inverses and sums over a batch.

On CuPy arrays, a function launches its kernel. On other arrays, it computes the same with operations of `arraytp.ops`,
against which tests check the kernel. Arrays are C-contiguous; results are written to `out`.

Dimensions: B batch, (H, W) input size, (P, Q) output size, C channels, k kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from arraytp.backend import Array, array_module, first_line
from arraytp.errors import UserError
from arraytp.ops import patches
from arraytp.ops.activations import LEAKY_SLOPE, Activation
from arraytp.ops.patches import Window
from arraytp.ops.pool import max_pool_backward, max_pool_forward, max_unpool
from arraytp.options import Unpool

# f(z), f' computed from s, and f(s + δ) − f(s) of every activation, as in `arraytp.ops.activations`. A comparison with
# NaN is false, so the branch for "not below 0" propagates NaN.
_ACROSS = "(s >= 0 && s + d >= 0) ? d : (s < 0 && s + d < 0) ? ({below}) : f(s + d) - f(s)"
_FUNCTIONS = {
    "linear": ("z", "T(1)", "d"),
    "leaky-relu": (f"z < 0 ? z * T({LEAKY_SLOPE}) : z", f"s >= 0 ? T(1) : T({LEAKY_SLOPE})",
                   _ACROSS.format(below=f"d * T({LEAKY_SLOPE})")),
    "relu": ("z < 0 ? T(0) : z", "s > 0 ? T(1) : T(0)", _ACROSS.format(below="T(0)")),
    "tanh": ("tanh(z)", "T(1) - s * s", "tanh(d) * (T(1) - tanh(s + d) * tanh(s))"),
    "elu": ("z < 0 ? expm1(z) : z", "s >= 0 ? T(1) : s + T(1)",
            _ACROSS.format(below="(d < 0 ? T(1) : T(-1)) * exp(d < 0 ? s : s + d) * expm1(d < 0 ? d : -d)")),
}  # fmt: skip
_PREAMBLE = """
template <typename T> __device__ T f(T z) {{ return {0}; }}
template <typename T> __device__ T slope(T s) {{ return {1}; }}
template <typename T> __device__ T difference(T s, T d) {{ return {2}; }}
template <typename T> __device__ T tied(T z, T least) {{ return z < least ? least : z; }}
"""
# Arrays with this many elements or more are indexed with 64 bits.
MOST_COUNTED = 2**31
_WINDOW = "I H, I W, I P, I Q, I k, I stride, I top, I left, I C"
_PLACE = """
I e = i;
const I c = e % C; e /= C;
const I w = e % W; e /= W;
const I h = e % H; const I b = e / H;
"""


def has_kernels(array: Array) -> bool:
    """Tell whether an array's module compiles kernels."""
    return hasattr(array_module(array), "ElementwiseKernel")


def im2col(x: Array, window: Window, out: Array) -> Array:
    """Write `arraytp.ops.patches.im2col`: every receptive field as a row.

    Parameters
    ----------
    x : array of shape (B, H, W, C)
    window : Window
    out : array of shape (B, P, Q, k·k·C)
    """
    if not has_kernels(x):
        return patches.im2col(x, window, out)
    kernel = _kernel(_larger(x, out), "im2col", f"raw T x, {_WINDOW}", "T out", """
        I e = i;
        const I c = e % C; e /= C;
        const I dj = e % k; e /= k;
        const I di = e % k; e /= k;
        const I q = e % Q; e /= Q;
        const I p = e % P; const I b = e / P;
        const I h = p * stride + di - top, w = q * stride + dj - left;
        out = h >= 0 && h < H && w >= 0 && w < W ? x[((b * H + h) * W + w) * C + c] : T(0);""")  # fmt: skip
    return kernel(x, *_sizes(window, x.shape[-1], out), out)


def col2im(dpatches: Array, window: Window, out: Array) -> Array:
    """Write `arraytp.ops.patches.col2im`: every pixel becomes the sum over the patches that contain it.

    Parameters
    ----------
    dpatches : array of shape (B, P, Q, k·k·C)
    window : Window
    out : array of shape (B, H, W, C)
    """
    if not has_kernels(dpatches):
        out[...] = patches.col2im(dpatches, window)
        return out
    kernel = _kernel(_larger(dpatches, out), "col2im", f"raw T x, {_WINDOW}", "T out", f"""{_PLACE}
        T sum = 0;
        for (I di = 0; di < k; ++di) for (I dj = 0; dj < k; ++dj) {{
            const I y = h + top - di, z = w + left - dj;
            if (y < 0 || z < 0 || y % stride || z % stride || y / stride >= P || z / stride >= Q) continue;
            sum += x[(((b * P + y / stride) * Q + z / stride) * k * k + di * k + dj) * C + c];
        }}
        out = sum;""")  # fmt: skip
    return kernel(dpatches, *_sizes(window, out.shape[-1], dpatches), out)


def activate(
    f: Activation,
    pool: Window | None,
    z: Array,
    bias: Array,
    out: Array,
    index: Array | None,
    base: Array | None = None,
) -> None:
    """Write s = pool(f(z + base + b)) and which elements of the windows are the maxima.

    As in `arraytp.fast.passes`, bias and activation come after the pool.

    Parameters
    ----------
    f : Activation
    pool : Window or None
    z, base : arrays of shape (B, H, W, C), or (B, C) without a pool
        The affine map without its bias, in two summands; z may be overwritten.
    bias : array of shape (C,)
    out : array of shape (B, P, Q, C), or z's
        May be z where there is no pool.
    index : array of uint8 of that shape, or None without a pool
    """
    if not has_kernels(z):
        z = z if base is None else z + base
        f.tie(z, bias)
        if pool is not None:
            max_pool_forward(z, pool, out, index)
            z = out
        f(z + bias, out=out)
        return
    value = "x[at]" if base is None else "x[at] + base[at]"
    value = f"tied({value}, -bias[c])" if f.flat_below_zero else value
    body, types, outputs = f"const I at = i, c = i % C; out = f({value} + bias[c]);", "T out", [out]
    if pool is not None:
        types, outputs = "T out, uint8 index", [out, index]
        body = f"""
        I e = i;
        const I c = e % C; e /= C;
        const I q = e % Q; e /= Q;
        const I p = e % P; const I b = e / P;
        bool first = true;
        T best = 0;
        for (I di = 0; di < k; ++di) for (I dj = 0; dj < k; ++dj) {{
            const I h = p * stride + di - top, w = q * stride + dj - left;
            if (h < 0 || h >= H || w < 0 || w >= W) continue;
            const I at = ((b * H + h) * W + w) * C + c;
            const T v = {value};
            if (first || v > best || (v != v && best == best)) {{ best = v; index = di * k + dj; first = false; }}
        }}
        out = f(best + bias[c]);"""
    name = f"activate{'' if pool is None else '_pool'}{'' if base is None else '_sum'}"
    kernel = _kernel(_larger(z, out), name, f"raw T x, raw T base, raw T bias, {_WINDOW}", types, body, f)
    kernel(z, z if base is None else base, bias, *_sizes(pool, out.shape[-1], z), *outputs)


def unpool_gradient(
    f: Activation,
    pool: Window | None,
    ds: Array,
    s: Array,
    index: Array | None,
    scale: float | Array | None,
    out: Array,
) -> Array:
    """Write dz = D ⊙ (scale · ds) at the positions of the maxima, adding up overlapping windows; 0 for auxiliary units.

    Parameters
    ----------
    f, pool
        As in `activate`.
    ds : array of shape (B, P, Q, D), D ≤ C, or (B, D)
        Gradient of the units that are handed on, which come first.
    s, index : arrays of shape (B, P, Q, C)
        What `activate` wrote.
    scale : float or array of shape (B,), optional
    out : array of shape (B, H, W, C)
    """
    per_sample = not (scale is None or isinstance(scale, float))
    if not has_kernels(ds):
        units = ds.shape[-1]
        if scale is not None:
            factor: Any = scale
            ds = ds * (factor.reshape(-1, *[1] * (ds.ndim - 1)) if per_sample else ds.dtype.type(factor))
        df = f.backward(ds, s[..., :units])
        if pool is not None and index is not None:
            df = max_pool_backward(df, array_module(s).ascontiguousarray(index[..., :units]), pool)
        out[..., :units] = df
        out[..., units:] = 0
        return out
    factor = "" if scale is None else " * scales[b]" if per_sample else " * scale"
    value = f"c < D ? t[at / C * D + c]{factor} * slope(s[at]) : T(0)"
    name = f"unpool_gradient_{'pool' if pool else 'plain'}{'_samples' if per_sample else factor and '_scale'}"
    numbers = (scale, ds.dtype.type(1)) if per_sample else (ds, ds.dtype.type(1 if scale is None else scale))
    return _gather(name, f, pool, (ds, s, index), numbers, ds.shape[-1], "accumulate", (value, "s[at]", "v"), out)


def unpool_input(
    f: Activation, pool: Window | None, t: Array, index: Array | None, unpool: Unpool, out: Array
) -> Array:
    """Write a(t) = f(unpool(t)), of shape (B, H, W, C), for t of shape (B, P, Q, C)."""
    if not has_kernels(t):
        u = t if pool is None else max_unpool(t, index, pool, unpool)
        out[...] = f(u)
        return out
    name = f"unpool_input_{unpool if pool else 'plain'}"
    numbers = t, t.dtype.type(1)
    return _gather(name, f, pool, (t, t, index), numbers, t.shape[-1], unpool, ("t[at]", "t[at]", "f(v)"), out)


def unpool_difference(
    f: Activation, pool: Window | None, s: Array, delta: Array, index: Array | None, unpool: Unpool, out: Array
) -> Array:
    """Write a(s + δ) − a(s), of shape (B, H, W, C), exact for small δ; s and δ of shape (B, P, Q, C)."""
    if not has_kernels(s):
        u, du = (t if pool is None else max_unpool(t, index, pool, unpool) for t in (s, delta))
        out[...] = f.difference(u, du)
        return out
    name, numbers = f"unpool_difference_{unpool if pool else 'plain'}", (s, s.dtype.type(1))
    values = "t[at]", "s[at]", "difference(u, v)"
    return _gather(name, f, pool, (delta, s, index), numbers, s.shape[-1], unpool, values, out)


def slope_products(
    f: Activation, pool: Window | None, s: Array, index: Array | None, unpool: Unpool, n: Array, m: Array
) -> None:
    """Write, for every position, Σ D_F D_G to n and Σ D_G² to m, over the outputs whose value it keeps (Theorem 4.2).

    n and m are of shape (B, H, W, C). D_F = f'(z), computed from s, and D_G = f'(u), u the unpooled s at the position
    (`arraytp.model.feedback.jacobian_overlap`).
    """
    if not has_kernels(s):
        take: Any = (lambda t: t) if pool is None else (lambda t: max_unpool(t, index, pool, unpool))
        ones = array_module(s).ones_like(s)
        slope = f.backward(array_module(s).ones_like(n), f(take(s)))
        n[...], m[...] = take(f.backward(ones, s)) * slope, take(ones) * slope * slope
        return
    for out, value, result in ((n, "slope(s[at])", "v * slope(f(u))"), (m, "T(1)", "v * slope(f(u)) * slope(f(u))")):
        name, numbers = f"slopes_{'n' if out is n else 'm'}_{unpool if pool else 'plain'}", (s, s.dtype.type(1))
        _gather(name, f, pool, (s, s, index), numbers, s.shape[-1], unpool, (value, "s[at]", result), out)


def collapse(
    omega: Array, theta: Array, v: Array | None, c: Array, b: Array, momentum: float, lr: float, iterations: int
) -> None:
    """Do K iterations of feedback training in place: `arraytp.rules.collapse.sgd_iterations`. Only with kernels.

    Parameters
    ----------
    omega, theta, v : arrays of shape (k, k, C, O) or (in, out)
        v is None without momentum.
    c, b : arrays of shape (k, k, 1, O) or (1, out)
    momentum, lr, iterations
        μ, the rate and K.
    """
    rows = [array.reshape(-1, *array.shape[-2:]) for array in (theta, c, b)]
    inputs, outputs = "T theta, T c, T b, float64 momentum, float64 lr, int32 count", ["T w"]
    held = "v" if v is not None else "0"
    body = f"""
        double p[6] = {{1, 0, 0, 0, 1, 0}};
        double a[6] = {{1 - lr * c, -lr * momentum, lr * b, c, momentum, -b}};
        for (int n = count; n; n >>= 1) {{
            if (n & 1) multiply(p, a);
            double square[6];
            for (int j = 0; j < 6; ++j) square[j] = a[j];
            multiply(a, square);
        }}
        const T before = w, speed = {held};
        w = T(p[0]) * before + T(p[1]) * speed + T(p[2]) * theta;
        {"v = T(p[3]) * before + T(p[4]) * speed + T(p[5]) * theta;" if v is not None else ""}"""
    targets = [omega.reshape(rows[0].shape)]
    if v is not None:
        outputs.append("T v")
        targets.append(v.reshape(rows[0].shape))
    made = kernel(omega, f"collapse_{len(targets)}", inputs, ", ".join(outputs), body, _MULTIPLY)
    made(*rows, momentum, lr, iterations, *targets)


def row_order(pivots: Array, out: Array) -> Array:
    """Write the order of rows after swapping row i with row pivots[i], i = 0, 1, …; both arrays of shape (n,)."""
    if has_kernels(pivots):
        return kernel(out, "row_order", "raw int32 pivots, int32 n", "raw int32 order", """
            for (int j = 0; j < n; ++j) order[j] = j;
            for (int j = 0; j < n; ++j) { const int t = order[j]; order[j] = order[pivots[j]]; order[pivots[j]] = t; }
            """)(pivots, len(out), out, size=1)  # fmt: skip
    xp = array_module(pivots)
    out[...] = xp.arange(len(out), dtype=out.dtype)
    for i in range(len(out)):
        pair = xp.concatenate((xp.arange(i, i + 1, dtype=out.dtype), pivots[i : i + 1]))
        out[pair] = out[pair[::-1]]
    return out


# x ← x y for 3×3 matrices whose last row is 0 0 1, of which only the first two rows are stored.
_MULTIPLY = """
__device__ void multiply(double* x, const double* y) {
    double z[6];
    for (int r = 0; r < 2; ++r) for (int s = 0; s < 3; ++s)
        z[3 * r + s] = x[3 * r] * y[s] + x[3 * r + 1] * y[3 + s] + (s == 2 ? x[3 * r + 2] : 0);
    for (int j = 0; j < 6; ++j) x[j] = z[j];
}
"""


def _gather(
    name: str,
    f: Activation,
    pool: Window | None,
    arrays: tuple[Array, Array, Array | None],
    numbers: tuple[Array, Any],
    width: int,
    mode: Unpool,
    values: tuple[str, str, str],
    out: Array,
) -> Array:
    """Write `result` at every position; v and u are of the windows whose maximum lies there: their sum, or the last."""
    (t, s, index), (value, other, result) = arrays, values
    if pool is None:
        index, body = s, f"{_PLACE} const I at = i; const T v = {value}, u = {other}; out = {result};"
    else:
        take = "+=" if mode == "accumulate" else "="
        # In row-major order, so that the last window's value stays.
        body = f"""{_PLACE}
        T v = 0, u = 0;
        const I y = h + top, z = w + left;
        for (I p = y < k ? 0 : (y - k) / stride + 1; p < P && p * stride <= y; ++p)
        for (I q = z < k ? 0 : (z - k) / stride + 1; q < Q && q * stride <= z; ++q) {{
            const I at = ((b * P + p) * Q + q) * C + c;
            if (index[at] != (y - p * stride) * k + z - q * stride) continue;
            v {take} {value};
            u {take} {other};
        }}
        out = {result};"""
    inputs = f"raw T t, raw T s, raw {'uint8' if pool else 'T'} index, raw T scales, T scale, I D, {_WINDOW}"
    kernel, sizes = _kernel(_larger(s, out), name, inputs, "T out", body, f), _sizes(pool, out.shape[-1], out)
    return kernel(t, s, index, *numbers, width, *sizes, out)


def sgd(
    theta: Array, g: Array, v: Array | None, lr: float | Array, momentum: float, weight_decay: float,
    twin: tuple[Array, float] | None = None,
) -> None:  # fmt: skip
    """Do a step of SGD in place: `arraytp.optim.sgd_step` with coupled weight decay. Only for arrays with kernels.

    The learning rate is a number, or an array of shape (1,) that holds it when the kernel runs. `twin` is an array and
    λ: θ and the array are multiplied by 1 − λ and take the same step.
    """
    body = f"const T d = g + decay * theta; {'v = momentum * v + d' if v is not None else 'const T v = d'};"
    inputs, number = "T g, T lr, T momentum, T decay", theta.dtype.type
    moments = {} if v is None else {"v": v}
    _step("sgd", theta, inputs, moments, f"{body} const T step = lr * v;", twin)(
        g, _number(theta, lr), number(momentum), number(weight_decay)
    )


def _step(
    name: str, theta: Array, inputs: str, moments: dict[str, Array], body: str, twin: tuple[Array, float] | None
) -> Callable[..., None]:
    """Return a kernel that subtracts the step computed by `body` from θ and, if given, from its twin."""
    outputs, subtract = {"theta": theta, **moments}, "theta -= step;"
    kept: tuple[Any, ...] = ()
    if twin is not None:
        outputs["twin"], kept = twin[0], (theta.dtype.type(1 - twin[1]),)
        inputs, subtract = f"{inputs}, T kept", "theta = kept * theta - step; twin = kept * twin - step;"
    names = ", ".join(f"T {output}" for output in outputs)
    kernel = _kernel(theta, f"{name}_{'_'.join(outputs)}", inputs, names, body + subtract)
    return lambda *numbers: kernel(*numbers, *kept, *outputs.values())


def adam(
    theta: Array, g: Array, m: Array, u: Array, betas: tuple[float, float], scale: float | Array, rate: float | Array,
    epsilon: float, weight_decay: float, twin: tuple[Array, float] | None = None,
) -> None:  # fmt: skip
    """Do a step of Adam in place: `arraytp.optim.adam_step`. Only for arrays with kernels.

    After updating the moments, θ ← θ − rate · m / (scale · √u + ε); scale and rate are given like `lr` of `sgd`, and
    twin is as there.
    """
    inputs = "T g, T beta1, T rest1, T beta2, T rest2, T scale, T rate, T epsilon, T decay"
    settings = betas[0], 1 - betas[0], betas[1], 1 - betas[1], scale, rate, epsilon, weight_decay
    _step("adam", theta, inputs, {"m": m, "u": u}, """
        const T d = g + decay * theta;
        m = beta1 * m + rest1 * d;
        u = beta2 * u + rest2 * (d * d);
        const T step = rate * (m / (scale * sqrt(u) + epsilon));""", twin)(
        g, *(_number(theta, setting) for setting in settings)
    )  # fmt: skip


def adam_rates(number: Array, iterations: int, betas: tuple[float, float], lr: float, keras: bool, out: Array) -> None:
    """Write scale and rate of K steps: `arraytp.optim.adam_rates`, t = K · number + 1, …. Only for arrays with kernels.

    `number`, of shape (1,) and uint64, is read when the kernel runs; `out` is of shape (K, 2).
    """
    inputs = "raw uint64 number, int32 K, float64 beta1, float64 beta2, float64 lr, bool keras"
    kernel(out, "adam_rates", inputs, "T out", """
        const double t = double(number[0]) * K + i / 2 + 1;
        const double one = 1 - pow(beta1, t), two = sqrt(1 - pow(beta2, t));
        out = T(keras ? (i % 2 ? lr * two / one : 1) : (i % 2 ? lr / one : 1 / two));""")(
        number, iterations, *betas, lr, keras, out
    )  # fmt: skip


def _number(like: Array, value: float | Array) -> Any:
    return like.dtype.type(value) if isinstance(value, int | float) else value


def _larger(a: Array, b: Array) -> Array:
    return a if a.size > b.size else b


def _kernel(largest: Array, name: str, inputs: str, outputs: str, body: str, f: Activation | None = None) -> Any:
    """Return the kernel with this source and an activation's functions; the type I can index the largest array."""
    wide = largest.size >= MOST_COUNTED
    inputs = inputs.replace("I ", "int64 " if wide else "int32 ")
    body = f"typedef {'long long' if wide else 'int'} I;{body}"
    name, functions = f"{name}_wide" if wide else name, ""
    if f is not None:
        name, functions = f"{name}_{f.name.replace('-', '_')}", _PREAMBLE.format(*_FUNCTIONS[f.name])
    return kernel(largest, name, inputs, outputs, body, functions)


def kernel(array: Array, name: str, inputs: str, outputs: str, body: str, preamble: str = "") -> Any:
    """Return CuPy's element-wise kernel with this source, for an array that `has_kernels`."""
    return _made(array_module(array), f"arraytp_{name}", inputs, outputs, body, preamble)


@cache
def _made(xp: Any, name: str, inputs: str, outputs: str, body: str, preamble: str) -> Any:
    made = xp.ElementwiseKernel(inputs, outputs, body, name, preamble=preamble)

    def launch(*arguments: Any, **options: Any) -> Any:
        try:
            return made(*arguments, **options)
        except xp.cuda.compiler.CompileException as error:
            raise UserError(
                f"backend cupy: the kernel {name} does not compile ({first_line(error)}) with CuPy {xp.__version__}; "
                "install arraytp[cuda12] or arraytp[cuda13] into an environment of its own, or use --backend numpy"
            ) from error

    return launch


def _sizes(window: Window | None, channels: int, largest: Array) -> list[int]:
    """Return a window's sizes in the order of `_WINDOW`; without a window, those for element-wise work on an array."""
    if window is None:
        shape = largest.shape if largest.ndim == 4 else (1, 1, 1, channels)
        return [*shape[1:3], *shape[1:3], 1, 1, 0, 0, channels]
    w = window
    return [w.height, w.width, w.out_height, w.out_width, w.kernel, w.stride, w.top, w.left, channels]
