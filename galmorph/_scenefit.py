"""Fitting a batch of scenes, each of several sources that share their pixels, in torch.

A scene is one nonlinear least-squares problem: the image is the sum of its sources, each of
which is drawn, with its derivatives and its prior, by the code that fits single galaxies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from galmorph._batchfit import (
    BatchSetup,
    _coordinate_bounds,
    _GalaxyProblem,
    _renderer,
    _start_params,
    _take_better,
    background_templates,
    needs_wider_box,
    one_thread,
    whitening_of,
    window_templates,
)
from galmorph._guess import first_guess
from galmorph._learnedfit import (
    _bounds,
    _from_params,
    _LearnedProblem,
    _nested,
    _Solver,
    longest_step,
    to_params,
)
from galmorph._posterior import _invert, wrap_axis
from galmorph._structure import flux_places, structure_covariance
from galmorph.inference.least_squares import Linearisation, levenberg_marquardt
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.models.sersic import SersicGalaxy2D
from galmorph.priors import INDEX_PRIOR
from galmorph.psf import PSF

if TYPE_CHECKING:
    from galmorph.inference.least_squares import LeastSquaresResult

__all__ = ["SceneBatch", "SceneFits", "fit_scenes", "guess_sources"]

_WIDE = torch.float64
# excess over the opposite pixel, in sigma, from which light is taken for a neighbour's
_EXCESS = 3.0
# a flux in a first guess is at least this share of that of the brightest source
_FAINTEST = 1e-3
# scenes that are worked on at once: at least, at most, and pixels of sources in all
_WINDOW, _WIDEST, _PIXELS = 8, 64, 2**16
# change of chi2 that ends a fit which is the start of another
_COARSE = 1.0
# widest that an angle may be known: that of a uniform distribution over half a turn
_ANGLE_WIDTH = np.pi / np.sqrt(12)


@dataclass
class SceneBatch:
    """Scenes of one shape with the same number of sources.

    Attributes
    ----------
    data, inv_sigma : array, shape (B, ny, nx)
        Pixels and one over their uncertainty, zero where unusable.
    psf : PSF, list of B PSF, or None
    position : array, shape (B, K, 2)
        (x, y) of the sources.
    spread : array, shape (B, K)
        Width of the prior of the position in pixels; 0 holds it.
    """

    data: np.ndarray
    inv_sigma: np.ndarray
    psf: PSF | list[PSF] | None
    position: np.ndarray
    spread: np.ndarray


@dataclass
class SceneFits:
    """Where the fits of a batch of scenes ended (numpy, in pixels of the scene and data units).

    Attributes
    ----------
    params : list of K arrays, shape (B, P_k)
    cov : array, shape (B, D, D)
        Of the parameters of all sources, in order, and then of the background; NaN where the
        curvature could not be inverted.
    flux_noise : array, shape (B, K)
        Standard deviation of each flux that is due to noise alone.
    background : array, shape (B, nb)
    images, misfit : array, shape (B, K, ny, nx)
        Of each source, and how far a learned one may be off.
    chi2, cost, n_iter, converged, bad_covariance : array, shape (B,)
        The cost is chi2 and what priors add.
    at_bound : array of bool, shape (B, K)
    n_free : int
    """

    params: list[np.ndarray]
    cov: np.ndarray
    flux_noise: np.ndarray
    background: np.ndarray
    images: np.ndarray
    misfit: np.ndarray
    chi2: np.ndarray
    cost: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    bad_covariance: np.ndarray
    at_bound: np.ndarray
    n_free: int


# -- sources of one model --------------------------------------------------------------------


class _Sources:
    """The sources of one model in all scenes, drawn at once.

    Rows are scene by scene, source by source.  Coordinates are those of the fit of a single
    galaxy, and the flux (of the Sérsic profile of a learned one) where that is solved for
    there.
    """

    problem: _GalaxyProblem | _LearnedProblem
    centre: tuple[int, int]
    size: int  # coordinates of a source

    def __init__(self, setup: BatchSetup, slots: Sequence[int], scale: torch.Tensor) -> None:
        self.setup, self.slots, self.scale = setup, list(slots), scale

    @property
    def linear(self) -> bool:
        """Whether the last coordinate is the flux of a unit image."""
        return self.problem.linear_amplitude

    def _drawn(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        raise NotImplementedError

    def unit(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Images (n, npix) that are to be multiplied with the amplitude."""
        raise NotImplementedError

    def project(self, u: torch.Tensor) -> torch.Tensor:
        """Bring coordinates back within their bounds."""
        return u

    def fresh(self, u: torch.Tensor) -> None:
        """Forget what was drawn, and prepare for sources about coordinates (n, U)."""

    def to_params(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters (n, P) in the units of the data, and their derivatives (n, P, U)."""
        raise NotImplementedError

    def amplitude(self, u: torch.Tensor) -> torch.Tensor:
        """Flux (of the profile, if learned) in units of the noise, (n,)."""
        return u[:, -1] if self.linear else self.to_params(u)[0][:, 0] / self.scale[: len(u)]

    def longest_step(self) -> torch.Tensor:
        """How far each coordinate (U,) may go at once."""
        return self.scale.new_full((self.size,), torch.inf)

    def misfit_fraction(self, params: torch.Tensor) -> np.ndarray | None:
        """How far the light may be off, as a fraction, (n, ny, nx); None: not at all."""
        return None

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        """As of a single galaxy, with the amplitude and its derivatives always there."""
        core = u[:, :-1] if self.linear else u
        lin = self._drawn(core, rows)
        if not self.linear:
            return lin
        pad = torch.nn.functional.pad
        slope = torch.zeros_like(u)
        slope[:, -1] = 1.0
        return Linearisation(
            columns=lin.columns,
            chain=pad(lin.chain, (0, 1)),
            amplitude=u[:, -1],
            amplitude_chain=slope,
            penalty=lin.penalty,
            penalty_chain=None if lin.penalty is None else pad(lin.penalty_chain, (0, 1)),
        )


class _Profiles(_Sources):
    """Sources that are made of elliptical profiles or points."""

    def __init__(self, setup, slots, scale, params, psfs, blank, shape, shift) -> None:
        super().__init__(setup, slots, scale)
        self.shape = shape
        self.problem = _GalaxyProblem(
            setup,
            blank,
            blank,
            blank[:0],
            params,
            scale,
            shape,
            _renderer(psfs, shape, params, shift, setup, reach=0.3),
        )
        start = params.new_zeros(1, setup.coordinates.size)
        at = {setup.names[b.parameters[0]]: b.coordinates[0] for b in setup.coordinates.blocks}
        self.centre = (at.get("x_0"), at.get("y_0"))
        self.radii = [at[e.r] for e in setup.ellipses if e.r in at]
        self.size = start.shape[1] + self.linear

    def start(self, params: torch.Tensor) -> torch.Tensor:
        u = self.setup.coordinates.from_params(params)
        if self.linear:
            u = torch.cat([u, params[:, :1] / self.scale[:, None]], 1)
        return u

    def bounds(self, params: torch.Tensor, position: torch.Tensor, shift: torch.Tensor):
        middle = SimpleNamespace(x_0=position[:, 0], y_0=position[:, 1])
        lower, upper = _coordinate_bounds(self.setup, params, middle, self.shape, shift)
        # a half-light radius beyond the box is that of what is wrong there, not of the source; and
        # a size says nothing of a flux below zero, which would only make up for another's
        largest = np.log(max(self.shape))
        for c in self.radii:
            upper[:, c] = torch.maximum(upper[:, c].clamp_max(largest), lower[:, c])
        free = params.new_full((len(params), int(self.linear)), torch.inf)
        least = torch.full_like(free, 0.0 if self.radii else -torch.inf)
        return torch.cat([lower, least], 1), torch.cat([upper, free], 1)

    def widen(self, params, psfs, shift) -> torch.Tensor:
        """Draw thin sources that reach the edge in a wider box; which these are, (n,)."""
        flux = params[:, 0] / self.scale
        wide = needs_wider_box(self.setup, params, flux, self.shape)
        rows = torch.nonzero(wide)[:, 0]
        if self.problem.renderer is not None and rows.numel():
            own = psfs if len(psfs) == 1 else [psfs[i] for i in rows.tolist()]
            self.problem.wide_renderer = _renderer(
                own, self.shape, params, shift, self.setup, reach=0.9
            )
            self.problem.wide_row[rows] = torch.arange(len(rows), device=rows.device)
        return wide

    def unit(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        problem = self.problem
        params = problem.params(u[:, :-1] if self.linear else u, rows)
        if problem.renderer is None:
            return problem._pixel_columns(params, derivatives=False)[:, 0]
        return problem._draw(params.to(problem.data.dtype), rows, derivatives=False)[:, 0]

    def _drawn(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        return self.problem.linearise(u, rows)

    def project(self, u: torch.Tensor) -> torch.Tensor:
        core = self.problem.project(u[:, :-1] if self.linear else u, None)
        return torch.cat([core, u[:, -1:]], 1) if self.linear else core

    def to_params(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        core = u[:, :-1] if self.linear else u
        every = torch.arange(len(u), device=u.device)
        if self.problem.renderer is None:
            core = self.problem._not_round(core)
        params = self.problem.params(core, every)
        jacobian = self.setup.coordinates.params_jacobian(core, params)
        if self.linear:
            jacobian = torch.nn.functional.pad(jacobian, (0, 1))
            params[:, 0] = u[:, -1] * self.scale
            jacobian[:, 0, -1] = self.scale
        for e in self.setup.ellipses:
            i = None if e.r is None else self.setup.names.index(e.theta)
            if i is not None and self.setup.bounds[e.theta] == (None, None):
                params[:, i] = wrap_axis(params[:, i])
        return params, jacobian


class _Learned(_Sources):
    """Learned galaxies; those that need the same sampling have a renderer together."""

    centre = (0, 1)

    def __init__(self, setup, slots, scale, psfs, blank, shape) -> None:
        super().__init__(setup, slots, scale)
        self.shape = shape
        self.problem = _LearnedProblem(setup, blank, blank, blank[:0], scale, None)
        self._solver = _Solver(self.problem, psfs, shape)
        self.size = len(setup.names)  # the flux, walked to or solved for, is the last

    def start(self, params: torch.Tensor) -> torch.Tensor:
        u = _from_params(self.problem, params)
        if self.linear:
            light = _light(self.problem, params[:, 5:])
            u = torch.cat([u, (params[:, 0] / light / self.scale)[:, None]], 1)
        return u

    def nested(self, sersic: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Coordinates of Sérsic profiles (n, 7)."""
        held = self.setup.model.copy()
        own = np.array([[float(np.ravel(getattr(held, n).value)[0]) for n in self.setup.names]])
        given = torch.as_tensor(own, device=sersic.device).repeat(len(sersic), 1)
        given[:, 1:3] = position
        first = SimpleNamespace(params=sersic.cpu().numpy())
        u = _nested(self.problem, first, _from_params(self.problem, given))
        if self.linear:
            u = torch.cat([u, sersic[:, :1] / self.scale[:, None]], 1)
        return u

    def bounds(self, u: torch.Tensor, position: torch.Tensor, shift: torch.Tensor):
        every = torch.arange(len(u), device=u.device)
        core = u[:, :-1] if self.linear else u
        lower, upper = _bounds(self.problem, core, self.shape, None, every)
        sized = bool(upper[0, 2] > lower[0, 2])
        if sized:  # the radius, as of profiles
            upper[:, 2] = torch.maximum(upper[:, 2].clamp_max(np.log(max(self.shape))), lower[:, 2])
        held = upper[:, :2] <= lower[:, :2]
        near, far = position - shift[:, None], position + shift[:, None]
        lower[:, :2] = torch.where(held, lower[:, :2], torch.maximum(lower[:, :2], near))
        upper[:, :2] = torch.where(held, upper[:, :2], torch.minimum(upper[:, :2], far))
        free = u.new_full((len(u), int(self.linear)), torch.inf)
        least = torch.full_like(free, 0.0 if sized else -torch.inf)
        return torch.cat([lower, least], 1), torch.cat([upper, free], 1)

    def fresh(self, u: torch.Tensor) -> None:
        """Renderers for where the sources are now."""
        core = u[:, :-1] if self.linear else u
        every = torch.arange(len(u), device=u.device)
        self._parts, self._part, self._place = [], every.clone(), every.clone()
        for here, problem in self._solver._parts(core, every):
            self._part[here] = len(self._parts)
            self._place[here] = torch.arange(len(here), device=here.device)
            self._parts.append(problem)

    def unit(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        geometry, z = self.problem.split(u[:, :-1] if self.linear else u)
        coefficients = self.problem.decoder.coefficients(z)
        images = coefficients.new_empty((len(u), self.shape[0] * self.shape[1]))
        for i, problem in enumerate(self._parts):
            here = torch.nonzero(self._part[rows] == i)[:, 0]
            if here.numel():
                renderer = problem.renderer.rows(self._place[rows[here]])
                drawn = renderer.image(geometry.at(here), coefficients[here])
                images[here] = drawn.flatten(1)
        return images

    def amplitude(self, u: torch.Tensor) -> torch.Tensor:
        if self.linear:
            return u[:, -1]
        return u[:, -1] / _light(self.problem, u[:, 4 : 4 + self.problem.d])

    def _drawn(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        result = None
        for i, problem in enumerate(self._parts):
            here = torch.nonzero(self._part[rows] == i)[:, 0]
            if not here.numel():
                continue
            lin = problem.linearise(u[here], self._place[rows[here]])
            if here.numel() == len(rows):
                return lin
            if result is None:
                result = {
                    k: None if v is None else v.new_empty((len(rows), *v.shape[1:]))
                    for k, v in vars(lin).items()
                }
            for k, v in vars(lin).items():
                if v is not None:
                    result[k][here] = v
        return Linearisation(**result)

    def to_params(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        core, amplitude = (u[:, :-1], u[:, -1]) if self.linear else (u, None)
        return to_params(self.problem, core, amplitude, self.scale)

    def longest_step(self) -> torch.Tensor:
        longest = super().longest_step()
        core = longest_step(self.problem)
        longest[: len(core)] = core
        return longest

    def misfit_fraction(self, params: torch.Tensor) -> np.ndarray:
        from galmorph.rendering.learned_model import misfit_fraction

        return misfit_fraction(self.problem.network, params.cpu().numpy(), self.shape)


def _light(problem: _LearnedProblem, z: torch.Tensor) -> torch.Tensor:
    from galmorph.rendering.learned_model import profile_of

    return profile_of(problem.wide, z)[2]


# -- the scene -------------------------------------------------------------------------------


class _SceneProblem:
    """The batch of scenes as `levenberg_marquardt` sees it."""

    linear_amplitude = False

    def __init__(self, parts, slots, data, weight, templates, position, spread, whitening) -> None:
        self.parts: list[_Sources] = parts
        self.data, self.weight, self.templates = data, weight, templates
        self.whitening = whitening
        self.sources = slots
        sizes = np.zeros(slots, dtype=int)
        for part in parts:
            sizes[part.slots] = part.size
        ends = np.cumsum(sizes)
        self.ends, self.size = ends, int(ends[-1])
        #: coordinates of each slot
        self.where = [slice(int(e - s), int(e)) for e, s in zip(ends, sizes, strict=True)]
        self.position, self.spread = position, spread

    def split(self, u: torch.Tensor, part: _Sources) -> torch.Tensor:
        """Coordinates (b m, U) of the sources of a part."""
        own = torch.stack([u[:, self.where[k]] for k in part.slots], 1)
        return own.flatten(0, 1)

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Coordinates (b, U) of scenes, from those of each part."""
        own: list[torch.Tensor | None] = [None] * self.sources
        for part, piece in zip(self.parts, pieces, strict=True):
            rows = piece.unflatten(0, (-1, len(part.slots)))
            for j, k in enumerate(part.slots):
                own[k] = rows[:, j]
        return torch.cat(own, 1)

    def _flat(self, rows: torch.Tensor, part: _Sources) -> torch.Tensor:
        count = len(part.slots)
        return (rows[:, None] * count + torch.arange(count, device=rows.device)).flatten()

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        return self.with_light(u, rows)[0]

    def with_light(self, u: torch.Tensor, rows: torch.Tensor) -> tuple[Linearisation, torch.Tensor]:
        """The scenes, and the images (b, K, npix) of their sources."""
        columns, chains, penalties, slopes = [], [], [], []
        every = self.data.new_empty((len(u), self.sources, self.data.shape[1]))
        for part in self.parts:
            count = len(part.slots)
            lin = part.linearise(self.split(u, part), self._flat(rows, part))
            amplitude = lin.amplitude.to(lin.columns.dtype)
            light = amplitude[:, None] * lin.columns[:, 0]
            every[:, part.slots] = light.unflatten(0, (-1, count))
            columns.append(lin.columns.unflatten(0, (-1, count)).flatten(1, 2))
            # the derivatives are of a unit image
            own = lin.amplitude[:, None, None] * lin.chain
            own = torch.cat([lin.amplitude_chain[:, None], own], 1).unflatten(0, (-1, count))
            for j, k in enumerate(part.slots):
                chain = u.new_zeros((len(u), own.shape[2], self.size))
                chain[:, :, self.where[k]] = own[:, j]
                chains.append(chain)
            if lin.penalty is not None:
                penalties.append(lin.penalty.unflatten(0, (-1, count)).flatten(1))
                by_u = lin.penalty_chain.unflatten(0, (-1, count))
                for j, k in enumerate(part.slots):
                    slope = u.new_zeros((len(u), by_u.shape[2], self.size))
                    slope[:, :, self.where[k]] = by_u[:, j]
                    slopes.append(slope)
        value, slope = self._position_prior(u, rows)
        made = Linearisation(
            columns=torch.cat([every.sum(1, keepdim=True), *columns], 1),
            chain=torch.cat(chains, 1),
            amplitude=torch.ones_like(u[:, 0]),
            amplitude_chain=torch.zeros_like(u),
            penalty=torch.cat([*penalties, value], 1),
            penalty_chain=torch.cat([*slopes, slope], 1),
        )
        return made, every

    def _position_prior(self, u, rows) -> tuple[torch.Tensor, torch.Tensor]:
        value = u.new_zeros((len(u), 2 * self.sources))
        slope = u.new_zeros((len(u), 2 * self.sources, self.size))
        for part in self.parts:
            for k in part.slots:
                for axis, c in enumerate(part.centre):
                    if c is None:
                        continue
                    at = self.where[k].start + c
                    width = self.spread[rows, k]
                    inverse = torch.where(width > 0, 1.0 / width, 0.0)
                    value[:, 2 * k + axis] = (u[:, at] - self.position[rows, k, axis]) * inverse
                    slope[:, 2 * k + axis, at] = inverse
        return value, slope

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return self.join([part.project(self.split(u, part)) for part in self.parts])

    def longest_step(self) -> torch.Tensor:
        """How far each coordinate (U,) may go at once."""
        return self.join([p.longest_step().expand(len(p.slots), -1) for p in self.parts])[0]

    def units(self, u: torch.Tensor) -> torch.Tensor:
        """Images (B, K, npix) of all sources with a flux of one (of the profile, if learned)."""
        rows = torch.arange(len(u), device=u.device)
        images = self.data.new_empty((len(u), self.sources, self.data.shape[1]))
        for part in self.parts:
            part.fresh(self.split(u, part))
            for some in rows.split(_WINDOW):
                own = part.unit(self.split(u[some], part), self._flat(some, part))
                images[some[:, None], torch.tensor(part.slots, device=u.device)] = own.unflatten(
                    0, (-1, len(part.slots))
                )
        return images

    def amplitudes(self, u: torch.Tensor) -> torch.Tensor:
        """What the images of `units` are to be multiplied with, (B, K)."""
        result = u.new_empty((len(u), self.sources))
        for part in self.parts:
            own = part.amplitude(self.split(u, part))
            result[:, part.slots] = own.unflatten(0, (-1, len(part.slots)))
        return result


class _Fit:
    """One batch of scenes, and the steps of its fit."""

    def __init__(self, setups: Sequence[BatchSetup], batch: SceneBatch) -> None:
        self.setups, self.batch = list(setups), batch
        self.shape = batch.data.shape[1:]
        setup = setups[0]
        self.device, self.dtype = setup.device, setup.dtype
        best = batch.inv_sigma.reshape(len(batch.data), -1).max(1)
        best = np.where(best > 0, best, 1.0)  # one band of several may be blank
        self.scale = torch.as_tensor(1.0 / best, dtype=_WIDE, device=self.device)
        self.data = self._images(batch.data * best[:, None, None])
        self.weight = self._images(batch.inv_sigma / best[:, None, None])
        self.templates = self._images(background_templates(setup.background, self.shape))
        self.position = torch.as_tensor(batch.position, dtype=_WIDE, device=self.device)
        self.spread = torch.as_tensor(batch.spread, dtype=_WIDE, device=self.device)
        psf = batch.psf
        self.psfs = [] if psf is None else [psf] if isinstance(psf, PSF) else list(psf)
        width = float(np.median([p.sigma for p in self.psfs])) if self.psfs else 0.5
        self.psf_sigma, self._windows = width, None
        self.shift = (3 * self.spread).clamp_max(centre_reach(width))
        self.shift = (
            self.shift
            if setup.max_shift is None
            else torch.full_like(self.shift, setup.max_shift).where(self.spread > 0, 0.0)
        )

    def _images(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=self.dtype, device=self.device).flatten(1)

    # -- where to start --------------------------------------------------------------------

    def guess(self, setups: Sequence[BatchSetup], light: torch.Tensor | None = None):
        """Parameters of every source, one tensor (B, P) a slot.

        ``light`` (B, K, npix) are images of the sources in units of the noise; without them
        the light of neighbours is told by symmetry.
        """
        count = self.position.shape[1]
        images = (self.data - self._level())[:, None].repeat(1, count, 1)
        if light is not None:
            images -= light.sum(1, keepdim=True) - light
        images = images.flatten(0, 1).unflatten(1, self.shape)
        weight = self.weight.repeat_interleave(count, 0).unflatten(1, self.shape)
        position = self.position.flatten(0, 1).to(self.dtype)
        images = without_neighbours(images, weight, position)
        limit = float(self.shift.max())
        if self._windows is None:
            psf = self.psfs[0] if self.psfs else None
            self._windows = window_templates(psf, self.psf_sigma, self.shape, images)
        guess = first_guess(
            images,
            weight > 0,
            self._windows,
            position=position,
            limit=max(limit, 1e-6),
            background=False,
        )
        return self._start(setups, {n: v.unflatten(0, (-1, count)) for n, v in vars(guess).items()})

    def from_sersic(self, setups: Sequence[BatchSetup], params: np.ndarray):
        """The same, of Sérsic profiles (B, K, 7)."""
        own = torch.as_tensor(params, dtype=_WIDE, device=self.device).unbind(2)
        flux, x_0, y_0, r, n, ellip, theta = own
        g = -torch.log1p(-ellip.clamp(0, 0.95))
        guess = {
            "flux": flux / self.scale[:, None],
            "x_0": x_0,
            "y_0": y_0,
            "r": r * torch.exp(-0.5 * g),
            "n": n,
            "eta1": g * torch.cos(2 * theta),
            "eta2": g * torch.sin(2 * theta),
        }
        return self._start(setups, guess)

    def _start(self, setups, guess: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Parameters of guesses (B, K) each."""
        started = []
        for k, setup in enumerate(setups):
            own = SimpleNamespace(**{name: values[:, k] for name, values in guess.items()})
            template = self._template(setup, k)
            params = _start_params(setup, template, own)
            if setup.free[0]:
                params[:, 0] = own.flux.to(params) * self.scale
            held = self.spread[:, k] == 0
            params[held, 1:3] = self.position[held, k]
            started.append(params)
        return started

    def _level(self) -> torch.Tensor:
        """The sky where a background is fitted, in units of the noise, (B, 1)."""
        if not len(self.templates):
            return torch.zeros_like(self.data[:, :1])
        seen = torch.where(self.weight > 0, self.data, torch.nan)
        return torch.nan_to_num(seen.nanquantile(0.25, 1, keepdim=True))

    def _template(self, setup: BatchSetup, k: int) -> torch.Tensor:
        own = [float(np.ravel(getattr(setup.model, n).value)[0]) for n in setup.names]
        template = self.scale.new_tensor([own]).repeat(len(self.data), 1)
        for axis in (0, 1):
            if setup.free[1 + axis]:
                template[:, 1 + axis] = self.position[:, k, axis]
        return template

    # -- problems --------------------------------------------------------------------------

    def assemble(self, setups, started) -> tuple[_SceneProblem, torch.Tensor, tuple]:
        """The problem, coordinates (B, U) of the start, and bounds."""
        parts, pieces, lows, highs = [], [], [], []
        for slots in _alike(setups):
            setup, count = setups[slots[0]], len(slots)
            scale = self.scale.repeat_interleave(count)
            blank = self.data.new_zeros((1, self.data.shape[1])).expand(len(scale), -1)
            psfs = self.psfs
            if len(psfs) > 1:
                psfs = [p for p in psfs for _ in range(count)]
            params = torch.stack([started[k] for k in slots], 1).flatten(0, 1)
            position = self.position[:, slots].flatten(0, 1)
            shift = self.shift[:, slots].flatten()
            if isinstance(setup.model, LearnedGalaxy2D):
                part = _Learned(setup, slots, scale, psfs, blank, self.shape)
                nested = params.shape[1] != len(setup.names)
                u = part.nested(params, position) if nested else part.start(params)
                low, high = part.bounds(u, position, shift)
            else:
                room = shift.clamp_min(1.0)
                part = _Profiles(setup, slots, scale, params, psfs, blank, self.shape, room)
                u = part.start(params)
                low, high = part.bounds(params, position, shift)
            parts.append(part)
            pieces.append(u)
            lows.append(low)
            highs.append(high)
        whitening = whitening_of(self.setups[0], self.weight, self.shape)
        problem = _SceneProblem(
            parts,
            self.position.shape[1],
            self.data,
            self.weight,
            self.templates,
            self.position,
            self.spread,
            whitening,
        )
        u, lower, upper = (problem.join(p) for p in (pieces, lows, highs))
        return problem, torch.minimum(torch.maximum(u, lower), upper), (lower, upper)

    def fluxes(self, problem: _SceneProblem, u: torch.Tensor) -> torch.Tensor:
        """The start with the fluxes that fit best, given all else; none is below zero."""
        images = problem.units(u)
        solved = torch.zeros(problem.sources, dtype=torch.bool)
        for part in problem.parts:
            solved[part.slots] = part.linear
        if not solved.any():
            return u
        flux = _positive_least_squares(images, self.templates, self.data, self.weight)
        u = u.clone()
        for k in torch.nonzero(solved)[:, 0].tolist():
            u[:, problem.where[k].stop - 1] = flux[:, k]
        return u

    def light(self, problem: _SceneProblem, u: torch.Tensor) -> torch.Tensor:
        """Images of the sources in units of the noise, (B, K, npix)."""
        return problem.units(u) * problem.amplitudes(u)[..., None].to(self.dtype)

    def solve(
        self, problem, u, bounds, *, tolerance: float = 0.0, rows: torch.Tensor | None = None
    ) -> LeastSquaresResult:
        """Fit until chi2 falls by less than ``tolerance``, or what is right for the models."""
        for part in problem.parts:
            part.fresh(problem.split(u, part))
        setup = self.setups[0]
        learned = any(isinstance(part, _Learned) for part in problem.parts)
        return levenberg_marquardt(
            problem,
            u,
            lower=bounds[0],
            upper=bounds[1],
            max_iter=setup.max_iter,
            tolerance=max(tolerance, tolerance_of(learned)),
            relative_tolerance=1e-6 if self.dtype == torch.float32 else 1e-10,
            window=max(1, min(setup.window, self._window(problem))),
            longest=problem.longest_step(),
            stiffen=learned,
            rows=rows,
        )

    def _window(self, problem: _SceneProblem) -> int:
        pixels = self.data.shape[1] * problem.sources
        return min(max(_WINDOW, _PIXELS // pixels), _WIDEST)

    def params_of(self, problem, u: torch.Tensor) -> list[torch.Tensor]:
        params: list[torch.Tensor | None] = [None] * problem.sources
        for part in problem.parts:
            own, _ = part.to_params(problem.split(u, part))
            for j, k in enumerate(part.slots):
                params[k] = own.unflatten(0, (-1, len(part.slots)))[:, j]
        return params

    def widen(self, problem: _SceneProblem, u: torch.Tensor) -> torch.Tensor:
        """Scenes (b,) some of whose sources ask for a wider box, which these have from now on."""
        wide = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        for part in problem.parts:
            if isinstance(part, _Profiles):
                params, _ = part.to_params(problem.split(u, part))
                psfs = self.psfs
                if len(psfs) > 1:
                    psfs = [p for p in psfs for _ in part.slots]
                shift = self.shift[:, part.slots].flatten().clamp_min(1.0)
                wide |= part.widen(params, psfs, shift).unflatten(0, (-1, len(part.slots))).any(1)
        return torch.nonzero(wide & torch.isfinite(u).all(1))[:, 0]


def centre_reach(psf_sigma: float) -> float:
    """How far a centre may go from where it was given, in pixels, however little is known of it."""
    return max(4.0, 2 * psf_sigma)


def tolerance_of(learned: bool) -> float:
    """Change of chi2 that ends a fit of many parameters: a small part of their errors."""
    return 0.2 if learned else 1e-3


def _alike(setups: Sequence[BatchSetup]) -> list[list[int]]:
    """Slots that share their setup."""
    groups: dict[int, list[int]] = {}
    for k, setup in enumerate(setups):
        groups.setdefault(id(setup), []).append(k)
    return list(groups.values())


def without_neighbours(
    images: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """Images in which a pixel far above the one opposite to it has the latter's value.

    Galaxies look the same after half a turn, more or less; their neighbours don't (Lupton 2005;
    Melchior et al. 2018, A&C 24, 129).

    Parameters
    ----------
    images, weight : tensor, shape (n, ny, nx)
        In units of the smallest noise, and one over it.
    centre : tensor, shape (n, 2)
        (x, y).
    """
    ny, nx = images.shape[1:]
    x, y = (2 * centre).round().long().unbind(1)
    mx = x[:, None] - torch.arange(nx, device=images.device)
    my = y[:, None] - torch.arange(ny, device=images.device)
    inside = ((mx >= 0) & (mx < nx))[:, None] & ((my >= 0) & (my < ny))[:, :, None]
    flat = (my.clamp(0, ny - 1)[:, :, None] * nx + mx.clamp(0, nx - 1)[:, None]).flatten(1)
    opposite = images.flatten(1).gather(1, flat).view_as(images)
    seen = inside & (weight.flatten(1).gather(1, flat).view_as(images) > 0)
    # beyond the edge nothing is known: no light
    opposite = torch.where(seen, opposite, torch.where(inside, images, 0.0))
    noise = torch.where(weight > 0, 1 / weight.clamp_min(1e-6), 1.0)
    return torch.where(images > opposite + _EXCESS * noise, opposite, images)


def _positive_least_squares(
    images: torch.Tensor, templates: torch.Tensor, data: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Amplitudes (B, K) of images (B, K, npix) that fit, those below zero raised to a bit."""
    count = images.shape[1]
    every = torch.cat([images, templates.expand(len(images), -1, -1)], 1) * weight[:, None]
    gram = (every @ every.transpose(1, 2)).to(_WIDE)
    right = (every @ (data * weight)[..., None])[..., 0].to(_WIDE)
    keep = torch.ones_like(right, dtype=torch.bool)
    for _ in range(count):
        mask = keep.to(_WIDE)
        system = gram * mask[:, None] * mask[:, :, None]
        diagonal = torch.diagonal(system, dim1=1, dim2=2)
        diagonal += (1 - mask) + 1e-6 * diagonal + 1e-30
        solution = torch.linalg.solve_ex(system, right * mask)[0]
        wrong = keep & (solution <= 0)
        wrong[:, count:] = False
        if not wrong.any():
            break
        keep &= ~wrong
    flux = solution[:, :count]
    least = _FAINTEST * flux.amax(1, keepdim=True).clamp_min(1.0)
    return torch.nan_to_num(torch.maximum(flux, least), nan=1.0)


def _without_learned(setups: Sequence[BatchSetup]) -> list[BatchSetup]:
    """The setups with a Sérsic profile in place of each learned galaxy."""
    made: dict[int, BatchSetup] = {}
    result = []
    for setup in setups:
        if isinstance(setup.model, LearnedGalaxy2D):
            if id(setup) not in made:
                made[id(setup)] = replace(
                    setup, model=SersicGalaxy2D(), priors={"n": INDEX_PRIOR}, start=None
                )
            setup = made[id(setup)]
        result.append(setup)
    return result


@one_thread()
@torch.no_grad()
def guess_sources(setup: BatchSetup, batch: SceneBatch) -> np.ndarray:
    """First guesses of every source as Sérsic profiles.

    Parameters
    ----------
    setup : BatchSetup
        Says where and how exactly torch works.
    batch : SceneBatch

    Returns
    -------
    array, shape (B, K, 7)
    """
    sersic = replace(setup, model=SersicGalaxy2D(), priors={"n": INDEX_PRIOR}, start=None)
    fit = _Fit([sersic] * batch.position.shape[1], batch)
    return torch.stack(fit.guess(fit.setups), 1).cpu().numpy()


@one_thread()
@torch.no_grad()
def fit_scenes(
    setups: Sequence[BatchSetup],
    batch: SceneBatch,
    *,
    start: Sequence[np.ndarray] | None = None,
    guess: np.ndarray | None = None,
    misfit: bool = False,
    tolerance: float = 0.0,
    structure: float = 0.0,
) -> SceneFits:
    """Fit all sources of every scene of a batch together.

    Parameters
    ----------
    setups : sequence of K BatchSetup
        One a source; sources with the same object are drawn together.  The first says what
        they share: background, device, precision, iterations.
    batch : SceneBatch
    start : sequence of K arrays, shape (B, P_k), optional
        Parameters to start from, instead of guessing.
    guess : array, shape (B, K, 7), optional
        Sérsic parameters to begin with, of `guess_sources`.
    misfit : bool, optional
        Whether the misfit of learned sources is wanted; zeros otherwise.
    tolerance : float, optional
        Change of chi2 that ends a fit, if it is larger than what it is otherwise.
    structure : float, optional
        How much light that no model has the covariance allows for: 1 for that of real galaxies.

    Returns
    -------
    SceneFits
    """
    fit = _Fit(setups, batch)
    learned = any(isinstance(s.model, LearnedGalaxy2D) for s in setups)
    tolerance = max(tolerance, setups[0].tolerance)
    n_iter = 0
    if start is None:
        parametric = _without_learned(setups)
        known = guess is not None
        started = fit.from_sersic(parametric, guess) if known else fit.guess(parametric)
        for again in (False,) if known else (True, False):
            problem, u, bounds = fit.assemble(parametric, started)
            u = fit.fluxes(problem, u)
            if again:  # with the neighbours' light taken away
                started = fit.guess(parametric, fit.light(problem, u))
        result = fit.solve(problem, u, bounds, tolerance=_COARSE if learned else tolerance)
        if learned:
            n_iter = result.n_iter
            started = fit.params_of(problem, result.u)
            problem, u, bounds = fit.assemble(setups, started)
            result = fit.solve(problem, u, bounds, tolerance=tolerance)
    else:
        started = [torch.as_tensor(s, dtype=_WIDE, device=fit.device) for s in start]
        problem, u, bounds = fit.assemble(setups, started)
        result = fit.solve(problem, u, bounds, tolerance=tolerance)
    wide = fit.widen(problem, result.u)
    if wide.numel():
        again = fit.solve(problem, result.u, bounds, tolerance=tolerance, rows=wide)
        _take_better(result, again, wide, -torch.inf)
    return _summarise(fit, problem, result, bounds, n_iter, misfit, structure)


def _summarise(fit, problem, result, bounds, n_iter, misfit, structure) -> SceneFits:
    """Parameters, covariance and images in the units of the data."""
    free = (bounds[1] > bounds[0]) & torch.isfinite(result.u)
    dark = problem.amplitudes(result.u) == 0  # nothing is known of the shape of no light
    for k, where in enumerate(problem.where):
        free[:, where.start : where.stop - 1] &= ~dark[:, k, None]
    inverse, bad = inverse_of_free(result.hessian, free)
    extra = None
    if structure:
        _, jacobian = params_and_slopes(fit, problem, result.u)
        missing, light = structure_covariance(fit, problem, result.u, inverse, jacobian)
        extra = structure**2 * missing
    else:
        light = fit.light(problem, result.u)
    return in_data_units(fit, problem, result, light, free, inverse, bad, n_iter, misfit, extra)


def inverse_of_free(hessian: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of curvatures, zero where a coordinate (B, U) is held, and which are singular.

    What follows the coordinates is free.
    """
    more = hessian.shape[1] - free.shape[1]
    mask = torch.cat([free, free.new_ones((len(free), more))], 1).to(_WIDE)
    hessian = hessian * mask[:, :, None] * mask[:, None] + torch.diag_embed(1 - mask)
    inverse, _, bad = _invert(hessian)
    return inverse * mask[:, :, None] * mask[:, None], bad


def params_and_slopes(fit, problem, u: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parameters of each source, (B, P_k), and derivatives of all these, then of the background.

    The derivatives (B, D + nb, U + nb) are by the coordinates and the background.
    """
    count, nb = problem.sources, len(fit.templates)
    params: list[torch.Tensor | None] = [None] * count
    slopes: list[torch.Tensor | None] = [None] * count
    for part in problem.parts:
        own, slope = part.to_params(problem.split(u, part))
        for j, k in enumerate(part.slots):
            params[k] = own.unflatten(0, (-1, len(part.slots)))[:, j]
            slopes[k] = slope.unflatten(0, (-1, len(part.slots)))[:, j]
    sizes = [s.shape[1] for s in slopes]
    jacobian = u.new_zeros((len(u), sum(sizes) + nb, problem.size + nb))
    first = 0
    for size, where, slope in zip(sizes, problem.where, slopes, strict=True):
        jacobian[:, first : first + size, where] = slope
        first += size
    for i in range(nb):
        jacobian[:, first + i, problem.size + i] = fit.scale
    return params, jacobian


def in_data_units(
    fit, problem, result, light, free, inverse, bad, n_iter, misfit, extra=None
) -> SceneFits:
    """What was fitted, given the covariance ``inverse`` (B, U + nb, U + nb) of coordinates.

    ``light`` is that of the sources, from `_Fit.light`.

    ``extra`` (B, D + nb, D + nb) is added to that of parameters and background, if not to the
    noise of fluxes.
    """
    params, jacobian = params_and_slopes(fit, problem, result.u)
    images = light.double() * fit.scale[:, None, None]
    images = images.unflatten(2, fit.shape).cpu().numpy()
    off = np.zeros_like(images)
    for part in problem.parts if misfit else []:
        own = torch.stack([params[k] for k in part.slots], 1).flatten(0, 1)
        fraction = part.misfit_fraction(own)
        if fraction is not None:
            fraction = fraction.reshape(-1, len(part.slots), *fit.shape)
            off[:, part.slots] = np.abs(images[:, part.slots]) * fraction
    cov = jacobian @ inverse @ jacobian.transpose(1, 2)
    flux_noise = torch.diagonal(cov, dim1=1, dim2=2)[:, flux_places(fit.setups)].clamp_min(0).sqrt()
    flux_noise[bad] = torch.nan
    if extra is not None:
        cov = cov + extra
    cov = _angles_capped(cov, fit.setups)
    cov[bad] = torch.nan
    at_bound = result.at_bound & free
    return SceneFits(
        params=[p.cpu().numpy() for p in params],
        cov=cov.cpu().numpy(),
        flux_noise=flux_noise.cpu().numpy(),
        background=(result.linear[:, 1:] * fit.scale[:, None]).cpu().numpy(),
        images=images,
        misfit=off,
        chi2=result.chi2.cpu().numpy(),
        cost=result.cost.cpu().numpy(),
        n_iter=(result.n_iter + n_iter).cpu().numpy(),
        converged=result.converged.cpu().numpy(),
        bad_covariance=bad.cpu().numpy(),
        at_bound=np.stack([at_bound[:, w].any(1).cpu().numpy() for w in problem.where], 1),
        n_free=int(free[0].sum()) + len(fit.templates),
    )


def _angles_capped(cov: torch.Tensor, setups: Sequence[BatchSetup]) -> torch.Tensor:
    """Covariances in which no angle of an axis is wider than one of which nothing is known."""
    factor = cov.new_ones(cov.shape[:2])
    first = 0
    for setup in setups:
        for i, name in enumerate(setup.names):
            if name.startswith("theta"):
                width = torch.nan_to_num(cov[:, first + i, first + i]).clamp_min(0).sqrt()
                factor[:, first + i] = (_ANGLE_WIDTH / width.clamp_min(1e-9)).clamp_max(1.0)
        first += len(setup.names)
    return cov * factor[:, :, None] * factor[:, None]
