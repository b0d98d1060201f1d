"""Models at points and on grids, numpy in and out: what astropy asks of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from galmorph.psf import PSF
from galmorph.rendering.fourier import FourierRenderer
from galmorph.rendering.parameters import Ellipse, components, raw_jacobian
from galmorph.rendering.transfer import make_transfer

# pixels beyond the stamp that are drawn for galaxies larger than it
_MAX_MARGIN = 192.0
# side of the tiles on which scattered points are drawn, and the distance from the centre, in
# pixels, beyond which the light is so smooth that the PSF does not matter
_TILE = 64
_FAR = 600.0

__all__ = ["evaluate_grid", "evaluate_points", "pixel_images"]


def _render(
    ellipses: Sequence[Ellipse],
    names: Sequence[str],
    params: torch.Tensor,
    shape: tuple[int, int],
    psf: PSF | Sequence[PSF],
    derivatives: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images (B, ny, nx) and derivatives by the parameters (B, P, ny, nx)."""
    centre = params[:, 1:3].detach()
    middle = params.new_tensor([0.5 * (shape[1] - 1), 0.5 * (shape[0] - 1)])
    drift = (centre - middle).abs().amax(0).tolist()
    at = {name: i for i, name in enumerate(names)}
    radii = [params[:, at[e.r]].detach().max().item() for e in ellipses if e.r is not None]
    transfer = make_transfer(
        psf,
        shape,
        drift=(drift[1], drift[0]),
        reach=0.9,
        margin=min(3.0 * max(radii, default=0.0), _MAX_MARGIN),
        dtype=params.dtype,
        device=params.device,
    )
    drawn = components(ellipses, names, params)
    with torch.no_grad():
        raw = FourierRenderer(shape, transfer)(
            drawn, params[:, 1], params[:, 2], derivatives=derivatives
        )
    flux = params[:, 0, None, None]
    if not derivatives:
        return flux * raw.image, None
    jacobian = raw_jacobian(ellipses, names, params)
    by_params = flux[..., None] * torch.einsum("bryx,brp->bpyx", raw.derivatives, jacobian)
    by_params[:, 0] = raw.image
    return flux * raw.image, by_params


