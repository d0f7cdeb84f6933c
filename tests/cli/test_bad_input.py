"""Mistakes of the user: one line that says what is wrong and how to fix it, the exit status, nothing half-written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from arraytp import cli
from arraytp.backend import Backend
from arraytp.cli import main
from arraytp.training.experiment import Experiment
from arraytp.training.loop import Run


def blocks(text):
    return f"network={{blocks: [{text}]}}"


SETTINGS = {
    "a misspelt key": ("optimizer.lrr=1", ["optimizer.lrr is not a known key; did you mean lr?"]),
    "a misspelt section": ("trian.epochs=1", ["trian is not a known key; did you mean train?"]),
    "a misspelt rule": ("rule.name=dfaa", ["rule.name must be one of bp, fa", "did you mean dfa?"]),
    "text for a number": ("train.epochs=many", ["train.epochs must be a whole number of at least 0", '"many"']),
    "a fraction for a count": ("train.batch_size=1.5", ["train.batch_size must be a whole number", "1.5"]),
    "negative epochs": ("train.epochs=-1", ["train.epochs", "at least 0", "-1"]),
    "an empty batch": ("train.batch_size=0", ["train.batch_size", "at least 1", "0"]),
    "an empty evaluation batch": ("train.eval_batch_size=0", ["train.eval_batch_size", "at least 1"]),
    "a negative seed": ("seed=-1", ["seed", "at least 0", "-1"]),
    "a negative rate": ("optimizer.lr=-0.1", ["optimizer.lr must be a number above 0", "-0.1"]),
    "a rate that is not a number": ("optimizer.lr=.nan", ["optimizer.lr must be a finite number"]),
    "a kernel of no size": ("network.blocks.0.kernel=0", ["network.blocks.0.kernel", "at least 1"]),
    "no channels": ("network.blocks.0.channels=-4", ["network.blocks.0.channels", "at least 1", "-4"]),
    "a stride of nothing": ("network.blocks.0.stride=0", ["network.blocks.0.stride", "at least 1"]),
    "an unknown activation": (
        "network.blocks.0.activation=relu6",
        ["network.blocks.0.activation", "did you mean relu?"],
    ),
    "an unknown block": ("network.blocks.9.units=3", ["network.blocks has the entries 0 to 2; 9 is none of them"]),
    "no equals sign": ("seed", ["--set seed: expected key.path=value"]),
    "no key": ("=1", ["expected key.path=value"]),
    "nothing": ("", ["expected key.path=value"]),
    "broken YAML": ("train={epochs: ", ["not valid YAML"]),
    "a variant that is not there": ("variants.bp.seed=1", ["NAME among the variants: none"]),
    "a data set that is not there": ("data.dataset=nowhere", ["'nowhere'", "fashion-mnist-10k"]),
    "a data set that is a file": ("data.dataset=toy.yml", ["data set toy.yml: is a file", "arraytp data pack"]),
    "a data set that is some folder": ("data.dataset=.", ["dataset.json: not found", "arraytp data pack"]),
    "three means for one channel": (
        "data.normalize={mean: [0, 0, 0], std: [1, 1, 1]}",
        ["data.normalize: 3 values of mean and std", "toy need 1, one per channel"],
    ),
    "means without deviations": ("data.normalize={mean: [0]}", ["data.normalize.std is missing"]),
    "a deviation of zero": ("data.normalize={mean: [0], std: [0]}", ["data.normalize.std.0", "above 0"]),
    "no CuPy": ("backend=cupy", ["backend cupy: ", "use --backend numpy"]),
    "a convolution after a dense block": (
        blocks("{type: dense, units: 8}, {type: conv, channels: 2, kernel: 3}, {type: dense, units: 3}"),
        ["block 1 (conv1)", "input 8", "cannot follow a dense block"],
    ),
    "a kernel larger than the image": (
        blocks("{type: conv, channels: 2, kernel: 9}, {type: dense, units: 3}"),
        ["block 0 (conv1)", "input 8x8x1", "kernel 9 does not fit", "at most 8"],
    ),
    "a pool larger than what it pools": (
        blocks("{type: conv, channels: 2, kernel: 3, pool: {kernel: 7, stride: 1}}, {type: dense, units: 3}"),
        ["block 0 (conv1)", "pool over", "6x6", "kernel 7 does not fit", "at most 6"],
    ),
    "a pool with too wide a border": (
        "network.blocks.0.pool={kernel: 3, stride: 1, padding: 2}",
        ["block 0 (conv1)", "input 8x8x1", "pool padding 2", "half of its kernel 3"],
    ),
    "a second convolution that finds too little": (
        blocks("{type: conv, channels: 2, kernel: 7}, {type: conv, channels: 2, kernel: 3}, {type: dense, units: 3}"),
        ["block 1 (conv2)", "input 2x2x2", "kernel 3", "at most 2"],
    ),
    "a named network for larger images": ("network={name: vgg}", ["block 3 (conv4)", "input 1x1x256"]),
    "an output that is not one per class": (
        blocks("{type: dense, units: 8}, {type: dense, units: 10}"),
        ["block 1 (dense2)", "output 10", "units: 3"],
    ),
    "an output that is an image": (
        blocks("{type: conv, channels: 3, kernel: 8}"),
        ["block 0 (conv1)", "output 1x1x3", "must be dense", "units: 3"],
    ),
    "a regulariser without a square matrix": (
        "optimizer.orthogonality=1e2",
        ["optimizer.orthogonality: 100, but no weight matrix of this network is square", "network.square: true"],
    ),
    "a regulariser's steps without a regulariser": (
        "optimizer.orthogonality_every=4",
        ["optimizer.orthogonality_every: 4, but optimizer.orthogonality is 0"],
    ),
    "auxiliary units that leave nothing": (
        blocks("{type: dense, units: 8, auxiliary: 8}, {type: dense, units: 3}"),
        ["block 0 (dense1)", "auxiliary: 8 of units: 8 leaves nothing to pass on"],
    ),
    "an output whose auxiliary units are too many": (
        blocks("{type: dense, units: 8}, {type: dense, units: 8, auxiliary: 6}"),
        ["block 1 (dense2)", "output 2", "units: 3 besides auxiliary ones"],
    ),
    "a square form that is too small": (
        "network={square: true, blocks: [{type: dense, units: 2}, {type: dense, units: 3}]}",
        ["block 1 (dense2)", "2 inputs cannot give the 3 units"],
    ),
    "a border wider than the image": (
        "network.blocks.0.padding=1000000000",
        [
            "block 0 (conv1)",
            "input 8x8x1",
            "padding 1000000000 is wider than the image and than the kernel",
            "at most 8",
        ],
    ),
    "a crop border that fits no memory": (
        "data.crop_padding=4611686018427387904",
        ["data.crop_padding: 4611686018427387904 around images of 8x8x1; at most 80"],
    ),
    "an epsilon that single precision rounds to nothing": (
        "optimizer={name: adam, lr: 0.1, epsilon: 1.0e-50}",
        ["optimizer.epsilon: 1e-50 is 0 in float32", "at least 1.2e-38"],
    ),
    "a rate that single precision rounds to nothing": (
        "optimizer.lr=[0.1, 1.0e-50, 0.1]",
        ["optimizer.lr.1: 1e-50 is 0 in float32", "at least 1.2e-38"],
    ),
    "a rate beyond single precision": ("optimizer.lr=1e300", ["optimizer.lr: 1e+300 is infinite in float32"]),
    "noise that single precision rounds to nothing": (
        "rule={name: ldrl, feedback: {sigma: 1.0e-46}}",
        ["rule.feedback.sigma: 1e-46 is 0 in float32"],
    ),
    "a deviation that single precision rounds to nothing": (
        "data.normalize={mean: [0.5], std: [1.0e-60]}",
        ["data.normalize.std.0: 1e-60 is 0 in float32"],
    ),
    "a name of 300 letters": (f"name={'n' * 300}", ["name must be usable as a folder's name", "at most 200 bytes"]),
    "a weight that no memory holds": (
        blocks("{type: dense, units: 4611686018427387904}, {type: dense, units: 3}"),
        ["block 0 (dense1)", "a weight of 64x4611686018427387904 does not fit into memory"],
    ),
    "a rate per block, one too few": (
        "optimizer.lr=[0.1, 0.2]",
        ["optimizer.lr: 2 values [0.1, 0.2]", "a list of 3, one per block: conv1, dense1, dense2"],
    ),
    "noise for another number of blocks": (
        "rule={name: ldrl, feedback: {sigma: [0.1, 0.2, 0.3]}}",
        ["rule.feedback.sigma: 3 values [0.1, 0.2, 0.3]", "a list of 2, one per block with feedback: dense1, dense2"],
    ),
    "direct feedback for another number of blocks": (
        "rule={name: drl, feedback: {iterations: [1]}}",
        ["rule.feedback.iterations: 1 values [1]", "a list of 2, one per block with feedback: dense1, dense2"],
    ),
    "a regulariser of feedback weights": (
        "rule={name: ldrl, feedback: {optimizer: {name: sgd, lr: 0.1, orthogonality: 1.0}}}",
        ["rule.feedback.optimizer.orthogonality: 1.0: the regulariser is for θ, optimizer.orthogonality"],
    ),
    "its period": (
        "rule={name: drl, feedback: {optimizer: {name: adam, lr: 0.1, orthogonality_every: 4}}}",
        ["rule.feedback.optimizer.orthogonality_every: 4: the regulariser is for θ", "leave it out here"],
    ),
    "its matrices": (
        "rule={name: ldrl, feedback: {optimizer: {name: sgd, lr: 0.1, orthogonality_on: all-but-first}}}",
        ["rule.feedback.optimizer.orthogonality_on: all-but-first: the regulariser is for θ"],
    ),
    "no noise": (
        "rule={name: ldrl, feedback: {sigma: 0}}",
        ["rule.feedback.sigma must be a number above 0, or a list, each entry a number above 0, got 0"],
    ),
    "negative noise in a list": ("rule={name: dtp, feedback: {sigma: [0.1, -0.1]}}", ["sigma", "got [0.1, -0.1]"]),
    "an empty list of noise": ("rule={name: dtp, feedback: {sigma: []}}", ["rule.feedback.sigma must not be empty"]),
    "negative iterations": (
        "rule={name: tp, feedback: {iterations: -1}}",
        ["rule.feedback.iterations must be a whole number of at least 0", "got -1"],
    ),
    "no target step": ("rule={name: ldrl, beta: 0}", ["rule.beta must be a number above 0, got 0"]),
    "the summed loss with targets": (
        "rule={name: ldrl}",
        ["loss.reduction: sum: rule ldrl is defined for the mean loss; use reduction: mean"],
    ),
    "auxiliary units without a use": (
        "rule={name: dtp}",
        ["block 1 (dense1): has 2 auxiliary units", "leave out network.square and the block's auxiliary"],
    ),
    "more memory than there is": (
        blocks("{type: dense, units: 99999999999}, {type: dense, units: 3}"),
        ["not enough memory: network block 0 (dense1): ", "99999999999"],
    ),
}

# Settings that are wrong only together with these others.
ALONGSIDE = {
    "rule={name: ldrl}": ["loss.reduction=sum"],
    "rule={name: dtp}": ["network.blocks.1.auxiliary=2"],
}


@pytest.mark.parametrize(("setting", "said"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_is_refused(refused, setting, said):
    extra = ALONGSIDE.get(setting, [])
    message = refused("run", "toy.yml", "--quiet", "--set", setting, *(word for s in extra for word in ("--set", s)))
    assert all(part in message for part in said), message


ARGUMENTS = {
    "no config": ([], ["give a config, such as runs/quickstart.yml", "arraytp init my.yml"]),
    "a config that is not there": (["nowhere.yml"], ["nowhere.yml: no such file"]),
    "a folder for a config": (["toy"], ["toy: is a folder; give a config file"]),
    "one of two configs is not there": (["toy.yml", "nowhere.yml"], ["nowhere.yml: no such file"]),
    "a config twice": (["toy.yml", "./toy.yml"], ["results/toy: two of the configs write their results here"]),
    "two configs of one name": (["toy.yml", "sub/toy.yml", "--out", "both"], ["both/toy: two of the configs"]),
    "going on and starting over": (["toy.yml", "--resume", "--fresh"], ["--resume and --fresh exclude each other"]),
    "an unknown option": (["toy.yml", "--frsh"], ["'--frsh'", "--fresh"]),
    "an unknown backend": (["toy.yml", "--backend", "torch"], ["'torch' is not one of 'numpy', 'cupy'"]),
    "an unknown dtype": (["toy.yml", "--dtype", "float16"], ["'float16' is not one of 'float32', 'float64'"]),
    "no CuPy": (["toy.yml", "--backend", "cupy"], ["backend cupy: ", "use --backend numpy"]),
    "an option without its value": (["toy.yml", "--set"], ["'--set' requires an argument"]),
    "two variants": (
        ["toy.yml", "--variant", "bp", "--variant", "fa"],
        ["--variant: given 2 times (bp, fa); give one, or none to take all"],
    ),
    "a folder of 300 letters": (["toy.yml", "--out", "o" * 300], ["File name too long"]),
    "a file for a folder": (["toy.yml", "--out", "toy.yml"], ["toy.yml: is a file; --out needs a folder"]),
    "a folder below a file": (["toy.yml", "--out", "toy.yml/x"], ["toy.yml/x: cannot be written: Not a directory"]),
    "no folder at all": (["toy.yml", "--out", ""], ["--out is empty; give a folder"]),
    "a folder of blanks": (["toy.yml", "--out", " "], ["--out is empty; give a folder"]),
    "a folder whose name is no text": (
        ["toy.yml", "--out", "o\udcff"],
        ["'o\\udcff': the folder's name is not UTF-8 text"],
    ),
    "a link to nothing": (["toy.yml", "--out", "sub/link"], ["sub/link: is a link that leads nowhere"]),
}


@pytest.mark.parametrize(("words", "said"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_wrong_argument_is_refused(refused, place, words, said):
    (place / "sub").mkdir()
    (place / "sub/link").symlink_to("link")
    shutil.copy("toy.yml", "sub/toy.yml")
    message = refused("run", *words)
    assert all(part in message for part in said), message


TEXTS = {
    "an empty file": (b"", "bad.yml: empty; a config needs at least data, network, optimizer and train"),
    "bytes": (b"name: \xff\xfe", "bad.yml:1: not UTF-8 text"),
    "an open bracket": (b"data: {dataset: toy\n", "not valid YAML"),
    "a tab": (b"data:\n\tdataset: toy\n", "bad.yml:2: not valid YAML: a tab where YAML wants spaces"),
    "a key twice": (b"seed: 1\nseed: 2\n", "bad.yml:2: the key seed is given twice"),
    "a few words that mean millions": (
        b"".join(
            b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9 if c > 97 else [b"1"] * 9))
            for c in range(97, 106)
        ),
        "more than 100,000 keys and list entries, aliases written out",
    ),
    "a list": (b"- 1\n", "bad.yml: must be a map of keys"),
    "a variant in error": (b"seed: x\nvariants: {a: , b: {seed: 1}}\n", "bad.yml:1: seed must be a whole number"),
}


@pytest.mark.parametrize(("content", "said"), TEXTS.values(), ids=TEXTS)
def test_a_file_that_is_no_config_is_refused(arraytp, tree, place, content, said):
    (place / "bad.yml").write_bytes(content)
    before = tree()
    outcome = arraytp("run", "toy.yml", "bad.yml")
    assert outcome.status == 2
    assert said in outcome.err
    assert all(line.startswith("arraytp: error: ") for line in outcome.err.splitlines())
    assert tree() == before


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def damage_pixels(folder):
    with h5py.File(folder / "train-00002.h5") as file:
        offset = file["images"].id.get_offset()
    flip(folder / "train-00002.h5", offset + 77)


def relabel(folder):
    with h5py.File(folder / "train-00001.h5", "r+") as file:
        file["labels"][3] = 7


DAMAGE = {
    "a missing shard": (
        lambda d: (d / "train-00002.h5").unlink(),
        ["toy/train-00002.h5: shard is missing", "rows 0 to 9"],
    ),
    "a truncated shard": (
        lambda d: os.truncate(d / "train-00001.h5", 999),
        ["train-00001.h5: shard is truncated", "rows 0 to 9"],
    ),
    "an empty shard": (
        lambda d: (d / "test-00001.h5").write_bytes(b""),
        ["test-00001.h5: shard is truncated: 0 bytes"],
    ),
    "damaged pixels": (damage_pixels, ["toy/train-00002.h5: rows 0 to 9 do not match their checksum"]),
    "a label that was changed": (relabel, ["toy/train-00001.h5: rows 0 to 9 do not match their checksum"]),
    "a shard in another's place": (
        lambda d: shutil.copy(d / "train-00000.h5", d / "train-00001.h5"),
        ["train-00001.h5: not the shard that dataset.json names"],
    ),
    "a cut dataset.json": (lambda d: os.truncate(d / "dataset.json", 99), ["toy/dataset.json: not valid JSON"]),
    "an edited dataset.json": (
        lambda d: (d / "dataset.json").write_text((d / "dataset.json").read_text().replace('"toy"', '"tox"')),
        ["toy/dataset.json: its content does not match its own checksum"],
    ),
}


@pytest.mark.parametrize(("harm", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_data_is_never_trained_on(refused, place, harm, said):
    harm(place / "toy")
    message = refused("run", "toy.yml", "--quiet")
    assert all(part in message for part in said), message


def test_damage_found_while_streaming_keeps_what_is_trained(arraytp, place, numbers):
    """A streamed split is verified as it is read, so damage may show late; once it is repaired, the run can resume."""
    settings = ["--quiet", "--set", "data={dataset: toy, in_memory_mb: 0, pool_images: 1}"]
    arraytp("run", "toy.yml", *settings)
    good = (place / "toy/train-00002.h5").read_bytes()
    damage_pixels(place / "toy")
    more = ["--resume", "--set", "train.epochs=2"]
    outcome = arraytp("run", "toy.yml", *settings, *more)
    assert outcome.status == 2
    assert outcome.err == (
        "arraytp: error: toy/train-00002.h5: rows 0 to 9 do not match their checksum; pack the data set again\n"
    )
    (place / "toy/train-00002.h5").write_bytes(good)
    assert arraytp("run", "toy.yml", *settings, *more).status == 0
    arraytp("run", "toy.yml", *settings, "--set", "train.epochs=2", "--out", "whole")
    assert numbers(place / "results/toy") == numbers(place / "whole")


@pytest.mark.parametrize("splits", [("train", "spare"), ("test", "train")])
def test_a_data_set_needs_something_to_test_on(refused, place, pack, splits):
    pack(place / "other", splits=splits, train=0 if splits[0] == "test" else 45)
    message = refused("run", "toy.yml", "--set", "data.dataset=other")
    assert "needs train and one of test, val" in message


def test_results_that_are_there_are_not_overwritten(arraytp, refused):
    arraytp("run", "toy.yml", "--quiet")
    message = refused("run", "toy.yml")
    assert message == (
        "results/toy: holds results already; --resume continues them, --fresh starts over, --out selects another folder"
    )


def test_results_without_their_config_are_not_overwritten_either(arraytp, refused, place):
    arraytp("run", "toy.yml", "--quiet")
    (place / "results/toy/config.yml").unlink()
    assert "results/toy: holds results already" in refused("run", "toy.yml")
    (place / "results/toy/checkpoint.h5").unlink()
    assert "results/toy/config.yml: no such file; --fresh starts over" in refused("run", "toy.yml", "--resume")


OTHERS = {
    "seed=3": "seed is 0 there and 3 here",
    "dtype=float64": "dtype is float32 there and float64 here",
    "optimizer={name: adam, lr: 1}": "optimizer.name is sgd there and adam here",
    "network.blocks.1.units=9": "network.blocks.1.units is 8 there and 9 here",
    "train.batch_size=8": "train.batch_size is 16 there and 8 here",
    "compare.every=7": "compare.every is 2 there and 7 here",
}


@pytest.mark.parametrize(("setting", "said"), OTHERS.items(), ids=OTHERS)
def test_going_on_with_another_config_is_refused(arraytp, refused, setting, said):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=0")
    message = refused("run", "toy.yml", "--resume", "--set", setting, "--set", "train.epochs=5")
    assert message.startswith(f"results/toy: holds a run of another config ({said}); --fresh starts over")


EDITS = {
    "lr: 0.05": ("lr: 0.01", "optimizer.lr is 0.05 there and 0.01 here"),
    "weight_decay: 0.0": ("weight_decay: 0.1", "optimizer.weight_decay is 0.0 there and 0.1 here"),
    "seed: 0": ("seed: 1", "seed is 0 there and 1 here"),
    "batch_size: 16": ("batch_size: 15", "train.batch_size is 16 there and 15 here"),
}


@pytest.mark.parametrize("former", EDITS)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_an_edited_config_of_the_results_themselves_is_noticed(arraytp, refused, place, former, finished):
    """The edited config.yml is also the folder's record, so only the checkpoint still has the original."""
    arraytp("run", "toy.yml", "--quiet")
    edited, said = EDITS[former]
    path = place / "results/toy/config.yml"
    assert path.read_text().count(former) == 1
    path.write_text(path.read_text().replace(former, edited))
    if not finished:
        (place / "results/toy/summary.json").unlink()
    message = refused("run", "results/toy/config.yml", "--resume", "--out", "results/toy")
    assert message.startswith(f"results/toy: holds a run of another config ({said}); ")


