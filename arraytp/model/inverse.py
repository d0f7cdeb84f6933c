"""Checks that blocks can be inverted (GP paper, Equation 3); errors name the block and what would help."""

import math

import numpy as np

from arraytp.backend import Array
from arraytp.errors import IllConditionedError, NonFiniteError, UserError
from arraytp.model.blocks import Block


def check_invertible(rule: str, blocks: tuple[Block, ...]) -> None:
    """Refuse blocks after the first that have no inverse; the message names the rule that needs it.

    Raises
    ------
    UserError
        For a pool, an activation without inverse, or a weight matrix that is not square; names block and remedy.
    """
    for n, block in enumerate(blocks[1:], start=1):
        where = f"network block {n} ({block.label}): rule {rule} inverts every block but the first, and "
        inputs, outputs = int(np.prod(block.weight_shape[:-1])), block.out_shape[-1]
        if block.pool is not None:
            raise UserError(f"{where}max-pooling has no inverse; use a stride instead, or rule.inverse: pseudo")
        if block.activation.inverse is None:
            raise UserError(
                f"{where}{block.activation.name} has no inverse; use leaky-relu or linear (all values), elu (values "
                "above -1) or tanh (between -1 and 1)"
            )
        if not block.is_square:
            raise UserError(
                f"{where}a weight matrix of {inputs}x{outputs} is not square; it needs {inputs} units, "
                "auxiliary ones included; use network.square: true"
            )


GRAM = "the Gram matrix of the weights"
"""What `check_condition` calls WWᵀ + rI, or WᵀW + rI."""


def check_range(block: Block, n: int, y: Array) -> None:
    """Refuse outputs y of block n outside its activation's range, which f⁻¹ would make infinite or NaN.

    Only ELU and tanh are checked: the other invertible activations reach every number.

    Raises
    ------
    NonFiniteError
        Names the block, the value, the range and what would help. NaN passes: it is not a matter of the range.
    """
    low, high = block.activation.range
    if (low, high) == (-math.inf, math.inf):
        return
    for value in (float(y.min()), float(y.max())):
        if value <= low or value >= high:
            raise NonFiniteError(
                f"block {n} ({block.label}): a nudged activation of {value:.9g} is beyond the range of "
                f"{block.activation.name}, above {low:g}{f' and below {high:g}' if math.isfinite(high) else ''}, so "
                "that it has no inverse; use a smaller rule.gamma or rule.eta, smaller weights so that units do not "
                "saturate, activation leaky-relu, or rule.form: difference"
            )


def check_condition(block: Block, n: int, dtype: np.dtype, condition: float, what: str = "the weight matrix") -> None:
    """Refuse a matrix of block n, described by `what`, that cannot be inverted in its dtype.

    Raises
    ------
    IllConditionedError
        If the condition number exceeds 1 / machine epsilon; names the block and the number.
    """
    most = 1 / np.finfo(dtype).eps
    if condition > most:
        raise IllConditionedError(
            f"block {n} ({block.label}): {what} cannot be inverted in {dtype}: its condition number is "
            f"{condition:.1e}, at most {most:.1e} can be; network.init: orthogonal and optimizer.orthogonality keep it "
            "near 1"
        )
