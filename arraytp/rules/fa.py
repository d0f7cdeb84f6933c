"""Feedback alignment (FA): BP with fixed random matrices in place of the transposed weights.

    ds^N = ∂L/∂s^N
    for n = N−1 … 0:
        dz^n = D^n ⊙ (unpool ds^{n+1})
        dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n,  ds^n = dz^n (B^n)ᵀ

B^n has the shape of W^n; for a convolution the product is the transposed convolution with B^n. With B = W, FA is BP.
Source: Lillicrap et al. (2016), as compared in the GP paper.
"""

from dataclasses import dataclass
from typing import Literal

from arraytp.backend import Array, Backend
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward
from arraytp.model.initialise import initial_weight
from arraytp.model.network import ForwardPass, Network
from arraytp.options import STRICT, InitName
from arraytp.rules import bp
from arraytp.rules.protocol import State, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the fixed random matrices are drawn; orthogonal in the GP paper."""

    name: Literal["fa"] = "fa"
    feedback_init: InitName = "orthogonal"

    __pydantic_config__ = STRICT


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw B^n for every block but the first, whose input needs no gradient.

    The numbers come from the "feedback" streams, so that no B equals a forward weight of the same shape.
    """
    state: State = {}
    for n, block in enumerate(network.blocks[1:], start=1):
        matrix = initial_weight(options.feedback_init, block.weight_shape, seed, "feedback", n)
        state[f"feedback/{n}/weight"] = backend.asarray(matrix.astype(network.weights[n].dtype))
    return state


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return FA's updates of every block; parameters and result as in `arraytp.rules.bp.updates`."""
    result: Updates = []
    ds = dlogits
    for n in reversed(range(len(network))):
        carrier = state[f"feedback/{n}/weight"] if n > 0 else None
        dweight, dbias, ds = backward(
            network.blocks[n], ds, passed.s[n + 1], passed.index[n], passed.x[n], carrier, workspace, ("fa", n)
        )
        result.append((dweight, dbias))
    return result[::-1]


def product_flops(options: Options, network: Network) -> int:
    """Return the floating-point operations of the products of `updates` for one sample: as many as BP's."""
    return bp.product_flops(bp.Options(), network)
