"""What galaxies are like where something else is known of them: redshift, magnitude, seeing ..."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy import units as u
from numpy.typing import ArrayLike

from galmorph._tensorfile import read_arrays, write_arrays
from galmorph.simulate import _arcsec, _each, scaling

if TYPE_CHECKING:
    from astropy.cosmology import FLRW

    from galmorph.results import FitResult

__all__ = [
    "ConditionalPrior",
    "RedshiftPosterior",
    "interpolate",
    "measurements",
    "redshift_posterior",
]

_KIND = "conditional prior"
_FOLDER = Path(__file__).parent / "pretrained"
_SUFFIX = ".conditional"
#: Numbers of galaxies, beside latents, that features may be.
_OBSERVED = ("ln_r_50", "magnitude")
#: Galaxies that go through the flow at once.
_FLOW_BATCH = 4096


class ConditionalPrior:
    r"""A density of latents, size and magnitude, given redshift or any other columns.

    Two neural spline flows: one of size and magnitude given the conditions, one of the latents
    given these and the conditions.  Any condition may be missing: the density is then
    marginal over it.

    Parameters
    ----------
    features : sequence of str
        What it is a density of: latents ``z0``, ``z1`` ..., ``ln_r_50`` (logarithm of the
        half-light semi-major axis in arcseconds) and ``magnitude``; others too, which the caller
        measures.
    conditions : sequence of str
        Names of the conditions.  ``redshift`` is special: sizes and magnitudes are then
        modelled in the galaxy's own frame (kiloparsecs, absolute magnitude for a flat
        spectrum), so that the cosmology need not be learned.
    transforms, hidden, bins : optional
        Of the flows, see `galmorph.nets.conditional.ConditionalFlow`.
    cosmology : str or `~astropy.cosmology.FLRW`, optional
        One that astropy knows by name; by default ``"Planck18"``.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.conditional import ConditionalPrior
    >>> rng = np.random.default_rng(1)
    >>> seeing = rng.uniform(0.5, 1.5, 600)
    >>> latents = rng.normal(seeing, 0.1)[:, None]
    >>> prior = ConditionalPrior(["z0"], ["seeing"], hidden=(16,), bins=4)
    >>> prior = prior.fit(latents, {"seeing": seeing}, epochs=15, rng=2)
    >>> float(prior.sample(500, {"seeing": 0.7}, rng=3).mean().round(1))
    0.7
    """

    def __init__(
        self,
        features: Sequence[str],
        conditions: Sequence[str],
        *,
        transforms: int = 2,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        cosmology: str | FLRW | None = None,
    ) -> None:
        for names, what in ((features, "features"), (conditions, "conditions")):
            if isinstance(names, str) or not len(names) or len(set(names)) != len(names):
                raise ValueError(f"{what} must be a list of different names, not {names!r}")
        self.features, self.conditions = tuple(features), tuple(conditions)
        self._options = {"transforms": transforms, "hidden": list(hidden), "bins": bins}
        self.cosmology = _named_cosmology(cosmology)
        first = [i for i, name in enumerate(self.features) if not _is_latent(name)]
        last = [i for i, name in enumerate(self.features) if _is_latent(name)]
        self._order = np.array(first + last)
        self._sizes = [len(part) for part in (first, last) if part]
        self._flow: Any = None
        self._scale: dict[str, np.ndarray] = {}
        #: What it was fitted to; kept in the file.
        self.metadata: dict[str, Any] = {}
        #: Mean log-likelihood in training and of held-out galaxies, for each epoch.
        self.history: list[tuple[float, float]] = []

    def __repr__(self) -> str:
        return (
            f"<ConditionalPrior of {len(self.features)} features given "
            f"{', '.join(self.conditions)}{'' if self._flow is not None else ', not fitted'}>"
        )

    @property
    def latents(self) -> tuple[str, ...]:
        """The features that are latents."""
        return tuple(name for name in self.features if _is_latent(name))

    # -- fitting -----------------------------------------------------------------------

    def fit(
        self,
        features: ArrayLike,
        conditions: Mapping[str, ArrayLike] | ArrayLike,
        *,
        cov: ArrayLike | None = None,
        log_prior: ArrayLike | None = None,
        draws: int = 24,
        at_once: int = 8,
        epochs: int = 40,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        drop: float = 0.2,
        held_out: float = 0.1,
        rng: np.random.Generator | int | None = None,
        report: Callable[[int, float, float], None] | None = None,
    ) -> ConditionalPrior:
        r"""Fit it to galaxies, whose errors are taken out.

        Parameters
        ----------
        features : array, shape (N, F) or (N, S, F)
            Of each galaxy, or S draws from its posterior (see `measurements`), in the order of
            ``features``.  Galaxies with a NaN are left out.
        conditions : mapping of str to array (N,), or array (N, C)
            NaN where missing; names that are absent are missing everywhere.
        cov : array, shape (N, F, F), optional
            Covariances, from which draws are made.
        log_prior : array, shape (N, S), optional
            Logarithm of the prior under which the posteriors were found, at the draws; 0 (flat)
            by default, and with ``cov`` standard normal for latents.
        draws : int, optional
            Draws from each covariance.
        at_once, epochs, batch_size, learning_rate, drop, held_out, report
            See `galmorph.nets.conditional.fit_conditional_flow`.
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        ConditionalPrior
            Itself.

        Raises
        ------
        ValueError
            If shapes do not agree, or there are fewer than ten galaxies for each feature.
        """
        import torch

        from galmorph.nets.conditional import ConditionalFlow, fit_conditional_flow

        rng = np.random.default_rng(rng)
        x = np.asarray(features, dtype=float)
        x = x[:, None] if x.ndim == 2 else x
        if x.ndim != 3 or x.shape[2] != len(self.features):
            raise ValueError(
                f"features must be of shape (N, {len(self.features)}) or (N, S, "
                f"{len(self.features)}), not {np.shape(features)}"
            )
        if cov is not None:
            x, log_prior = self._draw(x, np.asarray(cov, dtype=float), draws, rng)
        log_prior = np.zeros(x.shape[:2]) if log_prior is None else np.asarray(log_prior, float)
        if log_prior.shape != x.shape[:2]:
            raise ValueError(f"log_prior is of shape {log_prior.shape}, not {x.shape[:2]}")
        raw = self._table(conditions, (len(x),))
        use = np.isfinite(x).all((1, 2)) & ~np.isnan(log_prior).any(1)
        x, log_prior, raw = x[use], log_prior[use], raw[use]
        if len(x) < 10 * len(self.features):
            raise ValueError(f"{len(x)} galaxies are too few for {len(self.features)} features")

        self._scale = self._condition_scale(raw)
        x = x + self._shift(raw)[:, None]
        # by quantiles: one wild galaxy must not squeeze all others
        low, middle, high = np.quantile(x, [0.16, 0.5, 0.84], axis=(0, 1))
        wide = np.where(high > low, (high - low) / 2, x.std((0, 1)))
        self._scale |= {"loc": middle, "scale": wide.clip(1e-6)}
        white = ((x - self._scale["loc"]) / self._scale["scale"])[..., self._order]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            flow = ConditionalFlow(self._sizes, len(self.conditions), **self._options)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.history = fit_conditional_flow(
            flow,
            torch.as_tensor(white, dtype=torch.float32),
            torch.as_tensor(log_prior + np.log(self._scale["scale"]).sum(), dtype=torch.float32),
            torch.as_tensor(self._standard(raw), dtype=torch.float32),
            generator=generator,
            epochs=epochs,
            batch_size=batch_size,
            at_once=at_once,
            learning_rate=learning_rate,
            drop=drop,
            held_out=held_out,
            report=report,
        )
        self._flow = flow
        return self

    def _draw(self, x, cov, draws, rng) -> tuple[np.ndarray, np.ndarray]:
        """Draws (N, S, F) from normal posteriors, and their prior (N, S)."""
        if x.shape[1] != 1 or cov.shape != (len(x), x.shape[2], x.shape[2]):
            raise ValueError("cov, (N, F, F), goes with features of shape (N, F)")
        value, vector = np.linalg.eigh(np.nan_to_num(cov))
        root = vector * np.sqrt(value.clip(0))[:, None]
        x = x + np.einsum("nij,nsj->nsi", root, rng.standard_normal((len(x), draws, x.shape[2])))
        latent = [i for i, name in enumerate(self.features) if _is_latent(name)]
        return x, _standard_normal(x[..., latent])

    def _condition_scale(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        known = [raw[np.isfinite(raw[:, i]), i] for i in range(raw.shape[1])]
        for values, name in zip(known, self.conditions, strict=True):
            if len(values) < 2 or np.ptp(values) == 0:
                raise ValueError(f"the condition {name!r} must have at least two values")
        seen = [_stretched(v, n) for v, n in zip(known, self.conditions, strict=True)]
        return {
            "condition_loc": np.array([v.mean() for v in seen]),
            "condition_scale": np.array([v.std() for v in seen]),
            "range": np.array([[v.min(), v.max()] for v in known]),
            "reference": np.array([np.median(v) for v in known]),
        }

    # -- conditions --------------------------------------------------------------------

    def range(self, condition: str) -> tuple[float, float]:
        """Least and largest value of a condition in the training."""
        self._require_fit()
        low, high = self._scale["range"][self.conditions.index(condition)]
        return float(low), float(high)

    def _require_fit(self) -> None:
        if self._flow is None:
            raise ValueError("this prior is not fitted yet: call fit first")

    def _table(self, conditions: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Conditions (*shape, C); NaN where missing."""
        if conditions is None:
            conditions = {}
        if isinstance(conditions, Mapping):
            unknown = sorted(set(conditions) - set(self.conditions))
            if unknown:
                raise ValueError(
                    f"unknown condition {unknown[0]!r}; there are {', '.join(self.conditions)}"
                )
            columns = [np.asarray(conditions.get(n, np.nan), float) for n in self.conditions]
        else:
            array = np.asarray(conditions, dtype=float)
            if array.shape[-1:] != (len(self.conditions),):
                raise ValueError(
                    f"conditions must have {len(self.conditions)} columns, not {array.shape}"
                )
            columns = list(np.moveaxis(array, -1, 0))
        try:
            table = np.stack([np.broadcast_to(column, shape) for column in columns], -1)
        except ValueError:
            shapes = [c.shape for c in columns]
            raise ValueError(f"conditions {shapes} do not fit galaxies {shape}") from None
        if "redshift" in self.conditions:
            z = table[..., self.conditions.index("redshift")]
            if np.any(z <= 0):
                raise ValueError("redshifts must be positive (NaN where they are not known)")
        return table

    def _standard(self, raw: np.ndarray) -> np.ndarray:
        stretched = np.stack(
            [_stretched(raw[..., i], name) for i, name in enumerate(self.conditions)], -1
        )
        return (stretched - self._scale["condition_loc"]) / self._scale["condition_scale"]

    def _shift(self, raw: np.ndarray) -> np.ndarray:
        """What takes features to the frame of the galaxy, (..., F)."""
        shift = np.zeros((*raw.shape[:-1], len(self.features)))
        if "redshift" not in self.conditions:
            return shift
        i = self.conditions.index("redshift")
        z = np.where(np.isnan(raw[..., i]), self._scale["reference"][i], raw[..., i])
        size, flux = _rest_frame(z, self.cosmology.name)
        for name, amount in (("ln_r_50", size), ("magnitude", flux)):
            if name in self.features:
                shift[..., self.features.index(name)] = amount
        return shift

    # -- density -----------------------------------------------------------------------

    def log_prob(self, features: ArrayLike, conditions: Any = None) -> np.ndarray:
        """Logarithm of the density.

        Parameters
        ----------
        features : array, shape (..., F)
        conditions : mapping of str to array, or array (..., C), optional
            They broadcast to the galaxies; NaN or absent where missing.

        Returns
        -------
        array, shape (...)
            NaN where a feature is NaN.

        Raises
        ------
        ValueError
            If it is not fitted, shapes do not agree, or a condition is unknown.
        """
        self._require_fit()
        x = np.asarray(features, dtype=float)
        if x.shape[-1:] != (len(self.features),):
            raise ValueError(f"features must have {len(self.features)} columns, not {x.shape}")
        raw = self._table(conditions, x.shape[:-1])
        white = self._inwards(x, raw)
        good = np.isfinite(white).all(-1)
        values = self._run("log_prob", np.where(good[..., None], white, 0.0), self._standard(raw))
        values = values - np.log(self._scale["scale"]).sum()
        return np.where(good, values, np.nan)

    def sample(
        self, n: int, conditions: Any = None, rng: np.random.Generator | int | None = None
    ) -> np.ndarray:
        """Draw galaxies.

        Parameters
        ----------
        n : int
        conditions : mapping of str to number or array (n,), optional
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        array, shape (n, F)
        """
        self._require_fit()
        raw = self._table(conditions, (int(n),))
        white = np.random.default_rng(rng).standard_normal((int(n), len(self.features)))
        return self._outwards(self._run("unwhiten", white, self._standard(raw)), raw)

    def transport(self, features: ArrayLike, conditions_in: Any, conditions_out: Any) -> np.ndarray:
        """The same galaxies under other conditions: latents at the same place of the density.

        In the coordinates in which the latents of all galaxies of one size, luminosity and
        condition are standard normal, they are kept.  Size and magnitude change as the cosmology
        says, without a model of evolution.

        Parameters
        ----------
        features : array, shape (..., F)
        conditions_in, conditions_out : mapping or array
            As for `log_prob`.

        Returns
        -------
        array, shape (..., F)
        """
        self._require_fit()
        x = np.asarray(features, dtype=float)
        before = self._table(conditions_in, x.shape[:-1])
        after = self._table(conditions_out, x.shape[:-1])
        start = self._inwards(x, before)
        white = self._run("whiten", start, self._standard(before))
        first = len(self.features) - len(self.latents)
        known = np.full(start.shape, np.nan)
        known[..., :first] = start[..., :first]
        found = self._run("unwhiten", white, self._standard(after), known)
        return self._outwards(found, after)

    @property
    def shapes(self) -> _Shapes:
        """The latents alone: a ``population`` for `LearnedGalaxy2D.sample` with a condition."""
        return _Shapes(self)

    def _inwards(self, x: np.ndarray, raw: np.ndarray) -> np.ndarray:
        x = (x + self._shift(raw) - self._scale["loc"]) / self._scale["scale"]
        return x[..., self._order]

    def _outwards(self, white: np.ndarray, raw: np.ndarray) -> np.ndarray:
        x = np.empty_like(white)
        x[..., self._order] = white
        return x * self._scale["scale"] + self._scale["loc"] - self._shift(raw)

    def _run(self, what: str, white: np.ndarray, c: np.ndarray, *more: np.ndarray) -> np.ndarray:
        """A method of the flow on any shape, batch by batch."""
        import torch

        lead = white.shape[:-1]
        c = np.broadcast_to(c, (*lead, c.shape[-1]))
        flat = [a.reshape(-1, a.shape[-1]) for a in (white, c, *more)]
        parts = []
        with torch.no_grad():
            for start in range(0, max(len(flat[0]), 1), _FLOW_BATCH):
                rows = [
                    torch.tensor(a[start : start + _FLOW_BATCH], dtype=torch.float32) for a in flat
                ]
                parts.append(getattr(self._flow, what)(*rows).double().numpy())
        result = np.concatenate(parts)
        return result.reshape(*lead, *result.shape[1:])

    # -- files -------------------------------------------------------------------------

    def write(self, path: str | os.PathLike, *, half: bool = True) -> None:
        """Write it to a file (safetensors, with a header of text).

        Parameters
        ----------
        path : path-like
        half : bool, optional
            Keep the networks in 16 bits.
        """
        self._require_fit()
        arrays = {
            f"flow.{k}": (v.half() if half and v.is_floating_point() else v).numpy()
            for k, v in self._flow.state_dict().items()
        }
        arrays |= {f"scale.{k}": np.asarray(v) for k, v in self._scale.items()}
        about = {
            "features": self.features,
            "conditions": self.conditions,
            "cosmology": self.cosmology.name,
            **self._options,
        }
        header = {"config": about, "metadata": self.metadata}
        write_arrays(path, arrays, kind=_KIND, header=header)

    @classmethod
    def read(cls, path: str | os.PathLike) -> ConditionalPrior:
        """Read it from a file that `write` has written.

        Parameters
        ----------
        path : path-like

        Returns
        -------
        ConditionalPrior

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is another one, or damaged.
        """
        import torch

        from galmorph.nets.conditional import ConditionalFlow

        arrays, header = read_arrays(path, kind=_KIND)
        prior = cls(**header["config"])
        with torch.random.fork_rng(devices=[]):
            flow = ConditionalFlow(prior._sizes, len(prior.conditions), **prior._options)
        parts: dict[str, dict] = {"flow": {}, "scale": {}}
        for key, array in arrays.items():
            part, name = key.split(".", 1)
            parts[part][name] = array
        flow.load_state_dict({name: torch.as_tensor(a) for name, a in parts["flow"].items()})
        prior._flow = flow.eval().requires_grad_(False)
        prior._scale = parts["scale"]
        prior.metadata = header["metadata"]
        return prior

    @staticmethod
    @lru_cache(maxsize=4)
    def from_pretrained(name: str = "redshift") -> ConditionalPrior:
        """One that comes with galmorph.

        Parameters
        ----------
        name : str, optional
            ``"redshift"``: latents of `galmorph.LearnedGalaxy2D`, size and magnitude of
            nearby galaxies that were moved to other redshifts; its card says what it has seen.

        Returns
        -------
        ConditionalPrior

        Raises
        ------
        ValueError
            If there is none of this name.
        """
        path = _FOLDER / f"{name}{_SUFFIX}"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in _FOLDER.glob(f"*{_SUFFIX}"))) or "none"
            raise ValueError(f"there is no conditional prior {name!r}; installed: {names}")
        return ConditionalPrior.read(path)


