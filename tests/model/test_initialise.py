"""Initial weights: bounds, variances, orthogonality, signs, and streams that share no number."""

import math

import numpy as np
import pytest
from samples import named_blocks

from arraytp.model.initialise import fans, initial_bias, initial_weight, make_network, orthogonal

SHAPES = [(40, 25), (25, 40), (30, 30), (3, 3, 4, 36), (3, 3, 4, 20), (3, 3, 4, 50), (1, 1, 8, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_weights_have_orthonormal_rows_or_columns(shape):
    matrix = initial_weight("orthogonal", shape, 0, "init", 0).reshape(-1, shape[-1])
    rows, columns = matrix.shape
    gram = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
    np.testing.assert_allclose(gram, np.eye(min(rows, columns)), atol=1e-13)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (7, 4), (4, 7)])
def test_the_sign_convention_makes_r_positive(rows, columns):
    """Q is Gram–Schmidt's, whose R = QᵀA has a positive diagonal, whatever signs the QR routine chooses."""
    a = np.random.default_rng(1).standard_normal((rows, columns))
    q = orthogonal(a)
    q, a = (q, a) if rows >= columns else (q.T, a.T)
    r = q.T @ a
    assert (np.diag(r) > 0).all()
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-13)
    first = a[:, 0] / np.linalg.norm(a[:, 0])
    np.testing.assert_allclose(q[:, 0], first, atol=1e-13)


@pytest.mark.parametrize("shape", [(400, 100), (5, 5, 20, 30)])
def test_xavier_normal_has_its_standard_deviation(shape):
    """The standard deviation of n numbers has a relative error of 1/√(2n); four times that is allowed."""
    weight = initial_weight("xavier-normal", shape, 0, "init", 0)
    taps = int(np.prod(shape[:-2]))
    wanted = math.sqrt(2 / (taps * shape[-2] + taps * shape[-1]))
    assert weight.std() == pytest.approx(wanted, rel=4 / math.sqrt(2 * weight.size))
    assert abs(weight.mean()) < 4 * wanted / math.sqrt(weight.size)
    # Normal, not uniform: 4.6 % lie beyond two standard deviations.
    assert np.mean(np.abs(weight) > 2 * wanted) == pytest.approx(0.0455, abs=0.01)


@pytest.mark.parametrize("shape", [(400, 100), (5, 5, 20, 30)])
def test_kaiming_uniform_fills_its_interval(shape):
    bound = 1 / math.sqrt(np.prod(shape[:-1]))
    weight, bias = (draw("kaiming-uniform", shape, 0, "init", 0) for draw in (initial_weight, initial_bias))
    assert bias.shape == shape[-1:]
    for drawn in (weight, bias):
        assert np.abs(drawn).max() <= bound
        assert drawn.max() > bound * (1 - 20 / drawn.size)
        assert drawn.min() < -bound * (1 - 20 / drawn.size)
        assert abs(drawn.mean()) < 4 * bound / math.sqrt(3 * drawn.size)


@pytest.mark.parametrize("init", ["xavier-normal", "orthogonal"])
def test_other_biases_are_zero(init):
    assert not initial_bias(init, (3, 3, 2, 5), 0, "init", 0).any()


def test_fans_count_the_taps():
    assert fans((7, 3)) == (7, 3)
    assert fans((5, 5, 2, 3)) == (50, 75)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="unknown initialisation 'zeros'"):
        initial_weight("zeros", (2, 2), 0, "init", 0)


@pytest.mark.parametrize("init", ["kaiming-uniform", "xavier-normal", "orthogonal"])
def test_weights_depend_on_seed_purpose_and_block_and_on_nothing_else(init):
    def draw(*arguments):
        return initial_weight(init, (6, 6), *arguments)

    np.testing.assert_array_equal(draw(0, "init", 1), draw(0, "init", 1))
    others = [draw(0, "init", 1), draw(1, "init", 1), draw(0, "feedback", 1), draw(0, "init", 2)]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert not np.isclose(a, b).any()


def test_weight_and_bias_share_no_number():
    weight, bias = (draw("kaiming-uniform", (1, 9), 0, "init", 0) for draw in (initial_weight, initial_bias))
    assert not np.isclose(weight.ravel(), bias).any()


@pytest.mark.parametrize("init", ["kaiming-uniform", "xavier-normal", "orthogonal"])
def test_a_network_is_the_same_on_every_place_and_rounded_from_double(computer, init):
    double = make_network(named_blocks("lenet"), init, 5, "float64")
    single = make_network(named_blocks("lenet"), init, 5, "float32", computer.backend)
    for wanted, found in zip(double.weights + double.biases, single.weights + single.biases, strict=True):
        np.testing.assert_array_equal(computer.get(found), wanted.astype(np.float32))
