"""A training described by a TOML file: what `galmorph train` does."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .augmentation import Augmentation
from .datasets import StampDataset
from .history import LossLog, TrainingResult
from .loop import train
from .schedules import CyclicalAnnealing

__all__ = ["TrainingConfig", "read_config", "run_config"]


# -- what a file may hold ----------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(check, value))


_TEXT = (lambda v: isinstance(v, str) and v != "", "text in quotes")
_NUMBER = (_is_number, "a number")
_INTEGER = (_is_integer, "an integer")
_SEED = (lambda v: _is_integer(v) and v >= 0, "an integer, 0 or more")
_SWITCH = (lambda v: isinstance(v, bool), "true or false")
_TABLE = (lambda v: isinstance(v, dict), "a table")
_PAIR = (lambda v: _are(_is_integer, v) and len(v) == 2, "two integers, as [64, 64]")
_VALUE_OR_PATH = (lambda v: _is_number(v) or _TEXT[0](v), "a path in quotes, or a number")
_NUMBERS = (
    lambda v: _is_number(v) or _are(_is_number, v) or isinstance(v, dict),
    "a number, a list of numbers, or a table, as {rise = 5, hold = 5}",
)

#: The keys of each table of the file, and what each must be.
KEYS = {
    "model": {"preset": _TEXT, "options": _TABLE, "weights": _TEXT},
    "data": {
        "images": _TEXT,
        "uncertainty": _VALUE_OR_PATH,
        "uncertainty_type": _TEXT,
        "mask": _TEXT,
        "psf": _TEXT,
        "conditions": _TEXT,
        "shape": _PAIR,
    },
    "training": {
        "validation": _NUMBER,
        "epochs": _INTEGER,
        "batch_size": _INTEGER,
        "learning_rate": _NUMBER,
        "final_learning_rate": _NUMBER,
        "schedule": _TEXT,
        "warmup": _NUMBER,
        "weight_decay": _NUMBER,
        "clip": _NUMBER,
        "beta": _NUMBERS,
        "prior_warmup": _INTEGER,
        "patience": _INTEGER,
        "max_bad_steps": _INTEGER,
        "checkpoint_minutes": _NUMBER,
        "precision": _TEXT,
        "device": _TEXT,
        "seed": _SEED,
    },
    "augmentation": {"turns": _SWITCH, "flips": _SWITCH, "shift": _INTEGER},
    "output": {
        "weights": _TEXT,
        "checkpoint": _TEXT,
        "log": _TEXT,
        "plot": _TEXT,
        "training_data": _TEXT,
        "licence": _TEXT,
        "metadata": _TABLE,
    },
}
#: Keys that are names of files, beside the configuration unless they are absolute.
_PATHS = {
    "data": ("images", "uncertainty", "mask", "psf", "conditions"),
    "output": ("weights", "checkpoint", "log", "plot"),
}


@dataclass
class TrainingConfig:
    """What a TOML file asks for, checked; its paths are complete.

    Attributes
    ----------
    path : Path
        The file.
    model, data, training, augmentation, output : dict
        Its tables.
    """

    path: Path
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """Where the weights go."""
        return Path(self.output["weights"])

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run is kept while it goes on."""
        return Path(self.output.get("checkpoint", f"{self.weights}.checkpoint"))

    @property
    def log(self) -> Path:
        """Where the loss curves go."""
        return Path(self.output.get("log", self.weights.with_suffix(".csv")))


