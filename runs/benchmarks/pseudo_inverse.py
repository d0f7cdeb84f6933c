"""Compare GAIT-prop with pseudo-inverses to BP on one batch: angle against W's distance from semi-orthogonal, and time.

Every W but the first starts semi-orthogonal and is perturbed by a random matrix whose norm is a share of W's; d is the
root mean square of σ² − 1 over the singular values σ of the perturbed W, ‖WᵀW − I‖/√O or ‖WWᵀ − I‖/√K, averaged over
the blocks. Angles are computed in float64. Next come the angles, at semi-orthogonal W, for other ways of passing errors
through pools; then the time of alternating steps of both rules, in the config's dtype, regulariser included.

    python runs/benchmarks/pseudo_inverse.py CONFIG[:VARIANT]… [--set KEY=VALUE]… [--figure FILE.png] [--steps 10]
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np

from arraytp.backend import Array
from arraytp.config import Config, load_one
from arraytp.model.passes import At, Batch
from arraytp.ops.patches import Window, add_border
from arraytp.ops.pool import max_pool_backward, max_unpool
from arraytp.report.figures import new_figure
from arraytp.report.style import RC, shades
from arraytp.rules import bp
from arraytp.training.build import build
from arraytp.training.compare import angle_degrees
from arraytp.training.drift import drift
from arraytp.training.experiment import Experiment

SHARES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG[:VARIANT]")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=64, help="Batch of the angles.")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    panels = []
    for name in given.configs:
        path, _, variant = name.partition(":")
        config = load_one(path, given.overrides, variant or None)
        small = replace(config, dtype="float64", train=replace(config.train, batch_size=given.images))
        labels, curve = angles_over_distance(build(small))
        panels.append((config.network.name or config.name, labels, curve))
        print(f"\n{name}: angle to BP (°)\n\n| share | d | {' | '.join(labels)} |\n|---|---|{'---|' * len(labels)}")
        for share, (d, angles) in zip(SHARES, curve, strict=True):
            print(f"| {share:g} | {d:.2g} | {' | '.join(f'{angle:.3g}' for angle in angles)} |")
        print("\n| errors through pools | " + " | ".join(labels) + f" |\n|---|{'---|' * len(labels)}")
        for way, angles in angles_of_pools(build(small)):
            print(f"| {way} | {' | '.join(f'{angle:.3g}' for angle in angles)} |")
        if given.steps:
            print(f"\nstep of GAIT-prop over one of BP, batch {config.train.batch_size}, median of {given.steps} in "
                  f"turns: {step_ratio(config, given.steps):.2f}")  # fmt: skip
    if given.figure:
        draw(panels, given.figure)


def first_batch(experiment: Experiment) -> tuple[Array, Array]:
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches)
        return images.copy(), labels.copy()


def angles_over_distance(experiment: Experiment) -> tuple[list[str], list[tuple[float, list[float]]]]:
    """Return the blocks' labels, and mean d and angles for every share."""
    images, labels = first_batch(experiment)
    start, curve = [weight.copy() for weight in experiment.network.weights], []
    for share in SHARES:
        for n, w in enumerate(start[1:], start=1):
            noise = np.random.default_rng(n).standard_normal(w.shape)
            experiment.network.weights[n][...] = w + share * noise * (np.linalg.norm(w) / np.linalg.norm(noise))
        step = experiment.forward(images, labels)
        angles = [each.angle_deg for each in experiment.compare(step, experiment.updates(step))]
        distances = [drift(weight)[0] for weight in experiment.network.weights[1:]]
        curve.append((float(np.mean(distances)), angles))
    return [block.label for block in experiment.network.blocks], curve


def angles_of_pools(experiment: Experiment) -> Iterator[tuple[str, list[float]]]:
    """Yield each way of passing errors through pools, with the resulting angles to BP."""
    step = experiment.forward(*first_batch(experiment))
    exact = experiment.exact_updates(step)
    for way in ("added up", "mean over the windows", "the last window alone"):
        updates = list(passed(step.batch, way))[::-1]
        yield way, [angle_degrees(a, b) for a, (b, _) in zip(updates, exact, strict=True)]


def passed(batch: Batch, way: str) -> Iterator[Array]:
    """Yield the weight updates from the last block to the first, with errors passed through pools as `way` says."""
    e, inverses = batch.dlogits, batch.pseudo_inverses()
    for at in batch.down():
        dW, _, e_before = at.backward(weighted(at, e.reshape(at.s_next.shape), way), through=inverses.get(at.n))
        yield dW.copy()
        e = None if e_before is None else e_before.copy()


def weighted(at: At, e: Array, way: str) -> Array:
    """Weight the errors of a pool's windows so that their sums at the maxima are what `way` asks for."""
    if at.block.pool is None or at.index is None or way == "added up":
        return e
    window, ones = at.block.pool, np.ones_like(e)
    if way == "mean over the windows":
        return e / at_maxima(max_pool_backward(ones, at.index, window), at.index, window)
    number = np.cumsum(ones, axis=1) * ones.shape[2] + np.cumsum(ones, axis=2)
    return e * (at_maxima(max_unpool(number, at.index, window, "overwrite"), at.index, window) == number)


def at_maxima(image: Array, index: Array, window: Window) -> Array:
    """Return an image's values at the maxima of the windows."""
    bordered, out = add_border(image, window), np.zeros(index.shape)
    for element in range(window.kernel**2):
        pixels = bordered[(slice(None), *window.offset(*divmod(element, window.kernel)))]
        np.copyto(out, pixels, where=index == element)
    return out


def step_ratio(config: Config, count: int) -> float:
    """Return the median ratio of the step time of the config's rule to BP's, in alternating steps on the same batch."""
    plain = replace(config, rule=bp.Options(), optimizer=replace(config.optimizer, orthogonality=0.0))
    own, exact = build(config), build(plain)
    images, labels = first_batch(own)
    ratios = []
    for n in range(count + 1):
        seconds = []
        for experiment in (exact, own):
            started = time.perf_counter()
            experiment.step(images, labels)
            seconds.append(time.perf_counter() - started)
        # The first round allocates buffers.
        if n:
            ratios.append(seconds[1] / seconds[0])
    return median(ratios)


def draw(panels: list[tuple[str, list[str], list[tuple[float, list[float]]]]], path: Path) -> None:
    with matplotlib.rc_context(RC):
        figure = new_figure(4.3 * len(panels) + 1.2, 3.9, "GAIT-prop with pseudo-inverses: angle to BP's update")
        for axes, (name, labels, curve) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            distances = [d for d, _ in curve[1:]]
            for n, (label, colour) in enumerate(zip(labels[:-1], shades(len(labels) - 1), strict=True)):
                angles = [of_blocks[n] for _, of_blocks in curve[1:]]
                axes.plot(distances, angles, color=colour, marker="o", markersize=3, label=label)
            axes.set(title=name, xscale="log", yscale="log", xlabel="d, root mean square of σ² − 1", ylabel="angle (°)")
            axes.legend()
        figure.savefig(path)


if __name__ == "__main__":
    main()
