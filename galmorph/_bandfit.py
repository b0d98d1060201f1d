"""Fitting scenes in several bands together, in torch, and the turns over groups of a field.

Places and shapes are common to all bands, fluxes are each band's own.  The normal equations of a
band are those of `galmorph._scenefit`; they are added in joint coordinates.  Levenberg-Marquardt
steps ask for images: what they get is a square root of the sum, with the same scalar products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from galmorph import _forced
from galmorph._batchfit import BatchSetup, _take_better, one_thread
from galmorph._scenefit import (
    _ANGLE_WIDTH,
    _WINDOW,
    SceneBatch,
    SceneFits,
    _Fit,
    _Learned,
    in_data_units,
    inverse_of_free,
    params_and_slopes,
    tolerance_of,
)
from galmorph._scenes import (
    _REWEIGHTINGS,
    _ROUNDS,
    _SAME,
    _SETTLED,
    Group,
    Scene,
    Source,
    Work,
    _cut,
    _keep,
    _known,
    _light,
    _shifted,
    _shifts,
    _Task,
    _working,
    is_one,
    solve_scenes,
)
from galmorph._structure import Patches, flux_places, patches_in
from galmorph.flags import FitFlag
from galmorph.inference.least_squares import Linearisation, _project, levenberg_marquardt

__all__ = ["BandFits", "JointGroup", "fit_bands", "solve_bands"]

_WIDE = torch.float64
#: Weighted light, as a share of all, below which a band says nothing of a source.
_NOTHING = 1e-8
#: Lift of the diagonal of scaled normal equations of which the root is taken.
_LIFT, _LIFT_SINGULAR = 1e-12, 1e-6
#: Pixels times sources times bands that are fitted at once.
_BATCH = 2**20
_SHARE = "bulge_fraction"


@dataclass
class BandFits:
    """Joint fits of B scenes of K sources in nb bands.

    Attributes
    ----------
    bands : list of nb SceneFits
        With the parameters that are common to all bands and those of this one; covariances
        are of the joint fit.
    params : list of K arrays, shape (B, J_k)
        Joint parameters: what each band has of its own, then what is common; see
        `galmorph.multiband.MultiBandResult.param_names`.
    cov : array, shape (B, J, J)
        Of the joint parameters of all sources.
    held : array of bool, shape (B, nb, K)
        Where a band says nothing of a source.
    """

    bands: list[SceneFits]
    params: list[np.ndarray]
    cov: np.ndarray
    held: np.ndarray


def _own_params(setup: BatchSetup, colors: bool) -> list[str]:
    """Parameters that each band has of its own."""
    split = colors and _SHARE in setup.names and setup.free[setup.names.index(_SHARE)]
    return ["flux", _SHARE] if split else ["flux"]


class _Layout:
    """Where the coordinates of each band are among those of all bands."""

    def __init__(self, problem: Any, setups: Sequence[BatchSetup], bands: int, colors: bool):
        terms = len(problem.templates)
        self.index = torch.empty((bands, problem.size + terms), dtype=torch.long)
        self.own = torch.zeros(problem.size, dtype=torch.bool)
        self.names = [_own_params(s, colors) for s in setups]
        for k, (where, setup) in enumerate(zip(problem.where, setups, strict=True)):
            self.own[where.stop - 1] = True  # the flux
            if _SHARE in self.names[k]:
                share = [setup.names.index(_SHARE)]
                block = next(b for b in setup.coordinates.blocks if b.parameters == share)
                self.own[where.start + block.coordinates[0]] = True
        size = 0
        for c in range(problem.size + terms):
            alone = c >= problem.size or bool(self.own[c])
            for b in range(bands):
                self.index[b, c] = size + b * alone
            size += bands if alone else 1
        self.size, self.coordinates = size, problem.size

    def band(self, u: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates of a band's scene, and its background."""
        own = u[:, self.index[b]]
        return own[:, : self.coordinates], own[:, self.coordinates :]

    def joint(self, pieces: Sequence[torch.Tensor], reference: int, fill: float) -> torch.Tensor:
        """Of all bands, from those of each; what is common from the reference."""
        u = pieces[0].new_full((len(pieces[0]), self.size), fill)
        for b in [*(b for b in range(len(pieces)) if b != reference), reference]:
            u[:, self.index[b, : self.coordinates]] = pieces[b]
        return u


