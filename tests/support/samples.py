"""Data for tests: windows, blocks, small forms of the named networks, batches; and comparison of arrays."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from arraytp.errors import UserError
from arraytp.model.architectures import plan_network
from arraytp.model.blocks import Network
from arraytp.model.shapes import plan_blocks
from arraytp.ops.patches import make_window
from arraytp.options import Conv, Dense, NetworkOptions, Pool

ACTIVATIONS = ("linear", "leaky-relu", "elu", "relu", "tanh")

# Inputs as small as the shapes allow, so that a double-precision check takes milliseconds.
NAMED = {
    "fc-shallow": ((5, 3, 2), 4),
    "fc-deep": ((2, 3, 1), 4),
    "lenet": ((12, 9, 2), 10),
    "vgg": ((32, 32, 1), 10),
    "conv-imagenet": ((40, 33, 3), 7),
}


def rng(*key):
    return np.random.default_rng(key)


def named_blocks(name, square=False):
    shape, classes = NAMED[name]
    return plan_network(NetworkOptions(name=name, square=square), shape, classes)


def random_network(blocks, seed=0, dtype="float64"):
    """Return a network on the host whose activations keep their size; biases are not 0, so that losing one shows."""
    network = Network(blocks)
    for weight, bias in _drawn(tuple(block.weight_shape for block in blocks), seed):
        fan_in = int(np.prod(weight.shape[:-1]))
        network.weights.append((weight * fan_in**-0.5).astype(dtype, copy=False))
        network.biases.append((0.3 * bias).astype(dtype, copy=False))
    return network


@lru_cache(maxsize=4)
def _drawn(shapes, seed):
    """Draw weights and biases; cached, since drawing millions of numbers takes as long as the test that needs them."""
    generator = rng(seed, 1)
    return [(generator.standard_normal(shape), generator.standard_normal(shape[-1])) for shape in shapes]


def placed(network, put):
    """Return the network with its arrays handed to `put`."""
    return Network(network.blocks, [put(w) for w in network.weights], [put(b) for b in network.biases])


def well_conditioned(order, number, seed):
    """Return a square matrix whose singular values run from 1 down to 1/number."""
    left, right = (np.linalg.qr(rng(seed, 3, i).standard_normal((order, order)))[0] for i in (0, 1))
    return np.ascontiguousarray(left * np.geomspace(1, 1 / number, order) @ right)


def batch(blocks, count, seed=0, dtype="float64"):
    """Return inputs and labels."""
    generator = rng(seed, 2)
    x = generator.standard_normal((count, *blocks[0].in_shape)).astype(dtype)
    return x, generator.integers(0, blocks[-1].next_shape[0], count)


def close(actual, wanted, tolerance):
    """Assert |actual − wanted| ≤ tolerance · max |wanted|: rounding of sums scales with the array."""
    assert actual.shape == wanted.shape
    if not wanted.size:
        return
    error, scale = np.max(np.abs(actual - wanted)), np.max(np.abs(wanted))
    assert error <= tolerance * scale + 1e-300, f"error {error:.2e} at scale {scale:.2e}"


def apart(shape, seed):
    """Return numbers far from kinks: no two are closer than 0.1, and none is closer to 0 than 0.05."""
    size = int(np.prod(shape))
    return (rng(seed).permutation(size) - size // 2 + 0.5).reshape(shape) / 10


@st.composite
def windows(draw, pooling=False, strides=5):
    """Windows of all kinds: overlapping, with gaps (stride > kernel), padded, off the image's end, on one pixel."""
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, strides))
    padding = draw(st.integers(0, kernel // 2) if pooling else st.just("same") | st.integers(0, 4))
    return fitting(height, width, kernel, stride, padding)


def fitting(*arguments):
    try:
        return make_window(*arguments)
    except ValueError:
        assume(False)


@st.composite
def image_cases(draw, pooling=False, strides=5):
    """A window with batch size, channels in and out, and a seed; batch 1 and one channel included."""
    return SimpleNamespace(
        window=draw(windows(pooling, strides)),
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def pools(draw):
    kernel = draw(st.integers(1, 3))
    return Pool(kernel=kernel, stride=draw(st.integers(1, 4)), padding=draw(st.integers(0, kernel // 2)))


@st.composite
def conv_layers(draw, activations=ACTIVATIONS):
    return Conv(
        channels=draw(st.integers(1, 4)),
        kernel=draw(st.integers(1, 4)),
        stride=draw(st.integers(1, 4)),
        padding=draw(st.just("same") | st.integers(0, 3)),
        activation=draw(st.sampled_from(activations)),
        pool=draw(st.none() | pools()),
    )


@st.composite
def chains(draw, largest=9, auxiliary=False):
    """Blocks of a free-form network that fits its input: up to two convolutions, then up to two dense layers.

    With `auxiliary`, each block has up to two auxiliary units.
    """
    shape = (draw(st.integers(1, largest)), draw(st.integers(1, largest)), draw(st.integers(1, 3)))
    layers = [
        *draw(st.lists(conv_layers(), max_size=2)),
        *(Dense(units=draw(st.integers(1, 6)), activation=draw(st.sampled_from(ACTIVATIONS)))
          for _ in range(draw(st.integers(0, 1)))),
        Dense(units=draw(st.integers(2, 5))),
    ]  # fmt: skip
    if auxiliary:
        layers = [with_auxiliary(layer, draw(st.integers(0, 2))) for layer in layers]
    return fitting_blocks(layers, shape)


def with_auxiliary(layer, count):
    """Return a layer that passes on as many units as before and has `count` auxiliary units besides."""
    key = "channels" if isinstance(layer, Conv) else "units"
    return replace(layer, **{key: getattr(layer, key) + count}, auxiliary=count)


def fitting_blocks(layers, shape):
    try:
        return plan_blocks(layers, shape)
    except UserError:
        assume(False)
