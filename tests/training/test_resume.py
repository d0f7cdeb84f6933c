"""A run that was stopped and resumed leaves the same bits behind as one that was not, wherever it was stopped."""

import csv
import itertools
import json

import numpy as np
import pytest

from arraytp.errors import Interrupted, UserError
from arraytp.report.reading import read_csv
from arraytp.training import loop
from arraytp.training.tables import STEPS_COLUMNS

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.001}
ADAM = {"name": "adam", "lr": 0.01}
DATA = {
    "in memory": {"flip": 0.5, "crop_padding": 1},
    "streamed": {"flip": 0.5, "crop_padding": 1, "in_memory_mb": 0, "pool_images": 15},
}
COMBINATIONS = {
    f"{rule}, {optimizer['name']}, {data}": (rule, optimizer, data)
    for rule, optimizer, data in (
        ("bp", SGD, "in memory"),
        ("bp", ADAM, "streamed"),
        ("fa", SGD, "streamed"),
        ("fa", ADAM, "in memory"),
        ("dfa", SGD, "streamed"),
        ("dfa", ADAM, "in memory"),
    )
}


def everything(run):
    """Return every array of the run's state, its position, and every number of its tables except the times."""
    experiment = run.experiment
    network = [*experiment.network.weights, *experiment.network.biases]
    moments = [moment for moments in experiment.optimizer_state.moments for moment in moments]
    arrays = [*network, *moments, *experiment.rule_state.named().values()]
    return (
        [experiment.plan.backend.to_host(array).tobytes() for array in arrays],
        experiment.optimizer_state.step,
        metrics(run.folder),
        [(run.folder / f"{table}.csv").read_text() for table in ("angles", "steps")],
        (run.position.epoch, run.position.batch, run.position.step, run.position.train_images),
    )


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def run_with_stops(start, stop_after, config, name, stops):
    """Train to the end, stopping at each of the given looks in turn and resuming; return the last of the runs."""
    for count, after in enumerate(stops):
        run = start(config, name, resume=count > 0)
        with pytest.raises(Interrupted):
            run.train(stop_after(after))
    run = start(config, name, resume=bool(stops))
    run.train(stop_after())
    return run


def looks_of(start, stop_after, config, name="whole"):
    """Train without a stop; return the run and how often it looked whether a stop was requested."""
    run, stop = start(config, name), stop_after()
    run.train(stop)
    return run, stop.looks


