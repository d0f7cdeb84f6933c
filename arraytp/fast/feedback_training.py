"""The fast iteration of feedback training, in slices shared by threads; the rules hold the plain one.

While the feedback weights ω of a block are trained on a batch, θ and s stay as they are. An iteration takes products:

    θ ∘ ε,  ε ⋆ d1,  ω ∘ d2,  (ω ∘ d2) ⋆ d2          L-DRL: four
    θ ∘ ε,  ω ∘ a1,  (r − s − ε) ⋆ a1                  DTP: three

of which the first two of L-DRL share the patch matrix of ε. θ ∘ s and a(s^{n+1}) are computed once a batch, and while
one iteration is computed the next one's noise is drawn.

A block goes one of two ways. *Broad* ones have many positions: slices of samples go through all products, and each
lane, a fixed part of the batch, sums up its own gradient. For stride 1 the kernel's rows and columns are summed over
apart (`split_matrix`), in arrays k times as large as an image where patches are k² times. *Heavy* ones, dense blocks
and convolutions of small maps, first gather the factors of all samples, [−d1; d2] and the patches of [ε; ω ∘ d2]; then
one product of twice the length gives the gradient, whose rows are shared by the threads.

Slices and lanes depend on shapes alone, so that results do not depend on the threads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.modules import write_feedback_input
from arraytp.fast.parallel import Buffers, Task, Workspace, even_slices, slices
from arraytp.fast.products import (
    carry,
    is_split,
    matmul,
    patch_rows,
    product_matrix,
    sample_group,
    scatter_back,
    stack,
    take_patches,
)
from arraytp.model.network import Block, ForwardPass, Network
from arraytp.ops.activations import activation_forward
from arraytp.ops.conv import as_matrix
from arraytp.ops.noise import CHUNK, gaussian
from arraytp.ops.patches import Window, add_stacked_rows
from arraytp.ops.pool import max_pool_forward
from arraytp.options import Unpool

# An iteration's noises: that of the block's input, that of its output.
EPSILON, ETA = 0, 1
LANES = 4
LANE_BYTES = 4 << 20
ROW_TILES = 8
TILED_SIZE = 1 << 16


@dataclass(frozen=True)
class Frozen:
    """What stays as it is while the feedback weights of one block are trained on one batch.

    Parameters
    ----------
    block : Block
    theta, bias : arrays
        Of F^n.
    s : array of shape (B, *in_shape)
        s^n.
    out, index : arrays of shape (B, *out_shape)
        s^{n+1}, and the maxima of its pool or None.
    z : array of shape (B, *pre_shape)
        θ ∘ s^n without the bias.
    a : array of shape (B, *pre_shape)
        a(s^{n+1}).
    unpool : {"overwrite", "accumulate"}
    sigma : float
        Of the noise.
    key : tuple of int
        Of the noise: seed, step, block.
    iterations : int
        How many there will be.
    noise : map of iteration to (ε, η)
        The two drawn last.
    """

    block: Block
    theta: Array
    bias: Array
    s: Array
    out: Array
    index: Array | None
    z: Array
    a: Array
    unpool: Unpool
    sigma: float
    key: tuple[int, ...]
    iterations: int
    noise: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    @property
    def window(self) -> Window:
        """The block's window, for a convolution."""
        assert self.block.window is not None
        return self.block.window


def freeze(
    network: Network,
    passed: ForwardPass,
    n: int,
    unpool: Unpool,
    sigma: float,
    key: tuple[int, int],
    iterations: int,
    workspace: Workspace,
) -> Frozen:
    """Compute what all iterations of block n share; `key` is seed and step. Valid until the next call."""
    block, x = network.blocks[n], passed.x[n]
    s, out, index = x.reshape(len(x), *block.in_shape), passed.s[n + 1], passed.index[n]
    z = workspace.array("frozen z", (len(x), *block.pre_shape), x.dtype)
    a = workspace.array("frozen a", z.shape, x.dtype)
    matrix = as_matrix(network.weights[n])

    def samples(part: slice, scratch: Buffers) -> None:
        rows = patch_rows(block, s[part], scratch)
        matmul(rows, matrix, z[part].reshape(len(rows), -1))
        write_feedback_input(block, out[part].copy(), None if index is None else index[part], unpool, a[part], scratch)

    workspace.run(
        [partial(samples, part) for part in slices(len(x), sample_group(block, len(x), x.itemsize, workspace))]
    )
    return Frozen(
        block, network.weights[n], network.biases[n], s, out, index, z, a, unpool, sigma, (*key, n), iterations
    )


