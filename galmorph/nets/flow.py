r"""What galaxies are like: densities fitted to the latents of many galaxies, each with its errors.

A fit tells latents through a posterior, :math:`p(z | x) \propto L(z)\, \pi(z)`, under the prior
:math:`\pi` of the network.  The scatter of such estimates is neither that of the galaxies (errors
widen it) nor that of the prior (which narrows it).  The densities here maximise

.. math:: \sum_i \ln \int p(z)\, L_i(z)\, \mathrm{d}z ,

with L = posterior / prior taken as normal: for a mixture in closed form (extreme deconvolution;
Bovy, Hogg & Roweis 2011, AnApS 5, 1657), for a flow (Durkan et al. 2019, arXiv:1906.04032) by
importance sampling from the posteriors.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution

from galmorph._tensorfile import read_arrays, write_arrays

from .learned import LatentPrior
from .priors import GaussianMixture
from .weights import WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FlowPrior", "Population", "fit_flow", "fit_mixture"]

KIND = "population"
# how much farther from the mean of the prior a likelihood may lie than its posterior
_STRETCH = 4.0
_FOLDER = Path(__file__).resolve().parent.parent / "pretrained"


class FlowPrior(nn.Module):
    """Neural spline flow over latents.

    Parameters
    ----------
    size : int
        Number of latents, d.
    transforms : int
        Autoregressive spline transforms.
    hidden : sequence of int
        Units of the hidden layers of each.
    bins : int
        Pieces of each spline.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.flow import FlowPrior
    >>> FlowPrior(4)().log_prob(torch.zeros(3, 4)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        size: int,
        *,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
    ) -> None:
        import zuko

        super().__init__()
        if size < 2:
            raise ValueError(f"size must be at least 2, not {size}")
        self.config = {
            "size": size,
            "transforms": transforms,
            "hidden": list(hidden),
            "bins": bins,
        }
        self.flow = zuko.flows.NSF(
            size, transforms=transforms, hidden_features=tuple(hidden), bins=bins
        )
        # splines bend within five units of the centre
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self) -> Distribution:
        """The prior, event shape (d,)."""
        unit = AffineTransform(self.loc, self.scale, event_dim=1)
        return TransformedDistribution(self.flow(), [unit], validate_args=False)


