"""Many galaxies on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import drawing, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from ..results import FitResult

_GAP = 0.06  # between thumbnails, in widths of a thumbnail


def contact_sheet(
    results: FitResult | Mapping[str, FitResult],
    indices: Sequence[int] | None = None,
    *,
    ncols: int | None = None,
    max_galaxies: int = 48,
    residual_limit: float = 5.0,
) -> Figure:
    """Draw many galaxies as thumbnails: data, then model and residual of each fit.

    Every galaxy has its own stretch, shared by its data and models; the
    residuals of all have one range.  Below each galaxy stand its id, the
    fitted flux (an AB magnitude where the unit of the data has one),
    its signal-to-noise ratio and, in red, its flags, all of the first fit.

    Parameters
    ----------
    results : FitResult, or dict of str to FitResult
        One fit, or fits of the same stamps by the name to be shown.
    indices : sequence of int, optional
        Which galaxies, in the order wanted.  By default the first ones.
    ncols : int, optional
        Galaxies in a row.  By default as many as give a portrait page.
    max_galaxies : int, optional
        Draw no more than this many; the figure says how many were left out.
    residual_limit : float, optional
        Range of the residuals' colours, in σ.

    Returns
    -------
    `~matplotlib.figure.Figure`
        The figure, with one axes for each galaxy, in order, and one for the
        colour bar.

    Raises
    ------
    IndexError
        If one of ``indices`` is out of range.
    ValueError
        If there is nothing to draw, the fits are of different stamps, or
        ``ncols`` or ``max_galaxies`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import galmorph
    >>> from galmorph import plot
    >>> truth = galmorph.GaussianGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, ellip=0.3)
    >>> images = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (4, 32, 32))
    >>> result = galmorph.fit_images(images, galmorph.GaussianGalaxy2D(), uncertainty=1.0)
    >>> figure = plot.contact_sheet(result, [0, 3])
    >>> [len(ax.images) for ax in figure.axes[:2]]
    [3, 3]
    """
    drawing.check_limit(residual_limit)
    results = drawing.as_results(results)
    first = next(iter(results.values()))
    if max_galaxies < 1:
        raise ValueError(f"max_galaxies must be at least 1, got {max_galaxies}")
    wanted = list(range(len(first)) if indices is None else indices)
    if not wanted:
        raise ValueError("no galaxies to draw")
    wanted = [drawing.galaxy_index(first, i) for i in wanted]
    chosen = wanted[:max_galaxies]
    per_galaxy = 1 + 2 * len(results)
    if ncols is None:
        ncols = max(1, 9 // per_galaxy)
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, got {ncols}")

    figure, axes, bar_ax = _page(len(chosen), min(ncols, len(chosen)), per_galaxy)
    for ax, i in zip(axes, chosen, strict=True):
        views = {name: drawing.StampView(result, i) for name, result in results.items()}
        drawing.check_same_stamp(views)
        _draw_galaxy(ax, list(views.values()), residual_limit)
        _caption(ax, first, i)
    for ax in axes[:ncols]:
        _head(ax, list(results))
    _foot(bar_ax, residual_limit, len(wanted) - len(chosen))
    return figure


def _page(n: int, ncols: int, per_galaxy: int) -> tuple[Figure, list[Axes], Axes]:
    """Axes laid out in inches: text keeps its size, so its room must not scale with the page."""
    import matplotlib.pyplot as plt

    nrows = -(-n // ncols)
    width, height = 0.92 * (per_galaxy + _GAP * (per_galaxy - 1)), 0.92
    margin, between, caption, head, foot = 0.15, 0.25, 0.40, 0.28, 0.62
    page = (
        max(2 * margin + ncols * width + (ncols - 1) * between, 3.0),
        head + nrows * (height + caption) + foot,
    )
    figure = plt.figure(figsize=page)

    def add(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / page[0], bottom / page[1], wide / page[0], high / page[1]))

    axes = []
    for k in range(n):
        row, column = divmod(k, ncols)
        top = page[1] - head - row * (height + caption)
        ax = add(margin + column * (width + between), top - height, width, height)
        ax.axis("off")
        ax.set(xlim=(0, per_galaxy + _GAP * (per_galaxy - 1)), ylim=(0, 1))
        axes.append(ax)
    bar_width = min(3.0, page[0] - 2 * margin)
    return figure, axes, add((page[0] - bar_width) / 2, foot - 0.22, bar_width, 0.1)


def _draw_galaxy(ax: Axes, views: list[drawing.StampView], limit: float) -> None:
    from matplotlib.colors import Normalize

    norm = drawing.brightness_norm(views)
    _thumbnail(ax, 0, views[0].data, drawing.BRIGHTNESS_CMAP, norm)
    for k, view in enumerate(views):
        if view.model is None:
            for slot in (2 * k + 1, 2 * k + 2):
                x = slot * (1 + _GAP) + 0.5
                ax.text(x, 0.5, "no fit", ha="center", va="center", fontsize=7, color="0.35")
            continue
        _thumbnail(ax, 2 * k + 1, view.model, drawing.BRIGHTNESS_CMAP, norm)
        residual_norm = Normalize(-limit, limit)
        _thumbnail(ax, 2 * k + 2, view.residual, drawing.RESIDUAL_CMAP, residual_norm)


def _thumbnail(ax: Axes, slot: int, image: np.ndarray, cmap: str, norm: Normalize) -> None:
    """Draw an image in the slot-th unit square, with its own aspect ratio."""
    import matplotlib as mpl

    ny, nx = image.shape
    wide, high = nx / max(nx, ny), ny / max(nx, ny)
    left, bottom = slot * (1 + _GAP) + (1 - wide) / 2, (1 - high) / 2
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(
        image,
        origin="lower",
        extent=(left, left + wide, bottom, bottom + high),
        cmap=mpl.colormaps[cmap].with_extremes(bad=drawing.UNUSED_COLOR),
        norm=norm,
        aspect="auto",
    )
    ax.set(xlim=limits[0], ylim=limits[1])


def _head(ax: Axes, models: list[str]) -> None:
    """Name the columns of thumbnails above a galaxy of the first row."""
    heads = ["data"]
    for model in models:
        heads += [model, "residual"]
    for slot, text in enumerate(heads):
        x = slot * (1 + _GAP) + 0.5
        size = 8 if len(text) <= 12 else 6.5
        ax.text(x, 1.06, text, ha="center", va="bottom", fontsize=size)


def _caption(ax: Axes, result: FitResult, i: int) -> None:
    ax.text(0, -0.05, str(result.ids[i]), va="top", fontsize=8, fontweight="bold", parse_math=False)
    ax.text(ax.get_xlim()[1], -0.05, _flux_text(result, i), ha="right", va="top", fontsize=7.5)
    flags = labels.flag_text(result, i, most=3)
    ax.text(0, -0.20, flags, va="top", fontsize=6.5, color="#b2182b")


def _flux_text(result: FitResult, i: int) -> str:
    """Flux or magnitude and signal-to-noise ratio; empty where the flux is not known."""
    names = list(result.param_names)
    if "flux" not in names:
        return ""
    k = names.index("flux")
    flux = float(result.params[i][k])
    error = float(np.sqrt(result.cov[i][k][k]))  # of this galaxy only: the result may be large
    if not np.isfinite(flux):
        return ""
    text = _magnitude(flux, result.data_unit) or _plain_flux(flux, result.data_unit)
    if not error > 0:  # fixed, or without a covariance
        return text
    ratio = flux / error
    return f"{text}   S/N = " + (f"{ratio:.3g}" if abs(ratio) < 1000 else f"{ratio:.0f}")


def _magnitude(flux: float, unit: object) -> str:
    """AB magnitude; empty where the unit has none or the flux is not positive."""
    from astropy import units as u

    if not (flux > 0 and isinstance(unit, u.UnitBase) and unit.is_equivalent(u.Jy)):
        return ""
    return rf"$m_\mathrm{{AB}}$ = {(flux * unit).to_value(u.ABmag):.2f}"


def _plain_flux(flux: float, unit: object) -> str:
    text = f"{flux:.3g}"
    if "e" in text:
        digits, power = text.split("e")
        text = rf"${digits}\times10^{{{int(power)}}}$"
    return f"F = {text} {labels.unit_text(unit)}".strip()


def _foot(ax: Axes, limit: float, left_out: int) -> None:
    """Colour bar of all residuals, and how many galaxies are not shown."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(-limit, limit), drawing.RESIDUAL_CMAP)
    bar = ax.figure.colorbar(colors, cax=ax, orientation="horizontal", extend="both")
    bar.set_label("Residual [σ]", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if left_out:
        ax.figure.text(
            0.995, 0.005, f"{left_out} more not shown", ha="right", va="bottom", fontsize=7
        )
