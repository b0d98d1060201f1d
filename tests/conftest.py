"""What the tests share."""

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

try:
    from pytest_astropy_header.display import PYTEST_HEADER_MODULES, TESTED_VERSIONS
except ImportError:  # the header is a comfort, not a need
    PYTEST_HEADER_MODULES = TESTED_VERSIONS = None

mpl.use("Agg")

# The same examples at every run, and no clock: a slow machine is not a bug.
settings.register_profile(
    "galmorph",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("galmorph")


def pytest_configure(config):
    """List the versions that matter in the header of the report."""
    if PYTEST_HEADER_MODULES is None:
        return
    import galmorph

    config.option.astropy_header = True
    PYTEST_HEADER_MODULES.clear()
    for name in ("numpy", "scipy", "astropy", "photutils", "torch", "emcee", "matplotlib"):
        PYTEST_HEADER_MODULES[name] = name
    for name, module in {"scikit-image": "skimage", "dask": "dask", "galsim": "galsim"}.items():
        PYTEST_HEADER_MODULES[name] = module
    TESTED_VERSIONS["galmorph"] = galmorph.__version__


@pytest.fixture
def rng():
    """A random generator that starts from the same seed in every test."""
    return np.random.default_rng(20240229)
