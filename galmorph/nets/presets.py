"""The architectures that can be built by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .conditions import Conditions
from .convolutional import (
    POOLING_FACTOR,
    STRIDED_FACTOR,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    pooling_stack,
    pooling_trunk,
    strided_stack,
    strided_trunk,
)
from .likelihood import ConstantScale, DiagonalNormal, FixedNormal, make_scale
from .mlp import MLPDecoder, MLPEncoder
from .priors import DiagonalMixture, GaussianMixture, StandardNormal
from .vae import GalaxyVAE

__all__ = [
    "ALIASES",
    "PRESETS",
    "astrovader2020",
    "beta_vae",
    "build",
    "cvae",
    "cvae2",
    "fancy_cvae",
    "from_config",
    "regier2015",
]

#: Side of the images that the losses of the published convolutional networks are summed over.
_PUBLISHED_SIDE = 128


def regier2015(
    *,
    image_shape: Sequence[int] = (69, 69),
    latent_size: int = 8,
    hidden: Sequence[int] = (128, 128),
    scale: float | str = "rms",
    positive_mean: bool = False,
    components: int = 0,
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
    components : int
        Of a Gaussian mixture in place of N(0, I), as `fit_prior` makes it; 0 is none.

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
    shape = _shape(image_shape)
    hidden = _sizes("hidden", hidden)
    (latent_size,) = _sizes("latent_size", [latent_size])
    prior, components = _prior(components, latent_size)
    options = {
        "image_shape": list(shape),
        "latent_size": latent_size,
        "hidden": hidden,
        "scale": scale,
        "positive_mean": bool(positive_mean),
        "components": components,
    }
    return GalaxyVAE(
        MLPEncoder(shape, latent_size, hidden),
        MLPDecoder(shape, latent_size, hidden, positive_mean=bool(positive_mean)),
        prior,
        DiagonalNormal(),
        scale=make_scale(scale),
        image_shape=shape,
        config={"preset": "regier2015", "options": options},
    )


def astrovader2020(
    *,
    image_shape: Sequence[int] = (128, 128),
    latent_size: int = 20,
    channels: Sequence[int] = (64, 64, 16),
    components: int = 12,
    noise: float | None = None,
    scale: float = 255.0,
) -> GalaxyVAE:
    r"""The network of AstroVaDEr (Spindler, Geach & Smith 2021): classes learned with the latents.

    Three pairs of convolutions (3 x 3, then 5 x 5) with pooling, mirrored by the decoder with
    bilinear upsampling; latents whose prior is a mixture of diagonal normals, learned with the
    network (variational deep embedding).  `galmorph.training.train` makes it a mixture after
    ``prior_warmup`` epochs; `GalaxyVAE.responsibilities` gives the classes.

    Parameters
    ----------
    image_shape : sequence of int
        (ny, nx); 128 x 128 as published, at least 8 x 8.
    latent_size : int
        Number of latents.
    channels : sequence of int
        Of the three pairs of convolutions.
    components : int
        Of the mixture.
    noise : float, optional
        Standard deviation of a pixel, in units of the scale.  By default the loss is the
        published one, the summed squared error, where the sum is over an image of 128 x 128 pixels:
        with fewer pixels each counts more.
    scale : float
        Pixel value that the network sees as 1.

    Returns
    -------
    GalaxyVAE
        Untrained; its prior is N(0, I) until it is started.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or noise or scale not positive.

    Examples
    --------
    >>> from galmorph.nets import astrovader2020
    >>> vae = astrovader2020(image_shape=(32, 32))
    >>> vae.latent_size, vae.prior().mixture_distribution.probs.shape
    (20, torch.Size([12]))
    """
    shape = _shape(image_shape)
    channels = _sizes("channels", channels)
    if len(channels) != 3:
        raise ValueError(f"channels must be three numbers, not {channels!r}")
    latent_size, components = _sizes("latent_size and components", [latent_size, components])
    options = {
        "image_shape": list(shape),
        "latent_size": latent_size,
        "channels": channels,
        "components": components,
        "noise": noise,
        "scale": scale,
    }
    return GalaxyVAE(
        ConvolutionalEncoder(partial(pooling_trunk, channels=channels), shape, latent_size),
        ConvolutionalDecoder(
            pooling_stack(channels), channels[-1], POOLING_FACTOR, shape, latent_size
        ),
        DiagonalMixture(components, latent_size),
        _summed_error(noise, shape),
        scale=ConstantScale(scale),
        image_shape=shape,
        config={"preset": "astrovader2020", "options": options},
    )


def beta_vae(
    *,
    image_shape: Sequence[int] = (128, 128),
    latent_size: int = 32,
    filters: int = 64,
    components: int = 0,
    noise: float | None = None,
    scale: float = 255.0,
) -> GalaxyVAE:
    r"""A beta-VAE with the layers of DCGAN, as published for galaxies of the Hubble deep field.

    Four convolutions of stride 2 with batch norm, the first with 64 filters, each next one with
    twice as many; mirrored by the decoder with transposed convolutions.  All feature maps go to
    the latents: the original's 16 numbers in between could not hold 32.

    Parameters
    ----------
    image_shape : sequence of int
        (ny, nx); 128 x 128 as published, at least 16 x 16.
    latent_size : int
        Number of latents.
    filters : int
        Of the first convolution.
    components : int
        Of a Gaussian mixture in place of N(0, I), as `fit_prior` makes it; 0 is none.
    noise : float, optional
        Standard deviation of a pixel, in units of the scale; by default as for
        `astrovader2020`.
    scale : float
        Pixel value that the network sees as 1; pixels are drawn between 0 and that.

    Returns
    -------
    GalaxyVAE
        Untrained.  Beta is an option of `galmorph.training.train`, one number or one per
        epoch.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or noise or scale not positive.

    References
    ----------
    Higgins et al. (2017), ICLR (beta-VAE); Radford, Metz & Chintala (2016), ICLR (DCGAN)

    Examples
    --------
    >>> from galmorph.nets import beta_vae
    >>> vae = beta_vae(image_shape=(64, 64), filters=16)
    >>> vae.latent_size, vae.image_shape
    (32, (64, 64))
    """
    return _strided(
        "beta_vae", image_shape=image_shape, latent_size=latent_size, filters=filters,
        components=components, noise=noise, scale=scale,
    )  # fmt: skip


def cvae(
    *,
    image_shape: Sequence[int] = (128, 128),
    latent_size: int = 32,
    filters: int = 64,
    conditions: Sequence[str] = ("redshift",),
    condition_dropout: float = 0.1,
    components: int = 0,
    noise: float | None = None,
    scale: float = 255.0,
) -> GalaxyVAE:
    """`beta_vae` with conditions, seen as channels of the image and beside the latents.

    Parameters
    ----------
    image_shape, latent_size, filters, components, noise, scale
        As for `beta_vae`.
    conditions : sequence of str
        Names of the columns that it is told.
    condition_dropout : float
        Fraction of the known values that are hidden in training, so that galaxies without them
        can be described and drawn too; 0 as published.

    Returns
    -------
    GalaxyVAE
        Untrained.

    Raises
    ------
    ValueError
        If an option makes no sense.

    References
    ----------
    Sohn, Lee & Yan (2015), NIPS

    Examples
    --------
    >>> from galmorph.nets import cvae
    >>> vae = cvae(image_shape=(32, 32), filters=4, conditions=("redshift", "r_50"))
    >>> vae.sample(3, rng=1, condition={"redshift": 0.5}).shape
    (3, 32, 32)
    """
    return _strided(
        "cvae", image_shape=image_shape, latent_size=latent_size, filters=filters,
        conditions=conditions, condition_dropout=condition_dropout, components=components,
        noise=noise, scale=scale,
    )  # fmt: skip


def cvae2(
    *,
    image_shape: Sequence[int] = (128, 128),
    latent_size: int = 32,
    filters: int = 64,
    conditions: Sequence[str] = ("redshift",),
    condition_dropout: float = 0.1,
    components: int = 0,
    noise: float | None = None,
    scale: float = 255.0,
) -> GalaxyVAE:
    """`cvae`, but with the conditions beside the features of the encoder's convolutions.

    Parameters
    ----------
    image_shape, latent_size, filters, conditions, condition_dropout, components, noise, scale
        As for `cvae`.

    Returns
    -------
    GalaxyVAE
        Untrained.

    Raises
    ------
    ValueError
        If an option makes no sense.

    Examples
    --------
    >>> from galmorph.nets import cvae2
    >>> cvae2(image_shape=(32, 32), filters=4).condition_names
    ('redshift',)
    """
    return _strided(
        "cvae2", image_shape=image_shape, latent_size=latent_size, filters=filters,
        conditions=conditions, condition_dropout=condition_dropout, components=components,
        noise=noise, scale=scale,
    )  # fmt: skip


def fancy_cvae(
    *,
    image_shape: Sequence[int] = (128, 128),
    latent_size: int = 32,
    filters: int = 64,
    conditions: Sequence[str] = ("redshift",),
    condition_dropout: float = 0.1,
    components: int = 0,
    noise: float | None = None,
    scale: float = 255.0,
) -> GalaxyVAE:
    """`cvae` that also predicts the conditions, with uncertainties, from the image alone.

    The original returned the condition that it was given.  Here convolutions of their own,
    with half the filters, see nothing but the image (`GalaxyVAE.predict_condition`);
    where a condition is not known their prediction stands in.

    Parameters
    ----------
    image_shape, latent_size, filters, conditions, condition_dropout, components, noise, scale
        As for `cvae`.

    Returns
    -------
    GalaxyVAE
        Untrained.

    Raises
    ------
    ValueError
        If an option makes no sense.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import fancy_cvae
    >>> vae = fancy_cvae(image_shape=(32, 32), filters=4)
    >>> vae.predict_condition(torch.ones(2, 32, 32)).event_shape
    torch.Size([1])
    """
    return _strided(
        "fancy_cvae", image_shape=image_shape, latent_size=latent_size, filters=filters,
        conditions=conditions, condition_dropout=condition_dropout, components=components,
        noise=noise, scale=scale,
    )  # fmt: skip


def _strided(
    preset: str,
    *,
    image_shape: Sequence[int],
    latent_size: int,
    filters: int,
    components: int,
    noise: float | None,
    scale: float,
    conditions: Sequence[str] | None = None,
    condition_dropout: float = 0.0,
) -> GalaxyVAE:
    """The networks with strided convolutions, which differ in what is done with conditions."""
    shape = _shape(image_shape)
    latent_size, filters = _sizes("latent_size and filters", [latent_size, filters])
    prior, components = _prior(components, latent_size)
    options: dict[str, Any] = {
        "image_shape": list(shape),
        "latent_size": latent_size,
        "filters": filters,
        "components": components,
        "noise": noise,
        "scale": scale,
    }
    known = predictor = None
    size = 0
    if conditions is not None:
        known = Conditions(conditions, dropout=condition_dropout)
        size = known.size
        options |= {"conditions": list(known.names), "condition_dropout": known.dropout}
    if preset == "fancy_cvae":
        trunk = partial(strided_trunk, filters=-(-filters // 2))
        predictor = ConvolutionalEncoder(trunk, shape, len(known.names))
    return GalaxyVAE(
        ConvolutionalEncoder(
            partial(strided_trunk, filters=filters),
            shape,
            latent_size,
            condition_size=size,
            condition_at="features" if preset == "cvae2" else "image",
        ),
        ConvolutionalDecoder(
            strided_stack(filters), 8 * filters, STRIDED_FACTOR, shape, latent_size,
            condition_size=size,
        ),
        prior,
        _summed_error(noise, shape),
        scale=ConstantScale(scale),
        conditions=known,
        predictor=predictor,
        image_shape=shape,
        config={"preset": preset, "options": options},
    )  # fmt: skip


def _summed_error(noise: float | None, shape: tuple[int, int]) -> FixedNormal:
    """The summed squared error, over 128 x 128 pixels, as a likelihood."""
    if noise is None:
        noise = (0.5 * shape[0] * shape[1]) ** 0.5 / _PUBLISHED_SIDE
    return FixedNormal(noise)


def _prior(components: int, latent_size: int) -> tuple[nn.Module, int]:
    """N(0, I), or a mixture to be filled from a file or by `fit_prior`."""
    if components == 0 and not isinstance(components, bool):
        return StandardNormal(latent_size), 0
    (components,) = _sizes("components", [components])
    return GaussianMixture.empty(components, latent_size), components


def _galmorph(**options: Any) -> GalaxyVAE:
    from .learned import galmorph_preset

    return galmorph_preset(**options)


#: Presets by name: functions of keyword options that return an untrained network.
PRESETS: dict[str, Callable[..., GalaxyVAE]] = {
    "regier2015": regier2015,
    "astrovader2020": astrovader2020,
    "beta_vae": beta_vae,
    "cvae": cvae,
    "cvae2": cvae2,
    "fancy_cvae": fancy_cvae,
    "galmorph": _galmorph,
}

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


def _shape(image_shape: Sequence[int]) -> tuple[int, int]:
    sizes = _sizes("image_shape", image_shape)
    if len(sizes) != 2:
        raise ValueError(f"image_shape must be (ny, nx), not {tuple(sizes)}")
    return sizes[0], sizes[1]


def _sizes(name: str, values: Sequence[int]) -> list[int]:
    sizes = list(values)
    if not sizes or any(isinstance(v, bool) or int(v) != v or v < 1 for v in sizes):
        raise ValueError(f"{name} must be made of positive integers, not {values!r}")
    return [int(v) for v in sizes]
