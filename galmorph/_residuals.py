"""Sources that detection missed: looked for in what a fitted scene leaves, and fitted with it.

Where a source may be is told by two filters; whether it is one is told by the fit with it.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.signal import fftconvolve

from galmorph._scenes import (
    _WHOLE,
    Group,
    Scene,
    Source,
    Work,
    _light,
    _overlap,
    _side,
    background_image,
    solve_again,
)
from galmorph.flags import FitFlag
from galmorph.psf import PSF, PSFField, psf_at

__all__ = ["Search", "add_missed", "filters", "find_peaks"]

#: FWHM of a Gaussian in units of its sigma.
_FWHM = 2 * np.sqrt(2 * np.log(2))
#: Half-light radii of exponential disks, in sigma of the PSF: what residuals are filtered with,
#: beside the PSF itself.
_DISKS = (1.5, 3.0)
#: Half width of the kernels, and the width of the PSF where there is none (in pixels).
_HALF, _SHARPEST = 6.0, 0.5
#: How much wider the ring of the filter for shoulders is (that of a Laplacian of a Gaussian).
_RING = 1.6
#: By how much smooth models may miss a galaxy over the area of a source (spiral arms, knots), as
#: a fraction of its light there; blends and lone galaxies of HST chose it, see docs.
_MISFIT = 0.15
#: Sources closer than this, in FWHM of the PSF, are one.
_CLOSEST = 0.5
#: Reduced chi2 above which residuals are those of the model: saturated stars, large spirals.
_HOPELESS = 50.0
#: Rounds over the groups while sources are on trial.
_TRIAL_ROUNDS = 2
#: Half width, in FWHM of the PSF, of the area that a new source is fitted in.
_REACH = 4.0
#: Light, in sigma of a pixel, by which a new source belongs to another's group.
_TOUCH = 0.5
#: Least share of a kernel that must lie on usable pixels.
_SEEN = 0.5
#: Pixels with more than this fraction of a source's peak are its own.
_FOOT = 0.1
#: Where in an image its PSF is looked at, in units of its sides.
_PLACES = (0.25, 0.5, 0.75)
_LATENT = re.compile(r"z\d+")


@dataclass
class Search:
    """How sources that were missed are looked for.

    Attributes
    ----------
    threshold : float
        In standard deviations.
    rounds : int
    model : GalaxyModel
        Of new sources.
    """

    threshold: float
    rounds: int
    model: Any


@dataclass
class Filters:
    """Kernels for one PSF: ``matched`` are unit images of sources, ``ring`` sums to zero."""

    matched: list[np.ndarray]
    ring: np.ndarray
    sigma: float

    @property
    def fwhm(self) -> float:
        return _FWHM * self.sigma


@dataclass
class _Trial:
    """A scene with sources that are tried, and what it was without them."""

    scene: Scene
    before: Scene
    residual: np.ndarray
    groups: list[Group]  # in which there are new ones


# -- where a source may be -------------------------------------------------------------------


def filters(psf: Any) -> Filters:
    """The kernels for a PSF (or None)."""
    from galmorph.models.sersic import SersicGalaxy2D

    sigma = _SHARPEST if psf is None else max(psf.sigma, _SHARPEST)
    half = int(np.ceil(_HALF * sigma))
    params = [[1, half, half, r * sigma, 1, 0, 0] for r in (0.1, *_DISKS)]
    matched = SersicGalaxy2D(psf=psf).render((2 * half + 1, 2 * half + 1), params=params)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    narrow, wide = (np.exp(-0.5 * (x**2 + y**2) / s**2) for s in (sigma, _RING * sigma))
    ring = narrow / narrow.sum() - wide / wide.sum()
    return Filters(list(np.nan_to_num(matched)), ring, sigma)


def _correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return fftconvolve(image, kernel[::-1, ::-1], mode="same")


def find_peaks(
    residual: np.ndarray,
    light: np.ndarray,
    inv_sigma: np.ndarray,
    kernels: Filters,
    *,
    threshold: float,
    known: np.ndarray,
) -> np.ndarray:
    """Where a source may have been missed.

    Parameters
    ----------
    residual, light, inv_sigma : array, shape (ny, nx)
        Data less models and background, the models, and one over the noise (0: unusable).
    kernels : Filters
    threshold : float
        Least significance.
    known : array, shape (K, 2)
        Where sources are already.

    Returns
    -------
    array, shape (M, 2)
        Pixels (x, y): shoulders of the data, then peaks of the residual, the most significant
        of each first.
    """
    size = 2 * int(np.ceil(kernels.sigma)) + 1
    found = []
    for value in (
        _shoulders(residual, light, inv_sigma, kernels.ring),
        _matched(residual, inv_sigma, kernels.matched),
    ):
        value[inv_sigma <= 0] = -np.inf
        y, x = np.nonzero((value == maximum_filter(value, size)) & (value > threshold))
        order = np.argsort(-value[y, x], kind="stable")
        found.append(np.column_stack([x, y]).astype(float)[order])
    taken = known[np.isfinite(known).all(1)]
    given = len(taken)
    for xy in np.concatenate(found):
        if (np.hypot(*(taken - xy).T) >= _CLOSEST * kernels.fwhm).all():
            taken = np.vstack([taken, xy])
    return taken[given:]


def _matched(residual, inv_sigma, kernels: list[np.ndarray]) -> np.ndarray:
    """Largest significance of the residual, filtered with each of the kernels."""
    used, weight = inv_sigma > 0, inv_sigma**2
    signal = np.where(used, residual, 0.0) * weight
    best = np.full(residual.shape, -np.inf)
    for kernel in kernels:
        power = _correlate(weight, kernel**2)
        seen = _correlate(used.astype(float), kernel**2) > _SEEN * (kernel**2).sum()
        power = np.where(seen & (power > 0), power, np.inf)
        best = np.maximum(best, _correlate(signal, kernel) / np.sqrt(power))
    return best


def _shoulders(residual, light, inv_sigma, ring: np.ndarray) -> np.ndarray:
    """Significance of the data, less its own mean in a ring: peaks on the flanks of others.

    A fit of one galaxy to two has residuals where neither of them is; the curvature of the data
    knows of no fit.  Where nothing was seen the models stand for the data.
    """
    used = inv_sigma > 0
    data = light + np.where(used, residual, 0.0)
    variance = _correlate(np.where(used, 1 / np.where(used, inv_sigma, 1.0) ** 2, 0.0), ring**2)
    # beyond the edge is nothing, which is a step, not a source
    inside = _correlate(np.ones(data.shape), np.abs(ring)) > 0.99 * np.abs(ring).sum()
    floor = 1e-9 * variance.max(initial=0.0)
    return np.where(
        inside & (variance > floor),
        _correlate(data, ring) / np.sqrt(np.maximum(variance, max(floor, 1e-300))),
        -np.inf,
    )


# -- fits with it ----------------------------------------------------------------------------


def add_missed(scenes: list[Scene], search: Search, work: Work, max_group: int) -> None:
    """Add the sources that the scenes, which are fitted, miss."""
    psfs = {id(scene): _usual_psf(scene) for scene in scenes}
    made = {psf: filters(psf) for psf in psfs.values()}
    kernels = {scene: made[psf] for scene, psf in psfs.items()}  # by its id
    everything = scenes
    for _ in range(search.rounds):
        trials = [_try(s, kernels[id(s)], search, work.background, max_group) for s in scenes]
        trials = tried = [t for t in trials if t is not None]
        while trials:
            solve_again([t.scene for t in trials], work, _TRIAL_ROUNDS)
            trials = [
                t
                for t in trials
                if _judge(t, kernels[id(t.scene)], search.threshold, work.background)
            ]
        scenes = [t.scene for t in tried]
    more = [scene for scene in everything if any(source.added for source in scene.sources)]
    solve_again(more, work)


def _usual_psf(scene: Scene) -> PSF | None:
    """The PSF that a scene is filtered with: where it changes, that of the middle of widths."""
    if not isinstance(scene.psf, PSFField):
        return scene.psf
    ny, nx = scene.shape
    places = [*scene.xy, *((x * nx, y * ny) for x in _PLACES for y in _PLACES)]
    psfs = [psf for psf in (psf_at(scene.psf, xy) for xy in places) if psf is not None]
    return sorted(psfs, key=lambda psf: psf.sigma)[len(psfs) // 2] if psfs else None


def _left(scene: Scene, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Residual and light of the models, (ny, nx)."""
    light = _light(scene)
    sky = background_image(scene.shape, scene.groups, scene.sources, background)
    return scene.data - light - sky, light


