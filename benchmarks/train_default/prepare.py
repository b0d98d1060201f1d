"""Turn images of real galaxies into stamps on which the learned galaxy is trained.

    python benchmarks/train_default/prepare.py --data FOLDER --out galaxies.npz

The stretch of the SDSS images is undone, neighbours are masked, every galaxy is
brought to a half-light radius of 5 to 9 pixels on a stamp of 64 x 64, and fitted
with a Sérsic profile.  README.rst beside this file says what was found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from astropy.io import fits
from scipy import ndimage

from galmorph import FitFlag, SersicGalaxy2D, fit_images
from galmorph.detection import detect
from galmorph.psf import PSF

SIZE = 64  # pixels of a stamp
TARGET, SMALLEST, LARGEST = 7.0, 5.0, 9.0  # r_eff in pixels: aimed at, and accepted
STRETCH = 9.0  # Q of f = asinh(Q I) / Q
SADDLE = 1.6  # peak over saddle from which on a part of the central segment is a companion
GREY_ERROR = 1.0  # standard deviation, in grey levels, of quantisation and JPEG
VAGC_FWHM = 6.3  # pixels: what the stars in it show, at about 0.2 arcsec a pixel
WIDTH = 2.0 * np.sqrt(2.0 * np.log(2.0))
BANDS = ("R", "G", "I")
XDF_FWHM = {"F160W": 5.2, "F105W": 4.6}  # pixels: the most compact source of each band


@dataclass
class Source:
    """What was measured on one image: enough to make its stamp."""

    sky: float = 0.0
    sigma: float = np.nan
    mask: np.ndarray | None = None
    center: tuple[float, float] = (np.nan, np.nan)
    r_half: float = np.nan
    fwhm: float = np.nan
    correlation: tuple[float, float, float] = (np.nan, np.nan, np.nan)


# ---------------------------------------------------------------- one image


def unstretch(grey: np.ndarray, q: float) -> np.ndarray:
    """Linear intensity of 8-bit grey levels; equal to ``grey / 255`` where faint."""
    return np.sinh(q / 255.0 * grey.astype(np.float64)) / q


def clipped(values: np.ndarray, n_iter: int = 5) -> tuple[float, float]:
    """Median and scatter of the sky, from its upper half: the lower one is cut at zero."""
    median, sigma = float(np.median(values)), np.inf
    for _ in range(n_iter):
        values = values[values < median + 2.5 * sigma]
        median = float(np.median(values))
        above = values[values >= median] - median
        sigma = max(float(np.percentile(above, 68.3)), 1e-9)
    return median, sigma


def sky_of(image: np.ndarray, dither: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Level, scatter and pixels (bool) of the sky."""
    border = np.ones(image.shape, bool)
    border[8:-8, 8:-8] = False
    noisy = image + dither
    level, sigma = clipped(noisy[border])
    sky = border
    for _ in range(2):
        smooth = ndimage.gaussian_filter(image, 1.5)
        bright = ndimage.binary_opening(smooth - level > 1.3 * sigma, iterations=2)
        free = ~ndimage.binary_dilation(bright, iterations=4)
        if free.sum() < 300:
            break
        sky = free
        level, sigma = clipped(noisy[sky])
    return level, sigma, sky