class Population(LatentPrior):
    """What galaxies of one kind are like: a density of latents, numpy in and out.

    Parameters
    ----------
    module : FlowPrior or GaussianMixture
    metadata : dict, optional
        What it was fitted to; kept in the file.  Samples farther from zero than its ``limit``, if
        it has one, are moved there: the range in which latents are fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.nets.flow import Population
    >>> rng = np.random.default_rng(1)
    >>> latents = rng.normal(3.0, 1.0, (500, 2))
    >>> errors = np.tile(0.25 * np.eye(2), (500, 1, 1))
    >>> population = Population.fit(latents, errors, kind="mixture", n_components=1)
    >>> population.sample(3, rng=2).shape
    (3, 2)
    """

    def __init__(self, module: nn.Module, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(module.eval().requires_grad_(False))
        self.metadata = dict(metadata or {})

    @property
    def size(self) -> int:
        """Number of columns, d."""
        return self._module().event_shape[0]

    @classmethod
    def fit(
        cls,
        latents: np.ndarray,
        cov: np.ndarray,
        *,
        kind: str = "mixture",
        prior_precision: float | np.ndarray = 1.0,
        rng: np.random.Generator | int | None = None,
        **options: Any,
    ) -> Population:
        """Fit a density to latents that are known with errors.

        Parameters
        ----------
        latents : array, shape (N, d)
            Means of the posteriors.  Rows that are not finite are left out.
        cov : array, shape (N, d, d)
            Their covariances; zero for columns that are known exactly.
        kind : {"mixture", "flow"}
        prior_precision : float or array, shape (d,)
            Inverse variance of the normal prior, of mean zero, under which the posteriors were
            found: 1 for latents of `galmorph.LearnedGalaxy2D`, 0 for what had no prior.
        rng : `numpy.random.Generator` or int, optional
        **options
            Of `fit_mixture` or `fit_flow`.

        Returns
        -------
        Population

        Raises
        ------
        ValueError
            If shapes do not agree, or there are fewer galaxies than four a column.
        """
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
        latents, cov = np.asarray(latents, float), np.asarray(cov, float)
        if latents.ndim != 2 or cov.shape != (*latents.shape, latents.shape[1]):
            raise ValueError(
                "latents must have the shape (N, d) and cov (N, d, d), not "
                f"{latents.shape} and {cov.shape}"
            )
        use = np.isfinite(latents).all(1) & np.isfinite(cov).all((1, 2))
        if use.sum() < 4 * latents.shape[1]:
            raise ValueError(
                f"{use.sum()} galaxies are too few for a density of {latents.shape[1]} columns"
            )
        fit, _ = _KINDS[kind]
        return cls(fit(latents[use], cov[use], prior_precision=prior_precision, rng=rng, **options))

    def sample(
        self,
        n: int,
        rng: np.random.Generator | int | None = None,
        *,
        classes: int | Sequence[int] | None = None,
    ) -> np.ndarray:
        """Draw ``n`` latents, (n, d).

        Parameters
        ----------
        n : int
        rng : `numpy.random.Generator` or int, optional
        classes : int or sequence of int, optional
            Components of a mixture to draw from, in their proportions.

        Raises
        ------
        ValueError
            If there are no such components.
        """
        limit = self.metadata.get("limit", np.inf)
        drawn = super() if classes is None else self._part(classes)
        return drawn.sample(n, rng).clip(-limit, limit)

    def _part(self, classes: int | Sequence[int]) -> LatentPrior:
        """Some components of the mixture."""
        module = self._module
        count = len(module.logits) if isinstance(module, GaussianMixture) else 0
        chosen = np.unique(np.atleast_1d(classes))
        if not chosen.size or not np.isin(chosen, np.arange(count)).all():
            raise ValueError(f"classes must be components, 0 to {count - 1}, not {classes!r}")
        rows = torch.as_tensor(chosen)
        scale = module.scale_tril[rows]
        part = GaussianMixture(module.logits[rows].exp(), module.means[rows], scale @ scale.mT)
        return LatentPrior(part)

    # -- files -------------------------------------------------------------------------

    def write(self, path: str | os.PathLike, *, half: bool = True) -> None:
        """Write the density to a file (safetensors).

        Parameters
        ----------
        path : path-like
        half : bool, optional
            Keep it in 16 bits.
        """
        kind = "flow" if isinstance(self._module, FlowPrior) else "mixture"
        config = self._module.config if kind == "flow" else _shape_of(self._module)
        arrays = {
            k: (v.half() if half and v.is_floating_point() else v).numpy()
            for k, v in self._module.state_dict().items()
        }
        header = {"kind": kind, "config": config, "metadata": self.metadata}
        write_arrays(path, arrays, kind=KIND, header=header)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Population:
        """Read a density from a file that `write` has written.

        Parameters
        ----------
        path : path-like

        Returns
        -------
        Population

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is another one, or damaged.
        """
        arrays, header = read_arrays(path, kind=KIND)
        _, build = _KINDS[header["kind"]]
        with torch.random.fork_rng(devices=[]):
            module = build(**header["config"])
        module.load_state_dict({name: torch.as_tensor(a) for name, a in arrays.items()})
        return cls(module, header["metadata"])

    @staticmethod
    @lru_cache(maxsize=4)
    def from_pretrained(name: str = "default") -> Population:
        """A density that comes with galmorph.

        Parameters
        ----------
        name : str, optional
            ``"default"``: bright nearby galaxies, for the default weights.

        Returns
        -------
        Population

        Raises
        ------
        WeightsError
            If there is none of this name.
        """
        path = _FOLDER / f"{name}.population"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.population")))
            raise WeightsError(f"there is no population {name!r}; installed: {names or 'none'}")
        return Population.read(path)


def _shape_of(module: GaussianMixture) -> dict[str, int]:
    return dict(zip(("n_components", "size"), module.means.shape, strict=True))


# -- likelihoods ---------------------------------------------------------------------------


def _likelihoods(
    mean: np.ndarray, cov: np.ndarray, prior_precision: float | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Precisions (N, d, d) and precisions times means (N, d) of posterior / prior.

    In directions in which the prior decides, a posterior that is not quite normal would be
    stretched beyond all bounds: its distance from the mean of the prior grows by `_STRETCH` at
    most.
    """
    prior = np.broadcast_to(np.asarray(prior_precision, float), mean.shape[1:])
    # what is known exactly is known to a hundredth of its scatter
    cov = cov + np.diag(1e-4 * mean.var(0) + 1e-12)
    # in units in which the prior, where there is one, is the unit normal
    unit = np.where(prior > 0, np.sqrt(np.where(prior > 0, prior, 1.0)), 1 / mean.std(0))
    value, vector = np.linalg.eigh(np.linalg.inv(cov * np.outer(unit, unit)))
    ours = np.einsum("nij,i,nij->nj", vector, (prior > 0).astype(float), vector)
    left = (value - ours).clip(1e-6)
    along = np.einsum("nij,ni->nj", vector, mean * unit)
    pushed = left * along / (left / value).clip(1 / _STRETCH)
    precision = np.einsum("nij,nj,nkj->nik", vector, left, vector) * np.outer(unit, unit)
    scaled = np.einsum("nij,nj->ni", vector, pushed) * unit
    return torch.as_tensor(precision), torch.as_tensor(scaled)


def _log_evidence(
    precision: Tensor, scaled: Tensor, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ln of the integral of N(mean, cov) times each likelihood (up to a constant of the galaxy).

    With it mean (N, d) and covariance (N, d, d) of the product.
    """
    own = torch.linalg.inv(cov)
    factor = torch.linalg.cholesky(precision + own)
    b = scaled + own @ mean
    after = torch.cholesky_solve(b[..., None], factor)[..., 0]
    ln_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + torch.logdet(cov)
    value = 0.5 * ((b * after).sum(-1) - mean @ own @ mean - ln_det)
    return value, after, torch.cholesky_inverse(factor)


# -- mixture -------------------------------------------------------------------------------


def fit_mixture(
    latents: np.ndarray,
    cov: np.ndarray,
    *,
    n_components: int = 8,
    prior_precision: float | np.ndarray = 1.0,
    rng: np.random.Generator | int | None = None,
    max_iterations: int = 60,
    tolerance: float = 1e-3,
    regularisation: float = 0.02,
) -> GaussianMixture:
    """Extreme deconvolution: a mixture of normals that errors have not widened.

    Parameters
    ----------
    latents, cov, prior_precision, rng
        As for `Population.fit`, all finite.
    n_components : int
    max_iterations : int
    tolerance : float
        It ends when the log-likelihood of a galaxy rises by less.
    regularisation : float
        Weight, as a share of the galaxies of a component, with which the covariance of all
        galaxies is mixed into its own.

    Returns
    -------
    GaussianMixture
    """
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(rng)
    precision, scaled = _likelihoods(latents, cov, prior_precision)
    n, d = latents.shape
    spread = latents.std(0) + 1e-9
    labels = KMeans(n_components, n_init=3, random_state=int(rng.integers(2**31))).fit_predict(
        latents / spread
    )
    weights = torch.as_tensor(np.bincount(labels, minlength=n_components) / n)
    means = torch.as_tensor(np.stack([latents[labels == k].mean(0) for k in range(n_components)]))
    covs = torch.as_tensor(np.cov(latents.T) + cov.mean(0)).expand(n_components, d, d).clone()
    last = -np.inf
    for _ in range(max_iterations):
        found = [_log_evidence(precision, scaled, m, c) for m, c in zip(means, covs, strict=True)]
        joint = torch.stack([f[0] for f in found], 1) + weights.log()
        total = torch.logsumexp(joint, 1)
        share = torch.exp(joint - total[:, None])
        counts = share.sum(0) + 1e-6
        old, weights = means, counts / counts.sum()
        means = torch.stack([share[:, k] @ f[1] for k, f in enumerate(found)]) / counts[:, None]
        spreads = []
        for k, (_, after, left) in enumerate(found):
            off = after - means[k]
            scatter = (share[:, k, None] * off).T @ off + torch.tensordot(share[:, k], left, 1)
            spreads.append(scatter / counts[k])
        spreads = torch.stack(spreads)
        common = torch.tensordot(weights, spreads, 1)
        mix = regularisation * n / n_components / (counts + regularisation * n / n_components)
        covs = spreads + mix[:, None, None] * (common - spreads)
        value = float(total.mean())
        if value - last < tolerance and bool((means - old).abs().max() < 0.5):
            break
        last = value
    return GaussianMixture(weights, means, covs)


# -- flow ----------------------------------------------------------------------------------


def fit_flow(
    latents: np.ndarray,
    cov: np.ndarray,
    *,
    prior_precision: float | np.ndarray = 1.0,
    rng: np.random.Generator | int | None = None,
    draws: int = 8,
    epochs: int = 60,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    held_out: float = 0.1,
    weight_decay: float = 1e-3,
    report: Any = None,
    **architecture: Any,
) -> FlowPrior:
    """Fit a neural spline flow through the errors of its galaxies.

    Parameters
    ----------
    latents, cov, prior_precision, rng
        As for `Population.fit`, all finite.
    draws : int
        Of each posterior at a step.  The bound of the likelihood is tight for many.
    epochs, batch_size, learning_rate, weight_decay
        Of Adam, with one cycle of the learning rate.
    held_out : float
        Share of the galaxies that chooses the best epoch.
    report : callable, optional
        ``report(epoch, training, held_out)``, log-likelihoods a galaxy.
    **architecture
        Of `FlowPrior`.

    Returns
    -------
    FlowPrior
    """
    rng = np.random.default_rng(rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    n, d = latents.shape
    prior = torch.as_tensor(np.broadcast_to(np.asarray(prior_precision, float), (d,)).copy())
    mean = torch.as_tensor(latents).float()
    floor = np.eye(d) * (1e-4 * latents.var(0) + 1e-12)
    factor = torch.linalg.cholesky(torch.as_tensor(cov + floor)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        flow = FlowPrior(d, **architecture)
    flow.loc.copy_(mean.mean(0))
    flow.scale.copy_(mean.std(0))
    order = torch.as_tensor(rng.permutation(n))
    judges, learn = order[: int(held_out * n)], order[int(held_out * n) :]
    optimiser = torch.optim.AdamW(flow.parameters(), learning_rate, weight_decay=weight_decay)
    steps = -(-len(learn) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps * epochs
    )

    def likelihood(rows: Tensor, source: torch.Generator) -> Tensor:
        noise = torch.randn((draws, len(rows), d), generator=source)
        z = mean[rows] + torch.einsum("nij,snj->sni", factor[rows], noise)
        under_prior = -0.5 * (prior.float() * z.square()).sum(-1)
        return torch.logsumexp(flow().log_prob(z) - under_prior, 0) - np.log(draws)

    best, kept = -np.inf, None
    for epoch in range(epochs):
        total = 0.0
        mixed = learn[torch.randperm(len(learn), generator=generator)]
        for rows in mixed.split(batch_size):
            loss = -likelihood(rows, generator).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            total -= loss.item() * len(rows)
        with torch.no_grad():
            same = torch.Generator().manual_seed(0)
            value = float(torch.cat([likelihood(r, same) for r in judges.split(512)]).mean())
        if report is not None:
            report(epoch, total / len(learn), value)
        if value > best:
            best, kept = value, {k: v.clone() for k, v in flow.state_dict().items()}
    flow.load_state_dict(kept)
    return flow


_KINDS = {"mixture": (fit_mixture, GaussianMixture.empty), "flow": (fit_flow, FlowPrior)}
