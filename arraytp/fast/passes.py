"""The fast forward and backward pass: the plain ones of `arraytp.model.plain`, in slices that stay in a core's cache.

What differs from the plain functions, and why the numbers agree:

- Slices (of samples; in dense blocks, units) go from patches to activation at once; z is never stored whole.
- Bias and activation come after the pool, on fewer elements: max(f(z + b)) = f(max(z) + b) since f is non-decreasing.
  ReLU's zeros are made equal before (`Activation.tie`), so that the first of them wins as in the plain pass. If
  saturation rounds two z of a window to the same f(z), this pass takes the larger z.
- f' is computed from s.
- Patches are built again for the gradient of the weight: cheaper than keeping them (measured: a tenth of the product).
- The gradients of a stride-1 convolution sum over kernel rows and columns separately (`arraytp.fast.products.Split`).
- On the host the adjoint of pooling scatters to the maxima; on a device, where scattered additions have no fixed
  order, each pixel gathers its own, or the code loops over window elements (`arraytp.ops.pool`).
- Weight gradients are summed over samples in lanes, a fixed partition of the batch, then over the lanes in order.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.parallel import LANES, Buffers, Task, Workspace, even_slices, slices, tiles
from arraytp.fast.products import Patches, border, matmul, pass_slices, rows_times, split_products, summed_in_pairs
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At, ForwardPass, Gradients
from arraytp.ops.conv import as_matrix
from arraytp.ops.patches import Window
from arraytp.ops.pool import max_pool_backward, max_pool_forward, max_pool_scatter, window_corners

OWNER = "passes"
# Products of fewer multiplications than this take less time than waking threads.
SHARED = 1 << 20


def forward(workspace: Workspace, network: Network, x: Array, name: str = "forward") -> ForwardPass:
    """Run the network on a batch.

    Parameters
    ----------
    workspace : Workspace
    network : Network
    x : array of shape (B, *in_shape) and the network's dtype
    name : str
        Names the buffers of the result, which are valid until the next call with this name.

    Returns
    -------
    ForwardPass
    """
    own = workspace.of((OWNER, name))
    passed = ForwardPass([x], [], [])
    for n, block in enumerate(network.blocks):
        output = own.array((n, "output"), (len(x), *block.out_shape), x.dtype)
        index = None if block.pool is None else own.array((n, "index"), output.shape, np.uint8)
        weight, bias, s = network.weights[n], network.biases[n], passed.s[n]
        if block.window is None:
            _dense_forward(workspace, block, weight, bias, s.reshape(len(x), -1), output)
        else:
            _conv_forward(workspace, block, weight, bias, s, output, index)
        s_next = output
        if block.auxiliary:
            s_next = own.array((n, "handed on"), (len(x), *block.next_shape), x.dtype)
            s_next[...] = output[..., : s_next.shape[-1]]
        passed.s.append(s_next)
        passed.outputs.append(output)
        passed.index.append(index)
    return passed


def _dense_forward(workspace: Workspace, block: Block, weight: Array, bias: Array, x: Array, out: Array) -> None:
    def columns(part: slice) -> None:
        z = out[:, part]
        rows_times(workspace.part_rows, x, weight[:, part], z)
        z += bias[part]
        block.activation(z, out=z)

    workspace.run([partial(columns, part) for part in tiles(weight.shape[1])])


def _conv_forward(
    workspace: Workspace, block: Block, weight: Array, bias: Array, x: Array, out: Array, index: Array | None
) -> None:
    matrix, products = as_matrix(weight), Patches(block)
    group, length = pass_slices(products, len(x), x.itemsize, workspace.most_lanes)

    def samples(part: slice) -> None:
        s, scratch = out[part], workspace.scratch
        z = s if block.pool is None else scratch.of(OWNER).array("z", (len(s), *block.pre_shape), x.dtype)
        for inner in slices(len(s), length):
            patches = products.rows(x[part][inner], scratch)
            matmul(patches, matrix, z[inner].reshape(len(patches), -1))
        if block.pool is not None:
            assert index is not None
            block.activation.tie(z, bias)
            pool(z, block.pool, s, index[part], scratch)
        s += bias
        block.activation(s, out=s)

    workspace.run([partial(samples, part) for part in slices(len(x), group)])


def backward(workspace: Workspace, at: At, ds: Array, through: Array | None, scale: float | Array | None) -> Gradients:
    """Return dW, db and ds^n: `At.backward` for a `through` that is an array or None."""
    own, block, s = workspace.of((OWNER, at.batch.results, at.n)), _handing_on(at.block), at.s
    dweight = own.array("dweight", at.block.weight_shape, s.dtype)
    dbias = own.array("dbias", at.block.weight_shape[-1:], s.dtype)
    dx = None if through is None else own.array("ds", s.shape, s.dtype)
    units = slice(block.weight_shape[-1])
    ds = ds.reshape(at.s_next.shape)
    through = None if through is None else through[..., units]
    out = dweight[..., units], dbias[units], dx
    if block.window is None:
        dz = scaled_backward(at, slice(0, len(s)), ds, scale, workspace.of(OWNER))
        _dense_backward(workspace, s.reshape(len(s), -1), dz, through, out)
    else:
        _conv_backward(workspace, at, ds, through, scale, out)
    if block is not at.block:
        dweight[..., units.stop :] = 0
        dbias[units.stop :] = 0
    return dweight, dbias, dx


def _dense_backward(
    workspace: Workspace, x: Array, dz: Array, through: Array | None, out: tuple[Array, Array, Array | None]
) -> None:
    dweight, dbias, dx = out
    if workspace.part_rows:
        _backward_of_parts(workspace, x, dz, through, out)
        return
    tasks: list[Task] = [*_product_tasks(x.T, dz, dweight), partial(dz.sum, axis=0, out=dbias)]
    if through is not None and dx is not None:
        if workspace.most_lanes == 1:
            tasks = [partial(_product_of_few, workspace, dz, through, dx.reshape(x.shape)), *tasks]
        else:
            tasks = _product_tasks(dz, through.T, dx.reshape(x.shape)) + tasks
    workspace.run(tasks)


def _backward_of_parts(
    workspace: Workspace, x: Array, dz: Array, through: Array | None, out: tuple[Array, Array, Array | None]
) -> None:
    """Do as `_dense_backward` for several parts of a batch: gradients are pairwise sums of those of the parts."""
    dweight, dbias, dx = out
    rows = workspace.part_rows

    def weight(tile: slice) -> None:
        def product(part: slice, term: Array) -> None:
            matmul(x[part, tile].T, dz[part], term)

        summed_in_pairs(rows, product, dweight[tile], workspace.scratch)

    def bias() -> None:
        summed_in_pairs(rows, lambda part, term: dz[part].sum(axis=0, out=term), dbias, workspace.scratch)

    tasks: list[Task] = [*(partial(weight, tile) for tile in tiles(len(dweight))), bias]
    if through is not None and dx is not None:
        tasks += row_product_tasks(rows, dz, through.T, out=dx.reshape(x.shape))
    workspace.run(tasks)


def row_product_tasks(rows: Sequence[slice], a: Array, b: Array, out: Array) -> list[Task]:
    """Return tasks for the columns of a product whose rows belong to several parts of a batch."""
    return [partial(rows_times, rows, a, b[:, tile], out[:, tile]) for tile in tiles(b.shape[1])]


def _product_of_few(workspace: Workspace, dz: Array, through: Array, dx: Array) -> None:
    """Write dz throughᵀ for a part's few samples as (through dzᵀ)ᵀ: BLAS's copy of W is fastest untransposed."""
    own = workspace.scratch.of(OWNER)
    columns, out = own.array("columns", dz.T.shape, dz.dtype), own.array("dx columns", dx.T.shape, dx.dtype)
    columns[...] = dz.T
    matmul(through, columns, out)
    dx[...] = out.T


def _conv_backward(
    workspace: Workspace,
    at: At,
    ds: Array,
    through: Array | None,
    scale: float | Array | None,
    out: tuple[Array, Array, Array | None],
) -> None:
    dweight, dbias, dx = out
    x, block = at.s, _handing_on(at.block)
    products = Patches(block) if through is None else split_products(block)
    matrix = None if through is None else products.matrix(through)
    group, length = pass_slices(products, len(x), x.itemsize, workspace.most_lanes)
    parts = workspace.lanes(dweight.nbytes, len(x))
    total, own = products.fold(dweight), workspace.of(OWNER)
    lane_weight, lane_bias = total[None], dbias[None]
    if len(parts) > 1:
        lane_weight = own.array("lane weights", (len(parts), *total.shape), x.dtype)
        lane_bias = own.array("lane biases", (len(parts), *dbias.shape), x.dtype)

    def lane(number: int) -> None:
        lane_weight[number].fill(0)
        lane_bias[number].fill(0)
        scratch = workspace.scratch
        own = scratch.of(OWNER)
        share = own.array("share", products.sum_shape, x.dtype)
        for part in slices(parts[number].stop, group, parts[number].start):
            df = scaled_backward(at, part, ds, scale, own)
            rows = df.reshape(-1, df.shape[-1])
            # Computed as a product with ones, the sum is several times as fast.
            lane_bias[number] += own.filled("ones", (len(rows),), df.dtype, 1.0) @ rows
            dz = pool_adjoint(block, df, _index(at, part), scratch)
            for inner in slices(len(dz), length):
                stacked = products.stack(dz[inner], scratch)
                matmul(products.rows(x[part][inner], scratch).T, stacked, share)
                lane_weight[number] += share.reshape(total.shape)
                if dx is not None:
                    products.transposed(stacked, matrix, scratch, out=dx[part][inner])

    workspace.run([partial(lane, number) for number in range(len(parts))])
    if len(parts) > 1:
        cut = even_slices(len(total), LANES)
        workspace.run([partial(lane_weight[:, part].sum, axis=0, out=total[part]) for part in cut])
        lane_bias.sum(axis=0, out=dbias)


@cache
def _handing_on(block: Block) -> Block:
    """Return the block without its auxiliary units, which have no gradient."""
    if not block.auxiliary:
        return block
    units = block.next_shape[-1]
    return replace(
        block,
        auxiliary=0,
        pre_shape=(*block.pre_shape[:-1], units),
        out_shape=block.next_shape,
        weight_shape=(*block.weight_shape[:-1], units),
    )


def _index(at: At, part: slice) -> Array | None:
    if at.index is None:
        return None
    return array_module(at.index).ascontiguousarray(at.index[part, ..., : at.block.next_shape[-1]])


def scaled_backward(at: At, part: slice, ds: Array, scale: float | Array | None, own: Buffers) -> Array:
    """Return D ⊙ (scale · ds) of some samples, C-contiguous."""
    ds, s = ds[part], at.output[part, ..., : ds.shape[-1]]
    df = own.array("df", ds.shape, ds.dtype)
    if scale is not None:
        ds = scaled(ds, scale if isinstance(scale, float) else scale[part], df)
    return at.block.activation.backward(ds, s, out=df)


def scaled(ds: Array, scale: float | Array, out: Array) -> Array:
    """Write ds times a number, or times one number per sample, to `out` and return it."""
    out[...] = ds
    out *= ds.dtype.type(scale) if isinstance(scale, float) else scale.reshape(-1, *[1] * (ds.ndim - 1))
    return out


def product(workspace: Workspace, a: Array, b: Array, out: Array) -> Array:
    """Write the matrix product a b to `out`, shared among the threads, and return it."""
    workspace.run(_product_tasks(a, b, out))
    return out


def _product_tasks(a: Array, b: Array, out: Array) -> list[Task]:
    """Cut the longer side of the result: each task then copies the whole smaller factor, and its part of the larger."""
    if a.size * b.shape[1] < SHARED:
        return [partial(matmul, a, b, out)]
    if len(a) > b.shape[1]:
        return [partial(matmul, a[part], b, out[part]) for part in tiles(len(a))]
    return [partial(matmul, a, b[:, part], out[:, part]) for part in tiles(b.shape[1])]


def pool(z: Array, window: Window, out: Array, index: Array, scratch: Buffers) -> None:
    """Write the maxima of z, of shape (samples, H, W, C), and their places in the windows to `out` and `index`."""
    own = scratch.of(OWNER)
    elements = own.array("elements", (window.kernel**2, *out.shape), z.dtype)
    max_pool_forward(z, window, out, index, border(own, z, window, -np.inf), elements)


def pool_adjoint(block: Block, ds: Array, index: Array | None, scratch: Buffers) -> Array:
    """Return ds, of shape (samples, *out_shape), placed at the pool's maxima, in shape (samples, *pre_shape)."""
    if block.pool is None or index is None:
        return ds
    if array_module(ds) is not np:
        return max_pool_backward(ds, index, block.pool)
    out = scratch.of(OWNER).array("adjoint", (len(ds), *block.pre_shape[:2], ds.shape[-1]), ds.dtype)
    max_pool_scatter(ds, index, block.pool, *places(ds.shape, block.pool, scratch), out)
    return out


def places(shape: Sequence[int], window: Window, scratch: Buffers) -> tuple[Array, Array]:
    """Return the corners of all windows, and memory for their maxima's places, both of shape (samples, P, Q, C)."""
    own = scratch.of(OWNER)
    make = partial(window_corners, shape[0], window, shape[-1])
    return own.cached(("corners", window, shape[-1]), shape[0], make), own.array("places", shape, np.intp)
