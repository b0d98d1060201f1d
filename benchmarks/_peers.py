"""Fits of a simulated set by other packages, one package a run, in whatever Python has it.

``python _peers.py PEER SET.npz OUT.npz --n 30`` is called by sersic.py. Every peer gets the same
stamps, the same noise and the same effective PSF (51x51, as stars show it), fits a Sersic and no
background, and is used the way its documentation shows. Peers that need a first guess from the
user get `first_guess`, made of second moments of the pixels.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings

import numpy as np
from scipy import ndimage
from scipy.special import gamma, gammaincinv

COLUMNS = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")


def first_guess(data: np.ndarray, sigma: float, fwhm: float = 3.0) -> dict[str, float]:
    """Moments of the pixels above the noise around the brightest smoothed one."""
    smooth = ndimage.gaussian_filter(data, 1.5)
    # 1.5 pixels of smoothing leave sigma / (2 sqrt(pi) 1.5) of the noise.
    labels, _ = ndimage.label(smooth > 1.5 * sigma / 5.3)
    peak = np.unravel_index(smooth.argmax(), smooth.shape)
    inside = labels == labels[peak]
    y, x = np.nonzero(inside)
    light = np.maximum(data[inside], 0) + 1e-12
    flux = data[inside].sum()
    x_0, y_0 = np.average(x, weights=light), np.average(y, weights=light)
    cov = np.cov(np.vstack([x, y]), aweights=light)
    cov = cov - (fwhm / 2.355) ** 2 * np.eye(2)
    values, vectors = np.linalg.eigh(cov)
    values = np.maximum(values, 0.5)
    order = np.argsort(np.hypot(x - x_0, y - y_0))
    growth = np.cumsum(light[order])
    half = np.hypot(x - x_0, y - y_0)[order][np.searchsorted(growth, growth[-1] / 2)]
    q = np.clip(np.sqrt(values[0] / values[1]), 0.15, 0.95)
    r_eff = np.sqrt(max(half**2 - (0.5 * fwhm) ** 2, 1.0)) / np.sqrt(q)
    return {
        "flux": max(flux, sigma),
        "x_0": x_0,
        "y_0": y_0,
        "r_eff": r_eff,
        "n": 2.0,
        "ellip": 1 - q,
        "theta": np.arctan2(vectors[1, 1], vectors[0, 1]) % np.pi,
    }


def flux_per_intensity(r_eff: float, n: float, ellip: float) -> float:
    """Total flux of a Sersic whose surface brightness at r_eff is 1."""
    b = gammaincinv(2 * n, 0.5)
    return 2 * np.pi * n * r_eff**2 * (1 - ellip) * np.exp(b) * b ** (-2 * n) * gamma(2 * n)


def _flux_error(values: np.ndarray, cov: np.ndarray) -> float:
    """Error of the flux from the covariance of (amplitude, r_eff, n, ellip)."""

    def flux(v):
        return v[0] * flux_per_intensity(v[1], v[2], v[3])

    step = 1e-4 * np.maximum(np.abs(values), 1e-3)
    grad = [(flux(values + s) - flux(values - s)) / (2 * s.sum()) for s in np.diag(step)]
    return float(np.sqrt(grad @ cov @ np.array(grad)))


def petrofit(data, sigma, psf):
    """Sersic2D in PSFConvolvedModel2D, 10 times oversampled within 10 pixels of the centre."""
    import astropy.config.configuration as configuration

    # petrofit 0.5 imports names that astropy has since removed, and never needs.
    for name in (
        "update_default_config",
        "ConfigurationDefaultMissingError",
        "ConfigurationDefaultMissingWarning",
    ):
        if not hasattr(configuration, name):
            kind = Warning if name.endswith("Warning") else Exception
            setattr(configuration, name, type(name, (kind,), {}))
    configuration.update_default_config = lambda *args, **kwargs: None
    from astropy.modeling.fitting import TRFLSQFitter
    from astropy.modeling.models import Sersic2D
    from petrofit import PSFConvolvedModel2D, fit_model, get_default_sersic_bounds

    class Convolved(PSFConvolvedModel2D):
        # petrofit 0.5 indexes parameters that newer astropy passes as scalars.
        def evaluate(self, x, y, *params, **kwargs):
            return super().evaluate(x, y, *(np.atleast_1d(p) for p in params), **kwargs)

    def fit(i):
        g = first_guess(data[i], sigma[i])
        model = Sersic2D(
            amplitude=g["flux"] / flux_per_intensity(g["r_eff"], g["n"], g["ellip"]),
            bounds=get_default_sersic_bounds(
                {"x_0": (g["x_0"] - 5, g["x_0"] + 5), "y_0": (g["y_0"] - 5, g["y_0"] + 5)}
            ),
            **{k: g[k] for k in COLUMNS[1:]},
        )
        model = Convolved(model, psf=psf, oversample=("x_0", "y_0", 20, 10))
        model.fixed["psf_pa"] = True
        fitted, _ = fit_model(
            data[i],
            model,
            weights=np.full(data[i].shape, 1 / sigma[i]),
            fitter=TRFLSQFitter,
            maxiter=300,
            calc_uncertainties=True,
            estimate_jacobian=True,
            epsilon=1.5e-8,
            acc=1e-7,
        )
        p = {k: float(getattr(fitted, k).value) for k in (*COLUMNS[1:], "amplitude")}
        p["flux"] = p["amplitude"] * flux_per_intensity(p["r_eff"], p["n"], p["ellip"])
        errors = dict.fromkeys(COLUMNS, np.nan)
        if getattr(fitted, "cov_matrix", None) is not None:
            cov, free = fitted.cov_matrix.cov_matrix, list(fitted.cov_matrix.param_names)
            at = {k: free.index(k) for k in free}
            errors.update({k: np.sqrt(cov[at[k], at[k]]) for k in COLUMNS[1:]})
            order = [at[k] for k in ("amplitude", "r_eff", "n", "ellip")]
            values = np.array([p[k] for k in ("amplitude", "r_eff", "n", "ellip")])
            errors["flux"] = _flux_error(values, cov[np.ix_(order, order)])
        return [p[k] for k in COLUMNS], [errors[k] for k in COLUMNS]

    return fit


def pyimfit(data, sigma, psf):
    """Imfit's Sersic function, Levenberg-Marquardt, one thread."""
    import pyimfit as imfit

    size = data.shape[1]

    def fit(i):
        g = first_guess(data[i], sigma[i])
        function = imfit.make_imfit_function("Sersic", label="galaxy")
        intensity = g["flux"] / flux_per_intensity(g["r_eff"], g["n"], g["ellip"])
        function.PA.setValue(np.degrees(g["theta"]) - 90, [-360, 360])
        function.ell.setValue(g["ellip"], [0, 0.97])
        function.n.setValue(g["n"], [0.3, 8])
        function.I_e.setValue(intensity, [0, 1e4 * intensity])
        function.r_e.setValue(g["r_eff"], [0.1, size])
        model = imfit.SimpleModelDescription()
        model.x0.setValue(g["x_0"] + 1, [g["x_0"] - 4, g["x_0"] + 6])
        model.y0.setValue(g["y_0"] + 1, [g["y_0"] - 4, g["y_0"] + 6])
        model.addFunction(function)
        fitter = imfit.Imfit(model, psf=psf, maxThreads=1)
        result = fitter.fit(
            data[i], error=np.full(data[i].shape, sigma[i]), error_type="sigma", solver="LM"
        )
        x, y, pa, ell, n, i_e, r_e = result.params
        flux = i_e * flux_per_intensity(r_e, n, ell)
        dx, dy, dpa, dell, dn, _, dr = result.paramErrs
        return (
            [flux, x - 1, y - 1, r_e, n, ell, np.radians(pa + 90)],
            # No covariance is given out, so no error of the flux.
            [np.nan, dx, dy, dr, dn, dell, np.radians(dpa)],
        )

    return fit