def ldrl_gradient(
    frozen: Frozen, omega: Array, k: int, workspace: Workspace, every_loss: bool = False
) -> tuple[Array, Array | None]:
    """Return the gradient of ω and the loss of L-DRL's iteration k: `arraytp.rules.ldrl.iteration`.

    The gradient is valid until the next call. The loss, ⟨ω, gradient⟩ − (1/B) Σ ‖ω ∘ d2‖², is computed for the last
    iteration only, else it is None, unless `every_loss` is asked for.
    """
    epsilon, eta = _noise(frozen, k, workspace)
    ahead = _noise_tasks(frozen, k + 1, workspace)
    compute = _ldrl_broad if _is_broad(frozen) else _ldrl_heavy
    gradient, squares = compute(frozen, omega, epsilon, eta, ahead, workspace)
    if k < frozen.iterations - 1 and not every_loss:
        return gradient, None
    return gradient, (gradient * omega).sum() - squares.sum() / squares.dtype.type(len(frozen.s))


def _is_broad(frozen: Frozen) -> bool:
    """Tell whether the rows of a product, one per position, are many more than its columns."""
    positions = len(frozen.s) * math.prod(frozen.block.pre_shape[:-1])
    return frozen.block.window is not None and positions > 4 * frozen.block.pre_shape[-1]


def _ldrl_broad(
    frozen: Frozen, omega: Array, epsilon: Array, eta: Array, ahead: list[Task], workspace: Workspace
) -> tuple[Array, Array]:
    """Every lane sums up −ε ⋆ d1 + (ω ∘ d2) ⋆ d2 over its samples."""
    block, xp = frozen.block, array_module(omega)
    theta, carrier = product_matrix(block, frozen.theta), product_matrix(block, omega)

    def part_of_lane(part: slice, total: Array, already: int, scratch: Buffers) -> Array:
        patches = take_patches(block, epsilon[part], scratch)
        d1 = _noisy_input(frozen, patches, theta, part, scratch)
        xp.subtract(frozen.a[part], d1, out=d1)
        _add_product(patches.T, stack(block, d1, scratch), total, already, scratch)
        stacked = stack(block, _d2(frozen, eta, part, scratch), scratch)
        r = carry(block, stacked, carrier, scratch)
        _add_product(take_patches(block, r, scratch).T, stacked, total, 1, scratch)
        return _sum_of_squares(r)

    return _summed_lanes(frozen, omega, part_of_lane, ahead, workspace)


def _summed_lanes(
    frozen: Frozen,
    omega: Array,
    part_of_lane: Callable[[slice, Array, int, Buffers], Array],
    ahead: list[Task],
    workspace: Workspace,
) -> tuple[Array, Array]:
    """Return 2/B times what `part_of_lane` sums up over the samples, and its sums of squares lane by lane.

    `part_of_lane` is given samples, the sum to add to, whether there is something in it already, and scratch buffers.
    """
    block, batch = frozen.block, len(frozen.s)
    lanes = _lanes(omega, batch, workspace)
    k, channels, outputs = omega.shape[0], omega.shape[-2], omega.shape[-1]
    shape = (k * channels, k * outputs) if is_split(block) else as_matrix(omega).shape
    totals = workspace.array("lane sums", (len(lanes), *shape), omega.dtype)
    squares = workspace.array("squares", (len(lanes),), omega.dtype)
    group = sample_group(block, batch, omega.itemsize, workspace)

    def lane(number: int, scratch: Buffers) -> None:
        squares[number] = 0
        for i, part in enumerate(slices(lanes[number].stop, group, lanes[number].start)):
            squares[number] += part_of_lane(part, totals[number], i, scratch)

    workspace.run([*(partial(lane, number) for number in range(len(lanes))), *ahead])
    gradient = workspace.array("gradient", omega.shape, omega.dtype)
    total = totals.sum(axis=0)
    if is_split(block):
        total = total.reshape(k, channels, k, outputs).transpose(2, 0, 1, 3)[::-1]
    array_module(omega).multiply(total.reshape(omega.shape), omega.dtype.type(2 / batch), out=gradient)
    return gradient, squares


