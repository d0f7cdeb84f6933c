"""SGD and Adam against scalar loops and closed forms; schedules at points known by hand."""

import math
from functools import partial

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import rng

from arraytp import optim
from arraytp.backend import NUMPY
from arraytp.fast.parallel import Workspace
from arraytp.optim import apply_updates, check_gradients, init_optimizer, learning_rate, learning_rates
from arraytp.options import SGD, Adam, Constant, Cosine, Staircase

SHAPES = ((3, 2), (2,), (2, 2, 1, 3), (3,))


def trajectory(place, optimizer, rates, seed, dtype="float64"):
    """Return the parameters before the first and after each step on this place, and the gradients of each step."""
    shapes = list(enumerate(SHAPES))
    theta = [place.backend.asarray(rng(seed, n).standard_normal(shape).astype(dtype)) for n, shape in shapes]
    state, workspace = init_optimizer(optimizer, theta), Workspace(place.backend, 2)
    points, gradients = [[place.get(t).copy() for t in theta]], []
    for step, lr in enumerate(rates):
        gradients.append([rng(seed, n, step).standard_normal(shape).astype(dtype) for n, shape in shapes])
        apply_updates(optimizer, lr, state, theta, [place.put(g) for g in gradients[-1]], workspace)
        points.append([place.get(t).copy() for t in theta])
    assert state.step == len(rates)
    return points, gradients


