"""The training loop: mini-batches, steps, validation, and what is kept of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..nets.vae import draw
from .augmentation import Augmentation
from .checkpoint import read_checkpoint, write_checkpoint
from .datasets import Loaded, StampDataset, TrainingBatch, stream
from .ddp import Group, process_group
from .history import COLUMNS, LossLog, TrainingResult, as_arrays
from .schedules import SCHEDULES, CyclicalAnnealing, beta_per_epoch, learning_rate_factor

__all__ = ["train"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Training stamps at most that a mixture prior is started from.
_MOST_LATENTS = 50_000

#: The running mean of the gradient's length forgets with this factor per step.
_NORM_MEMORY = 0.99

# What a random number is for: each use has a stream of its own, made of the seed, the epoch
# and the step.  A run that was stopped so needs no state of a generator to go on exactly.
_SPLIT, _ORDER, _AUGMENT, _LATENT, _VALIDATE, _PRIOR = range(6)


def train(
    vae: torch.nn.Module,
    images: Any,
    *,
    uncertainty: Any = None,
    uncertainty_type: str = "std",
    mask: Any = None,
    psf: Any = None,
    conditions: Any = None,
    shape: tuple[int, int] | None = None,
    validation: float | Sequence[int] = 0.1,
    epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    final_learning_rate: float | None = None,
    schedule: str = "cosine",
    warmup: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = 10.0,
    beta: float | Sequence[float] | CyclicalAnnealing = 1.0,
    prior_warmup: int | None = None,
    augment: bool | Augmentation = True,
    patience: int | None = None,
    max_bad_steps: int = 20,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_minutes: float = 10.0,
    resume: bool = True,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    rng: np.random.Generator | int | None = None,
    progress: bool = True,
    log: str | os.PathLike | None = None,
) -> TrainingResult:
    """Train a network on stamps of galaxies.

    The stamps are read from disk in mini-batches, in a new order each epoch;
    memory does not grow with their number.  Stamps that cannot be read or
    have no usable pixel are skipped and counted.  At the end ``vae`` holds the
    weights of the best epoch, in evaluation mode.

    Started by ``torchrun``, each process takes its part of every batch; only
    the first one writes files and shows the progress.

    Parameters
    ----------
    vae : torch.nn.Module
        What is trained, in place.  Its method ``elbo(batch, *, beta,
        generator)`` takes a `TrainingBatch` and returns a dict of tensors of
        shape (B,): "loss", which is minimised, "log_likelihood" and "kl".
    images : array-like, path, sequence or StampDataset
        The stamps, (N, ny, nx); `StampDataset` says in what forms they, and
        the four following, may come.
    uncertainty : optional
        Noise of the pixels.
    uncertainty_type : {"std", "var", "ivar"}, optional
        What ``uncertainty`` is.
    mask : optional
        Pixels that are not 0 or False are bad.
    psf : optional
        Effective PSFs at pixel steps.
    conditions : optional
        What is known of the galaxies beside their images: array (N, C), table, dict of
        columns or path of a table, with the columns that the network is conditioned on.
    shape : tuple of int, optional
        Cut or pad the stamps about their centre to (ny, nx).
    validation : float or sequence of int, optional
        Fraction of the stamps that is left out of the training and judges it,
        or the numbers of these stamps.
    epochs : int, optional
        Times that each stamp is seen.
    batch_size : int, optional
        Largest number of stamps per step, of all processes together.
    learning_rate : float, optional
        The highest, of Adam.
    final_learning_rate : float, optional
        At the end; by default 0.
    schedule : {"cosine", "constant", "exponential"}, optional
        How the learning rate falls; "exponential" needs a final one.
    warmup : float, optional
        Epochs, at the start, in which it rises from 0.
    weight_decay : float, optional
        Of AdamW.
    clip : float or None, optional
        A gradient longer than this many times the running mean of its length
        is shortened to that.
    beta : float, sequence of float or CyclicalAnnealing, optional
        Weight of the Kullback-Leibler divergence, one for all epochs or one
        for each.
    prior_warmup : int, optional
        Epochs with the prior N(0, I), for a network that learns a mixture
        (`galmorph.nets.DiagonalMixture`).  After them the mixture is started from the
        latents, by k-means and a mixture of diagonal normals, and is learned with the rest; the
        best epoch is one of those that follow.
    augment : bool or Augmentation, optional
        Random quarter turns and mirror images, or what is given.
    patience : int, optional
        Stop when the validation loss has not fallen for this many epochs.
    max_bad_steps : int, optional
        Steps whose loss or gradient is not finite are skipped; give up after
        so many in a row.
    checkpoint : path-like, optional
        File for the state of the run, written after each epoch, every
        ``checkpoint_minutes`` and at Ctrl-C.
    checkpoint_minutes : float, optional
        Time between two checkpoints within an epoch.
    resume : bool, optional
        Go on with the run of ``checkpoint`` if that file exists.  The result
        is that of a run that was never stopped, bit by bit on a CPU.  Of the
        settings only ``epochs``, ``patience``, ``device`` and the files may
        have changed.
    device : str or torch.device, optional
        As "cuda".
    precision : {"float32", "bfloat16"}, optional
        Of the network's arithmetic; weights and losses stay float32.
    rng : Generator or int, optional
        Seed of the split, the order, the augmentation and the latents.
    progress : bool, optional
        Show a progress bar on the standard error.
    log : path-like, optional
        File for the loss curves, ``.csv`` or ``.jsonl``; one line per epoch.

    Returns
    -------
    TrainingResult
        The history and what was skipped.

    Raises
    ------
    TypeError, ValueError, OSError
        If an argument makes no sense, the stamps cannot be opened or not one
        can be used, or the checkpoint is damaged or belongs to another run.
    FloatingPointError
        If ``max_bad_steps`` steps in a row were not finite.  The network holds
        the weights of the best epoch so far.
    KeyboardInterrupt
        At Ctrl-C, after the checkpoint was written.

    See Also
    --------
    galmorph.plot.loss_curves : draws the history.

    Examples
    --------
    A network that is one image, the mean of all:

    >>> import numpy as np
    >>> import torch
    >>> from galmorph.training import train
    >>> class Mean(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.image = torch.nn.Parameter(torch.zeros(8, 8))
    ...
    ...     def elbo(self, batch, *, beta=1.0, generator=None):
    ...         chi2 = ((batch.images - self.image) ** 2 * batch.weight**2).sum((1, 2))
    ...         zero = torch.zeros_like(chi2)
    ...         return {"loss": chi2 / 2, "log_likelihood": -chi2 / 2, "kl": zero}
    >>> images = 5 + np.random.default_rng(1).normal(0, 1, (40, 8, 8))
    >>> mean = Mean()
    >>> result = train(
    ...     mean, images, uncertainty=1.0, epochs=30, batch_size=10, learning_rate=0.2,
    ...     rng=1, progress=False,
    ... )
    >>> len(result.history["loss"]), result.n_train, result.n_validation
    (30, 36, 4)
    >>> abs(float(mean.image.detach().mean()) - 5) < 0.1
    True
    """  # fmt: skip
    settings = _Settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        beta=beta,
        prior_warmup=prior_warmup,
        augment=Augmentation() if augment is True else augment or None,
        patience=patience,
        max_bad_steps=max_bad_steps,
        checkpoint_minutes=checkpoint_minutes,
        precision=precision,
    )
    if not callable(getattr(vae, "elbo", None)):
        raise TypeError(f"vae must have a method elbo, {type(vae).__name__} has none")
    curves = None if log is None else LossLog(log)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(process_group(device))
        stack.enter_context(_own_random_numbers(group.device))
        if isinstance(images, StampDataset):
            if any(o is not None for o in (uncertainty, mask, psf, conditions, shape)):
                raise ValueError(
                    "uncertainty, mask, psf, conditions and shape belong into the StampDataset"
                )
            data = images
        else:
            data = stack.enter_context(
                StampDataset(
                    images,
                    uncertainty=uncertainty,
                    uncertainty_type=uncertainty_type,
                    mask=mask,
                    psf=psf,
                    conditions=conditions,
                    shape=shape,
                )
            )
        seed = group.gather(None if rng is None else _seed_of(rng))[0]
        run = _Run(vae, data, settings, group, seed=seed, validation=validation)
        run.open_files(checkpoint, curves, resume)
        return run(progress=progress)


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """The caller's global generators are as before in the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _seed_of(rng: np.random.Generator | int) -> int:
    return int(np.random.default_rng(rng).integers(2**62))


# -- settings ----------------------------------------------------------------------------


@dataclass
class _Settings:
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float | None
    schedule: str
    warmup: float
    weight_decay: float
    clip: float | None
    beta: float | Sequence[float] | CyclicalAnnealing
    prior_warmup: int | None
    augment: Augmentation | None
    patience: int | None
    max_bad_steps: int
    checkpoint_minutes: float
    precision: str

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_bad_steps"):
            _check_count(name, getattr(self, name))
        for name in ("patience", "prior_warmup"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.prior_warmup is not None and self.prior_warmup >= self.epochs:
            raise ValueError(f"prior_warmup must be below epochs, not {self.prior_warmup!r}")
        for name in ("learning_rate", "clip", "checkpoint_minutes"):
            if name != "clip" or self.clip is not None:
                _check_number(name, getattr(self, name), "positive", lambda v: v > 0)
        for name in ("warmup", "weight_decay"):
            _check_number(name, getattr(self, name), "0 or more", lambda v: v >= 0)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}"
            )
        if self.augment is not None and not isinstance(self.augment, Augmentation):
            raise TypeError(f"augment must be True, False or an Augmentation, not {self.augment!r}")
        final = self.final_learning_rate
        if final is None and self.schedule == "exponential":
            raise ValueError("the schedule 'exponential' needs a final_learning_rate")
        if final is not None:
            _check_number("final_learning_rate", final, "positive", lambda v: v > 0)
        self.final_factor = 0.0 if final is None else final / self.learning_rate
        self.betas = beta_per_epoch(self.beta, self.epochs)

    def job(self) -> dict[str, Any]:
        """What two runs must share to be one."""
        fixed = {"epochs", "patience", "max_bad_steps", "checkpoint_minutes"}
        job = {name: value for name, value in asdict(self).items() if name not in fixed}
        if not isinstance(self.beta, CyclicalAnnealing):
            job["beta"] = np.asarray(self.beta).tolist()
        return job


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")


