"""Where stamps come from: a cube, a list of images, or positions in a large image.

A `StampSource` knows how many stamps there are and of what shape, and reads
them a batch at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.modeling.core import Model
from astropy.nddata import NDData
from astropy.utils.exceptions import AstropyUserWarning

from galmorph import _inputs
from galmorph._inputs import Frame
from galmorph.flags import FitFlag
from galmorph.noise import MIN_PIXELS, estimate_noise
from galmorph.psf import PSF, as_field, by_kind, psf_at, shared_or_each

__all__ = ["StampBatch", "StampSource"]

#: Sides of stamps that are cut by segment: few, so that batches are of one shape.
_SIDES = np.array([25, 33, 41, 51, 65, 81, 101, 129, 161, 201, 257, 321, 401, 513])
#: Side of the stamp in units of the longer side of the segment's bounding box.
_SEGMENT_FACTOR = 2.5
#: Connected pixels of one value that make a plateau (2 x 2 is met in noiseless, symmetric images).
_PLATEAU = 5


@dataclass
class StampBatch:
    """Stamps of one shape, ready to be fitted.

    Attributes
    ----------
    index : array of int, shape (B,)
        Position of each stamp in the whole job.
    data : array, shape (B, ny, nx)
        Pixel values, float64; unusable pixels hold 0.
    inv_sigma : array, shape (B, ny, nx)
        One over the uncertainty; exactly 0 where a pixel must not be used.
    psf : PSF, list of (PSF or None), or None
        One for all, or one each (None where it is unusable); None if the
        model's own is to be used.
    origin : array of int, shape (B, 2)
        (x, y) of the stamp's pixel (0, 0) in its parent image.
    position : array, shape (B, 2)
        First guess of the centre, (x, y) in pixels of the stamp; NaN where
        none was given.
    flags : array of int32, shape (B,)
        `FitFlag` bits that are known before the fit.
    """

    index: np.ndarray
    data: np.ndarray
    inv_sigma: np.ndarray
    psf: PSF | list[PSF | None] | None
    origin: np.ndarray
    position: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: np.ndarray) -> StampBatch:
        """Some of the stamps, by an array of indices or bool."""
        rows = np.arange(len(self))[rows]
        psf = [self.psf[i] for i in rows] if isinstance(self.psf, list) else self.psf
        return StampBatch(
            index=self.index[rows],
            data=self.data[rows],
            inv_sigma=self.inv_sigma[rows],
            psf=psf,
            origin=self.origin[rows],
            position=self.position[rows],
            flags=self.flags[rows],
        )


# -- PSFs ----------------------------------------------------------------------------------


class PSFSource:
    """One PSF for all galaxies, one each, or none.

    Parameters
    ----------
    psf : object
        None; anything that `PSF.from_any` takes; or a list or an array
        (n, ky, kx) of those; or, given ``centers``, a `PSFField` or what it is made of.
    n : int
        Number of galaxies.
    centers : array, shape (n, 2), optional
        Where in an image (x, y) the galaxies are.

    Raises
    ------
    TypeError
        If the PSF is a function of position and there are no positions.
    ValueError
        If a PSF that all galaxies share is unusable, or there are not n of them.
    """

    def __init__(self, psf: Any, n: int, centers: np.ndarray | None = None) -> None:
        self.shared: PSF | None = None
        self._each: Sequence | None = None
        #: of the PSFs of a field; those of one kind may be in one batch
        self.kinds = np.zeros(n, dtype=int)
        field = as_field(psf)
        if field is not None and centers is not None:
            psf = shared_or_each(psf_at(field, xy) for xy in centers)
            if isinstance(psf, list):
                for kind, rows in enumerate(by_kind(psf)):
                    self.kinds[rows] = kind
        elif field is not None and not isinstance(psf, Model):
            raise TypeError("a PSF that changes with position needs an image and positions in it")
        if isinstance(psf, str | os.PathLike) and not _is_sampled_file(psf):
            psf = _inputs.make_frame(psf).data
        if isinstance(psf, fits.ImageHDU | fits.PrimaryHDU) and np.ndim(psf.data) == 3:
            psf = psf.data
        if psf is None:
            return
        if _is_stack(psf):
            count = len(psf) if isinstance(psf, list | tuple) else psf.shape[0]
            if count != n:
                raise ValueError(f"there are {count} PSFs for {n} galaxies")
            self._each = psf
        else:
            self.shared = PSF.from_any(psf)

    @property
    def per_galaxy(self) -> bool:
        return self._each is not None

    def get(self, indices: np.ndarray) -> tuple[PSF | list[PSF | None] | None, np.ndarray]:
        """PSFs of some galaxies, and which of them are unusable (B,)."""
        bad = np.zeros(len(indices), dtype=bool)
        if self._each is None:
            return self.shared, bad
        each, n = self._each, len(indices)
        if n and not isinstance(each, list | tuple) and indices[-1] - indices[0] == n - 1:
            each = np.asarray(each[int(indices[0]) : int(indices[0]) + n])  # one read for all
            indices = range(n)
        psfs = [try_psf(each[int(i)]) for i in indices]
        return psfs, np.array([p is None for p in psfs])


def try_psf(obj: Any) -> PSF | None:
    """A PSF, or None if it is not usable."""
    try:
        return None if obj is None else PSF.from_any(obj)
    except (ValueError, TypeError, OSError):
        return None


def _is_sampled_file(path) -> bool:
    """Whether a file holds one PSF (`PSF.from_any` reads it), not a stack of them."""
    try:
        return len(_inputs.make_frame(path).shape) != 3
    except (ValueError, TypeError):
        return True  # not what we understand: let PSF say so


def _is_stack(psf: Any) -> bool:
    if isinstance(psf, PSF | Model | NDData | str | os.PathLike) or hasattr(psf, "header"):
        return False
    if isinstance(psf, list | tuple):
        if len(psf) == 0:
            raise ValueError("the list of PSFs is empty")
        return any(not isinstance(p, list | tuple | float | int) for p in psf) or np.ndim(psf) == 3
    return len(getattr(psf, "shape", ())) == 3


# -- sources -------------------------------------------------------------------------------


@dataclass
class _Cut:
    """Stamps as they were read."""

    data: np.ndarray  # (B, ny, nx), NaN where there is nothing
    sigma: np.ndarray  # (B, ny, nx); NaN: makes no sense, inf: no weight
    mask: np.ndarray  # (B, ny, nx)
    unknown: np.ndarray  # (B,): no uncertainty was given
    sky: np.ndarray  # (B, ny, nx) False on the galaxy itself, as far as that is known
    flags: np.ndarray  # (B,)


class StampSource:
    """Stamps in order, read when they are asked for.

    Attributes
    ----------
    shapes : array of int, shape (N, 2)
        (ny, nx) of each stamp.
    origin : array of int, shape (N, 2)
        (x, y) of each stamp's pixel (0, 0) in its parent image.
    position : array, shape (N, 2)
        First guess of the centre, (x, y) in stamp pixels; NaN: none.
    ids : array of int, shape (N,)
        Labels of the segments, or 0 … N-1.
    unit : astropy.units.Unit or None
    wcs : None, one celestial WCS, or a list of N of them
    psfs : PSFSource
    name : str
        Where the pixels come from, for the record.
    """

    def __init__(
        self,
        *,
        shapes: np.ndarray,
        origin: np.ndarray | None = None,
        position: np.ndarray | None = None,
        ids: np.ndarray | None = None,
        unit: u.UnitBase | None = None,
        wcs: Any = None,
        psf: Any = None,
        name: str = "array",
    ) -> None:
        n = len(shapes)
        self.shapes = np.asarray(shapes, dtype=np.int64).reshape(n, 2)
        self.origin = np.zeros((n, 2), dtype=np.int64) if origin is None else origin
        self.position = np.full((n, 2), np.nan) if position is None else position
        self.ids = np.arange(n) if ids is None else np.asarray(ids)
        self.unit = unit
        self.wcs = wcs
        self.psfs = psf if isinstance(psf, PSFSource) else PSFSource(psf, n)
        self.name = name

    def __len__(self) -> int:
        return len(self.shapes)

    def _cut(self, indices: np.ndarray) -> _Cut:
        raise NotImplementedError

    def release(self) -> None:
        """Give back memory of pixels that were read from a file."""

    def _group_keys(self) -> np.ndarray:
        """(N, k): stamps may share a batch if their rows are equal."""
        return np.column_stack([self.shapes, self.psfs.kinds])

    def batches(self, batch_size: int | None = None) -> Iterator[np.ndarray]:
        """Indices of stamps that may be read together, each stamp once.

        Parameters
        ----------
        batch_size : int, optional
            At most so many; by default up to 128, fewer if stamps are large.
        """
        _, group = np.unique(self._group_keys(), axis=0, return_inverse=True)
        group = np.ravel(group)
        order = np.argsort(group, kind="stable")
        for members in np.split(order, np.cumsum(np.bincount(group))[:-1]):
            step = batch_size or default_batch_size(self.shapes[members[0]])
            for start in range(0, len(members), step):
                yield members[start : start + step]

    def get(self, indices: Any) -> StampBatch:
        """Read stamps of one shape.

        Parameters
        ----------
        indices : array of int, shape (B,)

        Raises
        ------
        ValueError
            If the stamps are of different shapes.
        """
        indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if len(indices) and np.any(self.shapes[indices] != self.shapes[indices[0]]):
            raise ValueError("a batch holds stamps of one shape; ask for them separately")
        cut = self._cut(indices)
        flags = cut.flags.astype(np.int32)
        usable = np.isfinite(cut.data) & ~cut.mask
        sigma = cut.sigma
        if cut.unknown.any():
            sigma, found = _with_estimated_noise(cut, usable)
            flags[cut.unknown] |= FitFlag.NOISE_ESTIMATED
            flags[cut.unknown & ~found & usable.any(axis=(1, 2))] |= FitFlag.FEW_PIXELS
        data, inv_sigma, bad = _weigh(cut.data, sigma, usable)
        flags[bad] |= FitFlag.BAD_UNCERTAINTY

        position = self.position[indices]
        few = (flags & FitFlag.FEW_PIXELS) != 0
        flags[_is_blank(data, inv_sigma) & ~few] |= FitFlag.NO_DATA
        flags[_is_saturated(data, inv_sigma)] |= FitFlag.SATURATED
        psf, bad = self.psfs.get(indices)
        flags[bad] |= FitFlag.BAD_PSF
        return StampBatch(indices, data, inv_sigma, psf, self.origin[indices], position, flags)

    def select(self, indices: np.ndarray) -> StampSource:
        """View of some of the stamps."""
        return _Selection(self, np.asarray(indices))


def default_batch_size(shape: Sequence[int]) -> int:
    """Up to 128 stamps of 64 x 64 pixels, fewer of larger ones."""
    return int(np.clip(2**19 // (int(shape[0]) * int(shape[1])), 1, 128))


class _Selection(StampSource):
    def __init__(self, parent: StampSource, indices: np.ndarray) -> None:
        self._parent, self._indices = parent, indices
        self.shapes, self.origin = parent.shapes[indices], parent.origin[indices]
        self.position, self.ids = parent.position[indices], parent.ids[indices]
        wcs = parent.wcs
        self.wcs = [wcs[i] for i in indices] if isinstance(wcs, list) else wcs
        self.unit, self.psfs, self.name = parent.unit, parent.psfs, parent.name

    def _group_keys(self) -> np.ndarray:
        return self._parent._group_keys()[self._indices]

    def get(self, indices: Any) -> StampBatch:
        indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        return replace(self._parent.get(self._indices[indices]), index=indices)

    def release(self) -> None:
        self._parent.release()


class CubeSource(StampSource):
    """The planes of a cube (N, ny, nx), or one image (ny, nx)."""

    def __init__(self, frame: Frame, *, position: np.ndarray | None, psf: Any) -> None:
        self._frame = frame
        self._single = len(frame.shape) == 2
        n = 1 if self._single else frame.shape[0]
        super().__init__(
            shapes=np.broadcast_to(frame.shape[-2:], (n, 2)),
            position=position,
            unit=frame.unit,
            wcs=_inputs.sky_wcs(frame.wcs),
            psf=PSFSource(
                psf if psf is not None else frame.psf, n, position if self._single else None
            ),
            name=frame.name,
        )

    def _cut(self, indices: np.ndarray) -> _Cut:
        n = len(indices)
        if self._single:
            parts = [a if a is None else a[None] for a in self._frame.cut(...)]
        elif n and np.array_equal(indices, np.arange(indices[0], indices[0] + n)):
            parts = self._frame.cut(slice(int(indices[0]), int(indices[0]) + n))
        else:
            parts = _stack([self._frame.cut(slice(int(i), int(i) + 1)) for i in indices])
        data, sigma, mask = parts
        unknown = np.full(n, sigma is None)
        flags = _outside(self.position[indices], data.shape[1:]) * int(FitFlag.OUTSIDE)
        return _Cut(
            data=data,
            sigma=np.ones_like(data) if sigma is None else sigma,
            mask=mask,
            unknown=unknown,
            sky=np.ones_like(mask),
            flags=flags,
        )

    def release(self) -> None:
        self._frame.release()


def _stack(cuts: list[tuple]) -> tuple:
    data, sigma, mask = zip(*cuts, strict=True)
    sigma = None if sigma[0] is None else np.concatenate(sigma)
    return np.concatenate(data), sigma, np.concatenate(mask)


class ListSource(StampSource):
    """Separate images of any sizes; batches are made of those of one shape.

    Images that are paths are opened when they are needed.
    """

    def __init__(self, items: Sequence, overrides, *, position, psf: Any) -> None:
        self._items, self._overrides = items, overrides
        frames = [self._frame(i) for i in range(len(items))]
        for i, frame in enumerate(frames):
            if len(frame.shape) != 2:
                raise ValueError(f"image {i} of the list is {len(frame.shape)}-D, not 2-D")
        units = [frame.unit for frame in frames]
        self._factors = _common_unit(units)
        wcs = [_inputs.sky_wcs(frame.wcs) for frame in frames]
        self._own_psf = psf is None and any(frame.psf is not None for frame in frames)
        self._has_psf = np.array([frame.psf is not None for frame in frames])
        self._frames = [
            None if isinstance(item, str | os.PathLike) else frame
            for item, frame in zip(items, frames, strict=True)
        ]
        super().__init__(
            shapes=np.array([frame.shape for frame in frames]),
            position=position,
            unit=units[0],
            wcs=wcs if any(w is not None for w in wcs) else None,
            psf=psf,
            name=f"list of {len(items)} images",
        )

    def _frame(self, i: int) -> Frame:
        try:
            frame = _inputs.make_frame(self._items[i])
            return _inputs.add_to_frame(frame, **{k: v[i] for k, v in self._overrides.items()})
        except (ValueError, TypeError) as err:
            raise type(err)(f"image {i} of the list: {err}") from err

    def _group_keys(self) -> np.ndarray:
        keys = super()._group_keys()
        return np.column_stack([keys, self._has_psf]) if self._own_psf else keys

    def _cut(self, indices: np.ndarray) -> _Cut:
        frames = [self._frames[i] or self._frame(i) for i in indices]
        cuts = [frame.cut(...) for frame in frames]
        unknown = np.array([sigma is None for _, sigma, _ in cuts])
        factors = self._factors[indices][:, None, None]
        data = np.stack([c[0] for c in cuts]) * factors
        sigma = np.stack([np.ones(c[0].shape) if c[1] is None else c[1] for c in cuts]) * factors
        mask = np.stack([c[2] for c in cuts])
        flags = _outside(self.position[indices], data.shape[1:]) * int(FitFlag.OUTSIDE)
        return _Cut(data, sigma, mask, unknown, np.ones_like(mask), flags)

    def get(self, indices: Any) -> StampBatch:
        batch = super().get(indices)
        if self._own_psf and self._has_psf[batch.index].any():
            frames = [self._frames[i] or self._frame(i) for i in batch.index]
            batch.psf = [try_psf(frame.psf) for frame in frames]
            bad = np.array([p is None for p in batch.psf]) & self._has_psf[batch.index]
            batch.flags[bad] |= FitFlag.BAD_PSF
        return batch

    def release(self) -> None:
        for frame in self._frames:
            if frame is not None:
                frame.release()


def _common_unit(units: list) -> np.ndarray:
    """Factors that bring images to the unit of the first."""
    factors = []
    for i, unit in enumerate(units):
        if (unit is None) != (units[0] is None):
            raise u.UnitsError(
                f"image 0 is in {units[0] or 'no unit'}, image {i} in {unit or 'no unit'}"
            )
        try:
            factors.append(1.0 if unit is None else unit.to(units[0]))
        except u.UnitConversionError:
            raise u.UnitsError(f"image {i} is in {unit}, which is not {units[0]}") from None
    return np.array(factors, dtype=float)


class FieldSource(StampSource):
    """Stamps cut around positions in one large image.

    Parameters
    ----------
    frame : Frame
        The image, 2-D.
    centers : array, shape (N, 2)
        Positions (x, y) in the image.
    sizes : array of int, shape (N, 2)
        Stamp sizes (ny, nx).
    segmentation : array of int, shape (ny, nx), optional
        Labels; pixels of other labels than the galaxy's own are masked.
    own : array of int, shape (N,), optional
        The label of each galaxy (0: none).
    """

    def __init__(self, frame: Frame, centers, sizes, *, segmentation=None, own=None, psf, ids=None):
        self._frame, self._segmentation, self._own = frame, segmentation, own
        self._outside = _outside(centers, frame.shape) | ~np.isfinite(centers).all(axis=1)
        safe = np.where(self._outside[:, None], 0.0, centers)
        origin = np.floor(safe - (sizes[:, ::-1] - 1) / 2 + 0.5).astype(np.int64)
        origin[self._outside] = 0
        super().__init__(
            shapes=sizes,
            origin=origin,
            position=np.where(self._outside[:, None], np.nan, centers - origin),
            ids=ids,
            unit=frame.unit,
            wcs=_inputs.sky_wcs(frame.wcs),
            psf=PSFSource(psf if psf is not None else frame.psf, len(sizes), centers),
            name=frame.name,
        )

    def _cut(self, indices: np.ndarray) -> _Cut:
        n, (sy, sx) = len(indices), self.shapes[indices[0]] if len(indices) else (1, 1)
        data = np.full((n, sy, sx), np.nan)
        sigma = np.full((n, sy, sx), np.inf)
        mask = np.ones((n, sy, sx), dtype=bool)
        sky = np.ones((n, sy, sx), dtype=bool)
        flags = np.zeros(n, dtype=np.int32)
        height, width = self._frame.shape
        for k, i in enumerate(indices):
            if self._outside[i]:
                flags[k] |= FitFlag.OUTSIDE
                continue
            x0, y0 = (int(v) for v in self.origin[i])
            there = slice(max(y0, 0), min(y0 + sy, height)), slice(max(x0, 0), min(x0 + sx, width))
            here = tuple(
                slice(s.start - o, s.stop - o) for s, o in zip(there, (y0, x0), strict=True)
            )
            if (there[0].stop - there[0].start, there[1].stop - there[1].start) != (sy, sx):
                flags[k] |= FitFlag.EDGE
            data[k][here], part, mask[k][here] = self._frame.cut(there)
            if part is not None:
                sigma[k][here] = part
            if self._segmentation is not None:
                labels = self._segmentation[there]
                mask[k][here] |= (labels != 0) & (labels != self._own[i])
                sky[k][here] = labels == 0
        unknown = np.full(n, self._frame.uncertainty is None)
        return _Cut(data, sigma, mask, unknown, sky, flags)


def _outside(position: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Which positions (x, y) are off an image of a shape (ny, nx); NaN is not."""
    limit = np.array([shape[-1], shape[-2]]) - 0.5
    with np.errstate(invalid="ignore"):
        return np.any((position < -0.5) | (position > limit), axis=1)


