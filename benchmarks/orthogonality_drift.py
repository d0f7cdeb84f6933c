"""Measure how the angle to BP's updates grows as square weight matrices drift from orthogonal ones.

Trains every variant of a config and notes, every `compare.every` steps and for every block, the angle to BP's update
and two norms of WWᵀ − I of the block's K×K matrix, whose eigenvalues are σ² − 1 for its singular values σ: their root
mean square ‖WWᵀ − I‖/√K, and the largest of their absolute values. Writes drift.csv into the folder --out.

    python benchmarks/orthogonality_drift.py runs/gait-prop/drift-conv-imagenet.yml --out DIR [--set KEY=VALUE]…
"""

import argparse
import csv
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh

from arraytp.config import Config, load_config
from arraytp.experiment import Experiment, build
from arraytp.network import Network
from arraytp.ops.conv import as_matrix

COLUMNS = ("variant", "step", "block", "label", "loss", "angle_deg", "drift_rms", "drift_largest")


def drift(network: Network, n: int) -> tuple[float, float]:
    """Return root mean square and largest absolute value of the eigenvalues of WWᵀ − I; NaN where W is not square."""
    w = as_matrix(network.weights[n])
    if w.shape[0] != w.shape[1]:
        return float("nan"), float("nan")
    excess = w @ w.T
    excess.reshape(-1)[:: len(w) + 1] -= 1
    largest = eigsh(excess, k=1, v0=np.ones(len(w), w.dtype), tol=1e-3, return_eigenvectors=False)
    return float(np.linalg.norm(excess) / len(w) ** 0.5), float(abs(largest[0]))


def steps(experiment: Experiment) -> Iterator[tuple[int, int, Any, Any]]:
    """Yield number, epoch, images and labels of every step of the run."""
    number, train = itertools.count(), experiment.config.train
    for epoch in range(train.epochs):
        with closing(experiment.train_loader.batches(epoch)) as batches:
            for images, labels in batches:
                step = next(number)
                if step == train.steps:
                    return
                yield step, epoch, images, labels


def measure(name: str, config: Config) -> Iterator[list[Any]]:
    """Train a variant; yield the rows of its table."""
    experiment = build(config)
    for step, epoch, images, labels in steps(experiment):
        score = experiment.propose(images, labels)
        if step % config.compare.every == 0:
            for found in experiment.compare():
                label = experiment.network.blocks[found.block].label
                loss = float(score.totals[0]) / score.images
                yield [name, step, found.block, label, loss, found.angle_deg, *drift(experiment.network, found.block)]
        experiment.apply(epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "drift.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name, config in load_config(given.config, given.overrides).variants.items():
            for row in measure(name, config):
                table.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
