"""Several processes that train one network, each on its part of every batch (torchrun)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Group", "process_group"]


@dataclass(frozen=True)
class Group:
    """The processes of a run; a single one needs no communication.

    Attributes
    ----------
    device : torch.device
        Where this process computes.
    rank, size : int
        Number of this process, and how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def part(self, indices: Sequence[int]) -> slice:
        """The part of a batch that is this process's."""
        n = len(indices)
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in double precision."""
        if self.size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, module: torch.nn.Module) -> None:
        """Give every process the parameters and buffers of the main one."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.size == 1:
            return module
        return torch.nn.parallel.DistributedDataParallel(module)


@contextlib.contextmanager
def process_group(device: torch.device | str) -> Iterator[Group]:
    """Join the processes that ``torchrun`` started; alone, do nothing.

    Parameters
    ----------
    device : torch.device or str
        "cuda" means, under torchrun, one GPU for each process.

    Yields
    ------
    Group
        The processes.

    Raises
    ------
    ValueError
        If the device does not exist.

    Examples
    --------
    >>> from galmorph.training.ddp import process_group
    >>> with process_group("cpu") as group:
    ...     print(group.size, group.is_main)
    1 True
    """
    device = _device(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not dist.is_available() or (alone and not dist.is_initialized()):
        yield Group(device)
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(device, dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()


def _device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is none that torch knows") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no GPU here (or was built without CUDA)")
    return device
