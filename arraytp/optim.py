"""SGD, Adam and learning-rate schedules, in place on the parameters (docs/math/notation.md).

g gradient, θ parameter, v velocity, m and u first and second moment, t the number of the step from 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from arraytp import options
from arraytp.backend import Array, array_module
from arraytp.fast.parallel import Workspace, slices
from arraytp.ops import kernels

# Measured: shorter stretches stay in a core's cache, but threads then wait for the GIL between operations.
HOST_ELEMENTS = 1 << 19

OptimizerOptions = options.SGD | options.Adam
ScheduleOptions = options.Constant | options.Cosine | options.Staircase


@dataclass
class OptimizerState:
    """What an optimiser remembers.

    Parameters
    ----------
    step : int
        t, the number of updates done.
    moments : list of tuple of arrays
        Per parameter and of its shape: (v,) for SGD with momentum, () without, (m, u) for Adam.
    """

    step: int
    moments: list[tuple[Array, ...]]


@dataclass(frozen=True)
class Twins:
    """Arrays updated by the same step as the weights of their blocks, after both are multiplied by 1 − λ.

    Parameters
    ----------
    arrays : map of block to array of its weight's shape and dtype, C-contiguous
        Updated in place.
    decay : float
        λ; it does not decay biases, or weights without a twin.
    """

    arrays: Mapping[int, Array]
    decay: float


def init_optimizer(optimizer: OptimizerOptions, parameters: Sequence[Array]) -> OptimizerState:
    """Return the state before the first step: all moments 0."""
    count = 2 if isinstance(optimizer, options.Adam) else int(optimizer.momentum > 0)
    zeros = [tuple(array_module(p).zeros_like(p) for _ in range(count)) for p in parameters]
    return OptimizerState(0, zeros)


def apply_updates(
    optimizer: OptimizerOptions,
    lr: float | Sequence[float],
    state: OptimizerState,
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    workspace: Workspace,
    twins: Twins | None = None,
    sizes: Sequence[Sequence[float | Array]] | None = None,
) -> None:
    """Do one step of SGD or Adam on every parameter, in place.

    Parameters come in pairs, the weight and bias of each block in turn, so that settings may differ between blocks.

    Parameters
    ----------
    optimizer : SGD or Adam options
        Weight decay is coupled L2, g ← g + wd·θ, also for biases. The orthogonality regulariser is not added here
        but in `arraytp.fast.orthogonality`.
    lr : float or sequence of float
        Learning rate of this step, one for all blocks or one per block.
    state : OptimizerState
        Updated in place.
    parameters, gradients : sequences of arrays of the same shapes and dtype, C-contiguous
        Gradients are left as they are.
    workspace : Workspace
    twins : Twins, optional
    sizes : sequence of sequences of arrays of shape (1,), optional
        For a device: `step_sizes` of every block in device memory, used instead of `lr`.

    Raises
    ------
    ValueError
        If a parameter or gradient is not C-contiguous, or they differ in shape or dtype; nothing is changed then.
    """
    check_gradients(parameters, gradients)
    state.step += 1
    tasks = []
    for p, (theta, gradient, moments) in enumerate(zip(parameters, gradients, state.moments, strict=True)):
        settings, rate = of_block(optimizer, p // 2), at_block(lr, p // 2)
        flat = [array.reshape(-1) for array in (theta, gradient, *moments)]
        twin = None if twins is None or p % 2 else twins.arrays.get(p // 2)
        length = HOST_ELEMENTS if workspace.backend.on_host else theta.size
        for part in slices(theta.size, length):
            stretch = [a[part] for a in flat]
            both = None if twin is None or twins is None else (twin.reshape(-1)[part], twins.decay)
            size = None if sizes is None else sizes[p // 2]
            tasks.append(partial(_step, settings, rate, state.step, stretch, both, workspace, size))
    workspace.run(tasks)


def check_gradients(parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
    """Check that an optimiser can update the parameters by their gradients.

    Raises
    ------
    ValueError
        If a parameter or gradient is not C-contiguous, or they differ in shape or dtype.
    """
    for number, (theta, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        contiguous = theta.flags.c_contiguous, gradient.flags.c_contiguous
        if not all(contiguous) or (theta.shape, theta.dtype) != (gradient.shape, gradient.dtype):
            raise ValueError(
                f"parameter {number}: {theta.dtype}{list(theta.shape)}, C-contiguous: {contiguous[0]}; its gradient: "
                f"{gradient.dtype}{list(gradient.shape)}, C-contiguous: {contiguous[1]}; expected C-contiguous arrays "
                "of one shape and dtype"
            )


def at_block(value: float | Sequence[float], position: int) -> float:
    """Return the value of one block: an entry of a sequence, or the one value that all blocks share."""
    return value[position] if isinstance(value, Sequence) else value


def of_block(optimizer: OptimizerOptions, position: int) -> OptimizerOptions:
    """Return an optimiser's settings for one block, each a single number."""
    if isinstance(optimizer, options.Adam) and isinstance(optimizer.epsilon, tuple):
        return replace(optimizer, epsilon=optimizer.epsilon[position])
    return optimizer


