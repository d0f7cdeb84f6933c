"""Angle and relative distance between two updates (docs/math/notation.md)."""

import math

import numpy as np

from arraytp.backend import Array, array_module


def angle_degrees(a: Array, b: Array) -> float:
    """Return the angle between two flattened arrays in degrees, computed in float64, its cosine clipped to [−1, 1].

    NaN where it is undefined: one of the arrays is zero or not finite.
    """
    xp = array_module(a, b)
    u, v = a.reshape(-1).astype(xp.float64), b.reshape(-1).astype(xp.float64)
    norms = _norm(u) * _norm(v)
    if not norms > 0 or not np.isfinite(norms):
        return float("nan")
    return float(np.degrees(np.arccos(np.clip(float(xp.multiply(u, v).sum()) / norms, -1.0, 1.0))))


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
    """Return ‖u‖; a plain sum, since that of the BLAS library depends on the number of its threads."""
    return math.sqrt(float(array_module(u).square(u).sum()))
