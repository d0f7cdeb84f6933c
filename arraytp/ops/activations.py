"""Element-wise activations s = f(z): f, f' computed from s, f⁻¹, exact differences, range (docs/math/notation.md).

Every f here is non-decreasing, and strictly increasing wherever f' ≠ 0. So max-pooling commutes with f once
`Activation.tie` has made all z equal that f maps to the same value, and f' can be computed from s, so z is not kept.
All have f(0) = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from arraytp.backend import Array, array_module

LEAKY_SLOPE = 0.1


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Parameters
    ----------
    name : str
        The name in configs.
    forward : (z, out) → s
        f(z); `out`, of z's shape, is where to write and may be z itself, or None.
    derivative : s → D, or None
        D = f'(z) computed from s = f(z); None stands for 1 everywhere.
    difference : (s, δ) → array
        f(s + δ) − f(s), accurate relative to its own size where f has no curvature between s and s + δ.
    inverse : s → z, or None
        z with f(z) = s, not finite outside `range`; None where f has no inverse.
    inverse_difference : (s, δ) → array, or None
        f⁻¹(s + δ) − f⁻¹(s), as exact as `difference`.
    range : (float, float)
        Bounds of f's values, both exclusive.
    curved : bool
        Whether f has curvature anywhere.
    flat_below_zero : bool
        Whether f is 0 for all z ≤ 0.
    """

    name: str
    forward: Callable[[Array, Array | None], Array]
    derivative: Callable[[Array], Array] | None
    difference: Callable[[Array, Array], Array]
    inverse: Callable[[Array], Array] | None = None
    inverse_difference: Callable[[Array, Array], Array] | None = None
    range: tuple[float, float] = (-math.inf, math.inf)
    curved: bool = False
    flat_below_zero: bool = False

    def __call__(self, z: Array, out: Array | None = None) -> Array:
        """Return s = f(z), of z's shape and dtype; z itself for the linear activation when `out` is not given."""
        return self.forward(z, out)

    def backward(self, ds: Array, s: Array, out: Array | None = None) -> Array:
        """Return dz = D ⊙ ds.

        Parameters
        ----------
        ds, s : arrays of one shape
            Gradient of the activation, and the activation.
        out : array of the same shape, optional
            Where to write; may be ds itself.

        Returns
        -------
        array of the same shape
            `ds` itself for the linear activation when `out` is not given.
        """
        if self.derivative is None:
            return _copied(ds, out)
        return array_module(ds).multiply(ds, self.derivative(s), out=out)

    def tie(self, z: Array, bias: Array) -> None:
        """Make all z with the same f(z + bias) equal, in place: those that ReLU maps to 0.

        Pooling z then finds the first maximum of f(z + bias). The other activations increase strictly.

        Parameters
        ----------
        z : array of shape (B, H, W, O)
        bias : array of shape (O,)
        """
        if self.flat_below_zero:
            array_module(z).maximum(z, -bias, out=z)


def _copied(array: Array, out: Array | None) -> Array:
    if out is None or out is array:
        return array
    out[...] = array
    return out


def _linear_difference(s: Array, delta: Array) -> Array:
    return delta


def _leaky_relu(z: Array, out: Array | None) -> Array:
    # max(z, 0.1 z) is z for z ≥ 0 and 0.1 z below.
    return array_module(z).maximum(z, z * z.dtype.type(LEAKY_SLOPE), out=out)


def _leaky_relu_derivative(s: Array) -> Array:
    """Return 1 for s ≥ 0, else 0.1."""
    # A sum, since NumPy casts booleans slowly in other operations; 0.9 + 0.1 rounds to 1 in both dtypes.
    slope = s.dtype.type(LEAKY_SLOPE)
    return (s >= 0) * (s.dtype.type(1) - slope) + slope


def _leaky_relu_inverse(s: Array) -> Array:
    # min(s, 10 s) is s for s ≥ 0 and s / 0.1 below.
    return array_module(s).minimum(s, s * s.dtype.type(1 / LEAKY_SLOPE))


def _leaky_relu_inverse_difference(s: Array, delta: Array) -> Array:
    below = delta * s.dtype.type(1 / LEAKY_SLOPE)
    return _piecewise_difference(lambda t, _: _leaky_relu_inverse(t), s, delta, below)


def _leaky_relu_difference(s: Array, delta: Array) -> Array:
    return _piecewise_difference(_leaky_relu, s, delta, delta * s.dtype.type(LEAKY_SLOPE))


def _relu(z: Array, out: Array | None) -> Array:
    return array_module(z).maximum(z, z.dtype.type(0), out=out)


def _relu_derivative(s: Array) -> Array:
    """Return 1 for s > 0, else 0."""
    return (s > 0).astype(s.dtype)


