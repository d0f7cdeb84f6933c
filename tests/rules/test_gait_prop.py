"""GAIT-prop: against BP, against a net worked out on paper, literal against difference form, and edge cases."""

from dataclasses import replace

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, named_blocks, placed, rng, well_conditioned
from training import copies, fast, pass_of

from arraytp.backend import NUMPY
from arraytp.errors import IllConditionedError, NonFiniteError
from arraytp.model.architectures import plan_network, square
from arraytp.model.blocks import Network
from arraytp.model.initialise import make_network
from arraytp.model.shapes import plan_blocks
from arraytp.ops.activations import ACTIVATIONS
from arraytp.options import Conv, Dense, NetworkOptions
from arraytp.rules import bp, fa, gait_prop
from arraytp.rules.gait_prop import Options, crossings
from arraytp.rules.protocol import State
from arraytp.training.compare import angle_degrees

LAYERS = {
    "dense": ([Dense(units=14, activation="leaky-relu"), Dense(units=9, activation="leaky-relu"),
               Dense(units=4)], (11,)),
    "patches": ([Conv(channels=2, kernel=3, padding="same", activation="leaky-relu"),
                 Conv(channels=3, kernel=2, stride=2, activation="leaky-relu"), Dense(units=4)], (6, 6, 2)),
    "overlapping": ([Conv(channels=2, kernel=3, padding="same", activation="leaky-relu"),
                     Conv(channels=3, kernel=3, stride=2, padding="same", activation="leaky-relu"),
                     Conv(channels=4, kernel=2, activation="leaky-relu"), Dense(units=4)], (7, 6, 2)),
}  # fmt: skip


def square_blocks(name, activation=None):
    layers, shape = LAYERS[name]
    if activation is not None:
        layers = [*(replace(layer, activation=activation) for layer in layers[:-1]), layers[-1]]
    return plan_blocks(square(layers, plan_blocks(layers, shape)), shape)


def skewed(blocks, seed=0, number=5.0):
    """Return a network whose square matrices are far from orthogonal, and whose biases are not 0."""
    network = make_network(blocks, "orthogonal", seed, "float64")
    for n, block in enumerate(blocks):
        network.biases[n] = 0.2 * rng(seed, n).standard_normal(block.out_shape[-1])
        if n:
            network.weights[n] = 2 * well_conditioned(block.out_shape[-1], number, n).reshape(block.weight_shape)
    return network


def updates_of(rule, options, network, x, dlogits, backend=NUMPY):
    return copies(rule.RULE.propose(options, State(), pass_of(network, x, dlogits, fast(backend))))


def error_of(network, count=6, seed=0):
    x, _ = batch(network.blocks, count, seed)
    return x, rng(seed, 8).standard_normal((count, network.blocks[-1].next_shape[0]))


def crossings_of(options, network, x, dlogits):
    one, options = pass_of(network, x, dlogits), replace(options, form="difference")
    walk = zip(one.down(), gait_prop.targets(options, State(), one), strict=True)
    # The first block is not inverted.
    return [crossings(options, at, target) for at, target in walk if at.n > 0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("form", "dtype"), [("difference", "float32"), ("difference", "float64"), ("literal", "float64")]
)
@pytest.mark.parametrize("seed", range(3))
def test_with_orthogonal_weights_it_is_bp(name, form, dtype, seed):
    network = make_network(square_blocks(name), "orthogonal", seed, dtype)
    x, dlogits = (array.astype(dtype) for array in error_of(network, seed=seed))
    options = Options(form=form)
    assert form == "difference" or not any(crossings_of(options, network, x, dlogits))
    found, exact = (updates_of(*rule, network, x, dlogits) for rule in ((gait_prop, options), (bp, bp.Options())))
    for mine, wanted in zip(found, exact, strict=True):
        assert angle_degrees(mine[0], wanted[0]) < 1e-3
        close(mine[0], wanted[0], 1e-4)
        close(mine[1], wanted[1], 1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fc-shallow", "float32"), ("conv-imagenet", "float32"), ("conv-imagenet", "float64")]
)
def test_the_papers_networks_start_as_bp(name, dtype):
    """In the difference form this holds in float32 too, because its solves are refined."""
    blocks = named_blocks(name, square=True)
    network = make_network(blocks, "orthogonal", 0, dtype)
    x, dlogits = (array.astype(dtype) for array in error_of(network, 3))
    found = updates_of(gait_prop, Options(form="difference"), network, x, dlogits)
    for mine, wanted in zip(found, updates_of(bp, bp.Options(), network, x, dlogits), strict=True):
        assert angle_degrees(mine[0], wanted[0]) < 1e-3


