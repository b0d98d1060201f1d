"""What the pixels do: the noise of an image, and the likelihood that it gives to a model."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "CorrelatedNoise",
    "GaussianNoise",
    "LearnedNoise",
    "NoiseModel",
    "PoissonNoise",
    "StudentTNoise",
    "Whitening",
    "estimate_correlation",
    "estimate_noise",
]

#: Half the interquartile range of a normal distribution of unit variance.
_QUARTILE = 0.674489750196082
#: Standard deviation of a unit normal distribution cut at 3 sigma.
_CLIPPED_AT_3 = 0.986578
#: Fewer pixels than this say nothing about their scatter.
MIN_PIXELS = 8
#: Expected counts of a pixel are at least this: a model must not make data impossible.
_MIN_RATE = 1e-3
#: An estimated correlation has at least this variance in every direction.
_MIN_EIGENVALUE = 0.01
#: Images whose noise is fitted at once: so few stay in the cache of the processor.
_ROWS_AT_ONCE = 8
#: Kinds of surroundings (used or not) whose coefficients `CorrelatedNoise` remembers,
#: how many it solves at once, and how many batches of masks it remembers.
_MAX_PATTERNS, _PATTERNS_AT_ONCE, _MAX_MASKS = 100_000, 2048, 4


def estimate_noise(image: ArrayLike, mask: ArrayLike | None = None) -> float | np.ndarray:
    """Standard deviation of the noise of a pixel, from the sky around the galaxy.

    The pixels in the outskirts of the stamp (outside the ellipse inscribed at
    80 % of its half-sides) are clipped at 3 sigma about their median, on both
    sides, until nothing changes, and their standard deviation is corrected
    for what the clipping took.

    What it cannot see: it is the scatter *of single pixels*.  In drizzled or
    resampled images neighbouring pixels are correlated, and the noise of a
    sum over many pixels is larger than this number suggests, so that
    uncertainties from a fit are too small.  Light of the galaxy that reaches
    the outskirts, undetected sources and a sloping sky make the estimate too
    large; the photon noise of the galaxy itself is not in it.

    Parameters
    ----------
    image : array, shape (ny, nx) or (N, ny, nx)
        Pixel values; pixels that are not finite are left out.
    mask : array of bool, same shape, optional
        True where a pixel must not be used.

    Returns
    -------
    float, or array of shape (N,)
        Noise in the unit of the image.  NaN if fewer than 8 pixels are usable, 0
        if most of them share one value.

    Raises
    ------
    ValueError
        If the image is not 2-D or 3-D, or the mask has another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import estimate_noise
    >>> image = np.random.default_rng(1).normal(10, 2, (101, 101))
    >>> image[45:55, 45:55] += 1000
    >>> print(round(estimate_noise(image), 1))
    2.0
    """
    image = np.asarray(image, dtype=float)
    if image.ndim not in (2, 3):
        raise ValueError(f"image must be 2-D or 3-D, not {image.ndim}-D")
    usable = np.isfinite(image)
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != image.shape:
            raise ValueError(f"mask has shape {mask.shape}, the image {image.shape}")
        usable &= ~mask
    cube = image.reshape(-1, *image.shape[-2:])
    sky = outskirts(cube.shape[-2:])
    usable = usable.reshape(cube.shape)
    noise = np.array([_one_noise(d, u, sky) for d, u in zip(cube, usable, strict=True)])
    return float(noise[0]) if image.ndim == 2 else noise


def outskirts(shape: tuple[int, int]) -> np.ndarray:
    """True outside the ellipse at 80 % of the half-sides of a stamp, shape (ny, nx)."""
    y, x = (np.abs(2 * np.arange(n) - (n - 1)) / n for n in shape)
    return np.hypot(y[:, None], x[None, :]) > 0.8


def _one_noise(image: np.ndarray, usable: np.ndarray, sky: np.ndarray) -> float:
    values = image[usable & sky]
    if values.size < MIN_PIXELS:  # the outskirts are masked: take what there is
        values = image[usable]
    if values.size < MIN_PIXELS:
        return np.nan
    return _clipped_std(np.sort(values))


def _clipped_std(values: np.ndarray) -> float:
    """Clipped standard deviation of sorted values (sorted: medians cost nothing)."""
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(20):
            quarter, middle, three = np.quantile(values, (0.25, 0.5, 0.75))
            limit = 3 * (three - quarter) / (2 * _QUARTILE)
            if not limit > 0:
                return 0.0
            lo = np.searchsorted(values, middle - limit, "left")
            hi = np.searchsorted(values, middle + limit, "right")
            if hi - lo == values.size:
                break
            values = values[lo:hi]
        return float(np.std(values) / _CLIPPED_AT_3)


class NoiseModel:
    """What a fitter asks of the noise: derive from this to write another.

    A noise model has a density, `log_prob`.  Fits by least squares also want
    `working`, and `fitted` and `with_parameters` if something about the noise
    itself is to be estimated.
    """

    #: Whether `working` is the same for every model image.
    gaussian: bool = True
    #: Whether pixels depend on one another; if so, ``whitening`` makes them independent.
    correlated: bool = False
    #: Expected information about the model, in units of the mean curvature of `working`.
    #: The covariance that `working` gives is too small by this factor.
    information: float = 1.0
    #: Names of what `fitted` estimates.
    parameter_names: tuple[str, ...] = ()

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the probability density of each pixel.

        Parameters
        ----------
        data, model : array or tensor, shape (..., ny, nx)
            Pixel values and what the model expects there.
        inv_sigma : array or tensor, shape (..., ny, nx)
            One over the standard deviation; 0 where a pixel must not be used.

        Returns
        -------
        array or tensor, shape (..., ny, nx)
            Exactly 0 in unused pixels, so that the sum over pixels is the
            log-likelihood.  A tensor if an argument is one; torch can
            differentiate it by the model.
        """
        raise NotImplementedError

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian problem that stands in for this noise at one model image.

        Iterated, it is a fit by reweighted least squares.

        Parameters
        ----------
        data, model, inv_sigma : array, shape (..., ny, nx)
            As in `log_prob`.

        Returns
        -------
        data, inv_sigma : array, shape (..., ny, nx)
            Gaussian noise of these has the gradient by the model of `log_prob`.
        """
        raise NotImplementedError

    def fitted(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike, n_parameters: ArrayLike
    ) -> np.ndarray:
        """Estimate what is free about the noise, from the residuals of best fits.

        Parameters
        ----------
        data, model, inv_sigma : array, shape (B, ny, nx)
            As in `log_prob`.
        n_parameters : int or array of shape (B,)
            Parameters that were fitted to each image.

        Returns
        -------
        array, shape (B, k)
            One column for each of ``parameter_names``.
        """
        return np.zeros((len(np.asarray(data)), 0))

    def with_parameters(self, values: ArrayLike) -> NoiseModel:
        """Same noise with known parameters, one row of ``values`` (B, k) for each image."""
        values = np.asarray(values, dtype=float)
        if values.ndim != 2 or values.shape[1] != len(self.parameter_names):
            raise ValueError(
                f"{self!r} has parameters {self.parameter_names}, "
                f"but the values have shape {values.shape}"
            )
        return self

    def rows(self, index: Any) -> NoiseModel:
        """Noise of some images, where what is known of it differs from image to image."""
        own = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray) and v.ndim == 3}
        own = {name: value[index] for name, value in own.items() if len(value) > 1}
        if not own:
            return self
        other = copy(self)
        vars(other).update(own)
        return other


class GaussianNoise(NoiseModel):
    """Independent Gaussian noise in every pixel.

    The variance of a pixel is ``scale**2 * sigma**2 + floor**2``.

    Parameters
    ----------
    scale : float, array or "free", optional
        Factor on the given standard deviations.
    floor : float, array or "free", optional
        Standard deviation, in the unit of the data, of noise that they leave out.

    Notes
    -----
    An array is broadcast with the images: shape (B, 1, 1) has one value for each
    galaxy.  What is free is estimated by maximum likelihood from the residuals, with the
    squares multiplied by n / (n - parameters) for what the fit took from them.  Until
    then a free scale counts as 1 and a free floor as 0.  Where the given standard
    deviation is the same in all pixels, the two can't be told apart and the scale
    takes it all.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import GaussianNoise
    >>> data = np.zeros((2, 2))
    >>> inv_sigma = np.array([[1.0, 1.0], [1.0, 0.0]])
    >>> GaussianNoise().log_prob(data, data, inv_sigma).round(3)
    array([[-0.919, -0.919],
           [-0.919,  0.   ]])

    Noise that is twice what was said:

    >>> data = np.random.default_rng(1).normal(0, 2, (1, 100, 100))
    >>> noise = GaussianNoise(scale="free")
    >>> noise.fitted(data, np.zeros_like(data), np.ones_like(data), 0).round(1)
    array([[2.]])
    """

    def __init__(
        self, *, scale: float | ArrayLike | str = 1.0, floor: float | ArrayLike | str = 0.0
    ) -> None:
        self.scale = _free_or_number("scale", scale)
        self.floor = _free_or_number("floor", floor)
        if not isinstance(self.scale, str) and not np.all(self.scale > 0):
            raise ValueError("the scale of the noise must be positive")
        if not isinstance(self.floor, str) and not np.all(self.floor >= 0):
            raise ValueError("the floor of the noise must not be negative")
        free = {"scale": self.scale, "floor": self.floor}
        self.parameter_names = tuple(k for k, v in free.items() if isinstance(v, str))

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the probability density of each pixel: see `NoiseModel.log_prob`."""
        xp, model, data, inv_sigma = _alike(model, data, inv_sigma)
        used = inv_sigma > 0
        weight = xp.where(used, self._effective(inv_sigma), 1.0)
        pull = xp.where(used, data - model, 0.0) * weight
        return xp.where(used, -0.5 * (pull**2 + np.log(2 * np.pi)) + xp.log(weight), 0.0)

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian problem with the scale and floor in its ``inv_sigma``."""
        data, inv_sigma = (np.asarray(a, dtype=float) for a in (data, inv_sigma))
        return data, self._effective(inv_sigma)

    def _effective(self, inv_sigma: Any) -> Any:
        """One over the standard deviation with scale and floor in it."""
        scale = 1.0 if isinstance(self.scale, str) else self.scale
        floor = 0.0 if isinstance(self.floor, str) else self.floor
        xp, inv_sigma, scale, floor = _alike(inv_sigma, scale, floor)
        return inv_sigma / xp.sqrt(scale**2 + (floor * inv_sigma) ** 2)

    def fitted(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike, n_parameters: ArrayLike
    ) -> np.ndarray:
        """Scale and floor, those that are free: see `NoiseModel.fitted`."""
        if not self.parameter_names:
            return super().fitted(data, model, inv_sigma, n_parameters)
        data, model, inv_sigma = np.broadcast_arrays(
            *(np.asarray(a, dtype=float) for a in (data, model, inv_sigma))
        )
        if data.ndim != 3:
            raise ValueError(f"noise is fitted to batches (B, ny, nx), not to shape {data.shape}")
        count, shape = len(data), data.shape
        data = np.where(inv_sigma > 0, data, model)
        pull = ((data - model) * inv_sigma).reshape(count, -1)
        used = (inv_sigma > 0).reshape(count, -1)
        n = np.maximum(used.sum(1), 1)
        square = pull**2 * (n / np.maximum(n - np.asarray(n_parameters), 1))[:, None]
        # a scale below the rounding of the data would be none
        least = np.abs(data * inv_sigma).reshape(count, -1).max(1)
        least = np.where(least > 0, np.finfo(float).eps * least, 1.0)
        plain = np.maximum(np.sqrt(square.sum(1) / n), least)
        variance = np.where(used, inv_sigma.reshape(count, -1), 1.0) ** -2
        free_scale, free_floor = (isinstance(v, str) for v in (self.scale, self.floor))
        if not free_floor:
            floor = np.broadcast_to(self.floor, shape).reshape(count, -1)
            if not np.any(floor):
                return plain[:, None]
            found, _ = _fit_floor(square, floor**2 / variance, used)
            scale = np.where(np.any(floor > 0, axis=1), np.sqrt(found), plain)
            return np.maximum(scale, least)[:, None]
        if not free_scale:
            scale = np.broadcast_to(self.scale, shape).reshape(count, -1)
            found, none = _fit_floor(square * variance, scale**2 * variance, used)
            return np.sqrt(np.where(none, 0.0, found))[:, None]
        found, none = _fit_floor(square * variance, variance, used, free_scale=True)
        found = np.where(none, 0.0, found)
        total = np.where(used, square * variance / (variance + found[:, None]), 0.0).sum(1)
        scale = np.maximum(np.sqrt(total / n), least)
        return np.stack([scale, scale * np.sqrt(found)], axis=1)

    def with_parameters(self, values: ArrayLike) -> GaussianNoise:
        """Same noise with these values of what was free, shape (B, k)."""
        super().with_parameters(values)
        known = {"scale": self.scale, "floor": self.floor}
        for name, column in zip(self.parameter_names, np.asarray(values, float).T, strict=True):
            known[name] = column[:, None, None]
        return GaussianNoise(**known)

    def __repr__(self) -> str:
        options = {"scale": (self.scale, 1.0), "floor": (self.floor, 0.0)}
        shown = [
            f"{name}={_show(value)}"
            for name, (value, default) in options.items()
            if not (isinstance(value, float) and value == default)
        ]
        return f"GaussianNoise({', '.join(shown)})"


class LearnedNoise(NoiseModel):
    """Gaussian noise, and beside it what a learned galaxy knows of its own misfit.

    The variance of a pixel is ``sigma**2 + (scale * misfit)**2``, with the misfit that
    `LearnedGalaxy2D.render_misfit` draws (Regier et al. 2015, for a known noise).  A
    parametric model has no misfit.

    Parameters
    ----------
    scale : float, optional
        Factor on the misfit.  Networks learn it from the fits of their encoder; fits by maximum
        posterior come twice as close, for the weights that ship (measured on pixels left out).

    Notes
    -----
    A fitter gives the misfit of the fitted galaxies with `bind`; without it there is none.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import LearnedNoise
    >>> noise = LearnedNoise(scale=1).bind(np.full((1, 2, 2), 3.0))
    >>> zero = np.zeros((1, 2, 2))
    >>> noise.working(zero, zero, zero + 0.25)[1][0, 0]
    array([0.2, 0.2])
    """

    #: Fitters have to `bind` the misfit.
    needs_misfit = True

    def __init__(self, *, scale: float = 0.5) -> None:
        self.scale = _number("scale", scale)
        if not np.all(self.scale >= 0):
            raise ValueError("the scale of the misfit must not be negative")
        self._misfit: np.ndarray | None = None

    #: The misfit changes with the fit.
    gaussian = False

    def bind(self, misfit: ArrayLike) -> LearnedNoise:
        """The noise where the misfit is known, (B, ny, nx) in the unit of the data."""
        other = copy(self)
        other._misfit = np.asarray(misfit, dtype=float) * self.scale
        return other

    def _bound(self) -> GaussianNoise:
        floor = 0.0 if self._misfit is None else self._misfit
        return GaussianNoise(floor=floor)

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the probability density of each pixel: see `NoiseModel.log_prob`."""
        return self._bound().log_prob(data, model, inv_sigma)

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian problem with the misfit in its ``inv_sigma``."""
        return self._bound().working(data, model, inv_sigma)

    def __repr__(self) -> str:
        return "LearnedNoise()" if self.scale == 0.5 else f"LearnedNoise(scale={self.scale!r})"


class PoissonNoise(NoiseModel):
    """Photon noise of what the model says, and read noise.

    ``gain * (data + background)`` electrons are Poisson distributed about
    ``gain * (model + background)``, with Gaussian read noise on top.

    Parameters
    ----------
    gain : float or array, optional
        Electrons per unit of the data, times the exposure if the data are rates.
        An array is broadcast with the images, as a map of exposures would be.
    read_noise : float or array, optional
        Standard deviation of the read noise of a pixel, in electrons.
    background : float or array, optional
        Sky that was subtracted from the data, in their unit.

    Notes
    -----
    The density is that of a shifted Poisson distribution of the same mean and variance
    (Snyder, Hammoud & White 1993, JOSA A 10, 1014), made continuous by the gamma function.
    Where fewer than 0.001 electrons are expected, the logarithm of the rate goes on as a
    straight line, so that a fit finds its way back.  ``inv_sigma`` only says
    which pixels are used.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import PoissonNoise
    >>> noise = PoissonNoise(gain=2.0)
    >>> print(noise.log_prob(3.0, 2.5, 1.0).round(3))  # 6 counts of 5, and ln 2
    -1.229
    """

    gaussian = False

    def __init__(
        self,
        *,
        gain: float | ArrayLike = 1.0,
        read_noise: float | ArrayLike = 0.0,
        background: float | ArrayLike = 0.0,
    ) -> None:
        self.gain = _number("gain", gain)
        self.read_noise = _number("read_noise", read_noise)
        self.background = _number("background", background)
        if not np.all(self.gain > 0):
            raise ValueError("the gain must be positive")
        if not np.all(self.read_noise >= 0):
            raise ValueError("the read noise must not be negative")

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the probability density of each pixel: see `NoiseModel.log_prob`."""
        xp, used, counts, rate, gain = self._counts(data, model, inv_sigma)
        positive = xp.clip(rate, _MIN_RATE, None)
        log_rate = xp.log(positive) + (rate - positive) / positive
        density = counts * log_rate - positive - _log_gamma(counts + 1) + xp.log(gain)
        return xp.where(used, density, 0.0)

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian problem with the expected information: see `NoiseModel.working`."""
        data, model = (np.asarray(a, dtype=float) for a in (data, model))
        _, used, counts, rate, gain = self._counts(data, model, inv_sigma)
        positive = np.maximum(rate, _MIN_RATE)
        pushed = model + (counts - np.where(rate > _MIN_RATE, positive, 0.0)) / gain
        return np.where(used, pushed, data), np.where(used, gain / np.sqrt(positive), 0.0)

    def _counts(self, data: Any, model: Any, inv_sigma: Any) -> tuple[Any, ...]:
        """Counts and their expectation in electrons, shifted by the variance of the read noise."""
        xp, model, data, inv_sigma, gain, read_noise, background = _alike(
            model, data, inv_sigma, self.gain, self.read_noise, self.background
        )
        used = inv_sigma > 0
        shift = gain * background + read_noise**2
        counts = xp.clip(xp.where(used, gain * data + shift, 1.0), 0.0, None)
        return xp, used, counts, xp.where(used, gain * model + shift, 1.0), gain

    def __repr__(self) -> str:
        return (
            f"PoissonNoise(gain={_show(self.gain)}, read_noise={_show(self.read_noise)}, "
            f"background={_show(self.background)})"
        )


class StudentTNoise(NoiseModel):
    """Independent noise with the heavy tails of Student's t, for images with outliers.

    ``(data - model) / sigma`` follows the t distribution: the given sigma is its *scale*,
    the width of the core.  The standard deviation is larger by sqrt(dof / (dof - 2)).

    Parameters
    ----------
    dof : float, optional
        Degrees of freedom; fewer mean heavier tails.

    Notes
    -----
    `working` majorises (it is expectation maximisation): every step of a fit improves
    the likelihood.  Its curvature is on average 1 / sigma**2 if the noise is as said
    here, and the information about the model is (dof + 1) / (dof + 3) of that: ``information``.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import StudentTNoise
    >>> noise = StudentTNoise(dof=4)
    >>> _, inv_sigma = noise.working(np.array([0.0, 10.0]), np.zeros(2), np.ones(2))
    >>> inv_sigma.round(2)  # the outlier counts for little
    array([1.12, 0.22])
    """

    gaussian = False

    def __init__(self, dof: float = 4.0) -> None:
        self.dof = _number("dof", dof)
        if not isinstance(self.dof, float) or not self.dof > 0:
            raise ValueError(f"the degrees of freedom must be a positive number, not {dof!r}")

    @property
    def information(self) -> float:
        """Expected information about the model, in units of 1 / sigma**2."""
        return (self.dof + 1) / (self.dof + 3)

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the probability density of each pixel: see `NoiseModel.log_prob`."""
        xp, model, data, inv_sigma = _alike(model, data, inv_sigma)
        used = inv_sigma > 0
        weight = xp.where(used, inv_sigma, 1.0)
        pull = xp.where(used, data - model, 0.0) * weight
        half = (self.dof + 1) / 2
        constant = _log_gamma(half) - _log_gamma(self.dof / 2) - np.log(self.dof * np.pi) / 2
        density = float(constant) - half * xp.log1p(pull**2 / self.dof) + xp.log(weight)
        return xp.where(used, density, 0.0)

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian problem in which outliers count less: see `NoiseModel.working`."""
        data, model, inv_sigma = (np.asarray(a, dtype=float) for a in (data, model, inv_sigma))
        pull = np.where(inv_sigma > 0, data - model, 0.0) * inv_sigma
        return data, inv_sigma * np.sqrt((self.dof + 1) / (self.dof + pull**2))

    def __repr__(self) -> str:
        return f"StudentTNoise(dof={_show(self.dof)})"


class CorrelatedNoise(NoiseModel):
    """Gaussian noise that neighbouring pixels share, as in drizzled or resampled images.

    ``(data - model) / sigma`` is Gaussian with unit variance and a given correlation
    between pixels, the same everywhere in the image.

    Parameters
    ----------
    correlation : array, shape (ny, nx), or callable
        Correlation coefficient of two pixels by their offset: an array of odd sides with
        offset (0, 0) at its middle and 0 beyond it, or a function of arrays
        ``(dx, dy)`` in pixels.
    radius : int, optional
        Neighbours up to so far away, along x and along y, are taken into account: 1 to 5.

    Raises
    ------
    ValueError
        If that is not a correlation: not 1 at no offset, not the same at (dx, dy) and
        (-dx, -dy), or not positive definite.

    Notes
    -----
    This is Vecchia's approximation (Vecchia 1988, JRSS B 50, 297; Katzfuss & Guinness
    2021, Statistical Science 36, 124): each used pixel is conditioned on the used pixels
    before it, row by row, within the radius.  What is left of it is
    independent of the others, so that the likelihood is still a map.  It is exact for
    independent pixels and where the correlation is a product of exponentials, and worst for
    noise as smooth as a Gaussian.  White noise under a Gaussian kernel of 0.5 pixels is
    fine with a radius of 3: the error of the flux of a point source comes out within 2 %
    (ignoring the correlation, it is 40 % too small).  At 0.7 pixels it is
    within 10 % (50 to 60 %), and with a radius of 4 within 6 %.

    Examples
    --------
    Two pixels that agree are less of a surprise if they are correlated:

    >>> import numpy as np
    >>> from galmorph.noise import CorrelatedNoise
    >>> noise = CorrelatedNoise(lambda dx, dy: 0.5 ** (abs(dx) + abs(dy)))
    >>> noise.log_prob(np.ones((1, 2)), 0.0, np.ones((1, 2))).round(3)
    array([[-1.419, -0.942]])
    """

    correlated = True

    def __init__(
        self,
        correlation: ArrayLike | Callable[[np.ndarray, np.ndarray], np.ndarray],
        *,
        radius: int = 3,
    ) -> None:
        if radius not in range(1, 6):
            raise ValueError(f"the radius must be a whole number from 1 to 5, not {radius!r}")
        self.radius = int(radius)
        self.correlation = _correlation_grid(correlation, 2 * self.radius)
        self._offsets = _earlier(self.radius)
        covariance = _neighbourhood(self.correlation, self.radius)
        lowest = np.linalg.eigvalsh(covariance)[0]
        if not lowest > 1e-10:
            raise ValueError(
                f"the correlation is not positive definite (smallest eigenvalue {lowest:.2g}); "
                "if it was cut off, give it out to twice the radius"
            )
        self._near, self._own = covariance[1:, 1:], covariance[0, 1:]
        # codes of patterns, sorted, and their rows of coefficients; the first is "unused"
        everything = (1 << len(self._own)) - 1
        codes = np.array([-1, everything])
        rows = np.concatenate([np.zeros((1, len(covariance))), self._coefficients(codes[1:])])
        self._known = codes, rows
        self._whitenings: OrderedDict[tuple, Whitening] = OrderedDict()

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> Any:
        """Logarithm of the density of each pixel given those before: see `NoiseModel.log_prob`."""
        mask = _as_numpy(inv_sigma) > 0  # before torch differentiates anything
        xp, model, data, inv_sigma = _alike(model, data, inv_sigma)
        residual = data - model
        used = inv_sigma > 0
        shape = np.broadcast_shapes(mask.shape, residual.shape[-2:])
        whitening = self.whitening(np.broadcast_to(mask, shape))
        white = whitening._apply(xp.where(used, residual, 0.0) * inv_sigma, whitening._index)
        _, _, log_det = _alike(white, whitening.log_det)
        log_weight = xp.log(xp.where(used, inv_sigma, 1.0)) + log_det
        return xp.where(used, -0.5 * (white**2 + np.log(2 * np.pi)) + log_weight, 0.0)

    def working(
        self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Data and ``inv_sigma`` as they are: residual and derivatives are to be whitened."""
        return np.asarray(data, dtype=float), np.asarray(inv_sigma, dtype=float)

    def whitening(self, inv_sigma: ArrayLike) -> Whitening:
        """What makes images with these used pixels independent.

        Parameters
        ----------
        inv_sigma : array or tensor, shape (..., ny, nx)
            0 where a pixel must not be used.

        Returns
        -------
        Whitening

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph.noise import CorrelatedNoise
        >>> whiten = CorrelatedNoise([[0.4, 1.0, 0.4]]).whitening(np.ones((1, 20, 20)))
        >>> whiten(np.ones((1, 20, 20))).shape
        (1, 20, 20)
        """
        used = _as_numpy(inv_sigma) > 0
        if used.ndim < 2:
            raise ValueError(f"inv_sigma must have two or more axes, not {used.ndim}")
        key = (used.shape, np.packbits(used).tobytes())
        found = self._whitenings.pop(key, None) or self._new_whitening(used)
        self._whitenings[key] = found
        if len(self._whitenings) > _MAX_MASKS:
            self._whitenings.popitem(last=False)
        return found

    def _new_whitening(self, used: np.ndarray) -> Whitening:
        """Look at the surroundings of every pixel; those that look the same share coefficients."""
        code = np.zeros(used.shape, dtype=np.int64)
        for bit, near in enumerate(_shifted(used, self._offsets, self.radius)):
            code |= near.astype(np.int64) << bit
        codes, rows = self._known
        full = (1 << len(self._offsets)) - 1
        odd = used & (code != full)
        patterns, where = np.unique(code[odd], return_inverse=True)
        new = patterns[~np.isin(patterns, codes)]
        if new.size:
            if len(codes) + len(new) > _MAX_PATTERNS:
                keep = np.isin(codes, [-1, full, *patterns])
                codes, rows = codes[keep], rows[keep]
            codes = np.concatenate([codes, new])
            rows = np.concatenate([rows, self._coefficients(new)])
            order = np.argsort(codes)
            codes, rows = codes[order], rows[order]
            self._known = codes, rows
        index = np.where(used, np.searchsorted(codes, full), 0)
        index[odd] = np.searchsorted(codes, patterns)[where]
        return Whitening(rows, index, self._offsets, self.radius)

    def _coefficients(self, codes: np.ndarray) -> np.ndarray:
        """Rows (1, -a) / s of the coefficients for codes of patterns, shape (P, 1 + K)."""
        size = len(self._own)
        rows = np.empty((len(codes), 1 + size))
        for start in range(0, len(codes), _PATTERNS_AT_ONCE):
            part = slice(start, start + _PATTERNS_AT_ONCE)
            there = (codes[part, None] >> np.arange(size) & 1).astype(float)
            near = self._near * there[:, :, None] * there[:, None, :]
            near[:, np.arange(size), np.arange(size)] = 1.0
            own = self._own * there
            a = np.linalg.solve(near, own[..., None])[..., 0]
            s = np.sqrt(1.0 - (own * a).sum(1))
            rows[part, 0] = 1.0 / s
            rows[part, 1:] = -a / s[:, None]
        return rows

    def __repr__(self) -> str:
        return f"CorrelatedNoise({_show(self.correlation)}, radius={self.radius})"


