"""Draws from the posteriors of a batch of stamps: what the fitters of `galmorph.sampling` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galmorph._batchfit import BatchSetup, one_thread
from galmorph._target import GalaxyTarget, Target
from galmorph.inference.mcmc import (
    Chains,
    Mixture,
    Proposal,
    Streams,
    Weighted,
    adapt_mixture,
    climb,
    importance_draws,
    resample,
    sample_chains,
)
from galmorph.inference.nested import nested_sampling
from galmorph.inference.surrogate import (
    Mode,
    learn_modes,
    refine,
    sample_through_surrogates,
    weigh_surrogates,
)
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.psf import PSF

if TYPE_CHECKING:
    from galmorph.results import FitResult

__all__ = ["Start", "importance", "log_posterior", "make_target", "markov_chains", "nested"]

_WIDE = torch.float64
# with more coordinates than this, draws from the normal approximation say little of its shape
_ADAPTABLE = 16
# draws by which proposals are fitted, round after round: of one component, of several, and of
# those whose weights cannot be trusted yet
_PILOT = (120, 160, 240, 400)
_PILOT_OF_MANY = (500, 500, 500, 500, 500, 500)
_AGAIN = (1000, 1000, 1000)
# blocks of chains where a step takes milliseconds: what has not converged then is flagged
_MOST_BLOCKS = 3
# galaxies that are sampled together where much is known of each
_TOGETHER = 16
# how often weighted draws may be made until their weights can be trusted
_ATTEMPTS = 3
# minus the logarithm of a likelihood that is nothing
_NOTHING = 1e300
#: Pareto k above which weights must not be trusted (Vehtari et al. 2024).
KHAT = 0.7
_KINDS = {0: "none", 1: "constant", 3: "tilted"}


def make_target(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    params: np.ndarray,
    *,
    noise: Any = None,
) -> Target:
    """The posterior density of a batch of galaxies near ``params`` (B, P), in stamp pixels."""
    kind = GalaxyTarget
    if isinstance(setup.model, LearnedGalaxy2D):
        from galmorph._learned_target import LearnedTarget

        kind = LearnedTarget
    return kind(setup, data, inv_sigma, psf, params, noise=noise)


@dataclass
class Start:
    """Where sampling starts: a target, fitted parameters, and random numbers.

    Attributes
    ----------
    target : Target
    v : tensor, shape (B, D)
        The fitted coordinates.
    proposal : Proposal
        The normal approximation there.
    mixture : Mixture
        Normal approximations at all modes that are known.
    streams : Streams
    adapted : bool
        Whether the mixture follows the target already.
    known : dict
        Stand-ins for the density of galaxies.
    """

    target: Target
    v: torch.Tensor
    proposal: Proposal
    mixture: Mixture
    streams: Streams
    adapted: bool = False
    known: dict[int, list[Mode]] = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        target: Target,
        params: np.ndarray,
        background: np.ndarray,
        seeds: Sequence[Sequence[int]],
    ) -> Start:
        """From parameters (B, P) and backgrounds (B, nb)."""
        device = target.scale.device
        if isinstance(target, GalaxyTarget):
            target.settle(
                torch.as_tensor(params, dtype=_WIDE, device=device),
                torch.as_tensor(background, dtype=_WIDE, device=device),
            )
        v = _coordinates(target, params, background)
        v = _inside(target, v)
        proposal = Proposal.from_curvature(v, target.curvature(v))
        return cls(target, v, proposal, Mixture.of([proposal]), Streams(seeds))

    @property
    def rows(self) -> torch.Tensor:
        """All galaxies."""
        return torch.arange(len(self.target), device=self.v.device)

    def part(self, rows: np.ndarray) -> Start:
        """Of some galaxies."""
        index = torch.as_tensor(rows, device=self.v.device)
        proposal = Proposal(self.proposal.centre[index], self.proposal.root[index])
        return Start(
            _Part(self.target, index),
            self.v[index],
            proposal,
            self.mixture.part(index),
            self.streams.part(rows.tolist()),
            self.adapted,
            {i: self.known[row] for i, row in enumerate(rows.tolist()) if row in self.known},
        )

    def find_modes(self) -> None:
        """Add the modes that are reached from other starts to the mixture."""
        found, height = [self.proposal], [self.laplace_evidence(self.proposal)]
        for v in self.target.other_starts(self.v, self.streams):
            v = climb(self.target, v, inside=lambda v: _inside(self.target, v))
            own = Proposal.from_curvature(v, self.target.curvature(v))
            found.append(own)
            height.append(self.laplace_evidence(own))
        # half of the logarithm: what an approximation says of a volume may be far off
        log_share = 0.5 * torch.stack(height, 1)
        log_share = log_share - log_share.max(1, keepdim=True).values
        self.mixture = Mixture.of(found, log_share.nan_to_num(nan=-9.0).clamp_min(-3.0))

    def learned(self, rows: torch.Tensor) -> list[list[Mode]]:
        """Stand-ins for the density of galaxies, at each mode."""
        new = torch.as_tensor([r for r in rows.tolist() if r not in self.known], dtype=torch.long)
        if len(new):
            centre, root = _Turns(self).wrapped(self.mixture.centre), self.mixture.root
            modes = [Proposal(centre[:, k], root[:, k]) for k in range(centre.shape[1])]
            found = learn_modes(self.target, modes, new.to(rows.device), self.streams)
            self.known |= dict(zip(new.tolist(), found, strict=True))
        return [self.known[row] for row in rows.tolist()]

    def forget(self, rows: torch.Tensor) -> None:
        """Leave the stand-ins of some galaxies, which are large."""
        for row in rows.tolist():
            self.known.pop(row, None)

    def laplace_evidence(self, proposal: Proposal) -> torch.Tensor:
        """Logarithm of the integral of a mode, by its normal approximation, (B,)."""
        log_volume = torch.diagonal(proposal.root, dim1=1, dim2=2).log().sum(1)
        log_volume = log_volume + 0.5 * self.target.size * np.log(2 * np.pi)
        return self.target.log_prob(proposal.centre, self.rows) + log_volume

    def adapt(self) -> None:
        """Find other modes, and fit the mixture to a few rounds of weighted draws."""
        if self.adapted:
            return
        self.adapted = True
        self.find_modes()
        single = self.mixture.centre.shape[1] == 1
        if self.target.size <= _ADAPTABLE:
            pilot = _PILOT if single else _PILOT_OF_MANY
            adapt_mixture(self.target, self.mixture, self.rows, pilot, self.streams)


class _Part:
    """Some galaxies of a target."""

    def __init__(self, target: Target, index: torch.Tensor) -> None:
        self._target, self._index = target, index
        self.size, self.axes, self.scale = target.size, target.axes, target.scale[index]

    def __len__(self) -> int:
        return len(self._index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def log_prob(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._target.log_prob(v, self._index[rows])

    def log_prob_and_slope(self, v: torch.Tensor, rows: torch.Tensor):
        return self._target.log_prob_and_slope(v, self._index[rows])

    def model_at(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._target.model_at(v, self._index[rows])

    def expanded(self, v: torch.Tensor, rows: torch.Tensor, reference: torch.Tensor):
        return self._target.expanded(v, self._index[rows], reference)

    def to_params(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._target.to_params(v, self._index[rows])


def _coordinates(target: Target, params: np.ndarray, background: np.ndarray) -> torch.Tensor:
    device = target.scale.device
    values = torch.as_tensor(params, dtype=_WIDE, device=device)
    if hasattr(target, "of_galaxies"):
        values = target.of_galaxies(values)
    return target.from_params(values, torch.as_tensor(background, dtype=_WIDE, device=device))


def _inside(target: Target, v: torch.Tensor) -> torch.Tensor:
    """A fit may end on a bound: go a little inwards from there."""
    v = v.clone()
    for axis in target.axes:
        if axis.kind in ("flux", "latent", "angle") or axis.priors[0] is None:
            continue
        low, high = axis.priors[0].support
        if axis.kind == "disc":
            g = v[:, axis.coordinates].norm(dim=1, keepdim=True).clamp_min(1e-12)
            ends = 1.0 / target._powers(axis)[:, None]
            inner, outer = max(low, 0) ** ends + 1e-3, max(high, 0) ** ends * 0.999
            limit = torch.minimum(torch.maximum(g, inner), outer)
            v[:, axis.coordinates] *= limit / g
            continue
        if axis.kind == "log":
            low, high = np.log(max(low, 1e-6)), np.log(high)
        room = min(1e-3, 0.01 * (high - low)) if np.isfinite(high - low) else 1e-3
        v[:, axis.coordinates] = v[:, axis.coordinates].clamp(low + room, high - room)
    return v


def _to_params(target: Target, v: torch.Tensor, rows: torch.Tensor | None = None) -> np.ndarray:
    """Parameters and background (b, S, P + nb) of coordinates (b, S, D) of galaxies (all)."""
    batch, count, size = v.shape
    rows = torch.arange(batch, device=v.device) if rows is None else rows
    rows = rows.repeat_interleave(count)
    values = target.to_params(v.reshape(-1, size), rows)
    if hasattr(target, "to_galaxies"):
        values = target.to_galaxies(values)
    return values.view(batch, count, -1).cpu().numpy()


@one_thread()
@torch.no_grad()
def importance(start: Start, count: int, *, draws: bool = True) -> dict[str, np.ndarray]:
    """Weighted draws: samples (B, S, P + nb), weights (B, S), evidence, and what it is worth."""
    start.adapt()
    if has_latents(start.target):
        drawn = _weighted(start, count)
    else:
        drawn = importance_draws(start.target, start.mixture, start.rows, count, start.streams)
    if start.target.size <= _ADAPTABLE:
        for _ in range(_ATTEMPTS - 1):
            again = start.rows[torch.as_tensor(~(drawn.khat <= KHAT), device=start.rows.device)]
            if not len(again):
                break
            adapt_mixture(start.target, start.mixture, again, _AGAIN, start.streams)
            drawn.put(
                again, importance_draws(start.target, start.mixture, again, count, start.streams)
            )
    found = {}
    if draws:
        weights = np.exp(drawn.log_weight.cpu().numpy())
        found["samples"] = _to_params(start.target, drawn.v)
        found["weights"] = np.where(np.isfinite(weights), weights, 0.0)
    return found | {
        "khat": drawn.khat,
        "ess": drawn.ess,
        "log_evidence": drawn.log_evidence,
        "log_evidence_err": drawn.log_evidence_err,
    }


@one_thread()
@torch.no_grad()
def markov_chains(
    start: Start, *, chains: int, draws: int, blocks: int, rhat: float, ess: float, keep: int
) -> dict[str, np.ndarray]:
    """Draws of chains: samples (B, keep, P + nb), chain after chain, rhat and ess.

    Those of galaxies with many coordinates are run three times at most.
    """
    if has_latents(start.target):
        blocks = min(blocks, _MOST_BLOCKS)
    asked = {"draws": draws, "blocks": blocks, "rhat": rhat, "ess": ess}
    asked["summarise"] = lambda v, at: _told(start.target, v)
    made = (_through_surrogates if has_latents(start.target) else _directly)(start, chains, asked)
    per_chain = max(1, keep // chains)
    at = np.unique(np.linspace(0, draws - 1, min(per_chain, draws)).round().astype(int))
    v = made.v[:, :, at].flatten(1, 2)
    return {
        "samples": _to_params(start.target, v),
        "rhat": made.rhat,
        "ess": made.ess,
        "acceptance": made.acceptance,
    }


def has_latents(target: Target) -> bool:
    """Whether coordinates are many, as of learned galaxies."""
    latent = any(axis.kind == "latent" for axis in target.axes)
    return latent and target.size > _ADAPTABLE


def _directly(start: Start, chains: int, asked: dict[str, Any]) -> Chains:
    """Chains by Hamiltonian trajectories and what importance sampling has found."""
    start.adapt()
    frame = start.mixture.moments() if start.target.size <= _ADAPTABLE else start.proposal
    drawn = importance_draws(start.target, start.mixture, start.rows, _PILOT[-1], start.streams)
    places = resample(drawn, start.rows, chains, start.streams)
    return sample_chains(start.target, frame, places, start.streams, mixture=start.mixture, **asked)


def _through_surrogates(start: Start, chains: int, asked: dict[str, Any]) -> Chains:
    """Chains through stand-ins for the density, of some galaxies at a time."""
    start.adapt()
    inside = _Turns(start).inside
    parts = []
    for rows in start.rows.split(_TOGETHER):
        modes = start.learned(rows)
        pilot = weigh_surrogates(start.target, modes, rows, _PILOT[0], start.streams, inside=inside)
        for i in np.flatnonzero(pilot.ess < 0.5 * _PILOT[0]):
            refine(modes[i], pilot.v[i], pilot.log_weight[i])
        own = sample_through_surrogates(
            start.target, modes, rows, start.streams, chains=chains, inside=inside, **asked
        )
        start.forget(rows)
        parts.append(own)
    return _joined(parts)


def _weighted(start: Start, count: int) -> Weighted:
    """Draws from stand-ins for the density, of some galaxies at a time."""
    inside = _Turns(start).inside
    parts = []
    for rows in start.rows.split(_TOGETHER):
        modes = start.learned(rows)
        own = weigh_surrogates(start.target, modes, rows, count, start.streams, inside=inside)
        for _ in range(_ATTEMPTS - 1):
            again = torch.nonzero(torch.as_tensor(~(own.khat <= KHAT)))[:, 0].to(rows.device)
            if not len(again):
                break
            bad = [modes[i] for i in again.tolist()]
            for i, mode in zip(again.tolist(), bad, strict=True):
                refine(mode, own.v[i], own.log_weight[i])
            new = weigh_surrogates(
                start.target, bad, rows[again], count, start.streams, inside=inside
            )
            own.put(again, new)
        start.forget(rows[torch.as_tensor(own.khat <= KHAT, device=rows.device)])
        parts.append(own)
    return _joined(parts)


def _joined(parts: list[Any]) -> Any:
    """One of many, whose fields are arrays or tensors of some galaxies."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    join = [torch.cat if isinstance(own[0], torch.Tensor) else np.concatenate for own in fields]
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return type(parts[0])(*(put(own) for put, own in zip(join, fields, strict=True)))


