"""Measure how far the mean of L-DRL's sampled gradient is from its limit for small noise, block by block.

For every σ, the mean over noise samples of the gradient divided by σ², on one batch of training images, is compared
with (2/B)(ω M − θ N): angle and relative distance, the latter without the part that the finite number of samples
explains (docs/math/ldrl.md). ω is once as initialised or as a checkpoint has it, and once at its optimum θ N / M, where
the limit is zero and only the difference remains.

    python runs/benchmarks/small_noise.py CONFIG [--set KEY=VALUE]… [--noises 200] [--factors 1,0.3] [--checkpoint DIR]
"""

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np

from arraytp.config import load_one
from arraytp.rules import ldrl
from arraytp.rules.feedback import descent_of
from arraytp.training.build import build
from arraytp.training.checkpoint import read_checkpoint
from arraytp.training.compare import angle_degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--noises", type=int, default=200)
    parser.add_argument("--factors", default="1,0.3,0.1", help="Of the config's σ.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="A result folder of this config.")
    given = parser.parse_args()
    experiment = build(load_one(given.config, given.overrides))
    if given.checkpoint:
        read_checkpoint(given.checkpoint / "checkpoint.h5", experiment)
    with closing(experiment.train_loader.batches(0)) as batches:
        step = experiment.forward(*next(batches))
    options = experiment.config.rule
    print("| block | σ | ω | angle (°) | relative distance |\n|---|---|---|---|---|")
    for n, trained in experiment.rule_state.weights.items():
        at = step.batch.at(n)
        N, M = at.jacobian_overlap(options.unpool)
        optimum = (at.weight * np.divide(N, M, out=np.zeros_like(N), where=M > 0)).astype(trained.dtype)
        for name, omega in (("trained" if given.checkpoint else "initial", trained), ("optimum", optimum)):
            experiment.rule_state.weights[n] = omega
            limit = 2 / len(step.batch) * (omega * M - at.weight * N)
            # At the optimum the limit is 0: distances are relative to one of its two terms.
            scale = float(np.linalg.norm(limit if name != "optimum" else 2 / len(step.batch) * at.weight * N))
            for factor in map(float, given.factors.split(",")):
                sigma = factor * descent_of(options.feedback, n, 0, experiment.workspace).sigma
                iterate = ldrl.begin(options, at, sigma, given.noises)
                total, squares = np.zeros(omega.shape), 0.0
                for k in range(given.noises):
                    gradient = (
                        iterate(experiment.rule_state, k, False).gradients["weight"].astype(np.float64) / sigma**2
                    )
                    total += gradient
                    squares += float(np.sum(gradient**2))
                mean = total / given.noises
                chance = (squares / given.noises - float(np.sum(mean**2))) / max(given.noises - 1, 1)
                distance = max(float(np.sum((mean - limit) ** 2)) - chance, 0.0) ** 0.5 / scale
                angle = angle_degrees(mean, limit) if name != "optimum" else float("nan")
                print(f"| {at.block.label} | {sigma:.3g} | {name} | {angle:.1f} | {distance:.3f} |", flush=True)
        experiment.rule_state.weights[n] = trained


if __name__ == "__main__":
    main()
