"""A rule that trains its feedback is watched: what it reports of each iteration, and its weights before it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from arraytp.audit.check import Floats, host
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.rules import feedback
from arraytp.rules.protocol import Feedback, State

BATCHES = 2
# The parts of the state, and the reported gradients that are theirs.
PARTS = {"weight": "gradient", "bias": "gradient_bias"}


@dataclass(frozen=True)
class Observed:
    """What the rule reported of one iteration: batch `number`, block n, iteration k, and `arrays` as `Observe` is told.

    `weight` and `bias` (None without one) are ω^n before it, `state` all feedback weights before the block's first
    iteration on this batch.
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
