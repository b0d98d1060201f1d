"""Classes of galaxies: what is in them, where they lie, and what they agree with."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..agreement import _codes
from . import drawing, labels
from .latents import _asinh_norm, _in_cells, _nearest_to_cells, _row_norm, _show, _sigma, _tsne

if TYPE_CHECKING:
    from astropy.table import Table
    from matplotlib.axes import Axes

    from ..agreement import Agreement

_GAP = 0.06  # between stamps, in widths of a stamp
_WORDS = 1.45  # room for the name of a class, in inches
_THUMBNAIL = 0.66  # of a cell of the map: the points between them stay visible
_UNKNOWN_COLOR = "0.75"
#: Elements of a matrix that have room for a number.
_MOST_NUMBERS = 400


def class_sheet(
    images: Sequence[np.ndarray] | np.ndarray,
    proba: np.ndarray,
    *,
    models: Sequence[np.ndarray] | np.ndarray | None = None,
    uncertainty: float | Sequence[np.ndarray] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    n: int = 8,
    which: str = "probable",
    residual_limit: float = 5.0,
    rng: np.random.Generator | int | None = 0,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw some galaxies of each class.

    A row of stamps for each class or, with ``models``, three: data, model and residual.  Every
    galaxy has its own asinh stretch, which its model shares.  In the corner of a stamp is the
    probability of the class; beside the row stand the name of the class, its fraction (mean
    probability) and the number of galaxies for which it is the most probable one.

    Parameters
    ----------
    images : sequence of N arrays of shape (ny, nx)
        The data.  Only those that are drawn are read.
    proba : array of float, shape (N, K)
        Probabilities of the classes.  Galaxies whose are not finite are left out.
    models : sequence of N arrays of shape (ny, nx), optional
        What was fitted; nothing but NaN where a fit failed.
    uncertainty : float, or sequence of N numbers or arrays of shape (ny, nx), optional
        σ of the pixels, the unit of residuals; by default their scatter.
    names : sequence of str, optional
        Of the K classes; by default 0, 1, ….
    classes : sequence of int, optional
        Which classes, in the order wanted; by default all.
    n : int, optional
        Galaxies of each class.
    which : {"probable", "random"}, optional
        The most probable galaxies of each class, or any for which it is the most probable
        class: the first show what the class is, the second what is in it.
    residual_limit : float, optional
        Range of the residuals' colours, in σ.
    rng : Generator or int, optional
        For the choice of random galaxies.
    axes : sequence of `~matplotlib.axes.Axes`, optional
        Where to draw, one for each class.  By default a new figure is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, one for each class
        The axes.

    Raises
    ------
    ValueError
        If the lengths differ, there is no such class, choice or number of stamps, or no galaxy
        has probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> rng = np.random.default_rng(1)
    >>> images = rng.normal(0, 1, (40, 16, 16))
    >>> proba = rng.dirichlet([0.5, 0.5], 40)
    >>> axes = plot.class_sheet(images, proba, names=["smooth", "spiral"], n=4)
    >>> [len(ax.images) for ax in axes]
    [4, 4]
    """
    drawing.check_limit(residual_limit)
    proba = np.asarray(proba, dtype=float)
    if proba.ndim != 2 or len(proba) != len(images):
        raise ValueError(f"proba of shape {proba.shape} for {len(images)} images")
    if models is not None and len(models) != len(images):
        raise ValueError(f"{len(models)} models for {len(images)} images")
    if which not in ("probable", "random"):
        raise ValueError(f"which must be probable or random, not {which!r}")
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n must be an integer of at least 1, not {n!r}")
    names = _names(names, proba.shape[1])
    chosen = range(len(names)) if classes is None else [int(k) for k in classes]
    if not len(chosen) or not all(0 <= k < len(names) for k in chosen):
        raise ValueError(f"classes must be some of 0 … {len(names) - 1}, not {classes!r}")
    known = np.isfinite(proba).all(axis=1)
    if not known.any():
        raise ValueError("no galaxy has class probabilities")
    best = np.where(known, np.where(known[:, None], proba, 0.0).argmax(axis=1), -1)
    rng = np.random.default_rng(rng)
    rows = 1 if models is None else 3
    axes = _sheet_axes(axes, len(chosen), n, rows)
    for ax, k in zip(axes, chosen, strict=True):
        members = np.flatnonzero(best == k)
        if which == "probable":
            shown = members[np.argsort(-proba[members, k], kind="stable")][:n]
        else:
            shown = rng.permutation(members)[:n]
        for slot, i in enumerate(shown):
            model = None if models is None else models[i]
            sigma = (
                uncertainty if uncertainty is None or np.isscalar(uncertainty) else uncertainty[i]
            )
            _draw_stamps(ax, slot, images[i], model, sigma, residual_limit)
            _corner(ax, slot, f"{proba[i, k]:.2f}")
        fraction = proba[known, k].mean()
        words = f"{textwrap.fill(names[k], 16)}\n{_percent(fraction)}\nn = {len(members)}"
        _beside(ax, words, rows, residual_limit)
        width = n + _GAP * (n - 1)
        ax.set(xlim=(0, width), ylim=(-rows - _GAP * (rows - 1), 0), aspect="equal")
    return axes


