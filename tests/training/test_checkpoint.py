"""The checkpoint file: what was written is read back, and a file is replaced only by a complete one."""

import h5py
import numpy as np
import pytest

from arraytp import files
from arraytp.config import parse_config
from arraytp.errors import UserError
from arraytp.training.build import build as build_experiment
from arraytp.training.checkpoint import read_checkpoint, write_checkpoint
from arraytp.training.compare import finite_blocks


@pytest.fixture
def build():
    """Build a small experiment on the data that come with the package, streamed, so that none is read."""

    def make(rule="fa", optimizer="adam", dtype="float32", units=4, seed=0):
        tree = {
            "seed": seed,
            "dtype": dtype,
            "data": {"dataset": "fashion-mnist-10k", "in_memory_mb": 0},
            "network": {"blocks": [{"type": "dense", "units": units}, {"type": "dense", "units": 10}]},
            "rule": {"name": rule} if isinstance(rule, str) else rule,
            "optimizer": {"name": optimizer, "lr": 0.1},
            "train": {"epochs": 1, "batch_size": 8},
        }
        return build_experiment(parse_config(tree).variants[""])

    return make


def arrays(made):
    moments = [moment for moments in made.optimizer_state.moments for moment in moments]
    return [*made.network.weights, *made.network.biases, *made.rule_state.named().values(), *moments]


def fill(made, first):
    """Give every element of the state a value of its own."""
    for array in arrays(made):
        array[...] = np.arange(first, first + array.size).reshape(array.shape)
        first += array.size
    made.optimizer_state.step = first


RUN = {"position": {"loss": 0.1 + 0.2, "epoch": 3}, "rows": ["1,nan,inf", "2,1e-300,0.30000000000000004"]}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", ["bp", "fa", "dfa"])
def test_every_array_comes_back_bit_for_bit(build, tmp_path, rule, optimizer, dtype):
    written, read = (build(rule, optimizer, dtype, seed=seed) for seed in (0, 1))
    fill(written, 1)
    write_checkpoint(tmp_path / "c.h5", written, RUN)
    places = [array.ctypes.data for array in arrays(read)]
    assert read_checkpoint(tmp_path / "c.h5", read) == RUN
    for there, here in zip(arrays(written), arrays(read), strict=True):
        assert there.dtype == here.dtype == dtype
        np.testing.assert_array_equal(there, here)
    assert read.optimizer_state.step == written.optimizer_state.step
    assert [array.ctypes.data for array in arrays(read)] == places, "arrays that others hold must stay theirs"


def test_the_file_is_as_documented(build, tmp_path):
    made = build()
    fill(made, 1)
    write_checkpoint(tmp_path / "c.h5", made, RUN)
    with h5py.File(tmp_path / "c.h5") as file:
        assert (file.attrs["format"], file.attrs["version"]) == (b"arraytp-checkpoint", 2)
        assert set(file) == {"network", "rule", "optimizer", "run"}
        np.testing.assert_array_equal(file["network/1/weight"], made.network.weights[1])
        np.testing.assert_array_equal(file["network/0/bias"], made.network.biases[0])
        np.testing.assert_array_equal(file["rule/feedback/1/weight"], made.rule_state.weights[1])
        assert set(file["optimizer"]) == {"0", "1", "2", "3"}
        assert file["optimizer/0/1"].shape == (784, 4)


def test_a_checkpoint_of_version_1_goes_on_unless_its_feedback_is_numbered_otherwise(build, tmp_path):
    made, path = build(), tmp_path / "c.h5"
    write_checkpoint(path, made, RUN)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 1
    assert read_checkpoint(path, build()) == RUN
    with h5py.File(path, "r+") as file:
        file["rule/feedback/0/weight"] = np.zeros(3)
    with pytest.raises(
        UserError, match="is of version 1, in which the feedback of rules dfa and drl has other numbers"
    ):
        read_checkpoint(path, build())


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(build, tmp_path, seed):
    """Flips hit not only arrays but also counts, tables and HDF5's own structures; those in padding change nothing."""
    written, read, path = build(seed=0), build(seed=1), tmp_path / "c.h5"
    fill(written, 1)
    write_checkpoint(path, written, RUN | {"rows": RUN["rows"] * 50})
    content, generator = path.read_bytes(), np.random.default_rng(seed)
    with h5py.File(path) as file:
        chunk = file["run/state"].id.get_chunk_info(0)
    places = chunk.byte_offset + generator.integers(chunk.size, size=40), generator.integers(len(content), size=60)
    for place in np.concatenate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            run = read_checkpoint(path, read)
        except UserError:
            continue
        assert run == RUN | {"rows": RUN["rows"] * 50}
        assert read.optimizer_state.step == written.optimizer_state.step
        for there, here in zip(arrays(written), arrays(read), strict=True):
            np.testing.assert_array_equal(there, here)


