"""Training of feedback weights by noise: every gradient and loss, the noise itself, the optimiser's steps.

The rule trains its feedback on two batches, as in a run, while its iterations are recorded. The reported gradients are
checked against finite differences of the reported loss, with ω moved and the same noise; gradients, losses and noises
against the plain engine; gradients and losses against the loss's definition where `arraytp.audit.definitions` has it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, Check, Floats, apart, checked, host, worst
from arraytp.audit.definitions import FEEDBACK_LOSSES
from arraytp.audit.differences import gradient_errors
from arraytp.audit.gradients import COPIES_FLOPS
from arraytp.audit.setting import Setting
from arraytp.backend import Array, array_module
from arraytp.fast.device import fast_engine
from arraytp.model.blocks import block_flops
from arraytp.model.passes import Batch
from arraytp.ops.noise import gaussian
from arraytp.optim import at_block
from arraytp.rules import feedback
from arraytp.rules.protocol import Feedback, Iterating, Iteration, State

SUMS = 1e-9
# Noise may be 1e-5 of the activations, whose differences lose as many digits.
FINE_NOISE = 1e-5
# A step is the difference of two weights that may be a million times larger.
STEP_ROUNDING = 1e-8
# Written out, not imported: the last part of the keys of ε and η.
NOISES = {"epsilon": 0, "eta": 1}
BATCHES = 2
# The parts of the state, and the names under which their gradients are reported.
PARTS = {"weight": "gradient", "bias": "gradient_bias"}


@dataclass(frozen=True)
class Observed:
    """What the rule reported of one iteration: batch `number`, block n, iteration k, and `arrays` as in `Observe`.

    `weight` and `bias` (None without one) are ω^n and its bias before the iteration, `state` all feedback weights
    before the block's first iteration on this batch.
    """

    number: int
    n: int
    k: int
    arrays: dict[str, Floats]
    weight: Floats
    bias: Floats | None
    state: State


def in_closed_form(setting: Setting) -> bool:
    """Tell whether the settings ask for the expectation in closed form in place of noise."""
    trained = setting.rule.feedback
    return trained is not None and trained.closed_form is not None and trained.expected(setting.options)


def watch(setting: Setting, trained: Feedback[Any], state: State) -> list[list[Observed]]:
    """Let the rule train its feedback in `state` on `BATCHES` batches; return all iterations, per trained block."""
    observed: list[Observed] = []

    def observe(number: int, n: int, k: int, arrays: Mapping[str, Array]) -> None:
        former = observed[-1] if observed else None
        begun = former is not None and (former.number, former.n) == (number, n)
        before = former.state if former is not None and begun else state.copy()
        copies = {name: host(array).copy() for name, array in arrays.items()}
        weight, bias = host(state.weights[n]).copy(), host(state.biases[n]).copy() if n in state.biases else None
        observed.append(Observed(number, n, k, copies, weight, bias, before))

    for number in range(BATCHES):
        batch = replace(setting.batch, number=number)
        feedback.train(trained, setting.options, state, batch, setting.workspace, partial(observe, number))
    return [[one for one in observed if one.n == n] for n in dict.fromkeys(one.n for one in observed)]


def training(setting: Setting) -> Iterator[Check]:
    """Check every iteration of the rule's feedback training on two batches."""
    trained = setting.rule.feedback
    if trained is None or in_closed_form(setting):
        return
    state = setting.state()
    for of_block in watch(setting, trained, state):
        n, noises = of_block[0].n, getattr(setting.options, "samples", None) or trained.noises(setting.options)
        wanted = BATCHES * int(at_block(trained.settings(setting.options).iterations, n - 1)) * noises
        yield checked(f"{_label(setting, of_block)}: iterations and noises, less the config's", "rule.feedback",
                      feedback.train, abs(len(of_block) - wanted), 0.0)  # fmt: skip
        yield from _noise(setting, trained, of_block)
        yield from _reported(setting, trained, of_block)
        yield from _defined(setting, trained, of_block)
        yield from _steps(setting, trained, of_block, state)


def _label(setting: Setting, of_block: list[Observed]) -> str:
    return setting.network.blocks[of_block[0].n].label


def _sigma(setting: Setting, trained: Feedback[Any], n: int) -> float:
    return at_block(trained.settings(setting.options).sigma, n - 1)


