"""One-line mistakes, made in a copy of the package to test the tests and `arraytp audit`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """A mistake: `old` occurs once in arraytp/`file` and becomes `new`; `by` says what must notice it."""

    file: str
    old: str
    new: str
    by: tuple[str, ...]


def name_of(mutation: Mutation) -> str:
    return f"{mutation.file}: {mutation.old.strip()} -> {mutation.new.strip()}"


def occurrences(mutation: Mutation) -> int:
    """Return how often `old` occurs in the file; unless it is once, the mutation must be adapted to the code."""
    return (ROOT / "arraytp" / mutation.file).read_text(encoding="utf-8").count(mutation.old)


def package(folder: Path) -> Path:
    """Copy the package into a folder, with compiled files, which stay valid because copies keep modification times."""
    shutil.copytree(ROOT / "arraytp", folder / "arraytp")
    return folder


@contextmanager
def made(folder: Path, mutation: Mutation) -> Iterator[None]:
    """Make a mistake in a copy of the package, and undo it on exit."""
    file = folder / "arraytp" / mutation.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(whole, encoding="utf-8")
