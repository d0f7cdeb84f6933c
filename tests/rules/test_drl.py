"""DRL on a small network against formulas written out: its feedback loss, Adam's steps, its targets and updates."""

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network, rng
from training import fast, pass_of, trainer

from arraytp.backend import NUMPY
from arraytp.errors import UserError
from arraytp.ops.noise import gaussian
from arraytp.options import SGD, Adam, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import drl
from arraytp.rules.feedback import train

BLOCKS = fitting_blocks(
    [Conv(channels=3, kernel=3, activation="tanh", pool=Pool(kernel=2, stride=2)), Dense(units=5, activation="tanh"),
     Dense(units=4)], (6, 6, 2))  # fmt: skip
ROUNDING = 1e-12


def logits_from(network, n, s):
    """Return the logits computed from s^n, by the dense blocks written out."""
    for weight, bias, block in list(zip(network.weights, network.biases, network.blocks, strict=True))[n:]:
        s = s.reshape(len(s), -1) @ weight + bias
        s = np.tanh(s) if block.activation.name == "tanh" else s
    return s


def test_updates_equal_those_worked_out_by_hand(place):
    """t = s + Q(t^N) − Q(s^N); dense: (1/B) Σ 2D(s − t) outer input; conv: also averaged over units."""
    network, (x, labels) = random_network(BLOCKS), batch(BLOCKS, 6)
    runner = trainer(placed(network, place.put), "drl", SGD(lr=1), place.backend, 2, eta=0.3)
    _, found = runner.propose(place.put(x), place.put(labels))
    q1, q2 = (place.get(runner.state.weights[n]) for n in (1, 2))
    assert (q1.shape, q2.shape) == ((4, 2 * 2 * 3), (4, 5))
    _, s1, s2, logits = pass_of(network, x).forward.s
    p = np.exp(logits)
    down = -0.3 * (p / p.sum(axis=1, keepdims=True) - np.eye(4)[labels]) / 6
    local = -2 / 6 * (1 - s2**2) * (down @ q2)
    close(place.get(found[2][0]), s2.T @ (-2 / 6 * down), ROUNDING)
    close(place.get(found[2][1]), (-2 / 6 * down).sum(axis=0), ROUNDING)
    close(place.get(found[1][0]), s1.reshape(6, -1).T @ local, ROUNDING)
    close(place.get(found[1][1]), local.sum(axis=0), ROUNDING)
    t = s1 + (down @ q1).reshape(s1.shape)

    def local_loss(weight, bias):
        z = sum(x[:, i : i + 4, j : j + 4] @ weight[i, j] for i in range(3) for j in range(3)) + bias
        s = np.tanh(z).reshape(6, 2, 2, 2, 2, 3).max(axis=(2, 4))
        return np.square(s - t).mean()

    for which, shape in ((0, network.weights[0].shape), (1, network.biases[0].shape)):
        v, h = rng(which).standard_normal(shape), 1e-6
        ends = [
            local_loss(*(array + (sign * h * v if i == which else 0)
                         for i, array in enumerate((network.weights[0], network.biases[0]))))
            for sign in (1, -1)
        ]  # fmt: skip
        assert np.vdot(place.get(found[0][which]), v) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_feedback_equals_the_one_worked_out_by_hand(place):
    """Algorithm 2 with weight decay and Adam, rates per block; two batches, each two iterations on Q¹ and one on Q²."""
    optimizer = Adam(lr=(0.01, 0.03), beta1=0.8, epsilon=(1e-3, 1e-5), weight_decay=0.1)
    sigma, iterations = (0.2, 0.1), (2, 1)
    options = drl.Options(feedback=FeedbackTraining(iterations=iterations, sigma=sigma, optimizer=optimizer))
    network, (x, _) = random_network(BLOCKS), batch(BLOCKS, 6)
    on_place, engine = placed(network, place.put), fast(place.backend)
    forward = pass_of(network, x).forward
    state = drl.init_state(options, on_place, 3, place.backend)
    before = {n: place.get(q).copy() for n, q in state.weights.items()}
    for number in range(2):
        one = pass_of(on_place, place.put(x), engine=engine, seed=3, number=number)
        losses = train(drl.RULE.feedback, options, state, one, engine)
    for n in (1, 2):
        q, s, i = before[n], forward.s[n], n - 1
        m, u = np.zeros_like(q), np.zeros_like(q)
        for t in range(2 * iterations[i]):
            number, k = divmod(t, iterations[i])
            # The key of s^n's noise contains n − 1, the number of the block whose output is s^n.
            epsilon = place.get(gaussian(place.backend.xp.empty(s.shape), sigma[i], 0, 3, number, n - 1, k, 0))
            change = logits_from(network, n, s + epsilon) - forward.logits
            residual = change @ q - epsilon.reshape(6, -1)
            loss = np.square(residual).mean() / sigma[i] ** 2
            g = 2 * change.T @ residual / residual.size / sigma[i] ** 2 + 0.1 * q
            m, u = 0.8 * m + 0.2 * g, 0.999 * u + 0.001 * g * g
            root = np.sqrt(u / (1 - 0.999 ** (t + 1))) + optimizer.epsilon[i]
            q = q - optimizer.lr[i] * m / (1 - 0.8 ** (t + 1)) / root
        close(place.get(state.weights[n]), q, 1e-10)
        assert float(losses[i]) == pytest.approx(loss, rel=1e-11)


