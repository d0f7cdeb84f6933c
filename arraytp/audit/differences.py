"""Central finite differences along random directions, and adjoint identities: two evaluations, whatever the size.

⟨v, ∇L⟩ is compared with the difference quotient of L along a random v. D(h) = (L(θ + h v) − L(θ − h v)) / 2h has an
error of order h², (16 D(h/4) − D(h)) / 15 one of order h⁴. The step is made smaller until two such estimates agree.
Where a unit crosses the kink of its activation between the points, or another element becomes the maximum of a pool's
window, they do not agree until the steps are small enough that none does. Then rounding limits the error: the estimate
taken is the one that changed least, but none counts as more certain than the rounding of L divided by h allows, since
two that are mostly rounding may agree by chance.

A typical ⟨v, ∇L⟩ is ‖v‖‖∇L‖/√n. The error is relative to that or to ⟨v, ∇L⟩ itself, whichever is larger: a direction
that happens to be orthogonal to the gradient proves as much as any other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from arraytp.audit.check import host, inner, worst
from arraytp.backend import Array, array_module

FIRST_STEP, SMALLEST_STEP, SHRINK = 3e-4, 1e-9, 4
# Two estimates that differ by less than this are not refined further.
GOAL = 3e-8
DIRECTIONS = 2
EPSILON = float(np.finfo(np.float64).eps)


def derivative(function: Callable[[float], float], scale: float) -> float:
    """Return f'(0) of a function of one number; `scale` is the size that errors are relative to."""
    best, least_doubt, h = math.nan, math.inf, FIRST_STEP
    (quotient, _), estimate = _quotient(function, h), math.nan
    while h > SMALLEST_STEP and not least_doubt <= GOAL * scale:
        h /= SHRINK
        finer, rounding = _quotient(function, h)
        refined = (SHRINK**2 * finer - quotient) / (SHRINK**2 - 1)
        doubt = worst(abs(refined - estimate), rounding)
        if doubt < least_doubt:
            best, least_doubt = refined, doubt
        quotient, estimate = finer, refined
    return best


def _quotient(function: Callable[[float], float], h: float) -> tuple[float, float]:
    """Return the difference quotient and its error from one rounding of the function's values."""
    above, below = function(h), function(-h)
    return (above - below) / (2 * h), EPSILON * worst(abs(above), abs(below)) / h


def gradient_error(
    function: Callable[[Array], float],
    at: Array,
    gradient: Array,
    generator: np.random.Generator,
    directions: int = DIRECTIONS,
) -> float:
    """Return the largest relative error of a gradient along random directions, each as long as `at`.

    `function` takes an array like `at`; the gradient has the shape of `at`, and both are float64.
    """
    if at.shape != gradient.shape:
        return math.inf
    xp, largest = array_module(at), 0.0
    length, slope = _norm(at), _norm(gradient)
    for _ in range(directions):
        drawn = generator.standard_normal(at.shape)
        v = xp.asarray(drawn * ((length or math.sqrt(at.size)) / np.linalg.norm(drawn)))
        exact = inner(v, gradient)
        scale = worst(abs(exact), _norm(v) * slope / math.sqrt(at.size))
        quotient = derivative(lambda h, v=v: function(at + h * v), scale)  # type: ignore[misc]
        largest = worst(largest, relative(quotient - exact, scale))
    return largest


def gradient_errors(
    function: Callable[..., float],
    at: Sequence[Array],
    gradients: Sequence[Array],
    generator: np.random.Generator,
    directions: int = DIRECTIONS,
) -> list[float]:
    """Return `gradient_error` of a function of several arrays, for each array with the others fixed."""

    def moved(i: int, array: Array) -> float:
        return function(*at[:i], array, *at[i + 1 :])

    points = enumerate(zip(at, gradients, strict=True))
    return [gradient_error(partial(moved, i), x, g, generator, directions) for i, (x, g) in points]


def adjoint_error(forward: Callable[[Array], Array], adjoint: Callable[[Array], Array], x: Array, u: Array) -> float:
    """Return how far ⟨A x, u⟩ is from ⟨x, Aᵀ u⟩, relative to the size that such products have."""
    image, back = forward(x), adjoint(u)
    if image.shape != u.shape or back.shape != x.shape:
        return math.inf
    left, right = inner(image, u), inner(x, back)
    return relative(left - right, worst(_norm(image) * _norm(u) / math.sqrt(u.size), abs(left)))


def relative(difference: float, scale: float) -> float:
    """Return the size of a difference relative to a scale, or the size itself if the scale is 0."""
    return abs(difference) if scale == 0 else abs(difference) / scale


def _norm(array: Array) -> float:
    return float(np.linalg.norm(host(array)))
