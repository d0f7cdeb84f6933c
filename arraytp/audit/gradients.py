"""The loss, the passes through a block and through the network, and the whole gradient of backpropagation."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, KINKED, ROUNDING, Check, Floats, apart, checked, host, worst
from arraytp.audit.differences import gradient_error, gradient_errors
from arraytp.audit.setting import Setting, copied
from arraytp.backend import Array, array_module
from arraytp.fast import passes as fast
from arraytp.model import initialise, plain
from arraytp.model.blocks import Network, block_flops
from arraytp.model.passes import Batch
from arraytp.ops import loss
from arraytp.rules import bp
from arraytp.rules.protocol import State, Updates

# The passes sum in another order than the references, layer after layer.
PASS = 1e-9
# Samples of the batch whose loss is differentiated: every additional unit may cross a kink.
FEW = 2
COPIES_FLOPS = 2e10
# The effect of a step's roundings is at most so many times that of one rounding of its images; 3 has been observed.
ROUNDINGS = 10


def exact(batch: Batch) -> Updates:
    """Return BP's updates as new arrays."""
    return copied(bp.RULE.propose(bp.Options(), State(), batch))


# By the loss's name: the formulas of its value and its gradient.
FORMULAS = {"cross-entropy": ("−Σ y log softmax(z)", "softmax(z) − y"), "mse": ("½ Σ ‖z − y‖²", "z − y")}


def losses(setting: Setting) -> Iterator[Check]:
    """Check the loss on the batch's logits, its gradient, and the rank of the labels."""
    options, logits = setting.config.loss, setting.batch.logits
    forward, backward = loss.LOSSES[options.name]
    value_formula, gradient_formula = FORMULAS[options.name]
    value, dlogits, totals = loss.loss_and_score(
        options.name, logits, setting.labels, options.reduction, options.label_smoothing
    )
    expected = reference.loss(options, host(logits), host(setting.labels))
    yield checked(f"loss: value, {options.reduction}", value_formula, forward,
                  abs(float(value) - expected) / (abs(expected) or 1.0), ROUNDING)  # fmt: skip
    error = gradient_error(
        lambda z: reference.loss(options, host(z), host(setting.labels)),
        logits, dlogits, setting.generator(20),
    )  # fmt: skip
    yield checked("loss: gradient of the logits", gradient_formula, backward, error, DIFFERENCES)
    summed = reference.loss(replace(options, reduction="sum"), host(logits), host(setting.labels))
    yield checked("loss: sum over images in the tables", "Σ of the images' losses", loss.loss_and_score,
                  abs(float(totals[0]) - summed) / (abs(summed) or 1.0), ROUNDING)  # fmt: skip
    z, y = host(logits), host(setting.labels)
    ranks = [int(np.flatnonzero(np.argsort(-row, kind="stable") == label)[0])
             for row, label in zip(z, y, strict=True)]  # fmt: skip
    hits = [sum(rank < most for rank in ranks) for most in (1, 5)]
    error = worst(apart(loss.label_rank(logits, setting.labels), np.array(ranks)), apart(totals[1:], np.array(hits)))
    yield checked("loss: rank of the label", "top-k", loss.label_rank, error, 0.0)


def initial(setting: Setting) -> Iterator[Check]:
    """Check initial weights and biases: orthonormality, or the spread that the scheme asks for."""
    init, own = setting.config.network.init, setting.experiment.network
    for block, weight, bias in zip(setting.network.blocks, own.weights, own.biases, strict=True):
        yield from _initial(f"{block.label}: ", "network.init", init, host(weight), host(bias))


