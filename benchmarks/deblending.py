"""Blends of two galaxies: fluxes, images, shapes and intervals of scene fits.

python benchmarks/deblending.py --data FOLDER

Sets of blends, 64 x 64 pixels, one band, centres known to 0.2 pixel:

hst       galaxies of HST/ACS (COSMOS; those with S/N above 27), each blurred with a Gaussian of
          3 pixels FWHM beside HST's own PSF (both have that of the brighter one).
          The truth has no noise: it is the Sérsic fit to HST's image and that of the residual,
          within 2.5 half-light radii, which stands out of the noise by 3 sigma at any of three
          scales (starlets; Starck & Murtagh 1994, A&A 288, 342).  It has less structure than
          the galaxy, and none beyond that ellipse.
hst apart the same at distances of 0.5 to 5 radii, so that not nearly all sources are blended.
bulge+disk
          simulated by GalSim, through a Gaussian PSF of 3 pixels FWHM.

The primary has S/N 40 to 200, the other 1 to 1/5 of its flux (for HST: whatever it has), at a
distance of 0.5 to 2.5 times (but for ``hst apart``) the mean of both half-light radii.  Total
fluxes are compared.
Metrics as BlendingToolKit defines them: dF, relative error of the flux; SSIM with a range of
the truth's peak; cosine of model and truth; blendedness of the truth, 1 - <s, s> / <s, t>;
residual of the KSB ellipticity (GalSim's, of the images of model and truth).

For comparison two Sérsic profiles are fitted together with scipy's least_squares, without priors,
as one would without this package (but drawn by it, as exactly as they are here).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import galsim  # noqa: E402
import numpy as np  # noqa: E402
from learned_bias import gaussian, hst  # noqa: E402
from scipy.ndimage import convolve1d  # noqa: E402
from scipy.optimize import least_squares  # noqa: E402
from scipy.signal import fftconvolve  # noqa: E402
from skimage.metrics import structural_similarity  # noqa: E402

from galmorph import PSF, LearnedGalaxy2D, MAPFitter, SersicGalaxy2D, fit_images  # noqa: E402
from galmorph.deblending import deblend  # noqa: E402
from galmorph.noise import LearnedNoise  # noqa: E402

SIZE = 64
FWHM = 3.0
BLUR = gaussian(FWHM / 2.3548, 25)


@dataclass
class Blends:
    """Noiseless images (N, 2, ny, nx), total fluxes and centres of blends; noise and PSF."""

    truth: np.ndarray
    flux: np.ndarray
    centre: np.ndarray
    sigma: np.ndarray
    psfs: list[PSF]

    def __len__(self) -> int:
        return len(self.truth)


def _pairs(radius: np.ndarray, rng, farthest: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (N, 2) of the second from the first, and distance in mean radii (N,)."""
    units = rng.uniform(0.5, farthest, len(radius))
    angle = rng.uniform(0, 2 * np.pi, len(radius))
    distance = units * radius.mean(1)
    return distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), units


def bulge_disk(count: int, rng) -> tuple[Blends, np.ndarray]:
    """Blends of simulated galaxies."""
    psf = galsim.Gaussian(fwhm=FWHM)
    scale = np.exp(rng.uniform(np.log(2.5), np.log(6), (count, 2)))
    offset, units = _pairs(scale, rng)
    truth, centre = np.empty((count, 2, SIZE, SIZE)), np.empty((count, 2, 2))
    flux = np.stack([np.full(count, 100.0), 100 / np.exp(rng.uniform(0, np.log(5), count))], 1)
    for i in range(count):
        for k in range(2):
            angle = galsim.Angle(rng.uniform(0, np.pi), galsim.radians)
            share, q = rng.uniform(0.05, 0.6), rng.uniform(0.3, 1)
            bulge = galsim.DeVaucouleurs(half_light_radius=scale[i, k] * rng.uniform(0.2, 0.6))
            disk = galsim.Exponential(half_light_radius=scale[i, k]).shear(q=q, beta=angle)
            bulge = bulge.shear(q=0.5 * (1 + q), beta=angle)
            galaxy = flux[i, k] * (share * bulge + (1 - share) * disk)
            at = 31.5 + (k - 0.5) * offset[i] + rng.uniform(-0.5, 0.5, 2)
            stamp = galsim.Image(SIZE, SIZE, scale=1.0)
            galsim.Convolve(galaxy, psf).drawImage(stamp, offset=at - 31.5, method="no_pixel")
            truth[i, k], centre[i, k] = stamp.array, at
    snr = np.exp(rng.uniform(np.log(40), np.log(200), count))
    sigma = np.sqrt((truth[:, 0] ** 2).sum((1, 2))) / snr
    return Blends(truth, flux, centre, sigma, [PSF(gaussian(FWHM / 2.3548))] * count), units


