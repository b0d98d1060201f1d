"""Understand what the user gave: any image, mask, uncertainty or list of positions.

Everything ends as a `Frame`: one image or cube with what is known of its
pixels, nothing read from disk before `Frame.cut` asks for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.nddata import (
    InverseVariance,
    NDData,
    NDUncertainty,
    StdDevUncertainty,
    VarianceUncertainty,
)

__all__ = []

_STD, _VAR, _IVAR = "std", "var", "ivar"
_KINDS = {StdDevUncertainty: _STD, VarianceUncertainty: _VAR, InverseVariance: _IVAR}
#: Power of the data's unit in which each kind of uncertainty comes.
_POWER = {_STD: 1, _VAR: 2, _IVAR: -2}

#: Names (EXTNAME) that are taken from a FITS file, best first.
FITS_NAMES = {
    "data": ("SCI", "SCIENCE", "IMAGE", "DATA", "FLUX"),
    _STD: ("ERR", "ERROR", "UNCERT", "UNCERTAINTY", "SIGMA", "STDDEV", "STD", "RMS", "NOISE"),
    _VAR: ("VAR", "VARIANCE"),
    _IVAR: ("IVAR", "INVVAR", "INVERSE_VARIANCE"),
    "weight": ("WHT", "WEIGHT"),
    "mask": ("MASK", "DQ", "FLAGS"),
    "psf": ("PSF", "PSFIMAGE"),
}


# -- arrays ----------------------------------------------------------------------------


def _is_sliceable(obj: Any) -> bool:
    """An array on disk (h5py, zarr, dask …) that is read by slicing it."""
    return all(hasattr(obj, name) for name in ("shape", "dtype", "__getitem__"))


def _split_array(obj: Any) -> tuple[Any, u.UnitBase | None, np.ndarray | None]:
    """Plain array (still unread if on disk), unit, and mask if it brings one."""
    mask = None
    if hasattr(obj, "unmasked"):  # astropy.utils.masked.Masked
        obj, mask = obj.unmasked, obj.mask
    if isinstance(obj, np.ma.MaskedArray):
        obj, mask = obj.data, np.ma.getmaskarray(obj)
    unit = None
    if isinstance(obj, u.Quantity):
        obj, unit = obj.value, obj.unit
    if not _is_sliceable(obj):
        try:
            obj = np.asarray(obj)
        except ValueError as err:  # ragged lists
            raise ValueError(f"cannot make an array of {type(obj).__name__}: {err}") from None
    return obj, unit, mask


def _require_numbers(array: Any, name: str) -> None:
    kind = np.dtype(array.dtype).kind
    if kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")


@dataclass
class FitsArray:
    """An image extension that is opened, read in part and closed at each access.

    Leaves no file open and no pages of it in memory, and applies BSCALE/BZERO.
    """

    path: str
    extension: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, key) -> np.ndarray:
        try:
            with fits.open(self.path, memmap=False) as hdus:
                return np.asarray(hdus[self.extension].section[key])
        except FITS_ERRORS as err:
            raise _unreadable(self.path, err) from err


def release(array: Any) -> None:
    """Give back the memory of file pages that have been read from a memory map.

    They count as this process's memory until then, and the whole of a large
    cube would be in it at the end.
    """
    owner = array
    shared = False
    while owner is not None and not isinstance(owner, mmap.mmap):
        # Pages of a private, writable map (mode "c") may hold the user's changes.
        shared |= isinstance(owner, np.memmap) and owner.mode != "c"
        owner = getattr(owner, "base", None)
    if owner is not None and shared and hasattr(mmap, "MADV_DONTNEED"):
        # It may be closed by its owner, or on an exotic file system.
        with contextlib.suppress(ValueError, OSError):
            owner.madvise(mmap.MADV_DONTNEED)


# -- one image and what is known of it ---------------------------------------------------


@dataclass
class Frame:
    """One image (ny, nx) or cube (N, ny, nx), its uncertainty, mask, unit, WCS and PSF."""

    data: Any
    uncertainty: Any = None  # scalar, (ny, nx) or like the data
    kind: str = _STD
    scale: float = 1.0  # standard deviation in the data's unit = scale * that of `uncertainty`
    masks: tuple = ()  # arrays, non-zero = bad; (ny, nx) or like the data
    mask_bits: int | None = None  # of the masks' bits, those that mean bad (None: all)
    weight: Any = None  # its zeros are bad pixels
    unit: u.UnitBase | None = None
    wcs: Any = None
    psf: Any = None
    name: str = "array"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def cut(self, key) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Part of the image: data, sigma (None if unknown) and mask, all float64/bool.

        Sigma is NaN where the uncertainty makes no sense, and infinite where it
        says that the pixel has no weight.
        """
        data = np.asarray(self.data[key], dtype=np.float64)
        mask = np.zeros(data.shape, dtype=bool)
        for other in self.masks:
            flags = np.asarray(_take(other, key, self.shape))
            mask |= (flags & self.mask_bits if self.mask_bits else flags) != 0
        if self.weight is not None:
            mask |= ~(np.asarray(_take(self.weight, key, self.shape)) > 0)
        if self.uncertainty is None:
            return data, None, mask
        sigma = np.asarray(_take(self.uncertainty, key, self.shape), dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            if self.kind == _VAR:
                sigma = np.sqrt(sigma)
            elif self.kind == _IVAR:
                sigma = 1 / np.sqrt(np.where(sigma == 0, 0.0, sigma))  # -0.0 would give -inf
            sigma = sigma * self.scale
        return data, np.broadcast_to(sigma, data.shape), mask

    def release(self) -> None:
        for array in (self.data, self.uncertainty, self.weight, *self.masks):
            release(array)


def _take(array: Any, key, shape: tuple[int, ...]):
    """Index an array that may lack the first axis of the data, or be a scalar."""
    if array.shape == ():
        return np.asarray(array)
    if len(array.shape) < len(shape):  # one (ny, nx) plane for a whole cube
        return array
    if array.shape[0] == 1 != shape[0]:
        return array[0:1]
    if array.shape != shape:  # (N, 1, 1)
        return array[key[0] if isinstance(key, tuple) else key]
    return array[key]


def _check_companion(array: Any, shape: tuple[int, ...], name: str) -> None:
    allowed = [shape, (), shape[-2:]]
    if len(shape) == 3:
        allowed += [(shape[0], 1, 1), (1, *shape[-2:])]
    if tuple(array.shape) not in allowed:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, which does not fit the images' {shape}"
        )


