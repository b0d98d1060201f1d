"""The published test of a learned galaxy model, on galaxies that it was not trained on.

Two fractions (Regier, McAuliffe & Prabhat 2015), of 1,000 held-out images of Galaxy Zoo 2:

1. the reconstruction has a lower mean squared error (MSE) over the pixels than the best-fitting
   scaled bivariate Gaussian, x_hat (free flux, centre and three covariance terms, least squares
   over the same pixels);
2. the pixels are more probable under N(f_mu(g_mu(x)), f_sigma(g_mu(x))) than under
   N(x_hat, sigma I) for every sigma > 0, whose supremum is -(m/2) [log(2 pi MSE) + 1].

``python published_test.py --data FOLDER --weights regier2015``; FOLDER holds gz2.fits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import _galaxy_zoo as gz
from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402

PUBLISHED = {"error": 97.1, "likelihood": 97.2}
WIDTHS = (2.0, 4.0, 8.0, 16.0, 32.0)  # standard deviations, pixels, that fits start from
CHUNK = 125


def main() -> None:
    args = parse()
    import torch

    from galmorph import GalaxyVAE

    torch.set_num_threads(1)
    report = Report("The published test: learned against the best-fitting bivariate Gaussian")
    images, _ = gz.read(args.data)
    _, held = gz.split(len(images))
    x = gz.resample(images[held]).astype(float)
    report(f"{len(x)} held-out galaxies of {len(images)} (seed {gz.SEED}), {x.shape[1:]} pixels")
    best = gaussian_errors(x, report)
    check_with_scipy(x, best, args.check, report)
    for name in args.weights:
        vae = GalaxyVAE.from_pretrained(name)
        state_result(name, x, best, vae.reconstruct(x), report)
    report.write(args.output)


def state_result(name: str, x, gaussian, reconstruction, report: Report) -> None:
    """Both fractions of one network, with binomial errors, and by how much."""
    mean, std = (a.astype(float) for a in reconstruction)
    error = ((x - mean) ** 2).mean((1, 2))
    each = -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)
    m = x[0].size
    gain = each.sum((1, 2)) + 0.5 * m * (np.log(2 * math.pi * gaussian) + 1)
    report(f"\n{name}")
    for what, wins in {"error": error < gaussian, "likelihood": gain > 0}.items():
        p = wins.mean()
        label = {"error": "lower mean squared error", "likelihood": "more probable pixels"}[what]
        report(
            f"  {label:26s} {100 * p:5.1f} +/- {100 * math.sqrt(p * (1 - p) / len(wins)):.1f} %"
            f"   (published: {PUBLISHED[what]} %)"
        )
    ratio, gain = (np.percentile(v, [1, 16, 50, 84, 99]) for v in (error / gaussian, gain / m))
    report(
        "                                    1 %     16 %     50 %     84 %     99 % of galaxies"
    )
    report(f"  MSE / MSE of the Gaussian  {' '.join(f'{v:8.3f}' for v in ratio)}")
    report(f"  log-likelihood gain/pixel  {' '.join(f'{v:8.3f}' for v in gain)}")


# -- the best-fitting Gaussian ---------------------------------------------------------------


def gaussian_errors(x: np.ndarray, report: Report) -> np.ndarray:
    """Mean squared error of the best Gaussian of each image, over all starts.

    Every image is fitted from round Gaussians of five widths at its centre, and of three at the
    peak of its smoothed version, which may be a neighbour.
    """
    from scipy.ndimage import uniform_filter

    n, ny, nx = x.shape
    smooth = uniform_filter(x, (0, 5, 5))
    py, px = np.unravel_index(smooth.reshape(n, -1).argmax(1), (ny, nx))
    centres = np.tile([(nx - 1) / 2, (ny - 1) / 2], (n, 1))
    peaks = np.stack([px, py], 1).astype(float)
    starts = [(centres, w) for w in WIDTHS] + [(peaks, w) for w in WIDTHS[:3]]
    errors = np.empty((len(starts), n))
    for k, (where, width) in enumerate(starts):
        for at in range(0, n, CHUNK):
            rows = slice(at, at + CHUNK)
            p = np.zeros((len(x[rows]), 6))
            p[:, 0], p[:, 1:3] = smooth[rows].max((1, 2)), where[rows]
            p[:, 3] = p[:, 5] = 1 / width
            errors[k, rows] = levenberg_marquardt(x[rows], p)
    best = errors.min(0)
    near = (errors < 1.0001 * best).sum(0)
    report(
        f"Gaussian: {len(starts)} starts; {np.mean(near >= 2):.1%} of the optima were found from "
        f"two starts or more; median root mean square {np.sqrt(np.median(best)):.2f}"
    )
    return best


def gaussian(p: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, m) and derivatives (N, 6, m) of A exp(-(u^2 + v^2) / 2).

    Here u = a (x - x_0) and v = b (x - x_0) + c (y - y_0): any covariance, always positive
    definite.
    """
    y, x = (g.ravel().astype(float) for g in np.mgrid[: shape[0], : shape[1]])
    amplitude, x_0, y_0, a, b, c = (p[:, k, None] for k in range(6))
    dx, dy = x - x_0, y - y_0
    u, v = a * dx, b * dx + c * dy
    unit = np.exp(-0.5 * (u * u + v * v))
    f = amplitude * unit
    slopes = [unit, f * (u * a + v * b), f * v * c, -f * u * dx, -f * v * dx, -f * v * dy]
    return f, np.stack(slopes, 1)


