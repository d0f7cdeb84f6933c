"""A step on several ranks equals the step on one to 1e-12, in double precision.

There are 90 images in batches of 11, so that the last batch has 2, and on more than 2 ranks some have none of them.
"""

import copy
import functools
import json
import threading
from contextlib import closing

import h5py
import numpy as np
import pytest
from fake_ranks import on_ranks

from arraytp import ranks as ranks_module
from arraytp.commands import bench
from arraytp.commands.together import check_ranks, failing_together
from arraytp.config import parse_config
from arraytp.data.writer import Description, writing
from arraytp.errors import IllConditionedError, Interrupted, NonFiniteError, RunError, UserError
from arraytp.fast import dealing, factors, inverse, orthogonality, products
from arraytp.ranks import ALONE, agreed, share
from arraytp.signals import StopRequest
from arraytp.training.build import build_planned
from arraytp.training.loop import Run
from arraytp.training.plan import plan
from arraytp.training.study import run_study

POOL = {"kernel": 3, "stride": 2, "padding": 1}
POOLED = {
    "blocks": [
        {"type": "conv", "channels": 6, "kernel": 5, "padding": 2, "activation": "elu", "pool": POOL},
        {"type": "conv", "channels": 8, "kernel": 5, "padding": 2, "activation": "elu", "pool": POOL},
        {"type": "dense", "units": 20, "activation": "elu"},
        {"type": "dense", "units": 6},
    ]
}
SQUARE = {
    "blocks": [
        {"type": "conv", "channels": 3, "kernel": 3, "stride": 2, "padding": "same", "activation": "leaky-relu"},
        {"type": "conv", "channels": 4, "kernel": 3, "stride": 2, "padding": "same", "activation": "leaky-relu"},
        {"type": "dense", "units": 12, "activation": "leaky-relu"},
        {"type": "dense", "units": 6},
    ],
    "square": True,
    "init": "orthogonal",
}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
FEEDBACK = {"feedback": {"iterations": [2, 1, 2], "sigma": 0.2, "optimizer": {**SGD, "lr": 1e-3}}}
ADAM = {"feedback": {"iterations": 2, "sigma": 0.2, "optimizer": {"name": "adam", "lr": 1e-3}}}
RULES = {
    "bp": {"name": "bp"},
    "fa": {"name": "fa"},
    "dfa": {"name": "dfa"},
    "sign-symmetry": {"name": "sign-symmetry", "magnitude": "batch"},
    "kolen-pollack": {"name": "kolen-pollack", "decay": 0.1},
    "weight-mirror": {"name": "weight-mirror", **FEEDBACK},
    "alignment sa": {"name": "alignment", **ADAM},
    "alignment ia": {"name": "alignment", "loss": "ia", **FEEDBACK},
    "gait-prop literal": {"name": "gait-prop", "eta": 0.01},
    "gait-prop difference": {"name": "gait-prop", "form": "difference", "rescale_updates": False},
    "gait-prop pseudo": {"name": "gait-prop", "form": "difference", "inverse": "pseudo"},
    "tp": {"name": "tp", **FEEDBACK},
    "dtp overwrite": {"name": "dtp", **FEEDBACK},
    "dtp accumulate": {"name": "dtp", "unpool": "accumulate", "divide_by_beta": True, **FEEDBACK},
    "ldrl overwrite": {"name": "ldrl", **FEEDBACK},
    "ldrl output noise": {"name": "ldrl", "output_noise": "expected", **FEEDBACK},
    "ldrl accumulate": {"name": "ldrl", "unpool": "accumulate", **ADAM},
    "ldrl expected": {"name": "ldrl", "expected": True, **FEEDBACK},
    "ldrl expected adam": {"name": "ldrl", "expected": True, "unpool": "accumulate", **ADAM},
    "ldrl-parallel": {"name": "ldrl-parallel", "samples": 3, **FEEDBACK},
    "gnt": {"name": "gnt"},
    "ridge-tp": {"name": "ridge-tp"},
    "drl": {"name": "drl", **FEEDBACK},
    "drl expected": {"name": "drl", "expected": True, **FEEDBACK},
    "drl optimum": {"name": "drl", "expected": "optimum", **FEEDBACK},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "data"
    generator = np.random.default_rng(5)
    with writing(folder, Description("tiny", (8, 7, 2), tuple(f"class {n}" for n in range(6)))) as writer:
        for split, count in (("train", 90), ("test", 30)):
            images = generator.integers(0, 256, (count, 8, 7, 2), dtype=np.uint8)
            writer.add(split, images, generator.integers(0, 6, count))
    return folder


def planned(dataset, rule, **settings):
    square = rule.startswith("gait-prop") and "pseudo" not in rule
    tree = {
        "name": "short",
        "dtype": "float64",
        "data": {"dataset": str(dataset), "flip": 0.5, "crop_padding": 1},
        "network": SQUARE if square else POOLED,
        "rule": RULES[rule],
        "loss": {"reduction": "sum" if rule == "gait-prop literal" else "mean"},
        "optimizer": {**SGD, "lr": 1e-3} | ({"orthogonality": 0.1, "orthogonality_every": 2} if square else {}),
        "train": {"epochs": 1, "batch_size": 11, "eval_batch_size": 28},
    }
    return plan(parse_config(tree | settings).variants[""])


def numbers_of(planned, ranks, plain, first=6):
    """Train from batch `first` to the end of an epoch; return all numbers that a run would write."""
    experiment, found = build_planned(planned, plain, ranks), []
    with closing(experiment.train_loader.batches(0, first)) as batches:
        for size, (images, labels) in zip(experiment.train_loader.sizes(first), batches, strict=True):
            step = experiment.forward(images, labels, size)
            losses = experiment.train_feedback(step)
            updates = experiment.updates(step)
            compared = experiment.compare(step, updates)
            found += [array.copy() for pair in updates for array in pair]
            found += [np.array([[1 + each.angle_deg, 1 + each.distance] for each in compared])]
            found += [np.array([loss for loss in losses if loss is not None], float), step.score.totals.copy()]
            found += [weight.copy() for weight in experiment.rule_state.named().values()]
            experiment.apply(step, updates)
    found += [score.totals for score in experiment.evaluate()]
    return [*found, *experiment.network.parameters()]


@functools.cache
def of_one_rank(dataset, rule, plain):
    return numbers_of(planned(dataset, rule), ALONE, plain)


@pytest.mark.parametrize("rule", ["bp", "dtp overwrite"])
def test_updates_that_are_summed_while_earlier_blocks_are_computed_are_the_same(dataset, monkeypatch, rule):
    """Sums begin block by block, most of them before all blocks are computed, and have the bits of one message."""
    one = on_ranks(2, lambda ranks: numbers_of(planned(dataset, rule), ranks, False))

    def begun_block_by_block(ranks):
        numbers, begun, begin = [], [], ranks.begin_sum
        ranks.begin_sum = lambda buffer: begun.append(buffer.size) or begin(buffer)
        numbers = numbers_of(planned(dataset, rule), ranks, False)
        return numbers, begun

    monkeypatch.setattr(ranks_module, "MESSAGE", 500)
    for (found, begun), wanted in zip(on_ranks(2, begun_block_by_block), one, strict=True):
        assert len(begun) > 3
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("size", "plain"), [(2, False), (5, False), (3, True)])
@pytest.mark.parametrize("rule", RULES)
def test_every_number_of_a_step_is_that_of_one_rank(dataset, rule, size, plain):
    """Updates, feedback weights, losses, counts, angles, evaluation, the weights after three steps."""
    wanted = of_one_rank(dataset, rule, plain)
    for found in on_ranks(size, lambda ranks: numbers_of(planned(dataset, rule), ranks, plain)):
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max(initial=1e-30))


