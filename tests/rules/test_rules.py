"""BP, FA and DFA against loops written from docs/math/feedback-alignment.md, against each other, and by hand."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import NAMED, batch, chains, close, fitting_blocks, named_blocks, placed, random_network, rng
from training import trainer

from arraytp.backend import NUMPY
from arraytp.model.initialise import make_network
from arraytp.options import SGD, Conv, Dense, FeedbackTraining
from arraytp.rules import RULES as EVERY

ROUNDING = 1e-12
# Rules that take every network; GAIT-prop needs square weights, see test_gait_prop.py.
RULES = ("bp", "fa", "dfa")


def on(place, network, rule, threads=2, seed=0, **options):
    return trainer(placed(network, place.put), rule, SGD(lr=0.1), place.backend, threads, seed, **options)


def cheap(rule):
    """Return options that spare large networks the QR factorisation."""
    return {} if rule == "bp" else {"feedback_init": "kaiming-uniform"}


def loops(rule, runner, network, x, labels, reduction, get):
    """Return the updates computed by naive loops with the rule's own feedback weights."""
    feedback = {n: get(array) for n, array in runner.state.weights.items()}
    _, s, _ = naive.forward(network.blocks, network.weights, network.biases, x)
    dlogits = naive.cross_entropy_gradient(s[-1], labels, reduction)
    return naive.updates(rule, network.blocks, network.weights, network.biases, feedback, x, dlogits)


@pytest.mark.parametrize("rule", RULES)
@given(
    blocks=chains(largest=5),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    reduction=st.sampled_from(["mean", "sum"]),
)
@settings(max_examples=12)
def test_updates_equal_the_loops(place, rule, blocks, count, seed, reduction):
    network, (x, labels) = random_network(blocks, seed), batch(blocks, count, seed)
    runner = on(place, network, rule, seed=seed)
    loss, found = runner.propose(place.put(x), place.put(labels), reduction)
    wanted = loops(rule, runner, network, x, labels, reduction, place.get)
    for mine, (dweight, dbias) in zip(found, wanted, strict=True):
        close(place.get(mine[0]), dweight, ROUNDING)
        close(place.get(mine[1]), dbias, ROUNDING)
    logits = naive.forward(blocks, network.weights, network.biases, x)[1][-1]
    assert float(loss) == pytest.approx(naive.cross_entropy(logits, labels, reduction), rel=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_feedback_alignment_with_the_forward_weights_is_bp_bit_for_bit(place, name):
    blocks = named_blocks(name)
    network, (x, labels) = random_network(blocks), batch(blocks, 3)
    fa, bp = on(place, network, "fa", feedback_init="kaiming-uniform"), on(place, network, "bp")
    for n, weight in enumerate(network.weights[1:], start=1):
        fa.state.weights[n] = place.put(weight)
    x, labels = place.put(x), place.put(labels)
    for mine, exact in zip(fa.propose(x, labels)[1], bp.propose(x, labels)[1], strict=True):
        np.testing.assert_array_equal(place.get(mine[0]), place.get(exact[0]))
        np.testing.assert_array_equal(place.get(mine[1]), place.get(exact[1]))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_only_the_output_block_learns_as_in_bp(rule, name):
    blocks = named_blocks(name)
    network, (x, labels) = random_network(blocks), batch(blocks, 3)
    runner = trainer(network, rule, SGD(lr=0.1), NUMPY, feedback_init="kaiming-uniform")
    bp = trainer(network, "bp", SGD(lr=0.1), NUMPY)
    _, found = runner.propose(x, labels)
    _, exact = bp.propose(x, labels)
    np.testing.assert_array_equal(found[-1][0], exact[-1][0])
    np.testing.assert_array_equal(found[-1][1], exact[-1][1])
    for mine, reference in zip(found[:-1], exact[:-1], strict=True):
        assert not np.allclose(mine[0], reference[0], rtol=0.1, atol=0)


def test_direct_feedback_alignment_of_two_tanh_layers_by_hand(place):
    """e = softmax − onehot; dW⁰ = xᵀ(e B ⊙ (1 − h²)), dW¹ = hᵀ e."""
    blocks = fitting_blocks([Dense(units=5, activation="tanh"), Dense(units=3)], (4,))
    network, (x, labels) = random_network(blocks), batch(blocks, 6)
    runner = on(place, network, "dfa")
    (w0, w1), (b0, b1) = network.weights, network.biases
    h = np.tanh(x @ w0 + b0)
    p = np.exp(h @ w1 + b1)
    e = (p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels]) / 6
    delta = e @ place.get(runner.state.weights[1]) * (1 - h**2)
    _, found = runner.propose(place.put(x), place.put(labels))
    for mine, wanted in zip(
        (a for pair in found for a in pair), (x.T @ delta, delta.sum(0), h.T @ e, e.sum(0)), strict=True
    ):
        close(place.get(mine), wanted, ROUNDING)


