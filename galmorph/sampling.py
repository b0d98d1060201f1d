"""Fitters that return draws from the posterior: Markov chains, importance and nested sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from galmorph.fitting import EncoderFitter, MAPFitter
from galmorph.flags import FitFlag

if TYPE_CHECKING:
    from galmorph._stamps import StampBatch
    from galmorph.fitting import StampFits
    from galmorph.models.base import GalaxyModel
    from galmorph.priors import Prior

__all__ = ["ImportanceFitter", "MCMCFitter", "NestedFitter"]


class _PosteriorFitter(MAPFitter):
    """A maximum-posterior fit, and then draws around it."""

    def __init__(
        self,
        *,
        priors: Mapping[str, Prior] | None = None,
        noise: Any = None,
        rng: np.random.Generator | int = 0,
        n_samples: int = 1000,
        max_iter: int = 40,
        max_shift: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 96,
    ) -> None:
        super().__init__(
            priors=priors,
            noise=noise,
            max_iter=max_iter,
            max_shift=max_shift,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        if n_samples < 10:
            raise ValueError(f"n_samples must be at least 10, not {n_samples!r}")
        self.n_samples = int(n_samples)
        if isinstance(rng, np.random.Generator):
            rng = int(rng.integers(2**62))
        self.seed = int(rng)

    def provenance(self) -> dict[str, Any]:
        """What `FitResult.meta` should know."""
        return {}

    def fit_stamps(
        self, batch: StampBatch, model: GalaxyModel, *, background: str = "none"
    ) -> StampFits:
        """Fit a batch of stamps and draw; `galmorph.fit_images` calls this.

        Parameters
        ----------
        batch, model, background
            As for `MAPFitter.fit_stamps`.

        Returns
        -------
        StampFits
            ``params`` are those of the fit, ``cov`` is that of the draws, and ``extra`` has
            the draws.
        """
        self._names = tuple(model.param_names)
        fits = self._first(batch, model, background)
        usable = np.isfinite(fits.params).all(1) & ((fits.flags & FitFlag.FAILED) == 0)
        rows = np.flatnonzero(usable)
        if rows.size:
            self._draw(fits, rows, batch, model, background)
        return fits

    def __call__(self, model: Any, x: Any, y: Any, z: Any = None, weights: Any = None, **options):
        """Fit a model the astropy way, and draw from its posterior.

        Parameters
        ----------
        model : GalaxyModel
            One galaxy; not a set or a compound.
        x, y, z, weights, **options
            As for `MAPFitter`; the points are pixels of a grid, and weights are needed.

        Returns
        -------
        model
            With the maximum-posterior parameters; ``fit_info["samples"]`` (S, P) are the draws and
            ``fit_info["param_cov"]`` is their covariance.

        Raises
        ------
        TypeError
            If the model is not a single galaxy without units.
        ValueError
            If there are no weights, or the points are not pixels of a grid.
        """
        from galmorph._modelfit import one_stamp
        from galmorph.models.base import GalaxyModel

        name = type(self).__name__
        if not isinstance(model, GalaxyModel) or len(model) > 1 or model._has_units:
            raise TypeError(
                f"{name} samples one galmorph model without units at a time: MAPFitter "
                "fits all others, and fit_images many images"
            )
        if weights is None:
            raise ValueError(f"{name} needs weights, one over the uncertainty of each pixel")
        fitted = super().__call__(model, x, y, z, weights=weights, **options)
        batch, params = one_stamp(fitted, x, y, z, weights)
        from galmorph.fitting import _empty_fits

        fits = _empty_fits(batch.flags, params.shape[1], 0)
        fits.params[:] = params
        fits.cov[:] = np.eye(params.shape[1])
        self._names = tuple(model.param_names)
        self._draw(fits, np.array([0]), batch, fitted, "none")
        samples = fits.extra["samples"][0]
        for axis, column in enumerate((1, 2)):
            samples[:, column] += batch.origin[0, axis]
        free = [i for i, n in enumerate(model.param_names) if not (model.fixed[n] or model.tied[n])]
        self.fit_info["samples"] = samples
        self.fit_info["param_cov"] = fits.cov[0][np.ix_(free, free)]
        for name, values in fits.extra.items():
            if values.ndim == 1:
                self.fit_info[name] = float(values[0])
        return fitted

    def _first(self, batch: StampBatch, model: GalaxyModel, background: str) -> StampFits:
        return super().fit_stamps(batch, model, background=background)

    def _draw(self, fits, rows, batch, model, background) -> None:
        from galmorph._sampling import Start, by_psf, make_target

        psf = model.psf if batch.psf is None else batch.psf
        psf = [psf[i] for i in rows] if isinstance(psf, list) else psf
        setup = self._setup(model, background)
        for part, own in by_psf(psf, len(rows)):
            here = rows[part]
            target = make_target(
                setup,
                batch.data[here],
                batch.inv_sigma[here],
                own,
                fits.params[here],
                noise=self._noise_at(fits, here, batch, model),
            )
            seeds = [(self.seed, int(i)) for i in batch.index[here]]
            start = Start.at(target, fits.params[here], fits.background[here], seeds)
            found = self._sample(start, seeds)
            found |= self._check(fits, here, found, start, seeds)
            self._put(fits, here, found)

    def _sample(self, start: Any, seeds: Any) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _check(self, fits, here, found, start, seeds) -> dict[str, np.ndarray]:
        """Flag what must not be trusted; what is to take the place of it."""
        return {}

    def _put(self, fits: StampFits, here: np.ndarray, found: dict[str, np.ndarray]) -> None:
        count = len(fits.flags)
        for name, values in found.items():
            if name not in fits.extra:
                fits.extra[name] = np.full((count, *values.shape[1:]), np.nan)
            fits.extra[name][here] = values
        samples = found["samples"]
        weights = found.get("weights")
        if weights is None:
            weights = np.full(samples.shape[:2], 1.0 / samples.shape[1])
        size = fits.params.shape[1]
        free = fits.cov[here] != 0
        offset = samples - np.einsum("ns,nsp->np", weights, samples)[:, None]
        angles = [i for i, name in enumerate(self._names) if name.startswith("theta")]
        for i in angles:  # about the fitted one
            period = 2 * np.pi if "ellip" + self._names[i][5:] not in self._names else np.pi
            turned = samples[..., i] - fits.params[here, None, i]
            turned = np.remainder(turned + 0.5 * period, period) - 0.5 * period
            offset[..., i] = turned - np.einsum("ns,ns->n", weights, turned)[:, None]
        cov = np.einsum("ns,nsp,nsq->npq", weights, offset, offset, optimize=True)
        fits.cov[here] = np.where(free | ~np.isfinite(fits.cov[here]), cov[:, :size, :size], 0.0)
        fits.background_cov[here] = cov[:, size:, size:]
        fits.flags[here] &= ~np.int32(FitFlag.BAD_COVARIANCE)


class MCMCFitter(_PosteriorFitter):
    """Posteriors by Markov chains, of all galaxies of a batch at once.

    Parameters
    ----------
    sampler : {"hmc", "emcee"}, optional
        ``"hmc"``: Hamiltonian trajectories, mixed with steps that are drawn from what is known
        of the posterior already; ``"emcee"``: ensembles of walkers (stretch and
        differential-evolution moves), where the posterior is bent or split.
    chains, draws : int, optional
        Chains of each galaxy and steps of each that are kept (``"emcee"``: walkers and steps).
    blocks : int, optional
        How often the chains may be run, each time twice as long, until they have converged.
    rhat, ess : float, optional
        What is asked: split R-hat of every parameter below, and effective sample size above
        this.  Galaxies that do not reach it are flagged CHAINS.
    n_samples : int, optional
        Draws that the result holds for each galaxy.
    rng : int or `numpy.random.Generator`, optional
        A seed; every galaxy has its own stream, so that a job that was stopped goes on the same.
    priors, noise, max_iter, max_shift, device, dtype, batch_size
        As for `MAPFitter`.  What has no prior is equally likely everywhere: positions in
        the stamp, radii in their logarithm up to twice the stamp, ellipticities and
        angles, and fluxes up to ten times what is seen.

    Notes
    -----
    ``params`` of the result are those of the maximum-posterior fit; `FitResult.posterior` has
    means and quantiles.  ``extra`` holds ``rhat``, ``ess`` and ``acceptance``.  Learned galaxies
    are sampled through functions that stand in for their posterior, three blocks at most, and
    every step is taken or not by the posterior itself (Christen & Fox 2005).  Hamiltonian
    trajectories (Duane et al. 1987) are of random length, in coordinates that importance
    sampling has made round; R-hat and effective sample size are those of Vehtari et al. (2021).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import MCMCFitter, SersicGalaxy2D, fit_images
    >>> truth = SersicGalaxy2D(flux=300, x_0=12, y_0=12, r_eff=3, n=1, ellip=0.3)
    >>> image = truth.render((25, 25)) + np.random.default_rng(1).normal(0, 0.5, (25, 25))
    >>> model = SersicGalaxy2D(psf=np.ones((1, 1)))
    >>> result = fit_images(image, model, MCMCFitter(rng=1), uncertainty=0.5)
    >>> result.posterior.sample(500, rng=2).shape
    (1, 500, 7)
    >>> bool(result.extra["rhat"][0] < 1.02)
    True
    """

    def __init__(
        self,
        *,
        sampler: str = "hmc",
        chains: int | None = None,
        draws: int | None = None,
        blocks: int = 5,
        rhat: float = 1.01,
        ess: float = 400.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if sampler not in ("hmc", "emcee"):
            raise ValueError(f"sampler must be 'hmc' or 'emcee', not {sampler!r}")
        self.sampler = sampler
        self.chains = int(chains or {"hmc": 4, "emcee": 32}[sampler])
        self.draws = int(draws or {"hmc": 500, "emcee": 800}[sampler])
        self.blocks, self.rhat, self.ess = int(blocks), float(rhat), float(ess)
        if self.chains < 2 or self.draws < 20 or self.blocks < 1:
            raise ValueError("at least two chains, 20 draws and one block are needed")

    def __repr__(self) -> str:
        return f"MCMCFitter(sampler={self.sampler!r}, n_samples={self.n_samples})"

    def provenance(self) -> dict[str, Any]:
        """What `FitResult.meta` should know."""
        return {"chains": self.chains if self.sampler == "hmc" else 1}

    def _sample(self, start: Any, seeds: Any) -> dict[str, np.ndarray]:
        from galmorph._sampling import ensembles, markov_chains

        asked = {"blocks": self.blocks, "rhat": self.rhat, "ess": self.ess, "keep": self.n_samples}
        if self.sampler == "emcee":
            return ensembles(start, walkers=self.chains, steps=self.draws, **asked)
        return markov_chains(start, chains=self.chains, draws=self.draws, **asked)

    def _check(self, fits, here, found, start, seeds) -> dict[str, np.ndarray]:
        bad = ~((found["rhat"] <= self.rhat) & (found["ess"] >= self.ess))
        fits.flags[here[bad]] |= FitFlag.CHAINS
        return {}


class ImportanceFitter(_PosteriorFitter):
    """Posteriors and evidence by importance sampling.

    Draws come from Student t distributions about the maximum-posterior fit (or, for learned
    galaxies, about what the encoder tells) and about other modes: of several components, those
    reached from other shapes; of a learned galaxy, the opposite direction.  With up to 16
    coordinates these are fitted to the posterior in a few rounds; those of learned galaxies are
    drawn from a function that stands in for the posterior, and is learned from some 200 images
    and their derivatives at each mode.  The draws are weighted by the posterior, and the largest
    weights smoothed; where they are too large, chains take over.

    Parameters
    ----------
    proposal : {"laplace", "encoder"}, optional
        Where draws come from; ``"encoder"`` only for learned galaxies, and without a fit.
    fallback : bool, optional
        Whether galaxies whose Pareto k is above 0.7 are sampled by `MCMCFitter` instead;
        otherwise they are flagged WEIGHTS, as those are for which that fails.  Chains of faint
        learned galaxies take a minute or more each and often fail: ``fallback=False`` says so
        at once.
    priors, noise, rng, n_samples, max_iter, max_shift, device, dtype, batch_size
        As for `MCMCFitter`.

    Notes
    -----
    ``extra`` of the result holds ``weights`` (equal ones after the fallback), ``khat`` (before
    it), ``ess``, and ``log_evidence`` with its standard error.  Pareto-smoothed importance
    sampling: Vehtari et al. 2024 (JMLR 25, 72); adaptive multiple importance sampling: Cornuet
    et al. 2012 (Scand. J. Stat. 39, 798).

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import ImportanceFitter, GaussianGalaxy2D, fit_images
    >>> truth = GaussianGalaxy2D(flux=300, x_0=12, y_0=12, r_eff=3, ellip=0.3)
    >>> image = truth.render((25, 25)) + np.random.default_rng(1).normal(0, 0.5, (25, 25))
    >>> model = GaussianGalaxy2D(psf=np.ones((1, 1)))
    >>> result = fit_images(image, model, ImportanceFitter(rng=1), uncertainty=0.5)
    >>> bool(result.extra["khat"][0] < 0.7)
    True
    """

    def __init__(self, *, proposal: str = "laplace", fallback: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if proposal not in ("laplace", "encoder"):
            raise ValueError(f"proposal must be 'laplace' or 'encoder', not {proposal!r}")
        self.proposal, self.fallback = proposal, bool(fallback)

    def __repr__(self) -> str:
        return f"ImportanceFitter(proposal={self.proposal!r}, n_samples={self.n_samples})"

    def _first(self, batch: StampBatch, model: GalaxyModel, background: str) -> StampFits:
        if self.proposal == "laplace":
            return super()._first(batch, model, background)
        encoder = EncoderFitter(
            max_shift=self.max_shift, device=self.device, batch_size=self.batch_size
        )
        return encoder.fit_stamps(batch, model, background=background)

    def _sample(self, start: Any, seeds: Any) -> dict[str, np.ndarray]:
        from galmorph._sampling import importance

        return importance(start, self.n_samples)

    def _check(self, fits, here, found, start, seeds) -> dict[str, np.ndarray]:
        from galmorph._sampling import _ADAPTABLE, KHAT, markov_chains

        bad = np.flatnonzero(~(found["khat"] <= KHAT))
        if not bad.size:
            return {}
        if not self.fallback:
            fits.flags[here[bad]] |= FitFlag.WEIGHTS
            return {}
        other = markov_chains(
            start.part(bad),
            chains=4,
            draws=500,
            # with many coordinates a block is long, and what it lacks is flagged
            blocks=5 if start.target.size <= _ADAPTABLE else 2,
            rhat=1.01,
            ess=400.0,
            keep=self.n_samples,
        )
        done = (other["rhat"] <= 1.01) & (other["ess"] >= 400)
        fits.flags[here[bad[~done]]] |= FitFlag.WEIGHTS | FitFlag.CHAINS
        samples, weights, ess = (found[n].copy() for n in ("samples", "weights", "ess"))
        samples[bad], ess[bad] = other["samples"], other["ess"]
        weights[bad] = 1.0 / weights.shape[1]
        return {"samples": samples, "weights": weights, "ess": ess}


class NestedFitter(_PosteriorFitter):
    """Posteriors and evidence by nested sampling with dynesty, one galaxy after the other.

    Slow (up to minutes a galaxy), and exact where all else is in doubt.  Needs dynesty.

    Parameters
    ----------
    live : int, optional
        Live points; the error of the evidence goes with one over the square root of their number.
    dlogz : float, optional
        Evidence that may be left.
    priors, noise, rng, n_samples, max_iter, max_shift, device, dtype, batch_size
        As for `MCMCFitter`.

    Notes
    -----
    Skilling 2006 (Bayesian Anal. 1, 833); Speagle 2020 (MNRAS 493, 3132).

    Examples
    --------
    >>> from galmorph import NestedFitter
    >>> NestedFitter(live=200)
    NestedFitter(live=200)
    """

    def __init__(self, *, live: int = 400, dlogz: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.live, self.dlogz = int(live), float(dlogz)

    def __repr__(self) -> str:
        return f"NestedFitter(live={self.live})"

    def _sample(self, start: Any, seeds: Any) -> dict[str, np.ndarray]:
        from galmorph._sampling import nested

        try:
            import dynesty  # noqa: F401
        except ImportError:
            raise ImportError(
                'NestedFitter needs dynesty: pip install "galmorph[nested]"'
            ) from None
        return nested(start, seeds, live=self.live, keep=self.n_samples, dlogz=self.dlogz)
