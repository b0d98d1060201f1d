"""A star, or anything that the telescope can't resolve."""

from __future__ import annotations

from astropy.modeling.parameters import Parameter

from galmorph.models.base import GalaxyModel

__all__ = ["PointSource2D"]


class PointSource2D(GalaxyModel):
    """A point source: the PSF, shifted and scaled.

    Parameters
    ----------
    flux : float
        Total flux.
    x_0, y_0 : float
        Centre in pixels; the first pixel is centred on (0, 0).
    psf : PSF, array, or model
        See `galmorph.PSF`.

    Examples
    --------
    >>> import numpy as np
    >>> from astropy.modeling.models import Gaussian2D
    >>> from galmorph import PointSource2D
    >>> star = PointSource2D(10, 8.2, 8, psf=Gaussian2D(1, 0, 0, 1.5, 1.5))
    >>> round(float(star.render((17, 17)).sum()), 3)
    10.0
    """

    flux = Parameter(default=1.0, description="Total flux")
    x_0 = Parameter(default=0.0, description="Centre in x, pixels")
    y_0 = Parameter(default=0.0, description="Centre in y, pixels")

    _profiles = ({"r": None},)
