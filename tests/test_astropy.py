"""Our models and fitter inside astropy and photutils, and their fitters with our models."""

import astropy.units as u
import numpy as np
import pytest
from astropy.modeling.fitting import LMLSQFitter, TRFLSQFitter
from astropy.modeling.models import Const2D, Gaussian2D, Moffat2D, Planar2D
from astropy.table import Table
from astropy.utils.exceptions import AstropyUserWarning

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
)

STAR = PSF.from_any(Moffat2D(1, 0, 0, 2.2, 3.0))
Y, X = np.mgrid[:33, :35].astype(float)

TRUTH = {
    "gaussian": GaussianGalaxy2D(100, 17.3, 15.8, 3.0, 0.35, 0.6, psf=STAR),
    "sersic": SersicGalaxy2D(100, 17.3, 15.8, 3.0, 1.4, 0.35, 0.6, psf=STAR),
    "point": PointSource2D(100, 17.3, 15.8, psf=STAR),
    "bulge and disk": BulgeDiskGalaxy2D(
        100, 17.3, 15.8, 0.4, 1.2, 3.0, 0.1, 0.3, 4.5, 0.4, 0.6, psf=STAR
    ),
}


def start(name):
    """A model some way from the truth."""
    model = TRUTH[name].copy()
    for parameter in model.param_names:
        value = getattr(model, parameter).value
        setattr(model, parameter, value * 1.15 + 0.02)
    model.x_0, model.y_0 = 16.8, 16.3
    return model


def assert_recovered(model, name, rtol=1e-4):
    for parameter in model.param_names:
        value, true = getattr(model, parameter).value, getattr(TRUTH[name], parameter).value
        assert value == pytest.approx(true, rel=rtol, abs=rtol), parameter


# -- MAPFitter, the astropy way ------------------------------------------------------------------


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("weights", [None, 10.0], ids=["no weights", "weights"])
def test_call(name, weights):
    fitter = MAPFitter()
    model = start(name)
    before = model.parameters.copy()
    weights = None if weights is None else np.full(X.shape, weights)
    fit = fitter(model, X, Y, TRUTH[name](X, Y), weights=weights, maxiter=200)
    assert type(fit) is type(model)
    assert fit is not model
    np.testing.assert_array_equal(model.parameters, before)
    assert_recovered(fit, name, 2e-4 if weights is None else 3e-3)
    assert fitter.fit_info.status in (1, 2, 3, 4)


def test_inplace():
    model = start("sersic")
    fit = MAPFitter()(model, X, Y, TRUTH["sersic"](X, Y), inplace=True)
    assert fit is model
    assert_recovered(model, "sersic")


def test_without_psf():
    truth = SersicGalaxy2D(100, 17.3, 15.8, 3.0, 1.4, 0.35, 0.6)
    begin = SersicGalaxy2D(80, 17.0, 16.0, 2.5, 1.0, 0.2, 0.4)
    fit = MAPFitter()(begin, X, Y, truth(X, Y))
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=1e-4)


@pytest.mark.parametrize("origin", [(-100.0, 2000.0), (0.5, -0.25)])
def test_coordinates_that_begin_elsewhere(origin):
    x, y = X + origin[0], Y + origin[1]
    truth, model = TRUTH["sersic"].copy(), start("sersic")
    for m in (truth, model):
        m.x_0 = m.x_0.value + origin[0]
        m.y_0 = m.y_0.value + origin[1]
    fit = MAPFitter()(model, x, y, truth(x, y))
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=1e-4)


def test_some_pixels_only():
    """Any order, pixels left out, NaN, masked arrays and weights of zero."""
    rng = np.random.default_rng(1)
    z = TRUTH["sersic"](X, Y)
    some = rng.permutation(X.size)[:700]
    fit = MAPFitter()(start("sersic"), X.ravel()[some], Y.ravel()[some], z.ravel()[some])
    assert_recovered(fit, "sersic")
    bad = rng.random(X.shape) < 0.2
    spoilt = np.where(bad, 1e6, z)
    weights = np.where(bad, 0.0, 10.0)
    assert_recovered(MAPFitter()(start("sersic"), X, Y, spoilt, weights=weights), "sersic", 3e-3)
    fit = MAPFitter()(start("sersic"), X, Y, np.ma.array(spoilt, mask=bad))
    assert_recovered(fit, "sersic")
    fit = MAPFitter()(start("sersic"), X, Y, np.where(bad, np.nan, z))
    assert_recovered(fit, "sersic")


