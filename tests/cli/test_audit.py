"""`arraytp audit`: what it prints and writes, its exit status, and what is refused."""

import importlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from arraytp.audit import Check, audit
from arraytp.commands.audit import _table
from arraytp.config import load_one
from arraytp.training.experiment import Experiment
from arraytp.training.plan import plan

ROOT = Path(__file__).parents[2]

LDRL = ("--set", "rule={name: ldrl, feedback: {iterations: 2, sigma: 0.3}}")
SQUARE = ("--set", "network={square: true, init: orthogonal, blocks: [{type: dense, units: 6, activation: leaky-relu}, "
          "{type: dense, units: 3}]}", "--set", "rule={name: gait-prop}")  # fmt: skip
RULES = {
    "bp": ("--set", "rule={name: bp}"),
    "fa": ("--set", "data.flip=0.5", "--set", "data.crop_padding=1"),
    "dfa": ("--set", "rule={name: dfa}"),
    "dfa bent": ("--set", "rule={name: dfa}", "--set", "loss={name: mse}", "--set", "network={blocks: [{type: dense, "
                 "units: 6, activation: tanh}, {type: dense, units: 3, activation: tanh}]}"),
    "sign-symmetry": ("--set", "rule={name: sign-symmetry}"),
    "sign-symmetry batch": ("--set", "rule={name: sign-symmetry, magnitude: batch}"),
    "sign-symmetry fixed": ("--set", "rule={name: sign-symmetry, magnitude: fixed}"),
    "kolen-pollack": ("--set", "rule={name: kolen-pollack, decay: 0.1}"),
    "weight-mirror": ("--set", "rule={name: weight-mirror}"),
    "alignment": ("--set", "rule={name: alignment}"),
    "alignment wm": ("--set", "rule={name: alignment, loss: wm}"),
    "alignment ia": ("--set", "rule={name: alignment, loss: ia}"),
    "gait-prop": (*SQUARE, "--set", "optimizer={name: adam, lr: 0.01, orthogonality: 2.0}"),
    "tp": ("--set", "rule={name: tp}"),
    "dtp": ("--set", "rule={name: dtp}"),
    "dtp near": ("--set", "rule={name: dtp, beta: 1e-9}"),
    "ldrl": (*LDRL, "--set", "rule.unpool=accumulate"),
    "ldrl symmetric": ("--set", "rule={name: ldrl, feedback_init: symmetric}"),
    "ldrl-parallel": ("--set", "rule={name: ldrl-parallel}"),
    "drl": ("--set", "rule={name: drl}", "--set", "schedule={name: cosine}"),
    "ldrl expected": ("--set", "rule={name: ldrl, expected: true}"),
    "drl expected": ("--set", "rule={name: drl, expected: true}"),
    "ldrl mse": (*LDRL, "--set", "loss={name: mse, label_smoothing: 0.1}"),
    "fa held out": ("--set", "train.validation=7", "--set", "data.in_memory_mb=0"),
    "bp smoothed": (
        "--set",
        "rule={name: bp}",
        "--set",
        "loss={label_smoothing: 0.1, reduction: sum}",
        "--set",
        "schedule={name: step, epochs: [2, 5], warmup_steps: 10}",
    ),
    "drl optimum": ("--set", "rule={name: drl, expected: optimum}"),
}  # fmt: skip


def errors(outcome):
    """Return the lines on standard error that are not notes."""
    return [line for line in outcome.err.splitlines() if not line.startswith("arraytp: note: ")]


