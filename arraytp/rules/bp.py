"""Backpropagation (BP): the reference of every angle.

ds^N = ∂L/∂s^N, 0 for auxiliary units
for n = N−1 … 0:
    dz^n = D^n ⊙ (unpool ds^{n+1}),  D^n = f'(z^n)
    dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n,  ds^n = dz^n (W^n)ᵀ
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from arraytp.model.blocks import Network, backward_flops
from arraytp.model.passes import Batch
from arraytp.rules.protocol import Rule, State, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """Backpropagation has no settings."""

    name: Literal["bp"] = "bp"


def updates(options: Options, state: State, batch: Batch) -> Iterator[Update]:
    """Yield ∂L/∂W and ∂L/∂b of every block, from the last to the first."""
    ds = batch.dlogits
    for at in batch.down():
        dW, db, ds = at.backward(ds, through=at.weight)
        yield dW, db


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products in `updates` for one sample."""
    return backward_flops(network.blocks)


RULE = Rule(options=Options, updates=updates, flops=flops, by_samples=True)
