"""The fast forward and backward pass: the plain ones of `arraytp.model.plain`, in slices that stay in a core's cache.

What differs from the plain functions, and why the numbers agree:

- A slice of samples goes through patches, product, pool, bias and activation at once; z is never stored whole.
- Bias and activation come after the pool, on fewer elements: max(f(z + b)) = f(max(z) + b) since f is non-decreasing.
  ReLU's zeros are made equal before (`Activation.tie`), so that the first of them wins as in the plain pass. Where it
  is rounding that maps two z of a window to one number, in saturation, this pass takes the larger z.
- f' is read off s.
- Patches are built again for the gradient of the weight: cheaper than keeping them (measured: a tenth of the product).
- The gradients of a stride-1 convolution sum over the kernel's rows and columns apart (`arraytp.fast.products.Split`).
- Weight gradients are summed over samples in lanes, a fixed partition of the batch, then over the lanes in order.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast import cuts
from arraytp.fast.buffers import Buffers, Scratch
from arraytp.fast.parallel import Task, Workspace, even_slices, slices
from arraytp.fast.pools import pool, pool_adjoint
from arraytp.fast.products import Products, matmul, patch_products, split_products
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At, ForwardPass, Gradients
from arraytp.ops.conv import as_matrix

OWNER = "passes"


def forward(network: Network, x: Array, workspace: Workspace, name: object = "forward") -> ForwardPass:
    """Run the network on a batch.

    Parameters
    ----------
    network : Network
    x : array of shape (B, *in_shape) and the network's dtype
    workspace : Workspace
    name : object
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
            workspace.run(_dense_forward(block, weight, bias, s.reshape(len(x), -1), output))
        else:
            workspace.run(_conv_forward(block, weight, bias, s, output, index, workspace.backend.on_host))
        s_next = output
        if block.auxiliary:
            s_next = own.array((n, "handed on"), (len(x), *block.next_shape), x.dtype)
            s_next[...] = output[..., : s_next.shape[-1]]
        passed.s.append(s_next)
        passed.outputs.append(output)
        passed.index.append(index)
    return passed


def backward(at: At, ds: Array, through: Array | None, scale: float | Array | None, workspace: Workspace) -> Gradients:
    """Return dW, db and ds^n: `At.backward` with a weight, or nothing, that carries the gradient back."""
    own, block, s = workspace.of((OWNER, at.batch.results, at.n)), at.block, at.s
    dweight = own.array("dweight", block.weight_shape, s.dtype)
    dbias = own.array("dbias", block.weight_shape[-1:], s.dtype)
    dx = None if through is None else own.array("ds", s.shape, s.dtype)
    units = slice(block.next_shape[-1])
    ds = ds.reshape(at.s_next.shape)
    through = None if through is None else through[..., units]
    out = dweight[..., units], dbias[units], dx
    if block.window is None:
        _dense_backward(at, ds, through, scale, out, workspace)
    else:
        _conv_backward(at, ds, through, scale, out, workspace)
    if block.auxiliary:
        dweight[..., units.stop :] = 0
        dbias[units.stop :] = 0
    return dweight, dbias, dx


def product(a: Array, b: Array, out: Array, workspace: Workspace) -> Array:
    """Write the matrix product a b to `out`, shared among the threads, and return it."""
    workspace.run(_product_tasks(a, b, out))
    return out


def _product_tasks(a: Array, b: Array, out: Array) -> list[Task]:
    """Cut the longer side of the result: each task then copies the smaller factor whole, and of the larger its part."""
    if len(a) > b.shape[1]:
        return [partial(_matmul_task, a[part], b, out[part]) for part in cuts.tiles(len(a))]
    return [partial(_matmul_task, a, b[:, part], out[:, part]) for part in cuts.tiles(b.shape[1])]


def _matmul_task(a: Array, b: Array, out: Array, scratch: Buffers) -> None:
    matmul(a, b, out)


def _dense_forward(block: Block, weight: Array, bias: Array, x: Array, out: Array) -> list[Task]:
    def columns(part: slice, scratch: Buffers) -> None:
        z = out[:, part]
        matmul(x, weight[:, part], z)
        z += bias[part]
        block.activation(z, out=z)

    return [partial(columns, part) for part in cuts.tiles(weight.shape[1])]