class Whitening:
    """Makes correlated noise independent: made by `CorrelatedNoise.whitening`.

    It is linear, so that least squares with correlated noise are ordinary least squares
    with whitened residuals and whitened derivatives.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import CorrelatedNoise
    >>> noise = CorrelatedNoise([[0.4, 1.0, 0.4]])
    >>> whiten = noise.whitening(np.ones((1, 1, 3)))
    >>> whiten(np.ones((1, 1, 3))).round(2)
    array([[[1.  , 0.65, 0.79]]])
    """

    def __init__(
        self, table: np.ndarray, index: np.ndarray, offsets: np.ndarray, radius: int
    ) -> None:
        self._table = table
        self._index = index
        self._offsets = offsets
        self._radius = radius

    @property
    def log_det(self) -> np.ndarray:
        """Logarithm of what a pixel is multiplied with, 0 where unused, as (..., ny, nx)."""
        own = self._table[:, 0]
        return np.log(np.where(own > 0, own, 1.0))[self._index]

    def rows(self, index: Any) -> Whitening:
        """Whitening of some of the images, by anything that indexes the first axis."""
        index = np.atleast_1d(np.arange(len(self._index))[index])
        return Whitening(self._table, self._index[index], self._offsets, self._radius)

    def __call__(self, images: Any) -> Any:
        """Whiten images that were multiplied by ``inv_sigma``.

        Parameters
        ----------
        images : array or tensor, shape (B, ny, nx) or (B, K, ny, nx)
            One image, or K of them, for each mask.

        Returns
        -------
        array or tensor, same shape
            0 in unused pixels.
        """
        if not hasattr(images, "requires_grad"):
            images = np.asarray(images)
            images = images if np.issubdtype(images.dtype, np.floating) else images.astype(float)
        shape, index = tuple(images.shape), self._index
        if len(shape) == index.ndim + 1:
            index = index[..., None, :, :]
            shape = shape[:-3] + shape[-2:]
        if shape != self._index.shape:
            raise ValueError(
                f"images of shape {tuple(images.shape)} can't be whitened "
                f"for masks of shape {self._index.shape}"
            )
        return self._apply(images, index)

    def _apply(self, images: Any, index: np.ndarray) -> Any:
        """Sum of the neighbours times their coefficients; the index is broadcast."""
        if isinstance(images, np.ndarray):
            images = np.where(index > 0, images, 0.0)
            table = self._table.astype(images.dtype)
        else:
            xp, images, table = _alike(images, self._table)
            index = xp.as_tensor(index, device=images.device)
            images = xp.where(index > 0, images, 0.0)
        white = table[:, 0][index] * images
        shifted = _shifted(images, self._offsets, self._radius)
        for j, near in enumerate(shifted, start=1):
            white += table[:, j][index] * near
        return white


