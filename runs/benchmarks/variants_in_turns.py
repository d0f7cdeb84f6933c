"""Train a config's variants in turns, one step each, in one process, to compare step costs even under other load.

    python runs/benchmarks/variants_in_turns.py runs/gait-prop/orthogonality-every.yml [--set data.dataset=DIR]…

Prints a Markdown table: mean processor time of a step and its ratio to the first variant's; each block's angle to BP's
update, measured every `compare.every` steps, and the training loss, both averaged over the second half; test top-1.
"""

import argparse
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from arraytp.config import load_config
from arraytp.training.build import build


def main(path: Path, settings: list[str]) -> None:
    """Train and print."""
    variants = load_config(path, settings).variants
    made = {name: build(config) for name, config in variants.items()}
    first = next(iter(made.values()))
    steps, every = first.config.train.steps or first.train_loader.steps_per_epoch, first.config.compare.every
    seconds, losses, angles = ({name: [] for name in made} for _ in range(3))  # type: ignore[var-annotated]
    for number, (images, labels) in enumerate(batches(first, steps)):
        for name, experiment in made.items():
            started = time.process_time()
            step = experiment.forward(images, labels)
            experiment.train_feedback(step)
            updates = experiment.updates(step)
            spent = time.process_time() - started
            if number % every == 0 and number >= steps // 2:
                angles[name].append([each.angle_deg for each in experiment.compare(step, updates)])
            losses[name].append(float(step.score.loss))
            started = time.process_time()
            experiment.apply(step, updates, number // first.train_loader.steps_per_epoch)
            seconds[name].append(spent + time.process_time() - started)
    labels = [block.label for block in first.network.blocks]
    print("|", " | ".join(["variant", "ms a step", "ratio", *labels, "train loss", "test top-1"]), "|")
    print("|---" * (5 + len(labels)) + "|")
    for name, experiment in made.items():
        scores = list(experiment.evaluate())
        top1 = 100 * sum(float(score.totals[1]) for score in scores) / sum(score.images for score in scores)
        cost, base = (1e3 * np.mean(seconds[each][1:]) for each in (name, next(iter(made))))
        found = [f"{angle:.2f}" for angle in np.mean(angles[name], axis=0)]
        half = np.mean(losses[name][steps // 2 :])
        cells = [name, f"{cost:.0f}", f"{cost / base:.2f}", *found, f"{half:.4g}", f"{top1:.2f}"]
        print("|", " | ".join(cells), "|", flush=True)


def batches(experiment, steps):  # type: ignore[no-untyped-def]
    """Yield copies of the first `steps` batches of training, across epochs."""
    for number in range(-(-steps // experiment.train_loader.steps_per_epoch)):
        with closing(experiment.train_loader.batches(number)) as loaded:
            for images, labels in loaded:
                if steps == 0:
                    return
                steps -= 1
                yield images.copy(), labels.copy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key.path=value")
    given = parser.parse_args()
    main(given.config, given.settings)
