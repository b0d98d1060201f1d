"""The images of Galaxy Zoo 2 as the published test takes them, and which are held out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

FILE = "gz2.fits"
SIDE = 103.5  # pixels of the file that are used, about the centre
SHAPE = (69, 69)
HELD_OUT = 1000
SEED = 2015


def read(folder: str | Path) -> tuple[np.ndarray, str]:
    """The images of the file, (N, 106, 106), and the SHA-256 of their pixels."""
    from astropy.io import fits

    images = np.ascontiguousarray(fits.getdata(Path(folder) / FILE, "IMAGES"))
    return images, hashlib.sha256(images.tobytes()).hexdigest()


def split(n: int, held_out: int = HELD_OUT, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Rows that may be trained on, and rows that never are."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def resample(images, *, angle=None, mirrored=None, chunk: int = 256) -> np.ndarray:
    """The central part of each image, averaged over 69 x 69 pixels.

    Parameters
    ----------
    images : ndarray, (N, ny, nx)
    angle : ndarray, (N,), optional
        By which each is turned, radians.
    mirrored : ndarray of bool, (N,), optional
        Whether it is mirrored.
    chunk : int
        Images at a time.

    Returns
    -------
    ndarray of float32, (N, 69, 69)
        Each pixel is the mean of 2 x 2 bilinear samples.  What a turned corner lacks is
        filled by reflection at the edge of the image.
    """
    import torch

    n = len(images)
    angle = np.zeros(n) if angle is None else angle
    sign = np.where(np.zeros(n, bool) if mirrored is None else mirrored, -1.0, 1.0)
    fine = ((torch.arange(2 * SHAPE[0]) + 0.5) / (2 * SHAPE[0]) - 0.5) * SIDE
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    out = np.empty((n, *SHAPE), np.float32)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        a, s = (torch.as_tensor(v[rows], dtype=torch.float32)[:, None, None] for v in (angle, sign))
        grid = torch.stack([s * (a.cos() * x - a.sin() * y), a.sin() * x + a.cos() * y], -1)
        size = torch.tensor([images.shape[2], images.shape[1]], dtype=torch.float32)
        stamps = torch.as_tensor(images[rows]).float()[:, None]
        samples = torch.nn.functional.grid_sample(
            stamps, grid * 2 / size, padding_mode="reflection", align_corners=False
        )
        out[rows] = torch.nn.functional.avg_pool2d(samples, 2)[:, 0].numpy()
    return out
