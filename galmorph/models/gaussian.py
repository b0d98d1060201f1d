"""The scaled bivariate Gaussian."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy.modeling.parameters import Parameter

from galmorph.models.base import GalaxyModel

__all__ = ["GaussianGalaxy2D"]

# half-light radius of a Gaussian of unit standard deviation
_R_OF_SIGMA = np.sqrt(2.0 * np.log(2.0))


class GaussianGalaxy2D(GalaxyModel):
    """A galaxy with the profile of a bivariate Gaussian density.

    Parameters
    ----------
    flux : float
        Total flux.
    x_0, y_0 : float
        Centre in pixels; the first pixel is centred on (0, 0).
    r_eff : float
        Half-light radius along the major axis, in pixels: 1.1774 standard deviations.
    ellip : float
        Ellipticity, 1 - b/a.
    theta : float or `~astropy.units.Quantity`
        Angle of the major axis, counter-clockwise from +x, in radians.
    psf : PSF, array, or model, optional
        See `galmorph.PSF`.

    See Also
    --------
    SersicGalaxy2D : of which this is n = 0.5.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D
    >>> galaxy = GaussianGalaxy2D.from_covariance(100, 20, 20, [[9, 2], [2, 4]])
    >>> np.allclose(galaxy.covariance, [[9, 2], [2, 4]])
    True
    """

    flux = Parameter(default=1.0, description="Total flux")
    x_0 = Parameter(default=0.0, description="Centre in x, pixels")
    y_0 = Parameter(default=0.0, description="Centre in y, pixels")
    r_eff = Parameter(
        default=3.0, bounds=(0.05, None), description="Half-light semi-major axis, pixels"
    )
    ellip = Parameter(default=0.0, bounds=(0.0, 0.99), description="Ellipticity, 1 - b/a")
    theta = Parameter(default=0.0, description="Angle of the major axis from +x, radians")

    _profiles = ({"r": "r_eff", "n": 0.5},)

    @classmethod
    def from_covariance(
        cls, flux: float, x_0: float, y_0: float, covariance: Any, **kwargs: Any
    ) -> GaussianGalaxy2D:
        """Make one from the covariance matrix of its density.

        Parameters
        ----------
        flux, x_0, y_0 : float
            As for the class.
        covariance : array-like, shape (2, 2)
            [[xx, xy], [xy, yy]] in pixels squared.
        **kwargs
            As for the class (``psf`` ...).

        Returns
        -------
        GaussianGalaxy2D

        Raises
        ------
        ValueError
            If the matrix is not a covariance.

        Examples
        --------
        >>> from galmorph import GaussianGalaxy2D
        >>> g = GaussianGalaxy2D.from_covariance(1, 0, 0, [[4, 0], [0, 1]])
        >>> float(g.ellip.value)
        0.5
        """
        matrix = np.asarray(covariance, dtype=float)
        if matrix.shape != (2, 2) or not np.allclose(matrix, matrix.T):
            raise ValueError("covariance must be a symmetric (2, 2) matrix")
        values, vectors = np.linalg.eigh(matrix)
        if not np.all(values > 0):
            raise ValueError("covariance must be positive definite")
        return cls(
            flux,
            x_0,
            y_0,
            r_eff=_R_OF_SIGMA * np.sqrt(values[1]),
            ellip=1.0 - np.sqrt(values[0] / values[1]),
            theta=np.arctan2(vectors[1, 1], vectors[0, 1]),
            **kwargs,
        )

    @property
    def covariance(self) -> np.ndarray:
        """Covariance matrix of the density, [[xx, xy], [xy, yy]], in pixels squared."""
        theta = float(self.theta.value)
        turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        major = float(self.r_eff.value) / _R_OF_SIGMA
        minor = major * (1.0 - float(self.ellip.value))
        return turn @ np.diag([major**2, minor**2]) @ turn.T
