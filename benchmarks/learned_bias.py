"""Flux, size and centre of learned fits: are they unbiased, and do the intervals hold?

python benchmarks/learned_bias.py --data FOLDER

Three kinds of galaxies, each fitted by MAPFitter and by EncoderFitter, the simulated ones with a
constant background:
simulated Sérsic profiles; simulated bulges with disks; and galaxies of HST/ACS (COSMOS) observed
again with a wider PSF and more noise.  The true flux of these is the sum of the pixels, before
the noise was added, in an ellipse; the sum over the fitted image in the same ellipse is compared
with it.  Their sizes and centres are not known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from astropy.io import fits  # noqa: E402
from scipy.ndimage import binary_erosion  # noqa: E402
from scipy.signal import fftconvolve  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    BulgeDiskGalaxy2D,
    EncoderFitter,
    LearnedGalaxy2D,
    MAPFitter,
    SersicGalaxy2D,
    fit_images,
)

SIZE = 64
FITTERS = {"MAPFitter": MAPFitter, "EncoderFitter": EncoderFitter}


def gaussian(sigma: float, size: int = 31) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    psf = np.exp(-0.5 * (x**2 + y**2) / sigma**2)
    return psf / psf.sum()


def with_noise(clean: np.ndarray, snr: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    sigma = np.sqrt((clean**2).sum((1, 2))) / snr
    noise = sigma[:, None, None] * rng.standard_normal(clean.shape)
    return clean + noise, np.broadcast_to(sigma[:, None, None], clean.shape)


def sersic(count: int, rng, psf: PSF) -> tuple[np.ndarray, np.ndarray]:
    """Images, and flux, x_0, y_0 and half-light radius."""
    p = np.empty((count, 7))
    p[:, 0] = 100
    p[:, 1:3] = 31.5 + rng.uniform(-0.5, 0.5, (count, 2))
    p[:, 3] = np.exp(rng.uniform(np.log(2), np.log(8), count))
    p[:, 4] = rng.uniform(0.6, 4.5, count)
    p[:, 5] = rng.uniform(0, 0.75, count)
    p[:, 6] = rng.uniform(0, np.pi, count)
    return SersicGalaxy2D(psf=psf).render((SIZE, SIZE), params=p), p[:, :4]


def bulge_disk(count: int, rng, psf: PSF) -> tuple[np.ndarray, np.ndarray]:
    """The same; the half-light radius of a sum is not that of a part: NaN."""
    model = BulgeDiskGalaxy2D(psf=psf)
    p = np.empty((count, len(model.param_names)))
    at = {name: i for i, name in enumerate(model.param_names)}
    ellip = rng.uniform(0, 0.7, count)
    radius = np.exp(rng.uniform(np.log(3), np.log(8), count))
    angle = rng.uniform(0, np.pi, count)
    values = {
        "flux": np.full(count, 100.0),
        "x_0": 31.5 + rng.uniform(-0.5, 0.5, count),
        "y_0": 31.5 + rng.uniform(-0.5, 0.5, count),
        "bulge_fraction": rng.uniform(0.05, 0.7, count),
        "r_bulge": radius * rng.uniform(0.15, 0.5, count),
        "r_disk": radius,
        "n_bulge": rng.uniform(1.5, 4, count),
        "ellip_bulge": 0.5 * ellip,
        "ellip_disk": ellip,
        "theta_bulge": angle,
        "theta_disk": angle,
    }
    if set(values) != set(at):
        raise RuntimeError(f"the parameters are now {sorted(at)}")
    for name, value in values.items():
        p[:, at[name]] = value
    truth = np.column_stack([p[:, [at["flux"], at["x_0"], at["y_0"]]], np.full(count, np.nan)])
    return model.render((SIZE, SIZE), params=p), truth


def table(report: Report, truth: np.ndarray, found: np.ndarray, std: np.ndarray) -> None:
    """A line a quantity: bias, scatter, and how often the interval holds the truth."""
    for i, name in enumerate(("flux", "x_0", "y_0", "r_50")):
        if not np.isfinite(truth[:, i]).any():
            continue
        error = found[:, i] - truth[:, i]
        unit = truth[:, i] if name in ("flux", "r_50") else np.ones(len(error))
        relative = error / unit
        hold = np.mean(np.abs(error) < std[:, i])
        far = np.mean(np.abs(error) > 3 * std[:, i])
        report(
            f"    {name:5s} median bias {np.median(relative):+8.4f} +- "
            f"{1.2533 * relative.std() / np.sqrt(len(error)) if len(error) else 0:6.4f}, median "
            f"|error| {np.median(np.abs(relative)):7.4f}, 68 % intervals hold {hold:6.1%}, "
            f"beyond 3 sigma {far:5.1%}"
        )


def simulated(report: Report, name: str, make, count: int, rng) -> None:
    psf = PSF(gaussian(1.3))
    clean, truth = make(count, rng, psf)
    snr = np.exp(rng.uniform(np.log(20), np.log(300), count))
    data, sigma = with_noise(clean, snr, rng)
    for kind, fitter in FITTERS.items():
        result = fit_images(
            data,
            LearnedGalaxy2D.from_pretrained(),
            fitter(),
            uncertainty=sigma,
            psf=psf,
            background="constant",
        )
        report(f"\n  {name}, {kind}: {count} galaxies, S/N 20 to 300")
        table(report, truth, result.params[:, :4], result.stds[:, :4])
        for low, high in ((20, 60), (60, 300)):
            rows = (snr >= low) & (snr < high)
            pull = (result.params[rows, 0] - truth[rows, 0]) / result.stds[rows, 0]
            report(f"    S/N {low} to {high}: flux intervals hold {np.mean(np.abs(pull) < 1):.1%}")


def hst(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, PSFs and noise of the bright ones; NaN outside becomes the sky."""
    with fits.open(folder / "cosmos_hst.fits") as f:
        images, psfs = f["IMAGES"].data.astype(float), f["PSF"].data.astype(float)
        noise = f["CATALOG"].data["noise_rms"].astype(float)
    known = np.isfinite(images)
    square = np.nansum((images / noise[:, None, None]) ** 2, (1, 2)) - known.sum((1, 2))
    keep = (square > 27**2) & (known.mean((1, 2)) > 0.2)
    return images[keep], psfs[keep], noise[keep]


