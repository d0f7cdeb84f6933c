"""The training loop only calls the experiment's steps, scores and comparisons in order, and writes them down."""

import csv
import itertools
import json
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from arraytp.backend import Backend
from arraytp.errors import NonFiniteError
from arraytp.training import loop
from arraytp.training.build import build
from arraytp.training.compare import Comparison
from arraytp.training.experiment import Experiment
from arraytp.training.loop import Run


def by_hand(config):
    """Train without the loop; return the experiment and what metrics.csv, angles.csv and steps.csv should say."""
    made = build(config)
    metrics, angles, seen = [[np.nan] * 3 + scored(made)], [], []
    for epoch in range(config.train.epochs):
        totals, images_seen = np.zeros(3), 0
        with closing(made.train_loader.batches(epoch)) as batches:
            for images, labels in batches:
                one = made.forward(images, labels)
                made.train_feedback(one)
                updates = made.updates(one)
                if len(seen) % config.compare.every == 0:
                    angles += [(len(seen), epoch + 1, comparison) for comparison in made.compare(one, updates)]
                made.apply(one, updates, epoch)
                totals += one.score.totals
                images_seen += one.score.images
                seen.append((epoch + 1, one.score))
        metrics.append([*means(totals, images_seen), *scored(made)])
    every, steps = config.compare.every, []
    for end in range(every, len(seen) + 1, every):
        batches = [score for _, score in seen[end - every : end]]
        sums = means(sum(score.totals for score in batches), sum(score.images for score in batches))
        steps.append([end, seen[end - 1][0], *sums])
    return made, metrics, angles, steps


def means(totals, images):
    loss, top1, top5 = totals.tolist()
    return [loss / images, 100 * top1 / images, 100 * top5 / images]


def scored(made):
    scores = list(made.evaluate())
    return means(sum(score.totals for score in scores), sum(score.images for score in scores))


def rows(path):
    with path.open() as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_loop_does_what_one_would_do_by_hand(make_config, start, stop_after, toy, rule):
    config = make_config(
        rule={"name": rule},
        data={"dataset": str(toy), "flip": 0.5, "crop_padding": 1},
        optimizer={"name": "adam", "lr": 0.01},
        schedule={"name": "cosine", "t_max": 3},
        train={"epochs": 3, "batch_size": 16, "eval_batch_size": 12},
        compare={"every": 2},
    )
    made, metrics, angles, steps = by_hand(config)
    run = start(config)
    run.train(stop_after())
    for own, looped in zip(made.network.weights, run.experiment.network.weights, strict=True):
        np.testing.assert_array_equal(own, looped)
    written = [[float(cell) for cell in row[3:]] for row in rows(run.folder / "metrics.csv")]
    np.testing.assert_array_equal(written, metrics)
    np.testing.assert_allclose(np.array(rows(run.folder / "steps.csv"), float), steps, rtol=1e-13)
    assert [row[0] for row in rows(run.folder / "metrics.csv")] == ["0", "1", "2", "3"]
    found = [
        (int(step), int(epoch), Comparison(int(block), float(angle), float(distance)))
        for step, epoch, block, angle, distance in rows(run.folder / "angles.csv")
    ]
    assert found == angles


@pytest.mark.parametrize(("steps", "epochs"), [(1, [0, 1]), (3, [0, 1]), (4, [0, 1, 2]), (99, [0, 1, 2])])
def test_a_run_ends_after_the_steps_that_were_asked_for(make_config, start, stop_after, steps, epochs):
    """There are two epochs of 3 steps; the run is evaluated where it ends, and its totals count the images trained."""
    train = {"epochs": 2, "batch_size": 16, "eval_batch_size": 12}
    whole = start(make_config(train=train, rule={"name": "fa"}, compare={"every": 1}), "whole")
    whole.train(stop_after())
    run = start(make_config(train={**train, "steps": steps}, rule={"name": "fa"}, compare={"every": 1}))
    run.train(stop_after())
    steps = min(steps, 6)
    assert rows(run.folder / "angles.csv") == rows(whole.folder / "angles.csv")[: 3 * steps]
    assert [int(row[0]) for row in rows(run.folder / "metrics.csv")] == epochs
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (epochs[-1], steps)
    if steps % 3 == 1:
        assert run.position.totals.images == 16
    assert rows(run.folder / "metrics.csv")[-1][6:] == [repr(value) for value in scored(run.experiment)]


