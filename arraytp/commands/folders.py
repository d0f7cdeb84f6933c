"""Result folders named on the command line: their names appear in tables and figures."""

from pathlib import Path

import click

from arraytp.config.document import encodable
from arraytp.errors import UserError


def check_folder(_context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Return the folder that an option or argument names, as click's callback.

    Raises
    ------
    UserError
        If the name is blank or not text; names the option.
    """
    if value is None:
        return None
    name = "DIR" if isinstance(parameter, click.Argument) else parameter.opts[0]
    if not value.strip():
        raise UserError(f"{name} is empty; give a folder, or leave it out")
    if not encodable(value):
        raise UserError(f"{name} {value!r}: is not UTF-8 text, which tables and figures could not show")
    return Path(value)


def check_folders(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders of an argument that takes several; as `check_folder`."""
    return tuple(path for value in values if (path := check_folder(context, parameter, value)) is not None)
