"""Add simulated galaxies, whose wings are known, to what prepare.py made of real ones.

python benchmarks/train_default/add_simulated.py galaxies.npz --out with_simulated.npz

In the outskirts SDSS images say little: the sky was cut at zero and compressed.  Sérsic profiles
and sums of a bulge and a disk, through Gaussian PSFs and noise like those of the real stamps,
tell the network that profiles go on.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from galmorph import PSF, BulgeDiskGalaxy2D, SersicGalaxy2D, fit_images

SIZE = 64


def gaussian_psf(fwhm: float) -> PSF:
    half = int(np.ceil(2 * fwhm)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / (fwhm / 2.3548) ** 2))


def draw(count: int, rng: np.random.Generator, psfs: list[PSF]) -> np.ndarray:
    """Half Sérsic profiles, half bulges with disks; (count, SIZE, SIZE) without noise."""
    radius = np.exp(rng.uniform(np.log(4), np.log(9), count))
    centre = 0.5 * (SIZE - 1) + rng.uniform(-0.5, 0.5, (count, 2))
    angle = rng.uniform(-np.pi / 2, np.pi / 2, count)
    ellip = 1 - rng.uniform(0.15, 1.0, count)
    flux = np.full(count, 1000.0)
    half = count // 2
    n = np.exp(rng.uniform(np.log(0.5), np.log(6), count))
    sersic = np.column_stack([flux, centre, radius, n, ellip, angle])[:half]
    values = {
        "flux": flux,
        "x_0": centre[:, 0],
        "y_0": centre[:, 1],
        "bulge_fraction": rng.uniform(0.05, 0.8, count),
        "r_bulge": radius * rng.uniform(0.1, 0.6, count),
        "r_disk": radius,
        "n_bulge": rng.uniform(1.0, 5.0, count),
        "ellip_bulge": ellip * rng.uniform(0, 1, count),
        "ellip_disk": ellip,
        "theta_bulge": angle,
        "theta_disk": angle,
    }
    names = BulgeDiskGalaxy2D().param_names
    both = np.column_stack([values[name] for name in names])[half:]
    shape = (SIZE, SIZE)
    return np.concatenate(
        [
            SersicGalaxy2D().render(shape, params=sersic, psf=psfs[:half]),
            BulgeDiskGalaxy2D().render(shape, params=both, psf=psfs[half:]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("real")
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    fwhm = np.exp(rng.uniform(np.log(1.5), np.log(4.5), args.count))
    psfs = [gaussian_psf(f) for f in fwhm]
    clean = draw(args.count, rng, psfs)
    snr = np.exp(rng.uniform(np.log(50), np.log(1500), args.count))
    sigma = np.sqrt((clean**2).sum((1, 2))) / snr
    image = clean + sigma[:, None, None] * rng.standard_normal(clean.shape)
    noise = np.broadcast_to(sigma[:, None, None], image.shape)
    fit = fit_images(image, SersicGalaxy2D(), uncertainty=noise, psf=psfs, background="none")
    with np.load(args.real) as f:
        real = {name: f[name] for name in f.files}
    made = {
        "image": image,
        "weight": 1 / noise,
        "psf_fwhm": fwhm,
        "sersic": fit.params,
        "chi2": fit.chi2,
        "dof": fit.dof,
        "background": np.zeros(args.count),
        "snr": snr,
        "noise_factor": np.ones(args.count),
        "scale": np.ones(args.count),
        "flags": fit.flags,
        "correlation": np.zeros(args.count),
        "row": np.arange(args.count),
        "source": np.full(args.count, "simulated"),
        "split": (np.arange(args.count) % 10 == 0).astype(np.int8),
    }
    if set(made) != set(real):
        raise RuntimeError(f"other columns: {sorted(set(made) ^ set(real))}")
    good = np.isfinite(fit.params).all(1)
    both = {
        name: np.concatenate([real[name], made[name][good].astype(real[name].dtype)])
        for name in real
        if name != "source"
    }
    both["source"] = np.concatenate([real["source"].astype(str), made["source"][good]])
    np.savez(args.out, **both)
    print(f"{good.sum()} simulated galaxies added to {len(real['row'])}")


if __name__ == "__main__":
    main()
