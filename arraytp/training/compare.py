"""Angle and relative distance between two updates (docs/math/notation.md); which arrays of a run are finite."""

import math
from typing import NamedTuple, Self

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.model.blocks import Network
from arraytp.optim import OptimizerState


class Comparison(NamedTuple):
    """A rule's weight update of one block against BP's: angle in degrees and relative distance ‖a − b‖/‖b‖.

    If the config asks for it, also the angle to the update by Gauss-Newton targets.
    """

    block: int
    angle_deg: float
    distance: float
    gnt_angle_deg: float | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of a row of angles.csv."""
        return tuple(number for number in self if number is not None)


class FeedbackComparison(NamedTuple):
    """A feedback weight against the forward weight that it pairs with; NaN where it pairs with none.

    `ratio` is ‖ω‖ / ‖θ‖; `loss` is NaN where feedback was not trained. For rules that can compute the optimum of the
    batch's feedback loss, `optimum_distance` is the relative distance to it; NaN where it has no closed form.
    """

    block: int
    loss: float
    angle_deg: float
    distance: float
    ratio: float
    optimum_distance: float | None = None

    @classmethod
    def of(cls, block: int, loss: Array | None, omega: Array, theta: Array | None) -> Self:
        """Compare a feedback weight ω, whose last training loss was `loss`, with the θ that it pairs with, if any."""
        known = math.nan if loss is None else float(loss)
        if theta is None:
            return cls(block, known, math.nan, math.nan, math.nan)
        return cls(block, known, angle_degrees(omega, theta), relative_distance(omega, theta), norm_ratio(omega, theta))

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of a row of feedback.csv."""
        return tuple(number for number in self if number is not None)


def angle_degrees(a: Array, b: Array) -> float:
    """Return the angle between two flattened arrays in degrees, computed in float64.

    The angle is 0 for equal arrays, and NaN where it is undefined: one of the arrays is zero or not finite.
    """
    xp = array_module(a, b)
    u, v = a.reshape(-1).astype(xp.float64), b.reshape(-1).astype(xp.float64)
    norms = _norm(u), _norm(v)
    if not all(norm > 0 and np.isfinite(norm) for norm in norms):
        return float("nan")
    u /= norms[0]
    v /= norms[1]
    # Kahan's formula: near 0° and 180°, the arccos of the cosine loses half the digits; its last bit is 1e-6° there.
    return math.degrees(2 * math.atan2(_norm(u - v), _norm(u + v)))


def relative_distance(a: Array, b: Array) -> float:
    """Return ‖a − b‖ / ‖b‖ in float64, b being the reference; NaN if b is zero or anything is not finite."""
    xp = array_module(a, b)
    u, v = a.reshape(-1).astype(xp.float64), b.reshape(-1).astype(xp.float64)
    distance, norm = _norm(u - v), _norm(v)
    if not norm > 0 or not np.isfinite(distance) or not np.isfinite(norm):
        return float("nan")
    return distance / norm


def norm_ratio(a: Array, b: Array) -> float:
    """Return ‖a‖ / ‖b‖ in float64; NaN if b is zero or anything is not finite."""
    xp = array_module(a, b)
    above, below = (_norm(array.reshape(-1).astype(xp.float64)) for array in (a, b))
    return above / below if below > 0 and np.isfinite(above) and np.isfinite(below) else float("nan")


def _norm(u: Array) -> float:
    """Return ‖u‖ by a plain sum, because the result of the BLAS library depends on its number of threads."""
    return math.sqrt(float(array_module(u).square(u).sum()))


def is_finite(array: Array) -> bool:
    """Tell whether every number of an array is finite."""
    return bool(array_module(array).isfinite(array).all())


def finite_blocks(network: Network) -> list[bool]:
    """Tell for each block whether its weight and bias are finite."""
    pairs = zip(network.weights, network.biases, strict=True)
    return [is_finite(weight) and is_finite(bias) for weight, bias in pairs]


def finite_moments(state: OptimizerState) -> list[bool]:
    """Tell for each parameter whether the optimiser's moments are finite."""
    return [all(map(is_finite, moments)) for moments in state.moments]
