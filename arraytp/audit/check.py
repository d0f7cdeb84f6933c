"""One line of an audit: what was checked, by which equation, how far off it is and how far off it may be."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arraytp.backend import Array, array_module

Floats = NDArray[np.float64]

# Rounding errors in float64 of sums as long as those here, with a margin; finite differences lose more than half of
# the digits.
ROUNDING = 1e-11
DIFFERENCES = 1e-6
# Finite differences of functions with so many kinks that steps have to be small.
KINKED = 1e-5
# The rounding error of a difference of numbers of size 1.
SUBTRACTED = 1e-14


@dataclass(frozen=True)
class Check:
    """A measured error against its tolerance.

    `what` says what was checked, beginning with the block's label if it concerns one block; `source` is the equation,
    theorem or definition, and `function` the dotted name of the function or class that was exercised. The `error` is
    relative unless `what` says otherwise. Without a tolerance it is informational and neither passes nor fails.
    """

    what: str
    source: str
    function: str
    error: float
    tolerance: float | None = None

    @property
    def verdict(self) -> Literal["pass", "fail", "info"]:
        """Whether the error is within the tolerance; NaN is not."""
        if self.tolerance is None:
            return "info"
        return "pass" if self.error <= self.tolerance else "fail"


def checked(what: str, source: str, function: Any, error: float, tolerance: float | None = None) -> Check:
    """Return a line about a function or class, under the name that it can be imported by."""
    return Check(what, source, name_of(function), float(error), tolerance)


def name_of(function: Any) -> str:
    """Return a function's or class's dotted name; of anything else, such as a partial function, that of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def host(array: Array) -> Floats:
    """Return an array of either backend as a host array."""
    xp = array_module(array)
    values: Floats = np.asarray(array if xp is np else xp.asnumpy(array))
    return values


def apart(actual: Array, expected: Array) -> float:
    """Return the largest difference of two arrays divided by the largest expected magnitude.

    Not divided if all of `expected` is 0. Infinite for different shapes; infinite or NaN if an array is not finite.
    """
    a, b = host(actual), host(expected)
    if a.shape != b.shape:
        return math.inf
    if not a.size:
        return 0.0
    with np.errstate(all="ignore"):
        difference, scale = float(np.max(np.abs(a - b))), float(np.max(np.abs(b)))
    return difference if scale == 0 else difference / scale


def distance(actual: Array, expected: Array) -> float:
    """Return ‖a − b‖/‖b‖, or `apart` where all of `expected` is 0, as gradients are with one class."""
    a, b = host(actual).ravel(), host(expected).ravel()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if b.any() else apart(actual, expected)


def angle(a: Array, b: Array) -> float:
    """Return the angle between two arrays in degrees, from its sine and cosine; NaN if an array is 0."""
    u, v = host(a).ravel(), host(b).ravel()
    with np.errstate(all="ignore"):
        u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    cosine = float(u @ v)
    return math.degrees(math.atan2(float(np.linalg.norm(u - cosine * v)), cosine))


def worst(*errors: float) -> float:
    """Return the largest error, NaN if any is NaN, which Python's `max` ignores unless it comes first; 0 for none."""
    return float(np.max(errors)) if errors else 0.0


def same_bits(a: Array, b: Array) -> bool:
    """Tell whether two arrays are the same, bit for bit."""
    u, v = host(a), host(b)
    return u.shape == v.shape and u.dtype == v.dtype and np.ascontiguousarray(u).tobytes() == v.tobytes()


def inner(a: Array, b: Array) -> float:
    """Return the sum of the products of all elements."""
    return float(np.vdot(host(a), host(b)))
