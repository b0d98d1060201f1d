"""Scenes: several sources that share pixels."""

import astropy.units as u
import numpy as np
import pytest
from astropy.nddata import CCDData, StdDevUncertainty
from astropy.table import Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose
from scipy import stats

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    FitFlag,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    MAPFitter,
    MCMCFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    fit_images,
)
from galmorph.deblending import deblend
from galmorph.noise import LearnedNoise

pytest.importorskip("torch")

SHAPE = (41, 45)
EXACT = MAPFitter(dtype="float64", priors={})


def gaussian_psf(sigma=1.3, size=25):
    y, x = np.mgrid[:size, :size] - size // 2
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


@pytest.fixture(scope="module")
def psf():
    return gaussian_psf()


@pytest.fixture(scope="module")
def pair(psf):
    """Two Sérsic profiles: parameters and images."""
    params = np.array([[500, 18, 20, 3, 1.5, 0.3, 0.4], [300, 25, 22, 2.5, 1, 0.2, 1.2]])
    return params, SersicGalaxy2D(psf=psf).render(SHAPE, params=params)


# -- closed forms ----------------------------------------------------------------------------


def test_fluxes_of_stars_that_are_held_are_those_of_the_linear_model(psf, rng):
    xy = np.array([[18.0, 20.0], [21.5, 20.5], [30.0, 24.0]])
    star = PointSource2D(psf=psf)
    unit = star.render(SHAPE, params=np.column_stack([np.ones(3), xy])).reshape(3, -1)
    sigma = rng.uniform(0.5, 1.5, SHAPE)
    image = ([300, 200, 100] @ unit).reshape(SHAPE) + rng.normal(0, sigma)
    result = deblend(
        image, xy, model=star, fitter=EXACT, uncertainty=sigma, psf=psf, position_prior=0
    )
    white = unit / sigma.ravel()
    cov = np.linalg.inv(white @ white.T)
    assert_allclose(result.flux_cov, cov, rtol=1e-4, atol=1e-6 * cov[0, 0])
    assert_allclose(result.flux, cov @ white @ (image / sigma).ravel(), rtol=1e-5)
    assert_allclose(result.params[:, 1:], xy, atol=1e-12)
    assert_allclose(result.flux_err**2, np.diag(cov), rtol=1e-4)


def test_a_background_is_marginalised_as_in_the_linear_model(psf, rng):
    xy = np.array([[18.0, 20.0], [21.5, 20.5]])
    star = PointSource2D(psf=psf)
    unit = star.render(SHAPE, params=np.column_stack([np.ones(2), xy])).reshape(2, -1)
    columns = np.concatenate([unit, np.ones((1, unit.shape[1]))])
    image = ([300, 200, 2] @ columns).reshape(SHAPE) + rng.normal(0, 0.7, SHAPE)
    result = deblend(
        image,
        xy,
        model=star,
        fitter=EXACT,
        uncertainty=0.7,
        psf=psf,
        position_prior=0,
        background="constant",
    )
    cov = np.linalg.inv(columns @ columns.T) * 0.7**2
    best = cov @ columns @ image.ravel() / 0.7**2
    assert_allclose(result.flux_cov, cov[:2, :2], rtol=1e-4)
    assert_allclose(result.flux, best[:2], rtol=1e-5)
    assert_allclose(result.background_image, best[2], rtol=1e-4)
    # images are good to 2e-5 of the peak (see rendering.transfer)
    peak = 300 * unit[0].max()
    residual = (image.ravel() - best @ columns).reshape(SHAPE)
    assert_allclose(result.residual_image, residual, atol=2e-5 * peak, rtol=0)


def test_the_prior_of_the_position_adds_its_precision(psf):
    star = PointSource2D(40, 20, 20, psf=psf)
    image = star.render(SHAPE)
    width = 0.3
    loose, tight = (
        deblend(image, (20, 20), model=star, fitter=EXACT, uncertainty=1.0, position_prior=p)
        for p in (1e3, width)
    )
    precision = [1 / np.diagonal(r.cov)[1:3] for r in (loose, tight)]
    assert_allclose(precision[1] - precision[0], 1 / width**2, rtol=1e-3)


