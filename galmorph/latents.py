"""Latents of galaxies with their uncertainties: what classes and likenesses are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galmorph.flags import FitFlag
from galmorph.results import FitResult

if TYPE_CHECKING:
    from galmorph._stamps import StampBatch, StampSource

__all__ = ["Latents", "Morphology", "NetworkLatents", "measure_latents", "nearest"]

_KIND = "morphology"
# Stamps are seen so many at a time, always: sums in single precision depend on the size of a batch.
_BLOCK = 32
_FILE = Path(__file__).parent / "pretrained" / "morphology.encoder"


@dataclass
class Latents:
    """Normal posteriors of the latents of N galaxies.

    ``latents[i]``, ``latents[2:5]`` and ``latents[latents.good]`` are those of some of the
    galaxies.

    Attributes
    ----------
    mean : array, shape (N, d)
        NaN where there was nothing to measure.
    cov : array, shape (N, d, d) or (N, d)
        Covariances; or variances, of posteriors in which the latents are independent.
    flags : array of int32, shape (N,)
        Bit mask, see `FitFlag`.
    ids : array of int, shape (N,)
        As those of `FitResult`.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.latents import Latents
    >>> latents = Latents(np.zeros((5, 2)), np.ones((5, 2)))
    >>> len(latents), latents[1:3].sample(10, rng=1).shape
    (5, (2, 10, 2))
    """

    mean: np.ndarray
    cov: np.ndarray
    flags: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.mean = np.asarray(self.mean, dtype=float)
        self.cov = np.asarray(self.cov, dtype=float)
        shape = self.mean.shape
        if self.mean.ndim != 2 or self.cov.shape not in (shape, (*shape, shape[1])):
            raise ValueError(
                f"mean must be (N, d) and cov (N, d, d) or (N, d), not {shape} and {self.cov.shape}"
            )
        count = len(self.mean)
        self.flags = np.zeros(count, np.int32) if self.flags is None else np.asarray(self.flags)
        self.ids = np.arange(count) if self.ids is None else np.asarray(self.ids)

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, rows: Any) -> Latents:
        rows = np.atleast_1d(np.arange(len(self))[rows])
        return Latents(self.mean[rows], self.cov[rows], self.flags[rows], self.ids[rows])

    @property
    def good(self) -> np.ndarray:
        """Where there are latents, (N,) bool."""
        return np.isfinite(self.mean).all(1) & np.isfinite(self.variance).all(1)

    @property
    def variance(self) -> np.ndarray:
        """Of each latent, (N, d)."""
        return self.cov if self.cov.ndim == 2 else np.diagonal(self.cov, axis1=1, axis2=2)

    def leading(self, n: int) -> Latents:
        """The first n latents of each galaxy.

        Those of `Morphology` are in order of how much galaxies differ in them.

        Parameters
        ----------
        n : int
            From 1 to d.

        Raises
        ------
        ValueError
            If there are fewer.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph.latents import Latents
        >>> Latents(np.zeros((5, 3)), np.ones((5, 3))).leading(2).mean.shape
        (5, 2)
        """
        if not 1 <= n <= self.mean.shape[1]:
            raise ValueError(f"there are {self.mean.shape[1]} latents, not {n}")
        cov = self.cov[(slice(None),) + (slice(n),) * (self.cov.ndim - 1)]
        return Latents(self.mean[:, :n], cov, self.flags, self.ids)

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draws from each posterior, (N, n, d).

        Parameters
        ----------
        n : int
        rng : Generator or int, optional
        """
        return self.around(np.random.default_rng(rng).standard_normal((n, self.mean.shape[1])))

    def around(self, points: np.ndarray) -> np.ndarray:
        """Points of N(0, I) carried to each posterior, (N, S, d).

        Parameters
        ----------
        points : array, shape (S, d)
        """
        if self.cov.ndim == 2:
            return self.mean[:, None] + np.sqrt(self.cov)[:, None] * points
        return self.mean[:, None] + np.einsum("nij,sj->nsi", _roots(self.cov), points)