def astrophot(data, sigma, psf):
    """Sersic galaxy model, its own initialisation, Levenberg-Marquardt."""
    import astrophot as ap
    import torch

    torch.set_num_threads(1)

    def fit(i):
        target = ap.TargetImage(
            data=data[i],
            pixelscale=1.0,
            variance=np.full(data[i].shape, sigma[i] ** 2),
            psf=ap.PSFImage(data=psf),
        )
        model = ap.Model(name=f"g{i}", model_type="sersic galaxy model", target=target)
        model.initialize()
        fitter = ap.fit.LM(model, verbose=0)
        fitter.fit()
        x, y = (float(v) for v in model.center.value)
        q, pa, n, r_e, i_e = (float(getattr(model, k).value) for k in ("q", "PA", "n", "Re", "Ie"))
        names, values = [], {}
        for parameter in model.dynamic_params:
            count = max(int(np.prod(parameter.shape)), 1)
            names += [parameter.name] if count == 1 else [f"{parameter.name}{j}" for j in (0, 1)]
        cov = np.asarray(fitter.covariance_matrix.detach().cpu())
        values = dict(zip(names, np.sqrt(np.abs(np.diag(cov))), strict=True))
        order = [names.index(k) for k in ("Ie", "Re", "n", "q")]
        sign = np.diag([1.0, 1.0, 1.0, -1.0])
        flux_error = _flux_error(
            np.array([i_e, r_e, n, 1 - q]), sign @ cov[np.ix_(order, order)] @ sign
        )
        return (
            [i_e * flux_per_intensity(r_e, n, 1 - q), x, y, r_e, n, 1 - q, pa + np.pi / 2],
            [flux_error, *(values[k] for k in ("center0", "center1", "Re", "n", "q", "PA"))],
        )

    return fit


