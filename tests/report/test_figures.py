import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from arraytp.errors import UserError
from arraytp.report.angles import block_angles, hidden_mean
from arraytp.report.figures import (
    angles_over_time,
    angles_per_block,
    comparison,
    learning_curves,
    write_comparison,
    write_figures,
)
from arraytp.report.panels import running_mean
from arraytp.report.reading import read_result, read_results
from arraytp.report.seeds import averaged
from arraytp.report.studies import StudyResult, alignment_figure, drift_figure, update_figure
from arraytp.report.style import RULE_COLOURS, looks

Make = Callable[..., Path]
NAN = float("nan")
EIGHT = (*(f"conv{n}" for n in range(1, 8)), "dense1")


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_the_figures_of_a_run_are_pngs_of_readable_size_in_its_folder(make_result: Make) -> None:
    folder = make_result()
    files = write_figures(folder)
    names = ["learning_curves.png", "angles_over_time.png", "angles_per_block.png"]
    assert files == [folder / "figures" / name for name in names]
    for file in files:
        width, height = png_size(file)
        assert 900 <= width <= 2000
        assert 500 <= height <= 1500


def test_a_run_without_angles_has_no_figure_of_their_course(make_result: Make) -> None:
    """BP is not compared with itself, and other rules need not be compared either."""
    for name, rule in (("results/bp", "bp"), ("results/fa", "fa")):
        files = write_figures(make_result(name, rule, angles={}))
        assert [file.name for file in files] == ["learning_curves.png", "angles_per_block.png"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_single_and_constant_numbers_are_seen(make_result: Make, epochs: int) -> None:
    """A point without a marker draws nothing, and a line on the edge of the axes loses half its width."""
    folder = make_result(epochs=epochs)
    text = (folder / "metrics.csv").read_text().splitlines()
    rows = [",".join([*line.split(",")[:3], *["100.0"] * 6]) for line in text[1:]]
    (folder / "metrics.csv").write_text("\n".join([text[0], *rows]) + "\n")
    for axes in learning_curves(read_result(folder)).axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            assert line.get_marker() == "o"
            assert low < 100.0 < high
            assert left < min(line.get_xdata()) <= max(line.get_xdata()) < right


def test_a_comparison_is_a_picture_and_two_tables(make_result: Make, tmp_path: Path) -> None:
    make_result("results/bp", "bp")
    results = read_results([make_result("results/fa").parent])
    picture, markdown, table = write_comparison(results, tmp_path / "new" / "out")
    assert png_size(picture)[0] == 1500
    assert markdown.read_text(encoding="utf-8").startswith("| run |")
    assert table.read_text(encoding="utf-8").startswith("run,rule,seed")


def test_accuracies_of_few_epochs_are_drawn_over_the_steps(make_result: Make) -> None:
    """Training is a line, test a ring at its end; with many epochs or no steps.csv, both are drawn over epochs."""
    short, long = (read_result(make_result(f"results/{epochs}", steps=20, epochs=epochs)) for epochs in (2, 9))
    _, _, accuracy = comparison([short]).axes
    np.testing.assert_array_equal(accuracy.lines[0].get_data(), [[10, 20], [20, 30]])
    np.testing.assert_array_equal(accuracy.collections[0].get_offsets(), [[20, 60.25]])
    for results in ([short, long], [replace(short, steps={**short.steps, "step": np.empty(0)})]):
        assert len(comparison(results).axes) == 4


def test_an_untrained_network_does_not_flatten_a_long_training(make_result: Make) -> None:
    """Test accuracy is 10 % in epoch 0, then 60.1 % and more; training accuracy starts at 41 %."""
    long, short = (read_result(make_result(f"results/{n}", epochs=n, angles={})) for n in (10, 9))
    assert [axes.get_ylim()[0] > 35 for axes in comparison([long]).axes[2:]] == [True, True]
    assert comparison([short]).axes[3].get_ylim()[0] < 10
    # Both panels share their y axis, so neither may cut off the other's line.
    low, high = comparison([long]).axes[2].get_ylim()
    assert low < 41
    assert high > 61.25


def test_epochs_are_marked_where_all_runs_are_short(make_result: Make) -> None:
    short, long = (read_result(make_result(f"results/{n}", epochs=n, angles={})) for n in (9, 31))
    for results, marker in (([short], "o"), ([short, long], "")):
        for axes in comparison(results).axes[2:]:
            assert {line.get_marker() for line in axes.lines[: len(results)]} == {marker}


def with_metrics(folder: Path, **columns: list[float]) -> Path:
    """Replace columns of metrics.csv."""
    head, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[head.index(name)] = str(value)
    (folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in (head, *rows)))
    return folder


