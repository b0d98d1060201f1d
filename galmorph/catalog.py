"""From an image of a field to a catalogue: detection, stars and galaxies, deblending, fluxes.

`photometry` is the whole of it in one call, and `Photometry` what comes out: a scene, a table,
and files of both.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.table import MaskedColumn, QTable

from galmorph._magnitudes import magnitudes
from galmorph._magnitudes import zero_point as zero_of
from galmorph.deblending import SceneResult, deblend
from galmorph.detection import (
    Detection,
    detect,
    estimate_psf,
    gaussian_psf,
    noise_correlation,
)
from galmorph.flags import FitFlag
from galmorph.models.base import GalaxyModel
from galmorph.models.bulge_disk import BulgeDiskGalaxy2D
from galmorph.models.point_source import PointSource2D
from galmorph.models.sersic import SersicGalaxy2D

__all__ = ["Photometry", "output_files", "photometry"]

#: Galaxies of less S/N are not looked at for their class.
_CLASS_SNR = 20.0
#: A larger factor is not noise that is correlated but light that was not detected.
_LARGEST_FACTOR = 2.0
#: FWHM in pixels of a PSF of which nothing is known.
_SHARPEST = 2.0
_RADII = ("r_eff", "r_50", "r_disk")


@dataclass(kw_only=True, eq=False, repr=False)
class Photometry:
    """A field with its sources; made by `photometry`.

    Attributes
    ----------
    scene : SceneResult
        The fit of all sources.
    detection : Detection
        What they were found on: background, noise and segments.
    psf_statement : str
        Where the PSF comes from.
    zero_point : float or None
        AB magnitude of one unit of flux.
    pixel_scale : float or None
        Arcseconds a pixel, where there is no WCS.
    classes : array, shape (K, C), or None
        Probabilities of morphological classes; NaN where nothing can be said.
    class_names : tuple of C str
    bands : dict of str to ForcedPhotometry
        Fluxes of the same sources in other images.
    meta : dict
        Provenance: settings, versions, date.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph import photometry
    >>> y, x = np.mgrid[-9:10, -9:10]
    >>> psf = np.exp(-0.5 * (x**2 + y**2) / 1.3**2)
    >>> one = SersicGalaxy2D(500, 28, 30, r_eff=3, psf=psf).render((80, 80))
    >>> two = SersicGalaxy2D(300, 52, 48, r_eff=2, psf=psf).render((80, 80))
    >>> image = one + two + np.random.default_rng(1).normal(0, 0.3, (80, 80))
    >>> found = photometry(image, psf=psf, uncertainty=0.3, model="sersic", zero_point=25)
    >>> found
    <Photometry: 2 sources, 0 stars, 0 flagged>
    >>> print(found.to_table()["mag"].value.round(1).tolist())
    [18.2, 18.8]
    """

    scene: SceneResult
    detection: Detection
    psf_statement: str = ""
    zero_point: float | None = None
    pixel_scale: float | None = None
    classes: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    bands: dict[str, Any] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scene)

    def __repr__(self) -> str:
        stars = sum(isinstance(m, PointSource2D) for m in self.scene.models)
        flagged = int(np.count_nonzero(self.scene.flags))
        return f"<Photometry: {len(self)} sources, {stars} stars, {flagged} flagged>"

    # -- the catalogue -------------------------------------------------------------------

    def to_table(self) -> QTable:
        """Catalogue: one row a source.

        Returns
        -------
        `~astropy.table.QTable`
            The columns of `SceneResult.to_table` (positions, fluxes, shapes, latents, with
            errors and units), and ``mag``, ``mag_err`` (AB; NaN for fluxes that are not positive),
            ``r_half`` (half-light semi-major axis of whichever model, pixels) and
            ``r_half_arcsec``, ``star_probability``, ``class`` and ``p_class_…``, and for other
            bands ``flux_<band>``, ``flux_<band>_err``, ``mag_<band>``, ``mag_<band>_err`` and
            ``flags_<band>``.  Columns have descriptions; ``meta`` says how it was made.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph import photometry
        >>> image = SersicGalaxy2D(500, 28, 30, r_eff=3).render((64, 64))
        >>> image += np.random.default_rng(1).normal(0, 0.3, (64, 64))
        >>> table = photometry(image, psf=np.ones((1, 1)), model="sersic").to_table()
        >>> len(table), table["flux"].description
        (1, 'Total flux of the model')
        """
        table = self.scene.to_table()
        self._add_magnitudes(table)
        self._add_radius(table)
        if self.scene.candidates and "star" in self.scene.candidates:
            table["star_probability"] = table["p_star"]
        if self.classes is not None:
            table["class"] = self._class_column()
            for k in range(len(self.class_names)):
                table[f"p_class_{k}"] = self.classes[:, k]
        for name, forced in self.bands.items():
            own = forced.to_table()
            for column in own.colnames:
                if column.startswith(("flux", "mag", "flags")):
                    table[column if name in column else f"{column}_{name}"] = own[column]
        _describe(table, self.class_names)
        table.meta.update(self.meta)
        return table

    def _add_magnitudes(self, table: QTable) -> None:
        zero = zero_of(self.scene.data_unit) if self.zero_point is None else self.zero_point
        if zero is None:
            return
        flux, error = (np.asarray(getattr(table[n], "value", table[n])) for n in _FLUXES)
        mag, mag_err = magnitudes(flux, error, zero)
        table["mag"], table["mag_err"] = u.Magnitude(mag, u.ABmag), mag_err * u.mag

    def _add_radius(self, table: QTable) -> None:
        radius = np.array([_half_light(m, p) for m, p in _models(self.scene)], dtype=float)
        table["r_half"] = radius * u.pix
        on_sky = np.full(len(table), np.nan)
        columns = [f"{name}_arcsec" for name in _RADII if f"{name}_arcsec" in table.colnames]
        for column in columns:
            values = _filled(table[column])
            on_sky = np.where(np.isfinite(on_sky), on_sky, values)
        if self.pixel_scale is not None and not np.isfinite(on_sky).any():
            on_sky = radius * self.pixel_scale
        if columns or self.pixel_scale is not None:
            table["r_half_arcsec"] = np.where(radius == 0, 0.0, on_sky) * u.arcsec

    def _class_column(self) -> MaskedColumn:
        known = np.isfinite(self.classes).all(1)
        best = np.nan_to_num(self.classes).argmax(1)
        return MaskedColumn([self.class_names[i] for i in best], mask=~known, dtype=str)

    # -- files ---------------------------------------------------------------------------

    def write(
        self,
        path: str | os.PathLike,
        *,
        images: bool = True,
        report: bool = True,
        overwrite: bool = False,
    ) -> list[Path]:
        """Write the catalogue, and beside it images and a report.

        Parameters
        ----------
        path : path
            Of the catalogue; its name ends in ``.fits`` or ``.ecsv``.
        images : bool, optional
            Write ``<name>_images.fits`` with the extensions ``MODEL``, ``RESIDUAL``,
            ``SEGMENTATION``, ``BACKGROUND`` and ``RMS``, all (ny, nx), with the WCS.
        report : bool, optional
            Write ``<name>.html``, field, thumbnails and table to page through.
        overwrite : bool, optional
            Whether files of these names may be replaced.

        Returns
        -------
        list of Path
            What was written.

        Raises
        ------
        ValueError
            If the name has another ending.
        OSError
            If a file exists and ``overwrite`` is false, or cannot be written.

        Examples
        --------
        >>> import numpy as np, os, tempfile
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph import photometry
        >>> image = SersicGalaxy2D(500, 28, 30, r_eff=3).render((64, 64))
        >>> image += np.random.default_rng(1).normal(0, 0.3, (64, 64))
        >>> found = photometry(image, psf=np.ones((1, 1)), model="sersic")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = found.write(os.path.join(folder, "catalog.fits"))
        >>> [file.name for file in files]
        ['catalog.fits', 'catalog_images.fits', 'catalog.html']
        """
        files = output_files(path, images=images, report=report)
        taken = [file for file in files if file.exists()]
        if taken and not overwrite:
            raise OSError(f"{taken[0]} exists; say overwrite=True")
        table = self.to_table()
        _write_table(table, files[0])
        if images:
            self._hdus().writeto(files[1], overwrite=True)
        if report:
            from galmorph.report import catalog_report

            catalog_report(self.scene, files[-1], table=table, title=files[0].stem, overwrite=True)
        return files

    def _hdus(self) -> Any:
        from astropy.io import fits

        header = fits.Header()
        if self.scene.wcs is not None:
            header.update(self.scene.wcs.to_header())
        if self.scene.data_unit is not None:
            header["BUNIT"] = self.scene.data_unit.to_string("fits")
        try:
            segments = self.scene.to_segmentation().data
        except ValueError:  # nothing stands out
            segments = np.zeros(self.scene.data.shape)
        images = {
            "MODEL": self.scene.model_image,
            "RESIDUAL": self.scene.residual_image,
            "SEGMENTATION": segments,
            "BACKGROUND": self.detection.background,
            "RMS": self.detection.rms,
        }
        hdus = fits.HDUList([fits.PrimaryHDU()])
        for name, image in images.items():
            whole = name == "SEGMENTATION"
            own = header.copy()
            if whole:
                own.remove("BUNIT", ignore_missing=True)
            image = np.asarray(image, dtype=np.int32 if whole else np.float32)
            hdus.append(fits.ImageHDU(image, own, name=name))
        return hdus


_FLUXES = ("flux", "flux_err")
_DESCRIPTIONS = {
    "id": "Label of the source",
    "flux": "Total flux of the model",
    "x_0": "Centre; (0, 0) is the centre of the first pixel",
    "y_0": "Centre; (0, 0) is the centre of the first pixel",
    "mag": "AB magnitude of the flux",
    "snr": "Flux over the error that noise alone makes",
    "r_half": "Half-light semi-major axis before the PSF; 0 for a star",
    "r_half_arcsec": "Half-light semi-major axis before the PSF; 0 for a star",
    "theta": "Angle of the major axis, counter-clockwise from +x",
    "position_angle": "Angle of the major axis, from north through east",
    "ellip": "1 - b/a in pixels",
    "ellip_sky": "1 - b/a on the sky",
    "n": "Sersic index",
    "star_probability": "That it is a point source, by the evidence",
    "class": "Most probable morphological class",
    "group": "Sources of one group were fitted together",
    "blendedness": "1 - <s, s> / <s, t> of the models (Bosch et al. 2018)",
    "purity": "Mean share of the source in its own pixels",
    "chi2": "Of the group",
    "dof": "Of the group",
    "flags": "Bit mask of galmorph.FitFlag",
    "model": "What was fitted",
    "added": "Found in the residual, not by the detection",
}


def _describe(table: QTable, class_names: tuple[str, ...]) -> None:
    for name in table.colnames:
        base = name.removesuffix("_err")
        text = _DESCRIPTIONS.get(base, "")
        if name.endswith("_err"):
            text = f"Standard deviation of {base}"
        elif name.startswith("p_class_"):
            text = f"Probability of the class {class_names[int(name[8:])]!r}"
        elif name.startswith("p_"):
            text = f"Probability of the model {name[2:]!r}"
        elif name[:1] == "z" and name[1:].isdigit():
            text = "Latent of the learned model"
        if text:
            table[name].info.description = text


def _models(scene: SceneResult):
    return zip(scene.models, scene.params, strict=True)


def _half_light(model: GalaxyModel, params: np.ndarray) -> float:
    """Half-light semi-major axis in pixels."""
    if not np.isfinite(params).all():
        return np.nan
    if isinstance(model, PointSource2D):
        return 0.0
    names = model.param_names
    own = next((n for n in _RADII if n in names), None)
    if isinstance(model, BulgeDiskGalaxy2D):
        return _bulge_disk_radius(dict(zip(names, params, strict=True)))
    return np.nan if own is None else float(params[names.index(own)])


def _bulge_disk_radius(values: dict[str, float]) -> float:
    """Circle that holds half of the light of both, each taken as round, of equal area."""
    from scipy.optimize import brentq
    from scipy.special import gammainc, gammaincinv

    share = values["bulge_fraction"]
    n, parts = values["n_bulge"], []
    for radius, ellip, index in (
        (values["r_bulge"], values["ellip_bulge"], n),
        (values["r_disk"], values["ellip_disk"], 1.0),
    ):
        parts.append((radius * np.sqrt(1 - ellip), index, gammaincinv(2 * index, 0.5)))

    def excess(log_r: float) -> float:
        inside = [gammainc(2 * k, b * (np.exp(log_r) / r) ** (1 / k)) for r, k, b in parts]
        return share * inside[0] + (1 - share) * inside[1] - 0.5

    sizes = [np.log(r) for r, _, _ in parts]
    if np.isclose(*sizes):
        return float(np.exp(sizes[0]))
    return float(np.exp(brentq(excess, min(sizes), max(sizes))))


def _filled(column: Any) -> np.ndarray:
    values = np.asarray(getattr(column, "value", column), dtype=float)
    mask = getattr(column, "mask", None)
    return values if mask is None else np.where(mask, np.nan, values)


def output_files(
    path: str | os.PathLike, *, images: bool = True, report: bool = True
) -> list[Path]:
    """Names of the files that `Photometry.write` makes, the catalogue first.

    Raises
    ------
    ValueError
        If the name does not end in ``.fits`` or ``.ecsv``.

    Examples
    --------
    >>> from galmorph.catalog import output_files
    >>> [str(file) for file in output_files("field.fits")]
    ['field.fits', 'field_images.fits', 'field.html']
    """
    path = Path(path)
    if path.suffix.lower() not in (".fits", ".ecsv"):
        raise ValueError(f"{path}: the name of a catalogue ends in .fits or .ecsv")
    files = [path]
    if images:
        files.append(path.with_name(f"{path.stem}_images.fits"))
    if report:
        files.append(path.with_suffix(".html"))
    return files


def _write_table(table: QTable, path: Path) -> None:
    with warnings.catch_warnings():
        # FITS has no place for everything in meta, which the comments keep as YAML
        warnings.simplefilter("ignore")
        table.write(path, overwrite=True)


# -- the pipeline ------------------------------------------------------------------------------


def photometry(
    image: Any,
    sources: Any = None,
    *,
    model: str | GalaxyModel | Mapping[str, GalaxyModel] = "auto",
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    gain: float | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    noise_factor: float | None = None,
    detection: Mapping[str, Any] | None = None,
    star_prior: float = 0.2,
    psf_error: float = 0.03,
    structure: float = 1.0,
    find_missed: float | None = 6.0,
    classes: bool = True,
    bands: Mapping[str, Any] | None = None,
    fitter: Any = None,
    max_group: int = 8,
    checkpoint: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool | Callable[[int, int], None] = False,
) -> Photometry:
    """Catalogue of an image: background, detection, deblending, fluxes, shapes and classes.

    Parameters
    ----------
    image : array, Quantity, NDData, HDU or path
        One image (ny, nx); as for `galmorph.fit_images`.  Files bring their uncertainty (or
        variance, or weight), mask, unit, WCS and PSF.
    sources : optional
        Where the sources are, as for `galmorph.deblend`, instead of a detection.
    model : {"auto", "sersic", "learned", "bulge-disk"}, GalaxyModel or mapping, optional
        What galaxies are.  With "auto" each has what has the greater evidence, a Sérsic profile or,
        at S/N above 20, a learned galaxy.  All but a mapping of one's own come with stars.
    uncertainty, mask, psf
        As for `galmorph.deblend`.  Noise that is not given is that of the background.  A PSF
        that is neither given nor in the file, or is "auto", is measured
        (`galmorph.detection.estimate_psf`).
    gain : float, optional
        Electrons per unit of the data: adds the photon noise of the sources, where the
        uncertainty is that of the background only.
    zero_point : float, optional
        AB magnitude of one unit of flux; needless if the unit of the image is one of flux density.
    pixel_scale : float, optional
        Arcseconds a pixel, where there is no WCS.
    noise_factor : float, optional
        The uncertainty is multiplied by this.  By default it is measured how much larger the
        noise of an area is than that of independent pixels
        (`galmorph.detection.noise_correlation`); 1 leaves the uncertainty as it is.
    detection : mapping, optional
        Arguments of `galmorph.detection.detect`: ``threshold``, ``n_pixels``, ``box_size`` …
    star_prior : float, optional
        Share of stars that is expected.
    psf_error, structure : float, optional
        See `galmorph.deblend`.
    find_missed : float or None, optional
        Significance above which sources are looked for, once, in the residual.
    classes : bool, optional
        Whether galaxies above a S/N of 20 are given morphological classes.
    bands : mapping of str to image, optional
        Other images, in which the fluxes of the same models are measured; a tuple is an image and a
        dictionary of options of `galmorph.multiband.forced_photometry`, as ``psf`` or
        ``zero_point``.
    fitter : MAPFitter, optional
    max_group : int, optional
        See `galmorph.deblend`.
    checkpoint : path, optional
        File that keeps finished fits; a job that was stopped goes on from there.
    workers : int, optional
        How many processes fit.
    progress : bool or callable, optional
        Show a bar, or call ``progress(done, total)``.

    Returns
    -------
    Photometry

    Raises
    ------
    TypeError, ValueError, OSError
        If an argument is not what is described above, or the image has no usable pixel.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph import photometry
    >>> y, x = np.mgrid[-9:10, -9:10]
    >>> psf = np.exp(-0.5 * (x**2 + y**2) / 1.3**2)
    >>> image = SersicGalaxy2D(500, 28, 30, r_eff=3, psf=psf).render((80, 80))
    >>> image += np.random.default_rng(1).normal(5, 0.3, (80, 80))
    >>> found = photometry(image, psf=psf, model="sersic", zero_point=25)
    >>> table = found.to_table()
    >>> bool(abs(table["flux"][0] - 500) < 4 * table["flux_err"][0])
    True
    """
    _check(zero_point, gain, pixel_scale, noise_factor, star_prior)
    candidates, prior = _candidates(model, star_prior)
    found = detect(image, uncertainty=uncertainty, mask=mask, **dict(detection or {}))
    frame = _frame_of(image)
    psf, statement = _psf(psf, frame, image, found)
    usable = np.isfinite(found.data) & np.isfinite(found.rms)
    factor = noise_factor if noise_factor is not None else _noise_factor(found)
    options = {}
    if candidates is not None:
        options = {"model_prior": prior, "psf_error": psf_error}
    scene = deblend(
        _nddata(found, frame, factor, usable),
        found if sources is None else sources,
        model=candidates if candidates is not None else model,
        fitter=_fitter(fitter, gain, found, factor),
        psf=psf,
        structure=structure,
        find_missed=find_missed,
        max_rounds=1,
        max_group=max_group,
        checkpoint=checkpoint,
        workers=workers,
        progress=progress,
        **options,
    )
    scene.flags[_saturated(scene, frame, found)] |= np.int32(FitFlag.SATURATED)
    scene.meta["images"] = frame.name
    if found.settings["noise"] == "measured":
        scene.flags |= np.int32(FitFlag.NOISE_ESTIMATED)
    probability, names = _classes(scene) if classes else (None, ())
    return Photometry(
        scene=scene,
        detection=found,
        psf_statement=statement,
        zero_point=zero_point,
        pixel_scale=pixel_scale,
        classes=probability,
        class_names=names,
        bands=_bands(scene, bands or {}),
        meta={
            "image": frame.name,
            "psf": statement,
            "noise": found.settings["noise"],
            "noise_factor": round(float(factor), 4),
            "detection": dict(found.settings),
            "star_prior": star_prior,
            "zero_point": zero_of(frame.unit) if zero_point is None else zero_point,
        },
    )


_GALAXIES = ("auto", "sersic", "learned", "bulge-disk")


def _check(zero_point, gain, pixel_scale, noise_factor, star_prior) -> None:
    if zero_point is not None and not np.isfinite(zero_point):
        raise ValueError(f"zero_point must be a magnitude, not {zero_point!r}")
    for name, value in (
        ("gain", gain),
        ("pixel_scale", pixel_scale),
        ("noise_factor", noise_factor),
    ):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, not {value!r}")
    if not 0 < star_prior < 1:
        raise ValueError(f"star_prior must be between 0 and 1, not {star_prior!r}")


def _candidates(model: Any, star_prior: float) -> tuple[Any, dict[str, float] | None]:
    """Models to choose from and their probabilities; None for one's own."""
    if isinstance(model, Mapping):
        return dict(model), None
    if isinstance(model, GalaxyModel):
        galaxies = {"galaxy": model}
    elif model == "sersic":
        galaxies = {"sersic": SersicGalaxy2D()}
    elif model == "bulge-disk":
        galaxies = {"bulge_disk": BulgeDiskGalaxy2D()}
    elif model in ("learned", "auto"):
        from galmorph.models.learned import LearnedGalaxy2D

        galaxies = {} if model == "learned" else {"sersic": SersicGalaxy2D()}
        galaxies["learned"] = LearnedGalaxy2D.from_pretrained()
    else:
        raise ValueError(
            f"model must be one of {', '.join(_GALAXIES)}, or a galmorph model, not {model!r}"
        )
    share = (1 - star_prior) / len(galaxies)
    models = {"star": PointSource2D(), **galaxies}
    return models, {"star": star_prior, **dict.fromkeys(galaxies, share)}


