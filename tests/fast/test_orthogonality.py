"""The regulariser λ·4(WWᵀ − I)W: finite differences of λ‖WWᵀ − I‖², what it touches, how it is added."""

from types import SimpleNamespace

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, random_network, rng
from training import trainer

from arraytp.backend import NUMPY
from arraytp.fast.orthogonality import GramErrors, add_orthogonality
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Network
from arraytp.model.plain import PlainGramErrors
from arraytp.options import SGD, Adam, Dense


def excess(w):
    """Return E, of the order of W's smaller side."""
    gram = w.T @ w if len(w) > w.shape[1] else w @ w.T
    return gram - np.eye(len(gram))


def penalty(w, strength):
    return strength * np.sum(excess(w) ** 2)


def network_of(weights):
    """Return a network with these weights, whose blocks have only the attribute that the regulariser reads."""
    blocks = tuple(SimpleNamespace(is_square=int(np.prod(w.shape[:-1])) == w.shape[-1]) for w in weights)
    return Network(blocks, list(weights))


def added(place, strength, weights, gradients, threads=2, on="square"):
    totals, workspace = [place.backend.asarray(np.array(g)) for g in gradients], Workspace(place.backend, threads)
    network = network_of([place.put(w) for w in weights])
    add_orthogonality(strength, network, totals, GramErrors(workspace, network), workspace, on)
    return [place.get(array) for array in totals]


@pytest.mark.parametrize("order", [1, 3, 8, 21])
def test_it_is_the_gradient_of_the_penalty(place, order):
    w, v = rng(order).standard_normal((2, order, order))
    (found,) = added(place, 0.7, [w], [np.zeros_like(w)])
    step = 1e-6
    slope = (penalty(w + step * v, 0.7) - penalty(w - step * v, 0.7)) / (2 * step)
    assert np.vdot(found, v) == pytest.approx(slope, rel=1e-6)
    close(found, 0.7 * 4 * (w @ w.T - np.eye(order)) @ w, 1e-12)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 2, 5, 6), (2, 2, 2, 11), (600, 9), (9, 600), (530, 520)])
def test_of_any_other_matrix_it_is_the_gradient_of_the_smaller_penalty(place, shape):
    """It acts on all blocks but the first; sides of 600 and 530 are cut into several parts."""
    w, g, v = rng(7).standard_normal((3, *shape))
    w /= max(shape) ** 0.5
    first, found = added(place, 0.7, [w, w], [g, g], on="all-but-first")
    close(first, g, 0)
    matrix = w.reshape(-1, shape[-1])
    e = excess(matrix)
    wanted = matrix @ e if len(matrix) > shape[-1] else e @ matrix
    close(found, g + 0.7 * 4 * wanted.reshape(shape), 1e-12)
    step, direction = 1e-6, v.reshape(matrix.shape)
    slope = (penalty(matrix + step * direction, 0.7) - penalty(matrix - step * direction, 0.7)) / (2 * step)
    assert np.vdot(found - g, v) == pytest.approx(slope, rel=1e-5, abs=1e-6 * abs(slope).max())


def test_a_semi_orthogonal_matrix_is_left_alone(place):
    w = np.linalg.qr(rng(4).standard_normal((9, 4)))[0]
    for matrix in (w, np.ascontiguousarray(w.T)):
        zeros = np.zeros_like(matrix)
        assert np.abs(added(place, 100.0, [matrix] * 2, [zeros] * 2, on="all-but-first")[1]).max() < 1e-11


def test_square_kernels_and_dense_weights_get_it_and_others_do_not(place):
    shapes = [(2, 2, 3, 12), (2, 2, 3, 5), (6, 6), (6, 4), (1, 2)]
    parameters, gradients = ([rng(i, n).standard_normal(shape) for n, shape in enumerate(shapes)] for i in (0, 1))
    found = added(place, 2.0, parameters, gradients)
    for n, (theta, g, mine) in enumerate(zip(parameters, gradients, found, strict=True)):
        w = theta.reshape(-1, shapes[n][-1])
        extra = (8 * (w @ w.T - np.eye(len(w))) @ w).reshape(theta.shape) if n in (0, 2) else 0
        close(mine, g + extra, 1e-12)


def test_an_orthogonal_matrix_is_left_alone(place):
    w = np.linalg.qr(rng(4).standard_normal((9, 9)))[0]
    assert np.abs(added(place, 100.0, [w], [np.zeros_like(w)])[0]).max() < 1e-11


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_a_step_goes_along_gradient_and_regulariser(optimizer):
    """The regulariser is added to the updates in place, before momentum, moments and weight decay."""
    blocks = fitting_blocks([Dense(units=5, activation="tanh"), Dense(units=5), Dense(units=3)], (5,))
    x, labels = batch(blocks, 4)
    results = []
    for strength in (3.0, 0.0):
        runner = trainer(random_network(blocks), "bp", optimizer(lr=0.1, orthogonality=strength))
        _, one = runner.forward(x, labels)
        updates = runner.rule.propose(runner.options, runner.state, one)
        if not strength:
            for n in (0, 1):
                w = runner.network.weights[n]
                updates[n][0][...] += 3 * 4 * (w @ w.T - np.eye(5)) @ w
        runner.apply(one, updates)
        results.append([a.copy() for a in (*runner.network.parameters(), *(a for pair in updates for a in pair))])
    for regularised, by_hand in zip(*results, strict=True):
        close(regularised, by_hand, 1e-12)


def test_errors_are_those_of_the_formula_and_computed_once(place):
    """They are keyed by the block's number; on the host, only the upper triangle is computed and read."""
    weights = [rng(3, n).standard_normal((7 + n, 7)) for n in range(3)]
    network = network_of([place.put(w) for w in weights])
    errors = GramErrors(Workspace(place.backend, 2), network)
    first = errors.of([2])
    every = errors.of([0, 2])
    assert sorted(every) == [0, 2]
    assert every[2] is first[2]
    errors = PlainGramErrors(network)
    plain = errors.of([0, 2])
    assert errors.of([2])[2] is plain[2]
    for n, e in every.items():
        wanted = excess(weights[n])
        close(place.get(plain[n]), wanted, 1e-13)
        close(place.get(e), np.triu(wanted) if place.backend.on_host else wanted, 1e-13)


def test_the_plain_errors_give_the_same_regulariser(place):
    w, g = rng(3).standard_normal((2, 7, 7))
    network, workspace = network_of([place.put(w)]), Workspace(place.backend, 2)
    total = place.backend.asarray(g.copy())
    add_orthogonality(0.5, network, [total], PlainGramErrors(network), workspace)
    close(place.get(total), added(place, 0.5, [w], [g])[0], 1e-13)


def test_the_number_of_threads_changes_no_bit():
    """The matrix is large enough for several parts."""
    place = SimpleNamespace(put=np.array, get=np.array, backend=NUMPY)
    w, g = (rng(0).standard_normal((2, 700, 700)) / 26).astype("float32")
    close(added(place, 1.0, [w], [g], 1)[0], g + 4 * (w @ w.T - np.eye(700, dtype="float32")) @ w, 1e-5)
    assert added(place, 1.0, [w], [g], 1)[0].tobytes() == added(place, 1.0, [w], [g], 3)[0].tobytes()
