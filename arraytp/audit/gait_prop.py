"""GAIT-prop's updates against their definition: γ, the nudges, the difference form and the literal form."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import ROUNDING, Check, Floats, apart, checked, distance, host, worst
from arraytp.audit.drift import FAR, drifted
from arraytp.audit.gradients import updates_apart
from arraytp.audit.inverses import INVERSE
from arraytp.audit.setting import Setting, hosted
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import Batch
from arraytp.model.plain import Plain
from arraytp.rules import gait_prop
from arraytp.rules.protocol import State

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
    expected = _gamma(options, host(delta), at.block)
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
    """Check updates of both forms, and targets and m of the difference form, against their definition.

    γ and rescaling are the config's, except that the literal form's γ is normalised by ‖a − t‖ (not squared), with an η
    at which its nudges cross no kink.
    """
    if setting.rule.updates is not gait_prop.updates:
        return
    options = replace(setting.options, form="difference")
    for when, network in (("far off", drifted(setting, FAR)), ("drifted", drifted(setting))):
        batch = setting.pass_over(network)
        difference = setting.propose(batch, options)
        targets = [(target.delta.copy(), target.m) for target in gait_prop.targets(options, State(), batch)][::-1]
        defined = _by_definition(options, hosted(network), batch)
        lines = zip(network.blocks, difference, targets, defined, strict=True)
        for block, actual, (delta, m), (expected_delta, expected_m, of_block) in lines:
            yield checked(f"{block.label}: difference form by definition, W {when}", "e = (D e) W⁻¹", gait_prop.updates,
                          updates_apart([actual], [of_block]), INVERSE * 10)  # fmt: skip
            error = worst(apart(delta.reshape(expected_delta.shape), expected_delta), apart(m, expected_m))
            yield checked(f"{block.label}: t − a and m by definition, W {when}", "m ← m/γ", gait_prop.targets, error,
                          INVERSE * 10)  # fmt: skip
    plain = replace(batch, engine=Plain(batch.engine.backend))
    error = updates_apart(setting.propose(plain, options), difference)
    yield checked("all blocks: difference form, fast engine against plain", "the same", gait_prop.difference, error,
                  INVERSE * 10)  # fmt: skip
    if setting.options.inverse == "pseudo":
        return
    eta, literal_options = _without_crossings(setting, batch)
    defined = _by_definition(literal_options, hosted(network), batch)
    for on, each in (("", batch), (", plain engine", plain)):
        literal = setting.propose(each, literal_options)
        for block, (weight, _), (_, _, (expected_weight, _)) in zip(network.blocks, literal, defined, strict=True):
            what = f"{block.label}: literal form at η = {eta:g}, W drifted{on}"
            yield checked(what, "Algorithm 1", gait_prop.literal, distance(weight, expected_weight), FORMS)


def _without_crossings(setting: Setting, batch: Batch) -> tuple[float, gait_prop.Options]:
    """Return the first η of `ETAS` at which no nudge crosses a kink, else the last; and the literal options with it."""
    eta, options = ETAS[0], setting.options
    for eta in ETAS:
        options = replace(setting.options, form="literal", normalise=True, eta=eta, norm="l2")
        targets = zip(batch.down(), gait_prop.targets(options, State(), batch), strict=True)
        if not sum(gait_prop.crossings(options, at, target) for at, target in targets if at.n > 0):
            break
    return eta, options


def _by_definition(
    options: gait_prop.Options, network: Network, batch: Batch
) -> list[tuple[Floats, Floats, tuple[Floats, Floats]]]:
    """Return t − a, m and the update of every block: BP's recursion with W⁻¹, or W⁺, in place of the transpose.

    For δ_n = t − a of the output that block n passes on, and its γ_n: δ_{n−1} = γ_n (D δ_n) W⁻¹, the update is
    −2 m_n (D δ_n) outer a, and m_{n−1} = m_n / γ_n if updates are rescaled, else 1. `network` has host arrays.
    """
    x, result = host(batch.at(0).s), []
    zs, s, indices = reference.forward(network, x)
    delta, m = -0.5 * host(batch.dlogits), np.ones(len(x))
    for n in reversed(range(len(network))):
        block, weight = network.blocks[n], network.weights[n]
        matrix = weight.reshape(-1, weight.shape[-1])
        if n:
            inverse = np.linalg.inv(matrix) if len(matrix) == matrix.shape[1] else np.linalg.pinv(matrix)
            weight = np.ascontiguousarray(inverse.T).reshape(weight.shape)
        taken = reference.handed_on(network, s, n)
        scaled = -2 * m.reshape(-1, *[1] * (delta.ndim - 1)) * delta
        dweight, dbias, back = reference.block_backward(block, scaled, zs[n], indices[n], taken, weight)
        result.append((delta, m, (dweight, dbias)))
        gamma = _gamma(options, delta, block)
        # `back` is (−2 m D δ_n) W⁻¹, δ_{n−1} is γ_n (D δ_n) W⁻¹.
        delta = back / (-2 * (m / gamma).reshape(-1, *[1] * (back.ndim - 1)))
        m = m / gamma if options.rescale_updates else m
    return result[::-1]


def _gamma(options: gait_prop.Options, delta: Floats, block: Block) -> Floats:
    """Return γ of every sample (Eq. 5); where a = t it is 1."""
    norm = np.sqrt((delta.reshape(len(delta), -1) ** 2).sum(axis=1)) ** (2 if options.norm == "l2_squared" else 1)
    scale = options.eta * (np.prod(block.out_shape) ** 0.5 if options.scale_by_sqrt_dim else 1.0)
    gamma = np.ones(len(delta))
    gamma[norm > 0] = scale / norm[norm > 0] if options.normalise else options.gamma
    return gamma


CHECKS = (nudges, forms)
