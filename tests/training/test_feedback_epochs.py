"""Rules with trained feedback in the loop: order of passes, tables, and resuming bit for bit wherever a run stopped."""

import csv
from contextlib import closing

import numpy as np
import pytest

from arraytp.errors import Interrupted, NonFiniteError, UserError
from arraytp.training.build import build

FEEDBACK = {
    "iterations": [2, 1],
    "sigma": [0.2, 0.1],
    "optimizer": {"name": "sgd", "lr": [0.01, 0.05], "momentum": 0.9},
}
RULES = {
    "tp": {"name": "tp", "feedback": FEEDBACK},
    "dtp": {"name": "dtp", "feedback": FEEDBACK},
    "ldrl": {"name": "ldrl", "feedback": FEEDBACK},
    "ldrl-parallel": {"name": "ldrl-parallel", "feedback": FEEDBACK, "samples": 2},
    "p-ddtp": {"name": "drl", "feedback": FEEDBACK},
    "s-ddtp": {
        "name": "drl",
        "feedback": {"iterations": 1, "sigma": 0.05, "optimizer": {"name": "adam", "lr": 0.001, "weight_decay": 1e-4}},
        "pretrain_epochs": 2,
        "extra_epochs": 1,
    },
}
PER_EPOCH = 3


def rows(path):
    with path.open() as file:
        return list(csv.reader(file))[1:]


def everything(run):
    made = run.experiment
    arrays = [*made.network.weights, *made.network.biases, *made.rule_state.named().values()]
    arrays += [moment for moments in made.optimizer_state.moments for moment in moments]
    # All but the seconds.
    metrics = [row[:1] + row[2:] for row in rows(run.folder / "metrics.csv")]
    tables = [(run.folder / name).read_text() for name in ("angles.csv", "feedback.csv")]
    return [array.tobytes() for array in arrays], made.feedback_step, metrics, tables


def by_hand(config):
    """Train without the loop; return the experiment, and the rows that feedback.csv should have."""
    made, found, passes, step = build(config), [], 0, 0
    first, between = config.rule.pretrain_epochs, config.rule.extra_epochs
    for epoch in range(config.train.epochs):
        for _ in range(between if epoch else first):
            with closing(made.train_loader.batches(passes)) as batches:
                for images, labels in batches:
                    made.train_feedback(made.forward(images, labels))
            passes += 1
        with closing(made.train_loader.batches(passes)) as batches:
            for images, labels in batches:
                one = made.forward(images, labels)
                losses = made.train_feedback(one)
                updates = made.updates(one)
                if step % config.compare.every == 0:
                    found += [[step, epoch + 1, *pair.numbers] for pair in made.compare_feedback(losses, one)]
                made.apply(one, updates, epoch)
                step += 1
        passes += 1
    return made, found


def test_s_ddtps_passes_come_in_order(make_config, start, stop_after):
    """Two passes of feedback alone, an epoch, one pass of feedback alone, an epoch; each has its own image order."""
    config = make_config(rule=RULES["s-ddtp"])
    made, expected = by_hand(config)
    run = start(config)
    run.train(stop_after())
    for own, looped in zip(made.network.weights, run.experiment.network.weights, strict=True):
        np.testing.assert_array_equal(own, looped)
    for name, array in made.rule_state.named().items():
        np.testing.assert_array_equal(run.experiment.rule_state.named()[name], array)
    found = [[float(cell) for cell in row] for row in rows(run.folder / "feedback.csv")]
    np.testing.assert_array_equal(found, expected)
    assert run.experiment.feedback_step == 5 * PER_EPOCH
    assert (run.position.passes, run.position.step) == (5, 2 * PER_EPOCH)


