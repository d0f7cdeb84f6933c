"""Feedback losses and local forward losses by central differences; G is the adjoint of F where it can be."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from feedback_blocks import LAYERS, SHAPES, at_block, iteration, made, output
from gradients import check
from samples import batch, fitting_blocks, random_network, rng
from training import fast, pass_of, plain

from arraytp.model.feedback import feedback_forward, input_difference, picked
from arraytp.model.plain import block_forward
from arraytp.ops.pool import max_pool_backward
from arraytp.options import Dense
from arraytp.rules import dtp
from arraytp.rules.protocol import Target

UNPOOL = ("overwrite", "accumulate")
ACTIVATIONS = ("elu", "tanh", "leaky-relu")
SIGMA = 0.3


ENGINES = pytest.mark.parametrize("engine", [fast, plain])


def signs(*arrays):
    return b"".join((array >= 0).tobytes() for array in arrays)


@ENGINES
@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_reconstruction_loss_match_finite_differences(name, activation, unpool, engine):
    """(1/B) Σ ‖s + ε − G(F(s + ε))‖², with G's bias: DTP and TP."""
    block, theta, (omega, bias), s = made(name, activation, 3)
    done = iteration("dtp", at_block(block, theta, s, engine()), (omega, bias), SIGMA, unpool=unpool)
    epsilon = done.noises["epsilon"]
    after, index = output(block, theta, s + epsilon)

    def loss(w, b):
        r = feedback_forward(block, w, b, after, index, unpool)
        return float(np.square(s + epsilon - r).sum()) / 3, b""

    assert float(done.loss) == pytest.approx(loss(omega, bias)[0], rel=1e-12)
    check(lambda w: loss(w, bias), omega, done.gradients["weight"], rng(1))
    check(lambda b: loss(omega, b), bias, done.gradients["bias"], rng(2))


@ENGINES
@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_the_difference_reconstruction_loss_matches_finite_differences(
    name, activation, unpool, engine
):
    """The loss is twice that of Eq. 13; G's bias cancels, so its derivative is 0."""
    block, theta, (omega, bias), s = made(name, activation, 3)
    done = iteration("ldrl", at_block(block, theta, s, engine()), (omega, bias), SIGMA, unpool=unpool)
    epsilon, eta = done.noises["epsilon"], done.noises["eta"]
    (clean, index), (noisy, noisy_index) = output(block, theta, s), output(block, theta, s + epsilon)

    def loss(w, b):
        g = [feedback_forward(block, w, b, t, i, unpool)
             for t, i in ((noisy, noisy_index), (clean, index), (clean + eta, index))]  # fmt: skip
        return float(-2 * (epsilon * (g[0] - g[1])).sum() + np.square(g[2] - g[1]).sum()) / 3, b""

    assert float(done.loss) == pytest.approx(loss(omega, bias)[0], rel=1e-11)
    check(lambda w: loss(w, bias), omega, done.gradients["weight"], rng(1))
    check(lambda b: loss(omega, b), bias, np.zeros_like(bias), rng(2))


@ENGINES
@pytest.mark.parametrize("unit", ["dense", "conv"])
def test_the_gradient_of_direct_feedback_matches_finite_differences(unit, engine):
    """(1/σ²) mean of ((Q ŷ_ε + s − Q ŷ) − (s + ε))² over batch and units, ŷ the logits computed from s."""
    network = random_network(fitting_blocks([LAYERS[unit], Dense(units=4, activation="tanh")], SHAPES[unit]))
    at = pass_of(network, batch(network.blocks, 5)[0], engine=engine(), seed=4).at(1)
    q = rng(3).standard_normal((4, at.s[0].size))
    done = iteration("drl", at, (q, None), SIGMA)
    s, epsilon = at.s, done.noises["epsilon"]
    after, before = (block_forward(at.block, at.weight, at.bias, each)[1] for each in (s + epsilon, s))

    def loss(q):
        r = after @ q + s.reshape(5, -1) - before @ q
        return float(np.square(r - (s + epsilon).reshape(5, -1)).mean()) / SIGMA**2, b""

    assert float(done.loss) == pytest.approx(loss(q)[0], rel=1e-12)
    check(loss, q, done.gradients["weight"], rng(1))


