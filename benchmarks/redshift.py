"""Redshift as a condition: calibration, identity, smoothness, and whether it helps.

python benchmarks/redshift.py --data FOLDER --stamps STAMPS.npz --latents CACHE.npz

The galaxies are those that ``train_redshift.py`` held out, moved to other redshifts as it says
there, drawn as HST/ACS would see them in COSMOS (its PSFs, pixels and noise), and fitted; and
the 55 galaxies of HST with photometric redshifts, none of which was used for anything before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from astropy.io import fits as fits_io  # noqa: E402
from scipy.stats import kstest  # noqa: E402
from train_redshift import (  # noqa: E402
    FEATURES,
    REDSHIFTS,
    Shapes,
    fitted,
    population,
    training_set,
)

from galmorph import EncoderFitter, LearnedGalaxy2D, fit_images  # noqa: E402
from galmorph.conditional import (  # noqa: E402
    ConditionalPrior,
    RedshiftPosterior,
    interpolate,
    redshift_posterior,
)
from galmorph.psf import PSF  # noqa: E402
from galmorph.simulate import MockImages, observe, redshifted  # noqa: E402

PIXEL, ZERO_POINT, NOISE = 0.03, 25.94, 0.0026
SIDE = 80


def flat_in_ln(z: np.ndarray) -> np.ndarray:
    """The redshifts of `population`: uniform in ln(1 + z)."""
    return 1 / (1 + z)


def hst(folder: Path) -> dict[str, np.ndarray]:
    with fits_io.open(folder / "cosmos_hst.fits") as f:
        table = f["CATALOG"].data
        return {
            "images": f["IMAGES"].data.astype(float),
            "psf": f["PSF"].data.astype(float),
            "noise": table["noise_rms"].astype(float),
            "redshift": table["redshift"].astype(float),
            "magnitude": table["mag_F814W"].astype(float),
        }


def observed(made: dict, latents: np.ndarray, psfs: list[PSF], rng) -> MockImages:
    """Galaxies of a population with these latents, as HST would see them."""
    n = len(latents)
    params = np.empty((n, 5 + latents.shape[1]))
    params[:, 0] = 10 ** (-0.4 * (made["magnitude"] - ZERO_POINT))
    params[:, 1:3] = (SIDE - 1) / 2 + rng.uniform(-0.5, 0.5, (n, 2))
    params[:, 3] = made["r_50"] / PIXEL
    params[:, 4] = rng.uniform(0, 2 * np.pi, n)
    params[:, 5:] = latents
    chosen = [psfs[i] for i in rng.integers(len(psfs), size=n)]
    return observe(
        LearnedGalaxy2D.from_pretrained(),
        params=params,
        shape=(SIDE, SIDE),
        psf=chosen,
        noise=NOISE,
        rng=rng,
    )


def fit(mock: MockImages):
    return fit_images(
        mock.data, LearnedGalaxy2D.from_pretrained(), uncertainty=mock.uncertainty, psf=mock.psf
    )


def share(inside: np.ndarray) -> str:
    p = inside.mean()
    return f"{p:6.1%} +- {np.sqrt(max(p * (1 - p), 0.25 / inside.size) / inside.size):5.1%}"


def calibration(report: Report, posterior: RedshiftPosterior, z: np.ndarray) -> None:
    """PIT, coverage, and how much is learned."""
    pit = posterior.cdf(z)
    good = np.isfinite(pit) & (z >= posterior.grid[0]) & (z <= posterior.grid[-1])
    histogram = np.histogram(pit[good], 10, (0, 1))[0]
    report(f"    galaxies {good.sum()}, without a fit or beyond the grid {np.sum(~good)}")
    report("    PIT in ten bins: " + " ".join(f"{h:4d}" for h in histogram))
    test = kstest(pit[good], "uniform")
    report(
        f"    Kolmogorov-Smirnov distance from uniform {test.statistic:.3f} (p = {test.pvalue:.2g})"
    )
    low95, low68, middle, high68, high95 = posterior.quantile([0.025, 0.16, 0.5, 0.84, 0.975])
    for name, low, high in (("68 %", low68, high68), ("95 %", low95, high95)):
        report(f"    {name} intervals hold {share((z >= low)[good] & (z <= high)[good])}")
    prior = RedshiftPosterior(posterior.grid, np.log(flat_in_ln(posterior.grid)))
    gain = np.log(np.maximum(posterior.pdf(z), 1e-12))
    gain -= [np.log(max(prior.pdf(value)[0], 1e-12)) for value in z]
    width = np.median((high68 - low68)[good] / (1 + middle[good])) / 2
    report(
        f"    information ln p(z | image) / p(z) at the true z: {gain[good].mean():+.3f} +- "
        f"{gain[good].std() / np.sqrt(good.sum()):.3f} nats; median half-width of 68 % "
        f"intervals {width:.3f} (1 + z); median |error| "
        f"{np.median(np.abs(middle - z)[good] / (1 + z[good])):.3f} (1 + z)"
    )


def posterior_of(result, prior, **options) -> RedshiftPosterior:
    grid = np.expm1(np.linspace(*np.log1p(REDSHIFTS), 50))
    return redshift_posterior(
        result,
        prior,
        pixel_scale=PIXEL,
        grid=grid,
        redshift_prior=flat_in_ln,
        n=32,
        rng=3,
        **options,
    )


def on_simulations(report: Report, prior, shapes, psfs, n: int, rng) -> None:
    made = population(shapes, n, rng)
    result = fit(observed(made, shapes.draws[made["row"], 0], psfs, rng))
    snr = result.params[:, 0] / result.stds[:, 0]
    report(
        f"\nCalibration of p(redshift | image): {n} held-out galaxies of SDSS and KiDS at "
        f"{REDSHIFTS[0]} < z < {REDSHIFTS[1]}"
    )
    report(f"    S/N of the flux: {np.nanpercentile(snr, [5, 50, 95]).round(1).tolist()}")
    posterior = posterior_of(result, prior, zero_point=ZERO_POINT)
    calibration(report, posterior, made["redshift"])
    low, middle, high = posterior.quantile([0.16, 0.5, 0.84])
    inside = (made["redshift"] >= low) & (made["redshift"] <= high)
    for a, b in ((0.1, 0.8), (0.8, 1.4), (1.4, 4.2)):
        rows = (middle > a) & (middle < b)
        report(
            f"    of the {rows.sum()} with a median of {a} to {b}: 68 % intervals hold "
            f"{share(inside[rows])}"
        )


def on_hst(report: Report, prior, data: dict) -> None:
    known = np.isfinite(data["images"])
    result = fit_images(
        np.where(known, data["images"], 0.0),
        LearnedGalaxy2D.from_pretrained(),
        uncertainty=np.broadcast_to(data["noise"][:, None, None], known.shape),
        mask=~known,
        psf=[PSF(p) for p in data["psf"]],
    )
    report("\nThe 55 galaxies of HST with photometric redshifts (HST/ACS, COSMOS)")
    flux = np.where(result.params[:, 0] > 0, result.params[:, 0], np.nan)
    magnitude = ZERO_POINT - 2.5 * np.log10(flux)
    report(
        f"    fitted minus catalogued magnitude: median "
        f"{np.nanmedian(magnitude - data['magnitude']):+.2f}, "
        f"half of the 16 to 84 % range "
        f"{0.5 * np.diff(np.nanpercentile(magnitude - data['magnitude'], [16, 84]))[0]:.2f}"
    )
    posterior = posterior_of(result, prior, zero_point=ZERO_POINT)
    calibration(report, posterior, data["redshift"])
    radius = result.params[:, 3] * PIXEL
    inside = (data["magnitude"] > 19) & (data["magnitude"] < 26) & (radius > 0.05) & (radius < 0.5)
    report(f"\n  the {inside.sum()} of them that are in the range of the training")
    part = RedshiftPosterior(posterior.grid, np.log(posterior.density[inside] + 1e-300))
    calibration(report, part, data["redshift"][inside])


# -- identity ------------------------------------------------------------------------------


def distances(a: np.ndarray, b: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Of latents (N, d) and (M, d), in the nearest of the four equivalent orientations."""
    return np.min([np.linalg.norm(a[:, None] - s * b, axis=-1) for s in signs], 0)