def class_profiles(
    table: Table, columns: Sequence[str] | None = None, *, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Draw the median and the 16 to 84 % range of quantities for each class.

    Parameters
    ----------
    table : `~astropy.table.QTable`
        As of `galmorph.agreement.class_profiles`.
    columns : sequence of str, optional
        Which quantities; by default all.
    axes : sequence of `~matplotlib.axes.Axes`, optional
        Where to draw, one for each quantity.  By default a new figure is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, one for each quantity
        The axes, classes from the top to the bottom.  They are logarithmic where the classes
        differ by more than a factor of 30.

    Raises
    ------
    KeyError
        If there is no such quantity.
    ValueError
        If there is none at all, or too few or too many axes.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> from galmorph.agreement import class_profiles
    >>> rng = np.random.default_rng(1)
    >>> proba = rng.dirichlet([0.5, 0.5], 100)
    >>> columns = {"n": 1 + 3 * proba[:, 0], "ellip": rng.uniform(0, 1, 100)}
    >>> axes = plot.class_profiles(class_profiles(proba, columns, class_names=["E", "S"]))
    >>> [ax.get_xlabel() for ax in axes]
    ['$n$', '$\\\\epsilon$']
    """
    known = [name.removesuffix("_p16") for name in table.colnames if name.endswith("_p16")]
    columns = known if columns is None else list(columns)
    for name in columns:
        if name not in known:
            raise KeyError(f"there is no quantity {name!r}; the quantities are {', '.join(known)}")
    if not columns:
        raise ValueError("the table has no quantities")
    names = [str(name) for name in table["class"]]
    place = np.arange(len(names))
    axes = _profile_axes(axes, len(columns), len(names))
    for ax, name in zip(axes, columns, strict=True):
        unit = getattr(table[name], "unit", None)
        middle, low, high = (
            np.asarray(getattr(table[name + part], "value", table[name + part]), dtype=float)
            for part in ("", "_p16", "_p84")
        )
        for k in place:
            style = {"color": _class_color(k, len(names)), "fmt": "o", "ms": 4.5, "elinewidth": 2}
            ax.errorbar(middle[k], k, xerr=[[middle[k] - low[k]], [high[k] - middle[k]]], **style)
        if np.nanmin(low) > 0 and np.nanmax(middle) > 30 * np.nanmin(middle):
            ax.set_xscale("log")
        ax.set_xlabel(labels.with_unit(labels.parameter_symbol(name), labels.unit_text(unit)))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    axes[0].set_yticks(place, names)
    return axes


def class_overlap(
    matrix: np.ndarray, *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how often galaxies of one class are assigned to another.

    Parameters
    ----------
    matrix : array of float, shape (K, K)
        As of `galmorph.agreement.overlap_matrix`: rows are true classes.
    names : sequence of str, optional
        Of the classes; by default 0, 1, ….
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ValueError
        If the matrix is not square or the names are too few or too many.

    Examples
    --------
    >>> from galmorph import plot
    >>> ax = plot.class_overlap([[0.9, 0.1], [0.2, 0.8]], names=["E", "S"])
    >>> ax.get_xlabel()
    'Assigned class'
    """
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape (K, K), not {matrix.shape}")
    names = _names(names, len(matrix))
    texts = [[_fraction(value) for value in row] for row in matrix]
    ax = _heatmap(ax, matrix, texts, names, names, "Probability")
    ax.set(xlabel="Assigned class", ylabel="Class")
    return ax


def confusion(agreement: Agreement, *, ax: Axes | None = None) -> Axes:
    """Draw which labels the galaxies of each class have.

    Numbers are galaxies, colours the fractions of a class.

    Parameters
    ----------
    agreement : Agreement
        See `galmorph.agreement.agreement`.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Examples
    --------
    >>> from galmorph import plot
    >>> from galmorph.agreement import agreement
    >>> ax = plot.confusion(agreement([0, 0, 1, 1], ["E", "E", "S", "S"]))
    >>> ax.get_title()
    '4 galaxies, ARI 1.00, NMI 1.00'
    """
    numbers = agreement.confusion
    total = np.maximum(numbers.sum(axis=1, keepdims=True), 1e-300)
    texts = [[f"{value:.0f}" for value in row] for row in numbers]
    names = agreement.class_names
    ax = _heatmap(ax, numbers / total, texts, names, agreement.label_names, "Fraction of the class")
    ax.set(xlabel="Label", ylabel="Class")
    summary = f"ARI {agreement.ari:.2f}, NMI {agreement.nmi:.2f}".replace("-", "−")
    ax.set_title(f"{agreement.n_used} galaxies, {summary}", fontsize="medium")
    return ax


def latent_map(
    latents: np.ndarray,
    classes: np.ndarray,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
    *,
    names: Sequence[str] | None = None,
    thumbnails: int = 12,
    method: str = "tsne",
    perplexity: float = 30.0,
    embedding: np.ndarray | None = None,
    rng: np.random.Generator | int | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw a map on which galaxies with like latents are neighbours, coloured by class.

    Parameters
    ----------
    latents : array of float, shape (N, d)
        Posterior means.
    classes : array of int or str, shape (N,)
        Class of each galaxy; unknown ones (negative, masked) are grey.
    images : sequence of N arrays of shape (ny, nx), optional
        Thumbnails, each with its own stretch and a frame in the colour of its class: in each
        cell of the map the galaxy that is nearest to its middle.  Only those that are
        drawn are read.
    names : sequence of str, optional
        Names of classes 0, 1, …, or the order of those that are names already.
    thumbnails : int, optional
        Cells along each axis.
    method : {"tsne", "umap"}, optional
        t-SNE of scikit-learn, a few seconds for a thousand galaxies, or UMAP of umap-learn.
    perplexity : float, optional
        About how many neighbours a galaxy has (of UMAP, ``n_neighbors``).
    embedding : array of float, shape (N, 2), optional
        Positions on the map, in place of either.
    rng : Generator or int, optional
        Seed of the method.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ImportError
        If umap-learn is wanted and not installed.
    ValueError
        If the lengths differ, latents are not finite, there are fewer than 3 galaxies, or there
        is no such method.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> rng = np.random.default_rng(1)
    >>> classes = rng.integers(0, 2, 50)
    >>> latents = rng.normal(0, 1, (50, 4)) + 3 * classes[:, None]
    >>> ax = plot.latent_map(latents, classes, names=["E", "S"], embedding=latents[:, :2])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['E (28)', 'S (22)']
    """
    latents = np.asarray(latents, dtype=float)
    codes, names = _codes("classes", classes, names)
    if latents.ndim != 2 or len(latents) != len(codes) or len(codes) < 3:
        raise ValueError(f"latents of shape {latents.shape} for {len(codes)} classes")
    if images is not None and len(images) != len(codes):
        raise ValueError(f"{len(images)} images for {len(codes)} classes")
    if isinstance(thumbnails, bool) or int(thumbnails) != thumbnails or thumbnails < 1:
        raise ValueError(f"thumbnails must be an integer of at least 1, not {thumbnails!r}")
    if method not in ("tsne", "umap"):
        raise ValueError(f"method must be tsne or umap, not {method!r}")
    if embedding is None:
        if not np.isfinite(latents).all():
            raise ValueError("latents must be finite: leave out the galaxies that have none")
        embedding = (_tsne if method == "tsne" else _umap)(latents, perplexity, rng)
        words = {"tsne": "t-SNE", "umap": "UMAP"}[method]
    else:
        words = "Coordinate"
    embedding = np.asarray(embedding, dtype=float)
    if embedding.shape != (len(codes), 2) or not np.isfinite(embedding).all():
        raise ValueError(f"embedding must be finite, of shape {(len(codes), 2)}")
    if ax is None:
        ax = _new_axes((8.6, 7.2), layout="compressed")

    place = _in_cells(embedding, thumbnails)
    size = float(np.clip(12000 / len(codes), 3, 25))
    if np.any(codes < 0):
        ax.scatter(*place[codes < 0].T, s=size, color=_UNKNOWN_COLOR, lw=0, label="unknown")
    for k, name in enumerate(names):
        rows, color = codes == k, _class_color(k, len(names))
        ax.scatter(*place[rows].T, s=size, color=color, lw=0, label=f"{name} ({rows.sum()})")
    if images is not None:
        for (x, y), i in _nearest_to_cells(place, thumbnails).items():
            color = _UNKNOWN_COLOR if codes[i] < 0 else _class_color(codes[i], len(names))
            _framed(ax, np.asarray(images[i], dtype=float), x, y, color)
    margin = 0.02 * thumbnails
    # The plane has no units, and no direction.
    ax.set(xlim=(-margin, thumbnails + margin), ylim=(-margin, thumbnails + margin))
    ax.set(aspect="equal", xticks=[], yticks=[], xlabel=f"{words} 1", ylabel=f"{words} 2")
    legend = ax.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", markerscale=2
    )
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return ax


def votes(table: Table, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw which fraction of the galaxies is given to a class, against the votes for it.

    Bars are 68 % binomial intervals; the line is that of as many galaxies as votes.  Numbers of
    galaxies stand above.  Several tables can be drawn on the same axes.

    Parameters
    ----------
    table : `~astropy.table.QTable`
        As of `galmorph.agreement.completeness_by_votes`.
    label : str, optional
        Name in a legend.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ValueError
        If all bins are empty.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> from galmorph.agreement import completeness_by_votes
    >>> fraction = np.random.default_rng(1).uniform(0, 1, 200)
    >>> ax = plot.votes(completeness_by_votes(fraction > 0.4, fraction, bins=5))
    >>> ax.get_xlabel()
    'Fraction of votes'
    """
    low, high, number, fraction, below, above = (
        np.asarray(table[name], dtype=float)
        for name in ("votes_low", "votes_high", "n", "fraction", "fraction_low", "fraction_high")
    )
    filled = number > 0
    if not filled.any():
        raise ValueError("no galaxy has votes and a class")
    first = ax is None or not ax.has_data()
    if ax is None:
        ax = _new_axes((5.6, 4.2))
    if first:
        ax.plot([low[0], high[-1]], [low[0], high[-1]], color="0.6", lw=0.8, ls="--")
    middle = 0.5 * (low + high)
    ax.errorbar(
        middle[filled],
        fraction[filled],
        yerr=np.maximum([(fraction - below)[filled], (above - fraction)[filled]], 0),
        xerr=(0.5 * (high - low))[filled],
        fmt="o",
        ms=4,
        elinewidth=1.2,
        color=drawing.MODEL_COLORS[len(ax.containers) % len(drawing.MODEL_COLORS)],
        label=label,
    )
    if first:
        for x, n in zip(middle, number, strict=True):
            ax.text(x, 1.08, f"{n:.0f}", ha="center", va="center", fontsize="x-small", color="0.4")
        ax.set(xlim=(low[0], high[-1]), ylim=(-0.03, 1.14))
        ax.set(xlabel="Fraction of votes", ylabel="Fraction given to the class")
    if label is not None:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.85))
    return ax


