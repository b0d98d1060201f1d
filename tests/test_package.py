"""The package as a whole: what importing it costs, brings along and registers."""

import inspect
import os
import subprocess
import sys
from importlib.metadata import entry_points, metadata

import pytest
from packaging.version import Version

import galmorph

# `import astropy.modeling` imports every registered fitter, ours too: to see what it does
# alone, the entry points are hidden from it.
WITHOUT_PLUGINS = """
import importlib.metadata
real = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **kw: importlib.metadata.EntryPoints([])
import astropy.modeling.fitting
importlib.metadata.entry_points = real
"""


def run_python(code, *options):
    """Run ``code`` in a fresh interpreter and return what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import galmorph",
        "import astropy.modeling",
        "from astropy.modeling import fitting",
        "import photutils.psf",
        "import galmorph.fitting",
    ],
)
def test_import_orders(first):
    """Whatever is imported first, nothing warns and astropy knows the fitter."""
    run_python(
        f"{first}\n"
        "import galmorph\n"
        "from astropy.modeling import fitting\n"
        "assert fitting.MAPFitter is galmorph.MAPFitter\n",
        "-W",
        "error",
    )


@pytest.mark.parametrize("first", ["import galmorph", "import astropy.modeling"])
def test_import_stays_light(first):
    """Nobody pays for torch, matplotlib or photutils before using them."""
    code = f"{WITHOUT_PLUGINS}\nimport sys\nbefore = set(sys.modules)\n{first}\n"
    if first != "import galmorph":
        code = f"import sys\nbefore = set()\n{first}\n"
    out = run_python(code + "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    heavy = {"torch", "matplotlib", "photutils", "emcee", "dask", "skimage", "sklearn"}
    assert not heavy & set(out.split())


def test_import_brings_no_scipy():
    """Scipy is not imported either, unless astropy.modeling does so itself."""
    code = f"{WITHOUT_PLUGINS}\nimport sys\nbefore = 'scipy' in sys.modules\nimport galmorph\n"
    out = run_python(code + "print(before, 'scipy' in sys.modules)")
    before, after = out.split()
    assert before == after


def test_import_time():
    """``import galmorph`` costs at most 0.3 s beyond ``import astropy.modeling``."""
    code = (
        f"{WITHOUT_PLUGINS}\n"
        "import time\n"
        "start = time.process_time()\n"
        "import galmorph, galmorph.fitting\n"
        "print(time.process_time() - start)\n"
    )
    times = [float(run_python(code)) for _ in range(3)]
    assert min(times) < 0.3, times


def test_entry_points():
    for name in ("MAPFitter", "EncoderFitter"):
        (fitter,) = entry_points(group="astropy.modeling", name=name)
        assert fitter.value == f"galmorph.fitting:{name}"
        assert fitter.load() is getattr(galmorph, name)
    (script,) = entry_points(group="console_scripts", name="galmorph")
    assert script.value == "galmorph.cli:main"
    assert callable(script.load())


def test_metadata():
    assert Version(galmorph.__version__) > Version("0")
    assert metadata("galmorph")["License-Expression"] == "BSD-3-Clause"


@pytest.mark.parametrize("name", sorted(set(galmorph.__all__) - {"__version__"}))
def test_public_names(name):
    """Every public name exists and says what it is."""
    assert inspect.getdoc(getattr(galmorph, name))
