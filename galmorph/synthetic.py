"""Synthetic galaxies: canonical light, mock stamps, and whole fields with their truth."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
from astropy import units as u
from astropy.table import QTable
from astropy.wcs import WCS

from galmorph.models.base import GalaxyModel, _check_shape
from galmorph.models.bulge_disk import BulgeDiskGalaxy2D
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.models.sersic import SersicGalaxy2D
from galmorph.psf import PSF, cached_radius
from galmorph.simulate import _arcsec, observe

__all__ = [
    "MockField",
    "SizeRelation",
    "canonical_images",
    "draw_galaxies",
    "mock_field",
    "mock_stamps",
    "textured",
    "to_galsim",
    "truth_table",
]

#: Galaxies per square arcminute and magnitude at r = 22.5, and the slope of its logarithm:
#: counted on one field of KiDS and VIKING (52 square arcminutes, 18 < r < 24).
COUNTS_AT, COUNTS, COUNTS_SLOPE = 22.5, 7.3, 0.30
#: Sides of the stamps in which the galaxies of a field are drawn.
_SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: A galaxy is drawn out to where its light is this fraction of the noise of a pixel.
_FAINTEST = 0.02
#: Samples of a canonical pixel, along each axis.
_FINE = 4
_MARGIN = 4


@dataclass(frozen=True)
class SizeRelation:
    """Half-light radii that follow magnitudes: a log-normal about a power law.

    Parameters
    ----------
    radius : float
        Median half-light semi-major axis in arcsec of galaxies of ``magnitude``.
    slope : float
        Of log10 radius with magnitude.
    scatter : float
        Standard deviation of log10 radius.
    magnitude : float

    Notes
    -----
    The defaults are a straight line through Sérsic fits of 142 galaxies of 17 < r < 22 in one
    field of KiDS.

    Examples
    --------
    >>> from galmorph.synthetic import SizeRelation
    >>> float(SizeRelation(scatter=0.0)([20.0], rng=1)[0])
    0.97
    """

    radius: float = 0.97
    slope: float = -0.118
    scatter: float = 0.18
    magnitude: float = 20.0

    def __call__(
        self, magnitude: np.ndarray, rng: np.random.Generator | int | None = None
    ) -> np.ndarray:
        """Radii in arcsec, (N,), of magnitudes (N,)."""
        magnitude = np.asarray(magnitude, dtype=float)
        scatter = self.scatter * np.random.default_rng(rng).standard_normal(magnitude.shape)
        return self.radius * 10.0 ** (self.slope * (magnitude - self.magnitude) + scatter)


# -- galaxies ------------------------------------------------------------------------------


def draw_galaxies(
    model: GalaxyModel,
    n: int | None = None,
    *,
    shape: tuple[int, int],
    pixel_scale: float | u.Quantity = 0.2,
    zero_point: float = 25.0,
    magnitudes: tuple[float, float] | np.ndarray = (18.0, 24.0),
    slope: float = COUNTS_SLOPE,
    density: float | u.Quantity | None = None,
    size: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    population: Any = "default",
    classes: Any = None,
    condition: Any = None,
    rng: np.random.Generator | int | None = None,
) -> np.ndarray:
    """Draw galaxies of a field: brightness, place, size, angle and shape.

    Parameters
    ----------
    model : LearnedGalaxy2D, SersicGalaxy2D or BulgeDiskGalaxy2D
    n : int, optional
        How many; by default a Poisson number, by ``density`` and the area.
    shape : tuple of int
        (ny, nx) of the field, in which the centres are strewn evenly.
    pixel_scale : float or Quantity
        Arcseconds a pixel.
    zero_point : float
        Magnitude of one unit of flux.
    magnitudes : tuple of float, or array, shape (n,)
        Bright and faint limit; or the magnitudes themselves.
    slope : float
        Of the logarithm of the counts with magnitude.
    density : float or Quantity, optional
        Galaxies per square arcminute between the limits; by default the counts of one field of
        KiDS in r, 7.3 per square arcminute and magnitude at 22.5.
    size : callable, optional
        ``size(magnitude, rng)`` gives half-light semi-major axes in arcsec; `SizeRelation` by
        default.
    population : str or object
        What shapes there are: a name (`galmorph.nets.flow.Population`), None for the prior of
        the network, or any object with ``sample(n, rng)``; see `LearnedGalaxy2D.sample`.
    classes, condition : object, optional
        See `LearnedGalaxy2D.sample`.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    array, shape (N, P)
        Parameters of the model, in pixels and radians.

    Raises
    ------
    ValueError
        If the magnitudes are no range and of another number than n.
    TypeError
        If it is not known how such a model is drawn.

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.synthetic import draw_galaxies
    >>> draw_galaxies(SersicGalaxy2D(), 5, shape=(300, 300), rng=1).shape
    (5, 7)
    """
    rng = np.random.default_rng(rng)
    shape = _check_shape(shape)
    scale = float(_arcsec(pixel_scale, "pixel_scale"))
    given = np.asarray(magnitudes, dtype=float)
    if given.shape == (2,) and n != 2:
        if not given[0] < given[1]:
            raise ValueError(f"magnitudes must be (bright, faint), not {magnitudes!r}")
        if n is None:
            area = shape[0] * shape[1] * scale**2 / 3600.0
            n = int(rng.poisson(_density(density, given, slope) * area))
        magnitude = _power_law(given, slope, n, rng)
    else:
        if given.ndim != 1 or n not in (None, len(given)):
            raise ValueError("magnitudes must be (bright, faint), or one of each galaxy")
        magnitude, n = given, len(given)
    flux = 10.0 ** (-0.4 * (magnitude - zero_point))
    radius = (size or SizeRelation())(magnitude, rng) / scale
    params = _shapes(model, n, rng, population, classes, condition)
    at = {name: i for i, name in enumerate(model.param_names)}
    params[:, 0] = flux
    params[:, 1] = rng.uniform(-0.5, shape[1] - 0.5, n)
    params[:, 2] = rng.uniform(-0.5, shape[0] - 0.5, n)
    turn = rng.uniform(0, 2 * np.pi, n)
    for name in ("theta", "theta_bulge", "theta_disk"):
        if name in at:
            params[:, at[name]] += turn
    if isinstance(model, BulgeDiskGalaxy2D):
        for name in ("r_bulge", "r_disk"):
            params[:, at[name]] = (params[:, at[name]] * radius).clip(0.05)
    else:
        params[:, 3] = radius
    return params


def _shapes(model, n, rng, population, classes, condition) -> np.ndarray:
    """Parameters (n, P) with the shapes of a population; lengths in units of the size."""
    if isinstance(model, LearnedGalaxy2D):
        params = model.sample(n, rng, population=population, classes=classes, condition=condition)
        params[:, 4] = 0.0
        return params
    if classes is not None or condition is not None:
        raise ValueError("classes and condition are for the learned galaxy")
    names = {SersicGalaxy2D: "sersic", BulgeDiskGalaxy2D: "bulge_disk"}
    if type(model) not in names:
        raise TypeError(f"there is no population of {type(model).__name__}")
    if population == "default":
        from galmorph.nets.flow import Population

        population = Population.from_pretrained(names[type(model)])
    drawn = np.asarray(population.sample(n, rng))
    params = np.zeros((n, len(model.param_names)))
    if isinstance(model, SersicGalaxy2D):
        params[:, 4:6] = _sersic_shapes(drawn)
    else:
        params[:, 3:] = _bulge_disk_shapes(drawn)
    return params


def _sersic_shapes(drawn: np.ndarray) -> np.ndarray:
    """Index and ellipticity of ln n and logit ellipticity, (n, 2)."""
    return np.stack([np.exp(drawn[:, 0]).clip(0.2, 8.0), 0.99 * _logistic(drawn[:, 1])], 1)


def _bulge_disk_shapes(drawn: np.ndarray) -> np.ndarray:
    """bulge_fraction, r, n, ellip, theta of the bulge, r, ellip, theta of the disk, (n, 8).

    Of logit bulge fraction, ln r_bulge / r_disk, ln n_bulge and the logits of the ellipticities;
    both parts have one axis, and the radius of the disk is 1.
    """
    zero, one = np.zeros(len(drawn)), np.ones(len(drawn))
    ellip = 0.99 * _logistic(drawn[:, 3:5])
    bulge = [_logistic(drawn[:, 0]), np.exp(drawn[:, 1]), np.exp(drawn[:, 2]).clip(0.2, 8.0)]
    return np.stack([*bulge, ellip[:, 0], zero, one, ellip[:, 1], zero], 1)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _density(density: Any, limits: np.ndarray, slope: float) -> float:
    """Galaxies per square arcminute between magnitudes."""
    if density is not None:
        value = u.Quantity(density, u.arcmin**-2).value if _has_unit(density) else float(density)
        if not value >= 0:
            raise ValueError(f"density must not be negative: {density!r}")
        return value
    rate = slope * np.log(10.0)
    if abs(rate) < 1e-9:
        return COUNTS * (limits[1] - limits[0])
    return COUNTS * float(np.diff(np.exp(rate * (limits - COUNTS_AT)))[0]) / rate


def _power_law(limits: np.ndarray, slope: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Magnitudes of which the counts grow as 10^(slope m)."""
    share = rng.uniform(size=n)
    rate = slope * np.log(10.0)
    if abs(rate) < 1e-9:
        return limits[0] + share * (limits[1] - limits[0])
    return limits[0] + np.log1p(share * np.expm1(rate * (limits[1] - limits[0]))) / rate


