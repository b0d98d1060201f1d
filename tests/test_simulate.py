"""Galaxies observed again, against GalSim, closed forms and the statistics of their noise."""

import subprocess
import sys

import numpy as np
import pytest
from astropy import units as u
from astropy.cosmology import FlatLambdaCDM, Planck18
from astropy.nddata import CCDData, StdDevUncertainty
from scipy.stats import chi2 as chi2_distribution

from galmorph import SersicGalaxy2D, fit_images
from galmorph.detection import gaussian_psf
from galmorph.simulate import MockFlag, observe, redshifted, scaling

Y, X = np.mgrid[-32:33, -32:33]
PSF_3 = gaussian_psf(3.0)


def gaussian(sigma, flux=1000.0, dx=0.0, dy=0.0):
    """A round Gaussian integrated over nothing, on 65 x 65 pixels."""
    image = np.exp(-((X - dx) ** 2 + (Y - dy) ** 2) / (2 * sigma**2))
    return flux * image / (2 * np.pi * sigma**2)


def again(images, **changes):
    """`redshifted` with what most tests share."""
    options = dict(
        z_in=0.05,
        z_out=0.1,
        pixel_scale_in=0.4,
        pixel_scale_out=0.4,
        psf_in=PSF_3,
        psf_out=PSF_3,
        noise_in=0.0,
        rng=1,
    )
    return redshifted(images, **options | changes)


# -- cosmology ---------------------------------------------------------------------------


def test_scaling_in_an_einstein_de_sitter_universe():
    z_in, z_out = 0.3, np.array([0.5, 2.0])
    size, flux = scaling(z_in, z_out, cosmology=FlatLambdaCDM(70, 1.0), bandwidth="bolometric")

    def distance(z):  # comoving, in units of 2 c / H0
        return 1 - 1 / np.sqrt(1 + z)

    expected = distance(z_in) / distance(z_out)
    np.testing.assert_allclose(size, expected * (1 + z_out) / 1.3, rtol=1e-10)
    np.testing.assert_allclose(flux, (expected * 1.3 / (1 + z_out)) ** 2, rtol=1e-10)


@pytest.mark.parametrize(("bandwidth", "power"), [("nu", 3), ("lambda", 5), ("bolometric", 4)])
def test_surface_brightness_dims(bandwidth, power):
    size, flux = scaling(0.1, 1.2, bandwidth=bandwidth, k_correction=0.5, evolution=-1.0)
    dimming = flux / size**2 * (2.2 / 1.1) ** power
    assert dimming == pytest.approx(10**0.2)


def test_the_default_cosmology_is_that_of_astropy():
    size, _ = scaling(0.1, 0.4)
    ratio = Planck18.angular_diameter_distance(0.1) / Planck18.angular_diameter_distance(0.4)
    assert size == pytest.approx(float(ratio))


def test_scaling_refuses_and_flags():
    with pytest.raises(ValueError, match="bandwidth"):
        scaling(0.1, 0.2, bandwidth="r")
    size, flux = scaling([0.1, 0.0, np.nan], 0.2)
    assert np.isfinite(size).tolist() == np.isfinite(flux).tolist() == [True, False, False]


# -- images against truth ----------------------------------------------------------------


