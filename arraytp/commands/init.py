"""`arraytp init`: a commented config to start from."""

import shlex
from pathlib import Path

import click

from arraytp.errors import UserError

STARTER = Path(__file__).with_name("starter.yml")


@click.command(short_help="Write a commented config to start from.")
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Write a commented config to FILE, which must not exist yet: BP, FA and L-DRL on the embedded images."""
    if not file.name:
        raise UserError(f"{str(file)!r} is not a file's name; give one, such as config.yml")
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(STARTER.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{file}: exists already; give another name") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    click.echo(f"{file}: written; train it with: {shlex.join(['arraytp', 'run', str(file)])}")
