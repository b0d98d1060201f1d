"""Figures of fits.

Every function takes a `~galmorph.FitResult` (some a dictionary of them) and
draws what is in it; none of them fits.  Matplotlib is imported when a figure
is made, not before.

Conventions that all figures share: images are drawn with y upwards in the
pixel coordinates of the parent image, pixel (0, 0) centred on (0, 0); the
fitted background is subtracted from data and model; pixels that the fit did
not use are grey and hatched; residuals are (data - model) / σ.
"""

from .comparison import compare_fits
from .covariance import corner
from .panels import fit
from .profile import radial_profile
from .sheet import contact_sheet
from .training import loss_curves

__all__ = ["compare_fits", "contact_sheet", "corner", "fit", "loss_curves", "radial_profile"]
