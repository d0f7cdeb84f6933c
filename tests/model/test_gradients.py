"""Gradients of blocks and of whole networks against central finite differences in float64, relative error below 1e-6.

For kinks, see `gradients.check`: a point too close to a kink for any step fails the test rather than passing it.
"""

from dataclasses import replace

import gradients
import numpy as np
import plain
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ACTIVATIONS, NAMED, batch, chains, conv_layers, fitting_blocks, named_blocks, random_network, rng
from training import trainer

from arraytp.model.plain import block_backward, block_forward
from arraytp.options import SGD, Dense


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread():
    """Limit BLAS to one thread: on a busy machine, its threads would mostly wait for each other in small products."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def check_block(block, count, seed):
    network = random_network((block,), seed)
    weight, bias = network.weights[0], network.biases[0]
    x, _ = batch((block,), count, seed)
    z, s, index = block_forward(block, weight, bias, x)
    r = rng(seed, 3).standard_normal(s.shape)

    def loss(x, weight, bias):
        z, s, index = block_forward(block, weight, bias, x)
        return float((np.sin(s) * r).sum()), (z > 0).tobytes() + (b"" if index is None else index.tobytes())

    dweight, dbias, dx = block_backward(block, np.cos(s) * r, z, index, x, weight)
    generator = rng(seed, 4)
    gradients.check(lambda x: loss(x, weight, bias), x, dx, generator)
    gradients.check(lambda w: loss(x, w, bias), weight, dweight, generator)
    gradients.check(lambda b: loss(x, weight, b), bias, dbias, generator)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(data=st.data(), count=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_gradients_of_a_conv_block_match_finite_differences(activation, data, count, seed):
    layer = data.draw(conv_layers((activation,)))
    shape = tuple(data.draw(st.integers(1, size)) for size in (9, 9, 3))
    check_block(fitting_blocks([layer], shape)[0], count, seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(wide=st.integers(1, 8), units=st.integers(1, 8), count=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_gradients_of_a_dense_block_match_finite_differences(activation, wide, units, count, seed):
    check_block(fitting_blocks([Dense(units=units, activation=activation)], (wide,))[0], count, seed)


def check_network(network, x, labels, reduction, **settings):
    """Check BP's update of every weight and bias, each in a direction of its own."""
    _, updates = trainer(network, "bp", SGD(lr=1), threads=2).propose(x, labels, reduction)
    generator = rng(len(x), 5)
    for arrays, which in (("weights", 0), ("biases", 1)):
        for n, parameter in enumerate(getattr(network, arrays)):

            def loss(value, arrays=arrays, n=n):
                values = list(getattr(network, arrays))
                values[n] = value
                return plain.loss(replace(network, **{arrays: values}), x, labels, reduction)

            gradients.check(loss, parameter, updates[n][which], generator, directions=1, **settings)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@given(blocks=chains(), count=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=15)
def test_gradients_of_a_drawn_network_match_finite_differences(reduction, blocks, count, seed):
    check_network(random_network(blocks, seed), *batch(blocks, count, seed), reduction)


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_a_named_network_match_finite_differences(name):
    """The first step is small because some of the 92,000 pooled units of VGG are close to a kink."""
    blocks = named_blocks(name)
    check_network(random_network(blocks), *batch(blocks, 2), "mean", first_step=4e-5)
