"""Sources, background, noise and PSF, against simulated images whose truth is known."""

import numpy as np
import pytest
from astropy import units as u
from astropy.nddata import NDData, StdDevUncertainty
from numpy.testing import assert_allclose

from galmorph.detection import detect, estimate_psf, gaussian_psf, noise_correlation


def moffat(r2, fwhm, beta=3.0):
    """Moffat profile of unit flux."""
    gamma = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
    return (beta - 1) / np.pi / gamma**2 * (1 + r2 / gamma**2) ** -beta


def field_of_stars(n=36, fwhm=2.6, side=300, noise=1.0, seed=3):
    """Stars on a jittered grid, and where they are."""
    rng = np.random.default_rng(seed)
    k = int(np.ceil(np.sqrt(n)))
    step = side / k
    grid = (np.arange(k) + 0.5) * step
    x, y = (v.ravel()[:n] + rng.uniform(-2, 2, n) for v in np.meshgrid(grid, grid))
    flux = 4 * noise * fwhm * 10 ** rng.uniform(1.8, 2.8, n)
    yy, xx = np.mgrid[:side, :side]
    image = rng.normal(0, noise, (side, side))
    for x0, y0, f in zip(x, y, flux, strict=True):
        image += f * moffat((xx - x0) ** 2 + (yy - y0) ** 2, fwhm)
    return image, np.column_stack([x, y]), flux


@pytest.fixture(scope="module")
def stars():
    return field_of_stars()


@pytest.fixture(scope="module")
def found(stars):
    return detect(stars[0] + 100.0)


# -- detect --------------------------------------------------------------------------------


def test_detect_finds_all(stars, found):
    _, truth, flux = stars
    assert len(found) == len(found.positions) >= len(truth)
    distance = np.hypot(*(found.positions[:, None] - truth[None]).T)
    assert np.all(distance.min(axis=1) < 0.2)
    nearest = distance.argmin(axis=1)
    assert_allclose(np.asarray(found.catalog.kron_flux)[nearest], flux, rtol=0.15)


def test_detect_background_and_noise(found):
    assert_allclose(found.background, 100, atol=0.5)
    assert_allclose(np.median(found.rms), 1, rtol=0.05)
    assert_allclose(np.std(found.data[found.sky]), 1, rtol=0.1)
    assert found.settings["noise"] == "measured"


def test_detect_given_uncertainty_mask_and_nan(stars):
    image = stars[0].copy()
    image[10:20, 10:20] = np.nan
    mask = np.zeros(image.shape, bool)
    mask[:, 150:] = True
    found = detect(image, uncertainty=2.0, mask=mask)
    assert np.all(found.positions[:, 0] < 150)
    assert np.isnan(found.data[15, 15])
    assert np.isnan(found.data[100, 200])
    assert found.rms[100, 100] == 2.0
    assert found.settings["noise"] == "given"
    assert not found.sky[:, 150:].any()


def test_detect_nddata_with_unit(stars):
    data = NDData(stars[0], unit=u.nJy, uncertainty=StdDevUncertainty(np.ones((300, 300))))
    found = detect(data)
    assert found.catalog.segment_flux.unit == u.nJy


@pytest.mark.parametrize("background", ["constant", "none", 0.0, np.zeros((300, 300))])
def test_detect_backgrounds(stars, background):
    found = detect(stars[0], background=background)
    assert len(found) >= 36
    assert_allclose(found.background, 0, atol=0.2)


def test_deblending(rng):
    image, _, _ = field_of_stars(n=1, side=60)
    y, x = np.mgrid[:60, :60]
    image += 2000 * moffat((x - 30) ** 2 + (y - 22) ** 2, 2.6)
    image += 2000 * moffat((x - 30) ** 2 + (y - 31) ** 2, 2.6)
    assert len(detect(image, deblend=False, threshold=3)) < len(detect(image, threshold=3))


def test_detect_nothing(rng):
    found = detect(rng.normal(0, 1, (80, 80)), threshold=20)
    assert len(found) == 0
    assert found.catalog is None
    assert found.positions.shape == (0, 2)
    assert found.sky.all()


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((3, 20, 20)), {}, "one image"),
        (np.full((20, 20), np.nan), {}, "no usable pixel"),
        (np.zeros((20, 20)), {"threshold": 0}, "threshold"),
        (np.zeros((20, 20)), {"threshold": np.nan}, "threshold"),
        (np.zeros((20, 20)), {"n_pixels": 0}, "n_pixels"),
        (np.zeros((20, 20)), {"n_pixels": 2.5}, "n_pixels"),
        (np.zeros((20, 20)), {"contrast": 2}, "contrast"),
        (np.zeros((20, 20)), {"kernel_fwhm": -1}, "kernel_fwhm"),
        (np.zeros((20, 20)), {"background": "median"}, "background"),
        (np.zeros((20, 20)), {"background": np.zeros(3)}, "background"),
        (np.zeros((20, 20)), {"mask": np.zeros((3, 3), bool)}, "mask"),
        (np.zeros((20, 20)), {"uncertainty": -1.0}, "uncertainty"),
    ],
)
def test_detect_bad_input(image, options, message):
    with pytest.raises(ValueError, match=message):
        detect(image, **options)


