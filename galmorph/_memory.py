"""Fits of scenes that are finished, kept in a file, so that a job that was stopped can go on."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from galmorph._checkpoint import Checkpoint, network_digest
from galmorph._scenes import _Known
from galmorph.images import _psf_digest, describe

__all__ = ["Memory"]

_FIELDS = (
    "cov",
    "flux_noise",
    "background",
    "images",
    "misfit",
    "chi2",
    "cost",
    "n_iter",
    "converged",
    "bad_covariance",
    "at_bound",
    "n_free",
)


class Memory:
    """Fits of batches of scenes by what went into them.

    Whatever order they come in, and whichever scenes they belong to, a fit of the same pixels
    from the same start is the same.

    Parameters
    ----------
    path : path
    fitter : MAPFitter
        A file of another fitter is refused.

    Raises
    ------
    ValueError, OSError
        See `galmorph._checkpoint.Checkpoint`.
    """

    def __init__(self, path: Any, fitter: Any) -> None:
        self._file = Checkpoint(path, {"kind": "scenes", "fitter": describe(fitter)})
        self._known = {str(record["key"]): record for record in self._file.records}
        self._file.records = []

    def find(self, asked: Any) -> tuple[Any, Any] | None:
        """The fit of a batch, and what its noise depends on, if it was done before."""
        record = self._known.get(_digest(asked))
        return None if record is None else _read(record)

    def keep(self, asked: Any, fits: Any, known: Any) -> None:
        """Put the fit of a batch in the file."""
        arrays = {name: np.asarray(getattr(fits, name)) for name in _FIELDS}
        for name in ("images", "misfit"):  # large, and no more is kept of them
            arrays[name] = arrays[name].astype(np.float32)
        if not arrays["misfit"].any():
            arrays["misfit"] = arrays["misfit"][..., :0, :0]
        arrays |= {f"params_{i}": p for i, p in enumerate(fits.params)}
        if known is not None:
            arrays |= {"total": known.total, "off": known.misfit, "known_free": known.n_free}
        self._file.save(key=np.array(_digest(asked)), **arrays)


def _read(record: dict[str, np.ndarray]) -> tuple[Any, Any]:
    from galmorph._scenefit import SceneFits

    count = sum(name.startswith("params_") for name in record)
    values = {name: record[name] for name in _FIELDS} | {"n_free": int(record["n_free"])}
    if not values["misfit"].size:
        values["misfit"] = np.zeros_like(values["images"])
    fits = SceneFits(params=[record[f"params_{i}"] for i in range(count)], **values)
    known = None
    if "total" in record:
        known = _Known(record["total"], record["off"], int(record["known_free"]))
    return fits, known


def _digest(asked: Any) -> str:
    batch, known = asked.batch, asked.known
    code = hashlib.blake2b(digest_size=16)
    for setup in asked.setups:
        model = setup.model
        values = [float(np.ravel(getattr(model, n).value)[0]) for n in model.param_names]
        limits = [repr((model.bounds[n], model.fixed[n])) for n in model.param_names]
        code.update(repr((type(model).__name__, values, limits, setup.priors)).encode())
        options = setup.background, setup.max_iter, setup.tolerance, network_digest(model)
        code.update(repr(options).encode())
    psfs = batch.psf if isinstance(batch.psf, list) else [batch.psf]
    code.update(repr([_psf_digest(p) for p in psfs]).encode())
    arrays = [batch.data, batch.inv_sigma, batch.position, batch.spread]
    arrays += [asked.guess, np.array([asked.tolerance, asked.structure]), *(asked.start or [])]
    if known is not None:
        arrays += [known.total, known.misfit]
    for array in arrays:
        code.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return code.hexdigest()
