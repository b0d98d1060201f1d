"""Each source of a fitted scene by itself, the light of all others taken away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from galmorph._scenes import Group, _light, _overlap, background_image

__all__ = ["stamps_alone"]

_SIDES = np.array([25, 41, 61, 91, 121, 181, 241])
_BATCH = 256
_KINDS = {0: "none", 1: "constant", 3: "tilted"}


def stamps_alone(
    scene: Any, rows: np.ndarray | None = None, *, psf_error: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Stamps of sources, those of one size at a time.

    Parameters
    ----------
    scene : Scene
        After its fit; or anything with its ``data``, ``inv_sigma``, ``sources`` and ``groups``.
    rows : array of int, optional
        Which sources; those that have no fit within the image are left out.
    psf_error : float, optional
        What is added to the noise, relative to the models.

    Yields
    ------
    rows : array of int, shape (n,)
    data, sigma : array, shape (n, side, side)
        0 for sigma in unusable pixels.
    origin : array of int, shape (n, 2)
        (x, y) of the stamps' first pixels in the image.
    """
    residual, light = _residual(scene)
    usable = scene.inv_sigma > 0
    noise = 1.0 / np.where(usable, scene.inv_sigma, 1.0)
    sigma = np.where(usable, np.hypot(noise, psf_error * np.maximum(light, 0.0)), 0.0)
    wanted = range(len(scene.sources)) if rows is None else rows
    rows = np.array([k for k in wanted if _is_seen(scene, k)], dtype=int)
    sides = np.array([_side(scene.sources[k], noise) for k in rows], dtype=int)
    for side in np.unique(sides):
        chosen = rows[sides == side]
        for some in np.array_split(chosen, -(-len(chosen) // _BATCH)):
            data, error = np.zeros((2, len(some), side, side))
            origin = np.empty((len(some), 2), dtype=int)
            for j, k in enumerate(some):
                source = scene.sources[k]
                origin[j] = np.rint(source.params[1:3]).astype(int) - side // 2
                there, here = _overlap(scene.data.shape, origin[j, ::-1], (side, side))
                data[j][here] = residual[there]
                error[j][here] = sigma[there]
                _add(data[j], origin[j, ::-1], scene.groups[source.group], source.image)
            yield some, np.where(error > 0, data, 0.0), error, origin


def _is_seen(scene: Any, k: int) -> bool:
    source = scene.sources[k]
    if source.params is None or source.image is None or not np.isfinite(source.params).all():
        return False
    (x, y), (ny, nx) = source.params[1:3], scene.data.shape
    return -0.5 <= x <= nx - 0.5 and -0.5 <= y <= ny - 0.5


def _add(stamp: np.ndarray, origin: np.ndarray, group: Group, image: np.ndarray) -> None:
    """Put a source's own light back."""
    shift = (group.origin[0] - origin[0], group.origin[1] - origin[1])
    there, here = _overlap(stamp.shape, shift, group.shape)
    stamp[there] += image[here]


def _side(source: Any, noise: np.ndarray) -> int:
    """Of a stamp that holds what of a source stands out of the noise."""
    x, y = np.rint(source.params[1:3]).astype(int)
    own = noise[np.clip(y, 0, noise.shape[0] - 1), np.clip(x, 0, noise.shape[1] - 1)]
    area = np.count_nonzero(source.image > 0.5 * own)
    radius = 1.5 * np.sqrt(area / np.pi) + 5
    return int(_SIDES[min(np.searchsorted(_SIDES, 2 * radius), len(_SIDES) - 1)])


def _residual(scene: Any) -> tuple[np.ndarray, np.ndarray]:
    """Data less all models and background, and all models; both (ny, nx)."""
    light = _light(scene)
    terms = [s.background for s in scene.sources if s.background is not None]
    kind = _KINDS[max((len(t) for t in terms), default=0)]
    sky = background_image(scene.data.shape, scene.groups, scene.sources, kind)
    return np.where(scene.inv_sigma > 0, scene.data - light - sky, 0.0), light