def identity(report: Report, prior, stamps: Path, psfs, count: int, rng) -> None:
    with np.load(stamps) as file:
        rows = np.flatnonzero((file["source"] == "gz2") & (file["split"] != 0))
        rows = np.sort(rng.choice(rows, count, replace=False))
        image, weight = file["image"][rows].astype(float), file["weight"][rows]
        fwhm = file["psf_fwhm"][rows]
    from galmorph.detection import gaussian_psf

    model = LearnedGalaxy2D.from_pretrained()
    result = fit_images(
        image,
        model,
        EncoderFitter(),
        uncertainty=np.where(weight > 0, 1 / np.where(weight > 0, weight, 1), np.nan),
        mask=weight <= 0,
        psf=[gaussian_psf(float(np.round(f * 5) / 5)) for f in fwhm],
        background="constant",
    )
    # at z = 0.05, 16.5 mag and 4 arcsec each: neither is known of them
    zero_point = 16.5 + 2.5 * np.log10(result.params[:, 0])
    pixel = 4.0 / result.params[:, 3]
    signs = np.concatenate([np.ones((1, 32)), model.shape.vae.decoder.signs.numpy()])
    start = result.params[:, 5:]
    apart = distances(start, start, signs)
    other = np.median(apart[~np.eye(count, dtype=bool)])
    report(
        f"\nIdentity: {count} held-out galaxies of Galaxy Zoo 2 as the encoder sees them, put at "
        "z = 0.05 (16.5 mag, 4 arcsec), observed by HST at higher redshifts, and fitted"
    )
    report(f"    median distance of two galaxies in the latents: {other:.2f}")
    report("     z     mag   S/N   distance from itself / of two galaxies   nearest is itself")
    for z in (0.2, 0.4, 0.7, 1.0, 1.5):
        again = redshifted(
            result,
            z_in=0.05,
            z_out=z,
            pixel_scale_in=pixel,
            pixel_scale_out=PIXEL,
            psf_out=psfs[0],
            noise_out=NOISE,
            zero_point_in=zero_point,
            zero_point_out=ZERO_POINT,
            shape=(128, 128) if z < 0.3 else (96, 96),
            rng=rng,
        )
        refit = fit(again)
        far = distances(refit.params[:, 5:], start, signs)
        snr = refit.params[:, 0] / refit.stds[:, 0]
        magnitude = ZERO_POINT - 2.5 * np.log10(np.median(refit.params[:, 0]))
        itself = np.diag(far)
        among = np.median(far[~np.eye(count, dtype=bool)])
        report(
            f"    {z:4.1f}  {magnitude:5.1f}  {np.median(snr):5.0f}   {np.median(itself):5.2f} / "
            f"{among:5.2f} = {np.median(itself) / among:4.2f}"
            f"                    {share(far.argmin(1) == np.arange(count))}"
        )
    smoothness(report, prior, result, zero_point, pixel, other)


