"""How parameters are drawn (docs/math/notation.md). Numbers are float64, from named random streams."""

import math

import numpy as np
from numpy.typing import NDArray

from arraytp.backend import NUMPY, Backend
from arraytp.model.blocks import Block, Network
from arraytp.streams import stream

Floats = NDArray[np.float64]


def make_network(
    blocks: tuple[Block, ...], init: str, seed: int, dtype: str = "float32", backend: Backend = NUMPY
) -> Network:
    """Return a network with initial parameters, the same for the same seed on every backend.

    Parameters
    ----------
    blocks : tuple of Block
    init : {"kaiming-uniform", "xavier-normal", "orthogonal"}
    seed : int
    dtype : {"float32", "float64"}
        Numbers are drawn in float64 and rounded.
    backend : Backend

    Raises
    ------
    MemoryError
        If a weight does not fit; names the block.
    """
    network = Network(blocks)
    for n, block in enumerate(blocks):
        try:
            weight = initial_weight(init, block.weight_shape, seed, "init", n)
        except MemoryError as error:
            raise MemoryError(f"network block {n} ({block.label}): {error}") from None
        bias = initial_bias(init, block.weight_shape, seed, "init", n)
        network.weights.append(backend.asarray(weight.astype(dtype)))
        network.biases.append(backend.asarray(bias.astype(dtype)))
    return network


def initial_weight(init: str, shape: tuple[int, ...], seed: int, purpose: str, *key: int) -> Floats:
    """Draw a weight.

    Parameters
    ----------
    init : {"kaiming-uniform", "xavier-normal", "orthogonal"}
        kaiming-uniform is PyTorch's layer default U(−1/√fan_in, 1/√fan_in); xavier-normal has standard deviation
        √(2 / (fan_in + fan_out)); orthogonal is the Q factor of a Gaussian matrix, (K, O) for a kernel.
    shape : tuple of int
        (k, k, C, O) or (in, out); fan_in = k·k·C, fan_out = k·k·O.
    seed : int
        The run's seed.
    purpose, *key
        The random stream, see `arraytp.streams.stream`; 0 is appended to the key for weights, 1 for biases.

    Returns
    -------
    array of float64 of the given shape
    """
    generator = stream(seed, purpose, *key, 0)
    fan_in, fan_out = fans(shape)
    if init == "kaiming-uniform":
        weight = generator.uniform(-1, 1, shape) / math.sqrt(fan_in)
    elif init == "xavier-normal":
        weight = generator.standard_normal(shape) * math.sqrt(2 / (fan_in + fan_out))
    elif init == "orthogonal":
        weight = orthogonal(generator.standard_normal((fan_in, shape[-1]))).reshape(shape)
    else:
        raise ValueError(f"unknown initialisation {init!r}")
    return weight


def initial_bias(init: str, shape: tuple[int, ...], seed: int, purpose: str, *key: int) -> Floats:
    """Draw a bias of shape (shape[-1],): U(−1/√fan_in, 1/√fan_in) for kaiming-uniform, else 0."""
    if init == "kaiming-uniform":
        return stream(seed, purpose, *key, 1).uniform(-1, 1, shape[-1]) / math.sqrt(fans(shape)[0])
    return np.zeros(shape[-1])


def orthogonal(gaussian: Floats) -> Floats:
    """Return the orthogonal factor of a matrix, with orthonormal rows or columns, whichever are fewer.

    The columns of Q take the sign of R's diagonal, without which the result would depend on the QR routine's
    convention and not be uniformly distributed.
    """
    rows, columns = gaussian.shape
    q, r = np.linalg.qr(gaussian if rows >= columns else gaussian.T)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return np.ascontiguousarray(q if rows >= columns else q.T)


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return fan_in and fan_out of a weight (in, out) or a kernel (k, k, C, O)."""
    taps = int(np.prod(shape[:-2]))
    return taps * shape[-2], taps * shape[-1]
