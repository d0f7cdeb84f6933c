"""A toy experiment: 45 training and 20 test images of 8×8 pixels, three classes, a small network."""

import csv
from pathlib import Path

import numpy as np
import pytest

from arraytp.config import parse_config
from arraytp.data.writer import Description, writing
from arraytp.training.build import build
from arraytp.training.loop import Run

BLOCKS = [
    {"type": "conv", "channels": 4, "kernel": 3, "activation": "elu", "pool": {"kernel": 3, "stride": 2, "padding": 1}},
    {"type": "dense", "units": 8, "activation": "tanh"},
    {"type": "dense", "units": 3},
]


class Stop:
    """Stand-in for `StopRequest`: `requested` is true from its `after`th reading (look) on, counted from 0."""

    signal = 15

    def __init__(self, after: float = float("inf")) -> None:
        self.after, self.looks = after, 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.looks > self.after

    def at_once(self, work):
        return work()


def _pack(folder: Path, *, train: int = 45, test: int = 20, shape: tuple[int, int, int] = (8, 8, 1), classes: int = 3):
    generator = np.random.default_rng(7)
    description = Description("toy", shape, [f"class {n}" for n in range(classes)])
    with writing(folder, description, shard_images=10) as writer:
        for split, count in (("train", train), ("test", test)):
            labels = generator.integers(0, classes, count)
            images = generator.integers(0, 200, (count, *shape)) + 20 * labels.reshape(-1, 1, 1, 1)
            writer.add(split, images.astype(np.uint8), labels)
    return folder


@pytest.fixture(scope="session")
def pack():
    """Write a data set."""
    return _pack


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy data set; read only."""
    return _pack(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def make_config(toy):
    """Return the toy's config with whole sections replaced."""

    def make(**sections):
        tree = {
            "data": {"dataset": str(toy)},
            "network": {"blocks": BLOCKS},
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.001},
            "train": {"epochs": 2, "batch_size": 16, "eval_batch_size": 12},
            "compare": {"every": 3},
        }
        return parse_config({**tree, **sections}, "toy").variants[""]

    return make


@pytest.fixture
def start(tmp_path):
    """Build a config's experiment and a run of it that writes into a folder of a given name."""

    def make(config, name="run", resume=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run = Run(build(config), folder, "toy", quiet=True)
        run.resume() if resume else run.start()
        return run

    return make


@pytest.fixture
def stop_after():
    """Make a request to stop at the nth look, by default never."""
    return Stop


def _read_rows(table: Path) -> list[dict[str, float]]:
    with table.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def read_rows():
    """Read a table's rows as numbers."""
    return _read_rows


@pytest.fixture(scope="session")
def untimed():
    """Return a table's rows as text without their seconds, to compare two runs; as text, NaN equals NaN."""

    def write(table: Path) -> str:
        return repr([{key: value for key, value in row.items() if key != "seconds"} for row in _read_rows(table)])

    return write