@pytest.mark.parametrize(("rule", "size"), [*((rule, 2) for rule in RULES), ("fa", 8), ("ldrl output noise", 4)])
def test_exact_ranks_have_the_same_bits(dataset, rule, size):
    """Each of 8 parts is computed alone, and all are added in a fixed order, even those without a sample."""
    exact = planned(dataset, rule, train={"epochs": 1, "batch_size": 11, "eval_batch_size": 28, "exact": True})
    wanted = numbers_of(exact, ALONE, False, first=7)
    for found in on_ranks(size, lambda ranks: numbers_of(exact, ranks, False, first=7)):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(numbers_of(planned(dataset, rule), ALONE, False, first=7), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max(initial=1e-30))


TOGETHER = ["bp", "fa", "gait-prop literal", "gait-prop difference", "gait-prop pseudo"]


def dense(dataset, rule, activation="tanh", batch=11, **settings):
    """Return the plan of a run that computes a batch's parts at once; a block with many columns is cut into tiles."""
    units = [{"type": "dense", "units": count, "activation": activation} for count in (40, 520, 30)]
    if "gait-prop" in rule:
        units = [{"type": "dense", "units": 24, "activation": "leaky-relu"}] * 2
    square = rule in ("gait-prop literal", "gait-prop difference")
    network = {"blocks": [*units, {"type": "dense", "units": 6}], "square": square, "init": "orthogonal"}
    train = {"epochs": 1, "batch_size": batch, "eval_batch_size": 28, "exact": True}
    return planned(dataset, rule, network=network, train=train, **settings)


