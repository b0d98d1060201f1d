"""Bad input: an exception where the whole call is wrong, a flag where one galaxy is."""

import warnings

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.modeling.fitting import TRFLSQFitter
from astropy.modeling.models import Gaussian2D
from astropy.nddata import NDData, StdDevUncertainty, UnknownUncertainty
from astropy.table import Table
from astropy.utils.exceptions import AstropyUserWarning
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal
from stub_fitter import StubFitter

from galmorph import FitFlag, GaussianGalaxy2D, MAPFitter, SersicGalaxy2D, fit_images

IMAGE = np.random.default_rng(3).normal(5, 1, (12, 14))
CUBE = np.random.default_rng(4).normal(5, 1, (3, 12, 14))


def fit(images=IMAGE, model=None, fitter=None, **options):
    return fit_images(images, model or GaussianGalaxy2D(), fitter or StubFitter(), **options)


# -- the whole call is wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros(5), ValueError, "2-D or 3-D, not 1-D"),
        (np.zeros((1, 2, 3, 4)), ValueError, "2-D or 3-D, not 4-D"),
        (3.0, ValueError, "2-D or 3-D, not 0-D"),
        (np.zeros((0, 5)), ValueError, "no pixels"),
        (np.zeros((0, 5, 5)), ValueError, "no pixels"),
        ([], ValueError, "empty"),
        ([IMAGE, CUBE], ValueError, "image 1 of the list is 3-D"),
        ([IMAGE, None], TypeError, "image 1 of the list"),
        ([[1.0, 2.0], [3.0]], ValueError, "array"),
        (IMAGE + 1j, TypeError, "real numbers"),
        (np.array([["a", "b"]]), TypeError, "real numbers"),
        (np.array([[None]]), TypeError, "real numbers"),
        (None, TypeError, "NoneType"),
        (b"bytes", TypeError, "bytes"),
        ({"data": IMAGE}, TypeError, "dict"),
        ("nowhere.fits", FileNotFoundError, "nowhere.fits"),
        ([IMAGE * u.Jy, IMAGE * u.s], u.UnitsError, "image 1 is in s"),
        ([IMAGE * u.Jy, IMAGE], u.UnitsError, "no unit"),
        (fits.HDUList([fits.PrimaryHDU()]), ValueError, "no image"),
    ],
)
def test_images(images, error, message):
    with pytest.raises(error, match=message):
        fit(images, uncertainty=None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(uncertainty=np.ones((3, 3))), ValueError, r"uncertainty has shape \(3, 3\)"),
        (dict(uncertainty=np.ones(14)), ValueError, r"uncertainty has shape \(14,\)"),
        (dict(uncertainty=0.0), ValueError, "must be positive"),
        (dict(uncertainty=-1.0), ValueError, "must be positive"),
        (dict(uncertainty=np.nan), ValueError, "must be positive"),
        (dict(uncertainty="high"), TypeError, "uncertainty must hold real numbers"),
        (dict(uncertainty=1 * u.Jy), u.UnitsError, "data in no unit"),
        (dict(uncertainty=UnknownUncertainty(IMAGE)), TypeError, "UnknownUncertainty"),
        (dict(mask=np.ones((3, 3), bool)), ValueError, r"mask has shape \(3, 3\)"),
        (dict(mask=IMAGE), TypeError, "mask must hold bool"),
        (dict(psf=np.zeros((3, 3))), ValueError, "PSF"),
        (dict(psf=np.full((3, 3), np.nan)), ValueError, "PSF"),
        (dict(psf=np.zeros((0, 0))), ValueError, "PSF"),
        (dict(psf=np.ones(5)), ValueError, "PSF"),
        (dict(psf=np.ones((2, 3, 3))), ValueError, "2 PSFs for 1"),
        (dict(psf=[]), ValueError, "list of PSFs is empty"),
        (dict(psf="nowhere.fits"), FileNotFoundError, "nowhere.fits"),
        (dict(background="wavy"), ValueError, "background must be one of"),
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(batch_size=1.5), ValueError, "batch_size"),
        (dict(progress="yes"), TypeError, "progress"),
        (dict(size=5), ValueError, "positions"),
        (dict(positions=[(1, 2), (3, 4)]), ValueError, "size is needed"),
        (dict(positions=[(1, 2)], size=0), ValueError, "at least 1"),
        (dict(positions=[(1, 2)], size=-3), ValueError, "at least 1"),
        (dict(positions=[(1, 2)], size=2.5), TypeError, "whole pixels"),
        (dict(positions=[(1, 2)], size=(1, 2, 3)), TypeError, "size must be"),
        (dict(positions=[(1, 2)], size=1000), ValueError, "more than twice"),
        (dict(positions=np.zeros((0, 2)), size=5), ValueError, "empty"),
        (dict(positions=np.zeros((2, 3)), size=5), ValueError, r"shape \(N, 2\)"),
        (dict(positions="here", size=5), TypeError, "positions must be"),
        (dict(positions=Table({"a": [1]}), size=5), ValueError, "none of the columns"),
        (dict(positions=[(1, 2)] * u.deg, size=5), u.UnitsError, "deg"),
        (dict(positions=SkyCoord([1], [2], unit="deg"), size=5), ValueError, "celestial WCS"),
        (dict(segmentation=np.ones((3, 3), int)), ValueError, "segmentation has shape"),
        (dict(segmentation=IMAGE), TypeError, "integers"),
        (dict(segmentation=np.zeros(IMAGE.shape, int)), ValueError, "no segment"),
        (dict(model=GaussianGalaxy2D), TypeError, "an instance"),
        (dict(model="sersic"), TypeError, "astropy model"),
        (dict(model=GaussianGalaxy2D(*np.ones((6, 2)), n_models=2)), ValueError, "model set"),
        (dict(fitter=TRFLSQFitter()), TypeError, "fit_stamps"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fit(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(size=5, positions=[(1, 2)] * 3),
        dict(segmentation=np.ones((12, 14), int)),
        dict(positions=[(1, 2)]),
        dict(uncertainty=np.ones((2, 12, 14))),
        dict(uncertainty=np.ones(3)),
        dict(mask=np.zeros((2, 12, 14), bool)),
        dict(psf=[np.ones((3, 3))] * 2),
    ],
)
@pytest.mark.parametrize("images", [CUBE, list(CUBE)])
def test_what_does_not_fit_a_cube_or_a_list(images, options):
    with pytest.raises(ValueError):
        fit(images, **options)


