"""Which model describes which galaxy, and where one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import drawing, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import ModelComparison
    from ..results import FitResult

#: More galaxies than this are not named one by one.
_MOST_NAMES = 40
#: Odds of 150 to 1, "very strong" by Kass & Raftery (1995).
_STRONG = 5.0


def model_probabilities(comparison: ModelComparison, ax: Axes | None = None) -> Axes:
    """Draw the probability of each model for each galaxy, as a stack.

    Galaxies are grouped by their most probable model, in the order of its probability.  Those
    with a failed fit are left out.

    Parameters
    ----------
    comparison : ModelComparison
        With evidences.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ValueError
        If no galaxy has probabilities.

    Examples
    --------
    >>> import galmorph
    >>> import numpy as np
    >>> from galmorph import plot
    >>> from galmorph.comparison import compare
    >>> truth = galmorph.SersicGalaxy2D(flux=300, x_0=12, y_0=12, r_eff=3, n=2)
    >>> images = truth.render((25, 25)) + np.random.default_rng(1).normal(0, 1, (4, 25, 25))
    >>> models = {"Gaussian": galmorph.GaussianGalaxy2D(), "Sérsic": galmorph.SersicGalaxy2D()}
    >>> results = {k: galmorph.fit_images(images, m, uncertainty=1.0) for k, m in models.items()}
    >>> ax = plot.model_probabilities(compare(results, evidence="laplace"))
    >>> ax.get_ylabel()
    'Probability of the model'
    """
    probability = comparison.probability
    rows = np.flatnonzero(np.isfinite(probability).all(axis=1))
    if not rows.size:
        raise ValueError("no galaxy has probabilities: compare with evidences")
    best = probability[rows].argmax(axis=1)
    rows = rows[np.lexsort((-probability[rows].max(axis=1), best))]
    if ax is None:
        ax = _new_axes()
    place = np.arange(len(rows))
    # Bars of many galaxies are thinner than a line, and would be drawn with gaps.
    gap = 0.08 if len(rows) <= _MOST_NAMES else 0.0
    bottom = np.zeros(len(rows))
    for k, name in enumerate(comparison.names):
        height = probability[rows, k]
        ax.bar(place, height, 1 - gap, bottom, color=_color(k), label=name, linewidth=0)
        bottom += height
    ax.set(xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1), ylabel="Probability of the model")
    if len(rows) <= _MOST_NAMES:
        ax.set_xticks(place, [str(i) for i in comparison.ids[rows]], rotation=90, fontsize="small")
        ax.set_xlabel("Galaxy")
    else:
        ax.set_xlabel("Galaxies by their most probable model")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2)
    return ax


def evidence_differences(
    comparison: ModelComparison, a: str, b: str, ax: Axes | None = None
) -> Axes:
    """Draw the Bayes factors of two models against the S/N of the galaxies.

    The band is that of ln(Z_a / Z_b) within ±5, odds of less than 150 to 1 (Kass &
    Raftery 1995, JASA 90, 773); the axis is linear within ±10 and logarithmic beyond.

    Parameters
    ----------
    comparison : ModelComparison
        With evidences.
    a, b : str
        Names of the models; the S/N is that of the flux by ``a``.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    KeyError
        If there is no such model.
    ValueError
        If there are no evidences.

    Examples
    --------
    >>> import galmorph
    >>> import numpy as np
    >>> from galmorph import plot
    >>> from galmorph.comparison import compare
    >>> truth = galmorph.SersicGalaxy2D(flux=300, x_0=12, y_0=12, r_eff=3, n=2)
    >>> images = truth.render((25, 25)) + np.random.default_rng(1).normal(0, 1, (4, 25, 25))
    >>> models = {"Gaussian": galmorph.GaussianGalaxy2D(), "Sérsic": galmorph.SersicGalaxy2D()}
    >>> results = {k: galmorph.fit_images(images, m, uncertainty=1.0) for k, m in models.items()}
    >>> ax = plot.evidence_differences(compare(results, evidence="laplace"), "Sérsic", "Gaussian")
    >>> ax.get_xlabel()
    'S/N of the flux'
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    value, error = comparison.log_bayes_factor(a, b)
    snr = comparison.snr[:, comparison.index(a)]
    shown = np.isfinite(value) & (snr > 0)
    if ax is None:
        ax = _new_axes()
    ax.axhspan(-_STRONG, _STRONG, color="0.92", zorder=0)
    ax.axhline(0, color="0.5", lw=0.8, zorder=1)
    for name, y, align, better in ((a, 0.98, "top", value > 0), (b, 0.02, "bottom", value <= 0)):
        color, rows = _color(comparison.index(name)), shown & better
        style = {"fmt": "o", "ms": 3.5, "elinewidth": 0.8, "color": color}
        ax.errorbar(snr[rows], value[rows], error[rows], **style)
        ax.text(0.02, y, f"for {name}", color=color, transform=ax.transAxes, va=align)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yscale("symlog", linthresh=2 * _STRONG)
    reach = 2 * max(2 * _STRONG, float(np.abs(value[shown]).max(initial=0.0)))
    ax.set(ylim=(-reach, reach), xlabel="S/N of the flux", ylabel=f"ln Z({a}) − ln Z({b})")
    return ax


