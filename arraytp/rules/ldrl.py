"""DTP with feedback trained by the local difference reconstruction loss (L-DRL), block after block.

On every batch, for n = 1 … N−1, K_n times (Algorithm 3):

    s^{n+1} = F^n(s^n)
    ε ~ N(0, σ_n²),  s_ε^{n+1} = F^n(s^n + ε)
    r_ε = G^n(s_ε^{n+1}) − G^n(s^{n+1}) + s^n
    η ~ N(0, σ_n²),  r_η = G^n(s^{n+1} + η) − G^n(s^{n+1}) + s^n
    ω^n descends (1/B) Σ [−2 ε·(r_ε − s^n) + ‖r_η − s^n‖²]         twice Eq. 13, as in the authors' code

With d1 = a(s_ε^{n+1}) − a(s^{n+1}) and d2 = a(s^{n+1} + η) − a(s^{n+1}), a the input of G's affine map, r_ε − s^n is
ω ∘ d1 and r_η − s^n is ω ∘ d2, so that the gradient is

    ∂/∂ω = (2/B) Σ [−ε ⋆ d1 + (ω ∘ d2) ⋆ d2],  and exactly 0 for G's bias, which cancels.

Targets and updates are as in DTP. If ∂G = (∂F)ᵀ, updates/β tend to BP's as β → 0 (Theorem 4.3).

Source: DTP paper, Section 4.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.errors import UserError
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At, NoiseAndProducts, Samples
from arraytp.options import SGD
from arraytp.rules import dtp
from arraytp.rules.collapse import sgd_iterations
from arraytp.rules.feedback import check_expected, feedback_products, step_feedback
from arraytp.rules.protocol import Descent, Feedback, Iterating, Iteration, Rule, State


@dataclass(frozen=True, kw_only=True)
class LDRLOptions(dtp.TargetOptions):
    """DTP's settings, and which part of the loss is replaced by its small-noise expectation, if any.

    `expected` descends the small-noise expectation of the whole loss in closed form (Theorem 4.2); no noise is drawn.
    `output_noise: expected` draws only ε, and uses the small-noise expectation of η's part of the gradient.
    """

    expected: bool = False
    output_noise: Literal["sampled", "expected"] = "sampled"


@dataclass(frozen=True, kw_only=True)
class Options(LDRLOptions):
    """The settings that all variants of L-DRL share."""

    name: Literal["ldrl"] = "ldrl"


def check(options: LDRLOptions, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return the notes of `dtp.check`.

    Raises
    ------
    UserError
        As `dtp.check`; with `expected` also as `check_expected`, and for `output_noise: expected` beside it.
    """
    if options.expected:
        check_expected(options.feedback)
        if options.output_noise == "expected":
            raise UserError(
                "rule.output_noise: expected, but rule.expected draws no noise at all; leave one of them out"
            )
    return dtp.check(options, blocks, dtype, reduction)


def iterate(at: Samples, omega: Any, _: Array | None, epsilon: Array, eta: Array) -> Array:
    """Add these samples' contribution to half the gradient of ω (Algorithm 3); return their Σ ‖ω ∘ d2‖²."""
    d1 = at.a(*at.F(epsilon))
    d1 -= at.a_next  # a(F(s + ε)) − a(s')
    at.subtract(epsilon, d1)  # −ε ⋆ d1
    d2 = at.a(at.s_next + eta, at.index)
    d2 -= at.a_next  # a(s' + η) − a(s')
    r = at.transposed(omega, d2)  # ω ∘ d2
    at.add(r, d2)  # (ω ∘ d2) ⋆ d2
    return at.square(r)


def iterate_input(at: Samples, omega: Any, _: Array | None, epsilon: Array, eta: Array) -> Array:
    """Add the part of `iterate` that comes from ε; return 0."""
    d1 = at.a(*at.F(epsilon))
    d1 -= at.a_next  # a(F(s + ε)) − a(s')
    at.subtract(epsilon, d1)  # −ε ⋆ d1
    return array_module(d1).zeros((), dtype=d1.dtype)


def begin(options: LDRLOptions, at: At, sigma: float, noises: int) -> Iterating:
    """Return the function that does the iterations of Algorithm 3 on a block."""
    if options.output_noise == "expected":
        return begin_expected_output(options, at, sigma, noises)
    shared = at.iterations(options.unpool, NoiseAndProducts(sigma, noises, products=2, output_noise=True))

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        omega = state.weights[at.n]
        sums = shared.sums(iterate, k, omega)
        # The loss is quadratic in ω: ⟨ω, ∂/∂ω⟩ = −2 ε·(ω ∘ d1) + 2 ‖ω ∘ d2‖², averaged over the batch.
        loss = (sums.weight * omega).sum() - sums.returned if with_loss else None
        return Iteration({"weight": sums.weight}, loss, shared.noise(k))

    return iteration


