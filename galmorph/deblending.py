"""Deblending: fitting a scene of sources that share their pixels.

A blend is not cut apart.  Every source has a model, their sum is fitted to the image, and what
is known of each flux allows for what is not known of its neighbours.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
from astropy.table import QTable, vstack
from astropy.utils.exceptions import AstropyUserWarning

from galmorph.flags import FitFlag
from galmorph.images import _reporter, describe
from galmorph.models.base import GalaxyModel
from galmorph.psf import by_kind, psf_at, shared_or_each
from galmorph.results import BACKGROUND_TERMS, FitResult

__all__ = ["SceneResult", "deblend"]

# how `SceneResult.sample` draws
_METHODS = ("laplace", "importance", "mcmc")


def __getattr__(name: str) -> Any:
    if name == "GalmorphDeblender":
        from galmorph.btk import GalmorphDeblender

        return GalmorphDeblender
    raise AttributeError(f"module 'galmorph.deblending' has no attribute {name!r}")


@dataclass(kw_only=True, eq=False, repr=False)
class SceneResult:
    """A fitted scene: K sources and one image; made by `galmorph.deblend`.

    Attributes
    ----------
    models : list of K GalaxyModel
        What was fitted to each source, with its constraints.
    xy : array, shape (K, 2)
        Positions (x, y) that were given, or at which sources were found, in pixels.
    ids : array of int, shape (K,)
        Labels of the segments or of the catalogue if there were any, else 0 … K-1; those of
        sources that were found follow.
    flags : array of int32, shape (K,)
        Bit mask, see `FitFlag`.
    group : array of int, shape (K,)
        Number of the group in which each source was fitted; -1 if it was not.
    chi2, dof, n_iter : array, shape (K,)
        Of each source's group.
    added : array of bool, shape (K,)
        True for sources that were not given, but found in the residual; they come last.
    data, inv_sigma : array, shape (ny, nx)
        The image, 0 where unusable, and one over its uncertainty, 0 where unusable.
    psf : PSF, PSFField or None
    wcs : celestial WCS or None
    data_unit : `~astropy.units.Unit` or None
    candidates : tuple of M str
        Names of the models that there was to choose from, if any.
    log_evidence : array, shape (K, M), or None
        Natural logarithm of their evidence, the neighbours' models being taken away; NaN where
        it could not be found.
    model_prior : array, shape (M,), or None
        Their probabilities before the fit.
    meta : dict
        Provenance: versions, date, models, fitter, options, errors; ``missed`` says how many
        sources were added and how many refused.

    Notes
    -----
    ``blendedness`` and ``purity`` are of the models, as they are convolved with the PSF, with s
    the image of a source and t the sum of all:

    .. math:: \\mathrm{blendedness} = 1 - \\frac{\\langle s, s\\rangle}{\\langle s, t\\rangle},
              \\qquad \\mathrm{purity} = \\frac{\\sum s \\cdot (s / t)}{\\sum s}.

    The first is that of Bosch et al. (2018, PASJ 70, S5) and of BlendingToolKit; the second is
    the share of a source in the light of a pixel, averaged over its own light.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.deblending import deblend
    >>> one = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
    >>> two = SersicGalaxy2D(300, 25, 21, r_eff=3).render((41, 41))
    >>> image = one + two + np.random.default_rng(1).normal(0, 0.3, (41, 41))
    >>> result = deblend(image, [(18, 20), (25, 21)], model=SersicGalaxy2D(), uncertainty=0.3)
    >>> result
    <SceneResult: 2 sources in 1 group, 0 flagged>
    >>> result.flux_cov.shape, bool(result.flux_cov[0, 1] < 0)
    ((2, 2), True)
    """

    models: list[GalaxyModel]
    xy: np.ndarray
    ids: np.ndarray
    flags: np.ndarray
    group: np.ndarray
    chi2: np.ndarray
    dof: np.ndarray
    n_iter: np.ndarray
    added: np.ndarray
    data: np.ndarray
    inv_sigma: np.ndarray
    psf: Any = None
    wcs: Any = None
    data_unit: Any = None
    candidates: tuple[str, ...] = ()
    log_evidence: np.ndarray | None = None
    model_prior: np.ndarray | None = None
    meta: dict = field(default_factory=dict)
    _sources: list[Any] = field(default_factory=list)
    _groups: list[Any] = field(default_factory=list)
    _background: str = "none"
    _possible: list[GalaxyModel] = field(default_factory=list)  # what sources might have been
    _fitter: Any = None  # with its priors and noise; None where other bands were fitted with this
    _spread: np.ndarray | None = None  # of the prior of the positions, (K,)

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        groups = len(self._groups)
        return (
            f"<SceneResult: {len(self)} sources in {groups} group{'s' * (groups != 1)}, "
            f"{int(np.count_nonzero(self.flags))} flagged>"
        )

    # -- parameters ----------------------------------------------------------------------

    @property
    def params(self) -> np.ndarray | list[np.ndarray]:
        """Parameters of the sources in pixels of the image; NaN where nothing could be fitted.

        (K, P) if all have as many parameters, else a list of K arrays (P_k,).
        """
        own = [
            np.full(len(model.param_names), np.nan) if s.params is None else s.params
            for model, s in zip(self.models, self._sources, strict=True)
        ]
        same = len({len(p) for p in own}) == 1
        return np.stack(own) if same else own

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the parameters of all sources, (D, D) with D the sum of all P_k.

        In the order of ``params``; zero between groups, NaN for sources without a fit.  The
        background is marginalised.
        """
        sizes = [len(model.param_names) for model in self.models]
        first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        cov = np.zeros((first[-1], first[-1]))
        for k, source in enumerate(self._sources):
            if source.params is None:
                cov[first[k] : first[k + 1]] = cov[:, first[k] : first[k + 1]] = np.nan
        for group in self._groups:
            at = [np.arange(first[k], first[k + 1]) for k in group.members]
            at = np.concatenate(at)
            cov[np.ix_(at, at)] = np.nan if group.cov is None else group.cov
        return cov

    @property
    def flux(self) -> np.ndarray:
        """Total flux of each source, shape (K,)."""
        return np.array([p[0] for p in self.params])

    @property
    def flux_cov(self) -> np.ndarray:
        """Covariance of the fluxes, shape (K, K)."""
        cov = np.zeros((len(self), len(self)))
        for k, source in enumerate(self._sources):
            if source.params is None:
                cov[k] = cov[:, k] = np.nan
        for group in self._groups:
            rows, block = self._block(group, lambda size: [0])
            cov[np.ix_(rows, rows)] = block
        return cov

    @property
    def flux_err(self) -> np.ndarray:
        """Standard deviation of each flux, neighbours marginalised, shape (K,)."""
        return np.sqrt(self._variances([0])[:, 0])

    @property
    def snr(self) -> np.ndarray:
        """Flux over the error that noise alone makes, shape (K,)."""
        return np.array([source.snr for source in self._sources], dtype=float)

    def _block(self, group: Any, choose: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Part of the covariance of a group: some parameters of each of its members."""
        first, at = 0, []
        for k in group.members:
            size = len(self.models[k].param_names)
            at += [first + i for i in choose(size)]
            first += size
        blank = np.full((len(at), len(at)), np.nan)
        return group.members, blank if group.cov is None else group.cov[np.ix_(at, at)]

    def _variances(self, columns: Sequence[int]) -> np.ndarray:
        variance = np.full((len(self), len(columns)), np.nan)
        for group in self._groups:
            rows, block = self._block(group, lambda size: columns)
            own = np.diagonal(block).reshape(len(rows), len(columns))
            variance[rows] = np.where(own >= 0, own, np.nan)
        return variance

    @property
    def failed(self) -> np.ndarray:
        """True where the parameters must not be used, shape (K,)."""
        blank = [s.params is None or not np.isfinite(s.params).all() for s in self._sources]
        return ((self.flags & int(FitFlag.FAILED)) != 0) | np.array(blank, dtype=bool)

    @property
    def probability(self) -> np.ndarray | None:
        """Probability of each candidate, shape (K, M); None if there was no choice."""
        if self.log_evidence is None:
            return None
        with np.errstate(divide="ignore"):
            score = self.log_evidence + np.log(self.model_prior)
        top = np.where(np.isfinite(score), score, -np.inf).max(1, keepdims=True)
        score = np.where(np.isfinite(score), score, -np.inf)
        share = np.exp(np.where(np.isfinite(top), score - np.nan_to_num(top), np.nan))
        share = np.where(np.isfinite(top), np.nan_to_num(share), np.nan)
        return share / share.sum(1, keepdims=True)

    def sample(
        self,
        n: int,
        rng: np.random.Generator | int | None = None,
        *,
        method: str = "laplace",
    ) -> np.ndarray | list[np.ndarray]:
        """Draw parameters of all sources together from the posterior.

        Sources of one group are drawn jointly: where one has more light its neighbour has less.
        Each group is drawn given what the models of the others leave.

        Parameters
        ----------
        n : int
            How many draws, of equal weight.
        rng : `numpy.random.Generator` or int, optional
        method : {"laplace", "importance", "mcmc"}, optional
            ``"laplace"``: the normal approximation of the fit, in which radii and indices are
            normal in their logarithm, ellipses in -ln(q) (cos 2 theta, sin 2 theta).
            ``"mcmc"``: Markov chains, as of `MCMCFitter`.  ``"importance"``: weighted draws, as of
            `ImportanceFitter`, resampled; groups of more than 16 free parameters, if none
            of their galaxies is learned, and those whose weights cannot be trusted, are sampled by
            chains.

        Returns
        -------
        array, shape (K, n, P), or list of K arrays, shape (n, P_k)
            NaN where there is no fit (``"laplace"``: or no covariance).

        Raises
        ------
        ValueError
            If there is no such method, ``n`` is not a positive integer, or this is one band of a
            joint fit, whose posterior is not that of its own pixels (only ``"laplace"``).

        Warns
        -----
        `~astropy.utils.exceptions.AstropyUserWarning`
            Of sources whose chains did not converge: split R-hat above 1.01, or less than 400
            effective draws.  Their draws are returned.

        Notes
        -----
        ``"importance"`` and ``"mcmc"`` take the models for true: they know nothing of the light
        that models do not have, for which the covariance of the fit, and so ``"laplace"``, allows
        (``structure`` of `deblend`; with `~galmorph.noise.LearnedNoise` it is in the noise, and
        all methods know of it).  What has no prior is equally likely everywhere, as for
        `MCMCFitter`; centres have the normal prior of ``position_prior``.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> image += np.random.default_rng(1).normal(0, 0.3, (41, 41))
        >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> result.sample(100, rng=1).shape
        (1, 100, 7)
        >>> result.sample(100, rng=1, method="importance").shape
        (1, 100, 7)
        """
        if method not in _METHODS:
            raise ValueError(f"method must be one of {list(_METHODS)}, not {method!r}")
        if int(n) != n or n < 1:
            raise ValueError(f"n must be a positive integer, not {n!r}")
        n, rng = int(n), np.random.default_rng(rng)
        draws = [np.full((n, len(m.param_names)), np.nan) for m in self.models]
        drawn = self._from_normal(n, rng) if method == "laplace" else self._from(method, n, rng)
        for group, values in drawn:
            first = 0
            for k in group.members:
                draws[k] = values[:, first : first + draws[k].shape[1]]
                first += draws[k].shape[1]
        same = len({d.shape for d in draws}) == 1
        return np.stack(draws) if same else draws

    def _from_normal(self, n: int, rng: np.random.Generator) -> Iterator[tuple[Any, np.ndarray]]:
        """Groups and draws (n, D) from the normal approximation, where there is one."""
        for group in self._groups:
            size = sum(len(self.models[k].param_names) for k in group.members)
            normal = rng.standard_normal((1, n, size))
            if group.cov is None or not np.isfinite(group.cov).all():
                continue
            models = [self.models[k] for k in group.members]
            centre = np.concatenate([self._sources[k].params for k in group.members])
            yield group, _draws(models, centre, group.cov, normal)

    def _from(
        self, method: str, n: int, rng: np.random.Generator
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Groups and draws (n, D) from the posterior itself, where there is a fit."""
        from galmorph._scene_target import sample_groups

        if self._fitter is None:
            raise ValueError(
                "a band of a joint fit has the posterior of all bands; only method='laplace' knows"
            )
        lost: list[Any] = []
        for group, values, converged in sample_groups(
            self._scene(), self._fitter, self._background, method, n, rng
        ):
            if not converged:
                lost += self.ids[group.members].tolist()
            yield group, values
        if lost:
            warnings.warn(
                f"chains of sources {', '.join(map(str, sorted(lost)))} did not converge: their "
                "draws may not be those of the posterior",
                AstropyUserWarning,
                stacklevel=3,
            )

    def _scene(self) -> Any:
        """The scene as it was fitted."""
        from galmorph._scenes import Scene

        return Scene(
            data=self.data,
            inv_sigma=self.inv_sigma,
            psf=self.psf,
            flags=0,
            wcs=self.wcs,
            unit=self.data_unit,
            name=self.meta["images"],
            xy=self.xy,
            ids=self.ids,
            spread=self._spread,
            models=self.models,
            sources=self._sources,
            groups=self._groups,
        )

    def class_probabilities(self, classifier: Any = None, *, least_snr: float = 20.0) -> np.ndarray:
        """Probabilities of morphological classes, of each source without its neighbours.

        Parameters
        ----------
        classifier : GalaxyClassifier, optional
            By default ``GalaxyClassifier.from_pretrained()``.
        least_snr : float, optional
            Sources of lower ``snr`` have none.

        Returns
        -------
        array, shape (K, C)
            In the order of ``classifier.class_names``; NaN for point sources, faint ones and
            those without a fit.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(5000, 30, 32, r_eff=6, n=4).render((64, 64))
        >>> image += np.random.default_rng(1).normal(0, 0.3, (64, 64))
        >>> result = deblend(image, [(30, 32)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> result.class_probabilities().sum(1).round(6).tolist()
        [1.0]
        """
        from galmorph.classification import GalaxyClassifier
        from galmorph.models.point_source import PointSource2D

        classifier = GalaxyClassifier.from_pretrained() if classifier is None else classifier
        star = np.array([isinstance(m, PointSource2D) for m in self.models], dtype=bool)
        wanted = (self.snr > least_snr) & ~star & ~self.failed
        probability = np.full((len(self), len(classifier.class_names)), np.nan)
        for rows, data, sigma, position in self.stamps(np.flatnonzero(wanted)):
            psfs = [psf_at(self.psf, self.xy[k]) for k in rows]
            for part in by_kind(psfs):
                probability[rows[part]] = classifier.predict_proba(
                    data[part],
                    uncertainty=sigma[part],
                    psf=shared_or_each(psfs[i] for i in part),
                    positions=position[part],
                )
        return probability

    # -- images --------------------------------------------------------------------------

    def source_image(self, i: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """Where the model of one source is, and its light there.

        Parameters
        ----------
        i : int
            Which source; negative numbers count from the end.

        Returns
        -------
        where : tuple of slice
            (rows, columns) of the image.
        model : array
            The model without background, in that part of the image; beyond it is the noise.
            Empty where there is no fit.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> where, model = result.source_image(0)
        >>> image[where].shape == model.shape
        True
        """
        from galmorph._scenes import _overlap

        source = self._sources[range(len(self))[i]]
        if source.image is None or source.params is None:
            return (slice(0, 0), slice(0, 0)), np.zeros((0, 0))
        origin = tuple(s.start for s in source.box)
        there, here = _overlap(self.data.shape, origin, source.image.shape)
        return there, np.nan_to_num(source.image[here].astype(float))

    def stamps(self, rows: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Sources by themselves: the data less the background and all other models.

        Parameters
        ----------
        rows : sequence of int, optional
            Which sources, by default all; those without a fit in the image are left out.

        Yields
        ------
        rows : array of int, shape (n,)
            Sources whose stamps are of one size, which that of the source asks for.
        data, sigma : array, shape (n, side, side)
            Pixels and their uncertainty, 0 where unusable.
        position : array, shape (n, 2)
            Fitted centres (x, y) in the stamps.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> [data.shape for rows, data, sigma, position in result.stamps()]
        [(1, 41, 41)]
        """
        from galmorph._alone import stamps_alone

        scene = SimpleNamespace(
            data=self.data, inv_sigma=self.inv_sigma, sources=self._sources, groups=self._groups
        )
        for some, data, sigma, origin in stamps_alone(scene, rows):
            yield some, data, sigma, np.stack([self.params[k][1:3] for k in some]) - origin

    @property
    def model_image(self) -> np.ndarray:
        """The sum of all models, without background, shape (ny, nx)."""
        total = np.zeros(self.data.shape)
        for k in range(len(self)):
            where, model = self.source_image(k)
            total[where] += model
        return total

    @property
    def background_image(self) -> np.ndarray:
        """The fitted background, shape (ny, nx); the mean of those of groups that overlap."""
        from galmorph._scenes import background_image

        return background_image(self.data.shape, self._groups, self._sources, self._background)

    @property
    def residual_image(self) -> np.ndarray:
        """Data - models - background, shape (ny, nx); NaN in unusable pixels."""
        residual = self.data - self.model_image - self.background_image
        return np.where(self.inv_sigma > 0, residual, np.nan)

    @property
    def model_images(self) -> np.ndarray:
        """The model of each source without background, shape (K, ny, nx).

        All K images of the size of the whole; of large fields ask for one at a time, with
        `source_image`.
        """
        images = np.zeros((len(self), *self.data.shape))
        for k in range(len(self)):
            where, model = self.source_image(k)
            images[k][where] = model
        return images

    @property
    def deblended_images(self) -> np.ndarray:
        """The data of each source, shape (K, ny, nx).

        Each pixel, less the background, is shared in the ratio of the models there, so that
        the images add up to the data wherever there is any model light; elsewhere, and in
        unusable pixels, they are 0.
        """
        light = np.maximum(self.model_images, 0.0)
        total = light.sum(0)
        usable = (total > 0) & (self.inv_sigma > 0)
        data = np.where(usable, self.data - self.background_image, 0.0)
        return light * (data / np.where(usable, total, 1.0))

    @property
    def blendedness(self) -> np.ndarray:
        """1 - <s, s> / <s, t>, see the notes; shape (K,), NaN where there is no fit."""
        return self._overlaps()[0]

    @property
    def purity(self) -> np.ndarray:
        """Mean share of a source in its own pixels, see the notes; shape (K,)."""
        return self._overlaps()[1]

    def _overlaps(self) -> tuple[np.ndarray, np.ndarray]:
        blend, purity = np.full((2, len(self)), np.nan)
        total = self.model_image
        for k in range(len(self)):
            where, own = self.source_image(k)
            if not own.any():
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                blend[k] = 1 - (own * own).sum() / (own * total[where]).sum()
                share = np.where(total[where] != 0, own / total[where], 0.0)
                purity[k] = (own * share).sum() / own.sum()
        return blend, purity

    def to_segmentation(self, threshold: float = 1.0) -> Any:
        """Which source has the most light in each pixel.

        Parameters
        ----------
        threshold : float, optional
            Pixels in which all models together are fainter than this, in units of the
            uncertainty, belong to none.

        Returns
        -------
        `~photutils.segmentation.SegmentationImage`
            Source ``i`` has the label ``ids[i]`` if all of these are positive, else ``i + 1``.

        Raises
        ------
        ValueError
            If no pixel belongs to a source.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> result.to_segmentation().labels
        array([1])
        """
        from photutils.segmentation import SegmentationImage

        labels = self.ids if len(self) and self.ids.min() > 0 else np.arange(len(self)) + 1
        best = np.zeros(self.data.shape)
        segments = np.zeros(self.data.shape, dtype=int)
        for k in range(len(self)):
            where, own = self.source_image(k)
            ahead = own > best[where]
            best[where] = np.where(ahead, own, best[where])
            segments[where] = np.where(ahead, labels[k], segments[where])
        usual = np.median(self.inv_sigma[self.inv_sigma > 0]) if self.inv_sigma.any() else 0.0
        inv_sigma = np.where(self.inv_sigma > 0, self.inv_sigma, usual)
        segments[self.model_image * inv_sigma < threshold] = 0
        if not segments.any():
            raise ValueError(f"no model is brighter than {threshold} sigma anywhere")
        return SegmentationImage(segments)

    # -- tables --------------------------------------------------------------------------

    def to_table(self) -> QTable:
        """Catalogue: one row a source.

        Returns
        -------
        `~astropy.table.QTable`
            The columns of `FitResult.to_table`, with units and, given a celestial WCS, sky
            coordinates (``snr`` is that of noise alone); and ``model``, ``group``, ``added``,
            ``blendedness`` and ``purity``.
            Where models differ, columns that a source does not have are masked.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import SersicGalaxy2D
        >>> from galmorph.deblending import deblend
        >>> image = SersicGalaxy2D(500, 18, 20, r_eff=3).render((41, 41))
        >>> result = deblend(image, [(18, 20)], model=SersicGalaxy2D(), uncertainty=0.3)
        >>> result.to_table()["model"].tolist()
        ['SersicGalaxy2D']
        """
        kinds: dict[int, list[int]] = {}
        for k, model in enumerate(self.models):
            kinds.setdefault(id(model), []).append(k)
        parts = []
        if not kinds:  # the columns that there would be
            kinds = {k: [] for k in range(len(self._possible))}
        for key, rows in kinds.items():
            model = self.models[rows[0]] if rows else self._possible[key]
            part = self._fits(model, np.array(rows, dtype=int)).to_table()
            part["model"] = np.full(len(rows), type(model).__name__)
            part["_order"] = np.array(rows, dtype=int)
            parts.append(part)
        if not parts:
            table = QTable(
                names=("id", "flux", "flux_err", "x_0", "y_0"), dtype=(int, *[float] * 4)
            )
            table.meta.update(self.meta)
            return table
        table = parts[0] if len(parts) == 1 else vstack(parts, metadata_conflicts="silent")
        table.sort("_order")
        table.remove_column("_order")
        if "snr" in table.colnames:
            table["snr"] = self.snr
        table["group"], table["added"] = self.group, self.added
        table["blendedness"], table["purity"] = self._overlaps()
        if self.candidates:
            for name, values in zip(self.candidates, self.probability.T, strict=True):
                table[f"p_{name}"] = values
        table.meta.update({k: v for k, v in self.meta.items() if k != "errors" or v})
        return table

    def _fits(self, model: GalaxyModel, rows: np.ndarray) -> FitResult:
        """Sources of one model as fits of single galaxies."""
        size = len(model.param_names)
        params = np.full((len(rows), size), np.nan)
        cov = np.full((len(rows), size, size), np.nan)
        place = {int(k): i for i, k in enumerate(rows)}
        for group in self._groups:
            first = 0
            for k in group.members:
                end = first + len(self.models[k].param_names)
                if k in place and self._sources[k].params is not None:
                    params[place[k]] = self._sources[k].params
                    if group.cov is not None:
                        cov[place[k]] = group.cov[first:end, first:end]
                first = end
        return FitResult(
            model=model,
            params=params,
            cov=cov,
            background=np.empty((len(rows), 0)),
            background_cov=np.empty((len(rows), 0, 0)),
            chi2=self.chi2[rows],
            dof=self.dof[rows],
            flags=self.flags[rows],
            n_iter=self.n_iter[rows],
            origin=np.zeros((len(rows), 2), dtype=int),
            shapes=np.tile(self.data.shape, (len(rows), 1)),
            ids=self.ids[rows],
            data_unit=self.data_unit,
            wcs=self.wcs,
        )


def _draws(models, centre: np.ndarray, cov: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Parameters (n, D) of all sources of a group, of standard normal numbers (1, n, D)."""
    from galmorph.posterior import _Unbounded

    joint = _Unbounded((), len(centre))
    first = 0
    for model in models:
        own = _Unbounded(tuple(model.param_names), len(model.param_names))
        joint.positive += [first + i for i in own.positive]
        joint.share += [first + i for i in own.share]
        joint.pairs += [(first + e, first + t) for e, t in own.pairs]
        first += own.size
    middle, spread = joint.moments(centre[None], cov[None])
    value, vector = np.linalg.eigh(spread)
    factor = vector * np.sqrt(np.clip(value, 0, None))[:, None]
    return joint.back(middle[:, None] + normal @ factor.transpose(0, 2, 1), centre[None])[0]


def deblend(
    image: Any,
    sources: Any,
    *,
    model: GalaxyModel | Sequence[GalaxyModel] | Mapping[str, GalaxyModel] | None = None,
    fitter: Any = None,
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    background: str = "none",
    position_prior: float | np.ndarray = 1.0,
    model_prior: Mapping[str, float] | None = None,
    psf_error: float = 0.03,
    structure: float = 1.0,
    max_group: int = 8,
    find_missed: float | None = None,
    max_rounds: int = 2,
    missed_model: GalaxyModel | None = None,
    checkpoint: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool | Callable[[int, int], None] = False,
) -> SceneResult | list[SceneResult]:
    r"""Separate overlapping sources by fitting all of them together.

    Parameters
    ----------
    image : array, Quantity, NDData, HDU, path, or a list or cube of images
        As for `galmorph.fit_images`; (N, ny, nx) or a list are N scenes, each of which has
        its own sources.
    sources : array (K, 2), SkyCoord, Table, SourceCatalog, SegmentationImage, Detection
        Where the sources are: (x, y) in pixels or on the sky, the segments of an integer image,
        or what `galmorph.detection.detect` found.  For N images a sequence of N of these.
    model : GalaxyModel, sequence of K of them, or mapping of str to GalaxyModel, optional
        For all, or one a source; by default ``LearnedGalaxy2D.from_pretrained()``.  Their
        bounds, fixed parameters and priors hold.  Of a mapping, as ``{"star":
        PointSource2D(), "galaxy": SersicGalaxy2D()}``, each source gets the most probable.
    fitter : MAPFitter, optional
        Its priors, noise, precision and device are used.  `~galmorph.noise.LearnedNoise` adds
        what a learned model knows of its own misfit.
    uncertainty, mask, psf
        As for `galmorph.fit_images`.  A PSF that changes over the image is a `PSFField`, a
        photutils ``GriddedPSFModel`` or a function ``psf(x, y)``; sources where there is none are
        flagged.  Noise that is not given is estimated, and the sources are flagged.  Without a PSF
        the models are integrated over the pixels; see `galmorph.detection.estimate_psf`.
    background : {"none", "constant", "tilted"}, optional
        What is fitted under all sources (of a group).
    position_prior : float or array (K,), optional
        Standard deviation, in pixels, of the true centres about the positions given; 0 holds
        them.
    model_prior : mapping of str to float, optional
        Probabilities of the models of a mapping before the fit; by default equal.
    psf_error : float, optional
        Error of the PSF relative to its value, pixel by pixel, that is allowed for in the
        choice between models.  Without it bright stars would be galaxies.
    structure : float, optional
        How much light that models do not have, as arms, clumps and tails, the covariance allows
        for: 1 for that of real galaxies, 0 for models that are true.  With
        `~galmorph.noise.LearnedNoise` it is in the noise, and is not added.
    max_group : int, optional
        So many sources at most are fitted together; the others' light is taken away, in
        turns until nothing changes.
    find_missed : float, optional
        Look for sources that are not among those given, and add what stands out by so many
        standard deviations; 5 is a sensible number.  None: none is looked for.
    max_rounds : int, optional
        How often they are looked for; each time one at most upon the light of another.
    missed_model : GalaxyModel, optional
        Model of sources that are added; by default that of the others.
    checkpoint : path, optional
        File that keeps finished fits; the same call goes on from there after it was stopped.
        It takes some 100 kB a source.
    workers : int, optional
        How many processes fit the groups of a large field.
    progress : bool or callable, optional
        Show a bar, or call ``progress(done, total)``, with numbers of sources.

    Returns
    -------
    SceneResult, or list of N of them for a cube or list

    Raises
    ------
    TypeError, ValueError
        If the arguments are not what is described above, a point source has no PSF, or there
        are several models and none for sources that are added.

    Notes
    -----
    The posterior of all parameters of all sources is maximised by Levenberg-Marquardt steps
    on the joint normal equations, batched over groups that are alike; each source
    is first looked at with the light of its neighbours taken away by symmetry.  The
    covariance is that of Laplace's approximation, for all sources of a group jointly.

    Real galaxies have more structure than their models.  Each model image is cut into 48
    patches (elliptical rings by sectors) whose light may differ from the model's by a fraction,
    more so further out and the better the source is resolved; as fluxes depend on it linearly,
    its variance is added to the covariance.  How large the fractions are is measured on bright
    galaxies of KiDS and on blends of them.

    Models are chosen by Laplace's approximation to the evidence of each source alone, its
    neighbours' models being taken away.  Half-light radii have a prior about that of the
    PSF, and a star is compared as a profile too small to be told from a point by a PSF
    that is not quite right: a tenth of the FWHM, give or take half of that.  Beside other
    galaxies, learned ones are looked at above a S/N of 20, and not where a star beats the others:
    they are so free that they take up errors of the PSF.

    Missed sources are looked for where the residual, filtered with the PSF and with disks, or the
    curvature of the data stand out.  Their groups are fitted again.  A source stays if its
    flux f stands out of its own error and of 15 % of the light m of all others,

    .. math:: f > t \sqrt{\sigma_f^2 + (0.15\, f \langle s, m\rangle / \langle s, s\rangle)^2}

    with s its image and t ``find_missed``; if the fit, with that misfit in its noise, is better
    by more than its parameters cost (Bayesian information criterion); and if it is half a FWHM
    of the PSF or more from all others.  Else the group is again what it was.

    One bad source is flagged, and the others are fitted: see ``flags`` and
    ``meta["errors"]``.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import PSF, SersicGalaxy2D
    >>> from galmorph.deblending import deblend
    >>> y, x = np.mgrid[-9:10, -9:10]
    >>> psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))
    >>> one = SersicGalaxy2D(500, 18, 20, r_eff=3, n=1.5, psf=psf).render((41, 41))
    >>> two = SersicGalaxy2D(300, 24, 22, r_eff=2, psf=psf).render((41, 41))
    >>> image = one + two + np.random.default_rng(1).normal(0, 0.3, (41, 41))
    >>> result = deblend(
    ...     image, [(18, 20), (24, 22)], model=SersicGalaxy2D(), psf=psf, uncertainty=0.3
    ... )
    >>> pull = (result.flux - [500, 300]) / result.flux_err
    >>> bool(np.all(np.abs(pull) < 4))
    True
    >>> bool(np.allclose(result.deblended_images.sum(0), image))
    True

    The second one left out:

    >>> result = deblend(
    ...     image, [(18, 20)], model=SersicGalaxy2D(), psf=psf, uncertainty=0.3, find_missed=5
    ... )
    >>> result.added.tolist(), bool(abs(result.flux[1] - 300) < 4 * result.flux_err[1])
    ([False, True], True)
    """
    from galmorph._choice import choose_models
    from galmorph._memory import Memory
    from galmorph._residuals import add_missed
    from galmorph._scenes import Work, read_scenes, solve_scenes

    if background not in BACKGROUND_TERMS:
        raise ValueError(f"background must be one of {list(BACKGROUND_TERMS)}, not {background!r}")
    if int(max_group) != max_group or max_group < 1:
        raise ValueError(f"max_group must be a positive integer, not {max_group!r}")
    if model is None:
        from galmorph.models.learned import LearnedGalaxy2D

        model = LearnedGalaxy2D.from_pretrained()
    candidates = _candidates(model, model_prior, psf_error)
    model = model if candidates is None else candidates.first
    scenes, single = read_scenes(
        image,
        sources,
        models=model,
        uncertainty=uncertainty,
        mask=mask,
        psf=psf,
        position_prior=position_prior,
    )
    fitter = _checked_fitter(fitter)
    if getattr(fitter.noise, "needs_misfit", False):
        structure = 0.0
    if int(workers) != workers or workers < 1:
        raise ValueError(f"workers must be a positive integer, not {workers!r}")
    memory = None if checkpoint is None else Memory(checkpoint, fitter)
    if not 0 <= structure < np.inf:
        raise ValueError(f"structure must be finite and not negative, not {structure!r}")
    work = Work(fitter, background, float(structure), memory, int(workers))
    search = _search(find_missed, max_rounds, missed_model, model, scenes)
    started = time.perf_counter()
    with _reporter(progress, sum(len(scene.xy) for scene in scenes)) as report:
        solve_scenes(scenes, work, int(max_group), report)
        if search is not None:
            add_missed(scenes, search, work, int(max_group))
        chosen = None if candidates is None else choose_models(scenes, candidates, work)
    seconds = time.perf_counter() - started
    results = [_result(scene, fitter, background, seconds, len(scenes), search) for scene in scenes]
    possible = [model] if isinstance(model, GalaxyModel) else []
    for scene, result in zip(scenes, results, strict=True):
        result._fitter, result._spread = fitter, scene.spread
        result._possible = possible if candidates is None else list(candidates.models.values())
    if chosen is not None:
        for result, evidence in zip(results, chosen, strict=True):
            result.candidates, result.log_evidence = candidates.names, evidence
            result.model_prior = candidates.prior
    return results[0] if single else results


def _candidates(model: Any, prior: Mapping[str, float] | None, psf_error: float) -> Any:
    """What the models of a mapping are to be chosen by, else None."""
    from galmorph._choice import Candidates

    if not isinstance(model, Mapping):
        if prior is not None:
            raise ValueError("model_prior needs a mapping of models to choose from")
        return None
    if not model:
        raise ValueError("there is no model to choose")
    for name, one in model.items():
        if not isinstance(name, str) or not isinstance(one, GalaxyModel):
            raise TypeError(f"a mapping of names to galmorph models, not {name!r}: {one!r}")
    if prior is not None and set(prior) != set(model):
        raise ValueError(f"model_prior must name {', '.join(model)}, not {', '.join(prior)}")
    share = np.array([1.0 if prior is None else float(prior[name]) for name in model])
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise ValueError(f"model_prior must be probabilities, not {prior!r}")
    if not 0 <= psf_error < 1:
        raise ValueError(f"psf_error must be at least 0 and below 1, not {psf_error!r}")
    return Candidates(dict(model), share / share.sum(), float(psf_error))


def _search(threshold, rounds, own, model, scenes) -> Any:
    """How sources that were missed are looked for; None: they are not."""
    from galmorph._residuals import Search
    from galmorph._scenes import check_points

    if threshold is None:
        return None
    if not (np.isscalar(threshold) and np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"find_missed must be a positive number of sigma, not {threshold!r}")
    if int(rounds) != rounds or rounds < 1:
        raise ValueError(f"max_rounds must be a positive integer, not {rounds!r}")
    if own is None:
        given = [model] if isinstance(model, GalaxyModel) else [m for s in scenes for m in s.models]
        if len({id(m) for m in given}) != 1:
            raise ValueError("with several models find_missed needs a missed_model")
        own = given[0]
    if not isinstance(own, GalaxyModel) or len(own) != 1:
        raise TypeError(f"missed_model must be a single galmorph model, not {own!r}")
    for scene in scenes:
        check_points(scene, [own])
    return Search(float(threshold), int(rounds), own)


def _checked_fitter(fitter: Any) -> Any:
    from galmorph.fitting import MAPFitter

    if fitter is None:
        return MAPFitter()
    if type(fitter) is not MAPFitter:
        raise TypeError(
            f"scenes are fitted by a MAPFitter, not {type(fitter).__name__}; "
            "SceneResult.sample draws from the posterior"
        )
    return fitter


def _missed(scene, search) -> dict[str, Any]:
    """What the search for sources did."""
    return {
        "threshold": search.threshold,
        "model": type(search.model).__name__,
        "added": sum(source.added for source in scene.sources),
        "refused": sum(len(xy) for xy in scene.refused),
    }


def _result(scene, fitter, background: str, seconds: float, count: int, search) -> SceneResult:
    import astropy

    import galmorph

    sources = scene.sources
    return SceneResult(
        models=list(scene.models),
        xy=scene.xy,
        ids=np.asarray(scene.ids),
        flags=np.array([s.flags for s in sources], dtype=np.int32),
        group=np.array([s.group for s in sources], dtype=int),
        chi2=np.array([s.chi2 for s in sources], dtype=float),
        dof=np.array([s.dof for s in sources], dtype=int),
        n_iter=np.array([s.n_iter for s in sources], dtype=int),
        added=np.array([s.added for s in sources], dtype=bool),
        data=scene.data,
        inv_sigma=scene.inv_sigma,
        psf=scene.psf,
        wcs=scene.wcs,
        data_unit=scene.unit,
        meta={
            "galmorph": galmorph.__version__,
            "astropy": astropy.__version__,
            "numpy": np.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": sorted({type(m).__name__ for m in scene.models}),
            "fitter": describe(fitter),
            "images": scene.name,
            "background": background,
            "sources": len(sources),
            "groups": len(scene.groups),
            "seconds": round(seconds, 3),  # of the call
            "scenes": count,
            "errors": dict(scene.errors),
            **({} if search is None else {"missed": _missed(scene, search)}),
        },
        _sources=sources,
        _groups=scene.groups,
        _background=background,
    )
