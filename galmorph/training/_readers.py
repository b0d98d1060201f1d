"""One stamp at a time of whatever the user gave: arrays, cubes, folders, HDF5, sequences."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._inputs import FitsArray, Frame, make_frame
from ..psf import PSF

__all__ = ["UnusableStampError", "open_companion", "open_stamps"]

#: Files of a folder that are taken as stamps.
SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fits.fz")


class UnusableStampError(ValueError):
    """A stamp that cannot be trained on; the text says why."""


class _OpenFits:
    """A cube in a FITS file that is opened once and read stamp by stamp.

    `FitsArray` opens the file at each access, which is dear in a training
    loop that comes back for every stamp in every epoch.
    """

    def __init__(self, lazy: FitsArray) -> None:
        self._lazy = lazy
        self.shape, self.dtype = lazy.shape, lazy.dtype
        self._hdus = None

    def __getitem__(self, key) -> np.ndarray:
        if self._hdus is None:
            from astropy.io import fits

            self._hdus = fits.open(self._lazy.path, memmap=False)
        return np.asarray(self._hdus[self._lazy.extension].section[key])

    def close(self) -> None:
        if self._hdus is not None:
            self._hdus.close()
            self._hdus = None

    def __del__(self) -> None:
        self.close()  # of a data set that nobody has closed


@dataclass
class _Stamp:
    """What one reader knows of one galaxy."""

    data: np.ndarray
    sigma: np.ndarray | None = None
    mask: np.ndarray | None = None
    psf: Any = None


class _Cube:
    """Stamps along the first axis of an array in memory or on disk."""

    def __init__(self, frame: Frame, file: Any = None) -> None:
        arrays = {
            name: _OpenFits(array) if isinstance(array, FitsArray) else array
            for name in ("data", "uncertainty", "weight")
            if (array := getattr(frame, name)) is not None
        }
        masks = tuple(_OpenFits(m) if isinstance(m, FitsArray) else m for m in frame.masks)
        self._frame = replace(frame, **arrays, masks=masks)
        self._open = [a for a in (*arrays.values(), *masks) if isinstance(a, _OpenFits)]
        if file is not None:
            self._open.append(file)
        self._psf = frame.psf
        if self._psf is not None:
            # of an HDU the samples and, in its header, how they were taken
            array = np.asarray(getattr(self._psf, "data", self._psf))
            self._psf = list(array) if array.ndim == 3 else _plain_psf(self._psf)

    def __len__(self) -> int:
        return self._frame.shape[0]

    def __getitem__(self, i: int) -> _Stamp:
        data, sigma, mask = self._frame.cut(slice(i, i + 1))
        psf = self._psf[i] if isinstance(self._psf, list) else self._psf
        return _Stamp(data[0], None if sigma is None else sigma[0], mask[0], psf)

    def release(self) -> None:
        self._frame.release()

    def close(self) -> None:
        for file in self._open:
            file.close()


class _Items:
    """Stamps that are objects of a sequence: arrays, NDData, paths of FITS files …"""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> _Stamp:
        item = self._items[i]
        if isinstance(item, PSF):
            return _Stamp(_plain_psf(item))
        if hasattr(item, "detach"):  # a tensor
            item = item.detach().cpu().numpy()
        frame = make_frame(item)
        if len(frame.shape) != 2:
            raise UnusableStampError(f"a stamp must be (ny, nx), not of shape {frame.shape}")
        data, sigma, mask = frame.cut(slice(None))
        psf = None if frame.psf is None else _plain_psf(frame.psf)
        return _Stamp(data, sigma, mask, psf)

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Folder(_Items):
    """The FITS files of a folder, in the order of their names."""

    def __init__(self, path: str) -> None:
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(SUFFIXES))
        if not names:
            raise ValueError(f"{path}: the folder holds no FITS files ({', '.join(SUFFIXES)})")
        self.path, self.names = path, names
        super().__init__(names)

    def __getitem__(self, i: int) -> _Stamp:
        path = os.path.join(self.path, self.names[i])
        return _Items([path])[0]

    def in_order_of(self, other: _Folder) -> None:
        """Take the order of another folder's names, where all of them are here too."""
        if set(other.names) <= set(self.names):
            self.names = self._items = other.names


class _Same:
    """One value or image for all stamps."""

    def __init__(self, data: np.ndarray, n: int) -> None:
        self._stamp, self._n = _Stamp(data), n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> _Stamp:
        return self._stamp

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def _plain_psf(psf: Any) -> np.ndarray:
    """Samples of an effective PSF at pixel steps, of sum 1."""
    psf = PSF.from_any(psf)
    if psf.oversampling != 1 or not psf.includes_pixel:
        raise ValueError(
            "training needs effective PSFs at pixel steps, not one with "
            f"oversampling={psf.oversampling}, includes_pixel={psf.includes_pixel}"
        )
    return psf.data


