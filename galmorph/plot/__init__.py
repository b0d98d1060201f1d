"""Figures of fits, of networks and of classes.

Figures of fits take a `~galmorph.FitResult` (some a dictionary of them) and
draw what is in it; those of networks take arrays, a network or the history of
its training; those of classes take arrays or the tables of `galmorph.agreement`.
None of them fits.  Matplotlib is imported when a figure is
made, not before.

Conventions that all figures of fits share: images are drawn with y upwards in the
pixel coordinates of the parent image, pixel (0, 0) centred on (0, 0); the
fitted background is subtracted from data and model; pixels that the fit did
not use are grey and hatched; residuals are (data - model) / σ.
"""

from .calibration import coverage, pulls, rank_histograms
from .classes import (
    class_overlap,
    class_profiles,
    class_sheet,
    confusion,
    latent_map,
    model_selection,
    votes,
)
from .comparison import compare_fits
from .covariance import corner
from .latents import latents_tsne, posterior_draws, reconstructions, traversal
from .model_comparison import evidence_differences, misfit, model_probabilities
from .panels import fit
from .profile import radial_profile
from .scene import scene
from .sheet import contact_sheet
from .training import loss_curves

__all__ = [
    "class_overlap",
    "class_profiles",
    "class_sheet",
    "compare_fits",
    "confusion",
    "contact_sheet",
    "corner",
    "coverage",
    "evidence_differences",
    "fit",
    "latent_map",
    "latents_tsne",
    "loss_curves",
    "misfit",
    "model_probabilities",
    "model_selection",
    "posterior_draws",
    "pulls",
    "radial_profile",
    "rank_histograms",
    "reconstructions",
    "scene",
    "traversal",
    "votes",
]
