"""What a fit knows of each galaxy: one interface to posteriors of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from galmorph.results import FitResult

__all__ = ["Derived", "Draws", "Posterior", "make_posterior"]

_BACKGROUND = ("background", "background_slope_x", "background_slope_y")
#: Draws from which quantiles of a normal approximation are taken.
_MANY = 4000


class Draws(Mapping):
    """Draws of the parameters of N galaxies: a mapping of names to arrays (N, n).

    Attributes
    ----------
    model : `~astropy.modeling.Model`
        The model that was fitted.
    array : array, shape (N, n, P)
        All parameters, in the order of ``names``.
    names : tuple of str
        Parameters of the model, then terms of the background.
    """

    def __init__(self, model: Any, names: tuple[str, ...], array: np.ndarray) -> None:
        self.model, self.names, self.array = model, names, array

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(f"{name!r}: there are {', '.join(self.names)}")
        return self.array[..., self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def params(self) -> np.ndarray:
        """Parameters of the model alone, (N, n, P)."""
        return self.array[..., : len(self.model.param_names)]


class Derived:
    """The posterior of a number that is derived from the parameters.

    Attributes
    ----------
    samples : array, shape (N, n)
    mean, std : array, shape (N,)

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.posterior import Derived
    >>> Derived(np.array([[1.0, 2.0, 3.0]])).quantile(0.5)
    array([2.])
    """

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = np.asarray(samples, dtype=float)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the draws, (N,)."""
        return self.samples.mean(1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the draws, (N,)."""
        return self.samples.std(1)

    def quantile(self, q: float | np.ndarray) -> np.ndarray:
        """Quantiles: (N,), or (len(q), N)."""
        return np.quantile(self.samples, q, axis=1)

    def __repr__(self) -> str:
        return f"<Derived: {self.samples.shape[0]} galaxies, {self.samples.shape[1]} draws>"


class Posterior:
    """The posterior of every galaxy of a result.

    Made by `FitResult.posterior`.  Angles are near the fitted ones (the same axis, or for
    learned galaxies the same direction): they may leave (-pi/2, pi/2].

    Attributes
    ----------
    kind : {"normal", "weighted", "draws"}
        A normal distribution (Laplace's approximation, or told by the encoder), draws with
        importance weights, or draws of Markov chains.
    param_names : tuple of str
        Parameters of the model, then terms of the background.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
    >>> posterior = fit_images(image, GaussianGalaxy2D(), uncertainty=1.0).posterior
    >>> posterior.sample(100, rng=1).shape
    (1, 100, 6)
    >>> low, high = posterior.quantile([0.16, 0.84])[:, 0, 0]
    >>> bool(low < 300 < high)
    True
    """

    kind = "normal"

    def __init__(self, result: FitResult) -> None:
        self._result = result
        terms = _BACKGROUND[: result.background.shape[1]]
        self.param_names = (*result.param_names, *terms)
        self._centre = np.concatenate([result.params, result.background], 1)

    def __len__(self) -> int:
        return len(self._result)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} galaxies, {len(self.param_names)} parameters>"

    # -- what a subclass says ----------------------------------------------------------

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw parameters.

        Parameters
        ----------
        n : int
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        array, shape (N, n, P)
            In the units of ``params``; NaN where a fit failed.
        """
        raise NotImplementedError

    @property
    def mean(self) -> np.ndarray:
        """Mean of the parameters, (N, P)."""
        raise NotImplementedError

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the parameters, (N, P, P)."""
        raise NotImplementedError

    def quantile(self, q: float | np.ndarray) -> np.ndarray:
        """Quantiles of each parameter: (N, P), or (len(q), N, P)."""
        raise NotImplementedError

    # -- what all share ----------------------------------------------------------------

    @property
    def std(self) -> np.ndarray:
        """Standard deviations of the parameters, (N, P)."""
        variance = np.diagonal(self.cov, axis1=1, axis2=2)
        return np.sqrt(np.where(variance >= 0, variance, np.nan))

    def log_prob(self, params: np.ndarray) -> np.ndarray:
        """Logarithm of the posterior density, by the likelihood of the pixels.

        Parameters
        ----------
        params : array, shape (N, P) or (N, n, P)
            With the background; fixed parameters are taken as they were fitted.

        Returns
        -------
        array, shape (N,) or (N, n)
            Up to a constant for each galaxy, or normalised where the evidence is known
            (`log_evidence` or the result of an `ImportanceFitter`); NaN where the fit failed.

        Raises
        ------
        ValueError
            If the result was read from a file, which holds no pixels.
        """
        from galmorph._sampling import log_posterior

        params = np.asarray(params, dtype=float)
        single = params.ndim == 2
        values = log_posterior(self._result, params[:, None] if single else params)
        evidence = self._result.extra.get("log_evidence")
        if evidence is not None:
            values = values - evidence[:, None]
        return values[:, 0] if single else values

    def derive(
        self,
        function: Callable[[Draws], np.ndarray],
        *,
        n: int = 400,
        rng: np.random.Generator | int | None = 0,
    ) -> Derived:
        """The posterior of anything that follows from the parameters.

        Parameters
        ----------
        function : callable
            Gets `Draws` of N galaxies and returns an array (N, n); `galmorph.derived` has
            aperture fluxes, half-light radii, concentrations and magnitudes.
        n : int, optional
            Draws.
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        Derived

        Raises
        ------
        ValueError
            If the function returns another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GaussianGalaxy2D, fit_images
        >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
        >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=1.0)
        >>> area = result.derive(lambda p: np.pi * p["r_eff"] ** 2 * (1 - p["ellip"]))
        >>> bool(abs(area.mean[0] - 9 * np.pi) < 3 * area.std[0])
        True
        """
        draws = Draws(self._result.model, self.param_names, self.sample(n, rng))
        values = np.asarray(function(draws), dtype=float)
        if values.shape != draws.array.shape[:2]:
            raise ValueError(
                f"the function must return an array of shape {draws.array.shape[:2]}, "
                f"not {values.shape}"
            )
        return Derived(values)

    def to_arviz(self, i: int = 0, *, n: int = 1000, rng: Any = 0) -> Any:
        """Draws of one galaxy as `arviz.InferenceData` (needs ArviZ).

        Parameters
        ----------
        i : int, optional
            Row of the galaxy.
        n : int, optional
            Draws, where there are no chains.
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        `arviz.InferenceData`

        Raises
        ------
        ImportError
            If ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError:
            raise ImportError('to_arviz needs ArviZ: pip install "galmorph[arviz]"') from None
        chains = self._chains(i, n, rng)
        values = {name: chains[..., k] for k, name in enumerate(self.param_names)}
        if hasattr(arviz, "from_dict"):
            try:
                return arviz.from_dict(posterior=values)
            except TypeError:  # ArviZ 1.0
                return arviz.from_dict({"posterior": values})
        raise ImportError("this version of ArviZ has no from_dict")

    def _chains(self, i: int, n: int, rng: Any) -> np.ndarray:
        """Draws of a galaxy (C, T, P)."""
        return self.sample(n, rng)[i][None]


class NormalPosterior(Posterior):
    """A normal distribution in coordinates that know no bounds.

    Radii and indices are normal in their logarithm, shares of the light in their logit, and
    an ellipticity with its angle in -ln(1 - ellip) (cos 2 theta, sin 2 theta).
    """

    def __init__(self, result: FitResult) -> None:
        super().__init__(result)
        self._map = _Unbounded(result.param_names, len(self.param_names))
        p = result.params.shape[1]
        cov = np.zeros((len(result), len(self.param_names), len(self.param_names)))
        cov[:, :p, :p] = result.cov
        cov[:, p:, p:] = result.background_cov
        cross = result.extra.get("cross_cov")
        if cross is not None:
            cov[:, :p, p:], cov[:, p:, :p] = cross, cross.transpose(0, 2, 1)
        self._cov = cov

    @property
    def mean(self) -> np.ndarray:
        return self._centre

    @property
    def cov(self) -> np.ndarray:
        return self._cov

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        rng = np.random.default_rng(rng)
        draws = rng.standard_normal((len(self), n, len(self.param_names)))
        usable = np.isfinite(self._cov).all((1, 2)) & np.isfinite(self._centre).all(1)
        cov = np.where(usable[:, None, None], self._cov, 0.0)
        centre = np.where(usable[:, None], self._centre, 0.5)
        middle, spread = self._map.moments(centre, cov)
        value, vector = np.linalg.eigh(spread)
        factor = vector * np.sqrt(np.clip(value, 0, None))[:, None]
        draws = self._map.back(middle[:, None] + draws @ factor.transpose(0, 2, 1), centre)
        draws[~usable] = np.nan
        return draws

    def quantile(self, q: float | np.ndarray) -> np.ndarray:
        return np.quantile(self.sample(_MANY, 0), q, axis=1)


class _Unbounded:
    """From parameters to coordinates without bounds, and back."""

    def __init__(self, names: tuple[str, ...], size: int) -> None:
        at = {name: i for i, name in enumerate(names)}
        positive = [n for n in names if n.startswith(("r_", "n_")) or n == "n"]
        self.positive = [at[n] for n in positive]
        self.share = [at[n] for n in names if n.endswith("_fraction")]
        self.pairs = [
            (at[n], at["theta" + n.removeprefix("ellip")])
            for n in names
            if n.startswith("ellip") and "theta" + n.removeprefix("ellip") in at
        ]
        self.size = size

    def moments(self, centre: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance in the coordinates, by the slopes at the centre."""
        middle = centre.copy()
        scale = np.ones_like(centre)
        turn = []
        for i in self.positive:
            safe = np.maximum(centre[:, i], 1e-6)
            middle[:, i], scale[:, i] = np.log(safe), 1.0 / safe
        for i in self.share:
            p = np.clip(centre[:, i], 0.01, 0.99)
            middle[:, i], scale[:, i] = np.log(p / (1 - p)), 1.0 / (p * (1 - p))
        for e, t in self.pairs:
            free = (cov[:, e, e] > 0) & (cov[:, t, t] > 0)
            q = np.clip(1.0 - centre[:, e], 0.005, None)
            g = np.maximum(-np.log(q), 0.0)
            along = np.sqrt(cov[:, e, e]) / q
            # a round galaxy has no angle: it is as uncertain across as along
            round_one = free & (g < along)
            across = np.where(round_one, along / np.sqrt(np.maximum(cov[:, t, t], 1e-30)), 2 * g)
            scale[:, e] = np.where(free, 1.0 / q, 1.0)
            scale[:, t] = np.where(free, across, 1.0)
            turn.append((e, t, free, g, round_one))
        spread = cov * scale[:, :, None] * scale[:, None]
        for e, t, free, g, round_one in turn:
            cut = np.ones_like(spread)
            cut[round_one, t, :] = cut[round_one, :, t] = 0.0
            cut[round_one, t, t] = 1.0
            spread = spread * cut
            cos, sin = np.cos(2 * centre[:, t]), np.sin(2 * centre[:, t])
            rotation = np.broadcast_to(np.eye(self.size), spread.shape).copy()
            rotation[free, e, e], rotation[free, e, t] = cos[free], -sin[free]
            rotation[free, t, e], rotation[free, t, t] = sin[free], cos[free]
            spread = rotation @ spread @ rotation.transpose(0, 2, 1)
            middle[:, e] = np.where(free, g * cos, centre[:, e])
            middle[:, t] = np.where(free, g * sin, centre[:, t])
        return middle, spread

    def back(self, u: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Parameters (N, n, P) of coordinates."""
        params = u.copy()
        for i in self.positive:
            params[..., i] = np.exp(np.clip(u[..., i], -20, 20))
        for i in self.share:
            params[..., i] = 1 / (1 + np.exp(-u[..., i]))
        for e, t in self.pairs:
            held = (np.ptp(u[..., e], axis=1) == 0) | (np.ptp(u[..., t], axis=1) == 0)
            g = np.hypot(u[..., e], u[..., t])
            angle = 0.5 * np.arctan2(u[..., t], u[..., e])
            near = centre[:, None, t] + _wrap(angle - centre[:, None, t], np.pi)
            params[..., e] = np.where(held[:, None], u[..., e], -np.expm1(-g))
            params[..., t] = np.where(held[:, None], u[..., t], near)
        return params


def _wrap(angle: np.ndarray, period: float) -> np.ndarray:
    return np.remainder(angle + 0.5 * period, period) - 0.5 * period


class DrawnPosterior(Posterior):
    """Draws, of equal weight or weighted."""

    def __init__(self, result: FitResult) -> None:
        super().__init__(result)
        samples = np.array(result.extra["samples"], dtype=float)
        names = result.param_names
        for axis, name in enumerate(("x_0", "y_0")):
            if name in names:
                samples[..., names.index(name)] += result.origin[:, None, axis]
        for i, name in enumerate(names):
            if name == "theta" or name.startswith("theta_"):
                period = 2 * np.pi if "ellip" + name.removeprefix("theta") not in names else np.pi
                middle = self._centre[:, None, i]
                samples[..., i] = middle + _wrap(samples[..., i] - middle, period)
        self._samples = samples
        weights = result.extra.get("weights")
        self.kind = "draws" if weights is None else "weighted"
        count = samples.shape[1]
        self._weights = np.full(samples.shape[:2], 1.0 / count) if weights is None else weights

    @property
    def samples(self) -> np.ndarray:
        """All draws, (N, S, P)."""
        return self._samples

    @property
    def weights(self) -> np.ndarray:
        """Weights of the draws, (N, S), of sum 1."""
        return self._weights

    @property
    def mean(self) -> np.ndarray:
        return np.einsum("ns,nsp->np", self._weights, self._samples)

    @property
    def cov(self) -> np.ndarray:
        offset = self._samples - self.mean[:, None]
        return np.einsum("ns,nsp,nsq->npq", self._weights, offset, offset, optimize=True)

    def quantile(self, q: float | np.ndarray) -> np.ndarray:
        if self.kind == "draws":
            return np.quantile(self._samples, q, axis=1)
        order = np.argsort(self._samples, axis=1)
        values = np.take_along_axis(self._samples, order, 1)
        share = np.take_along_axis(self._weights[..., None], order, 1).cumsum(1)
        share = share - 0.5 * np.take_along_axis(self._weights[..., None], order, 1)
        found = np.empty((np.size(q), *values.shape[::2]))
        for k, level in enumerate(np.ravel(q)):
            for i in np.ndindex(values.shape[0], values.shape[2]):
                found[(k, *i)] = np.interp(level, share[i[0], :, i[1]], values[i[0], :, i[1]])
        return found[0] if np.ndim(q) == 0 else found

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        rng = np.random.default_rng(rng)
        count = self._samples.shape[1]
        index = np.zeros((len(self), n), dtype=int)
        for i, weights in enumerate(self._weights):
            if not np.isfinite(weights).all() or weights.sum() <= 0:
                continue
            if self.kind == "draws" and n <= count:
                index[i] = rng.permutation(count)[:n]
            else:
                index[i] = rng.choice(count, n, p=weights / weights.sum())
        return np.take_along_axis(self._samples, index[..., None], 1)

    def _chains(self, i: int, n: int, rng: Any) -> np.ndarray:
        if self.kind == "weighted":
            return super()._chains(i, n, rng)
        chains = int(self._result.meta.get("chains", 1))
        samples = self._samples[i]
        keep = len(samples) // chains * chains
        return samples[:keep].reshape(chains, -1, samples.shape[1])


def make_posterior(result: FitResult) -> Posterior:
    """The posterior that belongs to a result; see `FitResult.posterior`.

    Parameters
    ----------
    result : FitResult

    Returns
    -------
    Posterior
    """
    return (DrawnPosterior if "samples" in result.extra else NormalPosterior)(result)
