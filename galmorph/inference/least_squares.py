"""Batched separable nonlinear least squares: Levenberg-Marquardt with the linear part solved.

Each problem of the batch is ``data ~ a phi(u) + c . T`` with nonlinear coordinates ``u``, a
linear amplitude ``a`` and linear templates ``T`` (Golub & Pereyra 1973, SIAM J. Numer. Anal.
10, 413).  The amplitude and the templates are solved for at every step.  Problems that have
converged leave the batch and others take their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["LeastSquaresResult", "Problem", "levenberg_marquardt"]

# share of the promised gain below which the curvature is said to be too small; how far, in
# conditional standard deviations, a coordinate must go to tell; the most that is added, in terms
# of the curvature; and how much is left of it after a good step
_POOR, _TELLING, _STIFFEST, _FORGET = 0.25, 0.1, 3.0, 0.5


@dataclass
class Linearisation:
    """A model and its derivatives at a point.

    Attributes
    ----------
    columns : tensor, shape (b, R + 1, npix)
        The image for unit amplitude, then its derivatives by raw parameters.
    chain : tensor, shape (b, R, U)
        Derivative of the raw parameters by the coordinates.
    amplitude : tensor, shape (b,), or None
        The amplitude where it is not solved for.
    amplitude_chain : tensor, shape (b, U), or None
        Its derivative by the coordinates.
    penalty : tensor, shape (b, Q), or None
        Residuals of the priors, whose squares add to chi-square.
    penalty_chain : tensor, shape (b, Q, U), or None
    """

    columns: torch.Tensor
    chain: torch.Tensor
    amplitude: torch.Tensor | None = None
    amplitude_chain: torch.Tensor | None = None
    penalty: torch.Tensor | None = None
    penalty_chain: torch.Tensor | None = None


class Problem(Protocol):
    """What `levenberg_marquardt` asks of a batch of problems."""

    data: torch.Tensor  # (B, npix)
    weight: torch.Tensor  # (B, npix): 1/sigma, zero where unusable
    templates: torch.Tensor  # (nb, npix)
    #: Of weighted images (b, K, npix) of problems (b,), where noise is correlated
    whitening: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        """The models of problems ``rows`` at coordinates ``u`` (b, U)."""

    def project(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Bring coordinates back within their bounds."""


@dataclass
class LeastSquaresResult:
    """Where each problem of the batch ended.

    Attributes
    ----------
    u : tensor, shape (B, U)
    linear : tensor, shape (B, 1 + nb)
        Amplitude and coefficients of the templates.
    cost : tensor, shape (B,)
        Chi-square plus the penalties.
    chi2 : tensor, shape (B,)
    hessian : tensor, shape (B, U + L, U + L)
        Half the (Gauss-Newton) second derivative of the cost by the coordinates and what
        was solved for: the inverse is the covariance.
    converged, at_bound : bool tensor, shape (B,), (B, U)
    n_iter : int tensor, shape (B,)
    """

    u: torch.Tensor
    linear: torch.Tensor
    cost: torch.Tensor
    chi2: torch.Tensor
    hessian: torch.Tensor
    converged: torch.Tensor
    at_bound: torch.Tensor
    n_iter: torch.Tensor


