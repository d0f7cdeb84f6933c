"""Link every `arraytp.module.name` on a page to its source, which the site contains as one page per module.

A name that does not exist causes a warning, and so an error of `sphinx-build -W`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"arraytp(\.\w+)+")
FOLDER = "source"
logger = logging.getLogger(__name__)


def file_of(module: str) -> Path | None:
    """Return the file of a module or package, None if there is none."""
    place = ROOT.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def definitions(source: str) -> dict[str, int]:
    """Return the first line, counted from 1, of each definition of a module: "name", or "Class.name" within a class."""
    found: dict[str, int] = {}

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = min([node.lineno, *(part.lineno for part in node.decorator_list)])
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + target.id: node.lineno for target in targets if isinstance(target, ast.Name)})

    look(ast.parse(source).body, "")
    return found


def source_of(name: str) -> tuple[str, str]:
    """Return the module of a dotted name, and the name within it: "" for the module itself.

    Raises
    ------
    LookupError
        If this checkout defines nothing of that name.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module, attribute = ".".join(parts[:length]), ".".join(parts[length:])
        file = file_of(module)
        if file is not None:
            if attribute and attribute not in definitions(file.read_text(encoding="utf-8")):
                break
            return module, attribute
    raise LookupError(name)


class LinkNames(SphinxPostTransform):
    """Turns the literals of a page that name something in arraytp into links to its source."""

    default_priority = 50

    def run(self, **kwargs: Any) -> None:
        """Replace every such literal of the document."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            if not NAME.fullmatch(name) or isinstance(literal.parent, nodes.reference):
                continue
            try:
                module, attribute = source_of(name)
            except LookupError:
                logger.warning("there is no %s", name, location=literal)
                continue
            place = self.app.builder.get_relative_uri(self.env.docname, f"{FOLDER}/{module}")
            link = nodes.reference("", "", internal=True, refuri=f"{place}#{attribute}" if attribute else place)
            literal.replace_self(link)
            link += literal


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page per module of arraytp: its source, with an anchor at each definition."""
    for file in sorted((ROOT / "arraytp").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        source = file.read_text(encoding="utf-8")
        lines = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True)).splitlines()
        # The lexer drops empty lines at the start, but no module has any.
        for name, line in definitions(source).items():
            lines[line - 1] = f'<span id="{name}"></span>{lines[line - 1]}'
        code = "\n".join(lines)
        body = f'<h1>{module}</h1>\n<div class="highlight"><pre>{code}\n</pre></div>'
        yield f"{FOLDER}/{module}", {"title": module, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform and the pages."""
    app.add_post_transform(LinkNames)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
