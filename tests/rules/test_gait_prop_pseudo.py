"""GAIT-prop with pseudo-inverses: BP where W is semi-orthogonal, BP with W⁺ in place of Wᵀ elsewhere, refusals."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network, rng
from training import copies, fast, pass_of, plain

from arraytp.config import parse_config
from arraytp.data.dataset import open_dataset
from arraytp.data.loader import Loader
from arraytp.errors import IllConditionedError, UserError
from arraytp.model.architectures import plan_network
from arraytp.model.initialise import make_network
from arraytp.ops.conv import as_matrix
from arraytp.options import Conv, Dense, NetworkOptions, Pool
from arraytp.rules import bp, fa, gait_prop
from arraytp.rules.gait_prop import Options
from arraytp.rules.protocol import State
from arraytp.training.build import build
from arraytp.training.compare import angle_degrees, relative_distance

PSEUDO = Options(inverse="pseudo")
# Overlapping and other pools; matrices with more rows than columns, and with fewer; more samples than rows, and fewer.
LAYERS = {
    "pooled": ([Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
                Conv(channels=5, kernel=3, padding="same", activation="relu", pool=Pool(kernel=2, stride=2)),
                Dense(units=9, activation="tanh"), Dense(units=4)], (9, 8, 2)),
    "widening": ([Conv(channels=2, kernel=3, stride=2, activation="leaky-relu"),
                  Conv(channels=11, kernel=2, activation="elu", pool=Pool(kernel=2, stride=1)),
                  Dense(units=40, activation="elu"), Dense(units=50, activation="linear"), Dense(units=3)], (9, 9, 2)),
}  # fmt: skip


def updates_of(rule, options, network, x, dlogits, engine=None, state=None):
    return copies(rule.RULE.propose(options, state or State(), pass_of(network, x, dlogits, engine)))


def images_of(name, count, dtype):
    """Return Fashion-MNIST images: as they are for lenet, with a border of zeros and in three channels for vgg."""
    loader = Loader(open_dataset("fashion-mnist-10k"), "test", count, seed=0, shuffle=False, dtype=dtype,
                    mean=(0.286,), std=(0.353,))  # fmt: skip
    with closing(loader.batches(0)) as batches:
        images, _ = next(batches)
    if name == "vgg":
        images = np.ascontiguousarray(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, axis=3))
    return images


@pytest.mark.parametrize(("name", "count"), [("lenet", 8), ("vgg", 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_semi_orthogonal_weights_the_papers_pooled_networks_learn_as_by_bp(name, count, dtype):
    """Test on real images. Exact inverses cannot be used at all, as the networks have pools or no auxiliary units."""
    x = images_of(name, count, dtype)
    network = make_network(plan_network(NetworkOptions(name=name), x.shape[1:], 10), "orthogonal", 0, dtype)
    dlogits = rng(8).standard_normal((count, 10)).astype(dtype)
    found, exact = (updates_of(*rule, network, x, dlogits) for rule in ((gait_prop, PSEUDO), (bp, bp.Options())))
    for mine, wanted in zip(found, exact, strict=True):
        if dtype == "float64":
            assert relative_distance(mine[0], wanted[0]) < 1e-10
            assert relative_distance(mine[1], wanted[1]) < 1e-10
        else:
            assert angle_degrees(mine[0], wanted[0]) < 1e-3
            assert relative_distance(mine[0], wanted[0]) < 1e-5


def pseudo_feedback(network, ridge=0.0):
    """Return (W⁺)ᵀ of every block but the first, from NumPy's singular values, as FA's fixed matrices."""
    feedback = State()
    for n, w in enumerate(network.weights[1:], start=1):
        u, sigma, v = np.linalg.svd(as_matrix(w), full_matrices=False)
        feedback.weights[n] = ((u * (sigma / (sigma**2 + ridge))) @ v).reshape(w.shape)
    return feedback


def near(network):
    """Return the network with matrices whose singular values run from 0.95 to 1.05."""
    for n, w in enumerate(network.weights):
        u, sigma, v = np.linalg.svd(as_matrix(w), full_matrices=False)
        network.weights[n] = np.ascontiguousarray((u * np.linspace(0.95, 1.05, len(sigma))) @ v).reshape(w.shape)
    return network


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_near", [True, False])
@pytest.mark.parametrize("count", [1, 6, 60])
@pytest.mark.parametrize("engine", [fast, plain])
def test_it_is_bp_with_the_pseudo_inverse_in_place_of_the_transpose(place, name, is_near, count, engine):
    """The reference is FA with (W⁺)ᵀ as its fixed matrices; W is nearly semi-orthogonal (Cholesky factors), or not."""
    network = random_network(fitting_blocks(*LAYERS[name]))
    network = near(network) if is_near else network
    x, _ = batch(network.blocks, count)
    dlogits = rng(8).standard_normal((count, network.blocks[-1].next_shape[0]))
    wanted = updates_of(fa, fa.Options(), network, x, dlogits, state=pseudo_feedback(network))
    there = placed(network, place.put)
    found = updates_of(gait_prop, PSEUDO, there, place.put(x), place.put(dlogits), engine(place.backend))
    for mine, exact in zip(found, wanted, strict=True):
        close(place.get(mine[0]), exact[0], 1e-11)
        close(place.get(mine[1]), exact[1], 1e-11)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("is_near", [True, False])
@pytest.mark.parametrize("engine", [fast, plain])
def test_ridge_inverses_are_those_of_the_singular_values(place, ridge, is_near, engine):
    network = random_network(fitting_blocks(*LAYERS["widening"]))
    network = near(network) if is_near else network
    x, _ = batch(network.blocks, 5)
    one = pass_of(placed(network, place.put), place.put(x), engine=engine(place.backend))
    inverses, wanted = one.pseudo_inverses(ridge), pseudo_feedback(network, ridge).weights
    assert inverses.keys() == wanted.keys()
    for n, inverse in inverses.items():
        u = rng(n).standard_normal((5, *network.blocks[n].next_shape))
        _, _, found = one.at(n).backward(place.put(u), through=inverse)
        _, _, exact = one.at(n).backward(place.put(u), through=place.put(wanted[n]))
        close(place.get(found), place.get(exact), 1e-11)


@pytest.mark.parametrize("scale", [0.5, "per sample"])
def test_a_scale_goes_through_the_pseudo_inverse(scale):
    network = random_network(fitting_blocks(*LAYERS["widening"]))
    x, _ = batch(network.blocks, 5)
    scale = rng(1).standard_normal(5) if scale == "per sample" else scale
    one = pass_of(network, x)
    for at in one.down():
        u = rng(at.n).standard_normal((5, *at.block.next_shape))
        scaled = u * (scale if isinstance(scale, float) else scale.reshape(-1, *[1] * (u.ndim - 1)))
        if at.n == 0:
            break
        inverse = one.pseudo_inverses()[at.n]
        wanted = [array.copy() for array in at.backward(scaled, through=inverse)]
        for mine, exact in zip(at.backward(u, through=inverse, scale=scale), wanted, strict=True):
            close(mine, exact, 1e-13)


def test_on_square_weights_it_is_the_exact_difference_form():
    layers = [Dense(units=14, activation="leaky-relu"), Dense(units=14, activation="elu"), Dense(units=14)]
    network = random_network(fitting_blocks(layers, (9,)))
    x, _ = batch(network.blocks, 6)
    dlogits = rng(8).standard_normal((6, 14))
    for options in (PSEUDO, replace(PSEUDO, rescale_updates=False)):
        exact = replace(options, inverse="exact")
        mine, wanted = (updates_of(gait_prop, each, network, x, dlogits) for each in (options, exact))
        for a, b in zip(mine, wanted, strict=True):
            close(a[0], b[0], 1e-9)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_the_angle_to_bp_grows_with_the_distance_from_semi_orthogonal_weights(share):
    """For 27 × 16, 144 × 20 and 320 × 10 matrices, measured as for the rule's page: 0, 0.3 and 3 degrees."""
    layers = [Conv(channels=16, kernel=3, padding=1, activation="elu", pool=Pool(kernel=2, stride=2)),
              Conv(channels=20, kernel=3, padding=1, activation="elu", pool=Pool(kernel=2, stride=2)),
              Dense(units=10)]  # fmt: skip
    blocks = fitting_blocks(layers, (16, 16, 3))
    network = make_network(blocks, "orthogonal", 0, "float64")
    for n, w in enumerate(network.weights):
        noise = rng(3, n).standard_normal(w.shape)
        network.weights[n] = w + share * noise * (np.linalg.norm(w) / np.linalg.norm(noise))
    x, _ = batch(blocks, 8)
    dlogits = rng(8).standard_normal((8, 10))
    angles = [
        angle_degrees(mine[0], wanted[0])
        for mine, wanted in zip(
            updates_of(gait_prop, PSEUDO, network, x, dlogits),
            updates_of(bp, bp.Options(), network, x, dlogits),
            strict=True,
        )
    ]
    assert angles[2] < 1e-5
    assert 20 * share <= angles[0] <= 60 * share + 1e-5