def test_fitted_axes_cut_off_nothing_but_the_untrained_network(make_result: Make) -> None:
    trained = [90.0 + n / 5 for n in range(10)]
    folder = make_result("results/a", epochs=10, angles={})
    scored = with_metrics(folder, train_top1=[10, *trained], test_top1=[10, *[n - 40 for n in trained]])
    low, high = comparison([read_result(scored)]).axes[2].get_ylim()
    assert low < 50
    assert high > 91.8
    seeds = [
        with_metrics(
            make_result(f"results/b/seed-{n}", epochs=10, angles={}),
            train_top1=[NAN, *trained],
            test_top1=[10, *[value + spread for value in trained]],
        )
        for n, spread in enumerate((-3, 0, 3))
    ]
    axes = comparison(read_results(seeds)).axes[3]
    low, high = axes.get_ylim()
    assert low < 87
    assert high > 93
    begun = make_result("results/c", epochs=0, planned=10, finished=False, angles={})
    assert comparison([read_result(scored), read_result(begun)]).axes[3].get_ylim()[0] < 10


def test_drawing_leaves_the_users_matplotlib_as_it_was(make_result: Make, tmp_path: Path) -> None:
    results = [read_result(make_result())]
    with matplotlib.rc_context({"font.size": 7.5}):
        write_comparison(results, tmp_path)
        assert matplotlib.rcParams["font.size"] == 7.5


def test_a_folder_that_cannot_be_written_is_the_users_mistake(make_result: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"learning_curves\.png: cannot be written: .*--out"):
        write_figures(make_result(), tmp_path / "file")


def test_bars_stand_at_the_mean_angles(make_result: Make) -> None:
    result = read_result(make_result())
    bars = angles_per_block(result).axes[0].patches
    assert [bar.get_height() for bar in bars] == [35.0, 25.0, 15.0, 5.0]
    assert [angle.deviation for angle in block_angles(result)] == [5.0] * 4


def test_lines_are_the_columns_of_the_files(make_result: Make) -> None:
    result = read_result(make_result())
    loss, accuracy = learning_curves(result).axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [NAN, 2.0, 1.0])
    np.testing.assert_array_equal(accuracy.lines[1].get_ydata(), [10.0, 60.125, 60.25])
    conv1 = angles_over_time(result).axes[0].lines[0]
    np.testing.assert_array_equal(conv1.get_xdata(), [0, 10])
    np.testing.assert_array_equal(conv1.get_ydata(), [30, 40])


def test_the_mean_over_steps_leaves_out_the_output_block_and_keeps_gaps(make_result: Make) -> None:
    result = read_result(make_result(angles={0: [40, 20, 0], 5: [NAN, 20, 0], 9: [30, 20, 0]}, blocks=("a", "b", "c")))
    steps, angles = hidden_mean(result)
    np.testing.assert_array_equal(steps, [0, 5, 9])
    np.testing.assert_array_equal(angles, [30, NAN, 25])


def test_an_only_block_is_its_own_mean(make_result: Make) -> None:
    result = read_result(make_result(angles={0: [7.0]}, blocks=("dense1",)))
    np.testing.assert_array_equal(hidden_mean(result)[1], [7.0])


@pytest.mark.parametrize("reach", [0, 1, 7])
def test_the_running_mean_keeps_constants_and_gaps(reach: int) -> None:
    values = np.array([3.0, 3.0, NAN, 3.0, 3.0])
    np.testing.assert_allclose(running_mean(values, reach), values)


def test_the_running_mean_averages_neighbours_but_not_with_the_untrained_start() -> None:
    np.testing.assert_allclose(
        running_mean(np.array([90.0, 0.0, 3.0, 6.0, 0.0]), 1, apart=True), [90.0, 1.5, 3.0, 3.0, 3.0]
    )
    np.testing.assert_allclose(running_mean(np.array([7.0, 1.0]), 3, apart=True), [7.0, 1.0])
    np.testing.assert_allclose(running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 1), [1.5, 3.0, 3.0, 3.0])


