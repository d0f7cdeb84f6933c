"""Sign symmetry, Kolen–Pollack, weight mirror and alignment losses: identities, definitions, fixed points.

All of them are FA with a B that changes; FA itself is tested in test_rules.py.
"""

import itertools
import math
from dataclasses import replace

import naive
import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network, rng
from scipy.stats import norm
from training import copies, fast, pass_of, plain, trainer

from arraytp.backend import NUMPY
from arraytp.errors import UserError
from arraytp.model.blocks import block_flops
from arraytp.options import SGD, Adam, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import RULES, alignment, weight_mirror

LAYERS = [
    Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=5, kernel=3, stride=2, padding="same", activation="tanh", pool=Pool(kernel=2, stride=1)),
    Dense(units=7, activation="tanh"),
    Dense(units=4),
]
SHAPE = (9, 8, 2)
OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": Adam(lr=0.01, weight_decay=1e-2),
}
FAMILY = {
    "sign-symmetry": {},
    "sign-symmetry batch": {"magnitude": "batch"},
    "sign-symmetry fixed": {"magnitude": "fixed"},
    "kolen-pollack": {"decay": 0.01},
    "weight-mirror": {},
    "alignment sa": {},
    "alignment wm": {"loss": "wm"},
    "alignment ia": {"loss": "ia"},
}


def runner(rule, place=None, layers=LAYERS, shape=SHAPE, optimizer=SGD(lr=0.1), engine=None, **options):  # noqa: B008
    network = random_network(fitting_blocks(layers, shape))
    backend = NUMPY if place is None else place.backend
    network = network if place is None else placed(network, lambda array: place.backend.asarray(array.copy()))
    return trainer(network, rule.split()[0], optimizer, backend, 2, 3, engine, **options)


def stepped(made, place, count, steps=3):
    """Take each training step on a new batch, and yield its number afterwards."""
    blocks = made.network.blocks
    for step in range(steps):
        x, labels = batch(blocks, count, step)
        made.step(place.put(x), place.put(labels))
        yield step


@pytest.mark.parametrize("rule", FAMILY)
def test_with_b_equal_to_w_every_rule_is_bp_bit_for_bit(rule):
    made, bp = runner(rule, **FAMILY[rule]), runner("bp")
    for n in made.state.weights:
        made.state.weights[n] = made.network.weights[n].copy()
    x, labels = batch(made.network.blocks, 6)
    for mine, exact in zip(copies(made.propose(x, labels)[1]), copies(bp.propose(x, labels)[1]), strict=True):
        np.testing.assert_array_equal(mine[0], exact[0])
        np.testing.assert_array_equal(mine[1], exact[1])


# Sign symmetry.


@pytest.mark.parametrize("magnitude", ["unit", "batch", "fixed"])
def test_b_has_the_signs_of_w_in_every_step(place, magnitude):
    made = runner("sign-symmetry", place, optimizer=SGD(lr=3.0), magnitude=magnitude)
    seen = [{n: place.get(B).copy() for n, B in made.state.weights.items()}]
    for step in range(4):
        x, labels = batch(made.network.blocks, 6, step)
        _, one = made.forward(place.put(x), place.put(labels))
        made.train_feedback(one)
        for n, B in made.state.weights.items():
            np.testing.assert_array_equal(np.sign(place.get(B)), np.sign(place.get(made.network.weights[n])))
        seen.append({n: place.get(B).copy() for n, B in made.state.weights.items()})
        made.apply(one, made.rule.propose(made.options, made.state, one))
    for n, block in enumerate(made.network.blocks[1:], start=1):
        taps = math.prod(block.weight_shape[:-2])
        c = math.sqrt(2 / (taps * block.weight_shape[-2] + taps * block.weight_shape[-1]))
        sizes = [np.abs(weights[n]) for weights in seen]
        assert not np.array_equal(np.sign(seen[0][n]), np.sign(seen[-1][n]))
        if magnitude == "unit":
            assert all((size == c).all() for size in sizes)
        else:
            # The Gaussian's mean square is c²; its estimate may be off by five standard deviations.
            deviation = c**2 * math.sqrt(2 / sizes[0].size)
            assert all(abs((size**2).mean() - c**2) < 5 * deviation for size in sizes)
            same = [np.array_equal(a, b) for i, a in enumerate(sizes) for b in sizes[:i]]
            assert set(same) == ({True} if magnitude == "fixed" else {False})


