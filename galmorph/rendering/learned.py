r"""Light that is a Sérsic profile times what it misses: S(u; n) exp(R(p)).

In the canonical frame the half-light ellipse of the Sérsic profile is the unit circle, with
the major axis along p_x.  R is a cubic B-spline on a grid that is stretched outwards; it is
zero at the centre, so that the cusp is that of the profile, and beyond `REACH`, so that the
wings are.  The profile itself goes through `galmorph.rendering.FourierRenderer`; the rest,
S (exp R - 1), is of finite extent and smooth, but at the centre: it is sampled on the pixels of
a box around the stamp, on ever finer grids further in, and takes the same waves from there.
"""

from __future__ import annotations

from copy import copy
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
#: Power of the axis ratio by which elongated galaxies are sampled finer.
ROUND = 0.75
# how far the samples of one level reach before those of the next, half as fine, take over: in
# samples along the major axis, times this power of the axis ratio
_SAMPLES = 14.0
# half-width, in samples, and shape of the filter through which finer samples become coarser ones
_TAPS, _KAISER = 12, 6.5
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
    """The four cubic B-splines at fractions ``t`` of a cell and their slopes: (4, ...)."""
    s = 1.0 - t
    t2, s2 = t * t, s * s
    value = [s2 * s, 4.0 - 6.0 * t2 + 3.0 * t2 * t, 4.0 - 6.0 * s2 + 3.0 * s2 * s, t2 * t]
    slope = [-s2, t * (3.0 * t - 4.0), s * (4.0 - 3.0 * s), t2]
    return torch.stack(value) / 6.0, torch.stack(slope) / 2.0


