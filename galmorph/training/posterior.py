"""Galaxies drawn from the learned model, on which the posterior encoder is trained.

A network that is trained to tell the parameters of simulated galaxies from their images, by the
density that it gives to the true ones, learns the posterior (Papamakarios & Murray 2016).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from galmorph._batchfit import window_templates
from galmorph._guess import first_guess
from galmorph.nets.learned import LearnedShape
from galmorph.nets.stamp_encoder import first_geometry
from galmorph.psf import PSF
from galmorph.rendering.learned import Geometry
from galmorph.rendering.learned_model import learned_grid

__all__ = ["Simulated", "Simulator", "unknowns"]


# of the largest stamp, that is cut away on each side, at most
_MOST_CUT = 0.22


@dataclass
class Simulated:
    """Stamps and what they were made of; the geometry has r_50 for r."""

    image: torch.Tensor
    weight: torch.Tensor
    fwhm: torch.Tensor
    geometry: Geometry
    flux: torch.Tensor
    z: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Simulated:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        place = parts.pop("geometry")
        place = Geometry(*(getattr(place, f.name)[rows] for f in fields(place)))
        return Simulated(geometry=place, **{k: v[rows] for k, v in parts.items()})


def gaussian_psf(fwhm: float) -> PSF:
    """A round Gaussian PSF."""
    sigma = fwhm / 2.3548
    half = int(np.ceil(4 * sigma)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


class Simulator:
    """Draws galaxies from the prior of the latents on noisy stamps of many sizes.

    Parameters
    ----------
    network : LearnedShape
    shape : tuple of int
        (ny, nx) of the largest stamps.
    """

    def __init__(self, network: LearnedShape, shape: tuple[int, int] = (64, 64)) -> None:
        self.network, self.shape = network, shape
        self.decoder = network.decoder()

    @torch.no_grad()
    def draw(self, count: int, rng: torch.Generator) -> Simulated:
        """Some galaxies, all with one PSF."""

        def between(low: float, high: float, size: int = count) -> torch.Tensor:
            return low + (high - low) * torch.rand(size, generator=rng)

        seed = int(torch.randint(2**62, (), generator=rng))
        z = torch.as_tensor(self.network.prior.sample(count, seed)).float().clamp(-6, 6)
        n, q = self.decoder.profile(z)
        fwhm = torch.exp(between(np.log(1.2), np.log(6.0), 1)).expand(count)
        size = torch.exp(between(np.log(0.8), np.log(9.0)))
        cut = int(torch.randint(0, int(_MOST_CUT * min(self.shape)) + 1, (), generator=rng))
        r_50 = (size / q.sqrt()).clamp_max(0.3 * (min(self.shape) - 2 * cut))
        middle = 0.5 * (self.shape[1] - 1), 0.5 * (self.shape[0] - 1)
        geometry = Geometry(
            x_0=middle[0] + between(-1.5, 1.5),
            y_0=middle[1] + between(-1.5, 1.5),
            r=r_50,
            q=q,
            theta=between(-np.pi, np.pi),
            n=n,
        )
        place = [torch.ones(count), geometry.x_0, geometry.y_0, r_50, geometry.theta]
        params = torch.cat([torch.stack(place, 1), z], 1).double().numpy()
        unit = learned_grid(
            self.network, params, self.shape, psf=gaussian_psf(float(fwhm[0])), dtype="float32"
        )
        unit = torch.as_tensor(unit).float()
        snr = torch.exp(between(np.log(8.0), np.log(1500.0)))
        flux = snr / unit.square().sum((1, 2)).sqrt().clamp_min(1e-9)
        shot = torch.where(torch.rand(count, generator=rng) < 0.3, between(0.0, 0.2), 0.0)
        clean = flux[:, None, None] * unit
        sigma = torch.sqrt(1.0 + shot[:, None, None] * clean.clamp_min(0))
        image = clean + sigma * torch.randn(clean.shape, generator=rng)
        weight = (1.0 / sigma) * self._known(count, rng)
        ok = torch.isfinite(image).all(2).all(1)
        inner = np.s_[:, cut : self.shape[0] - cut, cut : self.shape[1] - cut]
        geometry = replace(geometry, x_0=geometry.x_0 - cut, y_0=geometry.y_0 - cut)
        image = (image * (weight > 0))[inner]
        made = Simulated(image, weight[inner], fwhm, geometry, flux, z)
        return made[torch.nonzero(ok)[:, 0]]

    def _known(self, count: int, rng: torch.Generator) -> torch.Tensor:
        """Zero where neighbours are masked: up to three discs, in a third of the stamps."""
        ny, nx = self.shape
        y, x = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        known = torch.ones(count, ny, nx)
        some = torch.rand(count, generator=rng) < 0.35
        for _ in range(3):
            angle = 2 * np.pi * torch.rand(count, generator=rng)
            far = 8 + 26 * torch.rand(count, generator=rng)
            radius = 1 + 6 * torch.rand(count, generator=rng)
            dx = x - (0.5 * nx + far * torch.cos(angle))[:, None, None]
            dy = y - (0.5 * ny + far * torch.sin(angle))[:, None, None]
            hit = (dx * dx + dy * dy < radius[:, None, None] ** 2) & some[:, None, None]
            known = torch.where(hit, 0.0, known)
        return known

    @torch.no_grad()
    def first(self, made: Simulated, rng: torch.Generator) -> tuple[Geometry, torch.Tensor]:
        """First geometries and fluxes: half of them guessed, half near the truth.

        The level of the border is taken away from the images, in place.
        """
        count = len(made.z)
        guess = self._guess(made, rng)

        def near(value: torch.Tensor, width: float) -> torch.Tensor:
            rough = torch.where(torch.rand(count, generator=rng) < 0.3, 3.0, 1.0)
            return value + width * rough * torch.randn(count, generator=rng)

        true = made.geometry
        scale = (true.r * true.q.sqrt()).clamp_min(1.0)
        close = [
            true.x_0 + scale * near(torch.zeros(count), 0.03),
            true.y_0 + scale * near(torch.zeros(count), 0.03),
            true.r * torch.exp(near(torch.zeros(count), 0.06)),
            (true.q * torch.exp(near(torch.zeros(count), 0.06))).clamp(0.05, 0.98),
            near(true.theta, 0.08),
            (true.n * torch.exp(near(torch.zeros(count), 0.1))).clamp(0.3, 7.0),
            made.flux * torch.exp(near(torch.zeros(count), 0.05)),
        ]
        use = torch.rand(count, generator=rng) < 0.5
        *place, flux = (torch.where(use, a, b) for a, b in zip(guess, close, strict=True))
        return Geometry(*place), flux

    def _guess(self, made: Simulated, rng: torch.Generator) -> list[torch.Tensor]:
        psf = gaussian_psf(float(made.fwhm[0]))
        sigma = psf.sigma
        guess = first_guess(
            made.image,
            made.weight > 0,
            window_templates(psf, sigma, tuple(made.image.shape[1:]), made.image),
            position=torch.full((len(made.z), 2), torch.nan),
            limit=max(4.0, 1.5 * sigma),
            background=True,
        )
        # as where the fitter knows nothing of the background
        made.image -= torch.where(made.weight > 0, guess.level[:, None, None], 0.0)
        geometry, flux = first_geometry(guess, made.geometry.theta)
        return [getattr(geometry, f.name) for f in fields(geometry)] + [flux]


def unknowns(made: Simulated, first: Geometry, flux: torch.Tensor) -> torch.Tensor:
    """What `PosteriorEncoder` should tell, (B, 5 + d)."""
    true = made.geometry
    dx, dy = true.x_0 - first.x_0, true.y_0 - first.y_0
    cos, sin = torch.cos(first.theta), torch.sin(first.theta)
    place = [
        (cos * dx + sin * dy) / first.r,
        (cos * dy - sin * dx) / first.r,
        torch.log(true.r / first.r),
        torch.remainder(true.theta - first.theta + np.pi, 2 * np.pi) - np.pi,
        torch.log(made.flux / flux),
    ]
    return torch.cat([torch.stack(place, 1), made.z], 1)
