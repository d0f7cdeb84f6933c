"""Blocks with feedback for tests, each second in a network whose first block makes its input."""

import numpy as np
from samples import fitting_blocks, random_network, rng

from arraytp.model.network import block_forward
from arraytp.options import Conv, Dense, Pool

LAYERS = {
    "dense": Dense(units=6),
    "conv": Conv(channels=3, kernel=3, padding=1),
    "strided": Conv(channels=3, kernel=3, stride=2, padding="same"),
    "pooled": Conv(channels=3, kernel=3, padding=1, pool=Pool(kernel=2, stride=2)),
    "overlapping": Conv(channels=3, kernel=2, pool=Pool(kernel=3, stride=2, padding=1)),
}
SHAPES = {name: (8,) if name == "dense" else (7, 6, 2) for name in LAYERS}


def made(name, activation, batch, seed=0):
    """Return a block, (θ, bias), (ω, bias) and s^n of one batch."""
    (block,) = fitting_blocks([type(LAYERS[name])(**vars(LAYERS[name]) | {"activation": activation})], SHAPES[name])
    network = random_network([block], seed)
    generator = rng(seed, 5)
    omega = generator.standard_normal(block.weight_shape) * float(np.prod(block.weight_shape[:-1])) ** -0.5
    bias = 0.3 * generator.standard_normal(block.in_shape[-1])
    s = generator.standard_normal((batch, *block.in_shape))
    return block, (network.weights[0], network.biases[0]), (omega, bias), s


def noise(block, batch, sigma, seed=0):
    """Return ε and η."""
    generator = rng(seed, 6)
    shapes = (batch, *block.in_shape), (batch, *block.out_shape)
    return tuple(sigma * generator.standard_normal(shape) for shape in shapes)


def output(block, theta, s):
    """Return s^{n+1} and the pool's index."""
    return block_forward(block, *theta, s)[1:]
