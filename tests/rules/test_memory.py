"""Steps after the first reuse the buffers that the first allocated; a rule writes only where it may."""

import tracemalloc

import numpy as np
import pytest
from samples import NAMED, batch, fitting_blocks, named_blocks, random_network
from training import trainer

from arraytp.backend import NUMPY
from arraytp.fast import engine, inverse, jacobians, overlaps, products
from arraytp.model.architectures import square
from arraytp.model.initialise import make_network
from arraytp.options import SGD, Adam, Conv, Dense, FeedbackTraining, Pool
from arraytp.rules import RULES

TRAINED = {"feedback": FeedbackTraining(iterations=(2, 1, 1), optimizer=SGD(lr=1e-4, momentum=0.9))}
CASES = {
    "bp": ("bp", {}),
    "fa": ("fa", {}),
    "dfa": ("dfa", {}),
    "sign-symmetry": ("sign-symmetry", {}),
    "sign-symmetry batch": ("sign-symmetry", {"magnitude": "batch"}),
    "kolen-pollack": ("kolen-pollack", {}),
    "weight-mirror": ("weight-mirror", TRAINED),
    "alignment sa": ("alignment", TRAINED),
    "alignment ia": ("alignment", TRAINED | {"loss": "ia"}),
    "gait-prop literal": ("gait-prop", {}),
    "gait-prop vanilla": ("gait-prop", {"normalise": False, "rescale_updates": False}),
    "gait-prop difference": ("gait-prop", {"form": "difference"}),
    "gait-prop difference not rescaled": ("gait-prop", {"form": "difference", "rescale_updates": False}),
    "tp": ("tp", TRAINED),
    "dtp": ("dtp", TRAINED),
    "dtp accumulate": ("dtp", TRAINED | {"unpool": "accumulate"}),
    "ldrl": ("ldrl", TRAINED),
    "ldrl output noise": ("ldrl", TRAINED | {"output_noise": "expected"}),
    "ldrl accumulate": ("ldrl", TRAINED | {"unpool": "accumulate"}),
    "ldrl expected": ("ldrl", TRAINED | {"expected": True}),
    "ldrl-parallel": ("ldrl-parallel", TRAINED | {"samples": 2}),
    "drl": ("drl", TRAINED),
    "drl expected": ("drl", TRAINED | {"expected": True}),
    "drl optimum": ("drl", TRAINED | {"expected": "optimum"}),
}
FEEDBACK_INIT = {"feedback_init": "kaiming-uniform"}
POOLED = [
    Conv(channels=8, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=8, kernel=3, padding=1, activation="elu", pool=Pool(kernel=2, stride=2)),
    Dense(units=16, activation="tanh"),
    Dense(units=10),
]
INVERTIBLE = [
    Conv(channels=4, kernel=3, padding="same", activation="leaky-relu"),
    Conv(channels=4, kernel=3, stride=2, padding="same", activation="leaky-relu"),
    Dense(units=20, activation="leaky-relu"),
    Dense(units=10),
]


def case_of(case, shape, dtype="float32", threads=1, optimizer=None):
    """Return a trainer of the case on a network that its rule takes."""
    rule, options = CASES[case]
    if "feedback_init" in RULES[rule].options.__dataclass_fields__:
        options = FEEDBACK_INIT | options
    if rule == "gait-prop":
        # In float32, rounding drowns literal targets, which does not matter here.
        blocks = fitting_blocks(square(INVERTIBLE, fitting_blocks(INVERTIBLE, shape)), shape)
        network = make_network(blocks, "orthogonal", 0, dtype)
    else:
        network = random_network(fitting_blocks(POOLED, shape), 0, dtype)
    return trainer(network, rule, optimizer or Adam(lr=1e-4), NUMPY, threads, **options)


@pytest.mark.parametrize("name", NAMED)
def test_the_second_step_makes_no_new_buffer_of_a_named_network(name):
    """Use one thread, since each helper thread allocates its own scratch when it first runs a kind of task."""
    blocks = named_blocks(name)
    x, labels = batch(blocks, 5, 0, "float32")
    runner = trainer(random_network(blocks, 0, "float32"), "fa", Adam(lr=1e-3), **FEEDBACK_INIT)
    check_buffers(runner, x, labels)


@pytest.mark.parametrize("case", CASES)
def test_the_second_step_makes_no_new_buffer(case):
    runner = case_of(case, (12, 10, 3))
    check_buffers(runner, *batch(runner.network.blocks, 5, 0, "float32"))


def check_buffers(runner, x, labels):
    runner.step(x, labels)
    held = runner.workspace.nbytes()
    runner.step(x, labels)
    runner.step(x[:2], labels[:2])
    assert runner.workspace.nbytes() == held


@pytest.mark.parametrize("case", CASES)
def test_threads_share_the_buffers_of_results(case):
    held = {}
    for threads in (1, 3):
        runner = case_of(case, (12, 10, 3), threads=threads)
        runner.step(*batch(runner.network.blocks, 5, 0, "float32"))
        held[threads] = runner.workspace.shared.nbytes()
    assert held[1] == held[3]


@pytest.mark.parametrize("case", CASES)
def test_no_array_of_a_batch_is_allocated_in_the_steady_state(case, monkeypatch):
    """Cut slices of one sample each, to tell arrays allocated per slice from arrays of a whole batch."""
    for name in ("GROUP_BYTES", "PATCH_BYTES", "SPLIT_BYTES", "GEMM_ROWS", "ITERATION_BYTES"):
        monkeypatch.setattr(products, name, 1)
    monkeypatch.setattr(jacobians, "PATCH_BYTES", 1)
    monkeypatch.setattr(overlaps, "SLICE_ELEMENTS", 1)
    for module in (engine, inverse):
        monkeypatch.setattr(module, "SLICES", 128)
    # On one thread, since how much the temporaries of two threads overlap differs from run to run.
    runner = case_of(case, (28, 28, 2))
    # DRL's closed form has temporaries of Q's size, as large as arrays of 128 samples, so the batch must be larger.
    x, labels = batch(runner.network.blocks, 512 if case in ("drl expected", "drl optimum") else 128, 0, "float32")
    runner.step(x, labels)
    tracemalloc.start()
    try:
        runner.step(x, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sizes = [int(np.prod(block.out_shape)) for block in runner.network.blocks if block.kind == "conv"]
    assert peak < len(x) * min(sizes) * x.itemsize / 2


@pytest.mark.parametrize("case", CASES)
def test_a_rule_writes_neither_to_the_network_nor_to_the_batch_nor_in_propose_to_its_state(case):
    """Feedback training may write ω and its moments, targets and updates may not, and none of them may write θ."""
    runner = case_of(case, (9, 8, 2), "float64")
    x, labels = batch(runner.network.blocks, 4)
    _, one = runner.forward(x, labels)
    forward = [array for arrays in (one.forward.s, one.forward.outputs, one.forward.index) for array in arrays]
    fixed = [*runner.network.parameters(), one.dlogits, *(array for array in forward if array is not None)]
    kept = [array.copy() for array in fixed]
    runner.train_feedback(one)
    state = list(runner.state.named().values())
    kept_state = [array.copy() for array in state]
    runner.rule.propose(runner.options, runner.state, one)
    if runner.rule.targets is not None:
        list(runner.rule.targets(runner.options, runner.state, one))
    for array, before in zip([*fixed, *state], [*kept, *kept_state], strict=True):
        np.testing.assert_array_equal(array, before)
