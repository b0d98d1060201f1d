"""Figures of fits and of networks.

Figures of fits take a `~galmorph.FitResult` (some a dictionary of them) and
draw what is in it; those of networks take arrays, a network or the history of
its training.  None of them fits.  Matplotlib is imported when a figure is
made, not before.

Conventions that all figures of fits share: images are drawn with y upwards in the
pixel coordinates of the parent image, pixel (0, 0) centred on (0, 0); the
fitted background is subtracted from data and model; pixels that the fit did
not use are grey and hatched; residuals are (data - model) / σ.
"""

from .comparison import compare_fits
from .covariance import corner
from .latents import latents_tsne, posterior_draws, reconstructions, traversal
from .panels import fit
from .profile import radial_profile
from .sheet import contact_sheet
from .training import loss_curves

__all__ = [
    "compare_fits",
    "contact_sheet",
    "corner",
    "fit",
    "latents_tsne",
    "loss_curves",
    "posterior_draws",
    "radial_profile",
    "reconstructions",
    "traversal",
]
