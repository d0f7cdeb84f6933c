"""Blocks with feedback for tests, each the second of a network whose first block computes its input."""

import numpy as np
from samples import fitting_blocks, random_network, rng

from arraytp.backend import NUMPY
from arraytp.model.blocks import Network
from arraytp.model.passes import Batch, ForwardPass
from arraytp.model.plain import Plain, block_forward
from arraytp.options import Conv, Dense, Pool
from arraytp.rules import RULES
from arraytp.rules.protocol import State

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


def at_block(block, theta, s, engine=None, seed=0, number=0):
    """Return a block of a pass that took s: the second of a network, since the first has no feedback."""
    s_next, index = output(block, theta, s)
    network = Network((block, block), [theta[0]] * 2, [theta[1]] * 2)
    forward = ForwardPass([s, s, s_next], [s, s_next], [None, index])
    return Batch(engine or Plain(NUMPY), network, forward, s_next, seed, number).at(1)


def iteration(rule, at, omega, sigma, k=0, **options):
    """Return the k-th iteration of a rule's feedback training on a block, with ω and G's bias."""
    rule = RULES[rule]
    state = State({at.n: omega[0]}, {at.n: omega[1]})
    return rule.feedback.begin(rule.options(**options), at, sigma, k + 1)(state, k, True)
