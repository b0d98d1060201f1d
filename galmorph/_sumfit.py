"""Fitting a sum of galaxies the astropy way: as a scene, as `galmorph.deblend` does.

A compound model or a group of photutils is a model like any other to astropy, with derivatives
that may be known only by differences.  Where it is a sum of our models it is fitted as a scene.
Not so, and left to the way of any model: parameters that are tied (a tie may be between
sources, which scenes do not know), sources of different PSFs, backgrounds of which only a part is
free or bounded, priors of the background, and images that would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from astropy.modeling.core import CompoundModel, Model
from astropy.modeling.functional_models import Const2D, Planar2D
from astropy.modeling.polynomial import Polynomial2D

from galmorph._batchfit import BatchSetup
from galmorph._scenefit import SceneBatch, SceneFits, centre_reach, fit_scenes
from galmorph.models.base import GalaxyModel
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.models.point_source import PointSource2D
from galmorph.psf import PSF

if TYPE_CHECKING:
    from galmorph.fitting import MAPFitter
    from galmorph.priors import Prior

__all__ = ["Sum", "SumFit", "each_once", "fit_sum", "sum_of"]

# numbers of the images and derivatives of all sources beyond which a scene is too large (1 GB)
_LARGEST = 2**27
# how often a fit goes on from where a centre came to the end of its way
_MOVES = 5
# by how much -2 ln(posterior) is lower where a start is clearly better than another
_CLEAR = 1.0


@dataclass
class Sum:
    """A model as a sum.

    Attributes
    ----------
    names : tuple of N str
        Of all parameters of the sum.
    values : array, shape (N,)
        What they are.
    galaxies : list of (int, GalaxyModel)
        Where the parameters of each one begin, and a copy of it with its values and constraints.
    held : list of Model
        Terms without a free parameter.
    sky : (int, Model) or None
        Where the parameters of a free background begin, and it.
    cutouts : bool
        Whether points that are given more than once are one pixel in several cut-outs.
    """

    names: tuple[str, ...]
    values: np.ndarray
    galaxies: list[tuple[int, GalaxyModel]] = field(default_factory=list)
    held: list[Model] = field(default_factory=list)
    sky: tuple[int, Model] | None = None
    cutouts: bool = False

    @classmethod
    def of(cls, model: Model, *, cutouts: bool = False) -> Sum:
        """The sum of no terms yet with the parameters of a model."""
        names = tuple(model.param_names)
        return cls(names, _values(model), cutouts=cutouts)

    @property
    def psf(self) -> PSF | None:
        """The PSF of all galaxies."""
        return self.galaxies[0][1].psf

    @property
    def background(self) -> str:
        """Name of the background of a scene."""
        terms = 0 if self.sky is None else len(self.sky[1].param_names)
        return {0: "none", 1: "constant", 3: "tilted"}[terms]

    def numbers(self, pixels: int) -> int:
        """How many numbers the images and derivatives of all sources in so many pixels are."""
        return pixels * sum(1 + len(galaxy.param_names) for _, galaxy in self.galaxies)


@dataclass
class SumFit:
    """What was found of a sum: parameters (N,), covariance (N, N) and how the fit ended."""

    params: np.ndarray
    cov: np.ndarray
    n_iter: int
    converged: bool
    at_bound: bool


def sum_of(model: Model) -> Sum | None:
    """A model as a sum that can be fitted as a scene; None if it is no such sum.

    Parameters
    ----------
    model : Model
        A compound model, or that of a group of `photutils.psf.PSFPhotometry`.

    Returns
    -------
    Sum or None
    """
    if len(model) > 1 or model.has_tied:
        return None
    total = _group(model)
    if total is None and isinstance(model, CompoundModel):
        total = _compound(model)
    if total is None or not total.galaxies:
        return None
    galaxies = [galaxy for _, galaxy in total.galaxies]
    same_psf = all(galaxy.psf == total.psf for galaxy in galaxies)
    points = any(isinstance(galaxy, PointSource2D) for galaxy in galaxies)
    if not same_psf or (points and total.psf is None):
        return None
    return total


def _compound(model: CompoundModel) -> Sum | None:
    """Terms of a sum; None if there are others than galaxies, a background and what is held."""
    terms = list(_terms(model))
    if None in terms or len({id(term) for term in terms}) < len(terms):
        return None
    total, first = Sum.of(model), 0
    for term in terms:
        free = [not term.fixed[name] for name in term.param_names]
        if not any(free):
            total.held.append(term.copy())
        elif isinstance(term, GalaxyModel):
            total.galaxies.append((first, term.copy()))
        elif all(free) and _is_sky(term) and total.sky is None:
            total.sky = first, term.copy()
        else:
            return None
        first += len(term.param_names)
    return total


def _terms(model: Model) -> Iterator[Model | None]:
    """The terms of a sum in the order of its parameters; None for what is not a sum."""
    if not isinstance(model, CompoundModel):
        yield model
    elif model.op == "+":
        yield from _terms(model.left)
        yield from _terms(model.right)
    else:
        yield None


def _is_sky(model: Model) -> bool:
    """Whether a model is a constant or a plane that may be anything."""
    plane = isinstance(model, (Const2D, Planar2D))  # | of models is theirs
    plane |= isinstance(model, Polynomial2D) and model.degree <= 1
    return plane and all(tuple(model.bounds[n]) == (None, None) for n in model.param_names)


def _group(model: Model) -> Sum | None:
    """The sources of a group of photutils, whose model is one of all their parameters.

    What it does not carry over, bounds of the shape, is told by the model that it was made of.
    """
    base = getattr(model, "base_psf_model", None)
    if not isinstance(base, GalaxyModel) or base.has_tied:
        return None
    names = list(base.param_names)
    count = getattr(model, "n_sources", 0)
    if list(model.param_names) != [f"{name}_{i}" for i in range(count) for name in names]:
        return None
    total = Sum.of(model, cutouts=True)
    for i in range(count):
        galaxy = base.copy()
        for name in names:
            given, own = getattr(model, f"{name}_{i}"), getattr(galaxy, name)
            own.value, own.fixed = given.value, given.fixed
            if tuple(given.bounds) != (None, None):
                own.bounds = given.bounds
        if all(galaxy.fixed.values()):
            total.held.append(galaxy)
        else:
            total.galaxies.append((i * len(names), galaxy))
    return total


def each_once(at: np.ndarray, z: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Data and weights (n,) in which a pixel that is in several cut-outs counts once.

    Its value is the mean, as each cut-out may have had a sky of its own taken away; all but
    the first have no weight.
    """
    used = weights > 0
    count = np.bincount(at, used)
    mean = np.bincount(at, np.where(used, z, 0.0)) / np.maximum(count, 1)
    rows = np.flatnonzero(used)
    _, first = np.unique(at[rows], return_index=True)
    once = np.zeros_like(weights)
    once[rows[first]] = weights[rows[first]]
    return np.where(once > 0, mean[at], z), once


