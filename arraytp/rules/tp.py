"""Target propagation (TP, LeCun 1987; DTP paper, Section 3.1): targets by the feedback modules alone.

    t^N = s^N − β ∂L/∂s^N                                  Eq. 3
    t^n = G^n(t^{n+1})

Everything else is DTP's: the updates of θ^n from t^{n+1} − s^{n+1}, and the training of G^n.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from arraytp.model.passes import Batch
from arraytp.rules import dtp
from arraytp.rules.protocol import Rule, State, Target


@dataclass(frozen=True, kw_only=True)
class Options(dtp.TargetOptions):
    """The same settings as DTP's."""

    name: Literal["tp"] = "tp"


def targets(options: Options, state: State, batch: Batch) -> Iterator[Target]:
    """Yield the plain target of every block's output, from the last to the first."""
    omega, bias = state.weights, state.biases
    t = batch.logits + dtp.output_difference(options.beta, batch)
    for at in batch.down():
        delta = batch.array("delta", at.output.shape)
        delta[...] = t.reshape(delta.shape)
        delta -= at.output
        yield Target(delta, t)
        if at.n > 0:
            t = at.feedback(omega[at.n], bias[at.n], t, options.unpool)


RULE: Rule[Any] = replace(dtp.RULE, options=Options, targets=targets)
