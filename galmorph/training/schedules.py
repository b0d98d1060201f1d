"""How the learning rate and the weight of the prior change while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["SCHEDULES", "CyclicalAnnealing", "beta_per_epoch", "learning_rate_factor"]


def _constant(t: float, final: float) -> float:
    return 1.0


def _cosine(t: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * t))


def _exponential(t: float, final: float) -> float:
    return final**t


#: Factor of the learning rate after the warm-up, of the fraction of the run that is done and of
#: the factor at the end.
SCHEDULES = {"cosine": _cosine, "constant": _constant, "exponential": _exponential}


def learning_rate_factor(
    step: int, n_steps: int, *, schedule: str, warmup: int = 0, final: float = 0.0
) -> float:
    """Factor of the learning rate at one step.

    It rises linearly over ``warmup`` steps, then follows the schedule: "constant" stays
    at 1, "cosine" falls to ``final`` at the end as half a cosine, "exponential" by the same
    factor at each step.

    Parameters
    ----------
    step : int
        The step, from 0.
    n_steps : int
        Steps of the whole run.
    schedule : {"cosine", "constant", "exponential"}
        What follows the warm-up.
    warmup : int, optional
        Steps of the warm-up.
    final : float, optional
        Factor at the end; above 0 for "exponential".

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
    >>> [learning_rate_factor(i, 2, schedule="exponential", final=0.01) for i in range(3)]
    [1.0, 0.1, 0.01]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(n_steps - warmup, 1), final)


@dataclass(frozen=True)
class CyclicalAnnealing:
    """A weight of the Kullback-Leibler divergence that rises again and again (Fu et al. 2019).

    Parameters
    ----------
    rise, hold : int
        Epochs of each cycle in which it rises to the peak, and stays there.
    warmup : int
        Epochs before the first cycle.
    low, peak : float
        From where to where it rises; in the warm-up it is at the peak.
    power : float
        It rises as this power of the time; 3 as AstroVaDEr has it.

    Raises
    ------
    ValueError
        If a number is negative, ``low`` is above ``peak``, or ``rise`` and ``hold`` are both 0.

    Examples
    --------
    >>> from galmorph.training import CyclicalAnnealing
    >>> CyclicalAnnealing(rise=2, hold=1, warmup=1, power=1).per_epoch(7)
    [1.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    """

    rise: int = 25
    hold: int = 25
    warmup: int = 0
    low: float = 0.0
    peak: float = 1.0
    power: float = 3.0

    def __post_init__(self) -> None:
        for name in ("rise", "hold", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a number of epochs, not {value!r}")
        if self.rise + self.hold < 1 or not (self.peak >= self.low >= 0 and self.power > 0):
            raise ValueError(f"there is nothing to anneal in {self}")

    def per_epoch(self, epochs: int) -> list[float]:
        """The weight at each epoch.

        Parameters
        ----------
        epochs : int
            Number of epochs.

        Returns
        -------
        list of float
        """
        at = np.arange(epochs) - self.warmup
        risen = np.clip((at % (self.rise + self.hold)) / max(self.rise, 1), 0.0, 1.0)
        done = np.where((at < 0) | (self.rise == 0), 1.0, risen**self.power)
        return [float(b) for b in self.low + (self.peak - self.low) * done]


def beta_per_epoch(beta: float | Sequence[float] | CyclicalAnnealing, epochs: int) -> list[float]:
    """The weight of the Kullback-Leibler divergence at each epoch.

    Parameters
    ----------
    beta : float, sequence of float of length ``epochs``, or CyclicalAnnealing
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
    if isinstance(beta, CyclicalAnnealing):
        return beta.per_epoch(epochs)
    values = np.asarray(beta)
    if values.dtype.kind not in "iuf" or values.ndim > 1:
        raise ValueError(f"beta must be a number, or one per epoch, not {beta!r}")
    if values.ndim == 1 and len(values) != epochs:
        raise ValueError(f"beta holds {len(values)} values for {epochs} epochs")
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"beta must be finite and not negative, not {beta!r}")
    return [float(b) for b in np.broadcast_to(values, epochs)]
