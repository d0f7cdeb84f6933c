"""N and M of Theorem 4.2 in slices shared by threads: passes over s^{n+1}, without patches or products over samples.

`arraytp.model.feedback.jacobian_overlap` is the plain form. With D_F = f'(z), read off s^{n+1}, and
D_G = f'(u) at the maximum's position, u = unpool(s^{n+1}):

- If unpooling overwrites, u = s for every output whose value is kept, and overwritten outputs add nothing.
- Values are summed over samples at their positions first, then over the positions that a tap reaches: a product of
  k² · P · Q · O operations, whatever the batch.
"""

from functools import partial

import numpy as np

from arraytp.backend import Array, add_product, array_module
from arraytp.fast.parallel import LANES, Buffers, Workspace, even_slices, slices
from arraytp.fast.passes import places
from arraytp.model.blocks import Block
from arraytp.model.passes import At
from arraytp.ops.patches import im2col
from arraytp.ops.pool import find_maxima, overlaps
from arraytp.options import Unpool

OWNER = "overlaps"
# Elements of s^{n+1} in a slice.
SLICE_ELEMENTS = 1 << 16


def jacobian_overlap(workspace: Workspace, at: At, mode: Unpool) -> tuple[Array, Array]:
    """Return N and M, of shape (k, k, 1, O) or (1, out), in float64."""
    block = at.block
    own, lanes = workspace.of(OWNER), even_slices(len(at.output), LANES)
    positions = int(np.prod(block.pre_shape))
    maps = own.array("maps", (2, len(lanes), positions), np.float64)
    length = max(1, SLICE_ELEMENTS // int(np.prod(block.out_shape)))

    def lane(number: int) -> None:
        maps[:, number] = 0
        for part in slices(lanes[number].stop, length, lanes[number].start):
            index = None if at.index is None else at.index[part]
            _add(block, at.output[part], index, mode, maps[:, number], workspace.scratch)

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    return per_tap(block, maps[0].sum(axis=0), own), per_tap(block, maps[1].sum(axis=0), own)


def _add(block: Block, s: Array, index: Array | None, mode: Unpool, maps: Array, scratch: Buffers) -> None:
    """Add D_F D_G and D_G² of some samples at their positions, of size P · Q · O, to the two maps."""
    f = block.activation
    if block.pool is None or index is None:
        slope = _slope(block, s)
        for i, values in enumerate((f.backward(slope, s), slope * slope)):
            maps[i] += values.reshape(len(s), -1).sum(axis=0, dtype=np.float64)
        return
    window, pixels = block.pool, int(np.prod(block.pre_shape))
    corners, maxima = places(index.shape, window, scratch)
    find_maxima(index, window, corners, maxima, len(s) * pixels)
    if not overlaps(window):
        slope = _slope(block, s)
    elif mode == "overwrite":
        slope = _slope(block, s) * _kept(maxima, len(s) * pixels, scratch.of(OWNER))
    else:
        # Values that meet in one pixel add up there.
        u = np.bincount(maxima.reshape(-1), s.reshape(-1), len(s) * pixels).astype(s.dtype)
        slope = _slope(block, u[maxima])
    # Places within a sample, so that all samples' values at one position add up.
    np.remainder(maxima, pixels, out=maxima)
    for i, values in enumerate((f.backward(slope, s), slope * slope)):
        maps[i] += np.bincount(maxima.reshape(-1), values.reshape(-1), pixels)


def _slope(block: Block, u: Array) -> Array:
    """Return f'(u), which `derivative` computes from f(u)."""
    f = block.activation
    return np.ones_like(u) if f.derivative is None else f.derivative(f(u))


def _kept(maxima: Array, pixels: int, own: Buffers) -> Array:
    """Tell which outputs' values unpooling keeps: the last of those whose maximum is at the same pixel."""
    numbers = np.arange(maxima.size, dtype=np.int32).reshape(maxima.shape)
    owner = own.array("owner", (pixels,), np.int32)
    owner[maxima.reshape(-1)] = numbers.reshape(-1)
    return owner[maxima] == numbers


def per_tap(block: Block, sums: Array, own: Buffers) -> Array:
    """Return each tap's sum over positions where it lies inside the image, given sums per position, (P · Q · O,)."""
    window = block.window
    if window is None:
        return sums[None]
    xp, shape = array_module(sums), (window.out_height * window.out_width, window.kernel**2)

    def taps() -> Array:
        return im2col(xp.ones((1, window.height, window.width, 1), sums.dtype), window).reshape(shape)

    inside = own.cached(("taps", window), shape[0], taps)
    sums = sums.reshape(shape[0], -1)
    summed = add_product(inside.T, sums, xp.empty((shape[1], sums.shape[1]), dtype=sums.dtype))
    return summed.reshape(*block.weight_shape[:2], 1, -1)