def evaluate_grid(
    ellipses: Sequence[Ellipse],
    names: Sequence[str],
    params: np.ndarray,
    shape: tuple[int, int],
    *,
    psf: PSF | Sequence[PSF] | None,
    derivatives: bool = False,
    device: str = "cpu",
    dtype: str = "float64",
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draw models on stamps.

    Parameters
    ----------
    ellipses, names
        How the model is drawn and its parameters.
    params : array, shape (B, P)
        Rows with NaN give images of NaN.
    shape : tuple of int
        (ny, nx).
    psf : PSF, sequence of PSF, or None
        Shared, or one a row; None integrates over the pixels.
    derivatives : bool, optional
        Also give (B, P, ny, nx).
    device, dtype : str, optional
        Where, and in what precision.

    Returns
    -------
    images : array, shape (B, ny, nx)
    derivatives : array, shape (B, P, ny, nx), if asked for
    """
    if psf is None:
        y, x = np.mgrid[: shape[0], : shape[1]]
        result = pixel_images(ellipses, names, params, x.ravel(), y.ravel(), derivatives)
        if not derivatives:
            return result.reshape(-1, *shape)
        return tuple(r.reshape(*r.shape[:-1], *shape) for r in result)
    images = np.full((len(params), *shape), np.nan)
    slopes = np.full((len(params), params.shape[1], *shape), np.nan) if derivatives else None
    far = _is_far(params, shape)
    for rows in _batches(np.flatnonzero(far), 64):  # the PSF does not matter there
        y, x = np.mgrid[: shape[0], : shape[1]]
        result = pixel_images(
            ellipses, names, params[rows], x.ravel(), y.ravel(), derivatives, skip_points=True
        )
        image, slope = result if derivatives else (result, None)
        images[rows] = image.reshape(-1, *shape)
        if derivatives:
            slopes[rows] = slope.reshape(*slope.shape[:-1], *shape)
    size = int(4e6 / (shape[0] * shape[1] * (params.shape[1] if derivatives else 2)))
    for rows in _batches(np.flatnonzero(np.isfinite(params).all(1) & ~far), size):
        own = psf if isinstance(psf, PSF) else [psf[i] for i in rows]
        tensor = torch.as_tensor(params[rows], dtype=getattr(torch, dtype), device=device)
        image, slope = _render(ellipses, names, tensor, shape, own, derivatives)
        images[rows] = image.cpu().numpy()
        if derivatives:
            slopes[rows] = slope.cpu().numpy()
    return (images, slopes) if derivatives else images


def _is_far(params: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which centres are so far from the stamp that the light there is smooth, (B,)."""
    half = 0.5 * (np.array(shape[::-1]) - 1)
    with np.errstate(invalid="ignore"):
        gap = (np.abs(params[:, 1:3] - half) - half).max(1)
        return np.isfinite(params).all(1) & (gap > _FAR)


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    size = max(1, size)
    return [rows[i : i + size] for i in range(0, rows.size, size)]


def evaluate_points(
    ellipses: Sequence[Ellipse],
    names: Sequence[str],
    params: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    *,
    psf: PSF | None,
    derivatives: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Models at the centres of pixels that may be anywhere.

    Parameters
    ----------
    ellipses, names
        How the model is drawn and its parameters.
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
    if x.size == 0:
        empty = np.zeros((len(params), 0))
        return (empty, np.zeros((*params.shape, 0))) if derivatives else empty
    if psf is None:
        return pixel_images(ellipses, names, params, x, y, derivatives)
    origin = np.array([x.min(), y.min()])
    column, row = np.rint(x - origin[0]), np.rint(y - origin[1])
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    on_grid = (
        np.abs(x - origin[0] - column).max() < 1e-7 and np.abs(y - origin[1] - row).max() < 1e-7
    )
    shifted = params.copy()
    shifted[:, 1:3] -= origin
    if on_grid and shape[0] * shape[1] <= 16 * x.size + 65536:
        result = evaluate_grid(ellipses, names, shifted, shape, psf=psf, derivatives=derivatives)
        at = row.astype(int), column.astype(int)
        if derivatives:
            return tuple(r[..., at[0], at[1]] for r in result)
        return result[:, at[0], at[1]]
    return _evaluate_off_grid(
        ellipses, names, shifted, x - origin[0], y - origin[1], psf, derivatives
    )


def _evaluate_off_grid(ellipses, names, params, x, y, psf, derivatives):
    """Points in groups that are grids: of one sub-pixel offset, on one tile of the plane."""
    values = np.zeros((len(params), x.size))
    slopes = np.zeros((*params.shape, x.size)) if derivatives else None
    column, row = np.floor(x + 1e-7).astype(int), np.floor(y + 1e-7).astype(int)
    offset = np.round(np.stack([x - column, y - row], -1), 7)
    tile = np.stack([column // _TILE, row // _TILE], -1)
    groups, member = np.unique(np.concatenate([offset, tile], 1), axis=0, return_inverse=True)
    member = member.ravel()
    for g, (dx, dy, *where) in enumerate(groups):
        here = np.flatnonzero(member == g)
        low_x, low_y = column[here].min(), row[here].min()
        own = params.copy()
        own[:, 1] -= low_x + dx
        own[:, 2] -= low_y + dy
        gap = np.abs(params[:, 1:3] - (np.array(where) + 0.5) * _TILE).max(1)
        for rows, far in ((gap > _FAR, True), (gap <= _FAR, False)):
            if not rows.any():
                continue
            at = row[here] - low_y, column[here] - low_x
            if far:  # the PSF does not matter there
                result = pixel_images(
                    ellipses, names, own[rows], at[1], at[0], derivatives, skip_points=True
                )
            else:
                shape = (int(at[0].max()) + 1, int(at[1].max()) + 1)
                result = evaluate_grid(
                    ellipses, names, own[rows], shape, psf=psf, derivatives=derivatives
                )
                if derivatives:
                    result = tuple(r[..., at[0], at[1]] for r in result)
                else:
                    result = result[:, at[0], at[1]]
            if derivatives:
                slopes[np.ix_(rows, np.arange(params.shape[1]), here)] = result[1]
                result = result[0]
            values[np.ix_(rows, here)] = result
    return (values, slopes) if derivatives else values


def pixel_images(ellipses, names, params, x, y, derivatives, *, skip_points=False):
    """Without a PSF: light integrated over the pixels exactly."""
    from galmorph.rendering.pixel import sersic_pixel_flux, sersic_pixel_flux_jacobian

    tensor = torch.as_tensor(params, dtype=torch.float64)
    at = {name: i for i, name in enumerate(names)}
    px, py = (torch.as_tensor(np.array(a, dtype=float)) for a in (x, y))
    flux = tensor[:, :1]
    total = torch.zeros((len(params), px.numel()), dtype=torch.float64)
    slopes = torch.zeros((*params.shape, px.numel()), dtype=torch.float64)
    for e in ellipses:
        share = torch.ones_like(flux[:, 0])
        if e.share is not None:
            share = tensor[:, at[e.share.lstrip("-")]]
            share = 1 - share if e.share[0] == "-" else share
        if e.r is None and skip_points:
            continue
        if e.r is None:
            raise ValueError("a point source has no image without a PSF: give psf=")
        used = ["x_0", "y_0", e.r, e.n, e.ellip, e.theta]
        n = tensor[:, at[e.n]] if isinstance(e.n, str) else torch.full_like(share, e.n)
        args = [n if name == e.n else tensor[:, at[name]] for name in used]
        args[2], args[4] = args[2].clamp_min(1e-3), args[4].clamp(0.0, 0.995)
        if not derivatives:
            total += share[:, None] * sersic_pixel_flux(px, py, *args)
            continue
        image, d = sersic_pixel_flux_jacobian(px, py, *args)
        total += share[:, None] * image
        weight = share[:, None] * flux
        for i, name in enumerate(used):
            if isinstance(name, str):
                slopes[:, at[name]] += weight * d[:, i]
        if e.share is not None:
            sign = -1.0 if e.share[0] == "-" else 1.0
            slopes[:, at[e.share.lstrip("-")]] += sign * flux * image
    if not derivatives:
        return (flux * total).numpy()
    slopes[:, 0] = total
    return (flux * total).numpy(), slopes.numpy()
