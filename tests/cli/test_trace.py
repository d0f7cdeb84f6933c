"""`arraytp trace`: what is in the file, starting from a file, bounded memory, and what is refused."""

import re
import resource
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from arraytp.config import load_one
from arraytp.ops.noise import gaussian
from arraytp.training.build import build
from arraytp.training.trace import write_trace

ROOT = Path(__file__).parents[2]
SQUARE = ["network.blocks=[{type: dense, units: 6, activation: leaky-relu}, {type: dense, units: 3}]", "rule.eta=0.01",
          "network.square=true", "network.init=orthogonal"]  # fmt: skip
LDRL = ("--set", "rule.name=ldrl", "--set", "rule.feedback.iterations=3")


def arrays(path):
    """Return every array of a file by name, and every attribute by group and name."""
    found, attributes = {}, {}

    def take(name, item):
        attributes.update({f"{name}@{key}": value for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path) as file:
        take("", file)
        file.visititems(take)
    return found, attributes


def changed(path, name, value):
    """Replace an array of a file, or remove it if `value` is None."""
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value


@pytest.fixture
def weights(arraytp):
    """The trace of toy.yml."""
    assert arraytp("trace", "toy.yml", "--out", "w.h5").status == 0
    return Path("w.h5")


def test_only_rules_with_targets_have_the_beta_of_targets(arraytp):
    words = ("trace", "toy.yml", "--out", "t.h5", "--set")
    for rule, beta in (("{name: dtp, beta: 0.25}", 0.25), ("{name: alignment, loss: wm}", None), ("{name: fa}", None)):
        assert arraytp(*words, f"rule={rule}").status == 0
        assert arrays("t.h5")[1].get("updates@beta") == beta


def test_the_file_names_its_rule_and_config(arraytp):
    outcome = arraytp("trace", "toy.yml", "--out", "t.h5", "--set", "seed=4", "--dtype", "float64")
    assert (outcome.status, outcome.err) == (0, "")
    assert re.fullmatch(r"trace: t\.h5, \d+\.\d MB\n", outcome.out)
    found, attributes = arrays("t.h5")
    wanted = {"format": "arraytp-trace", "version": 2, "rule": "fa", "dtype": "float64", "backend": "numpy", "seed": 4}
    assert {key: attributes[f"@{key}"] for key in wanted} == wanted
    Path("again.yml").write_text(attributes["@config"])
    assert load_one("again.yml") == load_one("toy.yml", ["seed=4", "dtype=float64"])
    assert {array.dtype.name for name, array in found.items()} == {"float64", "int64"}
    assert found["input/x"].shape == (16, 8, 8, 1)
    assert "updates@beta" not in attributes


def test_the_step_is_the_first_of_a_run(arraytp, place):
    assert arraytp("trace", "toy.yml", "--out", "t.h5").status == 0
    experiment = build(load_one("toy.yml"))
    images, labels = next(experiment.train_loader.batches(0))
    score = experiment.step(images, labels)
    found, attributes = arrays("t.h5")
    np.testing.assert_array_equal(found["input/y"], labels)
    assert attributes["activations@loss"] == float(score.loss)
    for n, weight in enumerate(experiment.network.weights):
        np.testing.assert_array_equal(found[f"weights_after/forward/{n}/weight"], weight)


def test_targets_are_those_of_the_training_beta(arraytp, place):
    for beta in (0.3, 0.6):
        assert arraytp("trace", "toy.yml", "--out", f"{beta}.h5", *LDRL, "--set", f"rule.beta={beta}").status == 0
    (small, attributes), (large, _) = arrays("0.3.h5"), arrays("0.6.h5")
    assert attributes["updates@beta"] == 0.3
    np.testing.assert_allclose(2 * small["targets/2/delta"], large["targets/2/delta"], rtol=1e-5)


@pytest.mark.parametrize("settings", [(), LDRL], ids=["fa", "ldrl"])
def test_a_trace_from_a_trace_is_the_same_file(arraytp, place, settings):
    """The second trace overwrites the first; with another seed, weights and batch still come from the file."""
    assert arraytp("trace", "toy.yml", "--out", "a.h5", *settings).status == 0
    for _ in range(2):
        outcome = arraytp("trace", "toy.yml", "--out", "b.h5", "--weights", "a.h5", "--batch", "a.h5", *settings)
        assert outcome.status == 0
        assert Path("a.h5").read_bytes() == Path("b.h5").read_bytes()
    more = ("--set", "seed=9", "--no-noise")
    assert (
        arraytp("trace", "toy.yml", "--out", "c.h5", "--weights", "a.h5", "--batch", "a.h5", *settings, *more).status
        == 0
    )
    (mine, _), (wanted, _) = arrays("c.h5"), arrays("a.h5")
    for name in ("input/x", "input/y", "weights/forward/1/weight", "weights/feedback/1/weight", "activations/2/out"):
        np.testing.assert_array_equal(mine[name], wanted[name])
    assert not np.array_equal(arrays("c.h5")[1]["@seed"], arrays("a.h5")[1]["@seed"])


@pytest.mark.parametrize("settings", [(), LDRL], ids=["fa", "ldrl"])
def test_a_trace_starts_from_the_weights_of_a_checkpoint(arraytp, refused, settings):
    assert arraytp("run", "toy.yml", "--quiet", *settings).status == 0
    trained = "results/toy/checkpoint.h5"
    assert arraytp("trace", "toy.yml", "--out", "t.h5", "--weights", trained, *settings).status == 0
    found, _ = arrays("t.h5")
    with h5py.File(trained) as file:
        for n in (0, 1, 2):
            np.testing.assert_array_equal(found[f"weights/forward/{n}/weight"], file[f"network/{n}/weight"])
        np.testing.assert_array_equal(found["weights/feedback/1/weight"], file["rule/feedback/1/weight"])
    shorter = "network={blocks: [{type: dense, units: 3}]}"
    said = refused("trace", "toy.yml", "--out", "u.h5", "--weights", trained, "--set", shorter)
    assert "has network/1, but this config's network has the 1 blocks 0 to 0" in said


@pytest.mark.parametrize("rule", ["dtp", "ldrl", "ldrl-parallel", "drl"])
def test_noise_can_be_left_out_and_drawn_again_from_its_keys(arraytp, place, rule):
    settings = ("--set", f"rule.name={rule}", "--set", "rule.feedback={iterations: 2, sigma: 0.3}", "--set", "seed=5")
    for name, more in (("with.h5", ()), ("without.h5", ("--no-noise",))):
        assert arraytp("trace", "toy.yml", "--out", name, *settings, *more).status == 0
    (full, attributes), (rest, same) = arrays("with.h5"), arrays("without.h5")
    noises = {name for name in full if name.endswith(("/epsilon", "/eta"))}
    assert set(rest) == set(full) - noises
    assert all(np.array_equal(rest[name], full[name], equal_nan=True) for name in rest)
    assert set(same) == set(attributes)
    assert len({tuple(attributes[f"{n.rpartition('/')[0]}@{n.rpartition('/')[2]}_key"]) for n in noises}) == len(noises)
    for name in noises:
        group, _, kind = name.rpartition("/")
        drawn = gaussian(np.empty_like(full[name]), 0.3, 0, 5, *same[f"{group}@{kind}_key"])
        np.testing.assert_array_equal(drawn, full[name])


@pytest.mark.parametrize("rule", ["fa", "gait-prop", "dtp", "tp", "ldrl", "ldrl-parallel", "drl"])
def test_a_device_writes_what_the_host_writes(device, place, noise_of_the_host, rule):
    more = SQUARE if rule == "gait-prop" else []
    config = load_one("toy.yml", [f"rule.name={rule}", "dtype=float64", *more])
    for name, backend in (("here.h5", None), ("there.h5", device.backend)):
        experiment = build(config, backend)
        images, labels = next(experiment.train_loader.batches(0))
        assert write_trace(Path(name), experiment, images, labels) == ""
    (here, _), (there, _) = arrays("here.h5"), arrays("there.h5")
    assert set(here) == set(there)
    for name, array in here.items():
        np.testing.assert_allclose(there[name], array, rtol=1e-7, atol=1e-9 * np.abs(array).max(), err_msg=name)


def test_memory_does_not_grow_with_the_number_of_iterations(place):
    """Noise is written as it is drawn: keeping that of 40 more iterations would take 6 MB."""
    peaks, sizes = [], []
    for iterations in (2, 42):
        settings = ["rule.name=ldrl", f"rule.feedback.iterations={iterations}", "train.batch_size=40"]
        experiment = build(load_one("toy.yml", [*settings, "network.blocks.0.channels=64", "dtype=float64"]))
        images, labels = next(experiment.train_loader.batches(0))
        tracemalloc.start()
        write_trace(Path("t.h5"), experiment, images, labels)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(Path("t.h5").stat().st_size)
    assert sizes[1] - sizes[0] > 6e6
    # Not 0: it is a matter of chance which buffers two threads hold at once.
    assert peaks[1] - peaks[0] < 3e6


def test_a_missing_section_is_told_of_as_by_the_other_commands(refused, place):
    """The command sets train.exact to false itself; a message about that would confuse the user."""
    config = (place / "toy.yml").read_text()
    (place / "none.yml").write_text("\n".join(line for line in config.splitlines() if not line.startswith("train")))
    said = refused("trace", "none.yml", "--out", "t.h5")
    assert "train is missing" in said
    assert "exact" not in said


def test_a_config_with_variants_needs_one_chosen(arraytp, refused):
    assert "variants.yml: has the variants bp, dfa; choose one" in refused("trace", "variants.yml", "--out", "t.h5")
    assert "no variant 'x'" in refused("trace", "variants.yml", "--out", "t.h5", "--variant", "x")
    assert arraytp("trace", "variants.yml", "--out", "t.h5", "--variant", "dfa").status == 0


def test_only_traces_are_overwritten(refused, arraytp, place):
    Path("folder").mkdir()
    with h5py.File("several.h5", "w") as file:
        file.attrs["format"] = [1, 2]
    for path, error in (
        ("toy.yml", "--out toy.yml: exists and is not a trace; only traces are overwritten; give another file"),
        ("toy/train-00000.h5", "exists and is not a trace"),
        ("several.h5", "exists and is not a trace"),
        ("folder", "--out folder: is a folder; give a file, for example folder/trace.h5"),
        ("", "is a folder"),
        ("nowhere/t.h5", "--out nowhere/t.h5: there is no folder nowhere"),
    ):
        assert error in refused("trace", "toy.yml", "--out", path)
    assert "--out" in refused("trace", "toy.yml")
    for seed in (1, 2):
        assert arraytp("trace", "toy.yml", "--out", "t.h5", "--set", f"seed={seed}").status == 0
    assert arrays("t.h5")[1]["@seed"] == 2


def test_a_full_disk_leaves_the_former_trace(refused, weights):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        assert "--out w.h5: cannot be written: File too large" in refused("trace", "toy.yml", "--out", "w.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_weights_that_do_not_fit_are_named_with_both_shapes(refused, weights):
    start = ("trace", "toy.yml", "--out", "t.h5", "--weights", "w.h5")
    changed(weights, "weights/forward/1/weight", np.zeros((5, 8), "float32"))
    assert refused(*start) == "w.h5: weights/forward/1/weight is float32[5, 8]; this config needs float32[36, 8]"
    assert "weights/forward/0/weight is float32[3, 3, 1, 4]; this config needs float64" in refused(
        *start, "--dtype", "float64"
    )
    changed(weights, "weights/forward/1/weight", np.zeros((36, 8), "float32"))
    changed(weights, "weights/feedback/2/weight", None)
    assert refused(*start) == "w.h5: has no array weights/feedback/2/weight, needed as float32[8, 3]"
    assert refused(*start[:-1], "x.h5") == "x.h5: there is no such file"
    assert refused(*start[:-1], "toy.yml").startswith("toy.yml: cannot be read as HDF5")


def test_weights_of_more_blocks_are_refused(refused, weights):
    """The first blocks of a longer network, taken alone, would be another network."""
    changed(weights, "weights/forward/2/bias", np.zeros(3, "float32"))
    with h5py.File(weights, "r+") as file:
        file["weights/forward/10/weight"] = np.zeros((3, 3), "float32")
        file["weights/forward/3/weight"] = np.zeros((3, 3), "float32")
    assert refused("trace", "toy.yml", "--out", "t.h5", "--weights", "w.h5") == (
        "w.h5: has weights/forward/3, but this config's network has the 3 blocks 0 to 2; give weights of the same "
        "network"
    )


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("input/x", np.zeros((3, 8, 7, 1), "float32"), "input/x is [3, 8, 7, 1]; this config needs [B, 8, 8, 1], B at"),
        ("input/x", np.zeros((0, 8, 8, 1), "float32"), "input/x is [0, 8, 8, 1]; this config needs [B, 8, 8, 1], B at"),
        ("input/x", np.float32(1), "input/x is []"),
        ("input/x", np.zeros((16, 8, 8, 1)), "input/x is float64[16, 8, 8, 1]; this config needs float32"),
        ("input/x", None, "has no array input/x, needed as float32"),
        ("input/y", np.zeros(15, "int64"), "input/y is int64[15]; this config needs int64[16]"),
        ("input/y", np.full(16, 3), "input/y holds 3; needs labels from 0 to 2"),
        ("input/y", np.full(16, -1), "input/y holds -1; needs labels from 0 to 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_named_with_both_shapes(refused, weights, name, value, error):
    changed(weights, name, value)
    message = refused("trace", "toy.yml", "--out", "t.h5", "--batch", "w.h5")
    assert message.startswith("w.h5: ")
    assert error in message


def test_a_batch_may_have_any_number_of_samples_and_be_flat_for_a_dense_net(arraytp, place):
    blocks = ("--set", "network.blocks=[{type: dense, units: 4, activation: tanh}, {type: dense, units: 3}]")
    with h5py.File("flat.h5", "w") as file:
        file["input/x"], file["input/y"] = np.ones((2, 64), "float32"), np.array([0, 2])
    assert arraytp("trace", "toy.yml", "--out", "t.h5", "--batch", "flat.h5", *blocks, *LDRL).status == 0
    assert arrays("t.h5")[0]["activations/0/out"].shape == (2, 4)


def test_numbers_that_are_not_finite_are_written_and_named(arraytp, weights):
    changed(weights, "weights/forward/1/bias", np.full(8, np.nan, "float32"))
    outcome = arraytp("trace", "toy.yml", "--out", "t.h5", "--weights", "w.h5")
    assert outcome.status == 1
    assert "t.h5: weights/forward/1/bias is the first array with NaN or infinity in it" in outcome.err
    assert np.isnan(arrays("t.h5")[0]["bp/0/weight"]).all()
