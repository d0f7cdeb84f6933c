"""Sums in closed forms of feedback, N and M of Theorem 4.2 and sums of Jacobians: fast against plain, in slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ACTIVATIONS, NAMED, batch, chains, close, placed, random_network
from training import fast, pass_of, plain

from arraytp.fast import jacobians, overlaps
from arraytp.model.architectures import plan_network
from arraytp.options import NetworkOptions

ROUNDING = 1e-12


def check(place, blocks, count, seed=0):
    """Compare both kinds of sums, and Gauss-Newton targets, of every block with feedback."""
    network, (x, _) = random_network(blocks, seed), batch(blocks, count, seed)
    one = pass_of(placed(network, place.put), place.put(x), engine=fast(place.backend))
    reference = pass_of(network, x, engine=plain())
    changes, wanted = (each.gauss_newton(1.0) for each in (one, reference))
    for n in range(1, len(blocks)):
        close(place.get(changes[n]), wanted[n], 10 * ROUNDING)
        for own, exact in zip(one.jacobian_sums[n], reference.jacobian_sums[n], strict=True):
            close(place.get(own), exact, ROUNDING)
        for unpool in ("overwrite", "accumulate"):
            sums, exact = (each.at(n).jacobian_overlap(unpool) for each in (one, reference))
            for own, other in zip(sums, exact, strict=True):
                close(place.get(own), other, ROUNDING)


@given(blocks=chains(largest=7), count=st.sampled_from([1, 2, 17]), seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_sums_on_drawn_networks_equal_the_plain_ones(place, blocks, count, seed):
    check(place, blocks, count, seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_with_every_activation_equal_the_plain_ones(place, activation):
    check(place, plan_network(NetworkOptions(name="lenet", activation=activation), *NAMED["lenet"]), 3)


@pytest.mark.parametrize("count", [1, 9])
def test_slices_of_one_sample_add_up(place, monkeypatch, count):
    """With several slices per lane, the second must be added to the first, not replace it."""
    for name in ("PATCH_BYTES", "DENSE_BYTES", "DEVICE_BYTES"):
        monkeypatch.setattr(jacobians, name, 1)
    monkeypatch.setattr(overlaps, "SLICE_ELEMENTS", 1)
    check(place, plan_network(NetworkOptions(name="lenet"), (7, 5, 2), 3), count)


def test_slices_of_one_sample_behind_a_dense_block_s_of_several_add_up(place, monkeypatch):
    monkeypatch.setattr(jacobians, "PATCH_BYTES", 1)
    # A device has a single limit: one sample of the convolution exceeds it, ten of a dense block do not.
    monkeypatch.setattr(jacobians, "DEVICE_BYTES", 1 << 16)
    check(place, plan_network(NetworkOptions(name="lenet"), (7, 5, 2), 3), 13)


def test_threads_change_no_bit():
    blocks = plan_network(NetworkOptions(name="lenet"), (7, 5, 2), 3)
    network, (x, _) = random_network(blocks, 0, "float32"), batch(blocks, 9, 0, "float32")
    results = set()
    for threads in (1, 2, 3):
        one = pass_of(network, x, engine=fast(threads=threads))
        sums = [a for n in (1, 2, 3) for a in (*one.jacobian_sums[n], *one.at(n).jacobian_overlap("overwrite"))]
        results.add(b"".join(np.ascontiguousarray(array).tobytes() for array in sums))
    assert len(results) == 1
