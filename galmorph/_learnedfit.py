"""Fitting a batch of stamps with a learned galaxy, in torch.

The fit walks in the centre, ln r of the Sérsic profile, the angle and the latents; flux and
background are solved for.  It starts from a Sérsic fit, which is nested in the learned galaxy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
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
    whitening_of,
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
    learned_transfer,
    log_slopes,
    profile_of,
    sampling_for,
)

if TYPE_CHECKING:
    from galmorph.nets.learned import LearnedShape

__all__ = ["fit_learned_batch"]

_WIDE = torch.float64
# the angle of a round galaxy is not known: a width in radians that nothing else falls short of
_ANGLE_WIDTH = 1.8
# added to -2 ln of the prior so that it is a sum of squares
_PRIOR_OFFSET = 1e3
# galaxies that are worked on at once: their maps should stay in the cache
_WINDOW = 16
# steps in radii, in ln r or radians, and in latents, that leave derivatives as they are
_SMALL_STEP, _SMALL_BEND = 0.03, 0.1
# change of chi2 that ends a fit
_TOLERANCE = 0.05
# the longest steps of ln r and of a latent
_LONGEST, _LONGEST_BEND = 1.0, 2.0


class _LearnedProblem:
    """The batch as `levenberg_marquardt` sees it.

    Coordinates are x_0, y_0, ln r, theta, the latents, and the flux where it is not solved for.
    r is that of the Sérsic profile, or r_50 where something is asked of it.
    """

    def __init__(self, setup, data, weight, templates, scale, renderer) -> None:
        self.setup, self.renderer = setup, renderer
        self.data, self.weight, self.templates, self.scale = data, weight, templates, scale
        self.network: LearnedShape = setup.model.shape
        self.decoder = self.network.decoder(data.dtype, data.device)
        self.wide = self.network.decoder(_WIDE, data.device)
        self.prior = _prior_parts(self.network, data.device)
        default = setup.model.default_bounds()
        asked = set(setup.priors) | {
            name
            for name, free in zip(setup.names, setup.free, strict=True)
            if not free or setup.bounds[name] != default[name]
        }
        self.exact_size, self.walks_flux = "r_50" in asked, "flux" in asked
        self.linear_amplitude = not self.walks_flux
        self.d = self.network.latent_dim
        self.whitening = None
        # of galaxies that are worked on: columns of the latents, and where they were drawn
        self._kept: dict[int, torch.Tensor] = {}
        self._drawn_at: torch.Tensor | None = None

    def rows(self, rows: torch.Tensor, renderer: LearnedRenderer) -> _LearnedProblem:
        """The problem of some galaxies, with their renderer."""
        other = copy(self)
        other.data, other.weight = self.data[rows], self.weight[rows]
        other.scale, other.renderer = self.scale[rows], renderer
        other._kept, other._drawn_at = {}, None
        whiten = self.whitening
        other.whitening = whiten and (lambda images, some: whiten(images, rows[some]))
        return other

    def split(self, u: torch.Tensor) -> tuple[Geometry, torch.Tensor]:
        """Geometry and latents at coordinates."""
        z = u[:, 4 : 4 + self.d]
        ln_r = u[:, 2]
        if self.exact_size:
            ln_r = ln_r - torch.log(profile_of(self.wide, z)[3])
        v = torch.cat([u[:, :2], torch.exp(ln_r)[:, None], u[:, 3:4], z], 1).to(self.data.dtype)
        n, q = self.decoder.profile(v[:, 4:])
        return Geometry(v[:, 0], v[:, 1], v[:, 2], q, v[:, 3], n), v[:, 4:]

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        geometry, z = self.split(u)
        made = self.assemble(u, geometry, self._columns(u, rows, geometry, z))
        made.penalty, made.penalty_chain = self._penalties(u, rows)
        return made

    def assemble(self, u: torch.Tensor, geometry: Geometry, columns: torch.Tensor) -> Linearisation:
        """What the columns are by the coordinates, and the amplitude where it is walked."""
        end = 4 + self.d
        bending = self.decoder.bending
        chain = u.new_zeros((len(u), 6 + len(bending), u.shape[1]))
        chain[:, 0, 0] = chain[:, 1, 1] = chain[:, 2, 2] = chain[:, 4, 3] = 1.0
        chain[:, 5, 4] = self.decoder.index[1]
        chain[:, 3, 5] = self.decoder.ratio[1] * (1.0 - geometry.q)
        for i, latent in enumerate(bending):
            chain[:, 6 + i, 4 + latent] = 1.0
        made = Linearisation(columns=columns, chain=chain)
        if self.exact_size or self.walks_flux:
            by_z = log_slopes(self.wide, u[:, 4:end])
            if self.exact_size:
                chain[:, 2, 4:end] = -by_z[:, 3]
            if self.walks_flux and u.shape[1] > end:
                light = profile_of(self.wide, u[:, 4:end])[2]
                made.amplitude = u[:, end] / light
                made.amplitude_chain = torch.zeros_like(u)
                made.amplitude_chain[:, 4:end] = -made.amplitude[:, None] * by_z[:, 2]
                made.amplitude_chain[:, end] = 1.0 / light
        return made

    def _columns(
        self, u: torch.Tensor, rows: torch.Tensor, geometry: Geometry, z: torch.Tensor
    ) -> torch.Tensor:
        """Images and derivatives (b, 7 + k, npix).

        Those by the latents are most of the work and change little: they are drawn again only
        after a step that is not small.
        """
        coefficients, directions = self.decoder.linearise(z)
        keys = rows.tolist()
        self._kept = {key: self._kept[key] for key in keys if key in self._kept}
        again = self._moved(u, rows)
        columns = self.data.new_empty((len(keys), 7 + directions.shape[1], self.data.shape[1]))
        for these, wanted in ((again, directions), (~again, directions[:, :0])):
            here = torch.nonzero(these)[:, 0]
            if not here.numel():
                continue
            place = geometry.at(here)
            own = wanted if wanted.shape[0] == 1 else wanted[here]
            drawn = self.renderer.rows(rows[here]).columns(place, coefficients[here], own)
            columns[here, : drawn.shape[1]] = drawn.flatten(2)
        self._drawn_at[rows[again]] = u[again]
        for i, (key, new) in enumerate(zip(keys, again.tolist(), strict=True)):
            if new:
                self._kept[key] = columns[i, 7:].clone()
            else:
                columns[i, 7:] = self._kept[key]
        return columns

    def _moved(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """After which steps (b,) the derivatives by the latents have changed."""
        if self._drawn_at is None:
            self._drawn_at = u.new_full((len(self.data), u.shape[1]), torch.inf)
        before = self._drawn_at[rows]
        step = (u - before).abs()
        step[:, :2] *= torch.exp(-before[:, 2:3])
        small = (step[:, :4] < _SMALL_STEP).all(1)
        return ~(small & (step[:, 4 : 4 + self.d] < _SMALL_BEND).all(1))

    def _penalties(self, u: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the latents' prior, of the angle's, and of those that the user gave."""
        end = 4 + self.d
        root, slope = mixture_residuals(u[:, 4:end], *self.prior)
        chain = u.new_zeros((len(u), root.shape[1] + 1, u.shape[1]))
        chain[:, :-1, 4:end] = slope
        chain[:, -1, 3] = 1.0 / _ANGLE_WIDTH
        values, chains = [root, torch.zeros_like(root[:, :1])], [chain]
        for name, prior in self.setup.priors.items():
            column = end if name == "flux" else self.setup.names.index(name) - 1
            factor = torch.ones_like(u[:, 0])
            value = u[:, column]
            if name == "flux":
                factor = self.scale[rows]
                value = value * factor
            if name == "r_50":
                factor = value = torch.exp(value)
            residual, by_value = prior.residual(value.cpu().numpy())
            values.append(torch.as_tensor(residual).to(u)[:, None])
            one = torch.zeros_like(u)
            one[:, column] = torch.as_tensor(by_value).to(u) * factor
            chains.append(one[:, None])
        return torch.cat(values, 1), torch.cat(chains, 1)

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return u