def make_frame(obj: Any) -> Frame:
    """Frame of anything that is one image or one cube.

    Raises
    ------
    TypeError, ValueError, OSError
        If it is nothing of the kind, has no pixels, or cannot be read.
    """
    if isinstance(obj, (str, os.PathLike)):
        frame = _frame_from_path(os.fspath(obj))
    elif isinstance(obj, fits.HDUList):
        frame = _frame_from_hdus(obj, obj.filename() or "HDUList")
    elif isinstance(obj, (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU)):
        frame = _frame_from_hdus([obj], f"HDU {obj.name}".strip())
    elif isinstance(obj, NDData):
        frame = _frame_from_nddata(obj)
    elif obj is None or isinstance(obj, (bytes, dict, set)) or callable(obj):
        raise TypeError(
            "images must be an array, Quantity, NDData, FITS HDU, path, or a list of these, "
            f"not {type(obj).__name__}"
        )
    else:
        data, unit, mask = _split_array(obj)
        frame = Frame(data, masks=() if mask is None else (mask,), unit=unit)
    _require_numbers(frame.data, "the image")
    if len(frame.shape) not in (2, 3):
        raise ValueError(f"images must be 2-D or 3-D, not {len(frame.shape)}-D")
    if 0 in frame.shape:
        raise ValueError(f"images of shape {frame.shape} hold no pixels")
    return frame


