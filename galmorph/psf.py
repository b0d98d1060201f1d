"""The point-spread function: what it is sampled at, and whether it holds the pixel."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["PSF"]


class PSF:
    """A point-spread function as an array, with how it was sampled.

    By default the array is the *effective* PSF, as stars show it: sampled at
    pixel steps, with the response of the pixel in it.  An array that is sampled
    more finely, or that does not hold the pixel, is declared as such.

    Parameters
    ----------
    data : array-like, shape (ny, nx)
        Samples of the PSF, odd or even in size.  The centre is at the middle
        of the array, ((nx - 1) / 2, (ny - 1) / 2).  It is normalised to sum 1.
    oversampling : int, optional
        Samples per detector pixel along each axis.
    includes_pixel : bool, optional
        Whether the response of the (detector) pixel is in the PSF already.
        If False, rendering integrates over the pixel.

    Raises
    ------
    ValueError
        If the array is empty, not two-dimensional, holds NaN or infinity, or
        its sum is not positive; or if ``oversampling`` is not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF
    >>> y, x = np.mgrid[-7:8, -7:8]
    >>> psf = PSF(np.exp(-(x**2 + y**2) / (2 * 1.5**2)))
    >>> psf.shape, round(float(psf.data.sum()), 12)
    ((15, 15), 1.0)
    """

    def __init__(self, data: Any, *, oversampling: int = 1, includes_pixel: bool = True) -> None:
        array = np.array(getattr(data, "value", data), dtype=np.float64)
        if array.ndim != 2:
            raise ValueError(f"a PSF must be a two-dimensional array, not of shape {array.shape}")
        if array.size == 0:
            raise ValueError("the PSF is empty")
        if not np.all(np.isfinite(array)):
            raise ValueError("the PSF holds NaN or infinite values")
        total = array.sum()
        if not total > 0 or total < 1e-6 * np.abs(array).sum():
            raise ValueError(f"the PSF must have a positive sum, not {total:g}")
        if not oversampling >= 1 or int(oversampling) != oversampling:
            raise ValueError(f"oversampling must be a positive integer, not {oversampling!r}")
        array /= total
        array.flags.writeable = False
        self._data = array
        self._oversampling = int(oversampling)
        self._includes_pixel = bool(includes_pixel)
        self._hash = hash((array.tobytes(), self._oversampling, self._includes_pixel))

    @property
    def data(self) -> np.ndarray:
        """The samples, read-only, of sum 1; shape (ny, nx)."""
        return self._data

    @property
    def oversampling(self) -> int:
        """Samples per detector pixel."""
        return self._oversampling

    @property
    def includes_pixel(self) -> bool:
        """Whether the response of the pixel is in the PSF."""
        return self._includes_pixel

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the array, (ny, nx), in samples."""
        return self._data.shape

    def __repr__(self) -> str:
        return (
            f"PSF(shape={self.shape}, oversampling={self.oversampling}, "
            f"includes_pixel={self.includes_pixel})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PSF) and (
            self._oversampling == other._oversampling
            and self._includes_pixel == other._includes_pixel
            and np.array_equal(self._data, other._data)
        )

    def __hash__(self) -> int:
        return self._hash

    def radius(self, fraction: float = 0.999) -> float:
        """Radius in detector pixels that holds ``fraction`` of the light.

        Parameters
        ----------
        fraction : float, optional
            Fraction of the sum of absolute values.

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import PSF
        >>> PSF(np.ones((1, 1))).radius()
        0.0
        """
        ny, nx = self.shape
        y, x = np.mgrid[:ny, :nx]
        r = np.hypot(x - (nx - 1) / 2, y - (ny - 1) / 2).ravel() / self.oversampling
        order = np.argsort(r)
        light = np.cumsum(np.abs(self._data.ravel()[order]))
        index = min(np.searchsorted(light, fraction * light[-1]), r.size - 1)
        return float(r[order][index])

    @property
    def sigma(self) -> float:
        """Gaussian width in pixels with the same peak: sqrt(1 / (2 pi peak))."""
        peak = self._data.max() * self.oversampling**2
        return float(np.sqrt(1.0 / (2 * np.pi * peak)))

    @classmethod
    def from_any(cls, psf: Any) -> PSF:
        """Make a PSF of whatever describes one.

        Parameters
        ----------
        psf : PSF, array-like, NDData, HDU, path, or two-dimensional model
            An array, NDData, HDU or FITS file is taken as an effective PSF at
            pixel steps (an HDU may declare otherwise by its header cards
            ``OVERSAMP`` and ``PIXINCL``).  A model (astropy or photutils) is
            sampled four times a pixel about its centre and its values are
            taken, as photutils does, to include the pixel.

        Returns
        -------
        PSF

        Raises
        ------
        ValueError
            If it can't be used as a PSF.
        OSError
            If a file can't be read.

        Examples
        --------
        >>> from astropy.modeling.models import Gaussian2D
        >>> from galmorph import PSF
        >>> PSF.from_any(Gaussian2D(1, 0, 0, 1.3, 1.3)).oversampling
        4
        """
        from astropy.modeling.core import Model

        if isinstance(psf, PSF):
            return psf
        if isinstance(psf, Model):
            return _from_model(psf)
        if isinstance(psf, str | os.PathLike):
            return _from_file(psf)
        if hasattr(psf, "header") and hasattr(psf, "data"):
            return _from_hdu(psf)
        return cls(getattr(psf, "data", psf) if hasattr(psf, "uncertainty") else psf)


def _from_hdu(hdu: Any) -> PSF:
    return PSF(
        hdu.data if hdu.data is not None else np.zeros((0, 0)),
        oversampling=int(hdu.header.get("OVERSAMP", 1)),
        includes_pixel=bool(hdu.header.get("PIXINCL", True)),
    )


def _from_file(path: str | os.PathLike) -> PSF:
    from astropy.io import fits

    with fits.open(path) as hdus:
        for hdu in hdus:
            if hdu.is_image and hdu.header.get("NAXIS", 0) == 2:
                return _from_hdu(hdu)
    raise ValueError(f"{os.fspath(path)} holds no two-dimensional image")


def _from_model(model: Any, *, oversampling: int = 4, max_radius: int = 40) -> PSF:
    """Sample a model about its centre, as far out as it matters."""
    centre = []
    for names in (("x_0", "x_mean"), ("y_0", "y_mean")):
        found = [n for n in names if n in model.param_names]
        centre.append(float(getattr(model, found[0]).value) if found else 0.0)

    def sample(radius: int) -> np.ndarray:
        step = np.arange(-radius * oversampling, radius * oversampling + 1) / oversampling
        x, y = np.meshgrid(step + centre[0], step + centre[1])
        values = model(x, y)
        return np.asarray(getattr(values, "value", values), dtype=float)

    radius = 4
    while radius < max_radius:
        values = np.abs(sample(radius))
        edge = max(values[0].max(), values[-1].max(), values[:, 0].max(), values[:, -1].max())
        if edge < 1e-6 * values.max():
            break
        radius += 4
    return PSF(sample(radius), oversampling=oversampling)


@lru_cache(maxsize=64)
def cached_radius(psf: PSF) -> float:
    """`PSF.radius`, remembered: it is asked for at every call of a fitter."""
    return psf.radius()