def test_a_symmetric_blend_has_equal_fluxes(psf):
    model = SersicGalaxy2D(psf=psf)
    params = [[100, 18, 20, 3, 1, 0.3, 0.0], [100, 26, 20, 3, 1, 0.3, 0.0]]
    image = model.render((41, 45), params=params).sum(0)
    result = deblend(image, [(18, 20), (26, 20)], model=model, fitter=EXACT, uncertainty=0.1)
    assert_allclose(result.flux, 100, rtol=1e-4)
    assert_allclose(result.flux_cov[0, 0], result.flux_cov[1, 1], rtol=1e-3)
    assert_allclose(*result.blendedness, rtol=1e-3)


def test_blendedness_and_purity_are_as_defined(pair, psf):
    params, images = pair
    result = deblend(
        images.sum(0), params[:, 1:3], model=SersicGalaxy2D(), psf=psf, uncertainty=0.1
    )
    total = images.sum(0)
    blend = 1 - (images**2).sum((1, 2)) / (images * total).sum((1, 2))
    purity = (images**2 / total).sum((1, 2)) / images.sum((1, 2))
    assert_allclose(result.blendedness, blend, rtol=5e-3)
    assert_allclose(result.purity, purity, rtol=5e-3)


def test_one_source_is_fitted_as_a_single_galaxy(pair, psf, rng):
    _, images = pair
    image = images[0] + rng.normal(0, 0.3, SHAPE)
    fitter = MAPFitter(dtype="float64")
    alone = fit_images(
        image, SersicGalaxy2D(), fitter, uncertainty=0.3, psf=psf, positions=[(18, 20)]
    )
    scene = deblend(
        image,
        [(18, 20)],
        model=SersicGalaxy2D(),
        fitter=fitter,
        uncertainty=0.3,
        psf=psf,
        position_prior=100.0,
    )
    assert_allclose(scene.params, alone.params, rtol=1e-3, atol=1e-3)


def test_one_source_in_a_large_image(psf, rng):
    """Its group is not the whole image."""
    truth = SersicGalaxy2D(900, 210, 64, r_eff=4, n=1.5, ellip=0.3, theta=0.5)
    image = truth.render((180, 320), psf=psf) + rng.normal(0, 0.2, (180, 320))
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": 0.2}
    result = deblend(image, [(210, 64)], **options)
    assert np.abs(result.flux[0] - 900) < 4 * result.flux_err[0]
    assert np.nanstd(result.residual_image) < 1.02 * 0.2
    two = deblend([image, image[:, :150]], [[(210, 64)], [(75, 90)]], **options)
    assert np.allclose(two[0].params, result.params, rtol=1e-4)


# -- statistics ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(psf):
    """120 noisy blends of two Sérsic profiles and their truth."""
    rng = np.random.default_rng(5)
    count = 120
    params = np.empty((count, 2, 7))
    apart = rng.uniform(5, 10, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    for k, sign in enumerate((-0.5, 0.5)):
        params[:, k, 0] = rng.uniform(400, 1500, count)
        params[:, k, 1] = 20 + sign * apart * np.cos(angle)
        params[:, k, 2] = 20 + sign * apart * np.sin(angle)
        params[:, k, 3] = rng.uniform(1.5, 3.5, count)
        params[:, k, 4] = np.exp(rng.normal(np.log(2), 0.3, count))
        params[:, k, 5] = rng.uniform(0.1, 0.6, count)
        params[:, k, 6] = rng.uniform(0, np.pi, count)
    model = SersicGalaxy2D(psf=psf)
    images = sum(model.render((41, 41), params=params[:, k]) for k in (0, 1))
    data = images + rng.normal(0, 0.5, images.shape)
    given = params[:, :, 1:3] + rng.normal(0, 0.2, (count, 2, 2))
    results = deblend(
        data,
        list(given),
        model=SersicGalaxy2D(),
        uncertainty=0.5,
        psf=psf,
        position_prior=0.2,
        structure=0,  # the model is true
    )
    return params, data, given, results


def test_pulls_of_fluxes_are_standard_normal(many):
    truth, _, _, results = many
    pulls = np.array([(r.flux - t[:, 0]) / r.flux_err for t, r in zip(truth, results, strict=True)])
    held = np.mean(np.abs(pulls) < 1)
    # 240 fluxes, two by two: 68 % within three standard deviations of a proportion
    assert abs(held - 0.683) < 3 * np.sqrt(0.683 * 0.317 / pulls.size)
    assert np.mean(np.abs(pulls) > 4) < 0.02


def test_joint_covariance_describes_the_errors_of_both_fluxes(many):
    truth, _, _, results = many
    square = []
    for t, r in zip(truth, results, strict=True):
        error = r.flux - t[:, 0]
        square.append(error @ np.linalg.solve(r.flux_cov, error))
    # by chance one in a thousand sets has a smaller p; the tails of single galaxies are longer
    assert stats.kstest(square, "chi2", args=(2,)).pvalue > 1e-3


def test_a_batch_is_the_same_as_one_at_a_time(many, psf):
    _, data, given, results = many
    for i in (0, 7, 33):
        alone = deblend(
            data[i],
            given[i],
            model=SersicGalaxy2D(),
            uncertainty=0.5,
            psf=psf,
            position_prior=0.2,
        )
        assert_allclose(alone.flux, results[i].flux, rtol=1e-3)


def test_deblended_images_add_up_to_the_data(many):
    _, data, _, results = many
    shared = results[3].deblended_images
    light = results[3].model_image > 0
    assert_allclose(shared.sum(0)[light], data[3][light], atol=1e-9)
    assert light.mean() > 0.99


def test_draws_have_the_covariance_of_the_fit(many):
    result = many[3][0]
    draws = result.sample(4000, rng=1)
    assert_allclose(draws, result.sample(4000, rng=1))
    assert draws.shape == (2, 4000, 7)
    flux = draws[..., 0]
    assert_allclose(np.cov(flux), result.flux_cov, atol=0.08 * result.flux_cov[0, 0])
    assert_allclose(flux.mean(1), result.flux, atol=4 * result.flux_err.max() / np.sqrt(4000))
    assert (draws[..., 3:5] > 0).all()


def test_blends_of_galsim(rng):
    galsim = pytest.importorskip("galsim")
    star = galsim.Gaussian(fwhm=3)
    one = 800 * galsim.Sersic(n=1, half_light_radius=3).shear(q=0.6, beta=0.5 * galsim.radians)
    two = 300 * galsim.Sersic(n=2.5, half_light_radius=2)
    image = galsim.Image(48, 48, scale=1)
    for galaxy, at in ((one, (20, 23)), (two, (27, 25))):
        offset = np.array(at) - 23.5
        galsim.Convolve(galaxy, star).drawImage(
            image, offset=offset, method="no_pixel", add_to_image=True
        )
    data = image.array + rng.normal(0, 0.2, (48, 48))
    psf = PSF(star.drawImage(nx=25, ny=25, scale=1, method="no_pixel").array)
    result = deblend(data, [(20, 23), (27, 25)], model=SersicGalaxy2D(), psf=psf, uncertainty=0.2)
    assert (np.abs(result.flux - [800, 300]) < 3.5 * result.flux_err).all()
    assert (np.abs(result.params[:, 3] - [3 / np.sqrt(0.6), 2]) < 0.5).all()
    assert not result.flags.any()


# -- models ----------------------------------------------------------------------------------


def test_models_may_be_mixed(psf, rng):
    models = [
        BulgeDiskGalaxy2D(psf=psf),
        PointSource2D(psf=psf),
        GaussianGalaxy2D(psf=psf),
        SersicGalaxy2D(psf=psf),
    ]
    params = [
        _bulge_disk(models[0]),
        [300, 24, 17],
        [300, 32, 30, 2.5, 0.2, 0.5],
        [400, 14, 31, 2.5, 1.5, 0.3, 0.1],
    ]
    image = sum(m.render((45, 45), params=[p])[0] for m, p in zip(models, params, strict=True))
    xy = [p[1:3] for p in params]
    data = image + rng.normal(0, 0.3, image.shape)
    result = deblend(data, xy, model=models, uncertainty=0.3)
    assert [len(p) for p in result.params] == [len(p) for p in params]
    assert (np.abs(result.flux - [p[0] for p in params]) < 4 * result.flux_err).all()
    table = result.to_table()
    assert table["model"].tolist()[1] == "PointSource2D"
    assert np.ma.is_masked(table["n"][1]) or not np.isfinite(table["n"][1])
    size = sum(len(p) for p in params)
    assert result.cov.shape == (size, size)
    assert [d.shape for d in result.sample(5, rng=1)] == [(5, len(p)) for p in params]


def _bulge_disk(model):
    values = {
        "flux": 900,
        "x_0": 15,
        "y_0": 15,
        "bulge_fraction": 0.3,
        "r_bulge": 1.5,
        "n_bulge": 3,
        "ellip_bulge": 0.1,
        "theta_bulge": 0.2,
        "r_disk": 4,
        "ellip_disk": 0.3,
        "theta_disk": 0.2,
    }
    return [values[name] for name in model.param_names]


def test_learned_galaxies_are_recovered(psf, rng):
    model = LearnedGalaxy2D.from_pretrained(psf=psf)
    params = model.sample(2, rng=3)
    params[:, :5] = [[2000, 20, 22, 4, 0.3], [1200, 29, 25, 3.5, 2.0]]
    image = model.render((48, 48), params=params).sum(0) + rng.normal(0, 0.5, (48, 48))
    # the default model, which is true
    result = deblend(image, params[:, 1:3], psf=psf, uncertainty=0.5, structure=0)
    assert type(result.models[0]) is LearnedGalaxy2D
    assert (np.abs(result.flux - params[:, 0]) < 3.5 * result.flux_err).all()
    assert np.nanstd(result.residual_image) < 1.1 * 0.5
    noise = MAPFitter(noise=LearnedNoise())
    wary = deblend(image, params[:, 1:3], model=model, fitter=noise, uncertainty=0.5)
    # the misfit only ever adds to what is not known
    assert (wary.flux_err > 0.99 * result.flux_err).all()


def test_fixed_parameters_bounds_and_priors_hold(pair, psf, rng):
    params, images = pair
    model = SersicGalaxy2D(n=1.0, fixed={"n": True}, bounds={"r_eff": (0.5, 2.0)}, psf=psf)
    image = images.sum(0) + rng.normal(0, 0.3, SHAPE)
    result = deblend(image, params[:, 1:3], model=model, uncertainty=0.3)
    assert_allclose(result.params[:, 4], 1.0)
    assert (result.params[:, 3] <= 2.0 + 1e-9).all()
    assert result.flags[0] & FitFlag.AT_BOUND
    fitter = MAPFitter(priors={"flux": Normal(100, 1e-3)})
    result = deblend(
        image, params[:, 1:3], model=SersicGalaxy2D(), fitter=fitter, psf=psf, uncertainty=0.3
    )
    assert_allclose(result.flux, 100, rtol=1e-3)


# -- what goes in and comes out --------------------------------------------------------------


def test_sources_may_be_a_table_a_segmentation_or_on_the_sky(pair, psf):
    params, images = pair
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [10, 20]
    wcs.wcs.crpix, wcs.wcs.cdelt = [20, 20], [-1e-4, 1e-4]
    image = CCDData(
        images.sum(0), unit="uJy", wcs=wcs, uncertainty=StdDevUncertainty(0.3 + 0 * images[0])
    )
    xy = params[:, 1:3]
    segments = np.zeros(SHAPE, dtype=int)
    segments[15:26, 12:22], segments[17:28, 22:31] = 4, 9
    options = {"model": SersicGalaxy2D(), "psf": psf}
    first = deblend(image, xy, **options)
    table = first.to_table()
    for sources in (
        Table({"x": xy[:, 0], "y": xy[:, 1], "label": [4, 9]}),
        wcs.pixel_to_world(*xy.T),
        segments,
    ):
        other = deblend(image, sources, **options)
        assert_allclose(other.flux, params[:, 0], rtol=5e-3)
    assert other.ids.tolist() == [4, 9]
    assert set(np.unique(other.to_segmentation().data)) == {0, 4, 9}
    assert table["flux"].unit == u.uJy
    sky = wcs.pixel_to_world(*first.params[:, 1:3].T)
    assert table["sky_centroid"].separation(sky).arcsec.max() < 1e-6
    assert {"blendedness", "purity", "group", "r_eff_arcsec"} <= set(table.colnames)


def test_fields_are_solved_in_groups(psf, rng):
    side, count = 260, 40
    y, x = np.mgrid[20:side:44, 20:side:44]
    xy = np.column_stack([x.ravel(), y.ravel()])[:count].astype(float)
    xy[1::2] -= [25, 0]  # pairs, 19 apart
    params = np.column_stack(
        [
            rng.uniform(500, 3000, len(xy)),
            xy,
            rng.uniform(2, 4, len(xy)),
            rng.uniform(0.8, 2, len(xy)),
            rng.uniform(0, 0.5, len(xy)),
            rng.uniform(0, np.pi, len(xy)),
        ]
    )
    model = SersicGalaxy2D(psf=psf)
    image = model.render((side, side), params=params).sum(0) + rng.normal(0, 0.7, (side, side))
    bad = np.concatenate([xy, [[-5.0, 3.0]]])
    calls = []
    result = deblend(
        image,
        bad,
        model=model,
        uncertainty=0.7,
        max_group=3,
        structure=0,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert np.bincount(result.group[result.group >= 0]).max() in (2, 3)
    assert result.flags[-1] & FitFlag.OUTSIDE
    assert np.isnan(result.flux[-1])
    pulls = (result.flux[:-1] - params[:, 0]) / result.flux_err[:-1]
    assert abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.217 / len(xy))
    assert np.nanstd(result.residual_image) < 1.02 * 0.7
    assert calls[-1][0] == len(xy)
    covariance = result.flux_cov[:-1, :-1]
    apart = result.group[:-1, None] != result.group[None, :-1]
    assert (covariance[apart] == 0).all()
    assert (np.diagonal(covariance) > 0).all()


def test_groups_in_turns_agree_with_all_at_once(pair, psf, rng):
    params, images = pair
    image = images.sum(0) + rng.normal(0, 0.3, SHAPE)
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": 0.3}
    together = deblend(image, params[:, 1:3], **options)
    in_turns = deblend(image, params[:, 1:3], max_group=1, **options)
    assert in_turns.group.tolist() == [0, 1]
    assert (np.abs(together.flux - in_turns.flux) < 0.5 * together.flux_err).all()


# -- bad input -------------------------------------------------------------------------------


def test_bad_sources_are_flagged_and_the_others_done(pair, psf, rng):
    params, images = pair
    image = images.sum(0) + rng.normal(0, 0.3, SHAPE)
    image[:, :6] = np.nan
    sigma = np.full(SHAPE, 0.3)
    sigma[-5:] = 0.0
    xy = np.array([*params[:, 1:3], [1.0, 10.0], [500.0, 3.0], [np.nan, 4.0]])
    result = deblend(image, xy, model=SersicGalaxy2D(), psf=psf, uncertainty=sigma)
    assert result.failed.tolist() == [False, False, True, True, True]
    assert result.flags[2] & FitFlag.NO_DATA
    assert (result.flags[3:] & FitFlag.OUTSIDE).all()
    assert (result.flags & FitFlag.BAD_UNCERTAINTY).all()
    assert (np.abs(result.flux[:2] - params[:, 0]) < 4 * result.flux_err[:2]).all()
    assert np.isnan(result.flux_err[2:]).all()
    assert np.isfinite(result.deblended_images).all()
    assert len(result.to_table()) == 5


def test_two_positions_on_one_pixel_share_the_light(pair, psf, rng):
    _, images = pair
    image = images[0] + rng.normal(0, 0.3, SHAPE)
    result = deblend(image, [(18, 20), (18, 20)], model=SersicGalaxy2D(), psf=psf, uncertainty=0.3)
    assert_allclose(result.flux.sum(), 500, rtol=0.1)
    ok = np.isfinite(result.flux_cov).all()
    assert ok or (result.flags & FitFlag.BAD_COVARIANCE).all()
    if ok:  # neither is known, their sum is
        assert result.flux_cov[0, 1] < 0


def test_noise_is_estimated_and_flagged(pair, psf, rng):
    params, images = pair
    big = np.pad(images.sum(0), 30)
    big += rng.normal(0, 0.3, big.shape)
    result = deblend(big, params[:, 1:3] + 30, model=SersicGalaxy2D(), psf=psf)
    assert (result.flags & FitFlag.NOISE_ESTIMATED).all()
    assert_allclose(1 / result.inv_sigma.max(), 0.3, rtol=0.1)


def test_nothing_to_fit_is_an_empty_result(psf):
    image = np.random.default_rng(1).normal(size=(30, 30))
    for sources in (np.empty((0, 2)), Table(), np.zeros((30, 30), dtype=int)):
        result = deblend(image, sources, model=SersicGalaxy2D(), uncertainty=1.0)
        assert len(result) == 0
        assert len(result.to_table()) == 0
        assert result.model_images.shape == (0, 30, 30)
        assert_allclose(result.residual_image, image)


def test_a_blank_image_is_flagged_and_the_other_done(pair, psf, rng):
    params, images = pair
    cube = np.stack([images.sum(0), np.full(SHAPE, np.nan)]) + rng.normal(0, 0.3, (2, *SHAPE))
    good, blank = deblend(
        cube, [params[:, 1:3]] * 2, model=SersicGalaxy2D(), psf=psf, uncertainty=0.3
    )
    assert blank.failed.all()
    assert not good.failed.any()


def test_one_group_that_fails_is_flagged_and_the_others_done(psf, rng, monkeypatch):
    from galmorph import _scenefit

    def fails(setups, batch, **kwargs):
        if batch.data.max() > 1e3:
            raise RuntimeError("no solution")
        return fit_scenes(setups, batch, **kwargs)

    fit_scenes = _scenefit.fit_scenes
    monkeypatch.setattr(_scenefit, "fit_scenes", fails)
    star = PointSource2D(psf=psf)
    params = [[100, 20, 20], [1e6, 60, 20], [200, 100, 20]]
    image = star.render((41, 121), params=params).sum(0) + rng.normal(0, 0.3, (41, 121))
    xy = np.array(params)[:, 1:]
    result = deblend(image, xy, model=star, uncertainty=0.3, max_group=1)
    assert result.failed.tolist() == [False, True, False]
    assert "no solution" in result.meta["errors"]["1"]
    assert_allclose(result.flux[[0, 2]], [100, 200], rtol=0.1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sources": None}, TypeError, "needs the sources"),
        ({"model": [SersicGalaxy2D()]}, ValueError, "1 models for 2 sources"),
        ({"model": "sersic"}, ValueError, "models for 2"),
        ({"model": PointSource2D()}, ValueError, "needs a psf"),
        ({"fitter": MCMCFitter()}, TypeError, "MAPFitter"),
        ({"background": "steep"}, ValueError, "background"),
        ({"position_prior": -1}, ValueError, "not negative"),
        ({"position_prior": [1, 2, 3]}, ValueError, "one a source"),
        ({"max_group": 0}, ValueError, "max_group"),
    ],
)
def test_wrong_arguments_are_told(change, error, text):
    arguments = {"sources": [(10, 10), (14, 10)], "model": SersicGalaxy2D(), "uncertainty": 1.0}
    arguments |= change
    with pytest.raises(error, match=text):
        deblend(np.zeros((30, 30)) + np.eye(30), arguments.pop("sources"), **arguments)