def _room(setting: Setting, trained: Feedback[Any], n: int) -> float:
    """Return the factor by which small noise magnifies the rounding of s and ŷ, whose differences are as small."""
    return max(1.0, FINE_NOISE / _sigma(setting, trained, n) * 1e3)


def _noise(setting: Setting, trained: Feedback[Any], of_block: list[Observed]) -> Iterator[Check]:
    """Check that ε and η are the noise of their keys, drawn for the whole batch at once, and that no key repeats."""
    n, count, drawn, largest = of_block[0].n, len(of_block) // BATCHES, 0, 0.0
    sigma = _sigma(setting, trained, n)
    for one in of_block:
        for name in NOISES.keys() & one.arrays.keys():
            array = one.arrays[name]
            key = (setting.config.seed, one.number, trained.noise_key(n), one.k, NOISES[name])
            expected = host(gaussian(setting.put(np.empty_like(array)), sigma, 0, *key))
            largest, drawn = worst(largest, float(np.abs(array - expected).max())), drawn + 1
    if not drawn:
        return
    if [(one.number, one.k) for one in of_block] != [(number, k) for number in range(BATCHES) for k in range(count)]:
        largest = math.inf
    yield checked(f"{_label(setting, of_block)}: noise by its keys", "ε, η ~ N(0, σ²)", gaussian, largest, 0.0)


def _reported(setting: Setting, trained: Feedback[Any], of_block: list[Observed]) -> Iterator[Check]:
    """Check gradients against differences of the reported loss, and the fast engine against the plain one."""
    label, n, count = _label(setting, of_block), of_block[0].n, len(of_block) // BATCHES
    # An engine with arrays of its own.
    fast = replace(setting.batch, engine=fast_engine(setting.workspace.backend))

    def iterating(batch: Batch, one: Observed) -> Iterating:
        sigma = _sigma(setting, trained, n)
        return trained.begin(setting.options, replace(batch, number=one.number).at(n), sigma, count)

    slopes = worst(*(_slope_error(setting, iterating(fast, one), one) for one in _chosen(of_block)))
    engines = worst(*(_engine_error(setting, iterating(setting.plain, one), one) for one in of_block))
    yield checked(f"{label}: feedback gradient by differences of the reported loss", "∂loss/∂ω, the same noise",
                  trained.begin, slopes, DIFFERENCES)  # fmt: skip
    yield checked(f"{label}: feedback gradient and loss, fast engine against plain", "the same", trained.begin, engines,
                  SUMS * _room(setting, trained, n))  # fmt: skip


def _chosen(of_block: list[Observed]) -> list[Observed]:
    """Return the first and the last iteration on every batch: these are all unless a step takes several noises."""
    count = len(of_block) // BATCHES
    return [of_block[i] for i in sorted({number * count + k for number in range(BATCHES) for k in (0, count - 1)})]


def _repeated(iterating: Iterating, one: Observed, weight: Array, bias: Array | None) -> Iteration:
    """Run an observed iteration again, with another ω^n and bias."""
    state = State(dict(one.state.weights), dict(one.state.biases))
    state.weights[one.n] = weight
    if bias is not None:
        state.biases[one.n] = bias
    return iterating(state, one.k, True)


def _slope_error(setting: Setting, iterating: Iterating, one: Observed) -> float:
    """Return how far the reported gradients are from differences of the loss that repeated iterations report."""

    def loss(weight: Array, bias: Array | None) -> float:
        value = _repeated(iterating, one, weight, bias).loss
        return math.nan if value is None else float(value)

    return _slopes(loss, one, setting.put, setting.generator(30, one.n))


def _slopes(
    loss: Callable[[Any, Any], float], one: Observed, put: Callable[[Floats], Array], generator: np.random.Generator
) -> float:
    """Return how far the reported gradients of ω and, where it has one, its bias are from differences of a loss."""
    bias = None if one.bias is None else put(one.bias)
    at, gradients = [put(one.weight)], [put(one.arrays["gradient"])]
    if bias is not None and "gradient_bias" in one.arrays:
        at, gradients = [*at, bias], [*gradients, put(one.arrays["gradient_bias"])]
    return worst(*gradient_errors(lambda weight, b=bias: loss(weight, b), at, gradients, generator, 1))


