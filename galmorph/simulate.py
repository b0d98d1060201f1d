"""Galaxies observed again: elsewhere, with another telescope, at another redshift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy import units as u
from astropy.nddata import NDData, StdDevUncertainty
from numpy.typing import ArrayLike
from scipy.fft import irfft2, rfft2

from galmorph._stamps import PSFSource, StampBatch, StampSource, make_source
from galmorph.flags import FitFlag
from galmorph.models.base import GalaxyModel, _check_shape
from galmorph.psf import PSF
from galmorph.results import FitResult

if TYPE_CHECKING:
    from astropy.cosmology import FLRW

__all__ = ["MockFlag", "MockImages", "observe", "redshifted", "scaling"]

#: Waves of which the PSF of the input passes less than this are not to be had back.
_FLOOR = 1e-3
#: A PSF is too sharp where waves would be amplified more than this, or missed by more than that.
_MAX_GAIN, _MAX_MISS = 2.0, 5e-3
#: An output PSF that passes less than this beyond the Nyquist frequency does not alias.
_ALIAS = 1e-3
#: Share of unknown light in what a pixel sees at which it is masked.
_MASKED = 0.02
#: Widths (pixels) of the Gaussians that fill masked pixels from their neighbours.
_FILL = (1.0, 3.0, 9.0)
#: Stamps that are transformed at once.
_BATCH = 32
_BANDWIDTH = {"nu": 1.0, "lambda": -1.0, "bolometric": 0.0}


class MockFlag(IntFlag):
    """What a mock observation has to say about itself, one bit each.

    Examples
    --------
    >>> from galmorph.simulate import MockFlag
    >>> MockFlag(3)
    <MockFlag.SHARP_PSF|TOO_NOISY: 3>
    """

    #: The wanted PSF is sharper than the one that the image has there: no image (NaN).
    SHARP_PSF = 1
    #: The noise that the image brings is above the wanted one; ``uncertainty`` says what it is.
    TOO_NOISY = 2
    #: Nothing to observe: no usable pixel, no usable PSF, or a failed fit (NaN).
    NO_DATA = 4
    #: A redshift or a scale that is not positive and finite (NaN).
    BAD_REDSHIFT = 8
    #: No noise of the input was given; it was estimated from the stamp itself.
    NOISE_ESTIMATED = 16

    #: There is no image.
    FAILED = SHARP_PSF | NO_DATA | BAD_REDSHIFT


@dataclass(kw_only=True, eq=False, repr=False)
class MockImages:
    """Mock observations of N galaxies, ready to be fitted.

    Attributes
    ----------
    data : array, shape (N, ny, nx)
        Pixel values; NaN where there is no image.
    uncertainty : array, shape (N, ny, nx)
        Standard deviation of the noise in them.
    mask : array of bool, shape (N, ny, nx)
        True where the light is not known: beyond the input, or near its masked pixels.
    psf : PSF, list of PSF, or None
        Of all, or one each.
    flags : array of int32, shape (N,)
        Bit mask, see `MockFlag`.
    unit : `~astropy.units.Unit` or None
        Of the pixel values.

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.simulate import observe
    >>> mock = observe(SersicGalaxy2D(100, 15, 15, 3), shape=(31, 31), noise=0.1, rng=1)
    >>> mock
    <MockImages: 1 of (31, 31) pixels, 0 flagged>
    >>> mock.to_nddata(0).uncertainty.array.shape
    (31, 31)
    """

    data: np.ndarray
    uncertainty: np.ndarray
    mask: np.ndarray
    psf: PSF | list[PSF] | None
    flags: np.ndarray
    unit: u.UnitBase | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return (
            f"<MockImages: {len(self)} of {self.data.shape[1:]} pixels, "
            f"{int(np.count_nonzero(self.flags))} flagged>"
        )

    def __getitem__(self, rows: Any) -> MockImages:
        """Some of the galaxies, by slice or array of indices or bool."""
        rows = np.atleast_1d(np.arange(len(self))[rows])
        arrays = {n: getattr(self, n)[rows] for n in ("data", "uncertainty", "mask", "flags")}
        psf = [self.psf[i] for i in rows] if isinstance(self.psf, list) else self.psf
        return replace(self, psf=psf, **arrays)

    def to_nddata(self, i: int) -> NDData:
        """One galaxy as `~astropy.nddata.NDData`, with uncertainty, mask, unit and PSF.

        Parameters
        ----------
        i : int

        Returns
        -------
        NDData
            Its ``psf`` is an array when it is sampled at pixel steps, else a `PSF`.
        """
        psf = self.psf[i] if isinstance(self.psf, list) else self.psf
        if psf is not None and psf.oversampling == 1 and psf.includes_pixel:
            psf = psf.data
        return NDData(
            self.data[i],
            uncertainty=StdDevUncertainty(self.uncertainty[i]),
            mask=self.mask[i],
            unit=self.unit,
            psf=psf,
        )


# -- cosmology -----------------------------------------------------------------------------


def scaling(
    z_in: ArrayLike,
    z_out: ArrayLike,
    *,
    cosmology: FLRW | None = None,
    bandwidth: str = "nu",
    k_correction: ArrayLike = 0.0,
    evolution: ArrayLike = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    r"""How much smaller and fainter a galaxy is at another redshift.

    Parameters
    ----------
    z_in, z_out : array-like
        Redshifts, positive.
    cosmology : `~astropy.cosmology.FLRW`, optional
        By default that of `astropy.cosmology.default_cosmology` (Planck18).
    bandwidth : {"nu", "lambda", "bolometric"}, optional
        What fluxes are: by unit frequency (AB magnitudes, janskys), by unit wavelength, or
        over all wavelengths.
    k_correction : array-like, optional
        Magnitudes by which the galaxy is fainter at ``z_out`` because another part of its
        spectrum is observed.  None is applied by default: the spectrum is taken as flat.
    evolution : array-like, optional
        Magnitudes by which it is fainter (negative: brighter) because it was another galaxy then.

    Returns
    -------
    size : array
        Ratio of the angular sizes, out / in, by the angular-diameter distances.
    flux : array
        Ratio of the fluxes.  NaN, both, for redshifts that are not positive.

    Raises
    ------
    ValueError
        If ``bandwidth`` is none of the three.

    Notes
    -----
    .. math:: \frac{F_{out}}{F_{in}} = \left(\frac{D_L(z_{in})}{D_L(z_{out})}\right)^2
        \left(\frac{1 + z_{out}}{1 + z_{in}}\right)^b 10^{-0.4 (K + E)}

    with b = 1, -1 and 0, so that the surface brightness goes by :math:`(1 + z)^{-4 + b}`
    (Tolman 1930, PNAS 16, 511; Hogg 1999, arXiv:astro-ph/9905116).

    Examples
    --------
    >>> from galmorph.simulate import scaling
    >>> size, flux = scaling(0.1, 1.0, bandwidth="bolometric")
    >>> print(round(float(flux / size**2 * (2 / 1.1) ** 4), 6))
    1.0
    """
    if bandwidth not in _BANDWIDTH:
        raise ValueError(f"bandwidth must be one of {list(_BANDWIDTH)}, not {bandwidth!r}")
    z_in, z_out = np.broadcast_arrays(np.asarray(z_in, dtype=float), np.asarray(z_out, dtype=float))
    size = np.asarray(_angular_distance(z_in, cosmology) / _angular_distance(z_out, cosmology))
    stretch = (1 + z_out) / (1 + z_in)
    magnitudes = np.asarray(k_correction, dtype=float) + np.asarray(evolution, dtype=float)
    flux = size**2 * stretch ** (_BANDWIDTH[bandwidth] - 4) * 10 ** (-0.4 * magnitudes)
    return np.broadcast_to(size, flux.shape).copy(), np.asarray(flux)


def _angular_distance(z: np.ndarray, cosmology: FLRW | None) -> np.ndarray:
    """Megaparsecs; NaN for redshifts that are none."""
    if cosmology is None:
        from astropy.cosmology import default_cosmology

        cosmology = default_cosmology.get()
    values, index = np.unique(z, return_inverse=True)
    good = np.isfinite(values) & (values > 0)
    distance = np.full(values.shape, np.nan)
    if good.any():
        distance[good] = cosmology.angular_diameter_distance(values[good]).to_value(u.Mpc)
    return distance[np.reshape(index, z.shape)]


def _arcsec(scale: Any, name: str) -> np.ndarray:
    value = scale.to_value(u.arcsec) if isinstance(scale, u.Quantity) else scale
    value = np.asarray(value, dtype=float)
    if not (np.isfinite(value).all() and (value > 0).all()):
        raise ValueError(f"{name} must be positive (arcseconds a pixel), not {scale!r}")
    return value


def _each(value: Any, n: int, name: str) -> np.ndarray:
    value = np.asarray(value, dtype=float)
    if value.ndim > 1 or value.size not in (1, n):
        raise ValueError(f"{name} is a number or one a galaxy ({n}), not of shape {value.shape}")
    return np.broadcast_to(value.ravel(), (n,)) if value.size == 1 else value


# -- the two public functions --------------------------------------------------------------


def redshifted(
    images: Any,
    *,
    z_in: ArrayLike,
    z_out: ArrayLike,
    pixel_scale_in: Any,
    pixel_scale_out: Any,
    psf_in: Any = None,
    psf_out: Any,
    noise_in: Any = None,
    noise_out: Any = None,
    gain: float | None = None,
    mask: Any = None,
    shape: tuple[int, int] | None = None,
    zero_point_in: ArrayLike | None = None,
    zero_point_out: ArrayLike | None = None,
    bandwidth: str = "nu",
    k_correction: ArrayLike = 0.0,
    evolution: ArrayLike = 0.0,
    cosmology: FLRW | None = None,
    rng: np.random.Generator | int | None = None,
) -> MockImages:
    """Galaxies as they would be seen at another redshift, with another telescope.

    Images are shrunk and dimmed as the cosmology says, their PSF is exchanged for a wider one,
    and noise is added to what they have, which the change of PSF has smoothed, so that the
    sum is white and as large as wanted.  The models of a `FitResult`
    are drawn anew instead: they bring neither PSF nor noise, and are the
    better input where the noise of the images is not well known.

    Parameters
    ----------
    images : array, NDData, HDU, path, list of these, or FitResult
        One galaxy a stamp, the sky subtracted; what `galmorph.fit_images` takes.  The middle of
        each stamp goes to the middle of the new one.
    z_in, z_out : float or array, shape (N,)
        Redshift at which a galaxy is, and at which it is to be seen.
    pixel_scale_in, pixel_scale_out : float, `~astropy.units.Quantity`, or array, shape (N,)
        Arcseconds a pixel.
    psf_in : object, optional
        PSF of the images (one or N), in their pixels; anything that `PSF.from_any` takes.
        None: there is none but the pixel.  Not used for a `FitResult`.
    psf_out : object
        The wanted PSF (one or N), in pixels of the output.
    noise_in : float or array, optional
        Standard deviation of the (white) noise of the images, as the ``uncertainty`` of
        `galmorph.fit_images`; 0 for none.  By default what the images bring, or
        else it is estimated from the outskirts of each, and flagged.
    noise_out : float, Quantity or array, shape (N,), optional
        Wanted standard deviation of the noise of a pixel, in the unit of the output.  By default
        none is added, and ``uncertainty`` is what is left of the noise of the images.
    gain : float, optional
        Photoelectrons per unit of the output; given, the galaxy's own photon noise is added.
    mask : array of bool, optional
        True where pixels of the images are bad.
    shape : tuple of int, optional
        (ny, nx) of the output; by default that of the input.
    zero_point_in, zero_point_out : float or array, shape (N,), optional
        Magnitude of one unit of flux in the images and in the output; both or neither.
    bandwidth, k_correction, evolution, cosmology
        See `scaling`.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    MockImages

    Raises
    ------
    ValueError
        If arguments do not agree, a shared PSF is unusable, or no galaxy at all can be drawn
        because the wanted PSF is too sharp.

    Notes
    -----
    In Fourier space an image is multiplied with the ratio of the PSFs, at the waves of the
    output (a Fourier transform at any frequency; nothing is interpolated).  The wanted PSF must
    be wider than the old one is after shrinking: where waves would have to be amplified
    more than twice, the galaxy is flagged `MockFlag.SHARP_PSF`.  Its noise has then a known power
    spectrum, and what is added has the wanted one minus that (as in GalSim's ``whitenImage``;
    Rowe et al. 2015, A&C 10, 121).  The recipe is that of FERENGI (Barden, Jahnke & Häußler
    2008, ApJS 175, 105), without its K-corrections, for which there is ``k_correction``.

    Masked pixels are filled from their neighbours, and masked in the output wherever they would
    matter.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF
    >>> from galmorph.simulate import redshifted
    >>> y, x = np.mgrid[-32:33, -32:33]
    >>> galaxy = 100 * np.exp(-(x**2 + y**2) / (2 * 8.0**2))
    >>> psf = PSF(np.exp(-(x**2 + y**2) / (2 * 1.5**2)))
    >>> mock = redshifted(
    ...     galaxy, z_in=0.05, z_out=0.2, pixel_scale_in=0.4, pixel_scale_out=0.2,
    ...     psf_in=psf, psf_out=psf, noise_in=0.1, noise_out=0.02, rng=1,
    ... )  # fmt: skip
    >>> mock
    <MockImages: 1 of (65, 65) pixels, 0 flagged>
    """
    rng = np.random.default_rng(rng)
    fitted = isinstance(images, FitResult)
    source = images if fitted else _source(images, noise_in, mask, psf_in)
    n = len(source)
    z = [_each(value, n, name) for value, name in ((z_in, "z_in"), (z_out, "z_out"))]
    size, flux = scaling(
        *z,
        cosmology=cosmology,
        bandwidth=bandwidth,
        k_correction=_each(k_correction, n, "k_correction"),
        evolution=_each(evolution, n, "evolution"),
    )
    size = size * _arcsec(pixel_scale_in, "pixel_scale_in")
    size = size / _arcsec(pixel_scale_out, "pixel_scale_out")
    flux = flux * _zero_points(zero_point_in, zero_point_out, n)
    size, flux = _each(size, n, "pixel_scale_in"), _each(flux, n, "flux")
    if fitted:
        mock = _observed(
            *_of_result(source, size, flux, shape),
            psf=psf_out,
            noise=0.0 if noise_out is None else noise_out,
            gain=gain,
            rng=rng,
            unit=source.data_unit,
        )
        mock.flags[~np.isfinite(size)] = MockFlag.BAD_REDSHIFT
        return mock
    if psf_out is None:
        raise ValueError("psf_out, the PSF of the output, is needed")
    if noise_out is not None:
        noise_out = _each(_plain(noise_out, source.unit), n, "noise_out")
    noiseless = _is_zero(noise_in)
    job = _Again(source, size, flux, PSFSource(psf_out, n), shape, noiseless=noiseless)
    return job.run(noise_out, gain, rng)


def observe(
    galaxies: GalaxyModel | FitResult,
    *,
    params: np.ndarray | None = None,
    shape: tuple[int, int] | None = None,
    psf: Any = None,
    pixel_scale_in: Any = None,
    pixel_scale_out: Any = None,
    noise: Any = 0.0,
    gain: float | None = None,
    rng: np.random.Generator | int | None = None,
) -> MockImages:
    """Mock observations of model galaxies with any PSF, pixel scale and noise.

    Parameters
    ----------
    galaxies : GalaxyModel or FitResult
        A model (or a model set), or the models that were fitted.
    params : array, shape (N, P), optional
        Parameters of many galaxies, in place of the model's own.
    shape : tuple of int, optional
        (ny, nx) of the images; needed for a model, by default that of the stamps for a result.
    psf : object, optional
        One for all, or N, in pixels of the output; anything that `PSF.from_any` takes.  By
        default the model's own.
    pixel_scale_in, pixel_scale_out : float, Quantity or array, shape (N,), optional
        Arcseconds a pixel in which the galaxies are described, and of the output; both or neither.
        The middle of the stamp stays in the middle.
    noise : float, Quantity or array, optional
        Standard deviation of the noise of a pixel: a number, one a galaxy (N,), or maps that
        broadcast to (N, ny, nx).
    gain : float, optional
        Photoelectrons per unit of flux; given, the light has Poisson noise.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    MockImages

    Raises
    ------
    ValueError
        If the shape is missing or arguments do not agree.

    Examples
    --------
    >>> from galmorph import LearnedGalaxy2D, SersicGalaxy2D, fit_images
    >>> from galmorph.simulate import observe
    >>> model = SersicGalaxy2D(500, 20, 20, 3, n=1, ellip=0.3)
    >>> mock = observe(model, shape=(41, 41), psf=[[1, 2, 1], [2, 4, 2], [1, 2, 1]], gain=10, rng=1)
    >>> result = fit_images(mock.data, model, uncertainty=mock.uncertainty + 0.01, psf=mock.psf)
    >>> bool(abs(result.params[0, 0] - 500) < 30)
    True
    """
    if (pixel_scale_in is None) != (pixel_scale_out is None):
        raise ValueError("give both of pixel_scale_in and pixel_scale_out, or neither")
    if isinstance(galaxies, FitResult):
        if params is not None:
            raise ValueError("params are those of the result; give params with a model")
        n = len(galaxies)
    elif isinstance(galaxies, GalaxyModel):
        if shape is None:
            raise ValueError("shape, (ny, nx) of the images, is needed to draw a model")
        params, _, _ = galaxies._drawn_with(params, None)
        n = len(params)
    else:
        raise TypeError(f"galaxies must be a GalaxyModel or a FitResult, not {galaxies!r}")
    size = np.ones(n)
    if pixel_scale_in is not None:
        ratio = _arcsec(pixel_scale_in, "pixel_scale_in") / _arcsec(
            pixel_scale_out, "pixel_scale_out"
        )
        size = _each(ratio, n, "pixel_scale_in")
    if isinstance(galaxies, FitResult):
        what = _of_result(galaxies, size, np.ones(n), shape)
    else:
        shape = _check_shape(shape)
        middle = _middle(np.array([shape]))
        what = galaxies, _moved(galaxies, params, middle, middle, size, np.ones(n)), shape
    return _observed(
        *what,
        psf=_own_psf(galaxies) if psf is None else psf,
        noise=noise,
        gain=gain,
        rng=np.random.default_rng(rng),
        unit=getattr(galaxies, "data_unit", None),
    )


# -- models --------------------------------------------------------------------------------


def _middle(shapes: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of stamps (N, 2)."""
    return (shapes[:, ::-1] - 1) / 2