class _BandsProblem:
    """Scenes in several bands as `levenberg_marquardt` sees them."""

    linear_amplitude = False
    whitening = None

    def __init__(self, fits, problems, layout: _Layout, reference: int) -> None:
        self.fits, self.problems, self.layout, self.reference = fits, problems, layout, reference
        count, device = len(fits[0].data), fits[0].device
        # residuals are in the images: nothing is left for the data
        self.data = torch.zeros((count, layout.size + 1), dtype=_WIDE, device=device)
        self.weight = torch.ones_like(self.data)
        self.templates = self.data[:0]

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        size = self.layout.size
        hessian = u.new_zeros((len(u), size, size))
        gradient, chi2 = torch.zeros_like(u), u.new_zeros(len(u))
        penalty = slope = None
        for b, problem in enumerate(self.problems):
            own, level = self.layout.band(u, b)
            lin = problem.linearise(own, rows)
            at = self.layout.index[b]
            square, pull, rest = self._normal_equations(problem, lin, level, rows)
            hessian[:, at[:, None], at] += square
            gradient[:, at] += pull
            chi2 += rest
            if b == self.reference:  # the priors count once
                penalty = lin.penalty
                slope = u.new_zeros((len(u), penalty.shape[1], size))
                slope[:, :, at[: problem.size]] = lin.penalty_chain.to(u)
        root, residual = _root_of(hessian, gradient, chi2)
        return Linearisation(
            columns=torch.cat([-residual[:, None], root.transpose(1, 2)], 1),
            chain=torch.eye(size, dtype=_WIDE, device=u.device).expand(len(u), -1, -1),
            amplitude=torch.ones_like(u[:, 0]),
            amplitude_chain=torch.zeros_like(u),
            penalty=penalty,
            penalty_chain=slope,
        )

    @staticmethod
    def _normal_equations(problem, lin: Linearisation, level, rows):
        """J^T J, J^T r and r^T r of a band."""
        weight = problem.weight[rows]
        terms = len(problem.templates)
        templates = problem.templates.expand(len(weight), -1, -1)
        light = lin.columns[:, 0]
        if terms:
            light = light + (level.to(light.dtype)[:, None] @ templates)[:, 0]
        slopes = torch.cat([lin.columns[:, 1:], templates], 1) * weight[:, None]
        rest = (problem.data[rows] - light) * weight
        if problem.whitening is not None:
            slopes = problem.whitening(slopes, rows)
            rest = problem.whitening(rest[:, None], rows)[:, 0]
        chain = level.new_zeros((len(weight), slopes.shape[1], problem.size + terms))
        chain[:, : lin.chain.shape[1], : problem.size] = lin.chain
        for i in range(terms):
            chain[:, lin.chain.shape[1] + i, problem.size + i] = 1.0
        gram = (slopes @ slopes.transpose(1, 2)).to(_WIDE)
        pull = (chain.transpose(1, 2) @ _project(rest, slopes)[..., None])[..., 0]
        return chain.transpose(1, 2) @ gram @ chain, pull, rest.square().sum(1, dtype=_WIDE)

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        u = u.clone()
        for b in [*(b for b in range(len(self.problems)) if b != self.reference), self.reference]:
            own, _ = self.layout.band(u, b)
            u[:, self.layout.index[b, : own.shape[1]]] = self.problems[b].project(own, rows)
        return u


