"""The Sérsic profile."""

from __future__ import annotations

from astropy.modeling.parameters import Parameter

from galmorph.models.base import GalaxyModel

__all__ = ["SersicGalaxy2D"]


class SersicGalaxy2D(GalaxyModel):
    r"""A galaxy with an elliptical Sérsic profile, as a detector sees it.

    Parameters
    ----------
    flux : float
        Total flux, integrated to infinity.
    x_0, y_0 : float
        Centre in pixels; the first pixel is centred on (0, 0).
    r_eff : float
        Half-light radius along the major axis, in pixels.
    n : float
        Sérsic index, 0.2 to 8.
    ellip : float
        Ellipticity, 1 - b/a.
    theta : float or `~astropy.units.Quantity`
        Angle of the major axis, counter-clockwise from +x, in radians.
    psf : PSF, array, or model, optional
        See `galmorph.PSF`.

    Notes
    -----
    Sérsic (1968), in the notation of Graham & Driver (2005, PASA 22, 118):

    .. math:: I(u) = \frac{F\, b_n^{2n}}{2\pi n\,\Gamma(2n)\, q\, r_\mathrm{eff}^2}
              \exp(-b_n u^{1/n}), \qquad \gamma(2n, b_n) = \Gamma(2n)/2,

    where u is the elliptical radius in units of ``r_eff`` and q = 1 - ``ellip``.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> y, x = np.mgrid[:41, :41]
    >>> galaxy = SersicGalaxy2D(flux=100, x_0=20.3, y_0=19.8, r_eff=4, n=2, ellip=0.3)
    >>> image = galaxy(x, y)
    >>> image.shape, bool(image.argmax() == 20 * 41 + 20)
    ((41, 41), True)
    """

    flux = Parameter(default=1.0, description="Total flux")
    x_0 = Parameter(default=0.0, description="Centre in x, pixels")
    y_0 = Parameter(default=0.0, description="Centre in y, pixels")
    r_eff = Parameter(
        default=3.0, bounds=(0.05, None), description="Half-light semi-major axis, pixels"
    )
    n = Parameter(default=1.5, bounds=(0.2, 8.0), description="Sérsic index")
    ellip = Parameter(default=0.0, bounds=(0.0, 0.99), description="Ellipticity, 1 - b/a")
    theta = Parameter(default=0.0, description="Angle of the major axis from +x, radians")

    _profiles = ({"r": "r_eff", "n": "n"},)