def estimate_correlation(
    images: ArrayLike, mask: ArrayLike | None = None, *, radius: int = 3
) -> np.ndarray:
    """Correlation of the noise of neighbouring pixels, from the sky around galaxies.

    The products of pixels in the outskirts of the stamps are averaged, for each
    offset between two pixels, over all images; pixels that are 3 sigma and more off the
    median are left out.

    A sloping sky and undetected sources look like correlated noise here.
    A single stamp has few sky pixels: give many that were made in the same way.

    Parameters
    ----------
    images : array, shape (ny, nx) or (N, ny, nx)
        Pixel values; pixels that are not finite are left out.
    mask : array of bool, same shape, optional
        True where a pixel must not be used.
    radius : int, optional
        Largest offset along x and along y.  `CorrelatedNoise` makes use of
        offsets up to twice its own radius.

    Returns
    -------
    array, shape (2 radius + 1, 2 radius + 1)
        Correlation coefficients, 1 at the middle, for `CorrelatedNoise`.  If the errors
        of the estimate make it no correlation (not positive definite), all but the middle
        is reduced by what that takes.

    Raises
    ------
    ValueError
        If the images have a wrong shape or show no sky.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import estimate_correlation
    >>> white = np.random.default_rng(1).normal(size=(50, 64, 65))
    >>> images = white[:, :, 1:] + white[:, :, :-1]
    >>> print(estimate_correlation(images, radius=1).round(1) + 0.0)
    [[0.  0.  0. ]
     [0.5 1.  0.5]
     [0.  0.  0. ]]
    """
    images = np.asarray(images, dtype=float)
    if images.ndim not in (2, 3):
        raise ValueError(f"images must be 2-D or 3-D, not {images.ndim}-D")
    if radius < 1 or int(radius) != radius:
        raise ValueError(f"the radius must be a positive whole number, not {radius!r}")
    usable = np.isfinite(images)
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != images.shape:
            raise ValueError(f"mask has shape {mask.shape}, the images {images.shape}")
        usable &= ~mask
    offsets = _earlier(radius)
    product, pairs = np.zeros(1 + len(offsets)), np.zeros(1 + len(offsets))
    cube = images.reshape(-1, *images.shape[-2:])
    for image, good in zip(cube, usable.reshape(cube.shape), strict=True):
        residual, sky = _sky_residual(image, good)
        product[0] += (residual**2).sum()
        pairs[0] += sky.sum()
        near = zip(_shifted(residual, offsets, radius), _shifted(sky, offsets, radius), strict=True)
        for j, (other, there) in enumerate(near, start=1):
            product[j] += (residual * other).sum()
            pairs[j] += (sky & there).sum()
    if not product[0] > 0:
        raise ValueError("the images show no sky with noise to estimate a correlation from")
    covariance = product / np.maximum(pairs, 1)
    half = covariance[1:] / covariance[0]
    dy, dx = offsets.T
    result = np.zeros((2 * radius + 1, 2 * radius + 1))
    result[radius + dy, radius + dx] = half
    result[radius - dy, radius - dx] = half
    result[radius, radius] = 1.0
    lowest = np.linalg.eigvalsh(_neighbourhood(_correlation_grid(result, 2 * radius), radius))[0]
    if lowest < _MIN_EIGENVALUE:
        result *= (1 - _MIN_EIGENVALUE) / (1 - lowest)
        result[radius, radius] = 1.0
    return result