def levenberg_marquardt(images: np.ndarray, p: np.ndarray, iterations: int = 200) -> np.ndarray:
    """Least squares of all images at once, from ``p`` (changed in place); mean squared errors."""
    data, shape = images.reshape(len(images), -1), images.shape[1:]
    damping = np.full(len(data), 1e-2)
    cost = ((data - gaussian(p, shape)[0]) ** 2).mean(1)
    live = np.ones(len(data), bool)
    for _ in range(iterations):
        i = np.flatnonzero(live)
        if not i.size:
            break
        f, jacobian = gaussian(p[i], shape)
        normal = jacobian @ jacobian.transpose(0, 2, 1)
        gradient = jacobian @ (data[i] - f)[:, :, None]
        diagonal = np.einsum("nii->ni", normal)
        diagonal += damping[i, None] * diagonal + 1e-9
        trial = p[i] + np.linalg.solve(normal, gradient)[:, :, 0]
        new = ((data[i] - gaussian(trial, shape)[0]) ** 2).mean(1)
        better = np.isfinite(new) & (new <= cost[i])
        settled = better & (cost[i] - new < 1e-9 * cost[i])
        p[i[better]], cost[i[better]] = trial[better], new[better]
        damping[i] = np.clip(np.where(better, damping[i] / 5, damping[i] * 5), 1e-9, 1e9)
        live[i[settled | (damping[i] > 1e8)]] = False
    return cost


def check_with_scipy(x: np.ndarray, best: np.ndarray, number: int, report: Report) -> None:
    """Fit some images by scipy, with another parametrisation, from starts by chance."""
    from scipy.optimize import least_squares

    rng = np.random.default_rng(7)
    rows = rng.choice(len(x), number, replace=False)
    ny, nx = x.shape[1:]
    yy, xx = np.mgrid[:ny, :nx]

    def residual(p, image):
        flux, x_0, y_0, log_major, log_minor, angle = p
        dx, dy = xx - x_0, yy - y_0
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / np.exp(log_major)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / np.exp(log_minor)
        return (flux * np.exp(-0.5 * (u * u + v * v)) - image).ravel()

    worst = 0.0
    for row in rows:
        theirs = np.inf
        for _ in range(4):
            middle = (nx - 1) / 2 + rng.normal(0, 2), (ny - 1) / 2 + rng.normal(0, 2)
            widths = rng.uniform(np.log(3), np.log(16), 2)
            start = [x[row].max(), *middle, *widths, rng.uniform(0, np.pi)]
            fit = least_squares(residual, start, args=(x[row],), max_nfev=200, x_scale="jac")
            theirs = min(theirs, 2 * fit.cost / x[row].size)
        worst = max(worst, best[row] / theirs - 1)
    report(
        f"scipy, four starts by chance, {number} of them: its MSE is lower by "
        f"{100 * max(worst, 0.0):.4f} % at most"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds gz2.fits")
    parser.add_argument("--weights", nargs="+", default=["regier2015"], metavar="NAME")
    parser.add_argument("--check", type=int, default=40, help="images fitted by scipy too")
    parser.add_argument("--output", type=Path, default=RESULTS / "published_test.txt")
    return parser.parse_args()


if __name__ == "__main__":
    main()
