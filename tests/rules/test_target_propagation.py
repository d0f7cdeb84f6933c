"""TP, DTP, L-DRL and its parallel form: literal recursions, schedules of the noise, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from feedback_blocks import iteration
from samples import batch, close, fitting_blocks, placed, random_network
from training import fast, pass_of, plain, trainer

from arraytp.backend import NUMPY
from arraytp.errors import UserError
from arraytp.model.feedback import feedback_forward
from arraytp.model.initialise import make_network
from arraytp.ops.activations import ACTIVATIONS
from arraytp.options import SGD, Adam, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import RULES, dtp
from arraytp.rules.feedback import train
from arraytp.rules.protocol import Target

TARGET_RULES = ("tp", "dtp", "ldrl", "ldrl-parallel")
LAYERS = [
    Conv(channels=3, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Dense(units=5, activation="tanh"),
    Dense(units=3),
]
BLOCKS = fitting_blocks(LAYERS, (7, 6, 2))
ROUNDING = 1e-12


def runner_on(place, rule, threads=2, **options):
    network = random_network(BLOCKS)
    return network, trainer(placed(network, place.put), rule, SGD(lr=1), place.backend, threads, **options)


def trained(rule, options, count=5, step=0, threads=2, state=None):
    """Train feedback on one batch; return state and losses."""
    network, engine = random_network(BLOCKS), fast(threads=threads)
    settings = RULES[rule].options(**options)
    state = state or RULES[rule].init_state(settings, network, 3, NUMPY)
    one = pass_of(network, batch(BLOCKS, count)[0], engine=engine, seed=3, number=step)
    losses = train(RULES[rule].feedback, settings, state, one, engine)
    return state, [None if loss is None else float(loss) for loss in losses]


@pytest.mark.parametrize("divide_by_beta", [False, True])
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
@pytest.mark.parametrize("rule", TARGET_RULES)
def test_updates_are_the_literal_recursion(place, rule, unpool, divide_by_beta):
    """t^n = G(t^{n+1}) for TP, s + G(t) − G(s) for the others; t^N takes each image's ∂L/∂s, updates are means."""
    options = {"beta": 0.3, "divide_by_beta": divide_by_beta, "unpool": unpool}
    network, runner = runner_on(place, rule, **options)
    x, labels = batch(BLOCKS, 4)
    _, found = runner.propose(place.put(x), place.put(labels))
    one = pass_of(network, x, engine=plain())
    p = np.exp(one.logits)
    t = one.logits - 0.3 * (p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels])
    for at in one.down():
        wanted = dtp.local_update(dtp.Options(), at, Target(t.reshape(at.s_next.shape) - at.s_next))
        for mine, exact in zip(found[at.n], wanted, strict=True):
            close(place.get(mine), exact / (0.3 if divide_by_beta else 1), 1e-11)
        if at.n > 0:
            omega = place.get(runner.state.weights[at.n]), place.get(runner.state.biases[at.n])
            g = [feedback_forward(at.block, *omega, each.reshape(at.s_next.shape), at.index, unpool)
                 for each in (t, at.s_next)]  # fmt: skip
            t = g[0] if rule == "tp" else at.s.reshape(g[0].shape) + g[0] - g[1]


def literal(rule, training, unpool, state, step=0, count=5):
    """Train by the plain iterations, momentum SGD and Adam written out; return ω and bias per block."""
    network, result = random_network(BLOCKS), {}
    one = pass_of(network, batch(BLOCKS, count)[0], engine=plain(), seed=3, number=step)
    for n in range(1, len(BLOCKS)):
        w, b = state.weights[n].copy(), state.biases[n].copy()
        zeros = np.zeros_like(w), np.zeros_like(b)
        moments, squares = list(zeros), list(zeros)
        for k in range(training.iterations[n - 1]):
            gradients = iteration(rule, one.at(n), (w, b), training.sigma[n - 1], k, unpool=unpool).gradients
            lr, parts, adam = training.optimizer.lr[n - 1], [w, b], training.optimizer.name == "adam"
            t = step * training.iterations[n - 1] + k + 1
            for i, g in enumerate((gradients["weight"], gradients.get("bias", np.zeros_like(b)))):
                moments[i] = 0.9 * moments[i] + (0.1 if adam else 1) * g
                squares[i] = 0.999 * squares[i] + 0.001 * g * g
                root = np.sqrt(squares[i] / (1 - 0.999**t)) + 1e-8
                parts[i] = parts[i] - lr * (moments[i] / (1 - 0.9**t) / root if adam else moments[i])
            w, b = parts
        result[n] = w, b
    return result


