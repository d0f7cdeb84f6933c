"""Element-wise activations s = f(z) and their derivatives D = f'(z) (docs/math/notation.md).

Every f here is non-decreasing, and strictly increasing wherever f' ≠ 0. Two things rest on it: max-pooling
commutes with f, once `level` has been at z, and f' can be read off s instead of z, so that z need not be kept.
"""

import math

from arraytp.backend import Array, array_module

LEAKY_SLOPE = 0.1


def activation_forward(z: Array, name: str, out: Array | None = None) -> Array:
    """Return s = f(z).

    Parameters
    ----------
    z : array of any shape
    name : {"linear", "leaky-relu", "elu", "relu", "tanh"}
        Leaky ReLU has slope 0.1 below 0, ELU has alpha 1.
    out : array of z's shape, optional
        Where to write; may be z itself.

    Returns
    -------
    array of z's shape and dtype
    """
    xp = array_module(z)
    if name == "linear":
        if out is None or out is z:
            return z
        out[...] = z
        return out
    if name == "leaky-relu":
        # max(z, 0.1 z) is z for z ≥ 0 and 0.1 z below.
        return xp.maximum(z, z * z.dtype.type(LEAKY_SLOPE), out=out)
    if name == "relu":
        return xp.maximum(z, z.dtype.type(0), out=out)
    if name == "tanh":
        return xp.tanh(z, out=out)
    if name == "elu":
        return _elu(z, out)
    raise ValueError(f"unknown activation {name!r}")


def level(z: Array, bias: Array, name: str) -> None:
    """Make all those z equal, in place, whose f(z + bias) is the same: ReLU's zeros.

    Pooling them finds the first maximum of f(z + bias) then. The other activations increase strictly.

    Parameters
    ----------
    z : array of shape (B, H, W, O)
    bias : array of shape (O,)
    name : str
        As in `activation_forward`.
    """
    if name == "relu":
        array_module(z).maximum(z, -bias, out=z)


def _elu(z: Array, out: Array | None) -> Array:
    """Return max(z, 0) + (exp(min(z, 0)) − 1), the latter as 2u / (1 − u) with u = tanh(min(z, 0) / 2).

    The identity is exact, loses no digits near 0 (measured: 1.6 ulp, as u ≤ 0 leaves nothing to cancel), and NumPy's
    vectorised tanh makes it 2.4 times as fast in float32 as expm1 (docs/performance.md).
    """
    xp = array_module(z)
    u = xp.minimum(z, z.dtype.type(0))
    u *= z.dtype.type(0.5)
    xp.tanh(u, out=u)
    rest = z.dtype.type(1) - u
    u += u
    u /= rest
    out = xp.maximum(z, z.dtype.type(0), out=out)
    out += u
    return out


def activation_range(name: str) -> tuple[float, float]:
    """Return the numbers between which f's values lie, neither of them included: where f⁻¹ is defined.

    Parameters
    ----------
    name : {"linear", "leaky-relu", "elu", "tanh"}
    """
    return {"elu": (-1.0, math.inf), "tanh": (-1.0, 1.0)}.get(name, (-math.inf, math.inf))


def activation_inverse(s: Array, name: str) -> Array:
    """Return z with f(z) = s; not finite where s is outside f's range.

    Parameters
    ----------
    s : array of any shape
    name : {"linear", "leaky-relu", "elu", "tanh"}
        ReLU has no inverse. f's range is `activation_range`.

    Returns
    -------
    array of s's shape and dtype
        `s` itself for the linear activation.
    """
    xp = array_module(s)
    if name == "linear":
        return s
    if name == "leaky-relu":
        # min(s, 10 s) is s for s ≥ 0 and s / 0.1 below.
        return xp.minimum(s, s * s.dtype.type(1 / LEAKY_SLOPE))
    if name == "tanh":
        return s.dtype.type(0.5) * (xp.log1p(s) - xp.log1p(-s))
    if name == "elu":
        return xp.maximum(s, s.dtype.type(0)) + xp.log1p(xp.minimum(s, s.dtype.type(0)))
    raise ValueError(f"activation {name!r} has no inverse")


def activation_derivative(s: Array, name: str) -> Array | None:
    """Return D = f'(z), computed from s = f(z); None stands for 1 everywhere (linear).

    Parameters
    ----------
    s : array of any shape
        The activation, not the pre-activation.
    name : str
        As in `activation_forward`.

    Returns
    -------
    array of s's shape and dtype, or None
        Leaky ReLU at 0: 1; ReLU at 0: 0; ELU: 1 above 0, else exp(z) = s + 1; tanh: 1 − s².
    """
    xp = array_module(s)
    one = s.dtype.type(1)
    if name == "linear":
        return None
    if name == "leaky-relu":
        # A sum, since NumPy casts truth values slowly in other operations; 0.9 + 0.1 rounds to 1 in both dtypes.
        slope = s.dtype.type(LEAKY_SLOPE)
        return (s >= 0) * (one - slope) + slope
    if name == "relu":
        return (s > 0).astype(s.dtype)
    if name == "tanh":
        return one - s * s
    if name == "elu":
        return xp.minimum(s, s.dtype.type(0)) + one
    raise ValueError(f"unknown activation {name!r}")


def activation_backward(ds: Array, s: Array, name: str, out: Array | None = None) -> Array:
    """Return dz = D ⊙ ds.

    Parameters
    ----------
    ds, s : arrays of one shape
        Gradient of the activation, and the activation.
    name : str
        As in `activation_forward`.
    out : array of the same shape, optional
        Where to write; may be ds itself.

    Returns
    -------
    array of the same shape
        `ds` itself for the linear activation when `out` is not given.
    """
    derivative = activation_derivative(s, name)
    if derivative is None:
        if out is None or out is ds:
            return ds
        out[...] = ds
        return out
    return array_module(ds).multiply(ds, derivative, out=out)


def activation_difference(s: Array, delta: Array, name: str) -> Array:
    """Return f(s + δ) − f(s), to rounding of its own size where f has no curvature between the two.

    Subtracting the two values would leave rounding errors of the size of s, which drown a small δ in float32.

    Parameters
    ----------
    s, delta : arrays of one shape
    name : str
        As in `activation_forward`.

    Returns
    -------
    array of the same shape and dtype
        `delta` itself for the linear activation.
    """
    xp = array_module(s)
    zero = s.dtype.type(0)
    moved = s + delta
    if name == "linear":
        return delta
    if name == "tanh":
        # tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b).
        return xp.tanh(delta) * (s.dtype.type(1) - xp.tanh(moved) * xp.tanh(s))
    both_above = (s >= zero) & (moved >= zero)
    both_below = (s < zero) & (moved < zero)
    across = activation_forward(moved, name) - activation_forward(s, name)
    if name == "leaky-relu":
        below = delta * s.dtype.type(LEAKY_SLOPE)
    elif name == "relu":
        below = xp.zeros_like(delta)
    elif name == "elu":
        # exp(s + δ) − exp(s), the larger of the two factored out so that nothing overflows, used or not.
        larger = xp.exp(xp.minimum(xp.maximum(s, moved), zero))
        below = -larger * xp.expm1(-xp.absolute(delta)) * xp.sign(delta)
    else:
        raise ValueError(f"unknown activation {name!r}")
    return xp.where(both_above, delta, xp.where(both_below, below, across))
