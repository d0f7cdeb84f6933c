"""Angle and relative distance between two updates (methods.md, section 1)."""

import numpy as np

from arraytp.backend import Array, array_module


def angle_degrees(a: Array, b: Array) -> float:
    """Return the angle between two flattened arrays in degrees, computed in float64, its cosine clipped to [−1, 1].

    NaN where it is undefined: one of the arrays is zero or not finite.
    """
    xp = array_module(a, b)
    u, v = a.reshape(-1).astype(xp.float64), b.reshape(-1).astype(xp.float64)
    norms = float(xp.linalg.norm(u) * xp.linalg.norm(v))
    if not norms > 0 or not np.isfinite(norms):
        return float("nan")
    return float(np.degrees(np.arccos(np.clip(float(u @ v) / norms, -1.0, 1.0))))


def relative_distance(a: Array, b: Array) -> float:
    """Return ‖a − b‖ / ‖b‖ in float64, b being the reference; NaN if b is zero or anything is not finite."""
    xp = array_module(a, b)
    u, v = a.reshape(-1).astype(xp.float64), b.reshape(-1).astype(xp.float64)
    distance, norm = float(xp.linalg.norm(u - v)), float(xp.linalg.norm(v))
    if not norm > 0 or not np.isfinite(distance) or not np.isfinite(norm):
        return float("nan")
    return distance / norm