def _ldrl_heavy(
    frozen: Frozen, omega: Array, epsilon: Array, eta: Array, ahead: list[Task], workspace: Workspace
) -> tuple[Array, Array]:
    """All samples' patches of ε and ω ∘ d2 stand above each other, as do −d1 and d2; one product sums over both."""
    block, batch, xp = frozen.block, len(frozen.s), array_module(omega)
    matrix = as_matrix(omega)
    positions = math.prod(block.pre_shape[:-1])
    patches = workspace.array("patches of both", (2, batch * positions, len(matrix)), omega.dtype)
    both = workspace.array("both d", (2, batch * positions, matrix.shape[1]), omega.dtype)
    parts = _lanes(omega, batch, workspace)
    squares = workspace.array("squares", (len(parts),), omega.dtype)

    def samples(number: int, scratch: Buffers) -> None:
        part = parts[number]
        rows = slice(part.start * positions, part.stop * positions)
        patch_rows(block, epsilon[part], scratch, patches[0, rows])
        z = scratch.array("z", frozen.z[part].shape, omega.dtype)
        matmul(patches[0, rows], as_matrix(frozen.theta), z.reshape(len(patches[0, rows]), -1))
        z += frozen.z[part]
        d1 = _inputs_of(frozen, z, scratch)
        xp.subtract(frozen.a[part], d1, out=both[0, rows].reshape(d1.shape))
        both[1, rows] = _d2(frozen, eta, part, scratch).reshape(-1, matrix.shape[1])
        if block.window is None:
            r = patches[1, rows]
            matmul(both[1, rows], matrix.T, r)
        else:
            r = scatter_back(block, both[1, rows], matrix, scratch)
            patch_rows(block, r, scratch, patches[1, rows])
        squares[number] = _sum_of_squares(r)

    workspace.run([*(partial(samples, number) for number in range(len(parts))), *ahead])
    both *= omega.dtype.type(2 / batch)
    gradient = workspace.array("gradient", omega.shape, omega.dtype)
    left, right = patches.reshape(-1, len(matrix)), both.reshape(-1, matrix.shape[1])

    def weight_rows(part: slice, scratch: Buffers) -> None:
        matmul(left[:, part].T, right, as_matrix(gradient)[part])

    workspace.run([partial(weight_rows, part) for part in even_slices(len(matrix), _tiles(matrix))])
    return gradient, squares


def reconstruction_gradient(
    frozen: Frozen, omega: Array, bias: Array, k: int, workspace: Workspace
) -> tuple[Array, Array, Array]:
    """Return the gradients of ω and bias, and the loss, of DTP's iteration k: `arraytp.rules.dtp.iteration`.

    The gradients are valid until the next call.
    """
    block, batch = frozen.block, len(frozen.s)
    epsilon, _ = _noise(frozen, k, workspace, output=False)
    ahead = _noise_tasks(frozen, k + 1, workspace, output=False)
    theta, carrier = product_matrix(block, frozen.theta), product_matrix(block, omega)
    biases = workspace.array("bias sums", (batch, len(bias)), omega.dtype)

    def part_of_lane(part: slice, total: Array, already: int, scratch: Buffers) -> Array:
        a = _noisy_input(frozen, take_patches(block, epsilon[part], scratch), theta, part, scratch)
        stacked = stack(block, a, scratch)
        r = carry(block, stacked, carrier, scratch).reshape(epsilon[part].shape)
        r += bias
        r -= frozen.s[part]
        r -= epsilon[part]
        _add_product(take_patches(block, r, scratch).T, stacked, total, already, scratch)
        r.reshape(len(r), -1, len(bias)).sum(axis=1, out=biases[part])
        return _sum_of_squares(r)

    gradient, squares = _summed_lanes(frozen, omega, part_of_lane, ahead, workspace)
    dbias = biases.sum(axis=0) * omega.dtype.type(2 / batch)
    return gradient, dbias, squares.sum() / squares.dtype.type(batch)


def _noisy_input(frozen: Frozen, patches: Array, theta: Array, part: slice, scratch: Buffers) -> Array:
    """Return a(F(s + ε)) of some samples, of shape (samples, *pre_shape).

    Given are `take_patches` of ε and `product_matrix` of θ.
    """
    z = scratch.array("z", frozen.z[part].shape, frozen.z.dtype)
    if is_split(frozen.block):
        stacked = scratch.array("stacked", (len(patches), len(theta)), z.dtype)
        matmul(patches, theta.T, stacked)
        z[...] = frozen.z[part]
        add_stacked_rows(stacked.reshape(len(z), frozen.window.height, z.shape[2], -1), frozen.window, z)
    else:
        matmul(patches, theta, z.reshape(len(patches), -1))
        z += frozen.z[part]
    return _inputs_of(frozen, z, scratch)


