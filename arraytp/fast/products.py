"""The products of one block, for a slice of samples: θ ∘ x, ω ∘ d and x ⋆ d, in the form chosen for the block.

With R = `rows`(x), V = `stack`(d) and M = `matrix`(ω),

    θ ∘ x = `add_affine`(R, M),  ω ∘ d = `transposed`(V, M),  x ⋆ d = Rᵀ V in the axes of `fold`

Dense blocks take their rows as they are (`Dense`). A convolution goes by whole patches and col2im (`Patches`); one of
stride 1 can be split, its kernel's rows and columns summed over apart (`Split`, `arraytp.ops.conv.split_matrix`), in
arrays k times as large as an image where patches are k² times.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from arraytp.backend import Array, array_module
from arraytp.fast.buffers import Buffers
from arraytp.model.blocks import Block, Shape
from arraytp.ops.conv import as_matrix, can_split, split_matrix
from arraytp.ops.patches import (
    Window,
    add_row_patches,
    add_stacked_rows,
    col2im,
    im2col,
    row_patches,
    stack_rows,
)

OWNER = "products"


class Products(Protocol):
    """The products of one block. Results lie in scratch buffers that the next call of the same method takes again."""

    @property
    def block(self) -> Block:
        """The block."""

    @property
    def sum_shape(self) -> Shape:
        """The shape of Rᵀ V."""

    @property
    def sample_rows(self) -> int:
        """How many rows a sample has in R and V."""

    @property
    def row_width(self) -> int:
        """How many numbers a row of R has, and of V where that is as large: what bounds a slice of samples."""

    def matrix(self, weight: Array) -> Array:
        """Return M of a weight."""

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return R of x, of shape (samples, *in_shape); in `out` where given."""

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return V of d, of shape (samples, *pre_shape)."""

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + θ ∘ x, of shape (samples, *pre_shape), to `out`."""

    def transposed(
        self, stacked: Array, matrix: Array, samples: int, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return ω ∘ d, of shape (samples, *in_shape), in `out` or in scratch of this key; may take R's memory."""

    def fold(self, weight: Array) -> Array:
        """Return a view of an array of a weight's shape in the axes of Rᵀ V."""


@dataclass(frozen=True)
class Dense:
    """The products of a dense block."""

    block: Block

    @property
    def sum_shape(self) -> Shape:
        """(in, out)."""
        return self.block.weight_shape

    @property
    def sample_rows(self) -> int:
        """1."""
        return 1

    @property
    def row_width(self) -> int:
        """The number of inputs."""
        return self.block.weight_shape[0]

    def matrix(self, weight: Array) -> Array:
        """Return the weight."""
        return weight

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return x as it is, or a copy."""
        if out is None:
            return x.reshape(len(x), -1)
        out[...] = x.reshape(len(x), -1)
        return out

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return d as it is."""
        return d

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + x θ."""
        matmul(rows, matrix, out)
        out += base

    def transposed(
        self, stacked: Array, matrix: Array, samples: int, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return d ωᵀ."""
        if out is None:
            out = scratch.of(OWNER).array(("transposed", key), (samples, len(matrix)), stacked.dtype)
        matmul(stacked, matrix.T, out)
        return out

    def fold(self, weight: Array) -> Array:
        """Return it as it is."""
        return weight


@dataclass(frozen=True)
class Patches:
    """The products of a convolution by whole patches."""

    block: Block
    window: Window

    @property
    def sum_shape(self) -> Shape:
        """(k·k·C, O)."""
        return math.prod(self.block.weight_shape[:-1]), self.block.weight_shape[-1]

    @property
    def sample_rows(self) -> int:
        """P · Q."""
        return math.prod(self.block.pre_shape[:-1])

    @property
    def row_width(self) -> int:
        """k² · C."""
        return math.prod(self.block.weight_shape[:-1])

    def matrix(self, weight: Array) -> Array:
        """Return the kernel as its (k·k·C, O) matrix."""
        return as_matrix(weight)

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return the patches of x, of shape (samples · P · Q, k·k·C)."""
        own, window = scratch.of(OWNER), self.window
        shape = (len(x), window.out_height, window.out_width, window.kernel**2 * x.shape[-1])
        out = own.array("rows", shape, x.dtype) if out is None else out.reshape(shape)
        bordered = own.filled(("border", window), (len(x), *window.bordered, x.shape[-1]), x.dtype, 0.0)
        return im2col(x, window, out, bordered).reshape(-1, shape[-1])

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return d as (samples · P · Q, O)."""
        return d.reshape(-1, d.shape[-1])

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + patches · θ."""
        matmul(rows, matrix, out.reshape(len(rows), -1))
        out += base

    def transposed(
        self, stacked: Array, matrix: Array, samples: int, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return col2im(d · ωᵀ)."""
        own, window = scratch.of(OWNER), self.window
        dpatches = own.array("dpatches", (len(stacked), len(matrix)), stacked.dtype)
        matmul(stacked, matrix.T, dpatches)
        bordered = own.array(("transposed", key), (samples, *window.bordered, self.block.in_shape[-1]), stacked.dtype)
        scattered = col2im(dpatches.reshape(samples, *self.block.pre_shape[:-1], -1), window, bordered)
        if out is None:
            return scattered
        out[...] = scattered
        return out

    def fold(self, weight: Array) -> Array:
        """Return it as it is, over (i, j, c) and (o)."""
        return weight


@dataclass(frozen=True)
class Split:
    """The products of a convolution of stride 1 whose kernel's rows and columns are summed over apart."""

    block: Block
    window: Window

    @property
    def sum_shape(self) -> Shape:
        """(k·C, k·O)."""
        k, (_, _, channels, outputs) = self.window.kernel, self.block.weight_shape
        return k * channels, k * outputs

    @property
    def sample_rows(self) -> int:
        """H · Q."""
        return self.window.height * self.window.out_width

    @property
    def row_width(self) -> int:
        """K · (C + O)."""
        return self.window.kernel * (self.block.in_shape[-1] + self.block.pre_shape[-1])

    def matrix(self, weight: Array) -> Array:
        """Return the (k·O, k·C) matrix of `split_matrix`."""
        return split_matrix(weight)

    def rows(self, x: Array, scratch: Buffers, out: Array | None = None) -> Array:
        """Return the patches of each row of pixels, of shape (samples · H · Q, k·C)."""
        own, window = scratch.of(OWNER), self.window
        shape = (len(x), window.height, window.out_width, window.kernel * x.shape[-1])
        out = own.array("rows", shape, x.dtype) if out is None else out.reshape(shape)
        wide = own.filled(("wide", window), (*x.shape[:2], window.bordered[1], x.shape[-1]), x.dtype, 0.0)
        return row_patches(x, window, out, wide).reshape(-1, shape[-1])

    def stack(self, d: Array, scratch: Buffers) -> Array:
        """Return at every row of pixels the k rows of d that it has a part in, of shape (samples · H · Q, k·O)."""
        own, window = scratch.of(OWNER), self.window
        shape = (len(d), window.height, window.out_width, window.kernel * d.shape[-1])
        tall = own.filled(("tall", window), (len(d), window.height + window.kernel - 1, *d.shape[2:]), d.dtype, 0.0)
        return stack_rows(d, window, own.array("stacked", shape, d.dtype), tall).reshape(-1, shape[-1])

    def add_affine(self, rows: Array, matrix: Array, base: Array, out: Array, scratch: Buffers) -> None:
        """Write base + the rows' parts, each added where it belongs."""
        stacked = scratch.of(OWNER).array("stacked", (len(rows), len(matrix)), out.dtype)
        matmul(rows, matrix.T, stacked)
        out[...] = base
        add_stacked_rows(stacked.reshape(len(out), self.window.height, out.shape[2], -1), self.window, out)

    def transposed(
        self, stacked: Array, matrix: Array, samples: int, scratch: Buffers, out: Array | None = None, key: object = 0
    ) -> Array:
        """Return the sum of the row patches V · ω."""
        own, window = scratch.of(OWNER), self.window
        patches = own.array("rows", (len(stacked), matrix.shape[1]), stacked.dtype)
        matmul(stacked, matrix, patches)
        if out is None:
            out = own.array(("transposed", key), (samples, *self.block.in_shape), stacked.dtype)
        return add_row_patches(patches.reshape(samples, window.height, window.out_width, -1), window, out)

    def fold(self, weight: Array) -> Array:
        """Return it over (j, c) and (i from last to first, o)."""
        return weight[::-1].transpose(1, 2, 0, 3)


def patch_products(block: Block) -> Products:
    """Return the products of a block by whole rows or patches."""
    return Dense(block) if block.window is None else Patches(block, block.window)


def split_products(block: Block) -> Products:
    """Return the products of a block with the kernel split where it can be."""
    if block.window is not None and can_split(block.window):
        return Split(block, block.window)
    return patch_products(block)


def matmul(a: Array, b: Array, out: Array) -> None:
    """Write the matrix product a b to `out`, whose rows may be strided."""
    array_module(a, b, out).matmul(a, b, out=out)