def _weighted(four: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum (..., P) of four (4, ..., P) with weights (4, P)."""
    total = four[0] * weights[0]
    for i in (1, 2, 3):
        total = torch.addcmul(total, four[i], weights[i])
    return total


class _Spline:
    """Cubic B-splines on the stretched grid at canonical points (P, 2) of galaxies ``row`` (P,).

    Points are the last axis inside: sums over the nodes around them are then fast.
    """

    def __init__(self, points: torch.Tensor, row: torch.Tensor) -> None:
        self.px, self.py = points.T.contiguous()
        self.h, self.dh = _stretch(self.px * self.px + self.py * self.py)
        place_x = self.h * self.px + 0.5 * (GRID - 1)
        place_y = self.h * self.py + 0.5 * (GRID - 1)
        ix = place_x.detach().floor().clamp(1, GRID - 3)
        iy = place_y.detach().floor().clamp(1, GRID - 3)
        self.wx, self.sx = _basis(place_x - ix)
        self.wy, self.sy = _basis(place_y - iy)
        self._first = (iy - 1).int() * GRID + (ix - 1).int()
        self._row = row

    def _nodes(self, galaxies: int) -> torch.Tensor:
        """The first of the nodes around each point in a table of all galaxies, (P,)."""
        if galaxies == 1:
            return self._first
        return self._first + self._row.int() * (GRID * GRID)

    def value(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Splines (P, K) of coefficients (B, K, GRID, GRID), or (1, K, ...) for all galaxies."""
        table = coefficients.flatten(2).transpose(1, 2).reshape(-1, coefficients.shape[1])
        four = torch.arange(4, dtype=torch.int32, device=self.px.device)
        weights = (self.wy[:, None] * self.wx).flatten(0, 1)
        return torch.nn.functional.embedding_bag(
            self._nodes(len(coefficients))[:, None] + (four[:, None] * GRID + four).reshape(-1),
            table,
            per_sample_weights=weights.T.contiguous(),
            mode="sum",
        )

    def _taps(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The nodes around each point (4 along x, 4 along y, P), of one spline a galaxy."""
        four = torch.arange(4, device=self.px.device)
        index = (four[:, None] + GRID * four)[:, :, None] + self._nodes(len(coefficients))
        return torch.take(coefficients, index)

    def each(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Values (P,) of one spline a galaxy, (B, GRID, GRID)."""
        return _weighted(_weighted(self._taps(coefficients), self.wx), self.wy)

    def one(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Value, d/dp_x and d/dp_y (P,) of one spline a galaxy, (B, GRID, GRID)."""
        taps = self._taps(coefficients)
        rows, sloped = _weighted(taps, self.wx), _weighted(taps, self.sx)
        value, by_x = _weighted(rows, self.wy), _weighted(sloped, self.wy)
        by_y = _weighted(rows, self.sy)
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
    oversampling : int or tensor of int, shape (B,), optional
        Samples of S (exp R - 1) a pixel at the centre, a power of two; half as many from one
        level to the next further out, where the nodes of R are wider apart, and at least one.
        See `galmorph.rendering.learned_model.sampling_for`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        transfer: Transfer,
        *,
        oversampling: int | torch.Tensor = 1,
    ) -> None:
        self.shape, self.transfer, self.oversampling = shape, transfer, oversampling
        self.sersic = FourierRenderer(shape, transfer)
        # samples of the whole box are transformed fast, if no waves are shorter than these
        self._box = _BoxSamples(shape, transfer) if transfer.target is None else None

    def rows(self, index: torch.Tensor) -> LearnedRenderer:
        """The renderer of some galaxies of the batch."""
        other = copy(self)
        if isinstance(self.oversampling, torch.Tensor):
            other.oversampling = self.oversampling[index]
        if self.transfer.amplitude.shape[0] > 1:
            other.transfer = self.transfer.rows(index)
            other.sersic = self.sersic.rows(index)
            other._box = self._box and self._box.rows(index)
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
        samples = self._samples_at(geometry)
        light, _ = _profile(geometry, samples.points, samples.row)
        spline = _Spline(samples.points, samples.row)
        misses = samples.window * light * torch.expm1(spline.each(coefficients))
        return profile + samples.convolved(misses[:, None])[:, 0]

    def _samples_at(self, geometry: Geometry) -> _Levels:
        base = self._box or _LocalSamples(self.shape, self.transfer, geometry)
        return _Levels(base, self.oversampling, geometry)

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
        samples = self._samples_at(geometry)
        points, row = samples.points, samples.row
        light, power = _profile(geometry, points, row)
        spline = _Spline(points, row)
        value, by_px, by_py = spline.one(coefficients)
        times = torch.exp(value)
        full = light * times
        misses = full - light
        edge = misses * samples.slope
        full, misses = full * samples.window, misses * samples.window
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
        # ln S = ln I_0 - b u^(1/n); along the radius, with the window, and by n
        fall = (edge - rate * power * misses) / u2
        by_px = fall * px + full * by_px
        by_py = fall * py + full * by_py
        by_n = di - power * (db - by_log * torch.log(u2))
        across = by_py / q
        maps = torch.stack(
            [
                misses,
                sin * across - cos * by_px,
                -sin * by_px - cos * across,
                edge - 2.0 * misses - px * by_px - py * by_py,
                ROUND * edge - misses - py * by_py,
                q * py * by_px - px * across,
                n * misses * by_n,
            ],
            1,
        )
        if directions.shape[1]:
            maps = torch.cat([maps, full[:, None] * spline.value(directions)], 1)
        drawn = samples.convolved(maps)
        drawn[:, :7] += profile
        return drawn


class _Levels:
    """Samples of a batch of galaxies: wide apart in the wings, close together at the centre.

    Attributes
    ----------
    points : tensor, shape (P, 2)
        Canonical coordinates.
    row : tensor of int, shape (P,)
        The galaxy of each.
    window, slope : tensor, shape (P,)
        Share of the light there that this level draws, and its derivative by ln u.
    """

    def __init__(
        self,
        base: _BoxSamples | _LocalSamples,
        finest: int | torch.Tensor,
        geometry: Geometry,
    ) -> None:
        self.base = base
        finest = torch.as_tensor(finest, device=geometry.r.device)
        count = max(1, (int(finest.max()) // base.s).bit_length())
        # level j reaches as far as reach[j - 1] half-light radii, fades from half of this, and
        # starts where the next one fades: as many samples for galaxies of any size
        circle = _SAMPLES / (geometry.r * geometry.q**ROUND)
        reach = [
            circle / (base.s << j) * (finest >= base.s << j).to(circle) for j in range(1, count)
        ]
        parts, self._finer = [], []
        for j in range(count):
            inner = 0.5 * reach[j].detach() if j + 1 < count else torch.zeros_like(circle)
            if j:
                outer = reach[j - 1].detach().clamp_max(REACH)
                grid = _Patches(base, base.s << j, outer, geometry)
                self._finer.append(grid)
            else:
                grid, outer = base, torch.full_like(circle, REACH)
            points, row, cell = grid.inside(geometry, inner, outer)
            u2 = _square(points)
            window, slope = torch.ones_like(u2), torch.zeros_like(u2)
            if j:
                window, slope = _window(u2, reach[j - 1][row])
            if j + 1 < count:
                within, by = _window(u2, reach[j][row])
                window, slope = window - within, slope - by
            parts.append((cell, points, row, window, slope))
        self._cells, *rest = zip(*parts, strict=True)
        self.points, self.row, self.window, self.slope = (torch.cat(p) for p in rest)

    def convolved(self, values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, ny, nx) of values (P, C): convolved, at the pixels of the stamps."""
        count = values.shape[1]
        # two real maps are one complex map: one transform, and half as many bytes to move
        values = torch.nn.functional.pad(values, (0, count % 2))
        own, *finer = values.split([len(cell) for cell in self._cells])
        own = torch.view_as_complex(own.unflatten(1, (-1, 2)))
        maps = self.base.maps(own, self._cells[0])
        if self._finer:
            parts = zip(self._finer, finer, self._cells[1:], strict=True)
            self._add_finer(maps, [grid.maps(*part) for grid, *part in parts])
        return self.base.convolved(maps)[:, :count]

    def _add_finer(self, maps: torch.Tensor, fine: list[torch.Tensor]) -> None:
        """Add finer maps to the samples of the first level, complex (C / 2, B, ny, nx)."""
        for b, origin in enumerate(self.base.origins()):
            ends, total = [_coarse(*own, 2) for own in self._finer[0].lines[b]], None
            for j, (grid, flat) in enumerate(zip(self._finer, fine, strict=True), 1):
                (ny, nx), at = (n for _, n in grid.lines[b]), grid.offset[b]
                lines = [_coarse(*own, 2**j) for own in grid.lines[b]]
                to_y, to_x = (
                    _to_coarser(count, first - 2**j * start, fine, 2**j, flat.dtype, flat.device)
                    for (start, count), (first, fine) in zip(lines, grid.lines[b], strict=True)
                )
                rows = to_y @ flat[at : at + ny * nx].reshape(ny, -1)
                own = to_x @ rows.view(len(to_y), nx, -1)
                if total is None:
                    total = own
                    continue
                y, x = (start - first for (start, _), (first, _) in zip(lines, ends, strict=True))
                total[y : y + own.shape[0], x : x + own.shape[1]] += own
            to, of = [], []
            for (start, count), first, there in zip(ends, origin, maps.shape[2:], strict=True):
                low, high = max(start, first), min(start + count, first + there)
                to.append(slice(low - first, max(high, low) - first))
                of.append(slice(low - start, max(high, low) - start))
            total = torch.view_as_complex(total[of[0], of[1]].unflatten(2, (-1, 2)))
            maps[:, b, to[0], to[1]] += total.permute(2, 0, 1)


class _BoxSamples:
    """One sample a pixel of the box, which goes around the stamp."""

    s = 1

    def __init__(self, shape: tuple[int, int], transfer: Transfer) -> None:
        self.shape, self.counts, self.sides = shape, transfer.box, transfer.box
        like = transfer.kx
        self.low = tuple(_edges(*sides)[0] for sides in zip(shape, self.counts, strict=True))
        lines = (
            first + torch.arange(side, dtype=like.dtype, device=like.device)
            for first, side in zip(self.low, self.counts, strict=True)
        )
        y, x = torch.meshgrid(*lines, indexing="ij")
        self._y, self._x = y.reshape(-1), x.reshape(-1)
        half = _plane(transfer.amplitude, transfer.box)
        self._amplitude = torch.fft.fft2(torch.fft.irfft2(half, s=transfer.box))

    def origins(self) -> list[tuple[int, int]]:
        """First line along y and x of each galaxy, counted from the stamp."""
        return [self.low] * self._batch

    def inside(
        self, geometry: Geometry, inner: torch.Tensor, outer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples between two radii: canonical (P, 2), galaxy (P,), place in the batch (P,)."""
        self._batch = len(geometry.x_0)
        points = geometry.to_canonical(self._x, self._y)
        u2 = _square(points.detach())
        there = (u2 >= inner.square()[:, None]) & (u2 < outer.square()[:, None])
        cell = torch.nonzero(there.flatten())[:, 0]
        row = torch.div(cell, self._x.numel(), rounding_mode="floor")
        return points.flatten(0, 1)[cell], row, cell

    def maps(self, values: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Values (P, C) at places of the batch as maps (C, B, ny, nx), zero elsewhere."""
        size = self._batch * self.counts[0] * self.counts[1]
        maps = values.new_zeros((values.shape[1], size)).index_copy(1, cell, values.T)
        return maps.unflatten(1, (self._batch, *self.counts))

    def convolved(self, maps: torch.Tensor) -> torch.Tensor:
        """Images (B, C, ny, nx) of complex maps (C / 2, B, ., .), each of which is two."""
        (ny, nx), (y, x) = self.shape, (-low for low in self.low)
        images = []
        # one galaxy after the other: its maps stay in the cache
        for own, amplitude in zip(
            maps.unbind(1), self._amplitude.expand(maps.shape[1], -1, -1), strict=True
        ):
            image = torch.fft.ifft2(torch.fft.fft2(own) * amplitude)
            image = torch.view_as_real(image[:, y : y + ny, x : x + nx])
            images.append(image.movedim(-1, 1).flatten(0, 1))
        return torch.stack(images)

    def rows(self, index: torch.Tensor) -> _BoxSamples:
        """For some galaxies of the batch."""
        other = copy(self)
        other._amplitude = self._amplitude[index]
        return other


class _LocalSamples:
    """Two samples a pixel, around each galaxy as far as R goes and within the box.

    For PSFs with waves that are shorter than two pixels, which are transformed one by one.
    """

    s = 2

    def __init__(self, shape: tuple[int, int], transfer: Transfer, geometry: Geometry) -> None:
        self.shape, self._batch = shape, len(geometry.r)
        self.low = tuple(_edges(*sides)[0] for sides in zip(shape, transfer.box, strict=True))
        self.sides, self._transfer = transfer.box, transfer
        ends = _extent(self, geometry, torch.full_like(geometry.r, REACH))
        self._first = [first for first, _ in ends]
        self._last = [last for _, last in ends]
        self.counts = tuple(int((last - first).max()) + 1 for first, last in ends)

    def origins(self) -> list[tuple[int, int]]:
        """As of `_BoxSamples`."""
        return list(zip(*(first.tolist() for first in self._first), strict=True))

    def inside(
        self, geometry: Geometry, inner: torch.Tensor, outer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `_BoxSamples`."""
        y, x = (
            first[:, None] + torch.arange(count, device=first.device)
            for first, count in zip(self._first, self.counts, strict=True)
        )
        shape = (self._batch, *self.counts)
        points = geometry.to_canonical(
            (x.to(geometry.r) / self.s)[:, None].expand(shape).flatten(1),
            (y.to(geometry.r) / self.s)[:, :, None].expand(shape).flatten(1),
        )
        u2 = _square(points.detach())
        there = (u2 >= inner.square()[:, None]) & (u2 < outer.square()[:, None])
        in_box = (y <= self._last[0][:, None])[:, :, None] & (x <= self._last[1][:, None])[:, None]
        cell = torch.nonzero((there & in_box.flatten(1)).flatten())[:, 0]
        row = torch.div(cell, shape[1] * shape[2], rounding_mode="floor")
        return points.flatten(0, 1)[cell], row, cell

    maps = _BoxSamples.maps

    def convolved(self, maps: torch.Tensor) -> torch.Tensor:
        """As of `_BoxSamples`."""
        maps = torch.view_as_real(maps).movedim(-1, 1).flatten(0, 1)
        (ny, nx), (y, x) = self.shape, (-low for low in self.low)
        rows = torch.fft.ifft(self._spectrum(maps), dim=-2)[..., y : y + ny, :]
        images = torch.fft.irfft(rows, n=self.sides[1], dim=-1)[..., x : x + nx]
        return images.transpose(0, 1)

    def _spectrum(self, maps: torch.Tensor) -> torch.Tensor:
        """Amplitudes of the waves, convolved, (C, B, ly, lx // 2 + 1), of maps (C, B, ny, nx)."""
        transfer = self._transfer
        ly, lx = transfer.box
        (ky, iy), (kx, ix) = (k.unique(return_inverse=True) for k in (transfer.ky, transfer.kx))
        line_y, line_x = (torch.arange(n, device=kx.device).to(kx) / self.s for n in self.counts)
        angle = line_x[:, None] * kx
        rows = maps @ torch.cat([torch.cos(angle), -torch.sin(angle)], 1)
        rows = torch.complex(*rows.chunk(2, -1))
        waves = _turn(ky[:, None] * line_y) @ rows  # (C, B, Ky, Kx)
        start_y, start_x = (
            first.to(kx)[:, None] / self.s - low
            for first, low in zip(self._first, self.low, strict=True)
        )
        phases = _turn(start_y * ky)[:, :, None] * _turn(start_x * kx)[:, None] / self.s**2
        waves = (waves * phases).flatten(2).index_select(2, iy * kx.numel() + ix)
        waves = waves * transfer.amplitude
        flat = waves.new_zeros((*waves.shape[:2], ly * (lx // 2 + 1)))
        return _plane(flat.index_add(2, transfer.target, waves), transfer.box)


class _Patches:
    """Samples of a finer level: around each galaxy a patch of its own size.

    Attributes
    ----------
    lines : list of pairs of (int, int)
        First line along y and x of each galaxy, counted from the stamp, and how many there are.
    offset : list of int
        Where the samples of each begin.
    """

    def __init__(
        self,
        base: _BoxSamples | _LocalSamples,
        s: int,
        reach: torch.Tensor,
        geometry: Geometry,
    ) -> None:
        self.s, self.low, self.sides = s, base.low, base.sides
        ends = _extent(self, geometry, reach)
        self._first = [first for first, _ in ends]
        self._counts = [last - first + 1 for first, last in ends]
        self._size = self._counts[0] * self._counts[1]
        self._offset = self._size.cumsum(0) - self._size
        self.offset = self._offset.tolist()
        pairs = (
            zip(first.tolist(), count.tolist(), strict=True)
            for first, count in zip(self._first, self._counts, strict=True)
        )
        self.lines = list(zip(*pairs, strict=True))

    def inside(
        self, geometry: Geometry, inner: torch.Tensor, outer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `_BoxSamples`."""
        every = torch.arange(len(self._size), device=inner.device)
        row = torch.repeat_interleave(every, self._size)
        cell = torch.arange(len(row), device=inner.device) - self._offset[row]
        wide = self._counts[1][row]
        line = torch.div(cell, wide, rounding_mode="floor")
        y = (self._first[0][row] + line).to(inner) / self.s
        x = (self._first[1][row] + cell - line * wide).to(inner) / self.s
        points = _canonical(geometry, row, x, y)
        u2 = _square(points.detach())
        cell = torch.nonzero((u2 >= inner.square()[row]) & (u2 < outer.square()[row]))[:, 0]
        return points[cell], row[cell], cell

    def maps(self, values: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Values (P, C) at their places, zero elsewhere: (samples of all galaxies, C)."""
        size = self.offset[-1] + int(self._size[-1])
        return values.new_zeros((size, values.shape[1])).index_copy(0, cell, values)


def _canonical(
    geometry: Geometry, row: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Canonical coordinates (P, 2) of points (P,) of galaxies ``row``."""
    cos, sin, r = torch.cos(geometry.theta), torch.sin(geometry.theta), geometry.r
    minor = r * geometry.q
    own = torch.stack([geometry.x_0, geometry.y_0, cos / r, sin / r, cos / minor, sin / minor], 1)
    x_0, y_0, along_x, along_y, across_y, across_x = own[row].unbind(1)
    dx, dy = x - x_0, y - y_0
    return torch.stack([along_x * dx + along_y * dy, across_y * dy - across_x * dx], -1)


def _square(points: torch.Tensor) -> torch.Tensor:
    """Squared distance (...) of points (..., 2) from the centre; faster than a sum of two."""
    x, y = points.unbind(-1)
    return x * x + y * y


def _extent(
    grid: _LocalSamples | _Patches, geometry: Geometry, reach: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """First and last line of a grid (B,) along y and x to the ellipse of some radius (B,)."""
    cos, sin = torch.cos(geometry.theta), torch.sin(geometry.theta)
    wide = reach * geometry.r * torch.hypot(cos, geometry.q * sin)
    high = reach * geometry.r * torch.hypot(sin, geometry.q * cos)
    ends = []
    for middle, half, low, side in zip(
        (geometry.y_0, geometry.x_0), (high, wide), grid.low, grid.sides, strict=True
    ):
        first, last = grid.s * low, grid.s * (low + side - 1)
        ends.append(
            tuple(
                edge(end.detach() * grid.s).clamp(first, last).long()
                for edge, end in ((torch.ceil, middle - half), (torch.floor, middle + half))
            )
        )
    return [(a, torch.maximum(a, b)) for a, b in ends]


def _edges(pixels: int, side: int) -> tuple[int, int]:
    """First and last pixel of the box along one axis, counted from the stamp."""
    first = -((side - pixels) // 2)
    return first, first + side - 1


def _window(u2: torch.Tensor, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One within half of a radius, zero beyond it, at u^2; and the derivative by ln u."""
    t = (torch.log(u2.clamp_min(1e-6) / radius.square()) / (-2.0 * np.log(2.0))).clamp(0.0, 1.0)
    value = t**3 * (10.0 - 15.0 * t + 6.0 * t * t)
    return value, (-30.0 / np.log(2.0)) * (t * (1.0 - t)).square()


@lru_cache(maxsize=32)
def _filter(finer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a fine sample adds to coarse ones, by their distance in fine samples: a cut sinc."""
    reach = _TAPS * finer
    taps = np.sinc(np.arange(-reach, reach + 1) / finer) * np.kaiser(2 * reach + 1, _KAISER)
    for phase in range(finer):  # the light is kept exactly
        taps[phase::finer] /= finer * taps[phase::finer].sum()
    return torch.as_tensor(taps, dtype=dtype, device=device)


def _coarse(first: int, count: int, finer: int) -> tuple[int, int]:
    """The first of the coarse lines that lines reach which are ``finer`` times as close."""
    low, high = -(-first // finer) - _TAPS, (first + count - 1) // finer + _TAPS
    return low, high - low + 1


@lru_cache(maxsize=1024)
def _to_coarser(
    count: int, first: int, fine: int, finer: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Matrix (count, fine) from fine lines, ``finer`` times as close, to coarse ones.

    The first fine one is ``first`` fine lines after the first coarse one.
    """
    taps = _filter(finer, dtype, device)
    before = first - finer * (count - 1) + _TAPS * finer
    after = before + finer * (count - 1) + fine - len(taps)
    taps = torch.nn.functional.pad(taps, (max(-before, 0), max(after, 0)))
    return taps[max(before, 0) :].unfold(0, fine, finer)[:count].flip(0)


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
