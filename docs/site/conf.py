"""The documentation site: Sphinx over the Markdown pages of this repository (``make docs``).

The pages are those that GitHub shows. What Sphinx needs beside them is added while they are read: the navigation, from
the links of docs/index.md, and the tables of docs/configuration.md, from the schema.
"""

import pathlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]

import reference  # noqa: E402

import oapl_jax  # noqa: E402

project = "oapl_jax"
version = release = oapl_jax.__version__
author = copyright = "the oapl_jax authors"  # noqa: A001 - Sphinx's name
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/*/*.md",
    "launch/*.md",
    "benchmarks/*.md",
    "experiments/*.md",
    "configs/models/*.md",
]
exclude_patterns = [".*", "runs", "tests", "oapl_jax", "docs/_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"oapl_jax {release}"
html_copy_source = False
html_permalinks_icon = "#"

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing_lexer"]

autodoc_member_order = "bysource"
autodoc_default_options = {"undoc-members": True}
WITH_PARTS = ("module", "class", "exception", "function", "method")
"""What has docstrings in Google's style. Those of fields are sentences, of which napoleon would take ``Word: `` for a type."""

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\.md\)")


def add_what_is_made(app: Sphinx, name: str, source: list[str]) -> None:
    """Adds to a page what is made from elsewhere."""
    if name == root_doc:
        source[0] += navigation(source[0], app.env.found_docs)
    elif name == "docs/configuration":
        source[0] += "\n" + reference.markdown()


def navigation(index: str, names: set[str]) -> str:
    """A table of contents for each heading of the index, of its links; pages without a link come last."""
    _, *parts = HEADING.split(index)
    contents = {title: LINK.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    listed = {str(pathlib.PurePosixPath("/docs") / link) for links in contents.values() for link in links}
    listed = {str(pathlib.PurePosixPath(*resolve(name))) for name in listed}
    contents["More"] = [f"/{name}" for name in sorted(names - listed - {root_doc})]
    return "\n".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(links) + "\n```"
        for title, links in contents.items()
        if links
    )


def resolve(path: str) -> list[str]:
    """The parts of an absolute path, without ``..``."""
    parts: list[str] = []
    for part in path.strip("/").split("/"):
        parts = parts[:-1] if part == ".." else [*parts, part]
    return parts


def read_google_style(_: Sphinx, what: str, name: str, value: Any, __: Any, lines: list[str]) -> None:
    """Turns the parts of a docstring (Args, Raises, ...) into fields."""
    if what in WITH_PARTS:
        lines[:] = GoogleDocstring(lines, what=what, name=name, obj=value).lines()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_what_is_made)
    app.connect("autodoc-process-docstring", read_google_style)
