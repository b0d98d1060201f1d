"""The variational autoencoder: encoder, decoder, prior and likelihood, put together."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from galmorph._quadrature import normal_points

from .conditions import Conditions
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
        ``encoder(images (B, 1, ny, nx))``: posterior of the latents, event shape (d,).  With
        conditions, ``encoder(images, told (B, 2C))``.
    decoder : Module
        ``decoder(z (..., d))``: what the likelihood needs.  With conditions,
        ``decoder(z, told (..., 2C))``.
    prior : Module
        ``prior()``: distribution of the latents, event shape (d,).
    likelihood : Module, optional
        ``likelihood(decoded)``: distribution of images, event shape (ny, nx).  By
        default `DiagonalNormal`.
    scale : Module, optional
        ``scale(images, good)``: the unit that the networks work in, (B, 1, 1).  By default
        `ConstantScale` of 1.
    conditions : Conditions, optional
        What encoder and decoder are told of a galaxy beside its image.
    predictor : Module, optional
        ``predictor(images (B, 1, ny, nx))``: distribution of the standardised conditions, event
        shape (C,).  It stands in where a condition is missing.
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
        conditions: Conditions | None = None,
        predictor: nn.Module | None = None,
        image_shape: tuple[int, int] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior
        self.likelihood = DiagonalNormal() if likelihood is None else likelihood
        self.scale = ConstantScale(1.0) if scale is None else scale
        if predictor is not None and conditions is None:
            raise ValueError("a predictor needs the conditions that it predicts")
        self.conditions = conditions
        self.predictor = predictor
        self.image_shape = (
            None if image_shape is None else (int(image_shape[0]), int(image_shape[1]))
        )
        self._config = copy.deepcopy(config)
        self.metadata: dict[str, Any] = {}
        self.eval()  # only training changes that: batch norm must not see what is described

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

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Names of the conditions; empty if the network knows none."""
        return () if self.conditions is None else self.conditions.names

    def replace_prior(self, prior: nn.Module, *, components: int) -> None:
        """Exchange the prior for a mixture; the config follows.

        Parameters
        ----------
        prior : Module
            ``prior()``: distribution of the latents, event shape (d,).
        components : int
            Of the mixture, which is the option ``components`` of every preset.
        """
        self.prior = prior
        if self._config is not None:
            self._config["options"]["components"] = int(components)

    def learn_conditions(self, values: Any, names: tuple[str, ...] | None = None) -> None:
        """Check the conditions of the training galaxies, and learn how they are standardised.

        `galmorph.training.train` calls this before its first step; only the first call
        learns.

        Parameters
        ----------
        values : array-like, (N, C'), or None
            NaN where missing.
        names : tuple of str, optional
            Of the columns.

        Raises
        ------
        ValueError
            If the network needs conditions that are not there, or knows none.
        """
        if (values is None) != (self.conditions is None):
            raise ValueError(
                "conditions are given, but this network knows none"
                if self.conditions is None
                else f"this network needs conditions: {', '.join(self.condition_names)}"
            )
        if self.conditions is not None:
            self.conditions.learn(self.conditions.pick(values, names))

    # -- tensors ---------------------------------------------------------------------------

    def encode(
        self, images: Tensor, weight: Tensor | None = None, *, condition: Any = None
    ) -> Distribution:
        """Posterior of the latents.

        Parameters
        ----------
        images : Tensor or array-like, (B, ny, nx)
            In their own units.
        weight : Tensor, (B, ny, nx), optional
            Pixels of weight 0 do not count: the encoder sees in their place the
            pixel on the other side of the centre, or zero if that is bad too.
        condition : optional
            What is known of the galaxies, in any form of `Conditions.read`; NaN is missing.

        Returns
        -------
        Distribution
            Batch shape (B,), event shape (d,).

        Raises
        ------
        ValueError
            If the network knows no such condition.
        """
        pixels = self._pixels(images, weight)
        values = self._read(condition, len(pixels))
        return self.encoder(pixels, *self._told(values, self._predicted(pixels)))

    def decode(self, z: Tensor, condition: Any = None) -> Distribution:
        """Distribution of the pixels, in the units that the network works in.

        Parameters
        ----------
        z : Tensor, (..., d)
        condition : optional
            As for `encode`, of the galaxies along the last axis but one of ``z``.

        Returns
        -------
        Distribution
            Event shape (ny, nx); it has ``mean``, ``stddev``, ``log_prob`` and ``sample``.
        """
        values = self._read(condition, z.shape[-2] if z.ndim > 1 else 1)
        if values is not None and z.ndim == 1:
            values = values[0]
        return self._decode(z, self._told(values))

    def predict_condition(self, images: Tensor, weight: Tensor | None = None) -> Distribution:
        """What the images alone say of the conditions.

        Parameters
        ----------
        images, weight
            As for `encode`.

        Returns
        -------
        Distribution
            Independent normals in the units of the conditions; event shape (C,).

        Raises
        ------
        ValueError
            If the network does not predict them.

        Examples
        --------
        >>> import torch
        >>> from galmorph import GalaxyVAE
        >>> vae = GalaxyVAE.from_preset("fancy_cvae", image_shape=(32, 32), filters=4)
        >>> redshift = vae.predict_condition(torch.ones(3, 32, 32))
        >>> redshift.mean.shape, redshift.stddev.shape
        (torch.Size([3, 1]), torch.Size([3, 1]))
        """
        if self.predictor is None:
            raise ValueError("this network predicts no conditions (the preset fancy_cvae does)")
        predicted = self._predicted(self._pixels(images, weight))
        mean = self.conditions.mean + self.conditions.unit * predicted.mean
        std = self.conditions.unit * predicted.stddev
        return Independent(Normal(mean, std, validate_args=False), 1)

    def posterior(self, batch: TrainingBatch) -> Distribution:
        """Posterior of the latents of a batch of stamps.

        Parameters
        ----------
        batch : TrainingBatch

        Returns
        -------
        Distribution
            Batch shape (B,), event shape (d,).
        """
        return self.encode(batch.images, batch.weight, condition=self._conditions_of(batch))

    def _conditions_of(self, batch: TrainingBatch) -> Tensor | None:
        if self.conditions is None or batch.condition is None:
            return self._read(None, len(batch))
        return self.conditions.pick(batch.condition, batch.condition_names)

    def _pixels(self, images, weight=None) -> Tensor:
        """What the encoder sees, (B, 1, ny, nx)."""
        images = _as_tensor(images)
        images, good = _filled(images, None if weight is None else _as_tensor(weight))
        return (images / self.scale(images, good))[:, None]

    def _read(self, condition: Any, n: int) -> Tensor | None:
        """Conditions (n, C), None if the network knows none."""
        if self.conditions is not None:
            return self.conditions.read(condition, n)
        if condition is not None:
            raise ValueError("a condition is given, but this network knows none")
        return None

    def _predicted(self, pixels: Tensor) -> Distribution | None:
        """Of the standardised conditions, from what the encoder sees of the images."""
        return None if self.predictor is None else self.predictor(pixels)

    def _told(
        self, values: Tensor | None, predicted: Distribution | None = None
    ) -> tuple[Tensor, ...]:
        """What encoder and decoder are told beside image and latents: nothing, or (…, 2C)."""
        if values is None:
            return ()
        guess = None if predicted is None else predicted.mean.detach()
        return (self.conditions(values, guess),)

    def _decode(self, z: Tensor, told: tuple[Tensor, ...]) -> Distribution:
        return self.likelihood(self.decoder(z, *told))

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
            Conditions that are missing, NaN, count as not known.
        beta : float
            Factor on the Kullback-Leibler divergence.
        generator : torch.Generator, optional
            Source of randomness.

        Returns
        -------
        dict of Tensor, (B,)
            ``log_likelihood`` of the pixels, in the units that the network works in; ``kl``;
            ``loss`` = beta kl - log_likelihood; and ``squared_error``, the mean over the good
            pixels, in the same units.  A network that predicts its conditions adds
            ``condition_log_prob``, the log-density of those that are known (standardised)
            given the image alone, which is taken away from the loss.
        """
        images, good = _filled(batch.images, batch.weight)
        pixels = images / self.scale(images, good)
        values, predicted = self._conditions_of(batch), self._predicted(pixels[:, None])
        told = ()
        if values is not None:
            told = self._told(self.conditions.hide(values, generator), predicted)
        posterior = self.encoder(pixels[:, None], *told)
        z = draw(posterior, generator)
        decoded = self._decode(z, told)
        log_likelihood = _log_prob(decoded, pixels, None if batch.weight is None else good)
        count = good.sum((1, 2)).clamp(min=1)
        error = ((pixels - decoded.mean).square() * good).sum((1, 2)) / count
        kl = divergence(posterior, self.prior(), z)
        found = {
            "loss": beta * kl - log_likelihood,
            "log_likelihood": log_likelihood,
            "kl": kl,
            "squared_error": error,
        }
        if predicted is not None:
            known = self._log_prob_of_condition(predicted, values)
            found |= {"loss": found["loss"] - known, "condition_log_prob": known}
        return found

    def _log_prob_of_condition(self, predicted: Distribution, values: Tensor) -> Tensor:
        """Log-density of the known conditions, standardised, (B,)."""
        missing = ~torch.isfinite(values)
        true = torch.where(missing, 0.0, self.conditions.standardised(values))
        return torch.where(missing, 0.0, predicted.base_dist.log_prob(true)).sum(1)

    # -- arrays ----------------------------------------------------------------------------

    def reconstruct(
        self, images, *, mask=None, condition: Any = None, chunk: int = 1024
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every pixel, at the posterior mean of the latents.

        Parameters
        ----------
        images : array-like, (ny, nx) or (N, ny, nx)
            One image or several, integer or floating-point, in their own units.
        mask : array-like of bool, same shape, optional
            True where a pixel is bad.  Pixels that are not finite are bad too.  They
            are drawn, but not looked at.
        condition : optional
            What is known of the galaxies, in any form of `Conditions.read`.
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
        single = array.ndim == 2
        array, good = (a[None] if single else a for a in (array, good))
        values = self._read(condition, len(array))
        dtype = np.float64 if array.dtype == np.float64 else np.float32
        mean, std = np.empty(array.shape, dtype), np.empty(array.shape, dtype)
        for rows in _chunks(len(array), chunk):
            own = {} if values is None else {"values": values[rows]}
            mean[rows], std[rows] = self._reconstruct(array[rows], good[rows], **own)
        return (mean[0], std[0]) if single else (mean, std)

    def _reconstruct(
        self, array: np.ndarray, good: np.ndarray, *, values: Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with self._at_rest():
            images, weight = self._tensors(array, good)
            images, seen = _filled(images, weight)
            unit = self.scale(images, seen)
            pixels = (images / unit)[:, None]
            told = self._told(values, self._predicted(pixels))
            decoded = self._decode(self.encoder(pixels, *told).mean, told)
            return tuple((x * unit).cpu().numpy() for x in (decoded.mean, decoded.stddev))

    def latents(
        self, images, *, mask=None, condition: Any = None, chunk: int = 1024
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior of the latents.

        Parameters
        ----------
        images, mask, condition, chunk
            As for `reconstruct`, several images.

        Returns
        -------
        mean, std : ndarray of float64, (N, d)

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GalaxyVAE
        >>> vae = GalaxyVAE.from_preset("regier2015", image_shape=(9, 9))
        >>> mean, std = vae.latents(np.ones((4, 9, 9)))
        >>> mean.shape, std.shape
        ((4, 8), (4, 8))
        """
        array, good = self._checked(images, mask)
        if array.ndim != 3:
            raise ValueError(f"images must have the shape (N, ny, nx), not {array.shape}")
        values = self._read(condition, len(array))
        found = np.empty((2, len(array), self.latent_size))
        with self._at_rest():
            for rows in _chunks(len(array), chunk):
                q = self._posterior(array[rows], good[rows], values, rows)
                found[:, rows] = torch.stack([q.mean, q.stddev]).cpu().numpy()
        return found[0], found[1]

    def responsibilities(
        self, images, *, mask=None, condition: Any = None, chunk: int = 256
    ) -> np.ndarray:
        r"""Probabilities that galaxies belong to the components of a mixture prior.

        :math:`\mathrm{E}_{q(z|x)}[p(k|z)]`, with :math:`p(k|z)` by Bayes' theorem, over 128 points
        that stand for the posterior, the same for all galaxies.  In double precision throughout:
        what a galaxy gets does not depend on the others.

        Parameters
        ----------
        images, mask, condition, chunk
            As for `reconstruct`, several images.

        Returns
        -------
        ndarray of float64, (N, K)
            Rows of sum 1.

        Raises
        ------
        ValueError
            If the prior is no mixture.

        Examples
        --------
        >>> import numpy as np
        >>> from galmorph import GalaxyVAE
        >>> vae = GalaxyVAE.from_preset("astrovader2020", image_shape=(16, 16), channels=(4, 4, 4))
        >>> vae.responsibilities(np.ones((2, 16, 16))).shape
        (2, 12)
        """
        array, good = self._checked(images, mask)
        if array.ndim != 3:
            raise ValueError(f"images must have the shape (N, ny, nx), not {array.shape}")
        values = self._read(condition, len(array))
        if not isinstance(self.prior(), MixtureSameFamily):
            raise ValueError(
                "the prior of this network is no mixture (see galmorph.nets.fit_prior)"
            )
        exact = copy.deepcopy(self).double().eval()
        prior = exact.prior()
        log_weight = prior.mixture_distribution.logits.log_softmax(-1)
        points = torch.tensor(normal_points(128, self.latent_size)).to(log_weight)[:, None]
        found = np.empty((len(array), len(log_weight)))
        with torch.no_grad():
            for rows in _chunks(len(array), chunk):
                z = _moved(exact._posterior(array[rows], good[rows], values, rows), points)
                joint = log_weight + prior.component_distribution.log_prob(z[..., None, :])
                found[rows] = torch.softmax(joint, -1).mean(0).cpu().numpy()
        return found

    def sample(
        self,
        n: int,
        rng: np.random.Generator | int | None = None,
        *,
        condition: Any = None,
        classes: Any = None,
        noise: bool = False,
        chunk: int = 1024,
    ) -> np.ndarray:
        """Draw galaxies through the prior.

        Parameters
        ----------
        n : int
            Number of galaxies.
        rng : Generator or int, optional
            Source of randomness.
        condition : optional
            What they are to be like, in any form of `Conditions.read`; one row is for all.
        classes : int or sequence of int, optional
            From which component of a mixture prior each is drawn, all of them or one by one; by
            default components are as common as their weights.
        noise : bool, optional
            Whether the pixels are drawn too; by default images are the means.
        chunk : int, optional
            Images that are worked on at a time.

        Returns
        -------
        ndarray of float32, (n, ny, nx)
            In the units of the training images, or, for a network that measures each image in
            its own unit (``scale="rms"``), in that.

        Raises
        ------
        ValueError
            If the prior has no such class, or the network no such condition.

        Examples
        --------
        >>> from galmorph import GalaxyVAE
        >>> vae = GalaxyVAE.from_pretrained("regier2015")
        >>> vae.sample(5, rng=1).shape
        (5, 69, 69)
        """
        if isinstance(n, bool) or int(n) != n or n < 1:
            raise ValueError(f"n must be a positive integer, not {n!r}")
        values = self._read(condition, n)
        seed = int(np.random.default_rng(rng).integers(2**62))
        unit = getattr(self.scale, "value", 1.0)
        device = next(self.parameters()).device
        drawn = []
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self._at_rest(),
        ):
            torch.manual_seed(seed)
            z = _from_prior(self.prior(), n, classes)
            for rows in _chunks(n, chunk):
                told = () if values is None else self._told(values[rows])
                pixels = self._decode(z[rows], told)
                drawn.append(unit * (pixels.sample() if noise else pixels.mean))
        return torch.cat(drawn).cpu().numpy()

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """In evaluation mode, without gradients; the mode is as before in the end."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    def _posterior(
        self, array: np.ndarray, good: np.ndarray, values: Tensor | None, rows: slice
    ) -> Distribution:
        """Of the latents of images (B, ny, nx), which are the given rows of the conditions."""
        condition = None if values is None else values[rows]
        return self.encode(*self._tensors(array, good), condition=condition)

    def _tensors(self, array: np.ndarray, good: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images like the parameters of this network, and which pixels are good."""
        like = next(self.parameters())
        images = torch.as_tensor(np.where(good, array, 0).astype(float))
        return images.to(like), torch.as_tensor(good, device=like.device)

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
    return _moved(distribution, noise)


