"""Losses and ranks against loops, finite differences, closed forms, large logits, ties and NaN."""

import math

import gradients
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import rng

from arraytp.ops.loss import LOSSES, cross_entropy_backward, cross_entropy_forward, label_rank, loss_and_score

SIZES = {"count": st.integers(1, 6), "classes": st.integers(1, 7), "seed": st.integers(0, 999)}
REDUCTIONS = pytest.mark.parametrize("reduction", ["sum", "mean"])
EVERY_LOSS = pytest.mark.parametrize(("name", "smoothing"), [(name, e) for name in LOSSES for e in (0.0, 0.2)])


def drawn(count, classes, seed):
    return 3 * rng(seed).standard_normal((count, classes)), rng(seed, 1).integers(0, classes, count)


@REDUCTIONS
@given(**SIZES)
@settings(max_examples=15)
def test_loss_and_gradient_are_the_loops(place, reduction, count, classes, seed):
    logits, labels = drawn(count, classes, seed)
    loss, cache = cross_entropy_forward(place.put(logits), place.put(labels), reduction)
    assert loss.shape == ()
    np.testing.assert_allclose(float(loss), naive.cross_entropy(logits, labels, reduction), rtol=1e-12, atol=1e-14)
    wanted = naive.cross_entropy_gradient(logits, labels, reduction)
    np.testing.assert_allclose(place.get(cross_entropy_backward(cache, reduction)), wanted, rtol=1e-11, atol=1e-15)


@EVERY_LOSS
@REDUCTIONS
@given(**SIZES)
@settings(max_examples=10)
def test_the_gradient_is_the_finite_difference(name, smoothing, reduction, count, classes, seed):
    logits, labels = drawn(count, classes, seed)
    forward, backward = LOSSES[name]
    _, cache = forward(logits, labels, reduction, smoothing)
    gradients.check(
        lambda logits: (float(forward(logits, labels, reduction, smoothing)[0]), b""),
        logits, backward(cache, reduction), rng(seed, 2),
    )  # fmt: skip


@EVERY_LOSS
@REDUCTIONS
def test_every_loss_is_its_definition_on_every_kind_of_array(place, name, smoothing, reduction):
    logits, labels = drawn(5, 4, 1)
    y = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total, gradient = (
        ((logits - y) ** 2).sum() / 2 if name == "mse" else -(y * np.log(p)).sum(),
        (logits if name == "mse" else p) - y,
    )
    share = 1 if reduction == "sum" else 1 / 5
    forward, backward = LOSSES[name]
    loss, cache = forward(place.put(logits), place.put(labels), reduction, smoothing)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(share * total, rel=1e-13)
    np.testing.assert_allclose(place.get(backward(cache, reduction)), share * gradient, rtol=1e-12, atol=1e-15)


def test_the_smoothed_cross_entropy_is_least_at_the_smoothed_labels():
    """Its minimum, at softmax = y, is the entropy of y; without smoothing there is none."""
    y = 0.9 * np.eye(4)[[2]] + 0.1 / 4
    loss, cache = cross_entropy_forward(np.log(y), np.array([2]), "sum", 0.1)
    assert float(loss) == pytest.approx(-(y * np.log(y)).sum(), rel=1e-14)
    np.testing.assert_allclose(cross_entropy_backward(cache, "sum"), 0, atol=1e-15)


def test_a_whole_step_down_the_squared_error_has_the_one_hot_label_as_target():
    """This is the output target of target propagation with β = 1: t^N = s^N − ∂L/∂s^N = y."""
    logits, labels = drawn(5, 4, 3)
    forward, backward = LOSSES["mse"]
    _, cache = forward(logits, labels, "sum", 0.0)
    np.testing.assert_allclose(logits - backward(cache, "sum"), np.eye(4)[labels], atol=1e-15)


def test_equal_logits_cost_the_logarithm_of_the_number_of_classes():
    loss, _ = cross_entropy_forward(np.full((5, 10), 3.0), np.arange(5), "mean")
    assert float(loss) == pytest.approx(math.log(10), rel=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_logits_neither_overflow_nor_lose_the_loss(place, dtype):
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [-3e4, -2e4, -4e4]], dtype)
    loss, cache = cross_entropy_forward(place.put(logits), place.put(np.array([0, 0, 1])), "sum")
    assert float(loss) == 2e4
    dlogits = cross_entropy_backward(cache, "sum")
    assert dlogits.dtype == loss.dtype == dtype
    np.testing.assert_array_equal(place.get(dlogits), [[0, 0, 0], [-1, 1, 0], [0, 0, 0]])


def test_a_sum_is_the_batch_size_times_the_mean():
    logits, labels = drawn(7, 4, 0)
    found = {r: cross_entropy_forward(logits, labels, r) for r in ("sum", "mean")}
    assert float(found["sum"][0]) == pytest.approx(7 * float(found["mean"][0]), rel=1e-14)
    gradient = {r: cross_entropy_backward(found[r][1], r) for r in found}
    np.testing.assert_allclose(gradient["sum"], 7 * gradient["mean"], rtol=1e-13)


@EVERY_LOSS
def test_the_backward_pass_leaves_its_cache_alone(name, smoothing):
    logits, labels = drawn(3, 4, 0)
    forward, backward = LOSSES[name]
    _, cache = forward(logits, labels, "mean", smoothing)
    first = backward(cache, "mean")
    np.testing.assert_array_equal(backward(cache, "mean"), first)


@given(**SIZES)
@settings(max_examples=20)
def test_the_rank_is_the_place_in_a_stable_sort(place, count, classes, seed):
    """Few different values, so that ties are common; the lower class index comes first."""
    logits, labels = rng(seed).integers(0, 3, (count, classes)).astype(float), drawn(count, classes, seed)[1]
    order = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    wanted = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    found = label_rank(place.put(logits), place.put(labels))
    assert place.get(found).tolist() == wanted


