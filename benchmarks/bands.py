"""Several bands: joint fits against band-by-band fits, and forced photometry on a real field.

python benchmarks/bands.py
python benchmarks/bands.py --field kids_viking_field.fits

Blends of two galaxies in three bands, drawn by GalSim, 64 x 64 pixels, at 0.5 to 2.5 half-light
radii from each other, centres known to 0.2 pixel.  PSFs have a FWHM of 4.5, 3.0 and 3.5 pixels, and
the noise is 1.5, 1 and 1.2 times that of r, in which the brighter galaxy has a S/N of 40 to 200.
Galaxies are fitted in each band by itself, in r and then forced in all bands with this shape
("shapes": with what is not known of it added to the errors; colours are then as of
independent fluxes, which they are not), and in all bands together.

sersic      Sérsic profiles, each with colours of its own
bulge+disk  de Vaucouleurs bulges in exponential disks, redder than these

The field is that of KiDS and VIKING (kids_viking_field.fits): galaxies and stars of its catalogue
are fitted in r, and measured with these shapes in the other eight bands.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import astropy.units as u  # noqa: E402
import galsim  # noqa: E402
import numpy as np  # noqa: E402
from astropy.io import fits  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    BulgeDiskGalaxy2D,
    LearnedGalaxy2D,
    PointSource2D,
    SersicGalaxy2D,
    deblend,
)
from galmorph.multiband import deblend_bands, forced_photometry  # noqa: E402

SIZE = 64
BANDS = ("g", "r", "i")
FWHM = dict(zip(BANDS, (4.5, 3.0, 3.5), strict=True))
NOISE = dict(zip(BANDS, (1.5, 1.0, 1.2), strict=True))
COLORS = (("g", "r"), ("r", "i"))
FIELD_BANDS = ("u", "g", "r", "i", "Z", "Y", "J", "H", "Ks")


@dataclass
class Blends:
    """Images (N, nb, ny, nx) without noise, fluxes (N, 2, nb), centres and noise in r."""

    images: np.ndarray
    flux: np.ndarray
    centre: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def psfs() -> dict[str, PSF]:
    return {
        b: PSF(galsim.Gaussian(fwhm=w).drawImage(nx=31, ny=31, scale=1, method="no_pixel").array)
        for b, w in FWHM.items()
    }


def blends(kind: str, count: int, rng: np.random.Generator) -> Blends:
    """Simulated blends."""
    images = np.zeros((count, 3, SIZE, SIZE))
    flux, centre = np.empty((count, 2, 3)), np.empty((count, 2, 2))
    sigma = np.empty(count)
    for i in range(count):
        size = np.exp(rng.uniform(np.log(2.5), np.log(6), 2))
        distance, angle = rng.uniform(0.5, 2.5) * size.mean(), rng.uniform(0, 2 * np.pi)
        offset = distance * np.array([np.cos(angle), np.sin(angle)])
        brighter = np.zeros((SIZE, SIZE))
        for k in range(2):
            total = 100.0 if k == 0 else 100 / np.exp(rng.uniform(0, np.log(5)))
            parts, light = _galaxy(kind, size[k], total, rng)
            at = 31.5 + (k - 0.5) * offset + rng.uniform(-0.5, 0.5, 2)
            flux[i, k], centre[i, k] = light.sum(0), at
            for b, band in enumerate(BANDS):
                whole = galsim.Sum([f * p for f, p in zip(light[:, b], parts, strict=True)])
                image = galsim.Image(SIZE, SIZE, scale=1.0)
                galsim.Convolve(whole, galsim.Gaussian(fwhm=FWHM[band])).drawImage(
                    image, offset=at - 31.5, method="no_pixel"
                )
                images[i, b] += image.array
                if k == 0 and band == "r":
                    brighter = image.array
        snr = np.exp(rng.uniform(np.log(40), np.log(200)))
        sigma[i] = np.sqrt((brighter**2).sum()) / snr
    return Blends(images, flux, centre, sigma)


def _galaxy(kind: str, size: float, total: float, rng) -> tuple[list, np.ndarray]:
    """Profiles of unit flux, and their fluxes in each band (parts, nb)."""
    angle, q = galsim.Angle(rng.uniform(0, np.pi), galsim.radians), rng.uniform(0.3, 1)
    mags = np.array([rng.uniform(0.2, 1.2), 0.0, -rng.uniform(0.1, 0.5)])  # less r
    if kind == "sersic":
        n = np.clip(np.exp(rng.normal(np.log(1.8), 0.4)), 0.5, 4)
        return [galsim.Sersic(n, half_light_radius=size).shear(q=q, beta=angle)], (
            total * 10 ** (-0.4 * mags[None])
        )
    share = rng.uniform(0.1, 0.6)
    bulge = galsim.DeVaucouleurs(half_light_radius=size * rng.uniform(0.2, 0.6))
    disk = galsim.Exponential(half_light_radius=size)
    red = np.array([rng.uniform(0.3, 0.8), 0.0, -0.2])
    light = [share * 10 ** (-0.4 * (mags + red)), (1 - share) * 10 ** (-0.4 * mags)]
    parts = [bulge.shear(q=0.5 * (1 + q), beta=angle), disk.shear(q=q, beta=angle)]
    return parts, total * np.array(light)


@dataclass
class Found:
    """Fluxes and errors (N, 2, nb), colours and errors (N, 2, 2), seconds a blend."""

    flux: np.ndarray
    flux_err: np.ndarray
    color: np.ndarray
    color_err: np.ndarray
    seconds: float


def observe(sample: Blends, rng: np.random.Generator):
    """Noisy images and noise of each band, and positions, of one blend after another."""
    for i in range(len(sample)):
        sigma = {b: sample.sigma[i] * NOISE[b] for b in BANDS}
        data = {
            b: sample.images[i, j] + rng.normal(0, sigma[b], (SIZE, SIZE))
            for j, b in enumerate(BANDS)
        }
        yield data, sigma, sample.centre[i] + rng.normal(0, 0.2, (2, 2))


def fit_all(sample: Blends, fit, rng) -> Found:
    """Apply ``fit(data, sigma, xy)``, which gives flux, errors, colours and errors."""
    started = time.process_time()
    results = [fit(*one) for one in observe(sample, rng)]
    seconds = (time.process_time() - started) / len(sample)
    return Found(*(np.array(values) for values in zip(*results, strict=True)), seconds)


def _colors(flux, error):
    """Colours of independent fluxes (2, nb)."""
    value, width = [], []
    bright = np.where(flux > 0, flux, np.nan)
    relative = error / bright
    for a, b in (tuple(BANDS.index(x) for x in pair) for pair in COLORS):
        value.append(-2.5 * np.log10(bright[:, a] / bright[:, b]))
        width.append(2.5 / np.log(10) * np.hypot(relative[:, a], relative[:, b]))
    return np.array(value).T, np.array(width).T


def one_by_one(model, stars):
    """Each band fitted by itself."""

    def fit(data, sigma, xy):
        found = [
            deblend(
                data[b],
                xy,
                model=model,
                psf=stars[b],
                uncertainty=sigma[b],
                position_prior=0.5,
            )
            for b in BANDS
        ]
        flux, error = (np.array([getattr(r, n) for r in found]).T for n in ("flux", "flux_err"))
        return flux, error, *_colors(flux, error)

    return fit


def forced(model, stars, uncertain: bool):
    """Shapes from r, fluxes given these; with ``uncertain`` what is not known of them is added."""

    def fit(data, sigma, xy):
        red = deblend(
            data["r"], xy, model=model, psf=stars["r"], uncertainty=sigma["r"], position_prior=0.5
        )
        found = [
            red
            if b == "r" and uncertain
            else forced_photometry(
                red,
                data[b],
                psf=stars[b],
                uncertainty=sigma[b],
                shape_uncertainty=uncertain,
            )
            for b in BANDS
        ]
        flux, error = (np.array([getattr(r, n) for r in found]).T for n in ("flux", "flux_err"))
        return flux, error, *_colors(flux, error)

    return fit


def joint(model, stars, **options):
    """All bands together."""

    def fit(data, sigma, xy):
        found = deblend_bands(
            data,
            xy,
            model=model,
            psf=stars,
            uncertainty=sigma,
            position_prior=0.5,
            **options,
        )
        colors = [found.color(*pair) for pair in COLORS]
        value, width = (np.array([c[i] for c in colors]).T for i in (0, 1))
        return found.flux, found.flux_err, value, width

    return fit


def _half68(values: np.ndarray) -> float:
    low, high = np.nanpercentile(values, [16, 84])
    return 0.5 * (high - low)


def table(report: Report, name: str, sample: Blends, found: Found) -> None:
    """A row of flux errors and colours of one way to fit."""
    off = found.flux / sample.flux - 1
    held = np.abs(found.flux - sample.flux) < found.flux_err
    mags = -2.5 * np.log10(sample.flux)
    truth = np.stack([mags[..., BANDS.index(a)] - mags[..., BANDS.index(b)] for a, b in COLORS], -1)
    color = found.color - truth
    color_held = np.abs(color) < found.color_err
    columns = [f"{np.nanmedian(np.abs(off[..., b])):6.3f}" for b in range(3)]
    columns += [f"{_half68(off[..., b]):6.3f}" for b in range(3)]
    columns += [f"{held[..., b].mean():5.0%}" for b in range(3)]
    columns += [f"{np.nanmedian(np.abs(color[..., c])):6.3f}" for c in range(2)]
    columns += [f"{_half68(color[..., c]):6.3f}" for c in range(2)]
    columns += [f"{color_held[..., c].mean():5.0%}" for c in range(2)]
    failed = int(np.count_nonzero(~np.isfinite(found.flux).all((1, 2))))
    report(f"  {name:26s}" + " ".join(columns) + f" {failed:4d} {1e3 * found.seconds:6.0f}")


def simulated(report: Report, count: int, seed: int, learned: int) -> None:
    """Part one."""
    stars = psfs()
    sersic, both = SersicGalaxy2D(), BulgeDiskGalaxy2D()
    network = LearnedGalaxy2D.from_pretrained()
    for kind in ("sersic", "bulge+disk"):
        sample = blends(kind, count, np.random.default_rng([seed, len(kind)]))
        few = Blends(*(a[:learned] for a in vars(sample).values()))
        report(f"\n{kind}: {len(sample)} blends ({learned} with the learned model)")
        report(
            "                              median |dF|         half 16-84 %          68 % holds"
            "       median |dc|    half 16-84 %   68 % holds  fail  ms"
        )
        report(
            "                               g      r      i      g      r      i     g     r     i"
            "    g-r    r-i    g-r    r-i   g-r   r-i      /blend"
        )
        ways = {
            "Sérsic, band by band": (sample, one_by_one(sersic, stars)),
            "Sérsic, forced": (sample, forced(sersic, stars, False)),
            "Sérsic, forced, shapes": (sample, forced(sersic, stars, True)),
            "Sérsic, joint": (sample, joint(sersic, stars)),
            "Sérsic, joint, true": (sample, joint(sersic, stars, structure=0)),
        }
        if kind == "bulge+disk":
            ways["bulge+disk, band by band"] = (sample, one_by_one(both, stars))
            ways["bulge+disk, joint, colours"] = (sample, joint(both, stars, component_colors=True))
        ways["learned, band by band"] = (few, one_by_one(network, stars))
        ways["learned, joint"] = (few, joint(network, stars))
        ways["learned, joint, true"] = (few, joint(network, stars, structure=0))
        for name, (own, fit) in ways.items():
            found = fit_all(own, fit, np.random.default_rng([seed, 7]))
            table(report, name, own, found)


# -- the field -------------------------------------------------------------------------------


def real_field(report: Report, path: Path, limit: float) -> None:
    """Part two."""
    with fits.open(path) as hdus:
        catalogue = hdus["CATALOG"].data
        images = {b: hdus[f"SCI_{b}"].data.astype(float) for b in FIELD_BANDS}
        stars = {b: PSF(hdus[f"PSF_{b}"].data.astype(float)) for b in FIELD_BANDS}
        noise = {b: float(hdus[f"SCI_{b}"].header["NOISERMS"]) for b in FIELD_BANDS}
    ny, nx = images["r"].shape
    x, y = catalogue["x"], catalogue["y"]
    inside = (np.minimum(x, nx - x) > 30) & (np.minimum(y, ny - y) > 30)
    # the brightest are saturated
    rows = np.flatnonzero(inside & (catalogue["mag_r"] > 18) & (catalogue["mag_r"] < limit))
    is_star = catalogue["is_star"][rows].astype(bool)
    xy = _positions(x[rows], y[rows], images["r"])
    galaxy, star = SersicGalaxy2D(), PointSource2D()
    started = time.process_time()
    red = deblend(
        images["r"] * u.uJy,
        xy,
        model=[star if s else galaxy for s in is_star],
        psf=stars["r"],
        uncertainty=noise["r"],
        position_prior=0.5,
    )
    seconds = time.process_time() - started
    report(
        f"\nField: {len(rows)} sources of 18 < r < {limit:g} ({is_star.sum()} stars); "
        f"fit in r: {seconds:.0f} s, {red.failed.sum()} failed"
    )
    report("  model - catalogue, galaxies above 10 sigma, and colour with r against the catalogue")
    report("  band     n  median  scatter   band - r: median  scatter    s")
    magnitude = {}
    for band in ("r", *(b for b in FIELD_BANDS if b != "r")):
        started = time.process_time()
        found = forced_photometry(
            red, images[band] * u.uJy, psf=stars[band], uncertainty=noise[band], band=band
        )
        seconds = time.process_time() - started
        with np.errstate(invalid="ignore", divide="ignore"):
            magnitude[band] = 23.9 - 2.5 * np.log10(found.flux)
        theirs = catalogue[f"mag_{band}"][rows]
        use = ~is_star & (found.flux > 10 * found.flux_err) & (theirs < 30)
        use &= np.isfinite(magnitude["r"])
        off = (magnitude[band] - theirs)[use]
        color = off - (magnitude["r"] - catalogue["mag_r"][rows])[use]
        report(
            f"  {band:4s} {use.sum():5d} {np.median(off):+7.3f} {_half68(off):8.3f} "
            f"{np.median(color):+18.3f} {_half68(color):8.3f} {seconds:6.1f}"
        )


def _positions(x: np.ndarray, y: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Positions that count from the middle of the first pixel, whatever the catalogue does.

    By the mean offset of the light of the brightest sources from the positions.
    """
    offsets = []
    yy, xx = np.mgrid[-4:5, -4:5]
    for a, b in zip(x, y, strict=True):
        column, row = int(np.rint(a)), int(np.rint(b))
        cut = image[row - 4 : row + 5, column - 4 : column + 5].clip(0)
        offsets.append(
            [(cut * xx).sum() / cut.sum() + column - a, (cut * yy).sum() / cut.sum() + row - b]
        )
    return np.column_stack([x, y]) + np.median(offsets, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--field", type=Path, help="kids_viking_field.fits; none: blends")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--learned", type=int, default=25)
    parser.add_argument("--limit", type=float, default=21.7, help="faintest r of the field")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="'-' for none; by default bands.txt or bands_field.txt")
    args = parser.parse_args()
    report = Report("Several bands: joint fits and forced photometry")
    if args.field is None:
        simulated(report, args.n, args.seed, args.learned)
    else:
        real_field(report, args.field, args.limit)
    default = RESULTS / ("bands.txt" if args.field is None else "bands_field.txt")
    report.write(None if args.out == "-" else args.out or default)


if __name__ == "__main__":
    main()