def test_feedback_alignment_of_two_tanh_layers_by_hand(place):
    """BP with B¹ in place of W¹ on the way down: dW⁰ = xᵀ(e (B¹)ᵀ ⊙ (1 − h²))."""
    blocks = fitting_blocks([Dense(units=5, activation="tanh"), Dense(units=3)], (4,))
    network, (x, labels) = random_network(blocks), batch(blocks, 6)
    runner = on(place, network, "fa")
    (w0, w1), (b0, b1) = network.weights, network.biases
    h = np.tanh(x @ w0 + b0)
    p = np.exp(h @ w1 + b1)
    e = p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    delta = e @ place.get(runner.state.weights[1]).T * (1 - h**2)
    _, found = runner.propose(place.put(x), place.put(labels), "sum")
    close(place.get(found[0][0]), x.T @ delta, ROUNDING)
    close(place.get(found[0][1]), delta.sum(0), ROUNDING)


def state_of(network, rule):
    return trainer(network, rule, SGD(lr=1), NUMPY, **cheap(rule)).state


@pytest.mark.parametrize("name", NAMED)
def test_the_state_holds_one_matrix_per_hidden_activation(name):
    """B^n reaches s^n, n = 1 … N−1, as in the papers: FA's has the shape of W^n, DFA's (classes, size of s^n)."""
    blocks = named_blocks(name)
    network, hidden = random_network(blocks), range(1, len(blocks))
    shapes = {rule: {k: v.shape for k, v in state_of(network, rule).named().items()} for rule in RULES}
    assert shapes["bp"] == {}
    assert shapes["fa"] == {f"feedback/{n}/weight": blocks[n].weight_shape for n in hidden}
    classes = blocks[-1].out_shape[0]
    assert shapes["dfa"] == {f"feedback/{n}/weight": (classes, np.prod(blocks[n - 1].out_shape)) for n in hidden}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("init", ["orthogonal", "xavier-normal", "kaiming-uniform"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_feedback_is_the_seeds_on_every_place(computer, rule, init, dtype):
    blocks = fitting_blocks([Conv(channels=3, kernel=3), Dense(units=9), Dense(units=4)], (6, 5, 2))
    network, host = (make_network(blocks, init, 3, dtype, backend) for backend in (computer.backend, NUMPY))
    placed_state = trainer(network, rule, SGD(lr=1), computer.backend, seed=3, feedback_init=init).state.weights
    host_state = trainer(host, rule, SGD(lr=1), NUMPY, seed=3, feedback_init=init).state.weights
    other = trainer(host, rule, SGD(lr=1), NUMPY, seed=4, feedback_init=init).state.weights
    for n, array in host_state.items():
        assert placed_state[n].dtype == dtype
        np.testing.assert_array_equal(computer.get(placed_state[n]), array)
        assert not np.array_equal(other[n], array)


@pytest.mark.parametrize(
    "rule",
    ["fa", "dfa", "kolen-pollack", "weight-mirror", "alignment", "tp", "dtp", "ldrl", "ldrl-parallel", "drl"],
)
@pytest.mark.parametrize("init", ["orthogonal", "xavier-normal", "kaiming-uniform"])
def test_no_feedback_matrix_is_a_forward_weight_or_another_feedback_matrix(rule, init):
    """Published code seeds B of layer k like W of layer k + 1, so that equal shapes give equal matrices.

    All matrices here are 6 × 6, including direct ones, since there are six classes; a transposed copy would be as bad.
    """
    blocks = fitting_blocks([Dense(units=6) for _ in range(4)], (6,))
    network = make_network(blocks, init, 0, "float64")
    feedback = list(trainer(network, rule, SGD(lr=1), feedback_init=init).state.weights.values())
    assert [b.shape for b in feedback] == [(6, 6)] * 3
    drawn = [*network.weights, *feedback]
    for i, a in enumerate(drawn):
        for b in (c for other in drawn[:i] for c in (other, other.T)):
            # Unrelated 6 × 6 matrices have a correlation of about 1/6.
            assert abs(np.vdot(a, b)) < 0.9 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("rule", RULES)
def test_the_updates_of_a_batch_are_the_sum_of_its_samples(rule):
    """If the loss is a sum, samples do not influence each other."""
    blocks = named_blocks("lenet")
    network, (x, labels) = random_network(blocks), batch(blocks, 4)
    runner = trainer(network, rule, SGD(lr=1), NUMPY, **cheap(rule))
    alone = [[array.copy() for pair in runner.propose(x[b : b + 1], labels[b : b + 1], "sum")[1] for array in pair]
             for b in range(4)]  # fmt: skip
    _, together = runner.propose(x, labels, "sum")
    for n, array in enumerate(a for pair in together for a in pair):
        close(array, sum(found[n] for found in alone), ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_learns(rule):
    """60 steps on one batch reduce the loss to less than a tenth; random feedback is enough (Lillicrap et al.)."""
    blocks = fitting_blocks([Dense(units=40, activation="tanh"), Dense(units=4)], (10,))
    x, labels = rng(1).standard_normal((12, 10)), np.arange(12) % 4
    runner = trainer(random_network(blocks), rule, SGD(lr=0.3, momentum=0.9), NUMPY)
    losses = [float(runner.step(x, labels)) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


TRAINED = {"feedback": FeedbackTraining(iterations=(2, 3), sigma=0.1, optimizer=SGD(lr=0.1))}
# FLOPs of a product: 2 · 4 positions · 18 inputs · 2 outputs, 2 · 8 · 5, 2 · 5 · 3; of DFA's, from 3 logits to 8 and 5.
A, B, C, DIRECT = 288, 80, 30, 2 * 3 * 8 + 2 * 3 * 5
DOWN = A + 2 * B + 2 * C


@pytest.mark.parametrize(
    ("rule", "options", "updates", "feedback"),
    [
        ("bp", {}, DOWN, None),
        ("fa", {}, DOWN, None),
        ("dfa", {}, A + B + C + DIRECT, None),
        # Three backward passes without gradients of weights.
        ("gnt", {}, 3 * (B + C) + A + B + C, None),
        ("dtp", TRAINED, DOWN, 7 * B + 10 * C),
        ("ldrl", TRAINED, DOWN, 9 * B + 13 * C),
        ("ldrl", TRAINED | {"output_noise": "expected"}, DOWN, 5 * B + 7 * C),
        ("ldrl-parallel", TRAINED | {"samples": 5}, DOWN, 41 * B + 61 * C),
        ("drl", TRAINED, A + B + C + DIRECT, 2 * (96 + B + C) + 3 * (60 + C)),
        ("drl", TRAINED | {"expected": True}, A + B + C + DIRECT, 3 * (B + C)),
    ],
)
def test_the_operations_of_a_sample_are_those_counted_by_hand(rule, options, updates, feedback):
    layers = [Conv(channels=2, kernel=3, stride=2, padding="same"), Dense(units=5), Dense(units=3)]
    network, of = random_network(fitting_blocks(layers, (4, 4, 2))), EVERY[rule]
    assert of.flops(of.options(**options), network) == updates
    assert (of.feedback and of.feedback.flops(of.options(**options), network)) == feedback
