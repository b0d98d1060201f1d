"""The point-spread function: what it is sampled at, whether it holds the pixel, where it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["PSF", "PSFField"]

#: Side of the cells of a PSF that is a function, in pixels.
_CELL = 64.0
#: Cells in the spacing of a grid of PSFs.
_CELLS_PER_STEP = 4
#: PSFs are alike if their widths differ by less than this, in the natural logarithm.
_ALIKE = 0.05


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


class PSFField:
    """A PSF that changes over an image, taken as constant within small square cells.

    All sources of a cell share one `PSF`, that at its centre, and are fitted together.
    `galmorph.deblend`, `galmorph.photometry` and, with positions in an image,
    `galmorph.fit_images` take it as ``psf``; they make one of a grid or a function.

    Parameters
    ----------
    psf : `~photutils.psf.GriddedPSFModel` or callable
        A grid is evaluated as photutils does, at its own sampling, and its values include the
        pixel.  A function ``psf(x, y)`` of a position in pixels gives what `PSF.from_any`
        takes, as an array or a `PSF`, centred; or None where there is none.
    cell : float, optional
        Side of the cells in pixels.  By default a quarter of the least spacing of a grid, and 64
        for a function; a PSF that is wider by one per cent from one side of a cell to the other
        gives errors up to half a per cent in the fluxes of stars.

    Raises
    ------
    TypeError
        If ``psf`` is neither a grid nor a function.
    ValueError
        If ``cell`` is not a positive number.

    Examples
    --------
    >>> from galmorph import PSFField
    >>> from galmorph.detection import gaussian_psf
    >>> field = PSFField(lambda x, y: gaussian_psf(2.5 + x / 1000), cell=100)
    >>> field.at(120, 30) is field.at(180, 60), field.at(120, 30) == field.at(1200, 30)
    (True, False)
    """

    def __init__(self, psf: Any, *, cell: float | None = None) -> None:
        if not _changes(psf):
            raise TypeError(
                "a PSF that changes with position is a photutils GriddedPSFModel or a function "
                f"psf(x, y), not {type(psf).__name__}; see PSF for one that does not"
            )
        if cell is None:
            cell = _grid_step(psf) / _CELLS_PER_STEP if _is_grid(psf) else _CELL
        if not (np.isscalar(cell) and np.isreal(cell) and cell > 0) or np.isnan(cell):
            raise ValueError(f"cell must be a positive number of pixels, not {cell!r}")
        self._psf = psf
        self._cell = float(cell)
        self._cells: dict[tuple[float, float], PSF | str] = {}
        self._different: dict[PSF, PSF] = {}

    @property
    def cell(self) -> float:
        """Side of the cells in pixels."""
        return self._cell

    def __repr__(self) -> str:
        name = type(self._psf).__name__
        if not _is_grid(self._psf):
            name = getattr(self._psf, "__name__", name)
        return f"PSFField({name}, cell={self._cell:g})"

    def at(self, x: float, y: float) -> PSF:
        """The PSF at a position.

        Parameters
        ----------
        x, y : float
            In pixels; (0, 0) is the centre of the first one.

        Returns
        -------
        PSF
            The same object within a cell, and for cells where it does not differ.

        Raises
        ------
        ValueError
            If there is none that can be used.

        Examples
        --------
        >>> from galmorph import PSFField
        >>> from galmorph.detection import gaussian_psf
        >>> PSFField(lambda x, y: gaussian_psf(2.5)).at(10, 20)
        PSF(shape=(57, 57), oversampling=4, includes_pixel=True)
        """
        if not (np.isfinite(x) and np.isfinite(y)):
            raise ValueError(f"there is no PSF at ({x}, {y})")
        key = self._cell_of(x), self._cell_of(y)
        if key not in self._cells:
            self._cells[key] = self._evaluated(*key)
        found = self._cells[key]
        if isinstance(found, str):
            raise ValueError(f"there is no PSF at ({x:.1f}, {y:.1f}): {found}")
        return found

    def _cell_of(self, value: float) -> float:
        """Centre of the cell; pixels begin at -0.5."""
        if np.isinf(self._cell):
            return 0.0
        return float((np.floor((value + 0.5) / self._cell) + 0.5) * self._cell - 0.5)

    def _evaluated(self, x: float, y: float) -> PSF | str:
        """The PSF of a cell, or what is wrong with it."""
        if _is_grid(self._psf):
            return self._shared(_from_grid(self._psf, x, y))
        try:
            value = self._psf(x, y)
        except (ValueError, ArithmeticError, LookupError) as error:  # others are mistakes in it
            return f"{type(error).__name__}: {error}"
        if value is None:
            return "the function gives None"
        try:
            return self._shared(PSF.from_any(value))
        except (ValueError, TypeError, OSError) as error:
            return str(error)

    def _shared(self, psf: PSF) -> PSF:
        return self._different.setdefault(psf, psf)


def as_field(psf: Any) -> PSFField | None:
    """A PSF that changes with position; None of what does not."""
    if isinstance(psf, PSFField):
        return psf
    return PSFField(psf) if _changes(psf) else None


def _changes(psf: Any) -> bool:
    """Whether it is a grid or a function."""
    from astropy.modeling.core import Model

    return _is_grid(psf) or (callable(psf) and not isinstance(psf, (Model, type)))


def psf_at(psf: PSF | PSFField | None, xy: Sequence[float]) -> PSF | None:
    """The PSF at a position (x, y); None if there is none, or none that can be used."""
    if not isinstance(psf, PSFField):
        return psf
    try:
        return psf.at(*xy)
    except ValueError:
        return None


def psf_kind(psf: PSF | None) -> tuple | None:
    """Equal for PSFs that may be drawn as one batch and whose sources look about the same."""
    if psf is None:
        return None
    ny, nx = psf.shape
    width = round(float(np.log(psf.sigma)) / _ALIKE)
    return psf.oversampling, psf.includes_pixel, ny % 2, nx % 2, width


def by_kind(psfs: Iterable[PSF | None]) -> list[np.ndarray]:
    """Indices of PSFs that are alike, see `psf_kind`."""
    kinds: dict[tuple | None, list[int]] = {}
    for i, psf in enumerate(psfs):
        kinds.setdefault(psf_kind(psf), []).append(i)
    return [np.array(rows) for rows in kinds.values()]


def shared_or_each(psfs: Iterable[PSF | None]) -> PSF | list[PSF | None] | None:
    """One PSF if all are the same object, else the list."""
    psfs = list(psfs)
    return psfs[0] if psfs and all(p is psfs[0] for p in psfs) else psfs


def _is_grid(psf: Any) -> bool:
    """Whether it is a GriddedPSFModel."""
    return hasattr(psf, "grid_xypos") and hasattr(psf, "evaluate")


def _grid_step(grid: Any) -> float:
    """Least distance of its points along an axis; infinite for one PSF."""
    steps = [np.diff(np.unique(values)) for values in np.asarray(grid.grid_xypos, dtype=float).T]
    return min((float(step.min()) for step in steps if step.size), default=np.inf)


def _from_grid(grid: Any, x: float, y: float) -> PSF:
    """A GriddedPSFModel at a position, at the samples that it is made of."""
    each = [int(n) for n in np.broadcast_to(grid.oversampling, 2)]  # (y, x)
    finest = max(each)
    counts = [(n - 1) * finest // own + 1 for n, own in zip(grid.data.shape[1:], each, strict=True)]
    rows, columns = ((np.arange(n) - (n - 1) / 2) / finest for n in counts)
    dx, dy = np.meshgrid(columns, rows)
    values = grid.evaluate(dx + x, dy + y, 1.0, x, y)
    return PSF(values, oversampling=finest)


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