def check_loops(points, gradients, rates, advance, memories):
    """Compare the trajectory of every number with a scalar loop."""
    for n, shape in enumerate(SHAPES):
        for position in np.ndindex(shape):
            theta, memory = float(points[0][n][position]), (0.0,) * memories
            for step, lr in enumerate(rates):
                theta, *memory = advance(theta, float(gradients[step][n][position]), memory, step + 1, lr)
                assert float(points[step + 1][n][position]) == pytest.approx(theta, rel=1e-12, abs=1e-13)


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    rates=st.lists(st.floats(1e-4, 1), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
def test_sgd_is_the_loop(place, momentum, weight_decay, rates, seed):
    optimizer = SGD(lr=1, momentum=momentum, weight_decay=weight_decay)

    def advance(theta, g, memory, step, lr):
        return naive.sgd(theta, g, *memory, lr=lr, momentum=momentum, weight_decay=weight_decay)

    check_loops(*trajectory(place, optimizer, rates, seed), rates, advance, 1)


@pytest.mark.parametrize("form", ["pytorch", "keras"])
@given(
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.9, 0.999]),
    epsilon=st.sampled_from([1e-8, 1e-4, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    rates=st.lists(st.floats(1e-4, 1), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
def test_adam_is_the_loop(place, form, beta1, beta2, epsilon, weight_decay, rates, seed):
    numbers = {"beta1": beta1, "beta2": beta2, "epsilon": epsilon, "epsilon_form": form, "weight_decay": weight_decay}

    def advance(theta, g, memory, step, lr):
        return naive.adam(theta, g, *memory, step, lr=lr, **numbers)

    check_loops(*trajectory(place, Adam(lr=1, **numbers), rates, seed), rates, advance, 2)


def run(optimizer, theta, gradient_of, steps, lr):
    theta = np.array(theta, dtype=float)
    state, workspace = init_optimizer(optimizer, [theta]), Workspace(threads=1)
    for _ in range(steps):
        apply_updates(optimizer, lr, state, [theta], [gradient_of(theta)], workspace)
    return theta


def test_sgd_on_a_parabola_shrinks_geometrically():
    """L = a θ²/2: θ_t = (1 − lr·a)^t θ_0."""
    a = np.array([1.0, 3.0])
    found = run(SGD(lr=0.1), [2.0, -1.0], lambda theta: a * theta, 20, 0.1)
    np.testing.assert_allclose(found, (1 - 0.1 * a) ** 20 * [2.0, -1.0], rtol=1e-12)


def test_momentum_under_a_constant_gradient_approaches_its_final_speed():
    """v_t = g (1 − μ^t)/(1 − μ), so θ_T = θ_0 − lr·g Σ_t (1 − μ^t)/(1 − μ)."""
    mu, steps = 0.9, 30
    found = run(SGD(lr=0.1, momentum=mu), [0.0], lambda theta: np.array([2.0]), steps, 0.1)
    wanted = -0.1 * 2.0 * sum((1 - mu**t) / (1 - mu) for t in range(1, steps + 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_weight_decay_alone_shrinks_geometrically():
    found = run(SGD(lr=0.5, weight_decay=0.2), [4.0], np.zeros_like, 10, 0.5)
    np.testing.assert_allclose(found, 4.0 * (1 - 0.5 * 0.2) ** 10, rtol=1e-13)


@pytest.mark.parametrize(("form", "size"), [("pytorch", 1 / (1 + 0.01 / 3.0)), ("keras", None)])
def test_the_first_step_of_adam_in_closed_form(form, size):
    """pytorch: lr·g/(|g| + ε). keras: lr·g/(|g| + ε/√(1 − β2)): the same ε acts 31.6 times as strongly."""
    optimizer = Adam(lr=0.1, epsilon=0.01, epsilon_form=form)
    size = size or 1 / (1 + 0.01 / math.sqrt(1 - 0.999) / 3.0)
    np.testing.assert_allclose(run(optimizer, [1.0], lambda theta: np.array([3.0]), 1, 0.1), 1 - 0.1 * size, rtol=1e-12)
    np.testing.assert_allclose(
        run(optimizer, [1.0], lambda theta: np.array([-3.0]), 1, 0.1), 1 + 0.1 * size, rtol=1e-12
    )


@pytest.mark.parametrize("form", ["pytorch", "keras"])
def test_adam_under_a_constant_gradient_walks_at_the_learning_rate(form):
    """Both moments are unbiased: every step is lr·g/|g| up to ε."""
    optimizer = Adam(lr=0.01, epsilon=1e-14, epsilon_form=form)
    found = run(optimizer, [0.0, 0.0], lambda theta: np.array([5.0, -0.3]), 40, 0.01)
    np.testing.assert_allclose(found, [-0.4, 0.4], rtol=1e-10)


@pytest.mark.parametrize("optimizer", [SGD(lr=1, momentum=0.9, weight_decay=0.1), Adam(lr=1, weight_decay=0.1)])
def test_long_parameters_are_cut_without_a_trace(optimizer, monkeypatch):
    """Tasks cover a parameter in stretches; one number per stretch and all at once must agree bit for bit."""
    found = {}
    for elements in (1, 7, 1 << 15):
        monkeypatch.setattr(optim, "HOST_ELEMENTS", elements)
        theta = [rng(1).standard_normal((5, 9)), rng(2).standard_normal(3)]
        state = init_optimizer(optimizer, theta)
        for step in range(3):
            gradients = [rng(3, step).standard_normal(t.shape) for t in theta]
            apply_updates(optimizer, 0.1, state, theta, gradients, Workspace(threads=2))
        found[elements] = b"".join(t.tobytes() for t in theta)
    assert found[1] == found[7] == found[1 << 15]


@pytest.mark.parametrize("optimizer", [SGD(lr=1, momentum=0.9, weight_decay=0.1), Adam(lr=1, weight_decay=0.1)])
def test_gradients_are_left_as_they_are(optimizer):
    theta, gradient = [np.ones(4)], [np.arange(4.0)]
    state = init_optimizer(optimizer, theta)
    for _ in range(2):
        apply_updates(optimizer, 0.1, state, theta, gradient, Workspace(threads=1))
    np.testing.assert_array_equal(gradient[0], np.arange(4.0))


def test_states_hold_what_the_method_needs():
    theta = [np.ones((2, 3), np.float32), np.ones(3, np.float32)]
    counts = {
        SGD(lr=1): 0,
        SGD(lr=1, momentum=0.9): 1,
        Adam(lr=1): 2,
    }
    for optimizer, count in counts.items():
        state = init_optimizer(optimizer, theta)
        assert [len(moments) for moments in state.moments] == [count, count]
        for t, moments in zip(theta, state.moments, strict=True):
            for moment in moments:
                assert (moment.shape, moment.dtype) == (t.shape, t.dtype)
                assert not moment.any()


@pytest.mark.parametrize("optimizer", [SGD(lr=1, momentum=0.9, weight_decay=0.1), Adam(lr=1, weight_decay=0.1)])
def test_single_precision_follows_double_precision(place, optimizer):
    """Five steps with errors of 6e-8 on numbers of order 1; no value-based promotion to float64 on the way."""
    single, _ = trajectory(place, optimizer, [0.1] * 5, 0, "float32")
    double, _ = trajectory(place, optimizer, [0.1] * 5, 0, "float64")
    for a, b in zip(single[-1], double[-1], strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("spoiled", [lambda g: g.T, lambda g: g.astype("float32"), lambda g: g[:2]])
def test_a_gradient_that_is_not_laid_out_as_its_parameter_is_refused(place, spoiled):
    """The optimiser works on flat stretches, so another memory order would silently mix up numbers."""
    theta, gradient = place.put(np.ones((3, 3))), place.put(np.arange(9.0).reshape(3, 3))
    check_gradients([theta, theta], [gradient, gradient])
    with pytest.raises(ValueError, match=r"parameter 1: float64\[3, 3\], C-contiguous: True; its gradient: "):
        check_gradients([theta, theta], [gradient, spoiled(gradient)])


def test_a_missing_gradient_is_noticed():
    theta = [np.ones(2), np.ones(3)]
    state = init_optimizer(SGD(lr=1), theta)
    with pytest.raises(ValueError, match="zip"):
        apply_updates(SGD(lr=1), 1, state, theta, [np.ones(2)], Workspace(NUMPY, 1))


def test_the_cosine_schedule_at_points_known_by_hand():
    """The initial rate at epoch 0, the middle at t_max / 2, eta_min at t_max, and after that the way back up."""
    schedule = Cosine(t_max=80, eta_min=0.1)
    wanted = {0: 0.9, 20: 0.1 + 0.4 * (1 + math.sqrt(0.5)), 40: 0.5, 60: 0.1 + 0.4 * (1 - math.sqrt(0.5)), 80: 0.1,
              100: 0.1 + 0.4 * (1 - math.sqrt(0.5)), 160: 0.9}  # fmt: skip
    for epoch, lr in wanted.items():
        assert learning_rate(schedule, 0.9, epoch) == pytest.approx(lr, rel=1e-14)


def test_the_cosine_schedule_of_the_papers_rises_again_after_epoch_85():
    rates = [learning_rate(Cosine(), 0.04, epoch) for epoch in range(90)]
    assert rates[0] == 0.04
    assert rates[85] == pytest.approx(1e-5, rel=1e-12)
    steps = np.diff(rates)
    assert (steps[:85] < 0).all()
    assert (steps[85:] > 0).all()
    assert rates[89] == pytest.approx(rates[81], rel=1e-12)


def test_the_constant_schedule_is_constant():
    assert {learning_rate(Constant(), 0.04, epoch) for epoch in range(100)} == {0.04}


def test_the_step_schedule_divides_after_each_of_its_epochs():
    """Entries are numbers of finished epochs: with [2, 3], the third epoch is the first at a lower rate."""
    rates = [learning_rate(Staircase(epochs=(2, 3), factor=4), 0.8, epoch) for epoch in range(6)]
    assert rates == [0.8, 0.8, 0.2, 0.05, 0.05, 0.05]


def test_a_step_schedule_beyond_all_numbers_ends_at_zero():
    rates = [learning_rate(Staircase(epochs=(1, 2), factor=1e200), 0.8, epoch) for epoch in range(3)]
    assert rates == [0.8, 0.8 / 1e200, 0]


@pytest.mark.parametrize("schedule", [Constant, Cosine, partial(Staircase, epochs=(1,))])
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_warm_up_multiplies_any_schedule_by_a_ramp_that_ends_at_1(schedule, epoch):
    whole = learning_rate(schedule(), 0.4, epoch)
    rates = [learning_rate(schedule(warmup_steps=4), 0.4, epoch, step) for step in range(7)]
    assert rates == pytest.approx([whole * share for share in (0.25, 0.5, 0.75, 1, 1, 1, 1)], rel=1e-15)
    assert rates[3:] == [whole] * 4


@pytest.mark.parametrize("optimizer", [SGD(lr=1), Adam(lr=1, epsilon=(0.1, 0.3))])
def test_every_block_has_its_own_rate_and_epsilon(optimizer):
    """The four parameters are the weights and biases of two blocks, each with a gradient of 2."""
    theta, gradients = ([np.full(1, value) for _ in range(4)] for value in (1.0, 2.0))
    apply_updates(optimizer, [0.1, 0.2], init_optimizer(optimizer, theta), theta, gradients, Workspace(NUMPY, 1))
    lost = [0.1 * 2, 0.2 * 2] if isinstance(optimizer, SGD) else [0.1 * 2 / 2.1, 0.2 * 2 / 2.3]
    np.testing.assert_allclose(np.concatenate(theta), 1 - np.repeat(lost, 2), rtol=1e-14)


def test_schedule_and_warm_up_act_on_the_rates_of_all_blocks():
    assert learning_rates(Constant(warmup_steps=4), (0.4, 0.8), 0, 1) == pytest.approx([0.2, 0.4], rel=1e-15)
    assert learning_rates(Cosine(t_max=2, eta_min=0.0), (0.4, 0.8), 1, 9) == pytest.approx([0.2, 0.4], rel=1e-15)
