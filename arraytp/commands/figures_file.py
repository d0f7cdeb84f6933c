"""`--json FILE` of the commands that measure: what they print, for programs."""

import json
import os
from pathlib import Path
from typing import Any

from arraytp.disk import real
from arraytp.errors import UserError
from arraytp.files import check_output, json_safe, write_file


def check_json(path: Path, key: str) -> None:
    """Refuse a path that cannot be written, or that holds anything but figures, whose entries all have `key`."""
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
            # A pipe that nobody reads from is not waited for.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
                os.set_blocking(file.fileno(), True)
                file.write(content)
        else:
            write_file(real(path), content)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from error
