"""The fast iterations and modules against the plain ones on the same noise, in double precision."""

from types import SimpleNamespace

import numpy as np
import pytest
from feedback_blocks import at_block, made
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ACTIVATIONS, NAMED, batch, chains, close, named_blocks, placed, random_network, rng
from training import fast, pass_of, plain

from arraytp.backend import NUMPY
from arraytp.fast import feedback_training, products
from arraytp.model.architectures import plan_network
from arraytp.model.feedback import feedback_forward
from arraytp.model.passes import NoiseAndProducts
from arraytp.model.shapes import plan_blocks
from arraytp.ops.noise import EPSILON, ETA, gaussian
from arraytp.options import Conv, Dense, NetworkOptions, Pool
from arraytp.rules import RULES
from arraytp.rules.protocol import State

ROUNDING = 1e-12
SIGMA, KEY = 0.3, {"seed": 7, "number": 3}
UNPOOL = ("overwrite", "accumulate")
DENSE = [Dense(units=11, activation="elu"), Dense(units=8, activation="tanh"), Dense(units=4)]
# The gradient of its second convolution is summed by lanes.
NARROW = [*[Conv(channels=2, kernel=3, padding=1, activation="elu")] * 2, Dense(units=4)]
# Many windows of its pools hold nothing but zeros.
RELU = [*[Conv(channels=4, kernel=3, padding=1, activation="relu", pool=Pool(kernel=2, stride=2))] * 2, Dense(units=4)]
ORDERS = {
    "lenet": named_blocks("lenet"),
    "dense": plan_blocks(DENSE, (10,)),
    "narrow": plan_blocks(NARROW, (7, 5, 2)),
    "relu": plan_blocks(RELU, (9, 8, 2)),
}
ON_HOST = SimpleNamespace(put=np.array, get=np.asarray, backend=NUMPY)


def omega_of(block, seed=0):
    generator = rng(seed, 5)
    weight = generator.standard_normal(block.weight_shape) * float(np.prod(block.weight_shape[:-1])) ** -0.5
    return weight, 0.3 * generator.standard_normal(block.in_shape[-1])


def gradients(rule, at, omega, count, unpool):
    """Return a function that does one of the first `count` iterations of a rule, each with the same ω."""
    rule, state = RULES[rule], State({at.n: omega[0]}, {at.n: omega[1]})
    iterate = rule.feedback.begin(rule.options(unpool=unpool), at, SIGMA, count)
    return lambda k, wanted=True: iterate(state, k, wanted)


def check_blocks(place, blocks, count, unpool, seed=0, iterations=3):
    """Compare both losses' gradients of every block with feedback, over some iterations."""
    network, (x, _) = random_network(blocks, seed), batch(blocks, count, seed)
    on_place, host = placed(network, place.put), Noises(place)
    batch_ = pass_of(on_place, place.put(x), engine=fast(place.backend), **KEY)
    reference = pass_of(network, x, engine=host, **KEY)
    for n in range(1, len(blocks)):
        omega = omega_of(blocks[n], seed)
        put = [place.put(part) for part in omega]
        for rule in ("ldrl", "dtp"):
            iterate = gradients(rule, batch_.at(n), put, iterations, unpool)
            wanted = gradients(rule, reference.at(n), omega, iterations, unpool)
            for k in range(iterations):
                last = k == iterations - 1
                done, exact = iterate(k, last), wanted(k)
                assert done.gradients.keys() == exact.gradients.keys()
                for part, gradient in done.gradients.items():
                    close(place.get(gradient), exact.gradients[part], ROUNDING)
                for name, noise in done.noises.items():
                    np.testing.assert_array_equal(place.get(noise), exact.noises[name])
                # L-DRL's loss costs a pass over ω: only the last iteration's is computed.
                assert (done.loss is None) == (rule == "ldrl" and not last)
                if done.loss is not None:
                    scale = 1e-12 * np.abs(exact.gradients["weight"]).sum()
                    assert float(done.loss) == pytest.approx(float(exact.loss), rel=1e-10, abs=scale)


class Noises(type(plain())):
    """The plain engine on the host, with the noise that another place draws."""

    def __init__(self, place):
        super().__init__(NUMPY)
        self.place = place

    def iterations(self, at, unpool, training):
        """Return the plain iterations with the place's noise."""
        result, (seed, number) = super().iterations(at, unpool, training), KEY.values()

        def noise(k):
            kinds = {"epsilon": (EPSILON, result.s)} | ({"eta": (ETA, at.output)} if training.output_noise else {})
            empty = self.place.backend.xp.empty
            return {name: self.place.get(gaussian(empty(like.shape), SIGMA, 0, seed, number, at.n, k, kind))
                    for name, (kind, like) in kinds.items()}  # fmt: skip

        result.noise = noise
        return result


