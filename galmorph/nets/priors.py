"""Priors of the latents: modules that return a torch ``Distribution`` when they are called."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

if TYPE_CHECKING:
    from .vae import GalaxyVAE

__all__ = ["DiagonalMixture", "GaussianMixture", "StandardNormal", "fit_mixture", "fit_prior"]


class StandardNormal(nn.Module):
    """N(0, I).

    Parameters
    ----------
    size : int
        Number of latents, d.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import StandardNormal
    >>> prior = StandardNormal(8)()
    >>> prior.log_prob(torch.zeros(3, 8)).shape
    torch.Size([3])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        # not saved: there is nothing in them to learn
        self.register_buffer("loc", torch.zeros(size), persistent=False)
        self.register_buffer("scale", torch.ones(size), persistent=False)

    def forward(self) -> Distribution:
        """The prior, event shape (d,)."""
        return Independent(Normal(self.loc, self.scale, validate_args=False), 1)


class GaussianMixture(nn.Module):
    r"""Mixture of K normals with full covariances.

    Weights, means and covariances are buffers: they are saved with the network and
    follow it to a GPU, but the training of the network does not change them.

    Parameters
    ----------
    weights : array-like, (K,)
        Of the components; positive.  They are normalised to sum 1.
    means : array-like, (K, d)
    covariances : array-like, (K, d, d)
        Positive definite.

    Raises
    ------
    ValueError
        If the shapes do not agree, a weight is not positive, or a covariance is not
        positive definite.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import GaussianMixture
    >>> prior = GaussianMixture(
    ...     weights=[1.0, 3.0], means=[[0.0, 0.0], [4.0, 0.0]], covariances=[torch.eye(2)] * 2
    ... )
    >>> [round(x, 4) for x in prior().mean.tolist()]
    [3.0, 0.0]
    >>> prior().log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    def __init__(self, weights, means, covariances) -> None:
        super().__init__()
        weights, means, covariances = (_tensor(x) for x in (weights, means, covariances))
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                "means must have the shape (K, d) and weights (K,), not "
                f"{tuple(means.shape)} and {tuple(weights.shape)}"
            )
        k, d = means.shape
        if covariances.shape != (k, d, d):
            raise ValueError(
                f"covariances must have the shape {(k, d, d)}, not {tuple(covariances.shape)}"
            )
        if not bool((weights > 0).all() and weights.isfinite().all() and means.isfinite().all()):
            raise ValueError("weights must be positive and finite, and means finite")
        factors, failed = torch.linalg.cholesky_ex(covariances)
        if bool(failed.any()) or not bool(factors.isfinite().all()):
            raise ValueError("covariances must be positive definite")
        self.register_buffer("logits", (weights / weights.sum()).log().float())
        self.register_buffer("means", means.float())
        self.register_buffer("scale_tril", factors.float())

    @classmethod
    def empty(cls, n_components: int, size: int) -> GaussianMixture:
        """A mixture of K standard normals, to be filled by ``load_state_dict``.

        Parameters
        ----------
        n_components, size : int
            K and d.
        """
        eye = torch.eye(size).expand(n_components, size, size)
        return cls(torch.ones(n_components), torch.zeros(n_components, size), eye)

    def forward(self) -> Distribution:
        """The prior, event shape (d,); it has ``log_prob``, ``sample``, ``mean``, ``variance``."""
        components = MultivariateNormal(self.means, scale_tril=self.scale_tril, validate_args=False)
        return MixtureSameFamily(
            Categorical(logits=self.logits, validate_args=False), components, validate_args=False
        )


class DiagonalMixture(nn.Module):
    r"""Mixture of K normals with diagonal covariances, learned with the network (VaDE).

    It is N(0, I) until `start` or `fit` is called; `galmorph.training.train` does that after
    ``prior_warmup`` epochs.  The weights are a softmax, and so always sum to 1.

    Parameters
    ----------
    n_components, size : int
        K and d.

    Raises
    ------
    ValueError
        If one of them is not positive.

    References
    ----------
    Jiang et al. (2017), IJCAI, 1965 (VaDE)

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import DiagonalMixture, StandardNormal
    >>> prior = DiagonalMixture(3, 2)
    >>> z = torch.randn(5, 2)
    >>> torch.allclose(prior().log_prob(z), StandardNormal(2)().log_prob(z))
    True
    >>> prior.start([1.0, 1.0, 2.0], [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], torch.ones(3, 2))
    >>> [round(w, 6) for w in prior.weights.tolist()]
    [0.25, 0.25, 0.5]
    """

    def __init__(self, n_components: int, size: int) -> None:
        super().__init__()
        if n_components < 1 or size < 1:
            raise ValueError(f"a mixture needs components and latents: {(n_components, size)}")
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.zeros(n_components, size))
        self.log_std = nn.Parameter(torch.zeros(n_components, size))
        # 0: N(0, I), whatever the parameters are
        self.register_buffer("started", torch.zeros(()))

    @property
    def weights(self) -> Tensor:
        """Weights of the components, (K,)."""
        return torch.softmax(self.started * self.logits, 0)

    def start(self, weights, means, variances) -> None:
        """Make it a mixture, from which the learning goes on.

        Parameters
        ----------
        weights : array-like, (K,)
            Positive; normalised here.
        means, variances : array-like, (K, d)

        Raises
        ------
        ValueError
            If the shapes do not agree, or a value is not finite or positive.
        """
        weights, means, variances = (_tensor(x) for x in (weights, means, variances))
        if weights.shape != self.logits.shape or {means.shape, variances.shape} != {
            self.means.shape
        }:
            raise ValueError(
                f"weights, means and variances must have the shapes {tuple(self.logits.shape)}, "
                f"{tuple(self.means.shape)} and {tuple(self.means.shape)}"
            )
        if not bool((weights > 0).all() and (variances > 0).all() and means.isfinite().all()):
            raise ValueError("weights and variances must be positive, and means finite")
        with torch.no_grad():
            self.logits.copy_((weights / weights.sum()).log())
            self.means.copy_(means)
            self.log_std.copy_(0.5 * variances.log())
            self.started.fill_(1.0)

    def fit(self, z: np.ndarray, rng: np.random.Generator | int | None = None) -> None:
        """Start from latents: by k-means, then a mixture of diagonal normals on them.

        Parameters
        ----------
        z : array-like, (N, d)
        rng : Generator or int, optional
            Source of randomness.
        """
        self.start(*fit_mixture(z, len(self.logits), covariance="diag", rng=rng))

    def forward(self) -> Distribution:
        """The prior, event shape (d,)."""
        components = Normal(
            self.started * self.means, (self.started * self.log_std).exp(), validate_args=False
        )
        return MixtureSameFamily(
            Categorical(logits=self.started * self.logits, validate_args=False),
            Independent(components, 1),
            validate_args=False,
        )


def fit_mixture(
    z: np.ndarray,
    n_components: int,
    *,
    covariance: str = "full",
    rng: np.random.Generator | int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mixture of normals of greatest likelihood, started from k-means.

    Parameters
    ----------
    z : array-like, (N, d)
    n_components : int
        K.
    covariance : {"full", "diag"}, optional
        Of each component.
    rng : Generator or int, optional
        Source of randomness.

    Returns
    -------
    weights, means, covariances : ndarray, (K,), (K, d), and (K, d, d) or (K, d)

    Raises
    ------
    ValueError
        If there are fewer latents than components, or they are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.nets.priors import fit_mixture
    >>> z = np.random.default_rng(1).normal(size=(400, 2))
    >>> z[:100] += 9
    >>> weights, means, covariances = fit_mixture(z, 2, rng=1)
    >>> np.round(np.sort(weights), 3).tolist(), covariances.shape
    ([0.25, 0.75], (2, 2, 2))
    """
    from sklearn.mixture import GaussianMixture as Mixture
    from threadpoolctl import threadpool_limits

    z = np.asarray(z, dtype=float)
    if z.ndim != 2 or len(z) < max(n_components, 2) or not np.isfinite(z).all():
        raise ValueError(f"a mixture of {n_components} needs as many finite latents (N, d)")
    seed = int(np.random.default_rng(rng).integers(2**31))
    mixture = Mixture(
        n_components, covariance_type=covariance, random_state=seed, max_iter=500,
        reg_covar=1e-5,
    )  # fmt: skip
    with threadpool_limits(1):  # sums in one order: the same bits each time
        mixture.fit(z)
    return mixture.weights_, mixture.means_, mixture.covariances_


