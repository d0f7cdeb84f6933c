"""The scripts that train like the authors' code where arraytp differs from it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from arraytp.config import load_one
from arraytp.rules import fa
from arraytp.rules.feedback import descent_of
from arraytp.training.build import build

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"runs/benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("window", "count"), [(1, 7), (3, 50), (50, 50), (1000, 50)])
def test_an_order_by_a_window_takes_every_image_once_and_none_too_early(window, count):
    order = script("gait_prop_code").windowed_order(window, count, 3, 2, shuffle=True)
    assert sorted(order) == list(range(count))
    assert all(image < position + window for position, image in enumerate(order))
    assert (order != np.arange(count)).any() == (window > 1)


def test_each_image_of_the_window_is_as_likely_to_come_next():
    windowed = script("gait_prop_code").windowed_order
    firsts = [windowed(4, 20, 0, epoch, shuffle=True)[0] for epoch in range(2000)]
    assert np.bincount(firsts) == pytest.approx(np.full(4, 500), abs=100)


def test_feedback_is_the_next_blocks_weights_where_shapes_agree():
    blocks = ", ".join(["{type: dense, units: 6, activation: leaky-relu}"] * 4 + ["{type: dense, units: 10}"])
    experiment = build(load_one(ROOT / "runs/quickstart.yml", [f"network={{blocks: [{blocks}]}}"], variant="fa"))
    network, backend = experiment.network, experiment.plan.backend
    state = script("gait_prop_code").next_weights(fa.Options(), network, 0, backend)
    own = fa.init_state(fa.Options(), network, 0, backend)
    for n in (1, 2):
        np.testing.assert_array_equal(state.weights[n], network.weights[n + 1])
        assert not np.shares_memory(state.weights[n], network.weights[n + 1])
    for n in (3, 4):
        np.testing.assert_array_equal(state.weights[n], own.weights[n])


def test_stale_gradients_go_on_while_blocks_above_are_trained():
    """Against Adam with coupled decay, written out: each iteration on a later block repeats a block's last gradient."""
    settings = ["data.dataset=fashion-mnist-10k", "data.normalize=dataset", "rule.feedback.iterations=[2, 3, 1]"]
    settings += ["rule.feedback.optimizer.weight_decay=0.1", "dtype=float64"]
    experiment = build(load_one(ROOT / "runs/dtp/figure-2-jmc.yml", settings, variant="drl"))
    training, state, module = experiment.config.rule.feedback, experiment.rule_state, script("drl_code")
    generator, expected, gradients = np.random.default_rng(0), {}, {}
    for n in (1, 2, 3):
        expected[n] = state.weights[n].copy()
        descent = descent_of(training, n, 0, experiment.workspace)
        for k in range(descent.iterations):
            gradient = generator.standard_normal(expected[n].shape)
            gradients.setdefault(n, []).append(gradient.copy())
            for below in range(1, n):
                gradients[below].append(gradients[below][-1])
            module.step_all(descent, state, n, k, {"weight": gradient})
            gradient[...] = np.nan
    assert [len(gradients[n]) for n in (1, 2, 3)] == [6, 4, 1]
    adam = training.optimizer
    for n, drawn in expected.items():
        theta, m, u = drawn, np.zeros_like(drawn), np.zeros_like(drawn)
        for t, gradient in enumerate(gradients[n], start=1):
            g = gradient + adam.weight_decay * theta
            m = adam.beta1 * m + (1 - adam.beta1) * g
            u = adam.beta2 * u + (1 - adam.beta2) * g**2
            theta = theta - adam.lr * (m / (1 - adam.beta1**t)) / (np.sqrt(u / (1 - adam.beta2**t)) + adam.epsilon)
        np.testing.assert_allclose(state.weights[n], theta, rtol=1e-12, atol=1e-14)
