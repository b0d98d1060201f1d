"""Train the posterior encoder of a learned galaxy on galaxies drawn from it.

python benchmarks/train_default/train_encoder.py decoder.safetensors --out FOLDER --steps 20000
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from galmorph.nets import load, save
from galmorph.nets.learned import LearnedShape
from galmorph.nets.stamp_encoder import PosteriorEncoder, log_density, scalars_of, see
from galmorph.nets.weights import _OWN
from galmorph.training.posterior import Simulator, unknowns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="of export.py; the encoder is added to them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=int, default=250)
    parser.add_argument("--start-from", type=Path, help="checkpoint of an earlier training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = load(args.weights).eval().requires_grad_(False)
    simulator = Simulator(LearnedShape(vae))
    encoder = PosteriorEncoder(latent_dim=vae.decoder.latent_dim)
    if args.start_from:
        earlier = torch.load(args.start_from, weights_only=True)["encoder"]
        encoder.load_state_dict(earlier, strict=False)
    rng = torch.Generator().manual_seed(args.seed)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, args.rate, total_steps=args.steps + 1, pct_start=0.03
    )
    step, skipped, sums, began = 0, 0, torch.zeros(4), time.time()
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["encoder"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        rng.set_state(state["rng"])
        step = state["step"]
    while step < args.steps:
        made = simulator.draw(args.batch_size, rng)
        first, flux = simulator.first(made, rng)
        image = see(made.image, made.weight, first, flux)
        mean, white = encoder(image, scalars_of(first, made.fwhm))
        truth = unknowns(made, first, flux)
        logp = log_density(mean, white, truth)
        # a first guess that went to nowhere teaches nothing
        usable = torch.isfinite(logp) & (truth[:, :3].abs().amax(1) < 2)
        loss = -torch.where(usable, logp, 0.0).clamp_min(-1e4).sum() / usable.sum().clamp_min(1)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 50.0)
        if torch.isfinite(norm):
            optimiser.step()
        else:
            skipped += 1
        schedule.step()
        step += 1
        with torch.no_grad():
            pull = ((white @ (truth - mean)[..., None])[..., 0]).abs()[usable]
            error = (truth - mean)[usable].abs()
            sums += torch.stack(
                [loss, (pull < 1).float().mean(), error[:, 4].median(), error[:, 5:].mean()]
            )
        if step % args.report == 0:
            row = dict(
                zip(("loss", "within", "ln_flux", "z"), (sums / args.report).tolist(), strict=True)
            )
            row |= {"step": step, "seconds": time.time() - began, "skipped": skipped}
            with open(args.out / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            sums.zero_()
            state = {
                "encoder": encoder.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": rng.get_state(),
                "step": step,
                "config": encoder.config,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    encoder.trained.fill_(True)
    vae.encoder = encoder.eval()
    own = {k: v for k, v in vae.metadata.items() if k not in _OWN}
    rows = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    save(
        vae,
        args.weights,
        metadata=own | {"encoder": {"steps": step, "last": rows[-1]}},
        half=["encoder"],
    )


if __name__ == "__main__":
    main()