def begin_expected_output(options: LDRLOptions, at: At, sigma: float, noises: int) -> Iterating:
    """Return iterations that sample only ε, and replace η's part of the loss by its small-noise limit (σ²/B) ‖∂G‖².

    ∂/∂ω = (2/B) [Σ −ε ⋆ d1 + σ² M ⊙ ω], two products per iteration instead of four. M is that of Theorem 4.2
    (Equations 14 to 17), of shape (k, k, 1, O) or (1, out).
    """
    shared = at.iterations(options.unpool, NoiseAndProducts(sigma, noises, products=1, output_noise=False))
    # M of this rank's samples only, because gradients are summed over the ranks.
    _, M = at.batch.engine.jacobian_overlap(at, options.unpool)
    a = (M * (2 * sigma**2 / len(at.batch))).astype(at.weight.dtype)

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        omega = state.weights[at.n]
        sums = shared.sums(iterate_input, k, omega)
        share = at.batch.array("expected output noise", omega.shape)
        array_module(omega).multiply(omega, a, out=share)
        # The part of ε is linear in ω, that of η quadratic.
        loss = ((sums.weight + share / 2) * omega).sum() if with_loss else None
        gradient = sums.weight
        gradient += share
        return Iteration({"weight": gradient}, loss, shared.noise(k))

    return iteration


def closed_form(options: LDRLOptions, state: State, at: At, descent: Descent) -> dict[str, Array]:
    """Do all iterations on a block at once, with the expected gradient for small noise (Theorem 4.2).

    SGD does them in one pass, whatever K is (`arraytp.rules.collapse`); Adam, which is not linear, takes K element-wise
    iterations.
    """
    N, M = at.jacobian_overlap(options.unpool)
    scale = 2 * descent.sigma**2 / len(at.batch)
    a, b, omega = scale * M, scale * N, state.weights[at.n]
    if isinstance(descent.optimizer, SGD):
        sgd_iterations(at, state, a, b, descent.optimizer, descent.lr, descent.iterations)
    else:
        for k in range(descent.iterations):
            step_feedback(descent, state, at.n, k, {"weight": expected_gradient(at, omega, a, b)})
    return {"N": N, "M": M, "loss": expected_loss(omega, at.weight, a, b)}


def expected_loss(omega: Array, theta: Array, a: Array, b: Array) -> Array:
    """Return (σ²/B) (‖∂G‖² − 2⟨∂Fᵀ, ∂G⟩) = Σ (a ω²/2 − b θ ω), of shape ()."""
    xp = array_module(omega)
    if xp is not np:
        # No cuBLAS products, so that a device's step can be captured in a graph.
        return ((omega * (a / 2) - theta * b) * omega).sum()
    squares, products = (xp.einsum("...co,...co->...o", omega, other) for other in (omega, theta))
    return (squares * a[..., 0, :]).sum() / 2 - (products * b[..., 0, :]).sum()


def expected_gradient(at: At, omega: Array, a: Array, b: Array) -> Array:
    """Return a ω − b θ, the limit of the mean gradient for small noise, in one of the pass's arrays."""
    gradient = at.batch.array("expected gradient", omega.shape)
    array_module(omega).multiply(omega, a.astype(omega.dtype), out=gradient)
    gradient -= at.weight * b.astype(omega.dtype)
    return gradient


def feedback_flops(options: LDRLOptions, network: Network, noises: int = 1) -> int:
    """Return the FLOPs of the matrix products in feedback training for one sample, `noises` noises per iteration.

    θ ∘ s is computed once, θ ∘ (s + ε) and −ε ⋆ d1 for each noise and, where η is drawn, also ω ∘ d2 and r ⋆ d2.
    """
    products = 4 if options.output_noise == "sampled" else 2
    return 0 if options.expected else feedback_products(options.feedback, network, products * noises)


RULE: Rule[Any] = replace(
    dtp.RULE,
    options=Options,
    check=check,
    feedback=Feedback(
        begin=begin,
        flops=feedback_flops,
        closed_form=closed_form,
        expected=lambda options: options.expected,
    ),
)
