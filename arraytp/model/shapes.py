"""Turn the layers of a config into blocks: compute the shape that reaches each, and refuse what does not fit."""

import math
from collections.abc import Sequence

from arraytp import options
from arraytp.errors import UserError
from arraytp.model.blocks import Block, Shape, show_shape
from arraytp.ops.activations import ACTIVATIONS
from arraytp.ops.patches import make_window
from arraytp.ops.pool import MAX_POOL_KERNEL

# In elements; for a larger array NumPy cannot even say how many bytes are missing.
LARGEST_WEIGHT = 2**50


def plan_blocks(layers: Sequence[options.Conv | options.Dense], input_shape: Shape) -> tuple[Block, ...]:
    """Chain layers, starting from the input's shape.

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
    labels = block_labels([layer.type for layer in layers])
    for n, (layer, label) in enumerate(zip(layers, labels, strict=True)):
        try:
            block = _conv(layer, label, shape) if isinstance(layer, options.Conv) else _dense(layer, label, shape)
            if math.prod(block.weight_shape) > LARGEST_WEIGHT:
                raise ValueError(f"a weight of {show_shape(block.weight_shape)} does not fit into memory")
        except ValueError as error:
            raise UserError(f"network block {n} ({label}): input {show_shape(shape)}: {error}") from error
        blocks.append(block)
        shape = block.next_shape
    return tuple(blocks)


def block_labels(kinds: Sequence[str]) -> list[str]:
    """Return "conv1", "conv2", "dense1", …: kind and count."""
    return [f"{kind}{kinds[: n + 1].count(kind)}" for n, kind in enumerate(kinds)]


def _conv(layer: options.Conv, label: str, shape: Shape) -> Block:
    if len(shape) != 3:
        raise ValueError("a conv block needs an image (height, width, channels), so it cannot follow a dense block")
    _check_auxiliary(layer.auxiliary, layer.channels, "channels")
    height, width, channels = shape
    widest = max(height, width, layer.kernel)
    if layer.padding != "same" and layer.padding > widest:
        raise ValueError(
            f"padding {layer.padding} is wider than the image and than the kernel {layer.kernel}; at most {widest}"
        )
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
    activation = ACTIVATIONS[layer.activation]
    return Block(label, "conv", shape, pre_shape, out_shape, weight_shape, activation, window, pool, layer.auxiliary)


def _dense(layer: options.Dense, label: str, shape: Shape) -> Block:
    _check_auxiliary(layer.auxiliary, layer.units, "units")
    size = math.prod(shape)
    out_shape = (layer.units,)
    weight_shape = (size, layer.units)
    activation = ACTIVATIONS[layer.activation]
    return Block(label, "dense", (size,), out_shape, out_shape, weight_shape, activation, auxiliary=layer.auxiliary)


def _check_auxiliary(auxiliary: int, units: int, key: str) -> None:
    if auxiliary >= units:
        raise ValueError(
            f"auxiliary: {auxiliary} of {key}: {units} leaves nothing to pass on; {key} counts auxiliary units, too"
        )
