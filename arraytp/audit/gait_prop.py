"""GAIT-prop's updates: γ and nudges by definition, the difference form by definition, the literal form against it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import ROUNDING, Check, Floats, apart, checked, distance, host
from arraytp.audit.drift import FAR, drifted
from arraytp.audit.gradients import updates_apart
from arraytp.audit.inverses import INVERSE
from arraytp.audit.setting import Setting, hosted
from arraytp.model.blocks import Network
from arraytp.model.passes import Batch
from arraytp.model.plain import Plain
from arraytp.rules import gait_prop
from arraytp.rules.protocol import State, Updates

# A nudge of this size, relative to the activations, hardly crosses a kink; smaller ones are tried if it does.
ETAS = (1e-7, 1e-8, 1e-9)
FORMS = 1e-4


def nudges(setting: Setting) -> Iterator[Check]:
    """Check γ of every sample and the nudged activation, by definition."""
    if setting.rule.updates is not gait_prop.updates:
        return
    options, at = setting.options, setting.batch.at(len(setting.network) - 1)
    a, delta = at.s_next, -0.5 * setting.batch.dlogits
    gamma, _ = gait_prop.perturbation(options, delta, at.block)
    d = host(delta).reshape(len(delta), -1)
    norm = np.sqrt((d**2).sum(axis=1)) ** (2 if options.norm == "l2_squared" else 1)
    scale = options.eta * (np.prod(at.block.out_shape) ** 0.5 if options.scale_by_sqrt_dim else 1.0)
    # Where a = t, the sample's γ is 1.
    expected = np.ones(len(d))
    expected[norm > 0] = scale / norm[norm > 0] if options.normalise else options.gamma
    yield checked(f"{at.block.label}: γ of every sample", "γ = η √dim / ‖a − t‖", gait_prop.perturbation,
                  apart(gamma, expected), ROUNDING)  # fmt: skip
    if at.block.activation.curved:
        return
    y, nudged = gait_prop.nudged(at, a + delta, gamma), host(at.output).copy()
    slope = reference.slope(host(a), at.block.activation.name)
    epsilon = expected.reshape(-1, *[1] * (a.ndim - 1)) * slope**2
    nudged[..., : a.shape[-1]] = (1 - epsilon) * host(a) + epsilon * host(a + delta)
    yield checked(f"{at.block.label}: nudged activation", "(1 − ε) a + ε t", gait_prop.nudged, apart(y, nudged),
                  ROUNDING)  # fmt: skip


def forms(setting: Setting) -> Iterator[Check]:
    """Check the difference form against its definition and the literal form against the difference form."""
    if setting.rule.updates is not gait_prop.updates:
        return
    options = replace(setting.options, form="difference", rescale_updates=True)
    for when, network in (("far off", drifted(setting, FAR)), ("drifted", drifted(setting))):
        batch = setting.pass_over(network)
        difference = setting.propose(batch, options)
        expected = _by_definition(hosted(network), host(setting.images), host(batch.dlogits))
        for block, actual, of_block in zip(network.blocks, difference, expected, strict=True):
            yield checked(f"{block.label}: difference form by definition, W {when}", "e = (D e) W⁻¹", gait_prop.updates,
                          updates_apart([actual], [of_block]), INVERSE * 10)  # fmt: skip
    plain = replace(batch, engine=Plain(batch.engine.backend))
    error = updates_apart(setting.propose(plain, options), difference)
    yield checked("all blocks: difference form, fast engine against plain", "the same", gait_prop.difference, error,
                  INVERSE * 10)  # fmt: skip
    if setting.options.inverse == "pseudo":
        yield from _own_scale(setting, batch, difference)
        return
    eta, literal_options = _without_crossings(setting, batch)
    for on, each in (("", batch), (", plain engine", plain)):
        literal = setting.propose(each, literal_options)
        for block, (weight, _), (expected_weight, _) in zip(network.blocks, literal, difference, strict=True):
            what = f"{block.label}: literal form at η = {eta:g}, W drifted{on}"
            yield checked(what, "Algorithm 1", gait_prop.literal, distance(weight, expected_weight), FORMS)
    yield from _own_scale(setting, batch, difference)


def _without_crossings(setting: Setting, batch: Batch) -> tuple[float, gait_prop.Options]:
    """Return η, and options of the literal form, with which nudges cross no kink, if there is such an η."""
    eta, options = ETAS[0], setting.options
    for eta in ETAS:
        options = replace(setting.options, form="literal", normalise=True, eta=eta, norm="l2", rescale_updates=True)
        targets = zip(batch.down(), gait_prop.targets(options, State(), batch), strict=True)
        if not sum(gait_prop.crossings(options, at, target) for at, target in targets if at.n > 0):
            break
    return eta, options


def _own_scale(setting: Setting, batch: Batch, rescaled: Updates) -> Iterator[Check]:
    """Check the config's own form: without rescaling, the update of every sample keeps the γ of the layers above."""
    if setting.options.rescale_updates:
        return
    error = apart(setting.propose(batch)[-1][0], rescaled[-1][0])
    label = setting.network.blocks[-1].label
    yield checked(f"{label}: output update, not rescaled", "m = 1", gait_prop.updates, error, INVERSE)


def _by_definition(network: Network, x: Floats, dlogits: Floats) -> list[tuple[Floats, Floats]]:
    """Return the updates of the difference form: BP's recursion with W⁻¹, or W⁺, in place of the transpose."""
    through = [network.weights[0]]
    for weight in network.weights[1:]:
        matrix = weight.reshape(-1, weight.shape[-1])
        inverse = np.linalg.inv(matrix) if len(matrix) == matrix.shape[1] else np.linalg.pinv(matrix)
        through.append(np.ascontiguousarray(inverse.T).reshape(weight.shape))
    return reference.backward(network, through, x, dlogits)


CHECKS = (nudges, forms)