def _frame_of(image: Any) -> Any:
    from galmorph._inputs import make_frame

    return make_frame(image)


def _psf(psf: Any, frame: Any, image: Any, found: Detection) -> tuple[Any, str]:
    """The PSF and where it comes from."""
    measured = isinstance(psf, str) and psf == "auto"
    if psf is not None and not measured:
        return psf, "given"
    if frame.psf is not None and not measured:
        return frame.psf, "from the image"
    if not len(found):
        fwhm = found.settings["kernel_fwhm"] or _SHARPEST
        return gaussian_psf(fwhm), (
            f"Gaussian of FWHM {fwhm:.2f} pixels, for there is no source to measure it from"
        )
    estimate = estimate_psf(image, found)
    return estimate.psf, estimate.statement


def _noise_factor(found: Detection) -> float:
    """By how much the noise of areas is larger than that of independent pixels."""
    try:
        with np.errstate(invalid="ignore", divide="ignore"):  # pixels that are all the same
            factor, error = noise_correlation(found.data, mask=~found.sky)
    except ValueError:  # too little sky
        return 1.0
    return float(np.clip(factor, 1.0, _LARGEST_FACTOR)) if factor > 1 + 3 * error else 1.0


def _nddata(found: Detection, frame: Any, factor: float, usable: np.ndarray) -> Any:
    """What is fitted: the image without its background, on the detection's noise."""
    from astropy.nddata import NDData, StdDevUncertainty

    sigma = np.where(usable, found.rms * factor, 0.0)
    return NDData(
        np.where(usable, found.data, 0.0),
        uncertainty=StdDevUncertainty(sigma),
        mask=~usable,
        unit=frame.unit,
        wcs=frame.wcs,
    )