def _moved(model, params, middle_in, middle_out, size, flux) -> np.ndarray:
    """Parameters with lengths and flux scaled, and what was in the middle in the new middle."""
    params = params.copy()
    at = {name: i for i, name in enumerate(model.param_names)}
    for name in model._lengths() - {"x_0", "y_0"}:
        params[:, at[name]] *= size
    params[:, at["flux"]] *= flux
    for axis, name in enumerate(("x_0", "y_0")):
        offset = params[:, at[name]] - middle_in[:, axis]
        params[:, at[name]] = middle_out[:, axis] + offset * size
    return params


def _of_result(result: FitResult, size, flux, shape) -> tuple[GalaxyModel, np.ndarray, tuple]:
    """Model, parameters in pixels of the output (NaN where the fit failed), and its shape."""
    if not isinstance(result.model, GalaxyModel):
        raise ValueError(f"{type(result.model).__name__} is not one of galmorph's models")
    shape = _shape_of(result.shapes, shape)
    params = result.params.copy()
    params[result.failed] = np.nan
    for axis, name in enumerate(("x_0", "y_0")):
        params[:, result.param_names.index(name)] -= result.origin[:, axis]
    middle = _middle(np.array([shape]))
    return (
        result.model,
        _moved(result.model, params, _middle(result.shapes), middle, size, flux),
        shape,
    )


