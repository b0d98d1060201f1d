"""Priors of single parameters, for fits that know something already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["INDEX_PRIOR", "LogNormal", "LogUniform", "Normal", "Prior", "Truncated", "Uniform"]


class Prior(Protocol):
    """What a fitter asks of a prior."""

    #: Beyond these values the density is zero.
    support: tuple[float, float]

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A residual whose square is -2 ln p (but for a constant), and its derivative."""

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density."""

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share (0 to 1) of the probability lies."""

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
    support = (-np.inf, np.inf)

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

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""
        return (self.mean - np.asarray(value, dtype=float)) / self.std**2

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share of the probability lies."""
        from scipy.special import ndtri

        return self.mean + self.std * ndtri(share)

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""
        from scipy.special import ndtr

        return ndtr((np.asarray(value, dtype=float) - self.mean) / self.std)

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
    support = (0.0, np.inf)

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

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""
        residual, by_value = self.residual(np.asarray(value, dtype=float))
        with np.errstate(invalid="ignore", over="ignore"):
            return -(residual + self.sigma) * by_value

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share of the probability lies."""
        from scipy.special import ndtri

        return self.median * np.exp(self.sigma * ndtri(share))

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""
        from scipy.special import ndtr

        with np.errstate(divide="ignore"):
            return ndtr(np.log(np.maximum(value, 0.0) / self.median) / self.sigma)

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``size`` values."""
        return self.median * np.exp(self.sigma * np.random.default_rng(rng).normal(size=size))


class _Between:
    """What priors that end at two values share."""

    low: float
    high: float

    @property
    def support(self) -> tuple[float, float]:
        """Beyond these values the density is zero."""
        return self.low, self.high

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nothing: a fit feels this prior as bounds, which fitters set."""
        return np.zeros_like(value), np.zeros_like(value)

    def _within(self, value: np.ndarray, inside: np.ndarray) -> np.ndarray:
        return np.where((value >= self.low) & (value <= self.high), inside, -np.inf)

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``size`` values."""
        return self.ppf(np.random.default_rng(rng).uniform(size=size))


@dataclass(frozen=True)
class Uniform(_Between):
    """A prior that is the same everywhere between two values.

    Parameters
    ----------
    low, high : float

    Examples
    --------
    >>> from galmorph import Uniform
    >>> Uniform(0.0, 0.5).log_prob([0.2, 0.7]).round(3)
    array([0.693,  -inf])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError("a uniform prior needs two finite values, the lower one first")

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density."""
        return self._within(np.asarray(value, dtype=float), -np.log(self.high - self.low))

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""
        return np.zeros_like(np.asarray(value, dtype=float))

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share of the probability lies."""
        return self.low + (self.high - self.low) * np.asarray(share, dtype=float)

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""
        return np.clip((np.asarray(value, dtype=float) - self.low) / (self.high - self.low), 0, 1)


@dataclass(frozen=True)
class LogUniform(_Between):
    """A prior that is the same for every octave between two positive values.

    Parameters
    ----------
    low, high : float

    Examples
    --------
    >>> from galmorph import LogUniform
    >>> LogUniform(1.0, 100.0).ppf([0.0, 0.5, 1.0])
    array([  1.,  10., 100.])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < np.inf:
            raise ValueError("a log-uniform prior needs two positive values, the lower one first")

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density (by the parameter, not its logarithm)."""
        value = np.asarray(value, dtype=float)
        safe = np.maximum(value, self.low)
        return self._within(value, -np.log(safe * np.log(self.high / self.low)))

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""
        return -1.0 / np.maximum(np.asarray(value, dtype=float), self.low)

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share of the probability lies."""
        return self.low * (self.high / self.low) ** np.asarray(share, dtype=float)

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""
        safe = np.maximum(np.asarray(value, dtype=float), self.low)
        return np.clip(np.log(safe / self.low) / np.log(self.high / self.low), 0, 1)


@dataclass(frozen=True)
class Truncated:
    """Another prior between two values only, normalised there.

    Parameters
    ----------
    prior : Prior
    low, high : float

    Examples
    --------
    >>> from galmorph import LogNormal
    >>> from galmorph.priors import Truncated
    >>> half = Truncated(LogNormal(2.0, 0.7), 0.0, 2.0)
    >>> bool(np.isclose(half.log_prob(1.0), LogNormal(2.0, 0.7).log_prob(1.0) + np.log(2)))
    True
    """

    prior: Prior
    low: float
    high: float

    @property
    def support(self) -> tuple[float, float]:
        """Beyond these values the density is zero."""
        low, high = self.prior.support
        return max(low, self.low), min(high, self.high)

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residual and its derivative, of the prior itself."""
        return self.prior.residual(value)

    def log_prob(self, value: np.ndarray) -> np.ndarray:
        """Logarithm of the density."""
        value = np.asarray(value, dtype=float)
        low, high = self.support
        mass = np.log(self.prior.cdf(high) - self.prior.cdf(low))
        return np.where(
            (value >= low) & (value <= high), self.prior.log_prob(value) - mass, -np.inf
        )

    def slope(self, value: np.ndarray) -> np.ndarray:
        """Derivative of the logarithm of the density."""
        return self.prior.slope(value)

    def cdf(self, value: np.ndarray) -> np.ndarray:
        """Probability of what is lower than a value."""
        low, high = (self.prior.cdf(edge) for edge in self.support)
        return np.clip((self.prior.cdf(value) - low) / (high - low), 0, 1)

    def ppf(self, share: np.ndarray) -> np.ndarray:
        """The value below which a share of the probability lies."""
        low, high = (self.prior.cdf(edge) for edge in self.support)
        return self.prior.ppf(low + (high - low) * np.asarray(share, dtype=float))

    def sample(self, size: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``size`` values."""
        return self.ppf(np.random.default_rng(rng).uniform(size=size))


#: Of Sérsic indices, where nothing else is said: broad enough for the disks (n near 1) and
#: the ellipticals (n near 4) of nearby surveys alike (Simard et al. 2011, ApJS 196, 11).
INDEX_PRIOR = LogNormal(2.0, 0.7)
