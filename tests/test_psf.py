"""The PSF class: what it takes, what it refuses, what it remembers."""

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.modeling.models import Gaussian2D, Moffat2D
from astropy.nddata import CCDData, NDData

from galmorph import PSF, PointSource2D


@pytest.fixture
def array():
    y, x = np.mgrid[-6:7, -5:6]
    return 7.0 * np.exp(-0.5 * (x**2 + y**2) / 1.5**2)


def test_normalised_and_read_only(array):
    psf = PSF(array)
    np.testing.assert_allclose(psf.data, array / array.sum(), rtol=1e-14)
    assert psf.shape == (13, 11)
    with pytest.raises(ValueError, match="read-only"):
        psf.data[0, 0] = 1
    array[6, 5] = 0  # the user's array is not ours
    assert psf.data[6, 5] > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((5, 5)), "positive sum"),
        (-np.ones((5, 5)), "positive sum"),
        (np.diag([1.0, -1.0]), "positive sum"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.where(np.eye(5), np.inf, 1), "infinite"),
        (np.ones(5), "two-dimensional"),
        (np.ones((2, 5, 5)), "two-dimensional"),
        (np.float64(1.0), "two-dimensional"),
        (np.ones((0, 5)), "empty"),
    ],
)
def test_unusable_arrays(bad, message):
    with pytest.raises(ValueError, match=message):
        PSF(bad)
    with pytest.raises(ValueError, match=message):
        PointSource2D(psf=bad)


@pytest.mark.parametrize("oversampling", [0, -2, 1.5, np.nan])
def test_unusable_oversampling(array, oversampling):
    with pytest.raises(ValueError, match="oversampling"):
        PSF(array, oversampling=oversampling)


def test_equality_is_that_of_content(array):
    a, b = PSF(array, oversampling=2), PSF(4 * array, oversampling=2)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b}) == 1
    for other in (
        PSF(array),
        PSF(array, oversampling=2, includes_pixel=False),
        PSF(array[1:-1], oversampling=2),
        PSF(array**2, oversampling=2),
        "PSF",
    ):
        assert a != other


def test_repr_says_how_it_was_sampled(array):
    text = repr(PSF(array, oversampling=2, includes_pixel=False))
    assert text == "PSF(shape=(13, 11), oversampling=2, includes_pixel=False)"


@pytest.mark.parametrize("oversampling", [1, 3])
def test_radius_and_sigma_of_a_gaussian(oversampling):
    at = np.arange(-60, 61) / oversampling
    psf = PSF(np.exp(-0.5 * (at[:, None] ** 2 + at**2) / 2.0**2), oversampling=oversampling)
    # 1 - exp(-r² / 2 σ²) of the light is within r
    for fraction in (0.5, 0.99):
        expected = 2.0 * np.sqrt(-2 * np.log(1 - fraction))
        assert psf.radius(fraction) == pytest.approx(expected, abs=0.5 / oversampling)
    assert psf.sigma == pytest.approx(2.0, rel=1e-3)


# -- from_any ------------------------------------------------------------------------------------


def test_arrays_of_any_kind(array, tmp_path):
    expected = PSF(array)
    path = tmp_path / "psf.fits"
    fits.PrimaryHDU(array).writeto(path)
    for anything in (
        expected,
        array,
        array.tolist(),
        array * u.Unit("1/s"),
        NDData(array),
        CCDData(array, unit="adu"),
        fits.PrimaryHDU(array),
        fits.ImageHDU(array),
        path,
        str(path),
    ):
        assert PSF.from_any(anything) == expected


def test_header_declares_the_sampling(array, tmp_path):
    header = fits.Header({"OVERSAMP": 3, "PIXINCL": False})
    path = tmp_path / "psf.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array, header)]).writeto(path)
    for anything in (path, fits.ImageHDU(array, header)):
        psf = PSF.from_any(anything)
        assert (psf.oversampling, psf.includes_pixel) == (3, False)


def test_files_without_an_image(tmp_path):
    path = tmp_path / "empty.fits"
    fits.PrimaryHDU().writeto(path)
    with pytest.raises(ValueError, match="no two-dimensional image"):
        PSF.from_any(path)
    with pytest.raises(FileNotFoundError):
        PSF.from_any(tmp_path / "nothing.fits")


@pytest.mark.parametrize("bad", ["text.fits", {"a": 1}, object(), [["a", "b"], ["c", "d"]]])
def test_what_is_no_psf_is_refused(bad):
    with pytest.raises((ValueError, TypeError, OSError)):
        PSF.from_any(bad)


def test_model_is_sampled_about_its_own_centre():
    centred, elsewhere = Gaussian2D(1, 0, 0, 1.3, 1.3), Gaussian2D(5, 3.3, -2.1, 1.3, 1.3)
    a, b = PSF.from_any(centred), PSF.from_any(elsewhere)
    assert a.oversampling == 4
    np.testing.assert_allclose(a.data, b.data, atol=1e-12)
    ny, nx = a.shape
    assert ny % 2 == nx % 2 == 1
    assert np.unravel_index(a.data.argmax(), a.shape) == (ny // 2, nx // 2)


def test_wide_models_are_sampled_far_out():
    """The wings of a Moffat profile are cut where they no longer matter."""
    narrow, wide = PSF.from_any(Moffat2D(1, 0, 0, 1.0, 4.5)), PSF.from_any(Moffat2D(1, 0, 0, 3, 3))
    assert narrow.shape[0] < wide.shape[0] <= 4 * 80 + 1
    edge = wide.data[0].max() / wide.data.max()
    assert edge < 1e-4


def test_photutils_models():
    psf_models = pytest.importorskip("photutils.psf")
    gaussian = psf_models.CircularGaussianPRF(flux=10, x_0=4.2, y_0=3.3, fwhm=2.8)
    psf = PSF.from_any(gaussian)
    star = PointSource2D(10, 12.3, 11.8, psf=psf).render((25, 25))
    y, x = np.mgrid[:25, :25]
    gaussian.x_0, gaussian.y_0 = 12.3, 11.8
    assert np.abs(star - gaussian(x, y)).max() < 1e-4 * star.max()


def test_image_model_of_photutils():
    """An ImagePSF keeps its oversampling in itself; its values at pixels are the same as ours."""
    psf_models = pytest.importorskip("photutils.psf")
    at = np.arange(-40, 41) / 4
    samples = np.exp(-0.5 * (at[:, None] ** 2 + at**2) / 1.4**2)
    model = psf_models.ImagePSF(samples / samples.sum() * 16, oversampling=4)
    star = PointSource2D(10, 15.3, 14.8, psf=model).render((31, 31))
    y, x = np.mgrid[:31, :31]
    model.flux, model.x_0, model.y_0 = 10, 15.3, 14.8
    assert np.abs(star - model(x, y)).max() < 2e-3 * star.max()
