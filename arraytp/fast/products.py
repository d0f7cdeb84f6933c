"""The products of one block, for a slice of samples: θ ∘ x, ω ∘ d and x ⋆ d, in the form chosen for the block.

With R = `rows`(x), V = `stack`(d) and M = `matrix`(ω),

    θ ∘ x = `add_affine`(R, M),  ω ∘ d = `transposed`(V, M),  x ⋆ d = Rᵀ V in the axes of `fold`

`Patches` uses whole patches and col2im, or a dense block's samples as rows. For a convolution of
stride 1, `Split` sums over the kernel's rows and columns separately (`arraytp.ops.conv.split_matrix`); its arrays
are k times as large as an image, whereas patches are k² times as large.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from arraytp.backend import Array, add_product, array_module
from arraytp.fast.parallel import Buffers
from arraytp.model.blocks import Block
from arraytp.ops.conv import as_matrix, can_split, split_matrix
from arraytp.ops.patches import Window, add_row_patches, add_stacked_rows, col2im, im2col, row_patches, stack_rows

OWNER = "products"
# In a pass: the bytes that one product of a slice reads, and those that element-wise operations work on.
PATCH_BYTES, SPLIT_BYTES, GROUP_BYTES = 2 << 20, 4 << 20, 2 << 20
# In an iteration of feedback training, whose slices go through four products.
ITERATION_BYTES = 8 << 20
GEMM_ROWS = 512
# How many numbers are compared before one product is taken to have the bits of the products of its rows' parts.
COMPARED = 1 << 10

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


def border(own: Buffers, x: Array, window: Window, value: float) -> Array | None:
    """Return memory for x, of shape (samples, H, W, C), in a border of `value`; None if the window has no border."""
    if window.bordered == x.shape[1:3]:
        return None
    return own.filled(("border", window), (len(x), *window.bordered, x.shape[-1]), x.dtype, value)


class Patches:
    """The products with whole patches, or with a dense block's samples as rows.

    Results lie in scratch buffers that the next call of the same method reuses.

    Parameters
    ----------
    block : Block

    Attributes
    ----------
    sum_shape : tuple of int
        Shape of Rᵀ V.
    sample_rows : int
        How many rows a sample has in R and V.
    row_width : int
        Numbers in a row of R, for `Split` plus those in a row of V, which is about as large. Bounds slices of samples.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.window = block, block.window
        self.sample_rows, self.row_width = math.prod(block.pre_shape[:-1]), math.prod(block.weight_shape[:-1])
        self.sum_shape = self.row_width, block.weight_shape[-1]

    def matrix(self, weight: Array) -> Array:
        """Return M of a weight: the kernel as its (k·k·C, O) matrix, a dense weight as it is."""
        return as_matrix(weight)

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return R: the patches of x, of shape (samples · P · Q, k·k·C); for a dense block x as it is, or a copy."""
        own, window = scratch.of(OWNER), self.window
        if window is None:
            flat = x.reshape(len(x), -1)
            if out is None:
                return flat
            out[...] = flat
            return out
        out = own.array("rows", (len(x) * self.sample_rows, self.row_width), x.dtype) if out is None else out
        return im2col(x, window, out, border(own, x, window, 0.0))

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return V of d, of shape (samples, *pre_shape): d as (samples · P · Q, O)."""
        return d.reshape(-1, d.shape[-1])

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + θ ∘ x, of shape (samples, *pre_shape), to `out`."""
        matmul(rows, matrix, out.reshape(len(rows), -1))
        out += base

    def transposed(
        self, stacked: Array, matrix: Array, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return ω ∘ d = col2im(d ωᵀ), of shape (samples, *in_shape), in `out` or in scratch of this key.

        It may overwrite the memory of `rows`.
        """
        own, window, samples = scratch.of(OWNER), self.window, len(stacked) // self.sample_rows
        if window is None:
            out = own.array(("transposed", key), (samples, len(matrix)), stacked.dtype) if out is None else out
            matmul(stacked, matrix.T, out)
            return out
        dpatches = own.array("dpatches", (samples, *self.block.pre_shape[:-1], len(matrix)), stacked.dtype)
        matmul(stacked, matrix.T, dpatches.reshape(len(stacked), -1))
        bordered = own.array(("transposed", key), (samples, *window.bordered, self.block.in_shape[-1]), stacked.dtype)
        dx = col2im(dpatches, window, bordered)
        if out is None:
            return dx
        out[...] = dx
        return out

    def fold(self, weight: Array) -> Array:
        """Return a view of an array of a weight's shape with the axes of Rᵀ V: as it is, over (i, j, c) and (o)."""
        return weight


