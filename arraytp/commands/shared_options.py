"""Options that several commands share: overrides of a config, folders, and `--json FILE` for the numbers they print."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from arraytp.disk import real
from arraytp.errors import UserError
from arraytp.files import check_output, json_safe, write_file

Function = Callable[..., Any]
BACKEND = click.option("--backend", type=click.Choice(["numpy", "cupy"]), help="Array module; overrides the config.")
DTYPE = click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Number format; overrides the config.")


def _one_variant(_context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]) -> str | None:
    """Return the variant named, if any; UserError if there are several, of which click would take the last."""
    if len(names) > 1:
        raise UserError(f"--variant: given {len(names)} times ({', '.join(names)}); give one, or none to take all")
    return names[0] if names else None


VARIANT = click.option("--variant", metavar="NAME", multiple=True, callback=_one_variant, help="Take only this variant "
                       "of the config.")  # fmt: skip
SET = click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Override any key; repeatable.")


def overriding(function: Function) -> Function:
    """Add all overriding options to a command, which takes `backend`, `dtype` and `overrides`."""
    return BACKEND(DTYPE(SET(function)))


def overriding_but_dtype(function: Function) -> Function:
    """Add the overriding options to a command that chooses the dtype itself; it takes `backend` and `overrides`."""
    return BACKEND(SET(function))


def settings(overrides: Sequence[str], backend: str | None, dtype: str | None = None) -> list[str]:
    """Return the options as overrides for `load_config`."""
    collected = [*overrides]
    collected += [f"backend={backend}"] if backend else []
    collected += [f"dtype={dtype}"] if dtype else []
    return collected


def check_folder(_context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Return the folder that an option or argument names, as a click callback; UserError if the name is blank."""
    if value is None:
        return None
    name = (parameter.metavar or "DIR").rstrip(".") if isinstance(parameter, click.Argument) else parameter.opts[0]
    if not value.strip():
        raise UserError(f"{name} is empty; give a folder{'' if parameter.required else ', or leave it out'}")
    return Path(value)


def check_folders(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders of an argument that takes several, each checked as in `check_folder`."""
    return tuple(path for value in values if (path := check_folder(context, parameter, value)) is not None)


def check_json(path: Path, key: str) -> None:
    """Refuse a path that cannot be written, or a file other than an earlier result, whose entries all have `key`."""
    wrong = "an earlier result of this command; only such are overwritten"
    check_output("--json", path, "figures.json", lambda: not path.is_file() or _holds_figures(path, key), wrong)


def _holds_figures(path: Path, key: str) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(isinstance(entry, dict) and key in entry for entry in content.values())


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write numbers to a file atomically, NaN and infinities as null; to a pipe or device directly."""
    content = (json.dumps(json_safe(figures), indent=2, ensure_ascii=False) + "\n").encode()
    try:
        if path.exists() and not path.is_file():
            # Does not block on a pipe that nobody reads.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
                os.set_blocking(file.fileno(), True)
                file.write(content)
        else:
            write_file(real(path), content)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from error
