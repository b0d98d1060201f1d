"""Learned galaxies at points and on grids, numpy in and out: what astropy asks of a model.

Parameters are flux, x_0, y_0, r_50, theta and the latents, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from galmorph.psf import PSF
from galmorph.rendering.canonical import light_and_radius, light_and_radius_slopes
from galmorph.rendering.learned import ROUND, Geometry, LearnedRenderer
from galmorph.rendering.transfer import Transfer, make_transfer

if TYPE_CHECKING:
    from galmorph.nets.canonical import CanonicalDecoder
    from galmorph.nets.learned import LearnedShape

__all__ = ["learned_grid", "learned_points", "misfit_fraction", "profile_of", "to_profile"]

# pixels around the stamp in which what the profile misses is drawn
MARGIN = 8
# steps, in pixels, of the distance from the middle by which the box is chosen
_DRIFT = 4.0
# spacing of the finest samples in half-light radii, at most, and samples a pixel, at least and
# at most
_SPACING, _COARSEST, _FINEST = 0.08, 2, 64


def profile_of(
    decoder: CanonicalDecoder, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, axis ratio, light and half-light radius (B,) of latents, in units of the profile's."""
    n, q = decoder.profile(z)
    totals = [
        light_and_radius(n[rows], decoder.coefficients(z[rows]))
        for rows in torch.arange(len(z), device=z.device).split(4096)
    ]
    light, radius = (torch.cat(parts) for parts in zip(*totals, strict=True))
    return n, q, light, radius


def to_profile(
    decoder: CanonicalDecoder, params: torch.Tensor
) -> tuple[Geometry, torch.Tensor, torch.Tensor]:
    """Geometry of the profile, its flux (B,), and the latents, of parameters (B, P)."""
    z = params[:, 5:]
    n, q, light, radius = profile_of(decoder, z)
    geometry = Geometry(
        x_0=params[:, 1],
        y_0=params[:, 2],
        r=params[:, 3].clamp_min(1e-3) / radius,
        q=q,
        theta=params[:, 4],
        n=n,
    )
    return geometry, params[:, 0] / light, z