def _moved(distribution: Distribution, noise: Tensor) -> Tensor:
    """The draw that standard normal numbers (..., d) make."""
    if _is_diagonal(distribution):
        return distribution.mean + distribution.stddev * noise
    if isinstance(distribution, MultivariateNormal):
        return distribution.mean + (distribution.scale_tril @ noise[..., None])[..., 0]
    raise TypeError(f"{type(distribution).__name__} cannot be drawn from with a generator")


def _is_diagonal(distribution: Distribution) -> bool:
    return isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal)


def _from_prior(prior: Distribution, n: int, classes: Any) -> Tensor:
    """Draws (n, d), of given components of a mixture if that is asked for."""
    if classes is None:
        return prior.sample((n,))
    if not isinstance(prior, MixtureSameFamily):
        raise ValueError("classes are those of a mixture prior; this network has another prior")
    which = np.asarray(classes)
    k = prior.mixture_distribution.logits.shape[-1]
    if which.dtype.kind not in "iu" or which.shape not in ((), (n,)):
        raise ValueError(f"classes must be an integer, or {n} of them, not {classes!r}")
    if np.any((which < 0) | (which >= k)):
        raise ValueError(f"classes must be from 0 to {k - 1}, not {classes!r}")
    each = prior.component_distribution.sample((n,))
    return each[torch.arange(n), torch.as_tensor(np.broadcast_to(which, (n,)).copy())]


