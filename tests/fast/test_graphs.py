"""Steps by CUDA graphs against the same steps launched kernel by kernel, and when a part is captured at all."""

import threading
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_ranks import Board, InTurn, on_ranks

from arraytp import ranks as ranks_module
from arraytp.backend import NUMPY, Backend, _pool_that_keeps, get_backend
from arraytp.config import parse_config
from arraytp.data.writer import Description, writing
from arraytp.device_ranks import Nccl
from arraytp.fast.graphs import MOST, Graphs, _Known
from arraytp.fast.parallel import Workspace
from arraytp.ranks import ALONE, Alone, Part, share
from arraytp.rules import RULES, bp
from arraytp.training.build import build_planned
from arraytp.training.plan import plan

SGD = {"name": "sgd", "lr": 1e-3, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 1e-3, "weight_decay": 1e-3}
LENET = {"network": {"name": "lenet"}}
DENSE = {"network": {"blocks": [{"type": "dense", "units": units} for units in (9, 8, 10)]}}
# The weights are nearly orthogonal at first; later, tests halve one, which is then far from orthogonal.
SQUARE = {
    "network": {"blocks": [{"type": "dense", "units": n} for n in (12, 11, 10)], "square": True, "init": "orthogonal"},
    "loss": {"reduction": "sum"},
}
ORTHOGONAL = {**ADAM, "orthogonality": 0.1}
FEEDBACK = {"feedback": {"iterations": 2, "optimizer": SGD}}
STEPS = {
    "bp": {**LENET, "rule": {"name": "bp"}, "optimizer": ADAM, "schedule": {"name": "constant", "warmup_steps": 9}},
    "dfa": {**LENET, "rule": {"name": "dfa"}, "optimizer": SGD, "loss": {"name": "mse"}},
    "sign-symmetry": {**DENSE, "rule": {"name": "sign-symmetry"}, "optimizer": SGD},
    "ldrl": {**LENET, "rule": {"name": "ldrl", **FEEDBACK}, "optimizer": SGD},
    "ldrl, expected": {**LENET, "rule": {"name": "ldrl", "expected": True, **FEEDBACK}, "optimizer": SGD},
    "drl": {**DENSE, "rule": {"name": "drl", **FEEDBACK}, "optimizer": SGD},
    "drl, expected": {**LENET, "rule": {"name": "drl", "expected": True, **FEEDBACK}, "optimizer": SGD},
    "drl, hidden": {**DENSE, "rule": {"name": "drl", "hidden": 7, **FEEDBACK}, "optimizer": SGD},
    "gait-prop": {**SQUARE, "rule": {"name": "gait-prop", "form": "difference"}, "optimizer": ORTHOGONAL},
    "gait-prop, literal": {**SQUARE, "rule": {"name": "gait-prop"}, "optimizer": ADAM, "dtype": "float64"},
    "gait-prop, pseudo": {**LENET, "rule": {"name": "gait-prop", "inverse": "pseudo"}, "optimizer": SGD},
    "ridge-tp": {**DENSE, "rule": {"name": "ridge-tp"}, "optimizer": SGD},
    "gnt": {**LENET, "rule": {"name": "gnt"}, "optimizer": SGD},
    "kolen-pollack": {**DENSE, "rule": {"name": "kolen-pollack", "decay": 0.01}, "optimizer": SGD},
    "kolen-pollack, adam": {**DENSE, "rule": {"name": "kolen-pollack", "decay": 0.01}, "optimizer": ADAM},
    "feedback by adam": {
        **DENSE,
        "rule": {"name": "ldrl", "feedback": {"iterations": 2, "optimizer": ADAM}},
        "optimizer": SGD,
    },
}
ELU = {
    "network": {**SQUARE["network"], "blocks": [{**each, "activation": "elu"} for each in SQUARE["network"]["blocks"]]}
}
OPTIMUM = {"name": "drl", "expected": "optimum", "feedback": {"iterations": 1, "optimizer": SGD}}
NOT_CAPTURED = {
    "drl": ({**DENSE, "rule": OPTIMUM, "optimizer": SGD}, "feedback training"),
    # ELU's range is bounded, so the host checks that what is to be inverted lies in it.
    "gait-prop, literal, elu": ({**STEPS["gait-prop, literal"], **ELU}, "updates"),
}


