"""The posterior density of learned galaxies, in coordinates that suit samplers.

Coordinates are those of the fit: centre, ln r and the flux of the nested Sérsic profile, angle
and latents; a prior on the half-light radius or the flux is felt through what these are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from galmorph._batchfit import BatchSetup
from galmorph._learnedfit import _LearnedProblem, _prior_parts, _Solver
from galmorph._target import _WIDE, Axis, Target, weak_prior
from galmorph.psf import PSF
from galmorph.rendering.learned_model import log_slopes, profile_of

__all__ = ["LearnedTarget"]

_FIRST = 5  # flux, x_0, y_0, r_50, theta


class LearnedTarget(Target):
    """The target for learned galaxies; arguments as for `GalaxyTarget`."""

    # their maps should stay in the cache
    window = 32

    def __init__(
        self,
        setup: BatchSetup,
        data: np.ndarray,
        inv_sigma: np.ndarray,
        psf: PSF | Sequence[PSF] | None,
        params: np.ndarray,
        *,
        noise: Any = None,
    ) -> None:
        super().__init__(setup, data, inv_sigma, noise)
        self._problem = _LearnedProblem(
            replace(setup, start=None), self.data, self.weight, self.templates, self.scale, None
        )
        # what is held or asked of the size and the flux is asked of the whole galaxy's
        problem = self._problem
        problem.exact_size = problem.walks_flux = problem.exact_size or problem.walks_flux
        self._exact = problem.exact_size
        own = torch.as_tensor(params, dtype=_WIDE, device=setup.device)
        self.template = own.clone() if self._exact else self._to_profile(own)
        solve = _Solver(problem, psf, self.shape)
        self._renderers: list[Any] = []
        self._group = torch.zeros(len(data), dtype=torch.long, device=setup.device)
        self._place = torch.zeros_like(self._group)
        every = torch.arange(len(data), device=setup.device)
        u = self._walk(self.template)
        for here, part in solve._parts(u, every):
            self._group[here] = len(self._renderers)
            self._place[here] = torch.arange(len(here), device=here.device)
            self._renderers.append(part.renderer)
        self.axes = self._make_axes()
        self._prior_of_z = _prior_parts(problem.network, self.scale.device)

    def _make_axes(self) -> list[Axis]:
        setup, axes, count = self.setup, [], 0
        kinds = {"flux": "flux", "r_50": "log", "theta": "angle"}
        free = [i for i, f in enumerate(setup.free) if f]
        for i in free:
            if i < _FIRST:
                name = setup.names[i]
                kind = kinds.get(name, "same")
                axes.append(Axis(kind, [count], [i], [weak_prior(setup, name, kind, self.shape)]))
                count += 1
        latents = [i for i in free if i >= _FIRST]
        if latents:
            where = list(range(count, count + len(latents)))
            axes.append(Axis("latent", where, latents, [None] * len(latents)))
        return axes

    # -- between the profile and the whole galaxy --------------------------------------

    def _to_profile(self, params: torch.Tensor) -> torch.Tensor:
        """Flux and radius of the nested profiles in place of the galaxies'."""
        _, _, light, radius = profile_of(self._problem.wide, params[:, _FIRST:])
        params = params.clone()
        params[:, 0] = params[:, 0] / light
        params[:, 3] = params[:, 3] / radius
        return params

    def to_galaxies(self, values: torch.Tensor) -> torch.Tensor:
        """Parameters (M, P + nb) of the galaxies, of what `to_params` gives."""
        if self._exact:
            return values
        last = self.template.shape[1]
        _, _, light, radius = profile_of(self._problem.wide, values[:, _FIRST:last])
        values = values.clone()
        values[:, 0] = values[:, 0] * light
        values[:, 3] = values[:, 3] * radius
        return values

    def of_galaxies(self, params: torch.Tensor) -> torch.Tensor:
        """The inverse: what `from_params` takes, of parameters (M, P)."""
        return params if self._exact else self._to_profile(params)

    def _walk(self, params: torch.Tensor) -> torch.Tensor:
        """Coordinates of the fit (M, U), of parameters (M, P)."""
        u = torch.cat([params[:, 1:3], torch.log(params[:, 3:4]), params[:, 4:]], 1)
        if self._exact:
            u = torch.cat([u, params[:, :1] / self.scale[:1]], 1)
        return u

    def other_starts(self, v: torch.Tensor, streams: Any) -> list[torch.Tensor]:
        """The opposite direction: many galaxies look nearly the same after half a turn."""
        angles = [c for axis in self.axes if axis.kind == "angle" for c in axis.coordinates]
        if not angles:
            return []
        turned = v.clone()
        turned[:, angles] += np.pi
        return [turned]

    # -- drawing -----------------------------------------------------------------------

    def _drawn(self, v: torch.Tensor, rows: torch.Tensor):
        params = self.to_params(v, rows)[:, : self.template.shape[1]]
        u = torch.cat([params[:, 1:3], torch.log(params[:, 3:4]), params[:, 4:]], 1)
        amplitude = params[:, 0] / self.scale[rows]
        if self._exact:
            light = profile_of(self._problem.wide, params[:, _FIRST:])[2]
            amplitude = amplitude / light
        geometry, z = self._problem.split(u)
        return params, u, amplitude, geometry, z

    def _groups(self, rows: torch.Tensor):
        group = self._group[rows]
        for k in group.unique().tolist():
            here = torch.nonzero(group == k)[:, 0]
            yield here, self._renderers[k].rows(self._place[rows[here]])

    def image(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        _, _, amplitude, geometry, z = self._drawn(u, rows)
        coefficients = self._problem.decoder.coefficients(z)
        drawn = self.data.new_empty((len(u), self.data.shape[1]))
        for here, renderer in self._groups(rows):
            drawn[here] = renderer.image(geometry.at(here), coefficients[here]).flatten(1)
        return amplitude.to(drawn.dtype)[:, None] * drawn

    def linearise(self, v: torch.Tensor, rows: torch.Tensor):
        params, u, amplitude, geometry, z = self._drawn(v, rows)
        coefficients, directions = self._problem.decoder.linearise(z)
        count = 7 + directions.shape[1]
        columns = self.data.new_empty((len(v), count, self.data.shape[1]))
        for here, renderer in self._groups(rows):
            own = directions if directions.shape[0] == 1 else directions[here]
            drawn = renderer.columns(geometry.at(here), coefficients[here], own)
            columns[here] = drawn.flatten(2)
        made = self._problem.assemble(u, geometry, columns)
        by_params = self._by_params(made, params, amplitude, rows)
        jacobian = self.params_jacobian(v, params, rows)
        made.amplitude = amplitude
        made.chain = by_params[0] @ jacobian
        made.amplitude_chain = (by_params[1][:, None] @ jacobian)[:, 0]
        return made

    def _by_params(self, made, params, amplitude, rows):
        """Derivatives of the columns (M, R, P) and of the amplitude (M, P) by the parameters."""
        size = params.shape[1]
        chain = params.new_zeros((len(params), made.chain.shape[1], size))
        chain[:, :, 1:3] = made.chain[:, :, :2]
        chain[:, :, 3] = made.chain[:, :, 2] / params[:, 3, None]
        chain[:, :, 4:] = made.chain[:, :, 3 : size - 1]
        by = torch.zeros_like(params)
        by[:, 0] = amplitude / params[:, 0].where(params[:, 0] != 0, 1.0)
        if self._exact:
            by[:, _FIRST:] = (
                -amplitude[:, None] * log_slopes(self._problem.wide, params[:, _FIRST:])[:, 2]
            )
        return chain, by

    def _latents(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, means, factors = self._prior_of_z
        free = torch.as_tensor(self.axes[-1].parameters) - _FIRST
        full = self.template[:1, _FIRST:].expand(len(z), -1).clone()
        full[:, free] = z
        offset = full[:, None] - means
        white = torch.linalg.solve_triangular(factors, offset[..., None], upper=False)[..., 0]
        log_det = torch.diagonal(factors, dim1=-2, dim2=-1).log().sum(-1)
        norm = 0.5 * full.shape[1] * np.log(2 * np.pi)
        each = torch.log_softmax(logits, 0) - log_det - norm - 0.5 * white.square().sum(-1)
        pull = torch.linalg.solve_triangular(
            factors.transpose(-1, -2), white[..., None], upper=True
        )[..., 0]
        slope = -torch.einsum("mk,mkd->md", torch.softmax(each, 1), pull)
        return torch.logsumexp(each, 1), slope[:, free]

    def _latents_from_unit(self, share: np.ndarray) -> np.ndarray:
        from scipy.special import ndtri

        logits, means, factors = self._prior_of_z
        if len(logits) > 1 or share.shape[1] != means.shape[1]:
            raise ValueError(
                "nested sampling needs a normal prior of the latents, all of them free"
            )
        return (means[0] + torch.as_tensor(ndtri(share)) @ factors[0].T).numpy()
