"""Gauss-Newton targets (GNT): the exact, damped targets that target propagation approximates.

With J^n_b (C × D) the Jacobian of sample b's logits with respect to its s^n, and e_b = ∂L_b/∂s^N,

    t^N = s^N − β e
    t^n_b = s^n_b − β (J^n_b)ᵀ (J^n_b (J^n_b)ᵀ + γI)⁻¹ e_b,  n = 1 … N−1
    update of θ^n = ∂/∂θ^n of (1/B) Σ ½ ‖s^{n+1} − t^{n+1}‖², optionally divided by β

For γ → 0, s^n changes by −β J⁺ e, the smallest change that moves the logits by −β e (to first order), as exact inverses
of all layers would. For large γ it is −β Jᵀ e / γ. All J come from C backward passes.

Source: Meulemans et al. (2020). There GNT is a baseline, as it is here (`compare.against`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arraytp.errors import UserError
from arraytp.model.blocks import Block, Network, adjoint_flops, block_flops
from arraytp.model.passes import Batch
from arraytp.options import Positive
from arraytp.rules import dtp
from arraytp.rules.drl import MOST_CLASSES
from arraytp.rules.feedback import check_targets
from arraytp.rules.protocol import Rule, State, Target


@dataclass(frozen=True, kw_only=True)
class Options:
    """`damping` is γ. Updates are linear in β, so that angles do not depend on it."""

    name: Literal["gnt"] = "gnt"
    damping: Positive = 1.0
    beta: Positive = 0.5
    divide_by_beta: bool = False


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return notes for the user, here none.

    Raises
    ------
    UserError
        As `check_targets` and `check_jacobians`.
    """
    check_targets(options.name, blocks, reduction)
    check_jacobians(f"rule {options.name}", blocks)
    return []


def check_jacobians(what: str, blocks: Sequence[Block]) -> None:
    """Refuse networks with too many classes to compute their Jacobians; the message begins with `what`.

    Raises
    ------
    UserError
        Names the number of classes.
    """
    classes = blocks[-1].next_shape[0]
    if classes > MOST_CLASSES:
        raise UserError(f"{what}: takes a backward pass per class, and there are {classes}; at most {MOST_CLASSES}")


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the target of every block's output, from the last to the first.

    Raises
    ------
    NonFiniteError
        If a sample's damped system is singular.
    """
    changes = batch.gauss_newton(options.damping)
    for at in batch.down():
        if at.n + 1 in changes:
            delta = changes[at.n + 1]
            delta *= delta.dtype.type(-options.beta * len(batch))
            yield Target(delta)
        else:
            yield Target(dtp.output_difference(options.beta, batch))


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products for one sample: C backward passes to s^1, and dW of every block.

    J Jᵀ, a few percent of these, is not counted.
    """
    classes = network.blocks[-1].next_shape[0]
    return classes * sum(map(block_flops, network.blocks[1:])) + sum(map(adjoint_flops, network.blocks))


RULE: Rule[Any] = Rule(
    options=Options,
    targets=targets,
    local_update=dtp.local_update,
    local_loss=dtp.local_loss,
    flops=flops,
    check=check,
)
