"""galmorph's images against GalSim's: relative flux error and per-pixel error over the peak.

python benchmarks/rendering.py
python benchmarks/rendering.py --learned [--latents FILE]

Galaxies over n 0.5-6, r_eff 1-10 pixels, q 0.1-1, any angle and sub-pixel centre, 64x64 stamps,
the Moffat PSF (beta 3, FWHM 3 pixels) and the unit pixel of simulate.py. The PSF is given to
galmorph in several forms; the truth is always GalSim's own convolution of the analytic PSF.

With --learned: learned galaxies, of the prior of the shipped network and of a file of fits
("params", (N, 5 + d), .npz), against the same drawn with much finer samples, which are shown to
be fine enough by others that are finer still.  Results are in results/rendering_learned.txt.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from simulate import BETA, FWHM, effective_psf, moffat, render  # noqa: E402

N_GRID = (0.5, 1.0, 2.0, 4.0, 6.0)
R_GRID = (1.0, 2.0, 4.0, 10.0)
Q_GRID = (0.1, 0.3, 0.6, 1.0)
TARGET = 1e-3
LEARNED_R = (1.5, 3.0, 5.0, 8.0, 15.0)
LEARNED_FWHM = (2.0, 3.0, 4.0)


def grid(size: int, rng: np.random.Generator) -> np.ndarray:
    """Every combination of n, r_eff and q at a random centre and angle; (N, 7), flux 1."""
    rows = [
        (1.0, *(size / 2 + rng.uniform(-1, 1, 2)), r, n, 1 - q, rng.uniform(0, np.pi))
        for n in N_GRID
        for r in R_GRID
        for q in Q_GRID
    ]
    return np.array(rows)


def forms(fwhm: float) -> dict:
    """The same PSF in the forms that users have it."""
    from astropy.modeling.models import Moffat2D

    import galmorph

    psf = moffat(fwhm)
    radius = fwhm / (2 * np.sqrt(2 ** (1 / BETA) - 1))
    fine = 8
    bare = _without_pixel(psf, 51, 5)
    return {
        "oversampled x4, effective, 51 px": galmorph.PSF(
            effective_psf(51 * 4 + 1, psf=psf, oversampling=4), oversampling=4
        ),
        "oversampled x8, effective, 51 px": galmorph.PSF(
            effective_psf(51 * fine + 1, psf=psf, oversampling=fine), oversampling=fine
        ),
        "oversampled x5, pixel not included": galmorph.PSF(
            bare, oversampling=5, includes_pixel=False
        ),
        # An analytic model is taken to be the effective PSF, so its truth has no pixel.
        "astropy Moffat2D (effective)": Moffat2D(1, 0, 0, radius, BETA),
        "native, effective, 51x51": galmorph.PSF(effective_psf(51, psf=psf)),
        "native, effective, 25x25": galmorph.PSF(effective_psf(25, psf=psf)),
    }


def _without_pixel(psf, size: int, oversampling: int) -> np.ndarray:
    n = size * oversampling
    return psf.drawImage(nx=n, ny=n, scale=1 / oversampling, method="no_pixel", dtype=float).array


def draw_truth(params: np.ndarray, size: int, fwhm: float) -> tuple[np.ndarray, np.ndarray]:
    """GalSim images (N, size, size) with and without the pixel."""
    import galsim
    from simulate import _gsparams

    psf = moffat(fwhm)
    with_pixel = np.array([render(p, psf=psf, size=size) for p in params])
    without = np.empty_like(with_pixel)
    gsp = _gsparams()
    for i, (flux, x, y, r, n, ellip, theta) in enumerate(params):
        galaxy = galsim.Sersic(n=n, half_light_radius=r * np.sqrt(1 - ellip), flux=flux)
        galaxy = galaxy.shear(q=1 - ellip, beta=theta * galsim.radians)
        galaxy = galaxy.shift(x - (size - 1) / 2, y - (size - 1) / 2)
        scene = galsim.Convolve(galaxy, psf, gsparams=gsp)
        without[i] = scene.drawImage(
            nx=size, ny=size, scale=1, method="no_pixel", dtype=float
        ).array
    return with_pixel, without


def main() -> None:
    """Render, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="side of the stamps (default 64)")
    parser.add_argument(
        "--fwhm", type=float, nargs="+", default=[FWHM, 2.0], help="FWHM of the PSF"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="also in single precision")
    parser.add_argument("--learned", action="store_true", help="learned galaxies instead")
    parser.add_argument("--latents", type=Path, help="fits of real galaxies, .npz, for --learned")
    parser.add_argument("--n", type=int, default=200, help="learned galaxies of each kind")
    parser.add_argument("--out", default=None, help="default results/rendering*.txt; '-' for none")
    args = parser.parse_args()
    if args.learned:
        learned(args)
    else:
        against_galsim(args)


