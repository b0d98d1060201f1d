"""Galaxy models: astropy models that draw PSF-convolved, pixel-integrated light."""

from galmorph.models.base import GalaxyModel
from galmorph.models.bulge_disk import BulgeDiskGalaxy2D
from galmorph.models.gaussian import GaussianGalaxy2D
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.models.point_source import PointSource2D
from galmorph.models.sersic import SersicGalaxy2D

__all__ = [
    "BulgeDiskGalaxy2D",
    "GalaxyModel",
    "GaussianGalaxy2D",
    "LearnedGalaxy2D",
    "PointSource2D",
    "SersicGalaxy2D",
]
