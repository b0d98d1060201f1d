"""Do all posteriors agree?  Laplace, importance sampling and Hamiltonian chains against emcee.

python benchmarks/posteriors.py --data FOLDER
python benchmarks/posteriors.py --learned 8 --out posteriors_learned.txt

Sérsic fits of 20 real galaxies (KiDS in r, as in left_out_pixels.py), every method with the same
priors; long runs of emcee are the reference.  Then the time of each on simulated 64 x 64 stamps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from left_out_pixels import kids  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    ImportanceFitter,
    LearnedGalaxy2D,
    MAPFitter,
    MCMCFitter,
    SersicGalaxy2D,
    fit_images,
)


def agreement(report: Report, folder: Path, count: int, steps: int) -> None:
    stamps = kids(folder)[:: max(1, len(kids(folder)) // count)][:count]
    data = np.array([s["data"] for s in stamps])
    options = {
        "uncertainty": np.array([np.full(data.shape[1:], s["noise"]) for s in stamps]),
        "mask": np.array([s["bad"] for s in stamps]),
        "psf": stamps[0]["psf"],
        "background": "constant",
    }
    fitters = {
        "emcee": MCMCFitter(sampler="emcee", chains=48, draws=steps, blocks=1, n_samples=4000),
        "MAPFitter": MAPFitter(),
        "ImportanceFitter": ImportanceFitter(rng=1, n_samples=4000),
        "MCMCFitter": MCMCFitter(rng=1, n_samples=2000),
    }
    found = {}
    for name, fitter in fitters.items():
        began = time.perf_counter()
        result = fit_images(data, SersicGalaxy2D(), fitter, **options)
        report(f"  {name}: {(time.perf_counter() - began) / len(data):.2f} s a galaxy")
        found[name] = result.posterior
        if name == "emcee":
            rhat = result.extra["rhat"]
            good = rhat < 1.1
            report(
                f"    R-hat < 1.1 for {good.sum()} of {len(good)} (median {np.median(rhat):.3f}), "
                f"effective draws {np.median(result.extra['ess']):.0f} (median)"
            )
    snr = found["emcee"].mean[:, 0] / found["emcee"].std[:, 0]
    report(
        f"\n  the {good.sum()} galaxies for which emcee has converged; flux / error from "
        f"{snr[good].min():.0f} to {snr[good].max():.0f}"
    )
    names = found["emcee"].param_names
    report(f"\n  {'':20s} " + " ".join(f"{n[:10]:>10s}" for n in names))
    reference = found["emcee"]
    for name in list(fitters)[1:]:
        shift = (np.abs(found[name].mean - reference.mean) / reference.std)[good]
        ratio = (found[name].std / reference.std)[good]
        for label, values in {
            "mean, median shift": np.median(shift, 0),
            "mean, 90 % within": np.percentile(shift, 90, axis=0),
            "std, median ratio": np.median(ratio, 0),
            "std, 10 %": np.percentile(ratio, 10, axis=0),
            "std, 90 %": np.percentile(ratio, 90, axis=0),
        }.items():
            report(f"  {name[:10]:10s} {label:20s}" + " ".join(f"{v:10.2f}" for v in values))


def speed(report: Report, count: int) -> None:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:25, :25] - 12
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.5**2))
    params = np.column_stack(
        [
            np.ones(count),
            31.5 + rng.uniform(-0.5, 0.5, (count, 2)),
            2 * 4 ** rng.random(count),
            rng.uniform(0.7, 4, count),
            rng.uniform(0, 0.8, count),
            rng.uniform(-np.pi / 2, np.pi / 2, count),
        ]
    )
    clean = SersicGalaxy2D().render((64, 64), params=params, psf=psf)
    clean *= (100 / np.sqrt((clean**2).sum((1, 2))))[:, None, None]
    data = clean + rng.standard_normal(clean.shape)
    report(f"\n  Times, {count} simulated Sérsic galaxies of S/N 100 on 64 x 64 pixels, a batch")
    for name, fitter in {
        "MAPFitter": MAPFitter(),
        "ImportanceFitter, 1,000 draws": ImportanceFitter(rng=1, fallback=False),
        "MCMCFitter, R-hat < 1.01, ESS > 400": MCMCFitter(rng=1),
    }.items():
        began = time.perf_counter()
        result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=1.0, psf=psf)
        seconds = (time.perf_counter() - began) / count
        extra = ""
        if "khat" in result.extra:
            extra = f"k < 0.7: {np.mean(result.extra['khat'] < 0.7):.1%}, "
        if "ess" in result.extra:
            extra += f"effective draws {np.median(result.extra['ess']):.0f} (median)"
        report(f"    {name:38s} {seconds:7.3f} s a galaxy  {extra}")


def learned(report: Report, count: int, snrs: list[float], size: int) -> None:
    """Learned galaxies: weighted draws and chains, without priors but that of the latents."""
    y, x = np.mgrid[:25, :25] - 12
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.5**2))
    middle = 0.5 * (size - 1)
    model = LearnedGalaxy2D.from_pretrained(flux=3000, x_0=middle, y_0=middle, r_50=6)
    report(f"\n  Learned galaxies, {count} at each S/N on {size} x {size} pixels, a batch")
    for snr in snrs:
        drawn = model.render((size, size), params=model.sample(count, rng=2), psf=psf)
        drawn *= (snr / np.sqrt((drawn**2).sum((1, 2))))[:, None, None]
        data = drawn + np.random.default_rng(1).standard_normal(drawn.shape)
        for name, fitter in {
            "ImportanceFitter, 1,000 draws": ImportanceFitter(rng=1, fallback=False),
            "MCMCFitter, one block of 4 x 500": MCMCFitter(rng=1, blocks=1),
        }.items():
            began, busy = time.perf_counter(), time.process_time()
            result = fit_images(data, model, fitter, uncertainty=1.0, psf=psf)
            seconds = (time.perf_counter() - began) / count
            busy = (time.process_time() - busy) / count
            parts = [f"S/N {snr:<4g} {name:33s} {seconds:6.1f} s a galaxy, {busy:.1f} s of a core"]
            for key, digits in (("khat", 2), ("rhat", 3), ("ess", 0)):
                if key in result.extra:
                    values = np.sort(result.extra[key]).round(digits)
                    parts.append(f"{key} {values.tolist()}")
            report("    " + ", ".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="without, only learned galaxies")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--timed", type=int, default=96)
    parser.add_argument("--learned", type=int, default=8)
    parser.add_argument("--snr", type=float, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", default=RESULTS / "posteriors.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Posteriors: agreement and speed")
    report("")
    if args.data is not None:
        agreement(report, args.data, args.n, args.steps)
        speed(report, args.timed)
    learned(report, args.learned, args.snr, args.size)
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