def fit_prior(
    vae: GalaxyVAE,
    images: Any,
    *,
    n_components: int = 10,
    mask: Any = None,
    condition: Any = None,
    draws: int = 8,
    rng: np.random.Generator | int | None = None,
) -> GalaxyVAE:
    r"""Give a trained network the prior that its latents follow.

    A network that was trained with :math:`\beta \ne 1`, or not to the end, has latents that do not
    follow its prior, and galaxies drawn from that are not like real ones.  A Gaussian
    mixture is fitted here to draws from the posteriors of many galaxies, that is to
    :math:`\mathrm{E}_x[q(z|x)]`, which is also the prior of the greatest evidence lower bound.

    Parameters
    ----------
    vae : GalaxyVAE
    images : array-like, (N, ny, nx)
        Galaxies like those of the training; many times as many as components and latents.
    n_components : int, optional
        Of the mixture; with full covariances, or diagonal ones if that is the kind of mixture that
        the network has.
    mask, condition : optional
        As for `GalaxyVAE.latents`.
    draws : int, optional
        From the posterior of each image.
    rng : Generator or int, optional
        Source of randomness.

    Returns
    -------
    GalaxyVAE
        A copy with the new prior, and else the same weights.

    Raises
    ------
    ValueError
        If a number is not positive, or there are too few images.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.nets import beta_vae, fit_prior
    >>> vae = beta_vae(image_shape=(16, 16), filters=2, latent_size=2)
    >>> images = np.random.default_rng(1).uniform(0, 255, (20, 16, 16))
    >>> fit_prior(vae, images, n_components=2, rng=1).prior().mixture_distribution.probs.shape
    torch.Size([2])
    """
    if n_components < 1 or draws < 1:
        raise ValueError(f"n_components and draws must be positive: {(n_components, draws)}")
    rng = np.random.default_rng(rng)
    mean, std = vae.latents(images, mask=mask, condition=condition)
    z = (mean + std * rng.normal(size=(draws, *mean.shape))).reshape(-1, mean.shape[1])
    new = copy.deepcopy(vae)
    if isinstance(vae.prior, DiagonalMixture):
        prior: nn.Module = DiagonalMixture(n_components, z.shape[1])
        prior.fit(z, rng)
    else:
        prior = GaussianMixture(*fit_mixture(z, n_components, rng=rng))
    new.replace_prior(prior.to(next(vae.parameters()).device), components=n_components)
    return new.eval()


def _tensor(values) -> Tensor:
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
        values = torch.stack(list(values))
    return torch.as_tensor(values, dtype=torch.float64)