def test_more_of_the_same_in_the_results_own_config_goes_on(arraytp, place, numbers):
    arraytp("run", "toy.yml", "--quiet")
    path = place / "results/toy/config.yml"
    path.write_text(path.read_text().replace("epochs: 1", "epochs: 2"))
    assert arraytp("run", "results/toy/config.yml", "--quiet", "--resume", "--out", "results/toy").status == 0
    arraytp("run", "toy.yml", "--quiet", "--out", "whole", "--set", "train.epochs=2")
    assert numbers(place / "results/toy") == numbers(place / "whole")


@pytest.mark.parametrize("text", ["seed: [", None], ids=["damaged", "missing"])
def test_a_run_goes_on_without_its_config_file(arraytp, place, text):
    """The checkpoint also has the config, so a lost config.yml must not cost the training."""
    arraytp("run", "toy.yml", "--quiet")
    path = place / "results/toy/config.yml"
    whole = path.read_text()
    path.unlink() if text is None else path.write_text(text)
    assert arraytp("run", "toy.yml", "--quiet", "--resume").status == 0
    assert path.read_text() == whole


def test_data_that_have_moved_are_the_same_and_others_in_their_place_are_not(arraytp, refused, place, pack, numbers):
    arraytp("run", "toy.yml", "--quiet")
    more = ("run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=2")
    (place / "toy").rename(place / "moved")
    assert arraytp(*more, "--set", "data.dataset=moved").status == 0
    pack(place / "toy", train=46)
    message = refused(*more)
    assert "(data.dataset moved held other images or labels there than toy here)" in message


