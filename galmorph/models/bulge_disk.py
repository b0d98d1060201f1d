"""A Sérsic bulge in an exponential disk."""

from __future__ import annotations

from astropy.modeling.parameters import Parameter

from galmorph.models.base import GalaxyModel

__all__ = ["BulgeDiskGalaxy2D"]


class BulgeDiskGalaxy2D(GalaxyModel):
    """A galaxy of two parts with one centre: a Sérsic bulge and an exponential disk.

    Parameters
    ----------
    flux : float
        Total flux of both.
    x_0, y_0 : float
        Centre in pixels; the first pixel is centred on (0, 0).
    bulge_fraction : float
        Share of the flux that the bulge has, 0 to 1.
    r_bulge : float
        Half-light semi-major axis of the bulge, in pixels.
    n_bulge : float
        Sérsic index of the bulge.
    ellip_bulge, theta_bulge : float
        Ellipticity and angle (radians, counter-clockwise from +x) of the bulge.
    r_disk : float
        Half-light semi-major axis of the disk, in pixels: 1.678 scale lengths.
    ellip_disk, theta_disk : float
        Ellipticity and angle of the disk.
    psf : PSF, array, or model, optional
        See `galmorph.PSF`.

    Examples
    --------
    >>> from galmorph import BulgeDiskGalaxy2D
    >>> galaxy = BulgeDiskGalaxy2D(flux=100, x_0=32, y_0=32, r_bulge=1.5, r_disk=6)
    >>> galaxy.render((65, 65)).shape
    (65, 65)
    """

    flux = Parameter(default=1.0, description="Total flux")
    x_0 = Parameter(default=0.0, description="Centre in x, pixels")
    y_0 = Parameter(default=0.0, description="Centre in y, pixels")
    bulge_fraction = Parameter(
        default=0.3, bounds=(0.0, 1.0), description="Share of the flux in the bulge"
    )
    r_bulge = Parameter(
        default=1.5, bounds=(0.05, None), description="Half-light semi-major axis of the bulge"
    )
    n_bulge = Parameter(default=3.0, bounds=(0.2, 8.0), description="Sérsic index of the bulge")
    ellip_bulge = Parameter(default=0.0, bounds=(0.0, 0.99), description="Ellipticity of the bulge")
    theta_bulge = Parameter(default=0.0, description="Angle of the bulge, radians")
    r_disk = Parameter(
        default=4.0, bounds=(0.05, None), description="Half-light semi-major axis of the disk"
    )
    ellip_disk = Parameter(default=0.0, bounds=(0.0, 0.99), description="Ellipticity of the disk")
    theta_disk = Parameter(default=0.0, description="Angle of the disk, radians")

    _profiles = (
        {
            "r": "r_bulge",
            "n": "n_bulge",
            "ellip": "ellip_bulge",
            "theta": "theta_bulge",
            "share": "bulge_fraction",
        },
        {
            "r": "r_disk",
            "n": 1.0,
            "ellip": "ellip_disk",
            "theta": "theta_disk",
            "share": "-bulge_fraction",
        },
    )