def test_units_that_do_not_fit():
    for uncertainty in (1 * u.s, StdDevUncertainty(np.ones(IMAGE.shape), unit=u.s)):
        with pytest.raises(u.UnitsError, match="uncertainty in s does not fit data in Jy"):
            fit(IMAGE * u.Jy, uncertainty=uncertainty)


@pytest.mark.parametrize("shape", [(100, 100), (4, 50, 50)])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("ending", ["fits", "fits.gz"])
def test_truncated_files(tmp_path, rng, shape, keep, ending):
    path = tmp_path / f"image.{ending}"
    fits.writeto(path, rng.normal(size=shape))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(OSError, match=r"image\.fits"):
        fit(path)


def test_files_that_are_not_images(tmp_path):
    (tmp_path / "text.fits").write_text("no image")
    with pytest.raises(OSError, match=r"text\.fits"):
        fit(tmp_path / "text.fits")
    Table({"a": [1]}).write(tmp_path / "table.fits")
    with pytest.raises(ValueError, match=r"table\.fits: holds no image"):
        fit(tmp_path / "table.fits")
    fits.writeto(tmp_path / "image.fits", IMAGE)
    with pytest.raises(ValueError, match=r"image\.fits: has no extension"):
        fit(f"{tmp_path / 'image.fits'}[SCI]")
    with pytest.raises(FileNotFoundError):
        fit(tmp_path)  # a folder


def test_arrays_that_are_not_the_users_are_not_changed():
    image, sigma, mask = IMAGE.copy(), np.ones(IMAGE.shape), np.zeros(IMAGE.shape, bool)
    image[0, 0] = sigma[1, 1] = np.nan
    mask[2, 2] = True
    copies = [a.copy() for a in (image, sigma, mask)]
    fit(image, uncertainty=sigma, mask=mask)
    for array, copy in zip((image, sigma, mask), copies, strict=True):
        assert_array_equal(array, copy)


# -- only one galaxy is wrong --------------------------------------------------------------

