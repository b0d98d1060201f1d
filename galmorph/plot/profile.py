"""Brightness against radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import profiles
from . import drawing, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..results import FitResult


def radial_profile(
    results: FitResult | Mapping[str, FitResult],
    i: int = 0,
    *,
    ax: Axes | Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw the mean brightness of data and model against the semi-major axis.

    Data and models are averaged over the same used pixels of the same
    elliptical annuli, after the fitted background was subtracted, so PSF and
    masks act on both alike.  The annuli follow the first fit that succeeded
    (the disk where there is one; circles for a point source), and the data are
    drawn with that fit's background.  Error bars come from the uncertainty of
    the pixels.  A dotted line marks each half-light radius.

    Parameters
    ----------
    results : FitResult, or dict of str to FitResult
        One fit, or fits of the same stamps by the name to be shown.
    i : int, optional
        Which galaxy; negative numbers count from the end.
    ax : `~matplotlib.axes.Axes`, or two of them, optional
        Where to draw: one axes gets the profile only, two get the profile and
        the residuals.  By default a new figure with both is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (2,) or (1,)
        The axes of the profile and, unless a single ``ax`` was given, of the
        residuals.

    Raises
    ------
    IndexError
        If there is no galaxy ``i``.
    ValueError
        If the fits are of different stamps, or ``ax`` is not one or two axes.

    See Also
    --------
    galmorph.profiles.radial_profile : the means that are drawn.

    Examples
    --------
    >>> import numpy as np
    >>> import galmorph
    >>> from galmorph import plot
    >>> truth = galmorph.GaussianGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, ellip=0.3)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> result = galmorph.fit_images(image, galmorph.GaussianGalaxy2D(), uncertainty=1.0)
    >>> profile_ax, residual_ax = plot.radial_profile(result)
    >>> residual_ax.get_xlabel()
    'Semi-major axis [pixel]'
    """
    results = drawing.as_results(results)
    views = {name: drawing.StampView(result, i) for name, result in results.items()}
    drawing.check_same_stamp(views)
    axes = _axes(ax)
    fitted = {
        name: view for name, view in views.items() if view.ellipses and view.model is not None
    }
    first = next(iter((fitted or views).values()))

    center = _center(first)
    data = profiles.radial_profile(first.data.filled(np.nan), first.inv_sigma, *center)
    axes[0].errorbar(
        data.a, data.mean, data.err, fmt="o", ms=4, color="black", elinewidth=1, label="Data"
    )
    models, sigmas = [], []
    for k, (name, view) in enumerate(fitted.items()):
        color = drawing.MODEL_COLORS[k % len(drawing.MODEL_COLORS)]
        style = drawing.MODEL_STYLES[k % len(drawing.MODEL_STYLES)]
        model = profiles.radial_profile(view.model, view.inv_sigma, *center)
        models.append(model)
        axes[0].plot(
            model.a, model.mean, color=color, ls=style, lw=1.5, label=_legend(name, view), zorder=3
        )
        for ellipse in view.ellipses:
            if 0 < ellipse.a < data.a.max(initial=0):
                axes[0].axvline(ellipse.a, color=color, ls=":", lw=0.9, zorder=0)
        if len(axes) == 2:
            own = profiles.radial_profile(view.data.filled(np.nan), view.inv_sigma, *center)
            sigmas.append((own.mean - model.mean) / own.err)
            axes[1].plot(own.a, sigmas[-1], "o", ms=3.5, color=color, ls=style, lw=0.8)

    _scale_brightness(axes[0], data, models)
    if sigmas:
        _scale_residual(axes[1], sigmas)
    axes[0].set_ylabel(labels.brightness_label(first.result.data_unit))
    if data.a.size:
        _draw_legend(axes[0])
    axes[-1].set_xlabel("Semi-major axis [pixel]")
    axes[-1].set_xlim(left=0)
    name = labels.galaxy_text(first.result, first.i)
    title = name if fitted else f"{name}, no fit: circles about the stamp's centre"
    axes[0].set_title(title, fontsize="medium")
    if not fitted:
        for empty in axes[1:] if data.a.size else axes:
            empty.set_yticks([])
            drawing.draw_note(empty, "no fit" if data.a.size else "no usable pixels")
    return axes


def _axes(ax: Axes | Sequence[Axes] | None) -> np.ndarray:
    if ax is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(
            2,
            1,
            figsize=(5.5, 5.2),
            sharex=True,
            height_ratios=(3, 1),
            layout="constrained",
        )
        return axes
    axes = np.atleast_1d(np.asarray(ax, dtype=object))
    if axes.shape not in ((1,), (2,)):
        raise ValueError(f"ax must be one axes or two, got shape {axes.shape}")
    return axes


def _center(view: drawing.StampView) -> tuple[float, float, float, float]:
    """Centre in stamp pixels, ellipticity and angle of the annuli."""
    if not view.ellipses:
        ny, nx = view.shape
        return (nx - 1) / 2, (ny - 1) / 2, 0.0, 0.0
    ellipse = view.ellipses[0]
    x, y = view.origin
    return ellipse.x_0 - x, ellipse.y_0 - y, ellipse.ellip, ellipse.theta


def _legend(name: str, view: drawing.StampView) -> str:
    ratio = labels.reduced_chi2_text(view.result, view.i)
    return f"{name}, {ratio}" if ratio else name


def _draw_legend(ax: Axes) -> None:
    """Legend with the data first, and one entry for all half-light radii."""
    handles, texts = ax.get_legend_handles_labels()
    order = sorted(range(len(texts)), key=lambda k: texts[k] != "Data")
    handles, texts = [handles[k] for k in order], [texts[k] for k in order]
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    if dotted:
        handles.append(dotted[0])
        texts.append("half-light radius")
    ax.legend(handles, texts, frameon=False, fontsize="small", loc="upper right")


def _scale_residual(ax: Axes, sigmas: list[np.ndarray]) -> None:
    """Symmetric range, at least ±3 so that pure noise looks like noise."""
    reach = 1.1 * max([3.0, *(float(np.max(np.abs(values), initial=0)) for values in sigmas)])
    ax.axhspan(-1, 1, color="0.92", zorder=0, lw=0)
    ax.axhline(0, color="0.4", lw=0.8, zorder=1)
    ax.set(ylim=(-reach, reach), ylabel="Residual [σ]")


def _scale_brightness(
    ax: Axes, data: profiles.RadialProfile, models: list[profiles.RadialProfile]
) -> None:
    """Logarithmic where all is positive, else linear about zero and logarithmic beyond."""
    if data.a.size == 0:
        return
    lowest, highest = float(np.min(data.mean - data.err)), float(np.max(data.mean + data.err))
    noise = float(np.median(data.err))
    if lowest > 0.1 * noise and all(np.all(model.mean > 0) for model in models):
        ax.set_yscale("log")
        ax.set_ylim(0.5 * lowest, 2 * highest)
        return
    # Means below the noise say nothing about their logarithm.  A whole power of ten keeps the
    # tick labels apart.
    linear = 10 ** round(np.log10(3 * noise))
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_yscale("symlog", linthresh=linear, linscale=0.8)
    ax.set_ylim(min(1.5 * lowest, -0.5 * linear), max(2 * highest, 2 * linear))
