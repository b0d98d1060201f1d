"""galmorph: galaxy models, fitted to images, as astropy models and fitters."""

from __future__ import annotations

import importlib

import astropy.modeling  # noqa: F401  first of all: it imports our fitters by entry point

__all__ = [
    "PSF",
    "BulgeDiskGalaxy2D",
    "EncoderFitter",
    "FitFlag",
    "FitResult",
    "ForcedPhotometry",
    "GalaxyClassifier",
    "GalaxyVAE",
    "GaussianGalaxy2D",
    "ImportanceFitter",
    "LearnedGalaxy2D",
    "LogNormal",
    "LogUniform",
    "MAPFitter",
    "MCMCFitter",
    "MultiBandResult",
    "NestedFitter",
    "Normal",
    "PSFField",
    "Photometry",
    "PointSource2D",
    "SceneResult",
    "SersicGalaxy2D",
    "Uniform",
    "__version__",
    "calibrate",
    "compare",
    "deblend",
    "deblend_bands",
    "decode_flags",
    "fit_images",
    "forced_photometry",
    "photometry",
]

_HOME = {
    "BulgeDiskGalaxy2D": "models",
    "GalaxyClassifier": "classification",
    "GalaxyVAE": "nets",
    "GaussianGalaxy2D": "models",
    "LearnedGalaxy2D": "models",
    "PointSource2D": "models",
    "SersicGalaxy2D": "models",
    "EncoderFitter": "fitting",
    "calibrate": "calibration",
    "compare": "comparison",
    "SceneResult": "deblending",
    "deblend": "deblending",
    "ForcedPhotometry": "multiband",
    "MultiBandResult": "multiband",
    "deblend_bands": "multiband",
    "forced_photometry": "multiband",
    "Photometry": "catalog",
    "photometry": "catalog",
    "FitFlag": "flags",
    "decode_flags": "flags",
    "FitResult": "results",
    "LogNormal": "priors",
    "LogUniform": "priors",
    "Normal": "priors",
    "Uniform": "priors",
    "ImportanceFitter": "sampling",
    "MAPFitter": "fitting",
    "MCMCFitter": "sampling",
    "NestedFitter": "sampling",
    "PSF": "psf",
    "PSFField": "psf",
    "fit_images": "images",
}

_MODULES = {
    "agreement",
    "btk",
    "calibration",
    "catalog",
    "classification",
    "comparison",
    "conditional",
    "deblending",
    "derived",
    "detection",
    "latents",
    "multiband",
    "noise",
    "plot",
    "report",
    "sdss",
    "simulate",
    "synthetic",
}


def __getattr__(name: str):
    if name == "__version__":
        try:
            return importlib.import_module("galmorph._version").__version__
        except ImportError:
            return "0+unknown"
    if name in _HOME:
        return getattr(importlib.import_module(f"galmorph.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"galmorph.{name}")
    raise AttributeError(f"module 'galmorph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