def test_a_checkpoint_that_does_not_say_whose_it_is_is_held_against_the_config_file(arraytp, refused, place):
    """Checkpoints of the first versions do not record their config."""
    arraytp("run", "toy.yml", "--quiet")
    with h5py.File(place / "results/toy/checkpoint.h5", "r+") as file:
        del file["run/owner"]
    assert "(seed is 0 there and 1 here)" in refused("run", "toy.yml", "--resume", "--set", "seed=1")
    assert arraytp("run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=2").status == 0


def test_a_seed_of_an_edited_study_is_noticed(arraytp, place):
    study = "rule: {name: ldrl}\nstudy: {seeds: 2, rounds: 1}\n"
    (place / "study.yml").write_text((place / "toy.yml").read_text().replace("rule: {name: fa}\n", study))
    assert arraytp("run", "study.yml", "--quiet").status == 0
    path = place / "results/study/config.yml"
    path.write_text(path.read_text().replace("rounds: 1", "rounds: 2"))
    (place / "results/study/seed-1/summary.json").unlink()
    outcome = arraytp("run", "results/study/config.yml", "--resume", "--out", "results/study", "--quiet")
    assert outcome.status == 2
    assert outcome.err.startswith(
        "arraytp: error: results/study/seed-0/summary.json: is of another config (study.rounds is 1 there and 2 here)"
    )


