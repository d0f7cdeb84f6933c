"""DTP with direct linear feedback trained by the difference reconstruction loss (DRL, DDTP-linear).

The output has a direct linear connection Q^n to every hidden s^n, n = 1 … N−1, and there is no G^n from layer to layer.
Q^n descends, on every batch and K_n times, with ε ~ N(0, σ_n²) and ŷ_ε the logits of the network run on from s^n + ε,

    r_ε = Q^n ŷ_ε + s^n − Q^n ŷ
    (1/σ_n²) · mean over batch and units of (r_ε − (s^n + ε))²                                        Algorithm 2

with weight decay for the second term of the paper's Eq. 11. Then

    t^N = s^N − η ∂L/∂s^N, L the mean loss
    t^n = s^n + Q^n(t^N) − Q^n(s^N)
    update of θ of a dense block: (1/B) Σ 2 D ⊙ (s − t) outer input; of a convolution: ∂/∂θ of the mean of (s − t)² over
    batch and units

Source: Meulemans et al. (2020), as the code does it that the DTP paper compares with. Biases of Q^n stay 0 there, as
they cancel from every difference; here there are none.

Schedules: s-DDTP has `pretrain_epochs` of feedback training alone, one feedback update a batch, and `extra_epochs` of
feedback training alone after every epoch; p-DDTP has neither, but K feedback updates a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.errors import UserError
from arraytp.model.blocks import Block, Network, adjoint_flops, block_flops
from arraytp.model.passes import At, Batch
from arraytp.ops.noise import EPSILON
from arraytp.optim import at_block
from arraytp.options import STRICT, Adam, Border, FeedbackTraining, InitName, Positive
from arraytp.rules.dfa import direct_flops
from arraytp.rules.feedback import check_expected, check_feedback, init_direct, init_moments, step_feedback
from arraytp.rules.protocol import Descent, Feedback, Iterating, Iteration, Rule, State, Target, Update

# From about as many on, the closed form costs more than some tens of iterations by noise.
MOST_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """`eta` is the target step size η. Lists in `feedback` have one value per hidden s^n, from s^1 on.

    `expected` descends the expectation for small noise in closed form; "optimum" takes the Q that it is least at.
    """

    name: Literal["drl"] = "drl"
    eta: Positive = 0.02
    feedback_init: InitName = "xavier-normal"
    feedback: FeedbackTraining = field(
        default_factory=lambda: FeedbackTraining(iterations=1, sigma=0.01, optimizer=Adam(lr=1e-3, weight_decay=1e-5))
    )
    pretrain_epochs: Border = 0
    extra_epochs: Border = 0
    expected: bool | Literal["optimum"] = False

    __pydantic_config__ = STRICT


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return a line if the noise drowns in the dtype's rounding.

    Raises
    ------
    UserError
        As `check_feedback`.
    """
    check_feedback(options.name, options.feedback, blocks, reduction)
    if options.expected:
        check_expected(options.feedback)
        classes = blocks[-1].next_shape[0]
        if classes > MOST_CLASSES:
            raise UserError(
                f"rule.expected: {classes} classes: the closed form of rule drl takes a backward pass per class; at "
                f"most {MOST_CLASSES}, use expected: false"
            )
        return []
    sigma = options.feedback.sigma
    smallest = min(sigma) if isinstance(sigma, Sequence) else sigma
    if dtype == "float32" and smallest < 1e-3:
        return [
            f"rule drl: feedback.sigma {smallest:g} is close to float32's rounding of activations (6e-8 of their "
            "size); the published settings are for dtype float64"
        ]
    return []


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw Q^n, of shape (classes, size of s^n), for every hidden s^n; moments are 0."""
    state = init_direct(options.feedback_init, network, seed, backend)
    for n in state.weights:
        init_moments(state, n, options.feedback.optimizer)
    return state


def begin(options: Options, at: At, sigma: float, noises: int) -> Iterating:
    """Return what does the iterations of Algorithm 2 on Q^n."""

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        epsilon = at.batch.noise("epsilon", at.s.shape, sigma, noise_key(at.n), k, EPSILON)
        gradient, loss = iterate(at, state.weights[at.n], epsilon, sigma)
        return Iteration({"weight": gradient}, loss, {"epsilon": epsilon})

    return iteration


def closed_form(options: Options, state: State, at: At, descent: Descent) -> dict[str, Array]:
    """Do all iterations on Q^n from the expected gradient for small noise, or take the Q that the loss is least at.

    With J_b of shape (C, D) the Jacobian of the logits in s^n, ŷ_ε − ŷ → J ε, so that the loss's mean over the noise is
    mean over batch and units of ‖J_bᵀ Q − I‖², and its gradient, with A = Σ_b J_b J_bᵀ,

        (2/(B D)) (A Q − Σ_b J_b),  0 at Q* = A⁻¹ Σ_b J_b
    """
    A, J = at.batch.jacobian_sums[at.n]
    xp, q = array_module(A), state.weights[at.n]
    scale = A.dtype.type(2 / (len(at.batch) * q.shape[1]))
    if options.expected == "optimum":
        # What A, computed in its dtype, has in directions that no sample's J reaches is rounding.
        rcond = len(A) * float(np.finfo(A.dtype).eps)
        q[...] = xp.linalg.pinv(A.astype(xp.float64), rcond=rcond) @ J
    else:
        for k in range(descent.iterations):
            gradient = at.batch.product(A, q, "gradient")
            gradient -= J
            gradient *= scale
            step_feedback(descent, state, at.n, k, {"weight": gradient})
    # Of what is ‖J_bᵀ Q − I‖² = tr(Qᵀ A Q) − 2 tr(Qᵀ J) + D, averaged.
    loss = ((q * (A @ q)).sum() - 2 * (q * J).sum()) * (scale / 2) + 1
    return {"A": A, "J": J, "loss": loss}


def noise_key(n: int) -> int:
    """Return the number of the block that s^n comes from, whose output is disturbed."""
    return n - 1


def iterate(at: At, q: Array, epsilon: Array, sigma: float) -> tuple[Array, Array]:
    """Return the gradient of Q and the loss of an iteration, for ε of s^n's shape.

    r_ε − (s + ε) = Q ŷ_ε + s − Q ŷ − s − ε = Q (ŷ_ε − ŷ) − ε.
    """
    batch, noise = at.batch, epsilon.reshape(len(epsilon), -1)
    s_epsilon = array_module(epsilon).add(at.s, epsilon, out=batch.array("s + epsilon", at.s.shape))
    y_difference = batch.run_on(at.n, s_epsilon) - batch.logits  # ŷ_ε − ŷ
    residual = batch.product(y_difference, q, "residual")
    residual -= noise  # r_ε − (s + ε)
    # In NumPy's floats: Python's would stop at a σ² beyond their range instead of giving what is not finite.
    scale = noise.dtype.type(1 / (np.float64(sigma) ** 2 * len(batch) * noise.shape[1]))
    gradient = batch.product(y_difference.T, residual, "gradient")
    gradient *= 2 * scale
    flat = residual.reshape(-1)
    return gradient, array_module(flat).multiply(flat, flat, out=flat).sum() * scale


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the direct target of every block's output, from the last to the first."""
    Q, delta = state.weights, batch.dlogits * batch.dlogits.dtype.type(-options.eta)  # t^N − s^N
    for at in batch.down():
        yield Target(batch.product(delta, Q[at.n + 1], "delta") if at.n + 1 in Q else delta)


