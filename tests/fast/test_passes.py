"""The fast passes equal the plain ones up to rounding, on every place, and threads change no bit of them."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    ACTIVATIONS,
    NAMED,
    batch,
    chains,
    close,
    conv_layers,
    fitting_blocks,
    named_blocks,
    placed,
    random_network,
    rng,
)
from training import fast, pass_of

from arraytp.backend import NUMPY
from arraytp.fast import passes, products
from arraytp.fast.parallel import Buffers, Workspace
from arraytp.model.architectures import plan_network
from arraytp.model.passes import parts_of_batch
from arraytp.model.plain import block_backward
from arraytp.options import Conv, Dense, NetworkOptions, Pool

# Sums of up to 1e4 products in another order: 1e-16 · √1e4 and a margin.
ROUNDING = 1e-12
ON_HOST = SimpleNamespace(put=np.array, get=np.asarray, backend=NUMPY)


def carriers_of(network, seed):
    return [rng(seed, 6, n).standard_normal(w.shape).astype(w.dtype) for n, w in enumerate(network.weights)]


def fast_updates(network, carriers, x, dlogits, engine):
    """Return the forward pass, and BP's updates with these arrays in place of W."""
    pass_ = pass_of(network, x, dlogits, engine)
    updates, ds = [], dlogits
    for at in pass_.down():
        dweight, dbias, ds = at.backward(ds, through=carriers[at.n])
        updates.append((dweight, dbias))
    assert ds is None
    return pass_.forward, updates[::-1]


def check_network(place, blocks, count, seed, tolerance=ROUNDING, dtype="float64", threads=2):
    network, (x, _) = random_network(blocks, seed, dtype), batch(blocks, count, seed, dtype)
    carriers = carriers_of(network, seed)
    dlogits = rng(seed, 7).standard_normal((count, *blocks[-1].next_shape)).astype(dtype)
    forward, updates = fast_updates(
        placed(network, place.put),
        [place.put(carrier) for carrier in carriers],
        place.put(x),
        place.put(dlogits),
        fast(place.backend, threads),
    )
    _, outputs, indices = plain.forward(network, x)
    for own, wanted in zip(forward.outputs, outputs[1:], strict=True):
        close(place.get(own), wanted, tolerance)
    for own, wanted in zip(forward.s, plain.handed_on(network, outputs), strict=True):
        assert own.flags.c_contiguous
        close(place.get(own), wanted, tolerance)
    if dtype == "float64":
        for own, wanted in zip(forward.index, indices, strict=True):
            assert wanted is None or (place.get(own) == wanted).all()
    for own, wanted in zip(updates, plain.updates(network, carriers, x, dlogits), strict=True):
        close(place.get(own[0]), wanted[0], tolerance)
        close(place.get(own[1]), wanted[1], tolerance)


