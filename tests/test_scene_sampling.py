"""Draws from the joint posterior of the sources of a scene."""

import copy
import pickle

import numpy as np
import pytest
from astropy.utils.exceptions import AstropyUserWarning
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    LearnedGalaxy2D,
    LogNormal,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    Uniform,
)
from galmorph.deblending import deblend
from galmorph.noise import CorrelatedNoise, GaussianNoise, LearnedNoise

torch = pytest.importorskip("torch")

SHAPE = (31, 33)
EXACT = MAPFitter(dtype="float64")
PRIORS = {"flux": Normal(450, 60), "n": LogNormal(1.4, 0.5), "ellip": Uniform(0, 0.7)}
# what chains promise of each coordinate, and a little more than what 1,000 weighted draws are worth
ESS = {"mcmc": 400, "importance": 700}


def gaussian_psf(sigma=1.3, size=17):
    y, x = np.mgrid[:size, :size] - size // 2
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


@pytest.fixture(scope="module")
def psf():
    return gaussian_psf()


@pytest.fixture(scope="module")
def pair(psf):
    """Two Sérsic profiles at a S/N of about 50, and their fit."""
    params = np.array([[500, 13, 15, 3, 1.5, 0.3, 0.4], [400, 19, 16.5, 2.5, 1, 0.2, 1.2]])
    image = SersicGalaxy2D(psf=psf).render(SHAPE, params=params).sum(0)
    image += np.random.default_rng(4).normal(0, 0.25, SHAPE)
    return deblend(
        image,
        params[:, 1:3] + 0.1,
        model=SersicGalaxy2D(),
        fitter=MAPFitter(dtype="float64", priors=PRIORS),
        psf=psf,
        uncertainty=0.25,
        position_prior=0.3,
    )


def target_of(result, seed=0):
    """The target of the first group of a result, and the coordinates of its fit."""
    from galmorph._scene_target import _start
    from galmorph._scenes import Work, _light

    scene = result._scene()
    work = Work(result._fitter, result._background)
    work.prepare([scene])
    start = _start(scene, scene.groups[0], _light(scene), work, (seed,))
    return start.target, start.v


# -- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["importance", "mcmc"])
def test_draws_of_a_linear_scene_have_the_moments_of_the_normal_equations(psf, rng, method):
    params = np.array([[300, 13, 15, 3, 1.5, 0.3, 0.4], [200, 17, 16, 2.5, 1, 0.2, 1.2]])
    models = [SersicGalaxy2D(*p, psf=psf) for p in params]
    for model in models:
        for name in ("r_eff", "n", "ellip", "theta"):
            model.fixed[name] = True
    columns = np.stack(
        [m.render(SHAPE).ravel() / m.flux for m in models] + [np.ones(np.prod(SHAPE))]
    )
    sigma = rng.uniform(0.3, 0.6, SHAPE)
    image = ([300, 200, 0.5] @ columns).reshape(SHAPE) + rng.normal(0, sigma)
    result = deblend(
        image,
        params[:, 1:3],
        model=models,
        fitter=EXACT,
        psf=psf,
        uncertainty=sigma,
        position_prior=0,
        background="constant",
    )
    draws = result.sample(1000, rng=1, method=method)
    white = columns / sigma.ravel()
    cov = np.linalg.inv(white @ white.T)
    mean = (cov @ white @ (image / sigma).ravel())[:2]
    cov = cov[:2, :2]
    assert cov[0, 1] < -0.1 * np.sqrt(cov[0, 0] * cov[1, 1])
    y = np.linalg.solve(np.linalg.cholesky(cov), draws[:, :, 0] - mean[:, None])
    assert np.abs(y.mean(1)).max() < 4 / np.sqrt(ESS[method])
    assert_allclose(np.cov(y), np.eye(2), atol=4 * np.sqrt(2 / ESS[method]))
    assert_allclose(draws[:, :, 1:], np.broadcast_to(params[:, None, 1:], (2, 1000, 6)))


