"""AB magnitudes of fluxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy import units as u

__all__ = ["POGSON", "magnitudes", "zero_point"]

#: Magnitudes per unit of the natural logarithm of a flux.
POGSON = 2.5 / np.log(10)


def zero_point(unit: Any) -> float | None:
    """AB magnitude of a flux of one, or None if the unit is not one of flux density."""
    if unit is None:
        return None
    try:
        return float((1 * unit).to(u.ABmag).value)
    except u.UnitConversionError:
        return None


def magnitudes(flux: np.ndarray, error: np.ndarray, zero: float) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes and their errors; NaN for fluxes that are not positive."""
    with np.errstate(invalid="ignore", divide="ignore"):
        bright = np.where(flux > 0, flux, np.nan)
        return zero - 2.5 * np.log10(bright), POGSON * error / bright