def _initial(label: str, source: str, init: str, weight: Floats, bias: Floats | None = None) -> Iterator[Check]:
    """Check an initial weight of shape (in, out) or (k, k, C, O), and a bias drawn with its fan_in."""
    fan_in, fan_out = int(np.prod(weight.shape[:-1])), int(np.prod(weight.shape[:-2])) * weight.shape[-1]
    matrix = weight.reshape(fan_in, -1)
    if init == "orthogonal":
        narrow = matrix if fan_in >= matrix.shape[1] else matrix.T
        error, tolerance = apart(narrow.T @ narrow, np.eye(narrow.shape[1])), ROUNDING
    else:
        spread = (1 / (3 * fan_in)) ** 0.5 if init == "kaiming-uniform" else (2 / (fan_in + fan_out)) ** 0.5
        error, tolerance = abs(float(np.sqrt(np.mean(weight**2))) / spread - 1), 5 / (2 * weight.size) ** 0.5
    yield checked(f"{label}initial weight, {init}", source, initialise.initial_weight, error, tolerance)
    if bias is None:
        return
    bound = fan_in**-0.5 if init == "kaiming-uniform" else 0.0
    yield checked(f"{label}largest initial bias", source, initialise.initial_bias, float(np.abs(bias).max()), bound)
    if bound:
        # The root mean square of n numbers from U(−b, b) is b/√3, with a relative standard deviation of 0.45/√n.
        error = abs(float(np.sqrt(np.mean(bias**2))) / (bound / 3**0.5) - 1)
        yield checked(f"{label}spread of the initial bias, less 1", source, initialise.initial_bias, error,
                      5 * 0.45 / bias.size**0.5)  # fmt: skip


def initial_feedback(setting: Setting) -> Iterator[Check]:
    """Check initial feedback weights and biases as those of the network, or as copies of W with biases 0."""
    init, state = getattr(setting.options, "feedback_init", None), setting.experiment.rule_state
    if init is None:
        return
    for n, array in state.weights.items():
        weight, bias = host(array), None if n not in state.biases else host(state.biases[n])
        label = f"feedback of block {n}: "
        if init == "symmetric":
            error = worst(apart(weight, setting.network.weights[n]), 0.0 if bias is None else float(np.abs(bias).max()))
            yield checked(f"{label}ω is W, its bias 0", "rule.feedback_init", setting.rule.init_state, error, 0.0)
            continue
        # A feedback module is the reversed block: a dense one's ω is drawn as (out, in), and a bias has its fan_in.
        drawn = weight.T if bias is not None and weight.ndim == 2 else weight
        yield from _initial(label, "rule.feedback_init", init, drawn, bias)


def passes(setting: Setting) -> Iterator[Check]:
    """Check the plain and the fast pass through every block, and their gradients, against definitions."""
    zs, outputs, indices = reference.forward(setting.on_host(), host(setting.images))
    for n, block in enumerate(setting.network.blocks):
        at = setting.batch.at(n)
        z, output, index = plain.block_forward(block, at.weight, at.bias, at.s)
        yield checked(f"{block.label}: the plain pass", "s = pool(f(xW + b))", plain.block_forward,
                      worst(apart(z, zs[n]), apart(output, outputs[n + 1])), PASS)  # fmt: skip
        error = apart(at.output, outputs[n + 1])
        if block.pool is not None:
            error = worst(error, apart(at.index, indices[n]))
        yield checked(f"{block.label}: the fast pass", "the same", fast.forward, error, PASS)
        u = setting.normal(at.s_next.shape, 21, n)
        gradients = plain.block_backward(block, u, z, index, at.s, at.weight)
        x, weight = host(at.s).reshape(len(u), *block.in_shape), host(at.weight)
        expected = reference.block_backward(block, host(u), zs[n], indices[n], x, weight)
        error = worst(*(apart(a.reshape(b.shape), b) for a, b in zip(gradients, expected, strict=True)))
        yield checked(f"{block.label}: gradients of the block", "dz = D ⊙ unpool(ds)", plain.block_backward, error,
                      PASS)  # fmt: skip
        fast_gradients = fast.backward(setting.workspace, at, u, at.weight, None)
        error = worst(*(apart(a, b) for a, b in zip(fast_gradients, gradients, strict=True)))
        yield checked(f"{block.label}: the fast gradients", "the same", fast.backward, error, PASS)


def backpropagation(setting: Setting) -> Iterator[Check]:
    """Check BP's updates against slopes of the loss in random directions, parameter by parameter, and by definition."""
    network, few = setting.network, slice(FEW)
    batch = setting.pass_over(images=setting.images[few], labels=setting.labels[few])
    updates = exact(batch)
    for n, block in enumerate(network.blocks):
        at, generator = (network.weights[n], network.biases[n]), setting.generator(23, n)
        error = worst(*gradient_errors(partial(_loss_from, setting, batch, n), at, updates[n], generator))
        yield checked(f"{block.label}: ∂L/∂W and ∂L/∂b", "BP", bp.updates, error, KINKED)
    expected = reference.backward(setting.on_host(), setting.on_host().weights, host(setting.images),
                                  host(setting.batch.dlogits))  # fmt: skip
    yield checked("all parameters: BP by definition", "dz = D ⊙ ds, ds = dz Wᵀ", bp.updates,
                  updates_apart(exact(setting.batch), expected), PASS)  # fmt: skip


