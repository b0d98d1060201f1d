"""The posterior density of scenes, whose sources share their pixels, and draws from it.

Each source has the target of a single galaxy, which says where it walks, how it is drawn and what
its prior is; pixels, noise and background are those of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galmorph._batchfit import BatchSetup, one_thread
from galmorph._sampling import (
    _ADAPTABLE,
    KHAT,
    Start,
    has_latents,
    importance,
    make_target,
    markov_chains,
)
from galmorph._scenes import Group, Scene, Work, _cut, _light, _shifted
from galmorph._target import _BACKGROUND_RANGE, _WIDE, Axis, Target
from galmorph.inference.least_squares import Linearisation

if TYPE_CHECKING:
    from galmorph.psf import PSF

__all__ = ["SceneTarget", "sample_groups"]

# scenes that are worked on at once: at most, and pixels of their sources in all
_WIDEST, _PIXELS = 96, 2**18
# chains, as of the fitters of `galmorph.sampling`
_CHAINS, _DRAWS, _BLOCKS, _RHAT, _ESS = 4, 500, 5, 1.01, 400.0
# weighted draws: at least, and for each one of equal weight
_LEAST, _EACH = 1000, 2


class SceneTarget(Target):
    """The target for groups of K sources that share their pixels.

    Coordinates are those of the sources' own targets, side by side, and then the background.

    Parameters
    ----------
    setups : sequence of K BatchSetup
        One a source.  The first says what they share: background, device and precision.
    data, inv_sigma : array, shape (B, ny, nx)
    psf : PSF, list of B PSF, or None
    params : sequence of K arrays, shape (B, P_k)
        Near which the sources are, in pixels of the box.
    position : array, shape (B, K, 2)
        Where the sources were said to be, (x, y) in pixels of the box.
    spread : array, shape (K,)
        Standard deviation of the normal prior of the centres about that, in pixels; 0 holds them
        where ``params`` are, and they are no coordinates.
    noise : NoiseModel, optional
    """

    def __init__(
        self,
        setups: Sequence[BatchSetup],
        data: np.ndarray,
        inv_sigma: np.ndarray,
        psf: PSF | Sequence[PSF] | None,
        params: Sequence[np.ndarray],
        *,
        position: np.ndarray,
        spread: np.ndarray,
        noise: Any = None,
    ) -> None:
        super().__init__(setups[0], data, inv_sigma, noise)
        self.parts = [
            make_target(_setup_alone(setup, width == 0), data, inv_sigma, psf, own, noise=noise)
            for setup, width, own in zip(setups, spread, params, strict=True)
        ]
        self._at = _side_by_side(part.walked for part in self.parts)
        self._params_at = _side_by_side(part.template.shape[1] for part in self.parts)
        self.axes = [axis for k in range(len(self.parts)) for axis in self._axes_of(k)]
        self._owners = {
            own.coordinates[0] + at.start: (part, own)
            for part, at in zip(self.parts, self._at, strict=True)
            for own in part.axes
        }
        near = [
            (at.start + axis.coordinates[0], k, axis.parameters[0] - 1)
            for k, (part, at) in enumerate(zip(self.parts, self._at, strict=True))
            for axis in part.axes
            if spread[k] > 0 and axis.parameters[0] in (1, 2)
        ]
        self._centres = [c for c, _, _ in near]
        middle = np.stack([position[:, k, a] for _, k, a in near], 1) if near else data[:, 0, :0]
        self._middle, self._spread = (
            torch.as_tensor(np.array(a, dtype=float), device=self.scale.device)
            for a in (middle, [spread[k] for _, k, _ in near])
        )
        pixels = self.data.shape[1] * len(self.parts)
        most = min([_WIDEST, *(part.window for part in self.parts)])
        self.window = max(1, min(most, _PIXELS // pixels))

    def _axes_of(self, k: int) -> Iterator[Axis]:
        """Those of a source, among the coordinates of all."""
        first, param = self._at[k].start, self._params_at[k].start
        for axis in self.parts[k].axes:
            yield replace(
                axis,
                coordinates=[first + c for c in axis.coordinates],
                parameters=[param + p for p in axis.parameters],
            )

    def _powers(self, axis: Axis) -> torch.Tensor:
        part, own = self._owners[axis.coordinates[0]]
        return part._powers(own)

    # -- parameters --------------------------------------------------------------------

    def to_params(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        own = [part.to_params(v[:, at], rows) for part, at in self._each()]
        return torch.cat([*own, v[:, self.walked :] * self.scale[rows, None]], 1)

    def from_params(
        self, params: torch.Tensor, background: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = torch.arange(len(params), device=params.device) if rows is None else rows
        none = background[:, :0]
        own = [
            part.from_params(params[:, at], none, rows)
            for part, at in zip(self.parts, self._params_at, strict=True)
        ]
        return torch.cat([*own, background / self.scale[rows, None]], 1)

    def to_galaxies(self, values: torch.Tensor) -> torch.Tensor:
        """Parameters (M, P + nb) of the sources, of what `to_params` gives."""
        own = self._galaxies("to_galaxies", values)
        return torch.cat([*own, values[:, self._params_at[-1].stop :]], 1)

    def of_galaxies(self, params: torch.Tensor) -> torch.Tensor:
        """The inverse: what `from_params` takes, of parameters (M, P)."""
        return torch.cat(self._galaxies("of_galaxies", params), 1)

    def _galaxies(self, way: str, values: torch.Tensor) -> list[torch.Tensor]:
        """Of learned sources, whose targets have other parameters than the galaxies."""
        return [
            getattr(part, way, lambda own: own)(values[:, at])
            for part, at in zip(self.parts, self._params_at, strict=True)
        ]

    def _each(self) -> Iterator[tuple[Target, slice]]:
        """Sources and their coordinates."""
        return zip(self.parts, self._at, strict=True)

    def settle(self, params: torch.Tensor, background: torch.Tensor) -> None:
        for part, at in zip(self.parts, self._params_at, strict=True):
            part.settle(params[:, at], background[:, :0])

    def other_starts(self, v: torch.Tensor, streams: Any) -> list[torch.Tensor]:
        """Other modes of one source at a time."""
        found = []
        for part, at in self._each():
            for own in part.other_starts(v[:, at], streams):
                start = v.clone()
                start[:, at] = own
                found.append(start)
        return found

    # -- the density -------------------------------------------------------------------

    def _prior(self, v, rows, *, slopes=True):
        total = v.new_full((len(v),), -len(self.templates) * np.log(_BACKGROUND_RANGE))
        by = torch.zeros_like(v)
        for part, at in self._each():
            density, slope = part._prior(v[:, at], rows, slopes=slopes)
            total, by[:, at] = total + density, slope
        off = (v[:, self._centres] - self._middle[rows]) / self._spread
        norm = torch.log(self._spread * np.sqrt(2 * np.pi)).sum()
        by[:, self._centres] -= off / self._spread
        return total - norm - 0.5 * off.square().sum(1), by

    def _closed(self, hessian: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hessian = super()._closed(hessian, v, rows)
        hessian[:, self._centres, self._centres] += self._spread**-2
        return hessian

    def image(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return sum(part.image(u[:, at], rows) for part, at in self._each())

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        """The image of all, then the columns of each source; the amplitude is one."""
        total, columns, chains = 0.0, [], []
        for part, at in self._each():
            lin = part.linearise(u[:, at], rows)
            total = total + lin.amplitude.to(lin.columns.dtype)[:, None] * lin.columns[:, 0]
            columns.append(lin.columns)
            own = [lin.amplitude_chain[:, None], lin.amplitude[:, None, None] * lin.chain]
            chain = u.new_zeros((len(u), lin.columns.shape[1], self.walked))
            chain[:, :, at] = torch.cat(own, 1)
            chains.append(chain)
        return Linearisation(
            columns=torch.cat([total[:, None], *columns], 1),
            chain=torch.cat(chains, 1),
            amplitude=torch.ones_like(u[:, 0]),
            amplitude_chain=torch.zeros_like(u[:, : self.walked]),
        )


def _side_by_side(sizes: Iterable[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def _setup_alone(setup: BatchSetup, held: bool) -> BatchSetup:
    """Of a source without the background, which is not its own; perhaps with its centre held."""
    model = setup.model
    if held:
        model = model.copy()
        model.x_0.fixed = model.y_0.fixed = True
    return replace(setup, model=model, background="none", start=None)


# -- draws -------------------------------------------------------------------------------------


def sample_groups(
    scene: Scene, fitter: Any, background: str, method: str, n: int, rng: np.random.Generator
) -> Iterator[tuple[Group, np.ndarray, bool]]:
    """Draw from the posteriors of groups that were fitted, each given what the others leave.

    Parameters
    ----------
    scene : Scene
        After its fit.
    fitter : MAPFitter
        Its priors and noise.
    background : {"none", "constant", "tilted"}
    method : {"importance", "mcmc"}
    n : int
        How many draws.
    rng : `numpy.random.Generator`

    Yields
    ------
    group : Group
    draws : array, shape (n, P)
        Of equal weight: the parameters of all members, in pixels of the image.
    converged : bool
    """
    work = Work(fitter, background)
    work.prepare([scene])
    total = _light(scene)
    seed = int(rng.integers(2**62))
    for number, group in enumerate(scene.groups):
        params = [scene.sources[k].params for k in group.members]
        if any(p is None or not np.isfinite(p).all() for p in params):
            continue
        start = _start(scene, group, total, work, (seed, number))
        draws, converged = _draw(start, method, n, np.random.default_rng((seed, number, 1)))
        first = 0
        for own in params:
            draws[:, first + 1 : first + 3] += group.origin[::-1]
            first += len(own)
        yield group, draws[:, :first], converged


@one_thread()
@torch.no_grad()
def _start(scene: Scene, group: Group, total: np.ndarray, work: Work, seed: Sequence[int]) -> Start:
    """The fit of a group, from which sampling starts."""
    members = group.members
    data, inv_sigma, others = _cut(scene, group.origin, group.shape, total)
    sources = [scene.sources[k] for k in members]
    others = np.where(inv_sigma > 0, others - sum(s.image for s in sources), 0.0)
    data, inv_sigma = (data - others)[None], inv_sigma[None]
    params = [_shifted(s.params, group, -1)[None] for s in sources]
    target = SceneTarget(
        [work.setup_of(scene, k) for k in members],
        data,
        inv_sigma,
        scene.psf_of_group(group),
        params,
        position=(scene.xy[members] - np.array(group.origin[::-1]))[None],
        spread=scene.spread[members],
        noise=_noise_of(group, work.fitter.noise, data, inv_sigma),
    )
    fitted, sky = np.concatenate(params, 1), np.asarray(sources[0].background)[None]
    device = target.scale.device
    target.settle(*(torch.as_tensor(a, dtype=_WIDE, device=device) for a in (fitted, sky)))
    return Start.at(target, fitted, sky, [seed])


def _noise_of(group: Group, noise: Any, data: np.ndarray, inv_sigma: np.ndarray) -> Any:
    """The noise of a group, as far as it depends on the fit."""
    known = group.known
    if noise is None or known is None:
        return noise
    if noise.parameter_names:
        noise = noise.with_parameters(noise.fitted(data, known.total, inv_sigma, known.n_free))
    return noise.bind(known.misfit) if getattr(noise, "needs_misfit", False) else noise


def _draw(start: Start, method: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Draws (n, P + nb) of equal weight, and whether they may be trusted.

    Weighted ones are not tried where there are too many coordinates to fit proposals in, and not
    kept where few of them have most of the weight.
    """
    few = start.target.size <= _ADAPTABLE
    if method == "importance" and (few or has_latents(start.target)):
        found = importance(start, max(_LEAST, _EACH * n))
        if found["khat"][0] <= KHAT:
            edges = found["weights"][0].cumsum()
            at = np.searchsorted(edges, (np.arange(n) + rng.random()) * edges[-1] / n)
            at = np.minimum(at, len(edges) - 1)
            return found["samples"][0][rng.permutation(at)], True
    draws = max(_DRAWS, -(-n // _CHAINS))
    found = markov_chains(
        start,
        chains=_CHAINS,
        draws=draws,
        blocks=_BLOCKS,
        rhat=_RHAT,
        ess=_ESS,
        keep=_CHAINS * draws,
    )
    converged = bool(found["rhat"][0] <= _RHAT and found["ess"][0] >= _ESS)
    return found["samples"][0][rng.permutation(_CHAINS * draws)[:n]], converged