def apertures(images: np.ndarray, known: np.ndarray, noise: np.ndarray, psfs) -> np.ndarray:
    """Ellipses of two half-light radii of Sérsic fits to the images from HST."""
    result = fit_images(
        images,
        SersicGalaxy2D(),
        uncertainty=np.broadcast_to(noise[:, None, None], images.shape),
        mask=~known,
        psf=[PSF.from_any(p) for p in psfs],
    )
    y, x = np.mgrid[: images.shape[1], : images.shape[2]]
    _, x_0, y_0, r, _, ellip, theta = (result.params[:, i, None, None] for i in range(7))
    along = np.cos(theta) * (x - x_0) + np.sin(theta) * (y - y_0)
    across = np.cos(theta) * (y - y_0) - np.sin(theta) * (x - x_0)
    return np.hypot(along, across / (1 - ellip)) < np.maximum(2 * r, 4)


def observed_again(report: Report, folder: Path, repeats: int, rng) -> None:
    """HST galaxies through a Gaussian PSF of 4 pixels FWHM, with more noise."""
    images, psfs, noise = hst(folder)
    known = np.isfinite(images)
    images = np.where(known, images, 0.0)
    inside = apertures(images, known, noise, psfs)
    inside &= np.array([binary_erosion(k, iterations=4) for k in known])
    keep = inside.sum((1, 2)) > 30
    images, psfs, noise, known, inside = (a[keep] for a in (images, psfs, noise, known, inside))
    wider = gaussian(4.0 / 2.3548, 25)
    blurred = np.array([fftconvolve(i, wider, mode="same") for i in images])
    own = [PSF(fftconvolve(p, wider, mode="full")) for p in psfs]
    rows = np.tile(np.arange(len(images)), repeats)
    clean = blurred[rows]
    snr = np.exp(rng.uniform(np.log(10), np.log(60), len(rows)))
    sigma = np.maximum(np.sqrt((clean**2).sum((1, 2))) / snr, noise[rows])
    data = clean + sigma[:, None, None] * rng.standard_normal(clean.shape)
    # on the scale of a galaxy HST's own noise is still there
    total = np.hypot(sigma, noise[rows])
    # where the blur would have needed pixels beyond the stamp
    mask = np.array([~binary_erosion(k, iterations=4) for k in known])[rows]
    inside = inside[rows]
    true = np.where(inside, clean, 0).sum((1, 2))
    report(
        f"\n  HST galaxies observed again: {len(images)}, {repeats} times, S/N up to 60; flux in "
        "the ellipse of two half-light radii"
    )
    for kind, (model, fitter) in {
        "LearnedGalaxy2D, MAPFitter": (LearnedGalaxy2D.from_pretrained(), MAPFitter()),
        "LearnedGalaxy2D, EncoderFitter": (LearnedGalaxy2D.from_pretrained(), EncoderFitter()),
        "SersicGalaxy2D, MAPFitter": (SersicGalaxy2D(), MAPFitter()),
    }.items():
        result = fit_images(
            data,
            model,
            fitter,
            uncertainty=np.broadcast_to(total[:, None, None], data.shape),
            mask=mask,
            psf=[own[i] for i in rows],
            background="none",
        )
        found = np.where(inside, result.model_images, 0).sum((1, 2))
        # draws from the posterior, through the same ellipse
        draws = result.sample(24, rng=1)
        sums = np.empty((24, len(rows)))
        for k in range(24):
            drawn = model.render(data.shape[1:], params=draws[:, k], psf=[own[i] for i in rows])
            sums[k] = np.where(inside, drawn, 0).sum((1, 2))
        spread = 0.5 * np.diff(np.nanpercentile(sums, [16, 84], axis=0), axis=0)[0]
        pull = (found - true) / spread
        relative = found / true - 1
        report(
            f"    {kind:31s} median bias {np.median(relative):+7.4f} +- "
            f"{1.2533 * relative.std() / np.sqrt(len(relative)):6.4f}, median |error| "
            f"{np.median(np.abs(relative)):6.4f}, 68 % intervals hold "
            f"{np.mean(np.abs(pull) < 1):6.1%}, beyond 3 sigma {np.mean(np.abs(pull) > 3):5.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of cosmos_hst.fits")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "learned_bias.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Learned fits: bias and intervals")
    rng = np.random.default_rng(args.seed)
    simulated(report, "Sérsic", sersic, args.n, rng)
    simulated(report, "bulge + disk", bulge_disk, args.n, rng)
    if args.repeats:
        observed_again(report, args.data, args.repeats, rng)
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