def _root_of(hessian, gradient, chi2) -> tuple[torch.Tensor, torch.Tensor]:
    """R (b, U + 1, U) and t (b, U + 1) with R^T R, R^T t and t^T t as given."""
    scale = torch.diagonal(hessian, dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    scaled = torch.nan_to_num(hessian * scale[:, :, None] * scale[:, None])
    eye = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    factor, info = torch.linalg.cholesky_ex(scaled + _LIFT * eye)
    bad = info > 0
    if bad.any():
        factor[bad] = torch.linalg.cholesky_ex(scaled[bad] + _LIFT_SINGULAR * eye)[0]
    root = factor.transpose(1, 2) / scale[:, None]
    # of what no image depends on, there are no rows
    root = torch.where((torch.diagonal(hessian, dim1=1, dim2=2) > 0)[:, None], root, 0.0)
    right = (gradient * scale)[..., None]
    top = torch.linalg.solve_triangular(factor, right, upper=False)[..., 0]
    rest = (chi2 - top.square().sum(1)).clamp_min(0).sqrt()
    pad = torch.nn.functional.pad
    return pad(root, (0, 0, 0, 1)), torch.cat([top, rest[:, None]], 1)


@one_thread()
@torch.no_grad()
def fit_bands(
    setups: Sequence[BatchSetup],
    batches: Sequence[SceneBatch],
    start: Sequence[Sequence[np.ndarray]],
    *,
    reference: int = 0,
    colors: bool = False,
    misfit: bool = False,
    structure: float = 0.0,
) -> BandFits:
    """Fit all sources of every scene of a batch in all bands together.

    Parameters
    ----------
    setups : sequence of K BatchSetup
        One a source, as for `galmorph._scenefit.fit_scenes`.
    batches : sequence of nb SceneBatch
        The same scenes in each band.
    start : sequence of nb sequences of K arrays, shape (B, P_k)
        Parameters to start from; fluxes are solved for.
    reference : int, optional
        The band whose coordinates what is common is taken from.
    colors : bool, optional
        Whether bulges and disks have colours of their own.
    misfit : bool, optional
        Whether the misfit of learned sources is wanted.
    structure : float, optional
        How much light that no model has the covariance allows for, as for `fit_scenes`.

    Returns
    -------
    BandFits
    """
    fits = [_Fit(setups, batch) for batch in batches]
    problems, pieces, lows, highs = [], [], [], []
    for fit, own in zip(fits, start, strict=True):
        started = [torch.as_tensor(s, dtype=_WIDE, device=fit.device) for s in own]
        problem, u, bounds = fit.assemble(setups, started)
        problems.append(problem)
        pieces.append(fit.fluxes(problem, u))
        lows.append(bounds[0])
        highs.append(bounds[1])
    layout = _Layout(problems[0], setups, len(fits), colors)
    held = torch.stack([_says_nothing(p, u) for p, u in zip(problems, pieces, strict=True)], 1)
    for b, problem in enumerate(problems):
        _hold(problem, layout, held[:, b], pieces[b], lows[b], highs[b])
    u = layout.joint(pieces, reference, 0.0)
    lower = layout.joint(lows, reference, -torch.inf)
    upper = layout.joint(highs, reference, torch.inf)
    problem = _BandsProblem(fits, problems, layout, reference)
    result = _solve(problem, setups[0], u, lower, upper)
    wide = {
        int(i)
        for b, (fit, own) in enumerate(zip(fits, problems, strict=True))
        for i in fit.widen(own, layout.band(result.u, b)[0])
    }
    if wide:
        rows = torch.tensor(sorted(wide), device=u.device)
        again = _solve(problem, setups[0], result.u, lower, upper, rows)
        _take_better(result, again, rows, -torch.inf)
    return _joint_fits(problem, result, upper > lower, held, misfit, structure)


def _says_nothing(problem, u: torch.Tensor) -> torch.Tensor:
    """Of which sources (B, K) a band has no light in usable pixels."""
    images = problem.units(u)
    seen = (images * problem.weight[:, None]).square().sum(2)
    return seen <= _NOTHING * images.square().sum(2)


def _hold(problem, layout: _Layout, held: torch.Tensor, u, low, high) -> None:
    """Hold what a band has of its own of such sources: no flux."""
    for k, where in enumerate(problem.where):
        rows = torch.nonzero(held[:, k])[:, 0]
        u[rows, where.stop - 1] = 0.0
        for c in range(where.start, where.stop):
            if layout.own[c]:
                low[rows, c] = high[rows, c] = u[rows, c]


def _solve(problem: _BandsProblem, setup, u, lower, upper, rows=None):
    for b, own in enumerate(problem.problems):
        for part in own.parts:
            part.fresh(own.split(problem.layout.band(u, b)[0], part))
    learned = any(isinstance(part, _Learned) for part in problem.problems[0].parts)
    return levenberg_marquardt(
        problem,
        u,
        lower=lower,
        upper=upper,
        max_iter=setup.max_iter,
        tolerance=max(tolerance_of(learned), setup.tolerance),
        relative_tolerance=1e-6 if setup.dtype == torch.float32 else 1e-10,
        window=max(1, min(setup.window, _WINDOW)),
        rows=rows,
    )


def _joint_fits(
    problem: _BandsProblem, result, free, held, misfit: bool, structure: float
) -> BandFits:
    """Parameters, covariances and images in the units of the data."""
    layout, setups = problem.layout, problem.fits[0].setups
    free = free & torch.isfinite(result.u)
    inverse, bad = inverse_of_free(result.hessian, free)
    changed = _Structure(problem, result.u, inverse, structure) if structure else None
    bands, values, slopes = [], [], []
    for b, (fit, own) in enumerate(zip(problem.fits, problem.problems, strict=True)):
        u, level = layout.band(result.u, b)
        light = changed.bands[b].light if changed else fit.light(own, u)
        at = layout.index[b]
        state = SimpleNamespace(
            u=u,
            linear=torch.cat([torch.ones_like(u[:, :1]), level], 1),
            chi2=_chi2(fit, own, light, level),
            cost=result.cost,
            n_iter=result.n_iter,
            converged=result.converged,
            at_bound=result.at_bound[:, at[: own.size]],
        )
        cov = inverse[:, at[:, None], at]
        params, jacobian = params_and_slopes(fit, own, u)
        extra = None
        if changed:
            extra = changed.covariance(jacobian, at, {b: flux_places(setups)})
        own_free = free[:, at[: own.size]]
        band = in_data_units(fit, own, state, light, own_free, cov, bad, 0, misfit, extra)
        bands.append(band)
        wide = jacobian.new_zeros((*jacobian.shape[:2], layout.size))
        wide[:, :, at] = jacobian
        values.append(params)
        slopes.append(wide)
    joint, chain, angles, first = [], [], [], 0
    fluxes: dict[int, list[int]] = {b: [] for b in range(len(bands))}
    for k, setup in enumerate(setups):
        alone = layout.names[k]
        picks = [(b, n) for n in alone for b in range(len(bands))]
        picks += [(problem.reference, n) for n in setup.names if n not in alone]
        where = [(b, setup.names.index(n)) for b, n in picks]
        for b, places in fluxes.items():
            places.append(len(chain) + picks.index((b, "flux")))
        joint.append(torch.stack([values[b][k][:, i] for b, i in where], 1).cpu().numpy())
        chain += [slopes[b][:, first + i] for b, i in where]
        angles += [n.startswith("theta") for _, n in picks]
        first += len(setup.names)
    chain = torch.stack(chain, 1)
    cov = chain @ inverse @ chain.transpose(1, 2)
    if changed:
        cov = cov + changed.covariance(chain, slice(None), fluxes)
    cov = _capped(cov, torch.tensor(angles, device=cov.device))
    cov[bad] = torch.nan
    return BandFits(bands, joint, cov.cpu().numpy(), held.cpu().numpy())


class _Structure:
    """What light that models do not have does to a joint fit.

    It is the same light in all bands, arms as well as tails: a patch of a source is brighter by the
    same fraction in each, but for what the PSF of the band smears.  So errors of the fluxes of a
    source go together, and cancel in part in colours.
    """

    def __init__(self, problem: _BandsProblem, u: torch.Tensor, inverse, amount: float) -> None:
        layout = problem.layout
        self.amount, self.bands, pull = amount, [], 0.0
        for b, (fit, own) in enumerate(zip(problem.fits, problem.problems, strict=True)):
            at = layout.index[b]
            parts = [part for _, part in patches_in(fit, own, layout.band(u, b)[0])]
            patches = Patches(
                *(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Patches))
            )
            joint = u.new_zeros((len(u), layout.size, patches.pull.shape[2]))
            joint[:, at] = patches.pull
            pull = pull + joint
            self.bands.append(patches)
        self.moved = inverse @ pull  # coordinates, by patches of all bands

    def covariance(
        self, jacobian: torch.Tensor, at: Any, fluxes: dict[int, list[int]]
    ) -> torch.Tensor:
        """Of parameters with a Jacobian by coordinates ``at``; fluxes of bands are at places."""
        error, unseen = jacobian @ self.moved[:, at], 0.0
        for b, places in fluxes.items():
            error = self.bands[b].errors(error, places)
            unseen = unseen + self.bands[b].unseen(error.shape[1], places)
        total = error @ error.transpose(1, 2) + unseen @ unseen.transpose(1, 2)
        return self.amount**2 * total


