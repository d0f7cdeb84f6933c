"""The options by which every command that reads a config overrides it."""

from collections.abc import Callable, Sequence
from typing import Any

import click

Function = Callable[..., Any]
BACKEND = click.option("--backend", type=click.Choice(["numpy", "cupy"]), help="Array module; overrides the config.")
DTYPE = click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Number format; overrides the config.")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Override any key; repeatable.")


def overriding(function: Function) -> Function:
    """Add all of the options to a command, which takes `backend`, `dtype` and `overrides`."""
    return BACKEND(DTYPE(SET(function)))


def overriding_but_dtype(function: Function) -> Function:
    """Add the options to a command that chooses the number format itself; it takes `backend` and `overrides`."""
    return BACKEND(SET(function))


def settings(overrides: Sequence[str], backend: str | None, dtype: str | None = None) -> list[str]:
    """Return what the options say as `load_config` takes it."""
    collected = [*overrides]
    collected += [f"backend={backend}"] if backend else []
    collected += [f"dtype={dtype}"] if dtype else []
    return collected