def _has_unit(value: Any) -> bool:
    return isinstance(value, u.Quantity)


# -- light without a telescope ------------------------------------------------------------


def canonical_images(
    model: GalaxyModel, params: np.ndarray, *, size: int = 64, r_50: float = 8.0
) -> np.ndarray:
    """Light of galaxies before any telescope: of one flux, size and angle, without PSF or noise.

    Parameters
    ----------
    model : LearnedGalaxy2D or SersicGalaxy2D
    params : array, shape (N, P)
        Of which the shape is taken.
    size : int
        Side of the images.
    r_50 : float
        Half-light semi-major axis in pixels.

    Returns
    -------
    array, shape (N, size, size)
        Light in each pixel; the major axis is along x, and the flux to infinity is 1.

    Notes
    -----
    Drawn four times finer, smoothed by half a pixel (FWHM) and summed.

    Examples
    --------
    >>> from galmorph import LearnedGalaxy2D
    >>> from galmorph.synthetic import canonical_images
    >>> model = LearnedGalaxy2D.from_pretrained()
    >>> canonical_images(model, model.sample(2, rng=1), size=48, r_50=6).shape
    (2, 48, 48)
    """
    if not isinstance(model, (LearnedGalaxy2D, SersicGalaxy2D)):
        raise TypeError(f"{type(model).__name__} has no canonical frame")
    from galmorph.detection import gaussian_psf

    params = np.array(params, dtype=float, ndmin=2)
    fine = _FINE * size
    params[:, :4] = 1.0, (fine - 1) / 2, (fine - 1) / 2, _FINE * r_50
    params[:, model.param_names.index("theta")] = 0.0
    # what the profile misses is sampled, and would ring without any PSF
    psf, images = gaussian_psf(2.0), np.empty((len(params), size, size))
    for i, one in enumerate(params):
        drawn = model.render((fine, fine), params=one[None], psf=psf)[0]
        images[i] = drawn.reshape(size, _FINE, size, _FINE).sum((1, 3))
    return images


