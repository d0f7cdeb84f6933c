"""The dense map against loops, adjoint identities and finite differences."""

import gradients
import naive
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import rng

from arraytp.ops.dense import dense_backward_input, dense_backward_weight, dense_forward

SIZES = {"count": st.integers(1, 5), "wide": st.integers(1, 6), "out": st.integers(1, 6), "seed": st.integers(0, 999)}


def drawn(count, wide, out, seed):
    shapes = ((count, wide), (wide, out), (out,), (count, out))
    return [rng(seed, n).standard_normal(shape) for n, shape in enumerate(shapes)]


@given(**SIZES)
@settings(max_examples=15)
def test_forward_and_gradients_are_the_sums(place, count, wide, out, seed):
    x, weight, bias, dz = drawn(count, wide, out, seed)
    z = dense_forward(place.put(x), place.put(weight), place.put(bias))
    np.testing.assert_allclose(place.get(z), naive.dense(x, weight, bias), rtol=0, atol=1e-13)
    dweight, dbias = dense_backward_weight(place.put(dz), place.put(x))
    np.testing.assert_allclose(place.get(dweight), sum(map(np.outer, x, dz)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(place.get(dbias), sum(dz), rtol=0, atol=1e-13)
    dx = place.get(dense_backward_input(place.put(dz), place.put(weight)))
    np.testing.assert_allclose(dx, naive.dense(dz, weight.T, np.zeros(wide)), rtol=0, atol=1e-13)


@given(**SIZES)
@settings(max_examples=20)
def test_gradients_are_finite_differences(count, wide, out, seed):
    x, weight, bias, r = drawn(count, wide, out, seed)

    def loss(x, weight, bias):
        return float((np.sin(dense_forward(x, weight, bias)) * r).sum()), b""

    dz = np.cos(dense_forward(x, weight, bias)) * r
    dweight, dbias = dense_backward_weight(dz, x)
    generator = rng(seed, 9)
    gradients.check(lambda x: loss(x, weight, bias), x, dense_backward_input(dz, weight), generator)
    gradients.check(lambda w: loss(x, w, bias), weight, dweight, generator)
    gradients.check(lambda b: loss(x, weight, b), bias, dbias, generator)


@given(**SIZES)
def test_both_backward_maps_are_adjoints(count, wide, out, seed):
    x, weight, _, dz = drawn(count, wide, out, seed)
    wanted = np.vdot(dense_forward(x, weight, np.zeros(out)), dz)
    np.testing.assert_allclose(np.vdot(x, dense_backward_input(dz, weight)), wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.vdot(weight, dense_backward_weight(dz, x)[0]), wanted, rtol=1e-10, atol=1e-10)
