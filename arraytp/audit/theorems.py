"""Theorems 4.2 and 4.3 of the DTP paper as numbers, and how well the Jacobians of F and G match.

4.2: the mean of the L-DRL gradient over σ² goes to its closed form as one over the root of the number of samples.
4.3: with ω = θ the updates over β go to a limit, linearly in β. It is that of the product of the ∂G, and BP's where
f' is the same at s as at z and unpooling overwrites nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import chdtri

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, apart, checked, host, worst
from arraytp.audit.differences import relative
from arraytp.audit.feedback import SUMS, watch
from arraytp.audit.setting import Setting
from arraytp.fast.feedback_training import freeze, ldrl_gradient
from arraytp.model import feedback
from arraytp.model.network import Block, block_flops
from arraytp.ops.pool import overlaps
from arraytp.optim import at_block
from arraytp.rules import bp, ldrl
from arraytp.training.compare import angle_degrees

MODULES = ("tp", "dtp", "ldrl", "ldrl-parallel")
# Below the gaps between the elements of max-pools' windows, above what rounding leaves of differences.
SIGMA = 1e-10
MOST_NOISES, LEAST_NOISES, FLOPS = 512, 64, 1e10
GROUPS = 64
# How often a correct gradient may be found wrong, were the scatter known and the same in all directions.
CHANCE = 1e-6
# It is found from so few groups, and where one direction dominates many weak ones a χ² has too short a tail.
LEAST_EXCESS = 3.0
EXPONENT = 0.15
BETAS = (1e-3, 1e-4, 1e-5, 1e-6)
FAR = 1e-7
TINY_BETA = 1e-8
CURVED = ("elu", "tanh")


def _overlap(setting: Setting, n: int) -> tuple[Floats, Floats, Floats, int]:
    """Return N, M and P = Σ D_F² by definition, of shape (k, k, 1, O) or (1, out), and how many samples."""
    block = setting.network.blocks[n]
    x, weight, bias = host(setting.passed.x[n]), host(setting.network.weights[n]), host(setting.network.biases[n])
    z, s, index = reference.block_forward(block, weight, bias, x)
    f = reference.slope(z, block.activation)
    u, count, kept = s, np.ones_like(z), np.ones_like(z)
    if block.pool is not None and index is not None:
        u = reference.unpool(s, index, block.pool, setting.options.unpool)
        # How many windows have their maximum here, and how many of their values are kept by unpooling.
        count = reference.unpool(np.ones_like(s), index, block.pool, "accumulate")
        kept = count if setting.options.unpool == "accumulate" else np.minimum(count, 1)
    g = reference.slope(u, block.activation)
    n_sum, m_sum, p_sum = (_per_tap(block, values) for values in (f * g * kept, g * g * kept, f * f * count))
    return n_sum, m_sum, p_sum, len(x)


def _per_tap(block: Block, values: Floats) -> Floats:
    """Return sums over samples and over those positions whose tap lies inside the image."""
    window, outputs = block.window, values.shape[-1]
    if window is None:
        return np.asarray(values.sum(axis=0))[None]
    inside = reference.bordered(np.ones((1, window.height, window.width, 1)), window, 0.0)[0, :, :, 0]
    found = np.empty((window.kernel, window.kernel, 1, outputs))
    for i, j, rows, columns in reference.taps(window):
        found[i, j, 0] = np.einsum("bpqo,pq->o", values, inside[rows, columns])
    return found


def jacobian_matching(setting: Setting) -> Iterator[Check]:
    """Check ‖∂G − ∂Fᵀ‖/‖∂F‖ of every block, now and at the ω that minimises it."""
    if setting.config.rule.name not in MODULES:
        return
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        if block.activation == "relu":
            continue
        overlap, m_overlap, p_overlap, batch = _overlap(setting, n)
        found = feedback.jacobian_overlap(
            block, setting.passed.s[n + 1], setting.passed.index[n], setting.options.unpool
        )
        error = worst(apart(found[0], overlap), apart(found[1], m_overlap))
        yield checked(
            f"{block.label}: ⟨∂Fᵀ, ∂G⟩ and ‖∂G‖² by definition", "N, M", feedback.jacobian_overlap, error, SUMS
        )
        theta = host(setting.network.weights[n])
        omega = host(setting.experiment.rule_state[f"feedback/{n}/weight"])
        optimum = theta * np.divide(overlap, m_overlap, out=np.zeros_like(overlap), where=m_overlap > 0)
        for when, weight in (("now", omega), ("at the optimum θ N/M", optimum)):
            squares = (weight * (weight * m_overlap - 2 * theta * overlap) + theta**2 * p_overlap).sum()
            residual = math.sqrt(max(squares, 0.0) / (theta**2 * p_overlap).sum())
            yield checked(f"{block.label}: JMC ‖∂G − ∂Fᵀ‖/‖∂F‖ {when}", "JMC", feedback.jacobian_overlap, residual)
        put = setting.put
        gradient = feedback.expected_gradient(block, put(theta), put(optimum), found, batch)
        start = feedback.expected_gradient(block, put(theta), put(omega), found, batch)
        wanted = 2 / batch * (omega * m_overlap - theta * overlap)
        # With ω at the optimum already there is nothing to be relative to but the terms.
        size = 2 / batch * np.abs(theta * overlap).max()
        error = worst(*(relative(np.abs(a).max(), size) for a in (host(start) - wanted, host(gradient))))
        yield checked(f"{block.label}: expected gradient, 0 at the optimum", "2/B (ωM − θN)",
                      feedback.expected_gradient, error, SUMS)  # fmt: skip


def theorem_4_2(setting: Setting) -> Iterator[Check]:
    """Check that the mean of the fast path's gradients goes to the closed form as one over the root of the samples."""
    if setting.config.rule.name not in ("ldrl", "ldrl-parallel"):
        return
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        if block.activation == "relu":
            continue
        overlap, m_overlap, _, batch = _overlap(setting, n)
        theta = host(setting.network.weights[n])
        omega = setting.experiment.rule_state[f"feedback/{n}/weight"]
        limit = 2 / batch * (host(omega) * m_overlap - theta * overlap)
        affordable = int(FLOPS / (4 * block_flops(block) * batch))
        most = 2 ** int(math.log2(min(MOST_NOISES, max(LEAST_NOISES, affordable))))
        key, mode = (setting.config.seed, 0), setting.options.unpool
        frozen = freeze(setting.network, setting.passed, n, mode, SIGMA, key, most, setting.workspace)
        total, squares = np.zeros_like(limit), []
        for group in np.array_split(np.arange(most), GROUPS):
            part = sum(host(ldrl_gradient(frozen, omega, k, setting.workspace)[0]) for k in group.tolist()) / SIGMA**2
            squares.append(float(np.linalg.norm(part / len(group) - limit) ** 2))
            total += part
        error = float(np.linalg.norm(total / most - limit))
        growth, tolerance = shrinking(squares, error)
        exponent = math.log(growth / GROUPS) / (2 * math.log(GROUPS)) if growth else -math.inf
        yield checked(f"{block.label}: error over samples ~ n^{exponent:.3f}; its square over n^-½'s",
                      "Theorem 4.2", ldrl_gradient, growth, tolerance)  # fmt: skip
        yield checked(f"{block.label}: error after {most * batch} samples", "Theorem 4.2", ldrl_gradient,
                      relative(error, 2 / batch * float(np.linalg.norm(theta * overlap))))  # fmt: skip


