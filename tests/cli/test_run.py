"""`arraytp run`: what a result folder holds, and what each option does."""

import csv
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import h5py
import pytest

from arraytp.commands import run
from arraytp.commands.holding import Holds
from arraytp.config import load_one
from arraytp.errors import UserError
from arraytp.report.figures import RUN_FIGURES
from arraytp.training import loop

FILES = {"config.yml", "metrics.csv", "steps.csv", "angles.csv", "feedback.csv", "summary.json", "checkpoint.h5"}
FIGURES = {"learning_curves.png", "angles_per_block.png", "angles_over_time.png", "feedback_angles.png"}


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_result_folder_holds_the_files_of_the_contract(arraytp, place):
    outcome = arraytp("run", "toy.yml", "--quiet", figures=True)
    folder = place / "results" / "toy"
    assert outcome.status == 0
    assert outcome.err == ""
    assert "toy  fa         1" in outcome.out
    assert outcome.out.endswith("results: results/toy\n")
    assert {path.name for path in folder.iterdir()} == FILES | {"feedback.csv", "figures"}
    assert {path.name for path in (folder / "figures").iterdir()} == FIGURES


def test_metrics_have_one_row_an_epoch_and_one_before_training(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=2")
    before, first, second = rows(place / "results/toy/metrics.csv")
    assert list(before) == [
        "epoch", "seconds", "lr", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
    ]  # fmt: skip
    assert [row["epoch"] for row in (before, first, second)] == ["0", "1", "2"]
    assert all(math.isnan(float(before[key])) for key in ("train_loss", "train_top1", "train_top5"))
    assert all(math.isfinite(float(value)) for row in (first, second) for value in row.values())
    assert first["lr"] == "0.05"
    # Accuracies are percentages of 45 and 20 images; with three classes, every label is among the top five.
    assert (45 * float(first["train_top1"]) / 100) % 1 == pytest.approx(0, abs=1e-9)
    assert (20 * float(first["test_top1"]) / 100) % 1 == pytest.approx(0, abs=1e-9)
    assert first["test_top5"] == "100.0"


def test_the_learning_rate_of_a_row_is_the_one_its_epoch_was_trained_with(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--set", "schedule={name: cosine, t_max: 2}", "--set", "train.epochs=3")
    column = [float(row["lr"]) for row in rows(place / "results/toy/metrics.csv")]
    assert column == pytest.approx([0.05, 0.05, (0.05 + 1e-5) / 2, 1e-5])


def test_the_learning_rate_of_a_row_is_that_of_its_epochs_last_step(arraytp, place):
    """An epoch has 3 steps, so the 4 steps of the warm-up end in the second epoch."""
    schedule = "schedule={name: step, epochs: [2], warmup_steps: 4}"
    arraytp("run", "toy.yml", "--quiet", "--set", schedule, "--set", "train.epochs=3")
    column = [float(row["lr"]) for row in rows(place / "results/toy/metrics.csv")]
    assert column == pytest.approx([0.05 / 4, 0.05 * 3 / 4, 0.05, 0.005])


def test_angles_are_measured_every_so_many_steps_for_every_block(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=2")
    table = rows(place / "results/toy/angles.csv")
    assert list(table[0]) == ["step", "epoch", "block", "angle_deg", "distance"]
    # There are 3 steps per epoch, and every second step is measured.
    assert [(row["step"], row["epoch"], row["block"]) for row in table] == [
        (str(step), str(step // 3 + 1), str(block)) for step in (0, 2, 4) for block in range(3)
    ]
    last = [row for row in table if row["block"] == "2"]
    assert all(float(row["angle_deg"]) == pytest.approx(0, abs=0.1) for row in last), "FA's last block is BP's"
    assert all(float(row["angle_deg"]) > 1 for row in table if row["block"] != "2")


def test_the_summary_tells_what_was_run_and_how_it_ended(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=3", "--set", "seed=4")
    folder = place / "results/toy"
    summary = json.loads((folder / "summary.json").read_text())
    table = rows(folder / "metrics.csv")
    assert (summary["name"], summary["rule"], summary["seed"], summary["epochs"]) == ("toy", "fa", 4, 3)
    assert summary["final"]["test_top1"] == float(table[-1]["test_top1"])
    assert summary["best"]["test_top1"] == max(float(row["test_top1"]) for row in table)
    assert summary["steps_per_second"] > 0
    assert summary["peak_memory_mb"] > 1
    assert {"arraytp", "python", "numpy"} <= set(summary["versions"])
    assert summary["device"]


def test_the_stored_config_gives_the_same_run_again(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet", "--set", "data.flip=0.5", "--set", "optimizer={name: adam, lr: 0.01}")
    assert arraytp("run", "results/toy/config.yml", "--quiet", "--out", "again").status == 0
    assert numbers(place / "again") == numbers(place / "results/toy")
    assert (place / "again/config.yml").read_text() == (place / "results/toy/config.yml").read_text()


def test_the_stored_config_has_every_default_filled_in(arraytp, place):
    arraytp("run", "toy.yml", "--quiet")
    stored = (place / "results/toy/config.yml").read_text()
    for key in ("seed: 0", "dtype: float32", "normalize: dataset", "weight_decay: 0.0", "checkpoint_minutes: 2.0"):
        assert key in stored


UNUSUAL = {
    "no epochs": ["train.epochs=0"],
    "no angles": ["compare.every=0"],
    "one image a batch": ["train.batch_size=1", "train.eval_batch_size=1"],
    "a batch larger than the data set": ["train.batch_size=1000000000", "train.eval_batch_size=1000000000"],
    "a batch that divides the data set": ["train.batch_size=15"],
    "double precision": ["dtype=float64", "rule.name=dfa"],
    "a crop border wider than the image": ["data.crop_padding=9"],
    "a stride larger than the image": ["network.blocks.0.stride=9", "network.blocks.0.pool=null"],
    "a single block": ["network={blocks: [{type: dense, units: 3}]}", "rule.name=dfa"],
    "streamed data": ["data.in_memory_mb=0", "data.pool_images=1"],
    "pixels as they are": ["data.normalize=none"],
    "statistics of one's own": ["data.normalize={mean: [0.5], std: [0.2]}"],
    "a summed loss": ["loss.reduction=sum", "optimizer.lr=0.001"],
    "a seed beyond 32 bits": ["seed=9223372036854775807"],
}


@pytest.mark.parametrize("settings", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_setting_trains_to_the_end(arraytp, place, settings):
    outcome = arraytp("run", "toy.yml", "--quiet", *(word for setting in settings for word in ("--set", setting)))
    assert (outcome.status, outcome.err) == (0, "")
    summary = json.loads((place / "results/toy/summary.json").read_text())
    assert math.isfinite(summary["final"]["test_loss"])


DATA_SETS = {
    "flat grey images": {"shape": (5, 9, 1)},
    "tall colour images": {"shape": (11, 6, 3)},
    "one class": {"classes": 1},
    "seven classes": {"classes": 7},
    "one training image": {"train": 1, "test": 1},
    "a validation split for a test split": {"splits": ("train", "val")},
}


@pytest.mark.parametrize("form", DATA_SETS.values(), ids=DATA_SETS)
def test_an_unusual_data_set_trains_to_the_end(arraytp, place, pack, form):
    pack(place / "other", **form)
    settings = ["data={dataset: other, flip: 0.5, crop_padding: 1}", f"network.blocks.2.units={form.get('classes', 3)}"]
    outcome = arraytp("run", "toy.yml", "--quiet", *(word for setting in settings for word in ("--set", setting)))
    assert (outcome.status, outcome.err) == (0, "")
    assert len(rows(place / "results/toy/metrics.csv")) == 2


def test_the_last_batch_of_an_epoch_may_be_smaller(arraytp, place):
    """45 images in batches of 16, 16 and 13: train_loss is the mean over images, not over batches."""
    still = ["--set", "optimizer={name: sgd, lr: 1e-30}", "--quiet"]
    arraytp("run", "toy.yml", *still, "--out", "parts")
    arraytp("run", "toy.yml", *still, "--out", "whole", "--set", "train.batch_size=45")
    parts, whole = (float(rows(place / name / "metrics.csv")[1]["train_loss"]) for name in ("parts", "whole"))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_the_size_of_an_evaluation_batch_changes_no_accuracy(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--out", "few", "--set", "train.eval_batch_size=3")
    arraytp("run", "toy.yml", "--quiet", "--out", "all", "--set", "train.eval_batch_size=20")
    few, whole = (rows(place / name / "metrics.csv")[1] for name in ("few", "all"))
    assert few["test_top1"] == whole["test_top1"]
    assert float(few["test_loss"]) == pytest.approx(float(whole["test_loss"]), rel=1e-6)


def test_variants_have_folders_of_their_own_and_are_compared(arraytp, place):
    outcome = arraytp("run", "variants.yml", "--quiet", figures=True)
    folder = place / "results/variants"
    assert outcome.status == 0
    assert {path.name for path in folder.iterdir()} == {
        "bp",
        "dfa",
        "comparison.png",
        "comparison.md",
        "comparison.csv",
    }
    assert {path.name for path in (folder / "dfa").iterdir()} == (FILES | {"figures"}) - {"feedback.csv"}
    assert load_one(folder / "dfa/config.yml").rule.name == "dfa"
    assert [line.split()[:2] for line in outcome.out.splitlines() if line.startswith(("bp", "dfa"))] == [
        ["bp", "bp"],
        ["dfa", "dfa"],
    ]


def test_variants_of_one_seed_start_from_the_same_weights(arraytp, place, numbers):
    arraytp("run", "variants.yml", "--quiet", "--set", "train.epochs=0")
    bp, dfa = (numbers(place / "results/variants" / name) for name in ("bp", "dfa"))
    assert bp[0] == dfa[0]
    assert bp[2]["network/0/weight"] == dfa[2]["network/0/weight"]


def test_several_configs_run_after_one_another(arraytp, place):
    outcome = arraytp("run", "toy.yml", "variants.yml", "--quiet")
    assert outcome.status == 0
    assert outcome.out.endswith("results: results/toy\nresults: results/variants\n")
    assert {str(path) for path in place.glob("results/**/summary.json")} == {
        str(place / "results" / name / "summary.json") for name in ("toy", "variants/bp", "variants/dfa")
    }


def test_out_names_the_folder_or_with_several_configs_their_parent(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", "--out", "here")
    assert (place / "here/summary.json").exists()
    (place / "other.yml").write_text((place / "toy.yml").read_text() + "name: second\n")
    arraytp("run", "toy.yml", "other.yml", "--quiet", "--out", "both")
    assert {path.name for path in (place / "both").iterdir()} == {"toy", "second"}
    assert not (place / "results").exists()


def test_options_override_the_config(arraytp, place):
    words = ["--dtype", "float64", "--backend", "numpy", "--set", "seed=3", "--set", "network.blocks.1.units=5"]
    arraytp("run", "toy.yml", "--quiet", *words)
    config = load_one(place / "results/toy/config.yml")
    assert (config.dtype, config.backend, config.seed) == ("float64", "numpy", 3)
    assert config.network.blocks[1].units == 5
    with h5py.File(place / "results/toy/checkpoint.h5") as file:
        assert file["network/1/weight"].shape == (36, 5)
        assert file["network/1/weight"].dtype == "float64"


def test_quiet_leaves_only_the_table(arraytp):
    loud, quiet = arraytp("run", "toy.yml", "--out", "a"), arraytp("run", "toy.yml", "--out", "b", "--quiet")
    assert quiet.err == ""
    assert "epoch 1/1" in loud.err
    assert [line.split()[:3] for line in loud.out.splitlines()[:4]] == [
        line.replace("b ", "a ", 1).split()[:3] for line in quiet.out.splitlines()[:4]
    ]


def test_a_variant_that_fails_does_not_keep_the_others(arraytp, place):
    path = place / "variants.yml"
    text = path.read_text().replace("variants: {bp: {rule: {name: bp}}", "variants: {bp: {optimizer: {lr: 1e30}}")
    path.write_text(text)
    for more in ((), ("--resume",)):
        outcome = arraytp("run", "variants.yml", "--quiet", *more)
        assert outcome.status == 1
        (line,) = outcome.err.splitlines()
        assert line.startswith("arraytp: error: bp: not finite at step")
        assert (place / "results/variants/dfa/summary.json").exists()
        assert "dfa" in outcome.out


def test_fresh_removes_figures_that_the_new_run_does_not_draw(arraytp, place):
    assert arraytp("run", "toy.yml", "--quiet", figures=True).status == 0
    figures = place / "results/toy/figures"
    (figures / "mine.png").write_text("not ours")
    assert {path.name for path in figures.iterdir()} == {*RUN_FIGURES, "mine.png"}
    assert arraytp("run", "toy.yml", "--quiet", "--fresh", "--set", "rule.name=bp", figures=True).status == 0
    assert sorted(path.name for path in figures.iterdir()) == [
        "angles_per_block.png",
        "learning_curves.png",
        "mine.png",
    ]


def test_fresh_replaces_results_of_any_config(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=2")
    (place / "results/toy/config.yml").write_text("no: [config")
    assert arraytp("run", "toy.yml", "--quiet", "--fresh", "--set", "seed=1").status == 0
    arraytp("run", "toy.yml", "--quiet", "--set", "seed=1", "--out", "new")
    assert numbers(place / "results/toy") == numbers(place / "new")


def test_resuming_a_finished_run_does_nothing_but_print_the_table(arraytp, tree):
    first = arraytp("run", "toy.yml", "--quiet")
    before = tree()
    again = arraytp("run", "toy.yml", "--quiet", "--resume")
    assert again == first
    assert tree() == before


def test_resuming_what_never_started_starts_it(arraytp, place, numbers):
    assert arraytp("run", "toy.yml", "--quiet", "--resume").status == 0
    arraytp("run", "toy.yml", "--quiet", "--out", "plain")
    assert numbers(place / "results/toy") == numbers(place / "plain")


def test_resuming_with_more_epochs_equals_having_asked_for_them_at_first(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet")
    assert arraytp("run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=3").status == 0
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=3", "--out", "whole")
    assert numbers(place / "results/toy") == numbers(place / "whole")
    assert load_one(place / "results/toy/config.yml").train.epochs == 3


def test_resuming_with_more_steps_equals_having_asked_for_them_at_first(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.steps=1")
    assert arraytp("run", "toy.yml", "--quiet", "--resume", "--set", "train.steps=2").status == 0
    arraytp("run", "toy.yml", "--quiet", "--set", "train.steps=2", "--out", "whole")
    assert numbers(place / "results/toy") == numbers(place / "whole")
    assert " 1 of " not in arraytp("report", "whole").out


def test_a_run_of_no_epochs_can_be_prolonged(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=0")
    assert arraytp("run", "toy.yml", "--quiet", "--resume").status == 0
    arraytp("run", "toy.yml", "--quiet", "--out", "whole")
    assert numbers(place / "results/toy") == numbers(place / "whole")


def test_resume_writes_the_metrics_of_a_finished_run_again(arraytp, place):
    """Its rows are also in the checkpoint."""
    assert arraytp("run", "toy.yml", "--quiet").status == 0
    metrics = place / "results/toy/metrics.csv"
    before = metrics.read_text()
    metrics.unlink()
    assert arraytp("report", "results/toy").status == 2
    assert arraytp("run", "toy.yml", "--quiet", "--resume").status == 0
    assert metrics.read_text() == before


def test_resume_draws_what_a_kill_left_undrawn(arraytp, place):
    arraytp("run", "toy.yml", "--quiet", figures=True)
    figures = place / "results/toy/figures"
    (figures / "angles_per_block.png").unlink()
    (figures / "learning_curves.png").unlink()
    assert arraytp("run", "toy.yml", "--quiet", "--resume", figures=True).status == 0
    assert {path.name for path in figures.iterdir()} == FIGURES


@pytest.mark.parametrize("seeds", [(), ("--seeds", "2")])
def test_runs_with_and_without_variants_do_not_mix(arraytp, refused, seeds):
    """`arraytp report` takes a folder with a config.yml for one run, and would not see the runs below it."""
    arraytp("run", "variants.yml", "--quiet", "--set", "train.epochs=0", *seeds)
    own = "results/variants/dfa/seed-0/config.yml" if seeds else "results/variants/dfa/config.yml"
    for more in ((), ("--fresh",)):
        said = refused("run", own, *more)
        assert said == "results/variants: holds folders with results of other runs; --out selects another folder"
    assert arraytp("run", own, "--quiet", "--out", "again").status == 0
    for more in ((), ("--fresh",), ("--resume",)):
        said = refused("run", "variants.yml", "--out", "again", *seeds, *more)
        assert said == "again: holds results of a run without variants; --out selects another folder"


def test_a_run_goes_on_although_others_began_below_it(arraytp, refused, place):
    """It was there first, and the command that an interruption prints must not be refused."""
    command = ("run", "toy.yml", "--quiet", "--set", "train.epochs=0", "--out")
    assert arraytp(*command, "home").status == 0
    assert arraytp(*command, "home/below").status == 0
    assert arraytp(*command, "home", "--resume").status == 0
    assert arraytp(*command, "home", "--fresh").status == 0
    # A link hides nothing: `arraytp report` does not follow it.
    (place / "other").mkdir()
    (place / "other/linked").symlink_to(place / "home/below")
    assert arraytp(*command, "other").status == 0


def test_the_users_own_config_is_no_result(arraytp, place):
    for name, folder in (("variants.yml", "own"), ("toy.yml", "above/own")):
        (place / folder).mkdir(parents=True)
        shutil.copy(place / name, place / folder / "config.yml")
        words = ("--quiet", "--set", "train.epochs=0", "--out", folder.split("/")[0])
        assert arraytp("run", f"{folder}/config.yml", *words).status == 0


def test_a_run_and_variants_of_one_name_are_refused_before_either_starts(refused, place, tree):
    for name in ("variants.yml", "toy.yml"):
        folder = place / name.removesuffix(".yml")
        folder.mkdir(exist_ok=True)
        text = re.sub("^name: .*\n", "", (place / name).read_text(), flags=re.MULTILINE)
        (folder / "same.yml").write_text(f"name: same\n{text}")
    before = tree()
    for order in (("toy/same.yml", "variants/same.yml"), ("variants/same.yml", "toy/same.yml")):
        assert "give them different names" in refused("run", *order)
    assert tree() == before


def test_one_variant_may_be_run_alone_and_the_others_later(arraytp, place, refused):
    only = ("run", "variants.yml", "--quiet", "--variant", "dfa")
    assert arraytp(*only).status == 0
    summary = place / "results/variants/dfa/summary.json"
    before = summary.read_bytes()
    assert [path.name for path in (place / "results/variants").iterdir()] == ["dfa"]
    assert "has no variant 'x'; its variants are " in refused("run", "variants.yml", "--variant", "x")
    assert "has no variant 'dfa'; it has no variants" in refused("run", "toy.yml", "--variant", "dfa")
    assert arraytp("run", "variants.yml", "--quiet", "--resume").status == 0
    assert summary.read_bytes() == before
    assert (place / "results/variants/bp/summary.json").exists()


def test_resume_takes_other_settings_that_no_number_depends_on(arraytp, place):
    assert arraytp("run", "toy.yml", "--quiet").status == 0
    other = ("--set", "cuda_graphs=false", "--set", "device=1", "--set", "train.epochs=2")
    assert arraytp("run", "toy.yml", "--quiet", "--resume", *other).status == 0
    assert json.loads((place / "results/toy/summary.json").read_text())["epochs"] == 2


def test_resume_runs_the_variants_that_are_missing(arraytp, place):
    arraytp("run", "variants.yml", "--quiet", "--set", "variants.bp.train.epochs=2")
    summary = place / "results/variants/bp/summary.json"
    before = summary.read_bytes()
    for path in sorted((place / "results/variants/dfa").iterdir()):
        path.unlink()
    assert arraytp("run", "variants.yml", "--quiet", "--resume", "--set", "variants.bp.train.epochs=2").status == 0
    assert summary.read_bytes() == before
    assert (place / "results/variants/dfa/summary.json").exists()


def test_a_finished_run_without_its_checkpoint_is_not_trained_anew(arraytp, refused, place):
    """Otherwise --resume would begin at epoch 0 and overwrite the results."""
    assert arraytp("run", "toy.yml", "--quiet").status == 0
    (place / "results/toy/checkpoint.h5").unlink()
    for change in ("train.epochs=2", "train.checkpoint_minutes=5"):
        said = refused("run", "toy.yml", "--resume", "--set", change)
        assert said.startswith("results/toy: has finished, but checkpoint.h5, from which it would go on, is missing")
    assert arraytp("run", "toy.yml", "--quiet", "--resume").status == 0


def test_fresh_removes_all_former_results_though_the_first_run_cannot_begin(arraytp, place, monkeypatch):
    for name in ("a", "b"):
        (place / f"{name}.yml").write_text((place / "toy.yml").read_text())
    assert arraytp("run", "a.yml", "b.yml", "--quiet").status == 0
    build = run.build_planned

    def failing(planned, *others):
        if planned.config.name == "a":
            raise UserError("toy/train-00000.h5: is damaged")
        return build(planned, *others)

    def unfinished(*_):
        raise UserError("stopped")

    monkeypatch.setattr(run, "build_planned", failing)
    monkeypatch.setattr(run.Run, "train", unfinished)
    assert arraytp("run", "a.yml", "b.yml", "--quiet", "--fresh").status == 2
    assert not list(place.glob("results/*/checkpoint.h5"))
    assert not list(place.glob("results/*/summary.json"))


@pytest.mark.parametrize(
    "problem", [PermissionError(13, "Permission denied"), UserError("another run is writing here")]
)
def test_fresh_trains_the_others_if_one_folder_cannot_be_cleared(arraytp, place, monkeypatch, problem):
    for name in ("a", "b", "c"):
        (place / f"{name}.yml").write_text((place / "toy.yml").read_text())
    words = ("run", "a.yml", "b.yml", "c.yml", "--quiet", "--fresh")
    assert arraytp(*words).status == 0
    before = {name: (place / f"results/{name}/summary.json").stat().st_mtime_ns for name in ("a", "b", "c")}
    take, looks = Holds.take, []

    def in_the_way(held, folder):
        looks.append(folder.name)
        if folder.name == "b" and looks.count("b") > 1:
            raise problem
        take(held, folder)

    monkeypatch.setattr(Holds, "take", in_the_way)
    outcome = arraytp(*words)
    assert outcome.status == 2
    words = "results/b: cannot be written: Permission denied" if isinstance(problem, OSError) else str(problem)
    assert [line for line in outcome.err.splitlines() if "error" in line] == [f"arraytp: error: b: {words}"]
    after = {name: (place / f"results/{name}/summary.json").stat().st_mtime_ns for name in ("a", "b", "c")}
    assert [after[name] > before[name] for name in ("a", "b", "c")] == [True, False, True]


def test_seeds_in_linked_folders_have_their_rows(arraytp, place, tmp_path):
    """A link to a folder elsewhere is listed by its own name; a link to a sibling, only by the sibling's."""
    (tmp_path / "elsewhere/seeds/of/dfa").mkdir(parents=True)
    (place / "results/variants").mkdir(parents=True)
    (place / "results/variants/dfa").symlink_to(tmp_path / "elsewhere/seeds/of/dfa")
    (place / "results/variants/latest").symlink_to("bp")
    outcome = arraytp("run", "variants.yml", "--quiet", "--seeds", "1")
    assert outcome.status == 0, outcome.err
    rows = (place / "results/variants/seeds.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [["bp", "0"], ["dfa", "0"]]


def test_what_a_device_has_not_finished_at_a_checkpoint_is_training(arraytp, place, monkeypatch):
    """On the test's clock, waiting for a score takes a second, and everything else next to nothing."""
    read, clock = loop.Run._read_scores, itertools.count()
    waited = []

    def waiting(self, progress):
        waited.extend(1 for _ in self._unread)
        read(self, progress)

    monkeypatch.setattr(loop.Run, "_read_scores", waiting)
    monkeypatch.setattr(loop.Run, "_collect", lambda self, score, _: self._unread.append(score))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 1e-6 * next(clock) + sum(waited)))
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", "train.checkpoint_minutes=1e-9")
    assert outcome.status == 0, outcome.err
    summary = json.loads((place / "results/toy/summary.json").read_text())
    assert summary["steps_per_second"] == pytest.approx(1, rel=1e-3)


def test_the_time_of_checkpoints_is_not_that_of_steps(arraytp, place, monkeypatch):
    """On the test's clock, a checkpoint takes 100 seconds, and everything else next to nothing."""
    write, clock = loop.write_checkpoint, itertools.count()
    late = []

    def slow(*arguments):
        late.append(100)
        return write(*arguments)

    monkeypatch.setattr(loop, "write_checkpoint", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 1e-3 * next(clock) + sum(late)))
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", "train.checkpoint_minutes=1e-9")
    assert outcome.status == 0, outcome.err
    assert len(late) > 2
    summary = json.loads((place / "results/toy/summary.json").read_text())
    assert 45 / summary["images_per_second"] < 1
