"""The feedback modules G^n of target propagation, plainly: a block reversed (DTP paper, Section 3).

G^n maps the space of s^{n+1} to that of s^n, for every block but the first:

    max-unpool → activation → transposed affine map with ω^n, plus a bias

ω^n has the shape of the block's weight θ^n; symmetric means ω = θ. a is the input of the affine map: G = ω ∘ a + bias.
`arraytp.fast.modules` computes the same in slices.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.errors import UserError
from arraytp.fast.parallel import Workspace
from arraytp.model.initialise import initial_bias, initial_weight
from arraytp.model.network import Block, Network
from arraytp.ops.activations import (
    activation_backward,
    activation_derivative,
    activation_difference,
    activation_forward,
)
from arraytp.ops.conv import conv_backward_input
from arraytp.ops.dense import dense_backward_input
from arraytp.ops.patches import im2col
from arraytp.ops.pool import max_pool_backward, max_unpool
from arraytp.optim import OptimizerOptions, OptimizerState, apply_updates, at_block, init_optimizer, of_block
from arraytp.options import FeedbackTraining, InitName, Unpool

State = dict[str, Array]
FeedbackInit = InitName | Literal["symmetric"]


def unpooled(block: Block, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return t, of shape (B, *out_shape), where the pool's maxima were: (B, *pre_shape); t itself without a pool."""
    return t if block.pool is None else max_unpool(t, index, block.pool, unpool)


