"""The far wings of a profile: its repetitions outside the periodic box, on a few nodes."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from galmorph.rendering.sersic import sersic_table

if TYPE_CHECKING:
    from galmorph.rendering.fourier import Component

__all__ = ["repetitions"]

_ANGLES = 24


@lru_cache(maxsize=4)
def _ring(radius: int) -> np.ndarray:
    """Integer shifts (K, 2), (x, y), at Chebyshev distance ``radius``."""
    steps = range(-radius, radius + 1)
    return np.array([s for s in product(steps, steps) if max(map(abs, s)) == radius], float)


def _profile_constants(
    component: Component, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = component.n
    if not isinstance(n, torch.Tensor):
        n = torch.full((batch,), float(n), dtype=dtype, device=device)
    n = n.to(dtype)
    value, slope = sersic_table(dtype, device).scalars_at(n)
    return n, value, slope


def _view(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None]


def repetitions(
    component: Component,
    x_0: torch.Tensor,
    y_0: torch.Tensor,
    at_x: torch.Tensor,
    at_y: torch.Tensor,
    box: tuple[int, int],
    ring: int,
    *,
    derivatives: bool,
) -> torch.Tensor:
    """Sum of the profile over the repetitions of one ring, at nodes.

    Parameters
    ----------
    component : Component
        An elliptical profile.
    x_0, y_0 : tensor, shape (B,)
        Centres.
    at_x, at_y : tensor, shape (mx,), (my,)
        Nodes in stamp pixels.
    box : tuple of int
        (Ly, Lx), the periods.
    ring : int
        1 for the eight nearest repetitions, 2 for the sixteen next.
    derivatives : bool
        Also d/dx_0, d/dy_0, d/dxx, d/dxy, d/dyy and d/dn.

    Returns
    -------
    tensor, shape (B, 1 or 7, my, mx)
    """
    dtype, device = x_0.dtype, x_0.device
    n, value, slope = _profile_constants(component, x_0.shape[0], dtype, device)
    xx, xy, yy = component.shape.unbind(-1)
    det = (xx * yy - xy * xy).clamp_min(1e-12)
    shift = torch.as_tensor(_ring(ring), dtype=dtype, device=device)
    dx = at_x - (_view(x_0) + shift[:, 0, None, None] * box[1])
    dy = at_y[:, None] - (_view(y_0) + shift[:, 1, None, None] * box[0])
    vx = (_view(yy) * dx - _view(xy) * dy) / _view(det)
    vy = (_view(xx) * dy - _view(xy) * dx) / _view(det)
    u2 = (dx * vx + dy * vy).clamp_min(1e-6)
    log_u = 0.5 * torch.log(u2)
    b = _view(value[:, 0])
    power = torch.exp((log_u / _view(n)).clamp_max(12.0))
    light = torch.exp(_view(value[:, 1]) - b * power - 0.5 * torch.log(_view(det)))
    if not derivatives:
        return light.sum(1, keepdim=True)
    # derivative by u^2, where u is the elliptical radius in half-light radii
    by_u2 = -0.5 * b / _view(n) * power * light / u2
    total = light.sum(1)
    half = 0.5 * total / det[:, None, None]
    columns = [
        total,
        -2 * (by_u2 * vx).sum(1),
        -2 * (by_u2 * vy).sum(1),
        -(by_u2 * vx * vx).sum(1) - half * yy[:, None, None],
        -2 * (by_u2 * vx * vy).sum(1) + 2 * half * xy[:, None, None],
        -(by_u2 * vy * vy).sum(1) - half * xx[:, None, None],
        (
            light * (_view(slope[:, 1]) + power * (b * log_u / _view(n * n) - _view(slope[:, 0])))
        ).sum(1),
    ]
    return torch.stack(columns, 1)


def tail(component: Component, box: tuple[int, int], *, derivatives: bool) -> torch.Tensor:
    """Mean surface brightness that all repetitions beyond the second ring add.

    Parameters
    ----------
    component : Component
    box : tuple of int
        (Ly, Lx).
    derivatives : bool
        Also d/dx_0, d/dy_0 (zero), d/dxx, d/dxy, d/dyy and d/dn.

    Returns
    -------
    tensor, shape (B, 1 or 7)
    """
    shape = component.shape
    dtype = torch.float64
    n, value, _ = _profile_constants(component, shape.shape[0], dtype, shape.device)
    xx, xy, yy = shape.to(dtype).unbind(-1)
    det = (xx * yy - xy * xy).clamp_min(1e-12)
    psi = 2 * np.pi * (torch.arange(_ANGLES, dtype=dtype, device=shape.device) + 0.5) / _ANGLES
    cos, sin = torch.cos(psi), torch.sin(psi)
    # directions by elliptical angle, through the Cholesky factor of the shape
    lxx, ldet = torch.sqrt(xx)[:, None], torch.sqrt(det)[:, None]
    ex = lxx * cos
    ey = (xy[:, None] * cos + ldet * sin) / lxx
    reach_x, reach_y = 2.5 * box[1] / ex.abs(), 2.5 * box[0] / ey.abs()
    u = torch.minimum(reach_x, reach_y)
    b = value[:, :1]

    def outside(index: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        argument = rate[:, None] * u ** (1.0 / index[:, None])
        a = (2.0 * index)[:, None].expand_as(argument)
        return torch.special.gammaincc(a, argument).mean(1) / (box[0] * box[1])

    if torch.is_grad_enabled() and (shape.requires_grad or n.requires_grad):
        result = _TailByAutograd.apply(shape, n, component, box)[:, None]
        return result
    result = outside(n, b[:, 0])
    if not derivatives:
        return result[:, None]
    # dQ/du = -2 pi u I(u), then du by the shape of the ellipse
    light = torch.exp(value[:, 1:2] - b * u ** (1.0 / n[:, None]))
    by_u = -2 * np.pi * u * light / (box[0] * box[1] * _ANGLES)
    by_x = reach_x < reach_y
    sign_x, sign_y = torch.sign(ex), torch.sign(ey)
    du_dex = torch.where(by_x, -u / ex.abs() * sign_x, 0.0)
    du_dey = torch.where(by_x, 0.0, -u / ey.abs() * sign_y)
    dex_dxx = cos / (2 * lxx)
    dey_dxx = yy[:, None] * sin / (2 * ldet * lxx) - ey / (2 * xx[:, None])
    dey_dxy = (cos - xy[:, None] * sin / ldet) / lxx
    dey_dyy = lxx * sin / (2 * ldet)
    zero = torch.zeros_like(result)
    step = 1e-4
    table = sersic_table(dtype, shape.device)
    up, down = n + step, n - step
    by_n = outside(up, table.scalars_at(up)[0][:, 0])
    by_n = (by_n - outside(down, table.scalars_at(down)[0][:, 0])) / (2 * step)
    columns = [
        result,
        zero,
        zero,
        (by_u * (du_dex * dex_dxx + du_dey * dey_dxx)).sum(1),
        (by_u * du_dey * dey_dxy).sum(1),
        (by_u * du_dey * dey_dyy).sum(1),
        by_n,
    ]
    return torch.stack(columns, 1)


class _TailByAutograd(torch.autograd.Function):
    """The tail for autograd: the incomplete gamma function lacks a derivative in n."""

    @staticmethod
    def forward(ctx, shape, n, component, box):
        from dataclasses import replace

        index = n if isinstance(component.n, torch.Tensor) else component.n
        columns = tail(replace(component, shape=shape.detach(), n=index), box, derivatives=True)
        ctx.save_for_backward(columns)
        ctx.dtypes = shape.dtype, n.dtype
        return columns[:, 0]

    @staticmethod
    def backward(ctx, grad):
        (columns,) = ctx.saved_tensors
        by_shape, by_n = grad[:, None] * columns[:, 3:6], grad * columns[:, 6]
        return by_shape.to(ctx.dtypes[0]), by_n.to(ctx.dtypes[1]), None, None