def _saturated(scene: SceneResult, frame: Any, found: Detection) -> np.ndarray:
    """Which sources are saturated in the image as it was, (K,)."""
    from galmorph._scenes import _BRIGHT, is_saturated

    pixels, _, bad = frame.cut(...)
    with np.errstate(invalid="ignore"):
        bright = (found.data > _BRIGHT * found.rms) & ~bad
    return np.array([is_saturated(pixels, bright, p[1:3]) for p in scene.params], dtype=bool)


def _fitter(fitter: Any, gain: float | None, found: Detection, factor: float) -> Any:
    from galmorph.fitting import MAPFitter
    from galmorph.noise import PoissonNoise

    if gain is None:
        return fitter
    if fitter is not None:
        raise ValueError("a fitter brings its own noise: give either it or the gain")
    read_noise = float(np.nanmedian(found.rms)) * factor * gain
    return MAPFitter(noise=PoissonNoise(gain=gain, read_noise=read_noise))


def _classes(scene: SceneResult) -> tuple[np.ndarray, tuple[str, ...]]:
    """Probabilities (K, C) of the classes that ship, and their names."""
    from galmorph.classification import GalaxyClassifier

    classifier = GalaxyClassifier.from_pretrained()
    names = tuple(classifier.class_names)
    return scene.class_probabilities(classifier, least_snr=_CLASS_SNR), names


def _bands(scene: SceneResult, bands: Mapping[str, Any]) -> dict[str, Any]:
    from galmorph.multiband import forced_photometry

    found = {}
    for name, image in bands.items():
        image, options = image if isinstance(image, tuple) else (image, {})
        found[name] = forced_photometry(scene, image, band=name, **options)
    return found
