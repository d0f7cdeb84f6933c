"""Direct feedback alignment (DFA): the output error goes to every block through a fixed random matrix of its own.

    e = ∂L/∂s^N
    for n = 0 … N−2:
        ds^{n+1} = e B^n,  B^n of shape (classes, size of s^{n+1})
        dz^n = D^n ⊙ (unpool ds^{n+1})
        dW^n = (s^n)ᵀ dz^n,  db^n = Σ dz^n
    the output block as in BP

Source: Nøkland (2016).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import backward, product
from arraytp.model.initialise import initial_weight
from arraytp.model.network import ForwardPass, Network, adjoint_flops
from arraytp.options import STRICT, InitName
from arraytp.rules.protocol import State, Updates


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the fixed random matrices are drawn."""

    name: Literal["dfa"] = "dfa"
    feedback_init: InitName = "orthogonal"

    __pydantic_config__ = STRICT


def init_state(options: Options, network: Network, seed: int, backend: Backend) -> State:
    """Draw B^n of shape (classes, size of s^{n+1}) for every block but the last."""
    classes = network.blocks[-1].passed_shape[0]
    state: State = {}
    for n, block in enumerate(network.blocks[:-1]):
        shape = (classes, int(np.prod(block.passed_shape)))
        matrix = initial_weight(options.feedback_init, shape, seed, "feedback", n)
        state[f"feedback/{n}/weight"] = backend.asarray(matrix.astype(network.weights[n].dtype))
    return state


def updates(
    options: Options, state: State, network: Network, passed: ForwardPass, dlogits: Array, workspace: Workspace
) -> Updates:
    """Return DFA's updates of every block; parameters and result as in `arraytp.rules.bp.updates`."""
    result: Updates = []
    last = len(network) - 1
    for n, block in enumerate(network.blocks):
        s = passed.s[n + 1]
        if n == last:
            ds = dlogits
        else:
            ds = workspace.array("dfa ds", (len(dlogits), int(np.prod(block.passed_shape))), s.dtype)
            product(dlogits, state[f"feedback/{n}/weight"], ds, workspace)
        dweight, dbias, _ = backward(block, ds, s, passed.index[n], passed.x[n], None, workspace, ("dfa", n))
        result.append((dweight, dbias))
    return result


def product_flops(options: Options, network: Network) -> int:
    """Return the floating-point operations of the products of `updates` for one sample: dW per block, and e B^n."""
    classes = network.blocks[-1].passed_shape[0]
    direct = sum(2 * classes * int(np.prod(block.passed_shape)) for block in network.blocks[:-1])
    return sum(adjoint_flops(block) for block in network.blocks) + direct
