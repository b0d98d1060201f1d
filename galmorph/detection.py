"""From a bare image to what a fit needs: sources, background, noise and PSF.

`detect` wraps photutils with its settings exposed, `estimate_psf` builds a PSF
from the point-like sources and says how good it is, and `noise_correlation`
measures by how much correlated pixels make the errors larger.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from galmorph._inputs import Frame, add_to_frame, make_frame
from galmorph.psf import PSF

__all__ = [
    "Detection",
    "PSFEstimate",
    "detect",
    "estimate_psf",
    "gaussian_psf",
    "noise_correlation",
]

_FWHM = 2 * math.sqrt(2 * math.log(2))  # of a Gaussian of sigma 1


# -- detection ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """Sources of an image, and the background and noise that they were found on.

    Attributes
    ----------
    segmentation : `~photutils.segmentation.SegmentationImage`
        Which pixel belongs to which source; 0 is sky.  Shape (ny, nx).
    catalog : `~photutils.segmentation.SourceCatalog` or None
        Measurements of the sources, of the background-subtracted image; None
        where nothing was found.
    data : array, shape (ny, nx)
        The image less its background; unusable pixels hold NaN.
    background : array, shape (ny, nx)
        The background that was subtracted.
    rms : array, shape (ny, nx)
        Standard deviation of a pixel: the uncertainty that was given, or the
        scatter of the background.
    settings : dict
        How it was done: the arguments of `detect`, and under ``'noise'``
        whether it was ``'given'`` or ``'measured'``.
    """

    segmentation: Any
    catalog: Any
    data: np.ndarray
    background: np.ndarray
    rms: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.segmentation.n_labels)

    @property
    def positions(self) -> np.ndarray:
        """Centroids (x, y) in pixels, shape (N, 2), in the order of the labels."""
        if self.catalog is None:
            return np.empty((0, 2))
        return np.column_stack(
            [np.atleast_1d(self.catalog.x_centroid), np.atleast_1d(self.catalog.y_centroid)]
        )

    @property
    def sky(self) -> np.ndarray:
        """True at usable pixels that belong to no source, shape (ny, nx)."""
        return (self.segmentation.data == 0) & np.isfinite(self.data)


def detect(
    image: Any,
    *,
    uncertainty: Any = None,
    mask: Any = None,
    threshold: float = 1.5,
    n_pixels: int = 5,
    kernel_fwhm: float | None = 2.0,
    deblend: bool = True,
    n_levels: int = 32,
    contrast: float = 0.005,
    background: str | float | np.ndarray = "map",
    box_size: int = 64,
) -> Detection:
    """Find the sources of an image with photutils.

    The background is measured twice, the second time with the sources of the
    first pass masked; the image less the background is smoothed, and connected
    pixels above the threshold make a source, which is then deblended.

    Parameters
    ----------
    image : array, Quantity, NDData, HDU or path
        Image of shape (ny, nx); as in `galmorph.fit_images`.
    uncertainty : float, array, Quantity or NDUncertainty, optional
        Standard deviation of the pixels.  By default the image's own, or else
        the scatter of the background.
    mask : array of bool, shape (ny, nx), optional
        True where a pixel is bad; beside the image's own.
    threshold : float, optional
        Lowest value of a source's pixels in the *smoothed* image, in units of
        the noise of the *unsmoothed* one (as in SExtractor).
    n_pixels : int, optional
        Fewest connected pixels of a source.
    kernel_fwhm : float or None, optional
        FWHM in pixels of the Gaussian that the image is smoothed with; None:
        it is not smoothed.
    deblend : bool, optional
        Whether to split blended sources.
    n_levels : int, optional
        Number of thresholds of the deblending.
    contrast : float, optional
        Fraction of a blend's flux that a peak must have to be a source.
    background : {'map', 'constant', 'none'}, float or array, optional
        ``'map'`` is a mesh of clipped medians, ``'constant'`` one of them for
        the whole image.  A number or an array (ny, nx) is subtracted as it is.
    box_size : int, optional
        Mesh of the background (and noise) map in pixels; it should be larger
        than the galaxies.

    Returns
    -------
    Detection

    Raises
    ------
    TypeError, ValueError, OSError, astropy.units.UnitsError
        If the image is not a single usable image, or an argument makes no sense.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.detection import detect
    >>> image = np.random.default_rng(1).normal(20, 1, (100, 120))
    >>> y, x = np.mgrid[:100, :120]
    >>> image += 50 * np.exp(-((x - 70) ** 2 + (y - 40) ** 2) / 18)
    >>> found = detect(image)
    >>> len(found), found.positions.round().tolist()
    (1, [[70.0, 40.0]])
    """
    settings = {
        "threshold": _positive(threshold, "threshold"),
        "n_pixels": _positive_integer(n_pixels, "n_pixels"),
        "kernel_fwhm": None if kernel_fwhm is None else _positive(kernel_fwhm, "kernel_fwhm"),
        "deblend": bool(deblend),
        "n_levels": _positive_integer(n_levels, "n_levels"),
        "contrast": contrast,
        "background": background if isinstance(background, str) else "given",
        "noise": "measured",
        "box_size": _positive_integer(box_size, "box_size"),
    }
    if not 0 <= contrast <= 1:
        raise ValueError(f"contrast must be between 0 and 1, not {contrast!r}")
    frame = add_to_frame(_single(image), uncertainty=uncertainty, mask=mask)
    data, sigma, bad = frame.cut(...)
    bad |= ~np.isfinite(data)
    if sigma is not None:
        settings["noise"] = "given"
        bad |= ~(np.isfinite(sigma) & (sigma > 0))
    if bad.all():
        raise ValueError("the image has no usable pixel")

    level, rms = _background(data, bad, background, box_size)
    noise = rms if sigma is None else sigma
    found = _segment(data - level, bad, noise, {**settings, "deblend": False})
    if (isinstance(background, str) and background != "none") or sigma is None:
        # The first pass took faint sources for sky: measure it again without them.
        sources = bad | (found.make_source_mask(size=5) if found.n_labels else False)
        if not sources.all():
            level, rms = _background(data, sources, background, box_size)
    found = _segment(data - level, bad, rms if sigma is None else sigma, settings)
    rms = rms if sigma is None else np.where(bad, np.nan, sigma)
    catalog = _catalog(data - level, found, rms, bad, frame, settings)
    return Detection(found, catalog, np.where(bad, np.nan, data - level), level, rms, settings)


def _single(image: Any) -> Frame:
    frame = make_frame(image)
    if len(frame.shape) != 2:
        raise ValueError(f"detection needs one image (ny, nx), not one of shape {frame.shape}")
    return frame


def _positive(value: float, name: str) -> float:
    if not (np.isscalar(value) and np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def _positive_integer(value: int, name: str) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def _background(data, bad, kind, box_size) -> tuple[np.ndarray, np.ndarray]:
    """Background and scatter of a pixel, both (ny, nx)."""
    from astropy.stats import SigmaClip, sigma_clipped_stats

    whole = kind == "constant" if isinstance(kind, str) else False
    if isinstance(kind, str) and kind not in {"map", "constant", "none"}:
        raise ValueError(f"background must be 'map', 'constant', 'none' or values, not {kind!r}")
    if not whole and min(data.shape) < 2 * box_size:
        whole = True  # fewer than two meshes: there is no map to make
    if whole:
        _, level, scatter = sigma_clipped_stats(data[~bad], sigma=3.0, maxiters=10)
        level, rms = np.full(data.shape, level), np.full(data.shape, scatter)
    else:
        from photutils.background import Background2D, MADStdBackgroundRMS, MedianBackground

        with warnings.catch_warnings():
            # meshes without enough sky are filled in from their neighbours, as wanted
            warnings.filterwarnings("ignore", category=UserWarning)
            mesh = Background2D(
                np.where(bad, 0.0, data),
                box_size,
                mask=bad,
                exclude_percentile=90.0,
                sigma_clip=SigmaClip(sigma=3.0, maxiters=10),
                bkg_estimator=MedianBackground(),
                bkg_rms_estimator=MADStdBackgroundRMS(),
            )
            level, rms = np.array(mesh.background), np.array(mesh.background_rms)
    if not isinstance(kind, str):
        values = np.asarray(getattr(kind, "value", kind), dtype=float)
        if values.shape not in ((), data.shape):
            raise ValueError(f"background has shape {values.shape}, the image {data.shape}")
        level = np.broadcast_to(values, data.shape).copy()
    elif kind == "none":
        level = np.zeros(data.shape)
    return level, np.maximum(rms, np.finfo(float).tiny)


def _smooth(data: np.ndarray, bad: np.ndarray, fwhm: float | None) -> np.ndarray:
    if fwhm is None:
        return np.where(bad, 0.0, data)
    from photutils.segmentation import make_2dgaussian_kernel
    from scipy.ndimage import convolve

    kernel = make_2dgaussian_kernel(fwhm, size=2 * math.ceil(1.5 * fwhm) + 1).array
    light = convolve(np.where(bad, 0.0, data), kernel, mode="constant")
    if not bad.any():
        return light
    # Bad pixels take no part; what they would have weighed goes to their neighbours.
    weight = convolve((~bad).astype(float), kernel, mode="constant")
    return light / np.maximum(weight, kernel.max())


def _segment(data, bad, rms, settings) -> Any:
    from photutils.segmentation import SegmentationImage, deblend_sources, detect_sources
    from photutils.utils.exceptions import NoDetectionsWarning

    smooth = _smooth(data, bad, settings["kernel_fwhm"])
    limit = np.where(np.isfinite(rms), settings["threshold"] * rms, np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        found = detect_sources(smooth, limit, settings["n_pixels"], mask=bad)
    if found is None:
        return SegmentationImage(np.zeros(data.shape, dtype=np.int32))
    if settings["deblend"]:
        with warnings.catch_warnings():
            # it says that some blends had pixels below zero; they are deblended all the same
            warnings.simplefilter("ignore")
            found = deblend_sources(
                smooth,
                found,
                settings["n_pixels"],
                n_levels=settings["n_levels"],
                contrast=settings["contrast"],
                progress_bar=False,
            )
    return found


def _catalog(data, found, rms, bad, frame: Frame, settings) -> Any:
    from photutils.segmentation import SourceCatalog

    if found.n_labels == 0:
        return None
    images = [data, _smooth(data, bad, settings["kernel_fwhm"]), np.where(bad, 0.0, rms)]
    if frame.unit is not None:
        images = [values * frame.unit for values in images]
    data, smooth, error = images
    return SourceCatalog(
        data, found, convolved_data=smooth, error=error, mask=bad if bad.any() else None,
        wcs=frame.wcs,
    )  # fmt: skip


# -- correlated noise ----------------------------------------------------------------------


def noise_correlation(
    image: np.ndarray, *, mask: np.ndarray | None = None, scale: int = 4
) -> tuple[float, float]:
    """How much larger the noise of an area is than independent pixels would have it.

    Resampled, drizzled or JPEG-compressed images have correlated pixels.  A
    least-squares fit that takes them as independent gives uncertainties that
    are too small, by about this factor for parameters that are determined by
    areas of this scale.  To allow for it, multiply the uncertainty of the
    pixels by the factor.

    Parameters
    ----------
    image : array, shape (ny, nx)
        The image less its background.
    mask : array of bool, shape (ny, nx), optional
        True at pixels that are not sky; pixels that are not finite are left
        out as well.
    scale : int, optional
        Side of the areas in pixels.

    Returns
    -------
    factor, error : float
        Scatter of the sums over ``scale`` × ``scale`` pixels, relative to that
        of independent pixels of the same scatter, and its standard error.
        Undetected sources are in it as well.

    Raises
    ------
    ValueError
        If fewer than 20 areas hold nothing but sky.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.detection import noise_correlation
    >>> white = np.random.default_rng(1).normal(size=(400, 400))
    >>> factor, error = noise_correlation(white)
    >>> print(round(factor, 1))
    1.0
    """
    from astropy.stats import sigma_clip

    scale = _positive_integer(scale, "scale")
    image = np.array(image, dtype=float)
    if image.ndim != 2:
        raise ValueError(f"the image must be two-dimensional, not of shape {image.shape}")
    if mask is not None:
        image[np.asarray(mask, dtype=bool)] = np.nan
    ny, nx = (n // scale * scale for n in image.shape)
    blocks = image[:ny, :nx].reshape(ny // scale, scale, nx // scale, scale).swapaxes(1, 2)
    blocks = blocks.reshape(-1, scale, scale)
    blocks = blocks[np.isfinite(blocks).all(axis=(1, 2))]
    if len(blocks) < 20:
        raise ValueError(
            f"only {len(blocks)} areas of {scale} x {scale} pixels hold nothing but sky"
        )
    # The pixels of the very same areas, so that both see the same sky.
    pixels = sigma_clip(blocks.ravel(), sigma=3, maxiters=10, masked=False)
    means = sigma_clip(blocks.mean(axis=(1, 2)), sigma=3, maxiters=10, masked=False)
    factor = scale * np.std(means) / np.std(pixels)
    return float(factor), float(factor / math.sqrt(2 * len(means)))


# -- the PSF ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PSFEstimate:
    """A PSF that was measured in an image, and how far it can be trusted.

    Attributes
    ----------
    psf : PSF
        The effective PSF (pixel response included).
    method : {'stars', 'compact sources', 'gaussian'}
        ``'stars'``: stacked point sources, whose sizes stand out from the
        galaxies'.  ``'compact sources'``: the same of the smallest sources,
        which do not stand out; some are probably resolved, so that the PSF is
        an upper limit.  ``'gaussian'``: there were too few of them.
    n_stars : int
        Number of sources that it was made of.
    fwhm, fwhm_err : float
        Full width at half maximum in pixels (of the area above half the
        maximum) and its standard error, from the scatter of the sources.
    positions : array, shape (n_stars, 2)
        (x, y) of the sources.
    statement : str
        All this in words.
    sizes : array, shape (M,)
        Gaussian-equivalent FWHM of all candidates, in pixels.
    """

    psf: PSF
    method: str
    n_stars: int
    fwhm: float
    fwhm_err: float
    positions: np.ndarray
    statement: str
    sizes: np.ndarray


def estimate_psf(
    image: Any,
    detection: Detection | None = None,
    *,
    min_stars: int = 5,
    max_stars: int = 60,
    min_snr: float = 30.0,
    max_value: float = np.inf,
    size: int | None = None,
    oversampling: int = 2,
    tolerance: float = 0.08,
) -> PSFEstimate:
    """Measure the PSF from the point-like sources of an image.

    Candidates are bright, round, isolated and complete.  Their size is the
    width of the Gaussian-weighted second moments.  The search starts from the
    smallest and moves to the nearest crowd of sizes, the stars; these are
    centred to a fraction of a pixel and fitted by one smooth surface (the
    effective PSF of Anderson & King 2000).  Where fewer than ``min_stars`` are found, the
    PSF is a Gaussian as wide as the smallest candidate.

    Parameters
    ----------
    image : array, Quantity, NDData, HDU or path
        Image of shape (ny, nx).
    detection : Detection, optional
        Its sources; by default those of `detect` with default settings.
    min_stars, max_stars : int, optional
        Fewest sources for an empirical PSF; most that are combined (the
        brightest).
    min_snr : float, optional
        Lowest signal-to-noise ratio of a candidate.
    max_value : float, optional
        Sources with a pixel of the image at this value or above are
        saturated, and not used.
    size : int, optional
        Side of the PSF in pixels, odd.  By default about 8 FWHM.
    oversampling : int, optional
        Samples per pixel of the result.
    tolerance : float, optional
        Sources whose size differs by less than this fraction from the
        crowd's are in it.

    Returns
    -------
    PSFEstimate

    Raises
    ------
    ValueError
        If there is no candidate at all, or an argument makes no sense.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.detection import estimate_psf
    >>> rng = np.random.default_rng(1)
    >>> image = rng.normal(0, 0.2, (200, 200))
    >>> y, x = np.mgrid[:200, :200]
    >>> for x0, y0 in rng.uniform(-3, 3, (16, 2)) + np.mgrid[25:200:50, 25:200:50].reshape(2, -1).T:
    ...     image += 100 * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 1.5**2))
    >>> estimate = estimate_psf(image)
    >>> estimate.method, estimate.n_stars, round(estimate.fwhm, 1)
    ('stars', 16, 3.5)
    """
    min_stars = _positive_integer(min_stars, "min_stars")
    oversampling = _positive_integer(oversampling, "oversampling")
    if size is not None and (_positive_integer(size, "size") % 2 == 0 or size < 5):
        raise ValueError(f"size must be odd and at least 5, not {size}")
    if detection is None:
        detection = detect(image)
    raw = np.asarray(_single(image).data, dtype=float)
    if raw.shape != detection.data.shape:
        raise ValueError(f"the image has shape {raw.shape}, the detection {detection.data.shape}")

    stars = _candidates(detection, raw, min_snr, max_value)
    if len(stars) == 0:
        raise ValueError(
            "no source is bright, round, isolated and complete enough to measure the PSF from; "
            "a PSF must be given"
        )
    sizes = stars.sigma * _FWHM
    member, distinct = _locus(stars.sigma, tolerance, min_stars)
    if member.sum() >= min_stars:
        chosen = np.flatnonzero(member)
        chosen = chosen[np.argsort(stars.flux[chosen])[::-1][:max_stars]]
        half = (size or 2 * max(5, round(4 * float(np.median(sizes[chosen])))) + 1) // 2
        inside = np.all(
            (stars.center >= half + 1) & (stars.center <= np.array(raw.shape[::-1]) - half - 2),
            axis=1,
        )
        chosen = chosen[inside[chosen]]
        if len(chosen) >= min_stars:
            return _stacked(detection, stars, chosen, half, oversampling, distinct, sizes)
    return _gaussian(stars, sizes, size, int(member.sum()), min_stars)


@dataclass
class _Stars:
    center: np.ndarray  # (M, 2), x and y
    sigma: np.ndarray
    flux: np.ndarray
    snr: np.ndarray

    def __len__(self) -> int:
        return len(self.sigma)


def _candidates(detection: Detection, raw, min_snr: float, max_value: float) -> _Stars:
    """Bright, round, isolated, complete sources, with their sizes."""
    catalog = detection.catalog
    if catalog is None:
        return _Stars(np.empty((0, 2)), np.empty(0), np.empty(0), np.empty(0))
    value = _values
    snr = value(catalog.segment_flux) / value(catalog.segment_flux_err)
    peak = value(catalog.max_value)
    a, b = value(catalog.semimajor_axis), value(catalog.semiminor_axis)
    with np.errstate(invalid="ignore"):
        good = (snr >= min_snr) & (peak > 0) & np.isfinite(a) & (b / a > 0.75)
    flux = value(catalog.segment_flux)
    labels = np.atleast_1d(catalog.labels)
    rows = []
    typical = np.nanmedian(np.sort(a[good])[: max(5, good.sum() // 4)]) if good.any() else 1.0
    half = max(4, math.ceil(4 * typical))
    for i in np.flatnonzero(good):
        found = _measure(detection, raw, labels[i], detection.positions[i], half, max_value)
        if found is not None:
            rows.append((*found, flux[i], snr[i]))
    table = np.array(rows, dtype=float).reshape(-1, 5)
    return _Stars(table[:, :2], table[:, 2], table[:, 3], table[:, 4])


def _values(column: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(getattr(column, "value", column), dtype=float))


def _measure(detection, raw, label, position, half, max_value):
    """Centre and width of one source by adaptive moments; None if it is not usable."""
    column, row = np.rint(position).astype(int)
    ny, nx = raw.shape
    if not (half <= column < nx - half and half <= row < ny - half):
        return None
    box = (slice(row - half, row + half + 1), slice(column - half, column + half + 1))
    stamp, segment = detection.data[box], detection.segmentation.data[box]
    step = np.arange(-half, half + 1.0)
    near = np.hypot(*np.meshgrid(step, step)) <= half
    if np.any(near & (segment != 0) & (segment != label)) or not np.isfinite(stamp).all():
        return None
    if raw[box][near].max() >= max_value:
        return None
    moments = _adaptive_moments(stamp)
    if moments is None:
        return None
    x, y, sigma, ellipticity = moments
    if ellipticity > 0.25 or not 0.3 < sigma < half / 2:
        return None
    return column + x, row + y, sigma


def _adaptive_moments(stamp: np.ndarray) -> tuple[float, float, float, float] | None:
    """Centre, sigma and ellipticity of the Gaussian that weights itself; x, y from the middle."""
    half = (len(stamp) - 1) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    x0 = y0 = 0.0
    variance = max(1.0, half / 4) ** 2
    for _ in range(60):
        dx, dy = x - x0, y - y0
        weight = stamp * np.exp(-(dx**2 + dy**2) / (2 * variance))
        total = weight.sum()
        if not total > 0:
            return None
        # The weight halves the offset and the variance that a Gaussian of its own width has.
        shift = 2 * (weight * dx).sum() / total, 2 * (weight * dy).sum() / total
        xx, yy, xy = ((weight * m).sum() / total for m in (dx * dx, dy * dy, dx * dy))
        new = xx + yy
        x0, y0 = x0 + shift[0], y0 + shift[1]
        if not (0.05 < new < half**2 and math.hypot(x0, y0) < half / 2):
            return None
        done = abs(new / variance - 1) < 1e-4 and math.hypot(*shift) < 1e-3
        variance = new
        if done:
            break
    return x0, y0, math.sqrt(variance), math.hypot(xx - yy, 2 * xy) / (xx + yy)


def _locus(sigma: np.ndarray, tolerance: float, min_stars: int) -> tuple[np.ndarray, bool]:
    """Sources in the crowd of smallest sizes, and whether the crowd stands out.

    Starts at the low end and climbs (mean shift): the first maximum of the density of
    sizes is the stars, for galaxies are all larger than the PSF.
    """
    size = np.log(sigma)
    ordered = np.sort(size)
    center = float(np.median(ordered[: max(min_stars, len(ordered) // 20)]))
    for _ in range(100):
        near = size[np.abs(size - center) < tolerance]
        new = float(np.median(near)) if len(near) else center
        if abs(new - center) < 1e-4:
            break
        center = new
    inside = np.abs(size - center) < tolerance
    above = np.sum((size >= center + tolerance) & (size < center + 3 * tolerance))
    # A locus of stars is followed by a gap; galaxies run on into the next, equally wide step.
    return inside, bool(inside.sum() > 3 * above)


def _stacked(detection, stars, chosen, half, oversampling, distinct, sizes) -> PSFEstimate:
    """Estimate from stacked sources; those that do not look like the others are left out."""
    boxes = []
    for x, y in np.rint(stars.center[chosen]).astype(int):
        boxes.append((slice(y - half, y + half + 1), slice(x - half, x + half + 1)))
    data = np.stack([detection.data[box] for box in boxes])
    sigma = np.stack([detection.rms[box] for box in boxes])
    foreign = np.stack([detection.segmentation.data[box] for box in boxes])
    own = foreign[:, half, half][:, None, None]
    usable = np.isfinite(data) & (sigma > 0) & ((foreign == 0) | (foreign == own))
    stack = _Stack(
        data=np.where(usable, data, 0.0),
        weight=np.where(usable, 1 / np.where(usable, sigma, 1.0), 0.0),
        center=stars.center[chosen] - np.rint(stars.center[chosen]),
        oversampling=oversampling,
        width=float(np.median(stars.sigma[chosen])),
    )
    samples = stack.solve()
    psf = PSF(samples, oversampling=oversampling)
    chosen = chosen[stack.good]
    fwhm = _width(psf)
    scatter = 1.4826 * np.median(np.abs(np.log(sizes[chosen] / np.median(sizes[chosen]))))
    # the scatter of the stars, and what the smoothing was seen to do to simulated ones
    error = fwhm * math.hypot(1.25 * scatter / math.sqrt(len(chosen)), 0.01)
    method = "stars" if distinct else "compact sources"
    what = (
        f"{len(chosen)} point-like sources (S/N {stars.snr[chosen].min():.0f} to "
        f"{stars.snr[chosen].max():.0f}) of {len(stars)} bright, round and isolated ones"
    )
    if distinct:
        caveat = "Their sizes stand out from those of the galaxies, so they are most likely stars."
    else:
        caveat = (
            "Their sizes do not stand out from those of the galaxies: they are the most compact "
            "sources, some of them probably resolved, and the PSF is an upper limit."
        )
    statement = (
        f"Effective PSF (pixel included) from {what}: one spline surface fitted to all of them, "
        f"each with its own flux and sub-pixel centre; {oversampling} samples a pixel, normalised "
        f"within {2 * half + 1} x {2 * half + 1} pixels (light further out is not in it). "
        f"FWHM {fwhm:.2f} +/- {error:.2f} pixels. {caveat}"
    )
    return PSFEstimate(
        psf, method, len(chosen), fwhm, error, stars.center[chosen], statement, sizes
    )


#: Part of a star's light by which the surface may miss it (in each pixel) without
#: that being held against the star: keeps the brightest star from ruling alone.
_TOLERATED = 0.03
#: Scale in sigma of the stars below which the surface is smooth where the stars leave it free.
_SMOOTH = 0.9


class _Stack:
    """Point sources, and the one surface that fits them all.

    The PSF is a cubic B-spline with knots at the samples of the result: a Gaussian of the
    stars' width plus a correction that is held near zero where the stars say nothing.

    Parameters
    ----------
    data, weight : array, shape (K, n, n)
        Stars, and one over the standard deviation of their pixels (0: unusable).
    center : array, shape (K, 2)
        (x, y) of the stars, from the middle of their stamps.
    oversampling : int
        Samples per pixel.
    width : float
        Sigma of the stars.
    """

    def __init__(self, *, data, weight, center, oversampling, width) -> None:
        self.data, self.weight, self.center = data, weight, center.copy()
        self.oversampling = oversampling
        self.good = np.ones(len(data), dtype=bool)
        half = (data.shape[1] - 1) // 2
        self.pixels = np.arange(-half, half + 1.0)
        reach = half * oversampling
        self.samples = np.arange(-reach, reach + 1) / oversampling
        knots = np.arange(-reach - oversampling - 1, reach + oversampling + 2)
        self.knots = knots / oversampling
        r2 = np.add.outer(self.knots**2, self.knots**2) / width**2
        self.start = np.exp(-r2 / 2) / (2 * math.pi * width**2)
        # A Moffat-like envelope: real PSFs have wings.
        spread = 0.5 * self.start[len(knots) // 2, len(knots) // 2] / (1 + r2) ** 1.25
        self.prior = self._smooth_prior(spread, len(knots), _SMOOTH * width * oversampling)
        self.flux = self._first_flux()

    @staticmethod
    def _smooth_prior(spread: np.ndarray, n: int, length: float) -> Any:
        """Precision of the correction: of size ``spread``, smooth over ``length`` knots."""
        from scipy import sparse

        second = sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n))
        eye = sparse.identity(n)
        laplace = sparse.kron(second, eye) + sparse.kron(eye, second)
        scale = sparse.diags(1 / spread.ravel())
        rough = sparse.identity(n * n) + length**4 * (laplace.T @ laplace)
        return (scale @ rough @ scale).tocsc()

    def solve(self, iterations: int = 6) -> np.ndarray:
        """Samples of the PSF; `good` says which stars were used."""
        for i in range(iterations):
            surface = self._fit_surface()
            self._fit_stars(surface, reject=i >= 2)
        surface = self._fit_surface()
        basis = self._basis(self.samples)
        return basis @ surface @ basis.T

    def _basis(self, at: np.ndarray, derivative: int = 0) -> np.ndarray:
        """B-splines (of interpolating a constant) at positions, shape (n, n_knots)."""
        t = (at[:, None] - self.knots[None, :]) * self.oversampling
        a = np.abs(t)
        if derivative:
            inner, outer = (1.5 * a - 2) * t, -0.5 * (2 - a) ** 2 * np.sign(t)
            return np.where(a < 1, inner, np.where(a < 2, outer, 0.0)) * self.oversampling
        return np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.where(a < 2, (2 - a) ** 3 / 6, 0.0))

    def _first_flux(self) -> np.ndarray:
        surfaces = [self._star(k, self.start) for k in range(len(self.data))]
        w2 = self.weight**2
        return np.array(
            [
                np.sum(w * d * s) / max(np.sum(w * s * s), 1e-300)
                for w, d, s in zip(w2, self.data, surfaces, strict=True)
            ]
        )

    def _star(self, k: int, surface: np.ndarray, dx: int = 0, dy: int = 0) -> np.ndarray:
        x, y = self.center[k]
        return self._basis(self.pixels - y, dy) @ surface @ self._basis(self.pixels - x, dx).T

    def _weights(self, k: int, surface: np.ndarray) -> np.ndarray:
        model = np.abs(self.flux[k] * self._star(k, surface))
        w = self.weight[k]
        return w / np.sqrt(1 + (_TOLERATED * model * w) ** 2)

    def _fit_surface(self) -> np.ndarray:
        """Coefficients of the PSF, given the fluxes and centres of the stars."""
        from scipy import sparse
        from scipy.sparse.linalg import spsolve

        normal = self.prior
        right = np.zeros(self.start.size)
        for k in np.flatnonzero(self.good):
            x, y = self.center[k]
            rows = sparse.kron(
                sparse.csr_array(self._basis(self.pixels - y)),
                sparse.csr_array(self._basis(self.pixels - x)),
                format="csr",
            )
            w = self._weights(k, self.start)
            rows = sparse.diags((self.flux[k] * w).ravel()) @ rows
            miss = w * (self.data[k] - self.flux[k] * self._star(k, self.start))
            normal = normal + rows.T @ rows
            right += rows.T @ miss.ravel()
        surface = self.start + spsolve(sparse.csc_matrix(normal), right).reshape(self.start.shape)
        return surface / (surface.sum() / self.oversampling**2)

    def _fit_stars(self, surface: np.ndarray, *, reject: bool) -> None:
        """One Gauss-Newton step in flux and centre of every star."""
        misfit = np.full(len(self.data), np.inf)
        for k in range(len(self.data)):
            w = self._weights(k, surface)
            star = self._star(k, surface)
            columns = [
                star,
                -self.flux[k] * self._star(k, surface, dx=1),
                -self.flux[k] * self._star(k, surface, dy=1),
            ]
            design = np.column_stack([(w * c).ravel() for c in columns])
            miss = (w * (self.data[k] - self.flux[k] * star)).ravel()
            step = np.linalg.lstsq(design, miss, rcond=None)[0]
            self.flux[k] += step[0]
            self.center[k] += np.clip(step[1:], -0.5, 0.5)
            misfit[k] = np.sum((miss - design @ step) ** 2) / max(np.sum(w > 0) - 3, 1)
        # The surface is free to be off centre: the centres of the stars take that up.
        basis = self._basis(self.samples)
        moments = _adaptive_moments(basis @ surface @ basis.T)
        if moments is not None:
            self.center += np.array(moments[:2]) / self.oversampling
        if reject:
            usual = np.median(misfit)
            good = (misfit < max(3.0, 3 * usual)) & (self.flux > 0)
            if good.sum() >= max(3, len(good) // 2):
                self.good = good


def gaussian_psf(fwhm: float, *, size: int | None = None) -> PSF:
    """Round Gaussian as an effective PSF, sampled finely enough for its width.

    Parameters
    ----------
    fwhm : float
        Full width at half maximum in pixels, the pixel included.
    size : int, optional
        Side in pixels, odd; by default about 5 FWHM, where nothing is left.

    Returns
    -------
    PSF

    Raises
    ------
    ValueError
        If ``fwhm`` is not a positive number.

    Examples
    --------
    >>> from galmorph.detection import gaussian_psf
    >>> gaussian_psf(2.5)
    PSF(shape=(57, 57), oversampling=4, includes_pixel=True)
    """
    fwhm = _positive(fwhm, "fwhm")
    oversampling = max(1, math.ceil(8 / fwhm))
    half = (size or 2 * max(2, math.ceil(2.7 * fwhm)) + 1) // 2
    step = np.arange(-half * oversampling, half * oversampling + 1) / oversampling
    profile = np.exp(-(step**2) / (2 * (fwhm / _FWHM) ** 2))
    return PSF(np.outer(profile, profile), oversampling=oversampling)


def _gaussian(stars, sizes, size, n_found, min_stars) -> PSFEstimate:
    smallest = int(np.argmin(sizes))
    fwhm = float(sizes[smallest])
    psf = gaussian_psf(fwhm, size=size)
    error = fwhm / stars.snr[smallest]
    statement = (
        f"Gaussian of FWHM {fwhm:.2f} +/- {error:.2f} pixels, the width of the smallest of "
        f"{len(stars)} bright, round and isolated sources: only {n_found} of them have the size "
        f"of a point source, and an empirical PSF needs {min_stars}. It is an upper limit on the "
        "core of the PSF, and has no wings."
    )
    return PSFEstimate(psf, "gaussian", 1, fwhm, error, stars.center[[smallest]], statement, sizes)


def _width(psf: PSF) -> float:
    """FWHM in pixels: diameter of the circle of the area above half the maximum."""
    from scipy.ndimage import zoom

    fine = 8
    samples = zoom(psf.data, fine, order=3, grid_mode=True, mode="nearest")
    area = np.sum(samples > samples.max() / 2) / (fine * psf.oversampling) ** 2
    return float(2 * math.sqrt(area / math.pi))
