"""Settings of the documentation."""

from importlib.metadata import version as _version

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