class _Turns:
    """One turn of angles that are as likely after another one: a quarter before the fit and on."""

    def __init__(self, start: Start) -> None:
        self.angles = [
            c
            for axis in start.target.axes
            if axis.kind == "angle" and not start.target._needs_value(axis)
            for c in axis.coordinates
        ]
        self.first = start.v[:, self.angles] - 0.5 * np.pi

    def wrapped(self, v: torch.Tensor) -> torch.Tensor:
        """The same places (B, K, D) within the turn."""
        v, first = v.clone(), self.first[:, None]
        v[..., self.angles] = first + torch.remainder(v[..., self.angles] - first, 2 * np.pi)
        return v

    def inside(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Whether points (M, D) are within it."""
        on = v[:, self.angles] - self.first[rows]
        return ((on >= 0) & (on < 2 * np.pi)).all(1)


def _told(target: Target, v: torch.Tensor) -> torch.Tensor:
    """What must have converged: an angle as a direction, all else as it is."""
    angles = [c for axis in target.axes if axis.kind == "angle" for c in axis.coordinates]
    if not angles:
        return v
    others = [c for c in range(v.shape[1]) if c not in angles]
    turned = v[:, angles]
    return torch.cat([v[:, others], torch.cos(turned), torch.sin(turned)], 1)


@one_thread()
@torch.no_grad()
def ensembles(
    start: Start, *, walkers: int, steps: int, blocks: int, rhat: float, ess: float, keep: int
) -> dict[str, np.ndarray]:
    """As `markov_chains`, by emcee: all walkers of all galaxies are one ensemble.

    Walkers stretch only towards walkers of their own galaxy.
    """
    import emcee

    from galmorph.inference.diagnostics import effective_sample_size, split_rhat

    target, rows = start.target, start.rows
    count, size = len(target), target.size
    walkers = max(walkers, 2 * size + 2)
    walkers += walkers % 2  # half of each galaxy's walkers move at a time
    y = start.streams.normal(rows, walkers, size).to(start.v)
    places = start.proposal.place(0.7 * y, rows)
    each = rows.repeat_interleave(walkers)
    for _ in range(20):  # walkers that start where there is no density come closer to the fit
        known = torch.isfinite(target.log_prob(places.flatten(0, 1), each)).view(places.shape[:2])
        if known.all():
            break
        middle = start.v[:, None].expand_as(places)
        places = torch.where(known[..., None], places, 0.5 * (places + middle))

    def log_prob(v: np.ndarray, at: np.ndarray) -> np.ndarray:
        return target.log_prob(torch.as_tensor(v, device=start.v.device), at).cpu().numpy()

    state = _State(places.flatten(0, 1).cpu().numpy(), each, log_prob)
    seed = int(start.streams.uniform(rows[:1], 1)[0, 0].item() * 2**31)
    sampler = emcee.EnsembleSampler(
        count * walkers, size, state.log_prob, moves=_emcee_moves(count), vectorize=True
    )
    sampler._random.seed(seed)
    kept, worst, least = None, np.full(count, np.inf), np.zeros(count)
    current = state.coords
    for block in range(blocks):
        current = sampler.run_mcmc(current, steps * 2**block, skip_initial_state_check=True)
        chain = sampler.get_chain()[-steps * 2**block :]
        half = chain[len(chain) // 2 :].reshape(-1, count, walkers, size)
        stride = max(1, len(half) // 400)
        values = half[::stride].transpose(1, 3, 2, 0)
        flat = torch.as_tensor(values.transpose(0, 2, 3, 1).reshape(-1, size).copy())
        told = _told(target, flat).numpy().reshape(count, walkers, values.shape[-1], -1)
        told = told.transpose(0, 3, 1, 2)
        worst, least = split_rhat(told).max(1), effective_sample_size(told).min(1)
        kept = values
        if (worst <= rhat).all() and (least >= ess).all():
            break
    v = torch.as_tensor(kept.transpose(0, 2, 3, 1).reshape(count, -1, size).copy())
    at = np.linspace(0, v.shape[1] - 1, min(keep, v.shape[1])).round().astype(int)
    accepted = sampler.acceptance_fraction.reshape(count, walkers).mean(1)
    return {
        "samples": _to_params(target, v[:, at].to(start.v)),
        "rhat": worst,
        "ess": least,
        "acceptance": accepted,
    }


class _State:
    """Which galaxy each walker of an ensemble belongs to."""

    def __init__(self, coords: np.ndarray, each: torch.Tensor, log_prob: Any) -> None:
        self.coords, self._each, self._log_prob = coords, each, log_prob

    def log_prob(self, v: np.ndarray) -> np.ndarray:
        """Density of all walkers, or of every second one."""
        each = self._each
        if len(v) < len(each):  # half of each galaxy's walkers
            each = each[: 2 * len(v) : 2] if len(v) * 2 == len(each) else each[: len(v)]
        return self._log_prob(v, each)


def _emcee_moves(count: int) -> list[Any]:
    """Stretch and differential moves of the walkers of ``count`` galaxies, within each galaxy."""
    from emcee.moves import RedBlueMove

    class Within(RedBlueMove):
        """Walkers move towards walkers of their own galaxy; neighbours in the ensemble."""

        def __init__(self, count: int) -> None:
            self.count = count
            super().__init__(nsplits=2, randomize_split=False)

        def _own(self, walkers: np.ndarray) -> np.ndarray:
            return walkers.reshape(self.count, -1, walkers.shape[-1])

    class Stretch(Within):
        """Goodman & Weare 2010 (Comm. App. Math. Comp. Sci. 5, 65)."""

        def get_proposal(self, s, c, random):
            own, others = self._own(s), self._own(np.concatenate(c))
            g, w, size = own.shape
            zz = (random.rand(g, w) + 1) ** 2 / 2.0
            at = random.randint(others.shape[1], size=(g, w))
            partner = np.take_along_axis(others, at[..., None], 1)
            moved = partner - (partner - own) * zz[..., None]
            return moved.reshape(s.shape), (size - 1.0) * np.log(zz).ravel()

    class Differential(Within):
        """ter Braak 2006 (Stat. Comput. 16, 239)."""

        def get_proposal(self, s, c, random):
            own, others = self._own(s), self._own(np.concatenate(c))
            g, w, size = own.shape
            first = random.randint(others.shape[1], size=(g, w))
            second = (first + random.randint(1, others.shape[1], size=(g, w))) % others.shape[1]
            step = np.take_along_axis(others, first[..., None], 1)
            step = step - np.take_along_axis(others, second[..., None], 1)
            gamma = 2.38 / np.sqrt(2 * size) * np.where(random.rand(g, w, 1) < 0.1, 2.0, 1.0)
            moved = own + gamma * step + 1e-5 * step * random.standard_normal(own.shape)
            return moved.reshape(s.shape), np.zeros(g * w)

    return [Stretch(count), Differential(count)]


@one_thread()
@torch.no_grad()
def nested(start: Start, seeds: Sequence[Sequence[int]], *, live: int, keep: int, dlogz: float):
    """Nested sampling of one galaxy after the other with dynesty: as `importance`."""
    target, found = start.target, []
    for row in start.rows.tolist():
        rng = np.random.default_rng(list(seeds[row]))
        where = torch.tensor([row], device=start.v.device)

        def log_likelihood(u: np.ndarray, where: torch.Tensor = where) -> np.ndarray:
            own = where.expand(len(u))
            value = target.log_likelihood(target.from_unit(u, own), own)
            return torch.nan_to_num(value, nan=-_NOTHING).clamp_min(-_NOTHING).cpu().numpy()

        run = nested_sampling(log_likelihood, target.size, rng=rng, live=live, dlogz=dlogz)
        at = rng.choice(len(run.u), keep, p=np.exp(run.log_weight))
        v = target.from_unit(run.u[at], where.expand(keep))
        values = _to_params(start.target, v[None], where)[0]
        found.append((values, run.log_evidence, run.log_evidence_err, run.ess))
    names = ("samples", "log_evidence", "log_evidence_err", "ess")
    return {
        name: np.array(part) for name, part in zip(names, zip(*found, strict=True), strict=True)
    }


# -- of results ----------------------------------------------------------------------------


def targets_of(
    result: FitResult, rows: np.ndarray | None = None, *, dtype: str = "float64"
) -> Iterator[tuple[np.ndarray, Target]]:
    """Targets of galaxies that were fitted (those that failed are left out).

    Parameters
    ----------
    result : FitResult
    rows : array of int, optional
        Which galaxies; all by default.
    dtype : {"float32", "float64"}, optional

    Yields
    ------
    rows : array of int
    target : Target
    """
    result._require_stamps()
    wanted = np.arange(len(result)) if rows is None else np.asarray(rows)
    for some in result._batches():
        some = some[np.isin(some, wanted) & ~result.failed[some]]
        if not len(some):
            continue
        batch = result.stamps.get(some)
        inv_sigma = np.where(result._left_out(some, batch.inv_sigma > 0), 0.0, batch.inv_sigma)
        params = _in_stamp(result, some)
        psf = batch.psf if batch.psf is not None else getattr(result.model, "psf", None)
        setup = BatchSetup(
            model=result.model,
            priors=result.priors,
            background=_KINDS[result.background.shape[1]],
            dtype=getattr(torch, dtype),
        )
        for part, own in by_psf(psf, len(some)):
            yield (
                some[part],
                make_target(
                    setup,
                    batch.data[part],
                    inv_sigma[part],
                    own,
                    params[part],
                    noise=result._noise(some[part]),
                ),
            )


def by_psf(psf: Any, count: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Galaxies whose PSFs are sampled alike, and these PSFs."""
    if not isinstance(psf, list):
        yield np.arange(count), psf
        return
    kinds: dict[Any, list[int]] = {}
    for i, p in enumerate(psf):
        key = None
        if p is not None:
            key = (p.oversampling, p.includes_pixel, p.shape[0] % 2, p.shape[1] % 2)
        kinds.setdefault(key, []).append(i)
    for key, rows in kinds.items():
        yield np.array(rows), None if key is None else [psf[i] for i in rows]


def _in_stamp(result: FitResult, rows: np.ndarray) -> np.ndarray:
    params = result.params[rows].copy()
    for axis, name in enumerate(("x_0", "y_0")):
        if name in result.param_names:
            params[:, result.param_names.index(name)] -= result.origin[rows, axis]
    return params


def evidence_of(
    result: FitResult,
    rows: np.ndarray,
    target: Target,
    seeds: Sequence[Sequence[int]],
    method: str,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the evidence (b,) and its error, of galaxies ``rows`` of a result."""
    with one_thread(), torch.no_grad():
        start = Start.at(target, _in_stamp(result, rows), result.background[rows], seeds)
    if method == "nested":
        found = nested(start, seeds, live=count, keep=100, dlogz=0.01)
        return found["log_evidence"], found["log_evidence_err"]
    if method == "importance":
        found = importance(start, count, draws=False)
        return found["log_evidence"], found["log_evidence_err"]
    with one_thread(), torch.no_grad():
        value = start.laplace_evidence(start.proposal)
    return value.cpu().numpy(), np.full(len(rows), np.nan)


@one_thread()
@torch.no_grad()
def log_posterior(result: FitResult, params: np.ndarray) -> np.ndarray:
    """Density (N, n) of parameters and background (N, n, P + nb), not normalised."""
    found = np.full(params.shape[:2], np.nan)
    size = len(result.param_names)
    for rows, target in targets_of(result):
        own = params[rows].copy()
        for axis, name in enumerate(("x_0", "y_0")):
            if name in result.param_names:
                column = result.param_names.index(name)
                own[..., column] -= result.origin[rows, None, axis]
        flat = torch.as_tensor(own.reshape(-1, own.shape[2]))
        at = torch.arange(len(rows)).repeat_interleave(own.shape[1])
        values, background = flat[:, :size], flat[:, size:]
        if hasattr(target, "of_galaxies"):
            values = target.of_galaxies(values)
        v = target.from_params(values, background, at)
        density = target.log_prob(v, at) - target.log_stretch(v, at)
        found[rows] = density.view(own.shape[:2]).numpy()
    return found
