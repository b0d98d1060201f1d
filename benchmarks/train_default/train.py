"""Train the learned galaxy on what prepare.py made.

python benchmarks/train_default/train.py galaxies.npz --out FOLDER --epochs 40
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from galmorph.nets.canonical import CanonicalDecoder
from galmorph.nets.stamp_encoder import StampEncoder
from galmorph.rendering.learned import Geometry
from galmorph.training.canonical import CanonicalVAE


class Stamps:
    """The prepared galaxies as batches."""

    def __init__(self, path: str, split: int, device: str) -> None:
        with np.load(path) as f:
            keep = np.flatnonzero(f["split"] == split)
            self.image = torch.as_tensor(f["image"][keep])
            self.weight = torch.as_tensor(f["weight"][keep])
            self.fwhm = torch.as_tensor(f["psf_fwhm"][keep], dtype=torch.float32)
            self.sersic = torch.as_tensor(f["sersic"][keep], dtype=torch.float32)
            self.source = f["source"][keep].astype(str)
        self.device = device

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, rows: torch.Tensor, rng: torch.Generator | None):
        """Stamps, weights, FWHM, first geometry, flux; turned and jittered when ``rng``."""
        image, weight, fwhm = self.image[rows], self.weight[rows], self.fwhm[rows]
        flux, x, y, r, n, ellip, theta = self.sersic[rows].unbind(1)
        q = (1 - ellip).clamp(0.05, 0.98)
        n = n.clamp(0.3, 7.0)
        if rng is not None:
            mirrored = torch.rand(len(rows), generator=rng) < 0.5
            image = torch.where(mirrored[:, None, None], image.flip(2), image)
            weight = torch.where(mirrored[:, None, None], weight.flip(2), weight)
            x = torch.where(mirrored, image.shape[2] - 1 - x, x)
            theta = torch.where(mirrored, -theta, theta)
            theta = theta + torch.pi * (torch.rand(len(rows), generator=rng) < 0.5)

            # most first geometries are good, some are not
            rough = torch.where(torch.rand(len(rows), generator=rng) < 0.3, 3.0, 1.0)

            def jitter(width: float) -> torch.Tensor:
                return width * rough * torch.randn(len(rows), generator=rng)

            scale = r * q.sqrt()
            x, y = x + 0.05 * scale * jitter(1.0), y + 0.05 * scale * jitter(1.0)
            r = r * torch.exp(jitter(0.08))
            theta = theta + jitter(0.1) * (1 - 0.7 * q)
            q = (q * torch.exp(jitter(0.08))).clamp(0.05, 0.98)
            n = (n * torch.exp(jitter(0.2))).clamp(0.3, 7.0)
            flux = flux * torch.exp(jitter(0.1))
            image, weight = noisier(image, weight, rng)
        first = Geometry(*(v.to(self.device) for v in (x, y, r, q, theta, n)))
        return (*(v.to(self.device) for v in (image, weight, fwhm)), first, flux.to(self.device))


def noisier(
    image: torch.Tensor, weight: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stamps and weights, a third of them with up to ten times their noise in the sky."""
    known = weight > 0
    sky = torch.where(known, weight, torch.inf).flatten(1).median(1).values.reciprocal()
    times = 10 ** torch.rand(len(image), generator=rng)
    times = torch.where(torch.rand(len(image), generator=rng) < 1 / 3, times, 0.0)
    added = (times * torch.nan_to_num(sky))[:, None, None]
    image = torch.where(known, image + added * torch.randn(image.shape, generator=rng), image)
    return image, torch.where(known, weight / torch.sqrt(1 + (added * weight).square()), 0.0)


def evaluate(vae: CanonicalVAE, stamps: Stamps, batch_size: int) -> dict[str, float]:
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(stamps)).split(batch_size):
            image, weight, fwhm, first, flux = stamps.batch(rows, None)
            losses = vae(image, weight, fwhm, first, flux)
            pixels = (weight > 0).flatten(1).sum(1)
            parts.append(torch.stack([losses.log_likelihood / pixels, losses.kl, losses.chi2], 1))
    table = torch.cat(parts).cpu().numpy()
    return {
        "valid_logl": float(np.nanmean(table[:, 0])),
        "valid_kl": float(np.nanmean(table[:, 1])),
        "valid_chi2": float(np.nanmedian(table[:, 2])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--parities", type=int, nargs=4, metavar=("EE", "OO", "OE", "EO"))
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=float, default=3.0, help="epochs of rising beta")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="galaxies an epoch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train, valid = (Stamps(args.data, split, args.device) for split in (0, 1))
    decoder = CanonicalDecoder(
        latent_dim=args.latents,
        hidden=args.hidden,
        features=args.features,
        parities=args.parities,
    )
    vae = CanonicalVAE(decoder, StampEncoder(latent_dim=args.latents)).to(args.device)
    rng = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():  # gives the lazy layers their size
        image, weight, fwhm, first, flux = train.batch(torch.arange(2), rng)
        vae(image, weight, fwhm, first, flux)
    optimiser = torch.optim.Adam(vae.parameters(), lr=args.rate)
    per_epoch = min(len(train), args.limit or len(train)) // args.batch_size
    steps = args.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, args.rate, total_steps=steps + 1, pct_start=0.05
    )
    start, step, skipped = 0, 0, 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        rng.set_state(state["rng"])
        start, step = state["epoch"], state["step"]
    for epoch in range(start, args.epochs):
        began, sums = time.time(), torch.zeros(4)
        order = torch.randperm(len(train), generator=rng)
        for i in range(per_epoch):
            rows = order[i * args.batch_size : (i + 1) * args.batch_size]
            image, weight, fwhm, first, flux = train.batch(rows, rng)
            noise = torch.randn(len(rows), args.latents, generator=rng).to(args.device)
            losses = vae(image, weight, fwhm, first, flux, noise=noise)
            beta = min(1.0, 0.05 + step / max(args.warm_up * per_epoch, 1))
            pixels = (weight > 0).flatten(1).sum(1)
            loss = (-losses.log_likelihood + beta * losses.kl + 5 * losses.shift) / pixels
            # one galaxy that is fitted absurdly must not turn all the others
            loss = torch.where(torch.isfinite(loss), loss, 0.0).mean()
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 5.0)
            if torch.isfinite(norm):
                optimiser.step()
            else:
                skipped += 1
            schedule.step()
            step += 1
            with torch.no_grad():
                sums += torch.stack(
                    [
                        loss.detach().cpu(),
                        (losses.log_likelihood / pixels).mean().cpu(),
                        losses.kl.mean().cpu(),
                        losses.chi2.median().cpu(),
                    ]
                )
        row = dict(zip(("loss", "logl", "kl", "chi2"), (sums / per_epoch).tolist(), strict=True))
        row |= evaluate(vae, valid, args.batch_size)
        row |= {"epoch": epoch, "seconds": time.time() - began, "skipped": skipped}
        with open(args.out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        state = {
            "vae": vae.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": rng.get_state(),
            "epoch": epoch + 1,
            "step": step,
            "config": {"decoder": decoder.config, "encoder": vae.encoder.config},
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)


if __name__ == "__main__":
    main()
