"""DTP with direct linear feedback trained by the difference reconstruction loss (DRL, DDTP-linear).

The output has a direct linear connection Q^n to every hidden s^n, n = 1 … N−1; there are no layer-to-layer modules G^n.
K_n times per batch, with ε ~ N(0, σ_n²) and ŷ_ε the logits computed from s^n + ε, Q^n descends the loss in the second
line:

    r_ε = Q^n ŷ_ε + s^n − Q^n ŷ
    (1/σ_n²) · mean over batch and units of (r_ε − (s^n + ε))²                                        Algorithm 2

with weight decay in place of the second term of the DTP paper's Eq. 11. Then

    t^N = s^N − η ∂L/∂s^N, L the mean loss
    t^n = s^n + Q^n(t^N) − Q^n(s^N)
    update of θ of a dense block: (1/B) Σ 2 D ⊙ (s − t) outer input; of a convolution: ∂/∂θ of the mean of (s − t)² over
    batch and units

Source: Meulemans et al. (2020), as in the code that the DTP paper compares with. There, the biases of Q^n stay 0
because they cancel in every difference; arraytp has none. (DDTP-control's code trains them; docs/math/differences.md.)

Two other rules of that paper are options. DDTP-control (`loss: reconstruction`) trains Q^n on ‖Q^n ŷ_ε − (s^n + ε)‖²,
averaged over batch and units, without the difference. DDTP-RHL (`hidden`) puts one fixed random hidden layer R, shared
by all Q^n, between output and feedback: φ(ŷ) = tanh(ŷ R) replaces ŷ in losses and targets. R is stored as weight 0.

Schedules: s-DDTP makes one feedback update per batch, and trains only the feedback for `pretrain_epochs` at the start
and for `extra_epochs` after every epoch but the last; p-DDTP has no such epochs; it makes K feedback updates per batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module, matrix_product
from arraytp.errors import UserError
from arraytp.model.blocks import Block, Network, adjoint_flops, block_flops
from arraytp.model.initialise import initial_weight
from arraytp.model.passes import At, Batch
from arraytp.ops.activations import TANH
from arraytp.ops.noise import EPSILON
from arraytp.optim import at_block
from arraytp.options import Adam, Border, FeedbackTraining, InitName, Positive
from arraytp.rules.dfa import direct_flops
from arraytp.rules.feedback import check_expected, check_feedback, init_direct, init_moments, step_feedback
from arraytp.rules.protocol import Descent, Feedback, Iterating, Iteration, Rule, State, Target, Update

# From about this many classes on, the closed form costs more than some tens of iterations with sampled noise.
MOST_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """`eta` is the target step size η. Lists in `feedback` have one value per hidden s^n, from s^1 on.

    With `expected`, Q^n descends the small-noise expectation of the loss in closed form; "optimum" sets Q^n to its
    minimiser. `hidden` is the number of units of R; 0 means that there is no R.
    """

    name: Literal["drl"] = "drl"
    eta: Positive = 0.02
    feedback_init: InitName = "xavier-normal"
    feedback: FeedbackTraining = field(
        default_factory=lambda: FeedbackTraining(iterations=1, sigma=0.01, optimizer=Adam(lr=1e-3, weight_decay=1e-5))
    )
    pretrain_epochs: Border = 0
    extra_epochs: Border = 0
    loss: Literal["difference", "reconstruction"] = "difference"
    hidden: Border = 0
    expected: bool | Literal["optimum"] = False


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return a note if the smallest σ is close to float32's rounding of the activations.

    Raises
    ------
    UserError
        As `check_feedback`; with `expected` also as `check_expected`, if the options have no closed form, or if
        there are too many classes.
    """
    check_feedback(options.name, options.feedback, blocks, reduction)
    if options.expected:
        check_expected(options.feedback)
        for key, usual in (("loss", "difference"), ("hidden", 0)):
            if getattr(options, key) != usual:
                raise UserError(
                    f"rule.expected: the closed form of rule drl is that of the linear difference loss, not of "
                    f"rule.{key}: {getattr(options, key)}; use expected: false"
                )
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
    """Draw Q^n, of shape (classes, size of s^n), for every hidden s^n; moments are 0.

    With R, of shape (classes, hidden), Q^n has shape (hidden, size of s^n).
    """
    state = init_direct(options.feedback_init, network, seed, backend, options.hidden or None)
    for n in state.weights:
        init_moments(state, n, options.feedback.optimizer)
    if options.hidden:
        shape = network.blocks[-1].next_shape[0], options.hidden
        drawn = initial_weight(options.feedback_init, shape, seed, "feedback", len(network) - 1)
        state.weights[0] = backend.asarray(drawn.astype(network.weights[0].dtype))
    return state


