"""GAIT-prop: inverses, targets by both forms, and how the updates go to BP's as W goes to an orthogonal matrix."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import ROUNDING, Check, Floats, apart, checked, host, worst
from arraytp.audit.setting import Setting, hosted
from arraytp.backend import Array
from arraytp.fast import inverse
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model import network
from arraytp.model.network import ForwardPass, Network
from arraytp.ops import solve
from arraytp.ops.conv import as_matrix
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
from arraytp.rules import bp, gait_prop
from arraytp.rules.protocol import Updates
from arraytp.training.compare import angle_degrees, relative_distance

# How far W is moved before it is taken back to its nearest orthogonal matrix, in its own size.
DRIFT = 0.05
# As far as this W is inverted by LU factors, not by the Cholesky factor of WWᵀ.
FAR = 0.3
WAY = (0.0, 0.5, 1.0)
# A nudge of this size, relative to the activations, hardly crosses a kink; smaller ones are tried if it does.
ETAS = (1e-7, 1e-8, 1e-9)
FORMS = 1e-4
# The literal form's rounding grows with the condition of W, the difference form's as well.
INVERSE = 1e-10
TINY = 1e-12
# LAPACK's estimate is rarely too small by more than 3.
ESTIMATE = 2.0
ORTHOGONAL = 1e-8


def inverses(setting: Setting) -> Iterator[Check]:
    """Check solving with W and the inverse of every block, as W is, drifted, and far off, where it has LU factors."""
    if setting.config.rule.name != "gait-prop":
        return
    for when, there in (("", setting.network), (", W drifted", drift(setting)), (", W far off", drift(setting, FAR))):
        factorised = inverse.factor_blocks(there, setting.workspace)
        for n, block in enumerate(setting.network.blocks[1:], start=1):
            weight, bias, x = there.weights[n], there.biases[n], setting.passed.x[n]
            factors = factorised[n]
            number = solve.condition(solve.factor(as_matrix(weight)))
            rows = setting.normal((3, len(factors.matrix)), 50, n)
            error = apart(solve.right_solve(factors, rows) @ as_matrix(weight), rows)
            yield checked(
                f"{block.label}: solving x W = y{when}", "x W = y", solve.right_solve, error, INVERSE * number
            )
            z, y, _ = network.block_forward(block, weight, bias, x)
            # What saturation takes of an activation's digits, its inverse cannot give back.
            room = INVERSE * number / float(reference.slope(host(z), block.activation).min() + TINY)
            found = {
                network.block_inverse: network.block_inverse(block, weight, bias, y, x),
                inverse.inverse: inverse.inverse(block, factors, bias, y, x, setting.workspace, "audit"),
            }
            for function, back in found.items():
                yield checked(f"{block.label}: round trip{when}", "G(F(x)) = x", function,
                              apart(back.reshape(x.shape), x), room)  # fmt: skip


def conditions(setting: Setting) -> Iterator[Check]:
    """Check the estimate of every condition number, which is never too large, and show it."""
    if setting.config.rule.name != "gait-prop":
        return
    for block, weight in zip(setting.network.blocks[1:], setting.network.weights[1:], strict=True):
        estimate, w = solve.condition(solve.factor(as_matrix(weight))), host(as_matrix(weight))
        true = float(np.abs(w).sum(axis=1).max() * np.abs(np.linalg.inv(w)).sum(axis=1).max())
        yield checked(f"{block.label}: condition number of W", "‖W‖·‖W⁻¹‖", solve.condition, true)
        yield checked(f"{block.label}: true condition over estimate, − 1", "‖W‖·‖W⁻¹‖", solve.condition,
                      abs(true / estimate - 1), ESTIMATE)  # fmt: skip


def nudges(setting: Setting) -> Iterator[Check]:
    """Check γ of every sample and the nudged activation, by definition."""
    if setting.config.rule.name != "gait-prop":
        return
    options, last = setting.options, len(setting.network) - 1
    block, s, a = setting.network.blocks[last], setting.passed.s[last + 1], setting.passed.x[last + 1]
    delta = -0.5 * setting.dlogits
    gamma, _ = gait_prop.perturbation(options, delta, block)
    d = host(delta).reshape(len(delta), -1)
    norm = np.sqrt((d**2).sum(axis=1)) ** (2 if options.norm == "l2_squared" else 1)
    scale = options.eta * (np.prod(block.out_shape) ** 0.5 if options.scale_by_sqrt_dim else 1.0)
    wanted = scale / norm if options.normalise else np.full(len(d), options.gamma)
    yield checked(f"{block.label}: γ of every sample", "γ = η √dim / ‖a − t‖", gait_prop.perturbation,
                  apart(gamma, wanted), ROUNDING)  # fmt: skip
    y = gait_prop.nudged(block, s, a + delta, gamma)
    slope = reference.slope(host(a), block.activation)
    moved = host(s).copy()
    epsilon = wanted.reshape(-1, *[1] * (a.ndim - 1)) * slope**2
    moved[..., : a.shape[-1]] = (1 - epsilon) * host(a) + epsilon * host(a + delta)
    if block.activation in ("linear", "leaky-relu"):
        yield checked(
            f"{block.label}: nudged activation", "(1 − ε) a + ε t", gait_prop.nudged, apart(y, moved), ROUNDING
        )


def forms(setting: Setting) -> Iterator[Check]:
    """Check the difference form against its definition and the literal form against the difference form."""
    if setting.config.rule.name != "gait-prop":
        return
    difference = replace(setting.options, form="difference", rescale_updates=True)
    for when, there in (("far off", drift(setting, FAR)), ("drifted", drift(setting))):
        passed, dlogits, workspace = _pass(setting, there)
        found = _copied(gait_prop.updates(difference, {}, there, passed, dlogits, workspace))
        wanted = _by_definition(hosted(there), host(setting.images), host(dlogits))
        for block, a, b in zip(there.blocks, found, wanted, strict=True):
            error = worst(apart(a[0], b[0]), apart(a[1], b[1]))
            yield checked(f"{block.label}: difference form by definition, W {when}", "e = (D e) W⁻¹", gait_prop.updates,
                          error, INVERSE * 10)  # fmt: skip
    for eta in ETAS:
        options = replace(setting.options, form="literal", normalise=True, eta=eta, norm="l2", rescale_updates=True)
        targets = gait_prop.targets(options, {}, there, passed, dlogits, workspace)
        blocks = reversed(range(len(there)))
        crossed = sum(gait_prop.crossings(options, there.blocks[n], passed.s[n + 1], t)
                      for n, t in zip(blocks, targets, strict=True) if n > 0)  # fmt: skip
        if not crossed:
            break
    literal = _copied(gait_prop.updates(options, {}, there, passed, dlogits, workspace))
    for block, a, b in zip(there.blocks, literal, found, strict=True):
        error = relative_distance(a[0], b[0])
        what = f"{block.label}: literal form at η = {eta:g}, W drifted"
        yield checked(what, "Algorithm 1", gait_prop.literal_targets, error, FORMS)
    yield from _own_scale(setting, there, (passed, dlogits, workspace), found)


def _own_scale(
    setting: Setting, there: Network, at: tuple[ForwardPass, Array, Workspace], rescaled: Updates
) -> Iterator[Check]:
    """Check the config's own form: without rescaling, the update of every sample keeps the γ of the layers above."""
    passed, dlogits, workspace = at
    if setting.options.rescale_updates:
        return
    found = _copied(gait_prop.updates(setting.options, {}, there, passed, dlogits, workspace))
    last = len(there) - 1
    error = apart(found[last][0], rescaled[last][0])
    yield checked(
        f"{there.blocks[last].label}: output update, not rescaled", "m = 1", gait_prop.updates, error, INVERSE
    )