def _check_number(name: str, value: Any, what: str, good: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (math.isfinite(value) and good(value)):
        raise ValueError(f"{name} must be {what}, not {value!r}")


def _split(n: int, validation: float | Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the validation stamps, each in order."""
    if np.ndim(validation) == 0:
        _check_number("validation", validation, "from 0 to below 1", lambda v: 0 <= v < 1)
        count = round(n * float(validation))
        if validation > 0:
            count = min(max(count, 1), n - 1)
        chosen = _generator(seed, _SPLIT).permutation(n)[:count]
    else:
        chosen = np.asarray(validation)
        if (
            chosen.ndim != 1
            or chosen.dtype.kind not in "iu"
            or len(np.unique(chosen)) < len(chosen)
        ):
            raise ValueError("validation must be a fraction, or different numbers of stamps")
        if np.any((chosen < 0) | (chosen >= n)):
            raise ValueError(f"validation names stamps outside of 0 … {n - 1}")
    training = np.setdiff1d(np.arange(n), chosen)
    if not len(training):
        raise ValueError("validation leaves no stamp to train on")
    return training, np.sort(chosen).astype(np.int64)


def _generator(seed: int, *use: int) -> np.random.Generator:
    return np.random.default_rng([seed, *use])


def _batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Parts of nearly the same length, so that no last one is tiny."""
    return np.array_split(order, -(-len(order) // size)) if len(order) else []


# -- the run -----------------------------------------------------------------------------


class _Objective(torch.nn.Module):
    """The loss as the ``forward`` of a module, which is what several processes share."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, batch: TrainingBatch, beta: float, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return self.vae.elbo(batch, beta=beta, generator=generator)


@dataclass
class _State:
    """All that changes in a run, beside network and optimiser."""

    seed: int
    epoch: int = 0  # that is going on, from 0
    step: int = 0  # steps of it that are done
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seen: int = 0
    seconds: float = 0.0
    norm: float = 0.0  # running mean of the gradient's length
    bad_row: int = 0
    n_bad: int = 0
    history: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    best_epoch: int = 0  # from 1
    best_loss: float = math.inf
    best: dict[str, torch.Tensor] | None = None
    skipped: dict[int, str] = field(default_factory=dict)


class _Run:
    """One training; called, it goes on from its state to the end."""

    def __init__(
        self,
        vae: torch.nn.Module,
        data: StampDataset,
        settings: _Settings,
        group: Group,
        *,
        seed: int | None,
        validation: float | Sequence[int],
    ) -> None:
        self.vae = vae.to(group.device)
        self.data, self.settings, self.group = data, settings, group
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("vae has no parameters to train")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._seed_given = seed is not None
        new = group.gather(_seed_of(None) if seed is None else seed)[0]
        self.state = _State(seed=new)
        self._validation = validation
        self._split()
        # also stands in where a process gets no usable stamp of a batch
        self.placeholder = data.load([data.first])
        self._check_network()
        self.latents = torch.Generator(group.device)
        self.checkpoint: str | os.PathLike | None = None
        self.log: LossLog | None = None
        self._clock = self._saved = time.perf_counter()

    def _check_network(self) -> None:
        """What the network has to know before the first step, and to be able to do later."""
        learn = getattr(self.vae, "learn_conditions", None)
        if learn is not None:
            known = self.data.conditions
            learn(None if known is None else known[self.training], self.data.condition_names)
        if self.settings.prior_warmup is not None:
            fit = getattr(getattr(self.vae, "prior", None), "fit", None)
            if not callable(fit):
                raise ValueError("prior_warmup is for a network whose prior is a learned mixture")

    def _split(self) -> None:
        self.training, self.held_out = _split(len(self.data), self._validation, self.state.seed)
        self.n_steps = len(_batches(self.training, self.settings.batch_size))

    # -- files

    def open_files(
        self, checkpoint: str | os.PathLike | None, log: LossLog | None, resume: bool
    ) -> None:
        """Take up the run of the checkpoint, and start the log with what is done."""
        self.checkpoint = checkpoint
        if checkpoint is not None:
            parent = os.path.dirname(os.path.abspath(checkpoint))
            if not os.path.isdir(parent):
                raise FileNotFoundError(f"checkpoint: {parent}: no such folder")
            if resume and any(self.group.gather(os.path.exists(checkpoint))):
                self._resume(checkpoint)
        if self.group.is_main and log is not None:
            log.start(self.state.history)
            self.log = log

    def _job(self) -> dict[str, Any]:
        """What makes two runs the same."""
        job = self.settings.job()
        first = self.placeholder
        job |= {
            "images": [len(self.data), *self.data.shape],
            "first image": zlib.crc32(first.images.tobytes()),
            "noise and masks": first.weight is not None and zlib.crc32(first.weight.tobytes()),
            "psf": first.psf is not None and zlib.crc32(first.psf.tobytes()),
            "conditions": None
            if self.data.conditions is None
            else zlib.crc32(self.data.conditions.tobytes()),
            "network": zlib.crc32(
                repr([(k, tuple(v.shape)) for k, v in self.vae.state_dict().items()]).encode()
            ),
            "validation": self._validation
            if np.ndim(self._validation) == 0
            else zlib.crc32(np.asarray(self._validation, dtype=np.int64).tobytes()),
        }
        return job

    def _resume(self, path: str | os.PathLike) -> None:
        held = read_checkpoint(path, self._job())
        state = _State(**held["run"])
        if self._seed_given and state.seed != self.state.seed:
            raise ValueError(
                f"{path} belongs to another run (rng was another); start again with "
                "resume=False, or choose another file"
            )
        self.vae.load_state_dict(held["vae"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.state = state
        self._split()

    def _save(self) -> None:
        self._saved = time.perf_counter()
        if self.checkpoint is None or not self.group.is_main:
            return
        self._tick()
        held = {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "run": dict(vars(self.state)),
        }
        write_checkpoint(self.checkpoint, held, self._job())

    def _tick(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now

    # -- the loop

    def __call__(self, *, progress: bool) -> TrainingResult:
        self.objective = self.group.wrap(_Objective(self.vae))
        self._clock = self._saved = time.perf_counter()
        try:
            with (
                _stop_at_step(self.checkpoint is not None) as self.wants_stop,
                self._bar(progress) as self.bar,
            ):
                while self.state.epoch < self.settings.epochs and not self._patience_is_out():
                    self._train_epoch()
                    self._end_epoch(self._validate())
        except FloatingPointError:
            self._take_best()
            raise
        finally:
            self.vae.eval()
            self.optimizer.zero_grad(set_to_none=True)
            del self.objective
        self._take_best()
        state = self.state
        return TrainingResult(
            history=as_arrays(state.history),
            best_epoch=state.best_epoch,
            stopped_early=state.epoch < self.settings.epochs,
            n_train=len(self.training),
            n_validation=len(self.held_out),
            n_nonfinite=state.n_bad,
            skipped=dict(sorted(state.skipped.items())),
        )

    def _patience_is_out(self) -> bool:
        patience, state = self.settings.patience, self.state
        if patience is None or not len(self.held_out):
            return False
        if state.epoch <= (self.settings.prior_warmup or 0):
            return False  # the mixture comes first
        return state.epoch - state.best_epoch >= patience

    def _take_best(self) -> None:
        if self.state.best is not None:
            self.vae.load_state_dict(self.state.best)
            self.group.share(self.vae)

    def _bar(self, progress: bool) -> Any:
        if not progress or not self.group.is_main:
            return contextlib.nullcontext()
        from tqdm import tqdm

        return tqdm(
            desc="training",
            total=self.settings.epochs * self.n_steps,
            initial=self.state.epoch * self.n_steps + self.state.step,
            unit="step",
            file=sys.stderr,
            # a log file gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
        )

    def _check_stop(self, *more: float) -> list[float]:
        """Sums of ``more`` over the processes; ends the run where one was interrupted."""
        stop, *sums = self.group.sum([self.wants_stop(), *more])
        if stop:
            self._save()
            raise KeyboardInterrupt(
                f"the state of the training is in {self.checkpoint}; call train again with the "
                "same arguments to go on"
            )
        if time.perf_counter() - self._saved > 60 * self.settings.checkpoint_minutes:
            self._save()
        return sums

    def _train_epoch(self) -> None:
        state, group = self.state, self.group
        order = _generator(state.seed, _ORDER, state.epoch).permutation(self.training)
        batches = _batches(order, self.settings.batch_size)[state.step :]
        parts = [batch[group.part(batch)] for batch in batches]
        if state.step == 0 and state.epoch == self.settings.prior_warmup:
            self._start_prior()
        self.vae.train()
        with contextlib.closing(stream(self.data, parts)) as stamps:
            for batch, part, loaded in zip(batches, parts, stamps, strict=True):
                state.skipped |= loaded.skipped
                (count,) = self._check_stop(len(loaded))
                if count:
                    self._step(self._prepare(loaded, batch, part), int(count), bool(len(loaded)))
                state.step += 1
                if self.bar is not None:
                    self.bar.update()
        if not state.seen:
            why = "" if not state.skipped else f" ({next(iter(state.skipped.values()))})"
            if state.bad_row:
                raise FloatingPointError(self._not_finite())
            raise ValueError(f"images: not one training stamp could be used{why}")

    def _start_prior(self) -> None:
        """Start the mixture from a draw of the latents of each training stamp."""
        rng = _generator(self.state.seed, _PRIOR)
        rows = rng.permutation(self.training)[:_MOST_LATENTS]
        self.vae.eval()
        self._seed_latents(_PRIOR)
        drawn = []
        parts = _batches(rows, self.settings.batch_size)
        with contextlib.closing(stream(self.data, parts)) as stamps, torch.no_grad():
            for loaded in filter(len, stamps):
                batch = loaded.tensors().to(self.group.device)
                drawn.append(draw(self.vae.posterior(batch), self.latents))
        self.vae.prior.fit(torch.cat(drawn).double().cpu().numpy(), rng)
        self.group.share(self.vae)
        # earlier epochs had another prior: the best one is yet to come
        self.state.best_loss = math.inf

    def _prepare(self, loaded: Loaded, batch: np.ndarray, part: np.ndarray) -> TrainingBatch:
        """The batch on its device, changed at random."""
        state = self.state
        if not len(loaded):
            return self.placeholder.tensors().to(self.group.device)
        tensors = loaded.tensors().to(self.group.device)
        if self.settings.augment is None:
            return tensors
        rng = _generator(state.seed, _AUGMENT, state.epoch, state.step)
        # Drawn for the whole batch, so that the number of processes changes nothing.
        draws = self.settings.augment.draw(len(batch), rng)[self.group.part(batch)]
        return draws[np.isin(part, loaded.index)].apply(tensors)

    def _seed_latents(self, *use: int) -> None:
        seed = int(_generator(self.state.seed, *use, self.group.rank).integers(2**62))
        self.latents.manual_seed(seed)
        # Dropout draws from the global generators.
        torch.default_generator.manual_seed(seed)
        if self.group.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _losses(self, module: Callable, batch: TrainingBatch, beta: float) -> list[torch.Tensor]:
        precision = PRECISIONS[self.settings.precision]
        with torch.autocast(
            self.group.device.type, dtype=precision, enabled=precision is not torch.float32
        ):
            found = module(batch, beta=beta, generator=self.latents)
        return [found[name].float() for name in ("loss", "log_likelihood", "kl")]

    def _learning_rate(self) -> float:
        settings, state = self.settings, self.state
        return settings.learning_rate * learning_rate_factor(
            state.epoch * self.n_steps + state.step,
            settings.epochs * self.n_steps,
            schedule=settings.schedule,
            warmup=round(settings.warmup * self.n_steps),
            final=settings.final_factor,
        )

    def _step(self, batch: TrainingBatch, count: int, real: bool) -> None:
        """One step of the optimiser, on ``count`` stamps of all processes."""
        state, settings = self.state, self.settings
        for options in self.optimizer.param_groups:
            options["lr"] = self._learning_rate()
        self._seed_latents(_LATENT, state.epoch, state.step)
        losses = self._losses(self.objective, batch, settings.betas[state.epoch])
        # The processes' gradients are averaged, and their parts may differ in length.
        (losses[0].sum() * (self.group.size / count * real)).backward()
        bound = settings.clip * state.norm if settings.clip and state.norm else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, bound))
        sums = torch.stack([loss.detach().double().sum() for loss in losses]) * real
        sums = self.group.sum(sums.tolist())
        if math.isfinite(norm) and all(map(math.isfinite, sums)):
            self.optimizer.step()
            memory = _NORM_MEMORY if state.norm else 0.0
            state.norm = memory * state.norm + (1 - memory) * min(norm, bound)
            state.sums = [a + b for a, b in zip(state.sums, sums, strict=True)]
            state.seen += count
            state.bad_row = 0
        else:
            state.n_bad += 1
            state.bad_row += 1
            if state.bad_row >= settings.max_bad_steps:
                raise FloatingPointError(self._not_finite())
        self.optimizer.zero_grad(set_to_none=True)

    def _not_finite(self) -> str:
        kept = f"the weights are those of epoch {self.state.best_epoch}"
        return (
            f"loss or gradient was not finite in {self.state.bad_row} steps in a row "
            f"(epoch {self.state.epoch + 1}); try a lower learning_rate, a longer warmup or a "
            "lower clip, and look at the scale of the images"
            + (f"; {kept}" if self.state.best_epoch else "")
        )

    def _validate(self) -> list[float]:
        """Means per stamp over the held-out part: loss, log-likelihood, divergence."""
        if not len(self.held_out):
            return [math.nan] * 3
        self.vae.eval()
        sums, seen = np.zeros(3), 0
        # The same latents and the same beta at each epoch: what changes is the network.
        self._seed_latents(_VALIDATE)
        parts = [b[self.group.part(b)] for b in _batches(self.held_out, self.settings.batch_size)]
        with contextlib.closing(stream(self.data, parts)) as stamps, torch.no_grad():
            for loaded in stamps:
                self.state.skipped |= loaded.skipped
                self._check_stop()
                if not len(loaded):
                    continue
                batch = loaded.tensors().to(self.group.device)
                losses = self._losses(self.vae.elbo, batch, self.settings.betas[-1])
                sums += [float(loss.double().sum()) for loss in losses]
                seen += len(loaded)
        *totals, count = self.group.sum([*sums, seen])
        return [total / count if count else math.nan for total in totals]

    def _end_epoch(self, validation: list[float]) -> None:
        state, settings = self.state, self.settings
        for other in self.group.gather(state.skipped):
            state.skipped |= other
        self._tick()
        train = [s / state.seen for s in state.sums]
        rate = self.optimizer.param_groups[0]["lr"]
        values = [state.epoch + 1, *train, *validation, rate, settings.betas[state.epoch],
                  state.seconds]  # fmt: skip
        record = dict(zip(COLUMNS, values, strict=True))
        for name, value in record.items():
            state.history[name].append(value)
        if not len(self.held_out) or validation[0] < state.best_loss:
            self._keep(validation[0])
        state.epoch += 1
        if state.epoch == settings.epochs and state.best is None:
            warnings.warn("the validation loss was never finite", RuntimeWarning, stacklevel=4)
            self._keep(math.inf)
        state.step = state.seen = 0
        state.sums, state.seconds = [0.0] * 3, 0.0
        if self.log is not None:
            self.log.add(record)
        self._save()
        if self.bar is not None:
            shown = {"loss": f"{train[0]:.5g}"}
            if len(self.held_out):
                shown["validation"] = f"{validation[0]:.5g}"
            self.bar.set_description(f"epoch {record['epoch']}/{settings.epochs}", refresh=False)
            self.bar.set_postfix(shown)

    def _keep(self, loss: float) -> None:
        """Copy the weights: they are the best so far."""
        self.state.best_loss = loss
        self.state.best_epoch = len(self.state.history["epoch"])
        self.state.best = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self.vae.state_dict().items()
        }


@contextlib.contextmanager
def _stop_at_step(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that it falls between two steps."""
    stopped = False

    def handler(number: int, frame: Any) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)