#: What may be wrong with a stamp (and its uncertainty), and what is said about it.
HARM = {
    "all NaN": (lambda d, s: (d * np.nan, s), FitFlag.NO_DATA),
    "zero": (lambda d, s: (d * 0, s), FitFlag.NO_DATA),
    "constant": (lambda d, s: (d * 0 - 3, s), FitFlag.NO_DATA),
    "no uncertainty": (lambda d, s: (d, s * np.nan), FitFlag.NO_DATA | FitFlag.BAD_UNCERTAINTY),
    "zero uncertainty": (lambda d, s: (d, s * 0), FitFlag.NO_DATA | FitFlag.BAD_UNCERTAINTY),
    "some bad uncertainty": (lambda d, s: (d, np.where(d > 0.3, -s, s)), FitFlag.BAD_UNCERTAINTY),
    "infinite": (lambda d, s: (d / 0.0, s), FitFlag.NO_DATA),
    "saturated": (lambda d, s: (np.minimum(d * 100, 1000), s), FitFlag.SATURATED),
    "negative": (lambda d, s: (-d - 50, s), FitFlag.LOW_SNR),
    "noise": (lambda d, s: (np.random.default_rng(1).normal(0, 1, d.shape), s), FitFlag.LOW_SNR),
    "half NaN": (lambda d, s: (np.where(np.arange(33) < 17, np.nan, d), s), FitFlag.BAD_CENTER),
    "one pixel": (lambda d, s: (np.where(d == d.max(), d, np.nan), s), FitFlag.FEW_PIXELS),
    "huge": (lambda d, s: (d * 1e200, s), FitFlag.BAD_UNCERTAINTY),
}


@pytest.fixture(scope="module")
def stamps():
    truth = SersicGalaxy2D(flux=2000, x_0=16.3, y_0=15.8, r_eff=4, n=1.2, ellip=0.3, theta=0.5)
    noise = np.random.default_rng(7).normal(0, 1, (3, 33, 33))
    return truth.render((33, 33)) + noise


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", HARM)
def test_one_bad_stamp(stamps, name):
    harm, expected = HARM[name]
    data, sigma = stamps.copy(), np.ones(stamps.shape)
    good = fit_images(data, SersicGalaxy2D(), MAPFitter(), uncertainty=sigma)
    with np.errstate(all="ignore"):
        data[1], sigma[1] = harm(data[1], sigma[1])
    result = fit_images(data, SersicGalaxy2D(), MAPFitter(), uncertainty=sigma)
    assert result.flags[1] & expected == expected
    assert not np.any(result.flags[[0, 2]] & ~good.flags[[0, 2]])
    assert_allclose(result.params[[0, 2]], good.params[[0, 2]], rtol=1e-3)
    if result.flags[1] & FitFlag.FAILED:
        assert np.isnan(result.params[1]).all()
    # No confident detection where there is no galaxy.
    if name in ("negative", "noise"):
        assert not result.params[1, 0] / result.stds[1, 0] > 5


def test_one_by_one_pixel():
    for uncertainty in (None, 1.0):
        result = fit_images(np.ones((1, 1)), SersicGalaxy2D(), uncertainty=uncertainty)
        assert result.flags[0] & FitFlag.FEW_PIXELS
        assert np.isnan(result.params).all()


def test_psf_larger_than_the_stamp(stamps):
    y, x = np.mgrid[-40:41, -40:41]
    psf = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    large = fit_images(stamps, SersicGalaxy2D(), uncertainty=1.0, psf=psf)
    small = fit_images(stamps, SersicGalaxy2D(), uncertainty=1.0, psf=psf[28:-28, 28:-28])
    assert not np.any(large.flags & FitFlag.FAILED)
    assert_allclose(large.params, small.params, rtol=0.01)


def test_one_bad_psf(stamps):
    y, x = np.mgrid[-5:6, -5:6]
    psf = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    good = fit_images(stamps, SersicGalaxy2D(), uncertainty=1.0, psf=psf)
    for bad in (psf * 0, psf * np.nan, np.zeros((0, 0)), "nowhere.fits", None):
        result = fit_images(stamps, SersicGalaxy2D(), uncertainty=1.0, psf=[psf, bad, psf])
        assert ((result.flags & FitFlag.BAD_PSF) != 0).tolist() == [False, True, False]
        assert_allclose(result.params[[0, 2]], good.params[[0, 2]], rtol=1e-3)


# -- anything ------------------------------------------------------------------------------

#: What `fit_images` says that it raises; UnitsError is a ValueError.
DOCUMENTED = (TypeError, ValueError, OSError)

numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)
shapes = npst.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9)
images = npst.arrays(np.float64, shapes, elements=numbers)


