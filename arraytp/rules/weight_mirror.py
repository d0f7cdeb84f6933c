"""Weight mirror: FA in which B^n learns W^n from noise, each block on its own.

On every batch, before the updates, for n = 1 … N−1, K_n times:
    x ~ N(0, σ²), of s^n's shape
    y = f(x W^n + b^n), without the pool
    B^n ← (1 − λ) B^n + η xᵀy / rows

`rows` counts the rows of x's patch matrix: B samples times the positions of y. By Stein's lemma, up to the zeros of a
border, E[xᵀy / rows] = σ² W E[f'], so each column of B aligns with that of W. B is trained like all learned feedback,
by `arraytp.rules.feedback.train`: SGD with η = lr and λ = lr · weight_decay is the paper's rule. The rest is FA.
Source: Akrout et al. (2019), Equation 7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arraytp.backend import Backend, array_module
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At
from arraytp.ops.noise import EPSILON
from arraytp.options import SGD, FeedbackTraining, InitName
from arraytp.rules import fa
from arraytp.rules.feedback import check_training, feedback_products, init_moments
from arraytp.rules.protocol import Feedback, Iterating, Iteration, Rule, State


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the initial B^n is drawn, and how it is trained."""

    name: Literal["weight-mirror"] = "weight-mirror"
    feedback_init: InitName = "orthogonal"
    feedback: FeedbackTraining = field(
        default_factory=lambda: FeedbackTraining(iterations=1, sigma=1.0, optimizer=SGD(lr=0.01, weight_decay=0.5))
    )


def init_state(options: Any, network: Network, seed: int, backend: Backend) -> State:
    """Draw B^n as for FA; the moments of its optimiser are 0."""
    state = fa.init_state(options, network, seed, backend)
    for n in state.weights:
        init_moments(state, n, options.feedback.optimizer)
    return state


def rows(at: At) -> int:
    """Return the number of rows of x's patch matrix: samples times positions of y."""
    return len(at.batch) * math.prod(at.block.pre_shape[:-1])


def begin(options: Options, at: At, sigma: float, noises: int) -> Iterating:
    """Return the iteration: its loss is −⟨B, xᵀy⟩ / rows, with gradient −xᵀy / rows."""

    def iterate(state: State, k: int, with_loss: bool) -> Iteration:
        x = at.batch.noise("mirror", at.s.shape, sigma, at.n, k, EPSILON)
        y = at.alone(x)
        gradient, _ = at.outer(x, y, "mirror")
        gradient *= gradient.dtype.type(-1 / rows(at))
        loss = inner(at, state.weights[at.n], gradient) if with_loss else None
        return Iteration({"weight": gradient}, loss, {"epsilon": x})

    return iterate


def inner(at: At, a: Any, b: Any) -> Any:
    """Return ⟨a, b⟩ of two arrays of the same shape."""
    return array_module(a).multiply(a, b, out=at.batch.array("inner", a.shape)).sum()


def feedback_flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the products in feedback training for one sample: two per iteration."""
    return feedback_products(options.feedback, network, 2, shared=0)


def check(options: Options, blocks: Sequence[Block], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return notes for the user, here none. Raises as `check_training`."""
    check_training(options.feedback, blocks)
    return []


RULE: Rule[Any] = replace(
    fa.RULE,
    options=Options,
    init_state=init_state,
    feedback=Feedback(begin=begin, flops=feedback_flops),
    check=check,
)
