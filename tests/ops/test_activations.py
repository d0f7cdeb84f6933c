"""Activations and derivatives against their scalar definitions, at the kink and in the tails."""

import gradients
import naive
import numpy as np
import pytest
from samples import ACTIVATIONS, apart, rng

from arraytp.ops.activations import (
    activation_backward,
    activation_derivative,
    activation_difference,
    activation_forward,
)

POINTS = np.array([0.0, -0.0, 1e-9, -1e-9, 1e-3, -1e-3, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 20.0, -20.0, 800.0, -800.0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_the_definition(place, name):
    found = place.get(activation_forward(place.put(POINTS), name))
    np.testing.assert_allclose(found, naive.each(naive.activation, POINTS, name), rtol=1e-15, atol=1e-24)


@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_single_precision_keeps_its_digits(place, name):
    """ELU is computed through tanh; 2 ulp are 2.4e-7, also where exp(z) − 1 would cancel."""
    z = np.concatenate([-np.logspace(-30, 4, 500), np.linspace(-90, 90, 500)]).astype(np.float32)
    found = place.get(activation_forward(place.put(z), name)).astype(np.float64)
    np.testing.assert_allclose(found, naive.each(naive.activation, z, name), rtol=2.5e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_the_definition(place, name):
    """Derivatives are read off s; 1 − s² loses digits only where tanh is flat."""
    z = POINTS[np.abs(POINTS) < 10]
    found = activation_derivative(activation_forward(place.put(z), name), name)
    wanted = naive.each(naive.derivative, z, name)
    found = np.ones_like(z) if found is None else place.get(found)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_the_slope_at_zero():
    zero = np.zeros(1)
    slopes = {name: activation_backward(np.ones(1), zero, name).item() for name in ACTIVATIONS}
    assert slopes == {"linear": 1, "leaky-relu": 1, "elu": 1, "relu": 0, "tanh": 1}


def test_leaky_relu_has_slope_a_tenth():
    assert activation_forward(np.array([-2.0]), "leaky-relu").item() == pytest.approx(-0.2, rel=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_finite_difference(name):
    z, r = apart((4, 5), 3), rng(4).standard_normal((4, 5))

    def loss(z):
        return float((np.sin(activation_forward(z, name)) * r).sum()), b""

    s = activation_forward(z, name)
    gradients.check(loss, z, activation_backward(np.cos(s) * r, s, name), rng(5))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_out_may_be_the_input_or_another_array(place, name, dtype):
    z, ds = (rng(6, n).standard_normal((3, 7)).astype(dtype) for n in range(2))
    asarray, empty = place.backend.asarray, place.backend.xp.empty
    s = activation_forward(place.put(z), name)
    dz = activation_backward(place.put(ds), s, name)
    assert s.dtype == dz.dtype == dtype
    own, other = asarray(z.copy()), empty(z.shape, dtype=dtype)
    for found, out in (
        (activation_forward(own, name, out=own), own),
        (activation_forward(place.put(z), name, out=other), other),
    ):
        assert found is out
        np.testing.assert_array_equal(place.get(out), place.get(s))
    own, other = asarray(ds.copy()), empty(z.shape, dtype=dtype)
    for found, out in (
        (activation_backward(own, s, name, out=own), own),
        (activation_backward(place.put(ds), s, name, out=other), other),
    ):
        assert found is out
        np.testing.assert_array_equal(place.get(out), place.get(dz))


def test_an_unknown_name_is_refused(place):
    z = place.put(np.zeros(1))
    for function in (activation_forward, activation_derivative):
        with pytest.raises(ValueError, match="unknown activation 'swish'"):
            function(z, "swish")


def test_a_nan_stays_a_nan(place):
    z = place.put(np.array([np.nan]))
    for name in ACTIVATIONS:
        assert np.isnan(place.get(activation_forward(z, name))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_difference_is_that_of_the_values(place, name):
    """From every point to every other one, over the kink and from it; 1e-15 is the rounding of values of size 1."""
    s, moved = (grid.ravel() for grid in np.meshgrid(POINTS, POINTS))
    found = place.get(activation_difference(place.put(s), place.put(moved - s), name))
    exact = naive.each(naive.activation, s + (moved - s), name) - naive.each(naive.activation, s, name)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-30])
def test_a_small_difference_keeps_its_digits_in_single_precision(place, name, size):
    """f(s + δ) − f(s) itself would leave none of them: s + δ = s."""
    s = apart((40,), 7).astype(np.float32)
    delta = (size * rng(8).standard_normal(40)).astype(np.float32)
    found = place.get(activation_difference(place.put(s), place.put(delta), name))
    slope = naive.each(naive.derivative, s, name)
    # Curvature adds terms of the order of δ, relative to the first; 1 − tanh² loses two digits at s = 2.
    np.testing.assert_allclose(found, slope * delta, rtol=10 * size + 5e-6)
    assert found.dtype == np.float32
