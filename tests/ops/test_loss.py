"""Losses and ranks against loops, finite differences, closed forms, large logits, ties and NaN."""

import math

import gradients
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import rng

from arraytp.ops.loss import LOSSES, cross_entropy_backward, cross_entropy_forward, label_rank

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
    """What target propagation with β = 1 makes of it: t^N = s^N − ∂L/∂s^N = y."""
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
    assert place.get(label_rank(place.put(logits), place.put(np.array([0, 0, 0])))).tolist() == [3, 3, 0]
