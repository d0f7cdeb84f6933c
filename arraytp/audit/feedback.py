"""Training of feedback weights by noise: gradients, fast engine against plain engine, noise, steps of the optimiser.

The rule trains its feedback on two batches, as a run does, and is watched. What it reports of each iteration is held
against finite differences of the loss that it reports itself, with ω moved and the same noise, and against the plain
engine; where the loss's definition is known (`arraytp.audit.definitions`), against that, too.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, Check, Floats, apart, checked, host, worst
from arraytp.audit.definitions import FEEDBACK_LOSSES, Loss
from arraytp.audit.differences import gradient_error
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.fast.parallel import Workspace
from arraytp.model.passes import Batch
from arraytp.ops.noise import EPSILON, ETA, gaussian
from arraytp.optim import at_block
from arraytp.rules import feedback
from arraytp.rules.protocol import Feedback, Iterating, Iteration, State

STEPS = 2
SUMS = 1e-9
# Noise may be 1e-5 of the activations, whose differences lose as many digits.
FINE_NOISE = 1e-5
# A step is what is left of two weights that may be a million times larger.
STEP_ROUNDING = 1e-8
NOISES = {"epsilon": EPSILON, "eta": ETA}
PARTS = {"weight": "gradient", "bias": "gradient_bias"}


@dataclass(frozen=True)
class Observed:
    """What the rule reported of one iteration, and its feedback weights before it.

    Parameters
    ----------
    number : int
        Of the batch.
    n, k : int
        Block and iteration.
    arrays : map of name to array
        As `arraytp.rules.protocol.Observe` is told.
    weight, bias : arrays
        ω^n and its bias, None without one.
    state : State
        All feedback weights before the block's first iteration on this batch.
    """

    number: int
    n: int
    k: int
    arrays: dict[str, Floats]
    weight: Floats
    bias: Floats | None
    state: State

    def part(self, name: str) -> Floats | None:
        """Return `weight` or `bias`."""
        return self.weight if name == "weight" else self.bias


def trained_by_noise(setting: Setting) -> Feedback | None:
    """Return how the rule trains its feedback, None if it does not, or in closed form."""
    trained = setting.rule.feedback
    return None if trained is None or in_closed_form(setting) else trained


def in_closed_form(setting: Setting) -> bool:
    """Tell whether the settings ask for the expectation in closed form in place of noise."""
    trained = setting.rule.feedback
    return trained is not None and trained.closed_form is not None and trained.expected(setting.options)


def training(setting: Setting) -> Iterator[Check]:
    """Check every iteration of feedback training that the rule does on a batch, twice."""
    trained = trained_by_noise(setting)
    if trained is None:
        return
    state = setting.state()
    observed = watch(setting, trained, state)
    for n in dict.fromkeys(one.n for one in observed):
        of_block = [one for one in observed if one.n == n]
        yield from _noise(setting, trained, of_block)
        yield from _reported(setting, trained, of_block)
        yield from _defined(setting, trained, of_block)
        yield from _steps(setting, trained, of_block, state)


def watch(setting: Setting, trained: Feedback, state: State) -> list[Observed]:
    """Let the rule train its feedback in `state` on the batch, as so many batches; return what it reported."""
    observed: list[Observed] = []

    def observe(number: int, n: int, k: int, arrays: Mapping[str, Array]) -> None:
        bias = state.biases.get(n)
        former = observed[-1] if observed else None
        same = former is not None and (former.number, former.n) == (number, n)
        before = former.state if former is not None and same else state.copy()
        copies = {name: host(array).copy() for name, array in arrays.items()}
        weight = host(state.weights[n]).copy()
        observed.append(Observed(number, n, k, copies, weight, None if bias is None else host(bias).copy(), before))

    for number in range(STEPS):
        batch = _numbered(setting.batch, number)
        feedback.train(trained, setting.options, state, batch, setting.workspace, partial(observe, number))
    return observed


def _numbered(batch: Batch, number: int) -> Batch:
    """Return the batch as the one before which feedback was trained on `number` others."""
    return Batch(batch.engine, batch.network, batch.forward, batch.dlogits, batch.seed, number, batch.results)


def _label(setting: Setting, of_block: list[Observed]) -> str:
    return setting.network.blocks[of_block[0].n].label


def _sigma(setting: Setting, trained: Feedback, n: int) -> float:
    return at_block(trained.settings(setting.options).sigma, n - 1)


def _noise(setting: Setting, trained: Feedback, of_block: list[Observed]) -> Iterator[Check]:
    """Check that ε and η are the noise of their keys, the whole batch drawn at once, and that no key comes twice."""
    n, count, drawn, largest = of_block[0].n, len(of_block) // STEPS, 0, 0.0
    sigma = _sigma(setting, trained, n)
    for one in of_block:
        for name in NOISES.keys() & one.arrays.keys():
            array = one.arrays[name]
            key = (setting.config.seed, one.number, trained.noise_key(n), one.k, NOISES[name])
            expected = host(gaussian(setting.put(np.empty_like(array)), sigma, 0, *key))
            largest, drawn = worst(largest, float(np.abs(array - expected).max())), drawn + 1
    if not drawn:
        return
    if [(one.number, one.k) for one in of_block] != [(number, k) for number in range(STEPS) for k in range(count)]:
        largest = math.inf
    yield checked(f"{_label(setting, of_block)}: noise by its keys", "ε, η ~ N(0, σ²)", gaussian, largest, 0.0)


def _reported(setting: Setting, trained: Feedback, of_block: list[Observed]) -> Iterator[Check]:
    """Check gradients against differences of the reported loss, on both engines; the engines against each other."""
    label, n = _label(setting, of_block), of_block[0].n
    room = max(1.0, FINE_NOISE / _sigma(setting, trained, n) * 1e3)
    slopes, plain_slopes, engines = 0.0, 0.0, 0.0
    for one in of_block:
        engines = worst(engines, _engine_error(_iterating(setting, trained, setting.plain, one), one))
    for one in _chosen(of_block):
        slopes = worst(slopes, _slope_error(setting, _iterating(setting, trained, _apart(setting), one), one))
    first = of_block[0]
    plain_slopes = _slope_error(setting, _iterating(setting, trained, setting.plain, first), first)
    yield checked(f"{label}: gradient of the reported feedback loss", "∂loss/∂ω, same noise", trained.begin, slopes,
                  DIFFERENCES)  # fmt: skip
    yield checked(f"{label}: gradient of the plain engine's feedback loss", "∂loss/∂ω, same noise", trained.begin,
                  plain_slopes, DIFFERENCES * room)  # fmt: skip
    yield checked(f"{label}: feedback gradient and loss, fast engine against plain", "the same", trained.begin, engines,
                  SUMS * room)  # fmt: skip


def _chosen(of_block: list[Observed]) -> list[Observed]:
    """Return the first and the last iteration on every batch: all of them unless a step takes several noises."""
    count = len(of_block) // STEPS
    return [of_block[i] for i in sorted({number * count + k for number in range(STEPS) for k in (0, count - 1)})]


def _apart(setting: Setting) -> Batch:
    """Return the pass with an engine of its own, so that no array of the rule's is overwritten."""
    batch = setting.batch
    return Batch(type(setting.experiment.engine)(Workspace(setting.workspace.backend)), batch.network, batch.forward,
                 batch.dlogits, batch.seed)  # fmt: skip