def _inside(params: np.ndarray) -> np.ndarray:
    """Pixels within the ellipse of 2.5 half-light radii: beyond it are companions."""
    y, x = np.mgrid[:SIZE, :SIZE]
    _, x_0, y_0, r, _, ellip, theta = params
    along = np.cos(theta) * (x - x_0) + np.sin(theta) * (y - y_0)
    across = np.cos(theta) * (y - y_0) - np.sin(theta) * (x - x_0)
    return np.hypot(along, across / (1 - ellip)) < 2.5 * r


def denoised(residual: np.ndarray, sigma: float, known: np.ndarray) -> np.ndarray:
    """What of a residual stands out of the noise by 3 sigma at scales of 2, 4 and 8 pixels."""
    smooth, kept = np.where(known, residual, 0.0), np.zeros_like(residual)
    white = np.random.default_rng(0).standard_normal(residual.shape)
    for scale in (0, 1, 2, 3):
        kernel = np.zeros(4 * 2**scale + 1)
        kernel[:: 2**scale] = np.array([1, 4, 6, 4, 1]) / 16
        parts = [convolve1d(convolve1d(a, kernel, 0), kernel, 1) for a in (smooth, white)]
        detail, noise = smooth - parts[0], (white - parts[1]).std() * sigma
        if scale:  # single pixels are noise
            kept += np.where(np.abs(detail) > 3 * noise, detail, 0.0)
        smooth, white = parts
    return np.where(known, kept, 0.0)


def observed(folder: Path, count: int, rng, farthest: float = 2.5) -> tuple[Blends, np.ndarray]:
    """Blends of galaxies of HST."""
    images, psfs, noise = hst(folder)
    known = np.isfinite(images)
    fits = fit_images(
        images,
        SersicGalaxy2D(),
        uncertainty=np.broadcast_to(noise[:, None, None], images.shape),
        psf=[PSF.from_any(p) for p in psfs],
    )
    r, ellip = fits.params[:, 3], fits.params[:, 5]
    good = (fits.flags & 1 == 0) & (r < 12) & (r > 1.5)
    images, psfs, noise, known = (a[good] for a in (images, psfs, noise, known))
    params, fits = fits.params[good], fits[good]
    shifted = params.copy()
    shifted[:, 1:3] += 32
    kept, flux = np.zeros((len(images), 128, 128)), params[:, 0].copy()
    for i, model in enumerate(fits.model_images):
        own = denoised(images[i] - model, noise[i], known[i] & _inside(params[i]))
        kept[i, 32:96, 32:96] = own
        flux[i] += own.sum()
    radius = np.sqrt((r[good] * np.sqrt(1 - ellip[good])) ** 2 + (FWHM / 2) ** 2)
    first, second = rng.integers(len(images), size=(2, count))
    first, second = np.where(flux[first] >= flux[second], [first, second], [second, first])
    rows = np.stack([first, second], 1)
    offset, units = _pairs(radius[rows], rng, farthest)
    truth, centre = np.empty((count, 2, SIZE, SIZE)), np.empty((count, 2, 2))
    stars = [PSF.from_any(psfs[i]) for i in first]  # one for both
    for k in range(2):
        big = SersicGalaxy2D().render((128, 128), params=shifted[rows[:, k]], psf=stars)
        for i, g in enumerate(rows[:, k]):
            image = fftconvolve(big[i] + kept[g], BLUR, mode="same")
            at = 31.5 + (k - 0.5) * offset[i]
            low = np.rint(shifted[g, 1:3] - at).astype(int)
            truth[i, k] = image[low[1] : low[1] + SIZE, low[0] : low[0] + SIZE]
            centre[i, k] = shifted[g, 1:3] - low
    snr = np.exp(rng.uniform(np.log(40), np.log(200), count))
    sigma = np.sqrt((truth[:, 0] ** 2).sum((1, 2))) / snr
    wider = [PSF(fftconvolve(p, BLUR, mode="full")) for p in psfs]
    return Blends(truth, flux[rows], centre, sigma, [wider[i] for i in first]), units


