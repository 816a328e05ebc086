"""Sphinx settings of the documentation; `make docs` builds it into out/docs, checks its examples and its links.

The pages are Markdown that reads on a repository's web page too. What is built here needs no network, not even to be
read: formulas become MathML, which browsers draw by themselves. Addresses outside are checked for their form alone
(`tests/test_docs.py`); whether they answer is asked by hand: `python -m sphinx -b linkcheck docs out/linkcheck`.
"""

from __future__ import annotations

import html.parser
import os
import re
import sys
import urllib.parse
from pathlib import Path

import sphinx.application
from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.errors import SphinxError
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
# the checkout, so that an old install is never documented
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


import rnngrad as rg  # noqa: E402

logger = logging.getLogger(__name__)

project = "rnngrad"
author = "the rnngrad authors"
copyright = "the rnngrad authors; Apache-2.0"
version = release = rg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
html_theme = "furo"
html_title = f"rnngrad {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_dark_style = "github-dark"
smartquotes = False  # φ' is a derivative

# --- Markdown --------------------------------------------------------------------------------------------------------

# ```math and $…$ are what repositories' web pages draw as well
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# --- the reference ---------------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "undoc-members": False, "member-order": "bysource"}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A missing name in a docstring's :func:`…` is an error. Annotations are left as they are written: shapes are strings,
# and jaxtyping's and jax's names have no page here.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!rnngrad\b|rg\b).*"),
    # types that signatures name but nobody imports have no entry on the page of public names
    (r"py:class", r"rnngrad\.(types|jacobians|init_report|diagnose\.result)\.\w+"),
    (r"py:class", r"rnngrad\.(tasks|training|interop)\.\w+\.\w+"),
]
nitpick_ignore = [("py:mod", "rnngrad.orthonormal"), ("py:func", "rnngrad.lyapunov.lyapunov_spectrum")]

# --- examples --------------------------------------------------------------------------------------------------------

# Those of docstrings are run by the fast tests already; here only the pages'.
doctest_test_doctest_blocks = ""


def _examples_are_tested(app, doctree):
    """Hands every ```pycon block to the doctest builder."""
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") == "pycon":
            block["testnodetype"], block["groups"], block["options"] = "doctest", ["default"], {}


def _short_names(app, doctree):
    """Calls a jax.Array by the name that users import, not by where it is defined."""
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax." in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.", "")))


# --- formulas --------------------------------------------------------------------------------------------------------


def _mathml(translator, node, *, is_block):
    source = re.sub(r"\\dots(?![a-z])", r"\\ldots", node.astext())
    if is_block and "\\\\" in source and "\\begin" not in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    try:
        drawn = latex2mathml.tex2mathml(source, as_block=is_block)
    except MathError as error:
        raise SphinxError(f"{node.source}: no MathML for {source!r}: {error}") from error
    translator.body.append(f'<div class="math">{drawn}</div>' if is_block else drawn)
    raise nodes.SkipNode


def _inline(translator, node):
    _mathml(translator, node, is_block=False)


def _display(translator, node):
    _mathml(translator, node, is_block=True)


html_math_renderer = "mathml"

# --- text ------------------------------------------------------------------------------------------------------------


def _bring_files(app, docname, source):
    """Lets files of the repository that are no page come along with the site."""
    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)", r"[\1](path:\2)", source[0])


def _tidy(app, what, name, obj, options, lines):
    """Repairs two things that docstrings are not to blame for.

    |x| becomes ∣x∣, which looks the same: reStructuredText takes the first for the name of a substitution. A field of a
    NamedTuple without a docstring gets Python's "Alias for field number 0", which says nothing.
    """
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = []
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", "∣") for line in lines]


# --- links -----------------------------------------------------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    """Anchors of a page and what it points to."""

    def __init__(self):
        super().__init__()
        self.anchors, self.targets = {""}, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.targets += [attrs[key] for key in ("href", "src") if attrs.get(key)]


def broken_links(folder: str | Path) -> list[str]:
    """Returns every link between the pages of a built site that leads nowhere, as 'page: target'."""
    pages = {}
    for file in sorted(Path(folder).rglob("*.html")):
        pages[file.resolve()] = page = _Page()
        page.feed(file.read_text(encoding="utf-8"))
    broken = []
    for file, page in pages.items():
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (file.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else file
            anchor = urllib.parse.unquote(parts.fragment)
            if not path.exists() or (path in pages and anchor not in pages[path].anchors):
                broken.append(f"{file.name}: {target}")
    return broken


def _links_are_checked(app, exception):
    if exception is None and app.builder.name == "html":
        for line in broken_links(app.outdir):
            logger.warning("link that leads nowhere: %s", line)


def setup(app: sphinx.application.Sphinx) -> dict[str, bool]:
    """Hooks the above in."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("source-read", _bring_files)
    app.connect("doctree-read", _examples_are_tested)
    app.connect("doctree-read", _short_names)
    app.connect("autodoc-process-docstring", _tidy)
    app.connect("build-finished", _links_are_checked)
    return {"parallel_read_safe": True}
