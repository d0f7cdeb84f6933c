from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.errors import UserError
from arraytp.report.reading import read_csv, read_result, read_results
from arraytp.training.tables import METRICS_COLUMNS

Make = Callable[..., Path]


def test_every_number_is_read_as_it_was_written(make_result: Make) -> None:
    result = read_result(make_result())
    assert result.rule == "fa"
    assert result.finished
    assert result.epochs_planned == 2
    assert result.blocks == ["conv1", "conv2", "dense1", "dense2"]
    np.testing.assert_array_equal(result.metrics["train_loss"], [np.nan, 2.0, 1.0])
    np.testing.assert_array_equal(result.metrics["test_top1"], [10.0, 60.125, 60.25])
    np.testing.assert_array_equal(result.angles["step"], [0] * 4 + [10] * 4)
    np.testing.assert_array_equal(result.angles["angle_deg"], [30, 20, 10, 0, 40, 30, 20, 10])
    assert result.feedback["loss"].size == 0


@given(st.lists(st.tuples(*[st.floats()] * 8), max_size=5))
def test_floats_written_in_full_come_back_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    lines = [",".join([str(epoch), *map(repr, row)]) for epoch, row in enumerate(rows)]
    path.write_text("\n".join([",".join(METRICS_COLUMNS), *lines]) + "\n")
    table = read_csv(path, METRICS_COLUMNS, ("epoch",), unfinished=False)
    read = np.stack([table[name] for name in METRICS_COLUMNS[1:]], axis=1)
    np.testing.assert_array_equal(read, np.array(rows).reshape(-1, 8))


def test_undefined_angles_stay_nan(make_result: Make) -> None:
    result = read_result(make_result(angles={0: [float("nan"), 0.0]}, blocks=("a", "b")))
    np.testing.assert_array_equal(result.angles["angle_deg"], [np.nan, 0.0])


def test_an_unfinished_run_has_numbered_blocks_and_no_summary(make_result: Make) -> None:
    result = read_result(make_result(finished=False, planned=9))
    assert not result.finished
    assert result.summary is None
    assert result.epochs_planned == 9
    assert result.blocks == ["block 0", "block 1", "block 2", "block 3"]


@pytest.mark.parametrize(
    ("network", "blocks"),
    [
        ("name: lenet", ["conv1", "conv2", "dense1", "dense2"]),
        (
            "blocks: [{type: dense}, {type: conv}, {type: dense}, {type: conv}]",
            ["dense1", "conv1", "dense2", "conv2"],
        ),
        # Another number of blocks, damaged blocks, a name from another version, a damaged name.
        ("name: vgg", None),
        ("blocks: [3, {type: conv}, {type: conv}, {}]", None),
        ("name: resnet", None),
        ("name: [lenet]", None),
    ],
)
def test_blocks_of_an_unfinished_run_are_called_as_its_network_says(
    make_result: Make, network: str, blocks: list[str] | None
) -> None:
    folder = make_result(finished=False)
    with (folder / "config.yml").open("a") as config:
        config.write(f"network: {{{network}}}\n")
    assert read_result(folder).blocks == (blocks or ["block 0", "block 1", "block 2", "block 3"])


def test_a_run_that_has_only_begun_has_no_rows(make_result: Make) -> None:
    folder = make_result(finished=False)
    (folder / "metrics.csv").unlink()
    (folder / "angles.csv").write_text("")
    result = read_result(folder)
    assert result.metrics["epoch"].size == 0
    assert result.blocks == []


