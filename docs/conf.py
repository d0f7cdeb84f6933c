"""Configuration of the site, which is built by `sphinx-build -W docs build/site` and can be read without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "arraytp"
html_title = "arraytp"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "docstrings",
    "mathml",
    "notebook",
    "source_links",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
nitpicky = True
# Types in docstrings are prose, such as "array of shape (B, H, W, C)".
nitpick_ignore_regex = [("py:.*", ".*")]
# Several classes have an attribute such as `path`; a docstring means the one of its own class.
suppress_warnings = ["ref.python"]
templates_path = ["_templates"]
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
# The rows of a formula end in \cr: Sphinx wraps formulas with \\ in an environment that does not allow \tag.
myst_enable_extensions = ["dollarmath"]
# As deep as GitHub's, so that a link to a heading works in both places.
myst_heading_anchors = 4
