"""The code that one reads is the code that runs: `arraytp run` executes every line of every algorithm in arraytp/rules.

If a rule were implemented a second time elsewhere, or had a branch that no setting reaches, some lines would never be
executed. Functions that are not part of an algorithm, or that a step does not call, are listed below.
"""

import ast
import inspect
import re
import sys
import threading
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
from ruamel.yaml import YAML

import arraytp.fast
from arraytp import cli
from arraytp.data.writer import Description, writing
from arraytp.rules import RULES

FOLDER = Path(inspect.getfile(RULES["bp"].options)).parent
SOURCES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")

# By file: functions that a step does not call, and why.
NOT_OF_A_STEP = {
    # Called by the benchmark, which counts operations.
    "bp.py": {"flops"},
    "fa.py": {"flops"},
    "dfa.py": {"flops", "direct_flops"},
    "weight_mirror.py": {"feedback_flops", "check"},
    "alignment.py": {"feedback_flops"},
    "kolen_pollack.py": {"check"},
    # Called by the plan before a run, for refusals and notes, or by the audit: the loss that `local_update` descends.
    "dtp.py": {"flops", "feedback_flops", "check", "local_loss"},
    "ldrl.py": {"feedback_flops", "check"},
    "ldrl_parallel.py": {"feedback_flops"},
    "drl.py": {"flops", "_q_flops", "feedback_flops", "check", "local_loss"},
    "ridge_tp.py": {"check"},
    "gnt.py": {"check", "check_jacobians", "flops"},
    # Also called by the audit: `crossings` counts units that a nudge takes across a kink.
    "gait_prop.py": {"flops", "check", "check_pseudo", "crossings"},
    # Its error is reached only at rates at which the iterations diverge.
    "collapse.py": {"check_converges"},
    # Called by the plan, by the benchmark, by a study, or on a device only.
    "feedback.py": {
        "_adam_rates",
        "check_feedback",
        "check_targets",
        "check_training",
        "refuse_auxiliary",
        "check_expected",
        "feedback_products",
        "only_block",
    },
    # Names for files; copies and updates for the audit and for studies.
    "protocol.py": {"Options.name", "State.copy", "Rule.name", "Rule.inverts", "Rule.propose"},
}
# Lines that these runs do not reach. The trace takes one target per block and asks for no more. Only a device has a
# kernel for all iterations, takes that form of the loss, and holds Adam's numbers. All numbers here are finite.
UNASKED = {
    ("feedback.py", "step_feedback", "sizes = [_adam_rates(descent, n, k, parameters[0])]"),
    ("gait_prop.py", "targets", "return"),
    ("drl.py", "least", "return np.full(J.shape, np.nan)"),
    ("collapse.py", "sgd_iterations", "v = velocity[0] if velocity else None"),
    (
        "collapse.py",
        "sgd_iterations",
        "kernels.collapse(omega, at.weight, v, c, b, optimizer.momentum, lr, iterations)",
    ),
    ("collapse.py", "sgd_iterations", "return"),
    ("ldrl.py", "expected_loss", "return ((omega * (a / 2) - theta * b) * omega).sum()"),
}

