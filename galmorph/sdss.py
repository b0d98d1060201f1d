"""Images of the Sloan Digital Sky Survey as they are found in the wild: 8-bit, stretched."""

from __future__ import annotations

import numpy as np

__all__ = ["unstretch"]


def unstretch(images, *, q: float = 9.0) -> np.ndarray:
    r"""Light that is linear, from grey levels with an asinh stretch.

    The JPEG images of SDSS hold :math:`f = \operatorname{asinh}(Q I) / Q` (Lupton et al. 2004, PASP
    116, 133), with f = 1 at level 255.  Models of galaxies are of I; fitted to f they come out too
    large and too flat.

    Parameters
    ----------
    images : array-like
        Grey levels from 0 to 255, of any shape; of a colour image, take the mean of the channels
        first.
    q : float, optional
        The softening Q.  JPEGs do not say theirs: stars of SDSS agree in width for 6 to 11.

    Returns
    -------
    ndarray of float32
        Intensities, equal to ``images / 255`` where these are small.

    Raises
    ------
    ValueError
        If ``q`` is not positive, or levels are below 0 or above 255.

    Examples
    --------
    >>> from galmorph.sdss import unstretch
    >>> [round(float(v), 3) for v in unstretch([0, 1, 128])]
    [0.0, 0.004, 5.089]
    """
    grey = np.asarray(images, dtype=np.float32)
    if not q > 0:
        raise ValueError(f"q must be positive, not {q!r}")
    if grey.size and (np.nanmin(grey) < 0 or np.nanmax(grey) > 255):
        raise ValueError("images must hold grey levels from 0 to 255")
    return np.sinh(q / 255.0 * grey) / q