@pytest.mark.parametrize(
    ("name", "unpool"), [*((name, "overwrite") for name in NAMED), ("lenet", "accumulate"), ("vgg", "accumulate")]
)
def test_iterations_on_named_networks_equal_the_plain_ones(place, name, unpool):
    if place.name == "read-only":
        pytest.skip("as numpy: what writes to its arguments does so on small networks, too")
    check_blocks(place, named_blocks(name), 3, unpool, iterations=2)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_iterations_with_every_activation_equal_the_plain_ones(place, activation, unpool):
    """Where ReLU leaves a window nothing but zeros, the first one counts as the maximum."""
    options = NetworkOptions(name="lenet", activation=activation)
    check_blocks(place, plan_network(options, *NAMED["lenet"]), 3, unpool)


@pytest.mark.parametrize("unpool", UNPOOL)
@given(blocks=chains(largest=7), count=st.sampled_from([1, 2, 17, 33]), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_iterations_on_drawn_networks_equal_the_plain_ones(place, blocks, count, seed, unpool):
    """Batches of 17 and 33 have a chunk of noise with a single sample."""
    check_blocks(place, blocks, count, unpool, seed)


@pytest.mark.parametrize("unpool", UNPOOL)
@pytest.mark.parametrize("count", [1, 5, 33])
def test_threads_change_no_bit(unpool, count):
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, count)
    results = {}
    for threads in (1, 2, 3):
        batch_ = pass_of(network, x, engine=fast(threads=threads), **KEY)
        results[threads] = []
        for n in range(1, len(blocks)):
            for rule in ("ldrl", "dtp"):
                iterate = gradients(rule, batch_.at(n), omega_of(blocks[n]), 2, unpool)
                for k in range(2):
                    done = iterate(k)
                    results[threads] += [a.tobytes() for a in (*done.gradients.values(), done.loss)]
    assert results[1] == results[2] == results[3]


def test_iterations_may_come_in_any_order():
    """They may also be repeated: iterations share noise buffers, and none may take another's noise for its own."""
    blocks = named_blocks("lenet")
    network, (x, _) = random_network(blocks), batch(blocks, 4)
    batch_ = pass_of(network, x, **KEY)
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [3, 0, 2, 1], [2, 0, 2, 1, 3, 1, 3, 0]):
        iterate = gradients("ldrl", batch_.at(1), omega_of(blocks[1]), 4, "overwrite")
        by_number = {k: iterate(k).gradients["weight"].copy() for k in order}
        results.append([by_number[k].tobytes() for k in range(4)])
    assert all(result == results[0] for result in results)
    assert len(set(results[0])) == 4


@pytest.mark.parametrize("limit", [1, 3000, 1 << 20])
def test_slices_and_lanes_of_every_length_add_up(monkeypatch, limit):
    """Small limits cut a small batch into many slices, whether products are summed by lanes or gathered."""
    monkeypatch.setattr(products, "ITERATION_BYTES", limit)
    for columns in (0, 1 << 20):
        monkeypatch.setattr(feedback_training, "POSITIONS_PER_COLUMN", columns)
        blocks = plan_network(NetworkOptions(name="lenet"), (7, 5, 2), 3)
        for count in (1, 2, 7):
            check_blocks(ON_HOST, blocks, count, "overwrite", count)


def shared_factors(at, omega, bias, epsilon, eta):
    """An iteration that uses x and d again, in another order, and holds two results of each primitive."""
    first = at.a(*at.F(epsilon))
    second = at.a(*at.F(epsilon + at.s))
    at.add(epsilon, second)
    at.subtract(at.s, first)
    r = at.transposed(omega, first)
    at.add(r, first)
    q = at.transposed(omega, second)
    at.add(q, second)
    at.add_bias(q)
    return at.square(r) + at.square(q)


def held_results(at, omega, bias, epsilon, eta):
    """An iteration that holds two results of `transposed` before the first is added."""
    first, second = at.a(*at.F(epsilon)), at.a(*at.F(epsilon + at.s))
    r, q = at.transposed(omega, first), at.transposed(omega, second)
    at.add(r, first)
    at.add(q, second)
    at.add(epsilon, first)
    at.subtract(at.s, first)
    at.add_bias(q)
    return at.square(r) + at.square(q)


def unused_result(at, omega, bias, epsilon, eta):
    """An iteration whose result of `transposed` is in no product, but is read after the last product."""
    first = at.a(*at.F(epsilon))
    r = at.transposed(omega, first)
    for x in (epsilon, at.s):
        at.add(x, first)
        at.subtract(x + epsilon, first)
    at.add_bias(r)
    return at.square(r)


def forward_between(at, omega, bias, epsilon, eta):
    """An iteration with a forward pass between two products with the same d."""
    first = at.a(*at.F(epsilon))
    at.add(epsilon, first)
    second = at.a(*at.F(epsilon + at.s))
    at.subtract(at.s, first)
    r = at.transposed(omega, second)
    at.add(r, first)
    at.add(r, second)
    at.add_bias(r)
    return at.square(r)


