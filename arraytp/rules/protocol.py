"""What a learning rule is: a module with `Options`, `init_state`, `updates` and `product_flops`.

    Options         frozen dataclass of the rule's settings, with `name`
    init_state      (options, network, seed, backend) → State: the rule's own arrays (feedback weights, noise, buffers)
    updates         (options, state, network, forward pass, ∂L/∂logits, workspace) → Updates
    product_flops   (options, network) → floating-point operations of the matrix products of `updates`, per sample

A rule that does not take every network also has

    check           (options, blocks, dtype, loss reduction) → list of lines worth knowing; raises UserError for what it
                    cannot train

and one that trains feedback weights has, besides

    train_feedback  (options, state, network, forward pass, seed, step, workspace) → loss per block with feedback;
                    changes the state's arrays, and is called on every batch before `updates`
    feedback_pairs  (state, network) → list of (index, feedback weight, forward weight to compare it with, or None)
    feedback_flops  (options, network) → operations of the products of `train_feedback`, per sample
    feedback_epochs (options) → how many epochs of feedback training alone come first, and after each epoch; may be
                    left out

A rule returns updates and never applies them to θ. `State` is a flat map of names to arrays, so that a checkpoint can
hold that of any rule; its names are paths such as "feedback/2/weight".
"""

from arraytp.backend import Array

State = dict[str, Array]
Updates = list[tuple[Array, Array]]
"""Per block, gradient-like arrays of the shapes of weight and bias: plain SGD does `parameter -= lr * update`."""