def model_selection(table: Table, *, axes: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw by what the number of classes is chosen.

    The best number by each criterion has an open circle: the lowest BIC (Schwarz 1978), and the
    most stable classes where there are two or more (one is always stable).

    Parameters
    ----------
    table : `~astropy.table.Table`
        With ``n_components``, ``bic`` and ``stability`` and, if there are, their standard errors
        ``bic_err`` and ``stability_err``.
    axes : sequence of two `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.

    Returns
    -------
    ndarray of `~matplotlib.axes.Axes`, shape (2,)
        Of BIC and stability.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If there are not two axes.

    Examples
    --------
    >>> from astropy.table import Table
    >>> from galmorph import plot
    >>> table = Table({"n_components": [1, 2, 3], "bic": [90, 50, 60], "stability": [1, 0.9, 0.5]})
    >>> axes = plot.model_selection(table)
    >>> [ax.get_ylabel() for ax in axes]
    ['BIC − lowest', 'Stability']
    """
    number = np.asarray(table["n_components"])
    order = np.argsort(number)
    axes = _selection_axes(axes)
    bic, stability = (np.asarray(table[name], dtype=float) for name in ("bic", "stability"))
    stable = np.where((number > 1) & np.isfinite(stability), stability, -np.inf).argmax()
    for ax, name, values, best, words in (
        (axes[0], "bic", bic - np.nanmin(bic), np.nanargmin(bic), "BIC − lowest"),
        (axes[1], "stability", stability, stable, "Stability"),
    ):
        color = drawing.MODEL_COLORS[1]
        err = f"{name}_err"
        error = np.asarray(table[err], dtype=float)[order] if err in table.colnames else None
        ax.errorbar(number[order], values[order], error, fmt="o-", ms=3.5, lw=1.2, color=color)
        ax.plot(number[best], values[best], "o", ms=10, mfc="none", color=drawing.MODEL_COLORS[0])
        ax.set_ylabel(words)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_xlabel("Number of classes")
    return axes


# -- parts -------------------------------------------------------------------------------


def _names(names: Sequence[str] | None, k: int) -> tuple[str, ...]:
    names = tuple(str(name) for name in (range(k) if names is None else names))
    if len(names) != k:
        raise ValueError(f"{len(names)} names for {k} classes")
    return names


def _class_color(k: int, number: int) -> Any:
    """Colour of a class: safe for the colour-blind as long as there are few."""
    if number <= len(drawing.MODEL_COLORS):
        return drawing.MODEL_COLORS[k]
    import matplotlib as mpl

    return mpl.colormaps["turbo"](0.04 + 0.92 * k / (number - 1))


def _new_axes(size: tuple[float, float], *, layout: str = "constrained") -> Axes:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=size, layout=layout)
    return ax


def _as_axes(axes: Sequence[Axes], count: int) -> np.ndarray:
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != count:
        raise ValueError(f"axes must be {count} axes, got {len(axes)}")
    return axes


def _sheet_axes(axes: Sequence[Axes] | None, count: int, n: int, rows: int) -> np.ndarray:
    """One axes for each class, laid out in inches: text keeps its size, so does its room."""
    if axes is None:
        import matplotlib.pyplot as plt

        side = 0.92 if rows == 1 else 0.75
        foot = 0.08 if rows == 1 else 0.3
        width = _WORDS + side * (n + _GAP * (n - 1)) + 0.08
        row = side * (rows + _GAP * (rows - 1)) + 0.1
        height = count * row + foot
        figure = plt.figure(figsize=(width, height))
        axes = [
            figure.add_axes(
                (
                    _WORDS / width,
                    (foot + (count - 1 - k) * row + 0.02) / height,
                    1 - (_WORDS + 0.08) / width,
                    (row - 0.1) / height,
                )
            )
            for k in range(count)
        ]
    axes = _as_axes(axes, count)
    for ax in axes:
        ax.set_axis_off()
    return axes


def _profile_axes(axes: Sequence[Axes] | None, count: int, n_classes: int) -> np.ndarray:
    if axes is not None:
        return _as_axes(axes, count)
    import matplotlib.pyplot as plt

    size = (1.9 * count + 1.0, 0.3 * n_classes + 1.0)
    _, axes = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return axes[0]


def _selection_axes(axes: Sequence[Axes] | None) -> np.ndarray:
    if axes is not None:
        return _as_axes(axes, 2)
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(2, 1, figsize=(5.6, 4.8), sharex=True, layout="constrained")
    return axes


def _draw_stamps(
    ax: Axes, slot: int, image: Any, model: Any, sigma: Any, residual_limit: float
) -> None:
    """Data of one galaxy and, with a model, that and the residual below."""
    from matplotlib.colors import Normalize

    image = np.ma.masked_invalid(np.ma.asarray(image, dtype=float))
    if image.ndim != 2:
        raise ValueError(f"an image has shape {image.shape}, not (ny, nx)")
    if sigma is not None:
        # a pixel without an uncertainty was not used
        sigma = np.broadcast_to(np.asarray(sigma, dtype=float), image.shape)
        image = np.ma.masked_where(~(sigma > 0), image)
    models = [] if model is None else [np.asarray(model, dtype=float)]
    if models and models[0].shape != image.shape:
        raise ValueError(f"a model has shape {models[0].shape}, its image {image.shape}")
    if models and not np.isfinite(models[0]).any():  # a fit that failed
        models = []
        for row in (1, 2):
            x, y = slot * (1 + _GAP) + 0.5, -row * (1 + _GAP) - 0.5
            ax.text(x, y, "no fit", ha="center", va="center", fontsize=7, color="0.35")
    if models and sigma is None:
        sigma = _sigma((image - models[0])[None], None)[0]
    norm = _asinh_norm(image) if sigma is None else _row_norm(image, models, sigma[sigma > 0])
    _stamp(ax, slot, 0, image, drawing.BRIGHTNESS_CMAP, norm)
    for model in models:
        _stamp(ax, slot, 1, model, drawing.BRIGHTNESS_CMAP, norm)
        residual = (image - model) / np.ma.masked_less_equal(sigma, 0)
        limits = Normalize(-residual_limit, residual_limit)
        _stamp(ax, slot, 2, residual, drawing.RESIDUAL_CMAP, limits)


def _stamp(ax: Axes, slot: int, row: int, image: Any, cmap: str, norm: Any) -> None:
    """Draw an image in a unit square of the sheet, with its own aspect ratio."""
    x, top = slot * (1 + _GAP), -row * (1 + _GAP)
    _show(ax, image, cmap, norm, extent=_extent(image.shape, x, top - 1, 1.0))


def _extent(
    shape: tuple[int, int], x: float, y: float, side: float
) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of an image in the middle of a square."""
    ny, nx = shape
    wide, high = side * nx / max(nx, ny), side * ny / max(nx, ny)
    left, bottom = x + (side - wide) / 2, y + (side - high) / 2
    return (left, left + wide, bottom, bottom + high)


def _corner(ax: Axes, slot: int, text: str) -> None:
    from matplotlib import patheffects

    outline = [patheffects.withStroke(linewidth=1.4, foreground="0.1")]
    x = slot * (1 + _GAP) + 0.05
    ax.text(x, -0.05, text, va="top", fontsize=6.5, color="white", path_effects=outline)


def _beside(ax: Axes, words: str, rows: int, limit: float) -> None:
    """Name the class, and its rows, to the left of the stamps."""
    middle = -0.5 * (rows + _GAP * (rows - 1))
    indent = -0.12 if rows == 1 else -0.38
    ax.text(indent, middle, words, ha="right", va="center", fontsize=8.5, parse_math=False)
    if rows == 3:
        heads = ("data", "model", f"residual\n±{limit:g} σ")
        for row, text in enumerate(heads):
            y = -row * (1 + _GAP) - 0.5
            style = {"ha": "right", "va": "center", "ma": "center", "fontsize": 6, "color": "0.35"}
            ax.text(-0.05, y, text, rotation=90, **style)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 0.0995 else f"{100 * fraction:.0f} %"


def _fraction(value: float) -> str:
    """Two digits, and nothing for what they would show as zero."""
    return f"{value:.2f}" if value >= 0.005 else ""


def _heatmap(
    ax: Axes | None,
    fractions: np.ndarray,
    texts: list[list[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    words: str,
) -> Axes:
    """Fractions as colours, and what is said of them as text, first row on top."""
    if ax is None:
        ax = _new_axes((0.5 * len(columns) + 2.6, 0.42 * len(rows) + 1.6))
    shown = ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_yticks(np.arange(len(rows)), rows)
    longest = max(len(name) for name in columns)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if longest > 4 else {}
    ax.set_xticks(np.arange(len(columns)), columns, **turned)
    if fractions.size <= _MOST_NUMBERS:
        for i, j in np.ndindex(fractions.shape):
            color = "white" if fractions[i, j] > 0.55 else "0.15"
            ax.text(j, i, texts[i][j], ha="center", va="center", fontsize="small", color=color)
    ax.figure.colorbar(shown, ax=ax, label=words)
    return ax


def _framed(ax: Axes, image: np.ndarray, x: float, y: float, color: Any) -> None:
    """A thumbnail in the middle of a cell of the map, in a frame."""
    from matplotlib.patches import Rectangle

    edge = 0.5 * (1 - _THUMBNAIL)
    left, right, bottom, top = extent = _extent(image.shape, x + edge, y + edge, _THUMBNAIL)
    drawn = _show(ax, image, "gray", _asinh_norm(image), extent=extent)
    drawn.set_zorder(3)
    frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, ec=color, lw=1.5)
    frame.set_zorder(4)
    ax.add_patch(frame)


def _umap(latents: np.ndarray, perplexity: float, rng: Any) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError:
        raise ImportError(
            'method="umap" needs umap-learn (pip install umap-learn); or give the embedding'
        ) from None
    seed = int(np.random.default_rng(rng).integers(2**31))
    neighbours = int(np.clip(perplexity, 2, len(latents) - 1))
    # one job, as UMAP warns that a seed allows no more
    return UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(latents)
