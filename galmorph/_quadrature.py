"""Points that stand for a distribution: fixed, so that what is made of them repeats exactly."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["normal_points"]


@lru_cache(maxsize=16)
def normal_points(count: int, size: int) -> np.ndarray:
    """Points (S, size) that stand for N(0, I): each with its opposite, and with its covariance.

    Parameters
    ----------
    count : int
        S, even; as many as 4 ``size`` are made at least.
    size : int
    """
    from scipy.special import ndtri
    from scipy.stats import qmc

    points = qmc.Sobol(size, scramble=True, rng=20261121).random(max(count // 2, 2 * size))
    half = ndtri(np.clip(points, 1e-6, 1 - 1e-6))
    z = np.concatenate([half, -half])
    z = z @ np.linalg.cholesky(np.linalg.inv(z.T @ z / len(z)))
    z.flags.writeable = False  # it is kept
    return z
