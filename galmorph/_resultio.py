"""`FitResult` to files and back: ECSV and FITS."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.modeling.core import Model
from astropy.table import QTable
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS

from galmorph.psf import PSF

__all__ = []

#: Columns of arrays that hold exactly what the readable columns convert or leave out.
_EXACT = {
    "params": "params",
    "cov": "cov",
    "background": "background_terms",
    "background_cov": "background_cov",
    "origin": "origin",
    "shapes": "shape",
}
_PLAIN = {"ids": "id", "chi2": "chi2", "dof": "dof", "flags": "flags", "n_iter": "n_iter"}
#: PSFs with more samples than this are not written: an ECSV file holds them as text.
_MAX_PSF = {"ecsv": 101**2, "fits": 2048**2}
#: Numbers in a cell that a reader of ECSV files takes.
_MAX_CELL = 4000


# -- writing -------------------------------------------------------------------------------


def write_result(result, path, *, overwrite: bool) -> None:
    """See `FitResult.write`."""
    path = Path(os.fspath(path))
    kind, suffix = _format(path)
    if path.exists() and not overwrite:
        raise OSError(f"{path} exists; say overwrite=True to replace it")
    table = result.to_table()
    for name, column in _EXACT.items():
        values = getattr(result, name)
        if values.size:  # neither "no background" nor an empty result has a column
            table[column] = values
    extra = _writable(result.extra, kind)
    for name, values in extra.items():
        if name not in table.colnames:
            table[name] = values
    state, psf = _state(result, _MAX_PSF[kind])
    state["extra"] = list(extra)
    # Written beside the goal and moved there: nobody ever finds half a file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        {"ecsv": _write_ecsv, "fits": _write_fits}[kind](table, state, psf, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _writable(extra: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What of the extra arrays a file of this kind can hold."""
    large = [n for n, v in extra.items() if v.ndim > 1 and v[:1].size > _MAX_CELL]
    if kind == "fits" or not large:
        return extra
    warnings.warn(
        "the draws are too many for an ECSV file, which holds them as text: write .fits to keep "
        "them; mean and covariance are there",
        AstropyUserWarning,
        stacklevel=5,
    )
    dropped = {*large, "samples", "weights"}
    return {name: values for name, values in extra.items() if name not in dropped}


def _format(path: Path) -> tuple[str, str]:
    name = path.name.lower()
    for kind, suffix in (("ecsv", ".ecsv"), ("fits", ".fits"), ("fits", ".fits.gz")):
        if name.endswith(suffix):
            return kind, suffix
    raise ValueError(f"{path}: the name must end in .ecsv, .fits or .fits.gz")


def _write_ecsv(table: QTable, state: dict, psf: PSF | None, path: Path) -> None:
    if psf is not None:
        state["psf"]["data"] = psf.data.tolist()
    table.meta["state"] = state
    table.write(path, format="ascii.ecsv")


def _write_fits(table: QTable, state: dict, psf: PSF | None, path: Path) -> None:
    meta = table.meta.copy()
    table.meta.clear()
    table.meta["CREATOR"] = f"galmorph {meta.get('galmorph', '')}".strip()
    for key in ("model", "fitter", "date", "images"):
        if key in meta:
            table.meta[key.upper()] = str(meta[key]).encode("ascii", "replace").decode()
    buffer = io.BytesIO()
    table.write(buffer, format="fits")
    buffer.seek(0)
    with fits.open(buffer) as written:
        catalogue = written[1].copy()
        catalogue.name = "CATALOG"
        for name, text in meta.get("conventions", {}).items():
            catalogue.header["COMMENT"] = f"{name}: {text}"
        # An image, not a second table: Table.read() takes the only table without a question.
        text = np.frombuffer(json.dumps(state, default=str).encode(), dtype=np.uint8)
        store = fits.ImageHDU(text, name="STATE")
        store.header["COMMENT"] = "JSON text, a byte a pixel: the model and options of the fit."
        hdus = fits.HDUList([fits.PrimaryHDU(), catalogue, store])
        if psf is not None:
            image = fits.ImageHDU(np.array(psf.data), name="PSF")
            image.header["OVERSAMP"] = (psf.oversampling, "samples per pixel")
            image.header["PIXINCL"] = (psf.includes_pixel, "the pixel response is in the PSF")
            hdus.append(image)
        hdus.writeto(path)


