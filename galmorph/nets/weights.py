"""Weights on disk: safetensors with a header that says what they are.

Nothing in a file is executed: the header is text, and the architecture is built by a preset
of this package, by name.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .presets import ALIASES, from_config
from .vae import GalaxyVAE

__all__ = ["InstalledWeights", "WeightsError", "available", "from_pretrained", "load", "save"]

FORMAT = "galmorph weights"
FORMAT_VERSION = 1
GROUP = "galmorph.weights"

#: What `save` has to be told, and what else it knows by name.
REQUIRED = ("training_data", "training_data_hash", "licence")
_OWN = ("format", "format_version", "galmorph_version", "config", "sha256")

_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


class WeightsError(ValueError):
    """Weights that cannot be found, read or trusted; the text says why."""


@dataclass(frozen=True)
class InstalledWeights:
    """Weights that are installed.

    Attributes
    ----------
    name : str
        By which `GalaxyVAE.from_pretrained` finds them.
    provider : str
        The distribution (pip package) that they came with.
    path : Path or None
        Their file; None if the provider could not say.
    metadata : dict
        Their header; empty if it cannot be read.
    problem : str
        Why they cannot be used; empty if they can.
    """

    name: str
    provider: str
    path: Path | None
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


# -- one file ------------------------------------------------------------------------------


def save(
    vae: GalaxyVAE,
    path: str | os.PathLike,
    *,
    metadata: dict[str, Any],
    half: Sequence[str] = (),
) -> None:
    """Write a network to a file.

    Parameters
    ----------
    vae : GalaxyVAE
        A network that was built from a preset.
    path : str or path-like
        The file; replaced, at once, if it exists.
    metadata : dict
        Text, numbers, lists and dicts of them.  ``training_data`` (what it was trained on),
        ``training_data_hash`` and ``licence`` are needed; ``canonical_scale`` (pixels of the
        canonical grid per half-light radius, None where there is none) and ``date`` (today)
        are filled in if they are not given.  Anything else is kept.
    half : sequence of str, optional
        Parts of the network (``"encoder"``, ``"decoder"``) that are kept in 16 bits: half the
        size, three digits.  They are read into 32 bits again.

    Raises
    ------
    ValueError
        If something is missing, cannot be written as JSON, or a weight is not finite.

    Examples
    --------
    >>> import os, tempfile
    >>> from galmorph.nets import load, regier2015, save
    >>> vae = regier2015(image_shape=(9, 9))
    >>> about = dict(training_data="none", training_data_hash="none", licence="BSD-3-Clause")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "mine.safetensors")
    ...     save(vae, path, metadata=about)
    ...     load(path).metadata["licence"]
    'BSD-3-Clause'
    """
    import galmorph

    missing = [name for name in REQUIRED if not metadata.get(name)]
    if missing:
        raise ValueError(f"the metadata of weights must have {', '.join(missing)}")
    taken = sorted(set(_OWN) & set(metadata))
    if taken:
        raise ValueError(f"metadata must not have {', '.join(taken)}: galmorph fills them in")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in vae.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name.split(".")[0] in half:
            tensors[name] = tensor.half()
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"weights that are not finite are not saved: {name}")
    today = dt.datetime.now(dt.UTC).date().isoformat()
    header = {"canonical_scale": None, "date": today, **metadata}
    try:
        text = {name: json.dumps(value, allow_nan=False) for name, value in header.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be text, numbers, lists and dicts: {error}") from None
    text |= {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "galmorph_version": galmorph.__version__,
        "config": json.dumps(vae.config),
        "sha256": _digest(tensors),
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".new")
    try:
        save_file(tensors, temporary, metadata=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> GalaxyVAE:
    """Read a network from a file.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    GalaxyVAE
        In evaluation mode, on the CPU; its ``metadata`` is the header of the file.

    Raises
    ------
    WeightsError
        If the file is damaged, cut short, not written by `save`, or in a format that this
        version of galmorph does not know.
    OSError
        If there is no such file, or it cannot be read.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from None
    if _digest(tensors) != header["sha256"]:
        raise WeightsError(f"{path} is damaged: the weights do not match their checksum")
    try:
        # A network is made with random weights; the caller's random numbers are left alone.
        with torch.random.fork_rng(devices=[]):
            vae = from_config(header["config"])
        vae.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(
            f"{path} does not fit the architecture that it names "
            f"(written by galmorph {header['galmorph_version']}): {error}"
        ) from None
    vae.metadata = header
    return vae.eval()


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """What a file says of itself.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    dict
        ``format_version``, ``galmorph_version``, ``config``, ``training_data``,
        ``training_data_hash``, ``canonical_scale``, ``licence``, ``date``, and what else
        it was saved with.

    Raises
    ------
    WeightsError, OSError
        As of `load`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a safetensors file, or it is damaged or cut short: {error}"
        ) from None
    if text.get("format") != FORMAT:
        raise WeightsError(f"{path} is a safetensors file, but it was not written by galmorph")
    version = text.get("format_version")
    if version != str(FORMAT_VERSION):
        raise WeightsError(
            f"{path} is in version {version} of the format (galmorph "
            f"{text.get('galmorph_version', '?')}); this galmorph reads version {FORMAT_VERSION}"
        )
    plain = ("format", "format_version", "galmorph_version", "sha256")
    try:
        header = {
            name: value if name in plain else json.loads(value) for name, value in text.items()
        }
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: its header cannot be read ({error})") from None
    header["format_version"] = FORMAT_VERSION
    missing = [name for name in (*REQUIRED, *_OWN) if name not in header]
    if missing:
        raise WeightsError(f"{path} is damaged: its header lacks {', '.join(missing)}")
    return header


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


# -- what is installed ---------------------------------------------------------------------


def available() -> list[InstalledWeights]:
    """The weights that are installed: galmorph's own, then those of other packages.

    Another package provides weights by an entry point in the group ``galmorph.weights``: its
    name is that of the weights, and it loads to a path, or to a function that returns one.

    Returns
    -------
    list of InstalledWeights
        By name within each provider.  What cannot be used is listed with its ``problem``.

    Examples
    --------
    >>> from galmorph.nets import available
    >>> [w.provider for w in available() if w.name == "regier2015"]
    ['galmorph']
    """
    found = [_described(path.stem, "galmorph", path) for path in sorted(_own_files())]
    points = sorted(entry_points(group=GROUP), key=lambda p: (_provider(p), p.name))
    for point in points:
        if any(point.name == w.name and _provider(point) == w.provider for w in found):
            continue  # the same distribution on the path twice
        weights = _provided(point)
        if any(point.name == w.name for w in found) or point.name in ALIASES:
            weights = InstalledWeights(
                weights.name, weights.provider, weights.path, weights.metadata,
                f"the name {point.name} is taken",
            )  # fmt: skip
        found.append(weights)
    return found


def from_pretrained(name: str = "default") -> GalaxyVAE:
    """Load installed weights by their name.

    Parameters
    ----------
    name : str
        One of `available`, or ``"default"``.

    Returns
    -------
    GalaxyVAE

    Raises
    ------
    WeightsError
        If there are none of this name, or they cannot be used.
    """
    wanted = ALIASES.get(name, name)
    own = _PRETRAINED / f"{wanted}.safetensors"
    if own in _own_files():  # other packages need not be asked
        return load(own)
    installed = available()
    for weights in installed:
        if weights.name == wanted and not weights.problem:
            return load(weights.path)
    for weights in installed:
        if weights.name == wanted:
            raise WeightsError(f"the weights {name!r} cannot be used: {weights.problem}")
    names = ", ".join(sorted({w.name for w in installed if not w.problem})) or "none"
    raise WeightsError(f"there are no weights {name!r}; installed: {names}")


def _own_files() -> list[Path]:
    return list(_PRETRAINED.glob("*.safetensors"))


def _provider(point) -> str:
    return "unknown" if point.dist is None else str(point.dist.name)


def _provided(point) -> InstalledWeights:
    """Ask another package; whatever goes wrong there is its problem, and not ours."""
    try:
        target = point.load()
        path = Path(target() if callable(target) else target)
    except Exception as error:
        problem = f"its package fails: {type(error).__name__}: {error}"
        warnings.warn(f"weights {point.name!r} of {_provider(point)}: {problem}", stacklevel=3)
        return InstalledWeights(point.name, _provider(point), None, problem=problem)
    return _described(point.name, _provider(point), path)


def _described(name: str, provider: str, path: Path) -> InstalledWeights:
    try:
        return InstalledWeights(name, provider, path, read_header(path))
    except (WeightsError, OSError) as error:
        return InstalledWeights(name, provider, path, problem=str(error))
