"""The fast forward and backward pass: the plain ones of `arraytp.model.network`, in slices that stay in a core's cache.

What differs from the plain functions, and why the numbers agree:

- A slice of samples goes through patches, GEMM, pool, bias and activation at once; z is never stored whole.
- Bias and activation come after the pool, on fewer elements: max(f(z + b)) = f(max(z) + b) since f is non-decreasing.
  ReLU's zeros are made equal before (`level`), so that the first of them wins as in the plain pass. Where it is
  rounding that maps two z of a window to one number, in saturation, this pass takes the larger z.
- f' is read off s.
- Patches are built again for the gradient of the weight: cheaper than keeping them (measured: a tenth of the GEMM).
- The gradients of a stride-1 convolution sum over the kernel's rows and columns apart (`split_matrix`).
- Weight gradients are summed over samples in lanes, a fixed partition of the batch, then over the lanes in order.

The number and extent of slices and lanes depend on shapes alone, so that results do not depend on the threads.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.parallel import Buffers, Task, Workspace, even_slices, slices
from arraytp.model.network import Block, ForwardPass, Network
from arraytp.ops.activations import activation_backward, activation_forward, level
from arraytp.ops.conv import as_matrix, can_split, split_matrix
from arraytp.ops.patches import add_row_patches, col2im, im2col, row_patches, stack_rows
from arraytp.ops.pool import max_pool_backward, max_pool_forward, max_pool_scatter, window_corners

HOST_PATCH_BYTES = 2 << 20
HOST_SPLIT_BYTES = 4 << 20
HOST_GROUP_BYTES = 2 << 20
DEVICE_PATCH_BYTES = 1 << 29
GEMM_ROWS = 512
TILES = 4
LANES = 4
LANE_BYTES = 4 << 20


def forward(network: Network, x: Array, workspace: Workspace, key: str = "forward") -> ForwardPass:
    """Run the network on a batch.

    Parameters
    ----------
    network : Network
    x : array of shape (B, *in_shape) and the network's dtype
    workspace : Workspace
    key : str
        Names the buffers of the result, which are valid until the next call with this key.

    Returns
    -------
    ForwardPass
    """
    s, inputs, index = [x], [x], []
    for n, block in enumerate(network.blocks):
        out = workspace.array((key, n, "s"), (len(x), *block.out_shape), x.dtype)
        maxima = None
        if block.pool is not None:
            maxima = workspace.array((key, n, "index"), (len(x), *block.out_shape), np.uint8)
        passed = out
        if block.auxiliary:
            passed = workspace.array((key, n, "x"), (len(x), *block.passed_shape), x.dtype)
        weight, bias = network.weights[n], network.biases[n]
        if block.window is None:
            workspace.run(_dense_forward(block, weight, bias, inputs[n].reshape(len(x), -1), out))
        else:
            workspace.run(_conv_forward(block, weight, bias, inputs[n], out, maxima, workspace.backend.on_host))
        if block.auxiliary:
            passed[...] = out[..., : passed.shape[-1]]
        s.append(out)
        inputs.append(passed)
        index.append(maxima)
    return ForwardPass(s, inputs, index)


def backward(
    block: Block,
    ds: Array,
    s: Array,
    index: Array | None,
    x: Array,
    feedback: Array | None,
    workspace: Workspace,
    key: object,
) -> tuple[Array, Array, Array | None]:
    """Return dW, db and the gradient of x of one block: `network.block_backward` from s instead of z.

    Parameters
    ----------
    block : Block
    ds : array of shape (B, *passed_shape)
        Gradient of what s^{n+1} passes on; that of its auxiliary units is 0.
    s, index, x : arrays
        s[n + 1], index[n] and x[n] of the `ForwardPass`.
    feedback : array of shape weight_shape, or None
        What carries the gradient back to x; None: no gradient of x. Entries of auxiliary units may be missing.
    workspace : Workspace
    key : object
        Names the buffers of the result, which are valid until the next call with this key.
    """
    dweight = workspace.array((key, "dweight"), block.weight_shape, x.dtype)
    dbias = workspace.array((key, "dbias"), block.weight_shape[-1:], x.dtype)
    dx = None if feedback is None else workspace.array((key, "dx"), x.shape, x.dtype)
    units = slice(block.passed_shape[-1])
    s, ds = s[..., units], ds.reshape(len(x), *block.passed_shape)
    feedback = None if feedback is None else feedback[..., units]
    out = dweight[..., units], dbias[units], dx
    if block.window is None:
        _dense_backward(block, ds, s, x.reshape(len(x), -1), feedback, out, workspace)
    else:
        index = None if index is None else array_module(x).ascontiguousarray(index[..., units])
        _conv_backward(block, ds, s, index, x, feedback, out, workspace)
    if block.auxiliary:
        dweight[..., units.stop :] = 0
        dbias[units.stop :] = 0
    return dweight, dbias, dx


def product(a: Array, b: Array, out: Array, workspace: Workspace) -> None:
    """Write the matrix product a b to `out`, shared among the threads."""
    workspace.run(_product_tasks(a, b, out))


def _product_tasks(a: Array, b: Array, out: Array) -> list[Task]:
    """Cut the longer side of the result: each task then copies the smaller factor whole, and of the larger its part."""
    if len(a) > b.shape[1]:
        return [partial(_gemm_task, a[part], b, out[part]) for part in _tiles(len(a))]
    return [partial(_gemm_task, a, b[:, part], out[:, part]) for part in _tiles(b.shape[1])]


def _gemm_task(a: Array, b: Array, out: Array, scratch: Buffers) -> None:
    _gemm(a, b, out)


def _dense_forward(block: Block, weight: Array, bias: Array, x: Array, out: Array) -> list[Task]:
    def columns(part: slice, scratch: Buffers) -> None:
        z = out[:, part]
        _gemm(x, weight[:, part], z)
        z += bias[part]
        activation_forward(z, block.activation, out=z)

    return [partial(columns, part) for part in _tiles(weight.shape[1])]


def _dense_backward(
    block: Block,
    ds: Array,
    s: Array,
    x: Array,
    feedback: Array | None,
    out: tuple[Array, Array, Array | None],
    workspace: Workspace,
) -> None:
    dweight, dbias, dx = out
    dz = activation_backward(ds, s, block.activation, out=workspace.array("dz", ds.shape, ds.dtype))

    def bias(scratch: Buffers) -> None:
        dz.sum(axis=0, out=dbias)

    tasks = [*_product_tasks(x.T, dz, dweight), bias]
    if feedback is not None and dx is not None:
        tasks = _product_tasks(dz, feedback.T, dx.reshape(x.shape)) + tasks
    workspace.run(tasks)


def _conv_forward(
    block: Block, weight: Array, bias: Array, x: Array, out: Array, index: Array | None, on_host: bool
) -> list[Task]:
    matrix = as_matrix(weight)

    group, length = _slice_lengths(block, len(x), x.itemsize, on_host)

    def samples(part: slice, scratch: Buffers) -> None:
        s = out[part]
        z = s if block.pool is None else scratch.array("z", (len(s), *block.pre_shape), x.dtype)
        for inner in slices(len(s), length):
            patches = _patches(block, x[part][inner], scratch)
            _gemm(patches, matrix, z[inner].reshape(len(patches), -1))
        if block.pool is not None:
            assert index is not None
            bordered = scratch.filled(block.pool, (len(s), *block.pool.bordered, z.shape[-1]), x.dtype, -np.inf)
            stack = scratch.array("stack", (block.pool.kernel**2, *s.shape), x.dtype)
            level(z, bias, block.activation)
            max_pool_forward(z, block.pool, s, index[part], bordered, stack)
        s += bias
        activation_forward(s, block.activation, out=s)

    return [partial(samples, part) for part in slices(len(x), group)]


def _conv_backward(
    block: Block,
    ds: Array,
    s: Array,
    index: Array | None,
    x: Array,
    feedback: Array | None,
    out: tuple[Array, Array, Array | None],
    workspace: Workspace,
) -> None:
    dweight, dbias, dx = out
    assert block.window is not None
    if split := feedback is not None and can_split(block.window):
        gradients, total = _split_gradients(block, feedback), dweight[::-1].transpose(1, 2, 0, 3)
    else:
        gradients, total = _patch_gradients(block, feedback), dweight
    group, length = _slice_lengths(block, len(x), x.itemsize, workspace.backend.on_host, split)
    lanes = even_slices(len(x), _lane_count(dweight.nbytes)) if workspace.backend.on_host else [slice(0, len(x))]
    lane_weight = workspace.array("lane weight", (len(lanes), *total.shape), x.dtype)
    lane_bias = workspace.array("lane bias", (len(lanes), *dbias.shape), x.dtype)

    def lane(number: int, scratch: Buffers) -> None:
        lane_weight[number].fill(0)
        lane_bias[number].fill(0)
        samples = lanes[number]
        share = scratch.array("share", total.shape, x.dtype)
        for part in slices(samples.stop, group, samples.start):
            dz, dz_bias = _dz(block, ds[part], s[part], None if index is None else index[part], scratch)
            lane_bias[number] += dz_bias
            for inner in slices(len(dz), length):
                gradients(x[part][inner], dz[inner], share, None if dx is None else dx[part][inner], scratch)
                lane_weight[number] += share

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    _sum_lanes(lane_weight, total, workspace)
    lane_bias.sum(axis=0, out=dbias)


def _dz(block: Block, ds: Array, s: Array, index: Array | None, scratch: Buffers) -> tuple[Array, Array]:
    """Return the gradient of z, C-contiguous, and its sum over samples and positions."""
    df = activation_backward(ds, s, block.activation, out=scratch.array("df", ds.shape, ds.dtype))
    rows = df.reshape(-1, df.shape[-1])
    # As a product with ones the sum is several times as fast.
    dz_bias = scratch.filled("ones", (len(rows),), df.dtype, 1.0) @ rows
    if block.pool is None or index is None:
        return df, dz_bias
    if array_module(df) is not np:
        return max_pool_backward(df, index, block.pool), dz_bias
    corners = partial(window_corners, len(df), block.pool, df.shape[-1])
    corner = scratch.cached(("corners", block.pool, df.shape[-1]), len(df), corners)
    dz = scratch.array("dz", (len(df), *block.pre_shape[:2], df.shape[-1]), df.dtype)
    max_pool_scatter(df, index, block.pool, corner, scratch.array("position", df.shape, np.intp), dz)
    return dz, dz_bias


Gradients = Callable[[Array, Array, Array, Array | None, Buffers], None]
"""(x, dz, dweight, dx, scratch): writes the gradients of kernel and input of a slice."""


def _patch_gradients(block: Block, feedback: Array | None) -> Gradients:
    """Return the gradients by the patches of x: dW = patchesᵀ dz, dx = col2im(dz Bᵀ)."""
    window = block.window
    assert window is not None

    def gradients(x: Array, dz: Array, dweight: Array, dx: Array | None, scratch: Buffers) -> None:
        rows = dz.reshape(-1, dz.shape[-1])
        _gemm(_patches(block, x, scratch).T, rows, as_matrix(dweight))
        if feedback is not None and dx is not None:
            matrix = as_matrix(feedback)
            dpatches = scratch.array("dpatches", (len(rows), len(matrix)), dz.dtype)
            _gemm(rows, matrix.T, dpatches)
            bordered = scratch.array("dx", (len(dz), *window.bordered, dx.shape[-1]), dz.dtype)
            dx[...] = col2im(dpatches.reshape(*dz.shape[:3], -1), window, bordered)

    return gradients


def _split_gradients(block: Block, feedback: Array) -> Gradients:
    """Return the gradients by rows and columns of the kernel: see `arraytp.ops.conv.split_matrix`."""
    window, matrix = block.window, split_matrix(feedback)
    assert window is not None
    k = window.kernel

    def gradients(x: Array, dz: Array, dweight: Array, dx: Array | None, scratch: Buffers) -> None:
        shape = (len(x), window.height, window.out_width)
        stacked = scratch.array("stacked", (*shape, len(matrix)), x.dtype)
        tall = scratch.filled(("tall", window), (len(x), window.height + k - 1, *dz.shape[2:]), x.dtype, 0.0)
        v = stack_rows(dz, window, stacked, tall).reshape(-1, len(matrix))
        patches = scratch.array("row patches", (*shape, matrix.shape[1]), x.dtype)
        wide = scratch.filled(("wide", window), (*x.shape[:2], window.bordered[1], x.shape[-1]), x.dtype, 0.0)
        r = row_patches(x, window, patches, wide).reshape(-1, matrix.shape[1])
        _gemm(r.T, v, dweight.reshape(r.shape[1], -1))
        # The patches of x are done with; those of dx take their place.
        _gemm(v, matrix, r)
        add_row_patches(patches, window, dx)

    return gradients


def _patches(block: Block, x: Array, scratch: Buffers) -> Array:
    """Return the patch matrix of a slice of samples, of shape (positions, K)."""
    window = block.window
    assert window is not None
    shape = (len(x), window.out_height, window.out_width, window.kernel**2 * x.shape[-1])
    bordered = scratch.filled(window, (len(x), *window.bordered, x.shape[-1]), x.dtype, 0.0)
    return im2col(x, window, scratch.array("patches", shape, x.dtype), bordered).reshape(-1, shape[-1])


def _sum_lanes(lanes: Array, out: Array, workspace: Workspace) -> None:
    def rows(part: slice, scratch: Buffers) -> None:
        lanes[:, part].sum(axis=0, out=out[part])

    workspace.run([partial(rows, part) for part in even_slices(len(out), LANES)])


def _slice_lengths(block: Block, batch: int, itemsize: int, on_host: bool, split: bool = False) -> tuple[int, int]:
    """Return how many samples go through the block together, and how many of them through one GEMM.

    What one GEMM reads shall fit the cache, yet have rows enough. Element-wise operations work on the larger group:
    short ones would leave the threads waiting for the interpreter. `split` is for `_split_gradients`.
    """
    positions = block.pre_shape[0] * block.pre_shape[1]
    if split:
        assert block.window is not None
        rows = block.in_shape[0] * block.pre_shape[1]
        width, limit = block.window.kernel * (block.in_shape[2] + block.pre_shape[2]), HOST_SPLIT_BYTES
    else:
        rows, width, limit = positions, math.prod(block.weight_shape[:3]), HOST_PATCH_BYTES
    if not on_host:
        return batch, max(1, DEVICE_PATCH_BYTES // (rows * width * itemsize))
    length = max(1, limit // (rows * width * itemsize), GEMM_ROWS // rows)
    group = max(length, HOST_GROUP_BYTES // (positions * block.pre_shape[2] * itemsize))
    most = -(-batch // 2)
    return min(group, most), min(length, most)


def _lane_count(weight_bytes: int) -> int:
    """Return into how many lanes the batch is cut: fewer for large weights, whose copies cost memory and time."""
    return max(2, min(LANES, LANE_BYTES // weight_bytes))


def _tiles(count: int) -> list[slice]:
    """Cut one side of a GEMM's result so that threads share it and packing the other factor stays cheap."""
    return even_slices(count, min(TILES, count // 256))


def _gemm(a: Array, b: Array, out: Array) -> None:
    """Write the matrix product a b to `out`, whose rows may be strided."""
    array_module(a, b, out).matmul(a, b, out=out)
