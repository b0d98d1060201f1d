"""Encoders and decoders made of convolutions, as the published systems have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

__all__ = [
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "pooling_stack",
    "pooling_trunk",
    "strided_stack",
    "strided_trunk",
]

#: Factors by which `pooling_trunk` and `strided_trunk` make images smaller.
POOLING_FACTOR, STRIDED_FACTOR = 8, 16


def pooling_trunk(n_in: int, channels: Sequence[int]) -> nn.Sequential:
    """Pairs of convolutions, each followed by maxima of 2 x 2 pixels (AstroVaDEr).

    Parameters
    ----------
    n_in : int
        Channels of the input.
    channels : sequence of int
        Of the three pairs; the first is 3 x 3 pixels wide, the others 5 x 5.
    """
    layers: list[nn.Module] = []
    for n_out, width in zip(channels, (3, 5, 5), strict=True):
        layers += [*_pair(n_in, n_out, width), nn.MaxPool2d(2)]
        n_in = n_out
    return nn.Sequential(*layers)


def pooling_stack(channels: Sequence[int]) -> nn.Sequential:
    """`pooling_trunk` mirrored, with bilinear interpolation; the light is not negative."""
    first, *_, last = channels
    layers: list[nn.Module] = [nn.LeakyReLU(0.1)]
    n_in = last
    for n_out in reversed(channels):
        layers += [*_pair(n_in, n_out, 5), nn.Upsample(scale_factor=2, mode="bilinear")]
        n_in = n_out
    light = nn.Conv2d(first, 1, 3, padding=1)
    nn.init.constant_(light.bias, 0.1)  # where it starts below 0 everywhere, it never learns
    return nn.Sequential(*layers, light, nn.ReLU())


def _pair(n_in: int, n_out: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, width, padding=width // 2), nn.LeakyReLU(0.1)]
    return layers


def strided_trunk(n_in: int, filters: int) -> nn.Sequential:
    """Four convolutions of stride 2 with batch norm, each with twice the filters (DCGAN).

    Parameters
    ----------
    n_in : int
        Channels of the input.
    filters : int
        Of the first convolution.
    """
    layers: list[nn.Module] = []
    for step in range(4):
        n_out = filters << step
        layers.append(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False))
        if step:
            layers.append(nn.BatchNorm2d(n_out))
        layers.append(nn.LeakyReLU(0.2))
        n_in = n_out
    return nn.Sequential(*layers)


def strided_stack(filters: int) -> nn.Sequential:
    """`strided_trunk` mirrored, with transposed convolutions; pixels are from 0 to 1."""
    layers: list[nn.Module] = [nn.BatchNorm2d(8 * filters), nn.ReLU()]
    for step in (2, 1, 0):
        n_out = filters << step
        layers.append(nn.ConvTranspose2d(2 * n_out, n_out, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(filters, 1, 4, stride=2, padding=1),
                         nn.Sigmoid())  # fmt: skip


class ConvolutionalEncoder(nn.Module):
    """Posterior of the latents, from an image and what else is known.

    All feature maps of the trunk go to both heads, so that no layer is narrower than the latents.

    Parameters
    ----------
    trunk : callable
        ``trunk(n_in)`` makes the layers from ``n_in`` channels to feature maps.
    image_shape : tuple of int
        (ny, nx) of the images.
    latent_size : int
        Number of latents, d.
    condition_size : int
        Numbers that are known of each galaxy beside its image.
    condition_at : {"image", "features"}
        Whether they come in as channels of the image, or beside the features of the trunk.

    Raises
    ------
    ValueError
        If the images are too small for the trunk.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from galmorph.nets.convolutional import ConvolutionalEncoder, strided_trunk
    >>> encoder = ConvolutionalEncoder(
    ...     partial(strided_trunk, filters=4), (32, 32), 3, condition_size=2
    ... ).eval()
    >>> encoder(torch.rand(5, 1, 32, 32), torch.zeros(5, 2)).mean.shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        trunk: Callable[[int], nn.Sequential],
        image_shape: tuple[int, int],
        latent_size: int,
        *,
        condition_size: int = 0,
        condition_at: str = "image",
    ) -> None:
        super().__init__()
        self.as_image = condition_at == "image"
        n_in = 1 + condition_size * self.as_image
        self.trunk = trunk(n_in)
        n_features = _n_features(self.trunk, n_in, image_shape)
        n_features += condition_size * (not self.as_image)
        self.mean = nn.Linear(n_features, latent_size)
        self.log_std = nn.Linear(n_features, latent_size)
        self.to(memory_format=torch.channels_last)  # faster on CPUs

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Distribution:
        """Posterior of the latents.

        Parameters
        ----------
        images : Tensor, (B, 1, ny, nx)
            In the units that the network was trained in.
        condition : Tensor, (B, condition_size), optional
            As `Conditions` tells it.

        Returns
        -------
        Distribution
            Independent normals; batch shape (B,), event shape (d,).
        """
        if condition is not None and self.as_image:
            planes = condition[:, :, None, None].expand(-1, -1, *images.shape[-2:])
            images = torch.cat([images, planes.to(images)], 1)
        features = self.trunk(images.contiguous(memory_format=torch.channels_last)).flatten(1)
        if condition is not None and not self.as_image:
            features = torch.cat([features, condition.to(features)], 1)
        mean, log_std = (_single(head(features)) for head in (self.mean, self.log_std))
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1)


