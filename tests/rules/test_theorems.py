"""Theorems 4.2 and 4.3 of the DTP paper, and how far they hold for ELU and ReLU."""

from dataclasses import replace

import numpy as np
import pytest
from feedback_blocks import LAYERS, at_block, iteration, made, output
from samples import batch, close, fitting_blocks, named_blocks, placed, random_network
from training import fast, pass_of, trainer

from arraytp.backend import NUMPY
from arraytp.model.feedback import jacobian_overlap, transposed, unpooled
from arraytp.ops.activations import ACTIVATIONS
from arraytp.options import SGD, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import dtp, ldrl
from arraytp.rules.feedback import train
from arraytp.rules.protocol import Target
from arraytp.training.compare import angle_degrees

UNPOOL = ("overwrite", "accumulate")


def expected_gradient(theta, omega, overlap, count):
    """Return lim E[∂L/∂ω] / σ² for small noise, 2/B (ω M − θ N): twice Theorem 4.2's gradient (Eq. 17)."""
    n, m = overlap
    return 2 / count * (omega * m - theta * n)


def slope_of(numbers, errors):
    """Return the exponent of a power law."""
    return np.polyfit(np.log(numbers), np.log(errors), 1)[0]


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_gradient_goes_to_the_closed_form_as_one_over_the_root_of_the_samples(name, unpool):
    """Theorem 4.2. A batch of n copies of one image gives n samples of the noise; σ is small enough for the limit."""
    sigma, counts = 1e-5, [32, 128, 512, 2048]
    block, theta, omega, s = made(name, "tanh", 1)
    out, index = output(block, theta, s)
    limit = expected_gradient(theta[0], omega[0], jacobian_overlap(block, out, index, unpool), 1)
    errors = []
    for count in counts:
        at = at_block(block, theta, np.repeat(s, count, axis=0), seed=count)
        gradient = iteration("ldrl", at, omega, sigma, unpool=unpool).gradients["weight"]
        errors.append(np.linalg.norm(gradient / sigma**2 - limit))
    assert slope_of(counts, errors) == pytest.approx(-0.5, abs=0.12)
    assert errors[-1] < 0.3 * np.linalg.norm(limit)


@pytest.mark.parametrize("name", LAYERS)
def test_with_relu_the_mean_gradient_goes_elsewhere(name):
    """A silent unit has s = 0, where G has its kink: there the mean over η is that of max(η, 0), however small σ is."""
    sigma, count = 1e-5, 2048
    block, theta, _, s = made(name, "relu", 1)
    out, _ = output(block, theta, s)
    at = at_block(block, theta, np.repeat(s, count, axis=0), seed=1)
    # At ω = θ the closed form's gradient is 0.
    gradient = iteration("ldrl", at, theta, sigma).gradients["weight"] / sigma**2
    assert (out == 0).any()
    assert np.linalg.norm(gradient) > 0.1 * np.linalg.norm(theta[0])


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("name", LAYERS)
def test_the_closed_form_of_a_batch_is_the_mean_of_its_samples(name, unpool):
    block, theta, omega, s = made(name, "elu", 4)

    def limit(s):
        out, index = output(block, theta, s)
        return expected_gradient(theta[0], omega[0], jacobian_overlap(block, out, index, unpool), len(s))

    close(limit(s), sum(limit(s[b : b + 1]) for b in range(4)) / 4, 1e-12)


SMALL = [
    Conv(channels=3, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Dense(units=5, activation="tanh"),
    Dense(units=3),
]


@pytest.mark.parametrize("unpool", UNPOOL)
def test_descending_the_closed_form_on_one_batch_ends_at_its_minimiser(place, unpool):
    """The minimiser is ω = θ N/M for every block; where M is 0, the loss does not depend on ω, which stays."""
    blocks = fitting_blocks(SMALL, (7, 6, 2))
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    engine, on_place = fast(place.backend), placed(network, place.put)
    host = pass_of(network, x)
    overlaps = [jacobian_overlap(at.block, at.output, at.index, unpool) for at in map(host.at, range(1, len(blocks)))]
    rates = tuple(0.45 * 4 / (0.25 * float(m.max())) for _, m in overlaps)
    training = FeedbackTraining(iterations=400, sigma=0.5, optimizer=SGD(lr=rates, momentum=0.8))
    options = ldrl.Options(expected=True, unpool=unpool, feedback=training)
    state = ldrl.RULE.init_state(options, on_place, 0, place.backend)
    before = state.copy()
    losses = train(ldrl.RULE.feedback, options, state, pass_of(on_place, place.put(x), engine=engine), engine)
    for n, (found_n, found_m) in enumerate(overlaps, start=1):
        omega, theta = place.get(state.weights[n]), network.weights[n]
        known = np.broadcast_to(found_m > 0.05 * found_m.max(), omega.shape)
        minimiser = theta * found_n / np.where(found_m > 0, found_m, 1)
        assert known.mean() > 0.5
        np.testing.assert_allclose(omega[known], minimiser[known], rtol=1e-6, atol=1e-9)
        dead = np.broadcast_to(found_m == 0, omega.shape)
        np.testing.assert_array_equal(omega[dead], place.get(before.weights[n])[dead])
        np.testing.assert_array_equal(place.get(state.biases[n]), place.get(before.biases[n]))
        wanted = 0.25 / 4 * (omega * (omega * found_m - 2 * theta * found_n)).sum()
        assert float(losses[n - 1]) == pytest.approx(wanted, rel=1e-6)


def relaxed(name, activation, dtype="float64"):
    """Return a network with one activation throughout (the output stays linear), inputs and labels."""
    blocks = named_blocks(name)
    blocks = tuple(replace(block, activation=ACTIVATIONS[activation]) for block in blocks[:-1]) + blocks[-1:]
    return random_network(blocks, dtype=dtype), *batch(blocks, 5, dtype=dtype)


def over_beta(network, x, labels, beta, unpool="accumulate"):
    options = {"beta": beta, "divide_by_beta": True, "unpool": unpool, "feedback_init": "symmetric"}
    return trainer(network, "dtp", SGD(lr=1), NUMPY, 2, **options).propose(x, labels)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 1e-4)])