@pytest.mark.parametrize(("size", "batch"), [(2, 11), (4, 45), (8, 11), (8, 45)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", TOGETHER)
def test_parts_that_are_computed_at_once_have_the_bits_of_each_alone(dataset, monkeypatch, rule, dtype, size, batch):
    """One rank computes all 8 parts at once, 8 ranks one each; of 11 samples most parts have one, of 2 some none."""
    exact = dense(dataset, rule, batch=batch, dtype=dtype)
    first = 7 if batch == 11 else 0
    wanted = numbers_of(exact, ALONE, False, first)
    for found in on_ranks(size, lambda ranks: numbers_of(exact, ranks, False, first)):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    monkeypatch.setattr(products, "rows_are_as_alone", lambda *given: False)
    for mine, theirs in zip(numbers_of(exact, ALONE, False, first), wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("rule", "batch"), [("bp", 9), ("fa", 12)])
@pytest.mark.parametrize("units", [(3,), (10, 2), (3, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_of_narrow_blocks_have_the_same_bits(dataset, units, rule, batch, dtype):
    """Their products have so few numbers that a trial with random ones may agree by chance."""
    blocks = [{"type": "dense", "units": count, "activation": "leaky-relu"} for count in units]
    train = {"epochs": 1, "batch_size": batch, "eval_batch_size": 28, "exact": True}
    exact = planned(
        dataset, rule, network={"blocks": [*blocks, {"type": "dense", "units": 6}]}, train=train, dtype=dtype
    )
    wanted = numbers_of(exact, ALONE, False, first=90 // batch - 2)
    for found in on_ranks(4, lambda ranks: numbers_of(exact, ranks, False, first=90 // batch - 2)):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("rule", ["weight-mirror", "alignment sa", "alignment ia"])
def test_exact_ranks_have_the_same_bits_on_dense_blocks_where_fa_trains_its_feedback(dataset, rule):
    """The feedback's gradients are scaled part by part, so parts are not computed at once."""
    exact = dense(dataset, rule, batch=45)
    wanted = numbers_of(exact, ALONE, False, first=0)
    for size in (2, 8):
        for found in on_ranks(size, lambda ranks: numbers_of(exact, ranks, False, first=0)):
            for mine, theirs in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("rule", "forms"), [("gait-prop difference", "first_rows"), ("gait-prop pseudo", "transposed_inverse")]
)
def test_parts_that_are_computed_alone_form_an_inverse_once(dataset, monkeypatch, rule, forms):
    """It is that of the second convolution; for dense blocks, parts of one or two samples solve instead."""
    formed, form = [], getattr(inverse, forms)
    monkeypatch.setattr(inverse, forms, lambda *given: formed.append(1) or form(*given))
    train = {"epochs": 1, "batch_size": 11, "eval_batch_size": 28, "exact": True}
    experiment = build_planned(planned(dataset, rule, train=train))
    with closing(experiment.train_loader.batches(0)) as batches:
        step = experiment.forward(*next(batches))
    experiment.updates(step)
    assert len(formed) == 1


def test_an_inverse_that_parts_share_stays_when_the_next_is_formed(dataset):
    """Two convolutions form their inverses in the same memory; a second call must still get the first one's."""
    blocks = [SQUARE["blocks"][0], HALVED, HALVED | {"channels": 8}, SQUARE["blocks"][-1]]
    train = {"epochs": 1, "batch_size": 11, "eval_batch_size": 28, "exact": True}
    network = {"blocks": blocks, "init": "orthogonal"}
    experiment = build_planned(planned(dataset, "gait-prop pseudo", network=network, train=train))
    with closing(experiment.train_loader.batches(0)) as batches:
        step = experiment.forward(*next(batches))
    wanted = [array.copy() for pair in experiment.updates(step) for array in pair]
    again = [array for pair in experiment.updates(step) for array in pair]
    for mine, theirs in zip(again, wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# W has 12 rows, and a sample 4 positions: in the literal form, of 3 ranks that share 11 samples, those with 4 have
# more than 12 rows to solve for and form W⁻¹; the rank with 3 solves.
HALVED = {"type": "conv", "channels": 4, "kernel": 2, "stride": 2, "activation": "leaky-relu"}
INVERTED = SQUARE | {"blocks": [SQUARE["blocks"][0], HALVED, *SQUARE["blocks"][2:]]}
REGULARISED = {"optimizer": {**SGD, "orthogonality": 0.1, "orthogonality_on": "all-but-first"}}
DEALT = {
    "Cholesky": ("gait-prop literal", {"network": INVERTED}),
    "LU": ("gait-prop difference", {"network": INVERTED | {"init": "xavier-normal"}}),
    "pseudo": ("gait-prop pseudo", REGULARISED),
    "pseudo, near": ("gait-prop pseudo", {"network": POOLED | {"init": "orthogonal"}}),
    "ridge": ("ridge-tp", REGULARISED),
    "regulariser": ("bp", REGULARISED),
}


@pytest.fixture
def always_dealt(monkeypatch):
    """Make ranks deal out even the small matrices of these networks, E and the regulariser in parts."""
    monkeypatch.setattr(dealing, "OPERATIONS_PER_NUMBER", 0)
    monkeypatch.setattr(orthogonality, "PART", 5)


@pytest.mark.usefixtures("always_dealt")
@pytest.mark.parametrize(("size", "exact"), [(3, False), (2, True), (4, True)])
@pytest.mark.parametrize("case", DEALT)
def test_what_depends_on_the_weights_alone_is_the_same_where_ranks_deal_it_out(dataset, case, size, exact):
    rule, settings = DEALT[case]
    train = {"epochs": 1, "batch_size": 11, "eval_batch_size": 28, "exact": exact}
    of_case = planned(dataset, rule, train=train, **settings)

    def dealt(ranks):
        numbers = numbers_of(of_case, ranks, False)
        return numbers, ranks.exchanges

    wanted, (first, exchanges), *others = numbers_of(of_case, ALONE, False), *on_ranks(size, dealt)
    assert exchanges >= 3
    for mine, theirs in zip(first, wanted, strict=True):
        atol = 0 if exact else 1e-12 * np.abs(theirs).max(initial=1e-30)
        np.testing.assert_allclose(mine, theirs, rtol=0 if exact else 1e-12, atol=atol)
    for other, _ in others:
        for mine, theirs in zip(other, first, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.usefixtures("always_dealt")
@pytest.mark.parametrize("rule", ["gait-prop difference", "gait-prop pseudo"])
def test_ranks_whose_processors_round_differently_factorise_alike(dataset, monkeypatch, rule):
    """Otherwise, at the threshold, some would deal out Cholesky factors and others LU factors, which are larger."""
    own = threading.local()
    monkeypatch.setattr(factors, "excess_norm", lambda e: np.nextafter(e.dtype.type(0.8), e.dtype.type(own.side)))

    def work(ranks):
        own.side = ranks.rank % 2
        return numbers_of(planned(dataset, rule), ranks, False)

    own.side = 0
    wanted = numbers_of(planned(dataset, rule), ALONE, False)
    for found in on_ranks(3, work):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max(initial=1e-30))


@pytest.mark.usefixtures("always_dealt")
def test_ranks_that_deal_out_refuse_a_singular_matrix_together(dataset):
    def refused(ranks):
        experiment = build_planned(planned(dataset, "gait-prop difference"), ranks=ranks)
        experiment.network.weights[2][...] = 1
        with closing(experiment.train_loader.batches(0)) as batches:
            step = experiment.forward(*next(batches), 11)
        with pytest.raises(IllConditionedError, match=r"block 2 .*cannot be inverted") as error:
            experiment.updates(step)
        assert ranks.exchanges > 0
        return str(error.value)

    assert len(set(on_ranks(3, refused))) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_exact_ranks_have_the_same_bits_in_single_precision(dataset, size):
    """Scores are in double precision, and summed in one buffer with the updates."""
    train = {"epochs": 1, "batch_size": 11, "eval_batch_size": 28, "exact": True}
    exact = planned(dataset, "bp", train=train, dtype="float32")
    wanted = numbers_of(exact, ALONE, False)
    for found in on_ranks(size, lambda ranks: numbers_of(exact, ranks, False)):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("rule", "sums"), [("bp", 1), ("ldrl expected", 2), ("drl expected", 2), ("dtp overwrite", 6)])
def test_a_step_sums_as_rarely_as_it_can(dataset, rule, sums):
    """One sum for updates, loss and stop; with closed forms one more, with noise one per block and iteration (5)."""

    def count(ranks):
        experiment = build_planned(planned(dataset, rule), ranks=ranks)
        with closing(experiment.train_loader.batches(0)) as batches:
            experiment.step(*next(batches), size=11)
        return ranks.sums

    assert on_ranks(2, count) == [sums, sums]


def test_bench_tells_what_share_of_a_step_sums_take(dataset, monkeypatch):
    monkeypatch.setattr(bench, "PEAK_SIZE", 8)
    planned_once = planned(dataset, "dtp overwrite")
    found = on_ranks(2, lambda ranks: bench.measure(planned_once, 2, ranks))
    for figures in found:
        assert figures["ranks"] == 2
        assert figures["sums"] == found[0]["sums"]
        assert figures["sums"]["per_step"] == 6
        assert figures["sums"]["share"] > 0
        assert "of it sums" in bench._table("run", figures)
    steps = [figures["milliseconds"]["step"] for figures in found]
    mean = figures["sums"]["milliseconds"] / figures["sums"]["share"]
    assert (1 - 1e-9) * min(steps) <= mean <= (1 + 1e-9) * max(steps)
    alone = bench.measure(planned_once, 1)
    assert alone["sums"] == {"milliseconds": 0, "share": 0, "per_step": 0}
    assert "of it sums" not in bench._table("run", alone)


def test_a_stop_that_one_rank_wants_is_known_to_all(dataset):
    def agreed(ranks):
        experiment = build_planned(planned(dataset, "bp"), ranks=ranks)
        with closing(experiment.train_loader.batches(0)) as batches:
            step = experiment.forward(*next(batches), 11)
        found = []
        for stop in (lambda: False, lambda: ranks.rank == 2):
            experiment.updates(step, stop)
            found.append(experiment.stop_agreed)
            experiment.agree_to_stop(stop)
            found.append(experiment.stop_agreed)
        return found

    assert on_ranks(3, agreed) == [[False, False, True, True]] * 3


@pytest.mark.parametrize("exact", [False, True])
def test_a_stop_is_known_to_all_though_its_rank_has_no_sample(dataset, exact):
    """A single image goes to the last of four ranks; in an evaluation, every batch may have just one."""

    def agreed(ranks):
        experiment = build_planned(
            planned(dataset, "bp", train={"epochs": 1, "batch_size": 11, "exact": exact}), ranks=ranks
        )
        with closing(experiment.train_loader.batches(0)) as batches:
            images, labels = next(batches)
        own = slice(0, 1 if ranks.rank == 3 else 0)
        found = []
        for stop in (lambda: False, lambda: ranks.rank == 0):
            score = experiment.score(images[own], labels[own], 1, stop)
            found.append((experiment.stop_agreed, score.images))
            experiment.updates(experiment.forward(images[own], labels[own], 1), stop)
            found.append((experiment.stop_agreed, 1))
        return found

    assert on_ranks(4, agreed) == [[(False, 1), (False, 1), (True, 1), (True, 1)]] * 4


class Stop:
    """Stand-in for `StopRequest`: requested on the last rank alone, from the `after`th look on, counted from 0."""

    def __init__(self, ranks, after) -> None:
        self.left, self.signal = after if ranks.rank == ranks.size - 1 else np.inf, 0

    @property
    def requested(self) -> bool:
        self.left -= 1
        self.signal = 10 if self.left < 0 else 0
        return self.left < 0

    def at_once(self, work):
        return work()


def trained(dataset, folder, ranks, after=np.inf, resume=False):
    """Train a run to its end and return the folder's numbers on rank 0, or until the last rank is told to stop."""
    folder.mkdir(exist_ok=True)
    run = Run(
        build_planned(planned(dataset, "ldrl overwrite", compare={"every": 3}), False, ranks), folder, "run", True
    )
    run.resume() if resume else run.start()
    if not np.isinf(after):
        with pytest.raises(Interrupted) as stopped:
            run.train(Stop(ranks, after))
        assert stopped.value.signal_number == 10
        return []
    run.train(Stop(ranks, after))
    if ranks.rank:
        return []
    with h5py.File(folder / "checkpoint.h5") as file:
        arrays = [file[f"{part}/{n}/weight"][()] for part in ("network", "rule/feedback") for n in (1, 3)]
    tables = [
        np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1) for name in ("metrics", "angles", "feedback")
    ]
    tables[0] = tables[0][:, 2:]
    return [*arrays, *tables]


@pytest.mark.parametrize(("size", "then", "after"), [(3, 1, 0), (3, 1, 4), (2, 3, 9), (1, 2, 4), (2, 3, 11)])
def test_a_run_that_one_rank_was_told_to_stop_goes_on_with_any_number(dataset, tmp_path, size, then, after):
    """Stops come in the first evaluation, in steps and in the last evaluation; checkpoints fit any number of ranks."""
    wanted = trained(dataset, tmp_path / "undisturbed", ALONE)
    on_ranks(size, lambda ranks: trained(dataset, tmp_path / "run", ranks, after))
    assert not (tmp_path / "run/summary.json").exists()
    found, *_ = on_ranks(then, lambda ranks: trained(dataset, tmp_path / "run", ranks, resume=True))
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert json.loads((tmp_path / "run/summary.json").read_text())["ranks"] == then


def test_a_mistake_that_one_rank_notices_is_everyones():
    """Otherwise, the others would wait for that rank for ever."""

    def work(ranks):
        def look():
            if ranks.rank == 1:
                raise UserError("no such file")
            return ranks.rank

        with pytest.raises(UserError, match=r"^rank 1: no such file$"):
            agreed(ranks, look)
        return agreed(ranks, lambda: ranks.rank)

    assert on_ranks(3, work) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (UserError("train-0 cannot be read"), UserError, "train-0 cannot be read"),
        (NonFiniteError("run 1: not finite at step 2"), RunError, "not finite at step 2"),
        (KeyError("x"), RunError, r"KeyError\('x'\)"),
    ],
)
@pytest.mark.parametrize(("failing", "where"), [([1], "rank 1: "), ([0], ""), ([1, 2], "rank 1: "), ([0, 1, 2], "")])
def test_a_rank_that_fails_ends_the_run_of_all(dataset, capsys, error, raised, text, failing, where):
    """The others wait for its sum in a step, or for it at the end of the run; then all begin the next run."""

    def work(ranks):
        def train(run, fails):
            with failing_together(ranks, run):
                experiment = build_planned(planned(dataset, "bp"), ranks=ranks)
                with closing(experiment.train_loader.batches(0, 7)) as batches:
                    for size, (images, labels) in zip(experiment.train_loader.sizes(7), batches, strict=True):
                        if experiment.optimizer_state.step == fails and ranks.rank in failing:
                            raise copy.copy(error)
                        experiment.step(images, labels, size=size)
                if fails == 2 and ranks.rank in failing:
                    raise copy.copy(error)
            return [array.copy() for array in experiment.network.parameters()]

        for fails in (1, 2):
            with pytest.raises(raised, match=f"^run 1: {where}{text}$"):
                train("run 1", fails)
        return train("run 2", None)

    first, *others = on_ranks(3, work)
    wanted = numbers_of(planned(dataset, "bp"), ALONE, False, first=7)[-len(first) :]
    for found in (first, *others):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    assert capsys.readouterr().err.count("KeyError: 'x'") == (2 if isinstance(error, KeyError) else 0)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, "optimizer.lr is 0.05 there and 0.1 here"),
        ({"train": {"epochs": 2, "batch_size": 11}}, "train.epochs is 1 there and 2 here"),
        ({}, "other images or labels in data.dataset"),
    ],
)
def test_ranks_that_were_given_different_things_are_refused(dataset, monkeypatch, theirs, message):
    def work(ranks):
        same = {"optimizer": {"name": "sgd", "lr": 0.05}, "train": {"epochs": 1, "batch_size": 11}}
        given = same | (theirs if ranks.rank == 2 else {})
        mine = planned(dataset, "bp", network=POOLED, **given)
        if not theirs and ranks.rank == 2:
            shards = mine.dataset.manifest.splits["train"].shards
            shards[0] = shards[0].model_copy(update={"checksum": "0" * 64})
        with pytest.raises(UserError, match=f"rank 2 was given something different from rank 0: {message}"):
            check_ranks(ranks, ranks, [mine])

    on_ranks(3, work)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"epochs": 1, "batch_size": 2}}, "a batch has 2 images, fewer than the 3 ranks"),
        ({"train": {"epochs": 1, "batch_size": 8, "validation": 88}}, "a batch has 2 images, fewer than the 3 ranks"),
        ({"train": {"epochs": 1, "batch_size": 9, "exact": True}}, "^train.exact: 3 ranks .*; start 1, 2, 4 or 8"),
        ({"study": {"seeds": 2}}, "study.seeds: 2 seeds, fewer than the 3 ranks"),
    ],
)
def test_more_ranks_than_there_is_to_share_are_refused(dataset, settings, message):
    def work(ranks):
        with pytest.raises(UserError, match=message):
            check_ranks(ranks, ranks, [planned(dataset, "ldrl overwrite", **settings)])

    on_ranks(3, work)


