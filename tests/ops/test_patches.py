"""im2col and col2im against loops, against each other, and SAME padding against its definition."""

import naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import image_cases, rng, windows

from arraytp.ops.patches import (
    Window,
    add_border,
    add_row_patches,
    add_stacked_rows,
    col2im,
    copy_runs,
    im2col,
    make_window,
    row_patches,
    same_border,
    stack_rows,
)


@given(case=image_cases())
@settings(max_examples=25)
def test_im2col_is_the_loop(place, case):
    x = rng(case.seed).standard_normal((case.batch, case.window.height, case.window.width, case.channels))
    np.testing.assert_array_equal(place.get(im2col(place.put(x), case.window)), naive.im2col(x, case.window))


@given(case=image_cases())
@settings(max_examples=25)
def test_col2im_is_the_loop(place, case):
    shape = (case.batch, *naive.output_size(case.window), case.window.kernel**2 * case.channels)
    dpatches = rng(case.seed).standard_normal(shape)
    found = place.get(col2im(place.put(dpatches), case.window))
    np.testing.assert_allclose(found, naive.col2im(dpatches, case.window), rtol=0, atol=1e-13)


@given(case=image_cases())
@settings(max_examples=50)
def test_col2im_is_the_adjoint_of_im2col(case):
    x = rng(case.seed, 0).standard_normal((case.batch, case.window.height, case.window.width, case.channels))
    patches = im2col(x, case.window)
    y = rng(case.seed, 1).standard_normal(patches.shape)
    np.testing.assert_allclose(np.vdot(patches, y), np.vdot(x, col2im(y, case.window)), rtol=1e-11, atol=1e-11)


@given(case=image_cases())
@settings(max_examples=25)
def test_used_buffers_give_the_same(place, case):
    window, xp = case.window, place.backend.xp
    x = place.put(rng(case.seed).standard_normal((case.batch, window.height, window.width, case.channels)))
    patches = im2col(x, window)
    bordered = xp.zeros((case.batch, *window.bordered, case.channels))
    for _ in range(2):
        out = xp.full(patches.shape, np.nan)
        assert im2col(x, window, out, bordered) is out
        np.testing.assert_array_equal(place.get(out), place.get(patches))
    dirty = xp.full(bordered.shape, 7.0)
    np.testing.assert_array_equal(place.get(col2im(patches, window, dirty)), place.get(col2im(patches, window)))


