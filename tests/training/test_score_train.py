"""`train.score_train`: an epoch's training scores are those of all training images with the weights at its end."""

import numpy as np
import pytest

from arraytp.errors import Interrupted


def train(epochs, **more):
    return {"epochs": epochs, "batch_size": 16, "eval_batch_size": 12, "score_train": True, **more}


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("data", [{}, {"flip": 1.0, "crop_padding": 2}, {"in_memory_mb": 0, "pool_images": 8}])
def test_every_row_has_the_score_of_its_weights(make_config, start, stop_after, toy, data, epochs, read_rows):
    """Also the row before training; images are scored as they are, though training crops and flips them."""
    run = start(make_config(train=train(epochs), data={"dataset": str(toy), **data}))
    run.train(stop_after())
    dataset, row = run.experiment.plan.dataset, read_rows(run.folder / "metrics.csv")[-1]
    images, labels = dataset.load("train")
    as_they_are = ((images / 255 - dataset.mean) / dataset.std).astype(np.float32)
    loss, top1, top5 = run.experiment.score(as_they_are, labels).totals.tolist()
    assert row["train_loss"] == pytest.approx(loss / 45, rel=1e-5)
    assert (row["train_top1"], row["train_top5"]) == (100 * top1 / 45, 100 * top5 / 45)


def test_images_held_out_are_not_scored(make_config, start, stop_after, read_rows):
    run = start(make_config(train=train(1, validation=9)))
    run.train(stop_after())
    loader = run.experiment.train_loader.in_order(36)
    ((images, labels),) = loader.batches(0)
    loss, top1, _ = run.experiment.score(images, labels).totals.tolist()
    assert read_rows(run.folder / "metrics.csv")[-1]["train_loss"] == pytest.approx(loss / 36, rel=1e-5)
    assert read_rows(run.folder / "metrics.csv")[-1]["train_top1"] == 100 * top1 / 36


def test_the_weights_are_those_of_a_run_without_it(make_config, start, stop_after, read_rows):
    scored, plain = start(make_config(train=train(2)), "scored"), start(make_config(train=train(2, score_train=False)))
    for run in (scored, plain):
        run.train(stop_after())
    for one, other in zip(*(run.experiment.network.parameters() for run in (scored, plain)), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(
        read_rows(scored.folder / "metrics.csv"), read_rows(plain.folder / "metrics.csv"), strict=True
    ):
        assert one["test_loss"] == other["test_loss"]


def test_a_run_stopped_anywhere_leaves_the_same_numbers(make_config, start, stop_after, untimed):
    config = make_config(train=train(1))
    whole, stop = start(config, "whole"), stop_after()
    whole.train(stop)
    # Two scorings of 4 batches of training and 2 of test images, and an epoch of 3 steps.
    assert stop.looks == 2 * (4 + 2) + 3
    for after in range(stop.looks):
        with pytest.raises(Interrupted):
            start(config, f"stopped-{after}").train(stop_after(after))
        resumed = start(config, f"stopped-{after}", resume=True)
        resumed.train(stop_after())
        assert untimed(resumed.folder / "metrics.csv") == untimed(whole.folder / "metrics.csv"), after
