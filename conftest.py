"""For all tests, those in docstrings and in the documentation included."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _close_figures():
    """Figures of one test are not to be counted in the next."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
