"""Evidences against nested sampling and against a closed form, and the choice between models.

python benchmarks/evidence.py --parts choice
python benchmarks/evidence.py --parts nested --out benchmarks/results/evidence_nested.txt

dynesty explores the same likelihood through the same priors, which are those that the galaxies
are drawn from: the wider the priors, the larger its error.  For the choice, galaxies are
drawn from each model; the right one should be the most probable, as often as its probability says.
"""

from __future__ import annotations

import argparse
import time

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    LogNormal,
    MAPFitter,
    Normal,
    SersicGalaxy2D,
    Uniform,
    fit_images,
)
from galmorph.comparison import compare  # noqa: E402
from galmorph.evidence import log_evidence  # noqa: E402

SHAPE = (41, 41)
Y, X = np.mgrid[:21, :21] - 10
STAR = PSF(np.exp(-0.5 * (X**2 + Y**2) / 1.3**2))
PRIORS = {
    "gaussian": {"r_eff": LogNormal(4, 0.4)},
    "sersic": {"r_eff": LogNormal(4, 0.4), "n": LogNormal(2, 0.5)},
    "bulge + disk": {
        "bulge_fraction": Uniform(0, 1),
        "r_bulge": LogNormal(1.5, 0.4),
        "n_bulge": LogNormal(2.5, 0.4),
        "r_disk": LogNormal(5, 0.4),
    },
}
MODELS = {
    "gaussian": GaussianGalaxy2D(),
    "sersic": SersicGalaxy2D(),
    "bulge + disk": BulgeDiskGalaxy2D(),
}


def simulate(name: str, count: int, snr: float, rng) -> np.ndarray:
    """Images with noise of 1 of galaxies drawn from the prior of a model."""
    model = MODELS[name]
    params = np.zeros((count, len(model.param_names)))
    for i, parameter in enumerate(model.param_names):
        if parameter == "flux":
            params[:, i] = 1
        elif parameter in ("x_0", "y_0"):
            params[:, i] = rng.normal(20, 0.5, count)
        elif parameter.startswith("ellip"):
            params[:, i] = rng.uniform(0, 0.8, count)
        elif parameter.startswith("theta"):
            params[:, i] = rng.uniform(-np.pi / 2, np.pi / 2, count)
        else:
            params[:, i] = PRIORS[name][parameter].sample(count, rng)
            low, high = (b if b is not None else np.inf for b in model.bounds[parameter])
            params[:, i] = params[:, i].clip(low, high)
    images = model.render(SHAPE, params=params, psf=STAR)
    images *= (snr / np.sqrt((images**2).sum((1, 2))))[:, None, None]
    return images + rng.standard_normal(images.shape)


def fit(name: str, data: np.ndarray):
    fitter = MAPFitter(priors=PRIORS[name])
    return fit_images(data, MODELS[name], fitter, uncertainty=1.0, psf=STAR)


def closed_form(report: Report, rng) -> None:
    """Everything but the flux and the background is known: a linear model."""
    names = ("x_0", "y_0", "r_eff", "n", "ellip", "theta")
    model = SersicGalaxy2D(
        x_0=20, y_0=20, r_eff=4, n=1.5, ellip=0.3, theta=0.5, fixed=dict.fromkeys(names, True)
    )
    unit = model.render(SHAPE, params=np.array([[1, 20, 20, 4, 1.5, 0.3, 0.5]]), psf=STAR)[0]
    data = 300 * unit + rng.standard_normal((20, *SHAPE))
    result = fit_images(data, model, uncertainty=1.0, psf=STAR)
    norm = (unit**2).sum()
    best = (data * unit).sum((1, 2)) / norm
    chi2 = ((data - best[:, None, None] * unit) ** 2).sum((1, 2))
    widest = 10 * np.maximum(np.abs(data.sum((1, 2))), 10 * np.sqrt(data[0].size))
    exact = -0.5 * chi2 - 0.5 * data[0].size * np.log(2 * np.pi)
    exact += 0.5 * np.log(2 * np.pi / norm) - np.log(2 * widest)
    for method in ("laplace", "importance"):
        value, _ = log_evidence(result, method=method, n=4000)
        report(
            f"  linear model, {method:10s} largest difference from the closed form "
            f"{np.abs(value - exact).max():.3f} (20 galaxies)"
        )