def test_forward_weights_stay_in_epochs_of_feedback_alone(make_config, start, stop_after):
    """Right after the pre-training, θ is still the initial one, but Q is not."""
    config = make_config(rule=RULES["s-ddtp"])
    run, fresh = start(config), build(config)
    # Two looks in the first evaluation, then one after each batch of the two passes.
    with pytest.raises(Interrupted):
        run.train(stop_after(2 + 2 * PER_EPOCH - 1))
    assert run.experiment.feedback_step == 2 * PER_EPOCH
    for trained, initial in zip(run.experiment.network.weights, fresh.network.weights, strict=True):
        np.testing.assert_array_equal(trained, initial)
    for name, initial in fresh.rule_state.named().items():
        assert not np.array_equal(run.experiment.rule_state.named()[name], initial)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_may_be_stopped_at_every_kind_of_step(make_config, start, stop_after, rule):
    """Stop within epochs of feedback alone, training epochs and evaluations, twice in a row each time."""
    config = make_config(rule=RULES[rule], compare={"every": 2})
    whole, stop = start(config, "whole"), stop_after()
    whole.train(stop)
    feedback = 3 * PER_EPOCH if rule == "s-ddtp" else 0
    assert stop.looks == 3 * 2 + 2 * PER_EPOCH + feedback
    expected = everything(whole)
    # Every second look is enough, because the second stop comes at the look after the first.
    places = range(0, stop.looks, 2) if rule == "s-ddtp" else (3, 6, 9)
    for after in places:
        run = start(config, f"stopped-{after}")
        with pytest.raises(Interrupted):
            run.train(stop_after(after))
        again = start(config, f"stopped-{after}", resume=True)
        with pytest.raises(Interrupted):
            again.train(stop_after(0))
        resumed = start(config, f"stopped-{after}", resume=True)
        resumed.train(stop_after())
        assert everything(resumed) == expected, f"stopped at look {after}"


def test_a_prolonged_run_is_that_of_the_longer_config(make_config, start, stop_after):
    def epochs(count, steps=None):
        train = {"epochs": count, "batch_size": 16, "eval_batch_size": 12}
        return make_config(rule=RULES["s-ddtp"], train=train | ({"steps": steps} if steps else {}))

    whole = start(epochs(3), "whole")
    whole.train(stop_after())
    for name, first in (("by-epochs", epochs(1)), ("by-steps", epochs(3, 2))):
        start(first, name).train(stop_after())
        grown = start(epochs(3), name, resume=True)
        grown.train(stop_after())
        assert everything(grown) == everything(whole)


def test_a_run_that_has_trained_feedback_for_the_next_epoch_is_not_made_shorter(make_config, start, stop_after):
    """A run of the shorter length would not have trained that feedback."""

    def length(**train):
        return make_config(rule=RULES["s-ddtp"], train={"batch_size": 16, "eval_batch_size": 12, **train})

    # An evaluation has 2 looks, a batch 1. Stop in the feedback pass after epoch 1, in the first pass, and at its end.
    for name, after in (("later", 2 + 3 * PER_EPOCH + 2 + 1), ("first", 2 + 1), ("pass", 2 + PER_EPOCH - 1)):
        with pytest.raises(Interrupted):
            start(length(epochs=2), name).train(stop_after(after))
    for name, train in (
        ("later", {"epochs": 1}),
        ("later", {"epochs": 2, "steps": PER_EPOCH}),
        ("first", {"epochs": 0}),
        ("pass", {"epochs": 0}),
    ):
        with pytest.raises(
            UserError, match=rf"has trained feedback for epoch [12] already, but train.{[*train][-1]} is"
        ):
            start(length(**train), name, resume=True)
    # Once a training epoch has begun, every length that ends within it includes its feedback training.
    with pytest.raises(Interrupted):
        start(length(epochs=2), "within").train(stop_after(2 + 2 * PER_EPOCH + 1))
    shorter = start(length(epochs=2, steps=2), "within", resume=True)
    shorter.train(stop_after())
    whole = start(length(epochs=2, steps=2), "whole")
    whole.train(stop_after())
    assert everything(shorter) == everything(whole)


def test_the_loss_is_the_mean_over_the_noises_of_the_last_iteration(make_config):
    made, seen = build(make_config(rule=RULES["ldrl-parallel"] | {"samples": 3})), {1: [], 2: []}
    with closing(made.train_loader.batches(0)) as batches:
        images, labels = next(batches)
    step = made.forward(images, labels)
    losses = made.train_feedback(step, observe=lambda n, k, arrays: seen[n].append(float(arrays["loss"])))
    assert [len(seen[n]) for n in (1, 2)] == [6, 3]
    assert [float(loss) for loss in losses] == pytest.approx([np.mean(seen[1][3:]), np.mean(seen[2])], rel=1e-6)
    unseen = build(made.config)
    assert unseen.train_feedback(unseen.forward(images, labels)) == losses


