"""How fast learned galaxies are fitted, on one core, 64 x 64 pixels.

python benchmarks/learned_speed.py

Also: whether the encoder's first guess makes Sérsic fits faster or safer, and how long one fit
takes from a cold start, import included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    EncoderFitter,
    LearnedGalaxy2D,
    MAPFitter,
    SersicGalaxy2D,
    fit_images,
)

COLD = """
import numpy as np
from galmorph import LearnedGalaxy2D, fit_images
y, x = np.mgrid[:64, :64] - 31.5
image = 100 * np.exp(-np.hypot(x, y / 0.6) / 5) + np.random.default_rng(1).normal(0, 1, (64, 64))
psf = np.exp(-0.5 * (np.mgrid[:25, :25] - 12).astype(float)[0] ** 2 / 1.7)
psf = psf * psf.T
result = fit_images(image, LearnedGalaxy2D.from_pretrained(), uncertainty=1.0, psf=psf)
assert np.isfinite(result.params).all()
"""


def galaxies(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, PSF]:
    """Draws from the prior, r_50 of 2.5 to 9 pixels, S/N 30 to 300; images, noise, PSF."""
    y, x = np.mgrid[:25, :25] - 12
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))
    model = LearnedGalaxy2D.from_pretrained()
    params = model.sample(count, rng)
    params[:, 0] = 100
    params[:, 1:3] = 31.5 + rng.uniform(-0.5, 0.5, (count, 2))
    params[:, 3] = np.exp(rng.uniform(np.log(2.5), np.log(9), count))
    params[:, 4] = rng.uniform(-np.pi, np.pi, count)
    clean = model.render((64, 64), params=params, psf=psf)
    snr = np.exp(rng.uniform(np.log(30), np.log(300), count))
    sigma = np.sqrt((clean**2).sum((1, 2))) / snr
    sigma = np.broadcast_to(sigma[:, None, None], clean.shape)
    return clean + sigma * rng.standard_normal(clean.shape), sigma, psf


def timed(repeats: int, *args, **kwargs) -> tuple[float, object]:
    """Median of the processor time in seconds, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = fit_images(*args, **kwargs)
        times.append(time.process_time() - start)
    return float(np.median(times)), result


def first_guesses(report: Report, data, sigma, psf) -> None:
    """Sérsic fits from the usual first guess, and from what the encoder tells."""
    from galmorph._batchfit import fit_batch

    unknown = np.full((len(data), 2), np.nan)
    fitter = MAPFitter()
    usual = fitter._setup(SersicGalaxy2D(), "constant")
    start = time.process_time()
    plain = fit_batch(usual, data, 1 / sigma, psf, unknown)
    plain_time = time.process_time() - start
    start = time.process_time()
    seen = fit_images(
        data,
        LearnedGalaxy2D.from_pretrained(),
        EncoderFitter(),
        uncertainty=sigma,
        psf=psf,
        background="constant",
    )
    decoder = LearnedGalaxy2D.from_pretrained().shape.decoder()
    import torch

    n, q = decoder.profile(torch.as_tensor(seen.params[:, 5:]).float())
    told = np.column_stack(
        [seen.params[:, :4], n.numpy().clip(0.3, 6), 1 - q.numpy(), seen.params[:, 4]]
    )
    guided = fit_batch(
        fitter._setup(SersicGalaxy2D(), "constant", told), data, 1 / sigma, psf, unknown
    )
    guided_time = time.process_time() - start
    worse = {
        "usual": np.mean(plain.cost > guided.cost + 1),
        "encoder": np.mean(guided.cost > plain.cost + 1),
    }
    report(
        f"\nSérsic fits by their usual first guess: {1e3 * plain_time / len(data):.2f} ms, "
        f"{plain.n_iter.mean():.1f} evaluations, worse than by the other in {worse['usual']:.1%}"
        f"\nby the encoder's: {1e3 * guided_time / len(data):.2f} ms with the encoder, "
        f"{guided.n_iter.mean():.1f} evaluations, worse in {worse['encoder']:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=RESULTS / "learned_speed.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Speed of learned fits, one core")
    data, sigma, psf = galaxies(args.n, np.random.default_rng(1))
    learned = LearnedGalaxy2D.from_pretrained()
    common = {"uncertainty": sigma, "psf": psf, "background": "constant"}
    for name, model, fitter in (
        ("EncoderFitter", learned, EncoderFitter()),
        ("EncoderFitter(refine=True)", learned, EncoderFitter(refine=True)),
        ("MAPFitter, learned", learned, MAPFitter()),
        ("MAPFitter, Sérsic", SersicGalaxy2D(), MAPFitter()),
    ):
        fit_images(data[:8], model, fitter, **(common | {"uncertainty": sigma[:8]}))  # warm
        seconds, result = timed(args.repeats, data, model, fitter, **common)
        each = seconds / args.n
        report(
            f"{name:28s} {1e3 * each:7.2f} ms a galaxy, {1 / each:6.0f} galaxies a second, "
            f"{result.n_iter.mean():.1f} evaluations, median chi2/dof "
            f"{np.median(result.chi2 / result.dof):.3f}"
        )
    first_guesses(report, data, sigma, psf)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD], check=True)
        times.append(time.perf_counter() - start)
    report(f"\none fit from a cold start, import included: {np.median(times):.2f} s")
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