@given(blocks=chains(), count=st.sampled_from([1, 2, 3, 17]), seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_drawn_networks_equal_the_plain_ones(place, blocks, count, seed):
    check_network(place, blocks, count, seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(data=st.data(), count=st.sampled_from([1, 3, 5]), seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_the_input_gradient_of_a_conv_block(place, activation, data, count, seed):
    """Test it for a first block, which no network does; all activations, pools, borders and forms of the product."""
    layer = data.draw(conv_layers((activation,)))
    (block,) = fitting_blocks([layer], tuple(data.draw(st.integers(1, size)) for size in (9, 9, 3)))
    network, (x, _) = random_network((block,), seed), batch((block,), count, seed)
    carrier = carriers_of(network, seed)[0]
    (z,), (_, s), (index,) = plain.forward(network, x)
    ds = rng(seed, 7).standard_normal(s.shape)
    wanted = block_backward(block, ds, z, index, x, carrier)
    pass_ = pass_of(placed(network, place.put), place.put(x), place.put(ds), fast(place.backend))
    gradients = pass_.engine.backward(pass_.at(0), place.put(ds), place.put(carrier), None)
    for mine, reference in zip(gradients, wanted, strict=True):
        close(place.get(mine), reference, ROUNDING)


@pytest.mark.parametrize("name", NAMED)
def test_named_networks_equal_the_plain_ones(place, name):
    check_network(place, named_blocks(name), 3, 0)


@pytest.mark.parametrize(
    ("name", "count"),
    [pytest.param(n, c, marks=[pytest.mark.slow] * ((n, c) == ("vgg", 17))) for n in NAMED for c in (1, 17)],
)
def test_named_networks_equal_the_plain_ones_on_odd_batches(name, count):
    check_network(ON_HOST, named_blocks(name), count, 0)


@pytest.mark.parametrize("name", ["fc-shallow", "conv-imagenet"])
@pytest.mark.parametrize("count", [1, 5])
def test_square_networks_equal_the_plain_ones(name, count):
    """Test these large networks on the host only."""
    check_network(ON_HOST, named_blocks(name, square=True), count, 0)


@given(blocks=chains(auxiliary=True), count=st.sampled_from([1, 3]), seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_networks_with_auxiliary_units_equal_the_plain_ones(place, blocks, count, seed):
    check_network(place, blocks, count, seed)


@pytest.mark.parametrize("name", NAMED)
def test_named_networks_equal_the_plain_ones_in_single_precision(place, name):
    """The tolerance allows for 1e-7 · √(length of sums), and for a unit that rounding moves across a kink."""
    check_network(place, named_blocks(name), 3, 0, 1e-4, "float32")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_network_of_every_activation_equals_the_plain_one(place, activation):
    options = NetworkOptions(name="lenet", activation=activation)
    check_network(place, plan_network(options, (12, 9, 2), 10), 3, 0)


@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("name", NAMED)
def test_the_number_of_threads_changes_no_bit(name, count):
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks, 0, "float32"), batch(blocks, count, 0, "float32")
    carriers = carriers_of(network, 0)
    dlogits = rng(7).standard_normal((count, *blocks[-1].out_shape)).astype("float32")
    results = {}
    for threads in (1, 2, 3):
        forward, updates = fast_updates(network, carriers, x, dlogits, fast(threads=threads))
        results[threads] = [array.tobytes() for array in (forward.logits, *(a for pair in updates for a in pair))]
    assert results[1] == results[2] == results[3]


@pytest.mark.parametrize(("group", "patches", "rows"), [(1, 1, 60), (1, 1, 1), (30_000, 1, 1), (30_000, 14_000, 1)])
def test_slices_and_lanes_of_every_length_add_up(monkeypatch, group, patches, rows):
    """Small limits cut a small batch into many slices, some of them within larger groups; the last ones are shorter."""
    limits = {"GROUP_BYTES": group, "PATCH_BYTES": patches, "SPLIT_BYTES": patches, "GEMM_ROWS": rows}
    for name, limit in limits.items():
        monkeypatch.setattr(products, name, limit)
    blocks = plan_network(NetworkOptions(name="lenet"), (7, 5, 2), 3)
    for count in (1, 2, 7, 13):
        check_network(ON_HOST, blocks, count, count, threads=3)


def test_a_smaller_batch_after_a_larger_one_reads_no_leftovers(place):
    """The last batch of an epoch is smaller, and buffers keep the larger batch's numbers beyond its end."""
    layers = [
        Conv(channels=4, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
        Conv(channels=3, kernel=2, padding="same", stride=2, activation="tanh"),
        Dense(units=4),
    ]
    blocks = fitting_blocks(layers, (7, 6, 2))
    network = random_network(blocks)
    on_place, carriers = placed(network, place.put), carriers_of(network, 0)
    put, engine = [place.put(c) for c in carriers], fast(place.backend, 2)
    for count in (9, 4, 9, 1, 5):
        x, _ = batch(blocks, count, count)
        dlogits = rng(count, 7).standard_normal((count, 4))
        _, updates = fast_updates(on_place, put, place.put(x), place.put(dlogits), engine)
        for own, wanted in zip(updates, plain.updates(network, carriers, x, dlogits), strict=True):
            close(place.get(own[0]), wanted[0], ROUNDING)
            close(place.get(own[1]), wanted[1], ROUNDING)


def test_results_with_different_names_do_not_overwrite_each_other():
    blocks = named_blocks("lenet")
    network, engine = random_network(blocks), fast(threads=1)
    first = engine.forward(network, batch(blocks, 2, 1)[0], "one")
    kept = first.logits.copy()
    engine.forward(network, batch(blocks, 2, 2)[0], "two")
    np.testing.assert_array_equal(first.logits, kept)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 7, 1030), (37, 41, 1030), (1030, 41, 37)])
def test_the_product_is_the_matrix_product(place, rows, inner, columns):
    """Small products are computed in one piece, larger ones cut by columns or by rows."""
    a, b = rng(1).standard_normal((rows, inner)), rng(2).standard_normal((inner, columns))
    out = place.backend.xp.empty((rows, columns))
    passes.product(Workspace(place.backend, 2), place.put(a), place.put(b), out)
    close(place.get(out), a @ b, ROUNDING)


@pytest.mark.parametrize(
    ("layer", "made"),
    [
        (Conv(channels=3, kernel=3), set()),
        (Conv(channels=3, kernel=1, pool=Pool(kernel=2, stride=2)), set()),
        (Conv(channels=3, kernel=3, padding=1), {"border"}),
        (Conv(channels=3, kernel=3, pool=Pool(kernel=3, stride=2, padding=1)), {"border"}),
    ],
)
def test_images_are_copied_into_a_border_only_where_there_is_one(monkeypatch, layer, made):
    network, filled = random_network(fitting_blocks([layer, Dense(units=2)], (8, 8, 2))), set()
    x, ds = (rng(3).standard_normal(shape) for shape in ((4, 8, 8, 2), (4, 2)))
    fill = Buffers.filled

    def filling(self, name, *rest):
        filled.add(name if isinstance(name, str) else name[0])
        return fill(self, name, *rest)

    monkeypatch.setattr(Buffers, "filled", filling)
    batch_ = pass_of(network, x, ds)
    for at in batch_.down():
        ds = at.backward(ds, at.weight)[2]
    assert filled & {"border"} == made


def test_what_a_batch_of_several_parts_has_computed_is_freed_with_it():
    """It must not wait for the garbage collector of cycles, since factors and copies of all weights may be large."""
    network = random_network(fitting_blocks([Dense(units=3), Dense(units=2)], (4,)))
    lead = parts_of_batch([pass_of(network, rng(n).standard_normal((2, 4))) for n in range(3)])
    other, seen = lead.every[2], weakref.ref(lead)
    assert other.every[0] is lead
    assert [each is own for each, own in zip(other.every, lead.every, strict=True)] == [True] * 3
    assert other.once(("name",), id) == id(lead)
    gc.disable()
    try:
        del lead, other
        assert seen() is None
    finally:
        gc.enable()
