"""Where to start: centre, size, shape and index of a galaxy from its image alone.

Sums of the light under a few Gaussian windows about the centre are compared with those of
round profiles convolved with the same PSF; second moments under the window that fits the
size give the shape.  Windows keep neighbours out, and no iteration can run away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Guess", "WindowTemplates", "first_guess"]


@dataclass
class Guess:
    """First guesses, each of shape (B,): pixels, and eta = -ln(q) (cos, sin)(2 theta).

    The flux is above the background, of which ``level`` was taken away first.
    """

    x_0: torch.Tensor
    y_0: torch.Tensor
    r: torch.Tensor
    n: torch.Tensor
    eta1: torch.Tensor
    eta2: torch.Tensor
    flux: torch.Tensor
    level: torch.Tensor


@dataclass(frozen=True)
class WindowTemplates:
    """Sums under the windows for round profiles of known radius and index.

    Attributes
    ----------
    sigma : tensor, shape (K,)
        Widths of the windows in pixels.
    sums : tensor, shape (T, K)
        For unit flux.
    r, n : tensor, shape (T,)
    psf_sigma : float
        Width of the PSF.
    """

    sigma: torch.Tensor
    sums: torch.Tensor
    r: torch.Tensor
    n: torch.Tensor
    psf_sigma: float


def window_widths(shape: tuple[int, int], psf_sigma: float) -> list[float]:
    """Widths of the windows: from the PSF's to a quarter of the stamp, in octaves."""
    largest = max(min(shape) / 4.0, psf_sigma * 1.5, 1.5)
    widths = [max(psf_sigma, 1.0)]
    while widths[-1] * 1.8 < largest:
        widths.append(widths[-1] * 1.8)
    return [*widths, largest]


