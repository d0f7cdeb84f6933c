"""Feedback training in closed form, where the settings ask for it in place of noise.

`Feedback.closed_form` does all iterations on a block at once. It is held against itself on the plain engine, whatever
it computes; where it is L-DRL's, also against as many steps of the optimiser, one after the other, with the limit of
Theorem 4.2 as the gradient.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, apart, checked, host, worst
from arraytp.audit.feedback import STEP_ROUNDING, SUMS
from arraytp.audit.observed import in_closed_form
from arraytp.audit.overlap import expected_gradient, overlap
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.model.passes import Batch
from arraytp.rules import ldrl
from arraytp.rules.feedback import descent_of
from arraytp.rules.protocol import Descent, State

# Not a power of two, so that a power by squaring multiplies as well.
ITERATIONS, BATCHES = 5, 2


def closed_form(setting: Setting) -> Iterator[Check]:
    """Check ω, the optimiser's moments and the loss after all iterations on a block, on two batches."""
    if not in_closed_form(setting):
        return
    trained = setting.rule.feedback
    assert trained is not None
    assert trained.closed_form is not None
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        fast, plain = setting.state(), setting.state()
        losses = [_run(setting, batch, state, n) for batch, state in ((setting.batch, fast), (setting.plain, plain))]
        pairs = zip(fast.named().values(), plain.named().values(), strict=True)
        error = worst(*(apart(a, b) for a, b in pairs), *(apart(a, b) for a, b in zip(*losses, strict=True)))
        yield checked(f"{block.label}: closed form, fast engine against plain", "the same", trained.closed_form, error,
                      SUMS)  # fmt: skip
        if trained.closed_form is ldrl.closed_form:
            yield from _by_steps(setting, n, fast, losses[0])


def _run(setting: Setting, batch: Batch, state: State, n: int) -> list[Array]:
    """Let the rule do all iterations on a block of two batches; return its losses."""
    trained, losses = setting.rule.feedback, []
    assert trained is not None
    assert trained.closed_form is not None
    for number in range(BATCHES):
        at = replace(batch, number=number).at(n)
        losses.append(trained.closed_form(setting.options, state, at, _descent(setting, n, number))["loss"])
    return losses


def _descent(setting: Setting, n: int, number: int) -> Descent:
    trained = setting.rule.feedback
    assert trained is not None
    descent = descent_of(trained.settings(setting.options), n, number, setting.workspace)
    return replace(descent, iterations=ITERATIONS, step=number * ITERATIONS)


def _by_steps(setting: Setting, n: int, state: State, losses: list[Array]) -> Iterator[Check]:
    """Check L-DRL's closed form against the steps that it stands for."""
    descent, (N, M, _) = _descent(setting, n, 0), overlap(setting, n)
    theta, count, variance = host(setting.network.weights[n]), len(setting.batch), descent.sigma**2
    before = host(setting.experiment.rule_state.weights[n])
    omega, values = before, []
    moments: list[Floats] = []
    for t in range(1, BATCHES * ITERATIONS + 1):
        gradient = variance * expected_gradient(omega, theta, N, M, count)
        omega = reference.optimiser_step(descent.optimizer, descent.lr, n - 1, t, omega, gradient, moments)
        if t % ITERATIONS == 0:
            values.append(variance / count * float((omega * (omega * M - 2 * theta * N)).sum()))
    label, after = setting.network.blocks[n].label, host(state.weights[n])
    yield checked(f"{label}: {ITERATIONS} iterations at once, twice", "steps with σ² times Theorem 4.2's limit",
                  ldrl.closed_form, apart(after - before, omega - before), STEP_ROUNDING)  # fmt: skip
    error = worst(*(apart(a, b) for a, b in zip(state.moments[n, "weight"], moments, strict=False)))
    yield checked(f"{label}: the optimiser's moments after them", "the same", ldrl.closed_form, error, STEP_ROUNDING)
    error = worst(*(apart(loss, np.asarray(value)) for loss, value in zip(losses, values, strict=True)))
    yield checked(f"{label}: expected loss", "(σ²/B)(‖∂G‖² − 2⟨∂Fᵀ, ∂G⟩)", ldrl.expected_loss, error, SUMS)


CHECKS = (closed_form,)
