"""Conditional priors against densities that are known, and redshifts inferred with them."""

import subprocess
import sys

import numpy as np
import pytest
from astropy.cosmology import Planck18
from scipy.stats import kstest, norm

from galmorph import LearnedGalaxy2D, SersicGalaxy2D, fit_images
from galmorph.conditional import (
    ConditionalPrior,
    RedshiftPosterior,
    interpolate,
    measurements,
    redshift_posterior,
)
from galmorph.simulate import observe, scaling

SMALL = dict(transforms=1, hidden=(32,), bins=6)


@pytest.fixture(scope="module")
def linear():
    """z0 ~ N(c, 0.5), z1 ~ N(z0 / 2, 1), c ~ U(-1, 1); fitted."""
    rng = np.random.default_rng(5)
    c = rng.uniform(-1, 1, 4000)
    z0 = rng.normal(c, 0.5)
    x = np.stack([z0, rng.normal(z0 / 2, 1.0)], 1)
    prior = ConditionalPrior(["z0", "z1"], ["c"], **SMALL)
    return prior.fit(x, {"c": c}, epochs=15, rng=1), x, c


def true_density(x, c):
    return norm.logpdf(x[..., 0], c, 0.5) + norm.logpdf(x[..., 1], x[..., 0] / 2, 1.0)


# -- the density -------------------------------------------------------------------------


def test_the_density_is_that_of_the_data(linear):
    prior, x, c = linear
    difference = true_density(x, c) - prior.log_prob(x, {"c": c})
    # the mean is the divergence between the two, but for noise
    assert abs(difference.mean()) < 0.03
    assert np.median(np.abs(difference)) < 0.15


def test_a_missing_condition_is_marginalised(linear):
    prior, x, _ = linear
    c = np.linspace(-1, 1, 401)[:, None]
    expected = np.log(np.exp(true_density(x, c)).mean(0))
    found = prior.log_prob(x)
    assert abs((expected - found).mean()) < 0.05
    # it is not the density at some one condition
    assert (expected - prior.log_prob(x, {"c": 0.8})).mean() > 0.5
    for missing in ({}, {"c": np.nan}, np.full((len(x), 1), np.nan)):
        np.testing.assert_array_equal(prior.log_prob(x, missing), found)


def test_samples_follow_the_condition(linear):
    prior, _, _ = linear
    draws = prior.sample(4000, {"c": 0.6}, rng=2)
    assert draws[:, 0].mean() == pytest.approx(0.6, abs=0.06)
    assert draws[:, 0].std() == pytest.approx(0.5, abs=0.05)
    each = prior.sample(4000, {"c": np.repeat([-0.8, 0.8], 2000)}, rng=2)
    assert each[2000:, 0].mean() - each[:2000, 0].mean() == pytest.approx(1.6, abs=0.12)
    np.testing.assert_array_equal(prior.sample(5, rng=3), prior.sample(5, rng=3))


def test_the_density_is_normalised(linear):
    prior, _, _ = linear
    line = np.linspace(-6, 6, 241)
    x = np.stack(np.meshgrid(line, line, indexing="ij"), -1)
    for c in (0.3, np.nan):
        total = np.exp(prior.log_prob(x, {"c": c})).sum() * (line[1] - line[0]) ** 2
        assert total == pytest.approx(1, abs=0.01)


def test_errors_of_the_galaxies_do_not_widen_it():
    """Extreme deconvolution: errors as large as the scatter."""
    rng = np.random.default_rng(3)
    c = rng.uniform(0, 1, 6000)
    truth = rng.normal(c, 0.5)
    measured = truth + rng.normal(0, 0.7, 6000)
    # the posterior under the standard normal prior that latents have
    variance = 1 / (1 + 1 / 0.49)
    mean = (variance * measured / 0.49)[:, None]
    cov = np.full((6000, 1, 1), variance)
    prior = ConditionalPrior(["z0"], ["c"], **SMALL)
    prior.fit(mean, {"c": c}, cov=cov, draws=32, at_once=32, epochs=12, rng=1)
    draws = prior.sample(6000, {"c": 0.5}, rng=2)
    assert draws.std() == pytest.approx(0.5, abs=0.07)
    assert draws.mean() == pytest.approx(0.5, abs=0.07)


def test_the_same_seed_gives_the_same_fit():
    rng = np.random.default_rng(3)
    c = rng.uniform(0, 1, 200)
    x = rng.normal(c, 1)[:, None]
    one, two = (
        ConditionalPrior(["z0"], ["c"], **SMALL).fit(x, c[:, None], epochs=2, rng=4)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.log_prob(x), two.log_prob(x))


