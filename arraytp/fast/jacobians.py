"""What the closed form of direct feedback needs of the Jacobians of the logits, without ever holding those of a batch.

J^n_b, of shape (C, D), is the Jacobian of sample b's C logits in its hidden s^n of size D. All J of all hidden s^n come
from the same C backward passes, without gradients of weights; a slice of samples goes through all classes at once.
"""

from collections.abc import Mapping
from functools import partial

from arraytp.backend import Array, array_module
from arraytp.fast import cuts
from arraytp.fast.buffers import Buffers
from arraytp.fast.parallel import Workspace, even_slices, slices
from arraytp.fast.pools import pool_adjoint
from arraytp.fast.products import Products, split_products
from arraytp.model.passes import At, Batch

OWNER = "jacobians"
LANES = 4
Sums = Mapping[int, tuple[Array, Array]]
"""By n = 1 … N−1: Σ_b J_b J_bᵀ of shape (C, C), and Σ_b J_b of shape (C, D)."""


def jacobian_sums(batch: Batch, workspace: Workspace) -> Sums:
    """Return Σ_b J_b J_bᵀ and Σ_b J_b of every hidden s^n: `Batch.jacobian_sums`."""
    on_host, classes, dtype = workspace.backend.on_host, batch.logits.shape[1], batch.logits.dtype
    lanes = even_slices(len(batch.logits), LANES if on_host else 1)
    own = workspace.of(OWNER)
    walk = [(at, split_products(at.block)) for at in batch.down() if at.n > 0]
    matrices = {at.n: products.matrix(at.weight) for at, products in walk}
    grams = {at.n: own.array(("gram", at.n), (len(lanes), classes, classes), dtype) for at, _ in walk}
    sums = {at.n: own.array(("sum", at.n), (len(lanes), classes, at.s[0].size), dtype) for at, _ in walk}
    length = _length(walk, len(batch.logits), classes, on_host)

    def lane(number: int, scratch: Buffers) -> None:
        for total in (*grams.values(), *sums.values()):
            total[number] = 0
        for part in slices(lanes[number].stop, length, lanes[number].start):
            ds = _unit_gradients(part, batch, scratch)
            for at, products in walk:
                ds = _back(at, products, matrices[at.n], ds, part, scratch)
                j = ds.reshape(classes, part.stop - part.start, -1)
                wide = j.reshape(classes, -1)
                grams[at.n][number] += wide @ wide.T
                sums[at.n][number] += j.sum(axis=1)

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    return {n: (grams[n].sum(axis=0), sums[n].sum(axis=0)) for n in sorted(grams)}


def _length(walk: list[tuple[At, Products]], batch: int, classes: int, on_host: bool) -> int:
    """Return how many samples go through all classes together."""
    itemsize = walk[0][0].s.dtype.itemsize if walk else 1
    lengths = [
        cuts.iteration_slice(products, batch * classes, itemsize, on_host)
        for at, products in walk
        if at.block.window is not None
    ]
    most = -(-batch // LANES) if on_host else batch
    return max(1, min([most, *(length // classes for length in lengths)]))


def _unit_gradients(part: slice, batch: Batch, scratch: Buffers) -> Array:
    """Return for every class its unit vector for every sample, of shape (C, samples, C)."""
    logits = batch.logits
    ds = scratch.of(OWNER).array("units", (logits.shape[1], part.stop - part.start, logits.shape[1]), logits.dtype)
    ds[...] = array_module(logits).eye(logits.shape[1], dtype=logits.dtype)[:, None]
    return ds


def _back(at: At, products: Products, matrix: Array, ds: Array, part: slice, scratch: Buffers) -> Array:
    """Return the logits' gradients of s^n, of shape (C · samples, *in_shape), given those of s^{n+1}."""
    block, s = at.block, at.output[part]
    classes, own = len(ds.reshape(-1)) // s.size, scratch.of(OWNER)
    df = own.array("df", (classes, *s.shape), s.dtype)
    df[...] = ds.reshape(df.shape)
    if block.activation.derivative is not None:
        df *= block.activation.derivative(s)
    index = None
    if at.index is not None:
        index = own.array("index", df.shape, at.index.dtype)
        index[...] = at.index[part]
        index = index.reshape(-1, *s.shape[1:])
    dz = pool_adjoint(block, df.reshape(-1, *s.shape[1:]), index, scratch)
    return products.transposed(products.stack(dz, scratch), matrix, len(dz), scratch)
