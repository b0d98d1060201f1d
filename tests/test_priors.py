"""Priors: densities that integrate to one, residuals that are their logarithms, honest samples."""

import numpy as np
import pytest
from scipy import stats

from galmorph.priors import INDEX_PRIOR, LogNormal, Normal

PRIORS = {
    "normal": (Normal(1.3, 0.4), stats.norm(1.3, 0.4)),
    "log-normal": (LogNormal(2.0, 0.7), stats.lognorm(0.7, scale=2.0)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_density(name):
    prior, truth = PRIORS[name]
    value = np.linspace(0.1, 6, 50)
    np.testing.assert_allclose(prior.log_prob(value), truth.logpdf(value), rtol=1e-10)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_density(name):
    prior, truth = PRIORS[name]
    draws = prior.sample(4000, np.random.default_rng(3))
    assert draws.shape == (4000,)
    assert stats.kstest(draws, truth.cdf).pvalue > 0.01
    np.testing.assert_array_equal(prior.sample(5, 7), prior.sample(5, 7))


def test_residual_of_a_normal():
    prior, truth = PRIORS["normal"]
    value = np.array([0.5, 1.3, 4.0])
    residual, slope = prior.residual(value)
    np.testing.assert_allclose(-0.5 * residual**2, truth.logpdf(value) - truth.logpdf(1.3))
    np.testing.assert_allclose(slope, 2.5)


def test_residual_of_a_log_normal_is_that_of_the_logarithm():
    """The density of ln(n): its mode is the median, whatever the width."""
    prior, _ = PRIORS["log-normal"]
    value = np.array([0.5, 2.0, 6.0])
    residual, slope = prior.residual(value)
    in_log = stats.norm(np.log(2), 0.7).logpdf(np.log(value))
    np.testing.assert_allclose(-0.5 * residual**2, in_log - in_log[1], atol=1e-12)
    step = 1e-6
    numeric = (prior.residual(value + step)[0] - prior.residual(value - step)[0]) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)


def test_nothing_is_zero_or_below():
    assert np.isneginf(LogNormal(1, 1).log_prob([-1.0, 0.0])).all()
    assert np.isfinite(LogNormal(1, 1).residual(np.array([-1.0, 0.0]))[0]).all()
    assert (LogNormal(1, 1).sample(100, 1) > 0).all()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Normal, (0, 0)),
        (Normal, (0, -1)),
        (Normal, (np.nan, 1)),
        (Normal, (0, np.inf)),
        (LogNormal, (0, 1)),
        (LogNormal, (-1, 1)),
        (LogNormal, (1, 0)),
        (LogNormal, (1, np.inf)),
        (LogNormal, (np.nan, 1)),
        (LogNormal, (1, np.nan)),
    ],
)
def test_bad_priors(kind, values):
    with pytest.raises(ValueError, match="prior needs"):
        kind(*values)


def test_default_is_broad():
    """Disks and ellipticals are both within 1.2 of its standard deviations."""
    z = np.log(np.array([1.0, 4.0]) / INDEX_PRIOR.median) / INDEX_PRIOR.sigma
    assert np.abs(z).max() < 1.2
