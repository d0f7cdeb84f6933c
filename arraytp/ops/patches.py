"""Patch matrices: im2col, whose rows are receptive fields, and its adjoint col2im.

Dimensions: B batch, (H, W) input size, (P, Q) output size, C channels, k kernel, K = k·k·C elements of a patch.
A patch lists its elements in the order (row in the kernel, column in the kernel, channel).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from arraytp.backend import Array, array_module

MOST_STRIDE = 2**31 - 1


@dataclass(frozen=True)
class Window:
    """How a square window of a convolution or pooling slides over an image.

    Parameters
    ----------
    kernel, stride : int
        Side of the window and step between windows, in pixels.
    top, bottom, left, right : int
        Border added to the image.
    height, width : int
        H and W of the image without the border.
    """

    kernel: int
    stride: int
    top: int
    bottom: int
    left: int
    right: int
    height: int
    width: int

    @property
    def out_height(self) -> int:
        """P, the number of windows from top to bottom."""
        return (self.top + self.height + self.bottom - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Q, the number of windows from left to right."""
        return (self.left + self.width + self.right - self.kernel) // self.stride + 1

    @property
    def bordered(self) -> tuple[int, int]:
        """Height and width of the image with its border."""
        return self.top + self.height + self.bottom, self.left + self.width + self.right

    @property
    def interior(self) -> tuple[slice, slice]:
        """Where the image lies within its border."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def offset(self, i: int, j: int) -> tuple[slice, slice]:
        """Return the pixels of the bordered image that row i, column j of every window covers."""
        return (
            slice(i, i + self.stride * (self.out_height - 1) + 1, self.stride),
            slice(j, j + self.stride * (self.out_width - 1) + 1, self.stride),
        )


def same_border(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the border before and after an axis for "SAME" padding as TensorFlow defines it."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def make_window(height: int, width: int, kernel: int, stride: int, padding: int | Literal["same"]) -> Window:
    """Return the window over an image.

    Parameters
    ----------
    height, width : int
        Size of the image in pixels.
    kernel, stride : int
        Side of the window and step between windows in pixels.
    padding : int or "same"
        Border width on every side; "same" gives ceil(size / stride) windows per axis (`same_border`).

    Raises
    ------
    ValueError
        If not a single window fits, or the stride is too large for NumPy.
    """
    if stride > MOST_STRIDE:
        raise ValueError(f"stride {stride}; at most {MOST_STRIDE}")
    if padding == "same":
        (top, bottom), (left, right) = same_border(height, kernel, stride), same_border(width, kernel, stride)
    else:
        top = bottom = left = right = padding
    window = Window(kernel, stride, top, bottom, left, right, height, width)
    if min(window.bordered) < kernel:
        raise ValueError(
            f"kernel {kernel} does not fit into {height}x{width} with padding {padding}; at most {min(window.bordered)}"
        )
    return window


def add_border(x: Array, window: Window, value: float = 0.0, out: Array | None = None) -> Array:
    """Return the image within a border of a constant value.

    Parameters
    ----------
    x : array of shape (B, H, W, C)
    window : Window
    value : float
        The border's value.
    out : array of shape (B, H + top + bottom, W + left + right, C), optional
        Where to write; its border must hold `value` already, only the interior is written.

    Returns
    -------
    array of shape (B, H + top + bottom, W + left + right, C)
        `x` itself where there is no border.
    """
    if window.bordered == (window.height, window.width):
        return x
    if out is None:
        out = array_module(x).full((len(x), *window.bordered, x.shape[-1]), value, dtype=x.dtype)
    rows, columns = window.interior
    out[:, rows, columns] = x
    return out


def im2col(x: Array, window: Window, out: Array | None = None, bordered: Array | None = None) -> Array:
    """Write every receptive field as a row.

    Parameters
    ----------
    x : array of shape (B, H, W, C)
    window : Window
    out : array of B·P·Q·k·k·C elements, C-contiguous, optional
        Where to write.
    bordered : array of shape (B, H + top + bottom, W + left + right, C), optional
        Workspace, C-contiguous, whose border is zero.

    Returns
    -------
    array of shape (B, P, Q, k·k·C), or `out`
    """
    xp = array_module(x)
    k, stride = window.kernel, window.stride
    image = xp.ascontiguousarray(add_border(x, window, out=bordered))
    batch, channels = len(x), x.shape[-1]
    shape = (batch, window.out_height, window.out_width, k, k * channels)
    if out is None:
        out = xp.empty((*shape[:3], k * k * channels), dtype=x.dtype)
    # Channels last: a row of a window, k pixels of C channels, is one run of memory.
    sample, row, pixel, element = image.strides
    fields = xp.lib.stride_tricks.as_strided(image, shape, (sample, stride * row, stride * pixel, row, element))
    copy_runs(fields, out.reshape(shape))
    return out


def add_stacked_rows(stacked: Array, window: Window, out: Array) -> Array:
    """Add every row of a stack to the contents of `out` where it came from: the adjoint of `stack_rows`.

    Parameters
    ----------
    stacked : array of shape (B, H, Q, k·O)
    window : Window
        Of stride 1 and with borders below k.
    out : array of shape (B, P, Q, O)

    Returns
    -------
    array
        `out`.
    """
    k, rows = window.kernel, out.shape[1]
    parts = stacked.reshape(*stacked.shape[:3], k, out.shape[-1])
    for i in range(k):
        shift = k - 1 - i - window.top
        first, stop = max(0, -shift), min(rows, window.height - shift)
        if first < stop:
            out[:, first:stop] += parts[:, first + shift : stop + shift, :, i]
    return out


def copy_runs(source: Array, out: Array) -> None:
    """Copy an array whose last axis is contiguous in memory, as is that of `out`.

    NumPy copies short runs number by number; with a whole run as one item it takes up to 40 % less time.
    """
    if array_module(out) is np:
        run = np.dtype((np.void, out.shape[-1] * out.itemsize))
        source, out = source.view(run), out.view(run)
    out[...] = source


def coverage(window: Window, like: Array) -> Array:
    """Return n_x, how many windows cover each pixel: the transposed convolution of ones, of shape (1, H, W, 1).

    Parameters
    ----------
    window : Window
    like : array
        The result has its array module and dtype.
    """
    xp = array_module(like)
    return col2im(xp.ones((1, window.out_height, window.out_width, window.kernel**2), dtype=like.dtype), window)


def col2im(dpatches: Array, window: Window, bordered: Array | None = None) -> Array:
    """Add every patch back to where it came from: the adjoint of `im2col`.

    Parameters
    ----------
    dpatches : array of shape (B, P, Q, k·k·C)
    window : Window
    bordered : array of shape (B, H + top + bottom, W + left + right, C), optional
        Workspace, overwritten.

    Returns
    -------
    array of shape (B, H, W, C)
        A view of the workspace. Pixels that no window covers are 0.
    """
    xp = array_module(dpatches)
    k = window.kernel
    batch, channels = len(dpatches), dpatches.shape[-1] // (k * k)
    fields = dpatches.reshape(batch, window.out_height, window.out_width, k, k, channels)
    if bordered is None:
        bordered = xp.empty((batch, *window.bordered, channels), dtype=dpatches.dtype)
    bordered.fill(0)
    for i in range(k):
        for j in range(k):
            bordered[(slice(None), *window.offset(i, j))] += fields[:, :, :, i, j]
    return bordered[(slice(None), *window.interior)]


def row_patches(x: Array, window: Window, out: Array | None = None, bordered: Array | None = None) -> Array:
    """Write the part of every receptive field that lies in one row of pixels: x[b, h, q + j − left, c] over (j, c).

    Parameters
    ----------
    x : array of shape (B, H, W, C)
    window : Window
        Of stride 1.
    out : array of B·H·Q·k·C elements, C-contiguous, optional
        Where to write.
    bordered : array of shape (B, H, W + left + right, C), optional
        Workspace, C-contiguous, whose border is zero.

    Returns
    -------
    array of shape (B, H, Q, k·C), or `out`
        For every row of the image, including those in which no window begins.
    """
    xp = array_module(x)
    image = xp.ascontiguousarray(add_border(x, replace(window, top=0, bottom=0), out=bordered))
    shape = (*x.shape[:2], window.out_width, window.kernel * x.shape[-1])
    if out is None:
        out = xp.empty(shape, dtype=x.dtype)
    copy_runs(xp.lib.stride_tricks.as_strided(image, shape, image.strides), out.reshape(shape))
    return out


def add_row_patches(dpatches: Array, window: Window, out: Array | None = None) -> Array:
    """Add every row patch back to where it came from: the adjoint of `row_patches`.

    Parameters
    ----------
    dpatches : array of shape (B, H, Q, k·C)
    window : Window
        Of stride 1.
    out : array of shape (B, H, W, C), optional
        Overwritten.

    Returns
    -------
    array of shape (B, H, W, C)
        Pixels that no window covers are 0.
    """
    taps = dpatches.reshape(*dpatches.shape[:3], window.kernel, -1)
    if out is None:
        out = array_module(dpatches).empty((*dpatches.shape[:2], window.width, taps.shape[-1]), dtype=dpatches.dtype)
    out.fill(0)
    for j in range(window.kernel):
        first, stop = max(0, j - window.left), min(window.width, window.out_width + j - window.left)
        if first < stop:
            shift = window.left - j
            out[:, :, first:stop] += taps[:, :, first + shift : stop + shift, j]
    return out


def stack_rows(dz: Array, window: Window, out: Array | None = None, bordered: Array | None = None) -> Array:
    """Write for every row of the image the k rows of dz whose windows contain it: dz[b, h + top − (k − 1) + i, q, o].

    i counts the kernel's rows from its last to its first. Rows of dz that do not exist are 0.

    Parameters
    ----------
    dz : array of shape (B, P, Q, O)
    window : Window
        Of stride 1 and with borders below k.
    out : array of B·H·Q·k·O elements, C-contiguous, optional
        Where to write.
    bordered : array of shape (B, H + k − 1, Q, O), optional
        Workspace, C-contiguous, whose border is zero.

    Returns
    -------
    array of shape (B, H, Q, k·O), or `out`
    """
    xp, k = array_module(dz), window.kernel
    above = Window(k, 1, k - 1 - window.top, k - 1 - window.bottom, 0, 0, *dz.shape[1:3])
    image = xp.ascontiguousarray(add_border(dz, above, out=bordered))
    shape = (len(dz), window.height, window.out_width, k, dz.shape[-1])
    if out is None:
        out = xp.empty((*shape[:3], k * dz.shape[-1]), dtype=dz.dtype)
    sample, row, pixel, element = image.strides
    fields = xp.lib.stride_tricks.as_strided(image, shape, (sample, row, pixel, row, element))
    copy_runs(fields, out.reshape(shape))
    return out