# -- pixels --------------------------------------------------------------------------------


def _with_estimated_noise(cut: _Cut, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sigma with the noise of each stamp where none was given; and where that worked."""
    sigma = np.array(cut.sigma, dtype=float)
    found = np.ones(len(sigma), dtype=bool)
    for k in np.flatnonzero(cut.unknown):
        blank = ~usable[k] | ~cut.sky[k]
        if (~blank).sum() < MIN_PIXELS:  # the galaxy's segment fills the stamp
            blank = ~usable[k]
        noise = estimate_noise(cut.data[k], mask=blank)
        found[k] = np.isfinite(noise)
        if noise > 0:
            # An image made without noise still has that of single-precision numbers.
            noise = max(noise, 2.0**-24 * np.abs(cut.data[k][usable[k]]).max())
        sigma[k] = noise if noise > 0 else np.inf
    return sigma, found


def _weigh(data, sigma, usable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data and inverse sigma with zeros in unusable pixels; and which stamps had a bad sigma."""
    with np.errstate(all="ignore"):
        inv_sigma = 1 / np.where(sigma > 0, sigma, np.inf)
        # Numbers whose squares are not representable are not measurements either.
        sane = np.isfinite((data * inv_sigma) ** 2) & np.isfinite(inv_sigma**2)
    bad = usable & (~(sigma > 0) | ~sane)
    keep = usable & ~bad & (inv_sigma > 0)
    return (
        np.where(keep, data, 0.0),
        np.where(keep, inv_sigma, 0.0),
        bad.any(axis=(1, 2)),
    )


def _is_blank(data: np.ndarray, inv_sigma: np.ndarray) -> np.ndarray:
    """No usable pixel, or all of them (several) of one value: nothing was observed."""
    used = inv_sigma > 0
    count = used.sum(axis=(1, 2))
    low = np.where(used, data, np.inf).min(axis=(1, 2))
    high = np.where(used, data, -np.inf).max(axis=(1, 2))
    return (count == 0) | ((count > 1) & (low == high))


def _is_saturated(data: np.ndarray, inv_sigma: np.ndarray) -> np.ndarray:
    """Whether the brightest pixels form a plateau of exactly one value.

    Five connected pixels, as four are met in noiseless images that are
    centred on a corner of a pixel; and ten times brighter than the noise, as small counts
    repeat.
    """
    top = data.max(axis=(1, 2), keepdims=True)
    plateau = (data == top) & (data * inv_sigma > 10)
    saturated = plateau.sum(axis=(1, 2)) >= _PLATEAU
    if saturated.any():
        from scipy.ndimage import label

        for k in np.flatnonzero(saturated):
            saturated[k] = np.bincount(label(plateau[k])[0].ravel())[1:].max() >= _PLATEAU
    return saturated


# -- which source --------------------------------------------------------------------------


def make_source(
    images: Any,
    *,
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    positions: Any = None,
    size: Any = None,
    segmentation: Any = None,
) -> StampSource:
    """The stamps that the arguments of `galmorph.fit_images` describe."""
    if isinstance(images, StampSource):
        return images
    if _is_list_of_images(images):
        if size is not None or segmentation is not None:
            raise ValueError("size and segmentation cut one image; a list holds stamps already")
        overrides = {
            name: _one_each(values, len(images), name)
            for name, values in (("uncertainty", uncertainty), ("mask", mask))
            if values is not None
        }
        position = _guesses(positions, len(images))
        return ListSource(list(images), overrides, position=position, psf=psf)
    frame = _inputs.add_to_frame(_inputs.make_frame(images), uncertainty=uncertainty, mask=mask)
    if len(frame.shape) == 3:
        if size is not None or segmentation is not None:
            raise ValueError("size and segmentation cut one 2-D image; this is a cube of stamps")
        return CubeSource(frame, position=_guesses(positions, frame.shape[0]), psf=psf)
    if positions is None and segmentation is None:
        if size is not None:
            raise ValueError("size cuts stamps at positions: give positions or a segmentation")
        return CubeSource(frame, position=None, psf=psf)
    return _field_source(frame, positions, size, segmentation, psf)


def _is_list_of_images(images: Any) -> bool:
    if not isinstance(images, list | tuple) or isinstance(images, fits.HDUList):
        return False
    if len(images) == 0:
        raise ValueError("the list of images is empty")
    plain = (list, tuple, int, float, np.number)
    return not all(isinstance(item, plain) for item in images)


def _one_each(values: Any, n: int, name: str) -> Sequence:
    if isinstance(values, list | tuple):
        if len(values) != n:
            raise ValueError(f"there are {len(values)} {name}s for {n} images")
        return values
    if isinstance(values, np.ndarray) and values.ndim == 3:
        if len(values) != n:
            raise ValueError(f"there are {len(values)} {name}s for {n} images")
        return values
    return [values] * n


def _guesses(positions: Any, n: int) -> np.ndarray | None:
    """First guesses for stand-alone stamps."""
    if positions is None:
        return None
    xy, _ = _inputs.parse_positions(positions)
    if len(xy) != n:
        raise ValueError(f"there are {len(xy)} positions for {n} stamps")
    return np.where(np.isfinite(xy).all(axis=1, keepdims=True), xy, np.nan)


def _field_source(frame: Frame, positions, size, segmentation, psf) -> StampSource:
    labels = own = None
    shape = frame.shape
    wcs = _inputs.sky_wcs(frame.wcs)
    if segmentation is not None:
        segmentation = _inputs.parse_segmentation(segmentation, shape)
        numbers, boxes, centroids = _segments(segmentation, frame)
    if positions is None:
        if len(numbers) == 0:
            raise ValueError("the segmentation holds no segment")
        xy, labels = centroids, numbers
    else:
        xy, labels = _inputs.parse_positions(positions, wcs)
    if segmentation is not None:
        own = _labels_at(segmentation, xy, labels, numbers)
    if size is not None:
        sizes = np.tile(_inputs.parse_size(size, shape), (len(xy), 1))
    elif segmentation is not None:
        boxes = dict(zip(numbers.tolist(), boxes, strict=True))
        sizes = np.array([_side(boxes.get(label, 1), shape) for label in own.tolist()])
        sizes = np.repeat(sizes[:, None], 2, axis=1)
    elif hasattr(positions, "bbox"):  # a photutils.SourceCatalog knows its segments' extent
        sides = [_side(max(box.shape), shape) for box in np.atleast_1d(positions.bbox)]
        sizes = np.repeat(np.array(sides)[:, None], 2, axis=1)
    elif len(xy) == 1:  # one image, one galaxy: the position is a first guess
        return CubeSource(frame, position=np.where(np.isfinite(xy), xy, -np.inf), psf=psf)
    else:
        raise ValueError("size is needed to cut stamps at positions (or give a segmentation)")
    return FieldSource(frame, xy, sizes, segmentation=segmentation, own=own, psf=psf, ids=labels)


def _side(extent: int, shape: Sequence[int]) -> int:
    """Odd side of a stamp for a segment whose bounding box has a longer side ``extent``."""
    wanted = _SEGMENT_FACTOR * extent
    side = int(_SIDES[np.searchsorted(_SIDES, wanted)]) if wanted <= _SIDES[-1] else int(wanted)
    return min(side, 2 * min(shape[0], shape[1]) + 1) | 1


def _segments(segmentation: np.ndarray, frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, longer sides of their bounding boxes, and centroids (x, y) of segments."""
    from scipy.ndimage import find_objects

    numbers, extents, centroids = [], [], []
    for number, box in enumerate(find_objects(np.maximum(segmentation, 0)), start=1):
        if box is None:
            continue
        inside = segmentation[box] == number
        data, _, mask = frame.cut(box)
        light = np.where(inside & ~mask & np.isfinite(data), np.maximum(data, 0), 0.0)
        if not 0 < light.sum() < np.inf:
            light = inside.astype(float)
        y, x = (np.arange(s.start, s.stop) for s in box)
        total = light.sum()
        numbers.append(number)
        extents.append(max(inside.shape))
        centroids.append((light.sum(axis=0) @ x / total, light.sum(axis=1) @ y / total))
    return (
        np.array(numbers, dtype=np.int64),
        np.array(extents, dtype=np.int64),
        np.array(centroids, dtype=float).reshape(-1, 2),
    )


def _labels_at(segmentation, xy, labels, numbers) -> np.ndarray:
    """Own segment of each position: the label that came with it, or the one it lies on."""
    if labels is not None and np.isin(labels, numbers).all():
        return labels
    if labels is not None:
        warnings.warn(
            "the labels of the positions are not those of the segmentation; "
            "each galaxy's segment is looked up at its position",
            AstropyUserWarning,
            stacklevel=2,
        )
    off = _outside(xy, segmentation.shape) | ~np.isfinite(xy).all(axis=1)
    safe = np.where(off[:, None], 0, xy)
    x, y = np.floor(safe + 0.5).astype(np.int64).T
    x, y = np.minimum(x, segmentation.shape[1] - 1), np.minimum(y, segmentation.shape[0] - 1)
    return np.where(off, 0, segmentation[y, x])
