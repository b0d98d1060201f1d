"""Encoder and decoder of Regier et al. (2015): perceptrons with two hidden layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

__all__ = ["MLPDecoder", "MLPEncoder"]


def _trunk(n_in: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for n_out in hidden:
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        n_in = n_out
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    r"""Posterior of the latents, from all pixels of an image.

    One trunk of ReLU layers, with a linear head for the mean and one for the
    logarithm of the standard deviation.

    Parameters
    ----------
    image_shape : tuple of int
        (ny, nx) of the images.
    latent_size : int
        Number of latents, d.
    hidden : sequence of int
        Sizes of the hidden layers.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import MLPEncoder
    >>> posterior = MLPEncoder((9, 7), latent_size=3)(torch.rand(5, 1, 9, 7))
    >>> posterior.mean.shape, posterior.event_shape
    (torch.Size([5, 3]), torch.Size([3]))
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        latent_size: int = 8,
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        self.trunk = _trunk(math.prod(image_shape), hidden)
        self.mean = nn.Linear(hidden[-1], latent_size)
        self.log_std = nn.Linear(hidden[-1], latent_size)

    def forward(self, images: Tensor) -> Distribution:
        """Posterior of the latents.

        Parameters
        ----------
        images : Tensor, (B, 1, ny, nx)
            In the units that the network was trained in.

        Returns
        -------
        Distribution
            Independent normals; batch shape (B,), event shape (d,).
        """
        features = self.trunk(images.flatten(1))
        std = self.log_std(features).exp()
        return Independent(Normal(self.mean(features), std, validate_args=False), 1)


class MLPDecoder(nn.Module):
    r"""Mean and standard deviation of every pixel, from the latents.

    One trunk of ReLU layers with two linear heads.  The exponential makes the
    standard deviation positive, and, if wished, the mean.

    Parameters
    ----------
    image_shape : tuple of int
        (ny, nx) of the images.
    latent_size : int
        Number of latents, d.
    hidden : sequence of int
        Sizes of the hidden layers.
    positive_mean : bool
        Whether the mean is the exponential of its head, or the head itself.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import MLPDecoder
    >>> mean, std = MLPDecoder((9, 7), latent_size=3)(torch.zeros(5, 3))
    >>> mean.shape, bool((std > 0).all())
    (torch.Size([5, 9, 7]), True)
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        latent_size: int = 8,
        hidden: Sequence[int] = (128, 128),
        *,
        positive_mean: bool = True,
    ) -> None:
        super().__init__()
        n_pixels = math.prod(image_shape)
        self.image_shape = tuple(image_shape)
        self.positive_mean = positive_mean
        self.trunk = _trunk(latent_size, hidden)
        self.mean = nn.Linear(hidden[-1], n_pixels)
        self.log_std = nn.Linear(hidden[-1], n_pixels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the pixels.

        Parameters
        ----------
        z : Tensor, (..., d)

        Returns
        -------
        mean, std : Tensor, (..., ny, nx)
            In the units that the network was trained in.
        """
        features = self.trunk(z)
        mean = self.mean(features)
        if self.positive_mean:
            mean = mean.exp()
        shape = (*z.shape[:-1], *self.image_shape)
        return mean.reshape(shape), self.log_std(features).exp().reshape(shape)

    def start_from(self, mean: Tensor, std: Tensor, *, gain: float = 0.3) -> None:
        """Start training from a mean image, rather than from noise.

        Parameters
        ----------
        mean, std : Tensor, (ny, nx)
            Of the training images, in the units that the network is trained in; positive.
        gain : float
            Factor on the first weights of both heads.
        """
        tiny = torch.finfo(mean.dtype).tiny
        with torch.no_grad():
            start = mean.clamp(min=tiny).log() if self.positive_mean else mean
            self.mean.bias.copy_(start.flatten())
            self.log_std.bias.copy_(std.clamp(min=tiny).log().flatten())
            self.mean.weight.mul_(gain)
            self.log_std.weight.mul_(gain)
