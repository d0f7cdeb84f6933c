"""TP, DTP, L-DRL and its parallel form: literal recursions, schedules of the noise, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network
from training import trainer

from arraytp.backend import NUMPY
from arraytp.errors import UserError
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.feedback import feedback_forward
from arraytp.model.network import make_network
from arraytp.ops.noise import gaussian
from arraytp.options import SGD, Adam, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import RULES, dtp, ldrl

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


def host_state(place, runner):
    return {name: place.get(array) for name, array in runner.state.items()}


def trained(rule, options, count=5, step=0, threads=2, state=None):
    """Train feedback on one batch; return state and losses."""
    network, (x, _) = random_network(BLOCKS), batch(BLOCKS, count)
    workspace = Workspace(threads=threads)
    settings = RULES[rule].Options(**options)
    state = state or RULES[rule].init_state(settings, network, 3, NUMPY)
    passed = forward(network, x, workspace)
    losses = RULES[rule].train_feedback(settings, state, network, passed, 3, step, workspace)
    return state, [None if loss is None else float(loss) for loss in losses]


@pytest.mark.parametrize("divide_by_beta", [False, True])
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
@pytest.mark.parametrize("rule", TARGET_RULES)
def test_updates_are_the_literal_recursion(place, rule, unpool, divide_by_beta):
    """t^n = G(t^{n+1}) for TP, s + G(t) − G(s) for the others; β ∂L/∂s of each image, the mean over the batch."""
    options = {"beta": 0.3, "divide_by_beta": divide_by_beta, "unpool": unpool}
    network, runner = runner_on(place, rule, **options)
    x, labels = batch(BLOCKS, 4)
    _, found = runner.propose(place.put(x), place.put(labels))
    state, passed = host_state(place, runner), forward(network, x, Workspace())
    p = np.exp(passed.logits)
    t = passed.logits - 0.3 * (p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels])
    for n in reversed(range(len(BLOCKS))):
        difference = t.reshape(passed.s[n + 1].shape) - passed.s[n + 1]
        wanted = dtp.local_update(dtp.Options(), network, passed, n, difference, Workspace())
        for mine, exact in zip(found[n], wanted, strict=True):
            close(place.get(mine), exact / (0.3 if divide_by_beta else 1), 1e-11)
        if n > 0:
            omega = state[f"feedback/{n}/weight"], state[f"feedback/{n}/bias"]
            g = [feedback_forward(BLOCKS[n], *omega, at.reshape(passed.s[n + 1].shape), passed.index[n], unpool)
                 for at in (t, passed.s[n + 1])]  # fmt: skip
            t = g[0] if rule == "tp" else passed.x[n].reshape(g[0].shape) + g[0] - g[1]


def literal(rule, training, unpool, state, step=0, count=5):
    """Train by the readable iterations, momentum SGD and Adam written out; return ω and bias per block."""
    network, (x, _) = random_network(BLOCKS), batch(BLOCKS, count)
    passed, found = forward(network, x, Workspace()), {}
    for n, block in list(enumerate(BLOCKS))[1:]:
        w, b = (state[f"feedback/{n}/{part}"].copy() for part in ("weight", "bias"))
        zeros = np.zeros_like(w), np.zeros_like(b)
        moments, squares = list(zeros), list(zeros)
        s, theta = passed.x[n].reshape(count, *block.in_shape), (network.weights[n], network.biases[n])
        for k in range(training.iterations[n - 1]):
            epsilon = gaussian(np.empty(s.shape), training.sigma[n - 1], 0, 3, step, n, k, 0)
            eta = gaussian(np.empty(passed.s[n + 1].shape), training.sigma[n - 1], 0, 3, step, n, k, 1)
            if rule == "ldrl":
                dw, _ = ldrl.iteration(block, theta, (w, b), s, epsilon, eta, unpool)
                db = np.zeros_like(b)
            else:
                dw, db, _ = dtp.iteration(block, theta, (w, b), s, epsilon, unpool)
            lr, parts, adam = training.optimizer.lr[n - 1], [w, b], training.optimizer.name == "adam"
            t = step * training.iterations[n - 1] + k + 1
            for i, g in enumerate((dw, db)):
                moments[i] = 0.9 * moments[i] + (0.1 if adam else 1) * g
                squares[i] = 0.999 * squares[i] + 0.001 * g * g
                root = np.sqrt(squares[i] / (1 - 0.999**t)) + 1e-8
                parts[i] = parts[i] - lr * (moments[i] / (1 - 0.9**t) / root if adam else moments[i])
            w, b = parts
        found[n] = w, b
    return found


LISTS = FeedbackTraining(iterations=(3, 0, 2), sigma=(0.3, 0.2, 0.1), optimizer=SGD(lr=(0.02, 0.1, 0.05), momentum=0.9))


@pytest.mark.parametrize("optimizer", [LISTS.optimizer, Adam(lr=(0.02, 0.1, 0.05))], ids=["sgd", "adam"])
@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
@pytest.mark.parametrize("rule", ["tp", "dtp", "ldrl"])
def test_feedback_is_trained_block_by_block_with_its_own_numbers(rule, unpool, optimizer):
    """K, σ and rate of each block; none of one with K = 0; the noise's key is seed, batch, block, iteration, kind.

    Adam's bias correction counts the iterations of all batches.
    """
    training = replace(LISTS, optimizer=optimizer)
    options = {"feedback": training, "unpool": unpool}
    before = RULES[rule].init_state(RULES[rule].Options(**options), random_network(BLOCKS), 3, NUMPY)
    start = {name: array.copy() for name, array in before.items()}
    state, losses = trained(rule, options, step=4, state=before)
    for n, (weight, bias) in literal(rule, training, unpool, start, step=4).items():
        close(state[f"feedback/{n}/weight"], weight, 1e-10)
        if rule != "ldrl":
            close(state[f"feedback/{n}/bias"], bias, 1e-10)
    assert [loss is None for loss in losses] == [False, True, False]
    np.testing.assert_array_equal(state["feedback/2/weight"], start["feedback/2/weight"])


def test_the_feedbacks_momentum_lives_across_batches():
    """Two batches of one iteration: the second step is 0.9 times the first and the new gradient."""
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02, momentum=0.9))
    state, _ = trained("ldrl", {"feedback": training})
    velocity = state["feedback_moments/1/weight/0"].copy()
    weight = state["feedback/1/weight"].copy()
    trained("ldrl", {"feedback": training}, step=1, state=state)
    still = {name: array.copy() for name, array in state.items()}
    fresh = dict(still, **{"feedback/1/weight": weight.copy(), "feedback_moments/1/weight/0": np.zeros_like(velocity)})
    trained("ldrl", {"feedback": training}, step=1, state=fresh)
    close(state["feedback_moments/1/weight/0"], 0.9 * velocity + fresh["feedback_moments/1/weight/0"], ROUNDING)


def test_one_sample_and_one_iteration_are_the_same_in_sequence_and_in_parallel():
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02, momentum=0.9))
    sequential = trained("ldrl", {"feedback": training}, step=2)
    parallel = trained("ldrl-parallel", {"feedback": training, "samples": 1}, step=2)
    assert sequential[1] == parallel[1]
    for name, array in sequential[0].items():
        np.testing.assert_array_equal(parallel[0][name], array)


def test_samples_in_parallel_average_the_gradients_of_as_many_noises():
    """Plain SGD from the same ω: the step with four samples is the mean of the readable gradients' steps."""
    training = FeedbackTraining(iterations=1, sigma=0.3, optimizer=SGD(lr=0.02))
    options = {"feedback": training, "samples": 4}
    network, (x, _) = random_network(BLOCKS), batch(BLOCKS, 5)
    start = RULES["ldrl-parallel"].init_state(RULES["ldrl-parallel"].Options(**options), network, 3, NUMPY)
    before = {name: array.copy() for name, array in start.items()}
    state, _ = trained("ldrl-parallel", options, step=2, state=start)
    passed = forward(network, x, Workspace())
    for n, block in list(enumerate(BLOCKS))[1:]:
        s, omega = passed.x[n].reshape(5, *block.in_shape), before[f"feedback/{n}/weight"]
        theta, bias = (network.weights[n], network.biases[n]), before[f"feedback/{n}/bias"]
        gradients = [
            ldrl.iteration(block, theta, (omega, bias), s, *(gaussian(np.empty(a.shape), 0.3, 0, 3, 2, n, k, kind)
                           for kind, a in enumerate((s, passed.s[n + 1]))), "overwrite")[0] for k in range(4)
        ]  # fmt: skip
        close(state[f"feedback/{n}/weight"], omega - 0.02 * sum(gradients) / 4, ROUNDING)
        np.testing.assert_array_equal(state[f"feedback/{n}/bias"], bias)


