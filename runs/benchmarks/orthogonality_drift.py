"""Measure how the angle to BP's updates grows as square weight matrices drift from orthogonal ones.

Trains every variant of a config by GAIT-prop in difference form and notes, every `compare.every` steps and for every
block, into drift.csv in the folder --out, of which it draws drift.png:

    angle_deg      between the block's update and BP's
    own_deg        between the error that the block hands down, (D e) W⁻¹, and (D e) Wᵀ for the same e
    drift_rms      ‖WWᵀ − I‖/√K of the block's K×K matrix: root mean square of σ² − 1 over its singular values σ
    drift_largest  the largest |σ² − 1|

    python runs/benchmarks/orthogonality_drift.py runs/gait-prop/drift-conv-imagenet.yml --out DIR [--set KEY=VALUE]…
"""

import argparse
import csv
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.sparse.linalg import eigsh

from arraytp.config import Config, load_config
from arraytp.fast.inverse import backward_through_inverse, factor_blocks
from arraytp.fast.passes import backward
from arraytp.model.network import Network
from arraytp.ops.conv import as_matrix
from arraytp.report.style import RC, shades
from arraytp.training.compare import angle_degrees
from arraytp.training.experiment import Experiment, build

COLUMNS = ("variant", "step", "block", "label", "loss", "angle_deg", "own_deg", "drift_rms", "drift_largest")


def drift(network: Network, n: int) -> tuple[float, float]:
    """Return root mean square and largest absolute value of the eigenvalues of WWᵀ − I; NaN where W is not square."""
    w = as_matrix(network.weights[n])
    if w.shape[0] != w.shape[1]:
        return float("nan"), float("nan")
    excess = w @ w.T
    excess.reshape(-1)[:: len(w) + 1] -= 1
    largest = eigsh(excess, k=1, v0=np.ones(len(w), w.dtype), tol=1e-3, return_eigenvectors=False)
    return float(np.linalg.norm(excess) / len(w) ** 0.5), float(abs(largest[0]))


def own_angles(experiment: Experiment) -> list[float]:
    """Return by how many degrees W⁻¹ turns the error that each block hands down, against Wᵀ; NaN for the first."""
    network, passed, workspace = experiment.network, experiment.passed, experiment.workspace
    factors, e, found = factor_blocks(network, workspace), experiment.dlogits, []
    for n in range(len(network) - 1, 0, -1):
        block, s, x = network.blocks[n], passed.s[n + 1], passed.x[n]
        plain = backward(block, e, s, None, x, network.weights[n], workspace, ("plain", n))[2]
        e = backward_through_inverse(block, factors[n], e, passed, n, workspace, ("own", n))[2]
        found.append(angle_degrees(e, plain))
    return [float("nan"), *found[::-1]]


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
            loss = float(score.totals[0]) / score.images
            for found, own in zip(experiment.compare(), own_angles(experiment), strict=True):
                label, norms = experiment.network.blocks[found.block].label, drift(experiment.network, found.block)
                yield [name, step, found.block, label, loss, found.angle_deg, own, *norms]
        experiment.apply(epoch)


def draw(rows: list[list[Any]], path: Path) -> None:
    """Draw each block's angle over its drift, a panel a variant; the first block, not square, over the second's."""
    variants = list(dict.fromkeys(row[0] for row in rows))
    blocks = dict(sorted({row[2]: row[3] for row in rows}.items()))
    figure = Figure(figsize=(3.6 * len(variants), 3.8), layout="constrained")
    for axes, variant in zip(figure.subplots(1, len(variants), squeeze=False, sharey=True).flat, variants, strict=True):
        for colour, (n, label) in zip(shades(len(blocks)), blocks.items(), strict=True):
            angles = [row[5] for row in rows if row[0] == variant and row[2] == n]
            drifts = [row[7] for row in rows if row[0] == variant and row[2] == max(n, 1)]
            axes.plot(drifts, angles, color=colour, marker="o", markersize=3, label=label)
        axes.set(title=variant, xlabel="drift ‖WWᵀ − I‖/√K")
        axes.tick_params(axis="x", labelrotation=30)
    figure.axes[0].set_ylabel("angle to BP's update (°)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", title="block")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (given.out / "drift.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name, config in load_config(given.config, given.overrides).variants.items():
            for row in measure(name, config):
                rows.append(row)
                table.writerow(row)
                file.flush()
    with matplotlib.rc_context(RC):
        draw(rows, given.out / "drift.png")


if __name__ == "__main__":
    main()
