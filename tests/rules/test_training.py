"""Short runs of whole experiments: the device double trains as NumPy does, and a checkpoint restores every bit."""

from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import strict_device

from arraytp.backend import Backend
from arraytp.config import Loss, parse_config
from arraytp.data.writer import Description, writing
from arraytp.errors import UserError
from arraytp.signals import StopRequest
from arraytp.training.build import build
from arraytp.training.checkpoint import read_checkpoint, write_checkpoint
from arraytp.training.compare import finite_blocks
from arraytp.training.loop import Run

LEARNED = ("weight-mirror", "alignment", "tp", "dtp", "ldrl", "ldrl expected", "ldrl-parallel", "drl", "drl expected")
GAIT_PROP = {"gait-prop literal": {"eta": 0.01}, "gait-prop difference": {"form": "difference"}}
RULES = ("bp", "fa", "dfa", "sign-symmetry", "kolen-pollack", *GAIT_PROP, *LEARNED)
POOLED = {
    "blocks": [
        {
            "type": "conv",
            "channels": 6,
            "kernel": 5,
            "padding": 2,
            "activation": "elu",
            "pool": {"kernel": 3, "stride": 2, "padding": 1},
        },
        {
            "type": "conv",
            "channels": 8,
            "kernel": 5,
            "padding": 2,
            "activation": "elu",
            "pool": {"kernel": 3, "stride": 2, "padding": 1},
        },
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
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"name": "adam", "lr": 1e-3, "epsilon_form": "keras"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """90 training and 30 test images of shape (8, 7, 2) in 6 classes."""
    folder = tmp_path_factory.mktemp("images") / "data"
    generator = np.random.default_rng(5)
    description = Description("tiny", (8, 7, 2), tuple(f"class {n}" for n in range(6)))
    with writing(folder, description) as writer:
        for split, count in (("train", 90), ("test", 30)):
            images = generator.integers(0, 256, (count, 8, 7, 2), dtype=np.uint8)
            writer.add(split, images, generator.integers(0, 6, count))
    return folder


def rule_options(rule, optimizer):
    if rule == "bp":
        return {"name": rule}
    if rule in GAIT_PROP:
        return {"name": "gait-prop"} | GAIT_PROP[rule]
    name, _, expected = rule.partition(" ")
    feedback = {"iterations": [2, 1, 2], "optimizer": OPTIMIZERS[optimizer] | {"lr": 1e-4}}
    if name == "sign-symmetry":
        return {"name": name, "magnitude": "batch"}
    options = {"name": name, "feedback_init": "xavier-normal"} | ({"expected": True} if expected else {})
    return options | ({"feedback": feedback} if rule in LEARNED else {})


def config(dataset, rule="bp", optimizer="sgd", dtype="float64"):
    tree = {
        "name": "short",
        "dtype": dtype,
        "data": {"dataset": str(dataset), "flip": 0.5, "crop_padding": 1},
        "network": SQUARE if rule in GAIT_PROP else POOLED,
        "rule": rule_options(rule, optimizer),
        # With random feedback, TP's plain targets are far from the activations, so its rate is smaller.
        "optimizer": OPTIMIZERS[optimizer] | ({"lr": 1e-4} if rule == "tp" else {}),
        "schedule": {"name": "cosine", "t_max": 3},
        "train": {"epochs": 1, "batch_size": 16},
        "compare": {"every": 2},
    }
    return parse_config(tree).variants[""]


def train(experiment, steps, epoch=0):
    """Train and return the losses, as numbers."""
    losses = []
    with closing(experiment.train_loader.batches(epoch)) as batches:
        for _, (images, labels) in zip(range(steps), batches, strict=False):
            losses.append(float(experiment.step(images, labels, epoch).loss))
    return losses


def state_of(experiment):
    arrays = [*experiment.network.parameters(), *experiment.rule_state.named().values()]
    arrays += [moment for moments in experiment.optimizer_state.moments for moment in moments]
    return [experiment.plan.backend.to_host(array) for array in arrays]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_device_trains_as_the_host_does(device, dataset, noise_of_the_host, rule, optimizer):
    """Augmentation included; double precision, where the two orders of summation differ by 1e-12 after four steps."""
    there, here = (build(config(dataset, rule, optimizer), backend) for backend in (device.backend, None))
    np.testing.assert_allclose(train(there, 4), train(here, 4), rtol=1e-9)
    for mine, wanted in zip(state_of(there), state_of(here), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-9)
    compared = []
    for experiment in (there, here):
        with closing(experiment.train_loader.batches(1)) as batches:
            step = experiment.forward(*next(batches))
            compared.append(experiment.compare(step, experiment.updates(step)))
    for mine, wanted in zip(*compared, strict=True):
        assert mine.angle_deg == pytest.approx(wanted.angle_deg, abs=1e-5)
        assert mine.distance == pytest.approx(wanted.distance, rel=1e-6, abs=1e-9)
    totals = [sum(x.plan.backend.to_host(score.totals) for score in x.evaluate()) for x in (there, here)]
    np.testing.assert_allclose(*totals, rtol=1e-9)
    assert all(finite_blocks(there.network))


@pytest.mark.parametrize("rule", RULES)
def test_the_plain_engine_trains_as_the_fast_one_does(dataset, rule):
    """Build with `plain=True`, as `arraytp run --plain` does, and train by SGD, which does not amplify rounding."""
    fast, plain = (build(config(dataset, rule), plain=plain) for plain in (False, True))
    assert (type(fast.engine).__name__, type(plain.engine).__name__) == ("Fast", "Plain")
    np.testing.assert_allclose(train(plain, 4), train(fast, 4), rtol=1e-9)
    for own, wanted in zip(state_of(plain), state_of(fast), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-6, atol=1e-9)
    totals = [sum(score.totals for score in experiment.evaluate()) for experiment in (plain, fast)]
    np.testing.assert_allclose(*totals, rtol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_a_device_reads_nothing_back(dataset, rule):
    """Each read would make the host wait for the device. A rule that inverts reads ‖E‖ of all its blocks in one copy.

    These norms decide how a weight is inverted. The same copy holds the condition numbers by which it may be refused.
    """
    experiment = build(config(dataset, rule), Backend("strict", strict_device))
    with closing(experiment.train_loader.batches(0)) as batches:
        experiment.step(*next(batches))
        before = strict_device.reads.copy()
        experiment.step(*next(batches))
        factorises = experiment.rule.inverts or experiment.rule.factors is not None
        assert strict_device.reads - before == Counter({"get": 1} if factorises else {})


@pytest.mark.parametrize("rule", LEARNED)
def test_feedback_is_trained_on_a_device_without_the_host(dataset, rule):
    """From the first iteration on, nothing is copied to the device or back: noise is drawn on the device."""
    experiment = build(config(dataset, rule), Backend("strict", strict_device))
    # The loader's threads send batches ahead, so they must have ended.
    with closing(experiment.train_loader.batches(0)) as batches:
        step = experiment.forward(*next(batches))
    before = strict_device.reads + strict_device.writes
    omega = strict_device.asnumpy(experiment.feedback_pairs()[0][1])
    experiment.train_feedback(step)
    assert strict_device.reads + strict_device.writes - before == {"asnumpy": 1}
    assert (strict_device.asnumpy(experiment.feedback_pairs()[0][1]) != omega).all()


@pytest.mark.parametrize(("rule", "optimizer"), [*zip(RULES, cycle(OPTIMIZERS), strict=False), ("bp", "adam")])
def test_a_checkpoint_brings_back_every_bit(computer, dataset, tmp_path, rule, optimizer):
    first, second = (build(config(dataset, rule, optimizer, "float32"), computer.backend) for _ in range(2))
    train(first, 3)
    write_checkpoint(tmp_path / "checkpoint.h5", first, {"position": {"step": 3}, "loss": 0.1})
    kept = [array.copy() for array in state_of(first)]
    after = train(first, 3, epoch=1)
    assert read_checkpoint(tmp_path / "checkpoint.h5", second) == {"position": {"step": 3}, "loss": 0.1}
    assert second.optimizer_state.step == 3
    for mine, wanted in zip(state_of(second), kept, strict=True):
        np.testing.assert_array_equal(mine, wanted)
    assert train(second, 3, epoch=1) == after
    for mine, wanted in zip(state_of(second), state_of(first), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_a_checkpoint_of_a_device_is_read_on_the_host(device, dataset, tmp_path):
    there, here = build(config(dataset, "fa"), device.backend), build(config(dataset, "fa"))
    train(there, 2)
    write_checkpoint(tmp_path / "checkpoint.h5", there, {})
    read_checkpoint(tmp_path / "checkpoint.h5", here)
    for mine, wanted in zip(state_of(here), state_of(there), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize(
    ("other", "error"), [({"rule": "dfa"}, "has no array rule/feedback/1"), ({"dtype": "float32"}, "expected float32")]
)
def test_a_checkpoint_of_another_run_is_refused(dataset, tmp_path, other, error):
    first = build(config(dataset, "bp"))
    write_checkpoint(tmp_path / "checkpoint.h5", first, {})
    second = build(replace(config(dataset), **vars(config(dataset, **other))))
    before = [array.copy() for array in state_of(second)]
    with pytest.raises(UserError, match=error):
        read_checkpoint(tmp_path / "checkpoint.h5", second)
    for array, kept in zip(state_of(second), before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_the_loop_runs_on_a_device(device, dataset, tmp_path):
    """Train an epoch with angles, evaluation, checkpoint and summary; its table equals the host's up to rounding."""
    tables = {}
    for backend in (device.backend, None):
        folder = tmp_path / str(backend and backend.name)
        folder.mkdir()
        run = Run(build(config(dataset, "fa"), backend), folder, "short", quiet=True)
        run.start()
        run.train(StopRequest())
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
        tables[backend] = np.array([[*row[:1], *row[2:]] for row in rows], float)
        assert (folder / "summary.json").exists()
        assert len((folder / "angles.csv").read_text().splitlines()) == 1 + 3 * 4
    np.testing.assert_allclose(*tables.values(), rtol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_score_holds_the_sum_of_losses_and_the_counts_of_hits(dataset, reduction):
    """There are six classes, so a label is among the first five unless it ranks last."""
    experiment = build(replace(config(dataset), loss=Loss(reduction=reduction)))
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches)
    logits = experiment.forward(images, labels).batch.logits
    places = logits.argsort(axis=1)
    # Four labels rank first, two last, two last but one.
    labels = np.concatenate([places[:4, -1], places[4:6, 0], places[6:8, 1], labels[8:]])
    score = experiment.score(images, labels)
    logits = experiment.forward(images, labels).batch.logits
    own = np.exp(logits)[np.arange(len(labels)), labels] / np.exp(logits).sum(axis=1)
    places = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    np.testing.assert_allclose(score.totals, [-np.log(own).sum(), (places == 0).sum(), (places < 5).sum()], rtol=1e-12)
    assert 0 < score.totals[1] < score.totals[2] < score.images == 16
    assert float(score.loss) == pytest.approx(-np.log(own).sum() / (16 if reduction == "mean" else 1), rel=1e-12)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(dataset):
    runs = [train(build(replace(config(dataset), seed=seed)), 3) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_host_images_are_refused_by_a_device(dataset):
    experiment = build(config(dataset), Backend("strict", strict_device))
    with pytest.raises(TypeError, match="device array"):
        experiment.step(np.zeros((2, 8, 7, 2)), np.zeros(2, np.int64))
