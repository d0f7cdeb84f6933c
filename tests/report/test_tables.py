import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from arraytp.report.figures import angles_over_time, comparison
from arraytp.report.reading import read_results
from arraytp.report.tables import comparison_table, csv_table, markdown_table

Make = Callable[..., Path]
NAN = float("nan")
DASH = "\N{EN DASH}"
GOLDEN = """\
                       train   test   best   test             conv1   conv2  dense1  dense2
run      rule  epochs   loss  top-1  top-1  top-5  images/s  angle°  angle°  angle°  angle°
───────────────────────────────────────────────────────────────────────────────────────────
bp       bp         2  1.000  60.25  60.25  90.00    12,346     0.0     0.0     0.0     0.0
fa       fa         2  1.000  60.25  60.25  90.00    12,346    35.0    25.0    15.0     5.0
stopped  dfa   1 of 3  2.000  60.12  60.12  90.00         –       –       –       –       –

top-1, top-5: accuracy in percent, test at the end of the last epoch, best over all epochs of test.
angle°: mean angle in degrees between the weight update and BP's on the same batch and weights.
Not finished: stopped.
"""


def compared_with_gnt(folder: Path) -> None:
    """Make a result folder that of a run compared with GNT, with angles of 40 + 2n degrees in block n."""
    config, (head, *rows) = folder / "config.yml", (folder / "angles.csv").read_text().splitlines()
    config.write_text(config.read_text() + "  against: [bp, gnt]\n")
    rows = [f"{row},{40 + 2 * int(row.split(',')[2])}" for row in rows]
    (folder / "angles.csv").write_text("\n".join([f"{head},gnt_angle_deg", *rows]) + "\n")


@pytest.fixture
def three_runs(make_result: Make) -> Path:
    make_result("results/bp", "bp", angles={0: [0.0] * 4})
    make_result("results/stopped", "dfa", epochs=1, planned=3, finished=False, angles={})
    return make_result("results/fa").parent


def test_the_text_table_is_this_one(three_runs: Path) -> None:
    assert comparison_table(read_results([three_runs])) == GOLDEN


def test_undefined_angles_are_marked_and_explained_never_averaged_in(make_result: Make) -> None:
    angles = {0: [NAN, 20.0, 8.0], 10: [NAN, NAN, 9.0]}
    text = comparison_table(read_results([make_result(angles=angles, blocks=("a", "b", "c"))]))
    row = text.splitlines()[3]
    assert row.split()[-3:] == ["undef.", "20.0*", "8.5"]
    assert "*: without the steps at which an update was zero or not finite (fa)." in text
    assert "undef.: at every step an update was zero or not finite (fa)." in text


def test_angles_that_do_not_fit_follow_in_tables_of_their_own(make_result: Make) -> None:
    folder = make_result("results/a-variant-with-a-name-of-more-than-thirty-characters", blocks=tuple("abcdefghij"))
    text = comparison_table(read_results([folder]))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("─\n") == 3
    assert "a-variant-with-a-name-of-" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    narrow = comparison_table(read_results([folder]), width=70)
    assert max(map(len, narrow.splitlines()[-14:])) <= 70
    for value in range(5, 96, 10):
        assert f" {value}.0" in narrow


def test_four_blocks_fit_in_one_table_of_a_hundred_columns(make_result: Make) -> None:
    text = comparison_table(read_results([make_result("results/gait-prop", "gait-prop")]))
    assert text.count("─\n") == 1
    assert max(map(len, text.splitlines())) <= 100


def test_nothing_measured_is_said_not_shown_as_zero(make_result: Make) -> None:
    folder = make_result(epochs=0, angles={})
    text = comparison_table(read_results([folder]))
    assert "There are no angles to BP." in text
    assert text.splitlines()[3].split() == ["fa", "fa", "0", DASH, "10.00", "10.00", "50.00", "12,346"]
    (folder / "metrics.csv").unlink()
    (folder / "summary.json").unlink()
    assert comparison_table(read_results([folder])).splitlines()[3].split()[2:] == ["0", "of", "0"] + [DASH] * 5


def test_blocks_of_different_networks_are_numbered(make_result: Make) -> None:
    make_result("results/one", blocks=("conv1", "dense1"))
    folder = make_result("results/two", blocks=("dense1", "dense2", "dense3")).parent
    lines = comparison_table(read_results([folder])).splitlines()
    assert lines[0].split()[-6:] == ["block", "0", "block", "1", "block", "2"]
    assert lines[3].split()[-3:] == ["15.0", "5.0", DASH]


