"""Ridge TP: targets against the least-squares problem that they solve, in their limits, and against BP's updates."""

from dataclasses import replace

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network, rng
from training import copies, fast, pass_of, plain

from arraytp.config import parse_config
from arraytp.errors import UserError
from arraytp.model.architectures import plan_network
from arraytp.model.initialise import make_network
from arraytp.model.plain import block_forward
from arraytp.ops.conv import as_matrix
from arraytp.ops.patches import im2col
from arraytp.options import Conv, Dense, NetworkOptions, Pool
from arraytp.rules import bp
from arraytp.rules.protocol import State
from arraytp.rules.ridge_tp import RULE, Options, change_of_z
from arraytp.training.build import build
from arraytp.training.compare import angle_degrees

LAYERS = [
    Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=5, kernel=2, stride=2, activation="leaky-relu"),
    Dense(units=30, activation="tanh"),
    Dense(units=4),
]


def deltas_of(options, one):
    return [target.delta.copy() for target in RULE.targets(options, State(), one)][::-1]


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("engine", [fast, plain])
def test_what_is_handed_down_solves_the_ridge_problem(place, ridge, count, engine):
    """The gradient of ‖p W − d‖² + r ‖p‖² is 0 at p, in dense blocks and where patches do not overlap.

    Tolerance: d is a difference of values of f⁻¹, of about 1e-4 of their size.
    """
    network, options = random_network(fitting_blocks(LAYERS, (9, 8, 2))), Options(ridge=ridge, beta=1e-4, clip=1e-9)
    x, _ = batch(network.blocks, count)
    dlogits = rng(8).standard_normal((count, 4)) / count
    one = pass_of(placed(network, place.put), place.put(x), place.put(dlogits), engine(place.backend))
    deltas = [place.get(delta) for delta in deltas_of(options, one)]
    for n in (1, 2, 3):
        block, s, w = network.blocks[n], place.get(one.forward.s[n + 1]), as_matrix(network.weights[n])
        f = {"leaky-relu": lambda s: np.where(s < 0, s / 0.1, s), "tanh": np.arctanh, "linear": lambda s: s}
        inverse = f[block.activation.name]
        d = inverse(s + deltas[n].reshape(s.shape)) - inverse(s)
        p = deltas[n - 1].reshape(place.get(one.forward.s[n]).shape)
        p = p.reshape(count, -1) if block.window is None else im2col(p, block.window)
        d = d.reshape(*p.shape[:-1], -1)
        gradient = (p @ w - d) @ w.T + ridge * p
        assert np.abs(gradient).max() <= 1e-8 * np.abs(d @ w.T).max()


def test_overlapping_patches_and_windows_add_up():
    """Compare the target below the second block with loops that add up what its pool windows and patches ask for."""
    layers = [Conv(channels=3, kernel=2, activation="elu"), LAYERS[0], Dense(units=3)]
    network, options = random_network(fitting_blocks(layers, (6, 5, 2))), Options(ridge=0.2, beta=0.01)
    x, _ = batch(network.blocks, 2)
    one = pass_of(network, x, rng(8).standard_normal((2, 3)) / 2)
    deltas, at = deltas_of(options, one), one.at(1)
    s, w, window, pool = at.s_next, as_matrix(at.weight), at.block.window, at.block.pool
    z, _, index = block_forward(at.block, at.weight, at.bias, at.s)
    change = deltas[1].reshape(s.shape)
    d = np.where(s < 0, np.log1p(np.minimum(s + change, 0)) - np.log1p(np.minimum(s, 0)), change)
    unpooled = np.zeros_like(z)
    for b, p, q, c in np.ndindex(s.shape):
        i, j = divmod(int(index[b, p, q, c]), pool.kernel)
        unpooled[b, pool.stride * p + i - pool.top, pool.stride * q + j - pool.left, c] += d[b, p, q, c]
    found = np.zeros((2, at.block.in_shape[0] + 2, at.block.in_shape[1] + 2, 3))
    inverse = np.linalg.inv(w.T @ w + 0.2 * np.eye(w.shape[1])) @ w.T
    for b, p, q in np.ndindex(z.shape[:3]):
        found[b, p : p + window.kernel, q : q + window.kernel] += (unpooled[b, p, q] @ inverse).reshape(3, 3, 3)
    close(deltas[0], found[:, 1:-1, 1:-1], 1e-10)


def bp_updates(network, x, dlogits):
    return copies(bp.RULE.propose(bp.Options(), State(), pass_of(network, x, dlogits)))


def test_with_semi_orthogonal_weights_and_linear_blocks_it_is_bp_shrunk_by_the_ridge():
    """For such W the ridge inverse is Wᵀ / (1 + r), once per block on the way down; updates are divided by β."""
    layers = [replace(layer, activation="linear") for layer in LAYERS]
    network = make_network(fitting_blocks(layers, (9, 8, 2)), "orthogonal", 0, "float64")
    x, _ = batch(network.blocks, 6)
    dlogits = rng(8).standard_normal((6, 4)) / 6
    found = copies(RULE.propose(Options(ridge=0.25, divide_by_beta=True), State(), pass_of(network, x, dlogits)))
    for n, (mine, wanted) in enumerate(zip(found, bp_updates(network, x, dlogits), strict=True)):
        for a, b in zip(mine, wanted, strict=True):
            close(a * 1.25 ** (3 - n), b, 1e-12)