def _sky_residual(image: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clipped residual of the sky in units of its scatter, 0 elsewhere; and where it is."""
    sky = usable & outskirts(image.shape)
    if sky.sum() < MIN_PIXELS:  # as `estimate_noise` does
        sky = usable
    noise = _one_noise(image, usable, sky)
    if not 0 < noise < np.inf:
        return np.zeros(image.shape), np.zeros(image.shape, dtype=bool)
    sky = sky & (np.abs(np.where(sky, image, 0.0) - np.median(image[sky])) < 3 * noise)
    return np.where(sky, (image - image[sky].mean()) / noise, 0.0), sky


def _earlier(radius: int) -> np.ndarray:
    """Offsets (dy, dx) of the neighbours that come before a pixel, shape (K, 2)."""
    side = range(-radius, radius + 1)
    return np.array([(y, x) for y in range(-radius, 1) for x in side if y < 0 or x < 0])


def _shifted(images: Any, offsets: np.ndarray, radius: int) -> Any:
    """Yield, for each offset, what every pixel sees there: 0 beyond the images."""
    ny, nx = images.shape[-2:]
    if isinstance(images, np.ndarray):
        lead = [(0, 0)] * (images.ndim - 2)
        padded = np.pad(images, [*lead, (radius, 0), (radius, radius)])
    else:
        import torch

        padded = torch.nn.functional.pad(images, (radius, radius, radius, 0))
    for dy, dx in offsets:
        top, left = radius + dy, radius + dx
        yield padded[..., top : top + ny, left : left + nx]


def _correlation_grid(correlation: Any, reach: int) -> np.ndarray:
    """Correlation at offsets up to ``reach``, as an array, checked."""
    side = np.arange(-reach, reach + 1)
    if callable(correlation):
        dx, dy = np.meshgrid(side, side)
        grid = np.array(np.broadcast_to(correlation(dx, dy), dx.shape), dtype=float)
    else:
        given = np.asarray(correlation, dtype=float)
        if given.ndim != 2 or not all(n % 2 for n in given.shape):
            raise ValueError(
                f"a correlation is a 2-D array with odd sides, not of shape {given.shape}"
            )
        grid = np.zeros((side.size, side.size))
        y, x = (min(n // 2, reach) for n in given.shape)
        cy, cx = (n // 2 for n in given.shape)
        grid[reach - y : reach + y + 1, reach - x : reach + x + 1] = given[
            cy - y : cy + y + 1, cx - x : cx + x + 1
        ]
    if not np.all(np.isfinite(grid)):
        raise ValueError("the correlation holds NaN or infinite values")
    if not np.isclose(grid[reach, reach], 1.0, rtol=0, atol=1e-6):
        raise ValueError(f"the correlation must be 1 at no offset, not {grid[reach, reach]:g}")
    if not np.allclose(grid, grid[::-1, ::-1], rtol=0, atol=1e-6):
        raise ValueError("the correlation must be the same at (dx, dy) and (-dx, -dy)")
    grid = (grid + grid[::-1, ::-1]) / 2
    grid[reach, reach] = 1.0
    grid.flags.writeable = False
    return grid


def _neighbourhood(grid: np.ndarray, radius: int) -> np.ndarray:
    """Covariance of a pixel (first) and its earlier neighbours, from a grid to 2 radius."""
    places = np.concatenate([[(0, 0)], _earlier(radius)])
    dy, dx = np.moveaxis(places[:, None] - places[None], -1, 0)
    return grid[2 * radius + dy, 2 * radius + dx]


def _fit_floor(
    square: np.ndarray, variance: np.ndarray, used: np.ndarray, *, free_scale: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """What to add to the variances so that squared residuals are most likely.

    Parameters
    ----------
    square, variance, used : array, shape (B, n)
        Squared residuals, variances, and which count.
    free_scale : bool, optional
        Whether the sum is multiplied by the factor that suits best.

    Returns
    -------
    found, none : array, shape (B,)
        The maximum, and whether it is so low that nothing need be added.
    """
    if len(used) > _ROWS_AT_ONCE:
        parts = [
            _fit_floor(square[i], variance[i], used[i], free_scale=free_scale)
            for i in np.array_split(np.arange(len(used)), -(-len(used) // _ROWS_AT_ONCE))
        ]
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))
    n = used.sum(1)
    least = np.min(variance, axis=1, where=used, initial=np.inf)
    most = np.max(variance, axis=1, where=used, initial=0.0)
    square = np.where(used, square, 0.0)
    mean = square.sum(1) / np.maximum(n, 1)
    lo = 1e-4 * least
    if free_scale:
        hi = 1e4 * most
    else:
        lo, hi = np.maximum(lo, 1e-6 * mean), square.max(1)
    # nothing to tell: no pixels, no residual, or one variance everywhere
    blank = ~((lo > 0) & (mean > 0) & np.isfinite(lo) & np.isfinite(hi))
    if free_scale:
        blank |= most - least <= 1e-6 * most
    lo = np.log(np.where(blank, 1.0, lo))
    hi = np.log(np.where(blank, 1.0, np.maximum(hi, 10 * np.exp(lo))))
    variance = np.where(used, variance, 1.0)

    def inverse(t: np.ndarray) -> np.ndarray:
        return used / (variance + np.exp(t)[:, None])

    def cost(t: np.ndarray) -> np.ndarray:
        """-2 ln L but for a constant."""
        precision = inverse(t)
        fit = np.einsum("ij,ij->i", square, precision)
        fit = n * np.log(np.where(blank, 1.0, fit)) if free_scale else fit
        return fit - np.log(np.where(used, precision, 1.0)).sum(1)

    def rising(t: np.ndarray) -> np.ndarray:
        """Whether the cost rises with t."""
        precision = inverse(t)
        pull = square * precision
        slope = np.einsum("ij,ij->i", pull, precision)
        if free_scale:
            slope = n * slope / np.where(blank, 1.0, pull.sum(1))
        return precision.sum(1) > slope

    grid = lo + (hi - lo) * np.linspace(0, 1, 9)[:, None]
    best = np.argmin([cost(t) for t in grid], axis=0)
    rows = np.arange(len(n))
    left, right = grid[np.maximum(best - 1, 0), rows], grid[np.minimum(best + 1, 8), rows]
    for _ in range(18):
        middle = (left + right) / 2
        up = rising(middle)
        left, right = np.where(up, left, middle), np.where(up, middle, right)
    return np.where(blank, 0.0, np.exp((left + right) / 2)), blank | (left <= lo)


def _alike(*arrays: Any) -> tuple[Any, ...]:
    """Numpy or torch, and the arrays as its own, of the dtype and device of the first tensor."""
    like = next((a for a in arrays if hasattr(a, "requires_grad")), None)
    if like is None:
        return np, *(np.asarray(a, dtype=float) for a in arrays)
    import torch

    return torch, *(
        a.to(like)
        if isinstance(a, torch.Tensor)
        else torch.tensor(np.asarray(a), dtype=like.dtype, device=like.device)
        for a in arrays
    )


def _as_numpy(array: Any) -> np.ndarray:
    return np.asarray(array.detach().cpu() if hasattr(array, "requires_grad") else array)


def _log_gamma(x: Any) -> Any:
    if hasattr(x, "requires_grad"):
        return x.lgamma()
    from scipy.special import gammaln

    return gammaln(x)


def _number(name: str, value: Any) -> float | np.ndarray:
    """A finite float, or a read-only array of them."""
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or an array, not {value!r}") from None
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite")
    array.flags.writeable = False
    return float(array) if array.ndim == 0 else array


def _free_or_number(name: str, value: Any) -> float | np.ndarray | str:
    if isinstance(value, str):
        if value != "free":
            raise ValueError(f'{name} must be a number, an array or "free", not {value!r}')
        return value
    return _number(name, value)


def _show(value: float | np.ndarray | str) -> str:
    """Text that says which value it is, the same in every session."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    crc = zlib.crc32(np.ascontiguousarray(value, dtype="<f8").tobytes())
    return f"array(shape={value.shape}, crc32={crc:08x})"
