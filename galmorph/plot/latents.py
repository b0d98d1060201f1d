"""What a network has learned: reconstructions, and the images that its latents stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

_SIDE = 1.15  # of a panel, in inches
_SOFTENING = 0.05  # width of the linear part of a stretch without noise, of the peak


def reconstructions(
    images: np.ndarray,
    learned: np.ndarray | tuple[np.ndarray, np.ndarray],
    parametric: np.ndarray | None = None,
    *,
    uncertainty: np.ndarray | float | None = None,
    mask: np.ndarray | None = None,
    names: Sequence[str] = ("Learned", "Sérsic"),
    max_galaxies: int = 8,
    residual_limit: float = 5.0,
) -> np.ndarray:
    """Draw galaxies, what a network makes of them, and a parametric fit beside it.

    A row for each galaxy: data, learned image and its residual, parametric
    image and its residual.  The images of a row share one asinh stretch.

    Parameters
    ----------
    images : ndarray, shape (N, ny, nx)
        The data.
    learned : ndarray, shape (N, ny, nx), or tuple of two
        The reconstruction, or (mean, std) as of `galmorph.GalaxyVAE.reconstruct`.
    parametric : ndarray, shape (N, ny, nx), optional
        Images of another fit.
    uncertainty : float or ndarray that broadcasts to the images, optional
        σ of the pixels, the unit of the residuals.  By default the learned
        standard deviation; without either the scatter of the learned residual.
    mask : ndarray of bool, shape (N, ny, nx), optional
        Pixels that are not to be shown.
    names : sequence of str, optional
        What the two are called.
    max_galaxies : int, optional
        Draw the first ones only.
    residual_limit : float, optional
        Range of the residuals' colours, in σ.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (n, 3) or (n, 5)
        The axes of a new figure.

    Raises
    ------
    ValueError
        If the shapes differ, there is nothing to draw, or a number is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> truth = np.ones((2, 16, 16))
    >>> images = truth + np.random.default_rng(1).normal(0, 0.1, truth.shape)
    >>> axes = plot.reconstructions(images, (truth, 0.1 * truth), truth)
    >>> [ax.get_title() for ax in axes[0]]
    ['Data', 'Learned', 'Residual', 'Sérsic', 'Residual']
    """
    import matplotlib.pyplot as plt

    drawing.check_limit(residual_limit)
    mean, std = learned if isinstance(learned, tuple) else (learned, None)
    images, models = _stamps("images", images), [_stamps("learned", mean)]
    if parametric is not None:
        models.append(_stamps("parametric", parametric))
    n = min(len(images), max_galaxies)
    if n < 1:
        raise ValueError(f"no galaxies to draw ({len(images)} images, {max_galaxies=})")
    if any(model.shape != images.shape for model in models):
        raise ValueError(
            f"images of shape {images.shape}, models of {[model.shape for model in models]}"
        )
    images = np.ma.masked_invalid(images)
    if mask is not None:
        images = np.ma.masked_where(np.broadcast_to(mask, images.shape), images)
    sigma = _sigma(images - models[0], std if uncertainty is None else uncertainty)

    columns = 1 + 2 * len(models)
    ny, nx = images.shape[1:]
    figure, axes = plt.subplots(
        n,
        columns,
        figsize=(_SIDE * columns + 0.9, _SIDE * n * ny / nx + 0.4),
        squeeze=False,
        layout="compressed",
    )
    titles = ["Data", *(text for name in names[: len(models)] for text in (name, "Residual"))]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="medium")
    for i, row in enumerate(axes):
        norm = _row_norm(images[i], [m[i] for m in models], sigma[i])
        _show(row[0], images[i], drawing.BRIGHTNESS_CMAP, norm)
        for k, model in enumerate(models):
            _show(row[1 + 2 * k], model[i], drawing.BRIGHTNESS_CMAP, norm)
            residual = (images[i] - model[i]) / sigma[i]
            drawn = _show(
                row[2 + 2 * k],
                residual,
                drawing.RESIDUAL_CMAP,
                plt.Normalize(-residual_limit, residual_limit),
            )
    bar = figure.colorbar(drawn, ax=axes, extend="both", shrink=min(1.0, 2.5 / n), aspect=15)
    bar.set_label("Residual [σ]")
    return axes


def posterior_draws(image: np.ndarray, means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Draw what a network expects for several draws of the latents of one galaxy.

    The data, then, for each draw, the mean of the pixels above and their
    standard deviation below.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
        The data.
    means, stds : ndarray, shape (n, ny, nx)
        Mean and standard deviation of the pixels for each draw.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (2, n + 1)
        The axes of a new figure; the one below the data is empty.

    Raises
    ------
    ValueError
        If the shapes differ or there is nothing to draw.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> axes = plot.posterior_draws(np.eye(9), np.ones((3, 9, 9)), np.ones((3, 9, 9)))
    >>> axes.shape
    (2, 4)
    """
    import matplotlib.pyplot as plt

    means, stds = _stamps("means", means), _stamps("stds", stds)
    data = np.ma.masked_invalid(np.asarray(image, dtype=float))
    if not len(means) or means.shape != stds.shape or means.shape[1:] != data.shape:
        raise ValueError(
            f"image of shape {data.shape}, means of {means.shape} and stds of {stds.shape}"
        )
    ny, nx = data.shape
    columns = len(means) + 1
    figure, axes = plt.subplots(
        2,
        columns,
        figsize=(_SIDE * columns + 0.9, 2 * _SIDE * ny / nx + 0.4),
        squeeze=False,
        layout="compressed",
    )
    norm, spread = _asinh_norm(np.ma.concatenate([data[None], means])), _asinh_norm(stds)
    first = _show(axes[0, 0], data, drawing.BRIGHTNESS_CMAP, norm)
    axes[0, 0].set_title("Data", fontsize="medium")
    axes[1, 0].axis("off")
    for k, (mean, std) in enumerate(zip(means, stds, strict=True), start=1):
        _show(axes[0, k], mean, drawing.BRIGHTNESS_CMAP, norm)
        second = _show(axes[1, k], std, "magma", spread)
        axes[0, k].set_title(f"Draw {k}", fontsize="medium")
    for row, drawn, label in ((0, first, "Mean"), (1, second, "Std. deviation")):
        bar = figure.colorbar(drawn, ax=axes[row])
        bar.set_label(label)
        drawing.set_asinh_ticks(bar, drawn.norm, gap=0.15)
    return axes


