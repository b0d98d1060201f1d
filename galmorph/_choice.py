"""Which of several models each source of a scene wants, with its neighbours as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from galmorph._scenes import Group, Scene, _by_model, _overlap, _setups, solve_again
from galmorph.flags import FitFlag
from galmorph.models.point_source import PointSource2D
from galmorph.models.sersic import SersicGalaxy2D
from galmorph.priors import INDEX_PRIOR, LogNormal

__all__ = ["Candidates", "choose_models"]

#: Sides of the stamps on which models are compared.
_SIDES = np.array([25, 41, 61, 91, 121])
#: Half-light radii in FWHM of the PSF: what is not resolved (errors of the PSF make a star look
#: as large), and what is.  Medians and widths in the natural logarithm.
_UNRESOLVED, _RESOLVED = (0.1, 0.5), (0.7, 0.6)
_RADII = ("r_eff", "r_50", "r_disk")
_FWHM = 2 * np.sqrt(2 * np.log(2))


@dataclass
class Candidates:
    """Models to choose from, by name."""

    models: dict[str, Any]
    prior: np.ndarray
    psf_error: float

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    @property
    def first(self) -> Any:
        """What is fitted before there is a choice: the first that has a size."""
        sized = [m for m in self.models.values() if not isinstance(m, PointSource2D)]
        return (sized or list(self.models.values()))[0]


def choose_models(
    scenes: list[Scene],
    candidates: Candidates,
    fitter: Any,
    background: str,
    report: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Give every source the most probable model, and fit the scenes again.

    Returns the logarithm of the evidence of every candidate for the sources of each scene,
    (K, M); NaN where it could not be found, and there the model stays.
    """
    found = []
    for scene in scenes:
        log_evidence, params = _log_evidence(scene, candidates, fitter, report)
        found.append(log_evidence)
        score = np.where(np.isfinite(log_evidence), log_evidence, -np.inf)
        best = np.argmax(score + np.log(candidates.prior), 1)
        known = np.isfinite(score).any(1)
        models = list(candidates.models.values())
        for k in np.flatnonzero(known):
            if scene.models[k] is not models[best[k]]:
                _give(scene, k, models[best[k]], params[best[k]][k])
    _put_in_order(scenes, fitter, background)
    solve_again(scenes, fitter, background)
    return found


def _give(scene: Scene, k: int, model: Any, params: np.ndarray) -> None:
    """Another model for a source, and where its fit starts; its group has to be fitted again."""
    scene.models[k] = model
    source = scene.sources[k]
    source.params = params.copy()
    source.flags &= ~int(FitFlag.AT_BOUND)
    group = scene.groups[source.group]
    group.seen = group.known = None


def _put_in_order(scenes: list[Scene], fitter: Any, background: str) -> None:
    """Members of groups by model, as their fits want them."""
    setups = _setups(scenes, fitter, background)
    for scene in scenes:
        for group in scene.groups:
            if group.seen is None:
                group.members = group.members[_by_model(scene, group, setups)]
                group.cov = None


def _log_evidence(scene, candidates, fitter, report) -> tuple[np.ndarray, list[np.ndarray]]:
    """Evidence (K, M) and, for every candidate, parameters (K, P) in pixels of the image."""
    from galmorph.evidence import log_evidence
    from galmorph.images import fit_images

    models = list(candidates.models.values())
    value = np.full((len(scene.xy), len(models)), np.nan)
    params = [np.full((len(scene.xy), len(m.param_names)), np.nan) for m in models]
    for rows, data, sigma, origin in _stamps(scene, candidates.psf_error):
        position = np.stack([_position(scene, k) for k in rows]) - origin
        for m, model in enumerate(models):
            drawn, own = _with_size_prior(model, fitter, scene.psf)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # flags say as much
                fit = fit_images(
                    data, drawn, own, uncertainty=sigma, psf=scene.psf, positions=position
                )
                value[rows, m] = log_evidence(fit, method="laplace")[0]
            at = fit.params[:, : params[m].shape[1]].copy()
            at[:, 1:3] += origin
            params[m][rows] = at
            value[rows, m] = np.where(np.isfinite(at).all(1), value[rows, m], np.nan)
        report(len(rows))
    return value, params