def test_the_density_is_that_of_the_images_and_the_priors(pair, psf):
    target, _ = target_of(pair)
    values = torch.as_tensor(pair.sample(60, rng=2).transpose(1, 0, 2).reshape(60, 14).copy())
    rows = torch.zeros(60, dtype=torch.long)
    v = target.from_params(values, values[:, :0], rows)
    assert_allclose(target.to_params(v, rows), values, rtol=1e-9, atol=1e-9)
    found = target.log_prob(v, rows) - target.log_stretch(v, rows)
    own = values.numpy().reshape(60, 2, 7)
    image = SersicGalaxy2D(psf=psf).render(SHAPE, params=own.reshape(-1, 7))
    rest = (pair.data - image.reshape(60, 2, *SHAPE).sum(1)) * pair.inv_sigma
    expected = -0.5 * (rest**2).sum((1, 2))
    expected += stats.norm(pair.xy, 0.3).logpdf(own[..., 1:3]).sum((1, 2))
    for i, name in ((0, "flux"), (4, "n")):
        expected += PRIORS[name].log_prob(own[..., i]).sum(1)
    expected -= np.log(own[..., 3]).sum(1)  # radii are equally likely in their logarithm
    assert np.ptp(expected) > 5
    assert np.ptp(found.numpy() - expected) < 1e-2  # images are exact to some 1e-4 of the peak


NOISES = {
    "plain": None,
    "correlated": CorrelatedNoise([[0.0, 0.2, 0.0], [0.2, 1.0, 0.2], [0.0, 0.2, 0.0]]),
    "scaled": GaussianNoise(scale="free", floor=0.1),
    "misfit": LearnedNoise(),
}


@pytest.fixture(scope="module")
def mixed(psf):
    """A scene of all kinds of models."""
    learned = LearnedGalaxy2D.from_pretrained()
    models = [SersicGalaxy2D(), learned, BulgeDiskGalaxy2D(), PointSource2D()]
    xy = np.array([[9.0, 12.0], [21.0, 13.0], [14.0, 21.0], [25.0, 22.0]])
    size = SersicGalaxy2D(250, *xy[0], 2.5, 1.2, 0.3, 0.5, psf=psf).render(SHAPE)
    for (x, y), flux in zip(xy[1:], (300, 350, 80), strict=True):
        size += SersicGalaxy2D(flux, x, y, 2.2, 1.5, 0.2, 1.0, psf=psf).render(SHAPE)
    image = size + 0.3 + np.random.default_rng(8).normal(0, 0.3, SHAPE)
    options = {"model": models, "psf": psf, "uncertainty": 0.3, "background": "tilted"}
    return image, xy, options


@pytest.mark.parametrize("noise", NOISES)
def test_the_slope_is_that_of_finite_differences(mixed, noise):
    image, xy, options = mixed
    fitter = MAPFitter(dtype="float64", noise=NOISES[noise], priors={"n": LogNormal(1.5, 0.5)})
    result = deblend(image, xy, fitter=fitter, position_prior=[0.5, 0.5, 0.5, 0], **options)
    target, v = target_of(result)
    free = [7, len(result.params[1]), len(result.params[2]), 1]
    assert target.size == sum(free) + 3
    rows = torch.zeros(1, dtype=torch.long)
    width = 1 / torch.sqrt(torch.diagonal(target.curvature(v), dim1=1, dim2=2))
    at = v + 0.3 * width * torch.as_tensor(np.random.default_rng(0).normal(size=v.shape))
    value, slope = target.log_prob_and_slope(at, rows)
    assert_allclose(value, target.log_prob(at, rows), rtol=1e-9)
    step = torch.diag(1e-3 * width[0])
    every = torch.zeros(target.size, dtype=torch.long)
    numeric = (target.log_prob(at + step, every) - target.log_prob(at - step, every)) / 2e-3
    assert_allclose((slope * width)[0], numeric, atol=2e-3 * max(1, float(numeric.abs().max())))


