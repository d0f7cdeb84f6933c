"""A training step of arraytp assembled from its parts, on random images, for the benchmarks; imports nothing else."""

from typing import Any


def make_step(
    network: Any,
    optimizer: Any,
    rule: str = "bp",
    rule_options: Any = None,
    *,
    shape: tuple[int, int, int] = (32, 32, 3),
    batch: int = 128,
    init: str = "kaiming-uniform",
    dtype: str = "float32",
    reduction: str = "mean",
    threads: int = 2,
) -> Any:
    """Return a function that takes a step and returns the loss; `network` are NetworkOptions, for 10 classes."""
    import numpy as np

    from arraytp.fast.engine import Fast
    from arraytp.fast.orthogonality import add_orthogonality
    from arraytp.model.architectures import plan_network
    from arraytp.model.initialise import make_network
    from arraytp.model.passes import Batch
    from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
    from arraytp.optim import apply_updates, init_optimizer
    from arraytp.rules import RULES, feedback
    from arraytp.training.compare import angle_degrees

    net = make_network(plan_network(network, shape, 10), init, 0, dtype)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((batch, *shape)).astype(dtype), generator.integers(0, 10, batch)
    engine, learned = Fast(threads=threads), RULES[rule]
    options = learned.options() if rule_options is None else rule_options
    state = learned.init_state(options, net, 0, engine.backend)
    parameters = net.parameters()
    moments = init_optimizer(optimizer, parameters)
    count = 0

    def step() -> float:
        nonlocal count
        forward = engine.forward(net, x)
        loss, cache = cross_entropy_forward(forward.logits, y, reduction)
        pass_ = Batch(engine, net, forward, cross_entropy_backward(cache, reduction), 0, count)
        if learned.feedback is not None:
            feedback.train(learned.feedback, options, state, pass_, engine)
            for _, omega, theta in learned.pairs(state, net):
                if theta is not None:
                    angle_degrees(omega, theta)
        updates = learned.propose(options, state, pass_)
        if optimizer.orthogonality:
            weights = [weight for weight, _ in updates]
            add_orthogonality(optimizer.orthogonality, net, weights, pass_.gram_errors, engine)
        gradients = [array for pair in updates for array in pair]
        apply_updates(optimizer, optimizer.lr, moments, parameters, gradients, engine)
        count += 1
        return float(loss)

    return step
