"""Forced photometry: fluxes of sources whose positions and shapes are known, all at once.

The image is a sum of known images times unknown fluxes: sparse linear least squares, solved
part by part where sources share pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components

from galmorph import _sky
from galmorph._scenes import _overlap
from galmorph.psf import psf_kind, shared_or_each

__all__ = ["Boxes", "Carrier", "LinearFit", "draw", "reaches", "shape_spread", "solve"]

#: Sides of boxes: few, so that many sources are drawn at once.
_SIDES = np.array([13, 17, 21, 25, 31, 37, 45, 55, 67, 81, 99, 121, 149, 181, 221, 301, 401, 561])
#: Brightness, in sigma of a pixel of the image where the shapes are from, at which boxes end.
_FAINTEST = 0.1
#: Sum of squares of the weighted light, of what it usually is, below which nothing is known.
_NOTHING = 1e-8
#: Largest ratio of scales along two axes at which a learned galaxy is carried over.
_LARGEST_SHEAR = 1.05
#: Steps of finite differences, in standard deviations.
_STEP = 0.3
#: Pixels that are drawn at once.
_PIXELS = 2**18


# -- from one grid of pixels to another ------------------------------------------------------


class Carrier:
    """Carries parameters from the pixels of one image to those of another.

    Parameters
    ----------
    xy : array, shape (K, 2)
        Where the sources are in the first image.
    first, second : celestial WCS or None
    second_shape : tuple of int

    Attributes
    ----------
    xy : array, shape (K, 2)
        Where they are in the second image.
    matrix : array, shape (K, 2, 2)
        Steps (x, y) in the second image by steps in the first.
    flipped : bool
        Whether one image is a mirror image of the other.  ``params`` are then of the second
        image with its columns in reverse order, as no galaxy has a mirror image among its
        own parameters.
    scale : float
        Pixels of the second image in one of the first.
    """

    def __init__(self, xy: np.ndarray, first: Any, second: Any, second_shape) -> None:
        self.start, self.xy = xy, xy
        self.matrix = np.broadcast_to(np.eye(2), (len(xy), 2, 2))
        self.flipped, self.same = False, True
        self._width = second_shape[1]
        if first is not None and second is not None:
            self._follow(first, second)
        determinant = np.abs(np.linalg.det(np.nan_to_num(self.matrix)))
        good = determinant > 0
        self.scale = float(np.sqrt(np.median(determinant[good]))) if good.any() else 1.0

    def _follow(self, first: Any, second: Any) -> None:
        good = np.isfinite(self.start).all(1)
        xy = np.full_like(self.start, np.nan)
        if good.any():
            sky = first.pixel_to_world(*self.start[good].T)
            xy[good] = np.column_stack([np.ravel(a) for a in second.world_to_pixel(sky)])
        if np.abs(xy - self.start)[good].max(initial=0.0) < 1e-6:
            return
        slopes = [_sky.local_sky(w, *p.T) for w, p in ((first, self.start), (second, xy))]
        if any(s is None for s in slopes):
            raise ValueError("the two images do not share a sky")
        (_, one), (_, two) = slopes
        good &= np.isfinite(one).all((1, 2)) & np.isfinite(two).all((1, 2))
        matrix = np.full_like(one, np.nan)
        matrix[good] = np.linalg.solve(two[good], one[good])
        self.xy, self.matrix, self.same = xy, matrix, False
        self.flipped = bool(np.median(np.linalg.det(matrix[good])) < 0) if good.any() else False

    def params(self, model: Any, params: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Parameters (n, P) of sources ``rows`` in the second image."""
        if self.same:
            return params
        matrix, params = self.matrix[rows], params.copy()
        step = params[:, 1:3] - self.start[rows]
        params[:, 1:3] = self.xy[rows] + np.einsum("nij,nj->ni", matrix, step)
        if self.flipped:
            matrix = matrix * np.array([-1.0, 1.0])[:, None]
            params[:, 1] = self._width - 1 - params[:, 1]
        at = {name: i for i, name in enumerate(model.param_names)}
        for profile in model._profiles:
            if profile["r"] is not None:
                own = [at[profile["r"]]]
                own += [at[profile.get(name, name)] for name in ("ellip", "theta")]
                params[:, own] = _carried_ellipse(matrix, params[:, own])
        if "r_50" in at:
            params[:, [at["r_50"], at["theta"]]] = _turned(
                matrix, params[:, [at["r_50"], at["theta"]]]
            )
        return params


