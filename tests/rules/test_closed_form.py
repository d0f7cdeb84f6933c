"""Feedback in closed form: N and M, the K-th power, and DRL's Jacobians, against iterations and sums written out.

Errors here would go unnoticed in training: a velocity that is not the one K steps leave shows only on the next batch; a
tap that counts pixels outside the image turns ω by a few degrees; a Jacobian of the wrong class still descends.
"""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from feedback_blocks import LAYERS, at_block, made
from samples import batch, named_blocks, random_network, rng
from training import fast, pass_of, plain

from arraytp.backend import NUMPY
from arraytp.errors import NonFiniteError, UserError
from arraytp.fast.parallel import Workspace
from arraytp.model.feedback import outer
from arraytp.options import SGD, Adam, FeedbackTraining
from arraytp.rules import RULES, drl, feedback
from arraytp.rules.collapse import iteration_matrix, matrix_power
from arraytp.rules.protocol import State

OPTIMIZERS = {
    "momentum": SGD(lr=0.05, momentum=0.9, weight_decay=0.01),
    "plain": SGD(lr=0.05),
    "adam": Adam(lr=0.01, weight_decay=0.01),
}


def options(rule, optimizer, iterations=7, **others):
    training = FeedbackTraining(iterations=iterations, sigma=0.3, optimizer=optimizer)
    return RULES[rule].options(feedback=training, **others)


def state_of(network, optimizer, direct=False):
    generator, state = rng(7), State()
    for n, block in enumerate(network.blocks[1:], start=1):
        shape = (network.blocks[-1].next_shape[0], int(np.prod(block.in_shape))) if direct else block.weight_shape
        state.weights[n] = 0.3 * generator.standard_normal(shape)
        feedback.init_moments(state, n, optimizer)
        for moment in state.moments[n, "weight"]:
            # Not negative, because this is not only the velocity but also Adam's second moment.
            moment[...] = 0.1 * generator.random(shape)
    return state


def train(rule, settings, state, pass_):
    return feedback.train(RULES[rule].feedback, settings, state, pass_, Workspace(NUMPY, 2))


@pytest.mark.parametrize("unpool", ["overwrite", "accumulate"])
@pytest.mark.parametrize("activation", ["linear", "elu", "tanh", "leaky-relu", "relu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_fused_passes_sum_what_the_plain_form_sums(layer, activation, unpool):
    block, theta, _, s = made(layer, activation, 5)
    computed = at_block(block, theta, s, fast()).jacobian_overlap(unpool)
    expected = at_block(block, theta, s, plain()).jacobian_overlap(unpool)
    for a, b in zip(computed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "unpool", "optimizer", "rule"),
    [
        *product(["lenet"], ["overwrite", "accumulate"], OPTIMIZERS, ["ldrl", "ldrl-parallel"]),
        ("vgg", "overwrite", "momentum", "ldrl"),
        ("vgg", "overwrite", "adam", "ldrl"),
    ],
)
def test_k_iterations_at_once_are_k_steps_of_the_expected_gradient(name, unpool, optimizer, rule):
    optimizer = OPTIMIZERS[optimizer]
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, 5)
    settings, pass_ = options(rule, optimizer, unpool=unpool, expected=True), pass_of(network, x)
    state, explicit = state_of(network, optimizer), state_of(network, optimizer)
    train(rule, settings, state, pass_)
    for n, omega in explicit.weights.items():
        N, M = plain_pass(network, x).at(n).jacobian_overlap(unpool)
        descent = feedback.descent_of(settings.feedback, n, 0, Workspace(NUMPY, 1))
        scale = 2 * 0.3**2 / len(x)
        for k in range(7):
            gradient = scale * (M * omega - N * network.weights[n])
            feedback.step_feedback(descent, explicit, n, k, {"weight": gradient})
    for key, array in explicit.named().items():
        np.testing.assert_allclose(state.named()[key], array, rtol=1e-12, atol=1e-12, err_msg=key)


def plain_pass(network, x):
    return pass_of(network, x, engine=plain())