@pytest.mark.parametrize("z_out", [0.05, 0.11, 0.3])
def test_redshifted_images_agree_with_galsim(z_out):
    galsim = pytest.importorskip("galsim")
    galaxy = galsim.Sersic(n=1.5, half_light_radius=3.0, flux=1000).shear(
        q=0.6, beta=0.5 * galsim.radians
    )
    galaxy = galaxy.shift(0.13, -0.2)
    sharp, wide = galsim.Gaussian(fwhm=1.3), galsim.Moffat(beta=3, fwhm=1.5)

    def seen(profile, scale, size, **options):
        return profile.drawImage(nx=size, ny=size, scale=scale, dtype=float, **options).array

    def effective(profile, scale, size):
        both = galsim.Convolve(profile, galsim.Pixel(scale))
        return seen(both, scale, size, method="no_pixel")

    image = seen(galsim.Convolve(galaxy, sharp), 0.4, 161)
    mock = again(
        image,
        z_out=z_out,
        pixel_scale_out=0.25,
        psf_in=effective(sharp, 0.4, 41),
        psf_out=effective(wide, 0.25, 121),
        shape=(161, 161),
    )
    size, flux = scaling(0.05, z_out)
    moved = galaxy.dilate(float(size)) * float(flux)
    truth = seen(galsim.Convolve(moved, wide), 0.25, 161)
    assert np.abs(mock.data[0] - truth).max() < 1e-3 * truth.max()
    # what is beyond the input stamp is not there
    lost = 1 - image.sum() / 1000
    assert mock.data[0].sum() == pytest.approx(truth.sum(), rel=1e-3 + lost)
    if z_out > 0.05:
        assert mock.data[0].sum() == pytest.approx(image.sum() * flux, rel=1e-3)


def test_a_gaussian_has_a_closed_form():
    mock = again(gaussian(5.0, dx=3.0, dy=-2.0), psf_in=None, psf_out=gaussian_psf(6.0))
    size, flux = scaling(0.05, 0.1)
    # the pixel (a box of one) is taken out of the input and is in the output's PSF
    sigma = np.sqrt(size**2 * (25 - 1 / 12) + (6 / 2.3548200450309493) ** 2)
    expected = gaussian(sigma, float(flux) * 1000, 3 * size, -2 * size)
    np.testing.assert_allclose(mock.data[0], expected, atol=2e-3 * expected.max())
    assert mock.data.sum() == pytest.approx(1000 * flux, rel=1e-4)


def test_the_same_redshift_gives_the_same_image():
    image = gaussian(4.0)
    mock = again(image, z_out=0.05)
    np.testing.assert_allclose(mock.data[0], image, atol=1e-4 * image.max())


def test_an_oversampled_sharp_psf_aliases_as_it_should():
    """At a FWHM of 1.6 pixels, sampling folds waves back."""
    psf = gaussian_psf(1.6)
    galaxy = SersicGalaxy2D(1000, 32, 32, 5, n=1, psf=psf)
    image = galaxy.render((65, 65))
    mock = again(image, z_out=0.05, pixel_scale_out=1.2, psf_in=psf, psf_out=psf, shape=(25, 25))
    expected = SersicGalaxy2D(1000, 12, 12, 5 / 3, n=1, psf=psf).render((25, 25))
    assert np.abs(mock.data[0] - expected).max() < 3e-3 * expected.max()


def test_zero_points_and_magnitudes():
    image = gaussian(5.0)
    plain = again(image).data
    changed = again(image, zero_point_in=25.0, zero_point_out=27.5, evolution=0.5).data
    np.testing.assert_allclose(changed, plain * 10**0.8)
    with pytest.raises(ValueError, match="both zero points"):
        again(image, zero_point_in=25.0)


# -- noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("z_out", [0.055, 0.1])
def test_noise_is_white_and_as_wanted(rng, z_out):
    """With the noise that an image brings, its footprint and a masked corner."""
    images = rng.normal(0, 1.0, (150, 64, 64))
    mask = np.zeros(images.shape, dtype=bool)
    mask[:, 10:25, 30:45] = True
    mock = again(images, noise_in=1.0, noise_out=0.95, mask=mask, z_out=z_out, shape=(48, 48))
    assert not mock.flags.any()
    np.testing.assert_allclose(mock.uncertainty, 0.95)
    pulls = mock.data / 0.95
    assert pulls.var() == pytest.approx(1.0, abs=5 * np.sqrt(2 / pulls.size))
    for axis in (1, 2):
        pairs = np.take(pulls, range(1, 48), axis) * np.take(pulls, range(47), axis)
        assert abs(pairs.mean()) < 5 / np.sqrt(pairs.size)
    # every pixel by itself
    sums = (pulls**2).sum(0)
    low, high = chi2_distribution(150).ppf([1e-6, 1 - 1e-6])
    assert low < sums.min()
    assert sums.max() < high