@pytest.mark.parametrize("image", [np.zeros((40, 40)), np.ones((1, 1))])
def test_detect_constant_image(image):
    assert len(detect(image)) == 0


# -- noise ---------------------------------------------------------------------------------


def test_noise_correlation_of_smoothed_noise(rng):
    """Smoothing by n x n makes sums over large areas n times as uncertain, nearly."""
    from scipy.ndimage import uniform_filter

    white = rng.normal(size=(600, 600))
    factor, error = noise_correlation(white, scale=8)
    assert abs(factor - 1) < 4 * error
    smooth = uniform_filter(white, 2)
    truth = 8 * np.std(smooth[:, :].reshape(75, 8, 75, 8).mean(axis=(1, 3))) / np.std(smooth)
    factor, error = noise_correlation(smooth, scale=8)
    assert abs(factor - truth) < 4 * error
    assert 1.7 < factor < 2.0


def test_noise_correlation_needs_sky():
    with pytest.raises(ValueError, match="areas"):
        noise_correlation(np.zeros((20, 20)), scale=8)
    with pytest.raises(ValueError, match="two-dimensional"):
        noise_correlation(np.zeros(20))


# -- PSF -----------------------------------------------------------------------------------


def test_psf_of_stars(stars, found):
    estimate = estimate_psf(stars[0], found)
    assert estimate.method == "stars"
    assert 30 <= estimate.n_stars <= 36
    assert_allclose(estimate.fwhm, 2.6, atol=4 * estimate.fwhm_err)
    assert estimate.fwhm_err < 0.1
    assert "36" in estimate.statement or str(estimate.n_stars) in estimate.statement
    psf = estimate.psf
    half = (psf.shape[0] - 1) // 2
    step = np.arange(-half, half + 1) / psf.oversampling
    truth = moffat(step[:, None] ** 2 + step**2, 2.6)
    assert np.max(np.abs(psf.data - truth / truth.sum())) < 0.03 * psf.data.max()


def test_psf_ignores_galaxies_saturated_and_blended(rng):
    """Galaxies, larger than stars, do not change it; nor does a saturated star."""
    image, truth, _ = field_of_stars(n=36, seed=8)
    y, x = np.mgrid[:300, :300]
    for x0, y0 in rng.uniform(20, 280, (12, 2)):
        if np.hypot(*(truth - (x0, y0)).T).min() > 15:
            image += 3000 * moffat((x - x0) ** 2 + (y - y0) ** 2, rng.uniform(5, 8))
    limit = np.sort(image.ravel())[-5]
    estimate = estimate_psf(np.minimum(image, limit), max_value=limit)
    assert_allclose(estimate.fwhm, 2.6, rtol=0.04)


def test_psf_of_smooth_sizes_is_an_upper_limit(rng):
    """Where sizes run on without a locus it says so."""
    y, x = np.mgrid[:600, :600]
    image = rng.normal(0, 1, (600, 600))
    grid = np.mgrid[30:600:60, 30:600:60].reshape(2, -1).T
    widths = 2.5 * 10 ** rng.uniform(0, 0.6, len(grid)) ** 0.8
    for (x0, y0), fwhm in zip(grid, widths, strict=True):
        box = np.s_[y0 - 29 : y0 + 30, x0 - 29 : x0 + 30]
        image[box] += 2000 * fwhm * moffat((x[box] - x0) ** 2 + (y[box] - y0) ** 2, fwhm)
    estimate = estimate_psf(image)
    assert estimate.method == "compact sources"
    assert "upper limit" in estimate.statement


def test_psf_falls_back_to_a_gaussian():
    image, _, _ = field_of_stars(n=2, side=150)
    estimate = estimate_psf(image)
    assert estimate.method == "gaussian"
    assert "Gaussian" in estimate.statement
    assert_allclose(estimate.fwhm, 2.6, rtol=0.15)


def test_psf_without_sources(rng):
    with pytest.raises(ValueError, match="PSF must be given"):
        estimate_psf(rng.normal(0, 1, (80, 80)))


def test_psf_options(stars, found):
    estimate = estimate_psf(stars[0], found, size=15, oversampling=1, max_stars=10)
    assert estimate.psf.shape == (15, 15)
    assert estimate.n_stars <= 10
    with pytest.raises(ValueError, match="size"):
        estimate_psf(stars[0], found, size=14)
    with pytest.raises(ValueError, match="shape"):
        estimate_psf(stars[0][:100], found)


def test_gaussian_psf():
    psf = gaussian_psf(3.0)
    half = (psf.shape[0] - 1) // 2
    step = round(1.5 * psf.oversampling)
    expected = np.exp(-4 * np.log(2) * (step / psf.oversampling / 3.0) ** 2)
    assert_allclose(psf.data[half, half + step] / psf.data[half, half], expected)
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="fwhm"):
            gaussian_psf(bad)