@pytest.mark.parametrize("beta", [1e-4, 1e-8])
@pytest.mark.parametrize(
    ("name", "unpool"),
    [
        ("lenet", "accumulate"),
        ("vgg", "overwrite"),
        ("fc-deep", "overwrite"),
        ("conv-imagenet", "overwrite"),
    ],
)
def test_symmetric_feedback_gives_bps_updates(name, unpool, beta, dtype, tolerance):
    """Theorem 4.3: with leaky ReLU f' is the same at s as at z, so δ/β is BP's error up to rounding."""
    network, x, labels = relaxed(name, "leaky-relu", dtype)
    exact = trainer(network, "bp", SGD(lr=1), NUMPY, 2).propose(x, labels)[1]
    for mine, wanted in zip(over_beta(network, x, labels, beta, unpool), exact, strict=True):
        close(mine[0], wanted[0], tolerance)
        close(mine[1], wanted[1], tolerance)


def limit_updates(network, x, labels, unpool):
    """Return updates/β in the limit β → 0: local updates with δ/β propagated by the Jacobians of the modules."""
    one = pass_of(network, x)
    p = np.exp(one.logits - one.logits.max(axis=1, keepdims=True))
    delta = np.eye(p.shape[1])[labels] - p / p.sum(axis=1, keepdims=True)
    result = []
    for at in one.down():
        block, s = at.block, at.output
        result.append(dtp.local_update(dtp.Options(), at, Target(delta.reshape(s.shape))))
        if at.n > 0:
            u = block.activation(unpooled(block, s, at.index, unpool))
            a = unpooled(block, delta.reshape(s.shape), at.index, unpool)
            delta = transposed(block, at.weight, block.activation.backward(a, u))
    return result[::-1]


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_updates_over_beta_go_to_their_own_limit_linearly(activation, unpool):
    network, x, labels = relaxed("lenet", activation)
    limit, betas = limit_updates(network, x, labels, unpool), [1e-1, 1e-2, 1e-3, 1e-4]
    errors = np.array([
        [np.linalg.norm(mine[0] - wanted[0])
         for mine, wanted in zip(over_beta(network, x, labels, beta, unpool)[:-2], limit[:-2], strict=True)]
        for beta in betas
    ])  # fmt: skip
    assert np.all(errors > 0)
    for block in errors.T:
        assert slope_of(betas, block) == pytest.approx(1, abs=0.05)


def test_elu_leaves_a_residual_angle_and_overwriting_a_larger_one():
    """With symmetric ω an angle to BP remains for any β, as f' at s = f(z) is not f' at z; upper layers have less."""
    network, x, labels = relaxed("lenet", "elu")
    exact = trainer(network, "bp", SGD(lr=1), NUMPY, 2).propose(x, labels)[1]
    angles = {
        unpool: [angle_degrees(mine[0], wanted[0])
                 for mine, wanted in zip(limit_updates(network, x, labels, unpool), exact, strict=True)]
        for unpool in UNPOOL
    }  # fmt: skip
    small = [angle_degrees(mine[0], wanted[0])
             for mine, wanted in zip(over_beta(network, x, labels, 1e-7), exact, strict=True)]  # fmt: skip
    np.testing.assert_allclose(small, angles["accumulate"], atol=1e-4)
    assert 1 < angles["accumulate"][0] < 15
    assert angles["overwrite"][0] > 1.5 * angles["accumulate"][0]
    # A linear output block has no f': the block below it learns as in BP.
    assert angles["accumulate"][-2:] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("beta", [1e-7, 0.1])
def test_relu_breaks_the_rule_although_feedback_is_symmetric(beta, unpool):
    """At a silent unit, G passes a target above 0 but not one below. Targets of the dense blocks pass no ReLU in G."""
    network, x, labels = relaxed("lenet", "relu")
    exact = trainer(network, "bp", SGD(lr=1), NUMPY, 2).propose(x, labels)[1]
    angles = [angle_degrees(mine[0], wanted[0])
              for mine, wanted in zip(over_beta(network, x, labels, beta, unpool), exact, strict=True)]  # fmt: skip
    assert min(angles[:2]) > 30
    assert max(angles[2:]) < 1e-3
