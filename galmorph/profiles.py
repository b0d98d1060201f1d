"""Mean brightness in elliptical annuli."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["RadialProfile", "elliptical_radius", "radial_profile"]


class RadialProfile(NamedTuple):
    """What `radial_profile` returns: four arrays with one entry an annulus."""

    #: Mean semi-major axis of the pixels that were used, in pixels.
    a: np.ndarray
    #: Mean of those pixels, in the unit of the data.
    mean: np.ndarray
    #: Standard deviation of that mean, propagated from ``inv_sigma``.
    err: np.ndarray
    #: Number of pixels used.
    n: np.ndarray


def elliptical_radius(
    shape: tuple[int, int], x_0: float, y_0: float, ellip: float = 0.0, theta: float = 0.0
) -> np.ndarray:
    """Semi-major axis of the ellipse through the centre of each pixel.

    Parameters
    ----------
    shape : tuple of int
        Shape ``(ny, nx)`` of the image.
    x_0, y_0 : float
        Centre of the ellipses in pixels; pixel (0, 0) is centred on (0, 0).
    ellip : float, optional
        Ellipticity ``1 - b/a``, at least 0 and below 1.
    theta : float, optional
        Angle of the major axis in radians, counter-clockwise from +x.

    Returns
    -------
    ndarray of float, shape (ny, nx)
        Semi-major axes in pixels.

    Raises
    ------
    ValueError
        If the centre or the angle is not finite or ``ellip`` is outside [0, 1).

    Examples
    --------
    >>> from galmorph.profiles import elliptical_radius
    >>> elliptical_radius((2, 3), 0, 0, ellip=0.5)
    array([[0.        , 1.        , 2.        ],
           [2.        , 2.23606798, 2.82842712]])
    """
    if not np.all(np.isfinite([x_0, y_0, theta])):
        raise ValueError(f"x_0, y_0 and theta must be finite, got {x_0}, {y_0}, {theta}")
    if not 0 <= ellip < 1:
        raise ValueError(f"ellip must be at least 0 and below 1, got {ellip}")
    y, x = np.indices(shape, dtype=float)
    x -= x_0
    y -= y_0
    along = x * np.cos(theta) + y * np.sin(theta)
    across = y * np.cos(theta) - x * np.sin(theta)
    return np.hypot(along, across / (1 - ellip))


def radial_profile(
    data: np.ndarray,
    inv_sigma: np.ndarray,
    x_0: float,
    y_0: float,
    ellip: float = 0.0,
    theta: float = 0.0,
    *,
    edges: np.ndarray | None = None,
) -> RadialProfile:
    """Mean of an image in elliptical annuli.

    A pixel belongs to the annulus that holds its centre, and all used pixels
    of an annulus count alike: weights taken from noise that depends on the
    signal would bias the mean.

    Parameters
    ----------
    data : array_like, shape (ny, nx)
        The image.
    inv_sigma : array_like, shape (ny, nx)
        One over the standard deviation of each pixel.  Pixels where it is 0 or
        not finite, or where ``data`` is not finite, are not used.
    x_0, y_0 : float
        Centre of the ellipses in pixels; pixel (0, 0) is centred on (0, 0).
    ellip : float, optional
        Ellipticity ``1 - b/a``, at least 0 and below 1.
    theta : float, optional
        Angle of the major axis in radians, counter-clockwise from +x.
    edges : array_like, shape (n_annuli + 1,), optional
        Increasing semi-major axes of the borders of the annuli, in pixels.
        By default one pixel wide near the centre and a tenth of the radius
        further out, up to the distance of the image's furthest corner.

    Returns
    -------
    RadialProfile
        Named tuple of arrays ``(a, mean, err, n)``, one entry for each annulus
        that holds at least one used pixel.

    Raises
    ------
    ValueError
        If the shapes differ or are not 2-D, the geometry is invalid, or the
        edges are not increasing.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.profiles import radial_profile
    >>> data = np.full((9, 9), 7.0)
    >>> profile = radial_profile(data, np.ones((9, 9)), 4, 4, edges=[0, 1.5, 3])
    >>> profile.mean, profile.n
    (array([7., 7.]), array([ 9, 16]))
    >>> profile.err.round(3)
    array([0.333, 0.25 ])
    """
    data = np.asarray(data, dtype=float)
    inv_sigma = np.asarray(inv_sigma, dtype=float)
    if data.ndim != 2 or data.shape != inv_sigma.shape:
        raise ValueError(
            "data and inv_sigma must be 2-D and of one shape, "
            f"got {data.shape} and {inv_sigma.shape}"
        )
    radius = elliptical_radius(data.shape, x_0, y_0, ellip, theta)
    edges = _default_edges(data.shape, x_0, y_0) if edges is None else np.asarray(edges, float)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise ValueError("edges must be a 1-D increasing sequence of at least two radii")

    used = np.isfinite(data) & np.isfinite(inv_sigma) & (inv_sigma > 0)
    used &= (radius >= edges[0]) & (radius < edges[-1])
    annulus = np.searchsorted(edges, radius[used], side="right") - 1

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(annulus, weights=values, minlength=len(edges) - 1)

    n = np.bincount(annulus, minlength=len(edges) - 1)
    filled = n > 0
    n = n[filled]
    return RadialProfile(
        a=total(radius[used])[filled] / n,
        mean=total(data[used])[filled] / n,
        err=np.sqrt(total(inv_sigma[used] ** -2.0)[filled]) / n,
        n=n,
    )


def _default_edges(shape: tuple[int, int], x_0: float, y_0: float) -> np.ndarray:
    ny, nx = shape
    reach = np.hypot(max(x_0, nx - 1 - x_0), max(y_0, ny - 1 - y_0))
    # The first annulus has half a width, so that the central pixel stands alone.
    edges = [0.0, 0.5]
    while edges[-1] <= reach:
        edges.append(edges[-1] + max(1.0, 0.1 * edges[-1]))
    return np.array(edges)
