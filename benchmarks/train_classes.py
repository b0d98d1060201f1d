"""Train the network that `galmorph.GalaxyClassifier` sees galaxies with, and its classes.

    python benchmarks/train_classes.py views --data FOLDER --out views.npz
    python benchmarks/train_classes.py train --views views.npz --out morphology.encoder
    python benchmarks/train_classes.py classes --data FOLDER --out default.classes

Without labels.  Each galaxy is seen several times: turned, mirrored, moved, enlarged, blurred, with
more noise, with a companion.  Views of one galaxy are to be told from those of all others (SimCLR:
Chen et al. 2020).  The principal axes of what the network tells are kept, and a second stage learns
how well one view tells what the original would have told.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import RESULTS, Report
from astropy.io import fits
from sklearn.decomposition import PCA
from torch import nn

from galmorph import GalaxyClassifier
from galmorph.classification import choose_n_components
from galmorph.latents import Latents, Morphology, measure_latents
from galmorph.nets.learned import noise_of
from galmorph.nets.morphology import ANGLES, RADII, MorphologyEncoder, look
from galmorph.sdss import unstretch
from galmorph.training.schedules import learning_rate_factor

SIZE = 64
SETS = ("gz2", "efigi", "vagc")
HELD_OUT = 0.1
# least noise, as a fraction of the grey level that counts as 1
_FLOOR = 0.3 / 255
_BATCH = 256
#: Names of the classes, by their share: seen afterwards, on sheets of galaxies.
NAMES = (
    "structured disc",
    "smooth disc",
    "smooth, concentrated",
    "disc with bulge",
    "elliptical or lenticular",
    "thin or faint",
)
ABOUT = {
    "training_data": "Galaxy Zoo 2 and EFIGI (SDSS, asinh stretch with Q = 9 undone)",
    "licence": "BSD-3-Clause",
}


def held_out(count: int) -> np.ndarray:
    """Which galaxies of a set are not trained on: the same in all benchmarks."""
    return (np.arange(count) * 2654435761 % 1000) < 1000 * HELD_OUT


def resampled(images: np.ndarray) -> torch.Tensor:
    """Square images on SIZE x SIZE pixels, after a blur that keeps noise from being folded in."""
    images = torch.as_tensor(images, dtype=torch.float32)
    count = images.shape[-1]
    step = count / SIZE
    offset = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (offset / (0.4 * np.sqrt(step**2 - 1))) ** 2)
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(images[:, None], (4, 4, 4, 4), mode="replicate")
    smooth = torch.nn.functional.conv2d(padded, kernel[None, None, None])
    smooth = torch.nn.functional.conv2d(smooth, kernel[None, None, :, None])
    line = 2 * (0.5 * step - 0.5 + step * torch.arange(SIZE)) / (count - 1) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y], -1).expand(len(images), -1, -1, -1)
    return torch.nn.functional.grid_sample(smooth, at, align_corners=True)[:, 0]


def read(folder: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Linear images (N, SIZE, SIZE), the sets that they are of, and their rows there."""
    images, names, rows = [], [], []
    for name in SETS:
        with fits.open(folder / f"{name}.fits") as hdus:
            grey = hdus["IMAGES"].data
            images += [
                resampled(unstretch(grey[i : i + 500])).float() for i in range(0, len(grey), 500)
            ]
        names += [name] * len(grey)
        rows += list(range(len(grey)))
    return torch.cat(images), np.array(names), np.array(rows)


# -- views -------------------------------------------------------------------------------


def blurred(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    ny, nx = images.shape[1:]
    ky, kx = (2 * np.pi * f for f in (torch.fft.fftfreq(ny)[:, None], torch.fft.rfftfreq(nx)))
    transfer = torch.exp(-0.5 * (kx**2 + ky**2) * sigma[:, None, None] ** 2)
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=(ny, nx))


