"""Target propagation (TP, LeCun 1987; DTP paper, Section 3.1): targets by the feedback modules alone.

    t^N = s^N − β ∂L/∂s^N                                  Eq. 3
    t^n = G^n(t^{n+1})

Everything else is DTP's: the updates of θ^n from t^{n+1} − s^{n+1}, and the training of G^n.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from arraytp.backend import Array
from arraytp.fast.modules import feedback_output
from arraytp.fast.parallel import Workspace
from arraytp.model.network import ForwardPass, Network
from arraytp.rules import dtp
from arraytp.rules.dtp import (
    check,
    feedback_flops,
    feedback_pairs,
    init_state,
    local_updates,
    output_difference,
    product_flops,
    train_feedback,
)
from arraytp.rules.protocol import State, Target, Updates

__all__ = [
    "Options",
    "check",
    "feedback_flops",
    "feedback_pairs",
    "init_state",
    "product_flops",
    "targets",
    "train_feedback",
    "updates",
]


@dataclass(frozen=True, kw_only=True)
class Options(dtp.Options):
    """As DTP's."""

    name: Literal["tp"] = "tp"  # type: ignore[assignment]


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return the updates of every block by plain targets; parameters and result as in `arraytp.rules.dtp.updates`."""
    found = targets(options, state, network, passed, dlogits, workspace)
    return local_updates(options, network, passed, found, workspace)


def targets(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Iterator[Target]:
    """Yield the plain target of every block, from the last to the first; parameters as in `updates`."""
    t = passed.logits + output_difference(options.beta, dlogits)
    for n in reversed(range(len(network))):
        yield Target(t - passed.s[n + 1], t)
        if n > 0:
            omega = state[f"feedback/{n}/weight"], state[f"feedback/{n}/bias"]
            t = feedback_output(network, passed, n, omega, t, options.unpool, workspace)
