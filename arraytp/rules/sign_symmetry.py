"""Sign symmetry: FA in which B^n has the signs of W^n at every step.

    B^n = |R^n| ⊙ sign(W^n),  c^n = √(2 / (fan_in + fan_out))
    unit (uSF):  |R^n| = c^n
    batch (brSF):  R^n ~ N(0, (c^n)²), drawn anew for every batch
    fixed (frSF):  R^n ~ N(0, (c^n)²), drawn once

The rest is FA. A weight of 0 has the sign of its zero, +0 or −0, so B is never 0.
Sources: Liao et al. (2016); Xiao et al. (2018); Moskovitz et al. (2018), as named in the BioTorch benchmark.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from arraytp.backend import Backend, array_module
from arraytp.model.blocks import Network
from arraytp.model.initialise import fans, initial_weight
from arraytp.model.passes import Batch
from arraytp.rules import fa
from arraytp.rules.protocol import Rule, State


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the magnitudes |R| are chosen."""

    name: Literal["sign-symmetry"] = "sign-symmetry"
    magnitude: Literal["unit", "batch", "fixed"] = "unit"


def scale(shape: tuple[int, ...]) -> float:
    """Return c = √(2/(fan_in + fan_out)) of a weight of this shape; fans as in `arraytp.model.initialise.fans`."""
    return math.sqrt(2 / sum(fans(shape)))


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Return B^n with the signs of the initial W^n; |R^n| is |B^n|, so the state needs no more."""
    state = State()
    for n, block in enumerate(network.blocks[1:], start=1):
        shape, theta = block.weight_shape, network.weights[n]
        if options.magnitude == "unit":
            R = np.full(shape, scale(shape))
        else:
            R = initial_weight("xavier-normal", shape, seed, "feedback", n)
        state.weights[n] = array_module(theta).copysign(backend.asarray(R.astype(theta.dtype)), theta)
    return state


def follow(options: Options, state: State, batch: Batch) -> None:
    """Give every B^n the current signs of W^n and, for `batch`, a new |R^n|."""
    for n, B in state.weights.items():
        W = batch.at(n).weight
        if options.magnitude == "batch":
            batch.engine.noise(B, scale(B.shape), 0, batch.seed, batch.number, n)
        array_module(W).copysign(B, W, out=B)


RULE: Rule[Any] = replace(fa.RULE, options=Options, init_state=init_state, follow=follow)
