"""The scripts in runs/benchmarks import only what arraytp has; most are not run by any other test."""

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "runs" / "benchmarks").glob("*.py"))


def taken(script):
    """Yield module and name of what a script imports from arraytp, except under `if`, which depends on the checkout."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    chosen = {inner for node in ast.walk(tree) if isinstance(node, ast.If) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in chosen and (node.module or "").split(".")[0] == "arraytp":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(script):
    for module, name in taken(script):
        owner = importlib.import_module(module)
        assert hasattr(owner, name) or importlib.import_module(f"{module}.{name}")