def test_a_large_ridge_makes_linear_blocks_bp_in_direction():
    """For r → ∞, r times the ridge inverse tends to Wᵀ, whatever W is."""
    layers = [replace(layer, activation="linear") for layer in LAYERS]
    network = random_network(fitting_blocks(layers, (9, 8, 2)))
    x, _ = batch(network.blocks, 6)
    dlogits = rng(8).standard_normal((6, 4)) / 6
    for ridge, largest in ((1e6, 1e-3), (1e2, 2.0)):
        found = copies(RULE.propose(Options(ridge=ridge), State(), pass_of(network, x, dlogits)))
        angles = [angle_degrees(a[0], b[0]) for a, b in zip(found, bp_updates(network, x, dlogits), strict=True)]
        assert max(angles) < largest
    far = copies(RULE.propose(Options(ridge=1e-6), State(), pass_of(network, x, dlogits)))
    assert angle_degrees(far[0][0], bp_updates(network, x, dlogits)[0][0]) > 10


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_linearisation_is_the_limit_of_small_steps(dtype):
    """This holds in float32 too, because differences of f⁻¹ are computed without cancellation."""
    network = random_network(fitting_blocks(LAYERS, (9, 8, 2)), dtype=dtype)
    x, _ = batch(network.blocks, 6, dtype=dtype)
    dlogits = (rng(8).standard_normal((6, 4)) / 6).astype(dtype)
    linearised, exact = (
        deltas_of(Options(activation=name, beta=1e-7, clip=1e-6), pass_of(network, x, dlogits))
        for name in ("linearised", "inverse")
    )
    for a, b in zip(exact, linearised, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("activation", ["inverse", "linearised"])
@pytest.mark.parametrize(("name", "bias"), [("tanh", 30.0), ("tanh", -30.0), ("elu", -60.0)])
def test_a_saturated_unit_is_clipped(place, activation, name, bias):
    layers = [Dense(units=7, activation="elu"), Dense(units=6, activation=name), Dense(units=3)]
    network = random_network(fitting_blocks(layers, (5,)))
    network.biases[1][2] = bias
    x, _ = batch(network.blocks, 4)
    there = placed(network, place.put)
    for beta in (1e-3, 50.0):
        one = pass_of(there, place.put(x), place.put(rng(8).standard_normal((4, 3)) / 4), fast(place.backend))
        assert all(np.isfinite(place.get(d)).all() for d in deltas_of(Options(activation=activation, beta=beta), one))


@pytest.mark.parametrize("clip", [1e-3, 1e-9])
@pytest.mark.parametrize("how", ["inverse", "linearised"])
@pytest.mark.parametrize("name", ["tanh", "elu"])
def test_in_float32_limits_are_not_rounded(place, name, how, clip):
    """Compare d of saturated units with float64, for the same s and δ: near a limit f⁻¹ has a slope of about 1/clip."""
    layers = [Dense(units=7, activation="elu"), Dense(units=6, activation=name), Dense(units=3)]
    network = random_network(fitting_blocks(layers, (5,)), dtype="float32")
    network.biases[1][...] = [-60, -6, 0, 3, 6, 60]
    x, _ = batch(network.blocks, 4, dtype="float32")
    at = pass_of(placed(network, place.put), place.put(x), engine=fast(place.backend)).at(1)
    delta = (0.3 * rng(8).standard_normal((4, 6))).astype("float32")
    d = place.get(change_of_z(Options(activation=how, clip=clip), at, place.put(delta)))
    low, high = at.block.activation.range
    s, t = (
        np.clip(v, low + clip, high - clip)
        for v in (place.get(at.s_next).astype(float), place.get(at.s_next) + delta.astype(float))
    )
    inverse = {"tanh": np.arctanh, "elu": lambda s: np.where(s < 0, np.log1p(np.minimum(s, 0)), s)}[name]
    derivative = 1 - s**2 if name == "tanh" else np.minimum(s, 0) + 1
    assert (t == low + clip).any()
    assert (s == low + clip).any()
    np.testing.assert_allclose(d, inverse(t) - inverse(s) if how == "inverse" else delta / derivative, rtol=2e-6)


REFUSED = [
    ({"loss": {"reduction": "sum"}}, "loss.reduction: sum: rule ridge-tp is defined for the mean loss"),
    ({"network": {"name": "lenet", "activation": "relu"}},
     r"network block 1 \(conv2\): rule ridge-tp inverts the activation.*relu has no inverse; use leaky-relu"),
    ({"network": {"blocks": [{"type": "dense", "units": 20}, {"type": "dense", "units": 10}], "square": True}},
     r"network block 1 \(dense2\): has 10 auxiliary units, which rule ridge-tp does not support"),
    ({"rule": {"name": "ridge-tp", "ridge": 0.0}}, "rule.ridge must be a number above 0, got 0.0"),
    ({"rule": {"name": "ridge-tp", "clip": 1.0}}, "rule.clip must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(settings, words):
    tree = {
        "name": "refused",
        "data": {"dataset": "fashion-mnist-10k"},
        "network": {"name": "lenet"},
        "rule": {"name": "ridge-tp"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 4},
    } | settings
    with pytest.raises(UserError, match=words) as error:
        build(*parse_config(tree).variants.values())
    assert "\n" not in str(error.value)


def test_lenet_takes_it():
    blocks = plan_network(NetworkOptions(name="lenet"), (28, 28, 1), 10)
    assert RULE.check(Options(), blocks, "float32", "mean") == []
