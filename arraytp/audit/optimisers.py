"""Optimiser, regulariser and schedule of the config against closed forms, on arrays of the network's shapes."""

import math
from collections.abc import Iterator

import numpy as np

from arraytp import optim
from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, ROUNDING, Check, Floats, apart, checked, host, inner, worst
from arraytp.audit.differences import gradient_error
from arraytp.audit.gait_prop import drift
from arraytp.audit.setting import Setting
from arraytp.fast.orthogonality import add_orthogonality
from arraytp.fast.parallel import Workspace
from arraytp.ops.conv import as_matrix
from arraytp.optim import at_block
from arraytp.options import Cosine
from arraytp.training.experiment import parameters

STEPS = 2
# Of the sums of a few steps, each the difference of numbers a million times larger.
SUMS = 1e-8


def steps(setting: Setting) -> Iterator[Check]:
    """Check two steps with random gradients, weight decay and regulariser included."""
    options, there = setting.config.optimizer, drift(setting)
    theta = [array.copy() for array in parameters(there)]
    start = [host(array).copy() for array in theta]
    wanted, moments = [array.copy() for array in start], [[] for _ in start]  # type: ignore[var-annotated]
    state, workspace = optim.init_optimizer(options, theta), Workspace(setting.workspace.backend)
    rates = optim.learning_rates(setting.config.schedule, options.lr, 0)
    for t in range(1, STEPS + 1):
        gradients = [setting.normal(array.shape, 60, t, p) * 0.1 for p, array in enumerate(theta)]
        kept = [host(g).copy() for g in gradients]
        optim.apply_updates(options, rates, state, theta, gradients, workspace)
        for p, g in enumerate(kept):
            total = g + _regulariser(options.orthogonality, wanted[p]) if options.orthogonality else g
            lr = at_block(options.lr, p // 2)
            wanted[p] = reference.optimiser_step(options, lr, p // 2, t, wanted[p], total, moments[p])
    for n, block in enumerate(there.blocks):
        error = worst(*(apart(host(theta[p]) - start[p], wanted[p] - start[p]) for p in (2 * n, 2 * n + 1)))
        yield checked(f"{block.label}: {STEPS} steps of {options.name}", _formula(setting), optim.apply_updates, error,
                      SUMS)  # fmt: skip
    yield checked("number of steps and moments kept", "t, v | m, u", optim.apply_updates,
                  abs(state.step - STEPS) + _moments_error(state.moments, moments), SUMS)  # fmt: skip


def _formula(setting: Setting) -> str:
    options = setting.config.optimizer
    return "v ← μv + g" if options.name == "sgd" else f"Adam, {options.epsilon_form}"


def _moments_error(found: list[tuple[object, ...]], wanted: list[list[Floats]]) -> float:
    """Return how far moments are from the closed forms'; SGD without momentum keeps none."""
    pairs = [(a, b) for mine, other in zip(found, wanted, strict=True) for a, b in zip(mine, other, strict=False)]
    return worst(*(apart(a, b) for a, b in pairs))


def _regulariser(strength: float, theta: Floats) -> Floats:
    """Return λ·4(WWᵀ − I)W of a square W, else 0."""
    w = theta.reshape(-1, theta.shape[-1]) if theta.ndim > 1 else theta[None]
    if w.shape[0] != w.shape[1] or theta.ndim == 1:
        return np.zeros_like(theta)
    return (4 * strength * (w @ w.T @ w - w)).reshape(theta.shape)


def orthogonality(setting: Setting) -> Iterator[Check]:
    """Check the regulariser's gradient of every square block against finite differences of λ‖WWᵀ − I‖², W drifted."""
    strength = setting.config.optimizer.orthogonality
    if not strength:
        return
    there = drift(setting)
    theta = parameters(there)
    found = [setting.put(np.zeros(array.shape)) for array in theta]
    add_orthogonality(strength, theta, found, Workspace(setting.workspace.backend))
    for n, block in enumerate(there.blocks):
        if not block.is_square:
            continue
        eye = setting.put(np.eye(block.weight_shape[-1]))

        def penalty(weight: object, eye: object = eye) -> float:
            w = as_matrix(weight)
            excess = w @ w.T - eye
            return strength * inner(excess, excess)

        error = gradient_error(penalty, there.weights[n], found[2 * n], setting.generator(61, n), 1)
        yield checked(f"{block.label}: gradient of the regulariser", "4λ(WWᵀ − I)W", add_orthogonality, error,
                      DIFFERENCES)  # fmt: skip


def schedule(setting: Setting) -> Iterator[Check]:
    """Check the learning rate of the first, the middle and the last epochs."""
    options, config = setting.config.schedule, setting.config
    length = options.t_max if isinstance(options, Cosine) else config.train.epochs
    largest = 0.0
    for epoch in sorted({0, 1, length // 2, length, length + 5}):
        found = optim.learning_rates(options, config.optimizer.lr, epoch)
        for n in range(len(setting.network)):
            lr = at_block(config.optimizer.lr, n)
            wanted = lr
            if isinstance(options, Cosine):
                wanted = options.eta_min + (lr - options.eta_min) * math.cos(math.pi * epoch / (2 * options.t_max)) ** 2
            largest = worst(largest, abs(at_block(found, n) - wanted) / max(abs(wanted), options_floor(lr)))
    yield checked(f"learning rates, {options.name}", f"schedule {options.name}", optim.learning_rate, largest, ROUNDING)


def options_floor(lr: float) -> float:
    """Return what is nothing beside a learning rate."""
    return 1e-6 * lr


CHECKS = (steps, orthogonality, schedule)
