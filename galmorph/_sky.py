"""From pixels to the sky: positions, radii and position angles by the local WCS."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord

__all__ = []

_ARCSEC = 180 * 3600 / np.pi


def local_sky(wcs: Any, x: np.ndarray, y: np.ndarray) -> tuple[SkyCoord, np.ndarray] | None:
    """Sky positions (ICRS) and the Jacobian of the sky by the pixel there.

    Parameters
    ----------
    wcs : celestial WCS, or a list of N of them (or None)
    x, y : array, shape (N,)
        Pixel coordinates; may be NaN.

    Returns
    -------
    sky : SkyCoord, shape (N,)
    jacobian : array, shape (N, 2, 2)
        Arcseconds towards (east, north) per pixel along (x, y).

    None is returned if there is no sky position at all.
    """
    n = len(x)
    lon, lat = np.full(n, np.nan), np.full(n, np.nan)
    jacobian = np.full((n, 2, 2), np.nan)
    one_for_all = not isinstance(wcs, list)
    good = np.isfinite(x) & np.isfinite(y)
    for i in [None] if one_for_all else np.flatnonzero(good):
        rows = np.flatnonzero(good) if i is None else np.array([i])
        this = wcs if i is None else wcs[i]
        if this is None or len(rows) == 0:
            continue
        centre = _icrs(this, x[rows], y[rows])
        if centre is None:
            continue
        lon[rows], lat[rows] = centre.ra.deg, centre.dec.deg
        a, d = centre.ra.rad, centre.dec.rad
        east = np.stack([-np.sin(a), np.cos(a), np.zeros_like(a)])
        north = np.stack([-np.sin(d) * np.cos(a), -np.sin(d) * np.sin(a), np.cos(d)])
        for axis, (dx, dy) in enumerate(((0.5, 0.0), (0.0, 0.5))):
            step = _unit_vector(this, x[rows] + dx, y[rows] + dy)
            step = step - _unit_vector(this, x[rows] - dx, y[rows] - dy)
            jacobian[rows, 0, axis] = (step * east).sum(axis=0) * _ARCSEC
            jacobian[rows, 1, axis] = (step * north).sum(axis=0) * _ARCSEC
    if one_for_all and good.any() and not np.isfinite(lon).any():
        return None
    return SkyCoord(lon * u.deg, lat * u.deg, frame="icrs"), jacobian


def _icrs(wcs: Any, x: np.ndarray, y: np.ndarray) -> SkyCoord | None:
    sky = wcs.pixel_to_world(x, y)
    return sky.icrs if isinstance(sky, SkyCoord) else None


def _unit_vector(wcs: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _icrs(wcs, x, y).cartesian.xyz.value


def ellipse_on_sky(jacobian, r, ellip, theta) -> np.ndarray:
    """Semi-major axis (arcsec), ellipticity and position angle (deg) of pixel ellipses.

    Parameters
    ----------
    jacobian : array, shape (N, 2, 2)
    r, ellip, theta : array, shape (N,)
        Semi-major axis in pixels, 1 - b/a, and angle in radians from +x to +y.

    Returns
    -------
    array, shape (3, N)
        The position angle is from north through east, in [0, 180).
    """
    cos, sin = np.cos(theta), np.sin(theta)
    # Columns: the semi-major and the semi-minor axis as vectors, carried to the sky.
    axes = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    axes = jacobian @ (axes * np.stack([r, r * (1 - ellip)], -1)[:, None, :])
    with np.errstate(invalid="ignore", divide="ignore"):
        shape = axes @ np.swapaxes(axes, 1, 2)  # (east, north) x (east, north)
        half_sum = (shape[:, 0, 0] + shape[:, 1, 1]) / 2
        difference = (shape[:, 1, 1] - shape[:, 0, 0]) / 2
        spread = np.hypot(difference, shape[:, 0, 1])
        major, minor = np.sqrt(half_sum + spread), np.sqrt(np.maximum(half_sum - spread, 0))
        angle = np.arctan2(shape[:, 0, 1], difference) / 2
        # A circle has no axis of its own: keep the direction of theta.
        circle = spread <= 1e-9 * half_sum
        angle = np.where(circle, np.arctan2(axes[:, 0, 0], axes[:, 1, 0]), angle)
        return np.stack([major, 1 - minor / major, np.degrees(angle) % 180])


def ellipse_with_errors(jacobian, r, ellip, theta, cov) -> tuple[np.ndarray, np.ndarray]:
    """`ellipse_on_sky` and its standard deviations, both of shape (3, N).

    Parameters
    ----------
    cov : array, shape (N, 3, 3)
        Covariance of (r, ellip, theta).
    """
    values = ellipse_on_sky(jacobian, r, ellip, theta)
    inputs = np.stack([r, ellip, theta])
    ellip_step = np.where(ellip < 0.5, 1e-5, -1e-5)  # stay within [0, 1)
    slopes = np.empty((len(r), 3, 3))
    for k, step in enumerate((1e-5 * np.abs(r) + 1e-12, ellip_step, np.full(len(r), 1e-5))):
        moved = inputs.copy()
        moved[k] += step
        change = ellipse_on_sky(jacobian, *moved) - values
        change[2] = (change[2] + 90) % 180 - 90
        slopes[:, :, k] = (change / step).T
    variance = np.einsum("nij,njk,nik->in", slopes, cov, slopes)
    return values, np.sqrt(np.where(variance >= 0, variance, np.nan))
