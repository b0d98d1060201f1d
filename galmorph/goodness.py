"""Whether a model describes the pixels at all, and where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from galmorph.noise import (
    CorrelatedNoise,
    GaussianNoise,
    NoiseModel,
    PoissonNoise,
    StudentTNoise,
)
from galmorph.results import FitResult

__all__ = ["RegierTests", "misfit_map", "posterior_predictive", "regier_tests", "simulate_pixels"]

#: Standard deviations at which a Gaussian kernel is cut off.
_KERNEL_REACH = 4.0
#: Share of the power that rounding and a cut-off may make negative in a correlation.
_NEGATIVE_POWER = 0.01


class FittedBatch:
    """Pixels of some galaxies of one shape, and what was made of them.

    Attributes
    ----------
    rows : array of int, shape (B,)
        Of the result.
    data : array, shape (B, ny, nx)
    inv_sigma, fitted : array, shape (B, ny, nx)
        One over the uncertainty, 0 where a pixel can't be used, or was not fitted.
    held_out : array of bool, shape (B, ny, nx)
        Usable pixels that were not fitted.
    noise : NoiseModel
    """

    def __init__(self, result: FitResult, rows: np.ndarray) -> None:
        self.rows, self._result = rows, result[rows]
        self._all = np.arange(len(rows))
        stamps = self._result.stamps.get(self._all)
        self.data, self.inv_sigma, self._psf = stamps.data, stamps.inv_sigma, stamps.psf
        self.held_out = self._result._left_out(self._all, self.inv_sigma > 0)
        self.fitted = np.where(self.held_out, 0.0, self.inv_sigma)
        self.noise = self._result._noise(self._all)

    def image(self) -> np.ndarray:
        """Best fits with their background (B, ny, nx); NaN where they failed."""
        return self._result._render(self._all, self._psf)

    def misfit(self) -> np.ndarray:
        """How far the model may be off in each pixel (1 sigma), (B, ny, nx)."""
        return self._result._render(self._all, self._psf, what="render_misfit")

    def drawn_images(self, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Images (B, ny, nx) by draws from the posterior, with their background."""
        samples = self._result.posterior.sample(draws, rng)
        p = self._result.params.shape[1]
        for k in range(draws):
            drawn = replace(
                self._result, params=samples[:, k, :p], background=samples[:, k, p:], extra={}
            )
            yield drawn._render(self._all, self._psf)

    def log_prob(self, image: np.ndarray, inv_sigma: np.ndarray) -> np.ndarray:
        """Logarithm of the density of each pixel (B, ny, nx), 0 in unused ones."""
        return self.noise.log_prob(self.data, image, inv_sigma)


def batches(result: FitResult) -> Iterator[FittedBatch]:
    """All galaxies of a result, those of one shape together.

    Raises
    ------
    ValueError
        If the result was read from a file.
    """
    result._require_stamps()
    for rows in result.stamps.batches():
        yield FittedBatch(result, rows)
        result.stamps.release()


# -- replicated data -----------------------------------------------------------------------


def simulate_pixels(
    model: ArrayLike,
    inv_sigma: ArrayLike,
    *,
    noise: NoiseModel | None = None,
    rng: np.random.Generator | int | None = None,
) -> np.ndarray:
    """Draw pixels that have a given noise about a given image.

    Parameters
    ----------
    model : array, shape (..., ny, nx)
        What is expected.
    inv_sigma : array, shape (..., ny, nx)
        One over the uncertainty; 0 where a pixel is not used.
    noise : NoiseModel, optional
        By default `~galmorph.noise.GaussianNoise`.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    array, shape (..., ny, nx)
        0 in unused pixels.

    Raises
    ------
    ValueError
        If it is not known how to draw this noise, or a correlation has negative power.

    Notes
    -----
    Correlated noise is drawn by its power spectrum on a plane that is larger than the stamp by the
    reach of the correlation, which is exact (Dietrich & Newsam 1997, SIAM J. Sci.
    Comput. 18, 1088).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.goodness import simulate_pixels
    >>> from galmorph.noise import PoissonNoise
    >>> pixels = simulate_pixels(
    ...     np.full((64, 64), 9.0), np.ones((64, 64)), noise=PoissonNoise(), rng=1
    ... )
    >>> print(round(pixels.mean()), round(pixels.var()))
    9 9
    """
    rng = np.random.default_rng(rng)
    noise = GaussianNoise() if noise is None else noise
    model, inv_sigma = np.broadcast_arrays(np.asarray(model, float), np.asarray(inv_sigma, float))
    for kind, draw in _DRAWS.items():
        if isinstance(noise, kind):
            values = draw(noise, model, inv_sigma, rng)
            return np.where(inv_sigma > 0, values, 0.0)
    raise ValueError(f"how to draw pixels with {noise!r} is not known")