LISTS = FeedbackTraining(iterations=(3, 0, 2), sigma=(0.3, 0.2, 0.1), optimizer=SGD(lr=(0.02, 0.1, 0.05), momentum=0.9))


@pytest.mark.parametrize("optimizer", [LISTS.optimizer, Adam(lr=(0.02, 0.1, 0.05))], ids=["sgd", "adam"])
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
@pytest.mark.parametrize("rule", ["tp", "dtp", "ldrl"])
def test_feedback_is_trained_block_by_block_with_its_own_numbers(rule, unpool, optimizer):
    """Every block has its own K, σ and rate; if K = 0, ω stays. Noise has the key seed, batch, block, iteration, kind.

    Adam's bias correction counts the iterations of all batches.
    """
    training = replace(LISTS, optimizer=optimizer)
    options = {"feedback": training, "unpool": unpool}
    before = RULES[rule].init_state(RULES[rule].options(**options), random_network(BLOCKS), 3, NUMPY)
    start = before.copy()
    state, losses = trained(rule, options, step=4, state=before)
    for n, (weight, bias) in literal(rule, training, unpool, start, step=4).items():
        close(state.weights[n], weight, 1e-10)
        close(state.biases[n], bias, 1e-10)
    assert [loss is None for loss in losses] == [False, True, False]
    np.testing.assert_array_equal(state.weights[2], start.weights[2])


def test_the_feedbacks_momentum_lives_across_batches():
    """With one iteration on each of two batches, the second step is 0.9 times the first plus the new gradient."""
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02, momentum=0.9))
    state, _ = trained("ldrl", {"feedback": training})
    fresh = state.copy()
    velocity = fresh.moments[1, "weight"][0].copy()
    fresh.moments[1, "weight"][0][...] = 0
    for start in (state, fresh):
        trained("ldrl", {"feedback": training}, step=1, state=start)
    close(state.moments[1, "weight"][0], 0.9 * velocity + fresh.moments[1, "weight"][0], ROUNDING)


def assert_same(state, other):
    """Assert that two states are the same, bit for bit."""
    assert state.named().keys() == other.named().keys()
    for name, array in state.named().items():
        np.testing.assert_array_equal(array, other.named()[name])


def test_one_sample_and_one_iteration_are_the_same_in_sequence_and_in_parallel():
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02, momentum=0.9))
    sequential = trained("ldrl", {"feedback": training}, step=2)
    parallel = trained("ldrl-parallel", {"feedback": training, "samples": 1}, step=2)
    assert sequential[1] == parallel[1]
    assert_same(sequential[0], parallel[0])


def test_samples_in_parallel_average_the_gradients_of_as_many_noises():
    """With plain SGD from the same ω, a step with four samples is the mean of the steps with one sample each."""
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02))
    options, rule = {"feedback": training, "samples": 4}, RULES["ldrl-parallel"]
    network = random_network(BLOCKS)
    start = rule.init_state(rule.options(**options), network, 3, NUMPY)
    before = start.copy()
    state, _ = trained("ldrl-parallel", options, step=2, state=start)
    one = pass_of(network, batch(BLOCKS, 5)[0], engine=plain(), seed=3, number=2)
    for n, omega in before.weights.items():
        each = [iteration("ldrl", one.at(n), (omega, None), 0.3, k).gradients["weight"] for k in range(4)]
        close(state.weights[n], omega - 0.02 * sum(each) / 4, ROUNDING)
        np.testing.assert_array_equal(state.biases[n], before.biases[n])


@pytest.mark.parametrize("rule", TARGET_RULES)
def test_threads_and_repetition_change_no_bit(rule):
    results = [trained(rule, {}, count=18, threads=threads) for threads in (1, 2, 2)]
    for state, losses in results[1:]:
        assert losses == results[0][1]
        assert_same(state, results[0][0])


@pytest.mark.parametrize("rule", ["dtp", "ldrl"])
def test_training_on_one_batch_goes_on_lowering_the_loss(rule):
    """After a long run the loss for the same noise is lower, and L-DRL's ω has turned towards θ."""
    training = FeedbackTraining(iterations=150, sigma=0.2, optimizer=SGD(lr=(0.02, 0.05, 0.1), momentum=0.9))
    short = FeedbackTraining(iterations=1, sigma=0.2, optimizer=SGD(lr=1e-9))
    state, _ = trained(rule, {"feedback": training}, count=20)
    first = trained(rule, {"feedback": short}, count=20, step=9)[1]
    last = trained(rule, {"feedback": short}, count=20, step=9, state=state)[1]
    assert all(b < a for a, b in zip(first, last, strict=True))
    if rule == "ldrl":
        theta = random_network(BLOCKS).weights[-1]
        omega = state.weights[3]
        assert np.vdot(omega, theta) > 0.8 * np.linalg.norm(omega) * np.linalg.norm(theta)


