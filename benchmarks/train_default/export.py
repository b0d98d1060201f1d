"""Make weights of what train.py left: the decoder, and a prior fitted to its latents.

train_encoder.py adds the encoder.

python benchmarks/train_default/export.py galmorph.safetensors --data galaxies.npz --run FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from train import Stamps

from galmorph.nets import GalaxyVAE, save
from galmorph.nets.priors import GaussianMixture
from galmorph.nets.stamp_encoder import StampEncoder, scalars_of, see


def posterior(encoder: StampEncoder, stamps: Stamps) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the latents of all galaxies, turned both ways."""
    means, stds = [], []
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            for rows in torch.arange(len(stamps)).split(64):
                image, weight, fwhm, first, flux = stamps.batch(rows, rng)
                mean, std, _ = encoder(see(image, weight, first, flux), scalars_of(first, fwhm))
                means.append(mean)
                stds.append(std)
    return torch.cat(means).numpy(), torch.cat(stds).numpy()


def fitted_prior(vae: GalaxyVAE, seeing: StampEncoder, train: Stamps, k: int) -> GaussianMixture:
    """A mixture that draws from the posteriors of all galaxies follow."""
    from sklearn.mixture import GaussianMixture as Fit

    means, stds = posterior(seeing, train)
    rng = np.random.default_rng(1)
    draws = means + stds * rng.standard_normal(means.shape)
    draws = draws[np.abs(draws).max(1) < 8]
    # a galaxy in a mirror is as likely
    signs = vae.decoder.signs.numpy()
    draws = np.concatenate([draws, *(draws * own for own in np.unique(signs, axis=0))])
    fit = Fit(k, reg_covar=1e-3, random_state=1, n_init=2).fit(draws)
    return GaussianMixture(fit.weights_, fit.means_, fit.covariances_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--components", type=int, default=0, help="of a mixture as prior; 0: standard normal"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = torch.load(args.run / "checkpoint.pt", weights_only=True)
    decoder, encoder = state["config"]["decoder"], state["config"]["encoder"]
    vae = GalaxyVAE.from_preset(
        "galmorph",
        latent_dim=decoder["latent_dim"],
        hidden=decoder["hidden"],
        parities=decoder.get("parities"),
        features=decoder["features"],
        components=args.components,
    )

    def part(name: str) -> dict[str, torch.Tensor]:
        own = {k: v for k, v in state["vae"].items() if k.startswith(name + ".")}
        return {k.removeprefix(name + "."): v for k, v in own.items()}

    vae.decoder.load_state_dict(part("decoder"))
    seeing = StampEncoder(**encoder)
    seeing.load_state_dict(part("encoder"))
    train = Stamps(args.data, 0, "cpu")
    if args.components:
        vae.prior = fitted_prior(vae, seeing, train, args.components)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    sets = {
        str(name): int(n)
        for name, n in zip(*np.unique(train.source, return_counts=True), strict=True)
    }
    save(
        vae,
        args.out,
        metadata={
            "training_data": f"real galaxies, {sets}, see benchmarks/train_default",
            "training_data_hash": hashlib.sha256(train.sersic.numpy().tobytes()).hexdigest(),
            "licence": "BSD-3-Clause",
            "epochs": state["epoch"],
            "last": log[-1],
        },
    )


if __name__ == "__main__":
    main()
