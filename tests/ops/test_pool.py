"""Max-pooling against loops: overlaps, gaps, borders, ties; its adjoint by identity and finite differences."""

import gradients
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from samples import apart, image_cases, rng

from arraytp.ops.patches import make_window
from arraytp.ops.pool import (
    max_pool_backward,
    max_pool_forward,
    max_pool_scatter,
    max_unpool,
    max_unpool_scatter,
    overlaps,
    window_corners,
)


def drawn(case, ties=False):
    shape = (case.batch, case.window.height, case.window.width, case.channels)
    return rng(case.seed).integers(-1, 2, shape).astype(float) if ties else apart(shape, case.seed)


@given(case=image_cases(pooling=True))
@settings(max_examples=20)
def test_forward_and_backward_are_the_loops(place, case):
    s = drawn(case)
    out, index = max_pool_forward(place.put(s), case.window)
    wanted_out, wanted_index = naive.max_pool(s, case.window)
    np.testing.assert_array_equal(place.get(out), wanted_out)
    np.testing.assert_array_equal(place.get(index), wanted_index)
    dout = rng(case.seed, 1).standard_normal(out.shape)
    found = place.get(max_pool_backward(place.put(dout), index, case.window))
    np.testing.assert_allclose(found, naive.max_pool_backward(dout, wanted_index, case.window), rtol=0, atol=1e-13)


@given(case=image_cases(pooling=True))
@settings(max_examples=20)
def test_the_first_of_equal_maxima_wins(place, case):
    s = drawn(case, ties=True)
    out, index = max_pool_forward(place.put(s), case.window)
    wanted_out, wanted_index = naive.max_pool(s, case.window)
    np.testing.assert_array_equal(place.get(out), wanted_out)
    np.testing.assert_array_equal(place.get(index), wanted_index)


@given(case=image_cases(pooling=True))
@settings(max_examples=20)
def test_used_buffers_give_the_same(place, case):
    window, xp = case.window, place.backend.xp
    s = place.put(drawn(case))
    out, index = max_pool_forward(s, window)
    bordered = xp.full((case.batch, *window.bordered, case.channels), -np.inf)
    stack = xp.full((window.kernel**2, *out.shape), 7.0)
    used = xp.full(out.shape, 5.0), xp.full(out.shape, 3, dtype=np.uint8)
    for _ in range(2):
        found = max_pool_forward(s, window, *used, bordered, stack)
        assert found[0] is used[0]
        assert found[1] is used[1]
        np.testing.assert_array_equal(place.get(used[0]), place.get(out))
        np.testing.assert_array_equal(place.get(used[1]), place.get(index))


@given(case=image_cases(pooling=True))
@settings(max_examples=50)
def test_the_scatter_of_the_host_is_the_backward_pass(case):
    out, index = max_pool_forward(drawn(case), case.window)
    dout = rng(case.seed, 1).standard_normal(out.shape)
    corner = window_corners(case.batch, case.window, case.channels)
    ds = np.full((case.batch, case.window.height, case.window.width, case.channels), 7.0)
    max_pool_scatter(dout, index, case.window, corner, np.empty(out.shape, np.intp), ds)
    np.testing.assert_allclose(ds, max_pool_backward(dout, index, case.window), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 4, 5, 7, 8])
def test_a_diverged_map_comes_through_the_backward_pass_as_nan(size):
    """If all elements are NaN, none equals the maximum; its index must not be looked up beyond the image."""
    window = make_window(size, size, 3, 2, 1)
    _, index = max_pool_forward(np.full((2, size, size, 3), np.nan), window)
    dout = np.full(index.shape, np.nan)
    ds = np.empty((2, size, size, 3))
    max_pool_scatter(dout, index, window, window_corners(2, window, 3), np.empty(index.shape, np.intp), ds)
    assert np.isnan(ds).any()


@given(case=image_cases(pooling=True))
@settings(max_examples=25)
def test_backward_is_the_finite_difference(case):
    s = drawn(case)
    out, index = max_pool_forward(s, case.window)
    r = rng(case.seed, 2).standard_normal(out.shape)

    def loss(s):
        out, index = max_pool_forward(s, case.window)
        return float((np.sin(out) * r).sum()), index.tobytes()

    gradients.check(loss, s, max_pool_backward(np.cos(out) * r, index, case.window), rng(case.seed, 3))


