"""Training of the preset ``galmorph``: each image through its own PSF, noise and mask."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from galmorph._batchfit import window_templates
from galmorph._guess import first_guess
from galmorph.nets.stamp_encoder import (
    UNKNOWN,
    corrected,
    first_geometry,
    log_density,
    scalars_of,
    see,
)
from galmorph.psf import PSF
from galmorph.rendering.transfer import Transfer
from galmorph.training.canonical import FastRenderer

if TYPE_CHECKING:
    from galmorph.nets.learned import LearnedVAE
    from galmorph.training.datasets import TrainingBatch

__all__ = ["learned_elbo", "psf_transfer"]

# widths of the prior of the corrections of the first geometry
_WIDTHS = (0.5, 0.5, 0.5, 1.0, 0.5)
# full width at half maximum, in pixels, of what stands for no PSF
_NO_PSF = 0.7


def psf_transfer(psf: torch.Tensor, box: tuple[int, int]) -> Transfer:
    """Transfer of effective PSFs (B, ky, kx) sampled once a pixel, of any size."""
    waves = [2 * np.pi * torch.fft.fftfreq(box[0]), 2 * np.pi * torch.fft.rfftfreq(box[1])]
    lines = []
    for k, count in zip(waves, psf.shape[1:], strict=True):
        at = torch.arange(count) - 0.5 * (count - 1)
        lines.append(torch.exp(-1j * k[:, None] * at).to(psf.device))
    amplitude = lines[0] @ psf.to(lines[0].dtype) @ lines[1].T  # (B, ly, lx // 2 + 1)
    kx, ky = torch.meshgrid(waves[1], waves[0], indexing="ij")
    kx, ky = (k.reshape(-1).to(psf) for k in (kx, ky))
    return Transfer(amplitude.transpose(1, 2).flatten(1), kx, ky, None, box)


@lru_cache(maxsize=8)
def _renderer(shape: tuple[int, int], device: torch.device) -> FastRenderer:
    return FastRenderer(shape).to(device)


def learned_elbo(
    vae: LearnedVAE,
    batch: TrainingBatch,
    *,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Evidence lower bound of each image; see `galmorph.GalaxyVAE.elbo`.

    Geometry and latents are drawn from what the encoder tells, flux and background are solved
    for, and the variance of a pixel is that of the noise and of the misfit of the model.
    """
    images, weight = _in_noise(batch)
    shape = tuple(images.shape[1:])
    psf = batch.psf
    if psf is None:  # light is sampled at the pixels
        psf = torch.ones((1, 1, 1), dtype=images.dtype, device=images.device)
    kinds = [PSF(p.cpu().numpy()) for p in psf] if batch.psf is not None else []
    fwhm = torch.as_tensor([2.3548 * p.sigma for p in kinds] or [_NO_PSF]).to(images)
    fwhm = fwhm.expand(len(images)).contiguous()
    with torch.no_grad():
        sigma = float(fwhm.median()) / 2.3548
        guess = first_guess(
            images,
            weight > 0,
            window_templates(kinds[0] if kinds else None, sigma, shape, images),
            position=torch.full_like(images[:, 0, :2], torch.nan),
            limit=max(4.0, 1.5 * sigma, 0.06 * min(shape)),
            background=True,
        )
        first, flux = first_geometry(guess)
        level = torch.where(weight > 0, guess.level[:, None, None], 0.0)
    mean, white = vae.encoder(see(images - level, weight, first, flux), scalars_of(first, fwhm))
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    told = mean + torch.linalg.solve_triangular(white, noise[..., None], upper=False)[..., 0]
    z = told[:, len(UNKNOWN) :]
    n, q = vae.decoder.profile(z)
    geometry = replace(corrected(first, told[:, :4].clamp(-1.5, 1.5)), n=n, q=q)
    drawn, u = _renderer(shape, images.device)(
        geometry, vae.decoder.coefficients(z), psf_transfer(psf, shape)
    )
    model, background = _brightness(drawn.flatten(1), images.flatten(1), weight.flatten(1))
    known = weight.flatten(1)
    used = known > 0
    variance = torch.where(used, known.clamp_min(1e-12) ** -2, 1.0)
    variance = variance + (vae.decoder.misfit_at(z, u) * model).square()
    residual = images.flatten(1) - model - background
    terms = -0.5 * (residual.square() / variance + torch.log(2 * np.pi * variance))
    log_likelihood = torch.where(used, terms, 0.0).sum(1)
    widths = torch.as_tensor(_WIDTHS).to(told)
    place = told[:, : len(UNKNOWN)] / widths
    log_prior = vae.prior().log_prob(z) - (0.5 * place.square() + torch.log(widths)).sum(1)
    log_prior = log_prior - 0.5 * len(UNKNOWN) * np.log(2 * np.pi)
    kl = log_density(mean, white, told) - log_prior
    count = used.sum(1).clamp_min(1)
    return {
        "loss": beta * kl - log_likelihood,
        "log_likelihood": log_likelihood,
        "kl": kl,
        "squared_error": torch.where(used, residual.square(), 0.0).sum(1) / count,
    }


def _in_noise(batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in units of their least noise, and weights up to 1; the noise estimated if need be."""
    images, weight = batch.images, batch.weight
    weight = torch.ones_like(images) if weight is None else weight
    if not batch.noise_known or batch.weight is None:
        from galmorph.nets.learned import noise_of

        seen = torch.where(weight > 0, images, torch.nan).cpu().numpy()
        sigma = torch.as_tensor(noise_of(seen)).to(images)
        weight = (weight > 0).to(images) / sigma[:, None, None]
    best = weight.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
    return images * best, weight / best


def _brightness(
    drawn: torch.Tensor, data: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model (B, npix) at its best flux, never negative, and the best background (B, 1).

    Bright pixels count less than their noise would have it, as they are fitted worse.
    """
    used = weight > 0
    variance = torch.where(used, weight.clamp_min(1e-12) ** -2, 1.0)
    rough = torch.where(used, 1.0 / (variance + (0.1 * data).square()), 0.0)
    total = rough.sum(1).clamp_min(1e-30)
    unit, level = ((rough * v).sum(1, keepdim=True) / total[:, None] for v in (drawn, data))
    rise = drawn - unit
    square = (rough * rise * rise).sum(1).clamp_min(1e-30)
    flux = ((rough * rise * (data - level)).sum(1) / square)[:, None].clamp_min(0)
    return flux * drawn, level - flux * unit
