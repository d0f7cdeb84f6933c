"""Difference target propagation (DTP, Lee et al. 2015; DTP paper, Section 3.1), and what all its variants share.

    t^N = s^N − β ∂L/∂s^N                                  per sample                               Eq. 3
    for n = N−1 … 0:
        update of θ^n = ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², also divided by β if so chosen    Eq. 6
        t^n = s^n + G^n(t^{n+1}) − G^n(s^{n+1})                                                     Eq. 4

Before that, on every batch, K_n times for every block n = 1 … N−1, with ε ~ N(0, σ_n²)             Algorithm 1

    r = G^n(F^n(s^n + ε))
    ω^n and G's bias descend (1/B) Σ ‖s^n + ε − r‖²        (no ½, as in the authors' code)

What is carried from block to block is δ = t − s, which loses no digits where it is small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from arraytp.backend import Array, Backend
from arraytp.fast.feedback_training import freeze, reconstruction_gradient
from arraytp.fast.modules import target_difference
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward
from arraytp.model.feedback import (
    FeedbackInit,
    check_feedback,
    feedback_affine,
    feedback_backward_weight,
    feedback_input,
    init_feedback,
    iterations_and_noise,
    step_feedback,
)
from arraytp.model.network import Block, ForwardPass, Network, adjoint_flops, block_flops, block_forward
from arraytp.options import STRICT, FeedbackTraining, Positive, Unpool
from arraytp.rules.protocol import Observe, State, Target, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are the authors' where they are the same for all networks. Angles are measured at `compare_beta`."""

    name: Literal["dtp"] = "dtp"
    beta: Positive = 0.5
    divide_by_beta: bool = False
    unpool: Unpool = "overwrite"
    feedback_init: FeedbackInit = "kaiming-uniform"
    feedback: FeedbackTraining = field(default_factory=FeedbackTraining)
    compare_beta: Positive = 0.005

    __pydantic_config__ = STRICT


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return what is worth knowing before a run: nothing.

    Raises
    ------
    UserError
        As `check_feedback`.
    """
    check_feedback(options.name, options.feedback, blocks, blocks[1:], reduction)
    return []


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw ω^n and the bias of every G^n, n = 1 … N−1; the moments of their optimiser are 0."""
    return init_feedback(options.feedback_init, options.feedback.optimizer, network, seed, backend)


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
    """Train every G^n on a batch, in place (Algorithm 1).

    Parameters
    ----------
    options : Options
    state : State
        Holds ω; changed.
    network : Network
    passed : ForwardPass
        Of the batch, with the network's present weights.
    seed, step : int
        The run's seed, and how often feedback was trained before; noise is keyed by both.
    workspace : Workspace
    observe : Observe, optional

    Returns
    -------
    list of arrays of shape (), or None
        Per block, from block 1 on: the loss in the last iteration, None without iterations.
    """
    losses: list[Array | None] = []
    for n in range(1, len(network)):
        iterations, sigma = iterations_and_noise(options.feedback, n - 1)
        if not iterations:
            losses.append(None)
            continue
        frozen = freeze(network, passed, n, options.unpool, sigma, (seed, step), iterations, workspace)
        for k in range(iterations):
            weight, bias = state[f"feedback/{n}/weight"], state[f"feedback/{n}/bias"]
            dweight, dbias, loss = reconstruction_gradient(frozen, weight, bias, k, workspace)
            if observe is not None:
                epsilon, _ = frozen.noise[k]
                observe(n, k, {"epsilon": epsilon, "gradient": dweight, "gradient_bias": dbias, "loss": loss})
            gradients = {"weight": dweight, "bias": dbias}
            step_feedback(options.feedback, state, n, step * iterations + k, gradients, workspace)
        losses.append(loss)
    return losses