def _pysersic_fitter(data, sigma, psf):
    from pysersic import FitSingle
    from pysersic.priors import autoprior

    prior = autoprior(image=data, profile_type="sersic", sky_type="none")
    return FitSingle(data=data, rms=np.full(data.shape, sigma), psf=psf, prior=prior)


def pysersic_map(data, sigma, psf):
    """FitSingle.find_MAP with its automatic priors."""
    import jax

    def fit(i):
        found = _pysersic_fitter(data[i], sigma[i], psf).find_MAP(jax.random.PRNGKey(i))
        p = {k: float(found[k]) for k in ("flux", "xc", "yc", "r_eff", "n", "ellip", "theta")}
        p["theta"] += np.pi / 2  # from the y axis
        return list(p.values()), [np.nan] * 7

    return fit


def pysersic_laplace(data, sigma, psf):
    """FitSingle.estimate_posterior, Laplace: medians and standard deviations of its samples."""
    import jax

    def fit(i):
        fitter = _pysersic_fitter(data[i], sigma[i], psf)
        result = fitter.estimate_posterior(jax.random.PRNGKey(i), method="laplace")
        samples = result.idata.posterior
        columns = [
            np.asarray(samples[k]).ravel()
            for k in ("flux", "xc", "yc", "r_eff", "n", "ellip", "theta")
        ]
        values, errors = [np.median(c) for c in columns], [np.std(c) for c in columns]
        values[6] += np.pi / 2
        return values, errors

    return fit


# name: (fitter, distribution that must be installed, galaxies at most)
PEERS = {
    "petrofit": (petrofit, "petrofit", 200),
    "pyimfit": (pyimfit, "pyimfit", 200),
    "astrophot": (astrophot, "astrophot", 30),
    "pysersic-map": (pysersic_map, "pysersic", 30),
    "pysersic-laplace": (pysersic_laplace, "pysersic", 30),
}


def main() -> None:
    """Fit one set with one peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("set", help=".npz of simulate.sersic_set")
    parser.add_argument("out", help=".npz to write")
    parser.add_argument("--n", type=int, default=None, help="galaxies (default: the peer's own)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    make, _, most = PEERS[args.peer]
    with np.load(args.set) as stored:
        data, sigma, psf = stored["data"], stored["sigma"], stored["psf51"]
    n = min(len(data), args.n or most)
    fit = make(data, sigma, psf)
    try:  # imports, compilation and caches are not counted
        fit(0)
    except Exception:
        traceback.print_exc()
    params, errors = np.full((n, 7), np.nan), np.full((n, 7), np.nan)
    cpu = np.zeros(n)
    messages = []
    for i in range(n):
        start = time.process_time()
        try:
            params[i], errors[i] = fit(i)
        except Exception as exc:
            messages.append(f"{i}: {type(exc).__name__}: {exc}"[:200])
        cpu[i] = time.process_time() - start
    np.savez(args.out, params=params, errors=errors, cpu=cpu, messages=np.array(messages, str))
    print("\n".join(messages))


if __name__ == "__main__":
    main()