@pytest.mark.parametrize("output_noise", ["sampled", "expected"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_expected_gradient_is_the_limit_of_sampled_ones(layer, output_noise):
    """The mean over n small noises tends to a ω − b θ, with an error of the order of 1/√n."""
    block, theta, omega, s = made(layer, "elu", 4)
    sigma, samples = 1e-5, 400
    at = at_block(block, theta, s, plain(), seed=3)
    N, M = at.jacobian_overlap("accumulate")
    limit = 2 / len(s) * (M * omega[0] - N * theta[0])
    settings = RULES["ldrl"].options(unpool="accumulate", output_noise=output_noise)
    iterate = RULES["ldrl"].feedback.begin(settings, at, sigma, samples)
    state = State({1: omega[0]}, {1: omega[1]})
    drawn = [iterate(state, k, False).gradients["weight"] / sigma**2 for k in range(samples)]
    scatter = np.mean([np.linalg.norm(gradient - limit) for gradient in drawn])
    assert np.linalg.norm(np.mean(drawn, axis=0) - limit) < 3 * scatter / samples**0.5


@pytest.mark.parametrize("engine", [plain, fast])
@pytest.mark.parametrize("layer", LAYERS)
def test_output_noise_in_expectation_is_exact_where_f_is_linear(layer, engine):
    """For the same ε and any σ, sampling η changes gradients and losses by terms with mean 0."""
    block, theta, omega, s = made(layer, "linear", 4)
    sigma, samples = 0.5, 200
    drawn = {}
    for output_noise in ("sampled", "expected"):
        settings = RULES["ldrl"].options(unpool="accumulate", output_noise=output_noise)
        at = at_block(block, theta, s, engine(), seed=3)
        iterate = RULES["ldrl"].feedback.begin(settings, at, sigma, samples)
        state = State({1: omega[0]}, {1: omega[1]})
        done = (iterate(state, k, True) for k in range(samples))
        drawn[output_noise] = [np.append(each.gradients["weight"], each.loss) for each in done]
    changes = np.subtract(drawn["sampled"], drawn["expected"])
    scatter = np.linalg.norm(changes[:, :-1], axis=1).mean()
    assert np.linalg.norm(changes[:, :-1].mean(axis=0)) < 3 * scatter / len(changes) ** 0.5
    assert abs(changes[:, -1].mean()) < 4 * changes[:, -1].std() / len(changes) ** 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_matrix_of_an_iteration_is_sgd_with_momentum(momentum):
    c, b, lr = np.array([[0.7, 1.3]]), np.array([[0.4, -0.2]]), 0.1
    omega, v, theta = rng(1).standard_normal((3, 1, 2))
    power = matrix_power(iteration_matrix(c, b, momentum, lr), 5)
    after = np.einsum("...ij,...j->...i", power, np.stack([omega, v, theta], axis=-1))
    for _ in range(5):
        v = momentum * v + c * omega - b * theta
        omega = omega - lr * v
    np.testing.assert_allclose(after, np.stack([omega, v, theta], axis=-1), rtol=1e-13)


def test_a_rate_that_diverges_names_block_tap_and_number():
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 5)
    optimizer = SGD(lr=1e6, momentum=0.5)
    settings = options("ldrl", optimizer, expected=True)
    with pytest.raises(NonFiniteError, match=r"block 1 \(conv2\).*tap \(\d, \d\), output \d+: .* at most .* = 3;"):
        train("ldrl", settings, state_of(network, optimizer), pass_of(network, x))


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_bound_on_the_rate_is_where_iterations_begin_to_grow(factor):
    momentum, c = 0.5, np.array([[2.0]])
    lr = factor * 2 * (1 + momentum) / 2.0
    power = matrix_power(iteration_matrix(c, 0 * c, momentum, lr), 4001)
    assert (np.abs(power[..., :2, :2]).max() > 1e3) == (factor > 1)


@pytest.mark.parametrize(
    ("rule", "more"), [("ldrl", {"expected": True}), ("drl", {"expected": True}), ("drl", {"expected": "optimum"})]
)
def test_a_closed_form_of_no_iterations_is_refused(rule, more):
    settings = options(rule, SGD(lr=0.1), iterations=(3, 0, 2), **more)
    with pytest.raises(UserError, match=r"iterations: 0 with rule\.expected"):
        RULES[rule].check(settings, named_blocks("lenet"), "float64", "mean")


@pytest.mark.parametrize("rule", ["ldrl", "ldrl-parallel"])
def test_a_closed_form_beside_sampled_input_noise_is_refused(rule):
    settings = options(rule, SGD(lr=0.1), expected=True, output_noise="expected")
    with pytest.raises(UserError, match=r"rule\.output_noise: expected, but rule\.expected draws no noise"):
        RULES[rule].check(settings, named_blocks("lenet"), "float64", "mean")


def test_a_closed_form_of_many_classes_is_refused():
    blocks = named_blocks("lenet")
    last = blocks[-1].__class__(**vars(blocks[-1]) | {"out_shape": (1000,), "label": "dense2"})
    with pytest.raises(UserError, match=r"rule\.expected: 1000 classes.*at most 100"):
        RULES["drl"].check(options("drl", Adam(lr=0.1), expected=True), (*blocks[:-1], last), "float64", "mean")


@pytest.mark.parametrize("name", ["lenet", "vgg", "fc-shallow", "conv-imagenet"])
def test_sums_of_jacobians_are_those_of_a_backward_pass_a_class(name):
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, 5)
    computed, expected = pass_of(network, x).jacobian_sums, plain_pass(network, x).jacobian_sums
    assert sorted(computed) == list(range(1, len(network)))
    for n, pair in expected.items():
        for a, b in zip(computed[n], pair, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * np.abs(b).max())