@pytest.mark.parametrize("rule", RULES)
def test_the_tables_have_a_row_per_block(make_config, start, stop_after, rule):
    run = start(make_config(rule=RULES[rule]))
    run.train(stop_after())
    blocks = ["1", "2"]
    found = rows(run.folder / "feedback.csv")
    # Compared every 3 of 6 steps.
    assert [row[:3] for row in found] == [[step, epoch, n] for step, epoch in (("0", "1"), ("3", "2")) for n in blocks]
    paired = blocks[1:] if rule.endswith("ddtp") else blocks
    for _, _, block, loss, angle, distance, ratio, *_ in found:
        assert np.isfinite(float(loss))
        assert (
            (0 <= float(angle) <= 180 and float(distance) > 0)
            if block in paired
            else angle == distance == ratio == "nan"
        )
    assert [row[:3] for row in rows(run.folder / "angles.csv")] == [
        [step, epoch, n] for step, epoch in (("0", "1"), ("3", "2")) for n in ("0", "1", "2")
    ]


def test_a_rule_without_feedback_that_pairs_with_forward_weights_has_no_table_of_it(make_config, start, stop_after):
    run = start(make_config(rule={"name": "dfa"}))
    run.train(stop_after())
    assert not (run.folder / "feedback.csv").exists()


def test_angles_are_measured_at_the_logging_beta(make_config):
    """Another β gives other updates, but the same measured angles; measuring leaves the updates as they are."""
    found = []
    for beta in (0.5, 0.1):
        made = build(make_config(rule={**RULES["ldrl"], "beta": beta, "compare_beta": 0.005}))
        with closing(made.train_loader.batches(0)) as batches:
            step = made.forward(*next(batches))
        made.train_feedback(step)
        updates = made.updates(step)
        kept = [array.copy() for pair in updates for array in pair]
        found.append(made.compare(step, updates))
        for array, before in zip((a for pair in updates for a in pair), kept, strict=True):
            np.testing.assert_array_equal(array, before)
    # Measured angles to BP do not depend on beta: they are computed with compare_beta, 0.005.
    assert [entry.angle_deg for entry in found[0]] == [entry.angle_deg for entry in found[1]]
    assert all(np.isfinite(entry.angle_deg) for entry in found[0])


@pytest.mark.parametrize("rule", RULES)
def test_every_batch_has_noise_of_its_own(make_config, rule):
    """The number of batches before it is a key of the noise: if all noise were the same, ω would learn that noise."""
    made = build(make_config(rule=RULES[rule]))
    with closing(made.train_loader.batches(0)) as batches:
        step = made.forward(*next(batches))
    seen = []
    for _ in range(3):
        made.train_feedback(step, observe=lambda n, k, arrays: seen.append(arrays["epsilon"].tobytes()))
    assert len(set(seen)) == len(seen) >= 3 * (len(made.network) - 1)
    again = build(make_config(rule=RULES[rule]))
    again.feedback_step, repeated = 2, []
    again.train_feedback(step, observe=lambda n, k, arrays: repeated.append(arrays["epsilon"].tobytes()))
    assert repeated == seen[-len(repeated) :]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_feedback_that_diverges_stops_the_run_with_its_block_and_rate(make_config, start, stop_after):
    rule = {"name": "ldrl", "feedback": {"iterations": 50, "sigma": 5.0, "optimizer": {"name": "sgd", "lr": 1e3}}}
    with pytest.raises(NonFiniteError, match=r"feedback weights of block 1 \(dense1\)"):
        start(make_config(rule=rule)).train(stop_after())


@pytest.mark.parametrize("rule", ["dtp", "ldrl", "ldrl-parallel", "s-ddtp", "p-ddtp"])
def test_a_small_net_learns(make_config, start, stop_after, rule):
    """Twenty epochs of three steps on classes of different brightness; DRL's convolution learns slowly."""
    options = {**RULES[rule], **({"beta": 0.5, "divide_by_beta": True} if "ddtp" not in rule else {"eta": 1.0})}
    train = {"epochs": 20, "batch_size": 16, "eval_batch_size": 20}
    run = start(make_config(rule=options, train=train, compare={"every": 0}))
    run.train(stop_after())
    losses = [float(row[3]) for row in rows(run.folder / "metrics.csv")[1:]]
    assert losses[-1] < (0.95 if "ddtp" in rule else 0.85) * losses[0], losses


def test_feedback_weights_that_are_not_finite_keep_the_last_good_checkpoint(make_config, start, stop_after):
    run = start(make_config(rule=RULES["ldrl"]))
    run.train(stop_after())
    before = (run.folder / "checkpoint.h5").read_bytes()
    run.experiment.rule_state.weights[2][0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"not finite after 6 steps: feedback weights of block 2 \(dense2\)"):
        run.train(stop_after())
    assert (run.folder / "checkpoint.h5").read_bytes() == before