def divergence(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of the posterior from the prior.

    In closed form where torch knows it.  Of a mixture prior :math:`p = \sum_k \pi_k p_k`, with the
    component :math:`k` that is nearest to the posterior,

    .. math::

       \mathrm{KL}[q\,\|\,p] = \mathrm{KL}[q\,\|\,p_k] + \mathrm{E}_q[\log p_k(z) - \log p(z)],

    the second term at one draw.  Its expectation is the divergence itself, and so the bound is
    tighter than that of VaDE, which has the divergence of :math:`q(z|x)\,q(k|x)`; and it
    hardly scatters where one component holds the posterior.

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
        if isinstance(prior, MixtureSameFamily):
            return _divergence_from_mixture(posterior, prior, z)
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        return posterior.log_prob(z) - prior.log_prob(z)


def _divergence_from_mixture(
    posterior: Distribution, prior: MixtureSameFamily, z: Tensor
) -> Tensor:
    log_weight = prior.mixture_distribution.logits.log_softmax(-1)
    parts = prior.component_distribution
    if not all(_is_diagonal(d) for d in (posterior, parts)):
        raise NotImplementedError
    one = Normal(posterior.mean[:, None], posterior.stddev[:, None], validate_args=False)
    each = kl_divergence(one, parts.base_dist).sum(-1)  # (B, K)
    density = parts.log_prob(z[:, None])
    nearest = (each - log_weight).argmin(1, keepdim=True)
    first, own = (t.gather(1, nearest)[:, 0] for t in (each, density))
    return first + own - torch.logsumexp(log_weight + density, 1)


def _log_prob(pixels: Distribution, values: Tensor, good: Tensor | None) -> Tensor:
    """Log-likelihood of the good pixels of each image, (B,)."""
    if good is None:
        return pixels.log_prob(values)
    if not isinstance(pixels, Independent):
        raise TypeError("masked pixels need a likelihood with independent pixels")
    each = pixels.base_dist.log_prob(values)
    return torch.where(good, each, 0.0).sum((-2, -1))


def _chunks(n: int, size: int) -> Iterator[slice]:
    if isinstance(size, bool) or int(size) != size or size < 1:
        raise ValueError(f"chunk must be a positive integer, not {size!r}")
    for start in range(0, n, int(size)):
        yield slice(start, start + int(size))


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