def feedback_input(block: Block, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return a = f(unpool(t)), the input of G's affine map.

    Parameters
    ----------
    block : Block
    t : array of shape (B, *out_shape)
        s^{n+1} or a target of it.
    index : array or None
        The maxima of the forward pass that t belongs to.
    unpool : {"overwrite", "accumulate"}
        See `max_unpool`.

    Returns
    -------
    array of shape (B, *pre_shape)
    """
    return activation_forward(unpooled(block, t, index, unpool), block.activation)


def feedback_affine(block: Block, weight: Array, a: Array) -> Array:
    """Return ω ∘ a, of shape (B, *in_shape), for a of shape (B, *pre_shape): the transposed affine map, no bias."""
    if block.window is None:
        return dense_backward_input(a, weight)
    return conv_backward_input(a, weight, block.window)


def feedback_forward(block: Block, weight: Array, bias: Array, t: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return G(t), of shape (B, *in_shape); `bias` is of shape in_shape[-1:], the others as in `feedback_input`."""
    return feedback_affine(block, weight, feedback_input(block, t, index, unpool)) + bias


def feedback_backward_weight(block: Block, dr: Array, a: Array) -> tuple[Array, Array]:
    """Return the gradients of ω and of the bias, given that of r = ω ∘ a + bias: dω = dr ⋆ a, Σ dr.

    Parameters
    ----------
    block : Block
    dr : array of shape (B, *in_shape)
    a : array of shape (B, *pre_shape)

    Returns
    -------
    dweight : array of shape weight_shape
    dbias : array of shape in_shape[-1:]
    """
    patches = dr if block.window is None else im2col(dr, block.window)
    dweight = patches.reshape(-1, patches.shape[-1]).T @ a.reshape(-1, a.shape[-1])
    return dweight.reshape(block.weight_shape), dr.reshape(-1, dr.shape[-1]).sum(axis=0)


def input_difference(block: Block, s: Array, delta: Array, index: Array | None, unpool: Unpool) -> Array:
    """Return a(s + δ) − a(s) of shape (B, *pre_shape), exact for small δ; ω ∘ this is G(s + δ) − G(s)."""
    u, du = (unpooled(block, t, index, unpool) for t in (s, delta))
    return activation_difference(u, du, block.activation)


def jacobian_overlap(block: Block, s: Array, index: Array | None, unpool: Unpool) -> tuple[Array, Array]:
    """Return what Theorem 4.2 needs of the two Jacobians of a batch, both of weight_shape's (k, k, 1, O) or (1, out).

    With D_F = f'(z) at the output's own position and D_G = f'(unpooled s) there (0 where another output overwrote it),
    ⟨∂Fᵀ, ∂G⟩ = Σ θ ω N and ‖∂G‖² = Σ ω² M, with N = Σ D_F D_G and M = Σ D_G² over samples and over those positions
    whose tap lies inside the image.

    Parameters
    ----------
    block : Block
    s : array of shape (B, *out_shape)
        s^{n+1}.
    index, unpool
        As in `feedback_input`.

    Returns
    -------
    N, M : arrays
    """
    xp = array_module(s)
    forward, back = _slopes(block, s, index, unpool)
    if block.window is None:
        return (forward * back).sum(axis=0)[None], (back * back).sum(axis=0)[None]
    inside = xp.ones((1, block.window.height, block.window.width, 1), dtype=s.dtype)
    taps = im2col(inside, block.window).reshape(-1, block.window.kernel**2)
    maps = [
        values if block.pool is None else max_pool_backward(values, index, block.pool)
        for values in (forward * back, back * back)
    ]
    shape = (*block.weight_shape[:2], 1, block.weight_shape[-1])
    n, m = ((taps.T @ values.sum(axis=0).reshape(len(taps), -1)).reshape(shape) for values in maps)
    return n, m


def _slopes(block: Block, s: Array, index: Array | None, unpool: Unpool) -> tuple[Array, Array]:
    """Return D_F and D_G of every output, of s's shape."""
    xp = array_module(s)
    ones = xp.ones_like(s)
    forward = activation_backward(ones, s, block.activation)
    u = unpooled(block, s, index, unpool)
    slope = activation_derivative(activation_forward(u, block.activation), block.activation)
    slope = xp.ones_like(u) if slope is None else slope
    if block.pool is None:
        return forward, slope
    number = xp.arange(1, s.size + 1, dtype=xp.float64).reshape(s.shape)
    # Which output each position took its value from, if that matters: the others have no part in G.
    seen = picked(block, slope, index)
    if unpool == "accumulate":
        return forward, seen
    owner = picked(block, max_unpool(number, index, block.pool, "overwrite"), index)
    return forward, seen * (owner == number)


def picked(block: Block, values: Array, index: Array) -> Array:
    """Return, for every output of a pool, the value at its maximum's position: (B, *pre_shape) to (B, *out_shape)."""
    xp, pool = array_module(values), block.pool
    assert pool is not None
    rows, columns = pool.interior
    bordered = xp.zeros((len(values), *pool.bordered, values.shape[-1]), dtype=values.dtype)
    bordered[:, rows, columns] = values
    out = xp.zeros(index.shape, dtype=values.dtype)
    for element in range(pool.kernel**2):
        xp.copyto(
            out, bordered[(slice(None), *pool.offset(*divmod(element, pool.kernel)))], where=index == xp.uint8(element)
        )
    return out


def expected_gradient(block: Block, theta: Array, omega: Array, overlap: tuple[Array, Array], batch: int) -> Array:
    """Return lim E[∂L/∂ω] / σ² for small noise, 2/B (−θ N + ω M): half of it is Theorem 4.2's gradient (Eq. 17).

    `overlap` is from `jacobian_overlap`, `batch` is B; the result has weight_shape. It is 0 at ω = θ N / M.
    """
    n, m = overlap
    return (omega * m - theta * n) * omega.dtype.type(2 / batch)


def init_feedback(
    init: FeedbackInit, optimizer: OptimizerOptions, network: Network, seed: int, backend: Backend
) -> State:
    """Draw ω^n and bias of every block but the first; moments are 0. "symmetric" copies θ and has biases 0.

    kaiming-uniform is PyTorch's layer default for the reversed block: a dense one's fan_in is its forward output's.

    Returns
    -------
    map of name to array
        feedback/<n>/weight, feedback/<n>/bias, and feedback_moments/<n>/<weight or bias>/<i>.
    """
    state: State = {}
    for n, block in enumerate(network.blocks[1:], start=1):
        theta = network.weights[n]
        if init == "symmetric":
            weight, bias = theta.copy(), array_module(theta).zeros(block.in_shape[-1:], dtype=theta.dtype)
        else:
            shape = block.weight_shape[::-1] if block.window is None else block.weight_shape
            drawn = initial_weight(init, shape, seed, "feedback", n)
            drawn = np.ascontiguousarray(drawn.T) if block.window is None else drawn
            weight = backend.asarray(drawn.astype(theta.dtype))
            # Of the same fan_in, and as long as the reversed block has outputs.
            drawn = initial_bias(init, (*shape[:-1], block.in_shape[-1]), seed, "feedback", n)
            bias = backend.asarray(drawn.astype(theta.dtype))
        state[f"feedback/{n}/weight"], state[f"feedback/{n}/bias"] = weight, bias
        for part, moments in zip(("weight", "bias"), init_optimizer(optimizer, [weight, bias]).moments, strict=True):
            state |= {f"feedback_moments/{n}/{part}/{i}": moment for i, moment in enumerate(moments)}
    return state


def step_feedback(
    training: FeedbackTraining, state: State, n: int, step: int, gradients: dict[str, Array], workspace: Workspace
) -> None:
    """Let the feedback optimiser take its step number `step` (from 0) on ω^n, and on its bias if that has a gradient.

    `gradients` is by part, "weight" and "bias".
    """
    moments = [
        tuple(state[name] for name in sorted(state) if name.startswith(f"feedback_moments/{n}/{part}/"))
        for part in gradients
    ]
    # Lists begin with the first block that has feedback: block 0 for DRL's Q, block 1 for G.
    position = n if "feedback/0/weight" in state else n - 1
    optimizer, lr = of_block(training.optimizer, position), at_block(training.optimizer.lr, position)
    parameters = [state[f"feedback/{n}/{part}"] for part in gradients]
    optimizer_state = OptimizerState(step, moments)
    apply_updates(optimizer, lr, optimizer_state, parameters, list(gradients.values()), workspace)


def iterations_and_noise(training: FeedbackTraining, position: int) -> tuple[int, float]:
    """Return K and σ of one block with feedback, counted from 0."""
    return int(at_block(training.iterations, position)), at_block(training.sigma, position)


def only_block(training: FeedbackTraining, position: int, count: int) -> FeedbackTraining:
    """Return the settings with iterations for one of `count` blocks with feedback only."""
    iterations = [0] * count
    iterations[position] = int(at_block(training.iterations, position))
    return replace(training, iterations=tuple(iterations))


def check_feedback(
    rule: str, training: FeedbackTraining, blocks: Sequence[Block], trained: Sequence[Block], reduction: str
) -> None:
    """Refuse what the rules with trained feedback cannot do.

    `trained` are those blocks that the lists in `training` have one value for.

    Raises
    ------
    UserError
        If a list has not one value per feedback block, the loss is not the mean, or blocks have auxiliary units; names
        key and blocks.
    """
    if reduction != "mean":
        raise UserError(f"loss.reduction: {reduction}: rule {rule} is defined for the mean loss; use reduction: mean")
    labels = [block.label for block in trained]
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
    for n, block in enumerate(blocks):
        if block.auxiliary:
            raise UserError(
                f"network block {n} ({block.label}): has {block.auxiliary} auxiliary units, for which rule {rule} "
                "has no use; they are GAIT-prop's (network.square: false)"
            )