def shrinking(squares: Sequence[float], error: float) -> tuple[float, float]:
    """Return how many times the mean's squared error exceeds what groups of samples promise, and how many it may.

    Parameters
    ----------
    squares : sequence of float
        ‖mean of the group − limit‖² of groups of equal size.
    error : float
        ‖mean of all − limit‖. Its square is that of a group over the number of groups, give or take chance: about a
        χ² of as many degrees of freedom as makes the groups' scatter. One unit has few, so that an exponent fitted to a
        single path would be off by half.
    """
    mean, variance = float(np.mean(squares)), float(np.var(squares))
    if mean == 0:
        return (math.inf if error else 0.0), LEAST_EXCESS
    freedom = max(2 * mean**2 / variance, 1.0) if variance else math.inf
    tolerance = float(chdtri(freedom, CHANCE)) / freedom if math.isfinite(freedom) else LEAST_EXCESS
    return error**2 * len(squares) / mean, max(tolerance, LEAST_EXCESS)


def theorem_4_3(setting: Setting) -> Iterator[Check]:
    """Check updates over β with ω = θ for small β: their limit, its distance to BP, and how they get there."""
    blocks = setting.network.blocks
    if setting.config.rule.name not in MODULES[1:] or any(block.activation == "relu" for block in blocks[1:]):
        return
    rule, limit = setting.experiment.rule, _limit(setting)
    exact = [host(w).copy() for w, _ in bp.updates(bp.Options(), {}, setting.network, setting.passed, setting.dlogits,
                                                  setting.workspace)]  # fmt: skip
    small = _over_beta(setting, TINY_BETA)
    for block, a, b in zip(blocks, small, limit, strict=True):
        yield checked(f"{block.label}: updates over β at β = {TINY_BETA:g}", "Theorem 4.3: Π ∂G", rule.updates,
                      apart(a, b), LIMIT)  # fmt: skip
    matched = all(block.activation in ("linear", "leaky-relu") for block in blocks[1:])
    overwritten = setting.options.unpool == "overwrite" and any(b.pool is not None and overlaps(b.pool) for b in blocks)
    for n, block in enumerate(blocks):
        if matched and not overwritten:
            yield checked(f"{block.label}: with ω = θ the limit is BP's update", "Theorem 4.3", rule.updates,
                          apart(limit[n], exact[n]), SUMS)  # fmt: skip
        else:
            yield checked(f"{block.label}: angle of the limit to BP, degrees", "Theorem 4.3", rule.updates,
                          angle_degrees(limit[n], exact[n]))  # fmt: skip
    if not any(block.activation in CURVED for block in blocks[1:]):
        return
    found = [zip(_over_beta(setting, beta), limit, strict=True) for beta in BETAS]
    errors = np.array([[np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs] for pairs in found])
    for n, (block, each) in enumerate(zip(blocks, errors.T, strict=True)):
        above = {b.activation for b in blocks[n + 1 :]}
        # With nothing curved above, a block is at its limit for every β; leaky units that cross their kink jump.
        if not above & set(CURVED) or "leaky-relu" in above:
            continue
        if each[0] > FAR:
            exponent = float(np.polyfit(np.log(BETAS), np.log(each), 1)[0])
            what = f"{block.label}: distance to the limit ~ β^{exponent:.3f}, 1 wanted"
            yield checked(what, "Theorem 4.3", rule.updates, abs(exponent - 1), EXPONENT)