def test_only_measurements_at_step_0_stand_apart_from_the_mean(make_result: Make) -> None:
    """Angles are measured before the first step, accuracies over the steps since the last row."""
    folder = make_result(steps=990, angles={10 * n: [90 - n / 2, 0.0] for n in range(99)}, blocks=("a", "b"))
    angles, _, accuracies = comparison([read_result(folder)]).axes
    smooth = [np.asarray(axes.lines[1].get_ydata())[:2].tolist() for axes in (angles, accuracies)]
    # The means of up to two neighbours on either side.
    assert smooth == [[90.0, 89.0], [30.0, 35.0]]


def test_empty_axes_say_why(make_result: Make) -> None:
    assert texts(angles_per_block(read_result(make_result("a", angles={})))) == "not measured"
    assert texts(angles_per_block(read_result(make_result("b", "bp", angles={0: [0.0] * 4})))).startswith("0° by def")
    dead = read_result(make_result("c", angles={0: [NAN, 0.0]}, blocks=("x", "y")))
    assert "undefined" in texts(angles_per_block(dead))
    assert texts(angles_over_time(dead)).endswith("undefined at every step: x")
    assert "undefined at every step: c" in texts(comparison([dead]))


def test_bp_is_not_drawn_among_the_angles_unless_it_differs_from_itself(make_result: Make) -> None:
    make_result("results/bp", "bp", angles={0: [0.001] * 4})
    results = read_results([make_result("results/fa").parent])
    assert len(comparison(results).axes[1].patches) == 4
    make_result("other/bp", "bp", angles={0: [3.0] * 4})
    results = read_results([make_result("other/fa").parent])
    assert len(comparison(results).axes[1].patches) == 8


def test_rules_keep_their_colours_and_their_runs_differ(make_result: Make) -> None:
    for name, rule in (("a", "bp"), ("b", "fa"), ("c", "fa"), ("d", "something-new")):
        folder = make_result(f"results/{name}", rule)
    given = looks(read_results([folder.parent]))
    assert [given[0].colour, given[1].colour] == [RULE_COLOURS["bp"], RULE_COLOURS["fa"]]
    assert len({(look.colour, look.dash) for look in given}) == 4


def test_twelve_runs_of_one_rule_all_look_different(make_result: Make) -> None:
    for n in range(12):
        folder = make_result(f"results/lr-{n}")
    assert len({(look.colour, look.dash) for look in looks(read_results([folder.parent]))}) == 12


@pytest.mark.parametrize("case", ["zero epochs", "no rows", "long run", "long names"])
def test_unusual_runs_are_drawn_without_warnings(make_result: Make, tmp_path: Path, case: str) -> None:
    if case == "zero epochs":
        make_result("results/a", epochs=0, angles={})
    elif case == "no rows":
        (make_result("results/a", finished=False, angles={}) / "metrics.csv").unlink()
    elif case == "long run":
        make_result("results/a", epochs=60, angles={s: [50.0 + s % 7, 0.0] for s in range(200)}, blocks=("a", "b"))
    else:
        for n in range(6):
            make_result(f"results/{'a-long-name-' * 6}{n}", ("fa", "dfa")[n % 2], blocks=EIGHT)
    results = read_results([tmp_path / "results"])
    write_figures(results[0], tmp_path / "figures")
    width, height = png_size(write_comparison(results, tmp_path / "out")[0])
    assert 1000 <= height <= 1.2 * width


@pytest.mark.parametrize("epochs", [7, 40, 90, 200, 1000])
def test_numbers_along_the_epochs_stand_apart(make_result: Make, epochs: int) -> None:
    """A comparison has the narrowest panels."""
    figure = comparison([read_result(make_result(epochs=epochs))])
    figure.draw_without_rendering()
    for axes in figure.axes:
        shown = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        low, high = axes.get_window_extent().intervalx
        inside = [extent for extent in shown if low <= (extent.x0 + extent.x1) / 2 <= high]
        assert all(before.x1 + 5 < after.x0 for before, after in pairwise(inside))


def test_a_block_has_one_colour_in_all_panels_of_drift() -> None:
    """The legend is that of the deepest network, so it contains all blocks."""
    studies = [
        StudyResult("s", [f"dense{n + 1}" for n in range(depth)], *([np.zeros((1, depth))] * 2),
                    *([np.zeros((1, 2, depth))] * 2), [], 0.0, drift=True)
        for depth in (2, 4, 3)
    ]  # fmt: skip
    figure = drift_figure(studies)
    shallow, deep, _ = ([line.get_color() for line in axes.lines] for axes in figure.axes)
    assert (len(shallow), shallow) == (2, deep[:2])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense1", "dense2", "dense3", "dense4"]


