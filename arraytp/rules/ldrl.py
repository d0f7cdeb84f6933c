"""DTP with feedback trained by the local difference reconstruction loss (L-DRL), block after block.

On every batch, for n = 1 … N−1, K_n times (Algorithm 3):

    s^{n+1} = F^n(s^n)
    ε ~ N(0, σ_n²),  s_ε^{n+1} = F^n(s^n + ε)
    r_ε = G^n(s_ε^{n+1}) − G^n(s^{n+1}) + s^n
    η ~ N(0, σ_n²),  r_η = G^n(s^{n+1} + η) − G^n(s^{n+1}) + s^n
    ω^n descends (1/B) Σ [−2 ε·(r_ε − s^n) + ‖r_η − s^n‖²]         twice Eq. 13, as in the authors' code

With d1 = a(s_ε^{n+1}) − a(s^{n+1}) and d2 = a(s^{n+1} + η) − a(s^{n+1}), a the input of G's affine map, its gradient is

    ∂/∂ω = (2/B) Σ [−ε ⋆ d1 + (ω ∘ d2) ⋆ d2],  and exactly 0 for G's bias, which cancels.

Then targets and updates as in DTP. Where ∂G = (∂F)ᵀ, the updates over β are BP's for small β (Theorem 4.3).

Source: DTP paper, Section 4.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from arraytp.backend import Array
from arraytp.fast.feedback_training import freeze, ldrl_gradient
from arraytp.fast.parallel import Workspace
from arraytp.model.feedback import (
    expected_gradient,
    feedback_backward_weight,
    feedback_forward,
    feedback_input,
    iterations_and_noise,
    jacobian_overlap,
    step_feedback,
)
from arraytp.model.network import Block, ForwardPass, Network, block_forward
from arraytp.options import Unpool
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
    """As DTP's. `expected` descends the expectation for small noise in closed form (Theorem 4.2), without noise."""

    name: Literal["ldrl"] = "ldrl"  # type: ignore[assignment]
    expected: bool = False


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
    """Train every ω^n on a batch, in place (Algorithm 3); parameters and result as in `arraytp.rules.dtp`."""
    losses: list[Array | None] = []
    for n in range(1, len(network)):
        iterations, sigma = iterations_and_noise(options.feedback, n - 1)
        if not iterations:
            losses.append(None)
            continue
        frozen = freeze(network, passed, n, options.unpool, sigma, (seed, step), iterations, workspace)
        overlap = jacobian_overlap(frozen.block, frozen.out, frozen.index, options.unpool) if options.expected else None
        for k in range(iterations):
            omega = state[f"feedback/{n}/weight"]
            if overlap is None:
                gradient, loss = ldrl_gradient(frozen, omega, k, workspace, every_loss=observe is not None)
            else:
                gradient, loss = expected_step(frozen.block, frozen.theta, omega, overlap, sigma, len(frozen.s))
            if observe is not None:
                noise = dict(zip(("epsilon", "eta"), frozen.noise.get(k, ()), strict=False))
                observe(n, k, noise | {"gradient": gradient, "loss": loss})
            step_feedback(options.feedback, state, n, step * iterations + k, {"weight": gradient}, workspace)
        losses.append(loss)
    return losses


def iteration(
    block: Block,
    theta: tuple[Array, Array],
    omega: tuple[Array, Array],
    s: Array,
    epsilon: Array,
    eta: Array,
    unpool: Unpool,
) -> tuple[Array, Array]:
    """Return the gradient of ω and the loss of one iteration, line by line (Algorithm 3).

    `arraytp.fast.feedback_training.ldrl_gradient` computes the same faster.

    Parameters
    ----------
    block : Block
    theta, omega : (array, array)
        Weight and bias of F^n and of G^n.
    s, epsilon : arrays of shape (B, *in_shape)
        s^n and its noise.
    eta : array of shape (B, *out_shape)
        Noise of s^{n+1}.
    unpool : {"overwrite", "accumulate"}
    """
    two = s.dtype.type(2 / len(s))
    a, g = partial(feedback_input, block, unpool=unpool), partial(feedback_forward, block, *omega, unpool=unpool)
    _, s_next, index = block_forward(block, *theta, s)
    _, s_epsilon, index_epsilon = block_forward(block, *theta, s + epsilon)
    r_epsilon = g(s_epsilon, index_epsilon) - g(s_next, index) + s
    r_eta = g(s_next + eta, index) - g(s_next, index) + s
    loss = (-2 * (epsilon * (r_epsilon - s)).sum() + ((r_eta - s) ** 2).sum()) / len(s)
    d1 = a(s_epsilon, index_epsilon) - a(s_next, index)
    d2 = a(s_next + eta, index) - a(s_next, index)
    gradient = feedback_backward_weight(block, -two * epsilon, d1)[0]
    gradient += feedback_backward_weight(block, two * (r_eta - s), d2)[0]
    return gradient, loss


def expected_step(
    block: Block, theta: Array, omega: Array, overlap: tuple[Array, Array], sigma: float, batch: int
) -> tuple[Array, Array]:
    """Return σ² times the closed form of Theorem 4.2 and its loss (σ²/B)(−2⟨∂Fᵀ, ∂G⟩ + ‖∂G‖²)."""
    n, m = overlap
    scale = omega.dtype.type(sigma**2)
    loss = (omega * (omega * m - 2 * theta * n)).sum() * (scale / batch)
    return expected_gradient(block, theta, omega, overlap, batch) * scale, loss


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `train_feedback` for one sample: four per iteration, θ ∘ s once."""
    return feedback_products(options.feedback, network, 0 if options.expected else 4)
