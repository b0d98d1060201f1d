"""Ranks, coverage and pulls of fits of simulated galaxies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..calibration import JOINT
from . import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..calibration import Calibration

_COLOR = "#31688e"  # from the middle of viridis
_BAND = "0.85"
_PROBABILITY = 0.99  # of the bands
_LINES = 10  # more lines than these have no names of their own
_PULL_LIMIT = 4.0


def rank_histograms(
    calibration: Calibration,
    *,
    bins: int | None = None,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw how often the truth has each rank among draws of its posterior.

    Right posteriors have flat histograms: 99 % of the bars end in the grey (binomial) band.  A U
    means posteriors that are too narrow, a hill too wide, a slope a bias (Talts et al. 2018,
    arXiv:1804.06788).  The last panel is the joint rank of all parameters.

    Parameters
    ----------
    calibration : Calibration
        See `galmorph.calibration.calibrate`.
    bins : int, optional
        By default one for every 20 galaxies, from 2 to 20.
    axes : sequence of `~matplotlib.axes.Axes`, optional
        Where to draw: one for each parameter and one for the joint rank.  By default a new figure
        is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (P + 1,)
        The axes.

    Raises
    ------
    ValueError
        If there are too few or too many axes, the bins are not possible, or all fits failed.

    Examples
    --------
    >>> from galmorph import GaussianGalaxy2D, plot
    >>> from galmorph.calibration import calibrate
    >>> model = GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.4)
    >>> axes = plot.rank_histograms(calibrate(model, prior={}, shape=(32, 32), n=40))
    >>> len(axes)
    7
    """
    from scipy.stats import binom

    counts, probability = calibration.rank_counts(bins)
    number = counts[0].sum()
    low, middle, high = binom.ppf(
        [[0.5 - 0.5 * _PROBABILITY], [0.5], [0.5 + 0.5 * _PROBABILITY]], number, probability
    )
    # the band holds the whole bars of its first and last number
    low, high = np.maximum(low - 0.5, 0), high + 0.5
    edges = np.append(0, np.cumsum(probability))
    axes = _panels(axes, len(counts))
    for ax, bars, text in zip(axes, counts, _symbols(calibration), strict=True):
        ax.stairs(high, edges, baseline=low, fill=True, color=_BAND)
        ax.stairs(middle, edges, baseline=None, color="0.5", lw=0.8, ls="--")
        ax.stairs(bars, edges, baseline=None, color=_COLOR, lw=1.6)
        ax.set(xlim=(0, 1), ylim=(0, 1.2 * max(counts.max(), high.max())), title=text)
        ax.set_xticks([0, 0.5, 1])
    _label_outer(axes, "Rank of the truth (as a fraction)", "Galaxies")
    return axes


def coverage(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """Draw how often intervals of the posterior hold the truth, against how often they should.

    A line above the diagonal means posteriors that are too wide, below it too narrow.  The grey
    band holds 99 % of the right ones, at each level.  Lines of single parameters are central
    intervals; the black one is the joint region of all.  Of more than ten parameters those that
    are farthest off are named.

    Parameters
    ----------
    calibration : Calibration
        See `galmorph.calibration.calibrate`.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ValueError
        If all fits failed.

    Examples
    --------
    >>> from galmorph import GaussianGalaxy2D, plot
    >>> from galmorph.calibration import calibrate
    >>> model = GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.4)
    >>> ax = plot.coverage(calibrate(model, prior={}, shape=(32, 32), n=40))
    >>> ax.get_xlabel()
    'Probability of the interval'
    """
    from matplotlib import colormaps
    from scipy.stats import binom

    levels = np.linspace(0.02, 0.98, 49)
    table = calibration.coverage(levels)
    found = np.asarray(table["coverage"]).reshape(-1, len(levels))
    number = int(calibration.used.sum())
    tails = np.array([[0.5 - 0.5 * _PROBABILITY], [0.5 + 0.5 * _PROBABILITY]])
    band = binom.ppf(tails, number, levels) / number
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(5.4, 5), layout="constrained")
    ax.fill_between(levels, *band, color=_BAND, lw=0)
    ax.plot([0, 1], [0, 1], color="0.5", lw=0.8, ls="--")
    *single, joint = zip(found, _symbols(calibration), strict=True)
    farthest = np.argsort([-np.abs(line - levels).max() for line, _ in single])
    named = sorted(farthest[:_LINES])
    for k, (line, text) in enumerate(single):
        if k in named:
            color = colormaps["viridis"](0.95 * named.index(k) / max(len(named) - 1, 1))
            ax.plot(levels, line, color=color, lw=1.4, label=text)
        else:
            ax.plot(levels, line, color="0.6", lw=0.7)
    ax.plot(levels, joint[0], color="k", lw=1.8, label=joint[1])
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set(xlabel="Probability of the interval", ylabel="Fraction that hold the truth")
    ax.legend(fontsize="small", frameon=False, loc="upper left")
    return ax


