"""The site: the pages of this folder, and a page for each module from its docstrings; see ``make docs``."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))  # the code beside these pages, whatever is installed

from lit_nn import __version__

project = "lit-nn"
release = __version__
html_title = f"{project} {release}"
html_theme = "furo"
html_show_copyright = False  # LICENSE has it
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False  # api/index and the search find everything
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
nb_execution_mode = "off"  # its output is in the file; a test runs it
myst_heading_anchors = 3  # the same as on a git server
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
# Types of other packages and aliases have no page here. Broken links of the pages themselves are warnings nevertheless.
nitpick_ignore_regex = [("py:.*", ".*")]


def lead_to_modules(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links of the pages to files of code lead to the modules' pages, and those to the README to the start."""
    text = re.sub(r"\(\.\./((?:lit_nn|data_modules)(?:/\w+)*)(?:\.py)?\)", _page_of, source[0])
    source[0] = text.replace("(../README.md)", "(index.md)")


def _page_of(link: re.Match[str]) -> str:
    return f"(api/{link[1].replace('/', '.').removesuffix('.__init__')}.rst)"


def write_as_rst(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring of this project, which is written for people who read the code."""
    for number, line in enumerate(lines):
        line = re.sub(r"(?<![`\w*])\*(?=\w)", r"\\*", line)  # *size is no emphasis
        line = re.sub(r"(?<!`)`([\w.]+)`(?!`)", r":py:obj:`\1`\\ ", line)  # `name`, `name`s
        if number and lines[number - 1] in ("Returns:", "Yields:"):
            line = re.sub(r"\S", r": \g<0>", line, count=1)  # what comes before a colon is no type: all have types
        lines[number] = line


def setup(app: Sphinx) -> None:
    """Hang the functions above into the building of the site."""
    app.connect("source-read", lead_to_modules)
    app.connect("autodoc-process-docstring", write_as_rst, priority=400)  # before napoleon
