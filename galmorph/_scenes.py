"""The bookkeeping of scenes: what the user gave, which sources are fitted together, and in turns.

Sources whose light overlaps are one group and are fitted jointly.  Groups are fitted with the
models of all others taken away, again until that makes no difference (block coordinate descent).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt, label
from scipy.spatial import cKDTree
from scipy.special import gammaincinv, gammaln

from galmorph import _inputs
from galmorph._stamps import _PLATEAU, _is_list_of_images, _segments, make_source
from galmorph.flags import FitFlag
from galmorph.psf import PSF, PSFField, as_field, by_kind, psf_at, psf_kind, shared_or_each

__all__ = ["Scene", "Source", "Work", "read_scenes", "solve_again", "solve_scenes"]

#: Sides of the boxes of groups: few, so that batches are of one shape.
_SIDES = np.array([32, 48, 64, 96, 128, 192, 256, 384, 512])
#: A scene is fitted as it is if it has no more pixels along a side, and few sources.
_WHOLE = 200
#: Stamps on which sources are first looked at.
_FIRST_STAMPS = (61, 121, 241)
#: Pixels this near belong to a source whatever else is there.
_OWN = 2.5
#: Sweeps over the fluxes of all first models, and the least part of a flux that is left.
_SWEEPS, _FAINTEST = 30, 1e-2
#: By how much the flux may grow when a larger stamp is looked at.
_GROWTH = 2.0
#: Brightness, in sigma of a pixel, at which sources touch, and at which they end.
_TOUCH, _END = 1.0, 0.5
_LEAST_RADIUS, _LARGEST_RADIUS = 6.0, 100.0
#: The same in half-light radii.
_FARTHEST = 6.0
#: Largest index of a first guess that is believed so far out.
_STEEPEST = 2.0
#: The part of a box, along each side, that is shared with no other while it is fitted.
_MIDDLE = 0.7
#: Rounds over the groups, and the change of what others leave, in sigma, that ends them.
_ROUNDS, _SETTLED = 5, 0.3
#: Evaluations of a fit that goes on from where it was; there may be more in the next round.
_FEW = 15
#: Changes of chi2 that end fits of groups, in the first round, when neighbours are not known, and
#: later.
_FIRST, _LATER = 0.5, 1e-2
#: Half width in pixels of where a plateau is looked for, and its least significance.
_CORE, _BRIGHT = 4, 10.0
#: How often noise that depends on the model is found anew, and the change of fluxes, in sigma,
#: that ends this.
_REWEIGHTINGS, _SAME = 3, 0.1


@dataclass
class Source:
    """One source of a scene: what is known of it before and after the fit."""

    flags: int = 0
    group: int = -1
    guess: np.ndarray | None = None
    params: np.ndarray | None = None
    flux_noise: float = np.nan  # error of the flux that noise alone makes
    box: tuple[slice, slice] | None = None
    image: np.ndarray | None = None  # within the box
    background: np.ndarray | None = None
    chi2: float = np.nan
    dof: int = 0
    n_iter: int = 0
    added: bool = False  # found in the residual

    @property
    def snr(self) -> float:
        """Flux over the error that noise alone makes; NaN where either is not known."""
        known = self.params is not None and self.flux_noise > 0
        return float(self.params[0] / self.flux_noise) if known else np.nan


@dataclass
class Group:
    """Sources that are fitted together, and what is known of all of them."""

    members: np.ndarray
    origin: tuple[int, int]  # (y, x) of the box, which may reach beyond the image
    shape: tuple[int, int]
    cov: np.ndarray | None = None
    seen: np.ndarray | None = None  # light of other groups, as it was taken away
    known: _Known | None = None

    @property
    def box(self) -> tuple[slice, slice]:
        """The box as slices; they may begin below zero."""
        return tuple(slice(o, o + n) for o, n in zip(self.origin, self.shape, strict=True))


@dataclass
class Scene:
    """One image with its sources."""

    data: np.ndarray
    inv_sigma: np.ndarray
    psf: PSF | PSFField | None
    flags: int
    wcs: Any
    unit: Any
    name: str
    xy: np.ndarray
    ids: np.ndarray
    spread: np.ndarray
    models: list[Any]
    sources: list[Source] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    refused: list[np.ndarray] = field(default_factory=list)  # positions where there is no source

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    def psf_of(self, k: int) -> PSF | None:
        """The PSF of a source, where it was given."""
        return psf_at(self.psf, self.xy[k])

    def psfs_of(self, sources: np.ndarray) -> PSF | list[PSF] | None:
        """The PSF of some sources, or a list of them if they differ."""
        if not isinstance(self.psf, PSFField):
            return self.psf
        return shared_or_each(self.psf_of(k) for k in sources)

    def alike(self, sources: np.ndarray, most: int) -> Iterator[np.ndarray]:
        """Parts (indices) of some sources, of about ``most``, whose PSFs are alike."""
        for rows in by_kind(self.psf_of(k) for k in sources):
            yield from np.array_split(rows, max(1, len(rows) // most))

    def psf_of_group(self, group: Group) -> PSF | None:
        """The PSF that a group is fitted with: that of the source nearest to its middle."""
        members = np.sort(group.members)
        distance = np.hypot(*(self.xy[members] - self.xy[members].mean(0)).T)
        return self.psf_of(members[distance.argmin()])


# -- what the user gave ----------------------------------------------------------------------


def read_scenes(
    image: Any,
    sources: Any,
    *,
    models: Any,
    uncertainty: Any,
    mask: Any,
    psf: Any,
    position_prior: Any,
) -> tuple[list[Scene], bool]:
    """Scenes of the arguments of `galmorph.deblend`, and whether it was one image."""
    varying = as_field(psf if psf is not None else getattr(image, "psf", None))
    if varying is not None:
        psf = np.ones((1, 1))  # one that the image brings is not asked for
    stamps = make_source(image, uncertainty=uncertainty, mask=mask, psf=psf)
    single = len(stamps) == 1 and not _is_stack(image)
    each = [sources] if single else _one_each(sources, len(stamps), "sources")
    scenes = []
    for i in range(len(stamps)):
        batch = stamps.get([i])
        wcs = stamps.wcs[i] if isinstance(stamps.wcs, list) else stamps.wcs
        data, inv_sigma = batch.data[0], batch.inv_sigma[0]
        xy, ids = _read_sources(each[i], data, inv_sigma, wcs)
        own = varying or (batch.psf[0] if isinstance(batch.psf, list) else batch.psf)
        scene = Scene(
            data=data,
            inv_sigma=inv_sigma,
            psf=own,
            flags=int(batch.flags[0]) & ~int(FitFlag.SATURATED),
            wcs=wcs,
            unit=stamps.unit,
            name=stamps.name,
            xy=xy,
            ids=ids,
            spread=_spread(position_prior, len(xy)),
            models=_models(models, len(xy)),
        )
        scene.sources = [Source(flags=int(f)) for f in _first_flags(scene)]
        if own is None:
            scene.psf = next((m.psf for m in scene.models if m.psf is not None), None)
        check_points(scene, scene.models)
        scenes.append(scene)
    return scenes, single


def _is_stack(image: Any) -> bool:
    return _is_list_of_images(image) or len(getattr(image, "shape", ())) == 3


def _one_each(values: Any, count: int, name: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple | np.ndarray) or len(values) != count:
        raise ValueError(f"{count} images need a sequence of {count} {name}, one an image")
    return values


def _read_sources(sources, data, inv_sigma, wcs) -> tuple[np.ndarray, np.ndarray]:
    """Positions (K, 2) and labels (K,)."""
    if sources is None:
        raise TypeError(
            "deblend needs the sources: positions, a table, a segmentation or a Detection"
        )
    if hasattr(sources, "segmentation") and hasattr(sources, "positions"):  # a Detection
        labels = np.asarray(sources.segmentation.labels)
        return np.asarray(sources.positions, dtype=float).reshape(-1, 2), labels
    segments = getattr(sources, "data", sources) if hasattr(sources, "slices") else sources
    array = np.asarray(segments) if isinstance(segments, np.ndarray) else None
    if array is not None and array.shape == data.shape and array.dtype.kind in "iu":
        frame = _inputs.Frame(data, masks=(inv_sigma <= 0,))
        numbers, _, centroids = _segments(array, frame)
        return centroids, numbers
    if hasattr(sources, "__len__") and len(sources) == 0:
        return np.empty((0, 2)), np.empty(0, dtype=np.int64)
    xy, labels = _inputs.parse_positions(sources, wcs)
    return xy, np.arange(len(xy)) if labels is None else labels


def _spread(position_prior: Any, count: int) -> np.ndarray:
    values = np.asarray(position_prior, dtype=float)
    if values.shape not in ((), (count,)):
        raise ValueError(
            f"position_prior is one width in pixels or one a source, not of shape {values.shape}"
        )
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError("position_prior must be finite and not negative")
    return np.broadcast_to(values, count).copy()


def _models(models: Any, count: int) -> list[Any]:
    from galmorph.models.base import GalaxyModel

    if isinstance(models, GalaxyModel):
        models = [models] * count
    models = list(models)
    if len(models) != count:
        raise ValueError(f"there are {len(models)} models for {count} sources")
    for model in models:
        if not isinstance(model, GalaxyModel) or len(model) != 1:
            raise TypeError(f"every source needs a single galmorph model, not {model!r}")
    return models


def check_points(scene: Scene, models: list[Any]) -> None:
    """Raise ValueError if a point source has no PSF."""
    from galmorph.models.point_source import PointSource2D

    if scene.psf is None and any(isinstance(m, PointSource2D) for m in models):
        raise ValueError("a point source needs a psf")


def _first_flags(scene: Scene) -> np.ndarray:
    """What is known before the fit, (K,)."""
    ny, nx = scene.shape
    flags = np.full(len(scene.xy), scene.flags, dtype=np.int64)
    finite = np.isfinite(scene.xy).all(1)
    x, y = np.where(finite[:, None], scene.xy, -99.0).T
    out = (x < -0.5) | (y < -0.5) | (x > nx - 0.5) | (y > ny - 0.5)
    flags[out] |= int(FitFlag.OUTSIDE)
    yy, xx = np.mgrid[:ny, :nx]
    for k in np.flatnonzero(~out):
        rows = slice(max(int(y[k]) - 4, 0), int(y[k]) + 6)
        columns = slice(max(int(x[k]) - 4, 0), int(x[k]) + 6)
        distance = np.hypot(xx[rows, columns] - x[k], yy[rows, columns] - y[k])
        used = scene.inv_sigma[rows, columns] > 0
        if not used[distance <= 4.5].any():
            flags[k] |= int(FitFlag.NO_DATA)
        elif not used[distance <= 1.5].all():
            flags[k] |= int(FitFlag.BAD_CENTER)
    if isinstance(scene.psf, PSFField):
        none = np.array([psf_at(scene.psf, xy) is None for xy in scene.xy], dtype=bool)
        flags[none & ~out] |= int(FitFlag.BAD_PSF)
    return flags


# -- groups ----------------------------------------------------------------------------------


def make_groups(scene: Scene, setup: Any, max_group: int) -> None:
    """Find which sources are fitted together, and give each a first model."""
    usable = np.array([not s.flags & int(FitFlag.FAILED) for s in scene.sources], dtype=bool)
    members = np.flatnonzero(usable)
    if not members.size:
        return
    one = not isinstance(scene.psfs_of(members), list)
    if one and members.size <= max_group and max(scene.shape) <= _WHOLE:
        scene.groups = [Group(members, (0, 0), scene.shape)]
        return
    guess = _first_look(scene, setup, members)
    touch, end = (_radius_at(scene, members, guess, level) for level in (_TOUCH, _END))
    xy = scene.xy[members]
    for own in _linked(xy, touch, max_group):
        low = np.floor((xy[own] - end[own, None]).min(0)).astype(int)
        high = np.ceil((xy[own] + end[own, None]).max(0)).astype(int)
        nx = ny = _side((high - low + 1).max())
        middle = (low + high) // 2
        group = Group(members[own], (int(middle[1] - ny // 2), int(middle[0] - nx // 2)), (ny, nx))
        scene.groups.append(group)
    for k, params in zip(members, guess, strict=True):
        scene.sources[k].guess = params


def _side(wanted: int) -> int:
    return int(_SIDES[min(np.searchsorted(_SIDES, wanted), len(_SIDES) - 1)])


def _first_look(scene: Scene, setup: Any, members: np.ndarray) -> np.ndarray:
    """Sérsic parameters (M, 7) of sources, each by itself, then with the others taken away."""
    guess = _look(scene, setup, members, None)
    for _ in range(2):
        guess[:, 0] = _shared_fluxes(scene, members, guess)
        light = _light_of(scene, members, guess)
        guess = _look(scene, setup, members, (light, guess))
    guess[:, 0] = _shared_fluxes(scene, members, guess)
    return guess


def _shared_fluxes(scene: Scene, members: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Fluxes (M,) of all profiles together that fit best, none below a bit of what it was.

    Coordinate descent, which settles however much sources overlap.
    """
    unit = params.copy()
    unit[:, 0] = 1.0
    stamps: dict[int, tuple] = {}
    for rows, origins, images in _drawn(scene, members, unit):
        for row, (x, y), image in zip(rows.tolist(), origins, images, strict=True):
            data, weight = _cut(scene, (y, x), image.shape)
            stamps[row] = (np.array([y, x]), image * weight, (image * weight * data * weight).sum())
    count = len(members)
    corner = np.array([stamps[k][0] for k in range(count)])
    size = np.array([stamps[k][1].shape[0] for k in range(count)])
    gram: list[dict[int, float]] = [{} for _ in range(count)]
    tree = cKDTree(corner + size[:, None] / 2)
    for i, j in tree.query_pairs(size.max(), p=np.inf):
        there, here = _overlap((size[i],) * 2, corner[j] - corner[i], (size[j],) * 2)
        value = float((stamps[i][1][there] * stamps[j][1][here]).sum())
        if value:
            gram[i][j] = gram[j][i] = value
    own = np.array([(stamps[k][1] ** 2).sum() for k in range(count)])
    right = np.array([stamps[k][2] for k in range(count)])
    flux = np.nan_to_num(params[:, 0]).clip(0)
    least = np.maximum(_FAINTEST * flux, 1e-3 / np.sqrt(np.where(own > 0, own, 1.0)))
    for _ in range(_SWEEPS):
        for k in np.flatnonzero(own > 0):
            others = sum(value * flux[j] for j, value in gram[k].items())
            flux[k] = max((right[k] - others) / own[k], least[k])
    return np.where(np.isfinite(params[:, 0]), flux, np.nan)


