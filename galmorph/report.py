"""A fitted scene as one HTML file that a person pages through.

Everything that is shown is made here, of numbers that the result and its table hold already; the
page itself only sorts, filters and draws.
"""

from __future__ import annotations

import base64
import hashlib
import html
import inspect
import io
import json
import math
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import QTable

from galmorph._sky import local_sky
from galmorph.deblending import SceneResult
from galmorph.flags import FitFlag, decode_flags
from galmorph.results import _ellipses

__all__ = ["catalog_report"]

PER_PAGE = 48  # cards on a page, and sources in a sprite
_CELL = 64  # side of a thumbnail in its sprite, in pixels
_FIELD = 1400  # longest side of the pictures of the field, in pixels
_GRAYS, _COLORS = 64, 49  # levels of brightness and of residuals; few, so that noise compresses
_LIMIT = 5.0  # of the residuals, in sigma
_UNUSED, _BLANK = _GRAYS + _COLORS, _GRAYS + _COLORS + 1
_UNUSED_COLOR = (178, 164, 112)  # neither a gray nor a colour of the residuals

_STAR = ("star_probability", r"(.*_)?star(_.*)?")
_CLASS = (r"class(_name)?", r"class_\w+")
# Columns that are visible at first, in this order.
_FIRST_COLUMNS = (
    *("id", "ra", "dec", r"(mag|magnitude)\w*", r"flux(_err)?", "snr", r"r_\w+_arcsec"),
    *(
        "r_half|r_eff|r_50|r_disk",
        "n",
        "ellip",
        r"(?!p_)(.*_)?star(_.*)?",
        r"class(_name)?",
        "model",
    ),
    *("blendedness", "reduced_chi2", "flags", "x_0", "y_0"),
)