# -- the figure ------------------------------------------------------------------------------


def test_the_figure_of_a_scene(pair, psf, rng):
    plt = pytest.importorskip("matplotlib.pyplot")
    from galmorph.plot.scene import scene

    params, images = pair
    image = images.sum(0) + rng.normal(0, 0.3, SHAPE)
    image[:3] = np.nan
    xy = [*params[:, 1:3], (200, 3)]
    result = deblend(image, xy, model=SersicGalaxy2D(), psf=psf, uncertainty=0.3)
    axes = scene(result)
    assert [ax.get_title() for ax in axes] == ["Data", "Model", "Residual", "3 sources"]
    drawn = axes[2].images[0].get_array()
    assert_allclose(drawn.compressed(), (result.residual_image / 0.3)[3:].ravel())
    assert np.ma.getmaskarray(drawn)[:3].all()
    labels = {t.get_text(): t.get_position() for t in axes[3].texts}
    assert set(labels) == {"0", "1"}
    assert_allclose(labels["1"], result.params[1, 1:3])
    with pytest.raises(ValueError, match="four axes"):
        scene(result, axes=axes[:3])
    plt.close("all")


def test_classes_of_sources(psf, rng):
    """Those of each alone; none of a star, and of what is too faint."""
    from galmorph import GalaxyClassifier

    galaxy = SersicGalaxy2D(9000, 40, 32, r_eff=6, n=3, ellip=0.2).render((64, 80), psf=psf)
    others = SersicGalaxy2D(6000, 62, 34, r_eff=4, n=1).render((64, 80), psf=psf)
    others += PointSource2D().render((64, 80), params=[[2000, 12, 14]], psf=psf)[0]
    others += PointSource2D().render((64, 80), params=[[15, 10, 50]], psf=psf)[0]
    noise = rng.normal(0, 0.3, galaxy.shape)
    sersic, point = SersicGalaxy2D(), PointSource2D()
    result = deblend(
        galaxy + others + noise,
        [(40, 32), (62, 34), (12, 14), (10, 50)],
        model=[sersic, sersic, point, sersic],
        psf=psf,
        uncertainty=0.3,
    )
    found = result.class_probabilities()
    assert np.isfinite(found).all(1).tolist() == [True, True, False, False]
    assert np.allclose(found[:2].sum(1), 1)
    alone = GalaxyClassifier.from_pretrained().predict_proba(
        galaxy + noise, uncertainty=0.3, psf=psf, positions=[(40, 32)]
    )
    assert found[0].argmax() == alone[0].argmax()


