"""The learned galaxy in its canonical frame: a decoder of profiles and what they miss.

The first two latents are the Sérsic index and the axis ratio, each through a fixed monotone
function; the others bend the profile.  Where these are zero the galaxy is a Sérsic profile.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from galmorph.rendering.learned import GRID, REACH, Geometry, canonical_light, centred

__all__ = ["CanonicalDecoder"]


class CanonicalDecoder(nn.Module):
    """From latents to index, axis ratio, the logarithm of what the profile misses, and misfit.

    Parameters
    ----------
    latent_dim : int
        Latents, index and axis ratio included.
    hidden : int
        Units of the hidden layers; with none what is missed is linear in the latents.
    features : int
        Images from which what is missed is summed up; unused without hidden layers.
    index : tuple of float
        Mean and width of ln n where the first latent is standard normal.
    ratio : tuple of float
        The same for ln(q / (1 - q)) and the second latent.
    knots : int
        Radii at which the misfit is given.
    parities : tuple of int, optional
        How many of the latents after the first two draw what is even along both axes, odd
        along both, odd along the major axis only, and odd along the minor axis only.  A galaxy
        seen in a mirror, or turned by half a turn, then only changes signs of latents.  For
        networks without hidden layers.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.canonical import CanonicalDecoder
    >>> decoder = CanonicalDecoder(latent_dim=6)
    >>> decoder.coefficients(torch.zeros(2, 6)).abs().max() == 0
    tensor(True)
    """

    def __init__(
        self,
        *,
        latent_dim: int = 16,
        hidden: int = 256,
        features: int = 128,
        index: tuple[float, float] = (0.4, 0.6),
        ratio: tuple[float, float] = (0.8, 1.1),
        knots: int = 8,
        parities: tuple[int, int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 3:
            raise ValueError(f"latent_dim must be at least 3, not {latent_dim}")
        if parities is not None and (hidden or sum(parities) != latent_dim - 2):
            raise ValueError("parities are of latent_dim - 2 latents, and need hidden=0")
        self.config: dict[str, Any] = {
            "latent_dim": latent_dim,
            "hidden": hidden,
            "features": features,
            "index": tuple(index),
            "ratio": tuple(ratio),
            "knots": knots,
            "parities": None if parities is None else tuple(parities),
        }
        self.latent_dim = latent_dim
        self.index, self.ratio = tuple(index), tuple(ratio)
        sizes = [latent_dim, hidden, hidden, features] if hidden else [latent_dim]
        self.trunk = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(sizes)])
        features = sizes[-1]
        self.draw = nn.Linear(features, GRID * GRID, bias=False)
        with torch.no_grad():  # smooth
            rough = torch.randn(features, 1, 8, 8)
            smooth = nn.functional.interpolate(rough, (GRID, GRID), mode="bicubic")
            self.draw.weight.copy_(0.02 * smooth.flatten(1).T)
        self.misfit_head = nn.Linear(features, knots)
        nn.init.zeros_(self.misfit_head.weight)
        nn.init.constant_(self.misfit_head.bias, -2.5)

    def profile(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sérsic index and axis ratio, (B,) each, of latents (B, d)."""
        n = torch.exp(self.index[0] + self.index[1] * z[:, 0]).clamp(0.2, 8.0)
        q = torch.sigmoid(self.ratio[0] + self.ratio[1] * z[:, 1]).clamp_min(0.01)
        return n, q

    def _features(self, z: torch.Tensor) -> torch.Tensor:
        h = z
        for layer in self.trunk:
            h = torch.nn.functional.silu(layer(h))
        return h

    def _nested(self, z: torch.Tensor) -> torch.Tensor:
        """The latents of the Sérsic profile nested in each galaxy."""
        return torch.cat([z[:, :2], torch.zeros_like(z[:, 2:])], 1)

    @property
    def signs(self) -> torch.Tensor:
        """Signs that latents change, (3, d): mirrored along the major axis, the minor, both."""
        signs = torch.ones(3, self.latent_dim)
        if self.config["parities"] is not None:
            own = torch.tensor([[1, 1], [-1, -1], [-1, 1], [1, -1]], dtype=signs.dtype)
            counts = torch.tensor(self.config["parities"])
            signs[:2, 2:] = own.repeat_interleave(counts, 0).T
            signs[2] = signs[0] * signs[1]
        return signs

    def _maps(self) -> torch.Tensor:
        """What is missed for each latent, where it is linear: (d - 2, GRID, GRID)."""
        maps = self.draw.weight.T[2:].unflatten(1, (GRID, GRID))
        if self.config["parities"] is not None:
            along, across = self.signs[:2, 2:, None, None].to(maps)
            maps = 0.5 * (maps + along * maps.flip(2))
            maps = 0.5 * (maps + across * maps.flip(1))
        return centred(maps)

    def coefficients(self, z: torch.Tensor) -> torch.Tensor:
        """Spline of what is missed (B, GRID, GRID) for latents (B, d)."""
        if not self.trunk:
            return torch.tensordot(z[:, 2:], self._maps(), 1)
        difference = self._features(z) - self._features(self._nested(z))
        return centred(self.draw(difference).unflatten(1, (GRID, GRID)))

    def misfit(self, z: torch.Tensor) -> torch.Tensor:
        """Misfit as a fraction of the light at the knots, (B, knots)."""
        return 0.003 + torch.nn.functional.softplus(self.misfit_head(self._features(z)))

    def misfit_at(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Misfit as a fraction of the light at elliptical radii ``u`` (B, M)."""
        knots = self.misfit(z)
        place = torch.asinh(u.clamp_max(REACH)) * ((knots.shape[1] - 1) / np.arcsinh(REACH))
        low = place.floor().clamp_max(knots.shape[1] - 2)
        t = place - low
        low = low.long()
        return (1 - t) * knots.gather(1, low) + t * knots.gather(1, low + 1)

    def forward(self, z: torch.Tensor, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Light in the canonical frame and its misfit, before the PSF.

        Parameters
        ----------
        z : tensor, shape (..., d)
        size : int, optional
            Samples along each axis, from -4 to 4 half-light radii of the profile, the major
            axis along x and the minor axis stretched to the same length.

        Returns
        -------
        mean, std : tensor, shape (..., size, size)
            Surface brightness of a profile of unit flux in units of its half-light radius.
        """
        flat = z.reshape(-1, z.shape[-1])
        n, _ = self.profile(flat)
        line = (torch.arange(size, dtype=z.dtype, device=z.device) + 0.5) * (8.0 / size) - 4.0
        y, x = torch.meshgrid(line, line, indexing="ij")
        points = torch.stack([x, y], -1).reshape(-1, 2)
        row = torch.arange(len(flat), device=z.device).repeat_interleave(len(points))
        one, zero = torch.ones_like(n), torch.zeros_like(n)
        unit = Geometry(zero, zero, one, one, zero, n)
        everywhere = points.repeat(len(flat), 1)
        light, _ = canonical_light(unit, everywhere, row, self.coefficients(flat))
        mean = light.reshape(len(flat), -1)
        u = points.square().sum(-1).sqrt().expand(len(flat), -1)
        std = mean * self.misfit_at(flat, u)
        shape = (*z.shape[:-1], size, size)
        return mean.reshape(shape), std.reshape(shape)

    @property
    def bending(self) -> range:
        """Latents by which what is missed changes: without hidden layers not the first two."""
        return range(0 if self.trunk else 2, self.latent_dim)

    def linearise(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (B, GRID, GRID), and their derivatives by the latents that bend.

        (B, k, GRID, GRID), or (1, k, GRID, GRID) where these are the same for all galaxies.
        """
        if not self.trunk:
            maps = self._maps()
            return torch.tensordot(z[:, 2:], maps, 1), maps[None]
        value, tangents = self._with_tangents(z, slice(None))
        nested, nested_tangents = self._with_tangents(self._nested(z), slice(0, 2))
        tangents = tangents.clone()
        tangents[:, :2] -= nested_tangents
        both = torch.cat([(value - nested)[:, None], tangents], 1)
        maps = centred(self.draw(both).unflatten(2, (GRID, GRID)))
        return maps[:, 0], maps[:, 1:]

    def _with_tangents(self, z: torch.Tensor, which: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, F) and their derivatives by some latents, (B, k, F)."""
        h = z
        tangent = torch.eye(self.latent_dim, dtype=z.dtype, device=z.device)[which]
        tangent = tangent.expand(z.shape[0], -1, -1)
        for layer in self.trunk:
            a = layer(h)
            gate = torch.sigmoid(a)
            slope = gate * (1.0 + a * (1.0 - gate))
            h, tangent = a * gate, (tangent @ layer.weight.T) * slope[:, None]
        return h, tangent
