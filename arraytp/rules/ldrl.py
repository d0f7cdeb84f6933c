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

Then targets and updates as in DTP. Where ∂G = (∂F)ᵀ, the updates over β are BP's for small β (Theorem 4.3).

Source: DTP paper, Section 4.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from arraytp.backend import Array
from arraytp.model.blocks import Network
from arraytp.model.feedback import expected_gradient
from arraytp.model.passes import At, NoiseAndProducts, Samples
from arraytp.rules import dtp
from arraytp.rules.feedback import feedback_products, module_pairs
from arraytp.rules.protocol import Feedback, Iterating, Iteration, Rule, State


@dataclass(frozen=True, kw_only=True)
class Options(dtp.TargetOptions):
    """As DTP's. `expected` descends the expectation for small noise in closed form (Theorem 4.2), without noise."""

    name: Literal["ldrl"] = "ldrl"
    expected: bool = False


def iterate(at: Samples, omega: Any, _: Array | None, epsilon: Array, eta: Array) -> Array:
    """Add some samples' part of half the gradient of ω (Algorithm 3); return their part of Σ ‖ω ∘ d2‖²."""
    d1 = at.a(*at.F(epsilon))
    d1 -= at.a_next  # a(F(s + ε)) − a(s')
    at.subtract(epsilon, d1)  # −ε ⋆ d1
    d2 = at.a(at.s_next + eta, at.index)
    d2 -= at.a_next  # a(s' + η) − a(s')
    r = at.transposed(omega, d2)  # ω ∘ d2
    at.add(r, d2)  # (ω ∘ d2) ⋆ d2
    return at.square(r)


def begin(options: dtp.TargetOptions, at: At, sigma: float, noises: int) -> Iterating:
    """Return what does the iterations of Algorithm 3 on a block."""
    shared = at.iterations(options.unpool, NoiseAndProducts(sigma, noises, products=2, output_noise=True))

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        omega = state.weights[at.n]
        sums = shared.sums(iterate, k, omega)
        # The loss is quadratic in ω: ⟨ω, ∂/∂ω⟩ = −2 ε·(ω ∘ d1) + 2 ‖ω ∘ d2‖², averaged over the batch.
        loss = (sums.weight * omega).sum() - sums.returned if with_loss else None
        return Iteration({"weight": sums.weight}, loss, shared.noise(k))

    return iteration


def begin_expected(options: Options, at: At, sigma: float, noises: int) -> Iterating:
    """Return what does the iterations in closed form, or by noise where they are not asked for."""
    if not options.expected:
        return begin(options, at, sigma, noises)
    overlap = at.jacobian_overlap(options.unpool)

    def iteration(state: State, k: int, with_loss: bool) -> Iteration:
        gradient, loss = expected_step(at, state.weights[at.n], overlap, sigma)
        return Iteration({"weight": gradient}, loss)

    return iteration


def expected_step(at: At, omega: Array, overlap: tuple[Array, Array], sigma: float) -> tuple[Array, Array]:
    """Return σ² times the closed form of Theorem 4.2 and its loss (σ²/B)(−2⟨∂Fᵀ, ∂G⟩ + ‖∂G‖²)."""
    n, m = overlap
    scale = omega.dtype.type(sigma**2)
    loss = (omega * (omega * m - 2 * at.weight * n)).sum() * (scale / len(at.batch))
    return expected_gradient(at.block, at.weight, omega, overlap, len(at.batch)) * scale, loss


def feedback_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of feedback training for one sample: four an iteration, θ ∘ s once."""
    return feedback_products(options.feedback, network, 0 if options.expected else 4)


RULE: Rule[Any] = replace(
    dtp.RULE,
    options=Options,
    feedback=Feedback(
        begin=begin_expected,
        pairs=module_pairs,
        flops=feedback_flops,
        noisy=lambda options: not options.expected,
    ),
)