def _step(
    optimizer: OptimizerOptions,
    lr: float,
    step: int,
    arrays: list[Array],
    twin: tuple[Array, float] | None,
    workspace: Workspace,
    sizes: Sequence[float | Array] | None,
) -> None:
    """Do one step on one stretch of one parameter: arrays are θ, g and the moments; `twin` is an array and λ."""
    theta, g, *moments = arrays
    if kernels.has_kernels(theta):
        _fused_step(optimizer, arrays, step_size(optimizer, lr, step) if sizes is None else sizes, twin)
        return
    work = workspace.scratch.of("optimizer").array("work", (2, theta.size), theta.dtype)
    if optimizer.weight_decay:
        xp = array_module(theta)
        decayed = xp.multiply(theta, theta.dtype.type(optimizer.weight_decay), out=work[1])
        decayed += g
        g = decayed
    if twin is not None:
        xp, kept = array_module(theta), theta.dtype.type(1 - twin[1])
        for array in (theta, twin[0]):
            xp.multiply(array, kept, out=array)
    # Either function leaves in `work[0]` what it subtracts from θ.
    if isinstance(optimizer, options.Adam):
        adam_step(optimizer, lr, step, theta, g, moments[0], moments[1], work[0])
    else:
        sgd_step(optimizer, lr, theta, g, moments[0] if moments else None, work[0])
    if twin is not None:
        array_module(theta).subtract(twin[0], work[0], out=twin[0])


def _fused_step(
    optimizer: OptimizerOptions, arrays: list[Array], sizes: Sequence[float | Array], twin: tuple[Array, float] | None
) -> None:
    """Do `_step` in one device kernel."""
    theta, g, *moments = arrays
    if isinstance(optimizer, options.Adam):
        (scale, rate), epsilon = sizes, theta.dtype.type(optimizer.epsilon)
        betas = optimizer.beta1, optimizer.beta2
        kernels.adam(theta, g, moments[0], moments[1], betas, scale, rate, epsilon, optimizer.weight_decay, twin)
    else:
        v = moments[0] if moments else None
        kernels.sgd(theta, g, v, sizes[0], optimizer.momentum, optimizer.weight_decay, twin)


def step_sizes(
    optimizer: OptimizerOptions, lr: float | Sequence[float], step: int, blocks: int
) -> list[tuple[float, ...]]:
    """Return what device kernels need at step t, for every block: lr for SGD, `adam_rates` for Adam."""
    return [step_size(optimizer, at_block(lr, n), step) for n in range(blocks)]


def step_size(optimizer: OptimizerOptions, lr: float, step: int) -> tuple[float, ...]:
    """Return `step_sizes` of one block."""
    return adam_rates(optimizer, lr, step) if isinstance(optimizer, options.Adam) else (lr,)


