"""The network of `galmorph.LearnedGalaxy2D`, as a model holds it: shared, pickled by name."""

from __future__ import annotations

from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
import torch

from galmorph.nets.canonical import CanonicalDecoder
from galmorph.nets.priors import StandardNormal
from galmorph.nets.stamp_encoder import PosteriorEncoder
from galmorph.nets.vae import GalaxyVAE

__all__ = ["LatentPrior", "LearnedShape"]


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
    return GalaxyVAE(
        PosteriorEncoder(latent_dim=latent_dim, channels=tuple(channels), hidden=encoder_hidden),
        CanonicalDecoder(
            latent_dim=latent_dim, hidden=hidden, features=features, parities=parities
        ),
        prior,
        config={"preset": "galmorph", "options": options},
    )
