"""Blocks and networks: the fixed properties of a block, and a chain of blocks with its parameters θ.

A network is a chain of blocks F^0 … F^{N−1}, s^0 = x, s^{n+1} = F^n(s^n). A block is
affine (dense | conv) → activation → [max-pool]; a dense block flattens its input first.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from arraytp.backend import Array
from arraytp.ops.activations import Activation
from arraytp.ops.patches import Window

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What is fixed about a block before training.

    Parameters
    ----------
    label : str
        "conv1", "dense2": kind and count, for tables and messages.
    kind : {"conv", "dense"}
    in_shape : tuple of int
        Shape of s^n per sample: (H, W, C), or (in,) for a dense block.
    pre_shape : tuple of int
        Shape of z per sample.
    out_shape : tuple of int
        Shape of the block's output per sample, auxiliary units included: z's unless pooled.
    weight_shape : tuple of int
        (k, k, C, O) or (in, out).
    activation : Activation
    window, pool : Window or None
        The windows of the convolution and of the max-pool.
    auxiliary : int
        Number of units at the end of the output's last axis that are kept but not handed on.
    """

    label: str
    kind: Literal["conv", "dense"]
    in_shape: Shape
    pre_shape: Shape
    out_shape: Shape
    weight_shape: Shape
    activation: Activation
    window: Window | None = None
    pool: Window | None = None
    auxiliary: int = 0

    @property
    def next_shape(self) -> Shape:
        """Shape per sample of s^{n+1}, which is passed on to the next block: the output without auxiliary units."""
        return *self.out_shape[:-1], self.out_shape[-1] - self.auxiliary

    @property
    def is_square(self) -> bool:
        """Whether W's matrix has as many rows as columns."""
        return math.prod(self.weight_shape[:-1]) == self.weight_shape[-1]


@dataclass
class Network:
    """A chain of blocks with its parameters θ.

    Parameters
    ----------
    blocks : tuple of Block
    weights : list of arrays
        One per block, of its `weight_shape`.
    biases : list of arrays
        One per block, of shape (O,) or (out,).
    """

    blocks: tuple[Block, ...]
    weights: list[Array] = field(default_factory=list)
    biases: list[Array] = field(default_factory=list)

    def __len__(self) -> int:
        """N, the number of blocks."""
        return len(self.blocks)

    def parameters(self) -> list[Array]:
        """Return weight and bias of every block, one block after the other."""
        return [array for pair in zip(self.weights, self.biases, strict=True) for array in pair]

    def named(self, group: str) -> dict[str, Array]:
        """Return the parameters by their names in files: <group>/<n>/<weight or bias>."""
        names = (f"{group}/{n}/{part}" for n in range(len(self)) for part in ("weight", "bias"))
        return dict(zip(names, self.parameters(), strict=True))

    def rest(self, n: int) -> "Network":
        """Return the network from block n on, with the same parameters."""
        return Network(self.blocks[n:], self.weights[n:], self.biases[n:])


def block_flops(block: Block) -> int:
    """Return the floating-point operations of a block's affine map for one sample."""
    return 2 * math.prod(block.pre_shape[:-1]) * math.prod(block.weight_shape)


def adjoint_flops(block: Block) -> int:
    """Return the FLOPs of either adjoint for one sample: those of the affine map without its auxiliary units."""
    return block_flops(block) * block.next_shape[-1] // block.out_shape[-1]


def backward_flops(blocks: tuple[Block, ...]) -> int:
    """Return the FLOPs of a backward pass for one sample: two products per block, one in the first."""
    flops = [adjoint_flops(block) for block in blocks]
    return 2 * sum(flops) - flops[0]


def show_shape(shape: Shape) -> str:
    """Return a shape as "28x28x1"."""
    return "x".join(map(str, shape))
