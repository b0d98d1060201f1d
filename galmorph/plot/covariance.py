"""Posteriors of the parameters, two at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import drawing, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..results import FitResult

_REACH = 3.2  # half width of every panel in standard deviations
_COLOR = "#31688e"  # from the middle of viridis
_RGB = (0x31 / 255, 0x68 / 255, 0x8E / 255)
_BINS = 30
# draws (S, P) and their weights (S,)
_Cloud = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Parameter:
    """A parameter in the unit in which it is drawn."""

    index: int
    scale: float
    value: float
    error: float
    symbol: str
    unit: str


def corner(
    result: FitResult,
    i: int = 0,
    *,
    params: Sequence[str] | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw the posterior of one galaxy's parameters as a corner plot.

    Of a normal posterior the diagonal shows each parameter's marginal with its
    ±1 σ, and the panels below it show the ellipses of 1 σ and 2 σ, whose shadows
    on the axes are the ±1 σ and ±2 σ of each parameter (they hold 39 % and 86 % of
    the joint probability).  Of draws it shows histograms, with the central 68 %,
    and the regions of highest density that hold as much.  Parameters without variance
    (fixed or tied) are left out.  Angles are drawn in degrees.

    Parameters
    ----------
    result : FitResult
        The fit.
    i : int, optional
        Which galaxy; negative numbers count from the end.
    params : sequence of str, optional
        Names of the parameters, in the order wanted.  By default all.
    fig : `~matplotlib.figure.Figure`, optional
        An empty figure to draw in.  By default a new one is made.

    Returns
    -------
    `~matplotlib.figure.Figure`
        The figure.  A galaxy without a covariance gives a figure with a note.

    Raises
    ------
    IndexError
        If the result holds no galaxy ``i``.
    ValueError
        If ``params`` names a parameter that the model does not have.

    Examples
    --------
    >>> import numpy as np
    >>> import galmorph
    >>> from galmorph import plot
    >>> truth = galmorph.GaussianGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, ellip=0.3)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> result = galmorph.fit_images(image, galmorph.GaussianGalaxy2D(), uncertainty=1.0)
    >>> figure = plot.corner(result, params=["flux", "r_eff", "ellip"])
    >>> len(figure.axes)
    6
    """
    i = drawing.galaxy_index(result, i)
    shown = _parameters(result, i, params)
    if fig is None:
        import matplotlib.pyplot as plt

        side = 1.35 * max(len(shown), 2) + 1.0
        fig = plt.figure(figsize=(side, side), layout="constrained")
    if not shown:
        ax = fig.subplots()
        ax.set(xticks=[], yticks=[])
        drawing.draw_note(ax, f"{labels.galaxy_text(result, i)}: no covariance")
        return fig

    cov = np.asarray(result.cov[i], dtype=float)
    cloud = None
    if "samples" in getattr(result, "extra", {}):
        posterior = result[i].posterior
        cloud = posterior.samples[0], posterior.weights[0]
    axes = fig.subplots(len(shown), len(shown), sharex="col", squeeze=False)
    for row, below in enumerate(shown):
        for column, left in enumerate(shown):
            ax = axes[row, column]
            if column > row:
                ax.remove()
            elif column == row:
                _draw_marginal(ax, left, cloud)
            elif cloud is not None:
                _draw_cloud(ax, left, below, cloud)
            else:
                joint = cov[left.index, below.index] * left.scale * below.scale
                _draw_joint(ax, left, below, joint)
            if column <= row:
                _label_axes(ax, left, below, bottom=row == len(shown) - 1, side=column == 0 < row)
    fig.align_labels()
    return fig


def _parameters(result: FitResult, i: int, names: Sequence[str] | None) -> list[_Parameter]:
    known = list(result.param_names)
    names = known if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no parameters named {unknown}; the model has {known}")
    values = np.asarray(result.params[i], dtype=float)
    variances = np.diagonal(np.asarray(result.cov[i], dtype=float))
    found = []
    for name in names:
        index = known.index(name)
        value, variance = values[index], variances[index]
        if not (np.isfinite(value) and np.isfinite(variance) and variance > 0):
            continue
        scale, unit = 1.0, labels.parameter_unit(name, result)
        if unit == "deg":
            scale = 180 / np.pi
        else:
            # Ticks have no room for many zeros: a power of ten goes to the unit.
            power = 3 * int(np.floor(np.log10(max(abs(value), np.sqrt(variance))) / 3))
            if power not in (-3, 0, 3):
                scale = 10.0**-power
                unit = rf"$10^{{{power}}}$ {unit}".strip()
        found.append(
            _Parameter(
                index,
                scale,
                value * scale,
                float(np.sqrt(variance)) * scale,
                labels.parameter_symbol(name),
                unit,
            )
        )
    return found


