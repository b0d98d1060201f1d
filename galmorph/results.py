"""What a fit of many galaxies found: parameters, uncertainties, and how well they describe them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy import units as u
from astropy.modeling.core import Model
from astropy.table import QTable

from galmorph import _sky
from galmorph.flags import FitFlag
from galmorph.noise import GaussianNoise, NoiseModel

if TYPE_CHECKING:
    from galmorph.posterior import Derived, Draws, Posterior
    from galmorph.priors import Prior

__all__ = ["FitResult"]

#: Kinds of background and how many numbers each has.
BACKGROUND_TERMS = {"none": 0, "constant": 1, "tilted": 3}
_BACKGROUND_NAMES = ("background", "background_slope_x", "background_slope_y")

#: The meaning of the columns, stated in every table.
CONVENTIONS = {
    "position": "pixels of the whole image; (0, 0) is the centre of its first pixel",
    "radius": "semi-major axis",
    "theta": "of the major axis, counter-clockwise from +x",
    "ellip": "1 - b/a, in pixels",
    "flux": "total, integrated to infinity",
    "position_angle": "of the major axis, from north through east, in ICRS",
    "background": "at the centre of the stamp, per pixel",
}


@dataclass(kw_only=True, eq=False, repr=False)
class FitResult:
    """Fits of N galaxies with one model: one row a galaxy.

    Made by `galmorph.fit_images` or `FitResult.read`.  ``result[i]``,
    ``result[2:5]`` and ``result[result.flags == 0]`` are results of some of
    the galaxies.

    Attributes
    ----------
    model : `~astropy.modeling.Model`
        The model that was fitted, with its constraints; see `model_at`.
    params : array, shape (N, P)
        Parameters in the order of ``param_names``; lengths in pixels, angles
        in radians, flux in ``data_unit``; NaN where the fit failed.
        Positions are in pixels of the whole image.
    cov : array, shape (N, P, P)
        Covariance of the parameters, with the background (and all else)
        marginalised; 0 for fixed and tied parameters.
    background : array, shape (N, nb)
        Background per pixel: nothing, (constant,), or (constant, slope along
        x, slope along y) about the centre of the stamp.
    background_cov : array, shape (N, nb, nb)
        Its covariance.
    chi2 : array, shape (N,)
        Sum of the squared residuals in units of the uncertainty.
    dof : array of int, shape (N,)
        Usable pixels less free parameters.
    flags : array of int32, shape (N,)
        Bit mask, see `FitFlag` and `decode_flags`.
    n_iter : array of int, shape (N,)
        Iterations of the fitter.
    origin : array of int, shape (N, 2)
        (x, y) of the stamps' pixel (0, 0) in the whole image.
    shapes : array of int, shape (N, 2)
        (ny, nx) of the stamps.
    ids : array of int, shape (N,)
        Labels of the segments or of the catalogue if there were any, else 0 … N-1.
    data_unit : `~astropy.units.Unit` or None
        Unit of a pixel's value.
    wcs : None, WCS, or list of N of them
        Celestial WCS of the image.
    psf : PSF or None
        The PSF that was given for all; None if it is the model's own or there
        is one for each galaxy.
    stamps : StampSource or None
        Where the pixels are read from again for images; None in a result
        that was read from a file.
    extra : dict of str to array, shape (N, ...)
        What only some fitters find: ``samples`` (N, S, P) in coordinates of the stamps, ``rhat``
        and ``ess`` of chains, ``khat`` of weights, ``log_evidence``, ``noise_parameters`` ...
    noise : NoiseModel
        What the pixels were taken to do.
    priors : dict of str to Prior
        Of the parameters, as the fit had them.
    meta : dict
        Provenance: versions, date, model, fitter, options.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> truth = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3, ellip=0.2, theta=1)
    >>> stamps = truth.render((31, 31)) + np.random.default_rng(0).normal(0, 0.1, (4, 31, 31))
    >>> result = fit_images(stamps, GaussianGalaxy2D(), uncertainty=0.1)
    >>> result
    <FitResult: 4 galaxies, GaussianGalaxy2D, 0 flagged>
    >>> result.to_table()["flux"].round(-1).tolist()
    [300.0, 300.0, 300.0, 300.0]
    >>> result.residual_images.shape
    (4, 31, 31)
    """

    model: Model
    params: np.ndarray
    cov: np.ndarray
    background: np.ndarray
    background_cov: np.ndarray
    chi2: np.ndarray
    dof: np.ndarray
    flags: np.ndarray
    n_iter: np.ndarray
    origin: np.ndarray
    shapes: np.ndarray
    ids: np.ndarray
    data_unit: u.UnitBase | None = None
    wcs: Any = None
    psf: Any = None
    stamps: Any = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    noise: NoiseModel = field(default_factory=GaussianNoise)
    priors: dict[str, Prior] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)

    # -- parameters ----------------------------------------------------------------------

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters, the columns of ``params``."""
        return tuple(self.model.param_names)

    @property
    def stds(self) -> np.ndarray:
        """Standard deviations of the parameters, shape (N, P)."""
        return _stds(self.cov)

    @property
    def reduced_chi2(self) -> np.ndarray:
        """``chi2 / dof``, NaN where there are no degrees of freedom; shape (N,)."""
        return np.where(self.dof > 0, self.chi2 / np.maximum(self.dof, 1), np.nan)

    @property
    def failed(self) -> np.ndarray:
        """True where the parameters must not be used, shape (N,)."""
        return ((self.flags & FitFlag.FAILED) != 0) | ~np.isfinite(self.params).all(axis=1)

    def __len__(self) -> int:
        return len(self.params)

    def __repr__(self) -> str:
        return (
            f"<FitResult: {len(self)} galaxies, {type(self.model).__name__}, "
            f"{int(np.count_nonzero(self.flags))} flagged>"
        )

    def __getitem__(self, item: Any) -> FitResult:
        """Result of some galaxies, by index, slice, or array of indices or bool."""
        if np.ndim(item) == 0 and not isinstance(item, slice):
            rows = np.arange(len(self))[[item]]  # IndexError if there is none
        else:
            rows = np.arange(len(self))[item]
        names = ("params", "cov", "background", "background_cov", "chi2", "dof", "flags")
        names += ("n_iter", "origin", "shapes", "ids")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in names},
            extra={name: values[rows] for name, values in self.extra.items()},
            wcs=[self.wcs[i] for i in rows] if isinstance(self.wcs, list) else self.wcs,
            stamps=None if self.stamps is None else self.stamps.select(rows),
        )

    def __iter__(self) -> Iterator[FitResult]:
        return (self[i] for i in range(len(self)))

    def model_at(self, i: int) -> Model:
        """The fitted model of one galaxy, in pixels of the whole image.

        Parameters
        ----------
        i : int
            Row of the galaxy.

        Returns
        -------
        `~astropy.modeling.Model`
            A copy of ``model`` with the parameters (and the PSF) of galaxy ``i``.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import PointSource2D, fit_images
        >>> psf = np.outer([1, 2, 1], [1, 2, 1]) / 16
        >>> image = PointSource2D(flux=100, x_0=7, y_0=8, psf=psf).render((15, 15))
        >>> result = fit_images(image, PointSource2D(), psf=psf, uncertainty=0.01)
        >>> model = result.model_at(0)
        >>> bool(abs(model.flux - 100) < 0.1)
        True
        """
        model = self.model.copy()
        for name, value in zip(self.param_names, self.params[i], strict=True):
            parameter = getattr(model, name)
            if parameter.unit is None:
                parameter.value = value
            else:
                unit = self._unit_of(name) or parameter.unit
                parameter.quantity = (value * unit).to(parameter.unit)
        psf = self._psf_at(i)
        if psf is not None:
            model.psf = psf
        return model

    def _psf_at(self, i: int) -> Any:
        if self.psf is not None or self.stamps is None:
            return self.psf
        psf = self.stamps.get([i]).psf
        return psf[0] if isinstance(psf, list) else psf

    # -- images --------------------------------------------------------------------------

    def stamp(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was fitted for one galaxy, and the model of it.

        Parameters
        ----------
        i : int
            Row of the galaxy.

        Returns
        -------
        data, inv_sigma, model_image : array, shape (ny, nx)
            Pixel values (0 where unusable), one over their uncertainty (0
            where unusable), and the model with its background (NaN if the
            fit failed).

        Raises
        ------
        ValueError
            If the result was read from a file, which holds no pixels.
        """
        data, inv_sigma, image = self._stamps(np.array([range(len(self))[i]]))
        return data[0], inv_sigma[0], image[0]

    @property
    def posterior(self) -> Posterior:
        """What is known of every galaxy: draws, quantiles, densities; see `Posterior`.

        The normal approximation of `MAPFitter` and `EncoderFitter`, or the draws of
        `MCMCFitter`, `ImportanceFitter` and `NestedFitter`.
        """
        from galmorph.posterior import make_posterior

        return make_posterior(self)

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw parameters from the posterior of every galaxy, without the background.

        Parameters
        ----------
        n : int
        rng : `numpy.random.Generator` or int, optional

        Returns
        -------
        array, shape (N, n, P)
            NaN where the fit failed or has no covariance; what was fixed stays.
        """
        return self.posterior.sample(n, rng)[..., : len(self.param_names)]

    def derive(
        self,
        function: Callable[[Draws], np.ndarray],
        *,
        n: int = 400,
        rng: np.random.Generator | int | None = 0,
    ) -> Derived:
        """The posterior of anything that follows from the parameters; see `Posterior.derive`."""
        return self.posterior.derive(function, n=n, rng=rng)

    def held_out_mask(self, i: int) -> np.ndarray:
        """Usable pixels of one galaxy that were not fitted (``held_out`` of `fit_images`).

        Parameters
        ----------
        i : int
            Row of the galaxy.

        Returns
        -------
        array of bool, shape (ny, nx)
        """
        self._require_stamps()
        rows = np.array([range(len(self))[i]])
        return self._left_out(rows, self.stamps.get(rows).inv_sigma > 0)[0]

    def _left_out(self, rows: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Which of the ``used`` pixels (b, ny, nx) of galaxies were not fitted."""
        told = self.meta.get("held_out")
        if told is None:
            return np.zeros_like(used)
        index = self.extra["held_out_row"][rows].tolist()
        return used & np.stack([held_out_pixels(used.shape[1:], k, **told) for k in index])

    @property
    def model_images(self) -> np.ndarray | list[np.ndarray]:
        """Model and background, (N, ny, nx), or a list if sizes differ; NaN where the fit failed.

        Computed at each access, as all images below: keep what you use twice,
        and ask for a part of a large result, as ``result[:100].model_images``.
        """
        return self._images(lambda rows: self._render(rows), needs_pixels=False)

    @property
    def model_std_images(self) -> np.ndarray | list[np.ndarray]:
        """How far the model may be off in each pixel (1 sigma), shaped as ``model_images``.

        What a network has learned of its own misfit (`LearnedGalaxy2D.render_misfit`); zero for
        parametric models.  The noise of the data is not in it.
        """
        return self._images(
            lambda rows: self._render(rows, what="render_misfit"), needs_pixels=False
        )

    @property
    def residual_images(self) -> np.ndarray | list[np.ndarray]:
        """Data - model, (N, ny, nx) or a list; NaN in unusable pixels."""

        def residual(rows: np.ndarray) -> np.ndarray:
            data, inv_sigma, image = self._stamps(rows)
            return np.where(inv_sigma > 0, data - image, np.nan)

        return self._images(residual)

    @property
    def log_likelihood_map(self) -> np.ndarray | list[np.ndarray]:
        """Logarithm of each pixel's probability density by ``noise``, (N, ny, nx) or a list.

        It is 0 in unusable pixels, so that the sum over a stamp is the
        galaxy's log-likelihood; NaN where the fit failed.
        """

        def log_prob(rows: np.ndarray) -> np.ndarray:
            data, inv_sigma, image = self._stamps(rows)
            values = self._noise(rows).log_prob(data, image, inv_sigma)
            values[self.failed[rows]] = np.nan
            return values

        return self._images(log_prob)

    def _noise(self, rows: np.ndarray) -> NoiseModel:
        """The noise of some galaxies, with what was found of it."""
        values = self.extra.get("noise_parameters")
        noise = self.noise if values is None else self.noise.with_parameters(values[rows])
        if getattr(noise, "needs_misfit", False):
            noise = noise.bind(self._render(rows, what="render_misfit"))
        return noise

    def _images(self, compute: Callable, *, needs_pixels: bool = True) -> Any:
        """Images of all galaxies, by a function of rows of one shape."""
        if needs_pixels:
            self._require_stamps()
        same = len(self) == 0 or bool(np.all(self.shapes == self.shapes[0]))
        images: Any = [None] * len(self)
        if same:
            images = np.empty((len(self), *(self.shapes[0] if len(self) else (0, 0))))
        for rows in self._batches():
            for i, image in zip(rows, compute(rows), strict=True):
                images[i] = image
        return images

    def _batches(self) -> Iterator[np.ndarray]:
        _, group = np.unique(self.shapes, axis=0, return_inverse=True)
        for k in range(int(group.max(initial=-1)) + 1):
            rows = np.flatnonzero(np.ravel(group) == k)
            step = int(np.clip(2**19 // max(int(np.prod(self.shapes[rows[0]])), 1), 1, 128))
            for start in range(0, len(rows), step):
                yield rows[start : start + step]

    def _require_stamps(self) -> None:
        if self.stamps is None:
            raise ValueError(
                "this result was read from a file, which holds no pixels: only model_images "
                "are to be had"
            )

    def _stamps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._require_stamps()
        batch = self.stamps.get(rows)
        return batch.data, batch.inv_sigma, self._render(rows, batch.psf)

    def _render(self, rows: np.ndarray, psf: Any = None, *, what: str = "render") -> np.ndarray:
        """Model images of rows of one shape, with background; NaN where the fit failed."""
        shape = tuple(int(n) for n in self.shapes[rows[0]])
        if psf is None:
            psf = self.psf
            if psf is None and self.stamps is not None:
                psf = self.stamps.get(rows).psf
        images = np.full((len(rows), *shape), np.nan)
        params = self.params[rows].copy()
        for axis, name in enumerate(("x_0", "y_0")):
            if name in self.param_names:
                params[:, self.param_names.index(name)] -= self.origin[rows, axis]
        good = np.flatnonzero(~self.failed[rows])
        if isinstance(psf, list):
            # Galaxies of one call may or may not bring a PSF.
            with_psf = [k for k in good if psf[k] is not None]
            without = [k for k in good if psf[k] is None]
            parts = [(with_psf, [psf[k] for k in with_psf]), (without, None)]
        else:
            parts = [(good, psf)]
        for part, psfs in parts:
            if len(part):
                draw = getattr(self.model, what)
                images[part] = draw(shape, params=params[part], psf=psfs)
        return images if what != "render" else images + self._background(rows, shape)

    def _background(self, rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        terms = self.background[rows]
        y, x = (np.arange(n) - (n - 1) / 2 for n in shape)
        basis = np.stack(np.broadcast_arrays(1.0, x[None, :], y[:, None]))
        return np.einsum("nb,byx->nyx", terms, basis[: terms.shape[1]])

    # -- tables and files ----------------------------------------------------------------

    def _unit_of(self, name: str) -> u.UnitBase | None:
        """Unit in which a parameter is held in ``params``."""
        if name == "flux" or name.startswith("flux_"):
            return self.data_unit
        if name in ("x_0", "y_0") or name.startswith("r_"):
            return u.pix
        return u.rad if _is_angle(name) else None

    def to_table(self) -> QTable:
        """Catalogue: one row a galaxy.

        Returns
        -------
        `~astropy.table.QTable`
            ``id``; each parameter and its standard deviation (``flux``,
            ``flux_err``, …), lengths in pixels and angles in degrees;
            ``background`` and its standard deviation; ``snr`` (flux over its
            standard deviation), ``chi2``, ``dof``, ``reduced_chi2``,
            ``flags`` and ``n_iter``.  With a celestial WCS also
            ``sky_centroid`` (ICRS) and, for each ellipse, its semi-major axis
            in arcsec, position angle on the sky (from north through east) and
            ellipticity on the sky (``ellip`` is that in pixels; they differ
            if pixels are not square), by the WCS at the galaxy's own place,
            with standard deviations.  ``meta`` says how it was made.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GaussianGalaxy2D, fit_images
        >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
        >>> table = fit_images(image, GaussianGalaxy2D(), uncertainty=1.0).to_table()
        >>> table.colnames[:5], table["r_eff"].unit
        (['id', 'flux', 'flux_err', 'x_0', 'x_0_err'], Unit("pix"))
        """
        table = QTable()
        table["id"] = self.ids
        stds = self.stds
        for k, name in enumerate(self.param_names):
            for column, values in ((name, self.params[:, k]), (f"{name}_err", stds[:, k])):
                if _is_angle(name):
                    table[column] = np.degrees(values) * u.deg
                else:
                    table[column] = _with_unit(values, self._unit_of(name))
        errors = _stds(self.background_cov)
        for k, name in enumerate(_BACKGROUND_NAMES[: self.background.shape[1]]):
            unit = self.data_unit if k == 0 or self.data_unit is None else self.data_unit / u.pix
            table[name] = _with_unit(self.background[:, k], unit)
            table[f"{name}_err"] = _with_unit(errors[:, k], unit)
        if "flux" in self.param_names:
            flux, error = (a[:, self.param_names.index("flux")] for a in (self.params, stds))
            with np.errstate(over="ignore"):
                nothing = np.full(len(self), np.nan)
                table["snr"] = np.divide(flux, error, out=nothing, where=error > 0)
        derive = getattr(self.model, "derived", None)
        for name, (value, error) in (derive(self.params, self.stds) if derive else {}).items():
            table[name], table[f"{name}_err"] = value, error
        for name in ("chi2", "dof", "reduced_chi2", "flags", "n_iter"):
            table[name] = getattr(self, name)
        for name, values in self.extra.items():
            if values.ndim == 1 and np.issubdtype(values.dtype, np.floating):
                table[name] = values
        self._add_sky(table)
        table.meta.update({k: v for k, v in self.meta.items() if k != "errors" or v})
        table.meta["conventions"] = dict(CONVENTIONS)
        return table

    def _add_sky(self, table: QTable) -> None:
        names = self.param_names
        if self.wcs is None or not {"x_0", "y_0"} <= set(names):
            return
        found = _sky.local_sky(self.wcs, *(self.params[:, names.index(n)] for n in ("x_0", "y_0")))
        if found is None:
            return
        table["sky_centroid"], jacobian = found
        for radius, ellip, theta in _ellipses(names):
            columns = [None if n is None else names.index(n) for n in (radius, ellip, theta)]
            r, e, t = (np.zeros(len(self)) if k is None else self.params[:, k] for k in columns)
            cov = np.zeros((len(self), 3, 3))
            for i, k in enumerate(columns):
                for j, m in enumerate(columns):
                    if k is not None and m is not None:
                        cov[:, i, j] = self.cov[:, k, m]
            if ellip is None and theta is not None:
                e = np.full(len(self), 1e-3)  # a direction without a known axis ratio
            values, errors = _sky.ellipse_with_errors(jacobian, r, e, t, cov)
            suffix = "" if theta is None else theta.removeprefix("theta")
            quantities = [(f"{radius}_arcsec", 0, u.arcsec)]
            if theta is not None:
                quantities.append((f"position_angle{suffix}", 2, u.deg))
            if ellip is not None:
                quantities.append((f"ellip_sky{suffix}", 1, None))
            for name, k, unit in quantities:
                table[name] = _with_unit(values[k], unit)
                table[f"{name}_err"] = _with_unit(errors[k], unit)

    def write(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write to a file, from which `read` makes the same result (without the pixels).

        The file is an ordinary table: `to_table` and a few columns of arrays
        (``params``, ``cov``, …), which hold the exact numbers.

        Parameters
        ----------
        path : path
            Its name says the format: ``.ecsv``, ``.fits`` or ``.fits.gz``.
        overwrite : bool, optional
            Whether a file of that name may be replaced.

        Raises
        ------
        ValueError
            If the name has another ending.
        OSError
            If the file exists and ``overwrite`` is false, or cannot be written.
        """
        from galmorph._resultio import write_result

        write_result(self, path, overwrite=overwrite)

    @classmethod
    def read(cls, path: str | os.PathLike, *, model: Model | None = None) -> FitResult:
        """Read what `write` wrote.

        Parameters
        ----------
        path : path
            An ``.ecsv``, ``.fits`` or ``.fits.gz`` file.
        model : `~astropy.modeling.Model`, optional
            The model that was fitted; needed if it is not one of galmorph's,
            or is tied by a function (which no file can hold).

        Returns
        -------
        FitResult
            ``stamps`` is None.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is no table of fits, or the model is not known or another one.

        Examples
        --------
        >>> import numpy as np, os, tempfile
        >>> from galmorph import FitResult, GaussianGalaxy2D, fit_images
        >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
        >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=1.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "galaxies.fits")
        ...     result.write(path)
        ...     same = FitResult.read(path)
        >>> bool(np.all(same.params == result.params))
        True
        """
        from galmorph._resultio import read_result

        return read_result(cls, path, model=model)


def held_out_pixels(
    shape: tuple[int, int], index: int, *, fraction: float, seed: int
) -> np.ndarray:
    """Which pixels of galaxy number ``index`` of a job are not to be fitted, (ny, nx)."""
    return np.random.default_rng([seed, index]).random(shape) < fraction


def _is_angle(name: str) -> bool:
    return name == "theta" or name.startswith("theta_")


def _with_unit(values: np.ndarray, unit: u.UnitBase | None) -> Any:
    return values if unit is None else values * unit


def _stds(cov: np.ndarray) -> np.ndarray:
    variance = np.diagonal(cov, axis1=1, axis2=2)
    return np.sqrt(np.where(variance >= 0, variance, np.nan))


def _ellipses(names: tuple[str, ...]) -> list[tuple[str, str | None, str | None]]:
    """(radius, ellipticity, angle) for each radius of a model; None for what it lacks.

    ``r_bulge`` goes with ``ellip_bulge`` and ``theta_bulge``, and any radius
    without such partners with ``ellip`` and ``theta``.
    """
    found = []
    for radius in (n for n in names if n.startswith("r_")):
        partners = []
        for kind in ("ellip", "theta"):
            own = f"{kind}_{radius.removeprefix('r_')}"
            partners.append(own if own in names else kind if kind in names else None)
        found.append((radius, *partners))
    return found
