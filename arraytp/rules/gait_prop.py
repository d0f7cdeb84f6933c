"""GAIT-prop (GP): targets through exact inverses, nudged so that the local updates are BP's (GP paper, section 2).

W^n of every block but the first is square. a_{n+1} = s^{n+1} is what block n passes on, a_n its input; auxiliary
units have t = a throughout.

**Literal form**, the paper's Algorithm 1 with m, the ½ and √dim of the authors' code (docs/math/differences.md):

    t_N = a_N − ½ ∂L/∂a_N,  m = 1
    for n = N−1 … 0:
        update = ∂/∂θ^n of m ‖t_{n+1} − a_{n+1}‖² = 2 m D^n (a_{n+1} − t_{n+1}) outer a_n
        γ = η √dim / ‖a_{n+1} − t_{n+1}‖ (normalised, Eq. 5) or a constant (vanilla)
        ε = γ (D^n)²,  m ← m / γ
        t_n = G^n((1 − ε) a_{n+1} + ε t_{n+1})                                                      Eq. 4

**Difference form**: within one linear region of f the forward signal cancels, and δ = t − a obeys
δ_n = (D^{-1} ε δ_{n+1}) W^{-1}. For e = −2 m δ, the update is D e outer a, and

    e_N = ∂L/∂a_N,  e_n = (D^n e_{n+1}) (W^n)^{-1}

for every γ: BP's recursion with W^{-1} in place of Wᵀ, and BP's result where W is orthogonal. It never subtracts
nearly equal numbers. It equals the literal form up to rounding where f is linear, or where it is leaky ReLU and no
unit's nudged activation (1 − ε) a + ε t lies across the kink from a (`crossings` counts these); for ELU and tanh, to
first order in γ.

**Any network** (`inverse: pseudo`, docs/gait-prop-any-network.md): in the difference form W^{-1} may be the
pseudo-inverse W⁺ of a W that is not square, and e may pass back through a pool to the maxima of the forward pass:

    e_n = (D^n unpool(e_{n+1})) (W^n)⁺

If W is semi-orthogonal, W⁺ = Wᵀ gives BP's result. This needs no auxiliary units and no f^{-1}.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.errors import UserError
from arraytp.model.blocks import Block, Network, adjoint_flops, block_flops
from arraytp.model.inverse import check_invertible, check_range
from arraytp.model.passes import At, Batch
from arraytp.ops.activations import LEAKY_RELU
from arraytp.ops.norms import row_norms
from arraytp.ops.solve import Factors, PseudoInverse
from arraytp.options import Positive
from arraytp.rules.feedback import refuse_auxiliary
from arraytp.rules.protocol import Rule, State, Target, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are the authors' (docs/math/differences.md); `normalise: false` is vanilla GP.

    `form` defaults to literal with exact inverses, and to difference with pseudo-inverses.
    """

    name: Literal["gait-prop"] = "gait-prop"
    inverse: Literal["exact", "pseudo"] = "exact"
    form: Literal["literal", "difference"] | None = None
    normalise: bool = True
    gamma: Positive = 1e-3
    eta: Positive = 1e-7
    norm: Literal["l2", "l2_squared"] = "l2"
    scale_by_sqrt_dim: bool = True
    rescale_updates: bool = True

    def __post_init__(self) -> None:
        if self.form is None:
            object.__setattr__(self, "form", "literal" if self.inverse == "exact" else "difference")


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return notes for the user, one line each.

    Raises
    ------
    UserError
        If a block that must be inverted has no inverse; names it and what would fit. With pseudo-inverses, if the
        form is literal or a block has auxiliary units.
    """
    if options.inverse == "pseudo":
        check_pseudo(options, blocks)
        return []
    check_invertible(options.name, blocks)
    if options.form == "literal" and dtype == "float32":
        return ["rule gait-prop: form literal in float32 is lost in rounding (measured: 84 to 91 degrees from BP after "
                "3 layers of 1024); use dtype float64, or form difference"]  # fmt: skip
    return []


def check_pseudo(options: Options, blocks: tuple[Block, ...]) -> None:
    """Refuse what is undefined with pseudo-inverses; raises as `check`."""
    if options.form == "literal":
        raise UserError(
            "rule.form: literal inverts f, W and every pool, which rule.inverse: pseudo does not; use form: "
            "difference, or inverse: exact"
        )
    refuse_auxiliary(f"rule {options.name} with inverse: pseudo", blocks, ", or use inverse: exact")


def inverses(options: Options, batch: Batch) -> Mapping[int, Factors | PseudoInverse]:
    """Return W⁻¹ or W⁺ of every block except the first, as factors; raises IllConditionedError."""
    return batch.inverses if options.inverse == "exact" else batch.pseudo_inverses()


def updates(options: Options, state: State, batch: Batch) -> Iterator[Update]:
    """Yield GP's update of every block, from the last to the first.

    Raises
    ------
    IllConditionedError
        If a weight matrix cannot be inverted in its dtype.
    NonFiniteError
        If the literal form nudges an ELU or tanh unit out of its range, or the unit is saturated.
    """
    form = literal if options.form == "literal" else difference
    return (update for _, update in form(options, batch))


def literal(options: Options, batch: Batch) -> Iterator[tuple[Target, Update]]:
    """Yield target and update of every block, from the last to the first (Algorithm 1)."""
    xp, number, carriers = array_module(batch.dlogits), batch.dlogits.dtype.type, batch.inverses
    t = batch.logits - number(0.5) * batch.dlogits
    m = xp.ones(len(t), dtype=t.dtype)
    for at in batch.down():
        delta = xp.subtract(t, at.s_next, out=batch.array("delta", at.s_next.shape))
        dW, db, _ = at.backward(delta, scale=number(-2) * m)  # 2 m D (a − t) outer a
        yield Target(delta, t, m), (dW, db)
        if at.n == 0:
            return
        gamma, on_target = perturbation(options, delta, at.block)
        if options.rescale_updates:
            m = m / gamma
        y = nudged(at, t, gamma)
        check_range(at.block, at.n, y)
        t = at.inverse(carriers[at.n], y)
        # Where a = t, the inverse would add nothing but rounding errors, which m would amplify.
        xp.copyto(t, at.s, where=per_sample(on_target, t))


def difference(options: Options, batch: Batch) -> Iterator[tuple[Array, Update]]:
    """Yield e and the update of every block, from the last to the first, by the difference form."""
    e, carriers = batch.dlogits, inverses(options, batch)
    for at in batch.down():
        dW, db, e_before = at.backward(e, through=carriers.get(at.n))
        yield e, (dW, db)
        if not options.rescale_updates and at.n > 0:
            gamma, _ = perturbation(options, e, at.block, half=True)
            e_before *= per_sample(gamma, e_before)
        e = e_before


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the target of every block's output, from the last to the first; the update is 2 m D (a − t) outer a."""
    if options.form == "literal":
        yield from (target for target, _ in literal(options, batch))
        return
    m = array_module(batch.dlogits).ones(len(batch.dlogits), dtype=batch.dlogits.dtype)
    for at, (e, _) in zip(batch.down(), difference(options, batch), strict=True):
        delta = e.reshape(at.s_next.shape) / (e.dtype.type(-2) * per_sample(m, at.s_next))
        yield Target(delta, m=m)
        if options.rescale_updates:
            m = m / perturbation(options, delta, at.block)[0]


