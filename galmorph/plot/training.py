"""Loss against epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TERMS = {"loss": "loss", "log_likelihood": "−log likelihood", "kl": "KL divergence"}


def loss_curves(
    history: Any, *, ax: Axes | None = None, terms: tuple[str, ...] = ("loss",)
) -> Axes:
    """Draw the losses of a training against its epochs.

    Full lines are the training stamps (as they were seen, while the network
    changed), dashed lines the stamps that were left out.  The validation loss is that of the
    last epoch's beta.  A dotted line marks the epoch whose weights were kept.

    Parameters
    ----------
    history : TrainingResult, or dict of arrays
        The result of `galmorph.training.train`, its history, or what
        `galmorph.training.read_log` has read.
    ax : `~matplotlib.axes.Axes`, optional
        Where to draw.  By default a new figure is made.
    terms : tuple of str, optional
        Some of "loss", "log_likelihood" (drawn with the sign of a loss) and "kl".

    Returns
    -------
    `~matplotlib.axes.Axes`
        The axes.

    Raises
    ------
    ValueError
        If there is no such term, or no epoch.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import plot
    >>> history = {
    ...     "epoch": np.arange(1, 6),
    ...     "loss": np.array([90.0, 50, 32, 25, 20]),
    ...     "validation_loss": np.array([85.0, 52, 38, 36, 37]),
    ... }
    >>> ax = plot.loss_curves(history)
    >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
    ('Epoch', ['training', 'validation', 'best epoch: 4'])
    """
    best = getattr(history, "best_epoch", None)
    columns: Mapping[str, np.ndarray] = getattr(history, "history", history)
    unknown = [term for term in terms if term not in _TERMS]
    if unknown or not terms:
        raise ValueError(f"terms must be some of {', '.join(_TERMS)}, not {', '.join(unknown)}")
    epoch = np.asarray(columns["epoch"])
    if not epoch.size:
        raise ValueError("the history holds no epoch")
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")

    drawn = []
    for k, term in enumerate(terms):
        color = drawing.MODEL_COLORS[k % len(drawing.MODEL_COLORS)]
        for prefix, style, name in (("", "-", "training"), ("validation_", "--", "validation")):
            values = np.asarray(columns.get(prefix + term, []), dtype=float)
            if term == "log_likelihood":
                values = -values
            if not np.isfinite(values).any():
                continue
            label = name if len(terms) == 1 else f"{_TERMS[term]}, {name}"
            # a single epoch would be an invisible line
            marker = "o" if epoch.size < 3 else None
            ax.plot(epoch, values, color=color, ls=style, lw=1.5, marker=marker, ms=4, label=label)
            drawn.append(values[np.isfinite(values)])
    if best is None and np.isfinite(np.asarray(columns.get("validation_loss", []), float)).any():
        best = int(epoch[np.nanargmin(columns["validation_loss"])])
    if best:
        ax.axvline(best, color="0.5", ls=":", lw=1, zorder=0, label=f"best epoch: {best}")
    _scale(ax, drawn)
    ax.set_xlabel("Epoch")
    ax.set_ylabel(f"{_TERMS[terms[0]].capitalize() if len(terms) == 1 else 'Loss'} per stamp [nat]")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _scale(ax: Axes, drawn: list[np.ndarray]) -> None:
    """Logarithmic where the losses span decades, so that the end can be seen beside the start."""
    values = np.concatenate(drawn) if drawn else np.zeros(1)
    if values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")
        return
    # Where a loss may be negative its first values would flatten all that follows.
    rest = np.concatenate([v[1:] for v in drawn if v.size > 4] or [values])
    low, high = rest.min(), rest.max()
    if values.max() > high + 4 * (high - low) > high:
        margin = 0.05 * (high - low)
        ax.set_ylim(low - margin, high + 4 * margin)
