"""The posterior density of a batch of galaxies, in coordinates in which samplers walk.

Positions are walked as they are, radii and indices by their logarithm, a flux by asinh (its
logarithm, where it is not zero within the noise), and an ellipticity and its angle as the vector
ellip^(1/p) (cos 2 theta, sin 2 theta).  For galaxies that are clearly elongated p is 1, and the
posterior nearly normal; for those that may be round it is 2: a prior that is uniform in both
is then uniform on a disc, without its spike at the middle.  All priors are proper, so that the
density integrates to the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from galmorph._batchfit import (
    BatchSetup,
    _GalaxyProblem,
    _limits,
    _renderer,
    background_templates,
)
from galmorph._posterior import wrap_axis
from galmorph.inference.least_squares import Linearisation
from galmorph.noise import GaussianNoise
from galmorph.priors import LogUniform, Prior, Truncated, Uniform
from galmorph.psf import PSF
from galmorph.rendering.parameters import MAX_ELLIP, raw_jacobian

__all__ = ["GalaxyTarget", "Target"]

_WIDE = torch.float64
# starts of the search for other modes, where a model has several components
_STARTS = 5
# galaxies that are drawn at once
_WINDOW = 96
# range of a background term in units of the noise of a pixel, over which it is equally likely
_BACKGROUND_RANGE = 200.0
# a flux may be so many times what is seen, or what the noise alone may bring
_FLUX_RANGE = 10.0
# flux at which asinh turns from a line to a logarithm, in units of the noise of the whole stamp
_SOFT = 0.2
# widths that nothing falls short of: what the data leave open, the prior closes
_WIDEST = {"flux": 3.0, "log": 1.0, "disc": 0.45, "position": 5.0, "angle": 1.8, "latent": 1.0}


@dataclass
class Axis:
    """Some coordinates, the parameters that they make, and their prior.

    Attributes
    ----------
    kind : {"same", "log", "disc", "angle", "latent", "flux"}
    coordinates, parameters : list of int
    priors : list of Prior or None
        One for each parameter; None is flat (and its density is with the target).
    """

    kind: str
    coordinates: list[int]
    parameters: list[int]
    priors: list[Prior | None]


def weak_prior(setup: BatchSetup, name: str, kind: str, shape: tuple[int, int]) -> Prior | None:
    """What a sampler takes for granted of a parameter of which nothing is said.

    Parameters
    ----------
    setup : BatchSetup
    name : str
    kind : str
        Of its axis.
    shape : tuple of int
        (ny, nx) of the stamps.

    Returns
    -------
    Prior or None
        None for the flux, whose range the data say.
    """
    low, high = _limits(setup.bounds[name])
    given = setup.priors.get(name)
    if given is not None:
        inside = low <= given.support[0] and high >= given.support[1]
        return given if inside else Truncated(given, low, high)
    if kind == "flux":
        return None
    if name in ("x_0", "y_0"):
        side = shape[1] if name == "x_0" else shape[0]
        return Uniform(max(low, -0.5), min(high, side - 0.5))
    if kind == "log":
        return LogUniform(max(low, 0.02), min(high, 2.0 * max(shape)))
    if kind in ("disc", "same") and name.startswith("ellip"):
        return Uniform(max(low, -MAX_ELLIP), min(high, MAX_ELLIP))
    if name.startswith("theta"):
        turn = np.pi if kind == "angle" else 0.5 * np.pi
        return Uniform(max(low, -turn), min(high, turn))
    return Uniform(low, high)


class Target:
    """Log-posterior of a batch of galaxies; a subclass draws them.

    Attributes
    ----------
    size : int
        Coordinates of a galaxy: its free parameters, the flux among them, then the background.
    axes : list of Axis
    """

    axes: list[Axis]

    def __init__(
        self,
        setup: BatchSetup,
        data: np.ndarray,
        inv_sigma: np.ndarray,
        noise: Any = None,
    ) -> None:
        self.setup, self.shape = setup, data.shape[1:]
        self._power: dict[int, torch.Tensor] = {}
        self.noise = GaussianNoise() if noise is None else noise
        device, dtype = setup.device, setup.dtype
        best = inv_sigma.reshape(len(data), -1).max(1)
        self.scale = torch.as_tensor(1.0 / best, dtype=_WIDE, device=device)
        self._data = torch.as_tensor(data * best[:, None, None], dtype=dtype, device=device)
        self._weight = torch.as_tensor(inv_sigma / best[:, None, None], dtype=dtype, device=device)
        self.data, self.weight = self._data.flatten(1), self._weight.flatten(1)
        templates = background_templates(setup.background, self.shape)
        self.templates = torch.as_tensor(templates, dtype=dtype, device=device).flatten(1)
        self._plain = type(self.noise) is GaussianNoise and repr(self.noise) == "GaussianNoise()"
        self._constants(data, inv_sigma)

    def _constants(self, data: np.ndarray, inv_sigma: np.ndarray) -> None:
        """Range of the flux in each stamp, and where asinh turns; in units of the noise, (B,)."""
        used = inv_sigma > 0
        variance = np.where(used, 1.0 / np.where(used, inv_sigma, 1.0) ** 2, 0.0).sum((1, 2))
        seen = np.abs(np.where(used, data, 0.0).sum((1, 2)))
        widest = _FLUX_RANGE * np.maximum(seen, 10.0 * np.sqrt(variance))
        self._widest, self._soft = (
            torch.as_tensor(a, dtype=_WIDE, device=self.scale.device) / self.scale
            for a in (widest, _SOFT * np.sqrt(variance))
        )

    def __len__(self) -> int:
        return len(self.data)

    # -- what a subclass says ----------------------------------------------------------

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        """Unit images and derivatives; ``amplitude`` and its chain are set."""
        raise NotImplementedError

    def image(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Images of galaxies (b, npix), without background, in units of the noise."""
        raise NotImplementedError

    # -- parameters --------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Coordinates of a galaxy."""
        return self.walked + len(self.templates)

    @property
    def walked(self) -> int:
        """Coordinates without the background."""
        return sum(len(axis.coordinates) for axis in self.axes)

    def to_params(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Parameters and background (M, P + nb), in units of the data, of coordinates (M, D)."""
        params = self.template[rows].clone()
        for axis in self.axes:
            value = v[:, axis.coordinates]
            if axis.kind == "log":
                value = torch.exp(value)
            elif axis.kind == "flux":
                value = torch.sinh(value) * (self._soft * self.scale)[rows, None]
            elif axis.kind == "disc":
                power = self._powers(axis)[rows]
                ellip = (value.square().sum(1) ** (0.5 * power)).clamp_max(MAX_ELLIP)
                theta = 0.5 * torch.atan2(value[:, 1], value[:, 0])
                value = torch.stack([ellip, theta], 1)
            params[:, axis.parameters] = value
        if self.setup.coordinates.tie is not None:
            params = self.setup.coordinates.tie(params)
        background = v[:, self.walked :] * self.scale[rows, None]
        return torch.cat([params, background], 1)

    def from_params(
        self, params: torch.Tensor, background: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Coordinates (M, D) of parameters (M, P) and backgrounds (M, nb) of galaxies (all)."""
        rows = torch.arange(len(params), device=params.device) if rows is None else rows
        unit = (self._soft * self.scale)[rows, None]
        v = params.new_empty((len(params), self.size))
        for axis in self.axes:
            value = params[:, axis.parameters]
            if axis.kind == "log":
                value = torch.log(value.clamp_min(1e-3))
            elif axis.kind == "flux":
                value = torch.asinh(value / unit)
            elif axis.kind == "disc":
                root = value[:, 0].clamp(0.0, MAX_ELLIP) ** (1.0 / self._powers(axis)[rows])
                twice = 2 * value[:, 1]
                value = torch.stack([root * torch.cos(twice), root * torch.sin(twice)], 1)
            v[:, axis.coordinates] = value
        v[:, self.walked :] = background / self.scale[rows, None]
        return v

    def log_stretch(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """ln of the volume of the parameters over that of the coordinates (M, D): (M,)."""
        total = len(self.templates) * torch.log(self.scale[rows])
        for axis in self.axes:
            own = v[:, axis.coordinates]
            if axis.kind == "disc":
                total = total + self._disc_stretch(axis, own, rows)
            if axis.kind == "log":
                total = total + own.sum(1)
            elif axis.kind == "flux":
                unit = (self._soft * self.scale)[rows]
                total = total + torch.log(torch.cosh(own[:, 0]) * unit)
        return total

    def from_unit(self, share: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates (M, D) of points (M, D) of the unit cube, through the prior."""
        share = np.clip(np.asarray(share, dtype=float), 1e-12, 1 - 1e-12)
        v = np.empty_like(share)
        for axis in self.axes:
            own = share[:, axis.coordinates]
            if axis.kind == "latent":
                v[:, axis.coordinates] = self._latents_from_unit(own)
                continue
            if axis.kind == "flux" and axis.priors[0] is None:
                ratio = (self._widest / self._soft)[rows].cpu().numpy()[:, None]
                v[:, axis.coordinates] = np.arcsinh(ratio * (2 * own - 1))
                continue
            values = [p.ppf(own[:, i]) for i, p in enumerate(axis.priors)]
            if axis.kind == "disc":
                power = self._powers(axis)[rows].cpu().numpy()
                root = np.clip(values[0], 0, None) ** (1.0 / power)
                own = np.stack([root * np.cos(2 * values[1]), root * np.sin(2 * values[1])], 1)
            else:
                own = values[0][:, None]
                if axis.kind == "log":
                    own = np.log(own)
                elif axis.kind == "flux":
                    own = np.arcsinh(own / (self._soft * self.scale)[rows].cpu().numpy()[:, None])
            v[:, axis.coordinates] = own
        v[:, self.walked :] = _BACKGROUND_RANGE * (share[:, self.walked :] - 0.5)
        return torch.as_tensor(v, device=self.scale.device)

    def _latents_from_unit(self, share: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def params_jacobian(
        self, v: torch.Tensor, params: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Derivative of the parameters by the walked coordinates, (M, P, walked)."""
        jacobian = v.new_zeros((len(v), self.template.shape[1], self.walked))
        for axis in self.axes:
            if axis.kind == "disc":
                (e, t), (c1, c2) = axis.parameters, axis.coordinates
                s1, s2 = v[:, c1], v[:, c2]
                square = (s1 * s1 + s2 * s2).clamp_min(1e-10)
                twice, power = 2 * square, self._powers(axis)[rows]
                rise = power * square ** (0.5 * power - 1)
                jacobian[:, e, c1], jacobian[:, e, c2] = rise * s1, rise * s2
                jacobian[:, t, c1], jacobian[:, t, c2] = -s2 / twice, s1 / twice
                continue
            for p, c in zip(axis.parameters, axis.coordinates, strict=True):
                if axis.kind == "log":
                    jacobian[:, p, c] = params[:, p]
                elif axis.kind == "flux":
                    jacobian[:, p, c] = torch.cosh(v[:, c]) * (self._soft * self.scale)[rows]
                else:
                    jacobian[:, p, c] = 1.0
        if self.setup.coordinates.tie is not None:
            jacobian = self.setup.coordinates._through_tie(jacobian, params)
        return jacobian

    def _powers(self, axis: Axis) -> torch.Tensor:
        """Of each galaxy: ellip is the length of the vector to this power, (B,)."""
        if axis.coordinates[0] not in self._power:
            self._power[axis.coordinates[0]] = torch.full_like(self.scale, 2.0)
        return self._power[axis.coordinates[0]]

    def _disc_stretch(self, axis: Axis, own: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """ln of the area in (ellip, theta) over that in the coordinates, (M,)."""
        power = self._powers(axis)[rows]
        square = own.square().sum(1).clamp_min(1e-30)
        return torch.log(0.5 * power) + (0.5 * power - 1) * torch.log(square)

    def settle(self, params: torch.Tensor, background: torch.Tensor) -> None:
        """Choose the coordinates of ellipticities by what the pixels say near ``params``."""
        discs = [axis for axis in self.axes if axis.kind == "disc"]
        for axis in discs:
            self._power[axis.coordinates[0]] = torch.ones_like(self.scale)
        if not discs:
            return
        v = self.from_params(params, background)
        hessian = self.curvature(v)
        for axis in discs:
            own = v[:, axis.coordinates]
            told = hessian[:, axis.coordinates][:, :, axis.coordinates]
            # ellipticity in units of what the pixels leave open
            clear = (own[:, None] @ told @ own[..., None])[:, 0, 0]
            self._power[axis.coordinates[0]] = 1.0 + torch.exp(-clear / 8.0)

    # -- the density -------------------------------------------------------------------

    def log_prior(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Density of the coordinates by the prior, (M,)."""
        return self._prior(v, rows, slopes=False)[0]

    def _prior(self, v, rows, *, slopes=True):
        widest, soft = self._widest[rows], self._soft[rows]
        total = -len(self.templates) * np.log(_BACKGROUND_RANGE) * torch.ones_like(widest)
        by = torch.zeros_like(v)
        values = self.to_params(v, rows) if any(self._needs_value(a) for a in self.axes) else None
        for axis in self.axes:
            own = v[:, axis.coordinates]
            if axis.kind == "flux" and axis.priors[0] is None:
                x = own[:, 0]
                inside = torch.sinh(x).abs() * soft <= widest
                stretch = torch.log(soft * torch.cosh(x) / (2 * widest))
                total = total + torch.where(inside, stretch, -torch.inf)
                by[:, axis.coordinates] = torch.tanh(own)
            elif axis.kind == "latent":
                density, slope = self._latents(own)
                total = total + density
                by[:, axis.coordinates] = slope
            elif not self._needs_value(axis):
                total = total + self._flat(axis, own, rows)
                if axis.kind == "disc":
                    by[:, axis.coordinates] = self._disc_slope(axis, own, rows)
            else:
                density, slope = self._shaped(axis, own, values, rows, slopes)
                total = total + density
                if slopes:
                    by[:, axis.coordinates] = slope
        return total, by

    def _latents(self, z):
        raise NotImplementedError

    @staticmethod
    def _needs_value(axis: Axis) -> bool:
        """Whether the density in the coordinates is not flat."""
        if axis.kind == "latent" or axis.priors[0] is None:
            return False
        flat = LogUniform if axis.kind == "log" else Uniform
        return not all(isinstance(p, flat) for p in axis.priors)

    def _disc_slope(self, axis: Axis, own: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        power = self._powers(axis)[rows, None]
        return (power - 2) * own / own.square().sum(1, keepdim=True).clamp_min(1e-10)

    def _flat(self, axis: Axis, own: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if axis.kind == "disc":
            ellip, theta = axis.priors
            low, high = ellip.support
            value = own.square().sum(1) ** (0.5 * self._powers(axis)[rows])
            log_density = self._disc_stretch(axis, own, rows)
            log_density = log_density - np.log((high - low) * (theta.high - theta.low))
            inside = (value >= low) & (value <= high)
            return torch.where(inside, log_density, -torch.inf)
        (prior,) = axis.priors
        low, high = prior.support
        if axis.kind == "log":
            low, high = np.log(low), np.log(high)
        if axis.kind == "angle":  # as many turns as it likes
            return own.new_full((len(own),), -np.log(high - low))
        inside = (own[:, 0] >= low) & (own[:, 0] <= high)
        return torch.where(inside, -np.log(high - low), -torch.inf)

    def _shaped(self, axis, own, values, rows, slopes):
        """Density and slope of an axis whose prior is not flat in its coordinates."""
        p = [values[:, i].cpu().numpy() for i in axis.parameters]
        if axis.kind == "disc":  # an axis: half a turn is nothing
            middle = getattr(axis.priors[1], "mean", 0.0)
            p[1] = middle + wrap_axis(torch.as_tensor(p[1] - middle)).numpy()
        density = sum(prior.log_prob(x) for prior, x in zip(axis.priors, p, strict=True))
        density = torch.as_tensor(density).to(own)
        if axis.kind == "log":
            density = density + own[:, 0]
        elif axis.kind == "flux":
            stretch = torch.cosh(own[:, 0]) * (self._soft * self.scale)[rows]
            density = density + torch.log(stretch)
        elif axis.kind == "disc":
            density = density + self._disc_stretch(axis, own, rows)
        if not slopes:
            return density, None
        slope = [
            torch.as_tensor(np.broadcast_to(prior.slope(x), x.shape).copy()).to(own)
            for prior, x in zip(axis.priors, p, strict=True)
        ]
        if axis.kind == "disc":
            s1, s2 = own.unbind(1)
            square = own.square().sum(1).clamp_min(1e-10)
            power = self._powers(axis)[rows]
            rise = power * square ** (0.5 * power - 1)
            by_ellip, by_theta = slope
            by_s1 = rise * s1 * by_ellip - s2 / (2 * square) * by_theta
            by_s2 = rise * s2 * by_ellip + s1 / (2 * square) * by_theta
            by = torch.stack([by_s1, by_s2], 1)
            return density, by + self._disc_slope(axis, own, rows)
        if axis.kind == "log":
            return density, (slope[0] * torch.as_tensor(p[0]).to(own) + 1.0)[:, None]
        if axis.kind == "flux":
            return density, (slope[0] * stretch + torch.tanh(own[:, 0]))[:, None]
        return density, slope[0][:, None]

    def log_likelihood(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of the used pixels, in the unit of the data, (M,)."""
        parts = [
            self._likelihood(v[some], rows[some])
            for some in torch.arange(len(v), device=v.device).split(self.window)
        ]
        return torch.cat(parts)

    window = _WINDOW

    def _likelihood(self, v, rows):
        model = self._with_background(self.image(v, rows), v)
        return self._log_prob_of(model, rows)

    def _with_background(self, image, v):
        if not len(self.templates):
            return image
        return torch.addmm(image, v[:, self.walked :].to(image.dtype), self.templates)

    def _log_prob_of(self, model, rows):
        """Log-likelihood (M,) of images (M, npix) in units of the noise."""
        weight, data = self.weight[rows], self.data[rows]
        if self._plain:
            rest = (data - model) * weight
            return self._normalisation[rows] - 0.5 * rest.square().sum(1, dtype=_WIDE)
        if self.noise.correlated:
            white = self._whitening(rows)(((data - model) * weight).unflatten(1, self.shape))
            value = self._normalisation[rows] + self._white_log.to(self.scale)[rows]
            return value - 0.5 * white.square().sum((1, 2), dtype=_WIDE)
        return self._map(model, data, weight, rows).sum((1, 2), dtype=_WIDE)

    def _map(self, model, data, weight, rows):
        """Log-likelihood of each pixel under any noise."""
        scale = self.scale[rows].to(model.dtype)[:, None, None]
        shape = (-1, *self.shape)
        data, model = data.view(shape) * scale, model.view(shape) * scale
        return self._noise_of(rows).log_prob(data, model, weight.view(shape) / scale)

    def _noise_of(self, rows: torch.Tensor) -> Any:
        return self.noise.rows(rows.cpu().numpy())

    def _whitening(self, rows: torch.Tensor) -> Any:
        if not hasattr(self, "_all_white"):
            self._all_white = self.noise.whitening((self._weight > 0).double().cpu().numpy())
            self._white_log = torch.as_tensor(self._all_white.log_det.sum((1, 2)))
        return self._all_white.rows(rows.cpu().numpy())

    @property
    def _normalisation(self) -> torch.Tensor:
        """Log-likelihood of a perfect fit, (B,)."""
        if not hasattr(self, "_perfect"):
            used = self.weight > 0
            log_weight = torch.log(torch.where(used, self.weight, 1.0)).sum(1, dtype=_WIDE)
            count = used.sum(1)
            self._perfect = log_weight - count * (0.5 * np.log(2 * np.pi) + torch.log(self.scale))
        return self._perfect

    def log_prob(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-posterior, not normalised, of coordinates (M, D) of galaxies ``rows`` (M,)."""
        result = self.log_prior(v, rows)
        inside = torch.nonzero(torch.isfinite(result))[:, 0]
        if len(inside):
            result[inside] += self.log_likelihood(v[inside], rows[inside])
        return torch.nan_to_num(result, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

    def log_prob_and_slope(
        self, v: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-posterior (M,) and its derivative (M, D)."""
        total, by = self._prior(v, rows)
        inside = torch.nonzero(torch.isfinite(total))[:, 0]
        for part in inside.split(self.window) if len(inside) else ():
            value, slope = self._likelihood_and_slope(v[part], rows[part])
            total[part] += value
            by[part] += slope
        bad = ~(torch.isfinite(total) & torch.isfinite(by).all(1))
        total[bad], by[bad] = -torch.inf, 0.0
        return total, by

    def _likelihood_and_slope(self, v, rows):
        return self._of_linearised(self.linearise(v, rows), v, rows)

    def _of_linearised(self, lin: Linearisation, v, rows):
        """Log-likelihood (M,) and its derivative (M, D), of images and columns."""
        amplitude = lin.amplitude.to(lin.columns.dtype)
        model = self._with_background(amplitude[:, None] * lin.columns[:, 0], v)
        if self._plain:
            weight = self.weight[rows]
            rest = (self.data[rows] - model) * weight
            value = self._normalisation[rows] - 0.5 * rest.square().sum(1, dtype=_WIDE)
            score = rest * weight
        else:
            with torch.enable_grad():
                model = model.detach().requires_grad_()
                value = self._log_prob_of(model, rows)
                (score,) = torch.autograd.grad(value.sum(), model)
            value = value.detach()
        pull = (score[:, None] @ lin.columns.transpose(1, 2))[:, 0].to(_WIDE)
        walked = self.walked
        slope = torch.zeros_like(v)
        raw = (pull[:, None, 1:] @ lin.chain.to(_WIDE))[:, 0] * lin.amplitude[:, None]
        slope[:, :walked] = raw + lin.amplitude_chain * pull[:, :1]
        slope[:, walked:] = (score @ self.templates.T).to(_WIDE)
        return value, slope

    # -- what the pixels tell, one by one ----------------------------------------------

    def model_at(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Images (M, npix) with their background, in units of the noise."""
        return self._with_background(self.image(v, rows), v)

    def expanded(
        self, v: torch.Tensor, rows: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-posterior, and the residuals that most of it is a sum of squares of.

        Parameters
        ----------
        v : tensor, shape (M, D)
            At most as many as `window`.
        rows : tensor of int, shape (M,)
        reference : tensor, shape (M, npix)
            Images by which pixels are weighted, where the noise depends on the model.

        Returns
        -------
        log_prob : tensor, shape (M,)
        slope : tensor, shape (M, D)
        residuals : tensor, shape (M, npix)
            In units of the noise.
        by : tensor, shape (M, D, npix)
            Derivatives of the residuals.
        """
        total, slope = self._prior(v, rows)
        lin = self.linearise(v, rows)
        value, by_pixels = self._of_linearised(lin, v, rows)
        images, chain = self._images_and_chain(lin, v)
        model = lin.amplitude.to(images.dtype)[:, None] * lin.columns[:, 0]
        rest = self.data[rows] - self._with_background(model, v)
        rest = self._weighted(rest[:, None], reference, rows)[:, 0]
        images = self._weighted(images, reference, rows)
        by = -(chain.to(images.dtype).transpose(1, 2) @ images)
        return total + value, slope + by_pixels, rest, by

    def _images_and_chain(self, lin: Linearisation, v) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (M, R, npix), and how these go with the coordinates, (M, R, D)."""
        nb, walked = len(self.templates), self.walked
        images = lin.columns
        if nb:
            images = torch.cat([images, self.templates.expand(len(v), -1, -1)], 1)
        chain = v.new_zeros((len(v), images.shape[1], walked + nb))
        n_raw = lin.columns.shape[1] - 1
        chain[:, 1 : 1 + n_raw, :walked] = lin.amplitude[:, None, None] * lin.chain
        chain[:, 0, :walked] = lin.amplitude_chain
        for i in range(nb):
            chain[:, 1 + n_raw + i, walked + i] = 1.0
        return images, chain

    # -- a normal distribution to start from -------------------------------------------

    def other_starts(self, v: torch.Tensor, streams: Any) -> list[torch.Tensor]:
        """Coordinates (B, D) from which other modes than that at ``v`` (B, D) may be reached."""
        return []

    def curvature(self, v: torch.Tensor) -> torch.Tensor:
        """Curvature of -ln(posterior) at coordinates (B, D) of all galaxies, (B, D, D).

        That of Gauss and Newton, with what keeps it positive where the data say nothing.
        """
        parts = []
        for rows in torch.arange(len(v), device=v.device).split(self.window):
            parts.append(self._curvature(v[rows], rows))
        return torch.cat(parts)

    def _curvature(self, v, rows):
        lin = self.linearise(v, rows)
        images, chain = self._images_and_chain(lin, v)
        model = lin.amplitude.to(images.dtype)[:, None] * lin.columns[:, 0]
        images = self._weighted(images, self._with_background(model, v), rows)
        gram = (images @ images.transpose(1, 2)).to(_WIDE)
        hessian = chain.transpose(1, 2) @ gram @ chain
        return self._closed(hessian, v, rows)

    def _weighted(self, images, model, rows):
        """Images times the root of what each pixel tells."""
        weight = self.weight[rows]
        if self._plain:
            return images * weight[:, None]
        if self.noise.correlated:
            whiten = self._whitening(rows)
            return whiten((images * weight[:, None]).unflatten(2, self.shape)).flatten(2)
        scale = self.scale[rows].cpu().numpy()[:, None, None]
        shape = (-1, *self.shape)
        arrays = [a.view(shape).double().cpu().numpy() for a in (self.data[rows], model, weight)]
        noise = self._noise_of(rows)
        _, inv_sigma = noise.working(arrays[0] * scale, arrays[1] * scale, arrays[2] / scale)
        told = torch.as_tensor(inv_sigma * scale).to(images).flatten(1)
        images = images * told[:, None]
        return images

    def _closed(self, hessian: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Add the curvature of the prior, or of the widest that a coordinate may be."""
        hessian = hessian.clone()
        for axis in self.axes:
            width = _WIDEST.get(axis.kind, _WIDEST["position"])
            if axis.kind == "same" and axis.priors[0] is not None:
                low, high = axis.priors[0].support
                width = min(width, 0.3 * (high - low)) if np.isfinite(high - low) else width
            for c in axis.coordinates:
                hessian[:, c, c] += width**-2
            for prior, c in zip(axis.priors, axis.coordinates, strict=False):
                spread = getattr(prior, "prior", prior)
                if axis.kind == "log" and hasattr(spread, "sigma"):
                    hessian[:, c, c] += spread.sigma**-2
                elif axis.kind == "same" and hasattr(spread, "std"):
                    hessian[:, c, c] += spread.std**-2
            if axis.kind == "disc":  # ellip goes with a power of these, and is flat at zero
                c1, c2 = axis.coordinates
                s2 = v[:, [c1, c2]].square().sum(1).clamp_min(1e-4)
                along = (hessian[:, c1, c1] + hessian[:, c2, c2] - 2 * width**-2).clamp_min(0)
                rest = torch.sqrt(along / (4 * s2))
                near = torch.exp(-0.5 * (s2 * rest)) * (self._powers(axis) - 1)[rows]
                for c in (c1, c2):
                    hessian[:, c, c] += near * rest
        return hessian


class GalaxyTarget(Target):
    """The target for models that are made of elliptical profiles."""

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
        self.template = torch.as_tensor(params, dtype=_WIDE, device=setup.device).clone()
        self.axes = self._make_axes()
        psfs = [psf] if isinstance(psf, PSF) else list(psf or [])
        shift = torch.full((len(data),), 4.0, dtype=_WIDE, device=setup.device)
        self._problem = _GalaxyProblem(
            replace(setup, start=None),
            self.data,
            self.weight,
            self.templates,
            self.template,
            self.scale,
            self.shape,
            _renderer(psfs, self.shape, self.template, shift, setup, reach=0.3),
        )
        if psfs:
            wide = torch.nonzero(self._elongated())[:, 0]
            if len(wide):
                own = psfs if len(psfs) == 1 else [psfs[i] for i in wide.tolist()]
                self._problem.wide_renderer = _renderer(
                    own, self.shape, self.template, shift, setup, reach=0.9
                )
                self._problem.wide_row[wide] = torch.arange(len(wide), device=wide.device)

    def _elongated(self) -> torch.Tensor:
        from galmorph._batchfit import needs_wider_box

        return needs_wider_box(
            self.setup, self.template, self.template[:, 0] / self.scale, self.shape
        )

    def _make_axes(self) -> list[Axis]:
        setup = self.setup
        at = {name: i for i, name in enumerate(setup.names)}
        axes: list[Axis] = []
        taken: set[str] = set()
        count = 0

        def add(kind: str, names: list[str], size: int) -> None:
            nonlocal count
            priors = [weak_prior(setup, n, kind, self.shape) for n in names]
            where = list(range(count, count + size))
            axes.append(Axis(kind, where, [at[n] for n in names], priors))
            taken.update(names)
            count += size

        free = {n for n, f in zip(setup.names, setup.free, strict=True) if f}
        logarithmic = {e.r for e in setup.ellipses} | {e.n for e in setup.ellipses}
        for e in setup.ellipses:
            pair = [e.ellip, e.theta]
            if e.r is None or not free.issuperset(pair) or taken & set(pair):
                continue
            low = setup.bounds[e.ellip][0]
            if low is not None and low >= 0 and setup.bounds[e.theta] == (None, None):
                add("disc", pair, 2)
        for name in setup.names:
            if name in free and name not in taken:
                kind = "flux" if name == "flux" else "log" if name in logarithmic else "same"
                add(kind, [name], 1)
        return axes

    def other_starts(self, v: torch.Tensor, streams: Any) -> list[torch.Tensor]:
        """Other sizes and shapes, if there are several components: these may change places."""
        if len(self.setup.ellipses) < 2:
            return []
        rows = torch.arange(len(v), device=v.device)
        keep = [
            c
            for axis in self.axes
            if axis.kind == "flux" or self.setup.names[axis.parameters[0]] in ("x_0", "y_0")
            for c in axis.coordinates
        ] + list(range(self.walked, self.size))
        found = []
        for _ in range(_STARTS):
            share = streams.uniform(rows, self.size).numpy()
            start = self.from_unit(share, rows)
            start[:, keep] = v[:, keep]
            found.append(start)
        return found

    def image(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        params = self.to_params(u, rows)[:, : self.template.shape[1]]
        amplitude = (params[:, 0] / self.scale[rows]).to(self.data.dtype)
        if self._problem.renderer is None:
            columns = self._problem._pixel_columns(params, derivatives=False)
        else:
            columns = self._problem._draw(params.to(self.data.dtype), rows, derivatives=False)
        return amplitude[:, None] * columns[:, 0]

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        params = self.to_params(u, rows)[:, : self.template.shape[1]]
        jacobian = self.params_jacobian(u, params, rows)
        if self._problem.renderer is None:
            columns = self._problem._pixel_columns(params)
            chain = jacobian[:, 1:]
        else:
            columns = self._problem._draw(params.to(self.data.dtype), rows)
            chain = raw_jacobian(self.setup.ellipses, self.setup.names, params) @ jacobian
        return Linearisation(
            columns=columns,
            chain=chain,
            amplitude=params[:, 0] / self.scale[rows],
            amplitude_chain=jacobian[:, 0] / self.scale[rows][:, None],
        )