def test_jacobians_are_differences_of_logits():
    """ΣJ along a direction is how fast the summed logits change when every sample's s^n moves along it."""
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 3)
    pass_ = pass_of(network, x)
    for n, (_, j) in pass_.jacobian_sums.items():
        s = pass_.at(n).s
        v, h = rng(n).standard_normal(s.shape[1:]), 1e-6
        above, below = (pass_.run_on(n, s + sign * h * v).copy() for sign in (1, -1))
        np.testing.assert_allclose(j @ v.reshape(-1), (above - below).sum(axis=0) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_drl_in_closed_form_takes_steps_of_the_limit_of_its_sampled_gradient(optimizer):
    optimizer = OPTIMIZERS[optimizer]
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    state, explicit = state_of(network, optimizer, direct=True), state_of(network, optimizer, direct=True)
    settings = options("drl", optimizer, iterations=3, expected=True)
    train("drl", settings, state, pass_of(network, x))
    for n, q in explicit.weights.items():
        A, J = plain_pass(network, x).jacobian_sums[n]
        descent = feedback.descent_of(settings.feedback, n, 0, Workspace(NUMPY, 1))
        for k in range(3):
            gradient = 2 / (len(x) * q.shape[1]) * (A @ q - J)
            feedback.step_feedback(descent, explicit, n, k, {"weight": gradient})
    for key, array in explicit.named().items():
        np.testing.assert_allclose(state.named()[key], array, rtol=1e-11, atol=1e-13, err_msg=key)


def test_drls_sampled_gradient_goes_to_the_limit():
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 3)
    pass_, sigma, samples = pass_of(network, x), 1e-5, 300
    state = state_of(network, SGD(lr=0.1), direct=True)
    for n, q in state.weights.items():
        A, J = pass_.jacobian_sums[n]
        limit = 2 / (len(x) * q.shape[1]) * (A @ q - J)
        epsilons = sigma * rng(4, n).standard_normal((samples, *pass_.at(n).s.shape))
        drawn = [
            drl.iterate(drl.Options(), State({n: q}), pass_.at(n), epsilon, sigma)[0].copy() for epsilon in epsilons
        ]
        scatter = np.mean([np.linalg.norm(gradient - limit) for gradient in drawn])
        assert np.linalg.norm(np.mean(drawn, axis=0) - limit) < 3 * scatter / samples**0.5


def test_drls_optimum_is_where_the_expected_gradient_is_zero():
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    state = state_of(network, SGD(lr=0.1), direct=True)
    train("drl", options("drl", SGD(lr=0.1), expected="optimum"), state, pass_of(network, x))
    for n, q in state.weights.items():
        A, J = plain_pass(network, x).jacobian_sums[n]
        np.testing.assert_allclose(A @ q, J, rtol=1e-8, atol=1e-10 * np.abs(J).max())


