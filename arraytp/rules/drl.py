"""DTP with direct linear feedback trained by the difference reconstruction loss (DRL, DDTP-linear).

The output has a direct linear connection Q^n to every hidden s^n, and there is no G^n from layer to layer:

    t^N = s^N − η ∂L/∂s^N, L the mean loss
    t^n = s^n + Q^n(t^N) − Q^n(s^N)
    update of θ of a dense block: (1/B) Σ 2 D ⊙ (s − t) outer input; of a convolution: ∂/∂θ of the mean of (s − t)² over
    batch and units

Q^n descends, on every batch and K_n times, with ε ~ N(0, σ_n²) and ŷ_ε the logits of the network run on from s^n + ε,

    (1/σ_n²) · mean over batch and units of ((Q^n ŷ_ε + s^n − Q^n ŷ) − (s^n + ε))²                     Algorithm 2

with weight decay for the second term of the paper's Eq. 11. Source: Meulemans et al. (2020), as the code does it that
the DTP paper compares with. Biases of Q^n stay 0 there, as they cancel from every difference; here there are none.

Schedules: s-DDTP has `pretrain_epochs` of feedback training alone, one feedback update a batch, and `extra_epochs` of
feedback training alone after every epoch; p-DDTP has neither, but K feedback updates a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward, forward, product
from arraytp.model.feedback import check_feedback, iterations_and_noise, step_feedback
from arraytp.model.initialise import initial_weight
from arraytp.model.network import Block, ForwardPass, Network, adjoint_flops, block_flops
from arraytp.ops.noise import gaussian
from arraytp.optim import at_block, init_optimizer
from arraytp.options import STRICT, Adam, Border, FeedbackTraining, InitName, Positive
from arraytp.rules.protocol import Observe, State, Target, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """`eta` is the target step size η. Lists in `feedback` have one value per hidden s^n, from the first block's on."""

    name: Literal["drl"] = "drl"
    eta: Positive = 0.02
    feedback_init: InitName = "xavier-normal"
    feedback: FeedbackTraining = field(
        default_factory=lambda: FeedbackTraining(iterations=1, sigma=0.01, optimizer=Adam(lr=1e-3, weight_decay=1e-5))
    )
    pretrain_epochs: Border = 0
    extra_epochs: Border = 0

    __pydantic_config__ = STRICT


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return a line if the noise drowns in the dtype's rounding.

    Raises
    ------
    UserError
        As `check_feedback`.
    """
    check_feedback(options.name, options.feedback, blocks, blocks[:-1], reduction)
    sigma = options.feedback.sigma
    smallest = min(sigma) if isinstance(sigma, Sequence) else sigma
    if dtype == "float32" and smallest < 1e-3:
        return [
            f"rule drl: feedback.sigma {smallest:g} is close to float32's rounding of activations (6e-8 of their "
            "size); the published settings are for dtype float64"
        ]
    return []


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw Q of every s^{n+1}, n = 0 … N−2, of shape (classes, size of s^{n+1}); moments are 0."""
    state: State = {}
    for n, block in enumerate(network.blocks[:-1]):
        shape = (network.blocks[-1].passed_shape[0], math.prod(block.out_shape))
        drawn = initial_weight(options.feedback_init, shape, seed, "feedback", n)
        weight = state[f"feedback/{n}/weight"] = backend.asarray(drawn.astype(network.weights[n].dtype))
        (moments,) = init_optimizer(options.feedback.optimizer, [weight]).moments
        state |= {f"feedback_moments/{n}/weight/{i}": moment for i, moment in enumerate(moments)}
    return state