@pytest.mark.parametrize("rule", TARGET_RULES)
def test_threads_and_repetition_change_no_bit(rule):
    found = [trained(rule, {}, count=18, threads=threads) for threads in (1, 2, 2)]
    for state, losses in found[1:]:
        assert losses == found[0][1]
        for name, array in found[0][0].items():
            np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("rule", ["dtp", "ldrl"])
def test_training_on_one_batch_goes_on_lowering_the_loss(rule):
    """A prolonged run: with the same noise the loss is lower after it; L-DRL's ω turns towards θ."""
    training = FeedbackTraining(iterations=150, sigma=0.2, optimizer=SGD(lr=(0.02, 0.05, 0.1), momentum=0.9))
    short = FeedbackTraining(iterations=1, sigma=0.2, optimizer=SGD(lr=1e-9))
    state, _ = trained(rule, {"feedback": training}, count=20)
    first = trained(rule, {"feedback": short}, count=20, step=9)[1]
    last = trained(rule, {"feedback": short}, count=20, step=9, state=state)[1]
    assert all(b < a for a, b in zip(first, last, strict=True))
    if rule == "ldrl":
        theta = random_network(BLOCKS).weights[-1]
        omega = state["feedback/3/weight"]
        assert np.vdot(omega, theta) > 0.8 * np.linalg.norm(omega) * np.linalg.norm(theta)