class ConvolutionalDecoder(nn.Module):
    """Mean image, from the latents and what else is known.

    Parameters
    ----------
    stack : Sequential
        Layers from feature maps to images.
    n_maps : int
        Feature maps that it starts from.
    factor : int
        By which it makes them larger.
    image_shape : tuple of int
        (ny, nx) of the images; where it is no multiple of the factor, the middle of a larger
        image is taken.
    latent_size : int
        Number of latents, d.
    condition_size : int
        Numbers that are known of each galaxy, beside the latents.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.convolutional import ConvolutionalDecoder, strided_stack
    >>> decoder = ConvolutionalDecoder(strided_stack(4), 32, 16, (40, 32), 3).eval()
    >>> decoder(torch.zeros(5, 7, 3)).shape
    torch.Size([5, 7, 40, 32])
    """

    def __init__(
        self,
        stack: nn.Sequential,
        n_maps: int,
        factor: int,
        image_shape: tuple[int, int],
        latent_size: int,
        *,
        condition_size: int = 0,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.grid = tuple(-(-n // factor) for n in image_shape)
        self.start = nn.Linear(latent_size + condition_size, n_maps * math.prod(self.grid))
        self.stack = stack
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Mean of the pixels.

        Parameters
        ----------
        z : Tensor, (…, d)
        condition : Tensor, (…, condition_size), optional

        Returns
        -------
        Tensor, (…, ny, nx)
            In the units that the network was trained in.
        """
        lead = z.shape[:-1]
        if condition is not None:
            z = torch.cat([z, condition.to(z).expand(*lead, -1)], -1)
        maps = self.start(z.reshape(-1, z.shape[-1])).unflatten(1, (-1, *self.grid))
        images = self.stack(maps.contiguous(memory_format=torch.channels_last))[:, 0]
        cut = [(have - want) // 2 for have, want in zip(images.shape[1:], self.image_shape,
                                                        strict=True)]  # fmt: skip
        (y, x), (ny, nx) = cut, self.image_shape
        return _single(images[:, y : y + ny, x : x + nx]).reshape(*lead, ny, nx)


def _n_features(trunk: nn.Sequential, n_in: int, image_shape: tuple[int, int]) -> int:
    mode = trunk.training
    try:
        with torch.no_grad():  # in evaluation mode: nothing is learned of the zeros
            return trunk.eval()(torch.zeros(1, n_in, *image_shape)).numel()
    except RuntimeError:
        raise ValueError(
            f"image_shape {tuple(image_shape)} is too small for this network"
        ) from None
    finally:
        trunk.train(mode)


def _single(values: Tensor) -> Tensor:
    """In single precision at least: bfloat16 is for the layers alone."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