CONV = [
    {"type": "conv", "channels": 3, "kernel": 3, "padding": 1, "activation": "elu",
     "pool": {"kernel": 3, "stride": 2, "padding": 1}},
    {"type": "conv", "channels": 4, "kernel": 3, "padding": 1, "activation": "elu",
     "pool": {"kernel": 3, "stride": 2, "padding": 1}},
    {"type": "dense", "units": 5, "activation": "tanh"},
    {"type": "dense", "units": 3},
]  # fmt: skip
SQUARE = [
    {"type": "conv", "channels": 2, "kernel": 3, "stride": 2, "padding": "same", "activation": "leaky-relu"},
    {"type": "dense", "units": 6, "activation": "leaky-relu"},
    {"type": "dense", "units": 3},
]
SGD = {"name": "sgd", "lr": 1e-3, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 1e-3}
SOME = {"iterations": [2, 0, 1], "sigma": 0.1, "optimizer": SGD}
ALL = {"iterations": 3, "sigma": 0.1, "optimizer": SGD}
GAIT_PROP = {"name": "gait-prop", "eta": 1e-2}
STEPS = {
    "bp": {"name": "bp"},
    "fa": {"name": "fa"},
    "dfa": {"name": "dfa"},
    "sign-symmetry unit": {"name": "sign-symmetry"},
    "sign-symmetry batch": {"name": "sign-symmetry", "magnitude": "batch"},
    "kolen-pollack": {"name": "kolen-pollack"},
    "weight-mirror": {"name": "weight-mirror", "feedback": SOME},
    "alignment sa": {"name": "alignment", "feedback": SOME},
    "alignment ia": {"name": "alignment", "loss": "ia", "feedback": SOME},
    "gait-prop literal": GAIT_PROP,
    "gait-prop literal vanilla": {"name": "gait-prop", "normalise": False, "gamma": 0.1},
    "gait-prop literal not rescaled": GAIT_PROP | {"rescale_updates": False, "norm": "l2_squared"},
    "gait-prop difference": {"name": "gait-prop", "form": "difference"},
    "gait-prop difference vanilla": {"name": "gait-prop", "form": "difference", "normalise": False},
    "gait-prop difference not rescaled": {"name": "gait-prop", "form": "difference", "rescale_updates": False},
    "gait-prop pseudo": {"name": "gait-prop", "inverse": "pseudo"},
    "tp overwrite": {"name": "tp", "unpool": "overwrite", "feedback": SOME},
    "tp accumulate": {"name": "tp", "unpool": "accumulate", "feedback": SOME},
    "dtp overwrite": {"name": "dtp", "unpool": "overwrite", "feedback": SOME, "divide_by_beta": True},
    "dtp accumulate": {"name": "dtp", "unpool": "accumulate", "feedback": SOME, "feedback_init": "symmetric"},
    "ldrl overwrite": {"name": "ldrl", "unpool": "overwrite", "feedback": SOME},
    "ldrl accumulate": {"name": "ldrl", "unpool": "accumulate", "feedback": SOME},
    "ldrl output noise": {"name": "ldrl", "output_noise": "expected", "feedback": SOME},
    "ldrl expected": {"name": "ldrl", "expected": True, "feedback": ALL},
    "ldrl expected adam": {"name": "ldrl", "expected": True, "feedback": ALL | {"optimizer": ADAM}},
    "ldrl-parallel": {"name": "ldrl-parallel", "samples": 3, "feedback": SOME},
    "drl": {"name": "drl", "feedback": SOME},
    "drl control": {"name": "drl", "loss": "reconstruction", "feedback": SOME},
    "drl rhl": {"name": "drl", "hidden": 4, "feedback": SOME},
    "drl expected": {"name": "drl", "expected": True, "feedback": ALL | {"optimizer": ADAM}},
    "drl optimum": {"name": "drl", "expected": "optimum", "feedback": ALL},
    "gnt": {"name": "gnt"},
    "ridge-tp": {"name": "ridge-tp"},
    "ridge-tp linearised": {"name": "ridge-tp", "activation": "linearised"},
}
# Also traced, because a trace observes feedback training and asks GAIT-prop for its targets.
TRACED = ("gait-prop literal", "gait-prop difference", "gait-prop difference not rescaled", "ldrl overwrite",
          "ldrl expected")  # fmt: skip


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return, for each file of arraytp/rules, the lines executed by one step of every rule from the command line."""
    folder = tmp_path_factory.mktemp("lines")
    _pack(folder / "data")
    lines: dict[str, set[int]] = {path.name: set() for path in SOURCES}
    names = {str(path): path.name for path in SOURCES}

    def of_frame(frame, event, argument):
        name = names.get(frame.f_code.co_filename)
        if name is None:
            return None
        seen = lines[name]

        def of_line(frame, event, argument):
            if event == "line":
                seen.add(frame.f_lineno)
            return of_line

        seen.add(frame.f_lineno)
        return of_line

    patch = pytest.MonkeyPatch()
    # Drawing the figures would take a second.
    patch.setattr("arraytp.commands.run.write_figures", lambda *_: None)
    former = sys.gettrace()
    # The threads that share a step's work start below, and must be traced too.
    threading.settrace(of_frame)
    sys.settrace(of_frame)
    try:
        for number, (name, rule) in enumerate(STEPS.items()):
            path = folder / f"{number}.yml"
            _write(path, folder, rule)
            assert cli.main(["run", str(path), "--out", str(folder / f"run-{number}"), "--quiet"]) == 0
            if name in TRACED:
                assert cli.main(["trace", str(path), "--out", str(folder / f"{number}.h5")]) == 0
    finally:
        sys.settrace(former)
        threading.settrace(None)
        patch.undo()
    return lines


def _pack(folder):
    generator = np.random.default_rng(1)
    with writing(folder, Description("tiny", (7, 6, 2), ("a", "b", "c"))) as writer:
        for split in ("train", "test"):
            images = generator.integers(0, 256, (8, 7, 6, 2), dtype=np.uint8)
            writer.add(split, images, generator.integers(0, 3, 8))


def _write(path, folder, rule):
    inverts = RULES[rule["name"]].inverts and rule.get("inverse") != "pseudo"
    tree = {
        "dtype": "float64",
        "data": {"dataset": str(folder / "data")},
        "network": {"blocks": SQUARE, "square": True, "init": "orthogonal"} if inverts else {"blocks": CONV},
        "rule": rule,
        "optimizer": {"name": "sgd", "lr": 1e-3},
        "train": {"epochs": 1, "steps": 1, "batch_size": 4},
    }
    YAML(typ="safe").dump(tree, path)


def functions_of(path: Path) -> dict[str, set[int]]:
    """Return, by qualified name, the lines of every function of a file, including those of nested functions."""
    source = path.read_text(encoding="utf-8")
    definitions = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    result: dict[str, set[int]] = {}

    def walk(code: CodeType, inside: str | None) -> None:
        for inner in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
            name = inside
            # Class bodies, which run at import, and top-level lambdas, which are fields of a rule, do not count.
            if inside is None and inner.co_flags & inspect.CO_OPTIMIZED and not inner.co_name.startswith("<"):
                name = inner.co_qualname
            if name is not None:
                lines = {line for *_, line in inner.co_lines() if line is not None}
                # The line of `def` belongs to the prologue, not to the body.
                result.setdefault(name, set()).update(
                    lines - {inner.co_firstlineno} - (definitions - lines_within(inner))
                )
            walk(inner, name)

    walk(compile(source, str(path), "exec"), None)
    return result


def lines_within(code: CodeType) -> set[int]:
    """Return the lines on which nested functions are defined: they are statements of the outer function."""
    return {inner.co_firstlineno for inner in code.co_consts if isinstance(inner, CodeType)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_line_of_every_algorithm_is_executed(executed, path):
    functions, excluded = functions_of(path), NOT_OF_A_STEP.get(path.name, set())
    assert excluded <= functions.keys(), "a function that is not there needs no exception"
    source = path.read_text(encoding="utf-8").splitlines()
    missed = {
        f"{path.name}:{line} {name}: {source[line - 1].strip()}"
        for name, lines in functions.items()
        if name not in excluded
        for line in lines - executed[path.name]
        if (path.name, name, source[line - 1].strip()) not in UNASKED
    }
    assert sorted(missed) == []


def test_the_steps_are_of_every_rule():
    assert {step["name"] for step in STEPS.values()} == set(RULES)


FAST = sorted(Path(next(iter(arraytp.fast.__path__))).glob("*.py"))


@pytest.mark.parametrize("path", FAST, ids=lambda path: path.name)
def test_nothing_of_the_fast_engine_knows_a_rule(path):
    """It neither imports nor names a rule: it speeds up the primitives, whatever a rule does with them."""
    source = path.read_text(encoding="utf-8")
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert not [name for name in imported if name and name.startswith("arraytp.rules")]
    names = "|".join(re.escape(name).replace(r"\-", "[-_ ]?") for name in RULES)
    assert re.findall(rf"\b(?:{names}|l-drl)\b", source, re.IGNORECASE) == []