class _Shapes:
    """Draws of the latents of a conditional prior."""

    def __init__(self, prior: ConditionalPrior) -> None:
        self._prior = prior

    def sample(
        self, n: int, conditions: Any = None, rng: np.random.Generator | int | None = None
    ) -> np.ndarray:
        """Latents, (n, d)."""
        prior = self._prior
        columns = [prior.features.index(name) for name in prior.latents]
        return prior.sample(n, conditions, rng)[:, columns]


def _is_latent(name: str) -> bool:
    return name[:1] == "z" and name[1:].isdigit()


def _stretched(values: np.ndarray, name: str) -> np.ndarray:
    """Redshifts as logarithms of 1 + z, all else as it is."""
    return np.log1p(values) if name == "redshift" else values


def _standard_normal(x: np.ndarray) -> np.ndarray:
    return -0.5 * (x**2 + np.log(2 * np.pi)).sum(-1)


def _named_cosmology(cosmology: Any) -> FLRW:
    import astropy.cosmology

    if cosmology is None:
        cosmology = "Planck18"
    if isinstance(cosmology, str):
        if cosmology not in astropy.cosmology.available:
            raise ValueError(f"astropy knows no cosmology {cosmology!r}")
        return getattr(astropy.cosmology, cosmology)
    if cosmology.name not in astropy.cosmology.available:
        raise ValueError("a cosmology must be one that astropy knows by name, so that it is kept")
    return cosmology