def _carried_ellipse(matrix: np.ndarray, ellipse: np.ndarray) -> np.ndarray:
    """(r, ellip, theta) of ellipses (n, 3) after a linear map (n, 2, 2)."""
    r, ellip, theta = ellipse.T
    cos, sin = np.cos(theta), np.sin(theta)
    axes = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    axes = matrix @ (axes * np.stack([r, r * (1 - ellip)], -1)[:, None])
    good = np.isfinite(axes).all((1, 2))
    value, vector = np.linalg.eigh(np.where(good[:, None, None], axes @ axes.swapaxes(1, 2), 0.0))
    minor, major = np.sqrt(np.clip(value, 0, None)).T
    with np.errstate(invalid="ignore", divide="ignore"):
        result = np.stack([major, 1 - minor / major, np.arctan2(*vector[:, ::-1, 1].T)], -1)
    return np.where(good[:, None], result, np.nan)


def _turned(matrix: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(r_50, theta) (n, 2) after a map that only turns and stretches."""
    good = np.isfinite(matrix).all((1, 2))
    stretch = np.linalg.svd(matrix[good], compute_uv=False)
    if len(stretch) and (stretch[:, 0] / stretch[:, 1]).max() > _LARGEST_SHEAR:
        raise ValueError(
            "the pixels of the two images are sheared against each other; learned galaxies can "
            "only be turned and stretched"
        )
    with np.errstate(invalid="ignore"):
        scale = np.sqrt(np.linalg.det(np.where(good[:, None, None], matrix, np.nan)))
    angle = np.arctan2(matrix[:, 1, 0] - matrix[:, 0, 1], matrix[:, 0, 0] + matrix[:, 1, 1])
    return np.stack([size[:, 0] * scale, size[:, 1] + angle], -1)


def reaches(result: Any) -> np.ndarray:
    """How far from its centre each source of a `SceneResult` is to be seen, (K,) in pixels."""
    used = result.inv_sigma > 0
    level = _FAINTEST / np.median(result.inv_sigma[used]) if used.any() else 0.0
    reach = np.zeros(len(result))
    for k, params in enumerate(result.params):
        (rows, columns), image = result.source_image(k)
        if not image.size or not np.isfinite(params[1:3]).all():
            continue
        bright = np.abs(image) > level
        for axis, start, centre in ((1, rows.start, params[2]), (0, columns.start, params[1])):
            seen = np.flatnonzero(bright.any(axis)) + start
            if len(seen):
                reach[k] = max(reach[k], *np.abs(seen[[0, -1]] - centre))
    return reach


# -- the images of all sources ---------------------------------------------------------------


class Boxes:
    """In which pixels each source is drawn: the columns of the linear problem.

    Parameters
    ----------
    xy : array, shape (n, 2)
        Centres (x, y).
    half : array, shape (n,)
        Least distance from the centre to the sides, in pixels.
    shape : tuple of int
        (ny, nx) of the image.
    """

    def __init__(self, xy: np.ndarray, half: np.ndarray, shape: tuple[int, int]) -> None:
        wanted = 2 * np.ceil(half) + 1
        self.sides = _SIDES[np.searchsorted(_SIDES, wanted).clip(max=len(_SIDES) - 1)]
        centre = np.where(np.isfinite(xy), xy, -1e6).clip(-1e6, 1e6)  # far outside
        self.origin = np.rint(centre).astype(int) - self.sides[:, None] // 2
        self.shape = shape
        #: of each box: its part in the image
        self.here: list[tuple[slice, slice]] = []
        pixels = []
        for (x, y), side in zip(self.origin, self.sides, strict=True):
            there, here = _overlap(shape, (y, x), (side, side))
            row, column = (np.arange(s.start, s.stop) for s in there)
            pixels.append((row[:, None] * shape[1] + column).ravel())
            self.here.append(here)
        self.start = np.concatenate([[0], np.cumsum([len(p) for p in pixels])]).astype(np.int64)
        self.pixels = np.concatenate(pixels) if pixels else np.empty(0, dtype=np.int64)

    def matrix(self, values: np.ndarray) -> sparse.csc_array:
        """Images, one after another as `draw` gives them, as columns (npix, n)."""
        size = self.shape[0] * self.shape[1]
        return sparse.csc_array(
            (values, self.pixels, self.start), shape=(size, len(self.sides)), copy=False
        )


def draw(boxes: Boxes, models: Sequence[Any], params: Sequence[np.ndarray], psf: Any) -> np.ndarray:
    """Images of sources in their boxes, one after another, as one array.

    ``psf`` is one for all, or a list of one each.
    """
    values = np.zeros(len(boxes.pixels))
    psfs = psf if isinstance(psf, list) else [psf] * len(models)
    kinds: dict[tuple, list[int]] = {}
    for i, model in enumerate(models):
        if boxes.start[i + 1] > boxes.start[i] and np.isfinite(params[i]).all():
            key = (int(boxes.sides[i]), id(model), psf_kind(psfs[i]))
            kinds.setdefault(key, []).append(i)
    for (side, *_), members in kinds.items():
        for rows in np.array_split(members, max(1, len(members) * side**2 // _PIXELS)):
            if not len(rows):
                continue
            own = np.stack([params[i] for i in rows])
            own[:, 1:3] -= boxes.origin[rows]
            images = models[rows[0]].render(
                (side, side),
                params=own,
                psf=shared_or_each(psfs[i] for i in rows),
                dtype="float32",
            )
            for i, image in zip(rows, np.nan_to_num(images), strict=True):
                values[boxes.start[i] : boxes.start[i + 1]] = image[boxes.here[i]].ravel()
    return values


# -- the linear problem ----------------------------------------------------------------------


@dataclass
class LinearFit:
    """Fluxes that fit best.

    Attributes
    ----------
    flux : array, shape (n,)
        NaN where no pixel says anything.
    cov : sparse array, shape (n, n)
        Between columns that share pixels.
    singular : array of bool, shape (n,)
        Where fluxes cannot be told from each other; their covariance is NaN.
    background : array, shape (n,)
        Of the part that each column is in.
    group : array of int, shape (n,)
        Which columns share pixels, also by way of others.
    """

    flux: np.ndarray
    cov: sparse.csr_array
    singular: np.ndarray
    background: np.ndarray
    group: np.ndarray


def _parts(design: sparse.csc_array, weight: np.ndarray) -> np.ndarray:
    """Numbers (n,) of the parts in which columns share usable pixels."""
    used = design.copy()
    used.data = (weight[used.indices] > 0).astype(np.int32)
    used.eliminate_zeros()
    return connected_components(used.T @ used, directed=False)[1]


def solve(
    design: sparse.csc_array,
    data: np.ndarray,
    weight: np.ndarray,
    *,
    background: bool,
    spread: Callable[[np.ndarray, sparse.csc_array], sparse.csr_array] | None = None,
) -> LinearFit:
    """Fit the amplitudes of images.

    Parameters
    ----------
    design : sparse array, shape (npix, n)
        Images with a flux of one.
    data, weight : array, shape (npix,)
        Pixels and one over their uncertainty, zero where unusable.
    background : bool
        Whether a constant is fitted under each part of the image in which sources share pixels.
    spread : callable, optional
        Of the amplitudes and the weighted columns (npix, m): covariance (m, m) of
        the scalar products of these with the image, of images that are not exactly known.

    Returns
    -------
    LinearFit
    """
    count = design.shape[1]
    group = _parts(design, weight)
    columns, part = design, group
    if background and count:
        columns = sparse.hstack([design, _constants(design, weight, group)], format="csc")
        part = np.concatenate([group, np.arange(group.max() + 1)])
    white = columns.copy()
    white.data = white.data * weight[white.indices]
    gram = (white.T @ white).tocsr()
    right = white.T @ (data * weight)
    diagonal = gram.diagonal()
    usual = np.median(weight[weight > 0]) if (weight > 0).any() else 1.0
    known = diagonal > _NOTHING * usual**2 * (columns * columns).sum(0)
    norm = np.where(known, 1 / np.sqrt(np.where(known, diagonal, 1.0)), 0.0)
    # rows of one part side by side
    order, blocks = _sorted_by_part(part, known)
    scale = sparse.diags_array(norm[order])
    scaled = (scale @ gram[order][:, order] @ scale).tocsr()
    answer, singular = np.zeros(len(part)), np.zeros(len(part), dtype=bool)
    inverses = []
    for own in blocks:
        inverse, bad = _inverted(scaled[own, own].toarray())
        answer[order[own]] = inverse @ (right * norm)[order[own]]
        singular[order[own]] = bad
        inverses.append(inverse)
    flux = answer * norm
    more = None
    if spread is not None:
        more = spread(flux[:count], white)[order][:, order]
        more = (scale @ more @ scale).tocsr()
    found: list[tuple] = [([], [], [])]
    for own, inverse in zip(blocks, inverses, strict=True):
        if more is not None:
            inverse = inverse + inverse @ more[own, own].toarray() @ inverse
        if singular[order[own]].any():
            inverse = np.full_like(inverse, np.nan)
        row, column = scaled[own, own].tocoo().coords
        at, to = order[own][row], order[own][column]
        found.append((at, to, inverse[row, column] * norm[at] * norm[to]))
    at, to, values = (np.concatenate(a) for a in zip(*found, strict=True))
    cov = sparse.csr_array((values, (at.astype(int), to.astype(int))), shape=gram.shape)
    level = flux[count + group] if background and count else np.zeros(count)
    flux = np.where(known[:count], flux[:count], np.nan)
    return LinearFit(flux, cov[:count, :count], singular[:count], level, group)


def _constants(design, weight: np.ndarray, group: np.ndarray) -> sparse.csc_array:
    """Columns of ones in the usable pixels of each part."""
    column = np.repeat(group, np.diff(design.indptr))
    pixel, first = np.unique(design.indices, return_index=True)
    use = weight[pixel] > 0
    shape = (design.shape[0], group.max() + 1)
    return sparse.csc_array((np.ones(use.sum()), (pixel[use], column[first[use]])), shape=shape)


def _sorted_by_part(part: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, list[slice]]:
    """What is known, in an order in which each part is a slice, and these slices."""
    order = np.argsort(part, kind="stable")
    order = order[known[order]]
    ends = [0, *(np.flatnonzero(np.diff(part[order])) + 1), len(order)]
    return order, [slice(a, b) for a, b in pairwise(ends) if b > a]


def _inverted(matrix: np.ndarray) -> tuple[np.ndarray, bool]:
    """Inverse of a positive matrix with a unit diagonal, and whether it is singular."""
    factor, info = linalg.lapack.dpotrf(matrix, lower=1)
    # what is told apart only by rounding, is not
    if info or np.diagonal(factor).min() < 1e-3:
        return np.linalg.pinv(matrix, rcond=1e-6, hermitian=True), True
    inverse = linalg.lapack.dpotri(factor, lower=1)[0]
    return np.tril(inverse) + np.tril(inverse, -1).T, False


# -- what is not known of the shapes ---------------------------------------------------------


def shape_spread(
    boxes: Boxes,
    models: Sequence[Any],
    owner: np.ndarray,
    place: Callable[[int, np.ndarray], np.ndarray],
    free: Sequence[Sequence[int]],
    result: Any,
    psf: Any,
    weight: np.ndarray,
) -> Callable[[np.ndarray, sparse.csc_array], sparse.csr_array]:
    """What `solve` takes as ``spread``: uncertain shapes, to first order.

    An error of the shapes changes the image of the sources, and the fluxes
    fit this change: its scalar products with the columns of the problem have the covariance
    X C X^T, with C that of the shapes and X the products with the derivatives of the images.

    Parameters
    ----------
    boxes, models, psf
        Of each column.
    owner : array of int, shape (n,)
        The source that each column is (a part) of.
    place : callable
        Gives the parameters with which a column is drawn, from those of its source.
    free : sequence of sequence of int
        Of each source: its parameters that make its shape.
    result : SceneResult
        Where the parameters and their covariance are from.
    psf : PSF, list of PSF, or None
    weight : array, shape (npix,)
        One over the uncertainty of the pixels.
    """
    params = result.params
    first = np.concatenate([[0], np.cumsum([len(f) for f in free])])
    cov, widths = _shape_cov(result, free, first)

    def spread(flux: np.ndarray, white: sparse.csc_array) -> sparse.csr_array:
        own_weight = weight[boxes.pixels]
        total = sparse.csr_array((white.shape[1], first[-1]))
        for p in range(max((len(f) for f in free), default=0)):
            moved, gap = [], np.zeros(len(models))
            for sign in (-1, 1):
                drawn = []
                for j, k in enumerate(owner):
                    own = np.array(params[k], dtype=float)
                    if p < len(free[k]):
                        own, change = _stepped(
                            own, models[j], free[k][p], sign * _STEP * widths[first[k] + p]
                        )
                        gap[j] += sign * change
                    drawn.append(place(j, own))
                moved.append(draw(boxes, models, drawn, psf))
            slope = np.where(gap > 0, np.nan_to_num(flux) / np.where(gap > 0, gap, 1.0), 0.0)
            change = (moved[1] - moved[0]) * np.repeat(slope, np.diff(boxes.start))
            change = boxes.matrix(change * own_weight)
            at = [first[k] + p if p < len(free[k]) else 0 for k in owner]
            use = np.array([float(p < len(free[k])) for k in owner])
            put = sparse.csr_array(
                (use, (np.arange(len(owner)), at)), shape=(len(owner), first[-1])
            )
            total = total + (white.T @ change) @ put
        return (total @ cov @ total.T).tocsr()

    return spread


def _stepped(params: np.ndarray, model: Any, i: int, step: float) -> tuple[np.ndarray, float]:
    """Parameters of which one is moved, within its bounds, and by how much it was."""
    low, high = model.bounds[model.param_names[i]]
    moved = params[i] + step
    moved = moved if low is None else max(moved, min(low, params[i]))
    moved = moved if high is None else min(moved, max(high, params[i]))
    change, params = moved - params[i], params.copy()
    params[i] = moved
    return params, change


def _shape_cov(result: Any, free, first: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Covariance of the shapes of all sources and standard deviations."""
    at, to, values = [], [], []
    for group in result._groups:
        if group.cov is None or not np.isfinite(group.cov).all():
            continue
        ends = np.cumsum([0, *(len(result.models[k].param_names) for k in group.members)])
        own = np.concatenate(
            [e + np.asarray(free[k], dtype=int) for e, k in zip(ends, group.members, strict=False)]
        )
        here = np.concatenate([np.arange(first[k], first[k + 1]) for k in group.members])
        block = group.cov[np.ix_(own, own)]
        at.append(np.repeat(here, len(here)))
        to.append(np.tile(here, len(here)))
        values.append(block.ravel())
    size = (first[-1], first[-1])
    if not at:
        return sparse.csr_array(size), np.zeros(size[0])
    indices = tuple(np.concatenate(a) for a in (at, to))
    cov = sparse.csr_array((np.concatenate(values), indices), shape=size)
    return cov, np.sqrt(np.clip(cov.diagonal(), 0, None))
