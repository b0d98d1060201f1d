"""Train the weights ``regier2015`` that ship with galmorph: ``--data`` holds ``gz2.fits``.

    nohup taskset -c 1 python train_regier2015.py --data FOLDER > train_regier2015.log &

Loss: the negative evidence lower bound, mixed with that of a likelihood with one sigma for all
pixels of an image, at its best value, (m / 2) log(mean squared error).  The bound alone
gives the bright centre, where galaxies differ most, little weight, so that the mean is learned
slowly where it matters; the share of the second term falls from ``--mix`` to ``--mix-end``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import _galaxy_zoo as gz
from _common import one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from galmorph import nets  # noqa: E402
from galmorph.training import TrainingBatch  # noqa: E402

NAME = "regier2015"
WARM_UP = 200  # steps in which the learning rate rises


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, digest = gz.read(args.data)
    train, held = gz.split(len(images))
    test = gz.resample(images[held])
    pool = turned(images[train], args.turns, np.random.default_rng(args.seed))
    print(f"{len(train)} galaxies, {len(pool)} images, {len(held)} held out", flush=True)

    vae = nets.regier2015(image_shape=gz.SHAPE, scale=args.scale)
    sample = torch.as_tensor(pool[::37]).float()
    sample = sample / vae.scale(sample, torch.ones_like(sample, dtype=torch.bool))
    vae.decoder.start_from(sample.mean(0), sample.std(0))
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    step, seconds = resume(args.checkpoint, vae, optimizer, generator)
    n_pixels, start, curve = math.prod(gz.SHAPE), time.monotonic() - seconds, []
    running: list[float] = []
    vae.train()
    while step < args.steps:
        done = step / args.steps
        for group in optimizer.param_groups:
            rate = min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * done))
            group["lr"] = args.learning_rate * rate
        rows = torch.randint(len(pool), (args.batch_size,), generator=generator).numpy()
        batch = TrainingBatch(torch.as_tensor(pool[rows]).float())
        beta = min(1.0, done / args.beta_warm_up)
        elbo = vae.elbo(batch, beta=beta, generator=generator)
        mix = args.mix + (args.mix_end - args.mix) * min(1.0, done / 0.8)
        flat = 0.5 * n_pixels * elbo["squared_error"].log() + beta * elbo["kl"]
        loss = ((1 - mix) * elbo["loss"] + mix * flat).mean() / n_pixels
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        bound = (elbo["log_likelihood"] - elbo["kl"]).detach().mean()
        running.append(float(bound) / n_pixels)
        if step % args.report == 0 or step == args.steps:
            curve.append([step, *figures(vae, test, running)])
            running = []
            text = " ".join(f"{value:9.4f}" for value in curve[-1][1:])
            print(f"step {step:6d} {time.monotonic() - start:6.0f} s  {text}", flush=True)
            keep(args.checkpoint, vae, optimizer, generator, step, time.monotonic() - start)
    vae.eval()
    metadata = {
        "training_data": (
            f"{len(train)} galaxies of Galaxy Zoo 2 (SDSS, 8-bit grey, asinh stretch), central "
            f"{gz.SIDE} of 106 pixels of 0.04 petroR90 resampled to 69x69, turned by any angle "
            "and mirrored"
        ),
        "training_data_hash": f"sha256:{digest}",
        "licence": "BSD-3-Clause",
        "canonical_scale": None,
        "reference": "Regier, McAuliffe & Prabhat (2015)",
        "held_out": {"number": len(held), "seed": gz.SEED, "of": len(images)},
        "training": {
            name: getattr(args, name)
            for name in ("seed", "steps", "batch_size", "learning_rate", "turns", "scale", "mix",
                         "mix_end", "beta_warm_up")
        },
        "curve_columns": ["step", "elbo_train", "log_likelihood_held_out", "rms_held_out"],
        "curve": curve,
    }  # fmt: skip
    nets.save(vae, args.output, metadata=metadata, half=["encoder", "decoder"])
    args.checkpoint.unlink(missing_ok=True)
    print(f"wrote {Path(args.output).name} after {time.monotonic() - start:.0f} s")


def turned(images: np.ndarray, turns: int, rng: np.random.Generator) -> np.ndarray:
    """Each image ``turns`` times, turned by any angle, half of them mirrored; uint8."""
    out = []
    for _ in range(turns):
        angle = rng.uniform(0, 2 * np.pi, len(images))
        mirrored = rng.random(len(images)) < 0.5
        out.append(np.rint(gz.resample(images, angle=angle, mirrored=mirrored)).astype(np.uint8))
    return np.concatenate(out)


def figures(vae: nets.GalaxyVAE, test: np.ndarray, running: list[float]) -> list[float]:
    """Bound on the training images; log-likelihood and root of the squared error held out."""
    mean, std = (a.astype(float) for a in vae.reconstruct(test))
    each = -0.5 * ((test - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)
    rms = np.sqrt(np.mean((test - mean) ** 2))
    return [round(float(v), 4) for v in (np.mean(running), each.mean(), rms)]


def keep(path: Path, vae, optimizer, generator, step: int, seconds: float) -> None:
    """Write all that is needed to go on."""
    state = {
        "vae": vae.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "step": step,
        "seconds": seconds,
    }
    temporary = path.with_name(path.name + ".new")
    torch.save(state, temporary)
    temporary.replace(path)


def resume(path: Path, vae, optimizer, generator) -> tuple[int, float]:
    """Go on from a checkpoint, if there is one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return state["step"], state["seconds"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds gz2.fits")
    parser.add_argument(
        "--output", type=Path,
        default=Path(nets.__file__).parent.parent / "pretrained" / f"{NAME}.safetensors",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, default=Path(f"{NAME}.checkpoint"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=36000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--turns", type=int, default=16, help="turned copies of each image")
    parser.add_argument("--scale", type=lambda t: t if t == "rms" else float(t), default="rms")
    parser.add_argument("--mix", type=float, default=0.7)
    parser.add_argument("--mix-end", type=float, default=0.2)
    parser.add_argument("--beta-warm-up", type=float, default=0.05, help="fraction of the steps")
    parser.add_argument("--report", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
