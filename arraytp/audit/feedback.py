"""Training of feedback weights: gradients of the losses, fast path against algorithm, noise, steps of the optimiser.

The rule trains its feedback on two batches, as a run does, and is watched: what it reports of each iteration is held
against the loss written out on arrays, its finite differences, and the optimiser's closed form.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, Check, Floats, apart, checked, host, worst
from arraytp.audit.differences import gradient_error
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.fast import feedback_training as fused_feedback
from arraytp.model import feedback
from arraytp.model.network import Block, Network
from arraytp.ops.noise import gaussian
from arraytp.optim import at_block
from arraytp.rules import drl, dtp, ldrl
from arraytp.rules.protocol import State

STEPS = 2
# DRL's noise may be 1e-5 of the activations, whose differences lose as many digits.
SUMS = 1e-9
FINE_NOISE = 1e-5


@dataclass(frozen=True)
class Seen:
    """What the rule said of one iteration, and its feedback weights before it."""

    step: int
    n: int
    k: int
    arrays: dict[str, Floats]
    weight: Floats
    bias: Floats | None


def training(setting: Setting) -> Iterator[Check]:
    """Check every iteration of feedback training that the rule does on a batch, twice."""
    if not setting.experiment.trains_feedback:
        return
    state = setting.state()
    seen = watch(setting, state)
    for n in dict.fromkeys(one.n for one in seen):
        mine = [one for one in seen if one.n == n]
        yield from _noise(setting, mine)
        if not getattr(setting.options, "expected", False):
            yield from _losses(setting, mine)
    yield from _steps(setting, seen, state)


def watch(setting: Setting, state: State) -> list[Seen]:
    """Let the rule train its feedback in `state` on the batch, as so many batches; return what it said."""
    seen: list[Seen] = []

    def observe(step: int, n: int, k: int, arrays: Mapping[str, Array]) -> None:
        bias = state.get(f"feedback/{n}/bias")
        found = {name: host(array).copy() for name, array in arrays.items()}
        weight = host(state[f"feedback/{n}/weight"]).copy()
        seen.append(Seen(step, n, k, found, weight, None if bias is None else host(bias).copy()))

    for step in range(STEPS):
        setting.experiment.rule.train_feedback(
            setting.options, state, setting.network, setting.passed, setting.config.seed, step, setting.workspace,
            partial(observe, step),
        )  # fmt: skip
    return seen


def _position(setting: Setting, n: int) -> int:
    """Return the place of block n in lists of the feedback's settings."""
    return n if setting.config.rule.name == "drl" else n - 1


def _noise(setting: Setting, seen: list[Seen]) -> Iterator[Check]:
    """Check that ε and η are the noise of their keys, the whole batch drawn at once, and that no key comes twice."""
    n, label = seen[0].n, setting.network.blocks[seen[0].n].label
    noises = len(seen) // STEPS
    sigma, largest, drawn = at_block(setting.options.feedback.sigma, _position(setting, n)), 0.0, 0
    for one in seen:
        for which, name in enumerate(("epsilon", "eta")):
            if name in one.arrays:
                array = one.arrays[name]
                key = (setting.config.seed, one.step, n, one.k, which)
                wanted = host(gaussian(setting.put(np.empty_like(array)), sigma, 0, *key))
                largest, drawn = worst(largest, float(np.abs(array - wanted).max())), drawn + 1
    if drawn and [(one.step, one.k) for one in seen] != [(step, k) for step in range(STEPS) for k in range(noises)]:
        largest = math.inf
    if drawn:
        yield checked(f"{label}: noise by its keys", "ε, η ~ N(0, σ²)", gaussian, largest, 0.0)


