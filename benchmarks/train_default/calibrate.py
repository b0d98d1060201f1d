"""Measure the asinh stretch (Q) and the noise of the SDSS JPEG sets.

    python benchmarks/train_default/calibrate.py --data FOLDER

Q: a bright and a faint star of one image must have one width once the stretch
is undone.  Noise: scatter of the pixels about their neighbours, in grey levels,
as a function of the brightness.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits
from scipy import ndimage

HALF = {"vagc": 11, "gz2": 8, "efigi": 6}  # of the box a star is measured in, pixels
GRID = np.arange(3.0, 20.5, 0.5)


def compact_sources(image: np.ndarray, half: int) -> list[tuple[float, float]]:
    """(x, y) of the small, isolated sources of a stretched image, off the central galaxy."""
    ny, nx = image.shape
    smooth = ndimage.gaussian_filter(image, 1.0)
    labels, n = ndimage.label(smooth > np.median(image) + 0.06)
    if n < 2:
        return []
    index = np.arange(1, n + 1)
    area = ndimage.sum_labels(np.ones_like(image), labels, index)
    y, x = np.array(ndimage.maximum_position(smooth, labels, index), float).T
    inside = (x > half) & (x < nx - 1 - half) & (y > half) & (y < ny - 1 - half)
    distance = np.hypot(x[:, None] - x, y[:, None] - y) + 1e3 * np.eye(n)
    off_centre = np.hypot(x - nx / 2, y - ny / 2) > 15
    good = (
        inside
        & off_centre
        & (distance.min(axis=1) > 1.3 * half)
        & (area > 6)
        & (area < 3 * half**2)
    )
    return list(zip(x[good], y[good], strict=True))


def width(linear: np.ndarray, half: int, x: float, y: float) -> tuple[float, float]:
    """Gaussian-weighted width (sigma, pixels) and axis ratio of a source, or NaN."""
    j, i = round(x), round(y)
    box = linear[i - half : i + half + 1, j - half : j + half + 1]
    edge = np.concatenate([box[0], box[-1], box[1:-1, 0], box[1:-1, -1]])
    box = box - np.median(edge)
    v, u = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    cu, cv, s2, q = x - j, y - i, 2.5, 1.0
    for _ in range(40):
        weight = box * np.exp(-((u - cu) ** 2 + (v - cv) ** 2) / (2 * s2))
        total = weight.sum()
        if total <= 0:
            return np.nan, np.nan
        cu, cv = (weight * u).sum() / total, (weight * v).sum() / total
        xx = (weight * (u - cu) ** 2).sum() / total
        yy = (weight * (v - cv) ** 2).sum() / total
        xy = (weight * (u - cu) * (v - cv)).sum() / total
        # The weight has the width of the star: the product has half its variance.
        new = xx + yy
        if not 0.3 < new < 30 or np.hypot(cu, cv) > half:
            return np.nan, np.nan
        root = np.hypot(xx - yy, 2 * xy)
        q = np.sqrt(max(xx + yy - root, 0) / (xx + yy + root))
        if abs(new - s2) < 1e-4 * s2:
            break
        s2 = new
    return np.sqrt(s2), q


def stretch_of(
    images: np.ndarray, half: int, n_images: int, rng: np.random.Generator
) -> np.ndarray:
    """Q of each pair of a bright and a faint star; shape (n_pairs,)."""
    found = []
    for row in rng.permutation(len(images))[:n_images]:
        f = images[row] / 255.0
        stars = compact_sources(f, half)
        if len(stars) < 2:
            continue
        peak = np.array([f[round(y), round(x)] for x, y in stars])
        a, b = int(np.argmax(peak)), int(np.argmin(np.where(peak > 0.15, peak, 9)))
        if not (peak[a] < 0.95 and peak[b] > 0.15 and peak[a] - peak[b] > 0.15):
            continue
        ratio = []
        for q in GRID:
            linear = np.sinh(q * f)
            (wa, qa), (wb, qb) = width(linear, half, *stars[a]), width(linear, half, *stars[b])
            ratio.append(np.log(wa / wb) if min(qa, qb) > 0.8 else np.nan)
        ratio = np.array(ratio)
        if np.isnan(ratio).any():
            continue
        sign = np.flatnonzero(np.diff(np.sign(ratio)))
        if len(sign) == 1:
            k = sign[0]
            found.append(GRID[k] - ratio[k] * (GRID[k + 1] - GRID[k]) / (ratio[k + 1] - ratio[k]))
        else:  # out of the grid: keep the pair, at the end it points to
            found.append(GRID[0] if ratio.mean() < 0 else GRID[-1])
    return np.array(found)


def grey_noise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scatter in grey levels of the pixels about a local plane, by brightness."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6.0
    edges = np.array([0, 10, 20, 40, 60, 80, 100, 130, 160, 200, 250])
    centre = slice(images.shape[1] // 2 - 20, images.shape[1] // 2 + 20)
    high, level = [], []
    for image in images:
        image = image.astype(float)
        high.append(ndimage.convolve(image, kernel)[centre, centre].ravel())
        level.append(ndimage.uniform_filter(image, 3)[centre, centre].ravel())
    high, level = np.concatenate(high), np.concatenate(level)
    where = np.digitize(level, edges)
    scatter = [_clipped_std(high[where == k]) for k in range(1, len(edges))]
    return (edges[1:] + edges[:-1]) / 2, np.array(scatter)


def _clipped_std(values: np.ndarray) -> float:
    for _ in range(4):
        values = values[np.abs(values) < 3.5 * values.std() + 1e-9]
    return float(values.std()) if len(values) else np.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the FITS files")
    parser.add_argument("--n-images", type=int, default=7000, help="images per set")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("vagc", "gz2", "efigi"):
        images = fits.getdata(arguments.data / f"{name}.fits", "IMAGES")
        q = stretch_of(images, HALF[name], arguments.n_images, np.random.default_rng(1))
        if len(q):
            low, middle, high = np.percentile(q, [16, 50, 84])
            error = 1.25 * (high - low) / 2 / np.sqrt(len(q))
            print(f"{name}: {len(q)} pairs, Q = {middle:.2f} +- {error:.2f} ({low:.1f}-{high:.1f})")
        level, scatter = grey_noise(images[:600])
        print("  grey level  ", " ".join(f"{v:6.0f}" for v in level))
        print("  scatter     ", " ".join(f"{v:6.2f}" for v in scatter), flush=True)


if __name__ == "__main__":
    main()