def test_the_line_being_written_is_left_out_while_the_run_has_not_finished(make_result: Make) -> None:
    folder = make_result(finished=False)
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,4.5,0.1,0.6,4")
    np.testing.assert_array_equal(read_result(folder).metrics["epoch"], [0, 1, 2])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metrics.csv", "1,1.5,0.1,2.0,", "1,1.5,0.1,2.O,", "metrics.csv, line 3: train_loss is '2.O', not a number"),
        ("metrics.csv", "2,3.0,0.1,", "2,3.0,", "metrics.csv, line 4: 8 values, but the header names 9"),
        ("metrics.csv", "60.25,90.0\n", "60.25,90.0", "metrics.csv, line 4: the line has no end"),
        (
            "metrics.csv",
            "epoch,seconds",
            "epoch,secs",
            "metrics.csv, line 1: the header lacks seconds; expected epoch,",
        ),
        ("metrics.csv", "\n2,3.0", "\n1,3.0", "metrics.csv, line 4: epoch 1 occurs twice"),
        ("metrics.csv", "\n2,3.0", "\n-2,3.0", "metrics.csv, line 4: epoch is -2, not a whole number from 0 on"),
        ("metrics.csv", "\n2,3.0", "\nnan,3.0", "metrics.csv, line 4: epoch is nan, not a whole number from 0 on"),
        ("metrics.csv", "\n1,1.5", "\n3,1.5", "metrics.csv, line 4: epoch 2 comes after epoch 3"),
        ("metrics.csv", "\n2,3.0", "\n3,3.0", "metrics.csv, line 4: epoch is 3, but 2 is due; rows are missing"),
        ("metrics.csv", "\n1,1.5", "\n\n1,1.5", "metrics.csv, line 3: 1 values"),
        ("metrics.csv", "60.25,90.0\n", "60.25,inf\n", "metrics.csv, line 4: test_top5 is inf, not from 0 to 100"),
        ("metrics.csv", "60.25,90.0\n", "-5,90.0\n", "metrics.csv, line 4: test_top1 is -5, not from 0 to 100"),
        ("angles.csv", "\n0,1,1,", "\n0,1,0,", "angles.csv, line 3: step 0, block 0 occurs twice"),
        ("angles.csv", "\n0,1,1,", "\n0,1,0.5,", "angles.csv, line 3: block is 0.5, not a whole number"),
        ("angles.csv", "\n10,1,3,", "\n10,1,4,", "angles.csv: block 4, but summary.json names 4 blocks"),
        ("angles.csv", "\n10,1,3,", "\n10,1,1e30,", "angles.csv, line 9: block is 1e+30, and no network has as many"),
        ("summary.json", '"rule"', "rule", "summary.json, line 1: not JSON"),
        ("summary.json", "{", "[{", "summary.json, line 1: not JSON"),
        ("summary.json", '["conv1"', '[1, "conv1"', "summary.json: blocks is [1, 'conv1'"),
        ("summary.json", '"epochs"', '"epoch"', "summary.json: epochs is None, not a whole number"),
        ("summary.json", "12345.6", '"fast"', "summary.json: images_per_second is 'fast', not a number"),
        ("config.yml", "name: demo", "name: [demo", "config.yml:2: not valid YAML"),
        ("config.yml", "rule:", "rules:", "config.yml: rule.name is missing"),
        ("config.yml", "epochs: 2", "epochs: two", "config.yml: train.epochs is 'two', not a whole number"),
    ],
)
def test_damage_is_reported_with_file_and_line(make_result: Make, file: str, old: str, new: str, message: str) -> None:
    folder = make_result()
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_result(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("angle", ["inf", "-inf", "1e300", "-400", "181"])
def test_what_is_no_angle_is_reported_with_its_line(make_result: Make, angle: str) -> None:
    path = make_result() / "angles.csv"
    lines = path.read_text().splitlines(keepends=True)
    cells = lines[3].split(",")
    lines[3] = ",".join([*cells[:3], angle, *cells[4:]])
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"angles.csv, line 4: angle_deg is .*, not from 0 to 180"):
        read_result(path.parent)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("metrics.csv", "ends with epoch 1, but summary.json says that the run has 2"),
        ("angles.csv", "7 rows, but 4 blocks every 10 of 20 steps make 8"),
        ("feedback.csv", "5 rows, but every 10 of 20 steps each block has one, 2 in all"),
        ("steps.csv", "1 rows, but one after every 10 of 20 steps makes 2"),
        ("metrics.csv", "ends with its header, but summary.json says"),
        ("angles.csv", "0 rows, but 4 blocks every 10 of 20 steps make 8"),
        ("feedback.csv", "0 rows, but every 10 of 20 steps each block has one"),
    ],
)
def test_a_table_of_a_finished_run_that_was_cut_at_a_lines_end_is_damage(
    make_result: Make, file: str, message: str
) -> None:
    folder = make_result(steps=20)
    rows = "".join(f"{step},1,{block},0.1,5.0,0.2\n" for step in (0, 10) for block in (1, 2, 3))
    (folder / "feedback.csv").write_text(f"step,epoch,block,loss,angle_deg,distance\n{rows}")
    read_result(folder)
    lines = (folder / file).read_text().splitlines(keepends=True)
    (folder / file).write_text("".join(lines[:1] if "header" in message or message.startswith("0") else lines[:-1]))
    with pytest.raises(UserError, match=f"{file}: {message}"):
        read_result(folder)


