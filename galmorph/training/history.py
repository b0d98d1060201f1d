"""What happened in a training, epoch by epoch: the table, and the file that grows with it."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["COLUMNS", "LossLog", "TrainingResult", "read_log"]

#: What is noted of each epoch; losses are means per stamp, in nats.
COLUMNS = {
    "epoch": int,
    "loss": float,
    "log_likelihood": float,
    "kl": float,
    "validation_loss": float,
    "validation_log_likelihood": float,
    "validation_kl": float,
    "learning_rate": float,
    "beta": float,
    "seconds": float,
}


@dataclass
class TrainingResult:
    """What a training did.

    Attributes
    ----------
    history : dict of str to ndarray, shape (n_epochs,)
        ``epoch`` (from 1), the means per stamp of ``loss``, ``log_likelihood``
        and ``kl`` over the training stamps as they were seen, the same of the
        validation stamps after the epoch (``validation_loss`` …, NaN if there
        are none), ``learning_rate`` at its last step, ``beta`` and ``seconds``.
        The validation loss is always that of the last epoch's beta, so that
        epochs can be compared while beta changes.
    best_epoch : int
        The epoch, from 1, whose weights the network holds: that of the lowest
        validation loss, or the last one if nothing validates.
    stopped_early : bool
        Whether the patience ran out.
    n_train, n_validation : int
        Stamps of either part, the skipped ones included.
    n_nonfinite : int
        Steps that were skipped because loss or gradient was not finite.
    skipped : dict of int to str
        Stamps that could not be used, and why.
    """

    history: dict[str, np.ndarray]
    best_epoch: int
    stopped_early: bool = False
    n_train: int = 0
    n_validation: int = 0
    n_nonfinite: int = 0
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def n_skipped(self) -> int:
        """Number of stamps that could not be used."""
        return len(self.skipped)

    def to_table(self) -> Table:
        """The history as a table.

        Returns
        -------
        `~astropy.table.Table`
            One row per epoch.
        """
        from astropy.table import Table

        return Table(self.history)

    def __str__(self) -> str:
        n = len(self.history["epoch"])
        lines = [f"{n} epochs on {self.n_train} stamps, {self.n_validation} to validate"]
        if n:
            name = "validation_loss" if self.n_validation else "loss"
            value = self.history[name][self.best_epoch - 1]
            lines.append(f"best epoch: {self.best_epoch}, {name.replace('_', ' ')} {value:.6g}")
        if self.stopped_early:
            lines.append("stopped early: the validation loss did not fall any more")
        if self.skipped:
            i, why = next(iter(self.skipped.items()))
            lines.append(f"{self.n_skipped} stamps skipped, as {i}: {why}")
        if self.n_nonfinite:
            lines.append(f"{self.n_nonfinite} steps skipped: loss or gradient not finite")
        return "\n".join(lines)


def as_arrays(history: dict[str, list]) -> dict[str, np.ndarray]:
    return {name: np.array(history[name], dtype=kind) for name, kind in COLUMNS.items()}


class LossLog:
    """A file that gets one line per epoch.

    Parameters
    ----------
    path : path-like
        Ends in ``.csv``, or in ``.jsonl`` for one JSON object per line.

    Raises
    ------
    ValueError
        If the name has another ending.
    OSError
        If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"log: the name must end in .csv or .jsonl, not {self.path.name!r}")

    def start(self, history: dict[str, list]) -> None:
        """Write the file anew, with the epochs that are done."""
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            if self.path.suffix.lower() == ".csv":
                csv.writer(file).writerow(COLUMNS)
        for k in range(len(history["epoch"])):
            self.add({name: history[name][k] for name in COLUMNS})

    def add(self, record: dict[str, float]) -> None:
        """Append an epoch."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            if self.path.suffix.lower() == ".csv":
                csv.writer(file).writerow(repr(record[name]) for name in COLUMNS)
            else:
                # JSON has no NaN
                clean = {k: None if math.isnan(v) else v for k, v in record.items()}
                file.write(json.dumps(clean) + "\n")


def read_log(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the loss curves that `train` wrote.

    Parameters
    ----------
    path : path-like
        The file, ``.csv`` or ``.jsonl``; of a run that goes on as well.

    Returns
    -------
    dict of str to ndarray
        As `TrainingResult.history`.

    Raises
    ------
    ValueError
        If the file is not such a log.
    OSError
        If it cannot be read.
    """
    log = LossLog(path)
    with open(log.path, newline="", encoding="utf-8") as file:
        try:
            if log.path.suffix.lower() == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file]
            history = {
                name: [kind("nan" if row[name] is None else row[name]) for row in rows]
                for name, kind in COLUMNS.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a log of a training ({error})") from None
    return as_arrays(history)
