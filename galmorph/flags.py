"""The quality flags of a fit: one bit each, with a name and a meaning."""

from __future__ import annotations

from enum import IntFlag

import numpy as np

__all__ = ["FitFlag", "decode_flags"]


class FitFlag(IntFlag):
    """What a fit has to say about itself, one bit each.

    A galaxy whose ``flags`` is 0 was fitted without any remark.  Flags that
    are in `FitFlag.FAILED` mean that the parameters are not to be used (they
    are NaN where nothing could be fitted at all).

    Examples
    --------
    >>> from galmorph import FitFlag
    >>> FitFlag(5)
    <FitFlag.NOT_CONVERGED|BAD_CENTER: 5>
    >>> bool(FitFlag(5) & FitFlag.AT_BOUND)
    False
    """

    #: The iteration limit was reached before the parameters settled.
    NOT_CONVERGED = 1
    #: A parameter ended on one of its bounds; its uncertainty is one-sided.
    AT_BOUND = 2
    #: Unusable pixels (masked, NaN, no uncertainty) within 1.5 pixels of the centre.
    BAD_CENTER = 4
    #: The fitted flux is below 5 of its standard deviations (or negative): no detection.
    LOW_SNR = 8
    #: The stamp is cut by the edge of the image, or the fitted centre is within
    #: two pixels of the edge of the stamp.
    EDGE = 16
    #: No usable pixel at all (all NaN, all masked, all without uncertainty).
    NO_DATA = 32
    #: Fewer usable pixels than free parameters.
    FEW_PIXELS = 64
    #: The curvature of the likelihood could not be inverted; the covariance is NaN.
    BAD_COVARIANCE = 128
    #: The PSF of this galaxy is unusable (NaN, empty, zero sum).
    BAD_PSF = 256
    #: The requested position is outside the image.
    OUTSIDE = 512
    #: A plateau of identical brightest pixels: probably saturated.
    SATURATED = 1024
    #: Some pixels had an uncertainty that is zero, negative or NaN; they were not used.
    BAD_UNCERTAINTY = 2048
    #: Reduced chi-square above 2 or its excess over 1 is beyond 10 standard
    #: deviations: the model, the noise or the mask is not adequate.
    POOR_FIT = 4096
    #: No uncertainty was given; the noise was estimated from the stamp itself.
    NOISE_ESTIMATED = 8192
    #: Markov chains have not converged (R-hat or the effective sample size).
    CHAINS = 16384
    #: The largest importance weights are too large (Pareto k above 0.7).
    WEIGHTS = 32768

    #: Parameters that must not be used.
    FAILED = NO_DATA | FEW_PIXELS | BAD_PSF | OUTSIDE


def decode_flags(flags: int | np.ndarray) -> list[str] | list[list[str]]:
    """Names of the bits that are set.

    Parameters
    ----------
    flags : int or array of int, shape (N,)
        Bit masks.

    Returns
    -------
    list of str, or a list of such lists
        The names, in the order of the bits.

    Examples
    --------
    >>> from galmorph import decode_flags
    >>> decode_flags(10)
    ['AT_BOUND', 'LOW_SNR']
    """
    if np.ndim(flags) > 0:
        return [decode_flags(int(f)) for f in np.ravel(flags)]
    single = (f for f in FitFlag if f.value & (f.value - 1) == 0)
    return [f.name for f in single if int(flags) & f.value]