def test_points_off_the_grid():
    rng = np.random.default_rng(2)
    x, y = rng.uniform(5, 29, (2, 80))
    truth = GaussianGalaxy2D(100, 17.3, 15.8, 3.0, 0.35, 0.6)
    begin = GaussianGalaxy2D(90, 17.0, 16.0, 3.3, 0.3, 0.5)
    fit = MAPFitter()(begin, x, y, truth(x, y))
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=1e-3)


def noisy(name, sigma, seed=0):
    return TRUTH[name](X, Y) + np.random.default_rng(seed).normal(0, sigma, X.shape)


def test_covariance():
    """With weights that of the Fisher matrix; without, scaled by the residuals."""
    sigma = 0.02
    z = noisy("sersic", sigma)
    fitter = MAPFitter()
    fit = fitter(start("sersic"), X, Y, z, weights=np.full(X.shape, 1 / sigma))
    design = np.array([d.ravel() for d in fit.fit_deriv(X, Y, *fit.parameters)])
    expected = np.linalg.inv(design @ design.T) * sigma**2
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(fit.cov_matrix.cov_matrix / scale, expected / scale, atol=0.05)
    np.testing.assert_allclose(fit.stds.stds, np.sqrt(np.diag(expected)), rtol=0.03)
    np.testing.assert_allclose(fitter.fit_info["param_cov"], fit.cov_matrix.cov_matrix)
    assert fit.stds["n"] > 0
    without = MAPFitter()(start("sersic"), X, Y, z)
    np.testing.assert_allclose(without.parameters, fit.parameters, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(without.stds.stds, fit.stds.stds, rtol=0.1)


def test_fit_info():
    """What photutils (keys) and astropy's dask fitting (attributes) look for."""
    sigma = 0.02
    z = noisy("sersic", sigma)
    weights = np.full(X.shape, 1 / sigma)
    fitter = MAPFitter()
    assert fitter.fit_info is None
    fit = fitter(start("sersic"), X, Y, z, weights=weights)
    info = fitter.fit_info
    for key in ("fun", "param_cov", "message", "status", "nfev", "x", "cost"):
        assert key in info
        assert getattr(info, key) is info[key]
    np.testing.assert_allclose(info["fun"], (fit(X, Y) - z) * weights, atol=1e-6)
    assert info["cost"] == pytest.approx(0.5 * np.sum(info["fun"] ** 2), rel=1e-4)
    assert isinstance(info["message"], str)
    assert info["success"]
    np.testing.assert_allclose(info["x"], fit.parameters)


def test_maxiter():
    fitter = MAPFitter()
    fitter(start("sersic"), X, Y, TRUTH["sersic"](X, Y), maxiter=1)
    assert fitter.fit_info.status == 0
    assert not fitter.fit_info.success
    assert "limit" in fitter.fit_info.message


def test_constraints():
    model = start("sersic")
    model.n = 1.4
    model.n.fixed = True
    model.r_eff.bounds = (1, 2.5)
    fitter = MAPFitter()
    fit = fitter(model, X, Y, noisy("sersic", 0.02), weights=np.full(X.shape, 50.0))
    assert fit.n.value == 1.4
    assert fit.r_eff.value == pytest.approx(2.5)
    assert fitter.fit_info.status == 2
    assert fit.cov_matrix.cov_matrix.shape == (6, 6)
    assert "n" not in fit.cov_matrix.param_names


def test_tied():
    model = start("sersic")
    model.y_0.tied = lambda m: m.x_0 - 1.5
    fit = MAPFitter()(model, X, Y, TRUTH["sersic"](X, Y))
    assert_recovered(fit, "sersic")
    assert fit.y_0.value == pytest.approx(fit.x_0.value - 1.5, abs=1e-12)
    assert fit.cov_matrix.cov_matrix.shape == (6, 6)


def test_prior():
    z, weights = noisy("sersic", 0.2), np.full(X.shape, 5.0)
    free = MAPFitter()(start("sersic"), X, Y, z, weights=weights)
    held = MAPFitter(priors={"n": Normal(1.0, 1e-3)})(start("sersic"), X, Y, z, weights=weights)
    assert held.n.value == pytest.approx(1.0, abs=5e-3)
    assert abs(free.n.value - 1.0) > 0.05
    assert held.stds["n"] == pytest.approx(1e-3, rel=0.05)


def test_model_set():
    flux = np.array([50.0, 100.0, 200.0])
    columns = [np.full(3, value) for value in TRUTH["sersic"].parameters]
    columns[0] = flux
    columns[3] = np.array([2.0, 3.0, 4.0])
    truth = SersicGalaxy2D(*columns, n_models=3, psf=STAR)
    z = truth(X, Y, model_set_axis=False)
    begin = [np.full(3, value) for value in start("sersic").parameters]
    model = SersicGalaxy2D(*begin, n_models=3, psf=STAR)
    fitter = MAPFitter()
    fit = fitter(model, X, Y, z)
    assert len(fit) == 3
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=1e-3)
    assert fitter.fit_info["param_cov"].shape == (3, 7, 7)
    assert fitter.fit_info["fun"].shape == z.shape