def to_orthogonal(setting: Setting) -> Iterator[Check]:
    """Check the angle to BP now, and as drifted W goes back to its polar factor."""
    if setting.config.rule.name != "gait-prop":
        return
    now = setting.network
    passed, dlogits, workspace = _pass(setting, now)
    own = _copied(gait_prop.updates(setting.options, {}, now, passed, dlogits, workspace))
    exact = bp.updates(bp.Options(), {}, now, passed, dlogits, workspace)
    for block, a, b in zip(now.blocks, own, exact, strict=True):
        yield checked(f"{block.label}: angle to BP now, degrees", "Algorithm 1", gait_prop.updates,
                      angle_degrees(a[0], b[0]))  # fmt: skip
    options = replace(setting.options, form="difference", rescale_updates=True)
    start = drift(setting)
    polar = {n: polar_factor(host(as_matrix(w))) for n, w in enumerate(start.weights) if n > 0}
    for share in WAY:
        there = Network(start.blocks, list(start.weights), start.biases)
        for n, factor in polar.items():
            weight = (1 - share) * host(as_matrix(start.weights[n])) + share * factor
            there.weights[n] = setting.put(weight.reshape(start.weights[n].shape))
        passed, dlogits, workspace = _pass(setting, there)
        found = _copied(gait_prop.updates(options, {}, there, passed, dlogits, workspace))
        exact = bp.updates(bp.Options(), {}, there, passed, dlogits, workspace)
        error = worst(*(relative_distance(a[0], b[0]) for a, b in zip(found, exact, strict=True)))
        angle = worst(*(angle_degrees(a[0], b[0]) for a, b in zip(found, exact, strict=True)))
        yield checked(f"W drifted by {DRIFT:.0%}, {share:.0%} of the way to its polar factor: {angle:.3g}° to BP",
                      "W⁻¹ = Wᵀ", gait_prop.updates, error, ORTHOGONAL if share == 1 else None)  # fmt: skip


