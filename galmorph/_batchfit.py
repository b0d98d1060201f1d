"""Fitting a batch of stamps with one model, in torch: what `MAPFitter` does behind its face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galmorph._guess import Guess, WindowTemplates, first_guess, window_widths
from galmorph._posterior import posterior_covariance, wrap_axis
from galmorph.inference.least_squares import (
    LeastSquaresResult,
    Linearisation,
    levenberg_marquardt,
)
from galmorph.priors import Prior, Uniform
from galmorph.psf import PSF
from galmorph.rendering.evaluate import pixel_images
from galmorph.rendering.fourier import FourierRenderer
from galmorph.rendering.parameters import Coordinates, Ellipse, components
from galmorph.rendering.sersic import sersic_table
from galmorph.rendering.transfer import make_transfer

if TYPE_CHECKING:
    from galmorph.models.base import GalaxyModel

__all__ = [
    "BatchSetup",
    "background_templates",
    "engine_of",
    "fit_batch",
    "one_thread",
    "window_templates",
]

_WIDE = torch.float64
# -ln(axis ratio) below which an ellipse is drawn as if it were this
_ROUND = 1e-3
# width of the prior of a radius below which it is walked itself, so that it is felt exactly
_TIGHT = 0.1
# largest ellipticity from which a bound is felt
_THIN = 0.95


@dataclass(frozen=True)
class _Moved:
    """The prior of a position, for positions that count from elsewhere."""

    prior: Prior
    shift: float

    @property
    def support(self) -> tuple[float, float]:
        low, high = self.prior.support
        return low - self.shift, high - self.shift

    def residual(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.prior.residual(value + self.shift)


@dataclass
class BatchSetup:
    """What is the same for all stamps of a batch.

    Attributes
    ----------
    model : GalaxyModel
        Template: which parameters are free, tied and bounded, and the values of fixed ones.
    priors : mapping of str to Prior
    background : {"none", "constant", "tilted"}
    device, dtype : torch device and dtype of the rendering
    window : int
        How many galaxies are worked on at once.
    max_iter : int
    tolerance : float
        Change of chi-square that ends a fit, if it is larger than what does otherwise.
    max_shift : float or None
        How far the centre may go from the first guess, in pixels.
    start : array, shape (B, P), or None
        Where to start, instead of guessing.
    correlation : CorrelatedNoise or None
        What ties the noise of neighbouring pixels.
    origin : tuple of float
        (x, y) of the first pixel in the coordinates of the bounds of the model and of priors.
    """

    model: GalaxyModel
    priors: Mapping[str, Prior] = field(default_factory=dict)
    background: str = "none"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    window: int = 96
    max_iter: int = 60
    tolerance: float = 0.0
    max_shift: float | None = None
    start: np.ndarray | None = None
    correlation: Any = None
    origin: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        model = self.model
        self.names = tuple(model.param_names)
        self.ellipses: Sequence[Ellipse] = model.ellipses()
        self.tied = [n for n in self.names if model.tied[n]]
        if self.tied and not self.ellipses:
            raise ValueError(
                f"MAPFitter does not tie the parameters of {type(model).__name__}; "
                "astropy's fitters do"
            )
        round_ones = {  # a circle has no angle
            e.theta
            for e in self.ellipses
            if e.r is not None and model.fixed[e.ellip] and np.all(getattr(model, e.ellip) == 0)
        }
        self.free = [not (model.fixed[n] or model.tied[n] or n in round_ones) for n in self.names]
        default = model.default_bounds()
        self.bounds = {n: tuple(model.bounds[n]) for n in self.names}
        for n, prior in self.priors.items():
            if np.isfinite(prior.support).all():  # felt as bounds
                low, high = _limits(self.bounds[n])
                self.bounds[n] = (max(low, prior.support[0]), min(high, prior.support[1]))
        native = {n for n in self.names if self.bounds[n] != default[n]}
        native |= set(self.priors) | {n for n in self.names if not self.free[self.names.index(n)]}
        native |= self._touched_by_ties()
        native -= self._felt_by_projection(native)
        linear = "flux" not in native
        for name, shift in zip(("x_0", "y_0"), self.origin, strict=True):
            self.bounds[name] = tuple(b if b is None else b - shift for b in self.bounds[name])
            if shift and name in self.priors:
                self.priors = {**self.priors, name: _Moved(self.priors[name], shift)}
        self.coordinates = Coordinates(
            ellipses=self.ellipses,
            names=self.names,
            free=self.free,
            native=native,
            linear_flux=linear,
            tie=self._tie if self.tied else None,
        )

    def _felt_by_projection(self, native: set[str]) -> set[str]:
        """Radii with a soft prior, ellipticities that only end sooner, and angles that may be any.

        These need no walk of their own.  Walked in ellip and theta themselves, fits that begin
        at the wrong angle end at ellip 0.
        """
        felt: set[str] = set()
        default = self.model.default_bounds()
        for e in self.ellipses:
            if e.r is None or not {e.r, e.ellip, e.theta} & native:
                continue
            if e.r in native and (
                self.bounds[e.r] != default[e.r]
                or not self.free[self.names.index(e.r)]
                or _relative_width(self.priors.get(e.r)) < _TIGHT
            ):
                continue
            low = self.bounds[e.ellip][0]
            plain = low is not None and low <= 0 and not self.model.bounds[e.ellip][0]
            plain &= isinstance(self.priors.get(e.ellip), Uniform | None)
            turn = self.priors.get(e.theta)
            whole = turn is None or (
                isinstance(turn, Uniform) and turn.high - turn.low >= np.pi - 1e-6
            )
            whole &= tuple(self.model.bounds[e.theta]) == (None, None)
            loose = self.free[self.names.index(e.ellip)] and self.free[self.names.index(e.theta)]
            if plain and whole and loose and not self.tied:
                felt |= {e.r, e.ellip, e.theta}
                if turn is not None:
                    self.bounds[e.theta] = (None, None)
        return felt

    def _touched_by_ties(self) -> set[str]:
        """Tied parameters and those that they hang on, found by changing one after another."""
        if not self.tied:
            return set()
        own = np.array([float(np.ravel(getattr(self.model, n).value)[0]) for n in self.names])
        rows = np.vstack([own, own + np.diag(0.01 * np.abs(own) + 0.003)])
        result = self._tie(torch.as_tensor(rows)).numpy()
        at = [self.names.index(n) for n in self.tied]
        moved = (np.abs(result[1:, at] - result[0, at]) > 1e-12).any(1)
        return set(self.tied) | {n for n, m in zip(self.names, moved, strict=True) if m}

    def _tie(self, params: torch.Tensor) -> torch.Tensor:
        """Evaluate astropy's ties for all rows at once, on a model set."""
        model = self.model
        values = params.detach().cpu().numpy()
        columns = [np.ascontiguousarray(values[:, i]) for i in range(len(self.names))]
        many = type(model)(*columns, n_models=len(values))
        result = params.clone()
        for name in self.tied:
            value = model.tied[name](many)
            value = np.broadcast_to(np.asarray(getattr(value, "value", value), float), len(values))
            setattr(many, name, value)
            result[:, self.names.index(name)] = torch.as_tensor(value.copy()).to(params)
        return result


