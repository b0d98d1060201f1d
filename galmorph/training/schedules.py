"""How the learning rate and the weight of the prior change while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["SCHEDULES", "beta_per_epoch", "learning_rate_factor"]


def _constant(t: float) -> float:
    return 1.0


def _cosine(t: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * t))


#: Factor of the learning rate after the warm-up, of the fraction of the run that is done.
SCHEDULES = {"cosine": _cosine, "constant": _constant}


def learning_rate_factor(step: int, n_steps: int, *, schedule: str, warmup: int = 0) -> float:
    """Factor of the learning rate at one step.

    It rises linearly over ``warmup`` steps, then follows the schedule:
    "constant" stays at 1, "cosine" falls to 0 at the end as half a cosine.

    Parameters
    ----------
    step : int
        The step, from 0.
    n_steps : int
        Steps of the whole run.
    schedule : {"cosine", "constant"}
        What follows the warm-up.
    warmup : int, optional
        Steps of the warm-up.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If the schedule has no such name.

    Examples
    --------
    >>> from galmorph.training.schedules import learning_rate_factor
    >>> [round(learning_rate_factor(i, 8, schedule="cosine", warmup=4), 2) for i in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(n_steps - warmup, 1))


def beta_per_epoch(beta: float | Sequence[float], epochs: int) -> list[float]:
    """The weight of the Kullback-Leibler divergence at each epoch.

    Parameters
    ----------
    beta : float or sequence of float, length ``epochs``
        One number for all epochs, or one for each.
    epochs : int
        Number of epochs.

    Returns
    -------
    list of float

    Raises
    ------
    ValueError
        If a value is negative or not finite, or there is not one for each epoch.

    Examples
    --------
    >>> from galmorph.training.schedules import beta_per_epoch
    >>> beta_per_epoch(0.5, 3)
    [0.5, 0.5, 0.5]
    >>> beta_per_epoch([0, 0.5, 1], 3)
    [0.0, 0.5, 1.0]
    """
    values = np.asarray(beta)
    if values.dtype.kind not in "iuf" or values.ndim > 1:
        raise ValueError(f"beta must be a number, or one per epoch, not {beta!r}")
    if values.ndim == 1 and len(values) != epochs:
        raise ValueError(f"beta holds {len(values)} values for {epochs} epochs")
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"beta must be finite and not negative, not {beta!r}")
    return [float(b) for b in np.broadcast_to(values, epochs)]
