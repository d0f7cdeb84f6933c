"""L-DRL in parallel: all blocks at once, each gradient averaged over several noise samples (docs/math/ldrl.md).

On every batch, for all n at once: ω^n takes one step with the mean over `samples` noises of L-DRL's gradient. The rest
is as in `arraytp.rules.ldrl`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arraytp.model.blocks import Network
from arraytp.options import FeedbackTraining, Size
from arraytp.rules import ldrl
from arraytp.rules.protocol import Rule


@dataclass(frozen=True, kw_only=True)
class Options(ldrl.LDRLOptions):
    """L-DRL's settings; `feedback.iterations` counts optimiser steps, each with `samples` noises."""

    name: Literal["ldrl-parallel"] = "ldrl-parallel"
    samples: Size = 10
    feedback: FeedbackTraining = field(default_factory=lambda: FeedbackTraining(iterations=1))


def feedback_flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products in feedback training for one sample, including θ ∘ s once."""
    return ldrl.feedback_flops(options, network, options.samples)


assert ldrl.RULE.feedback is not None
RULE: Rule[Any] = replace(
    ldrl.RULE,
    options=Options,
    feedback=replace(ldrl.RULE.feedback, flops=feedback_flops, noises=lambda options: options.samples),
)
