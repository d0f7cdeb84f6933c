"""Target propagation by regularised inverses (ridge TP): G is a ridge inverse of the layer, not learned.

    t^N = s^N − β ∂L/∂s^N                                                                per sample
    for n = N−1 … 0:
        update of θ^n = ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², optionally divided by β
        d = f⁻¹(t^{n+1}) − f⁻¹(s^{n+1}), or its linearisation D⁻¹ (t^{n+1} − s^{n+1})
        t^n = s^n + (unpool d) (WᵀW + rI)⁻¹ Wᵀ,  r > 0

(WᵀW + rI)⁻¹ Wᵀ = Wᵀ (WWᵀ + rI)⁻¹ maps d to the input change p that minimises ‖p W − d‖² + r ‖p‖². f⁻¹ and D
are evaluated at s and t clipped to f's range less `clip` at either end.

Source: Roulet and Harchaoui (2023), for recurrent networks. Convolutions and pools are our additions: overlapping
patches add up, as in GAIT-prop, and d goes to the maxima of the forward pass, because f and the pool commute.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Lt

from arraytp.backend import Array, array_module
from arraytp.errors import UserError
from arraytp.model.blocks import Block
from arraytp.model.passes import At, Batch
from arraytp.ops.solve import PseudoInverse
from arraytp.options import Positive
from arraytp.rules import dtp
from arraytp.rules.feedback import check_targets
from arraytp.rules.protocol import Rule, State, Target


@dataclass(frozen=True, kw_only=True)
class Options:
    """`ridge` is r, `clip` the authors' tolerance. Angles are measured at `compare_beta`."""

    name: Literal["ridge-tp"] = "ridge-tp"
    ridge: Positive = 0.1
    activation: Literal["inverse", "linearised"] = "inverse"
    clip: Annotated[float, Gt(0), Lt(1)] = 1e-3
    beta: Positive = 0.5
    divide_by_beta: bool = False
    compare_beta: Positive = 0.005


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return notes for the user, here none.

    Raises
    ------
    UserError
        As `check_targets`; also for an activation without inverse in a block after the first.
    """
    check_targets(options.name, blocks, reduction)
    for n, block in enumerate(blocks[1:], start=1):
        if block.activation.inverse is None:
            raise UserError(
                f"network block {n} ({block.label}): rule {options.name} inverts the activation of every block but "
                f"the first, and {block.activation.name} has no inverse; use leaky-relu, linear, elu or tanh"
            )
    return []


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the target of every block's output, from the last to the first.

    Raises
    ------
    IllConditionedError
        If r is too small for a Gram matrix to be inverted in its dtype.
    """
    inverses, delta = factors(options, batch), dtp.output_difference(options.beta, batch)
    for at in batch.down():
        yield Target(delta)
        if at.n > 0:
            delta = at.carry(change_of_z(options, at, delta), inverses[at.n])


def factors(options: Options, batch: Batch) -> Mapping[int, PseudoInverse]:
    """Return the ridge inverse of every block except the first, as factors; raises IllConditionedError."""
    return batch.pseudo_inverses(options.ridge)


def change_of_z(options: Options, at: At, delta: Array) -> Array:
    """Return d = f⁻¹(t) − f⁻¹(s) with s and t = s + δ clipped (`clipped`), or D⁻¹ δ with D at the clipped s.

    The result has the shape of s^{n+1}.
    """
    f, s_next, delta = at.block.activation, at.s_next, delta.reshape(at.s_next.shape)
    d = at.batch.array("d", s_next.shape)

    def change(part: slice) -> None:
        s, change = clipped(options, at, s_next[part], delta[part])
        if options.activation == "inverse":
            assert f.inverse_difference is not None
            d[part] = f.inverse_difference(s, change)
        else:
            d[part] = delta[part] if f.derivative is None else delta[part] / f.derivative(s)

    at.batch.in_slices(change)
    return d


def clipped(options: Options, at: At, s: Array, delta: Array) -> tuple[Array, Array]:
    """Return s and t − s, where s and t = s + δ have both been clipped to f's range less `clip` at either end.

    Both are float64 where the range has a limit: float32 would round it by 3e-8, which f⁻¹, 1,000 times as steep there
    with the authors' `clip`, turns into a relative error of 3e-5 in d; and a `clip` below 3e-8 would have no effect.
    """
    low, high = at.block.activation.range
    if low == -math.inf and high == math.inf:
        return s, delta
    xp = array_module(s)
    s, delta = s.astype(np.float64, copy=False), delta.astype(np.float64, copy=False)
    t = s + delta
    s_inside, t_inside = (xp.clip(value, low + options.clip, high - options.clip) for value in (s, t))
    # Where nothing is clipped, take δ itself: t − s would add a rounding error.
    return s_inside, xp.where((s_inside == s) & (t_inside == t), delta, t_inside - s_inside)


RULE: Rule[Any] = Rule(
    options=Options,
    targets=targets,
    local_update=dtp.local_update,
    local_loss=dtp.local_loss,
    flops=dtp.flops,
    check=check,
    compared=dtp.compared,
    factors=factors,
)