class Device:
    """What `Graphs` needs of a device; launching a graph computes nothing, but is recorded in `launched`."""

    def __init__(self):
        self.launched, self.capturing, self.refuses = [], False, False
        device = self

        class Stream(nullcontext):
            def __init__(self, non_blocking):
                super().__init__()

            def begin_capture(self):
                device.capturing = True

            def end_capture(self):
                device.capturing = False
                return SimpleNamespace(launch=lambda: device.launched.append(1))

        @contextmanager
        def using_allocator(malloc):
            yield

        self.xp = SimpleNamespace(
            cuda=SimpleNamespace(Stream=Stream, using_allocator=using_allocator), empty=np.empty, full=np.full
        )

    def graph_pool(self, part):
        return SimpleNamespace(malloc=None)


class Located:
    """An array at a given address."""

    def __init__(self, place, shape=(2,)):
        self.data, self.shape = SimpleNamespace(ptr=place), shape


@pytest.fixture
def captured():
    """Graphs on a device, and a part that counts how often it runs."""
    device, workspace, ran = Device(), Workspace(NUMPY), []
    workspace.backend = device
    graphs = Graphs(workspace, True)

    def work():
        ran.append(device.capturing)
        if device.capturing and device.refuses:
            raise RuntimeError("not while captured\nat all")
        return len(ran)

    return device, workspace, graphs, work, ran


def test_a_part_is_run_then_captured_then_launched(captured):
    device, _, graphs, work, ran = captured
    arrays = [Located(1), Located(2)]
    assert [graphs.run("a", arrays, work) for _ in range(4)] == [1, 2, 2, 2]
    assert (ran, len(device.launched)) == ([False, True], 3)


def test_a_part_of_a_part_is_captured_with_it(captured):
    device, workspace, graphs, work, ran = captured

    def whole():
        return workspace.captured("inner", [], work)

    assert [graphs.run("outer", [], whole) for _ in range(3)] == [1, 2, 2]
    assert (ran, len(device.launched)) == ([False, True], 2)


def test_a_part_is_several_graphs_where_ranks_sum(captured):
    """The sum is not captured, but done between the launches of the graphs before and after it."""
    device, workspace, graphs, work, ran = captured

    def whole():
        work()
        workspace.between(lambda: device.launched.append("sum"))
        return work()

    assert [graphs.run("a", [], whole) for _ in range(3)] == [2, 4, 4]
    assert (ran, device.launched) == ([False] * 2 + [True] * 2, ["sum"] + [1, "sum", 1] * 2)


def test_a_capture_that_fails_behind_a_sum_sums_once(captured):
    """A second sum would have no counterpart on the other ranks."""
    device, workspace, graphs, work, ran = captured

    def whole():
        workspace.between(lambda: device.launched.append("sum"))
        return work()

    device.refuses = True
    assert [graphs.run("a", [], whole) for _ in range(3)] == [1, 3, 4]
    assert (ran, device.launched) == ([False, True, False, False], ["sum"] * 3)


def test_other_samples_of_a_batch_need_a_graph_of_their_own(captured):
    """Even with equally many samples, parts of batches of different sizes differ: means are over the whole batch."""
    *_, graphs, work, ran = captured
    for size in (5, 4, 5, 4, 5):
        graphs.run("a", [], work, Part(ALONE, size, 0))
    assert ran == [False, False, True, True]


def test_arrays_elsewhere_and_buffers_that_have_grown_need_a_graph_of_their_own(captured):
    """The old graph would write to memory that is no longer the array's."""
    _, workspace, graphs, work, ran = captured
    for _ in range(3):
        graphs.run("a", [Located(1)], work)
    for other in ([Located(2)], [Located(1, (3,))]):
        graphs.run("a", other, work)
    assert ran == [False, True, False, False]
    workspace.of("other").array("a", (3,), float)
    for _ in range(3):
        graphs.run("a", [Located(1)], work)
    assert ran == [False, True, False, False, False, True]
    for place in range(2 * MOST):
        graphs.run("a", [Located(place)], work)
    assert len(graphs._known) <= MOST


