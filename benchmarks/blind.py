"""Blends of which nothing is known: which sources are found, and are the others there?

python benchmarks/blind.py --data FOLDER

hst         blends of two galaxies of HST, as in benchmarks/deblending.py
hst, apart  the same galaxies, the second moved to 0.7 to 2.2 FWHM of the PSF from the first
hst, alone  the brighter one of each by itself: what is found beside it is structure of the galaxy
            (or a companion that HST's image has: these are 55 galaxies, used again and again)
bulge+disk  blends of simulated galaxies, as in benchmarks/deblending.py
field       220 Sérsic galaxies and 30 stars on 700 x 700 pixels, drawn by GalSim

Detections are matched with the truth one to one, so that the sum of distances is least, and those
5 pixels apart or more are none (as BlendingToolKit's PixelHungarianMatcher does).  Recall is
the share of the true sources that are found (in the field: of those with S/N above 10, if alone
and known), precision that of the detections that are true.  dF is the relative error of the total
flux of what was found.

SEP (if it is installed) has BlendingToolKit's settings: 1.5 times the scatter of the background,
5 pixels.  Thresholds of the search for missed sources are 5 sigma.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from _common import RESULTS, Report, one_thread, version

one_thread()

import galsim  # noqa: E402
import numpy as np  # noqa: E402
from deblending import bulge_disk, observed  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from galmorph import PSF, LearnedGalaxy2D, SersicGalaxy2D  # noqa: E402
from galmorph.deblending import deblend  # noqa: E402
from galmorph.detection import detect  # noqa: E402

try:
    import sep
except ImportError:
    sep = None

FARTHEST = 5.0  # pixels
THRESHOLD = 5.0
FWHM = 2.3548


@dataclass
class Images:
    """Noisy images, their noise and PSFs, and what is in them: centres and fluxes of each."""

    data: list[np.ndarray]
    sigma: np.ndarray
    psfs: list[PSF]
    centre: list[np.ndarray]
    flux: list[np.ndarray]
    counts: list[np.ndarray]  # whether a source counts for recall


def of_blends(blends, rng, members=slice(None)) -> Images:
    clean = blends.truth[:, members].sum(1)
    noise = blends.sigma[:, None, None] * rng.standard_normal(clean.shape)
    centre, flux = blends.centre[:, members].copy(), blends.flux[:, members].copy()
    every = np.ones(flux.shape, dtype=bool)
    return Images(
        list(clean + noise), blends.sigma, blends.psfs, list(centre), list(flux), list(every)
    )


def moved_apart(blends, rng):
    """The second galaxy of each blend moved by whole pixels."""
    for i, psf in enumerate(blends.psfs):
        offset = blends.centre[i, 1] - blends.centre[i, 0]
        wanted = rng.uniform(0.7, 2.2) * FWHM * psf.sigma * offset / np.hypot(*offset)
        x, y = shift = np.rint(wanted - offset).astype(int)
        n = blends.truth.shape[-1]
        padded = np.pad(blends.truth[i, 1], n)
        blends.truth[i, 1] = padded[n - y : 2 * n - y, n - x : 2 * n - x]
        blends.centre[i, 1] += shift
    return blends


def field(rng, galaxies: int = 220, stars: int = 30, side: int = 700) -> Images:
    star = galsim.Moffat(beta=3, fwhm=3.5)
    size = 45
    psf = star.drawImage(nx=size, ny=size, scale=1, method="no_pixel").array
    image, sigma = galsim.Image(side, side, scale=1.0), 1.0
    n = galaxies + stars
    centre = rng.uniform(12, side - 13, (n, 2))
    flux, snr = np.empty(n), np.empty(n)
    for i in range(n):
        shape = star
        if i < galaxies:
            q, angle = rng.uniform(0.25, 1), galsim.Angle(rng.uniform(0, np.pi), galsim.radians)
            radius = np.exp(rng.normal(np.log(3), 0.4))
            shape = galsim.Sersic(n=rng.uniform(0.7, 4), half_light_radius=radius)
            shape = galsim.Convolve(shape.shear(q=q, beta=angle), star)
        flux[i] = 60 * rng.pareto(1.2) + 60
        flux[i] = min(flux[i], 30000)
        own = galsim.Image(image.bounds, scale=1.0)
        (flux[i] * shape).drawImage(own, offset=centre[i] - (side - 1) / 2, method="no_pixel")
        snr[i] = np.sqrt((own.array**2).sum()) / sigma
        image += own
    data = image.array + rng.normal(0, sigma, (side, side))
    return Images([data], np.array([sigma]), [PSF(psf)], [centre], [flux], [snr > 10])


@dataclass
class Found:
    """Positions and fluxes of the sources of each image, and errors of these (NaN: unknown)."""

    centre: list[np.ndarray]
    flux: list[np.ndarray]
    error: list[np.ndarray]
    seconds: float
    note: str = ""


def by_sep(images: Images) -> Found:
    centre, flux = [], []
    started = time.process_time()
    for data in images.data:
        objects = sep.extract(data, 1.5, err=sep.Background(data).globalrms, minarea=5)
        centre.append(np.column_stack([objects["x"], objects["y"]]))
        flux.append(objects["flux"])
    seconds = time.process_time() - started
    return Found(centre, flux, [np.full(len(f), np.nan) for f in flux], seconds)


def by_galmorph(images: Images, model, find_missed: float | None) -> Found:
    started = time.process_time()
    sources = [
        detect(data, uncertainty=sigma).positions
        for data, sigma in zip(images.data, images.sigma, strict=True)
    ]
    results = deblend(
        np.array(images.data),
        sources,
        model=model,
        uncertainty=[np.full(d.shape, s) for d, s in zip(images.data, images.sigma, strict=True)],
        psf=images.psfs,
        find_missed=find_missed,
    )
    seconds = time.process_time() - started
    centre = [np.array([p[1:3] for p in r.params]).reshape(-1, 2) for r in results]
    note = ""
    if find_missed is not None:
        added = sum(r.meta["missed"]["added"] for r in results)
        note = f"{added} added, {sum(r.meta['missed']['refused'] for r in results)} refused"
    flux, error = [r.flux for r in results], [r.flux_err for r in results]
    return Found(centre, flux, error, seconds, note)


def matched(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the truth and of what was found that belong together."""
    distance = np.hypot(*(truth[:, None] - found[None]).transpose(2, 0, 1))
    rows, columns = linear_sum_assignment(np.nan_to_num(distance, nan=1e6))
    near = distance[rows, columns] < FARTHEST
    return rows[near], columns[near]


