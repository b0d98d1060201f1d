"""What a galaxy looks like, whatever its flux, place, size and angle: latents for classes.

An image is resampled in ellipses about the centre, in units of a Petrosian radius, so that turning
the galaxy only shifts the columns.  A convolutional network that is periodic along them, and
pools over them, does not see the angle at all, nor, by looking at both mirror images, the
handedness.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galmorph._batchfit import window_templates
from galmorph._guess import WindowTemplates, first_guess

__all__ = ["ANGLES", "RADII", "MorphologyEncoder", "PolarView", "look"]

#: Elliptical radii, in Petrosian radii, and number of angles of the polar image.
RADII = 1.25 * ((np.arange(24) + 0.5) / 24) ** 1.25
ANGLES = 64
# The radius is where the root of the brightness falls to this fraction of its mean inside: the
# root, so that a bright nucleus, or how an image was stretched, matters less.
_PETROSIAN = 0.33
_PROFILE_RADII = 28
_PASSES = 3
# A circle that cuts a galaxy makes its moments rounder by about this factor, at first sight.
_DILUTED = 1.6
# light beyond this many times that of the opposite side, plus this many sigma, is a companion
_LOPSIDED, _SIGNIFICANT = 1.7, 4.0
# full width at half maximum that stands for no PSF, in pixels: only the centring uses it
_NO_PSF = 2.0


@dataclass
class PolarView:
    """Galaxies resampled in ellipses.

    Attributes
    ----------
    image : Tensor, (B, R, A)
        asinh of ten times the brightness in units of its mean within the Petrosian ellipse, at
        `RADII` and equally spaced angles from the major axis.
    scalars : Tensor, (B, 4)
        ln q, ln(r_80 / r_20), ln(r_50 / r_p) and the logarithm of the noise of a pixel, in the
        units of ``image`` where it is small.
    x_0, y_0, r_p, q, theta : Tensor, (B,)
        Centre and semi-major axis in pixels, axis ratio, and angle from +x.
    good : Tensor of bool, (B,)
        Whether there was light to look at.
    """

    image: Tensor
    scalars: Tensor
    x_0: Tensor
    y_0: Tensor
    r_p: Tensor
    q: Tensor
    theta: Tensor
    good: Tensor


@lru_cache(maxsize=16)
def _templates(shape: tuple[int, int], tenth_sigma: int, device: torch.device) -> WindowTemplates:
    # windows of a PSF that is nearly the same do as well
    like = torch.zeros((), device=device)
    return window_templates(None, 0.1 * tenth_sigma, shape, like)


@torch.no_grad()
def look(
    data: Tensor, weight: Tensor, *, position: Tensor | None = None, fwhm: float | None = None
) -> PolarView:
    """Resample each galaxy in ellipses about its centre.

    Parameters
    ----------
    data : Tensor, (B, ny, nx)
    weight : Tensor, (B, ny, nx)
        One over the standard deviation of each pixel; 0 where it is not to be used.
    position : Tensor, (B, 2), optional
        (x, y) of the centre in pixels, where it is known (else NaN).
    fwhm : float, optional
        Of the PSF in pixels; only the centring uses it.

    Returns
    -------
    PolarView

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.morphology import look
    >>> y, x = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    >>> r = torch.hypot(x - 20, 2 * (y - 20))
    >>> view = look(torch.exp(-r / 5)[None], torch.full((1, 41, 41), 1e3))
    >>> round(float(view.q), 1), abs(round(float(torch.sin(view.theta)), 1))
    (0.5, 0.0)
    """
    count, ny, nx = data.shape
    best = weight.flatten(1).amax(1)[:, None, None].clamp_min(1e-30)
    data, weight = data * best, weight / best
    if position is None:
        position = data.new_full((count, 2), torch.nan)
    sigma = max(round(10 * (fwhm or _NO_PSF) / 2.3548), 3)
    guess = first_guess(
        data,
        weight > 0,
        _templates((ny, nx), sigma, data.device),
        position=position.to(data),
        limit=max(4.0, 0.06 * min(ny, nx)),
        background=True,
    )
    known = (weight > 0).to(data)
    stack = torch.stack([(data - guess.level[:, None, None]) * known, known], 1)
    sample = _Sampler(stack, guess.x_0, guess.y_0)
    r_p, q, theta, profile, radii = _ellipse(sample, 0.5 * min(ny, nx))
    scale, r_20, r_50, r_80 = _radii_of_light(profile, radii, r_p)
    at = torch.as_tensor(RADII).to(data) * r_p[:, None]
    light = sample(at, q, theta) / scale[:, None, None]
    noise = 10.0 / (scale * weight.flatten(1).amax(1).clamp_min(1e-30))
    scalars = [torch.log(q), torch.log(r_80 / r_20), torch.log(r_50 / r_p), torch.log(noise)]
    image, scalars = torch.asinh(10.0 * light), torch.stack(scalars, 1)
    good = torch.isfinite(scalars).all(1) & torch.isfinite(image).flatten(1).all(1) & (scale > 0)
    return PolarView(
        torch.where(good[:, None, None], image, 0.0).clamp(-4, 9),
        torch.where(good[:, None], scalars, 0.0),
        guess.x_0,
        guess.y_0,
        r_p,
        q,
        theta,
        good,
    )


class _Sampler:
    """Brightness on ellipses about the centres; where nothing is known, of the opposite side."""

    def __init__(self, stack: Tensor, x_0: Tensor, y_0: Tensor) -> None:
        self.stack, self.x_0, self.y_0 = stack, x_0[:, None, None], y_0[:, None, None]
        angle = torch.arange(ANGLES) * (2 * np.pi / ANGLES)
        self.cos, self.sin = (f(angle).to(stack) for f in (torch.cos, torch.sin))

    def __call__(self, radii: Tensor, q: Tensor, theta: Tensor) -> Tensor:
        ny, nx = self.stack.shape[2:]
        along = radii[:, :, None] * self.cos
        across = radii[:, :, None] * q[:, None, None] * self.sin
        cos, sin = torch.cos(theta)[:, None, None], torch.sin(theta)[:, None, None]
        x = self.x_0 + cos * along - sin * across
        y = self.y_0 + sin * along + cos * across
        at = torch.stack([2 * x / (nx - 1) - 1, 2 * y / (ny - 1) - 1], -1)
        light, known = torch.nn.functional.grid_sample(self.stack, at, align_corners=True).unbind(1)
        light = light / known.clamp_min(0.3)
        opposite = light.roll(ANGLES // 2, -1)
        return torch.where(known > 0.3, light, opposite * (known.roll(ANGLES // 2, -1) > 0.3))


def _ellipse(sample: _Sampler, largest: float) -> tuple[Tensor, ...]:
    """Petrosian radius, axis ratio and angle, and the profile (B, R) at radii (B, R)."""
    count = len(sample.stack)
    q, theta = sample.stack.new_ones(count), sample.stack.new_zeros(count)
    radii = torch.as_tensor(np.geomspace(0.7, largest, _PROFILE_RADII)).to(q)
    for step in range(_PASSES):
        r = radii / torch.sqrt(q)[:, None]
        light = sample(r, q, theta)
        opposite = light.roll(ANGLES // 2, -1)
        lopsided = light > _LOPSIDED * opposite.clamp_min(0) + _SIGNIFICANT
        light = torch.where(lopsided, opposite, light)
        profile = light.mean(-1)
        r_p = _petrosian(profile, r)
        if step == _PASSES - 1:
            break
        e1, e2 = _ellipticity(light, profile, r, r_p, q, sample)
        if step == 0:
            e1, e2 = _DILUTED * e1, _DILUTED * e2
        theta = theta + 0.5 * torch.atan2(e2, e1)
        e = torch.hypot(e1, e2).clamp(0, 0.93)
        q = torch.sqrt((1 - e) / (1 + e)).clamp(0.15, 1.0)
    return r_p, q, theta, profile, r


def _rings(r: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (over pi) of the rings around radii, and the squares of their outer radii."""
    middle = 0.5 * (r[:, 1:] + r[:, :-1])
    last = 1.5 * r[:, -1:] - 0.5 * r[:, -2:-1]
    outer = torch.cat([middle, last], 1).square()
    return torch.diff(outer, dim=1, prepend=torch.zeros_like(outer[:, :1])), outer


