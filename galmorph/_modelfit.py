"""Fitting one model, a model set or a compound to data at points: the astropy way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from astropy.modeling.core import CompoundModel, Model
from scipy.optimize import OptimizeResult

from galmorph import _astropy
from galmorph._batchfit import BatchSetup, one_thread
from galmorph.inference.least_squares import Linearisation, levenberg_marquardt
from galmorph.models.base import GalaxyModel

if TYPE_CHECKING:
    from galmorph.fitting import MAPFitter

__all__ = ["fit_model", "one_stamp"]

# without weights, the precision that is asked for, relative to the largest datum
_RELATIVE_NOISE = 1e-6


def fit_model(
    fitter: MAPFitter,
    model: Model,
    x: np.ndarray,
    y: np.ndarray,
    z: Any,
    weights: Any,
    maxiter: int,
) -> OptimizeResult:
    """Fit ``model`` in place.

    Parameters
    ----------
    fitter : MAPFitter
        Its priors and settings.
    model : Model
    x, y, z, weights : array
        Of one shape; for a model set ``z`` has one axis more, the first.
    maxiter : int

    Returns
    -------
    OptimizeResult

    Raises
    ------
    ValueError
        If the shapes do not agree, or there are fewer data than parameters.
    """
    z, weights = _check(model, x, y, z, weights)
    weighted = weights is not None
    usable = np.isfinite(z) if not weighted else np.isfinite(z) & np.isfinite(weights)
    if not weighted:
        peak = np.abs(z[usable]).max() if usable.any() else 0.0
        weights = np.full(z.shape, 1.0 / (_RELATIVE_NOISE * peak if peak > 0 else 1.0))
    weights = np.where(usable, np.abs(weights), 0.0)
    z = np.where(usable, z, 0.0)
    grid = _grid(x, y) if isinstance(model, GalaxyModel) and not model.has_tied else None
    if grid is None and len(model) > 1:
        raise ValueError("a model set is fitted to images on a regular grid of pixels")
    if grid is not None:
        return _fit_stamps(fitter, model, grid, z, weights, weighted, maxiter)
    info = _fit_scene(fitter, model, x, y, z, weights, weighted, maxiter)
    if info is not None:
        return info
    return _fit_points(
        fitter, model, x.ravel(), y.ravel(), z.ravel(), weights.ravel(), weighted, maxiter
    )


def _check(model, x, y, z, weights):
    z = np.ma.filled(np.ma.masked_invalid(np.ma.asarray(z, dtype=float)), np.nan)
    lead = (len(model),) if len(model) > 1 else ()
    if x.shape != y.shape:
        raise ValueError(f"x and y differ in shape: {x.shape} and {y.shape}")
    if z.shape != (*lead, *x.shape):
        raise ValueError(f"z must be of shape {(*lead, *x.shape)}, not {z.shape}")
    if weights is not None:
        weights = np.broadcast_to(np.asarray(getattr(weights, "value", weights), float), z.shape)
    free = sum(not (model.fixed[n] or model.tied[n]) for n in model.param_names)
    data = np.isfinite(z).reshape(len(model), -1).sum(1)
    if data.min() < free:
        raise ValueError(f"there are {data.min()} finite data for {free} free parameters")
    return z, weights


def _grid(
    x: np.ndarray, y: np.ndarray, *, repeated: bool = False
) -> tuple[np.ndarray, tuple[int, int], np.ndarray] | None:
    """Origin, shape and place of points that lie on a pixel grid; each once, unless repeated."""
    origin = np.array([x.min(), y.min()])
    column, row = np.rint(x - origin[0]).astype(int), np.rint(y - origin[1]).astype(int)
    if np.abs(x - origin[0] - column).max() > 1e-7 or np.abs(y - origin[1] - row).max() > 1e-7:
        return None
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    if shape[0] * shape[1] > 16 * x.size + 65536:
        return None
    at = np.ravel_multi_index((row.ravel(), column.ravel()), shape)
    if not repeated and np.unique(at).size != at.size:
        return None
    return origin, shape, at


def one_stamp(model: GalaxyModel, x: Any, y: Any, z: Any, weights: Any) -> tuple[Any, np.ndarray]:
    """Data at points as a `StampBatch` of one stamp, and the parameters (1, P) in its pixels.

    Raises
    ------
    ValueError
        If the points are not pixels of a grid.
    """
    from galmorph._stamps import StampBatch

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    z, weights = _check(model, x, y, z, weights)
    grid = _grid(x, y)
    if grid is None:
        raise ValueError("the points must be pixels of a regular grid")
    origin, shape, at = grid
    data, inv_sigma = np.zeros((2, shape[0] * shape[1]))
    usable = np.isfinite(z) & np.isfinite(weights)
    data[at] = np.where(usable, z, 0.0).ravel()
    inv_sigma[at] = np.where(usable, np.abs(weights), 0.0).ravel()
    params = np.array([[float(np.ravel(getattr(model, n).value)[0]) for n in model.param_names]])
    params[:, 1:3] -= origin
    batch = StampBatch(
        index=np.array([0]),
        data=data.reshape(1, *shape),
        inv_sigma=inv_sigma.reshape(1, *shape),
        psf=None,
        origin=origin[None],
        position=np.full((1, 2), np.nan),
        flags=np.zeros(1, dtype=np.int32),
    )
    return batch, params


def _status(converged: bool, at_bound: bool) -> tuple[int, str]:
    if not converged:
        return 0, "The limit of evaluations was reached before the fit converged."
    if at_bound:
        return 2, "Converged, with a parameter at its bound."
    return 1, "Converged: another step would not change chi-square."


def _fit_stamps(fitter, model, grid, z, weights, weighted, maxiter) -> OptimizeResult:
    origin, shape, at = grid
    count = len(model)
    data = np.zeros((count, shape[0] * shape[1]))
    inv_sigma = np.zeros_like(data)
    data[:, at] = z.reshape(count, -1)
    inv_sigma[:, at] = weights.reshape(count, -1)
    names = list(model.param_names)
    start = np.stack(
        [np.broadcast_to(np.ravel(getattr(model, n).value), count) for n in names], -1
    ).astype(float)
    start[:, 1:3] -= origin
    setup = BatchSetup(
        model=model,
        priors=fitter.priors or {},
        device=fitter.device,
        dtype=torch.float64,
        window=fitter.batch_size,
        max_iter=maxiter,
        tolerance=fitter.tolerance,
        start=start,
        origin=(float(origin[0]), float(origin[1])),
    )
    result = fitter._engine(model)(
        setup,
        data.reshape(count, *shape),
        inv_sigma.reshape(count, *shape),
        model.psf,
        np.full((count, 2), np.nan),
    )
    params = result.params.copy()
    params[:, 1:3] += origin
    model.parameters = params.T.ravel()
    free = [i for i, f in enumerate(setup.free) if f]
    dof = np.maximum((inv_sigma > 0).sum(1) - len(free), 1)
    cov = result.cov[:, free][:, :, free]
    if not weighted:
        cov = cov * (result.chi2 / dof)[:, None, None]
    fit = model(*_coordinates(grid, count), model_set_axis=False) if count > 1 else None
    if fit is None:
        fit = model.evaluate(*_coordinates(grid, count), *params[0])
    residual = (np.asarray(fit).reshape(count, -1) - data)[:, at] * inv_sigma[:, at]
    status, message = _status(bool(result.converged.all()), bool(result.at_bound.any()))
    info = OptimizeResult(
        x=params[:, free].squeeze(),
        fun=residual.reshape(z.shape),
        cost=0.5 * result.chi2.squeeze(),
        param_cov=cov[0] if count == 1 else cov,
        status=status,
        success=status > 0,
        message=message,
        nfev=int(result.n_iter.max()),
    )
    if count == 1:
        _attach(model, cov[0])
    return info


def _fit_scene(fitter, model, x, y, z, weights, weighted, maxiter) -> OptimizeResult | None:
    """Fit a sum of galaxies; None if the model or the points are others."""
    from galmorph._sumfit import each_once, fit_sum, sum_of

    total = sum_of(model)
    grid = None if total is None else _grid(x, y, repeated=True)
    if grid is None:
        return None
    origin, shape, at = grid
    flat, inv_sigma = z.ravel(), weights.ravel()
    if total.cutouts:
        flat, inv_sigma = each_once(at, flat, inv_sigma)
    size = shape[0] * shape[1]
    square = np.bincount(at, inv_sigma**2, size)
    mean = np.bincount(at, inv_sigma**2 * flat, size) / np.where(square > 0, square, 1.0)
    found = fit_sum(
        fitter, total, origin, mean.reshape(shape), np.sqrt(square).reshape(shape), maxiter
    )
    if found is None:
        return None
    model.parameters = found.params
    free = [i for i, n in enumerate(model.param_names) if not model.fixed[n]]
    residual = (_evaluate(model, x.ravel(), y.ravel(), found.params) - flat) * inv_sigma
    cost, cov = 0.5 * float(residual @ residual), found.cov[np.ix_(free, free)]
    if not weighted:
        cov = cov * 2 * cost / max(np.count_nonzero(inv_sigma) - len(free), 1)
    _attach(model, cov)
    status, message = _status(found.converged, found.at_bound)
    return OptimizeResult(
        x=found.params[free],
        fun=residual.reshape(z.shape),
        cost=cost,
        param_cov=cov,
        status=status,
        success=status > 0,
        message=message,
        nfev=found.n_iter,
    )


def _coordinates(grid, count):
    origin, shape, _ = grid
    y, x = np.mgrid[: shape[0], : shape[1]]
    return x + origin[0], y + origin[1]


def _attach(model: Model, cov: np.ndarray) -> None:
    """Give the model its covariance, as astropy's fitters do."""
    names = [n for n in model.param_names if not (model.fixed[n] or model.tied[n])]
    model.cov_matrix = _astropy.Covariance(cov, names)
    model.stds = _astropy.StandardDeviations(cov, names)


