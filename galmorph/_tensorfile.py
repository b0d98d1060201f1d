"""Arrays on disk: safetensors with a header of text.  Nothing in a file is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_arrays", "write_arrays"]


def write_arrays(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], *, kind: str, header: dict[str, Any]
) -> None:
    """Write arrays to a file, which is replaced at once.

    Parameters
    ----------
    path : path-like
    arrays : dict of str to array
    kind : str
        What the file holds, so that another one is not taken for it.
    header : dict
        Text, numbers, lists and dicts of them.
    """
    from safetensors.numpy import save_file

    text = {"kind": kind, "header": json.dumps(header)}
    temporary = Path(f"{os.fspath(path)}.new")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(
    path: str | os.PathLike, *, kind: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a file that `write_arrays` has written.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            text = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}") from None
    if text.get("kind") != kind:
        raise ValueError(f"{os.fspath(path)} holds no {kind}")
    return arrays, json.loads(text["header"])