def _sigma(noise: NoiseModel, model: np.ndarray, inv_sigma: np.ndarray) -> np.ndarray:
    """Width of the noise where a pixel is used, 0 elsewhere."""
    _, weight = noise.working(model, model, inv_sigma)
    return np.divide(1.0, weight, out=np.zeros(model.shape), where=weight > 0)


def _draw_gaussian(noise, model, inv_sigma, rng):
    return model + _sigma(noise, model, inv_sigma) * rng.standard_normal(model.shape)


def _draw_student(noise, model, inv_sigma, rng):
    sigma = _sigma(GaussianNoise(), model, inv_sigma)
    return model + sigma * rng.standard_t(noise.dof, model.shape)


def _draw_poisson(noise, model, inv_sigma, rng):
    usable = np.isfinite(model)
    rate = noise.gain * (np.where(usable, model, 0.0) + noise.background)
    counts = rng.poisson(np.clip(rate, 0.0, None))
    electrons = counts + noise.read_noise * rng.standard_normal(model.shape)
    return np.where(usable, electrons / noise.gain - noise.background, np.nan)


def _draw_correlated(noise, model, inv_sigma, rng):
    kernel = noise.correlation
    reach = kernel.shape[0] // 2
    ny, nx = (n + reach for n in model.shape[-2:])
    # a small stamp must not meet itself round the edge
    plane = np.zeros((max(ny, 2 * reach + 1), max(nx, 2 * reach + 1)))
    plane[: 2 * reach + 1, : 2 * reach + 1] = kernel
    power = np.fft.fft2(np.roll(plane, (-reach, -reach), axis=(0, 1))).real
    if -power[power < 0].sum() > _NEGATIVE_POWER * power.sum():
        raise ValueError("this correlation has negative power: no noise has it")
    power = np.clip(power, 0.0, None)
    power *= plane.size / power.sum()
    white = rng.standard_normal((*model.shape[:-2], *plane.shape))
    drawn = np.fft.ifft2(np.fft.fft2(white) * np.sqrt(power)).real
    ny, nx = model.shape[-2:]
    return model + _sigma(noise, model, inv_sigma) * drawn[..., :ny, :nx]


_DRAWS: dict[type, Callable[..., np.ndarray]] = {
    GaussianNoise: _draw_gaussian,
    StudentTNoise: _draw_student,
    PoissonNoise: _draw_poisson,
    CorrelatedNoise: _draw_correlated,
}


# -- posterior predictive checks -----------------------------------------------------------


def posterior_predictive(
    result: FitResult,
    *,
    draws: int = 100,
    statistic: str | Callable[[np.ndarray, np.ndarray], np.ndarray] = "chi2",
    rng: np.random.Generator | int | None = 0,
) -> np.ndarray:
    """How often data as the fit expects them deviate as much as the data do.

    For each draw from the posterior, data are simulated with the noise of the fit, and a
    measure of discrepancy is compared between these and the real ones (Gelman,
    Meng & Stern 1996, Statistica Sinica 6, 733).

    Parameters
    ----------
    result : FitResult
    draws : int, optional
        Draws from the posterior for each galaxy.
    statistic : {"chi2", "max", "moran"} or callable, optional
        ``"chi2"``: sum of squared residuals, for misfits and wrong uncertainties of any
        kind; ``"max"``: the largest absolute residual, for cosmic rays and
        companions; ``"moran"``: Moran's I of residuals of neighbouring
        pixels, for light that the model misses.  A callable gets residuals in units of their
        uncertainty (B, ny, nx) and the used pixels (B, ny, nx), and returns (B,), larger
        for worse.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    array, shape (N,)
        Probabilities, multiples of 1/draws: near 0 the model does not describe the pixels;
        near 1 for ``"chi2"`` the uncertainties are too large.  NaN where the fit failed.

    Raises
    ------
    ValueError
        If there is no such statistic, or the result was read from a file, or it is not known how
        to draw its noise.

    Notes
    -----
    Only the fitted pixels count.  They were used to fit and to check, so that for a right model
    p is more often near 0.5 than if it were uniform; this matters where parameters are not
    few compared with pixels.  Moran's I (Moran 1950, Biometrika 37, 17) is taken over the
    four nearest neighbours, about zero; residuals of correlated noise are whitened first.
    What a learned model knows of its own misfit (``model_std_images``) is not in the
    simulated data: p says whether the model is exact within the noise.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, SersicGalaxy2D, fit_images
    >>> from galmorph.goodness import posterior_predictive
    >>> truth = SersicGalaxy2D(flux=2000, x_0=15, y_0=16, r_eff=4, n=4)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=1.0)
    >>> posterior_predictive(result, statistic="moran")
    array([0.])
    """
    if draws < 1 or int(draws) != draws:
        raise ValueError(f"draws must be a positive whole number, not {draws!r}")
    measure = statistic if callable(statistic) else _STATISTICS.get(statistic)
    if measure is None:
        raise ValueError(f"statistic must be one of {list(_STATISTICS)}, not {statistic!r}")
    rng = np.random.default_rng(rng)
    beyond = np.zeros(len(result))
    for batch in batches(result):
        used = batch.fitted > 0
        for image in batch.drawn_images(draws, rng):
            again = simulate_pixels(image, batch.fitted, noise=batch.noise, rng=rng)
            real, drawn = (
                measure(_standardised(batch.noise, data, image, batch.fitted), used)
                for data in (batch.data, again)
            )
            beyond[batch.rows] += np.where(np.isfinite(real), drawn >= real, np.nan)
    return np.where(result.failed, np.nan, beyond / draws)