def traversal(
    model: Any,
    *,
    steps: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    latents: Sequence[int] | None = None,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
    shape: tuple[int, int] | None = None,
    stretch: str = "asinh",
) -> np.ndarray:
    """Draw what happens to the image when one latent at a time leaves the mean.

    A row for each latent, a column for each step in units of σ.

    Parameters
    ----------
    model : GalaxyVAE or LearnedGalaxy2D
        The network, or the model with the flux, centre, size and angle wanted.
    steps : sequence of float, optional
        Distances from the mean in σ.
    latents : sequence of int, optional
        Which ones; by default all.
    mean, std : ndarray, shape (d,), optional
        About where, and how far σ is, as of the posterior means of a set of
        galaxies.  By default those of the prior.
    shape : tuple of int, optional
        (ny, nx) of the images of a LearnedGalaxy2D, which needs it.
    stretch : {"asinh", "linear"}, optional
        Of the brightness; one for the whole figure.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (n_latents, n_steps)
        The axes of a new figure.

    Raises
    ------
    TypeError
        If the model is neither.
    ValueError
        If a latent does not exist, mean or std are of another shape, or there
        is no such stretch.

    Examples
    --------
    >>> from galmorph import GalaxyVAE, plot
    >>> vae = GalaxyVAE.from_preset("regier2015", image_shape=(9, 9), latent_size=2)
    >>> axes = plot.traversal(vae, steps=(-2, 0, 2))
    >>> axes.shape, axes[0, 2].get_title()
    ((2, 3), '+2σ')
    """
    import matplotlib.pyplot as plt

    if stretch not in ("asinh", "linear"):
        raise ValueError(f"stretch must be asinh or linear, not {stretch!r}")
    center, width, draw = _latent_images(model, shape)
    center = _vector("mean", mean, center)
    width = _vector("std", std, width)
    chosen = np.arange(len(center)) if latents is None else np.atleast_1d(latents)
    if not chosen.size or np.any((chosen < 0) | (chosen >= len(center))):
        raise ValueError(f"latents must be some of 0 … {len(center) - 1}, not {latents!r}")
    steps = np.atleast_1d(np.asarray(steps, dtype=float))
    z = np.tile(center, (len(chosen), len(steps), 1))
    for row, j in enumerate(chosen):
        z[row, :, j] += steps * width[j]
    images = np.asarray(draw(z.reshape(-1, len(center))), dtype=float)
    images = images.reshape(len(chosen), len(steps), *images.shape[1:])

    ny, nx = images.shape[2:]
    _, axes = plt.subplots(
        len(chosen),
        len(steps),
        figsize=(0.8 * _SIDE * len(steps) + 0.4, 0.8 * _SIDE * len(chosen) * ny / nx + 0.35),
        squeeze=False,
        gridspec_kw={"wspace": 0.04, "hspace": 0.04},
    )
    if stretch == "asinh":
        norm = _asinh_norm(images)
    else:
        norm = plt.Normalize(*np.percentile(images, [0, 99.9]))
    for row, j in enumerate(chosen):
        for column, step in enumerate(steps):
            _show(axes[row, column], images[row, column], drawing.BRIGHTNESS_CMAP, norm)
            if row == 0:
                text = "mean" if step == 0 else f"{step:+g}σ".replace("-", "−")
                axes[row, column].set_title(text, fontsize="small")
        axes[row, 0].set_ylabel(f"$z_{{{j}}}$", rotation=0, ha="right", va="center")
    return axes


