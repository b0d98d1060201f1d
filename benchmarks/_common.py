"""What every benchmark script shares: the header that says how a result was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("galmorph", "torch", "numpy", "scipy", "astropy", "photutils", "galsim")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def version(package: str) -> str:
    """Installed version of a distribution, or ``"not installed"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def header(title: str) -> str:
    """Title, date, command, machine and versions, as the first lines of a result."""
    arguments = shlex.join(_without_folder(a) for a in sys.argv[1:])
    lines = [
        title,
        "=" * len(title),
        f"date      {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
        f"command   python {Path(sys.argv[0]).name} {arguments}".rstrip(),
        f"commit    {_commit()}",
        f"machine   {_cpu()}, {os.cpu_count()} cores visible, {platform.system()}, "
        f"Python {platform.python_version()}",
        "versions  " + ", ".join(f"{p} {version(p)}" for p in PACKAGES),
        "",
    ]
    return "\n".join(lines)


def _without_folder(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


class Report:
    """Collects lines, echoing each, and writes them under the header.

    Parameters
    ----------
    title : str
        First line of the report.
    """

    def __init__(self, title: str):
        self.lines: list[str] = []
        self(header(title))

    def __call__(self, line: str = "") -> None:
        """Add a line (or several, separated by newlines)."""
        self.lines.append(line)
        print(line, flush=True)

    def write(self, path: str | Path | None) -> None:
        """Write the report; None writes nothing."""
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines).rstrip() + "\n")


def one_thread() -> None:
    """Hold every numerical library to one thread; call before importing them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