# β = 1e-8 moves curved activations by as much, relative to their targets.
LIMIT = 1e-6


def _over_beta(setting: Setting, beta: float) -> list[Floats]:
    """Return the weight updates over β, with ω = θ."""
    options = replace(setting.options, beta=beta, divide_by_beta=True)
    state = setting.state()
    for n in range(1, len(setting.network)):
        state[f"feedback/{n}/weight"] = setting.network.weights[n]
    arguments = options, state, setting.network, setting.passed, setting.dlogits, setting.workspace
    return [host(w).copy() for w, _ in setting.experiment.rule.updates(*arguments)]


def _limit(setting: Setting) -> list[Floats]:
    """Return the limit of the weight updates over β for small β: δ^n = ω ∘ (f'(u) ⊙ unpool(δ^{n+1})), u = unpool(s)."""
    there, mode = setting.on_host(), setting.options.unpool
    zs, s, indices = reference.forward(there, host(setting.images))
    delta, found = -len(setting.labels) * host(setting.dlogits), []
    for n in reversed(range(len(there))):
        block, weight = there.blocks[n], there.weights[n]
        delta = delta.reshape(s[n + 1].shape)
        dweight, _, _ = reference.block_backward(block, -delta / len(delta), zs[n], indices[n], s[n], weight)
        found.append(dweight)
        u, moved = s[n + 1], delta
        if block.pool is not None:
            u, moved = (reference.unpool(t, indices[n], block.pool, mode) for t in (u, moved))  # type: ignore[arg-type]
        delta = reference.carry(block, weight, reference.slope(u, block.activation) * moved)
    return found[::-1]


def expected_descent(setting: Setting) -> Iterator[Check]:
    """Check the first step in closed form, where the config asks for it in place of noise."""
    if not getattr(setting.options, "expected", False):
        return
    seen = watch(setting, setting.state())
    for n in dict.fromkeys(one.n for one in seen):
        first = next(one for one in seen if one.n == n)
        overlap, m_overlap, _, batch = _overlap(setting, n)
        theta, sigma = host(setting.network.weights[n]), at_block(setting.options.feedback.sigma, n - 1)
        gradient = 2 * sigma**2 / batch * (first.weight * m_overlap - theta * overlap)
        loss = sigma**2 / batch * (first.weight * (first.weight * m_overlap - 2 * theta * overlap)).sum()
        error = worst(apart(first.arrays["gradient"], gradient), apart(first.arrays["loss"], np.asarray(loss)))
        yield checked(f"{setting.network.blocks[n].label}: expected gradient and loss", "σ² times Theorem 4.2's limit",
                      ldrl.expected_step, error, SUMS)  # fmt: skip


CHECKS = (jacobian_matching, expected_descent, theorem_4_2, theorem_4_3)
