"""What the figures share: the view of one fitted stamp and how its panels are drawn."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import labels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage

    from ..results import FitResult

BRIGHTNESS_CMAP = "viridis"
RESIDUAL_CMAP = "RdBu_r"
UNUSED_COLOR = "0.82"
HATCH_COLOR = "0.55"
# Colour-blind safe (Okabe & Ito), dark enough for thin lines on white.
MODEL_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Not dotted: dotted lines mark radii.
MODEL_STYLES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Ellipse:
    """A half-light ellipse in parent-image pixels; ``a`` is 0 for a point."""

    label: str
    x_0: float
    y_0: float
    a: float
    ellip: float
    theta: float


class StampView:
    """One galaxy of a result, ready to be drawn.

    Parameters
    ----------
    result : FitResult
        The fit.
    i : int
        Which galaxy; negative numbers count from the end.

    Attributes
    ----------
    used : ndarray of bool, shape (ny, nx)
        Pixels that entered the fit.
    data : masked ndarray, shape (ny, nx)
        Data without the background; unused pixels are masked.
    subtracted : str
        What was taken off the data: "background" (the fitted one), "median" (of the
        used pixels, where the fit failed to give one) or "" (the fit had none).
    model : ndarray, shape (ny, nx), or None
        Model without the background; None where the fit failed.
    inv_sigma : ndarray, shape (ny, nx)
        One over the uncertainty, 0 where not used.
    origin : ndarray of float, shape (2,)
        (x, y) of the stamp's pixel (0, 0) in the parent image.
    """

    def __init__(self, result: FitResult, i: int) -> None:
        self.i = galaxy_index(result, i)
        self.result = result
        data, inv_sigma, model = result.stamp(self.i)
        data = np.asarray(data, dtype=float)
        inv_sigma = np.asarray(inv_sigma, dtype=float)
        self.used = np.isfinite(data) & np.isfinite(inv_sigma) & (inv_sigma > 0)
        self.inv_sigma = np.where(self.used, inv_sigma, 0.0)
        self.origin = np.asarray(result.origin[self.i], dtype=float)

        sky, self.subtracted = self._sky(data)
        self.data = np.ma.masked_array(data - sky, mask=~self.used)
        self.model = None
        if model is not None and np.all(np.isfinite(model)):
            self.model = np.asarray(model, dtype=float) - sky

    def _sky(self, data: np.ndarray) -> tuple[np.ndarray | float, str]:
        background = np.asarray(self.result.background[self.i], dtype=float)
        if background.size == 0:
            return 0.0, ""
        if not np.all(np.isfinite(background)):
            return (float(np.median(data[self.used])), "median") if self.used.any() else (0.0, "")
        if background.size == 1:
            return float(background[0]), "background"
        ny, nx = data.shape
        y, x = np.indices(data.shape)
        constant, slope_x, slope_y = background
        plane = constant + slope_x * (x - (nx - 1) / 2) + slope_y * (y - (ny - 1) / 2)
        return plane, "background"

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    @property
    def data_title(self) -> str:
        """Title of a panel that shows the data."""
        return f"Data − {self.subtracted}" if self.subtracted else "Data"

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Outer borders of the stamp (left, right, bottom, top) in parent-image pixels."""
        ny, nx = self.shape
        x, y = self.origin
        return (x - 0.5, x + nx - 0.5, y - 0.5, y + ny - 0.5)

    @cached_property
    def residual(self) -> np.ma.MaskedArray | None:
        """(data - model) / sigma; None where there is no model."""
        return None if self.model is None else (self.data - self.model) * self.inv_sigma

    @cached_property
    def parameters(self) -> dict[str, float]:
        names = self.result.param_names
        values = dict(zip(names, map(float, np.asarray(self.result.params[self.i])), strict=True))
        derive = getattr(self.result.model, "derived", None)
        params = np.asarray(self.result.params[self.i])[None]
        derived = derive(params, np.zeros_like(params)) if derive else {}
        return values | {name: float(value[0]) for name, (value, _) in derived.items()}

    @cached_property
    def ellipses(self) -> list[Ellipse]:
        """Half-light ellipse of each component; empty where the parameters are not finite."""
        p = self.parameters
        found = []
        for size, suffix, label in (
            ("r_eff", "", ""),
            ("r_50", "", ""),
            ("r_disk", "_disk", "disk"),
            ("r_bulge", "_bulge", "bulge"),
        ):
            if size in p:
                shape = (p[size], p.get(f"ellip{suffix}", 0.0), p.get(f"theta{suffix}", 0.0))
                found.append(Ellipse(label, p["x_0"], p["y_0"], *shape))
        if not found:
            found.append(Ellipse("", p.get("x_0", np.nan), p.get("y_0", np.nan), 0.0, 0.0, 0.0))
        # A size or ellipticity beyond its physical range can only come from an unbounded fit.
        return [
            e
            for e in found
            if np.all(np.isfinite([e.x_0, e.y_0, e.a, e.theta])) and 0 <= e.ellip < 1
        ]


