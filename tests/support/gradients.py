"""Central finite differences along random directions, in float64.

⟨v, ∇L⟩ is compared with the difference quotient of L along a random v of norm 1. The central quotient
D(h) = (L(θ + h v) − L(θ − h v)) / 2h is off by order h²; (4 D(h/2) − D(h)) / 3 by order h⁴: steps can be large enough
for rounding not to matter. A typical ⟨v, ∇L⟩ is ‖∇L‖/√n, and the error is measured relative to that or to ⟨v, ∇L⟩
itself, whichever is larger: a direction that happens to be orthogonal to the gradient proves as much as any other.
"""

import numpy as np

TOLERANCE = 1e-6
FIRST_STEP, SMALLEST_STEP = 1e-3, 1e-7


def check(loss, parameter, gradient, generator, directions=2, first_step=FIRST_STEP):
    """Assert that `gradient` is that of `loss`.

    Parameters
    ----------
    loss : callable
        array like `parameter` → (number, region). Regions are compared as bytes: two points of one region have the
        same kinks on the same side (signs before ReLU, winners of max-pools), so L is smooth between them. The step is
        halved until both ends are in the region of the middle.
    parameter, gradient : arrays of float64 of one shape
    """
    assert gradient.shape == parameter.shape
    _, region = loss(parameter)
    for _ in range(directions):
        v = generator.standard_normal(parameter.shape)
        v /= np.linalg.norm(v)
        found = _difference(loss, parameter, v, region, first_step)
        exact = float(np.vdot(v, gradient))
        scale = max(abs(exact), float(np.linalg.norm(gradient)) / np.sqrt(gradient.size))
        assert abs(found - exact) <= TOLERANCE * scale + 1e-11, f"difference {found:.12g}, gradient {exact:.12g}"


def _difference(loss, parameter, v, region, h):
    while h >= SMALLEST_STEP:
        points = [loss(parameter + step * v) for step in (h, -h, h / 2, -h / 2)]
        if all(found == region for _, found in points):
            above, below, half_above, half_below = (value for value, _ in points)
            return (8 * (half_above - half_below) - (above - below)) / (6 * h)
        h /= 2
    raise AssertionError("the point is too close to a kink: draw another one")