def begin(options: Options, at: At, sigma: float, noises: int) -> Iterating:
    """Return the function that does the iterations of Algorithm 2 on Q^n."""

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        epsilon = at.batch.noise("epsilon", at.s.shape, sigma, noise_key(at.n), k, EPSILON)
        gradient, loss = iterate(options, state, at, epsilon, sigma)
        return Iteration({"weight": gradient}, loss, {"epsilon": epsilon})

    return iteration


def closed_form(options: Options, state: State, at: At, descent: Descent) -> dict[str, Array]:
    """Do all iterations on Q^n with the expected gradient for small noise, or set Q^n to the minimiser of the loss.

    Let J_b, of shape (C, D), be the Jacobian of sample b's logits with respect to s^n. For small noise ŷ_ε − ŷ → J_b ε,
    so the mean of the loss over the noise is ‖J_bᵀ Q − I‖² averaged over batch and units. Its gradient, with
    A = Σ_b J_b J_bᵀ, is

        (2/(B D)) (A Q − Σ_b J_b),  0 at Q* = A⁻¹ Σ_b J_b
    """
    A, J = at.batch.jacobian_sums[at.n]
    q = state.weights[at.n]
    scale = A.dtype.type(2 / (len(at.batch) * q.shape[1]))
    if options.expected == "optimum":
        q[...] = least(A, J)
    else:
        for k in range(descent.iterations):
            gradient = at.batch.product(A, q, "gradient")
            gradient -= J
            gradient *= scale
            step_feedback(descent, state, at.n, k, {"weight": gradient})
    # The mean is Σ_b ‖J_bᵀ Q − I‖² / (B D), and the sum is tr(Qᵀ A Q) − 2 tr(Qᵀ J) + B D with J = Σ_b J_b.
    loss = ((q * matrix_product(A, q)).sum() - 2 * (q * J).sum()) * (scale / 2) + 1
    return {"A": A, "J": J, "loss": loss}


def least(A: Array, J: Array) -> Array:
    """Return Q* = A⁻¹ J in float64, with the pseudo-inverse of A."""
    xp = array_module(A)
    if xp is np and not np.isfinite(A).all():
        # NumPy's SVD would raise an error that does not say where this began; NaN makes the loss NaN, and the training
        # loop then says where.
        return np.full(J.shape, np.nan)
    u, singular, vt = xp.linalg.svd(A.astype(xp.float64), full_matrices=False)
    # In directions that no sample's J reaches, A holds only rounding errors of the dtype it was computed in.
    cutoff = len(A) * float(np.finfo(A.dtype).eps) * singular.max()
    # CuPy's pinv would wait for the device to count the singular values above the cutoff.
    inverse = 1 / xp.where(singular > cutoff, singular, xp.inf)
    return vt.T @ (inverse[:, None] * u.T) @ J


def optimum(options: Options, batch: Batch) -> dict[int, Array]:
    """Return Q* of every hidden s^n: for the linear difference loss and up to `MOST_CLASSES` classes, else none."""
    if options.loss != "difference" or options.hidden or batch.logits.shape[1] > MOST_CLASSES:
        return {}
    return {n: least(A, J) for n, (A, J) in batch.jacobian_sums.items()}


def noise_key(n: int) -> int:
    """Return n − 1, the number of the block whose output is s^n, which the noise perturbs."""
    return n - 1