def galaxy_index(result: FitResult, i: int) -> int:
    """Validate the number of a galaxy; negative numbers count from the end."""
    i, n = operator.index(i), len(result)
    if not -n <= i < n:
        raise IndexError(f"galaxy {i} is out of range: the result holds {n}")
    return i % n


def as_results(results: FitResult | Mapping[str, FitResult]) -> dict[str, FitResult]:
    """One result or a dictionary of them as a dictionary, by the name of the model."""
    if not hasattr(results, "items"):
        return {type(results.model).__name__: results}
    if not results:
        raise ValueError("the dictionary of results is empty")
    if len({len(result) for result in results.values()}) > 1:
        raise ValueError(
            "the results hold different numbers of galaxies: "
            + ", ".join(f"{name!r} {len(result)}" for name, result in results.items())
        )
    return dict(results)


def check_same_stamp(views: Mapping[str, StampView]) -> None:
    """Refuse to compare fits of different stamps."""
    if len({(*view.shape, *view.origin) for view in views.values()}) > 1:
        raise ValueError(f"the fits {list(views)} are of different stamps (shape or origin)")


def brightness_norm(views: list[StampView]) -> Normalize:
    """Asinh stretch for data and models: linear in the noise, logarithmic above it."""
    from matplotlib.colors import AsinhNorm

    view = views[0]
    values = view.data.compressed()
    if values.size == 0:
        return AsinhNorm(linear_width=1.0, vmin=-1.0, vmax=1.0)
    sigma = float(np.median(1 / view.inv_sigma[view.used]))
    # A hot pixel must not set the scale, but the galaxy's own peak may.
    top = float(np.percentile(values, 99.8))
    top = max([top, *(float(v.model.max()) for v in views if v.model is not None)])
    low = max(float(values.min()), -3 * sigma)
    if not top > low:
        low, top = low - sigma, low + sigma
    return AsinhNorm(linear_width=3 * sigma, vmin=low, vmax=max(top, low + 3 * sigma))


def draw_image(
    ax: Axes, image: np.ndarray, view: StampView, *, cmap: str, norm: Normalize
) -> AxesImage:
    """Draw an image of the stamp; its masked pixels become grey and hatched."""
    import matplotlib as mpl

    colors = mpl.colormaps[cmap].with_extremes(bad=UNUSED_COLOR)
    drawn = ax.imshow(
        image,
        origin="lower",
        extent=view.extent,
        cmap=colors,
        norm=norm,
        interpolation="none",  # pixels stay pixels in vector output too
    )
    if np.ma.is_masked(image):
        ax.add_patch(_hatch(np.ma.getmaskarray(image), view.origin))
    return drawn


def draw_brightness(ax: Axes, image: np.ndarray, view: StampView, norm: Normalize) -> AxesImage:
    return draw_image(ax, image, view, cmap=BRIGHTNESS_CMAP, norm=norm)


def draw_residual(ax: Axes, image: np.ndarray, view: StampView, limit: float) -> AxesImage:
    from matplotlib.colors import Normalize

    return draw_image(ax, image, view, cmap=RESIDUAL_CMAP, norm=Normalize(-limit, limit))


def draw_ellipses(ax: Axes, view: StampView, color: str) -> None:
    """Overlay the half-light ellipses; a cross for a point."""
    from matplotlib import patheffects
    from matplotlib.patches import Ellipse as EllipsePatch

    # White alone is lost on the bright centre of a galaxy.
    outline = [patheffects.withStroke(linewidth=1.8, foreground="0.1")] if color == "white" else []
    for ellipse, style in zip(view.ellipses, MODEL_STYLES, strict=False):
        if ellipse.a == 0:
            ax.plot(ellipse.x_0, ellipse.y_0, "+", color=color, ms=8, mew=0.8, path_effects=outline)
            continue
        patch = EllipsePatch(
            (ellipse.x_0, ellipse.y_0),
            2 * ellipse.a,
            2 * ellipse.a * (1 - ellipse.ellip),
            angle=np.degrees(ellipse.theta),
            fill=False,
            edgecolor=color,
            linewidth=0.8,
            linestyle=style,
            path_effects=outline,
            label=f"half light, {ellipse.label}".rstrip(", "),
        )
        ax.add_patch(patch)
    # An ellipse larger than the stamp must not zoom the panel out.
    ax.set(xlim=view.extent[:2], ylim=view.extent[2:])


