"""The variational autoencoder: encoder, decoder, prior and likelihood, put together."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from .likelihood import ConstantScale, DiagonalNormal

if TYPE_CHECKING:
    from ..training import TrainingBatch

__all__ = ["GalaxyVAE"]


class GalaxyVAE(nn.Module):
    """A variational autoencoder of galaxy images.

    It is put together from parts that can be exchanged one by one; each takes
    tensors and returns a torch ``Distribution`` (a decoder: what the likelihood
    makes one of).  Make one with `from_preset` or `from_pretrained`.

    Parameters
    ----------
    encoder : Module
        ``encoder(images (B, 1, ny, nx))``: posterior of the latents, event shape (d,).
    decoder : Module
        ``decoder(z (..., d))``: what the likelihood needs.
    prior : Module
        ``prior()``: distribution of the latents, event shape (d,).
    likelihood : Module, optional
        ``likelihood(decoded)``: distribution of images, event shape (ny, nx).  By
        default `DiagonalNormal`.
    scale : Module, optional
        ``scale(images, good)``: the unit that the networks work in, (B, 1, 1).  By default
        `ConstantScale` of 1.
    image_shape : tuple of int, optional
        (ny, nx) that the encoder takes; None if it takes any.
    config : dict, optional
        ``{"preset": name, "options": {...}}``, which builds the same network again.

    Attributes
    ----------
    metadata : dict
        What the file of the weights says about them; empty for new networks.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GalaxyVAE
    >>> vae = GalaxyVAE.from_preset("regier2015", image_shape=(9, 9))
    >>> mean, std = vae.reconstruct(np.ones((4, 9, 9)))
    >>> mean.shape, std.shape
    ((4, 9, 9), (4, 9, 9))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: nn.Module,
        likelihood: nn.Module | None = None,
        *,
        scale: nn.Module | None = None,
        image_shape: tuple[int, int] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior
        self.likelihood = DiagonalNormal() if likelihood is None else likelihood
        self.scale = ConstantScale(1.0) if scale is None else scale
        self.image_shape = (
            None if image_shape is None else (int(image_shape[0]), int(image_shape[1]))
        )
        self._config = copy.deepcopy(config)
        self.metadata: dict[str, Any] = {}

    # -- made from a name ------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **options) -> GalaxyVAE:
        """An untrained network of a published architecture.

        Parameters
        ----------
        name : str
            ``"regier2015"`` or another of `galmorph.nets.PRESETS`.
        **options
            Of the preset, as ``image_shape``.

        Returns
        -------
        GalaxyVAE

        Raises
        ------
        ValueError
            If there is no such preset.
        """
        from .presets import build

        return build(name, **options)

    @classmethod
    def from_pretrained(cls, name: str = "default") -> GalaxyVAE:
        """A trained network.

        Parameters
        ----------
        name : str
            Of installed weights (`galmorph.nets.available` lists them), or
            ``"default"``.

        Returns
        -------
        GalaxyVAE
            In evaluation mode.

        Raises
        ------
        WeightsError
            If no weights of this name are installed (the message lists those that
            are), or if they cannot be read.
        """
        from .weights import from_pretrained

        return from_pretrained(name)

    @classmethod
    def read(cls, path: str | os.PathLike) -> GalaxyVAE:
        """A trained network, from a file; see `galmorph.nets.load`.

        Parameters
        ----------
        path : str or path-like
            The file.
        """
        from .weights import load

        return load(path)

    def write(self, path: str | os.PathLike, *, metadata: dict[str, Any]) -> None:
        """Write the network to a file; see `galmorph.nets.save`.

        Parameters
        ----------
        path : str or path-like
            The file.
        metadata : dict
            What has to be known about the weights.
        """
        from .weights import save

        save(self, path, metadata=metadata)

    @property
    def config(self) -> dict[str, Any]:
        """What builds this network again; a copy.

        Raises
        ------
        ValueError
            If the network was put together by hand.
        """
        if self._config is None:
            raise ValueError("this network was put together by hand; it has no config")
        return copy.deepcopy(self._config)

    @property
    def preset(self) -> str | None:
        """Name of the preset, or None."""
        return None if self._config is None else self._config["preset"]

    @property
    def latent_size(self) -> int:
        """Number of latents, d."""
        return int(self.prior().event_shape[0])

    # -- tensors ---------------------------------------------------------------------------

    def encode(self, images: Tensor, weight: Tensor | None = None) -> Distribution:
        """Posterior of the latents.

        Parameters
        ----------
        images : Tensor or array-like, (B, ny, nx)
            In their own units.
        weight : Tensor, (B, ny, nx), optional
            Pixels of weight 0 do not count: the encoder sees in their place the
            pixel on the other side of the centre, or zero if that is bad too.

        Returns
        -------
        Distribution
            Batch shape (B,), event shape (d,).
        """
        images = _as_tensor(images)
        images, good = _filled(images, None if weight is None else _as_tensor(weight))
        return self.encoder((images / self.scale(images, good))[:, None])

    def decode(self, z: Tensor) -> Distribution:
        """Distribution of the pixels, in the units that the network works in.

        Parameters
        ----------
        z : Tensor, (..., d)

        Returns
        -------
        Distribution
            Event shape (ny, nx); it has ``mean``, ``stddev``, ``log_prob`` and ``sample``.
        """
        return self.likelihood(self.decoder(z))

    def elbo(
        self,
        batch: TrainingBatch,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Evidence lower bound of each image, with one draw from its posterior.

        Parameters
        ----------
        batch : TrainingBatch
            Images, (B, ny, nx).  Pixels of weight 0 are left out of the likelihood; this
            network learns the noise with the galaxies, so that weights are not used otherwise.
        beta : float
            Factor on the Kullback-Leibler divergence.
        generator : torch.Generator, optional
            Source of randomness.

        Returns
        -------
        dict of Tensor, (B,)
            ``log_likelihood`` of the pixels, in the units that the network works in; ``kl``;
            ``loss`` = beta kl - log_likelihood; and ``squared_error``, the mean over the good
            pixels, in the same units.
        """
        images, good = _filled(batch.images, batch.weight)
        unit = self.scale(images, good)
        pixels = images / unit
        posterior = self.encoder(pixels[:, None])
        z = draw(posterior, generator)
        decoded = self.decode(z)
        log_likelihood = _log_prob(decoded, pixels, None if batch.weight is None else good)
        count = good.sum((1, 2)).clamp(min=1)
        error = ((pixels - decoded.mean).square() * good).sum((1, 2)) / count
        kl = divergence(posterior, self.prior(), z)
        return {
            "loss": beta * kl - log_likelihood,
            "log_likelihood": log_likelihood,
            "kl": kl,
            "squared_error": error,
        }

    # -- arrays ----------------------------------------------------------------------------

    def reconstruct(self, images, *, mask=None, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every pixel, at the posterior mean of the latents.

        Parameters
        ----------
        images : array-like, (ny, nx) or (N, ny, nx)
            One image or several, integer or floating-point, in their own units.
        mask : array-like of bool, same shape, optional
            True where a pixel is bad.  Pixels that are not finite are bad too.  They
            are drawn, but not looked at.
        chunk : int
            Images that are worked on at a time.

        Returns
        -------
        mean, std : ndarray, same shape
            In the units of the images; float64 for float64 images, else float32.

        Raises
        ------
        ValueError
            If the images have another shape than the network takes, are complex, or if the
            mask has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GalaxyVAE
        >>> vae = GalaxyVAE.from_preset("regier2015", image_shape=(9, 9))
        >>> mean, std = vae.reconstruct(np.ones((9, 9), dtype=np.uint8))
        >>> mean.shape, mean.dtype
        ((9, 9), dtype('float32'))
        """
        array, good = self._checked(images, mask)
        if int(chunk) != chunk or chunk < 1:
            raise ValueError(f"chunk must be a positive integer, not {chunk!r}")
        single = array.ndim == 2
        array, good = (a[None] if single else a for a in (array, good))
        dtype = np.float64 if array.dtype == np.float64 else np.float32
        mean, std = np.empty(array.shape, dtype), np.empty(array.shape, dtype)
        for start in range(0, len(array), int(chunk)):
            rows = slice(start, start + int(chunk))
            mean[rows], std[rows] = self._reconstruct(array[rows], good[rows])
        return (mean[0], std[0]) if single else (mean, std)

    def _reconstruct(self, array: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        like = next(self.parameters())
        values = np.where(good, array, 0).astype(np.float32)
        images = torch.as_tensor(values, device=like.device)
        weight = torch.as_tensor(good, device=like.device)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                images, seen = _filled(images, weight)
                unit = self.scale(images, seen)
                decoded = self.decode(self.encoder((images / unit)[:, None]).mean)
                return tuple((x * unit).cpu().numpy() for x in (decoded.mean, decoded.stddev))
        finally:
            self.train(training)

    def _checked(self, images, mask) -> tuple[np.ndarray, np.ndarray]:
        """The images as an array, and which pixels are good."""
        array = np.asarray(getattr(images, "value", images))
        if array.dtype.kind not in "iufb":
            raise ValueError(f"images must be real numbers, not {array.dtype}")
        if array.ndim not in (2, 3):
            raise ValueError(
                f"images must have the shape (ny, nx) or (N, ny, nx), not {array.shape}"
            )
        if self.image_shape is not None and array.shape[-2:] != self.image_shape:
            raise ValueError(
                f"this network takes images of the shape {self.image_shape}, "
                f"not {array.shape[-2:]}: resample them, or build one with image_shape="
            )
        good = np.isfinite(array)
        if mask is not None:
            mask = np.asarray(mask, dtype=bool)
            if mask.shape != array.shape:
                raise ValueError(
                    f"the mask has the shape {mask.shape}, the images have {array.shape}"
                )
            good &= ~mask
        return array, good


def draw(distribution: Distribution, generator: torch.Generator | None = None) -> Tensor:
    """A differentiable draw, from a generator of the caller's.

    Parameters
    ----------
    distribution : Distribution
        Independent normals or a multivariate normal if a generator is given, else anything
        that has ``rsample``.
    generator : torch.Generator, optional
        Source of randomness; by default torch's own.

    Raises
    ------
    TypeError
        If it cannot be drawn from with a generator.
    """
    if generator is None:
        return distribution.rsample()
    mean = distribution.mean
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    if isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        return mean + distribution.stddev * noise
    if isinstance(distribution, MultivariateNormal):
        return mean + (distribution.scale_tril @ noise[..., None])[..., 0]
    raise TypeError(f"{type(distribution).__name__} cannot be drawn from with a generator")


def divergence(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the posterior from the prior.

    In closed form where torch knows it, else estimated at one draw.

    Parameters
    ----------
    posterior, prior : Distribution
        Event shape (d,).
    z : Tensor, (B, d)
        Draw from the posterior.

    Returns
    -------
    Tensor, (B,)
    """
    try:
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        return posterior.log_prob(z) - prior.log_prob(z)


def _log_prob(pixels: Distribution, values: Tensor, good: Tensor | None) -> Tensor:
    """Log-likelihood of the good pixels of each image, (B,)."""
    if good is None:
        return pixels.log_prob(values)
    if not isinstance(pixels, Independent):
        raise TypeError("masked pixels need a likelihood with independent pixels")
    each = pixels.base_dist.log_prob(values)
    return torch.where(good, each, 0.0).sum((-2, -1))


def _as_tensor(values) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.as_tensor(np.asarray(values, dtype=np.float32))


def _filled(images: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images with bad pixels mirrored from across the centre, and which pixels are good."""
    if weight is None:
        return images, torch.ones_like(images, dtype=torch.bool)
    good = weight > 0
    mirrored = torch.where(good, images, 0.0).flip((-2, -1))
    return torch.where(good, images, mirrored), good
