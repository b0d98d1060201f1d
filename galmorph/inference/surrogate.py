"""Draws through a stand-in for the density, which costs next to nothing.

Where a density is a sum of squares, of residuals that are smooth, each residual is nearly a
quadratic function of the coordinates.  Residuals and their derivatives at some hundred points say
which; chains that follow the quadratic functions go far at no cost, and where they end is taken
or not by the density itself (Liu 2001, Monte Carlo Strategies in Scientific Computing, 9.4.3;
Christen & Fox 2005, J. Comput. Graph. Stat. 14, 795).  However bad the functions are, the
chains have the right distribution: only how often they move depends on it.

Each mode has functions and a frame of its own, v = centre + root y, in whose y the steps are
taken.  A mode rules where it is the nearest by its own measure; steps within a mode that leave
it are not taken, and others go from mode to mode at the same y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from galmorph.inference.mcmc import (
    Chains,
    Density,
    Mixture,
    Proposal,
    Streams,
    Weighted,
    run_chains,
    weigh,
)

__all__ = [
    "Expandable",
    "Mode",
    "Surrogate",
    "learn_modes",
    "refine",
    "sample_through_surrogates",
    "weigh_surrogates",
]

_WIDE, _NARROW = torch.float64, torch.float32
# rounds of lessons of each mode: at least, and until the logarithm of the density is told to
# within this (a standard deviation), at most
_LEAST_ROUNDS, _MOST_ROUNDS, _GOOD = 3, 5, 1.0
# lessons of a round below which nothing is learned
_FEWEST = 4
# directions of the pixels that are kept while functions are learned, in coordinates
_DIRECTIONS = 3
# coordinates in which third derivatives are learned
_BENT = 6
# least curvature of what is left, in whitened coordinates: a stand-in has an integral
_FLAT = 1e-3
# Hamiltonian trajectories on a stand-in: leaps, their length at first, and the acceptance sought
_LEAPS, _LEAP, _ACCEPTANCE = 6, 0.3, 0.9
# trajectories from one step to the next; while chains on a stand-in forget where they began
_SUB, _BURN = 3, 16
# chains from which weighted draws are made, and draws for the integral of the stand-ins
_MANY, _CHEAP = 64, 2000
# every so many steps are small ones without a stand-in, and how large these are at most
_NEAR, _STROLL = 4, 0.6
# logarithm of the probability, relative to the best, below which a mode is left out: before
# lessons, by the normal approximation, and after them
_NEVER, _RARE = 30.0, 10.0
# squared distance, in each other's measure, below which two modes are one
_SAME = 4.0


class Expandable(Density, Protocol):
    """A density that is, for the most part, that of residuals (see `Target.expanded`)."""

    window: int

    def model_at(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What `expanded` takes as a reference, (M, P), at points (M, D)."""

    def expanded(
        self, v: torch.Tensor, rows: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-density (M,), slope (M, D), residuals (M, P) and their derivatives (M, D, P)."""


@dataclass
class _Frame:
    """Coordinates y of one mode, v = centre + root y; centre (D,), root and inverse (D, D)."""

    centre: torch.Tensor
    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, proposal: Proposal, row: int) -> _Frame:
        root = proposal.root[row]
        eye = torch.eye(len(root)).to(root)
        inverse = torch.linalg.solve_triangular(root, eye, upper=False)
        return cls(proposal.centre[row], root, inverse)

    @classmethod
    def about(cls, v: torch.Tensor, cov: torch.Tensor) -> _Frame:
        """With the mean of points (N, D) and a covariance."""
        return cls.of(Proposal.from_moments(v.mean(0)[None], cov[None]), 0)

    def turned(self, ways: torch.Tensor) -> _Frame:
        """With other axes (D, D), which are the columns of a rotation."""
        return _Frame(self.centre, self.root @ ways, ways.T @ self.inverse)

    def place(self, y: torch.Tensor) -> torch.Tensor:
        """Points (N, D)."""
        return self.centre + y @ self.root.T

    def whiten(self, v: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        return (v - self.centre) @ self.inverse.T

    def log_volume(self) -> torch.Tensor:
        """ln of the volume of v over that of y."""
        return torch.linalg.slogdet(self.root)[1]

    def apart(self, other: _Frame) -> float:
        """Squared distance of two modes, by the measure in which they are nearer."""
        return min(
            float(own.whiten(v.centre[None]).square().sum())
            for own, v in ((self, other), (other, self))
        )


@dataclass
class _Lessons:
    """What a density has said at points v (N, D).

    log_prob (N,), slope (N, D), residuals (N, K) and their derivatives (N, D, K): along K
    directions, in which the rest of the residuals hardly varies.
    """

    v: torch.Tensor
    log_prob: torch.Tensor
    slope: torch.Tensor
    residuals: torch.Tensor
    by: torch.Tensor

    def joined(self, other: _Lessons) -> _Lessons:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Lessons(*(torch.cat(pair) for pair in pairs))

    def weights(self, latest: int) -> torch.Tensor:
        """How much each counts (N,): earlier ones, if the density would ever lead there."""
        usual = self.log_prob[-latest:].quantile(0.1)
        return torch.exp((0.5 * (self.log_prob - usual)).clamp(-30.0, 0.0))


@dataclass
class Surrogate:
    """A function that stands in for a log-density: -0.5 |a(y)|^2 + b(y).

    b is quadratic, and a is too but for terms of the third order that go with the first R
    coordinates: those in which it bends most.

    Attributes
    ----------
    frame : _Frame
        Of its coordinates y.
    offset, slope, bend : tensor, shape (K,), (K, D), (K, D, D)
        a and its derivatives at y = 0.
    twist : tensor, shape (K, D, R, R)
        Half of its third derivatives.
    top, linear, curve : tensor, shape (), (D,), (D, D)
        b and its derivatives there.
    """

    frame: _Frame
    offset: torch.Tensor
    slope: torch.Tensor
    bend: torch.Tensor
    twist: torch.Tensor
    top: torch.Tensor
    linear: torch.Tensor
    curve: torch.Tensor

    @classmethod
    def normal(cls, frame: _Frame, top: torch.Tensor, count: int = 1) -> Surrogate:
        """Of the normal distribution of a frame, with ``count`` residuals that are zero."""
        size, zero = len(frame.centre), frame.centre.new_zeros
        return cls(
            frame,
            zero(count, dtype=_NARROW),
            zero((count, size), dtype=_NARROW),
            zero((count, size, size), dtype=_NARROW),
            zero((count, size, 0, 0), dtype=_NARROW),
            top,
            zero(size),
            -torch.eye(size).to(frame.root),
        )

    @classmethod
    def fitted(cls, frame: _Frame, lessons: _Lessons, weight: torch.Tensor) -> Surrogate:
        """To lessons of some weight (N,): by their derivatives, and the means of their values.

        A line through the derivatives, as functions of the place, has the second derivatives
        as its slope; a parabola, the third ones as its curvature.
        """
        weight = weight / weight.sum()
        size = len(frame.centre)
        by = torch.einsum("di,ndk->nik", frame.root.to(lessons.by), lessons.by)
        axes = _principal(lessons.residuals, by, weight, size)
        by = (by @ axes).to(_WIDE)
        y = frame.whiten(lessons.v)
        _, bend, _ = _through(y, by, weight, 0)
        # the coordinates in which it bends most come first
        _, ways = torch.linalg.eigh(torch.einsum("ijk,ljk->il", bend, bend))
        ways = ways.flip(1)
        made = cls.normal(frame.turned(ways), weight.new_zeros(()), axes.shape[1])
        y, by = y @ ways, torch.einsum("nik,ij->njk", by, ways)
        bent = min(_BENT, size)
        if 2 * (1 + size + bent * (bent + 1) // 2) * weight.square().sum() > 1.0:
            bent = 0
        slope, bend, twist = _through(y, by, weight, bent)
        made.slope, made.bend, made.twist = (
            part.movedim(-1, 0).contiguous().to(_NARROW) for part in (slope, bend, twist)
        )
        told = (lessons.residuals @ axes).to(_WIDE)
        made.offset = (weight @ (told - made.residuals(y)[0])).to(_NARROW)
        # what the squares do not say: the prior, and how the noise is not normal
        made.curve, made.linear = torch.zeros_like(made.curve), torch.zeros_like(made.linear)
        rest = lessons.slope @ made.frame.root - made.log_prob(y)[1]
        _, curve, _ = _through(y, rest[..., None], weight, 0, ridge=1e-6)
        height, axes = torch.linalg.eigh(curve[..., 0])
        curve = (axes * height.clamp_max(-_FLAT)) @ axes.T
        made.linear = weight @ rest - curve @ (weight @ y)
        made.curve = curve
        made.top = weight @ (lessons.log_prob - made.log_prob(y)[0])
        return made

    def residuals(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a (N, K) at points (N, D), and its derivatives (N, K, D)."""
        narrow = y.to(_NARROW)
        shape, bent = self.slope.shape, self.twist.shape[2]
        bend = self.bend.flatten(0, 1) @ narrow.T
        bend = bend.view(*shape, len(y)).permute(2, 0, 1)
        by, half = self.slope + bend, self.slope + 0.5 * bend
        if bent:
            x, rest = narrow[:, :bent], narrow[:, bent:]
            pairs = (x[:, :, None] * x[:, None]).flatten(1)
            twist = self.twist.flatten(2).flatten(0, 1) @ pairs.T
            twist = twist.view(*shape, len(y)).permute(2, 0, 1)
            share = narrow.new_ones(shape[1])
            share[:bent] = 1.0 / 3.0
            half = half + share * twist
            by = by + twist
            pairs = (rest[:, :, None] * x[:, None]).flatten(1)
            by[..., :bent] += (self._across @ pairs.T).view(shape[0], bent, -1).permute(2, 0, 1)
        return self.offset + (half @ narrow[..., None])[..., 0], by

    @cached_property
    def _across(self) -> torch.Tensor:
        """Of the coordinates that bend most, by these and the others, (K R, (D - R) R)."""
        bent = self.twist.shape[2]
        own = 2.0 * self.twist[:, bent:].permute(0, 2, 1, 3)
        return own.flatten(2).flatten(0, 1).contiguous()

    def log_prob(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value (N,) and slope (N, D) at points (N, D)."""
        at, by = self.residuals(y)
        curved = y @ self.curve
        value = self.top + y @ self.linear + 0.5 * (curved * y).sum(1)
        value = value - 0.5 * at.square().sum(1, dtype=_WIDE)
        pull = (at[:, None] @ by)[:, 0].to(_WIDE)
        return value, self.linear + curved - pull


def _through(
    y: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, bent: int, ridge: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parabolas through derivatives (N, D, K) of K functions at points (N, D) of some weight.

    Returns
    -------
    slope, bend, twist : tensor, shape (D, K), (D, D, K), (D, R, R, K)
        At y = 0: the values, their derivatives, and half of their second derivatives by the
        first R coordinates; symmetric, as derivatives are.
    """
    size = y.shape[1]
    i, j = torch.triu_indices(bent, bent)
    terms = torch.cat([torch.ones_like(y[:, :1]), y, y[:, i] * y[:, j]], 1)
    own = terms * weight[:, None]
    # second derivatives are thought to be small: as if a lesson or so had said so
    lift = terms.new_full((terms.shape[1],), ridge) * weight.square().sum()
    lift[0] = 0.0
    lift[1 + size :] *= 3.0
    found = torch.linalg.solve(own.T @ terms + torch.diag(lift), own.T @ values.flatten(1))
    found = found.view(-1, *values.shape[1:])
    bend = found[1 : 1 + size]
    twist = values.new_zeros((bent, bent, *values.shape[1:]))
    twist[i, j] += 0.5 * found[1 + size :]
    twist[j, i] += 0.5 * found[1 + size :]
    twist = twist.movedim(2, 0)  # (D, R, R, K)
    inner = twist[:bent]
    twist[:bent] = (inner + inner.transpose(0, 1) + inner.transpose(0, 2)) / 3.0
    return found[0], 0.5 * (bend + bend.transpose(0, 1)), twist


def _principal(
    residuals: torch.Tensor, by: torch.Tensor, weight: torch.Tensor, count: int
) -> torch.Tensor:
    """The directions (K, count) along which residuals (N, K) vary most, and their mean."""
    own = by * weight.to(by).sqrt()[:, None, None]
    gram = torch.einsum("nik,nil->kl", own, own).to(_WIDE)
    mean = (weight.to(by) @ residuals).to(_WIDE)
    mean = mean / mean.norm().clamp_min(1e-12)
    across = torch.eye(len(gram)).to(gram) - mean[:, None] * mean
    _, ways = torch.linalg.eigh(across @ gram @ across)
    axes = torch.cat([mean[:, None], ways.flip(1)[:, : max(1, count - 1)]], 1)
    return axes.to(by)


class _Teacher:
    """Asks a density about one mode of one problem, and makes what it says a `Surrogate`."""

    def __init__(self, target: Expandable, row: int, frame: _Frame, streams: Streams) -> None:
        self.target, self.frame, self.streams = target, frame, streams
        self.row = torch.tensor([row], device=frame.centre.device)
        self.reference = target.model_at(frame.centre[None], self.row)
        self.lessons: _Lessons | None = None
        self._enough, self._only = 0, torch.zeros(1, dtype=torch.long)
        self.leap = _LEAP

    def teach(self) -> Surrogate:
        """From the normal approximation; the frame moves to where the stand-ins lead."""
        size = len(self.frame.centre)
        made = self.learn(self.frame.place(self._normal(size + 10)))
        for turn in range(1, _MOST_ROUNDS):
            if self._enough < _FEWEST:
                break
            y, leads = self._run(made, 2 * size)
            self._reframe(leads)
            before, made = made, self.learn(made.frame.place(y))
            if turn + 1 >= _LEAST_ROUNDS and self._surprise(before) < _GOOD:
                break
        return made

    def learn(self, v: torch.Tensor) -> Surrogate:
        """By lessons at points (N, D) too."""
        known = 0 if self.lessons is None else len(self.lessons.v)
        for some in v.split(self.target.window):
            part = self._ask(some)
            self.lessons = part if self.lessons is None else self.lessons.joined(part)
        self._enough = len(self.lessons.v) - known
        if self._enough < _FEWEST:
            return Surrogate.normal(self.frame, torch.zeros(()).to(v))
        return Surrogate.fitted(self.frame, self.lessons, self.lessons.weights(self._enough))

    def _surprise(self, before: Surrogate) -> float:
        """Half of the width that holds 68 % of what an earlier stand-in did not know."""
        v = self.lessons.v[-self._enough :]
        off = self.lessons.log_prob[-len(v) :] - before.log_prob(before.frame.whiten(v))[0]
        low, high = off.quantile(off.new_tensor([0.16, 0.84]))
        return 0.5 * float(high - low)

    def _ask(self, v: torch.Tensor) -> _Lessons:
        rows = self.row.expand(len(v))
        said = self.target.expanded(v, rows, self.reference.expand(len(v), -1))
        good = torch.isfinite(said[0]) & torch.isfinite(said[1]).all(1)
        log_prob, slope, residuals, by = (part[good] for part in said)
        if self.lessons is None:
            self._choose(residuals, by)
        return _Lessons(v[good], log_prob, slope, residuals @ self._axes, by @ self._axes)

    def _choose(self, residuals: torch.Tensor, by: torch.Tensor) -> None:
        """The directions that residuals (N, P) span, as do their derivatives, nearly."""
        size = by.shape[1]
        count = min(_DIRECTIONS * size, residuals.shape[1])
        by = torch.einsum("di,ndp->nip", self.frame.root.to(by), by).flatten(0, 1)
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(max(1, count - 1), len(by), generator=generator).to(by)
        mean = residuals.mean(0) if len(residuals) else residuals.new_ones(residuals.shape[1])
        self._axes = torch.linalg.qr(torch.cat([mean[None], mix @ by]).T)[0]

    def _normal(self, count: int) -> torch.Tensor:
        return self.streams.normal(self._only, count, len(self.frame.centre))[0].to(self.frame.root)

    def _run(self, made: Surrogate, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends (count, D) of chains on a stand-in, and places (N, D) by which they came."""
        y, leads = 0.5 * self._normal(count), []
        value, slope = made.log_prob(y)
        for turn in range(_BURN):
            momentum = self._normal(count)
            draw = self.streams.uniform(self._only, count + 1)[0].to(y)
            leap = self.leap * (0.8 + 0.4 * draw[:1])
            end, own, by, kinetic = _trajectory(made.log_prob, y, slope, momentum, leap)
            chance = torch.exp((own - value + kinetic).nan_to_num(nan=-torch.inf).clamp_max(0.0))
            take = draw[1:] < chance
            y = torch.where(take[:, None], end, y)
            value, slope = torch.where(take, own, value), torch.where(take[:, None], by, slope)
            if 2 * turn < _BURN:
                factor = np.exp(0.7 * (float(chance.mean()) - _ACCEPTANCE))
                self.leap = float(np.clip(self.leap * factor, 0.02, 0.5))
            else:
                leads.append(made.frame.place(y))
        return y, torch.cat(leads)

    def _reframe(self, v: torch.Tensor) -> None:
        """Move the frame to points (N, D), a little widened."""
        offset = v - v.mean(0)
        cov = 0.95 * offset.T @ offset / len(v) + 0.05 * self.frame.root @ self.frame.root.T
        if torch.isfinite(cov).all():
            self.frame = _Frame.about(v, cov)

    def mass(self) -> float:
        """ln of the probability of the mode, roughly: the mean of the density, and the volume."""
        if self._enough < _FEWEST:
            return -np.inf
        latest = self.lessons.log_prob[-2 * len(self.frame.centre) :]
        return float(latest.mean() + self.frame.log_volume())


def _trajectory(
    log_prob: Callable, y: torch.Tensor, slope: torch.Tensor, momentum: torch.Tensor, leap
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """End of a trajectory (..., D), density and slope there, and the kinetic energy lost."""
    kinetic = 0.5 * momentum.square().sum(-1)
    momentum = momentum + 0.5 * leap * slope
    for turn in range(_LEAPS):
        y = y + leap * momentum
        value, slope = log_prob(y)
        momentum = momentum + (1.0 if turn + 1 < _LEAPS else 0.5) * leap * slope
    return y, value, slope, kinetic - 0.5 * momentum.square().sum(-1)


@dataclass
class Mode:
    """What is known of a mode, and who to ask for more."""

    surrogate: Surrogate
    teacher: _Teacher

    @property
    def frame(self) -> _Frame:
        return self.surrogate.frame


def _distinct(modes: list[Mode], least: float) -> list[Mode]:
    """Those that are worth something, and are not another one."""
    mass = [mode.teacher.mass() for mode in modes]
    kept: list[Mode] = []
    for i in sorted(range(len(modes)), key=lambda i: -mass[i]):
        new = all(modes[i].frame.apart(other.frame) > _SAME for other in kept)
        if not kept or (new and mass[i] > max(mass) - least):
            kept.append(modes[i])
    return kept


class _Walkers:
    """Chains of some problems, as `run_chains` has them."""

    def __init__(
        self,
        target: Expandable,
        modes: list[list[Mode]],
        rows: torch.Tensor,
        chains: int,
        streams: Streams,
        inside: Callable | None,
    ) -> None:
        self.target, self.rows, self.streams, self.inside = target, rows, streams, inside
        self.modes = modes
        g, device = len(rows), rows.device
        self._stack()
        size = self.centre.shape[2]
        self.accepted = torch.full((g,), 0.5, dtype=_WIDE)
        # chains start on the stand-ins, from all modes
        self.at = torch.arange(chains, device=device) % self.count[:, None]
        self.y = 0.5 * streams.normal(rows, chains, size).to(self.centre)
        self.value, self.slope = self._stand_in(self.at, self.y)
        for _ in range(_BURN):
            self._sub_chain()
        self.v = self._place(self.at, self.y)
        self.log_prob = self._density(self.v)

    def _stack(self) -> None:
        """Frames of all modes (g, A, ...), of which each problem has ``count`` (g,)."""
        device = self.rows.device
        self.count = torch.tensor([len(own) for own in self.modes], device=device)
        most = max([len(own) for own in self.modes], default=1)
        frames = [[(own + own[:1] * most)[k].frame for k in range(most)] for own in self.modes]
        if not frames:
            return
        self.centre = torch.stack([torch.stack([f.centre for f in own]) for own in frames])
        self.root = torch.stack([torch.stack([f.root for f in own]) for own in frames])
        self.inverse = torch.stack([torch.stack([f.inverse for f in own]) for own in frames])
        self.log_volume = torch.linalg.slogdet(self.root)[1]
        leap = [min(mode.teacher.leap for mode in own) for own in self.modes]
        self.leap = torch.tensor(leap, dtype=_WIDE, device=device)

    def _chosen(self, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Of values (g, A, ...) those of modes (g, C)."""
        return values[torch.arange(len(values), device=at.device)[:, None], at]

    def _place(self, at: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Points (g, C, D) of coordinates of modes."""
        v = torch.empty_like(y)
        for k in range(self.centre.shape[1]):
            own = self.centre[:, k, None] + y @ self.root[:, k].transpose(1, 2)
            v = torch.where((at == k)[..., None], own, v)
        return v

    def _ruled(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mode that rules at points (g, C, D), (g, C), and coordinates there."""
        best = at = y = None
        for k in range(self.centre.shape[1]):
            own = (v - self.centre[:, k, None]) @ self.inverse[:, k].transpose(1, 2)
            near = -0.5 * own.square().sum(2) - self.log_volume[:, k, None]
            near = torch.where((k < self.count)[:, None], near, -torch.inf)
            if best is None:
                best, y, at = near, own, torch.zeros_like(near, dtype=torch.long)
                continue
            nearer = near > best
            best, at = torch.where(nearer, near, best), torch.where(nearer, k, at)
            y = torch.where(nearer[..., None], own, y)
        return at, y

    def _allowed(self, at: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Whether modes rule at their coordinates (g, C, D), and these are inside."""
        if self.inside is None and self.centre.shape[1] == 1:
            return torch.ones_like(at, dtype=torch.bool)
        v = self._place(at, y)
        good = torch.ones_like(at, dtype=torch.bool)
        if self.inside is not None:
            good = self.inside(v.flatten(0, 1), self._each(at)).view(at.shape)
        if self.centre.shape[1] > 1:
            good = good & (self._ruled(v)[0] == at)
        return good

    def _each(self, at: torch.Tensor) -> torch.Tensor:
        return self.rows.repeat_interleave(at.shape[1])

    def _density(self, v: torch.Tensor) -> torch.Tensor:
        each = self.rows.repeat_interleave(v.shape[1])
        return self.target.log_prob(v.flatten(0, 1), each).view(v.shape[:2])

    def _stand_in(self, at: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value (g, C) and slope (g, C, D) of the stand-ins."""
        value, slope = torch.empty_like(y[..., 0]), torch.empty_like(y)
        for i, own in enumerate(self.modes):
            for k, mode in enumerate(own):
                here = slice(None) if len(own) == 1 else torch.nonzero(at[i] == k)[:, 0]
                if len(own) > 1 and not len(here):
                    continue
                value[i, here], slope[i, here] = mode.surrogate.log_prob(y[i, here])
        return value, slope

    # -- steps on the stand-ins: all leave their distribution as it is, forwards and backwards --

    def _jump(self) -> None:
        """To another mode, at the same coordinates."""
        _, chains = self.at.shape
        if self.centre.shape[1] == 1:
            return
        draw = self.streams.uniform(self.rows, chains, 2).to(self.y)
        others = (self.count - 1).clamp_min(1)[:, None]
        step = 1 + (draw[..., 0] * others).floor().long().clamp_max(others - 1)
        at = torch.remainder(self.at + step, self.count[:, None])
        value, slope = self._stand_in(at, self.y)
        volume = self._chosen(self.log_volume, at) - self._chosen(self.log_volume, self.at)
        ratio = torch.nan_to_num(value - self.value + volume, nan=-torch.inf)
        take = (draw[..., 1] < torch.exp(ratio.clamp_max(0.0))) & self._allowed(at, self.y)
        self._take(take, at, self.y, value, slope)

    def _glide(self) -> None:
        """Along a Hamiltonian trajectory within a mode (Duane et al. 1987)."""
        _, chains, size = self.y.shape
        momentum = self.streams.normal(self.rows, chains, size).to(self.y)
        draw = self.streams.uniform(self.rows, chains + 1).to(self.y)
        leap = (self.leap * (0.8 + 0.4 * draw[:, 0]))[:, None, None]
        y, value, slope, kinetic = _trajectory(
            lambda y: self._stand_in(self.at, y), self.y, self.slope, momentum, leap
        )
        ratio = torch.nan_to_num(value - self.value + kinetic, nan=-torch.inf)
        take = (draw[:, 1:] < torch.exp(ratio.clamp_max(0.0))) & self._allowed(self.at, y)
        self._take(take, self.at, y, value, slope)

    def _take(self, take, at, y, value, slope) -> None:
        self.at, self.value = torch.where(take, at, self.at), torch.where(take, value, self.value)
        self.y = torch.where(take[..., None], y, self.y)
        self.slope = torch.where(take[..., None], slope, self.slope)

    def _sub_chain(self) -> None:
        """Jumps and trajectories, in an order that is the same backwards."""
        for _ in range(_SUB):
            self._jump()
            self._glide()
        self._jump()

    def evidence(self, at: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """ln of the integral of the stand-ins and its variance (g,), of modes of draws (g, S)."""
        most = self.centre.shape[1]
        share = torch.stack([(at == k).double().mean(1) for k in range(most)], 1)
        cov = self.root @ self.root.transpose(2, 3)
        parts = [Proposal.from_moments(self.centre[:, k], cov[:, k]) for k in range(most)]
        mixture = Mixture.of(parts, torch.log(share.clamp_min(1e-3)))
        here = torch.arange(len(self.rows), device=at.device)
        v = mixture.draw(self.streams.part(self.rows.tolist()), here, _CHEAP)
        ruled, y = self._ruled(v)
        value = self._stand_in(ruled, y)[0]
        if self.inside is not None:
            good = self.inside(v.flatten(0, 1), self._each(ruled)).view(ruled.shape)
            value = torch.where(good, value, -torch.inf)
        drawn = weigh(v, value, mixture.log_density(v, here))
        return drawn.log_evidence, drawn.log_evidence_err**2

    # -- what `run_chains` asks ----------------------------------------------------------------

    def advance(self, turn: int, *, adapt: bool) -> None:
        """Follow the stand-ins, and let the density decide."""
        if not len(self.rows):
            return
        if turn % _NEAR == 0:
            self._stroll()
            return
        before = self.at, self.y, self.value, self.slope
        self._sub_chain()
        v = self._place(self.at, self.y)
        log_prob = self._density(v)
        ratio = (log_prob - self.value) - (self.log_prob - before[2])
        take, chance = self._decide(ratio)
        self.accepted = 0.95 * self.accepted + 0.05 * chance.mean(1).cpu()
        self._go(take, v, log_prob)
        self._take(~take, *before)

    def _stroll(self) -> None:
        """A small step that asks no stand-in: from where it has too little.

        Of a share of the frame's normal distribution (Cotter et al. 2013, Stat. Sci. 28, 424).
        """
        _, chains, size = self.y.shape
        share = _STROLL * self.streams.uniform(self.rows, chains, 1).to(self.y)
        fresh = self.streams.normal(self.rows, chains, size).to(self.y)
        y = torch.sqrt(1.0 - share**2) * self.y + share * fresh
        v = self._place(self.at, y)
        log_prob = self._density(v)
        ratio = log_prob - self.log_prob + 0.5 * (y.square() - self.y.square()).sum(2)
        ratio = torch.where(self._allowed(self.at, y), ratio, -torch.inf)
        take, _ = self._decide(ratio)
        self._go(take, v, log_prob)
        self._take(take, self.at, y, *self._stand_in(self.at, y))

    def _decide(self, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which steps are taken, and the chance that each had."""
        chance = torch.exp(torch.nan_to_num(ratio, nan=-torch.inf).clamp_max(0.0))
        return self.streams.uniform(self.rows, ratio.shape[1]).to(chance) < chance, chance

    def _go(self, take: torch.Tensor, v: torch.Tensor, log_prob: torch.Tensor) -> None:
        self.v = torch.where(take[..., None], v, self.v)
        self.log_prob = torch.where(take, log_prob, self.log_prob)

    def acceptance(self) -> np.ndarray:
        """Share of the steps that the density accepts, (g,)."""
        return self.accepted.numpy()

    def rescue(self) -> None:
        """A chain that starts where there is no density starts beside one that does not."""
        best = self.log_prob.argmax(1)
        lost = ~torch.isfinite(self.log_prob)
        every = torch.arange(len(best), device=best.device)
        for name in ("at", "y", "value", "slope", "v", "log_prob"):
            own = getattr(self, name)
            there = own[every, best][:, None].expand_as(own)
            pick = lost if own.dim() == 2 else lost[..., None]
            setattr(self, name, torch.where(pick, there, own))

    def part(self, index: torch.Tensor) -> _Walkers:
        """The chains of some problems."""
        other = object.__new__(_Walkers)
        other.target, other.streams, other.inside = self.target, self.streams, self.inside
        other.modes = [self.modes[i] for i in index.tolist()]
        for name in ("rows", "at", "y", "value", "slope", "v", "log_prob", "accepted"):
            setattr(other, name, getattr(self, name)[index].clone())
        other._stack()
        return other

    def learn(self, draws: torch.Tensor) -> None:
        """More lessons, where the chains (g, C, T, D) have been, for the modes that they were in.

        Not of chains that have hardly moved.
        """
        for i, own in enumerate(self.modes):
            flat = draws[i].transpose(0, 1).flatten(0, 1)
            alone = self.part(torch.tensor([i], device=self.rows.device))
            at = alone._ruled(flat[None])[0][0]
            for k, mode in enumerate(own):
                here = flat[at == k]
                count = min(len(here), 2 * here.shape[1])
                if count < here.shape[1]:
                    continue
                some = torch.linspace(0, len(here) - 1, count).round().long()
                mode.teacher._reframe(here)
                own[k] = Mode(mode.teacher.learn(here[some]), mode.teacher)
        self._stack()
        self.at, self.y = self._ruled(self.v)
        self.value, self.slope = self._stand_in(self.at, self.y)


def learn_modes(
    target: Expandable, modes: Sequence[Proposal], rows: torch.Tensor, streams: Streams
) -> list[list[Mode]]:
    """Stand-ins for the density of every problem, at those of its modes that matter.

    Parameters
    ----------
    target : Expandable
    modes : sequence of Proposal
        Normal approximations at the modes, as far as they are known.
    rows : tensor of int, shape (g,)
        Problems.
    streams : Streams

    Returns
    -------
    list of list of Mode
        Those of each problem.
    """
    return [_learn_problem(target, modes, row, streams) for row in rows.tolist()]


def _learn_problem(target, modes: Sequence[Proposal], row: int, streams: Streams) -> list[Mode]:
    frames = [_Frame.of(mode, row) for mode in modes]
    place = torch.stack([frame.centre for frame in frames])
    height = target.log_prob(place, torch.full((len(place),), row, device=place.device))
    height = height + torch.stack([frame.log_volume() for frame in frames])
    known = []
    for frame, value in zip(frames, height.tolist(), strict=True):
        if frame is frames[0] or value > float(height.max()) - _NEVER:
            teacher = _Teacher(target, row, frame, streams.part([row]))
            known.append(Mode(teacher.teach(), teacher))
    return _distinct(known, _RARE)


def refine(modes: list[Mode], v: torch.Tensor, log_weight: torch.Tensor) -> None:
    """Learn more of the modes of one problem, in place: there above all where they had too little.

    Parameters
    ----------
    modes : list of Mode
    v : tensor, shape (S, D)
        Draws from the stand-ins.
    log_weight : tensor, shape (S,)
        Their weights.
    """
    size = v.shape[1]
    near = [mode.frame.whiten(v).square().sum(1) + 2.0 * mode.frame.log_volume() for mode in modes]
    at = torch.stack(near).argmin(0)
    for k, mode in enumerate(modes):
        own = torch.nonzero((at == k) & torch.isfinite(log_weight))[:, 0]
        if len(own) < size:
            continue
        order = own[log_weight[own].argsort(descending=True, stable=True)]
        others = order[size:]
        others = others[torch.linspace(0, len(others) - 1, min(size, len(others))).long()]
        some = torch.cat([order[:size], others])
        modes[k] = Mode(mode.teacher.learn(v[some]), mode.teacher)


def sample_through_surrogates(
    target: Expandable,
    modes: list[list[Mode]],
    rows: torch.Tensor,
    streams: Streams,
    *,
    chains: int = 4,
    draws: int = 500,
    warm_up: int = 20,
    blocks: int = 3,
    rhat: float = 1.01,
    ess: float = 400.0,
    inside: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    summarise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Chains:
    """Markov chains of every problem through stand-ins for its density.

    Parameters
    ----------
    target : Expandable
    modes : list of list of Mode
        From `learn_modes`; between blocks of draws, never while chains run, more is learned.
    rows : tensor of int, shape (g,)
        Problems.
    streams : Streams
    chains : int, optional
        Of each problem.
    draws, warm_up, blocks, rhat, ess, summarise
        As for `sample_chains`.
    inside : callable, optional
        From points (M, D) and rows (M,) to whether they count, (M,): of what repeats itself, once.

    Returns
    -------
    Chains
        In the order of ``rows``.
    """
    walkers = _Walkers(target, modes, rows, chains, streams, inside)
    return run_chains(
        walkers,
        draws=draws,
        warm_up=warm_up,
        blocks=blocks,
        rhat=rhat,
        ess=ess,
        summarise=summarise,
    )


def weigh_surrogates(
    target: Expandable,
    modes: list[list[Mode]],
    rows: torch.Tensor,
    count: int,
    streams: Streams,
    *,
    inside: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Weighted:
    """Draws from the stand-ins, weighted by the density.

    Parameters
    ----------
    target, modes, rows, streams, inside
        As for `sample_through_surrogates`.
    count : int
        Of each problem.

    Returns
    -------
    Weighted
        The evidence is that of the stand-ins, by draws that cost little, times the mean weight.
    """
    walkers = _Walkers(target, modes, rows, min(_MANY, count), streams, inside)
    parts, values, at = [], [], []
    for _ in range(-(-count // walkers.y.shape[1])):
        walkers._sub_chain()
        parts.append(walkers._place(walkers.at, walkers.y))
        values.append(walkers.value)
        at.append(walkers.at)
    v, value = torch.cat(parts, 1)[:, :count], torch.cat(values, 1)[:, :count]
    log_prob = walkers._density(v)
    log_evidence, variance = walkers.evidence(torch.cat(at, 1))
    drawn = weigh(v, log_prob, value)
    drawn.log_evidence += log_evidence
    drawn.log_evidence_err = np.sqrt(drawn.log_evidence_err**2 + variance)
    return drawn