def to_galsim(
    model: GalaxyModel,
    params: np.ndarray | None = None,
    *,
    pixel_scale: float | u.Quantity = 0.2,
    oversampling: int = 4,
    reach: float = 12.0,
    gsparams: Any = None,
) -> Any:
    """A galaxy before the PSF as a GalSim ``InterpolatedImage``.

    Parameters
    ----------
    model : GalaxyModel
        Its PSF is left out.
    params : array, shape (P,), optional
        In place of the model's own.
    pixel_scale : float or Quantity
        Arcseconds of the pixels in which the parameters are.
    oversampling : int
        Samples a pixel, along each axis.
    reach : float
        Half-light radii that the image holds, from the centre.
    gsparams : galsim.GSParams, optional

    Returns
    -------
    galsim.InterpolatedImage
        Centred on the galaxy, with its total flux; x and y as in the pixels.

    Raises
    ------
    ImportError
        Without GalSim (``pip install galsim``).

    Notes
    -----
    The pixels of the fine image are part of the light; they are ``oversampling`` times smaller than
    those of the parameters.

    Examples
    --------
    >>> from galmorph import LearnedGalaxy2D
    >>> from galmorph.synthetic import to_galsim
    >>> galaxy = LearnedGalaxy2D.from_pretrained(flux=50, r_50=4)
    >>> round(to_galsim(galaxy, pixel_scale=0.2).flux, 3)  # doctest: +SKIP
    50.0
    """
    import galsim

    own = model.parameters if params is None else params
    params = np.array(own, dtype=float).reshape(1, -1)
    fine = model.copy()
    fine.psf = None
    at = [
        i for i, name in enumerate(model.param_names) if name in model._lengths() - {"x_0", "y_0"}
    ]
    params[:, at] *= oversampling
    half = int(np.ceil(reach * params[0, at].max())) + 2
    params[:, 1:3] = half
    image = fine.render((2 * half + 1, 2 * half + 1), params=params)[0]
    return galsim.InterpolatedImage(
        galsim.Image(image, scale=float(_arcsec(pixel_scale, "pixel_scale")) / oversampling),
        flux=float(params[0, 0]),
        normalization="flux",
        gsparams=gsparams,
    )