def line(report: Report, name: str, images: Images, found: Found) -> None:
    hits = wanted = claimed = right = 0
    errors, pulls = [], []
    for i in range(len(images.data)):
        t, f = matched(images.centre[i], found.centre[i])
        hits, wanted = hits + images.counts[i][t].sum(), wanted + images.counts[i].sum()
        right, claimed = right + len(t), claimed + len(found.centre[i])
        off = found.flux[i][f] - images.flux[i][t]
        errors.append(off / images.flux[i][t])
        pulls.append(off / found.error[i][f])
    errors, pulls = np.concatenate(errors), np.concatenate(pulls)
    low, high = np.nanpercentile(errors, [16, 84])
    held = f"{np.mean(np.abs(pulls) < 1):4.0%}" if np.isfinite(pulls).any() else "   -"
    report(
        f"  {name:30s} {hits / wanted:6.3f} {right / max(claimed, 1):9.3f} {claimed:5d} "
        f"{claimed - right:5d}  {np.nanmedian(np.abs(errors)):7.3f} {0.5 * (high - low):7.3f} "
        f"{held} {1e3 * found.seconds / len(images.data):8.0f}  {found.note}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of cosmos_hst.fits; none: simulated only")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "blind.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Blind deblending: recall and precision")
    report(f"sep {version('sep')}\n")
    draw = [np.random.default_rng([args.seed, 20, i]) for i in range(8)]
    sets = {}
    if args.data is not None:
        blends, _ = observed(args.data, args.n, draw[2])
        sets["hst"] = of_blends(blends, draw[3])
        sets["hst, alone"] = of_blends(blends, draw[4], slice(0, 1))
        sets["hst, apart"] = of_blends(moved_apart(blends, draw[5]), draw[6])
    sets["bulge+disk"] = of_blends(bulge_disk(args.n, draw[0])[0], draw[1])
    sets["field"] = field(draw[7])
    models = {"Sérsic": SersicGalaxy2D(), "learned": LearnedGalaxy2D.from_pretrained()}
    for name, images in sets.items():
        report(f"\n{name}: {sum(map(len, images.flux))} sources in {len(images.data)} images")
        report(
            "                                 recall precision found false  med|dF|  half68 in 68 %"
            " ms/image"
        )
        if sep is not None:
            line(report, "SEP", images, by_sep(images))
        for label, model in models.items():
            if name == "field" and label == "learned":  # minutes
                continue
            for threshold in (None, THRESHOLD):
                what = f"detect, {label}" + ("" if threshold is None else ", find_missed")
                line(report, what, images, by_galmorph(images, model, threshold))
    report(
        "\nTarget: recall and precision of SEP at least, and the search for missed sources raises"
        "\nrecall without lowering precision."
    )
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
