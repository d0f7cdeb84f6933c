"""Which arrays of a run are finite."""

from arraytp.backend import Array, array_module
from arraytp.model.blocks import Network
from arraytp.optim import OptimizerState


def is_finite(array: Array) -> bool:
    """Tell whether every number of an array is finite."""
    return bool(array_module(array).isfinite(array).all())


def finite_blocks(network: Network) -> list[bool]:
    """Tell for each block whether its weight and bias are finite."""
    pairs = zip(network.weights, network.biases, strict=True)
    return [is_finite(weight) and is_finite(bias) for weight, bias in pairs]


def finite_moments(state: OptimizerState) -> list[bool]:
    """Tell for each parameter whether the optimiser's moments are finite."""
    return [all(map(is_finite, moments)) for moments in state.moments]
