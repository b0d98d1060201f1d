"""What the light of real galaxies that no model of their kind has does to a fit.

Arms, clumps and tails are not noise that pixels have independently: they pull fluxes and shapes,
those of neighbours too.  Each source is cut into patches, of some 2 to 5 % of its light, whose
brightness may differ from the model's by a fraction; what the fit makes of that is linear, and adds
to the covariance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from galmorph.models.learned import LearnedGalaxy2D

if TYPE_CHECKING:
    from galmorph.models.base import GalaxyModel

__all__ = [
    "PATCHES",
    "RINGS",
    "SECTORS",
    "Patches",
    "flux_places",
    "patches_in",
    "patches_of",
    "relative_rms",
    "structure_covariance",
]

#: Fractions of the light at which the elliptical rings end, and number of sectors of each.
RINGS = (0.2, 0.4, 0.6, 0.8, 0.92)
SECTORS = 8
PATCHES = (len(RINGS) + 1) * SECTORS
# Relative rms of a patch of each ring for galaxies that are much larger than the PSF: what fits to
# bright galaxies of KiDS leave, and how much of it they hide by taking it up, told by fluxes of
# blends of such galaxies (benchmarks/structure.py).
_HIDDEN, _HIDDEN_BY_LATENTS = 2.6, 3.0
_PROFILE = tuple(_HIDDEN * rms for rms in (0.10, 0.10, 0.14, 0.20, 0.38, 1.0))
_TWO_PROFILES = tuple(_HIDDEN * rms for rms in (0.10, 0.08, 0.10, 0.12, 0.18, 0.6))
_LEARNED = tuple(_HIDDEN_BY_LATENTS * rms for rms in (0.06, 0.04, 0.08, 0.08, 0.12, 0.9))
# the same of all light that is beyond the image
_BEYOND = 0.35
_WINDOW = 8


def relative_rms(model: GalaxyModel) -> tuple[float, ...]:
    """Relative rms of a patch of each ring, for a model; zeros for a point source."""
    if isinstance(model, LearnedGalaxy2D):
        return _LEARNED
    radii = sum(name.startswith("r_") for name in model.param_names)
    return ((0.0,) * len(_PROFILE), _PROFILE, _TWO_PROFILES)[min(radii, 2)]


def patches_of(
    light: torch.Tensor, flux: torch.Tensor, centre: torch.Tensor, psf_sigma: float, nx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch of each pixel, and how well each source is resolved.

    Parameters
    ----------
    light : Tensor, shape (n, npix)
        Images of sources.
    flux : Tensor, shape (n,)
        Their total fluxes.
    centre : Tensor, shape (n, 2)
        (x, y).
    psf_sigma : float
        Width of the PSF in pixels; 0 for none.
    nx : int
        Pixels in a row.

    Returns
    -------
    patch : Tensor of int, shape (n, npix)
        Ring times `SECTORS` plus sector.
    resolved : Tensor, shape (n,)
        From 0 for a source not much larger than the PSF to 1.
    """
    light = light.double().clamp_min(0)
    pixel = torch.arange(light.shape[1], device=light.device)
    x = (pixel % nx)[None] - centre[:, :1]
    y = torch.div(pixel, nx, rounding_mode="floor")[None] - centre[:, 1:]
    # the square has moments that wings do not rule; those of a Gaussian are half of its own
    weight = light.square()
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-300)
    xx, yy, xy = ((weight * a).sum(1) for a in (x * x, y * y, x * y))
    xx, yy = xx.clamp_min(1e-2), yy.clamp_min(1e-2)
    xy = torch.minimum(torch.maximum(xy, -0.999 * (xx * yy).sqrt()), 0.999 * (xx * yy).sqrt())
    a = x / xx.sqrt()[:, None]
    b = (y - (xy / xx)[:, None] * x) / (yy - xy.square() / xx).sqrt()[:, None]
    order = (a.square() + b.square()).argsort(1)
    inside = torch.empty_like(light)
    inside.scatter_(1, order, light.gather(1, order).cumsum(1))
    inside = inside / flux.clamp_min(1e-300)[:, None]
    ring = torch.bucketize(inside, torch.tensor(RINGS, dtype=inside.dtype, device=inside.device))
    turn = torch.remainder(torch.atan2(b, a) / (2 * torch.pi), 1.0)
    sector = (turn * SECTORS).long().clamp_max(SECTORS - 1)
    resolved = (1 - 2 * psf_sigma**2 / (xx + yy)).clamp(0, 1)
    return ring * SECTORS + sector, torch.nan_to_num(resolved)


@dataclass
class Patches:
    """What the patches of all sources do, each brighter by one standard deviation.

    Attributes
    ----------
    light : Tensor, shape (b, K, npix)
        Images of the sources, in units of the noise.
    pull : Tensor, shape (b, U + nb, K P)
        J^T W t: by how much they pull the coordinates and the background.
    own : Tensor, shape (b, K, P)
        By how much the true fluxes differ, in units of the data.
    beyond : Tensor, shape (b, K)
        The same of the light beyond the image.
    """

    light: torch.Tensor
    pull: torch.Tensor
    own: torch.Tensor
    beyond: torch.Tensor

    def errors(self, moved: torch.Tensor, fluxes: Sequence[int]) -> torch.Tensor:
        """Errors (b, D, K P) of parameters which the fit moves by ``moved``; fluxes are at places.

        The true flux of a source has changed too, by the light of the patch: it is the difference
        that is the error.
        """
        error = moved.unflatten(2, (-1, PATCHES)).clone()
        for k, at in enumerate(fluxes):
            error[:, at, k] -= self.own[:, k]
        return error.flatten(2)

    def unseen(self, size: int, fluxes: Sequence[int]) -> torch.Tensor:
        """Errors (b, size, K) of fluxes at places by the light beyond the image."""
        error = self.beyond.new_zeros((len(self.beyond), size, len(fluxes)))
        for k, at in enumerate(fluxes):
            error[:, at, k] = self.beyond[:, k]
        return error


