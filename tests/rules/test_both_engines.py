"""One training step by the fast and by the plain engine, from the same state: every rule, every kind of network.

The plain engine computes the primitives as they are defined, on the whole batch; the fast one works in slices, lanes
and gathered products. An error in only one of them would silently change the training.
"""

from dataclasses import replace

import pytest
from samples import batch, close, fitting_blocks, random_network, rng, well_conditioned
from training import copies, plain, trainer

from arraytp.backend import NUMPY
from arraytp.model.architectures import square
from arraytp.model.initialise import make_network
from arraytp.options import SGD, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import RULES

# Sums in another order differ by 1e-16 · √terms, which a step amplifies.
ROUNDING = 1e-12
# Factors on the tolerance: the literal form divides differences, and their rounding errors, by its γ in every block.
LOSSY = {"gait-prop literal vanilla": 1000, "gait-prop literal not rescaled": 1000}
NETS = {
    "lenet-like": ([
        Conv(channels=4, kernel=5, padding=2, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
        Conv(channels=6, kernel=5, padding=2, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
        Dense(units=9, activation="tanh"), Dense(units=4)], (12, 9, 2)),
    "strided": ([
        Conv(channels=4, kernel=3, stride=2, padding="same", activation="leaky-relu"),
        Conv(channels=5, kernel=3, stride=2, padding="same", activation="tanh", pool=Pool(kernel=2, stride=1)),
        Conv(channels=3, kernel=2, activation="relu"), Dense(units=4)], (13, 11, 2)),
    "dense": ([Dense(units=11, activation="elu"), Dense(units=8, activation="leaky-relu"), Dense(units=4)], (10,)),
}  # fmt: skip
INVERTIBLE = {name: ([replace(layer, activation="elu") if layer.activation == "relu" else layer for layer in layers],
                     shape) for name, (layers, shape) in NETS.items()}  # fmt: skip
SQUARE_NETS = {
    "square convolutions": ([
        Conv(channels=3, kernel=3, padding="same", activation="leaky-relu"),
        Conv(channels=4, kernel=3, stride=2, padding="same", activation="elu"),
        Dense(units=9, activation="leaky-relu"), Dense(units=4)], (6, 5, 2)),
    "square dense": ([Dense(units=11, activation="leaky-relu"), Dense(units=8, activation="tanh"), Dense(units=4)],
                     (10,)),
}  # fmt: skip
TRAINED = FeedbackTraining(iterations=(3, 2, 1), sigma=(0.2, 0.1, 0.3), optimizer=SGD(lr=0.01, momentum=0.9))
LEARNED = {
    "tp": {},
    "dtp": {},
    "dtp divided": {"divide_by_beta": True, "feedback_init": "symmetric"},
    "ldrl": {},
    "ldrl output noise": {"output_noise": "expected"},
    "ldrl expected": {"expected": True},
    "ldrl-parallel": {"samples": 3},
    "ldrl-parallel expected": {"expected": True},
}
GAIT_PROP = {
    "literal": {"eta": 0.1},
    "literal vanilla": {"normalise": False, "gamma": 0.1},
    "literal not rescaled": {"eta": 1e-3, "norm": "l2_squared", "scale_by_sqrt_dim": False, "rescale_updates": False},
    "difference": {"form": "difference"},
    "difference not rescaled": {"form": "difference", "rescale_updates": False, "normalise": False},
    "pseudo": {"inverse": "pseudo"},
    "pseudo not rescaled": {"inverse": "pseudo", "rescale_updates": False},
}
CASES = {
    "bp": ("bp", {}),
    "fa": ("fa", {}),
    "dfa": ("dfa", {}),
    "sign-symmetry": ("sign-symmetry", {}),
    "sign-symmetry batch": ("sign-symmetry", {"magnitude": "batch"}),
    "kolen-pollack": ("kolen-pollack", {"decay": 0.1}),
    "weight-mirror": ("weight-mirror", {}),
    "alignment sa": ("alignment", {}),
    "alignment ia": ("alignment", {"loss": "ia"}),
    **{f"{name} {unpool}": (name.split()[0], {**options, "unpool": unpool})
       for name, options in LEARNED.items() for unpool in ("overwrite", "accumulate")},
    "drl": ("drl", {}),
    "drl control": ("drl", {"loss": "reconstruction"}),
    "drl rhl": ("drl", {"hidden": 6}),
    "drl expected": ("drl", {"expected": True}),
    "drl optimum": ("drl", {"expected": "optimum"}),
    **{f"gait-prop {name}": ("gait-prop", options) for name, options in GAIT_PROP.items()},
    "gnt": ("gnt", {"damping": 0.1}),
    "ridge-tp": ("ridge-tp", {"ridge": 0.3}),
    "ridge-tp linearised": ("ridge-tp", {"activation": "linearised", "divide_by_beta": True}),
}  # fmt: skip


def test_every_rule_is_among_the_cases():
    assert {rule for rule, _ in CASES.values()} == set(RULES)


def squared(case):
    """Tell whether a case needs square weights."""
    rule, options = CASES[case]
    return RULES[rule].inverts and options.get("inverse") != "pseudo"


def drawn(layers, shape, case, near):
    """Return a network with square weights if the case needs them, and with nearly semi-orthogonal ones if `near`."""
    blocks = fitting_blocks(layers, shape)
    if not near and not squared(case):
        return random_network(blocks)
    blocks = fitting_blocks(square(layers, blocks), shape) if squared(case) else blocks
    network = make_network(blocks, "orthogonal", 0, "float64")
    for n, block in enumerate(blocks):
        network.biases[n] = 0.1 * rng(n).standard_normal(block.out_shape[-1])
        if near:
            network.weights[n] += 0.01 * rng(n, 1).standard_normal(block.weight_shape)
        elif n:
            network.weights[n] = 0.7 * well_conditioned(block.out_shape[-1], 3, n).reshape(block.weight_shape)
    return network


def step(engine, rule, options, network, x, labels):
    """Return loss, feedback losses, updates, θ and the rule's state after one step."""
    if RULES[rule].feedback is not None:
        settings = TRAINED if len(network) == 4 else FeedbackTraining(iterations=2, sigma=0.2, optimizer=SGD(lr=0.01))
        options = options | {"feedback": settings}
    inverts, on = RULES[rule].inverts, "all-but-first" if options.get("inverse") == "pseudo" else "square"
    optimizer = SGD(lr=0.1, momentum=0.9, orthogonality=0.01 if inverts else 0.0, orthogonality_on=on)
    runner = trainer(network, rule, optimizer, threads=2, seed=3, engine=engine, **options)
    loss, one = runner.forward(x, labels)
    losses = runner.train_feedback(one)
    proposed = runner.rule.propose(runner.options, runner.state, one)
    updates = copies(proposed)
    runner.apply(one, proposed)
    flat = [array for pair in updates for array in pair]
    arrays = {f"update {p}": array for p, array in enumerate(flat)}
    arrays |= {f"θ {p}": array for p, array in enumerate(network.parameters())} | runner.state.named()
    return float(loss), [None if each is None else float(each) for each in losses], arrays


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(
    ("case", "near"),
    [
        (case, near)
        for case, (rule, _) in CASES.items()
        for near in ((False, True) if RULES[rule].inverts else (False,))
    ],
)
def test_a_step_by_the_fast_and_by_the_plain_engine_agree(case, count, near):
    rule, options = CASES[case]
    for layers, shape in (SQUARE_NETS if squared(case) else INVERTIBLE if rule == "ridge-tp" else NETS).values():
        results = []
        for engine in (None, plain(NUMPY)):
            network = drawn(layers, shape, case, near)
            results.append(step(engine, rule, options, network, *batch(network.blocks, count)))
        (loss, losses, fast), (plain_loss, plain_losses, exact) = results
        assert loss == pytest.approx(plain_loss, rel=1e-13)
        assert losses == pytest.approx(plain_losses, rel=1e-11, abs=1e-12)
        assert fast.keys() == exact.keys()
        for name, array in exact.items():
            try:
                close(fast[name], array, ROUNDING * LOSSY.get(case, 1))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