def _iterating(setting: Setting, trained: Feedback, batch: Batch, one: Observed) -> Iterating:
    """Return what repeats iterations on the block and batch of an observed one."""
    at, count = _numbered(batch, one.number).at(one.n), one.k + 1
    return trained.begin(setting.options, at, _sigma(setting, trained, one.n), count)


def _repeated(setting: Setting, iterating: Iterating, one: Observed, weight: Array, bias: Array | None) -> Iteration:
    """Run an observed iteration again, with another ω^n and bias."""
    state = State(dict(one.state.weights), dict(one.state.biases))
    state.weights[one.n] = weight
    if bias is not None:
        state.biases[one.n] = bias
    return iterating(state, one.k, True)


def _parameters(setting: Setting, one: Observed) -> tuple[Array, Array | None]:
    return setting.put(one.weight), None if one.bias is None else setting.put(one.bias)


def _slope_error(setting: Setting, iterating: Iterating, one: Observed) -> float:
    """Return how far the observed gradients are from differences of the loss of the repeated iteration."""
    weight, bias = _parameters(setting, one)
    generator = setting.generator(30, one.n)

    def of_weight(omega: Array) -> float:
        return _loss(_repeated(setting, iterating, one, omega, bias))

    def of_bias(omega_bias: Array) -> float:
        return _loss(_repeated(setting, iterating, one, weight, omega_bias))

    error = gradient_error(of_weight, weight, setting.put(one.arrays["gradient"]), generator, 1)
    if "gradient_bias" in one.arrays and bias is not None:
        gradient = setting.put(one.arrays["gradient_bias"])
        error = worst(error, gradient_error(of_bias, bias, gradient, generator, 1))
    return error


