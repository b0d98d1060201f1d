"""What the pixels do: the noise of an image, and the likelihood that it gives to a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["GaussianNoise", "estimate_noise"]

#: Half the interquartile range of a normal distribution of unit variance.
_QUARTILE = 0.674489750196082
#: Standard deviation of a unit normal distribution cut at 3 sigma.
_CLIPPED_AT_3 = 0.986578
#: Fewer pixels than this say nothing about their scatter.
MIN_PIXELS = 8


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


class GaussianNoise:
    """Independent Gaussian noise of known standard deviation in every pixel.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.noise import GaussianNoise
    >>> data = np.zeros((2, 2))
    >>> inv_sigma = np.array([[1.0, 1.0], [1.0, 0.0]])
    >>> GaussianNoise().log_prob(data, data, inv_sigma).round(3)
    array([[-0.919, -0.919],
           [-0.919,  0.   ]])
    """

    def log_prob(self, data: ArrayLike, model: ArrayLike, inv_sigma: ArrayLike) -> np.ndarray:
        """Logarithm of the probability density of each pixel.

        Parameters
        ----------
        data, model : array, shape (..., ny, nx)
            Pixel values and what the model expects there.
        inv_sigma : array, shape (..., ny, nx)
            One over the standard deviation; 0 where a pixel must not be used.

        Returns
        -------
        array, shape (..., ny, nx)
            ``-((data - model) / sigma)**2 / 2 - log(sigma * sqrt(2 pi))``; exactly 0 in
            unused pixels, so that the sum over pixels is the log-likelihood.
        """
        data, model, inv_sigma = (np.asarray(a, dtype=float) for a in (data, model, inv_sigma))
        used = inv_sigma > 0
        weight = np.where(used, inv_sigma, 1.0)
        pull = (data - model) * weight
        return np.where(used, -0.5 * (pull**2 + np.log(2 * np.pi)) + np.log(weight), 0.0)

    def __repr__(self) -> str:
        return "GaussianNoise()"
