"""Which of several models describes each galaxy, and which share of a sample each describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from astropy.table import QTable
from scipy.special import logsumexp

from galmorph.goodness import FittedBatch, batches
from galmorph.results import FitResult

__all__ = ["ModelComparison", "compare"]

_METHODS = ("importance", "laplace", "nested")
#: Quantities of a model and a galaxy, and what the columns of tables say of them.
_DESCRIPTIONS = {
    "log_likelihood": "ln of the likelihood of the fitted pixels",
    "chi2": "sum of squared residuals in units of the uncertainty",
    "reduced_chi2": "chi2 per degree of freedom",
    "n_params": "free parameters, of background and noise too",
    "aic": "Akaike's information criterion",
    "bic": "Bayesian information criterion",
    "held_out": "ln of the predictive density of the pixels that were not fitted",
    "log_evidence": "ln of the evidence",
    "log_evidence_err": "standard error of log_evidence",
    "probability": "posterior probability of the model",
}
#: Iterations that a Markov chain is given to forget its start.
_BURN_IN = 200


@dataclass(kw_only=True, eq=False, repr=False)
class ModelComparison:
    """M models of the same N galaxies: made by `compare`.

    ``comparison[rows]`` compares the models on some of the galaxies.

    Attributes
    ----------
    names : tuple of str
        The models, in the order of all columns.
    ids : array, shape (N,)
        Of the galaxies.
    snr : array, shape (N, M)
        Flux over its standard deviation; NaN for a model without ``flux``.
    log_likelihood : array, shape (N, M)
        Logarithm of the likelihood of the fitted pixels at the best fit.
    chi2 : array, shape (N, M)
        Sum of the squared residuals in units of the uncertainty.
    dof : array of int, shape (N, M)
        Fitted pixels less free parameters.
    n_params : array of int, shape (N, M)
        Free parameters, with those of the background and of the noise.
    n_pixels : array of int, shape (N,)
        Fitted pixels.
    held_out : array, shape (N, M)
        Logarithm of the predictive density of the pixels that were held out; NaN if none were.
    log_evidence, log_evidence_err : array, shape (N, M)
        Logarithm of the evidence and its standard error; NaN if it was not asked for, and the
        error for Laplace's approximation, of which it is not known.
    prior : array, shape (M,)
        Probability of each model before the data.
    meta : dict
        How all this was found.

    Notes
    -----
    Everything of a galaxy that a model failed to fit is NaN for that model, and its
    probabilities are NaN for all: a failed fit says nothing about the model.
    """

    names: tuple[str, ...]
    ids: np.ndarray
    snr: np.ndarray
    log_likelihood: np.ndarray
    chi2: np.ndarray
    dof: np.ndarray
    n_params: np.ndarray
    n_pixels: np.ndarray
    held_out: np.ndarray
    log_evidence: np.ndarray
    log_evidence_err: np.ndarray
    prior: np.ndarray
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<ModelComparison: {len(self)} galaxies, {', '.join(self.names)}>"

    def __getitem__(self, rows: Any) -> ModelComparison:
        """The same for some galaxies, by slice or array of indices or bool."""
        rows = np.atleast_1d(np.arange(len(self))[rows])
        whole = {"names", "prior", "meta"}
        parts = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in whole}
        return replace(self, **parts)

    @property
    def reduced_chi2(self) -> np.ndarray:
        """``chi2 / dof``, NaN where there are no degrees of freedom; shape (N, M)."""
        return np.where(self.dof > 0, self.chi2 / np.maximum(self.dof, 1), np.nan)

    @property
    def aic(self) -> np.ndarray:
        """Akaike's criterion, 2 k - 2 ln L (Akaike 1974); lower is better; shape (N, M)."""
        return 2.0 * self.n_params - 2.0 * self.log_likelihood

    @property
    def bic(self) -> np.ndarray:
        """Bayesian criterion, k ln n - 2 ln L (Schwarz 1978); lower is better; shape (N, M)."""
        n = np.maximum(self.n_pixels, 1)[:, None]
        return self.n_params * np.log(n) - 2.0 * self.log_likelihood

    @property
    def probability(self) -> np.ndarray:
        """Posterior probabilities of the models, of sum 1, by their evidence; shape (N, M)."""
        with np.errstate(divide="ignore"):
            weight = self.log_evidence + np.log(self.prior)
        return np.exp(weight - logsumexp(weight, axis=1, keepdims=True))

    @property
    def best(self) -> np.ndarray:
        """Name of the best model, shape (N,).

        It has the highest probability or, without evidences, the lowest BIC.  Empty where
        a fit failed.
        """
        score = self.probability if self._has_evidence else -self.bic
        known = np.isfinite(score).all(axis=1)
        names = np.array(self.names)
        return np.where(known, names[np.argmax(np.where(known[:, None], score, 0.0), axis=1)], "")

    @property
    def _has_evidence(self) -> bool:
        return self.meta.get("evidence") is not None

    def log_bayes_factor(self, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
        """Logarithm of the Bayes factor of model ``a`` over model ``b``.

        Parameters
        ----------
        a, b : str
            Names of models.

        Returns
        -------
        value, err : array, shape (N,)
            ln(Z_a / Z_b), and its standard error.

        Raises
        ------
        KeyError
            If there is no such model.
        ValueError
            If there are no evidences.
        """
        self._require_evidence()
        i, j = self.index(a), self.index(b)
        value = self.log_evidence[:, i] - self.log_evidence[:, j]
        return value, np.hypot(self.log_evidence_err[:, i], self.log_evidence_err[:, j])

    def index(self, name: str) -> int:
        """Column of a model.

        Parameters
        ----------
        name : str

        Returns
        -------
        int

        Raises
        ------
        KeyError
            If there is no such model.
        """
        if name not in self.names:
            raise KeyError(f"there is no model {name!r}; the models are {', '.join(self.names)}")
        return self.names.index(name)

    def _require_evidence(self) -> None:
        if not self._has_evidence:
            raise ValueError('no evidence was computed: compare(…, evidence="importance") does')

    def sample_fractions(
        self, *, draws: int = 4000, rng: np.random.Generator | int | None = 0
    ) -> QTable:
        """Which share of the sample each model describes.

        Every galaxy is taken to be of one of the models, with unknown shares f and a
        Dirichlet(1, …, 1) prior on them: the likelihood of f is
        prod_i sum_m f_m Z_im.  It is sampled by Gibbs' method (Diebolt & Robert
        1994, J. R. Statist. Soc. B 56, 363).  The shares take the place of ``prior``.

        Parameters
        ----------
        draws : int, optional
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        `~astropy.table.QTable`
            One row a model: ``model``, ``fraction`` and ``fraction_err`` (mean and standard
            deviation of the posterior), ``log_evidence`` and ``log_evidence_err`` (of the
            whole sample, if all galaxies were of this model).  ``meta["galaxies"]`` counts the
            galaxies with evidences of all models; the others are left out.

        Raises
        ------
        ValueError
            If there are no evidences, or of no galaxy.

        Notes
        -----
        Errors of the evidences are not in ``fraction_err``.
        """
        self._require_evidence()
        if draws < 2 or int(draws) != draws:
            raise ValueError(f"draws must be a whole number of 2 or more, not {draws!r}")
        rows = np.isfinite(self.log_evidence).all(axis=1)
        if not rows.any():
            raise ValueError("no galaxy has evidences of all models")
        shares = _sample_shares(self.log_evidence[rows], draws, np.random.default_rng(rng))
        table = QTable()
        table["model"] = self.names
        table["fraction"] = shares.mean(axis=0)
        table["fraction_err"] = shares.std(axis=0)
        table["log_evidence"] = self.log_evidence[rows].sum(axis=0)
        table["log_evidence_err"] = np.sqrt((self.log_evidence_err[rows] ** 2).sum(axis=0))
        table.meta.update(self.meta | {"galaxies": int(rows.sum())})
        return table

    def to_table(self) -> QTable:
        """Everything about each galaxy.

        Returns
        -------
        `~astropy.table.QTable`
            One row a galaxy: ``id``, ``best``, ``n_pixels``, and for each model
            ``<quantity>_<model>`` (``aic_Sersic``).  What was not computed
            is left out.
        """
        table = QTable()
        table["id"] = self.ids
        table["best"] = self.best
        table["n_pixels"] = self.n_pixels
        table["best"].info.description = "model of highest " + (
            "probability" if self._has_evidence else "-BIC"
        )
        table["n_pixels"].info.description = "fitted pixels"
        for quantity in self._known():
            values = getattr(self, quantity)
            for k, name in enumerate(self.names):
                table[f"{quantity}_{name}"] = values[:, k]
                table[f"{quantity}_{name}"].info.description = _DESCRIPTIONS[quantity]
        table.meta.update(self.meta)
        return table

    def summary(self) -> QTable:
        """The models side by side.

        Returns
        -------
        `~astropy.table.QTable`
            One row a model: ``model``, ``n_best`` (galaxies that it is best for), ``failed``
            (galaxies whose fit failed), means over the galaxies that all models fit
            (``reduced_chi2``, ``aic``, …), and, of these galaxies, the sums of ``held_out`` and
            ``log_evidence`` as ``total_…``.
        """
        good = np.isfinite(self.log_likelihood).all(axis=1)
        if self._has_evidence:
            good &= np.isfinite(self.log_evidence).all(axis=1)
        best = self.best
        table = QTable()
        table["model"] = self.names
        table["n_best"] = [int(np.count_nonzero(best == name)) for name in self.names]
        table["failed"] = np.count_nonzero(~np.isfinite(self.log_likelihood), axis=0)
        sums = {"held_out", "log_evidence"}
        for quantity in self._known():
            if quantity not in sums | {"log_evidence_err"}:
                values = getattr(self, quantity)[good]
                table[quantity] = values.mean(axis=0) if good.any() else [np.nan] * len(self.names)
                table[quantity].info.description = f"mean of: {_DESCRIPTIONS[quantity]}"
        for quantity in self._known():
            if quantity in sums:
                table[f"total_{quantity}"] = getattr(self, quantity)[good].sum(axis=0)
                table[f"total_{quantity}"].info.description = f"sum of: {_DESCRIPTIONS[quantity]}"
        table.meta.update(self.meta | {"galaxies": int(good.sum())})
        return table

    def _known(self) -> list[str]:
        """Quantities that were computed."""
        unknown = set()
        if not self._has_evidence:
            unknown |= {"log_evidence", "log_evidence_err", "probability"}
        if self.meta.get("held_out") is None:
            unknown.add("held_out")
        return [name for name in _DESCRIPTIONS if name not in unknown]


def _sample_shares(log_evidence: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (draws, M) of the shares of a mixture, given ln of the evidences (N, M)."""
    likelihood = np.exp(log_evidence - log_evidence.max(axis=1, keepdims=True))
    n, m = likelihood.shape
    share = np.full(m, 1.0 / m)
    kept = np.empty((draws, m))
    for k in range(-_BURN_IN, draws):
        below = np.cumsum(share * likelihood, axis=1)
        member = (rng.random(n)[:, None] * below[:, -1:] >= below).sum(axis=1)
        share = rng.dirichlet(1.0 + np.bincount(member, minlength=m))
        if k >= 0:
            kept[k] = share
    return kept


def compare(
    results: Mapping[str, FitResult],
    *,
    evidence: str | None = "importance",
    priors: Mapping[str, float] | None = None,
    draws: int = 0,
    rng: np.random.Generator | int | None = 0,
) -> ModelComparison:
    """Compare fits of the same pixels by several models.

    Parameters
    ----------
    results : mapping of str to FitResult
        Fits of the same galaxies, by the name of the model.
    evidence : {"importance", "laplace", "nested"} or None, optional
        How the evidences are found (`galmorph.evidence.log_evidence`); None: not at all.
    priors : mapping of str to float, optional
        How probable each model is before the data (they need not have the sum 1).  By
        default all the same.
    draws : int, optional
        Draws from the posterior over which the predictive density of held-out pixels is
        averaged; 0 takes the best fit.
    rng : `numpy.random.Generator` or int, optional
        For evidences and draws.

    Returns
    -------
    ModelComparison

    Raises
    ------
    TypeError
        If ``results`` is not a mapping of names to fits.
    ValueError
        If the fits can't be compared: of different galaxies, pixels, masks, uncertainties,
        noise models, units or held-out pixels, or read from files, which hold no pixels;
        or if an option is none of those above.

    Notes
    -----
    AIC and BIC take the likelihood at the best fit, which is that of highest posterior where
    there were priors.  BIC takes every pixel for an observation.

    The predictive density of held-out pixels is, with ``draws``, the pointwise
    sum_i ln [mean_s p(y_i | theta_s)] of Vehtari, Gelman & Gabry (2017, Statistics and
    Computing 27, 1413).  Of correlated noise each pixel counts given those before it.

    Evidences depend on the priors of the parameters; all models should have those that were
    meant.  What was estimated of the noise is held.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, SersicGalaxy2D, fit_images
    >>> from galmorph.comparison import compare
    >>> truth = SersicGalaxy2D(flux=900, x_0=15, y_0=16, r_eff=4, n=3)
    >>> images = truth.render((32, 32)) + np.random.default_rng(1).normal(0, 1, (3, 32, 32))
    >>> models = {"Gaussian": GaussianGalaxy2D(), "Sersic": SersicGalaxy2D()}
    >>> results = {k: fit_images(images, m, uncertainty=1.0) for k, m in models.items()}
    >>> comparison = compare(results, evidence=None)
    >>> print(comparison.best)
    ['Sersic' 'Sersic' 'Sersic']
    >>> comparison.summary()["model", "n_best"].pprint()
     model   n_best
    -------- ------
    Gaussian      0
      Sersic      3
    """
    results = _as_results(results)
    if evidence is not None and evidence not in _METHODS:
        raise ValueError(f"evidence must be one of {list(_METHODS)} or None, not {evidence!r}")
    if draws < 0 or int(draws) != draws:
        raise ValueError(f"draws must be a whole number, 0 or more, not {draws!r}")
    prior = _model_prior(priors, tuple(results))
    _check_comparable(results)
    first = next(iter(results.values()))
    generators = np.random.default_rng(rng).spawn(2 * len(results))
    shape = (len(first), len(results))
    found = {name: np.full(shape, np.nan) for name in ("log_likelihood", "held_out")}
    evidences = np.full((2, *shape), np.nan)
    for k, result in enumerate(results.values()):
        scores = _scores(result, draws, generators[2 * k])
        found["log_likelihood"][:, k], found["held_out"][:, k], n_pixels = scores
        if evidence is not None:
            from galmorph.evidence import log_evidence

            evidences[:, :, k] = log_evidence(result, method=evidence, rng=generators[2 * k + 1])
    return ModelComparison(
        names=tuple(results),
        ids=first.ids,
        snr=np.stack([_snr(r) for r in results.values()], axis=1),
        **found,
        chi2=np.stack([np.where(r.failed, np.nan, r.chi2) for r in results.values()], axis=1),
        dof=np.stack([r.dof for r in results.values()], axis=1),
        n_params=np.broadcast_to([_n_params(r) for r in results.values()], shape).copy(),
        n_pixels=n_pixels,
        log_evidence=evidences[0],
        log_evidence_err=evidences[1],
        prior=prior,
        meta=_provenance(results, evidence, draws, prior),
    )


# -- what may be compared ------------------------------------------------------------------


def _as_results(results: Any) -> dict[str, FitResult]:
    if not isinstance(results, Mapping):
        raise TypeError("results must be a mapping of names to fits, as {'Sersic': result, …}")
    for name, result in results.items():
        if not isinstance(name, str) or not isinstance(result, FitResult):
            raise TypeError(f"{name!r} must be a name of a FitResult, not {type(result).__name__}")
    if len(results) < 2:
        raise ValueError("there must be two models or more to compare")
    return dict(results)


def _model_prior(priors: Mapping[str, float] | None, names: tuple[str, ...]) -> np.ndarray:
    if priors is None:
        return np.full(len(names), 1.0 / len(names))
    if set(priors) != set(names):
        raise ValueError(f"priors are of {sorted(priors)}, the models are {sorted(names)}")
    prior = np.array([float(priors[name]) for name in names])
    if not (np.isfinite(prior).all() and np.all(prior >= 0) and prior.sum() > 0):
        raise ValueError("prior probabilities must be finite, not negative, and not all zero")
    return prior / prior.sum()


def _check_comparable(results: dict[str, FitResult]) -> None:
    """Refuse fits that are not of the same pixels under the same noise, and say why."""
    files = [name for name, result in results.items() if result.stamps is None]
    if files:
        raise ValueError(
            f"the results {files} were read from files, which hold no pixels: fit again to compare"
        )
    (name, first), *others = results.items()
    for other_name, other in others:
        pair = f"{name!r} and {other_name!r}"
        for what, (ours, theirs) in _setup(first, other).items():
            if ours != theirs:
                raise ValueError(f"{pair} differ in their {what}: {ours} and {theirs}")
        for what in ("ids", "shapes", "origin"):
            if not np.array_equal(getattr(first, what), getattr(other, what)):
                raise ValueError(f"{pair} differ in the {what} of their galaxies")
        _check_pixels(pair, first, other)


def _setup(first: FitResult, other: FitResult) -> dict[str, tuple[Any, Any]]:
    return {
        "number of galaxies": (len(first), len(other)),
        "unit": (first.data_unit, other.data_unit),
        "noise model": (repr(first.noise), repr(other.noise)),
        "held-out pixels": (first.meta.get("held_out"), other.meta.get("held_out")),
    }


def _check_pixels(pair: str, first: FitResult, other: FitResult) -> None:
    for ours in batches(first):
        theirs = FittedBatch(other, ours.rows)
        for what, a, b in (
            ("mask", ours.inv_sigma > 0, theirs.inv_sigma > 0),
            ("pixels", ours.data, theirs.data),
            ("uncertainty", ours.inv_sigma, theirs.inv_sigma),
            ("held-out pixels", ours.held_out, theirs.held_out),
        ):
            differs = (a != b).any(axis=(1, 2))
            if differs.any():
                index = first.ids[ours.rows[np.argmax(differs)]]
                raise ValueError(f"{pair} differ in the {what} of their stamps, as of id {index}")


# -- what is compared ----------------------------------------------------------------------


def _scores(
    result: FitResult, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln L of the fitted pixels, ln density of the held-out ones, and number of the former."""
    log_likelihood, held_out = np.full((2, len(result)), np.nan)
    n_pixels = np.zeros(len(result), dtype=int)
    for batch in batches(result):
        image = batch.image()
        n_pixels[batch.rows] = (batch.fitted > 0).sum(axis=(1, 2))
        log_likelihood[batch.rows] = batch.log_prob(image, batch.fitted).sum(axis=(1, 2))
        if result.meta.get("held_out") is not None:
            images = batch.drawn_images(draws, rng) if draws else [image]
            values = _log_mean(batch.log_prob(drawn, batch.inv_sigma) for drawn in images)
            held_out[batch.rows] = np.where(batch.held_out, values, 0.0).sum(axis=(1, 2))
    for values in (log_likelihood, held_out):
        values[result.failed] = np.nan  # a galaxy without any pixel too
    return log_likelihood, held_out, n_pixels


def _log_mean(maps: Iterable[np.ndarray]) -> np.ndarray:
    """Logarithm of the mean density, of maps of logarithms, without keeping them all."""
    total, count = -np.inf, 0
    for values in maps:
        with np.errstate(invalid="ignore"):  # NaN where a fit failed
            total, count = np.logaddexp(total, values), count + 1
    return total - np.log(count)


def _snr(result: FitResult) -> np.ndarray:
    nothing = np.full(len(result), np.nan)
    if "flux" not in result.param_names:
        return nothing
    k = result.param_names.index("flux")
    error = result.stds[:, k]
    return np.divide(result.params[:, k], error, out=nothing, where=error > 0)


def _n_params(result: FitResult) -> int:
    model = result.model
    free = sum(not (model.fixed[name] or model.tied[name]) for name in result.param_names)
    return free + result.background.shape[1] + len(result.noise.parameter_names)


def _provenance(
    results: dict[str, FitResult], evidence: str | None, draws: int, prior: np.ndarray
) -> dict[str, Any]:
    import galmorph

    first = next(iter(results.values()))
    return {
        "galmorph": galmorph.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {name: type(result.model).__name__ for name, result in results.items()},
        "fitters": {name: result.meta.get("fitter") for name, result in results.items()},
        "priors": {name: float(p) for name, p in zip(results, prior, strict=True)},
        "images": first.meta.get("images"),
        "noise": repr(first.noise),
        "held_out": first.meta.get("held_out"),
        "held_out_draws": draws,
        "evidence": evidence,
    }