def _centres(scene: Scene) -> np.ndarray:
    """Where the sources are, (K, 2): fitted, or else as given."""
    own = [
        xy if s.params is None or not np.isfinite(s.params[1:3]).all() else s.params[1:3]
        for s, xy in zip(scene.sources, scene.xy, strict=True)
    ]
    return np.array(own, dtype=float).reshape(-1, 2)


def _parents(scene: Scene, xy: np.ndarray) -> np.ndarray:
    """The source that has most light at each position, (M,); -1: none has any to speak of."""
    x, y = xy.T.astype(int)
    best = _TOUCH / scene.inv_sigma[y, x]
    parent = np.full(len(xy), -1)
    for group in scene.groups:
        i, j = y - group.origin[0], x - group.origin[1]
        inside = (i >= 0) & (j >= 0) & (i < group.shape[0]) & (j < group.shape[1])
        for k in group.members:
            image = scene.sources[k].image
            if image is not None and inside.any():
                own = np.where(inside, image[i * inside, j * inside], 0.0)
                parent, best = np.where(own > best, k, parent), np.maximum(best, own)
    return parent


def _try(scene, kernels: Filters, search: Search, background: str, max_group: int):
    """Put sources in a scene where some may have been missed, one at most upon another's light."""
    if not (scene.inv_sigma > 0).any():
        return None
    residual, light = _left(scene, background)
    xy = find_peaks(
        residual,
        light,
        scene.inv_sigma,
        kernels,
        threshold=search.threshold,
        # a fit to two galaxies is at neither; what was given may be
        known=np.concatenate([_centres(scene), scene.xy, *scene.refused]),
    )
    if scene.psf is not None:
        xy = xy[[psf_at(scene.psf, at) is not None for at in xy]]
    if not len(xy):
        return None
    parent = _parents(scene, xy)
    sane = np.array([k < 0 or not _is_hopeless(scene, k) for k in parent])
    xy, parent = xy[sane], parent[sane]
    if not len(xy):
        return None
    first = np.unique(parent[parent >= 0], return_index=True)[1]
    rows = np.sort(np.concatenate([np.flatnonzero(parent >= 0)[first], np.flatnonzero(parent < 0)]))
    trial = _Trial(scene, _copied(scene), residual, [])
    for at, k in zip(xy[rows], parent[rows], strict=True):
        _add(trial, at, k, kernels, search.model, max_group)
    trial.groups = [g for g in scene.groups if (g.members >= len(trial.before.xy)).any()]
    _number(scene)
    return trial