def _own_psf(galaxies: GalaxyModel | FitResult) -> Any:
    """The PSF of a model, or those with which a result was fitted."""
    if isinstance(galaxies, GalaxyModel):
        return galaxies.psf
    if galaxies.psf is None and galaxies.stamps is not None and galaxies.stamps.psfs.per_galaxy:
        return [galaxies._psf_at(i) for i in range(len(galaxies))]
    return galaxies.model.psf if galaxies.psf is None else galaxies.psf


def _shape_of(shapes: np.ndarray, shape: Any) -> tuple[int, int]:
    if shape is not None:
        return _check_shape(shape)
    if len(shapes) == 0 or np.any(shapes != shapes[0]):
        raise ValueError("stamps of different sizes: give the shape of the output")
    return _check_shape(shapes[0])


def _observed(model, params, shape, *, psf, noise, gain, rng, unit) -> MockImages:
    """Models drawn, and noise."""
    n = len(params)
    psfs, bad_psf = PSFSource(psf, n).get(np.arange(n))
    good = np.isfinite(params).all(1) & ~bad_psf
    flags = np.where(good, 0, int(MockFlag.NO_DATA)).astype(np.int32)
    light = np.full((n, *shape), np.nan)
    bare = model.copy()
    bare.psf = None  # what is not given is not there
    for rows, chosen in _drawn_together(psfs, np.flatnonzero(good)):
        light[rows] = bare.render(shape, params=params[rows], psf=chosen)
    sigma = _maps(_plain(noise, unit), light.shape)
    data = light + sigma * rng.standard_normal(light.shape)
    variance = sigma**2
    if gain is not None:
        electrons = _check_gain(gain) * np.maximum(np.nan_to_num(light), 0.0)
        data += (rng.poisson(electrons) - electrons) / gain
        variance = variance + electrons / gain**2
    return MockImages(
        data=data,
        uncertainty=np.sqrt(variance),
        mask=np.isnan(light),
        psf=psfs,
        flags=flags,
        unit=unit,
    )