@given(shape=st.tuples(*[st.integers(1, 4)] * 4), dtype=st.sampled_from(["float32", "float64"]))
def test_copying_runs_copies_every_bit(place, shape, dtype):
    """NaNs with a payload and negative zeros too; the source overlaps itself, and the target has gaps."""
    numbers = rng(sum(shape)).integers(0, 256, 64 * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
    xp = place.backend.xp
    step = np.dtype(dtype).itemsize
    source = xp.lib.stride_tricks.as_strided(place.put(numbers), shape, (2 * step, step, 3 * step, step))
    target = xp.full((*shape[:3], shape[3] + 2), 7, dtype=dtype)
    copy_runs(source, target[..., 1:-1])
    found = place.get(target)
    assert found[..., 1:-1].tobytes() == np.ascontiguousarray(place.get(source)).tobytes()
    assert (found[..., 0] == 7).all()
    assert (found[..., -1] == 7).all()


def image_of(case):
    window = case.window
    return window, rng(case.seed).standard_normal((case.batch, window.height, window.width, case.channels))


@given(case=image_cases(strides=1))
@settings(max_examples=50)
def test_row_patches_are_the_rows_of_all_patches(place, case):
    """Row i of window (p, q) is the row patch of the pixel row p + i − top."""
    window, x = image_of(case)
    k, (height, width) = window.kernel, naive.output_size(window)
    found = place.get(row_patches(place.put(x), window))
    assert found.shape == (case.batch, window.height, width, k * case.channels)
    wanted = naive.im2col(x, window).reshape(case.batch, height, width, k, k * case.channels)
    for p in range(height):
        for i in range(k):
            if 0 <= p + i - window.top < window.height:
                np.testing.assert_array_equal(found[:, p + i - window.top], wanted[:, p, :, i])


@given(case=image_cases(strides=1))
@settings(max_examples=50)
def test_adding_row_patches_is_the_adjoint_of_taking_them(place, case):
    window, x = image_of(case)
    patches = row_patches(x, window)
    y = rng(case.seed, 1).standard_normal(patches.shape)
    out = place.backend.xp.full(x.shape, np.nan)
    added = place.get(add_row_patches(place.put(y), window, out))
    np.testing.assert_allclose(np.vdot(patches, y), np.vdot(x, added), rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(place.get(add_row_patches(place.put(y), window)), added)


@given(case=image_cases(strides=1))
@settings(max_examples=25)
def test_adding_stacked_rows_is_the_adjoint_of_stacking_them_on_top_of_what_is_there(place, case):
    window = case.window
    assume(max(window.top, window.bottom) < window.kernel)
    dz = rng(case.seed, 2).standard_normal((case.batch, *naive.output_size(window), case.out_channels))
    stacked = stack_rows(dz, window)
    y = rng(case.seed, 3).standard_normal(stacked.shape)
    out = place.backend.xp.ones(dz.shape)
    assert add_stacked_rows(place.put(y), window, out) is out
    np.testing.assert_allclose(np.vdot(stacked, y), np.vdot(dz, place.get(out) - 1), rtol=1e-10, atol=1e-10)


@given(case=image_cases(strides=1))
@settings(max_examples=25)
def test_row_operations_on_used_buffers_give_the_same(place, case):
    window, x = image_of(case)
    assume(max(window.top, window.bottom) < window.kernel)
    dz = rng(case.seed, 2).standard_normal((case.batch, *naive.output_size(window), case.out_channels))
    xp = place.backend.xp
    wide = xp.zeros((case.batch, window.height, window.bordered[1], case.channels))
    tall = xp.zeros((case.batch, window.height + window.kernel - 1, *dz.shape[2:]))
    for operation, array, bordered in ((row_patches, x, wide), (stack_rows, dz, tall)):
        wanted = operation(place.put(array), window)
        for _ in range(2):
            out = xp.full(wanted.shape, np.nan)
            assert operation(place.put(array), window, out, bordered) is out
            np.testing.assert_array_equal(place.get(out), place.get(wanted))


@given(size=st.integers(1, 40), kernel=st.integers(1, 9), stride=st.integers(1, 6))
def test_same_padding_gives_ceil_windows_and_puts_the_smaller_half_first(size, kernel, stride):
    before, after = same_border(size, kernel, stride)
    wanted = -(-size // stride)
    # The definition of docs/math/gait-prop.md.
    assert before + after == max((wanted - 1) * stride + kernel - size, 0)
    assert after - before in (0, 1)
    window = make_window(size, size + 1, kernel, stride, "same")
    assert (window.out_height, window.out_width) == (wanted, -(-(size + 1) // stride))
    assert naive.output_size(window) == (window.out_height, window.out_width)


def test_same_padding_of_an_even_kernel_adds_at_the_end():
    assert same_border(5, 2, 1) == (0, 1)
    assert same_border(8, 3, 2) == (0, 1)
    assert same_border(224, 9, 4) == (2, 3)
    assert same_border(7, 1, 3) == (0, 0)


@given(window=windows())
def test_the_number_of_windows_is_counted_right(window):
    assert (window.out_height, window.out_width) == naive.output_size(window)


def test_an_explicit_border_is_on_every_side():
    assert make_window(6, 4, 3, 2, 1) == Window(3, 2, 1, 1, 1, 1, 6, 4)
    assert make_window(6, 4, 3, 2, 1).bordered == (8, 6)


@pytest.mark.parametrize(("size", "kernel", "padding"), [(2, 5, 1), (1, 2, 0), (4, 7, 1)])
def test_a_window_larger_than_the_image_is_refused(size, kernel, padding):
    with pytest.raises(ValueError, match=f"kernel {kernel} does not fit into {size}x9 with padding {padding}; at most"):
        make_window(size, 9, kernel, 1, padding)


def test_a_stride_beyond_any_image_is_one_window_or_refused():
    assert make_window(4, 5, 2, 2**31 - 1, 0).out_width == 1
    with pytest.raises(ValueError, match="stride 2147483648; at most 2147483647"):
        make_window(4, 5, 2, 2**31, 0)


def test_the_border_holds_its_value_and_the_image_is_untouched(place):
    x = rng(0).standard_normal((2, 3, 2, 1))
    window = Window(2, 1, 1, 0, 2, 1, 3, 2)
    wanted = np.pad(x, ((0, 0), (1, 0), (2, 1), (0, 0)), constant_values=-5.0)
    np.testing.assert_array_equal(place.get(add_border(place.put(x), window, value=-5.0)), wanted)


def test_without_a_border_the_image_is_not_copied():
    x = rng(0).standard_normal((2, 3, 2, 1))
    assert add_border(x, make_window(3, 2, 2, 1, 0)) is x


def test_a_strided_image_gives_the_patches_of_its_copy():
    x = rng(0).standard_normal((4, 10, 6, 3))[::2, 1:6, ::-1]
    window = make_window(5, 6, 3, 2, 1)
    np.testing.assert_array_equal(im2col(x, window), im2col(x.copy(), window))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_stays(place, dtype):
    window = make_window(4, 4, 3, 1, "same")
    patches = im2col(place.put(np.ones((1, 4, 4, 2), dtype)), window)
    assert patches.dtype == dtype
    assert col2im(patches, window).dtype == dtype