def segments(image: np.ndarray, sigma: float, center: tuple[float, float], contrast: float):
    """Labels of the sources, and the label of the central one (0: none)."""
    from photutils.segmentation import SegmentationImage, deblend_sources

    smooth = ndimage.gaussian_filter(image, 1.0)
    labels, n = ndimage.label(smooth > 1.5 * sigma)
    if n == 0:
        return labels, 0
    ny, nx = image.shape
    y, x = np.mgrid[:ny, :nx]
    near = np.hypot(x - center[0], y - center[1]) < 6
    inner = np.where(near & (labels > 0), smooth, -np.inf)
    peak = np.unravel_index(np.argmax(inner), inner.shape)
    if not np.isfinite(inner[peak]):
        return labels, 0
    main = labels[peak]
    # Noise is correlated: what is small or faint, off the galaxy, is no source.
    area = np.bincount(labels.ravel(), minlength=n + 1)
    top = ndimage.maximum(smooth, labels, np.arange(n + 1))
    unsure = (area < 12) | (top < 4 * sigma)
    unsure[main] = False
    labels[unsure[labels]] = 0
    own = (labels == main).astype(np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = deblend_sources(
            smooth, SegmentationImage(own), 8, n_levels=24, contrast=contrast, progress_bar=False
        ).data
    central = parts[peak]
    for part in np.unique(parts):
        if part in (0, central):
            continue
        piece = parts == part
        if stands_out(smooth, piece, (parts > 0) & ~piece):
            labels[piece] = n + 1
    return labels, int(main)


def stands_out(smooth: np.ndarray, piece: np.ndarray, rest: np.ndarray) -> bool:
    """Whether a peak rises far enough over its saddle to be a companion, not an arm or a knot."""
    saddle = smooth[piece & ndimage.binary_dilation(rest, iterations=1)]
    return not len(saddle) or bool(smooth[piece].max() > SADDLE * saddle.max())


def star_width(box: np.ndarray) -> tuple[float, float]:
    """Sigma in pixels and axis ratio by adaptive Gaussian moments; NaN if they fail."""
    half = box.shape[0] // 2
    v, u = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    cu = cv = 0.0
    s2 = 2.5
    for _ in range(40):
        light = box * np.exp(-((u - cu) ** 2 + (v - cv) ** 2) / (2 * s2))
        total = light.sum()
        if total <= 0:
            return np.nan, np.nan
        cu, cv = (light * u).sum() / total, (light * v).sum() / total
        xx = (light * (u - cu) ** 2).sum() / total
        yy = (light * (v - cv) ** 2).sum() / total
        xy = (light * (u - cu) * (v - cv)).sum() / total
        new = xx + yy  # light and weight alike: their product has half the variance
        if not 0.15 < new < 16 or np.hypot(cu, cv) > 2:
            return np.nan, np.nan
        if abs(new - s2) < 1e-4 * s2:
            root = np.hypot(xx - yy, 2 * xy)
            return float(np.sqrt(new)), float(np.sqrt(max(new - root, 0) / (new + root)))
        s2 = new
    return np.nan, np.nan


def narrowest(image: np.ndarray, labels: np.ndarray, main: int, sigma: float) -> float:
    """FWHM in pixels of the narrowest round companion that is well above the noise."""
    half, best = 8, np.nan
    ny, nx = image.shape
    for label in np.unique(labels):
        if label in (0, main):
            continue
        own = labels == label
        i, j = np.unravel_index(np.argmax(np.where(own, image, -np.inf)), image.shape)
        if not (half <= i < ny - half and half <= j < nx - half) or image[i, j] < 12 * sigma:
            continue
        window = np.s_[i - half : i + half + 1, j - half : j + half + 1]
        box = np.where(own[window] | (labels[window] == 0), image[window], 0.0)
        width, q = star_width(box)
        if q > 0.8:
            best = np.nanmin([best, WIDTH * width])
    return float(best)


def autocorrelation(image: np.ndarray, sky: np.ndarray, level: float, sigma: float):
    """Correlation of the sky's noise at lags of 1, 2 and 3 pixels."""
    good = sky & (np.abs(image - level) < 3 * sigma)
    if good.sum() < 200:
        return (np.nan,) * 3
    z = np.where(good, image - image[good].mean(), 0.0)
    variance = (z[good] ** 2).mean()
    found = []
    for k in (1, 2, 3):
        product = (z[:, k:] * z[:, :-k]).sum() + (z[k:] * z[:-k]).sum()
        pairs = (good[:, k:] & good[:, :-k]).sum() + (good[k:] & good[:-k]).sum()
        found.append(float(product / max(pairs, 1) / max(variance, 1e-20)))
    return tuple(found)


def half_light(image: np.ndarray, own: np.ndarray) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and semi-major half-light radius of the pixels of a segment."""
    y, x = np.nonzero(own)
    light = np.clip(image[own], 0, None)
    total = light.sum()
    if total <= 0 or len(x) < 12:
        return (np.nan, np.nan), np.nan
    cx, cy = (light * x).sum() / total, (light * y).sum() / total
    xx = (light * (x - cx) ** 2).sum() / total
    yy = (light * (y - cy) ** 2).sum() / total
    xy = (light * (x - cx) * (y - cy)).sum() / total
    root = np.hypot(xx - yy, 2 * xy)
    q = np.sqrt(max(xx + yy - root, 1e-6) / (xx + yy + root))
    angle = 0.5 * np.arctan2(2 * xy, xx - yy)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    radius = np.hypot(u, v / max(q, 0.1))
    order = np.argsort(radius)
    return (cx, cy), float(radius[order][np.searchsorted(np.cumsum(light[order]), total / 2)])


def measure(grey: np.ndarray, row: int, *, q: float, contrast: float) -> Source:
    """Sky, mask, size and seeing of the image of one galaxy."""
    image = unstretch(grey, q)
    ny, nx = image.shape
    # Grey levels are whole numbers, and few where it is dark: percentiles need them smeared.
    dither = np.random.default_rng(row).uniform(-0.5, 0.5, image.shape) / 255.0
    level, sigma, sky = sky_of(image, dither)
    image -= level
    labels, main = segments(image, sigma, ((nx - 1) / 2, (ny - 1) / 2), contrast)
    if main == 0:
        return Source()
    own = labels == main
    others = ndimage.binary_dilation((labels > 0) & ~own, iterations=2)
    mask = (others & ~own) | ((labels > 0) & ~own) | (grey >= 254)
    center, r_half = half_light(image, own)
    fwhm = narrowest(image, labels, main, sigma)
    correlation = autocorrelation(image, sky, 0.0, sigma)
    return Source(level, sigma, mask, center, r_half, fwhm, correlation)


# ------------------------------------------------------------------- stamps


def overlaps(n_in: int, n_out: int, scale: float, center: float) -> np.ndarray:
    """Share of each input pixel in each output pixel along one axis; (n_out, n_in)."""
    edges = center + scale * (np.arange(n_out + 1) - n_out / 2)
    low = np.maximum(edges[:-1, None], np.arange(n_in) - 0.5)
    high = np.minimum(edges[1:, None], np.arange(n_in) + 0.5)
    return np.clip(high - low, 0.0, None)


def resample(image, variance, mask, center, scale, fwhm):
    """Stamp, its weights and its PSF's FWHM; output pixels are ``scale`` input pixels wide.

    Light is shared out by the overlap of the pixels, so that it is kept; a stamp at the native
    scale is only cut.  A pixel of which more than a fifth is masked or missing has weight 0.
    """
    ny, nx = image.shape
    if scale == 1:
        center = tuple(np.round(np.array(center) + 0.5) - 0.5)
    wx, wy = (overlaps(n, SIZE, scale, c) for n, c in zip((nx, ny), center, strict=True))
    good = (~mask).astype(float)
    cover = wy @ good @ wx.T / scale**2
    filled = np.where(mask, 0.0, image)
    stamp = wy @ filled @ wx.T / np.maximum(cover, 1e-9)
    noise = (wy**2) @ (variance * good) @ (wx**2).T / np.maximum(cover, 1e-9) ** 2
    usable = (cover > 0.8) & (noise > 0)
    stamp = np.where(usable, stamp, 0.0)
    weight = np.where(usable, 1 / np.sqrt(np.where(usable, noise, 1.0)), 0.0)
    # Nearest-pixel resampling smooths with the old pixel and with the new one.
    extra = 0.0 if scale == 1 else (1 + scale**2) / 12
    return stamp, weight, float(np.sqrt(fwhm**2 + WIDTH**2 * extra) / scale)


def outskirts_scatter(pull: np.ndarray, params: np.ndarray) -> float:
    """Robust scatter of residual over noise far out, where only the sky is left."""
    if not np.isfinite(params).all():
        return 1.0
    _, x_0, y_0, r_eff, _, ellip, theta = params
    y, x = np.mgrid[: pull.shape[0], : pull.shape[1]]
    u = (x - x_0) * np.cos(theta) + (y - y_0) * np.sin(theta)
    v = (y - y_0) * np.cos(theta) - (x - x_0) * np.sin(theta)
    radius = np.hypot(u, v / max(1 - ellip, 0.1)) / r_eff
    used = pull != 0
    if used.sum() < 300:
        return 1.0
    far = used & (radius > min(3.0, np.percentile(radius[used], 70)))
    low, high = np.percentile(pull[far], [15.87, 84.13])
    return float(np.clip((high - low) / 2, 0.2, 5.0))


def scale_for(r_eff: float, scale: float = 1.0, n_pixels: int = SIZE) -> float:
    """Scale that brings a galaxy of ``r_eff`` (at ``scale``) to the size aimed at.

    ``n_pixels`` is the side of the image: a stamp that would reach beyond it is drawn larger,
    up to the largest size that is accepted.
    """
    native = scale * r_eff
    wanted = native / TARGET
    if SIZE * wanted > n_pixels:
        wanted = max(n_pixels / SIZE, native / (0.93 * LARGEST))
    return 1.0 if wanted < 1.15 else float(min(wanted, 4.0))


@lru_cache(maxsize=512)
def _psf(fwhm: float):
    """Round Gaussian; all are sampled alike, so that they go through a batch together."""
    half = 3 * int(np.ceil(2.5 * max(fwhm, 1.2)))
    step = np.arange(-half, half + 1) / 3
    profile = np.exp(-0.5 * (step * WIDTH / fwhm) ** 2)
    return PSF(np.outer(profile, profile), oversampling=3)


def fit(stamps: np.ndarray, weights: np.ndarray, fwhm: np.ndarray):
    """Sérsic fit of all stamps, background included."""
    sigma = np.where(weights > 0, 1 / np.where(weights > 0, weights, 1), 0.0)
    return fit_images(
        stamps,
        SersicGalaxy2D(),
        uncertainty=sigma,
        mask=weights == 0,
        psf=[_psf(round(float(f), 1)) for f in fwhm],
        background="constant",
    )


def stamps_and_fits(make, scales: np.ndarray, n_pixels: int) -> dict[str, np.ndarray]:
    """Stamps at the right scale and their fits; ``make(k, scale)`` draws the k-th stamp."""
    n = len(scales)
    scales = scales.copy()
    stamps, weights = np.zeros((n, SIZE, SIZE)), np.zeros((n, SIZE, SIZE))
    fwhm = np.full(n, np.nan)
    params, out = np.full((n, 7), np.nan), {}
    for name in ("chi2", "dof", "background", "snr", "noise_factor"):
        out[name] = np.full(n, np.nan)
    flags = np.zeros(n, dtype=np.int64)
    todo = np.arange(n)
    for attempt in range(2):
        for k in todo:
            stamps[k], weights[k], fwhm[k] = make(k, scales[k])
        result = fit(stamps[todo], weights[todo], fwhm[todo])
        residual = stamps[todo] - np.asarray(result.model_images)
        factor = np.array(
            [
                outskirts_scatter(r * w, p)
                for r, w, p in zip(residual, weights[todo], result.params, strict=True)
            ]
        )
        weights[todo] /= factor[:, None, None]
        out["noise_factor"][todo] = factor
        params[todo], flags[todo] = result.params, result.flags
        out["chi2"][todo] = ((residual * weights[todo]) ** 2).sum(axis=(1, 2))
        out["dof"][todo] = result.dof
        level = np.asarray(result.background).reshape(len(todo), -1)[:, 0]
        out["background"][todo] = level
        model = np.asarray(result.model_images) - level[:, None, None]
        out["snr"][todo] = np.sqrt(((model * weights[todo]) ** 2).sum(axis=(1, 2)))
        r_eff = params[:, 3]
        wanted = np.array([scale_for(r, s, n_pixels) for r, s in zip(r_eff, scales, strict=True)])
        off = (r_eff > LARGEST) | ((r_eff < SMALLEST) & (scales > 1))
        off &= np.isfinite(r_eff) & (np.abs(wanted / scales - 1) > 0.05)
        todo = np.flatnonzero(off)
        if attempt == 1 or len(todo) == 0:
            break
        scales[todo] = wanted[todo]
    level = np.where(np.isfinite(out["background"]), out["background"], 0.0)
    stamps = np.where(weights > 0, stamps - level[:, None, None], 0.0)
    return out | {
        "image": stamps.astype(np.float32),
        "weight": weights.astype(np.float32),
        "psf_fwhm": fwhm,
        "scale": scales,
        "sersic": params,
        "flags": flags,
    }


def hidden(weight: np.ndarray, params: np.ndarray) -> float:
    """Share of the pixels within 1.5 half-light radii that are masked."""
    if not np.isfinite(params).all():
        return 1.0
    _, x_0, y_0, r_eff, _, ellip, theta = params
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    u = (x - x_0) * np.cos(theta) + (y - y_0) * np.sin(theta)
    v = (y - y_0) * np.cos(theta) - (x - x_0) * np.sin(theta)
    inside = np.hypot(u, v / max(1 - ellip, 0.1)) < 1.5 * r_eff
    return float((weight[inside] == 0).mean()) if inside.any() else 1.0


def usable(part: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Which galaxies are kept, and what the others were dropped for."""
    r_eff = part["sersic"][:, 3]
    centre = np.hypot(*(part["sersic"][:, 1:3] - (SIZE - 1) / 2).T)
    reasons = {
        "failed": ((part["flags"] & int(FitFlag.FAILED)) != 0)
        | ~np.isfinite(part["sersic"]).all(axis=1),
        "faint": ~(part["snr"] > 20),
        "too large": r_eff > 20,
        "unresolved": r_eff < 0.4 * part["psf_fwhm"],
        "off centre": centre > 8,
        "covered": np.array(
            [hidden(w, p) for w, p in zip(part["weight"], part["sersic"], strict=True)]
        )
        > 0.25,
        "little left": (part["weight"] > 0).mean(axis=(1, 2)) < 0.4,
    }
    bad = np.zeros(len(r_eff), bool)
    said = []
    for name, which in reasons.items():
        said.append(f"{name} {np.count_nonzero(which & ~bad)}")
        bad |= which
    return ~bad, ", ".join(said)


# --------------------------------------------------------------------- sets


def seeing(sources: list[Source], name: str) -> np.ndarray:
    """FWHM of the PSF in pixels of each image of a set.

    Stars tell it where there are any.  The pixels of the images without one have a size of their
    own, too, and it shows in the noise: its correlation has the length of the survey's pixel.  The
    two are compared where both are known.
    """
    measured = np.array([s.fwhm for s in sources])
    if name == "vagc":
        good = np.isfinite(measured)
        print(f"  vagc: stars {np.percentile(measured[good], [5, 16, 50, 84]).round(2)} px")
        return np.full(len(sources), VAGC_FWHM)
    features = np.array([s.correlation for s in sources])
    known = np.isfinite(features).all(axis=1)
    star = known & (measured > 1.2) & (measured < 7)
    matrix = np.column_stack([np.ones(len(features)), np.nan_to_num(features)])
    matrix = np.column_stack([matrix, matrix[:, 1:2] ** 2])
    use = star.copy()
    for _ in range(5):
        c = np.linalg.lstsq(matrix[use], np.log(measured[use]), rcond=None)[0]
        residual = np.log(np.where(star, measured, 1.0)) - matrix @ c
        spread = 1.4826 * np.median(np.abs(residual[use] - np.median(residual[use])))
        # Companions that are galaxies are wider than stars: clip them, not the narrow ones.
        use = star & (residual < 1.5 * spread) & (residual > -3 * spread)
    predicted = np.exp(np.clip(matrix @ c, np.log(1.2), np.log(6.5)))
    predicted[~known] = np.median(measured[star])
    print(
        f"  {name}: {star.sum()} images with a compact companion, FWHM "
        f"{np.percentile(measured[star], [5, 16, 50, 84, 95]).round(2)} px; from the noise "
        f"{np.percentile(predicted, [5, 16, 50, 84, 95]).round(2)} px, scatter {spread:.2f} dex(e)"
    )
    return np.where(star & (np.abs(residual) < 2 * spread), measured, predicted)


def sdss(path: Path, name: str, arguments, pool) -> dict[str, np.ndarray]:
    """One of the sets of stretched SDSS images."""
    grey = fits.getdata(path, "IMAGES")
    rows = np.arange(len(grey))
    if arguments.limit:
        rows = np.random.default_rng(3).permutation(rows)[: arguments.limit]
    work = partial(measure, q=arguments.q, contrast=arguments.contrast)
    sources = pool.starmap(work, [(grey[r], int(r)) for r in rows], chunksize=32)
    fwhm = seeing(sources, name)
    good = np.array([np.isfinite(s.r_half) for s in sources])
    print(f"  {name}: {len(rows)} images, {np.count_nonzero(~good)} without a central source")
    rows, fwhm = rows[good], fwhm[good]
    sources = [s for s, ok in zip(sources, good, strict=True) if ok]

    chunks = [slice(i, i + 128) for i in range(0, len(rows), 128)]
    jobs = [(grey[rows[c]], sources[c], fwhm[c], arguments.q) for c in chunks]
    parts = pool.starmap(sdss_chunk, jobs, chunksize=1)
    part = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    part["correlation"] = np.array([s.correlation[0] for s in sources])
    part["row"] = rows
    part["source"] = np.full(len(rows), name)
    return part


def sdss_chunk(grey, sources, fwhm, q) -> dict[str, np.ndarray]:
    """Stamps and fits of some galaxies."""
    warnings.simplefilter("ignore")

    def make(k, scale):
        source = sources[k]
        image = unstretch(grey[k], q) - source.sky
        slope = np.cosh(q / 255.0 * ndimage.gaussian_filter(grey[k].astype(float), 1.0))
        floor = np.cosh(np.arcsinh(q * max(source.sky, 0.0)))
        grain = (GREY_ERROR / 255.0) ** 2 * np.clip(slope**2 - floor**2, 0, None)
        sky_variance = max(source.sigma, 0.3 / 255) ** 2
        stamp, weight, width = resample(
            image, sky_variance + grain, source.mask, source.center, scale, fwhm[k]
        )
        return stamp, weight, width

    n_pixels = grey.shape[-1]
    scales = np.array([scale_for(s.r_half, n_pixels=n_pixels) for s in sources])
    return stamps_and_fits(make, scales, n_pixels)


def linear_chunk(cuts: list[tuple], fwhm: np.ndarray) -> dict[str, np.ndarray]:
    """Stamps and fits of linear cutouts (image, sigma, mask), each with its PSF's FWHM."""
    warnings.simplefilter("ignore")
    n_pixels = max(image.shape[0] for image, _, _ in cuts)

    def make(k, scale):
        image, sigma, mask = cuts[k]
        center = tuple((n - 1) / 2 for n in image.shape[::-1])
        variance = np.broadcast_to(np.asarray(sigma, float) ** 2, image.shape)
        return resample(image, variance, mask, center, scale, fwhm[k])

    scales = []
    for image, sigma, mask in cuts:
        good = ~mask & (ndimage.gaussian_filter(image, 1.0) > 1.5 * np.median(sigma))
        _, r_half = half_light(image, good)
        # A galaxy that is small already is only cut.
        scales.append(scale_for(r_half, n_pixels=n_pixels) if r_half > LARGEST else 1.0)
    return stamps_and_fits(make, np.array(scales), n_pixels)


def together(pool, cuts: list[tuple], fwhm: float) -> dict[str, np.ndarray]:
    """`linear_chunk` of many cutouts, some at a time."""
    jobs = [
        (cuts[i : i + 64], np.full(len(cuts[i : i + 64]), fwhm)) for i in range(0, len(cuts), 64)
    ]
    parts = pool.starmap(linear_chunk, jobs, chunksize=1)
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def cutout(image: np.ndarray, x: float, y: float, size: int, fill: float) -> np.ndarray:
    """Square of ``size`` (even) pixels about a position, ``fill`` beyond the image."""
    half = size // 2
    i, j = round(y) - half, round(x) - half
    out = np.full((size, size), fill, dtype=image.dtype)
    rows = slice(max(i, 0), min(i + size, image.shape[0]))
    columns = slice(max(j, 0), min(j + size, image.shape[1]))
    out[rows.start - i : rows.stop - i, columns.start - j : columns.stop - j] = image[rows, columns]
    return out


def psf_width(psf: np.ndarray) -> float:
    """FWHM of the Gaussian that fits the core of a PSF best."""
    i, j = np.unravel_index(np.argmax(psf), psf.shape)
    return WIDTH * star_width(psf[i - 12 : i + 13, j - 12 : j + 13])[0]


def neighbours(labels: np.ndarray, x: float, y: float, size: int) -> np.ndarray:
    """Mask of every segment but the one at the middle of a cutout."""
    cut = cutout(labels, x, y, size, 0)
    middle = cut[size // 2 - 2 : size // 2 + 3, size // 2 - 2 : size // 2 + 3]
    inside = middle[middle > 0]
    own = np.bincount(inside).argmax() if len(inside) else 0
    others = (cut > 0) & (cut != own)
    return others | (ndimage.binary_dilation(others, iterations=2) & (cut != own))


def field_labels(image: np.ndarray, sigma: float, threshold: float, contrast: float) -> np.ndarray:
    """Deblended segments of a field."""
    found = detect(
        image, uncertainty=sigma, background="none", threshold=threshold, contrast=contrast
    )
    return found.segmentation.data


def kids(path: Path, name: str, arguments, pool) -> dict[str, np.ndarray]:
    """Galaxies of the KiDS field, each in three bands."""
    size = 128
    with fits.open(path) as file:
        catalog = file["CATALOG"].data
        images = {b: file[f"SCI_{b}"].data.astype(np.float64) for b in BANDS}
        noise = {b: float(file[f"SCI_{b}"].header["NOISERMS"]) for b in BANDS}
        fwhm = {b: psf_width(file[f"PSF_{b}"].data.astype(float)) for b in BANDS}
    x, y, mag = (np.asarray(catalog[k], float) for k in ("x", "y", "mag_r"))
    star = np.asarray(catalog["is_star"], bool)
    wanted = (mag < 21.3) & ~star
    bright = (mag < 17) & (catalog["r50_px"] < 5)
    wanted &= ~bright
    for k in np.flatnonzero(bright):
        wanted &= np.hypot(x - x[k], y - y[k]) > 25 + 12 * (17 - mag[k])
    rows = np.flatnonzero(wanted)[: arguments.limit]
    labels = field_labels(images["R"], noise["R"], 2.0, 0.005)
    masks = [neighbours(labels, x[r], y[r], size) for r in rows]
    parts = []
    for band in BANDS:
        cuts = []
        for r, mask in zip(rows, masks, strict=True):
            cut = cutout(images[band], x[r], y[r], size, np.nan)
            bad = mask | ~np.isfinite(cut)
            cuts.append((np.where(bad, 0.0, cut), noise[band], bad))
        part = together(pool, cuts, fwhm[band])
        part["row"] = rows
        part["source"] = np.full(len(rows), f"{name}_{band.lower()}")
        parts.append(part)
        print(f"  {name} {band}: FWHM {fwhm[band]:.2f} px, noise {noise[band]:.4f} uJy")
    part = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    part["correlation"] = np.full(len(part["row"]), np.nan)
    return part


def hst(path: Path, name: str, arguments, pool) -> dict[str, np.ndarray]:
    """Galaxies of COSMOS (F814W) on stamps with a PSF each."""
    with fits.open(path) as file:
        images = file["IMAGES"].data.astype(np.float64)[: arguments.limit]
        psfs = file["PSF"].data.astype(np.float64)
        noise = np.asarray(file["CATALOG"].data["noise_rms"], float)
    cuts = []
    for k, image in enumerate(images):
        bad = ~np.isfinite(image)
        image = np.where(bad, 0.0, image)
        labels, main = segments(image, noise[k], (31.5, 31.5), arguments.contrast)
        others = (labels > 0) & (labels != main)
        bad |= others | (ndimage.binary_dilation(others, iterations=2) & (labels != main))
        cuts.append((image, noise[k], bad))
    part = linear_chunk(cuts, np.array([psf_width(psf) for psf in psfs[: len(cuts)]]))
    part["row"] = np.arange(len(images))
    part["source"] = np.full(len(images), name)
    part["correlation"] = np.full(len(images), np.nan)
    return part


def xdf(path: Path, name: str, arguments, pool) -> dict[str, np.ndarray]:
    """The few large galaxies of the XDF cutout, in two bands."""
    size, parts = 96, []
    with fits.open(path) as file:
        bands = {b: file[f"XDF_{b}_SCI"].data.astype(np.float64) for b in XDF_FWHM}
    _, noise = clipped(bands["F160W"].ravel())
    labels = field_labels(bands["F160W"], noise, 3.0, 0.01)
    index = np.unique(labels[labels > 0])
    large = index[np.bincount(labels.ravel())[index] > 80]
    peaks = ndimage.maximum_position(bands["F160W"], labels, large)
    for band, image in bands.items():
        _, noise = clipped(image.ravel())
        cuts = []
        for i, j in peaks:
            cut = cutout(image, j, i, size, np.nan)
            bad = neighbours(labels, j, i, size) | ~np.isfinite(cut)
            cuts.append((np.where(bad, 0.0, cut), noise, bad))
        part = together(pool, cuts, XDF_FWHM[band])
        part["row"] = np.arange(len(cuts))
        part["source"] = np.full(len(cuts), f"{name}_{band.lower()}")
        parts.append(part)
    part = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    part["correlation"] = np.full(len(part["row"]), np.nan)
    return part


SETS = {
    "gz2": (sdss, "gz2.fits"),
    "vagc": (sdss, "vagc.fits"),
    "efigi": (sdss, "efigi.fits"),
    "kids": (kids, "kids_viking_field.fits"),
    "hst": (hst, "cosmos_hst.fits"),
    "xdf": (xdf, "small_fields.fits"),
}


def split_of(part: dict[str, np.ndarray], name: str, seed: int) -> np.ndarray:
    """1 for the galaxies that are held out, else 0; one galaxy is on one side in all its bands."""
    rows = part["row"]
    n = int(rows.max()) + 1
    held = np.random.default_rng([seed, sum(map(ord, name))]).random(n) < 0.1
    if name == "kids":  # left_out_pixels.py needs many that were not trained on
        held = np.arange(n) % 2 == 1
    if name in ("hst", "xdf"):  # too few to learn from, and all are wanted for tests
        held[:] = True
    if name == "gz2":
        held[np.random.default_rng(2015).permutation(6204)[:1000].clip(max=n - 1)] = True
    return held[rows].astype(np.int8)


def thumbnails(part: dict[str, np.ndarray], path: Path, n: int = 64, seed: int = 1) -> None:
    """PNG of random stamps, stretched; masked pixels are red."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(8, 8, figsize=(16, 16))
    for ax in axes.flat:
        ax.axis("off")
    chosen = np.random.default_rng(seed).permutation(len(part["row"]))[:n]
    for ax, k in zip(axes.flat, chosen, strict=False):
        ok = part["weight"][k] > 0
        noise = 1 / np.median(part["weight"][k][ok])
        f = np.clip(np.arcsinh(part["image"][k] / noise / 2) / 4.5, -0.1, 1) * 0.9 + 0.1
        rgb = np.repeat(np.where(ok, f, 0)[..., None], 3, axis=2)
        rgb[~ok] = (0.5, 0, 0)
        ax.imshow(np.clip(rgb, 0, 1), origin="lower")
        p = part["sersic"][k]
        ax.set_title(
            f"{part['row'][k]} n={p[4]:.1f} r={p[3]:.1f} c={part['chi2'][k] / part['dof'][k]:.1f}",
            fontsize=8,
        )
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the FITS files")
    parser.add_argument("--out", type=Path, required=True, help="file to write (.npz)")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated")
    parser.add_argument("--q", type=float, default=STRETCH, help="Q of the asinh stretch")
    parser.add_argument("--contrast", type=float, default=0.02, help="of the deblending")
    parser.add_argument("--seed", type=int, default=20, help="of the held-out tenth")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=int, help="galaxies per set (a trial)")
    parser.add_argument("--keep", action="store_true", help="add to what the file has")
    parser.add_argument("--plots", type=Path, help="folder for thumbnails (PNG)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    names = arguments.sets.split(",")
    if unknown := set(names) - set(SETS):
        parser.error(f"unknown sets {sorted(unknown)}; there are {', '.join(SETS)}")

    kept = []
    if arguments.keep and arguments.out.exists():
        with np.load(arguments.out) as file:
            kept = [dict(file)]
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for name in names:
            start = time.perf_counter()
            read, file = SETS[name]
            part = read(arguments.data / file, name, arguments, pool)
            part["split"] = split_of(part, name, arguments.seed)
            good, said = usable(part)
            part = {key: values[good] for key, values in part.items()}
            report(name, part, said, time.perf_counter() - start)
            if arguments.plots:
                arguments.plots.mkdir(parents=True, exist_ok=True)
                thumbnails(part, arguments.plots / f"{name}.png")
            kept.append(part)
            save(arguments.out, kept)
    print(f"{sum(len(p['row']) for p in kept)} galaxies in {arguments.out}")


def save(path: Path, parts: list[dict[str, np.ndarray]]) -> None:
    """Write all sets to one uncompressed file."""
    total = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    for key, values in total.items():
        if values.dtype == np.float64:
            total[key] = values.astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: who reads meanwhile finds a whole file.
    partial_file = path.with_name(f"partial_{path.name}")
    np.savez(partial_file, **total)
    partial_file.replace(path)


def report(name: str, part: dict[str, np.ndarray], said: str, seconds: float) -> None:
    """Say what is in a set."""
    print(f"{name}: {len(part['row'])} kept, {part['split'].sum()} held out; dropped: {said}")
    rows = {
        "chi2/dof": part["chi2"] / part["dof"],
        "r_eff": part["sersic"][:, 3],
        "n": part["sersic"][:, 4],
        "FWHM": part["psf_fwhm"],
        "S/N": part["snr"],
    }
    for label, values in rows.items():
        print(f"  {label:8s} {np.percentile(values, [5, 16, 50, 84, 95]).round(2)}")
    print(f"  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