def _losses(setting: Setting, seen: list[Seen]) -> Iterator[Check]:
    """Check gradients and losses of a block's iterations against the loss written out."""
    n, block = seen[0].n, setting.network.blocks[seen[0].n]
    find = {"drl": _drl_loss, "dtp": _dtp_loss, "tp": _dtp_loss}.get(setting.config.rule.name, _ldrl_loss)
    fast, plain, source = {
        "drl": (drl.iteration, drl.iteration, "DRL, Algorithm 2"),
        "dtp": (fused_feedback.reconstruction_gradient, dtp.iteration, "DTP, Algorithm 1"),
        "tp": (fused_feedback.reconstruction_gradient, dtp.iteration, "DTP, Algorithm 1"),
    }.get(setting.config.rule.name, (fused_feedback.ldrl_gradient, ldrl.iteration, "L-DRL, Algorithm 3"))
    sigma = at_block(setting.options.feedback.sigma, _position(setting, n))
    # Rounding of ŷ is to be seen against differences as small as the noise.
    room = max(1.0, FINE_NOISE / sigma * 1e3) if setting.config.rule.name == "drl" else 1.0
    generator, slopes, values, paths = setting.generator(30, n), 0.0, 0.0, 0.0
    for one in seen:
        if plain is not fast:
            paths = worst(paths, _path_error(setting, one))
    # The loss is the same function of ω in every iteration.
    for one in (seen[0], seen[-1]):
        loss = find(setting, one)
        value = loss(one.weight, one.bias)
        values = worst(values, abs(float(one.arrays["loss"]) - value) / max(abs(value), 1e-300))
        slopes = worst(slopes, gradient_error(partial(_of_weight, loss, one.bias), one.weight, one.arrays["gradient"],
                                            generator, 1))  # fmt: skip
        if "gradient_bias" in one.arrays and one.bias is not None:
            slopes = worst(slopes, gradient_error(partial(loss, one.weight), one.bias, one.arrays["gradient_bias"],
                                                generator, 1))  # fmt: skip
    yield checked(f"{block.label}: gradient of the feedback loss", source, fast, slopes, DIFFERENCES * room)
    yield checked(f"{block.label}: feedback loss", source, fast, values, SUMS * room)
    if plain is not fast:
        yield checked(f"{block.label}: fast path against the algorithm", source, plain, paths, SUMS)


def _of_weight(loss: Callable[[Floats, Floats | None], float], bias: Floats | None, weight: Floats) -> float:
    return loss(weight, bias)


def _theta(setting: Setting, n: int) -> tuple[Block, Floats, Floats, Floats]:
    """Return block, θ, its bias and s^n on the host."""
    block = setting.network.blocks[n]
    x = host(setting.passed.x[n]).reshape(-1, *block.in_shape)
    return block, host(setting.network.weights[n]), host(setting.network.biases[n]), x


def feedback_input(block: Block, t: Floats, index: Any, unpool: str) -> Floats:
    """Return f(unpool(t))."""
    u = t if block.pool is None else reference.unpool(t, index, block.pool, unpool)
    return reference.activation(u, block.activation)


def _ldrl_loss(setting: Setting, one: Seen) -> Callable[[Floats, Floats | None], float]:
    """−2 ε·(G(F(s + ε)) − G(s')) + ‖G(s' + η) − G(s')‖², mean over the batch: twice Eq. 13."""
    block, theta, bias, s = _theta(setting, one.n)
    unpool, epsilon, eta = setting.options.unpool, one.arrays["epsilon"].reshape(s.shape), one.arrays["eta"]
    _, after, index = reference.block_forward(block, theta, bias, s)
    _, noisy, noisy_index = reference.block_forward(block, theta, bias, s + epsilon)
    inputs = [feedback_input(block, t, i, unpool) for t, i in
              ((after, index), (noisy, noisy_index), (after + eta.reshape(after.shape), index))]  # fmt: skip

    def loss(weight: Floats, _: Floats | None) -> float:
        g, g_epsilon, g_eta = (reference.carry(block, weight, a) for a in inputs)
        return float((-2 * (epsilon * (g_epsilon - g)).sum() + ((g_eta - g) ** 2).sum()) / len(s))

    return loss


