"""Totals of the learned galaxy in its canonical frame: how much light, and within what radius."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from galmorph.rendering.learned import REACH, _Spline
from galmorph.rendering.sersic import sersic_table

__all__ = ["light_and_radius"]

_RADII, _ANGLES = 40, 32


@lru_cache(maxsize=4)
def _nodes(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii (K,), evenly spaced on the stretched grid, and points (K * A, 2) around them."""
    place = (torch.arange(_RADII, dtype=torch.float64) + 0.5) / _RADII
    u = torch.sinh(place * np.arcsinh(REACH))
    psi = 2 * np.pi * (torch.arange(_ANGLES, dtype=torch.float64) + 0.5) / _ANGLES
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
    _, points = _nodes(n.dtype, n.device)
    # the points are the same for all: galaxies are the columns of one table
    spline = _Spline(points, torch.zeros_like(points[:, 0], dtype=torch.long))
    value = spline.value(coefficients[None]).T.unflatten(1, (_RADII, _ANGLES))
    times = torch.exp(value).mean(2)  # (B, K)
    scalars, _ = sersic_table(n.dtype, n.device).scalars_at(n)
    # light of the profile alone within the edges of the rings: exact
    edges = torch.sinh(
        torch.arange(_RADII + 1, dtype=n.dtype, device=n.device) / _RADII * np.arcsinh(REACH)
    )
    index = (2.0 * n)[:, None].expand(-1, _RADII + 1)
    within = torch.special.gammainc(index, scalars[:, :1] * edges ** (1.0 / n[:, None]))
    rings = within.diff(dim=1) * times
    growth = torch.cat([torch.zeros_like(within[:, :1]), rings.cumsum(1)], 1)
    light = growth[:, -1] + 1.0 - within[:, -1]
    # between two edges by the profile's own growth, which is smooth
    half = 0.5 * light[:, None]
    ring = ((growth < half).sum(1, keepdim=True) - 1).clamp(0, _RADII - 1)
    inner, outer = growth.gather(1, ring), growth.gather(1, ring + 1)
    part = ((half - inner) / (outer - inner).clamp_min(1e-12)).clamp(0.0, 1.0)
    own = within.gather(1, ring)
    target = own + part * (within.gather(1, ring + 1) - own)
    low, high = edges.expand_as(within).gather(1, ring), edges.expand_as(within).gather(1, ring + 1)
    power, b = 1.0 / n[:, None], scalars[:, :1]
    for _ in range(12):  # bisection: the growth has no closed inverse
        mid = 0.5 * (low + high)
        below = torch.special.gammainc(index[:, :1], b * mid**power) < target
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    radius = 0.5 * (low + high)
    for _ in range(2):  # Newton's steps: the last digits, in which derivatives are taken
        slope = 2 * np.pi * radius * torch.exp(scalars[:, 1:] - b * radius**power)
        miss = torch.special.gammainc(index[:, :1], b * radius**power) - target
        radius = (radius - miss / slope).clamp_min(1e-6)
    return light, radius[:, 0]
