"""Simulated single-Sersic galaxies with GalSim truth and their Cramer-Rao floor.

The set is the one on which fitters of galaxies are compared here: 64x64 stamps, n uniform in
0.5-6, r_eff (semi-major) log-uniform in 2-10 pixels, q uniform in 0.2-1, total S/N
``sqrt(sum(model**2)) / sigma`` log-uniform in 20-200, a Moffat (beta 3) PSF with a FWHM of
3 pixels, white Gaussian noise, no background, centres anywhere within half a pixel of the
stamp's centre, any angle.

``python simulate.py --seed 1`` makes (and caches) a set and prints its floor.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

PARAMS = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
SIZE = 64
FWHM = 3.0
BETA = 3.0
OVERSAMPLING = 4
VERSION = 1  # raise when the recipe changes, so that no old cache is read

# Steps of the central differences, fine against the scale on which the image changes and coarse
# against GalSim's interpolation error.
_STEPS = {"x_0": 0.02, "y_0": 0.02, "r_eff": 0.01, "n": 0.01, "ellip": 0.005, "theta": 0.01}


def _gsparams(accurate: bool = True):
    import galsim

    # Light that wraps around is spread over the whole, large box of the transform: at 2e-3 the
    # image differs from that at 1e-3 by 1e-7 of its peak.
    return galsim.GSParams(
        folding_threshold=2e-3 if accurate else 2e-2,
        maxk_threshold=1e-4,
        kvalue_accuracy=1e-6,
        maximum_fft_size=32768,
    )


def moffat(fwhm: float = FWHM, beta: float = BETA):
    """The PSF before the pixel, as a GalSim object."""
    import galsim

    return galsim.Moffat(beta=beta, fwhm=fwhm, gsparams=_gsparams())


def render(params, *, psf=None, size: int = SIZE, accurate: bool = True) -> np.ndarray:
    """Draw one Sersic galaxy with GalSim.

    Parameters
    ----------
    params : sequence of 7 floats
        In the order of ``PARAMS``; centres with pixel (0, 0) centred on (0, 0), theta in radians.
    psf : galsim.GSObject, optional
        PSF before the pixel. Default: `moffat`.
    size : int
        Side of the square stamp.
    accurate : bool
        False allows a fainter halo to wrap around: fast, and enough for derivatives.

    Returns
    -------
    image : ndarray, (size, size)
        Convolved with PSF and pixel.
    """
    import galsim

    flux, x_0, y_0, r_eff, n, ellip, theta = (float(p) for p in params)
    gsp = _gsparams(accurate)
    q = 1 - ellip
    galaxy = galsim.Sersic(n=n, half_light_radius=r_eff * np.sqrt(q), flux=flux, gsparams=gsp)
    galaxy = galaxy.shear(q=q, beta=theta * galsim.radians)
    centre = (size - 1) / 2
    galaxy = galaxy.shift(x_0 - centre, y_0 - centre)
    scene = galsim.Convolve(galaxy, psf if psf is not None else moffat(), gsparams=gsp)
    return scene.drawImage(nx=size, ny=size, scale=1, dtype=float).array


def effective_psf(size: int, *, psf=None, oversampling: int = 1) -> np.ndarray:
    """PSF convolved with the pixel, sampled at ``1 / oversampling`` pixel steps, sum 1.

    ``size`` is the number of samples on a side; odd puts the peak on a sample.
    """
    import galsim

    gsp = _gsparams()
    both = galsim.Convolve(psf if psf is not None else moffat(), galsim.Pixel(1), gsparams=gsp)
    image = both.drawImage(
        nx=size, ny=size, scale=1 / oversampling, method="no_pixel", dtype=float
    ).array
    return image / image.sum()


def _jacobian(params) -> np.ndarray:
    """d image / d parameter, (7, ny, nx), by central differences of GalSim images."""
    params = np.asarray(params, float)
    rows = [render(params, accurate=False) / params[0]]
    for name in PARAMS[1:]:
        j = PARAMS.index(name)
        h = _STEPS[name] * (params[j] if name in ("r_eff", "n") else 1)
        low, high = params.copy(), params.copy()
        low[j] -= h
        high[j] += h
        # GalSim draws no q > 1 and no n outside 0.3-6.2: one-sided at those edges.
        if name == "ellip":
            low[j] = max(low[j], 0.0)
        if name == "n":
            high[j] = min(high[j], 6.2)
        rows.append(
            (render(high, accurate=False) - render(low, accurate=False)) / (high[j] - low[j])
        )
    return np.array(rows)


def _bound(jacobian: np.ndarray, sigma: float, background: bool) -> np.ndarray:
    """Cramer-Rao standard deviations of the 7 parameters, white noise."""
    design = jacobian.reshape(len(jacobian), -1) / sigma
    if background:
        design = np.vstack([design, np.full(design.shape[1], 1 / sigma)])
    # Scale to a unit diagonal: the parameters span many decades.
    fisher = design @ design.T
    scale = np.sqrt(np.diag(fisher))
    return (np.sqrt(np.diag(np.linalg.inv(fisher / np.outer(scale, scale)))) / scale)[:7]


def draw_truth(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (n, 7) with flux 1000, and total S/N (n,)."""
    truth = np.empty((n, 7))
    truth[:, 0] = 1000.0
    truth[:, 1:3] = (SIZE - 1) / 2 + rng.uniform(-0.5, 0.5, (n, 2))
    truth[:, 3] = 2 * 5 ** rng.random(n)
    truth[:, 4] = rng.uniform(0.5, 6, n)
    truth[:, 5] = 1 - rng.uniform(0.2, 1, n)
    truth[:, 6] = rng.uniform(0, np.pi, n)
    return truth, 20 * 10 ** rng.random(n)


