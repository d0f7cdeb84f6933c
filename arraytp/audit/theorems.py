"""Theorems 4.2 and 4.3 of the DTP paper, checked numerically, and how well the Jacobians of F and G match.

4.2: the mean of the L-DRL gradient, divided by σ², converges to its closed form as one over the root of the number of
samples.
4.3: with ω = θ the updates divided by β converge to a limit, linearly in β. The limit is the update by the product of
the ∂G, and BP's update where f' is the same at s as at z and unpooling overwrites nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import chdtri

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, apart, checked, host, worst
from arraytp.audit.differences import relative
from arraytp.audit.feedback import SUMS
from arraytp.audit.gradients import exact
from arraytp.audit.jacobians import expected_gradient, overlap
from arraytp.audit.setting import Setting
from arraytp.backend import Array
from arraytp.model.blocks import block_flops
from arraytp.model.passes import At
from arraytp.ops.pool import overlaps
from arraytp.rules import dtp, ldrl
from arraytp.rules.feedback import module_pairs
from arraytp.training.compare import angle_degrees

# Below the gaps between the elements of max-pools' windows, above the rounding errors of differences.
SIGMA = 1e-10
MOST_NOISES, LEAST_NOISES, FLOPS = 512, 64, 1e10
GROUPS = 64
# The probability of rejecting a correct gradient, if the scatter were known and the same in all directions.
CHANCE = 1e-6
# But the scatter is estimated from few groups, and a χ² has too short a tail if one direction dominates many weak ones.
LEAST_EXCESS = 3.0
EXPONENT = 0.15
BETAS = (1e-3, 1e-4, 1e-5, 1e-6)
FAR = 1e-7
TINY_BETA = 1e-8
# β = 1e-8 moves curved activations by as much, relative to their targets.
LIMIT = 1e-6


def modules(setting: Setting) -> bool:
    """Tell whether the rule trains a feedback module G^n for every block but the first."""
    trained = setting.rule.feedback
    return trained is not None and setting.rule.pairs is module_pairs and setting.unpool is not None


def jacobian_matching(setting: Setting) -> Iterator[Check]:
    """Check ‖∂G − ∂Fᵀ‖/‖∂F‖ of every block, now and at the ω that minimises it."""
    mode = setting.unpool
    if not modules(setting) or mode is None:
        return
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        if block.activation.flat_below_zero:
            continue
        N, M, P = overlap(setting, n)
        computed = [batch.at(n).jacobian_overlap(mode) for batch in (setting.batch, setting.plain)]
        error = worst(*(apart(a, b) for pair in computed for a, b in zip(pair, (N, M), strict=True)))
        yield checked(f"{block.label}: ⟨∂Fᵀ, ∂G⟩ and ‖∂G‖² by definition", "N, M", At.jacobian_overlap, error, SUMS)
        theta, omega = host(setting.network.weights[n]), host(setting.experiment.rule_state.weights[n])
        optimum = theta * np.divide(N, M, out=np.zeros_like(N), where=M > 0)
        for when, weight in (("now", omega), ("at the optimum θ N/M", optimum)):
            squares = (weight * (weight * M - 2 * theta * N) + theta**2 * P).sum()
            residual = math.sqrt(max(squares, 0.0) / (theta**2 * P).sum())
            yield checked(f"{block.label}: JMC ‖∂G − ∂Fᵀ‖/‖∂F‖ {when}", "JMC", At.jacobian_overlap, residual)
        # Relative to the gradient's terms: with ω already at the optimum the gradient itself is 0.
        size = 2 / len(setting.batch) * np.abs(theta * N).max()
        expected = expected_gradient(omega, theta, N, M, len(setting.batch))
        now, least = (_expected_gradient(setting, n, computed[0], weight) for weight in (omega, optimum))
        error = worst(*(relative(np.abs(a).max(), size) for a in (now - expected, least)))
        yield checked(f"{block.label}: expected gradient, 0 at the optimum", "2/B (ωM − θN)", ldrl.expected_gradient,
                      error, SUMS)  # fmt: skip


def _expected_gradient(setting: Setting, n: int, computed: tuple[Array, Array], omega: Floats) -> Floats:
    """Return the package's expected gradient divided by σ², given N and M."""
    a, b = (2 / len(setting.batch) * sums for sums in reversed(computed))
    return host(ldrl.expected_gradient(setting.batch.at(n), setting.put(omega), a, b)).copy()


def theorem_4_2(setting: Setting) -> Iterator[Check]:
    """Check that the mean of L-DRL's gradients converges to the closed form as one over the root of the samples."""
    if setting.rule.feedback is None or setting.rule.feedback.begin is not ldrl.begin:
        return
    for n, block in enumerate(setting.network.blocks[1:], start=1):
        if block.activation.flat_below_zero:
            continue
        (N, M, _), count, state = overlap(setting, n), len(setting.batch), setting.state()
        theta = host(setting.network.weights[n])
        limit = expected_gradient(host(state.weights[n]), theta, N, M, count)
        affordable = int(FLOPS / (4 * block_flops(block) * count))
        most = 2 ** int(math.log2(min(MOST_NOISES, max(LEAST_NOISES, affordable))))
        iterating = ldrl.begin(setting.options, setting.batch.at(n), SIGMA, most)
        total, squares = np.zeros_like(limit), []
        for group in np.array_split(np.arange(most), GROUPS):
            gradients = (host(iterating(state, k, False).gradients["weight"]) / SIGMA**2 for k in group.tolist())
            part = sum(gradients, np.zeros_like(limit))
            squares.append(float(np.linalg.norm(part / len(group) - limit) ** 2))
            total += part
        error = float(np.linalg.norm(total / most - limit))
        growth, tolerance = shrinking(squares, error)
        exponent = math.log(growth / GROUPS) / (2 * math.log(GROUPS)) if growth else -math.inf
        yield checked(f"{block.label}: error over samples ~ n^{exponent:.3f}; its square over n^-½'s",
                      "Theorem 4.2", ldrl.iterate, growth, tolerance)  # fmt: skip
        yield checked(f"{block.label}: error after {most * count} samples", "Theorem 4.2", ldrl.iterate,
                      relative(error, 2 / count * float(np.linalg.norm(theta * N))))  # fmt: skip


