"""Count the kernels that one training step launches on a device, and how often the host waits for it.

    python runs/benchmarks/launches.py            # a Markdown table; exit status 1 if a budget is exceeded
    python runs/benchmarks/launches.py --most 15 ldrl    # the most frequent launches

Launches are counted by the module `cpu_cuda`, which runs CuPy without a GPU. A product, a factorisation, a memset and a
copy count as one each. Their number depends on the network and the rule, not on the batch size. The last two columns
are for a step with CUDA graphs: launches of graphs, and of everything else.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import cpu_cuda
import cupy
import numpy as np

from arraytp.backend import get_backend
from arraytp.config import parse_config
from arraytp.data.writer import Description, writing
from arraytp.training.build import build
from arraytp.training.experiment import Experiment

SGD: dict[str, Any] = {"name": "sgd", "lr": 1e-3, "momentum": 0.9}
VGG = {"network": {"name": "vgg"}, "optimizer": {**SGD, "weight_decay": 1e-4}}
FC_DEEP = {
    "network": {"name": "fc-deep", "square": True, "init": "orthogonal"},
    "optimizer": {"name": "adam", "lr": 1e-4, "orthogonality": 0.1, "epsilon_form": "keras"},
    "loss": {"reduction": "sum"},
}


def ldrl(iterations: int, **options: Any) -> dict[str, Any]:
    """Return the settings of L-DRL."""
    return {"name": "ldrl", "feedback": {"iterations": iterations, "optimizer": SGD}, **options}


STEPS: dict[str, dict[str, Any]] = {
    "bp": {**VGG, "rule": {"name": "bp"}},
    "ldrl": {**VGG, "rule": ldrl(2)},
    "ldrl, one iteration more": {**VGG, "rule": ldrl(3)},
    "ldrl, expected": {**VGG, "rule": ldrl(20, expected=True)},
    "gait-prop": {**FC_DEEP, "rule": {"name": "gait-prop", "form": "difference"}},
    "gait-prop, literal": {**FC_DEEP, "rule": {"name": "gait-prop"}, "dtype": "float64"},
}
PHASES = ("forward", "feedback", "updates", "optimiser")
# Launches per step, or, for "ldrl", per iteration.
BUDGETS = {"bp": 70, "ldrl": 20, "ldrl, expected": 160, "gait-prop": 150}
# A rule that inverts weights reads back how far they are from orthogonal.
WAITS = {"gait-prop": 1, "gait-prop, literal": 1}


def counted() -> Counter[str]:
    """Return the counts of calls to the device since this function was last called."""
    return Counter({name: n for name, n in cpu_cuda.counts().items() if not name.startswith("bytes")})


def launches(calls: Counter[str]) -> int:
    """Return how many of these calls launch work on the device."""
    kinds = cpu_cuda.summary(calls)
    return sum(kinds.get(kind, 0) for kind in ("kernels", "blas", "solver", "memset", "copies"))


def phases(experiment: Experiment) -> list[Counter[str]]:
    """Return the calls that one step makes to the device, phase by phase."""
    images = cupy.asarray(np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(experiment.config.dtype))
    labels = cupy.arange(8)
    # With graphs, the first steps allocate buffers and capture; from the fifth on, all graphs are launched.
    for _ in range(5):
        counted()
        step = experiment.forward(images, labels)
        parts = [counted()]
        experiment.train_feedback(step)
        parts.append(counted())
        updates = experiment.updates(step)
        parts.append(counted())
        experiment.apply(step, updates)
        parts.append(counted())
    return parts


def by_graphs(parts: list[Counter[str]]) -> tuple[int, int]:
    """Return how many graphs a step launches, and how many other launches it makes."""
    step = sum(parts, Counter())
    return step["cudaGraphLaunch"], launches(step)


def measure(folder: str, names: list[str], graphs: bool) -> dict[str, list[Counter[str]]]:
    """Return the calls that the named steps make to the device, phase by phase."""
    with writing(Path(folder) / str(graphs), Description("random", (32, 32, 3), tuple("abcdefghij"))) as writer:
        for split in ("train", "test"):
            writer.add(split, np.zeros((8, 32, 32, 3), np.uint8), np.arange(8))
    counted = {}
    for name in names:
        data = {"data": {"dataset": f"{folder}/{graphs}", "normalize": "none"}, "train": {"epochs": 1, "batch_size": 8}}
        config = parse_config(STEPS[name] | data | {"cuda_graphs": graphs}).variants[""]
        counted[name] = phases(build(config, get_backend("cupy")))
    return counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*STEPS], metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="show what is launched most, part by part")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counted, captured = (measure(folder, given.names, graphs) for graphs in (False, True))
    print("| step |", " | ".join(PHASES), "| all | waits | graphs | besides |\n|---" + "|---" * (len(PHASES) + 4) + "|")
    totals, failed = {}, False
    for name, parts in counted.items():
        total = sum(parts, Counter())
        totals[name], waits = launches(total), cpu_cuda.summary(total).get("waits", 0)
        numbers = [*map(launches, parts), totals[name], waits, *by_graphs(captured[name])]
        print("|", " | ".join([name, *map(str, numbers)]), "|")
        failed = failed or waits > WAITS.get(name, 0)
        for phase, part in zip(PHASES, parts, strict=True):
            for kernel, number in part.most_common(given.most):
                print(f"    {phase}: {number} {kernel}")
    for name, most in BUDGETS.items():
        if name == "ldrl" and {"ldrl", "ldrl, one iteration more"} <= set(totals):
            number, what = (totals["ldrl, one iteration more"] - totals["ldrl"]) / 5, "ldrl, an iteration by noise"
        elif name != "ldrl" and name in totals:
            number, what = totals[name], f"{name}, a step"
        else:
            continue
        print(f"{what}: {number:g} launches, at most {most} shall be")
        failed = failed or number > most
    sys.exit(failed)
