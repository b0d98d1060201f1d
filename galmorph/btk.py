"""A deblender for BlendingToolKit (Mendoza et al. 2025, doi:10.33232/001c.129699).

The module is importable without BlendingToolKit; making a `GalmorphDeblender` needs it
(``pip install blending-toolkit``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy.table import Table

try:
    from btk.deblend import Deblender
except ImportError as _error:
    Deblender, _missing = object, _error
else:
    _missing = None

__all__ = ["GalmorphDeblender"]

#: A model is a source's own segment where it is brighter than this, in sigma of a pixel; so are
#: the true segments in BlendingToolKit.
_SEGMENT = 3.0


class GalmorphDeblender(Deblender):
    """Deblend the images of a ``btk.blend_batch.BlendBatch`` in one band.

    All blends of a batch are fitted at once; call it as any deblender of BlendingToolKit.

    Parameters
    ----------
    max_n_sources : int
        As for all deblenders; of more sources the brightest are returned.
    band : int, optional
        Index of the band that is fitted.
    model : GalaxyModel, optional
        As for `galmorph.deblend`: by default learned galaxies.
    true_centres : bool, optional
        Whether to take the positions of the true catalogue (``x_peak``, ``y_peak``) instead of
        detecting the sources.
    find_missed : float, optional
        Look for sources that were missed, as in `galmorph.deblend`.
    uncertainty : float, optional
        Standard deviation of a pixel; by default that of the background is measured in
        each image.
    detection, options : dict, optional
        Further arguments of `galmorph.detection.detect` and of `galmorph.deblend`.

    Raises
    ------
    ImportError
        If BlendingToolKit is not installed.

    Notes
    -----
    Returned are, for each blend, a catalogue (``ra`` and ``dec`` in arcseconds as in all
    catalogues of BlendingToolKit, ``x_peak`` and ``y_peak`` in pixels, ``flux``, ``flux_err``,
    ``flags``, ``added``), ``deblended_images`` of one band, which are the models (less noise and
    background), and ``segmentation``: where a model is brighter than 3 sigma.

    The PSF is drawn by GalSim at the pixel scale with the pixel in it, as the blends are.

    Examples
    --------
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.btk import GalmorphDeblender
    >>> deblender = GalmorphDeblender(
    ...     max_n_sources=3, band=2, model=SersicGalaxy2D(), find_missed=5
    ... )  # doctest: +SKIP
    >>> deblend_batch = deblender(blend_batch)  # doctest: +SKIP
    """

    def __init__(
        self,
        max_n_sources: int,
        *,
        band: int = 0,
        model: Any = None,
        true_centres: bool = False,
        find_missed: float | None = None,
        uncertainty: float | None = None,
        detection: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if _missing is not None:
            raise ImportError(
                "GalmorphDeblender needs BlendingToolKit: pip install blending-toolkit"
            ) from _missing
        super().__init__(max_n_sources)
        if uncertainty is not None and not (np.isfinite(uncertainty) and uncertainty > 0):
            raise ValueError(f"uncertainty must be a positive number, not {uncertainty!r}")
        self.band, self.model, self.true_centres = band, model, bool(true_centres)
        self.find_missed, self.uncertainty = find_missed, uncertainty
        self.detection, self.options = dict(detection or {}), dict(options or {})

    def deblend(self, ii: int, blend_batch: Any) -> Any:
        """Deblend one blend of a batch.

        Parameters
        ----------
        ii : int
            Which one.
        blend_batch : btk.blend_batch.BlendBatch

        Returns
        -------
        btk.blend_batch.DeblendExample
        """
        from btk.blend_batch import DeblendExample

        (result,) = self._fit(blend_batch, [ii])
        catalog, segmentation, images = self._output(result, blend_batch)
        return DeblendExample(
            self.max_n_sources,
            catalog,
            n_bands=1,
            image_size=blend_batch.image_size,
            segmentation=segmentation,
            deblended_images=images,
        )

    def batch_call(self, blend_batch: Any, njobs: int = 1, **kwargs: Any) -> Any:
        """Deblend all blends of a batch.

        Parameters
        ----------
        blend_batch : btk.blend_batch.BlendBatch
        njobs : int, optional
            Is not used: blends are fitted at once, in one process.
        **kwargs
            None is known; there to be as other deblenders.

        Returns
        -------
        btk.blend_batch.DeblendBatch
        """
        from btk.blend_batch import DeblendBatch

        if kwargs:
            raise TypeError(f"GalmorphDeblender takes no {', '.join(kwargs)} at a call")
        results = self._fit(blend_batch, range(blend_batch.batch_size))
        catalogs, segments, images = zip(
            *(self._output(result, blend_batch) for result in results), strict=True
        )
        return DeblendBatch(
            blend_batch.batch_size,
            self.max_n_sources,
            list(catalogs),
            n_bands=1,
            image_size=blend_batch.image_size,
            segmentation=np.array(segments),
            deblended_images=np.array(images),
        )

    def _fit(self, batch: Any, rows: Any) -> list[Any]:
        """Scenes of some blends of a batch."""
        from galmorph.deblending import deblend
        from galmorph.detection import detect

        images, sigma, sources = [], [], []
        for i in rows:
            image = np.asarray(batch.blend_images[i][self.band], dtype=float)
            if self.true_centres and self.uncertainty is not None:
                found, noise = None, np.full(image.shape, self.uncertainty)
            else:
                found = detect(image, uncertainty=self.uncertainty, **self.detection)
                noise = found.rms
            images.append(image)
            sigma.append(noise)
            sources.append(_true_positions(batch, i) if self.true_centres else found.positions)
        return deblend(
            np.array(images),
            sources,
            model=self.model,
            uncertainty=np.array(sigma),
            psf=_psf(batch, self.band),
            find_missed=self.find_missed,
            **self.options,
        )

    def _output(self, result: Any, batch: Any) -> tuple[Table, np.ndarray, np.ndarray]:
        """Catalogue, segments (n, ny, nx) and images (n, 1, ny, nx) of a scene."""
        good = np.flatnonzero(~result.failed)
        rows = np.sort(good[np.argsort(-result.flux[good])][: self.max_n_sources])
        xy = np.array([result.params[k][1:3] for k in rows]).reshape(-1, 2)
        ra, dec = batch.wcs.pixel_to_world_values(*xy.T)
        table = Table()
        table["ra"], table["dec"] = 3600 * np.asarray(ra), 3600 * np.asarray(dec)
        table["x_peak"], table["y_peak"] = xy.T
        table["flux"], table["flux_err"] = result.flux[rows], result.flux_err[rows]
        table["flags"], table["added"] = result.flags[rows], result.added[rows]
        images = np.zeros((self.max_n_sources, 1, *result.data.shape))
        for n, k in enumerate(rows):
            where, light = result.source_image(k)
            images[n, 0][where] = light
        segments = images[:, 0] * result.inv_sigma > _SEGMENT
        return table, segments, images


def _true_positions(batch: Any, i: int) -> np.ndarray:
    catalog = batch.catalog_list[i]
    return np.column_stack([catalog["x_peak"], catalog["y_peak"]]).astype(float)


def _psf(batch: Any, band: int) -> Any:
    """The PSF of a band with the response of the pixel."""
    from galmorph.psf import PSF

    scale = batch.survey.pixel_scale.to_value("arcsec")
    side = batch.image_size - 1 + batch.image_size % 2
    return PSF(batch.psf[band].drawImage(nx=side, ny=side, scale=scale).array)
