"""Kolen–Pollack: FA in which B^n gets the same step as W^n, and both decay.

    W^n ← (1 − λ) W^n − Δ^n
    B^n ← (1 − λ) B^n − Δ^n

Δ^n is the step of any optimiser on W^n. So each step multiplies W − B by 1 − λ, whatever Δ is, and FA turns
into BP. The optimiser applies both (`shared_decay`). W^0, which has no B, and biases do not decay. The rest is FA.
Sources: Kolen & Pollack (1994); Akrout et al. (2019), Equations 16 and 17.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from arraytp.options import Decay, InitName
from arraytp.rules import fa
from arraytp.rules.protocol import Rule


@dataclass(frozen=True, kw_only=True)
class Options:
    """λ, and how the initial B^n is drawn."""

    name: Literal["kolen-pollack"] = "kolen-pollack"
    decay: Decay = 1e-4
    feedback_init: InitName = "orthogonal"


def shared_decay(options: Options) -> float:
    """Return λ."""
    return options.decay


RULE: Rule[Any] = replace(fa.RULE, options=Options, shared_decay=shared_decay)
