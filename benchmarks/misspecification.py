"""What happens when the model is wrong: is it seen, and do intervals still hold?

python benchmarks/misspecification.py --data FOLDER

Posterior predictive p-values of Sérsic fits to Sérsic galaxies (simulated) and to real galaxies
(KiDS in r, as in left_out_pixels.py), and fluxes of learned fits to galaxies that no network has
seen (bulge + disk), with and without the misfit that the network has learned of itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from learned_bias import bulge_disk, with_noise  # noqa: E402
from left_out_pixels import kids  # noqa: E402

from galmorph import PSF, LearnedGalaxy2D, MAPFitter, SersicGalaxy2D, fit_images  # noqa: E402
from galmorph.goodness import posterior_predictive  # noqa: E402
from galmorph.noise import LearnedNoise  # noqa: E402

STATISTICS = ("chi2", "moran")


def star(sigma: float = 1.3) -> PSF:
    y, x = np.mgrid[:31, :31] - 15
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


def p_values(report: Report, name: str, result) -> None:
    snr = result.params[:, 0] / result.stds[:, 0]
    for statistic in STATISTICS:
        p = posterior_predictive(result, draws=100, statistic=statistic, rng=1)
        for low, high in ((0, 30), (30, np.inf)):
            some = (snr >= low) & (snr < high) & np.isfinite(p)
            if some.sum() > 5:
                report(
                    f"  {name:24s} {statistic:6s} flux / error {low:>3} to {high:<4}: p < 0.01 for "
                    f"{np.mean(p[some] <= 0.01):6.1%} of {some.sum()}"
                )


def seen(report: Report, folder: Path, count: int, rng) -> None:
    psf = star()
    params = np.column_stack(
        [
            np.ones(count),
            20 + rng.uniform(-0.5, 0.5, (count, 2)),
            2 * 3 ** rng.random(count),
            rng.uniform(0.7, 4, count),
            rng.uniform(0, 0.7, count),
            rng.uniform(-np.pi / 2, np.pi / 2, count),
        ]
    )
    clean = SersicGalaxy2D().render((41, 41), params=params, psf=psf)
    data, sigma = with_noise(clean, 20 * 10 ** rng.random(count), rng)
    result = fit_images(data, SersicGalaxy2D(), uncertainty=sigma, psf=psf)
    p_values(report, "Sérsic galaxies", result)
    stamps = kids(folder)
    data = np.array([s["data"] for s in stamps])
    result = fit_images(
        data,
        SersicGalaxy2D(),
        uncertainty=np.array([np.full(data.shape[1:], s["noise"]) for s in stamps]),
        mask=np.array([s["bad"] for s in stamps]),
        psf=stamps[0]["psf"],
        background="constant",
    )
    p_values(report, "real galaxies", result)


def held(report: Report, count: int, rng) -> None:
    psf = star()
    clean, truth = bulge_disk(count, rng, psf)
    data, sigma = with_noise(clean, np.exp(rng.uniform(np.log(60), np.log(300), count)), rng)
    report(f"\n  learned fits of {count} bulge + disk galaxies, S/N 60 to 300")
    for name, fitter in {
        "noise alone": MAPFitter(),
        "with the learned misfit": MAPFitter(noise=LearnedNoise()),
    }.items():
        result = fit_images(
            data, LearnedGalaxy2D.from_pretrained(), fitter, uncertainty=sigma, psf=psf
        )
        off = result.params[:, 0] - truth[:, 0]
        pull = off / result.stds[:, 0]
        report(
            f"    {name:24s} flux: median bias {np.median(off / truth[:, 0]):+.3f}, 68 % intervals "
            f"hold {np.mean(np.abs(pull) < 1):.1%} +- {np.sqrt(0.22 / count):.1%}, beyond 3 sigma "
            f"{np.mean(np.abs(pull) > 3):.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "misspecification.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Models that are wrong")
    report("")
    rng = np.random.default_rng(args.seed)
    seen(report, args.data, args.n, rng)
    held(report, args.n, rng)
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
