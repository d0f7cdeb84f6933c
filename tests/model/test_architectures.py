"""The papers' networks: shapes worked out by hand, and errors that name block, input and what would fit."""

from itertools import pairwise
from math import prod

import pytest

from arraytp.errors import UserError
from arraytp.model.architectures import NAMED, plan_network
from arraytp.options import Conv, Dense, NetworkOptions, Pool

BLOCKS = {
    # name: (input, classes), then per block: label, activation, weight, output
    "fc-shallow": ((32, 32, 3), 10),
    "fc-deep": ((32, 32, 3), 10),
    "lenet": ((32, 32, 3), 10),
    "vgg": ((32, 32, 3), 10),
    "conv-imagenet": ((224, 224, 3), 1000),
}
WANTED = {
    "fc-shallow": [("dense1", "leaky-relu", (3072, 1024), (1024,)), *[(f"dense{n}", "leaky-relu", (1024, 1024), (1024,))
                   for n in (2, 3)], ("dense4", "linear", (1024, 10), (10,))],
    "fc-deep": [("dense1", "leaky-relu", (3072, 1024), (1024,)), *[(f"dense{n}", "leaky-relu", (1024, 1024), (1024,))
                for n in (2, 3, 4, 5, 6)], ("dense7", "linear", (1024, 10), (10,))],
    "lenet": [
        ("conv1", "elu", (5, 5, 3, 32), (16, 16, 32)),
        ("conv2", "elu", (5, 5, 32, 64), (8, 8, 64)),
        ("dense1", "elu", (4096, 512), (512,)),
        ("dense2", "linear", (512, 10), (10,)),
    ],
    "vgg": [
        ("conv1", "elu", (3, 3, 3, 128), (16, 16, 128)),
        ("conv2", "elu", (3, 3, 128, 128), (8, 8, 128)),
        ("conv3", "elu", (3, 3, 128, 256), (4, 4, 256)),
        ("conv4", "elu", (3, 3, 256, 256), (2, 2, 256)),
        ("conv5", "elu", (3, 3, 256, 512), (1, 1, 512)),
        ("dense1", "linear", (512, 10), (10,)),
    ],
    "conv-imagenet": [
        ("conv1", "leaky-relu", (9, 9, 3, 24), (56, 56, 24)),
        ("conv2", "leaky-relu", (3, 3, 24, 24), (28, 28, 24)),
        ("conv3", "leaky-relu", (5, 5, 24, 48), (14, 14, 48)),
        ("conv4", "leaky-relu", (3, 3, 48, 48), (7, 7, 48)),
        ("conv5", "leaky-relu", (3, 3, 48, 96), (7, 7, 96)),
        ("conv6", "leaky-relu", (3, 3, 96, 96), (4, 4, 96)),
        ("conv7", "leaky-relu", (3, 3, 96, 192), (4, 4, 192)),
        ("dense1", "linear", (3072, 1000), (1000,)),
    ],
}  # fmt: skip


def plan(network, shape=(32, 32, 3), classes=10):
    return plan_network(network, shape, classes)


@pytest.mark.parametrize("name", NAMED)
def test_shapes_are_the_papers(name):
    shape, classes = BLOCKS[name]
    blocks = plan_network(NetworkOptions(name=name), shape, classes)
    assert [(b.label, b.activation.name, b.weight_shape, b.out_shape) for b in blocks] == WANTED[name]


def test_lenet_on_mnist_has_3136_units_before_its_dense_layers():
    assert plan(NetworkOptions(name="lenet"), (28, 28, 1))[2].weight_shape == (3136, 512)


def test_pools_and_borders_are_the_papers():
    lenet, vgg, imagenet = (plan(NetworkOptions(name=n), *BLOCKS[n]) for n in ("lenet", "vgg", "conv-imagenet"))
    for block in lenet[:2]:
        assert (block.window.top, block.window.right, block.window.stride) == (2, 2, 1)
        assert (block.pool.kernel, block.pool.stride, block.pool.top, block.pool.left) == (3, 2, 1, 1)
        assert block.pre_shape[0] == 2 * block.out_shape[0]
    for block in vgg[:5]:
        assert (block.window.top, block.pool.kernel, block.pool.stride, block.pool.top) == (1, 2, 2, 0)
    assert [b.window.stride for b in imagenet[:7]] == [4, 2, 2, 2, 1, 2, 1]
    assert (imagenet[0].window.top, imagenet[0].window.bottom) == (2, 3)


def test_an_activation_replaces_that_of_the_hidden_blocks_only():
    blocks = plan(NetworkOptions(name="lenet", activation="tanh"))
    assert [b.activation.name for b in blocks] == ["tanh", "tanh", "tanh", "linear"]


@pytest.mark.parametrize("name", NAMED)
def test_each_block_continues_where_the_one_before_ends(name):
    for before, block in pairwise(plan_network(NetworkOptions(name=name), *BLOCKS[name])):
        assert block.in_shape == (before.out_shape if block.kind == "conv" else (prod(before.out_shape),))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Dense(units=9)], r"network block 0 \(dense1\): output 9: .*units: 10"),
        ([Conv(channels=10, kernel=3)], r"network block 0 \(conv1\): output 30x30x10: the last block must be dense"),
        (
            [Dense(units=9), Conv(channels=1, kernel=1), Dense(units=10)],
            r"network block 1 \(conv1\): input 9: a conv block needs an image .* cannot follow a dense block",
        ),
        (
            [Conv(channels=4, kernel=3), Conv(channels=4, kernel=40), Dense(units=10)],
            r"network block 1 \(conv2\): input 30x30x4: kernel 40 does not fit into 30x30 with padding 0; at most 30",
        ),
        (
            [Conv(channels=4, kernel=3, pool=Pool(kernel=2, stride=2, padding=2)), Dense(units=10)],
            r"network block 0 \(conv1\): input 32x32x3: pool padding 2 is more than half of its kernel 2",
        ),
        (
            [Conv(channels=4, kernel=31, pool=Pool(kernel=3, stride=2)), Dense(units=10)],
            r"block 0 \(conv1\): input 32x32x3: the pool over the convolution's output 2x2x4: kernel 3 .*; at most 2",
        ),
    ],
)
def test_layers_that_do_not_chain_are_refused_by_name(blocks, message):
    with pytest.raises(UserError, match=message):
        plan(NetworkOptions(blocks=blocks))


def test_vgg_on_images_that_are_too_small_is_refused():
    with pytest.raises(UserError, match=r"network block 4 \(conv5\): input 1x1x256"):
        plan(NetworkOptions(name="vgg"), (28, 28, 1))
