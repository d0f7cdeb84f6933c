"""Convolution against loops, adjoint identities and finite differences, and its split form."""

import gradients
import naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from samples import image_cases, rng

from arraytp.ops.conv import (
    as_matrix,
    can_split,
    conv_backward_input,
    conv_backward_weight,
    conv_forward,
    split_matrix,
)
from arraytp.ops.patches import add_row_patches, im2col, make_window, row_patches, stack_rows


def drawn(case):
    """Return x, W, b and dz of a case."""
    window, generator = case.window, rng(case.seed)
    return (
        generator.standard_normal((case.batch, window.height, window.width, case.channels)),
        generator.standard_normal((window.kernel, window.kernel, case.channels, case.out_channels)),
        generator.standard_normal(case.out_channels),
        generator.standard_normal((case.batch, *naive.output_size(window), case.out_channels)),
    )


@given(case=image_cases())
@settings(max_examples=20)
def test_forward_is_the_direct_sum(place, case):
    x, weight, bias, _ = drawn(case)
    z, patches = conv_forward(place.put(x), place.put(weight), place.put(bias), case.window)
    np.testing.assert_allclose(place.get(z), naive.conv(x, weight, bias, case.window), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(place.get(patches), naive.im2col(x, case.window))


@given(case=image_cases())
@settings(max_examples=20)
def test_gradients_are_the_direct_sums(place, case):
    x, weight, _, dz = drawn(case)
    dweight, dbias = conv_backward_weight(place.put(dz), im2col(place.put(x), case.window))
    dx = conv_backward_input(place.put(dz), place.put(weight), case.window)
    wanted = naive.conv_weight_gradient(dz, x, case.window)
    np.testing.assert_allclose(place.get(dweight).reshape(weight.shape), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(place.get(dbias), dz.sum(axis=(0, 1, 2)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(place.get(dx), naive.conv_input_gradient(dz, weight, case.window), rtol=0, atol=1e-12)


@given(case=image_cases())
@settings(max_examples=50)
def test_both_backward_maps_are_adjoints(case):
    x, weight, _, dz = drawn(case)
    z, patches = conv_forward(x, weight, np.zeros(case.out_channels), case.window)
    dweight, _ = conv_backward_weight(dz, patches)
    wanted = np.vdot(z, dz)
    np.testing.assert_allclose(np.vdot(x, conv_backward_input(dz, weight, case.window)), wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.vdot(weight, dweight.reshape(weight.shape)), wanted, rtol=1e-10, atol=1e-10)


@given(case=image_cases())
@settings(max_examples=25)
def test_gradients_are_finite_differences(case):
    x, weight, bias, r = drawn(case)

    def loss(x, weight, bias):
        z, _ = conv_forward(x, weight, bias, case.window)
        return float((np.sin(z) * r).sum()), b""

    z, patches = conv_forward(x, weight, bias, case.window)
    dz = np.cos(z) * r
    dweight, dbias = conv_backward_weight(dz, patches)
    generator = rng(case.seed, 9)
    gradients.check(lambda x: loss(x, weight, bias), x, conv_backward_input(dz, weight, case.window), generator)
    gradients.check(lambda w: loss(x, w, bias), weight, dweight.reshape(weight.shape), generator)
    gradients.check(lambda b: loss(x, weight, b), bias, dbias, generator)


@given(case=image_cases(strides=1))
@settings(max_examples=50)
def test_the_split_gradients_are_the_gradients(place, case):
    assume(can_split(case.window))
    window, k = case.window, case.window.kernel
    x, weight, _, dz = drawn(case)
    stacked, patches = stack_rows(place.put(dz), window), row_patches(place.put(x), window)
    dx = add_row_patches(stacked @ split_matrix(place.put(weight)), window)
    dweight = patches.reshape(-1, patches.shape[-1]).T @ stacked.reshape(-1, stacked.shape[-1])
    turned = place.get(dweight).reshape(k, case.channels, k, case.out_channels)[:, :, ::-1].transpose(2, 0, 1, 3)
    np.testing.assert_allclose(turned, naive.conv_weight_gradient(dz, x, window), rtol=0, atol=1e-12)
    np.testing.assert_allclose(place.get(dx), naive.conv_input_gradient(dz, weight, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("stride", "padding", "flips"), [(1, 0, True), (1, 2, True), (1, "same", True), (1, 3, False), (2, 0, False)]
)
def test_only_stride_one_with_a_border_below_the_kernel_flips(stride, padding, flips):
    assert can_split(make_window(7, 7, 3, stride, padding)) is flips


def test_a_one_pixel_kernel_is_a_dense_layer_on_every_pixel():
    x, weight = rng(1).standard_normal((2, 3, 4, 5)), rng(2).standard_normal((1, 1, 5, 6))
    z, _ = conv_forward(x, weight, np.zeros(6), make_window(3, 4, 1, 1, 0))
    np.testing.assert_allclose(z, x @ weight[0, 0], rtol=1e-13, atol=1e-14)


def test_the_kernel_is_not_turned():
    """It is a cross-correlation, as in every framework: a kernel with one tap, above its centre, moves images down."""
    x = rng(1).standard_normal((1, 4, 4, 1))
    weight = np.zeros((3, 3, 1, 1))
    weight[0, 1] = 1
    z, _ = conv_forward(x, weight, np.zeros(1), make_window(4, 4, 3, 1, 1))
    np.testing.assert_array_equal(z[:, 1:], x[:, :-1])
    np.testing.assert_array_equal(z[:, 0], 0)


def test_the_matrix_of_a_kernel_is_a_view():
    weight = rng(1).standard_normal((2, 2, 3, 4))
    assert np.shares_memory(as_matrix(weight), weight)
    assert as_matrix(weight).shape == (12, 4)
