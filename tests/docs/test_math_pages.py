"""docs/math names only what exists, and covers all public operations, rules, losses and equations of both papers."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import arraytp.ops
from arraytp.fast.feedback_training import Iterations
from arraytp.ops.activations import Activation
from arraytp.rules import RULES

FOLDER = Path(__file__).parents[2] / "docs" / "math"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
NAMED = sorted({name for page in PAGES.values() for name in re.findall(r"`(arraytp(?:\.\w+)+)`", page)})
MODULES = [
    *(f"arraytp.ops.{module.name}" for module in pkgutil.iter_modules(arraytp.ops.__path__)),
    *(rule.options.__module__ for rule in RULES.values()),
    "arraytp.model.feedback",
    "arraytp.fast.feedback_training",
    "arraytp.fast.modules",
    "arraytp.fast.factors",
    "arraytp.fast.inverse",
    "arraytp.optim",
    "arraytp.fast.orthogonality",
    "arraytp.training.compare",
    "arraytp.model.initialise",
]
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+)\$", re.DOTALL)
FORMULAS = [display or inline for page in PAGES.values() for display, inline in FORMULA.findall(page)]
# Commands that MathJax knows. It would draw a misspelt one as red text, which no build notices.
COMMANDS = re.findall(
    r"\w+",
    """
    alpha arccos begin beta cdot cdots circ cos cr dagger delta Delta dfrac dim dots end epsilon eta exp
    forall frac gamma hat in lambda langle lceil ldots le left leftarrow lfloor lim log lVert lvert mathbb
    mathcal mathrm max min mu odot omega operatorname overline partial pi prod qquad quad rangle rceil
    rfloor right rVert rvert sigma sim sqrt star sum tag text tfrac theta tilde times to top triangleq
    varepsilon
    """,
)


def public_functions(module_name: str) -> list[str]:
    """Return the names of a module's own public functions, of the activations, and of `Iterations`."""
    module = importlib.import_module(module_name)
    return [
        f"{module_name}.{name}"
        for name, value in inspect.getmembers(module)
        if (inspect.isfunction(value) and value.__module__ == module_name and not name.startswith("_"))
        or (isinstance(value, Activation) and module_name == Activation.__module__)
        or (value is Iterations and module_name == Iterations.__module__)
    ]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_function_exists(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_of_the_math_is_on_a_page(module: str) -> None:
    functions = public_functions(module)
    assert functions
    assert not [name for name in functions if name not in NAMED]


@pytest.mark.parametrize(("page", "first", "last"), [("gait-prop", 1, 5), ("dtp", 1, 11), ("ldrl", 12, 44)])
def test_a_page_has_every_equation_of_its_paper_in_order(page: str, first: int, last: int) -> None:
    assert [int(tag) for tag in re.findall(r"\\tag\{(\d+)\}", PAGES[page])] == list(range(first, last + 1))


@pytest.mark.parametrize("page", ["gait-prop", "dtp", "ldrl"])
def test_every_numbered_equation_is_followed_by_a_function_before_the_next_heading(page: str) -> None:
    sections = [part for part in re.split(r"^#+ ", PAGES[page], flags=re.MULTILINE) if r"\tag{" in part]
    without = {part.splitlines()[0] for part in sections if not re.search(r"`arraytp\.|same functions", part)}
    assert not without


def faults(formula: str) -> list[str]:
    """Return what is wrong with a formula."""
    found = [f"unknown \\{name}" for name in re.findall(r"\\([a-zA-Z]+)", formula) if name not in COMMANDS]
    found += ["braces"] * (formula.replace(r"\{", "").count("{") != formula.replace(r"\}", "").count("}"))
    found += ["left and right"] * (len(re.findall(r"\\left\b", formula)) != len(re.findall(r"\\right\b", formula)))
    found += ["environments"] * (re.findall(r"\\begin\{(\w+)", formula) != re.findall(r"\\end\{(\w+)", formula))
    # Sphinx puts formulas with \\ into an environment that takes no number, and GitHub drops one backslash.
    return found + ["\\\\ instead of \\cr"] * ("\\\\" in formula)


def test_every_formula_is_well_formed() -> None:
    assert len(FORMULAS) > 200
    assert {formula: faults(formula) for formula in FORMULAS if faults(formula)} == {}