# -- any model at any points ---------------------------------------------------------------


class _PointProblem:
    """Any astropy model as `levenberg_marquardt` sees it: a batch of one."""

    def __init__(self, fitter, model, x, y, z, weights) -> None:
        self.model, self.x, self.y = model, x, y
        self.data, self.weight = (torch.as_tensor(a[None]) for a in (z, weights))
        self.templates = torch.zeros((0, z.size), dtype=torch.float64)
        self.linear_amplitude = False
        _, self.indices, _ = _astropy.model_to_fit_params(model)
        self.priors = [
            (self.indices.index(i), prior)
            for name, prior in (fitter.priors or {}).items()
            for i, own in enumerate(model.param_names)
            if i in self.indices and (own == name or own.rsplit("_", 1)[0] == name)
        ]

    def full(self, free: np.ndarray) -> np.ndarray:
        """All parameters, ties evaluated."""
        values = _astropy.fitter_to_model_params_array(
            self.model, free, False, fit_param_indices=self.indices
        )
        return np.array(values, dtype=float)

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        free = u[0].numpy().copy()
        params = self.full(free)
        image = _evaluate(self.model, self.x, self.y, params)
        by_params = np.array(_derivatives(self.model, self.x, self.y, params))
        by_free = by_params[self.indices]
        if self.model.has_tied:
            by_free = self._mapping(free).T @ by_params
        columns = torch.as_tensor(np.concatenate([image[None], by_free]))[None]
        size = len(free)
        result = Linearisation(
            columns=columns,
            chain=torch.eye(size, dtype=torch.float64)[None],
            amplitude=torch.ones(1, dtype=torch.float64),
            amplitude_chain=torch.zeros((1, size), dtype=torch.float64),
        )
        if self.priors:
            values, slopes = np.zeros(len(self.priors)), np.zeros((len(self.priors), size))
            for k, (i, prior) in enumerate(self.priors):
                value, slope = prior.residual(free[i : i + 1])
                values[k], slopes[k, i] = value[0], slope[0]
            result.penalty = torch.as_tensor(values)[None]
            result.penalty_chain = torch.as_tensor(slopes)[None]
        return result

    def _mapping(self, free: np.ndarray) -> np.ndarray:
        """Derivative of all parameters by the free ones, through the ties."""
        columns = []
        for i in range(free.size):
            step = 1e-6 * max(abs(free[i]), 1e-3)
            up, down = free.copy(), free.copy()
            up[i] += step
            down[i] -= step
            columns.append((self.full(up) - self.full(down)) / (2 * step))
        return np.stack(columns, -1)

    def project(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return u


def _evaluate(model: Model, x: np.ndarray, y: np.ndarray, params: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(model.evaluate(x, y, *params), float), x.shape)


def _derivatives(model: Model, x, y, params) -> list[np.ndarray]:
    """Derivatives by every parameter: exact where the model knows them."""
    if isinstance(model, CompoundModel) and model.op == "+":
        split = len(model.left.param_names)
        left = _derivatives(model.left, x, y, params[:split])
        return left + _derivatives(model.right, x, y, params[split:])
    if isinstance(model, GalaxyModel):
        return model.fit_deriv(x, y, *params)
    result = []
    for i, value in enumerate(params):
        step = 1e-5 * max(abs(value), 1e-3)
        up, down = params.copy(), params.copy()
        up[i] += step
        down[i] -= step
        result.append((_evaluate(model, x, y, up) - _evaluate(model, x, y, down)) / (2 * step))
    return result


def _positive_ellip(
    model: Model, indices: list[int], params: np.ndarray, cov: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where b came out larger than a, exchange the axes and turn the angle.

    photutils joins the models of a group to one that has forgotten their bounds.
    """
    names = list(model.param_names)
    for name in names:
        suffix = name.removeprefix("ellip")
        partners = [f"r_eff{suffix}", f"r{suffix}"]
        radius = next((p for p in partners if p in names), None)
        if suffix == name or radius is None or f"theta{suffix}" not in names:
            continue
        r, e, theta = (names.index(n) for n in (radius, name, f"theta{suffix}"))
        if params[e] >= 0 or not {r, e, theta} <= set(indices):
            continue
        q = 1.0 - params[e]
        slope = np.eye(len(indices))
        i, j = indices.index(r), indices.index(e)
        slope[i, i], slope[i, j], slope[j, j] = q, -params[r], -1.0 / q**2
        cov = slope @ cov @ slope.T
        params[r], params[e] = params[r] * q, 1.0 - 1.0 / q
        params[theta] = np.remainder(params[theta], np.pi) - np.pi / 2
    return params, cov


@one_thread()
@torch.no_grad()
def _fit_points(fitter, model, x, y, z, weights, weighted, maxiter) -> OptimizeResult:
    start, _, bounds = _astropy.model_to_fit_params(model)
    problem = _PointProblem(fitter, model, x, y, z, weights)
    lower, upper = (torch.as_tensor(np.asarray(b, dtype=float)[None]) for b in (bounds or ((), ())))
    found = levenberg_marquardt(
        problem,
        torch.as_tensor(np.asarray(start, dtype=float))[None],
        lower=lower,
        upper=upper,
        max_iter=maxiter,
        tolerance=max(1e-3, fitter.tolerance),
        relative_tolerance=1e-10,
    )
    free = found.u[0].numpy().copy()
    params = problem.full(free)
    for i in problem.indices:  # angles of axes in [-pi/2, pi/2), unless something hangs on them
        name = model.param_names[i]
        if name.startswith("theta") and not model.has_tied and model.bounds[name] == (None, None):
            params[i] = np.remainder(params[i] + np.pi / 2, np.pi) - np.pi / 2
    cov = np.linalg.pinv(found.hessian[0].numpy())
    if not model.has_tied:
        params, cov = _positive_ellip(model, problem.indices, params, cov)
        free = params[problem.indices]
    model.parameters = params
    if not weighted:
        cov = cov * float(found.chi2[0]) / max(int((weights > 0).sum()) - free.size, 1)
    status, message = _status(bool(found.converged[0]), bool(found.at_bound.any()))
    _attach(model, cov)
    return OptimizeResult(
        x=free,
        fun=(_evaluate(model, x, y, params) - z) * weights,
        cost=0.5 * float(found.chi2[0]),
        param_cov=cov,
        status=status,
        success=status > 0,
        message=message,
        nfev=int(found.n_iter[0]),
    )
