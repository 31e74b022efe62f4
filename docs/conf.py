"""Sphinx: the site that `make docs` builds. Nothing here needs the network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from generators import cli, rooms  # noqa: E402

import snapengine  # noqa: E402

project = "snapengine"
author = "the snapengine authors"
project_copyright = author
version = release = snapengine.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generators"]
html_theme = "furo"
html_title = f"snapengine {release}"
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
default_role = "code"  # docstrings have names in single backquotes
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = True
napoleon_google_docstring = False

man_pages = [("reference/cli", "snapengine", "live snapshots of memory", author, 1)]

GENERATED = {"reference/cli": cli.render, "how/rooms": rooms.render}
"""Pages whose second half is made from the sources."""


def add_generated(app, docname, source):
    """Append what is generated to the page."""
    if docname in GENERATED:
        source[0] += "\n" + GENERATED[docname]()


def always_read(app, env, added, changed, removed):
    """Their sources are not only their files."""
    return list(GENERATED)


def setup(app):
    app.connect("source-read", add_generated)
    app.connect("env-get-outdated", always_read)
    return {"parallel_read_safe": True}
