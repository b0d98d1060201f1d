"""What a fit leaves uncertain: second moments of the posterior about the fitted values.

In the coordinates of the fit the posterior is nearly normal (Laplace's approximation); the
parameters are curved functions of these.  Points that stand for the normal distribution
are carried over, with a weight that makes the prior uniform in axis ratio and angle.

The exception is the Sérsic index of a faint galaxy, along which the likelihood may be flat
for a factor of ten.  There the posterior is a sum over values of the index, each with a
normal approximation to all else (Rue, Martino & Chopin 2009, J. R. Statist. Soc. B 71, 319).
Its tails are long, so that the standard deviations are half the widths of the intervals
about the fitted values that hold 68.27 %; correlations are from the second moments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from galmorph._quadrature import normal_points

if TYPE_CHECKING:
    from galmorph._batchfit import Solver
    from galmorph.inference.least_squares import LeastSquaresResult

__all__ = ["posterior_covariance", "wrap_axis"]

_WIDE = torch.float64
# points that stand for a normal distribution; at each node of a sum half as many do
_POINTS = 256
# of which so many must be within the bounds
_LEAST = 8
_NOTHING = 1e-300
# width in ln n beyond which the index is summed over, and where, in such widths
_WIDE_INDEX = 0.12
_SPACING = 1.5
_NODES = tuple(_SPACING * i for i in (-1, 1, 2))
# promised decrease of chi-square at which the fit at a node ends (that step is still taken)
_TOLERANCE = 0.1


def wrap_axis(angle: torch.Tensor) -> torch.Tensor:
    """The angle of an axis, in [-pi/2, pi/2)."""
    return torch.remainder(angle + torch.pi / 2, torch.pi) - torch.pi / 2


def posterior_covariance(
    solve: Solver, result: LeastSquaresResult, params: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of parameters and background about their fitted values.

    Parameters
    ----------
    solve : Solver
        The problem, its coordinates and bounds.
    result : LeastSquaresResult
        The best fits.
    params : tensor, shape (B, P)
        Their parameters, the flux in the unit of the data.
    scale : tensor, shape (B,)
        Unit of the data in the units of the fit.

    Returns
    -------
    cov : tensor, shape (B, P + nb, P + nb)
        NaN where the curvature could not be inverted.
    bad : bool tensor, shape (B,)
        Where that is so.
    """
    setup = solve.setup
    inverse, _, bad = _invert(result.hessian)
    z = torch.tensor(normal_points(_POINTS, inverse.shape[1]), device=inverse.device)
    own = (params, scale, solve.lower, solve.upper)
    offset, weight, mass = _carry_over(solve, result, inverse, own, z)
    bad |= ((weight > 0).sum(1) < _LEAST) | (mass <= _NOTHING)
    cov = (offset * weight[..., None]).transpose(1, 2) @ offset
    index = _index_coordinate(solve)
    if index is not None:
        width = torch.nan_to_num(inverse[:, index, index]).clamp_min(0).sqrt()
        broad = (width > _WIDE_INDEX) & ~bad & result.converged
        if solve.problem.linear_amplitude:  # where there is a galaxy at all
            size = setup.coordinates.size
            broad &= result.linear[:, 0] > 3 * inverse[:, size, size].sqrt()
        rows = torch.nonzero(broad)[:, 0]
        if rows.numel():
            cov[rows] = _summed_over_index(
                solve, result, params, scale, rows, index, width.clamp_max(0.7)
            )
    cov[bad] = torch.nan
    return cov, bad


def _index_coordinate(solve: Solver) -> int | None:
    """Which coordinate is the logarithm of the only free Sérsic index, if any."""
    setup = solve.setup
    indices = {setup.names.index(e.n) for e in setup.ellipses if isinstance(e.n, str)}
    found = [
        block.coordinates[0]
        for block in setup.coordinates.blocks
        if block.kind == "log" and block.parameters[0] in indices
    ]
    return found[0] if len(found) == 1 and len(setup.ellipses) == 1 else None