def _relu_difference(s: Array, delta: Array) -> Array:
    return _piecewise_difference(_relu, s, delta, array_module(s).zeros_like(delta))


def _tanh(z: Array, out: Array | None) -> Array:
    return array_module(z).tanh(z, out=out)


def _tanh_derivative(s: Array) -> Array:
    """Return 1 − s²."""
    return s.dtype.type(1) - s * s


def _tanh_inverse(s: Array) -> Array:
    xp = array_module(s)
    return s.dtype.type(0.5) * (xp.log1p(s) - xp.log1p(-s))


def _tanh_inverse_difference(s: Array, delta: Array) -> Array:
    """Return artanh a − artanh b = artanh((a − b) / (1 − a b))."""
    return _tanh_inverse(delta / (s.dtype.type(1) - s * (s + delta)))


def _tanh_difference(s: Array, delta: Array) -> Array:
    """Return tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b)."""
    xp = array_module(s)
    return xp.tanh(delta) * (s.dtype.type(1) - xp.tanh(s + delta) * xp.tanh(s))


def _elu(z: Array, out: Array | None) -> Array:
    """Return max(z, 0) + (exp(min(z, 0)) − 1), the latter as 2u / (1 − u) with u = tanh(min(z, 0) / 2).

    The identity is exact, loses no digits near 0 (measured: 1.6 ulp, as u ≤ 0 leaves nothing to cancel), and NumPy's
    vectorised tanh makes it 2.4 times as fast in float32 as expm1 (docs/performance/design.md).
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


def _elu_derivative(s: Array) -> Array:
    """Return 1 above 0, else exp(z) = s + 1."""
    return array_module(s).minimum(s, s.dtype.type(0)) + s.dtype.type(1)


def _elu_inverse(s: Array) -> Array:
    xp, zero = array_module(s), s.dtype.type(0)
    return xp.maximum(s, zero) + xp.log1p(xp.minimum(s, zero))


def _elu_inverse_difference(s: Array, delta: Array) -> Array:
    """Return, below 0, log(1 + s + δ) − log(1 + s) = log(1 + δ / (1 + s))."""
    xp, one = array_module(s), s.dtype.type(1)
    quotient = delta / (xp.minimum(s, s.dtype.type(0)) + one)
    # The quotient is −1 or below only where s is above 0, and there `below` is not used.
    below = xp.log1p(xp.where(quotient > -one, quotient, s.dtype.type(0)))
    return _piecewise_difference(lambda t, _: _elu_inverse(t), s, delta, below)


def _elu_difference(s: Array, delta: Array) -> Array:
    """Return, below 0, exp(s + δ) − exp(s), with the larger term factored out so that nothing overflows."""
    xp = array_module(s)
    larger = xp.exp(xp.minimum(xp.maximum(s, s + delta), s.dtype.type(0)))
    return _piecewise_difference(_elu, s, delta, -larger * xp.expm1(-xp.absolute(delta)) * xp.sign(delta))


def _piecewise_difference(
    forward: Callable[[Array, Array | None], Array], s: Array, delta: Array, below: Array
) -> Array:
    """Return f(s + δ) − f(s) for an f with f(z) = z above 0.

    It is δ if both arguments are at least 0, and `below` if both are below 0; only otherwise are the two values
    subtracted. Subtracting them everywhere would leave rounding errors of the size of s, which drown a small δ in
    float32.
    """
    xp, zero = array_module(s), s.dtype.type(0)
    shifted = s + delta
    both_above = (s >= zero) & (shifted >= zero)
    both_below = (s < zero) & (shifted < zero)
    across = forward(shifted, None) - forward(s, None)
    return xp.where(both_above, delta, xp.where(both_below, below, across))


LINEAR = Activation("linear", _copied, None, _linear_difference, lambda s: s, _linear_difference)
LEAKY_RELU = Activation(
    "leaky-relu",
    _leaky_relu,
    _leaky_relu_derivative,
    _leaky_relu_difference,
    _leaky_relu_inverse,
    _leaky_relu_inverse_difference,
)
RELU = Activation("relu", _relu, _relu_derivative, _relu_difference, flat_below_zero=True)
TANH = Activation(
    "tanh",
    _tanh,
    _tanh_derivative,
    _tanh_difference,
    _tanh_inverse,
    _tanh_inverse_difference,
    (-1.0, 1.0),
    curved=True,
)
ELU = Activation(
    "elu",
    _elu,
    _elu_derivative,
    _elu_difference,
    _elu_inverse,
    _elu_inverse_difference,
    (-1.0, math.inf),
    curved=True,
)

ACTIVATIONS = {activation.name: activation for activation in (LINEAR, LEAKY_RELU, RELU, TANH, ELU)}
"""By name: leaky ReLU has slope 0.1 below 0, ELU has alpha 1."""
