"""A study of drift: how the angle to BP grows as square matrices drift away from orthogonality (GP paper, 2.3).

θ is trained as in a run. Every `compare.every` steps, drift.csv gets a row for each block n with, besides the loss,

    angle_deg      angle between the block's update and BP's
    own_deg        angle between (D e) W⁻¹, which the block passes down, and (D e) Wᵀ for the same e; NaN for block 0
    drift_rms      root mean square of σ² − 1 over the singular values σ of the block's W: ‖WWᵀ − I‖/√K if W is K×K
    drift_largest  the largest |σ² − 1|; both NaN for block 0 unless its W is square
"""

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh

from arraytp.backend import Array
from arraytp.errors import NonFiniteError
from arraytp.model.passes import At
from arraytp.ops.conv import as_matrix
from arraytp.ops.excess import is_tall
from arraytp.training.build import build_planned
from arraytp.training.compare import angle_degrees
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan
from arraytp.training.progress import Progress
from arraytp.training.step import Step
from arraytp.training.tables import DRIFT_COLUMNS, CsvTable

NONE = math.nan, math.nan


def drift_seed(planned: Plan, folder: Path, label: str, quiet: bool, plain: bool) -> dict[str, Any]:
    """Train one seed, write its drift.csv and return the entries of its summary."""
    config = planned.config
    experiment, table = build_planned(planned, plain), CsvTable(folder / "drift.csv", DRIFT_COLUMNS)
    table.restart([])
    total, _ = experiment.length
    angles: list[float] = []
    with experiment.steady(), Progress(label, 1, total, quiet=quiet) as progress:
        batches = itertools.islice(_batches(experiment), min(total, sys.maxsize))
        for number, (epoch, images, labels) in enumerate(batches):
            step = experiment.forward(images, labels)
            loss = float(step.score.totals[0]) / step.score.images
            if not math.isfinite(loss):
                raise NonFiniteError(f"not finite at step {number}; a smaller optimizer.lr may help")
            experiment.train_feedback(step)
            updates = experiment.updates(step)
            if number % config.compare.every == 0:
                angles = [each.angle_deg for each in experiment.compare(step, updates)]
                _measure(experiment, step, table, (number, loss), angles)
            experiment.apply(step, updates, epoch)
            progress.step(len(labels))
    table.keep()
    return {"update_angle_deg": angles}


def _batches(experiment: Experiment) -> Iterator[tuple[int, Array, Array]]:
    """Yield epoch, images and labels of every step."""
    for epoch in range(experiment.config.train.epochs):
        with closing(experiment.train_loader.batches(epoch)) as batches:
            for images, labels in batches:
                yield epoch, images, labels


def _measure(experiment: Experiment, step: Step, table: CsvTable, at: tuple[int, float], angles: list[float]) -> None:
    number, loss = at
    for n, (angle, own) in enumerate(zip(angles, own_angles(experiment, step), strict=True)):
        measured = drift(experiment.network.weights[n]) if n > 0 or experiment.network.blocks[n].is_square else NONE
        table.append(number, n, loss, angle, own, *measured)


def own_angles(experiment: Experiment, step: Step) -> list[float]:
    """Return the angle in degrees between what each block passes down by W⁻¹ and by Wᵀ; NaN for block 0."""
    batch = replace(step.batch, results="own")
    assert experiment.rule.inverses is not None
    e, inverses, angles = batch.dlogits, experiment.rule.inverses(experiment.config.rule, batch), []
    for at in batch.down():
        if at.n == 0:
            angles.append(math.nan)
            break
        transposed = _handed_down(at, e, at.weight)
        inverted = _handed_down(at, e, inverses[at.n])
        angles.append(angle_degrees(inverted, transposed))
        e = inverted
    return angles[::-1]


def _handed_down(at: At, e: Array, through: Any) -> Array:
    """Return a copy of the gradient of s^n."""
    ds = at.backward(e, through=through)[2]
    assert ds is not None
    return ds.copy()


def drift(weight: Array) -> tuple[float, float]:
    """Return the RMS and the largest absolute value of the eigenvalues of WWᵀ − I, or of WᵀW − I if that is smaller."""
    w = np.asarray(as_matrix(weight))
    error = w.T @ w if is_tall(w) else w @ w.T
    order = len(error)
    error.reshape(-1)[:: order + 1] -= 1
    largest = np.abs(error).max()
    # ARPACK refuses a matrix that is zero, not finite or of order 1; the largest entry is already the answer then.
    if order > 1 and np.isfinite(largest) and largest:
        largest = abs(eigsh(error, k=1, v0=np.ones(order, w.dtype), tol=1e-3, return_eigenvectors=False)[0])
    return float(np.linalg.norm(error) / order**0.5), float(largest)
