"""Stamps of galaxies, read from disk in mini-batches: any number of them in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._inputs import _split_uncertainty
from ..psf import PSF
from ._readers import UnusableStampError, open_companion, open_stamps

if TYPE_CHECKING:
    import torch

__all__ = ["StampDataset", "TrainingBatch", "stream"]

_KINDS = ("std", "var", "ivar")


@dataclass
class TrainingBatch:
    """Stamps that are trained on together, as tensors.

    Attributes
    ----------
    images : Tensor, shape (B, ny, nx)
        Pixel values, float32; 0 where masked.
    weight : Tensor, shape (B, ny, nx), or None
        1/σ of each pixel, 0 where masked.  Where the noise is not known
        (``noise_known`` is False) it is 1 at every pixel that is not masked.
        None if the noise is not known and no pixel is masked.
    psf : Tensor, shape (B, ky, kx), or None
        Effective PSFs at pixel steps, each of sum 1.
    index : Tensor of int64, shape (B,)
        Which stamps of the data set these are.
    noise_known : bool
        Whether ``weight`` is 1/σ, or only says which pixels are masked.
    condition : Tensor, shape (B, C), or None
        What is known of the galaxies beside their images, in its own units; NaN where missing.
    condition_names : tuple of str or None
        Of the columns of ``condition``, if they have names.
    """

    images: torch.Tensor
    weight: torch.Tensor | None = None
    psf: torch.Tensor | None = None
    index: torch.Tensor | None = None
    noise_known: bool = True
    condition: torch.Tensor | None = None
    condition_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on another device.

        Parameters
        ----------
        device : torch.device or str
            As "cpu" or "cuda".

        Returns
        -------
        TrainingBatch
            A new batch (of the same tensors where they are there already).
        """
        moved = {
            name: None if (tensor := getattr(self, name)) is None else _move(tensor, device)
            for name in ("images", "weight", "psf", "index", "condition")
        }
        return replace(self, **moved)