def _engine_error(setting: Setting, plain: Iterating, one: Observed) -> float:
    """Return how far gradients, loss and noises of the plain engine's iteration are from the reported ones."""
    bias = None if one.bias is None else setting.put(one.bias)
    result = _repeated(plain, one, setting.put(one.weight), bias)
    arrays = {PARTS[part]: gradient for part, gradient in result.gradients.items()} | dict(result.noises)
    errors = [apart(one.arrays[name], array) for name, array in arrays.items()]
    return worst(*errors, math.nan if result.loss is None else apart(one.arrays["loss"], result.loss))


def _defined(setting: Setting, trained: Feedback[Any], of_block: list[Observed]) -> Iterator[Check]:
    """Check gradients and losses against the loss written out, where it is known."""
    if trained.begin not in FEEDBACK_LOSSES:
        return
    source, define = FEEDBACK_LOSSES[trained.begin]
    label, n, values, slopes = _label(setting, of_block), of_block[0].n, 0.0, 0.0
    room, generator = _room(setting, trained, n), setting.generator(31, n)
    # The loss is the same function of ω in every iteration.
    for one in (of_block[0], of_block[-1]):
        loss = define(setting, n, one.arrays)
        value = loss(one.weight, one.bias)
        values = worst(values, abs(float(one.arrays["loss"]) - value) / max(abs(value), 1e-300))
        slopes = worst(slopes, _slopes(loss, one, lambda array: array, generator))
    yield checked(f"{label}: feedback gradient by definition", source, trained.begin, slopes, DIFFERENCES * room)
    yield checked(f"{label}: feedback loss by definition", source, trained.begin, values, SUMS * room)


def _steps(setting: Setting, trained: Feedback[Any], of_block: list[Observed], state: State) -> Iterator[Check]:
    """Check ω after every step against the optimiser's formula applied to the reported gradients."""
    noises, optimizer = trained.noises(setting.options), trained.settings(setting.options).optimizer
    n, largest = of_block[0].n, 0.0
    lr, stored = at_block(optimizer.lr, n - 1), {"weight": state.weights, "bias": state.biases}
    moments: dict[str, list[Floats]] = {part: [] for part in PARTS}
    groups = [of_block[start : start + noises] for start in range(0, len(of_block), noises)]
    for t, group in enumerate(groups, start=1):
        for part, name in PARTS.items():
            before = getattr(group[0], part)
            if before is None:
                continue
            after = getattr(groups[t][0], part) if t < len(groups) else host(stored[part][n])
            assert after is not None
            if name not in group[0].arrays:
                # A part without a gradient stays as it is.
                largest = worst(largest, apart(after, before))
                continue
            gradient = np.mean([one.arrays[name] for one in group], axis=0)
            expected = reference.optimiser_step(optimizer, lr, n - 1, t, before, gradient, moments[part])
            # Relative to the step, not to the much larger weight.
            largest = worst(largest, apart(after - before, expected - before))
    yield checked(f"{_label(setting, of_block)}: steps of the feedback optimiser", type(optimizer).__name__,
                  feedback.step_feedback, largest, STEP_ROUNDING)  # fmt: skip


def copies(setting: Setting) -> Iterator[Check]:
    """Check an iteration on copies of the small batch, up to the run's batch size, which are cut into more slices."""
    trained = setting.rule.feedback
    if trained is None or in_closed_form(setting):
        return
    state, count = setting.state(), len(setting.batch)
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        affordable = int(COPIES_FLOPS / (8 * block_flops(block)))
        times = max(2, min(setting.batch_size, affordable) // count)
        xp = array_module(setting.images)
        images, labels = (xp.concatenate([array] * times) for array in (setting.images, setting.labels))
        fast = setting.pass_over(images=images, labels=labels)
        results = []
        for batch in (fast, replace(fast, engine=setting.plain.engine)):
            result = trained.begin(setting.options, batch.at(n), _sigma(setting, trained, n), 1)(state, 0, True)
            loss = np.array(math.nan if result.loss is None else float(result.loss))
            results.append([*(gradient.copy() for gradient in result.gradients.values()), loss])
        error = worst(*(apart(a, b) for a, b in zip(*results, strict=True)))
        yield checked(f"{block.label}: feedback gradient of {times * count} samples, fast engine against plain",
                      "sums over samples", trained.begin, error, SUMS * _room(setting, trained, n))  # fmt: skip


CHECKS = (training, copies)
