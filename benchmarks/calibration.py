"""Do the posteriors cover?  Simulation-based calibration of every model at three S/N.

python benchmarks/calibration.py --n 1000

Galaxies are drawn from the priors that the fitter has, so that posteriors that are right cover
exactly: 50, 68, 90 and 95 % intervals of every parameter, and ranks that are uniform.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _common import RESULTS, Report

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    EncoderFitter,
    GaussianGalaxy2D,
    ImportanceFitter,
    LearnedGalaxy2D,
    LogNormal,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    Uniform,
)
from galmorph.calibration import calibrate
from galmorph.priors import Truncated

SHAPE = (41, 41)
LEVELS = (0.5, 0.68, 0.9, 0.95)
CENTRE = {"x_0": Normal(20.0, 0.5), "y_0": Normal(20.0, 0.5)}
ELLIPSE = {"ellip": Uniform(0.0, 0.8), "theta": Uniform(-np.pi / 2, np.pi / 2)}


def models() -> dict:
    """Model, priors of the shape, and fitters."""
    index = Truncated(LogNormal(2.0, 0.5), 0.4, 6.0)
    both = {
        "bulge_fraction": Uniform(0.0, 1.0),
        "r_bulge": LogNormal(1.5, 0.3),
        "n_bulge": Truncated(LogNormal(2.5, 0.4), 0.5, 6.0),
        "ellip_bulge": Uniform(0.0, 0.6),
        "theta_bulge": Uniform(-np.pi / 2, np.pi / 2),
        "r_disk": LogNormal(5.0, 0.3),
        "ellip_disk": Uniform(0.0, 0.8),
        "theta_disk": Uniform(-np.pi / 2, np.pi / 2),
    }
    sampled = {"ImportanceFitter": ImportanceFitter(rng=1, fallback=False)}
    fitted = {"MAPFitter": MAPFitter(), "EncoderFitter": EncoderFitter()}
    return {
        "point": (PointSource2D(), {}, sampled),
        "gaussian": (GaussianGalaxy2D(), {"r_eff": LogNormal(4.0, 0.3), **ELLIPSE}, sampled),
        "sersic": (
            SersicGalaxy2D(),
            {"r_eff": LogNormal(4.0, 0.3), "n": index, **ELLIPSE},
            sampled | {"MAPFitter": MAPFitter()},
        ),
        "bulge + disk": (BulgeDiskGalaxy2D(), both, sampled),
        "learned": (
            LearnedGalaxy2D.from_pretrained(),
            {"r_50": LogNormal(5.0, 0.2), "theta": Uniform(-np.pi, np.pi)},
            fitted | sampled,
        ),
    }


def usual_flux(model, prior: dict, psf: PSF, snr: float) -> float:
    """Flux that has this S/N for the middle of the prior, with noise of 1."""
    params = np.array([float(np.ravel(getattr(model, n).value)[0]) for n in model.param_names])
    for name, own in (CENTRE | prior).items():
        params[model.param_names.index(name)] = own.ppf(0.5)
    params[0] = 1.0
    image = model.render(SHAPE, params=params[None], psf=psf)[0]
    return snr / np.sqrt((image**2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--snr", type=float, nargs="+", default=[10, 30, 100])
    parser.add_argument("--models", nargs="+", default=list(models()))
    parser.add_argument("--fitters", nargs="+", help="only these; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "calibration.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Calibration of posteriors")
    y, x = np.mgrid[:21, :21] - 10
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))
    report(
        "\nCoverage (%) of central intervals of 50, 68, 90 and 95 %: the worst parameter at each "
        "level, and that\nof the flux; p: of uniform ranks, the lowest of all parameters (as many "
        "tests as parameters)."
    )
    for name in args.models:
        model, prior, fitters = models()[name]
        for kind, fitter in fitters.items():
            for snr in args.snr if kind in (args.fitters or fitters) else ():
                flux = usual_flux(model, prior, psf, snr)
                began = time.perf_counter()
                found = calibrate(
                    model,
                    fitter,
                    prior={"flux": LogNormal(flux, 0.2), **CENTRE, **prior},
                    psf=psf,
                    noise=1.0,
                    shape=SHAPE,
                    n=args.n,
                    rng=args.seed,
                )
                seconds = time.perf_counter() - began
                table = found.coverage(LEVELS)
                tests = found.rank_test()
                report(line(name, kind, snr, found, table, tests, seconds / args.n))
                report.write(None if args.out == "-" else args.out)


def line(name, kind, snr, found, table, tests, seconds) -> str:
    """One line of the report."""
    parts = []
    for level in LEVELS:
        own = {
            str(r["parameter"]): 100 * float(r["coverage"])
            for r in table
            if np.isclose(float(r["level"]), level) and str(r["parameter"]) != "joint"
        }
        worst = max(own, key=lambda p: abs(own[p] - 100 * level))
        parts.append(f"{own[worst]:.1f} ({worst}), flux {own['flux']:.1f}")
    lowest = min(range(len(tests)), key=lambda i: tests["p_value"][i])
    flagged = np.mean((found.flags & 49152) != 0)
    lowest = tests[lowest]
    return (
        f"{name:13s} {kind:16s} S/N {snr:<4g} {' | '.join(parts)} | p {lowest['p_value']:.2g} "
        f"({lowest['parameter']}), failed {found.failed_fraction:.1%}, not converged "
        f"{flagged:.1%}, {seconds:.3f} s"
    )


if __name__ == "__main__":
    main()
