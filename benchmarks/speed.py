"""Time per galaxy, where it goes, 10,000 stamps, the GPU, and the import.

python benchmarks/speed.py

Stamps are those of simulate.py, tiled with fresh noise: 64x64, n 0.5-6, S/N 20-200, Sersic with an
effective PSF, no user guess. One thread throughout; CPU time is that of the process.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import resource
import statistics
import subprocess
import sys
import textwrap
import time

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from simulate import sersic_set  # noqa: E402

# Which of torch's operations belong to what, as regular expressions; the first that fits.
GROUPS = {
    "FFT": r"_?fft_.*",
    "linear algebra (small)": r"_?linalg_.*|.*cholesky.*|triangular_solve",
    "matrix products": r"mm|bmm|addmm|baddbmm|mv|dot|einsum|matmul|linear",
    "gathers and copies": r"index.*|gather|scatter.*|copy_|_?cat|stack|clone|take.*|roll|fill_"
    r"|zero_|_to_copy|.*pad.*|masked_.*|flip|repeat.*|nonzero",
    "exp, log, powers, trigonometry": r"(exp|exp2|log|log2|pow|sqrt|rsqrt|sin|cos|atan2?|polar"
    r"|sinc|erf|lgamma|digamma)_?",
    "sums and sorts": r"sum|mean|amax|amin|max|min|sort|cumsum|median|any|all|prod|norm",
    "element-wise": r"(mul|add|sub|rsub|div|clamp.*|where|neg|abs|lt|gt|le|ge|eq|ne|reciprocal"
    r"|square|addcmul|addcdiv|logical_.*|bitwise_.*|maximum|minimum|floor|round|lerp|complex"
    r"|real|imag|isfinite|remainder|sign|sgn)_?",
}


def group_of(operation: str) -> str:
    """Kind of a torch operation."""
    name = operation.removeprefix("aten::").lower()
    return next((g for g, p in GROUPS.items() if re.fullmatch(p, name)), "other operations")


def stamps(made: dict, n: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(n, 64, 64) float32 stamps and (n,) sigma: the set repeated with noise of its own."""
    rng = np.random.default_rng(seed)
    which = np.arange(n) % len(made["sigma"])
    sigma = made["sigma"][which]
    data = made["noiseless"][which].astype(np.float32)
    data += rng.standard_normal(data.shape, dtype=np.float32) * sigma[:, None, None]
    return data, sigma


def make_fit(made: dict, background: str):
    """A function (data, sigma, **fitter options) -> FitResult."""
    import galmorph

    psf = galmorph.PSF(made["psf51"])

    def fit(data, sigma, **options):
        batch_size = options.get("batch_size")
        return galmorph.fit_images(
            data,
            galmorph.SersicGalaxy2D(),
            galmorph.MAPFitter(**options),
            uncertainty=np.broadcast_to(sigma[:, None, None], data.shape),
            psf=psf,
            background=background,
            batch_size=batch_size,
        )

    return fit


def clocked(function, *args, **kwargs) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function(*args, **kwargs)
    return time.process_time() - cpu, time.perf_counter() - wall


def batches(report: Report, fit, data, sigma, repeats: int) -> None:
    """CPU time a galaxy by batch size; the median of some runs."""
    report(f"{'batch':>8s} {'CPU ms/galaxy':>14s} {'wall ms/galaxy':>15s}   ({len(data)} stamps)")
    for size in (1, 16, 64, 128, 256, None):
        part = slice(0, 64 if size == 1 else None)
        some = data[part], sigma[part]
        runs = [
            clocked(fit, *some, **({} if size is None else {"batch_size": size}))
            for _ in range(repeats)
        ]
        cpu, wall = (1e3 * statistics.median(r) / len(some[0]) for r in zip(*runs, strict=True))
        report(f"{size or 'default':>8} {cpu:14.2f} {wall:15.2f}")


def stages(report: Report, fit, data, sigma) -> None:
    """Where the time goes: galmorph's own functions, and kinds of torch operations."""
    profile = cProfile.Profile()
    profile.enable()
    fit(data, sigma)
    profile.disable()
    stats = pstats.Stats(profile)
    total = stats.total_tt
    rows = sorted(
        (
            (cumulative, calls, f"{path.split('galmorph/')[-1]}:{name}")
            for (path, _, name), (_, calls, _, cumulative, _) in stats.stats.items()
            if "/galmorph/" in path and "<" not in name
        ),
        reverse=True,
    )
    report(f"functions of galmorph, cumulative share of {1e3 * total / len(data):.2f} ms/galaxy")
    report("(with cProfile running; a function holds those that it calls)")
    for cumulative, calls, name in rows[:24]:
        report(f"  {cumulative / total:6.1%} {calls:7d} calls  {name}")
    report()

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as traced:
        _, wall = clocked(fit, data, sigma)
    events = {e.key: 1e-6 * e.self_cpu_time_total for e in traced.key_averages()}
    spent: dict[str, float] = {}
    for key, seconds in events.items():
        spent[group_of(key)] = spent.get(group_of(key), 0.0) + seconds
    spent["Python, numpy, the profiler"] = max(wall - sum(spent.values()), 0.0)
    report("kinds of torch operations, share of the time (torch.profiler, one thread)")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        report(f"  {seconds / sum(spent.values()):6.1%}  {name}")
    most = sorted(events.items(), key=lambda item: -item[1])[:14]
    single = ", ".join(f"{k.removeprefix('aten::')} {v / wall:.1%}" for k, v in most)
    report(textwrap.fill(f"single operations: {single}", 100, subsequent_indent="    "))


