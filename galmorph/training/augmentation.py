"""The same galaxy seen another way: turned by quarters, mirrored, shifted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from .datasets import TrainingBatch

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the stamps that leave galaxies as likely as they were.

    Image, weight and PSF are turned and mirrored together.  No pixel is
    interpolated, so the noise stays what it is.

    Parameters
    ----------
    turns : bool, optional
        Turn by 0, 90, 180 or 270 degrees (stamps or PSFs that are not square
        by 0 or 180).
    flips : bool, optional
        Mirror half of the stamps.
    shift : int, optional
        Shift by up to this many whole pixels along each axis.  What comes in
        at the edge is masked.

    Raises
    ------
    ValueError
        If ``shift`` is not a whole number of at least 0.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.training import Augmentation, StampDataset
    >>> batch, _ = StampDataset(np.arange(16.0).reshape(1, 4, 4)).batch([0])
    >>> turned = Augmentation()(batch, rng=5)
    >>> turned.images.shape, float(turned.images.sum())
    (torch.Size([1, 4, 4]), 120.0)
    """

    turns: bool = True
    flips: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.shift, bool) or int(self.shift) != self.shift or self.shift < 0:
            raise ValueError(f"shift must be a whole number of pixels, 0 or more: {self.shift!r}")

    def draw(self, n: int, rng: np.random.Generator | int | None = None) -> Draws:
        """Random numbers for ``n`` stamps.

        Parameters
        ----------
        n : int
            Number of stamps.
        rng : Generator or int, optional
            Source of randomness.

        Returns
        -------
        Draws
            What is done to each stamp.
        """
        rng = np.random.default_rng(rng)
        # All are drawn, used or not: one switch does not change what another draws.
        turns, flips = rng.integers(0, 4, n), rng.integers(0, 2, n)
        shifts = rng.integers(-int(self.shift), int(self.shift), (n, 2), endpoint=True)
        return Draws(turns * self.turns, flips.astype(bool) & self.flips, shifts)

    def __call__(
        self, batch: TrainingBatch, rng: np.random.Generator | int | None = None
    ) -> TrainingBatch:
        """Change a batch.

        Parameters
        ----------
        batch : TrainingBatch
            The stamps.
        rng : Generator or int, optional
            Source of randomness.

        Returns
        -------
        TrainingBatch
            New tensors of the same shapes.
        """
        return self.draw(len(batch), rng).apply(batch)


@dataclass(frozen=True)
class Draws:
    """What is done to each stamp of a batch.

    Attributes
    ----------
    turns : ndarray of int, shape (B,)
        Quarter turns, counter-clockwise with y upwards.
    flips : ndarray of bool, shape (B,)
        Whether it is mirrored, left to right, after the turn.
    shifts : ndarray of int, shape (B, 2)
        Pixels (dy, dx), after both.
    """

    turns: np.ndarray
    flips: np.ndarray
    shifts: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Draws:
        return Draws(self.turns[rows], self.flips[rows], self.shifts[rows])

    def apply(self, batch: TrainingBatch) -> TrainingBatch:
        """Change a batch of as many stamps."""
        square = all(t is None or t.shape[-1] == t.shape[-2] for t in (batch.images, batch.psf))
        turns = self.turns if square else self.turns // 2 * 2
        images, weight, psf = (
            None if t is None else _turn(t, turns, self.flips)
            for t in (batch.images, batch.weight, batch.psf)
        )
        if self.shifts.any():
            weight = torch.ones_like(images) if weight is None else weight
            images, weight = (_shift(t, self.shifts) for t in (images, weight))
        return replace(batch, images=images, weight=weight, psf=psf)


def _turn(stamps: torch.Tensor, turns: np.ndarray, flips: np.ndarray) -> torch.Tensor:
    out = stamps.clone()
    for turn in range(4):
        for flip in (False, True):
            rows = np.flatnonzero((turns == turn) & (flips == flip))
            if not rows.size or not (turn or flip):
                continue
            rows = torch.as_tensor(rows, device=stamps.device)
            # from the row axis (y) to the column axis (x) is clockwise where y is upwards
            changed = torch.rot90(stamps[rows], -turn, (-2, -1))
            out[rows] = changed.flip(-1) if flip else changed
    return out


def _shift(stamps: torch.Tensor, shifts: np.ndarray) -> torch.Tensor:
    """Shifted by whole pixels, with zeros where nothing comes in."""
    ny, nx = stamps.shape[-2:]
    dy, dx = (torch.as_tensor(s, device=stamps.device)[:, None] for s in shifts.T)
    y = torch.arange(ny, device=stamps.device) - dy
    x = torch.arange(nx, device=stamps.device) - dx
    inside = ((y >= 0) & (y < ny))[:, :, None] & ((x >= 0) & (x < nx))[:, None, :]
    rows = torch.arange(len(stamps), device=stamps.device)[:, None, None]
    moved = stamps[rows, y.clamp(0, ny - 1)[:, :, None], x.clamp(0, nx - 1)[:, None, :]]
    return torch.where(inside, moved, torch.zeros((), dtype=stamps.dtype, device=stamps.device))
