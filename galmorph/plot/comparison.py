"""Several models of one galaxy side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import drawing, labels

if TYPE_CHECKING:
    from ..results import FitResult


def compare_fits(
    results: Mapping[str, FitResult],
    i: int = 0,
    *,
    axes: np.ndarray | None = None,
    residual_limit: float = 5.0,
) -> np.ndarray:
    """Draw one galaxy as several models see it.

    The first column holds the data and, below, data / σ, which is the residual
    of no model; every further column holds a model and, below, its residual
    with reduced chi-square and flags.  All models share the stretch of the
    data, and all residuals one range.

    Parameters
    ----------
    results : dict of str to FitResult
        Fits of the same stamps, by the name to be shown.
    i : int, optional
        Which galaxy of the results; negative numbers count from the end.
    axes : array of `~matplotlib.axes.Axes`, shape (2, 1 + len(results)), optional
        Where to draw.  By default a new figure is made.
    residual_limit : float, optional
        Range of the residual's colours, in σ.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (2, 1 + len(results))
        Top row: data, models.  Bottom row: data / σ, residuals.

    Raises
    ------
    IndexError
        If the results hold no galaxy ``i``.
    ValueError
        If ``results`` is empty, its fits are of different stamps, or ``axes``
        has another shape.

    Examples
    --------
    >>> import numpy as np
    >>> import galmorph
    >>> from galmorph import plot
    >>> truth = galmorph.SersicGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, n=2)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> models = {"Gaussian": galmorph.GaussianGalaxy2D(), "Sérsic": galmorph.SersicGalaxy2D()}
    >>> results = {
    ...     name: galmorph.fit_images(image, model, uncertainty=1.0)
    ...     for name, model in models.items()
    ... }
    >>> plot.compare_fits(results).shape
    (2, 3)
    """
    drawing.check_limit(residual_limit)
    results = drawing.as_results(results)
    views = {name: drawing.StampView(result, i) for name, result in results.items()}
    drawing.check_same_stamp(views)
    # A failed fit has no background to take off the data.
    first = next((v for v in views.values() if v.model is not None), next(iter(views.values())))
    if axes is None:
        axes = _grid(first.shape, len(views), labels.galaxy_text(first.result, first.i))
    axes = np.asarray(axes, dtype=object)
    if axes.shape != (2, 1 + len(views)):
        raise ValueError(f"axes must have shape {(2, 1 + len(views))}, got {axes.shape}")

    norm = drawing.brightness_norm(list(views.values()))
    shown = drawing.draw_brightness(axes[0, 0], first.data, first, norm)
    axes[0, 0].set(title=first.data_title, ylabel="y [pixel]")
    noise_scaled = first.data * first.inv_sigma
    residual = drawing.draw_residual(axes[1, 0], noise_scaled, first, residual_limit)
    axes[1, 0].set(xlabel="x [pixel]", ylabel="y [pixel]")
    axes[1, 0].set_title("Data / σ", fontsize="small")
    for (name, view), (top, bottom) in zip(views.items(), axes.T[1:], strict=True):
        top.set_title(textwrap.fill(name, 22))
        bottom.set_xlabel("x [pixel]")
        bottom.set_title(_summary(view), fontsize="small")
        if view.model is None:
            drawing.empty_panel(top, view, "no fit")
            drawing.empty_panel(bottom, view, "no fit")
            continue
        drawing.draw_brightness(top, view.model, view, norm)
        drawing.draw_ellipses(top, view, "white")
        drawing.draw_residual(bottom, view.residual, view, residual_limit)

    if first.used.any():
        drawing.brightness_bar(shown, list(axes[0]), first.result.data_unit)
        drawing.residual_bar(residual, list(axes[1]))
    return axes


def _grid(shape: tuple[int, int], n_models: int, title: str) -> np.ndarray:
    import matplotlib.pyplot as plt

    ny, nx = shape
    columns = 1 + n_models
    height = float(np.clip(2.5 * ny / nx, 1.5, 5.0)) + 0.6
    figure, axes = plt.subplots(
        2,
        columns,
        figsize=(2.75 * columns + 1.2, 2 * height),
        sharex=True,
        sharey=True,
        layout="compressed",
        squeeze=False,
    )
    figure.suptitle(title, fontsize="medium")
    return axes


def _summary(view: drawing.StampView) -> str:
    """Chi-square and flags, in lines that fit above a panel."""
    lines = textwrap.wrap(labels.flag_text(view.result, view.i, most=4), 34)
    return "\n".join([labels.chi2_text(view.result, view.i), *lines])