def add_to_frame(frame: Frame, *, uncertainty: Any = None, mask: Any = None) -> Frame:
    """The frame with the uncertainty (instead of) and mask (beside its own) of the caller."""
    if uncertainty is not None:
        values, kind, unit = _split_uncertainty(uncertainty)
        _check_companion(values, frame.shape, "uncertainty")
        scale = _uncertainty_scale(unit, frame.unit, kind)
        if values.shape == () and not np.asarray(values) > 0:
            raise ValueError(f"uncertainty must be positive, not {float(values)}")
        frame = replace(frame, uncertainty=values, kind=kind, scale=scale)
    if mask is not None:
        mask = _split_array(mask)[0]
        if np.dtype(mask.dtype).kind not in "biu":
            raise TypeError(f"mask must hold bool (True = bad) or integers, not {mask.dtype}")
        _check_companion(mask, frame.shape, "mask")
        if frame.mask_bits:  # the file's own bits mean something else
            own = tuple((np.asarray(m[...]) & frame.mask_bits) != 0 for m in frame.masks)
            frame = replace(frame, masks=own, mask_bits=None)
        frame = replace(frame, masks=(*frame.masks, mask))
    return frame


def _split_uncertainty(obj: Any) -> tuple[Any, str, u.UnitBase | None]:
    if isinstance(obj, NDUncertainty):
        kind = next((k for cls, k in _KINDS.items() if isinstance(obj, cls)), None)
        if kind is None:
            raise TypeError(
                f"cannot tell what {type(obj).__name__} means: use StdDevUncertainty, "
                "VarianceUncertainty or InverseVariance"
            )
        array = obj.array
        if array is None:
            raise ValueError("the uncertainty holds no values")
        array, unit, _ = _split_array(array)
        unit = obj.unit if obj.unit is not None else unit
    else:
        kind = _STD
        array, unit, mask = _split_array(obj)
        if mask is not None:
            array = np.where(mask, np.nan, array)
    _require_numbers(array, "uncertainty")
    return array, kind, unit


def _uncertainty_scale(unit, data_unit, kind: str) -> float:
    """Factor that turns a standard deviation of the uncertainty into the data's unit."""
    if unit is None:
        return 1.0
    power = _POWER[kind]
    target = (data_unit if data_unit is not None else u.dimensionless_unscaled) ** power
    try:
        return float(unit.to(target)) ** (1 / power)
    except u.UnitConversionError:
        raise u.UnitsError(
            f"uncertainty in {unit} does not fit data in "
            f"{'no unit' if data_unit is None else data_unit}"
        ) from None


def _frame_from_nddata(obj: NDData) -> Frame:
    data, unit, mask = _split_array(obj.data)
    frame = Frame(data, unit=obj.unit if obj.unit is not None else unit, wcs=obj.wcs)
    frame = replace(frame, psf=obj.psf, name=type(obj).__name__)
    if obj.uncertainty is not None:
        frame = add_to_frame(frame, uncertainty=obj.uncertainty)
    for one in (mask, obj.mask):
        if one is not None:
            one = np.asarray(one)
            frame = add_to_frame(frame, mask=one if one.dtype.kind in "biu" else one.astype(bool))
    return frame


def sky_wcs(wcs: Any) -> Any:
    """The celestial part of a WCS, or None if it has none."""
    if wcs is None:
        return None
    if hasattr(wcs, "has_celestial"):  # astropy.wcs.WCS
        return wcs.celestial if wcs.has_celestial else None
    high = wcs if hasattr(wcs, "pixel_to_world") else None
    return high if high is not None and wcs.pixel_n_dim == 2 else None


# -- FITS --------------------------------------------------------------------------------

FITS_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    zlib.error,
    fits.VerifyError,
)


def _unreadable(path: str, err: Exception) -> OSError:
    return OSError(f"{path}: cannot be read as a FITS image ({err})")