def test_what_cannot_be_captured_runs_as_before_and_is_said_once(captured):
    device, _, graphs, work, ran = captured
    device.refuses = True
    assert [graphs.run("a", [], work) for _ in range(4)] == [1, 3, 4, 5]
    assert ran == [False, True, False, False, False]
    assert not device.launched
    assert graphs.news() == ["a: not captured as a CUDA graph: not while captured"]
    assert graphs.news() == []


def test_what_a_failed_capture_made_is_made_anew(captured):
    """Nothing was written to its arrays, neither numbers nor borders."""
    device, workspace, graphs, _, _ = captured

    def work():
        # While a device captures, launches compute nothing.
        value = np.nan if device.capturing else 1.0
        number = workspace.number("rate", value, float)
        border = workspace.of("a").filled("border", (2,), float, value)
        if device.capturing:
            workspace.scratch.of("a").array("more", (2,), float)[...] = workspace._numbers["rate"] = 1.0
            raise RuntimeError
        return number[0], border.tolist()

    graphs._known["a", None] = _Known(workspace.made)
    assert graphs.run("a", [], work) == (1.0, [1.0, 1.0])
    assert graphs.refused


def experiment(folder, settings, graphs, ranks=ALONE, exact=False):
    """Build an experiment on CuPy."""
    train = {"epochs": 1, "batch_size": 6, "exact": exact}
    data = {"data": {"dataset": str(folder), "normalize": "none"}, "train": train}
    config = parse_config({**settings, **data, "cuda_graphs": graphs}).variants[""]
    return build_planned(plan(config, get_backend("cupy")), ranks=ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of the right shapes."""
    where = tmp_path_factory.mktemp("graphs") / "data"
    with writing(where, Description("blank", (28, 28, 1), tuple("abcdefghij"))) as writer:
        for split in ("train", "test"):
            writer.add(split, np.zeros((9, 28, 28, 1), np.uint8), np.arange(9))
    return where


def batches(sizes, dtype="float32"):
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    images = [cupy.asarray(rng.standard_normal((size, 28, 28, 1)).astype(dtype)) for size in sizes]
    return [(x, cupy.asarray(rng.integers(0, 10, len(x)))) for x in images]


def halved(arrays):
    """Return each array divided by 2, in new memory."""
    return tuple(array / 2 for array in arrays)


def replace_state(state):
    """Halve all arrays of a rule's state, in new memory."""
    for held in (state.weights, state.biases):
        held.update(zip(held, halved(held.values()), strict=True))
    state.moments.update({name: halved(arrays) for name, arrays in state.moments.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_graphs_change_no_bit(folder, name):
    """This holds with a changing rate, smaller batches, scores in between, and arrays that are replaced."""
    numbers, sizes = [], [6] * 4 + [4] * 3 + [6] * 7
    for graphs in (True, False):
        made, scores = experiment(folder, STEPS[name], graphs), []
        for step, (images, labels) in enumerate(batches(sizes, made.config.dtype)):
            scores.append(made.step(images, labels).totals)
            if step == 3:
                scores.append(made.score(*batches([9], made.config.dtype)[0]).totals)
            if step == 8:
                made.network.weights[1] = made.network.weights[1] / 2
            if step == 10:
                made.optimizer_state.moments[:] = map(halved, made.optimizer_state.moments)
            if step == 12:
                replace_state(made.rule_state)
        arrays = [*scores, *made.network.parameters(), *made.rule_state.named().values()]
        numbers.append([array.get() for array in arrays])
        assert made.optimizer_state.step == len(sizes)
        assert not made.graphs.refused
    for with_graphs, without in zip(*numbers, strict=True):
        np.testing.assert_array_equal(with_graphs, without)


class FakeNccl:
    """Stands in for CuPy's module: ranks are threads on one device, and sum on the host once their stream is done."""

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM, NcclError = np.float32, np.float64, 0, RuntimeError

    def __init__(self):
        self.board, self.streams = Board(2), set()

    def get_unique_id(self):
        return 0

    def NcclCommunicator(self, size, identity, rank):
        cupy, ranks = pytest.importorskip("cupy"), InTurn(self.board, rank)

        def all_reduce(send, receive, count, dtype, operation, stream):
            cupy.cuda.runtime.streamSynchronize(stream)
            memory = cupy.cuda.UnownedMemory(send, count * np.dtype(dtype).itemsize, None)
            array = cupy.ndarray(count, dtype, cupy.cuda.MemoryPointer(memory, 0))
            host = array.get()
            ranks.sum(host)
            array.set(host)
            cupy.cuda.get_current_stream().synchronize()
            self.streams.add(stream)

        return SimpleNamespace(allReduce=all_reduce)


@pytest.fixture
def pools_of_ranks(monkeypatch):
    """Give each rank, here a thread, memory pools of its own, as a process would have."""
    pools = defaultdict(pytest.importorskip("cupy").cuda.MemoryPool)
    monkeypatch.setattr(Backend, "graph_pool", lambda self, part: pools[part, threading.get_ident()])


# Of 5 and of 4 images the first rank has 2, of 1 it has none.
SIZES = [5] * 4 + [4] * 4 + [1] * 4 + [5] * 3


def of_rank(folder, name, graphs, ranks, exact=False):
    """Return a rank's numbers, the parts whose capture failed, and those that the graphs know."""
    made, numbers = experiment(folder, {**STEPS[name], "dtype": "float64"}, graphs, ranks, exact), []
    for step, (images, labels) in enumerate(batches(SIZES, "float64")):
        own, size = slice(*share(len(images), ranks.rank, ranks.size)), len(images)
        numbers.append(made.step(images[own], labels[own], size=size).totals)
        if step == 3:
            # A larger batch makes buffers grow.
            (more, of_more), own = batches([19], "float64")[0], slice(*share(19, ranks.rank, ranks.size))
            numbers.append(made.score(more[own], of_more[own], 19).totals)
        if step == 13:
            made.network.weights[1] = made.network.weights[1] / 2
    numbers += [*made.network.parameters(), *made.rule_state.named().values()]
    return [array.get() for array in numbers], made.graphs.refused, made.graphs._known


def each_step(*more):
    """Return every step; most are marked slow, because kernels are compiled for the parts of a batch too."""
    usual = ("bp", "ldrl, expected", "drl, expected", "gait-prop")
    return [pytest.param(name, *more, marks=() if name in usual else pytest.mark.slow) for name in STEPS]


@pytest.mark.gpu
@pytest.mark.usefixtures("pools_of_ranks")
@pytest.mark.parametrize(
    ("name", "sums"),
    [
        *each_step("host"),
        *((name, sums) for name in ("bp", "ldrl, expected") for sums in ("nccl", "nccl, early")),
    ],
)
def test_graphs_of_ranks_change_no_bit(folder, name, sums, monkeypatch):
    """Test also different parts with equally many samples, empty ones, and sums that begin before a part ends."""
    monkeypatch.setattr(ranks_module, "MESSAGE", 1 if sums == "nccl, early" else 1 << 40)

    def work(ranks, graphs, nccl):
        by = ranks if sums == "host" else Nccl(ranks, get_backend("cupy"), nccl)
        return of_rank(folder, name, graphs, by)

    found = []
    for graphs in (True, False):
        nccl = FakeNccl()
        found.append(on_ranks(2, lambda ranks, graphs=graphs, nccl=nccl: work(ranks, graphs, nccl), in_turn=True))
        assert len(nccl.streams) == {"host": 0, "nccl": 1, "nccl, early": 2}[sums]
    wanted, *_ = of_rank(folder, name, False, ALONE)
    for (with_graphs, refused, captured), (without, _, none) in zip(*found, strict=True):
        assert (refused, none) == ({}, {})
        assert any(known.launches for known in captured.values())
        for mine, theirs, one in zip(with_graphs, without, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_allclose(theirs, one, rtol=1e-6, atol=1e-6 * np.abs(one).max())


@pytest.mark.gpu
@pytest.mark.usefixtures("pools_of_ranks")
@pytest.mark.parametrize("name", each_step())
def test_graphs_change_no_bit_of_exact_runs(folder, name):
    """Nor does a bit depend on the number of ranks, although it determines which parts of a batch a graph contains."""
    found = []
    for graphs, ranks in ((True, 1), (False, 1), (True, 2)):
        found += on_ranks(
            ranks, lambda ranks, graphs=graphs: of_rank(folder, name, graphs, ranks, exact=True), in_turn=True
        )
    numbers, refused, captured = zip(*found, strict=True)
    assert refused == ({},) * 4
    assert [any(known.launches for known in each.values()) for each in captured] == [True, False, True, True]
    for first, *others in zip(*numbers, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gait-prop", "gait-prop, pseudo"])
def test_another_choice_of_factors_needs_a_graph_of_its_own(folder, name):
    """Weights change in place from orthogonal to far from it, back and again: buffers and arrays stay the same."""
    near = {"network": {"blocks": [{"type": "dense", "units": 10} for _ in range(3)], "init": "orthogonal"}}
    numbers, settings = [], {**STEPS[name], **({} if name == "gait-prop" else near)}
    for graphs in (True, False):
        made = experiment(folder, settings, graphs)
        for step, (images, labels) in enumerate(batches([6] * 14)):
            made.step(images, labels)
            if step in (4, 9, 11):
                made.network.weights[1][...] *= 4 if step == 9 else 0.25
        numbers.append([array.get() for array in made.network.parameters()])
        assert not made.graphs.refused
    for with_graphs, without in zip(*numbers, strict=True):
        np.testing.assert_array_equal(with_graphs, without)


class Failing:
    """A stream whose captures fail at their end, when all has been recorded and nothing computed."""

    def __init__(self, stream):
        self._stream = stream

    def __enter__(self):
        return self._stream.__enter__()

    def __exit__(self, *error):
        return self._stream.__exit__(*error)

    def begin_capture(self):
        self._stream.begin_capture()

    def end_capture(self):
        self._stream.end_capture()
        raise RuntimeError("as a test wants it")


def _by_kept_arrays(options, state, batch):
    """Yield BP's updates plus what a batch computes once: the regulariser's E, and Σ J."""
    errors = batch.gram_errors.of([0, 1, 2])
    for at, (weight, bias) in zip(batch.down(), bp.RULE.descend(bp.Options(), state, batch), strict=True):
        # The sum is in new memory in every step, until a graph returns it.
        by_errors = weight + errors[at.n].sum()
        yield (by_errors + batch.jacobian_sums[at.n][1].sum() if at.n else by_errors), bias


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("part", "rule", "exact"),
    [
        *((part, "drl", False) for part in (None, "forward", "feedback training", "updates", "optimiser")),
        *((part, "ridge-tp", False) for part in ("E", "condition numbers", "updates")),
        ("forward", "drl", True),
        ("updates", "drl", True),
    ],
)
def test_a_capture_that_fails_changes_no_bit(folder, part, rule, exact):
    """It leaves nothing behind in buffers, in the batch, in work begun before the batch, or in what the part returns.

    Nor does a graph rely on arrays that the batch happened to have computed when the graph was captured.
    """
    numbers, regularised = [], {**SGD, "orthogonality": 0.1, "orthogonality_on": "all-but-first"}
    settings = {**STEPS[rule], "optimizer": regularised}
    for graphs in (True, False):
        made = experiment(folder, settings, graphs, exact=exact)
        if part not in ("E", "condition numbers"):
            made.rule = replace(made.rule, targets=None, local_update=None, updates=_by_kept_arrays)
        if graphs:
            stream, takes = made.graphs._stream, made.graphs.takes

            def fails(name, graphs=made.graphs, stream=stream, takes=takes):
                graphs._stream = Failing(stream) if name == part else stream
                return takes(name)

            made.graphs.takes = fails
        scores = []
        for number, batch in enumerate(batches([6] * 9)):
            if number == 7:
                # Without a graph of the forward pass, no other array would have a new address.
                made.network.weights[1] = made.network.weights[1] / 2
            step = made.forward(*batch)
            made.train_feedback(step)
            if part is None and number < 5:
                assert step.batch.gram_errors.of([1, 2])
                assert step.batch.jacobian_sums
            made.apply(step, made.updates(step))
            scores.append(step.score.totals)
        arrays = [*scores, *made.network.parameters(), *made.rule_state.named().values()]
        numbers.append([array.get() for array in arrays])
        assert list(made.graphs.refused) == ([part] if graphs and part else [])
    for with_graphs, without in zip(*numbers, strict=True):
        np.testing.assert_array_equal(with_graphs, without)


@pytest.mark.gpu
def test_a_pool_of_graphs_gives_nothing_back_where_there_is_no_room(monkeypatch):
    """Existing graphs still write to its free blocks, which CuPy's own pools would return to the device for a retry."""
    cupy = pytest.importorskip("cupy")
    pool = _pool_that_keeps(cupy)
    place = pool.malloc(2**20).ptr

    def refuse(size):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda, "Memory", refuse)
        with pytest.raises(MemoryError, match="4,194,304 bytes: cudaErrorMemoryAllocation"):
            pool.malloc(2**22)
    assert pool.total_bytes() == 2**20
    assert pool.malloc(2**20).ptr == place


@pytest.mark.gpu
@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_rules_that_cannot_be_captured_say_which_part(folder, name):
    config, part = NOT_CAPTURED[name]
    numbers = []
    for graphs in (True, False):
        made = experiment(folder, config, graphs)
        for number, (images, labels) in enumerate(batches([6] * 8, config.get("dtype", "float32"))):
            if number == 6:
                made.network.weights[1] = made.network.weights[1] / 2
            made.step(images, labels)
        numbers.append([array.get() for array in made.network.parameters()])
        if graphs:
            assert [line.partition(":")[0] for line in made.graphs.news()] == [part]
    for with_graphs, without in zip(*numbers, strict=True):
        np.testing.assert_array_equal(with_graphs, without)


# LeNet's blocks with few units, which take as many launches.
POOL = {"kernel": 3, "stride": 2, "padding": 1}
SMALL = {
    "network": {
        "blocks": [
            {"type": "conv", "channels": 3, "kernel": 5, "padding": 2, "activation": "elu", "pool": POOL},
            {"type": "conv", "channels": 4, "kernel": 5, "padding": 2, "activation": "elu", "pool": POOL},
            {"type": "dense", "units": 9, "activation": "elu"},
            {"type": "dense", "units": 10},
        ]
    },
    "optimizer": SGD,
}
# The same for fc-deep.
DEEP = {
    "network": {
        "blocks": [{"type": "dense", "units": 12, "activation": "leaky-relu"}] * 6 + [{"type": "dense", "units": 10}],
        "square": True,
        "init": "orthogonal",
    },
    "optimizer": {**ORTHOGONAL, "epsilon_form": "keras"},
    "loss": {"reduction": "sum"},
}


def small(name, **options):
    """Return the settings of a rule on the small network."""
    return {**SMALL, "rule": {"name": name, **options}}


# By row of the table in docs/performance/device.md.
COUNTED = {
    "bp, fa, kolen-pollack": [small("bp"), small("fa"), small("kolen-pollack")],
    "dfa": [small("dfa")],
    "sign-symmetry": [small("sign-symmetry")],
    "weight-mirror": [small("weight-mirror")],
    "alignment": [small("alignment", **FEEDBACK)],
    "dtp": [small("dtp", **FEEDBACK)],
    "tp, ldrl": [small("tp", **FEEDBACK), small("ldrl", **FEEDBACK)],
    "ldrl, feedback by Adam": [small("ldrl", feedback={"iterations": 2, "optimizer": ADAM})],
    "ldrl, `expected`": [small("ldrl", expected=True, **FEEDBACK)],
    "ldrl-parallel": [small("ldrl-parallel", **FEEDBACK)],
    "drl": [small("drl", **FEEDBACK)],
    "drl, `expected`": [small("drl", expected=True, **FEEDBACK)],
    "drl, `expected: optimum`": [{**small("drl", expected="optimum", **FEEDBACK), **LENET}],
    "gnt": [small("gnt")],
    "gait-prop, `inverse: pseudo`; ridge-tp": [
        {**LENET, "optimizer": SGD, "rule": {"name": "gait-prop", "inverse": "pseudo"}},
        {**LENET, "optimizer": SGD, "rule": {"name": "ridge-tp"}},
    ],
    "gait-prop, difference, fc-deep": [{**DEEP, "rule": {"name": "gait-prop", "form": "difference"}}],
    "gait-prop, literal, fc-deep": [{**DEEP, "rule": {"name": "gait-prop"}, "dtype": "float64"}],
    **{
        f"{name}, two ranks{by}": [small(rule, **options)]
        for name, rule, options in (
            ("bp", "bp", {}),
            ("ldrl", "ldrl", FEEDBACK),
            ("ldrl, `expected`", "ldrl", {"expected": True, **FEEDBACK}),
        )
        for by in ("", " by NCCL")
    },
    "bp, `train.exact`": [small("bp")],
    "ldrl, `train.exact`": [small("ldrl", **FEEDBACK)],
}
LAUNCHED = ("kernels", "blas", "solver", "memset", "copies")


class OneOfTwo(Alone):
    """One of two ranks, without the other."""

    size = 2

    def __init__(self, sums_on_device):
        self.sums_on_device = sums_on_device


def documented():
    """Return the numbers of each row of the table of launches; those without graphs may be one per setting."""
    page = Path(__file__).parents[2] / "docs/performance/device.md"
    _, _, table = page.read_text(encoding="utf-8").partition("## What each rule launches")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    return {label: [[int(each) for each in cell.split("; ")] for cell in cells] for label, *cells in rows}


def test_every_rule_has_a_row_in_the_table_of_launches():
    assert documented().keys() == COUNTED.keys()
    assert {each["rule"]["name"] for settings in COUNTED.values() for each in settings} == RULES.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("row", COUNTED)
def test_launches_and_waits_of_a_step_are_those_documented(folder, row):
    """Count the second step without graphs and the seventh with graphs: at most those, and not far fewer."""
    cpu_cuda = pytest.importorskip("cpu_cuda", reason="counts launches")
    without, (captured,), (others,), (waits,) = documented()[row]
    limits = without if len(without) > 1 else without * len(COUNTED[row])
    ranks = OneOfTwo("NCCL" in row) if "two ranks" in row else ALONE
    for launches, settings in zip(limits, COUNTED[row], strict=True):
        for graphs in (False, True):
            made = experiment(folder, settings, graphs, ranks, "exact" in row)
            for images, labels in batches([8] * (7 if graphs else 2), made.config.dtype):
                cpu_cuda.counts()
                made.step(images, labels, size=8 * ranks.size)
                counted = cpu_cuda.summary()
            found = sum(counted.get(kind, 0) for kind in LAUNCHED)
            assert counted.get("waits", 0) <= waits
            assert counted.get("cudaGraphLaunch", 0) == (captured if graphs else 0)
            most = others if graphs else launches
            assert 0.8 * most - 1 <= found <= most


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gait-prop", "gait-prop, pseudo", "ridge-tp"])
def test_the_host_waits_once_for_factors_and_only_after_the_forward_pass(folder, name):
    """What the host reads was launched before the forward pass, which the device computes meanwhile."""
    cpu_cuda = pytest.importorskip("cpu_cuda")
    made = experiment(folder, STEPS[name], True)
    for images, labels in batches([6] * 5):
        cpu_cuda.counts()
        step = made.forward(images, labels)
        before = cpu_cuda.summary()
        made.apply(step, made.updates(step))
        after = cpu_cuda.summary()
    assert before["solver"] >= len(made.network) - 1
    assert (before.get("waits", 0), after["waits"]) == (0, 1)
    assert (after["cudaGraphLaunch"], after.get("solver", 0)) == (2, 0)