def _dtp_loss(setting: Setting, one: Seen) -> Callable[[Floats, Floats | None], float]:
    """‖s + ε − G(F(s + ε))‖², mean over the batch."""
    block, theta, bias, s = _theta(setting, one.n)
    noisy = s + one.arrays["epsilon"].reshape(s.shape)
    _, after, index = reference.block_forward(block, theta, bias, noisy)
    a = feedback_input(block, after, index, setting.options.unpool)

    def loss(weight: Floats, omega_bias: Floats | None) -> float:
        r = reference.carry(block, weight, a) + (0 if omega_bias is None else omega_bias)
        return float(((noisy - r) ** 2).sum() / len(s))

    return loss


def _drl_loss(setting: Setting, one: Seen) -> Callable[[Floats, Floats | None], float]:
    """Mean of ((Q ŷ_ε + s − Q ŷ) − (s + ε))² over σ²."""
    there, n = setting.on_host(), one.n + 1
    sigma = at_block(setting.options.feedback.sigma, one.n)
    rest = Network(there.blocks[n:], there.weights[n:], there.biases[n:])
    s = host(setting.passed.x[n])
    epsilon = one.arrays["epsilon"].reshape(s.shape)
    _, noisy, _ = reference.forward(rest, s + epsilon)
    _, clean, _ = reference.forward(rest, s)
    moved = noisy[-1] - clean[-1]

    def loss(weight: Floats, _: Floats | None) -> float:
        residual = moved @ weight - epsilon.reshape(len(s), -1)
        return float(np.mean(residual**2) / sigma**2)

    return loss


def _path_error(setting: Setting, one: Seen) -> float:
    """Return how far the plain iteration's gradient and loss are from what the rule's fast path reported."""
    block, theta, bias, s = _theta(setting, one.n)
    put, unpool = setting.put, setting.options.unpool
    omega = put(one.weight), put(np.zeros(block.in_shape[-1:]) if one.bias is None else one.bias)
    epsilon = put(one.arrays["epsilon"].reshape(s.shape))
    if "eta" in one.arrays:
        eta = put(one.arrays["eta"].reshape(-1, *block.out_shape))
        found = ldrl.iteration(block, (put(theta), put(bias)), omega, put(s), epsilon, eta, unpool)
        wanted: tuple[Floats, ...] = one.arrays["gradient"], one.arrays["loss"]
    else:
        found = dtp.iteration(block, (put(theta), put(bias)), omega, put(s), epsilon, unpool)  # type: ignore[assignment]
        wanted = one.arrays["gradient"], one.arrays["gradient_bias"], one.arrays["loss"]
    return worst(*(apart(a, b) for a, b in zip(found, wanted, strict=True)))


def _steps(setting: Setting, seen: list[Seen], state: State) -> Iterator[Check]:
    """Check ω after every iteration, from the reported gradients by the optimiser's closed form."""
    noises = getattr(setting.options, "samples", 1)
    optimizer = setting.options.feedback.optimizer
    for n in dict.fromkeys(one.n for one in seen):
        mine, position, largest = [one for one in seen if one.n == n], _position(setting, n), 0.0
        lr, moments = at_block(optimizer.lr, position), {"weight": [], "bias": []}  # type: ignore[var-annotated]
        groups = [mine[start : start + noises] for start in range(0, len(mine), noises)]
        for t, group in enumerate(groups, start=1):
            later = groups[t][0] if t < len(groups) else None
            for part, name in (("weight", "gradient"), ("bias", "gradient_bias")):
                before = getattr(group[0], part)
                if name not in group[0].arrays or before is None:
                    continue
                gradient = np.mean([one.arrays[name] for one in group], axis=0)
                after = host(state[f"feedback/{n}/{part}"]) if later is None else getattr(later, part)
                wanted = reference.optimiser_step(optimizer, lr, position, t, before, gradient, moments[part])
                # Of the step, not of the weight that it moves a little.
                largest = worst(largest, apart(after - before, wanted - before))
        label = setting.network.blocks[n].label
        yield checked(f"{label}: steps of the feedback optimiser", type(optimizer).__name__, feedback.step_feedback,
                      largest, STEP_ROUNDING)  # fmt: skip


# A step is what is left of two weights that may be a million times larger.
STEP_ROUNDING = 1e-8
CHECKS = (training,)