def _normalised_solve(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Solve symmetric positive semi-definite systems, scaled to a unit diagonal."""
    scale = torch.diagonal(matrix, dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    scaled = torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(scaled + 1e-12 * eye)
    bad = info > 0
    if bad.any():  # not positive definite to rounding: lift the diagonal
        factor[bad] = torch.linalg.cholesky_ex(scaled[bad] + 1e-5 * eye)[0]
    rhs = torch.nan_to_num(vector * scale)[..., None]
    return torch.nan_to_num(torch.cholesky_solve(rhs, factor)[..., 0] * scale)


def _project(image: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Scalar products of ``image`` (b, npix) with ``images`` (b, K, npix)."""
    # as a row: ten times as fast as a column
    return (image[:, None] @ images.transpose(1, 2))[:, 0].to(torch.float64)


class _Evaluator:
    """Evaluates some problems of the batch: cost, gradient, curvature and linear solution."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.n_templates = problem.templates.shape[0]

    def __call__(self, u: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        problem, nb = self.problem, self.n_templates
        lin = problem.linearise(u, rows)
        weight = problem.weight[rows]
        n_raw = lin.columns.shape[1] - 1
        images = lin.columns
        if nb:  # the unit image, then the templates, then the derivatives
            templates = problem.templates.expand(images.shape[0], -1, -1)
            images = torch.cat([images[:, :1], templates, images[:, 1:]], 1)
        images = images * weight[:, None]
        wide = torch.float64
        rest = problem.data[rows] * weight
        whiten = getattr(problem, "whitening", None)
        if whiten is not None:
            images, rest = whiten(images, rows), whiten(rest[:, None], rows)[:, 0]
        gram = (images @ images.transpose(1, 2)).to(wide)
        # amplitude (where it is solved for) and templates
        solved = lin.amplitude is None
        linear = slice(0 if solved else 1, 1 + nb)
        if not solved:
            rest = rest - lin.amplitude.to(rest.dtype)[:, None] * images[:, 0]
        linear_images = images[:, linear]
        coefficients = rest.new_zeros((rest.shape[0], linear.stop - linear.start), dtype=wide)
        if coefficients.shape[1]:
            for _ in range(2):  # the second pass removes the rounding of the first
                delta = _normalised_solve(gram[:, linear, linear], _project(rest, linear_images))
                coefficients = coefficients + delta
                rest = torch.baddbmm(
                    rest[:, None], delta.to(rest.dtype)[:, None], linear_images, alpha=-1
                )[:, 0]
        chi2 = (rest * rest).sum(1, dtype=wide)
        right = _project(rest, images)
        amplitude = coefficients[:, 0] if solved else lin.amplitude.to(wide)
        full = self._full_chain(lin, amplitude, n_raw, solved)
        hessian = full.transpose(1, 2) @ gram @ full
        gradient = (full.transpose(1, 2) @ right[..., None])[..., 0]
        cost = chi2
        if lin.penalty is not None:
            chain = lin.penalty_chain.to(wide)
            size = chain.shape[2]
            hessian[:, :size, :size] += chain.transpose(1, 2) @ chain
            gradient[:, :size] -= (chain.transpose(1, 2) @ lin.penalty.to(wide)[..., None])[..., 0]
            cost = chi2 + lin.penalty.to(wide).square().sum(1)
        if not solved:
            coefficients = torch.cat([amplitude[:, None], coefficients], 1)
        return {
            "cost": torch.nan_to_num(cost, nan=torch.inf, posinf=torch.inf),
            "chi2": chi2,
            "gradient": gradient,
            "hessian": hessian,
            "linear": coefficients,
        }

    def _full_chain(
        self, lin: Linearisation, amplitude: torch.Tensor, n_raw: int, solved: bool
    ) -> torch.Tensor:
        """From (coordinates, solved amplitude, templates) to the columns of the images."""
        chain = lin.chain.to(amplitude.dtype)
        batch, _, size = chain.shape
        nb = self.n_templates
        full = chain.new_zeros((batch, 1 + n_raw + nb, size + solved + nb))
        full[:, 1 + nb :, :size] = amplitude[:, None, None] * chain
        if solved:
            full[:, 0, size] = 1.0
        elif lin.amplitude_chain is not None:
            full[:, 0, :size] = lin.amplitude_chain.to(amplitude.dtype)
        for i in range(nb):
            full[:, 1 + i, size + solved + i] = 1.0
        return full


def levenberg_marquardt(
    problem: Problem,
    u: torch.Tensor,
    *,
    lower: torch.Tensor,
    upper: torch.Tensor,
    max_iter: int = 60,
    tolerance: float = 1e-3,
    relative_tolerance: float = 0.0,
    window: int = 128,
    longest: torch.Tensor | None = None,
    stiffen: bool = False,
    rows: torch.Tensor | None = None,
    monitor: Callable[[int], None] | None = None,
) -> LeastSquaresResult:
    """Minimise chi-square (plus penalties) of every problem of a batch.

    Parameters
    ----------
    problem : Problem
        Data, weights, templates and the model.
    u : tensor, shape (B, U)
        Where to start.
    lower, upper : tensor, shape (B, U)
        Bounds of the coordinates (infinite where there is none).
    max_iter : int, optional
        Evaluations for each problem.
    tolerance : float, optional
        A problem has converged when the step to the minimum would lower chi-square by
        less than this: 1e-3 is 0.03 of a standard deviation, and that last step is taken.
    relative_tolerance : float, optional
        The same, as a fraction of chi-square.
    window : int, optional
        How many problems are worked on at once.
    longest : tensor, shape (U,), optional
        How far each coordinate may go in one step; longer steps are shortened as a whole.
    stiffen : bool, optional
        Whether to learn from the steps what the curvature lacks, for models that bend much.
    rows : tensor of int, shape (b,), optional
        Which problems to solve; all by default.  Other rows of the result keep their start.
    monitor : callable, optional
        Called with the number of problems left, at every step.

    Returns
    -------
    LeastSquaresResult

    Notes
    -----
    The damping follows Marquardt (1963) with a gain that adapts to the ratio of the actual
    and the predicted decrease.  A coordinate that is at a bound, with a gradient that
    points outside, is left out of the step.

    The curvature is that of Gauss and Newton, which lacks a term with the residuals.  With
    ``stiffen``, where a step gains much less than it promises, the curvature along the coordinates
    that overshoot is raised to what the change of the gradient shows (as in Dennis, Gay & Welsch
    1981, ACM TOMS 7, 348, but for the diagonal alone), so that the others need no damping.
    """
    evaluate = _Evaluator(problem)
    size = u.shape[1]
    u = problem.project(u.clone().clamp(lower, upper), torch.arange(u.shape[0], device=u.device))
    state = _State.start(u, size, problem)
    todo = torch.arange(u.shape[0], device=u.device) if rows is None else rows
    while todo.numel():
        now = todo[:window]
        if monitor is not None:
            monitor(todo.numel())
        trial = state.propose(now, lower, upper, problem, longest)
        new = evaluate(trial, now)
        if stiffen:
            state.stiffen(now, trial, new)
        done = state.update(now, trial, new, tolerance, relative_tolerance)
        finished = done | state.check(
            now, lower, upper, max_iter, tolerance, relative_tolerance, problem
        )
        todo = torch.cat([now[~finished], todo[window:]])
    return state.result(lower, upper)


@dataclass
class _State:
    """Where every problem of the batch stands."""

    u: torch.Tensor
    cost: torch.Tensor
    chi2: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor
    linear: torch.Tensor
    stiffness: torch.Tensor  # what the curvature lacks along each unknown
    damping: torch.Tensor
    growth: torch.Tensor
    n_iter: torch.Tensor
    idle: torch.Tensor
    converged: torch.Tensor

    @classmethod
    def start(cls, u: torch.Tensor, size: int, problem: Problem) -> _State:
        batch, nb = u.shape[0], problem.templates.shape[0]
        full = size + nb + int(getattr(problem, "linear_amplitude", True))
        new = u.new_zeros
        return cls(
            u=u.clone(),
            cost=torch.full_like(u[:, 0], torch.inf) if size else new(batch) + torch.inf,
            chi2=new(batch),
            gradient=new((batch, full)),
            hessian=new((batch, full, full)),
            linear=new((batch, 1 + nb)),
            stiffness=new((batch, full)),
            damping=new(batch) + 1e-2,
            growth=new(batch) + 3.0,
            n_iter=torch.zeros(batch, dtype=torch.long, device=u.device),
            idle=torch.zeros(batch, dtype=torch.long, device=u.device),
            converged=torch.zeros(batch, dtype=torch.bool, device=u.device),
        )

    def _free(self, now: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Which unknowns may move: those at a bound only inwards."""
        size = self.u.shape[1]
        u, pull = self.u[now], self.gradient[now, :size]
        held = ((u <= lower[now]) & (pull < 0)) | ((u >= upper[now]) & (pull > 0))
        held |= lower[now] >= upper[now]
        free = torch.ones_like(self.gradient[now], dtype=torch.bool)
        free[:, :size] = ~held
        return free

    def _system(
        self, now: torch.Tensor, free: torch.Tensor, damping: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.u.shape[1]
        matrix = self.hessian[now] + torch.diag_embed(self.stiffness[now])
        mask = free.to(matrix.dtype)
        matrix = matrix * mask[:, :, None] * mask[:, None, :]
        diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
        if damping is not None:
            lift = damping[:, None] * diagonal
            lift[:, size:] = 0.0  # what is linear needs no damping
            diagonal += lift
        diagonal += (1.0 - mask) + 1e-30
        return matrix, self.gradient[now] * mask

    def propose(self, now, lower, upper, problem, longest):
        size = self.u.shape[1]
        fresh = torch.isinf(self.cost[now])
        free = self._free(now, lower, upper)
        step = _normalised_solve(*self._system(now, free, self.damping[now]))[:, :size]
        step = torch.where(fresh[:, None], torch.zeros_like(step), step)
        if longest is not None:
            step = step / (step.abs() / longest).amax(1, keepdim=True).clamp_min(1.0)
        trial = (self.u[now] + step).clamp(lower[now], upper[now])
        return problem.project(trial, now)

    def update(self, now, trial, new, tolerance, relative_tolerance):
        """Accept what lowers the cost; return which problems can't be improved any more."""
        old = self.cost[now]
        predicted = self._predicted(now, trial - self.u[now])
        better = new["cost"] <= old
        gain = old - new["cost"]
        enough = tolerance + relative_tolerance * old
        # neither does it promise to get better nor does it: a flat valley, or rounding
        slow = (gain.abs() < 0.1 * enough) | (~better & (predicted < enough))
        self.idle[now] = torch.where(slow & torch.isfinite(old), self.idle[now] + 1, 0)
        accepted = now[better]
        self.u[accepted] = trial[better]
        for name in ("cost", "chi2", "gradient", "hessian", "linear"):
            getattr(self, name)[accepted] = new[name][better].to(self.u.dtype)
        damping = self.damping[now]
        ratio = gain / predicted.clamp_min(1e-30)
        easier = torch.where(ratio > 0.5, damping * 0.1, damping * 0.5)
        easier = torch.where(torch.isinf(old), damping, easier)
        self.damping[now] = torch.where(better, easier.clamp_min(1e-9), damping * self.growth[now])
        self.growth[now] = torch.where(better, 3.0, self.growth[now] * 2.0)
        self.n_iter[now] += 1
        settled = self.idle[now] >= 3
        self.converged[now[settled]] = True
        return settled | (self.damping[now] > 1e12) | torch.isinf(self.cost[now])

    def _predicted(self, now, step) -> torch.Tensor:
        """By how much steps (b, U) should lower the cost."""
        size = step.shape[1]
        curved = (step[:, None] @ self.hessian[now][:, :size, :size])[:, 0]
        return ((2 * self.gradient[now, :size] - curved) * step).sum(1)

    def stiffen(self, now, trial, new) -> None:
        """Learn from steps that promised too much what the curvature lacks."""
        size, step = trial.shape[1], trial - self.u[now]
        poor = self.cost[now] - new["cost"] < _POOR * self._predicted(now, step)
        hessian, seen = self.hessian[now], torch.isfinite(self.cost[now]) & new["cost"].isfinite()
        solved = self.linear.shape[1] - (hessian.shape[1] - size)
        whole = torch.cat([step, (new["linear"] - self.linear[now])[:, solved:].to(step)], 1)
        change = self.gradient[now, :size] - new["gradient"][:, :size]
        lacking = change - (whole[:, None] @ hessian)[:, 0, :size]
        diagonal = torch.diagonal(hessian, dim1=1, dim2=2)[:, :size].clamp_min(0)
        told = (step.square() * diagonal > _TELLING**2) & seen[:, None]
        lacking = (lacking / step.where(told, 1.0)).clamp_min(0).minimum(_STIFFEST * diagonal)
        before = self.stiffness[now, :size]
        after = torch.where(told, lacking, before)
        self.stiffness[now, :size] = torch.where(poor[:, None], after, _FORGET * before)

    def check(self, now, lower, upper, max_iter, tolerance, relative_tolerance, problem):
        """Which problems have converged (their last step is taken here) or run out."""
        size = self.u.shape[1]
        free = self._free(now, lower, upper)
        matrix, gradient = self._system(now, free, None)
        step = _normalised_solve(matrix, gradient)
        decrease = (step * gradient).sum(1)
        small = decrease <= tolerance + relative_tolerance * self.cost[now]
        small &= torch.isfinite(decrease) & torch.isfinite(self.cost[now])
        last = now[small]
        moved = (self.u[last] + step[small, :size]).clamp(lower[last], upper[last])
        self.u[last] = problem.project(moved, last)
        extra = step[small, size:]
        offset = self.linear.shape[1] - extra.shape[1]
        self.linear[last, offset:] += extra
        self.cost[last] -= decrease[small]
        self.chi2[last] -= decrease[small]
        self.converged[last] = True
        return small | (self.n_iter[now] >= max_iter)

    def result(self, lower: torch.Tensor, upper: torch.Tensor) -> LeastSquaresResult:
        at_bound = (self.u <= lower) | (self.u >= upper)
        return LeastSquaresResult(
            u=self.u,
            linear=self.linear,
            cost=self.cost,
            chi2=self.chi2,
            hessian=self.hessian,
            converged=self.converged,
            at_bound=at_bound,
            n_iter=self.n_iter,
        )
