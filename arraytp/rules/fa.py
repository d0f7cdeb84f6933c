"""Feedback alignment (FA): BP with fixed random matrices in place of the transposed weights.

    ds^N = ∂L/∂s^N
    for n = N−1 … 0:
        dz^n = D^n ⊙ (unpool ds^{n+1})
        dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n,  ds^n = dz^n (B^n)ᵀ

B^n has the shape of W^n; for a convolution the product is the transposed convolution with B^n. With B = W, FA is BP.
Source: Lillicrap et al. (2016), as compared in the GP paper.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from arraytp.backend import Backend
from arraytp.model.blocks import Network, backward_flops
from arraytp.model.initialise import initial_weight
from arraytp.model.passes import Batch
from arraytp.options import InitName
from arraytp.rules.feedback import module_pairs
from arraytp.rules.protocol import Rule, State, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the fixed random matrices are drawn; orthogonal in the GP paper."""

    name: Literal["fa"] = "fa"
    feedback_init: InitName = "orthogonal"


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw B^n for every block but the first, whose input needs no gradient.

    The numbers come from the "feedback" streams, so that no B equals a forward weight of the same shape.
    """
    state = State()
    for n, block in enumerate(network.blocks[1:], start=1):
        drawn = initial_weight(options.feedback_init, block.weight_shape, seed, "feedback", n)
        state.weights[n] = backend.asarray(drawn.astype(network.weights[n].dtype))
    return state


def updates(options: Options, state: State, batch: Batch) -> Iterator[Update]:
    """Yield FA's update of every block, from the last to the first."""
    B, ds = state.weights, batch.dlogits
    for at in batch.down():
        dW, db, ds = at.backward(ds, through=B.get(at.n))
        yield dW, db


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products in `updates` for one sample: as many as for BP."""
    return backward_flops(network.blocks)


RULE: Rule[Any] = Rule(
    options=Options, init_state=init_state, updates=updates, pairs=module_pairs, flops=flops, by_samples=True
)