def test_noise_that_varies_over_the_stamp_becomes_uniform(rng):
    sigma = np.where(X[None] > 0, 1.0, 0.3)
    images = sigma * rng.standard_normal((200, 65, 65))
    mock = again(images, noise_in=np.broadcast_to(sigma, images.shape), noise_out=0.9, z_out=0.06)
    variance = mock.data.var(0)
    assert variance[16:48, 16:28].mean() == pytest.approx(0.81, rel=0.03)
    assert variance[16:48, 37:49].mean() == pytest.approx(0.81, rel=0.03)


def test_what_is_left_of_the_noise(rng):
    images = rng.normal(0, 1.0, (100, 65, 65))
    mock = again(images, noise_in=1.0, shape=(31, 31))
    assert not mock.flags.any()
    core = mock.data[:, 8:23, 8:23]
    assert core.std() == pytest.approx(mock.uncertainty[:, 15, 15].mean(), rel=0.03)
    noisier = again(images, noise_in=1.0, noise_out=0.01, shape=(31, 31))
    assert (noisier.flags == MockFlag.TOO_NOISY).all()
    core = noisier.data[:, 8:23, 8:23]
    assert core.std() == pytest.approx(noisier.uncertainty[:, 15, 15].mean(), rel=0.03)


def test_photon_noise(rng):
    image = np.broadcast_to(gaussian(6.0, 2e5), (300, 65, 65))
    clean = again(image[:1], z_out=0.06).data[0]
    mock = again(image, z_out=0.06, gain=2.0, noise_out=1.0)
    core = (slice(None), slice(28, 37), slice(28, 37))
    expected = clean / 2 + 1
    np.testing.assert_allclose(mock.data[core].var(0) / expected[core[1:]], 1, atol=0.5)
    ratio = (mock.data[core].var(0) / expected[core[1:]]).mean()
    assert ratio == pytest.approx(1, abs=5 * np.sqrt(2 / 300 / 81))
    np.testing.assert_allclose(mock.uncertainty[core].mean(0) ** 2, expected[core[1:]], rtol=0.02)


def test_estimated_noise_is_flagged(rng):
    mock = again(gaussian(3.0) + rng.normal(0, 0.1, (65, 65)), noise_in=None, noise_out=1.0)
    assert mock.flags.tolist() == [MockFlag.NOISE_ESTIMATED]


def test_noise_repeats(rng):
    images = rng.normal(0, 1, (3, 65, 65))
    first, second = (again(images, noise_in=1.0, noise_out=1.0, rng=5).data for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, again(images, noise_in=1.0, noise_out=1.0, rng=6).data)


# -- masks, flags, errors ----------------------------------------------------------------


def test_masked_pixels_stay_masked_and_do_not_spoil_the_rest():
    image = gaussian(6.0)
    bad = image.copy()
    bad[40:44, 50:54] = np.nan
    clean, mock = again(image, shape=(31, 31)), again(bad, shape=(31, 31))
    size = float(scaling(0.05, 0.1)[0])
    # the middle of the hole, seen from the middle of the stamp
    y, x = round(15 + (41.5 - 32) * size), round(15 + (51.5 - 32) * size)
    assert mock.mask[0, y, x]
    assert not mock.mask[0, 15, 15]
    assert not clean.mask[0, y, x]
    good = ~mock.mask[0]
    np.testing.assert_allclose(mock.data[0][good], clean.data[0][good], atol=1e-3 * image.max())


def test_beyond_the_input_is_masked():
    mock = again(gaussian(6.0), z_out=0.2, shape=(65, 65))
    size = float(scaling(0.05, 0.2)[0])
    outside = np.maximum(np.abs(X), np.abs(Y)) > 32.5 * size
    assert mock.mask[0][outside].all()
    assert not mock.mask[0, 28:37, 28:37].any()