def _frame_from_path(path: str) -> Frame:
    """Frame of ``file.fits``, ``file.fits[SCI]``, ``file.fits[SCI,2]`` or ``file.fits[1]``."""
    extension = None
    match = re.fullmatch(r"(.+)\[(\w+)(?:,(\d+))?\]", path)
    if match and not os.path.exists(path):
        path, name, version = match.groups()
        extension = int(name) if name.isdigit() else (name, int(version or 1))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # Both are followed by an error, below.
            warnings.filterwarnings("ignore", "File may have been truncated")
            warnings.filterwarnings("ignore", "Error validating header")
            # Our own file: astropy leaves one open that it finds damaged.
            with open(path, "rb") as file, fits.open(file, memmap=True) as hdus:
                frame = _frame_from_hdus(hdus, Path(path).name, path=path, extension=extension)
                _touch_end(frame)
    except NoImageError as err:
        raise ValueError(f"{path}: {err}") from None
    except u.UnitsError:
        raise
    except FITS_ERRORS as err:
        raise _unreadable(path, err) from err
    return frame


def _touch_end(frame: Frame) -> None:
    """Read the last pixels, which a truncated file does not have."""
    for array in (frame.data, frame.uncertainty, frame.weight, *frame.masks):
        if getattr(array, "shape", ()):
            np.asarray(array[-1:])


class NoImageError(ValueError):
    """The file is a good FITS file but holds no image."""


def _frame_from_hdus(hdus, name: str, *, path=None, extension=None) -> Frame:
    images = {}
    for i, hdu in enumerate(hdus):
        if _is_image(hdu):
            images.setdefault((hdu.name.upper(), hdu.ver), (i, hdu))
    if not images:
        raise NoImageError("holds no image")

    def find(role: str, version: int | None = None):
        for known in FITS_NAMES[role]:
            for (label, ver), found in images.items():
                if label == known + band and version in (None, ver):
                    return found
        return None

    band = ""

    if extension is not None:
        index, science = _pick(hdus, extension)
    else:
        index, science = find("data") or next(iter(images.values()))
    ver = science.ver
    band = _band(science.name)
    array = _lazy(science, index, path)
    frame = Frame(array, name=name, unit=_unit(science.header), wcs=_wcs(hdus, science))

    for kind in (_STD, _VAR, _IVAR):
        found = find(kind, ver)
        if found is not None and found[1] is not science:
            utype = str(found[1].header.get("UTYPE", "")).strip()  # written by CCDData
            kind = next((k for cls, k in _KINDS.items() if cls.__name__ == utype), kind)
            values = _lazy(found[1], found[0], path)
            _check_companion(values, frame.shape, f"extension {found[1].name}")
            scale = _uncertainty_scale(_unit(found[1].header), frame.unit, kind)
            frame = replace(frame, uncertainty=values, kind=kind, scale=scale)
            break
    else:
        frame = replace(frame, uncertainty=_noise_in_header(science.header))
    found = find("mask", ver)
    if found is not None and found[1] is not science:
        values = _lazy(found[1], found[0], path)
        _check_companion(values, frame.shape, f"extension {found[1].name}")
        # In JWST and Roman data most bits are remarks; bit 0 is "do not use".
        telescope = str(hdus[0].header.get("TELESCOP", "")).upper()
        bits = 1 if found[1].name == "DQ" and telescope in ("JWST", "ROMAN") else None
        frame = replace(frame, masks=(values,), mask_bits=bits)
    found = find("weight", ver)
    if found is not None and found[1] is not science:
        values = _lazy(found[1], found[0], path)
        _check_companion(values, frame.shape, f"extension {found[1].name}")
        frame = replace(frame, weight=values)
    found = find("psf", ver) or find("psf")
    if found is not None and found[1] is not science:
        # a copy, for the file is closed; its header says how the PSF was sampled
        psf = fits.ImageHDU(np.array(found[1].data, dtype=float), found[1].header)
        frame = replace(frame, psf=psf)
    return frame