def sgd_step(optimizer: options.SGD, lr: float, theta: Array, g: Array, v: Array | None, work: Array) -> None:
    """SGD: v ← μv + g, θ ← θ − lr·v; no dampening, no Nesterov; without momentum θ ← θ − lr·g.

    Parameters
    ----------
    optimizer : SGD options
    lr : float
    theta, g : arrays of one shape
        Parameter (updated in place) and gradient.
    v : array of the same shape or None
        Velocity, updated in place; 0 before the first step, so that the first step has v = g.
    work : array of the same shape
        Overwritten by what is subtracted from θ.
    """
    xp, number = array_module(theta), theta.dtype.type
    if v is not None:
        v *= number(optimizer.momentum)
        v += g
        g = v
    xp.multiply(g, number(lr), out=work)
    theta -= work


def adam_step(
    optimizer: options.Adam, lr: float, step: int, theta: Array, g: Array, m: Array, u: Array, work: Array
) -> None:
    """Adam, with epsilon as in PyTorch (the DTP paper's code) or as in Keras (the GP paper's).

        m ← β1·m + (1 − β1)·g,  u ← β2·u + (1 − β2)·g²
        pytorch: θ ← θ − lr·m̂ / (√û + ε),  m̂ = m / (1 − β1^t),  û = u / (1 − β2^t)
        keras:   θ ← θ − lr_t·m / (√u + ε),  lr_t = lr·√(1 − β2^t) / (1 − β1^t)

    Parameters
    ----------
    optimizer : Adam options
    lr : float
    step : int
        t, from 1.
    theta, g : arrays of one shape
        Parameter (updated in place) and gradient.
    m, u : arrays of the same shape
        Moments, updated in place.
    work : array of the same shape
        Overwritten by what is subtracted from θ.
    """
    xp, number = array_module(theta), theta.dtype.type
    scale, rate = adam_rates(optimizer, lr, step)
    m *= number(optimizer.beta1)
    xp.multiply(g, number(1 - optimizer.beta1), out=work)
    m += work
    u *= number(optimizer.beta2)
    xp.multiply(g, g, out=work)
    work *= number(1 - optimizer.beta2)
    u += work
    xp.sqrt(u, out=work)
    if optimizer.epsilon_form == "pytorch":
        work *= number(scale)
    work += number(optimizer.epsilon)
    xp.divide(m, work, out=work)
    work *= number(rate)
    theta -= work


def adam_rates(optimizer: options.Adam, lr: float, step: int) -> tuple[float, float]:
    """Return the factors of √u and of the step: 1/√(1 − β2^t) and lr/(1 − β1^t) (pytorch), or 1 and lr_t (keras)."""
    correction1 = 1 - optimizer.beta1**step
    correction2 = math.sqrt(1 - optimizer.beta2**step)
    if optimizer.epsilon_form == "pytorch":
        return 1 / correction2, lr / correction1
    return 1.0, lr * correction2 / correction1


def learning_rates(
    schedule: ScheduleOptions, lr: float | Sequence[float], epoch: int, step: int = 0
) -> float | list[float]:
    """Return `learning_rate` for every block's initial learning rate, or for the one that all blocks share."""
    if isinstance(lr, Sequence):
        return [learning_rate(schedule, each, epoch, step) for each in lr]
    return learning_rate(schedule, lr, epoch, step)


def learning_rate(schedule: ScheduleOptions, lr: float, epoch: int, step: int = 0) -> float:
    """Return the learning rate of a step.

    Parameters
    ----------
    schedule : Constant, Cosine or Staircase options
        Cosine: eta_min + (lr − eta_min)(1 + cos(π·epoch/t_max))/2, which rises again past t_max.
        Staircase: lr / factor^n, where n of its `epochs` are at most `epoch`; 0 if the power overflows.
        Warm-up: multiplied by (step + 1)/W, at most 1.
    lr : float
        The initial learning rate lr0.
    epoch, step : int
        Epochs and steps completed in the run.
    """
    if isinstance(schedule, options.Cosine):
        lr = schedule.eta_min + (lr - schedule.eta_min) * (1 + math.cos(math.pi * epoch / schedule.t_max)) / 2
    elif isinstance(schedule, options.Staircase):
        try:
            lr /= schedule.factor ** sum(epoch >= end for end in schedule.epochs)
        except OverflowError:
            lr = 0.0
    return lr if step + 1 >= schedule.warmup_steps else lr * (step + 1) / schedule.warmup_steps
