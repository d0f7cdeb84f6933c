"""Products with the logits' Jacobians, for direct feedback and Gauss-Newton targets, never holding a whole batch's.

J^n_b, of shape (C, D), is the Jacobian of sample b's C logits with respect to its hidden s^n of size D. The J of all
hidden s^n come from the same C backward passes, without weight gradients; a slice of samples goes through all classes
at once. Slices are shorter in a convolution than in the dense blocks after it, whose products need enough rows to be
worth BLAS's copy of W.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial

from arraytp.backend import Array, array_module, matrix_product
from arraytp.fast.parallel import LANES, Buffers, Workspace, even_slices, slices
from arraytp.fast.passes import pool_adjoint
from arraytp.fast.products import Products, split_products
from arraytp.model.passes import At, Batch
from arraytp.ops.solve import damped_gauss_newton

OWNER = "jacobians"
# Limits on the patches of a slice in a convolution, and on its gradients in a dense block, over all classes.
PATCH_BYTES, DENSE_BYTES = 16 << 20, 2 << 20
DEVICE_BYTES = 1 << 29
Sums = Mapping[int, tuple[Array, Array]]
"""By n = 1 … N−1: Σ_b J_b J_bᵀ of shape (C, C), and Σ_b J_b of shape (C, D)."""
Walk = list[tuple[At, Products, Array]]
"""The blocks from the last to the second, their products, and their weights as matrices."""


def jacobian_sums(workspace: Workspace, batch: Batch) -> Sums:
    """Return Σ_b J_b J_bᵀ and Σ_b J_b of every hidden s^n: `Batch.jacobian_sums`."""
    read = [*batch.forward.outputs, *batch.network.weights]
    sums: Sums = workspace.captured("Jacobians", read, partial(_jacobian_sums, workspace, batch))
    return sums


def _jacobian_sums(workspace: Workspace, batch: Batch) -> Sums:
    on_host, classes, dtype = workspace.backend.on_host, batch.logits.shape[1], batch.logits.dtype
    lanes = even_slices(len(batch.logits), LANES if on_host else 1)
    own = workspace.of(OWNER)
    walk = _walk(batch)
    grams = {at.n: own.array(("gram", at.n), (len(lanes), classes, classes), dtype) for at, *_ in walk}
    sums = {at.n: own.array(("sum", at.n), (len(lanes), classes, at.s[0].size), dtype) for at, *_ in walk}

    def lane(number: int) -> None:
        for total in (*grams.values(), *sums.values()):
            total[number] = 0
        for n, _, j in _jacobians(batch, walk, lanes[number], workspace.scratch):
            wide = j.reshape(classes, -1)
            grams[n][number] += matrix_product(wide, wide.T)
            sums[n][number] += j.sum(axis=1)

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    return {n: (grams[n].sum(axis=0), sums[n].sum(axis=0)) for n in sorted(grams)}


def gauss_newton(workspace: Workspace, batch: Batch, damping: float) -> Mapping[int, Array]:
    """Return J_bᵀ (J_b J_bᵀ + γI)⁻¹ e_b of every hidden s^n: `Batch.gauss_newton`."""
    own, walk, count = workspace.of((OWNER, batch.results)), _walk(batch), len(batch.logits)
    changes = {at.n: own.array(("change", at.n), (count, at.s[0].size), at.s.dtype) for at, *_ in walk}

    def solve(part: slice) -> None:
        scratch = workspace.scratch
        for n, samples, j in _jacobians(batch, walk, part, scratch):
            by_sample = scratch.of(OWNER).array("by sample", (j.shape[1], len(j), j.shape[2]), j.dtype)
            by_sample[...] = j.transpose(1, 0, 2)
            changes[n][samples] = damped_gauss_newton(by_sample, batch.dlogits[samples], damping)

    lanes = even_slices(count, LANES if workspace.backend.on_host else 1)
    workspace.run([partial(solve, part) for part in lanes])
    return {n: changes[n] for n in sorted(changes)}


def _walk(batch: Batch) -> Walk:
    """Return the blocks after the first, n = N−1 … 1, with the products that carry gradients back."""
    walk = [(at, split_products(at.block)) for at in batch.down() if at.n > 0]
    return [(at, products, products.matrix(at.weight)) for at, products in walk]


def _jacobians(batch: Batch, walk: Walk, part: slice, scratch: Buffers) -> Iterator[tuple[int, slice, Array]]:
    """Yield n, some of these samples and their J, of shape (C, samples, D), for n = N−1 … 1; valid until the next."""
    return _down(walk, _unit_gradients(part, batch, scratch), part, scratch)


def _down(walk: Walk, ds: Array, part: slice, scratch: Buffers) -> Iterator[tuple[int, slice, Array]]:
    """Yield as `_jacobians` does, from the walk's first block on, given the logits' gradients in that block's output.

    These, `ds`, are of shape (C, samples, D). The gradients in the block's input stay valid while the blocks before it
    are computed slice by slice.
    """
    if not walk:
        return
    at, products, matrix = walk[0]
    for samples in slices(part.stop, _length(products, ds, scratch.backend.on_host), part.start):
        of_samples = ds[:, samples.start - part.start : samples.stop - part.start]
        j = _back(at, products, matrix, of_samples, samples, scratch)
        yield at.n, samples, j
        yield from _down(walk[1:], j, samples, scratch)


def _length(products: Products, ds: Array, on_host: bool) -> int:
    """Return how many samples go through a block together, with all classes."""
    block = products.block
    if block.window is not None:
        limit, numbers = PATCH_BYTES, products.sample_rows * products.row_width
    else:
        limit, numbers = DENSE_BYTES, max(math.prod(block.in_shape), math.prod(block.out_shape))
    return max(1, (limit if on_host else DEVICE_BYTES) // (len(ds) * numbers * int(ds.itemsize)))


def _unit_gradients(part: slice, batch: Batch, scratch: Buffers) -> Array:
    """Return the unit vector of every class for every sample, of shape (C, samples, C)."""
    logits = batch.logits
    ds = scratch.of(OWNER).array("units", (logits.shape[1], part.stop - part.start, logits.shape[1]), logits.dtype)
    ds[...] = array_module(logits).eye(logits.shape[1], dtype=logits.dtype)[:, None]
    return ds


def _back(at: At, products: Products, matrix: Array, ds: Array, part: slice, scratch: Buffers) -> Array:
    """Return the gradients of the logits in s^n, of shape (C, samples, D), given those in s^{n+1}."""
    block, s = at.block, at.output[part]
    own, shape, units = scratch.of(OWNER), (len(ds), *s.shape), block.next_shape[-1]
    df, index = own.array("df", shape, s.dtype), None
    df[..., :units] = ds.reshape(*shape[:-1], units)
    if block.auxiliary:
        df[..., units:] = 0
    if block.activation.derivative is not None:
        df *= block.activation.derivative(s)
    if at.index is not None:
        index = own.array("index", shape, at.index.dtype)
        index[...] = at.index[part]
        index = index.reshape(-1, *s.shape[1:])
    dz = pool_adjoint(block, df.reshape(-1, *s.shape[1:]), index, scratch)
    ds = products.transposed(products.stack(dz, scratch), matrix, scratch, key=(OWNER, at.n))
    return ds.reshape(len(df), len(s), -1)