@pytest.mark.parametrize(("rule", "optimizer", "data"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_run_may_be_stopped_after_any_step_and_within_any_evaluation(
    make_config, start, stop_after, toy, rule, optimizer, data
):
    config = make_config(rule={"name": rule}, optimizer=optimizer, data={"dataset": str(toy), **DATA[data]})
    whole, looks = looks_of(start, stop_after, config)
    # 3 evaluations of 2 batches (20 images by 12), 2 epochs of 3 steps (45 images by 16).
    assert looks == 3 * 2 + 2 * 3
    expected = everything(whole)
    # FA is stopped at every look, the other rules at one look of each kind.
    for after in range(looks) if rule == "fa" else (1, 4, 6, 8):
        resumed = run_with_stops(start, stop_after, config, f"stopped-{after}", [after])
        assert everything(resumed) == expected, f"stopped at look {after}"


def test_a_run_may_have_more_steps_than_can_be_counted(make_config, start, stop_after):
    config = make_config(train={"epochs": 2**63 - 1, "batch_size": 16, "eval_batch_size": 12})
    with pytest.raises(Interrupted, match="epoch 2"):
        start(config).train(stop_after(2 + 3 + 2 + 1))


def test_the_summary_does_not_outlive_the_rows_before_it(make_config, start, stop_after, monkeypatch):
    """A power failure may lose rows appended to a file, but nothing of a file written by `write_file`."""
    config = make_config(rule={"name": "fa"})
    whole = start(config, "whole")
    whole.train(stop_after())
    monkeypatch.setattr("arraytp.training.tables.CsvTable.append", lambda table, *row: table.rows.append(_row(row)))
    lost = start(config, "lost")
    lost.train(stop_after())
    assert metrics(lost.folder) == metrics(whole.folder)
    for table in ("angles", "steps"):
        assert (lost.folder / f"{table}.csv").read_text() == (whole.folder / f"{table}.csv").read_text()


def _row(values):
    return ",".join(map(repr, values))


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_run_may_be_stopped_again_and_again(make_config, start, stop_after, toy, data):
    config = make_config(rule={"name": "fa"}, optimizer=ADAM, data={"dataset": str(toy), **data})
    whole, _ = looks_of(start, stop_after, config)
    # An evaluation that was interrupted starts over.
    for stops in ([0, 2, 0, 0, 1, 2, 0, 1], [2, 2, 4, 1]):
        resumed = run_with_stops(start, stop_after, config, f"stops-{len(stops)}", stops)
        assert everything(resumed) == everything(whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_number_format_and_loss_make_no_difference(make_config, start, stop_after, dtype, reduction):
    config = make_config(dtype=dtype, loss={"reduction": reduction}, rule={"name": "dfa"})
    whole, looks = looks_of(start, stop_after, config)
    resumed = run_with_stops(start, stop_after, config, "stopped", [looks // 2])
    assert everything(resumed) == everything(whole)
    assert {weight.dtype.name for weight in resumed.experiment.network.weights} == {dtype}


@pytest.mark.parametrize(
    "schedule", [{"name": "cosine", "t_max": 3}, {"name": "step", "epochs": [1, 2], "warmup_steps": 5}]
)
def test_more_epochs_give_what_they_would_have_given_at_once(make_config, start, stop_after, schedule):
    def epochs(count):
        return make_config(
            rule={"name": "fa"},
            optimizer=ADAM,
            train={"epochs": count, "batch_size": 16, "eval_batch_size": 12},
            schedule=schedule,
        )

    whole, _ = looks_of(start, stop_after, epochs(3))
    start(epochs(1), "grown").train(stop_after())
    for count in (2, 3):
        grown = start(epochs(count), "grown", resume=True)
        grown.train(stop_after())
    assert everything(grown) == everything(whole)


def limited(make_config, epochs, steps):
    return make_config(
        rule={"name": "fa"},
        optimizer=ADAM,
        train={"epochs": epochs, "batch_size": 16, "eval_batch_size": 12, "steps": steps},
        schedule={"name": "cosine", "t_max": 3},
        compare={"every": 1},
    )


def test_more_steps_give_what_they_would_have_given_at_once(make_config, start, stop_after):
    """An epoch has 3 steps: runs end within an epoch, at its end, and within a later one."""
    for counts in ([2, 6, 7], [1, 2, 3, 5]):
        name = f"grown-to-{counts[-1]}"
        for count in counts:
            grown = start(limited(make_config, 4, count), name, resume=count != counts[0])
            grown.train(stop_after())
            whole, _ = looks_of(start, stop_after, limited(make_config, 4, count), f"whole-{count}")
            assert everything(grown) == everything(whole)


def test_a_run_that_ends_within_an_epoch_may_be_stopped_anywhere(make_config, start, stop_after):
    config = limited(make_config, 4, 4)
    whole, looks = looks_of(start, stop_after, config)
    # 3 evaluations of 2 batches, the last within the second epoch, and 4 steps.
    assert looks == 3 * 2 + 4
    for after in range(looks):
        resumed = run_with_stops(start, stop_after, config, f"stopped-{after}", [after])
        assert everything(resumed) == everything(whole), f"stopped at look {after}"


def test_a_run_that_lost_its_summary_ends_again_where_it_ended(make_config, start, stop_after):
    config = limited(make_config, 4, 4)
    run, _ = looks_of(start, stop_after, config)
    expected, summary = everything(run), run.folder / "summary.json"
    summary.unlink()
    again = start(config, "whole", resume=True)
    again.train(stop_after())
    assert everything(again) == expected
    assert json.loads(summary.read_text())["steps"] == 4


def test_fewer_steps_than_are_trained_are_refused(make_config, start, stop_after):
    start(limited(make_config, 4, 4)).train(stop_after())
    with pytest.raises(UserError, match=r"checkpoint\.h5: has 4 steps already, but train\.steps is 3; set more"):
        start(limited(make_config, 4, 3), resume=True)


def test_rows_written_after_the_checkpoint_are_written_once(make_config, start, stop_after):
    """After a kill, the steps since the last checkpoint are repeated; the tables must not hold their rows twice."""
    config = make_config(rule={"name": "fa"}, compare={"every": 1})
    whole, looks = looks_of(start, stop_after, config)
    run = start(config, "killed")
    with pytest.raises(Interrupted):
        run.train(stop_after(looks // 2))
    for table, row in (("metrics.csv", "1,9.9,0.05,1,1,1,1,1,1\n"), ("angles.csv", "6,1,0,0.0,0.0\n6,1,1,0.")):
        with (run.folder / table).open("a") as file:
            file.write(row)
    resumed = start(config, "killed", resume=True)
    resumed.train(stop_after())
    assert everything(resumed) == everything(whole)


def test_a_checkpoint_written_in_passing_is_as_good_as_one_on_request(make_config, start, stop_after, monkeypatch):
    """Checkpoints at intervals must not disturb the run, and any of them may be the last before a kill."""
    plain, _ = looks_of(start, stop_after, make_config(rule={"name": "fa"}))
    train = {"epochs": 2, "batch_size": 16, "eval_batch_size": 12, "checkpoint_minutes": 1e-9}
    config = make_config(rule={"name": "fa"}, train=train)
    folders = itertools.count()
    copies = []

    run = start(config, "often")
    save = run._save

    def saved():
        save()
        copy = run.folder.with_name(f"copy-{next(folders)}")
        copy.mkdir()
        (copy / "checkpoint.h5").write_bytes((run.folder / "checkpoint.h5").read_bytes())
        copies.append(copy.name)

    monkeypatch.setattr(run, "_save", saved)
    run.train(stop_after())
    assert everything(run) == everything(plain)
    assert len(copies) == 2 * 3 + 1
    for name in copies:
        resumed = start(config, name, resume=True)
        resumed.train(stop_after())
        assert everything(resumed) == everything(plain)


def test_time_counts_on_over_a_stop(make_config, start, stop_after):
    config = make_config()
    with pytest.raises(Interrupted):
        start(config).train(stop_after(6))
    before = start(config, resume=True).position.seconds
    resumed = start(config, resume=True)
    resumed.train(stop_after())
    with (resumed.folder / "metrics.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= round(before, 3) > 0


def test_the_weights_of_the_checkpoint_are_those_at_the_stop(make_config, start, stop_after):
    config = make_config(optimizer=ADAM, rule={"name": "fa"})
    stopped = start(config)
    with pytest.raises(Interrupted, match=r"toy: stopped in epoch 1, step 2; .*checkpoint\.h5 is written"):
        stopped.train(stop_after(3))
    resumed = start(config, resume=True)
    for before, after in zip(stopped.experiment.network.weights, resumed.experiment.network.weights, strict=True):
        np.testing.assert_array_equal(before, after)
    assert resumed.position == stopped.position
    assert resumed.experiment.optimizer_state.step == 2


def test_a_run_of_a_version_without_steps_csv_goes_on_with_rows_without_numbers(
    make_config, start, stop_after, monkeypatch
):
    config = make_config(compare={"every": 1})
    run = start(config, "old")
    with pytest.raises(Interrupted):
        run.train(stop_after(4))
    read = loop.read_checkpoint

    def of_former_version(*arguments):
        state = read(*arguments)
        del state["steps"], state["position"]["recent"]
        return state

    monkeypatch.setattr(loop, "read_checkpoint", of_former_version)
    run_on = start(config, "old", resume=True)
    run_on.train(stop_after())
    whole, _ = looks_of(start, stop_after, config)
    resumed, expected = (
        read_csv(each.folder / "steps.csv", STEPS_COLUMNS, ("step",), unfinished=False) for each in (run_on, whole)
    )
    done = run.position.step
    assert 0 < done < len(expected["step"])
    np.testing.assert_array_equal(resumed["step"], expected["step"])
    np.testing.assert_array_equal(resumed["epoch"], expected["epoch"])
    assert np.isnan(resumed["train_loss"][:done]).all()
    np.testing.assert_array_equal(resumed["train_loss"][done:], expected["train_loss"][done:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rule", [{"name": "fa"}, {"name": "ldrl", "feedback": {"iterations": 2, "optimizer": SGD}}], ids=["fa", "ldrl"]
)
def test_graphs_and_stops_leave_the_bits_of_a_run_without_either(make_config, start, stop_after, rule):
    """By step 18, all is launched as CUDA graphs; comparisons, evaluations and smaller last batches come in between."""
    pytest.importorskip("cupy")
    train = {"epochs": 6, "batch_size": 16, "eval_batch_size": 12, "validation": 10}
    runs = []
    for graphs, stops in ((False, []), (True, []), (True, [9, 11])):
        config = make_config(backend="cupy", cuda_graphs=graphs, rule=rule, train=train)
        runs.append(everything(run_with_stops(start, stop_after, config, f"{graphs}-{len(stops)}", stops)))
    assert runs[0] == runs[1] == runs[2]
