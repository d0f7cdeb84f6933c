"""Feedback losses and local forward losses by central differences; G is the reverse of F where it can be."""

import numpy as np
import pytest
from feedback_blocks import LAYERS, made, noise, output
from gradients import check
from samples import rng

from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.feedback import feedback_forward, input_difference, picked
from arraytp.model.network import Network, block_forward
from arraytp.ops.pool import max_pool_backward
from arraytp.rules import drl, dtp, ldrl

UNPOOL = ("overwrite", "accumulate")
ACTIVATIONS = ("elu", "tanh", "leaky-relu")
SIGMA = 0.3


def signs(*arrays):
    return b"".join((array >= 0).tobytes() for array in arrays)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_reconstruction_losss_gradients_are_its_differences(name, activation, unpool):
    """(1/B) Σ ‖s + ε − G(F(s + ε))‖², with G's bias: DTP and TP."""
    block, theta, (omega, bias), s = made(name, activation, 3)
    epsilon, _ = noise(block, 3, SIGMA)
    after, index = output(block, theta, s + epsilon)

    def loss(w, b):
        r = feedback_forward(block, w, b, after, index, unpool)
        return float(np.square(s + epsilon - r).sum()) / 3, b""

    dweight, dbias, value = dtp.iteration(block, theta, (omega, bias), s, epsilon, unpool)
    assert float(value) == pytest.approx(loss(omega, bias)[0], rel=1e-13)
    check(lambda w: loss(w, bias), omega, dweight, rng(1))
    check(lambda b: loss(omega, b), bias, dbias, rng(2))


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_difference_reconstruction_losss_gradient_is_its_difference(name, activation, unpool):
    """Eq. 13, twice; G's bias cancels, so its derivative is 0."""
    block, theta, (omega, bias), s = made(name, activation, 3)
    epsilon, eta = noise(block, 3, SIGMA)
    (clean, index), (noisy, noisy_index) = output(block, theta, s), output(block, theta, s + epsilon)

    def loss(w, b):
        g = [feedback_forward(block, w, b, t, i, unpool)
             for t, i in ((noisy, noisy_index), (clean, index), (clean + eta, index))]  # fmt: skip
        return float(-2 * (epsilon * (g[0] - g[1])).sum() + np.square(g[2] - g[1]).sum()) / 3, b""

    dweight, value = ldrl.iteration(block, theta, (omega, bias), s, epsilon, eta, unpool)
    assert float(value) == pytest.approx(loss(omega, bias)[0], rel=1e-11)
    check(lambda w: loss(w, bias), omega, dweight, rng(1))
    check(lambda b: loss(omega, b), bias, np.zeros_like(bias), rng(2))


@pytest.mark.parametrize("unit", ["dense", "conv"])
def test_direct_feedbacks_gradient_is_its_difference(unit):
    """(1/σ²) mean of ((Q ŷ_ε + s − Q ŷ) − (s + ε))² over batch and units."""
    block, _, _, s = made(unit, "tanh", 5)
    epsilon, _ = noise(block, 5, SIGMA)
    q = rng(3).standard_normal((4, s[0].size))
    before, after = rng(4).standard_normal((2, 5, 4))

    def loss(q):
        r = after @ q + s.reshape(5, -1) - before @ q
        return float(np.square(r - (s + epsilon).reshape(5, -1)).mean()) / SIGMA**2, b""

    gradient, value = drl.iteration(q, after - before, epsilon, SIGMA, Workspace())
    assert float(value) == pytest.approx(loss(q)[0], rel=1e-12)
    check(loss, q, gradient, rng(1))


@pytest.mark.parametrize("divide_by_beta", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_local_updates_is_the_gradient_of_its_local_loss(name, activation, divide_by_beta):
    """(1/B) Σ ½ ‖F(s) − t‖², t constant; Eq. 6 has 1/(2β)."""
    block, theta, _, s = made(name, activation, 3)
    network = Network((block,), [theta[0]], [theta[1]])
    workspace = Workspace()
    passed = forward(network, s, workspace)
    t = passed.s[1] + 0.3 * rng(7).standard_normal(passed.s[1].shape)
    options = dtp.Options(beta=0.4, divide_by_beta=divide_by_beta)

    def loss(weight, bias):
        z, out, index = block_forward(block, weight, bias, s)
        value = float(np.square(out - t).sum()) / 2 / 3 / (0.4 if divide_by_beta else 1)
        return value, signs(z) + (b"" if index is None else index.tobytes())

    dweight, dbias = dtp.local_update(options, network, passed, 0, t - passed.s[1], workspace)
    check(lambda w: loss(w, theta[1]), theta[0], dweight, rng(1))
    check(lambda b: loss(theta[0], b), theta[1], dbias, rng(2))


@pytest.mark.parametrize("name", LAYERS)
def test_with_the_forward_weight_and_accumulation_the_linear_module_is_the_adjoint(name):
    """⟨F(x + v) − F(x), y⟩ = ⟨v, G y⟩ for linear f, v too small to change a maximum."""
    block, theta, _, s = made(name, "linear", 2)
    out, index = output(block, theta, s)
    v, y = 1e-6 * rng(1).standard_normal(s.shape), rng(2).standard_normal(out.shape)
    moved, same = output(block, theta, s + v)
    assert index is None or np.array_equal(index, same)
    g = feedback_forward(block, theta[0], np.zeros(block.in_shape[-1]), y, index, "accumulate")
    assert np.vdot(moved - out, y) == pytest.approx(np.vdot(v, g), rel=1e-7)


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
