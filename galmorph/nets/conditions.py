"""What is known of galaxies beside their images: redshift, size, seeing, any column."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Conditions", "condition_columns"]


class Conditions(nn.Module):
    """Columns that a network is told beside the image, each of which may be missing.

    A network sees each condition as two numbers: its value, standardised by the mean and the
    deviation of the training galaxies and 0 where it is missing, and 1 where it is missing.

    Parameters
    ----------
    names : sequence of str
        One for each condition.
    dropout : float
        Fraction of the known values that are hidden in training, so that the network learns
        to do without them.

    Raises
    ------
    ValueError
        If there are no names, one is there twice, or the fraction is not from 0 to below 1.

    Examples
    --------
    >>> import torch
    >>> from galmorph.nets import Conditions
    >>> conditions = Conditions(["redshift", "r_50"])
    >>> conditions.learn(torch.tensor([[0.1, 3.0], [0.3, 5.0]]))
    >>> conditions(torch.tensor([[0.3, float("nan")]])).tolist()
    [[1.0, 0.0, 0.0, 1.0]]
    """

    def __init__(self, names: Sequence[str], *, dropout: float = 0.1) -> None:
        super().__init__()
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"conditions must be names of columns, not {names!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"conditions must have different names, not {names!r}")
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"condition_dropout must be from 0 to below 1, not {dropout!r}")
        self.names, self.dropout = names, float(dropout)
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("scale", torch.zeros(len(names)))  # 0: not learned yet

    @property
    def size(self) -> int:
        """Numbers that a network is told of each galaxy, 2C."""
        return 2 * len(self.names)

    def learn(self, values: Tensor) -> None:
        """Learn mean and deviation, once; later calls change nothing.

        Parameters
        ----------
        values : Tensor, (N, C)
            Of the training galaxies; NaN where missing.

        Raises
        ------
        ValueError
            If a condition is not known of any galaxy.
        """
        if bool((self.scale > 0).all()):
            return
        values = np.asarray(values, dtype=float)
        known = np.isfinite(values)
        for name, some in zip(self.names, known.any(0), strict=True):
            if not some:
                raise ValueError(f"the condition {name!r} is missing everywhere")
        values = np.where(known, values, np.nan)
        std = np.nanstd(values, 0)
        self.mean.copy_(torch.as_tensor(np.nanmean(values, 0)))
        self.scale.copy_(torch.as_tensor(np.where(std > 0, std, 1.0)))

    @property
    def unit(self) -> Tensor:
        """Deviations by which values are standardised, (C,)."""
        return torch.where(self.scale > 0, self.scale, 1.0)

    def standardised(self, values: Tensor) -> Tensor:
        """Values (…, C) less their mean, in units of their deviation; NaN stays."""
        return (values - self.mean) / self.unit

    def hide(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Values of which some are missing, in training; else the values as they are."""
        if not self.training or not self.dropout:
            return values
        chance = torch.rand(values.shape, generator=generator, device=values.device)
        return torch.where(chance < self.dropout, torch.nan, values)

    def forward(self, values: Tensor, guess: Tensor | None = None) -> Tensor:
        """What the network is told.

        Parameters
        ----------
        values : Tensor, (…, C)
            In their own units; what is not finite is missing.
        guess : Tensor, (…, C), optional
            Standardised values to put in where they are missing (they stay marked as missing).

        Returns
        -------
        Tensor, (…, 2C)
        """
        missing = ~torch.isfinite(values)
        guess = torch.zeros_like(values) if guess is None else guess
        told = torch.where(missing, guess, self.standardised(values))
        return torch.cat([told, missing.to(told)], -1)

    def read(self, condition: Any, n: int) -> Tensor:
        """Conditions of ``n`` galaxies, in any form.

        Parameters
        ----------
        condition : None, float, array-like, dict, Table or str
            None is all missing; one number, or one number per galaxy, where there is one
            condition; shape (n, C) or (1, C); or a table or dict of columns or numbers, in
            which a name that is not there is missing, and others are ignored.
        n : int
            Number of galaxies.

        Returns
        -------
        Tensor, (n, C)
            On the device of the network; NaN where missing.

        Raises
        ------
        ValueError
            If it has another shape, or holds none of the names.
        """
        if condition is None:
            values = torch.full((n, len(self.names)), torch.nan)
        elif isinstance(condition, Tensor):
            values = condition
        elif (columns := _columns(condition)) is not None:
            if not set(columns) & set(self.names):
                raise ValueError(
                    f"condition holds {', '.join(columns) or 'nothing'}; this network knows "
                    f"{', '.join(self.names)}"
                )
            rows = [np.broadcast_to(columns.get(name, np.nan), (n,)) for name in self.names]
            values = torch.as_tensor(np.stack(rows, 1))
        else:
            values = torch.as_tensor(np.asarray(condition, dtype=float))
        if values.ndim < 2 and len(self.names) == 1:
            values = values.reshape(-1, 1)
        if values.ndim != 2 or values.shape[1] != len(self.names) or len(values) not in (1, n):
            raise ValueError(
                f"condition must have the shape {(n, len(self.names))} "
                f"({', '.join(self.names)}), not {tuple(values.shape)}"
            )
        return values.to(self.mean).expand(n, -1)

    def pick(self, values: Any, names: Sequence[str] | None) -> Any:
        """The columns of this network out of values (N, C') with names.

        Raises
        ------
        ValueError
            If one is not there, or, without names, if there are not as many.
        """
        if names is None:
            if values.shape[1] != len(self.names):
                raise ValueError(
                    f"conditions has {values.shape[1]} columns; this network knows "
                    f"{', '.join(self.names)}"
                )
            return values
        lacking = [name for name in self.names if name not in names]
        if lacking:
            raise ValueError(
                f"conditions lacks {', '.join(lacking)} (it holds {', '.join(names) or 'nothing'})"
            )
        return values[:, [names.index(name) for name in self.names]]


