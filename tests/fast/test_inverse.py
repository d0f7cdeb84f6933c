"""G(F(x)) = x for square blocks of every shape, W orthogonal or not; nearby outputs go to nearby inputs."""

from contextlib import nullcontext

import numpy as np
import pytest
from feedback_blocks import at_block
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import close, fitting_blocks, rng, well_conditioned
from training import fast

from arraytp.errors import IllConditionedError, UserError
from arraytp.fast.factors import begin
from arraytp.model.architectures import plan_network, square
from arraytp.model.blocks import Network
from arraytp.model.inverse import check_invertible
from arraytp.model.passes import Batch, ForwardPass
from arraytp.model.plain import block_forward, block_inverse
from arraytp.model.shapes import plan_blocks
from arraytp.ops.solve import LU, NEAR_ORTHOGONAL, Cholesky, factor, right_solve
from arraytp.options import Conv, Dense, NetworkOptions, Pool

# The required bound; at most 4e-12 was measured.
ROUND_TRIP = 1e-10
# Factors on the orthogonal matrix of each block, step by step: at 1 it stays orthogonal, at 3 it is far from that.
TWO_SCALES = (1, 1), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)


def square_block(layer, shape):
    """Return the layer as the second of a network, in its square form."""
    layers = [Conv(channels=shape[-1], kernel=1), layer] if len(shape) == 3 else [Dense(units=shape[0]), layer]
    try:
        return plan_blocks(square(layers, plan_blocks(layers, shape)), shape)[1]
    except UserError:
        assume(False)


def inverse(place, block, factors, weight, bias, y, x):
    """Return the fast engine's inverse of a block with input x, computed on the place, as a host array."""
    engine = fast(place.backend)
    at = at_block(block, (place.put(weight), place.put(bias)), place.put(x), engine)
    return place.get(engine.inverse(at, factors, place.put(y)))


def inverses_of(place, network):
    """Return the factors of all weights of a network except the first."""
    nothing = ForwardPass([], [], [])
    return Batch(fast(place.backend), network, nothing, network.weights[0]).inverses


def check_round_trip(place, block, count, seed):
    inputs = block.out_shape[-1]
    weight = well_conditioned(inputs, 20, seed).reshape(block.weight_shape)
    bias, x = rng(seed, 5).standard_normal(inputs), rng(seed, 6).standard_normal((count, *block.in_shape))
    _, s, _ = block_forward(block, weight, bias, x)
    own, factors = (factor(put(weight.reshape(inputs, inputs))) for put in (np.array, place.put))
    close(block_inverse(block, own, bias, s, x), x, ROUND_TRIP)
    close(inverse(place, block, factors, weight, bias, s, x), x, ROUND_TRIP)
    other = s + 1e-3 * rng(seed, 7).standard_normal(s.shape) * (s > 0)
    wanted = block_inverse(block, own, bias, other, x)
    if block.window is None:
        # The inverse must use the given factors: those of 2W halve it.
        close(2 * block_inverse(block, factor(2 * own.matrix), bias, other, x), wanted, ROUND_TRIP)
    close(inverse(place, block, factors, weight, bias, other, x), wanted, ROUND_TRIP)


IMAGENET = plan_network(NetworkOptions(name="conv-imagenet", square=True), (224, 224, 3), 1000)


@pytest.mark.parametrize("block", IMAGENET[1:-1], ids=lambda block: block.label)
def test_every_convolution_of_the_imagenet_network_comes_back(place, block):
    if place.name == "read-only" or (place.name == "strict" and block.out_shape[-1] > 500):
        pytest.skip("as numpy, or too large to repeat everywhere")
    check_round_trip(place, block, 1, 0)


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 4), padding=st.just("same") | st.integers(0, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), channels=st.integers(1, 3),
    activation=st.sampled_from(["linear", "leaky-relu"]), count=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40)
def test_random_convolutions_come_back(place, kernel, stride, padding, size, channels, activation, count, seed):
    """Pixels that no window covers (stride > kernel) keep their value of the forward pass."""
    layer = Conv(channels=1, kernel=kernel, stride=stride, padding=padding, activation=activation)
    check_round_trip(place, square_block(layer, (*size, channels)), count, seed)