def test_magnitudes_of_a_batch_depend_on_seed_and_batch_alone():
    """Otherwise a resumed run would draw other magnitudes than a run that was never interrupted."""
    made, other = (runner("sign-symmetry", magnitude="batch") for _ in range(2))
    x, labels = batch(made.network.blocks, 6)
    _, one = made.forward(x, labels)
    for number in (0, 1, 2):
        made.rule.follow(made.options, made.state, replace(one, number=number))
    other.rule.follow(other.options, other.state, replace(one, number=2))
    for n, B in made.state.weights.items():
        np.testing.assert_array_equal(B, other.state.weights[n])


# Kolen–Pollack.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3])
def test_the_difference_of_w_and_b_shrinks_by_exactly_1_minus_lambda_a_step(place, optimizer, decay):
    made = runner("kolen-pollack", place, optimizer=OPTIMIZERS[optimizer], decay=decay)
    weights = made.network.weights

    def difference(n):
        return place.get(weights[n]) - place.get(made.state.weights[n])

    first = {n: difference(n).copy() for n in made.state.weights}
    for step in stepped(made, place, 6, 4):
        for n, start in first.items():
            np.testing.assert_allclose(difference(n), (1 - decay) ** (step + 1) * start, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_that_both_get_is_the_optimisers(place, optimizer):
    """W moves as under FA with the same updates, except that in every block but the first it also decays by λW."""
    plain_fa, made = (
        runner(rule, place, optimizer=OPTIMIZERS[optimizer], feedback_init="xavier-normal", **options)
        for rule, options in (("fa", {}), ("kolen-pollack", {"decay": 0.25}))
    )
    before = [place.get(w).copy() for w in made.network.weights]
    for each in (plain_fa, made):
        list(stepped(each, place, 6, 1))
    for n, start in enumerate(before):
        lost = 0.25 * start if n else 0
        np.testing.assert_allclose(
            place.get(made.network.weights[n]), place.get(plain_fa.network.weights[n]) - lost, rtol=1e-12, atol=1e-15
        )
        np.testing.assert_array_equal(place.get(made.network.biases[n]), place.get(plain_fa.network.biases[n]))


def test_b_equal_to_w_stays_so_and_trains_as_bp_with_decoupled_decay():
    made, bp = runner("kolen-pollack", decay=0.0), runner("bp")
    for n in made.state.weights:
        made.state.weights[n] = made.network.weights[n].copy()
    for each in (made, bp):
        x, labels = batch(each.network.blocks, 6)
        for _ in range(5):
            each.step(x, labels)
    for mine, exact in zip(made.network.parameters(), bp.network.parameters(), strict=True):
        np.testing.assert_array_equal(mine, exact)


@pytest.mark.parametrize(("dtype", "lost", "kept"), [("float32", 2.9e-8, 6e-8), ("float64", 5e-17, 1.2e-16)])
def test_a_decay_that_is_lost_in_rounding_is_refused(dtype, lost, kept):
    def check(decay):
        return RULES["kolen-pollack"].check(
            RULES["kolen-pollack"].options(decay=decay), fitting_blocks(LAYERS, SHAPE), dtype, "sum"
        )

    with pytest.raises(UserError, match=rf"rule\.decay: {lost:g} does nothing in {dtype}, .*; use at least "):
        check(lost)
    assert check(kept) == check(0.0) == []
    assert np.dtype(dtype).type(1 - kept) < 1


# Weight mirror.


def mean_derivative(activation, mean, deviation):
    """Return E f'(z) for z ~ N(mean, deviation²), by Gauss–Hermite quadrature, or exactly for ReLU."""
    if activation == "relu":
        return norm.cdf(mean / deviation)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = mean + deviation * nodes[:, None]
    values = {"linear": np.ones_like(z), "tanh": 1 - np.tanh(z) ** 2}[activation]
    return (weights[:, None] * values).sum(axis=0) / weights.sum()


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh"])
@pytest.mark.parametrize(
    "layer",
    [Dense(units=5), Conv(channels=5, kernel=2, stride=2, pool=Pool(kernel=2, stride=1))],
    ids=["dense", "conv"],
)
def test_the_mean_update_of_the_mirror_is_sigma_squared_w_times_the_mean_derivative(layer, activation):
    """By Stein's lemma. The error of the Monte Carlo mean falls as 1/√n; the mirror ignores the pool."""
    layers = (
        [Dense(units=4), Dense(units=5), Dense(units=3)] if layer.type == "dense" else [layer, layer, Dense(units=3)]
    )
    layers[1] = replace(layer, activation=activation)
    shape = (6,) if layer.type == "dense" else (13, 13, 2)
    network, sigma = random_network(fitting_blocks(layers, shape)), 0.7
    W, b = network.weights[1], network.biases[1]
    flat = W.reshape(-1, W.shape[-1])
    wanted = sigma**2 * W * mean_derivative(activation, b, sigma * np.linalg.norm(flat, axis=0))
    x, labels = batch(network.blocks, 64)
    made = trainer(network, "weight-mirror", SGD(lr=1.0), threads=1)
    _, one = made.forward(x, labels)
    iterate = weight_mirror.begin(made.options, one.at(1), sigma, 10**6)
    drawn = np.stack([-iterate(made.state, k, False).gradients["weight"] for k in range(1024)])
    # In standard errors of the mean over 1024 batches: even the largest element is within five.
    deviations = (drawn.mean(axis=0) - wanted) / (drawn.std(axis=0) / math.sqrt(len(drawn)))
    assert np.abs(deviations).max() < 5
    errors = [np.sqrt(np.mean((drawn.reshape(-1, n, *W.shape).mean(axis=1) - wanted) ** 2)) for n in (4, 16, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.25)


def test_the_mirrors_step_is_the_papers(place):
    """B ← (1 − λ) B + η xᵀy / rows with λ = lr · weight_decay, η = lr and x the noise that the observer gets."""
    training = FeedbackTraining(iterations=1, sigma=0.5, optimizer=SGD(lr=0.3, weight_decay=0.2))
    made = runner("weight-mirror", place, feedback=training)
    x, labels = batch(made.network.blocks, 6)
    _, one = made.forward(place.put(x), place.put(labels))
    before = {n: place.get(B).copy() for n, B in made.state.weights.items()}
    noises = {}
    made.train_feedback(one, lambda n, k, arrays: noises.update({n: place.get(arrays["epsilon"]).copy()}))
    for n, block in enumerate(made.network.blocks[1:], start=1):
        noise = noises[n].reshape(6, *block.in_shape)
        y = responses(block, place.get(made.network.weights[n]), place.get(made.network.biases[n]), noise)
        rows = y.size // y.shape[-1]
        wanted = (1 - 0.3 * 0.2) * before[n] + 0.3 * associated(block, noise, y) / rows
        close(place.get(made.state.weights[n]), wanted, 1e-12)


def responses(block, weight, bias, x):
    """Return f(xW + b), without the pool, by loops."""
    alone = replace(block, pool=None, auxiliary=0, out_shape=block.pre_shape)
    return naive.forward((alone,), [weight], [bias], x)[1][-1]


def associated(block, x, y):
    """Return xᵀy over the rows of x's patches, by loops."""
    return x.T @ y if block.window is None else naive.conv_weight_gradient(y, x, block.window)


def carried(block, B, y):
    """Return yBᵀ, by loops."""
    return y @ B.T if block.window is None else naive.conv_input_gradient(y, B, block.window)


# Alignment losses.


def regulariser(name, block, B, W, x, y):
    """Return the value of a primitive, by loops over its definition."""
    rows = y.size // y.shape[-1]
    return {
        "decay": lambda: (B**2).sum() / 2,
        "self": lambda: -(B * W).sum(),
        "amp": lambda: -(x * carried(block, B, y)).sum() / rows,
        "null": lambda: (carried(block, B, y) ** 2).sum() / 2 / rows,
    }[name]()


@pytest.mark.parametrize("engine", [fast, plain])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", alignment.PRIMITIVES)
def test_each_primitive_has_the_gradient_of_its_definition(name, n, engine):
    made = runner("alignment ia", engine=engine())
    x, labels = batch(made.network.blocks, 4)
    _, one = made.forward(x, labels)
    at, B = one.at(n), rng(5, n).standard_normal(made.state.weights[n].shape)
    taken = at.s.reshape(4, *at.block.in_shape).copy()
    y = responses(at.block, at.weight, at.bias, taken)
    degree, gradient = alignment.PRIMITIVES[name](at, B, None if name in ("decay", "self") else at.alone(at.s))
    gradient = gradient.copy()

    def value(moved):
        return regulariser(name, at.block, moved, at.weight, taken, y)

    assert (B * gradient).sum() / degree == pytest.approx(value(B), rel=1e-12)
    for seed in range(3):
        v = rng(6, seed).standard_normal(B.shape)
        # The primitives are at most quadratic in B, so a central difference is exact up to rounding.
        slope = (value(B + 0.5 * v) - value(B - 0.5 * v)) / 1
        assert (v * gradient).sum() == pytest.approx(slope, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", ["wm", "ia", "sa"])
def test_a_step_descends_the_sum_of_primitives(place, loss):
    coefficients = {"alpha": 0.7, "beta": 0.3, "gamma": 0.2}
    training = FeedbackTraining(iterations=2, optimizer=SGD(lr=0.1))
    made = runner("alignment", place, loss=loss, feedback=training, **coefficients)
    x, labels = batch(made.network.blocks, 4)
    _, one = made.forward(place.put(x), place.put(labels))
    start, seen = {n: place.get(B).copy() for n, B in made.state.weights.items()}, {}

    def observe(n, k, arrays):
        seen[n, k] = place.get(arrays["gradient"]).copy(), float(arrays["loss"])

    made.train_feedback(one, observe)
    names = {"wm": {"amp": 0.7, "decay": 0.3}, "ia": {"amp": 0.7, "decay": 0.3, "null": 0.2},
             "sa": {"self": 0.7, "decay": 0.3}}[loss]  # fmt: skip
    for n, block in enumerate(made.network.blocks[1:], start=1):
        W, b, B = place.get(made.network.weights[n]), place.get(made.network.biases[n]), start[n]
        taken = place.get(one.at(n).s).reshape(4, *block.in_shape)
        y = responses(block, W, b, taken)
        for k in range(2):
            gradient, value = seen[n, k]
            wanted = sum(weight * regulariser(name, block, B, W, taken, y) for name, weight in names.items())
            assert value == pytest.approx(wanted, rel=1e-12)
            B = B - 0.1 * gradient
        close(place.get(made.state.weights[n]), B, 1e-13)


def test_symmetric_alignment_walks_to_its_fixed_point_at_the_rate_of_its_closed_form():
    """Gradient descent on β/2 ‖B‖² − α tr(BᵀW): B_t − (α/β) W = (1 − ηβ)^t (B_0 − (α/β) W)."""
    training = FeedbackTraining(iterations=7, optimizer=SGD(lr=0.1))
    made = runner("alignment", alpha=0.6, beta=0.4, feedback=training)
    x, labels = batch(made.network.blocks, 4)
    _, one = made.forward(x, labels)
    start = {n: B.copy() for n, B in made.state.weights.items()}
    made.train_feedback(one)
    for n, B in made.state.weights.items():
        rest = 1.5 * made.network.weights[n]
        np.testing.assert_allclose(B - rest, (1 - 0.04) ** 7 * (start[n] - rest), rtol=1e-12, atol=1e-14)
        made.state.weights[n] = rest.copy()
    made.train_feedback(one)
    for n, B in made.state.weights.items():
        np.testing.assert_allclose(B, 1.5 * made.network.weights[n], rtol=1e-13)


def test_information_alignment_rests_at_the_ridge_solution_of_a_dense_block():
    """−α xᵀy + βB + γ B yᵀy = 0, averaged over the samples, gives B = α xᵀy (β I + γ yᵀy)⁻¹."""
    training = FeedbackTraining(iterations=1, optimizer=SGD(lr=0.1))
    made = runner("alignment", alpha=0.6, beta=0.4, gamma=0.3, loss="ia", feedback=training)
    x, labels = batch(made.network.blocks, 9)
    _, one = made.forward(x, labels)
    at = one.at(2)
    taken = at.s.reshape(9, -1)
    y = np.tanh(taken @ at.weight + at.bias)
    moments = taken.T @ y / 9, y.T @ y / 9
    rest = 0.6 * moments[0] @ np.linalg.inv(0.4 * np.eye(7) + 0.3 * moments[1])
    made.state.weights[2] = rest.copy()
    made.train_feedback(one)
    np.testing.assert_allclose(made.state.weights[2], rest, rtol=1e-12, atol=1e-14)


def test_on_noise_the_loss_wm_is_the_weight_mirror():
    """With x ~ N(0, σ²) in place of the batch's activations, both rules have the same gradient, apart from decay."""
    made = runner("weight-mirror")
    x, labels = batch(made.network.blocks, 4)
    _, one = made.forward(x, labels)
    done = weight_mirror.begin(made.options, one.at(2), 0.5, 1)(made.state, 0, False)
    mirrored, noise = done.gradients["weight"].copy(), done.noises["epsilon"]
    there = pass_of(made.network, x)
    there.forward.s[2][...] = noise.reshape(there.forward.s[2].shape)
    options = RULES["alignment"].options(loss="wm", beta=0.0)
    found = alignment.begin(options, there.at(2), 0.0, 1)(made.state, 0, False).gradients["weight"]
    np.testing.assert_allclose(found, mirrored, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("rule", FAMILY)
def test_auxiliary_units_have_no_part_in_the_updates(rule):
    """FA runs on networks with auxiliary units, so its relatives must too."""
    layers = [replace(LAYERS[0], auxiliary=1), replace(LAYERS[1], auxiliary=2), *LAYERS[2:]]
    made = runner(rule, layers=layers, **FAMILY[rule])
    x, labels = batch(made.network.blocks, 5)
    losses = [float(made.step(x, labels)) for _ in range(3)]
    assert np.isfinite(losses).all()
    _, updates = made.propose(x, labels)
    assert not updates[0][0][..., -1:].any()
    assert not updates[1][0][..., -2:].any()


@pytest.mark.parametrize("rule", ["weight-mirror", "alignment"])
def test_a_list_of_another_length_is_refused(rule):
    training = FeedbackTraining(iterations=(1, 2))
    blocks = fitting_blocks(LAYERS, SHAPE)
    with pytest.raises(
        UserError, match=r"rule\.feedback\.iterations: 2 values \[1, 2\]; needs .* a list of 3, one per"
    ):
        RULES[rule].check(RULES[rule].options(feedback=training), blocks, "float32", "sum")


@pytest.mark.parametrize("rule", ["kolen-pollack", "weight-mirror", "alignment sa"])
def test_b_turns_towards_w_and_the_updates_towards_bp(rule):
    """This is the purpose of these rules, tested here on a small network by 60 steps on one batch."""
    options = {
        "kolen-pollack": {"decay": 0.03},
        "weight-mirror": {"feedback": replace(weight_mirror.Options().feedback, iterations=20)},
        "alignment sa": {"feedback": FeedbackTraining(iterations=2, optimizer=SGD(lr=0.05))},
    }[rule]  # fmt: skip
    made = runner(rule, optimizer=SGD(lr=0.3), **options)

    def angles():
        for n, B, W in made.rule.pairs(made.state, made.network):
            assert W is made.network.weights[n]
            yield np.degrees(np.arccos((B * W).sum() / np.linalg.norm(B) / np.linalg.norm(W)))

    before = list(angles())
    x, labels = batch(made.network.blocks, 32)
    for _ in range(60):
        made.step(x, labels)
    assert min(before) > 60
    assert max(angles()) < 50


def test_a_mirror_takes_two_products_an_iteration():
    """They are θ ∘ x and x ⋆ y; the iterations on a batch share no product."""
    made = runner("weight-mirror")
    products = 2 * sum(map(block_flops, made.network.blocks[1:]))
    assert RULES["weight-mirror"].feedback.flops(made.options, made.network) == products