def _roots(cov: np.ndarray) -> np.ndarray:
    """R with R Rᵀ = cov, also for covariances that are singular; NaN for those that are NaN."""
    good = np.isfinite(cov).all((1, 2))
    values, vectors = np.linalg.eigh(np.where(good[:, None, None], cov, 0.0))
    root = vectors * np.sqrt(values.clip(0))[:, None]
    return np.where(good[:, None, None], root, np.nan)


# -- where they come from ------------------------------------------------------------------


class Morphology:
    """Latents that were learned for classes: flux, place, angle, companions, PSF and noise are no
    part of them.

    Parameters
    ----------
    network : `galmorph.nets.MorphologyEncoder`

    Notes
    -----
    Trained without labels: all views of one galaxy (turned, mirrored, moved, blurred, with noise or
    a companion) are to have the same latents, and different galaxies different ones. The latents
    are in order: on the first ones galaxies differ most compared with views of one galaxy. The
    covariance is how far a view is from the original.

    Examples
    --------
    >>> from galmorph.latents import Morphology
    >>> Morphology.from_pretrained().latent_dim
    64
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)

    @property
    def latent_dim(self) -> int:
        """Number of latents, d."""
        return self.network.latent_dim

    @staticmethod
    @lru_cache(maxsize=1)
    def from_pretrained() -> Morphology:
        """The one that comes with galmorph; it is loaded once."""
        return Morphology.read(_FILE)

    @staticmethod
    def read(path: Any) -> Morphology:
        """Read one that `write` has written.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is another one, or damaged.
        """
        import torch

        from galmorph._tensorfile import read_arrays
        from galmorph.nets.morphology import MorphologyEncoder

        arrays, header = read_arrays(path, kind=_KIND)
        with torch.random.fork_rng(devices=[]):
            network = MorphologyEncoder(**header["config"])
        network.load_state_dict({k: torch.as_tensor(v).float() for k, v in arrays.items()})
        return Morphology(network)

    def write(self, path: Any, *, metadata: dict[str, Any] | None = None) -> None:
        """Write the network to a file, in 16 bits.

        Parameters
        ----------
        path : path-like
        metadata : dict, optional
            What has to be known about it.
        """
        from galmorph._tensorfile import write_arrays

        arrays = {k: v.half().numpy() for k, v in self.network.state_dict().items()}
        header = {"config": self.network.config, "metadata": metadata or {}}
        write_arrays(path, arrays, kind=_KIND, header=header)

    def posterior(self, batch: StampBatch) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances (B, d) of stamps; NaN where nothing is seen."""
        psf = batch.psf[0] if isinstance(batch.psf, list) and batch.psf else batch.psf
        fwhm = None if psf is None or isinstance(psf, list) else 2.3548 * psf.sigma
        data, weight = _in_noise(batch.data, batch.inv_sigma)
        parts = [
            self._block(data[rows], weight[rows], batch.position[rows], fwhm)
            for rows in (slice(i, i + _BLOCK) for i in range(0, len(data), _BLOCK))
        ]
        mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
        return mean, np.square(std)

    def _block(self, data, weight, position, fwhm) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations (b, d), by arithmetic that does not depend on b."""
        import torch

        from galmorph.nets.morphology import look

        count = len(data)
        data, weight, position = (
            torch.as_tensor(np.pad(a, [(0, _BLOCK - count)] + [(0, 0)] * (a.ndim - 1), "edge"))
            for a in (data, weight, position)
        )
        with torch.no_grad():
            view = look(data.float(), weight.float(), position=position.float(), fwhm=fwhm)
            mean, std = self.network(view.image, view.scalars)
        found = [a.double().numpy()[:count] for a in (mean, std)]
        for a in found:
            a[~view.good.numpy()[:count]] = np.nan
        return found[0], found[1]


class NetworkLatents:
    """Latents of any `GalaxyVAE`, for example one of the published ones.

    Parameters
    ----------
    vae : GalaxyVAE
        It must take images of the shape that is given.

    Examples
    --------
    >>> from galmorph import GalaxyVAE
    >>> from galmorph.latents import NetworkLatents
    >>> NetworkLatents(GalaxyVAE.from_preset("regier2015", image_shape=(9, 9))).latent_dim
    8
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval()

    @property
    def latent_dim(self) -> int:
        """Number of latents, d."""
        return self.vae.latent_size

    def posterior(self, batch: StampBatch) -> tuple[np.ndarray, np.ndarray]:
        """Means (B, d), and covariances (B, d, d) or variances (B, d), of a batch of stamps."""
        import torch

        shape = tuple(batch.data.shape[1:])
        if self.vae.image_shape not in (None, shape):
            raise ValueError(
                f"this network takes images of the shape {self.vae.image_shape}, not {shape}"
            )
        data, weight = (
            torch.as_tensor(a, dtype=torch.float32) for a in (batch.data, batch.inv_sigma)
        )
        with torch.no_grad():
            told = self.vae.encode(data, weight)
        mean = told.mean.double().numpy()
        if hasattr(told, "covariance_matrix"):
            return mean, told.covariance_matrix.double().numpy()
        return mean, told.variance.double().numpy()