def test_an_unfinished_run_borrows_the_labels_of_its_neighbours(make_result: Make) -> None:
    make_result("results/a", finished=False)
    folder = make_result("results/b").parent
    header = comparison_table(read_results([folder])).splitlines()[0]
    assert header.split()[-4:] == ["conv1", "conv2", "dense1", "dense2"]


def test_csv_keeps_every_digit_and_leaves_unmeasured_cells_empty(three_runs: Path) -> None:
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(csv_table(read_results([three_runs]))))}
    assert list(rows) == ["bp", "fa", "stopped"]
    assert rows["fa"]["images_per_second"] == "12345.6"
    assert rows["fa"]["final_test_top1"] == rows["fa"]["best_test_top1"] == "60.25"
    assert (rows["fa"]["angle_conv1"], rows["fa"]["angle_conv1_sd"]) == ("35.0", "5.0")
    assert rows["stopped"]["final_test_top1"] == "60.125"
    assert rows["stopped"]["finished"] == "no"
    assert rows["stopped"]["angle_conv1"] == rows["stopped"]["images_per_second"] == ""


def test_an_undefined_angle_is_nan_in_the_csv(make_result: Make) -> None:
    results = read_results([make_result(angles={0: [NAN, 1.5]}, blocks=("a", "b"))])
    (row,) = csv.DictReader(io.StringIO(csv_table(results)))
    assert (row["angle_a"], row["angle_b"]) == ("nan", "1.5")


def test_the_best_epoch_need_not_be_the_last(make_result: Make) -> None:
    folder = make_result()
    text = (folder / "metrics.csv").read_text().replace("60.125", "77.5")
    (folder / "metrics.csv").write_text(text)
    assert comparison_table(read_results([folder])).splitlines()[3].split()[4:6] == ["60.25", "77.50"]


def test_markdown_has_the_same_cells_and_escapes_bars(make_result: Make) -> None:
    results = read_results([make_result("results/a|b")])
    header, rule, row, *_ = markdown_table(results).splitlines()
    assert header.startswith("| run | rule | epochs | train loss |")
    assert rule.count("---") == header.count(" | ") + 1
    assert row == r"| a\|b | fa | 2 | 1.000 | 60.25 | 60.25 | 90.00 | 12,346 | 35.0 | 25.0 | 15.0 | 5.0 |"


def test_angles_to_gnt_stand_beside_those_to_bp(make_result: Make) -> None:
    """BP, at 0° to itself, is 40 + 2n° from GNT; a run that was not compared with GNT has a dash."""
    folder = make_result("results/bp", "bp", angles={0: [0.0, 0.0]}, blocks=("a", "b"))
    compared_with_gnt(folder)
    make_result("results/fa", blocks=("a", "b"))
    results = read_results([folder.parent])
    lines = comparison_table(results).splitlines()
    assert [line.split()[-4:] for line in (lines[1], *lines[3:5])] == [
        ["angle°", "angle°", "GNT°", "GNT°"],
        ["0.0", "0.0", "40.0", "42.0"],
        ["15.0", "5.0", DASH, DASH],
    ]
    bp, fa = csv.DictReader(io.StringIO(csv_table(results)))
    assert (bp["gnt_angle_b"], bp["angle_b"], fa["gnt_angle_b"]) == ("42.0", "0.0", "")
    panels = comparison(results).axes
    assert [axes.get_ylabel() for axes in panels[:2]] == [f"angle to {name}'s update (°)" for name in ("BP", "GNT")]
    assert [list(axes.lines[0].get_ydata()) for axes in panels[:2]] == [[10.0, 20.0], [40.0]]
    left, right = angles_over_time(results[0]).axes
    assert "this is BP" in left.texts[0].get_text()
    assert [list(line.get_ydata()) for line in right.lines] == [[40.0], [42.0]]


def test_a_seed_without_an_angle_leaves_the_mean_of_the_others(make_result: Make, tmp_path: Path) -> None:
    make_result("results/fa/seed-0", blocks=("a", "b"), angles={0: [NAN, 1], 10: [NAN, 1]})
    make_result("results/fa/seed-1", blocks=("a", "b"), angles={0: [20, 1], 10: [30, 1]})
    make_result("results/fa/seed-2", blocks=("a", "b"), angles={0: [40, 1], 10: [50, 1]})
    text = comparison_table(read_results([tmp_path / "results"]), width=200)
    assert "35.0 ± 14.1*" in text
    assert "*: without the steps at which an update was zero or not finite (fa)." in text
    assert "undef" not in text
