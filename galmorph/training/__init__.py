"""Training of galaxy networks on stamps: data from disk, the loop, checkpoints, several GPUs.

`train` does it all; `StampDataset` reads stamps of any kind, `Augmentation`
turns and mirrors them, `read_log` reads the loss curves back.
"""

from .augmentation import Augmentation
from .datasets import StampDataset, TrainingBatch, stream
from .history import TrainingResult, read_log
from .loop import train
from .schedules import CyclicalAnnealing

__all__ = [
    "Augmentation",
    "CyclicalAnnealing",
    "StampDataset",
    "TrainingBatch",
    "TrainingResult",
    "read_log",
    "stream",
    "train",
]
