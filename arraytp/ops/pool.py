"""Max-pooling, its adjoint, and max-unpooling.

Dimensions: B batch, (H, W) input size, (P, Q) output size, C channels, k kernel.
"""

from typing import Literal

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.ops.patches import Window, add_border, copy_runs

# The number of elements of a window must fit into one byte.
MAX_POOL_KERNEL = 15


def max_pool_forward(
    s: Array,
    window: Window,
    out: Array | None = None,
    index: Array | None = None,
    bordered: Array | None = None,
    stack: Array | None = None,
) -> tuple[Array, Array]:
    """Take the maximum of every window; the border counts as minus infinity.

    Parameters
    ----------
    s : array of shape (B, H, W, C)
    window : Window
    out, index : arrays of shape (B, P, Q, C), C-contiguous, optional
        Where to write.
    bordered : array of shape (B, H + top + bottom, W + left + right, C), optional
        Workspace whose border is minus infinity.
    stack : array of shape (k·k, B, P, Q, C), optional
        Workspace.

    Returns
    -------
    out : array of shape (B, P, Q, C)
    index : array of uint8 of shape (B, P, Q, C)
        Which element of the window, counted row by row, is the maximum; the first one wins a tie.

    Raises
    ------
    ValueError
        If the window has more elements than uint8 can count.
    """
    k = window.kernel
    if k > MAX_POOL_KERNEL:
        raise ValueError(f"max-pool kernel {k} is larger than {MAX_POOL_KERNEL}")
    xp = array_module(s)
    shape = (len(s), window.out_height, window.out_width, s.shape[-1])
    stack = xp.empty((k * k, *shape), dtype=s.dtype) if stack is None else stack
    _stack_elements(add_border(s, window, value=-xp.inf, out=bordered), window, stack)
    out = xp.empty(shape, dtype=s.dtype) if out is None else out
    index = xp.empty(shape, dtype=xp.uint8) if index is None else index
    stack.max(axis=0, out=out)
    # Earlier elements have higher ranks, so that the largest rank among the maxima is that of the first.
    rank = (stack == out).view(xp.uint8)
    rank *= (xp.uint8(k * k) - xp.arange(k * k, dtype=xp.uint8))[:, None, None, None, None]
    rank.max(axis=0, out=index)
    xp.subtract(xp.uint8(k * k), index, out=index)
    return out, index


def _stack_elements(image: Array, window: Window, out: Array) -> None:
    """Write element e of every window to out[e]: a copy whose parts are contiguous, for the element-wise maximum."""
    k, stride = window.kernel, window.stride
    sample, row, pixel, channel = image.strides
    strides = (row, pixel, sample, stride * row, stride * pixel, channel)
    as_strided = array_module(image).lib.stride_tricks.as_strided
    copy_runs(as_strided(image, (k, k, *out.shape[1:]), strides), out.reshape(k, k, *out.shape[1:]))


def max_pool_backward(dout: Array, index: Array, window: Window) -> Array:
    """Give every window's gradient to its maximum; where windows overlap, gradients add up: the exact adjoint.

    Parameters
    ----------
    dout : array of shape (B, P, Q, C)
    index : array of uint8 of shape (B, P, Q, C)
        From `max_pool_forward`.
    window : Window

    Returns
    -------
    array of shape (B, H, W, C)
    """
    xp = array_module(dout)
    k = window.kernel
    bordered = xp.zeros((len(dout), *window.bordered, dout.shape[-1]), dtype=dout.dtype)
    for element in range(k * k):
        chosen = index == xp.uint8(element)
        bordered[(slice(None), *window.offset(*divmod(element, k)))] += dout * chosen
    return xp.ascontiguousarray(bordered[(slice(None), *window.interior)])


def max_unpool(t: Array, index: Array, window: Window, mode: Literal["overwrite", "accumulate"]) -> Array:
    """Put every value where its window's maximum was, 0 elsewhere (DTP paper, the feedback modules).

    Parameters
    ----------
    t : array of shape (B, P, Q, C)
    index : array of uint8 of shape (B, P, Q, C)
        From `max_pool_forward`.
    window : Window
    mode : {"overwrite", "accumulate"}
        Where overlapping windows name one pixel: the last window in row-major order wins (the authors' code), or the
        values add up (`max_pool_backward`, the exact adjoint of the pooling).

    Returns
    -------
    array of shape (B, H, W, C)
    """
    if mode == "accumulate":
        return max_pool_backward(t, index, window)
    xp = array_module(t)
    k = window.kernel
    bordered = xp.zeros((len(t), *window.bordered, t.shape[-1]), dtype=t.dtype)
    # A later window has a given pixel at an earlier element, so elements are written from the last to the first.
    for element in reversed(range(k * k)):
        pixels = bordered[(slice(None), *window.offset(*divmod(element, k)))]
        xp.copyto(pixels, t, where=index == xp.uint8(element))
    return xp.ascontiguousarray(bordered[(slice(None), *window.interior)])


def overlaps(window: Window) -> bool:
    """Tell whether two windows can share a pixel; where none can, both ways of unpooling are the same."""
    return window.kernel > window.stride


def max_pool_scatter(dout: Array, index: Array, window: Window, corner: Array, position: Array, out: Array) -> None:
    """Compute `max_pool_backward` by adding each gradient at its maximum's position: faster, on the host only.

    On a device, overlapping windows would be added in no fixed order, so that results could differ in their last bits.

    Parameters
    ----------
    dout, index, window
        As in `max_pool_backward`; C-contiguous.
    corner : array of intp of shape (B, P, Q, C)
        From `window_corners`.
    position : array of intp of shape (B, P, Q, C)
        Workspace.
    out : array of shape (B, H, W, C)
        Overwritten; C-contiguous.
    """
    find_maxima(index, window, corner, position, out.size)
    out.fill(0)
    np.add.at(out.reshape(-1), position.reshape(-1), dout.reshape(-1))


def max_unpool_scatter(t: Array, index: Array, window: Window, corner: Array, position: Array, out: Array) -> None:
    """Compute `max_unpool` in mode "overwrite" by assignment at the maxima's positions: faster, on the host only.

    NumPy assigns in the order of the index, so that the last of several values for one pixel stays.

    Parameters
    ----------
    t, index, window
        As in `max_unpool`; C-contiguous.
    corner, position, out
        As in `max_pool_scatter`.
    """
    find_maxima(index, window, corner, position, out.size)
    out.fill(0)
    out.reshape(-1)[position.reshape(-1)] = t.reshape(-1)


def find_maxima(index: Array, window: Window, corner: Array, position: Array, size: int) -> None:
    """Write the flat index of every window's maximum to `position`; on the host only.

    Parameters
    ----------
    index, window, corner, position
        As in `max_pool_scatter`.
    size : int
        The number of elements of the array of shape (B, H, W, C) that is indexed.
    """
    rows, columns = np.divmod(np.arange(window.kernel**2), window.kernel)
    offsets = ((rows - window.top) * window.width + columns - window.left) * index.shape[-1]
    # A maximum lies in the image unless its window holds NaN or nothing above −inf: then any valid position will do.
    np.take(offsets, index, out=position, mode="clip")
    position += corner
    np.clip(position, 0, size - 1, out=position)


def window_corners(batch: int, window: Window, channels: int) -> Array:
    """Return the flat index in (B, H, W, C) of every window's first element, as if there were no border."""
    sample, row, column = np.ix_(
        np.arange(batch),
        window.stride * np.arange(window.out_height),
        window.stride * np.arange(window.out_width),
    )
    pixel = (sample * window.height + row) * window.width + column
    return pixel[..., None] * channels + np.arange(channels)
