"""Convert the tutorial page to a notebook, by `python docs/notebook.py > tutorial.ipynb` or when the site is built.

The notebook runs in the root of a clone with arraytp installed: the cells that install it are tagged to be skipped.
"""

import re
import sys
from pathlib import Path

import jupytext
from docutils import nodes
from sphinx.application import Sphinx

PAGE = Path(__file__).parent / "tutorial.md"
_KERNEL = "---\njupyter:\n  kernelspec: {display_name: Python 3, language: python, name: python3}\n---\n\n"


def notebook() -> str:
    """Return the notebook's text."""
    made = jupytext.reads(_KERNEL + PAGE.read_text(encoding="utf-8"), fmt="md")
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!https?:|#)", "](docs/", cell.source)
        elif ".venv" in cell.source:
            cell.metadata["tags"] = ["skip-execution"]
        else:
            cell.source = re.sub(r"^%%sh\n", "%%bash -e\n", cell.source)
    return str(jupytext.writes(made, fmt="ipynb"))


def _link(app: Sphinx, tree: nodes.document) -> None:
    """Append a link to the notebook to the page's first paragraph."""
    if app.env.docname == PAGE.stem:
        link = nodes.reference("", "The same as a notebook.", refuri=f"{PAGE.stem}.ipynb")
        next(iter(tree.findall(nodes.paragraph))).extend([nodes.Text(" "), link])


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        (app.outdir / f"{PAGE.stem}.ipynb").write_text(notebook(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Put the notebook beside its page."""
    app.connect("doctree-read", _link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    sys.stdout.write(notebook())
