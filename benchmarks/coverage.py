"""Errors and intervals on thousands of simulated Sérsic galaxies, by S/N.

python benchmarks/coverage.py --n 4000

Galaxies as in sersic.py, but drawn by galmorph's renderer (rendering.py holds that against
GalSim), so that there can be enough of them: a share of 200 is known to 3 % only. The floor is
that of Cramér and Rao for the 7 parameters.
"""

from __future__ import annotations

import argparse

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from astropy.modeling.models import Moffat2D  # noqa: E402

from galmorph import PSF, FitFlag, SersicGalaxy2D, fit_images  # noqa: E402

SIZE = 64
NAMES = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
STAR = PSF.from_any(Moffat2D(1, 0, 0, 3 / (2 * np.sqrt(2 ** (1 / 3) - 1)), 3.0))


def draw_truth(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (count, 7) and total S/N (count,)."""
    truth = np.column_stack(
        [
            np.full(count, 1000.0),
            (SIZE - 1) / 2 + rng.uniform(-0.5, 0.5, (count, 2)),
            2 * 5 ** rng.random(count),
            rng.uniform(0.5, 6, count),
            1 - rng.uniform(0.2, 1, count),
            rng.uniform(-np.pi / 2, np.pi / 2, count),
        ]
    )
    return truth, 20 * 10 ** rng.random(count)


def simulate(model: SersicGalaxy2D, truth: np.ndarray, snr: np.ndarray, rng) -> tuple:
    """Images, their noise and the Cramér-Rao standard deviations."""
    y, x = np.mgrid[:SIZE, :SIZE]
    images = model.render((SIZE, SIZE), params=truth)
    sigma = np.sqrt((images**2).sum((1, 2))) / snr
    floor = np.empty_like(truth)
    for i, params in enumerate(truth):
        slopes = np.array([d.ravel() for d in model.fit_deriv(x, y, *params)]) / sigma[i]
        floor[i] = np.sqrt(np.diag(np.linalg.inv(slopes @ slopes.T)))
    return images + sigma[:, None, None] * rng.standard_normal(images.shape), sigma, floor


def run(count: int, seed: int) -> dict[str, np.ndarray]:
    """Simulate and fit ``count`` galaxies in parts of 500."""
    rng = np.random.default_rng(seed)
    model = SersicGalaxy2D(psf=STAR)
    parts = []
    for start in range(0, count, 500):
        truth, snr = draw_truth(rng, min(500, count - start))
        data, sigma, floor = simulate(model, truth, snr, rng)
        uncertainty = np.broadcast_to(sigma[:, None, None], data.shape)
        result = fit_images(data, model, uncertainty=uncertainty)
        error = result.params - truth
        error[:, 6] = np.remainder(error[:, 6] + np.pi / 2, np.pi) - np.pi / 2
        parts.append(
            {
                "truth": truth,
                "snr": snr,
                "floor": floor,
                "error": error,
                "pull": error / result.stds,
                "params": result.params,
                "flags": result.flags,
            }
        )
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def table(report: Report, made: dict, rows: np.ndarray, title: str) -> None:
    """One line a parameter."""
    report(f"{title}: {rows.sum()} galaxies")
    report("           err   (err*)   pull std    MAD    mean     68 %    95 %")
    for i, name in enumerate(NAMES):
        error, floor, pull = (made[k][rows, i] for k in ("error", "floor", "pull"))
        unit = np.ones(rows.sum())
        if name in ("flux", "r_eff", "n"):
            unit = made["truth"][rows, i]
        elif name == "ellip":
            unit = 1 - made["truth"][rows, i]
        err = np.median(np.abs(error) / unit) / np.median(0.6745 * floor / unit)
        own = np.median(np.abs(error) / floor) / 0.6745
        mad = 1.4826 * np.median(np.abs(pull - np.median(pull)))
        report(
            f"  {name:6s} {err:6.3f}  ({own:5.3f})   {pull.std():6.3f}  {mad:6.3f}  "
            f"{pull.mean():+6.3f}   {np.mean(np.abs(pull) < 1):6.3f}  "
            f"{np.mean(np.abs(pull) < 1.96):6.3f}"
        )
    report()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=4000, help="galaxies (default 4000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "coverage.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Errors, pulls and intervals of galmorph's Sérsic fits")
    made = run(args.n, args.seed)
    table(report, made, np.ones(args.n, dtype=bool), "all, S/N 20 to 200")
    for low, high in ((20, 40), (40, 80), (80, 200)):
        rows = (made["snr"] >= low) & (made["snr"] < high)
        table(report, made, rows, f"S/N {low} to {high}")
    ratio = made["params"][:, [0, 3]] / made["truth"][:, [0, 3]]
    astray = ~((ratio > 0.5) & (ratio < 2)).all(1)
    report(
        f"catastrophic (flux or r_eff wrong by more than a factor 2): {astray.sum()}, "
        f"{200 * astray.mean():.2f} in 200; median S/N of these "
        f"{np.median(made['snr'][astray]) if astray.any() else np.nan:.0f}"
    )
    counts = {f.name: int(((made["flags"] & f.value) > 0).sum()) for f in FitFlag}
    report("flags: " + ", ".join(f"{k} {v}" for k, v in counts.items() if v))
    report("\nerr, err*, pull, 68 %: as in sersic.txt")
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
