"""The feedback modules G^n in slices shared by threads: `arraytp.model.feedback` holds them plainly.

All activations have f(0) = 0, so that f(unpool(t)) = unpool(f(t)) unless values add up.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.parallel import Buffers, Workspace, slices
from arraytp.fast.passes import product
from arraytp.fast.products import carry, product_matrix, sample_group, stack
from arraytp.model.feedback import input_difference
from arraytp.model.network import Block, ForwardPass, Network
from arraytp.ops.activations import activation_difference, activation_forward
from arraytp.ops.pool import max_unpool, max_unpool_scatter, overlaps, window_corners
from arraytp.options import Unpool


def target_difference(
    network: Network, passed: ForwardPass, n: int, omega: Array, delta: Array, unpool: Unpool, workspace: Workspace
) -> Array:
    """Return δ^n = G^n(s^{n+1} + δ^{n+1}) − G^n(s^{n+1}) = ω ∘ (a(s + δ) − a(s)), of block n's input's shape.

    Parameters
    ----------
    network : Network
    passed : ForwardPass
    n : int
        The block, not the first.
    omega : array of weight_shape
    delta : array of shape (B, *out_shape)
        t^{n+1} − s^{n+1}.
    unpool : {"overwrite", "accumulate"}
    workspace : Workspace
        Holds the result until the next call.
    """
    block, s, index = network.blocks[n], passed.s[n + 1], passed.index[n]
    delta = delta.reshape(s.shape)

    def inputs(part: slice, out: Array, scratch: Buffers) -> None:
        maxima = None if index is None else index[part]
        if block.pool is not None and unpool == "accumulate" and overlaps(block.pool):
            out[...] = input_difference(block, s[part], delta[part], maxima, unpool)
            return
        moved = activation_difference(s[part], delta[part], block.activation)
        _unpool(block, moved, maxima, out, scratch)

    return _affine(block, omega, inputs, passed.x[n], n, workspace)


def feedback_output(
    network: Network,
    passed: ForwardPass,
    n: int,
    omega: tuple[Array, Array],
    t: Array,
    unpool: Unpool,
    workspace: Workspace,
) -> Array:
    """Return G^n(t), of block n's input's shape; `omega` is weight and bias, the rest as in `target_difference`."""
    block, index = network.blocks[n], passed.index[n]
    t = t.reshape(passed.s[n + 1].shape)

    def inputs(part: slice, out: Array, scratch: Buffers) -> None:
        write_feedback_input(block, t[part].copy(), None if index is None else index[part], unpool, out, scratch)

    r = _affine(block, omega[0], inputs, passed.x[n], n, workspace)
    r.reshape(len(t), *block.in_shape)[...] += omega[1]
    return r


def _affine(
    block: Block,
    omega: Array,
    inputs: Callable[[slice, Array, Buffers], None],
    like: Array,
    n: int,
    workspace: Workspace,
) -> Array:
    """Return ω ∘ a of the shape of `like`; `inputs` writes a of some samples. Samples are shared by threads."""
    batch = len(like)
    out = workspace.array(("carried", n), (batch, *block.in_shape), like.dtype)
    if block.window is None:
        a = workspace.array(("inputs", n), (batch, *block.pre_shape), like.dtype)
        workspace.run([partial(inputs, slice(0, batch), a)])
        product(a, omega.T, out, workspace)
        return out.reshape(like.shape)
    carrier = product_matrix(block, omega)

    def samples(part: slice, scratch: Buffers) -> None:
        a = scratch.array("a", (part.stop - part.start, *block.pre_shape), like.dtype)
        inputs(part, a, scratch)
        out[part] = carry(block, stack(block, a, scratch), carrier, scratch).reshape(out[part].shape)

    workspace.run(
        [partial(samples, part) for part in slices(batch, sample_group(block, batch, like.itemsize, workspace))]
    )
    return out.reshape(like.shape)


def write_feedback_input(
    block: Block, t: Array, index: Array | None, unpool: Unpool, out: Array, scratch: Buffers
) -> None:
    """Write a(t) = f(unpool(t)) to `out` (B, *pre_shape); t (B, *out_shape) is overwritten.

    f comes first where no values add up, for f(0) = 0.
    """
    if block.pool is None or index is None:
        activation_forward(t, block.activation, out=out)
        return
    if unpool == "accumulate" and overlaps(block.pool):
        out[...] = max_unpool(t, index, block.pool, unpool)
        activation_forward(out, block.activation, out=out)
        return
    activation_forward(t, block.activation, out=t)
    _unpool(block, t, index, out, scratch)


def _unpool(block: Block, t: Array, index: Array | None, out: Array, scratch: Buffers) -> None:
    """Write t where the pool's maxima were to `out`; the last of several values for one pixel stays."""
    if block.pool is None or index is None:
        out[...] = t
        return
    if array_module(t) is not np:
        out[...] = max_unpool(t, index, block.pool, "overwrite")
        return
    corners = partial(window_corners, len(t), block.pool, t.shape[-1])
    corner = scratch.cached(("corners", block.pool, t.shape[-1]), len(t), corners)
    max_unpool_scatter(t, index, block.pool, corner, scratch.array("position", t.shape, np.intp), out)