def misfit(
    result: FitResult,
    i: int = 0,
    ax: Axes | None = None,
    *,
    smooth: float = 2.0,
    levels: Sequence[float] = (3.0, 5.0, 10.0),
    residual_limit: float = 5.0,
) -> Axes:
    """Draw the residual of a galaxy, and contours around what is significant in it.

    Full contours are light that the model lacks, dashed ones light that it has too
    much of (`galmorph.goodness.misfit_map`).

    Parameters
    ----------
    result : FitResult
    i : int, optional
        Which galaxy; negative numbers count from the end.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.
    smooth : float, optional
        Standard deviation of the Gaussian that smooths the residual, in pixels.
    levels : sequence of float, optional
        Significances of the contours, in standard deviations.
    residual_limit : float, optional
        Range of the residual's colours, in σ.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    IndexError
        If the result holds no galaxy ``i``.
    ValueError
        If an option is not positive, or the result was read from a file.

    Examples
    --------
    >>> import galmorph
    >>> import numpy as np
    >>> from galmorph import plot
    >>> truth = galmorph.SersicGalaxy2D(flux=4000, x_0=15, y_0=16, r_eff=4, n=4)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> ax = plot.misfit(galmorph.fit_images(image, galmorph.GaussianGalaxy2D(), uncertainty=1.0))
    >>> ax.get_xlabel()
    'x [pixel]'
    """
    from ..goodness import misfit_map

    drawing.check_limit(residual_limit)
    levels = sorted(float(level) for level in levels)
    if not levels or not levels[0] > 0:
        raise ValueError(f"levels must be positive, not {levels}")
    view = drawing.StampView(result, i)
    if ax is None:
        ax = _new_axes((5.4, 4.6))
    ax.set_title(f"{labels.galaxy_text(result, view.i)}, {labels.model_name(result)}")
    if view.residual is None:
        drawing.empty_panel(ax, view, "no fit")
        return ax
    shown = drawing.draw_residual(ax, view.residual, view, residual_limit)
    drawing.residual_bar(shown, [ax])
    significance = np.ma.masked_invalid(misfit_map(result, view.i, smooth=smooth))
    x, y = (np.arange(n) + o for n, o in zip(view.shape[::-1], view.origin, strict=True))
    widths = np.linspace(0.8, 1.6, len(levels))
    for sign, style in ((1, "solid"), (-1, "dashed")):
        beyond = [k for k, level in enumerate(levels) if (sign * significance).max() > level]
        if beyond:
            ax.contour(
                x,
                y,
                sign * significance,
                [levels[k] for k in beyond],
                colors="0.05",
                linestyles=style,
                linewidths=[widths[k] for k in beyond],
            )
    ax.set(xlabel="x [pixel]", ylabel="y [pixel]", xlim=view.extent[:2], ylim=view.extent[2:])
    return ax


def _color(k: int) -> str:
    """Colour of a model, the same in all figures of a comparison."""
    return drawing.MODEL_COLORS[k % len(drawing.MODEL_COLORS)]


def _new_axes(size: tuple[float, float] = (6.0, 4.0)) -> Axes:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax
