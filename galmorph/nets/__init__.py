"""Networks that draw and describe galaxies, and their weights."""

from .conditions import Conditions
from .convolutional import ConvolutionalDecoder, ConvolutionalEncoder
from .likelihood import ConstantScale, DiagonalNormal, FixedNormal, RMSScale
from .mlp import MLPDecoder, MLPEncoder
from .presets import (
    ALIASES,
    PRESETS,
    astrovader2020,
    beta_vae,
    cvae,
    cvae2,
    fancy_cvae,
    from_config,
    regier2015,
)
from .priors import DiagonalMixture, GaussianMixture, StandardNormal, fit_prior
from .vae import GalaxyVAE
from .weights import InstalledWeights, WeightsError, available, from_pretrained, load, save

__all__ = [
    "ALIASES",
    "PRESETS",
    "Conditions",
    "ConstantScale",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "DiagonalMixture",
    "DiagonalNormal",
    "FixedNormal",
    "GalaxyVAE",
    "GaussianMixture",
    "InstalledWeights",
    "MLPDecoder",
    "MLPEncoder",
    "RMSScale",
    "StandardNormal",
    "WeightsError",
    "astrovader2020",
    "available",
    "beta_vae",
    "cvae",
    "cvae2",
    "fancy_cvae",
    "fit_prior",
    "from_config",
    "from_pretrained",
    "load",
    "regier2015",
    "save",
]
