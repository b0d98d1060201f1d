"""Rate and distortion: the learned galaxy beside the beta-VAE, both with 32 latents.

    python benchmarks/reconstruction.py --data FOLDER --n 300

Held-out images of Galaxy Zoo 2 and EFIGI, as the beta-VAE takes them: grey levels from 0 to 1, with
their asinh stretch, 64 x 64 pixels.  The learned galaxy is fitted to the linear images, with
uncertainties that are the same for all pixels after the stretch; the larger these are taken to be,
the fewer nats its posterior is from the prior.  Its divergence counts flux, place, size and
angle as well, from a normal prior with mean and width of all fitted galaxies (uniform in angle).
Neighbours are in the error of both; the learned galaxy draws none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from train_published import stretched  # noqa: E402

from galmorph import GalaxyVAE, LearnedGalaxy2D, MAPFitter, fit_images  # noqa: E402
from galmorph.nets.vae import divergence  # noqa: E402
from galmorph.sdss import unstretch  # noqa: E402

Q = 9.0


def of_the_vae(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drawn images from 0 to 1, and nats."""
    vae = GalaxyVAE.from_pretrained(name)
    drawn, _ = vae.reconstruct(images)
    with torch.no_grad():
        told = vae.encode(torch.as_tensor(images, dtype=torch.float32))
        nats = divergence(told, vae.prior(), told.mean)
    return drawn / 255, nats.numpy()


def of_the_fit(images: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    linear = unstretch(images)
    result = fit_images(
        linear,
        LearnedGalaxy2D.from_pretrained(),
        MAPFitter(),
        uncertainty=sigma * np.sqrt(1 + (Q * linear) ** 2),
        background="constant",
    )
    drawn = result.model_images + result.background[:, 0][:, None, None]
    return np.arcsinh(Q * drawn) / Q, _nats(result)


def _nats(result) -> np.ndarray:
    """Divergence of the normal posterior from the prior, geometry included."""
    mean, cov = result.params.copy(), result.cov.copy()
    for i in (0, 3):  # flux and size in logarithms
        cov[:, i] /= result.params[:, i, None]
        cov[:, :, i] /= result.params[:, i, None]
        mean[:, i] = np.log(result.params[:, i])
    good = np.isfinite(cov).all((1, 2)) & np.isfinite(mean).all(1)
    centre, width = np.zeros(mean.shape[1]), np.ones(mean.shape[1])
    centre[:4], width[:4] = np.median(mean[good, :4], 0), mean[good, :4].std(0)
    nats = np.full(len(mean), np.nan)
    angle = 4
    for k in np.flatnonzero(good):
        var = np.diagonal(cov[k]) / width**2
        _, log_det = np.linalg.slogdet(cov[k] / np.multiply.outer(width, width))
        rest = ((mean[k] - centre) / width) ** 2
        normal = np.arange(len(var)) != angle
        nats[k] = 0.5 * (var[normal].sum() + rest[normal].sum() - normal.sum() - log_det)
        # of an angle the entropy counts, against that of a uniform one
        nats[k] += np.log(2 * np.pi) - 0.5 * np.log(2 * np.pi * np.e)
    return nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "reconstruction.txt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = Report("Reconstruction: the learned galaxy beside the beta-VAE")
    seen = stretched(args.data, (64, 64)).split(True)
    rows = np.random.default_rng(1).permutation(len(seen.images))[: args.n]
    images = seen.images[rows]
    y, x = np.mgrid[:64, :64] - 31.5
    middle = np.hypot(x, y) < 20
    say(f"{len(images)} held-out galaxies; squared error per pixel of images from 0 to 1")
    say(f"\n  {'':28s} all pixels   within 20 pixels   nats (median)   galaxies better than")
    say(f"  {'':28s} (mean)       (mean)                             the beta-VAE, all pixels")
    drawn, nats = of_the_vae("beta_vae", images)
    rival = _errors(drawn, images, middle)
    _line(say, "beta_vae (beta = 0.1)", rival, nats, rival)
    for sigma in (0.01, 0.02, 0.04, 0.08, 0.16):
        drawn, nats = of_the_fit(images, sigma)
        _line(say, f"galmorph, sigma = {sigma:g}", _errors(drawn, images, middle), nats, rival)
    say.write(args.out)


def _errors(drawn: np.ndarray, images: np.ndarray, middle: np.ndarray) -> np.ndarray:
    square = (drawn - images / 255) ** 2
    return np.stack([square.mean((1, 2)), square[:, middle].mean(1)], -1)


def _line(say, name: str, error: np.ndarray, nats: np.ndarray, rival: np.ndarray) -> None:
    good = np.isfinite(error).all(1) & np.isfinite(nats)
    mean = error[good].mean(0)
    wins = (error[good, 0] < rival[good, 0]).mean()
    say(
        f"  {name:28s} {mean[0]:.2e}     {mean[1]:.2e}          {np.median(nats[good]):6.1f}"
        f"          {100 * wins:5.1f} %   ({(~good).sum()} failed)"
    )


if __name__ == "__main__":
    main()
