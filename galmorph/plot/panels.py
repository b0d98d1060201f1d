"""Data, model and residual of one fit."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from . import drawing, labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from ..results import FitResult


def fit(
    result: FitResult,
    i: int = 0,
    *,
    axes: Sequence[Axes] | None = None,
    residual_limit: float = 5.0,
) -> np.ndarray:
    """Draw data, model and residual of one galaxy side by side.

    Data and model share one asinh stretch, without the fitted background; the
    residual is (data - model) / σ.  The thin ellipse holds half of the model's
    light before the PSF (one for each component; a cross for a point source).
    Pixels that the fit did not use are grey and hatched.  A galaxy whose fit
    failed shows its data, less their median, and a note.

    Parameters
    ----------
    result : FitResult
        The fit; it must still hold its stamps (one that was read back from a
        file does not).
    i : int, optional
        Which galaxy of the result; negative numbers count from the end.
    axes : sequence of 3 `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.
    residual_limit : float, optional
        Range of the residual's colours, in σ.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (3,)
        The axes of data, model and residual, in pixel coordinates of the
        parent image.

    Raises
    ------
    IndexError
        If the result holds no galaxy ``i``.
    ValueError
        If ``axes`` is not three axes or ``residual_limit`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> import galmorph
    >>> from galmorph import plot
    >>> truth = galmorph.GaussianGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, ellip=0.3)
    >>> image = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (32, 32))
    >>> result = galmorph.fit_images(image, galmorph.GaussianGalaxy2D(), uncertainty=1.0)
    >>> axes = plot.fit(result)
    >>> [ax.get_title() for ax in axes]
    ['Data', 'GaussianGalaxy2D', 'Residual']
    """
    drawing.check_limit(residual_limit)
    view = drawing.StampView(result, i)
    if axes is None:
        import matplotlib.pyplot as plt

        ny, nx = view.shape
        height = float(np.clip(2.8 * ny / nx, 1.4, 6.0)) + 1.35
        figure, axes = plt.subplots(
            1, 3, figsize=(11.5, height), sharex=True, sharey=True, layout="compressed"
        )
        figure.suptitle(textwrap.fill(" · ".join(_summary(view)), 105), fontsize="medium")
        axes[2].set_title("Residual")
    else:
        axes = np.asarray(axes, dtype=object).ravel()
        if len(axes) != 3:
            raise ValueError(f"axes must be three axes, got {len(axes)}")
        lines = ["Residual", *(textwrap.fill(line, 34) for line in _summary(view, most=4))]
        axes[2].set_title("\n".join(lines), fontsize="small")

    data_ax, model_ax, residual_ax = axes
    norm = drawing.brightness_norm([view])
    shown = drawing.draw_brightness(data_ax, view.data, view, norm)
    bright = [data_ax]
    if view.model is None:
        drawing.empty_panel(model_ax, view, "no fit")
        drawing.empty_panel(residual_ax, view, "no fit")
    else:
        drawing.draw_brightness(model_ax, view.model, view, norm)
        bright.append(model_ax)
        drawing.draw_ellipses(data_ax, view, "white")
        drawing.draw_ellipses(model_ax, view, "white")
        drawn = drawing.draw_residual(residual_ax, view.residual, view, residual_limit)
        drawing.residual_bar(drawn, [residual_ax])
        drawing.draw_ellipses(residual_ax, view, "0.2")
    if view.used.any():
        drawing.brightness_bar(shown, bright, result.data_unit)

    data_ax.set_title(view.data_title)
    model_ax.set_title(labels.model_name(result))
    for ax in axes:
        ax.set_xlabel("x [pixel]")
    data_ax.set_ylabel("y [pixel]")
    return axes


def _summary(view: drawing.StampView, *, most: int | None = None) -> list[str]:
    parts = [labels.galaxy_text(view.result, view.i), labels.chi2_text(view.result, view.i)]
    flags = labels.flag_text(view.result, view.i, most=most)
    return [*parts, f"flags: {flags}" if flags else "no flags"]