def test_a_psf_that_is_too_sharp_is_flagged_or_refused():
    images = np.stack([gaussian(5.0)] * 2)
    sharp, wide = gaussian_psf(2.2), gaussian_psf(4.0)
    mock = again(images, z_out=0.055, psf_out=[sharp, wide])
    assert mock.flags.tolist() == [MockFlag.SHARP_PSF, 0]
    assert np.isnan(mock.data[0]).all()
    assert mock.mask[0].all()
    assert np.isfinite(mock.data[1]).all()
    with pytest.raises(ValueError, match="psf_out is sharper"):
        again(images, z_out=0.055, psf_out=sharp)
    # farther away the old PSF is smaller
    assert not again(images, z_out=0.1, psf_out=sharp).flags.any()


def test_pixels_that_are_too_coarse_are_noticed():
    """Of a galaxy that comes nearer, fine detail is not known."""
    with pytest.raises(ValueError, match="psf_out is sharper"):
        again(gaussian(5.0), z_out=0.015, psf_in=gaussian_psf(2.0), psf_out=gaussian_psf(2.5))


def test_one_bad_galaxy_is_flagged_and_the_others_finish():
    images = np.stack([gaussian(5.0)] * 4)
    images[1] = np.nan
    psfs = [PSF_3, PSF_3, PSF_3, np.zeros((5, 5))]
    mock = again(images, z_out=[0.1, 0.1, -0.5, 0.1], psf_in=psfs)
    expected = [0, MockFlag.NO_DATA, MockFlag.BAD_REDSHIFT, MockFlag.NO_DATA]
    assert mock.flags.tolist() == expected
    np.testing.assert_allclose(mock.data[0], again(images[0]).data[0])
    assert np.isnan(mock.data[1:]).all()


def test_errors_are_clear():
    image = gaussian(5.0)
    with pytest.raises(ValueError, match="pixel_scale_out must be positive"):
        again(image, pixel_scale_out=0.0)
    with pytest.raises(ValueError, match="psf_out"):
        again(image, psf_out=None)
    with pytest.raises(ValueError, match="z_out is a number or one a galaxy"):
        again(image, z_out=[0.1, 0.2])
    with pytest.raises(ValueError, match="standard deviation"):
        again(image, noise_out=-1.0)
    with pytest.raises(ValueError, match="gain"):
        again(image, gain=0.0)
    with pytest.raises(ValueError, match="different sizes"):
        again([image, image[:-2]])


def test_inputs_with_units_and_lists(rng):
    image = gaussian(5.0) + rng.normal(0, 0.1, (65, 65))
    ccd = CCDData(image, unit=u.uJy, uncertainty=StdDevUncertainty(np.full(image.shape, 0.1)))
    options = dict(noise_in=None, noise_out=300 * u.nJy, pixel_scale_in=400 * u.mas)
    mock = again([ccd, ccd[4:-4, 4:-4]], shape=(41, 41), **options)
    assert mock.unit == u.uJy
    assert mock.data.shape == (2, 41, 41)
    np.testing.assert_allclose(mock.uncertainty, 0.3)
    one = mock.to_nddata(1)
    assert one.unit == u.uJy
    result = fit_images([one], SersicGalaxy2D(), psf=mock.psf)
    assert result.flags[0] == 0


# -- models ------------------------------------------------------------------------------


