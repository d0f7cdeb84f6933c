"""Activations and derivatives against their scalar definitions, at the kink and in the tails."""

from typing import get_args

import gradients
import naive
import numpy as np
import pytest
from samples import ACTIVATIONS, apart, rng

from arraytp.ops.activations import ACTIVATIONS as VALUES
from arraytp.options import ActivationName

POINTS = np.array([0.0, -0.0, 1e-9, -1e-9, 1e-3, -1e-3, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 20.0, -20.0, 800.0, -800.0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_the_definition(place, name):
    found = place.get(VALUES[name](place.put(POINTS)))
    np.testing.assert_allclose(found, naive.each(naive.activation, POINTS, name), rtol=1e-15, atol=1e-24)


@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_single_precision_keeps_its_digits(place, name):
    """ELU is computed through tanh: its error is at most 2 ulp, 2.4e-7, even where exp(z) − 1 would cancel."""
    z = np.concatenate([-np.logspace(-30, 4, 500), np.linspace(-90, 90, 500)]).astype(np.float32)
    found = place.get(VALUES[name](place.put(z))).astype(np.float64)
    np.testing.assert_allclose(found, naive.each(naive.activation, z, name), rtol=2.5e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_the_definition(place, name):
    """Derivatives are computed from s; 1 − s² loses digits only where tanh is flat."""
    z = POINTS[np.abs(POINTS) < 10]
    derivative = VALUES[name].derivative
    wanted = naive.each(naive.derivative, z, name)
    found = np.ones_like(z) if derivative is None else place.get(derivative(VALUES[name](place.put(z))))
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_the_slope_at_zero():
    zero = np.zeros(1)
    slopes = {name: VALUES[name].backward(np.ones(1), zero).item() for name in ACTIVATIONS}
    assert slopes == {"linear": 1, "leaky-relu": 1, "elu": 1, "relu": 0, "tanh": 1}


def test_leaky_relu_has_slope_a_tenth():
    assert VALUES["leaky-relu"](np.array([-2.0])).item() == pytest.approx(-0.2, rel=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_finite_difference(name):
    z, r = apart((4, 5), 3), rng(4).standard_normal((4, 5))

    def loss(z):
        return float((np.sin(VALUES[name](z)) * r).sum()), b""

    s = VALUES[name](z)
    gradients.check(loss, z, VALUES[name].backward(np.cos(s) * r, s), rng(5))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_out_may_be_the_input_or_another_array(place, name, dtype):
    z, ds = (rng(6, n).standard_normal((3, 7)).astype(dtype) for n in range(2))
    asarray, empty = place.backend.asarray, place.backend.xp.empty
    activation = VALUES[name]
    s = activation(place.put(z))
    dz = activation.backward(place.put(ds), s)
    assert s.dtype == dz.dtype == dtype
    own, other = asarray(z.copy()), empty(z.shape, dtype=dtype)
    for found, out in (
        (activation(own, out=own), own),
        (activation(place.put(z), out=other), other),
    ):
        assert found is out
        np.testing.assert_array_equal(place.get(out), place.get(s))
    own, other = asarray(ds.copy()), empty(z.shape, dtype=dtype)
    for found, out in (
        (activation.backward(own, s, out=own), own),
        (activation.backward(place.put(ds), s, out=other), other),
    ):
        assert found is out
        np.testing.assert_array_equal(place.get(out), place.get(dz))


def test_the_table_has_what_configs_have():
    assert set(VALUES) == set(get_args(ActivationName))
    assert all(name == activation.name for name, activation in VALUES.items())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_inverse_undoes_the_function(place, name):
    """Where an inverse exists, it returns z up to the rounding error of s, which saturation amplifies by 1/D."""
    activation, z = VALUES[name], apart((40,), 9)
    if activation.inverse is None:
        assert name == "relu"
        return
    found = place.get(activation.inverse(activation(place.put(z))))
    slope = naive.each(naive.derivative, z, name)
    np.testing.assert_array_less(np.abs(found - z) * slope, 1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_range_is_that_of_the_values_and_what_lies_beyond_has_no_finite_inverse(name):
    activation = VALUES[name]
    low, high = activation.range
    # Only for z at which f is not saturated: at −50, ELU rounds to −1.
    s = activation(np.linspace(-15, 15, 301))
    assert s.min() > low
    assert s.max() < high
    for border in (low, high):
        if np.isfinite(border):
            with np.errstate(all="ignore"):
                assert not np.isfinite(activation.inverse(np.array([border]))).any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_curved_and_flat_are_said_of_those_that_are(name):
    """Curved: a difference quotient differs between two places of one sign. Flat: f is 0 below 0."""
    activation, z = VALUES[name], np.array([-0.5, -0.4, -0.3, 0.3, 0.4, 0.5])
    steps = np.diff(activation(z))
    assert activation.curved == (not np.isclose(steps[0], steps[1]) or not np.isclose(steps[3], steps[4]))
    assert activation.flat_below_zero == (not activation(-np.arange(5.0)).any())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_that_are_equal_after_the_bias_are_tied_before_it(place, name):
    """Then max-pooling z finds the first of ReLU's zeros, as max-pooling f(z + b) does; other z do not change."""
    z, bias = rng(10).standard_normal((1, 2, 3, 4)), rng(11).standard_normal(4)
    tied = place.backend.asarray(z.copy())
    VALUES[name].tie(tied, place.put(bias))
    after = place.get(tied)
    np.testing.assert_allclose(naive.each(naive.activation, after + bias, name),
                               naive.each(naive.activation, z + bias, name), rtol=1e-15, atol=1e-15)  # fmt: skip
    if name == "relu":
        assert (after + bias >= -1e-15).all()
        assert (after != z).any()
    else:
        np.testing.assert_array_equal(after, z)


def test_a_nan_stays_a_nan(place):
    z = place.put(np.array([np.nan]))
    for name in ACTIVATIONS:
        assert np.isnan(place.get(VALUES[name](z))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_difference_is_that_of_the_values(place, name):
    """Test every pair of points, also across the kink and from it; 1e-15 is the rounding error of values of size 1."""
    s, shifted = (grid.ravel() for grid in np.meshgrid(POINTS, POINTS))
    found = place.get(VALUES[name].difference(place.put(s), place.put(shifted - s)))
    exact = naive.each(naive.activation, s + (shifted - s), name) - naive.each(naive.activation, s, name)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["linear", "leaky-relu", "elu", "tanh"])
def test_a_difference_of_inverses_is_that_of_the_values(place, name):
    """Test every pair of points of the range, also across the kink and from it."""
    z = np.array([-3.0, -1.5, -0.2, -1e-3, 0.0, 1e-3, 0.4, 2.0])
    s = np.array([naive.activation(value, name) for value in z])
    (s_from, s_to), (z_from, z_to) = ([grid.ravel() for grid in np.meshgrid(values, values)] for values in (s, z))
    found = place.get(VALUES[name].inverse_difference(place.put(s_from), place.put(s_to - s_from)))
    np.testing.assert_allclose(found, z_to - z_from, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["linear", "leaky-relu", "elu", "tanh"])
@pytest.mark.parametrize("size", [1e-12, 1e-30])
def test_a_small_difference_of_inverses_keeps_its_digits_in_single_precision(place, name, size):
    z = apart((40,), 7)
    s, delta = naive.each(naive.activation, z, name).astype(np.float32), size * rng(8).standard_normal(40)
    found = place.get(VALUES[name].inverse_difference(place.put(s), place.put(delta.astype(np.float32))))
    np.testing.assert_allclose(found, delta / naive.each(naive.derivative, z, name), rtol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-30])
def test_a_small_difference_keeps_its_digits_in_single_precision(place, name, size):
    """Subtracting f(s) from f(s + δ) would lose them all where s + δ rounds to s."""
    s = apart((40,), 7).astype(np.float32)
    delta = (size * rng(8).standard_normal(40)).astype(np.float32)
    found = place.get(VALUES[name].difference(place.put(s), place.put(delta)))
    slope = naive.each(naive.derivative, s, name)
    # Curvature adds terms of relative order δ; 1 − tanh² loses two digits at s = 2.
    np.testing.assert_allclose(found, slope * delta, rtol=10 * size + 5e-6)
    assert found.dtype == np.float32