def against_galsim(args: argparse.Namespace) -> None:
    """Models against GalSim's images."""
    import galmorph

    report = Report("Rendering against GalSim")
    params = grid(args.size, np.random.default_rng(args.seed))
    report(
        f"{len(params)} galaxies: n {N_GRID}, r_eff {R_GRID}, q {Q_GRID}; random centres within "
        f"1 pixel and angles (seed {args.seed}); {args.size}x{args.size} stamps"
    )
    report("flux: |sum over the stamp / GalSim's - 1|; pixel: largest |difference| over the peak")
    report(f"target: both below {TARGET:g} with an oversampled or analytic PSF")
    model = galmorph.SersicGalaxy2D()
    for fwhm in args.fwhm:
        report()
        report(f"PSF: Moffat, beta {BETA:g}, FWHM {fwhm:g} px")
        report(
            f"{'PSF given as':40s} {'flux max':>9s} {'median':>9s} {'pixel max':>9s} {'median':>9s}"
            "  worst pixel at (n, r_eff, q)"
        )
        with_pixel, without = draw_truth(params, args.size, fwhm)
        for name, psf in forms(fwhm).items():
            truth = without if "Moffat2D" in name else with_pixel
            for dtype in ("float64", "float32") if args.float32 else ("float64",):
                image = model.render((args.size, args.size), params=params, psf=psf, dtype=dtype)
                report(_row(name if dtype == "float64" else f"  in {dtype}", image, truth, params))
    report.write(None if args.out == "-" else args.out or RESULTS / "rendering.txt")


def _row(name: str, image: np.ndarray, truth: np.ndarray, params: np.ndarray) -> str:
    flux, pixel = _errors(image, truth)
    worst = params[pixel.argmax()]
    verdict = "ok" if max(flux.max(), pixel.max()) < TARGET else "above the target"
    return (
        f"{name:40s} {flux.max():9.2e} {np.median(flux):9.2e} {pixel.max():9.2e} "
        f"{np.median(pixel):9.2e}  {worst[4]:g}, {worst[3]:g}, {1 - worst[5]:.1f}  {verdict}"
    )


@contextmanager
def finer(times: int):
    """Learned galaxies drawn with samples this much closer together, and their totals too."""
    from galmorph.rendering import canonical
    from galmorph.rendering import learned as drawing
    from galmorph.rendering import learned_model as model

    canonical._nodes.cache_clear()
    try:
        with (
            mock.patch.object(drawing, "_SAMPLES", drawing._SAMPLES * times**0.3),
            mock.patch.object(model, "_SPACING", model._SPACING / times),
            mock.patch.object(model, "_FINEST", model._FINEST * times),
            mock.patch.object(canonical, "_RADII", 40 * (6 + times // 16)),
            mock.patch.object(canonical, "_ANGLES", 16 * (6 + times // 16)),
        ):
            yield
    finally:
        canonical._nodes.cache_clear()


def learned(args: argparse.Namespace) -> None:
    """Learned galaxies against the same with finer samples."""
    import galmorph

    report = Report("Rendering of learned galaxies against much finer samples")
    model = galmorph.LearnedGalaxy2D.from_pretrained()
    rng = np.random.default_rng(args.seed)
    kinds = {"prior": model.sample(args.n, rng)}
    if args.latents is not None:
        fits = np.load(args.latents)
        good = np.isfinite(fits["params"]).all(1) & (fits["flags"] == 0)
        rows = rng.choice(np.flatnonzero(good), args.n, replace=False)
        kinds["real"] = fits["params"][rows].astype(float)
    report(
        f"{args.n} galaxies of each kind: drawn from the prior of the network that ships"
        + (", and fitted to real galaxies" if args.latents is not None else "")
    )
    report(
        f"random centres within half a pixel and angles (seed {args.seed}), {args.size}x"
        f"{args.size} stamps, Gaussian PSFs; flux and pixel errors as shares of the flux and of "
        "the peak"
    )
    report(
        "converged: largest difference between samples 16 and 32 times as close (20 galaxies); "
        f"beyond: share of galaxies with an error above {TARGET:g}"
    )
    for kind, params in kinds.items():
        params[:, 0] = 1.0
        params[:, 1:3] = 0.5 * (args.size - 1) + rng.uniform(-0.5, 0.5, (len(params), 2))
        params[:, 4] = rng.uniform(-np.pi, np.pi, len(params))
        report()
        report(
            f"{kind:5s}  r_50 FWHM   flux: median     95 %      max  beyond   pixel: median     "
            "95 %      max  beyond   converged: flux    pixel"
        )
        for r in LEARNED_R:
            params[:, 3] = r
            for fwhm in LEARNED_FWHM:
                report(f"{kind:5s} {r:5g} {fwhm:4g}   " + _learned_row(model, params, args, fwhm))
    report.write(None if args.out == "-" else args.out or RESULTS / "rendering_learned.txt")


def _learned_row(model, params: np.ndarray, args: argparse.Namespace, fwhm: float) -> str:
    import galmorph

    y, x = np.mgrid[:41, :41] - 20
    psf = galmorph.PSF(np.exp(-4 * np.log(2) * (x**2 + y**2) / fwhm**2))
    shape = (args.size, args.size)
    image = model.render(shape, params=params, psf=psf)
    with finer(16):
        truth = model.render(shape, params=params, psf=psf)
    with finer(32):
        finest = model.render(shape, params=params[:20], psf=psf)
    flux, pixel = _errors(image, truth)
    parts = [
        f"{np.median(e):9.1e} {np.percentile(e, 95):8.1e} {e.max():8.1e} {np.mean(e > TARGET):6.1%}"
        for e in (flux, pixel)
    ]
    converged = (e.max() for e in _errors(truth[:20], finest))
    return "     ".join(parts) + "          " + " ".join(f"{e:8.1e}" for e in converged)


def _errors(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flux = np.abs(image.sum((1, 2)) / truth.sum((1, 2)) - 1)
    return flux, np.abs(image - truth).max((1, 2)) / truth.max((1, 2))


if __name__ == "__main__":
    main()