def _summed_over_index(solve, result, params, scale, rows, index, width) -> torch.Tensor:
    """Moments as a sum over nodes in ln n; each node has its own best fit of all else."""
    size, count = result.u.shape[1], len(_NODES)
    best, width, response = result.u[rows], width[rows], _response(result.hessian[rows], index)
    lower, upper = solve.lower[rows], solve.upper[rows]
    # all nodes of all galaxies are one batch
    step = width * torch.tensor(_NODES, dtype=_WIDE, device=rows.device)[:, None]  # (K, b)
    at = best[:, index] + step
    inside = (at > lower[:, index]) & (at < upper[:, index])
    at = torch.minimum(torch.maximum(at, lower[:, index]), upper[:, index])
    start = best + response[:, :size] * (at - best[:, index])[..., None]
    low, high = (bound.repeat(count, 1, 1) for bound in (lower, upper))
    low[..., index] = high[..., index] = at
    found = solve.walk_copies(
        rows.repeat(count), start.flatten(0, 1), low.flatten(0, 1), high.flatten(0, 1), _TOLERANCE
    )
    names = ("u", "linear", "cost", "hessian")
    middle = SimpleNamespace(**{name: getattr(result, name)[rows] for name in names})
    nodes = [middle] + [
        SimpleNamespace(
            **{n: getattr(found, n)[k * len(rows) : (k + 1) * len(rows)] for n in names}
        )
        for k in range(count)
    ]
    own = (params[rows], scale[rows], lower, upper)
    parts = [_node(solve, node, own, index, middle.cost, width) for node in nodes]
    parts[1:] = [
        (offset, weight, torch.where(ok, log_mass, -torch.inf))
        for (offset, weight, log_mass), ok in zip(parts[1:], inside, strict=True)
    ]
    mass = torch.softmax(
        torch.nan_to_num(torch.stack([m for _, _, m in parts], 1), nan=-torch.inf), 1
    )
    offset = torch.cat([o for o, _, _ in parts], 1)
    weight = torch.cat(
        [m[:, None] * w for m, (_, w, _) in zip(mass.unbind(1), parts, strict=True)], 1
    )
    cov = (offset * weight[..., None]).transpose(1, 2) @ offset
    deviation = torch.diagonal(cov, dim1=1, dim2=2).clamp_min(1e-300).sqrt()
    ratio = _half_width(offset, weight) / deviation
    return cov * ratio[:, :, None] * ratio[:, None, :]