def _drawn_together(psfs: Any, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """Rows with PSFs that are sampled alike, as the renderer wants them."""
    if not isinstance(psfs, list):
        if rows.size:
            yield rows, psfs
        return
    kinds: dict[tuple, list[int]] = {}
    for i in rows.tolist():
        p = psfs[i]
        kind = p.oversampling, p.includes_pixel, p.shape[0] % 2, p.shape[1] % 2
        kinds.setdefault(kind, []).append(i)
    for together in kinds.values():
        yield np.array(together), [psfs[i] for i in together]


def _plain(noise: Any, unit: u.UnitBase | None) -> np.ndarray:
    """Standard deviations as numbers in a unit."""
    if isinstance(noise, u.Quantity):
        noise = noise.to_value(unit or u.dimensionless_unscaled)
    noise = np.asarray(noise, dtype=float)
    if not (np.isfinite(noise).all() and (noise >= 0).all()):
        raise ValueError("a standard deviation of noise must be finite and not negative")
    return noise


def _maps(noise: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    if noise.ndim == 1 and noise.size == shape[0]:
        noise = noise[:, None, None]
    try:
        return np.broadcast_to(noise, shape)
    except ValueError:
        raise ValueError(f"noise of shape {noise.shape} does not fit images {shape}") from None


def _check_gain(gain: float) -> float:
    if not (np.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive (electrons per unit of flux), not {gain!r}")
    return float(gain)


# -- images --------------------------------------------------------------------------------


def _source(images: Any, noise: Any, mask: Any, psf: Any) -> StampSource:
    if _is_zero(noise):  # no noise is no uncertainty, by which pixels would be left out
        noise = np.ones(np.shape(noise))
    return make_source(images, uncertainty=noise, mask=mask, psf=psf)


def _is_zero(noise: Any) -> bool:
    return noise is not None and isinstance(noise, int | float | np.ndarray) and not np.any(noise)


def _zero_points(zero_in: Any, zero_out: Any, n: int) -> np.ndarray:
    if (zero_in is None) != (zero_out is None):
        raise ValueError("give both zero points or neither")
    if zero_in is None:
        return np.ones(n)
    difference = _each(zero_out, n, "zero_point_out") - _each(zero_in, n, "zero_point_in")
    return 10 ** (0.4 * difference)


class _Again:
    """Images of one call: shrunk, dimmed, blurred, with noise."""

    def __init__(
        self,
        source: StampSource,
        size: np.ndarray,
        flux: np.ndarray,
        psfs: PSFSource,
        shape: Any,
        *,
        noiseless: bool,
    ) -> None:
        self.source, self.size, self.flux, self.psfs = source, size, flux, psfs
        self.shape = _shape_of(source.shapes, shape)
        self.noiseless = noiseless
        n = len(source)
        self.data = np.full((n, *self.shape), np.nan)
        self.sigma = np.full((n, *self.shape), np.nan)
        self.mask = np.ones((n, *self.shape), dtype=bool)
        self.flags = np.zeros(n, dtype=np.int32)

    def run(
        self, noise: np.ndarray | None, gain: float | None, rng: np.random.Generator
    ) -> MockImages:
        for rows in self.source.batches(_BATCH):
            self._batch(self.source.get(rows), noise, rng)
            self.source.release()
        if len(self.flags) and ((self.flags & MockFlag.SHARP_PSF) != 0).all():
            raise ValueError(
                "psf_out is sharper than the PSF that the images have after shrinking, for every "
                "galaxy: take a wider one, or a higher z_out"
            )
        if gain is not None:
            self._add_photon_noise(_check_gain(gain), rng)
        psf, _ = self.psfs.get(np.arange(len(self.flags)))
        return MockImages(
            data=self.data,
            uncertainty=self.sigma,
            mask=self.mask,
            psf=psf,
            flags=self.flags,
            unit=self.source.unit,
        )

    def _batch(self, batch: StampBatch, noise: np.ndarray | None, rng: Any) -> None:
        psf_out, bad = self.psfs.get(batch.index)
        flags = np.where((batch.flags & FitFlag.FAILED) != 0, MockFlag.NO_DATA, 0)
        flags[bad] |= MockFlag.NO_DATA
        flags[~np.isfinite(self.size[batch.index] * self.flux[batch.index])] |= (
            MockFlag.BAD_REDSHIFT
        )
        if not self.noiseless:
            estimated = (batch.flags & FitFlag.NOISE_ESTIMATED) != 0
            flags[estimated] |= MockFlag.NOISE_ESTIMATED
        good = np.flatnonzero((flags & MockFlag.FAILED) == 0)
        if good.size:
            rows = batch.index[good]
            picked = [psf_out[i] for i in good] if isinstance(psf_out, list) else psf_out
            drawn = _Drawn(batch[good], self.size[rows], self.flux[rows], picked, self.shape)
            if self.noiseless:
                drawn.forget_noise()
            added = None if noise is None else noise[rows]
            self.data[rows], self.sigma[rows] = drawn.with_noise(added, rng)
            self.mask[rows] = drawn.mask
            flags[good] |= np.where(drawn.sharp, MockFlag.SHARP_PSF, 0)
            if added is not None:
                flags[good] |= np.where(drawn.noisier_than(added), MockFlag.TOO_NOISY, 0)
            failed = rows[drawn.sharp]
            self.data[failed] = self.sigma[failed] = np.nan
            self.mask[failed] = True
        self.flags[batch.index] = flags

    def _add_photon_noise(self, gain: float, rng: np.random.Generator) -> None:
        electrons = gain * np.maximum(np.nan_to_num(self.data), 0.0)
        self.data += (rng.poisson(electrons) - electrons) / gain
        self.sigma = np.sqrt(self.sigma**2 + electrons / gain**2)


class _Drawn:
    """A batch of images at the waves of the output.

    Attributes
    ----------
    light : array, shape (B, ny, nx)
        Without added noise.
    mask : array of bool, shape (B, ny, nx)
    sharp : array of bool, shape (B,)
        Whether the wanted PSF is out of reach.
    """

    def __init__(self, batch, size, flux, psf_out, shape) -> None:
        known = batch.inv_sigma > 0
        self.shape, count = shape, len(batch)
        self._box = _box(known.shape[1:], shape, size.max(), psf_out)
        copies = 3 if any(_has_aliases(p) for p in _unique(psf_out)) else 1
        ky, kx = _grid(self._box, copies)
        wanted = _amplitudes(psf_out, count, ky[None], kx[None])
        scaled = size[:, None] * ky, size[:, None] * kx
        has = _amplitudes(batch.psf, count, *scaled)
        # waves that the pixels of the input do not hold
        has = has * (_held(scaled[0])[:, :, None] & _held(scaled[1])[:, None])
        ratio = wanted * has.conj() / (np.abs(has) ** 2 + _FLOOR**2)
        miss = np.abs(ratio * has - wanted).max((1, 2))
        self.sharp = (miss > _MAX_MISS) | (np.abs(ratio).max((1, 2)) > _MAX_GAIN)

        self._waves = [_waves(k, n) for k, n in zip(scaled, known.shape[1:], strict=True)]
        centre = [np.exp(-0.5j * k * (n - 1)) for k, n in zip((ky, kx), shape, strict=True)]
        self._phase = centre[0][:, None] * centre[1]
        self._copies = copies
        self.light = flux[:, None, None] * self._place(_filled(batch.data, known), ratio)
        # shares of what the PSF of a pixel sees
        area = size[:, None, None] ** 2
        self.mask = 1 - area * self._place(known.astype(float), wanted) > _MASKED
        variance = np.where(known, 1 / np.where(known, batch.inv_sigma, 1.0) ** 2, 0.0)
        variance = np.maximum(area * self._place(variance, wanted), 0.0)
        largest = variance.max((1, 2), keepdims=True)
        self._share = variance / np.where(largest > 0, largest, 1.0)
        power = self._fold(np.abs(ratio) ** 2).real
        self._power = largest * (flux / size)[:, None, None] ** 2 * power

    def forget_noise(self) -> None:
        """The images had none."""
        self._power = np.zeros_like(self._power)

    def noisier_than(self, sigma: np.ndarray) -> np.ndarray:
        """Whether the noise of some wave is above a wanted one (B,)."""
        return self._power.max((1, 2)) > sigma**2 * (1 + 1e-9)

    def with_noise(
        self, sigma: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Light with noise up to a level (B,), and the standard deviation of all noise."""
        brought = self._mean(self._power)
        if sigma is None:
            return self.light, np.sqrt(self._share * brought)
        wanted = np.broadcast_to(sigma[:, None, None] ** 2, self._power.shape)
        noise = self._noise(np.maximum(wanted - self._power, 0.0), rng)
        if brought.any():
            # where the input brings less noise than at its worst, or none at all
            noise += np.sqrt(np.clip(1 - self._share, 0, 1)) * self._noise(self._power, rng)
        total = self._mean(np.maximum(wanted, self._power))
        return self.light + noise, np.broadcast_to(np.sqrt(total), noise.shape)

    def _place(self, images: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Images (B, ny, nx) of the output: the waves of the input times a factor."""
        wave_y, wave_x = self._waves
        spectrum = (wave_y @ images) @ wave_x.transpose(0, 2, 1)
        return self._image(self._fold(spectrum * factor * self._phase))

    def _fold(self, spectrum: np.ndarray) -> np.ndarray:
        """Sampling at the pixels: waves beyond their Nyquist frequency land within."""
        height, width = self._box[0], self._box[1] // 2 + 1
        parts = spectrum.reshape(-1, self._copies, height, self._copies, width)
        return parts.sum((1, 3))

    def _image(self, spectrum: np.ndarray) -> np.ndarray:
        image = irfft2(spectrum, self._box)
        return image[:, : self.shape[0], : self.shape[1]]

    def _noise(self, power: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        white = rfft2(rng.standard_normal((len(power), *self._box)))
        return self._image(white * np.sqrt(power))

    def _mean(self, power: np.ndarray) -> np.ndarray:
        """Variance of a pixel (B, 1, 1): the mean over the whole plane of waves."""
        weight = np.full(power.shape[2], 2.0)
        weight[0] = weight[-1] = 1.0
        return (power.mean(1) @ (weight / weight.sum()))[:, None, None]


def _box(shape_in, shape_out, size: float, psf_out: Any) -> tuple[int, int]:
    """Even sides of a periodic box in which nothing comes round into the stamp."""
    from scipy.fft import next_fast_len

    sides = []
    for axis in (0, 1):
        reach = max(p.shape[axis] / p.oversampling for p in _unique(psf_out)) / 2
        least = max(0.5 * (size * shape_in[axis] + shape_out[axis]) + reach, shape_out[axis])
        sides.append(2 * next_fast_len(int(np.ceil(least / 2)) + 1, real=True))
    return sides[0], sides[1]


def _grid(box: tuple[int, int], copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Wave numbers (radians a pixel) of the half plane, with what lies beyond it."""
    beyond = np.arange(copies) - copies // 2
    ky = 2 * np.pi * (np.fft.fftfreq(box[0]) + beyond[:, None]).ravel()
    kx = 2 * np.pi * (np.fft.rfftfreq(box[1]) + beyond[:, None]).ravel()
    return ky, kx


def _held(k: np.ndarray, step: float = 1.0) -> np.ndarray:
    """Whether samples at steps (in pixels) hold a wave."""
    return np.abs(k) <= np.pi / step * (1 + 1e-9)


def _waves(k: np.ndarray, count: int, step: float = 1.0) -> np.ndarray:
    """Plane waves (B, K, count) at samples about their middle."""
    where = (np.arange(count) - 0.5 * (count - 1)) * step
    return np.exp(-1j * k[..., None] * where) * _held(k, step)[..., None]


def _amplitudes(psf: Any, count: int, ky: np.ndarray, kx: np.ndarray) -> np.ndarray:
    """Transfer (count or 1, K, M) of a PSF, or one each, at waves (count or 1, K) and (.., M)."""
    if psf is None:
        return np.sinc(ky / (2 * np.pi))[..., None] * np.sinc(kx / (2 * np.pi))[:, None]
    if isinstance(psf, PSF):
        return _amplitude(psf, ky, kx)
    result = np.empty((count, ky.shape[1], kx.shape[1]), dtype=complex)
    for one in _unique(psf):
        rows = [i for i, p in enumerate(psf) if p == one]
        waves = (k if len(k) == 1 else k[rows] for k in (ky, kx))
        result[rows] = _amplitude(one, *waves)
    return result


def _amplitude(psf: PSF, ky: np.ndarray, kx: np.ndarray) -> np.ndarray:
    step = 1 / psf.oversampling
    wave_y, wave_x = (_waves(k, n, step) for k, n in zip((ky, kx), psf.shape, strict=True))
    amplitude = (wave_y @ psf.data) @ wave_x.transpose(0, 2, 1)
    if not psf.includes_pixel:
        amplitude = amplitude * _amplitudes(None, 1, ky, kx)
    return amplitude


def _unique(psf: PSF | Sequence[PSF]) -> list[PSF]:
    return [psf] if isinstance(psf, PSF) else list(dict.fromkeys(psf))


def _has_aliases(psf: PSF) -> bool:
    """Whether an oversampled PSF passes waves that its pixels do not hold."""
    if psf.oversampling == 1:
        return False
    beyond = np.linspace(np.pi, 3 * np.pi, 65)[None]
    zero = np.zeros((1, 1))
    along = _amplitude(psf, beyond, zero), _amplitude(psf, zero, beyond)
    return max(np.abs(a).max() for a in along) > _ALIAS


def _filled(data: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Images with unknown pixels filled from their neighbours; 0 far from all of them."""
    from scipy.ndimage import gaussian_filter

    rows = np.flatnonzero(~known.all((1, 2)))
    filled = np.where(known, data, 0.0)
    for i in rows:
        left = ~known[i]
        for width in _FILL:
            weight = gaussian_filter(known[i].astype(float), width, mode="constant")
            mean = gaussian_filter(np.where(known[i], data[i], 0.0), width, mode="constant")
            now = left & (weight > 0.05)
            filled[i][now] = mean[now] / weight[now]
            left &= ~now
    return filled
