"""Fits that are finished, kept in a file, so that a job that was stopped can go on."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Checkpoint", "network_digest"]

_MAGIC = b"galmorph checkpoint 1\n"
_HEAD = struct.Struct("<QI")  # length and CRC-32 of the record that follows


class Checkpoint:
    """A file that grows by one record per finished batch.

    A record that was cut short (by a crash or a full disk) is dropped when the
    file is opened again; all before it are good.

    Parameters
    ----------
    path : str or path-like
        The file; made if it does not exist.
    job : dict
        What makes two jobs the same (strings, numbers, lists).

    Raises
    ------
    ValueError
        If the file belongs to another job, or is no checkpoint.
    OSError
        If it cannot be read or written.
    """

    def __init__(self, path, job: dict) -> None:
        self.path = Path(path)
        self.records: list[dict[str, np.ndarray]] = []
        job = json.loads(json.dumps(job))
        if self.path.exists() and self.path.stat().st_size > 0:
            self._load(job)
        else:
            temporary = self.path.with_name(self.path.name + ".new")
            temporary.write_bytes(_MAGIC + _pack(json.dumps(job).encode()))
            os.replace(temporary, self.path)

    def _load(self, job: dict) -> None:
        with open(self.path, "r+b") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{self.path} is not a galmorph checkpoint")
            head = _unpack(file)
            if head is None:
                raise ValueError(f"{self.path} is damaged; delete it to start again")
            theirs = json.loads(head)
            differing = sorted(k for k in {*job, *theirs} if job.get(k) != theirs.get(k))
            if differing:
                raise ValueError(
                    f"{self.path} belongs to another job (different: {', '.join(differing)}); "
                    "delete it or choose another file"
                )
            good = file.tell()
            while (record := _unpack(file)) is not None:
                with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
                    self.records.append(dict(arrays))
                good = file.tell()
            file.truncate(good)

    def save(self, **arrays: np.ndarray) -> None:
        """Append one record; it is on disk when this returns."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with open(self.path, "ab") as file:
            file.write(_pack(buffer.getvalue()))
            file.flush()
            os.fsync(file.fileno())


def network_digest(model: Any) -> int | None:
    """A number for the network of a learned model; None for others."""
    from galmorph.models.learned import LearnedGalaxy2D

    return _digest_of(model.shape) if isinstance(model, LearnedGalaxy2D) else None


@lru_cache(maxsize=16)
def _digest_of(shape: Any) -> int:
    code = 0
    for name, values in sorted(shape.vae.state_dict().items()):
        code = zlib.crc32(
            np.ascontiguousarray(values.cpu().numpy()), zlib.crc32(name.encode(), code)
        )
    return code


def _pack(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _unpack(file) -> bytes | None:
    """The next record, or None at the end or if it is incomplete."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    length, crc = _HEAD.unpack(head)
    if length > os.fstat(file.fileno()).st_size:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and zlib.crc32(payload) == crc else None
