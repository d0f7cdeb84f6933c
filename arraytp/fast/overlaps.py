"""N and M of Theorem 4.2 in slices shared by threads: passes over s^{n+1}, no patches and no product over samples.

`arraytp.model.feedback.jacobian_overlap` is the plain form. With D_F = f'(z), read off s^{n+1}, and
D_G = f'(u) at the maximum's position, u = unpool(s^{n+1}):

- Where unpooling overwrites, u is s itself for every output whose value is kept, and the others have no part in G.
- Values are summed over samples at their positions first, then over the positions that a tap reaches: a product of
  k² · P · Q · O operations, whatever the batch.
"""

from functools import partial

import numpy as np

from arraytp.backend import Array
from arraytp.fast.buffers import Buffers, Scratch
from arraytp.fast.parallel import Workspace, even_slices, slices
from arraytp.model import feedback
from arraytp.model.blocks import Block
from arraytp.model.passes import At
from arraytp.ops.patches import Window, im2col
from arraytp.ops.pool import find_maxima, overlaps, window_corners
from arraytp.options import Unpool

OWNER = "overlaps"
LANES = 4
# Numbers of s^{n+1} that a slice works on.
SLICE_ELEMENTS = 1 << 16


def jacobian_overlap(at: At, mode: Unpool, workspace: Workspace) -> tuple[Array, Array]:
    """Return N and M, of shape (k, k, 1, O) or (1, out): in float64 on the host, on a device in its dtype."""
    if not workspace.backend.on_host:
        return feedback.jacobian_overlap(at.block, at.output, at.index, mode)
    block = at.block
    own, lanes = workspace.of(OWNER), even_slices(len(at.output), LANES)
    positions = int(np.prod(block.pre_shape))
    maps = own.array("maps", (2, len(lanes), positions), np.float64)
    length = max(1, SLICE_ELEMENTS // int(np.prod(block.out_shape)))

    def lane(number: int, scratch: Buffers) -> None:
        maps[:, number] = 0
        for part in slices(lanes[number].stop, length, lanes[number].start):
            index = None if at.index is None else at.index[part]
            _add(block, at.output[part], index, mode, maps[:, number], scratch.of(OWNER))

    workspace.run([partial(lane, number) for number in range(len(lanes))])
    return _per_tap(block, maps[0].sum(axis=0), own), _per_tap(block, maps[1].sum(axis=0), own)


def _add(block: Block, s: Array, index: Array | None, mode: Unpool, maps: Array, own: Scratch) -> None:
    """Add D_F D_G and D_G² of some samples at their positions, of size P · Q · O, to the two maps."""
    f = block.activation
    if block.pool is None or index is None:
        slope = _slope(block, s)
        for i, values in enumerate((f.backward(slope, s), slope * slope)):
            maps[i] += values.reshape(len(s), -1).sum(axis=0, dtype=np.float64)
        return
    window, pixels = block.pool, int(np.prod(block.pre_shape))
    places = _places(block, window, index, own)
    if not overlaps(window):
        slope = _slope(block, s)
    elif mode == "overwrite":
        slope = _slope(block, s) * _kept(places, len(s) * pixels, own)
    else:
        # What meets in a pixel adds up there.
        u = np.bincount(places.reshape(-1), s.reshape(-1), len(s) * pixels).astype(s.dtype)
        slope = _slope(block, u[places])
    # All samples' values of one position add up.
    places = np.remainder(places, pixels, out=places)
    for i, values in enumerate((f.backward(slope, s), slope * slope)):
        maps[i] += np.bincount(places.reshape(-1), values.reshape(-1), pixels)


def _slope(block: Block, u: Array) -> Array:
    """Return f'(u), which f's derivative reads off f(u)."""
    f = block.activation
    return np.ones_like(u) if f.derivative is None else f.derivative(f(u))


def _places(block: Block, window: Window, index: Array, own: Scratch) -> Array:
    """Return where in (samples, P, Q, O) every output's maximum is."""
    channels = index.shape[-1]
    corner = own.cached(
        ("corners", window, channels), len(index), partial(window_corners, len(index), window, channels)
    )
    places = own.array("places", index.shape, np.intp)
    find_maxima(index, window, corner, places, len(index) * int(np.prod(block.pre_shape)))
    return places


def _kept(places: Array, pixels: int, own: Scratch) -> Array:
    """Tell which outputs' values unpooling keeps: the last of those that name one pixel."""
    numbers = np.arange(places.size, dtype=np.int32).reshape(places.shape)
    owner = own.array("owner", (pixels,), np.int32)
    owner[places.reshape(-1)] = numbers.reshape(-1)
    return owner[places] == numbers


def _per_tap(block: Block, sums: Array, own: Scratch) -> Array:
    """Return sums over those positions whose tap lies inside the image, given the sums at the positions."""
    window = block.window
    if window is None:
        return sums[None]
    shape = (window.out_height * window.out_width, window.kernel**2)
    inside = own.cached(
        ("taps", window), shape[0], lambda: im2col(np.ones((1, window.height, window.width, 1)), window).reshape(shape)
    )
    return (inside.T @ sums.reshape(shape[0], -1)).reshape(*block.weight_shape[:2], 1, -1)
