"""Priors of single parameters, for fits that know something already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["INDEX_PRIOR", "LogNormal", "Normal", "Prior"]


class Prior(Protocol):
    """What a fitter asks of a prior."""

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A residual whose square is -2 ln p (but for a constant), and its derivative."""

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density."""

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draws."""


@dataclass(frozen=True)
class Normal:
    """A normal prior.

    Parameters
    ----------
    mean, std : float
        Of the parameter, in its own unit (radians for angles).

    Examples
    --------
    >>> from galmorph import Normal
    >>> round(float(Normal(1.0, 0.5).log_prob(1.0)), 3)
    -0.226
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError("a prior needs a finite mean and a positive, finite width")

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residual and its derivative."""
        return (value - self.mean) / self.std, np.full_like(value, 1.0 / self.std)

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density."""
        z = (np.asarray(value, dtype=float) - self.mean) / self.std
        return -0.5 * z * z - np.log(self.std * np.sqrt(2 * np.pi))

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``size`` values."""
        return np.random.default_rng(rng).normal(self.mean, self.std, size)


@dataclass(frozen=True)
class LogNormal:
    """A prior that is normal in the logarithm, for what is positive.

    Parameters
    ----------
    median : float
        Of the parameter.
    sigma : float
        Width in the natural logarithm.

    Notes
    -----
    Fits take its mode in the logarithm of the parameter, which is the median.

    Examples
    --------
    >>> from galmorph import LogNormal, MAPFitter
    >>> fitter = MAPFitter(priors={"n": LogNormal(1.5, 0.6)})
    """

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.median) and self.median > 0 and 0 < self.sigma < np.inf):
            raise ValueError("a log-normal prior needs a positive median and width")

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residual and its derivative."""
        safe = np.maximum(value, 1e-12)
        return np.log(safe / self.median) / self.sigma, 1.0 / (safe * self.sigma)

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density (by the parameter, not its logarithm)."""
        value = np.asarray(value, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.log(value / self.median) / self.sigma
            result = -0.5 * z * z - np.log(value * self.sigma * np.sqrt(2 * np.pi))
        return np.where(value > 0, result, -np.inf)

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``size`` values."""
        return self.median * np.exp(self.sigma * np.random.default_rng(rng).normal(size=size))


#: Of Sérsic indices, where nothing else is said: broad enough for the disks (n near 1) and
#: the ellipticals (n near 4) of nearby surveys alike (Simard et al. 2011, ApJS 196, 11).
INDEX_PRIOR = LogNormal(2.0, 0.7)
