"""Blocks and networks: shapes, parameters, and the plain forward and backward pass of one block.

A network is a chain of blocks F^0 … F^{N−1}, s^0 = x, s^{n+1} = F^n(s^n). A block is
affine (dense | conv) → activation → [max-pool]; a dense block flattens its input first.

The functions here are the readable truth, one whole batch at a time. `arraytp.fast.passes` computes the same in slices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from arraytp import options
from arraytp.backend import NUMPY, Array, Backend, array_module
from arraytp.errors import UserError
from arraytp.model.initialise import initial_bias, initial_weight
from arraytp.ops.activations import activation_backward, activation_forward, activation_inverse
from arraytp.ops.conv import as_matrix, conv_backward_input, conv_backward_weight, conv_forward
from arraytp.ops.dense import dense_backward_input, dense_backward_weight, dense_forward
from arraytp.ops.patches import Window, col2im, coverage, im2col, make_window
from arraytp.ops.pool import MAX_POOL_KERNEL, max_pool_backward, max_pool_forward
from arraytp.ops.solve import factor, right_solve

Shape = tuple[int, ...]

# In numbers; beyond it NumPy cannot even say how many bytes are missing.
LARGEST_WEIGHT = 2**50


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
        Shape of s^{n+1} per sample: z's unless pooled.
    weight_shape : tuple of int
        (k, k, C, O) or (in, out).
    activation : str
    window, pool : Window or None
        Of the convolution and of the max-pool.
    auxiliary : int
        How many units at the end of s^{n+1}'s last axis are kept but not passed on.
    """

    label: str
    kind: Literal["conv", "dense"]
    in_shape: Shape
    pre_shape: Shape
    out_shape: Shape
    weight_shape: Shape
    activation: str
    window: Window | None = None
    pool: Window | None = None
    auxiliary: int = 0

    @property
    def passed_shape(self) -> Shape:
        """Shape per sample of what goes on to the next block: s^{n+1} without its auxiliary units."""
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
        Of the blocks' `weight_shape`.
    biases : list of arrays
        Of shape (O,) or (out,).
    """

    blocks: tuple[Block, ...]
    weights: list[Array] = field(default_factory=list)
    biases: list[Array] = field(default_factory=list)

    def __len__(self) -> int:
        """N, the number of blocks."""
        return len(self.blocks)


@dataclass
class ForwardPass:
    """What a forward pass leaves for the rules.

    Parameters
    ----------
    s : list of arrays
        s[0] is the input, s[n + 1] the output of block n, of shape (B, *out_shape), auxiliary units included.
    x : list of arrays
        x[n] is the input of block n, C-contiguous: what s[n] passes on; the last one holds the logits.
    index : list of arrays or None
        index[n]: the maxima of block n's pool (`max_pool_forward`), None without one.
    """

    s: list[Array]
    x: list[Array]
    index: list[Array | None]

    @property
    def logits(self) -> Array:
        """What the last block passes on, of shape (B, classes)."""
        return self.x[-1]


def plan_blocks(layers: Sequence[options.Conv | options.Dense], input_shape: Shape) -> tuple[Block, ...]:
    """Chain layers from the input's shape on.

    Parameters
    ----------
    layers : sequence of Conv or Dense options
    input_shape : tuple of int
        (H, W, C), or (in,).

    Raises
    ------
    UserError
        If a layer does not fit the shape that reaches it; names block, its input and what would fit.
    """
    blocks: list[Block] = []
    shape = input_shape
    for n, layer in enumerate(layers):
        count = 1 + sum(block.kind == layer.type for block in blocks)
        label = f"{layer.type}{count}"
        try:
            block = _conv(layer, label, shape) if isinstance(layer, options.Conv) else _dense(layer, label, shape)
            if math.prod(block.weight_shape) > LARGEST_WEIGHT:
                raise ValueError(f"a weight of {show_shape(block.weight_shape)} fits into no memory")
        except ValueError as error:
            raise UserError(f"network block {n} ({label}): input {show_shape(shape)}: {error}") from error
        blocks.append(block)
        shape = block.passed_shape
    return tuple(blocks)


def _conv(layer: options.Conv, label: str, shape: Shape) -> Block:
    if len(shape) != 3:
        raise ValueError("a conv block needs an image (height, width, channels), so it cannot follow a dense block")
    _check_auxiliary(layer.auxiliary, layer.channels, "channels")
    height, width, channels = shape
    if layer.padding != "same" and layer.padding > max(height, width, layer.kernel):
        raise ValueError(f"padding {layer.padding} is wider than the image and than the kernel {layer.kernel}")
    window = make_window(height, width, layer.kernel, layer.stride, layer.padding)
    pre_shape = (window.out_height, window.out_width, layer.channels)
    pool = None
    if layer.pool is not None:
        if layer.pool.kernel > MAX_POOL_KERNEL:
            raise ValueError(f"pool kernel {layer.pool.kernel}; at most {MAX_POOL_KERNEL}")
        if 2 * layer.pool.padding > layer.pool.kernel:
            raise ValueError(f"pool padding {layer.pool.padding} is more than half of its kernel {layer.pool.kernel}")
        try:
            pool = make_window(*pre_shape[:2], layer.pool.kernel, layer.pool.stride, layer.pool.padding)
        except ValueError as error:
            raise ValueError(f"the pool over the convolution's output {show_shape(pre_shape)}: {error}") from error
    out_shape = pre_shape if pool is None else (pool.out_height, pool.out_width, layer.channels)
    weight_shape = (layer.kernel, layer.kernel, channels, layer.channels)
    return Block(
        label, "conv", shape, pre_shape, out_shape, weight_shape, layer.activation, window, pool, layer.auxiliary
    )


def _dense(layer: options.Dense, label: str, shape: Shape) -> Block:
    _check_auxiliary(layer.auxiliary, layer.units, "units")
    size = math.prod(shape)
    out_shape = (layer.units,)
    weight_shape = (size, layer.units)
    return Block(
        label, "dense", (size,), out_shape, out_shape, weight_shape, layer.activation, auxiliary=layer.auxiliary
    )


def _check_auxiliary(auxiliary: int, units: int, key: str) -> None:
    if auxiliary >= units:
        raise ValueError(
            f"auxiliary: {auxiliary} of {key}: {units} leaves nothing to pass on; {key} counts the auxiliary ones too"
        )


def make_network(
    blocks: tuple[Block, ...], init: str, seed: int, dtype: str = "float32", backend: Backend = NUMPY
) -> Network:
    """Return a network with initial parameters, the same for the same seed on every backend.

    Parameters
    ----------
    blocks : tuple of Block
    init : {"kaiming-uniform", "xavier-normal", "orthogonal"}
    seed : int
    dtype : {"float32", "float64"}
        Numbers are drawn in float64 and rounded.
    backend : Backend
    """
    network = Network(blocks)
    for n, block in enumerate(blocks):
        weight = initial_weight(init, block.weight_shape, seed, "init", n)
        bias = initial_bias(init, block.weight_shape, seed, "init", n)
        network.weights.append(backend.asarray(weight.astype(dtype)))
        network.biases.append(backend.asarray(bias.astype(dtype)))
    return network


def block_forward(block: Block, weight: Array, bias: Array, x: Array) -> tuple[Array, Array, Array | None]:
    """Return z, s^{n+1} and the pool's index (or None) of one block, plainly: affine → activation → [max-pool].

    Parameters
    ----------
    block : Block
    weight, bias : arrays
        θ of the block.
    x : array of shape (B, *in_shape)
        s^n; a dense block takes any shape of the right size.
    """
    if block.window is None:
        z = dense_forward(x.reshape(len(x), -1), weight, bias)
    else:
        z, _ = conv_forward(x, weight, bias, block.window)
    s = activation_forward(z, block.activation)
    if block.pool is None:
        return z, s, None
    return z, *max_pool_forward(s, block.pool)


def block_backward(
    block: Block, ds: Array, z: Array, index: Array | None, x: Array, feedback: Array | None
) -> tuple[Array, Array, Array | None]:
    """Return dW, db and the gradient of x of one block, plainly, given the gradient of its output.

    Parameters
    ----------
    block : Block
    ds : array of shape (B, *passed_shape)
        Gradient of what s^{n+1} passes on; that of its auxiliary units is 0.
    z, index : arrays
        From `block_forward`.
    x : array of shape (B, *in_shape)
    feedback : array of shape weight_shape, or None
        What carries the gradient back to x: the weight itself (BP), a fixed random one (FA); None: no gradient of x.
    """
    ds = pad_auxiliary(block, ds)
    df = ds if index is None or block.pool is None else max_pool_backward(ds, index, block.pool)
    dz = activation_backward(df, activation_forward(z, block.activation), block.activation)
    if block.window is None:
        dweight, dbias = dense_backward_weight(dz, x.reshape(len(x), -1))
        dx = None if feedback is None else dense_backward_input(dz, feedback).reshape(x.shape)
        return dweight, dbias, dx
    dweight, dbias = conv_backward_weight(dz, im2col(x, block.window))
    dx = None if feedback is None else conv_backward_input(dz, feedback, block.window)
    return dweight.reshape(block.weight_shape), dbias, dx


def block_inverse(block: Block, weight: Array, bias: Array, y: Array, x: Array) -> Array:
    """Return G(y) with G(F(x)) = x of one square block without pool, plainly: f⁻¹, −b, W⁻¹, col2im (GP paper, 2.2.2).

    Overlapping patches add up to n_x ⊙ x, n_x windows over each pixel; (n_x − 1) ⊙ x of the forward pass is taken off.

    Parameters
    ----------
    block : Block
    weight, bias : arrays
        θ of the block.
    y : array of shape (B, *out_shape)
        Near the block's output, auxiliary units included.
    x : array of shape (B, *in_shape)
        The block's input in the forward pass; pixels that no window covers keep it.
    """
    factors = factor(as_matrix(weight))
    z = activation_inverse(y, block.activation) - bias
    patches = right_solve(factors, z.reshape(-1, z.shape[-1]))
    if block.window is None:
        return patches.reshape(x.shape)
    n_x = coverage(block.window, x)
    return col2im(patches.reshape(z.shape), block.window) - (n_x - x.dtype.type(1)) * x


def pad_auxiliary(block: Block, passed: Array) -> Array:
    """Return an array of shape (B, *passed_shape) with zeros for the auxiliary units: shape (B, *out_shape)."""
    if not block.auxiliary:
        return passed
    xp = array_module(passed)
    return xp.concatenate([passed, xp.zeros((*passed.shape[:-1], block.auxiliary), dtype=passed.dtype)], axis=-1)


def block_flops(block: Block) -> int:
    """Return the floating-point operations of a block's affine map for one sample."""
    return 2 * math.prod(block.pre_shape[:-1]) * math.prod(block.weight_shape)


def adjoint_flops(block: Block) -> int:
    """Return the operations of either adjoint for one sample: the map's, less what auxiliary units have no part in."""
    return block_flops(block) * block.passed_shape[-1] // block.out_shape[-1]


def show_shape(shape: Shape) -> str:
    """Return a shape as "28x28x1"."""
    return "x".join(map(str, shape))