def stands_for(name):
    """Return the object that a dotted name refers to."""
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        try:
            return reduce(getattr, parts[stop:], importlib.import_module(".".join(parts[:stop])))
        except ModuleNotFoundError:
            continue
    raise AssertionError(name)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_passes_and_names_functions_that_exist(arraytp, rule):
    outcome = arraytp("audit", "toy.yml", "--json", "a.json", *RULES[rule])
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out
    (record,) = json.loads(Path("a.json").read_text()).values()
    assert (record["rule"], record["failed"]) == (rule.split()[0], 0)
    assert record["passed"] > 50
    checks = record["checks"]
    assert record["passed"] + record["information"] == len(checks)
    assert all(callable(stands_for(name)) for name in {check["function"] for check in checks})
    assert all(check["what"] and check["source"] for check in checks)
    assert {check["verdict"] for check in checks} == {"pass", "info"}
    assert all((check["tolerance"] is None) == (check["verdict"] == "info") for check in checks)
    lines = outcome.out.splitlines()
    assert all(any(line.startswith(check["what"]) for line in lines) for check in checks)
    assert re.fullmatch(rf"toy: {record['passed']} passed, 0 failed, \d+ for information; \d+ s", lines[-2])


@pytest.mark.parametrize("rule", ["bp", "fa", "gait-prop", "ldrl expected", "drl optimum", "gnt"])
def test_every_rule_passes_where_one_class_makes_every_gradient_zero(arraytp, place, pack, rule):
    pack(place / "one", classes=1)
    (place / "one.yml").write_text((place / "toy.yml").read_text().replace("units: 3", "units: 1"))
    options = [
        option.replace("units: 3", "units: 1") for option in RULES.get(rule, ("--set", f"rule={{name: {rule}}}"))
    ]
    outcome = arraytp("audit", "one.yml", "--set", "data.dataset=one", *options)
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out


def test_every_variant_is_audited_unless_one_is_chosen(arraytp):
    outcome = arraytp("audit", "variants.yml", "--json", "a.json")
    assert outcome.status == 0
    assert list(json.loads(Path("a.json").read_text())) == ["bp", "dfa"]
    outcome = arraytp("audit", "variants.yml", "--json", "a.json", "--variant", "dfa")
    assert outcome.status == 0
    assert list(json.loads(Path("a.json").read_text())) == ["dfa"]


