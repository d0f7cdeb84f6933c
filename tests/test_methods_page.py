"""docs/methods.md names what exists, and every public operation is on it: a renamed or new function shows here."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import arraytp.ops

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(arraytp(?:\.\w+)+)`", PAGE)))
MODULES = [
    *(f"arraytp.ops.{module.name}" for module in pkgutil.iter_modules(arraytp.ops.__path__)),
    *(
        f"arraytp.rules.{name}"
        for name in ("bp", "fa", "dfa", "gait_prop", "tp", "dtp", "ldrl", "ldrl_parallel", "drl")
    ),
    "arraytp.feedback",
    "arraytp.fused_feedback",
    "arraytp.inverse",
    "arraytp.orthogonality",
    "arraytp.optim",
    "arraytp.compare",
    "arraytp.initialise",
]


def public_functions(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    return [
        f"{module_name}.{name}"
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module_name and not name.startswith("_")
    ]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_function_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_of_the_math_is_on_the_page(module: str) -> None:
    missing = [name for name in public_functions(module) if name not in NAMED]
    assert not missing
