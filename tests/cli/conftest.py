"""A working directory with a toy data set and a config, and the command line called in this process."""

import csv
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from arraytp import cli
from arraytp.data.writer import Description, writing

TOY = """\
data: {dataset: toy}
network:
  blocks:
    - {type: conv, channels: 4, kernel: 3, activation: elu, pool: {kernel: 3, stride: 2, padding: 1}}
    - {type: dense, units: 8, activation: tanh}
    - {type: dense, units: 3}
rule: {name: fa}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 16, eval_batch_size: 12}
compare: {every: 2}
"""
VARIANTS = TOY.replace("rule: {name: fa}\n", "") + "variants: {bp: {rule: {name: bp}}, dfa: {rule: {name: dfa}}}\n"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def _pack(
    folder: Path,
    *,
    train: int = 45,
    test: int = 20,
    shape: tuple[int, int, int] = (8, 8, 1),
    classes: int = 3,
    splits: tuple[str, str] = ("train", "test"),
):
    generator = np.random.default_rng(7)
    description = Description("toy", shape, [f"class {n}" for n in range(classes)])
    with writing(folder, description, shard_images=10) as writer:
        for split, count in zip(splits, (train, test), strict=True):
            labels = generator.integers(0, classes, count)
            images = generator.integers(0, 200, (count, *shape)) + 20 * labels.reshape(-1, 1, 1, 1)
            if count:
                writer.add(split, images.astype(np.uint8), labels)
    return folder


@pytest.fixture(scope="session")
def pack():
    """Write a data set."""
    return _pack


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    return _pack(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def place(tmp_path, packed, monkeypatch):
    """Work in a folder that holds the data set `toy` and the configs toy.yml and variants.yml."""
    shutil.copytree(packed, tmp_path / "toy")
    (tmp_path / "toy.yml").write_text(TOY)
    (tmp_path / "variants.yml").write_text(VARIANTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def arraytp(place, monkeypatch, capsys):
    """Call the command line; figures, which take a second to draw, are drawn only with `figures`."""

    def call(*arguments, figures=False):
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["arraytp", *words])
        with monkeypatch.context() as patch:
            if not figures and words[:1] == ["run"]:
                patch.setattr("arraytp.commands.run.write_figures", lambda *_: None)
                for name in ("update_figure", "alignment_figure", "drift_figure", "save_figure"):
                    patch.setattr(f"arraytp.report.studies.{name}", lambda *_: None)
                patch.setattr("arraytp.commands.run.write_comparison", lambda *_: None)
            capsys.readouterr()
            status = cli.main(words)
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def tree(place):
    """Return every path in the working directory with its content."""

    def listing():
        return {
            str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")
        }

    return listing


@pytest.fixture
def refused(arraytp, tree):
    """Call the command line, check that it refuses in one line and changes no file, and return the message."""

    def call(*arguments, status=2):
        before = tree()
        outcome = arraytp(*arguments)
        assert outcome.status == status
        assert outcome.out == ""
        assert len(outcome.err.splitlines()) == 1
        assert outcome.err.startswith("arraytp: error: ")
        assert tree() == before
        return outcome.err.removeprefix("arraytp: error: ").rstrip("\n")

    return call


def _numbers(folder):
    with (folder / "metrics.csv").open() as file:
        metrics = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    arrays = {}
    with h5py.File(folder / "checkpoint.h5") as file:
        for part in ("network", "rule", "optimizer"):
            if part in file:
                file[part].visititems(
                    lambda name, item, part=part: (
                        arrays.update({f"{part}/{name}": item[()].tobytes()})
                        if isinstance(item, h5py.Dataset)
                        else None
                    )
                )
        steps = int(file["optimizer"].attrs["step"])
    tables = [(folder / f"{table}.csv").read_text() for table in ("angles", "steps")]
    return metrics, tables, arrays, steps


@pytest.fixture(scope="session")
def numbers():
    """Return what equal runs must agree on: metrics except times, angles, steps.csv, state arrays and step count."""
    return _numbers
