"""Direct feedback alignment (DFA): the output error reaches every block through its own fixed random matrix.

    e = ∂L/∂s^N
    for n = N−1 … 0:
        ds^{n+1} = e B^{n+1},  B^{n+1} of shape (classes, size of s^{n+1}); for the output block e itself
        dz^n = D^n ⊙ (unpool ds^{n+1})
        dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n

Source: Nøkland (2016).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from arraytp.backend import Backend
from arraytp.model.blocks import Network, adjoint_flops
from arraytp.model.passes import Batch
from arraytp.options import InitName
from arraytp.rules.feedback import init_direct
from arraytp.rules.protocol import Rule, State, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the fixed random matrices are drawn."""

    name: Literal["dfa"] = "dfa"
    feedback_init: InitName = "orthogonal"


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw B^n for every hidden s^n."""
    return init_direct(options.feedback_init, network, seed, backend)


def updates(options: Options, state: State, batch: Batch) -> Iterator[Update]:
    """Yield DFA's update of every block, from the last to the first."""
    B, e = state.weights, batch.dlogits
    for at in batch.down():
        ds = batch.product(e, B[at.n + 1], "ds") if at.n + 1 in B else e
        dW, db, _ = at.backward(ds)
        yield dW, db


def flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the matrix products in `updates` for one sample: dW per block, and e B."""
    return sum(map(adjoint_flops, network.blocks)) + sum(direct_flops(network))


def direct_flops(network: Network) -> list[int]:
    """Return, for every hidden s^n, the FLOPs of a product with its direct matrix for one sample."""
    classes = network.blocks[-1].next_shape[0]
    return [2 * classes * prod(block.next_shape) for block in network.blocks[:-1]]


RULE = Rule(options=Options, init_state=init_state, updates=updates, flops=flops)