def sampling_for(r: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Samples a pixel, at the centre, for profiles of half-light radii and axis ratios (B,)."""
    need = 1.0 / (_SPACING * r * q**ROUND).clamp_min(1e-3)
    return torch.exp2(
        torch.ceil(torch.log2(need)).clamp(np.log2(_COARSEST), np.log2(_FINEST))
    ).long()


def learned_transfer(
    psf: PSF | Sequence[PSF] | None,
    shape: tuple[int, int],
    centre: torch.Tensor,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Transfer:
    """The transfer for galaxies at centres (B, 2), with room around the stamp."""
    drift = _drift(centre, shape).amax(0).tolist()
    return make_transfer(
        PSF(np.ones((1, 1)), includes_pixel=False) if psf is None else psf,
        shape,
        drift=(drift[1], drift[0]),
        margin=0.5 * max(shape) + 2 * MARGIN - max(drift),
        dtype=dtype,
        device=device,
    )


def _drift(centre: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """How far centres (B, 2) are from the middle along x and y, rounded up: few boxes will do."""
    middle = centre.new_tensor([0.5 * (shape[1] - 1), 0.5 * (shape[0] - 1)])
    return _DRIFT * torch.ceil((centre - middle).abs() / _DRIFT)


def _draw(shape_, params, shape, psf, sampling, derivatives, device, dtype):
    decoder = shape_.decoder(dtype, device)
    tensor = torch.as_tensor(params, dtype=dtype, device=device)
    geometry, flux, z = to_profile(decoder, tensor)
    pixel = psf is None
    transfer = learned_transfer(psf, shape, tensor[:, 1:3], dtype=dtype, device=device)
    renderer = LearnedRenderer(shape, transfer, oversampling=sampling)
    if not derivatives:
        image = renderer.image(geometry, decoder.coefficients(z))
        if pixel:
            image = image + _pixel_profile(renderer, geometry, shape)
        return flux[:, None, None] * image, None
    coefficients, directions = decoder.linearise(z)
    columns = renderer.columns(geometry, coefficients, directions)
    if pixel:
        columns[:, :7] += _pixel_columns(renderer, geometry, shape)
    jacobian = columns_jacobian(decoder, tensor, geometry)
    slopes = torch.einsum("bryx,brp->bpyx", columns, jacobian * flux[:, None, None])
    slopes[:, 0] = (
        columns[:, 0] * (flux / tensor[:, 0].where(tensor[:, 0] != 0, 1.0))[:, None, None]
    )
    return flux[:, None, None] * columns[:, 0], slopes


def _alike(
    network: LearnedShape,
    params: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, int],
    size: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Galaxies drawn alike, in a box of one size, some at a time: the same in any company."""
    own = torch.as_tensor(params[rows])
    geometry, _, _ = to_profile(network.decoder(torch.float64), own)
    need = sampling_for(geometry.r, geometry.q)
    key = torch.cat([need[:, None].to(own), _drift(own[:, 1:3], shape)], 1).numpy()
    groups, group = np.unique(key, axis=0, return_inverse=True)
    for k, (sampling, *_) in enumerate(groups):
        same = rows[group.ravel() == k]
        for i in range(0, same.size, size):
            yield int(sampling), same[i : i + size]


def columns_jacobian(
    decoder: CanonicalDecoder, params: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """From parameters (without flux) to the columns of the renderer, in units of the flux.

    (B, 7 + k, P): columns are the image, x_0, y_0, ln r, ln q, theta, ln n and what bends.
    """
    z = params[:, 5:]
    batch = len(z)
    by_z = log_slopes(decoder, z)  # d(ln n, ln q, ln light, ln radius) / dz
    jacobian = params.new_zeros((batch, 7 + len(decoder.bending), params.shape[1]))
    jacobian[:, 1, 1] = 1.0
    jacobian[:, 2, 2] = 1.0
    jacobian[:, 3, 3] = 1.0 / params[:, 3]
    jacobian[:, 5, 4] = 1.0
    jacobian[:, 6, 5:] = by_z[:, 0]
    jacobian[:, 4, 5:] = by_z[:, 1]
    jacobian[:, 0, 5:] = -by_z[:, 2]
    jacobian[:, 3, 5:] = -by_z[:, 3]
    for i, latent in enumerate(decoder.bending):
        jacobian[:, 7 + i, 5 + latent] = 1.0
    return jacobian


def log_slopes(decoder: CanonicalDecoder, z: torch.Tensor) -> torch.Tensor:
    """Derivatives of ln n, ln q, ln light and ln radius by the latents, (B, 4, d)."""
    wide = decoder_like(decoder, torch.float64)
    slopes = z.new_zeros((len(z), 4, z.shape[1]), dtype=torch.float64)
    for rows in torch.arange(len(z), device=z.device).split(64):
        own = z[rows].double()
        n, q = wide.profile(own)
        slopes[rows, 0, 0] = wide.index[1]
        slopes[rows, 1, 1] = wide.ratio[1] * (1 - q)
        coefficients, directions = wide.linearise(own)
        totals = light_and_radius_slopes(n, coefficients, directions)
        for i, slope in enumerate(totals):
            slopes[rows, 2 + i, 0] = wide.index[1] * slope[:, 0]
            for k, latent in enumerate(wide.bending):
                slopes[rows, 2 + i, latent] += slope[:, 1 + k]
    return slopes.to(z.dtype)


def decoder_like(decoder: CanonicalDecoder, dtype: torch.dtype) -> CanonicalDecoder:
    """The decoder in another precision."""
    if decoder.draw.weight.dtype == dtype:
        return decoder
    from copy import deepcopy

    return deepcopy(decoder).to(dtype)


def _pixel_profile(renderer, geometry, shape):
    """What the exact integral over the pixels adds to the band-limited profile."""
    return _pixel_columns(renderer, geometry, shape, derivatives=False)[:, 0]


def _pixel_columns(renderer, geometry, shape, derivatives=True):
    from galmorph.rendering.learned import _chain
    from galmorph.rendering.pixel import sersic_pixel_flux, sersic_pixel_flux_jacobian

    y, x = np.mgrid[: shape[0], : shape[1]]
    like = geometry.x_0
    px, py = (torch.as_tensor(a.ravel().astype(float)) for a in (x, y))
    args = [
        t.double().cpu()
        for t in (
            geometry.x_0,
            geometry.y_0,
            geometry.r,
            geometry.n,
            1 - geometry.q,
            geometry.theta,
        )
    ]
    own = renderer.sersic(
        [geometry.component()], geometry.x_0, geometry.y_0, derivatives=derivatives
    )
    if not derivatives:
        image = sersic_pixel_flux(px, py, *args).to(like).unflatten(1, shape)
        return (image - own.image)[:, None]
    drawn = torch.einsum("brm,bcr->bcm", own.columns.flatten(2), _chain(geometry))
    image, slopes = sersic_pixel_flux_jacobian(px, py, *args)
    slopes = slopes.to(like)
    r, n, q = geometry.r[:, None], geometry.n[:, None], geometry.q[:, None]
    exact = torch.stack(
        [
            image.to(like),
            slopes[:, 0],
            slopes[:, 1],
            slopes[:, 2] * r,
            -slopes[:, 4] * q,
            slopes[:, 5],
            slopes[:, 3] * n,
        ],
        1,
    )
    return (exact - drawn).unflatten(2, shape)


def learned_grid(
    network: LearnedShape,
    params: np.ndarray,
    shape: tuple[int, int],
    *,
    psf: PSF | Sequence[PSF] | None,
    derivatives: bool = False,
    device: str = "cpu",
    dtype: str = "float64",
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draw learned galaxies on stamps.

    Parameters
    ----------
    network : LearnedShape
    params : array, shape (B, P)
        Rows with NaN give images of NaN.
    shape : tuple of int
        (ny, nx).
    psf : PSF, sequence of PSF, or None
        Shared, or one a row; None integrates over the pixels.
    derivatives : bool, optional
        Also give (B, P, ny, nx).
    device, dtype : str, optional

    Returns
    -------
    images : array, shape (B, ny, nx)
    derivatives : array, shape (B, P, ny, nx), if asked for
    """
    images = np.full((len(params), *shape), np.nan)
    slopes = np.full((*params.shape, *shape), np.nan) if derivatives else None
    usable = np.flatnonzero(np.isfinite(params).all(1))
    size = max(1, int(4e6 / (shape[0] * shape[1] * (params.shape[1] if derivatives else 4))))
    with torch.no_grad():
        for sampling, rows in _alike(network, params, usable, shape, size):
            own = psf if psf is None or isinstance(psf, PSF) else [psf[j] for j in rows]
            image, slope = _draw(
                network,
                params[rows],
                shape,
                own,
                sampling,
                derivatives,
                device,
                getattr(torch, dtype),
            )
            images[rows] = image.cpu().numpy()
            if derivatives:
                slopes[rows] = slope.cpu().numpy()
    return (images, slopes) if derivatives else images


def learned_points(
    network: LearnedShape,
    params: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    *,
    psf: PSF | None,
    derivatives: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Learned galaxies at the centres of pixels that may be anywhere.

    Parameters
    ----------
    network : LearnedShape
    params : array, shape (B, P)
    x, y : array, shape (m,)
        Centres of pixels.
    psf : PSF or None
    derivatives : bool, optional
        Also give (B, P, m).

    Returns
    -------
    values : array, shape (B, m)
    derivatives : array, shape (B, P, m), if asked for
    """
    values = np.zeros((len(params), x.size))
    slopes = np.zeros((*params.shape, x.size)) if derivatives else None
    # points on one grid of pixels are drawn at once
    column, row = np.floor(x + 1e-7), np.floor(y + 1e-7)
    offset = np.round(np.stack([x - column, y - row], -1), 7)
    groups, member = np.unique(offset, axis=0, return_inverse=True)
    for g, (dx, dy) in enumerate(groups):
        here = np.flatnonzero(member.ravel() == g)
        low_x, low_y = column[here].min(), row[here].min()
        own = params.copy()
        own[:, 1] -= low_x + dx
        own[:, 2] -= low_y + dy
        at = (row[here] - low_y).astype(int), (column[here] - low_x).astype(int)
        shape = (int(at[0].max()) + 1, int(at[1].max()) + 1)
        result = learned_grid(network, own, shape, psf=psf, derivatives=derivatives)
        images = result[0] if derivatives else result
        values[:, here] = images[:, at[0], at[1]]
        if derivatives:
            slopes[:, :, here] = result[1][:, :, at[0], at[1]]
    return (values, slopes) if derivatives else values


def misfit_fraction(
    network: LearnedShape, params: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Misfit as a fraction of the light at every pixel, (B, ny, nx); NaN where parameters are."""
    fraction = np.full((len(params), *shape), np.nan)
    rows = np.flatnonzero(np.isfinite(params).all(1))
    decoder = network.decoder(torch.float64)
    y, x = (torch.as_tensor(a.ravel().astype(float)) for a in np.mgrid[: shape[0], : shape[1]])
    with torch.no_grad():
        for i in range(0, rows.size, 256):
            own = torch.as_tensor(params[rows[i : i + 256]])
            geometry, _, z = to_profile(decoder, own)
            u = geometry.to_canonical(x, y).square().sum(-1).sqrt()
            fraction[rows[i : i + 256]] = decoder.misfit_at(z, u).unflatten(1, shape).numpy()
    return fraction