def latents_tsne(
    latents: np.ndarray,
    images: np.ndarray,
    *,
    embedding: np.ndarray | None = None,
    perplexity: float = 30.0,
    cells: int = 24,
    rng: np.random.Generator | int | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw galaxies so that those with like latents are neighbours, by t-SNE.

    The plane is divided into cells, and each shows the galaxy that is nearest
    to its middle; the number of galaxies in it is not shown.

    Parameters
    ----------
    latents : ndarray, shape (N, d)
        Posterior means.
    images : ndarray, shape (N, ny, nx)
        What is shown of each galaxy, each with its own stretch.
    embedding : ndarray, shape (N, 2), optional
        Positions in the plane.  By default those of scikit-learn's t-SNE; a
        few seconds for a thousand galaxies.
    perplexity : float, optional
        Of t-SNE: about how many neighbours a galaxy has.
    cells : int, optional
        Thumbnails along each axis.
    rng : Generator or int, optional
        Seed of t-SNE.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ImportError
        If scikit-learn is needed and not installed.
    ValueError
        If the shapes do not fit together, or there are fewer than 3 galaxies.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> rng = np.random.default_rng(1)
    >>> images = rng.normal(0, 1, (50, 8, 8))
    >>> ax = plot.latents_tsne(
    ...     rng.normal(0, 1, (50, 4)), images, embedding=rng.uniform(0, 1, (50, 2)), cells=5
    ... )
    >>> 1 < len(ax.images) <= 25
    True
    """
    images = _stamps("images", images)
    latents = np.asarray(latents, dtype=float)
    n = len(images)
    if latents.ndim != 2 or len(latents) != n or n < 3:
        raise ValueError(f"latents of shape {latents.shape} for images of {images.shape}")
    if isinstance(cells, bool) or int(cells) != cells or cells < 1:
        raise ValueError(f"cells must be an integer of at least 1, not {cells!r}")
    if embedding is None:
        embedding = _tsne(latents, perplexity, rng)
    embedding = np.asarray(embedding, dtype=float)
    if embedding.shape != (n, 2):
        raise ValueError(f"embedding must have shape {(n, 2)}, not {embedding.shape}")
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(8, 8), layout="constrained")

    shown = _nearest_to_cells(_in_cells(embedding, cells), cells)
    for (x, y), i in shown.items():
        _show(ax, images[i], "gray", _asinh_norm(images[i]), extent=(x, x + 1, y, y + 1))
    ax.set(xlim=(0, cells), ylim=(0, cells), aspect="equal", facecolor="0.1")
    # The plane of t-SNE has no units, and no direction.
    ax.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    ax.set_title(f"{len(shown)} of {n} galaxies", fontsize="medium")
    return ax


# -- parts -------------------------------------------------------------------------------


def _stamps(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 3:
        raise ValueError(f"{name} must have shape (N, ny, nx), not {values.shape}")
    return values


def _vector(name: str, given: Any, default: np.ndarray) -> np.ndarray:
    values = default if given is None else np.asarray(given, dtype=float)
    if values.shape != default.shape or not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be {len(default)} numbers, not {given!r}")
    return values


def _sigma(residual: np.ma.MaskedArray, given: Any) -> np.ndarray:
    """The unit of the residuals, like the images."""
    if given is not None:
        values = np.asarray(given, dtype=float)
        if not np.all(values > 0):
            raise ValueError("the uncertainty must be positive")
        return np.broadcast_to(values, residual.shape)
    flat = np.ma.masked_invalid(residual.reshape(len(residual), -1))
    scatter = 1.4826 * np.ma.filled(np.ma.median(np.abs(flat), axis=1), 0.0)
    return np.broadcast_to(np.where(scatter > 0, scatter, 1.0)[:, None, None], residual.shape)


def _row_norm(data: Any, models: list[np.ndarray], sigma: np.ndarray) -> Normalize:
    """Linear in the noise, logarithmic above it."""
    from matplotlib.colors import AsinhNorm

    values = data.compressed()
    if not values.size:
        return AsinhNorm(1.0, -1.0, 1.0)
    noise = float(np.median(sigma))
    top = max([float(np.percentile(values, 99.8)), *(float(np.nanmax(m)) for m in models[:1])])
    low = max(float(values.min()), float(np.percentile(values, 10)) - 3 * noise)
    return AsinhNorm(3 * noise, low, max(top, low + 3 * noise))


def _asinh_norm(images: np.ndarray) -> Normalize:
    from matplotlib.colors import AsinhNorm

    values = np.ma.masked_invalid(images).compressed()
    low, high = np.percentile(values, [0.5, 99.9]) if values.size else (0.0, 1.0)
    high = max(high, low + 1e-12 * max(abs(low), 1.0))
    return AsinhNorm(_SOFTENING * (high - low), low, high)


def _show(ax: Axes, image: Any, cmap: str, norm: Normalize, extent: Any = None) -> Any:
    import matplotlib as mpl

    drawn = ax.imshow(
        np.ma.masked_invalid(image),
        origin="lower",
        cmap=mpl.colormaps[cmap].with_extremes(bad=drawing.UNUSED_COLOR),
        norm=norm,
        interpolation="none",
        extent=extent,
    )
    if extent is None:
        ax.set(xticks=[], yticks=[])
    return drawn


def _latent_images(model: Any, shape: tuple[int, int] | None) -> tuple[Any, Any, Any]:
    """Mean and σ of the latents under the prior, and a function that draws them."""
    if hasattr(model, "decode") and hasattr(model, "elbo"):
        return _of_network(model)
    if hasattr(model, "render") and hasattr(model, "latent_names"):
        if shape is None:
            raise ValueError("shape (ny, nx) of the images must be given for a LearnedGalaxy2D")
        return _of_model(model, shape)
    raise TypeError(f"model must be a GalaxyVAE or a LearnedGalaxy2D, not {type(model).__name__}")


def _of_network(vae: Any) -> tuple[Any, Any, Any]:
    import torch

    device = next(vae.parameters()).device

    def draw(z: np.ndarray) -> np.ndarray:
        training = vae.training
        vae.eval()
        try:
            with torch.no_grad():
                tensor = torch.as_tensor(z, dtype=torch.float32, device=device)
                return vae.decode(tensor).mean.cpu().numpy()
        finally:
            vae.train(training)

    with torch.no_grad():
        prior = vae.prior()
        mean, std = (t.cpu().numpy().astype(float) for t in (prior.mean, prior.stddev))
    return mean, std, draw


#: Shapes drawn from a prior to see its mean and σ; one that is a flow cannot say them.
_PRIOR_DRAWS = 4000


def _of_model(model: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    names = list(model.param_names)
    columns = [names.index(name) for name in model.latent_names]
    draws = np.asarray(model.sample(_PRIOR_DRAWS, 0))

    def draw(z: np.ndarray) -> np.ndarray:
        params = np.repeat(draws[:1], len(z), axis=0)
        params[:, columns] = z
        return model.render(shape, params=params)

    latents = draws[:, columns]
    return latents.mean(axis=0), latents.std(axis=0), draw


def _in_cells(embedding: np.ndarray, cells: int) -> np.ndarray:
    """Positions in the plane in units of its cells, 0 to ``cells``."""
    size = np.maximum(np.ptp(embedding, axis=0), 1e-12) / cells
    return (embedding - embedding.min(axis=0)) / size


def _nearest_to_cells(place: np.ndarray, cells: int) -> dict[tuple[int, int], int]:
    """The galaxy nearest to the middle of each cell that has any."""
    cell = np.minimum(place.astype(int), cells - 1)
    distance = np.hypot(*(place - cell - 0.5).T)
    shown: dict[tuple[int, int], int] = {}
    for i in np.argsort(distance, kind="stable"):
        shown.setdefault((int(cell[i, 0]), int(cell[i, 1])), int(i))
    return shown


def _tsne(latents: np.ndarray, perplexity: float, rng: Any) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ImportError(
            "t-SNE needs scikit-learn (pip install scikit-learn); or give the embedding"
        ) from None
    seed = int(np.random.default_rng(rng).integers(2**31))
    # scikit-learn asks for fewer neighbours than galaxies
    perplexity = min(perplexity, (len(latents) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(latents)