@pytest.mark.parametrize(
    ("columns", "header"),
    [
        (70, ["what", "error", "verdict"]),
        (80, ["what", "error", "tolerance", "verdict"]),
        (200, ["what", "by", "function", "error", "tolerance", "verdict"]),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns(monkeypatch, columns, header):
    """Lines that wrap cannot be read; a pipe gets all columns."""
    check = Check("conv2: " + 43 * "x", "Eq. 4", "arraytp." + 40 * "y", 1e-9, 1e-6)
    monkeypatch.setenv("COLUMNS", str(columns))
    config = load_one(ROOT / "runs" / "quickstart.yml", variant="fa")
    full = _table("fa", config, [("ops", check)], 1.0).splitlines()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = _table("fa", config, [("ops", check)], 1.0).splitlines()
    assert shown[1].split() == header
    assert max(map(len, shown)) <= columns
    assert full[1].split() == ["what", "by", "function", "error", "tolerance", "verdict"]


def test_a_check_that_fails_is_marked_and_the_status_is_1(arraytp, monkeypatch):
    monkeypatch.setattr("arraytp.audit.optimisers.SUMS", -1.0)
    outcome = arraytp("audit", "toy.yml", "--json", "a.json")
    (record,) = json.loads(Path("a.json").read_text()).values()
    assert (outcome.status, outcome.err) == (1, "")
    failed = [check for check in record["checks"] if check["verdict"] == "fail"]
    assert record["failed"] == len(failed) > 0
    assert {check["function"] for check in failed} == {"arraytp.optim.apply_updates"}
    assert sum(line.endswith("FAIL") for line in outcome.out.splitlines()) == len(failed)


def test_what_cannot_be_computed_is_a_check_that_failed(arraytp, monkeypatch):
    monkeypatch.setattr("arraytp.optim.init_optimizer", lambda *_: None)
    outcome = arraytp("audit", "toy.yml", "--json", "a.json")
    (record,) = json.loads(Path("a.json").read_text()).values()
    assert (outcome.status, outcome.err) == (1, "")
    (failed,) = [check for check in record["checks"] if check["verdict"] == "fail"]
    assert failed["what"].startswith("optimiser: cannot be computed: AttributeError: ")
    assert failed["error"] is None


def test_one_class_has_no_loss_and_passes(arraytp, pack):
    pack(Path("one"), classes=1)
    settings = [
        "data.dataset=one",
        "train.batch_size=1",
        "network={blocks: [{type: dense, units: 1}]}",
        "rule={name: bp}",
    ]
    outcome = arraytp("audit", "toy.yml", *(word for setting in settings for word in ("--set", setting)))
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out


def test_wrong_input_is_one_line(refused, place):
    Path("folder").mkdir()
    Path("other.json").write_text('{"a": {"b": 1}}')
    before = Path("toy.yml").read_bytes()
    for arguments, error in (
        (("nowhere.yml",), "nowhere.yml"),
        (("toy.yml", "--variant", "x"), "toy.yml: has no variant 'x'; it has no variants"),
        (("variants.yml", "--variant", "x"), "variants.yml: has no variant 'x'; its variants are bp, dfa"),
        (("toy.yml", "--json", "missing/a.json"), "--json missing/a.json: there is no folder missing"),
        (("toy.yml", "--json", "folder"), "--json folder: is a folder; give a file, for example folder/figures.json"),
        (
            ("toy.yml", "--json", "toy.yml"),
            "--json toy.yml: exists and is not an earlier result of this command; only such",
        ),
        (("toy.yml", "--json", "other.json"), "--json other.json: exists and is not an earlier result"),
        (("toy.yml", "--set", "data.dataset=none"), "toy.yml: data.dataset: data set 'none': no such folder"),
        (("toy.yml", "--dtype", "float32"), "No such option"),
    ):
        assert error in refused("audit", *arguments)
    assert Path("toy.yml").read_bytes() == before


def test_a_table_goes_through_links_and_into_pipes(arraytp):
    Path("target.json").write_text("{}")
    Path("link.json").symlink_to("target.json")
    os.mkfifo("pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(Path("pipe").read_bytes)
        for name in ("link.json", "pipe"):
            assert arraytp("audit", "toy.yml", "--json", name).status == 0
        content = json.loads(read.result())
    assert Path("link.json").is_symlink()
    assert list(json.loads(Path("target.json").read_text())) == list(content)
    assert not Path("pipe").is_file()


def test_an_input_that_is_not_finite_is_one_line(refused):
    std = "data.normalize={mean: [0.0], std: [1e-310]}"
    error = refused("audit", "toy.yml", "--set", std, "--set", "dtype=float64", status=1)
    assert error == "toy: not finite on the first batch: input; see data.normalize and network.init"


def test_blocks_of_one_unit_have_no_cosine_to_judge(arraytp):
    """The angle between a B and a W of one number each is 0° or 180°, even if their streams are independent."""
    units = ", ".join(f"{{type: dense, units: {count}}}" for count in (1, 1, 3))
    outcome = arraytp("audit", "toy.yml", "--set", f"network={{blocks: [{units}]}}", "--set", "rule={name: fa}")
    assert (outcome.status, outcome.err) == (0, "")


def test_blocks_of_few_numbers_may_have_any_cosine(arraytp):
    """In three dimensions, one in ten pairs of independent directions has a |cosine| above cos 26°."""
    units = ", ".join(f"{{type: dense, units: {count}}}" for count in (1, 3))
    for seed in range(20):
        outcome = arraytp(
            "audit", "toy.yml", "--set", f"network={{blocks: [{units}]}}", "--set", "rule={name: fa}", "--set",
            f"seed={seed}",
        )  # fmt: skip
        assert (outcome.status, errors(outcome)) == (0, []), outcome.out


def test_gauss_newton_targets_of_many_classes_are_audited(arraytp, place, pack):
    pack(place / "many", classes=21)
    (place / "many.yml").write_text((place / "toy.yml").read_text().replace("units: 3", "units: 21"))
    outcome = arraytp("audit", "many.yml", "--set", "data.dataset=many", "--set", "rule={name: gnt}")
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out


def test_the_regulariser_of_an_orthogonal_first_block_is_audited(arraytp):
    """For an orthogonal W, the gradient is mere rounding and could not be checked, so W must be moved first."""
    square = [option.replace("units: 6", "units: 64") for option in RULES["gait-prop"]]
    outcome = arraytp("audit", "toy.yml", *square)
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out


@pytest.mark.parametrize("rule", ["ldrl, expected: true", "drl, expected: optimum"])
def test_a_block_whose_units_are_silent_is_audited(arraytp, monkeypatch, rule):
    """A block whose ReLU passes nothing has no Jacobian to learn; large biases cause this for some of six seeds."""
    monkeypatch.setattr("arraytp.audit.setting.BIAS", 1e3)
    units = ", ".join(f"{{type: dense, units: {count}, activation: relu}}" for count in (8, 1))
    options = "--set", f"network={{blocks: [{units}, {{type: dense, units: 3}}]}}", "--set", f"rule={{name: {rule}}}"
    for seed in range(6):
        assert "cannot be computed" not in arraytp("audit", "toy.yml", *options, "--set", f"seed={seed}").out


def test_a_huge_learning_rate_is_no_error_of_the_math(arraytp):
    outcome = arraytp("audit", "toy.yml", "--set", "optimizer.lr=1e30")
    assert (outcome.status, outcome.err) == (0, "")


def test_a_damaged_shard_is_a_check_that_failed(arraytp, place):
    shard = place / "toy" / "train-00001.h5"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    outcome = arraytp("audit", "toy.yml")
    assert (outcome.status, outcome.err) == (1, "")
    failed = [line for line in outcome.out.splitlines() if line.endswith("FAIL")]
    assert failed
    assert all("toy/train-00001.h5" in line and "rows" in line for line in failed)


@pytest.mark.parametrize("rule", ["fa", "ldrl", "drl", "dtp", "gait-prop", "ldrl expected", "drl expected"])
def test_a_device_is_held_against_the_host(device, place, rule):
    words = [word for word in RULES[rule] if word != "--set"]
    checks = list(audit(plan(load_one("toy.yml", words), device.backend)))
    assert [check for _, check in checks if check.verdict == "fail"] == []
    # Two checks per block: activations and updates.
    assert sum(family == "device" for family, _ in checks) == (4 if rule == "gait-prop" else 6)


def test_a_rule_that_magnifies_roundings_may_differ_from_the_host_by_them_and_not_by_more(device, place, monkeypatch):
    """With η = 1e-12, only four digits of a nudge survive rounding."""
    words = [word for word in RULES["gait-prop"] if word != "--set"]
    planned, updates = plan(load_one("toy.yml", [*words, "rule.eta=1e-12"]), device.backend), Experiment.updates
    forward = Experiment.forward

    def rounded(self, images, *given):
        return forward(self, images if self.plan.backend.on_host else images * (1 + 2**-52), *given)

    def verdicts():
        return {check.verdict for family, check in audit(planned) if family == "device"}

    def tenth_too_large(self, step):
        factor = 1 if self.plan.backend.on_host else 1.1
        return [(weight * factor, bias) for weight, bias in updates(self, step)]

    monkeypatch.setattr(Experiment, "forward", rounded)
    assert verdicts() == {"pass"}
    monkeypatch.setattr(Experiment, "updates", tenth_too_large)
    assert "fail" in verdicts()


def test_streamed_data_is_audited_too(arraytp):
    outcome = arraytp("audit", "toy.yml", "--set", "data.in_memory_mb=0", "--set", "data.pool_images=16")
    assert (outcome.status, errors(outcome)) == (0, []), outcome.out
    assert np.any([line.startswith("train: pixels of the first batch") for line in outcome.out.splitlines()])
