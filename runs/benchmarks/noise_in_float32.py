"""Measure the effect of float32's rounding on DRL's sampled gradient, block by block.

The network is trained for some steps in float32. On the next batch, gradients of Q for the same noise samples are
computed in both dtypes, from the same weights. `rounding` is the distance of the float32 gradients from the float64
ones; `noise` is the scatter of the gradients from sample to sample. Both are relative to the norm of a gradient.

    python runs/benchmarks/noise_in_float32.py CONFIG [--set KEY=VALUE]… [--steps 100] [--noises 4]
"""

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np

from arraytp.config import load_one
from arraytp.rules import drl
from arraytp.rules.feedback import descent_of
from arraytp.training.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=100, help="Of training, before.")
    parser.add_argument("--noises", type=int, default=4)
    given = parser.parse_args()
    short, long = (build(load_one(given.config, [*given.overrides, f"dtype=float{bits}"])) for bits in (32, 64))
    with closing(short.train_loader.batches(0)) as batches:
        for _ in range(given.steps):
            short.step(*next(batches))
        images, labels = next(batches)
    for trained, copied in zip(short.network.parameters(), long.network.parameters(), strict=True):
        copied[...] = trained
    for n, trained in short.rule_state.weights.items():
        long.rule_state.weights[n][...] = trained
    steps = [each.forward(images.astype(each.config.dtype), labels) for each in (short, long)]
    print(f"largest logit: {np.abs(steps[1].batch.logits).max():.3g}")
    print("| s^n, n | σ | rounding | noise |\n|---|---|---|---|")
    generator, options = np.random.default_rng(0), short.config.rule
    for n in short.rule_state.weights:
        sigma = descent_of(options.feedback, n, 0, short.workspace).sigma
        gradients = []
        for _ in range(given.noises):
            epsilon = (sigma * generator.standard_normal(steps[0].batch.at(n).s.shape)).astype(np.float32)
            pair = []
            for each, step in zip((short, long), steps, strict=True):
                noise = epsilon.astype(each.config.dtype)
                gradient, _ = drl.iterate(options, each.rule_state, step.batch.at(n), noise, sigma)
                pair.append(gradient.astype(np.float64))
            gradients.append(pair)
        in_short, in_long = np.swapaxes(gradients, 0, 1)
        size = np.sqrt((in_long**2).sum(axis=(1, 2)).mean())
        rounding = np.sqrt(((in_short - in_long) ** 2).sum(axis=(1, 2)).mean()) / size
        scatter = np.sqrt(in_long.var(axis=0, ddof=1).sum()) / size
        print(f"| {n} | {sigma:.3g} | {rounding:.4f} | {scatter:.2f} |", flush=True)


if __name__ == "__main__":
    main()