def pulls(calibration: Calibration, *, axes: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the errors of the fits in units of the stated standard deviations.

    The line is the unit normal distribution, which they follow where posteriors are right and
    normal.  Pulls beyond ±4 are counted in the first and the last bar.  Each panel says the
    median and half of the interval that holds 68 % of the pulls.

    Parameters
    ----------
    calibration : Calibration
        See `galmorph.calibration.calibrate`.
    axes : sequence of `~matplotlib.axes.Axes`, optional
        Where to draw, one for each parameter.  By default a new figure is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (P,)
        The axes.

    Raises
    ------
    ValueError
        If there are too few or too many axes, or all fits failed.

    Examples
    --------
    >>> from galmorph import GaussianGalaxy2D, plot
    >>> from galmorph.calibration import calibrate
    >>> model = GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.4)
    >>> axes = plot.pulls(calibrate(model, prior={}, shape=(32, 32), n=40))
    >>> len(axes)
    6
    """
    summary = calibration.to_table()
    values = np.clip(calibration.pulls[calibration.used], -_PULL_LIMIT, _PULL_LIMIT)
    number, count = values.shape
    edges = np.linspace(-_PULL_LIMIT, _PULL_LIMIT, int(np.clip(np.sqrt(number), 8, 40)) + 1)
    x = np.linspace(-_PULL_LIMIT, _PULL_LIMIT, 201)
    normal = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi) * number * (edges[1] - edges[0])
    axes = _panels(axes, count)
    for k, (ax, text) in enumerate(zip(axes, _symbols(calibration), strict=False)):
        bars, _ = np.histogram(values[:, k], edges)
        ax.stairs(bars, edges, fill=True, color=_COLOR, alpha=0.3)
        ax.stairs(bars, edges, color=_COLOR, lw=1.2)
        ax.plot(x, normal, color="k", lw=1)
        moments = labels.value_text(summary["bias"][k], summary["scatter"][k])
        ax.set_title(f"{text}: {moments}", fontsize="medium")
        ax.set(xlim=(-_PULL_LIMIT, _PULL_LIMIT), ylim=(0, None), xticks=[-3, 0, 3])
    _label_outer(axes, "(fit − truth) / σ", "Galaxies")
    return axes


def _symbols(calibration: Calibration) -> list[str]:
    """Names of the parameters as they are written on figures, and of the joint rank."""
    return [*(labels.parameter_symbol(name) for name in calibration.param_names), JOINT]


def _panels(axes: Sequence[Axes] | None, count: int) -> np.ndarray:
    """Axes of so many panels, new ones if there are none."""
    if axes is None:
        import matplotlib.pyplot as plt

        columns = int(min(count, 4 if count <= 16 else 6))
        rows = -(-count // columns)
        _, grid = plt.subplots(
            rows,
            columns,
            figsize=(2.3 * columns + 0.5, 1.9 * rows + 0.5),
            squeeze=False,
            layout="constrained",
        )
        for ax in grid.flat[count:]:
            ax.remove()
        return grid.ravel()[:count]
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != count:
        raise ValueError(f"axes must be {count} axes, got {len(axes)}")
    return axes


def _label_outer(axes: np.ndarray, x: str, y: str) -> None:
    """One label for each direction of the whole figure, where the axes are alone in it."""
    figure = axes[0].figure
    if set(figure.axes) == set(axes) and len(axes) > 1:
        figure.supxlabel(x, fontsize="medium")
        figure.supylabel(y, fontsize="medium")
    else:
        for ax in axes:
            ax.set(xlabel=x, ylabel=y)