@pytest.mark.parametrize("activation", ["linear", "leaky-relu", "elu", "tanh"])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_dense_blocks_come_back(place, activation, count):
    """With more samples than units, the inverse is formed; with fewer, each sample is solved for."""
    block = square_block(Dense(units=2, activation=activation), (24,))
    weight, bias = 0.3 * well_conditioned(24, 20, 1), rng(2).standard_normal(24)
    x = rng(3).standard_normal((count, 24))
    _, s, _ = block_forward(block, weight, bias, x)
    factors = factor(place.put(weight))
    close(inverse(place, block, factors, weight, bias, s, x), x, ROUND_TRIP)


def test_two_overlapping_windows_by_hand():
    """With kernel 2 and stride 1 on a 2 × 3 image of one channel, the middle column is covered twice."""
    layers = [Conv(channels=1, kernel=1), Conv(channels=4, kernel=2, auxiliary=3)]
    block = fitting_blocks(layers, (2, 3, 1))[1]
    x = np.array([[[1.0], [2], [3]], [[4], [5], [6]]])[None]
    s = np.array([[[[1.0, 2, 4, 5], [2, 3, 5, 6]]]])
    np.testing.assert_array_equal(block_inverse(block, factor(np.eye(4)), np.zeros(4), s, x), x)
    s[0, 0, 0, 1] += 1
    x[0, 0, 1, 0] = 2
    found = block_inverse(block, factor(np.eye(4)), np.zeros(4), s, x)
    np.testing.assert_array_equal(found[0, :, :, 0], [[1, 3, 3], [4, 5, 6]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("share", "kind"), [(0, Cholesky), (0.99, Cholesky), (1.01, LU), (50, LU)])
def test_weights_near_orthogonal_ones_have_cholesky_factors_and_others_lu(place, share, kind, dtype):
    """On both sides of the limit, the solutions are NumPy's."""
    blocks = fitting_blocks([Dense(units=9), Dense(units=9)], (9,))
    left, right = (np.linalg.qr(rng(i).standard_normal((9, 9)))[0] for i in (0, 1))
    w = (left * np.sqrt(1 + np.append(share * NEAR_ORTHOGONAL, np.zeros(8))) @ right).astype(dtype)
    network = Network(blocks, [place.put(np.eye(9, dtype=dtype)), place.put(w)], [place.put(np.zeros(9, dtype))] * 2)
    factors = inverses_of(place, network)[1]
    assert isinstance(factors, kind)
    y = rng(2).standard_normal((3, 9)).astype(dtype)
    found = place.get(right_solve(factors, place.put(y)))
    close(found, np.linalg.solve(w.T.astype("float64"), y.T).T, 2e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("ridge", [None, 0.01])
def test_weights_that_leave_the_orthogonal_ones_get_other_factors_at_once(place, ridge):
    """A device first guesses the previous step's choice; its results must be those of a new engine."""
    blocks, engine = fitting_blocks([Dense(units=9), Dense(units=9), Dense(units=9)], (9,)), fast(place.backend)
    square, zeros, kinds = np.linalg.qr(rng(0).standard_normal((9, 9)))[0], [place.put(np.zeros(9))] * 3, []
    for scales in TWO_SCALES:
        network = Network(blocks, [place.put(scale * square) for scale in (1, *scales)], zeros)
        found = []
        for each in (engine, fast(place.backend)):
            batch = Batch(each, network, ForwardPass([], [], []), network.weights[0], begun=begin(each, network))
            # Ask twice, as a step that compares its updates does.
            for asking in (batch, batch.replaced(results="compared")):
                if ridge is None:
                    factors = [asking.inverses[n] for n in (1, 2)]
                else:
                    factors = [asking.pseudo_inverses(ridge)[n].gram for n in (1, 2)]
            found.append(factors)
        kinds.append([type(factors) for factors in found[0]])
        for mine, fresh in zip(*found, strict=True):
            y = [place.put(rng(2).standard_normal((3, 9))) for _ in range(2)]
            solved = [place.get(right_solve(*pair)) for pair in zip((mine, fresh), y, strict=True)]
            np.testing.assert_array_equal(*solved)
    assert kinds == [[Cholesky if scale == 1 else LU for scale in scales] for scales in TWO_SCALES]


@pytest.mark.parametrize("near", [True, False])
def test_a_round_trip_through_the_factors_of_a_network(place, near):
    """Test more samples than units, and fewer, with both kinds of factors; `check_round_trip` has only LU."""
    block = square_block(Dense(units=2, activation="leaky-relu"), (24,))
    w = well_conditioned(24, 1.2 if near else 20, 1) * (1.1 if near else 1)
    bias = rng(2).standard_normal(24)
    network = Network((block, block), [place.put(w)] * 2, [place.put(bias)] * 2)
    factors = inverses_of(place, network)[1]
    assert isinstance(factors, Cholesky if near else LU)
    for count in (3, 40):
        x = rng(3).standard_normal((count, 24))
        _, s, _ = block_forward(block, w, bias, x)
        close(inverse(place, block, factors, w, bias, s, x), x, ROUND_TRIP)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", "8.4e\\+06"), ("float64", "4.5e\\+15")])
def test_a_matrix_beyond_its_dtype_is_refused_by_name_and_number(place, dtype, limit):
    blocks = fitting_blocks([Dense(units=6), Dense(units=6), Dense(units=6)], (6,))
    singular = np.ones((6, 6), dtype)
    weights = [place.put(w.astype(dtype)) for w in (np.eye(6), np.eye(6), singular)]
    network = Network(blocks, weights, [place.put(np.zeros(6, dtype))] * 3)
    with (
        np.errstate(all="ignore"),
        pytest.raises(
            IllConditionedError, match=rf"block 2 \(dense3\).*{dtype}.*number is (\d\.\de\+\d+|inf).*{limit}"
        ),
    ):
        inverses_of(place, network)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", [1e4, 1e9])
def test_what_is_too_ill_conditioned_depends_on_the_dtype(place, dtype, number):
    blocks = fitting_blocks([Dense(units=6), Dense(units=6)], (6,))
    weights = [place.put(w.astype(dtype)) for w in (np.eye(6), well_conditioned(6, number, 0))]
    network = Network(blocks, weights, [place.put(np.zeros(6, dtype))] * 2)
    refused = pytest.raises(IllConditionedError) if dtype == "float32" and number > 1e8 else nullcontext()
    with refused:
        inverses_of(place, network)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Conv(channels=4, kernel=2, pool=Pool(kernel=1, stride=1)), "max-pooling has no inverse"),
        (Conv(channels=4, kernel=2, activation="relu"), "relu has no inverse"),
        (Conv(channels=3, kernel=2), "4x3 is not square.*4 units, auxiliary"),
        (Dense(units=9), "16x9 is not square.*16 units, auxiliary"),
    ],
)
def test_a_block_without_inverse_is_refused_at_once(layer, words):
    blocks = fitting_blocks([Conv(channels=1, kernel=1), layer], (4, 4, 1))
    with pytest.raises(UserError, match=rf"network block 1 \({blocks[1].label}\): rule gait-prop .*{words}"):
        check_invertible("gait-prop", blocks)