def test_written_and_read_again(linear, tmp_path):
    prior, x, c = linear
    prior.metadata = {"training_data": "a line"}
    prior.write(tmp_path / "p.conditional", half=False)
    again = ConditionalPrior.read(tmp_path / "p.conditional")
    np.testing.assert_array_equal(again.log_prob(x, {"c": c}), prior.log_prob(x, {"c": c}))
    assert again.metadata == {"training_data": "a line"}
    assert again.range("c") == prior.range("c")
    prior.write(tmp_path / "half.conditional")
    near = ConditionalPrior.read(tmp_path / "half.conditional").log_prob(x, {"c": c})
    np.testing.assert_allclose(near, prior.log_prob(x, {"c": c}), atol=0.05)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        ConditionalPrior.read(tmp_path / "bad")


def test_errors_are_clear(linear):
    prior, x, _ = linear
    with pytest.raises(ValueError, match="unknown condition 'redshift'"):
        prior.log_prob(x, {"redshift": 1.0})
    with pytest.raises(ValueError, match="2 columns"):
        prior.log_prob(x[:, :1])
    with pytest.raises(ValueError, match="do not fit galaxies"):
        prior.log_prob(x, {"c": np.zeros(3)})
    with pytest.raises(ValueError, match="not fitted"):
        ConditionalPrior(["z0"], ["c"]).sample(3)
    with pytest.raises(ValueError, match="different names"):
        ConditionalPrior(["z0", "z0"], ["c"])
    with pytest.raises(ValueError, match="too few"):
        ConditionalPrior(["z0"], ["c"]).fit(x[:5, :1], np.arange(5.0)[:, None])
    with pytest.raises(ValueError, match="at least two values"):
        ConditionalPrior(["z0"], ["c"]).fit(x[:, :1], {})
    with pytest.raises(ValueError, match="knows no cosmology"):
        ConditionalPrior(["z0"], ["c"], cosmology="steady state")
    with pytest.raises(ValueError, match="no conditional prior 'none'"):
        ConditionalPrior.from_pretrained("none")


def test_galaxies_with_nan_are_nan(linear):
    prior, x, c = linear
    bad = x[:3].copy()
    bad[1, 0] = np.nan
    values = prior.log_prob(bad, {"c": c[:3]})
    assert np.isnan(values).tolist() == [False, True, False]
    np.testing.assert_allclose(values[[0, 2]], prior.log_prob(x[[0, 2]], {"c": c[[0, 2]]}))


# -- redshift ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard_rulers():
    """Galaxies of 5 kpc and -21 mag, with scatter; the shape changes with redshift."""
    rng = np.random.default_rng(7)
    z = np.expm1(rng.uniform(np.log(1.1), np.log(3.0), 4000))
    kpc = Planck18.angular_diameter_distance(z).value * 1000 * np.pi / 180 / 3600
    x = np.stack(
        [
            rng.normal(np.log1p(z), 0.3),
            np.log(5 / kpc) + rng.normal(0, 0.3, z.size),
            -21 + Planck18.distmod(z).value - 2.5 * np.log10(1 + z) + rng.normal(0, 0.4, z.size),
        ],
        1,
    )
    prior = ConditionalPrior(["z0", "ln_r_50", "magnitude"], ["redshift"], **SMALL)
    return prior.fit(x, {"redshift": z}, epochs=15, rng=1), x, z


def test_the_cosmology_need_not_be_learned(standard_rulers):
    prior, x, z = standard_rulers
    absolute = x[:, 2] - Planck18.distmod(z).value + 2.5 * np.log10(1 + z)
    expected = norm.logpdf(absolute, -21, 0.4) + norm.logpdf(x[:, 0], np.log1p(z), 0.3)
    size, _ = scaling(0.5, z)
    at_half = np.log(5) - np.log(6.2923) + np.log(size)  # 6.2923 kpc an arcsecond at z = 0.5
    expected += norm.logpdf(x[:, 1], at_half, 0.3)
    assert abs((expected - prior.log_prob(x, {"redshift": z})).mean()) < 0.05
    low, high = prior.range("redshift")
    assert (low, high) == (z.min(), z.max())
    with pytest.raises(ValueError, match="positive"):
        prior.log_prob(x, {"redshift": -1.0})


