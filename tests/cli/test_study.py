"""Studies from the command line: what they write, how they resume, what they refuse."""

import csv
import json
import shutil

import numpy as np
import pytest

from arraytp.training import study as study_module
from arraytp.training.tables import CsvTable

STUDY = """\
data: {dataset: toy}
network:
  blocks:
    - {type: conv, channels: 4, kernel: 3, activation: elu, pool: {kernel: 3, stride: 2, padding: 1}}
    - {type: dense, units: 8, activation: elu}
    - {type: dense, units: 3}
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 0, batch_size: 16}
study: {seeds: 2, rounds: 3, biases: false}
variants:
  ldrl:
    rule: {name: ldrl, feedback: {iterations: [0, 40], sigma: 0.1, optimizer: {name: sgd, lr: 0.5, momentum: 0.9}}}
  symmetric:
    rule: {name: ldrl, feedback_init: symmetric}
    study: {rounds: 0}
  drl:
    rule: {name: drl, feedback: {iterations: 5, sigma: 0.1}}
"""


@pytest.fixture
def study(place):
    (place / "study.yml").write_text(STUDY)
    return place / "results" / "study"


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_study_trains_feedback_and_leaves_the_weights(arraytp, study):
    outcome = arraytp("run", "study.yml", "--quiet")
    assert outcome.status == 0, outcome.err
    found = rows(study / "ldrl" / "seed-0" / "feedback.csv")
    assert [int(row["step"]) for row in found[::2]] == [0, 40, 80, 120]
    first, *_, last = [float(row["angle_deg"]) for row in found if row["block"] == "2"]
    assert first > 60
    assert last < 20
    untouched = {row["angle_deg"] for row in found if row["block"] == "1"}
    assert len(untouched) == 1
    angles = rows(study / "ldrl" / "seed-1" / "angles.csv")
    assert [(row["step"], row["block"]) for row in angles] == [(s, n) for s in ("0", "120") for n in "012"]