def draw_note(ax: Axes, text: str) -> None:
    """Words in place of an image that does not exist."""
    ax.set_facecolor("0.95")
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.35")


def empty_panel(ax: Axes, view: StampView, text: str) -> None:
    """A panel of the stamp's size that only holds a note."""
    ax.set(xlim=view.extent[:2], ylim=view.extent[2:], aspect="equal")
    draw_note(ax, text)


def brightness_bar(image: AxesImage, axes: list[Axes], unit: object) -> Colorbar:
    """Colour bar of data and models beside the last axes, open where the data exceed it."""
    values = np.ma.masked_invalid(image.get_array()).compressed()
    extend = _extend(values, image.norm.vmin, image.norm.vmax)
    bar = axes[-1].figure.colorbar(image, ax=axes[-1], extend=extend)
    set_asinh_ticks(bar, image.norm)
    bar.set_label(labels.with_unit("Brightness", labels.unit_text(unit)))
    return bar


def set_asinh_ticks(bar: Colorbar, norm: Normalize, *, gap: float = 0.09) -> None:
    """Ticks of a colour bar with an asinh stretch, each a fraction ``gap`` from the last."""
    ticks = _asinh_ticks(norm, gap)
    if len(ticks) > 2:
        bar.set_ticks(ticks, labels=[_tick_text(tick) for tick in ticks])
    else:  # a narrow range far from zero: the stretch is linear there
        from matplotlib.ticker import MaxNLocator

        ticks = MaxNLocator(5).tick_values(norm.vmin, norm.vmax)[1:-1]
        bar.set_ticks(ticks, labels=[f"{tick:.6g}".replace("-", "−") for tick in ticks])
    bar.minorticks_off()


def _asinh_ticks(norm: Normalize, gap: float = 0.09) -> list[float]:
    """Zero, then 1, 3, 10, 30 … both ways, each a fraction ``gap`` of the bar from the last.

    Matplotlib's own choice for this stretch writes its labels over each other
    about zero.
    """
    reach = max(abs(norm.vmin), abs(norm.vmax))
    decades = 10.0 ** np.arange(np.floor(np.log10(reach)) - 6, np.ceil(np.log10(reach)) + 1)
    # Powers of ten first: the threes only fill what room is left.
    steps = [*decades[::-1], *(3 * decades[::-1])]
    ticks = []
    for tick in [0.0, *steps, *(-step for step in steps)]:
        if norm.vmin <= tick <= norm.vmax and all(
            abs(float(norm(tick)) - float(norm(other))) >= gap for other in ticks
        ):
            ticks.append(float(tick))
    return sorted(ticks)


def _tick_text(value: float) -> str:
    """A tick of the form 0, ±1·10^k or ±3·10^k, with a power where it is shorter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    digit, power = f"{abs(value):.0e}".split("e")
    sign = "-" if value < 0 else ""
    factor = "" if digit == "1" else rf"{digit}\times"
    return rf"${sign}{factor}10^{{{int(power)}}}$"


def residual_bar(image: AxesImage, axes: list[Axes]) -> Colorbar:
    """Colour bar of residuals beside the last axes, open where an image exceeds it."""
    images = [drawn.get_array() for ax in axes for drawn in ax.images]
    values = np.concatenate([np.ma.masked_invalid(values).compressed() for values in images])
    extend = _extend(values, image.norm.vmin, image.norm.vmax)
    bar = axes[-1].figure.colorbar(image, ax=axes[-1], extend=extend)
    bar.set_label("Residual [σ]")
    return bar


def check_limit(limit: float) -> None:
    """Validate the range of the residual's colours."""
    if not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"residual_limit must be positive, got {limit}")


def _extend(values: np.ndarray, low: float, high: float) -> str:
    """Which ends of a colour bar are open."""
    ends = bool(np.any(values < low)), bool(np.any(values > high))
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[ends]


def _hatch(mask: np.ndarray, origin: np.ndarray) -> object:
    """One hatched patch over all masked pixels, made of a rectangle for each run in a row."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(padded, axis=1)
    row, start = np.nonzero(steps == 1)
    _, stop = np.nonzero(steps == -1)
    left, right = start - 0.5 + origin[0], stop - 0.5 + origin[0]
    low, high = row - 0.5 + origin[1], row + 0.5 + origin[1]
    x = np.stack([left, right, right, left, left], axis=1)
    y = np.stack([low, low, high, high, low], axis=1)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(row)
    path = Path(np.stack([x.ravel(), y.ravel()], axis=1), codes)
    # The hatch takes the colour of the edge, and the edge itself has no width.
    return PathPatch(
        path, facecolor="none", edgecolor=HATCH_COLOR, hatch="////", linewidth=0, zorder=1
    )