def observations(blends: Blends, rng) -> tuple[np.ndarray, np.ndarray]:
    """Images with noise, and centres as they are known."""
    clean = blends.truth.sum(1)
    noise = blends.sigma[:, None, None] * rng.standard_normal(clean.shape)
    return clean + noise, blends.centre + rng.normal(0, 0.2, blends.centre.shape)


def scipy_sersics(blends: Blends, rng) -> dict[str, np.ndarray]:
    """Two Sérsic profiles by scipy's least_squares, and what came out against the truth."""
    data, sources = observations(blends, rng)
    flux, err = np.full((2, len(blends), 2), np.nan)
    images = np.zeros_like(blends.truth)
    model, started = SersicGalaxy2D(), time.process_time()
    low, high = ([0, -1, -1, np.log(0.2), np.log(0.3), 0, -np.inf],
                 [np.inf, 1, 1, np.log(40), np.log(8), 0.95, np.inf])  # fmt: skip
    for i in range(len(blends)):
        unit = data[i].sum() / 2

        def drawn(u, i=i, unit=unit):
            p = u.reshape(2, 7).copy()
            p[:, 0] *= unit
            p[:, 1:3] += sources[i]
            p[:, 3:5] = np.exp(p[:, 3:5])
            return model.render((SIZE, SIZE), params=p, psf=blends.psfs[i], dtype="float64")

        start = np.tile([max(unit / abs(unit), 0.01), 0, 0, np.log(4), 0, 0.2, 0.0], 2)
        found = least_squares(
            lambda u, i=i, drawn=drawn: ((data[i] - drawn(u).sum(0)) / blends.sigma[i]).ravel(),
            start,
            bounds=(low * 2, high * 2),
            x_scale="jac",
            max_nfev=60,
        )
        flux[i] = found.x[[0, 7]] * unit
        cov = np.linalg.pinv(found.jac.T @ found.jac)
        err[i] = np.sqrt(np.diag(cov)[[0, 7]]) * abs(unit)
        images[i] = drawn(found.x)
    seconds = (time.process_time() - started) / len(blends)
    return compared(blends, flux, err, images, seconds, np.zeros(len(blends), dtype=bool))


def measure(blends: Blends, model, fitter, rng, **options) -> dict[str, np.ndarray]:
    """Fit all blends, one call, and compare with the truth."""
    data, sources = observations(blends, rng)
    started = time.process_time()
    results = deblend(
        data,
        list(sources),
        model=model,
        fitter=fitter,
        uncertainty=np.broadcast_to(blends.sigma[:, None, None], data.shape),
        psf=blends.psfs if len({id(p) for p in blends.psfs}) > 1 else blends.psfs[0],
        position_prior=0.5,
        **options,
    )
    seconds = (time.process_time() - started) / len(blends)
    images = np.array([r.model_images for r in results])
    flux = np.array([r.flux for r in results])
    err = np.array([r.flux_err for r in results])
    failed = np.array([r.failed.any() for r in results])
    return compared(blends, flux, err, images, seconds, failed)


def compared(blends: Blends, flux, err, images, seconds: float, failed) -> dict[str, np.ndarray]:
    """What was found against the truth."""
    return {
        "seconds": np.array(seconds),
        "failed": failed,
        "dF": flux / blends.flux - 1,
        "pull": (flux - blends.flux) / err,
        **image_metrics(blends, images),
    }


def image_metrics(blends: Blends, images: np.ndarray) -> dict[str, np.ndarray]:
    truth, total = blends.truth, blends.truth.sum(1, keepdims=True)
    blend = 1 - (truth * truth).sum((2, 3)) / (truth * total).sum((2, 3))
    norm = np.sqrt((truth**2).sum((2, 3)) * (images**2).sum((2, 3)))
    corr = (truth * images).sum((2, 3)) / norm
    ssim, shape = np.empty((2, *corr.shape))
    for i, k in np.ndindex(corr.shape):
        span = truth[i, k].max() - truth[i, k].min()
        ssim[i, k] = structural_similarity(truth[i, k], images[i, k], data_range=span)
        shape[i, k] = np.hypot(
            *(_ksb(truth[i, k], blends, i, k) - _ksb(images[i, k], blends, i, k))
        )
    return {"blend": blend, "corr": corr, "ssim": ssim, "shape": shape}


