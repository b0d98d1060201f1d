"""How large is the misfit of maximum-posterior fits, in units of what the network has learned?

python benchmarks/train_default/misfit.py --data FOLDER

The network learned its misfit from the fits of the encoder in the training; a fit comes closer.  Of
KiDS galaxies of the training, 80 % of the pixels are fitted with noise and misfit, and the other
20 % say which factor on the misfit makes them most probable: the default of `LearnedNoise`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
from left_out_pixels import kids  # noqa: E402

from galmorph import LearnedGalaxy2D, MAPFitter, fit_images  # noqa: E402
from galmorph.noise import LearnedNoise  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.2, 0.35, 0.5, 0.7, 1])
    parser.add_argument("--out", default=RESULTS / "misfit.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("The learned misfit, for maximum-posterior fits")
    stamps = kids(args.data, trained=True)
    data = np.array([s["data"] for s in stamps])
    noise = np.array([np.full(data.shape[1:], s["noise"]) for s in stamps])
    bad = np.array([s["bad"] for s in stamps])
    out = (np.random.default_rng(1).random(data.shape) < 0.2) & ~bad
    totals, first = [], None
    report(f"\n  {len(data)} galaxies of the training; ln L of pixels left out, less that at 0")
    for scale in args.scales:
        own = LearnedNoise(scale=scale)
        result = fit_images(
            data,
            LearnedGalaxy2D.from_pretrained(),
            MAPFitter(noise=own),
            uncertainty=noise,
            mask=bad | out,
            psf=stamps[0]["psf"],
            background="constant",
        )
        drawn = own.bind(result.model_std_images)
        value = drawn.log_prob(data, result.model_images, np.where(out, 1 / noise, 0)).sum((1, 2))
        first = value if first is None else first
        gain = np.nan_to_num(value - first)
        totals.append(gain.sum())
        report(
            f"    scale {scale:4.2f}: sum {gain.sum():9.1f}, better for "
            f"{np.mean(gain > 0):6.1%}, worst {gain.min():8.1f}"
        )
    report(f"  best: {args.scales[int(np.argmax(totals))]}")
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