def catalog_report(
    result: SceneResult,
    path: str | os.PathLike,
    *,
    table: QTable | None = None,
    title: str = "",
    columns: Sequence[str] | None = None,
    max_sources: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a fitted scene as one HTML file: field, thumbnails and table.

    The file needs nothing else: no network, no other file.  It shows the field (image, model and
    residual) with the sources on it; a card for each source with its data, the models of all
    sources, its own model and the residual; and a table that can be sorted, filtered and saved.
    ``#source=17`` behind its address leads to source 17.

    Parameters
    ----------
    result : SceneResult
        What `galmorph.deblend` returned.
    path : path
        The file to write, usually ``.html``.
    table : QTable, optional
        What is said about the sources, by default ``result.to_table()``.  Its rows are shown, in
        its order; the column ``id`` says which source each is, and is not needed if there is a
        row for every source.  Of its columns the cards show the magnitude (``mag`` or
        ``magnitude``, also with a suffix such as ``mag_r``), the flux, the radius,
        ``star_probability`` (or another column with ``star`` among the words of its name),
        ``class``, ``model``, ``blendedness`` and ``flags``, where they are.
    title : str, optional
        Heading; by default the name of the image.
    columns : sequence of str, optional
        Columns of the table view.  By default all that hold one value a source, except for
        latents, with a choice of them visible at first.
    max_sources : int, optional
        Only so many of the sources, the brightest; the field shows them all.
    overwrite : bool, optional
        Whether a file of that name may be replaced.

    Returns
    -------
    `~pathlib.Path`
        The file that was written: about 5 kB a source, and a few MB for the pictures of a field.

    Raises
    ------
    TypeError
        If ``result`` is not a SceneResult.
    ValueError
        If rows of the table are not sources of the result, a column does not exist, or
        ``max_sources`` is not a positive integer.
    OSError
        If the file exists and ``overwrite`` is false, or cannot be written.

    Notes
    -----
    Brightness is stretched by the inverse hyperbolic sine, linear below 3 sigma; data and models
    of one source share their stretch.  Residuals are in sigma, from -5 (blue) to 5 (red); where
    pixels are averaged to fit, sigma is that of the average of independent pixels.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D, deblend
    >>> from galmorph.report import catalog_report
    >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
    >>> image += np.random.default_rng(1).normal(0, 0.3, (41, 41))
    >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = catalog_report(result, os.path.join(folder, "field.html"), title="My field")
    ...     "<h1>My field</h1>" in path.read_text(encoding="utf-8")
    True
    """
    if not isinstance(result, SceneResult):
        raise TypeError(f"result must be a SceneResult, not {type(result).__name__}")
    if max_sources is not None and (int(max_sources) != max_sources or max_sources < 1):
        raise ValueError(f"max_sources must be a positive integer, not {max_sources!r}")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True replaces it")
    table = result.to_table() if table is None else table
    sources = _sources_of(table, result)
    if max_sources is not None and len(sources) > max_sources:
        flux = np.nan_to_num(result.flux[sources], nan=-np.inf)
        brightest = np.sort(np.argsort(-flux, kind="stable")[: int(max_sources)])
        table, sources = table[brightest], sources[brightest]
    page = _page(result, table, sources, title, columns)
    path.write_text(page, encoding="utf-8")
    return path


def _sources_of(table: QTable, result: SceneResult) -> np.ndarray:
    """Number of the source of each row."""
    count = len(result)
    if "id" not in table.colnames or np.array_equal(table["id"], result.ids):
        if len(table) != count:
            raise ValueError(
                f"the table has {len(table)} rows without the column 'id', the result has "
                f"{count} sources"
            )
        return np.arange(count)
    if len(np.unique(result.ids)) < count:
        raise ValueError("ids that are not unique must be those of the result, in its order")
    place = {int(i): k for k, i in enumerate(result.ids)}
    strange = [i for i in np.asarray(table["id"]).tolist() if i not in place]
    if strange:
        raise ValueError(f"sources {strange[:5]} of the table are not in the result")
    return np.array([place[i] for i in np.asarray(table["id"]).tolist()], dtype=int)


def _page(result: SceneResult, table: QTable, sources, title: str, columns) -> str:
    pixels = _Pixels(result)
    places = _Places(result)
    known = [_Column(name, values, about) for name, values, about in _flat(table)]
    if "id" not in {c.name for c in known}:
        known.insert(0, _Column("id", result.ids, "number of the source"))
    boxes = [pixels.box(k, places) for k in sources]
    content = {
        "columns": _shown(known, columns),
        "cards": _cards(result, known, sources, places),
        "ids": [str(i) for i in result.ids[sources]],
        "boxes": boxes,
        "near": [places.inside(box) for box in boxes],
        "places": places.ellipses(),
        "rows": _row_of(sources, len(result)),
        "colours": _colours(result, known, sources),
        "flags": _flag_meanings(),
        "size": [result.data.shape[1], result.data.shape[0]],
        "cell": _CELL,
        "perPage": PER_PAGE,
    }
    name = str(result.meta.get("images", ""))
    parts = {
        "TITLE": html.escape(title or name or "Catalogue"),
        "SUMMARY": _definitions(_summary(result, len(sources))),
        "MADE": _definitions(_made(result, table)),
        "FIELD": _field(pixels, result),
        "CONTENT": _json(content),
        "SPRITES": "\n".join(
            f'<script type="text/plain" class="sprite">{_base64(sprite)}</script>'
            for sprite in pixels.sprites(sources, boxes)
        ),
    }
    template = resources.files("galmorph").joinpath("_report_page.html").read_text("utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    # No script runs but the page's own, whatever a name may hold.
    parts["HASH"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return re.sub(r"@@([A-Z]+)@@", lambda found: parts[found[1]], template)


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


# -- pictures ----------------------------------------------------------------------------


class _Pixels:
    """Data, models and residual of a scene, and pictures of parts of them."""

    def __init__(self, result: SceneResult) -> None:
        self.result = result
        self.inv_sigma = result.inv_sigma
        self.used = result.inv_sigma > 0
        self.sigma = 1 / np.median(self.inv_sigma[self.used]) if self.used.any() else np.nan
        self.data = np.where(self.used, result.data - result.background_image, np.nan)
        self.model = result.model_image
        self.residual = (self.data - self.model) * self.inv_sigma

    def box(self, k: int, places: _Places) -> list[int] | None:
        """Left, bottom, side and pixels a side of the thumbnails of a source."""
        ny, nx = self.data.shape
        x, y = places.xy[k]
        if not (-0.5 <= x <= nx - 0.5 and -0.5 <= y <= ny - 0.5):
            return None
        side = int(np.clip(max(self.result.source_image(k)[1].shape), 24, 4 * _CELL))
        step = math.ceil(side / _CELL)
        side = step * math.ceil(side / step)
        return [round(x) - side // 2, round(y) - side // 2, side, side // step]

    def field(self) -> dict[str, bytes]:
        """Pictures of the whole: data, model and residual."""
        step = math.ceil(max(self.data.shape) / _FIELD)
        ny, nx = (step * math.ceil(n / step) for n in self.data.shape)
        data, model, residual = (
            _binned(_cut(image, 0, 0, nx, ny), step)
            for image in (self.data, self.model, self.residual)
        )
        stretch = self._stretch(data, model, step, 99.7)
        return {
            "data": _png(stretch(data)[::-1]),
            "model": _png(stretch(model)[::-1]),
            "residual": _png(_residual_levels(residual * step)[::-1]),
        }

    def sprites(self, sources, boxes) -> list[bytes]:
        """A picture for each page of sources: a row a source, a column a kind of image."""
        sprites = []
        for first in range(0, len(sources), PER_PAGE):
            rows = range(first, min(first + PER_PAGE, len(sources)))
            sprite = np.full((len(rows) * _CELL, 4 * _CELL), _BLANK, dtype=np.uint8)
            for i, row in enumerate(rows):
                if boxes[row] is None:
                    continue
                for j, cell in enumerate(self._cells(sources[row], boxes[row])):
                    n = len(cell)
                    sprite[i * _CELL : i * _CELL + n, j * _CELL : j * _CELL + n] = cell[::-1]
            sprites.append(_png(sprite))
        return sprites

    def _cells(self, k: int, box: list[int]) -> list[np.ndarray]:
        """Levels of data, all models, the source's own model and the residual."""
        left, bottom, side, n = box
        step = side // n
        (rows, columns), own = self.result.source_image(k)
        alone = np.zeros((side, side))
        x, y = columns.start - left, rows.start - bottom
        there, here = _common((y, x), own.shape, (side, side))
        alone[there] = own[here]
        data, model, residual = (
            _binned(_cut(image, left, bottom, side, side), step)
            for image in (self.data, self.model, self.residual)
        )
        alone = np.where(np.isfinite(model), _binned(alone, step), np.nan)
        stretch = self._stretch(data, model, step, 99.8)
        return [stretch(data), stretch(model), stretch(alone), _residual_levels(residual * step)]

    def _stretch(self, data, model, step: int, percentile: float):
        """Function from brightness to levels, from -3 sigma to the peak."""
        sigma = self.sigma / step if self.sigma > 0 else 1.0
        finite = data[np.isfinite(data)]
        # A hot pixel must not set the scale, but the galaxy's own peak may.
        tops = [np.percentile(finite, percentile)] if finite.size else []
        if percentile > 99.7 and np.isfinite(model).any():
            tops.append(np.nanmax(model))
        soft = 3 * sigma
        low, high = np.arcsinh(-1.0), np.arcsinh(max([2 * soft, *tops]) / soft)

        def levels(image: np.ndarray) -> np.ndarray:
            share = (np.arcsinh(image / soft) - low) / (high - low)
            return _levels(share, 0, _GRAYS)

        return levels


def _residual_levels(residual: np.ndarray) -> np.ndarray:
    return _levels((residual / _LIMIT + 1) / 2, _GRAYS, _COLORS)


def _levels(share: np.ndarray, first: int, count: int) -> np.ndarray:
    """Entries of the palette for numbers from 0 to 1."""
    level = np.rint(np.nan_to_num(share) * (count - 1)).clip(0, count - 1) + first
    return np.where(np.isfinite(share), level, _UNUSED).astype(np.uint8)


def _common(at: tuple[int, int], inner: tuple[int, int], outer: tuple[int, int]):
    """Slices of the outer and of the inner array where they overlap."""
    there, here = [], []
    for first, n, size in zip(at, inner, outer, strict=True):
        start, stop = max(first, 0), max(min(first + n, size), max(first, 0))
        there.append(slice(start, stop))
        here.append(slice(start - first, stop - first))
    return tuple(there), tuple(here)


def _cut(image: np.ndarray, left: int, bottom: int, width: int, height: int) -> np.ndarray:
    """A part of the image, NaN beyond its borders."""
    part = np.full((height, width), np.nan)
    there, here = _common((-bottom, -left), image.shape, part.shape)
    part[there] = image[here]
    return part


def _binned(image: np.ndarray, step: int) -> np.ndarray:
    """Means of blocks of step x step pixels, of those that are usable."""
    if step == 1:
        return image
    ny, nx = image.shape
    blocks = image.reshape(ny // step, step, nx // step, step)
    count = np.isfinite(blocks).sum((1, 3))
    total = np.nansum(blocks, (1, 3))
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@cache
def _palette() -> bytes:
    import matplotlib as mpl

    from galmorph.plot.drawing import RESIDUAL_CMAP

    grays = np.repeat(np.linspace(0, 255, _GRAYS).round()[:, None], 3, axis=1)
    colors = 255 * mpl.colormaps[RESIDUAL_CMAP](np.linspace(0, 1, _COLORS))[:, :3]
    palette = np.vstack([grays, colors.round(), [_UNUSED_COLOR], [(127, 127, 127)]])
    return palette.astype(np.uint8).tobytes()


def _png(levels: np.ndarray) -> bytes:
    """A picture of palette entries, row 0 at the top."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(levels))
    picture.putpalette(_palette())
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=9)
    return file.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _field(pixels: _Pixels, result: SceneResult) -> str:
    """The pictures of the field, as elements of its SVG."""
    ny, nx = result.data.shape
    step = math.ceil(max(ny, nx) / _FIELD)
    width, height = (step * math.ceil(n / step) for n in (nx, ny))
    # What pads the last blocks lies beyond the top, so the picture begins above the view.
    return "\n".join(
        f'<image id="field-{name}" x="0" y="{ny - height}" width="{width}" height="{height}"'
        f' href="data:image/png;base64,{_base64(png)}"/>'
        for name, png in pixels.field().items()
    )


# -- places ------------------------------------------------------------------------------


class _Places:
    """Where the sources are, and their half-light ellipses, in pixels."""

    def __init__(self, result: SceneResult) -> None:
        self.result = result
        self.xy = np.array(result.xy, dtype=float).reshape(-1, 2)
        self.shape = np.zeros((len(result), 3))  # semi-major axis, b/a, angle
        failed = result.failed
        for k, (model, params) in enumerate(zip(result.models, result.params, strict=True)):
            if failed[k]:
                continue
            values = dict(zip(model.param_names, np.asarray(params).tolist(), strict=True))
            self.xy[k] = values["x_0"], values["y_0"]
            outer = max(
                _ellipses(tuple(model.param_names)),
                key=lambda names: values[names[0]],
                default=None,
            )
            if outer is None:
                continue
            r, ellip, theta = (0.0 if n is None else values[n] for n in outer)
            # A radius beyond the pixels that the model was fitted to is not a size to draw.
            if 2 * r <= max(result.source_image(k)[1].shape):
                self.shape[k] = r, 1 - ellip, theta

    def ellipses(self) -> list[list[float] | None]:
        """x, y, semi-major axis, b/a and angle in degrees of each source; None if nowhere."""
        found: list[list[float] | None] = []
        for xy, (a, ratio, theta) in zip(self.xy, self.shape, strict=True):
            row = [*xy, a, ratio, np.degrees(theta)]
            found.append([round(float(v), 3) for v in row] if np.isfinite(row).all() else None)
        return found

    def inside(self, box: list[int] | None) -> list[int]:
        """Which sources have their centre in a box."""
        if box is None:
            return []
        left, bottom, side, _ = box
        at = self.xy - [left, bottom]
        with np.errstate(invalid="ignore"):
            return np.flatnonzero(((at >= -0.5) & (at <= side - 0.5)).all(1)).tolist()


def _row_of(sources: np.ndarray, count: int) -> list[int]:
    """Row of each source of the scene in the table; -1 for those that it does not hold."""
    rows = np.full(count, -1)
    rows[sources] = np.arange(len(sources))
    return rows.tolist()


# -- columns -----------------------------------------------------------------------------


class _Column:
    """A column of the table as the page wants it."""

    def __init__(self, name: str, values: Any, about: str = "") -> None:
        self.name, self.about = name, about
        unit = getattr(values, "unit", None)
        self.unit = "" if unit is None else unit.to_string()
        missing = np.broadcast_to(getattr(values, "mask", False), len(values))
        raw = getattr(values, "unmasked", values)
        raw = np.ma.getdata(getattr(raw, "value", raw))
        self.kind = "text"
        if name == "flags" or name.startswith("flags_"):
            self.kind = "flags"
            cells = decode_flags(np.asarray(raw, dtype=int))
        elif raw.dtype.kind == "b":
            cells = ["yes" if v else "no" for v in raw]
        elif raw.dtype.kind in "iu":
            self.kind, cells = "int", raw.tolist()
        elif raw.dtype.kind == "f":
            self.kind = "angle" if name in ("ra", "dec") else "float"
            cells = [_number(v, self.kind) for v in raw.tolist()]
        elif raw.dtype.kind == "S":
            cells = np.char.decode(raw, "utf-8", "replace").tolist()
        else:
            cells = [str(v) for v in raw]
        self.cells = [None if gone else c for c, gone in zip(cells, missing, strict=True)]


def _number(value: float, kind: str) -> float | None:
    if not math.isfinite(value):
        return None
    return round(value, 7) if kind == "angle" else float(f"{value:.7g}")


def _flat(table: QTable):
    """Name, values and description of all columns that hold one value a source."""
    for name in table.colnames:
        column = table[name]
        about = getattr(column.info, "description", None) or ""
        if isinstance(column, SkyCoord):
            sky = column.icrs
            first = name == "sky_centroid" or "ra" not in table.colnames
            for axis in ("ra", "dec"):
                yield axis if first else f"{name}.{axis}", getattr(sky, axis).to(u.deg), about
        elif column.ndim == 1 and isinstance(column, np.ndarray):
            yield name, column, about


def _shown(known: list[_Column], columns) -> list[dict[str, Any]]:
    """Columns of the table view, with their cells."""
    if columns is None:
        chosen = [c for c in known if not re.fullmatch(r"z\d+(_err)?", c.name)]
        chosen.sort(key=_rank)
        visible = [_rank(c) < len(_FIRST_COLUMNS) for c in chosen]
    else:
        by_name = {c.name: c for c in known}
        names = [n for c in columns for n in (("ra", "dec") if c == "sky_centroid" else (c,))]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ValueError(f"the table has no column {missing[0]!r} with one value a source")
        chosen = [by_name[name] for name in dict.fromkeys(["id", *names])]
        visible = [True] * len(chosen)
    return [
        {
            "name": c.name,
            "unit": c.unit,
            "about": c.about,
            "kind": c.kind,
            "shown": shown,
            "cells": c.cells,
        }
        for c, shown in zip(chosen, visible, strict=True)
    ]


def _rank(column: _Column) -> int:
    """Place in the order of the table view; beyond the last for what is hidden at first."""
    for rank, pattern in enumerate(_FIRST_COLUMNS):
        if re.fullmatch(pattern, column.name):
            return rank
    return len(_FIRST_COLUMNS)


# -- words -------------------------------------------------------------------------------


def _find(known: list[_Column], *patterns: str) -> _Column | None:
    """First column whose name matches the first pattern that any does; never an error."""
    for pattern in patterns:
        for column in known:
            if re.fullmatch(pattern, column.name) and not column.name.endswith("_err"):
                return column
    return None


def _cards(
    result: SceneResult, known: list[_Column], sources, places: _Places
) -> list[dict[str, Any]]:
    """Lines of text of each card: pairs of a label and its value."""
    errors = {c.name.removesuffix("_err"): c for c in known if c.name.endswith("_err")}
    lines = [
        ("mag", _find(known, r"(mag|magnitude)(_\w+)?")),
        ("flux", _find(known, r"flux")),
        ("radius", _find(known, "r_half_arcsec", r"r_\w+_arcsec", "r_half|r_eff|r_50|r_disk")),
        ("model", _find(known, "model")),
        ("class", _find(known, *_CLASS)),
        ("star", _find(known, *_STAR)),
        ("blendedness", _find(known, "blendedness")),
    ]
    sky = _find(known, "ra"), _find(known, "dec")
    flags = _find(known, "flags")
    reasons = result.meta.get("errors") or {}
    cards = []
    for row, k in enumerate(sources):
        texts = [
            [label, _text(column, errors.get(column.name), row)]
            for label, column in lines
            if column is not None
        ]
        texts.append(_position(sky, row, places.xy[k]))
        if str(result.ids[k]) in reasons:
            texts.append(["error", str(reasons[str(result.ids[k])])])
        names = flags.cells[row] if flags is not None else decode_flags(int(result.flags[k]))
        cards.append({"lines": texts, "flags": names or []})
    return cards


def _text(column: _Column, error: _Column | None, row: int) -> str:
    value, unit = column.cells[row], "″" if column.unit == "arcsec" else column.unit
    if value is None:
        return "—"
    if not isinstance(value, float):
        return str(value)
    if error is None and column.unit == "" and abs(value) <= 1:  # a share
        return f"{value:.2f}"
    text = _with_error(value, None if error is None else error.cells[row])
    return text + unit if unit == "″" else f"{text} {unit}".rstrip()


def _with_error(value: float, error: float | None) -> str:
    """A number with its error, to two digits of the error."""
    if error is None or not error > 0:
        return f"{value:.4g}"
    if not 1e-6 <= error < 1e5 or abs(value) >= 1e7:
        return f"{value:.4g} ± {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _position(sky: Sequence[_Column | None], row: int, xy: np.ndarray) -> list[str]:
    cells = [None if axis is None else axis.cells[row] for axis in sky]
    if None not in cells:
        at = SkyCoord(*cells, unit="deg")
        ra = at.ra.to_string("hourangle", sep=":", precision=2, pad=True)
        return ["RA, Dec", f"{ra} {at.dec.to_string(sep=':', precision=1, alwayssign=True)}"]
    return ["x, y", f"{xy[0]:.1f}, {xy[1]:.1f}" if np.isfinite(xy).all() else "—"]


def _colours(result: SceneResult, known: list[_Column], sources) -> list[dict[str, Any]]:
    """Ways to colour the sources of the field: names of groups, and the group of each source."""
    state = np.where(result.failed, 2, np.where(result.flags != 0, 1, 0))
    ways = [_way("flags", ["no flag", "flagged", "failed"], state)]
    model = [type(m).__name__ for m in result.models]
    names = sorted(set(model))
    ways.append(_way("model", names, [names.index(m) for m in model]))
    star = _find(known, *_STAR)
    if star is not None:
        likely = [c == "yes" if isinstance(c, str) else (c or 0) > 0.5 for c in star.cells]
        group = [2 if c is None else int(v) for c, v in zip(star.cells, likely, strict=True)]
        ways.append(_way("star", ["not a star", "star", "unknown"], group, sources, len(result)))
    kind = _find(known, *_CLASS)
    if kind is not None:
        texts = ["unknown" if c is None else str(c) for c in kind.cells]
        names = sorted(set(texts))
        group = [names.index(t) for t in texts]
        ways.append(_way("class", names, group, sources, len(result)))
    added = _find(known, "added")
    if added is not None:
        group = [int(c == "yes") for c in added.cells]
        names = ["detected", "found in the residual"]
        ways.append(_way("detection", names, group, sources, len(result)))
    return [way for way in ways if len(way["names"]) > 1 or way["by"] == "flags"]


def _way(by: str, names: list[str], group, sources=None, count: int = 0) -> dict[str, Any]:
    """One way; sources that the table does not hold are in a group of their own."""
    group = np.asarray(group, dtype=int)
    if sources is not None:
        every = np.full(count, len(names))
        every[sources] = group
        group, names = every, [*names, "not in the table"]
    used = sorted(set(group.tolist()))
    return {
        "by": by,
        "names": [names[g] for g in used],
        "of": [used.index(g) for g in group.tolist()],
    }


@cache
def _flag_meanings() -> dict[str, str]:
    """What each flag means, as its own comment says."""
    try:
        source = inspect.getsource(FitFlag)
    except OSError:  # a frozen application has no source
        return {}
    meanings, comment = {}, []
    for line in source.splitlines():
        line = line.strip()
        if line.startswith("#:"):
            comment.append(line[2:].strip())
        else:
            name = line.split(" = ")[0]
            if comment and name in FitFlag.__members__:
                meanings[name] = " ".join(comment)
            comment = []
    return meanings


def _summary(result: SceneResult, shown: int) -> list[tuple[str, str]]:
    """What the head of the page says."""
    count, meta = len(result), result.meta
    ny, nx = result.data.shape
    flagged, failed = np.count_nonzero(result.flags), np.count_nonzero(result.failed)
    lines = [
        ("image", str(meta.get("images", "")) or "—"),
        ("size", f"{nx} × {ny} pixels"),
        ("sources", f"{count}" if shown == count else f"{shown} shown of {count}"),
        ("groups", str(meta.get("groups", len(set(result.group.tolist()) - {-1})))),
        ("flagged", f"{flagged}, {failed} of them failed" if failed else f"{flagged}"),
    ]
    if (result.inv_sigma > 0).any():
        sigma = 1 / np.median(result.inv_sigma[result.inv_sigma > 0])
        unit = "" if result.data_unit is None else f" {result.data_unit.to_string()}"
        lines.append(("median noise", f"{sigma:.4g}{unit} per pixel"))
    else:
        lines.append(("median noise", "no usable pixel"))
    scale = _pixel_scale(result)
    if scale is not None:
        lines.append(("pixel", f"{scale:.4g}″"))
    lines.append(("PSF FWHM", _psf_width(result.psf, scale)))
    lines.append(("date", str(meta.get("date", "—")).replace("T", " ")))
    lines += [(name, str(meta[name])) for name in ("galmorph", "astropy", "numpy") if name in meta]
    return lines


def _pixel_scale(result: SceneResult) -> float | None:
    """Arcseconds a pixel at the centre."""
    if result.wcs is None:
        return None
    ny, nx = result.data.shape
    found = local_sky(result.wcs, np.array([(nx - 1) / 2]), np.array([(ny - 1) / 2]))
    scale = np.nan if found is None else np.sqrt(np.abs(np.linalg.det(found[1][0])))
    return float(scale) if np.isfinite(scale) else None


def _psf_width(psf: Any, scale: float | None) -> str:
    from galmorph.detection import _width
    from galmorph.psf import PSF

    if psf is None:
        return "no PSF"
    if not isinstance(psf, PSF):
        return type(psf).__name__
    width = _width(psf)
    return f"{width:.2f} pixels" + ("" if scale is None else f", {scale * width:.2f}″")


def _made(result: SceneResult, table: QTable) -> list[tuple[str, str]]:
    """Provenance, of the result and of what the table adds to it."""
    both = dict(result.meta) | dict(table.meta)
    return [(str(k), _plain(v)) for k, v in both.items() if v not in (None, "", {}, [])]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return str(value)


def _definitions(lines: list[tuple[str, str]]) -> str:
    return "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
        for name, text in lines
    )