@ENGINES
@pytest.mark.parametrize("divide_by_beta", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_local_update_is_the_gradient_of_its_local_loss(name, activation, divide_by_beta, engine):
    """(1/B) Σ ½ ‖F(s) − t‖², t constant; Eq. 6 has 1/(2β)."""
    block, theta, _, s = made(name, activation, 3)
    at = at_block(block, theta, s, engine())
    t = at.output + 0.3 * rng(7).standard_normal(at.output.shape)
    options = dtp.Options(beta=0.4, divide_by_beta=divide_by_beta)

    def loss(weight, bias):
        z, out, index = block_forward(block, weight, bias, s)
        value = float(np.square(out - t).sum()) / 2 / 3 / (0.4 if divide_by_beta else 1)
        assert dtp.local_loss(options, block, out, t) == pytest.approx(value, rel=1e-14)
        return value, signs(z) + (b"" if index is None else index.tobytes())

    dweight, dbias = dtp.local_update(options, at, Target(t - at.output))
    check(lambda w: loss(w, theta[1]), theta[0], dweight, rng(1))
    check(lambda b: loss(theta[0], b), theta[1], dbias, rng(2))


@pytest.mark.parametrize("name", LAYERS)
def test_with_the_forward_weight_and_accumulation_the_linear_module_is_the_adjoint(name):
    """⟨F(x + v) − F(x), y⟩ = ⟨v, G y⟩ for linear f and v too small to change which elements are the maxima."""
    block, theta, _, s = made(name, "linear", 2)
    out, index = output(block, theta, s)
    v, y = 1e-6 * rng(1).standard_normal(s.shape), rng(2).standard_normal(out.shape)
    shifted, same = output(block, theta, s + v)
    assert index is None or np.array_equal(index, same)
    g = feedback_forward(block, theta[0], np.zeros(block.in_shape[-1]), y, index, "accumulate")
    assert np.vdot(shifted - out, y) == pytest.approx(np.vdot(v, g), rel=1e-7)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("name", LAYERS)
def test_a_small_target_difference_keeps_its_digits_in_single_precision(name, unpool):
    block, theta, _, s = made(name, "leaky-relu", 2)
    out, index = output(block, theta, s)
    delta = rng(3).standard_normal(out.shape)
    exact = input_difference(block, out, 1e-9 * delta, index, unpool)
    single = (out.astype(np.float32), (1e-9 * delta).astype(np.float32), index)
    found = input_difference(block, *single, unpool)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["pooled", "overlapping"])
def test_picking_is_the_adjoint_of_accumulating(name):
    block, theta, _, s = made(name, "elu", 2)
    out, index = output(block, theta, s)
    values, y = rng(1).standard_normal((2, *block.pre_shape)), rng(2).standard_normal(out.shape)
    found = np.vdot(picked(block, values, index), y)
    assert found == pytest.approx(np.vdot(values, max_pool_backward(y, index, block.pool)), rel=1e-12)


@pytest.fixture(scope="module")
def conditions():
    """Return the script that prints the conditions of fixed-weight DTP, as a module."""
    path = Path(__file__).parents[2] / "runs/benchmarks/fixed_weight_conditions.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jacobian(function, x, step=1e-5):
    """Return the dense Jacobian at x by central differences, with one column per element of x."""
    columns = []
    for unit in np.eye(x.size).reshape(-1, *x.shape):
        columns.append((function(x + step * unit) - function(x - step * unit)).ravel() / (2 * step))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ["elu", "tanh"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_product_of_the_jacobians_of_f_and_g_matches_finite_differences(name, activation, unpool, conditions):
    """∂F ∂G of fixed-weight DTP: each sample's matrix, and the trace that `jacobian_overlap` gives for all samples."""
    block, theta, (omega, bias), s = made(name, activation, 2)
    at, trace = at_block(block, theta, s), 0.0
    for b in range(2):
        after, index = output(block, theta, s[b : b + 1])
        dF = jacobian(lambda x: output(block, theta, x)[0], s[b : b + 1])
        dG = jacobian(lambda t, index=index: feedback_forward(block, omega, bias, t, index, unpool), after)
        found = conditions.product(at, omega, b, unpool)
        np.testing.assert_allclose(found, dF @ dG, atol=1e-7 * np.abs(dF @ dG).max())
        trace += np.trace(dF @ dG)
    N, _ = at.jacobian_overlap(unpool)
    assert (theta[0] * omega * N).sum() == pytest.approx(trace, rel=1e-7, abs=1e-7)