def test_an_empty_csv_of_a_finished_run_is_damage(make_result: Make) -> None:
    folder = make_result()
    (folder / "metrics.csv").write_text("")
    with pytest.raises(UserError, match=r"metrics\.csv, line 1: the header lacks epoch"):
        read_result(folder)


def test_a_finished_run_without_metrics_is_damage(make_result: Make) -> None:
    folder = make_result()
    (folder / "metrics.csv").unlink()
    (folder / "summary.json").write_text('{"epochs": 2}')
    with pytest.raises(UserError, match=r"metrics\.csv: is missing, but summary\.json says that the run has 2 epochs"):
        read_result(folder)


def test_bytes_that_are_no_text_are_reported_with_their_line(make_result: Make) -> None:
    folder = make_result()
    content = (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").write_bytes(content.replace(b"\n1,", b"\n\xff,"))
    with pytest.raises(UserError, match=r"metrics\.csv, line 3: not UTF-8 text"):
        read_result(folder)


def test_a_summary_that_is_no_object_is_refused(make_result: Make) -> None:
    folder = make_result()
    (folder / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match=r"summary\.json: holds a list"):
        read_result(folder)


def test_a_folder_without_results_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a result folder: neither it nor a folder in it holds"):
        read_results([tmp_path])
    with pytest.raises(UserError, match="is not a result folder: it holds no"):
        read_result(tmp_path)
    with pytest.raises(UserError, match="absent: no such folder"):
        read_results([tmp_path / "absent"])


def test_a_folder_of_variants_is_expanded_with_bp_first_and_numbers_in_order(make_result: Make) -> None:
    for name in ("lr-10", "lr-2", "bp"):
        make_result(f"results/{name}")
    (make_result("results/afa").parent / "figures").mkdir()
    labels = [result.label for result in read_results([make_result("results/z").parent])]
    assert labels == ["bp", "afa", "lr-2", "lr-10", "z"]


def test_runs_are_found_at_any_depth_and_each_folder_has_bp_first(make_result: Make) -> None:
    for name in ("b/fa", "b/bp", "a/deep/lr-10", "a/deep/lr-2", "z"):
        make_result(f"results/{name}")
    labels = [result.label for result in read_results([make_result("results/y").parent])]
    assert labels == ["a/deep/lr-2", "a/deep/lr-10", "b/bp", "b/fa", "y", "z"]


def test_labels_tell_runs_of_different_folders_apart(make_result: Make) -> None:
    first, second = make_result("a/fa"), make_result("b/fa")
    assert [result.label for result in read_results([first.parent, second])] == ["a/fa", "b/fa"]


def test_a_folder_given_twice_is_one_run(make_result: Make) -> None:
    folder = make_result("results/fa")
    assert len(read_results([folder, folder.parent, folder / ".." / "fa"])) == 1
