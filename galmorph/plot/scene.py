"""Data, model, residual and sources of a scene."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from ..deblending import SceneResult

#: More sources than this are drawn without their numbers.
_NUMBERED = 40


class _SceneView:
    """A scene as the panels of single galaxies see a stamp."""

    def __init__(self, result: SceneResult) -> None:
        self.used = result.inv_sigma > 0
        self.inv_sigma = result.inv_sigma
        sky = result.background_image
        self.data = np.ma.masked_array(result.data - sky, mask=~self.used)
        self.model = result.model_image
        self.origin = np.zeros(2)
        self.shape = result.data.shape

    @property
    def extent(self) -> tuple[float, float, float, float]:
        ny, nx = self.shape
        return (-0.5, nx - 0.5, -0.5, ny - 0.5)

    @cached_property
    def residual(self) -> np.ma.MaskedArray:
        return (self.data - self.model) * self.inv_sigma


def scene(
    result: SceneResult,
    *,
    axes: Sequence[Axes] | None = None,
    residual_limit: float = 5.0,
) -> np.ndarray:
    """Draw data, model, residual and sources of a scene side by side.

    Data and model share one asinh stretch, without the fitted background; the residual is
    (data - model) / σ.  The last panel shows which source has the most light in each pixel, and
    the number of each (up to 40 of them); a cross is a source that could not be fitted.

    Parameters
    ----------
    result : SceneResult
        The scene.
    axes : sequence of 4 `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.
    residual_limit : float, optional
        Range of the residual's colours, in σ.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (4,)
        The axes of data, model, residual and sources.

    Raises
    ------
    ValueError
        If ``axes`` is not four axes or ``residual_limit`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.deblending import deblend
    >>> from galmorph.plot.scene import scene
    >>> model = SersicGalaxy2D()
    >>> params = [[500, 18, 20, 3, 1, 0.3, 0], [300, 25, 21, 2, 1, 0, 0]]
    >>> image = model.render((41, 41), params=params).sum(0)
    >>> image += np.random.default_rng(1).normal(0, 0.3, image.shape)
    >>> result = deblend(image, [(18, 20), (25, 21)], model=model, uncertainty=0.3)
    >>> [ax.get_title() for ax in scene(result)]
    ['Data', 'Model', 'Residual', '2 sources']
    """
    drawing.check_limit(residual_limit)
    view = _SceneView(result)
    if axes is None:
        import matplotlib.pyplot as plt

        ny, nx = view.shape
        height = float(np.clip(2.8 * ny / nx, 1.4, 6.0)) + 0.9
        _, axes = plt.subplots(
            1, 4, figsize=(14.5, height), sharex=True, sharey=True, layout="compressed"
        )
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != 4:
        raise ValueError(f"axes must be four axes, got {len(axes)}")
    norm = drawing.brightness_norm([view])
    shown = drawing.draw_brightness(axes[0], view.data, view, norm)
    drawing.draw_brightness(axes[1], view.model, view, norm)
    residual = drawing.draw_residual(axes[2], view.residual, view, residual_limit)
    if view.used.any():
        drawing.brightness_bar(shown, list(axes[:2]), result.data_unit)
        drawing.residual_bar(residual, [axes[2]])
    _draw_sources(axes[3], result, view)
    count = f"{len(result)} source{'s' * (len(result) != 1)}"
    for ax, title in zip(axes, ("Data", "Model", "Residual", count), strict=True):
        ax.set(title=title, xlabel="x [pixel]")
        ax.set(xlim=view.extent[:2], ylim=view.extent[2:])
    axes[0].set_ylabel("y [pixel]")
    return axes


def _draw_sources(ax: Axes, result: SceneResult, view: _SceneView) -> None:
    """Segments of the models, and the sources at their fitted places."""
    from matplotlib.colors import ListedColormap

    failed = result.failed
    if len(result) and not failed.all():
        try:
            segments = result.to_segmentation().data
        except ValueError:  # nothing above the noise
            segments = np.zeros(view.shape, dtype=int)
        labels, place = np.unique(segments, return_inverse=True)
        number = place.reshape(view.shape) - (labels[0] == 0)
        colors = len(drawing.MODEL_COLORS)
        ax.imshow(
            np.ma.masked_where(segments == 0, number % colors),
            origin="lower",
            extent=view.extent,
            cmap=ListedColormap(drawing.MODEL_COLORS),
            vmin=-0.5,
            vmax=colors - 0.5,
            alpha=0.5,
            interpolation="none",
        )
    ax.set_aspect("equal")
    for k, (x, y) in enumerate(result.xy):
        if failed[k]:
            if np.isfinite([x, y]).all():
                ax.plot(x, y, "x", color="0.3", ms=6, clip_on=True)
            continue
        x, y = np.asarray(result.params[k])[1:3]
        if len(result) <= _NUMBERED:
            ax.text(x, y, str(k), ha="center", va="center", fontsize="small", clip_on=True)
        else:
            ax.plot(x, y, ".", color="0.1", ms=2)