def feedback_epochs(options: Options) -> tuple[int, int]:
    """Return how many epochs of feedback training alone come before the first epoch, and after each."""
    return options.pretrain_epochs, options.extra_epochs


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
    """Train every Q on a batch, in place (Algorithm 2); parameters as in `arraytp.rules.dtp.train_feedback`.

    Returns
    -------
    list of arrays of shape (), or None
        Per hidden s^n, from s^1 on: the loss in the last iteration, None without iterations.
    """
    losses: list[Array | None] = []
    for n in range(len(network) - 1):
        iterations, sigma = iterations_and_noise(options.feedback, n)
        loss = None
        for k in range(iterations):
            s = passed.x[n + 1]
            epsilon = gaussian(workspace.array("drl noise", s.shape, s.dtype), sigma, 0, seed, step, n, k, 0)
            moved = run_on(network, n + 1, s + epsilon, workspace) - passed.logits
            gradient, loss = iteration(state[f"feedback/{n}/weight"], moved, epsilon, sigma, workspace)
            if observe is not None:
                observe(n, k, {"epsilon": epsilon, "gradient": gradient, "loss": loss})
            step_feedback(options.feedback, state, n, step * iterations + k, {"weight": gradient}, workspace)
        losses.append(loss)
    return losses


def iteration(q: Array, moved: Array, epsilon: Array, sigma: float, workspace: Workspace) -> tuple[Array, Array]:
    """Return the gradient of Q and the loss, for ŷ_ε − ŷ of shape (B, classes) and ε of shape (B, …)."""
    noise = epsilon.reshape(len(epsilon), -1)
    residual = workspace.array("drl residual", noise.shape, noise.dtype)
    gradient = workspace.array("drl gradient", q.shape, q.dtype)
    product(moved, q, residual, workspace)
    residual -= noise
    # In NumPy's floats: Python's would stop at a σ² beyond their range instead of giving what is not finite.
    scale = noise.dtype.type(1 / (np.float64(sigma) ** 2 * noise.size))
    product(moved.T, residual, gradient, workspace)
    gradient *= 2 * scale
    return gradient, (residual * residual).sum() * scale


def run_on(network: Network, n: int, s: Array, workspace: Workspace) -> Array:
    """Return the logits of the network run on from s^n."""
    rest = Network(network.blocks[n:], network.weights[n:], network.biases[n:])
    return forward(rest, s, workspace, "run on").logits


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return the updates of every block by direct targets; parameters and result as in `arraytp.rules.bp.updates`.

    `dlogits` is of the mean loss.
    """
    result: Updates = []
    found = targets(options, state, network, passed, dlogits, workspace)
    for n, target in zip(reversed(range(len(network))), found, strict=True):
        block, delta = network.blocks[n], target.delta
        averaged = len(delta) * (math.prod(block.out_shape) if block.kind == "conv" else 1)
        ds = delta * delta.dtype.type(-2 / averaged)
        dweight, dbias, _ = backward(
            block, ds, passed.s[n + 1], passed.index[n], passed.x[n], None, workspace, ("drl", n)
        )
        result.append((dweight, dbias))
    return result[::-1]


def targets(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Iterator[Target]:
    """Yield the direct target of every block, from the last to the first; parameters as in `updates`."""
    output = dlogits * dlogits.dtype.type(-options.eta)
    yield Target(output)
    for n in reversed(range(len(network) - 1)):
        shape = (len(output), math.prod(network.blocks[n].out_shape))
        delta = workspace.array("drl delta", shape, output.dtype)
        product(output, state[f"feedback/{n}/weight"], delta, workspace)
        yield Target(delta)


def feedback_pairs(state: State, network: Network) -> list[tuple[int, Array, Array | None]]:
    """Return index, Q and the weight that it can be compared with: only the last has one, θ^{N−1} transposed."""
    last = len(network) - 2
    return [
        (n, state[f"feedback/{n}/weight"], network.weights[-1].T if n == last else None)
        for n in range(len(network) - 1)
    ]


def product_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `updates` for one sample: dW per block, and Q on the output's δ."""
    return sum(adjoint_flops(block) for block in network.blocks) + sum(_direct_flops(network))


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `train_feedback` for one sample: the network run on, two with Q."""
    return sum(
        int(at_block(options.feedback.iterations, n)) * (2 * direct + sum(map(block_flops, network.blocks[n + 1 :])))
        for n, direct in enumerate(_direct_flops(network))
    )


def _direct_flops(network: Network) -> list[int]:
    classes = network.blocks[-1].passed_shape[0]
    return [2 * classes * math.prod(block.out_shape) for block in network.blocks[:-1]]
