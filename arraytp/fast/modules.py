"""The feedback modules G^n in slices shared by threads; `arraytp.model.feedback` has the plain form.

All activations have f(0) = 0, so that f(unpool(t)) = unpool(f(t)) unless values add up.
"""

from collections.abc import Callable
from functools import partial

from arraytp.backend import Array
from arraytp.fast.parallel import Buffers, Workspace, slices
from arraytp.fast.passes import places, product
from arraytp.fast.products import pass_slices, split_products
from arraytp.model.blocks import Block
from arraytp.model.feedback import input_difference
from arraytp.model.passes import At
from arraytp.ops.pool import max_unpool, max_unpool_scatter, overlaps
from arraytp.options import Unpool

OWNER = "modules"


def feedback_difference(workspace: Workspace, at: At, omega: Array, delta: Array, mode: Unpool) -> Array:
    """Return δ^n = G^n(s^{n+1} + δ^{n+1}) − G^n(s^{n+1}) = ω ∘ (a(s + δ) − a(s)): `At.feedback_difference`."""
    block, s, index = at.block, at.output, at.index
    delta = delta.reshape(s.shape)

    def inputs(part: slice, out: Array) -> None:
        where = None if index is None else index[part]
        if _adds_up(block, mode):
            out[...] = input_difference(block, s[part], delta[part], where, mode)
        else:
            _unpool(block, block.activation.difference(s[part], delta[part]), where, out, workspace.scratch)

    return transposed(workspace, at, omega, inputs)


def feedback(workspace: Workspace, at: At, omega: Array, bias: Array, t: Array, mode: Unpool) -> Array:
    """Return G^n(t): `At.feedback`."""
    block, t, index = at.block, t.reshape(at.output.shape), at.index

    def inputs(part: slice, out: Array) -> None:
        copy = workspace.scratch.of(OWNER).array("t", t[part].shape, t.dtype)
        copy[...] = t[part]
        write_input(block, copy, None if index is None else index[part], mode, out, workspace.scratch)

    r = transposed(workspace, at, omega, inputs)
    r.reshape(len(t), *block.in_shape)[...] += bias
    return r


def transposed(workspace: Workspace, at: At, omega: Array, inputs: Callable[[slice, Array], None]) -> Array:
    """Return ω ∘ a, of s^n's shape; `inputs` writes a of some samples. Threads share the samples."""
    block, like = at.block, at.s
    batch, own = len(like), workspace.of((OWNER, at.batch.results, at.n))
    out = own.array("transposed", (batch, *block.in_shape), like.dtype)
    if block.window is None:
        a = own.array("a", (batch, *block.pre_shape), like.dtype)
        workspace.run([partial(inputs, slice(0, batch), a)])
        return product(workspace, a, omega.T, out).reshape(like.shape)
    products = split_products(block)
    matrix = products.matrix(omega)

    def samples(part: slice) -> None:
        scratch = workspace.scratch
        a = scratch.of(OWNER).array("a", (part.stop - part.start, *block.pre_shape), like.dtype)
        inputs(part, a)
        products.transposed(products.stack(a, scratch), matrix, scratch, out=out[part])

    _, length = pass_slices(products, batch, like.itemsize, workspace.most_lanes)
    workspace.run([partial(samples, part) for part in slices(batch, length)])
    return out.reshape(like.shape)


def write_input(block: Block, t: Array, index: Array | None, mode: Unpool, out: Array, scratch: Buffers) -> None:
    """Write a(t) = f(unpool(t)) to `out` (samples, *pre_shape); t (samples, *out_shape) is overwritten.

    f is applied before unpooling where no values add up, since f(0) = 0.
    """
    if block.pool is None or index is None:
        block.activation(t, out=out)
    elif _adds_up(block, mode):
        out[...] = max_unpool(t, index, block.pool, mode)
        block.activation(out, out=out)
    else:
        block.activation(t, out=t)
        _unpool(block, t, index, out, scratch)


def _unpool(block: Block, t: Array, index: Array | None, out: Array, scratch: Buffers) -> None:
    """Write t to `out` at the positions of the pool's maxima; of several values for one pixel the last stays."""
    if block.pool is None or index is None:
        out[...] = t
    else:
        max_unpool_scatter(t, index, block.pool, *places(t.shape, block.pool, scratch), out)


def _adds_up(block: Block, mode: Unpool) -> bool:
    """Tell whether unpooling adds up values in one pixel: only then can f(unpool(t)) differ from unpool(f(t))."""
    return block.pool is not None and mode == "accumulate" and overlaps(block.pool)