def _standardised(
    noise: NoiseModel, data: np.ndarray, image: np.ndarray, inv_sigma: np.ndarray
) -> np.ndarray:
    """Residuals in units of the expected width of the noise, whitened; 0 in unused pixels."""
    _, weight = noise.working(image, image, inv_sigma)
    residual = np.where(inv_sigma > 0, data - image, 0.0) * weight
    return noise.whitening(inv_sigma)(residual) if noise.correlated else residual


def _chi2(residual: np.ndarray, used: np.ndarray) -> np.ndarray:
    return (residual**2).sum(axis=(1, 2))


def _largest(residual: np.ndarray, used: np.ndarray) -> np.ndarray:
    return np.abs(residual).max(axis=(1, 2))


def _moran(residual: np.ndarray, used: np.ndarray) -> np.ndarray:
    product, pairs = 0.0, 0
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
        product = product + (residual[one] * residual[other]).sum(axis=(1, 2))
        pairs = pairs + (used[one] & used[other]).sum(axis=(1, 2))
    variance = (residual**2).sum(axis=(1, 2)) / np.maximum(used.sum(axis=(1, 2)), 1)
    return product / np.maximum(pairs, 1) / np.where(variance == 0, 1.0, variance)


_STATISTICS = {"chi2": _chi2, "max": _largest, "moran": _moran}


# -- where a model fails -------------------------------------------------------------------


def misfit_map(result: FitResult, i: int = 0, *, smooth: float = 2.0) -> np.ndarray:
    """Significance of what the model misses, or has too much of, around each pixel.

    The residuals are smoothed by a Gaussian, weighted by their inverse variance, and divided
    by the standard deviation that the noise gives to that: at each pixel, the
    amplitude of a Gaussian source there that would improve the fit, over its uncertainty.
    As the noise is not the same in all pixels and some are masked, the divisor is computed for
    each pixel, without approximation.

    Parameters
    ----------
    result : FitResult
    i : int, optional
        Row of the galaxy.
    smooth : float, optional
        Standard deviation of the Gaussian, in pixels: the scale of what is looked for.

    Returns
    -------
    array, shape (ny, nx)
        A unit normal variable where the model is right and the fit has taken nothing from the
        residuals; positive where there is more light than the model has.  NaN in
        unusable pixels, and everywhere if the fit failed.  Held-out pixels are in it.

    Raises
    ------
    IndexError
        If there is no such galaxy.
    ValueError
        If the width is not positive, or the result was read from a file.

    Notes
    -----
    This is the score test of one more source (Rao 1948, Math. Proc. Camb. Phil. Soc. 44, 50):
    the score of its amplitude over the root of its expected information, for any noise
    model.  What the fitted parameters absorb makes it smaller than unit normal near the galaxy.
    A map has about one independent value for every 4 pi smooth² pixels: look for 4 or more.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.goodness import misfit_map
    >>> image = GaussianGalaxy2D(flux=2000, x_0=20, y_0=20, r_eff=4).render((41, 41))
    >>> image += GaussianGalaxy2D(flux=60, x_0=31, y_0=12, r_eff=2).render((41, 41))
    >>> image += np.random.default_rng(1).normal(0, 1, (41, 41))
    >>> significance = misfit_map(fit_images(image, GaussianGalaxy2D(), uncertainty=1.0))
    >>> y, x = np.unravel_index(significance.argmax(), significance.shape)
    >>> bool(np.hypot(x - 31, y - 12) < 2 and significance.max() > 5)
    True
    """
    if not (np.isfinite(smooth) and smooth > 0):
        raise ValueError(f"smooth must be positive, not {smooth!r}")
    result._require_stamps()
    batch = FittedBatch(result, np.array([range(len(result))[i]]))
    image = batch.image()
    if not np.isfinite(image).all():
        return np.full(image.shape[1:], np.nan)
    kernel = _kernel(smooth)
    find = _correlated_amplitude if batch.noise.correlated else _amplitude
    score, information = find(batch, image, kernel)
    value = score / np.sqrt(np.where(information > 0, information, np.inf))
    return np.where(batch.inv_sigma > 0, value, np.nan)[0]