# -- what comes back -------------------------------------------------------------------------


def test_weighted_draws_and_chains_agree(pair):
    draws = {m: pair.sample(1000, rng=3, method=m)[..., :6] for m in ESS}
    weighted, chains = draws["importance"], draws["mcmc"]
    width = weighted.std(1)
    error = np.sqrt(sum(1 / ess for ess in ESS.values()))
    assert np.abs((weighted.mean(1) - chains.mean(1)) / width).max() < 4 * error
    assert np.abs(np.log(chains.std(1) / width)).max() < 4 * error / np.sqrt(2)
    flux = np.corrcoef(weighted[:, :, 0])[0, 1], np.corrcoef(chains[:, :, 0])[0, 1]
    assert max(flux) < -0.3
    assert abs(flux[0] - flux[1]) < 4 * error


def test_intervals_hold_the_truth_as_often_as_they_say(psf):
    priors = {
        "flux": Normal(400, 80),
        "r_eff": LogNormal(2.2, 0.2),
        "n": LogNormal(1.2, 0.2),
        "ellip": Uniform(0, 0.6),
    }
    count, shape, rng = 40, (25, 26), np.random.default_rng(11)
    given, spread = np.array([[10.0, 12.0], [15.5, 13.0]]), 0.4
    truth = np.empty((count, 2, 7))
    for i, name in ((0, "flux"), (3, "r_eff"), (4, "n"), (5, "ellip")):
        truth[..., i] = priors[name].sample(2 * count, rng).reshape(count, 2)
    truth[..., 1:3] = given + rng.normal(0, spread, (count, 2, 2))
    truth[..., 6] = rng.uniform(-np.pi / 2, np.pi / 2, (count, 2))
    images = SersicGalaxy2D(psf=psf).render(shape, params=truth.reshape(-1, 7))
    images = images.reshape(count, 2, *shape).sum(1) + rng.normal(0, 0.6, (count, *shape))
    results = deblend(
        images,
        [given] * count,
        model=SersicGalaxy2D(),
        fitter=MAPFitter(priors=priors),
        psf=psf,
        uncertainty=0.6,
        position_prior=spread,
    )
    draws = [r.sample(300, rng=i, method="importance") for i, r in enumerate(results)]
    share = np.array([(d < t[:, None]).mean(1) for d, t in zip(draws, truth, strict=True)])
    inside = (np.abs(share[..., :6] - 0.5) < 0.3413).mean(0)
    # the two sources of a blend are not independent: as if there were one
    error = np.sqrt(0.683 * 0.317 / count)
    assert_allclose(inside.mean(0), 0.683, atol=3 * error)


@pytest.fixture(scope="module")
def stars(psf):
    """Two pairs of stars, too far from one another to be one group; none in the middle."""
    star = PointSource2D()
    xy = np.array([[14.0, 15.0], [16.5, 15.0], [225.0, 15.0], [227.5, 16.0]])
    params = np.column_stack([[100, 80, 120, 90], xy])
    image = star.render((31, 241), params=params, psf=psf).sum(0)
    image += np.random.default_rng(2).normal(0, 0.3, image.shape)
    return deblend(
        image, xy, model=star, fitter=EXACT, psf=psf, uncertainty=0.3, position_prior=0.2
    )


@pytest.mark.parametrize("method", ["laplace", "importance"])
def test_draws_are_repeatable_and_those_of_groups_independent(stars, method):
    assert len(set(stars.group)) == 2
    draws = stars.sample(600, rng=5, method=method)
    assert_array_equal(draws, stars.sample(600, rng=5, method=method))
    assert_array_equal(draws, stars.sample(600, rng=np.random.default_rng(5), method=method))
    assert (draws != stars.sample(600, rng=6, method=method)).any()
    corr = np.corrcoef(draws[:, :, 0])
    assert corr[0, 1] < -0.3 > corr[2, 3]
    assert np.abs(corr[:2, 2:]).max() < 4 / np.sqrt(600)
    for k in range(4):  # nearly normal: as the fit says, and where the image says
        width = np.sqrt(np.diag(stars.cov)[3 * k : 3 * k + 3])
        assert np.abs((draws[k].mean(0) - stars.params[k]) / width).max() < 0.25
        assert_allclose(draws[k].std(0), width, rtol=0.25)