@pytest.mark.parametrize("init", ["kaiming-uniform", "xavier-normal", "orthogonal", "symmetric"])
def test_the_first_feedback_weights(computer, init):
    """They have θ's shapes, PyTorch's bounds 1/√fan_in for the reversed block, and θ's values only if symmetric."""
    network = make_network(BLOCKS, "kaiming-uniform", 0, "float32", computer.backend)
    state = dtp.init_state(dtp.Options(feedback_init=init), network, 0, computer.backend)
    assert list(state.weights) == list(state.biases) == [1, 2, 3]
    for n, block in list(enumerate(network.blocks))[1:]:
        weight, bias = computer.get(state.weights[n]), computer.get(state.biases[n])
        theta = computer.get(network.weights[n])
        assert (weight.shape, bias.shape) == (theta.shape, block.in_shape[-1:])
        assert weight.dtype == bias.dtype == np.float32
        assert np.array_equal(weight, theta) == (init == "symmetric")
        assert not np.shares_memory(weight, theta)
        if init == "kaiming-uniform":
            # Conv: channels in times taps, as for ConvTranspose2d's (in, out, k, k); dense: the forward outputs.
            fan_in = np.prod(block.weight_shape[:-1]) if block.kind == "conv" else block.weight_shape[-1]
            for array in (weight, bias):
                assert np.abs(array).max() <= fan_in**-0.5
            assert np.abs(weight).max() > 0.6 * fan_in**-0.5
            assert np.abs(bias).max() > 0
        else:
            assert not bias.any()
        assert not any(computer.get(moment).any() for part in ("weight", "bias") for moment in state.moments[n, part])


LABELS = r"conv2, dense1, dense2"
REFUSED = {
    "too few sigmas": ({"sigma": (0.1, 0.2)}, rf"feedback\.sigma: 2 values \[0\.1, 0\.2\].*list of 3.*{LABELS}"),
    "too many iterations": ({"iterations": (1, 2, 3, 4)}, rf"feedback\.iterations: 4 values.*list of 3.*{LABELS}"),
    "rates of all blocks": ({"optimizer": SGD(lr=(1, 1, 1, 1))}, rf"feedback\.optimizer\.lr: 4 values.*{LABELS}"),
    "one epsilon": ({"optimizer": Adam(lr=1, epsilon=(1,))}, rf"feedback\.optimizer\.epsilon: 1 values.*{LABELS}"),
}


@pytest.mark.parametrize(("training", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("rule", [*TARGET_RULES, "drl"])
def test_lists_of_another_length_are_refused_with_the_blocks_they_must_match(rule, training, message):
    options = RULES[rule].options(feedback=FeedbackTraining(**training))
    with pytest.raises(UserError, match=message):
        RULES[rule].check(options, BLOCKS, "float64", "mean")


@pytest.mark.parametrize("rule", [*TARGET_RULES, "drl"])
def test_what_the_rules_cannot_train_is_refused(rule):
    check, options = RULES[rule].check, RULES[rule].options()
    with pytest.raises(UserError, match=f"loss.reduction: sum: rule {rule} is defined for the mean loss"):
        check(options, BLOCKS, "float32", "sum")
    wider = fitting_blocks([Dense(units=5, auxiliary=2), Dense(units=3)], (4,))
    with pytest.raises(UserError, match=r"block 0 \(dense1\): has 2 auxiliary units"):
        check(options, wider, "float32", "mean")
    assert check(options, BLOCKS, "float32", "mean") == []


@pytest.mark.parametrize("rule", TARGET_RULES)
def test_silent_units_where_targets_pass_are_worth_a_note(rule):
    options = RULES[rule].options()
    blocks = [
        tuple(replace(block, activation=ACTIVATIONS[name]) for block in BLOCKS) for name in ("relu", "leaky-relu")
    ]
    (note,) = RULES[rule].check(options, blocks[0], "float64", "mean")
    assert note.startswith(f"rule {rule}: with activation relu")
    assert RULES[rule].check(options, blocks[1], "float64", "mean") == []
    # Nothing passes down through the first block.
    assert RULES[rule].check(options, blocks[0][:1] + blocks[1][1:], "float64", "mean") == []
