"""Settings of the documentation."""

from importlib.metadata import version as _version
from pathlib import Path

from sphinx_astropy.conf.v3 import *

project = "galmorph"
author = "The galmorph developers"
copyright = f"2026, {author}"
release = _version("galmorph")
version = ".".join(release.split(".")[:2])
html_title = f"galmorph {release}"

exclude_patterns = ["_build"]
nitpicky = False

# Links into the documentation of other packages need their inventories from the network. They are
# made where the documentation is published; everywhere else the build works offline.
if not on_rtd:
    intersphinx_mapping = {}

# Figures are made by the examples themselves (matplotlib's plot directive).
plot_formats = [("png", 100)]
plot_html_show_formats = False
plot_html_show_source_link = False


def _insert_results(app, docname, source):
    """Put the committed output of the benchmarks on the page that speaks of them."""
    if docname != "performance":
        return
    files = sorted(Path(app.srcdir, "..", "benchmarks", "results").glob("*.txt"))
    parts = [
        f"``{f.name}``\n{'-' * 40}\n\n.. literalinclude:: ../benchmarks/results/{f.name}\n"
        "   :language: none\n"
        for f in files
    ]
    found = "\n".join(parts) or "No results have been committed yet."
    source[0] = source[0].replace(".. insert-results-here", found)


def setup(app):
    """Register what is special to this documentation."""
    app.connect("source-read", _insert_results)
