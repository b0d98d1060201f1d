"""How well a model predicts the pixels before it is fitted: the marginal likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from galmorph.results import FitResult

__all__ = ["log_evidence"]

_METHODS = ("laplace", "importance", "nested")


def log_evidence(
    result: FitResult,
    *,
    method: str = "importance",
    n: int = 1000,
    rng: np.random.Generator | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the evidence of the fitted pixels, for every galaxy.

    Parameters
    ----------
    result : FitResult
        Of any fitter; its priors, and where it has none those of `MCMCFitter`.
    method : {"importance", "laplace", "nested"}, optional
        The mean weight of draws from Student t distributions that are fitted to the posterior in a
        few rounds; the volume of the normal approximation; or nested sampling with dynesty (slow).
    n : int, optional
        Draws, or live points of nested sampling.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    value, error : array, shape (N,)
        Natural logarithm, in the unit of the data to the power of minus the number of pixels, and
        its standard error (for Laplace's approximation NaN: its error is not known).  NaN
        where the fit failed.  A difference between two models of the same pixels is the
        logarithm of the Bayes factor.

    Raises
    ------
    ValueError
        If the method is not known, or the result was read from a file, which holds no pixels.

    Notes
    -----
    MacKay 2003, *Information Theory, Inference, and Learning Algorithms*, chapter 28.  Models that
    are compared share the priors of flux, position, size, ellipticity and angle, whose widths
    then cancel.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.evidence import log_evidence
    >>> truth = GaussianGalaxy2D(flux=300, x_0=12, y_0=12, r_eff=3, ellip=0.3)
    >>> image = truth.render((25, 25)) + np.random.default_rng(1).normal(0, 0.5, (25, 25))
    >>> model = GaussianGalaxy2D(psf=np.ones((1, 1)))
    >>> result = fit_images(image, model, uncertainty=0.5)
    >>> value, error = log_evidence(result, rng=1)
    >>> laplace, _ = log_evidence(result, method="laplace")
    >>> bool(abs(value[0] - laplace[0]) < 0.5)
    True
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, not {method!r}")
    from galmorph._sampling import evidence_of, targets_of

    if isinstance(rng, np.random.Generator):
        rng = int(rng.integers(2**62))
    value, error = np.full(len(result), np.nan), np.full(len(result), np.nan)
    for rows, target in targets_of(result, dtype="float32"):
        seeds = [(int(rng), int(i)) for i in rows]
        value[rows], error[rows] = evidence_of(result, rows, target, seeds, method, n)
    return value, error
