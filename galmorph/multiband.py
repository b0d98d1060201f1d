"""Several bands: photometry with models from one band, and joint fits of a scene in all.

Galaxies change their brightness from band to band, and their place and shape hardly at all.
`forced_photometry` takes place and shape from a fit of one image and fits fluxes in another;
`deblend_bands` fits place and shape to all bands together, with a flux in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from astropy import units as u
from astropy.table import QTable

from galmorph import _sky
from galmorph._magnitudes import POGSON, magnitudes, zero_point
from galmorph.deblending import SceneResult, _checked_fitter, _result
from galmorph.flags import FitFlag
from galmorph.images import _reporter
from galmorph.models.base import GalaxyModel
from galmorph.models.bulge_disk import BulgeDiskGalaxy2D
from galmorph.psf import PSF, PSFField, as_field, psf_at
from galmorph.results import BACKGROUND_TERMS

__all__ = ["ForcedPhotometry", "MultiBandResult", "deblend_bands", "forced_photometry"]

#: Names of the parts of a `BulgeDiskGalaxy2D`, and the share of the flux that is one.
COMPONENTS = ("bulge", "disk")
_SHARE = "bulge_fraction"
_LOWEST_HALF = 5.0


@dataclass(kw_only=True, eq=False, repr=False)
class ForcedPhotometry:
    """Fluxes of K sources whose positions and shapes were known; made by `forced_photometry`.

    Attributes
    ----------
    flux, flux_err : array, shape (K,)
        Total flux and its standard deviation, in the unit of the image; NaN where there is none.
    flux_cov : sparse array, shape (K, K)
        Covariance of the fluxes of sources whose boxes overlap.
    component_flux, component_flux_err : array, shape (K, 2), or None
        Of bulge and disk, where asked for; NaN for other models.
    xy : array, shape (K, 2)
        Positions (x, y) in this image.
    chi2, n_pixels : array, shape (K,)
        Sum of the squared residuals in units of the uncertainty in the box of each
        source, and usable pixels there.
    background : array, shape (K,)
        Fitted background under each source.
    flags : array of int32, shape (K,)
        Bit mask, see `FitFlag`.
    ids : array of int, shape (K,)
    data, inv_sigma : array, shape (ny, nx)
        The image, 0 where unusable, and one over its uncertainty, 0 where unusable.
    model_image, background_image : array, shape (ny, nx)
        Sum of all sources, and the background in the pixels of their boxes.
    band : str or None
    psf : PSF or None
    wcs : celestial WCS or None
    data_unit : `~astropy.units.Unit` or None
    zero_point : float or None
        AB magnitude of a flux of one, if it was given.
    meta : dict
        Provenance.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.deblending import deblend
    >>> from galmorph.multiband import forced_photometry
    >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
    >>> red = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
    >>> forced_photometry(red, image / 2, uncertainty=0.3, band="g")
    <ForcedPhotometry: 1 source, band g, 0 flagged>
    """

    flux: np.ndarray
    flux_err: np.ndarray
    flux_cov: Any
    component_flux: np.ndarray | None
    component_flux_err: np.ndarray | None
    xy: np.ndarray
    chi2: np.ndarray
    n_pixels: np.ndarray
    background: np.ndarray
    flags: np.ndarray
    ids: np.ndarray
    data: np.ndarray
    inv_sigma: np.ndarray
    model_image: np.ndarray
    background_image: np.ndarray
    band: str | None = None
    psf: Any = None
    wcs: Any = None
    data_unit: Any = None
    zero_point: float | None = None
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flux)

    def __repr__(self) -> str:
        band = "" if self.band is None else f", band {self.band}"
        return (
            f"<ForcedPhotometry: {len(self)} source{'s' * (len(self) != 1)}{band}, "
            f"{int(np.count_nonzero(self.flags))} flagged>"
        )

    @property
    def residual_image(self) -> np.ndarray:
        """Data - models - background, shape (ny, nx); NaN in unusable pixels."""
        residual = self.data - self.model_image - self.background_image
        return np.where(self.inv_sigma > 0, residual, np.nan)

    def to_table(self) -> QTable:
        """Catalogue: one row a source.

        Returns
        -------
        `~astropy.table.QTable`
            ``id``, position, ``flux``, ``flux_err``, AB magnitude ``mag`` and ``mag_err`` given a
            zero point or where the unit of the image is one of flux density (NaN where the flux
            is not positive), fluxes of components, ``chi2``, ``n_pixels`` and ``flags``.  All
            that is of the band has its name at the end (``flux_g``, ``flux_g_err``) if there is
            one.

        Examples
        --------
        >>> import astropy.units as u, numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> from galmorph.multiband import forced_photometry
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41)) * u.uJy
        >>> red = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> table = forced_photometry(red, image / 2, uncertainty=0.3, band="g").to_table()
        >>> table.colnames[3:7]
        ['flux_g', 'flux_g_err', 'mag_g', 'mag_g_err']
        >>> table["mag_g"].round(1)
        <Quantity [17.9] mag>
        """
        table = QTable({"id": self.ids})
        _put_positions(table, self.xy, self.wcs)
        name = "" if self.band is None else f"_{self.band}"
        of = (self.data_unit, self.zero_point)
        _put_flux(table, f"flux{name}", f"mag{name}", self.flux, self.flux_err, *of)
        if self.component_flux is not None:
            for i, part in enumerate(COMPONENTS):
                values = self.component_flux[:, i], self.component_flux_err[:, i]
                _put_flux(table, f"flux_{part}{name}", f"mag_{part}{name}", *values, *of)
        for column in ("background", "chi2", "n_pixels", "flags"):
            table[f"{column}{name}"] = getattr(self, column)
        if self.data_unit is not None:
            table[f"background{name}"] = self.background * self.data_unit
        table.meta.update(self.meta)
        return table


def _put_positions(table: QTable, xy: np.ndarray, wcs: Any) -> None:
    table["x_0"], table["y_0"] = xy[:, 0] * u.pix, xy[:, 1] * u.pix
    found = None if wcs is None or not len(xy) else _sky.local_sky(wcs, *xy.T)
    if found is not None:
        table["sky_centroid"] = found[0]


def _put_flux(table: QTable, flux: str, mag: str, value, error, unit, zero=None) -> None:
    table[flux] = value if unit is None else value * unit
    table[f"{flux}_err"] = error if unit is None else error * unit
    zero = zero_point(unit) if zero is None else zero
    if zero is not None:
        # a plain unit, which every format of tables can hold
        table[mag], table[f"{mag}_err"] = (v * u.mag for v in magnitudes(value, error, zero))
        table[mag].info.description = "AB magnitude"


# -- forced photometry -----------------------------------------------------------------------


def forced_photometry(
    result: SceneResult,
    image: Any,
    *,
    psf: Any = None,
    uncertainty: Any = None,
    mask: Any = None,
    background: str = "none",
    components: bool = False,
    shape_uncertainty: bool = False,
    zero_point: float | None = None,
    band: str | None = None,
) -> ForcedPhotometry:
    """Fluxes in another image of sources whose positions and shapes are known.

    Parameters
    ----------
    result : SceneResult
        Of `galmorph.deblend`, in one band.
    image : array, Quantity, NDData, HDU or path
        Another image of the same sky, (ny, nx): on the same pixels, or, if both
        have a celestial WCS, on any others.
    psf : PSF, array, model or PSFField, optional
        PSF of this image; by default that which the image brings.
    uncertainty, mask : optional
        As for `galmorph.deblend`.
    background : {"none", "constant"}, optional
        A constant is one number for all sources that share pixels, also by way of others.
    components : bool, optional
        Fit a flux to the bulge and one to the disk of each `BulgeDiskGalaxy2D`.
    shape_uncertainty : bool, optional
        Add what is not known of positions and shapes to the covariance of the fluxes, to
        first order.  Without this errors are those of sources that are exactly as fitted.  The
        noise of this image is taken as independent of that of the other one.
    zero_point : float, optional
        AB magnitude of a flux of one, for the table; by default that of the unit of the image.
    band : str, optional
        Name, for the columns of the table.

    Returns
    -------
    ForcedPhotometry

    Raises
    ------
    TypeError
        If ``result`` is not of one image.
    ValueError
        If there is no PSF though the other image had one, the images are of different shapes
        without a WCS each, or ``background`` or ``zero_point`` is something else.

    Notes
    -----
    Fluxes of all sources are one linear least-squares problem, solved exactly, part by part
    where sources share pixels.  A source counts in a square as large as it was
    to be seen (above 0.1 sigma of a pixel) in the other image, wider by the difference
    of the PSFs.  A source whose fit failed is not there; a source without usable pixels is
    flagged, with NaN.

    The covariance of the fluxes given the shapes is :math:`G^{-1}`, with :math:`G = A^T W A` of
    the images A of the sources and weights W.  Shapes with covariance C add
    :math:`G^{-1} X C X^T G^{-1}`, with X the products of A and the derivatives of the model
    image: the errors are then those of a fit in which the shapes are free with C for a prior.

    There is no ``structure`` here.  The light that models do not have is the same in both images:
    what it did to the shapes is in their covariance (`galmorph.deblend` allows for it), and comes
    with ``shape_uncertainty``; what it does to a flux given the shape goes together with that, and
    with the fluxes of all other bands, which the error of one flux cannot say.  Added to it, it
    would make errors of colours that colours do not have.  Where fluxes themselves have to be
    right to some per cent, `deblend_bands` knows all of this.

    Sizes and angles go from one grid to the other by the derivatives of both WCSs, so that pixel
    scale, rotation and parity are in them.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF, SersicGalaxy2D
    >>> from galmorph.deblending import deblend
    >>> from galmorph.multiband import forced_photometry
    >>> y, x = np.mgrid[-9:10, -9:10]
    >>> sharp, wide = (PSF(np.exp(-0.5 * (x**2 + y**2) / s**2)) for s in (1.2, 2.0))
    >>> params = np.array([[500, 18, 20, 3, 1.5, 0.3, 0.4], [300, 25, 22, 2, 1, 0.2, 1.2]])
    >>> rng = np.random.default_rng(1)
    >>> red = SersicGalaxy2D(psf=sharp).render((41, 45), params=params).sum(0)
    >>> red += rng.normal(0, 0.1, red.shape)
    >>> params[:, 0] = 100, 200
    >>> blue = SersicGalaxy2D(psf=wide).render((41, 45), params=params).sum(0)
    >>> blue += rng.normal(0, 0.3, blue.shape)
    >>> fit = deblend(red, params[:, 1:3], model=SersicGalaxy2D(), psf=sharp, uncertainty=0.1)
    >>> found = forced_photometry(fit, blue, psf=wide, uncertainty=0.3)
    >>> bool(np.all(np.abs(found.flux - [100, 200]) < 4 * found.flux_err))
    True
    """
    import galmorph
    from galmorph import _forced

    if not isinstance(result, SceneResult):
        raise TypeError(f"forced photometry needs one SceneResult, not {type(result).__name__}")
    if background not in ("none", "constant"):
        raise ValueError(f"background must be 'none' or 'constant', not {background!r}")
    if zero_point is not None and not np.isfinite(zero_point):
        raise ValueError(f"zero_point must be a magnitude, not {zero_point!r}")
    started = time.perf_counter()
    scene = _read_image(image, psf, uncertainty, mask)
    if scene.psf is None and result.psf is not None:
        raise ValueError("the other image had a PSF: forced photometry needs that of this one")
    carrier = _carrier(result, scene)
    columns = _Columns(result, scene, carrier, components)
    images = _forced.draw(columns.boxes, columns.models, columns.params, columns.psf)
    design = columns.boxes.matrix(images)
    data, weight = columns.data.ravel(), columns.inv_sigma.ravel()
    spread = None
    if shape_uncertainty:
        spread = _forced.shape_spread(
            columns.boxes,
            columns.models,
            columns.owner,
            columns.place,
            columns.free,
            result,
            columns.psf,
            weight,
        )
    fit = _forced.solve(design, data, weight, background=background == "constant", spread=spread)
    meta = {
        "galmorph": galmorph.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": scene.name,
        "background": background,
        "shape_uncertainty": shape_uncertainty,
        "band": band,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return replace(columns.result(fit, design, band, meta), zero_point=zero_point)


def _read_image(image: Any, psf: Any, uncertainty: Any, mask: Any) -> SimpleNamespace:
    """Pixels, weights, PSF, WCS and unit of one image."""
    from galmorph._scenes import _is_stack
    from galmorph._stamps import make_source

    varying = as_field(psf if psf is not None else getattr(image, "psf", None))
    if varying is not None:
        psf = np.ones((1, 1))  # one that the image brings is not asked for
    stamps = make_source(image, uncertainty=uncertainty, mask=mask, psf=psf)
    if len(stamps) != 1 or _is_stack(image):
        raise ValueError("forced photometry is of one image; call it once for each")
    batch = stamps.get([0])
    wcs = stamps.wcs[0] if isinstance(stamps.wcs, list) else stamps.wcs
    return SimpleNamespace(
        data=batch.data[0],
        inv_sigma=batch.inv_sigma[0],
        shape=batch.data[0].shape,
        psf=varying or (batch.psf[0] if isinstance(batch.psf, list) else batch.psf),
        flags=int(batch.flags[0]) & ~int(FitFlag.SATURATED),
        wcs=wcs,
        unit=stamps.unit,
        name=stamps.name,
    )


def _carrier(result: SceneResult, scene: SimpleNamespace) -> Any:
    from galmorph._forced import Carrier

    if scene.shape != result.data.shape and (scene.wcs is None or result.wcs is None):
        raise ValueError(
            f"the image has shape {scene.shape} and that of the result {result.data.shape}: "
            "both need a celestial WCS"
        )
    centre = np.array([p[1:3] for p in result.params]).reshape(-1, 2)
    return Carrier(centre, result.wcs, scene.wcs, scene.shape)


class _Columns:
    """The sources as columns of a linear problem, one each or one for each component."""

    def __init__(self, result, scene, carrier, components: bool) -> None:
        from galmorph import _forced

        self.source, self.scene, self.carrier = result, scene, carrier
        self.owner, self.share = self._split(result, components)
        self.models = [result.models[k] for k in self.owner]
        self.components = components
        flip = slice(None, None, -1 if carrier.flipped else 1)
        self.data, self.inv_sigma = scene.data[:, flip], scene.inv_sigma[:, flip]
        each = [psf_at(scene.psf, xy) for xy in carrier.xy]
        blind = np.array([p is None and scene.psf is not None for p in each], dtype=bool)
        if carrier.flipped:
            turned = {psf: _mirrored(psf) for psf in each}
            each = [turned[psf] for psf in each]
        self.psf = [each[k] for k in self.owner]
        own = result.params
        usable = ~(result.failed | blind)
        self.params = [
            self.place(j, np.asarray(own[k] if usable[k] else np.full(len(own[k]), np.nan)))
            for j, k in enumerate(self.owner)
        ]
        half = self._halves(_forced.reaches(result))[self.owner]
        xy = np.array([p[1:3] for p in self.params]).reshape(-1, 2)
        self.boxes = _forced.Boxes(xy, half, scene.shape)

    @staticmethod
    def _split(result, components: bool) -> tuple[np.ndarray, np.ndarray]:
        """The source of each column and the share of the bulge that it is drawn with, or NaN."""
        owner, share = [], []
        for k, model in enumerate(result.models):
            both = components and isinstance(model, BulgeDiskGalaxy2D)
            owner += [k, k] if both else [k]
            share += [1.0, 0.0] if both else [np.nan]
        return np.array(owner, dtype=int), np.array(share)

    @property
    def free(self) -> list[list[int]]:
        """Parameters of each source that make its place and shape."""
        result = []
        split = {int(k) for k, s in zip(self.owner, self.share, strict=True) if np.isfinite(s)}
        for k, model in enumerate(self.source.models):
            names = ["flux", _SHARE] if k in split else ["flux"]
            result.append([i for i, n in enumerate(model.param_names) if n not in names])
        return result

    def place(self, j: int, params: np.ndarray) -> np.ndarray:
        """Parameters of column ``j`` in this image, with a flux of one."""
        params = params.copy()
        params[0] = 1.0
        if np.isfinite(self.share[j]):
            params[self.models[j].param_names.index(_SHARE)] = self.share[j]
        rows = self.owner[j : j + 1]
        return self.carrier.params(self.models[j], params[None], rows)[0]

    def _halves(self, reach: np.ndarray) -> np.ndarray:
        """Half the sides of the boxes."""
        wider = 0.0
        if self.scene.psf is not None and self.source.psf is not None:
            first = _radii(self.source.psf, self.source.xy).min(initial=np.inf)
            second = _radii(self.scene.psf, self.carrier.xy).max(initial=0.0)
            wider = max(second - first * self.carrier.scale, 0.0)
        return np.maximum(reach * self.carrier.scale + wider, _LOWEST_HALF)

    def result(self, fit, design, band, meta) -> ForcedPhotometry:
        from scipy import sparse

        source, scene, count = self.source, self.scene, len(self.source)
        xy = self.carrier.xy
        total = sparse.csr_array(
            (np.ones(len(self.owner)), (self.owner, np.arange(len(self.owner)))),
            shape=(count, len(self.owner)),
        )
        flux = total @ fit.flux
        cov = (total @ fit.cov @ total.T).tocsr()
        singular = (total @ fit.singular.astype(float)) > 0
        flags = self._flags(xy, flux, cov, singular)
        light = design @ np.nan_to_num(fit.flux)
        cover = design.copy()
        cover.data = np.ones_like(cover.data)
        level, times = cover @ fit.background, cover @ np.ones(len(self.owner))
        level = np.divide(level, times, out=np.zeros_like(level), where=times > 0)
        images = [a.reshape(scene.shape) for a in (light, level)]
        chi = (self.data.ravel() - light - level) * self.inv_sigma.ravel()
        each = sparse.csr_array(cover).T
        first = np.searchsorted(self.owner, np.arange(count))  # one column of each source
        failed = (flags & int(FitFlag.FAILED)) != 0
        flux[failed] = np.nan
        error = np.sqrt(np.where(failed, np.nan, cov.diagonal()))
        parts = part_errors = None
        if self.components:
            parts, part_errors = np.full((2, count, 2), np.nan)
            variance = fit.cov.diagonal()
            for j in np.flatnonzero(np.isfinite(self.share)):
                at = self.owner[j], int(self.share[j] == 0)
                if not failed[at[0]]:
                    parts[at], part_errors[at] = fit.flux[j], np.sqrt(variance[j])
        flip = slice(None, None, -1 if self.carrier.flipped else 1)
        return ForcedPhotometry(
            flux=flux,
            flux_err=error,
            flux_cov=cov,
            component_flux=parts,
            component_flux_err=part_errors,
            xy=xy,
            chi2=(each @ chi**2)[first],
            n_pixels=np.rint(each @ (self.inv_sigma.ravel() > 0).astype(float))[first].astype(int),
            background=np.where(failed, np.nan, fit.background[first]),
            flags=flags,
            ids=source.ids,
            data=scene.data,
            inv_sigma=scene.inv_sigma,
            model_image=images[0][:, flip],
            background_image=images[1][:, flip],
            band=band,
            psf=scene.psf,
            wcs=scene.wcs,
            data_unit=scene.unit,
            meta=meta,
        )

    def _flags(self, xy, flux, cov, singular) -> np.ndarray:
        from galmorph._scenes import _first_flags

        scene = self.scene
        flags = _first_flags(
            SimpleNamespace(
                xy=xy,
                shape=scene.shape,
                inv_sigma=scene.inv_sigma,
                flags=scene.flags,
                psf=scene.psf,
            )
        )
        flags |= self.source.flags & int(FitFlag.FAILED)
        flags[self.source.failed & (self.source.flags & int(FitFlag.FAILED) == 0)] |= int(
            FitFlag.NO_DATA
        )
        ny, nx = scene.shape
        x, y = xy.T
        with np.errstate(invalid="ignore"):
            flags[np.minimum.reduce([x, y, nx - 1 - x, ny - 1 - y]) < 2] |= int(FitFlag.EDGE)
            flags[flux < 5 * np.sqrt(cov.diagonal())] |= int(FitFlag.LOW_SNR)
        flags[~np.isfinite(flux)] |= int(FitFlag.NO_DATA)
        flags[singular] |= int(FitFlag.BAD_COVARIANCE)
        return flags.astype(np.int32)


def _mirrored(psf: PSF | None) -> PSF | None:
    """With the columns in reverse order."""
    if psf is None:
        return None
    return PSF(psf.data[:, ::-1], oversampling=psf.oversampling, includes_pixel=psf.includes_pixel)


def _radii(psf: PSF | PSFField, xy: np.ndarray) -> np.ndarray:
    """Radii with nearly all light, of the PSFs at positions."""
    return np.array([p.radius(0.99) for p in {psf_at(psf, at) for at in xy} if p is not None])


# -- joint fits ------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, repr=False)
class MultiBandResult:
    """A scene of K sources, fitted in nb bands together; made by `deblend_bands`.

    ``result["g"]`` is the `SceneResult` of a band: its parameters (the common ones and the
    flux in this band) with their covariance from the joint fit, images and table.

    Attributes
    ----------
    bands : tuple of str
    reference : str
        The band in which groups and first shapes were found.
    scenes : dict of str to SceneResult
        One for each band.
    meta : dict
        Provenance.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.multiband import deblend_bands
    >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
    >>> noise = np.random.default_rng(1).normal(0, 0.3, (2, 41, 41))
    >>> cube = {"g": image / 2 + noise[0], "r": image + noise[1]}
    >>> result = deblend_bands(cube, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
    >>> result
    <MultiBandResult: 1 source in g, r>
    >>> result.flux.shape, result.flux_cov.shape, result["g"].params.shape
    ((1, 2), (2, 2), (1, 7))
    """

    bands: tuple[str, ...]
    reference: str
    scenes: dict[str, SceneResult]
    meta: dict = field(default_factory=dict)
    _groups: list[Any] = field(default_factory=list)
    _own: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        return (
            f"<MultiBandResult: {len(self)} source{'s' * (len(self) != 1)} "
            f"in {', '.join(self.bands)}>"
        )

    def __getitem__(self, band: str) -> SceneResult:
        """The scene in one band."""
        if band not in self.scenes:
            raise KeyError(f"there is no band {band!r}; there are {', '.join(self.bands)}")
        return self.scenes[band]

    @property
    def models(self) -> list[GalaxyModel]:
        """What was fitted to each source."""
        return self.scenes[self.reference].models

    @property
    def ids(self) -> np.ndarray:
        """Labels of the sources, shape (K,)."""
        return self.scenes[self.reference].ids

    @property
    def flags(self) -> np.ndarray:
        """Bit masks of each source in each band, shape (K, nb); see `FitFlag`."""
        return np.stack([self.scenes[b].flags for b in self.bands], 1)

    @property
    def failed(self) -> np.ndarray:
        """Where fluxes must not be used, shape (K, nb)."""
        return np.stack([self.scenes[b].failed for b in self.bands], 1)

    # -- parameters ----------------------------------------------------------------------

    @property
    def param_names(self) -> list[list[str]]:
        """Names of the joint parameters of each source.

        ``flux_<band>`` of all bands, ``bulge_fraction_<band>`` where components have
        colours of their own, then what is common to all bands.
        """
        names = []
        for model, own in zip(self.models, self._own, strict=True):
            each = [f"{name}_{band}" for name in own for band in self.bands]
            names.append(each + [n for n in model.param_names if n not in own])
        return names

    @property
    def params(self) -> list[np.ndarray]:
        """Joint parameters of each source, K arrays (J_k,); NaN where there are none."""
        params = [np.full(len(names), np.nan) for names in self.param_names]
        for group in self._groups:
            for k, own in zip(group.members, group.params or (), strict=False):
                params[k] = own
        return params

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the joint parameters of all sources, (D, D) with D the sum of all J_k.

        Zero between groups, NaN for sources without a fit.
        """
        return self._joint_cov()

    @property
    def flux(self) -> np.ndarray:
        """Flux of each source in each band, shape (K, nb), each in the unit of its band."""
        flux = np.array([p[: len(self.bands)] for p in self.params]).reshape(-1, len(self.bands))
        return np.where(self.failed, np.nan, flux)

    @property
    def flux_cov(self) -> np.ndarray:
        """Covariance of the fluxes, shape (K nb, K nb): source by source, band by band."""
        cov = self._joint_cov(len(self.bands))
        blank = self.failed.ravel()
        cov[blank] = cov[:, blank] = np.nan
        return cov

    @property
    def flux_err(self) -> np.ndarray:
        """Standard deviation of each flux, all else marginalised, shape (K, nb)."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.einsum("kbb->kb", self._flux_cov()))

    @property
    def component_flux(self) -> np.ndarray | None:
        """Flux of bulge and disk, shape (K, nb, 2); None but with ``component_colors``."""
        return self._components()[0] if self._split else None

    @property
    def component_flux_err(self) -> np.ndarray | None:
        """Standard deviations of ``component_flux``."""
        if not self._split:
            return None
        variance = np.einsum("kbcbc->kbc", self._components()[1])
        with np.errstate(invalid="ignore"):
            return np.sqrt(variance)

    @property
    def _split(self) -> bool:
        return any(_SHARE in own for own in self._own)

    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """Fluxes (K, nb, 2) of bulges and disks, covariance (K, nb, 2, nb, 2)."""
        count, nb = len(self), len(self.bands)
        flux = np.full((count, nb, 2), np.nan)
        cov = np.full((count, nb, 2, nb, 2), np.nan)
        for k, (params, block) in enumerate(zip(self.params, self._own_cov(), strict=True)):
            if _SHARE not in self._own[k]:
                continue
            total, share = params[:nb], params[nb : 2 * nb]
            flux[k] = np.stack([total * share, total * (1 - share)], 1)
            slope = np.zeros((nb, 2, 2 * nb))
            each = np.arange(nb)
            slope[each, 0, each], slope[each, 0, nb + each] = share, total
            slope[each, 1, each], slope[each, 1, nb + each] = 1 - share, -total
            slope = slope.reshape(2 * nb, 2 * nb)
            cov[k] = (slope @ block @ slope.T).reshape(nb, 2, nb, 2)
        flux[self.failed] = np.nan
        return flux, cov

    def color(
        self, first: str, second: str, *, component: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colour ``first - second`` in magnitudes, and its standard deviation.

        Parameters
        ----------
        first, second : str
            Bands.
        component : {"bulge", "disk"}, optional
            Of this part of each galaxy; needs ``component_colors``.

        Returns
        -------
        color, error : array, shape (K,)
            NaN where a flux is not positive.  AB where the units of both images are of flux
            density, else of the numbers as they are.

        Raises
        ------
        KeyError
            If there is no such band.
        ValueError
            If there is no such component.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.multiband import deblend_bands
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> cube = {"g": image / 2, "r": image}
        >>> result = deblend_bands(cube, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> color, error = result.color("g", "r")
        >>> color.round(2)
        array([0.75])
        """
        scenes = self[first], self[second]
        a, b = self.bands.index(first), self.bands.index(second)
        if component is None:
            flux, cov = self.flux, self._flux_cov()
        elif component in COMPONENTS and self._split:
            part = COMPONENTS.index(component)
            flux, cov = self._components()
            flux, cov = flux[..., part], cov[:, :, part, :, part]
        else:
            raise ValueError(f"there is no component {component!r}; see component_colors")
        zeros = [zero_point(scene.data_unit) for scene in scenes]
        zero = 0.0 if None in zeros else zeros[0] - zeros[1]
        bright = np.where(flux > 0, flux, np.nan)
        relative = cov / bright[:, :, None] / bright[:, None]
        variance = relative[:, a, a] + relative[:, b, b] - 2 * relative[:, a, b]
        color = zero - 2.5 * np.log10(bright[:, a] / bright[:, b])
        with np.errstate(invalid="ignore"):
            return color, POGSON * np.sqrt(variance)

    def _joint_cov(self, count: int | None = None) -> np.ndarray:
        """Covariance of all joint parameters of all sources, or of the first few of each."""
        lengths = [len(names) for names in self.param_names]
        sizes = lengths if count is None else [count] * len(self)
        first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        cov = np.zeros((first[-1], first[-1]))
        missing = np.ones(first[-1], dtype=bool)
        for group in self._groups:
            at = np.concatenate([np.arange(first[k], first[k + 1]) for k in group.members])
            missing[at] = group.cov is None
            if group.cov is not None:
                own = np.concatenate(_first_of_each(group.members, sizes, lengths))
                cov[np.ix_(at, at)] = group.cov[np.ix_(own, own)]
        cov[missing] = cov[:, missing] = np.nan
        return cov

    def _own_cov(self) -> list[np.ndarray]:
        """Covariance of what each source has in each band, K arrays (n_k, n_k)."""
        lengths = [len(names) for names in self.param_names]
        sizes = [len(own) * len(self.bands) for own in self._own]
        result = [np.full((n, n), np.nan) for n in sizes]
        for group in self._groups:
            if group.cov is not None:
                places = _first_of_each(group.members, sizes, lengths)
                for k, own in zip(group.members, places, strict=True):
                    result[k] = group.cov[np.ix_(own, own)]
        return result

    def _flux_cov(self) -> np.ndarray:
        """Covariance between bands of the fluxes of each source, (K, nb, nb)."""
        nb = len(self.bands)
        cov = np.array([c[:nb, :nb] for c in self._own_cov()]).reshape(-1, nb, nb)
        failed = self.failed
        return np.where(failed[:, :, None] | failed[:, None], np.nan, cov)

    # -- images --------------------------------------------------------------------------

    def model_image(self, band: str) -> np.ndarray:
        """The sum of all models in a band, without background, shape (ny, nx)."""
        return self[band].model_image

    def residual_image(self, band: str) -> np.ndarray:
        """Data - models - background in a band, shape (ny, nx); NaN in unusable pixels."""
        return self[band].residual_image

    def deblended_images(self, band: str) -> np.ndarray:
        """The data of each source in a band, shape (K, ny, nx)."""
        return self[band].deblended_images

    # -- tables --------------------------------------------------------------------------

    def to_table(self) -> QTable:
        """Catalogue: one row a source.

        Returns
        -------
        `~astropy.table.QTable`
            What is common to all bands, with units and, given a celestial WCS, on the sky,
            as in `SceneResult.to_table`; ``flux_<band>``, ``flux_<band>_err``, ``chi2_<band>`` and
            ``flags_<band>`` of each band, ``mag_<band>`` and ``mag_<band>_err`` (AB) where
            its unit is one of flux density, ``flux_bulge_<band>`` ... where components have
            colours; colours of neighbouring bands, ``color_<first>_<second>``.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.multiband import deblend_bands
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> cube = {"g": image / 2, "r": image}
        >>> result = deblend_bands(cube, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> [name for name in result.to_table().colnames if name.endswith("_g")]
        ['flux_g', 'chi2_g', 'flags_g']
        """
        table = self.scenes[self.reference].to_table()
        table.meta.clear()
        table.remove_columns([n for n in table.colnames if _is_of_band(n, self._split)])
        flux, errors = self.flux, self.flux_err
        parts, part_errors = self.component_flux, self.component_flux_err
        for b, band in enumerate(self.bands):
            scene = self.scenes[band]
            unit = scene.data_unit
            _put_flux(table, f"flux_{band}", f"mag_{band}", flux[:, b], errors[:, b], unit)
            for i, part in enumerate(COMPONENTS if self._split else ()):
                values = parts[:, b, i], part_errors[:, b, i]
                _put_flux(table, f"flux_{part}_{band}", f"mag_{part}_{band}", *values, unit)
            table[f"chi2_{band}"], table[f"flags_{band}"] = scene.chi2, scene.flags
        for first, second in pairwise(self.bands):
            color, error = self.color(first, second)
            table[f"color_{first}_{second}"] = color * u.mag
            table[f"color_{first}_{second}_err"] = error * u.mag
        table.meta.update({k: v for k, v in self.meta.items() if k != "errors" or v})
        return table


def _first_of_each(
    members: np.ndarray, sizes: Sequence[int], lengths: Sequence[int]
) -> list[np.ndarray]:
    """Places of the first parameters of each member among those of its group."""
    ends = np.cumsum([0, *(lengths[k] for k in members)])
    return [e + np.arange(sizes[k]) for e, k in zip(ends, members, strict=False)]


#: Columns of the table of one band that are not common to all.
_OF_BAND = (
    "flux",
    "snr",
    "chi2",
    "dof",
    "reduced_chi2",
    "flags",
    "n_iter",
    "blendedness",
    "purity",
)


def _is_of_band(column: str, split: bool) -> bool:
    name = column.removesuffix("_err")
    return name in _OF_BAND or name.startswith("background") or (split and name == _SHARE)


def deblend_bands(
    images: Any,
    sources: Any,
    *,
    bands: Sequence[str] | None = None,
    model: GalaxyModel | Sequence[GalaxyModel] | None = None,
    psf: Any = None,
    uncertainty: Any = None,
    mask: Any = None,
    fitter: Any = None,
    background: str = "none",
    position_prior: float | np.ndarray = 1.0,
    structure: float = 1.0,
    component_colors: bool = False,
    reference: str | None = None,
    max_group: int = 8,
    progress: bool | Callable[[int, int], None] = False,
) -> MultiBandResult:
    """Fit a scene in several bands together: places and shapes in common, fluxes of each band.

    Parameters
    ----------
    images : dict of str to image, list of nb images, or array (nb, ny, nx)
        One image a band, on the same pixels; each as for `galmorph.deblend`.
    sources : array (K, 2), SkyCoord, Table, SourceCatalog, SegmentationImage, Detection
        As for `galmorph.deblend`.
    bands : sequence of str, optional
        Names of the bands.  By default those of the dict (of which it may choose some),
        or "0", "1" ...
    model : GalaxyModel or sequence of K of them, optional
        For all, or one a source; by default ``LearnedGalaxy2D.from_pretrained()``.  Their
        bounds, fixed parameters and priors hold, except of the flux, which must be free.
    psf, uncertainty, mask : optional
        As for `galmorph.deblend`: one for all bands, or a dict or sequence with one a band.
    fitter : MAPFitter, optional
        As for `galmorph.deblend`.
    background : {"none", "constant", "tilted"}, optional
        What is fitted under all sources (of a group), in each band.
    position_prior : float or array (K,), optional
        Standard deviation, in pixels, of the true centres about the positions given; 0 holds
        them.
    structure : float, optional
        How much light that models do not have the covariance allows for, as for
        `galmorph.deblend`.
    component_colors : bool, optional
        Whether each `BulgeDiskGalaxy2D` has a ``bulge_fraction`` in every band, so that bulge
        and disk have colours of their own.
    reference : str, optional
        The band in which groups and first shapes are found; by default that with the
        highest signal to noise.
    max_group : int, optional
        So many sources at most are fitted together.
    progress : bool or callable, optional
        Show a bar, or call ``progress(done, total)``; each source counts twice, for the fit
        in the reference band and for the joint one.

    Returns
    -------
    MultiBandResult

    Raises
    ------
    TypeError, ValueError
        If the arguments are not what is described above, images differ in shape, some have a
        PSF and others none, or a flux is fixed, bounded, tied or has a prior.

    Notes
    -----
    The posterior of all parameters is maximised with the likelihood of all bands,
    :math:`\\prod_b p(d_b | f_b, \\theta) \\, p(\\theta)`: priors of places and shapes count once.
    The covariance is that of Laplace's approximation for everything of a group: what is not
    known of a shape makes errors of the fluxes that bands share, and that cancel in part in a
    colour.

    Arms, clumps and tails that models do not have are the same in all bands: each patch of a source
    may be brighter by a random fraction, as in `galmorph.deblend`, which is one number for all
    bands.  It makes errors of fluxes that bands share, and which colours feel less.  Structure
    that has a colour of its own is not in it.

    In fields, groups are those of the reference band, each fitted with the others' models taken
    away in all bands, in turns until nothing changes.  A source that a band says nothing of is
    flagged there, with NaN for its flux, and fitted with the others.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF, SersicGalaxy2D
    >>> from galmorph.multiband import deblend_bands
    >>> y, x = np.mgrid[-9:10, -9:10]
    >>> psf = {b: PSF(np.exp(-0.5 * (x**2 + y**2) / s**2)) for b, s in (("g", 1.6), ("r", 1.2))}
    >>> params = np.array([[500, 18, 20, 3, 1.5, 0.3, 0.4], [300, 25, 22, 2, 1, 0.2, 1.2]])
    >>> rng = np.random.default_rng(1)
    >>> images = {}
    >>> for band, flux in (("g", (200, 250)), ("r", (500, 300))):
    ...     params[:, 0] = flux
    ...     images[band] = SersicGalaxy2D(psf=psf[band]).render((41, 45), params=params).sum(0)
    ...     images[band] += rng.normal(0, 0.2, (41, 45))
    >>> result = deblend_bands(
    ...     images, params[:, 1:3], model=SersicGalaxy2D(), psf=psf, uncertainty=0.2
    ... )
    >>> pull = (result.flux - [[200, 500], [250, 300]]) / result.flux_err
    >>> bool(np.all(np.abs(pull) < 4))
    True
    """
    from galmorph._bandfit import solve_bands

    if background not in BACKGROUND_TERMS:
        raise ValueError(f"background must be one of {list(BACKGROUND_TERMS)}, not {background!r}")
    if int(max_group) != max_group or max_group < 1:
        raise ValueError(f"max_group must be a positive integer, not {max_group!r}")
    if not 0 <= structure < np.inf:
        raise ValueError(f"structure must be finite and not negative, not {structure!r}")
    fitter = _checked_fitter(fitter)
    if getattr(fitter.noise, "needs_misfit", False):
        structure = 0.0
    if model is None:
        from galmorph.models.learned import LearnedGalaxy2D

        model = LearnedGalaxy2D.from_pretrained()
    names, each = _named_bands(images, bands)
    if reference is not None and reference not in names:
        raise ValueError(f"the reference must be one of {', '.join(names)}, not {reference!r}")
    options = {
        name: _per_band(value, names, name)
        for name, value in (("psf", psf), ("uncertainty", uncertainty), ("mask", mask))
    }
    first = names.index(reference) if reference is not None else 0
    scenes = _read_bands(each, first, sources, model, options, position_prior)
    if reference is None:
        first = int(np.argmax([_signal(scene) for scene in scenes]))
    for one in {id(m): m for m in scenes[first].models}.values():
        _check_flux(one, fitter)
    started = time.perf_counter()
    with _reporter(progress, 2 * len(scenes[first].xy)) as report:
        groups = solve_bands(
            scenes,
            first,
            fitter,
            background,
            int(max_group),
            report,
            colors=component_colors,
            structure=float(structure),
        )
    seconds = time.perf_counter() - started
    found = [_result(scene, fitter, background, seconds, 1, None) for scene in scenes]
    meta = dict(found[first].meta)
    meta["images"] = [scene.name for scene in scenes]
    meta["errors"] = {k: v for scene in scenes for k, v in scene.errors.items()}
    meta |= {"bands": list(names), "reference": names[first], "groups": len(scenes[first].groups)}
    return MultiBandResult(
        bands=names,
        reference=names[first],
        scenes=dict(zip(names, found, strict=True)),
        meta=meta,
        _groups=groups,
        _own=[_own_of(m, component_colors) for m in scenes[first].models],
    )


def _own_of(model: GalaxyModel, colors: bool) -> list[str]:
    """Parameters that each band has of its own."""
    split = colors and isinstance(model, BulgeDiskGalaxy2D)
    split = split and not (model.fixed[_SHARE] or model.tied[_SHARE])
    return ["flux", _SHARE] if split else ["flux"]


def _named_bands(images: Any, bands: Sequence[str] | None) -> tuple[tuple[str, ...], list[Any]]:
    """Names and images of the bands."""
    if isinstance(images, Mapping):
        names = tuple(images) if bands is None else tuple(bands)
        missing = [n for n in names if n not in images]
        if missing:
            raise ValueError(f"there is no image of band {missing[0]!r}")
        each = [images[n] for n in names]
    elif isinstance(images, list | tuple) or len(getattr(images, "shape", ())) == 3:
        each = [images[i] for i in range(len(images))]
        names = tuple(map(str, range(len(each)))) if bands is None else tuple(bands)
    else:
        raise TypeError(
            "images must be a dict, a list or a cube with one image a band, not "
            f"{type(images).__name__}"
        )
    if len(names) != len(each):
        raise ValueError(f"there are {len(names)} names for {len(each)} bands")
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError("bands must be one or more different names")
    return names, each


def _per_band(value: Any, names: tuple[str, ...], what: str) -> list[Any]:
    """What is given for each band, or for all of them."""
    if isinstance(value, Mapping):
        missing = [n for n in names if n not in value]
        if missing:
            raise ValueError(f"there is no {what} of band {missing[0]!r}")
        return [value[n] for n in names]
    several = isinstance(value, list | tuple) or np.ndim(getattr(value, "data", value)) == 3
    several |= isinstance(value, np.ndarray) and value.ndim == 1
    if not several:
        return [value] * len(names)
    if len(value) != len(names):
        raise ValueError(f"there are {len(value)} of {what} for {len(names)} bands")
    return [value[i] for i in range(len(names))]


def _read_bands(each, first: int, sources, model, options, position_prior) -> list[Any]:
    """A scene of each band, all with the sources of one of them."""
    from galmorph._scenes import check_points, read_scenes

    def read(i: int, sources: Any) -> Any:
        (scene,), single = read_scenes(
            each[i],
            sources,
            models=model,
            position_prior=position_prior,
            **{name: values[i] for name, values in options.items()},
        )
        if not single:
            raise ValueError("each band must be one image (ny, nx)")
        return scene

    scenes = {first: read(first, sources)}
    for i in range(len(each)):
        if i != first:
            scenes[i] = read(i, scenes[first].xy)
            scenes[i].ids, scenes[i].models = scenes[first].ids, scenes[first].models
        if scenes[i].shape != scenes[first].shape:
            raise ValueError(
                f"bands must be on the same pixels, not of shapes {scenes[first].shape} and "
                f"{scenes[i].shape}; see forced_photometry"
            )
    ordered = [scenes[i] for i in range(len(each))]
    if len({scene.psf is None for scene in ordered}) > 1:
        raise ValueError("some bands have a PSF and others have none")
    for scene in ordered:
        if isinstance(scene.psf, PSFField):
            raise TypeError(
                "bands are fitted together with one PSF each; forced_photometry and deblend take "
                "one that changes with position"
            )
        check_points(scene, scene.models)
    return ordered


def _signal(scene: Any) -> float:
    """Typical signal to noise of the pixels around the sources."""
    values = []
    for x, y in scene.xy[np.isfinite(scene.xy).all(1)]:
        rows, columns = (slice(max(int(v) - 3, 0), max(int(v) + 4, 0)) for v in (y, x))
        weight = scene.inv_sigma[rows, columns]
        if (weight > 0).any():
            data = scene.data[rows, columns]
            values.append((data * weight**2).sum() / np.sqrt((weight**2).sum()))
    return float(np.median(values)) if values else -np.inf


def _check_flux(model: GalaxyModel, fitter: Any) -> None:
    default = model.default_bounds()["flux"]
    if (
        model.fixed["flux"]
        or model.tied["flux"]
        or tuple(model.bounds["flux"]) != tuple(default)
        or "flux" in fitter.priors_of(model)
    ):
        raise ValueError(
            "each band has a flux of its own: it may not be fixed, tied, bounded or have a prior"
        )
