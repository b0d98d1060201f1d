"""Totals of the learned galaxy in its canonical frame: how much light, and within what radius."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from galmorph.rendering.learned import REACH, _Spline
from galmorph.rendering.sersic import sersic_table

__all__ = ["light_and_radius", "light_and_radius_slopes"]

_RADII, _ANGLES = 96, 24
_TURN = 0.5 * (np.sqrt(5.0) - 1.0)


@lru_cache(maxsize=4)
def _nodes(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii (K,), evenly spaced on the stretched grid, and points (K * A, 2) around them."""
    place = (torch.arange(_RADII, dtype=torch.float64) + 0.5) / _RADII
    u = torch.sinh(place * np.arcsinh(REACH))
    # rings turned against each other: where one misses an arm the next does not
    turn = _TURN * torch.arange(_RADII, dtype=torch.float64)[:, None]
    psi = 2 * np.pi * (torch.arange(_ANGLES, dtype=torch.float64) + turn) / _ANGLES
    circle = torch.stack([torch.cos(psi), torch.sin(psi)], -1)
    points = (u[:, None, None] * circle).reshape(-1, 2)
    return u.to(dtype).to(device), points.to(dtype).to(device)


def light_and_radius(
    n: torch.Tensor, coefficients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Total light, and radius of the ellipse that holds half of it, of S(u; n) exp(R).

    Parameters
    ----------
    n : tensor, shape (B,)
        Sérsic indices.
    coefficients : tensor, shape (B, GRID, GRID)
        Of R.

    Returns
    -------
    light : tensor, shape (B,)
        In units of the light of the profile alone.
    radius : tensor, shape (B,)
        In units of its half-light radius.

    Examples
    --------
    >>> import torch
    >>> from galmorph.rendering.canonical import light_and_radius
    >>> from galmorph.rendering.learned import GRID
    >>> light, radius = light_and_radius(torch.tensor([1.0]), torch.zeros(1, GRID, GRID))
    >>> round(light.item(), 4), round(radius.item(), 3)
    (1.0, 1.0)
    """
    growth = _Growth(n, coefficients)
    return growth.light, growth.radius


def light_and_radius_slopes(
    n: torch.Tensor, coefficients: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of ln light and ln radius, (B, 1 + K) each: by ln n and along directions.

    Parameters
    ----------
    n, coefficients
        As for `light_and_radius`.
    directions : tensor, shape (B or 1, K, GRID, GRID)
        Derivatives of the coefficients.
    """
    growth = _Growth(n, coefficients)
    by_light, by_radius = growth.slopes(directions)
    step = 1e-3  # the incomplete gamma function has no derivative by its first argument
    ends = [_Growth(n * np.exp(sign * step), coefficients) for sign in (1, -1)]
    by_n = [
        torch.log(getattr(ends[0], what) / getattr(ends[1], what)) / (2 * step)
        for what in ("light", "radius")
    ]
    return (
        torch.cat([by_n[0][:, None], by_light / growth.light[:, None]], 1),
        torch.cat([by_n[1][:, None], by_radius / growth.radius[:, None]], 1),
    )


class _Growth:
    """The light within ellipses: rings, in which exp(R) is averaged over the angle."""

    def __init__(self, n: torch.Tensor, coefficients: torch.Tensor) -> None:
        _, points = _nodes(n.dtype, n.device)
        # the points are the same for all: galaxies are the columns of one table
        self._spline = _Spline(points, torch.zeros_like(points[:, 0], dtype=torch.long))
        self._factor = torch.exp(self._at_nodes(coefficients[None])[0])  # (B, rings, angles)
        times = self._factor.mean(2)
        scalars, _ = sersic_table(n.dtype, n.device).scalars_at(n)
        b, power = scalars[:, :1], 1.0 / n[:, None]
        # light of the profile alone within the edges of the rings: exact
        edges = torch.sinh(
            torch.arange(_RADII + 1, dtype=n.dtype, device=n.device) / _RADII * np.arcsinh(REACH)
        )
        index = (2.0 * n)[:, None].expand(-1, _RADII + 1)
        within = torch.special.gammainc(index, b * edges**power)
        self._share = within.diff(dim=1)
        growth = torch.cat([torch.zeros_like(b), (self._share * times).cumsum(1)], 1)
        self.light = growth[:, -1] + 1.0 - within[:, -1]
        # between two edges by the profile's own growth, which is smooth
        half = 0.5 * self.light[:, None]
        self._ring = ring = ((growth < half).sum(1, keepdim=True) - 1).clamp(0, _RADII - 1)
        inner, outer = growth.gather(1, ring), growth.gather(1, ring + 1)
        part = ((half - inner) / (outer - inner).clamp_min(1e-12)).clamp(0.0, 1.0)
        own = within.gather(1, ring)
        target = own + part * (within.gather(1, ring + 1) - own)
        low = edges.expand_as(within).gather(1, ring)
        high = edges.expand_as(within).gather(1, ring + 1)
        for _ in range(12):  # bisection: the growth has no closed inverse
            mid = 0.5 * (low + high)
            below = torch.special.gammainc(index[:, :1], b * mid**power) < target
            low, high = torch.where(below, mid, low), torch.where(below, high, mid)
        radius = 0.5 * (low + high)
        for _ in range(2):  # Newton's steps: the last digits, in which derivatives are taken
            slope = 2 * np.pi * radius * torch.exp(scalars[:, 1:] - b * radius**power)
            miss = torch.special.gammainc(index[:, :1], b * radius**power) - target
            radius = (radius - miss / slope).clamp_min(1e-6)
        self.radius = radius[:, 0]
        self._rest = (target - own)[:, 0]
        self._rise = (slope * times.gather(1, ring))[:, 0]

    def _at_nodes(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Splines (B, K, rings, angles) of coefficients (B, K, GRID, GRID)."""
        value = self._spline.value(coefficients.reshape(1, -1, *coefficients.shape[2:]))
        return value.T.reshape(*coefficients.shape[:2], _RADII, _ANGLES)

    def slopes(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Derivatives of light and radius along directions (B or 1, K, GRID, GRID): (B, K)."""
        along = self._at_nodes(directions).expand(len(self._factor), -1, -1, -1)
        times = torch.einsum("bra,bkra->brk", self._factor, along) / _ANGLES
        rings = self._share[:, :, None] * times
        by_light = rings.sum(1)
        growth = torch.cat([torch.zeros_like(rings[:, :1]), rings.cumsum(1)], 1)
        ring = self._ring[:, :, None].expand(-1, -1, rings.shape[2])
        inside = growth.gather(1, ring)[:, 0] + self._rest[:, None] * times.gather(1, ring)[:, 0]
        return by_light, (0.5 * by_light - inside) / self._rise[:, None]
