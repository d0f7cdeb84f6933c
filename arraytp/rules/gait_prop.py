"""GAIT-prop (GP): targets through exact inverses, nudged so that the local updates are BP's (GP paper, section 2).

W^n of every block but the first is square. a_l is what layer l passes on; its auxiliary units have t = a throughout.

**Literal form**, the paper's Algorithm 1 with m, the ½ and √dim of the authors' code (docs/math/differences.md):

    t_L = a_L − ½ ∂L/∂a_L,  m = 1
    for l = L … 0:
        update = ∂/∂θ_l of m ‖t_l − a_l‖² = 2 m D_l (a_l − t_l) outer a_{l−1}
        γ_l = η √dim / ‖a_l − t_l‖ (normalised) or a constant (vanilla)
        ε_l = γ_l D_l²,  m ← m / γ_l
        t_{l−1} = G_l((1 − ε_l) a_l + ε_l t_l)

**Difference form**: within one linear region of f the forward signal cancels, and of δ = t − a remains
δ_{l−1} = (D_l^{-1} ε_l δ_l) W_l^{-1}. With e = −2 m δ, whose update is D_l e_l outer a_{l−1}, it is

    e_L = ∂L/∂a_L,  e_{l−1} = (D_l e_l) W_l^{-1}

for every γ: BP's recursion with W^{-1} in place of Wᵀ, and BP's result where W is orthogonal. It subtracts no nearly
equal numbers. It equals the literal form up to rounding where f is linear, or where it is leaky ReLU and no unit's
nudged activation (1 − ε) a + ε t lies on the other side of the kink than a (`crossings` counts those); for ELU
and tanh up to first order in γ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.fast.inverse import backward_through_inverse, check_invertible, check_range, factor_blocks, inverse
from arraytp.fast.orthogonality import excess_of
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward
from arraytp.model.network import Block, ForwardPass, Network, adjoint_flops, block_flops
from arraytp.ops.activations import activation_derivative
from arraytp.options import STRICT, Positive
from arraytp.rules.protocol import Excess, State, Target, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are the authors' (docs/math/differences.md); `normalise: false` is vanilla GP."""

    name: Literal["gait-prop"] = "gait-prop"
    form: Literal["literal", "difference"] = "literal"
    normalise: bool = True
    gamma: Positive = 1e-3
    eta: Positive = 1e-7
    norm: Literal["l2", "l2_squared"] = "l2"
    scale_by_sqrt_dim: bool = True
    rescale_updates: bool = True

    __pydantic_config__ = STRICT


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Return what is worth knowing before a run, one line each.

    Raises
    ------
    UserError
        If a block that must be inverted has no inverse; names it and what would fit.
    """
    check_invertible(blocks)
    if options.form == "literal" and dtype == "float32":
        return ["rule gait-prop: form literal in float32 is lost in rounding (measured: 84 to 91 degrees from BP after "
                "3 layers of 1024); use dtype float64, or form difference"]  # fmt: skip
    return []


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Return the rule's state: none."""
    return {}


def excess(network: Network, workspace: Workspace) -> Excess:
    """Return E = WWᵀ − I of every block but the first, by its position: what inverses and the regulariser share."""
    return excess_of({n: network.weights[n] for n in range(1, len(network))}, workspace)


def updates(
    options: Options,
    state: State,
    network: Network,
    passed: ForwardPass,
    dlogits: Array,
    workspace: Workspace,
    excess: Excess | None = None,
) -> Updates:
    """Return GP's updates of every block; parameters and result as in `arraytp.rules.bp.updates`.

    `excess` is that of the network's weights, where the caller has it.

    Raises
    ------
    IllConditionedError
        If a weight matrix cannot be inverted in its dtype.
    NonFiniteError
        If the literal form nudges an ELU or tanh unit out of its range, or the unit is saturated.
    """
    if options.form == "difference":
        return [update for _, update in _difference(options, network, passed, dlogits, workspace, excess)][::-1]
    number, result = dlogits.dtype.type, []
    found = literal_targets(options, network, passed, dlogits, workspace, excess)
    for n, target in zip(reversed(range(len(network))), found, strict=True):
        e = number(-2) * per_sample(target.m, target.delta) * target.delta
        block, s, x = network.blocks[n], passed.s[n + 1], passed.x[n]
        result.append(backward(block, e, s, passed.index[n], x, None, workspace, ("gait-prop", n))[:2])
    return result[::-1]


def targets(
    options: Options,
    state: State,
    network: Network,
    passed: ForwardPass,
    dlogits: Array,
    workspace: Workspace,
    excess: Excess | None = None,
) -> Iterator[Target]:
    """Return the targets of every block, from the last to the first, by `options.form`; the update is 2 m D (a − t).

    Parameters and errors as in `updates`.
    """
    form = literal_targets if options.form == "literal" else difference_targets
    return form(options, network, passed, dlogits, workspace, excess)