def _with_size_prior(model: Any, fitter: Any, psf: Any) -> tuple[Any, Any]:
    """The model as it is compared, and a fitter with its prior of sizes.

    A star is a profile too small to be told from one: were it a point, any error of the PSF
    would make galaxies of all bright stars.
    """
    priors = {k: v for k, v in fitter.priors_of(model).items() if k in model.param_names}
    if psf is not None:
        fwhm = _FWHM * psf.sigma
        median, width = _RESOLVED
        if isinstance(model, PointSource2D):
            median, width = _UNRESOLVED
            model = SersicGalaxy2D()
            priors = {"n": INDEX_PRIOR}
        for name in _RADII:
            if name in model.param_names and not model.fixed[name]:
                priors.setdefault(name, LogNormal(median * fwhm, width))
    own = copy(fitter)
    own.priors = priors
    return model, own


def _position(scene: Scene, k: int) -> np.ndarray:
    return np.asarray(scene.sources[k].params[1:3], dtype=float)


def _stamps(scene: Scene, psf_error: float) -> Iterator[tuple]:
    """Sources alone: rows, data and sigma (n, side, side), and origins (x, y) of their stamps."""
    residual, light = _residual(scene)
    usable = scene.inv_sigma > 0
    noise = 1.0 / np.where(usable, scene.inv_sigma, 1.0)
    sigma = np.where(usable, np.hypot(noise, psf_error * np.maximum(light, 0.0)), 0.0)
    rows, sides = [], []
    for k, source in enumerate(scene.sources):
        fitted = source.params is not None and np.isfinite(source.params).all()
        if fitted and source.image is not None and _is_inside(source.params, scene.shape):
            rows.append(k)
            sides.append(_side(scene, source, noise))
    rows, sides = np.array(rows, dtype=int), np.array(sides)
    for side in np.unique(sides):
        chosen = rows[sides == side]
        for some in np.array_split(chosen, max(1, len(chosen) // 256)):
            data, error = np.zeros((2, len(some), side, side))
            origin = np.empty((len(some), 2), dtype=int)
            for j, k in enumerate(some):
                origin[j] = np.rint(_position(scene, k)).astype(int) - side // 2
                there, here = _overlap(scene.shape, origin[j, ::-1], (side, side))
                data[j][here] = residual[there]
                error[j][here] = sigma[there]
                _add(data[j], origin[j, ::-1], scene.groups[scene.sources[k].group], scene, k)
            yield some, data, error, origin


def _add(stamp: np.ndarray, origin, group: Group, scene: Scene, k: int) -> None:
    """Put a source's own light back."""
    shift = (group.origin[0] - origin[0], group.origin[1] - origin[1])
    there, here = _overlap(stamp.shape, shift, group.shape)
    stamp[there] += scene.sources[k].image[here]


def _is_inside(params: np.ndarray, shape: tuple[int, int]) -> bool:
    x, y = params[1:3]
    return -0.5 <= x <= shape[1] - 0.5 and -0.5 <= y <= shape[0] - 0.5


def _side(scene: Scene, source: Any, noise: np.ndarray) -> int:
    """Of a stamp that holds what of a source stands out of the noise."""
    x, y = np.rint(source.params[1:3]).astype(int)
    own = noise[np.clip(y, 0, scene.shape[0] - 1), np.clip(x, 0, scene.shape[1] - 1)]
    area = np.count_nonzero(source.image > 0.5 * own)
    radius = 1.5 * np.sqrt(area / np.pi) + 5
    return int(_SIDES[min(np.searchsorted(_SIDES, 2 * radius), len(_SIDES) - 1)])


def _residual(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Data less all models and background, and all models; both (ny, nx)."""
    from galmorph._batchfit import background_templates
    from galmorph._scenes import _light

    light = _light(scene)
    residual = scene.data - light
    kinds = {0: "none", 1: "constant", 3: "tilted"}
    for group in scene.groups:
        terms = scene.sources[group.members[0]].background
        if terms is not None and len(terms):
            image = np.tensordot(terms, background_templates(kinds[len(terms)], group.shape), 1)
            there, here = _overlap(scene.shape, group.origin, group.shape)
            residual[there] -= np.nan_to_num(image[here])
    return np.where(scene.inv_sigma > 0, residual, 0.0), light