def _is_hopeless(scene: Scene, k: int) -> bool:
    """Whether the model of a source misses so much that nothing can be said of what is left."""
    source = scene.sources[k]
    return source.dof > 0 and source.chi2 > _HOPELESS * source.dof


def _copied(scene: Scene) -> Scene:
    return replace(
        scene,
        models=list(scene.models),
        sources=[copy(s) for s in scene.sources],
        groups=[copy(g) for g in scene.groups],
        errors=dict(scene.errors),
    )


def _restore(scene: Scene, before: Scene) -> None:
    refused = scene.refused
    for name, value in vars(_copied(before)).items():
        setattr(scene, name, value)
    scene.refused = refused


def _add(trial: _Trial, xy: np.ndarray, parent: int, kernels: Filters, model, max_group) -> None:
    """Put a new source in a group, that of ``parent`` (-1: none) if it has room."""
    scene, k = trial.scene, len(trial.scene.xy)
    reach = int(np.ceil(_REACH * kernels.fwhm))
    group = _group_for(trial, xy, parent, reach)
    scene.xy = np.vstack([scene.xy, xy])
    scene.ids = np.append(scene.ids, scene.ids.max(initial=-1) + 1)
    scene.spread = np.append(scene.spread, max(1.0, kernels.sigma))
    scene.models.append(model)
    scene.sources.append(Source(flags=scene.flags, added=True))
    low = np.rint(xy[::-1]).astype(int) - reach
    if group is None or len(group.members) >= max_group:
        shape = (_side(2 * reach + 1),) * 2
        low += reach - shape[0] // 2
        group = Group(np.array([k]), tuple(map(int, low)), shape)
        if not scene.groups and max(scene.shape) <= _WHOLE:
            group.origin, group.shape = (0, 0), scene.shape
        scene.groups.append(group)
    else:
        group.members = np.append(group.members, k)
        _widen(scene, group, low, low + 2 * reach + 1)
    scene.sources[k].group = next(g for g, own in enumerate(scene.groups) if own is group)


