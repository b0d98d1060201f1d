"""Fit the populations of shapes that come with galmorph.

    python benchmarks/train_default/prepare.py --data FOLDER --out galaxies.npz     (and for EFIGI)
    python benchmarks/train_population.py --galaxies galaxies.npz efigi.npz \\
        --fits fits.npz --out galmorph/pretrained

Every galaxy of Galaxy Zoo 2 and EFIGI is fitted with the learned galaxy, and 3,000 of those for
training with a bulge and a disk (Sersic fits are in the files already); the fits are kept in
``--fits``.  Then mixtures of normals are fitted to the shapes of the training galaxies, with the
errors of the latents taken into account.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from synthetic import load, logit, read_fits  # noqa: E402

from galmorph import BulgeDiskGalaxy2D, LearnedGalaxy2D, fit_images  # noqa: E402
from galmorph.detection import gaussian_psf  # noqa: E402
from galmorph.nets.flow import Population  # noqa: E402

COMPONENTS = {"default": 6, "sersic": 6, "bulge_disk": 6}
N_BULGE_DISK = 3000
LEARNED, LIMIT = "default", 6.0  # the bounds of the latents in fits
DATA = "Galaxy Zoo 2 and EFIGI (SDSS), the training part of benchmarks/train_default"


def fit(model, data: dict, rows: np.ndarray):
    """Fits of some stamps, those of one width of the PSF together."""
    width = np.exp(np.round(np.log(data["psf_fwhm"][rows]) / 0.1) * 0.1)
    size = len(model.param_names)
    params, cov = np.full((len(rows), size), np.nan), np.full((len(rows), size, size), np.nan)
    for value in np.unique(width):
        same = np.flatnonzero(width == value)
        weight = data["weight"][rows[same]]
        result = fit_images(
            data["image"][rows[same]].astype(float),
            model,
            uncertainty=np.where(weight > 0, 1 / np.where(weight > 0, weight, 1.0), 1.0),
            mask=weight <= 0,
            psf=gaussian_psf(float(value)),
            background="constant",
        )
        params[same], cov[same] = result.params, result.cov
        print(f"{type(model).__name__}: FWHM {value:.2f}, {len(same)} galaxies", flush=True)
    return params, cov


def fitted(path: Path, data: dict) -> dict[str, np.ndarray]:
    """The fits, made if they are not there."""
    if not path.exists():
        rows = np.arange(len(data["split"]))
        params, cov = fit(LearnedGalaxy2D.from_pretrained(), data, rows)
        learn = np.flatnonzero(data["split"] == 0)
        some = np.random.default_rng(1).permutation(learn)[:N_BULGE_DISK]
        parts, _ = fit(BulgeDiskGalaxy2D(), data, some)
        np.savez(
            path,
            rows=rows,
            params=params.astype(np.float32),
            cov=cov.astype(np.float32),
            bulge_disk_rows=some,
            bulge_disk=parts,
        )
    return read_fits(path, data)[0]


def sersic_shapes(params: np.ndarray) -> np.ndarray:
    """ln n and logit of the ellipticity, (N, 2)."""
    return np.stack([np.log(params[:, 4]), logit(params[:, 5] / 0.99)], 1)


def bulge_disk_shapes(params: np.ndarray) -> np.ndarray:
    """As `galmorph.synthetic` reads them, (N, 5)."""
    names = BulgeDiskGalaxy2D.param_names
    fraction, r_bulge, n, e_bulge, r_disk, e_disk = (
        params[:, names.index(name)]
        for name in ("bulge_fraction", "r_bulge", "n_bulge", "ellip_bulge", "r_disk", "ellip_disk")
    )
    columns = [logit(fraction), np.log(r_bulge / r_disk), np.log(n)]
    return np.stack([*columns, logit(e_bulge / 0.99), logit(e_disk / 0.99)], 1)


def main(argv: list[str] | None = None) -> int:
    """Fit, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--galaxies", nargs="+", required=True)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load(args.galaxies)
    fits = fitted(args.fits, data)
    sersic = sersic_shapes(data["sersic"][data["split"] == 0].astype(float))
    parts = bulge_disk_shapes(fits["bulge_disk"])
    exact = {"prior_precision": 0.0}
    tables = {
        LEARNED: (fits["params"][:, 5:], fits["cov"][:, 5:, 5:], {}),
        "sersic": (sersic, np.zeros((*sersic.shape, 2)), exact),
        "bulge_disk": (parts, np.zeros((*parts.shape, 5)), exact),
    }
    for name, (values, cov, options) in tables.items():
        population = Population.fit(
            values, cov, kind="mixture", n_components=COMPONENTS[name], rng=1, **options
        )
        count = int(np.isfinite(values).all(1).sum())
        population.metadata = {"training_data": DATA, "galaxies": count, "licence": "BSD-3-Clause"}
        if name == LEARNED:
            population.metadata["limit"] = LIMIT
        population.write(args.out / f"{name}.population")
        print(name, count, "galaxies,", (args.out / f"{name}.population").stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