def test_going_on_with_fewer_epochs_is_refused(arraytp, refused):
    arraytp("run", "toy.yml", "--quiet", "--set", "train.epochs=2")
    message = refused("run", "toy.yml", "--resume", "--set", "train.epochs=1")
    assert "checkpoint.h5: is in epoch 2 already, but train.epochs is 1" in message


def test_a_damaged_stored_config_is_named(arraytp, refused, place):
    arraytp("run", "toy.yml", "--quiet")
    (place / "results/toy/config.yml").write_text("seed: [")
    (place / "results/toy/checkpoint.h5").unlink()
    message = refused("run", "toy.yml", "--resume")
    assert message.startswith("results/toy/config.yml:1: not valid YAML")
    assert "--fresh starts over" in message


def replace_in(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]
            if value is not None:
                file[name] = value

    return change


def flip_weights(path):
    with h5py.File(path) as file:
        chunk = file["network/1/weight"].id.get_chunk_info(0)
    flip(path, chunk.byte_offset + 5)


def of_the_future(path):
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 9


CHECKPOINTS = {
    "cut": (lambda path: os.truncate(path, 3000), "the checkpoint is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "the checkpoint is damaged"),
    "text": (lambda path: path.write_text("hello"), "the checkpoint is damaged"),
    "one bit of a weight": (flip_weights, "the checkpoint is damaged"),
    "another version": (of_the_future, "not a checkpoint of this version"),
    "without an array": (replace_in("network/1/weight", None), "has no array network/1/weight"),
    "without the optimiser": (replace_in("optimizer/0/0", None), "has no array optimizer/0/0"),
    "without the rule's arrays": (replace_in("rule", None), "has no array rule/feedback/1/weight"),
    "another shape": (
        replace_in("network/1/weight", np.zeros((3, 8), np.float32)),
        "array network/1/weight is float32[3, 8], expected float32[36, 8]",
    ),
    "another dtype": (replace_in("network/2/bias", np.zeros(3)), "is float64[3], expected float32[3]"),
    "without a position": (replace_in("run/state", "{}"), "the checkpoint is damaged"),
    "with a strange position": (replace_in("run/state", "[]"), "the checkpoint is damaged"),
    "with half a position": (replace_in("run/state", '{"position": {"to'), "the checkpoint is damaged"),
}


@pytest.mark.parametrize(("harm", "said"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_and_a_fresh_start_works(arraytp, refused, place, harm, said):
    arraytp("run", "toy.yml", "--quiet")
    harm(place / "results/toy/checkpoint.h5")
    message = refused("run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=2")
    assert message.startswith("results/toy/checkpoint.h5: ")
    assert said in message
    assert message.endswith("--fresh starts over")
    assert arraytp("run", "toy.yml", "--quiet", "--fresh").status == 0


def test_a_folder_in_the_checkpoints_place_is_told_without_hdf5s_words(arraytp, refused, place):
    arraytp("run", "toy.yml", "--quiet")
    checkpoint = place / "results/toy/checkpoint.h5"
    checkpoint.unlink()
    checkpoint.mkdir()
    message = refused("run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=2")
    assert message == "results/toy/checkpoint.h5: the checkpoint cannot be read: Is a directory"


# Not tanh: it makes sums that overflow to ±∞ finite again, and whether they are NaN depends on the order of summation.
UNBOUNDED = (
    "network.blocks=[{type: conv, channels: 4, kernel: 3, activation: leaky-relu}, "
    "{type: dense, units: 8, activation: leaky-relu}, {type: dense, units: 3}]"
)
DIVERGING = {
    "a huge rate": ["optimizer.lr=1e30"],
    "a huge rate for Adam": ["optimizer={name: adam, lr: 1e30}"],
    "double precision": ["optimizer.lr=1e200", "dtype=float64"],
    "large batches": ["optimizer.lr=1e30", "train.batch_size=45", "train.epochs=3"],
}


@pytest.mark.parametrize("settings", DIVERGING.values(), ids=DIVERGING)
def test_a_run_that_diverges_says_when_and_where(arraytp, place, settings):
    words = ["run", "toy.yml", "--quiet", *(word for setting in (UNBOUNDED, *settings) for word in ("--set", setting))]
    outcome = arraytp(*words)
    assert outcome.status == 1
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("arraytp: error: toy: not finite ")
    assert " step" in outcome.err
    assert "block " in outcome.err
    assert "there is no checkpoint yet; a smaller optimizer.lr may help" in outcome.err
    assert not (place / "results/toy/checkpoint.h5").exists()
    assert not list(place.rglob("*.partial"))
    assert arraytp(*words, "--resume") == outcome


def test_what_diverges_is_not_timed(arraytp, place):
    outcome = arraytp(
        "bench", "toy.yml", "--steps", 2, "--json", "b.json", "--set", UNBOUNDED, "--set", "optimizer.lr=1e30"
    )
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "arraytp: error: toy: not finite after 4 steps; a smaller optimizer.lr may help\n"
    assert not (place / "b.json").exists()


def test_where_feedback_is_trained_its_rate_is_named_too(arraytp):
    rule = "rule={name: weight-mirror, feedback: {optimizer: {name: sgd, lr: 1e30}}}"
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", rule)
    assert outcome.status == 1
    assert outcome.err.endswith("; a smaller optimizer.lr or rule.feedback.optimizer.lr may help\n")


def test_a_closed_form_that_diverges_names_run_step_block_and_checkpoint(arraytp):
    """The rule's error names block and numbers; the loop adds run, step and checkpoint."""
    feedback = "{iterations: 5, sigma: 0.1, optimizer: {name: sgd, lr: 1e9}}"
    rule = f"rule={{name: ldrl, expected: true, feedback: {feedback}}}"
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", rule)
    assert outcome.status == 1
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("arraytp: error: toy: at step 0: feedback of block 1 (")
    assert "iterations in closed form diverge at " in outcome.err
    assert outcome.err.endswith("; there is no checkpoint yet\n")


def test_the_first_block_that_is_not_finite_is_named(arraytp):
    """Step 0 makes the weights huge; at step 1 the product of two such layers overflows in the second block."""
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", UNBOUNDED, "--set", "optimizer.lr=1e30")
    assert "not finite at step 1: output of block 1 (dense1)" in outcome.err


def test_images_that_are_not_finite_are_not_blamed_on_the_learning_rate(arraytp):
    outcome = arraytp("run", "toy.yml", "--quiet", "--set", "data.normalize={mean: [0.1], std: [1e-44]}")
    assert outcome.status == 1
    assert "not finite in the evaluation after 0 steps" in outcome.err
    assert "see data.normalize" in outcome.err


@pytest.mark.parametrize(
    ("poison", "said"),
    [(np.nan, "at step 3: output of block 1 (dense1)"), (np.inf, "after 6 steps: weights of block 1")],
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(arraytp, place, monkeypatch, poison, said):
    """The weights are poisoned in the second epoch; the first epoch's checkpoint is kept, and the run resumes from it.

    Behind tanh, an infinite weight leaves the outputs finite, so it is found only when the next checkpoint is due.
    """
    arraytp("run", "toy.yml", "--quiet")
    checkpoint = place / "results/toy/checkpoint.h5"
    before = checkpoint.read_bytes()
    train_epoch = Run._train_epoch

    def poisoned(run, *rest):
        run.experiment.network.weights[1][0, 0] = poison
        train_epoch(run, *rest)

    words = ["run", "toy.yml", "--quiet", "--resume", "--set", "train.epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_epoch", poisoned)
        outcome = arraytp(*words)
    assert outcome.status == 1
    assert f"toy: not finite {said}" in outcome.err
    assert "the last good checkpoint is results/toy/checkpoint.h5" in outcome.err
    assert checkpoint.read_bytes() == before
    assert arraytp(*words).status == 0


PROCESSES = {
    "a missing config": (["run", "nowhere.yml"], 2),
    "a wrong setting": (["run", "toy.yml", "--set", "optimizer.lrr=1"], 2),
    "a diverging run": (["run", "toy.yml", "--quiet", "--set", UNBOUNDED, "--set", "optimizer.lr=1e30"], 1),
}


@pytest.mark.parametrize(("words", "status"), PROCESSES.values(), ids=PROCESSES)
def test_a_real_process_ends_with_the_same_status_and_one_line(place, words, status):
    command = Path(sys.executable).with_name("arraytp")
    if not command.exists():
        pytest.skip("the package is not installed with its command")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("arraytp: error: ")
    assert done.stdout == ""


BEYOND = '"\\U00110000"'


def test_a_character_beyond_the_last_is_not_valid_yaml(refused, place):
    (place / "odd.yml").write_text(f"name: {BEYOND}\n")
    assert refused("run", "odd.yml").startswith("odd.yml: not valid YAML: ")
    assert refused("run", "toy.yml", "--set", f"name={BEYOND}").startswith(f"--set name={BEYOND}: not valid YAML: ")
    (place / "config.yml").write_text(f"name: {BEYOND}\n")
    assert refused("report", ".").startswith("config.yml: not valid YAML: ")


def test_a_working_directory_that_is_gone_is_named(arraytp, place, monkeypatch):
    (place / "gone").mkdir()
    monkeypatch.chdir(place / "gone")
    (place / "gone").rmdir()
    for words in (["run", place / "toy.yml"], ["trace", place / "toy.yml", "--out", "t.h5"], ["report", "."]):
        outcome = arraytp(*words)
        assert (outcome.status, len(outcome.err.splitlines())) == (2, 1), outcome.err
    outcome = arraytp("run", place / "toy.yml", "--set", f"data.dataset={place / 'toy'}")
    assert outcome.err == "arraytp: error: the working directory is not there any more; change into one that is\n"


def test_a_link_to_itself_is_named(refused, place):
    (place / "loop").symlink_to("loop")
    many = "Too many levels of symbolic links"
    assert refused("run", "loop") == f"loop: cannot be read: {many}"
    assert refused("bench", "toy.yml", "--steps", 1, "--json", "loop/x").endswith("there is no folder loop")
    assert refused("report", "loop") == "loop: no such folder; give a result folder written by `arraytp run`"
    assert refused("run", "toy.yml", "--out", "loop").startswith("loop: is a link that leads nowhere")


def test_a_pipe_without_its_other_end_is_not_waited_for(refused, arraytp, place, monkeypatch):
    monkeypatch.setattr("arraytp.disk._PATIENCE", 0.1)
    os.mkfifo(place / "pipe")
    assert refused("run", "pipe") == "pipe: is a pipe without a writer; give a file"
    assert refused("trace", "toy.yml", "--out", "t.h5", "--weights", "pipe") == "pipe: is a pipe or device; give a file"
    assert refused("data", "pack", "folder", "pipe", "packed") == "pipe: is a pipe or device; give a file"
    assert arraytp("bench", "toy.yml", "--steps", 1, "--json", "pipe").err.startswith(
        "arraytp: error: --json pipe: cannot be written: No such device or address"
    )


def test_a_pipe_to_which_a_config_is_written_is_one(arraytp, place):
    """A shell passes `<(…)` as such a pipe."""
    os.mkfifo(place / "pipe")
    end = os.open(place / "pipe", os.O_RDWR)
    text = (place / "toy.yml").read_bytes()
    os.write(end, text)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"], pass_fds=[end])
    os.close(end)
    assert arraytp("run", "pipe", "--quiet").status == 0
    assert process.wait() == 0


def test_a_file_far_too_large_for_a_config_is_not_parsed(refused, place):
    (place / "big.yml").write_bytes(b"a: 1\n" * 2_000_000)
    assert refused("run", "big.yml") == "big.yml: holds more than 1,048,576 bytes; is it the right file?"
    assert refused("run", "/dev/zero") == "/dev/zero: holds more than 1,048,576 bytes; is it the right file?"


def test_long_keys_and_values_are_cut_in_the_middle(refused):
    long = "k" * 100_000
    message = refused("run", "toy.yml", "--set", f"{long}=1")
    assert len(message) < 1000
    assert message.startswith("--set kkk")
    assert message.count(" characters)…k") == 2
    assert message.endswith("schedule, train, compare, study, variants")
    assert refused("run", long).endswith("k: cannot be read: File name too long")


def test_what_would_break_or_colour_a_line_is_escaped(refused):
    assert refused("run", "a\nb\x1b[31m.yml") == "a\\nb\\x1b[31m.yml: no such file"


def test_a_report_of_half_a_disk_is_refused(refused, place, monkeypatch):
    monkeypatch.setattr("arraytp.report.reading._MOST_ENTRIES", 5)
    assert refused("report", ".") == ".: holds more than 5 files and folders; give one nearer to the results"


@pytest.mark.parametrize(
    ("command", "fails", "words"),
    [
        (["run"], "score", "toy: train.eval_batch_size 12"),
        (["run"], "updates", "toy: train.batch_size 16"),
        (["bench"], "updates", "toy: train.batch_size 16"),
        (["trace", "--out", "t.h5"], "updates", "toy.yml: train.batch_size 16"),
    ],
)
def test_the_batch_that_does_not_fit_is_named(arraytp, monkeypatch, command, fails, words):
    """A run begins with an evaluation, so either of its two batch sizes may be too large."""

    def full(*arguments, **options):
        raise MemoryError("allocating 8 bytes")

    monkeypatch.setattr(Experiment, fails, full)
    monkeypatch.setattr(Backend, "memory_words", lambda self, error, batch, key="train.batch_size": f"{key} {batch}")
    name, *rest = command
    status, _, err = arraytp(name, "toy.yml", *rest)
    assert (status, err.strip().splitlines()[-1]) == (2, f"arraytp: error: {words}")


@pytest.mark.parametrize("command", [["run"], ["audit"], ["bench"], ["trace", "--out", "t.h5", "--variant", "bp"]])
def test_every_command_names_file_and_variant_that_do_not_fit(refused, command):
    name, *rest = command
    said = refused(name, "variants.yml", *rest, "--set", "train.validation=45")
    assert said.startswith("variants.yml (variant bp): train.validation: 45")


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "folder", "", "d"],
        ["pack", "folder", "toy", ""],
        ["fetch", "mnist", " "],
        ["check", ""],
        ["info", ""],
    ],
)
def test_an_empty_name_is_not_the_working_directory(refused, words):
    """An unset shell variable gives an empty name."""
    assert "empty" in refused("data", *words)


def test_numbers_longer_than_python_reads_are_refused(refused):
    digits = "1" * 5000
    assert "not like train=10000" in refused("data", "pack", "folder", "toy", "d", "--limit", f"train={digits}")
    assert "has the entries 0 to 2" in refused("run", "toy.yml", "--set", f"network.blocks.{digits}.units=3")


def test_a_damping_that_is_infinite_in_the_runs_dtype_is_refused(refused):
    said = refused("run", "toy.yml", "--set", "compare.damping=1e300", "--set", "compare.against=[bp, gnt]")
    assert "compare.damping: 1e+300 is infinite in float32" in said


def test_a_config_of_a_result_folder_with_several_mistakes_is_told_of_in_a_line(arraytp, refused, place):
    assert arraytp("run", "toy.yml", "--quiet").status == 0
    (place / "results/toy/checkpoint.h5").unlink()
    (place / "results/toy/config.yml").write_text("foo: 1\n")
    said = refused("run", "toy.yml", "--resume")
    assert "foo is not a known key" in said
    assert said.endswith("; --fresh starts over, --out selects another folder")
    assert "\\n" not in said


def test_a_file_that_cannot_be_written_is_named(arraytp, place):
    (place / "results/toy/metrics.csv").mkdir(parents=True)
    outcome = arraytp("run", "toy.yml", "--quiet", "--fresh")
    assert outcome.status == 2
    assert outcome.err == "arraytp: error: results/toy/metrics.csv: cannot be written: Is a directory\n"


def test_a_mistake_without_standard_error_has_its_status(place, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["run", "nothing.yml"]) == 2
    sys.stderr.close()


def test_a_mistake_in_a_config_from_a_pipe_shows_no_excerpt(place, tmp_path):
    """The pipe has been read already; opening it again would block for ever."""
    os.mkfifo(tmp_path / "pipe.yml")
    assert cli._excerpt(tmp_path / "pipe.yml", 1, "rule") == []


def test_a_message_about_no_possible_file_shows_no_excerpt(place):
    assert cli._excerpt(place / ("a" * 300), 1, "rule") == []


def test_a_run_without_standard_error_shows_nothing(arraytp, place, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["run", "toy.yml"]) == 0
    sys.stderr.close()
    assert (place / "results/toy/summary.json").exists()
