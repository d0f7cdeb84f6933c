"""Steps after the first one reuse what the first one made."""

import tracemalloc

import numpy as np
import pytest
from samples import NAMED, batch, named_blocks, random_network
from training import trainer

from arraytp.backend import NUMPY
from arraytp.fast import passes as fused
from arraytp.model.architectures import plan_network
from arraytp.options import Adam, NetworkOptions

RULES = ("bp", "fa", "dfa")


def prepared(blocks, count, rule, threads):
    x, labels = batch(blocks, count, 0, "float32")
    options = {} if rule == "bp" else {"feedback_init": "kaiming-uniform"}
    runner = trainer(random_network(blocks, 0, "float32"), rule, Adam(lr=1e-3), NUMPY, threads, **options)
    return runner, x, labels


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMED)
def test_the_second_step_makes_no_new_buffer(name, rule):
    """On one thread: with more, a helper makes its own scratch when it first takes a task of a kind."""
    runner, x, labels = prepared(named_blocks(name), 5, rule, 1)
    runner.step(x, labels)
    held = runner.workspace.nbytes()
    runner.step(x, labels)
    runner.step(x[:2], labels[:2])
    assert runner.workspace.nbytes() == held


@pytest.mark.parametrize("rule", RULES)
def test_threads_share_the_buffers_of_results(rule):
    held = {}
    for threads in (1, 3):
        runner, x, labels = prepared(named_blocks("lenet"), 5, rule, threads)
        runner.step(x, labels)
        held[threads] = runner.workspace.shared.nbytes()
    assert held[1] == held[3]


@pytest.mark.parametrize("rule", RULES)
def test_no_array_of_a_batch_is_allocated_in_the_steady_state(rule, monkeypatch):
    """Slices of one sample each, so that what is allocated per slice is told apart from what is per batch."""
    for name in ("HOST_GROUP_BYTES", "HOST_PATCH_BYTES", "HOST_SPLIT_BYTES", "GEMM_ROWS"):
        monkeypatch.setattr(fused, name, 1)
    blocks = plan_network(NetworkOptions(name="lenet"), (28, 28, 1), 10)
    # One thread: how far the temporaries of two happen to overlap would differ from run to run.
    runner, x, labels = prepared(blocks, 64, rule, 1)
    for _ in range(2):
        runner.step(x, labels)
    tracemalloc.start()
    try:
        runner.step(x, labels)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        runner.step(x, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    smallest = min(len(x) * int(np.prod(block.out_shape)) * x.itemsize for block in blocks if block.kind == "conv")
    assert peak - before < smallest / 2