def iteration(
    block: Block,
    theta: tuple[Array, Array],
    omega: tuple[Array, Array],
    s: Array,
    epsilon: Array,
    unpool: Unpool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of ω and of G's bias, and the loss, of one iteration, line by line (Algorithm 1).

    `arraytp.fast.feedback_training.reconstruction_gradient` computes the same faster.

    Parameters
    ----------
    block : Block
    theta, omega : (array, array)
        Weight and bias of F^n and of G^n.
    s, epsilon : arrays of shape (B, *in_shape)
        s^n and its noise.
    unpool : {"overwrite", "accumulate"}
    """
    s_noisy = s + epsilon
    _, s_noisy_next, index = block_forward(block, *theta, s_noisy)
    a = feedback_input(block, s_noisy_next, index, unpool)
    r = feedback_affine(block, omega[0], a) + omega[1]
    loss = ((s_noisy - r) ** 2).sum() / len(s)
    dweight, dbias = feedback_backward_weight(block, (r - s_noisy) * s.dtype.type(2 / len(s)), a)
    return dweight, dbias, loss


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return the updates of every block by difference targets; parameters and result as in `arraytp.rules.bp.updates`.

    `dlogits` is of the mean loss.
    """
    found = targets(options, state, network, passed, dlogits, workspace)
    return local_updates(options, network, passed, found, workspace)


def targets(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Iterator[Target]:
    """Yield the difference target of every block, from the last to the first (Eq. 3, 4); parameters of `updates`."""
    delta = output_difference(options.beta, dlogits)
    for n in reversed(range(len(network))):
        yield Target(delta)
        if n > 0:
            delta = target_difference(
                network, passed, n, state[f"feedback/{n}/weight"], delta, options.unpool, workspace
            )


def output_difference(beta: float, dlogits: Array) -> Array:
    """Return δ^N = t^N − s^N = −β ∂L/∂s^N, every sample's own: B times `dlogits` of the mean loss (Eq. 3)."""
    return dlogits * dlogits.dtype.type(-beta * len(dlogits))


def local_updates(
    options: Options, network: Network, passed: ForwardPass, found: Iterator[Target], workspace: Workspace
) -> Updates:
    """Return the update of every block by its target; `found` are the targets, from the last block to the first."""
    blocks = reversed(range(len(network)))
    return [
        local_update(options, network, passed, n, target.delta, workspace)
        for n, target in zip(blocks, found, strict=True)
    ][::-1]


def local_update(
    options: Options, network: Network, passed: ForwardPass, n: int, delta: Array, workspace: Workspace
) -> tuple[Array, Array]:
    """Return ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², t − s = δ constant, divided by β if `divide_by_beta` (Eq. 6)."""
    scale = len(delta) * (options.beta if options.divide_by_beta else 1.0)
    ds = delta * delta.dtype.type(-1 / scale)
    block, s, index, x = network.blocks[n], passed.s[n + 1], passed.index[n], passed.x[n]
    dweight, dbias, _ = backward(block, ds, s, index, x, None, workspace, ("dtp", n))
    return dweight, dbias


def feedback_pairs(state: State, network: Network) -> list[tuple[int, Array, Array | None]]:
    """Return index, ω^n and θ^n of every block with feedback."""
    return [(n, state[f"feedback/{n}/weight"], network.weights[n]) for n in range(1, len(network))]


def product_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `updates` for one sample: as many as BP's; see `feedback_flops`."""
    flops = [adjoint_flops(block) for block in network.blocks]
    return 2 * sum(flops) - flops[0]


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `train_feedback` for one sample: three per iteration, θ ∘ s once."""
    return feedback_products(options.feedback, network, 3)


def feedback_products(training: FeedbackTraining, network: Network, products: int) -> int:
    """Return the operations of so many products per block and iteration, and of one more per block."""
    iterations = [iterations_and_noise(training, n)[0] for n in range(len(network) - 1)]
    return sum(
        block_flops(block) * (1 + products * count)
        for block, count in zip(network.blocks[1:], iterations, strict=True)
        if count
    )
