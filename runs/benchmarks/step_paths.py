"""Count the code that one training step runs through, per rule: files, functions and lines of the package.

    python runs/benchmarks/step_paths.py                     # a Markdown table, for the fast and the plain engine
    python runs/benchmarks/step_paths.py --functions ldrl    # the functions behind one row, longest first
    PYTHONPATH=OTHER python runs/benchmarks/step_paths.py    # of another checkout, older ones included

One step is the first `Experiment.step` on a small network and 8 random images, on one thread: forward pass, feedback
training (2 iterations per block), updates, optimiser, score. Building the experiment is left out. A line counts once,
however often it runs; docstrings, comments and signatures do not run. A function counts if its body is entered; lines
of lambdas and comprehensions count for their file only. The last column counts the lines of arraytp/rules that run.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# One thread, because code that helper threads run would not be traced.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

import arraytp
from arraytp.config import parse_config

PACKAGE = Path(arraytp.__file__).parent
if (PACKAGE / "experiment.py").exists():  # before the package had folders
    from arraytp.experiment import build  # type: ignore[import-not-found, unused-ignore]
else:
    from arraytp.training.build import build

DATA = {"data": {"dataset": "fashion-mnist-10k"}, "train": {"epochs": 1, "batch_size": 8}, "dtype": "float64"}
CONV = {"type": "conv", "channels": 4, "kernel": 5}
POOLED = {**CONV, "padding": 2, "activation": "elu", "pool": {"kernel": 3, "stride": 2, "padding": 1}}
STRIDED = {**CONV, "stride": 4, "activation": "leaky-relu"}
SAME = {**STRIDED, "kernel": 3, "stride": 1, "padding": "same"}
DENSE = {"type": "dense", "units": 12, "activation": "leaky-relu"}
LOGITS = {"type": "dense", "units": 10}
LENET = {"blocks": [POOLED, POOLED, {**DENSE, "activation": "elu"}, LOGITS]}
SQUARE = {"square": True, "init": "orthogonal", "blocks": [STRIDED, SAME, DENSE, LOGITS]}
FEEDBACK = {"iterations": 2, "sigma": 0.1}
BY_ADAM = {**FEEDBACK, "optimizer": {"name": "adam", "lr": 1e-3}}
RULES: dict[str, dict[str, Any]] = {
    "bp": {},
    "fa": {},
    "dfa": {},
    "gait-prop, literal": {"form": "literal"},
    "gait-prop, difference": {"form": "difference"},
    "tp": {"feedback": FEEDBACK},
    "dtp": {"feedback": FEEDBACK},
    "ldrl": {"feedback": FEEDBACK},
    "ldrl, expected": {"feedback": FEEDBACK, "expected": True},
    "ldrl-parallel": {"feedback": FEEDBACK, "samples": 2},
    "drl": {"feedback": BY_ADAM},
    "drl, expected": {"feedback": BY_ADAM, "expected": True},
}
COLUMNS = ("rule", "fast: files", "functions", "lines", "plain: files", "functions", "lines", "rules/: lines")
Lines = set[tuple[CodeType, int]]


def step_lines(label: str, plain: bool) -> Lines:
    """Return the package's lines that one step of a rule runs."""
    name, lines, package = label.partition(",")[0], Lines(), str(PACKAGE) + os.sep
    square = name == "gait-prop"
    settings = {
        **DATA,
        "network": SQUARE if square else LENET,
        "rule": {"name": name, **RULES[label]},
        "optimizer": {"name": "adam", "lr": 1e-3, "orthogonality": 0.1 if square else 0},
    }
    (config,) = parse_config(settings).variants.values()
    experiment = build(config, plain=True) if plain else build(config)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.add((frame.f_code, frame.f_lineno))
        return trace if frame.f_code.co_filename.startswith(package) else None

    sys.settrace(trace)
    try:
        experiment.step(np.random.default_rng(0).standard_normal((8, 28, 28, 1)), np.arange(8))
    finally:
        sys.settrace(None)
    return lines


def functions(lines: Lines) -> Counter[str]:
    """Return how many lines of every function ran, by its location and name."""
    named = [code for code, _ in lines if not code.co_name.startswith("<")]
    return Counter(f"{Path(c.co_filename).relative_to(PACKAGE)}:{c.co_firstlineno} {c.co_name}" for c in named)


def counts(label: str, plain: bool) -> list[str]:
    """Return the numbers of files, functions, lines, and lines of rules; dashes for what the checkout does not know."""
    try:
        lines = step_lines(label, plain)
    except Exception as error:
        print(f"{label}, plain={plain}: {error}", file=sys.stderr)
        return ["–"] * 4
    places = {(Path(code.co_filename), line) for code, line in lines}
    in_rules = sum(file.parent.name == "rules" for file, _ in places)
    return [str(n) for n in (len({file for file, _ in places}), len(functions(lines)), len(places), in_rules)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", metavar="RULE", choices=RULES, help="list the functions that one rule runs")
    parser.add_argument("--plain", action="store_true", help="with --functions: of the plain engine")
    given = parser.parse_args()
    if given.functions:
        for place, run in functions(step_lines(given.functions, given.plain)).most_common():
            print(f"{run:4} {place}")
    else:
        print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|")
        for rule in RULES:
            *fast, in_rules = counts(rule, plain=False)
            print("|", " | ".join([rule, *fast, *counts(rule, plain=True)[:3], in_rules]), "|", flush=True)