def test_only_the_last_feedback_pairs_with_a_weight():
    network = random_network(BLOCKS)
    state = drl.init_state(drl.Options(), network, 0, NUMPY)
    (first, q1, none), (last, q2, theta) = drl.pairs(state, network)
    assert (first, last, none) == (1, 2, None)
    assert q1 is state.weights[1]
    np.testing.assert_array_equal(theta, network.weights[2].T)
    assert theta.shape == q2.shape


def test_noise_below_the_rounding_of_single_precision_is_worth_a_note():
    options = drl.Options(feedback=FeedbackTraining(sigma=(0.01, 1e-5)))
    (note,) = drl.check(options, BLOCKS, "float32", "mean")
    assert "feedback.sigma 1e-05" in note
    assert "float64" in note
    assert drl.check(options, BLOCKS, "float64", "mean") == []
    assert drl.check(drl.Options(), BLOCKS, "float32", "mean") == []


@pytest.mark.parametrize(
    "options", [{"loss": "reconstruction"}, {"hidden": 6}, {"loss": "reconstruction", "hidden": 6}]
)
def test_control_and_a_random_hidden_layer_equal_those_worked_out_by_hand(place, options):
    """Gradients against central differences of the loss written out; targets from φ of the output and of its target."""
    network, (x, _), sigma = random_network(BLOCKS), batch(BLOCKS, 6), 0.1
    there = placed(network, place.put)
    settings = drl.Options(eta=0.7, **options)
    state = drl.init_state(settings, there, 3, place.backend)
    held = {n: place.get(weight).copy() for n, weight in state.weights.items()}
    width = options.get("hidden", 4)
    assert {n: q.shape for n, q in held.items() if n} == {1: (width, 12), 2: (width, 5)}
    assert (0 in held) == ("hidden" in options)
    assert [n for n, *_ in drl.pairs(state, there)] == [1, 2]
    _, s1, s2, logits = pass_of(network, x).forward.s
    dlogits = rng(5).standard_normal((6, 4)) / 6

    def phi(y):
        return np.tanh(y @ held[0]) if 0 in held else y

    one = pass_of(there, place.put(x), place.put(dlogits), fast(place.backend))
    for n, s in ((1, s1), (2, s2)):
        epsilon = sigma * rng(6, n).standard_normal(s.shape)
        gradient, value = drl.iterate(settings, state, one.at(n), place.put(epsilon), sigma)
        y_epsilon = logits_from(network, n, s + epsilon)

        def loss(q, s=s, epsilon=epsilon, y_epsilon=y_epsilon):
            if "loss" in options:
                return np.mean((phi(y_epsilon) @ q - (s + epsilon).reshape(6, -1)) ** 2)
            reconstruction = phi(y_epsilon) @ q + s.reshape(6, -1) - phi(logits) @ q
            return np.mean((reconstruction - (s + epsilon).reshape(6, -1)) ** 2) / sigma**2

        assert float(value) == pytest.approx(loss(held[n]), rel=1e-10)
        v, h = rng(n).standard_normal(held[n].shape), 1e-5
        slope = (loss(held[n] + h * v) - loss(held[n] - h * v)) / (2 * h)
        assert np.vdot(place.get(gradient), v) == pytest.approx(slope, rel=1e-7)
    deltas = [place.get(target.delta).copy() for target in drl.targets(settings, state, one)]
    close(deltas[0], -0.7 * dlogits, ROUNDING)
    change = phi(logits - 0.7 * dlogits) - phi(logits)
    close(deltas[1], change @ held[2], 1e-10)
    close(deltas[2], change @ held[1], 1e-10)


@pytest.mark.parametrize(("key", "value"), [("loss", "reconstruction"), ("hidden", 5)])
def test_their_closed_form_is_refused(key, value):
    options = drl.Options(expected=True, **{key: value})
    with pytest.raises(UserError, match=f"rule.expected: .*not of rule.{key}: {value}; use expected: false"):
        drl.check(options, BLOCKS, "float64", "mean")