def model_result(features, noise=1e-3, rng=0):
    """Fits of learned galaxies with these z0, ln_r_50 and magnitudes, made without pixels."""
    model = LearnedGalaxy2D.from_pretrained()
    image = LearnedGalaxy2D.from_pretrained(flux=100, x_0=10, y_0=10, r_50=3).render((21, 21))
    one = fit_images(image, model, uncertainty=1.0)
    from dataclasses import replace

    n = len(features)
    params = np.zeros((n, 37))
    params[:, 0] = 10 ** (-0.4 * (features[:, 2] - 25))
    params[:, 3] = np.exp(features[:, 1]) / 0.03
    params[:, 5] = features[:, 0]
    return replace(
        one,
        params=params,
        cov=np.tile(noise**2 * np.eye(37), (n, 1, 1)) * np.maximum(params, 1)[:, None] ** 2,
        **{k: np.repeat(getattr(one, k), n, 0) for k in ("background", "background_cov")},
        **{k: np.repeat(getattr(one, k), n) for k in ("chi2", "dof", "flags", "n_iter", "ids")},
        **{k: np.repeat(getattr(one, k), n, 0) for k in ("origin", "shapes")},
        stamps=None,
    )


def test_redshift_posteriors_are_calibrated(standard_rulers):
    prior, x, z = standard_rulers
    result = model_result(x[:400])
    posterior = redshift_posterior(
        result,
        prior,
        pixel_scale=0.03,
        zero_point=25,
        redshift_prior=lambda z: 1 / (1 + z),
        n=4,
        rng=1,
    )
    pit = posterior.cdf(z[:400])
    assert kstest(pit, "uniform").pvalue > 1e-3
    # and they say more than the prior does
    width = np.diff(posterior.quantile([0.16, 0.84]), axis=0)[0]
    assert np.median(width / (1 + z[:400])) < 0.35
    np.testing.assert_allclose(np.trapezoid(posterior.density, posterior.grid, axis=1), 1)


def test_errors_widen_the_posterior_of_the_redshift(standard_rulers):
    prior, x, _ = standard_rulers
    options = dict(pixel_scale=0.03, zero_point=25, n=200, rng=1)
    sure = redshift_posterior(model_result(x[:20]), prior, **options)
    vague = redshift_posterior(model_result(x[:20], noise=0.5), prior, **options)
    assert (vague.std > sure.std).mean() > 0.8


def test_a_failed_fit_has_no_redshift(standard_rulers):
    prior, x, _ = standard_rulers
    result = model_result(x[:3])
    result.params[1] = np.nan
    result.flags[1] = 32
    posterior = redshift_posterior(result, prior, pixel_scale=0.03, zero_point=25, n=4, rng=1)
    assert np.isfinite(posterior.mean).tolist() == [True, False, True]
    assert np.isnan(posterior.quantile(0.5)).tolist() == [False, True, False]
    assert np.isnan(posterior.sample(5, rng=1)).any(1).tolist() == [False, True, False]


def test_redshift_posterior_errors(standard_rulers, linear):
    prior, x, _ = standard_rulers
    result = model_result(x[:2])
    with pytest.raises(ValueError, match="not conditional on redshift"):
        redshift_posterior(result, linear[0])
    with pytest.raises(ValueError, match="ln_r_50 needs pixel_scale"):
        redshift_posterior(result, prior, zero_point=25)
    with pytest.raises(ValueError, match="magnitude needs zero_point"):
        redshift_posterior(result, prior, pixel_scale=0.03)
    with pytest.raises(ValueError, match="no condition here"):
        redshift_posterior(result, prior, conditions={"redshift": 1.0})
    with pytest.raises(ValueError, match="fit the grid"):
        redshift_posterior(
            result, prior, pixel_scale=0.03, zero_point=25, redshift_prior=np.ones(3)
        )


def test_redshift_posterior_methods():
    grid = np.linspace(0, 4, 801)
    posterior = RedshiftPosterior(grid, np.stack([norm.logpdf(grid, m, 0.2) for m in (1, 2)]))
    np.testing.assert_allclose(posterior.mean, [1, 2], atol=1e-6)
    np.testing.assert_allclose(posterior.std, 0.2, atol=1e-4)
    above = norm.ppf(0.84) * 0.2
    np.testing.assert_allclose(posterior.quantile(0.84), [1 + above, 2 + above], atol=1e-3)
    np.testing.assert_allclose(posterior.cdf([1.2, 5.0]), [norm.cdf(1), 1], atol=1e-4)
    np.testing.assert_allclose(posterior.pdf([1.2, -1]), [norm.pdf(1) / 0.2, 0], atol=1e-3)
    draws = posterior.sample(2000, rng=1)
    assert kstest(draws[1], norm(2, 0.2).cdf).pvalue > 1e-3