def import_times(report: Report, repeats: int = 7) -> None:
    """`import galmorph` beyond `import astropy.modeling`, in fresh interpreters."""

    def one(code: str) -> float:
        program = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        return float(subprocess.check_output([sys.executable, "-c", program]).split()[-1])

    both = "import astropy.modeling", "import astropy.modeling, galmorph"
    for code in both:
        one(code)
    # By turns, so that a busy machine slows both alike; the least is the least disturbed.
    times = [[one(code) for code in both] for _ in range(repeats)]
    base, ours = (min(column) for column in zip(*times, strict=True))
    names = ("torch", "matplotlib", "photutils", "scipy", "dask")
    code = (
        "import sys, astropy.modeling; before = set(sys.modules); import galmorph;"
        f"print([m for m in {names!r} if m in sys.modules and m not in before])"
    )
    heavy = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    report(
        f"import astropy.modeling {base:.3f} s, with galmorph {ours:.3f} s: {ours - base:+.3f} s"
    )
    report(f"(least of {repeats}); heavy modules that galmorph adds: {heavy}")


class _Traffic:
    """Counts the bytes that torch operations read and write."""

    def __init__(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        outer = self
        self.bytes = 0

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                # A view moves nothing.
                if not func.is_view:
                    flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
                    outer.bytes += sum(
                        t.numel() * t.element_size() for t in flat if torch.is_tensor(t)
                    )
                return out

        self.mode = Mode()


def gpu(report: Report, fit, data, sigma) -> None:
    """Galaxies a second on the GPU, and the share of its bandwidth."""
    import torch

    if not torch.cuda.is_available():
        report("GPU: none here")
        return
    report(f"GPU: {torch.cuda.get_device_name()}")

    def run():
        fit(data, sigma, device="cuda", batch_size=len(data))
        torch.cuda.synchronize()

    run()
    walls = [clocked(run)[1] for _ in range(3)]
    wall = statistics.median(walls)
    report(f"{len(data)} stamps in one batch: {wall:.2f} s, {len(data) / wall:.0f} galaxies/s")
    traffic = _Traffic()
    with traffic.mode:
        run()
    big = torch.empty(1 << 28, device="cuda")
    other = torch.empty_like(big)
    other.copy_(big)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        other.copy_(big)
    torch.cuda.synchronize()
    peak = 10 * 2 * big.numel() * big.element_size() / (time.perf_counter() - start)
    report(
        f"bytes read and written by its operations: {traffic.bytes / 1e9:.1f} GB, "
        f"{traffic.bytes / wall / 1e9:.0f} GB/s, {traffic.bytes / wall / peak:.1%} of a plain copy "
        f"({peak / 1e9:.0f} GB/s)"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000, help="stamps of the long run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--background", default="none", choices=("none", "constant", "tilted"))
    parser.add_argument("--cache", default="default", help="folder of the simulated sets")
    parser.add_argument("--out", default=None, help="default results/speed.txt; '-' for none")
    args = parser.parse_args()

    report = Report("Speed")
    import_times(report)
    report()
    import torch

    torch.set_num_threads(1)
    made = sersic_set(200, args.seed, cache=args.cache)
    fit = make_fit(made, args.background)
    data, sigma = stamps(made, args.n)
    few = data[:512], sigma[:512]
    report(f"Sersic, background={args.background}, PSF 51x51 at pixel steps, one thread")
    cpu, wall = clocked(fit, *few)
    report(f"first call of a process (imports, tables), 512 stamps: {wall:.2f} s")
    batches(report, fit, *few, args.repeats)
    report()
    stages(report, fit, *few)
    report()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = clocked(fit, data, sigma)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report(
        f"{args.n} stamps: {wall:.1f} s wall, {cpu:.1f} s CPU, {1e3 * cpu / args.n:.2f} ms of one "
        f"core a galaxy (peak memory {(after - before) / 1024:+.0f} MB)"
    )
    gpu(report, fit, data, sigma)
    report.write(None if args.out == "-" else args.out or RESULTS / "speed.txt")


if __name__ == "__main__":
    main()