def priors_of(total: Sum, priors: Mapping[str, Prior]) -> list[dict[str, Prior]] | None:
    """Priors of each galaxy, that may be given for one by its name in the sum, or for all.

    None if some are of the background, which is solved for.
    """
    sky = () if total.sky is None else total.names[total.sky[0] :][: len(total.sky[1].param_names)]
    if any(name in (own, own.rsplit("_", 1)[0]) for own in sky for name in priors):
        return None
    result = []
    for first, galaxy in total.galaxies:
        own = {}
        for place, name in enumerate(galaxy.param_names):
            named = total.names[first + place]
            for given in (named.rsplit("_", 1)[0], named):  # the more exact one last
                if given in priors and not galaxy.fixed[name]:
                    own[name] = priors[given]
        result.append(own)
    return result


def fit_sum(
    fitter: MAPFitter,
    total: Sum,
    origin: np.ndarray,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    maxiter: int,
) -> SumFit | None:
    """Fit a sum to an image.

    Parameters
    ----------
    fitter : MAPFitter
        Its priors and settings.
    total : Sum
    origin : array, shape (2,)
        (x, y) of the first pixel.
    data, inv_sigma : array, shape (ny, nx)
        Pixels and one over their uncertainty, zero where unusable.
    maxiter : int
        Evaluations of each start.

    Returns
    -------
    SumFit or None
        None where scenes cannot do what is asked.

    Notes
    -----
    Fluxes of sources that have a size do not go below zero, as in `galmorph.deblend`.
    """
    priors = priors_of(total, fitter.priors or {})
    if priors is None or total.numbers(data.size) > _LARGEST:
        return None
    for term in total.held:
        y, x = np.mgrid[: data.shape[0], : data.shape[1]]
        data = data - term(x + origin[0], y + origin[1])
    data = np.where(inv_sigma > 0, data, 0.0)
    for _, galaxy in total.galaxies:  # in pixels of the image, whatever it hangs on
        galaxy.x_0, galaxy.y_0 = galaxy.x_0.value - origin[0], galaxy.y_0.value - origin[1]
    setups = _setups(fitter, total, priors, origin, maxiter)
    start = [_values(galaxy)[None] for _, galaxy in total.galaxies]
    fits = _fit(setups, data, inv_sigma, total.psf, start, fitter.max_shift is None)
    return _summary(total, fits, origin, data.shape)