def whitening_of(
    setup: BatchSetup, weight: torch.Tensor, shape: tuple[int, int]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What makes noise independent: of weighted images (b, K, npix) of galaxies (b,)."""
    if setup.correlation is None:
        return None
    used = (weight > 0).double().cpu().numpy().reshape(-1, *shape)
    every = setup.correlation.whitening(used)

    def whiten(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return every.rows(rows.cpu().numpy())(images.unflatten(2, shape)).flatten(2)

    return whiten


def engine_of(model: GalaxyModel) -> Callable[..., BatchResult]:
    """The function that fits batches with a model: `fit_batch`, or one that is called like it."""
    from galmorph.models.learned import LearnedGalaxy2D

    if isinstance(model, LearnedGalaxy2D):
        from galmorph._learnedfit import fit_learned_batch

        return fit_learned_batch
    return fit_batch


def _relative_width(prior: Prior | None) -> float:
    """Of a prior of something positive, in its logarithm."""
    if prior is None:
        return np.inf
    low, high = prior.ppf(0.16), prior.ppf(0.84)
    return 0.5 * np.log(high / low) if low > 0 else np.inf


class _GalaxyProblem:
    """The batch as `levenberg_marquardt` sees it."""

    def __init__(
        self,
        setup: BatchSetup,
        data: torch.Tensor,
        weight: torch.Tensor,
        templates: torch.Tensor,
        template_params: torch.Tensor,
        scale: torch.Tensor,
        shape: tuple[int, int],
        renderer: FourierRenderer | None,
    ) -> None:
        self.setup, self.shape, self.renderer = setup, shape, renderer
        self.data, self.weight, self.templates = data, weight, templates
        self.template_params, self.scale = template_params, scale
        self.linear_amplitude = setup.coordinates.linear_flux
        self.whitening = whitening_of(setup, weight, shape)
        # galaxies that need a wider box, and where each one's PSF is in that renderer
        self.wide_renderer: FourierRenderer | None = None
        self.wide_row = torch.full((len(data),), -1, device=data.device)

    def params(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.setup.coordinates.to_params(u, self.template_params[rows])

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        setup, coordinates = self.setup, self.setup.coordinates
        if self.renderer is None:
            u = self._not_round(u)
        params = self.params(u, rows)
        if self.renderer is None:
            columns = self._pixel_columns(params)
            chain = coordinates.params_jacobian(u, params)[:, 1:]
        else:
            columns = self._draw(params.to(self.data.dtype), rows)
            chain = coordinates.chain(u, params)
        result = Linearisation(columns=columns, chain=chain)
        if not self.linear_amplitude:
            result.amplitude = params[:, 0] / self.scale[rows]
            jacobian = coordinates.params_jacobian(u, params)
            result.amplitude_chain = jacobian[:, 0] / self.scale[rows][:, None]
        if setup.priors:
            result.penalty, result.penalty_chain = self._penalties(u, params)
        return result

    def _not_round(self, u: torch.Tensor) -> torch.Tensor:
        """Coordinates where an ellipse has an angle, without which its slopes say nothing."""
        u = u.clone()
        for block in self.setup.coordinates.blocks:
            if block.kind == "ellipse":
                first = block.coordinates[1]
                g = torch.linalg.norm(u[:, block.coordinates[1:]], dim=1)
                u[:, first] = torch.where(g < _ROUND, _ROUND, u[:, first])
        return u

    def _draw(
        self, params: torch.Tensor, rows: torch.Tensor, *, derivatives: bool = True
    ) -> torch.Tensor:
        """Images and raw derivatives (b, 1 + R, npix), each in the box that it needs."""

        def draw(renderer: FourierRenderer, these: torch.Tensor, psfs: torch.Tensor):
            own = params[these]
            drawn = components(self.setup.ellipses, self.setup.names, own)
            raw = renderer.rows(psfs)(drawn, own[:, 1], own[:, 2], derivatives=derivatives)
            return raw.columns.flatten(2)

        wide = self.wide_row[rows] >= 0
        if not wide.any():
            return draw(self.renderer, slice(None), rows)
        if wide.all():
            return draw(self.wide_renderer, slice(None), self.wide_row[rows])
        narrow = draw(self.renderer, ~wide, rows[~wide])
        columns = narrow.new_empty((len(rows), *narrow.shape[1:]))
        columns[~wide] = narrow
        columns[wide] = draw(self.wide_renderer, wide, self.wide_row[rows[wide]])
        return columns

    def _pixel_columns(self, params: torch.Tensor, *, derivatives: bool = True) -> torch.Tensor:
        ny, nx = self.shape
        y, x = np.mgrid[:ny, :nx]
        unit = params.cpu().clone()
        unit[:, 0] = 1.0
        drawn = pixel_images(
            self.setup.ellipses, self.setup.names, unit.numpy(), x.ravel(), y.ravel(), derivatives
        )
        if not derivatives:
            return torch.as_tensor(drawn[:, None]).to(self.data)
        image, slopes = drawn
        columns = np.concatenate([image[:, None], slopes[:, 1:]], 1)
        return torch.as_tensor(columns).to(self.data)

    def _penalties(
        self, u: torch.Tensor, params: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        jacobian = self.setup.coordinates.params_jacobian(u, params)
        values, slopes = [], []
        for name, prior in self.setup.priors.items():
            i = self.setup.names.index(name)
            value, slope = prior.residual(params[:, i].cpu().numpy())
            values.append(torch.as_tensor(value).to(params))
            slopes.append(torch.as_tensor(slope).to(params)[:, None] * jacobian[:, i])
        return torch.stack(values, 1), torch.stack(slopes, 1)

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Keep ellipses that are walked in eta within the largest ellipticity."""
        for block in self.setup.coordinates.blocks:
            if block.kind != "ellipse":
                continue
            largest = self.setup.bounds[self.setup.ellipses[block.ellipse].ellip][1]
            limit = -np.log1p(-(min(largest, 0.99) if largest is not None else 0.99))
            eta = u[:, block.coordinates[1:]]
            g = torch.linalg.norm(eta, dim=1, keepdim=True)
            u = u.clone()
            u[:, block.coordinates[1:]] = eta * (limit / g.clamp_min(limit))
            radius = u[:, block.coordinates[0]].clamp(np.log(0.02), np.log(2 * max(self.shape)))
            u[:, block.coordinates[0]] = radius
        return u


def _coordinate_bounds(
    setup: BatchSetup,
    start: torch.Tensor,
    guess: Guess | None,
    shape: tuple[int, int],
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the coordinates that are parameters or their logarithms: (B, U) each."""
    lower = start.new_full((start.shape[0], setup.coordinates.size), -torch.inf)
    upper = -lower
    for block in setup.coordinates.blocks:
        if block.kind == "ellipse":
            continue
        name = setup.names[block.parameters[0]]
        low, high = _limits(setup.bounds[name])
        if block.kind == "log":  # an index has bounds, a radius may have none
            low, high = np.log(max(low, 0.02)), np.log(min(high, 4 * max(shape)))
        c = block.coordinates[0]
        lower[:, c], upper[:, c] = low, high
        if guess is not None and name in ("x_0", "y_0"):
            centre = (guess.x_0 if name == "x_0" else guess.y_0).to(_WIDE)
            lower[:, c] = torch.maximum(lower[:, c], centre - shift)
            upper[:, c] = torch.minimum(upper[:, c], centre + shift)
    return lower, upper


def _limits(bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = bounds
    return (-np.inf if low is None else low), (np.inf if high is None else high)


def _start_params(setup: BatchSetup, template: torch.Tensor, guess: Guess) -> torch.Tensor:
    """Parameters (B, P) of the first guess; what is not free stays as it is."""
    params = template.clone()
    names = setup.names

    def put(name: str, value: torch.Tensor) -> None:
        i = names.index(name)
        if setup.free[i]:
            low, high = _limits(setup.bounds[name])
            if name.startswith("theta") and np.isfinite(low):  # the same axis, within its bounds
                value = low + torch.remainder(value.to(params) - low, torch.pi)
            params[:, i] = value.to(params).clamp(low, high)

    put("x_0", guess.x_0)
    put("y_0", guess.y_0)
    g = torch.hypot(guess.eta1, guess.eta2)
    theta = 0.5 * torch.atan2(guess.eta2, guess.eta1)
    parts = len(setup.ellipses)
    for i, e in enumerate(setup.ellipses):
        if e.share is not None and e.share[0] != "-":
            put(e.share, torch.full_like(g, 0.3))
        if e.r is None:
            continue
        # with two parts the first is the compact one
        factor = 1.0 if parts == 1 else (0.45, 1.25)[min(i, 1)]
        put(e.r, guess.r * torch.exp(0.5 * g) * factor)
        if isinstance(e.n, str):
            put(e.n, guess.n if parts == 1 else torch.full_like(g, 2.5))
        put(e.ellip, -torch.expm1(-(g if parts == 1 or i else 0.5 * g)))
        put(e.theta, theta)
    return params if setup.coordinates.tie is None else setup.coordinates.tie(params)


def window_templates(
    psf: PSF | None, psf_sigma: float, shape: tuple[int, int], like: torch.Tensor
) -> WindowTemplates:
    """Sums under the windows for round profiles on a grid of radius and index."""
    sigma = torch.tensor(window_widths(shape, psf_sigma), dtype=like.dtype, device=like.device)
    radii = np.geomspace(0.5, max(min(shape) / 2.5, 1.0), 14)
    r, n = (torch.as_tensor(a.ravel()) for a in np.meshgrid(radii, [0.5, 1.0, 2.0, 4.0]))
    r, n = r.to(like), n.to(like)
    size = 2 * int(np.ceil(2.5 * float(sigma.max()))) + 1
    stamp = (size, size)
    kernel = PSF(np.ones((1, 1)), includes_pixel=False) if psf is None else psf
    renderer = FourierRenderer(
        stamp, make_transfer(kernel, stamp, drift=0.0, dtype=like.dtype, device=like.device)
    )
    middle = torch.full_like(r, 0.5 * (size - 1))
    names = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
    zero = torch.zeros_like(r)
    params = torch.stack([zero + 1, middle, middle, r, n, zero, zero], -1)
    drawn = components([Ellipse("r_eff", "n")], names, params)
    image = renderer(drawn, middle, middle).image
    offset = torch.arange(size, dtype=like.dtype, device=like.device) - 0.5 * (size - 1)
    window = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    sums = torch.einsum("tyx,kx,ky->tk", image, window, window)
    return WindowTemplates(sigma=sigma, sums=sums, r=r, n=n, psf_sigma=psf_sigma)


@dataclass
class BatchResult:
    """Where the fit of a batch ended (numpy, in stamp coordinates and data units)."""

    params: np.ndarray
    cov: np.ndarray
    background: np.ndarray
    background_cov: np.ndarray
    cross_cov: np.ndarray
    chi2: np.ndarray
    cost: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    at_bound: np.ndarray
    bad_covariance: np.ndarray


def background_templates(kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Linear templates of the background, (nb, ny, nx), about the middle of the stamp.

    Parameters
    ----------
    kind : {"none", "constant", "tilted"}
    shape : tuple of int
        (ny, nx).

    Returns
    -------
    array, shape (0, 1 or 3, ny, nx)
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    parts = [np.ones(shape), x - 0.5 * (shape[1] - 1), y - 0.5 * (shape[0] - 1)]
    count = {"none": 0, "constant": 1, "tilted": 3}[kind]
    return np.array(parts[:count]).reshape(count, *shape)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on images of this size more of them only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # the C library returns blocks up to the largest that was ever freed to its own pool, not
    # to the system: without this, clearing fresh pages takes as long as the transforms
    del_me = torch.empty(31 << 20, dtype=torch.uint8)
    del del_me
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@torch.no_grad()
def fit_batch(
    setup: BatchSetup,
    data: np.ndarray,
    inv_sigma: np.ndarray,
    psf: PSF | Sequence[PSF] | None,
    position: np.ndarray,
    *,
    covariance: bool = True,
) -> BatchResult:
    """Fit every stamp of a batch.

    Parameters
    ----------
    setup : BatchSetup
    data, inv_sigma : array, shape (B, ny, nx)
        Pixels and one over their uncertainty, zero where unusable.
    psf : PSF, sequence of PSF, or None
        Shared, or one a stamp; None: no PSF, pixel-integrated light.
    position : array, shape (B, 2)
        (x, y) where known, NaN elsewhere.
    covariance : bool, optional
        Whether the covariance is wanted; NaN otherwise.

    Returns
    -------
    BatchResult
    """
    shape = data.shape[1:]
    device, dtype = setup.device, setup.dtype
    # in units of the smallest uncertainty of each stamp, so that any precision will do
    best = inv_sigma.reshape(len(data), -1).max(1)
    scale = torch.as_tensor(1.0 / best, dtype=_WIDE, device=device)
    values = torch.as_tensor(data * best[:, None, None], dtype=dtype, device=device)
    weight = torch.as_tensor(inv_sigma / best[:, None, None], dtype=dtype, device=device)
    psfs = [psf] if isinstance(psf, PSF) else list(psf or [])
    psf_sigma = float(np.median([p.sigma for p in psfs])) if psfs else 0.5
    least = setup.max_shift or max(4.0, 1.5 * psf_sigma, 0.06 * min(shape))
    shift = torch.full((len(data),), least, dtype=_WIDE, device=device)

    template = torch.as_tensor(
        np.array([[float(np.ravel(getattr(setup.model, n).value)[0]) for n in setup.names]]),
        dtype=_WIDE,
        device=device,
    ).repeat(len(data), 1)
    guess = None
    if setup.start is not None:
        start = torch.as_tensor(setup.start, dtype=_WIDE, device=device)
        template = start.clone()
    else:
        # pixels with a hundredth of the usual weight say nothing about where to start
        usual = torch.where(weight > 0, weight, torch.nan).flatten(1).nanmedian(1).values
        guess = first_guess(
            values,
            weight > 0.01 * usual[:, None, None],
            window_templates(psfs[0] if psfs else None, psf_sigma, shape, values),
            position=torch.as_tensor(position, dtype=dtype, device=device),
            limit=least,
            background=setup.background != "none",
        )
        start = _start_params(setup, template, guess)
        if setup.max_shift is None:  # the middle of a large galaxy is not so well known
            shift = torch.maximum(shift, (0.35 * guess.r.to(_WIDE)).clamp_max(0.2 * min(shape)))

    templates = torch.as_tensor(
        background_templates(setup.background, shape), dtype=dtype, device=device
    ).flatten(1)
    lower, upper = _coordinate_bounds(setup, start, guess, shape, shift)
    problem = _GalaxyProblem(
        setup,
        values.flatten(1),
        weight.flatten(1),
        templates,
        template,
        scale,
        shape,
        _renderer(psfs, shape, start, shift, setup, reach=0.3 if guess else 0.9),
    )
    solve = Solver(setup, problem, lower, upper)
    result = solve(start)
    if setup.start is None:
        _try_other_starts(setup, solve, result, start)
    if psfs and guess:
        _redo_with_wider_box(setup, solve, result, psfs, shape, start, shift)
    return _summarise(solve, result, scale, covariance)


def _renderer(psfs, shape, start, shift, setup, *, reach: float) -> FourierRenderer | None:
    if not psfs:
        return None
    middle = start.new_tensor([0.5 * (shape[1] - 1), 0.5 * (shape[0] - 1)])
    drift = ((start[:, 1:3] - middle).abs() + shift[:, None]).amax(0).tolist()
    transfer = make_transfer(
        psfs[0] if len(psfs) == 1 else psfs,
        shape,
        drift=(drift[1], drift[0]),
        reach=reach,
        dtype=setup.dtype,
        device=setup.device,
    )
    return FourierRenderer(shape, transfer)


class Solver:
    """`levenberg_marquardt` with everything but the start."""

    def __init__(self, setup, problem, lower, upper) -> None:
        self.setup, self.problem, self.lower, self.upper = setup, problem, lower, upper

    def __call__(self, start: torch.Tensor, rows: torch.Tensor | None = None) -> LeastSquaresResult:
        """Fit from parameters ``start`` (B, P)."""
        return self._walk(
            self.problem,
            self.setup.coordinates.from_params(start),
            self.lower,
            self.upper,
            rows=rows,
        )

    def walk_copies(
        self,
        rows: torch.Tensor,
        u: torch.Tensor,
        lower: torch.Tensor,
        upper: torch.Tensor,
        tolerance: float,
    ) -> LeastSquaresResult:
        """Fit galaxies ``rows`` (b,), some of them several times, from ``u`` (b, U)."""
        return self._walk(_Copies(self.problem, rows), u, lower, upper, tolerance=tolerance)

    def _walk(self, problem, u, lower, upper, *, rows=None, tolerance=1e-3):
        return levenberg_marquardt(
            problem,
            u,
            lower=lower,
            upper=upper,
            max_iter=self.setup.max_iter,
            tolerance=max(tolerance, self.setup.tolerance),
            relative_tolerance=1e-6 if self.setup.dtype == torch.float32 else 1e-10,
            window=self.setup.window,
            rows=rows,
        )


class _Copies:
    """Some galaxies of a problem, perhaps more than once each."""

    def __init__(self, problem: _GalaxyProblem, source: torch.Tensor) -> None:
        self.problem, self.source = problem, source
        self.data, self.weight = problem.data[source], problem.weight[source]
        self.templates = problem.templates
        self.linear_amplitude = problem.linear_amplitude
        whiten = problem.whitening
        self.whitening = whiten and (lambda images, rows: whiten(images, source[rows]))

    def linearise(self, u: torch.Tensor, rows: torch.Tensor) -> Linearisation:
        return self.problem.linearise(u, self.source[rows])

    def project(self, u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return self.problem.project(u, rows)


def _take_better(result: LeastSquaresResult, other: LeastSquaresResult, rows, margin) -> None:
    """Put ``other`` in place of ``result`` where its cost is lower by ``margin``."""
    ahead = other.cost[rows] < result.cost[rows] - margin
    ahead |= ~torch.isfinite(result.cost[rows]) & torch.isfinite(other.cost[rows])
    take = rows[ahead]
    n_iter = result.n_iter[rows] + other.n_iter[rows]
    for name in ("u", "linear", "cost", "chi2", "hessian", "converged", "at_bound"):
        getattr(result, name)[take] = getattr(other, name)[take]
    result.n_iter[rows] = n_iter


def _try_other_starts(setup, solve, result, start) -> None:
    """Start again, compact or extended, where the first start went astray.

    A fit that has converged with a high index is started once more with a low one, and the
    other way round; one that has not, with both.
    """
    lost = ~result.converged | ~torch.isfinite(result.cost)
    every = torch.arange(len(start), device=start.device)
    params = solve.problem.params(result.u, every)
    # where an ellipse may not be as thin as it likes, fits stay at that edge
    lost |= _at_limit(setup, params) & _narrow(setup)
    doubtful = lost | result.at_bound.any(1)
    if setup.tied:
        used = (solve.problem.weight > 0).sum(1)
        doubtful |= result.chi2 > 1.5 * used
        lost |= doubtful
    if solve.problem.linear_amplitude:  # of what is hardly there no start is better
        size = setup.coordinates.size
        doubtful &= result.linear[:, 0] * result.hessian[:, size, size].sqrt() > 8
    indices = [setup.names.index(e.n) for e in setup.ellipses if isinstance(e.n, str)]
    high = params[:, indices[0]] > 2.0 if indices else params[:, 0] > -torch.inf
    for factor, index, which in ((0.6, 1.0, high), (1.6, 3.0, ~high)):
        rows = torch.nonzero(doubtful & (lost | which))[:, 0]
        if not rows.numel():
            continue
        again = start.clone()
        for e in setup.ellipses:
            if e.r is None:
                continue
            for name, value in (
                (e.r, again[:, setup.names.index(e.r)] * factor),
                (e.n, index),
                (e.ellip, 0.15),
            ):
                if isinstance(name, str) and setup.free[setup.names.index(name)]:
                    again[:, setup.names.index(name)] = value
        if setup.coordinates.tie is not None:
            again = setup.coordinates.tie(again)
        _take_better(result, solve(again, rows), rows, 1e-3)


def _redo_with_wider_box(setup, solve, result, psfs, shape, start, shift) -> None:
    """Finish elongated galaxies that reach the edge of the stamp in a wider box.

    In the narrow one the repetitions of a thin disk are too sharp for the few nodes on
    which they are subtracted; this matters where they are not below the noise.
    """
    problem = solve.problem
    every = torch.arange(len(result.u), device=result.u.device)
    params = problem.params(result.u, every)
    wide = needs_wider_box(setup, params, result.linear[:, 0], shape)
    rows = torch.nonzero(wide & torch.isfinite(result.cost))[:, 0]
    if not rows.numel():
        return
    own = psfs if len(psfs) == 1 else [psfs[i] for i in rows.tolist()]
    problem.wide_renderer = _renderer(own, shape, start, shift, setup, reach=0.9)
    problem.wide_row[rows] = torch.arange(len(rows), device=rows.device)
    _take_better(result, solve(params, rows), rows, -torch.inf)


def needs_wider_box(
    setup: BatchSetup, params: torch.Tensor, flux: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """Which galaxies are elongated and reach the edge of the stamp above the noise, (B,).

    ``flux`` (B,) is in units of the smallest uncertainty of a pixel.
    """
    at = {name: i for i, name in enumerate(setup.names)}
    wide = torch.zeros(len(params), dtype=torch.bool, device=params.device)
    for e in setup.ellipses:
        if e.r is None:
            continue
        r, ellip = params[:, at[e.r]], params[:, at[e.ellip]]
        n = params[:, at[e.n]] if isinstance(e.n, str) else torch.full_like(r, e.n)
        scalars = sersic_table(_WIDE, params.device).scalars_at(n)[0]
        edge = 0.5 * min(shape) / r
        light = torch.exp(scalars[:, 1] - scalars[:, 0] * edge ** (1 / n)) / (r * r * (1 - ellip))
        wide |= (ellip > 0.5) & (flux.abs() * light > 0.05)
    return wide


def _summarise(solve, result, scale, covariance) -> BatchResult:
    """Parameters and covariance in the units of the data."""
    setup, problem = solve.setup, solve.problem
    every = torch.arange(len(result.u), device=result.u.device)
    params = problem.params(result.u, every)
    if problem.linear_amplitude:
        params[:, 0] = result.linear[:, 0] * scale
    if covariance:
        cov, bad = posterior_covariance(solve, result, params, scale)
    else:
        size = len(setup.names) + result.linear.shape[1] - 1
        cov = params.new_full((len(params), size, size), torch.nan)
        bad = torch.zeros_like(result.converged)
    for e in setup.ellipses:
        if e.r is not None:  # angles in (-pi/2, pi/2]
            i = setup.names.index(e.theta)
            if setup.free[i] and setup.bounds[e.theta] == (None, None):
                params[:, i] = wrap_axis(params[:, i])
    if setup.coordinates.tie is not None:
        params = setup.coordinates.tie(params)
    split = len(setup.names)
    out = {
        "params": params,
        "cov": cov[:, :split, :split],
        "background": result.linear[:, 1:] * scale[:, None],
        "background_cov": cov[:, split:, split:],
        "cross_cov": cov[:, :split, split:],
        "chi2": result.chi2,
        "cost": result.cost,
        "n_iter": result.n_iter,
        "converged": result.converged,
        "at_bound": result.at_bound.any(1) | _at_limit(setup, params),
        "bad_covariance": bad,
    }
    return BatchResult(**{k: v.cpu().numpy() for k, v in out.items()})


def _narrow(setup) -> bool:
    """Whether an ellipticity has to stay well below 1."""
    ends = [setup.bounds[e.ellip][1] for e in setup.ellipses if e.r is not None]
    return any(end is not None and end < _THIN for end in ends)


def _at_limit(setup, params: torch.Tensor) -> torch.Tensor:
    """Whether an ellipse is as thin, as small or as large as it may be."""
    result = torch.zeros(len(params), dtype=torch.bool, device=params.device)
    for e in setup.ellipses:
        if e.r is not None and setup.free[setup.names.index(e.ellip)]:
            largest = setup.bounds[e.ellip][1]
            limit = 0.99 if largest is None else min(largest, 0.99)
            result |= params[:, setup.names.index(e.ellip)] >= limit - 1e-6
        if e.r is not None and setup.free[setup.names.index(e.r)]:
            result |= params[:, setup.names.index(e.r)] <= 0.05
    return result