def test_a_checkpoint_of_another_network_changes_nothing(build, tmp_path):
    """All arrays are checked before the first one is overwritten."""
    write_checkpoint(tmp_path / "c.h5", build(units=5), RUN)
    made = build(units=4)
    before = [array.copy() for array in arrays(made)]
    with pytest.raises(UserError, match=r"array network/0/weight is float32\[784, 5\], expected float32\[784, 4\]"):
        read_checkpoint(tmp_path / "c.h5", made)
    for there, here in zip(before, arrays(made), strict=True):
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize(
    ("other", "missing"),
    [({"rule": "bp"}, "rule/feedback/1/weight"), ({"optimizer": "sgd"}, "optimizer/0/0")],
    ids=["rule", "optimizer"],
)
def test_a_checkpoint_of_another_rule_or_optimiser_is_refused(build, tmp_path, other, missing):
    write_checkpoint(tmp_path / "c.h5", build(**other), RUN)
    with pytest.raises(UserError, match=f"has no array {missing}; it belongs to another network or rule"):
        read_checkpoint(tmp_path / "c.h5", build())


def test_a_missing_checkpoint_is_named(build, tmp_path):
    with pytest.raises(UserError, match=r"c\.h5: there is no checkpoint to continue from; --fresh starts over"):
        read_checkpoint(tmp_path / "c.h5", build())


def test_damage_of_any_array_is_noticed(build, tmp_path):
    made, path = build("bp", "sgd"), tmp_path / "c.h5"
    write_checkpoint(path, made, RUN)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        chunks = [file[f"network/{n}/{part}"].id.get_chunk_info(0) for n in (0, 1) for part in ("weight", "bias")]
    for chunk in chunks:
        for position in (chunk.byte_offset, chunk.byte_offset + chunk.size - 5):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(UserError, match="the checkpoint is damaged"):
                read_checkpoint(path, made)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(build, tmp_path, monkeypatch, step):
    made, path = build(), tmp_path / "c.h5"
    write_checkpoint(path, made, {"first": True})
    before = path.read_bytes()
    fill(made, 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (files.os, "fsync"), "replace": (files.Path, "replace")}[step], full)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(path, made, {"first": False})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.h5"]
    assert read_checkpoint(path, made) == {"first": True}


def test_writing_a_checkpoint_leaves_the_state_alone(build, tmp_path):
    made = build()
    fill(made, 1)
    before = [array.copy() for array in arrays(made)]
    write_checkpoint(tmp_path / "c.h5", made, RUN)
    for there, here in zip(before, arrays(made), strict=True):
        np.testing.assert_array_equal(there, here)


def test_blocks_that_are_not_finite_are_told_apart(build):
    made = build()
    assert finite_blocks(made.network) == [True, True]
    made.network.biases[1][3] = np.inf
    assert finite_blocks(made.network) == [True, False]
    made.network.weights[0][0, 0] = np.nan
    assert finite_blocks(made.network) == [False, False]


def test_the_random_hidden_layer_of_direct_feedback_is_kept(build, tmp_path):
    """It is stored as weight 0, which was the feedback of the first block in version 1."""
    made, fresh = build({"name": "drl", "hidden": 3}), build({"name": "drl", "hidden": 3}, seed=1)
    assert made.rule_state.weights[0].shape == (10, 3)
    write_checkpoint(tmp_path / "c.h5", made, RUN)
    fresh.rule_state.weights[0][...] = 0
    assert read_checkpoint(tmp_path / "c.h5", fresh) == RUN
    np.testing.assert_array_equal(fresh.rule_state.weights[0], made.rule_state.weights[0])
