"""Means over seeds, compared with numbers worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arraytp.report.figures import comparison
from arraytp.report.reading import read_results
from arraytp.report.seeds import averaged, over_seeds, seeds_table
from arraytp.report.tables import comparison_table, csv_table

Make = Callable[..., Path]


@pytest.fixture
def three_seeds(make_result: Make) -> Path:
    """A run of BP, and three of FA with final test accuracies of 60, 62, 64 and angles of block 0 of 35, 38, 41."""
    make_result("results/bp/seed-3", "bp", angles={0: [0.0] * 4})
    for n in range(3):
        folder = make_result(f"results/fa/seed-{n}", angles={0: [35.0 + 3 * n, 20, 10, 0]})
        config = (folder / "config.yml").read_text().replace("seed: 3", f"seed: {n}")
        (folder / "config.yml").write_text(config)
        head, first, second, _ = (folder / "metrics.csv").read_text().splitlines()
        last = f"2,3.0,0.1,1.0,42.0,82.0,1.1,{60 + 2 * n},9{n}.0"
        (folder / "metrics.csv").write_text("\n".join([head, first, second, last]) + "\n")
    return folder.parent.parent


def test_seeds_are_one_row_of_mean_and_deviation(three_seeds: Path) -> None:
    """60, 62, 64: mean 62, standard deviation 2; best accuracies are 60.125 (epoch 1), 62, 64."""
    text = comparison_table(read_results([three_seeds]), width=200)
    (row,) = [line for line in text.splitlines() if line.startswith("fa ")]
    assert "62.00 ± 2.00  62.04 ± 1.94  91.00 ± 1.00" in row
    assert "38.0 ± 3.0  20.0 ± 0.0" in row
    assert "seeds: 3 (fa)" in text


def test_a_seed_that_has_not_finished_is_named_and_left_out(three_seeds: Path) -> None:
    """A diverged run's accuracy would otherwise spoil the mean."""
    (three_seeds / "fa/seed-1/summary.json").unlink()
    text = comparison_table(read_results([three_seeds]), width=200)
    assert "62.00 ± 2.83" in text
    assert "Not finished: fa/seed-1." in text


def test_one_finished_seed_has_no_deviation(three_seeds: Path) -> None:
    for n in (0, 1):
        (three_seeds / f"fa/seed-{n}/summary.json").unlink()
    text = comparison_table(read_results([three_seeds]), width=200)
    assert "Not finished: fa/seed-0, fa/seed-1." in text
    assert "64.00" in text
    assert "±" not in text


def test_the_csv_of_a_comparison_keeps_every_run(three_seeds: Path) -> None:
    labels = [line.split(",")[0] for line in csv_table(read_results([three_seeds])).splitlines()]
    assert labels == ["run", "bp/seed-3", "fa/seed-0", "fa/seed-1", "fa/seed-2"]


def test_runs_of_other_settings_are_not_averaged(three_seeds: Path) -> None:
    config = three_seeds / "fa/seed-1/config.yml"
    config.write_text(config.read_text().replace("every: 10", "every: 5"))
    (three_seeds / "fa/seed-1/summary.json").unlink()
    assert [result.label for result in averaged(read_results([three_seeds]))] == ["bp/seed-3", "fa", "fa/seed-1"]


def test_bands_are_one_deviation_wide(three_seeds: Path) -> None:
    figure = comparison(read_results([three_seeds]))
    (band,) = figure.axes[3].collections
    vertices = band.get_paths()[0].vertices
    assert vertices[np.isclose(vertices[:, 0], 2), 1].min() == pytest.approx(60)
    assert vertices[np.isclose(vertices[:, 0], 2), 1].max() == pytest.approx(64)
    (angles,) = figure.axes[0].collections
    assert np.ptp(angles.get_paths()[0].vertices[:, 1]) == pytest.approx(2)


def test_losses_of_diverged_runs_warn_of_nothing() -> None:
    """NumPy's warnings would appear within the table of seeds; in tests, warnings are errors."""
    mean, deviation = over_seeds([np.array([1e200, np.inf, 1.0]), np.array([-1e200, np.inf, 3.0])])
    np.testing.assert_array_equal(mean, [0, np.inf, 2])
    np.testing.assert_allclose(deviation, [np.inf, np.nan, 2**0.5])


def test_seeds_csv_has_a_row_a_run(three_seeds: Path) -> None:
    (three_seeds / "fa/seed-1/summary.json").unlink()
    results = read_results([three_seeds])
    assert seeds_table(results, results, three_seeds).splitlines() == [
        "variant,seed,final_test_top1,final_test_top5,best_test_top1,best_test_top5",
        "bp,3,60.25,90.0,60.25,90.0",
        "fa,0,60.0,90.0,60.125,90.0",
        "fa,1,,,,",
        "fa,2,64.0,92.0,64.0,92.0",
    ]


def test_seeds_csv_leaves_out_other_settings_beside_the_latest_runs(three_seeds: Path) -> None:
    """Nothing is left out of a variant that has none of the latest runs."""
    for name in ("fa/seed-1", "bp/seed-3"):
        config = three_seeds / name / "config.yml"
        config.write_text(config.read_text().replace("every: 10", "every: 5"))
    latest = read_results([three_seeds / "fa/seed-0"])
    rows = seeds_table(read_results([three_seeds]), latest, three_seeds).splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [["bp", "3"], ["fa", "0"], ["fa", "2"]]


def test_seeds_that_are_not_equally_far_have_the_angles_that_there_are(make_result: Make, tmp_path: Path) -> None:
    make_result("results/bp", "bp")
    make_result("results/fa/seed-0", finished=False, angles={0: [35.0, 20, 10, 0]})
    make_result("results/fa/seed-1", finished=False, angles={})
    text = comparison_table(read_results([tmp_path / "results"]), width=200)
    (row,) = [line for line in text.splitlines() if line.startswith("fa ")]
    assert "35.0" in row
