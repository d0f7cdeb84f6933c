"""Feedback training in closed form, where the settings ask for it in place of noise.

`Feedback.closed_form` does all iterations on a block at once. Every closed form is compared with itself on the plain
engine; where the expectation is known (`EXPECTATIONS`), also with as many single steps of the optimiser, with the
gradient by definition.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, apart, checked, host, worst
from arraytp.audit.differences import relative
from arraytp.audit.feedback import STEP_ROUNDING, SUMS, in_closed_form
from arraytp.audit.jacobians import expected_gradient, jacobians, overlap, sums
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.model.passes import Batch
from arraytp.optim import at_block
from arraytp.rules import drl, ldrl
from arraytp.rules.feedback import descent_of
from arraytp.rules.protocol import Descent, Feedback, State

# Not a power of two, so that exponentiation by squaring multiplies, too.
ITERATIONS, BATCHES = 5, 2


@dataclass(frozen=True)
class Expectation:
    """The mean of a block's feedback loss over small noise, by definition: gradient and loss as functions of ω.

    `size` and `loss_size` are the sizes of their terms: errors are relative to these where gradient or loss is 0. With
    `at_once` ω must end where the gradient is 0, whatever the optimiser.
    """

    source: str
    gradient: Callable[[Floats], Floats]
    loss: Callable[[Floats], float]
    size: float
    loss_size: float = 0.0
    at_once: bool = False


def closed_form(setting: Setting) -> Iterator[Check]:
    """Check ω, the optimiser's moments and the loss after all iterations on a block, on two batches."""
    if not in_closed_form(setting):
        return
    define = EXPECTATIONS.get(_feedback(setting).closed_form)
    expectations = {} if define is None else define(setting)
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        fast, plain = setting.state(), setting.state()
        losses = [_run(setting, batch, state, n) for batch, state in ((setting.batch, fast), (setting.plain, plain))]
        pairs = zip(fast.named().values(), plain.named().values(), strict=True)
        error = worst(*(apart(a, b) for a, b in pairs), *(_loss_error(a, b) for a, b in zip(*losses, strict=True)))
        yield checked(f"{block.label}: closed form, fast engine against plain", "the same",
                      _feedback(setting).closed_form, error, STEP_ROUNDING)  # fmt: skip
        if n in expectations:
            yield from _by_definition(setting, n, expectations[n], fast, losses[0])


def _run(setting: Setting, batch: Batch, state: State, n: int) -> list[Array]:
    """Let the rule do all iterations on block n, on two batches; return its losses."""
    compute, losses = _feedback(setting).closed_form, []
    assert compute is not None
    for number in range(BATCHES):
        at = replace(batch, number=number).at(n)
        losses.append(compute(setting.options, state, at, _descent(setting, n, number))["loss"])
    return losses


def _loss_error(actual: Array, expected: Array) -> float:
    """Return the difference of two losses, relative to the larger of the expected one and 1, since it may be 0."""
    a, b = float(actual), float(expected)
    return abs(a - b) / max(abs(b), 1.0)


def _feedback(setting: Setting) -> Feedback[Any]:
    assert setting.rule.feedback is not None
    return setting.rule.feedback


def _descent(setting: Setting, n: int, number: int) -> Descent:
    descent = descent_of(_feedback(setting).settings(setting.options), n, number, setting.workspace)
    return replace(descent, iterations=ITERATIONS, step=number * ITERATIONS)