def local_update(options: Options, at: At, target: Target) -> Update:
    """Return the gradient of `local_loss`, the target constant."""
    dW, db, _ = at.backward(target.delta, scale=-2 / averaged(at.block, len(at.batch)))
    return dW, db


def local_loss(options: Options, block: Block, s: Array, t: Array) -> float:
    """Return Σ (s − t)² averaged over the batch, of a convolution over its units, too."""
    return float(((s - t) ** 2).sum()) / averaged(block, len(s))


def averaged(block: Block, samples: int) -> int:
    """Return over how many numbers a block's local loss is averaged."""
    return samples * (math.prod(block.out_shape) if block.kind == "conv" else 1)


def pairs(state: State, network: Network) -> list[tuple[int, Array, Array | None]]:
    """Return n, Q^n and the weight that it can be compared with: only the last has one, θ^{N−1} transposed."""
    last = len(network) - 1
    return [(n, q, network.weights[last].T if n == last else None) for n, q in state.weights.items()]


def flops(options: Options, network: Network) -> int:
    """Return the operations of the products of targets and updates for one sample: dW per block, and Q on δ^N."""
    return sum(map(adjoint_flops, network.blocks)) + sum(direct_flops(network))


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of feedback training for one sample: the network run on, two with Q.

    In closed form it is one backward pass to s^1 per class; products with A, once per batch, are not counted.
    """
    if options.expected:
        return network.blocks[-1].next_shape[0] * sum(map(block_flops, network.blocks[1:]))
    return sum(
        int(at_block(options.feedback.iterations, n - 1)) * (2 * direct + sum(map(block_flops, network.blocks[n:])))
        for n, direct in enumerate(direct_flops(network), start=1)
    )


RULE = Rule(
    options=Options,
    init_state=init_state,
    targets=targets,
    local_update=local_update,
    local_loss=local_loss,
    feedback=Feedback(
        begin=begin,
        pairs=pairs,
        flops=feedback_flops,
        closed_form=closed_form,
        expected=lambda options: bool(options.expected),
        epochs=lambda options: (options.pretrain_epochs, options.extra_epochs),
        noise_key=noise_key,
    ),
    flops=flops,
    check=check,
)
