"""Convert formulas to MathML when the site is built: browsers render it without a script, font or network."""

import html
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

_TAG = re.compile(r"\\tag\{(\d+)\}")
# A limit has its condition below it; latex2mathml writes the condition as a subscript.
_LIMIT = re.compile(r"<msub>(<mo>(?:lim|max|min)</mo>)(.*?)</msub>")


def mathml(formula: str, display: str) -> str:
    """Return a LaTeX formula as MathML; display is "inline" or "block"."""
    made = convert(_TAG.sub("", formula), display=display)
    # Only \left and \right ask for bars that stretch to the height of what they enclose.
    made = re.sub("<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>', made)
    return _LIMIT.sub(r"<munder>\1\2</munder>", made) if display == "block" else made


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    tag = _TAG.search(node.astext())
    number = f'<span class="formula-number">({html.escape(tag[1])})</span>' if tag else ""
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}{number}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
