"""The fast iterations against the readable ones on the same noise, in double precision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ACTIVATIONS, NAMED, batch, chains, close, moved, named_blocks, random_network, rng

from arraytp.fast.feedback_training import freeze, ldrl_gradient, reconstruction_gradient
from arraytp.fast.modules import feedback_output, target_difference
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.architectures import plan_network
from arraytp.model.feedback import feedback_forward
from arraytp.ops.noise import gaussian
from arraytp.options import NetworkOptions
from arraytp.rules import dtp, ldrl

ROUNDING = 1e-12
SIGMA, KEY = 0.3, (7, 3)
UNPOOL = ("overwrite", "accumulate")


def omega_of(block, seed=0):
    generator = rng(seed, 5)
    weight = generator.standard_normal(block.weight_shape) * float(np.prod(block.weight_shape[:-1])) ** -0.5
    return weight, 0.3 * generator.standard_normal(block.in_shape[-1])


def noises(place, block, count, n, k):
    """Return ε and η of block n's iteration k, of which each has its own stream, as the place draws them."""
    shapes = (count, *block.in_shape), (count, *block.out_shape)
    empty = [place.backend.xp.empty(shape) for shape in shapes]
    return [place.get(gaussian(out, SIGMA, 0, *KEY, n, k, kind)) for kind, out in enumerate(empty)]


def check_blocks(place, blocks, count, unpool, seed=0, threads=2):
    """Compare both losses' gradients of every block with feedback, over three iterations."""
    network, (x, _) = random_network(blocks, seed), batch(blocks, count, seed)
    there = moved(network, place.put)
    workspace = Workspace(place.backend, threads)
    passed = forward(there, place.put(x), workspace)
    for n, block in list(enumerate(blocks))[1:]:
        s = place.get(passed.x[n]).reshape(count, *block.in_shape)
        theta, omega = (network.weights[n], network.biases[n]), omega_of(block, seed)
        carried = [place.put(part) for part in omega]
        frozen = freeze(there, passed, n, unpool, SIGMA, KEY, 3, workspace)
        for k in range(3):
            epsilon, eta = noises(place, block, count, n, k)
            gradient, loss = ldrl_gradient(frozen, carried[0], k, workspace)
            wanted, wanted_loss = ldrl.iteration(block, theta, omega, s, epsilon, eta, unpool)
            close(place.get(gradient), wanted, ROUNDING)
            # The loss costs a pass over ω: only the last iteration's is computed.
            assert (loss is None) == (k < 2)
            if loss is not None:
                assert float(loss) == pytest.approx(wanted_loss, rel=1e-10, abs=1e-12 * np.abs(wanted).sum())
        frozen = freeze(there, passed, n, unpool, SIGMA, KEY, 3, workspace)
        for k in range(3):
            epsilon, _ = noises(place, block, count, n, k)
            *found, loss = reconstruction_gradient(frozen, *carried, k, workspace)
            *wanted, wanted_loss = dtp.iteration(block, theta, omega, s, epsilon, unpool)
            for mine, exact in zip(found, wanted, strict=True):
                close(place.get(mine), exact, ROUNDING)
            assert float(loss) == pytest.approx(wanted_loss, rel=1e-12)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("name", NAMED)
def test_named_networks(place, name, unpool):
    check_blocks(place, named_blocks(name), 3, unpool)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_a_named_network(place, activation, unpool):
    """In windows of ReLU's zeros the first of them has the value."""
    options = NetworkOptions(name="lenet", activation=activation)
    check_blocks(place, plan_network(options, *NAMED["lenet"]), 3, unpool)


@pytest.mark.parametrize("unpool", UNPOOL)
@given(blocks=chains(largest=7), count=st.sampled_from([1, 2, 17, 33]), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_drawn_networks(place, blocks, count, seed, unpool):
    """Batches of 17 and 33 have a chunk of noise with a single sample."""
    check_blocks(place, blocks, count, unpool, seed)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("count", [1, 5, 33])
def test_threads_change_no_bit(unpool, count):
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, count)
    found = {}
    for threads in (1, 2, 3):
        workspace = Workspace(threads=threads)
        passed = forward(network, x, workspace)
        found[threads] = []
        for n, block in list(enumerate(blocks))[1:]:
            for gradients in (ldrl_gradient, reconstruction_gradient):
                frozen = freeze(network, passed, n, unpool, SIGMA, KEY, 2, workspace)
                omega = omega_of(block)[: 1 if gradients is ldrl_gradient else 2]
                arrays = [a for k in range(2) for a in gradients(frozen, *omega, k, workspace) if a is not None]
                found[threads] += [a.tobytes() for a in arrays]
    assert found[1] == found[2] == found[3]


def test_iterations_may_come_in_any_order():
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    workspace = Workspace(threads=2)
    passed = forward(network, x, workspace)
    omega, _ = omega_of(blocks[1])
    orders = [0, 1, 2, 3], [3, 2, 1, 0], [3, 0, 2, 1]
    found = []
    for order in orders:
        frozen = freeze(network, passed, 1, "overwrite", SIGMA, KEY, 4, workspace)
        gradients = {k: ldrl_gradient(frozen, omega, k, workspace)[0].copy() for k in order}
        found.append([gradients[k].tobytes() for k in range(4)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 4


@pytest.mark.parametrize("unpool", UNPOOL)
@given(blocks=chains(largest=7), count=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_targets_are_the_modules(place, blocks, count, seed, unpool):
    """δ^n is G(s + δ) − G(s), and a target G(t): the literal formulas of the paper."""
    network, (x, _) = random_network(blocks, seed), batch(blocks, count, seed)
    workspace = Workspace(place.backend, 2)
    passed = forward(moved(network, place.put), place.put(x), workspace)
    for n, block in list(enumerate(blocks))[1:]:
        omega, s = omega_of(block, seed), place.get(passed.s[n + 1])
        index = None if passed.index[n] is None else place.get(passed.index[n])
        delta = 0.2 * rng(seed, n).standard_normal(s.shape)
        carried = [place.put(part) for part in omega]
        g = [feedback_forward(block, *omega, t, index, unpool) for t in (s + delta, s)]
        there = moved(network, place.put)
        found = target_difference(there, passed, n, carried[0], place.put(delta), unpool, workspace)
        assert found.shape == passed.x[n].shape
        scale = max(np.abs(g[0]).max(), 1.0)
        np.testing.assert_allclose(place.get(found).reshape(g[0].shape), g[0] - g[1], rtol=0, atol=1e-12 * scale)
        found = feedback_output(there, passed, n, tuple(carried), place.put(s + delta), unpool, workspace)
        assert found.shape == passed.x[n].shape
        close(place.get(found).reshape(g[0].shape), g[0], ROUNDING)