def against_nested(report: Report, count: int, live: int, rng) -> None:
    for name in ("gaussian", "sersic"):
        data = simulate(name, count, 40, rng)
        flux = float(np.median(fit(name, data).params[:, 0]))
        priors = PRIORS[name] | {
            "flux": LogNormal(flux, 0.5),
            "x_0": Normal(20.0, 0.5),
            "y_0": Normal(20.0, 0.5),
            "ellip": Uniform(0.0, 0.8),
            "theta": Uniform(-np.pi / 2, np.pi / 2),
        }
        result = fit_images(data, MODELS[name], MAPFitter(priors=priors), uncertainty=1.0, psf=STAR)
        began = time.perf_counter()
        nested, error = log_evidence(result, method="nested", n=live)
        seconds = (time.perf_counter() - began) / count
        report(
            f"\n  {name}: {count} galaxies of S/N 40; dynesty with {live} live points: its error "
            f"{np.median(error):.2f} (median), {seconds:.0f} s a galaxy"
        )
        for method in ("laplace", "importance"):
            began = time.perf_counter()
            value, own = log_evidence(result, method=method, n=2000)
            seconds = (time.perf_counter() - began) / count
            off = value - nested
            pull = off / np.hypot(error, np.nan_to_num(own))
            report(
                f"    {method:10s} minus dynesty: mean {off.mean():+.3f} +- "
                f"{off.std() / np.sqrt(count):.3f}, scatter {off.std():.2f} ({pull.std():.2f} of "
                f"the errors), within 0.3: {np.mean(np.abs(off) < 0.3):.0%}, largest "
                f"{np.abs(off).max():.2f}; own error {np.median(np.nan_to_num(own)):.3f}; "
                f"{seconds:.2f} s a galaxy"
            )


def selection(report: Report, count: int, rng) -> None:
    """Is the right model chosen, and do the probabilities mean what they say?"""
    told, right = [], []
    for snr in (20, 100):
        report(f"\n  choice between {', '.join(MODELS)} at S/N {snr}, {count} galaxies of each")
        for truth in MODELS:
            data = simulate(truth, count, snr, rng)
            comparison = compare({name: fit(name, data) for name in MODELS})
            best = np.array(comparison.best)
            shares = ", ".join(f"{name} {np.mean(best == name):.0%}" for name in MODELS)
            report(f"    {truth:13s} is taken for {shares}")
            told.append(comparison.probability.ravel())
            right.append((np.array(list(MODELS)) == truth)[None].repeat(count, 0).ravel())
    told, right = np.concatenate(told), np.concatenate(right)
    report("\n  reliability of the probabilities (all of these)")
    for low, high in zip(
        (0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95), (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.01), strict=True
    ):
        some = (told >= low) & (told < high)
        if some.sum() > 5:
            error = np.sqrt(max(right[some].mean() * (1 - right[some].mean()), 1e-4) / some.sum())
            report(
                f"    said {told[some].mean():.2f}, true {right[some].mean():.2f} +- {error:.2f} "
                f"({some.sum()})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["choice", "nested"])
    parser.add_argument("--n", type=int, default=10, help="galaxies of each model for dynesty")
    parser.add_argument("--live", type=int, default=500)
    parser.add_argument("--chosen", type=int, default=100, help="galaxies of each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "evidence.txt", help="'-' for none")
    args = parser.parse_args()
    report = Report("Evidence and the choice between models")
    report("")
    if "choice" in args.parts:
        rng = np.random.default_rng(args.seed)
        closed_form(report, rng)
        selection(report, args.chosen, rng)
    if "nested" in args.parts:
        against_nested(report, args.n, args.live, np.random.default_rng([args.seed, 1]))
    report.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