def _move(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    import torch

    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -- the data set ------------------------------------------------------------------------


@dataclass
class Loaded:
    """What was read of some stamps: arrays of the good ones, and why the others are not."""

    index: np.ndarray
    images: np.ndarray
    weight: np.ndarray | None
    psf: np.ndarray | None
    noise_known: bool
    skipped: dict[int, str] = field(default_factory=dict)
    condition: np.ndarray | None = None
    condition_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def tensors(self) -> TrainingBatch:
        """The same as a batch of tensors on the CPU."""
        import torch

        weight, psf, condition = (
            None if a is None else torch.from_numpy(a)
            for a in (self.weight, self.psf, self.condition)
        )
        return TrainingBatch(
            torch.from_numpy(self.images),
            weight,
            psf,
            torch.from_numpy(self.index),
            noise_known=self.noise_known,
            condition=condition,
            condition_names=self.condition_names,
        )


class StampDataset:
    """Stamps of galaxies with what is known of their pixels, left on disk until asked for.

    Every argument may be an array (N, ny, nx), in memory or mapped; the path
    of a FITS cube (``"cube.fits"`` or ``"cube.fits[SCI]"``, also
    tile-compressed), of a ``.npy`` file, of an HDF5 file (``"file.h5[name]"``,
    or the pair ``("file.h5", "name")``) or of a folder of FITS stamps; or any
    object with ``__len__`` and ``__getitem__`` that gives stamps (arrays,
    NDData, paths).  Uncertainty, mask and PSF that are in the FITS files or
    NDData of the images are used too, unless they are given here.

    Parameters
    ----------
    images : array-like, path or sequence
        The stamps.
    uncertainty : as ``images``, or float, or shape (N,) or (ny, nx), optional
        Noise of the pixels in the unit of the images.  NDData uncertainties
        say themselves what they are.
    uncertainty_type : {"std", "var", "ivar"}, optional
        Whether ``uncertainty`` holds standard deviations, variances or
        inverse variances.
    mask : as ``images``, or shape (ny, nx), optional
        Pixels that are not 0 or False are bad.
    psf : as ``images``, or `~galmorph.PSF`, or shape (ky, kx), optional
        Effective PSFs at pixel steps.
    conditions : array-like (N,) or (N, C), Table, dict of columns, or path, optional
        What is known of the galaxies beside their images.  Masked and NaN values are
        missing.  Columns that are not numbers are left out; units are not looked at.
    shape : tuple of int, optional
        Cut larger stamps about their centre to (ny, nx), and surround smaller
        ones with masked pixels.  By default the shape of the first good
        stamp; those of another shape are skipped.

    Attributes
    ----------
    shape : tuple of int
        (ny, nx) of the stamps.
    psf_shape : tuple of int or None
        (ky, kx) of the PSFs, None if there are none.
    noise_known : bool
        Whether the noise of the pixels is known.
    conditions : ndarray of float32, shape (N, C), or None
        What is known beside the images, NaN where missing.
    condition_names : tuple of str or None
        Names of its columns, if they have any.
    first : int
        The first stamp that is good.

    Raises
    ------
    TypeError, ValueError, OSError
        If an argument is none of the kinds above, cannot be opened, does not
        hold as many stamps as the others, or not one stamp can be used.

    Notes
    -----
    A stamp is skipped if it cannot be read, if not one of its pixels is
    finite, unmasked and of finite noise, or if it has another shape, no
    noise or no PSF while the first good one has.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.training import StampDataset
    >>> images = np.ones((5, 8, 8))
    >>> images[2] = np.nan
    >>> images[3, 0, 0] = np.nan
    >>> data = StampDataset(images, uncertainty=0.5)
    >>> len(data), data.shape
    (5, (8, 8))
    >>> batch, skipped = data.batch([1, 2, 3])
    >>> batch.index.tolist(), batch.weight[:, 0, 0].tolist()
    ([1, 3], [2.0, 0.0])
    >>> skipped
    {2: 'no usable pixels'}
    """

    def __init__(
        self,
        images: Any,
        *,
        uncertainty: Any = None,
        uncertainty_type: str = "std",
        mask: Any = None,
        psf: Any = None,
        conditions: Any = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if uncertainty_type not in _KINDS:
            raise ValueError(
                f"uncertainty_type must be one of {', '.join(_KINDS)}, not {uncertainty_type!r}"
            )
        self._kind = uncertainty_type
        self._sigma = self._mask = self._psf = None
        self._images = open_stamps(images, "images")
        try:
            if uncertainty is not None:
                if hasattr(uncertainty, "uncertainty_type"):  # of astropy.nddata
                    uncertainty, self._kind, _ = _split_uncertainty(uncertainty)
                self._sigma = open_companion(uncertainty, self._images, "uncertainty", scalar=True)
            if mask is not None:
                self._mask = open_companion(mask, self._images, "mask")
            if psf is not None:
                self._psf = open_companion(psf, self._images, "psf")
            self.condition_names, self.conditions = self._read_conditions(conditions)
            self.shape = None if shape is None else _check_shape(shape)
            self._reshapes = shape is not None
            self.psf_shape: tuple[int, int] | None = None
            self.noise_known = False
            self.first = self._find_first()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._images)

    def __enter__(self) -> StampDataset:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open; they are opened again when they are needed."""
        for reader in self._readers():
            reader.close()

    def _readers(self) -> list[Any]:
        return [r for r in (self._images, self._sigma, self._mask, self._psf) if r is not None]

    def _read_conditions(self, conditions: Any) -> tuple[Any, np.ndarray | None]:
        if conditions is None:
            return None, None
        from ..nets.conditions import condition_columns

        try:
            names, values = condition_columns(conditions)
        except (TypeError, ValueError, OSError) as error:
            raise type(error)(f"conditions: {error}") from None
        if len(values) != len(self):
            raise ValueError(f"conditions holds {len(values)} rows, images holds {len(self)}")
        return names, values

    def _find_first(self) -> int:
        """The first good stamp, which tells the shape of all."""
        reason = ""
        for i in range(len(self)):
            try:
                data, _, psf, known = self._read(i)
            except Exception as error:
                reason = reason or f"stamp {i}: {_reason(error)}"
                continue
            self.shape = data.shape
            self.psf_shape = None if psf is None else psf.shape
            self.noise_known = known
            return i
        raise ValueError(f"images: not one of {len(self)} stamps can be used ({reason})")

    def _read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]:
        """Image, weight (1 where usable if the noise is unknown), PSF, and if it is known."""
        stamp = self._images[i]
        data = np.asarray(stamp.data, dtype=float)
        bad = ~np.isfinite(data)
        if stamp.mask is not None:
            bad |= stamp.mask
        if self._mask is not None:
            flags = self._companion(self._mask, i, data.shape, "mask")
            bad |= flags != 0  # NaN too is not 0
        if self._sigma is not None:
            values = self._companion(self._sigma, i, data.shape, "uncertainty")
            weight = _one_over_sigma(values, self._kind)
        elif stamp.sigma is not None:
            weight = _one_over_sigma(stamp.sigma, "std")
        else:
            weight = None
        known = weight is not None
        weight = np.where(bad, 0.0, 1.0 if weight is None else weight).astype(np.float32)
        data = np.where(bad, 0.0, data).astype(np.float32)
        usable = np.isfinite(data) & np.isfinite(weight) & (weight > 0)
        data, weight = np.where(usable, data, 0), np.where(usable, weight, 0)
        if self._reshapes:
            data, weight = (_cut_or_pad(a, self.shape) for a in (data, weight))
        elif self.shape is not None and data.shape != self.shape:
            raise UnusableStampError(f"shape {data.shape}, not {self.shape}")
        if not weight.any():
            raise UnusableStampError("no usable pixels")
        return data, weight, self._read_psf(i, stamp.psf), known

    def _companion(self, reader: Any, i: int, shape: tuple[int, ...], name: str) -> np.ndarray:
        values = np.asarray(reader[i].data)
        if values.size != 1 and values.shape != shape:
            raise UnusableStampError(f"{name} of shape {values.shape}, image of {shape}")
        return values

    def _read_psf(self, i: int, own: np.ndarray | None) -> np.ndarray | None:
        psf = own if self._psf is None else self._psf[i].data
        if psf is None:
            return None
        return PSF(psf).data.astype(np.float32)

    def _checked(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """One stamp that is like the first."""
        data, weight, psf, known = self._read(i)
        if self.noise_known and not known:
            raise UnusableStampError("no uncertainty, while other stamps have one")
        if known and not self.noise_known:
            weight = np.where(weight > 0, np.float32(1), np.float32(0))
        if self.psf_shape is None:
            return data, weight, None
        if psf is None:
            raise UnusableStampError("no PSF, while other stamps have one")
        if psf.shape != self.psf_shape:
            raise UnusableStampError(f"PSF of shape {psf.shape}, not {self.psf_shape}")
        return data, weight, psf

    def load(self, indices: Sequence[int]) -> Loaded:
        """Read some stamps, in the order given, as arrays; those that are bad are left out.

        Parameters
        ----------
        indices : sequence of int
            Which stamps.

        Returns
        -------
        Loaded
            Their arrays, as in `TrainingBatch`, and the reasons of those left out.
        """
        good, rows, skipped = [], [], {}
        for i in map(int, indices):
            try:
                rows.append(self._checked(i))
                good.append(i)
            except Exception as error:  # whatever a file or the user's object may raise
                skipped[i] = _reason(error)
        for reader in self._readers():
            reader.release()
        if rows:
            images, weight = (np.stack([row[k] for row in rows]) for k in (0, 1))
            psf = None if self.psf_shape is None else np.stack([row[2] for row in rows])
        else:
            images = weight = np.zeros((0, *self.shape), dtype=np.float32)
            psf = None
        if not self.noise_known and weight.all():
            weight = None
        index = np.array(good, dtype=np.int64)
        condition = None if self.conditions is None else self.conditions[index]
        return Loaded(index, images, weight, psf, self.noise_known, skipped, condition,
                      self.condition_names)  # fmt: skip

    def batch(self, indices: Sequence[int]) -> tuple[TrainingBatch, dict[int, str]]:
        """Read some stamps as tensors.

        Parameters
        ----------
        indices : sequence of int
            Which stamps.

        Returns
        -------
        TrainingBatch
            The good ones, in the order given.
        dict of int to str
            Why the others were left out.
        """
        loaded = self.load(indices)
        return loaded.tensors(), loaded.skipped


def _check_shape(shape: Any) -> tuple[int, int]:
    values = np.asarray(shape)
    if values.shape != (2,) or values.dtype.kind not in "iu" or np.any(values < 1):
        raise ValueError(f"shape must be two positive integers (ny, nx), not {shape!r}")
    return int(values[0]), int(values[1])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _one_over_sigma(values: np.ndarray, kind: str) -> np.ndarray:
    """1/σ, and 0 where the noise makes no sense or has no weight."""
    values = np.asarray(values, dtype=float)
    with np.errstate(all="ignore"):
        weight = {
            "std": lambda: 1 / values,
            "var": lambda: values**-0.5,
            "ivar": lambda: values**0.5,
        }
        found = weight[kind]()
    return np.where(np.isfinite(found) & (values > 0), found, 0.0)


def _cut_or_pad(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The middle of an array, with zeros where it has nothing."""
    out = np.zeros(shape, dtype=array.dtype)
    source, target = [], []
    for have, want in zip(array.shape, shape, strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        target.append(slice((want - n) // 2, (want - n) // 2 + n))
    out[tuple(target)] = array[tuple(source)]
    return out


def stream(data: StampDataset, chunks: Iterable[Sequence[int]]) -> Iterator[Loaded]:
    """Read mini-batches one ahead of their use, in a thread.

    Parameters
    ----------
    data : StampDataset
        The stamps.
    chunks : iterable of sequences of int
        Which stamps make each batch.

    Yields
    ------
    Loaded
        The batches in order.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.training import StampDataset, stream
    >>> data = StampDataset(np.ones((5, 8, 8)))
    >>> [batch.index.tolist() for batch in stream(data, [[0, 3], [1, 2]])]
    [[0, 3], [1, 2]]
    """
    with ThreadPoolExecutor(1, thread_name_prefix="galmorph-stamps") as pool:
        ahead = None
        for chunk in chunks:
            ready, ahead = ahead, pool.submit(data.load, chunk)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()