def read_config(path: str | os.PathLike) -> TrainingConfig:
    """Read and check the description of a training.

    Parameters
    ----------
    path : path-like
        A TOML file; :ref:`training` says what it may hold.

    Returns
    -------
    TrainingConfig

    Raises
    ------
    ValueError
        If it is no TOML, or a key is missing, unknown or of the wrong kind;
        the text names the key.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file ({error})") from None
    _check(path, tables)
    config = TrainingConfig(path, **tables)
    for table, names in _PATHS.items():
        values = getattr(config, table)
        for name in names:
            if isinstance(values.get(name), str):
                values[name] = str(path.parent / Path(values[name]).expanduser())
    pretrained = config.model.get("weights", "")
    if pretrained.endswith(".safetensors"):
        config.model["weights"] = str(path.parent / Path(pretrained).expanduser())
    return config


def _check(path: Path, tables: dict[str, Any]) -> None:
    def fail(key: str, text: str) -> None:
        raise ValueError(f"{path}: {key}: {text}")

    for table, values in tables.items():
        if table not in KEYS:
            fail(table, f"no such table{_nearest(table, KEYS)}")
        if not isinstance(values, dict):
            fail(table, f"must be a table, as [{table}]")
        for key, value in values.items():
            if key not in KEYS[table]:
                fail(f"{table}.{key}", f"no such key{_nearest(key, KEYS[table])}")
            check, what = KEYS[table][key]
            if not check(value):
                fail(f"{table}.{key}", f"must be {what}, not {value!r}")
    model, output = tables.get("model", {}), tables.get("output", {})
    if ("preset" in model) == ("weights" in model):
        fail("model.preset", "either this or model.weights (to go on from) must be given")
    if "options" in model and "preset" not in model:
        fail("model.options", "are those of a preset; model.weights bring their own")
    for table, key in (("data", "images"), ("output", "weights")):
        if key not in tables.get(table, {}):
            fail(f"{table}.{key}", "is missing")
    if not output["weights"].endswith(".safetensors"):
        fail("output.weights", f"must end in .safetensors, not {output['weights']!r}")
    if not output.get("log", ".csv").endswith((".csv", ".jsonl")):
        fail("output.log", f"must end in .csv or .jsonl, not {output['log']!r}")


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


# -- what is done ------------------------------------------------------------------------


def run_config(
    config: TrainingConfig,
    *,
    device: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainingResult:
    """Train as a file says, and write the weights.

    Parameters
    ----------
    config : TrainingConfig
        Of `read_config`.
    device : str, optional
        Instead of the file's.
    resume : bool, optional
        Go on from the checkpoint if there is one.
    progress : bool, optional
        Show a progress bar.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ValueError, TypeError, OSError, FloatingPointError
        As of `train` and `read_config`, with the name of the file.
    """
    _check_folders(config)
    settings = dict(config.training)
    if device is not None:
        settings["device"] = device
    if "seed" in settings:
        settings["rng"] = settings.pop("seed")
    try:
        if config.augmentation:
            settings["augment"] = Augmentation(
                **{"turns": False, "flips": False} | config.augmentation
            )
        if isinstance(settings.get("beta"), dict):
            settings["beta"] = CyclicalAnnealing(**settings["beta"])
        with StampDataset(**config.data) as data:
            vae = _make_network(config, data.shape, settings.get("rng"))
            result = train(
                vae,
                data,
                **settings,
                checkpoint=config.checkpoint,
                resume=resume,
                progress=progress,
                log=config.log,
            )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{config.path}: {error}") from None
    if int(os.environ.get("RANK", "0")) == 0:  # torchrun's other processes hold the same weights
        _write(config, vae, result)
    return result


def _check_folders(config: TrainingConfig) -> None:
    """What would fail after the training is looked at before."""
    for key in _PATHS["output"]:
        if key in config.output:
            folder = Path(config.output[key]).parent
            if not folder.is_dir():
                raise FileNotFoundError(f"{config.path}: output.{key}: {folder}: no such folder")
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{config.path}: output.{key}: {folder}: cannot be written")
    LossLog(config.log)


def _make_network(config: TrainingConfig, shape: tuple[int, int], seed: int | None) -> Any:
    from ..nets import ALIASES, PRESETS, GalaxyVAE

    if "weights" in config.model:
        name = config.model["weights"]
        is_file = name.endswith(".safetensors")
        return GalaxyVAE.read(name) if is_file else GalaxyVAE.from_pretrained(name)
    name = config.model["preset"]
    make = PRESETS.get(ALIASES.get(name, name))
    if make is None:
        raise ValueError(f"model.preset: no preset {name!r}{_nearest(name, PRESETS)}")
    options = dict(config.model.get("options", {}))
    known = list(inspect.signature(make).parameters)
    for key in options:
        if key not in known:
            raise ValueError(
                f"model.options.{key}: {name} has no such option{_nearest(key, known)}"
            )
    if "image_shape" in known:
        options.setdefault("image_shape", shape)
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:  # the first weights are random too
                torch.manual_seed(seed)
            return make(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.options: {error}") from None


def _write(config: TrainingConfig, vae: Any, result: TrainingResult) -> None:
    images = config.data["images"]
    metadata = {
        "training_data": config.output.get("training_data", Path(images).name),
        "training_data_hash": f"sha256:{_digest(images)}",
        "licence": config.output.get("licence", "not stated"),
        "training": {
            "settings": config.training,
            "augmentation": config.augmentation,
            "stamps": result.n_train,
            "stamps_to_validate": result.n_validation,
            "skipped": result.n_skipped,
            "best_epoch": result.best_epoch,
        },
    }
    vae.cpu().write(config.weights, metadata=metadata | config.output.get("metadata", {}))
    if "plot" in config.output:
        import matplotlib as mpl

        from ..plot import loss_curves

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        loss_curves(result, ax=ax)
        figure.savefig(config.output["plot"], dpi=150)
        plt.close(figure)
    config.checkpoint.unlink(missing_ok=True)


def _digest(images: str) -> str:
    """SHA-256 of the file, or of all files of the folder."""
    path = images
    if not os.path.exists(path):
        path = re.sub(r"\[[^\]]+\]$", "", path)
    names = [path]
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    digest = hashlib.sha256()
    for name in filter(os.path.isfile, names):
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