def test_ranks_share_the_seeds_of_a_study(dataset, tmp_path):
    """The numbers are those of one process; a rank that is told to stop lets the others finish theirs."""
    config = planned(dataset, "ldrl overwrite", study={"seeds": 3, "rounds": 1})

    def study(folder, ranks=ALONE, stopped=False):
        stop = StopRequest(tells=False)
        stop.signal = 10 if stopped and ranks.rank == 1 else 0
        folder.mkdir(exist_ok=True)
        run_study(config, folder, "study", stop, True, ranks=ranks)
        return json.loads((folder / "summary.json").read_text())["seeds"] if ranks.rank == 0 else []

    def interrupted(ranks):
        with pytest.raises(Interrupted, match="seed 2/3: stopped") as error:
            study(tmp_path / "shared", ranks, True)
        assert error.value.signal_number == 10

    wanted = study(tmp_path / "alone")
    on_ranks(2, interrupted)
    assert sorted(path.parent.name for path in (tmp_path / "shared").glob("*/summary.json")) == ["seed-0", "seed-2"]
    found, _ = on_ranks(2, lambda ranks: study(tmp_path / "shared", ranks))
    for mine, theirs in zip(found, wanted, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_shares_are_the_whole_and_differ_by_one(count):
    parts = [share(count, rank, 3) for rank in range(3)]
    assert [n for start, stop in parts for n in range(start, stop)] == [*range(count)]
    assert max(stop - start for start, stop in parts) - min(stop - start for start, stop in parts) <= 1


def test_ranks_begin_with_the_first_ones_weights_and_counts(dataset, tmp_path):
    """Machines of different kinds may have drawn other weights, and only the first rank reads a checkpoint."""

    def work(ranks):
        made = build_planned(planned(dataset, "ldrl overwrite"), ranks=ranks)
        arrays = [*made.network.parameters(), *made.rule_state.named().values()]
        for array in arrays:
            np.add(array, ranks.rank, out=array)
        made.optimizer_state.step, made.feedback_step = 7 + ranks.rank, 5 + ranks.rank
        Run(made, tmp_path, "run", True).start()
        return made.optimizer_state.step, made.feedback_step, b"".join(array.tobytes() for array in arrays)

    first, *others = on_ranks(3, work)
    assert first[:2] == (7, 5)
    assert all(found == first for found in others)