def test_symmetric_feedback_is_at_0_degrees_from_the_start_and_seeds_differ(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet").status == 0
    assert all(float(row["angle_deg"]) < 1e-5 for row in rows(study / "symmetric" / "seed-0" / "feedback.csv"))
    texts = [(study / "drl" / f"seed-{n}" / "angles.csv").read_text() for n in (0, 1)]
    assert texts[0] != texts[1]


def test_table_and_figures_tell_of_all_variants(arraytp, study):
    outcome = arraytp("run", "study.yml", "--quiet", figures=True)
    table = (study / "study.md").read_text()
    assert table.strip() in outcome.out
    for name in ("ldrl", "symmetric", "drl"):
        assert f"| {name} | 2 |" in table
        summary = json.loads((study / name / "summary.json").read_text())
        assert len(summary["seeds"]) == 2
        assert len(summary["seeds"][0]["update_angle_deg"]) == 3
    for name in ("updates.png", "alignment.png"):
        assert (study / "figures" / name).stat().st_size > 5000


ALONE = ("--variant", "ldrl", "--set", "seed=5")


@pytest.mark.parametrize("biases", [False, True])
def test_seeds_count_from_the_configs_and_biases_are_0_where_the_study_has_none(arraytp, study, monkeypatch, biases):
    seen, measure = [], study_module._measure_updates

    def watched(made, *more):
        seen.append((made.config.seed, any(bias.any() for bias in made.network.biases)))
        return measure(made, *more)

    monkeypatch.setattr(study_module, "_measure_updates", watched)
    words = ("--set", "study.rounds=0", "--set", f"study.biases={str(biases).lower()}")
    assert arraytp("run", "study.yml", "--quiet", *ALONE, *words).status == 0
    assert seen == [(5, biases), (6, biases)]


def test_summary_and_table_have_the_numbers_after_the_last_round(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet", *ALONE).status == 0
    after, pairs, place = [], [], study / "ldrl"
    for n in (0, 1):
        after.append([float(row["angle_deg"]) for row in rows(place / f"seed-{n}/angles.csv") if row["step"] == "120"])
        pairs.append([float(rows(place / f"seed-{n}/feedback.csv")[-1][key]) for key in ("angle_deg", "distance")])
        assert json.loads((place / f"seed-{n}/summary.json").read_text())["update_angle_deg"] == after[-1]
    cells = (study / "study.md").read_text().splitlines()[2].strip("| ").split(" | ")
    mean, spread = np.mean(after, axis=0), np.std(after, axis=0, ddof=1)
    assert cells[2:5] == [f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, spread, strict=True)]
    mean, spread = np.mean(pairs, axis=0), np.std(pairs, axis=0, ddof=1)
    assert cells[5:7] == [f"{mean[0]:.1f} ± {spread[0]:.1f}", f"{mean[1]:.2f} ± {spread[1]:.2f}"]


def test_deviations_over_seeds_are_with_n_less_1_and_one_seed_has_none(arraytp, study, place):
    (place / "study.yml").write_text(STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: ldrl}\n")
    command = ("run", "study.yml", "--quiet", "--set", "study.rounds=0")
    assert arraytp(*command).status == 0
    a, b = (float(rows(study / f"seed-{n}" / "angles.csv")[0]["angle_deg"]) for n in (0, 1))
    assert f"| study | 2 | {(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f} |" in (study / "study.md").read_text()
    assert arraytp(*command, "--fresh", "--set", "study.seeds=1").status == 0
    assert f"| study | 1 | {a:.1f} |" in (study / "study.md").read_text()


def test_resume_draws_what_a_kill_left_undrawn(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet").status == 0
    (study / "drl" / "study.md").unlink()
    assert arraytp("run", "study.yml", "--quiet", "--resume", figures=True).status == 0
    assert (study / "drl" / "figures" / "updates.png").stat().st_size > 5000
    assert (study / "drl" / "study.md").exists()


def test_a_resumed_study_does_the_missing_seeds_only_and_gets_the_same(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet").status == 0
    place = study / "ldrl"
    wanted = (place / "seed-1" / "feedback.csv").read_text()
    kept = (place / "seed-0" / "summary.json").stat().st_mtime_ns
    (place / "summary.json").unlink()
    (place / "seed-1" / "summary.json").unlink()
    (place / "seed-1" / "feedback.csv").write_text("step\n")
    assert arraytp("run", "study.yml", "--quiet", "--resume").status == 0
    assert (place / "seed-1" / "feedback.csv").read_text() == wanted
    assert (place / "seed-0" / "summary.json").stat().st_mtime_ns == kept


def test_a_study_without_its_config_file_keeps_its_seeds(arraytp, study):
    """Every finished seed has the config, so nothing is lost; but the study continues only with --resume."""
    assert arraytp("run", "study.yml", "--quiet", *ALONE).status == 0
    place = study / "ldrl"
    kept = (place / "seed-0" / "summary.json").stat().st_mtime_ns
    for finished in (True, False):
        (place / "config.yml").unlink()
        if not finished:
            (place / "summary.json").unlink()
        outcome = arraytp("run", "study.yml", "--quiet", *ALONE)
        assert outcome.status == 2
        assert "holds results already" in outcome.err
        assert arraytp("run", "study.yml", "--quiet", "--resume", *ALONE).status == 0
        assert (place / "config.yml").exists()
        assert (place / "seed-0" / "summary.json").stat().st_mtime_ns == kept
    (place / "config.yml").write_text("seed: [")
    outcome = arraytp("run", "study.yml", "--quiet", "--resume", *ALONE)
    assert outcome.status == 2
    assert "delete it, and --resume goes on" in outcome.err
    (place / "config.yml").unlink()
    path = place / "seed-0" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({key: summary[key] for key in summary.keys() - {"config", "data"}}))
    outcome = arraytp("run", "study.yml", "--quiet", "--resume", *ALONE)
    assert outcome.status == 2
    assert "does not say which config it is of" in outcome.err


def test_the_summary_of_a_seed_does_not_outlive_its_rows(arraytp, study, place, monkeypatch):
    """A power failure may lose rows appended to a file; the seed would then count as done without them."""
    (place / "drift.yml").write_text(DRIFT)
    commands = ("run", "study.yml", "--quiet", *ALONE), ("run", "drift.yml", "--quiet")
    tables = [
        study / "ldrl/seed-0/feedback.csv",
        study / "ldrl/seed-1/angles.csv",
        place / "results/drift/seed-0/drift.csv",
    ]
    assert [arraytp(*command).status for command in commands] == [0, 0]
    whole = [table.read_text() for table in tables]
    append = CsvTable.append

    def lost(table, *values):
        before = table.path.read_bytes()
        append(table, *values)
        table.path.write_bytes(before)

    monkeypatch.setattr(CsvTable, "append", lost)
    assert [arraytp(*command, "--fresh").status for command in commands] == [0, 0]
    assert [table.read_text() for table in tables] == whole


def test_a_study_is_not_continued_on_other_data(arraytp, refused, place, study, pack):
    """Its seeds would be of two data sets; this is refused even if all of them are done."""
    assert arraytp("run", "study.yml", "--quiet").status == 0
    shutil.rmtree(place / "toy")
    pack(place / "toy", train=44)
    said = refused("run", "study.yml", "--quiet", "--resume")
    wanted = "results/study/ldrl/seed-0/summary.json: is of other images or labels than toy holds now; --fresh starts"
    assert said.startswith(wanted)
    (study / "ldrl" / "seed-1" / "summary.json").unlink()
    (study / "ldrl" / "summary.json").unlink()
    assert refused("run", "study.yml", "--quiet", "--resume").startswith(wanted)


def test_a_fresh_study_does_every_seed_again(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet").status == 0
    assert arraytp("run", "study.yml", "--quiet").status == 2
    kept = (study / "drl" / "seed-0" / "summary.json").stat().st_mtime_ns
    assert arraytp("run", "study.yml", "--quiet", "--fresh").status == 0
    assert (study / "drl" / "seed-0" / "summary.json").stat().st_mtime_ns > kept


def test_a_rule_without_trained_feedback_is_refused(arraytp, study, place):
    (place / "study.yml").write_text(STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: fa}\n")
    outcome = arraytp("run", "study.yml")
    assert outcome.status == 2
    assert (
        "study: rule fa trains no feedback weights; use one of weight-mirror, alignment, tp, dtp, ldrl" in outcome.err
    )


def test_seeds_beyond_the_largest_are_refused_before_the_first(arraytp, study, place):
    outcome = arraytp("run", "study.yml", "--set", f"seed={2**63 - 1}", "--set", "study.seeds=2")
    assert outcome.status == 2
    assert "study.seeds: 2: from seed 9223372036854775807 on goes beyond the largest seed" in outcome.err
    assert not (place / "results").exists()


def test_diverging_feedback_is_named(arraytp, study):
    outcome = arraytp(
        "run", "study.yml", "--quiet", "--set", "variants.ldrl.rule.feedback.optimizer.lr=1e6",
        "--set", "variants.ldrl.rule.feedback.iterations=400",
    )  # fmt: skip
    assert outcome.status == 1
    assert "feedback of block" in outcome.err
    assert "rule.feedback.optimizer.lr" in outcome.err


def test_closed_form_that_diverges_is_named_with_its_folder(arraytp, study):
    outcome = arraytp(
        "run", "study.yml", "--quiet", "--variant", "ldrl", "--set", "variants.ldrl.rule.expected=true",
        "--set", "variants.ldrl.rule.feedback={iterations: 40, sigma: 0.1, optimizer: {name: sgd, lr: 1000}}",
    )  # fmt: skip
    assert outcome.status == 1
    assert outcome.err.startswith("arraytp: error: results/study/ldrl/seed-0: feedback of block 1 (dense1): iterations")


DRIFT = """\
data: {dataset: toy}
network: {blocks: [{type: dense, units: 8, activation: leaky-relu}, {type: dense, units: 3}], init: orthogonal}
rule: {name: gait-prop, form: difference, inverse: pseudo}
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 2, steps: 4, batch_size: 16}
compare: {every: 2}
study: {kind: drift, seeds: 1}
"""


def test_a_study_of_drift_measures_angles_beside_drift(arraytp, place):
    """For a semi-orthogonal W, W⁺ = Wᵀ: own angle and drift are 0 at first, and after two updates both have grown."""
    (place / "drift.yml").write_text(DRIFT)
    outcome = arraytp("run", "drift.yml", "--quiet")
    assert outcome.status == 0, outcome.err
    found = rows(place / "results/drift/seed-0/drift.csv")
    assert [(row["step"], row["block"]) for row in found] == [("0", "0"), ("0", "1"), ("2", "0"), ("2", "1")]
    first, last = ([float(row[key]) for key in ("own_deg", "drift_rms", "drift_largest")] for row in found[1::2])
    assert max(first) < 1e-3 < min(last)
    assert found[0]["own_deg"] == found[0]["drift_rms"] == "nan"


@pytest.mark.parametrize("change", ["train.epochs=3", "train.steps=6"])
def test_the_seeds_of_a_study_of_drift_are_not_prolonged(arraytp, refused, place, change):
    """Finished seeds would keep their length, while missing ones would get another."""
    (place / "drift.yml").write_text(DRIFT)
    assert arraytp("run", "drift.yml", "--quiet").status == 0
    said = refused("run", "drift.yml", "--quiet", "--resume", "--set", change)
    assert f"{change.partition('=')[0]} is " in said
    (place / "results/drift/seed-0/summary.json").unlink()
    assert "holds a run of another config" in refused("run", "drift.yml", "--quiet", "--resume", "--set", change)


def test_a_study_of_drift_that_diverges_says_where(arraytp, place):
    (place / "drift.yml").write_text(DRIFT)
    outcome = arraytp("run", "drift.yml", "--quiet", "--set", "optimizer.lr=1e30")
    assert outcome.status == 1
    said = "arraytp: error: results/drift/seed-0: not finite at step 1; a smaller optimizer.lr may help\n"
    assert outcome.err == said


def test_a_network_without_feedback_is_refused(arraytp, place):
    alone = "network={blocks: [{type: dense, units: 3}]}"
    (place / "study.yml").write_text(STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: ldrl}\n")
    outcome = arraytp("run", "study.yml", "--set", alone)
    assert outcome.status == 2
    assert "study: the network has one block, dense1, and so no feedback" in outcome.err


def test_report_leaves_studies_alone(arraytp, study):
    assert arraytp("run", "study.yml", "--quiet").status == 0
    outcome = arraytp("report", str(study))
    assert outcome.status == 2
    assert "holds a study, not a training run; its table is study.md" in outcome.err
    assert not (study / "comparison.png").exists()
    assert arraytp("run", "toy.yml", "--quiet").status == 0
    outcome = arraytp("report", "results", "--out", "all")
    assert outcome.status == 0, outcome.err
    assert "toy" in outcome.out


def test_a_batch_larger_than_the_train_split_is_refused_before_anything_is_written(arraytp, study):
    outcome = arraytp("run", "study.yml", "--set", "train.batch_size=46")
    assert outcome.status == 2
    assert "train.batch_size: 46, but the train split of toy has 45 images to train on" in outcome.err
    assert not study.exists()
    assert arraytp("run", "study.yml", "--quiet", "--set", "train.batch_size=45").status == 0


DAMAGE = [
    ("seed-1/summary.json", b'{"seed": 0', "is damaged: Expecting"),
    ("seed-1/summary.json", b"[]", "is damaged: not an object with update_angle_deg and seconds"),
    ("seed-1/summary.json", b'{"update_angle_deg": ["x", 1, 2], "seconds": 1}', "is damaged: could not convert"),
    ("seed-1/summary.json", b'{"update_angle_deg": [1], "seconds": 1}', "has the shape (1,), not (3,)"),
    ("seed-1/summary.json", b"\xff", "is damaged: 'utf-8' codec"),
    ("seed-1/feedback.csv", b"step,epoch\n", "line 1: the header lacks block"),
    ("seed-1/feedback.csv", b"step,epoch,block,loss,angle_deg,distance\n0,0,1,x,1,1\n", "line 2: loss is 'x'"),
    ("seed-1/feedback.csv", b"step,epoch,block,loss,angle_deg,distance\n0,0,1,1,1,1\n", "1 rows, not those of"),
    (
        "seed-0/feedback.csv",
        b"step,epoch,block,loss,angle_deg,distance\n0,0,1,1,1,1\n0,0,2,1,1,1\n1,0,1,1,1,1\n",
        "3 rows, not 2 blocks at each of 2 steps; delete",
    ),
    ("seed-1/feedback.csv", None, "is missing or has no rows"),
    ("summary.json", b"{}", "is damaged: not an object with blocks, seeds and seconds"),
]


def test_a_damaged_file_of_a_study_is_named_and_its_seed_can_be_done_again(arraytp, study, place):
    (place / "study.yml").write_text(STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: drl}\n")
    command = ("run", "study.yml", "--quiet", "--resume")
    assert arraytp(*command).status == 0
    for name, content, message in DAMAGE:
        damaged, summary = study / name, study / "summary.json"
        kept = damaged.read_bytes(), summary.read_bytes()
        summary.unlink()
        if content is None:
            damaged.unlink()
        else:
            damaged.write_bytes(content)
        outcome = arraytp(*command)
        assert outcome.status == 2, name
        assert len(outcome.err.splitlines()) == 1
        assert f"results/study/{name}" in outcome.err
        assert message in outcome.err
        for path, text in zip((damaged, summary), kept, strict=True):
            path.write_bytes(text)
    wanted = (study / "seed-1" / "feedback.csv").read_bytes()
    shutil.rmtree(study / "seed-1")
    assert arraytp(*command).status == 0
    assert (study / "seed-1" / "feedback.csv").read_bytes() == wanted


def test_a_file_in_the_place_of_a_seeds_folder_is_named(arraytp, study):
    (study / "drl").mkdir(parents=True)
    (study / "drl" / "seed-0").write_text("")
    outcome = arraytp("run", "study.yml", "--quiet")
    assert outcome.status == 2
    assert "drl/seed-0: is a file" in outcome.err


@pytest.mark.parametrize("order", [("study", "trained"), ("trained", "study")])
def test_a_config_may_have_a_study_beside_a_training(arraytp, place, order):
    rule = "rule: {name: ldrl}"
    own = {"study": f"{{{rule}, study: {{seeds: 1, rounds: 1}}}}", "trained": f"{{{rule}, train: {{epochs: 1}}}}"}
    text = (place / "toy.yml").read_text().replace("rule: {name: fa}\n", "")
    (place / "both.yml").write_text(text + "variants:\n" + "".join(f"  {name}: {own[name]}\n" for name in order))
    outcome = arraytp("run", "both.yml", "--quiet")
    assert outcome.status == 0, outcome.err
    assert "| study | 1 |" in outcome.out
    assert "trained" in outcome.out
    assert (place / "results/both/trained/summary.json").exists()


@pytest.mark.parametrize("first", ["shallow", "deep"])
def test_networks_of_a_study_may_differ_in_depth(arraytp, place, first):
    head, _, _ = STUDY.partition("variants:")
    shallow = "  shallow: {rule: {name: ldrl}, network: {blocks: [{type: dense, units: 8}, {type: dense, units: 3}]}}\n"
    own = {"shallow": shallow, "deep": "  deep: {rule: {name: ldrl}}\n"}
    second = "deep" if first == "shallow" else "shallow"
    (place / "study.yml").write_text(f"{head}variants:\n{own[first]}{own[second]}")
    outcome = arraytp("run", "study.yml", "--quiet", figures=True)
    assert outcome.status == 0, outcome.err
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2:5] for line in outcome.out.splitlines()}
    assert cells["study"] == [f"update block {n} (°)" for n in range(3)]
    assert cells["shallow"][2] == "—"
    assert "—" not in cells["deep"]


def test_feedback_of_no_iterations_stays_as_it_is(arraytp, study, place):
    text = STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: ldrl, feedback: {iterations: 0}}\n"
    (place / "study.yml").write_text(text)
    outcome = arraytp("run", "study.yml", "--quiet")
    assert outcome.status == 0, outcome.err
    assert {row["step"] for row in rows(study / "seed-0" / "feedback.csv")} == {"0"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.epochs=0", "train.epochs: 0: a study of drift trains"),
        ("network={blocks: [{type: dense, units: 3}]}", "the network has one block, dense1, and none is inverted"),
    ],
)
def test_a_study_of_drift_of_nothing_is_refused(refused, place, setting, said):
    (place / "drift.yml").write_text(DRIFT)
    assert said in refused("run", "drift.yml", "--set", setting)


def test_a_study_of_drift_shows_no_testing(arraytp, place, monkeypatch):
    (place / "drift.yml").write_text(DRIFT)
    monkeypatch.setattr("arraytp.training.progress._PLAIN_SECONDS", 0)
    outcome = arraytp("run", "drift.yml", "--set", "train.steps=6")
    assert outcome.status == 0, outcome.err
    shown = [line for line in outcome.err.splitlines() if "step" in line]
    assert "step 1/6" in shown[0]
    assert not any("testing" in line for line in shown[:-1])


def test_a_study_whose_results_go_to_the_working_directory_has_its_name(arraytp, study, place, monkeypatch):
    (place / "study.yml").write_text(STUDY.split("variants:", maxsplit=1)[0] + "rule: {name: drl}\n")
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    outcome = arraytp("run", "../study.yml", "--quiet", "--out", ".", "--set", "data.dataset=../toy")
    assert outcome.status == 0, outcome.err
    assert "| here | 2 |" in outcome.out
