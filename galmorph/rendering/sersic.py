"""The Sérsic profile as the renderer needs it: its Hankel transform, tabulated once.

The table is made on first use (about a tenth of a second, nothing is read from disk):
FFTLog (Hamilton 2000, MNRAS 312, 257) gives the transform on a logarithmic grid for the
Chebyshev nodes in ln n, so that one small matrix product interpolates in n with spectral
accuracy and cubic Hermite polynomials interpolate in ln(k r).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

__all__ = ["N_RANGE", "SersicTable", "sersic_table"]

#: Range of Sérsic indices that the table covers.
N_RANGE = (0.2, 10.5)
_N_CHEB = 40
_T_MIN, _T_MAX, _T_STEP = np.log(1e-4), np.log(3e3), 0.05


def _cheb_variable(n):
    lo, hi = np.log(N_RANGE[0]), np.log(N_RANGE[1])
    scale = 2.0 / (hi - lo)
    log = torch.log if isinstance(n, torch.Tensor) else np.log
    return (log(n) - lo) * scale - 1.0, scale


def _hankel(n: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Transform F(kappa) of the unit-flux Sérsic profile of unit half-light radius."""
    from scipy.fft import fht, fhtoffset
    from scipy.special import gammaln

    # the grid must be wide enough for the n = 10 wings and the n = 0.2 edge alike
    num, log_lo, log_hi = 8192, np.log(1e-11), np.log(1e11)
    dln = (log_hi - log_lo) / (num - 1)
    lnr = log_lo + dln * np.arange(num)
    x = b * np.exp(np.minimum(lnr / n, 700.0))
    ln_norm = 2 * n * np.log(b) - np.log(2 * np.pi * n) - gammaln(2 * n)
    profile = np.exp(ln_norm - np.minimum(x, 1e5) + lnr)
    offset = fhtoffset(dln, mu=0.0, bias=0.0)
    k = np.exp(offset - 0.5 * (log_lo + log_hi) + dln * (np.arange(num) - 0.5 * (num - 1)))
    return np.log(k), 2 * np.pi / k * fht(profile, dln, mu=0.0, offset=offset), dln


@dataclass(frozen=True)
class SersicTable:
    """Chebyshev coefficients (in ln n) of everything that depends on n.

    Attributes
    ----------
    coef : tensor, shape (n_cheb, n_nodes, 4)
        Coefficients of the four cubic polynomial coefficients of F in each
        interval of t = ln(kappa).
    scalars : tensor, shape (n_cheb, 2)
        The same for b_n and for ln of the central surface brightness of the
        unit-flux profile with unit half-light radius.
    """

    coef: torch.Tensor
    scalars: torch.Tensor

    def chebyshev(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chebyshev polynomials at ``n`` (B,) and their derivatives in n: (B, n_cheb) each."""
        x, scale = _cheb_variable(n.clamp(*N_RANGE))
        angle = torch.acos(x.clamp(-1.0 + 1e-6, 1.0 - 1e-6))[:, None]
        order = torch.arange(self.coef.shape[0], dtype=x.dtype, device=x.device)
        value = torch.cos(order * angle)
        slope = order * torch.sin(order * angle) / torch.sin(angle)
        return value, slope * (scale / n)[:, None]

    def scalars_at(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b_n, ln I_0) and their derivatives in n, each of shape (B, 2)."""
        t, d = self.chebyshev(n)
        return t @ self.scalars, d @ self.scalars

    def transform(
        self, kappa2: torch.Tensor, n: torch.Tensor, *, derivatives: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The transform at squared wave number ``kappa2`` (B, m) in units of 1/r_eff.

        Returns
        -------
        f, df_dlnkappa, df_dn : tensor, shape (B, m)
            The last two are None without ``derivatives``.
        """
        batch, modes = kappa2.shape
        cheb, dcheb = self.chebyshev(n)
        order, nodes, _ = self.coef.shape
        flat = self.coef.reshape(order, -1)
        rows = (cheb @ flat).reshape(batch * nodes, 4)
        if derivatives:
            rows = torch.cat([rows, (dcheb @ flat).reshape(batch * nodes, 4)], 1)
        t = (0.5 * torch.log(kappa2.clamp_min(1e-30)) - _T_MIN) * (1.0 / _T_STEP)
        t = torch.nan_to_num(t).clamp(0.0, nodes - 1e-3)
        index = t.detach().long()
        s = (t - index).reshape(-1)
        index = index + torch.arange(batch, device=index.device)[:, None] * nodes
        c = rows.index_select(0, index.reshape(-1))
        c0, c1, c2, c3 = c[:, 0], c[:, 1], c[:, 2], c[:, 3]
        f = torch.addcmul(c0, s, torch.addcmul(c1, s, torch.addcmul(c2, s, c3)))
        if not derivatives:
            return f.reshape(batch, modes), None, None
        slope = torch.addcmul(c1, s, torch.addcmul(2.0 * c2, s, 3.0 * c3)) * (1.0 / _T_STEP)
        dn = torch.addcmul(
            c[:, 4], s, torch.addcmul(c[:, 5], s, torch.addcmul(c[:, 6], s, c[:, 7]))
        )
        return f.reshape(batch, modes), slope.reshape(batch, modes), dn.reshape(batch, modes)


@lru_cache(maxsize=1)
def _table_numpy() -> tuple[np.ndarray, np.ndarray]:
    from scipy.interpolate import make_interp_spline
    from scipy.special import gammaincinv, gammaln

    lo, hi = np.log(N_RANGE[0]), np.log(N_RANGE[1])
    theta = np.pi * (np.arange(_N_CHEB) + 0.5) / _N_CHEB
    n_nodes = np.exp(lo + 0.5 * (np.cos(theta) + 1) * (hi - lo))
    edges = np.arange(_T_MIN, _T_MAX + _T_STEP, _T_STEP)
    cubic = np.empty((_N_CHEB, len(edges) - 1, 4))
    scalars = np.empty((_N_CHEB, 2))
    for i, n in enumerate(n_nodes):
        b = gammaincinv(2 * n, 0.5)
        scalars[i] = b, 2 * n * np.log(b) - np.log(2 * np.pi * n) - gammaln(2 * n)
        lnk, f, _ = _hankel(n, b)
        keep = (lnk > _T_MIN - 1) & (lnk < _T_MAX + 1)
        spline = make_interp_spline(lnk[keep], f[keep], k=5)
        value, slope = spline(edges), spline(edges, 1) * _T_STEP
        rise = np.diff(value)
        cubic[i, :, 0] = value[:-1]
        cubic[i, :, 1] = slope[:-1]
        cubic[i, :, 2] = 3 * rise - 2 * slope[:-1] - slope[1:]
        cubic[i, :, 3] = slope[:-1] + slope[1:] - 2 * rise
    basis = np.cos(np.outer(np.arange(_N_CHEB), theta)) * (2.0 / _N_CHEB)
    basis[0] *= 0.5
    return np.tensordot(basis, cubic, 1), basis @ scalars


@lru_cache(maxsize=8)
def sersic_table(
    dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
) -> SersicTable:
    """The table in one precision on one device (made once, then kept)."""
    coef, scalars = _table_numpy()
    return SersicTable(
        coef=torch.as_tensor(coef, dtype=dtype, device=device),
        scalars=torch.as_tensor(scalars, dtype=dtype, device=device),
    )
