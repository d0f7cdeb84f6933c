"""The regulariser λ·4(WWᵀ − I)W: finite differences of λ‖WWᵀ − I‖², what it touches, how it is added."""

from types import SimpleNamespace

import numpy as np
import pytest
from samples import close, rng

from arraytp.fast.orthogonality import add_orthogonality, excess_of
from arraytp.fast.parallel import Workspace
from arraytp.optim import apply_updates, init_optimizer
from arraytp.options import SGD, Adam


def penalty(w, strength):
    return strength * np.sum((w @ w.T - np.eye(len(w))) ** 2)


def added(place, strength, parameters, gradients, threads=2):
    totals = [place.backend.asarray(np.array(g)) for g in gradients]
    add_orthogonality(strength, [place.put(p) for p in parameters], totals, Workspace(place.backend, threads))
    return [place.get(array) for array in totals]


@pytest.mark.parametrize("order", [1, 3, 8, 21])
def test_it_is_the_gradient_of_the_penalty(place, order):
    w, v = rng(order).standard_normal((2, order, order))
    (found,) = added(place, 0.7, [w], [np.zeros_like(w)])
    step = 1e-6
    slope = (penalty(w + step * v, 0.7) - penalty(w - step * v, 0.7)) / (2 * step)
    assert np.vdot(found, v) == pytest.approx(slope, rel=1e-6)
    close(found, 0.7 * 4 * (w @ w.T - np.eye(order)) @ w, 1e-12)


def test_square_kernels_and_dense_weights_get_it_and_others_do_not(place):
    shapes = [(2, 2, 3, 12), (2, 2, 3, 5), (6, 6), (6, 4), (6,), (1,)]
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
def test_an_optimiser_steps_along_gradient_and_regulariser(optimizer):
    w, g = rng(0).standard_normal((2, 5, 5))
    total = g + 3 * 4 * (w @ w.T - np.eye(5)) @ w
    found = []
    for options, gradient in ((optimizer(lr=0.1, orthogonality=3.0), g), (optimizer(lr=0.1), total)):
        theta, given = w.copy(), gradient.copy()
        apply_updates(options, 0.1, init_optimizer(options, [theta]), [theta], [given], Workspace(threads=2))
        close(given, total, 1e-13)
        found.append(theta)
    close(found[0], found[1], 1e-12)


def test_a_gradient_that_cannot_be_added_to_in_place_is_refused():
    w, g = rng(0).standard_normal((2, 5, 5))
    options, kept = SGD(lr=0.1, orthogonality=3.0), w.copy()
    with pytest.raises(ValueError, match=r"parameter 0: .*its gradient: float64\[5, 5\], C-contiguous: False"):
        apply_updates(options, 0.1, init_optimizer(options, [w]), [w], [g.T], Workspace(threads=2))
    np.testing.assert_array_equal(w, kept)


def test_an_excess_that_is_given_is_used(place):
    """By the block's position, for its weight; the others' is computed."""
    w, g = rng(3).standard_normal((2, 7, 7))
    parameters = [place.put(a) for a in (w, g[0], 2 * w, g[1])]
    workspace = Workspace(place.backend, 2)
    found = []
    for excess in (None, excess_of({1: place.put(w)}, workspace)):
        totals = [place.backend.asarray(a.copy()) for a in (g, g[0], g, g[1])]
        add_orthogonality(0.5, parameters, totals, workspace, excess)
        found.append([place.get(a) for a in totals])
    np.testing.assert_array_equal(found[1][0], found[0][0])
    close(found[1][2], g + 2 * (w @ w.T - np.eye(7)) @ (2 * w), 1e-12)


def test_the_number_of_threads_changes_no_bit():
    """Of more than one part."""
    place = SimpleNamespace(put=np.array, get=np.array, backend=Workspace().backend)
    w, g = (rng(0).standard_normal((2, 700, 700)) / 26).astype("float32")
    close(added(place, 1.0, [w], [g], 1)[0], g + 4 * (w @ w.T - np.eye(700, dtype="float32")) @ w, 1e-5)
    assert added(place, 1.0, [w], [g], 1)[0].tobytes() == added(place, 1.0, [w], [g], 3)[0].tobytes()