def _edges(parameter: _Parameter) -> np.ndarray:
    reach = _REACH * parameter.error
    return np.linspace(parameter.value - reach, parameter.value + reach, _BINS + 1)


def _draw_marginal(ax: Axes, parameter: _Parameter, cloud: _Cloud | None) -> None:
    if cloud is None:
        offset = np.linspace(-_REACH, _REACH, 201)
        density = np.exp(-0.5 * offset**2)
        x = parameter.value + offset * parameter.error
        ax.fill_between(x, density, where=np.abs(offset) <= 1, color=_COLOR, alpha=0.3, lw=0)
        ax.plot(x, density, color=_COLOR, lw=1.5)
    else:
        samples, weights = cloud[0][:, parameter.index] * parameter.scale, cloud[1]
        edges = _edges(parameter)
        density, _ = np.histogram(samples, edges, weights=weights)
        density = density / max(density.max(), 1e-300)
        order = np.argsort(samples)
        share = np.cumsum(weights[order])
        low, high = np.interp([0.16, 0.84], share / share[-1], samples[order])
        ax.axvspan(low, high, color=_COLOR, alpha=0.25, lw=0)
        ax.stairs(density, edges, color=_COLOR, lw=1.5)
    ax.axvline(parameter.value, color="0.3", lw=0.8, ls="--")
    ax.set_ylim(0, 1.15)
    value = labels.value_text(parameter.value, parameter.error)
    ax.set_title(f"{_axis_label(parameter)}\n{value}", fontsize="small")


def _draw_joint(ax: Axes, x: _Parameter, y: _Parameter, joint: float) -> None:
    angle = np.linspace(0, 2 * np.pi, 181)
    # The ellipse of correlation rho, drawn with the Cholesky factor of [[1, rho], [rho, 1]].
    rho = float(np.clip(joint / (x.error * y.error), -1, 1))
    across = rho * np.cos(angle) + np.sqrt(1 - rho**2) * np.sin(angle)
    for radius, alpha in ((2, 0.2), (1, 0.4)):
        ellipse_x = x.value + radius * x.error * np.cos(angle)
        ellipse_y = y.value + radius * y.error * across
        ax.fill(ellipse_x, ellipse_y, color=_COLOR, alpha=alpha, lw=0)
        ax.plot(ellipse_x, ellipse_y, color=_COLOR, lw=1)
    ax.plot(x.value, y.value, "+", color="0.2", ms=6, mew=0.9)
    ax.set_ylim(y.value - _REACH * y.error, y.value + _REACH * y.error)


def _draw_cloud(ax: Axes, x: _Parameter, y: _Parameter, cloud: _Cloud) -> None:
    from scipy.ndimage import gaussian_filter

    samples, weights = cloud
    edges = [_edges(p) for p in (y, x)]
    values = [samples[:, p.index] * p.scale for p in (y, x)]
    density, _, _ = np.histogram2d(*values, bins=edges, weights=weights)
    density = gaussian_filter(density, 1.0)
    middle = [0.5 * (e[1:] + e[:-1]) for e in edges]
    falling = np.sort(density.ravel())[::-1]
    share = np.cumsum(falling) / max(falling.sum(), 1e-300)
    levels = [
        float(falling[min(np.searchsorted(share, s), falling.size - 1)]) for s in (0.86, 0.39)
    ]
    if 0 < levels[0] < levels[1] < falling[0]:
        colors = [(*_RGB, 0.2), (*_RGB, 0.5)]
        ax.contourf(middle[1], middle[0], density, [*levels, falling[0]], colors=colors)
        ax.contour(middle[1], middle[0], density, levels, colors=_COLOR, linewidths=1)
    else:
        ax.plot(values[1], values[0], ".", color=_COLOR, ms=1)
    ax.plot(x.value, y.value, "+", color="0.2", ms=6, mew=0.9)
    ax.set_ylim(edges[0][0], edges[0][-1])


def _label_axes(ax: Axes, x: _Parameter, y: _Parameter, *, bottom: bool, side: bool) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    ax.set_xlim(x.value - _REACH * x.error, x.value + _REACH * x.error)
    on_diagonal = x is y
    for axis in (ax.xaxis,) if on_diagonal else (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, prune="both"))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    if on_diagonal:
        ax.set_yticks([])
    ax.tick_params(labelsize="small", labelbottom=bottom, labelleft=side and not on_diagonal)
    if bottom:
        for text in ax.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
        ax.set_xlabel(_axis_label(x), fontsize=_label_size(x))
    if side:
        ax.set_ylabel(_axis_label(y), fontsize=_label_size(y))


def _axis_label(parameter: _Parameter) -> str:
    return labels.with_unit(parameter.symbol, parameter.unit)


def _label_size(parameter: _Parameter) -> str:
    # A compound unit is longer than a panel is wide.
    return "medium" if len(parameter.unit) < 24 else "x-small"
