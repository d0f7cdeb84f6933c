"""The feedback modules G^n of target propagation, plainly: a block reversed (DTP paper, Section 3).

G^n maps the space of s^{n+1} to that of s^n, for every block but the first:

    max-unpool → activation → transposed affine map with ω^n, plus a bias

ω^n has the shape of the block's weight θ^n; symmetric means ω = θ. a is the input of the affine map: G = ω ∘ a + bias.
`arraytp.fast.modules` computes the same in slices.
"""

from arraytp.backend import Array, array_module
from arraytp.model.blocks import Block
from arraytp.ops.conv import conv_backward_input
from arraytp.ops.dense import dense_backward_input
from arraytp.ops.patches import im2col
from arraytp.ops.pool import max_pool_backward, max_unpool
from arraytp.options import Unpool


def unpooled(block: Block, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return t, of shape (B, *out_shape), put at the pool's maxima: (B, *pre_shape); t itself without a pool."""
    return t if block.pool is None else max_unpool(t, index, block.pool, unpool)


def feedback_input(block: Block, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return a = f(unpool(t)), the input of G's affine map.

    Parameters
    ----------
    block : Block
    t : array of shape (B, *out_shape)
        s^{n+1} or a target of it.
    index : array or None
        The maxima of the forward pass that t belongs to.
    unpool : {"overwrite", "accumulate"}
        See `max_unpool`.

    Returns
    -------
    array of shape (B, *pre_shape)
    """
    return block.activation(unpooled(block, t, index, unpool))


def transposed(block: Block, weight: Array, a: Array) -> Array:
    """Return ω ∘ a, of shape (B, *in_shape), for a of shape (B, *pre_shape): the transposed affine map, no bias."""
    if block.window is None:
        return dense_backward_input(a, weight)
    return conv_backward_input(a, weight, block.window)


def feedback_forward(block: Block, weight: Array, bias: Array, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return G(t), of shape (B, *in_shape); `bias` is of shape in_shape[-1:], the others as in `feedback_input`."""
    return transposed(block, weight, feedback_input(block, t, index, unpool)) + bias


def outer(block: Block, x: Array, d: Array) -> Array:
    """Return x ⋆ d of weight_shape, the gradient of ω in ⟨x, ω ∘ d⟩, summed over samples and positions.

    Parameters
    ----------
    block : Block
    x : array of shape (B, *in_shape)
    d : array of shape (B, *pre_shape)
    """
    patches = x if block.window is None else im2col(x, block.window)
    return (patches.reshape(-1, patches.shape[-1]).T @ d.reshape(-1, d.shape[-1])).reshape(block.weight_shape)


def input_difference(block: Block, s: Array, delta: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return a(s + δ) − a(s) of shape (B, *pre_shape), exact for small δ; ω ∘ this is G(s + δ) − G(s)."""
    u, du = (unpooled(block, t, index, unpool) for t in (s, delta))
    return block.activation.difference(u, du)


def jacobian_overlap(block: Block, s: Array, index: Array | None, unpool: Unpool) -> tuple[Array, Array]:
    """Return N and M, which Theorem 4.2 needs of a batch's two Jacobians, both of shape (k, k, 1, O) or (1, out).

    With D_F = f'(z) at the output's own position and D_G = f'(unpooled s) there (0 where another output overwrote it),
    ⟨∂Fᵀ, ∂G⟩ = Σ θ ω N and ‖∂G‖² = Σ ω² M, with N = Σ D_F D_G and M = Σ D_G² over samples and over those positions
    whose tap lies inside the image.

    Parameters
    ----------
    block : Block
    s : array of shape (B, *out_shape)
        s^{n+1}.
    index, unpool
        As in `feedback_input`.

    Returns
    -------
    N, M : arrays
    """
    xp = array_module(s)
    forward, back = _slopes(block, s, index, unpool)
    if block.window is None:
        return (forward * back).sum(axis=0)[None], (back * back).sum(axis=0)[None]
    inside = xp.ones((1, block.window.height, block.window.width, 1), dtype=s.dtype)
    taps = im2col(inside, block.window).reshape(-1, block.window.kernel**2)
    maps = [
        values if block.pool is None else max_pool_backward(values, index, block.pool)
        for values in (forward * back, back * back)
    ]
    shape = (*block.weight_shape[:2], 1, block.weight_shape[-1])
    n, m = ((taps.T @ values.sum(axis=0).reshape(len(taps), -1)).reshape(shape) for values in maps)
    return n, m


def _slopes(block: Block, s: Array, index: Array | None, unpool: Unpool) -> tuple[Array, Array]:
    """Return D_F and D_G of every output, of s's shape."""
    xp = array_module(s)
    ones = xp.ones_like(s)
    forward = block.activation.backward(ones, s)
    u = unpooled(block, s, index, unpool)
    slope = block.activation.backward(xp.ones_like(u), block.activation(u))
    if block.pool is None:
        return forward, slope
    number = xp.arange(1, s.size + 1, dtype=xp.float64).reshape(s.shape)
    seen = picked(block, slope, index)
    if unpool == "accumulate":
        return forward, seen
    # Which output's value each maximum's position kept: outputs that another overwrote there have no part in G.
    owner = picked(block, max_unpool(number, index, block.pool, "overwrite"), index)
    return forward, seen * (owner == number)


def picked(block: Block, values: Array, index: Array) -> Array:
    """Return, for every output of a pool, the value at its maximum's position: (B, *pre_shape) to (B, *out_shape)."""
    xp, pool = array_module(values), block.pool
    assert pool is not None
    rows, columns = pool.interior
    bordered = xp.zeros((len(values), *pool.bordered, values.shape[-1]), dtype=values.dtype)
    bordered[:, rows, columns] = values
    out = xp.zeros(index.shape, dtype=values.dtype)
    for element in range(pool.kernel**2):
        xp.copyto(
            out, bordered[(slice(None), *pool.offset(*divmod(element, pool.kernel)))], where=index == xp.uint8(element)
        )
    return out