@pytest.mark.parametrize("init", ["kaiming-uniform", "xavier-normal", "orthogonal", "symmetric"])
def test_the_first_feedback_weights(place, init):
    """Shapes of θ; PyTorch's bounds 1/√fan_in of the reversed block; never θ's own numbers unless symmetric."""
    network = make_network(BLOCKS, "kaiming-uniform", 0, "float32", place.backend)
    state = dtp.init_state(dtp.Options(feedback_init=init), network, 0, place.backend)
    names = [f"feedback/{n}/{part}" for n in (1, 2, 3) for part in ("weight", "bias")]
    assert [name for name in state if name.startswith("feedback/")] == names
    for n, block in list(enumerate(network.blocks))[1:]:
        weight, bias = (place.get(state[f"feedback/{n}/{part}"]) for part in ("weight", "bias"))
        theta = place.get(network.weights[n])
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
        assert not place.get(state[f"feedback_moments/{n}/weight/0"]).any()


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
    options = RULES[rule].Options(feedback=FeedbackTraining(**training))
    message = message.replace(LABELS, "conv1, conv2, dense1") if rule == "drl" else message
    with pytest.raises(UserError, match=message):
        RULES[rule].check(options, BLOCKS, "float64", "mean")


@pytest.mark.parametrize("rule", [*TARGET_RULES, "drl"])
def test_what_the_rules_cannot_train_is_refused(rule):
    check, options = RULES[rule].check, RULES[rule].Options()
    with pytest.raises(UserError, match=f"loss.reduction: sum: rule {rule} is defined for the mean loss"):
        check(options, BLOCKS, "float32", "sum")
    wider = fitting_blocks([Dense(units=5, auxiliary=2), Dense(units=3)], (4,))
    with pytest.raises(UserError, match=r"block 0 \(dense1\): has 2 auxiliary units"):
        check(options, wider, "float32", "mean")
    assert check(options, BLOCKS, "float32", "mean") == []
