"""The site: `sphinx-build -W docs build/site`. Formulas are drawn by MathJax, which the reader's browser fetches."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "arraytp"
html_title = "arraytp"
extensions = ["myst_parser", "sphinx.ext.mathjax", "source_links"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
nitpicky = True
# A formula's rows end in \cr: Sphinx wraps those with \\ in an environment that takes no \tag.
myst_enable_extensions = ["dollarmath"]
# As deep as GitHub's, so that a link to a heading works in both places.
myst_heading_anchors = 4