@given(case=image_cases(pooling=True))
@settings(max_examples=50)
def test_backward_is_the_adjoint_of_picking_the_maxima(case):
    """With the choice of maxima fixed, pooling is linear: ⟨pool s, y⟩ = ⟨s, unpool y⟩."""
    s = drawn(case)
    out, index = max_pool_forward(s, case.window)
    y = rng(case.seed, 4).standard_normal(out.shape)
    np.testing.assert_allclose(
        np.vdot(out, y), np.vdot(s, max_pool_backward(y, index, case.window)), rtol=1e-10, atol=1e-9
    )


def test_negative_numbers_win_over_the_border(place):
    s = np.full((1, 2, 2, 1), -3.0)
    out, index = max_pool_forward(place.put(s), make_window(2, 2, 3, 2, 1))
    assert place.get(out).item() == -3.0
    assert place.get(index).item() == 4  # The window's centre is the first pixel of the image.


def test_overlapping_windows_add_their_gradients_up():
    s = np.zeros((1, 3, 3, 1))
    s[0, 1, 1] = 1
    _, index = max_pool_forward(s, make_window(3, 3, 2, 1, 0))
    ds = max_pool_backward(np.array([1.0, 2, 4, 8]).reshape(1, 2, 2, 1), index, make_window(3, 3, 2, 1, 0))
    assert ds[0, 1, 1, 0] == 15
    assert ds.sum() == 15


def test_the_largest_kernel_counts_to_224_and_a_larger_one_is_refused(place):
    s = np.zeros((1, 16, 16, 1))
    s[0, 14, 14] = 1
    _, index = max_pool_forward(place.put(s), make_window(16, 16, 15, 15, 0))
    assert place.get(index).item() == 224
    with pytest.raises(ValueError, match="max-pool kernel 16 is larger than 15"):
        max_pool_forward(place.put(s), make_window(16, 16, 16, 1, 0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_stays(place, dtype):
    window = make_window(4, 4, 2, 2, 0)
    out, index = max_pool_forward(place.put(np.ones((1, 4, 4, 2), dtype)), window)
    assert (out.dtype, index.dtype) == (np.dtype(dtype), np.uint8)
    assert max_pool_backward(out, index, window).dtype == dtype


@pytest.mark.parametrize("mode", ["overwrite", "accumulate"])
@given(case=image_cases(pooling=True))
@settings(max_examples=20)
def test_unpooling_is_the_loop(place, mode, case):
    _, index = max_pool_forward(drawn(case), case.window)
    t = rng(case.seed, 5).standard_normal(index.shape)
    found = place.get(max_unpool(place.put(t), place.put(index), case.window, mode))
    np.testing.assert_allclose(found, naive.max_unpool(t, index, case.window, mode), rtol=0, atol=1e-13)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_unpooling_scatter_of_the_host_overwrites_bit_for_bit(kernel, stride, padding):
    """Test every kind of overlap, and twice, since workspaces are reused."""
    if 2 * padding > kernel:
        pytest.skip("no such pool")
    window = make_window(7, 6, kernel, stride, padding)
    corner, out = window_corners(2, window, 3), np.full((2, 7, 6, 3), 7.0)
    for seed in range(2):
        _, index = max_pool_forward(apart((2, 7, 6, 3), seed), window)
        t = rng(seed, 1).standard_normal(index.shape)
        max_unpool_scatter(t, index, window, corner, np.empty(index.shape, np.intp), out)
        np.testing.assert_array_equal(out, max_unpool(t, index, window, "overwrite"))
        assert overlaps(window) or np.array_equal(out, max_unpool(t, index, window, "accumulate"))


@given(case=image_cases(pooling=True))
@settings(max_examples=50)
def test_accumulating_is_the_adjoint_of_picking_the_maxima(case):
    s = drawn(case)
    out, index = max_pool_forward(s, case.window)
    y = rng(case.seed, 4).standard_normal(out.shape)
    np.testing.assert_allclose(
        np.vdot(max_unpool(y, index, case.window, "accumulate"), s), np.vdot(y, out), rtol=1e-10, atol=1e-9
    )


def test_the_last_of_the_windows_over_a_pixel_wins(place):
    window = make_window(3, 3, 2, 1, 0)
    s = np.zeros((1, 3, 3, 1))
    s[0, 1, 1] = 1
    _, index = max_pool_forward(place.put(s), window)
    t = place.put(np.array([1.0, 2, 4, 8]).reshape(1, 2, 2, 1))
    assert place.get(max_unpool(t, index, window, "overwrite"))[0, 1, 1, 0] == 8
    assert place.get(max_unpool(t, index, window, "accumulate"))[0, 1, 1, 0] == 15
