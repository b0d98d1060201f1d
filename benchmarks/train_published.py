"""Train and judge the published convolutional networks that ship with galmorph.

    python train_published.py --data FOLDER --preset beta_vae
    python train_published.py --stamps galaxies.npz --preset cvae
    python train_published.py --data FOLDER --stamps galaxies.npz --report report.txt

``--data`` holds ``gz2.fits`` and ``efigi.fits``; ``--stamps`` are files of
``train_default/prepare.py``, whose galaxies of these two sets are seen at redshifts of 0.3 to 0.8
by the networks that are told the redshift.  What is held out is the same for all, and not
trained on by the default weights of galmorph either.  A run that was stopped goes on when it is
started again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from _common import Report, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from galmorph import PSF, GalaxyVAE, nets  # noqa: E402
from galmorph.nets.vae import divergence, draw  # noqa: E402
from galmorph.simulate import MockFlag, redshifted, scaling  # noqa: E402
from galmorph.training import CyclicalAnnealing, train  # noqa: E402

#: Central pixels of each file that are used: 3.84 petroR90, and all.
SIDES = {"gz2": 96, "efigi": 88}
PRETRAINED = Path(nets.__file__).parent.parent / "pretrained"
ACTIVE = 0.01  # variance of the posterior mean over galaxies, above which a latent is used

#: Where the galaxies of the prepared stamps are taken to be, and their pixels, arcsec: their
#: redshifts are not known, and with these they have half-light radii of 2.5 to 4 kpc.
Z_IN, PIXEL_IN = 0.05, 0.5
#: How they are observed.
Z_OUT, PIXEL_OUT, FWHM_OUT, NOISE_OUT = (0.3, 0.8), 0.12, 3.5, 0.6
Q = 9.0  # of the stretch that makes them images of eight bits

ASTROVADER = (
    # the published 64, 64 and 16 channels had the same bound after 10 epochs, three times as long
    {"image_shape": (32, 32), "channels": (32, 32, 16)},
    {
        "epochs": 40,
        "prior_warmup": 16,
        "beta": CyclicalAnnealing(rise=4, hold=4, warmup=16),
        "batch_size": 32,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "schedule": "exponential",
    },
)
LEARNING = {"epochs": 30, "beta": 0.1, "batch_size": 64, "learning_rate": 1e-3}
#: Options of the network, and of the training.
SETTINGS = {
    "astrovader2020": ASTROVADER,
    "beta_vae": ({"image_shape": (64, 64), "filters": 16}, LEARNING),
    **dict.fromkeys(
        ("cvae", "cvae2", "fancy_cvae"),
        ({"image_shape": (32, 32), "filters": 16}, LEARNING | {"epochs": 50}),
    ),
}
CONDITIONAL = ("cvae", "cvae2", "fancy_cvae")


@dataclass
class Galaxies:
    """Images (N, ny, nx) from 0 to 255, which are held out, and what else is known."""

    images: np.ndarray
    held: np.ndarray
    about: str
    digest: str
    redshift: np.ndarray | None = None

    def split(self, held: bool) -> Galaxies:
        rows = self.held == held
        parts = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("images", "held", "redshift")
        }
        return replace(self, **parts)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    if args.report is not None:
        report(args)
        return
    # without a redshift, the same network on the same images: what does the redshift bring?
    options, settings = SETTINGS["cvae" if args.like_cvae else args.preset]
    for name in ("beta", "epochs"):
        if getattr(args, name) is not None:
            settings = settings | {name: getattr(args, name)}
    seen = galaxies(args, args.preset in CONDITIONAL or args.like_cvae, options["image_shape"])
    n = int(seen.held.sum())
    print(f"{len(seen.held) - n} galaxies, {n} held out", flush=True)
    torch.manual_seed(args.seed)
    vae = GalaxyVAE.from_preset(args.preset, **options)
    start = time.monotonic()
    result = train(
        vae,
        seen.images,
        conditions=seen.redshift if args.preset in CONDITIONAL else None,
        validation=np.flatnonzero(seen.held),
        precision="bfloat16",
        rng=args.seed,
        checkpoint=args.output.with_suffix(".checkpoint"),
        log=args.output.with_suffix(".csv"),
        progress=False,
        **settings,
    )
    print(f"{result}\n{time.monotonic() - start:.0f} s", flush=True)
    merit = figures(vae, seen.split(True))
    print(merit, flush=True)
    columns = ("epoch", "beta", "loss", "validation_log_likelihood", "validation_kl")
    every = max(1, len(result.history["epoch"]) // 8)
    curve = np.stack([result.history[c] for c in columns], 1)[every - 1 :: every]
    metadata = {
        "training_data": f"{len(seen.held) - n} galaxies of {seen.about}",
        "training_data_hash": f"sha256:{seen.digest}",
        "licence": "BSD-3-Clause",
        "canonical_scale": None,
        "held_out": {"number": n, **merit},
        "training": {
            "seed": args.seed,
            "seconds": round(float(result.history["seconds"].sum())),
            "best_epoch": result.best_epoch,
            **settings,
            "beta": str(settings["beta"]),
        },
        "curve_columns": list(columns),
        "curve": [[round(float(value), 4) for value in row] for row in curve],
    }
    nets.save(vae, args.output, metadata=metadata, half=["encoder", "decoder", "predictor"])
    print(f"wrote {args.output.name}, {args.output.stat().st_size / 1e6:.2f} MB")


# -- galaxies ------------------------------------------------------------------------------


def galaxies(args: argparse.Namespace, conditional: bool, shape: tuple[int, int]) -> Galaxies:
    """What a network is trained on and judged with."""
    return redshifted_stamps(args.stamps, shape) if conditional else stretched(args.data, shape)


def stretched(folder: Path, shape: tuple[int, int]) -> Galaxies:
    """Images of Galaxy Zoo 2 and EFIGI as they were published."""
    from astropy.io import fits

    parts, held, digest = [], [], hashlib.sha256()
    for name, side in SIDES.items():
        raw = np.ascontiguousarray(fits.getdata(Path(folder) / f"{name}.fits", "IMAGES"))
        digest.update(raw.tobytes())
        parts.append(resampled(raw, side, shape))
        held.append(held_out(name, len(raw)))
    about = (
        "Galaxy Zoo 2 and EFIGI (SDSS, 8-bit grey, asinh stretch), central 96 of 106 and all of 88 "
        f"pixels, resampled to {shape[0]}x{shape[1]}"
    )
    return Galaxies(np.concatenate(parts), np.concatenate(held), about, digest.hexdigest())


def redshifted_stamps(paths: list[Path], shape: tuple[int, int]) -> Galaxies:
    """The same galaxies, those that could be prepared, each seen at one redshift."""
    keys = ("image", "weight", "psf_fwhm", "split")
    held: dict[str, list] = {key: [] for key in keys}
    for path in paths:
        with np.load(path) as file:
            rows = np.isin(file["source"], list(SIDES))
            for key in keys:
                held[key].append(file[key][rows])
    image, weight, fwhm, split = (np.concatenate(held[key]) for key in keys)
    rng = np.random.default_rng(5)
    redshift = rng.uniform(*Z_OUT, len(image))
    usable = weight > 0
    mock = redshifted(
        image,
        z_in=Z_IN,
        z_out=redshift,
        pixel_scale_in=PIXEL_IN,
        pixel_scale_out=PIXEL_OUT,
        psf_in=[gaussian(width) for width in fwhm],
        psf_out=gaussian(FWHM_OUT),
        noise_in=np.where(usable, 1.0 / np.where(usable, weight, 1.0), np.nan),
        mask=~usable,
        shape=shape,
        # exposed for as long as it takes to see them at 0.3 as bright as they were
        zero_point_in=0.0,
        zero_point_out=-2.5 * np.log10(brightness(Z_OUT[0])),
        noise_out=NOISE_OUT,
        rng=rng,
    )
    # neighbours were masked: there, and at the edge, stays what they were filled with
    good = (mock.flags & MockFlag.FAILED == 0) & np.isfinite(mock.data).all((1, 2))
    images = 255 * np.clip(np.arcsinh(Q * mock.data) / Q, 0, 1)
    about = (
        f"Galaxy Zoo 2 and EFIGI, put from redshift {Z_IN} to {Z_OUT[0]}-{Z_OUT[1]} "
        f"artificially ({PIXEL_OUT} arcsec a pixel, FWHM {FWHM_OUT} pixels), asinh stretch"
    )
    digest = hashlib.sha256(np.rint(images[good]).astype(np.uint8).tobytes()).hexdigest()
    return Galaxies(
        images[good].astype(np.float32), split[good] == 1, about, digest,
        redshift[good].astype(np.float32),
    )  # fmt: skip


def brightness(z: float) -> float:
    """Light of a pixel at a redshift, as a fraction of that of a pixel of the input."""
    size, flux = scaling(Z_IN, z)
    return float(flux / (size * PIXEL_IN / PIXEL_OUT) ** 2)


def gaussian(fwhm: float) -> PSF:
    """A round Gaussian PSF."""
    sigma = fwhm / 2.3548
    half = int(np.ceil(4 * sigma)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


def held_out(name: str, n: int) -> np.ndarray:
    """Whether rows of a file are held out, (n,): as in ``train_default/prepare.py``."""
    held = np.random.default_rng([20, sum(map(ord, name))]).random(n) < 0.1
    if name == "gz2":
        held[np.random.default_rng(2015).permutation(6204)[:1000]] = True
    return held


def resampled(images: np.ndarray, side: int, shape: tuple[int, int]) -> np.ndarray:
    """The middle of images (N, ny, nx), ``side`` pixels wide, on fewer pixels."""
    low = [(n - side) // 2 for n in images.shape[1:]]
    cut = images[:, low[0] : low[0] + side, low[1] : low[1] + side]
    out = np.empty((len(images), *shape), np.float32)
    for start in range(0, len(images), 512):
        rows = slice(start, start + 512)
        part = torch.as_tensor(cut[rows]).float()[:, None]
        small = torch.nn.functional.interpolate(part, shape, mode="bilinear", antialias=True)
        out[rows] = small[:, 0].clamp(0, 255).numpy()
    return out


# -- figures of merit ----------------------------------------------------------------------


def figures(vae: GalaxyVAE, seen: Galaxies) -> dict[str, float]:
    """Squared error per pixel on images from 0 to 1, KL, active latents; predicted redshifts."""
    condition = None if vae.conditions is None else seen.redshift
    mean, _ = vae.reconstruct(seen.images, condition=condition)
    latents, _ = vae.latents(seen.images, condition=condition)
    found = {
        "squared_error": np.mean(((mean - seen.images) / vae.scale.value) ** 2),
        "kl": at_a_draw(vae, seen)["kl"].mean(),
        "active_latents": np.count_nonzero(latents.var(0) > ACTIVE),
    }
    if vae.predictor is not None:
        with torch.no_grad():
            told = vae.predict_condition(torch.as_tensor(seen.images))
        miss = told.mean[:, 0].numpy() - seen.redshift
        pull = np.abs(miss / told.stddev[:, 0].numpy())
        found |= {
            "redshift_rms": np.sqrt(np.mean(miss**2)),
            "redshift_spread": np.std(seen.redshift),
            "redshift_within_1_sigma": np.mean(pull < 1),
            "redshift_within_2_sigma": np.mean(pull < 2),
        }
    return {key: float(value) for key, value in found.items()}


def bounds(vae: GalaxyVAE, seen: Galaxies, beta: float) -> np.ndarray:
    """Bound on the log-likelihood of each galaxy, under the noise that beta amounts to.

    A weight beta of the divergence does the same as beta times the variance of the pixels.
    """
    terms = at_a_draw(vae, seen)
    noise = vae.likelihood.std * math.sqrt(beta)
    norm = math.prod(vae.image_shape) * math.log(noise * math.sqrt(2 * math.pi))
    return terms["error"] / (-2 * noise**2) - norm - terms["kl"]


def at_a_draw(vae: GalaxyVAE, seen: Galaxies) -> dict[str, np.ndarray]:
    """Summed squared error at a draw of the latents, and divergence, of each galaxy."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list] = {"error": [], "kl": []}
    for rows in np.array_split(np.arange(len(seen.images)), -(-len(seen.images) // 256)):
        images = torch.as_tensor(seen.images[rows])
        condition = None if vae.conditions is None else seen.redshift[rows]
        with torch.no_grad():
            q = vae.encode(images, condition=condition)
            z = draw(q, generator)
            drawn = vae.decode(z, condition).mean
            error = (images / vae.scale.value - drawn).square().sum((1, 2))
            found["error"].append(error.double().numpy())
            found["kl"].append(divergence(q, vae.prior(), z).double().numpy())
    return {key: np.concatenate(value) for key, value in found.items()}


def report(args: argparse.Namespace) -> None:
    say = Report("The published networks on held-out galaxies of Galaxy Zoo 2 and EFIGI")
    say("squared error: mean over pixels of images from 0 to 1, at the posterior mean")
    say("KL: divergence of the posterior from the prior, mean over galaxies, in nats")
    say("fitted: the same from a mixture of 10, fitted by fit_prior to the training galaxies")
    say("active: latents whose posterior mean varies between galaxies by more than 0.01\n")
    say(
        f"{'weights':<20}{'MB':>6}{'galaxies':>10}{'pixels':>9}{'beta':>6}{'latents':>9}"
        f"{'active':>8}{'squared error':>15}{'KL':>8}{'fitted':>8}"
    )
    held, told = {}, {}
    for path in filter(Path.exists, args.weights):
        vae = GalaxyVAE.read(path)
        conditional = "artificially" in vae.metadata["training_data"]
        whole = galaxies(args, conditional, vae.image_shape)
        seen, known = whole.split(True), whole.split(False)
        condition = None if vae.conditions is None else known.redshift
        fitted = nets.fit_prior(vae, known.images, condition=condition, draws=4, rng=1)
        beta = vae.metadata["training"]["beta"]
        merit = figures(vae, seen)
        shape = "x".join(map(str, vae.image_shape))
        say(
            f"{path.stem:<20}{path.stat().st_size / 1e6:>6.2f}{len(seen.images):>10}{shape:>9}"
            f"{beta if len(beta) < 6 else 'cycle':>6}{vae.latent_size:>9}"
            f"{merit['active_latents']:>8.0f}{merit['squared_error']:>15.2e}{merit['kl']:>8.2f}"
            f"{at_a_draw(fitted, seen)['kl'].mean():>8.2f}"
        )
        if conditional:
            held[path.stem] = bounds(vae, seen, float(beta))
            told |= {key: merit[key] for key in merit if key.startswith("redshift")}
    if args.without in held:
        say("\nDoes it help to be told the redshift?  Bound on the log-likelihood of a held-out")
        say(f"galaxy, nats, with minus without ({args.without}: the same layers and epochs):")
        for name in sorted(held.keys() - {args.without}):
            gain = held[name] - held[args.without]
            say(f"    {name:<12}{gain.mean():+8.2f} +- {gain.std() / math.sqrt(len(gain)):.2f}")
    if told:
        say("\nRedshift that fancy_cvae predicts from the images alone:")
        for key, value in told.items():
            say(f"    {key.removeprefix('redshift_').replace('_', ' '):<16}{value:.3f}")
    say.write(args.report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of gz2.fits and efigi.fits")
    parser.add_argument("--stamps", type=Path, nargs="+", help="files of train_default/prepare.py")
    parser.add_argument("--preset", choices=sorted(SETTINGS))
    parser.add_argument("--like-cvae", action="store_true", help="on redshifted galaxies as well")
    parser.add_argument("--output", type=Path, help="file of the weights")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="judge weights instead")
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        help="to judge; by default those that ship",
        default=[PRETRAINED / f"{name}.safetensors" for name in SETTINGS],
    )
    parser.add_argument("--without", default="no_redshift", help="name of those not told redshift")
    args = parser.parse_args()
    if args.report is None and args.preset is None:
        parser.error("give --preset or --report")
    args.output = args.output or PRETRAINED / f"{args.preset}.safetensors"
    return args


if __name__ == "__main__":
    main()
