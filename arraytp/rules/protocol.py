"""What a learning rule is: a module with `Options`, `init_state`, `updates` and `product_flops`.

    Options         frozen dataclass of the rule's settings, with `name`
    init_state      (options, network, seed, backend) → State: the rule's own arrays (feedback weights, noise, buffers)
    updates         (options, state, network, forward pass, ∂L/∂logits, workspace) → Updates
    product_flops   (options, network) → floating-point operations of the matrix products of `updates`, per sample

A rule that does not take every network also has

    check           (options, blocks, dtype, loss reduction) → list of lines worth knowing; raises UserError for what it
                    cannot train

and one that trains feedback weights has, besides

    train_feedback  (options, state, network, forward pass, seed, step, workspace, observe) → loss per block with
                    feedback; changes the state's arrays, and is called on every batch before `updates`
    feedback_pairs  (state, network) → list of (index, feedback weight, forward weight to compare it with, or None)
    feedback_flops  (options, network) → operations of the products of `train_feedback`, per sample
    feedback_epochs (options) → how many epochs of feedback training alone come first, and after each epoch; may be
                    left out

One that gives its blocks targets has

    targets         (parameters of `updates`) → iterator of Target, from the last block to the first; what `updates`
                    is made of

One that inverts square weight matrices has

    excess          (network, workspace) → Excess, WWᵀ − I of the blocks that it inverts; `updates` and `targets` take
                    it as their last argument, and the optimiser's orthogonality regulariser takes it from there

A rule returns updates and never applies them to θ. `State` is a flat map of names to arrays, so that a checkpoint can
hold that of any rule; its names are paths such as "feedback/2/weight".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arraytp.backend import Array

State = dict[str, Array]
Excess = Mapping[int, Array]
"""By the position of the block, as `arraytp.fast.orthogonality.excess_of` computes it."""
Updates = list[tuple[Array, Array]]
"""Per block, gradient-like arrays of the shapes of weight and bias: plain SGD does `parameter -= lr * update`."""
Observe = Callable[[int, int, Mapping[str, Array]], None]
"""Is told of every iteration of feedback training: block n, number k, and its arrays, valid during the call only.

`epsilon` and `eta` are the noises, where there are any, keyed by (seed, step, n, k, 0) and (seed, step, n, k, 1);
`gradient` and `gradient_bias` those of ω and, where it is trained, of its bias; `loss` is of shape ().
"""


@dataclass(frozen=True)
class Target:
    """What a block passes on shall become t = s + δ; valid until the next target is asked for.

    Parameters
    ----------
    delta : array
        δ, of as many elements as what the block passes on.
    t : array, optional
        Of the same, where the rule computes t itself and δ from it.
    m : array of shape (B,), optional
        GAIT-prop's factor of every sample.
    """

    delta: Array
    t: Array | None = None
    m: Array | None = None
