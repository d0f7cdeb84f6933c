"""Max-pooling, its adjoint and unpooling of a slice of samples, in scratch buffers.

On the host the adjoint and the unpooling assign at the maxima's places; on a device, where additions would come in no
fixed order, they go window element by window element (`arraytp.ops.pool`).
"""

from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.buffers import Buffers
from arraytp.model.blocks import Block
from arraytp.ops.patches import Window
from arraytp.ops.pool import (
    max_pool_backward,
    max_pool_forward,
    max_pool_scatter,
    max_unpool,
    max_unpool_scatter,
    overlaps,
    window_corners,
)
from arraytp.options import Unpool

OWNER = "pools"


def pool(z: Array, window: Window, out: Array, index: Array, scratch: Buffers) -> None:
    """Write the maxima of z, of shape (samples, H, W, C), and their places to `out` and `index`."""
    own = scratch.of(OWNER)
    bordered = own.filled(("border", window), (len(z), *window.bordered, z.shape[-1]), z.dtype, -np.inf)
    elements = own.array("elements", (window.kernel**2, *out.shape), z.dtype)
    max_pool_forward(z, window, out, index, bordered, elements)


def pool_adjoint(block: Block, ds: Array, index: Array | None, scratch: Buffers) -> Array:
    """Return ds, of shape (samples, *out_shape), at the maxima's places: of shape (samples, *pre_shape)."""
    if block.pool is None or index is None:
        return ds
    if array_module(ds) is not np:
        return max_pool_backward(ds, index, block.pool)
    out = scratch.of(OWNER).array("adjoint", (len(ds), *block.pre_shape[:2], ds.shape[-1]), ds.dtype)
    max_pool_scatter(ds, index, block.pool, *_places(ds, block.pool, scratch), out)
    return out


def unpool(block: Block, t: Array, index: Array | None, out: Array, scratch: Buffers) -> None:
    """Write t where the pool's maxima were to `out`; the last of several values for one pixel stays."""
    if block.pool is None or index is None:
        out[...] = t
    elif array_module(t) is not np:
        out[...] = max_unpool(t, index, block.pool, "overwrite")
    else:
        max_unpool_scatter(t, index, block.pool, *_places(t, block.pool, scratch), out)


def adds_up(block: Block, mode: Unpool) -> bool:
    """Tell whether unpooling adds up values that meet in one pixel: only then f(unpool(t)) is not unpool(f(t))."""
    return block.pool is not None and mode == "accumulate" and overlaps(block.pool)


def _places(t: Array, window: Window, scratch: Buffers) -> tuple[Array, Array]:
    """Return the corners of all windows, and room for the places of their maxima."""
    own = scratch.of(OWNER)
    make = partial(window_corners, len(t), window, t.shape[-1])
    return own.cached(("corners", window, t.shape[-1]), len(t), make), own.array("places", t.shape, np.intp)
