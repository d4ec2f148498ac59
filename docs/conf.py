"""Sphinx's settings for the documentation site: `make docs` writes it to build/docs, and its pages open offline.

Warnings are errors there, so that a dead link or anchor fails the build. `generated.py` makes what the code knows best
(commands, parameters, strategies, exit codes), where a page says `<!-- generated: NAME -->`.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import generated

project = "al-pipeline"
release = version = version_of("al-pipeline")
copyright = "the al-pipeline authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
smartquotes = False  # a quote in an example is to be typed as it stands
highlight_language = "none"  # of blocks that name no language
default_role = "code"  # docstrings write `name` for code
autodoc_typehints_format = "short"

html_theme = "furo"  # its fonts are the system's, its scripts its own: nothing loads from the network
html_title = "al-pipeline"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_show_sphinx = False
html_copy_source = False


def setup(app: Sphinx) -> None:
    """Fill in the generated parts when a page is read."""
    app.connect("source-read", lambda _app, _page, source: source.__setitem__(0, generated.fill(source[0])))
