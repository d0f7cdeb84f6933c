"""Targets and updates of the rules with learned feedback: by definition, and as gradients of the local losses."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import KINKED, Check, Floats, apart, checked, host, inner, worst
from arraytp.audit.differences import gradient_error
from arraytp.audit.feedback import SUMS, feedback_input
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.fast.passes import forward
from arraytp.model.network import Network
from arraytp.rules import drl

RULES = ("tp", "dtp", "ldrl", "ldrl-parallel", "drl")


def targets(setting: Setting) -> Iterator[Check]:
    """Check t − s of every block by its definition."""
    if setting.config.rule.name not in RULES:
        return
    rule = setting.experiment.rule
    for n, found, wanted in zip(reversed(range(len(setting.network))), _found(setting), _defined(setting), strict=True):
        source = {"tp": "t^n = G(t^{n+1})", "drl": "t = s + Q(t^N) − Q(s^N)"}.get(setting.config.rule.name, "Eq. 4")
        if n == len(setting.network) - 1:
            source = "Eq. 3"
        error = apart(found.reshape(wanted.shape), wanted)
        yield checked(f"{setting.network.blocks[n].label}: t − s of its output", source, rule.targets, error, SUMS)


def _found(setting: Setting) -> list[Floats]:
    """Return the rule's t − s from the last block to the first."""
    arguments = setting.options, setting.state(), setting.network, setting.passed, setting.dlogits, setting.workspace
    return [host(target.delta).copy() for target in setting.experiment.rule.targets(*arguments)]


def _defined(setting: Setting) -> list[Floats]:
    """Return t − s from the last block to the first, by definition."""
    there, options, name = setting.on_host(), setting.options, str(setting.config.rule.name)
    state = {key: host(array) for key, array in setting.experiment.rule_state.items()}
    _, s, indices = reference.forward(there, host(setting.images))
    # ∂L/∂s^N of the mean loss; β takes every sample's own.
    dlogits = host(setting.dlogits)
    last = len(there) - 1
    if name == "drl":
        moved = -options.eta * dlogits
        hidden = [(moved @ state[f"feedback/{n}/weight"]).reshape(s[n + 1].shape) for n in reversed(range(last))]
        return [moved, *hidden]
    found = [-options.beta * len(dlogits) * dlogits]
    for n in range(last, 0, -1):
        block, omega = there.blocks[n], state[f"feedback/{n}/weight"]
        target = s[n + 1] + found[-1].reshape(s[n + 1].shape)
        g = reference.carry(block, omega, feedback_input(block, target, indices[n], options.unpool))
        if name == "tp":
            t = (g + state[f"feedback/{n}/bias"]).reshape(s[n].shape)
            found.append(t - s[n])
        else:
            here = reference.carry(block, omega, feedback_input(block, s[n + 1], indices[n], options.unpool))
            found.append((g - here).reshape(s[n].shape))
    return found


def updates(setting: Setting) -> Iterator[Check]:
    """Check the update of every block as the gradient of its local loss, the targets constant."""
    name, rule = setting.config.rule.name, setting.experiment.rule
    if name not in RULES:
        return
    arguments = setting.options, setting.state(), setting.network, setting.passed, setting.dlogits, setting.workspace
    found = [(w.copy(), b.copy()) for w, b in rule.updates(*arguments)]
    deltas = _found(setting)[::-1]
    for n, (dweight, dbias) in enumerate(found):
        block, weight, bias = setting.network.blocks[n], setting.network.weights[n], setting.network.biases[n]
        t = setting.passed.s[n + 1] + setting.put(deltas[n].reshape(setting.passed.s[n + 1].shape))
        value = partial(_local_loss, setting, n, t)
        generator = setting.generator(40, n)
        error = worst(
            gradient_error(lambda w, value=value, bias=bias: value(w, bias), weight, dweight, generator),  # type: ignore[misc]
            gradient_error(lambda b, value=value, weight=weight: value(weight, b), bias, dbias, generator, 1),  # type: ignore[misc]
        )
        source = "DRL, update" if name == "drl" else "Eq. 6"
        yield checked(f"{block.label}: update as the local loss's gradient", source, rule.updates, error, KINKED)


def _local_loss(setting: Setting, n: int, t: Array, weight: Array, bias: Array) -> float:
    """Return (1/B) Σ ½‖s − t‖², over β if the config says so; DRL: Σ‖s − t‖²/B, of a convolution the mean (s − t)²."""
    block, options = setting.network.blocks[n], setting.options
    alone = Network((block,), [weight], [bias])
    s = forward(alone, setting.passed.x[n], setting.workspace, "audit").s[1]
    squares = inner(s - t, s - t)
    if setting.config.rule.name == "drl":
        return squares / (s.size if block.kind == "conv" else len(s))
    return squares / 2 / len(s) / (options.beta if options.divide_by_beta else 1.0)


def direct_matching(setting: Setting) -> Iterator[Check]:
    """Check how far DRL's Q of each hidden layer is from the transposed Jacobian of the logits, now and at its optimum.

    For small noise the loss is ‖J Q − I‖², J of shape (size, classes), least for Q = (Σ JᵀJ)⁻¹ Σ Jᵀ.
    """
    blocks, classes = setting.network.blocks, setting.passed.logits.shape[1]
    if setting.config.rule.name != "drl" or classes > MOST_CLASSES:
        return
    jacobians = _jacobians(setting)
    for n in range(len(blocks) - 1):
        q = host(setting.experiment.rule_state[f"feedback/{n}/weight"])
        j = jacobians[n]
        optimum = np.linalg.lstsq(np.einsum("bsc,bsd->cd", j, j), np.einsum("bsc->cs", j), rcond=None)[0]
        for when, weight in (("now", q), ("at the loss's optimum", optimum)):
            residual = np.sqrt(sum(np.sum((weight - one.T) ** 2) for one in j) / np.sum(j**2))
            yield checked(f"{blocks[n].label}: ‖Q − Jᵀ‖/‖J‖ {when}", "JMC", drl.init_state, residual)


MOST_CLASSES = 20


def _jacobians(setting: Setting) -> list[Floats]:
    """Return ∂logits/∂s^{n+1} of every sample for n = 0 … N−2, of shape (B, size, classes)."""
    there, batch, classes = setting.on_host(), len(setting.images), setting.passed.logits.shape[1]
    zs, s, indices = reference.forward(there, host(setting.images))
    found = [np.empty((batch, s[n + 1][0].size, classes)) for n in range(len(there) - 1)]
    for c in range(classes):
        ds = np.zeros((batch, classes))
        ds[:, c] = 1
        for n in range(len(there) - 1, 0, -1):
            _, _, ds = reference.block_backward(there.blocks[n], ds, zs[n], indices[n], s[n], there.weights[n])
            found[n - 1][:, :, c] = ds.reshape(batch, -1)
    return found


CHECKS = (targets, updates, direct_matching)