def _petrosian(profile: Tensor, r: Tensor) -> Tensor:
    """Where the root of the brightness falls to a fraction of its mean inside, (B,)."""
    root = profile.clamp_min(0).sqrt()
    area, outer = _rings(r)
    ratio = root / ((root * area).cumsum(1) / outer).clamp_min(1e-12)
    below = ratio < _PETROSIAN
    below[:, -1] = True
    k = below.to(torch.int8).argmax(1, keepdim=True).clamp_min(1)
    high, low = ratio.gather(1, k - 1), ratio.gather(1, k)
    t = ((high - _PETROSIAN) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return torch.lerp(r.gather(1, k - 1), r.gather(1, k), t)[:, 0]


def _ellipticity(light, profile, r, r_p, q, sample: _Sampler) -> tuple[Tensor, Tensor]:
    """(1 - q²) / (1 + q²) along and across, of compressed light within the Petrosian ellipse."""
    u = r / r_p[:, None]
    near_edge = torch.exp(-0.5 * ((u - 0.8) / 0.15) ** 2)
    level = (profile * near_edge).sum(1) / near_edge.sum(1)
    inside = torch.sigmoid((1.0 - u) / 0.08)
    compressed = torch.asinh(light / level.clamp_min(1e-9)[:, None, None]).clamp_min(0)
    weight = compressed * (r**4 * inside)[:, :, None]  # radii are spaced in ln r
    total = weight.sum((1, 2)).clamp_min(1e-12)
    xx = (weight * sample.cos**2).sum((1, 2)) / total
    yy = (weight * sample.sin**2).sum((1, 2)) / total * q**2
    xy = (weight * sample.cos * sample.sin).sum((1, 2)) / total * q
    trace = (xx + yy).clamp_min(1e-12)
    return (xx - yy) / trace, 2 * xy / trace


def _radii_of_light(profile: Tensor, r: Tensor, r_p: Tensor) -> tuple[Tensor, ...]:
    """Mean brightness within the Petrosian ellipse, and radii of 20, 50 and 80 % of its light."""
    area, _ = _rings(r)
    light = (profile * area).cumsum(1)
    last = (r < r_p[:, None]).sum(1, keepdim=True).clamp(1, r.shape[1]) - 1
    total = light.gather(1, last).clamp_min(1e-9)
    fraction = light / total

    def radius(of: float) -> Tensor:
        k = (fraction < of).to(torch.int8).cumprod(1).sum(1, keepdim=True).clamp(1, r.shape[1] - 1)
        before, after = fraction.gather(1, k - 1), fraction.gather(1, k)
        t = ((of - before) / (after - before).clamp_min(1e-6)).clamp(0, 1)
        return torch.lerp(r.gather(1, k - 1), r.gather(1, k), t)[:, 0]

    return (total[:, 0] / r_p**2, *(radius(of) for of in (0.2, 0.5, 0.8)))


class MorphologyEncoder(nn.Module):
    """Normal distribution of the latents of a galaxy, from its `PolarView`.

    Parameters
    ----------
    latent_dim : int
    channels : tuple of int
        Of the convolutions, each with stride 2.
    hidden : int
        Units of the hidden layers.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.morphology import ANGLES, RADII, MorphologyEncoder
    >>> encoder = MorphologyEncoder(latent_dim=3)
    >>> image, scalars = torch.rand(2, len(RADII), ANGLES), torch.rand(2, 4)
    >>> mean, std = encoder(image, scalars)
    >>> mean.shape, std.shape
    (torch.Size([2, 3]), torch.Size([2, 3]))

    The angle of the galaxy and its mirror image make no difference:

    >>> turned, _ = encoder(image.flip(2).roll(1 + 16, 2), scalars)
    >>> torch.allclose(mean, turned, atol=1e-5)
    True
    """

    def __init__(
        self,
        *,
        latent_dim: int = 8,
        channels: tuple[int, ...] = (32, 64, 96),
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_dim": latent_dim,
            "channels": tuple(channels),
            "hidden": hidden,
        }
        self.latent_dim = latent_dim
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2) for a, b in pairwise((1, *channels))]
        )
        rows = len(RADII)
        for _ in channels:
            rows = (rows + 1) // 2
        self.first = nn.Linear(2 * channels[-1] * rows + 4, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.mean = nn.Linear(hidden, latent_dim)
        self.log_std = nn.Linear(hidden, latent_dim)

    def features(self, image: Tensor, scalars: Tensor, *, mirror: bool = True) -> Tensor:
        """Last hidden layer, (B, hidden); of the image as it is only, or with its mirror image."""
        pooled = self._pooled(image)
        if mirror:
            # the angle a is -a in the mirror, and the first one stays where it is
            pooled = 0.5 * (pooled + self._pooled(image.flip(2).roll(1, 2)))
        h = nn.functional.silu(self.first(torch.cat([pooled, scalars], 1)))
        return h + nn.functional.silu(self.second(h))

    def _pooled(self, image: Tensor) -> Tensor:
        h = image[:, None]
        for layer in self.convolutions:
            h = nn.functional.pad(h, (1, 1, 0, 0), mode="circular")
            h = nn.functional.silu(layer(nn.functional.pad(h, (0, 0, 1, 1), mode="replicate")))
        return torch.cat([h.mean(3).flatten(1), h.amax(3).flatten(1)], 1)

    def forward(self, image: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, d) of the latents.

        Parameters
        ----------
        image : Tensor, (B, R, A)
        scalars : Tensor, (B, 4)
        """
        return self.told(self.features(image, scalars))

    def told(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the last hidden layer (..., hidden)."""
        return self.mean(features), nn.functional.softplus(self.log_std(features)) + 1e-3
