"""The networks of the papers by name (docs/math/notation.md)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from arraytp.errors import UserError
from arraytp.model.blocks import Block, Shape, show_shape
from arraytp.model.shapes import plan_blocks
from arraytp.options import ActivationName, Conv, Dense, NetworkOptions, Pool

Layer = Conv | Dense


def fully_connected(hidden: int, classes: int) -> list[Layer]:
    """GP paper, Figure 2 (left, middle): `hidden` layers of 1024 leaky-ReLU units and a linear output."""
    return [*(Dense(units=1024, activation="leaky-relu") for _ in range(hidden)), Dense(units=classes)]


def lenet(classes: int) -> list[Layer]:
    """DTP paper: two 5×5 convolutions with overlapping 3×3 max-pools, then 512 units; ELU."""
    pool = Pool(kernel=3, stride=2, padding=1)
    return [
        Conv(channels=32, kernel=5, padding=2, activation="elu", pool=pool),
        Conv(channels=64, kernel=5, padding=2, activation="elu", pool=pool),
        Dense(units=512, activation="elu"),
        Dense(units=classes),
    ]


def vgg(classes: int) -> list[Layer]:
    """DTP paper: five 3×3 convolutions, each followed by a 2×2 max-pool; ELU."""
    pool = Pool(kernel=2, stride=2)
    widths = (128, 128, 256, 256, 512)
    convs = [Conv(channels=width, kernel=3, padding=1, activation="elu", pool=pool) for width in widths]
    return [*convs, Dense(units=classes)]


def conv_imagenet(classes: int) -> list[Layer]:
    """GP paper, Figure 2 (right): seven strided SAME convolutions, (kernel, stride, channels); leaky ReLU."""
    layers = ((9, 4, 24), (3, 2, 24), (5, 2, 48), (3, 2, 48), (3, 1, 96), (3, 2, 96), (3, 1, 192))
    convs = [
        Conv(channels=channels, kernel=kernel, stride=stride, padding="same", activation="leaky-relu")
        for kernel, stride, channels in layers
    ]
    return [*convs, Dense(units=classes)]


NAMED = {
    "fc-shallow": lambda classes: fully_connected(3, classes),
    "fc-deep": lambda classes: fully_connected(6, classes),
    "lenet": lenet,
    "vgg": vgg,
    "conv-imagenet": conv_imagenet,
}


def layers_of(network: NetworkOptions, classes: int) -> list[Layer]:
    """Return the layers that the config names or lists; `activation` replaces that of a named net's hidden layers."""
    if network.blocks is not None:
        return list(network.blocks)
    if network.name is None:
        raise UserError("network: one of name and blocks is needed")
    layers = NAMED[network.name](classes)
    activation: ActivationName | None = network.activation
    if activation is None:
        return layers
    return [replace(layer, activation=activation) for layer in layers[:-1]] + layers[-1:]


def plan_network(network: NetworkOptions, input_shape: Shape, classes: int) -> tuple[Block, ...]:
    """Return the blocks of a config's network for a data set.

    Parameters
    ----------
    network : NetworkOptions
    input_shape : tuple of int
        (H, W, C) of the images.
    classes : int
        The number of logits that the last block must have.

    Raises
    ------
    UserError
        If a block does not fit its input, or the output does not fit the classes.
    """
    layers = layers_of(network, classes)
    blocks = plan_blocks(layers, input_shape)
    if network.square:
        blocks = plan_blocks(square(layers, blocks), input_shape)
    last = blocks[-1]
    if last.kind != "dense" or last.next_shape != (classes,):
        raise UserError(
            f"network block {len(blocks) - 1} ({last.label}): output {show_shape(last.next_shape)}: the last block "
            f"must be dense with one unit per class of the data set, units: {classes} besides auxiliary ones"
        )
    return blocks


def square(layers: Sequence[Layer], blocks: tuple[Block, ...]) -> list[Layer]:
    """Give every layer but the first the auxiliary units that make its weight matrix square (GP paper, 2.2.3).

    The units passed on stay the same; a convolution with C input channels gets k²·C channels in all.

    Parameters
    ----------
    layers : sequence of Conv or Dense options
    blocks : tuple of Block
        The blocks of these layers.

    Raises
    ------
    UserError
        If a layer passes on more units than it has inputs.
    """
    result: list[Layer] = [layers[0]]
    for n, (layer, block) in enumerate(zip(layers[1:], blocks[1:], strict=True), start=1):
        inputs, handed_on = int(np.prod(block.weight_shape[:-1])), block.next_shape[-1]
        if inputs < handed_on:
            raise UserError(
                f"network block {n} ({block.label}): square: {inputs} inputs cannot give the {handed_on} units that "
                f"are passed on; at most {inputs} can be"
            )
        if isinstance(layer, Conv):
            result.append(replace(layer, channels=inputs, auxiliary=inputs - handed_on))
        else:
            result.append(replace(layer, units=inputs, auxiliary=inputs - handed_on))
    return result
