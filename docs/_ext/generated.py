"""Generate the configuration page, notebooks, measurements and figure before Sphinx reads pages.

The files go to ``docs/_generated`` and ``docs/notebooks``. Unchanged ones are not written, so that
a second build rereads nothing.
"""

import re
from pathlib import Path
from typing import Any

import mtn
from configuration import configuration_page
from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "_generated"
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)")  # a link to a file of the repository


def write(path: Path, text: str) -> None:
    """Write a file unless it already has this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def without_links(path: Path) -> str:
    """Return a Markdown file's text, its links to repository files reduced to their labels."""
    return _LINK.sub(r"\1", path.read_text(encoding="utf-8"))


def generate(app: Sphinx) -> None:
    """Write every generated file."""
    notebooks = {path.name: path for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    for name, path in notebooks.items():
        write(DOCS / "notebooks" / name, path.read_text(encoding="utf-8"))
    for old in DOCS.glob("notebooks/*.ipynb"):
        if old.name not in notebooks:
            old.unlink()
    write(GENERATED / "configuration.md", configuration_page(ROOT / "conf"))
    results = without_links(ROOT / "benchmarks" / "results.md")
    write(GENERATED / "measurements.md", results.removeprefix("# Results\n"))
    for theme in mtn.THEMES:
        write(GENERATED / f"mtn-{theme}.svg", mtn.draw_svg(theme))


def setup(app: Sphinx) -> dict[str, Any]:
    """Run :func:`generate` before Sphinx looks for pages."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