@pytest.mark.parametrize("layer", [Dense(units=5, auxiliary=5), Conv(channels=2, kernel=1, auxiliary=3)])
def test_auxiliary_units_leave_something_to_pass_on(layer):
    with pytest.raises(UserError, match=r"auxiliary: [53] of (units: 5|channels: 2) leaves nothing to pass on"):
        plan_blocks([layer], (4, 4, 1))


def test_the_square_form_of_the_imagenet_network_is_the_papers():
    assert [block.out_shape[-1] for block in IMAGENET] == [24, 216, 600, 432, 432, 864, 864, 3072]
    assert [block.next_shape[-1] for block in IMAGENET] == [24, 24, 48, 48, 96, 96, 192, 1000]


def test_a_layer_that_hands_on_more_than_it_takes_has_no_square_form():
    options = NetworkOptions(blocks=[Dense(units=3), Dense(units=10)], square=True)
    with pytest.raises(UserError, match=r"network block 1 \(dense2\): square: 3 inputs cannot give the 10 units"):
        plan_network(options, (4, 4, 1), 10)


def test_what_a_part_of_a_batch_asked_for_is_begun_with_the_next(place):
    """The workspaces of a batch's parts tell the first workspace what they asked for, also after the first step."""
    blocks, engine = fitting_blocks([Dense(units=9), Dense(units=9)], (9,)), fast(place.backend)
    network = Network(blocks, [place.put(np.eye(9)) for _ in blocks], [place.put(np.zeros(9)) for _ in blocks])
    part, nothing = engine.beside(), ForwardPass([], [], [])
    for _ in range(2):
        begun = begin(engine, network)
        assert Batch(part, network, nothing, network.weights[0], begun=begun).inverses
    assert bool(begun) != place.backend.on_host
