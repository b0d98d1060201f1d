"""Images of galaxies from their Fourier transforms.

The transform of a Sérsic profile under an affine map is known, and so is that of the PSF;
their product, times the phase of the centre, is summed to an image by one fast Fourier
transform on a periodic box hardly larger than the stamp.  The far wings that leave the box
come back at its other side; they are smooth there, so that their sum is known from its
values at a few Chebyshev nodes, and is subtracted.  Every derivative is one more transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from galmorph.rendering.sersic import sersic_table
from galmorph.rendering.transfer import Transfer
from galmorph.rendering.wings import repetitions, tail

__all__ = ["Component", "FourierRenderer", "RawImages"]

_GAUSSIAN_RATE = 1.0 / (4.0 * np.log(2.0))


@dataclass(frozen=True)
class Component:
    """One elliptical profile, for a batch of galaxies.

    Attributes
    ----------
    shape : tensor, shape (B, 3), or None
        (xx, xy, yy) of the matrix that maps the unit circle on the half-light ellipse,
        times its transpose, in pixels squared.  None is a point source.
    n : tensor, shape (B,), float, or None
        Sérsic index.  A number is fixed and has no derivative; 0.5 is a Gaussian.
    weight : tensor, shape (B,), or None
        Its share of the light; None is 1.
    """

    shape: torch.Tensor | None
    n: torch.Tensor | float | None = None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class RawImages:
    """Unit-flux images and their derivatives.

    Attributes
    ----------
    columns : tensor, shape (B, 1 + R, ny, nx)
        The image, then its derivatives (R = 0 without): by x_0, y_0, then for each component
        by its share of the light (only when it has a ``weight``), xx, xy, yy of its shape
        and n (only when a tensor).
    """

    columns: torch.Tensor

    @property
    def image(self) -> torch.Tensor:
        """The images, (B, ny, nx)."""
        return self.columns[:, 0]

    @property
    def derivatives(self) -> torch.Tensor:
        """The derivatives, (B, R, ny, nx)."""
        return self.columns[:, 1:]


# Chebyshev nodes along each axis for the nearest repetitions, and for the next
_NODES = (12, 6)


def _chebyshev_nodes(size: int, nodes: int, like: torch.Tensor) -> torch.Tensor:
    """The Chebyshev nodes on [0, size - 1]."""
    order = torch.arange(nodes, dtype=like.dtype, device=like.device)
    return 0.5 * max(size - 1, 1) * (1.0 + torch.cos(np.pi * (order + 0.5) / nodes))


@lru_cache(maxsize=64)
def _chebyshev_matrix(
    nodes: int, to_nodes: int | None, size: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Interpolate from ``nodes`` to ``to_nodes`` Chebyshev nodes, or to ``size`` pixels."""
    theta = np.pi * (np.arange(nodes) + 0.5) / nodes
    order = np.arange(nodes)
    coefficients = np.cos(np.outer(order, theta)) * (2.0 / nodes)
    coefficients[0] *= 0.5
    if size is None:
        z = np.cos(np.pi * (np.arange(to_nodes) + 0.5) / to_nodes)
    else:
        z = np.clip(2.0 * np.arange(size) / max(size - 1, 1) - 1.0, -1, 1)
    matrix = np.cos(np.outer(np.arccos(z), order)) @ coefficients
    return torch.as_tensor(matrix, dtype=dtype, device=device)


