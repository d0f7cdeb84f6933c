"""Inverses, for rules that invert: solving, condition numbers, round trips, W nearly semi-orthogonal; W⁺ of any W."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, apart, checked, distance, host, worst
from arraytp.audit.drift import DRIFT, FAR, drifted, ways
from arraytp.audit.gradients import exact
from arraytp.audit.setting import Setting
from arraytp.fast import inverse as fast
from arraytp.model import plain
from arraytp.model.passes import At, Batch
from arraytp.ops import solve
from arraytp.ops.conv import as_matrix
from arraytp.rules import gait_prop
from arraytp.training.compare import angle_degrees

WAY = (0.0, 0.5, 1.0)
INVERSE = 1e-10
TINY = 1e-12
# LAPACK's estimate is rarely too small by more than a factor of 3.
ESTIMATE = 2.0
ORTHOGONAL = 1e-8


def round_trips(setting: Setting) -> Iterator[Check]:
    """Check solving with W and every block's inverse, for W as it is, drifted, and far off, where it has LU factors."""
    if not setting.rule.inverts:
        return
    for when, batch in (
        ("", setting.pass_over()),
        (", W drifted", setting.pass_over(drifted(setting))),
        (", W far off", setting.pass_over(drifted(setting, FAR))),
    ):
        for n, factors in _inverses(setting, batch).items():
            if isinstance(factors, solve.PseudoInverse):
                yield from _pseudo_inverse(setting, batch.at(n), factors, when)
            else:
                yield from _round_trip(setting, batch, batch.at(n), factors, when)


def _inverses(setting: Setting, batch: Batch) -> Mapping[int, solve.Factors | solve.PseudoInverse]:
    assert setting.rule.inverses is not None
    return setting.rule.inverses(setting.options, batch)


def _pseudo_inverse(setting: Setting, at: At, inverse: solve.PseudoInverse, when: str) -> Iterator[Check]:
    """Check a gradient through W⁺ against NumPy's pinv; the batch's shapes decide how the fast engine computes it."""
    w, u = host(as_matrix(at.weight)), setting.normal(at.s_next.shape, 52, at.n)
    number = float(np.linalg.cond(w)) ** 2
    through = setting.put(np.ascontiguousarray(np.linalg.pinv(w).T).reshape(at.weight.shape))
    plain_at = replace(at.batch, engine=setting.plain.engine).at(at.n)
    _, _, expected = plain_at.backward(u, through=through)
    for engine, each in (("fast", at), ("plain", plain_at)):
        _, _, ds = each.backward(u, through=inverse)
        yield checked(f"{at.block.label}: gradient through W⁺, {engine} engine{when}", "ds = (D unpool u) W⁺",
                      fast.backward_through_pseudo_inverse, apart(ds, expected), INVERSE * number)  # fmt: skip


def _round_trip(setting: Setting, batch: Batch, at: At, factors: solve.Factors, when: str) -> Iterator[Check]:
    matrix, label = as_matrix(at.weight), at.block.label
    number = _condition(host(matrix))
    rows = setting.normal((3, len(factors.matrix)), 50, at.n)
    error = apart(solve.right_solve(factors, rows) @ matrix, rows)
    yield checked(f"{label}: solving x W = y{when}", "x W = y", solve.right_solve, error, INVERSE * number)
    z, y, _ = plain.block_forward(at.block, at.weight, at.bias, at.s)
    # The inverse of an activation cannot recover the digits that saturation has taken.
    room = INVERSE * number / float(reference.slope(host(z), at.block.activation.name).min() + TINY)
    back = plain.block_inverse(at.block, solve.factor(matrix), at.bias, y, at.s)
    for function, x in ((plain.block_inverse, back), (fast.inverse, at.inverse(factors, y))):
        yield checked(f"{label}: round trip{when}", "G(F(x)) = x", function, apart(x.reshape(at.s.shape), at.s),
                      room)  # fmt: skip
    u = setting.normal(at.s_next.shape, 52, at.n)
    plain_at = replace(batch, engine=setting.plain.engine).at(at.n)
    _, _, expected = plain_at.backward(u, through=solve.factor(matrix))
    _, _, ds = at.backward(u, through=factors)
    yield checked(f"{label}: gradient through W⁻¹, fast engine against plain{when}", "ds = (D u) W⁻¹",
                  fast.backward_through_inverse, apart(ds, expected), INVERSE * number)  # fmt: skip


def conditions(setting: Setting) -> Iterator[Check]:
    """Check the estimate of every condition number, which must not be too large, and report the number."""
    if not setting.rule.inverts:
        return
    for n, inverse in _inverses(setting, setting.pass_over()).items():
        block, matrix = setting.network.blocks[n], as_matrix(setting.network.weights[n])
        if isinstance(inverse, solve.PseudoInverse):
            yield checked(f"{block.label}: condition number of W", "‖W‖·‖W⁺‖", solve.factor_gram,
                          np.linalg.cond(host(matrix)))  # fmt: skip
            continue
        estimate, w = float(solve.condition(solve.factor(matrix))), host(matrix)
        true = _condition(w)
        yield checked(f"{block.label}: condition number of W", "‖W‖·‖W⁻¹‖", solve.condition, true)
        # The estimate is never too large, except for the rounding of an inverse.
        error = abs(true / estimate - 1) if estimate <= true * (1 + TINY * true) * (1 + ORTHOGONAL) else math.inf
        yield checked(f"{block.label}: true condition over estimate, − 1", "‖W‖·‖W⁻¹‖", solve.condition, error,
                      ESTIMATE)  # fmt: skip


def _condition(w: Floats) -> float:
    """Return ‖W‖·‖W⁻¹‖ in the largest-row-sum norm."""
    return float(np.abs(w).sum(axis=1).max() * np.abs(np.linalg.inv(w)).sum(axis=1).max())


def to_orthogonal(setting: Setting) -> Iterator[Check]:
    """Check the angle to BP now, and on the way of a drifted W back to its polar factor, where W⁻¹ is Wᵀ."""
    if not setting.rule.inverts:
        return
    batch, function = setting.pass_over(), setting.rule.updates or setting.rule.targets
    for block, (weight, _), (gradient, _) in zip(
        setting.network.blocks, setting.propose(batch), exact(batch), strict=True
    ):
        yield checked(f"{block.label}: angle to BP now, degrees", "W⁻¹ in place of Wᵀ", function,
                      angle_degrees(weight, gradient))  # fmt: skip
    # The difference form is BP with W⁻¹, or W⁺, in place of Wᵀ; for other rules no value is known there.
    is_bp, options = setting.rule.updates is gait_prop.updates, setting.rule.compared(setting.options)
    if is_bp:
        options = replace(setting.options, form="difference", rescale_updates=True)
    for share, network in zip(WAY, ways(setting, drifted(setting), WAY), strict=True):
        batch = setting.pass_over(network)
        pairs = [(a, b) for (a, _), (b, _) in zip(setting.propose(batch, options), exact(batch), strict=True)]
        error = worst(*(distance(a, b) for a, b in pairs))
        angle = worst(*(angle_degrees(a, b) for a, b in pairs if host(b).any()))
        yield checked(f"W drifted by {DRIFT:.0%}, {share:.0%} of the way to its polar factor: {angle:.3g}° to BP",
                      "W⁻¹ = Wᵀ", function, error, ORTHOGONAL if share == 1 and is_bp else None)  # fmt: skip


CHECKS = (round_trips, conditions, to_orthogonal)
