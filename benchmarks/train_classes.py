"""Train the network that `galmorph.GalaxyClassifier` sees galaxies with, and its classes.

    python benchmarks/train_classes.py views --data FOLDER --out views.npz
    python benchmarks/train_classes.py train --views views.npz --out morphology.encoder
    python benchmarks/train_classes.py classes --data FOLDER --out default.classes
    python benchmarks/train_classes.py bound --data FOLDER --views views.npz --out bound.txt

Each galaxy is seen several times: turned, mirrored, moved, enlarged, blurred, with more noise, with
a companion.  Views of one galaxy are to be told from those of all others (SimCLR: Chen et al.
2020); no label is used.  The axes of the last layer are kept on which galaxies differ most and
views of one galaxy least, and a second stage learns how well one view tells what the original
would have.  The last stage asks what a network of this kind finds that is trained with labels.
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
from scipy.linalg import eigh
from sklearn.metrics import roc_auc_score
from torch import nn

from galmorph import GalaxyClassifier
from galmorph.agreement import linear_probe
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
    "flat disc",
    "smooth or thin disc",
    "smooth and round",
    "disc with bulge",
    "dominated by a bulge",
    "lopsided or with a neighbour",
)
ABOUT = {
    "training_data": "Galaxy Zoo 2 and EFIGI (SDSS, asinh stretch with Q = 9 undone)",
    "licence": "BSD-3-Clause",
}


def held_out(count: int, share: float = HELD_OUT) -> np.ndarray:
    """Which galaxies of a set are not trained on: the same in all benchmarks."""
    return (np.arange(count) * 2654435761 % 1000) < 1000 * share


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


def moved(
    images: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor, *, beyond: str = "border"
) -> torch.Tensor:
    """Images at matrix @ (p - shift), p from the middle; beyond the border, its values or zeros."""
    line = torch.arange(SIZE) - 0.5 * (SIZE - 1)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x, y], -1) - shift[:, None, None]
    at = torch.einsum("bij,byxj->byxi", matrix, points) / (0.5 * (SIZE - 1))
    return torch.nn.functional.grid_sample(
        images[:, None], at.float(), align_corners=True, padding_mode=beyond
    )[:, 0]


def above_sky(images: torch.Tensor) -> torch.Tensor:
    return (images - images.flatten(1).median(1).values[:, None, None]).clamp_min(0)


def view_of(images: torch.Tensor, noise: torch.Tensor, others: torch.Tensor, rng) -> torch.Tensor:
    """Each image with a companion (50 %), blurred (60 %), turned, moved, and noisier (60 %)."""
    count = len(images)

    def draw(low: float, high: float, share: float = 1.0) -> torch.Tensor:
        values = rng.uniform(low, high, count)
        return torch.as_tensor(np.where(rng.random(count) < share, values, 0.0)).float()

    angle, distance = draw(0, 2 * np.pi), draw(14, 30)
    place = distance[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    size = draw(1.0, 2.8)[:, None, None] * torch.eye(2)
    companion = moved(above_sky(others), size, place, beyond="zeros")
    light, others_light = (above_sky(i).sum((1, 2)) for i in (images, others))
    share = draw(0.05, 0.6, 0.5) * size[:, 0, 0] ** 2 * light / others_light.clamp_min(1e-6)
    seen = images + share[:, None, None] * companion
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
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                    features = net.features(image, scalars[which, here], mirror=False)
                told.append(head(net.mean(features.float())))
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


def steady_axes(features: torch.Tensor, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Axes (H, count) on which galaxies differ most and views of one galaxy least; by how much.

    These are Fisher's linear discriminants of all galaxies, in order, scaled so that the scatter
    of galaxies is 1; with them comes its ratio to the scatter of the views of one galaxy.
    """
    original = features[0].double()
    within = (features[1:].double() - original).flatten(0, 1)
    within = within.T @ within / len(within)
    # so that no axis is made of differences that are too small to matter
    within += 0.5 * within.diagonal().mean() * torch.eye(len(within))
    ratio, axes = eigh(torch.cov(original.T).numpy(), within.numpy())
    axes, ratio = axes[:, ::-1][:, :count], ratio[::-1][:count]
    return torch.as_tensor(axes / np.sqrt(ratio)).float(), np.sqrt(ratio)


def with_posterior(net, features, rows, args) -> tuple[MorphologyEncoder, dict]:
    """The steady axes of the originals, and what any view tells of them."""
    rng = np.random.default_rng(args.seed)
    axes, ratio = steady_axes(features[:, rows], args.latents)
    target = (features[0] - features[0, rows].mean(0)) @ axes
    final = MorphologyEncoder(hidden=features.shape[2], latent_dim=args.latents)
    trunk = {
        k: v for k, v in net.state_dict().items() if k.split(".")[0] not in ("mean", "log_std")
    }
    final.load_state_dict(trunk, strict=False)
    with torch.no_grad():
        final.mean.weight.copy_(axes.T)
        final.mean.bias.copy_(-features[0, rows].mean(0) @ axes)
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
    about = {"scatter_over_that_of_views": ratio.round(2).tolist()}
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
    for n_latents in (4, 8, 12):
        table = choose_n_components(
            latents, range(3, 11), n_resamplings=6, n_latents=n_latents, rng=1
        )
        say(f"\n  of {n_latents} leading latents")
        for k, bic, stability, scatter in table.iterrows():
            say(f"  {k:3d} classes   {bic:9.0f}   {stability:.2f} +- {scatter:.2f}")
    classifier = GalaxyClassifier(
        args.components, n_init=10, n_latents=args.class_latents, rng=1
    ).fit(latents)
    if len(NAMES) == args.components:
        classifier.class_names = list(NAMES)
    classifier.write(args.out, metadata=ABOUT | {"galaxies": len(latents)})
    say.write(RESULTS / "classes_number.txt")