def test_a_fit_is_drawn_anew_where_its_image_would_be(rng):
    truth = SersicGalaxy2D(1000, 33, 31, 6, n=1, ellip=0.4, theta=0.5, psf=PSF_3)
    image = truth.render((65, 65)) + rng.normal(0, 0.01, (65, 65))
    result = fit_images(image, SersicGalaxy2D(), uncertainty=0.01, psf=PSF_3)
    options = dict(z_out=0.09, shape=(41, 41))
    by_fit = again(result, **options)
    by_image = again(image, noise_in=0.01, **options)
    inside = ~by_image.mask[0]
    peak = by_image.data.max()
    assert np.abs(by_fit.data - by_image.data)[0][inside].max() < 5e-3 * peak
    size, flux = scaling(0.05, 0.09)
    expected = SersicGalaxy2D(
        1000 * flux, 20 + size, 20 - size, 6 * size, n=1, ellip=0.4, theta=0.5, psf=PSF_3
    )
    assert np.abs(by_fit.data[0] - expected.render((41, 41))).max() < 5e-3 * peak


def test_failed_fits_and_redshifts_are_flagged():
    image = np.stack([gaussian(5.0)] * 3)
    image[1] = np.nan
    result = fit_images(image, SersicGalaxy2D(), uncertainty=0.1)
    mock = again(result, z_out=[0.1, 0.1, np.inf])
    assert mock.flags.tolist() == [0, MockFlag.NO_DATA, MockFlag.BAD_REDSHIFT]
    assert np.isfinite(mock.data[0]).all()


def test_observe_draws_the_model_with_the_noise_asked_for():
    model = SersicGalaxy2D(5000, 20, 19, 4, n=2, psf=PSF_3)
    clean = observe(model, shape=(41, 41))
    np.testing.assert_allclose(clean.data[0], model.render((41, 41)))
    params = np.tile(model.parameters, (400, 1))
    mock = observe(model, params=params, shape=(41, 41), noise=np.full(400, 2.0), gain=0.5, rng=2)
    pulls = (mock.data - clean.data) / np.sqrt(4 + clean.data / 0.5)
    assert pulls.var() == pytest.approx(1, abs=5 * np.sqrt(2 / pulls.size))
    np.testing.assert_allclose(mock.uncertainty[0], np.sqrt(4 + clean.data[0] / 0.5))


def test_observe_with_other_pixels_and_psf():
    model = SersicGalaxy2D(5000, 21, 20, 4, n=1, psf=PSF_3)
    mock = observe(
        model,
        shape=(41, 41),
        psf=gaussian_psf(2.0),
        pixel_scale_in=0.2 * u.arcsec,
        pixel_scale_out=0.1,
    )
    expected = SersicGalaxy2D(5000, 22, 20, 8, n=1, psf=gaussian_psf(2.0)).render((41, 41))
    np.testing.assert_allclose(mock.data[0], expected)
    assert mock[[0]].psf == mock.psf


def test_observe_a_result_uses_its_own_psfs():
    psfs = [gaussian_psf(3.0), gaussian_psf(3.5)]
    params = np.tile([1000.0, 20, 20, 3, 1, 0, 0], (2, 1))
    images = SersicGalaxy2D().render((41, 41), params=params, psf=psfs)
    result = fit_images(images, SersicGalaxy2D(), uncertainty=0.01, psf=psfs)
    mock = observe(result)
    np.testing.assert_allclose(mock.data, result.model_images, atol=1e-5 * images.max())
    assert mock.psf == psfs
    mixed = [gaussian_psf(3.0), gaussian_psf(1.5)]
    each = [observe(result[i], psf=p).data[0] for i, p in enumerate(mixed)]
    np.testing.assert_allclose(observe(result, psf=mixed).data, each, atol=1e-5 * images.max())


def test_observe_errors():
    model = SersicGalaxy2D(1000, 20, 20, 3)
    with pytest.raises(ValueError, match="shape"):
        observe(model)
    with pytest.raises(ValueError, match="both of pixel_scale_in"):
        observe(model, shape=(9, 9), pixel_scale_in=0.2)
    with pytest.raises(TypeError, match="GalaxyModel or a FitResult"):
        observe(np.zeros((3, 3)), shape=(9, 9))
    with pytest.raises(ValueError, match="does not fit"):
        observe(model, shape=(9, 9), noise=np.ones((4, 4)))


def test_torch_is_not_imported():
    code = "import sys, galmorph.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
