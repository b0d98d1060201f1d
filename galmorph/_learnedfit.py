"""Fitting a batch of stamps with a learned galaxy, in torch.

The fit walks in the centre, ln r of the Sérsic profile, the angle and the latents; flux and
background are solved for.  It starts from a Sérsic fit, with the latents of the encoder.
"""

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
    fit_batch,
    one_thread,
)
from galmorph._posterior import _invert, wrap_axis
from galmorph.inference.least_squares import (
    LeastSquaresResult,
    Linearisation,
    levenberg_marquardt,
)
from galmorph.models.sersic import SersicGalaxy2D
from galmorph.priors import INDEX_PRIOR
from galmorph.psf import PSF
from galmorph.rendering.learned import Geometry, LearnedRenderer
from galmorph.rendering.learned_model import (
    MARGIN,
    log_slopes,
    oversampling_for,
    profile_of,
)
from galmorph.rendering.transfer import make_transfer

if TYPE_CHECKING:
    from galmorph.nets.learned import LearnedShape

__all__ = ["fit_learned_batch"]

_WIDE = torch.float64
# the angle of a round galaxy is not known: a width in radians that nothing else falls short of
_ANGLE_WIDTH = 1.8
# added to -2 ln of the prior so that it is a sum of squares
_PRIOR_OFFSET = 1e3


