"""Fitters: the astropy face of inference.

This module is imported by everyone who imports `astropy.modeling` (it is an entry point of
astropy), so that torch is imported only when something is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.modeling.fitting import Fitter

from galmorph import _astropy
from galmorph.flags import FitFlag

if TYPE_CHECKING:
    from galmorph._stamps import StampBatch
    from galmorph.models.base import GalaxyModel
    from galmorph.noise import NoiseModel
    from galmorph.priors import Prior

__all__ = ["EncoderFitter", "MAPFitter", "StampFits"]

# terms of each background
_BACKGROUNDS = {"none": 0, "constant": 1, "tilted": 3}
# how often noise that depends on the model is found anew, and what change ends this (in sigma)
_REWEIGHTINGS, _SETTLED = 8, 0.03


@dataclass
class StampFits:
    """Fits of a batch of stamps, in stamp coordinates; row i belongs to stamp i.

    Attributes
    ----------
    params : array, shape (B, P)
        NaN where nothing could be fitted.
    cov : array, shape (B, P, P)
        Covariance, the background and all else marginalised; zero for what was fixed.
    background, background_cov : array, shape (B, nb), (B, nb, nb)
        Constant, and slopes in x and y about the middle of the stamp.
    chi2, dof, n_iter, flags : array, shape (B,)
    extra : dict of str to array, shape (B, ...)
        What only some fitters find: draws, the evidence, parameters of the noise.
    """

    params: np.ndarray
    cov: np.ndarray
    background: np.ndarray
    background_cov: np.ndarray
    chi2: np.ndarray
    dof: np.ndarray
    n_iter: np.ndarray
    flags: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class MAPFitter(Fitter):
    """Maximum-likelihood or maximum-posterior fits by batched Levenberg-Marquardt.

    Fluxes and backgrounds are solved for, not walked to; every galaxy has its own damping
    and leaves the batch when it has converged; fits that fail or end at a bound are
    started again elsewhere.

    Parameters
    ----------
    priors : mapping of str to `galmorph.Normal` or `galmorph.LogNormal`, optional
        Of parameters by name.  By default images (`galmorph.fit_images`) are fitted with a
        broad prior on free Sérsic indices, `galmorph.priors.INDEX_PRIOR`, which keeps faint
        galaxies from running away to n = 8 with twice their flux, and matters to no other;
        an empty mapping is maximum likelihood.  Fits the astropy way have no prior but
        what is given here.
    noise : NoiseModel, optional
        What the pixels do, of `galmorph.noise`; by default they are independent and Gaussian
        with the uncertainty that is given.  Other noise is fitted by iteratively reweighted
        least squares (Green 1984, J. R. Statist. Soc. B 46, 149).  Not for fits the astropy way.
    max_iter : int, optional
        Evaluations for each start.
    tolerance : float, optional
        A fit ends when its next step, which is still taken, promises to lower chi-square by less
        than this.  By default 0.001, and 0.05 for learned galaxies (0.2 in scenes), which are
        small parts of the errors; smaller numbers than these make no difference.  With
        ``np.inf`` a learned galaxy is one step from a Sérsic profile that has been fitted.
    max_shift : float, optional
        How far the centre may go from the position given or found, in pixels; by default
        the largest of 4, 1.5 widths (sigma) of the PSF, 6 % of the stamp and a third of
        the radius of the galaxy.
    device : str, optional
        Where torch works: ``"cpu"``, ``"cuda"``.
    dtype : {"float32", "float64"}, optional
        Precision of the images while fitting; the linear algebra is double always.
        Stamps of total S/N beyond some 10^4 profit from ``"float64"``.
    batch_size : int, optional
        How many galaxies are worked on at once.

    Attributes
    ----------
    fit_info : `scipy.optimize.OptimizeResult` or None
        Of the last fit the astropy way: ``fun`` (weighted residuals), ``param_cov``,
        ``message``, ``status`` (1 converged, 2 stopped at a bound; 0 did not converge),
        ``nfev``, ``cost``.

    Notes
    -----
    The covariance is that of Laplace's approximation, the inverse of half the
    Gauss-Newton second derivative of -2 ln(posterior).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import MAPFitter, SersicGalaxy2D
    >>> y, x = np.mgrid[:31, :31]
    >>> truth = SersicGalaxy2D(100, 15.2, 14.9, r_eff=3, n=1.2, ellip=0.3, theta=0.4)
    >>> start = SersicGalaxy2D(80, 15, 15, r_eff=2.5, n=1, ellip=0.1, theta=0.2)
    >>> fit = MAPFitter(dtype="float64")(start, x, y, truth(x, y))
    >>> print(f"{fit.flux.value:.2f} {fit.n.value:.3f}")
    100.00 1.200
    """

    supported_constraints = ["fixed", "tied", "bounds"]

    def __init__(
        self,
        *,
        priors: Mapping[str, Prior] | None = None,
        noise: NoiseModel | None = None,
        max_iter: int = 40,
        tolerance: float = 0.0,
        max_shift: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 96,
    ) -> None:
        if noise is not None and not callable(getattr(noise, "log_prob", None)):
            raise TypeError(f"noise must be a noise model, not {type(noise).__name__}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
        if max_iter < 1 or batch_size < 1:
            raise ValueError("max_iter and batch_size must be at least 1")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, not {tolerance!r}")
        if max_shift is not None and not max_shift > 0:
            raise ValueError(f"max_shift must be positive, not {max_shift!r}")
        for name, prior in (priors or {}).items():
            if not hasattr(prior, "residual"):
                raise TypeError(
                    f"the prior of {name!r} must be a galmorph.Normal or LogNormal, "
                    f"not {type(prior).__name__}"
                )
        self.priors = None if priors is None else dict(priors)
        self.noise = noise
        self.max_iter = int(max_iter)
        self.tolerance = float(tolerance)
        self.max_shift = max_shift
        self.device = device
        self.dtype = dtype
        self.batch_size = int(batch_size)
        self.fit_info = None

    def __repr__(self) -> str:
        parts = [f"priors={self.priors!r}"] if self.priors else []
        parts += [f"noise={self.noise!r}"] if self.noise else []
        parts += [f"tolerance={self.tolerance!r}"] if self.tolerance else []
        parts += [f"dtype={self.dtype!r}", f"device={self.device!r}"]
        return f"MAPFitter({', '.join(parts)})"

    # -- batches ---------------------------------------------------------------------

    def fit_stamps(
        self, batch: StampBatch, model: GalaxyModel, *, background: str = "none"
    ) -> StampFits:
        """Fit a batch of stamps; `galmorph.fit_images` calls this.

        Parameters
        ----------
        batch : StampBatch
            Pixels, weights, PSFs and positions.
        model : GalaxyModel
            What to fit; its constraints hold, its values are used for what is fixed.
        background : {"none", "constant", "tilted"}, optional

        Returns
        -------
        StampFits
        """
        if self.noise is None:
            return self._least_squares(batch, model, background)
        return self._reweighted(batch, model, background)

    def _reweighted(self, batch: StampBatch, model: GalaxyModel, background: str) -> StampFits:
        """Fits with any noise, as a sequence of fits with the noise that goes with the last."""
        noise, values = self.noise, None
        fits = self._least_squares(batch, model, background)
        told = bool(noise.parameter_names)
        for _ in range(_REWEIGHTINGS if told or not noise.gaussian else 0):
            images = self._images(fits, batch, model)
            if told:
                free = len(model.param_names) + fits.background.shape[1]
                values = noise.fitted(batch.data, images, batch.inv_sigma, free)
            bound = self._noise_at(fits, slice(None), batch, model, values)
            data, inv_sigma = bound.working(batch.data, images, batch.inv_sigma)
            before = fits
            fits = self._least_squares(
                replace(batch, data=data, inv_sigma=inv_sigma), model, background
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                step = np.abs(fits.params - before.params)
                moved = step**2 > _SETTLED**2 * np.diagonal(fits.cov, axis1=1, axis2=2)
            if not (moved & np.isfinite(fits.params)).any():
                break
        fits.cov = fits.cov / noise.information
        fits.background_cov = fits.background_cov / noise.information
        if "cross_cov" in fits.extra:
            fits.extra["cross_cov"] = fits.extra["cross_cov"] / noise.information
        if values is not None:
            fits.extra["noise_parameters"] = values
        return fits

    def _noise_at(
        self, fits: StampFits, rows: Any, batch: StampBatch, model: GalaxyModel, values: Any = None
    ) -> Any:
        """The noise of some of the stamps, as far as it depends on their fits."""
        noise = self.noise
        if noise is None:
            return None
        values = fits.extra.get("noise_parameters") if values is None else values
        if values is not None:
            noise = noise.with_parameters(values[rows])
        if getattr(noise, "needs_misfit", False):
            noise = noise.bind(self._images(fits, batch, model, misfit=True)[rows])
        return noise

    def _images(
        self, fits: StampFits, batch: StampBatch, model: GalaxyModel, *, misfit: bool = False
    ) -> np.ndarray:
        """Model and background of each stamp, or the misfit; zero where there is no fit."""
        from galmorph._batchfit import background_templates

        shape = batch.data.shape[1:]
        images = np.zeros(batch.data.shape)
        good = np.flatnonzero(np.isfinite(fits.params).all(1))
        psf = model.psf if batch.psf is None else batch.psf
        if isinstance(psf, list):
            psf = [psf[i] for i in good]
        if good.size:
            draw = model.render_misfit if misfit else model.render
            images[good] = draw(shape, params=fits.params[good], psf=psf)
        if misfit or not fits.background.shape[1]:
            return images
        kind = {count: name for name, count in _BACKGROUNDS.items()}[fits.background.shape[1]]
        templates = background_templates(kind, shape)
        return images + np.einsum("nb,byx->nyx", np.nan_to_num(fits.background), templates)

    def _least_squares(self, batch: StampBatch, model: GalaxyModel, background: str) -> StampFits:
        """Fits with Gaussian noise of known width."""
        setup = self._setup(model, background)
        flags = np.array(batch.flags, dtype=np.int32)
        usable = (batch.inv_sigma > 0).reshape(len(flags), -1).sum(1)
        n_background = _BACKGROUNDS[background]
        unknowns = sum(setup.free) + n_background
        flags[usable == 0] |= FitFlag.NO_DATA
        flags[(usable > 0) & (usable <= unknowns)] |= FitFlag.FEW_PIXELS
        psf = model.psf if batch.psf is None else batch.psf
        rows = np.flatnonzero((flags & FitFlag.FAILED) == 0)
        fits = _empty_fits(flags, len(setup.names), n_background)
        fits.dof = np.maximum(usable - unknowns, 0).astype(float)
        if rows.size:
            result = self._solve(
                setup,
                batch.data[rows],
                batch.inv_sigma[rows],
                psf if not isinstance(psf, list) else [psf[i] for i in rows],
                batch.position[rows],
            )
            self._store(fits, rows, result, setup)
            _add_flags(fits, rows, result, batch)
        return fits

    def _setup(self, model: GalaxyModel, background: str, start: np.ndarray | None = None):
        import torch

        from galmorph._batchfit import BatchSetup
        from galmorph.models.base import GalaxyModel

        if not isinstance(model, GalaxyModel):
            raise TypeError(
                "images are fitted with a galmorph model "
                f"(SersicGalaxy2D ...), not {type(model).__name__}"
            )
        if background not in _BACKGROUNDS:
            raise ValueError(f"background must be one of {list(_BACKGROUNDS)}, not {background!r}")
        _astropy.validate_constraints(self.supported_constraints, model)
        priors = self.priors_of(model)
        unknown = set(priors) - set(model.param_names)
        if unknown:
            raise ValueError(f"{type(model).__name__} has no parameter {sorted(unknown)[0]!r}")
        return BatchSetup(
            model=model,
            priors=priors,
            background=background,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            window=self.batch_size,
            max_iter=self.max_iter,
            tolerance=self.tolerance,
            max_shift=self.max_shift,
            start=start,
            correlation=self.noise if getattr(self.noise, "correlated", False) else None,
        )

    def priors_of(self, model: GalaxyModel) -> dict[str, Prior]:
        """Priors of the parameters of a model: those given, or a broad one on free indices."""
        from galmorph.priors import INDEX_PRIOR

        if self.priors is not None:
            return dict(self.priors)
        indices = {p.get("n") for p in model._profiles if isinstance(p.get("n"), str)}
        return {n: INDEX_PRIOR for n in indices if not (model.fixed[n] or model.tied[n])}

    def _engine(self, model: GalaxyModel) -> Any:
        """The function that fits batches."""
        from galmorph._batchfit import engine_of

        return engine_of(model)

    def _solve(self, setup, data, inv_sigma, psf, position):
        """One call for a shared PSF or PSFs of one kind; one for each kind otherwise."""
        fit_batch = self._engine(setup.model)
        if not isinstance(psf, list):
            return fit_batch(setup, data, inv_sigma, psf, position)
        kinds: dict[tuple, list[int]] = {}
        for i, p in enumerate(psf):
            key = (p.oversampling, p.includes_pixel, p.shape[0] % 2, p.shape[1] % 2)
            kinds.setdefault(key, []).append(i)
        parts = {}
        for rows in kinds.values():
            result = fit_batch(
                setup, data[rows], inv_sigma[rows], [psf[i] for i in rows], position[rows]
            )
            parts[tuple(rows)] = result
        if len(parts) == 1:
            return result
        merged = {}
        for name in vars(result):
            first = getattr(result, name)
            merged[name] = np.empty((len(data), *first.shape[1:]), first.dtype)
            for rows, part in parts.items():
                merged[name][list(rows)] = getattr(part, name)
        return type(result)(**merged)

    def _store(self, fits: StampFits, rows: np.ndarray, result: Any, setup: Any) -> None:
        fits.params[rows] = result.params
        held = ~np.array(
            [f or n in setup.tied for f, n in zip(setup.free, setup.names, strict=True)]
        )
        cov = result.cov
        cov[:, held] = 0.0
        cov[:, :, held] = 0.0
        fits.cov[rows] = cov
        fits.background[rows] = result.background
        fits.background_cov[rows] = result.background_cov
        if fits.background.shape[1]:
            cross = result.cross_cov
            cross[:, held] = 0.0
            whole = np.full((len(fits.flags), *cross.shape[1:]), np.nan)
            whole[rows] = cross
            fits.extra["cross_cov"] = whole
        fits.chi2[rows] = result.chi2
        fits.n_iter[rows] = result.n_iter

    # -- the astropy way ---------------------------------------------------------------

    @_astropy.fitter_unit_support
    def __call__(
        self,
        model: Any,
        x: Any,
        y: Any,
        z: Any = None,
        weights: Any = None,
        maxiter: int = 100,
        *,
        inplace: bool = False,
    ) -> Any:
        """Fit a model to data, starting from its parameters.

        Parameters
        ----------
        model : `~astropy.modeling.FittableModel`
            A galmorph model, a model set of them, or any model of two inputs.  A sum of
            galmorph models, with a constant or a plane or without, on a grid of pixels is
            fitted as a scene, as by `galmorph.deblend`.
        x, y : array-like
            Coordinates of the data.
        z : array-like
            The data, in the shape of ``x``; for a model set ``(N, *x.shape)``.
        weights : array-like, optional
            One over the uncertainty of each datum.  Without them all count the same and
            the covariance is scaled by the mean squared residual.
        maxiter : int, optional
            Evaluations at most.
        inplace : bool, optional
            Change ``model`` instead of a copy.

        Returns
        -------
        model
            With the fitted parameters, ``cov_matrix`` and ``stds``.
        """
        from galmorph._modelfit import fit_model

        if z is None:
            raise ValueError("MAPFitter fits images: give x, y and z")
        _astropy.validate_constraints(self.supported_constraints, model)
        fitted = model if inplace else model.copy()
        self.fit_info = fit_model(
            self, fitted, np.asarray(x, float), np.asarray(y, float), z, weights, maxiter
        )
        return fitted


class EncoderFitter(MAPFitter):
    """Posteriors of learned galaxies told by the encoder of the network, without a fit.

    The encoder was trained on galaxies that the network draws, through any PSF and noise; it
    looks at each image twice.  It is a hundred times as fast as a fit, and as good where the
    noise is what limits; at high S/N `MAPFitter` is more exact.

    Parameters
    ----------
    refine : bool, optional
        Go on from there with a maximum-posterior fit.
    max_iter, max_shift, device, dtype, batch_size
        As for `MAPFitter`.

    Attributes
    ----------
    fit_info : `scipy.optimize.OptimizeResult` or None
        As of `MAPFitter`.

    Notes
    -----
    The posterior is a normal distribution with all covariances, of geometry, flux and latents
    (amortised inference; Papamakarios & Murray 2016, arXiv:1605.06376).  Its mean is in
    ``params`` of the result, not the maximum.  It knows the prior of the network and no
    other; parameters cannot be fixed, and a mean beyond a bound is flagged, not moved.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import EncoderFitter, LearnedGalaxy2D, PSF, fit_images
    >>> y, x = np.mgrid[:25, :25] - 12
    >>> psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.5**2))
    >>> galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=31, y_0=31, r_50=5, psf=psf)
    >>> image = galaxy.render((64, 64)) + np.random.default_rng(1).normal(0, 0.05, (64, 64))
    >>> result = fit_images(image, galaxy, EncoderFitter(), uncertainty=0.05)
    >>> bool(abs(result.params[0, 0] - 100) < 5 * result.stds[0, 0])
    True
    """

    supported_constraints = ["bounds"]

    def __init__(
        self,
        *,
        refine: bool = False,
        max_iter: int = 40,
        max_shift: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 96,
    ) -> None:
        super().__init__(
            max_iter=max_iter,
            max_shift=max_shift,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        self.refine = bool(refine)

    def __repr__(self) -> str:
        return f"EncoderFitter(refine={self.refine}, device={self.device!r})"

    def _engine(self, model: GalaxyModel) -> Any:
        from galmorph.models.learned import LearnedGalaxy2D

        if not isinstance(model, LearnedGalaxy2D):
            raise TypeError(
                f"EncoderFitter fits LearnedGalaxy2D, not {type(model).__name__}: use MAPFitter"
            )
        from galmorph._encoderfit import encode_batch, refine_batch

        return refine_batch if self.refine else encode_batch


def _empty_fits(flags: np.ndarray, n_params: int, n_background: int) -> StampFits:
    batch = len(flags)
    return StampFits(
        params=np.full((batch, n_params), np.nan),
        cov=np.full((batch, n_params, n_params), np.nan),
        background=np.full((batch, n_background), np.nan),
        background_cov=np.full((batch, n_background, n_background), np.nan),
        chi2=np.full(batch, np.nan),
        dof=np.zeros(batch),
        n_iter=np.zeros(batch, dtype=int),
        flags=flags,
    )


def _add_flags(fits: StampFits, rows: np.ndarray, result: Any, batch: StampBatch) -> None:
    """The remarks that follow from the fit."""

    def mark(condition: np.ndarray, flag: FitFlag) -> None:
        fits.flags[rows[condition]] |= flag

    x, y = result.params[:, 1], result.params[:, 2]
    ny, nx = batch.data.shape[1:]
    mark(~result.converged, FitFlag.NOT_CONVERGED)
    mark(result.at_bound, FitFlag.AT_BOUND)
    mark(result.bad_covariance, FitFlag.BAD_COVARIANCE)
    margin = np.minimum.reduce([x, y, nx - 1 - x, ny - 1 - y])
    mark(margin < 2, FitFlag.EDGE)
    with np.errstate(invalid="ignore", divide="ignore"):
        snr = result.params[:, 0] / np.sqrt(result.cov[:, 0, 0])
        dof = fits.dof[rows]
        reduced = result.chi2 / dof
        excess = (result.chi2 - dof) / np.sqrt(2 * dof)
    held = result.cov[:, 0, 0] == 0
    mark(np.where(held, ~(result.params[:, 0] > 0), ~(snr >= 5)), FitFlag.LOW_SNR)
    mark((reduced > 2) | (excess > 10), FitFlag.POOR_FIT)
    yy, xx = np.mgrid[:ny, :nx]
    near = np.hypot(xx - x[:, None, None], yy - y[:, None, None]) <= 1.5
    blind = (batch.inv_sigma[rows] <= 0) & near
    mark(blind.any((1, 2)), FitFlag.BAD_CENTER)