def test_equal_logits_rank_by_class_index(place):
    found = label_rank(place.put(np.zeros((3, 3))), place.put(np.array([0, 1, 2])))
    assert place.get(found).tolist() == [0, 1, 2]


def test_a_nan_among_the_logits_is_never_right(place):
    logits = np.array([[1.0, np.nan, 0], [np.nan, 0, 1], [3, 1, 2]])
    labels = place.put(np.array([0, 0, 0]))
    rank = place.get(label_rank(place.put(logits), labels))
    assert rank[2] == 0
    assert min(rank[:2]) > 1000
    # With fewer than five classes, a label without NaN in its row is always among the first five.
    assert place.get(loss_and_score("mse", place.put(logits), labels, "mean").totals)[1:].tolist() == [1, 1]


SCORED = [(1, 1), (1, 3), (7, 10), (16, 32), (31, 33), (33, 1025)]


def scored(place, name, logits, labels, *settings):
    """Put host arrays on the place, and return loss, gradient and totals as host arrays."""
    loss, dlogits, totals = loss_and_score(name, place.put(logits), place.put(labels), *settings)
    assert loss.shape == ()
    assert (loss.dtype, dlogits.dtype, totals.dtype) == (logits.dtype, logits.dtype, "float64")
    return np.array(float(loss)), place.get(dlogits), place.get(totals)


def scored_by_definition(name, logits, labels, reduction, smoothing):
    """Return loss, gradient and totals by the array code on the host."""
    forward, backward = LOSSES[name]
    loss, cache = forward(logits, labels, reduction, smoothing)
    rank = label_rank(logits, labels)
    summed = loss * len(labels) if reduction == "mean" else loss
    return loss, backward(cache, reduction), np.array([summed, (rank < 1).sum(), (rank < 5).sum()], np.float64)


@EVERY_LOSS
@REDUCTIONS
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 3e-6)])
def test_loss_gradient_and_score_at_once_are_each_of_them(place, name, smoothing, reduction, dtype, tolerance):
    """Test logits with exponentials of 0 or infinity, and with many ties; results match to the bit except on CuPy."""
    for count, classes in SCORED:
        logits, labels = drawn(count, classes, 4)
        for each in (logits.astype(dtype) for logits in (np.rint(logits), logits - 2000, 1000 * logits)):
            wanted = scored_by_definition(name, each, labels, reduction, smoothing)
            found = scored(place, name, each, labels, reduction, smoothing)
            bound = tolerance if place.name == "cupy" else 0
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other, rtol=bound, atol=bound)
            np.testing.assert_array_equal(found[2][1:], wanted[2][1:])


@EVERY_LOSS
def test_the_loss_of_a_part_is_its_share_in_the_mean(place, name, smoothing):
    logits, labels = drawn(8, 4, 5)
    parts = [
        scored(place, name, logits[part], labels[part], "mean", smoothing, count / 8, 8)
        for part, count in ((slice(0, 3), 3), (slice(3, 8), 5), (slice(0, 1), 0))
    ]
    wanted = scored_by_definition(name, logits, labels, "mean", smoothing)
    for k in (0, 2):
        assert sum(part[k].flat[0] for part in parts) == pytest.approx(wanted[k].flat[0], rel=1e-13)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts[:2]]), wanted[1], rtol=1e-12, atol=1e-15)
    assert not parts[2][1].any()
    summed = scored(place, name, logits, labels, "sum", smoothing, 0.5, 16)
    np.testing.assert_allclose(summed[1], 8 * wanted[1], rtol=1e-12, atol=1e-14)


@EVERY_LOSS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_a_number_reaches_loss_and_gradient_and_is_never_right(place, name, smoothing, bad):
    """Test the label's logit and another one, among the first 32 classes and beyond."""
    for count, classes, label in ((3, 4, 0), (3, 4, 2), (5, 40, 35), (5, 40, 0)):
        logits, labels = drawn(count, classes, 6)
        # Without the bad logit, the label would rank first.
        labels[1], logits[1, label] = label, 50
        logits[1, 35 % classes] = bad
        wanted = scored_by_definition(name, logits, labels, "mean", smoothing)
        found = scored(place, name, logits, labels, "mean", smoothing)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)
        assert bad < 0 or not np.isfinite(found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_of_no_class_makes_a_devices_loss_nan(name, label):
    """Labels on a device are not checked beforehand, so the loss of an invalid one must be NaN."""
    cupy = pytest.importorskip("cupy")
    logits, labels = drawn(3, 7, 7)
    labels[1] = label
    loss, _, totals = loss_and_score(name, cupy.asarray(logits), cupy.asarray(labels), "mean")
    assert np.isnan(loss.get())
    assert np.isnan(totals.get()[0])
    ranks = label_rank(logits[::2], labels[::2])
    assert totals.get()[1:].tolist() == [(ranks < 1).sum(), (ranks < 5).sum()]


@pytest.mark.gpu
def test_loss_gradient_and_score_are_one_launch():
    cupy, cpu_cuda = pytest.importorskip("cupy"), pytest.importorskip("cpu_cuda")
    logits, labels = map(cupy.asarray, drawn(7, 10, 0))
    loss_and_score("cross-entropy", logits, labels, "mean", 0.1)
    cpu_cuda.counts()
    loss_and_score("cross-entropy", logits, labels, "mean", 0.1)
    assert {kind: n for kind, n in cpu_cuda.summary().items() if kind in ("kernels", "memset", "copies", "waits")} == {
        "kernels": 1
    }