def _band(name: str) -> str:
    """What follows the name in ``SCI_R``: its PSF is ``PSF_R``."""
    for known in FITS_NAMES["data"]:
        if name.upper().startswith(f"{known}_"):
            return name.upper().removeprefix(known)
    return ""


def _noise_in_header(header) -> np.ndarray | None:
    """One standard deviation for all pixels, if the header has it."""
    value = header.get("NOISERMS")
    if isinstance(value, int | float) and np.isfinite(value) and value > 0:
        return np.array(float(value))
    return None


def _is_image(hdu) -> bool:
    return hdu.is_image and len(hdu.shape) >= 2 and 0 not in hdu.shape


def _pick(hdus, extension):
    try:
        hdu = hdus[extension]
        index = extension if isinstance(extension, int) else hdus.index_of(extension)
    except (KeyError, IndexError):
        raise NoImageError(f"has no extension {extension}") from None
    if not _is_image(hdu):
        raise NoImageError(f"extension {extension} is not an image")
    return index, hdu


def _lazy(hdu, index: int, path: str | None):
    """The pixels: from our own file, cubes are read in parts and images mapped."""
    if path is not None and len(hdu.shape) > 2 and not str(path).endswith((".gz", ".bz2", ".xz")):
        return FitsArray(str(path), index, tuple(hdu.shape), np.dtype(hdu.section.dtype))
    return hdu.data


def _unit(header) -> u.UnitBase | None:
    text = str(header.get("BUNIT", "")).strip()
    if not text:
        return None
    for options in ({"format": "fits"}, {}):
        try:
            return u.Unit(text, **options)
        except ValueError:
            continue
    return None  # "ADU/S/ARCSEC2 (AB)" and other prose: the numbers are still good


def _wcs(hdus, hdu):
    from astropy.wcs import WCS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd headers are no news about the galaxy
        try:
            wcs = WCS(hdu.header, fobj=hdus if isinstance(hdus, fits.HDUList) else None)
        except Exception:
            return None
    return wcs if wcs.has_celestial else None


# -- positions ---------------------------------------------------------------------------

#: Columns that are taken as positions, best first, and the pixel number that they start at.
POSITION_COLUMNS = (
    ("x_0", "y_0", 0),
    ("x_centroid", "y_centroid", 0),
    ("xcentroid", "ycentroid", 0),
    ("x_fit", "y_fit", 0),
    ("x_init", "y_init", 0),
    ("x", "y", 0),
    ("x_peak", "y_peak", 0),
    ("X_IMAGE", "Y_IMAGE", 1),  # SExtractor counts from one
)


