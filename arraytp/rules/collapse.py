"""K iterations of feedback training at once, in closed form (docs/math/ldrl.md, "All iterations at once").

For small noise the expected gradient of L-DRL's loss is linear in ω and θ (Theorem 4.2), with coefficients that depend
only on the tap and the output:

    g(ω) = a ω − b θ,  a = (2σ²/B) M,  b = (2σ²/B) N

SGD with momentum μ, rate lr and coupled weight decay wd is then a linear map of (ω, v, θ): with c = a + wd,

    v ← μ v + c ω − b θ            ω     1 − lr c   −lr μ    lr b     ω
    ω ← ω − lr v           i.e.    v  ←  c           μ       −b       v
                                   θ     0           0        1       θ

so K iterations take the K-th power of one 3×3 matrix per tap and output, and one pass over ω and v.
"""

from typing import Any

from arraytp.backend import Array, array_module
from arraytp.errors import NonFiniteError
from arraytp.model.passes import At
from arraytp.ops import kernels
from arraytp.options import SGD
from arraytp.rules.protocol import State

# Elements of ω processed at once: few enough for all that is read and written to stay in a core's cache.
HOST_ELEMENTS = 1 << 15


def sgd_iterations(at: At, state: State, a: Array, b: Array, optimizer: SGD, lr: float, iterations: int) -> None:
    """Do K iterations at once on ω^n and its velocity, in place.

    Parameters
    ----------
    at : At
        The block.
    state : State
        Holds ω^n and v, which are modified.
    a, b : arrays of shape (k, k, 1, O) or (1, out)
        Coefficients of the expected gradient g = a ω − b θ.
    optimizer : SGD options
        The block's.
    lr : float
        The block's learning rate.
    iterations : int
        K.

    Raises
    ------
    NonFiniteError
        If the iterations diverge; names the block, tap, output and value. Not checked on a device.
    """
    c = a + optimizer.weight_decay
    if at.batch.engine.backend.on_host:
        check_converges(at, c, optimizer.momentum, lr)
    omega, velocity = state.weights[at.n], state.moments[at.n, "weight"]
    if kernels.has_kernels(omega):
        v = velocity[0] if velocity else None
        kernels.collapse(omega, at.weight, v, c, b, optimizer.momentum, lr, iterations)
        return
    power = matrix_power(iteration_matrix(c, b, optimizer.momentum, lr), iterations)
    coefficients = [[power[..., i, j].astype(omega.dtype) for j in range(3)] for i in range(2)]
    rows = tuple(array.reshape(-1, *array.shape[-2:]) for array in (omega, at.weight, *velocity))
    taps = [[entry.reshape(-1, *entry.shape[-2:]) for entry in row] for row in coefficients]
    at.batch.engine.in_slices(rows[0].shape[-2], lambda part: _apply(taps, rows, part))


def _apply(taps: Any, rows: tuple[Array, ...], part: slice) -> None:
    """Apply the power to some input channels (or inputs), tap by tap."""
    omega, theta, *velocity = rows
    length = max(1, HOST_ELEMENTS // omega.shape[-1])
    for tap in range(len(omega)):
        for first in range(part.start, part.stop, length):
            at = tap, slice(first, min(first + length, part.stop))
            w, fixed = omega[at], theta[at]
            (p_ww, p_wv, p_wt), (p_vw, p_vv, p_vt) = ([entry[tap] for entry in row] for row in taps)
            after = p_ww * w
            after += p_wt * fixed
            if velocity:
                v = velocity[0][at]
                after += p_wv * v
                v *= p_vv
                v += p_vw * w
                v += p_vt * fixed
            w[...] = after


def iteration_matrix(c: Array, b: Array, momentum: float, lr: float) -> Array:
    """Return the matrix of one iteration on (ω, v, θ) for every tap and output, of shape (…, 3, 3), float64."""
    xp = array_module(c)
    c, b = c.astype(xp.float64), b.astype(xp.float64)
    matrix = xp.zeros((*c.shape, 3, 3), dtype=xp.float64)
    matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 0, 2] = 1 - lr * c, -lr * momentum, lr * b
    matrix[..., 1, 0], matrix[..., 1, 1], matrix[..., 1, 2] = c, momentum, -b
    matrix[..., 2, 2] = 1
    return matrix


def matrix_power(matrix: Array, exponent: int) -> Array:
    """Return the power of every matrix in a stack, by repeated squaring; exponent ≥ 1."""
    power = None
    while True:
        if exponent & 1:
            power = matrix if power is None else power @ matrix
        exponent >>= 1
        if not exponent:
            return power
        matrix = matrix @ matrix


def check_converges(at: At, c: Array, momentum: float, lr: float) -> None:
    """Refuse a learning rate at which the iterations diverge.

    The eigenvalues of the map of (ω, v) have the product μ and the sum 1 + μ − lr c, so none exceeds 1 in absolute
    value as long as lr c ≤ 2 (1 + μ).

    Raises
    ------
    NonFiniteError
        If they diverge; names the block, the tap and output where lr c is largest, lr c and its bound.
    """
    xp = array_module(c)
    worst, bound = float(lr * c.max()), 2 * (1 + momentum)
    # A NaN comes from the forward pass: then the loss is NaN too, and the training loop reports where it began.
    if not worst > bound:
        return
    place = [int(i) for i in xp.unravel_index(int(c.argmax()), c.shape)]
    where = f"output {place[-1]}" if c.ndim == 2 else f"tap ({place[0]}, {place[1]}), output {place[-1]}"
    raise NonFiniteError(
        f"feedback of block {at.n} ({at.block.label}): iterations in closed form diverge at {where}: lr · (2σ²M/B + "
        f"weight decay) is {worst:.3g}, at most 2 (1 + momentum) = {bound:.3g}; use a smaller "
        "rule.feedback.optimizer.lr or rule.feedback.sigma"
    )
