"""From an image to the latents: a small convolutional network on the canonical frame."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from galmorph._guess import Guess
from galmorph.rendering.learned import GRID, Geometry, canonical_points

__all__ = [
    "UNKNOWN",
    "PosteriorEncoder",
    "StampEncoder",
    "corrected",
    "first_geometry",
    "log_density",
    "scalars_of",
    "see",
]

#: Of the geometry: shifts along the axes in half-light radii, d ln r, d theta.
GEOMETRY = 4
#: The same for `PosteriorEncoder`: shifts in half-light radii, the rest differences.
UNKNOWN = ("along", "across", "ln r_50", "theta", "ln flux")
_UNITS = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.2])


class StampEncoder(nn.Module):
    """Normal distribution of latents, and corrections of a first geometry, from an image.

    Parameters
    ----------
    latent_dim : int
    channels : tuple of int
        Of three convolutions, each with stride 2.
    hidden : int
        Units of the last hidden layer.
    scalars : int
        Numbers that are given beside the image.

    Notes
    -----
    The input is the image sampled at `galmorph.rendering.learned.canonical_points` of a first
    geometry, with three channels: asinh of the brightness in units of flux per half-light
    ellipse, asinh of the signal to noise, and one where the pixel is known.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 16,
        channels: tuple[int, int, int] = (24, 48, 64),
        hidden: int = 256,
        scalars: int = 5,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_dim": latent_dim,
            "channels": tuple(channels),
            "hidden": hidden,
            "scalars": scalars,
        }
        self.latent_dim = latent_dim
        layers: list[nn.Module] = []
        before = 3
        for c in channels:
            layers += [nn.Conv2d(before, c, 3, stride=2, padding=1), nn.SiLU()]
            before = c
        self.convolutions = nn.Sequential(*layers)
        side = (GRID + 7) // 8
        self.first = nn.Linear(channels[-1] * side * side, hidden)
        self.second = nn.Linear(hidden + scalars, hidden)
        self.head = nn.Linear(hidden, 2 * latent_dim + GEOMETRY)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, image: torch.Tensor, scalars: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (B, d) of the latents, and corrections (B, 4).

        Parameters
        ----------
        image : tensor, shape (B, 3, G, G)
        scalars : tensor, shape (B, scalars)
        """
        silu = torch.nn.functional.silu
        h = silu(self.first(self.convolutions(image).flatten(1)))
        out = self.head(silu(self.second(torch.cat([h, scalars], 1))))
        d = self.latent_dim
        std = torch.nn.functional.softplus(out[:, d : 2 * d] - 0.5).clamp_min(1e-3)
        return out[:, :d], std, 0.3 * torch.tanh(out[:, 2 * d :])


class PosteriorEncoder(nn.Module):
    """Normal distribution, with all covariances, of geometry, flux and latents from an image.

    Parameters
    ----------
    latent_dim : int
    channels : tuple of int
        Of three convolutions, each with stride 2.
    hidden : int
        Units of the hidden layers.
    scalars : int
        Numbers that are given beside the image.

    Notes
    -----
    What it tells are corrections of a first geometry, `UNKNOWN` of them, and the latents.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 16,
        channels: tuple[int, int, int] = (32, 64, 96),
        hidden: int = 384,
        scalars: int = 5,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_dim": latent_dim,
            "channels": tuple(channels),
            "hidden": hidden,
            "scalars": scalars,
        }
        self.latent_dim = latent_dim
        self.size = size = len(UNKNOWN) + latent_dim
        pairs = pairwise((3, *channels))
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs]
        )
        side = (GRID + 7) // 8
        self.first = nn.Linear(channels[-1] * side * side, hidden)
        self.second = nn.Linear(hidden + scalars, hidden)
        self.third = nn.Linear(hidden, hidden)
        self.mean = nn.Linear(hidden, size)
        self.factor = nn.Linear(hidden, size * (size + 1) // 2)
        nn.init.normal_(self.mean.weight, std=0.01)
        nn.init.normal_(self.factor.weight, std=0.001)
        nn.init.zeros_(self.factor.bias)
        low = torch.tril_indices(size, size)
        self.register_buffer("trained", torch.tensor(False))  # train_encoder.py says when
        self.register_buffer("_low", low[0] * size + low[1], persistent=False)
        self.register_buffer("_unit", _UNITS.new_ones(size), persistent=False)
        self._unit[: len(UNKNOWN)] = _UNITS

    def forward(
        self, image: torch.Tensor, scalars: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, U) and the inverse of the Cholesky factor of the covariance (B, U, U).

        Parameters
        ----------
        image : tensor, shape (B, 3, G, G)
        scalars : tensor, shape (B, scalars)
        """
        silu = torch.nn.functional.silu
        h = image
        for layer in self.convolutions:
            h = silu(layer(h))
        h = silu(self.first(h.flatten(1)))
        h = silu(self.second(torch.cat([h, scalars], 1)))
        h = h + silu(self.third(h))
        out = self.factor(h)
        white = out.new_zeros((len(out), self.size * self.size)).index_copy(1, self._low, out)
        white = white.unflatten(1, (self.size, self.size))
        diagonal = torch.diagonal(white, dim1=1, dim2=2)
        white = white - torch.diag_embed(diagonal - torch.exp(diagonal.clamp(-8, 8)))
        return self.mean(h) * self._unit, white / self._unit


def log_density(mean: torch.Tensor, white: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Logarithm of the density (B,) of what `PosteriorEncoder` tells, at values (B, U)."""
    rest = (white @ (value - mean)[..., None])[..., 0]
    log_det = torch.log(torch.diagonal(white, dim1=1, dim2=2)).sum(1)
    return log_det - 0.5 * rest.square().sum(1) - 0.5 * mean.shape[1] * np.log(2 * np.pi)


def see(
    image: torch.Tensor, weight: torch.Tensor, geometry: Geometry, flux: torch.Tensor
) -> torch.Tensor:
    """What the encoder sees: stamps (B, ny, nx) on the canonical grid, (B, 3, GRID, GRID)."""
    ny, nx = image.shape[1:]
    points = canonical_points(dtype=image.dtype, device=image.device)
    x, y = geometry.from_canonical(points)
    at = torch.stack([2 * x / (nx - 1) - 1, 2 * y / (ny - 1) - 1], -1)[:, None]
    known = (weight > 0).to(image.dtype)
    stack = torch.stack([image * known, weight * image * known, known], 1)
    seen = torch.nn.functional.grid_sample(stack, at, align_corners=True)
    seen = seen.unflatten(3, (GRID, GRID))[:, :, 0]
    area = (geometry.r**2 * geometry.q / flux)[:, None, None]
    return torch.stack(
        [torch.asinh(20 * seen[:, 0] * area), torch.asinh(seen[:, 1] / 3), seen[:, 2]], 1
    )


def scalars_of(first: Geometry, fwhm: torch.Tensor) -> torch.Tensor:
    """What the encoder is told beside the image: PSF and first geometry, (B, 5)."""
    return torch.stack(
        [
            torch.log(fwhm / first.r),
            torch.log(first.q),
            torch.log(first.n),
            torch.log(first.r),
            fwhm / (first.r * first.q),
        ],
        1,
    )


def corrected(first: Geometry, shift: torch.Tensor) -> Geometry:
    """The first geometry with the encoder's corrections (B, 4); index and ratio stay."""
    cos, sin = torch.cos(first.theta), torch.sin(first.theta)
    along, across = shift[:, 0] * first.r, shift[:, 1] * first.r
    return replace(
        first,
        x_0=first.x_0 + cos * along - sin * across,
        y_0=first.y_0 + sin * along + cos * across,
        r=first.r * torch.exp(shift[:, 2]),
        theta=first.theta + shift[:, 3],
    )


def first_geometry(
    guess: Guess, theta: torch.Tensor | None = None
) -> tuple[Geometry, torch.Tensor]:
    """Geometry and flux (B,) of a guess; the angle in the half turn around ``theta``."""
    g = torch.hypot(guess.eta1, guess.eta2)
    angle = 0.5 * torch.atan2(guess.eta2, guess.eta1)
    if theta is not None:
        angle = theta - torch.remainder(theta - angle + 0.5 * np.pi, np.pi) + 0.5 * np.pi
    geometry = Geometry(
        x_0=guess.x_0,
        y_0=guess.y_0,
        r=guess.r * torch.exp(0.5 * g),
        q=torch.exp(-g).clamp(0.05, 0.98),
        theta=angle,
        n=guess.n.clamp(0.3, 7.0),
    )
    return geometry, guess.flux.clamp_min(1e-6)