def smoothness(report: Report, prior, result, zero_point, pixel, other: float) -> None:
    grid = np.expm1(np.linspace(np.log(1.1), np.log(4.0), 40))
    paths, there = [], []
    for i in range(len(result)):
        params = interpolate(
            result[i],
            grid,
            z_in=0.1,
            pixel_scale_in=pixel[i] / 2,
            pixel_scale_out=PIXEL,
            shape=(64, 64),
            zero_point_in=zero_point[i] + 1.5,
            zero_point_out=ZERO_POINT,
            prior=prior,
        )
        paths.append(params[:, 5:])
        ends = {"redshift": grid[:1]}, {"redshift": grid[-1:]}
        one = np.r_[params[0, 5:], np.log(params[0, 3] * PIXEL), 22.0][None]
        there.append(prior.transport(prior.transport(one, *ends), *ends[::-1]) - one)
    paths = np.array(paths)
    steps = np.linalg.norm(np.diff(paths, axis=1), axis=-1)
    length, direct = steps.sum(1), np.linalg.norm(paths[:, -1] - paths[:, 0], axis=-1)
    report(
        f"\nInterpolation of these from z = 0.1 to 3 through the conditional prior "
        f"({len(grid)} steps; 18 mag and 2 arcsec at z = 0.1), in units of the median distance of "
        "two galaxies"
    )
    report(
        f"    length of the path: median {np.median(length) / other:.3f}, 95 % below "
        f"{np.percentile(length, 95) / other:.3f}; end to end {np.median(direct) / other:.3f}"
    )
    report(
        f"    largest single step: median {np.median(steps.max(1)) / other:.4f}, over all "
        f"galaxies {steps.max() / other:.4f}"
    )
    report(f"    there and back again: off by {np.abs(there).max():.1e} at most")