@lru_cache(maxsize=4)
def _distance_table(name: str) -> Any:
    """ln of the angular-diameter distance (Mpc) by ln z."""
    from scipy.interpolate import CubicSpline

    z = np.geomspace(1e-5, 30, 1000)
    distance = _named_cosmology(name).angular_diameter_distance(z).to_value(u.Mpc)
    return CubicSpline(np.log(z), np.log(distance))


def _rest_frame(z: np.ndarray, cosmology: str) -> tuple[np.ndarray, np.ndarray]:
    """What makes ln arcsec ln kpc, and magnitudes absolute (of a spectrum flat in frequency)."""
    ln_distance = _distance_table(cosmology)(np.log(z))
    kpc_per_arcsec = ln_distance + np.log(1000 * np.pi / 180 / 3600)
    modulus = 5 / np.log(10) * (ln_distance + 2 * np.log1p(z)) + 25
    return kpc_per_arcsec, -modulus + 2.5 * np.log10(1 + z)


# -- from fits -----------------------------------------------------------------------------


def measurements(
    result: FitResult,
    features: Sequence[str],
    *,
    pixel_scale: Any = None,
    zero_point: ArrayLike | None = None,
    n: int = 32,
    rng: np.random.Generator | int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the features of fitted galaxies, and the prior that the fits had.

    Parameters
    ----------
    result : FitResult
        Of a `LearnedGalaxy2D`.
    features : sequence of str
        Names of latents or other parameters, ``ln_r_50`` and ``magnitude``.
    pixel_scale : float, Quantity or array (N,), optional
        Arcseconds a pixel; needed for ``ln_r_50``.
    zero_point : float or array (N,), optional
        Magnitude of unit flux; needed for ``magnitude``.
    n : int, optional
        Draws for each galaxy, S.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    draws : array, shape (N, S, F)
        NaN where the fit failed.
    log_prior : array, shape (N, S)
        Of the latents, by the model's prior; flat in ``ln_r_50`` and in flux.  Infinite for draws
        without a magnitude (no flux), which so have no weight.

    Raises
    ------
    ValueError
        If a scale or zero point is missing, or a feature is not known.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import LearnedGalaxy2D, fit_images
    >>> from galmorph.conditional import measurements
    >>> model = LearnedGalaxy2D.from_pretrained(flux=1000, x_0=20, y_0=20, r_50=4)
    >>> result = fit_images(model.render((41, 41)), model, uncertainty=1.0)
    >>> draws, log_prior = measurements(
    ...     result, ["z0", "ln_r_50"], pixel_scale=0.2, n=50, rng=1
    ... )  # fmt: skip
    >>> draws.shape, bool(abs(draws[..., 1].mean() - np.log(0.8)) < 0.1)
    ((1, 50, 2), True)
    """
    count = len(result)
    params = result.sample(n, rng)
    at = {name: i for i, name in enumerate(result.param_names)}
    columns, log_prior = [], np.zeros(params.shape[:2])
    for name in features:
        if name in at:
            columns.append(params[..., at[name]])
        elif name == "ln_r_50" and "r_50" in at:
            if pixel_scale is None:
                raise ValueError("ln_r_50 needs pixel_scale, in arcseconds a pixel")
            scale = _each(_arcsec(pixel_scale, "pixel_scale"), count, "pixel_scale")
            radius = np.maximum(params[..., at["r_50"]], 1e-3)
            columns.append(np.log(radius * scale[:, None]))
        elif name == "magnitude":
            if zero_point is None:
                raise ValueError("magnitude needs zero_point, that of unit flux")
            flux = params[..., at["flux"]]
            dark = flux <= 0
            ln_flux = np.log(np.where(dark, 1.0, flux))
            zero = _each(zero_point, count, "zero_point")[:, None]
            columns.append(zero - 2.5 / np.log(10) * ln_flux)
            log_prior += np.where(dark, np.inf, ln_flux + np.log(np.log(10) / 2.5))
        else:
            raise ValueError(f"{type(result.model).__name__} has no {name!r}")
    latent_names = getattr(result.model, "latent_names", ())
    if any(name in latent_names for name in features):
        latents = params[..., [at[name] for name in latent_names]]
        missing = [i for i, name in enumerate(latent_names) if name not in features]
        latents[..., missing] = 0.0  # their prior is the same at every draw
        log_prior += result.model.prior.log_prob(latents)
    return np.stack(columns, -1), log_prior


class RedshiftPosterior:
    """p(redshift | image) of N galaxies on a grid.

    Attributes
    ----------
    grid : array, shape (G,)
    density : array, shape (N, G)
        Of integral one; NaN for galaxies whose fit failed.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.conditional import RedshiftPosterior
    >>> grid = np.linspace(0.01, 2, 400)
    >>> posterior = RedshiftPosterior(grid, -0.5 * ((grid - 1.0) / 0.1) ** 2)
    >>> posterior.mean.round(3), posterior.quantile([0.16, 0.84])[:, 0].round(1)
    (array([1.]), array([0.9, 1.1]))
    """

    def __init__(self, grid: ArrayLike, log_density: ArrayLike) -> None:
        self.grid = np.asarray(grid, dtype=float)
        log_density = np.atleast_2d(np.asarray(log_density, dtype=float))
        if self.grid.ndim != 1 or len(self.grid) < 2 or np.any(np.diff(self.grid) <= 0):
            raise ValueError("the grid must be one-dimensional and rise")
        if log_density.shape[1] != len(self.grid):
            raise ValueError(f"densities {log_density.shape} do not fit a grid of {len(self.grid)}")
        density = np.exp(log_density - log_density.max(1, keepdims=True))
        self.density = density / np.trapezoid(density, self.grid, axis=1)[:, None]
        steps = 0.5 * (self.density[:, 1:] + self.density[:, :-1]) * np.diff(self.grid)
        self._cdf = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, 1)], 1)

    def __len__(self) -> int:
        return len(self.density)

    def __repr__(self) -> str:
        return f"<RedshiftPosterior: {len(self)} galaxies, {self.grid[0]:g} to {self.grid[-1]:g}>"

    @property
    def mean(self) -> np.ndarray:
        """Mean redshift, (N,)."""
        return np.trapezoid(self.density * self.grid, self.grid, axis=1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, (N,)."""
        square = np.trapezoid(self.density * self.grid**2, self.grid, axis=1)
        return np.sqrt(np.maximum(square - self.mean**2, 0))

    def pdf(self, z: ArrayLike) -> np.ndarray:
        """Density at one redshift for each galaxy, (N,); 0 beyond the grid."""
        return self._at(z, self.density, 0.0)

    def cdf(self, z: ArrayLike) -> np.ndarray:
        """Probability below one redshift for each galaxy, (N,).

        At the true redshifts of galaxies, this is the probability integral transform: uniform
        where posteriors are calibrated.
        """
        return self._at(z, self._cdf, 1.0)

    def _at(self, z: ArrayLike, values: np.ndarray, right: float) -> np.ndarray:
        z = np.broadcast_to(np.asarray(z, dtype=float), (len(self),))
        return np.array(
            [np.interp(a, self.grid, v, 0.0, right) for a, v in zip(z, values, strict=True)]
        )

    def quantile(self, q: float | ArrayLike) -> np.ndarray:
        """Quantiles: (N,), or (len(q), N)."""
        found = np.full((np.size(q), len(self)), np.nan)
        for i in np.flatnonzero(np.isfinite(self._cdf).all(1)):
            found[:, i] = np.interp(np.ravel(q), self._cdf[i] / self._cdf[i, -1], self.grid)
        return found[0] if np.ndim(q) == 0 else found

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draws, (N, n)."""
        share = np.random.default_rng(rng).random((len(self), n))
        found = np.full(share.shape, np.nan)
        for i in np.flatnonzero(np.isfinite(self._cdf).all(1)):
            found[i] = np.interp(share[i], self._cdf[i] / self._cdf[i, -1], self.grid)
        return found


def redshift_posterior(
    result: FitResult,
    prior: ConditionalPrior,
    *,
    pixel_scale: Any = None,
    zero_point: ArrayLike | None = None,
    conditions: Mapping[str, ArrayLike] | None = None,
    grid: ArrayLike | None = None,
    redshift_prior: Callable[[np.ndarray], np.ndarray] | ArrayLike | None = None,
    n: int = 64,
    rng: np.random.Generator | int | None = None,
) -> RedshiftPosterior:
    r"""The redshift of galaxies from their images alone, as a posterior.

    By Bayes' theorem with the conditional prior, marginalised over what is known of each galaxy,

    .. math:: p(z | \mathrm{image}) \propto p(z)
        \int \frac{p(\mathrm{image} | \theta)}{p(\mathrm{image})}\, p(\theta | z)\, \mathrm{d}\theta
        \approx p(z)\, \frac1S \sum_s \frac{p(\theta_s | z)}{\pi(\theta_s)}

    with draws :math:`\theta_s` from the posterior of the fit, whose prior was :math:`\pi`.

    Parameters
    ----------
    result : FitResult
        Of a `LearnedGalaxy2D`, of the same weights as the prior's latents.
    prior : ConditionalPrior
        With ``redshift`` among its conditions.
    pixel_scale, zero_point
        See `measurements`.
    conditions : mapping of str to array (N,), optional
        What else is known of the galaxies.
    grid : array, shape (G,), optional
        Redshifts; by default 100 over the range of the training, even in ln(1 + z).
    redshift_prior : callable or array, shape (G,), optional
        Density of redshifts before the image is seen, up to a factor; by default uniform in z.
        It is that of galaxies that the prior describes, its selection included.
    n : int, optional
        Draws for each galaxy.
    rng : `numpy.random.Generator` or int, optional

    Returns
    -------
    RedshiftPosterior

    Raises
    ------
    ValueError
        If the prior knows no redshift, or what features need is missing.
    """
    if "redshift" not in prior.conditions:
        raise ValueError("the prior is not conditional on redshift")
    if "redshift" in (conditions or {}):
        raise ValueError("the redshift is what is asked for: it is no condition here")
    if grid is None:
        low, high = np.log1p(prior.range("redshift"))
        grid = np.expm1(np.linspace(low, high, 100))
    grid = np.asarray(grid, dtype=float)
    before = np.ones(len(grid))
    if redshift_prior is not None:
        before = np.asarray(redshift_prior(grid) if callable(redshift_prior) else redshift_prior)
    if before.shape != grid.shape or not (before >= 0).all() or not before.any():
        raise ValueError("the prior of redshifts must be positive and fit the grid")
    draws, log_prior = measurements(
        result, prior.features, pixel_scale=pixel_scale, zero_point=zero_point, n=n, rng=rng
    )
    known = {k: np.asarray(v, dtype=float).reshape(-1, 1) for k, v in (conditions or {}).items()}
    log_density = np.empty((len(result), len(grid)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for k, z in enumerate(grid):
            values = prior.log_prob(draws, known | {"redshift": z}) - log_prior
            log_density[:, k] = np.logaddexp.reduce(values, axis=1) + np.log(before[k])
    return RedshiftPosterior(grid, log_density)


def interpolate(
    result: FitResult,
    z_grid: ArrayLike,
    *,
    z_in: float,
    pixel_scale_in: Any,
    pixel_scale_out: Any,
    shape: tuple[int, int],
    zero_point_in: float | None = None,
    zero_point_out: float | None = None,
    prior: ConditionalPrior | None = None,
    evolution: ArrayLike = 0.0,
) -> np.ndarray:
    """One galaxy carried through redshift, for `galmorph.simulate.observe`.

    Its size and brightness are what the cosmology says.  Its shape is kept, or with
    a prior carried along: the latents stay at the same place among galaxies of that luminosity
    and size (`ConditionalPrior.transport`), whatever the prior has learned of how these change.

    Parameters
    ----------
    result : FitResult
        Of one galaxy, with a `LearnedGalaxy2D`.
    z_grid : array, shape (G,)
    z_in : float
        Its redshift.
    pixel_scale_in, pixel_scale_out : float or Quantity
        Arcseconds a pixel, of the fit and of the output.
    shape : tuple of int
        (ny, nx) of the images to come: the galaxy is put in the middle.
    zero_point_in, zero_point_out : float, optional
        Magnitude of unit flux; both or neither.  The former is needed for a prior of magnitudes.
    prior : ConditionalPrior, optional
    evolution : float or array, shape (G,), optional
        Magnitudes by which the galaxy is fainter at the redshifts of the grid.

    Returns
    -------
    array, shape (G, P)
        Parameters of the model.

    Raises
    ------
    ValueError
        If there is not one galaxy, its fit failed, or a zero point is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import LearnedGalaxy2D, fit_images
    >>> from galmorph.conditional import interpolate
    >>> from galmorph.simulate import observe
    >>> model = LearnedGalaxy2D.from_pretrained(flux=1000, x_0=20, y_0=20, r_50=5)
    >>> result = fit_images(model.render((41, 41)), model, uncertainty=1.0)
    >>> params = interpolate(
    ...     result, [0.1, 0.2, 0.4], z_in=0.05,
    ...     pixel_scale_in=0.4, pixel_scale_out=0.1, shape=(64, 64),
    ... )  # fmt: skip
    >>> observe(model, params=params, shape=(64, 64), noise=0.01, rng=1)
    <MockImages: 3 of (64, 64) pixels, 0 flagged>
    """
    if len(result) != 1 or bool(result.failed[0]):
        raise ValueError("interpolate takes one galaxy with a good fit: result[i]")
    if (zero_point_out is None) != (zero_point_in is None) and zero_point_out is not None:
        raise ValueError("zero_point_out needs zero_point_in")
    z = np.atleast_1d(np.asarray(z_grid, dtype=float))
    cosmology = None if prior is None else prior.cosmology
    size, flux = scaling(z_in, z, cosmology=cosmology, evolution=evolution)
    scale_in = float(_arcsec(pixel_scale_in, "pixel_scale_in"))
    size = size * scale_in / float(_arcsec(pixel_scale_out, "pixel_scale_out"))
    if zero_point_out is not None:
        flux = flux * 10 ** (0.4 * (zero_point_out - zero_point_in))
    at = {name: i for i, name in enumerate(result.param_names)}
    params = np.repeat(result.params, len(z), 0)
    params[:, at["flux"]] *= flux
    params[:, at["r_50"]] *= size
    params[:, [at["x_0"], at["y_0"]]] = (np.array(shape)[::-1] - 1) / 2
    if prior is not None:
        start = _features_at(result, prior, scale_in, zero_point_in)
        there = {"redshift": z}
        moved = prior.transport(
            np.repeat(start, len(z), 0), {"redshift": np.full(len(z), z_in)}, there
        )
        for name in prior.latents:
            params[:, at[name]] = moved[:, prior.features.index(name)]
    return params


def _features_at(result, prior, pixel_scale, zero_point) -> np.ndarray:
    """Features (1, F) at the fitted parameters."""
    from dataclasses import replace

    sure = replace(result, cov=np.zeros_like(result.cov), extra={})
    draws, _ = measurements(
        sure, prior.features, pixel_scale=pixel_scale, zero_point=zero_point, n=1, rng=0
    )
    return draws[:, 0]
