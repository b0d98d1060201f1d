"""Peak memory of fitting a memory-mapped cube of 100,000 stamps, above that after the import.

python benchmarks/memory.py --n 100000

The cube is made first, in a process of its own, by repeating simulated galaxies with fresh noise.
The resident set counts pages of the mapped file too, which the kernel may take back at any time,
so the anonymous memory (RssAnon) is given beside it where the system tells it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402

SOURCES = 200
CHUNK = 1000


def make_cube(path: Path, sigma_path: Path, n: int, seed: int, cache: str) -> None:
    """Write (n, 64, 64) float32 stamps and (n,) sigma."""
    from simulate import sersic_set

    made = sersic_set(min(SOURCES, n), seed, cache=cache)
    base, noise = made["noiseless"].astype(np.float32), made["sigma"].astype(np.float32)
    rng = np.random.default_rng(seed)
    cube = np.lib.format.open_memmap(path, "w+", np.float32, (n, *base.shape[1:]))
    which = np.arange(n) % len(base)
    for start in range(0, n, CHUNK):
        part = which[start : start + CHUNK]
        cube[start : start + CHUNK] = base[part] + noise[part, None, None] * rng.standard_normal(
            (len(part), *base.shape[1:]), dtype=np.float32
        )
    cube.flush()
    np.save(sigma_path, noise[which])
    np.save(sigma_path.with_name("psf.npy"), made["psf51"])


def _status(field: str) -> float:
    """A field of /proc/self/status in MB; NaN where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("nan")


class Watch:
    """Remembers the highest anonymous memory, asked for ten times a second."""

    def __enter__(self) -> Watch:
        self.peak = _status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, _status("RssAnon"))

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def _peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fit_cube(folder: Path, report: Report) -> None:
    """Fit the cube and report memory and time."""
    import galmorph

    cube = np.load(folder / "cube.npy", mmap_mode="r")
    sigma = np.load(folder / "sigma.npy")
    report(f"cube {cube.shape}, {cube.nbytes / 1e9:.2f} GB on disk, float32")
    # The import: of galmorph, and of torch, which the first fit brings with it.
    bare = _status("VmRSS")
    import galmorph.fitting
    import galmorph.rendering

    after_import, anon_import = _status("VmRSS"), _status("RssAnon")
    report(f"resident: {bare:.0f} MB after `import galmorph`, {after_import:.0f} MB with torch")
    start = time.perf_counter()
    with Watch() as watch:
        result = galmorph.fit_images(
            cube,
            galmorph.SersicGalaxy2D(),
            uncertainty=np.broadcast_to(sigma[:, None, None], cube.shape),
            psf=galmorph.PSF(np.load(folder / "psf.npy")),
        )
    wall = time.perf_counter() - start
    failed = int(np.count_nonzero(~np.isfinite(result.params).all(axis=1)))
    report(f"{len(result)} stamps in {wall:.0f} s ({1e3 * wall / len(result):.2f} ms each, wall)")
    report(f"failed: {failed}")
    report(f"peak resident set above the import: {_peak_rss() - after_import:.0f} MB (target 1000)")
    report(f"of it anonymous memory:             {watch.peak - anon_import:.0f} MB")
    results = sum(v.nbytes for v in vars(result).values() if isinstance(v, np.ndarray))
    report(f"of which the results themselves:    {results / 2**20:.0f} MB")


def main() -> None:
    """Make the cube in a child, fit it here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", default="default", help="folder of the simulated sets")
    parser.add_argument("--folder", default=None, help="where the cube goes (default: temporary)")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="default results/memory.txt; '-' for none")
    args = parser.parse_args()
    if args.make:
        folder = Path(args.make)
        make_cube(folder / "cube.npy", folder / "sigma.npy", args.n, args.seed, args.cache)
        return
    report = Report("Memory")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        child = [sys.executable, __file__, "--n", str(args.n), "--seed", str(args.seed)]
        subprocess.run(
            [*child, "--cache", args.cache, "--make", folder], check=True, env=dict(os.environ)
        )
        fit_cube(Path(folder), report)
    report.write(None if args.out == "-" else args.out or RESULTS / "memory.txt")


if __name__ == "__main__":
    main()
