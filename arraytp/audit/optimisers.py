"""Optimiser, regulariser and schedule of the config against closed forms, on arrays of the network's shapes."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from arraytp import optim
from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, ROUNDING, Check, Floats, apart, checked, host, inner, worst
from arraytp.audit.differences import gradient_error
from arraytp.audit.drift import drifted
from arraytp.audit.setting import Setting, fresh
from arraytp.backend import Array
from arraytp.fast.orthogonality import GramErrors, add_orthogonality, regularised
from arraytp.fast.parallel import Workspace
from arraytp.model.plain import PlainGramErrors
from arraytp.ops.conv import as_matrix
from arraytp.optim import at_block
from arraytp.options import Cosine, Staircase

STEPS = 2
# Rounding errors of the sum of a few steps, each the difference of numbers a million times larger.
SUMS = 1e-8
# Rates below this share of the initial learning rate are negligible.
FLOOR = 1e-6


def steps(setting: Setting) -> Iterator[Check]:
    """Check two steps of a run with random gradients, weight decay and regulariser included."""
    options, network, experiment = setting.config.optimizer, drifted(setting), fresh(setting)
    for own, array in zip(experiment.network.parameters(), network.parameters(), strict=True):
        own[...] = array
    decay = 0.0 if setting.rule.shared_decay is None else setting.rule.shared_decay(setting.options)
    theta, state = experiment.network.parameters(), optim.init_optimizer(options, network.parameters())
    experiment.optimizer_state = state
    start = [host(array).copy() for array in theta]
    regularised_weights = {2 * n for n in regularised(network.blocks, options.orthogonality_on)}
    expected, moments = [array.copy() for array in start], [[] for _ in start]  # type: ignore[var-annotated]
    # So that the last of the steps has the regulariser.
    before = state.step = max(options.orthogonality_every - STEPS, 0)
    for t in range(before + 1, before + STEPS + 1):
        gradients = [setting.normal(array.shape, 60, t, p) * 0.1 for p, array in enumerate(theta)]
        for p, g in enumerate(gradients):
            total = host(g)
            if t % options.orthogonality_every == 0 and p in regularised_weights:
                strength = options.orthogonality * options.orthogonality_every
                total = total + _regulariser(strength, expected[p])
            lr = expected_rate(setting.config.schedule, at_block(options.lr, p // 2), 0, t - 1)
            lost = decay * expected[p] if p % 2 == 0 and p // 2 in experiment.rule_state.weights else 0.0
            expected[p] = reference.optimiser_step(options, lr, p // 2, t, expected[p], total, moments[p]) - lost
        step = experiment.forward(setting.images, setting.labels)
        experiment.apply(step, list(zip(gradients[::2], gradients[1::2], strict=True)))
    formula = "v ← μv + g" if options.name == "sgd" else f"Adam, {options.epsilon_form}"
    for n, block in enumerate(network.blocks):
        error = worst(*(apart(host(theta[p]) - start[p], expected[p] - start[p]) for p in (2 * n, 2 * n + 1)))
        yield checked(f"{block.label}: {STEPS} steps of {options.name}", formula, optim.apply_updates, error, SUMS)
    # SGD without momentum keeps no moments.
    pairs = zip(state.moments, moments, strict=True)
    error = worst(*(apart(a, b) for kept, known in pairs for a, b in zip(kept, known, strict=False)))
    yield checked("number of steps and moments kept", "t, v | m, u", optim.apply_updates,
                  abs(state.step - before - STEPS) + error, SUMS)  # fmt: skip


def _regulariser(strength: float, theta: Floats) -> Floats:
    """Return λ·4(WWᵀ − I)W, which is λ·4W(WᵀW − I)."""
    w = theta.reshape(-1, theta.shape[-1])
    return (4 * strength * (w @ w.T @ w - w)).reshape(theta.shape)


def orthogonality(setting: Setting) -> Iterator[Check]:
    """Check E and the regulariser's gradient for every regularised block, with W drifted.

    The gradient is compared with finite differences of λ‖WWᵀ − I‖², or λ‖WᵀW − I‖² if W has more rows than columns.
    """
    strength, on = setting.config.optimizer.orthogonality, setting.config.optimizer.orthogonality_on
    if not strength:
        return
    network, workspace = drifted(setting, first=0), Workspace(setting.workspace.backend)
    gradients = [setting.put(np.zeros(weight.shape)) for weight in network.weights]
    errors = GramErrors(workspace, network)
    add_orthogonality(strength, network, gradients, errors, workspace, on)
    for n in regularised(network.blocks, on):
        block, w = network.blocks[n], host(as_matrix(network.weights[n]))

        def penalty(weight: Array) -> float:
            e = _excess(host(as_matrix(weight)))
            return strength * inner(e, e)

        error = gradient_error(penalty, network.weights[n], gradients[n], setting.generator(61, n), 1)
        yield checked(f"{block.label}: gradient of the regulariser", "4λ(WWᵀ − I)W", add_orthogonality, error,
                      DIFFERENCES)  # fmt: skip
        upper, plain = (np.triu(host(each.of([n])[n])) for each in (errors, PlainGramErrors(network)))
        expected = np.triu(_excess(w))
        error = worst(apart(upper, expected), apart(plain, expected))
        yield checked(f"{block.label}: E", "E = WWᵀ − I", GramErrors.of, error, SUMS)


def _excess(w: Floats) -> Floats:
    """Return WWᵀ − I, or WᵀW − I if that is smaller."""
    gram: Floats = w.T @ w if len(w) > w.shape[1] else w @ w.T
    return gram - np.eye(len(gram))


def schedule(setting: Setting) -> Iterator[Check]:
    """Check the learning rate in first, middle and last epochs and, for each, at several steps of the warm-up."""
    options, config = setting.config.schedule, setting.config
    length = options.t_max if isinstance(options, Cosine) else config.train.epochs
    epochs = {0, 1, length // 2, length, length + 5}
    if isinstance(options, Staircase):
        epochs |= {epoch + after for epoch in options.epochs for after in (-1, 0)}
    largest, end = 0.0, options.warmup_steps
    for epoch, step in product(sorted(epochs), sorted({0, end // 2, max(end - 1, 0), end, end + 3})):
        rates = optim.learning_rates(options, config.optimizer.lr, epoch, step)
        for n in range(len(setting.network)):
            lr = at_block(config.optimizer.lr, n)
            expected = expected_rate(options, lr, epoch, step)
            largest = worst(largest, abs(at_block(rates, n) - expected) / max(abs(expected), FLOOR * lr))
    yield checked(f"learning rates, {options.name}", f"schedule {options.name}", optim.learning_rate, largest, ROUNDING)


def expected_rate(options: optim.ScheduleOptions, lr: float, epoch: int, step: int) -> float:
    """Return the rate after so many epochs and steps of the run."""
    if isinstance(options, Cosine):
        lr = options.eta_min + (lr - options.eta_min) * math.cos(math.pi * epoch / (2 * options.t_max)) ** 2
    if isinstance(options, Staircase):
        for end in options.epochs:
            lr = lr / options.factor if epoch >= end else lr
    return lr * min(1, (step + 1) / max(options.warmup_steps, 1))


CHECKS = (steps, orthogonality, schedule)
