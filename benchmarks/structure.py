"""Light of real galaxies that models do not have: how much, and what it does to fluxes of blends.

python benchmarks/structure.py --data FOLDER

Galaxies of the KiDS field, and of HST (COSMOS), that are bright, each alone (its neighbours'
models taken away).  What a fit leaves in patches of a galaxy, relative to the model, is the least
that structure can be: a fit takes up part of it.  How much, is told by blends of two of the
galaxies of KiDS, with more noise: intervals of their fluxes must hold the flux that each of them
has alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from astropy.io import fits  # noqa: E402
from learned_bias import hst  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    MAPFitter,
    PointSource2D,
    SersicGalaxy2D,
    deblend,
    fit_images,
)
from galmorph._structure import PATCHES, RINGS, SECTORS, patches_of  # noqa: E402
from galmorph.detection import detect  # noqa: E402
from galmorph.flags import FitFlag  # noqa: E402

FIELD = "kids_viking_field.fits"
ZERO = 23.9
SIDE = 101
WIDTHS = ((0.0, 0.3), (0.3, 0.6), (0.6, 0.8), (0.8, 1.01))


def models() -> dict:
    return {
        "gaussian": GaussianGalaxy2D(),
        "sersic": SersicGalaxy2D(),
        "bulge + disk": BulgeDiskGalaxy2D(),
        "learned": LearnedGalaxy2D.from_pretrained(),
    }


def kids(folder: Path) -> tuple[list, PSF]:
    """Stamps of bright galaxies: data, noise (0: unusable) and centre of each; and the PSF."""
    with fits.open(folder / FIELD) as hdus:
        image = hdus["SCI_R"].data.astype(float)
        psf, rms = PSF(hdus["PSF_R"].data), float(hdus["SCI_R"].header["NOISERMS"])
    found = detect(image, uncertainty=rms)
    usable = np.isfinite(found.data)
    scene = deblend(
        np.where(usable, found.data, np.nan),
        found,
        model={"star": PointSource2D(), "sersic": SersicGalaxy2D()},
        uncertainty=rms,
        psf=psf,
        workers=2,
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = ZERO - 2.5 * np.log10(scene.flux)
    star = scene.probability[:, scene.candidates.index("star")]
    bad = int(FitFlag.SATURATED | FitFlag.EDGE | FitFlag.LOW_SNR)
    good = (star < 0.01) & (mag > 16.5) & (mag < 20.8) & ~scene.failed & (scene.flags & bad == 0)
    stamps = []
    for _, data, sigma, position in scene.stamps(np.flatnonzero(good)):
        stamps += list(zip(data, sigma, position, strict=True))
    return stamps, psf


def cosmos(folder: Path) -> list[tuple]:
    """The same of HST, and the PSF of each."""
    images, psfs, noise = hst(folder)
    sigma = np.where(np.isfinite(images), noise[:, None, None], 0.0)
    middle = np.full(2, 0.5 * (images.shape[1] - 1))
    return [
        (d, s, middle, PSF.from_any(p))
        for d, s, p in zip(np.nan_to_num(images), sigma, psfs, strict=True)
    ]


def fit(model, data, sigma, position, psf):
    used = sigma > 0
    return fit_images(
        np.where(used, data, np.nan),
        model,
        MAPFitter(),
        uncertainty=np.where(used, sigma, 1.0),
        psf=psf,
        positions=np.asarray(position)[None],
    )


# -- what fits leave -------------------------------------------------------------------------


def left(model, stamps: list, psf: PSF | None, least_snr: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared relative residuals (n, rings), and how well the galaxies are resolved."""
    rows, resolved = [], []
    for data, sigma, position, *own in stamps:
        star = own[0] if own else psf
        result = fit(model, data, sigma, position, star)
        image, used = result.model_images[0], sigma > 0
        if result.failed[0] or not np.isfinite(image).all():
            continue
        if np.sqrt(((image[used] / sigma[used]) ** 2).sum()) < least_snr:
            continue
        flux, centre = result.params[0, 0], result.params[0, 1:3]
        label, well = patches_of(
            torch.as_tensor(image[None]).flatten(1),
            torch.tensor([flux]),
            torch.as_tensor(centre[None]),
            star.sigma,
            image.shape[1],
        )
        label = label[0].numpy()
        residual, light, variance = (
            np.bincount(label, np.where(used, a, 0.0).ravel(), PATCHES).reshape(-1, SECTORS)
            for a in (data - image, image, sigma**2)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            rows.append((residual**2 - variance).sum(1) / (light**2).sum(1))
        resolved.append(float(well[0]))
    return np.array(rows), np.array(resolved)


def levels(say: Report, name: str, stamps: list, psf: PSF | None, least_snr: float) -> None:
    ends = ", ".join(f"{r:.2f}" for r in RINGS)
    say(f"\n{name}: relative rms of patches, median of the galaxies, by ring (light within {ends})")
    for title, model in models().items():
        squares, resolved = left(model, stamps, psf, least_snr)
        for low, high in WIDTHS:
            some = (resolved >= low) & (resolved < high)
            if some.sum() < 5:
                continue
            rms = np.sqrt(np.nanmedian(squares[some], 0).clip(0))
            values = " ".join(f"{v:6.3f}" for v in rms)
            which = f"resolved {low:.1f} to {min(high, 1):.1f}"
            say(f"    {title:13s} {which} ({some.sum():3d}) {values}")


# -- blends ----------------------------------------------------------------------------------


def placed(out: np.ndarray, image: np.ndarray, position, at) -> np.ndarray:
    """Add an image whose centre comes to the pixel next to ``at``; where the centre is then."""
    origin = np.rint(at - position).astype(int)
    low, high = np.maximum(origin, 0), np.minimum(origin + image.shape[0], SIDE)
    (x, y), (x1, y1) = low, high
    out[y:y1, x:x1] += image[y - origin[1] : y1 - origin[1], x - origin[0] : x1 - origin[0]]
    return position + origin


def blends(stamps: list, flux: np.ndarray, radius: np.ndarray, psf: PSF, count: int, rng):
    """Images, noise, fluxes and centres of blends, and distances in mean radii."""
    images, noise, fluxes, centres, distances = [], [], [], [], []
    while len(images) < count:
        pair = rng.choice(len(stamps), 2, replace=False)
        i, j = pair if flux[pair[0]] >= flux[pair[1]] else pair[::-1]
        if not flux[j] > flux[i] / 6:
            continue
        distance, angle = rng.uniform(0.5, 2.5), rng.uniform(0, 2 * np.pi)
        apart = distance * np.hypot(0.5 * (radius[i] + radius[j]), 1.18 * psf.sigma)
        offset = 0.5 * apart * np.array([np.cos(angle), np.sin(angle)])
        image = np.zeros((SIDE, SIDE))
        middle = 0.5 * (SIDE - 1)
        first = placed(image, stamps[i][0], stamps[i][2], middle - offset)
        primary = np.sqrt((image**2).sum())
        second = placed(image, stamps[j][0], stamps[j][2], middle + offset)
        own = np.median(stamps[i][1][stamps[i][1] > 0])
        sigma = max(primary / np.exp(rng.uniform(np.log(40), np.log(200))), 3 * own)
        images.append(image + sigma * rng.standard_normal(image.shape))
        noise.append(np.hypot(sigma, own))
        fluxes.append((flux[i], flux[j]))
        centres.append((first, second))
        distances.append(distance)
    return tuple(map(np.array, (images, noise, fluxes, centres, distances)))


def covered(say: Report, stamps: list, psf: PSF, count: int, seed: int) -> None:
    stamps = [s for s in stamps if len(s[0]) >= 41]
    say(f"\nblends of {len(stamps)} galaxies of KiDS, {count} of them: 68 % intervals hold")
    say("                  structure     all     0.5 to 1  1 to 1.5  1.5 to 2.5 radii   95 % hold")
    for name in ("sersic", "learned"):
        model = models()[name]
        alone = [fit(model, *stamp, psf).params[0] for stamp in stamps]
        flux, radius = np.array(alone)[:, 0], np.array(alone)[:, 3]
        good = np.isfinite(flux) & (flux > 0) & (radius > 1) & (radius < 12)
        kept = [s for s, g in zip(stamps, good, strict=True) if g]
        rng = np.random.default_rng(seed)
        image, noise, truth, centre, distance = blends(
            kept, flux[good], radius[good], psf, count, rng
        )
        given = centre + rng.normal(0, 0.2, centre.shape)
        results = deblend(
            image,
            list(given),
            model=model,
            uncertainty=np.broadcast_to(noise[:, None, None], image.shape),
            psf=psf,
            position_prior=0.5,
        )
        found, own, whole = (
            np.array([getattr(r, n) for r in results]) for n in ("flux", "snr", "flux_err")
        )
        own = (
            found / own
        )  # of noise alone; the rest of the variance goes with the structure squared
        for structure in (0.0, 0.5, 1.0, 1.25, 1.5, 2.0):
            pull = (found - truth) / np.sqrt(own**2 + structure**2 * (whole**2 - own**2))
            parts = [distance > 0] + [
                (distance >= a) & (distance < b) for a, b in ((0.5, 1), (1, 1.5), (1.5, 2.5))
            ]
            holds = "  ".join(f"{np.mean(np.abs(pull[p]) < 1):7.0%} " for p in parts)
            say(
                f"    {name:13s} {structure:7.2f}   {holds}         "
                f"{np.mean(np.abs(pull) < 1.96):10.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--parts", nargs="+", default=["kids", "hst"])
    parser.add_argument("--n", type=int, default=200, help="blends")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "structure.txt", help="'-' for none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = Report("Structure that models do not have")
    if "kids" in args.parts:
        stamps, psf = kids(args.data)
        levels(say, "KiDS", stamps, psf, 60)
        covered(say, stamps, psf, args.n, args.seed)
    if "hst" in args.parts:
        levels(say, "HST", cosmos(args.data), None, 20)
    say.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