def test_the_form_is_the_inverses_own_unless_given():
    assert (Options().form, PSEUDO.form) == ("literal", "difference")
    assert (Options(form="difference").form, Options(form="difference", inverse="pseudo").form) == ("difference",) * 2


REFUSED = [
    ({"rule": {"name": "gait-prop", "inverse": "pseudo", "form": "literal"}},
     "rule.form: literal inverts f, W and every pool.*use form: difference, or inverse: exact"),
    ({"network": {"blocks": [{"type": "dense", "units": 10, "auxiliary": 0}], "square": True}}, None),
    ({"network": {"blocks": [{"type": "dense", "units": 20}, {"type": "dense", "units": 10}], "square": True}},
     r"network block 1 \(dense2\): has 10 auxiliary units.*leave out network.square and .*, or use inverse: exact"),
    ({"rule": {"name": "gait-prop", "form": "difference"}, "network": {"name": "lenet"}}, "max-pooling has no inverse"),
    ({"optimizer": {"name": "sgd", "lr": 0.1, "orthogonality": 1.0}},
     "optimizer.orthogonality: 1, but no weight matrix of this network is square.*orthogonality_on: all-but-first"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(settings, words):
    tree = {
        "name": "refused",
        "data": {"dataset": "fashion-mnist-10k"},
        "network": {"name": "lenet"},
        "rule": {"name": "gait-prop", "inverse": "pseudo"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 4},
    } | settings
    (config,) = parse_config(tree).variants.values()
    if words is None:
        build(config)
        return
    with pytest.raises(UserError, match=words) as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", [fast, plain])
def test_weights_of_too_low_rank_are_an_error_with_the_block_and_the_condition_number(place, engine):
    network = random_network(fitting_blocks(*LAYERS["pooled"]))
    network.weights[1][..., 1] = network.weights[1][..., 0]
    x, _ = batch(network.blocks, 3)
    one = pass_of(placed(network, place.put), place.put(x), engine=engine(place.backend))
    with pytest.raises(IllConditionedError, match=r"block 1 \(conv2\): the Gram matrix of the weights cannot be inv"):
        one.pseudo_inverses()
    assert set(one.pseudo_inverses(1e-6)) == {1, 2, 3}


@pytest.mark.parametrize("is_near", [True, False])
def test_the_number_of_threads_changes_no_bit(is_near):
    network = random_network(fitting_blocks(*LAYERS["widening"]))
    network = near(network) if is_near else network
    x, _ = batch(network.blocks, 7)
    dlogits = rng(8).standard_normal((7, 3))
    one, three = (updates_of(gait_prop, PSEUDO, network, x, dlogits, fast(threads=threads)) for threads in (1, 3))
    assert all(
        a.tobytes() == b.tobytes() for pairs in zip(one, three, strict=True) for a, b in zip(*pairs, strict=True)
    )