def _inputs_of(frozen: Frozen, z: Array, scratch: Buffers) -> Array:
    """Return a(F(s)), of z's shape, given z = θ ∘ s without the bias; z is overwritten."""
    block, dtype = frozen.block, z.dtype
    if block.pool is None:
        z += frozen.bias
        activation_forward(z, block.activation, out=z)
        return activation_forward(z, block.activation, out=z)
    bordered = scratch.filled(block.pool, (len(z), *block.pool.bordered, z.shape[-1]), dtype, -np.inf)
    pooled = scratch.array("pooled", (len(z), *block.out_shape), dtype)
    index = scratch.array("index", pooled.shape, np.uint8)
    stack = scratch.array("stack", (block.pool.kernel**2, *pooled.shape), dtype)
    max_pool_forward(z, block.pool, pooled, index, bordered, stack)
    # As in `arraytp.fast.passes`: bias and activation after the pool, since f does not decrease. Which of ReLU's zeros
    # is the maximum does not matter here: what is put there is 0.
    pooled += frozen.bias
    activation_forward(pooled, block.activation, out=pooled)
    write_feedback_input(block, pooled, index, frozen.unpool, z, scratch)
    return z


def _d2(frozen: Frozen, eta: Array, part: slice, scratch: Buffers) -> Array:
    """Return d2 = a(s^{n+1} + η) − a(s^{n+1}) of some samples, of shape (samples, *pre_shape)."""
    moved = scratch.array("moved", frozen.out[part].shape, eta.dtype)
    array_module(eta).add(frozen.out[part], eta[part], out=moved)
    d2 = scratch.array("d2", frozen.z[part].shape, eta.dtype)
    write_feedback_input(
        frozen.block, moved, None if frozen.index is None else frozen.index[part], frozen.unpool, d2, scratch
    )
    d2 -= frozen.a[part]
    return d2


def _noise(frozen: Frozen, k: int, workspace: Workspace, output: bool = True) -> tuple[Array, Array]:
    """Return ε and η of iteration k, drawn ahead or now; they stay until that of k + 2 is drawn."""
    if k not in frozen.noise:
        workspace.run(_noise_tasks(frozen, k, workspace, output))
    return frozen.noise[k]


def _noise_tasks(frozen: Frozen, k: int, workspace: Workspace, output: bool = True) -> list[Task]:
    """Return tasks that draw ε and, for `output`, η of iteration k, unless there is none or it is drawn already."""
    if k >= frozen.iterations or k in frozen.noise:
        return []
    # Every other iteration's noise shares a buffer.
    for other in [drawn for drawn in frozen.noise if drawn % 2 == k % 2]:
        del frozen.noise[other]
    arrays: list[Array] = []
    tasks: list[Task] = []
    for kind, like in ((EPSILON, frozen.s), (ETA, frozen.out))[: 2 if output else 1]:
        array = workspace.array(("noise", kind, k % 2), like.shape, like.dtype)
        arrays.append(array)
        tasks += [
            partial(_draw, array[part], frozen.sigma, part.start, (*frozen.key, k, kind))
            for part in slices(len(array), CHUNK if workspace.backend.on_host else len(array))
        ]
    frozen.noise[k] = arrays[0], arrays[-1]
    return tasks


def _draw(out: Array, sigma: float, first: int, key: tuple[int, ...], scratch: Buffers) -> None:
    gaussian(out, sigma, first, *key)


def _add_product(a: Array, b: Array, total: Array, already: int, scratch: Buffers) -> None:
    """Write the matrix product a b to `total`, or add it to what there is `already`."""
    if not already:
        matmul(a, b, total)
        return
    share = scratch.array("share", total.shape, total.dtype)
    matmul(a, b, share)
    total += share


def _lanes(omega: Array, batch: int, workspace: Workspace) -> list[slice]:
    """Cut the batch into lanes, fewer for large weights: each has sums of their size."""
    lanes = max(2, min(LANES, LANE_BYTES // omega.nbytes))
    return even_slices(batch, lanes) if workspace.backend.on_host else [slice(0, batch)]


def _tiles(matrix: Array) -> int:
    return ROW_TILES if matrix.size > TILED_SIZE else 1


def _sum_of_squares(r: Array) -> Array:
    flat = r.reshape(-1)
    return array_module(r).dot(flat, flat)
