"""Sums of galaxies, the astropy way: fitted as scenes."""

import gc

import numpy as np
import pytest
from astropy.modeling.models import Const2D, Gaussian2D, Planar2D, Polynomial2D
from astropy.table import QTable

from galmorph import (
    PSF,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    _modelfit,
)
from galmorph._sumfit import each_once, sum_of
from galmorph.deblending import deblend

SIGMA = 0.3
NAMES = SersicGalaxy2D.param_names
PAIR = np.array([[900, 13.3, 15.4, 3, 1.5, 0.4, 0.5], [600, 21.2, 16.6, 2, 1, 0.3, -0.6]])
Y, X = np.mgrid[:33, :35].astype(float)
GUESS = PAIR[:, 1:3] + [0.3, -0.2]
WEIGHTS = np.full(X.shape, 1 / SIGMA)


@pytest.fixture(scope="module")
def psf():
    y, x = np.mgrid[-9:10, -9:10]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))


@pytest.fixture(scope="module")
def blend(psf):
    image = SersicGalaxy2D().render(X.shape, params=PAIR, psf=psf).sum(0)
    return image + np.random.default_rng(1).normal(0, SIGMA, image.shape)


@pytest.fixture
def as_any_model(monkeypatch):
    """What a fit finds that does not know of scenes."""

    def fit(fitter, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(_modelfit, "_fit_scene", lambda *args: None)
            return fitter(*args, **kwargs)

    return fit


@pytest.fixture
def only_scenes(monkeypatch):
    """Let everything fail that is not fitted as a scene."""

    def refuse(*args):
        raise AssertionError("fitted as any model")

    monkeypatch.setattr(_modelfit, "_fit_points", refuse)


def begin(psf, origin=(0.0, 0.0)):
    x, y = origin
    return (
        SersicGalaxy2D(700, 13 + x, 15 + y, 3, 1, 0.2, 0.3, psf=psf),
        SersicGalaxy2D(500, 21 + x, 17 + y, 2, 1, 0.2, 0.3, psf=psf),
    )


def alone(image, model, psf, **options):
    """The same fit by `deblend`: no priors, models that are true, nothing known of positions."""
    fitter = MAPFitter(priors={}, dtype="float64")
    options = {"uncertainty": SIGMA, "position_prior": 1e3, "structure": 0, **options}
    return deblend(image, GUESS, model=model, psf=psf, fitter=fitter, **options)


def in_sigma(found, expected, cov):
    return np.abs(np.asarray(found) - expected) / np.sqrt(np.diag(cov))


def correlations(cov, other):
    """Difference of covariances in units of the standard deviations."""
    sigma = np.sqrt(np.diag(other))
    return np.abs(cov - other) / np.outer(sigma, sigma)


def test_a_sum_is_the_scene_of_deblend(psf, blend, only_scenes):
    one, two = begin(psf)
    fitter = MAPFitter()
    fit = fitter(one + two, X, Y, blend, weights=WEIGHTS)
    scene = alone(blend, SersicGalaxy2D(), psf)
    cov = fitter.fit_info.param_cov
    assert in_sigma(fit.parameters, scene.params.ravel(), scene.cov).max() < 0.01
    assert correlations(cov, scene.cov).max() < 0.01
    np.testing.assert_allclose(fit.cov_matrix.cov_matrix, cov)
    assert fit.stds["flux_1"] == pytest.approx(scene.flux_err[1], rel=0.01)
    assert fitter.fit_info.status == 1


def test_what_a_fit_tells(psf, blend):
    one, two = begin(psf)
    model, fitter = one + two, MAPFitter()
    before = model.parameters.copy()
    fit = fitter(model, X, Y, blend, weights=WEIGHTS)
    np.testing.assert_array_equal(model.parameters, before)
    info = fitter.fit_info
    np.testing.assert_allclose(info["fun"], (fit(X, Y) - blend) * WEIGHTS, atol=1e-6)
    assert info["cost"] == pytest.approx(0.5 * np.sum(info["fun"] ** 2))
    np.testing.assert_allclose(info["x"], fit.parameters)
    assert fitter(model, X, Y, blend, weights=WEIGHTS, inplace=True) is model
    np.testing.assert_allclose(model.parameters, fit.parameters)
    one, two = begin(psf)
    fitter(one + two, X, Y, blend, weights=WEIGHTS, maxiter=1)
    assert fitter.fit_info.status == 0


def test_the_covariance_is_that_of_differences(psf, blend):
    one, two = begin(psf)
    fitter = MAPFitter()
    fit = fitter(Const2D(0) + one + two, X, Y, blend, weights=WEIGHTS)
    columns = []
    for i, value in enumerate(fit.parameters):
        step = 1e-4 * max(abs(value), 1e-2)
        shifted = [fit.parameters.copy(), fit.parameters.copy()]
        shifted[0][i] += step
        shifted[1][i] -= step
        up, down = (fit.evaluate(X, Y, *p) for p in shifted)
        columns.append(((up - down) / (2 * step)).ravel() / SIGMA)
    expected = np.linalg.inv(np.array(columns) @ np.array(columns).T)
    assert correlations(fitter.fit_info.param_cov, expected).max() < 0.01


SKIES = {
    "constant": Const2D(1.0),
    "plane": Planar2D(0, 0, 0),
    "polynomial": Polynomial2D(1, x_domain=[-3, 40], y_domain=[5, 50]),
    "polynomial of no degree": Polynomial2D(0),
}


@pytest.mark.parametrize("name", SKIES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_backgrounds(psf, blend, as_any_model, name, place):
    """The same minimum and covariance as of the fit of any model, wherever the image begins."""
    origin = (100.0, -40.0)
    terms = list(begin(psf, origin))
    terms.insert(place, SKIES[name])
    model = terms[0] + (terms[1] + terms[2])
    z = blend + 4
    if len(SKIES[name].param_names) == 3:
        z = z + 0.05 * X - 0.02 * Y
    fitter = MAPFitter()
    fit = fitter(model, X + origin[0], Y + origin[1], z, weights=WEIGHTS)
    cov = fitter.fit_info.param_cov
    expected = as_any_model(
        fitter, model, X + origin[0], Y + origin[1], z, weights=WEIGHTS, maxiter=300
    )
    assert in_sigma(fit.parameters, expected.parameters, cov).max() < 0.02
    assert correlations(cov, fitter.fit_info.param_cov).max() < 0.01


def test_other_kinds_of_galaxies(psf, as_any_model):
    truth = GaussianGalaxy2D(400, 12, 14, 3, 0.3, 0.4, psf=psf) + PointSource2D(90, 20, 18, psf=psf)
    z = truth(X, Y) + np.random.default_rng(2).normal(0, SIGMA, X.shape)
    truth.flux_0, truth.x_0_1 = 300, 20.4
    fitter = MAPFitter()
    fit = fitter(truth, X, Y, z, weights=WEIGHTS)
    cov = fitter.fit_info.param_cov
    expected = as_any_model(fitter, truth, X, Y, z, weights=WEIGHTS)
    assert in_sigma(fit.parameters, expected.parameters, cov).max() < 0.02
    assert correlations(cov, fitter.fit_info.param_cov).max() < 0.01


def test_constraints(psf, blend, only_scenes):
    one, two = begin(psf)
    one.r_eff.bounds = (0.5, 2.5)
    two.n.fixed = True
    two.theta, two.theta.fixed = -0.6 + np.pi, True
    two.x_0.bounds = (21.4, 22)
    fitter = MAPFitter()
    fit = fitter(one + two, X, Y, blend, weights=WEIGHTS)
    assert fit.r_eff_0.value == pytest.approx(2.5)
    assert fit.x_0_1.value == pytest.approx(21.4)
    assert fit.n_1.value == 1.0
    assert fit.theta_1.value == -0.6 + np.pi
    assert fitter.fit_info.status == 2
    assert fit.cov_matrix.param_names == [n for n in fit.param_names if n not in ("n_1", "theta_1")]
    assert fitter.fit_info.param_cov.shape == (12, 12)


def test_centres_of_learned_galaxies_have_bounds(psf, blend, only_scenes):
    shape = LearnedGalaxy2D.from_pretrained().shape
    one = LearnedGalaxy2D(700, 13, 15, 3, 0.3, shape=shape, psf=psf)
    two = LearnedGalaxy2D(500, 21, 17, 2, 0.3, shape=shape, psf=psf)
    for galaxy in (one, two):
        for name in ("r_50", "theta", *galaxy.latent_names):
            getattr(galaxy, name).fixed = True
    two.x_0.bounds = (21.4, 22)
    fit = MAPFitter()(one + two, X, Y, blend, weights=WEIGHTS)
    assert fit.x_0_1.value == pytest.approx(21.4)
    assert abs(fit.x_0_0.value - 13.3) < 0.2


def test_known_centres_where_the_image_begins_elsewhere(psf, blend, only_scenes):
    origin = (100.0, -40.0)
    centres = PAIR[:, 1:3] + origin
    shape = LearnedGalaxy2D.from_pretrained().shape
    one, two = (LearnedGalaxy2D(500, *xy, 3, 0.3, shape=shape, psf=psf) for xy in centres)
    for galaxy in (one, two):
        for name in ("x_0", "y_0", *galaxy.latent_names[2:]):
            getattr(galaxy, name).fixed = True
    fitter = MAPFitter()
    fit = fitter(one + two, X + origin[0], Y + origin[1], blend, weights=WEIGHTS)
    for i, xy in enumerate(centres):
        assert [getattr(fit, f"{n}_{i}").value for n in ("x_0", "y_0")] == list(xy)
    flux = np.array([fit.flux_0.value, fit.flux_1.value])
    errors = [fit.stds["flux_0"], fit.stds["flux_1"]]
    assert (np.abs(flux - PAIR[:, 0]) < 4 * np.array(errors)).all()
    assert fitter.fit_info.cost < 0.6 * X.size


def test_some_pixels_only(psf, blend):
    rng = np.random.default_rng(1)
    one, two = begin(psf)
    bad = rng.random(X.shape) < 0.2
    weights = np.where(bad, 0.0, WEIGHTS)
    spoilt = np.where(bad, 1e6, blend)
    fitter = MAPFitter()
    expected = fitter(one + two, X, Y, blend, weights=weights)
    cov = fitter.fit_info.param_cov
    some = rng.permutation(np.flatnonzero(~bad.ravel()))
    x, y, z = (a.ravel()[some] for a in (X, Y, blend))
    for fit in (
        fitter(one + two, X, Y, spoilt, weights=weights),
        fitter(one + two, X, Y, np.where(bad, np.nan, blend), weights=WEIGHTS),
        fitter(one + two, X, Y, np.ma.array(spoilt, mask=bad), weights=WEIGHTS),
        fitter(one + two, x, y, z, weights=np.full(z.shape, 1 / SIGMA)),
    ):
        assert in_sigma(fit.parameters, expected.parameters, cov).max() < 1e-3
        assert correlations(fitter.fit_info.param_cov, cov).max() < 1e-3


def test_points_that_are_given_twice_are_two_measurements(psf, blend):
    one, two = begin(psf)
    again = np.random.default_rng(9).normal(0, 2 * SIGMA, X.shape) + blend
    x, y = (np.stack([a, a]) for a in (X, Y))
    weights = np.stack([WEIGHTS, WEIGHTS / 2])
    fitter = MAPFitter()
    twice = fitter(one + two, x, y, np.stack([blend, again]), weights=weights)
    cov = fitter.fit_info.param_cov
    assert fitter.fit_info.fun.shape == x.shape
    mean = (blend + again / 4) / 1.25
    once = fitter(one + two, X, Y, mean, weights=WEIGHTS * np.sqrt(1.25))
    np.testing.assert_allclose(twice.parameters, once.parameters, rtol=1e-6)
    np.testing.assert_allclose(cov, fitter.fit_info.param_cov, rtol=1e-5, atol=1e-9)


def test_without_weights_residuals_tell_the_noise(psf, blend):
    one, two = begin(psf)
    with_them, without = MAPFitter(), MAPFitter()
    expected = with_them(one + two, X, Y, blend, weights=WEIGHTS)
    fit = without(one + two, X, Y, blend)
    cov = with_them.fit_info.param_cov
    assert in_sigma(fit.parameters, expected.parameters, cov).max() < 0.02
    rms = np.sqrt(2 * with_them.fit_info.cost / (X.size - 14))
    np.testing.assert_allclose(np.sqrt(np.diag(without.fit_info.param_cov)),
                               rms * np.sqrt(np.diag(cov)), rtol=0.02)  # fmt: skip


def test_priors_of_all_and_of_one(psf, blend, as_any_model):
    origin = np.array([50.0, 70.0])
    one, two = begin(psf, origin)
    priors = {"n": Normal(1.2, 0.05), "n_1": Normal(2.0, 1e-3), "x_0_0": Normal(63.0, 0.01)}
    fitter = MAPFitter(priors=priors)
    args = (one + two, X + origin[0], Y + origin[1], blend)
    fit = fitter(*args, weights=WEIGHTS)
    cov = fitter.fit_info.param_cov
    assert fit.n_1.value == pytest.approx(2.0, abs=3e-3)
    assert 1.1 < fit.n_0.value < 1.4
    assert 63.0 < fit.x_0_0.value < 63.3
    only = MAPFitter(priors={k: v for k, v in priors.items() if k != "n"})
    own = only(*args, weights=WEIGHTS)
    assert own.n_0.value > fit.n_0.value + 0.01
    expected = as_any_model(only, *args, weights=WEIGHTS)
    assert in_sigma(own.parameters, expected.parameters, cov).max() < 0.02


def test_a_prior_of_a_centre_where_the_image_begins_elsewhere(psf, blend):
    """Of a single galaxy, too."""
    model = begin(psf, (50.0, 70.0))[0]
    fitter = MAPFitter(priors={"x_0": Normal(63.0, 1e-3)})
    fit = fitter(model, X[:, :18] + 50, Y[:, :18] + 70, blend[:, :18], weights=WEIGHTS[:, :18])
    assert fit.x_0.value == pytest.approx(63.0, abs=5e-3)


def test_centres_are_followed_but_not_beyond_max_shift(psf, blend):
    one, two = begin(psf)
    one.x_0, one.y_0 = 7.0, 12.0  # further than a centre may go at once
    fit = MAPFitter()(one + two, X, Y, blend, weights=WEIGHTS)
    assert np.hypot(fit.x_0_0 - 13.3, fit.y_0_0 - 15.4) < 0.1
    held = MAPFitter(max_shift=1.0)
    fit = held(one + two, X, Y, blend, weights=WEIGHTS)
    assert fit.x_0_0.value == pytest.approx(8.0)
    assert held.fit_info.status == 2


def test_what_is_held_is_taken_away(psf, blend, only_scenes):
    held = Gaussian2D(3, 20, 8, 2, 3, 0.3)
    star = PointSource2D(50, 8, 25, psf=psf)
    extra = held(X, Y) + star(X, Y)
    for term in (held, star):
        for name in term.param_names:
            getattr(term, name).fixed = True
    one, two = begin(psf)
    expected = MAPFitter()(one + two, X, Y, blend, weights=WEIGHTS)
    fit = MAPFitter()(held + one + two + star, X, Y, blend + extra, weights=WEIGHTS)
    np.testing.assert_allclose(fit.parameters[6:20], expected.parameters, rtol=1e-6)
    np.testing.assert_array_equal(fit.parameters[:6], held.parameters)


def test_what_is_no_scene(psf):
    one, two = begin(psf)
    assert sum_of(one) is None
    assert sum_of(one * two) is None
    assert sum_of(one + one) is None  # one model, twice
    assert sum_of(one + Gaussian2D()) is None
    assert sum_of(one + Const2D() + Const2D()) is None
    assert sum_of(Const2D() + Const2D()) is None
    assert sum_of(one + SersicGalaxy2D()) is None  # of another PSF
    sky = Planar2D()
    sky.intercept.fixed = True
    assert sum_of(one + sky) is None
    tied = one + two
    assert sum_of(tied) is not None
    tied.y_0_1.tied = lambda model: model.y_0_0 + 1
    assert sum_of(tied) is None


def test_ties_are_kept(psf, blend):
    one, two = begin(psf)
    model = one + two
    model.y_0_1.tied = lambda m: m.y_0_0 + 1.2
    fit = MAPFitter()(model, X, Y, blend, weights=WEIGHTS)
    assert fit.y_0_1.value == pytest.approx(fit.y_0_0.value + 1.2, abs=1e-12)


def test_learned_galaxies_are_those_of_deblend(psf, blend, only_scenes):
    shape = LearnedGalaxy2D.from_pretrained().shape
    one = LearnedGalaxy2D(700, *GUESS[0], 3, 0.3, shape=shape, psf=psf)
    two = LearnedGalaxy2D(500, *GUESS[1], 2, 0.3, shape=shape, psf=psf)
    fitter = MAPFitter()
    fit = fitter(one + two, X, Y, blend, weights=WEIGHTS)
    scene = alone(blend, LearnedGalaxy2D(shape=shape), psf)
    assert in_sigma(fit.parameters, scene.params.ravel(), scene.cov).max() < 0.05
    assert correlations(fitter.fit_info.param_cov, scene.cov).max() < 0.02


# -- photutils -----------------------------------------------------------------------------------


def test_a_pixel_of_two_cutouts_counts_once():
    at = np.array([3, 1, 3, 0, 1])
    z = np.array([1.0, 2.0, 5.0, 7.0, 9.0])
    weights = np.array([2.0, 0.0, 2.0, 3.0, 4.0])
    data, once = each_once(at, z, weights)
    np.testing.assert_array_equal(once, [2, 0, 0, 3, 4])
    np.testing.assert_array_equal(data[once > 0], [3, 7, 9])


def grouped(model, image, *, side=25, **options):
    """Table of photutils of the two galaxies, and the pixels that it used."""
    psf = pytest.importorskip("photutils.psf")
    # it remembers the models of groups by the names of their classes, as long as they are there
    gc.collect()
    xy = GUESS
    photometry = psf.PSFPhotometry(
        model,
        (side, side),
        fitter=MAPFitter(),
        grouper=psf.SourceGrouper(20),
        aperture_radius=6,
        **options,
    )
    error = np.full(image.shape, SIGMA)
    guess = QTable({"x": xy[:, 0], "y": xy[:, 1]})
    table = photometry(image, error=error, init_params=guess)
    used = np.zeros(image.shape, dtype=bool)
    for x, y in np.ceil(xy - 0.5).astype(int):
        half = side // 2
        used[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1] = True
    return table, used


def test_groups_of_photutils(psf, blend, only_scenes):
    """Bounds of the shape hold, and a pixel that is in both cut-outs counts once."""
    model = SersicGalaxy2D(ellip=0.2, theta=0.3, psf=psf)
    model.n.bounds = (0.3, 1.2)
    table, used = grouped(model, blend, xy_bounds=2.0)
    assert table["n_fit"][0] == pytest.approx(1.2)
    assert (table["ellip_fit"] > 0).all()
    table, used = grouped(SersicGalaxy2D(ellip=0.2, theta=0.3, psf=psf), blend)
    scene = alone(blend, SersicGalaxy2D(), psf, mask=~used)
    np.testing.assert_allclose(table["flux_err"], scene.flux_err, rtol=0.01)
    assert (np.abs(table["flux_fit"] - scene.flux) < 0.02 * scene.flux_err).all()
    assert (table["flags"] & 8 == 0).all()


def test_groups_with_known_shapes(psf, blend, only_scenes):
    model = SersicGalaxy2D(r_eff=2.5, n=1.2, ellip=0.3, theta=0.3, psf=psf)
    for name in ("r_eff", "n", "ellip", "theta"):
        getattr(model, name).fixed = True
    table, used = grouped(model, blend)
    scene = alone(blend, model, psf, mask=~used)
    np.testing.assert_allclose(table["flux_err"], scene.flux_err, rtol=0.01)
    assert (np.abs(table["x_fit"] - scene.params[:, 1]) < 1e-3).all()


def test_groups_of_learned_galaxies(psf, blend, only_scenes):
    table, used = grouped(LearnedGalaxy2D.from_pretrained(psf=psf), blend)
    scene = alone(blend, LearnedGalaxy2D.from_pretrained(), psf, mask=~used)
    np.testing.assert_allclose(table["flux_err"], scene.flux_err, rtol=0.02)
    assert (np.abs(table["flux_fit"] - PAIR[:, 0]) < 4 * table["flux_err"]).all()