def two_biases(at, omega, bias, epsilon, eta):
    """An iteration that adds to G's bias twice."""
    at.add_bias(epsilon)
    return forward_between(at, omega, bias, epsilon, eta)


def no_bias(at, omega, bias, epsilon, eta):
    """An iteration that adds nothing to G's bias: the sum must be 0, not that of an earlier iteration."""
    first = at.a(*at.F(epsilon))
    r = at.transposed(omega, first)
    for x in (epsilon, at.s, r):
        at.add(x, first)
    at.subtract(r + at.s, first)
    return at.square(r)


def other_input(at, omega, bias, epsilon, eta):
    """An iteration that unpools something other than F's output to F's maxima."""
    first = at.a(at.s_next + 1, at.F(epsilon)[1])
    r = at.transposed(omega, first)
    for x in (epsilon, at.s, r):
        at.add(x, first)
    at.subtract(r + at.s, first)
    return at.square(r)


ITERATES = [shared_factors, held_results, unused_result, forward_between, two_biases, no_bias, other_input]


@pytest.mark.parametrize("iterate", ITERATES)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ORDERS)
def test_primitives_may_be_used_in_other_orders_than_the_built_in_rules_do(place, name, count, iterate):
    """Results of two calls must stay separate, and an x that is used again must give its own rows."""
    blocks = ORDERS[name]
    network, (x, _) = random_network(blocks), batch(blocks, count)
    needed = NoiseAndProducts(SIGMA, 1, products=4, output_noise=False)
    sums = {}
    for engine in (fast(place.backend), Noises(place)):
        on_place = isinstance(engine, Noises)
        put = np.asarray if on_place else place.put
        batch_ = pass_of(placed(network, put), put(x), engine=engine, **KEY)
        for n in range(1, len(blocks)):
            omega, bias = (put(part) for part in omega_of(blocks[n]))
            iterations = batch_.at(n).iterations("overwrite", needed)
            iterations.sums(unused_result, 0, omega, bias)
            result = iterations.sums(iterate, 0, omega, bias)
            get = np.asarray if on_place else place.get
            sums.setdefault(n, []).append(
                (get(result.weight).copy(), get(result.bias).copy(), np.array(float(result.returned)))
            )
    for fast_sums, plain_sums in sums.values():
        for own, wanted in zip(fast_sums, plain_sums, strict=True):
            close(own, wanted, ROUNDING)


@pytest.mark.parametrize("unpool", UNPOOL)
@given(blocks=chains(largest=7), count=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_targets_are_the_modules(place, blocks, count, seed, unpool):
    """Compare with the paper's literal formulas: δ^n is G(s + δ) − G(s), and a target is G(t)."""
    network, (x, _) = random_network(blocks, seed), batch(blocks, count, seed)
    batch_ = pass_of(placed(network, place.put), place.put(x), engine=fast(place.backend))
    for n in range(1, len(blocks)):
        at, block = batch_.at(n), blocks[n]
        omega, s = omega_of(block, seed), place.get(at.output)
        index = None if at.index is None else place.get(at.index)
        delta = 0.2 * rng(seed, n).standard_normal(s.shape)
        put = [place.put(part) for part in omega]
        g = [feedback_forward(block, *omega, t, index, unpool) for t in (s + delta, s)]
        difference = at.feedback_difference(put[0], place.put(delta), unpool)
        assert difference.shape == at.s.shape
        scale = max(np.abs(g[0]).max(), 1.0)
        np.testing.assert_allclose(place.get(difference).reshape(g[0].shape), g[0] - g[1], rtol=0, atol=1e-12 * scale)
        target = at.feedback(*put, place.put(s + delta), unpool)
        assert target.shape == at.s.shape
        close(place.get(target).reshape(g[0].shape), g[0], ROUNDING)


@pytest.mark.parametrize("layer", ["dense", "pooled"])
@pytest.mark.parametrize(("announced", "added"), [(2, 1), (1, 2)])
def test_an_iterate_that_adds_other_products_than_announced_is_refused(layer, announced, added):
    """With too few, factors of the previous iteration would remain in the sum."""
    block, theta, omega, s = made(layer, "linear", 40)

    def iterate(at, omega, bias, epsilon, eta):
        d = at.a(at.s_next + 0, at.index)
        for _ in range(added):
            at.add(epsilon, d)
        return at.square(d)

    shared = at_block(block, theta, s, fast()).iterations("overwrite", NoiseAndProducts(0.1, 1, announced, False))
    with pytest.raises(ValueError, match=f"iterate added .* products .* announced {announced}"):
        shared.sums(iterate, 0, omega[0])
