"""A training run in a file, so that one that was stopped goes on as if it had not been."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint", "write_checkpoint"]

_FORMAT = "galmorph training 1"


def write_checkpoint(path: str | os.PathLike, state: dict[str, Any], job: dict[str, Any]) -> None:
    """Write the state of a run; the old file stays good until the new one is.

    Parameters
    ----------
    path : path-like
        The file.
    state : dict
        Tensors, numbers, strings, and lists and dicts of them.
    job : dict
        What makes two runs the same, for JSON.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": _FORMAT, "job": json.dumps(job), "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: str | os.PathLike, job: dict[str, Any]) -> dict[str, Any]:
    """Read the state of a run; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
        The file.
    job : dict
        As given to `write_checkpoint`.

    Returns
    -------
    dict
        The state, with its tensors on the CPU.

    Raises
    ------
    ValueError
        If the file is damaged, is no checkpoint of a training, or belongs to
        another run; the text says what differs.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        held = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise ValueError("it has another format")
        theirs = json.loads(held["job"])
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of a training ({text}); delete it to "
            "start again"
        ) from None
    job = json.loads(json.dumps(job))
    differing = sorted(key for key in {*job, *theirs} if job.get(key) != theirs.get(key))
    if differing:
        what = ", ".join(f"{k} was {_short(theirs.get(k))}" for k in differing)
        raise ValueError(
            f"{path} belongs to another run ({what}); start again with resume=False, or choose "
            "another file"
        )
    return held["state"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