def iterate(options: Options, state: State, at: At, epsilon: Array, sigma: float) -> tuple[Array, Array]:
    """Return the gradient of Q and the loss of an iteration, for ε of s^n's shape.

    In the difference loss, r_ε − (s + ε) = Q φ(ŷ_ε) + s − Q φ(ŷ) − s − ε = Q (φ(ŷ_ε) − φ(ŷ)) − ε.
    """
    batch, noise = at.batch, epsilon.reshape(len(epsilon), -1)
    s_epsilon = array_module(epsilon).add(at.s, epsilon, out=batch.array("s + epsilon", at.s.shape))
    y_epsilon = batch.run_on(at.n, s_epsilon)
    # A NumPy float: where σ² is out of range, a Python float would raise an error instead of becoming non-finite.
    variance = np.float64(sigma) ** 2
    if options.loss == "difference":
        phi = phi_difference(state, batch, y_epsilon - batch.logits)  # φ(ŷ_ε) − φ(ŷ)
    else:
        phi, variance = hidden(state, y_epsilon), np.float64(1)
        noise = s_epsilon.reshape(noise.shape)
    residual = batch.product(phi, state.weights[at.n], "residual")
    residual -= noise  # r_ε − (s + ε)
    scale = noise.dtype.type(1 / (variance * len(batch) * noise.shape[1]))
    gradient = batch.product(phi.T, residual, "gradient")
    gradient *= 2 * scale
    flat = residual.reshape(-1)
    return gradient, array_module(flat).multiply(flat, flat, out=flat).sum() * scale


def hidden(state: State, logits: Array) -> Array:
    """Return φ(ŷ): ŷ itself, or tanh(ŷ R)."""
    return TANH(matrix_product(logits, state.weights[0])) if 0 in state.weights else logits


def phi_difference(state: State, batch: Batch, delta: Array) -> Array:
    """Return φ(ŷ + δ) − φ(ŷ) for the batch's logits ŷ, without rounding errors of the size of φ(ŷ)."""
    if 0 not in state.weights:
        return delta
    R = state.weights[0]
    return TANH.difference(matrix_product(batch.logits, R), matrix_product(delta, R))


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the direct target of every block's output, from the last to the first."""
    Q, delta = state.weights, batch.dlogits * batch.dlogits.dtype.type(-options.eta)  # t^N − s^N
    phi = phi_difference(state, batch, delta)  # φ(t^N) − φ(s^N)
    for at in batch.down():
        yield Target(batch.product(phi, Q[at.n + 1], "delta") if at.n + 1 in Q else delta)


def local_update(options: Options, at: At, target: Target) -> Update:
    """Return the gradient of `local_loss` with the target held constant."""
    dW, db, _ = at.backward(target.delta, scale=-2 / averaged(at.block, len(at.batch)))
    return dW, db


def local_loss(options: Options, block: Block, s: Array, t: Array) -> float:
    """Return Σ (s − t)² averaged over the batch and, for a convolution, over its units too."""
    return float(((s - t) ** 2).sum()) / averaged(block, len(s))


def averaged(block: Block, samples: int) -> int:
    """Return the number of values over which a block's local loss is averaged."""
    return samples * (math.prod(block.out_shape) if block.kind == "conv" else 1)


def pairs(state: State, network: Network) -> list[tuple[int, Array, Array | None]]:
    """Return n, Q^n and the weight to compare it with: only the last Q^n has one, θ^{N−1} transposed, none with R."""
    last, linear = len(network) - 1, 0 not in state.weights
    return [
        (n, q, network.weights[last].T if n == last and linear else None) for n, q in state.weights.items() if n > 0
    ]


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the products in targets and updates for one sample: dW per block, and Q^n applied to δ^N."""
    return sum(map(adjoint_flops, network.blocks)) + sum(_q_flops(options, network))


def _q_flops(options: Options, network: Network) -> list[int]:
    """Return, for every hidden s^n, the FLOPs of a product with Q^n for one sample."""
    classes = network.blocks[-1].next_shape[0]
    return [flops * (options.hidden or classes) // classes for flops in direct_flops(network)]


def feedback_flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products in feedback training for one sample.

    An iteration takes the forward pass from s^n on and two products with Q^n. The closed form takes one backward pass
    to s^1 per class; J Jᵀ and products with A are not counted.
    """
    if options.expected:
        return network.blocks[-1].next_shape[0] * sum(map(block_flops, network.blocks[1:]))
    return sum(
        int(at_block(options.feedback.iterations, n - 1)) * (2 * direct + sum(map(block_flops, network.blocks[n:])))
        for n, direct in enumerate(_q_flops(options, network), start=1)
    )


RULE = Rule(
    options=Options,
    init_state=init_state,
    targets=targets,
    local_update=local_update,
    local_loss=local_loss,
    feedback=Feedback(
        begin=begin,
        flops=feedback_flops,
        closed_form=closed_form,
        expected=lambda options: bool(options.expected),
        epochs=lambda options: (options.pretrain_epochs, options.extra_epochs),
        noise_key=noise_key,
    ),
    optimum=optimum,
    pairs=pairs,
    flops=flops,
    check=check,
)
