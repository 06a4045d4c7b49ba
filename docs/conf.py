"""Settings of the documentation's site, for Sphinx; `docs/build_site.py` calls it."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "moescale"
author = "moescale"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["**/__pycache__"]
# A page that no menu names is still built and found by the search.
suppress_warnings = ["toc.not_included"]

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
myst_enable_extensions = ["attrs_inline"]

autodoc_default_options = {"members": True, "member-order": "bysource", "undoc-members": False}
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "moescale"
html_copy_source = False
html_show_sourcelink = False

default_role = "literal"


_attributes: dict[str, list[str]] = {}


def keep_attribute(app, what, name, item, options, lines: list[str]) -> None:
    """Remember an attribute's docstring before napoleon takes what stands before a colon in it for a type."""
    if what == "attribute":
        _attributes[name] = list(lines)


def restore_attribute(app, what, name, item, options, lines: list[str]) -> None:
    """Put it back; the asterisks of patterns such as '*.py' stay, as in the command line's help."""
    if what == "attribute":
        lines[:] = [line.replace("*", r"\*") for line in _attributes.pop(name)]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", keep_attribute, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
