"""GAIT-prop (GP): targets through exact inverses, nudged so that the local updates are BP's (GP paper, section 2).

W^n of every block but the first is square. a_l is what layer l passes on; its auxiliary units have t = a throughout.

**Literal form**, the paper's Algorithm 1:

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
nudged activation (1 − ε) a + ε t lies on the other side of the kink than a (`difference_targets` counts those); for ELU
and tanh up to first order in γ.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.fused import backward
from arraytp.inverse import backward_through_inverse, check_invertible, check_range, factor_blocks, inverse
from arraytp.network import Block, ForwardPass, Network, adjoint_flops, block_flops
from arraytp.ops.activations import activation_derivative
from arraytp.options import STRICT, Positive
from arraytp.parallel import Workspace
from arraytp.rules.protocol import State, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are the authors' (methods.md, section 2); `normalise: false` is vanilla GP."""

    name: Literal["gait-prop"] = "gait-prop"
    form: Literal["literal", "difference"] = "literal"
    normalise: bool = True
    gamma: Positive = 1e-3
    eta: Positive = 1e-7
    norm: Literal["l2", "l2_squared"] = "l2"
    scale_by_sqrt_dim: bool = True
    rescale_updates: bool = True

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Target:
    """δ = t − a of what a block passes on, its m per sample (B,), and how many units are nudged across the kink."""

    delta: Array
    m: Array
    crossings: int


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


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return GP's updates of every block; parameters and result as in `arraytp.rules.bp.updates`.

    Raises
    ------
    IllConditionedError
        If a weight matrix cannot be inverted in its dtype.
    NonFiniteError
        If the literal form nudges an ELU or tanh unit out of its range, or the unit is saturated.
    """
    form = _literal if options.form == "literal" else _difference
    return form(options, network, passed, dlogits, workspace)


def _literal(options: Options, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace) -> Updates:
    factors = factor_blocks(network, workspace)
    number, result = dlogits.dtype.type, []
    t = passed.logits - number(0.5) * dlogits
    m = array_module(t).ones(len(t), dtype=t.dtype)
    for n in reversed(range(len(network))):
        block, a, x = network.blocks[n], passed.x[n + 1], passed.x[n]
        difference = a - t
        e = number(2) * per_sample(m, a) * difference
        result.append(backward(block, e, passed.s[n + 1], passed.index[n], x, None, workspace, ("gait-prop", n))[:2])
        if n == 0:
            break
        gamma, still = perturbation(options, difference, block)
        if options.rescale_updates:
            m = m / gamma
        y = nudged(block, passed.s[n + 1], t, gamma)
        check_range(block, n, y)
        t = inverse(block, factors[n], network.biases[n], y, x, workspace, ("target", n))
        # Where nothing is to be changed the inverse leaves rounding errors only, which m would blow up.
        t = array_module(t).where(per_sample(still, t), x, t)
    return result[::-1]


def _difference(
    options: Options, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    factors = factor_blocks(network, workspace)
    result: Updates = []
    e = dlogits
    for n in reversed(range(1, len(network))):
        block, key = network.blocks[n], ("gait-prop", n)
        dweight, dbias, before = backward_through_inverse(block, factors[n], e, passed, n, workspace, key)
        result.append((dweight, dbias))
        if not options.rescale_updates:
            before *= per_sample(perturbation(options, e / e.dtype.type(2), block)[0], before)
        e = before
    first = backward(network.blocks[0], e, passed.s[1], passed.index[0], passed.x[0], None, workspace, ("gait-prop", 0))
    return [first[:2], *result[::-1]]


def perturbation(options: Options, difference: Array, block: Block) -> tuple[Array, Array]:
    """Return γ of every sample and which samples have a = t (their γ is 1), both (B,).

    `difference` is a − t of what the block passes on, of either sign; auxiliary units count in dim.
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
    """Return (1 − ε) a + ε t with ε = γ D², and a itself for auxiliary units; shape (B, *out_shape)."""
    y, a = s.copy(), s[..., : t.shape[-1]]
    derivative = activation_derivative(a, block.activation)
    epsilon = per_sample(gamma, a) if derivative is None else per_sample(gamma, a) * derivative * derivative
    y[..., : t.shape[-1]] = (s.dtype.type(1) - epsilon) * a + epsilon * t
    return y


def difference_targets(
    options: Options, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> list[Target]:
    """Return δ, m and crossings of every block's output by the difference form, whichever `options.form` is.

    A unit crosses where a leaky ReLU's a and a + ε δ have different signs: there the literal form bends off.
    """
    factors, found, e = factor_blocks(network, workspace), [], dlogits
    m = array_module(e).ones(len(e), dtype=e.dtype)
    for n in reversed(range(len(network))):
        block, a = network.blocks[n], passed.x[n + 1]
        delta = e.reshape(a.shape) / (e.dtype.type(-2) * per_sample(m, a))
        gamma, _ = perturbation(options, delta, block)
        moved = nudged(block, passed.s[n + 1], a + delta, gamma)[..., : a.shape[-1]]
        crossed = (moved < 0) != (a < 0) if block.activation == "leaky-relu" and n > 0 else None
        found.append(Target(delta, m, 0 if crossed is None else int(crossed.sum())))
        if n > 0:
            e = backward_through_inverse(block, factors[n], e, passed, n, workspace, ("targets", n))[2]
            m = m / gamma
    return found[::-1]


def per_sample(values: Array, like: Array) -> Array:
    """Return one value a sample, of shape (B,), with as many axes as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def product_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `updates` for one sample; factorising, once a batch, is not counted."""
    gradients = sum(adjoint_flops(block) for block in network.blocks)
    carried = block_flops if options.form == "literal" else adjoint_flops
    return gradients + sum(carried(block) for block in network.blocks[1:])