def literal_targets(
    options: Options,
    network: Network,
    passed: ForwardPass,
    dlogits: Array,
    workspace: Workspace,
    excess: Excess | None = None,
) -> Iterator[Target]:
    """Yield t, δ = t − a and m of what every block passes on, from the last block to the first (Algorithm 1)."""
    factors = factor_blocks(network, workspace, excess)
    number = dlogits.dtype.type
    t = passed.logits - number(0.5) * dlogits
    m = array_module(t).ones(len(t), dtype=t.dtype)
    for n in reversed(range(len(network))):
        block, a, x = network.blocks[n], passed.x[n + 1], passed.x[n]
        delta = t - a
        yield Target(delta, t, m)
        if n == 0:
            return
        gamma, still = perturbation(options, delta, block)
        if options.rescale_updates:
            m = m / gamma
        y = nudged(block, passed.s[n + 1], t, gamma)
        check_range(block, n, y)
        t = inverse(block, factors[n], network.biases[n], y, x, workspace, ("target", n))
        # Where nothing is to be changed the inverse leaves rounding errors only, which m would blow up.
        t = array_module(t).where(per_sample(still, t), x, t)


def _difference(
    options: Options,
    network: Network,
    passed: ForwardPass,
    dlogits: Array,
    workspace: Workspace,
    excess: Excess | None = None,
) -> Iterator[tuple[Array, tuple[Array, Array]]]:
    """Yield e and the update of every block, from the last to the first."""
    factors = factor_blocks(network, workspace, excess)
    e = dlogits
    for n in reversed(range(1, len(network))):
        block, key = network.blocks[n], ("gait-prop", n)
        dweight, dbias, before = backward_through_inverse(block, factors[n], e, passed, n, workspace, key)
        yield e, (dweight, dbias)
        if not options.rescale_updates:
            before *= per_sample(perturbation(options, e / e.dtype.type(2), block)[0], before)
        e = before
    first = backward(network.blocks[0], e, passed.s[1], passed.index[0], passed.x[0], None, workspace, ("gait-prop", 0))
    yield e, first[:2]


def perturbation(options: Options, difference: Array, block: Block) -> tuple[Array, Array]:
    """Return γ of every sample (Equation 5) and which samples have a = t (their γ is 1), both (B,).

    `difference` is t − a of what the block passes on, of either sign; auxiliary units count in dim.
    """
    xp, number = array_module(difference), difference.dtype.type
    flat = difference.reshape(len(difference), -1)
    largest = xp.absolute(flat).max(axis=1)
    still = largest < number(np.finfo(flat.dtype).tiny)
    safe = xp.where(still, number(1), largest)
    # Divided by the largest entry first: its square may be too small for the dtype.
    norm = xp.where(still, number(1), safe * xp.sqrt(xp.square(flat / safe[:, None]).sum(axis=1)))
    if options.norm == "l2_squared":
        norm = norm * norm
    scale = options.eta * (float(np.prod(block.out_shape)) ** 0.5 if options.scale_by_sqrt_dim else 1.0)
    gamma = number(scale) / norm if options.normalise else xp.full(len(flat), options.gamma, dtype=flat.dtype)
    return xp.where(still, number(1), gamma), still


def nudged(block: Block, s: Array, t: Array, gamma: Array) -> Array:
    """Return (1 − ε) a + ε t with ε = γ D² (Equation 4), and a for auxiliary units; shape (B, *out_shape)."""
    y, a = s.copy(), s[..., : t.shape[-1]]
    derivative = activation_derivative(a, block.activation)
    epsilon = per_sample(gamma, a) if derivative is None else per_sample(gamma, a) * derivative * derivative
    y[..., : t.shape[-1]] = (s.dtype.type(1) - epsilon) * a + epsilon * t
    return y


def difference_targets(
    options: Options,
    network: Network,
    passed: ForwardPass,
    dlogits: Array,
    workspace: Workspace,
    excess: Excess | None = None,
) -> Iterator[Target]:
    """Yield δ and m of what every block passes on, from the last block to the first, by the difference form."""
    m = array_module(dlogits).ones(len(dlogits), dtype=dlogits.dtype)
    found = _difference(options, network, passed, dlogits, workspace, excess)
    for n, (e, _) in zip(reversed(range(len(network))), found, strict=True):
        delta = e.reshape(passed.x[n + 1].shape) / (e.dtype.type(-2) * per_sample(m, passed.x[n + 1]))
        yield Target(delta, m=m)
        if options.rescale_updates:
            m = m / perturbation(options, delta, network.blocks[n])[0]


def crossings(options: Options, block: Block, s: Array, target: Target) -> int:
    """Return how many units of a block's output the nudge takes across the kink of leaky ReLU.

    There a and a + ε δ have different signs, and the literal form bends off if the block is to be inverted.
    """
    if block.activation != "leaky-relu":
        return 0
    a = s[..., : block.passed_shape[-1]]
    gamma, _ = perturbation(options, target.delta, block)
    moved = nudged(block, s, a + target.delta, gamma)[..., : a.shape[-1]]
    return int(((moved < 0) != (a < 0)).sum())


def per_sample(values: Array, like: Array) -> Array:
    """Return one value a sample, of shape (B,), with as many axes as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def product_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `updates` for one sample; factorising, once a batch, is not counted."""
    gradients = sum(adjoint_flops(block) for block in network.blocks)
    carried = block_flops if options.form == "literal" else adjoint_flops
    return gradients + sum(carried(block) for block in network.blocks[1:])
