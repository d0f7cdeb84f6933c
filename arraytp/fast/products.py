"""The products of one block with feedback, for a slice of samples: θ ∘ x, ω ∘ d and what their patch matrices need.

A convolution of stride 1 is split: its kernel's rows and columns are summed over apart
(`arraytp.ops.conv.split_matrix`), in arrays k times as large as an image where patches are k² times. Others go by whole
patches and col2im, dense blocks by their rows as they are. With R = `take_patches`(x), V = `stack`(d) and
M = `product_matrix`(ω):

    ω ∘ d = `carry`(V, M),  x ⋆ d = Rᵀ V in the layout of M's transpose
"""

import math

from arraytp.backend import Array, array_module
from arraytp.fast.parallel import Buffers, Workspace
from arraytp.model.network import Block
from arraytp.ops.conv import as_matrix, can_split, split_matrix
from arraytp.ops.patches import add_row_patches, col2im, im2col, row_patches, stack_rows

HOST_GROUP_BYTES = 8 << 20
DEVICE_GROUP_BYTES = 1 << 29


def is_split(block: Block) -> bool:
    """Tell whether a convolution's kernel is summed over rows and columns apart; not those of the heavy way."""
    return block.window is not None and can_split(block.window)


def product_matrix(block: Block, weight: Array) -> Array:
    """Return the matrix that `take_patches` and `stack` go with."""
    return split_matrix(weight) if is_split(block) else as_matrix(weight)


def take_patches(block: Block, x: Array, scratch: Buffers) -> Array:
    """Return the patches of some samples as rows: of each row of pixels where the kernel is split."""
    window = block.window
    if window is None or not is_split(block):
        return patch_rows(block, x, scratch)
    shape = (len(x), window.height, window.out_width, window.kernel * x.shape[-1])
    wide = scratch.filled(("wide", window), (*x.shape[:2], window.bordered[1], x.shape[-1]), x.dtype, 0.0)
    return row_patches(x, window, scratch.array("patches", shape, x.dtype), wide).reshape(-1, shape[-1])


def stack(block: Block, d: Array, scratch: Buffers) -> Array:
    """Return d, of shape (samples, *pre_shape), as rows, stacked where the kernel is split."""
    window = block.window
    if window is None or not is_split(block):
        return d.reshape(-1, d.shape[-1])
    shape = (len(d), window.height, window.out_width, window.kernel * d.shape[-1])
    tall = scratch.filled(("tall", window), (len(d), window.height + window.kernel - 1, *d.shape[2:]), d.dtype, 0.0)
    return stack_rows(d, window, scratch.array("stacked", shape, d.dtype), tall).reshape(-1, shape[-1])


def carry(block: Block, stacked: Array, matrix: Array, scratch: Buffers) -> Array:
    """Return ω ∘ d of some samples, given `stack` of d and `product_matrix` of ω."""
    window = block.window
    if window is None:
        r = scratch.array("r", (len(stacked), len(matrix)), stacked.dtype)
        matmul(stacked, matrix.T, r)
        return r
    if not is_split(block):
        return scatter_back(block, stacked, matrix, scratch)
    shape = (-1, window.height, window.out_width, matrix.shape[1])
    patches = scratch.array("patches", (len(stacked), matrix.shape[1]), stacked.dtype)
    matmul(stacked, matrix, patches)
    samples = len(stacked) // (window.height * window.out_width)
    r = scratch.array("r", (samples, *block.in_shape), stacked.dtype)
    return add_row_patches(patches.reshape(shape), window, r)


def patch_rows(block: Block, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
    """Return the patch matrix of some samples, or their rows as they are for a dense block."""
    window = block.window
    if window is None:
        if out is None:
            return x.reshape(len(x), -1)
        out[...] = x.reshape(len(x), -1)
        return out
    shape = (len(x), window.out_height, window.out_width, window.kernel**2 * x.shape[-1])
    out = scratch.array("patches", shape, x.dtype) if out is None else out.reshape(shape)
    bordered = scratch.filled((window, "zero"), (len(x), *window.bordered, x.shape[-1]), x.dtype, 0.0)
    return im2col(x, window, out, bordered).reshape(-1, shape[-1])


def scatter_back(block: Block, a: Array, matrix: Array, scratch: Buffers) -> Array:
    """Return ω ∘ a of some samples of a convolution by col2im, of shape (samples, *in_shape)."""
    assert block.window is not None
    rows = a.reshape(-1, a.shape[-1])
    dpatches = scratch.array("dpatches", (len(rows), len(matrix)), a.dtype)
    matmul(rows, matrix.T, dpatches)
    samples = len(rows) // math.prod(block.pre_shape[:-1])
    bordered = scratch.array("scattered", (samples, *block.window.bordered, block.in_shape[-1]), a.dtype)
    return col2im(dpatches.reshape(samples, *block.pre_shape[:-1], -1), block.window, bordered)


def matmul(a: Array, b: Array, out: Array) -> None:
    """Write the matrix product a b to `out`, whose rows may be strided."""
    array_module(a, b, out).matmul(a, b, out=out)


def sample_group(block: Block, batch: int, itemsize: int, workspace: Workspace) -> int:
    """Return how many samples go through a block's products together: as many as patch matrices of some size hold."""
    window = block.window
    if window is None:
        return batch
    widest = window.kernel**2 * block.in_shape[-1]
    if is_split(block):
        widest = window.kernel * (block.in_shape[-1] + block.pre_shape[-1])
    patch_bytes = math.prod(block.pre_shape[:-1]) * widest * itemsize
    limit = HOST_GROUP_BYTES if workspace.backend.on_host else DEVICE_GROUP_BYTES
    return max(1, min(batch, limit // patch_bytes))
