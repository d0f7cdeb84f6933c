"""The feedback modules G^n in slices shared by threads: `arraytp.model.feedback` holds them plainly.

All activations have f(0) = 0, so that f(unpool(t)) = unpool(f(t)) unless values add up.
"""

from collections.abc import Callable
from functools import partial

from arraytp.backend import Array
from arraytp.fast import cuts
from arraytp.fast.buffers import Buffers
from arraytp.fast.parallel import Workspace, slices
from arraytp.fast.passes import product
from arraytp.fast.pools import adds_up, unpool
from arraytp.fast.products import split_products
from arraytp.model.blocks import Block
from arraytp.model.feedback import input_difference
from arraytp.model.passes import At
from arraytp.ops.pool import max_unpool
from arraytp.options import Unpool

OWNER = "modules"


def feedback_difference(at: At, omega: Array, delta: Array, mode: Unpool, workspace: Workspace) -> Array:
    """Return δ^n = G^n(s^{n+1} + δ^{n+1}) − G^n(s^{n+1}) = ω ∘ (a(s + δ) − a(s)): `At.feedback_difference`."""
    block, s = at.block, at.output
    delta = delta.reshape(s.shape)

    def inputs(part: slice, out: Array, scratch: Buffers) -> None:
        index = None if at.index is None else at.index[part]
        if adds_up(block, mode):
            out[...] = input_difference(block, s[part], delta[part], index, mode)
        else:
            unpool(block, block.activation.difference(s[part], delta[part]), index, out, scratch)

    return transposed(at, omega, inputs, workspace)


def feedback(at: At, omega: Array, bias: Array, t: Array, mode: Unpool, workspace: Workspace) -> Array:
    """Return G^n(t): `At.feedback`."""
    block, t = at.block, t.reshape(at.output.shape)

    def inputs(part: slice, out: Array, scratch: Buffers) -> None:
        index = None if at.index is None else at.index[part]
        write_input(block, _copy(t[part], scratch), index, mode, out, scratch)

    r = transposed(at, omega, inputs, workspace)
    r.reshape(len(t), *block.in_shape)[...] += bias
    return r


def write_input(block: Block, t: Array, index: Array | None, mode: Unpool, out: Array, scratch: Buffers) -> None:
    """Write a(t) = f(unpool(t)) to `out` (samples, *pre_shape); t (samples, *out_shape) is overwritten.

    f comes first where no values add up, for f(0) = 0.
    """
    if block.pool is None or index is None:
        block.activation(t, out=out)
    elif adds_up(block, mode):
        out[...] = max_unpool(t, index, block.pool, mode)
        block.activation(out, out=out)
    else:
        block.activation(t, out=t)
        unpool(block, t, index, out, scratch)


def _copy(t: Array, scratch: Buffers) -> Array:
    copy = scratch.of(OWNER).array("t", t.shape, t.dtype)
    copy[...] = t
    return copy


def transposed(at: At, omega: Array, inputs: Callable[[slice, Array, Buffers], None], workspace: Workspace) -> Array:
    """Return ω ∘ a of s^n's shape; `inputs` writes a of some samples. Samples are shared by threads."""
    block, like = at.block, at.s
    batch, own = len(like), workspace.of((OWNER, at.batch.results, at.n))
    out = own.array("transposed", (batch, *block.in_shape), like.dtype)
    if block.window is None:
        a = own.array("a", (batch, *block.pre_shape), like.dtype)
        workspace.run([partial(inputs, slice(0, batch), a)])
        return product(a, omega.T, out, workspace).reshape(like.shape)
    products = split_products(block)
    matrix = products.matrix(omega)

    def samples(part: slice, scratch: Buffers) -> None:
        a = scratch.of(OWNER).array("a", (part.stop - part.start, *block.pre_shape), like.dtype)
        inputs(part, a, scratch)
        products.transposed(products.stack(a, scratch), matrix, len(a), scratch, out=out[part])

    _, length = cuts.pass_slices(products, batch, like.itemsize, workspace.backend.on_host)
    workspace.run([partial(samples, part) for part in slices(batch, length)])
    return out.reshape(like.shape)
