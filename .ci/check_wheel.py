"""Check what is in a wheel: ``python .ci/check_wheel.py WHEEL``, in the checkout."""

import subprocess
import sys
import tempfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

IMPORT_ALONE = """
import importlib.metadata, sys
import galmorph
assert galmorph.__file__.startswith(sys.argv[1]), galmorph.__file__
assert "torch" not in sys.modules
print(galmorph.__version__)
"""


def check(condition, message):
    """Print ``message``, or stop with it."""
    if not condition:
        sys.exit(f"wheel: FAILED: {message}")
    print(f"wheel: {message}")


def main(path):
    """Compare the wheel with the checkout and import the package from it alone."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        entry_points = ConfigParser()
        entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())

    package = {
        file.as_posix()
        for file in Path("galmorph").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    missing = sorted(package - names)
    check(not missing, f"all {len(package)} files of the package are in it{missing or ''}")
    strangers = sorted(
        name for name in names if name.split("/")[0] not in {"galmorph", info} or "tests" in name
    )
    check(not strangers, f"nothing else is, no tests either{strangers or ''}")
    weights = {name for name in names if name.startswith("galmorph/pretrained/")}
    shipped = sorted(name for name in weights if name.endswith(".safetensors"))
    cards = [name.replace(".safetensors", ".rst") for name in shipped]
    check(
        "galmorph/pretrained/regier2015.safetensors" in shipped and weights >= set(cards),
        f"{len(shipped)} sets of weights are in it, each with its model card",
    )
    check(f"{info}/licenses/licenses/LICENSE.rst" in names, "the licence is in it")
    check(metadata["License-Expression"] == "BSD-3-Clause", "it is said to be BSD-3-Clause")
    check(metadata["Requires-Python"] == ">=3.11", "it asks for Python 3.11")
    check(
        entry_points["console_scripts"]["galmorph"] == "galmorph.cli:main"
        and entry_points["astropy.modeling"]["MAPFitter"] == "galmorph.fitting:MAPFitter",
        "the command and the astropy fitter are registered",
    )

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
        code = f"import sys; sys.path.insert(0, sys.argv[1])\n{IMPORT_ALONE}"
        version = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, folder],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        check(
            version.returncode == 0 and version.stdout.strip() == metadata["Version"],
            f"it imports alone, as version {metadata['Version']}{version.stderr}",
        )
    size = Path(path).stat().st_size / 1e6
    print(f"wheel: {Path(path).name}, {len(names)} files, {size:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
