"""Print the conditions of fixed-weight DTP (Shibuya et al. 2023) during training, for rules with a feedback module G^n.

For each block, over the samples of a batch:

    trace     tr(∂F ∂G) / (‖∂F‖‖∂G‖), −1 to 1: positive where the feedback points the right way on average
    positive  share of the eigenvalues of ∂F ∂G with a positive real part, over `--samples` samples; only for blocks
              with up to `--largest` outputs, since the matrix has a row for each
    angle     between the block's update and BP's

The config is trained, and rows are printed every `--every` steps.

    python runs/benchmarks/fixed_weight_conditions.py CONFIG[:VARIANT] [--set KEY=VALUE]… [--steps 100] [--every 20]
"""

import argparse
import itertools
from contextlib import closing

import numpy as np

from arraytp.backend import Array
from arraytp.config import load_one
from arraytp.model.feedback import picked, transposed, unpooled
from arraytp.model.passes import At
from arraytp.ops.conv import conv_forward
from arraytp.options import Unpool
from arraytp.training.build import build
from arraytp.training.experiment import Experiment
from arraytp.training.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG[:VARIANT]")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--largest", type=int, default=2048)
    given = parser.parse_args()
    path, _, variant = given.config.partition(":")
    experiment = build(load_one(path, given.overrides, variant or None))
    if not hasattr(experiment.config.rule, "unpool"):
        parser.error(f"rule {experiment.config.rule.name} has no feedback modules; use tp, dtp, ldrl or ldrl-parallel")
    print("| step | block | trace | positive | angle (°) |")
    print("|---|---|---|---|---|")
    for number, (images, labels) in enumerate(itertools.islice(batches(experiment), given.steps + 1)):
        step = experiment.forward(images, labels)
        experiment.train_feedback(step)
        if number % given.every == 0:
            for label, numbers in conditions(experiment, step, given.samples, given.largest):
                print(f"| {number} | {label} | {' | '.join(f'{value:.3g}' for value in numbers)} |")
        experiment.apply(step, experiment.updates(step))


def batches(experiment: Experiment):
    for epoch in itertools.count():
        with closing(experiment.train_loader.batches(epoch)) as loaded:
            yield from loaded


def conditions(experiment: Experiment, step: Step, samples: int, largest: int):
    """Yield label, trace, share of eigenvalues and angle of every block with a feedback module."""
    angles = [each.angle_deg for each in experiment.compare(step, experiment.updates(step))]
    for n, omega in experiment.rule_state.weights.items():
        at, theta = step.batch.at(n), experiment.network.weights[n]
        N, M = at.jacobian_overlap(experiment.config.rule.unpool)
        # tr(∂F ∂G) = Σ θ ω N and ‖∂G‖² = Σ ω² M; ‖∂F‖² is Σ θ² times the sums of D_F² in place of N's D_F D_G.
        trace, size = float((theta * omega * N).sum()), np.sqrt(float((omega**2 * M).sum()) * forward_square(at))
        share = float("nan")
        if at.s_next[0].size <= largest:
            taken = range(min(samples, len(at.s_next)))
            eigenvalues = [np.linalg.eigvals(product(at, omega, b, experiment.config.rule.unpool)) for b in taken]
            share = float(np.mean([(values.real > 0).mean() for values in eigenvalues]))
        yield at.block.label, (trace / size, share, angles[n])


def forward_square(at: At) -> float:
    """Return ‖∂F‖² summed over the batch, by Hutchinson's estimate: a mean over 16 backward passes of random signs."""
    generator, total = np.random.default_rng(0), 0.0
    for _ in range(16):
        signs = np.sign(generator.standard_normal(at.s_next.shape)).astype(at.s_next.dtype)
        back = at.backward(signs, through=at.weight)[2]
        total += float((np.asarray(back, np.float64) ** 2).sum()) / 16
    return total


def product(at: At, omega: Array, b: int, unpool: Unpool) -> Array:
    """Return ∂F ∂G of sample b, column by column: each unit vector of s^{n+1} through G's Jacobian, then F's."""
    block, s, units = at.block, at.s_next[b : b + 1].astype(np.float64), at.s_next[b].size
    omega, theta = omega.astype(np.float64), at.weight.astype(np.float64)
    ones, rows = np.ones_like(s), []
    for first in range(0, units, 128):
        taken = np.arange(first, min(first + 128, units))
        index = None if at.index is None else np.repeat(at.index[b : b + 1], len(taken), axis=0)
        unit = np.eye(units)[taken].reshape(-1, *s.shape[1:])
        u = unpooled(block, np.repeat(s, len(taken), axis=0), index, unpool)
        slope = block.activation.backward(np.ones_like(u), block.activation(u))
        back = transposed(block, omega, slope * unpooled(block, unit, index, unpool))
        if block.window is None:
            z = back.reshape(len(taken), -1) @ theta
        else:
            z, _ = conv_forward(back, theta, np.zeros(theta.shape[-1]), block.window)
        z = z if index is None else picked(block, z, index)
        rows.append((block.activation.backward(ones, s) * z).reshape(len(taken), units))
    return np.concatenate(rows).T


if __name__ == "__main__":
    main()
