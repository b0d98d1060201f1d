"""Priors of the latents: modules that return a torch ``Distribution`` when they are called."""

from __future__ import annotations

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

__all__ = ["GaussianMixture", "StandardNormal"]


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


def _tensor(values) -> Tensor:
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
        values = torch.stack(list(values))
    return torch.as_tensor(values, dtype=torch.float64)
