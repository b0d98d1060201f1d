"""Training of the learned galaxy: real stamps, each through its own PSF, noise and mask.

The forward model is that of `galmorph.rendering.learned`, drawn for speed: what the profile
misses is interpolated linearly between twice as many nodes, and ends with the stamp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from galmorph.nets.canonical import CanonicalDecoder
from galmorph.nets.stamp_encoder import StampEncoder, corrected, scalars_of, see
from galmorph.rendering.fourier import FourierRenderer
from galmorph.rendering.learned import (
    GRID,
    Geometry,
    _basis,
    _stretch,
)
from galmorph.rendering.sersic import sersic_table
from galmorph.rendering.transfer import Transfer

__all__ = ["CanonicalVAE", "FastRenderer", "Losses", "gaussian_transfer"]


def gaussian_transfer(fwhm: torch.Tensor, box: tuple[int, int]) -> Transfer:
    """Transfer of round Gaussian PSFs, one a galaxy, ``fwhm`` (B,) in pixels."""
    kx = 2 * np.pi * torch.fft.rfftfreq(box[1], device=fwhm.device)
    ky = 2 * np.pi * torch.fft.fftfreq(box[0], device=fwhm.device)
    kx, ky = torch.meshgrid(kx, ky, indexing="ij")
    kx, ky = kx.reshape(-1).to(fwhm), ky.reshape(-1).to(fwhm)
    rate = fwhm.square() / (16.0 * np.log(2.0))
    amplitude = torch.exp(-rate[:, None] * (kx * kx + ky * ky))
    return Transfer(torch.complex(amplitude, torch.zeros_like(amplitude)), kx, ky, None, box)


def _dense_matrix() -> torch.Tensor:
    """Values of a B-spline at its nodes and half way between, from its coefficients."""
    at = torch.arange(2 * GRID - 1, dtype=torch.float64) / 2
    first = at.floor().clamp_max(GRID - 2)
    weights, _ = _basis(at - first)
    matrix = torch.zeros(2 * GRID - 1, GRID + 2, dtype=torch.float64)
    for tap in range(4):
        matrix.scatter_add_(1, (first.long() + tap)[:, None], weights[tap][:, None])
    return matrix[:, 1:-1].float()  # coefficients outside are zero


class FastRenderer(nn.Module):
    """Images of batches of stamps of one shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("dense", _dense_matrix(), persistent=False)
        y, x = torch.meshgrid(
            torch.arange(shape[0], dtype=torch.float32),
            torch.arange(shape[1], dtype=torch.float32),
            indexing="ij",
        )
        self.register_buffer("x", x.reshape(-1), persistent=False)
        self.register_buffer("y", y.reshape(-1), persistent=False)

    def forward(
        self, geometry: Geometry, coefficients: torch.Tensor, transfer: Transfer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, ny, nx) and elliptical radii of the pixels (B, ny * nx)."""
        points = geometry.to_canonical(self.x, self.y)
        u2 = points.square().sum(-1)
        scalars, _ = sersic_table(points.dtype, points.device).scalars_at(geometry.n)
        power = torch.exp(0.5 * torch.log(u2.clamp_min(1e-6)) / geometry.n[:, None])
        area = torch.log(geometry.r**2 * geometry.q)[:, None]
        light = torch.exp(scalars[:, 1:] - area - scalars[:, :1] * power.clamp_max(80.0))
        h, _ = _stretch(u2)
        values = self.dense @ coefficients @ self.dense.T
        place = (points * h[..., None] * (2.0 / (GRID - 1)))[:, None]
        rest = torch.nn.functional.grid_sample(
            values[:, None], place, align_corners=True, padding_mode="zeros"
        )[:, 0, 0]
        misses = light * torch.expm1(rest)
        sersic = FourierRenderer(self.shape, transfer)
        ly, lx = self.shape
        grid = misses.reshape(-1, ly, lx)
        half = torch.fft.rfft(grid, dim=-1)
        spectrum = torch.fft.fft(half.transpose(-1, -2), dim=-1).flatten(1)
        own = sersic._spectra(geometry.component(), False)[0]
        phases = sersic._phases(geometry.x_0, geometry.y_0)
        total = ((own * phases + spectrum) * transfer.amplitude).reshape(-1, lx // 2 + 1, ly)
        rows = torch.fft.ifft(total, dim=-1).transpose(-1, -2)
        image = torch.fft.irfft(rows, n=lx, dim=-1)[:, None]
        # without these the wings are twice as bright at the border, and residuals learn it
        image = sersic._without_repetitions(
            image, [geometry.component()], geometry.x_0, geometry.y_0, False
        )
        return image[:, 0], torch.sqrt(u2)


@dataclass
class Losses:
    """Of a batch: (B,) each."""

    log_likelihood: torch.Tensor
    kl: torch.Tensor
    chi2: torch.Tensor
    shift: torch.Tensor


class CanonicalVAE(nn.Module):
    """Encoder and decoder of the learned galaxy, with the forward model between them.

    Parameters
    ----------
    decoder : CanonicalDecoder
    encoder : StampEncoder
    shape : tuple of int
        (ny, nx) of the training stamps.
    """

    def __init__(
        self, decoder: CanonicalDecoder, encoder: StampEncoder, shape: tuple[int, int] = (64, 64)
    ) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.renderer = FastRenderer(shape)

    def encode(
        self, image: torch.Tensor, weight: torch.Tensor, fwhm: torch.Tensor, first: Geometry, flux
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Posterior mean and std of the latents, and corrections of the geometry."""
        return self.encoder(see(image, weight, first, flux), scalars_of(first, fwhm))

    def forward(
        self,
        image: torch.Tensor,
        weight: torch.Tensor,
        fwhm: torch.Tensor,
        first: Geometry,
        flux: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
    ) -> Losses:
        """Losses of a batch of stamps (B, ny, nx), weights 1/sigma and first geometries.

        ``noise`` (B, d) is what the latents are drawn with; none is the mean.
        """
        mean, std, shift = self.encode(image, weight, fwhm, first, flux)
        z = mean if noise is None else mean + std * noise
        n, q = self.decoder.profile(z)
        geometry = replace(corrected(first, shift), n=n, q=q)
        transfer = gaussian_transfer(fwhm, self.renderer.shape)
        drawn, u = self.renderer(geometry, self.decoder.coefficients(z), transfer)
        data, known = image.flatten(1), weight.flatten(1)
        drawn = drawn.flatten(1)
        used = known > 0
        variance = torch.where(used, known.clamp_min(1e-12) ** -2, 1.0)
        # brightness is solved for; bright pixels count less, as they are fitted worse
        rough = 1.0 / (variance + (0.1 * data).square())
        rough = torch.where(used, rough, 0.0)
        flux = (rough * drawn * data).sum(1) / (rough * drawn * drawn).sum(1).clamp_min(1e-30)
        model = flux[:, None].clamp_min(0) * drawn
        total = variance + (self.decoder.misfit_at(z, u) * model).square()
        residual = data - model
        terms = -0.5 * (residual.square() / total + torch.log(2 * np.pi * total))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).sum(1)
        return Losses(
            log_likelihood=torch.where(used, terms, 0.0).sum(1),
            kl=kl,
            chi2=torch.where(used, residual.square() / variance, 0.0).sum(1) / used.sum(1),
            shift=shift.square().sum(1),
        )