def updates_apart(actual: Updates, expected: Updates) -> float:
    """Return the largest `apart` of the updates of all weights and biases."""
    pairs = zip(actual, expected, strict=True)
    return worst(*(apart(a, b) for update, other in pairs for a, b in zip(update, other, strict=True)))


def _loss_from(setting: Setting, batch: Batch, first: int, weight: Array, bias: Array) -> float:
    """Return the change of the loss when a block's parameters change, with the network run on from that block."""
    network = setting.network
    weights, biases = [weight, *network.weights[first + 1 :]], [bias, *network.biases[first + 1 :]]
    rest = Network(network.blocks[first:], weights, biases)
    logits = batch.engine.forward(rest, batch.at(first).s, "audit").logits
    base, labels = host(batch.logits), host(setting.labels[: len(batch)])
    return reference.loss_change(setting.config.loss, host(logits), base, labels)


def copies(setting: Setting) -> Iterator[Check]:
    """Check n copies of the small batch, up to the run's batch size and so cut into more slices.

    With ∂L/∂logits copied, too, BP's updates are n times those of the small batch. The rule's own, with ∂L/∂logits of
    the copies, are 1, n or 1/n times its updates there, by what it sums or averages over.
    """
    small = setting.batch
    affordable = int(COPIES_FLOPS / (3 * sum(map(block_flops, setting.network.blocks))))
    times = max(2, min(setting.batch_size, affordable) // len(small))
    xp = array_module(setting.images)
    images, labels, dlogits = (
        xp.concatenate([array] * times) for array in (setting.images, setting.labels, small.dlogits)
    )
    large = replace(setting.pass_over(images=images, labels=labels), dlogits=dlogits)
    error = apart(large.logits, xp.concatenate([small.logits] * times))
    yield checked(f"logits of {times} copies of the batch", "a function of each sample", fast.forward, error, PASS)
    expected = [(times * weight, times * bias) for weight, bias in exact(small)]
    yield checked(f"updates of {times} copies of the batch", "sums over samples", bp.updates,
                  updates_apart(exact(large), expected), PASS)  # fmt: skip
    if setting.rule is bp.RULE:
        return
    # A batch of this size may be cut, solved for or inverted in a different way.
    own, larger = setting.propose(), setting.propose(setting.pass_over(images=images, labels=labels))
    error = min(
        updates_apart(larger, [(factor * weight, factor * bias) for weight, bias in own])
        for factor in (1, times, 1 / times)
    )
    yield checked(f"the rule's updates of {times} copies of the batch", "sums or means over samples",
                  setting.rule.updates or setting.rule.local_update, error, max(PASS, _room(setting, own)))  # fmt: skip


def _room(setting: Setting, updates: Updates) -> float:
    """Return how far rounding may move the updates of a rule that inverts: a multiple of the effect of rounded images.

    Inverses magnify rounding errors, the more so after the nudges of GAIT-prop's literal form; 0 for other rules.
    """
    if not setting.rule.inverts:
        return 0.0
    images = setting.put(np.nextafter(host(setting.images), np.inf))
    return ROUNDINGS * updates_apart(setting.propose(setting.pass_over(images=images)), updates)


def threads(setting: Setting) -> Iterator[Check]:
    """Check that the passes have the same bits on one thread and on three."""
    if not setting.experiment.plan.backend.on_host:
        return
    results = []
    for count in (1, 3):
        batch = setting.pass_over(threads=count)
        results.append([batch.logits, *(array for pair in exact(batch) for array in pair)])
    error = worst(*(float(np.abs(a - b).max()) for a, b in zip(*results, strict=True)))
    yield checked("one thread and three", "same bits", bp.updates, error, 0.0)


CHECKS = (losses, initial, initial_feedback, passes, backpropagation, copies, threads)