def open_stamps(obj: Any, name: str) -> Any:
    """Reader of a collection of stamps."""
    if isinstance(obj, (str, os.PathLike)):
        return _open_path(os.fspath(obj), name)
    if isinstance(obj, tuple) and len(obj) == 2 and all(isinstance(o, (str, Path)) for o in obj):
        return _open_hdf5(os.fspath(obj[0]), str(obj[1]), name)
    if obj is None or isinstance(obj, (bytes, dict, set)):
        raise TypeError(f"{name} cannot be {type(obj).__name__}")
    if hasattr(obj, "detach"):
        obj = obj.detach().cpu().numpy()
    if hasattr(obj, "shape") or not (hasattr(obj, "__len__") and hasattr(obj, "__getitem__")):
        return _open_cube(obj, name)
    if hasattr(obj, "uncertainty") or hasattr(obj, "header"):  # NDData, a single HDU
        return _open_cube(obj, name)
    if len(obj) == 0:
        raise ValueError(f"{name} is empty")
    return _Items(obj)


def _open_cube(obj: Any, name: str, file: Any = None) -> _Cube:
    try:
        frame = make_frame(obj)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if len(frame.shape) != 3:
        raise ValueError(f"{name} must be stamps (N, ny, nx), not an array of {frame.shape}")
    return _Cube(frame, file)


def _open_path(path: str, name: str) -> Any:
    if os.path.isdir(path):
        return _Folder(path)
    match = re.fullmatch(r"(.+\.(?:h5|hdf5|hdf))(?:\[(.+)\])?", path, re.IGNORECASE)
    if match:
        return _open_hdf5(match[1], match[2], name)
    if path.endswith(".npy"):
        try:
            return _open_cube(np.load(path, mmap_mode="r", allow_pickle=False), name)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name}: {path}: no such file or folder") from None
    if not os.path.exists(path) and not re.search(r"\[[^\]]+\]$", path):
        raise FileNotFoundError(f"{name}: {path}: no such file or folder")
    return _open_cube(path, name)


def _open_hdf5(path: str, dataset: str | None, name: str) -> _Cube:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{name}: {path}: reading HDF5 needs h5py (pip install h5py)") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: {path}: no such file")
    file = h5py.File(path, "r")
    try:
        found: list[str] = []
        file.visititems(
            lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None
        )
        if dataset is None:
            cubes = [key for key in found if file[key].ndim == 3]
            if len(cubes) != 1:
                raise ValueError(
                    f"{name}: {path} holds {len(cubes)} cubes; say which, as {path}[NAME] "
                    f"(data sets: {', '.join(found) or 'none'})"
                )
            dataset = cubes[0]
        if dataset.strip("/") not in found:
            raise ValueError(
                f"{name}: {path} has no data set {dataset!r} (it has: {', '.join(found) or 'none'})"
            )
        if file[dataset].ndim == 1:
            values = file[dataset][...]
            file.close()
            return _Cube(Frame(values[:, None, None]))
        return _open_cube(file[dataset], name, file)
    except BaseException:
        file.close()
        raise


def open_companion(obj: Any, images: Any, name: str, *, scalar: bool = False) -> Any:
    """Reader of what belongs to the images, one of it for each or one for all."""
    n = len(images)
    if scalar and np.ndim(obj) == 0 and isinstance(obj, (int, float, np.number)):
        return _Same(np.asarray(float(obj)), n)
    if isinstance(obj, PSF):
        return _Same(_plain_psf(obj), n)
    shape = getattr(obj, "shape", None)
    if shape is not None and not hasattr(obj, "detach"):
        if len(shape) == 1 and scalar:
            obj = np.asarray(obj, dtype=float)[:, None, None]
        elif len(shape) == 2:
            return _Same(np.asarray(make_frame(obj).data), n)
    elif isinstance(obj, (str, os.PathLike)) and not os.path.isdir(obj):
        single = _single_image(os.fspath(obj))
        if single is not None:
            return _Same(single, n)
    reader = open_stamps(obj, name)
    if isinstance(reader, _Folder) and isinstance(images, _Folder):
        reader.in_order_of(images)
    if len(reader) != n:
        count = len(reader)
        reader.close()
        raise ValueError(f"{name} holds {count} stamps, images holds {n}")
    return reader


def _single_image(path: str) -> np.ndarray | None:
    """The image of a file that holds one image (ny, nx), None if it holds something else."""
    if re.search(r"\.(npy|h5|hdf5|hdf)(\[.+\])?$", path, re.IGNORECASE):
        if path.endswith(".npy") and os.path.isfile(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return np.array(array) if array.ndim == 2 else None
        return None
    frame = make_frame(path)
    return np.array(frame.data[...]) if len(frame.shape) == 2 else None
