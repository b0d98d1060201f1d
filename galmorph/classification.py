"""Classes of galaxies without labels: mixtures of latents, in the manner of scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable

from galmorph._quadrature import normal_points
from galmorph.latents import Latents, measure_latents

__all__ = ["GalaxyClassifier", "choose_n_components"]

_KIND = "classes"
_FILE = Path(__file__).parent / "pretrained" / "default.classes"
_COVARIANCES = ("full", "tied", "diag", "spherical")
#: Points by which class probabilities are averaged over each posterior.
_POINTS = 64
_CHUNK = 4096


class GalaxyClassifier:
    r"""Classes of galaxies that look alike, found without labels.

    A mixture of normals describes the latents of the galaxies that it is fitted to; its components
    are the classes. Of an uncertain galaxy the probabilities are averaged over its posterior,

    .. math:: p(k | \mathrm{image}) = \int p(k | c)\, p(c | \mathrm{image})\, \mathrm{d}c .

    Flux, place, angle, companions, PSF and noise are no part of the latents (see
    `galmorph.latents.Morphology`) and so do not make classes.

    Parameters
    ----------
    n_components : int, optional
        Number of classes; `choose_n_components` helps.
    covariance_type : {"full", "tied", "diag", "spherical"}, optional
        Of the components.
    encoder : object, optional
        What measures the latents, as for `galmorph.latents.measure_latents`.
    n_init : int, optional
        Starts of the fit, of which the best is taken.
    reg_covar : float, optional
        Added to the diagonal of the covariances, in units of the variance of the latents.
    calibration : float, optional
        Fraction of the galaxies that is not fitted, but says how unlikely unlikely galaxies are.
    n_latents : int, optional
        How many of the leading latents make the classes, d; by default all. The classes that come
        with galmorph are of eight: `galmorph.latents.nearest` sees the others too.
    rng : Generator or int, optional
        For the starts and the choice of these galaxies.

    Attributes
    ----------
    weights_ : array, shape (K,)
    means_ : array, shape (K, d)
    covariances_ : array, shape (K, d, d)
    class_names : list of str
        May be set.
    bic_ : float
        Bayesian information criterion of the fit.

    Examples
    --------
    Classes that were found among galaxies of SDSS come with galmorph:

    >>> import numpy as np
    >>> from galmorph import GalaxyClassifier, SersicGalaxy2D
    >>> rng = np.random.default_rng(0)
    >>> galaxy = SersicGalaxy2D(flux=9000, x_0=31.5, y_0=31.5, r_eff=8, n=4, ellip=0.1)
    >>> stamps = galaxy.render((64, 64)) + rng.normal(0, 0.3, (2, 64, 64))
    >>> classifier = GalaxyClassifier.from_pretrained()
    >>> proba = classifier.predict_proba(stamps, uncertainty=0.3)
    >>> proba.shape == (2, classifier.n_components), proba.sum(1).round(6).tolist()
    (True, [1.0, 1.0])

    Your own, of latents of any kind:

    >>> from galmorph.latents import Latents
    >>> points = np.concatenate([rng.normal(0, 1, (200, 2)), rng.normal(8, 1, (100, 2))])
    >>> latents = Latents(points, np.zeros((300, 2)))
    >>> own = GalaxyClassifier(n_components=2, rng=1).fit(latents)
    >>> own.predict(np.array([[0.0, 0.0], [8.0, 8.0]])).tolist()
    [0, 1]
    """

    def __init__(
        self,
        n_components: int = 8,
        *,
        covariance_type: str = "full",
        encoder: Any = None,
        n_init: int = 5,
        reg_covar: float = 1e-3,
        calibration: float = 0.2,
        n_latents: int | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.encoder = encoder
        self.n_init = n_init
        self.reg_covar = reg_covar
        self.calibration = calibration
        self.n_latents = n_latents
        self.rng = rng

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, as scikit-learn asks for them."""
        names = "n_components covariance_type encoder n_init reg_covar calibration n_latents rng"
        return {name: getattr(self, name) for name in names.split()}

    def set_params(self, **params: Any) -> GalaxyClassifier:
        """Change parameters.

        Raises
        ------
        ValueError
            If there is no parameter of a name.
        """
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"GalaxyClassifier has no parameter {name!r}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        fitted = "" if hasattr(self, "weights_") else ", not fitted"
        return f"<GalaxyClassifier: {self.n_components} classes{fitted}>"

    # -- where it comes from -------------------------------------------------------------

    def fit(self, images: Any, **options: Any) -> GalaxyClassifier:
        """Find classes.

        Parameters
        ----------
        images : images, FitResult, Latents, or array (N, d)
            As for `galmorph.latents.measure_latents`; an array of two dimensions is
            taken for latents without uncertainty.
        **options
            ``uncertainty``, ``mask``, ``psf``, ``positions``, ``progress`` ... of the images.

        Returns
        -------
        GalaxyClassifier
            Itself. Galaxies without latents are left out.

        Raises
        ------
        ValueError
            If a parameter makes no sense or there are fewer galaxies than needed.
        """
        from sklearn.mixture import GaussianMixture

        self._check()
        latents = self._latents(images, options)
        values = latents.mean[latents.good]
        rng = np.random.default_rng(self.rng)
        order = rng.permutation(len(values))
        n_left = round(self.calibration * len(values))
        left, fitted = values[order[:n_left]], values[order[n_left:]]
        needed = 2 * self.n_components
        if len(fitted) < needed:
            raise ValueError(
                f"{self.n_components} classes need at least {needed} galaxies, not {len(fitted)}"
            )
        centre, width = fitted.mean(0), fitted.std(0)
        width[width == 0] = 1.0
        mixture = GaussianMixture(
            self.n_components,
            covariance_type=self.covariance_type,
            n_init=self.n_init,
            reg_covar=self.reg_covar,
            max_iter=500,
            random_state=int(rng.integers(2**31)),
        ).fit((fitted - centre) / width)
        order = np.argsort(-mixture.weights_, kind="stable")
        d = len(centre)
        covariances = np.broadcast_to(_full(mixture, d), (self.n_components, d, d))[order]
        self._set(
            weights=mixture.weights_[order],
            means=mixture.means_[order] * width + centre,
            covariances=covariances * np.multiply.outer(width, width),
        )
        self.bic_ = float(
            mixture.bic((fitted - centre) / width) + 2 * len(fitted) * np.log(width).sum()
        )
        self._reference = np.sort(self._log_density(left if n_left else fitted))
        return self

    def _check(self) -> None:
        if isinstance(self.n_components, bool) or int(self.n_components) != self.n_components:
            raise ValueError(f"n_components must be an integer, not {self.n_components!r}")
        if self.n_components < 1 or self.n_init < 1:
            raise ValueError("n_components and n_init must be at least 1")
        if self.covariance_type not in _COVARIANCES:
            raise ValueError(
                f"covariance_type must be one of {', '.join(_COVARIANCES)}, "
                f"not {self.covariance_type!r}"
            )
        if self.n_latents is not None and (
            isinstance(self.n_latents, bool) or int(self.n_latents) != self.n_latents
        ):
            raise ValueError(f"n_latents must be an integer or None, not {self.n_latents!r}")
        if not 0 <= self.calibration < 1:
            raise ValueError(f"calibration must be from 0 to below 1, not {self.calibration!r}")

    def _set(self, *, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
        self.weights_ = weights / weights.sum()
        self.means_, self.covariances_ = means, covariances
        self.class_names = [f"class {k}" for k in range(len(weights))]

    @classmethod
    def from_mixture(
        cls, weights: Any, means: Any, covariances: Any, *, encoder: Any = None
    ) -> GalaxyClassifier:
        """Classes that are the components of a mixture prior, as a `GalaxyVAE` may have learned it.

        Parameters
        ----------
        weights : array-like, (K,)
        means : array-like, (K, d)
        covariances : array-like, (K, d, d)
        encoder : object, optional
            What measures the latents, for example the network.

        Returns
        -------
        GalaxyClassifier

        Raises
        ------
        ValueError
            If the shapes do not agree, or a weight is negative.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GalaxyClassifier
        >>> c = GalaxyClassifier.from_mixture([1, 1], [[0.0], [4.0]], np.ones((2, 1, 1)))
        >>> c.predict(np.array([[0.3], [3.5]])).tolist()
        [0, 1]
        """
        weights, means, covariances = (
            np.asarray(a, dtype=float) for a in (weights, means, covariances)
        )
        k, d = means.shape
        if weights.shape != (k,) or covariances.shape != (k, d, d):
            raise ValueError("weights, means and covariances must be (K,), (K, d) and (K, d, d)")
        if np.any(weights < 0) or not weights.sum() > 0:
            raise ValueError("weights must not be negative, nor all zero")
        self = cls(k, encoder=encoder)
        self._set(weights=weights, means=means, covariances=covariances)
        self._reference = None
        return self

    @classmethod
    def from_pretrained(cls) -> GalaxyClassifier:
        """The classes that come with galmorph; their card is beside their file.

        Returns
        -------
        GalaxyClassifier
        """
        return cls.read(_FILE)

    def write(self, path: str | os.PathLike, *, metadata: dict[str, Any] | None = None) -> None:
        """Write the classes to a file, without the encoder.

        Parameters
        ----------
        path : path-like
        metadata : dict, optional
            What has to be known about them.
        """
        from galmorph._tensorfile import write_arrays

        self._require_fit()
        reference = np.zeros(0) if self._reference is None else self._reference
        arrays = {
            "weights": self.weights_,
            "means": self.means_,
            "covariances": self.covariances_,
            "reference": reference,
        }
        header = {
            "names": self.class_names,
            "n_latents": self.n_latents,
            "metadata": metadata or {},
        }
        write_arrays(path, arrays, kind=_KIND, header=header)

    @classmethod
    def read(cls, path: str | os.PathLike, *, encoder: Any = None) -> GalaxyClassifier:
        """Read classes that `write` has written.

        Parameters
        ----------
        path : path-like
        encoder : object, optional
            What measures the latents: that of the fit.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is another one, or damaged.
        """
        from galmorph._tensorfile import read_arrays

        arrays, header = read_arrays(path, kind=_KIND)
        self = cls.from_mixture(
            arrays["weights"], arrays["means"], arrays["covariances"], encoder=encoder
        )
        self.class_names = list(header["names"])
        self.n_latents = header.get("n_latents")  # files of the first version have none
        reference = arrays["reference"]
        self._reference = reference if len(reference) else None
        return self

    # -- what it says of galaxies ----------------------------------------------------------

    def predict_proba(self, images: Any, **options: Any) -> np.ndarray:
        """Probability of each class, averaged over the posterior of each galaxy.

        Parameters
        ----------
        images, **options
            As for `fit`.

        Returns
        -------
        array, shape (N, K)
            Rows sum to 1; NaN for a galaxy without latents. A galaxy's row does not depend on
            the others.
        """
        self._require_fit()
        latents = self._latents(images, options)
        proba = np.full((len(latents), len(self.weights_)), np.nan)
        rows = np.flatnonzero(latents.good)
        points = normal_points(_POINTS, latents.mean.shape[1])
        for start in range(0, len(rows), _CHUNK // len(points)):
            here = rows[start : start + _CHUNK // len(points)]
            part = latents[here]
            if not part.cov.any():
                proba[here] = self._responsibilities(part.mean)
                continue
            drawn = part.around(points)
            flat = self._responsibilities(drawn.reshape(-1, drawn.shape[-1]))
            proba[here] = flat.reshape(len(here), len(points), -1).mean(1)
        return proba

    def predict(self, images: Any, **options: Any) -> np.ndarray:
        """The most probable class of each galaxy, (N,); -1 for one without latents.

        Parameters
        ----------
        images, **options
            As for `fit`.
        """
        proba = self.predict_proba(images, **options)
        return np.where(np.isfinite(proba).all(1), np.nan_to_num(proba).argmax(1), -1)

    def score_samples(self, images: Any, **options: Any) -> np.ndarray:
        """Logarithm of the density of galaxies at each galaxy's latents, (N,).

        Parameters
        ----------
        images, **options
            As for `fit`.
        """
        self._require_fit()
        latents = self._latents(images, options)
        score = np.full(len(latents), np.nan)
        rows = np.flatnonzero(np.isfinite(latents.mean).all(1))
        score[rows] = self._log_density(latents.mean[rows])
        return score

    def outlier_probability(self, images: Any, **options: Any) -> np.ndarray:
        """How often a galaxy of the sample is as odd as each galaxy or odder, (N,).

        Parameters
        ----------
        images, **options
            As for `fit`.

        Returns
        -------
        array, shape (N,)
            The rank of its density among galaxies that were not fitted: uniform between 0
            and 1 for galaxies like those, near 0 for outliers (Vovk et al. 2005).

        Raises
        ------
        ValueError
            If the classes were not fitted to galaxies.
        """
        score = self.score_samples(images, **options)
        if self._reference is None:
            raise ValueError("these classes come from a mixture, not from a fit to galaxies")
        rank = np.searchsorted(self._reference, score, side="right")
        return np.where(np.isfinite(score), (rank + 1) / (len(self._reference) + 1), np.nan)

    def sample(
        self,
        n: int,
        *,
        classes: int | Sequence[int] | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw latents.

        Parameters
        ----------
        n : int
        classes : int or sequence of int, optional
            Only of these classes.
        rng : Generator or int, optional

        Returns
        -------
        latents : array, shape (n, d)
        classes : array of int, shape (n,)
        """
        self._require_fit()
        rng = np.random.default_rng(rng)
        weights = self.weights_.copy()
        if classes is not None:
            weights[np.setdiff1d(np.arange(len(weights)), np.atleast_1d(classes))] = 0.0
            if not weights.sum() > 0:
                raise ValueError(f"classes must be from 0 to {len(weights) - 1}, not {classes!r}")
        chosen = rng.choice(len(weights), n, p=weights / weights.sum())
        roots = np.linalg.cholesky(self.covariances_)
        noise = rng.standard_normal((n, self.means_.shape[1]))
        return self.means_[chosen] + np.einsum("nij,nj->ni", roots[chosen], noise), chosen

    # -- inside ----------------------------------------------------------------------------

    def _require_fit(self) -> None:
        if not hasattr(self, "weights_"):
            raise ValueError("this GalaxyClassifier was not fitted: call fit, or from_pretrained")

    def _latents(self, images: Any, options: dict[str, Any]) -> Latents:
        latents = _latents_of(images, self.encoder, self.n_latents, options)
        if hasattr(self, "means_") and latents.mean.shape[1] != self.means_.shape[1]:
            raise ValueError(
                f"the classes are of {self.means_.shape[1]} latents, not {latents.mean.shape[1]}"
            )
        return latents

    def _log_joint(self, values: np.ndarray) -> np.ndarray:
        """ln of weight times density of each component, (n, K)."""
        factors = np.linalg.cholesky(self.covariances_)
        out = np.empty((len(values), len(self.weights_)))
        half = 0.5 * values.shape[1] * np.log(2 * np.pi)
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights_)
        for k, (mean, factor) in enumerate(zip(self.means_, factors, strict=True)):
            white = np.linalg.solve(factor, (values - mean).T)
            log_det = np.log(np.diagonal(factor)).sum()
            out[:, k] = log_weights[k] - 0.5 * (white**2).sum(0) - log_det - half
        return out

    def _responsibilities(self, values: np.ndarray) -> np.ndarray:
        joint = self._log_joint(values)
        joint -= joint.max(1, keepdims=True)
        weight = np.exp(joint)
        return weight / weight.sum(1, keepdims=True)

    def _log_density(self, values: np.ndarray) -> np.ndarray:
        joint = self._log_joint(values)
        top = joint.max(1)
        return top + np.log(np.exp(joint - top[:, None]).sum(1))


def choose_n_components(
    images: Any,
    n_components: Iterable[int] = range(2, 13),
    *,
    n_resamplings: int = 5,
    covariance_type: str = "full",
    encoder: Any = None,
    n_latents: int | None = None,
    rng: np.random.Generator | int | None = None,
    **options: Any,
) -> QTable:
    """How well, and how surely, different numbers of classes describe galaxies.

    Parameters
    ----------
    images, **options
        As for `GalaxyClassifier.fit`.
    n_components : iterable of int, optional
        Numbers to try.
    n_resamplings : int, optional
        Bootstrap samples, each fitted again.
    covariance_type, encoder, n_latents : optional
        As for `GalaxyClassifier`.
    rng : Generator or int, optional

    Returns
    -------
    QTable
        ``n_components``, ``bic`` (lower is better), and ``stability``: the mean adjusted Rand index
        of all galaxies' classes between pairs of fits to bootstrap samples, 1 if they always agree,
        with its scatter ``stability_std``.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.classification import choose_n_components
    >>> rng = np.random.default_rng(0)
    >>> points = np.concatenate([rng.normal(at, 1, (100, 2)) for at in (0, 7, 14)])
    >>> table = choose_n_components(points, range(2, 5), rng=1)
    >>> int(table["n_components"][np.argmin(table["bic"])])
    3
    """
    from itertools import combinations

    from sklearn.metrics import adjusted_rand_score

    latents = _latents_of(images, encoder, n_latents, options)
    values = latents.mean[latents.good]
    rng = np.random.default_rng(rng)
    rows = []
    for k in n_components:
        settings = {"covariance_type": covariance_type, "calibration": 0.0, "n_init": 2}
        seed = int(rng.integers(2**31))
        bic = GalaxyClassifier(k, **settings, rng=seed).fit(values).bic_
        found = []
        for _ in range(n_resamplings):
            again = values[rng.integers(0, len(values), len(values))]
            fit = GalaxyClassifier(k, **settings, rng=int(rng.integers(2**31))).fit(again)
            found.append(fit._responsibilities(values).argmax(1))
        agree = [adjusted_rand_score(a, b) for a, b in combinations(found, 2)]
        rows.append(
            (k, bic, np.mean(agree) if agree else np.nan, np.std(agree) if agree else np.nan)
        )
    return QTable(rows=rows, names=["n_components", "bic", "stability", "stability_std"])


def _latents_of(
    images: Any, encoder: Any, n_latents: int | None, options: dict[str, Any]
) -> Latents:
    """Those that make classes, of images or of what holds latents."""
    if isinstance(images, np.ndarray) and images.ndim == 2 and not options:
        images = Latents(images, np.zeros(images.shape))
    latents = measure_latents(images, encoder=encoder, **options)
    return latents if n_latents is None else latents.leading(n_latents)


def _full(mixture: Any, d: int) -> np.ndarray:
    """Covariances (K, d, d), or (d, d) if tied, of a mixture of scikit-learn."""
    covariances = mixture.covariances_
    if mixture.covariance_type == "diag":
        return covariances[:, :, None] * np.eye(d)
    if mixture.covariance_type == "spherical":
        return covariances[:, None, None] * np.eye(d)
    return covariances
