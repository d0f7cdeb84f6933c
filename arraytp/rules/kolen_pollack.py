"""Kolen–Pollack: FA in which B^n gets the same step as W^n, and both decay.

    W^n ← (1 − λ) W^n − Δ^n
    B^n ← (1 − λ) B^n − Δ^n

Δ^n is the step of any optimiser on W^n. So each step multiplies W − B by 1 − λ, whatever Δ is, and FA turns
into BP. The optimiser applies both (`shared_decay`). W^0, which has no B, and biases do not decay. The rest is FA.
Sources: Kolen & Pollack (1994); Akrout et al. (2019), Equations 16 and 17.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from arraytp.errors import UserError
from arraytp.model.blocks import Block
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


def check(options: Options, blocks: tuple[Block, ...], dtype: str, reduction: str) -> list[str]:
    """Check a config before a run; return notes for the user, here none.

    Raises
    ------
    UserError
        If 1 − λ is 1 in the dtype, although λ is above 0: then B would never come closer to W.
    """
    if options.decay and np.dtype(dtype).type(1 - options.decay) == 1:
        raise UserError(
            f"rule.decay: {options.decay:g} does nothing in {dtype}, where 1 − λ rounds to 1; use at least "
            f"{np.finfo(dtype).epsneg:.1e}"
        )
    return []


RULE: Rule[Any] = replace(fa.RULE, options=Options, shared_decay=shared_decay, check=check)