def test_dollars_in_a_name_are_drawn(make_result: Make, tmp_path: Path) -> None:
    """Matplotlib parses text between two dollars as mathematics, in which a lone underscore is an error."""
    folder = make_result("results/a$_$b")
    write_figures(folder)
    write_comparison([read_result(folder), read_result(make_result("results/bp", "bp"))], tmp_path)
    assert (tmp_path / "comparison.png").exists()


def test_bars_of_one_seed_are_as_high_as_its_angles(make_result: Make) -> None:
    """A single seed has no standard deviation, which must not hide its mean."""
    folder = make_result("results/fa/seed-0", angles={0: [85.0, 80.0, 0.0]}, blocks=("a", "b", "c"))
    make_result("results/fa/seed-1", finished=False, angles={}, blocks=("a", "b", "c"))
    results = averaged(read_results([folder.parent]))
    axes = comparison(results).axes
    (bars,) = [each for each in axes if each.patches]
    assert bars.get_ylim()[1] > 85


def test_a_square_first_block_is_drawn_over_its_own_drift() -> None:
    for own, drawn in (([5.0, 6.0], [5.0, 6.0]), ([NAN, NAN], [1.0, 2.0])):
        distance = np.stack([np.array(own), np.array([1.0, 2.0])], axis=1)[None]
        study = StudyResult(
            "s", ["a", "b"], np.zeros((1, 2)), np.zeros(2), np.ones((1, 2, 2)), distance, [], 0.0, drift=True
        )
        line = drift_figure([study]).axes[0].lines[0]
        assert list(line.get_xdata()) == drawn


def test_studies_have_the_colours_of_their_rules_unless_a_rule_has_several_lines() -> None:
    angle = np.array([[[90.0, 80.0], [10.0, 30.0]]])
    studies = [
        StudyResult(rule, ["a", "b"], np.zeros((1, 2)), np.array([0.0, 50.0]), angle[..., :blocks], angle[..., :blocks],
                    list(range(blocks)), 0.0, rule=rule)
        for rule, blocks in (("ldrl", 1), ("drl", 1), ("drl", 2))
    ]  # fmt: skip
    of_rules, mixed = (
        [line.get_color() for line in alignment_figure(some).axes[0].lines] for some in (studies[:2], studies)
    )
    assert of_rules == [RULE_COLOURS["ldrl"], RULE_COLOURS["drl"]]
    assert len(set(mixed)) == 4


def test_a_study_whose_name_begins_with_an_underscore_is_in_the_legend() -> None:
    angle = np.array([[[90.0], [10.0]]])
    studies = [
        StudyResult(name, ["conv1", "conv2"], np.zeros((1, 2)), np.array([0.0, 50.0]), angle, angle, [1], 0.0)
        for name in ("_slow", "fast")
    ]
    (legend,) = alignment_figure(studies).legends
    assert [text.get_text() for text in legend.get_texts()] == ["_slow, conv2", "fast, conv2"]


def test_what_a_study_draws_are_means_over_its_seeds() -> None:
    angle = np.array([[[90.0, 1.0], [10.0, 3.0]], [[80.0, 3.0], [20.0, 5.0]]])
    updates, steps = np.array([[40.0, 20.0], [60.0, 40.0]]), np.array([0.0, 50.0])
    of = StudyResult("s", ["a", "b"], updates, steps, angle, angle / 8, [0, 1], 0.0)
    for axes, scale in zip(alignment_figure([of]).axes, (1, 8), strict=True):
        assert [[scale * y for y in np.asarray(line.get_ydata())] for line in axes.lines] == [[85, 15], [2, 4]]
    assert [bar.get_height() for bar in update_figure([of]).axes[0].patches] == [50, 30]  # type: ignore[attr-defined]
    lines = drift_figure([of]).axes[0].lines
    drawn = [[np.asarray(values).tolist() for values in (line.get_xdata(), line.get_ydata())] for line in lines]
    assert drawn == [[[85 / 8, 15 / 8], [85, 15]], [[2 / 8, 4 / 8], [2, 4]]]