def patches_in(fit: Any, problem: Any, u: torch.Tensor) -> Iterator[tuple[torch.Tensor, Patches]]:
    """The patches of all scenes, some at a time.

    Parameters
    ----------
    fit, problem
        Of `galmorph._scenefit`.
    u : Tensor, shape (B, U)
        Coordinates of the fits.

    Yields
    ------
    rows : Tensor of int, shape (b,)
        Which scenes.
    patches : Patches
    """
    params = fit.params_of(problem, u)
    for part in problem.parts:
        part.fresh(problem.split(u, part))
    for rows in torch.arange(len(u), device=u.device).split(_WINDOW):
        yield rows, _patches_of_scenes(fit, problem, u, rows, params)


def _patches_of_scenes(fit, problem, u, rows, params) -> Patches:
    """Those of scenes ``rows``, of the parameters of all."""
    lin, images = problem.with_light(u[rows], rows)
    rms = torch.tensor([relative_rms(s.model) for s in fit.setups], dtype=u.dtype, device=u.device)
    scale = fit.scale[rows, None]
    flux = torch.stack([p[rows, 0] for p in params], 1) / scale
    centre = torch.stack([p[rows, 1:3] for p in params], 1)
    count = (len(rows), problem.sources)
    patch, resolved = patches_of(
        images.flatten(0, 1), flux.flatten(), centre.flatten(0, 1),
        fit.psf_sigma if fit.psfs else 0.0, fit.shape[1],
    )  # fmt: skip
    patch, resolved = patch.unflatten(0, count), resolved.unflatten(0, count).square()
    level = resolved[..., None] * rms.repeat_interleave(SECTORS, 1)
    own = images.new_zeros((*count, PATCHES)).scatter_add_(2, patch, images).double()
    beyond = (flux - own.sum(2)).clamp_min(0) * resolved * rms.any(1)
    pull = _pull(fit, problem, lin, rows, images, patch) * level[:, None]
    own, beyond = scale[..., None] * own * level, _BEYOND * scale * beyond
    return Patches(images, pull.flatten(2), own, beyond)


def structure_covariance(
    fit: Any,
    problem: Any,
    u: torch.Tensor,
    inverse: torch.Tensor,
    jacobian: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be added to the covariance of parameters and background, (B, D + nb, D + nb).

    Also the images of the sources, (B, K, npix), in units of the noise.

    Parameters
    ----------
    fit, problem
        Of `galmorph._scenefit`.
    u : Tensor, shape (B, U)
        Coordinates of the fits.
    inverse : Tensor, shape (B, U + nb, U + nb)
        Their covariance.
    jacobian : Tensor, shape (B, D + nb, U + nb)
        Derivatives of the parameters and the background.

    Notes
    -----
    A patch t of source k that is brighter by a fraction e changes the parameters by
    C Jᵀ W t e, with C their covariance, J the derivatives of the image and W the inverse variance.
    """
    extra = jacobian.new_zeros((len(u), jacobian.shape[1], jacobian.shape[1]))
    fluxes, light = flux_places(fit.setups), []
    for rows, patches in patches_in(fit, problem, u):
        error = patches.errors(jacobian[rows] @ inverse[rows] @ patches.pull, fluxes)
        unseen = patches.unseen(error.shape[1], fluxes)
        extra[rows] = error @ error.transpose(1, 2) + unseen @ unseen.transpose(1, 2)
        light.append(patches.light)
    return extra, torch.cat(light)


def flux_places(setups: Sequence[Any]) -> list[int]:
    """Places of the fluxes among the parameters of all sources."""
    sizes = [len(setup.names) for setup in setups]
    return [sum(sizes[:k]) for k in range(len(sizes))]


def _pull(fit, problem, lin, rows, light, patch) -> torch.Tensor:
    """Jᵀ W t of all patches, (b, U + nb, K, PATCHES)."""
    weight = fit.weight[rows, None]
    templates = fit.templates.expand(len(rows), -1, -1)
    slopes = torch.cat([lin.columns[:, 1:], templates], 1) * weight
    if problem.whitening is not None:
        slopes = problem.whitening(slopes, rows)
    seen = light * weight
    found = slopes.new_zeros((*slopes.shape[:2], problem.sources, PATCHES))
    for k in range(problem.sources):
        if problem.whitening is None:
            index = patch[:, k, None].expand_as(slopes)
            found[:, :, k] = found[:, :, k].scatter_add(2, index, slopes * seen[:, k, None])
        else:
            each = torch.nn.functional.one_hot(patch[:, k], PATCHES).to(slopes)
            each = problem.whitening(each.transpose(1, 2) * seen[:, k, None], rows)
            found[:, :, k] = slopes @ each.transpose(1, 2)
    found = found.double()
    count = lin.columns.shape[1] - 1
    return torch.cat(
        [torch.einsum("bru,brkp->bukp", lin.chain, found[:, :count]), found[:, count:]], 1
    )