def _by_definition(
    setting: Setting, n: int, expected: Expectation, state: State, losses: list[Array]
) -> Iterator[Check]:
    """Check a closed form against the steps, or the optimum, that it replaces."""
    trained, label = _feedback(setting), setting.network.blocks[n].label
    settings = trained.settings(setting.options)
    lr, descent = at_block(settings.optimizer.lr, n - 1), descent_of(settings, n, 0, setting.workspace)
    wrong = (descent.iterations != at_block(settings.iterations, n - 1)) + (descent.lr != lr)
    wrong += descent.sigma != at_block(settings.sigma, n - 1)
    yield checked(f"{label}: iterations, learning rate and σ that are not the config's", "rule.feedback", descent_of,
                  wrong, 0.0)  # fmt: skip
    before, after = host(setting.experiment.rule_state.weights[n]), host(state.weights[n])
    if expected.at_once:
        error = relative(float(np.abs(expected.gradient(after)).max()), expected.size)
        yield checked(f"{label}: expected gradient at the optimum", expected.source, trained.closed_form, error, SUMS)
        values = [expected.loss(after)] * BATCHES
    else:
        omega, values = before, []
        moments: list[Floats] = []
        for t in range(1, BATCHES * ITERATIONS + 1):
            g = expected.gradient(omega)
            omega = reference.optimiser_step(settings.optimizer, lr, n - 1, t, omega, g, moments)
            if t % ITERATIONS == 0:
                values.append(expected.loss(omega))
        yield checked(f"{label}: {ITERATIONS} iterations at once, on {BATCHES} batches", expected.source,
                      trained.closed_form, apart(after - before, omega - before), STEP_ROUNDING)  # fmt: skip
        error = worst(*(apart(a, b) for a, b in zip(state.moments[n, "weight"], moments, strict=False)))
        yield checked(f"{label}: the optimiser's moments after them", expected.source, trained.closed_form, error,
                      STEP_ROUNDING)  # fmt: skip
    error = worst(*(abs(float(loss) - value) for loss, value in zip(losses, values, strict=True)))
    error = relative(error, max(expected.loss_size, *map(abs, values)))
    yield checked(f"{label}: expected feedback loss", expected.source, trained.closed_form, error, SUMS)


def _ldrl(setting: Setting) -> dict[int, Expectation]:
    """(σ²/B)(‖∂G‖² − 2⟨∂Fᵀ, ∂G⟩) = (σ²/B) Σ ω (ωM − 2θN), see `arraytp.audit.jacobians.overlap`."""
    return {n: _ldrl_block(setting, n) for n in range(1, len(setting.network))}


def _ldrl_block(setting: Setting, n: int) -> Expectation:
    (N, M, _), theta = overlap(setting, n), host(setting.network.weights[n])
    count, sigma = len(setting.batch), at_block(_feedback(setting).settings(setting.options).sigma, n - 1)
    variance = sigma**2
    return Expectation(
        "σ² times Theorem 4.2's limit",
        lambda omega: variance * expected_gradient(omega, theta, N, M, count),
        lambda omega: variance / count * float((omega * (omega * M - 2 * theta * N)).sum()),
        2 * variance / count * float(np.abs(theta * N).max()),
    )


def _drl(setting: Setting) -> dict[int, Expectation]:
    """Mean over batch and units of ‖J Q − I‖², J of shape (size, classes)."""
    at_once = setting.options.expected == "optimum"
    return {n: _drl_block(jacobian, at_once) for n, jacobian in jacobians(setting).items()}


def _drl_block(jacobian: Floats, at_once: bool) -> Expectation:
    A, J = sums(jacobian)
    scale = 2 / (jacobian.shape[0] * jacobian.shape[1])

    def gradient(q: Floats) -> Floats:
        result: Floats = scale * (A @ q - J)
        return result

    def loss(q: Floats) -> float:
        return float(scale / 2 * (q * (A @ q - 2 * J)).sum() + 1)

    return Expectation("mean of ‖J Q − I‖²", gradient, loss, scale * float(np.abs(J).max()), 1.0, at_once)


EXPECTATIONS: Mapping[Any, Callable[[Setting], dict[int, Expectation]]] = {
    ldrl.closed_form: _ldrl,
    drl.closed_form: _drl,
}
"""By `Feedback.closed_form`: the expectations of the blocks with feedback."""

CHECKS = (closed_form,)