def _state(result, max_psf: int) -> tuple[dict[str, Any], PSF | None]:
    """What a table has no column for, in plain types; and the PSF if it is to be written."""
    model = result.model
    names = model.param_names
    state = {
        "module": type(model).__module__,
        "class": type(model).__name__,
        "parameters": {n: float(getattr(model, n).value) for n in names},
        "units": {n: str(getattr(model, n).unit) for n in names if getattr(model, n).unit},
        "bounds": {n: [None if b is None else float(b) for b in model.bounds[n]] for n in names},
        "fixed": {n: bool(model.fixed[n]) for n in names},
        "tied": [n for n in names if model.tied[n]],
        "weights": _weights_of(model),
        "background_terms": int(result.background.shape[1]),
        "data_unit": None if result.data_unit is None else result.data_unit.to_string(),
        "wcs": _wcs_state(result.wcs),
        "meta": json.loads(json.dumps(result.meta, default=str)),
    }
    psf = result.psf if result.psf is not None else getattr(model, "psf", None)
    if psf is not None and psf.data.size > max_psf:
        warnings.warn(
            f"a PSF of shape {psf.shape} is too large to be written with the table",
            AstropyUserWarning,
            stacklevel=4,
        )
        psf = None
    if psf is not None:
        state["psf"] = {
            "of_model": result.psf is None,
            "oversampling": psf.oversampling,
            "includes_pixel": psf.includes_pixel,
        }
    return state, psf


def _wcs_state(wcs: Any) -> dict | None:
    """FITS headers, each once, and which one each galaxy has (-1: none)."""
    if wcs is None:
        return None
    headers: list[str] = []
    index = []
    for one in wcs if isinstance(wcs, list) else [wcs]:
        text = None if one is None else _wcs_text(one)
        if text is not None and text not in headers:
            headers.append(text)
        index.append(-1 if text is None else headers.index(text))
    if not headers:
        return None
    return {"headers": headers, "index": index if isinstance(wcs, list) else None}


def _wcs_text(wcs: Any) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wcs.to_header(relax=True).tostring(sep="\n", endcard=False, padding=False)
    except (AttributeError, TypeError):
        warnings.warn(
            f"a {type(wcs).__name__} cannot be written to a table; the sky columns are there",
            AstropyUserWarning,
            stacklevel=6,
        )
        return None


# -- reading -------------------------------------------------------------------------------


