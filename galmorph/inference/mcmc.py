"""Draws from many posteriors at once: importance sampling and Markov chains in torch.

Nothing here knows of galaxies.  A target gives the logarithm of a density, and its slope, for
any number of points of any of its problems; each problem has a normal distribution to start
from, in whose own coordinates y (v = centre + root y) all steps are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from galmorph.inference.diagnostics import effective_sample_size, pareto_smooth, split_rhat

__all__ = [
    "Chains",
    "Density",
    "Mixture",
    "Proposal",
    "Streams",
    "Weighted",
    "adapt_mixture",
    "climb",
    "importance_draws",
    "run_chains",
    "sample_chains",
    "weigh",
]

_WIDE = torch.float64
# tails of proposals, as degrees of freedom of a Student t
_TAILS = 5.0
# in whitened coordinates: how far a trajectory goes, and the acceptance that is aimed at
_LENGTH, _ACCEPTANCE = 1.5, 0.8
_MOST_STEPS = 12
# every so many steps are taken by a trajectory, the others are independent of where one is
_EVERY = 16
# acceptance of independent steps below which they are not worth their cost
_LEAST_ACCEPTANCE = 0.05
# effective draws a coordinate that a mixture is fitted to, at least
_TEMPERED = 6.0
# steps of expectation maximisation, and the share below which no component falls
_ROUNDS, _LEAST_SHARE = 4, 0.01


class Density(Protocol):
    """What a target is asked."""

    size: int

    def log_prob(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density (M,) at points (M, D) of problems ``rows`` (M,)."""

    def log_prob_and_slope(
        self, v: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with its derivative (M, D)."""


class Streams:
    """Random numbers of many problems, each from its own seed: alike in any company.

    Parameters
    ----------
    seeds : sequence of (sequence of int)
        One a problem.
    """

    def __init__(self, seeds: Sequence[Sequence[int]]) -> None:
        self._each = [np.random.Generator(np.random.Philox(list(s))) for s in seeds]

    def part(self, rows: Sequence[int]) -> Streams:
        """Those of some problems; what they draw is drawn for the others too."""
        other = Streams([])
        other._each = [self._each[i] for i in rows]
        return other

    def _stack(self, rows: torch.Tensor, draw: Callable) -> torch.Tensor:
        return torch.as_tensor(np.stack([draw(self._each[i]) for i in rows.tolist()]))

    def normal(self, rows: torch.Tensor, *shape: int) -> torch.Tensor:
        """Standard normal numbers (len(rows), *shape)."""
        return self._stack(rows, lambda g: g.standard_normal(shape))

    def uniform(self, rows: torch.Tensor, *shape: int) -> torch.Tensor:
        """Numbers between 0 and 1, (len(rows), *shape)."""
        return self._stack(rows, lambda g: g.random(shape))

    def chi_square(self, rows: torch.Tensor, dof: float, *shape: int) -> torch.Tensor:
        """Chi-square numbers (len(rows), *shape)."""
        return self._stack(rows, lambda g: g.chisquare(dof, shape))


@dataclass
class Proposal:
    """Where each problem is, and how wide: a frame in which it is nearly round.

    Attributes
    ----------
    centre : tensor, shape (G, D)
    root : tensor, shape (G, D, D)
        Lower triangular square root of the scale matrix.
    """

    centre: torch.Tensor
    root: torch.Tensor

    @classmethod
    def from_curvature(cls, centre: torch.Tensor, curvature: torch.Tensor) -> Proposal:
        """The normal approximation at a mode, from its curvature (G, D, D)."""
        scale = torch.diagonal(curvature, dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
        scaled = curvature * scale[:, :, None] * scale[:, None]
        eye = torch.eye(centre.shape[1], dtype=_WIDE, device=centre.device)
        scaled = torch.nan_to_num(scaled)
        factor, info = torch.linalg.cholesky_ex(scaled + 1e-9 * eye)
        factor[info > 0] = eye
        inverse = torch.cholesky_inverse(factor) * scale[:, :, None] * scale[:, None]
        return cls.from_moments(centre, inverse)

    @classmethod
    def from_moments(cls, centre: torch.Tensor, cov: torch.Tensor) -> Proposal:
        """With a mean and a covariance (G, D, D)."""
        diagonal = torch.diagonal(cov, dim1=1, dim2=2)
        lift = torch.diag_embed(1e-10 * diagonal.clamp_min(0) + 1e-30)
        root, info = torch.linalg.cholesky_ex(cov + lift)
        root[info > 0] = torch.diag_embed(diagonal[info > 0].clamp_min(1e-30).sqrt())
        return cls(centre, root)

    def place(self, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Points (g, S, D) of whitened points (g, S, D) of problems ``rows`` (g,)."""
        return self.centre[rows, None] + y @ self.root[rows].transpose(1, 2)

    def whiten(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `place`."""
        offset = (v - self.centre[rows, None]).transpose(1, 2)
        return torch.linalg.solve_triangular(self.root[rows], offset, upper=False).transpose(1, 2)


@dataclass
class Mixture:
    """A mixture of Student t distributions for each problem.

    Attributes
    ----------
    log_share : tensor, shape (G, K)
    centre : tensor, shape (G, K, D)
    root : tensor, shape (G, K, D, D)
        Lower triangular square roots of the scale matrices.
    """

    log_share: torch.Tensor
    centre: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, proposals: Sequence[Proposal], log_share: torch.Tensor | None = None) -> Mixture:
        """Of one component or more, which share alike if nothing (G, K) is said."""
        centre = torch.stack([p.centre for p in proposals], 1)
        root = torch.stack([p.root for p in proposals], 1)
        if log_share is None:
            log_share = centre.new_zeros(centre.shape[:2])
        return cls(torch.log_softmax(log_share, 1), centre, root)

    def joined(self, other: Mixture) -> Mixture:
        """Half of each."""
        half = np.log(0.5)
        return Mixture(
            torch.cat([self.log_share + half, other.log_share + half], 1),
            torch.cat([self.centre, other.centre], 1),
            torch.cat([self.root, other.root], 1),
        )

    def part(self, rows: torch.Tensor) -> Mixture:
        """Of some problems."""
        return Mixture(self.log_share[rows], self.centre[rows], self.root[rows])

    def put(self, rows: torch.Tensor, other: Mixture) -> None:
        """Take those of some problems from elsewhere."""
        for name, values in vars(other).items():
            getattr(self, name)[rows] = values

    def moments(self) -> Proposal:
        """Mean and covariance of each problem, as one component."""
        share = torch.exp(self.log_share)
        mean = torch.einsum("gk,gkd->gd", share, self.centre)
        offset = self.centre - mean[:, None]
        cov = torch.einsum("gk,gkij,gklj->gil", share, self.root, self.root)
        cov = cov + torch.einsum("gk,gki,gkj->gij", share, offset, offset)
        return Proposal.from_moments(mean, cov)

    def draw(self, streams: Streams, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Points (g, count, D) of problems ``rows`` (g,)."""
        device, size = self.centre.device, self.centre.shape[2]
        y = streams.normal(rows, count, size)
        chi = streams.chi_square(rows, _TAILS, count, 1)
        y = (y * torch.sqrt(_TAILS / chi)).to(device)
        if self.centre.shape[1] == 1:
            return self.centre[rows] + y @ self.root[rows, 0].transpose(1, 2)
        pick = streams.uniform(rows, count).to(device)
        edges = torch.exp(self.log_share[rows]).cumsum(1)[:, :-1]
        which = torch.searchsorted(edges.contiguous(), pick.contiguous())
        v = torch.empty_like(y)
        for k in range(self.centre.shape[1]):
            own = self.centre[rows, k, None] + y @ self.root[rows, k].transpose(1, 2)
            v = torch.where((which == k)[..., None], own, v)
        return v

    def log_density(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Density (g, S) at points (g, S, D)."""
        return torch.logsumexp(self._each(v, rows)[0], 2)

    def _each(self, v: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Density of each component with its share, and squares of whitened lengths, (g, S, K)."""
        size = v.shape[2]
        top = math.lgamma(0.5 * (_TAILS + size)) - math.lgamma(0.5 * _TAILS)
        norm = top - 0.5 * size * np.log(_TAILS * np.pi)
        log_det = torch.diagonal(self.root[rows], dim1=2, dim2=3).log().sum(2)
        square = []
        for k in range(self.centre.shape[1]):
            offset = (v - self.centre[rows, k, None]).transpose(1, 2)
            y = torch.linalg.solve_triangular(self.root[rows, k], offset, upper=False)
            square.append(y.square().sum(1))
        square = torch.stack(square, 2)
        tail = -0.5 * (_TAILS + size) * torch.log1p(square / _TAILS)
        return norm + (self.log_share[rows] - log_det)[:, None] + tail, square


def _log_prob(target: Density, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Density (g, S) at points (g, S, D)."""
    each = rows.repeat_interleave(v.shape[1])
    return target.log_prob(v.flatten(0, 1), each).view(v.shape[:2])


@dataclass
class Weighted:
    """Draws with weights.

    Attributes
    ----------
    v : tensor, shape (g, S, D)
    log_weight : tensor, shape (g, S)
        Smoothed, of sum 1.
    log_evidence, log_evidence_err : array, shape (g,)
        Logarithm of the integral of the target, and its standard error.
    khat, ess : array, shape (g,)
    log_prob : tensor, shape (g, S)
        Of the target.
    """

    v: torch.Tensor
    log_weight: torch.Tensor
    log_evidence: np.ndarray
    log_evidence_err: np.ndarray
    khat: np.ndarray
    ess: np.ndarray
    log_prob: torch.Tensor

    def put(self, index: torch.Tensor, other: Weighted) -> None:
        """Take those of some problems from elsewhere, where they are worth more."""
        better = other.khat < self.khat[index.cpu().numpy()]
        keep = torch.as_tensor(better, device=index.device)
        for name, values in vars(other).items():
            own = getattr(self, name)
            if isinstance(values, torch.Tensor):
                own[index[keep]] = values[keep]
            else:
                own[index[keep].cpu().numpy()] = values[better]


def importance_draws(
    target: Density,
    proposal: Mixture | Proposal,
    rows: torch.Tensor,
    count: int,
    streams: Streams,
) -> Weighted:
    """Draws from proposals, weighted by the target.

    Parameters
    ----------
    target : Density
    proposal : Mixture or Proposal
        A `Proposal` is one Student t distribution.
    rows : tensor of int, shape (g,)
        Problems.
    count : int
    streams : Streams

    Returns
    -------
    Weighted
    """
    mixture = Mixture.of([proposal]) if isinstance(proposal, Proposal) else proposal
    v = mixture.draw(streams, rows, count)
    log_prob = _log_prob(target, v, rows)
    return weigh(v, log_prob, mixture.log_density(v, rows))


def weigh(v: torch.Tensor, log_prob: torch.Tensor, drawn_by: torch.Tensor) -> Weighted:
    """Weigh draws (g, S, D) by their density (g, S), and that by which they were drawn (g, S)."""
    ratio = torch.nan_to_num(log_prob - drawn_by, nan=-torch.inf).cpu().numpy()
    smooth, khat = pareto_smooth(ratio)
    usable = np.isfinite(smooth).any(1)
    doubled = 2 * np.maximum(np.where(usable[:, None], smooth, 0.0), -1e300)
    square = np.logaddexp.reduce(doubled, axis=1).clip(-700)
    ess = np.where(usable, np.exp(-square), 0.0)
    top = ratio.max(1)
    with np.errstate(invalid="ignore"):
        share = np.exp(ratio - top[:, None])
        evidence = top + np.log(share.mean(1))
        error = share.std(1, ddof=1) / (np.sqrt(ratio.shape[1]) * share.mean(1))
    return Weighted(
        v=v,
        log_weight=torch.as_tensor(smooth).to(v),
        log_evidence=evidence,
        log_evidence_err=error,
        khat=khat,
        ess=ess,
        log_prob=log_prob,
    )


def adapt_mixture(
    target: Density,
    mixture: Mixture,
    rows: torch.Tensor,
    counts: Sequence[int],
    streams: Streams,
) -> None:
    """Fit mixtures to the target by rounds of weighted draws, in place.

    Parameters
    ----------
    target : Density
    mixture : Mixture
    rows : tensor of int, shape (g,)
        Problems.
    counts : sequence of int
        Draws of each round.
    streams : Streams

    Notes
    -----
    Adaptive multiple importance sampling (Cornuet et al. 2012, Scand. J. Stat. 39, 798): draws
    of all rounds are kept, and weighted as draws from the mixture of all proposals.  Weights that
    few draws dominate are tempered (Koblents & Miguez 2015, Stat. Comput. 25, 407), and the
    mixture is fitted by expectation maximisation (Cappe et al. 2008, Stat. Comput. 18, 447).
    """
    past: list[tuple[Mixture, float]] = []
    v = log_prob = density = None
    every = torch.arange(len(rows), device=rows.device)
    for count in counts:
        now = mixture.part(rows)
        new = now.draw(streams.part(rows.tolist()), every, count)
        new_log = _log_prob(target, new, rows)
        past.append((now, math.log(count)))
        # of each draw, by all proposals there were, as often as they were drawn from
        of_new = [m.log_density(new, every) + share for m, share in past]
        of_new = torch.logsumexp(torch.stack(of_new), 0)
        if v is None:
            v, log_prob, density = new, new_log, of_new
        else:
            of_old = now.log_density(v, every) + math.log(count)
            density = torch.cat([torch.logaddexp(density, of_old), of_new], 1)
            v, log_prob = torch.cat([v, new], 1), torch.cat([log_prob, new_log], 1)
        share = _tempered(log_prob - density, _TEMPERED * v.shape[2])
        mixture.put(rows, _fitted(now, v, share))


def _tempered(ratio: torch.Tensor, least: float) -> torch.Tensor:
    """Weights (g, S) of sum 1, with as much of their contrast as leaves enough draws."""
    ratio = torch.nan_to_num(ratio, nan=-torch.inf, posinf=-torch.inf)
    ratio = ratio - ratio.max(1, keepdim=True).values.nan_to_num(neginf=0.0)
    least = min(least, 0.25 * ratio.shape[1])
    share = torch.zeros_like(ratio)
    left = torch.ones(len(ratio), dtype=torch.bool, device=ratio.device)
    for power in 0.75 ** torch.arange(20):
        raised = torch.exp(float(power) * ratio)
        own = raised / raised.sum(1, keepdim=True).clamp_min(1e-300)
        share[left] = own[left]
        left = left & (own.square().sum(1) * least > 1.0)
        if not left.any():
            break
    return share


def _fitted(mixture: Mixture, v: torch.Tensor, weight: torch.Tensor) -> Mixture:
    """A mixture that follows weighted draws (g, S, D), as far as these say something."""
    size, every = v.shape[2], torch.arange(len(v), device=v.device)
    cov_old = mixture.root @ mixture.root.transpose(2, 3)
    found = mixture
    for _ in range(_ROUNDS):
        each, square = found._each(v, every)
        part = torch.softmax(each, 2) * weight[..., None]
        pull = part * (_TAILS + size) / (_TAILS + square)
        total = part.sum(1).clamp_min(1e-300)
        ess = total.square() / part.square().sum(1).clamp_min(1e-300)
        mass = pull.sum(1).clamp_min(1e-300)
        # as many draws as coordinates say nothing of a covariance
        trust = (torch.where(total > 1e-6, ess, 0.0) / (ess + 2.0 * size))[..., None]
        mean = torch.einsum("gsk,gsd->gkd", pull, v) / mass[..., None]
        centre = trust * mean + (1 - trust) * mixture.centre
        cov = torch.empty_like(cov_old)
        for k in range(centre.shape[1]):
            offset = v - mean[:, k, None]
            cov[:, k] = (offset * pull[:, :, k, None]).transpose(1, 2) @ offset
        cov = cov / total[..., None, None]
        cov = trust[..., None] * cov + (1 - trust[..., None]) * cov_old
        flat = Proposal.from_moments(centre.flatten(0, 1), cov.flatten(0, 1))
        share = torch.log(total.clamp_min(_LEAST_SHARE))
        new = Mixture(torch.log_softmax(share, 1), centre, flat.root.view_as(mixture.root))
        good = torch.isfinite(new.root).all(3).all(2).all(1) & torch.isfinite(centre).all(2).all(1)
        kept = Mixture(found.log_share.clone(), found.centre.clone(), found.root.clone())
        rows = torch.nonzero(good)[:, 0]
        kept.put(rows, new.part(rows))
        found = kept
    return found


def climb(
    target: Any, v: torch.Tensor, *, inside: Callable = lambda v: v, steps: int = 15
) -> torch.Tensor:
    """Modes near points (G, D), one of each problem (Levenberg-Marquardt).

    Parameters
    ----------
    target : Density
        With ``curvature(v)``, positive definite (G, D, D).
    v : tensor, shape (G, D)
    inside : callable, optional
        Moves points (G, D) to where there is density.
    steps : int, optional

    Returns
    -------
    tensor, shape (G, D)
    """
    rows = torch.arange(len(v), device=v.device)
    v = inside(v)
    value, slope = target.log_prob_and_slope(v, rows)
    damping = torch.full_like(value, 1e-2)
    for _ in range(steps):
        hessian = target.curvature(v)
        extra = damping[:, None] * torch.diagonal(hessian, dim1=1, dim2=2)
        factor, info = torch.linalg.cholesky_ex(hessian + torch.diag_embed(extra))
        step = torch.cholesky_solve(slope[..., None], factor)[..., 0]
        trial = inside(v + torch.where((info == 0)[:, None], step.nan_to_num(), 0.0))
        new, new_slope = target.log_prob_and_slope(trial, rows)
        better = new > value
        v = torch.where(better[:, None], trial, v)
        slope = torch.where(better[:, None], new_slope, slope)
        value = torch.where(better, new, value)
        damping = torch.where(better, 0.2 * damping, 5.0 * damping).clamp(1e-7, 1e7)
    return v


def resample(drawn: Weighted, rows: torch.Tensor, count: int, streams: Streams) -> torch.Tensor:
    """Draws (g, count, D) of equal weight."""
    share = torch.exp(torch.nan_to_num(drawn.log_weight, nan=-torch.inf)).cumsum(1)
    at = torch.arange(count, dtype=_WIDE)[None] + streams.uniform(rows, 1)
    at = (at / count).to(share) * share[:, -1:]
    index = torch.searchsorted(share.contiguous(), at.contiguous())
    index = index.clamp_max(share.shape[1] - 1)
    return drawn.v.gather(1, index[..., None].expand(-1, -1, drawn.v.shape[2]))


@dataclass
class Chains:
    """Draws of Markov chains.

    Attributes
    ----------
    v : tensor, shape (G, C, T, D)
        NaN where a chain could not be started.
    log_prob : tensor, shape (G, C, T)
    rhat, ess : array, shape (G,)
        The largest split R-hat and the smallest effective sample size of all coordinates.
    acceptance : array, shape (G,)
    """

    v: torch.Tensor
    log_prob: torch.Tensor
    rhat: np.ndarray
    ess: np.ndarray
    acceptance: np.ndarray


@dataclass
class _Ahead:
    """Steps to come of some problems, which do not depend on where their chains are.

    What is drawn for T steps of C chains is evaluated at once: v (g, T, C, D); log_prob, proposed
    and pick (g, T, C).
    """

    some: torch.Tensor
    v: torch.Tensor
    log_prob: torch.Tensor
    proposed: torch.Tensor
    own: torch.Tensor
    pick: torch.Tensor


class _Walkers:
    """Chains of some problems, where they stand, and how they step."""

    def __init__(self, target, proposal, mixture, rows, start, streams):
        self.target, self.proposal, self.rows, self.streams = target, proposal, rows, streams
        self.mixture, self.known, self.ahead = mixture, mixture, None
        self.v = start.clone()
        self.log_prob = _log_prob(target, start, rows)
        g = len(rows)
        self.slope = torch.zeros_like(start)
        self.stale = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        self.step = torch.full((g,), 0.9 * start.shape[2] ** -0.25 * 1.4, dtype=_WIDE)
        self.independent = torch.full((g,), 0.5, dtype=_WIDE)
        self.accepted = torch.full((g,), 0.8, dtype=_WIDE)

    def prepare(self, count: int) -> None:
        """Draw ``count`` steps that do not depend on where the chains are, and their densities.

        Only of problems whose chains take such steps often enough.
        """
        some = torch.nonzero(self.independent > _LEAST_ACCEPTANCE)[:, 0]
        rows, chains = self.rows[some], self.v.shape[1]
        v = self.mixture.draw(self.streams, rows, count * chains) if len(some) else None
        self.ahead = None
        if v is None:
            return
        shape = (len(some), count, chains)
        self.ahead = _Ahead(
            some=some,
            v=v.unflatten(1, (count, chains)),
            log_prob=_log_prob(self.target, v, rows).view(shape),
            proposed=self.mixture.log_density(v, rows).view(shape),
            own=self.mixture.log_density(self.v[some], rows),
            pick=self.streams.uniform(rows, count, chains).to(v),
        )

    def jump(self, turn: int) -> None:
        """Take one of the steps that were prepared (Metropolis-Hastings)."""
        ahead = self.ahead
        some, log_prob, proposed = ahead.some, ahead.log_prob[:, turn], ahead.proposed[:, turn]
        ratio = log_prob - self.log_prob[some] + ahead.own - proposed
        chance = torch.exp(torch.nan_to_num(ratio, nan=-torch.inf).clamp_max(0.0))
        take = ahead.pick[:, turn] < chance
        ahead.own = torch.where(take, proposed, ahead.own)
        self.v[some] = torch.where(take[..., None], ahead.v[:, turn], self.v[some])
        self.log_prob[some] = torch.where(take, log_prob, self.log_prob[some])
        self.stale[some] |= take
        self.independent[some] = 0.8 * self.independent[some] + 0.2 * chance.mean(1).cpu()

    def _slopes(self, v: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        """Whitened slopes of walkers ``pick`` (k,), as flat numbers, at points (k, D)."""
        problem = torch.div(pick, self.v.shape[1], rounding_mode="floor")
        rows = self.rows[problem.to(self.rows.device)]
        _, slope = self.target.log_prob_and_slope(v, rows)
        return (slope[:, None] @ self.proposal.root[rows])[:, 0]

    def glide(self, *, adapt: bool) -> None:
        """A Hamiltonian trajectory of every chain (Duane et al. 1987, Phys. Lett. B 195, 216)."""
        rows, (g, chains, size) = self.rows, self.v.shape
        stale = torch.nonzero(self.stale.flatten())[:, 0]
        if len(stale):
            flat = self.slope.flatten(0, 1)
            flat[stale] = self._slopes(self.v.flatten(0, 1)[stale], stale)
            self.stale[:] = False
        y = self.proposal.whiten(self.v, rows).flatten(0, 1)
        momentum = self.streams.normal(rows, chains, size).to(y).flatten(0, 1)
        shake = self.streams.uniform(rows, 2).to(self.step)
        step = self.step * (0.8 + 0.4 * shake[:, 0])
        count = (_LENGTH * (0.5 + shake[:, 1]) / step).round().clamp(1, _MOST_STEPS).long()
        step = step.repeat_interleave(chains)[:, None].to(y)
        left = count.repeat_interleave(chains).to(y.device)
        slope = self.slope.flatten(0, 1).clone()
        kinetic = 0.5 * momentum.square().sum(1)
        momentum = momentum + 0.5 * step * slope
        every = torch.arange(len(y), device=y.device)
        while True:
            going = every[left > 0]
            if not len(going):
                break
            y[going] += step[going] * momentum[going]
            problem = torch.div(going, chains, rounding_mode="floor")
            own = rows[problem]
            place = self.proposal.centre[own] + (
                self.proposal.root[own] @ y[going][..., None]
            ).squeeze(-1)
            slope[going] = self._slopes(place, going)
            left[going] -= 1
            whole = torch.where(left[going] > 0, 1.0, 0.5)[:, None]
            momentum[going] += whole * step[going] * slope[going]
        v = self.proposal.place(y.view(g, chains, size), rows)
        log_prob = _log_prob(self.target, v, rows)
        change = (kinetic - 0.5 * momentum.square().sum(1)).view(g, chains)
        ratio = torch.nan_to_num(log_prob - self.log_prob + change, nan=-torch.inf)
        chance = torch.exp(ratio.clamp_max(0.0))
        take = self.streams.uniform(rows, chains).to(chance) < chance
        self.v = torch.where(take[..., None], v, self.v)
        self.log_prob = torch.where(take, log_prob, self.log_prob)
        self.slope = torch.where(take[..., None], slope.view(g, chains, size), self.slope)
        mean = chance.mean(1).cpu()
        self.accepted = 0.9 * self.accepted + 0.1 * mean
        if adapt:
            self.step = (self.step * torch.exp(0.6 * (mean - _ACCEPTANCE))).clamp(0.02, 1.6)

    def advance(self, turn: int, *, adapt: bool) -> None:
        """One step of every chain: what is not worth a jump glides, and all glide now and then."""
        cycle = 2 if adapt else _EVERY
        if turn % cycle == 0:
            self.glide(adapt=adapt)
            self.prepare(cycle - 1)
            return
        staying = torch.ones(len(self.rows), dtype=torch.bool)
        if self.ahead is not None:
            self.jump(turn % cycle - 1)
            staying[self.ahead.some.cpu()] = False
        gliding = torch.nonzero(staying)[:, 0]
        if len(gliding):
            part = self.part(gliding)
            part.glide(adapt=adapt)
            for name in _Walkers._STATE:
                getattr(self, name)[gliding] = getattr(part, name)

    def rescue(self) -> None:
        """A chain that starts where there is no density starts beside one that does not."""
        every = torch.arange(len(self.rows), device=self.v.device)
        best = self.log_prob.argmax(1)
        lost = ~torch.isfinite(self.log_prob)
        there = self.v[every, best][:, None].expand_as(self.v)
        self.v = torch.where(lost[..., None], there, self.v)
        self.log_prob = torch.where(lost, self.log_prob[every, best][:, None], self.log_prob)

    def acceptance(self) -> np.ndarray:
        """Of the steps that are accepted more often, (g,)."""
        return torch.maximum(self.accepted, self.independent).numpy()

    def learn(self, draws: torch.Tensor) -> None:
        """Move the frame to where the chains (g, C, T, D) were, and propose from there too."""
        _learn(self.proposal, self.rows, draws)
        self.mixture = self.known.joined(Mixture.of([self.proposal]))
        self.independent[:] = 0.5
        self.stale[:] = True

    _STATE = ("v", "log_prob", "slope", "stale", "step", "independent", "accepted")

    def part(self, index: torch.Tensor) -> _Walkers:
        """The walkers of some problems."""
        other = object.__new__(_Walkers)
        other.target, other.proposal, other.streams = self.target, self.proposal, self.streams
        other.mixture, other.known, other.ahead = self.mixture, self.known, None
        other.rows = self.rows[index]
        for name in _Walkers._STATE:
            setattr(other, name, getattr(self, name)[index].clone())
        return other


def sample_chains(
    target: Density,
    proposal: Proposal,
    start: torch.Tensor,
    streams: Streams,
    *,
    mixture: Mixture | None = None,
    draws: int = 500,
    warm_up: int = 20,
    blocks: int = 5,
    rhat: float = 1.01,
    ess: float = 400.0,
    summarise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    monitor: Callable[[int], None] | None = None,
) -> Chains:
    """Markov chains of every problem, until they have converged.

    Parameters
    ----------
    target : Density
    proposal : Proposal
        Changed in place where the chains show a better one.
    start : tensor, shape (G, C, D)
    streams : Streams
    mixture : Mixture, optional
        Where steps lead that do not depend on where a chain is; by default one Student t
        distribution, of ``proposal``.
    draws : int, optional
        Steps that are kept of each chain.
    warm_up : int, optional
        Steps in which the step size is found.
    blocks : int, optional
        How often chains may be run until R-hat and the effective sample size are as they should
        be: each time twice as long, with every second, fourth ... step kept.
    rhat, ess : float, optional
        What is asked of every coordinate.
    summarise : callable, optional
        From points (M, D) and rows (M,) to what must have converged, (M, Q).
    monitor : callable, optional
        Called with the number of problems left after each block.

    Returns
    -------
    Chains
    """
    every = torch.arange(len(start), device=start.device)
    mixture = Mixture.of([proposal]) if mixture is None else mixture
    return run_chains(
        _Walkers(target, proposal, mixture, every, start, streams),
        draws=draws,
        warm_up=warm_up,
        blocks=blocks,
        rhat=rhat,
        ess=ess,
        summarise=summarise,
        monitor=monitor,
    )


def run_chains(
    walkers: Any,
    *,
    draws: int,
    warm_up: int,
    blocks: int,
    rhat: float,
    ess: float,
    summarise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    monitor: Callable[[int], None] | None = None,
) -> Chains:
    """Run chains of all problems until they have converged, whatever their steps are.

    Parameters
    ----------
    walkers : object
        Chains of problems ``rows`` (G,): where they stand, ``v`` (G, C, D) and ``log_prob``
        (G, C); ``advance(turn, adapt=...)`` takes a step, ``part(index)`` has some of the
        problems, ``acceptance()`` is (G,), and ``learn(draws)`` makes the next steps better by
        what the chains (G, C, T, D) have seen.
    draws, warm_up, blocks, rhat, ess, summarise, monitor
        As for `sample_chains`.

    Returns
    -------
    Chains
    """
    start = walkers.v
    g, chains, size = start.shape
    kept = start.new_full((g, chains, draws, size), torch.nan)
    kept_log = start.new_full((g, chains, draws), torch.nan)
    worst, least = np.full(g, np.inf), np.zeros(g)
    acceptance = np.zeros(g)
    usable = torch.isfinite(walkers.log_prob).any(1)
    walkers.rescue()
    walkers = walkers.part(torch.nonzero(usable)[:, 0])
    for turn in range(warm_up):
        walkers.advance(turn, adapt=True)
    for block in range(blocks):
        if not len(walkers.rows):
            break
        here = walkers.rows
        stride = 2**block
        for turn in range(draws * stride):
            walkers.advance(turn, adapt=False)
            if turn % stride == stride - 1:
                kept[here, :, turn // stride] = walkers.v
                kept_log[here, :, turn // stride] = walkers.log_prob
        values = kept[here]
        if summarise is not None:
            flat = summarise(values.flatten(0, 2), here.repeat_interleave(chains * draws))
            values = flat.view(*values.shape[:3], -1)
        values = values.permute(0, 3, 1, 2).cpu().numpy()
        at = here.cpu().numpy()
        worst[at] = split_rhat(values).max(1)
        least[at] = effective_sample_size(values).min(1)
        acceptance[at] = walkers.acceptance()
        again = (worst[at] > rhat) | (least[at] < ess)
        if monitor is not None:
            monitor(int(again.sum()))
        left = torch.nonzero(torch.as_tensor(again))[:, 0]
        if block + 1 == blocks or not len(left):
            break
        walkers = walkers.part(left)
        walkers.learn(kept[here[left.to(here.device)]])
        for turn in range(warm_up):
            walkers.advance(turn, adapt=True)
    return Chains(kept, kept_log, worst, least, acceptance)


def _learn(proposal: Proposal, rows: torch.Tensor, v: torch.Tensor) -> None:
    """Give proposals the moments of chains (g, C, T, D)."""
    flat = v.flatten(1, 2)
    mean = flat.mean(1)
    offset = flat - mean[:, None]
    cov = offset.transpose(1, 2) @ offset / flat.shape[1]
    old = proposal.root[rows] @ proposal.root[rows].transpose(1, 2)
    new = Proposal.from_moments(mean, 0.9 * cov + 0.1 * old)
    proposal.centre[rows], proposal.root[rows] = new.centre, new.root