def _prior_parts(network: LearnedShape, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, means and Cholesky factors of the prior of the latents, in double precision."""
    from galmorph.nets.priors import GaussianMixture

    prior = network.vae.prior
    if isinstance(prior, GaussianMixture):
        parts = prior.logits, prior.means, prior.scale_tril
    else:
        d = network.latent_dim
        parts = torch.zeros(1), torch.zeros(1, d), torch.eye(d)[None]
    return tuple(p.detach().to(_WIDE).to(device) for p in parts)


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


@one_thread()
@torch.no_grad()
def fit_learned_batch(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    position: np.ndarray,
    *,
    only_start: bool = False,
) -> BatchResult:
    """Fit every stamp of a batch with a learned galaxy; arguments as for `fit_batch`.

    Fits start from a Sérsic fit and, if ``setup`` has a start, from there too; ``only_start``
    leaves the first of these out.

    Returns
    -------
    BatchResult
    """
    shape = data.shape[1:]
    device, dtype = setup.device, setup.dtype
    best = inv_sigma.reshape(len(data), -1).max(1)
    scale = torch.as_tensor(1.0 / best, dtype=_WIDE, device=device)
    problem = _LearnedProblem(
        setup,
        torch.as_tensor(data * best[:, None, None], dtype=dtype, device=device).flatten(1),
        torch.as_tensor(inv_sigma / best[:, None, None], dtype=dtype, device=device).flatten(1),
        torch.as_tensor(
            background_templates(setup.background, shape), dtype=dtype, device=device
        ).flatten(1),
        scale,
        None,
    )
    problem.whitening = whitening_of(setup, problem.weight, shape)
    solve = _Solver(problem, psf, shape)
    given = None
    if setup.start is not None:
        given = _from_params(problem, torch.as_tensor(setup.start, dtype=_WIDE, device=device))
        position = setup.start[:, 1:3]
        if only_start:
            return _summarise(problem, solve(given))
    profile = {"model": SersicGalaxy2D(), "priors": {"n": INDEX_PRIOR}}
    sersic = replace(setup, **profile, start=None, tolerance=0.0)
    for name in ("x_0", "y_0"):
        sersic.bounds[name] = setup.bounds[name]
    first = fit_batch(sersic, data, inv_sigma, psf, position, covariance=False)
    nested = _nested(problem, first, given)
    result = solve(nested, nested[:, :2])
    if given is not None:  # the better of the two
        _keep_better(result, solve(given))
    return _summarise(problem, result)


class _Solver:
    """Levenberg-Marquardt on a batch of galaxies."""

    def __init__(self, problem: _LearnedProblem, psf, shape: tuple[int, int]) -> None:
        self.problem, self.shape = problem, shape
        self.psfs = [psf] if isinstance(psf, PSF) else list(psf or [])

    def __call__(
        self,
        start: torch.Tensor,
        middle: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> LeastSquaresResult:
        """Fit galaxies ``rows`` (all) from ``start``, centres not far from ``middle``."""
        setup = self.problem.setup
        rows = torch.arange(len(start), device=start.device) if rows is None else rows
        lower, upper = _bounds(self.problem, start, self.shape, middle, rows)
        start = torch.minimum(torch.maximum(start, lower), upper)
        problem = self.at(start, rows)
        return levenberg_marquardt(
            problem,
            start,
            lower=lower,
            upper=upper,
            max_iter=setup.max_iter,
            tolerance=max(_TOLERANCE, setup.tolerance),
            relative_tolerance=1e-6 if problem.data.dtype == torch.float32 else 1e-10,
            window=max(1, min(setup.window, _WINDOW)),
            longest=longest_step(problem),
            stiffen=True,
        )

    def at(self, u: torch.Tensor, rows: torch.Tensor) -> _LearnedProblem:
        """The problem of galaxies ``rows``, drawn as finely as they need at ``u``."""
        geometry, _ = self.problem.split(u)
        psf = self.psfs if len(self.psfs) < 2 else [self.psfs[i] for i in rows.tolist()]
        renderer = LearnedRenderer(
            self.shape,
            learned_transfer(
                (psf[0] if len(psf) == 1 else psf) if psf else None,
                self.shape,
                u[:, :2],
                dtype=self.problem.data.dtype,
                device=self.problem.data.device,
            ),
            oversampling=sampling_for(geometry.r, geometry.q),
        )
        return self.problem.rows(rows, renderer)

    def _parts(
        self, u: torch.Tensor, rows: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, _LearnedProblem]]:
        """Places in ``u``, and the problem of these galaxies."""
        yield torch.arange(len(u), device=u.device), self.at(u, rows)


def longest_step(problem: _LearnedProblem) -> torch.Tensor:
    """How far each coordinate (U,) may go at once: ln r and latents bend the image."""
    longest = problem.scale.new_full((4 + problem.d + problem.walks_flux,), torch.inf)
    longest[2], longest[4 : 4 + problem.d] = _LONGEST, _LONGEST_BEND
    return longest


def _keep_better(result: LeastSquaresResult, other: LeastSquaresResult) -> None:
    better = torch.nonzero(~(result.cost <= other.cost))[:, 0]
    for name, value in vars(other).items():
        getattr(result, name)[better] = value[better]


def _from_params(problem: _LearnedProblem, params: torch.Tensor) -> torch.Tensor:
    """Coordinates of parameters (B, P)."""
    ln_r = torch.log(params[:, 3].clamp_min(1e-3))
    if not problem.exact_size:
        ln_r = ln_r - torch.log(profile_of(problem.wide, params[:, 5:])[3])
    u = torch.cat([params[:, 1:3], ln_r[:, None], params[:, 4:]], 1)
    if problem.walks_flux:
        u = torch.cat([u, (params[:, 0] / problem.scale)[:, None]], 1)
    return u


def _nested(
    problem: _LearnedProblem, first: BatchResult, given: torch.Tensor | None
) -> torch.Tensor:
    """Coordinates of fitted Sérsic profiles; what is fixed is as ``given``, or the model has it."""
    decoder = problem.wide
    params = torch.as_tensor(first.params, dtype=_WIDE, device=problem.data.device)
    q = (1 - params[:, 5]).clamp(0.03, 0.97)
    z = params.new_zeros((len(params), problem.d))
    z[:, 0] = ((torch.log(params[:, 4]) - decoder.index[0]) / decoder.index[1]).clamp(-3, 3)
    z[:, 1] = ((torch.log(q / (1 - q)) - decoder.ratio[0]) / decoder.ratio[1]).clamp(-3, 3)
    u = torch.cat([params[:, 1:3], torch.log(params[:, 3:4]), params[:, 6:7], z], 1)
    if problem.walks_flux:
        u = torch.cat([u, params[:, :1] / problem.scale[:, None]], 1)
    return _held(problem, u, given)


def _held(problem: _LearnedProblem, u: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    setup, u = problem.setup, u.clone()
    for name, free in zip(setup.names, setup.free, strict=True):
        if free:
            continue
        column = u.shape[1] - 1 if name == "flux" else setup.names.index(name) - 1
        if given is not None:
            u[:, column] = given[:, column]
            continue
        own = float(np.ravel(getattr(setup.model, name).value)[0])
        if name == "flux":
            u[:, column] = own / problem.scale
        else:
            u[:, column] = np.log(max(own, 1e-3)) if name == "r_50" else own
    return u


def _bounds(problem, start, shape, middle, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the coordinates; what is fixed has no room."""
    setup = problem.setup
    lower = torch.full_like(start, -torch.inf)
    upper = -lower
    if middle is not None:
        reach = (0.3 * torch.exp(start[:, 2])).clamp_min(3.0)[:, None]
        reach = reach if setup.max_shift is None else torch.full_like(reach, setup.max_shift)
        lower[:, :2], upper[:, :2] = middle - reach, middle + reach
    lower[:, 2], upper[:, 2] = np.log(0.05), np.log(2.0 * max(shape))
    last = len(setup.names) - 1
    lower[:, 4:last], upper[:, 4:last] = -6.0, 6.0
    for name, free in zip(setup.names, setup.free, strict=True):
        column = setup.names.index(name) - 1
        if name == "flux":
            if start.shape[1] == last:
                continue
            column = last
        low, high = setup.bounds[name]
        if name == "r_50":
            low, high = (None if b is None or b <= 0 else np.log(b) for b in (low, high))
            if not problem.exact_size:  # only the default bound, which is that of the profile too
                low = high = None
        if name == "flux":
            low, high = (None if b is None else b / problem.scale[rows] for b in (low, high))
        if low is not None:
            lower[:, column] = torch.maximum(lower[:, column], torch.as_tensor(low).to(lower))
        if high is not None:
            upper[:, column] = torch.minimum(upper[:, column], torch.as_tensor(high).to(upper))
        if not free:
            lower[:, column] = upper[:, column] = start[:, column]
    return lower, upper


def to_params(
    problem: _LearnedProblem, u: torch.Tensor, amplitude: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters (B, P) in the units of the data, and their derivatives (B, P, U + solved).

    Parameters
    ----------
    problem : _LearnedProblem
    u : tensor, shape (B, U)
        Coordinates.
    amplitude, scale : tensor, shape (B,)
        Flux of the Sérsic profile where it is solved for, and the unit that it is in.
    """
    end = 4 + problem.d
    z = u[:, 4:end]
    _, _, light, radius = profile_of(problem.wide, z)
    by_z = log_slopes(problem.wide, z)
    r_50 = torch.exp(u[:, 2]) * (1.0 if problem.exact_size else radius)
    flux = u[:, end] * scale if problem.walks_flux else amplitude * scale * light
    params = torch.cat([flux[:, None], u[:, :2], r_50[:, None], u[:, 3:end]], 1)
    jacobian = u.new_zeros((len(u), params.shape[1], end + 1))
    if problem.walks_flux:
        jacobian[:, 0, end] = scale
    else:
        jacobian[:, 0, end] = scale * light
        jacobian[:, 0, 4:end] = flux[:, None] * by_z[:, 2]
    jacobian[:, 1, 0] = jacobian[:, 2, 1] = 1.0
    jacobian[:, 3, 2] = r_50
    if not problem.exact_size:
        jacobian[:, 3, 4:end] = r_50[:, None] * by_z[:, 3]
    for i in range(end - 3):
        jacobian[:, 4 + i, 3 + i] = 1.0
    params[:, 4] = full_turn(params[:, 4])
    return params, jacobian


def _summarise(problem: _LearnedProblem, result: LeastSquaresResult) -> BatchResult:
    """Parameters and covariance in the units of the data."""
    u, scale = result.u, problem.scale
    params, own = to_params(problem, u, result.linear[:, 0], scale)
    inverse, bad = _covariance(problem, result)
    split, count = params.shape[1], result.linear.shape[1] - 1
    jacobian = u.new_zeros((len(u), split + count, inverse.shape[1]))
    jacobian[:, :split, : own.shape[2]] = own
    for i in range(count):
        jacobian[:, split + i, own.shape[2] + i] = scale
    cov = jacobian @ inverse @ jacobian.transpose(1, 2)
    out = {
        "params": params,
        "cov": cov[:, :split, :split],
        "background": result.linear[:, 1:] * scale[:, None],
        "background_cov": cov[:, split:, split:],
        "cross_cov": cov[:, :split, split:],
        "chi2": result.chi2,
        "cost": result.cost,
        "n_iter": result.n_iter,
        "converged": result.converged,
        "at_bound": (result.at_bound & _free(problem, result)[: u.shape[1]]).any(1),
        "bad_covariance": bad,
    }
    return BatchResult(**{k: v.cpu().numpy() for k, v in out.items()})


def full_turn(angle: torch.Tensor) -> torch.Tensor:
    """An angle in (-pi, pi]: the shape is not the same when it is turned by half a turn."""
    return 2 * wrap_axis(angle / 2)


def _free(problem: _LearnedProblem, result: LeastSquaresResult) -> torch.Tensor:
    """Which coordinates and linear terms are free."""
    free = list(problem.setup.free[1:])
    free.append(problem.setup.free[0])  # the flux is last, walked to or solved for
    free += [True] * (result.linear.shape[1] - 1)
    return torch.as_tensor(free, device=result.u.device)


def _covariance(
    problem: _LearnedProblem, result: LeastSquaresResult
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of the curvature with what is fixed left out."""
    mask = _free(problem, result).to(result.hessian.dtype)
    hessian = result.hessian * mask[:, None] * mask + torch.diag(1.0 - mask)
    inverse, _, bad = _invert(hessian)
    return inverse * mask[:, None] * mask, bad
