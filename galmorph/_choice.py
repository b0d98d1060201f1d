"""Which of several models each source of a scene wants, with its neighbours as they are."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from galmorph._alone import stamps_alone
from galmorph._scenes import Scene, Work, solve_again
from galmorph.flags import FitFlag
from galmorph.models.learned import LearnedGalaxy2D
from galmorph.models.point_source import PointSource2D
from galmorph.models.sersic import SersicGalaxy2D
from galmorph.priors import INDEX_PRIOR, LogNormal

__all__ = ["Candidates", "choose_models"]

#: Learned galaxies are looked at above this S/N: below it nothing tells them from other profiles.
_LEARNED_SNR = 20.0
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
    work: Work,
) -> list[np.ndarray]:
    """Give every source the most probable model, and fit the scenes again.

    Returns the logarithm of the evidence of every candidate for the sources of each scene,
    (K, M); NaN where it could not be found, and there the model stays.
    """
    found = []
    for scene in scenes:
        log_evidence, params = _log_evidence(scene, candidates, work.fitter)
        found.append(log_evidence)
        score = np.where(np.isfinite(log_evidence), log_evidence, -np.inf)
        best = np.argmax(score + np.log(candidates.prior), 1)
        known = np.isfinite(score).any(1)
        models = list(candidates.models.values())
        for k in np.flatnonzero(known):
            if scene.models[k] is not models[best[k]]:
                _give(scene, k, models[best[k]], params[best[k]][k])
    solve_again(scenes, work)
    return found


def _give(scene: Scene, k: int, model: Any, params: np.ndarray) -> None:
    """Another model for a source, and where its fit starts; its group has to be fitted again."""
    scene.models[k] = model
    source = scene.sources[k]
    source.params = params.copy()
    source.flags &= ~int(FitFlag.AT_BOUND)
    group = scene.groups[source.group]
    group.seen = group.known = group.cov = None


def _log_evidence(scene, candidates, fitter) -> tuple[np.ndarray, list[np.ndarray]]:
    """Evidence (K, M) and, for every candidate, parameters (K, P) in pixels of the image."""
    from galmorph.evidence import log_evidence
    from galmorph.images import fit_images

    models = list(candidates.models.values())
    value = np.full((len(scene.xy), len(models)), np.nan)
    params = [np.full((len(scene.xy), len(m.param_names)), np.nan) for m in models]
    snr = np.nan_to_num([source.snr for source in scene.sources])
    # learned galaxies last: whether they are looked at depends on the others
    order = sorted(enumerate(models), key=lambda pair: isinstance(pair[1], LearnedGalaxy2D))
    for some, data, sigma, origin in stamps_alone(scene, psf_error=candidates.psf_error):
        position = np.stack([scene.sources[k].params[1:3] for k in some]) - origin
        for part, (m, model) in product(scene.alike(some, len(some)), order):
            look = part
            if isinstance(model, LearnedGalaxy2D) and model is not candidates.first:
                here = some[part]
                look = part[(snr[here] > _LEARNED_SNR) & ~_is_star(value[here], candidates)]
                if not len(look):
                    continue
            rows = some[look]
            psf = scene.psfs_of(rows)
            drawn, own = _with_size_prior(model, fitter, scene.psf_of(some[part[0]]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # flags say as much
                fit = fit_images(
                    data[look],
                    drawn,
                    own,
                    uncertainty=sigma[look],
                    psf=psf,
                    positions=position[look],
                )
                value[rows, m] = log_evidence(fit, method="laplace")[0]
            at = fit.params[:, : params[m].shape[1]].copy()
            at[:, 1:3] += origin[look]
            params[m][rows] = at
            value[rows, m] = np.where(np.isfinite(at).all(1), value[rows, m], np.nan)
    return value, params


def _is_star(log_evidence: np.ndarray, candidates: Candidates) -> np.ndarray:
    """Whether a point source is the most probable so far, (n,).

    A learned galaxy is so free that it takes up errors of the PSF, which make no galaxy of a star.
    """
    point = np.array([isinstance(m, PointSource2D) for m in candidates.models.values()])
    score = np.where(np.isfinite(log_evidence), log_evidence, -np.inf) + np.log(candidates.prior)
    return np.isfinite(score).any(1) & point[score.argmax(1)]


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