def sersic_set(n: int = 200, seed: int = 1, *, cache: str | Path | None = "default") -> dict:
    """Make (or read from the cache) a set of simulated galaxies.

    Parameters
    ----------
    n : int
        Number of galaxies.
    seed : int
        Seed of the generator of truth and noise.
    cache : path, "default" or None
        Folder for the finished set. Default: ``$GALMORPH_BENCH_CACHE``, else a folder in the
        system's temporary one. None: neither read nor written.

    Returns
    -------
    dict of ndarray
        ``data``, ``noiseless`` (n, 64, 64); ``sigma``, ``snr`` (n,); ``truth`` (n, 7) in the order
        of ``params``; ``crb7``, ``crb8`` (n, 7), the Cramer-Rao standard deviations with the
        background known and with a free constant one; ``psf25``, ``psf51``: the effective PSF at
        pixel steps; ``psf_over``: 205x205 at steps of a quarter pixel (``oversampling`` 4), pixel
        included; ``params``.
    """
    if cache == "default":
        cache = os.environ.get("GALMORPH_BENCH_CACHE") or (
            Path(tempfile.gettempdir()) / "galmorph-benchmarks"
        )
    path = None if cache is None else Path(cache) / f"sersic_v{VERSION}_n{n}_seed{seed}.npz"
    if path is not None and path.exists():
        with np.load(path) as stored:
            return dict(stored)

    rng = np.random.default_rng(seed)
    truth, snr = draw_truth(n, rng)
    noiseless = np.empty((n, SIZE, SIZE))
    crb7, crb8 = np.empty((n, 7)), np.empty((n, 7))
    sigma = np.empty(n)
    for i in range(n):
        noiseless[i] = render(truth[i])
        sigma[i] = np.sqrt((noiseless[i] ** 2).sum()) / snr[i]
        jacobian = _jacobian(truth[i])
        crb7[i] = _bound(jacobian, sigma[i], background=False)
        crb8[i] = _bound(jacobian, sigma[i], background=True)
    data = noiseless + sigma[:, None, None] * rng.standard_normal(noiseless.shape)
    made = {
        "data": data,
        "noiseless": noiseless,
        "sigma": sigma,
        "snr": snr,
        "truth": truth,
        "crb7": crb7,
        "crb8": crb8,
        "psf25": effective_psf(25),
        "psf51": effective_psf(51),
        "psf_over": effective_psf(51 * OVERSAMPLING + 1, oversampling=OVERSAMPLING),
        "oversampling": np.array(OVERSAMPLING),
        "params": np.array(PARAMS),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **made)
        partial.replace(path)
    return made


def floor(made: dict, *, background: bool) -> dict[str, np.ndarray]:
    """0.6745 sigma_CRB / truth of flux, r_eff, n and q, each (n,): the perfect median error."""
    bound = made["crb8" if background else "crb7"]
    truth = made["truth"]
    true = {"flux": truth[:, 0], "r_eff": truth[:, 3], "n": truth[:, 4], "q": 1 - truth[:, 5]}
    column = {"flux": 0, "r_eff": 3, "n": 4, "q": 5}
    return {k: 0.6745 * bound[:, column[k]] / true[k] for k in true}


def main() -> None:
    """Make sets from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="galaxies (default 200)")
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="one or more seeds")
    parser.add_argument("--cache", default="default", help="folder for the finished sets")
    args = parser.parse_args()
    for seed in args.seed:
        made = sersic_set(args.n, seed, cache=args.cache)
        for background in (False, True):
            values = {k: np.median(v) for k, v in floor(made, background=background).items()}
            print(
                f"seed {seed}, {7 + background} parameters, median 0.6745 sigma/truth: "
                + ", ".join(f"{k} {v:.4f}" for k, v in values.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
