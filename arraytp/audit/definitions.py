"""Algorithms of the package's rules written out on NumPy arrays, for the checks that know a function's definition.

Each table is keyed by the function that a rule uses, not by the rule: a new rule that uses `dtp.targets` is checked
against its definition, and one with targets of its own is not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Floats, host
from arraytp.audit.jacobians import jacobians, overlap
from arraytp.audit.setting import Setting
from arraytp.model.blocks import Block
from arraytp.optim import at_block
from arraytp.rules import alignment, drl, dtp, gnt, ldrl, ridge_tp, tp, weight_mirror

Loss = Callable[[Floats, Floats | None], float]
"""(ω, G's bias) → the loss of an iteration of feedback training with given noise."""


def feedback_input(block: Block, t: Floats, index: Any, unpool: str) -> Floats:
    """Return f(unpool(t)), the input of G's affine map."""
    u = t if block.pool is None else reference.unpool(t, index, block.pool, unpool)
    return reference.activation(u, block.activation.name)


def feedback_module(block: Block, omega: Floats, t: Floats, index: Any, unpool: str) -> Floats:
    """Return ω ∘ f(unpool(t)), which is G(t) without its bias."""
    return reference.transposed(block, omega, feedback_input(block, t, index, unpool))


# Targets: t − s from the last block to the first.


def difference_targets(setting: Setting) -> list[Floats]:
    """Return δ^N = −β B ∂L/∂s^N, δ^n = G^n(s^{n+1} + δ^{n+1}) − G^n(s^{n+1})."""
    network, options, omega = setting.on_host(), setting.options, _omega(setting)
    _, s, indices = reference.forward(network, host(setting.images))
    deltas = [_output_difference(setting)]
    for n in reversed(range(1, len(network))):
        t, block = s[n + 1] + deltas[-1].reshape(s[n + 1].shape), network.blocks[n]
        g_t, g_s = (feedback_module(block, omega[n], each, indices[n], options.unpool) for each in (t, s[n + 1]))
        deltas.append((g_t - g_s).reshape(s[n].shape))
    return deltas


def plain_targets(setting: Setting) -> list[Floats]:
    """Return t^n − s^n for t^N = s^N − β B ∂L/∂s^N, t^n = G^n(t^{n+1})."""
    network, options, omega = setting.on_host(), setting.options, _omega(setting)
    _, s, indices = reference.forward(network, host(setting.images))
    deltas = [_output_difference(setting)]
    for n in reversed(range(1, len(network))):
        t, block = s[n + 1] + deltas[-1].reshape(s[n + 1].shape), network.blocks[n]
        g = feedback_module(block, omega[n], t, indices[n], options.unpool)
        deltas.append((g + host(setting.experiment.rule_state.biases[n])).reshape(s[n].shape) - s[n])
    return deltas


def direct_targets(setting: Setting) -> list[Floats]:
    """Return δ^N = −η ∂L/∂s^N, δ^n = Q^n (φ(s^N + δ^N) − φ(s^N)), φ(ŷ) = ŷ or tanh(ŷ R)."""
    _, s, _ = reference.forward(setting.on_host(), host(setting.images))
    delta, q = -setting.options.eta * host(setting.batch.dlogits), _omega(setting)
    phi = _phi(setting, s[-1] + delta) - _phi(setting, s[-1]) if 0 in q else delta
    return [delta, *((phi @ q[n]).reshape(s[n].shape) for n in reversed(range(1, len(s) - 1)))]


def _phi(setting: Setting, y: Floats) -> Floats:
    result: Floats = np.tanh(y @ _omega(setting)[0]) if 0 in _omega(setting) else y
    return result


def ridge_targets(setting: Setting) -> list[Floats]:
    """Return δ^N = −β B ∂L/∂s^N, δ^n = (unpool d) W⁺, W⁺ from the SVD of W, d = f⁻¹(t) − f⁻¹(s) or D⁻¹ δ."""
    network, options = setting.on_host(), setting.options
    _, s, indices = reference.forward(network, host(setting.images))
    deltas = [_output_difference(setting)]
    for n in reversed(range(1, len(network))):
        block, name = network.blocks[n], network.blocks[n].activation.name
        low, high = (bound + sign * options.clip for bound, sign in zip(block.activation.range, (1, -1), strict=True))
        inside, t = (np.clip(x, low, high) for x in (s[n + 1], s[n + 1] + deltas[-1].reshape(s[n + 1].shape)))
        z, z_t = reference.inverse(inside, name), reference.inverse(t, name)
        d = z_t - z if options.activation == "inverse" else deltas[-1].reshape(z.shape) / reference.slope(z, name)
        d = d if block.pool is None else reference.unpool(d, indices[n], block.pool, "accumulate")  # type: ignore[arg-type]
        u, sigma, v = np.linalg.svd(network.weights[n].reshape(-1, network.weights[n].shape[-1]), full_matrices=False)
        through = ((u * (sigma / (sigma**2 + options.ridge))) @ v).reshape(network.weights[n].shape)
        deltas.append(reference.transposed(block, through, d).reshape(s[n].shape))
    return deltas


def gauss_newton_targets(setting: Setting) -> list[Floats]:
    """Return δ^N = −β B ∂L/∂s^N, δ^n = −β Jᵀ (J Jᵀ + γI)⁻¹ (B ∂L/∂s^N) of every sample."""
    options, e = setting.options, len(setting.batch) * host(setting.batch.dlogits)
    deltas = [_output_difference(setting)]
    for _, jacobian in sorted(jacobians(setting, drl.MOST_CLASSES).items(), reverse=True):
        gram = np.einsum("bsc,bsd->bcd", jacobian, jacobian) + options.damping * np.eye(e.shape[1])
        change = np.einsum("bsc,bcd,bd->bs", jacobian, np.linalg.inv(gram), e)
        deltas.append(-options.beta * change)
    return deltas


def _output_difference(setting: Setting) -> Floats:
    dlogits = host(setting.batch.dlogits)
    result: Floats = -setting.options.beta * len(dlogits) * dlogits
    return result


def _omega(setting: Setting) -> dict[int, Floats]:
    return {n: host(weight) for n, weight in setting.experiment.rule_state.weights.items()}


TARGETS: Mapping[Any, tuple[str, Callable[[Setting], list[Floats]]]] = {
    dtp.targets: ("Eq. 4", difference_targets),
    tp.targets: ("t^n = G(t^{n+1})", plain_targets),
    drl.targets: ("t = s + Q(t^N) − Q(s^N)", direct_targets),
    gnt.targets: ("δ = −β Jᵀ(JJᵀ + γI)⁻¹ e", gauss_newton_targets),
    ridge_tp.targets: ("t = s + (f⁻¹(t) − f⁻¹(s)) W⁺", ridge_targets),
}
"""By `Rule.targets`: source and definition."""


# Local losses of a block's output s, for a target t.


def half_squares(options: Any, block: Block, s: Floats, t: Floats) -> float:
    """Return (1/B) Σ ½‖s − t‖², divided by β if the options say so."""
    value = float(np.sum((s - t) ** 2)) / 2 / len(s)
    return value / options.beta if options.divide_by_beta else value


def mean_squares(options: Any, block: Block, s: Floats, t: Floats) -> float:
    """Return the mean of (s − t)² for a convolution, Σ (s − t)² / B for a dense block."""
    return float(np.mean((s - t) ** 2)) if block.kind == "conv" else float(np.sum((s - t) ** 2)) / len(s)


LOCAL_LOSSES: Mapping[Any, tuple[str, Callable[[Any, Block, Floats, Floats], float]]] = {
    dtp.local_loss: ("Eq. 6", half_squares),
    drl.local_loss: ("DRL, update", mean_squares),
}
"""By `Rule.local_loss`: source and definition."""


# Losses of feedback training, given block n, the noises by name and the options' σ.


def ldrl_loss(setting: Setting, n: int, noises: Mapping[str, Floats]) -> Loss:
    """−2 ε·(G(F(s + ε)) − G(s')) + ‖G(s' + η) − G(s')‖², mean over the batch: twice Eq. 13.

    Where η is not drawn, the limit (σ²/B) ‖∂G‖² = (σ²/B) Σ M ω² replaces the second term.
    """
    block, theta, bias, s = _block(setting, n)
    unpool, epsilon, eta = setting.options.unpool, noises["epsilon"].reshape(s.shape), noises.get("eta")
    _, clean, index = reference.block_forward(block, theta, bias, s)
    _, noisy, noisy_index = reference.block_forward(block, theta, bias, s + epsilon)
    at_clean, at_noisy = (feedback_input(block, t, i, unpool) for t, i in ((clean, index), (noisy, noisy_index)))
    if eta is None:
        _, M, _ = overlap(setting, n)
        weights = at_block(setting.options.feedback.sigma, n - 1) ** 2 * M
    else:
        at_eta = feedback_input(block, clean + eta.reshape(clean.shape), index, unpool)

    def loss(omega: Floats, _: Floats | None) -> float:
        g, g_epsilon = (reference.transposed(block, omega, a) for a in (at_clean, at_noisy))
        if eta is None:
            output = float((weights * omega**2).sum())
        else:
            output = float(((reference.transposed(block, omega, at_eta) - g) ** 2).sum())
        return (float(-2 * (epsilon * (g_epsilon - g)).sum()) + output) / len(s)

    return loss


def dtp_loss(setting: Setting, n: int, noises: Mapping[str, Floats]) -> Loss:
    """‖s + ε − G(F(s + ε))‖², mean over the batch."""
    block, theta, bias, s = _block(setting, n)
    noisy = s + noises["epsilon"].reshape(s.shape)
    _, output, index = reference.block_forward(block, theta, bias, noisy)
    a = feedback_input(block, output, index, setting.options.unpool)

    def loss(omega: Floats, omega_bias: Floats | None) -> float:
        r = reference.transposed(block, omega, a) + (0 if omega_bias is None else omega_bias)
        return float(((noisy - r) ** 2).sum() / len(s))

    return loss


def drl_loss(setting: Setting, n: int, noises: Mapping[str, Floats]) -> Loss:
    """Mean of ((Q φ(ŷ_ε) + s − Q φ(ŷ)) − (s + ε))² over σ², or of (Q φ(ŷ_ε) − (s + ε))²."""
    rest, s = setting.on_host().rest(n), host(setting.batch.at(n).s)
    sigma, epsilon = at_block(setting.options.feedback.sigma, n - 1), noises["epsilon"].reshape(s.shape)
    _, noisy, _ = reference.forward(rest, s + epsilon)
    _, clean, _ = reference.forward(rest, s)
    phi, target, variance = _phi(setting, noisy[-1]), s + epsilon, 1.0
    if setting.options.loss == "difference":
        phi, target, variance = phi - _phi(setting, clean[-1]), epsilon, sigma**2

    def loss(q: Floats, _: Floats | None) -> float:
        residual = phi @ q - target.reshape(len(s), -1)
        return float(np.mean(residual**2) / variance)

    return loss


def mirror_loss(setting: Setting, n: int, noises: Mapping[str, Floats]) -> Loss:
    """−⟨x, yBᵀ⟩ / rows, for the noise x and the block's response y to it."""
    block, theta, bias, s = _block(setting, n)
    x = noises["epsilon"].reshape(s.shape)
    y = _response(block, theta, bias, x)
    return lambda B, _: -float((x * reference.transposed(block, B, y)).sum()) / _rows(y)


def alignment_loss(setting: Setting, n: int, noises: Mapping[str, Floats]) -> Loss:
    """Sum of primitives: α self or amp, β decay and, for ia, γ null."""
    (block, theta, bias, s), options = _block(setting, n), setting.options
    y = _response(block, theta, bias, s)

    def loss(B: Floats, _: Floats | None) -> float:
        value = options.beta * (B**2).sum() / 2
        if options.loss == "sa":
            return float(value - options.alpha * (B * theta).sum())
        back = reference.transposed(block, B, y)
        null = options.gamma * (back**2).sum() / 2 if options.loss == "ia" else 0.0
        return float(value + (null - options.alpha * (s * back).sum()) / _rows(y))

    return loss


def _response(block: Block, theta: Floats, bias: Floats, x: Floats) -> Floats:
    """Return f(xW + b), without the pool."""
    z, _, _ = reference.block_forward(block, theta, bias, x)
    return reference.activation(z, block.activation.name)


def _rows(y: Floats) -> int:
    """Return the number of rows of x's patches."""
    return int(np.prod(y.shape[:-1]))


def _block(setting: Setting, n: int) -> tuple[Block, Floats, Floats, Floats]:
    """Return block, θ, its bias and s^n on the host."""
    at = setting.batch.at(n)
    return at.block, host(at.weight), host(at.bias), host(at.s).reshape(-1, *at.block.in_shape)


FEEDBACK_LOSSES: Mapping[Any, tuple[str, Callable[[Setting, int, Mapping[str, Floats]], Loss]]] = {
    ldrl.begin: ("L-DRL, Algorithm 3", ldrl_loss),
    dtp.begin: ("DTP, Algorithm 1", dtp_loss),
    drl.begin: ("DRL, Algorithm 2", drl_loss),
    weight_mirror.begin: ("weight mirror, Eq. 7", mirror_loss),
    alignment.begin: ("Kunin et al.", alignment_loss),
}
"""By `Feedback.begin`: source and definition."""