def _dense_backward(
    at: At,
    ds: Array,
    through: Array | None,
    scale: float | Array | None,
    out: tuple[Array, Array, Array | None],
    workspace: Workspace,
) -> None:
    dweight, dbias, dx = out
    x = at.s.reshape(len(ds), -1)
    dz = _df(at, slice(0, len(ds)), ds, scale, workspace.of(OWNER))

    def bias(scratch: Buffers) -> None:
        dz.sum(axis=0, out=dbias)

    tasks = [*_product_tasks(x.T, dz, dweight), bias]
    if through is not None and dx is not None:
        tasks = _product_tasks(dz, through.T, dx.reshape(x.shape)) + tasks
    workspace.run(tasks)


def _conv_forward(
    block: Block, weight: Array, bias: Array, x: Array, out: Array, index: Array | None, on_host: bool
) -> list[Task]:
    matrix, products = as_matrix(weight), patch_products(block)
    group, length = cuts.pass_slices(products, len(x), x.itemsize, on_host)

    def samples(part: slice, scratch: Buffers) -> None:
        s = out[part]
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

    return [partial(samples, part) for part in slices(len(x), group)]


def _conv_backward(
    at: At,
    ds: Array,
    through: Array | None,
    scale: float | Array | None,
    out: tuple[Array, Array, Array | None],
    workspace: Workspace,
) -> None:
    dweight, dbias, dx = out
    x, block, on_host = at.s, _handing_on(at.block), workspace.backend.on_host
    products = patch_products(block) if through is None else split_products(block)
    gradients = _gradients(products, through)
    group, length = cuts.pass_slices(products, len(x), x.itemsize, on_host)
    lanes = cuts.lanes(dweight.nbytes, len(x), on_host)
    total, own = products.fold(dweight), workspace.of(OWNER)
    lane_weight = own.array("lane weights", (len(lanes), *total.shape), x.dtype)
    lane_bias = own.array("lane biases", (len(lanes), *dbias.shape), x.dtype)

    def lane(number: int, scratch: Buffers) -> None:
        lane_weight[number].fill(0)
        lane_bias[number].fill(0)
        samples, own = lanes[number], scratch.of(OWNER)
        share = own.array("share", total.shape, x.dtype)
        for part in slices(samples.stop, group, samples.start):
            df = _df(at, part, ds, scale, own)
            rows = df.reshape(-1, df.shape[-1])
            # As a product with ones the sum is several times as fast.
            lane_bias[number] += own.filled("ones", (len(rows),), df.dtype, 1.0) @ rows
            dz = pool_adjoint(block, df, _index(at, part), scratch)
            for inner in slices(len(dz), length):
                gradients(x[part][inner], dz[inner], share, None if dx is None else dx[part][inner], scratch)
                lane_weight[number] += share

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    _sum_lanes(lane_weight, total, workspace)
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


def _df(at: At, part: slice, ds: Array, scale: float | Array | None, own: Scratch) -> Array:
    """Return D ⊙ (scale · ds) of some samples, C-contiguous."""
    ds, s = ds[part], at.output[part, ..., : ds.shape[-1]]
    df = own.array("df", ds.shape, ds.dtype)
    if scale is not None:
        ds = scaled(ds, scale if isinstance(scale, float) else scale[part], df)
    return at.block.activation.backward(ds, s, out=df)


def scaled(ds: Array, scale: float | Array, out: Array) -> Array:
    """Write ds times a number, or times one number a sample, to `out` and return it."""
    out[...] = ds
    out *= ds.dtype.type(scale) if isinstance(scale, float) else scale.reshape(-1, *[1] * (ds.ndim - 1))
    return out


SliceGradients = Callable[[Array, Array, Array, Array | None, Buffers], None]
"""(x, dz, dweight, dx, scratch): writes the gradients of kernel and input of a slice."""


def _gradients(products: Products, through: Array | None) -> SliceGradients:
    """Return dW = Rᵀ V of a slice, in the axes of `products.fold`, and dx = B ∘ dz."""
    matrix = None if through is None else products.matrix(through)

    def gradients(x: Array, dz: Array, dweight: Array, dx: Array | None, scratch: Buffers) -> None:
        stacked = products.stack(dz, scratch)
        matmul(products.rows(x, scratch).T, stacked, dweight.reshape(products.sum_shape))
        if matrix is not None and dx is not None:
            products.transposed(stacked, matrix, len(dx), scratch, out=dx)

    return gradients


def _sum_lanes(lanes: Array, out: Array, workspace: Workspace) -> None:
    def rows(part: slice, scratch: Buffers) -> None:
        lanes[:, part].sum(axis=0, out=out[part])

    workspace.run([partial(rows, part) for part in even_slices(len(out), cuts.LANES)])