def read_result(cls, path, *, model: Model | None):
    """See `FitResult.read`."""
    path = Path(os.fspath(path))
    kind, _ = _format(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table, state, psf = {"ecsv": _read_ecsv, "fits": _read_fits}[kind](path)
    except KeyError as err:
        raise ValueError(f"{path} is not a table written by FitResult.write ({err})") from None
    except (OSError, ValueError, TypeError, IndexError, EOFError, zlib.error) as err:
        raise OSError(f"{path} cannot be read ({err})") from err

    n, nb, n_params = len(table), state["background_terms"], len(state["parameters"])
    arrays = {name: _native(table[column]) for name, column in _PLAIN.items()}
    empty = {
        "params": np.empty((n, n_params)),
        "cov": np.empty((n, n_params, n_params)),
        "background": np.empty((n, nb)),
        "background_cov": np.empty((n, nb, nb)),
        "origin": np.empty((n, 2), dtype=np.int64),
        "shapes": np.empty((n, 2), dtype=np.int64),
    }
    for name, column in _EXACT.items():
        arrays[name] = _native(table[column]) if empty[name].size else empty[name]
    arrays["flags"] = arrays["flags"].astype(np.int32)
    of_model = bool(state.get("psf", {}).get("of_model"))
    if model is None:
        model = _make_model(state, psf if of_model else None, path)
    elif type(model).__name__ != state["class"] or tuple(model.param_names) != tuple(
        state["parameters"]
    ):
        raise ValueError(f"{path} holds fits of {state['class']}, not {type(model).__name__}")
    unit = state["data_unit"]
    return cls(
        model=model,
        **arrays,
        data_unit=None if unit is None else u.Unit(unit),
        wcs=_make_wcs(state["wcs"]),
        psf=None if of_model else psf,
        extra={name: _native(table[name]) for name in state.get("extra", ())},
        meta=state["meta"],
    )


def _read_ecsv(path: Path) -> tuple[QTable, dict, PSF | None]:
    table = QTable.read(path, format="ascii.ecsv")
    state = table.meta["state"]
    psf = state.get("psf")
    return table, state, _make_psf(psf["data"], psf) if psf else None


def _read_fits(path: Path) -> tuple[QTable, dict, PSF | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)  # damage shows below
        # From memory: astropy leaves a file open that it finds damaged.
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        with fits.open(io.BytesIO(content)) as hdus:
            state = json.loads(hdus["STATE"].data.tobytes())
            table = QTable.read(hdus["CATALOG"])
            psf = state.get("psf")
            return table, state, _make_psf(hdus["PSF"].data, psf) if psf else None


def _make_psf(data: Any, options: dict) -> PSF:
    return PSF(data, oversampling=options["oversampling"], includes_pixel=options["includes_pixel"])


def _native(column: Any) -> np.ndarray:
    values = np.asarray(getattr(column, "value", column))
    return values.astype(values.dtype.newbyteorder("="))


def _weights_of(model: Model) -> dict | None:
    """Name and hash of the installed weights of a learned model."""
    network = getattr(model, "shape", None)
    if getattr(network, "name", None) is None:
        return None
    return {"name": network.name, "sha256": network.vae.metadata.get("sha256")}


def _network(weights: dict) -> Any:
    from galmorph.nets.learned import LearnedShape

    network = LearnedShape.from_pretrained(weights["name"])
    if network.vae.metadata.get("sha256") != weights["sha256"]:
        raise TypeError(f"the installed weights {weights['name']!r} are not those of the fits")
    return network


def _make_model(state: dict, psf: PSF | None, path: Path) -> Model:
    name, module = state["class"], state["module"]
    # Only our own modules: a data file is not to choose what is imported.
    if module.split(".")[0] != "galmorph":
        raise ValueError(f"{path} holds fits of {module}.{name}: give it as model=")
    try:
        cls = getattr(importlib.import_module(module), name)
        units = {n: u.Unit(text) for n, text in state["units"].items()}
        parameters = {n: v * units[n] if n in units else v for n, v in state["parameters"].items()}
        options = {} if psf is None else {"psf": psf}
        if state.get("weights"):
            options["shape"] = _network(state["weights"])
        bounds = {n: tuple(b) for n, b in state["bounds"].items()}
        model = cls(**parameters, bounds=bounds, fixed=state["fixed"], **options)
    except (ImportError, AttributeError, TypeError, ValueError) as err:
        raise ValueError(f"{path}: cannot make a {name} ({err}); give it as model=") from None
    if state["tied"]:
        warnings.warn(
            f"{', '.join(state['tied'])} were tied by functions, which a file cannot hold; "
            "give the model as model= to have them",
            AstropyUserWarning,
            stacklevel=4,
        )
    return model


def _make_wcs(state: dict | None) -> Any:
    if state is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [WCS(fits.Header.fromstring(text, sep="\n")) for text in state["headers"]]
    if state["index"] is None:
        return made[0]
    return [None if i < 0 else made[i] for i in state["index"]]