def perturbation(options: Options, delta: Array, block: Block, half: bool = False) -> tuple[Array, Array]:
    """Return γ of every sample (Eq. 5) and which samples have a = t (their γ is 1), both of shape (B,).

    Samples so near to t that γ with `norm: l2_squared` would not be finite count as a = t. `delta` is ±(t − a) of the
    units that the block passes on or, with `half`, twice that. Auxiliary units count in dim.
    """
    xp, number = array_module(delta), delta.dtype.type
    norm, on_target = row_norms(delta.reshape(len(delta), -1))
    if half:
        norm = norm * number(0.5)
    scale = options.eta * (float(np.prod(block.out_shape)) ** 0.5 if options.scale_by_sqrt_dim else 1.0)
    if options.normalise and options.norm == "l2_squared":
        norm = norm * norm
        on_target = on_target | (norm <= number(2 * scale / np.finfo(delta.dtype).max))
        norm = xp.where(on_target, number(1), norm)
    gamma = number(scale) / norm if options.normalise else xp.full(len(delta), options.gamma, dtype=delta.dtype)
    return xp.where(on_target, number(1), gamma), on_target


def nudged(at: At, t: Array, gamma: Array) -> Array:
    """Return (1 − ε) a + ε t with ε = γ D² (Eq. 4), and a for auxiliary units; shape (B, *out_shape)."""
    y, units = at.batch.array("nudged", at.output.shape), at.s_next.shape[-1]
    one = t.dtype.type(1)

    def nudge(part: slice) -> None:
        y[part] = at.output[part]
        a, derivative = at.s_next[part], at.block.activation.derivative
        epsilon = per_sample(gamma[part], a)
        if derivative is not None:
            d = derivative(a)
            epsilon = epsilon * d * d
        y[part, ..., :units] = (one - epsilon) * a + epsilon * t[part]

    at.batch.in_slices(nudge)
    return y


def crossings(options: Options, at: At, target: Target) -> int:
    """Return how many units of a block's output the nudge takes across the kink of leaky ReLU.

    For these, a and a + ε δ have different signs, and the literal form departs from the difference form if it
    inverts the block.
    """
    if at.block.activation is not LEAKY_RELU:
        return 0
    gamma, _ = perturbation(options, target.delta, at.block)
    y = nudged(at, at.s_next + target.delta, gamma)[..., : at.s_next.shape[-1]]
    return int(((y < 0) != (at.s_next < 0)).sum())


def per_sample(values: Array, like: Array) -> Array:
    """Reshape one value per sample, of shape (B,), to as many axes as `like` has."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the products in `updates` for one sample, without the factorisations (once per batch)."""
    gradients = sum(map(adjoint_flops, network.blocks))
    carried = block_flops if options.form == "literal" else adjoint_flops
    return gradients + sum(map(carried, network.blocks[1:]))


RULE = Rule(
    options=Options, updates=updates, targets=targets, flops=flops, check=check, inverses=inverses, by_samples=True
)
