"""The literal form's updates are gradients: central differences of Σ m ‖t − a‖² of every block, t and m held fixed."""

from dataclasses import replace

import numpy as np
import pytest
from gradients import check
from samples import batch, rng, well_conditioned
from training import copies, fast, pass_of, plain

from arraytp.model.architectures import square
from arraytp.model.initialise import make_network
from arraytp.model.plain import block_forward, block_inverse
from arraytp.model.shapes import plan_blocks
from arraytp.ops.conv import as_matrix
from arraytp.ops.solve import factor
from arraytp.options import Conv, Dense
from arraytp.rules.gait_prop import RULE, Options, nudged, perturbation
from arraytp.rules.protocol import State

LAYERS = {
    "dense": ([Dense(units=9), Dense(units=6), Dense(units=3)], (7,)),
    "convolutions": ([Conv(channels=2, kernel=3, padding="same"), Conv(channels=3, kernel=3, stride=2, padding="same"),
                      Dense(units=3)], (5, 4, 2)),
    "patches": ([Conv(channels=2, kernel=1), Conv(channels=3, kernel=2, stride=2), Dense(units=3)], (4, 4, 1)),
}  # fmt: skip
# Nudges that are large enough for t − a to keep its digits.
OPTIONS = {
    "normalised": Options(eta=1e-3),
    "vanilla": Options(normalise=False, gamma=0.05),
    "not rescaled": Options(eta=1e-2, rescale_updates=False),
}


def made(name, activation):
    """Return a network with auxiliary units in all blocks but the first, W far from orthogonal, nonzero biases."""
    layers, shape = LAYERS[name]
    layers = square(layers, plan_blocks(layers, shape))
    blocks = plan_blocks([replace(layer, activation=activation) for layer in layers], shape)
    network = make_network(blocks, "orthogonal", 0, "float64")
    for n, block in enumerate(blocks):
        network.biases[n] = 0.1 * rng(n).standard_normal(block.out_shape[-1])
        if n:
            network.weights[n] = 0.5 * well_conditioned(block.out_shape[-1], 3, n).reshape(block.weight_shape)
    assert all(block.auxiliary for block in blocks[1:])
    return network


def targets(options, one):
    """Return t of all units of every block, and m: Algorithm 1 by the plain inverse; auxiliary units have t = a."""
    t, m, result = one.logits - one.dlogits / 2, np.ones(len(one)), []
    for at in one.down():
        result.append((np.concatenate([t, at.output[..., t.shape[-1] :]], axis=-1), m))
        if at.n > 0:
            gamma, _ = perturbation(options, t - at.s_next, at.block)
            y = nudged(at, t, gamma)
            t = block_inverse(at.block, factor(as_matrix(at.weight)), at.bias, y, at.s)
            m = m / gamma if options.rescale_updates else m
    return result[::-1]


def check_block(block, weight, bias, x, t, m, update, generator):
    """Compare an update of weight and bias with differences of Σ m ‖t − a‖² over all units of the block."""

    def loss(w, b):
        z, s, _ = block_forward(block, w, b, x)
        return float(m @ np.square((t - s).reshape(len(x), -1)).sum(axis=1)), (z >= 0).tobytes()

    check(lambda w: loss(w, bias), weight, update[0], generator)
    check(lambda b: loss(weight, b), bias, update[1], generator)


@pytest.mark.parametrize("engine", [fast, plain])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ["leaky-relu", "tanh", "elu"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_update_is_the_gradient_of_its_local_loss(name, activation, options, engine):
    network = made(name, activation)
    x, _ = batch(network.blocks, 4)
    dlogits = 0.3 * rng(5).standard_normal((4, 3))
    one = pass_of(network, x, dlogits, engine())
    updates = copies(RULE.propose(options, State(), one))
    for n, (t, m) in enumerate(targets(options, one)):
        block, update, units = network.blocks[n], updates[n], network.blocks[n].next_shape[-1]
        assert np.abs(update[0]).max() > 1e-3
        assert not update[0][..., units:].any()
        check_block(block, network.weights[n], network.biases[n], one.forward.s[n], t, m, update, rng(n))
