"""docs/results: the table and results.json match published.csv, README's numbers are in its rows, configs exist."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from arraytp.report.reading import read_result

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
ROWS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def collect():
    return script("collect")


def test_page_and_json_are_what_the_script_makes(collect):
    """If this fails, run `python docs/results/collect.py`."""
    for path, text in collect.made().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_a_row_with_kept_runs_is_their_mean(collect, tmp_path, monkeypatch):
    """The mean is over the runs' last epochs; runs of fewer epochs than planned are unfinished, at any accuracy."""
    home = tmp_path / "docs" / "results"
    head = (FOLDER / "published.csv").read_text(encoding="utf-8").splitlines()[0]
    row = "DTP,Table 1,CIFAR-10,BP,86.34,0.35,,,,not run,arraytp run x.yml,,,bp:test_top1"
    for seed, top1 in enumerate((85.0, 86.0)):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        config = f"seed: {seed}\ndata: {{dataset: {tmp_path}/images}}\n"
        (folder / "config.yml").write_text(config, encoding="utf-8")
        (folder / "metrics.csv").write_text(f"epoch,seconds,test_top1\n1,9,50\n2,5400,{top1}\n", encoding="utf-8")
    home.mkdir(parents=True)
    (home / "published.csv").write_text(f"{head}\n{row}\n", encoding="utf-8")
    monkeypatch.setattr(collect, "HERE", home)
    collect.keep("bp", sorted(tmp_path.glob("run-*")))
    assert str(tmp_path) not in collect.kept("bp")[0].files["config.yml"]
    for epochs, verdict in ((2, "not reproduced"), (5, "unfinished: epoch 2 of 5")):
        (tmp_path / "x.yml").write_text(f"train: {{epochs: {epochs}}}\n", encoding="utf-8")
        (made,) = collect.read()
        assert made["verdict"] == verdict
        assert (made["ours"], made["ours_sd"], made["seeds"], made["hours"]) == ("85.50", "0.71", "2", "1.5")


def test_training_numbers_are_those_measured_after_the_last_epoch_where_there_are_any(collect):
    metrics = "epoch,seconds,train_top1,test_top1\n1,1,40,42\n2,2,50,41\n"
    after = "epoch,train_top1\n1,45\n"
    assert collect.Kept({"metrics.csv": metrics}).last["train_top1"] == 50
    assert collect.Kept({"metrics.csv": metrics, "after.csv": after}).last["train_top1"] == 50
    last = collect.Kept({"metrics.csv": metrics, "after.csv": after + "2,48\n"}).last
    assert last == {"epoch": 2, "seconds": 2, "train_top1": 48, "test_top1": 41, "best_test_top1": 42}


def test_a_number_of_several_seeds_is_held_to_two_deviations_and_one_of_one_seed_to_a_point(collect):
    assert collect.verdict(86.34, 0.35, 85.7, 5) == "reproduced"
    assert collect.verdict(86.34, 0.35, 85.5, 5) == "not reproduced"
    assert collect.verdict(86.34, 0.35, 85.5) == "reproduced"
    assert collect.verdict(53.2, 0, 54.3) == "not reproduced"


def unpacked(collect, folder, *names):
    for name in names:
        (folder / name).mkdir()
        for file, text in collect.kept(name)[0].files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
    return [folder / name for name in names]


def test_a_kept_run_is_a_result_folder_and_can_be_drawn_as_figure_4(collect, tmp_path):
    """There is a panel per block and a line per run, with each angle at its epoch."""
    unpacked(collect, tmp_path, "cifar10-ldrl-expected", "cifar10-bp")
    assert read_result(tmp_path / "cifar10-bp").finished
    figure = script("layer_angles").drawn([tmp_path / "cifar10-ldrl-expected"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["conv1", "conv2", "dense1", "dense2"]
    epochs, angles = figure.axes[1].lines[0].get_data()
    measured = read_result(tmp_path / "cifar10-ldrl-expected").angles
    assert list(angles) == list(measured["angle_deg"][measured["block"] == 1])
    assert np.floor(epochs) + 1 == pytest.approx(measured["epoch"][measured["block"] == 1])


@pytest.mark.parametrize("k", [1, 5])
def test_kept_runs_can_be_drawn_like_the_figures_of_the_gp_paper(collect, tmp_path, k):
    """A has a bar per block and run, B a line of the hidden blocks' mean, C and D the accuracies over the epochs."""
    folders = unpacked(collect, tmp_path, "gp-cifar10-shallow-bp", "gp-cifar10-shallow-gp", "gp-cifar10-shallow-fa")
    figure = script("four_panels").drawn(folders, k)
    assert [axes.get_title(loc="left")[5] for axes in figure.axes] == list("ABCD")
    bars, over_steps, train, test = figure.axes
    run = read_result(folders[2])
    angles = run.angles["angle_deg"].reshape(-1, 4)
    assert [bar.get_height() for bar in bars.containers[2]] == pytest.approx(angles.mean(axis=0))
    (line,) = (line for line in over_steps.lines if line.get_label() == run.label)
    assert line.get_ydata()[0] == pytest.approx(angles[0, :3].mean())
    for axes, split in ((train, "train"), (test, "test")):
        np.testing.assert_array_equal(axes.lines[2].get_ydata(), run.metrics[f"{split}_top{k}"])


@pytest.mark.parametrize("page", sorted({*FOLDER.glob("*.md")} - {FOLDER / "index.md"}), ids=lambda page: page.stem)
def test_a_page_has_the_parts_of_all_pages_in_their_order_and_two_sentences_of_conclusion(page):
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^\*\*([A-Z][a-z-]+)\.\*\*", text, re.MULTILINE)
    assert parts == ["Question", "Set-up", "Command", "Conclusion", "Caveats"]
    conclusion = text.partition("**Conclusion.** ")[2].partition("\n\n")[0]
    assert len(re.findall(r"[.?!](?=\s+[A-Z]|$)", conclusion)) <= 2
    assert "![" in text or page.stem == "datasets"


def test_kept_runs_are_few_and_small():
    files = [file for file in (FOLDER / "runs").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".zip"}
    assert sum(file.stat().st_size for file in files) < 2**21


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['paper']} {row['place']} {row['what']}")
def test_a_row_names_a_config_that_is_there_and_a_page_where_it_has_a_number(row):
    assert (ROOT / row["command"].split()[2]).is_file()
    assert (row["ours"] is None) == (row["verdict"] == "not run")
    if row["page"]:
        page = (FOLDER / f"{row['page']}.md").read_text(encoding="utf-8")
        assert re.search(rf"(?<![\d.]){re.escape(str(row['ours']).removesuffix('.0'))}", page)


def test_readmes_table_of_results_is_in_the_rows():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| experiment | paper | arraytp |")[2]
    shown = re.findall(r"^\| \w+, (?:Figure|Table) \d: .*? \| .*? \| ([\d.]+)", table, re.MULTILINE)
    ours = {str(row["ours"]) for row in ROWS}
    # 34.97, the largest angle of Figure 3, is not in the rows but on the figure's own page.
    assert len(shown) == 8
    assert set(shown) <= ours | {"34.97"}
    assert "34.97" in (FOLDER / "dtp-figure-3.md").read_text(encoding="utf-8")
