"""Targets by definition where it is known; updates by targets, which must be the gradients of the local losses."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit.check import KINKED, ROUNDING, SUBTRACTED, Check, Floats, apart, checked, host, worst
from arraytp.audit.definitions import LOCAL_LOSSES, TARGETS
from arraytp.audit.differences import gradient_errors
from arraytp.audit.feedback import SUMS
from arraytp.audit.jacobians import jacobians, sums
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.model.blocks import Network
from arraytp.model.passes import Batch
from arraytp.rules import drl
from arraytp.training.compare import angle_degrees

# A direction that points downhill is less than this from BP's, in degrees.
DOWNHILL = 90.0


def targets(setting: Setting) -> Iterator[Check]:
    """Check t − s of every block: on both engines, and by its definition where that is known."""
    rule, last = setting.rule, len(setting.network) - 1
    if rule.targets is None:
        return
    deltas = _deltas(setting, setting.batch)
    error = worst(*(apart(a, b) for a, b in zip(deltas, _deltas(setting, setting.plain), strict=True)))
    # Rules that invert W or subtract nearly equal numbers have checks of their own.
    yield checked("all blocks: t − s, fast engine against plain", "the same", rule.targets, error,
                  None if rule.inverts else SUMS)  # fmt: skip
    source, define = TARGETS.get(rule.targets, ("", None))
    if define is None:
        return
    for n, delta, expected in zip(reversed(range(last + 1)), deltas, define(setting), strict=True):
        error, tolerance = apart(delta.reshape(expected.shape), expected), SUMS
        if expected.any():
            # The definition subtracts numbers as large as s, which leaves a small t − s few digits.
            s = np.abs(host(setting.batch.at(n).s_next)).max()
            tolerance = max(SUMS, SUBTRACTED * max(1.0, float(s)) / float(np.abs(expected).max()))
        yield checked(f"{setting.network.blocks[n].label}: t − s of its output", "Eq. 3" if n == last else source,
                      rule.targets, error, tolerance)  # fmt: skip


def _deltas(setting: Setting, batch: Batch) -> list[Floats]:
    """Return the rule's t − s from the last block to the first."""
    assert setting.rule.targets is not None
    return [host(target.delta).copy() for target in setting.rule.targets(setting.options, setting.state(), batch)]


def local_updates(setting: Setting) -> Iterator[Check]:
    """Check that every block's update is the gradient of its local loss, the target constant, and check that loss."""
    rule, options, batch = setting.rule, setting.options, setting.batch
    if rule.local_update is None or rule.local_loss is None:
        return
    updates, deltas = setting.propose(), _deltas(setting, batch)[::-1]
    source, define = LOCAL_LOSSES.get(rule.local_loss, ("its local loss", None))
    for n, (dweight, dbias) in enumerate(updates):
        at = batch.at(n)
        t = at.s_next + setting.put(deltas[n].reshape(at.s_next.shape))

        def value(weight: Array, bias: Array, n: int = n, t: Array = t) -> float:
            assert rule.local_loss is not None
            return rule.local_loss(options, setting.network.blocks[n], _s_next(setting, n, weight, bias), t)

        errors = gradient_errors(value, (at.weight, at.bias), (dweight, dbias), setting.generator(40, n))
        error = worst(*errors)
        yield checked(f"{at.block.label}: update as the local loss's gradient", source, rule.local_update, error,
                      KINKED)  # fmt: skip
        if define is not None:
            expected = define(options, at.block, host(at.s_next), host(t))
            error = apart(np.array(value(at.weight, at.bias)), np.array(expected))
            yield checked(f"{at.block.label}: local loss by definition", source, rule.local_loss, error, SUMS)


def _s_next(setting: Setting, n: int, weight: Array, bias: Array) -> Array:
    """Return s^{n+1} with other parameters of block n."""
    alone, at = Network((setting.network.blocks[n],), [weight], [bias]), setting.batch.at(n)
    return setting.batch.engine.forward(alone, at.s, "audit").logits


def descent(setting: Setting) -> Iterator[Check]:
    """Check that targets point downhill: the output's, and those that blocks pass down with ω = θ, their weight.

    The latter holds for targets that equal s where the loss has no gradient, in a rule that trains an ω for every
    forward weight but the first. Other targets have no such property, nor has ReLU at its zeros: there the line is
    informational.
    """
    rule, batch = setting.rule, setting.batch
    if rule.targets is None or not batch.dlogits.any():
        return
    label = setting.network.blocks[-1].label
    output = next(iter(rule.targets(setting.options, setting.state(), batch))).delta
    angle = angle_degrees(output.reshape(batch.dlogits.shape), -batch.dlogits)
    yield checked(f"{label}: angle of the output's t − s to −∂L/∂s, degrees", "downhill", rule.targets, angle, DOWNHILL)
    pairs = rule.pairs(setting.state(), setting.network)
    matched = {n: theta for n, omega, theta in pairs if theta is not None and theta.shape == omega.shape}
    if list(matched) != list(range(1, len(setting.network))):
        return
    state, options = setting.state(), rule.compared(setting.options)
    state.weights |= {n: theta.copy() for n, theta in matched.items()}
    at_rest = rule.targets(options, state, replace(batch, dlogits=batch.dlogits * 0))
    differences = worst(*(float(np.abs(host(target.delta)).max()) for target in at_rest)) <= ROUNDING
    deltas = [target.delta.copy() for target in rule.targets(options, state, batch)]
    for at, delta, handed_down in zip(batch.down(), deltas, deltas[1:], strict=False):
        _, _, expected = at.backward(delta, through=at.weight)
        if expected is not None and expected.any():
            angle = angle_degrees(handed_down.reshape(expected.shape), expected)
            holds = differences and not at.block.activation.flat_below_zero
            yield checked(f"{at.block.label}: angle of its t − s below to BP's, ω = θ, degrees", "downhill",
                          rule.targets, angle, DOWNHILL if holds else None)  # fmt: skip


def direct_matching(setting: Setting) -> Iterator[Check]:
    """Report how far DRL's Q^n is from the transposed Jacobian of the logits in s^n, now and at the loss's optimum.

    For small noise the loss is ‖J Q − I‖², J of shape (size, classes), minimised by Q = (Σ JᵀJ)⁻¹ Σ Jᵀ.
    """
    trained = setting.rule.feedback
    if trained is None or trained.begin is not drl.begin or setting.options.hidden:
        return
    for n, jacobian in jacobians(setting).items():
        q = host(setting.experiment.rule_state.weights[n])
        optimum = np.linalg.lstsq(*sums(jacobian), rcond=None)[0]
        for when, weight in (("now", q), ("at the loss's optimum", optimum)):
            residual = np.sqrt(sum(np.sum((weight - one.T) ** 2) for one in jacobian) / np.sum(jacobian**2))
            yield checked(f"{setting.network.blocks[n].label}: ‖Q − Jᵀ‖/‖J‖ of its input {when}", "JMC", drl.init_state,
                          residual)  # fmt: skip


CHECKS = (targets, local_updates, descent, direct_matching)
