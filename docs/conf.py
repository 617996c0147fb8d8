"""Sphinx settings; ``make docs`` builds the documentation into ``docs/_build/html``."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext import autosummary

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS / "_ext"), str(DOCS / "figures")]

project = "mtnrec"
author = "The mtnrec developers"
copyright = "The mtnrec developers, Apache-2.0"
version = release = version_of("mtnrec")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "generated",  # docs/_ext: generates pages and figures before Sphinx reads the others
    "mathml",
]
exclude_patterns = ["_build", "_generated", "figures", "images", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored without outputs; the tests run them

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False  # Lightning's hooks are described by Lightning
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autosummary_generate = False
autosummary.WELL_KNOWN_ABBREVIATIONS += ("eq.",)  # does not end a sentence
python_maximum_signature_line_length = 80
add_module_names = False

# The build is offline, without the inventories of other projects, so their names in signatures are
# not linked. Every mtnrec name that a text refers to must be on a page.
_FOREIGN = "abc collections lightning numpy npt omegaconf pandas pathlib polars torch torchmetrics"
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"{name}(\..*)?") for name in _FOREIGN.split()]
nitpick_ignore_regex += [("py:class", r"dict\[str")]  # napoleon splits the type of an attribute

html_theme = "furo"
html_title = "mtnrec"
html_static_path = ["_static"]
html_css_files = ["mtnrec.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"


def keep_first_line(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from reading the docstring of a property as ``type: text``."""
    if what == "property":
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    """Register :func:`keep_first_line`, to run before napoleon."""
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
