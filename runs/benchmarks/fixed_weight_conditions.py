"""The conditions of fixed-weight DTP (Shibuya et al. 2023), and how far DRL's Q is from its optimum, over training.

For rules with a feedback module G^n, block by block, means over the samples of a batch:

    trace     tr(∂F ∂G) over ‖∂F‖‖∂G‖, −1 to 1: positive where the feedback points the right way on average
    positive  share of the eigenvalues of ∂F ∂G with a positive real part; of dense blocks, `--samples` samples
    angle     between the block's update and BP's

For rule drl, block by block: ‖Q − Q*‖/‖Q*‖ and the angle between Q and Q*, Q* = (Σ J Jᵀ)⁺ Σ J of the batch
(docs/math/dtp.md). The config trains; every `--every` steps there is a row.

    python runs/benchmarks/fixed_weight_conditions.py CONFIG[:VARIANT] [--set KEY=VALUE]… [--steps 100] [--every 20]
"""

import argparse
import itertools
from contextlib import closing

import numpy as np

from arraytp.backend import Array
from arraytp.config import load_one
from arraytp.model.passes import At
from arraytp.rules import drl
from arraytp.training.compare import angle_degrees, relative_distance
from arraytp.training.experiment import Experiment, Step, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG[:VARIANT]")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    given = parser.parse_args()
    path, _, variant = given.config.partition(":")
    experiment = build(load_one(path, given.overrides, variant or None))
    direct = experiment.rule is drl.RULE
    if not direct and not hasattr(experiment.config.rule, "unpool"):
        parser.error(f"rule {experiment.config.rule.name} has neither feedback modules nor direct feedback Q")
    print("| step | block | " + ("distance | angle (°) |" if direct else "trace | positive | angle (°) |"))
    print("|---|---|---|---|" + ("" if direct else "---|"))
    for number, (images, labels) in enumerate(itertools.islice(batches(experiment), given.steps + 1)):
        step = experiment.forward(images, labels)
        experiment.train_feedback(step)
        if number % given.every == 0:
            measure = optimum if direct else conditions
            for label, numbers in measure(experiment, step, given.samples):
                print(f"| {number} | {label} | {' | '.join(f'{value:.3g}' for value in numbers)} |")
        experiment.apply(step, experiment.updates(step))


def batches(experiment: Experiment):
    for epoch in itertools.count():
        with closing(experiment.train_loader.batches(epoch)) as loaded:
            yield from loaded


def conditions(experiment: Experiment, step: Step, samples: int):
    """Yield label, trace, share of eigenvalues and angle of every block with a feedback module."""
    angles = [each.angle_deg for each in experiment.compare(step, experiment.updates(step))]
    for n, omega in experiment.rule_state.weights.items():
        at, theta = step.batch.at(n), experiment.network.weights[n]
        N, M = at.jacobian_overlap(experiment.config.rule.unpool)
        # tr(∂F ∂G) = Σ θ ω N and ‖∂G‖² = Σ ω² M; ‖∂F‖² is Σ θ² of the derivatives D² where N has D D_G.
        trace, size = float((theta * omega * N).sum()), np.sqrt(float((omega**2 * M).sum()) * forward_square(at))
        share = positive_share(at, omega, samples) if at.block.window is None else float("nan")
        yield at.block.label, (trace / size, share, angles[n])


def forward_square(at: At) -> float:
    """Return ‖∂F‖² summed over the batch: the backward pass of random signs, by Hutchinson's estimate of 16 draws."""
    generator, total = np.random.default_rng(0), 0.0
    for _ in range(16):
        signs = np.sign(generator.standard_normal(at.s_next.shape)).astype(at.s_next.dtype)
        back = at.backward(signs, through=at.weight)[2]
        total += float((np.asarray(back, np.float64) ** 2).sum()) / 16
    return total


def positive_share(at: At, omega: Array, samples: int) -> float:
    """Return the share of eigenvalues of ∂F ∂G with a positive real part: D ⊙ (θᵀ ω) ⊙ D_G of a dense block."""
    product, f, shares = at.weight.T.astype(np.float64) @ omega, at.block.activation, []
    for s in at.s_next[:samples]:
        ones = np.ones_like(s)
        slope, feedback_slope = f.backward(ones, s), f.backward(ones, f(s.copy()))
        shares.append(float((np.linalg.eigvals(slope[:, None] * product * feedback_slope).real > 0).mean()))
    return float(np.mean(shares))


def optimum(experiment: Experiment, step: Step, samples: int):
    """Yield label, relative distance and angle of every Q to its optimum on the batch."""
    for n, q in experiment.rule_state.weights.items():
        A, J = step.batch.jacobian_sums[n]
        rcond = len(A) * float(np.finfo(A.dtype).eps)
        best = np.linalg.pinv(A.astype(np.float64), rcond=rcond) @ J
        yield f"Q^{n}", (relative_distance(q, best), angle_degrees(q, best))


if __name__ == "__main__":
    main()
