"""Fit every galaxy of any kind of image: the one call that most users need."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from astropy.modeling.core import Model
from astropy.utils.exceptions import AstropyUserWarning

from galmorph._checkpoint import Checkpoint, network_digest
from galmorph._stamps import StampBatch, StampSource, make_source
from galmorph.flags import FitFlag
from galmorph.noise import GaussianNoise
from galmorph.results import BACKGROUND_TERMS, FitResult, held_out_pixels

__all__ = ["StampBatch", "StampSource", "fit_images", "stamp_source"]

#: What a row gets whose fit raised an exception.
_CRASHED = FitFlag.NOT_CONVERGED | FitFlag.BAD_COVARIANCE
#: What is kept of every galaxy's fit: the fields of a StampFits.
_FIELDS = (
    "params",
    "cov",
    "background",
    "background_cov",
    "chi2",
    "dof",
    "n_iter",
    "flags",
)


def fit_images(
    images: Any,
    model: Model,
    fitter: Any = None,
    *,
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    positions: Any = None,
    size: int | tuple[int, int] | None = None,
    segmentation: Any = None,
    background: str = "none",
    progress: bool | Callable[[int, int], None] = False,
    batch_size: int | None = None,
    checkpoint: Any = None,
    held_out: float | None = None,
    held_out_seed: int = 0,
) -> FitResult:
    """Fit a model to every galaxy.

    Stamps are read and fitted a batch at a time, so that a memory-mapped cube
    or a FITS file may be larger than the memory.  A galaxy that cannot be
    fitted gets a row of NaN and a flag (see `FitFlag`), and the others are
    not touched by it; an exception means that the whole call makes no sense.

    Parameters
    ----------
    images : array, Quantity, NDData, HDU, HDUList, path, or a list of these
        One image (ny, nx) of one galaxy; a cube (N, ny, nx) of stamps; a list
        of images of any sizes, one galaxy each; or, with ``positions`` or
        ``segmentation``, a large image of which stamps are cut.  Uncertainty
        (of any kind), mask, unit, WCS and PSF of an `~astropy.nddata.NDData`
        are used.  Of a FITS file (``'image.fits'``, or one extension of it,
        ``'image.fits[SCI,2]'``) the science image is the first extension named
        SCI, SCIENCE, IMAGE, DATA or FLUX, or else the first image; with the
        same EXTVER, ERR (ERROR, UNCERT, SIGMA, STD, RMS, NOISE) is taken as
        its standard deviation, else VAR as variance, else IVAR as inverse
        variance; pixels are bad where MASK, DQ or FLAGS is not zero (bit 0 of
        JWST's and Roman's DQ) and where WHT or WEIGHT is not positive (its
        scale differs between surveys, so it is no uncertainty); PSF or
        PSFIMAGE is the PSF, and BUNIT the unit.
    model : `~astropy.modeling.Model`
        What to fit, for example ``SersicGalaxy2D()``; its bounds and its
        fixed and tied parameters hold.  Its values need be no good guess.
    fitter : fitter with a method ``fit_stamps``, optional
        By default ``MAPFitter()``.
    uncertainty : float, array, Quantity or NDUncertainty, optional
        Standard deviation of the pixels (a plain number has the unit of the
        images); of the images' shape, (ny, nx) for all, or a list.  It takes
        the place of what the images bring.  If there is none, the noise is
        estimated from the outskirts of each stamp (`estimate_noise`; photon
        noise of the galaxy is not in it) and the galaxy is flagged so.
        Pixels with an uncertainty of zero, below zero or NaN are not used.
    mask : array of bool, optional
        True where a pixel is bad; beside the images' own.
    psf : object, optional
        Anything that `PSF.from_any` takes, or N of them (a list, or an array
        (N, ky, kx)).  By default the images' own, or else the model's.
    positions : optional
        (N, 2) array of (x, y), Quantity in pixels, `~astropy.coordinates.SkyCoord`,
        table with columns x_0/y_0, x_centroid/y_centroid, x_fit/y_fit, x/y …
        or ra/dec, or `photutils.segmentation.SourceCatalog`.  For a cube or a
        list: first guesses, in pixels of the stamps.
    size : int or (ny, nx), optional
        Size of the stamps cut at ``positions``.  By default 2.5 times the
        bounding box of the segment, at least 25 pixels, odd.
    segmentation : `~photutils.segmentation.SegmentationImage` or array of int, optional
        Pixels of other segments than the galaxy's own are masked.  Without
        ``positions``, every segment is fitted.
    background : {'none', 'constant', 'tilted'}, optional
        Background under each galaxy, fitted and marginalised.  By default the sky is
        taken to be subtracted already; one that must be fitted costs a third of the
        precision of flux and radius on stamps of ten radii.
    progress : bool or callable, optional
        True: a progress bar on the standard error; a callable gets
        ``(n_done, n_total)`` after each batch.
    batch_size : int, optional
        Stamps per batch; by default up to 128, fewer if they are large.
    checkpoint : path, optional
        File in which finished batches are kept.  The same call goes on where
        it was stopped, and returns at once when it was finished.
    held_out : float, optional
        Fraction of the pixels, chosen at random, that are not fitted, so that models can be
        judged on them (`FitResult.held_out_mask`).  The same for every model with the same seed.
    held_out_seed : int, optional

    Returns
    -------
    FitResult
        One row a galaxy, in the order of the images or positions; positions
        are pixels of the whole image.

    Raises
    ------
    TypeError, ValueError
        If arguments are not what is described above, shapes differ, there is
        nothing to fit, a PSF that all share is unusable, or the checkpoint
        belongs to another job.
    astropy.units.UnitsError
        If units do not fit.
    OSError
        If a file cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D, fit_images
    >>> rng = np.random.default_rng(1)
    >>> truth = SersicGalaxy2D(flux=500, x_0=20, y_0=21, r_eff=4, n=1, ellip=0.4, theta=0.6)
    >>> stamps = truth.render((41, 41)) + rng.normal(0, 0.5, (3, 41, 41))
    >>> result = fit_images(stamps, SersicGalaxy2D(), uncertainty=0.5)
    >>> result.params.shape
    (3, 7)
    >>> bool(np.all(np.abs(result.params[:, 0] - 500) < 5 * result.stds[:, 0]))
    True
    """
    _check_arguments(model, background, batch_size, progress)
    if held_out is not None and not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, not {held_out!r}")
    if fitter is None:
        from galmorph.fitting import MAPFitter

        fitter = MAPFitter()
    if not callable(getattr(fitter, "fit_stamps", None)):
        raise TypeError(
            f"{type(fitter).__name__} has no method fit_stamps; use galmorph.MAPFitter, or call "
            "the fitter on each image"
        )
    source = stamp_source(
        images,
        uncertainty=uncertainty,
        mask=mask,
        psf=psf,
        positions=positions,
        size=size,
        segmentation=segmentation,
    )
    job = _Job(source, model, fitter, background)
    if held_out is not None:
        job.held_out = {"fraction": float(held_out), "seed": int(held_out_seed)}
        job.extra["held_out_row"] = np.arange(len(source))
    started = time.perf_counter()
    with _reporter(progress, len(source)) as report:
        job.run(batch_size, checkpoint, report)
    return FitResult(
        model=model.copy(),
        **job.rows,
        origin=source.origin,
        shapes=source.shapes,
        ids=source.ids,
        data_unit=source.unit,
        wcs=source.wcs,
        psf=source.psfs.shared,
        stamps=source,
        extra=job.extra,
        noise=getattr(fitter, "noise", None) or GaussianNoise(),
        priors=getattr(fitter, "priors_of", lambda model: {})(model),
        meta=_provenance(job, time.perf_counter() - started),
    )


def stamp_source(
    images: Any,
    *,
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    positions: Any = None,
    size: int | tuple[int, int] | None = None,
    segmentation: Any = None,
) -> StampSource:
    """Stamps as `fit_images` sees them, without fitting.

    Parameters
    ----------
    images, uncertainty, mask, psf, positions, size, segmentation
        As for `fit_images`.

    Returns
    -------
    StampSource
        It has a length, ``shapes`` (N, 2), ``batches()`` (indices that may be
        read together) and ``get(indices)``, which returns a `StampBatch`.

    Raises
    ------
    TypeError, ValueError, OSError, astropy.units.UnitsError
        As `fit_images`.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.images import stamp_source
    >>> image = np.random.default_rng(1).normal(size=(100, 120))
    >>> source = stamp_source(image, uncertainty=1.0, positions=[(60, 50), (3, 4)], size=21)
    >>> batch = source.get([0, 1])
    >>> batch.data.shape, batch.origin.tolist(), batch.position.tolist()
    ((2, 21, 21), [[50, 40], [-7, -6]], [[10.0, 10.0], [10.0, 10.0]])
    """
    return make_source(
        images,
        uncertainty=uncertainty,
        mask=mask,
        psf=psf,
        positions=positions,
        size=size,
        segmentation=segmentation,
    )


def _check_arguments(model, background, batch_size, progress) -> None:
    if not isinstance(model, Model):
        hint = "an instance, as SersicGalaxy2D(), " if isinstance(model, type) else ""
        raise TypeError(f"model must be {hint}an astropy model, not {model!r}")
    if len(model) != 1:
        raise ValueError("model must be a single model, not a model set: it is the same for all")
    if background not in BACKGROUND_TERMS:
        raise ValueError(f"background must be one of {list(BACKGROUND_TERMS)}, not {background!r}")
    if batch_size is not None and (int(batch_size) != batch_size or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
    if not isinstance(progress, bool | np.bool_) and not callable(progress):
        raise TypeError("progress must be True, False or callable")


class _Job:
    """All stamps of one call, their fits as they come in, and what went wrong."""

    def __init__(self, source: StampSource, model: Model, fitter: Any, background: str) -> None:
        self.source, self.model, self.fitter, self.background = source, model, fitter, background
        self.errors: dict[str, str] = {}
        self.extra: dict[str, np.ndarray] = {}
        self.held_out: dict[str, Any] | None = None
        self._first_error: Exception | None = None
        self._any_fitted = False
        n, p, nb = len(source), len(model.param_names), BACKGROUND_TERMS[background]
        self.n_free = nb + sum(
            not (model.fixed[name] or model.tied[name]) for name in model.param_names
        )
        self.rows = {
            "params": np.full((n, p), np.nan),
            "cov": np.full((n, p, p), np.nan),
            "background": np.full((n, nb), np.nan),
            "background_cov": np.full((n, nb, nb), np.nan),
            "chi2": np.full(n, np.nan),
            "dof": np.zeros(n, dtype=np.int64),
            "n_iter": np.zeros(n, dtype=np.int64),
            "flags": np.zeros(n, dtype=np.int32),
        }
        self._done = np.zeros(n, dtype=bool)

    def run(self, batch_size: int | None, checkpoint: Any, report: Callable) -> None:
        kept = None if checkpoint is None else Checkpoint(checkpoint, self.fingerprint())
        for record in kept.records if kept else ():
            self._restore(record, kept.path)
        if self._done.any():
            report(int(self._done.sum()))
        for indices in self.source.batches(batch_size):
            indices = indices[~self._done[indices]]
            if len(indices) == 0:
                continue
            batch = self.source.get(indices)
            self.fit(batch)
            self._done[indices] = True
            if kept:
                rows = {name: values[indices] for name, values in self.rows.items()}
                rows |= {f"extra_{name}": a[indices] for name, a in self.extra.items()}
                kept.save(index=indices, digest=np.uint32(_digest(batch)), **rows)
            self.source.release()
            report(len(indices))
        if self.errors and not self._any_fitted:
            raise self._first_error
        self._add_origin()
        self._warn()

    def fit(self, batch: StampBatch) -> None:
        """Fit a batch and keep the rows, in coordinates of the stamps."""
        flags = self.rows["flags"]
        flags[batch.index] = batch.flags
        if self.held_out is not None:
            batch = batch[np.arange(len(batch))]
            for k, i in enumerate(batch.index):
                out = held_out_pixels(batch.data.shape[1:], int(i), **self.held_out)
                batch.inv_sigma[k][out] = 0.0
        usable = (batch.inv_sigma > 0).sum(axis=(1, 2))
        blank = (batch.flags & FitFlag.NO_DATA) != 0
        flags[batch.index[(usable < self.n_free) & ~blank]] |= FitFlag.FEW_PIXELS
        good = np.flatnonzero((flags[batch.index] & FitFlag.FAILED) == 0)
        if len(good) == 0:
            return
        if len(good) < len(batch):
            batch = batch[good]
        try:
            self._keep(batch, self._call(batch))
        except Exception as err:
            self._fit_one_by_one(batch, err)

    def _call(self, batch: StampBatch):
        return self.fitter.fit_stamps(batch, self.model, background=self.background)

    def _fit_one_by_one(self, batch: StampBatch, error: Exception) -> None:
        """One galaxy made the fitter fail: the others are not to suffer from it."""
        self._first_error = self._first_error or error
        failed = []
        for k in range(len(batch)):
            single = batch[[k]]
            try:
                if len(batch) == 1:
                    raise error
                self._keep(single, self._call(single))
            except Exception as err:
                failed.append(k)
                self.errors[str(single.index[0])] = f"{type(err).__name__}: {err}"
        if len(failed) == len(batch) > 1 and not self._any_fitted:
            raise error  # it is not about the galaxies
        self.rows["flags"][batch.index[failed]] |= _CRASHED

    def _keep(self, batch: StampBatch, fits: Any) -> None:
        for name in _FIELDS:
            if name != "flags":
                self.rows[name][batch.index] = getattr(fits, name)
        self._keep_extra(batch.index, getattr(fits, "extra", {}))
        self.rows["flags"][batch.index] |= np.asarray(fits.flags).astype(np.int32)
        nothing = batch.index[~np.isfinite(self.rows["params"][batch.index]).all(axis=1)]
        unsaid = nothing[(self.rows["flags"][nothing] & FitFlag.FAILED) == 0]
        self.rows["flags"][unsaid] |= _CRASHED
        self._any_fitted = True

    def _keep_extra(self, index: np.ndarray, extra: dict[str, np.ndarray]) -> None:
        """What not every fitter finds: NaN (or 0) for galaxies without."""
        for name, values in extra.items():
            if name not in self.extra:
                blank = np.nan if np.issubdtype(values.dtype, np.floating) else 0
                shape = (len(self.source), *values.shape[1:])
                self.extra[name] = np.full(shape, blank, dtype=values.dtype)
            self.extra[name][index] = values

    def _restore(self, record: dict[str, np.ndarray], path) -> None:
        indices = record["index"]
        if _digest(self.source.get(indices)) != int(record["digest"]):
            raise ValueError(
                f"{path} was made from other pixels, uncertainties, masks or PSFs; "
                "delete it or choose another file"
            )
        for name in self.rows:
            self.rows[name][indices] = record[name]
        prefix = "extra_"
        self._keep_extra(
            indices, {n.removeprefix(prefix): a for n, a in record.items() if n.startswith(prefix)}
        )
        self._done[indices] = True
        self._any_fitted = True
        self.source.release()

    def _add_origin(self) -> None:
        for axis, name in enumerate(("x_0", "y_0")):
            if name in self.model.param_names:
                column = self.model.param_names.index(name)
                self.rows["params"][:, column] += self.source.origin[:, axis]

    def _warn(self) -> None:
        if self.errors:
            index, message = next(iter(self.errors.items()))
            warnings.warn(
                f"the fitter failed on {len(self.errors)} of {len(self.source)} galaxies, first on "
                f"number {index} ({message}); they are flagged NOT_CONVERGED, and "
                "meta['errors'] of the result has the messages",
                AstropyUserWarning,
                stacklevel=4,
            )

    def fingerprint(self) -> dict[str, Any]:
        """What makes this job this job; the pixels are checked batch by batch."""
        model = self.model
        return {
            "model": type(model).__name__,
            "parameters": {n: float(getattr(model, n).value) for n in model.param_names},
            "constraints": {
                n: [repr(model.bounds[n]), bool(model.fixed[n]), bool(model.tied[n])]
                for n in model.param_names
            },
            "model psf": _psf_digest(getattr(model, "psf", None)),
            "network": network_digest(model),
            "fitter": describe(self.fitter),
            "background": self.background,
            "held out": self.held_out,
            "number of galaxies": len(self.source),
            "stamps": zlib.crc32(self.source.shapes.tobytes() + self.source.origin.tobytes()),
            "unit": str(self.source.unit),
        }


def _digest(batch: StampBatch) -> int:
    code = 0
    for array in (batch.data, batch.inv_sigma, batch.position, batch.flags):
        code = zlib.crc32(np.ascontiguousarray(array), code)
    psfs = batch.psf if isinstance(batch.psf, list) else [batch.psf]
    for psf in psfs:
        code = zlib.crc32(str(_psf_digest(psf)).encode(), code)
    return code


def _psf_digest(psf: Any) -> list | None:
    if psf is None:
        return None
    return [zlib.crc32(np.ascontiguousarray(psf.data)), psf.oversampling, psf.includes_pixel]


def describe(obj: Any) -> str:
    """Class and options of a fitter, the same in every process."""
    options = []
    for name, value in sorted(getattr(obj, "__dict__", {}).items()):
        text = repr(value)
        if not name.startswith("_") and name != "fit_info" and " at 0x" not in text:
            options.append(f"{name}={text}")
    return f"{type(obj).__name__}({', '.join(options)})"


@contextlib.contextmanager
def _reporter(progress: bool | Callable, total: int) -> Iterator[Callable[[int], None]]:
    """Function that is told how many more galaxies are done."""
    if callable(progress):
        done = 0

        def report(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        yield report
    elif progress:
        from tqdm import tqdm

        with tqdm(total=total, unit=" galaxies", file=sys.stderr) as bar:
            yield bar.update
    else:
        yield lambda n: None


def _provenance(job: _Job, seconds: float) -> dict[str, Any]:
    import astropy

    import galmorph

    own = {} if job.held_out is None else {"held_out": job.held_out}
    own |= getattr(job.fitter, "provenance", dict)()
    return own | {
        "galmorph": galmorph.__version__,
        "astropy": astropy.__version__,
        "numpy": np.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": type(job.model).__name__,
        "fitter": describe(job.fitter),
        "images": job.source.name,
        "background": job.background,
        "galaxies": len(job.source),
        "seconds": round(seconds, 3),
        "errors": dict(job.errors),
    }
