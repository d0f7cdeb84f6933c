"""Difference target propagation (DTP, Lee et al. 2015; DTP paper, Section 3.1), and what all its variants share.

Before the targets, on every batch, K_n times for every block n = 1 … N−1, with ε ~ N(0, σ_n²)      Algorithm 1

    r = G^n(F^n(s^n + ε))
    ω^n and G's bias descend (1/B) Σ ‖s^n + ε − r‖²        (no ½, as in the authors' code)

Then

    t^N = s^N − β ∂L/∂s^N                                  per sample                               Eq. 3
    for n = N−1 … 0:
        update of θ^n = ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², optionally divided by β           Eq. 6
        t^n = s^n + G^n(t^{n+1}) − G^n(s^{n+1})                                                     Eq. 4

The code propagates δ = t − s itself, which stays accurate when it is small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from arraytp.backend import Array, Backend
from arraytp.model.blocks import Block, Network, backward_flops
from arraytp.model.passes import At, Batch, NoiseAndProducts, Samples
from arraytp.options import FeedbackTraining, Positive, Unpool
from arraytp.rules.feedback import FeedbackInit, check_feedback, feedback_products, init_feedback, module_pairs
from arraytp.rules.protocol import Feedback, Iterating, Iteration, Rule, State, Target, Update


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The settings of all variants; defaults are the authors' where these are the same for all networks.

    Angles are measured at `compare_beta`.
    """

    beta: Positive = 0.5
    divide_by_beta: bool = False
    unpool: Unpool = "overwrite"
    feedback_init: FeedbackInit = "kaiming-uniform"
    feedback: FeedbackTraining = field(default_factory=FeedbackTraining)
    compare_beta: Positive = 0.005


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """The settings that all variants share."""

    name: Literal["dtp"] = "dtp"


O = TypeVar("O", bound=TargetOptions)


def check(options: Any, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return a note if a block after the first has ReLU, which breaks the rule even with ω = θ.

    The output of a silent unit, s = 0, lies at the kink of G's own f.

    Raises
    ------
    UserError
        As `check_feedback`.
    """
    check_feedback(options.name, options.feedback, blocks, reduction)
    if any(block.activation.flat_below_zero for block in blocks[1:]):
        return [
            f"rule {options.name}: with activation relu its updates lose the direction of backpropagation's (measured: "
            "about 60 to 90 degrees in LeNet's convolutions even with symmetric feedback); use leaky-relu or elu"
        ]
    return []


def init_state(options: TargetOptions, network: Network, seed: int, backend: Backend) -> State:
    """Draw ω^n and the bias of every G^n, n = 1 … N−1; the moments of their optimiser are 0."""
    return init_feedback(options.feedback_init, options.feedback.optimizer, network, seed, backend)


def iterate(at: Samples, omega: Any, bias: Array, epsilon: Array, _: Array) -> Array:
    """Add these samples' contribution to half the gradients of ω and G's bias; return their loss (Algorithm 1)."""
    a = at.a(*at.F(epsilon))
    r = at.transposed(omega, a)  # ω ∘ a
    r += bias  # r = G(F(s + ε))
    r -= at.s
    r -= epsilon  # r − (s + ε)
    at.add(r, a)
    at.add_bias(r)
    return at.square(r)


def begin(options: TargetOptions, at: At, sigma: float, noises: int) -> Iterating:
    """Return the function that does the iterations of Algorithm 1 on a block."""
    shared = at.iterations(options.unpool, NoiseAndProducts(sigma, noises, products=1, output_noise=False))

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        sums = shared.sums(iterate, k, state.weights[at.n], state.biases[at.n])
        return Iteration({"weight": sums.weight, "bias": sums.bias}, sums.returned, shared.noise(k))

    return iteration


def targets(options: TargetOptions, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the difference target of every block's output, from the last to the first (Eq. 3, 4)."""
    omega, delta = state.weights, output_difference(options.beta, batch)
    for at in batch.down():
        yield Target(delta)
        if at.n > 0:
            delta = at.feedback_difference(omega[at.n], delta, options.unpool)


def output_difference(beta: float, batch: Batch) -> Array:
    """Return δ^N = t^N − s^N = −β ∂L/∂s^N per sample, where ∂L/∂s^N is B times the mean loss's `dlogits` (Eq. 3)."""
    return batch.dlogits * batch.dlogits.dtype.type(-beta * len(batch))


def local_update(options: TargetOptions, at: At, target: Target) -> Update:
    """Return ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², t held constant, divided by β if `divide_by_beta` (Eq. 6)."""
    dW, db, _ = at.backward(target.delta, scale=-1 / (len(at.batch) * _divisor(options)))
    return dW, db


def local_loss(options: TargetOptions, block: Block, s: Array, t: Array) -> float:
    """Return (1/B) Σ ½ ‖s − t‖², divided by β if `divide_by_beta` (Eq. 6)."""
    return float(((s - t) ** 2).sum()) / (2 * len(s) * _divisor(options))


def _divisor(options: TargetOptions) -> float:
    return options.beta if options.divide_by_beta else 1.0


def compared(options: O) -> O:
    """Return the options with which updates are compared with BP's: `beta` is `compare_beta`."""
    return replace(options, beta=options.compare_beta)


def flops(options: TargetOptions, network: Network) -> int:
    """Return the FLOPs of the matrix products in targets and updates for one sample: as many as for BP."""
    return backward_flops(network.blocks)


def feedback_flops(options: TargetOptions, network: Network) -> int:
    """Return the FLOPs of the products in feedback training for one sample: three per iteration, and θ ∘ s once."""
    return feedback_products(options.feedback, network, 3)


RULE: Rule[Any] = Rule(
    options=Options,
    init_state=init_state,
    targets=targets,
    local_update=local_update,
    local_loss=local_loss,
    feedback=Feedback(begin=begin, flops=feedback_flops),
    pairs=module_pairs,
    flops=flops,
    check=check,
    compared=compared,
)