def _windows(centre: torch.Tensor, size: int, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Offsets (B, size) and windows (B, K, size) along one axis."""
    offset = torch.arange(size, dtype=centre.dtype, device=centre.device) - centre[:, None]
    return offset, torch.exp(-0.5 * (offset[:, None] / sigma[:, None]) ** 2)


def _fill(data: torch.Tensor, usable: torch.Tensor, x_0, y_0) -> torch.Tensor:
    """Put the pixel opposite to the centre, or zero, where one is unusable."""
    ny, nx = data.shape[1:]
    y = torch.arange(ny, device=data.device)
    x = torch.arange(nx, device=data.device)
    my = (2 * y_0.round().long()[:, None] - y).clamp(0, ny - 1)
    mx = (2 * x_0.round().long()[:, None] - x).clamp(0, nx - 1)
    flat = (my[:, :, None] * nx + mx[:, None, :]).reshape(data.shape[0], -1)
    clean = torch.where(usable, data, 0.0)
    mirrored = clean.reshape(data.shape[0], -1).gather(1, flat).reshape(data.shape)
    return torch.where(usable, data, mirrored)


def _brightest(data, usable, psf_sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """The brightest smoothed pixel, with a preference for the middle of the stamp."""
    ny, nx = data.shape[1:]
    smooth = []
    for size in (ny, nx):
        at = torch.arange(size, dtype=data.dtype, device=data.device)
        smooth.append(torch.exp(-0.5 * ((at[:, None] - at) / max(psf_sigma, 1.0)) ** 2))
        middle = torch.exp(-0.5 * ((at - 0.5 * (size - 1)) / (0.25 * size)) ** 2)
        smooth.append(middle)
    gy, my, gx, mx = smooth
    light = gy @ torch.where(usable, data, 0.0) @ gx
    seen = gy @ usable.to(data.dtype) @ gx
    map_ = light / seen.clamp_min(0.3).sqrt() * my[:, None] * mx
    best = map_.reshape(data.shape[0], -1).argmax(1)
    return (best % nx).to(data.dtype), (best // nx).to(data.dtype)


def _recentre(data, x_0, y_0, sigma: float, limit: float):
    """Windowed centroid, iterated; it may not leave a circle of ``limit`` pixels."""
    start_x, start_y = x_0, y_0
    width = torch.tensor([sigma], dtype=data.dtype, device=data.device)
    for _ in range(6):
        dx, wx = _windows(x_0, data.shape[2], width)
        dy, wy = _windows(y_0, data.shape[1], width)
        rows = data @ torch.stack([wx[:, 0], wx[:, 0] * dx], -1)
        total = (rows[..., 0] * wy[:, 0]).sum(1)
        by_x = (rows[..., 1] * wy[:, 0]).sum(1)
        by_y = (rows[..., 0] * wy[:, 0] * dy).sum(1)
        safe = torch.where(total > 0, total, torch.inf)
        x_0 = x_0 + (2 * by_x / safe).clamp(-1.5, 1.5)
        y_0 = y_0 + (2 * by_y / safe).clamp(-1.5, 1.5)
        x_0 = torch.minimum(torch.maximum(x_0, start_x - limit), start_x + limit)
        y_0 = torch.minimum(torch.maximum(y_0, start_y - limit), start_y + limit)
    return x_0, y_0


def first_guess(
    data: torch.Tensor,
    usable: torch.Tensor,
    templates: WindowTemplates,
    *,
    position: torch.Tensor,
    limit: float,
    background: bool,
) -> Guess:
    """Guess the parameters of the galaxy in each stamp.

    Parameters
    ----------
    data : tensor, shape (B, ny, nx)
        In units of its noise, more or less.
    usable : bool tensor, shape (B, ny, nx)
    templates : WindowTemplates
    position : tensor, shape (B, 2)
        (x, y) where known; NaN where it must be found.
    limit : float
        How far the centre may be from a given position.
    background : bool
        Allow for a constant background.

    Returns
    -------
    Guess
    """
    ny, nx = data.shape[1:]
    sigma = templates.sigma
    level = torch.zeros_like(data[:, 0, 0])
    if background:
        level = _border_level(data, usable)
        data = data - level[:, None, None]
    found_x, found_y = _brightest(data, usable, templates.psf_sigma)
    known = torch.isfinite(position).all(1)
    x_0 = torch.where(known, position[:, 0], found_x).to(data.dtype)
    y_0 = torch.where(known, position[:, 1], found_y).to(data.dtype)
    filled = _fill(data, usable, x_0, y_0)
    x_0, y_0 = _recentre(filled, x_0, y_0, 1.3 * max(templates.psf_sigma, 1.0), limit)
    x_0, y_0 = x_0.clamp(-0.5, nx - 0.5), y_0.clamp(-0.5, ny - 0.5)

    dx, wx = _windows(x_0, nx, sigma)
    dy, wy = _windows(y_0, ny, sigma)

    def moment(px: int, py: int) -> torch.Tensor:
        along = wx * dx[:, None] ** px if px else wx
        across = wy * dy[:, None] ** py if py else wy
        return ((filled @ along.transpose(1, 2)) * across.transpose(1, 2)).sum(1)

    sums = moment(0, 0)
    best, flux = _best_template(sums, templates, background)
    r, n = templates.r[best], templates.n[best]
    # the window nearest to the apparent size
    apparent = torch.sqrt((0.85 * r) ** 2 + templates.psf_sigma**2)
    k = (torch.log(apparent)[:, None] - torch.log(sigma)).abs().argmin(1, keepdim=True)
    total = sums.gather(1, k)[:, 0].clamp_min(1e-6)
    mxx, myy, mxy = (moment(*p).gather(1, k)[:, 0] / total for p in ((2, 0), (0, 2), (1, 1)))
    eta1, eta2 = _shape(mxx, myy, mxy, sigma[k[:, 0]], templates.psf_sigma)
    return Guess(x_0, y_0, r, n, eta1, eta2, flux, level)


def _border_level(data: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Median of the outermost pixels."""
    ny, nx = data.shape[1:]
    depth = max(1, min(ny, nx) // 16)
    edge = torch.zeros((ny, nx), dtype=torch.bool, device=data.device)
    edge[:depth] = edge[-depth:] = True
    edge[:, :depth] = edge[:, -depth:] = True
    values = torch.where(usable, data, torch.nan)[:, edge]
    return torch.nan_to_num(torch.nanmedian(values, 1).values)


def _best_template(
    sums: torch.Tensor, templates: WindowTemplates, background: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The template that fits the sums best, by least squares in white noise, and its flux."""
    s2 = templates.sigma.double() ** 2
    overlap = s2[:, None] * s2 / (s2[:, None] + s2)
    overlap = overlap + 1e-3 * torch.diag(torch.diagonal(overlap))
    white = torch.linalg.inv(torch.linalg.cholesky(overlap)).to(sums.dtype)
    y, t = sums @ white.T, templates.sums @ white.T
    if background:
        flat = white @ (templates.sigma**2)
        flat = flat / flat.norm()
        y, t = y - (y @ flat)[:, None] * flat, t - (t @ flat)[:, None] * flat
    norm = t.norm(dim=1).clamp_min(1e-12)
    largest, best = ((y @ t.T) / norm).max(1)
    return best, largest / norm[best]


def _shape(mxx, myy, mxy, sigma, psf_sigma):
    """Eta from windowed moments, with window and PSF taken out as for Gaussians."""
    trace = (mxx + myy).clamp_min(1e-6)
    e1, e2 = (mxx - myy) / trace, 2 * mxy / trace
    open_ = (0.5 * trace / sigma**2).clamp(0.05, 0.9)  # share of the window that is used
    size = 0.5 * trace / (1 - open_)
    intrinsic = (1 - psf_sigma**2 / size).clamp(0.15, 1.0)
    gain = 1 / ((1 - open_) * intrinsic)
    e1, e2 = e1 * gain, e2 * gain
    e = torch.hypot(e1, e2).clamp_min(1e-9)
    g = torch.atanh(e.clamp_max(0.75))
    return torch.nan_to_num(g * e1 / e), torch.nan_to_num(g * e2 / e)