class Split:
    """The products of a stride-1 convolution, summed over kernel rows and columns separately; methods as `Patches`'."""

    def __init__(self, block: Block, window: Window) -> None:
        self.block, self.window = block, window
        k, (_, _, channels, outputs) = window.kernel, block.weight_shape
        self.sample_rows, self.row_width = window.height * window.out_width, k * (channels + outputs)
        self.sum_shape = k * channels, k * outputs

    def matrix(self, weight: Array) -> Array:
        """Return the (k·O, k·C) matrix of `split_matrix`."""
        return split_matrix(weight)

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return the patches of each row of pixels, of shape (samples · H · Q, k·C)."""
        own, window = scratch.of(OWNER), self.window
        out = own.array("rows", (len(x) * self.sample_rows, self.sum_shape[0]), x.dtype) if out is None else out
        wide = None
        if window.bordered[1] != x.shape[2]:
            wide = own.filled(("wide", window), (*x.shape[:2], window.bordered[1], x.shape[-1]), x.dtype, 0.0)
        return row_patches(x, window, out, wide)

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return, for every row of pixels, the k rows of d to which it contributes, of shape (samples · H · Q, k·O)."""
        own, window = scratch.of(OWNER), self.window
        out = own.array("stacked", (len(d) * self.sample_rows, window.kernel * d.shape[-1]), d.dtype)
        tall = own.filled(("tall", window), (len(d), window.height + window.kernel - 1, *d.shape[2:]), d.dtype, 0.0)
        return stack_rows(d, window, out, tall)

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + θ ∘ x to `out`, adding each row's contributions where they belong."""
        stacked = scratch.of(OWNER).array("stacked", (len(rows), len(matrix)), out.dtype)
        matmul(rows, matrix.T, stacked)
        out[...] = base
        add_stacked_rows(stacked.reshape(len(out), self.window.height, out.shape[2], -1), self.window, out)

    def transposed(
        self, stacked: Array, matrix: Array, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return ω ∘ d: the row patches V M, added up where they came from."""
        own, window, samples = scratch.of(OWNER), self.window, len(stacked) // self.sample_rows
        patches = own.array("rows", (len(stacked), matrix.shape[1]), stacked.dtype)
        matmul(stacked, matrix, patches)
        if out is None:
            out = own.array(("transposed", key), (samples, *self.block.in_shape), stacked.dtype)
        return add_row_patches(patches.reshape(samples, window.height, window.out_width, -1), window, out)

    def fold(self, weight: Array) -> Array:
        """Return a view of `weight` with the axes of Rᵀ V: (j, c) and (i from last to first, o)."""
        return weight[::-1].transpose(1, 2, 0, 3)


Products = Patches | Split


def split_products(block: Block) -> Products:
    """Return `Split` for a block whose kernel can be split, else `Patches`."""
    if block.window is not None and can_split(block.window):
        return Split(block, block.window)
    return Patches(block)


def pass_slices(products: Products, batch: int, itemsize: int, lanes: int) -> tuple[int, int]:
    """Return how many samples go through a block together, and how many of them through one product.

    With several lanes, at least two get work.

    What one product reads should fit the cache, but must have enough rows. Element-wise operations work on the larger
    group: short ones would leave the threads waiting for the interpreter.
    """
    sample_bytes = products.sample_rows * products.row_width * itemsize
    limit = SPLIT_BYTES if isinstance(products, Split) else PATCH_BYTES
    length = max(1, limit // sample_bytes, GEMM_ROWS // products.sample_rows)
    group = max(length, GROUP_BYTES // (math.prod(products.block.pre_shape) * itemsize))
    most = -(-batch // min(2, lanes))
    return min(group, most), min(length, most)


def iteration_slice(products: Products, batch: int, itemsize: int) -> int:
    """Return how many samples go through an iteration of feedback training together."""
    if products.block.window is None:
        return batch
    return max(1, min(batch, ITERATION_BYTES // (products.sample_rows * products.row_width * itemsize)))


def rows_times(rows: Sequence[slice], a: Array, b: Array, out: Array) -> None:
    """Write a b to `out` with the bits of separate products of these rows of a; as one product if BLAS gives them."""
    lengths = tuple(each.stop - each.start for each in rows)
    layouts = tuple((each.shape, each.strides) for each in (a, b, out))
    if len(rows) < 2 or rows_are_as_alone(lengths, layouts, a.dtype):
        matmul(a, b, out)
        return
    for each in rows:
        matmul(a[each], b, out[each])


@cache
def rows_are_as_alone(lengths: tuple[int, ...], layouts: tuple[Layout, ...], dtype: np.dtype) -> bool:
    """Tell whether a product has the bits of separate products of slices of these lengths of its rows, by trying it.

    The numbers tried are random: the order in which BLAS adds depends on shapes and strides of a, b and the result, not
    on numbers. But two orders may round a number alike, so a small product is repeated until about `COMPARED` numbers
    have been compared.
    """
    generator, ends = np.random.default_rng(0), np.cumsum(lengths)
    for _ in range(max(1, COMPARED // math.prod(layouts[-1][0]))):
        a, b, together, alone = (_laid_out(generator, *layout, dtype) for layout in (*layouts, layouts[-1]))
        np.matmul(a, b, out=together)
        for length, end in zip(lengths, ends, strict=True):
            np.matmul(a[end - length : end], b, out=alone[end - length : end])
        if not np.array_equal(together, alone):
            return False
    return True


def _laid_out(
    generator: np.random.Generator, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype
) -> Array:
    """Return random numbers in an array of this shape and these strides."""
    last = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    flat = generator.standard_normal(last // dtype.itemsize + 1).astype(dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, strides)


def summed_in_pairs(rows: Sequence[slice], write: Callable[[slice, Array], None], out: Array, scratch: Buffers) -> None:
    """Write the sum, in the order of `arraytp.ranks.pairwise`, of what `write` writes for each of these slices."""
    if len(rows) == 1:
        write(rows[0], out)
        return
    terms = scratch.of(OWNER).array("terms", (len(rows), *out.shape), out.dtype)
    for each, term in zip(rows, terms, strict=True):
        write(each, term)
    while len(terms) > 2:
        np.add(terms[::2], terms[1::2], out=terms[::2])
        terms = terms[::2]
    np.add(terms[0], terms[1], out=out)


def matmul(a: Array, b: Array, out: Array) -> None:
    """Write the matrix product a b to `out`, whose rows may be strided."""
    if array_module(a, b, out) is np:
        np.matmul(a, b, out=out)
    else:
        add_product(a, b, out)