@given(data=images, uncertainty=st.none() | numbers)
@settings(max_examples=60)
def test_any_numbers(data, uncertainty):
    """Whatever the pixels: rows for all, NaN exactly where a flag says so."""
    fitter = StubFitter()
    try:
        result = fit(data, fitter=fitter, uncertainty=uncertainty)
    except ValueError as error:
        assert "must be positive" in str(error)  # noqa: PT017
        assert not (uncertainty is not None and uncertainty > 0)
        return
    n = len(data) if data.ndim == 3 else 1
    assert len(result) == n == len(result.to_table())
    failed = (result.flags & FitFlag.FAILED) != 0
    assert_array_equal(np.isnan(result.params).any(axis=1), failed)
    for batch in fitter.batches:
        assert np.isfinite(batch.data).all()
        assert np.isfinite(batch.inv_sigma).all()
        assert np.all(batch.inv_sigma >= 0)
        assert np.all(batch.data[batch.inv_sigma == 0] == 0)
        assert np.isfinite((batch.data * batch.inv_sigma) ** 2).all()


@given(
    bad=npst.arrays(np.float64, (12, 14), elements=numbers),
    sigma=npst.arrays(np.float64, (12, 14), elements=numbers),
    mask=npst.arrays(bool, (12, 14)),
)
@settings(max_examples=40)
def test_neighbours_in_a_batch_do_not_notice(bad, sigma, mask):
    data, uncertainty, masks = CUBE.copy(), np.ones(CUBE.shape), np.zeros(CUBE.shape, bool)
    good = fit(data, uncertainty=uncertainty, mask=masks)
    data[1], uncertainty[1], masks[1] = bad, sigma, mask
    result = fit(data, uncertainty=uncertainty, mask=masks)
    for i in (0, 2):
        assert_array_equal(result.params[i], good.params[i])
        assert result.flags[i] == good.flags[i] == 0


@given(
    positions=npst.arrays(np.float64, st.tuples(st.integers(1, 6), st.just(2)), elements=numbers),
    size=st.integers(1, 25) | st.tuples(st.integers(1, 25), st.integers(1, 25)),
)
@settings(max_examples=60)
def test_any_positions(positions, size):
    result = fit(positions=positions, size=size, uncertainty=1.0)
    x, y = positions.T
    with np.errstate(invalid="ignore"):
        inside = (x >= -0.5) & (x <= 13.5) & (y >= -0.5) & (y <= 11.5)
    assert_array_equal((result.flags & FitFlag.OUTSIDE) == 0, inside)
    fitted = np.isfinite(result.params).all(axis=1)
    assert_allclose(result.params[fitted, 1:3], positions[fitted], atol=1e-9)
    enough = result.dof > 0
    assert not np.any(fitted & ~inside)
    assert np.all(fitted[enough])


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    numbers,
    st.text(alphabet="ab.[]", max_size=5),
    st.lists(numbers, max_size=3),
    st.tuples(st.integers(-2, 20), st.integers(-2, 20)),
    npst.arrays(
        st.sampled_from([np.float64, np.int32, bool]),
        npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.just({}),
    st.just(Gaussian2D()),
    st.just(NDData(IMAGE)),
    st.just(1 * u.Jy),
    st.just(Table({"x": [3.0], "y": [4.0]})),
    st.just(b"abc"),
)


@given(
    images=anything | st.just(IMAGE) | st.just(CUBE),
    name=st.sampled_from(
        ["uncertainty", "mask", "psf", "positions", "size", "segmentation", "background"]
    ),
    value=anything,
    other=anything,
)
@settings(max_examples=250)
def test_any_argument(images, name, value, other):
    """Nonsense is refused with a documented exception, or makes a result."""
    options = {name: value}
    if name in ("size", "segmentation"):
        options["positions"] = other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyUserWarning)
        try:
            result = fit(images, **options)
        except DOCUMENTED as error:
            assert str(error)  # noqa: PT017
            return
    assert_array_equal(result.failed, np.isnan(result.params).any(axis=1))


@given(data=npst.arrays(np.float64, (9, 9), elements=st.floats(-1e6, 1e6)))
@settings(max_examples=8)
def test_any_pixels_with_the_real_fitter(data):
    assume(np.ptp(data) > 0)
    psf = np.outer([1, 2, 1], [1, 2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_images(
            data, GaussianGalaxy2D(), MAPFitter(max_iter=10), uncertainty=1.0, psf=psf
        )
    said = bool(result.flags[0] & (FitFlag.FAILED | FitFlag.NOT_CONVERGED))
    assert said or np.isfinite(result.params).all()