def condition_columns(conditions: Any) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """Conditions of a data set, in any form, as an array.

    Parameters
    ----------
    conditions : array-like (N,) or (N, C), Table, dict of columns, or path of a table
        What is masked or not finite is missing.  Columns that are not numbers are left out.

    Returns
    -------
    names : tuple of str or None
        Of the columns; None for an array.
    values : ndarray of float32, (N, C)
        NaN where missing.

    Raises
    ------
    ValueError
        If the columns are not of one length, or there are none.

    Examples
    --------
    >>> from galmorph.nets.conditions import condition_columns
    >>> names, values = condition_columns({"redshift": [0.1, None], "name": ["a", "b"]})
    >>> names, values.shape
    (('redshift',), (2, 1))
    """
    columns = _columns(conditions)
    if columns is None:
        names, values = None, np.ma.filled(np.ma.asarray(conditions, dtype=np.float32), np.nan)
        values = values[:, None] if values.ndim == 1 else values
    else:
        names = tuple(columns)
        if len({np.shape(column) for column in columns.values()}) > 1:
            raise ValueError("the columns must be of one length")
        values = np.array(list(columns.values()), dtype=np.float32).T
    if values.ndim != 2 or not values.size:
        raise ValueError(f"must be numbers (N, C), not of shape {values.shape}")
    return names, np.where(np.isfinite(values), values, np.float32(np.nan))


def _columns(obj: Any) -> dict[str, np.ndarray] | None:
    """Columns of numbers of a table, dict or file; None if it is none of them."""
    if isinstance(obj, (str, os.PathLike)):
        from astropy.table import Table

        obj = Table.read(obj)
    if isinstance(obj, Mapping):
        found = dict(obj)
    elif hasattr(obj, "colnames"):
        found = {name: obj[name] for name in obj.colnames}
    else:
        return None
    columns = {name: _numbers(column) for name, column in found.items()}
    return {name: column for name, column in columns.items() if column is not None}


def _numbers(column: Any) -> np.ndarray | None:
    """One column as float64, NaN where masked or None; None if it does not hold numbers."""
    values = getattr(column, "value", column)
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    values = np.ma.asarray(values)
    if values.dtype.kind == "O":
        try:
            values = np.ma.asarray([np.nan if v is None else float(v) for v in values])
        except (TypeError, ValueError):
            return None
    if values.dtype.kind not in "iufb" or values.ndim > 1:
        return None
    return values.astype(float).filled(np.nan)
