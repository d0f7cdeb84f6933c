"""`train.validation`: epochs are evaluated on images held out; the test split is scored once, at the end."""

import csv
import json
import math

import numpy as np
import pytest

from arraytp.config import dump_config
from arraytp.errors import Interrupted, UserError
from arraytp.report import read_results, write_comparison
from arraytp.training.build import build
from arraytp.training.loop import Run


def train(epochs, validation=9, **more):
    return {"epochs": epochs, "batch_size": 16, "eval_batch_size": 12, "validation": validation, **more}


def test_images_held_out_are_never_trained_on(make_config):
    made = build(make_config(train=train(1)))
    trained = np.concatenate([images.copy() for images, _ in made.train_loader.batches(0)])
    held = np.concatenate([images.copy() for images, _ in made.validation_loader.batches(0)])
    assert (len(trained), len(held)) == (36, 9)
    seen = {image.tobytes() for image in np.concatenate([trained, held])}
    assert len(seen) == 45


def test_every_seed_holds_out_the_same_images(make_config):
    made = [build(make_config(train=train(1), seed=seed)) for seed in (0, 5)]
    (one, _), (other, _) = (next(each.validation_loader.batches(0)) for each in made)
    np.testing.assert_array_equal(one, other)


def test_without_it_nothing_is_held_out(make_config):
    made = build(make_config())
    assert made.validation_loader is None
    assert made.train_loader.count == 45


def test_rows_are_of_validation_and_the_last_one_has_the_test_split(make_config, start, stop_after, read_rows):
    run = start(make_config(train=train(2)))
    run.train(stop_after())
    table = read_rows(run.folder / "metrics.csv")
    assert list(table[0])[-3:] == ["validation_loss", "validation_top1", "validation_top5"]
    assert [math.isnan(row["test_top1"]) for row in table] == [True, True, False]
    for loader, split in ((run.experiment.validation_loader, "validation"), (None, "test")):
        loss, top1, _ = sum(score.totals for score in run.experiment.evaluate(loader))
        count = 9 if split == "validation" else 20
        assert table[-1][f"{split}_loss"] == loss / count
        assert table[-1][f"{split}_top1"] == 100 * top1 / count
    summary = json.loads((run.folder / "summary.json").read_text())
    best = max(table, key=lambda row: row["validation_top1"])
    assert summary["best"]["epoch"] == best["epoch"]
    assert summary["final"]["test_top1"] == table[-1]["test_top1"]


def test_the_test_split_is_scored_once(make_config, start, stop_after, monkeypatch):
    run, scored = start(make_config(train=train(3))), []
    batches = run.experiment.test_loader.batches
    monkeypatch.setattr(run.experiment.test_loader, "batches", lambda epoch: scored.append(epoch) or batches(epoch))
    run.train(stop_after())
    assert scored == [0]


def test_a_run_stopped_anywhere_leaves_the_same_numbers(make_config, start, stop_after, untimed):
    config = make_config(train=train(2))
    whole, stop = start(config, "whole"), stop_after()
    whole.train(stop)
    # 3 validations of 1 batch, 2 epochs of 3 steps, 2 batches of test images.
    assert stop.looks == 3 + 6 + 2
    for after in range(stop.looks):
        # Before the first epoch, in the first, in the second, and while the test split is scored.
        with pytest.raises(Interrupted, match=rf"stopped in epoch {1 if after < 5 else 2}, step"):
            start(config, f"stopped-{after}").train(stop_after(after))
        resumed = start(config, f"stopped-{after}", resume=True)
        resumed.train(stop_after())
        assert untimed(resumed.folder / "metrics.csv") == untimed(whole.folder / "metrics.csv"), after


def test_a_prolonged_run_is_as_if_it_had_been_asked_for_at_first(make_config, start, stop_after, untimed):
    """The score of the test split after the first epoch is forgotten."""
    whole = start(make_config(train=train(3)), "whole")
    whole.train(stop_after())
    start(make_config(train=train(1)), "grown").train(stop_after())
    grown = start(make_config(train=train(3)), "grown", resume=True)
    grown.train(stop_after())
    assert untimed(grown.folder / "metrics.csv") == untimed(whole.folder / "metrics.csv")


def test_a_finished_run_that_is_resumed_scores_the_test_split_again_alike(make_config, start, stop_after, untimed):
    config = make_config(train=train(1))
    run = start(config)
    run.train(stop_after())
    before = untimed(run.folder / "metrics.csv")
    start(config, resume=True).train(stop_after())
    assert untimed(run.folder / "metrics.csv") == before


def test_another_number_is_another_run(make_config, start, stop_after):
    start(make_config(train=train(1))).train(stop_after())
    with pytest.raises(UserError, match=r"train\.validation is 9 there and 8 here"):
        start(make_config(train=train(2, 8)), resume=True)


@pytest.mark.parametrize("count", [45, 46])
def test_one_image_at_least_is_left_to_train_on(make_config, count):
    with pytest.raises(
        UserError, match=rf"train\.validation: {count}, but the train split of .* has 45 images.*most 44"
    ):
        build(make_config(train=train(1, count)))


def test_reports_choose_the_best_on_validation_and_say_so(make_config, tmp_path, stop_after, read_rows):
    for name, validation in (("held", 9), ("test", 0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = make_config(train=train(3, validation), optimizer={"name": "sgd", "lr": 0.3})
        run = Run(build(config), folder, name, quiet=True)
        (folder / "config.yml").write_text(dump_config(config))
        run.start()
        run.train(stop_after())
    results = read_results([tmp_path / "runs"])
    write_comparison(results, tmp_path)
    markdown = (tmp_path / "comparison.md").read_text()
    assert "Of images held out for validation instead of test: the best of held." in markdown
    with (tmp_path / "comparison.csv").open() as file:
        held, tested = csv.DictReader(file)
    table = read_rows(tmp_path / "runs" / "held" / "metrics.csv")
    assert float(held["best_validation_top1"]) == max(row["validation_top1"] for row in table)
    assert float(held["final_test_top1"]) == table[-1]["test_top1"]
    assert (held["best_test_top1"], tested["best_validation_top1"]) == ("", "")