def shrinking(squares: Sequence[float], error: float) -> tuple[float, float]:
    """Return the ratio of the mean's squared error to what groups of samples predict, and the tolerance of the ratio.

    `squares` are ‖mean of the group − limit‖² of groups of equal size, `error` is ‖mean of all − limit‖. Its expected
    square is that of a group divided by the number of groups; it varies roughly as a χ² with the degrees of freedom
    that the groups' scatter implies. One unit has few, so an exponent fitted to a single path would be off by half.
    """
    mean, variance = float(np.mean(squares)), float(np.var(squares))
    if mean == 0:
        return (math.inf if error else 0.0), LEAST_EXCESS
    freedom = max(2 * mean**2 / variance, 1.0) if variance else math.inf
    tolerance = float(chdtri(freedom, CHANCE)) / freedom if math.isfinite(freedom) else LEAST_EXCESS
    return error**2 * len(squares) / mean, max(tolerance, LEAST_EXCESS)


def theorem_4_3(setting: Setting) -> Iterator[Check]:
    """Check updates divided by β, with ω = θ: their limit for small β, its distance to BP, and their convergence."""
    rule, blocks = setting.rule, setting.network.blocks
    if rule.targets is not dtp.targets or rule.local_update is not dtp.local_update:
        return
    if any(block.activation.flat_below_zero for block in blocks[1:]):
        return
    limit, bp_weights = _limit(setting), [host(weight) for weight, _ in exact(setting.batch)]
    small = _over_beta(setting, TINY_BETA)
    for block, a, b in zip(blocks, small, limit, strict=True):
        yield checked(f"{block.label}: updates over β at β = {TINY_BETA:g}", "Theorem 4.3: Π ∂G", rule.targets,
                      apart(a, b), LIMIT)  # fmt: skip
    matched = not any(block.activation.curved for block in blocks[1:])
    overwritten = setting.unpool == "overwrite" and any(b.pool is not None and overlaps(b.pool) for b in blocks)
    for n, block in enumerate(blocks):
        if matched and not overwritten:
            yield checked(f"{block.label}: with ω = θ the limit is BP's update", "Theorem 4.3", rule.targets,
                          apart(limit[n], bp_weights[n]), SUMS)  # fmt: skip
        else:
            yield checked(f"{block.label}: angle of the limit to BP, degrees", "Theorem 4.3", rule.targets,
                          angle_degrees(limit[n], bp_weights[n]))  # fmt: skip
    if any(block.activation.curved for block in blocks[1:]):
        yield from _approach(setting, limit)


def _approach(setting: Setting, limit: list[Floats]) -> Iterator[Check]:
    """Check that updates divided by β converge to their limit linearly in β."""
    blocks, pairs = setting.network.blocks, [zip(_over_beta(setting, beta), limit, strict=True) for beta in BETAS]
    errors = np.array([[np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in of_beta] for of_beta in pairs])
    for n, (block, of_block) in enumerate(zip(blocks, errors.T, strict=True)):
        above = {b.activation for b in blocks[n + 1 :]}
        # With nothing curved above, a block is at its limit for every β; leaky ReLU units that cross their kink jump.
        if not any(f.curved for f in above) or any(not f.curved and f.derivative is not None for f in above):
            continue
        if of_block[0] > FAR:
            exponent = float(np.polyfit(np.log(BETAS), np.log(of_block), 1)[0])
            what = f"{block.label}: distance to the limit ~ β^{exponent:.3f}, 1 expected"
            yield checked(what, "Theorem 4.3", setting.rule.targets, abs(exponent - 1), EXPONENT)


def _over_beta(setting: Setting, beta: float) -> list[Floats]:
    """Return the weight updates divided by β, with ω = θ."""
    options, state = replace(setting.options, beta=beta, divide_by_beta=True), setting.state()
    state.weights |= {n: setting.network.weights[n] for n in range(1, len(setting.network))}
    return [host(weight) for weight, _ in setting.propose(options=options, state=state)]


def _limit(setting: Setting) -> list[Floats]:
    """Return the limit of the weight updates / β for small β: δ^n = ω ∘ (f'(u) ⊙ unpool(δ^{n+1})), u = unpool(s)."""
    network, mode = setting.on_host(), setting.unpool
    zs, s, indices = reference.forward(network, host(setting.images))
    delta, updates = -len(setting.labels) * host(setting.batch.dlogits), []
    for n in reversed(range(len(network))):
        block, weight = network.blocks[n], network.weights[n]
        delta = delta.reshape(s[n + 1].shape)
        dweight, _, _ = reference.block_backward(block, -delta / len(delta), zs[n], indices[n], s[n], weight)
        updates.append(dweight)
        u, du = s[n + 1], delta
        if block.pool is not None:
            u, du = (reference.unpool(t, indices[n], block.pool, str(mode)) for t in (u, du))  # type: ignore[arg-type]
        delta = reference.transposed(block, weight, reference.slope(u, block.activation.name) * du)
    return updates[::-1]


CHECKS = (jacobian_matching, theorem_4_2, theorem_4_3)