# -- stamps --------------------------------------------------------------------------------


def mock_stamps(
    model: GalaxyModel,
    params: np.ndarray,
    shape: tuple[int, int],
    *,
    psf: Any = None,
    rms: float = 0.0,
    gain: float | None = None,
    sky: float = 0.0,
    texture: float = 0.0,
    rng: np.random.Generator | int | None = None,
) -> Any:
    """Mock observations of galaxies, each in the middle of a stamp of its own.

    Parameters
    ----------
    model : GalaxyModel
    params : array, shape (N, P)
        The fractions of their centres are kept.
    shape : tuple of int
        (ny, nx) of the stamps.
    psf, rms, gain, sky, texture, rng
        As for `mock_field`.

    Returns
    -------
    galmorph.simulate.MockImages
        Images, uncertainties, PSF; ready for `galmorph.fit_images`.

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.synthetic import draw_galaxies, mock_stamps
    >>> model = SersicGalaxy2D()
    >>> params = draw_galaxies(model, 4, shape=(100, 100), magnitudes=(18, 20), rng=1)
    >>> mock_stamps(model, params, (41, 41), rms=0.5, rng=2).data.shape
    (4, 41, 41)
    """
    shape = _check_shape(shape)
    params = np.array(params, dtype=float, ndmin=2)
    params[:, 1:3] += (np.array(shape[::-1]) - 1) // 2 - np.rint(params[:, 1:3])
    drawn = observe(model, params=params, shape=shape, psf=psf)
    noise = _Noise(rms, gain, sky)
    rng = np.random.default_rng(rng)
    psf = drawn.psf if isinstance(drawn.psf, PSF) else None
    data, uncertainty = noise.added(textured(model, params, drawn.data, psf, texture, rng), rng)
    return replace(drawn, data=data, uncertainty=uncertainty)