class FourierRenderer:
    """Draws stamps of one shape with one transfer.

    Parameters
    ----------
    shape : tuple of int
        (ny, nx) of the stamps.
    transfer : Transfer
        From `make_transfer`.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from galmorph import PSF
    >>> from galmorph.rendering import Component, FourierRenderer, make_transfer
    >>> transfer = make_transfer(PSF(np.ones((1, 1))), (32, 32))
    >>> renderer = FourierRenderer((32, 32), transfer)
    >>> round_shape = torch.tensor([[9.0, 0.0, 9.0]], dtype=torch.float64)
    >>> centre = torch.tensor([15.5], dtype=torch.float64)
    >>> image = renderer([Component(round_shape, 0.5)], centre, centre).image
    >>> image.shape, round(float(image.sum()), 3)
    (torch.Size([1, 32, 32]), 1.0)
    """

    def __init__(self, shape: tuple[int, int], transfer: Transfer) -> None:
        self.shape = shape
        self.transfer = transfer
        kx, ky = transfer.kx, transfer.ky
        self._kk = torch.stack([kx * kx, 2 * kx * ky, ky * ky])

    def rows(self, index: torch.Tensor) -> FourierRenderer:
        """The renderer of some galaxies of the batch."""
        if self.transfer.amplitude.shape[0] == 1:
            return self
        return FourierRenderer(self.shape, self.transfer.rows(index))

    def __call__(
        self,
        components: list[Component],
        x_0: torch.Tensor,
        y_0: torch.Tensor,
        *,
        derivatives: bool = False,
    ) -> RawImages:
        """Draw unit-flux images.

        Parameters
        ----------
        components : list of Component
            What shares the centre.
        x_0, y_0 : tensor, shape (B,)
            Centres in stamp pixels.
        derivatives : bool, optional
            Also give the derivatives.

        Returns
        -------
        RawImages
        """
        spectra = [self._spectra(c, derivatives) for c in components]
        image = self._to_pixels(*_combine(components, spectra), x_0, y_0, derivatives)
        image = self._without_repetitions(image, components, x_0, y_0, derivatives)
        return RawImages(image)

    def _spectra(self, component: Component, derivatives: bool) -> list[torch.Tensor]:
        """Real amplitudes: of the profile, then of d/dxx, d/dxy, d/dyy and d/dn."""
        if component.shape is None:
            return [torch.ones_like(self._kk[:1])]
        kappa2 = component.shape @ self._kk
        fixed = not isinstance(component.n, torch.Tensor)
        if fixed and component.n == 0.5:
            f = torch.exp(-_GAUSSIAN_RATE * kappa2)
            slope, dn = -_GAUSSIAN_RATE * f, None
        else:
            n = torch.full_like(kappa2[:, 0], component.n) if fixed else component.n
            table = sersic_table(kappa2.dtype, kappa2.device)
            f, slope, dn = table.transform(kappa2, n, derivatives=derivatives)
            if derivatives:  # by kappa^2 instead of ln(kappa); zero at the origin
                slope = 0.5 * slope / kappa2.clamp_min(1e-12)
        if not derivatives:
            return [f]
        return [f, *(slope * kk for kk in self._kk), *([] if fixed else [dn])]

    def _to_pixels(
        self,
        total: torch.Tensor,
        columns: list[torch.Tensor],
        x_0: torch.Tensor,
        y_0: torch.Tensor,
        derivatives: bool,
    ) -> torch.Tensor:
        """Sum the waves at the pixels: (B, 1 or 3 + columns, ny, nx)."""
        transfer = self.transfer
        kx, ky = transfer.kx, transfer.ky
        ly, lx = transfer.box
        wave = self._phases(x_0, y_0) * transfer.amplitude
        turned = wave * (-1j) if derivatives else wave  # d/dx_0 brings down -i k
        amplitudes = [total]
        if derivatives:
            amplitudes += [total * kx, total * ky, *columns]
        if torch.is_grad_enabled():
            spectrum = torch.stack(
                [a * (turned if i in (1, 2) else wave) for i, a in enumerate(amplitudes)], 1
            )
        else:  # without a copy
            spectrum = wave.new_empty((wave.shape[0], len(amplitudes), wave.shape[1]))
            for i, a in enumerate(amplitudes):
                torch.mul(a, wave if i not in (1, 2) else turned, out=spectrum[:, i])
        if transfer.target is not None:
            grid = wave.new_zeros((*spectrum.shape[:2], ly * (lx // 2 + 1)))
            spectrum = grid.index_add(2, transfer.target, spectrum)
        # one axis after the other, each in order in memory: half the time of irfft2
        spectrum = spectrum.reshape(*spectrum.shape[:2], lx // 2 + 1, ly)
        rows = torch.fft.ifft(spectrum, dim=-1).transpose(-1, -2)[..., : self.shape[0], :]
        return torch.fft.irfft(rows, n=lx, dim=-1)[..., : self.shape[1]]

    def _phases(self, x_0: torch.Tensor, y_0: torch.Tensor) -> torch.Tensor:
        """exp(-i k x) of the centres for every wave, (B, m)."""
        kx, ky = self.transfer.kx, self.transfer.ky
        if self.transfer.target is not None:
            phase = x_0[:, None] * kx + y_0[:, None] * ky
            return torch.polar(torch.ones_like(phase), -phase)
        size = self.transfer.box[0]  # the waves are a grid: a product of two axes
        along = x_0[:, None] * kx[::size]
        across = y_0[:, None] * ky[:size]
        along, across = (torch.polar(torch.ones_like(p), -p) for p in (along, across))
        return (along[:, :, None] * across[:, None, :]).flatten(1)

    def _without_repetitions(
        self,
        image: torch.Tensor,
        components: list[Component],
        x_0: torch.Tensor,
        y_0: torch.Tensor,
        derivatives: bool,
    ) -> torch.Tensor:
        """Subtract what the periodic repetitions of the wings add to the stamp."""
        if all(c.shape is None for c in components):
            return image
        fine_y, fine_x = (_chebyshev_nodes(n, _NODES[0], x_0) for n in self.shape)
        coarse_y, coarse_x = (_chebyshev_nodes(n, _NODES[1], x_0) for n in self.shape)
        near = self._on_nodes(components, x_0, y_0, fine_y, fine_x, 1, derivatives)
        far = self._on_nodes(components, x_0, y_0, coarse_y, coarse_x, 2, derivatives)
        between = _chebyshev_matrix(_NODES[1], _NODES[0], None, x_0.dtype, x_0.device)
        nodes = near + between @ far @ between.T
        to_y, to_x = (
            _chebyshev_matrix(_NODES[0], None, n, x_0.dtype, x_0.device) for n in self.shape
        )
        rows = (nodes @ to_x.T).flatten(0, 1)
        result = torch.baddbmm(
            image.flatten(0, 1), to_y.expand(rows.shape[0], -1, -1), rows, alpha=-1
        )
        return result.unflatten(0, image.shape[:2])

    def _on_nodes(
        self,
        components: list[Component],
        x_0: torch.Tensor,
        y_0: torch.Tensor,
        at_y: torch.Tensor,
        at_x: torch.Tensor,
        ring: int,
        derivatives: bool,
    ) -> torch.Tensor:
        """One ring of repetitions on a grid of nodes: (B, columns, my, mx)."""
        box = self.transfer.box
        parts = []
        for component in components:
            if component.shape is None:
                parts.append([torch.zeros_like(x_0)[:, None, None]])
                continue
            values = repetitions(
                component, x_0, y_0, at_x, at_y, box, ring, derivatives=derivatives
            )
            if ring == 2:
                rest = tail(component, box, derivatives=derivatives)
                values = values + rest.to(values.dtype)[:, :, None, None]
            columns = list(values.unbind(1))
            if derivatives and not isinstance(component.n, torch.Tensor):
                columns = columns[:6]
            parts.append(columns)
        return _stack_columns(components, parts, derivatives)


def _weighted(weight: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    if weight is None:
        return values
    return weight.reshape(-1, *([1] * (values.ndim - 1))) * values


def _combine(
    components: list[Component], parts: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The light of all components, and the columns of their own parameters."""
    total, columns = None, []
    for component, (light, *own) in zip(components, parts, strict=True):
        share = _weighted(component.weight, light)
        total = share if total is None else total + share
        if component.weight is not None and own:
            columns.append(light)
        columns += [_weighted(component.weight, c) for c in own]
    return total, columns


def _stack_columns(
    components: list[Component], parts: list[list[torch.Tensor]], derivatives: bool
) -> torch.Tensor:
    """As `_combine` for parts that begin with the light and its d/dx_0 and d/dy_0."""
    if not derivatives:
        return _combine(components, parts)[0][:, None]
    centres = [
        sum(_weighted(c.weight, p[i]) for c, p in zip(components, parts, strict=True) if len(p) > 1)
        for i in (1, 2)
    ]
    total, columns = _combine(components, [[p[0], *p[3:]] for p in parts])
    return torch.stack([total, *centres, *columns], 1)
