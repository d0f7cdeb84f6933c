"""Angles and relative distances against known values, and NaN where they are undefined."""

import math

import numpy as np
import pytest
from samples import rng

from arraytp.training.compare import angle_degrees, norm_ratio, relative_distance


@pytest.mark.parametrize("degrees", [0, 1, 30, 45, 60, 90, 120, 179, 180])
def test_the_angle_of_two_vectors_in_a_plane(place, degrees):
    a = np.array([[3.0, 0.0]])
    b = 7 * np.array([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
    assert angle_degrees(place.put(a), place.put(b)) == pytest.approx(degrees, abs=1e-12)


@pytest.mark.parametrize("radians", [1e-4, 1e-8, 1e-12])
def test_small_angles_keep_their_digits(place, radians):
    a, b = np.array([1.0, 0.0]), np.array([math.cos(radians), math.sin(radians)])
    assert angle_degrees(place.put(a), place.put(b)) == pytest.approx(math.degrees(radians), rel=1e-12)
    assert 180 - angle_degrees(place.put(a), place.put(-b)) == pytest.approx(math.degrees(radians), abs=1e-12)


def test_the_angle_does_not_depend_on_length_or_order():
    a, b = rng(1).standard_normal((3, 3, 2, 4)), rng(2).standard_normal((3, 3, 2, 4))
    assert angle_degrees(a, b) == pytest.approx(angle_degrees(1e-6 * b, 1e6 * a), rel=1e-12)


def test_equal_arrays_have_no_angle_and_multiples_none_beyond_rounding(place):
    """With the arc cosine, an error in the last bit of the inner product would become 1e-6 degrees."""
    for seed in range(20):
        a = place.put(rng(seed).standard_normal(1000))
        assert angle_degrees(a, a.copy()) == 0
        assert angle_degrees(a, 3 * a) == pytest.approx(0, abs=1e-12)
        assert angle_degrees(a, -a) == pytest.approx(180, abs=1e-12)


def test_single_precision_is_measured_in_double():
    """In float32, the square of 1e30 overflows and that of 1e-30 underflows."""
    for size in (1e30, 1e-30):
        a, b = np.array([size, 0], np.float32), np.array([size, size], np.float32)
        assert angle_degrees(a, b) == pytest.approx(45, abs=1e-5)
        assert relative_distance(a, b) == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_the_distance_is_relative_to_the_second(place):
    a, b = place.put(np.array([3.0, 4.0])), place.put(np.array([0.0, 2.0]))
    assert relative_distance(a, b) == pytest.approx(math.sqrt(13) / 2, rel=1e-15)
    assert relative_distance(b, a) == pytest.approx(math.sqrt(13) / 5, rel=1e-15)
    assert relative_distance(a, a) == 0


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_an_undefined_angle_is_nan(place, bad):
    good, bad = place.put(np.array([1.0, 2.0])), place.put(np.array(bad))
    assert math.isnan(angle_degrees(good, bad))
    assert math.isnan(angle_degrees(bad, good))
    assert math.isnan(relative_distance(good, bad))


def test_the_distance_of_zero_from_something_is_one():
    assert relative_distance(np.zeros(3), np.ones(3)) == 1
    assert math.isnan(relative_distance(np.array([math.nan]), np.ones(1)))


def test_arrays_of_two_places_are_refused(device):
    host = np.ones(3)
    with pytest.raises(TypeError, match=r"arrays of \w+ and \w+ cannot be mixed"):
        angle_degrees(host, device.put(host))


def test_the_ratio_of_norms_is_that_of_numpy_and_undefined_for_a_zero_reference():
    a, b = rng(1).standard_normal((3, 4)), rng(2).standard_normal((3, 4))
    assert norm_ratio(a, b) == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b), rel=1e-14)
    assert norm_ratio(0 * a, b) == 0
    assert math.isnan(norm_ratio(a, 0 * b))
    assert math.isnan(norm_ratio(a * np.inf, b))
