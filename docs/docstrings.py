"""Render docstrings as written for a terminal: symbols are not markup, and a module's docstring keeps its layout."""

import re
from types import GenericAlias
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"([*|]|(?<=\w)_(?!\w))")


def _plain(_app: Sphinx, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    if what == "module":
        lines[:] = ["::", "", *(f"    {line}" for line in lines), ""]
        return
    for n, line in enumerate(lines):
        parts = _CODE.split(line)
        lines[n] = "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)


def _skip(_app: Sphinx, _what: str, _name: str, value: Any, skip: bool, _options: Any) -> bool:
    """Leave out type aliases, which have no docstring of their own."""
    return skip or isinstance(value, GenericAlias) or hasattr(value, "__metadata__")


def setup(app: Sphinx) -> dict[str, bool]:
    """Change docstrings before Napoleon reads them."""
    app.connect("autodoc-process-docstring", _plain, priority=400)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
