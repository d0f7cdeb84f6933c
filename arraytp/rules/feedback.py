"""Feedback weights: how they are drawn, and the one loop that trains them on a batch.

For block n = 1 … N−1, the loop does K_n times: draw fresh noise, compute the gradient of the rule's feedback loss,
averaged over the batch, and take one optimiser step on ω^n (DTP paper, Algorithms 1 to 3). Lists in the settings
start at block 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.errors import UserError
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Block, Network, block_flops
from arraytp.model.initialise import initial_bias, initial_weight
from arraytp.model.passes import At, Batch, side_by_side
from arraytp.ops.kernels import adam_rates, has_kernels
from arraytp.optim import OptimizerOptions, OptimizerState, apply_updates, at_block, init_optimizer, of_block
from arraytp.options import Adam, FeedbackTraining, InitName
from arraytp.rules.protocol import Descent, Feedback, Iterating, Iteration, Observe, State

FeedbackInit = InitName | Literal["symmetric"]


def train(
    feedback: Feedback[Any],
    options: Any,
    state: State,
    batch: Batch,
    workspace: Workspace,
    observe: Observe | None = None,
) -> list[Array | None]:
    """Train every ω^n on a batch, in place.

    Parameters
    ----------
    feedback : Feedback
        The rule's.
    options : dataclass
        The rule's.
    state : State
        Holds ω, which is modified.
    batch : Batch
    workspace : Workspace
        Its threads share the optimiser's work.
    observe : Observe, optional

    Returns
    -------
    list of arrays of shape (), or None
        Per block, from block 1 on: the loss in the last iteration, or None if there are no iterations.
    """
    training, noises = feedback.settings(options), feedback.noises(options)
    losses: list[Array | None] = []
    for n in range(1, len(batch.network)):
        descent = descent_of(training, n, batch.number, workspace)
        if not descent.iterations:
            losses.append(None)
        elif feedback.closed_form is not None and feedback.expected(options):
            computed = feedback.closed_form(options, state, batch.at(n), descent)
            losses.append(computed["loss"])
            if observe is not None:
                observe(n, 0, computed)
        else:
            count = descent.iterations * noises
            begins = [partial(feedback.begin, options, each.at(n), descent.sigma, count) for each in batch.every]
            iterates = side_by_side(batch.engine, begins)
            losses.append(_by_noise(iterates, state, batch.at(n), descent, noises, observe))
    return losses


def descent_of(training: FeedbackTraining, n: int, number: int, workspace: Workspace) -> Descent:
    """Return the settings for block n on a batch, after feedback training on `number` batches."""
    iterations, optimizer = int(at_block(training.iterations, n - 1)), of_block(training.optimizer, n - 1)
    lr, sigma = at_block(training.optimizer.lr, n - 1), at_block(training.sigma, n - 1)
    return Descent(optimizer, lr, iterations, sigma, number * iterations, workspace)


def _by_noise(
    iterates: Sequence[Iterating], state: State, at: At, descent: Descent, noises: int, observe: Observe | None
) -> Array | None:
    """Do the iterations on a block, each with the gradient averaged over `noises` noises; return the last loss."""
    loss = None
    for k in range(descent.iterations):
        last, ks = k == descent.iterations - 1, range(k * noises, (k + 1) * noises)
        means = [partial(_mean, iterate, state, at.n, ks, last, observe) for iterate in iterates]
        done = side_by_side(at.batch.engine, means)
        gradients, loss = done[0]
        arrays = [[*own.values(), *([] if loss is None else [loss])] for own, loss in done]
        summed = at.batch.summed(arrays, "gradient")
        step_feedback(descent, state, at.n, k, dict(zip(gradients, summed, strict=False)))
        # A copy: the next block's sums use the same memory.
        loss = None if loss is None else summed[-1].copy()
    return loss


def _mean(
    iterate: Iterating, state: State, n: int, noises: range, last: bool, observe: Observe | None
) -> tuple[Mapping[str, Array], Array | None]:
    """Return the gradients and, in the `last` iteration, the loss, averaged over some noises."""
    total: dict[str, Array] = {}
    loss: Array | None = None
    for k in noises:
        done = iterate(state, k, observe is not None or last)
        if observe is not None:
            observe(n, k, _observed(done))
        if len(noises) == 1:
            return done.gradients, done.loss
        if last:
            assert done.loss is not None
            if loss is None:
                loss = done.loss.copy()
            else:
                loss += done.loss
        for part, gradient in done.gradients.items():
            if part in total:
                total[part] += gradient
            else:
                # A copy: the next iteration writes to the same memory.
                total[part] = gradient.copy()
    means = {part: gradient / gradient.dtype.type(len(noises)) for part, gradient in total.items()}
    if loss is not None:
        loss /= loss.dtype.type(len(noises))
    return means, loss


def _observed(done: Iteration) -> dict[str, Array]:
    names = {"weight": "gradient", "bias": "gradient_bias"}
    gradients = {names[part]: gradient for part, gradient in done.gradients.items()}
    return {**done.noises, **gradients, "loss": done.loss}


def step_feedback(descent: Descent, state: State, n: int, k: int, gradients: Mapping[str, Array]) -> None:
    """Take the feedback optimiser's step k of a batch on ω^n, and on its bias if that has a gradient.

    `gradients` maps "weight" and, if there is one, "bias" to its gradient.
    """
    stored = {"weight": state.weights, "bias": state.biases}
    parameters = [stored[part][n] for part in gradients]
    optimizer_state = OptimizerState(descent.step + k, [state.moments[n, part] for part in gradients])
    gradient_list, sizes = list(gradients.values()), None
    if isinstance(descent.optimizer, Adam) and has_kernels(parameters[0]):
        sizes = [_adam_rates(descent, n, k, parameters[0])]
    apply_updates(
        descent.optimizer, descent.lr, optimizer_state, parameters, gradient_list, descent.workspace, sizes=sizes
    )


def _adam_rates(descent: Descent, n: int, k: int, like: Array) -> Sequence[Array]:
    """Return Adam's scale and rate of step k in device arrays; step 0 computes them for all steps on the block.

    The device derives them from the batch's number, so a captured graph needs nothing else from the host.
    """
    optimizer, workspace = descent.optimizer, descent.workspace
    assert isinstance(optimizer, Adam)
    rates = workspace.of("feedback").array(("rates", n), (descent.iterations, 2), like.dtype)
    if k == 0:
        number = workspace.number("step", descent.step // descent.iterations, np.uint64)
        betas, keras = (optimizer.beta1, optimizer.beta2), optimizer.epsilon_form == "keras"
        adam_rates(number, descent.iterations, betas, descent.lr, keras, rates)
    return rates[k, :1], rates[k, 1:]


def init_feedback(
    init: FeedbackInit, optimizer: OptimizerOptions, network: Network, seed: int, backend: Backend
) -> State:
    """Draw ω^n and the bias of every G^n, n = 1 … N−1; moments are 0. "symmetric" copies θ and sets biases to 0.

    kaiming-uniform is PyTorch's layer default for the reversed block; fan_in of a dense one is its forward output size.
    """
    state = State()
    for n, block in enumerate(network.blocks[1:], start=1):
        theta = network.weights[n]
        if init == "symmetric":
            weight, bias = theta.copy(), array_module(theta).zeros(block.in_shape[-1:], dtype=theta.dtype)
        else:
            shape = block.weight_shape[::-1] if block.window is None else block.weight_shape
            drawn = initial_weight(init, shape, seed, "feedback", n)
            drawn = np.ascontiguousarray(drawn.T) if block.window is None else drawn
            weight = backend.asarray(drawn.astype(theta.dtype))
            # With the weight's fan_in; its length is the reversed block's number of output channels or units.
            drawn = initial_bias(init, (*shape[:-1], block.in_shape[-1]), seed, "feedback", n)
            bias = backend.asarray(drawn.astype(theta.dtype))
        state.weights[n], state.biases[n] = weight, bias
        init_moments(state, n, optimizer)
    return state


def init_direct(init: InitName, network: Network, seed: int, backend: Backend, width: int | None = None) -> State:
    """Draw a direct matrix of shape (classes or `width`, size of s^n) for every hidden s^n, n = 1 … N−1.

    Its random stream is keyed by n − 1, the number of the block whose output is s^n.
    """
    width, state = width or network.blocks[-1].next_shape[0], State()
    for n, block in enumerate(network.blocks[:-1], start=1):
        drawn = initial_weight(init, (width, int(np.prod(block.next_shape))), seed, "feedback", n - 1)
        state.weights[n] = backend.asarray(drawn.astype(network.weights[n].dtype))
    return state


def init_moments(state: State, n: int, optimizer: OptimizerOptions) -> None:
    """Set all optimiser moments of ω^n and, if there is one, of its bias to 0."""
    for part, arrays in (("weight", state.weights), ("bias", state.biases)):
        if n in arrays:
            (state.moments[n, part],) = init_optimizer(optimizer, [arrays[n]]).moments


def only_block(training: FeedbackTraining, n: int, blocks: int) -> FeedbackTraining:
    """Return the settings for a network of `blocks` blocks with iterations on block n only."""
    iterations = [0] * (blocks - 1)
    iterations[n - 1] = int(at_block(training.iterations, n - 1))
    return replace(training, iterations=tuple(iterations))


def module_pairs(state: State, network: Network) -> list[tuple[int, Array, Array | None]]:
    """Return n, ω^n or B^n, and the forward weight, of the same shape, for every block with a feedback weight."""
    return [(n, omega, network.weights[n]) for n, omega in state.weights.items()]


def feedback_products(training: FeedbackTraining, network: Network, products: int, shared: int = 1) -> int:
    """Return the FLOPs of `products` products per iteration, plus `shared`, for every block that has iterations."""
    iterations = [int(at_block(training.iterations, n)) for n in range(len(network) - 1)]
    return sum(
        block_flops(block) * (shared + products * count)
        for block, count in zip(network.blocks[1:], iterations, strict=True)
        if count
    )


def check_feedback(rule: str, training: FeedbackTraining, blocks: Sequence[Block], reduction: str) -> None:
    """Refuse what rules with trained feedback modules do not support.

    Raises
    ------
    UserError
        As `check_training`; also if the loss is not the mean, or blocks have auxiliary units; names key and blocks.
    """
    check_targets(rule, blocks, reduction)
    check_training(training, blocks)


def check_training(training: FeedbackTraining, blocks: Sequence[Block]) -> None:
    """Refuse lists of settings without exactly one value per feedback block, and a regulariser of ω.

    Raises
    ------
    UserError
        Names key and blocks.
    """
    for field in fields(training.optimizer):
        value = getattr(training.optimizer, field.name)
        if field.name.startswith("orthogonality") and value != field.default:
            raise UserError(
                f"rule.feedback.optimizer.{field.name}: {value}: the regulariser is for θ, optimizer.{field.name}; "
                "leave it out here"
            )
    labels = [block.label for block in blocks[1:]]
    for key, values in (
        ("iterations", training.iterations),
        ("sigma", training.sigma),
        ("optimizer.lr", training.optimizer.lr),
        ("optimizer.epsilon", getattr(training.optimizer, "epsilon", None)),
    ):
        if isinstance(values, tuple) and len(values) != len(labels):
            raise UserError(
                f"rule.feedback.{key}: {len(values)} values {list(values)}; needs one number, or a list of "
                f"{len(labels)}, one per block with feedback: {', '.join(labels) or 'none'}"
            )


def check_targets(rule: str, blocks: Sequence[Block], reduction: str) -> None:
    """Refuse what no target rule except GAIT-prop supports.

    Raises
    ------
    UserError
        If the loss is not the mean, or blocks have auxiliary units; names key and blocks.
    """
    if reduction != "mean":
        raise UserError(f"loss.reduction: {reduction}: rule {rule} is defined for the mean loss; use reduction: mean")
    refuse_auxiliary(f"rule {rule}", blocks)


def refuse_auxiliary(what: str, blocks: Sequence[Block], instead: str = "") -> None:
    """Refuse auxiliary units; the message says that `what` does not support them, and `instead` extends its advice.

    Raises
    ------
    UserError
        Names the first block that has some.
    """
    for n, block in enumerate(blocks):
        if block.auxiliary:
            raise UserError(
                f"network block {n} ({block.label}): has {block.auxiliary} auxiliary units, which {what} does not "
                f"support; leave out network.square and the block's auxiliary{instead}"
            )


def check_expected(training: FeedbackTraining) -> None:
    """Refuse the closed form of zero iterations.

    Raises
    ------
    UserError
        If an entry of `iterations` is 0.
    """
    iterations = training.iterations if isinstance(training.iterations, tuple) else (training.iterations,)
    if 0 in iterations:
        raise UserError(
            "rule.feedback.iterations: 0 with rule.expected: the closed form does K iterations at once; use at least 1"
        )