def _setups(fitter, total: Sum, priors, origin, maxiter: int) -> list[BatchSetup]:
    """One for each galaxy; the same for those that are alike, which are drawn together."""
    made: dict[tuple, BatchSetup] = {}
    result = []
    for (_, galaxy), own in zip(total.galaxies, priors, strict=True):
        names = galaxy.param_names
        key = (
            type(galaxy),
            id(getattr(galaxy, "shape", None)),
            tuple((galaxy.fixed[n], tuple(galaxy.bounds[n]), id(own.get(n))) for n in names),
            tuple(float(getattr(galaxy, n).value) for n in names if galaxy.fixed[n]),
        )
        if key not in made:
            made[key] = BatchSetup(
                model=galaxy,
                priors=own,
                background=total.background,
                device=fitter.device,
                dtype=torch.float64,
                window=fitter.batch_size,
                max_iter=maxiter,
                tolerance=fitter.tolerance,
                max_shift=fitter.max_shift,
                origin=(float(origin[0]), float(origin[1])),
            )
        result.append(made[key])
    return result


def _fit(setups, data, inv_sigma, psf, start: list[np.ndarray], may_go_on: bool) -> SceneFits:
    """The scene, fitted from ``start``; learned galaxies from a scene of Sérsic profiles, too."""
    batch = SceneBatch(
        data=data[None],
        inv_sigma=inv_sigma[None],
        psf=psf,
        position=np.stack([own[:, 1:3] for own in start], 1),
        spread=np.full((1, len(start)), np.inf),
    )
    if not any(_is_bent(setup) for setup in setups):
        return _from(setups, batch, start, may_go_on)
    usual = fit_scenes(setups, batch)
    # fits that are as good may have other latents: that which `deblend` finds is preferred
    other = _from(setups, batch, start, may_go_on, tolerance=_CLEAR)
    if other.cost[0] < usual.cost[0]:
        other = _from(setups, batch, other.params, may_go_on)
    return other if other.cost[0] < usual.cost[0] - _CLEAR else usual


def _is_bent(setup: BatchSetup) -> bool:
    """Whether there are latents to be found, for which a first guess matters."""
    return isinstance(setup.model, LearnedGalaxy2D) and any(setup.free[5:])


def _from(
    setups,
    batch: SceneBatch,
    start: Sequence[np.ndarray],
    may_go_on: bool,
    *,
    tolerance: float = 0.0,
) -> SceneFits:
    """A fit from ``start``; a centre that goes far is followed unless that was not allowed."""
    n_iter = 0
    for _ in range(_MOVES):
        fits = fit_scenes(setups, batch, start=start, tolerance=tolerance)
        n_iter = n_iter + fits.n_iter
        centre = np.stack([own[:, 1:3] for own in fits.params], 1)
        # free centres may go this far at least
        moved = np.abs(centre - batch.position).max()
        if not (may_go_on and fits.at_bound.any() and moved >= _way_of(batch.psf)):
            break
        start, batch = fits.params, replace(batch, position=centre)
    fits.n_iter = np.asarray(n_iter)
    return fits


def _way_of(psf: PSF | None) -> float:
    """How far the centre of a source may go in one fit, less what rounding may take."""
    return centre_reach(0.0 if psf is None else psf.sigma) - 1e-6


def _values(model: Model) -> np.ndarray:
    return np.array([float(np.ravel(getattr(model, n).value)[0]) for n in model.param_names])


def _plane(sky: Model, origin: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Coefficients of `background_templates` by the parameters of a background, (nb, nb)."""
    count = len(sky.param_names)
    x = origin[0] + 0.5 * (shape[1] - 1) + np.array([0.0, 1.0, 0.0])
    y = origin[1] + 0.5 * (shape[0] - 1) + np.array([0.0, 0.0, 1.0])
    columns = []
    for unit in np.eye(count):
        value = np.broadcast_to(np.asarray(sky.evaluate(x, y, *unit), dtype=float), x.shape)
        columns.append([value[0], value[1] - value[0], value[2] - value[0]][:count])
    return np.array(columns).T


def _summary(total: Sum, fits: SceneFits, origin, shape: tuple[int, int]) -> SumFit:
    """Parameters and covariance of the sum, from those of the sources and the background."""
    found = np.concatenate([own[0] for own in fits.params])
    every = np.concatenate([found, fits.background[0]])
    take = np.zeros((len(total.names), len(every)))
    held = np.zeros(len(total.names), dtype=bool)
    params, place = total.values.copy(), 0
    for first, galaxy in total.galaxies:
        count = len(galaxy.param_names)
        take[np.arange(first, first + count), np.arange(place, place + count)] = 1.0
        held[first : first + count] = [galaxy.fixed[n] for n in galaxy.param_names]
        place += count
    if total.sky is not None:
        first, sky = total.sky
        own = np.linalg.inv(_plane(sky, origin, shape))
        take[first : first + len(own), place:] = own
    moved = take @ every
    for first, _ in total.galaxies:
        moved[first + 1 : first + 3] += origin
    fitted = take.any(1) & ~held
    params[fitted] = moved[fitted]
    return SumFit(
        params=params,
        cov=take @ fits.cov[0] @ take.T,
        n_iter=int(fits.n_iter[0]),
        converged=bool(fits.converged[0]),
        at_bound=bool(fits.at_bound.any()),
    )