def test_compound():
    """Two galaxies and a sloping background, each with constraints."""
    second = SersicGalaxy2D(60, 8.2, 9.1, 2.0, 1.0, 0.2, 1.0, psf=STAR)
    truth = TRUTH["sersic"] + second + Planar2D(0.001, -0.002, 0.3)
    begin = start("sersic") + second.copy() + Planar2D(0, 0, 0)
    begin.flux_1, begin.x_0_1 = 50, 8.5
    begin.n_1.fixed = True
    fitter = MAPFitter()
    fit = fitter(begin, X, Y, truth(X, Y), maxiter=300)
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=2e-3, atol=2e-4)
    assert fit.n_1.value == 1.0
    assert len(fit.stds.stds) == len(truth.parameters) - 1


def test_models_of_astropy():
    truth = Gaussian2D(3, 17, 15, 2, 4, 0.3)
    fit = MAPFitter()(Gaussian2D(2, 16, 16, 3, 3.5, 0.1), X, Y, truth(X, Y))
    np.testing.assert_allclose(fit.parameters, truth.parameters, rtol=1e-4)
    flat = MAPFitter()(Const2D(0), X, Y, np.full(X.shape, 4.2))
    assert flat.amplitude.value == pytest.approx(4.2)


def test_units():
    truth = SersicGalaxy2D(
        100 * u.mJy, 17.3 * u.pix, 15.8 * u.pix, 3 * u.pix, 1.4, 0.35, 0.6 * u.rad, psf=STAR
    )
    begin = SersicGalaxy2D(
        80 * u.mJy, 17 * u.pix, 16 * u.pix, 2.5 * u.pix, 1.0, 0.2, 30 * u.deg, psf=STAR
    )
    x, y = X * u.pix, Y * u.pix
    fit = MAPFitter()(begin, x, y, truth(x, y))
    assert fit.flux.unit == u.mJy
    assert fit.flux.quantity.to_value(u.mJy) == pytest.approx(100, rel=1e-3)
    assert fit.r_eff.quantity.to_value(u.pix) == pytest.approx(3, rel=1e-3)
    assert fit.theta.quantity.to_value(u.rad) == pytest.approx(0.6, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y), "z"),
        ((X, Y[1:], X), "shape"),
        ((X, Y, X[1:]), "z must be of shape"),
        ((X[:1, :4], Y[:1, :4], X[:1, :4]), "free parameters"),
        ((X, Y, X * np.nan), "finite data"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MAPFitter()(start("sersic"), *arguments)


def test_bad_weights():
    with pytest.raises(ValueError, match=r"shape|broadcast"):
        MAPFitter()(start("sersic"), X, Y, X, weights=np.ones(5))


def test_equality_constraints_are_refused():
    from astropy.modeling.fitting import UnsupportedConstraintError

    model = SersicGalaxy2D(eqcons=[lambda x, *args: x[0]])
    with pytest.raises(UnsupportedConstraintError):
        MAPFitter()(model, X, Y, X)


# -- astropy's fitters -----------------------------------------------------------------------------


@pytest.mark.parametrize("fitter", [TRFLSQFitter, LMLSQFitter])
@pytest.mark.parametrize("name", TRUTH)
def test_fitters_of_astropy(name, fitter):
    """With our derivatives, found as well as by ours."""
    model = start(name)
    if fitter is LMLSQFitter:  # it knows no bounds
        for parameter in model.param_names:
            getattr(model, parameter).bounds = (None, None)
    sigma = 1e-3
    z = noisy(name, sigma)
    weights = np.full(X.shape, 1 / sigma)
    theirs = fitter()(model, X, Y, z, weights=weights, maxiter=300)
    ours = MAPFitter()(start(name), X, Y, z, weights=weights, maxiter=300)
    chi2 = [np.sum(((m(X, Y) - z) * weights) ** 2) for m in (theirs, ours)]
    assert chi2[0] == pytest.approx(chi2[1], rel=1e-4)
    if theirs.param_names[-1] == "theta_disk" and fitter is LMLSQFitter:
        return  # without bounds, axes may change places: the same image by other numbers
    for parameter in theirs.param_names:
        shift = getattr(theirs, parameter).value - getattr(ours, parameter).value
        if parameter.startswith("theta"):
            shift = (shift + np.pi / 2) % np.pi - np.pi / 2
        assert abs(shift) < 0.1 * ours.stds[parameter], parameter


def test_derivatives_save_evaluations():
    model = start("sersic")
    z = TRUTH["sersic"](X, Y)
    with_derivatives, without = TRFLSQFitter(), TRFLSQFitter()
    with_derivatives(model, X, Y, z)
    fit = without(model, X, Y, z, estimate_jacobian=True)
    assert with_derivatives.fit_info["nfev"] <= without.fit_info["nfev"] + 5
    assert_recovered(fit, "sersic", 1e-3)


# -- dask ----------------------------------------------------------------------------------------


def test_parallel_fit_dask():
    """A spectral cube: a galaxy at each wavelength, fitted one by one in parallel."""
    pytest.importorskip("dask")
    from astropy.modeling.fitting import parallel_fit_dask

    flux = np.array([50.0, 100.0, 200.0])
    z = flux[:, None, None] * GaussianGalaxy2D(1, 10.2, 8.7, 2.5, 0.3, 0.5, psf=STAR).render(
        (18, 20)
    )
    fit = parallel_fit_dask(
        data=z,
        model=GaussianGalaxy2D(80, 9, 10, 2, 0.2, 0.3, psf=STAR),
        fitter=MAPFitter(),
        fitting_axes=(1, 2),
        scheduler="synchronous",
    )
    np.testing.assert_allclose(fit.flux.value, flux, rtol=1e-3)
    np.testing.assert_allclose(fit.ellip.value, 0.3, rtol=1e-2)
    # astropy hands out array indices, rows first
    np.testing.assert_allclose(fit.x_0.value, 8.7, atol=1e-3)
    np.testing.assert_allclose(fit.y_0.value, 10.2, atol=1e-3)


# -- photutils -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def field():
    """Four galaxies, two of which overlap, and their truth."""
    truth = Table(
        {
            "flux": [300.0, 500.0, 400.0, 250.0],
            "x_0": [20.3, 60.8, 71.2, 22.9],
            "y_0": [21.7, 24.1, 33.3, 62.4],
            "r_eff": [2.5, 3.0, 2.0, 3.5],
            "n": [1.0, 2.0, 1.0, 0.8],
            "ellip": [0.2, 0.4, 0.1, 0.5],
            "theta": [0.5, -0.7, 1.0, 0.1],
        }
    )
    image = np.zeros((90, 95))
    for row in truth:
        image += SersicGalaxy2D(*row, psf=STAR).render(image.shape)
    sigma = 0.02
    data = image + np.random.default_rng(4).normal(0, sigma, image.shape)
    return data, np.full(image.shape, sigma), truth


def photometry(model, field, *, grouped, rows=slice(None)):
    psf = pytest.importorskip("photutils.psf")
    data, error, truth = field
    grouper = psf.SourceGrouper(min_separation=20) if grouped else None
    phot = psf.PSFPhotometry(
        model, (25, 25), fitter=MAPFitter(), grouper=grouper, aperture_radius=8
    )
    init = Table()
    init["x_0"] = truth["x_0"][rows] + 0.4
    init["y_0"] = truth["y_0"][rows] - 0.3
    result = phot(data, error=error, init_params=init)
    result.sort("id")
    return result, phot


def free_model():
    model = SersicGalaxy2D(r_eff=2.2, n=1.3, ellip=0.3, theta=0.2, psf=STAR)
    for name in ("r_eff", "n", "ellip", "theta"):
        getattr(model, name).fixed = False
    return model


@pytest.mark.parametrize("grouped", [False, True])
def test_psf_photometry_of_galaxies(field, grouped):
    truth = field[2]
    rows = slice(None) if grouped else [0, 3]  # alone, only the isolated ones
    result, _ = photometry(free_model(), field, grouped=grouped, rows=rows)
    for name in ("flux", "x_0", "y_0"):
        column = name.replace("_0", "")
        error = np.abs(result[f"{column}_fit"] - truth[name][rows])
        assert (error < 5 * result[f"{column}_err"]).all(), name
        assert (result[f"{column}_err"] > 0).all()
    assert np.abs(result["flux_fit"] / truth["flux"][rows] - 1).max() < 0.05
    assert (result["flags"] & 8 == 0).all()  # 8: the fitter did not converge
    for name, limit in (("r_eff", 0.1), ("n", 0.25), ("ellip", 0.05)):
        assert f"{name}_fit" in result.colnames
        np.testing.assert_allclose(result[f"{name}_fit"], truth[name][rows], atol=limit)


def test_psf_photometry_with_a_known_shape(field):
    """All but flux and position fixed: aperture-like photometry with the right profile."""
    truth = field[2]
    row = truth[0]
    model = SersicGalaxy2D(*row, psf=STAR)
    for name in ("r_eff", "n", "ellip", "theta"):
        getattr(model, name).fixed = True
    result, _ = photometry(model, field, grouped=False, rows=[0])
    assert result["flux_fit"][0] == pytest.approx(row["flux"], abs=5 * result["flux_err"][0])
    assert result["flux_err"][0] < 1.0
    assert result["x_fit"][0] == pytest.approx(row["x_0"], abs=0.01)


def test_psf_photometry_of_stars():
    psf = pytest.importorskip("photutils.psf")
    rng = np.random.default_rng(6)
    truth = np.column_stack(
        [rng.uniform(100, 900, 9), *np.mgrid[15:90:30, 15:90:30].reshape(2, -1)]
    )
    truth[:, 1:] += rng.uniform(-0.5, 0.5, (9, 2))
    data = PointSource2D().render((95, 95), params=truth, psf=STAR).sum(0)
    data += rng.normal(0, 0.1, data.shape)
    phot = psf.PSFPhotometry(
        PointSource2D(psf=STAR), (15, 15), fitter=MAPFitter(), aperture_radius=5
    )
    init = Table({"x_0": truth[:, 1] + 0.3, "y_0": truth[:, 2] - 0.2})
    result = phot(data, error=np.full(data.shape, 0.1), init_params=init)
    pull = (result["flux_fit"] - truth[:, 0]) / result["flux_err"]
    assert np.abs(pull).max() < 4.5
    np.testing.assert_allclose(result["x_fit"], truth[:, 1], atol=0.02)


def test_no_warnings_of_our_own(recwarn):
    """Neither for a good fit nor for one that stops at a bound."""
    MAPFitter()(start("sersic"), X, Y, TRUTH["sersic"](X, Y))
    model = start("sersic")
    model.r_eff.bounds = (1, 2)
    MAPFitter()(model, X, Y, TRUTH["sersic"](X, Y))
    assert not [w for w in recwarn if not issubclass(w.category, AstropyUserWarning)]
