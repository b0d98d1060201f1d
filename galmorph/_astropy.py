"""The only file that uses what astropy does not promise to keep."""

from __future__ import annotations

from astropy.modeling.fitting import (
    Covariance,
    StandardDeviations,
    _validate_constraints,
    fitter_unit_support,
)

try:  # astropy >= 7
    from astropy.modeling.fitting import fitter_to_model_params_array, model_to_fit_params
except ImportError:  # pragma: no cover
    from astropy.modeling.fitting import (
        _fitter_to_model_params_array as fitter_to_model_params_array,
    )
    from astropy.modeling.fitting import (
        _model_to_fit_params as model_to_fit_params,
    )

__all__ = [
    "Covariance",
    "StandardDeviations",
    "fitter_to_model_params_array",
    "fitter_unit_support",
    "model_to_fit_params",
    "validate_constraints",
]

validate_constraints = _validate_constraints
