"""The noise that is estimated from a stamp, and the likelihood of a pixel."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from galmorph import SersicGalaxy2D
from galmorph.noise import GaussianNoise, estimate_noise


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e5])
def test_noise_of_a_blank_sky(rng, sigma):
    images = rng.normal(3 * sigma, sigma, (200, 41, 45))
    noise = estimate_noise(images)
    assert noise.shape == (200,)
    assert_allclose(noise.mean() / sigma, 1, atol=0.006)
    assert noise.std() / sigma < 0.04


@pytest.mark.parametrize("flux", [100, 10_000])
def test_galaxy_hardly_matters(rng, flux):
    galaxy = SersicGalaxy2D(flux=flux, x_0=32, y_0=32, r_eff=5, n=2, ellip=0.4).render((65, 65))
    noise = estimate_noise(rng.normal(0, 1, (100, 65, 65)) + galaxy)
    assert_allclose(noise.mean(), 1, atol=0.02)


def test_stars_in_the_outskirts_are_clipped(rng):
    images = rng.normal(0, 1, (100, 41, 41))
    images[:, 2:5, 2:5] += 100
    images[:, 36:39, 20] -= 100
    assert_allclose(estimate_noise(images).mean(), 1, atol=0.02)


def test_masked_and_infinite_pixels_are_left_out(rng):
    image = rng.normal(0, 1, (41, 41))
    expected = estimate_noise(image)
    mask = np.zeros(image.shape, bool)
    mask[:, :3] = True
    left_out = estimate_noise(image, mask)
    assert left_out != expected
    image[:, :3] = 1e30
    assert estimate_noise(image, mask) == left_out
    image[:, :3] = np.nan
    assert estimate_noise(image) == left_out


def test_inside_is_used_if_the_outskirts_are_masked(rng):
    image = rng.normal(0, 1, (41, 41))
    mask = np.ones(image.shape, bool)
    mask[10:30, 10:30] = False
    assert_allclose(estimate_noise(image, mask), 1, atol=0.15)


def test_nothing_to_see():
    assert estimate_noise(np.zeros((20, 20))) == 0
    assert np.isnan(estimate_noise(np.full((20, 20), np.nan)))
    assert np.isnan(estimate_noise(np.arange(6.0).reshape(2, 3)))


def test_wrong_shapes():
    with pytest.raises(ValueError, match="2-D or 3-D"):
        estimate_noise(np.zeros(5))
    with pytest.raises(ValueError, match="mask has shape"):
        estimate_noise(np.zeros((5, 5)), np.zeros((5, 6), bool))


def test_log_prob_is_a_density(rng):
    """Its exponential integrates to one over the data."""
    grid = np.linspace(-12, 14, 20001)[None]
    log_prob = GaussianNoise().log_prob(grid, 1.0, 1 / 1.7)
    assert_allclose(np.trapezoid(np.exp(log_prob), grid), 1)
    assert_allclose(grid[0, log_prob.argmax()], 1, atol=2e-3)


def test_log_prob_of_unused_pixels_is_exactly_zero():
    data = np.array([1.0, np.nan, np.inf, 1e300])
    with np.errstate(over="ignore", invalid="ignore"):
        values = GaussianNoise().log_prob(data, 0.0, [2.0, 0, 0, 0])
    assert_array_equal(values[1:], 0)
    assert_allclose(values[0], -2 - 0.5 * np.log(2 * np.pi) + np.log(2))