def _kernel(width: float) -> np.ndarray:
    reach = int(np.ceil(_KERNEL_REACH * width))
    return np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)


def _smooth(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with a kernel along x and along y; nothing beyond the edges."""
    from scipy.ndimage import convolve1d

    for axis in (1, 2):
        images = convolve1d(images, kernel, axis=axis, mode="constant")
    return images


def _amplitude(
    batch: FittedBatch, image: np.ndarray, kernel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score and expected information of the amplitude of a source at each pixel."""
    noise, inv_sigma = batch.noise, batch.inv_sigma
    pushed, weight = noise.working(batch.data, image, inv_sigma)
    score = np.where(weight > 0, pushed - image, 0.0) * weight**2
    if isinstance(noise, StudentTNoise):  # its weights are of these data, not expected ones
        information = noise.information * inv_sigma**2
    else:
        information = noise.working(image, image, inv_sigma)[1] ** 2
    return _smooth(score, kernel), _smooth(information, kernel**2)


def _correlated_amplitude(
    batch: FittedBatch, image: np.ndarray, kernel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same for correlated noise: every source is whitened, a row of them at a time."""
    inv_sigma = batch.inv_sigma
    _, ny, nx = inv_sigma.shape
    whiten = batch.noise.whitening(inv_sigma)
    residual = whiten((batch.data - image) * inv_sigma).ravel()
    along_y, along_x = (_smooth_matrix(n, kernel) for n in (ny, nx))
    score, information = np.empty((2, 1, ny, nx))
    for y in range(ny):
        sources = along_y[y][:, None] * along_x[:, None, :]
        sources = whiten((sources * inv_sigma)[None]).reshape(nx, -1)
        score[0, y], information[0, y] = sources @ residual, (sources**2).sum(axis=1)
    return score, information


def _smooth_matrix(n: int, kernel: np.ndarray) -> np.ndarray:
    """Kernels about each of n pixels, (n, n)."""
    reach = len(kernel) // 2
    padded = np.pad(kernel, n)
    return np.stack([padded[n + reach - k : 2 * n + reach - k] for k in range(n)])


# -- the published test of a learned model -------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class RegierTests:
    """Two tests of a model against the best-fitting scaled bivariate Gaussian: `regier_tests`.

    Attributes
    ----------
    mse, reference_mse : array, shape (N,)
        Mean squared errors over the pixels.
    gain : array, shape (N,)
        Logarithm of the density of the pixels by the model, less its supremum by
        the reference over all noise levels.
    """

    mse: np.ndarray
    reference_mse: np.ndarray
    gain: np.ndarray

    @property
    def tested(self) -> np.ndarray:
        """True for galaxies with a reference; where the model failed, it lost; (N,)."""
        return np.isfinite(self.reference_mse)

    @property
    def lower_error(self) -> np.ndarray:
        """True where the model has the lower mean squared error, (N,)."""
        return self.mse < self.reference_mse

    @property
    def more_probable(self) -> np.ndarray:
        """True where the pixels are more probable under the model, (N,)."""
        return self.gain > 0

    @property
    def error_fraction(self) -> tuple[float, float]:
        """Fraction of ``lower_error`` among those tested, and its binomial error."""
        return _fraction(self.lower_error[self.tested])

    @property
    def likelihood_fraction(self) -> tuple[float, float]:
        """Fraction of ``more_probable`` among those tested, and its binomial error."""
        return _fraction(self.more_probable[self.tested])

    def __repr__(self) -> str:
        (p, p_err), (q, q_err) = self.error_fraction, self.likelihood_fraction
        return (
            f"<RegierTests: {np.count_nonzero(self.tested)} galaxies, "
            f"lower error {p:.3f} +/- {p_err:.3f}, more probable {q:.3f} +/- {q_err:.3f}>"
        )


def _fraction(wins: np.ndarray) -> tuple[float, float]:
    if not wins.size:
        return np.nan, np.nan
    p = float(wins.mean())
    return p, float(np.sqrt(p * (1 - p) / wins.size))


def regier_tests(
    result: FitResult | tuple[np.ndarray, np.ndarray], reference: FitResult
) -> RegierTests:
    """Two tests of a learned model against the best-fitting scaled bivariate Gaussian.

    1. The reconstruction has the lower mean squared error (MSE) over the pixels.
    2. The m pixels are more probable under N(mean, std²) of the model than under
       N(x_hat, sigma² I) of the reference for every sigma > 0, whose supremum is
       -(m/2) [ln(2 pi MSE) + 1].

    They are those of Regier, McAuliffe & Prabhat (2015, "A deep generative model
    for astronomical images of galaxies", NIPS workshop on Advances in Approximate Bayesian
    Inference).

    Parameters
    ----------
    result : FitResult, or (mean, std)
        Fits by the model that is tested; std is then the uncertainty with
        ``model_std_images`` added in quadrature.  Or what a network makes of the images,
        arrays (N, ny, nx) as `GalaxyVAE.reconstruct <galmorph.GalaxyVAE.reconstruct>` returns
        them.
    reference : FitResult
        Fits of a `~galmorph.GaussianGalaxy2D` to the same pixels.

    Returns
    -------
    RegierTests

    Raises
    ------
    ValueError
        If pixels or shapes differ, the noise of the result is not independent
        Gaussian, or a result was read from a file.

    Notes
    -----
    The reference has the lowest MSE only if it was fitted with one uncertainty for all pixels.
    All usable pixels count, held-out ones too.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, SersicGalaxy2D, fit_images
    >>> from galmorph.goodness import regier_tests
    >>> truth = SersicGalaxy2D(flux=4000, x_0=15, y_0=16, r_eff=4, n=3)
    >>> images = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (5, 32, 32))
    >>> sersic, gaussian = (
    ...     fit_images(images, m, uncertainty=1.0) for m in (SersicGalaxy2D(), GaussianGalaxy2D())
    ... )
    >>> regier_tests(sersic, gaussian)
    <RegierTests: 5 galaxies, lower error 1.000 +/- 0.000, more probable 1.000 +/- 0.000>
    """
    if not isinstance(result, FitResult):
        given = _as_reconstruction(result, reference)
    elif type(result.noise) is not GaussianNoise:
        raise ValueError(f"the tests are of independent Gaussian pixels, not of {result.noise!r}")
    elif not np.array_equal(result.shapes, reference.shapes):
        raise ValueError("the result and the reference are of different stamps")
    else:
        result._require_stamps()
        given = None
    mse, reference_mse, gain = np.full((3, len(reference)), np.nan)
    for batch in batches(reference):
        rows, used = batch.rows, batch.inv_sigma > 0
        mean, std = _reconstruction(result, batch) if given is None else (a[rows] for a in given)
        mse[rows] = _mean((batch.data - mean) ** 2, used)
        reference_mse[rows] = _mean((batch.data - batch.image()) ** 2, used)
        std = np.where(used, std, 1.0)
        density = -0.5 * ((batch.data - mean) / std) ** 2 - np.log(std)
        with np.errstate(divide="ignore"):
            best = -0.5 * (np.log(reference_mse[rows]) + 1)
        gain[rows] = used.sum(axis=(1, 2)) * (_mean(density, used) - best)
    return RegierTests(mse, reference_mse, gain)


def _as_reconstruction(given: Any, reference: FitResult) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.asarray(a, dtype=float) for a in given)
    for array in (mean, std):
        if array.ndim != 3 or np.any(reference.shapes != array.shape[1:]):
            raise ValueError(
                f"mean and std must be images of the stamps of the reference, not {array.shape}"
            )
        if len(array) != len(reference):
            raise ValueError(f"there are {len(array)} images for {len(reference)} galaxies")
    if not np.all(std > 0):
        raise ValueError("std must be positive")
    return mean, std


def _reconstruction(result: FitResult, batch: FittedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each pixel by a fit, (B, ny, nx)."""
    own = FittedBatch(result, batch.rows)
    if not (
        np.array_equal(own.data, batch.data)
        and np.array_equal(own.inv_sigma > 0, batch.inv_sigma > 0)
    ):
        raise ValueError("the result and the reference are fits of different pixels")
    image = own.image()
    return image, np.hypot(_sigma(own.noise, image, own.inv_sigma), own.misfit())


def _mean(images: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean over the used pixels (B,), NaN where there are none."""
    count = used.sum(axis=(1, 2))
    total = np.where(used, images, 0.0).sum(axis=(1, 2))
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