# -- from fits, and through redshift -----------------------------------------------------


def test_measurements_are_draws_of_the_posterior():
    model = LearnedGalaxy2D.from_pretrained(flux=1000, x_0=20, y_0=20, r_50=4)
    result = fit_images(model.render((41, 41)), model, uncertainty=0.5)
    names = ["z0", "ln_r_50", "magnitude"]
    draws, log_prior = measurements(result, names, pixel_scale=0.2, zero_point=25, n=2000, rng=1)
    expected = [result.params[0, 5], np.log(0.8), 25 - 2.5 * np.log10(1000)]
    np.testing.assert_allclose(draws[0].mean(0), expected, atol=0.05)
    std = result.stds[0]
    spread = [std[5], std[3] / 4, std[0] / 1000 * 2.5 / np.log(10)]
    np.testing.assert_allclose(draws[0].std(0), spread, rtol=0.1)
    assert log_prior.shape == (1, 2000)
    with pytest.raises(ValueError, match="no 'colour'"):
        measurements(result, ["colour"])
    other = fit_images(model.render((41, 41)), SersicGalaxy2D(), uncertainty=0.5)
    with pytest.raises(ValueError, match="no 'z0'"):
        measurements(other, ["z0"])


def test_transport_keeps_the_place_among_galaxies(standard_rulers):
    prior, x, z = standard_rulers
    there = prior.transport(x[:200], {"redshift": z[:200]}, {"redshift": 1.0})
    # the shape moves with ln(1 + z), as that of all galaxies does
    expected = x[:200, 0] + np.log(2) - np.log1p(z[:200])
    np.testing.assert_allclose(there[:, 0], expected, atol=0.2)
    assert np.median(np.abs(there[:, 0] - expected)) < 0.06
    # size and brightness as the cosmology has it
    size, flux = scaling(z[:200], 1.0)
    np.testing.assert_allclose(there[:, 1], x[:200, 1] + np.log(size), atol=1e-4)
    np.testing.assert_allclose(there[:, 2], x[:200, 2] - 2.5 * np.log10(flux), atol=1e-4)
    back = prior.transport(there, {"redshift": 1.0}, {"redshift": z[:200]})
    np.testing.assert_allclose(back, x[:200], atol=2e-3)


def test_interpolation_through_redshift(standard_rulers):
    prior, _, _ = standard_rulers
    model = LearnedGalaxy2D.from_pretrained(flux=1000, x_0=20, y_0=20, r_50=5)
    result = fit_images(model.render((41, 41)), model, uncertainty=1.0)
    grid = np.linspace(0.2, 1.5, 27)
    options = dict(z_in=0.2, pixel_scale_in=0.3, pixel_scale_out=0.05, shape=(64, 64))
    kept = interpolate(result, grid, **options)
    size, flux = scaling(0.2, grid)
    np.testing.assert_allclose(kept[:, 0], result.params[0, 0] * flux)
    np.testing.assert_allclose(kept[:, 3], result.params[0, 3] * size * 6)
    assert (kept[:, 5:] == result.params[:, 5:]).all()
    carried = interpolate(result, grid, prior=prior, zero_point_in=22.0, **options)
    np.testing.assert_allclose(carried[0, 5:], result.params[0, 5:], atol=1e-3)
    np.testing.assert_array_equal(carried[:, 6:], kept[:, 6:])  # the prior is of z0 only
    steps = np.diff(carried[:, 5])
    assert np.abs(steps).max() < 0.1
    images = observe(model, params=carried, shape=(64, 64)).data
    assert (np.diff(images.sum((1, 2))) < 0).all()
    with pytest.raises(ValueError, match="one galaxy"):
        interpolate(result[[0, 0]], grid, **options)


def test_a_population_for_sampling(standard_rulers):
    prior, _, _ = standard_rulers
    latents = prior.shapes.sample(500, {"redshift": 1.0}, rng=1)
    assert latents.shape == (500, 1)
    assert latents.mean() == pytest.approx(np.log(2), abs=0.08)


def test_torch_is_not_imported():
    code = "import sys, galmorph.conditional; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
