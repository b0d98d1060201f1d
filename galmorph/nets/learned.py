"""The network of `galmorph.LearnedGalaxy2D`, as a model holds it: shared, pickled by name."""

from __future__ import annotations

from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galmorph.nets.canonical import CanonicalDecoder
from galmorph.nets.priors import StandardNormal
from galmorph.nets.stamp_encoder import PosteriorEncoder
from galmorph.nets.vae import GalaxyVAE

if TYPE_CHECKING:
    from galmorph.training.datasets import TrainingBatch

__all__ = ["LatentPrior", "LearnedShape", "LearnedVAE", "noise_of"]


# pixels from a fitted galaxy at which the brightest place is another one
_NEIGHBOUR = 6.0


class LatentPrior:
    """The prior of the latents, numpy in and out.

    Parameters
    ----------
    module : Module
        ``module()`` is a torch distribution of event shape (d,).
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def log_prob(self, z: np.ndarray) -> np.ndarray:
        """Logarithm of the density at latents (..., d)."""
        with torch.no_grad():
            return self._module().log_prob(torch.as_tensor(z, dtype=torch.float32)).numpy()

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> np.ndarray:
        """Draw ``n`` latents, (n, d)."""
        seed = int(np.random.default_rng(rng).integers(2**62))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._module().sample((n,)).double().numpy()


class LearnedVAE(GalaxyVAE):
    """`GalaxyVAE` of the preset ``galmorph``: it looks at galaxies through any PSF and noise.

    ``decode`` gives the light in the canonical frame, before the PSF; images are encoded and
    reconstructed by fits of `galmorph.LearnedGalaxy2D`.
    """

    def encode(
        self, images: Any, weight: Any = None, *, psf: Any = None
    ) -> torch.distributions.Distribution:
        """Posterior of the latents by one pass of the encoder.

        Parameters
        ----------
        images : Tensor or array-like, (B, ny, nx)
        weight : Tensor or array-like, (B, ny, nx), optional
            One over the standard deviation of the noise; by default it is estimated.
        psf : PSF, array or model, optional

        Returns
        -------
        Distribution
            Batch shape (B,), event shape (d,).
        """
        from galmorph.fitting import EncoderFitter

        array = np.asarray(images, dtype=float)
        sigma = noise_of(array)[:, None, None] * np.ones_like(array)
        mask = ~np.isfinite(array)
        if weight is not None:
            weight = np.asarray(weight, dtype=float)
            mask |= ~(weight > 0)
            sigma = 1.0 / np.where(mask, 1.0, weight)
        result = self._fitted(array, sigma, mask, psf, EncoderFitter())
        first = len(result.param_names) - self.latent_size
        mean = torch.as_tensor(result.params[:, first:])
        cov = torch.as_tensor(result.cov[:, first:, first:])
        return torch.distributions.MultivariateNormal(mean, cov, validate_args=False)

    def _posterior(
        self, array: np.ndarray, good: np.ndarray, values: None, rows: slice
    ) -> torch.distributions.Distribution:
        return self.encode(np.where(good, array, np.nan))

    def _reconstruct(self, array: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At the maximum of the posterior, with the noise of each image as a parameter."""
        array = np.where(good, array, np.nan).astype(float)
        sigma = noise_of(array)[:, None, None] * np.ones_like(array)
        result = self._fitted(array, sigma, ~good, None, None)
        mean, misfit = result.model_images, result.model_std_images
        # a neighbour may be what the image is of
        peaks = _peaks(np.where(good, array, 0.0))
        far = np.hypot(*(peaks - result.params[:, 1:3]).T) > _NEIGHBOUR
        for i in np.flatnonzero(far):
            one = slice(i, i + 1)
            other = self._fitted(array[one], sigma[one], ~good[one], None, None, peaks[one])
            if other.chi2[0] < result.chi2[i] or not np.isfinite(result.chi2[i]):
                mean[i], misfit[i] = other.model_images[0], other.model_std_images[0]
        noise = _best_noise(np.where(good, array - mean, np.nan), misfit)
        return mean, np.sqrt(misfit**2 + noise[:, None, None] ** 2)

    def _fitted(self, array, sigma, mask, psf, fitter, positions=None) -> Any:
        # the fitters stand above the networks
        from galmorph.images import fit_images
        from galmorph.models.learned import LearnedGalaxy2D

        model = LearnedGalaxy2D(shape=LearnedShape(self))
        return fit_images(
            array,
            model,
            fitter,
            uncertainty=sigma,
            mask=mask,
            psf=psf,
            positions=positions,
            background="constant",
        )

    def elbo(
        self,
        batch: TrainingBatch,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """Evidence lower bound of each image, seen through its own PSF and noise.

        Parameters
        ----------
        batch, beta, generator
            As for `GalaxyVAE.elbo`; the batch may have weights and PSFs.

        Returns
        -------
        dict of Tensor, (B,)
            As for `GalaxyVAE.elbo`, in units of the least noise of each image.
        """
        from galmorph.training.learned import learned_elbo  # training stands above the networks

        return learned_elbo(self, batch, beta=beta, generator=generator)


def noise_of(images: np.ndarray) -> np.ndarray:
    """Standard deviation (B,) of the noise, from neighbouring pixels; a thousandth at least."""
    steps = [np.diff(images, axis=axis).reshape(len(images), -1) for axis in (1, 2)]
    scatter = np.nanmedian(np.abs(np.concatenate(steps, 1)), 1) / (0.6745 * np.sqrt(2))
    return np.maximum(scatter, 1e-3 * np.nanmax(np.abs(images), (1, 2))).clip(1e-30)


def _peaks(images: np.ndarray) -> np.ndarray:
    """(x, y) of the brightest place of each smoothed image, (B, 2)."""
    from scipy.ndimage import uniform_filter

    smooth = uniform_filter(images, (0, 5, 5)).reshape(len(images), -1)
    y, x = np.unravel_index(smooth.argmax(1), images.shape[1:])
    return np.stack([x, y], 1).astype(float)


def _best_noise(residual: np.ndarray, misfit: np.ndarray) -> np.ndarray:
    """The noise (B,) under which residuals are most probable, beside a misfit; NaN is left out."""
    rms = np.sqrt(np.nanmean(residual**2, (1, 2)))
    steps = np.geomspace(0.02, 1.0, 60)
    best = np.full(len(residual), -np.inf)
    noise = rms.copy()
    for step in steps:
        variance = misfit**2 + (step * rms[:, None, None]) ** 2
        each = -0.5 * residual**2 / variance - 0.5 * np.log(variance)
        total = np.nansum(np.where(np.isfinite(residual), each, np.nan), (1, 2))
        better = total > best
        best, noise = np.where(better, total, best), np.where(better, step * rms, noise)
    return noise


class LearnedShape:
    """A decoder in the canonical frame with its encoder and prior.

    Parameters
    ----------
    vae : GalaxyVAE
        Of the preset ``galmorph``.
    name : str, optional
        Of installed weights, by which it is pickled.

    Raises
    ------
    TypeError
        If the network draws something else than canonical galaxies.
    """

    def __init__(self, vae: GalaxyVAE, *, name: str | None = None) -> None:
        if not isinstance(vae.decoder, CanonicalDecoder):
            raise TypeError(
                "LearnedGalaxy2D needs a network of the preset 'galmorph', "
                f"not one that decodes with {type(vae.decoder).__name__}"
            )
        self.vae, self.name = vae.eval().requires_grad_(False), name
        self._decoders: dict[tuple, CanonicalDecoder] = {}

    @property
    def latent_dim(self) -> int:
        """Number of latents."""
        return self.vae.decoder.latent_dim

    @property
    def prior(self) -> LatentPrior:
        """The prior of the latents."""
        return LatentPrior(self.vae.prior)

    @property
    def encoder(self) -> PosteriorEncoder:
        """The encoder."""
        return self.vae.encoder

    def decoder(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> CanonicalDecoder:
        """The decoder in one precision on one device."""
        key = dtype, str(device)
        if key not in self._decoders:
            own = CanonicalDecoder(**self.vae.decoder.config)
            own.load_state_dict(self.vae.decoder.state_dict())
            self._decoders[key] = own.to(dtype=dtype, device=device).eval().requires_grad_(False)
        return self._decoders[key]

    @staticmethod
    @lru_cache(maxsize=8)
    def from_pretrained(name: str = "default") -> LearnedShape:
        """The network of installed weights; each is loaded once."""
        return LearnedShape(GalaxyVAE.from_pretrained(name), name=name)

    @staticmethod
    def read(path: str | PathLike[str]) -> LearnedShape:
        """The network of a file of weights."""
        from galmorph.nets.weights import load

        return LearnedShape(load(path))

    def write(self, path: str | PathLike[str]) -> None:
        """Write the weights to a file."""
        from galmorph.nets.weights import _OWN, REQUIRED, save

        about = {k: v for k, v in self.vae.metadata.items() if k not in _OWN}
        save(self.vae, path, metadata=dict.fromkeys(REQUIRED, "not stated") | about)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is not None:
            return LearnedShape.from_pretrained, (self.name,)
        state = {k: v.numpy() for k, v in self.vae.state_dict().items()}
        return _rebuild, (self.vae.config, state, self.vae.metadata)


def _rebuild(config: dict[str, Any], state: dict[str, np.ndarray], metadata: dict) -> LearnedShape:
    vae = GalaxyVAE.from_preset(config["preset"], **config["options"])
    vae.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()})
    vae.metadata = metadata
    return LearnedShape(vae)


