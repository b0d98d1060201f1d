"""Draws from many posteriors at once: importance sampling and Markov chains in torch.

Nothing here knows of galaxies.  A target gives the logarithm of a density, and its slope, for
any number of points of any of its problems; each problem has a normal distribution to start
from, in whose own coordinates y (v = centre + root y) all steps are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from galmorph.inference.diagnostics import effective_sample_size, pareto_smooth, split_rhat

__all__ = ["Chains", "Density", "Proposal", "Streams", "importance_draws", "sample_chains"]

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
    """A Student t distribution for each problem.

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

    def draw(self, streams: Streams, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Whitened draws (g, count, D)."""
        size = self.centre.shape[1]
        y = streams.normal(rows, count, size)
        chi = streams.chi_square(rows, _TAILS, count, 1)
        return (y * torch.sqrt(_TAILS / chi)).to(self.centre.device)

    def log_density(self, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Density of `place` at whitened points (g, S, D): (g, S)."""
        size = y.shape[-1]
        log_det = torch.diagonal(self.root[rows], dim1=1, dim2=2).log().sum(1)
        top = torch.lgamma(torch.tensor(0.5 * (_TAILS + size), dtype=_WIDE))
        top = top - torch.lgamma(torch.tensor(0.5 * _TAILS, dtype=_WIDE))
        norm = top - 0.5 * size * np.log(_TAILS * np.pi)
        tail = -0.5 * (_TAILS + size) * torch.log1p(y.square().sum(-1) / _TAILS)
        return norm - log_det[:, None] + tail


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

    def rows(self, index: torch.Tensor) -> Weighted:
        """Those of some problems."""
        at = index.cpu().numpy()
        return Weighted(
            **{k: v[index if isinstance(v, torch.Tensor) else at] for k, v in vars(self).items()}
        )

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
    target: Density, proposal: Proposal, rows: torch.Tensor, count: int, streams: Streams
) -> Weighted:
    """Draws from proposals, weighted by the target.

    Parameters
    ----------
    target : Density
    proposal : Proposal
    rows : tensor of int, shape (g,)
        Problems.
    count : int
    streams : Streams

    Returns
    -------
    Weighted
    """
    y = proposal.draw(streams, rows, count)
    v = proposal.place(y, rows)
    log_prob = _log_prob(target, v, rows)
    ratio = (log_prob - proposal.log_density(y, rows)).cpu().numpy()
    smooth, khat = pareto_smooth(ratio)
    usable = np.isfinite(smooth).any(1)
    square = np.logaddexp.reduce(np.where(usable[:, None], 2 * smooth, 0.0), axis=1).clip(-700)
    ess = np.where(usable, np.exp(-square), 0.0)
    top = ratio.max(1)
    with np.errstate(invalid="ignore"):
        share = np.exp(ratio - top[:, None])
        evidence = top + np.log(share.mean(1))
        error = share.std(1, ddof=1) / (np.sqrt(count) * share.mean(1))
    return Weighted(
        v=v,
        log_weight=torch.as_tensor(smooth).to(v),
        log_evidence=evidence,
        log_evidence_err=error,
        khat=khat,
        ess=ess,
        log_prob=log_prob,
    )


def refine_proposal(proposal: Proposal, rows: torch.Tensor, drawn: Weighted) -> None:
    """Move proposals to the moments of weighted draws, as far as these can be trusted."""
    size = drawn.v.shape[2]
    weight = torch.exp(drawn.log_weight)
    weight = torch.where(torch.isfinite(weight), weight, 0.0)
    ess = torch.as_tensor(drawn.ess).to(weight)
    mean = torch.einsum("gs,gsd->gd", weight, drawn.v)
    offset = drawn.v - mean[:, None]
    cov = (offset * weight[..., None]).transpose(1, 2) @ offset
    old = proposal.root[rows] @ proposal.root[rows].transpose(1, 2)
    # as many draws as coordinates say nothing of a covariance
    trust = (ess / (ess + 2.0 * size))[:, None]
    centre = trust * mean + (1 - trust) * proposal.centre[rows]
    new = Proposal.from_moments(centre, trust[..., None] * cov + (1 - trust)[..., None] * old)
    good = torch.isfinite(new.root).all(2).all(1) & torch.isfinite(centre).all(1)
    proposal.centre[rows[good]] = new.centre[good]
    proposal.root[rows[good]] = new.root[good]


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