@pytest.mark.parametrize("activation", ["leaky-relu", "linear", "elu", "tanh"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_two_forms_agree_with_any_weights(name, activation):
    """Tolerance: with γ = 1e-7, t − a keeps nine digits; for ELU and tanh the forms also differ in first order of γ."""
    network = skewed(square_blocks(name, activation))
    if activation == "tanh":
        network.weights = [0.3 * w for w in network.weights]
    x, dlogits = error_of(network)
    assert not any(crossings_of(Options(), network, x, dlogits))
    literal, difference = (
        updates_of(gait_prop, Options(form=f), network, x, dlogits) for f in ("literal", "difference")
    )
    exact = updates_of(bp, bp.Options(), network, x, dlogits)
    for mine, other in zip(literal, difference, strict=True):
        close(mine[0], other[0], 3e-5)
        close(mine[1], other[1], 3e-5)
    assert angle_degrees(difference[0][0], exact[0][0]) > 5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("number", [1.2, 5.0])
def test_the_difference_form_is_bp_with_the_inverse_in_place_of_the_transpose(place, name, number):
    """The reference is feedback alignment with NumPy's W⁻¹ᵀ as its fixed matrices; W is nearly orthogonal, or not.

    Its singular values run from 1.1 down to 1.1 / 1.2, or from 2 down to 2 / 5.
    """
    network = skewed(square_blocks(name), number=number)
    if number < 2:
        network.weights[1:] = [w * 0.55 for w in network.weights[1:]]
    x, dlogits = error_of(network)
    feedback = State()
    for n, w in enumerate(network.weights[1:], start=1):
        inverse = np.linalg.inv(w.reshape(-1, w.shape[-1]))
        feedback.weights[n] = np.ascontiguousarray(inverse.T).reshape(w.shape)
    wanted = fa.RULE.propose(fa.Options(), feedback, pass_of(network, x, dlogits))
    there = placed(network, place.put)
    options = Options(form="difference")
    found = updates_of(gait_prop, options, there, place.put(x), place.put(dlogits), place.backend)
    for mine, exact in zip(found, wanted, strict=True):
        close(place.get(mine[0]), exact[0], 1e-12)
        close(place.get(mine[1]), exact[1], 1e-12)


OPTIONS = [
    Options(normalise=False),
    Options(norm="l2_squared"),
    Options(scale_by_sqrt_dim=False),
    Options(eta=1e-6, rescale_updates=False),
    Options(normalise=False, gamma=1e-2, rescale_updates=False),
    Options(norm="l2_squared", scale_by_sqrt_dim=False, rescale_updates=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_two_forms_agree_with_every_option(options):
    """With the squared norm, small δ get a large γ, and every second nudge is as large as a: linear f for this case."""
    network = skewed(square_blocks("overlapping", "linear" if options.norm == "l2_squared" else None))
    x, dlogits = error_of(network)
    assert not any(crossings_of(options, network, x, dlogits))
    literal, difference = (
        updates_of(gait_prop, replace(options, form=form), network, x, dlogits) for form in ("literal", "difference")
    )
    for mine, other in zip(literal, difference, strict=True):
        close(mine[0], other[0], 1e-3)
    if options.rescale_updates:
        close(difference[0][0], updates_of(gait_prop, Options(form="difference"), network, x, dlogits)[0][0], 1e-12)


def hand_sized():
    """Return two dense layers 1 → 2 → 2, the second of which passes one unit on, and the updates worked out by hand.

    x = 1, W⁰ = (1, −2), b = 0: z⁰ = (1, −2), a⁰ = (1, −0.2), D⁰ = (1, 0.1).
    W¹ = (2 1; 0 4), its inverse (0.5 −0.125; 0 0.25): z¹ = a⁰W¹ = (2, 0.2), linear; the logit is 2.
    ∂L/∂logit = 0.4: t = 1.8; e¹ = (0.4, 0); dW¹ = a⁰ outer e¹ = (0.4 0; −0.08 0), db¹ = (0.4, 0).
    e⁰ = e¹(W¹)⁻¹ = (0.2, −0.05), where BP has e¹(W¹)ᵀ = (0.8, 0); D⁰e⁰ = (0.2, −0.005) = dW⁰ = db⁰.
    Vanilla, γ = 0.001: δ¹ = (−0.2, 0), y = (1.9998, 0.2), t⁰ = y(W¹)⁻¹ = (0.9999, −0.199975), m = 1000:
    2m(a⁰ − t⁰) = (0.2, −0.05). Normalised: ‖δ¹‖ = 0.2, dim 2: γ = 1e-7·√2 / 0.2.
    """
    blocks = fitting_blocks([Dense(units=2, activation="leaky-relu"), Dense(units=2, auxiliary=1)], (1,))
    weights = [np.array([[1.0, -2]]), np.array([[2.0, 1], [0, 4]])]
    wanted = [
        (np.array([[0.2, -0.005]]), np.array([0.2, -0.005])),
        (np.array([[0.4, 0], [-0.08, 0]]), np.array([0.4, 0])),
    ]
    return Network(blocks, weights, [np.zeros(2), np.zeros(2)]), np.array([[1.0]]), np.array([[0.4]]), wanted


@pytest.mark.parametrize("form", ["literal", "difference"])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_net_worked_out_on_paper(place, form, normalise):
    network, x, dlogits, wanted = hand_sized()
    options, there = Options(form=form, normalise=normalise), placed(network, place.put)
    found = updates_of(gait_prop, options, there, place.put(x), place.put(dlogits), place.backend)
    for mine, exact in zip(found, wanted, strict=True):
        close(place.get(mine[0]), exact[0], 1e-8)
        close(place.get(mine[1]), exact[1], 1e-8)


def test_the_operations_of_the_net_worked_out_on_paper():
    """Each entry of W in a product costs 2: dW 2·1·2 and, for the one unit passed on, 2·2·1; W⁻¹ 2·2·2 or 2·2·1."""
    network, *_ = hand_sized()
    assert gait_prop.flops(Options(), network) == 4 + 4 + 8
    assert gait_prop.flops(Options(form="difference"), network) == 4 + 4 + 4


def test_targets_of_the_net_worked_out_on_paper(place):
    network, x, dlogits, _ = hand_sized()
    one = pass_of(placed(network, place.put), place.put(x), place.put(dlogits), fast(place.backend))
    for form, tolerance in (("difference", 1e-12), ("literal", 1e-8)):
        vanilla = gait_prop.targets(Options(normalise=False, form=form), State(), one)
        last, first = [(place.get(target.delta).copy(), place.get(target.m).item()) for target in vanilla]
        close(last[0], np.array([[-0.2]]), tolerance)
        close(first[0], np.array([[-0.0001, 0.000025]]), tolerance)
        assert (last[1], first[1]) == pytest.approx((1, 1000))
        _, first = gait_prop.targets(Options(form=form), State(), one)
        assert place.get(first.m).item() == pytest.approx(0.2e7 / 2**0.5)


def test_the_update_does_not_depend_on_how_the_loss_is_reduced():
    network = skewed(square_blocks("dense"))
    x, dlogits = error_of(network)
    for form in ("literal", "difference"):
        whole, sixth = (updates_of(gait_prop, Options(form=form), network, x, d) for d in (dlogits, dlogits / 6))
        for mine, other in zip(whole, sixth, strict=True):
            close(mine[0] / 6, other[0], 3e-5)


@pytest.mark.parametrize("options", [Options(), Options(normalise=False), Options(form="difference"),
                                     Options(form="difference", rescale_updates=False)])  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_without_error_changes_nothing(place, name, options):
    network = skewed(square_blocks(name))
    x, dlogits = error_of(network)
    dlogits[2] = 0
    rest = [0, 1, 3, 4, 5]
    there = placed(network, place.put)
    found = updates_of(gait_prop, options, there, place.put(x), place.put(dlogits), place.backend)
    alone = updates_of(gait_prop, options, there, place.put(x[rest]), place.put(dlogits[rest]), place.backend)
    for mine, wanted in zip(found, alone, strict=True):
        close(place.get(mine[0]), place.get(wanted[0]), 1e-4 if options.form == "literal" else 1e-12)
    nothing = updates_of(gait_prop, options, there, place.put(x), place.put(0 * dlogits), place.backend)
    assert not any(place.get(array).any() for pair in nothing for array in pair)


@pytest.mark.parametrize(("dtype", "small"), [("float32", 1e-24), ("float64", 1e-170)])
@pytest.mark.parametrize("norm", ["l2", "l2_squared"])
def test_a_square_that_vanishes_makes_no_gamma_infinite(norm, dtype, small):
    """The batch also has a sample whose errors are 1. γ = 1 stands for a = t."""
    blocks = square_blocks("dense")
    delta = np.ones((2, *blocks[0].out_shape), dtype)
    delta[0] = small
    units = delta[0].size
    with np.errstate(all="raise", under="ignore"):
        gamma, on_target = gait_prop.perturbation(Options(norm=norm, eta=0.01), delta, blocks[0])
    of_one = {"l2": 0.01 / np.sqrt(units), "l2_squared": 0.01 / units}[norm]
    scale = np.sqrt(units) if Options().scale_by_sqrt_dim else 1.0
    np.testing.assert_allclose(gamma[1], scale * of_one, rtol=1e-6)
    assert list(on_target) == [norm == "l2_squared", False]
    np.testing.assert_allclose(gamma[0], 1.0 if norm == "l2_squared" else scale * of_one / small, rtol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l2_squared"])
def test_errors_too_small_to_be_squared_give_finite_updates(place, norm):
    network = placed(skewed(square_blocks("dense")), lambda array: place.put(array.astype("float32")))
    x, _ = batch(network.blocks, 2)
    dlogits = np.full((2, 4), 1e-26, "float32")
    options = Options(form="difference", rescale_updates=False, norm=norm)
    found = updates_of(gait_prop, options, network, place.put(x.astype("float32")), place.put(dlogits), place.backend)
    assert all(np.isfinite(place.get(array)).all() for pair in found for array in pair)


def test_units_across_the_kink_are_counted_and_cost_the_literal_form_its_equality():
    network, x, dlogits, _ = hand_sized()
    # The leaky output has z¹ = (0.0001, …): a nudge by γ = 0.1 towards a target 0.2 lower crosses the kink.
    network.blocks = fitting_blocks(
        [Dense(units=2, activation="leaky-relu"), Dense(units=2, auxiliary=1, activation="leaky-relu")], (1,)
    )
    network.biases[1][0] = -1.9999
    options = Options(normalise=False, gamma=0.1)
    assert crossings_of(options, network, x, dlogits) == [1]
    literal, difference = (
        updates_of(gait_prop, replace(options, form=form), network, x, dlogits) for form in ("literal", "difference")
    )
    assert np.abs(literal[0][0] - difference[0][0]).max() > 0.1 * np.abs(difference[0][0]).max()


@pytest.mark.parametrize("form", ["literal", "difference"])
def test_a_singular_layer_is_an_error_with_its_name(form):
    network = skewed(square_blocks("overlapping"))
    network.weights[2][...] = 1
    with pytest.raises(IllConditionedError, match=r"block 2 \(conv3\).*condition number is (inf|\d\.\de\+\d\d)"):
        updates_of(gait_prop, Options(form=form), network, *error_of(network))


@pytest.mark.parametrize(
    ("activation", "value", "said"),
    [
        (
            "tanh",
            25.0,
            r"block 2 \(dense3\): .* activation of 1 is beyond the range of tanh, above -1 and below 1",
        ),
        ("tanh", -25.0, r"activation of -1 is beyond the range of tanh"),
        ("elu", -50.0, r"activation of -1 is beyond the range of elu, above -1, so.*rule.form: difference"),
    ],
)
@pytest.mark.parametrize("unit", [0, -1])
def test_a_saturated_unit_is_an_error_with_its_block_and_value(place, activation, value, said, unit):
    """This holds for units passed on and for auxiliary ones, since the inverse needs all units."""
    network = skewed(square_blocks("dense"))
    network.blocks = (*network.blocks[:2], replace(network.blocks[2], activation=ACTIVATIONS[activation]))
    network.biases[2][unit] = value
    x, dlogits = error_of(network)
    there = placed(network, place.put)
    with pytest.raises(NonFiniteError, match=said):
        updates_of(gait_prop, Options(), there, place.put(x), place.put(dlogits), place.backend)
    assert all(
        np.isfinite(place.get(array)).all()
        for pair in updates_of(
            gait_prop, Options(form="difference"), there, place.put(x), place.put(dlogits), place.backend
        )
        for array in pair
    )


def test_a_target_nudged_out_of_the_range_is_an_error():
    """The target t = a − ½ ∂L is 3 above a tanh unit near 0, so γ = 0.5 nudges the unit to about 1.5."""
    network = skewed(square_blocks("dense", "tanh"))
    network.blocks = (*network.blocks[:2], replace(network.blocks[2], activation=ACTIVATIONS["tanh"]))
    network.weights[2] *= 0.01
    x, _ = error_of(network)
    dlogits = np.full((len(x), 4), -6.0)
    with pytest.raises(NonFiniteError, match=r"block 2 \(dense3\): a nudged activation of 1\.\d+ is beyond"):
        updates_of(gait_prop, Options(normalise=False, gamma=0.5), network, x, dlogits)


def test_the_literal_form_in_single_precision_is_worth_a_note():
    blocks = square_blocks("dense")
    (note,) = gait_prop.check(Options(), blocks, "float32", "sum")
    assert "float64" in note
    assert "measured" in note
    assert (
        gait_prop.check(Options(), blocks, "float64", "sum")
        == gait_prop.check(Options(form="difference"), blocks, "float32", "sum")
        == []
    )


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("options", [Options(), Options(form="difference")])
@pytest.mark.parametrize("name", ["dense", "overlapping"])
def test_the_number_of_threads_changes_no_bit(name, options, near):
    """Test nearly orthogonal weights, which are inverted by Cholesky factors, and others."""
    blocks = square_blocks(name)
    network = make_network(blocks, "orthogonal", 0, "float64") if near else skewed(blocks)
    x, dlogits = error_of(network)
    found = []
    for threads in (1, 2, 3):
        pairs = gait_prop.RULE.propose(options, State(), pass_of(network, x, dlogits, fast(threads=threads)))
        found.append([array.tobytes() for pair in pairs for array in pair])
    assert found[0] == found[1] == found[2]


def first_angle(name, batch_size, dtype, options, seed=0):
    blocks = plan_network(NetworkOptions(name=name, square=True), (32, 32, 3), 10)
    network = make_network(blocks, "orthogonal", seed, dtype)
    x = rng(seed, 1).random((batch_size, 32, 32, 3)).astype(dtype)
    labels = rng(seed, 2).integers(0, 10, batch_size)
    logits = pass_of(network, x).logits
    p = np.exp(logits - logits.max(1, keepdims=True))
    dlogits = (p / p.sum(1, keepdims=True) - np.eye(10)[labels]).astype(dtype)
    found, exact = (updates_of(*rule, network, x, dlogits) for rule in ((gait_prop, options), (bp, bp.Options())))
    return angle_degrees(found[0][0], exact[0][0])


TABLE = [
    # network, normalise, form, dtype, least and greatest angle of the first hidden layer
    ("fc-shallow", False, "literal", "float64", 0.05, 3),
    ("fc-shallow", False, "literal", "float32", 75, 105),
    ("fc-shallow", True, "literal", "float64", 0, 1e-3),
    ("fc-shallow", True, "literal", "float32", 75, 105),
    ("fc-shallow", True, "difference", "float32", 0, 1e-3),
    ("fc-deep", False, "literal", "float64", 75, 105),
    ("fc-deep", False, "literal", "float32", 75, 105),
    ("fc-deep", True, "literal", "float64", 0, 1e-3),
    ("fc-deep", True, "literal", "float32", 75, 105),
    ("fc-deep", True, "difference", "float32", 0, 1e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalise", "form", "dtype", "least", "greatest"), TABLE)
def test_the_table_of_precisions(name, normalise, form, dtype, least, greatest):
    """See docs/math/gait-prop.md: with six hidden layers, γ⁶ = 1e-18, rounding drowns the vanilla literal form."""
    angle = first_angle(name, 64, dtype, Options(normalise=normalise, form=form))
    assert least <= angle <= greatest


@pytest.mark.parametrize(("normalise", "least", "greatest"), [(False, 60, 120), (True, 0, 1e-3)])
def test_six_layers_need_normalisation_in_the_literal_form(normalise, least, greatest):
    """The same effect as in the table, with 60 units per layer."""
    layers = [*(Dense(units=60, activation="leaky-relu") for _ in range(6)), Dense(units=60, auxiliary=50)]
    network = make_network(plan_blocks(layers, (80,)), "orthogonal", 0, "float64")
    x, dlogits = error_of(network)
    found = updates_of(gait_prop, Options(normalise=normalise), network, x, dlogits)
    angle = angle_degrees(found[0][0], updates_of(bp, bp.Options(), network, x, dlogits)[0][0])
    assert least <= angle <= greatest
