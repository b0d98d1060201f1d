"""Are the uncertainties right?  Fits of simulated galaxies, compared with the truth.

Galaxies are drawn from a prior, imaged with noise and fitted.  If the posteriors are right, the
truth is a draw from them: its rank among draws of the posterior is uniform, and an interval that
is said to hold 68 % of the probability holds the truth in 68 % of the galaxies.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy import units as u
from astropy.table import QTable

from galmorph.flags import FitFlag
from galmorph.priors import Prior, Truncated, Uniform
from galmorph.results import BACKGROUND_TERMS, _is_angle, _with_unit

if TYPE_CHECKING:
    from galmorph.models.base import GalaxyModel
    from galmorph.results import FitResult

__all__ = ["Calibration", "calibrate"]

_BACKGROUND = ("background", "background_slope_x", "background_slope_y")
#: Name of the rank of the whole parameter vector in tables.
JOINT = "joint"
#: Galaxies that are drawn at once.
_WINDOW = 100
#: Share of a normal distribution within one standard deviation.
_ONE_SIGMA = 0.682689492137086
#: Standard deviations of the median, and of half the central 68.27 % interval, of n draws of a
#: unit normal distribution, times the root of n.
_MEDIAN_ERROR, _WIDTH_ERROR = 1.2533, 1.0692


@dataclass(kw_only=True, eq=False, repr=False)
class Calibration:
    """Truth and posterior of N simulated galaxies; made by `calibrate` or `read`.

    Galaxies whose fit failed (`FitFlag.FAILED`, or no finite posterior) have no rank and are left
    out of all statistics; ``failed_fraction`` says how many they are.

    Attributes
    ----------
    param_names : tuple of str
        The P parameters that were fitted, and terms of the background.
    truth : array, shape (N, P)
        What was simulated; lengths in pixels, angles in radians.
    ranks : array of int, shape (N, P)
        How many of the ``draws`` of the posterior are below the truth; -1 where the fit failed.
        For angles: below the truth on the half turn about the fitted angle.  (A learned galaxy
        that is turned by half a turn has other signs of some latents; where a network has no
        such symmetry it is the full turn.)
    joint_ranks : array of int, shape (N,)
        How many draws are nearer to the mean than the truth, by the covariance of the posterior.
    pulls : array, shape (N, P)
        (mean - truth) / standard deviation; NaN where the fit failed.  The mean is that of
        ``result.posterior``, for `MAPFitter` the fitted values; angles as for ``ranks``.
    flags : array of int32, shape (N,)
        See `FitFlag`.
    draws : int
        Draws of each posterior, from which the ranks are.
    result : FitResult or None
        The fits; None if read from a file.
    meta : dict
        How it was made.

    Notes
    -----
    If the posteriors are right, ranks are uniform over the integers from 0 to ``draws``
    (simulation-based calibration; Talts et al. 2018, arXiv:1804.06788).  A histogram of ranks
    like a U means posteriors that are too narrow, like a hill too wide, and a slope means a
    bias.  The joint rank sees the correlations, to which those of single parameters are blind;
    for a normal posterior it is that of the highest density (Hermans et al. 2022,
    arXiv:2110.06581).

    Examples
    --------
    >>> from galmorph import GaussianGalaxy2D, Normal
    >>> from galmorph.calibration import calibrate
    >>> model = GaussianGalaxy2D(r_eff=3, ellip=0.4)
    >>> found = calibrate(model, prior={"flux": Normal(900, 20)}, shape=(32, 32), n=40)
    >>> found
    <Calibration: 40 galaxies, 6 parameters, 0 failed>
    >>> found.ranks.shape
    (40, 6)
    """

    param_names: tuple[str, ...]
    truth: np.ndarray
    ranks: np.ndarray
    joint_ranks: np.ndarray
    pulls: np.ndarray
    flags: np.ndarray
    draws: int
    result: FitResult | None = None
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.truth)

    def __repr__(self) -> str:
        return (
            f"<Calibration: {len(self)} galaxies, {len(self.param_names)} parameters, "
            f"{len(self) - int(self.used.sum())} failed>"
        )

    @property
    def used(self) -> np.ndarray:
        """True where there is a posterior to compare with, shape (N,)."""
        return self.joint_ranks >= 0

    @property
    def failed_fraction(self) -> float:
        """Fraction of the galaxies that are left out, because their fit failed."""
        return float(1 - self.used.mean())

    # -- statistics --------------------------------------------------------------------

    def rank_counts(self, bins: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Histograms of the ranks.

        Parameters
        ----------
        bins : int, optional
            By default one for every 20 galaxies, from 2 to 20.

        Returns
        -------
        counts : array of int, shape (P + 1, bins)
            Of each parameter, and in the last row of the joint rank.
        probability : array, shape (bins,)
            Of each bin, if the posteriors are right.  Bins hold nearly, but not always exactly,
            the same number of possible ranks.

        Raises
        ------
        ValueError
            If there are fewer than 2 bins or more than possible ranks, or all fits failed.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph.calibration import Calibration
        >>> ranks = np.arange(100)[:, None]
        >>> found = Calibration(
        ...     param_names=("flux",),
        ...     truth=ranks,
        ...     ranks=ranks,
        ...     pulls=ranks,
        ...     joint_ranks=ranks[:, 0],
        ...     flags=0 * ranks[:, 0],
        ...     draws=99,
        ... )
        >>> found.rank_counts(4)[0]
        array([[25, 25, 25, 25],
               [25, 25, 25, 25]])
        """
        number = self._number()
        possible = self.draws + 1
        if bins is None:
            bins = min(int(np.clip(number // 20, 2, 20)), possible)
        if int(bins) != bins or not 2 <= bins <= possible:
            raise ValueError(f"bins must be an integer from 2 to {possible}, not {bins!r}")
        share = np.arange(possible) * int(bins) // possible
        counts = [np.bincount(share[ranks], minlength=int(bins)) for ranks in self._all_ranks().T]
        return np.array(counts), np.bincount(share) / possible

    def rank_test(self, bins: int | None = None) -> QTable:
        """Chi-square test of uniform ranks.

        Parameters
        ----------
        bins : int, optional
            As for `rank_counts`.

        Returns
        -------
        `~astropy.table.QTable`
            ``parameter`` (the last is ``joint``), ``chi2``, ``dof`` and ``p_value``, the
            probability of a chi-square as large or larger by chance.  One in a hundred
            parameters has p < 0.01 by chance.

        Raises
        ------
        ValueError
            As `rank_counts`.
        """
        from scipy.stats import chi2

        counts, probability = self.rank_counts(bins)
        expected = self._number() * probability
        value = ((counts - expected) ** 2 / expected).sum(1)
        dof = len(probability) - 1
        table = QTable({"parameter": [*self.param_names, JOINT], "chi2": value})
        table["dof"] = dof
        table["p_value"] = chi2.sf(value, dof)
        return table

    def coverage(self, levels: Sequence[float] = (0.5, 0.68, 0.9, 0.95)) -> QTable:
        """How often intervals of the posterior hold the truth.

        Parameters
        ----------
        levels : sequence of float, optional
            Probabilities of the intervals, between 0 and 1.

        Returns
        -------
        `~astropy.table.QTable`
            One row for each parameter and level: ``parameter``, ``level``, ``coverage``, the
            fraction of the galaxies whose truth lies in the central interval, and ``error``, the
            (binomial) standard deviation of this fraction if the posteriors are right.  For
            ``joint`` it is the ellipsoid about the mean.

        Raises
        ------
        ValueError
            If a level is not between 0 and 1, or all fits failed.
        """
        levels = np.atleast_1d(np.asarray(levels, dtype=float))
        if levels.ndim != 1 or not np.all((levels > 0) & (levels < 1)):
            raise ValueError("levels must be between 0 and 1")
        number = self._number()
        central = np.stack([0.5 - 0.5 * levels, 0.5 + 0.5 * levels])
        nearest = np.stack([np.zeros_like(levels), levels])
        ranks = self._all_ranks()
        names = [*self.param_names, JOINT]
        found = [
            self._share_within(ranks[:, k], nearest if name == JOINT else central)
            for k, name in enumerate(names)
        ]
        return QTable(
            {
                "parameter": np.repeat(names, len(levels)),
                "level": np.tile(levels, len(names)),
                "coverage": np.concatenate(found),
                "error": np.tile(np.sqrt(levels * (1 - levels) / number), len(names)),
            }
        )

    def to_table(self) -> QTable:
        """Summary: one row a parameter.

        Returns
        -------
        `~astropy.table.QTable`
            ``parameter``; ``bias``, the median of the pulls; ``scatter``, half of the interval
            that holds the central 68.27 % of them, which is 1 if the standard deviations are
            right; ``coverage_68`` of central intervals; each with its standard deviation for
            right posteriors (``bias_err``, ...); and ``p_value`` of `rank_test`.  ``meta`` says
            how it was made and what fraction failed.

        Raises
        ------
        ValueError
            If all fits failed.

        Examples
        --------
        >>> from galmorph import GaussianGalaxy2D
        >>> from galmorph.calibration import calibrate
        >>> model = GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.4)
        >>> table = calibrate(model, prior={}, shape=(32, 32), n=40).to_table()
        >>> table["parameter"].tolist()
        ['flux', 'x_0', 'y_0', 'r_eff', 'ellip', 'theta', 'joint']
        >>> bool(abs(table["bias"][0]) < 5 * table["bias_err"][0])
        True
        """
        root = np.sqrt(self._number())
        pulls = self.pulls[self.used]
        low, middle, high = np.percentile(
            pulls, [50 - 50 * _ONE_SIGMA, 50, 50 + 50 * _ONE_SIGMA], axis=0
        )
        coverage = self.coverage([0.68])
        table = QTable({"parameter": [*self.param_names, JOINT]})
        table["bias"] = np.append(middle, np.nan)
        table["bias_err"] = _MEDIAN_ERROR / root
        table["scatter"] = np.append(0.5 * (high - low), np.nan)
        table["scatter_err"] = _WIDTH_ERROR / root
        table["coverage_68"] = coverage["coverage"]
        table["coverage_68_err"] = coverage["error"]
        table["p_value"] = self.rank_test()["p_value"]
        for name in table.colnames[1:]:
            table[name].info.format = ".2g" if name == "p_value" else ".3f"
        table.meta.update(self.meta)
        table.meta["failed_fraction"] = self.failed_fraction
        return table

    def _number(self) -> int:
        number = int(self.used.sum())
        if number == 0:
            raise ValueError("not one galaxy could be fitted: there is nothing to compare")
        return number

    def _all_ranks(self) -> np.ndarray:
        return np.column_stack([self.ranks, self.joint_ranks])[self.used]

    def _share_within(self, ranks: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Mean share of each rank's own interval within ``edges`` (2, levels) of probability.

        Rank r stands for probabilities from r to r + 1 of draws + 1, so that the coverage of
        right posteriors is the level itself for any number of draws.
        """
        low, high = edges[:, :, None] * (self.draws + 1)
        inside = np.minimum(ranks + 1, high) - np.maximum(ranks, low)
        return np.clip(inside, 0, 1).mean(1)

    # -- files -------------------------------------------------------------------------

    def write(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write to an ECSV file, from which `read` makes the same (without the fits).

        Parameters
        ----------
        path : path
        overwrite : bool, optional
            Whether a file of that name may be replaced.

        Raises
        ------
        OSError
            If the file exists and ``overwrite`` is false, or cannot be written.
        """
        table = QTable({"flags": self.flags, "joint_rank": self.joint_ranks})
        for k, name in enumerate(self.param_names):
            table[f"{name}_true"] = _with_unit(self.truth[:, k], _unit(name))
            table[f"{name}_rank"] = self.ranks[:, k]
            table[f"{name}_pull"] = self.pulls[:, k]
        own = {"param_names": list(self.param_names), "draws": self.draws}
        table.meta.update(self.meta | {"calibration": own})
        table.write(path, format="ascii.ecsv", overwrite=overwrite)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Calibration:
        """Read what `write` wrote.

        Parameters
        ----------
        path : path

        Returns
        -------
        Calibration
            ``result`` is None.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is another table.
        """
        table = QTable.read(path, format="ascii.ecsv")
        meta = dict(table.meta)
        own = meta.pop("calibration", None)
        if own is None:
            raise ValueError(f"{path} is no calibration")
        names = tuple(own["param_names"])

        def columns(kind: str) -> np.ndarray:
            return np.column_stack([np.asarray(table[f"{name}_{kind}"]) for name in names])

        return cls(
            param_names=names,
            truth=columns("true"),
            ranks=columns("rank"),
            joint_ranks=np.asarray(table["joint_rank"]),
            pulls=columns("pull"),
            flags=np.asarray(table["flags"]),
            draws=int(own["draws"]),
            meta=meta,
        )


def calibrate(
    model: GalaxyModel,
    fitter: Any = None,
    *,
    prior: Mapping[str, Prior],
    psf: Any = None,
    noise: float | np.ndarray | Callable = 1.0,
    noise_model: Any = None,
    shape: tuple[int, int] = (64, 64),
    snr: float | Prior | None = None,
    background: str = "none",
    n: int = 1000,
    draws: int = 199,
    rng: np.random.Generator | int | None = 0,
    progress: bool | Callable[[int, int], None] = False,
) -> Calibration:
    """Fit simulated galaxies and compare the posteriors with the truth.

    Parameters
    ----------
    model : GalaxyModel
        What is drawn and fitted, with its constraints.
    fitter : fitter with a method ``fit_stamps``, optional
        By default ``MAPFitter()``.  If it takes ``priors`` and has none, a copy of it gets
        ``prior`` (but for flat priors of a whole turn, which need no bounds); a fitter with
        priors keeps its own.
    prior : mapping of str to prior
        What the galaxies are like, by parameter name or term of the background
        (``background``, ``background_slope_x``, ``background_slope_y``), within the bounds of the
        model; see `galmorph.priors`.  Not named are: the centre, within half a pixel of the
        middle of the stamp; latents, from ``model.prior``; the background, 0; all others, the
        model's own values.
    psf : PSF, array, or model, optional
        By default the model's own.
    noise : float, array of shape (ny, nx), or callable, optional
        Standard deviation of Gaussian noise, or ``noise(images, rng) -> (data, uncertainty)``,
        which gets noiseless images (n, ny, nx) with the background.
    noise_model : NoiseModel, optional
        What the fit takes the noise to be, in place of the fitter's own.
    shape : tuple of int, optional
        (ny, nx) of the stamps.
    snr : float or prior, optional
        Matched-filter S/N of the galaxies, sqrt(sum of (image / sigma)²), which sets their flux
        in place of ``prior["flux"]``.
    background : {"none", "constant", "tilted"}, optional
        Fitted under each galaxy.
    n : int, optional
        Galaxies.
    draws : int, optional
        Draws of each posterior; ranks have one value more, which bins share evenly where it is
        a round number.
    rng : `numpy.random.Generator` or int, optional
        Of everything that is drawn here; samplers have their own.
    progress : bool or callable, optional
        As for `fit_images`.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        If arguments are not what is described above.

    Notes
    -----
    Ranks are exactly uniform where galaxies are drawn from the prior with which they are fitted
    (Talts et al. 2018, arXiv:1804.06788).  With ``snr``, the flux that is simulated depends on
    the other parameters, so that no prior of the fit is the same; it tells the more, the lower
    the S/N.  A parameter that is free in the fit but the same in all galaxies is, likewise, not
    distributed as the fit assumes; that of a position, which has no preferred value, is no harm.

    Examples
    --------
    >>> from galmorph import GaussianGalaxy2D, LogUniform, Uniform
    >>> from galmorph.calibration import calibrate
    >>> prior = {"r_eff": LogUniform(2, 5), "ellip": Uniform(0.2, 0.6)}
    >>> found = calibrate(
    ...     GaussianGalaxy2D(), prior=prior, snr=100, shape=(40, 40), n=100, draws=100, rng=1
    ... )
    >>> bool(min(found.rank_test()["p_value"]) > 1e-4)
    True
    """
    from galmorph.images import fit_images

    names = _check(model, prior, noise, noise_model, snr, background, n, draws)
    ny, nx = shape = _shape(shape)
    if not callable(noise):
        noise = np.broadcast_to(np.asarray(noise, dtype=float), shape)
    fitter = _fitter_with(fitter, model, prior, noise_model)
    rng = np.random.default_rng(rng)
    truth = _draw_truth(model, names, prior, shape, n, rng)
    if snr is not None:
        _set_flux(truth, model, psf, noise, _draw(snr, n, rng))
    clean = _images(truth, model, psf, shape)
    data, uncertainty = _add_noise(clean, noise, rng)
    result = fit_images(
        data,
        model,
        fitter,
        uncertainty=uncertainty,
        psf=psf,
        background=background,
        progress=progress,
    )
    meta = {key: result.meta[key] for key in ("galmorph", "date", "model", "fitter", "background")}
    meta["shape"] = [ny, nx]
    meta["prior"] = {name: repr(one) for name, one in prior.items()}
    if snr is not None:
        meta["snr"] = snr if np.isscalar(snr) else repr(snr)
    return _compare(truth, result, int(draws), rng, meta)


# -- what may be asked ---------------------------------------------------------------------


def _check(model, prior, noise, noise_model, snr, background, n, draws) -> tuple[str, ...]:
    """Check arguments; names of the parameters and of the terms of the background."""
    from galmorph.models.base import GalaxyModel

    if not isinstance(model, GalaxyModel) or len(model) != 1:
        raise TypeError("model must be one galmorph model (SersicGalaxy2D ...)")
    if background not in BACKGROUND_TERMS:
        raise ValueError(f"background must be one of {list(BACKGROUND_TERMS)}, not {background!r}")
    for name, value in (("n", n), ("draws", draws)):
        if int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    names = (*model.param_names, *_BACKGROUND[: BACKGROUND_TERMS[background]])
    for name, one in prior.items():
        if name not in names:
            raise ValueError(f"there is no parameter {name!r}, but {', '.join(names)}")
        if not callable(getattr(one, "sample", None)):
            raise TypeError(f"the prior of {name!r} has no method sample: see galmorph.priors")
        if name in model.param_names and model.fixed[name]:
            raise ValueError(f"{name!r} is fixed in the model: it has no prior")
    tied = [name for name in model.param_names if model.tied[name]]
    if tied:
        raise ValueError(f"{tied[0]!r} is tied: galaxies are drawn with free parameters only")
    if snr is not None:
        if "flux" in prior:
            raise ValueError("snr sets the flux: leave out its prior, or snr")
        if callable(noise):
            raise ValueError("snr needs noise that does not depend on the image")
        if not callable(getattr(snr, "sample", None)) and not (np.isscalar(snr) and snr > 0):
            raise ValueError(f"snr must be a positive number or a prior, not {snr!r}")
    if not callable(noise) and not np.all(np.asarray(noise, dtype=float) > 0):
        raise ValueError("the noise must be positive")
    if noise_model is not None and not callable(getattr(noise_model, "log_prob", None)):
        raise TypeError("noise_model must be a NoiseModel: see galmorph.noise")
    return names


def _shape(shape: Any) -> tuple[int, int]:
    from galmorph.models.base import _check_shape

    return _check_shape(shape)


def _fitter_with(fitter: Any, model: GalaxyModel, prior: Mapping, noise_model: Any) -> Any:
    """The fitter, or a copy of it that knows the prior and the noise."""
    from galmorph.fitting import MAPFitter

    fitter = MAPFitter() if fitter is None else fitter
    changed = {}
    if noise_model is not None:
        if not _takes(fitter, "noise"):
            raise TypeError(f"{type(fitter).__name__} takes no noise model")
        changed["noise"] = noise_model
    if _takes(fitter, "priors") and fitter.priors is None and prior:
        changed["priors"] = {
            name: one
            for name, one in prior.items()
            if name in model.param_names and not _any_angle(name, one, model.param_names)
        }
    if changed:
        fitter = copy.copy(fitter)
        vars(fitter).update(changed)
    return fitter


def _takes(fitter: Any, option: str) -> bool:
    """Whether a fitter is made with an option (perhaps of its base class) and keeps it."""
    known = inspect.signature(type(fitter)).parameters.values()
    named = any(p.name == option or p.kind is p.VAR_KEYWORD for p in known)
    return named and hasattr(fitter, option)


def _period(name: str, names: Sequence[str]) -> float | None:
    """After what an angle is the same again: half a turn for an axis; None for no angle."""
    if not _is_angle(name):
        return None
    return np.pi if "ellip" + name.removeprefix("theta") in names else 2 * np.pi


def _any_angle(name: str, prior: Prior, names: Sequence[str]) -> bool:
    period = _period(name, names)
    flat = period is not None and isinstance(prior, Uniform)
    return flat and prior.high - prior.low >= period * (1 - 1e-9)


# -- simulation ----------------------------------------------------------------------------


def _draw(value: float | Prior, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.full(n, float(value)) if np.isscalar(value) else np.asarray(value.sample(n, rng))


def _draw_truth(model, names, prior, shape, n, rng) -> np.ndarray:
    """Parameters and background of the galaxies, (n, P + nb)."""
    truth = np.zeros((n, len(names)))
    for k, name in enumerate(model.param_names):
        truth[:, k] = np.ravel(getattr(model, name).value)[0]
    latents = [names.index(name) for name in getattr(model, "latent_names", ())]
    if latents:
        free = [k for k in latents if not model.fixed[names[k]]]
        truth[:, free] = model.prior.sample(n, rng)[:, [latents.index(k) for k in free]]
    for axis, name in enumerate(("x_0", "y_0")):
        if not model.fixed[name]:
            middle = (shape[1 - axis] - 1) / 2
            truth[:, names.index(name)] = middle + rng.uniform(-0.5, 0.5, n)
    for name, one in prior.items():
        bounds = model.bounds[name] if name in model.param_names else (None, None)
        truth[:, names.index(name)] = _within(one, bounds).sample(n, rng)
    return truth


def _within(prior: Prior, bounds: tuple[float | None, float | None]) -> Prior:
    """The prior between the bounds of the model."""
    low = -np.inf if bounds[0] is None else bounds[0]
    high = np.inf if bounds[1] is None else bounds[1]
    if low <= prior.support[0] and high >= prior.support[1]:
        return prior
    return Truncated(prior, low, high)


def _render(params: np.ndarray, model: GalaxyModel, psf: Any, shape: tuple) -> np.ndarray:
    parts = range(0, len(params), _WINDOW)
    return np.concatenate(
        [model.render(shape, params=params[i : i + _WINDOW], psf=psf) for i in parts]
    )


def _set_flux(truth: np.ndarray, model, psf, sigma: np.ndarray, snr: np.ndarray) -> None:
    """Scale the fluxes to the matched-filter S/N (Turin 1960, IRE Trans. Inf. Theory 6, 311)."""
    flux = model.param_names.index("flux")
    truth[:, flux] = 1.0
    images = _render(truth[:, : len(model.param_names)], model, psf, sigma.shape)
    truth[:, flux] = snr / np.sqrt(((images / sigma) ** 2).sum((1, 2)))


def _images(truth: np.ndarray, model, psf, shape: tuple[int, int]) -> np.ndarray:
    """Noiseless images with the background, (n, ny, nx)."""
    count = len(model.param_names)
    images = _render(truth[:, :count], model, psf, shape)
    y, x = (np.arange(side) - (side - 1) / 2 for side in shape)
    basis = np.stack(np.broadcast_arrays(1.0, x[None, :], y[:, None]))
    terms = truth[:, count:]
    return images + np.einsum("nb,byx->nyx", terms, basis[: terms.shape[1]])


def _add_noise(clean: np.ndarray, noise: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    if not callable(noise):
        return clean + noise * rng.standard_normal(clean.shape), noise
    data, uncertainty = noise(clean, rng)
    if np.shape(data) != clean.shape:
        raise ValueError(f"noise must return data of shape {clean.shape}, not {np.shape(data)}")
    return data, uncertainty


# -- comparison ----------------------------------------------------------------------------


def _compare(truth, result: FitResult, draws: int, rng, meta: dict) -> Calibration:
    posterior = result.posterior
    samples = posterior.sample(draws, rng)
    mean, cov, std = posterior.mean, posterior.cov, posterior.std
    used = (result.flags & FitFlag.FAILED) == 0
    for values in (samples, mean, cov):
        used &= np.isfinite(values).all(tuple(range(1, values.ndim)))
    # what is fixed has no width, but perhaps one of rounding
    free = ((std[used] > 0) & (np.ptp(samples[used], axis=1) > 0)).any(0)
    free &= [not result.model.fixed.get(name) for name in posterior.param_names]
    free = np.flatnonzero(free)
    if used.any() and not len(free):
        raise ValueError("the posteriors have no width: nothing is free in the fit")
    names = tuple(posterior.param_names[k] for k in free)
    error = _offset(truth[:, None], mean, result)
    offset = _offset(samples, mean, result)
    error, offset, width = error[..., free], offset[..., free], std[:, free]
    ranks = (offset < error).sum(1)
    joint = np.full(len(truth), -1)
    inverse = np.linalg.pinv(_correlation(cov[np.ix_(used, free, free)], width[used]))
    size = [_square(v[used] / _positive(width[used])[:, None], inverse) for v in (offset, error)]
    joint[used] = (size[0] < size[1]).sum(1)
    ranks[~used] = -1
    with np.errstate(divide="ignore", invalid="ignore"):
        pulls = -error[:, 0] / width
    pulls[~used] = np.nan
    return Calibration(
        param_names=names,
        truth=truth[:, free],
        ranks=ranks,
        joint_ranks=joint,
        pulls=pulls,
        flags=result.flags.copy(),
        draws=draws,
        result=result,
        meta=meta,
    )


def _offset(values: np.ndarray, mean: np.ndarray, result: FitResult) -> np.ndarray:
    """Parameters (N, n, P) less the mean (N, P), in the description that is nearest to it.

    That is the same axis; or, for learned galaxies, the same direction, or the opposite one with
    other signs of latents where this makes no difference to the image.  Truth and draws are
    treated alike, so that ranks stay uniform.
    """
    offset = values - mean[:, None]
    for k, name in enumerate(result.param_names):
        period = _period(name, result.param_names)
        if period is not None:
            offset[..., k] = _wrap(offset[..., k], period)
    signs = _signs_of_half_turn(result.model)
    if signs is not None:
        theta = result.param_names.index("theta")
        latents = [result.param_names.index(name) for name in result.model.latent_names]
        turned = np.abs(offset[..., theta]) > 0.5 * np.pi
        offset[..., theta] = _wrap(offset[..., theta], np.pi)
        flipped = signs * values[..., latents] - mean[:, None, latents]
        offset[..., latents] = np.where(turned[..., None], flipped, offset[..., latents])
    return offset


def _unit(name: str) -> u.UnitBase | None:
    """Unit in which a parameter is held."""
    if name in ("x_0", "y_0") or name.startswith("r_"):
        return u.pix
    return u.rad if _is_angle(name) else None


def _wrap(angle: np.ndarray, period: float) -> np.ndarray:
    return np.remainder(angle + 0.5 * period, period) - 0.5 * period


def _signs_of_half_turn(model: GalaxyModel) -> np.ndarray | None:
    """Signs of latents with which a galaxy turned by half a turn is the same, if there are any."""
    decoder = getattr(getattr(getattr(model, "shape", None), "vae", None), "decoder", None)
    if decoder is None or decoder.config["parities"] is None:
        return None
    return decoder.signs[2].numpy()


def _positive(width: np.ndarray) -> np.ndarray:
    return np.where(width > 0, width, 1.0)


def _correlation(cov: np.ndarray, width: np.ndarray) -> np.ndarray:
    width = _positive(width)
    return cov / width[:, :, None] / width[:, None]


def _square(offset: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Squared distance (N, n) by the inverse covariance (N, P, P) of offsets (N, n, P)."""
    return ((offset @ inverse) * offset).sum(-1)