# -- does it help --------------------------------------------------------------------------


def conditioning(report: Report, train: Shapes, test: Shapes, n: int, epochs: int, rng) -> None:
    names = ["redshift", "magnitude", "ln_r_50"]
    sets = {}
    for kind, shapes, count in (("train", train, n), ("test", test, n // 4)):
        features, log_prior, _, made = training_set(shapes, count, rng)
        made["ln_r_50"] = np.log(made["r_50"])
        sets[kind] = features[..., :32], log_prior, {k: made[k] for k in names}
    prior = ConditionalPrior(FEATURES[:32], names)
    started = time.process_time()
    x, log_prior, c = sets["train"]
    prior.fit(x, c, log_prior=log_prior, at_once=6, epochs=epochs, drop=0.35, rng=rng)
    x, log_prior, c = sets["test"]

    def likelihood(conditions: dict) -> np.ndarray:
        values = prior.log_prob(x, {k: v[:, None] for k, v in conditions.items()}) - log_prior
        return np.logaddexp.reduce(values, 1) - np.log(values.shape[1])

    nothing = likelihood({})
    # galaxies are used several times: the error is that of the mean over different ones
    different = len(np.unique(x[:, 0, 0]))
    report(
        f"\nDoes conditioning help?  ln p(latents | condition) of {len(x)} held-out galaxies "
        f"({different} different shapes), less that without any condition ({nothing.mean():.2f}); "
        f"one network, conditions left out at random in training ({n} galaxies, {epochs} epochs, "
        f"{time.process_time() - started:.0f} s)"
    )
    shuffled = np.random.default_rng(1).permutation(len(x))
    cases = {
        "redshift": {"redshift": c["redshift"]},
        "redshift of another galaxy": {"redshift": c["redshift"][shuffled]},
        "magnitude": {"magnitude": c["magnitude"]},
        "redshift, magnitude": {k: c[k] for k in names[:2]},
        "redshift, magnitude, size": c,
        "all three of another galaxy": {k: v[shuffled] for k, v in c.items()},
    }
    for name, conditions in cases.items():
        gain = likelihood(conditions) - nothing
        report(f"    {name:28s} {gain.mean():+7.3f} +- {gain.std() / np.sqrt(different):.3f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of cosmos_hst.fits")
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--latents", type=Path, default=None)
    parser.add_argument("--prior", type=Path, default=None, help="default: the one installed")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--identity", type=int, default=40)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", default=RESULTS / "redshift.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Redshift as a condition")
    rng = np.random.default_rng(args.seed)
    prior = ConditionalPrior.read(args.prior) if args.prior else ConditionalPrior.from_pretrained()
    fits = [fitted(args.stamps, args.latents)]
    test = Shapes(fits, held_out=True, draws=24, rng=rng)
    report(f"\n{len(test.mean)} held-out galaxies ({len(test.early)} early)")
    data = hst(args.data)
    psfs = [PSF(p) for p in data["psf"][::7]]
    on_simulations(report, prior, test, psfs, args.n, rng)
    on_hst(report, prior, data)
    identity(report, prior, args.stamps, psfs, args.identity, rng)
    train = Shapes(fits, held_out=False, draws=24, rng=rng)
    conditioning(report, train, test, args.train, args.epochs, rng)
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