def galmorph_preset(
    *,
    latent_dim: int = 32,
    hidden: int = 0,
    features: int = 128,
    channels: tuple[int, int, int] = (32, 64, 96),
    encoder_hidden: int = 384,
    components: int = 0,
    parities: tuple[int, int, int, int] | None = None,
) -> GalaxyVAE:
    """The learned galaxy of this package, untrained.

    Parameters
    ----------
    latent_dim : int
    hidden, features, parities
        Of the decoder, `galmorph.nets.canonical.CanonicalDecoder`.
    channels, encoder_hidden
        Of the encoder.
    components : int
        Of the prior, a Gaussian mixture; 0 is a standard normal.

    Returns
    -------
    GalaxyVAE
    """
    from galmorph.nets.priors import GaussianMixture

    prior = StandardNormal(latent_dim)
    if components:
        prior = GaussianMixture.empty(components, latent_dim)
    options = {
        "latent_dim": latent_dim,
        "hidden": hidden,
        "features": features,
        "channels": tuple(channels),
        "encoder_hidden": encoder_hidden,
        "components": components,
        "parities": parities and tuple(parities),
    }
    return LearnedVAE(
        PosteriorEncoder(latent_dim=latent_dim, channels=tuple(channels), hidden=encoder_hidden),
        CanonicalDecoder(
            latent_dim=latent_dim, hidden=hidden, features=features, parities=parities
        ),
        prior,
        config={"preset": "galmorph", "options": options},
    )