class _Walkers:
    """Chains of some problems, where they stand, and how they step."""

    def __init__(self, target, proposal, rows, start, streams):
        self.target, self.proposal, self.rows, self.streams = target, proposal, rows, streams
        self.v = start.clone()
        self.log_prob = _log_prob(target, start, rows)
        g = len(rows)
        self.slope = torch.zeros_like(start)
        self.stale = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        self.step = torch.full((g,), 0.9 * start.shape[2] ** -0.25 * 1.4, dtype=_WIDE)
        self.independent = torch.full((g,), 0.5, dtype=_WIDE)
        self.accepted = torch.full((g,), 0.8, dtype=_WIDE)

    def _take(self, take, v, log_prob, slope=None):
        self.v = torch.where(take[..., None], v, self.v)
        self.log_prob = torch.where(take, log_prob, self.log_prob)
        if slope is None:
            self.stale |= take
        else:
            self.slope = torch.where(take[..., None], slope, self.slope)

    def jump(self, some: torch.Tensor) -> None:
        """A step that does not depend on where the chains ``some`` are (Metropolis-Hastings)."""
        rows, chains = self.rows[some], self.v.shape[1]
        y = self.proposal.draw(self.streams, rows, chains)
        v = self.proposal.place(y, rows)
        log_prob = _log_prob(self.target, v, rows)
        old = self.proposal.log_density(self.proposal.whiten(self.v[some], rows), rows)
        new = self.proposal.log_density(y, rows)
        ratio = log_prob - self.log_prob[some] + old - new
        chance = torch.exp(torch.nan_to_num(ratio, nan=-torch.inf).clamp_max(0.0))
        take = self.streams.uniform(rows, chains).to(chance) < chance
        full = torch.zeros_like(self.stale)
        full[some] = take
        all_v, all_log = self.v.clone(), self.log_prob.clone()
        all_v[some], all_log[some] = v, log_prob
        self._take(full, all_v, all_log)
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
        self._take(take, v, log_prob, slope.view(g, chains, size))
        mean = chance.mean(1).cpu()
        self.accepted = 0.9 * self.accepted + 0.1 * mean
        if adapt:
            self.step = (self.step * torch.exp(0.6 * (mean - _ACCEPTANCE))).clamp(0.02, 1.6)

    def advance(self, turn: int, *, adapt: bool) -> None:
        """One step of every chain."""
        good = self.independent > _LEAST_ACCEPTANCE
        # what is not worth a jump glides; all glide now and then
        if turn % _EVERY == 0 or (adapt and turn % 2) or not good.any():
            self.glide(adapt=adapt)
            return
        if good.all():
            self.jump(torch.arange(len(self.rows)))
            return
        jumping = torch.nonzero(good)[:, 0]
        gliding = torch.nonzero(~good)[:, 0]
        self.jump(jumping)
        part = self.part(gliding)
        part.glide(adapt=adapt)
        for name in _Walkers._STATE:
            getattr(self, name)[gliding] = getattr(part, name)

    _STATE = ("v", "log_prob", "slope", "stale", "step", "independent", "accepted")

    def part(self, index: torch.Tensor) -> _Walkers:
        """The walkers of some problems."""
        other = object.__new__(_Walkers)
        other.target, other.proposal, other.streams = self.target, self.proposal, self.streams
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
    g, chains, size = start.shape
    every = torch.arange(g, device=start.device)
    kept = start.new_full((g, chains, draws, size), torch.nan)
    kept_log = start.new_full((g, chains, draws), torch.nan)
    worst, least = np.full(g, np.inf), np.zeros(g)
    acceptance = np.zeros(g)
    walkers = _Walkers(target, proposal, every, start, streams)
    usable = torch.isfinite(walkers.log_prob).any(1)
    # a chain that starts where there is no density starts beside one that does not
    best = walkers.log_prob.argmax(1)
    lost = ~torch.isfinite(walkers.log_prob)
    there = walkers.v[every, best][:, None].expand_as(walkers.v)
    walkers.v = torch.where(lost[..., None], there, walkers.v)
    walkers.log_prob = torch.where(lost, walkers.log_prob[every, best][:, None], walkers.log_prob)
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
        acceptance[at] = torch.maximum(walkers.accepted, walkers.independent).numpy()
        again = (worst[at] > rhat) | (least[at] < ess)
        if monitor is not None:
            monitor(int(again.sum()))
        left = torch.nonzero(torch.as_tensor(again))[:, 0]
        if block + 1 == blocks or not len(left):
            break
        _learn(proposal, here[left.to(here.device)], kept[here[left.to(here.device)]])
        walkers = walkers.part(left)
        walkers.stale[:] = True
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
