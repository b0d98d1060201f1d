r"""Light that is a Sérsic profile times what it misses: S(u; n) exp(R(p)).

In the canonical frame the half-light ellipse of the Sérsic profile is the unit circle, with
the major axis along p_x.  R is a cubic B-spline on a grid that is stretched outwards; it is
zero at the centre, so that the cusp is that of the profile, and beyond `REACH`, so that the
wings are.  The profile itself goes through `galmorph.rendering.FourierRenderer`; the rest,
S (exp R - 1), is smooth and of finite extent: it is sampled on the pixels (or a finer grid)
of a box around the stamp, and takes the same waves from there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

from galmorph.rendering.fourier import Component, FourierRenderer
from galmorph.rendering.sersic import N_RANGE, sersic_table
from galmorph.rendering.transfer import Transfer

__all__ = [
    "GRID",
    "REACH",
    "Geometry",
    "LearnedRenderer",
    "canonical_light",
    "canonical_points",
    "centred",
]

#: Nodes along each side of the grid of R.
GRID = 48
#: Elliptical radius, in half-light radii of the profile, beyond which R is zero.
REACH = 6.0
# nodes within this radius, in cells from the middle of the grid, are free: a spline reaches two
# cells along each axis
_FREE = 0.5 * (GRID - 1) - 2.0 * np.sqrt(2.0)


@dataclass(frozen=True)
class Geometry:
    """Where each galaxy is and the Sérsic profile that it is a multiple of.

    Attributes
    ----------
    x_0, y_0 : tensor, shape (B,)
        Centre in stamp pixels.
    r, q, theta : tensor, shape (B,)
        Semi-major axis of the half-light ellipse of the profile in pixels, axis ratio and
        angle from +x.
    n : tensor, shape (B,)
        Sérsic index.
    """

    x_0: torch.Tensor
    y_0: torch.Tensor
    r: torch.Tensor
    q: torch.Tensor
    theta: torch.Tensor
    n: torch.Tensor

    def at(self, index: torch.Tensor) -> Geometry:
        """Of some galaxies."""
        return Geometry(*(getattr(self, f.name)[index] for f in fields(self)))

    def component(self) -> Component:
        """The profile, as the renderer takes it."""
        cos, sin = torch.cos(self.theta), torch.sin(self.theta)
        major, minor = self.r**2, (self.r * self.q) ** 2
        shape = torch.stack(
            [
                major * cos**2 + minor * sin**2,
                (major - minor) * cos * sin,
                major * sin**2 + minor * cos**2,
            ],
            -1,
        )
        return Component(shape, self.n.clamp(*N_RANGE))

    def to_canonical(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Canonical coordinates (B, M, 2) of points (M,) or (B, M) of the stamp."""
        dx, dy = x - self.x_0[:, None], y - self.y_0[:, None]
        cos, sin = torch.cos(self.theta)[:, None], torch.sin(self.theta)[:, None]
        along, across = cos * dx + sin * dy, cos * dy - sin * dx
        return torch.stack([along / self.r[:, None], across / (self.r * self.q)[:, None]], -1)

    def from_canonical(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stamp coordinates x, y (B, M) of canonical points (M, 2)."""
        along = points[..., 0] * self.r[:, None]
        across = points[..., 1] * (self.r * self.q)[:, None]
        cos, sin = torch.cos(self.theta)[:, None], torch.sin(self.theta)[:, None]
        x = self.x_0[:, None] + cos * along - sin * across
        return x, self.y_0[:, None] + sin * along + cos * across


def _stretch(u2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h and dh/du / u, of which h p is the place on the grid, in cells from its middle."""
    scale = 0.5 * (GRID - 1) / np.arcsinh(REACH)
    u = torch.sqrt(u2.clamp_min(1e-6))
    h = torch.asinh(u) / u
    slope = (torch.rsqrt(1.0 + u * u) - h) / (u * u)
    return scale * h, scale * slope


def canonical_points(
    size: int = GRID, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Points (size * size, 2) that are evenly spaced on the stretched grid, row by row in p_y.

    Examples
    --------
    >>> from galmorph.rendering.learned import canonical_points
    >>> canonical_points(3)[4]
    tensor([0., 0.])
    """
    line = torch.linspace(-1.0, 1.0, size, dtype=torch.float64) * np.arcsinh(REACH)
    wy, wx = torch.meshgrid(line, line, indexing="ij")
    w = torch.hypot(wx, wy)
    factor = torch.where(w > 1e-9, torch.sinh(w) / w.clamp_min(1e-9), 1.0)
    points = torch.stack([wx * factor, wy * factor], -1).reshape(-1, 2)
    return points.to(dtype).to(device)


@lru_cache(maxsize=8)
def _free_nodes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One for nodes that are free, zero for those that must be zero: (GRID, GRID)."""
    line = torch.arange(GRID, dtype=dtype, device=device) - 0.5 * (GRID - 1)
    return (torch.hypot(line[:, None], line) < _FREE).to(dtype)


def _middle_weights() -> torch.Tensor:
    """Weights of the middle four nodes of each axis in the value at the centre."""
    # the centre is half way between two nodes
    return torch.tensor([1.0, 23.0, 23.0, 1.0], dtype=torch.float64) / 48.0


def centred(coefficients: torch.Tensor) -> torch.Tensor:
    """Coefficients (..., GRID, GRID) of the spline that is zero at the centre and the edge.

    Parameters
    ----------
    coefficients : tensor, shape (..., GRID, GRID)
        Of any spline.

    Returns
    -------
    tensor, shape (..., GRID, GRID)
    """
    low = GRID // 2 - 2
    w = _middle_weights().to(coefficients)
    middle = coefficients[..., low : low + 4, low : low + 4]
    value = torch.einsum("...yx,y,x->...", middle, w, w)
    free = _free_nodes(coefficients.dtype, coefficients.device)
    return (coefficients - value[..., None, None]) * free


def _basis(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The four cubic B-splines at fractions ``t`` of a cell and their slopes: (..., 4)."""
    s = 1.0 - t
    t2, s2 = t * t, s * s
    value = [s2 * s, 4.0 - 6.0 * t2 + 3.0 * t2 * t, 4.0 - 6.0 * s2 + 3.0 * s2 * s, t2 * t]
    slope = [-s2, t * (3.0 * t - 4.0), s * (4.0 - 3.0 * s), t2]
    return torch.stack(value, -1) / 6.0, torch.stack(slope, -1) / 2.0


class _Spline:
    """Cubic B-splines on the stretched grid at canonical points (P, 2) of galaxies ``row`` (P,)."""

    def __init__(self, points: torch.Tensor, row: torch.Tensor) -> None:
        self.px, self.py = points.unbind(-1)
        self.h, self.dh = _stretch(self.px * self.px + self.py * self.py)
        place_x = self.h * self.px + 0.5 * (GRID - 1)
        place_y = self.h * self.py + 0.5 * (GRID - 1)
        ix = place_x.detach().floor().clamp(1, GRID - 3)
        iy = place_y.detach().floor().clamp(1, GRID - 3)
        self.wx, self.sx = _basis(place_x - ix)
        self.wy, self.sy = _basis(place_y - iy)
        first = (iy.long() - 1) * GRID + ix.long() - 1
        four = torch.arange(4, device=points.device)
        self._taps = first[:, None] + (four[:, None] * GRID + four).reshape(-1)
        self._row = (row * (GRID * GRID))[:, None]
        self._weights = (self.wy[:, :, None] * self.wx[:, None, :]).reshape(-1, 16)

    @staticmethod
    def _outer(wy: torch.Tensor, wx: torch.Tensor) -> torch.Tensor:
        return (wy[:, :, None] * wx[:, None, :]).reshape(-1, 16)

    def value(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Splines (P, K) of coefficients (B, K, GRID, GRID), or (1, K, ...) for all galaxies."""
        table = coefficients.flatten(2).transpose(1, 2).reshape(-1, coefficients.shape[1])
        index = self._taps if coefficients.shape[0] == 1 else self._taps + self._row
        return torch.nn.functional.embedding_bag(
            index, table, per_sample_weights=self._weights, mode="sum"
        )

    def each(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Values (P,) of one spline a galaxy, (B, GRID, GRID)."""
        return (coefficients.reshape(-1)[self._taps + self._row] * self._weights).sum(1)

    def one(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Value, d/dp_x and d/dp_y (P,) of one spline a galaxy, (B, GRID, GRID)."""
        taps = coefficients.reshape(-1)[self._taps + self._row]
        value = (taps * self._weights).sum(1)
        by_x = (taps * self._outer(self.wy, self.sx)).sum(1)
        by_y = (taps * self._outer(self.sy, self.wx)).sum(1)
        across = (by_x * self.px + by_y * self.py) * self.dh
        return value, by_x * self.h + across * self.px, by_y * self.h + across * self.py


class LearnedRenderer:
    """Draws Sérsic profiles times exp(R) on stamps of one shape with one transfer.

    Parameters
    ----------
    shape : tuple of int
        (ny, nx) of the stamps.
    transfer : Transfer
        From `galmorph.rendering.make_transfer`; its box should leave some pixels around the
        stamp, beyond which S (exp R - 1) is not drawn.
    oversampling : int, optional
        Samples of S (exp R - 1) a pixel.
    """

    def __init__(
        self, shape: tuple[int, int], transfer: Transfer, *, oversampling: int = 1
    ) -> None:
        self.shape, self.transfer, self.oversampling = shape, transfer, oversampling
        self.sersic = FourierRenderer(shape, transfer)
        # samples of the whole box are transformed fast; finer ones are few and go one by one
        whole = oversampling == 1 and transfer.target is None
        self._samples = _BoxSamples(shape, transfer) if whole else None

    def rows(self, index: torch.Tensor) -> LearnedRenderer:
        """The renderer of some galaxies of the batch."""
        if self.transfer.amplitude.shape[0] == 1:
            return self
        other = object.__new__(LearnedRenderer)
        other.__dict__.update(self.__dict__)
        other.transfer = self.transfer.rows(index)
        other.sersic = self.sersic.rows(index)
        return other

    def image(self, geometry: Geometry, coefficients: torch.Tensor) -> torch.Tensor:
        """Unit-flux profiles times exp(R), (B, ny, nx); differentiable.

        Parameters
        ----------
        geometry : Geometry
        coefficients : tensor, shape (B, GRID, GRID)
            Of R, from `centred`.

        Returns
        -------
        tensor, shape (B, ny, nx)
            The flux is that of the profile, 1, times the mean of exp(R) over its light.
        """
        profile = self.sersic([geometry.component()], geometry.x_0, geometry.y_0).image
        samples = self._samples_of(geometry)
        points, row, cell = samples.inside(geometry)
        light, _ = _profile(geometry, points, row)
        misses = light * torch.expm1(_Spline(points, row).each(coefficients))
        return profile + self._to_pixels(samples, misses[None], cell)[:, 0]

    def _samples_of(self, geometry: Geometry) -> _BoxSamples | _LocalSamples:
        if self._samples is not None:
            return self._samples
        return _LocalSamples(self.shape, self.transfer, self.oversampling, geometry)

    def columns(
        self, geometry: Geometry, coefficients: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        """Images and their derivatives.

        Parameters
        ----------
        geometry : Geometry
        coefficients : tensor, shape (B, GRID, GRID)
            Of R, from `centred`.
        directions : tensor, shape (B or 1, K, GRID, GRID)
            Derivatives of these coefficients by latents.

        Returns
        -------
        tensor, shape (B, 7 + K, ny, nx)
            The image, then its derivatives by x_0, y_0, ln r, ln q, theta, ln n and the
            latents.
        """
        own = self.sersic([geometry.component()], geometry.x_0, geometry.y_0, derivatives=True)
        profile = torch.einsum("brm,bcr->bcm", own.columns.flatten(2), _chain(geometry))
        profile = profile.unflatten(2, self.shape)
        samples = self._samples_of(geometry)
        points, row, cell = samples.inside(geometry)
        light, power = _profile(geometry, points, row)
        spline = _Spline(points, row)
        value, by_px, by_py = spline.one(coefficients)
        times = torch.exp(value)
        full = light * times
        misses = full - light
        px, py = points.unbind(-1)
        u2 = (px * px + py * py).clamp_min(1e-6)
        table = sersic_table(light.dtype, light.device)
        scalars, slopes = table.scalars_at(geometry.n)
        # of the galaxy of each point
        own = torch.stack(
            [
                scalars[:, 0] / geometry.n,
                slopes[:, 0],
                slopes[:, 1],
                0.5 * scalars[:, 0] / geometry.n.square(),
                geometry.n,
                geometry.q,
                torch.cos(geometry.theta) / geometry.r,
                torch.sin(geometry.theta) / geometry.r,
            ],
            1,
        )[row]
        rate, db, di, by_log, n, q, cos, sin = own.unbind(1)
        # ln S = ln I_0 - b u^(1/n); along the radius and by n
        fall = -rate * power * misses / u2
        by_px = fall * px + full * by_px
        by_py = fall * py + full * by_py
        by_n = di - power * (db - by_log * torch.log(u2))
        across = by_py / q
        maps = torch.stack(
            [
                misses,
                sin * across - cos * by_px,
                -sin * by_px - cos * across,
                -2.0 * misses - px * by_px - py * by_py,
                -misses - py * by_py,
                q * py * by_px - px * across,
                n * misses * by_n,
            ]
        )
        if directions.shape[1]:
            maps = torch.cat([maps, full * spline.value(directions).T])
        drawn = self._to_pixels(samples, maps, cell)
        drawn[:, :7] += profile
        return drawn

    def _to_pixels(
        self, samples: _BoxSamples | _LocalSamples, values: torch.Tensor, cell: torch.Tensor
    ) -> torch.Tensor:
        """Values (C, P) at samples, convolved, at the pixels of the stamps: (B, C, ny, nx)."""
        spectrum = samples.spectrum(values, cell, self.transfer)
        rows = torch.fft.ifft(spectrum, dim=-2)[..., : self.shape[0], :]
        image = torch.fft.irfft(rows, n=self.transfer.box[1], dim=-1)[..., : self.shape[1]]
        return image.transpose(0, 1)


def _as_maps(
    values: torch.Tensor, cell: torch.Tensor, batch: int, shape: tuple[int, int]
) -> torch.Tensor:
    """Values (C, P) at places of the batch as maps (C, B, ny, nx), zero elsewhere."""
    maps = values.new_zeros((values.shape[0], batch * shape[0] * shape[1]))
    return maps.index_copy(1, cell, values).unflatten(1, (batch, *shape))


def _edges(pixels: int, side: int) -> tuple[int, int]:
    """First and last pixel of the box along one axis, counted from the stamp."""
    first = -((side - pixels) // 2)
    return first, first + side - 1


class _BoxSamples:
    """One sample a pixel of the box, which goes around the stamp."""

    def __init__(self, shape: tuple[int, int], transfer: Transfer) -> None:
        self.box = transfer.box
        lines = []
        for pixels, side in zip(shape, self.box, strict=True):
            line = torch.arange(side, dtype=transfer.kx.dtype, device=transfer.kx.device)
            lines.append(torch.where(line <= _edges(pixels, side)[1], line, line - side))
        y, x = torch.meshgrid(*lines, indexing="ij")
        self._y, self._x = y.reshape(-1), x.reshape(-1)

    def inside(self, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples where R is: canonical (P, 2), galaxy (P,), place in the batch (P,)."""
        self._batch = len(geometry.x_0)
        points = geometry.to_canonical(self._x, self._y).flatten(0, 1)
        cell = torch.nonzero(points.detach().square().sum(1) < REACH * REACH)[:, 0]
        return points[cell], torch.div(cell, self._x.numel(), rounding_mode="floor"), cell

    def spectrum(
        self, values: torch.Tensor, cell: torch.Tensor, transfer: Transfer
    ) -> torch.Tensor:
        """Amplitudes of the waves, convolved, (C, B, ly, lx // 2 + 1)."""
        waves = torch.fft.rfft2(_as_maps(values, cell, self._batch, self.box))
        return waves * _plane(transfer.amplitude, self.box)


class _LocalSamples:
    """Several samples a pixel, around each galaxy as far as R goes and within the box."""

    def __init__(
        self, shape: tuple[int, int], transfer: Transfer, s: int, geometry: Geometry
    ) -> None:
        self.s = s
        cos, sin = torch.cos(geometry.theta), torch.sin(geometry.theta)
        wide = REACH * geometry.r * torch.hypot(cos, geometry.q * sin)
        high = REACH * geometry.r * torch.hypot(sin, geometry.q * cos)
        axes = zip((geometry.y_0, geometry.x_0), (high, wide), shape, transfer.box, strict=True)
        self._first, self._last, self._lines = [], [], []
        for middle, half, pixels, side in axes:
            low, top = (s * edge for edge in _edges(pixels, side))
            first = torch.ceil((middle - half).detach() * s).clamp(low, top)
            last = torch.floor((middle + half).detach() * s).clamp(low, top)
            count = int((last - first).max().clamp_min(0)) + 1
            self._first.append(first)
            self._last.append(last)
            self._lines.append(torch.arange(count, dtype=middle.dtype, device=middle.device))

    def inside(self, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `_BoxSamples`."""
        y, x = (first[:, None] + line for first, line in zip(self._first, self._lines, strict=True))
        shape = (len(y), y.shape[1], x.shape[1])
        points = geometry.to_canonical(
            (x / self.s)[:, None].expand(shape).flatten(1),
            (y / self.s)[:, :, None].expand(shape).flatten(1),
        )
        there = points.detach().square().sum(-1) < REACH * REACH
        in_box = (y <= self._last[0][:, None])[:, :, None] & (x <= self._last[1][:, None])[:, None]
        cell = torch.nonzero((there & in_box.flatten(1)).flatten())[:, 0]
        row = torch.div(cell, shape[1] * shape[2], rounding_mode="floor")
        return points.flatten(0, 1)[cell], row, cell

    def spectrum(
        self, values: torch.Tensor, cell: torch.Tensor, transfer: Transfer
    ) -> torch.Tensor:
        """Amplitudes of the waves, convolved, (C, B, ly, lx // 2 + 1)."""
        shape = tuple(line.numel() for line in self._lines)
        maps = _as_maps(values, cell, len(self._first[0]), shape)
        ly, lx = transfer.box
        whole = transfer.target is None
        if whole:
            kx, ky = transfer.kx.reshape(-1, ly)[:, 0], transfer.ky[:ly]
        else:
            (ky, iy), (kx, ix) = (k.unique(return_inverse=True) for k in (transfer.ky, transfer.kx))
        line_y, line_x = (line / self.s for line in self._lines)
        angle = line_x[:, None] * kx
        rows = maps @ torch.cat([torch.cos(angle), -torch.sin(angle)], 1)
        rows = torch.complex(*rows.chunk(2, -1))
        waves = _turn(ky[:, None] * line_y) @ rows  # (C, B, Ky, Kx)
        start_y, start_x = (first[:, None] / self.s for first in self._first)
        phases = _turn(start_y * ky)[:, :, None] * _turn(start_x * kx)[:, None] / self.s**2
        if whole:
            return waves * (phases * _plane(transfer.amplitude, transfer.box))
        waves = (waves * phases).flatten(2).index_select(2, iy * kx.numel() + ix)
        waves = waves * transfer.amplitude
        flat = waves.new_zeros((*waves.shape[:2], ly * (lx // 2 + 1)))
        return _plane(flat.index_add(2, transfer.target, waves), transfer.box)


def _plane(waves: torch.Tensor, box: tuple[int, int]) -> torch.Tensor:
    """Waves (..., m), kx outermost, as (..., ly, lx // 2 + 1)."""
    return waves.unflatten(-1, (box[1] // 2 + 1, box[0])).transpose(-1, -2)


def _turn(angle: torch.Tensor) -> torch.Tensor:
    """exp(-i angle)."""
    return torch.complex(torch.cos(angle), -torch.sin(angle))


def _profile(
    geometry: Geometry, points: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Surface brightness of the profiles and u^(1/n), at points (P, 2) of galaxies ``row`` (P,)."""
    scalars, _ = sersic_table(points.dtype, points.device).scalars_at(geometry.n)
    area = torch.log(geometry.r**2 * geometry.q)
    b, ln_i, n = torch.stack([scalars[:, 0], scalars[:, 1] - area, geometry.n], 1)[row].unbind(1)
    power = torch.exp(0.5 * torch.log(points.square().sum(-1).clamp_min(1e-6)) / n)
    return torch.exp(ln_i - b * power.clamp_max(80.0)), power


def canonical_light(
    geometry: Geometry, points: torch.Tensor, row: torch.Tensor, coefficients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Surface brightness of S exp(R), and of S alone, at points (P, 2) of galaxies ``row``."""
    light, _ = _profile(geometry, points, row)
    within = points.square().sum(1) < REACH * REACH
    value = _Spline(points, row).each(coefficients)
    return light * torch.exp(torch.where(within, value, 0.0)), light


def _chain(geometry: Geometry) -> torch.Tensor:
    """From the columns of the profile's own renderer to those of `LearnedRenderer.columns`.

    (B, 7, 7): image, x_0, y_0 stay; xx, xy, yy and n become ln r, ln q, theta and ln n.
    """
    r, q, theta = geometry.r, geometry.q, geometry.theta
    cos, sin = torch.cos(theta), torch.sin(theta)
    major, minor = r * r, (r * q) ** 2
    turn = major - minor
    chain = r.new_zeros((r.shape[0], 7, 7))
    for i in range(3):
        chain[:, i, i] = 1.0
    component = geometry.component().shape
    chain[:, 3, 3:6] = 2.0 * component
    chain[:, 4, 3:6] = 2.0 * torch.stack([minor * sin**2, -minor * cos * sin, minor * cos**2], -1)
    chain[:, 5, 3:6] = torch.stack(
        [-2.0 * turn * cos * sin, turn * (cos**2 - sin**2), 2.0 * turn * cos * sin], -1
    )
    chain[:, 6, 6] = geometry.n
    return chain
