"""Sources that the detection missed, found in what a scene leaves."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from galmorph import PSF, LearnedGalaxy2D, PointSource2D, SersicGalaxy2D
from galmorph.deblending import deblend

pytest.importorskip("torch")

from galmorph._residuals import filters, find_peaks  # after torch is known to be there

SIGMA = 0.3


@pytest.fixture(scope="module")
def psf():
    y, x = np.mgrid[-12:13, -12:13]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))


@pytest.fixture(scope="module")
def host_and_companion(psf):
    """A bright galaxy with a faint one on its flank; parameters and noisy image."""
    params = np.array([[3000, 29, 30, 4, 1.2, 0.4, 0.5], [300, 37, 35, 2, 1, 0.2, 1.2]])
    image = SersicGalaxy2D(psf=psf).render((61, 61), params=params).sum(0)
    return params, image + np.random.default_rng(3).normal(0, SIGMA, (61, 61))


# -- filters ---------------------------------------------------------------------------------


def test_the_significance_of_noise_is_standard_normal_and_its_peaks_are_found(psf, rng):
    from galmorph._residuals import _matched, _shoulders

    sigma = rng.uniform(0.5, 2, (300, 300))
    noise, kernels = rng.normal(0, sigma), filters(psf)
    blank = np.zeros_like(noise)
    # one pixel in each area of the kernel, so that they are independent
    for value in (
        _matched(noise, 1 / sigma, kernels.matched[:1]),
        _shoulders(noise, blank, 1 / sigma, kernels.ring),
    ):
        assert stats.kstest(value[20:-20:12, 20:-20:12].ravel(), "norm").pvalue > 1e-3
    options = {"threshold": 5.5, "known": np.empty((0, 2))}
    assert not len(find_peaks(noise, blank, 1 / sigma, kernels, **options))


def test_the_significance_of_a_star_is_that_of_its_flux(psf):
    from galmorph._residuals import _matched

    star = PointSource2D(100, 30, 28, psf=psf).render((61, 61))
    flux_err = SIGMA / np.sqrt(((star / 100) ** 2).sum())
    found = _matched(star, np.full(star.shape, 1 / SIGMA), filters(psf).matched)
    assert np.unravel_index(found.argmax(), found.shape) == (28, 30)
    # the first kernel is a disk that is much smaller than the PSF
    assert_allclose(found.max(), 100 / flux_err, rtol=0.01)


# -- found -----------------------------------------------------------------------------------


def test_a_companion_that_was_left_out_is_found_with_its_flux(host_and_companion, psf):
    params, image = host_and_companion
    model = SersicGalaxy2D()
    result = deblend(image, params[:1, 1:3], model=model, psf=psf, uncertainty=SIGMA, find_missed=5)
    assert result.added.tolist() == [False, True]
    assert result.ids.tolist() == [0, 1]
    assert not result.flags.any()
    assert (np.abs(result.flux - params[:, 0]) < 3 * result.flux_err).all()
    assert np.hypot(*(result.params[1, 1:3] - params[1, 1:3])) < 0.5
    assert result.flux_cov[0, 1] < 0  # one group
    assert result.meta["missed"]["added"] == 1
    assert result.to_table()["added"].tolist() == [False, True]
    # the same as if it had been given
    both = deblend(image, params[:, 1:3], model=model, psf=psf, uncertainty=SIGMA)
    assert (np.abs(result.flux - both.flux) < 0.2 * both.flux_err).all()
    assert_allclose(result.flux_err, both.flux_err, rtol=0.05)


def test_nothing_is_looked_for_unless_asked(host_and_companion, psf):
    params, image = host_and_companion
    result = deblend(image, params[:1, 1:3], model=SersicGalaxy2D(), psf=psf, uncertainty=SIGMA)
    assert result.added.tolist() == [False]
    assert "missed" not in result.meta


def test_one_companion_a_round(psf, rng):
    params = np.array(
        [[4000, 35, 35, 5, 1, 0.2, 0.5], [400, 46, 35, 2, 1, 0, 0], [400, 26, 42, 2, 1, 0, 0]]
    )
    image = SersicGalaxy2D(psf=psf).render((71, 71), params=params).sum(0)
    image += rng.normal(0, SIGMA, image.shape)
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA, "find_missed": 5}
    once = deblend(image, params[:1, 1:3], max_rounds=1, **options)
    twice = deblend(image, params[:1, 1:3], **options)
    assert (len(once), len(twice)) == (2, 3)
    order = [0, *(1 + np.argsort(-twice.params[1:, 1]))]
    assert (np.abs(twice.flux[order] - params[:, 0]) < 3.5 * twice.flux_err[order]).all()


def test_no_source_need_be_given(host_and_companion, psf):
    params, image = host_and_companion
    image = image + 0
    image[:, 55:] = np.nan
    result = deblend(
        image, np.empty((0, 2)), model=SersicGalaxy2D(), psf=psf, uncertainty=SIGMA, find_missed=5
    )
    assert result.added.all()
    assert result.ids.tolist() == [0, 1]
    assert (np.abs(result.flux - params[:, 0]) < 3 * result.flux_err).all()


@pytest.fixture(scope="module")
def crowd(psf):
    """A field of 20 galaxies, of which three are not known, and a NaN area over another."""
    rng = np.random.default_rng(8)
    y, x = np.mgrid[30:300:60, 30:240:55]
    xy = np.column_stack([x.ravel(), y.ravel()]) + rng.uniform(-3, 3, (20, 2))
    xy[17:] = xy[[2, 9, 12]] + [[9, 4], [-9, 2], [24, 24]]  # two on flanks, one alone
    params = np.column_stack(
        [
            rng.uniform(800, 3000, 20),
            xy,
            rng.uniform(2, 3.5, 20),
            rng.uniform(0.8, 1.5, 20),
            rng.uniform(0, 0.5, 20),
            rng.uniform(0, np.pi, 20),
        ]
    )
    params[17:, 0] = 300
    image = SersicGalaxy2D(psf=psf).render((310, 260), params=params).sum(0)
    image += rng.normal(0, SIGMA, image.shape)
    known = np.arange(17)
    hidden = 15
    x, y = np.rint(xy[hidden]).astype(int)
    image[max(y - 20, 0) : y + 21, max(x - 20, 0) : x + 21] = np.nan
    return params, image, known[known != hidden]


def test_a_field_is_completed_and_other_groups_left_alone(crowd, psf):
    params, image, known = crowd
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA, "max_group": 4}
    labels = 100 + np.arange(len(known))
    from astropy.table import Table

    sources = Table({"x": params[known, 1], "y": params[known, 2], "label": labels})
    plain = deblend(image, sources, **options)
    result = deblend(image, sources, find_missed=5, **options)
    assert result.added.sum() == 3
    assert result.ids[-3:].tolist() == [labels[-1] + i for i in (1, 2, 3)]
    for truth in params[17:]:
        distance = np.hypot(*(result.params[-3:, 1:3] - truth[1:3]).T)
        k = len(known) + distance.argmin()
        assert distance.min() < 0.7
        assert abs(result.flux[k] - truth[0]) < 3.5 * result.flux_err[k]
    assert np.bincount(result.group).max() <= 4
    alone = np.flatnonzero(~np.isin(known, (2, 9)))
    assert_allclose(result.flux[alone], plain.flux[alone], rtol=2e-3)
    residual = result.residual_image[np.isfinite(result.residual_image)]
    assert residual.std() < 1.02 * SIGMA
    # every source is in its group and its box
    assert (result.group >= 0).all()
    assert_allclose(result.model_images.sum(0), result.model_image, atol=1e-6)


def test_a_full_group_gets_a_neighbour(host_and_companion, psf):
    params, image = host_and_companion
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA, "max_group": 1}
    result = deblend(image, params[:1, 1:3], find_missed=5, **options)
    assert result.added.tolist() == [False, True]
    assert result.group.tolist() == [0, 1]
    # turns of groups end before they have converged; the error does not know of the other
    assert (np.abs(result.flux[1] - params[1, 0])) < 0.1 * params[1, 0]


# -- not found -------------------------------------------------------------------------------


def test_lone_galaxies_have_no_companions(psf, rng):
    count = 50
    params = np.column_stack(
        [
            rng.uniform(500, 6000, count),
            rng.uniform(19, 21, (count, 2)),
            rng.uniform(1.5, 4, count),
            rng.uniform(0.6, 3.5, count),
            rng.uniform(0, 0.7, count),
            rng.uniform(0, np.pi, count),
        ]
    )
    images = SersicGalaxy2D(psf=psf).render((41, 41), params=params)
    images += rng.normal(0, SIGMA, images.shape)
    results = deblend(
        images,
        list(params[:, None, 1:3]),
        model=SersicGalaxy2D(),
        psf=psf,
        uncertainty=SIGMA,
        find_missed=5,
    )
    # 5 sigma in 50 x 41 x 41 pixels, filtered three times: 0.07 by chance
    assert sum(r.added.sum() for r in results) <= 1


def test_structure_that_the_model_does_not_have_is_no_companion(psf):
    """Learned galaxies of S/N 50 to 200 fitted by Sérsic profiles: at most one in twenty."""
    rng, count = np.random.default_rng(4), 60
    model = LearnedGalaxy2D.from_pretrained(psf=psf)
    params = model.sample(count, rng)
    params[:, 1:3], params[:, 3] = 30, rng.uniform(4, 7, count)
    images = model.render((61, 61), params=params) / params[:, 0, None, None]
    snr = np.sqrt((images**2).sum((1, 2))) / SIGMA
    images *= (rng.uniform(50, 200, count) / snr)[:, None, None]
    images += rng.normal(0, SIGMA, images.shape)
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA}
    plain = deblend(images, list(params[:, None, 1:3]), **options)
    results = deblend(images, list(params[:, None, 1:3]), find_missed=5, **options)
    added = np.array([r.added.sum() for r in results])
    refused = np.array([r.meta["missed"]["refused"] for r in results])
    assert added.sum() <= 0.05 * count
    assert refused.sum() > 0  # there is structure, and it was looked at
    for before, after in zip(plain, results, strict=True):
        if not after.added.any():  # as it was, to the last digit
            assert_allclose(after.params, before.params, rtol=0, atol=0)
            assert_allclose(after.flux_cov, before.flux_cov, rtol=0, atol=0)


def test_the_edge_and_holes_are_no_sources(psf, rng):
    params = np.array([[4000, 2, 20, 4, 1, 0.3, 0.5], [4000, 45, 21, 4, 1, 0.3, 2]])
    image = SersicGalaxy2D(psf=psf).render((41, 61), params=params).sum(0)
    image += rng.normal(0, SIGMA, image.shape)
    image[18:25, 47:50] = np.nan
    image[:, -2:] = np.inf
    result = deblend(
        image, params[:, 1:3], model=SersicGalaxy2D(), psf=psf, uncertainty=SIGMA, find_missed=5
    )
    assert not result.added.any()
    assert (np.abs(result.flux - params[:, 0]) < 4 * result.flux_err).all()


def test_a_blank_image_and_one_that_cannot_be_fitted_are_left(psf, rng):
    images = rng.normal(0, SIGMA, (2, 30, 30))
    images[1] = np.nan
    results = deblend(
        images,
        [np.empty((0, 2)), [(10, 10)]],
        model=SersicGalaxy2D(),
        psf=psf,
        uncertainty=SIGMA,
        find_missed=5,
    )
    assert [len(r) for r in results] == [0, 1]
    assert results[1].failed.all()


def test_a_trial_that_fails_is_undone(host_and_companion, psf, monkeypatch):
    from galmorph import _scenefit

    fit_scenes = _scenefit.fit_scenes

    def fails(setups, batch, **kwargs):
        if len(setups) > 1:
            raise RuntimeError("no solution")
        return fit_scenes(setups, batch, **kwargs)

    monkeypatch.setattr(_scenefit, "fit_scenes", fails)
    params, image = host_and_companion
    result = deblend(
        image,
        params[:1, 1:3],
        model=SersicGalaxy2D(),
        psf=psf,
        uncertainty=SIGMA,
        find_missed=5,
    )
    assert len(result) == 1
    assert not result.failed.any()
    assert not result.meta["errors"]


# -- arguments -------------------------------------------------------------------------------


def test_missed_sources_may_have_a_model_of_their_own(psf, rng):
    star = PointSource2D(psf=psf)
    truth = [[3000, 28, 30, 4, 1.2, 0.4, 0.5], [250, 40, 33]]
    image = SersicGalaxy2D(psf=psf).render((61, 61), params=truth[:1])[0]
    image += star.render((61, 61), params=truth[1:])[0] + rng.normal(0, SIGMA, (61, 61))
    result = deblend(
        image,
        [(28, 30)],
        model=[SersicGalaxy2D()],
        psf=psf,
        uncertainty=SIGMA,
        find_missed=5,
        missed_model=star,
    )
    assert [type(m).__name__ for m in result.models] == ["SersicGalaxy2D", "PointSource2D"]
    assert abs(result.flux[1] - 250) < 3 * result.flux_err[1]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"find_missed": 0}, ValueError, "find_missed"),
        ({"find_missed": np.nan}, ValueError, "find_missed"),
        ({"max_rounds": 0}, ValueError, "max_rounds"),
        ({"missed_model": "star"}, TypeError, "missed_model"),
        ({"missed_model": PointSource2D()}, ValueError, "needs a psf"),
        ({"model": [SersicGalaxy2D(), SersicGalaxy2D()]}, ValueError, "missed_model"),
    ],
)
def test_wrong_arguments_are_told(change, error, text):
    arguments = {"model": SersicGalaxy2D(), "uncertainty": 1.0, "find_missed": 5} | change
    with pytest.raises(error, match=text):
        deblend(np.eye(30), [(10, 10), (20, 10)], **arguments)