def _group_for(trial: _Trial, xy: np.ndarray, parent: int, reach: int) -> Group | None:
    """The group that a new source belongs to, if any."""
    scene, count = trial.scene, len(trial.before.xy)
    if parent >= 0:
        return scene.groups[scene.sources[parent].group]
    if len(scene.groups) == 1 and scene.groups[0].shape == scene.shape:
        return scene.groups[0]
    distance = np.hypot(*(scene.xy[count:] - xy).T)
    if not (distance < reach).any():
        return None
    return scene.groups[scene.sources[count + int(distance.argmin())].group]


def _widen(scene: Scene, group: Group, low: np.ndarray, high: np.ndarray) -> None:
    """Let the box of a group reach from ``low`` to ``high`` (y, x), or to the image's edges."""
    whole = np.array([[0, 0], scene.shape])
    box = np.array([group.origin, np.add(group.origin, group.shape)])
    low = np.minimum(box[0], np.maximum(low, whole[0]))
    high = np.maximum(box[1], np.minimum(high, whole[1]))
    if (low == box[0]).all() and (high == box[1]).all():
        return
    shape = tuple(_side(n) for n in high - low)
    origin = tuple(int(o) for o in (low + high) // 2 - np.array(shape) // 2)
    for k in group.members:
        source = scene.sources[k]
        if source.image is not None:
            there, here = _overlap(shape, np.subtract(group.origin, origin), group.shape)
            image = np.zeros(shape, dtype=source.image.dtype)
            image[there] = source.image[here]
            source.image = image
    group.origin, group.shape = origin, shape


def _number(scene: Scene) -> None:
    """Tell sources their group; those of groups that changed are fitted from the start."""
    for g, group in enumerate(scene.groups):
        fresh = any(scene.sources[k].params is None for k in group.members)
        if fresh:
            group.cov = group.seen = group.known = None
        for k in group.members:
            source = scene.sources[k]
            source.group, source.box = g, group.box
            if fresh:
                source.params = source.guess = None


def _judge(trial: _Trial, kernels: Filters, threshold: float, background: str) -> bool:
    """Take sources out that are none; whether the scene is to be fitted again."""
    scene, count = trial.scene, len(trial.before.xy)
    residual, light = _left(scene, background)
    centres = _centres(scene)
    wrong = [
        k
        for group in trial.groups
        for k in group.members[group.members >= count]
        if _too_close(centres, k, kernels)
        or not _is_source(trial, group, k, residual, light, threshold)
    ]
    if not wrong:
        return False
    scene.refused.append(scene.xy[wrong])
    if len(wrong) == len(scene.xy) - count:
        _restore(scene, trial.before)
        return False
    _take_out(trial, wrong)
    return True


def _too_close(centres: np.ndarray, k: int, kernels: Filters) -> bool:
    distance = np.hypot(*(np.delete(centres, k, 0) - centres[k]).T)
    return bool((distance < _CLOSEST * kernels.fwhm).any())


def _is_source(trial: _Trial, group: Group, k: int, residual, light, threshold: float) -> bool:
    """Whether the fit with a new source says that it is one.

    Its flux must stand out of its error and of what models of its neighbours may miss; the fit
    must be better by more than the parameters cost (Schwarz 1978, Ann. Stat. 6, 461, with the
    number of pixels that the source has); and it must not take another's place.
    """
    scene, source = trial.scene, trial.scene.sources[k]
    variance = _flux_variance(scene, group, k)
    if not (np.isfinite(variance) and np.isfinite(source.params).all() and source.params[0] > 0):
        return False
    there, here = _overlap(scene.shape, group.origin, group.shape)
    own, weight = source.image[here].astype(float), scene.inv_sigma[there] ** 2
    power = (weight * own**2).sum()
    if not power > 0:
        return False
    others = light[there] - own
    # flux of the neighbours' light as this source would have it
    under = (weight * own * others).sum() / power
    if variance / source.params[0] ** 2 + (_MISFIT * under) ** 2 > threshold**-2:
        return False
    wary = weight / (1 + weight * (_MISFIT * others) ** 2)
    before, after = (wary * r[there] ** 2 for r in (trial.residual, residual))
    foot = (own > _FOOT * own.max()) & (weight > 0)
    scatter = max(1.0, after[foot].mean()) if foot.any() else 1.0
    pixels = own.sum() ** 2 / (own**2).sum()
    news = group.members[group.members >= len(trial.before.xy)]
    cost = sum(_n_free(scene.models[j]) for j in news) * np.log(pixels)
    if (before - after).sum() < cost * scatter:
        return False
    faint = int(FitFlag.LOW_SNR)
    return not any(
        scene.sources[j].flags & ~trial.before.sources[j].flags & faint
        for j in group.members
        if j < len(trial.before.xy)
    )


def _flux_variance(scene: Scene, group: Group, k: int) -> float:
    source = scene.sources[k]
    if group.cov is None or source.params is None:
        return np.nan
    return source.flux_noise**2 if source.flux_noise > 0 else np.nan


def _n_free(model: Any) -> int:
    """Free parameters; latents, which have a prior that is narrow, are none."""
    return sum(not (model.fixed[name] or _LATENT.fullmatch(name)) for name in model.param_names)


def _take_out(trial: _Trial, wrong: list[int]) -> None:
    """Take sources out; groups that are left without new ones are as they were."""
    scene, before, count = trial.scene, trial.before, len(trial.before.xy)
    for g, group in enumerate(scene.groups):
        bad = np.isin(group.members, wrong)
        if not bad.any():
            continue
        group.members = group.members[~bad]
        if g < len(before.groups) and (group.members < count).all():
            old = scene.groups[g] = copy(before.groups[g])
            for k in old.members:
                scene.sources[k] = copy(before.sources[k])
        else:
            for k in group.members:
                scene.sources[k].params = None
    keep = np.delete(np.arange(len(scene.xy)), wrong)
    number = np.zeros(len(scene.xy), dtype=int)
    number[keep] = np.arange(len(keep))
    scene.ids = scene.ids[: len(keep)]  # without gaps
    scene.xy, scene.spread = scene.xy[keep], scene.spread[keep]
    scene.models = [scene.models[k] for k in keep]
    scene.sources = [scene.sources[k] for k in keep]
    scene.groups = [group for group in scene.groups if len(group.members)]
    for group in scene.groups:
        group.members = number[group.members]
    trial.groups = [g for g in scene.groups if (g.members >= count).any()]
    _number(scene)
