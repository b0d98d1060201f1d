"""The honest test: Sérsic and learned fits of real galaxies, judged on pixels left out.

python benchmarks/left_out_pixels.py --data FOLDER

Galaxies of linear images (KiDS r < 21 in one field, HST/ACS in COSMOS) are fitted on a random
80 % of their pixels by a PSF-convolved Sérsic profile and by the learned galaxy, both with a
constant background; the log-likelihood of the other 20 % under the noise is compared.  The
network was trained on every other galaxy of the KiDS field: those are left out here.  None of
HST's were trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from astropy.io import fits  # noqa: E402
from astropy.table import Table  # noqa: E402

from galmorph import PSF, LearnedGalaxy2D, MAPFitter, SersicGalaxy2D, fit_images  # noqa: E402
from galmorph.noise import GaussianNoise, LearnedNoise  # noqa: E402

SIZE = 64


def kids(
    folder: Path, band: str = "R", faintest: float = 21.0, *, trained: bool = False
) -> list[dict]:
    """Stamps of the KiDS field, neighbours masked: those of the training, or the others."""
    from photutils.segmentation import deblend_sources, detect_sources

    with fits.open(folder / "kids_viking_field.fits") as f:
        header = f[f"SCI_{band}"].header
        image = f[f"SCI_{band}"].data.astype(float)
        psf = PSF.from_any(f[f"PSF_{band}"].data.astype(float))
        table = Table(f["CATALOG"].data)
    noise = float(header["NOISERMS"])
    segments = detect_sources(image, 1.5 * noise, n_pixels=5)
    segments = deblend_sources(image, segments, n_pixels=5, contrast=0.01, progress_bar=False)
    keep = (table["mag_r"] < faintest) & ~table["is_star"]
    keep &= ~((table["mag_r"] < 17) & (table["r50_px"] < 5))  # saturated stars
    stamps, half = [], SIZE // 2
    for row in np.flatnonzero(keep):
        if (row % 2 == 0) != trained:  # the network was trained on even rows
            continue
        x, y = (round(float(table[n][row])) for n in ("x", "y"))
        if min(x, y) < half or x > image.shape[1] - half or y > image.shape[0] - half:
            continue
        cut = np.s_[y - half : y + half, x - half : x + half]
        seg = segments.data[cut]
        own = seg[half, half]
        data = image[cut]
        bad = ((seg > 0) & (seg != own)) | ~np.isfinite(data)
        if own == 0 or bad.mean() > 0.5:
            continue
        stamps.append({"data": data, "noise": noise, "bad": bad, "psf": psf, "set": "KiDS"})
    return stamps


def cosmos(folder: Path) -> list[dict]:
    """The HST galaxies."""
    with fits.open(folder / "cosmos_hst.fits") as f:
        images, psfs = f["IMAGES"].data.astype(float), f["PSF"].data.astype(float)
        noise = f["CATALOG"].data["noise_rms"].astype(float)
    return [
        {
            "data": np.nan_to_num(image),
            "noise": rms,
            "bad": ~np.isfinite(image),
            "psf": PSF.from_any(psf),
            "set": "HST",
        }
        for image, psf, rms in zip(images, psfs, noise, strict=True)
    ]


def run(stamps: list[dict], models: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fit and judge; log-likelihoods of the pixels left out, less that of a perfect fit."""
    data = np.array([s["data"] for s in stamps])
    noise = np.array([s["noise"] for s in stamps])[:, None, None]
    bad = np.array([s["bad"] for s in stamps])
    out = (rng.random(data.shape) < 0.2) & ~bad
    psfs = [s["psf"] for s in stamps]
    psf = psfs[0] if all(p is psfs[0] for p in psfs) else psfs
    made = {"snr": None, "left_out": out.sum((1, 2))}
    for name, (model, fitter) in models.items():
        result = fit_images(
            data,
            model,
            fitter,
            uncertainty=np.broadcast_to(noise, data.shape),
            mask=bad | out,
            psf=psf,
            background="constant",
        )
        residual = (data - result.model_images) / noise
        own = result.noise
        if isinstance(own, LearnedNoise):
            own = own.bind(result.model_std_images)
        judged = np.where(out, 1 / noise, 0)
        found = own.log_prob(data, result.model_images, judged)
        made[name] = (found - GaussianNoise().log_prob(data, data, judged)).sum((1, 2))
        made[f"{name} chi2"] = np.where(out, residual**2, 0).sum((1, 2)) / out.sum((1, 2))
        made[f"{name} params"] = result.params
        made[f"{name} flags"] = result.flags
        if made["snr"] is None:
            light = result.model_images - result.background[:, :1, None]
            made["snr"] = np.sqrt((light**2 / noise**2).sum((1, 2)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the FITS files")
    parser.add_argument("--weights", default="default", help="a name, or a file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faintest", type=float, default=21.0)
    parser.add_argument("--out", default=RESULTS / "left_out_pixels.txt", help="'-' for none")
    args = parser.parse_args()
    if Path(args.weights).exists():
        learned = LearnedGalaxy2D.read(args.weights)
    else:
        learned = LearnedGalaxy2D.from_pretrained(args.weights)
    report = Report("Learned and Sérsic fits on pixels left out")
    rng = np.random.default_rng(args.seed)
    for title, stamps in (
        (f"KiDS r, mag < {args.faintest:.1f}", kids(args.data, faintest=args.faintest)),
        ("HST F814W", cosmos(args.data)),
    ):
        models = {
            "sersic": (SersicGalaxy2D(), MAPFitter()),
            "learned": (learned, MAPFitter()),
            "misfit": (learned, MAPFitter(noise=LearnedNoise())),
        }
        made = run(stamps, models, rng)
        for name, text in {
            "learned": "noise alone",
            "misfit": "noise and the misfit that the network has learned of itself",
        }.items():
            judge(report, f"{title}: {len(stamps)} galaxies, {text}", made, name)
    report.write(None if args.out == "-" else args.out)


def judge(report: Report, title: str, made: dict, name: str) -> None:
    """The gain of a learned fit over the Sérsic fit, by S/N."""
    gain = made[name] - made["sersic"]
    report(f"\n{title}")
    for low, high in ((0, 30), (30, 100), (100, 300), (300, np.inf)):
        rows = (made["snr"] >= low) & (made["snr"] < high)
        if not rows.any():
            continue
        loss = -gain[rows] / np.abs(made["sersic"][rows])
        report(
            f"  S/N {low:3d} to {high:4.0f}: {rows.sum():4d}, learned better "
            f"{np.mean(gain[rows] > 0):6.1%}, gain of ln L 16, 50, 84 %: "
            + " ".join(f"{g:8.1f}" for g in np.percentile(gain[rows], [16, 50, 84]))
            + f", worse by more than 1 %: {np.sum(loss > 0.01)}"
            + f", median chi2 {np.median(made['sersic chi2'][rows]):.2f} -> "
            f"{np.median(made[f'{name} chi2'][rows]):.2f}"
        )
    lost = np.flatnonzero((made["snr"] >= 100) & (gain <= 0))
    if lost.size:
        report("  lost at S/N 100 and more:   S/N   Sérsic n  r_eff [px]  chi2/pixel  gain of ln L")
    for i in lost[np.argsort(gain[lost])]:
        n, r = made["sersic params"][i, [4, 3]]
        report(
            f"  {'':26s}{made['snr'][i]:6.0f}   {n:8.2f}  {r:10.2f}  "
            f"{made['sersic chi2'][i]:10.2f}  {gain[i]:12.1f}"
        )


if __name__ == "__main__":
    main()