def parse_positions(obj: Any, wcs: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixel positions (N, 2) as (x, y), and the labels that came with them (or None).

    Raises
    ------
    TypeError, ValueError
        If it holds no positions, or sky positions and there is no WCS.
    """
    from astropy.coordinates import SkyCoord
    from astropy.table import Table

    labels = None
    if isinstance(obj, SkyCoord):
        xy = _sky_to_pixel(obj, wcs)
    elif isinstance(obj, Table):
        xy = _table_positions(obj, wcs)
        name = next((n for n in ("label", "labels") if n in obj.colnames), None)
        labels = None if name is None else np.asarray(obj[name])
    elif hasattr(obj, "x_centroid") or hasattr(obj, "xcentroid"):  # photutils.SourceCatalog
        x = obj.x_centroid if hasattr(obj, "x_centroid") else obj.xcentroid
        y = obj.y_centroid if hasattr(obj, "y_centroid") else obj.ycentroid
        xy = np.column_stack([np.atleast_1d(_pixels(x)), np.atleast_1d(_pixels(y))])
        labels = getattr(obj, "labels", None)
    else:
        try:
            xy = _pixels(obj)
        except (TypeError, ValueError) as err:
            if isinstance(err, u.UnitsError):
                raise
            raise TypeError(
                "positions must be an (N, 2) array of (x, y), a SkyCoord, a Table or a "
                f"SourceCatalog, not {type(obj).__name__}"
            ) from None
        if xy.shape == (2,):
            xy = xy[None]
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"positions must have shape (N, 2), not {xy.shape}")
    if len(xy) == 0:
        raise ValueError("positions are empty: there is nothing to fit")
    labels = None if labels is None else np.atleast_1d(np.asarray(labels)).astype(np.int64)
    return xy, labels


def _pixels(values: Any) -> np.ndarray:
    """Float array of pixel coordinates; masked entries become NaN."""
    if isinstance(values, (list, tuple)) and any(isinstance(v, u.Quantity) for v in values):
        values = u.Quantity(values)
    values, unit, mask = _split_array(values)
    if unit is not None:
        values = (np.asarray(values) * unit).to_value(u.pix)
    values = np.array(values, dtype=float)
    if mask is not None:
        values[mask] = np.nan
    return values


def _table_positions(table, wcs) -> np.ndarray:
    for x, y, first in POSITION_COLUMNS:
        if x in table.colnames and y in table.colnames:
            return np.column_stack([_pixels(_column(table[n])) for n in (x, y)]) - first
    from astropy.coordinates import SkyCoord

    for name in table.colnames:
        if isinstance(table[name], SkyCoord):
            return _sky_to_pixel(table[name], wcs)
    names = {n.lower(): n for n in table.colnames}
    if "ra" in names and "dec" in names:
        ra, dec = (u.Quantity(_column(table[names[n]]), copy=False) for n in ("ra", "dec"))
        ra, dec = (q * u.deg if q.unit == u.dimensionless_unscaled else q for q in (ra, dec))
        return _sky_to_pixel(SkyCoord(ra, dec), wcs)
    wanted = ", ".join(f"{x}/{y}" for x, y, _ in POSITION_COLUMNS)
    raise ValueError(f"the table has none of the columns {wanted}, ra/dec or a SkyCoord")


def _column(column):
    """A table column as Quantity or array, with NaN where it is masked."""
    if isinstance(column, u.Quantity):
        return column
    values = np.ma.filled(np.ma.asarray(column).astype(float), np.nan)
    unit = getattr(column, "unit", None)
    return values if unit is None else values * unit


def _sky_to_pixel(sky, wcs) -> np.ndarray:
    if wcs is None:
        raise ValueError("sky positions need an image with a celestial WCS")
    x, y = wcs.world_to_pixel(sky)
    return np.column_stack([np.ravel(x), np.ravel(y)]).astype(float)


def parse_size(size: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """Stamp size (ny, nx), checked against the image."""
    if isinstance(size, u.Quantity):
        size = size.to_value(u.pix)
    values = np.asarray(size)
    if values.shape not in ((), (2,)) or values.dtype.kind not in "iuf":
        raise TypeError(f"size must be an integer or a pair (ny, nx), not {size!r}")
    if not np.all(np.isfinite(values)) or np.any(values != np.floor(values)):
        raise TypeError(f"size must be in whole pixels, not {size!r}")
    if np.any(values < 1):
        raise ValueError(f"size must be at least 1 pixel, not {size!r}")
    ny, nx = (int(v) for v in np.broadcast_to(values, 2))
    if ny > 2 * shape[0] + 1 or nx > 2 * shape[1] + 1:
        raise ValueError(f"size {(ny, nx)} is more than twice the image's {shape}")
    return ny, nx


def parse_segmentation(obj: Any, shape: tuple[int, int]) -> np.ndarray:
    """Integer label image of the same shape as the image."""
    data = np.asarray(getattr(obj, "data", obj))
    if data.dtype.kind not in "iu":
        raise TypeError("segmentation must be a SegmentationImage or an array of integers")
    if data.shape != tuple(shape):
        raise ValueError(f"segmentation has shape {data.shape}, the image {tuple(shape)}")
    return data