@dataclass(frozen=True)
class _Noise:
    """Gaussian noise, and Poisson noise of light and sky."""

    rms: float
    gain: float | None
    sky: float

    def __post_init__(self) -> None:
        if not 0 <= self.rms < np.inf:
            raise ValueError(f"rms must not be negative: {self.rms!r}")
        if self.gain is not None and not 0 < self.gain < np.inf:
            raise ValueError(f"gain must be positive, not {self.gain!r}")
        if self.sky < 0 or (self.sky > 0 and self.gain is None):
            raise ValueError("sky must not be negative, and needs gain")

    @property
    def empty(self) -> float:
        """Standard deviation in a pixel without a galaxy."""
        return float(np.sqrt(self.rms**2 + (self.sky / self.gain if self.gain else 0.0)))

    def added(self, light: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Light with noise, the sky taken away, and standard deviations."""
        data = light + self.rms * rng.standard_normal(light.shape)
        variance = np.full(light.shape, self.rms**2)
        if self.gain is not None:
            electrons = self.gain * (np.nan_to_num(light).clip(0.0) + self.sky)
            data += (rng.poisson(electrons) - electrons) / self.gain
            variance += electrons / self.gain**2
        return data, np.sqrt(variance)


def textured(
    model: GalaxyModel,
    params: np.ndarray,
    images: np.ndarray,
    psf: PSF | None,
    scale: float,
    rng: np.random.Generator | int | None = None,
) -> np.ndarray:
    """Images with the structure that the model misses: knots, dust, what its maps do not draw.

    Parameters
    ----------
    model : GalaxyModel
        Of others than the learned one nothing is known to be missed.
    params : array, shape (N, P)
    images : array, shape (N, ny, nx)
        As the model draws them.
    psf : PSF or None
        As smooth as which the structure is.
    scale : float
        Of the misfit that the network has learned (`LearnedGalaxy2D.render_misfit`), which is that
        of its encoder; 0.5 is what fits leave (`galmorph.noise.LearnedNoise`).
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    array, shape (N, ny, nx)

    Examples
    --------
    >>> from galmorph import LearnedGalaxy2D
    >>> from galmorph.detection import gaussian_psf
    >>> from galmorph.synthetic import textured
    >>> model = LearnedGalaxy2D.from_pretrained(
    ...     flux=100, x_0=20, y_0=20, r_50=5, psf=gaussian_psf(3)
    ... )
    >>> image = model.render((41, 41))[None]
    >>> textured(model, model.parameters[None], image, model.psf, 0.5, rng=1).shape
    (1, 41, 41)
    """
    if not scale >= 0:
        raise ValueError(f"texture must not be negative: {scale!r}")
    if not scale or not isinstance(model, LearnedGalaxy2D):
        return images
    from scipy.ndimage import gaussian_filter

    from galmorph.rendering.learned_model import misfit_fraction

    width = 0.5 if psf is None else psf.sigma
    field = np.random.default_rng(rng).standard_normal(images.shape)
    field = gaussian_filter(field, (0, width, width), mode="wrap")
    field /= field.std((1, 2), keepdims=True)
    misfit = misfit_fraction(model.shape, params, images.shape[1:])
    return images + scale * misfit * np.abs(images) * field


# -- fields --------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, repr=False)
class MockField:
    """A mock image of many galaxies, with the truth.

    Attributes
    ----------
    data : array, shape (ny, nx)
        With noise; the level of the sky is taken away.
    uncertainty : array, shape (ny, nx)
        Standard deviation of the noise.
    light : array, shape (ny, nx)
        Without noise.
    segmentation : array of int32, shape (ny, nx)
        The ``id`` of the galaxy that dominates each pixel, 0 where none is above the threshold.
    catalog : QTable
        The truth; see `truth_table`.  ``snr`` and ``n_pixels`` (of the segment) are those of this
        image.
    psf : PSF or None
    wcs : WCS
    meta : dict

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.synthetic import draw_galaxies, mock_field
    >>> model = SersicGalaxy2D()
    >>> params = draw_galaxies(model, 20, shape=(200, 200), rng=1)
    >>> mock_field(model, params, (200, 200), rms=0.1, rng=1)
    <MockField: 20 galaxies on (200, 200) pixels>
    """

    data: np.ndarray
    uncertainty: np.ndarray
    light: np.ndarray
    segmentation: np.ndarray
    catalog: QTable
    psf: PSF | None
    wcs: WCS
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<MockField: {len(self.catalog)} galaxies on {self.data.shape} pixels>"

    def to_hdulist(self) -> Any:
        """Extensions SCI, ERR, SEG, LIGHT, PSF (if any) and TRUTH."""
        from astropy.io import fits

        header = self.wcs.to_header()
        primary = fits.PrimaryHDU()
        primary.header.extend(_cards(self.meta))
        images = {
            "SCI": self.data.astype(np.float32),
            "ERR": self.uncertainty.astype(np.float32),
            "SEG": self.segmentation,
            "LIGHT": self.light.astype(np.float32),
        }
        hdus = [primary, *(fits.ImageHDU(d, header, name=n) for n, d in images.items())]
        if self.psf is not None:
            hdus.append(psf_hdu(self.psf))
        return fits.HDUList([*hdus, table_hdu(self.catalog)])

    def write(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write one FITS file, which `galmorph.fit_images` and ``galmorph fit`` take.

        Parameters
        ----------
        path : path-like
        overwrite : bool, optional
        """
        self.to_hdulist().writeto(path, overwrite=overwrite)


def _cards(meta: dict[str, Any]) -> list[tuple[str, Any, str]]:
    return [(name[:8].upper(), value, "") for name, value in meta.items() if value is not None]


def table_hdu(table: QTable) -> Any:
    """A catalogue as the extension TRUTH; read it with ``QTable.read(path, hdu="TRUTH")``."""
    from astropy.io import fits

    buffer = BytesIO()  # only whole files keep columns of sky positions
    table.write(buffer, format="fits")
    buffer.seek(0)
    with fits.open(buffer) as file:
        hdu = file[1].copy()
    hdu.name = "TRUTH"
    return hdu


def psf_hdu(psf: PSF) -> Any:
    """A PSF as an extension that `galmorph.PSF.from_any` understands."""
    from astropy.io import fits

    hdu = fits.ImageHDU(psf.data.astype(np.float32), name="PSF")
    hdu.header["OVERSAMP"] = psf.oversampling, "samples a pixel"
    hdu.header["PIXINCL"] = psf.includes_pixel, "the response of the pixel is in it"
    return hdu


def field_wcs(
    shape: tuple[int, int],
    pixel_scale: float | u.Quantity = 0.2,
    center: tuple[float, float] = (150.0, 2.0),
) -> WCS:
    """A tangential WCS, north up and east to the left.

    Parameters
    ----------
    shape : tuple of int
        (ny, nx).
    pixel_scale : float or Quantity
        Arcseconds a pixel.
    center : tuple of float
        Right ascension and declination of the middle, degrees (ICRS).

    Returns
    -------
    WCS

    Examples
    --------
    >>> from galmorph.synthetic import field_wcs
    >>> field_wcs((101, 101)).pixel_to_world(50, 50).ra.deg.round(6).item()
    150.0
    """
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval = center
    wcs.wcs.crpix = (shape[1] + 1) / 2, (shape[0] + 1) / 2
    step = float(_arcsec(pixel_scale, "pixel_scale")) / 3600.0
    wcs.wcs.cdelt = -step, step
    wcs.wcs.radesys = "ICRS"
    return wcs


def truth_table(
    model: GalaxyModel,
    params: np.ndarray,
    *,
    pixel_scale: float | u.Quantity = 0.2,
    zero_point: float = 25.0,
    wcs: WCS | None = None,
) -> QTable:
    """Truth catalogue of galaxies.

    Parameters
    ----------
    model : GalaxyModel
    params : array, shape (N, P)
    pixel_scale : float or Quantity
        Arcseconds a pixel.
    zero_point : float
        Magnitude of one unit of flux.
    wcs : WCS, optional

    Returns
    -------
    QTable
        ``id`` (from 1), ``magnitude``, ``sky`` (with a WCS), the parameters by their names
        (lengths in pixels, angles in degrees; the latents in one column ``z``), ``n`` and
        ``ellip``, and each radius in arcsec.

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.synthetic import draw_galaxies, truth_table
    >>> model = SersicGalaxy2D()
    >>> params = draw_galaxies(model, 3, shape=(99, 99), rng=1)
    >>> truth_table(model, params)["r_eff_arcsec"].unit
    Unit("arcsec")
    """
    scale = float(_arcsec(pixel_scale, "pixel_scale"))
    table = QTable()
    table["id"] = np.arange(1, len(params) + 1, dtype=np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        table["magnitude"] = (zero_point - 2.5 * np.log10(params[:, 0])) * u.mag
    if wcs is not None:
        table["sky"] = wcs.pixel_to_world(params[:, 1], params[:, 2])
    lengths = model._lengths()
    for i, name in enumerate(model.param_names):
        if _is_latent(name):
            continue
        column = params[:, i]
        if name in lengths:
            column = column * u.pix
        elif name.startswith("theta"):
            column = np.degrees(column) % 360.0 * u.deg
        table[name] = column
        if name in lengths - {"x_0", "y_0"}:
            table[f"{name}_arcsec"] = params[:, i] * scale * u.arcsec
    for name, (value, _) in model.derived(params, np.zeros_like(params)).items():
        table[name] = value
    latents = [i for i, name in enumerate(model.param_names) if _is_latent(name)]
    if latents:
        table["z"] = params[:, latents]
    return table


def _is_latent(name: str) -> bool:
    return name[0] == "z" and name[1:].isdigit()


def mock_field(
    model: GalaxyModel,
    params: np.ndarray,
    shape: tuple[int, int],
    *,
    psf: Any = None,
    rms: float = 0.0,
    gain: float | None = None,
    sky: float = 0.0,
    pixel_scale: float | u.Quantity = 0.2,
    zero_point: float = 25.0,
    center: tuple[float, float] = (150.0, 2.0),
    threshold: float = 1.0,
    texture: float = 0.0,
    rng: np.random.Generator | int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MockField:
    """A mock image of many galaxies, with the truth.

    Parameters
    ----------
    model : GalaxyModel
    params : array, shape (N, P)
        From `draw_galaxies`, or your own.
    shape : tuple of int
        (ny, nx).
    psf : object, optional
        Anything that `galmorph.PSF.from_any` takes; by default the model's own.
    rms : float
        Standard deviation of Gaussian noise in a pixel, in the unit of the flux.
    gain : float, optional
        Photoelectrons per unit of flux; given, light and sky have Poisson noise.
    sky : float
        Level of the sky in a pixel, whose noise is added and which is taken away.
    pixel_scale : float or Quantity
        Arcseconds a pixel.
    zero_point : float
        Magnitude of one unit of flux.
    center : tuple of float
        Right ascension and declination of the middle, degrees.
    threshold : float
        Light of one galaxy, in units of the noise of an empty pixel, from which on a pixel may
        belong to it.  Without noise any light counts.
    texture : float
        Structure that the learned model misses, in units of its learned misfit, added to the light
        as a random field as smooth as the PSF; see `textured`.
    rng : `numpy.random.Generator` or int, optional
    progress : callable, optional
        Told ``(done, total)`` galaxies.

    Returns
    -------
    MockField

    Raises
    ------
    ValueError
        If noise is negative, or there is sky and no gain.

    Notes
    -----
    Each galaxy is drawn in a stamp as large as its light needs: to where it is a fiftieth of the
    noise of an empty pixel.

    Examples
    --------
    >>> from galmorph import PSF, SersicGalaxy2D
    >>> from galmorph.synthetic import draw_galaxies, mock_field
    >>> model = SersicGalaxy2D(psf=PSF([[1, 2, 1], [2, 4, 2], [1, 2, 1]]))
    >>> params = draw_galaxies(model, 30, shape=(256, 256), magnitudes=(19, 23), rng=1)
    >>> field = mock_field(model, params, (256, 256), rms=0.05, rng=2)
    >>> int(field.segmentation.max()) <= 30
    True
    """
    rng = np.random.default_rng(rng)
    shape = _check_shape(shape)
    params, psf, _ = model._drawn_with(np.asarray(params, dtype=float), psf)
    if isinstance(psf, list):
        raise ValueError("a field has one PSF")
    noise = _Noise(rms, gain, sky)
    wcs = field_wcs(shape, pixel_scale, center)
    catalog = truth_table(model, params, pixel_scale=pixel_scale, zero_point=zero_point, wcs=wcs)
    light, segmentation, power = _drawn(
        model, params, shape, psf, noise.empty, threshold, texture, rng, progress
    )
    data, uncertainty = noise.added(light, rng)
    with np.errstate(divide="ignore", invalid="ignore"):
        catalog["snr"] = power / np.float64(noise.empty)
    catalog["n_pixels"] = np.bincount(segmentation.ravel(), minlength=len(params) + 1)[1:]
    meta = {"rms": rms, "gain": gain, "sky": sky, "magzero": zero_point}
    meta |= {"model": type(model).__name__, "pixscale": float(_arcsec(pixel_scale, "pixel_scale"))}
    return MockField(
        data=data,
        uncertainty=uncertainty,
        light=light,
        segmentation=segmentation,
        catalog=catalog,
        psf=psf,
        wcs=wcs,
        meta=meta,
    )


def _drawn(model, params, shape, psf, noise, threshold, texture, rng, progress):
    """Light and segmentation of a field, and the root of each galaxy's summed square, (N,)."""
    light = np.zeros(shape)
    brightest = np.full(shape, threshold * noise)
    owner = np.zeros(shape, np.int32)
    power = np.zeros(len(params))
    sides = _sides(model, params, psf, noise if noise > 0 else None)
    bare = model.copy()
    bare.psf = psf
    done = 0
    for side in np.unique(sides):
        same = np.flatnonzero(sides == side)
        chunk = max(1, int(4e6 / side**2))
        for rows in (same[i : i + chunk] for i in range(0, same.size, chunk)):
            corner = np.rint(params[rows, 1:3]).astype(int) - (side - 1) // 2
            own = params[rows].copy()
            own[:, 1:3] -= corner
            stamps = bare.render((side, side), params=own, dtype="float32")
            stamps = textured(bare, own, stamps, psf, texture, rng)
            power[rows] = np.sqrt(np.square(stamps).sum((1, 2)))
            for k, stamp, (x, y) in zip(rows, stamps, corner, strict=True):
                _add(stamp, k + 1, int(x), int(y), light, brightest, owner)
            done += len(rows)
            if progress is not None:
                progress(done, len(params))
    return light, owner, power


def _add(stamp, label, x, y, light, brightest, owner) -> None:
    """Put a stamp with its first pixel at (x, y) into the field."""
    ny, nx = light.shape
    y0, y1, x0, x1 = max(y, 0), min(y + len(stamp), ny), max(x, 0), min(x + len(stamp), nx)
    if y0 >= y1 or x0 >= x1 or not np.isfinite(stamp).all():
        return
    part = stamp[y0 - y : y1 - y, x0 - x : x1 - x]
    window = np.s_[y0:y1, x0:x1]
    light[window] += part
    more = part > brightest[window]
    brightest[window][more] = part[more]
    owner[window][more] = label


def _sides(model, params, psf, noise: float | None) -> np.ndarray:
    """Sides of the stamps, (N,), that hold all light above a share of the noise."""
    flux, radius, n, q = _profile_of(model, params)
    reach = 0.0 if psf is None else cached_radius(psf)
    rate = np.maximum(2.0 * n - 1.0 / 3.0, 0.05)  # Graham & Driver (2005)
    if noise is None:
        extent = np.full(len(params), 12.0)
    else:  # where I_e exp(-b (u^(1/n) - 1)) is a share of the noise
        effective = flux * rate / (2 * np.pi * n * q * radius**2) * 0.7
        with np.errstate(divide="ignore", invalid="ignore"):
            over = 1.0 + np.log(np.abs(effective) / (_FAINTEST * noise)) / rate
        extent = np.where(over > 0, np.maximum(over, 0.0) ** n, 0.0).clip(2.0, 60.0)
    wanted = 2 * (extent * radius + reach + _MARGIN) + 1
    wanted = np.where(np.isfinite(wanted), wanted, _SIDES[0])
    return np.array(_SIDES)[np.searchsorted(_SIDES, wanted).clip(max=len(_SIDES) - 1)]


def _profile_of(model, params) -> tuple[np.ndarray, ...]:
    """Flux, half-light radius, index and axis ratio of profiles like the galaxies, (N,) each."""
    at = {name: i for i, name in enumerate(model.param_names)}
    flux = params[:, 0]
    radii = [at[name] for name in model._lengths() - {"x_0", "y_0"}]
    radius = params[:, radii].max(1).clip(0.05) if radii else np.full(len(params), 0.05)
    derived = model.derived(params, np.zeros_like(params))

    def value(name: str, otherwise: float) -> np.ndarray:
        if name in derived:
            return derived[name][0]
        return params[:, at[name]] if name in at else np.full(len(params), otherwise)

    index = value("n", 1.0)
    if "n_bulge" in at:  # the wings may be those of the bulge
        index = np.where(params[:, at["bulge_fraction"]] > 0.05, params[:, at["n_bulge"]], 1.0)
    return flux, radius, index.clip(0.2, 8.0), (1.0 - value("ellip", 0.0)).clip(0.05, 1.0)
