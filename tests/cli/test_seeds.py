"""`arraytp run --seeds`, compared with runs of one seed each."""

import csv

import pytest

from arraytp.errors import UserError
from arraytp.training.experiment import Experiment


def test_every_variant_runs_with_every_seed_as_if_alone(arraytp, place, numbers):
    outcome = arraytp("run", "variants.yml", "--quiet", "--seeds", "2")
    assert outcome.status == 0
    assert "±" in outcome.out
    arraytp("run", "variants.yml", "--quiet", "--set", "seed=1", "--out", "alone")
    assert numbers(place / "results/variants/dfa/seed-1") == numbers(place / "alone/dfa")
    with (place / "results/variants/seeds.csv").open() as file:
        rows = [(row["variant"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [("bp", "0"), ("bp", "1"), ("dfa", "0"), ("dfa", "1")]


def test_seeds_can_be_named(arraytp, place):
    assert arraytp("run", "toy.yml", "--quiet", "--seeds", "7,3").status == 0
    assert {path.name for path in (place / "results/toy").iterdir() if path.is_dir()} == {"seed-3", "seed-7"}


def test_a_failed_seed_is_named_and_the_others_go_on(arraytp, place):
    text = (place / "toy.yml").read_text().replace("lr: 0.05", "lr: 1e30")
    (place / "bad.yml").write_text(text + "variants: {good: {optimizer: {lr: 0.05}}, bad: {}}\n")
    outcome = arraytp("run", "bad.yml", "--quiet", "--seeds", "2")
    assert outcome.status == 1
    errors = [line for line in outcome.err.splitlines() if "error" in line]
    assert len(errors) == 2
    assert all(f"bad seed {n}: not finite" in line for n, line in enumerate(errors))
    assert (place / "results/bad/good/seed-1/summary.json").exists()
    assert "Not finished: bad/seed-0, bad/seed-1." in outcome.out


def test_the_users_mistake_in_one_seed_is_status_2(arraytp, place, monkeypatch):
    forward = Experiment.forward

    def fails(self, *given):
        if self.config.seed == 1:
            raise UserError("toy/train-00002.h5: cannot be read")
        return forward(self, *given)

    monkeypatch.setattr(Experiment, "forward", fails)
    outcome = arraytp("run", "toy.yml", "--quiet", "--seeds", "3")
    assert outcome.status == 2
    assert outcome.err.splitlines() == ["arraytp: error: toy seed 1: toy/train-00002.h5: cannot be read"]
    assert [(place / f"results/toy/seed-{n}/summary.json").exists() for n in range(3)] == [True, False, True]


def test_resume_does_the_seeds_that_are_missing(arraytp, place, tree):
    arraytp("run", "toy.yml", "--quiet", "--seeds", "0,1")
    before = tree()
    outcome = arraytp("run", "toy.yml", "--quiet", "--seeds", "3", "--resume")
    assert outcome.status == 0
    after = tree()
    assert {path: after[path] for path in before if "seed-" in path} == {
        path: content for path, content in before.items() if "seed-" in path
    }
    assert "results/toy/seed-2/summary.json" in after


def test_runs_with_and_without_seeds_do_not_mix(arraytp, refused):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=0")
    assert "without --seeds" in refused("run", "toy.yml", "--seeds", "2")
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=0", "--seeds", "2", "--out", "other")
    for more in ((), ("--fresh",)):
        assert "with --seeds" in refused("run", "toy.yml", "--out", "other", *more)


@pytest.mark.parametrize(
    "value", ["0", "-1", "x", "1,1", "", "1,,2", "1.5", "10000000", "1,9223372036854775808", "9" * 99]
)
def test_what_are_no_seeds_is_refused(refused, value):
    assert refused("run", "toy.yml", "--seeds", value).startswith(f"--seeds {value}")


def test_seeds_end_with_the_largest(refused):
    largest = 2**63 - 1
    said = refused("run", "toy.yml", "--seeds", "2", "--set", f"seed={largest}")
    assert said == f"--seeds 2: from seed {largest} on goes beyond the largest seed, {largest}"
    assert "a seed is at most" in refused("run", "toy.yml", "--seeds", "9" * 5000)


def test_a_study_has_seeds_of_its_own(refused, place):
    text = (place / "toy.yml").read_text().replace("rule: {name: fa}", "rule: {name: ldrl}")
    (place / "study.yml").write_text(text + "study: {seeds: 2, rounds: 1}\n")
    assert "study.seeds" in refused("run", "study.yml", "--seeds", "2")


def test_a_study_does_not_begin_among_runs_of_seeds(arraytp, refused):
    """With --fresh, the study would remove their results."""
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=0", "--seeds", "2")
    study = ("--set", "rule.name=ldrl", "--set", "study={seeds: 2, rounds: 1}")
    for more in ((), ("--fresh",)):
        assert "holds results of a run with --seeds" in refused("run", "toy.yml", *study, *more)


def test_seeds_csv_has_bp_first_and_seeds_by_number(arraytp, place):
    text = (place / "toy.yml").read_text().replace("rule: {name: fa}\n", "")
    (place / "two.yml").write_text(f"{text}variants: {{a: {{rule: {{name: fa}}}}, bp: {{rule: {{name: bp}}}}}}\n")
    assert arraytp("run", "two.yml", "--quiet", "--set", "train.epochs=0", "--seeds", "10,9").status == 0
    found = [line.split(",")[:2] for line in (place / "results/two/seeds.csv").read_text().splitlines()[1:]]
    assert found == [["bp", "9"], ["bp", "10"], ["a", "9"], ["a", "10"]]