@pytest.mark.parametrize(("rule", "expected"), [("ldrl", True), ("drl", True), ("drl", "optimum")])
def test_a_closed_form_of_what_is_not_finite_has_a_loss_that_is_not_finite_and_no_error_of_its_own(rule, expected):
    """The training loop reports where the NaN began; an error of NumPy's SVD or of the bound on the rate would not."""
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    network.weights[0][...] = np.nan
    state = state_of(network, SGD(lr=0.1), direct=rule == "drl")
    with np.errstate(invalid="ignore"):
        losses = train(rule, options(rule, SGD(lr=0.1), expected=expected), state, pass_of(network, x))
    assert np.isnan(losses[-2])


def test_closed_forms_run_on_a_device_without_reading_back(device):
    """The results are those of the host. The strict double refuses implicit conversions and counts the others."""
    blocks = named_blocks("lenet")
    host, (x, _) = random_network(blocks), batch(blocks, 4)
    for rule, direct in (("ldrl", False), ("drl", True)):
        state = state_of(host, OPTIMIZERS["momentum"], direct)
        settings = options(rule, OPTIMIZERS["momentum"], expected=True)
        train(rule, settings, state, pass_of(host, x))
        moved = type(host)(host.blocks, [device.put(w) for w in host.weights], [device.put(b) for b in host.biases])
        there = state_of(host, OPTIMIZERS["momentum"], direct)
        there = State(
            {n: device.put(w) for n, w in there.weights.items()},
            {},
            {key: tuple(map(device.put, moments)) for key, moments in there.moments.items()},
        )
        workspace = Workspace(device.backend)
        pass_ = pass_of(moved, device.put(x), engine=fast(device.backend))
        # Real CuPy does not count.
        reads = getattr(device.backend.xp, "reads", Counter())
        before = reads.total()
        feedback.train(RULES[rule].feedback, settings, there, pass_, workspace)
        assert reads.total() == before
        for key, array in state.named().items():
            np.testing.assert_allclose(device.get(there.named()[key]), array, rtol=1e-10, atol=1e-11, err_msg=key)


def test_an_outer_product_is_the_gradient_of_the_transposed_map():
    """⟨x, ω ∘ d⟩ is linear in ω, and its gradient is x ⋆ d."""
    block, _, omega, s = made("strided", "linear", 3)
    d = rng(9).standard_normal((3, *block.pre_shape))
    at = at_block(block, (omega[0], np.zeros(block.weight_shape[-1])), s)
    value = float((s * at.feedback(omega[0], np.zeros(block.in_shape[-1]), d, "overwrite")).sum())
    assert value == pytest.approx(float((omega[0] * outer(block, s, d)).sum()))


@pytest.mark.parametrize("rule", ["dtp", "ldrl", "drl"])
def test_the_orthogonality_regulariser_is_refused_for_feedback(rule):
    """It would be accepted but have no effect, since it acts on θ only."""
    settings = options(rule, SGD(lr=0.1, orthogonality=1.0))
    with pytest.raises(UserError, match=r"rule\.feedback\.optimizer\.orthogonality: 1"):
        RULES[rule].check(settings, named_blocks("lenet"), "float64", "mean")


def test_closed_forms_count_the_products_that_they_take():
    blocks = named_blocks("lenet")
    network = random_network(blocks)
    few, many = (options("drl", SGD(lr=0.1), iterations=k, expected=True) for k in (1, 500))
    assert RULES["drl"].feedback.flops(few, network) == RULES["drl"].feedback.flops(many, network) > 0
    assert RULES["ldrl"].feedback.flops(options("ldrl", SGD(lr=0.1), expected=True), network) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_optimum_of_fewer_units_than_classes_leaves_out_what_is_rounding(dtype):
    w = rng(1).standard_normal((4, 10)).astype(dtype)
    found = drl.least(6 * (w.T @ w), 6 * w.T)
    np.testing.assert_allclose(found, np.linalg.pinv(w.astype(float)), rtol=0, atol=1e-5)
