"""The audit's own instruments: finite differences near kinks, adjoint identities, references against loops."""

import naive
import numpy as np
import pytest
from samples import rng

from arraytp.audit import reference
from arraytp.audit.check import apart, checked, worst
from arraytp.audit.differences import adjoint_error, derivative, gradient_error
from arraytp.audit.theorems import GROUPS, shrinking
from arraytp.config import Loss
from arraytp.ops.patches import make_window


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_a_kink_nearby_does_not_spoil_a_derivative(distance):
    estimate = derivative(lambda h: 3 * h + np.sin(h) + max(0.0, h - distance), 1.0)
    assert estimate == pytest.approx(4, abs=1e-7)


def test_estimates_that_are_mostly_rounding_do_not_win_by_agreeing_by_chance():
    """DRL's loss starts near 1 with a slope of 1e-4: at small steps, quotients are multiples of about 1e-16/h."""
    slopes = rng(1).uniform(0.5e-4, 2e-4, 300)
    estimates = np.array([derivative(lambda h, slope=slope: 1.003 + slope * h, slope) for slope in slopes])
    assert np.abs(estimates / slopes - 1).max() < 1e-6


@pytest.mark.parametrize("factor", [-1.0, 0.5, 2.0, 1 + 1e-4])
def test_a_wrong_gradient_is_off_by_as_much(factor):
    x = rng(1).standard_normal((3, 4))
    right = gradient_error(lambda v: float(np.sum(np.tanh(v))), x, 1 - np.tanh(x) ** 2, rng(2))
    wrong = gradient_error(lambda v: float(np.sum(np.tanh(v))), x, factor * (1 - np.tanh(x) ** 2), rng(2))
    assert right < 1e-7
    assert wrong > 0.1 * abs(factor - 1)


def test_one_wrong_entry_of_a_gradient_shows():
    x = rng(1).standard_normal(10000)
    gradient = 2 * x
    gradient[77] *= -1
    assert gradient_error(lambda v: float(v @ v), x, gradient, rng(2)) > 1e-4


def test_a_gradient_that_is_not_a_number_fails():
    assert not gradient_error(lambda v: float(v @ v), np.ones(3), np.full(3, np.nan), rng(2)) < 1


@pytest.mark.parametrize("errors", [(np.nan, 0.0), (0.0, np.nan), (1.0, np.nan, 2.0)])
def test_an_error_that_is_not_a_number_is_the_worst(errors):
    """Python's max of 0 and NaN is 0, which would pass."""
    assert np.isnan(worst(*errors))
    assert checked("", "", worst, worst(*errors), 1.0).verdict == "fail"


@pytest.mark.parametrize("freedom", [1, 2, 10, 1000])
def test_a_mean_that_closes_in_as_it_should_passes_and_a_bias_is_seen(freedom):
    """Groups have one sample; in norm, the bias is 0 or 8 standard errors of the mean, which are √(1/64) per entry."""
    generator = rng(freedom)
    for bias, most, least in ((0.0, 0, 0), (8.0, 300, 280)):
        shift, failed = bias * np.sqrt(freedom / GROUPS) * np.eye(1, freedom)[0], 0
        for _ in range(300):
            values = generator.standard_normal((GROUPS, freedom)) + shift
            growth, tolerance = shrinking(list((values**2).sum(axis=1)), float(np.linalg.norm(values.mean(axis=0))))
            failed += growth > tolerance
        assert least <= failed <= most


def test_a_mean_without_scatter_must_be_the_limit_itself():
    assert shrinking([0.0] * GROUPS, 0.0)[0] == 0
    assert shrinking([0.0] * GROUPS, 1e-300)[0] == np.inf


def test_nothing_is_relative_to_a_scale_of_nothing():
    assert gradient_error(lambda v: 0.0, np.ones(3), np.zeros(3), rng(2)) == 0
    assert gradient_error(lambda v: float(v @ v), np.ones(3), np.zeros(3), rng(2)) > 0.1


def test_a_transposed_matrix_is_no_adjoint():
    a, x, u = rng(1).standard_normal((4, 4)), rng(2).standard_normal(4), rng(3).standard_normal(4)
    assert adjoint_error(lambda v: a @ v, lambda w: a.T @ w, x, u) < 1e-14
    assert adjoint_error(lambda v: a @ v, lambda w: a @ w, x, u) > 0.01


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, "same"), (2, 3, 0), (5, 4, "same")])
def test_the_references_are_what_loops_compute(kernel, stride, padding):
    window = make_window(7, 6, kernel, stride, padding)
    x, weight, bias = (
        rng(1).standard_normal((2, 7, 6, 2)),
        rng(2).standard_normal((kernel, kernel, 2, 3)),
        rng(3).random(3),
    )
    z = naive.conv(x, weight, bias, window)
    assert apart(reference.conv(x, weight, bias, window), z) < 1e-14
    dz = rng(4).standard_normal(z.shape)
    assert apart(reference.conv_weight_gradient(dz, x, window), naive.conv_weight_gradient(dz, x, window)) < 1e-14
    assert (
        apart(reference.conv_input_gradient(dz, weight, window), naive.conv_input_gradient(dz, weight, window)) < 1e-14
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["cross-entropy", "mse"])
def test_the_change_of_the_loss_is_that_of_its_values(name, reduction):
    options = Loss(name=name, reduction=reduction, label_smoothing=0.2)
    base, labels = rng(1).standard_normal((3, 4)), np.array([0, 3, 2])
    changed = base + rng(2).standard_normal(base.shape)
    values = [reference.loss(options, logits, labels) for logits in (changed, base)]
    assert reference.loss_change(options, changed, base, labels) == pytest.approx(values[0] - values[1])


@pytest.mark.parametrize("mode", ["overwrite", "accumulate"])
def test_the_references_of_pooling_are_what_loops_compute(mode):
    window = make_window(7, 6, 3, 2, 1)
    s = rng(1).standard_normal((2, 7, 6, 2))
    out, index = naive.max_pool(s, window)
    maxima, places = reference.max_pool(s, window)
    np.testing.assert_array_equal(maxima, out)
    np.testing.assert_array_equal(places, index)
    t = rng(2).standard_normal(out.shape)
    np.testing.assert_allclose(reference.unpool(t, index, window, mode), naive.max_unpool(t, index, window, mode))