def _in_noise(data: np.ndarray, inv_sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in units of the least noise of each stamp: float32 holds no flux in W / m2 / Hz."""
    best = inv_sigma.reshape(len(data), -1).max(1)[:, None, None]
    best = np.where(best > 0, best, 1.0)
    return data * best, inv_sigma / best


def measure_latents(
    images: Any,
    *,
    encoder: Any = None,
    uncertainty: Any = None,
    mask: Any = None,
    psf: Any = None,
    positions: Any = None,
    size: int | tuple[int, int] | None = None,
    segmentation: Any = None,
    progress: bool | Callable[[int, int], None] = False,
    batch_size: int | None = None,
) -> Latents:
    """Latents of every galaxy.

    Stamps are read and seen a batch at a time, so that a file may be larger than the memory.

    Parameters
    ----------
    images : array, NDData, HDU, path, list of these, FitResult, or Latents
        As for `galmorph.fit_images`; or the result of a fit, whose stamps are read again (with
        the centres that were found). `Latents` are returned as they are.
    encoder : object, optional
        By default ``Morphology.from_pretrained()``; `NetworkLatents`, a `GalaxyVAE`; ``"fit"``
        takes the latents of a fit of `galmorph.LearnedGalaxy2D`; or what has
        ``posterior(batch) -> (mean, cov)``, with shapes as those of `Latents`.
    uncertainty, mask, psf, positions, size, segmentation, progress
        As for `galmorph.fit_images`. The PSF helps to find the centre, no more.
    batch_size : int, optional

    Returns
    -------
    Latents
        Galaxies without usable pixels, and others that failed, have NaN and a flag.

    Raises
    ------
    TypeError, ValueError, OSError
        As `galmorph.fit_images`; or if ``"fit"`` is asked for of what is no fit of a learned
        galaxy, or stamps of a result are gone.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import SersicGalaxy2D
    >>> from galmorph.latents import measure_latents
    >>> galaxy = SersicGalaxy2D(flux=500, x_0=20, y_0=20, r_eff=4, n=1).render((41, 41))
    >>> stamps = galaxy + np.random.default_rng(0).normal(0, 0.1, (3, 41, 41))
    >>> latents = measure_latents(stamps, uncertainty=0.1)
    >>> latents.mean.shape
    (3, 64)
    """
    given = (uncertainty, mask, psf, positions, size, segmentation)
    if isinstance(images, Latents):
        return images
    if isinstance(images, FitResult):
        if any(value is not None for value in given):
            raise ValueError("a FitResult knows its pixels: give no uncertainty, mask, psf ...")
        if isinstance(encoder, str) and encoder == "fit":
            return _of_fit(images)
        source = _source_of(images)
    else:
        from galmorph.images import stamp_source

        source = stamp_source(
            images,
            uncertainty=uncertainty,
            mask=mask,
            psf=psf,
            positions=positions,
            size=size,
            segmentation=segmentation,
        )
    return _measured(source, _as_encoder(encoder), progress, batch_size)


def _as_encoder(encoder: Any) -> Any:
    if encoder is None:
        return Morphology.from_pretrained()
    if callable(getattr(encoder, "encode", None)):  # a network's own posterior takes tensors
        return NetworkLatents(encoder)
    if callable(getattr(encoder, "posterior", None)):
        return encoder
    if isinstance(encoder, str) and encoder == "fit":
        raise ValueError('encoder="fit" takes the result of a fit of LearnedGalaxy2D')
    raise TypeError(f"encoder must have a method posterior or encode, {encoder!r} has none")


def _of_fit(result: FitResult) -> Latents:
    names = getattr(result.model, "latent_names", None)
    if names is None:
        raise ValueError(f"a fit of {type(result.model).__name__} has no latents")
    rows = [result.param_names.index(name) for name in names]
    return Latents(
        result.params[:, rows], result.cov[:, rows][:, :, rows], result.flags, result.ids
    )


def _source_of(result: FitResult) -> StampSource:
    if result.stamps is None:
        raise ValueError("this result was read from a file and has no pixels: give the images")
    return result.stamps


def _measured(source: StampSource, encoder: Any, progress: Any, batch_size: int | None) -> Latents:
    from galmorph._batchfit import one_thread
    from galmorph.images import _reporter

    count, d = len(source), encoder.latent_dim
    mean, cov = np.full((count, d), np.nan), np.full((count, d), np.nan)
    flags = np.zeros(count, np.int32)
    with _reporter(progress, count) as report:
        for indices in source.batches(batch_size):
            batch = source.get(indices)
            flags[indices] = batch.flags
            rows = np.flatnonzero((batch.flags & FitFlag.FAILED) == 0)
            if len(rows):
                with one_thread():
                    mean[indices[rows]], found = encoder.posterior(batch[rows])
                if cov.ndim < found.ndim:  # only now it is known which it tells
                    cov = np.full((count, d, d), np.nan)
                cov[indices[rows]] = found
            source.release()
            report(len(indices))
    lost = ~np.isfinite(mean).all(1) & ((flags & FitFlag.FAILED) == 0)
    flags[lost] |= FitFlag.NO_DATA
    return Latents(mean, cov, flags, source.ids)


# -- likeness ------------------------------------------------------------------------------


def nearest(latents: Latents, among: Latents, n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The galaxies that are most like each of some galaxies.

    Parameters
    ----------
    latents : Latents
        N galaxies.
    among : Latents
        M galaxies, of the same encoder. A galaxy that is in both is its own first neighbour.
    n : int, optional
        Neighbours of each.

    Returns
    -------
    index : array of int, shape (N, n)
        Of ``among``, the nearest first; -1 where there are too few, or the galaxy has no latents.
    distance : array, shape (N, n)
        Between means, in units of the scatter of ``among`` along each latent; inf there.

    Raises
    ------
    ValueError
        If the numbers of latents differ, or n is not positive.

    Notes
    -----
    The scatter is that of the galaxies themselves: the variance of their posterior means and the
    mean variance of their posteriors together. A latent that images tell little of has means that
    are close together for this, and so counts little. The expected squared distance between the
    latents themselves is that of the means plus the variances of both posteriors.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.latents import Latents, nearest
    >>> all_ = Latents(np.arange(10.0)[:, None], np.zeros((10, 1)))
    >>> nearest(all_[[4]], all_, n=3)[0].tolist()[0][0]
    4
    """
    from scipy.spatial import cKDTree

    if latents.mean.shape[1] != among.mean.shape[1]:
        raise ValueError("the two sets have different numbers of latents")
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    index, distance = np.full((len(latents), n), -1), np.full((len(latents), n), np.inf)
    rows, wanted = np.flatnonzero(among.good), np.flatnonzero(np.isfinite(latents.mean).all(1))
    if len(rows) == 0 or len(wanted) == 0:
        return index, distance
    width = np.sqrt(among.mean[rows].var(0) + among.variance[rows].mean(0))
    width[width == 0] = 1.0
    tree = cKDTree(among.mean[rows] / width)
    found, at = tree.query(latents.mean[wanted] / width, k=np.arange(1, n + 1))
    there = np.isfinite(found)
    index[wanted] = np.where(there, rows[np.where(there, at, 0)], -1)
    distance[wanted] = found
    return index, distance