def _half_width(offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Half the width of the interval about zero that holds 68.27 %, (b, Q)."""
    size, order = offset.abs().sort(1)
    below = weight[..., None].expand_as(size).gather(1, order).cumsum(1)
    at = (below < 0.6827).sum(1, keepdim=True).clamp_max(size.shape[1] - 1)
    return size.gather(1, at)[:, 0]


def _response(hessian: torch.Tensor, index: int) -> torch.Tensor:
    """How everything else at the best fit moves with one coordinate, (B, K)."""
    others = [i for i in range(hessian.shape[1]) if i != index]
    part = hessian[:, others][:, :, others]
    lift = 1e-9 * torch.diagonal(part, dim1=1, dim2=2)
    part = part + torch.diag_embed(lift + 1e-30)
    solution = torch.linalg.solve_ex(part, hessian[:, others][:, :, index, None])[0][..., 0]
    full = torch.ones_like(hessian[:, 0])
    full[:, others] = -torch.nan_to_num(solution)
    return full


def _node(solve, node, own, index, best_cost, width):
    """As `_carry_over` with the index held, with the logarithm of the posterior mass there."""
    hessian = node.hessian.clone()
    hessian[:, index], hessian[:, :, index] = 0.0, 0.0
    hessian[:, index, index] = 1.0
    inverse, log_det, bad = _invert(hessian)
    inverse[:, index, index] = 0.0
    # between the nodes the rest follows as the curvature says
    z = torch.tensor(normal_points(_POINTS // 2, hessian.shape[1]), device=hessian.device)
    between = (torch.special.ndtr(z[:, index]) - 0.5) * _SPACING
    shift = width[:, None, None] * between[None, :, None]
    shift = shift * _response(node.hessian, index)[:, None]
    offset, weight, mass = _carry_over(solve, node, inverse, own, z, shift)
    log_mass = 0.5 * (best_cost - node.cost - log_det) + torch.log(mass)
    return offset, weight, torch.where(bad, -torch.inf, log_mass)


def _carry_over(solve, node, inverse, own, z, shift=0.0):
    """Carry a normal distribution in the coordinates over to parameters and background.

    ``z`` (S, K) are the points that stand for it, ``own`` are parameters, scale and bounds
    of the same galaxies.  Returns the offsets of the points from these parameters
    (b, S, P + nb), the weight of each point (b, S), of sum 1, and the mean weight by the
    prior of the ellipse (b,).
    """
    setup, problem = solve.setup, solve.problem
    params, scale, lower, upper = own
    size, solved = setup.coordinates.size, int(problem.linear_amplitude)
    delta = z @ _root(inverse).transpose(1, 2) + shift  # (b, S, K)
    u = node.u[:, None] + delta[..., :size]
    weight = ((u >= lower[:, None]) & (u <= upper[:, None])).all(2).to(_WIDE)
    u = torch.minimum(torch.maximum(u, lower[:, None]), upper[:, None])
    points = z.shape[0]
    flat = problem.project(u.flatten(0, 1), None)
    u = flat.reshape(u.shape)
    for block in setup.coordinates.blocks:
        if block.kind == "ellipse":
            eta = block.coordinates[1:]
            g = torch.hypot(u[..., eta[0]], u[..., eta[1]])
            soft = 0.1 * delta[..., eta].square().mean((1, 2)).sqrt()[:, None]
            weight = weight * torch.exp(-g) / torch.hypot(g, soft).clamp_min(1e-12)
    template = params[:, None].expand(-1, points, -1).reshape(-1, params.shape[1])
    values = setup.coordinates.to_params(flat, template)
    offset = values.reshape(len(params), points, -1) - params[:, None]
    if solved:
        flux = (node.linear[:, 0, None] + delta[..., size]) * scale[:, None]
        offset[..., 0] = flux - params[:, 0, None]
    for e in setup.ellipses:
        if e.r is not None:
            i = setup.names.index(e.theta)
            offset[..., i] = wrap_axis(offset[..., i])
    background = delta[..., size + solved :] * scale[:, None, None]
    offset = torch.cat([offset, background], 2)
    mass = weight.mean(1)
    usable = torch.isfinite(mass) & (mass > 0)
    weight = torch.where(usable[:, None], weight / mass[:, None], 1.0) / points
    return offset, weight, torch.where(usable, mass, _NOTHING)


def _root(inverse: torch.Tensor) -> torch.Tensor:
    """A square root of covariances, some of whose rows may be zero."""
    safe = torch.nan_to_num(inverse)
    diagonal = torch.diagonal(safe, dim1=1, dim2=2)
    lift = torch.where(diagonal > 0, 1e-12 * diagonal, 1e-30)
    return torch.nan_to_num(torch.linalg.cholesky_ex(safe + torch.diag_embed(lift))[0])


def _invert(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse and ln of the determinant of positive matrices, and which are not positive."""
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    scale = diagonal.clamp_min(1e-300).rsqrt()
    scaled = torch.nan_to_num(hessian * scale[:, :, None] * scale[:, None, :])
    factor, info = torch.linalg.cholesky_ex(scaled)
    bad = (info > 0) | ~torch.isfinite(hessian).all(2).all(1) | (diagonal <= 0).any(1)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    factor = torch.where(bad[:, None, None], eye, factor)
    log_det = 2 * torch.diagonal(factor, dim1=1, dim2=2).log().sum(1) - 2 * scale.log().sum(1)
    inverse = torch.cholesky_inverse(factor) * scale[:, :, None] * scale[:, None, :]
    inverse[bad] = torch.nan
    return inverse, log_det, bad