def _chi2(fit, problem, light: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    rest = fit.data - light.sum(1)
    if level.shape[1]:
        rest = rest - level.to(rest.dtype) @ fit.templates
    rest = rest * fit.weight
    if problem.whitening is not None:
        rest = problem.whitening(rest[:, None], torch.arange(len(light), device=light.device))[:, 0]
    return rest.square().sum(1, dtype=_WIDE)


def _capped(cov: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Covariances in which no angle is wider than one of which nothing is known."""
    width = torch.diagonal(cov, dim1=1, dim2=2).clamp_min(0).sqrt().clamp_min(1e-9)
    factor = torch.where(angles, (_ANGLE_WIDTH / width).clamp_max(1.0), 1.0)
    return cov * factor[:, :, None] * factor[:, None]


# -- the turns -------------------------------------------------------------------------------


@dataclass
class JointGroup:
    """Sources that are fitted together in all bands.

    Attributes
    ----------
    members : array of int
    params : list of arrays, shape (J_k,), or None
        Joint parameters of each member, positions in pixels of the image.
    cov : array, shape (J, J), or None
    held : array of bool, shape (nb, K)
        Where a band says nothing of a source.
    """

    members: np.ndarray
    bands: list[Group]
    start: list[list[np.ndarray]]
    params: list[np.ndarray] | None = None
    cov: np.ndarray | None = None
    held: np.ndarray | None = None


def solve_bands(
    scenes: list[Scene],
    reference: int,
    fitter: Any,
    background: str,
    max_group: int,
    report: Callable[[int], None],
    *,
    colors: bool,
    structure: float,
) -> list[JointGroup]:
    """Fit all sources in all bands; results are put in the sources and groups of the scenes.

    Groups and first shapes are those of a fit of the reference band.
    """
    options = {"reference": reference, "colors": colors, "structure": structure}
    first = _start_scene(scenes, reference)
    work = Work(fitter, background)
    solve_scenes([first], work, max_group, report)
    groups = []
    for g, group in enumerate(first.groups):
        start = [first.sources[k].params for k in group.members]
        own = [Group(group.members, group.origin, group.shape) for _ in scenes]
        groups.append(JointGroup(group.members, own, [start] * len(scenes)))
        for scene, part in zip(scenes, own, strict=True):
            scene.groups.append(part)
            for k in group.members:
                scene.sources[k].group, scene.sources[k].box = g, part.box
                if not _usable(start):  # not even one band could be fitted
                    scene.sources[k].flags |= first.sources[k].flags
                    scene.errors |= first.errors
    groups = [g for g in groups if _usable(g.start[0])]
    several = not is_one([group.bands[0] for group in groups], first.shape)
    if several:
        for scene in scenes:
            _first_fluxes(scene, first, groups)
    seen: dict[int, list[np.ndarray]] = {}
    for turn in range(_ROUNDS if several else 1):
        done = 0
        # as in one band: later, groups that share much are not fitted at once
        for now in [groups] if turn == 0 else _apart(groups):
            totals = [_light(scene) for scene in scenes] if several else None
            todo = _tasks(scenes, now, totals, seen)
            for own in _batches(todo, work):
                _fit_some(own, work, options)
                if turn == 0:
                    report(sum(len(group.members) for group, _ in own))
            done += len(todo)
        if not done:
            break
    for b, scene in enumerate(scenes):
        _blank_failures(scene, groups, b)
    return groups


def _apart(groups: list[JointGroup]) -> list[list[JointGroup]]:
    """Groups that may be fitted at the same time."""
    joint = {id(group.bands[0]): group for group in groups}
    return [[joint[id(own)] for own in some] for some in _shifts([g.bands[0] for g in groups])]


def _usable(params: Sequence[np.ndarray | None]) -> bool:
    return all(p is not None and np.isfinite(p).all() for p in params)


def _start_scene(scenes: list[Scene], reference: int) -> Scene:
    """The reference band; holes in it that another band does not have are filled from there."""
    scene = scenes[reference]
    failed = int(FitFlag.FAILED)
    flags = np.array([[s.flags for s in one.sources] for one in scenes], dtype=int)
    common = np.bitwise_and.reduce(flags & failed, 0)
    data, inv_sigma = scene.data, scene.inv_sigma
    if (common != flags[reference] & failed).any():
        data, inv_sigma = data.copy(), inv_sigma.copy()
        for other in scenes:
            hole = (inv_sigma <= 0) & (other.inv_sigma > 0)
            ratio = _usual(other.inv_sigma) / _usual(inv_sigma)  # the same signal to noise
            data[hole] = other.data[hole] * ratio
            inv_sigma[hole] = other.inv_sigma[hole] / ratio
    own = [
        Source(flags=int(f) if c else int(f) & ~failed)
        for f, c in zip(flags[reference], common, strict=True)
    ]
    return replace(scene, data=data, inv_sigma=inv_sigma, sources=own, groups=[], errors={})


def _usual(inv_sigma: np.ndarray) -> float:
    return float(np.median(inv_sigma[inv_sigma > 0])) if (inv_sigma > 0).any() else 1.0


def _first_fluxes(scene: Scene, first: Scene, groups: list[JointGroup]) -> None:
    """Images of all sources in a band, with the shapes of another and fluxes that fit."""
    members = [(group, j, int(k)) for group in groups for j, k in enumerate(group.members)]
    rows = np.array([k for *_, k in members])
    params = [np.array(group.start[0][j]) for group, j, _ in members]
    for p in params:
        p[0] = 1.0
    models = [scene.models[k] for k in rows]
    level = 0.1 / _usual(first.inv_sigma)
    half = [_seen_to(first.sources[k].image, level) for k in rows]
    xy = np.array([p[1:3] for p in params])
    boxes = _forced.Boxes(xy, np.maximum(half, 8.0), scene.shape)
    design = boxes.matrix(_forced.draw(boxes, models, params, scene.psf))
    fit = _forced.solve(design, scene.data.ravel(), scene.inv_sigma.ravel(), background=False)
    for (group, _, k), own, flux in zip(members, params, np.nan_to_num(fit.flux), strict=True):
        box = group.bands[0]
        image = scene.models[k].render(
            box.shape, params=_shifted(own, box, -1)[None], psf=scene.psf, dtype="float32"
        )[0]
        scene.sources[k].image = np.nan_to_num(flux * image)


def _seen_to(image: np.ndarray, level: float) -> float:
    """Half of the larger extent of what is brighter than a level, in pixels."""
    bright = np.abs(image) > level
    ends = [np.flatnonzero(bright.any(axis)) for axis in (0, 1)]
    return max((0.5 * np.ptp(e) + 1 for e in ends if len(e)), default=0.0)


def _tasks(scenes, groups, totals, seen) -> list[tuple[JointGroup, list[_Task]]]:
    """Groups that are still to be fitted, in each band with the light of all others taken away."""
    todo = []
    for group in groups:
        tasks, left = [], []
        for b, (scene, own) in enumerate(zip(scenes, group.bands, strict=True)):
            start = [_shifted(p, own, -1) for p in group.start[b]]
            if totals is None:
                tasks.append(_Task(scene, own, scene.data, scene.inv_sigma, start))
                continue
            data, inv_sigma, others = _cut(scene, own.origin, own.shape, totals[b])
            images = [scene.sources[k].image for k in group.members]
            others = np.where(inv_sigma > 0, others - sum(i for i in images if i is not None), 0.0)
            left.append(others)
            tasks.append(_Task(scene, own, data - others, inv_sigma, start))
        before = seen.get(id(group))
        if before is not None and all(
            np.sqrt((((a - c) * t.inv_sigma) ** 2).sum()) < _SETTLED
            for a, c, t in zip(left, before, tasks, strict=True)
        ):
            continue
        seen[id(group)] = left
        todo.append((group, tasks))
    return todo


def _batches(todo, work: Work) -> list[list[tuple[JointGroup, list[_Task]]]]:
    """Groups that can be fitted as one batch: of the same shape and models."""
    alike: dict[tuple, list] = {}
    for group, tasks in todo:
        scene = tasks[0].scene
        models = tuple(id(work.setup_of(scene, k)) for k in group.members)
        alike.setdefault((tasks[0].data.shape, models), []).append((group, tasks))
    result = []
    for batch in alike.values():
        group, tasks = batch[0]
        pixels = tasks[0].data.size * len(group.members) * len(tasks)
        step = int(np.clip(_BATCH // pixels, 1, 64))
        result += [batch[i : i + step] for i in range(0, len(batch), step)]
    return result


def _fit_some(todo, work: Work, options: dict[str, Any]) -> None:
    """Fit groups that are alike; where one makes the fit fail, the others are done without."""
    try:
        _fit(todo, work, options)
    except Exception as error:
        if len(todo) > 1:
            for one in todo:
                _fit_some([one], work, options)
            return
        group, tasks = todo[0]
        for task in tasks:
            for k in group.members:
                task.scene.sources[k].flags |= int(FitFlag.NOT_CONVERGED | FitFlag.BAD_COVARIANCE)
                task.scene.errors[str(task.scene.ids[k])] = f"{type(error).__name__}: {error}"


def _fit(todo, work: Work, options: dict[str, Any]) -> None:
    batches, start = [], []
    for b in range(len(todo[0][1])):
        tasks = [own[b] for _, own in todo]
        origin = np.array([t.group.origin[::-1] for t in tasks])
        scene = tasks[0].scene
        members = [t.group.members for t in tasks]
        batches.append(
            SceneBatch(
                data=np.stack([t.data for t in tasks]),
                inv_sigma=np.stack([t.inv_sigma for t in tasks]),
                psf=scene.psf,
                position=np.stack([scene.xy[m] for m in members]) - origin[:, None],
                spread=np.stack([scene.spread[m] for m in members]),
            )
        )
        start.append([np.stack(p) for p in zip(*(t.start for t in tasks), strict=True)])
    own = [work.setup_of(scene, k) for k in members[0]]
    fits = _with_noise(own, batches, start, work.fitter.noise, options)
    for i, (group, tasks) in enumerate(todo):
        for b, task in enumerate(tasks):
            _keep(task, fits.bands[b], i)
        group.cov, group.held = fits.cov[i], fits.held[i]
        group.params = []
        for j, setup in enumerate(own):
            params = fits.params[j][i].copy()
            at = len(_own_params(setup, options["colors"])) * len(
                tasks
            )  # centres are the first in common
            params[at : at + 2] += np.array(group.bands[0].origin[::-1])
            group.params.append(params)
        group.start = [
            [np.array(task.scene.sources[k].params) for k in group.members] for task in tasks
        ]


def _with_noise(setups, batches, start, noise, options: dict[str, Any]) -> BandFits:
    """`fit_bands` with any noise, by iteratively reweighted least squares."""
    misfit = bool(getattr(noise, "needs_misfit", False))
    changes = noise is not None and bool(noise.parameter_names or not noise.gaussian)
    options = {**options, "misfit": misfit}
    fits = fit_bands(setups, batches, start, **options)
    for _ in range(_REWEIGHTINGS if changes else 0):
        before = _fluxes(fits)
        work = [
            _working(batch, noise, _known(setups, own)) if (batch.inv_sigma > 0).any() else batch
            for batch, own in zip(batches, fits.bands, strict=True)
        ]
        fits = fit_bands(setups, work, [own.params for own in fits.bands], **options)
        noise_alone = np.stack([own.flux_noise for own in fits.bands])
        if not (np.abs(_fluxes(fits) - before) > _SAME * noise_alone).any():
            break
    if noise is not None:
        fits.cov = fits.cov / noise.information
        for own in fits.bands:
            own.cov = own.cov / noise.information
            own.flux_noise = own.flux_noise / np.sqrt(noise.information)
    return fits


def _fluxes(fits: BandFits) -> np.ndarray:
    return np.stack([np.stack([p[:, 0] for p in own.params], 1) for own in fits.bands])


def _blank_failures(scene: Scene, groups: list[JointGroup], b: int) -> None:
    """Put NaN for the flux of sources of which a band says nothing."""
    for group in groups:
        if group.params is None:
            continue
        for j, k in enumerate(group.members):
            source = scene.sources[k]
            if group.held[b, j]:
                source.flags |= int(FitFlag.NO_DATA)
            if source.flags & int(FitFlag.FAILED):
                source.params = np.array(source.params)
                source.params[0] = np.nan
                group.params[j] = np.array(group.params[j])
                group.params[j][b] = np.nan