class _LearnedProblem:
    """The batch as `levenberg_marquardt` sees it."""

    linear_amplitude = True

    def __init__(self, network, setup, data, weight, templates, renderer, order, fixed) -> None:
        self.network = network
        self.data, self.weight, self.templates = data, weight, templates
        self.renderer, self.order = renderer, order
        self.decoder = network.decoder(data.dtype, data.device)
        self.angle = fixed[:, 3].clone()
        self.setup = setup

    def split(self, u: torch.Tensor) -> tuple[Geometry, torch.Tensor]:
        """Geometry and latents at coordinates (b, 4 + d)."""
        v = u.to(self.data.dtype)
        z = v[:, 4:]
        n, q = self.decoder.profile(z)
        return Geometry(v[:, 0], v[:, 1], torch.exp(v[:, 2]), q, v[:, 3], n), z

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        geometry, z = self.split(u)
        coefficients, directions = self.decoder.linearise(z)
        columns = self.renderer(rows).columns(geometry, coefficients, directions).flatten(2)
        size = u.shape[1]
        chain = u.new_zeros((len(u), 6 + z.shape[1], size))
        chain[:, 0, 0] = chain[:, 1, 1] = chain[:, 2, 2] = chain[:, 4, 3] = 1.0
        chain[:, 5, 4] = self.decoder.index[1]
        chain[:, 3, 5] = self.decoder.ratio[1] * (1.0 - geometry.q)
        chain[:, 6:, 4:] = torch.eye(size - 4, dtype=u.dtype, device=u.device)
        root, slope = self._prior(u[:, 4:])
        penalty_chain = u.new_zeros((len(u), root.shape[1] + 1, size))
        penalty_chain[:, :-1, 4:] = slope
        penalty_chain[:, -1, 3] = 1.0 / _ANGLE_WIDTH
        return Linearisation(
            columns=columns,
            chain=chain,
            penalty=torch.cat([root, torch.zeros_like(root[:, :1])], 1),
            penalty_chain=penalty_chain,
        )

    def _prior(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals whose squares add to -2 ln p(z) and a constant, and their slopes."""
        from galmorph.nets.priors import GaussianMixture

        prior = self.network.vae.prior
        if not isinstance(prior, GaussianMixture):
            eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
            return z, eye
        return mixture_residuals(
            z, *(b.to(z) for b in (prior.logits, prior.means, prior.scale_tril))
        )

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return u


def mixture_residuals(
    z: torch.Tensor, logits: torch.Tensor, means: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of a Gaussian mixture, (B, d + 1), and slopes (B, d + 1, d).

    Their squares add to -2 ln p(z) and a constant; the gradient is exact, and the curvature
    is the mean precision of the components that z may belong to, which is never negative.
    """
    batch, d = z.shape
    white = torch.linalg.solve_triangular(factors, (z[:, None] - means)[..., None], upper=False)[
        ..., 0
    ]  # (B, K, d)
    log_det = torch.diagonal(factors, dim1=-2, dim2=-1).log().sum(-1)
    log_each = torch.log_softmax(logits, 0) - log_det - 0.5 * white.square().sum(-1)
    member = torch.softmax(log_each, 1)
    energy = -2 * torch.logsumexp(log_each, 1)
    inverse = torch.linalg.inv(factors)
    precision = inverse.transpose(1, 2) @ inverse
    curvature = torch.einsum("bk,kij->bij", member, precision)
    pull = torch.einsum("bk,kji,bkj->bi", member, inverse, white)
    slope = torch.linalg.cholesky(curvature).transpose(1, 2)  # curvature = slope^T slope
    root = torch.linalg.solve_triangular(slope.transpose(1, 2), pull[..., None], upper=False)[
        ..., 0
    ]
    # what the quadratic form lacks, as a residual without a slope; the constant keeps it real
    rest = energy - root.square().sum(1) + _PRIOR_OFFSET
    root = torch.cat([root, rest.clamp_min(0).sqrt()[:, None]], 1)
    return root, torch.cat([slope, slope.new_zeros((batch, 1, d))], 1)


class _Renderers:
    """Renderers by the sampling that galaxies need; a batch is drawn with one."""

    def __init__(self, psfs, shape, start, dtype, device, oversampling) -> None:
        middle = start.new_tensor([0.5 * (shape[1] - 1), 0.5 * (shape[0] - 1)])
        drift = (start[:, :2] - middle).abs().amax(0).tolist()
        psf = psfs or [PSF(np.ones((1, 1)), includes_pixel=False)]
        transfer = make_transfer(
            psf[0] if len(psf) == 1 else psf,
            shape,
            drift=(drift[1], drift[0]),
            margin=0.5 * max(shape) + 2 * MARGIN - max(drift),
            dtype=dtype,
            device=device,
        )
        self.renderer = LearnedRenderer(shape, transfer, oversampling=oversampling)

    def __call__(self, rows: torch.Tensor) -> LearnedRenderer:
        return self.renderer.rows(rows)


@one_thread()
@torch.no_grad()
def fit_learned_batch(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    position: np.ndarray,
) -> BatchResult:
    """Fit every stamp of a batch with a learned galaxy; arguments as for `fit_batch`.

    Returns
    -------
    BatchResult
    """
    network: LearnedShape = setup.model.shape
    shape = data.shape[1:]
    device, dtype = setup.device, setup.dtype
    best = inv_sigma.reshape(len(data), -1).max(1)
    scale = torch.as_tensor(1.0 / best, dtype=_WIDE, device=device)
    values = torch.as_tensor(data * best[:, None, None], dtype=dtype, device=device)
    weight = torch.as_tensor(inv_sigma / best[:, None, None], dtype=dtype, device=device)
    psfs = [psf] if isinstance(psf, PSF) else list(psf or [])
    start = _start(setup, network, data, inv_sigma, psf, position, values, weight, psfs)
    lower, upper = _bounds(setup, start, shape)
    templates = torch.as_tensor(
        background_templates(setup.background, shape), dtype=dtype, device=device
    ).flatten(1)
    result = _solve(setup, network, values, weight, templates, psfs, shape, start, lower, upper)
    return _summarise(setup, network, result, scale, weight)


def _solve(setup, network, values, weight, templates, psfs, shape, start, lower, upper):
    """Galaxies that need finer sampling in batches of their own."""
    decoder = network.decoder(values.dtype, values.device)
    _, q = decoder.profile(start[:, 4:].to(values.dtype))
    need = torch.as_tensor(
        [
            oversampling_for(r[None], ratio[None])
            for r, ratio in zip(torch.exp(start[:, 2]), q.double(), strict=True)
        ]
    ).clamp_max(4)
    parts = []
    for sampling in need.unique().tolist():
        rows = torch.nonzero(need == sampling)[:, 0]
        own = psfs if len(psfs) < 2 else [psfs[i] for i in rows.tolist()]
        renderer = _Renderers(own, shape, start[rows], values.dtype, values.device, int(sampling))
        problem = _LearnedProblem(
            network,
            setup,
            values[rows].flatten(1),
            weight[rows].flatten(1),
            templates,
            renderer,
            None,
            start[rows],
        )
        found = levenberg_marquardt(
            problem,
            start[rows],
            lower=lower[rows],
            upper=upper[rows],
            max_iter=setup.max_iter,
            tolerance=1e-2,
            relative_tolerance=1e-6 if values.dtype == torch.float32 else 1e-10,
            window=max(1, min(setup.window, int(24 / sampling**2))),
        )
        parts.append((rows, found))
    if len(parts) == 1:
        return parts[0][1]
    merged = {}
    for name in vars(parts[0][1]):
        first = getattr(parts[0][1], name)
        merged[name] = first.new_empty((len(start), *first.shape[1:]))
        for rows, found in parts:
            merged[name][rows] = getattr(found, name)
    return LeastSquaresResult(**merged)


def _start(setup, network, data, inv_sigma, psf, position, values, weight, psfs) -> torch.Tensor:
    """Coordinates (B, 4 + d) from a Sérsic fit and the encoder."""
    device = setup.device
    decoder = network.decoder(_WIDE, device)
    d = network.latent_dim
    if setup.start is not None:
        params = torch.as_tensor(setup.start, dtype=_WIDE, device=device)
        _, _, _, radius = profile_of(decoder, params[:, 5:])
        return torch.cat(
            [
                params[:, 1:3],
                torch.log(params[:, 3:4].clamp_min(1e-3) / radius[:, None]),
                params[:, 4:],
            ],
            1,
        )
    sersic = replace(setup, model=SersicGalaxy2D(), priors={"n": INDEX_PRIOR}, start=None)
    first = fit_batch(sersic, data, inv_sigma, psf, position, covariance=False)
    params = torch.as_tensor(first.params, dtype=_WIDE, device=device)
    q = (1 - params[:, 5]).clamp(0.03, 0.97)
    z = params.new_zeros((len(params), d))
    z[:, 0] = (torch.log(params[:, 4]) - decoder.index[0]) / decoder.index[1]
    z[:, 1] = (torch.log(q / (1 - q)) - decoder.ratio[0]) / decoder.ratio[1]
    u = torch.cat([params[:, 1:3], torch.log(params[:, 3:4]), params[:, 6:7], z], 1)
    u = _with_encoder(network, u, params, first, values, weight, psfs, data, inv_sigma)
    at = {name: i for i, name in enumerate(setup.names)}
    for column, name in enumerate(setup.names[1:]):
        if not setup.free[at[name]]:
            own = float(np.ravel(getattr(setup.model, name).value)[0])
            u[:, column] = np.log(max(own, 1e-3)) if name == "r_50" else own
    return u


def _with_encoder(network, u, params, first, values, weight, psfs, data, inv_sigma):
    """The latents, but index and ratio, as the encoder sees them."""
    from galmorph.nets.stamp_encoder import scalars_of, see

    dtype = values.dtype
    sigma = torch.as_tensor([p.sigma for p in psfs] or [0.3], dtype=dtype, device=u.device)
    fwhm = (2.3548 * sigma).expand(len(u)).contiguous()
    n, q = params[:, 4].clamp(0.3, 7.0), (1 - params[:, 5]).clamp(0.05, 0.98)
    geometry = Geometry(
        *(v.to(dtype) for v in (params[:, 1], params[:, 2], params[:, 3], q, params[:, 6], n))
    )
    unit = torch.as_tensor(inv_sigma.reshape(len(data), -1).max(1), dtype=dtype, device=u.device)
    flux = (params[:, 0].to(dtype) * unit).clamp_min(1e-6)
    image = values
    if first.background.shape[1]:
        level = torch.as_tensor(first.background[:, 0], dtype=dtype, device=u.device) * unit
        image = values - level[:, None, None]
    mean, _, _ = network.encoder(see(image, weight, geometry, flux), scalars_of(geometry, fwhm))
    usable = torch.isfinite(mean).all(1)
    u = u.clone()
    u[usable, 6:] = mean[usable, 2:].to(u.dtype).clamp(-4, 4)
    return u


def _bounds(setup, start, shape):
    """Bounds of the coordinates, (B, 4 + d) each; what is fixed has no room."""
    lower = torch.full_like(start, -torch.inf)
    upper = -lower
    lower[:, :2] = start[:, :2] - (setup.max_shift or 3.0)
    upper[:, :2] = start[:, :2] + (setup.max_shift or 3.0)
    lower[:, 2], upper[:, 2] = np.log(0.05), np.log(2.0 * max(shape))
    lower[:, 4:], upper[:, 4:] = -6.0, 6.0
    for column, name in enumerate(setup.names[1:]):
        low, high = setup.bounds[name]
        if name == "r_50":
            low, high = (None if b is None or b <= 0 else np.log(b) for b in (low, high))
        if low is not None:
            lower[:, column] = lower[:, column].clamp_min(low)
        if high is not None:
            upper[:, column] = upper[:, column].clamp_max(high)
        if not setup.free[column + 1]:
            lower[:, column] = upper[:, column] = start[:, column]
    return lower, upper


def _summarise(setup, network, result, scale, weight) -> BatchResult:
    """Parameters and covariance in the units of the data."""
    decoder = network.decoder(_WIDE, result.u.device)
    u = result.u
    z = u[:, 4:]
    _, _, light, radius = profile_of(decoder, z)
    flux = result.linear[:, 0] * scale * light
    r_50 = torch.exp(u[:, 2]) * radius
    params = torch.cat([flux[:, None], u[:, :2], r_50[:, None], u[:, 3:]], 1)
    by_z = log_slopes(decoder, z)
    inverse, bad = _covariance(result, setup)
    size, count = u.shape[1], result.linear.shape[1]
    jacobian = u.new_zeros((len(u), params.shape[1] + count - 1, size + count))
    jacobian[:, 0, size] = scale * light
    jacobian[:, 0, 4:size] = flux[:, None] * by_z[:, 2]
    jacobian[:, 1, 0] = jacobian[:, 2, 1] = 1.0
    jacobian[:, 3, 2] = r_50
    jacobian[:, 3, 4:size] = r_50[:, None] * by_z[:, 3]
    for i in range(size - 3):
        jacobian[:, 4 + i, 3 + i] = 1.0
    for i in range(count - 1):
        jacobian[:, params.shape[1] + i, size + 1 + i] = scale
    cov = jacobian @ inverse @ jacobian.transpose(1, 2)
    params[:, 4] = wrap_axis_full(params[:, 4])
    split = params.shape[1]
    out = {
        "params": params,
        "cov": cov[:, :split, :split],
        "background": result.linear[:, 1:] * scale[:, None],
        "background_cov": cov[:, split:, split:],
        "chi2": result.chi2,
        "cost": result.cost,
        "n_iter": result.n_iter,
        "converged": result.converged,
        "at_bound": _at_bound(setup, result),
        "bad_covariance": bad,
    }
    return BatchResult(**{k: v.cpu().numpy() for k, v in out.items()})


def wrap_axis_full(angle: torch.Tensor) -> torch.Tensor:
    """An angle in [-pi, pi): the shape is not the same when it is turned by half a turn."""
    return 2 * wrap_axis(angle / 2)


def _at_bound(setup, result) -> torch.Tensor:
    free = torch.as_tensor(setup.free[1:], device=result.u.device)
    return (result.at_bound & free).any(1)


def _covariance(result, setup) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of the curvature with what is fixed left out."""
    free = torch.as_tensor(
        [*setup.free[1:], *[True] * result.linear.shape[1]], device=result.u.device
    )
    mask = free.to(result.hessian.dtype)
    hessian = result.hessian * mask[:, None] * mask + torch.diag(1.0 - mask)
    inverse, _, bad = _invert(hessian)
    return inverse * mask[:, None] * mask, bad
