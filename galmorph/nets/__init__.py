"""Networks that draw and describe galaxies, and their weights."""

from .likelihood import ConstantScale, DiagonalNormal, RMSScale
from .mlp import MLPDecoder, MLPEncoder
from .presets import ALIASES, PRESETS, from_config, regier2015
from .priors import GaussianMixture, StandardNormal
from .vae import GalaxyVAE
from .weights import InstalledWeights, WeightsError, available, from_pretrained, load, save

__all__ = [
    "ALIASES",
    "PRESETS",
    "ConstantScale",
    "DiagonalNormal",
    "GalaxyVAE",
    "GaussianMixture",
    "InstalledWeights",
    "MLPDecoder",
    "MLPEncoder",
    "RMSScale",
    "StandardNormal",
    "WeightsError",
    "available",
    "from_config",
    "from_pretrained",
    "load",
    "regier2015",
    "save",
]
