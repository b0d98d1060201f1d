"""Train the conditional prior "redshift": latents, size and magnitude of galaxies given redshift.

python benchmarks/train_redshift.py --stamps STAMPS.npz ... [--latents CACHE.npz ...] [--out FILE]

STAMPS are made by ``train_default/prepare.py``.  The encoder of LearnedGalaxy2D tells the
posterior of the latents of each galaxy on them (MAPFitter, which believes the noise of the
pixels, bends galaxies this bright too far); with --latents these are kept in, or read from, a
file.

The nearby galaxies of SDSS have no redshifts in these data.  Their *shapes* are real; where they
are, how luminous and how large, is drawn here (`population`):

* ln(1 + z) is uniform, 0.1 < z < 4.2: no real survey, so that any prior on redshift can be put on;
* luminosities follow a Schechter function, M* = -21.2, alpha = -1.05 (Blanton et al. 2003, ApJ
  592, 819, r band, h = 0.7), down to the magnitude limit; the spectrum is flat in f_nu and
  does not evolve (K-correction and evolution about cancel at the knee of the function: M* = -21.2
  is within 0.5 mag of that of Lyman-break galaxies in their UV at z = 3);
* early types (fitted n > 2.5) are 15 % of the faint and 65 % of the luminous galaxies (after
  Baldry et al. 2004, ApJ 600, 681);
* sizes follow Shen et al. (2003, MNRAS 343, 978), r band, by type and luminosity, with their
  scatter, divided by (1 + z) (about that of Shibuya, Ouchi & Harikane 2015, ApJS 219, 15);
* galaxies are kept that HST/ACS would find in COSMOS: 19 < I < 26, 0.05" < r_50 < 0.5".

So shapes know of redshift only through luminosity, and only as far as the two types differ.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _common import one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from astropy.cosmology import Planck18  # noqa: E402

from galmorph import EncoderFitter, LearnedGalaxy2D, fit_images  # noqa: E402
from galmorph.conditional import ConditionalPrior  # noqa: E402
from galmorph.detection import gaussian_psf  # noqa: E402

torch.set_num_threads(1)

REDSHIFTS = (0.1, 4.2)
MAGNITUDES = (19.0, 26.0)
SIZES = (0.05, 0.5)
KNEE, SLOPE = -21.2, -1.05
FEATURES = (*(f"z{i}" for i in range(32)), "ln_r_50", "magnitude")


# -- shapes --------------------------------------------------------------------------------


def fitted(stamps: Path, cache: Path | None) -> dict[str, np.ndarray]:
    """Parameters, covariances, flags and splits of the real galaxies of a file of stamps."""
    if cache is not None and cache.exists():
        with np.load(cache) as file:
            return {k: file[k] for k in ("params", "cov", "flags", "split", "source")}
    with np.load(stamps) as file:
        real = file["source"] != "simulated"
        image, weight = file["image"][real], file["weight"][real]
        fwhm = np.round(file["psf_fwhm"][real] * 5) / 5
        found = {"split": file["split"][real], "source": file["source"][real]}
    psfs = {value: gaussian_psf(float(value)) for value in np.unique(fwhm)}
    result = fit_images(
        image.astype(float),
        LearnedGalaxy2D.from_pretrained(),
        EncoderFitter(),
        uncertainty=np.where(weight > 0, 1 / np.where(weight > 0, weight, 1), np.nan),
        mask=weight <= 0,
        psf=[psfs[value] for value in fwhm],
        background="constant",
    )
    found |= {"params": result.params, "cov": result.cov, "flags": result.flags}
    if cache is not None:
        np.savez(cache, **found)
    return found


class Shapes:
    """Draws from the posteriors of the latents of real galaxies.

    A galaxy has four equivalent orientations (turned by half a turn, mirrored), and its latents
    change their signs with them: each draw is in a random one.
    """

    def __init__(self, fits: list[dict], *, held_out: bool, draws: int, rng) -> None:
        self.model = LearnedGalaxy2D.from_pretrained()
        params, cov = (
            np.concatenate([f[name][self._use(f, held_out)] for f in fits]).astype(float)
            for name in ("params", "cov")
        )
        mean, cov = params[:, 5:], cov[:, 5:, 5:]
        value, vector = np.linalg.eigh(cov)
        root = vector * np.sqrt(value.clip(0))[:, None]
        noise = rng.standard_normal((len(mean), draws, mean.shape[1]))
        draw = mean[:, None] + np.einsum("nij,nsj->nsi", root, noise)
        decoder = self.model.shape.vae.decoder
        signs = np.concatenate([np.ones((1, mean.shape[1])), decoder.signs.numpy()])
        self.mean, self.draws = mean, draw * signs[rng.integers(4, size=draw.shape[:2])]
        self.log_prior = self.model.prior.log_prob(self.draws)
        self.index = np.exp(decoder.index[0] + decoder.index[1] * mean[:, 0])
        self.ratio = 1 / (1 + np.exp(-(decoder.ratio[0] + decoder.ratio[1] * mean[:, 1])))
        self.early = np.flatnonzero(self.index > 2.5)
        self.late = np.flatnonzero(self.index <= 2.5)

    @staticmethod
    def _use(fits: dict, held_out: bool) -> np.ndarray:
        """Galaxies of SDSS and KiDS; none of HST, which are kept for the test."""
        space = np.isin(fits["source"], ("hst", "xdf_f105w", "xdf_f160w"))
        good = np.isfinite(fits["params"]).all(1) & np.isfinite(fits["cov"]).all((1, 2))
        # a posterior that is wider than the prior, or ran away from it, is none
        std = np.sqrt(np.diagonal(fits["cov"], axis1=1, axis2=2)[:, 5:])
        sane = (np.abs(fits["params"][:, 5:]).max(1) < 5) & (std.max(1) < 1.5)
        return good & sane & ~space & ((fits["split"] != 0) == held_out)


# -- the population ------------------------------------------------------------------------


def modulus(z: np.ndarray) -> np.ndarray:
    """Magnitude minus absolute magnitude for a spectrum flat in frequency."""
    grid = np.linspace(np.log(1.02), np.log(6.0), 2000)
    values = Planck18.distmod(np.expm1(grid)).value - 2.5 * grid / np.log(10)
    return np.interp(np.log1p(z), grid, values)


def kpc_per_arcsec(z: np.ndarray) -> np.ndarray:
    grid = np.linspace(np.log(1.02), np.log(6.0), 2000)
    values = 1 / Planck18.arcsec_per_kpc_proper(np.expm1(grid)).value
    return np.interp(np.log1p(z), grid, values)


def luminosities(faintest: np.ndarray, rng) -> np.ndarray:
    """Absolute magnitudes from a Schechter function, down to a limit for each."""
    grid = np.linspace(-24.5, -8.0, 4000)
    light = 10 ** (-0.4 * (grid - KNEE))
    total = np.concatenate([[0], np.cumsum(light ** (SLOPE + 1) * np.exp(-light))[:-1]])
    share = rng.random(faintest.shape) * np.interp(faintest, grid, total)
    return np.interp(share, total, grid)


def radii(magnitude: np.ndarray, early: np.ndarray, rng) -> np.ndarray:
    """Half-light radii in kpc at z = 0: Shen et al. (2003), their table 1, r band."""
    knee = -20.91
    late = -0.4 * 0.26 * magnitude + 0.25 * np.log10(1 + 10 ** (-0.4 * (magnitude - knee))) - 1.71
    mean = np.where(early, -0.4 * 0.60 * magnitude - 4.63, late)
    # their relation of early types is not for dwarfs, which are as large as late ones
    mean = np.where(early & (magnitude > -19), np.maximum(mean, late - 0.2), mean)
    scatter = 0.27 + 0.18 / (1 + 10 ** (-0.8 * (magnitude - knee)))
    return 10**mean * np.exp(scatter * rng.standard_normal(mean.shape))


def population(shapes: Shapes, n: int, rng) -> dict[str, np.ndarray]:
    """Redshifts, magnitudes, radii (arcsec, semi-major) and rows of shapes of n galaxies."""
    kept: list[dict] = []
    while sum(len(k["redshift"]) for k in kept) < n:
        count = 4 * n
        z = np.expm1(rng.uniform(*np.log1p(REDSHIFTS), count))
        absolute = luminosities(MAGNITUDES[1] - modulus(z), rng)
        early = rng.random(count) < 0.15 + 0.5 / (1 + np.exp((absolute + 20.5) / 0.8))
        row = np.where(early, rng.choice(shapes.early, count), rng.choice(shapes.late, count))
        kpc = radii(absolute, early, rng) / (1 + z) / np.sqrt(shapes.ratio[row])
        found = {
            "redshift": z,
            "magnitude": absolute + modulus(z),
            "r_50": kpc / kpc_per_arcsec(z),
            "row": row,
        }
        inside = (found["magnitude"] > MAGNITUDES[0]) & (found["magnitude"] < MAGNITUDES[1])
        inside &= (found["r_50"] > SIZES[0]) & (found["r_50"] < SIZES[1])
        kept.append({k: v[inside] for k, v in found.items()})
    return {k: np.concatenate([part[k] for part in kept])[:n] for k in kept[0]}


def training_set(shapes: Shapes, n: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Draws (n, S, F) of features, the prior of their latents, redshifts, and the population."""
    made = population(shapes, n, rng)
    latents = shapes.draws[made["row"]]
    seen = np.stack([np.log(made["r_50"]), made["magnitude"]], -1)[:, None]
    seen = np.broadcast_to(seen, (*latents.shape[:2], 2))
    features = np.concatenate([latents, seen], -1)
    return features, shapes.log_prior[made["row"]], made["redshift"], made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stamps", type=Path, nargs="+", required=True)
    parser.add_argument("--latents", type=Path, nargs="+", default=None)
    parser.add_argument("--n", type=int, default=8000, help="galaxies of the training set")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("redshift.conditional"))
    args = parser.parse_args()
    caches = args.latents or [None] * len(args.stamps)
    fits = [fitted(s, c) for s, c in zip(args.stamps, caches, strict=True)]
    rng = np.random.default_rng(args.seed)
    shapes = Shapes(fits, held_out=False, draws=args.draws, rng=rng)
    features, log_prior, redshift, _ = training_set(shapes, args.n, rng)
    started = time.process_time()

    def report(epoch: int, train: float, held_out: float) -> None:
        print(
            f"epoch {epoch:3d}  ln L a galaxy: training {train:8.3f}, held out {held_out:8.3f}  "
            f"{time.process_time() - started:6.0f} s",
            flush=True,
        )

    prior = ConditionalPrior(FEATURES, ["redshift"])
    prior.fit(
        features,
        {"redshift": redshift},
        log_prior=log_prior,
        at_once=6,
        epochs=args.epochs,
        rng=rng,
        report=report,
    )
    prior.metadata = {
        "training_data": f"{len(shapes.mean)} galaxies of SDSS and KiDS, at {args.n} redshifts",
        "script": "benchmarks/train_redshift.py",
        "seed": args.seed,
        "licence": "BSD-3-Clause",
        "weights": "galmorph",
    }
    prior.write(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