def moved(images: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Images at matrix @ (p - shift), p from the middle; beyond the border, its values."""
    line = torch.arange(SIZE) - 0.5 * (SIZE - 1)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x, y], -1) - shift[:, None, None]
    at = torch.einsum("bij,byxj->byxi", matrix, points) / (0.5 * (SIZE - 1))
    return torch.nn.functional.grid_sample(
        images[:, None], at.float(), align_corners=True, padding_mode="border"
    )[:, 0]


def view_of(images: torch.Tensor, noise: torch.Tensor, others: torch.Tensor, rng) -> torch.Tensor:
    """Each image with a companion (35 %), blurred (60 %), turned, moved, and noisier (60 %)."""
    count = len(images)

    def draw(low: float, high: float, share: float = 1.0) -> torch.Tensor:
        values = rng.uniform(low, high, count)
        return torch.as_tensor(np.where(rng.random(count) < share, values, 0.0)).float()

    angle, distance = draw(0, 2 * np.pi), draw(14, 30)
    place = distance[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    size = draw(1.0, 2.8)[:, None, None] * torch.eye(2)
    above = (others - others.flatten(1).median(1).values[:, None, None]).clamp_min(0)
    bright = 10 ** draw(-1.2, 0) * (draw(0, 1) < 0.35)
    seen = images + bright[:, None, None] * moved(above, size, place)
    seen = blurred(seen, draw(0, 2.0, 0.6))
    angle, zoom = draw(0, 2 * np.pi), draw(0.9, 1.2)
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    matrix = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)
    shift = torch.as_tensor(rng.normal(0, 1, (count, 2))).float()
    seen = moved(seen, matrix, shift)
    more = 10 ** draw(0, 0.9) * (draw(0, 1) < 0.6) * noise
    return seen + more[:, None, None] * torch.as_tensor(rng.standard_normal(seen.shape)).float()


def polar(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    noise = torch.as_tensor(noise_of(images.numpy())).float().clamp_min(_FLOOR)
    view = look(images, (1 / noise)[:, None, None].expand(images.shape))
    return view.image.numpy().astype(np.float16), view.scalars.numpy()


def make_views(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    images, names, rows = read(args.data)
    noise = torch.as_tensor(noise_of(images.numpy())).float().clamp_min(_FLOOR)
    count, started = len(images), time.time()
    polars = np.zeros((args.views, count, len(RADII), ANGLES), np.float16)
    scalars = np.zeros((args.views, count, 4), np.float32)
    for k in range(args.views):
        for i in range(0, count, _BATCH):
            rows_here = slice(i, min(i + _BATCH, count))
            seen = images[rows_here]
            if k:
                others = images[torch.as_tensor(rng.integers(0, count, len(seen)))]
                seen = view_of(seen, noise[rows_here], others, rng)
            polars[k, rows_here], scalars[k, rows_here] = polar(seen)
        print(f"view {k}: {time.time() - started:.0f} s", flush=True)
    np.savez(args.out, polar=polars, scalars=scalars, names=names, rows=rows)


# -- training ----------------------------------------------------------------------------


def trained_without_labels(polars, scalars, rows, args) -> MorphologyEncoder:
    """Two views of one galaxy are told from those of all others (SimCLR)."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    net = MorphologyEncoder(latent_dim=args.embedding)
    head = nn.Sequential(
        nn.BatchNorm1d(args.embedding),
        nn.Linear(args.embedding, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 128),
    )
    weights = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=1e-4)
    steps = len(rows) // args.batch
    factor = partial(
        learning_rate_factor, n_steps=args.epochs * steps, schedule="cosine", warmup=200
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    same = torch.arange(2 * args.batch).roll(args.batch)
    started = time.time()
    for epoch in range(args.epochs):
        total, order = 0.0, rng.permutation(rows)
        for i in range(steps):
            here = torch.as_tensor(order[i * args.batch : (i + 1) * args.batch])
            told = []
            for _ in range(2):
                which = torch.as_tensor(rng.integers(0, len(polars), args.batch))
                image = polars[which, here].float()
                if rng.random() < 0.5:
                    image = image.flip(2)
                # one mirror image at a time is enough to learn from, and half the work
                told.append(head(net.mean(net.features(image, scalars[which, here], mirror=False))))
            z = nn.functional.normalize(torch.cat(told))
            alike = z @ z.T / args.temperature
            alike = alike.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
            loss = nn.functional.cross_entropy(alike, same)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: {total / steps:.4f}, {time.time() - started:.0f} s", flush=True)
        torch.save(net.state_dict(), args.out.with_suffix(".unfinished"))
    return net.eval()


@torch.no_grad()
def seen_by(net: MorphologyEncoder, polars, scalars) -> torch.Tensor:
    """Features (V, N, H) of all views."""
    parts = []
    for view, told in zip(polars, scalars, strict=True):
        blocks = [
            net.features(view[i : i + 512].float(), told[i : i + 512])
            for i in range(0, len(view), 512)
        ]
        parts.append(torch.cat(blocks))
    return torch.stack(parts)


def with_posterior(net, features, rows, args) -> tuple[MorphologyEncoder, dict]:
    """Principal axes of the originals, and what any view tells of them."""
    rng = np.random.default_rng(args.seed)
    with torch.no_grad():
        embedded = net.mean(features[0])
    pca = PCA(args.latents).fit(embedded[rows].numpy())
    target = torch.as_tensor(pca.transform(embedded.numpy()) / np.sqrt(pca.explained_variance_[0]))
    target = target.float()
    final = MorphologyEncoder(latent_dim=args.latents)
    trunk = {
        k: v for k, v in net.state_dict().items() if k.split(".")[0] not in ("mean", "log_std")
    }
    final.load_state_dict(trunk, strict=False)
    heads = [*final.mean.parameters(), *final.log_std.parameters()]
    optimizer = torch.optim.Adam(heads, lr=2e-3)
    steps = 4000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        here = torch.as_tensor(rng.choice(rows, 512))
        which = torch.as_tensor(rng.integers(0, len(features), 512))
        mean, std = final.told(features[which, here])
        rest = (target[here] - mean) / std
        loss = (0.5 * rest.square() + torch.log(std)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    about = {"variance": (pca.explained_variance_ratio_).round(4).tolist()}
    with torch.no_grad():  # of galaxies that were not trained on, seen otherwise than the original
        left = np.setdiff1d(np.arange(features.shape[1]), rows)
        mean, std = final.told(features[1:, left])
        rest = ((target[left] - mean) / std).abs()
        about["coverage_68"] = float((rest < 1).float().mean())
        about["coverage_95"] = float((rest < 1.96).float().mean())
        about["error"] = (
            (target[left] - mean).square().mean((0, 1)).sqrt().numpy().round(3).tolist()
        )
    return final.eval(), about


def train(args: argparse.Namespace) -> None:
    stored = np.load(args.views)
    polars, scalars = (torch.as_tensor(stored[name]) for name in ("polar", "scalars"))
    rows = np.flatnonzero(~held_out(polars.shape[1]))
    if args.start:
        net = MorphologyEncoder(latent_dim=args.embedding)
        net.load_state_dict(torch.load(args.start))
        net.eval()
    else:
        net = trained_without_labels(polars, scalars, rows, args)
    final, about = with_posterior(net, seen_by(net, polars, scalars), rows, args)
    print(json.dumps(about))
    about |= {"trained": len(rows), "epochs": args.epochs, "seed": args.seed}
    Morphology(final).write(args.out, metadata=about)


# -- classes -------------------------------------------------------------------------------


def make_classes(args: argparse.Namespace) -> None:
    """The mixture that ships, of galaxies that were not held out, at their files' resolution."""
    from classes import noise, read  # it needs what is above

    say = Report("The number of classes")
    galaxies = read(args.data)
    seen = [
        measure_latents(images, uncertainty=noise(images))
        for images in (g.linear()[~g.unseen] for g in galaxies)
    ]
    latents = Latents(np.concatenate([s.mean for s in seen]), np.concatenate([s.cov for s in seen]))
    say(f"{len(latents)} galaxies; BIC, and adjusted Rand index between fits to resampled galaxies")
    table = choose_n_components(latents, range(4, 11), n_resamplings=4, rng=1)
    for k, bic, stability, scatter in table.iterrows():
        say(f"  {k:3d} classes   {bic:9.0f}   {stability:.2f} +- {scatter:.2f}")
    classifier = GalaxyClassifier(args.components, n_init=10, rng=1).fit(latents)
    if len(NAMES) == args.components:
        classifier.class_names = list(NAMES)
    classifier.write(args.out, metadata=ABOUT | {"galaxies": len(latents)})
    say.write(RESULTS / "classes_number.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=["views", "train", "classes"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--views", default="9", help="their number, or their file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.15)
    parser.add_argument("--embedding", type=int, default=32)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--components", type=int, default=6)
    parser.add_argument("--start", type=Path, help="state of a run, to go on after its last epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "views":
        args.views = int(args.views)
        make_views(args)
    elif args.stage == "train":
        train(args)
    else:
        make_classes(args)


if __name__ == "__main__":
    main()