def drift(setting: Setting, share: float = DRIFT) -> Network:
    """Return the network with every square W moved by a random matrix of a share of its size."""
    weights = list(setting.network.weights)
    for n, block in enumerate(setting.network.blocks):
        if n > 0 and block.is_square:
            noise, w = setting.generator(51, n).standard_normal(weights[n].shape), host(weights[n])
            weights[n] = setting.put(w + share * noise * (np.linalg.norm(w) / np.linalg.norm(noise)))
    return Network(setting.network.blocks, weights, setting.network.biases)


def polar_factor(w: Floats) -> Floats:
    """Return the orthogonal matrix nearest to W, by Newton's iteration X ← (X + X⁻ᵀ)/2."""
    x = w
    for _ in range(50):
        following = (x + np.linalg.inv(x).T) / 2
        # Digits double with every iteration.
        if np.abs(following - x).max() < 1e-9:
            return following
        x = following
    return x


def _pass(setting: Setting, there: Network) -> tuple[ForwardPass, Array, Workspace]:
    workspace = Workspace(setting.workspace.backend)
    passed = forward(there, setting.images, workspace)
    reduction = setting.config.loss.reduction
    _, cache = cross_entropy_forward(passed.logits, setting.labels, reduction)
    return passed, cross_entropy_backward(cache, reduction), workspace


def _copied(updates: Updates) -> Updates:
    return [(w.copy(), b.copy()) for w, b in updates]


def _by_definition(there: Network, x: Floats, dlogits: Floats) -> list[tuple[Floats, Floats]]:
    """Return the updates of the difference form: BP's recursion with the inverse of W in place of its transpose."""
    carriers = [there.weights[0]]
    for weight in there.weights[1:]:
        matrix = weight.reshape(-1, weight.shape[-1])
        carriers.append(np.ascontiguousarray(np.linalg.inv(matrix).T).reshape(weight.shape))
    return reference.backward(there, carriers, x, dlogits)


CHECKS = (inverses, conditions, nudges, forms, to_orthogonal)
