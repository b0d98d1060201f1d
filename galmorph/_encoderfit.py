"""Posteriors of learned galaxies by one pass of the encoder, in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from galmorph._batchfit import (
    BatchResult,
    BatchSetup,
    background_templates,
    one_thread,
    window_templates,
)
from galmorph._guess import first_guess
from galmorph._learnedfit import fit_learned_batch, full_turn
from galmorph.nets.stamp_encoder import (
    UNKNOWN,
    PosteriorEncoder,
    corrected,
    first_geometry,
    scalars_of,
    see,
)
from galmorph.psf import PSF
from galmorph.rendering.learned import Geometry, LearnedRenderer
from galmorph.rendering.learned_model import learned_transfer, profile_of, sampling_for

if TYPE_CHECKING:
    from galmorph.nets.learned import LearnedShape

__all__ = ["encode_batch", "refine_batch"]

_WIDE = torch.float64
#: Looks at each image: the second one from where the first saw the galaxy.
_PASSES = 2
# full width at half maximum of what stands for no PSF, in pixels
_NO_PSF = 0.7
_CHUNK = 64
# corrections and latents beyond which nothing was trained
_FARTHEST = 6.0


def refine_batch(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    position: np.ndarray,
) -> BatchResult:
    """Maximum-posterior fits that start where `encode_batch` ends."""
    seen = encode_batch(setup, data, inv_sigma, psf, position)
    setup = replace(setup, start=seen.params)
    return fit_learned_batch(setup, data, inv_sigma, psf, position, only_start=True)


@one_thread()
@torch.no_grad()
def encode_batch(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    position: np.ndarray,
) -> BatchResult:
    """What the encoder tells of every stamp of a batch; arguments as for `fit_batch`.

    Returns
    -------
    BatchResult
        Mean and covariance of the posterior; the background is solved for at the mean.

    Raises
    ------
    TypeError
        If the network was trained without an encoder.
    ValueError
        If parameters are fixed, or have priors of the user's.
    """
    network: LearnedShape = setup.model.shape
    if not isinstance(network.encoder, PosteriorEncoder) or not network.encoder.trained:
        raise TypeError("the encoder of this network was not trained: use MAPFitter")
    if not all(setup.free) or setup.priors:
        raise ValueError(
            "EncoderFitter tells all parameters under the prior of the network; with fixed "
            "parameters or other priors, use MAPFitter"
        )
    shape, device, dtype = data.shape[1:], setup.device, torch.float32
    if setup.start is not None:  # near a position that the user gave
        position = setup.start[:, 1:3]
    best = inv_sigma.reshape(len(data), -1).max(1)
    psfs = [psf] if isinstance(psf, PSF) else list(psf or [])
    sigma = float(np.median([p.sigma for p in psfs])) if psfs else _NO_PSF / 2.3548
    windows = window_templates(
        psfs[0] if psfs else None, sigma, shape, torch.zeros((), dtype=dtype, device=device)
    )
    parts = []
    for i in range(0, len(data), _CHUNK):
        rows = slice(i, i + _CHUNK)
        values = torch.as_tensor(data[rows] * best[rows, None, None], dtype=dtype, device=device)
        weight = torch.as_tensor(
            inv_sigma[rows] / best[rows, None, None], dtype=dtype, device=device
        )
        own = psfs if len(psfs) < 2 else psfs[rows]
        fwhm = [2.3548 * p.sigma for p in own] or [_NO_PSF]
        fwhm = torch.as_tensor(fwhm, dtype=dtype, device=device).expand(len(values)).contiguous()
        where = torch.as_tensor(position[rows], dtype=dtype, device=device)
        seen = _look(setup, network, values, weight, fwhm, windows, where)
        parts.append(_with_chi2(setup, network, values, weight, own, *seen))
    params, cov, background, background_cov, chi2 = (
        torch.cat(p).double().cpu().numpy() for p in zip(*parts, strict=True)
    )
    scale = 1.0 / best
    params[:, 0] *= scale
    cov[:, 0] *= scale[:, None]
    cov[:, :, 0] *= scale[:, None]
    bounds = np.array([setup.bounds[name] for name in setup.names], dtype=float)
    with np.errstate(invalid="ignore"):
        beyond = (params < bounds[:, 0]) | (params > bounds[:, 1])
    return BatchResult(
        params=params,
        cov=cov,
        background=background * scale[:, None],
        background_cov=background_cov * (scale**2)[:, None, None],
        cross_cov=np.zeros((len(data), params.shape[1], background.shape[1])),
        chi2=chi2,
        cost=chi2,
        n_iter=np.full(len(data), _PASSES),
        converged=np.isfinite(params).all(1),
        at_bound=beyond.any(1),
        bad_covariance=~np.isfinite(cov).all((1, 2)),
    )


def _look(setup, network, values, weight, fwhm, windows, position):
    """Parameters (B, P) and covariance (B, P, P), in units of the noise."""
    least = setup.max_shift or max(4.0, 1.5 * windows.psf_sigma, 0.06 * min(values.shape[1:]))
    guess = first_guess(
        values,
        weight > 0,
        windows,
        position=position,
        limit=least,
        background=True,  # as in training, where nothing was known of it
    )
    image = values - guess.level[:, None, None]
    first, flux = first_geometry(guess)
    decoder = network.decoder(values.dtype, values.device)
    for _ in range(_PASSES):
        before = first
        mean, white = network.encoder(see(image, weight, first, flux), scalars_of(first, fwhm))
        told = mean.clamp(-_FARTHEST, _FARTHEST)
        z = told[:, len(UNKNOWN) :]
        n, q = decoder.profile(z)
        now = corrected(first, told[:, :4])
        first = replace(now, n=n.clamp(0.3, 7.0), q=q.clamp(0.05, 0.98))
        flux = flux * torch.exp(told[:, 4])
    place = [flux, first.x_0, first.y_0, first.r, full_turn(first.theta)]
    params = torch.cat([torch.stack(place, 1), z], 1)
    size = mean.shape[1]
    factor = torch.linalg.solve_triangular(
        white.double(), torch.eye(size, dtype=_WIDE, device=white.device), upper=False
    )
    cov = factor @ factor.transpose(1, 2)
    jacobian = cov.new_zeros((len(cov), size, size))
    cos, sin = torch.cos(before.theta) * before.r, torch.sin(before.theta) * before.r
    jacobian[:, 0, 4] = flux
    jacobian[:, 1, 0], jacobian[:, 1, 1] = cos, -sin
    jacobian[:, 2, 0], jacobian[:, 2, 1] = sin, cos
    jacobian[:, 3, 2] = first.r
    jacobian[:, 4, 3] = 1.0
    for i in range(5, size):
        jacobian[:, i, i] = 1.0
    return params, jacobian @ cov @ jacobian.transpose(1, 2)


def _with_chi2(setup, network, values, weight, psfs, params, cov):
    """Parameters and covariance as they are, the background that is left, and chi-square."""
    decoder = network.decoder(values.dtype, values.device)
    shape, z = values.shape[1:], params[:, 5:]
    n, q, light, radius = profile_of(decoder, z)
    geometry = Geometry(params[:, 1], params[:, 2], params[:, 3] / radius, q, params[:, 4], n)
    coefficients = decoder.coefficients(z)
    drawn = torch.empty_like(values)
    need = sampling_for(geometry.r, geometry.q)
    for sampling in need.unique().tolist():
        here = torch.nonzero(need == sampling)[:, 0]
        own = psfs if len(psfs) < 2 else [psfs[i] for i in here.tolist()]
        transfer = learned_transfer(
            (own[0] if len(own) == 1 else own) if own else None,
            shape,
            params[here, 1:3],
            dtype=values.dtype,
            device=values.device,
        )
        place = geometry.at(here)
        renderer = LearnedRenderer(shape, transfer, oversampling=sampling)
        drawn[here] = renderer.image(place, coefficients[here])
    rest = (values - (params[:, 0] / light)[:, None, None] * drawn) * weight
    rest = rest.flatten(1).to(_WIDE)
    templates = torch.as_tensor(background_templates(setup.background, shape)).flatten(1)
    columns = templates.to(rest) * weight.flatten(1)[:, None]
    background = rest.new_zeros((len(rest), len(templates)))
    background_cov = rest.new_zeros((len(rest), len(templates), len(templates)))
    if len(templates):
        gram = columns @ columns.transpose(1, 2)
        background_cov = torch.linalg.pinv(gram, hermitian=True)
        background = (background_cov @ (columns @ rest[..., None]))[..., 0]
        rest = rest - (background[:, None] @ columns)[:, 0]
    return params, cov, background, background_cov, rest.square().sum(1)