def test_a_group_is_drawn_given_what_the_models_of_others_leave(psf, rng):
    xy, star = np.array([[14.0, 15.0], [17.0, 15.5]]), PointSource2D()
    unit = star.render(SHAPE, params=np.column_stack([np.ones(2), xy]), psf=psf).reshape(2, -1)
    image = ([200, 150] @ unit).reshape(SHAPE) + rng.normal(0, 0.4, SHAPE)
    options = {"model": star, "fitter": EXACT, "psf": psf, "uncertainty": 0.4, "max_group": 1}
    result = deblend(image, xy, position_prior=0, **options)
    assert len(set(result.group)) == 2
    flux = result.sample(2000, rng=1, method="importance")[:, :, 0]
    width = 0.4 / np.sqrt((unit**2).sum(1))
    for k in (0, 1):
        alone = image.ravel() - result.flux[1 - k] * unit[1 - k]
        mean = alone @ unit[k] / (unit[k] @ unit[k])
        assert abs(flux[k].mean() - mean) < 4 * width[k] / np.sqrt(1000)
        assert_allclose(flux[k].std(), width[k], rtol=4 / np.sqrt(2 * 1000))


def test_copies_draw_the_same(stars):
    draws = stars.sample(20, rng=1, method="importance")
    for other in (pickle.loads(pickle.dumps(stars)), copy.deepcopy(stars), copy.copy(stars)):
        assert_array_equal(other.sample(20, rng=1, method="importance"), draws)


def test_a_learned_galaxy_and_a_star_are_sampled_and_unfinished_chains_are_told(
    psf, rng, monkeypatch
):
    from galmorph import _sampling, _scene_target

    monkeypatch.setattr(_sampling, "_PILOT_OF_MANY", (200,))
    monkeypatch.setattr(_scene_target, "_DRAWS", 30)
    monkeypatch.setattr(_scene_target, "_BLOCKS", 1)
    learned, star = LearnedGalaxy2D.from_pretrained(), PointSource2D()
    for name in learned.param_names[8:]:
        getattr(learned, name).fixed = True
    image = SersicGalaxy2D(400, 11, 12, 2.5, 1.2, 0.3, 0.5, psf=psf).render((25, 26))
    image += PointSource2D(100, 17, 13, psf=psf).render((25, 26)) + rng.normal(0, 0.3, (25, 26))
    result = deblend(
        image,
        np.array([[11, 12], [17, 13], [99, 99]]),
        model=[learned, star, star],
        psf=psf,
        uncertainty=0.3,
        position_prior=0.3,
    )
    result.ids[:] = [7, 3, 9]
    with pytest.warns(AstropyUserWarning, match=r"chains of sources 3, 7 did not converge"):
        draws = result.sample(120, rng=1, method="mcmc")
    assert [d.shape for d in draws] == [(120, 37), (120, 3), (120, 3)]
    assert np.isfinite(draws[0]).all()
    assert np.isfinite(draws[1]).all()
    assert np.isnan(draws[2]).all()
    assert np.ptp(draws[0][:, 8:], axis=0).max() < 1e-9
    assert np.ptp(draws[0][:, :8], axis=0).min() > 0
    assert abs(draws[1][:, 0].mean() - 100) < 20


def test_what_can_not_be_drawn_is_said(pair):
    with pytest.raises(ValueError, match="method must be one of"):
        pair.sample(10, method="nested")
    with pytest.raises(ValueError, match="n must be a positive integer"):
        pair.sample(0)
    band = copy.copy(pair)
    band._fitter = None
    with pytest.raises(ValueError, match="posterior of all bands"):
        band.sample(10, method="mcmc")
