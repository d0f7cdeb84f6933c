"""L-DRL in parallel: all blocks at once, each gradient averaged over several noise samples (docs/math/ldrl.md).

On every batch, for all n at once: ω^n takes one step with the mean over `samples` noises of L-DRL's gradient. The rest
is as in `arraytp.rules.ldrl`.
"""

from dataclasses import dataclass, field
from typing import Literal

from arraytp.backend import Array
from arraytp.fast.feedback_training import freeze, ldrl_gradient
from arraytp.fast.parallel import Workspace
from arraytp.model.feedback import iterations_and_noise, step_feedback
from arraytp.model.network import ForwardPass, Network
from arraytp.options import FeedbackTraining, Size
from arraytp.rules import dtp
from arraytp.rules.dtp import (
    check,
    feedback_pairs,
    feedback_products,
    init_state,
    product_flops,
    targets,
    updates,
)
from arraytp.rules.protocol import Observe, State

__all__ = [
    "Options",
    "check",
    "feedback_flops",
    "feedback_pairs",
    "init_state",
    "product_flops",
    "targets",
    "train_feedback",
    "updates",
]


@dataclass(frozen=True, kw_only=True)
class Options(dtp.Options):
    """As DTP's; `feedback.iterations` counts steps of the optimiser, each with `samples` noises."""

    name: Literal["ldrl-parallel"] = "ldrl-parallel"  # type: ignore[assignment]
    samples: Size = 10
    feedback: FeedbackTraining = field(default_factory=lambda: FeedbackTraining(iterations=1))


def train_feedback(
    options: Options,
    state: State,
    network: Network,
    passed: ForwardPass,
    seed: int,
    step: int,
    workspace: Workspace,
    observe: Observe | None = None,
) -> list[Array | None]:
    """Train every ω^n on a batch, in place; parameters and result as in `arraytp.rules.dtp.train_feedback`.

    What is observed is every noise's own gradient, K · `samples` of them.
    """
    losses: list[Array | None] = []
    for n in range(1, len(network)):
        iterations, sigma = iterations_and_noise(options.feedback, n - 1)
        if not iterations:
            losses.append(None)
            continue
        noises = iterations * options.samples
        frozen = freeze(network, passed, n, options.unpool, sigma, (seed, step), noises, workspace)
        omega = state[f"feedback/{n}/weight"]
        for k in range(iterations):
            mean = workspace.array("mean gradient", omega.shape, omega.dtype)
            mean.fill(0)
            for sample in range(options.samples):
                drawn = k * options.samples + sample
                gradient, loss = ldrl_gradient(frozen, omega, drawn, workspace, every_loss=observe is not None)
                if observe is not None:
                    epsilon, eta = frozen.noise[drawn]
                    observe(n, drawn, {"epsilon": epsilon, "eta": eta, "gradient": gradient, "loss": loss})
                mean += gradient
            mean /= mean.dtype.type(options.samples)
            step_feedback(options.feedback, state, n, step * iterations + k, {"weight": mean}, workspace)
        losses.append(loss)
    return losses


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `train_feedback` for one sample: four per noise, θ ∘ s once."""
    return feedback_products(options.feedback, network, 4 * options.samples)
