"""The PSF in Fourier space: which waves are drawn, and with what amplitude each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from galmorph.psf import PSF, cached_radius

__all__ = ["Transfer", "box_size", "make_transfer"]

# amplitude (relative to all) of waves beyond the pixel grid that may be left out
_ALIAS_TOLERANCE = 2e-5


def _smooth_even(size: float) -> int:
    """The next even number with no prime factor above 5, a multiple of 8 when large."""
    n = int(np.ceil(size / 2)) * 2
    while True:
        m = n
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        if m == 1 and (n < 32 or n % 8 == 0):
            return n
        n += 2


def box_size(
    n_pixels: int, psf_radius: float, drift: float, reach: float = 0.3, margin: float = 0.0
) -> int:
    """Side of the periodic box for a stamp side of ``n_pixels``.

    Parameters
    ----------
    n_pixels : int
        Pixels of the stamp along this axis.
    psf_radius : float
        Radius of the PSF in pixels.
    drift : float
        How far from the middle of the stamp the centre may be, in pixels.
    reach : float, optional
        Least distance from the far edge of the stamp to the next repetition of the centre,
        in sides of the stamp.  0.3 is exact to 1e-4 of the peak but for very elongated
        galaxies that fill the stamp; 0.9 for these too.
    margin : float, optional
        The same, in pixels (never less than 24).

    Returns
    -------
    int
        A size that the fast Fourier transform likes.  Light that leaves the box
        re-enters at the other side; what is beyond the reach of the PSF is
        subtracted analytically, so that only the PSF-smoothed core must fit.

    Examples
    --------
    >>> from galmorph.rendering.transfer import box_size
    >>> box_size(64, 12.0, 5.0)
    64
    """
    far_edge = 0.5 * (n_pixels - 1) + drift
    beyond = max(psf_radius + 3.0, reach * n_pixels, margin, 24.0)
    return _smooth_even(max(n_pixels, far_edge + beyond))


@dataclass(frozen=True)
class Transfer:
    """Amplitudes of the plane waves from which images are summed.

    Attributes
    ----------
    amplitude : complex tensor, shape (1 or B, m)
        PSF (times pixel) at each wave.
    kx, ky : tensor, shape (m,)
        Wave numbers in radians per pixel, kx outermost.
    target : tensor of int, shape (m,), or None
        Where each wave lands on the half-plane grid of the box once sampled at the
        pixels; None when the waves are that grid.
    box : tuple of int
        (Ly, Lx) of the periodic box.
    """

    amplitude: torch.Tensor
    kx: torch.Tensor
    ky: torch.Tensor
    target: torch.Tensor | None
    box: tuple[int, int]

    def rows(self, index: torch.Tensor) -> Transfer:
        """The transfer of some galaxies of the batch (itself when the PSF is shared)."""
        if self.amplitude.shape[0] == 1:
            return self
        return replace(self, amplitude=self.amplitude[index])


def _stack(psfs: Sequence[PSF]) -> tuple[np.ndarray, int, bool]:
    kinds = {(p.oversampling, p.includes_pixel) for p in psfs}
    if len(kinds) > 1:
        raise ValueError(
            "the PSFs of one batch must share their oversampling and whether they hold the pixel"
        )
    ny, nx = (max(p.shape[i] for p in psfs) for i in (0, 1))
    # one parity for all, so that padding keeps every centre on the middle of the array
    if len({(p.shape[0] % 2, p.shape[1] % 2) for p in psfs}) > 1:
        raise ValueError("the PSFs of one batch must all be odd or all be even in size")
    stack = np.zeros((len(psfs), ny, nx))
    for row, p in zip(stack, psfs, strict=True):
        dy, dx = (ny - p.shape[0]) // 2, (nx - p.shape[1]) // 2
        row[dy : dy + p.shape[0], dx : dx + p.shape[1]] = p.data
    return stack, *kinds.pop()


def make_transfer(
    psf: PSF | Sequence[PSF],
    shape: tuple[int, int],
    *,
    drift: float | tuple[float, float] = 5.0,
    reach: float = 0.3,
    margin: float = 0.0,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> Transfer:
    """Prepare one PSF, or one for each galaxy, for rendering stamps of one shape.

    Parameters
    ----------
    psf : PSF or sequence of PSF
        Shared, or one a galaxy (these may differ in size but not in sampling).
    shape : tuple of int
        (ny, nx) of the stamps.
    drift : float or tuple of float, optional
        How far from the middle of the stamp centres may be, in pixels; (y, x) or one for both.
    reach, margin : float, optional
        See `box_size`.
    dtype, device : optional
        Precision and place of the rendering.

    Returns
    -------
    Transfer

    Raises
    ------
    ValueError
        If the PSFs of one batch are sampled differently.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF
    >>> from galmorph.rendering import make_transfer
    >>> make_transfer(PSF(np.ones((3, 3))), (60, 64)).box
    (64, 64)
    """
    psfs = (psf,) if isinstance(psf, PSF) else tuple(psf)
    radius = max(cached_radius(p) for p in psfs)
    drifts = drift if isinstance(drift, tuple) else (drift, drift)
    box = tuple(box_size(n, radius, d, reach, margin) for n, d in zip(shape, drifts, strict=True))
    if len(psfs) == 1:
        return _shared_transfer(psfs[0], box, dtype, torch.device(device))
    return _transfer(psfs, box, dtype, device)


@lru_cache(maxsize=32)
def _shared_transfer(
    psf: PSF, box: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Transfer:
    """The transfer of one PSF, remembered: one image after another is drawn with it."""
    return _transfer((psf,), box, dtype, device)


def _transfer(
    psfs: tuple[PSF, ...],
    box: tuple[int, int],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Transfer:
    stack, oversampling, includes_pixel = _stack(psfs)
    # an array sampled s times a pixel holds waves up to s times the Nyquist frequency
    aliases = np.arange(-(oversampling // 2), oversampling // 2 + 1)
    axes = []
    for count, base in (
        (stack.shape[1], np.fft.fftfreq(box[0])),
        (stack.shape[2], np.fft.rfftfreq(box[1])),
    ):
        k = 2 * np.pi * (base[None, :] + aliases[:, None])
        where = (np.arange(count) - 0.5 * (count - 1)) / oversampling
        wave = np.exp(-1j * k.reshape(-1, 1) * where)
        wave[np.abs(k.ravel()) > np.pi * oversampling * (1 + 1e-9)] = 0
        if not includes_pixel:
            wave *= np.sinc(k.reshape(-1, 1) / (2 * np.pi))
        axes.append((k, wave))
    (ky, wave_y), (kx, wave_x) = axes
    # in torch, which heeds the number of threads that the caller has set
    wave_y, wave_x = torch.as_tensor(wave_y), torch.as_tensor(wave_x)
    rows = wave_x @ torch.as_tensor(stack).transpose(1, 2).to(wave_y.dtype)
    amplitude = (rows @ wave_y.T).reshape(len(psfs), -1).numpy()
    grid_x = np.broadcast_to(kx.reshape(-1, 1), (kx.size, ky.size)).ravel()
    grid_y = np.broadcast_to(ky.reshape(1, -1), (kx.size, ky.size)).ravel()
    keep, target = _landing(amplitude, len(aliases), box)
    amplitude, grid_y, grid_x = amplitude[:, keep], grid_y[keep], grid_x[keep]
    complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    return Transfer(
        amplitude=torch.as_tensor(amplitude, dtype=complex_dtype, device=device),
        kx=torch.as_tensor(grid_x, dtype=dtype, device=device),
        ky=torch.as_tensor(grid_y, dtype=dtype, device=device),
        target=None if target is None else torch.as_tensor(target, device=device),
        box=box,
    )


def _landing(
    amplitude: np.ndarray, n_aliases: int, box: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which waves to keep, and where on the half-plane grid of the box each one lands.

    Waves on the grid itself are always kept, and those beyond it, which sampling folds
    back, where they matter.  No target is needed when none does.
    """
    columns = box[1] // 2 + 1
    index_x, index_y = np.divmod(np.arange(amplitude.shape[1]), n_aliases * box[0])
    middle = n_aliases // 2
    on_grid = (index_y // box[0] == middle) & (index_x // columns == middle)
    size = np.abs(amplitude).max(0)
    keep = np.flatnonzero(on_grid | (size > _ALIAS_TOLERANCE * size.max()))
    if keep.size == on_grid.sum():
        return keep, None
    return keep, ((index_x % columns) * box[0] + index_y % box[0])[keep]