def _light_of(scene: Scene, members: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Image of Sérsic profiles (M, 7) of sources, each drawn as far as it matters."""
    total = np.zeros(scene.shape)
    for _, origin, images in _drawn(scene, members, params):
        for o, image in zip(origin, images, strict=True):
            there, here = _overlap(scene.shape, (o[1], o[0]), image.shape)
            total[there] += image[here]
    return total


def _drawn(scene: Scene, members: np.ndarray, params: np.ndarray):
    """Rows, origins (x, y) and images of profiles, some that have stamps of one size at a time."""
    from galmorph.models.sersic import SersicGalaxy2D

    model = SersicGalaxy2D()
    wanted = np.nan_to_num(8 * params[:, 3])
    sides = np.array(_FIRST_STAMPS)
    side = sides[np.searchsorted(sides, wanted).clip(max=len(sides) - 1)]
    for n in sides:
        here = np.flatnonzero(side == n)
        for part in scene.alike(members[here], 128):
            rows = here[part]
            own, psf = params[rows].copy(), scene.psfs_of(members[rows])
            origin = np.rint(np.nan_to_num(own[:, 1:3])).astype(int) - n // 2
            own[:, 1:3] -= origin
            images = model.render((n, n), params=own, psf=psf, dtype="float32")
            yield rows, origin, np.nan_to_num(images)


def _look(scene, setup, members, known) -> np.ndarray:
    """Sérsic parameters (M, 7) of sources on stamps; ``known`` is the light of a former look."""
    from galmorph._scenefit import SceneBatch, guess_sources

    guess = np.full((len(members), 7), np.nan)
    own: dict[int, tuple] | None = None
    if known is not None:
        light, before = known
        own = {}
        for rows, origins, images in _drawn(scene, members, before):
            own |= dict(zip(rows.tolist(), zip(origins, images, strict=True), strict=True))
    todo = np.arange(len(members))
    nearest = _nearest(scene, members) if known is None else None
    # what others leave is not known at first: larger stamps would have more of it
    for side in _FIRST_STAMPS if known is not None else _FIRST_STAMPS[:1]:
        for part in scene.alike(members[todo], 256):
            rows = todo[part]
            xy = scene.xy[members[rows]]
            origin = np.rint(xy).astype(int) - side // 2
            cuts = []
            for row, (x, y) in zip(rows, origin, strict=True):
                if own is None:
                    data, weight, cell = _cut(scene, (y, x), (side, side), nearest)
                    near = np.hypot(*(np.mgrid[:side, :side] - side // 2)) < _OWN
                    weight[~near & (cell != row + 1)] = 0.0
                    cuts.append((np.where(weight > 0, data, 0.0), weight))
                    continue
                data, weight, others = _cut(scene, (y, x), (side, side), light)
                at, image = own[int(row)]
                there, here = _overlap((side, side), (at[1] - y, at[0] - x), image.shape)
                data = data - others
                data[there] += image[here]
                cuts.append((np.where(weight > 0, data, 0.0), weight))
            seen = np.array([(w > 0).any() for _, w in cuts])
            if not seen.any():
                continue
            batch = SceneBatch(
                data=np.stack([d for d, _ in cuts])[seen],
                inv_sigma=np.stack([w for _, w in cuts])[seen],
                psf=scene.psfs_of(members[rows[seen]]),
                position=(xy - origin)[seen, None],
                spread=scene.spread[members[rows], None][seen],
            )
            found = guess_sources(setup, batch)[:, 0]
            found[:, 1:3] += origin[seen]
            rows = rows[seen]
            keep = ~(found[:, 0] > _GROWTH * guess[rows, 0])  # else it is that of neighbours
            guess[rows[keep]] = found[keep]
        todo = todo[6 * guess[todo, 3] > side]
        if not len(todo):
            break
    return guess


def _nearest(scene: Scene, members: np.ndarray) -> np.ndarray:
    """Number of the source that is nearest to each pixel, from 1; (ny, nx)."""
    seeds = np.zeros(scene.shape, dtype=np.int32)
    x, y = np.rint(scene.xy[members]).astype(int).T
    ny, nx = scene.shape
    seeds[y.clip(0, ny - 1), x.clip(0, nx - 1)] = np.arange(len(members)) + 1
    at = distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    return seeds[tuple(at)]


def _cut(scene: Scene, origin: tuple[int, int], shape: tuple[int, int], *others: np.ndarray):
    """Data and weight (and others) in a box that may reach beyond the image."""
    there, here = _overlap(scene.shape, origin, shape)
    result = []
    for array in (scene.data, scene.inv_sigma, *others):
        part = np.zeros(shape)
        part[here] = array[there]
        result.append(part)
    return result


def _overlap(frame, origin, shape) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a box lies in an image, and that part in the box."""
    low = [max(o, 0) for o in origin]
    high = [max(min(o + n, m), a) for o, n, m, a in zip(origin, shape, frame, low, strict=True)]
    there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
    return there, here


def _radius_at(scene, members, guess, level: float) -> np.ndarray:
    """Radius in pixels at which a Sérsic profile is as faint as ``level`` sigma, (M,)."""
    flux, r, n, ellip = guess[:, 0], guess[:, 3], guess[:, 4].clip(None, _STEEPEST), guess[:, 5]
    x, y = np.rint(scene.xy[members]).astype(int).T
    inv_sigma = scene.inv_sigma[y.clip(0, scene.shape[0] - 1), x.clip(0, scene.shape[1] - 1)]
    usual = np.median(scene.inv_sigma[scene.inv_sigma > 0])
    inv_sigma = np.where(inv_sigma > 0, inv_sigma, usual)
    b = gammaincinv(2 * n, 0.5)
    log_norm = 2 * n * np.log(b) - np.log(2 * np.pi * n) - gammaln(2 * n)
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = np.log(flux * inv_sigma / level) + log_norm - np.log((1 - ellip) * r**2)
        radius = r * np.minimum((np.maximum(peak, 0) / b) ** n, _FARTHEST)
    psfs = [scene.psf_of(k) for k in members]
    blur = np.array([0.0 if p is None else 3 * p.sigma for p in psfs])
    radius = np.hypot(np.nan_to_num(radius), blur)
    return radius.clip(_LEAST_RADIUS, _LARGEST_RADIUS)


def _linked(xy: np.ndarray, radius: np.ndarray, most: int) -> list[np.ndarray]:
    """Groups of sources that touch, the closest first, none of more than ``most``."""
    pairs = cKDTree(xy).query_pairs(2 * radius.max(), output_type="ndarray")
    distance = np.hypot(*(xy[pairs[:, 0]] - xy[pairs[:, 1]]).T)
    strength = distance / (radius[pairs[:, 0]] + radius[pairs[:, 1]])
    parent, size = np.arange(len(xy)), np.ones(len(xy), dtype=int)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for p in np.argsort(strength):
        if strength[p] >= 1:
            break
        a, b = (root(i) for i in pairs[p])
        if a != b and size[a] + size[b] <= most:
            parent[b] = a
            size[a] += size[b]
    roots = np.array([root(i) for i in range(len(xy))])
    return [np.flatnonzero(roots == r) for r in np.unique(roots)]


# -- fits ------------------------------------------------------------------------------------


@dataclass
class _Task:
    """A group to be fitted."""

    scene: Scene
    group: Group
    data: np.ndarray
    inv_sigma: np.ndarray
    start: list[np.ndarray] | None
    tolerance: float = 0.0


@dataclass
class Work:
    """How scenes are fitted: the fitter and its setups, and finished fits of a former run."""

    fitter: Any
    background: str
    structure: float = 0.0
    memory: Any = None
    workers: int = 1
    setups: dict[int, Any] = field(default_factory=dict)

    def prepare(self, scenes: list[Scene]) -> None:
        """Make the setups of all models, found by the identity of the model."""
        for scene in scenes:
            for model in scene.models:
                if id(model) not in self.setups:
                    own = _with_own_priors(self.fitter, model)
                    self.setups[id(model)] = own._setup(model, self.background)

    def setup_of(self, scene: Scene, k: int) -> Any:
        return self.setups[id(scene.models[k])]

    def answers(self, asked: list[_Asked]) -> Iterator[tuple[Any, str | None]]:
        """Fits of batches, in their order, or what went wrong; each is kept as it is found."""
        remembered = [None if self.memory is None else self.memory.find(own) for own in asked]
        news = [own for own, known in zip(asked, remembered, strict=True) if known is None]
        found = self._computed(news)
        for own, known in zip(asked, remembered, strict=True):
            if known is not None:
                yield known, None
                continue
            answer, error = next(found)
            if error is None and self.memory is not None:
                self.memory.keep(own, *answer)
            yield answer, error

    def _computed(self, asked: list[_Asked]) -> Iterator[tuple[Any, str | None]]:
        if self.workers == 1 or len(asked) < 2:
            return (own.answer() for own in asked)
        from joblib import Parallel, delayed

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*worker stopped.*")
            pool = Parallel(n_jobs=self.workers, return_as="generator", max_nbytes=None)
            return pool(delayed(_Asked.answer)(own) for own in asked)


def _with_own_priors(fitter: Any, model: Any) -> Any:
    """The fitter with those of its priors that are of parameters of the model."""
    if not fitter.priors:
        return fitter
    own = copy(fitter)
    own.priors = {n: p for n, p in fitter.priors.items() if n in model.param_names}
    return own


def solve_scenes(
    scenes: list[Scene], work: Work, max_group: int, report: Callable[[int], None]
) -> None:
    """Fit all sources of all scenes; results are put in their sources and groups."""
    work.prepare(scenes)
    for scene in scenes:
        if scene.models:
            make_groups(scene, work.setup_of(scene, 0), max_group)
        _enrol(scene, work)
    for scene in scenes:
        if not is_one(scene.groups, scene.shape):
            _check_centres(scene, work.fitter)
    totals = [
        None if is_one(scene.groups, scene.shape) else _first_light(scene) for scene in scenes
    ]
    _take_turns(scenes, totals, work, report)


def _check_centres(scene: Scene, fitter: Any) -> None:
    """Raise ValueError if a model says where it is: in the box of a group that is elsewhere."""
    for name in ("x_0", "y_0"):
        held = any(
            m.fixed[name] or m.tied[name] or tuple(m.bounds[name]) != (None, None)
            for m in {id(m): m for m in scene.models}.values()
        )
        if held or name in (fitter.priors or {}):
            raise ValueError(
                f"{name} has a bound, a prior or a fixed value, which in a large image is not "
                "possible: give the positions, and say by position_prior how well they are known"
            )


def is_one(groups: Sequence[Group], shape: tuple[int, int]) -> bool:
    """Whether there is nothing but one group, whose box is the whole image."""
    return all(len(groups) == 1 and g.origin == (0, 0) and g.shape == shape for g in groups)


def solve_again(scenes: list[Scene], work: Work, rounds: int | None = None) -> None:
    """Fit scenes from where they are, as after other models were given to some sources.

    Groups without ``seen`` are fitted, and others if that changes what they see of them.
    """
    work.prepare(scenes)
    for scene in scenes:
        _enrol(scene, work)
    totals = [_light(scene) for scene in scenes]
    _take_turns(scenes, totals, work, lambda done: None, rounds or _ROUNDS)


def _enrol(scene: Scene, work: Work) -> None:
    """Tell sources which group they are in."""
    for g, group in enumerate(scene.groups):
        if group.cov is None:  # else the covariance is in this order
            group.members = group.members[_by_model(scene, group, work)]
        for k in group.members:
            scene.sources[k].group = g
            scene.sources[k].box = group.box


def _take_turns(scenes, totals, work, report, rounds: int = _ROUNDS) -> None:
    """Fit all groups, with the light of others (in ``totals``) taken away, until they agree.

    After the first round, in which all start from a first look, groups that share much are not
    fitted at once, each with what the others were before: this would swing, and not settle.
    """
    shifts = [[scene.groups] for scene in scenes]
    for turn in range(rounds):
        if turn == 1:
            shifts = [_shifts(scene.groups) for scene in scenes]
        done = 0
        for shift in range(max(map(len, shifts), default=0)):
            now = [own[shift] if shift < len(own) else [] for own in shifts]
            tasks = [
                task
                for scene, total, groups in zip(scenes, totals, now, strict=True)
                for task in _tasks(scene, groups, total, turn)
            ]
            for batch in _fit_all(_alike(tasks, work), work):
                if turn == 0:
                    report(sum(len(task.group.members) for task in batch))
            for i, scene in enumerate(scenes):
                if totals[i] is not None and now[i] and tasks:
                    totals[i] = _light(scene)
            done += len(tasks)
        if not done:
            break


def _shifts(groups: list[Group]) -> list[list[Group]]:
    """Groups that may be fitted at the same time, as the middles of their boxes are apart."""
    if not groups:
        return []
    shape = np.array([g.shape for g in groups], dtype=float)
    centre = np.array([g.origin for g in groups]) + shape / 2
    half = _MIDDLE * shape / 2
    order = np.argsort(-shape.prod(1), kind="stable")
    number = np.full(len(groups), -1)
    for i in order:
        near = (np.abs(centre - centre[i]) < half + half[i]).all(1)
        taken = set(number[near].tolist())
        number[i] = next(k for k in range(len(groups)) if k not in taken)
    return [[groups[i] for i in np.flatnonzero(number == k)] for k in range(number.max() + 1)]


def _by_model(scene: Scene, group: Group, work: Work) -> np.ndarray:
    """Order with sources of one model side by side, so that more groups are alike."""
    order = {key: i for i, key in enumerate(work.setups)}
    return np.argsort([order[id(scene.models[k])] for k in group.members], kind="stable")


def _first_light(scene: Scene) -> np.ndarray:
    """Image of all first guesses; each is kept with its source."""
    from galmorph.models.sersic import SersicGalaxy2D

    model = SersicGalaxy2D()
    for group in scene.groups:
        params, psf = _guess_of(scene, group), scene.psf_of_group(group)
        images = model.render(group.shape, params=params, psf=psf, dtype="float32")
        for k, image in zip(group.members, np.nan_to_num(images), strict=True):
            scene.sources[k].image = image
    return _light(scene)


def _guess_of(scene: Scene, group: Group) -> np.ndarray | None:
    """First guesses of the members, (K, 7) in pixels of the box."""
    params = [scene.sources[k].guess for k in group.members]
    if any(p is None for p in params):
        return None
    return np.stack([_shifted(p, group, -1) for p in params])


def _light(scene: Scene) -> np.ndarray:
    """The sum of the models of all sources."""
    total = np.zeros(scene.data.shape)
    for group in scene.groups:
        there, here = _overlap(scene.data.shape, group.origin, group.shape)
        for k in group.members:
            if scene.sources[k].image is not None:
                total[there] += scene.sources[k].image[here]
    return total


def background_image(
    shape: tuple[int, int], groups: list[Group], sources: list[Source], kind: str
) -> np.ndarray:
    """The fitted background; the mean of those of groups that overlap."""
    from galmorph._batchfit import background_templates

    total, count = np.zeros((2, *shape))
    for group in groups:
        terms = sources[group.members[0]].background
        if terms is None or not len(terms):
            continue
        image = np.tensordot(terms, background_templates(kind, group.shape), 1)
        there, here = _overlap(shape, group.origin, group.shape)
        total[there] += np.nan_to_num(image[here])
        count[there] += 1
    return total / np.maximum(count, 1)


def _tasks(scene: Scene, groups: list[Group], total: np.ndarray | None, turn: int) -> list[_Task]:
    """Those of the groups that are still to be fitted, the light of all others taken away."""
    if total is None:
        if turn:
            return []
        return [_Task(scene, g, scene.data, scene.inv_sigma, None) for g in groups]
    tasks = []
    for group in groups:
        data, inv_sigma, others = _cut(scene, group.origin, group.shape, total)
        sources = [scene.sources[k] for k in group.members]
        others = others - sum(s.image for s in sources if s.image is not None)
        others[inv_sigma <= 0] = 0.0
        if group.seen is not None:
            change = np.sqrt((((others - group.seen) * inv_sigma) ** 2).sum())
            if change < _SETTLED:
                continue
        group.seen = others
        start = [s.params for s in sources]
        start = None if any(p is None for p in start) else [_shifted(p, group, -1) for p in start]
        tolerance = _LATER if turn else _FIRST
        tasks.append(_Task(scene, group, data - others, inv_sigma, start, tolerance))
    return tasks


def _shifted(params: np.ndarray, group: Group, sign: int) -> np.ndarray:
    params = params.copy()
    params[1:3] += sign * np.array(group.origin[::-1])
    return params


def _alike(tasks: list[_Task], work: Work) -> list[list[_Task]]:
    """Tasks that can be fitted as one batch: the same shape, models and kind of PSF."""
    batches: dict[tuple, list[_Task]] = {}
    for task in tasks:
        scene = task.scene
        key = (
            task.data.shape,
            tuple(id(work.setup_of(scene, k)) for k in task.group.members),
            psf_kind(scene.psf_of_group(task.group)),
            task.start is None,
            scene.sources[task.group.members[0]].guess is None,
        )
        batches.setdefault(key, []).append(task)
    result = []
    for batch in batches.values():
        pixels = batch[0].data.size * len(batch[0].group.members)
        step = int(np.clip(2**21 // pixels, 1, 512))
        result += [batch[i : i + step] for i in range(0, len(batch), step)]
    return result


def _fit_all(batches: list[list[_Task]], work: Work) -> Iterator[list[_Task]]:
    """Fit batches, by several processes if there are; yields each as it is done."""
    asked = [_Asked.of(tasks, work) for tasks in batches]
    for tasks, own, (found, error) in zip(batches, asked, work.answers(asked), strict=True):
        if error is None:
            own.keep(tasks, *found)
        elif len(tasks) > 1:  # one makes the fit fail: the others are done without
            for _ in _fit_all([[task] for task in tasks], work):
                pass
        else:
            task = tasks[0]
            for k in task.group.members:
                task.scene.sources[k].flags |= int(FitFlag.NOT_CONVERGED | FitFlag.BAD_COVARIANCE)
                task.scene.errors[str(task.scene.ids[k])] = error
        yield tasks


@dataclass
class _Asked:
    """All that the fit of a batch needs to know."""

    setups: list[Any]
    batch: Any
    start: list[np.ndarray] | None
    guess: np.ndarray | None
    known: _Known | None
    noise: Any
    tolerance: float
    structure: float

    @classmethod
    def of(cls, tasks: list[_Task], work: Work) -> _Asked:
        from galmorph._scenefit import SceneBatch

        first = tasks[0]
        members = [(t, t.group.members) for t in tasks]
        origin = np.array([t.group.origin[::-1] for t in tasks])
        batch = SceneBatch(
            data=np.stack([t.data for t in tasks]),
            inv_sigma=np.stack([t.inv_sigma for t in tasks]),
            psf=shared_or_each(t.scene.psf_of_group(t.group) for t in tasks),
            position=np.stack([t.scene.xy[m] for t, m in members]) - origin[:, None],
            spread=np.stack([t.scene.spread[m] for t, m in members]),
        )
        own = [work.setup_of(first.scene, k) for k in first.group.members]
        start = None
        if first.start is not None:
            # sources that share their setup are drawn together
            short = {id(s): replace(s, max_iter=min(s.max_iter, _FEW)) for s in own}
            own = [short[id(s)] for s in own]
            start = [np.stack([t.start[j] for t in tasks]) for j in range(len(own))]
        guess = [_guess_of(t.scene, t.group) for t in tasks]
        guess = None if any(g is None for g in guess) else np.stack(guess)
        known = [t.group.known for t in tasks]
        if any(k is None for k in known):
            known = None
        else:
            total, off = (
                np.concatenate([getattr(k, n) for k in known]) for n in ("total", "misfit")
            )
            known = _Known(total, off, known[0].n_free)
        return cls(
            own, batch, start, guess, known, work.fitter.noise, first.tolerance, work.structure
        )

    def answer(self) -> tuple[Any, str | None]:
        """Fits and what noise depends on; or what went wrong."""
        try:
            if ((self.batch.inv_sigma > 0).sum((1, 2)) == 0).any():
                raise ValueError("there are no usable pixels")
            return fit_with_noise(
                self.setups,
                self.batch,
                self.noise,
                self.start,
                self.guess,
                self.known,
                self.tolerance,
                self.structure,
            ), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def keep(self, tasks: list[_Task], fits: Any, known: _Known | None) -> None:
        """Put the fits in the sources and groups."""
        for b, task in enumerate(tasks):
            if known is not None:
                rows = slice(b, b + 1)
                task.group.known = _Known(known.total[rows], known.misfit[rows], known.n_free)
            _keep(task, fits, b)


@dataclass
class _Known:
    """What noise depends on, of the last fits: model images, misfit (B, ny, nx), free numbers."""

    total: np.ndarray
    misfit: np.ndarray
    n_free: int


def fit_with_noise(
    setups, batch, noise, start, guess, known, tolerance: float = 0.0, structure: float = 0.0
):
    """`fit_scenes` with any noise, by iteratively reweighted least squares.

    Returns the fits and what is `_Known` of them; ``known`` is that of the fits from which these
    start, or None.
    """
    from galmorph._scenefit import fit_scenes

    misfit = bool(getattr(noise, "needs_misfit", False))
    changes = noise is not None and bool(noise.parameter_names or not noise.gaussian)
    work = _working(batch, noise, known) if changes and known is not None else batch
    options = {"misfit": misfit, "tolerance": tolerance, "structure": structure}
    fits = fit_scenes(setups, work, start=start, guess=guess, **options)
    for _ in range(_REWEIGHTINGS if changes else 0):
        before = np.stack([p[:, 0] for p in fits.params], 1)
        work = _working(batch, noise, _known(setups, fits))
        fits = fit_scenes(setups, work, start=fits.params, **options)
        after = np.stack([p[:, 0] for p in fits.params], 1)
        if not (np.abs(after - before) > _SAME * fits.flux_noise).any():
            break
    if noise is not None:
        fits.cov = fits.cov / noise.information
        fits.flux_noise = fits.flux_noise / np.sqrt(noise.information)
    return fits, _known(setups, fits) if changes else None


def _known(setups, fits) -> _Known:
    from galmorph._batchfit import background_templates

    templates = background_templates(setups[0].background, fits.images.shape[2:])
    total = fits.images.sum(1) + np.einsum("bt,tyx->byx", fits.background, templates)
    return _Known(total, np.sqrt((fits.misfit**2).sum(1)), fits.n_free)


def _working(batch, noise, known: _Known):
    """The batch as a Gaussian problem, with noise as it is at the last fits."""
    if noise.parameter_names:
        noise = noise.with_parameters(
            noise.fitted(batch.data, known.total, batch.inv_sigma, known.n_free)
        )
    if getattr(noise, "needs_misfit", False):
        noise = noise.bind(known.misfit)
    data, inv_sigma = noise.working(batch.data, known.total, batch.inv_sigma)
    return replace(batch, data=data, inv_sigma=inv_sigma)


def _keep(task: _Task, fits: Any, b: int) -> None:
    """Put the fit of one group in its sources."""
    scene, group = task.scene, task.group
    used = task.inv_sigma > 0
    dof = int(used.sum()) - fits.n_free
    size = sum(p.shape[1] for p in fits.params)
    group.cov = fits.cov[b, :size, :size]
    for j, k in enumerate(group.members):
        source, params = scene.sources[k], fits.params[j][b]
        noise = fits.flux_noise[b, j]
        source.params, source.flux_noise = _shifted(params, group, 1), float(noise)
        source.image = np.nan_to_num(fits.images[b, j]).astype(np.float32)
        source.background = fits.background[b]
        source.chi2, source.dof = float(fits.chi2[b]), max(dof, 0)
        source.n_iter += int(fits.n_iter[b])
        conditions = {
            FitFlag.NOT_CONVERGED: not fits.converged[b],
            FitFlag.AT_BOUND: fits.at_bound[b, j],
            FitFlag.BAD_COVARIANCE: fits.bad_covariance[b],
            FitFlag.FEW_PIXELS: dof <= 0,
            FitFlag.LOW_SNR: not (params[0] > 0 if noise == 0 else params[0] >= 5 * noise),
            FitFlag.EDGE: _near_edge(source.params[1:3], scene.shape),
            FitFlag.SATURATED: is_saturated(
                scene.data, scene.data * scene.inv_sigma > _BRIGHT, source.params[1:3]
            ),
            FitFlag.POOR_FIT: dof > 0
            and (fits.chi2[b] > 2 * dof or fits.chi2[b] - dof > 10 * np.sqrt(2 * dof)),
        }
        for flag, holds in conditions.items():  # of this fit, not of a former one
            source.flags = source.flags | int(flag) if holds else source.flags & ~int(flag)
        if not np.isfinite(params).all():
            source.flags |= int(FitFlag.NOT_CONVERGED | FitFlag.BAD_COVARIANCE)


def _near_edge(xy: np.ndarray, shape: tuple[int, int]) -> bool:
    x, y = xy
    return bool(min(x, y, shape[1] - 1 - x, shape[0] - 1 - y) < 2)


def is_saturated(data: np.ndarray, bright: np.ndarray, xy: np.ndarray) -> bool:
    """Whether the brightest of the pixels about a position (x, y) form a plateau of one value.

    ``data`` are pixels as they were measured: what is taken away would hide a plateau.
    """
    if not np.isfinite(xy).all():
        return False
    x, y = (int(v) for v in np.rint(np.clip(xy, -1e6, 1e6)))
    box = tuple(slice(max(v - _CORE, 0), max(v + _CORE + 1, 0)) for v in (y, x))
    near = np.where(bright[box], data[box], -np.inf)
    if not near.size or not np.isfinite(near.max()):
        return False
    parts, count = label(near == near.max())
    return bool(count and np.bincount(parts.ravel())[1:].max() >= _PLATEAU)
