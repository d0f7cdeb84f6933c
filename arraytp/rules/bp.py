"""Backpropagation (BP): the reference of every angle.

ds^N = ∂L/∂s^N, 0 for auxiliary units
for n = N−1 … 0:
    dz^n = D^n ⊙ (unpool ds^{n+1}),  D^n = f'(z^n)
    dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n,  ds^n = dz^n (W^n)ᵀ
"""

from dataclasses import dataclass
from typing import Literal

from arraytp.backend import Array, Backend
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward
from arraytp.model.network import ForwardPass, Network, adjoint_flops
from arraytp.options import STRICT
from arraytp.rules.protocol import State, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """Backpropagation has nothing to set."""

    name: Literal["bp"] = "bp"

    __pydantic_config__ = STRICT


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Return the rule's state: none."""
    return {}


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return ∂L/∂W and ∂L/∂b of every block.

    Parameters
    ----------
    options, state
        Unused: every rule is called alike.
    network : Network
    passed : ForwardPass
        Of the batch, with the network's present weights.
    dlogits : array of shape (B, classes)
        ∂L/∂logits; that of auxiliary units is 0, here as in every block.
    workspace : Workspace

    Returns
    -------
    list of (array, array)
        Shapes as the network's weights and biases; valid until the next call.
    """
    result: Updates = []
    ds = dlogits
    for n in reversed(range(len(network))):
        carrier = network.weights[n] if n > 0 else None
        dweight, dbias, ds = backward(
            network.blocks[n], ds, passed.s[n + 1], passed.index[n], passed.x[n], carrier, workspace, ("bp", n)
        )
        result.append((dweight, dbias))
    return result[::-1]


def product_flops(options: Options, network: Network) -> int:
    """Return the operations of the products of `updates` for one sample: two products a block, one in the first."""
    flops = [adjoint_flops(block) for block in network.blocks]
    return 2 * sum(flops) - flops[0]
