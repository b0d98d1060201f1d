"""Whether chains have converged, and what weighted draws are worth."""

from __future__ import annotations

import numpy as np

__all__ = ["effective_sample_size", "pareto_smooth", "split_rhat"]

#: Draws in the tail that the generalised Pareto distribution is fitted to, at least.
_LEAST_TAIL = 5


def _split(chains: np.ndarray) -> np.ndarray:
    """Halves of chains (..., C, T) as chains of their own, (..., 2 C, T // 2)."""
    half = chains.shape[-1] // 2
    return np.concatenate([chains[..., :half], chains[..., -half:]], -2)


def _variances(chains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean variance within the chains, and the pooled estimate."""
    length = chains.shape[-1]
    within = chains.var(-1, ddof=1).mean(-1)
    between = chains.mean(-1).var(-1, ddof=1) if chains.shape[-2] > 1 else 0.0
    return within, within * (length - 1) / length + between


def split_rhat(chains: np.ndarray) -> np.ndarray:
    """Split R-hat: how much wider all chains are together than each half alone.

    Parameters
    ----------
    chains : array, shape (..., C, T)
        T draws of C chains.

    Returns
    -------
    array, shape (...)
        1 when they agree; below 1.01 is what Vehtari et al. (2021) ask for.  1 where nothing
        moves.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.inference.diagnostics import split_rhat
    >>> chains = np.random.default_rng(1).normal(size=(4, 500))
    >>> bool(split_rhat(chains) < 1.01)
    True
    """
    within, pooled = _variances(_split(np.asarray(chains, dtype=float)))
    moved = within > 0
    ratio = np.where(moved, pooled / np.where(moved, within, 1.0), np.where(pooled > 0, np.inf, 1))
    return np.sqrt(ratio)


def effective_sample_size(chains: np.ndarray) -> np.ndarray:
    """How many independent draws tell as much about the mean.

    Parameters
    ----------
    chains : array, shape (..., C, T)

    Returns
    -------
    array, shape (...)

    Notes
    -----
    Autocorrelations of split chains are summed in pairs as long as these are positive, and made
    monotone (Geyer 1992, Statist. Sci. 7, 473; Vehtari et al. 2021, Bayesian Anal. 16, 667).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.inference.diagnostics import effective_sample_size
    >>> chains = np.random.default_rng(1).normal(size=(4, 500))
    >>> bool(1500 < effective_sample_size(chains) < 2500)
    True
    """
    chains = _split(np.asarray(chains, dtype=float))
    count, length = chains.shape[-2:]
    centred = chains - chains.mean(-1, keepdims=True)
    size = 1 << (2 * length - 1).bit_length()
    waves = np.fft.rfft(centred, size)
    covariance = np.fft.irfft(waves * waves.conj(), size)[..., :length].mean(-2) / length
    within, pooled = _variances(chains)
    safe = np.where(pooled > 0, pooled, 1.0)
    rho = 1.0 - (within[..., None] - covariance * length / (length - 1)) / safe[..., None]
    rho[..., 0] = 1.0
    even = length - length % 2
    pairs = rho[..., 0:even:2] + rho[..., 1:even:2]
    positive = np.logical_and.accumulate(pairs > 0, axis=-1)
    pairs = np.minimum.accumulate(np.where(positive, pairs, 0.0), axis=-1)
    time = np.maximum(2.0 * pairs.sum(-1) - 1.0, 1.0 / np.log10(max(count * length, 11)))
    return np.where(pooled > 0, count * length / time, float(count * length))


def pareto_smooth(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Importance weights with the largest ones smoothed, and how heavy their tail is.

    Parameters
    ----------
    log_weights : array, shape (G, S)
        Logarithms of the ratios of target and proposal, each row up to a constant; -inf is no
        weight.

    Returns
    -------
    log_weights : array, shape (G, S)
        Smoothed, normalised to a sum of 1 in each row.
    khat : array, shape (G,)
        Shape of the generalised Pareto distribution of the largest weights; above 0.7
        the weights must not be trusted.  Infinite where fewer than five draws have weight.

    Notes
    -----
    Vehtari, Simpson, Gelman, Yao & Gabry 2024 (JMLR 25, 72), with the estimator of Zhang &
    Stephens 2009 (Technometrics 51, 316).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.inference.diagnostics import pareto_smooth
    >>> z = np.random.default_rng(1).normal(size=(1, 2000))
    >>> weights, khat = pareto_smooth(-0.5 * z**2 * (1 / 0.9**2 - 1))
    >>> bool(khat[0] < 0.5), round(float(np.exp(weights).sum()), 6)
    (True, 1.0)
    """
    raw = np.array(log_weights, dtype=float)
    size = raw.shape[1]
    top = raw.max(1, keepdims=True)
    raw = raw - np.where(np.isfinite(top), top, 0.0)
    tail = int(np.ceil(min(0.2 * size, 3.0 * np.sqrt(size))))
    khat = np.full(len(raw), np.inf)
    order = np.argsort(raw, axis=1)
    for i, (row, by_size) in enumerate(zip(raw, order, strict=True)):
        largest = by_size[-tail:]
        edge = row[by_size[-tail - 1]] if size > tail else -np.inf
        if tail < _LEAST_TAIL or not np.isfinite(edge):
            usable = np.isfinite(row).sum()
            if usable < _LEAST_TAIL:
                continue
            largest = by_size[-max(_LEAST_TAIL, int(0.2 * usable)) :]
            edge = row[by_size[-len(largest) - 1]] if usable > len(largest) else row[largest[0]]
        excess = np.exp(row[largest]) - np.exp(edge)
        if excess[-1] <= 0:  # all alike
            khat[i] = -np.inf
            continue
        shape, scale = _generalised_pareto(np.maximum(excess, 1e-300))
        khat[i] = shape
        share = (np.arange(len(largest)) + 0.5) / len(largest)
        smooth = _quantile(share, shape, scale) + np.exp(edge)
        row[largest] = np.minimum(np.log(smooth), 0.0)
    total = np.logaddexp.reduce(raw, axis=1)
    return raw - np.where(np.isfinite(total), total, 0.0)[:, None], khat


def _generalised_pareto(x: np.ndarray) -> tuple[float, float]:
    """Shape and scale of the distribution of sorted positive values."""
    n = len(x)
    grid = 30 + int(np.sqrt(n))
    quarter = x[max(int(n / 4 + 0.5) - 1, 0)]
    steps = np.arange(1, grid + 1) - 0.5
    b = 1.0 / x[-1] + (1.0 - np.sqrt(grid / steps)) / (3.0 * quarter)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.log1p(-b[:, None] * x).mean(1)
        profile = n * (np.log(-b / k) - k - 1.0)
    profile = np.where(np.isfinite(profile), profile, -np.inf)
    weight = np.exp(profile - profile.max())
    best = float((b * weight).sum() / weight.sum())
    shape = float(np.log1p(-best * x).mean())
    scale = -shape / best if best != 0 else float(x.mean())
    # a weak prior that matters for short tails
    return shape * n / (n + 10.0) + 5.0 / (n + 10.0), scale


def _quantile(share: np.ndarray, shape: float, scale: float) -> np.ndarray:
    if abs(shape) < 1e-9:
        return -scale * np.log1p(-share)
    return scale * np.expm1(-shape * np.log1p(-share)) / shape
