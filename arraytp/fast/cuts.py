"""How work is cut: slices of samples that fit a cache, lanes that sum up gradients, tiles of a product.

All depends on shapes alone, never on the number of threads, so that results do not either.
"""

import math

from arraytp.fast.parallel import even_slices
from arraytp.fast.products import Dense, Products, Split

# A pass: what one product of a slice reads, and what element-wise operations work on.
PATCH_BYTES, SPLIT_BYTES, GROUP_BYTES = 2 << 20, 4 << 20, 2 << 20
# An iteration of feedback training, whose slices go through four products.
ITERATION_BYTES = 8 << 20
DEVICE_BYTES = 1 << 29
GEMM_ROWS = 512
TILES, TILE_WIDTH = 4, 256
LANES, LANE_BYTES = 4, 4 << 20


def pass_slices(products: Products, batch: int, itemsize: int, on_host: bool) -> tuple[int, int]:
    """Return how many samples go through a block together, and how many of them through one product.

    What one product reads shall fit the cache, yet have rows enough. Element-wise operations work on the larger group:
    short ones would leave the threads waiting for the interpreter.
    """
    sample_bytes = products.sample_rows * products.row_width * itemsize
    if not on_host:
        return batch, max(1, DEVICE_BYTES // sample_bytes)
    limit = SPLIT_BYTES if isinstance(products, Split) else PATCH_BYTES
    length = max(1, limit // sample_bytes, GEMM_ROWS // products.sample_rows)
    group = max(length, GROUP_BYTES // (math.prod(products.block.pre_shape) * itemsize))
    most = -(-batch // 2)
    return min(group, most), min(length, most)


def iteration_slice(products: Products, batch: int, itemsize: int, on_host: bool) -> int:
    """Return how many samples go through an iteration of feedback training together."""
    if isinstance(products, Dense):
        return batch
    limit = ITERATION_BYTES if on_host else DEVICE_BYTES
    return max(1, min(batch, limit // (products.sample_rows * products.row_width * itemsize)))


def lanes(weight_bytes: int, batch: int, on_host: bool) -> list[slice]:
    """Cut the batch into lanes, each of which sums up a gradient of its own; fewer for large weights."""
    if not on_host:
        return [slice(0, batch)]
    return even_slices(batch, max(2, min(LANES, LANE_BYTES // weight_bytes)))


def tiles(count: int) -> list[slice]:
    """Cut one side of a product so that threads share it and packing the other factor stays cheap."""
    return even_slices(count, min(TILES, count // TILE_WIDTH))
