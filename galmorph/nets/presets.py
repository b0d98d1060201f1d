"""The architectures that can be built by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .likelihood import DiagonalNormal, make_scale
from .mlp import MLPDecoder, MLPEncoder
from .priors import StandardNormal
from .vae import GalaxyVAE

__all__ = ["ALIASES", "PRESETS", "build", "from_config", "regier2015"]


def regier2015(
    *,
    image_shape: Sequence[int] = (69, 69),
    latent_size: int = 8,
    hidden: Sequence[int] = (128, 128),
    scale: float | str = "rms",
    positive_mean: bool = False,
) -> GalaxyVAE:
    r"""The network of Regier, McAuliffe & Prabhat (2015).

    Eight latents with the prior N(0, I); an encoder and a decoder of two hidden layers of
    128 ReLU units each; a mean and a standard deviation of every pixel, by two heads on one
    trunk, the standard deviation made positive by the exponential; independent normal pixels.

    It learns galaxies as they look in its training images, with PSF and noise: images to
    be described have to be cut, scaled and stretched as those were.  Pixel values should not be
    negative: background subtracted, or a stretch that ends at 0.

    Parameters
    ----------
    image_shape : sequence of int
        (ny, nx); 69 x 69 as published.
    latent_size : int
        Number of latents.
    hidden : sequence of int
        Sizes of the hidden layers of both networks.
    scale : float or "rms"
        Pixel value that the networks see as 1 (255 for images of eight bits); or "rms", each
        image's root mean square, so that images may be in any unit.  In both cases images go in
        and come out in their own units, and which of two models of the same image
        is more probable does not depend on it.
    positive_mean : bool
        Whether the mean is made positive by the exponential as well.

    Returns
    -------
    GalaxyVAE
        Untrained.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or the scale not positive.

    Examples
    --------
    >>> from galmorph.nets import regier2015
    >>> vae = regier2015(image_shape=(64, 64))
    >>> vae.latent_size, vae.config["options"]["image_shape"]
    (8, [64, 64])
    """
    image_shape = _sizes("image_shape", image_shape)
    if len(image_shape) != 2:
        raise ValueError(f"image_shape must be (ny, nx), not {tuple(image_shape)}")
    hidden = _sizes("hidden", hidden)
    (latent_size,) = _sizes("latent_size", [latent_size])
    options = {
        "image_shape": image_shape,
        "latent_size": latent_size,
        "hidden": hidden,
        "scale": scale,
        "positive_mean": bool(positive_mean),
    }
    shape = (image_shape[0], image_shape[1])
    return GalaxyVAE(
        MLPEncoder(shape, latent_size, hidden),
        MLPDecoder(shape, latent_size, hidden, positive_mean=bool(positive_mean)),
        StandardNormal(latent_size),
        DiagonalNormal(),
        scale=make_scale(scale),
        image_shape=shape,
        config={"preset": "regier2015", "options": options},
    )


def _galmorph(**options: Any) -> GalaxyVAE:
    from .learned import galmorph_preset

    return galmorph_preset(**options)


#: Presets by name: functions of keyword options that return an untrained network.
PRESETS: dict[str, Callable[..., GalaxyVAE]] = {"regier2015": regier2015, "galmorph": _galmorph}

#: Other names of presets and of weights.
ALIASES = {"default": "galmorph"}


def build(name: str, **options: Any) -> GalaxyVAE:
    """Build a preset by its name.

    Parameters
    ----------
    name : str
        A key of `PRESETS`, or an alias.
    **options
        Of the preset.

    Raises
    ------
    ValueError
        If there is no such preset.
    """
    preset = PRESETS.get(ALIASES.get(name, name))
    if preset is None:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return preset(**options)


def from_config(config: dict[str, Any]) -> GalaxyVAE:
    """Build the network that a config describes.

    Parameters
    ----------
    config : dict
        ``{"preset": name, "options": {...}}``, as `GalaxyVAE.config`.

    Raises
    ------
    ValueError
        If it is no config, or names no preset.
    TypeError
        If the preset does not know an option.

    Examples
    --------
    >>> from galmorph.nets import from_config, regier2015
    >>> vae = regier2015(image_shape=(9, 9), hidden=(16, 16))
    >>> from_config(vae.config).config == vae.config
    True
    """
    known = isinstance(config, dict) and set(config) == {"preset", "options"}
    if not known or not isinstance(config["options"], dict):
        raise ValueError('a config is a dict of "preset" and "options"')
    return build(config["preset"], **json.loads(json.dumps(config["options"])))


def _sizes(name: str, values: Sequence[int]) -> list[int]:
    sizes = list(values)
    if not sizes or any(isinstance(v, bool) or int(v) != v or v < 1 for v in sizes):
        raise ValueError(f"{name} must be made of positive integers, not {values!r}")
    return [int(v) for v in sizes]