def _ksb(image: np.ndarray, blends: Blends, i: int, k: int) -> np.ndarray:
    x, y = blends.centre[i, k] + 1
    found = galsim.hsm.EstimateShear(
        galsim.Image(np.ascontiguousarray(image, dtype=float), scale=1.0),
        galsim.Image(np.ascontiguousarray(blends.psfs[i].data, dtype=float), scale=1.0),
        shear_est="KSB",
        guess_centroid=galsim.PositionD(x, y),
        strict=False,
    )
    good = found.error_message == ""
    return np.array([found.corrected_g1, found.corrected_g2]) if good else np.full(2, np.nan)


def table(report: Report, name: str, blends: Blends, units, found: dict) -> None:
    """The metrics of one model."""
    df = np.abs(found["dF"])
    faint = blends.flux.argmin(1)
    low, high = np.nanpercentile(found["dF"], [16, 84])
    report(
        f"  {name:24s} {np.nanmedian(df):7.3f} {0.5 * (high - low):7.3f} "
        f"{np.nanmedian(df[np.arange(len(df)), faint]):7.3f} "
        f"{np.nanmedian(df[found['blend'] > 0.1]):7.3f} {np.nanmedian(found['ssim']):7.4f} "
        f"{np.nanmedian(found['corr']):7.4f} {np.nanmedian(found['shape']):7.3f} "
        f"{int(found['failed'].sum()):4d} {1e3 * float(found['seconds']):8.0f}"
    )
    few = found["blend"] <= 0.1
    parts = [("all", units > 0)] + [
        (f"{a} to {b} radii", (units >= a) & (units < b))
        for a, b in ((0.5, 1), (1, 1.5), (1.5, 2.5), (2.5, 5))
        if units.max() > a
    ]
    holds = ", ".join(
        f"{label} {np.mean(np.abs(found['pull'][rows]) < 1):.0%}" for label, rows in parts
    )
    bias = np.nanmedian(found["dF"])
    report(
        f"      median dF {bias:+.3f}; blendedness below 0.1: {few.mean():.0%}; "
        f"68 % intervals of fluxes hold: {holds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of cosmos_hst.fits; none: simulated only")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "deblending.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Blends of two galaxies")
    learned = LearnedGalaxy2D.from_pretrained()
    fits = {
        "Sérsic": (SersicGalaxy2D(), MAPFitter(), {}),
        "  taken for true": (SersicGalaxy2D(), MAPFitter(), {"structure": 0}),
        "learned": (learned, MAPFitter(), {}),
        "  taken for true ": (learned, MAPFitter(), {"structure": 0}),
        "  misfit in the noise": (learned, MAPFitter(noise=LearnedNoise()), {}),
        "  tolerance=inf": (learned, MAPFitter(tolerance=np.inf), {}),
    }
    sets = {"bulge+disk": bulge_disk}
    if args.data is not None:
        sets["hst"] = lambda count, rng: observed(args.data, count, rng)
        sets["hst apart"] = lambda count, rng: observed(args.data, count, rng, 5.0)
    for name, make in sets.items():
        blends, units = make(args.n, np.random.default_rng([args.seed, len(name)]))
        report(f"\n{name}: {len(blends)} blends")
        report(
            "  model                     med|dF|  half68   faint   b>0.1    SSIM    corr"
            "     KSB fail ms/blend"
        )
        found = scipy_sersics(blends, np.random.default_rng([args.seed, 7]))
        table(report, "Sérsic, scipy", blends, units, found)
        for label, (model, fitter, options) in fits.items():
            rng = np.random.default_rng([args.seed, 7])
            found = measure(blends, model, fitter, rng, **options)
            table(report, label, blends, units, found)
    report(
        "\nTargets: hst, learned: .045 .085 .070 .100 SSIM .975 corr .980 KSB .075, no failures; "
        "bulge+disk, Sérsic: .051 .082, corr .992.\nIntervals of 68 %: 63 to 73 % at every "
        "separation.  Joint MAP: 100 ms."
    )
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
