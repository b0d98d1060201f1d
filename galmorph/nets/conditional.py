"""Densities of numbers of galaxies that depend on others: normalising flows with conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ConditionalFlow", "fit_conditional_flow"]

_HELD_OUT_BATCH = 512


class ConditionalFlow(nn.Module):
    r"""Neural spline flows, one after another: p(a | c) p(b | a, c) ...

    Each is an autoregressive rational-quadratic spline flow (Durkan et al. 2019,
    arXiv:1906.04032) of standardised numbers.  Conditions that are NaN are missing: the network
    sees a zero, and a flag beside it.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of columns of a, b, ...
    conditions : int
        Number of conditions, C.
    transforms : int
        Of each flow.
    hidden : sequence of int
        Units of the hidden layers of each transform.
    bins : int
        Pieces of each spline, which bend within five units of the centre.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets.conditional import ConditionalFlow
    >>> flow = ConditionalFlow([2, 3], 1)
    >>> x, c = torch.randn(7, 5), torch.zeros(7, 1)
    >>> flow.log_prob(x, c).shape
    torch.Size([7])
    >>> white = flow.whiten(x, c)
    >>> bool((flow.unwhiten(white, c) - x).abs().max() < 1e-3)
    True
    """

    def __init__(
        self,
        sizes: Sequence[int],
        conditions: int,
        *,
        transforms: int = 2,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
    ) -> None:
        import zuko

        super().__init__()
        if not sizes or min(sizes) < 1 or conditions < 1:
            raise ValueError("a conditional flow needs columns, and at least one condition")
        self.sizes = tuple(sizes)
        context, flows = 2 * conditions, []
        for size in sizes:
            flows.append(
                zuko.flows.NSF(
                    size, context, transforms=transforms, hidden_features=tuple(hidden), bins=bins
                )
            )
            context += size
        self.flows = nn.ModuleList(flows)

    def _context(self, c: Tensor) -> Tensor:
        missing = c.isnan()
        return torch.cat([torch.where(missing, torch.zeros_like(c), c), missing.to(c)], -1)

    def log_prob(self, x: Tensor, c: Tensor) -> Tensor:
        """Logarithm of the density of columns (..., d) under conditions (..., C)."""
        context, total = self._context(c).expand(*x.shape[:-1], -1), 0.0
        for flow, part in zip(self.flows, x.split(self.sizes, -1), strict=True):
            total = total + flow(context).log_prob(part)
            context = torch.cat([context, part], -1)
        return total

    def whiten(self, x: Tensor, c: Tensor) -> Tensor:
        """Coordinates (..., d) that are standard normal whatever the conditions."""
        context, found = self._context(c).expand(*x.shape[:-1], -1), []
        for flow, part in zip(self.flows, x.split(self.sizes, -1), strict=True):
            found.append(flow(context).transform(part))
            context = torch.cat([context, part], -1)
        return torch.cat(found, -1)

    def unwhiten(self, white: Tensor, c: Tensor, known: Tensor | None = None) -> Tensor:
        """The inverse of `whiten`.

        Parameters
        ----------
        white : Tensor, (..., d)
        c : Tensor, (..., C)
        known : Tensor, (..., d), optional
            Columns that are known already; NaN in those that are to be found.  All columns of
            one flow are known or none.
        """
        context, found = self._context(c).expand(*white.shape[:-1], -1), []
        parts = white.split(self.sizes, -1)
        givens = [None] * len(parts) if known is None else known.split(self.sizes, -1)
        for flow, part, given in zip(self.flows, parts, givens, strict=True):
            if given is None or bool(given.isnan().any()):
                given = flow(context).transform.inv(part)
            found.append(given)
            context = torch.cat([context, given], -1)
        return torch.cat(found, -1)


def fit_conditional_flow(
    flow: ConditionalFlow,
    draws: Tensor,
    log_prior: Tensor,
    conditions: Tensor,
    *,
    generator: torch.Generator,
    epochs: int = 40,
    batch_size: int = 128,
    at_once: int = 8,
    learning_rate: float = 3e-3,
    drop: float = 0.2,
    held_out: float = 0.1,
    weight_decay: float = 1e-4,
    report: Callable[[int, float, float], None] | None = None,
) -> list[tuple[float, float]]:
    r"""Fit a conditional flow to galaxies that are known through draws from their posteriors.

    It maximises :math:`\sum_i \ln \frac1S \sum_s p(x_{is} | c_i) / \pi(x_{is})`, the likelihood of
    the population where the draws were made under a prior :math:`\pi` (Hogg, Myers & Bovy 2010,
    ApJ 725, 2166): errors of the single galaxies do not widen it.

    Parameters
    ----------
    flow : ConditionalFlow
    draws : Tensor, (N, S, d)
    log_prior : Tensor, (N, S)
    conditions : Tensor, (N, C)
        NaN where missing.
    generator : torch.Generator
    epochs, batch_size, learning_rate, weight_decay
        Of Adam with one cycle of the learning rate.
    at_once : int
        Draws of each galaxy that a step uses, others each time: so that the flow does not learn
        the draws by heart.  The fewer, the less of large errors is taken out: where these are
        as large as the scatter of the galaxies, take 30.
    drop : float
        Probability with which each condition is left out in training.
    held_out : float
        Share of the galaxies on which the best epoch is chosen.
    report : callable, optional
        Gets the epoch and both mean log-likelihoods after each.

    Returns
    -------
    list of (float, float)
        Mean log-likelihood of a galaxy in training and of those held out, for each epoch.
    """
    n = len(draws)
    order = torch.randperm(n, generator=generator)
    test = order[: max(int(held_out * n), 1)]
    train = order[len(test) :]
    optimizer = torch.optim.AdamW(flow.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(train) // batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.15
    )

    every = torch.arange(draws.shape[1])

    def likelihood(rows: Tensor, c: Tensor, which: Tensor) -> Tensor:
        values = flow.log_prob(draws[rows[:, None], which], c[:, None])
        values = values - log_prior[rows[:, None], which]
        return values.logsumexp(1) - torch.log(torch.tensor(float(len(which))))

    def on_held_out() -> float:
        with torch.no_grad():
            parts = test.split(_HELD_OUT_BATCH)
            return float(sum(likelihood(r, conditions[r], every).sum() for r in parts)) / len(test)

    history, best, kept = [], -float("inf"), None
    for epoch in range(epochs):
        flow.train()
        shuffled = train[torch.randperm(len(train), generator=generator)]
        total = 0.0
        for rows in shuffled.split(batch_size):
            c = conditions[rows].clone()
            c[torch.rand(c.shape, generator=generator) < drop] = float("nan")
            which = every[torch.randperm(len(every), generator=generator)[:at_once]]
            loss = -likelihood(rows, c, which).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
            cycle.step()
            total -= float(loss.detach()) * len(rows)
        flow.eval()
        history.append((total / len(train), on_held_out()))
        if report is not None:
            report(epoch + 1, *history[-1])
        if history[-1][1] > best:
            best = history[-1][1]
            kept = {k: v.detach().clone() for k, v in flow.state_dict().items()}
    flow.load_state_dict(kept)
    flow.eval().requires_grad_(False)
    return history