def test_models_do_not_say_where_they_are_in_a_large_image(psf):
    image = np.random.default_rng(1).normal(0, 1, (220, 60))
    image += SersicGalaxy2D(2000, 30, 150, r_eff=3).render((220, 60), psf=psf)
    for options in ({"bounds": {"x_0": (20, 40)}}, {"fixed": {"y_0": True}}):
        with pytest.raises(ValueError, match="position_prior"):
            deblend(image, [(30, 150)], model=SersicGalaxy2D(**options), psf=psf, uncertainty=1.0)


def test_tolerance_ends_learned_scenes_early(psf):
    """Ends within what was promised of the minimum; intervals of fluxes hold; one step at least."""
    model = LearnedGalaxy2D.from_pretrained(psf=psf)
    rng = np.random.default_rng(31)
    count = 16
    params = model.sample(2 * count, rng).reshape(count, 2, -1)
    params[..., 0] = rng.uniform(400, 900, (count, 2))
    params[..., 1:3] = np.array([[16, 16], [22, 18]]) + rng.uniform(-0.5, 0.5, (count, 2, 2))
    params[..., 3] = rng.uniform(2.5, 3.5, (count, 2))
    params[..., 4] = rng.uniform(-np.pi, np.pi, (count, 2))
    shape = (35, 39)
    images = model.render(shape, params=params.reshape(2 * count, -1)).reshape(count, 2, *shape)
    data = images.sum(1) + rng.normal(0, 0.25, (count, *shape))
    options = {"model": model, "uncertainty": 0.25, "psf": psf, "structure": 0}
    found = {
        tolerance: deblend(
            data, list(params[..., 1:3]), fitter=MAPFitter(tolerance=tolerance), **options
        )
        for tolerance in (0.0, 1.0, np.inf)
    }
    flux, err, steps = (
        {t: np.array([getattr(r, n) for r in results]) for t, results in found.items()}
        for n in ("flux", "flux_err", "n_iter")
    )
    for tolerance, most in ((1.0, 0.1), (np.inf, 0.5)):
        inside = np.abs(flux[tolerance] - params[..., 0]) < err[tolerance]
        assert stats.binom.sf(inside.sum(), 2 * count, 0.68) > 1e-3
        assert stats.binom.cdf(inside.sum(), 2 * count, 0.68) > 1e-3
        assert (steps[tolerance] <= steps[0.0]).all()
        assert steps[tolerance].sum() < steps[0.0].sum()
        shift = np.abs(flux[tolerance] - flux[0.0]) / err[0.0]
        assert np.median(shift) <= most
