"""Sphinx configuration."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages

from agsurgery import __version__

project = "agsurgery"
author = "The agsurgery authors"
copyright = "2026, The agsurgery authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
exclude_patterns = ["_build", pages.RESULTS]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `name` for code
copybutton_exclude = ".linenos, .gp, .go"

pages.write(Path(__file__).parent)

_LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)]+)\)")


def links(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write links as Markdown does, which is easier to read in a terminal; Sphinx wants its own."""
    text = _LINK.sub(
        lambda found: f"`{' '.join(found[1].split())} <{found[2]}>`__", "\n".join(lines)
    )
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", links, priority=400)  # before napoleon
