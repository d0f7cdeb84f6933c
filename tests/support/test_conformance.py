"""The double admits no call that CuPy does not: its signatures against those of an installed CuPy, without a GPU."""

import importlib
import inspect

import numpy
import pytest
import strict_device
from strict_devicex.scipy import linalg as strict_linalg

cupy = pytest.importorskip(
    "cupy", reason="needs an installed CuPy: pip install 'arraytp[cuda12]'", exc_type=ImportError
)

PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Names that are not CuPy's: what the double is made of, and its counts.
OWN = {"Counter", "SimpleNamespace", "current_stream", "reads", "writes", "pinned"}


def functions(namespace):
    return {name: value for name, value in vars(namespace).items() if inspect.isfunction(value) and name[0] != "_"}


def pairs():
    """Return the double's functions and CuPy's, by name."""
    found = {}
    for name, own in functions(strict_device).items():
        found[name] = own, getattr(cupy, name)
    for name, own in functions(strict_device.ndarray).items():
        found[f"ndarray.{name}"] = own, getattr(cupy.ndarray, name)
    scipy_linalg, x = importlib.import_module("cupyx.scipy.linalg"), importlib.import_module("cupyx")
    for name, own in functions(strict_linalg).items():
        found[f"scipy.linalg.{name}"] = own, getattr(scipy_linalg, name)
    for name, own in vars(strict_device.linalg).items():
        found[f"linalg.{name}"] = own, getattr(cupy.linalg, name)
    strides = strict_device.lib.stride_tricks
    found["as_strided"] = strides.as_strided, cupy.lib.stride_tricks.as_strided
    found["empty_pinned"] = importlib.import_module("strict_devicex").empty_pinned, x.empty_pinned
    stream = strict_device.Stream
    found["Stream"] = stream, cupy.cuda.Stream
    found |= {f"Stream.{name}": (own, getattr(cupy.cuda.Stream, name)) for name, own in functions(stream).items()}
    return found


def signature(function):
    """Return a function's signature; that of a method compiled by Cython from the first line of its docstring."""
    try:
        return inspect.signature(function)
    except ValueError:
        head = function.__doc__.splitlines()[0].partition(" -> ")[0]
        namespace = {}
        exec(f"def f{head[head.index('(') :]}: ...", namespace)
        return inspect.signature(namespace["f"])


PAIRS = pairs()


@pytest.mark.parametrize("name", PAIRS)
def test_every_call_form_of_the_double_is_one_of_cupys(name):
    """By position with the same names in the same order, by keyword, and with the same defaults."""
    own, real = PAIRS[name]
    if isinstance(real, cupy.ufunc):
        assert set(inspect.signature(own).parameters) == {"operands", "out"}
        assert real.nin == getattr(numpy, name).nin
        return
    mine, theirs = signature(own).parameters, signature(real).parameters
    for position, parameter in enumerate(mine.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            kinds = [other.kind for other in theirs.values()]
            assert inspect.Parameter.VAR_POSITIONAL in kinds or kinds[position] is PLAIN
            continue
        assert parameter.name in theirs
        other = theirs[parameter.name]
        if parameter.kind is PLAIN:
            assert other.kind is PLAIN
            assert list(theirs)[position] == parameter.name
        if parameter.default is not inspect.Parameter.empty:
            assert other.default == parameter.default


def test_every_name_of_the_double_is_one_of_cupys():
    for name, value in vars(strict_device).items():
        if not (name.startswith("_") or inspect.ismodule(value) or name in OWN):
            assert hasattr(cupy, name) or hasattr(cupy.cuda, name), name
    for name in vars(strict_device.ndarray):
        if name != "_host":
            assert hasattr(cupy.ndarray, name), name