def test_bp_is_not_compared_with_itself(make_config, start, stop_after):
    run = start(make_config(rule={"name": "bp"}, compare={"every": 1}))
    run.train(stop_after())
    assert rows(run.folder / "angles.csv") == []


def test_comparing_changes_nothing_that_is_trained(make_config, start, stop_after):
    weights = []
    for every in (0, 1):
        run = start(make_config(rule={"name": "fa"}, compare={"every": every}), f"every-{every}")
        run.train(stop_after())
        weights.append(run.experiment.network.weights)
    for without, with_angles in zip(*weights, strict=True):
        np.testing.assert_array_equal(without, with_angles)


def test_moments_that_are_not_finite_keep_the_last_good_checkpoint(make_config, start, stop_after):
    """They spoil the weights only one step later; by then, a checkpoint with them would have replaced the good one."""
    run = start(make_config())
    run.train(stop_after())
    checkpoint = run.folder / "checkpoint.h5"
    before = checkpoint.read_bytes()
    # Parameters are weights and biases in turn, so parameter 2 is the weight of block 1.
    run.experiment.optimizer_state.moments[2][0][0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"not finite after 6 steps: optimiser's moments of block 1 \(dense1\)"):
        run.train(stop_after())
    assert checkpoint.read_bytes() == before


def test_what_a_device_has_still_to_compute_is_training(make_config, start, stop_after, monkeypatch):
    """Angles are measured, and an epoch ends, only once the device has finished all steps launched until then."""
    clock, done, within = [0.0], [], []
    monkeypatch.setattr("arraytp.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Backend, "synchronize", lambda self: done.append("waited"))
    compare, read, train = Experiment.compare, Run._read_scores, Run._train_epoch

    def compared(self, *arguments):
        done.append("compared")
        return compare(self, *arguments)

    def reading(self, progress):
        clock[0] += bool(within)
        read(self, progress)

    def training(self, *arguments):
        within.append(clock[0])
        train(self, *arguments)
        taken.append(clock[0] - within.pop())

    taken = []
    monkeypatch.setattr(Experiment, "compare", compared)
    monkeypatch.setattr(Run, "_read_scores", reading)
    monkeypatch.setattr(Run, "_train_epoch", training)
    run = start(make_config(rule={"name": "fa"}, compare={"every": 2}))
    run.train(stop_after())
    assert done == ["waited", "compared"] * 3
    assert run.position.train_seconds == sum(taken) > 0


def test_the_time_of_comparisons_is_not_that_of_steps(make_config, start, stop_after, monkeypatch):
    run, clock, late = start(make_config(rule={"name": "fa"}, compare={"every": 1})), itertools.count(), []
    compare = run.experiment.compare
    run.experiment.compare = lambda *given: late.append(100) or compare(*given)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 1e-3 * next(clock) + sum(late)))
    run.train(stop_after())
    assert len(late) == 6
    assert run.position.train_seconds < 1


def test_checkpoints_are_written_every_so_many_minutes(make_config, start, monkeypatch):
    run = start(make_config(train={"epochs": 1, "batch_size": 16, "checkpoint_minutes": 2}))
    run._saved = 0.0
    for now, due in ((119.0, False), (121.0, True)):
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda now=now: now))
        assert run._save_due() == due


def test_of_scores_that_are_read_together_the_first_bad_step_is_named(make_config, start):
    run = start(make_config())
    with closing(run.experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches)
    good, bad = (run.experiment.score(images, labels) for _ in range(2))
    bad.totals[0] = np.nan
    run._unread, run.position.step = [good, bad, good, bad], 9
    with pytest.raises(NonFiniteError, match="not finite at step 6:"):
        run._read_scores(None)
