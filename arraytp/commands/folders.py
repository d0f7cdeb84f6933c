"""Result folders named on the command line."""

from pathlib import Path

import click

from arraytp.errors import UserError


def check_folder(_context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Return the folder that an option or argument names, as click's callback; UserError for a blank name."""
    if value is None:
        return None
    name = "DIR" if isinstance(parameter, click.Argument) else parameter.opts[0]
    if not value.strip():
        raise UserError(f"{name} is empty; give a folder{'' if parameter.required else ', or leave it out'}")
    return Path(value)


def check_folders(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders of an argument that takes several; as `check_folder`."""
    return tuple(path for value in values if (path := check_folder(context, parameter, value)) is not None)