def _loss(iteration: Iteration) -> float:
    assert iteration.loss is not None
    return float(iteration.loss)


def _engine_error(plain: Iterating, one: Observed) -> float:
    """Return how far gradients, loss and noises of the plain engine's iteration are from the observed ones."""
    state = State(dict(one.state.weights), dict(one.state.biases))
    xp_like = state.weights[one.n]
    state.weights[one.n] = _like(xp_like, one.weight)
    if one.bias is not None:
        state.biases[one.n] = _like(state.biases[one.n], one.bias)
    result = plain(state, one.k, True)
    errors = [apart(one.arrays[PARTS[part]], gradient) for part, gradient in result.gradients.items()]
    errors += [apart(one.arrays[name], noise) for name, noise in result.noises.items()]
    assert result.loss is not None
    return worst(*errors, apart(one.arrays["loss"], result.loss))


def _defined(setting: Setting, trained: Feedback, of_block: list[Observed]) -> Iterator[Check]:
    """Check gradients and losses against the loss written out, where it is known."""
    if trained.begin not in FEEDBACK_LOSSES:
        return
    source, define = FEEDBACK_LOSSES[trained.begin]
    label, n, values, slopes = _label(setting, of_block), of_block[0].n, 0.0, 0.0
    # Rounding of ŷ shows against differences as small as the noise.
    room = max(1.0, FINE_NOISE / _sigma(setting, trained, n) * 1e3)
    generator = setting.generator(31, n)
    # The loss is the same function of ω in every iteration.
    for one in (of_block[0], of_block[-1]):
        loss = define(setting, n, one.arrays)
        value = loss(one.weight, one.bias)
        values = worst(values, abs(float(one.arrays["loss"]) - value) / max(abs(value), 1e-300))
        of_weight = partial(_of_weight, loss, one.bias)
        slopes = worst(slopes, gradient_error(of_weight, one.weight, one.arrays["gradient"], generator, 1))
        if "gradient_bias" in one.arrays and one.bias is not None:
            of_bias = partial(loss, one.weight)
            slopes = worst(slopes, gradient_error(of_bias, one.bias, one.arrays["gradient_bias"], generator, 1))
    yield checked(f"{label}: gradient of the feedback loss", source, trained.begin, slopes, DIFFERENCES * room)
    yield checked(f"{label}: feedback loss", source, trained.begin, values, SUMS * room)


def _of_weight(loss: Loss, bias: Floats | None, weight: Floats) -> float:
    return loss(weight, bias)


def _steps(setting: Setting, trained: Feedback, of_block: list[Observed], state: State) -> Iterator[Check]:
    """Check ω after every iteration, from the reported gradients by the optimiser's closed form."""
    noises, optimizer = trained.noises(setting.options), trained.settings(setting.options).optimizer
    n, largest = of_block[0].n, 0.0
    lr = at_block(optimizer.lr, n - 1)
    moments: dict[str, list[Floats]] = {part: [] for part in PARTS}
    stored = {"weight": state.weights, "bias": state.biases}
    groups = [of_block[start : start + noises] for start in range(0, len(of_block), noises)]
    for t, group in enumerate(groups, start=1):
        for part, name in PARTS.items():
            before = group[0].part(part)
            if before is None:
                continue
            after = groups[t][0].part(part) if t < len(groups) else host(stored[part][n])
            assert after is not None
            if name not in group[0].arrays:
                # What has no gradient stays.
                largest = worst(largest, apart(after, before))
                continue
            gradient = np.mean([one.arrays[name] for one in group], axis=0)
            expected = reference.optimiser_step(optimizer, lr, n - 1, t, before, gradient, moments[part])
            # Of the step, not of the weight that it moves a little.
            largest = worst(largest, apart(after - before, expected - before))
    yield checked(f"{_label(setting, of_block)}: steps of the feedback optimiser", type(optimizer).__name__,
                  feedback.step_feedback, largest, STEP_ROUNDING)  # fmt: skip


CHECKS = (training,)