# -- with labels ---------------------------------------------------------------------------


def bound(args: argparse.Namespace) -> None:
    """What is in the numbers of the network, and what one that is trained with labels finds."""
    from classes import read

    stored = np.load(args.views)
    polars, scalars = (torch.as_tensor(stored[name]) for name in ("polar", "scalars"))
    spiral, stage = np.full((2, polars.shape[1]), np.nan)
    for galaxies in read(args.data):
        rows = stored["names"] == galaxies.name
        spiral[rows], stage[rows] = galaxies.spiral, galaxies.stage
    network = Morphology.from_pretrained().network
    features = seen_by(network, polars[:1], scalars[:1])[0]
    with torch.no_grad():
        mean = network.told(features)[0].double().numpy()
    say = Report("What the polar images tell of spiral arms and Hubble types")
    say("Without labels: linear probes of all galaxies (5-fold cross-validation)")
    numbers = {f"{k} leading latents": mean[:, :k] for k in (8, 16, 32) if k < mean.shape[1]}
    numbers |= {f"{mean.shape[1]} latents": mean}
    numbers |= {f"last hidden layer, {features.shape[1]}": features.double().numpy()}
    for name, values in numbers.items():
        arms, hubble = linear_probe(values, spiral), linear_probe(values, stage, tolerance=1.5)
        say(
            f"  {name:24s} spiral AUC {arms.score:.3f} +- {arms.score_err:.3f};  "
            f"T within 1.5: {100 * hubble.score:.0f} %, rms {hubble.rms:.2f}"
        )
    left = held_out(len(stage), share=0.2)
    say("\nThe same kind of network trained with labels and the same views, a fifth left out")
    known = np.isfinite(spiral)
    net = trained_with_labels(polars, scalars, spiral, np.flatnonzero(known & ~left), args)
    told = answer(net, polars[0], scalars[0])[known & left]
    say(f"  spiral AUC {roc_auc_score(spiral[known & left], told):.3f}, {len(told)} galaxies")
    known = np.isfinite(stage)
    centre, width = stage[known & ~left].mean(), stage[known & ~left].std()
    standard = (stage - centre) / width
    net = trained_with_labels(polars, scalars, standard, np.flatnonzero(known & ~left), args)
    error = width * (answer(net, polars[0], scalars[0]) - standard)[known & left]
    say(
        f"  T within 1.5: {100 * np.mean(np.abs(error) <= 1.5):.0f} %, "
        f"rms {np.sqrt(np.mean(error**2)):.2f}, {len(error)} galaxies"
    )
    say.write(args.out)


def trained_with_labels(polars, scalars, labels, rows, args) -> MorphologyEncoder:
    """One number, of any view: the logarithm of the odds of labels 0 and 1, or the label itself."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    net = MorphologyEncoder(latent_dim=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.5e-3, weight_decay=1e-2)
    epochs, batch = 25, 128
    steps = epochs * (len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps)
    two = set(labels[rows]) == {0.0, 1.0}
    lost = nn.functional.binary_cross_entropy_with_logits if two else nn.functional.mse_loss
    wanted = torch.as_tensor(labels).float()
    for _ in range(epochs):
        order = rng.permutation(rows)
        for i in range(0, len(rows) - batch + 1, batch):
            here = torch.as_tensor(order[i : i + batch])
            which = torch.as_tensor(rng.integers(0, len(polars), batch))
            told = net.features(polars[which, here].float(), scalars[which, here], mirror=False)
            loss = lost(net.mean(told)[:, 0], wanted[here])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def answer(net: MorphologyEncoder, polar, scalars) -> np.ndarray:
    return net.mean(seen_by(net, polar[None], scalars[None])[0])[:, 0].double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=["views", "train", "classes", "bound"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--views", default="9", help="their number, or their file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.15)
    parser.add_argument("--embedding", type=int, default=32)
    parser.add_argument("--bfloat16", action="store_true", help="twice as fast where there are")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--class-latents", type=int, default=8)
    parser.add_argument("--components", type=int, default=6)
    parser.add_argument("--start", type=Path, help="state of a run, to go on after its last epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "views":
        args.views = int(args.views)
        make_views(args)
    elif args.stage == "train":
        train(args)
    elif args.stage == "classes":
        make_classes(args)
    else:
        bound(args)


if __name__ == "__main__":
    main()
