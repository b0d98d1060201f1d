"""Any kind of image becomes the same stamps, and every galaxy gets its row."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import (
    CCDData,
    InverseVariance,
    NDData,
    StdDevUncertainty,
    VarianceUncertainty,
)
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.exceptions import AstropyUserWarning
from astropy.utils.masked import Masked
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from stub_fitter import StubFitter

from galmorph import PSF, FitFlag, GaussianGalaxy2D, fit_images
from galmorph.images import stamp_source


def fit(images, fitter=None, **options):
    options.setdefault("background", "constant")
    return fit_images(images, GaussianGalaxy2D(), fitter or StubFitter(), **options)


def has(result, flag):
    return ((result.flags & flag) != 0).tolist()


@pytest.fixture
def cube(rng):
    return rng.normal(10, 1, (5, 12, 15))


@pytest.fixture
def field(rng):
    return rng.normal(0, 1, (60, 80))


@pytest.fixture
def wcs():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval = 150.0, 2.0
    wcs.wcs.crpix = 40.0, 30.0
    wcs.wcs.cdelt = -0.05 / 3600, 0.05 / 3600
    return wcs


# -- arrays and NDData -----------------------------------------------------------------


def test_cube_and_image_and_list_hold_the_same_stamps(cube):
    result = fit(cube, uncertainty=1.0)
    assert_allclose(result.params[:, 0], cube.sum(axis=(1, 2)))
    assert_allclose(fit(list(cube), uncertainty=1.0).params, result.params)
    assert_allclose(fit(cube[3], uncertainty=1.0).params[0], result.params[3])
    assert result.shapes.tolist() == [[12, 15]] * 5
    assert result.ids.tolist() == [0, 1, 2, 3, 4]
    assert not result.flags.any()


def test_nested_lists_of_numbers_are_one_image():
    assert len(stamp_source([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], uncertainty=1)) == 1


def test_mixed_sizes_keep_their_order(rng):
    shapes = [(9, 9), (11, 8), (9, 9), (8, 11), (11, 8)]
    images = [rng.normal(k, 1, shape) for k, shape in enumerate(shapes)]
    fitter = StubFitter()
    result = fit(images, fitter, uncertainty=1.0)
    assert_allclose(result.params[:, 0], [image.sum() for image in images])
    assert result.shapes.tolist() == [list(s) for s in shapes]
    assert sorted(len(batch) for batch in fitter.batches) == [1, 2, 2]
    assert [m.shape for m in result.model_images] == shapes


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batches_cover_each_stamp_once(cube, batch_size):
    source = stamp_source(cube)
    batches = list(source.batches(batch_size))
    assert max(len(b) for b in batches) == min(batch_size, 5)
    assert sorted(np.concatenate(batches)) == list(range(5))


def test_default_batches_are_smaller_for_larger_stamps():
    def first(side):
        return len(next(stamp_source(np.zeros((200, side, side))).batches()))

    assert first(16) == first(64) == 128
    assert first(128) == 32


def test_integers_and_single_precision_become_double(cube):
    for dtype in (np.int16, np.uint8, np.float32, ">f4"):
        batch = stamp_source(cube.astype(dtype), uncertainty=1).get([0])
        assert batch.data.dtype == batch.inv_sigma.dtype == np.float64
        assert_allclose(batch.data[0], cube[0].astype(dtype))


def test_all_kinds_of_uncertainty_mean_the_same(cube):
    sigma = np.linspace(0.5, 2, 12 * 15).reshape(12, 15)
    expected = 1 / sigma
    for uncertainty in (
        sigma,
        StdDevUncertainty(sigma),
        VarianceUncertainty(sigma**2),
        InverseVariance(sigma**-2),
    ):
        given = stamp_source(cube[0], uncertainty=uncertainty).get([0])
        assert_allclose(given.inv_sigma[0], expected)
        if not isinstance(uncertainty, np.ndarray):
            brought = stamp_source(NDData(cube[0], uncertainty=uncertainty)).get([0])
            assert_allclose(brought.inv_sigma[0], expected)


def test_shapes_of_uncertainty(cube):
    one = np.linspace(1, 2, 180).reshape(12, 15)
    each = np.arange(1.0, 6)[:, None, None]
    for value, expected in (
        (2.0, np.full(cube.shape, 2.0)),
        (one, np.broadcast_to(one, cube.shape)),
        (each, np.broadcast_to(each, cube.shape)),
        (one * each, one * each),
    ):
        source = stamp_source(cube, uncertainty=value)
        assert_allclose(source.get([0, 1, 2, 3, 4]).inv_sigma, 1 / expected)
        assert_allclose(source.get([4, 1]).inv_sigma, 1 / expected[[4, 1]])


def test_units_of_the_uncertainty_are_converted(cube):
    data = cube * u.Jy
    for uncertainty in (
        500 * u.mJy,
        VarianceUncertainty(np.full((12, 15), 0.25e6), unit=u.mJy**2),
        InverseVariance(np.full((12, 15), 4e-6), unit=u.mJy**-2),
        0.5,
    ):
        batch = stamp_source(data, uncertainty=uncertainty).get([0])
        assert_allclose(batch.inv_sigma, 2)
    assert fit(data, uncertainty=500 * u.mJy).data_unit == u.Jy


def test_units_of_a_list_are_those_of_its_first_image(cube):
    images = [cube[0] * u.Jy, cube[1] * u.mJy]
    result = fit(images, uncertainty=0.1)
    assert_allclose(result.params[:, 0], [cube[0].sum(), cube[1].sum() / 1000])
    assert result.data_unit == u.Jy


def test_argument_takes_the_place_of_the_images_own_uncertainty(cube):
    image = NDData(cube[0], uncertainty=StdDevUncertainty(np.full((12, 15), 7.0)))
    assert_allclose(stamp_source(image, uncertainty=2.0).get([0]).inv_sigma, 0.5)


def test_true_in_a_mask_is_bad_and_masks_add_up(cube):
    mine, its = np.zeros((2, 12, 15), bool)
    mine[2, 3] = its[5, 6] = True
    batch = stamp_source(NDData(cube[0], mask=its), mask=mine, uncertainty=1).get([0])
    assert_array_equal(batch.inv_sigma[0] == 0, mine | its)
    assert_array_equal(batch.data[0][mine | its], 0)


def test_masked_arrays_and_masked_quantities(cube):
    bad = cube[0] > 11
    for image in (
        np.ma.MaskedArray(cube[0], mask=bad),
        Masked(cube[0], mask=bad),
        Masked(cube[0] * u.Jy, mask=bad),
    ):
        batch = stamp_source(image, uncertainty=1).get([0])
        assert_array_equal(batch.inv_sigma[0] == 0, bad)


def test_unusable_pixels_hold_zeros(cube):
    image, sigma = cube[0].copy(), np.ones((12, 15))
    image[0, 0], image[0, 1] = np.nan, np.inf
    sigma[0, 2:6] = 0, -1, np.nan, np.inf
    batch = stamp_source(image, uncertainty=sigma).get([0])
    assert_array_equal(np.flatnonzero(batch.inv_sigma[0] == 0), np.arange(6))
    assert_array_equal(batch.data[0, 0, :6], 0)
    assert batch.flags[0] == FitFlag.BAD_UNCERTAINTY


def test_infinite_sigma_and_zero_weight_are_no_mistake(cube):
    sigma = np.ones((12, 15))
    sigma[0, 0] = np.inf
    weight = np.ones((12, 15))
    weight[0, 0] = 0
    for uncertainty in (sigma, InverseVariance(weight)):
        batch = stamp_source(cube[0], uncertainty=uncertainty).get([0])
        assert batch.flags[0] == 0
        assert batch.inv_sigma[0, 0, 0] == 0


def test_numbers_that_cannot_be_squared_are_not_used(cube):
    image = cube[0].copy()
    image[3, 3] = 1e300
    batch = stamp_source(image, uncertainty=1).get([0])
    assert batch.inv_sigma[0, 3, 3] == 0
    assert batch.flags[0] & FitFlag.BAD_UNCERTAINTY


def test_anything_that_can_be_sliced_is_read_in_parts(cube):
    class OnDisk:
        shape, dtype = cube.shape, cube.dtype
        keys = []

        def __getitem__(self, key):
            self.keys.append(key)
            return cube[key]

    result = fit(OnDisk(), uncertainty=1.0, batch_size=2)
    assert_allclose(result.params[:, 0], cube.sum(axis=(1, 2)))
    assert OnDisk.keys == [slice(0, 2), slice(2, 4), slice(4, 5)]


# -- FITS ------------------------------------------------------------------------------


def hdu(data, name=None, ver=1, **header):
    hdu = fits.ImageHDU(data, name=name, ver=ver)
    hdu.header.update(header)
    return hdu


def test_extensions_by_name(tmp_path, cube):
    dq = np.zeros((12, 15), np.int16)
    dq[1, 1] = 4
    weight = np.ones((12, 15), np.float32)
    weight[2, 2] = 0
    hdus = fits.HDUList(
        [
            fits.PrimaryHDU(),
            hdu(np.full((12, 15), 3.0), "VAR"),
            hdu(weight, "WHT"),
            hdu(cube[0], "SCI", BUNIT="Jy"),
            hdu(np.full((12, 15), 2.0), "ERR"),
            hdu(dq, "DQ"),
            hdu(np.ones((3, 3)), "PSF", OVERSAMP=3),
        ]
    )
    path = tmp_path / "image.fits"
    hdus.writeto(path)
    for images in (path, str(path), hdus, f"{path}[SCI]", f"{path}[3]"):
        source = stamp_source(images)
        batch = source.get([0])
        expected = np.full((12, 15), 0.5)
        expected[1, 1] = expected[2, 2] = 0
        assert_array_equal(batch.inv_sigma[0], expected)
        assert_allclose(batch.data[0][expected > 0], cube[0][expected > 0])
        assert source.unit == u.Jy
        assert batch.psf.oversampling == 3


def test_versions_of_extensions_go_together(tmp_path, cube):
    hdus = [fits.PrimaryHDU()]
    for ver in (1, 2):
        hdus += [hdu(cube[ver], "SCI", ver), hdu(np.full((12, 15), float(ver)), "ERR", ver)]
    path = tmp_path / "image.fits"
    fits.HDUList(hdus).writeto(path)
    for name, ver in ((path, 1), (f"{path}[SCI,2]", 2)):
        batch = stamp_source(name).get([0])
        assert_allclose(batch.data[0], cube[ver])
        assert_allclose(batch.inv_sigma[0], 1 / ver)


def test_weight_is_no_uncertainty(cube):
    hdus = fits.HDUList(
        [fits.PrimaryHDU(), hdu(cube[0], "SCI"), hdu(np.full((12, 15), 9.0), "WHT")]
    )
    assert stamp_source(hdus).get([0]).flags[0] == FitFlag.NOISE_ESTIMATED


@pytest.mark.parametrize(("name", "values"), [("VAR", 4.0), ("IVAR", 0.25), ("RMS", 2.0)])
def test_kinds_of_uncertainty_by_name(cube, name, values):
    hdus = fits.HDUList([fits.PrimaryHDU(cube[0]), hdu(np.full((12, 15), values), name)])
    assert_allclose(stamp_source(hdus).get([0]).inv_sigma, 0.5)


def test_remarks_in_jwst_data_quality_are_not_bad_pixels(cube):
    dq = np.zeros((12, 15), np.uint32)
    dq[0, 0], dq[1, 1] = 4, 5
    hdus = fits.HDUList([fits.PrimaryHDU(), hdu(cube[0], "SCI"), hdu(dq, "DQ")])
    bad = np.argwhere(stamp_source(hdus, uncertainty=1).get([0]).inv_sigma[0] == 0)
    assert bad.tolist() == [[0, 0], [1, 1]]
    hdus[0].header["TELESCOP"] = "JWST"
    for mask in (None, np.zeros((12, 15), bool)):
        source = stamp_source(hdus, uncertainty=1, mask=mask)
        assert np.argwhere(source.get([0]).inv_sigma[0] == 0).tolist() == [[1, 1]]


def test_file_of_a_ccddata(tmp_path, cube, wcs):
    mask = cube[0] > 11
    uncertainty = VarianceUncertainty(np.full((12, 15), 4.0))
    ccd = CCDData(cube[0], unit="adu", uncertainty=uncertainty, mask=mask, wcs=wcs)
    ccd.write(tmp_path / "ccd.fits")
    for images in (ccd, tmp_path / "ccd.fits"):
        source = stamp_source(images)
        assert_array_equal(source.get([0]).inv_sigma[0], np.where(mask, 0, 0.5))
        assert source.unit == u.adu
        assert source.wcs.has_celestial


@pytest.mark.parametrize("kind", ["plain", "scaled", "compressed", "gz"])
def test_cubes_in_files_are_read_in_parts(tmp_path, cube, kind):
    data = np.round(cube).astype(np.uint16) if kind == "scaled" else cube.astype(np.float32)
    image = fits.ImageHDU(data)
    if kind == "compressed":
        image = fits.CompImageHDU(data, quantize_level=0, compression_type="GZIP_1")
    path = tmp_path / ("cube.fits.gz" if kind == "gz" else "cube.fits")
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    result = fit(path, uncertainty=1.0, batch_size=2)
    assert_allclose(result.params[:, 0], data.sum(axis=(1, 2), dtype=float), rtol=1e-6)
    assert_allclose(result[3].stamp(0)[0], data[3])


def test_lists_of_files(tmp_path, rng):
    images = [rng.normal(5, 1, (9 + k % 2, 10)) for k in range(4)]
    for k, image in enumerate(images):
        fits.writeto(tmp_path / f"{k}.fits", image)
    result = fit(sorted(tmp_path.glob("*.fits")), uncertainty=1.0)
    assert_allclose(result.params[:, 0], [image.sum() for image in images])


def test_single_hdu(cube):
    assert_allclose(fit(fits.PrimaryHDU(cube), uncertainty=1.0).params[:, 0], cube.sum((1, 2)))


# -- stamps of a large image -------------------------------------------------------------

XY = np.array([(30.2, 20.0), (50.0, 41.6)])


def tables():
    pair = dict(zip("xy", XY.T, strict=True))
    return {
        "x_0": Table({"x_0": XY[:, 0], "y_0": XY[:, 1], "x": [0, 0], "y": [0, 0]}),
        "x_fit": Table({"x_fit": XY[:, 0], "y_fit": XY[:, 1]}),
        "quantity": QTable({"x": XY[:, 0] * u.pix, "y": XY[:, 1] * u.pix}),
        "sextractor": Table({"X_IMAGE": XY[:, 0] + 1, "Y_IMAGE": XY[:, 1] + 1}),
        "x": Table(pair),
    }


@pytest.mark.parametrize("positions", [XY, XY.tolist(), XY * u.pix, *tables().values()])
def test_positions_of_any_kind(field, positions):
    source = stamp_source(field, positions=positions, size=11)
    assert_allclose(source.position + source.origin, XY)


def test_positions_on_the_sky(field, wcs):
    sky = SkyCoord(*wcs.wcs_pix2world(*XY.T, 0), unit="deg")
    image = NDData(field, wcs=wcs)
    by_name = Table({"RA": sky.ra.deg, "DEC": sky.dec.deg})
    for positions in (sky, sky.galactic, QTable({"sky_centroid": sky}), by_name):
        source = stamp_source(image, positions=positions, size=11)
        assert_allclose(source.position + source.origin, XY, atol=1e-6)


@pytest.mark.parametrize("size", [7, 8, (5, 9), (6, 4), 1])
def test_stamps_are_parts_of_the_image_about_the_position(field, size):
    source = stamp_source(field, positions=XY, size=size, uncertainty=1.0)
    ny, nx = np.broadcast_to(size, 2)
    for i, (x, y) in enumerate(source.origin):
        batch = source.get([i])
        assert_array_equal(batch.data[0], field[y : y + ny, x : x + nx])
        centre = (nx - 1) / 2, (ny - 1) / 2
        assert np.all(np.abs(source.position[i] - centre) <= 0.5)


def test_positions_in_the_result_are_those_in_the_image(field):
    result = fit(field, positions=XY, size=(9, 11), uncertainty=1.0)
    assert_allclose(result.params[:, 1:3], XY)
    data, _, image = result.stamp(1)
    x, y = result.origin[1]
    assert_array_equal(data, field[y : y + 9, x : x + 11])
    assert_allclose(image, result.model_at(1).render((60, 80))[y : y + 9, x : x + 11] + 0.25)


def test_stamps_of_ccddata_keep_uncertainty_and_mask(field):
    sigma = np.linspace(1, 2, field.size).reshape(field.shape)
    ccd = CCDData(field, unit="adu", uncertainty=StdDevUncertainty(sigma), mask=field > 2)
    batch = stamp_source(ccd, positions=XY, size=9).get([0])
    x, y = batch.origin[0]
    part = slice(y, y + 9), slice(x, x + 9)
    assert_allclose(batch.inv_sigma[0], np.where(field[part] > 2, 0, 1 / sigma[part]))


def test_stamps_at_the_edge_are_padded(field):
    source = stamp_source(field, positions=[(0, 0), (79, 59), (40, 30)], size=11, uncertainty=1)
    batch = source.get([0, 1, 2])
    assert ((batch.flags & FitFlag.EDGE) != 0).tolist() == [True, True, False]
    assert_array_equal(batch.data[0, 5:, 5:], field[:6, :6])
    assert_array_equal(batch.data[1, :6, :6], field[-6:, -6:])
    assert (batch.inv_sigma > 0).sum(axis=(1, 2)).tolist() == [36, 36, 121]


def test_positions_off_the_image_are_flagged(field):
    x = MaskedColumn([40.0, -0.6, 79.6, np.nan, 1e300, 3.0], mask=[0, 0, 0, 0, 0, 1])
    table = Table({"x": x, "y": np.full(6, 30.0)})
    fitter = StubFitter()
    result = fit(field, fitter, positions=table, size=9, uncertainty=1.0)
    assert has(result, FitFlag.OUTSIDE) == [False] + [True] * 5
    assert np.isnan(result.params[1:]).all()
    assert np.isfinite(result.params[0]).all()
    assert fitter.indices == [0]
    assert np.isnan(result.model_images[1:]).all()


def test_first_guesses_for_stamps(cube):
    positions = [(3, 4), (5, 6), (np.nan, 1), (-5, 2), (7.5, 8)]
    result = fit(cube, positions=positions, uncertainty=1.0)
    assert_allclose(result.params[[0, 1, 4], 1:3], np.array(positions)[[0, 1, 4]])
    assert_allclose(result.params[2, 1:3], (7, 5.5))  # no guess: the stub's own
    assert has(result, FitFlag.OUTSIDE) == [False, False, False, True, False]
    assert_allclose(fit(cube[0], positions=[(3, 4)], uncertainty=1.0).params[0, 1:3], (3, 4))


@pytest.fixture
def segments(field):
    """Two squares of light that touch, and one far away."""
    labels = np.zeros(field.shape, int)
    labels[20:26, 30:36] = 7
    labels[20:26, 36:42] = 9
    labels[50:55, 5:10] = 2
    return labels, field + 50 * (labels > 0)


def test_neighbours_are_masked_and_the_galaxy_is_not(segments):
    labels, image = segments
    result = fit(image, segmentation=labels, size=25, uncertainty=1.0)
    assert result.ids.tolist() == [2, 7, 9]
    assert_allclose(result.params[1:, 1:3], [(32.5, 22.5), (38.5, 22.5)], atol=0.2)
    for i, own in ((1, 7), (2, 9)):
        _, inv_sigma, _ = result.stamp(i)
        x, y = result.origin[i]
        part = labels[y : y + 25, x : x + 25]
        assert_array_equal(inv_sigma == 0, (part != 0) & (part != own))


def test_position_finds_its_own_segment(segments):
    labels, image = segments
    positions = [(38, 22), (60, 40)]  # on 9; on none
    source = stamp_source(image, positions=positions, segmentation=labels, size=21, uncertainty=1)
    x, y = source.origin[0]
    part = labels[y : y + 21, x : x + 21]
    assert_array_equal(source.get([0]).inv_sigma[0] == 0, part == 7)


def test_default_size_follows_the_segment(field):
    labels = np.zeros((200, 200), int)
    labels[100:103, 100:103] = 1
    labels[20:60, 20:40] = 2
    source = stamp_source(np.ones((200, 200)), segmentation=labels, uncertainty=1)
    assert source.shapes.tolist() == [[25, 25], [101, 101]]
    labels[:, 100:] = 3  # a segment as large as the image: no more than twice the image
    source = stamp_source(np.ones((200, 200)), segmentation=labels, uncertainty=1)
    assert source.shapes.max() <= 401


def test_photutils_catalogue_and_segmentation(segments):
    segmentation = pytest.importorskip("photutils.segmentation")
    labels, image = segments
    segm = segmentation.SegmentationImage(labels)
    catalogue = segmentation.SourceCatalog(image, segm)
    both = fit(image, positions=catalogue, segmentation=segm, uncertainty=1.0)
    assert both.ids.tolist() == [2, 7, 9]
    xy = np.column_stack([catalogue.x_centroid, catalogue.y_centroid])
    assert_allclose(both.params[:, 1:3], xy)
    table = fit(image, positions=catalogue.to_table(), segmentation=segm, uncertainty=1.0)
    assert_allclose(table.params, both.params)
    alone = fit(image, positions=catalogue, uncertainty=1.0)
    assert alone.shapes.tolist() == both.shapes.tolist() == [[25, 25]] * 3
    assert len(fit(image, positions=catalogue[1], uncertainty=1.0)) == 1


def test_labels_of_another_segmentation_are_looked_up(segments):
    labels, image = segments
    table = Table({"x": [38.0], "y": [22.0], "label": [123]})
    with pytest.warns(AstropyUserWarning, match="labels"):
        source = stamp_source(image, positions=table, segmentation=labels, size=21, uncertainty=1)
    assert source.get([0]).inv_sigma[0, 10, 10] > 0


def test_noise_is_estimated_beside_the_segments(segments):
    labels, image = segments
    source = stamp_source(image, segmentation=labels)
    batch = source.get([0, 1, 2])
    assert_allclose(1 / batch.inv_sigma.max(axis=(1, 2)), 1, atol=0.15)
    assert np.all(batch.flags & FitFlag.NOISE_ESTIMATED)


# -- PSFs ------------------------------------------------------------------------------


def test_one_psf_for_all_or_one_each(cube):
    assert stamp_source(cube).get([0]).psf is None
    shared = stamp_source(cube, psf=np.ones((3, 3))).get([0, 1]).psf
    assert isinstance(shared, PSF)
    each = [np.ones((3, 3 + 2 * k)) for k in range(5)]
    psfs = stamp_source(cube, psf=each).get([4, 1]).psf
    assert [p.shape for p in psfs] == [(3, 11), (3, 5)]
    assert len(stamp_source(cube, psf=np.ones((5, 3, 3))).get([0, 1]).psf) == 2


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones((0, 0)), None])
def test_one_bad_psf_hurts_one_galaxy(cube, bad):
    psfs = [np.ones((3, 3)) for _ in range(5)]
    psfs[2] = bad
    fitter = StubFitter()
    result = fit(cube, fitter, psf=psfs, uncertainty=1.0)
    assert has(result, FitFlag.BAD_PSF) == [False, False, True, False, False]
    assert fitter.indices == [0, 1, 3, 4]
    assert all(isinstance(p, PSF) for p in fitter.batches[0].psf)
    assert np.isnan(result.params[2]).all()
    assert np.isnan(result.model_images[2]).all()
    assert np.isfinite(result.model_images[3]).all()


def test_psfs_of_nddata(cube):
    psf = np.ones((3, 3))
    assert stamp_source(NDData(cube, psf=psf)).get([0]).psf.shape == (3, 3)
    images = [NDData(cube[0], psf=psf), NDData(cube[1]), NDData(cube[2], psf=np.zeros((3, 3)))]
    fitter = StubFitter()
    result = fit(images, fitter, uncertainty=1.0)
    assert has(result, FitFlag.BAD_PSF) == [False, False, True]
    psfs = {int(b.index[0]): b.psf for b in fitter.batches}
    assert psfs[0][0].shape == (3, 3)
    assert psfs[1] is None or psfs[1] == [None]
    assert stamp_source(images, psf=np.ones((5, 5))).get([0]).psf.shape == (5, 5)


def test_psf_from_a_file(tmp_path, cube):
    fits.writeto(tmp_path / "psf.fits", np.ones((5, 5)))
    fits.writeto(tmp_path / "psfs.fits", np.ones((5, 7, 7)))
    assert stamp_source(cube, psf=tmp_path / "psf.fits").get([0]).psf.shape == (5, 5)
    assert stamp_source(cube, psf=tmp_path / "psfs.fits").get([0]).psf[0].shape == (7, 7)


# -- stamps that say something about themselves ------------------------------------------


def test_noise_is_estimated_if_none_is_given(cube):
    cube = cube * np.arange(1, 6)[:, None, None]
    result = fit(cube)
    assert has(result, FitFlag.NOISE_ESTIMATED) == [True] * 5
    sigma = 1 / stamp_source(cube).get(range(5)).inv_sigma[:, 0, 0]
    assert_allclose(sigma / np.arange(1, 6), 1, atol=0.35)
    assert np.ptp(sigma / np.arange(1, 6)) > 0  # each stamp has its own


def test_blank_stamps_hold_no_data(cube):
    cube[0], cube[1], cube[2] = 0, 7.5, np.nan
    for uncertainty in (None, 1.0):
        result = fit(cube, uncertainty=uncertainty)
        assert has(result, FitFlag.NO_DATA) == [True, True, True, False, False]
        assert np.isnan(result.params[:3]).all()


def test_too_few_pixels_are_flagged():
    for image in (np.ones((1, 1)), np.arange(6.0).reshape(2, 3)):
        for uncertainty in (None, 1.0):
            result = fit(image, uncertainty=uncertainty)
            assert result.flags[0] & FitFlag.FEW_PIXELS
            assert not result.flags[0] & FitFlag.NO_DATA
            assert np.isnan(result.params).all()


def test_plateau_is_saturated(cube):
    cube[0, 4:6, 4:7] = 60000.0  # six pixels
    cube[1, 4:6, 4:6] = 60000.0  # four: a symmetric image has as many
    cube[2, ::3, ::3] = 60000.0  # not connected
    cube[3] = np.round(cube[3] / 5)  # a few counts repeat
    result = fit(cube, uncertainty=1.0)
    assert has(result, FitFlag.SATURATED) == [True, False, False, False, False]


def test_each_galaxy_is_fitted_as_if_it_were_alone(cube):
    good = fit(cube, uncertainty=1.0)
    bad = cube.copy()
    bad[1], bad[3, :5] = np.nan, np.inf
    result = fit(bad, uncertainty=1.0)
    for i in (0, 2, 4):
        assert_array_equal(result.params[i], good.params[i])
        assert_array_equal(result.cov[i], good.cov[i])
        assert result.flags[i] == good.flags[i]


# -- the run ---------------------------------------------------------------------------


def raise_at(*numbers, error=RuntimeError):
    def fail(batch):
        if set(numbers) & set(batch.index.tolist()):
            raise error("no luck")

    return fail


def test_failing_batch_loses_one_galaxy(cube):
    with pytest.warns(AstropyUserWarning, match=r"failed on 1 of 5 galaxies, first on number 3"):
        result = fit(cube, StubFitter(raise_at(3)), uncertainty=1.0)
    assert has(result, FitFlag.NOT_CONVERGED) == [False, False, False, True, False]
    assert result.failed.tolist() == [False, False, False, True, False]
    assert result.meta["errors"] == {"3": "RuntimeError: no luck"}


def test_fitter_that_fails_on_everything_is_an_error(cube):
    for numbers in (range(5), [0]):
        with pytest.raises(RuntimeError, match="no luck"):
            fit(cube[: len(numbers)], StubFitter(raise_at(*numbers)), uncertainty=1.0)


def test_rows_of_nan_are_never_unflagged(cube):
    class Silent(StubFitter):
        def fit_stamps(self, batch, model, *, background):
            fits = super().fit_stamps(batch, model, background=background)
            fits.params[1, 0] = np.nan
            return fits

    assert has(fit(cube, Silent(), uncertainty=1.0), FitFlag.NOT_CONVERGED)[:3] == [0, 1, 0]


@pytest.mark.parametrize(("background", "nb"), [("none", 0), ("constant", 1), ("tilted", 3)])
def test_background_terms(cube, background, nb):
    cube[0] = np.nan
    result = fit(cube, uncertainty=1.0, background=background)
    assert result.background.shape == (5, nb)
    assert result.background_cov.shape == (5, nb, nb)
    assert np.isnan(result.background[0]).all()


def test_progress_is_reported(cube, capsys):
    calls = []
    fit(cube, uncertainty=1.0, batch_size=2, progress=lambda *a: calls.append(a))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert capsys.readouterr() == ("", "")
    fit(cube, uncertainty=1.0, progress=True)
    captured = capsys.readouterr()
    assert "5/5" in captured.err
    assert captured.out == ""


def test_provenance(cube):
    meta = fit(cube, uncertainty=1.0).meta
    assert meta["model"] == "GaussianGalaxy2D"
    assert meta["fitter"] == "StubFitter()"
    assert meta["background"] == "constant"
    assert meta["date"].endswith("+00:00")


# -- checkpoints -----------------------------------------------------------------------


def test_stopped_job_goes_on_where_it_was(tmp_path, cube):
    path = tmp_path / "job"
    cube[1] = np.nan
    options = dict(uncertainty=1.0, batch_size=2, checkpoint=path)
    with pytest.raises(KeyboardInterrupt):
        fit(cube, StubFitter(raise_at(3, error=KeyboardInterrupt)), **options)
    second, calls = StubFitter(), []
    result = fit(cube, second, progress=lambda *a: calls.append(a), **options)
    assert second.indices == [2, 3, 4]
    assert calls == [(2, 5), (4, 5), (5, 5)]
    plain = fit(cube, uncertainty=1.0)
    for name in ("params", "cov", "background", "chi2", "flags", "n_iter", "dof"):
        assert_array_equal(getattr(result, name), getattr(plain, name))
    third = StubFitter()
    assert_array_equal(fit(cube, third, **options).params, plain.params)
    assert third.indices == []


def test_checkpoint_may_go_on_with_other_batches_and_positions(tmp_path, field):
    options = dict(positions=XY, size=9, uncertainty=1.0, checkpoint=tmp_path / "job")
    with pytest.raises(KeyboardInterrupt):
        fit(field, StubFitter(raise_at(1, error=KeyboardInterrupt)), batch_size=1, **options)
    assert_allclose(fit(field, batch_size=5, **options).params[:, 1:3], XY)


@pytest.mark.parametrize("keep", [0.9, 0.999])
def test_record_that_was_cut_short_is_dropped(tmp_path, cube, keep):
    path = tmp_path / "job"
    options = dict(uncertainty=1.0, batch_size=2, checkpoint=path)
    expected = fit(cube, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    fitter = StubFitter()
    assert_array_equal(fit(cube, fitter, **options).params, expected.params)
    assert fitter.indices == [4]
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        dict(uncertainty=2.0),
        dict(background="none"),
        dict(psf=np.ones((3, 3))),
        dict(mask=np.eye(12, 15, dtype=bool)),
        dict(model=GaussianGalaxy2D(flux=3)),
        dict(model=GaussianGalaxy2D(fixed={"ellip": True})),
        dict(images="other"),
        dict(images="fewer"),
    ],
)
def test_checkpoint_of_another_job_is_refused(tmp_path, cube, change):
    first = dict(images=cube, model=GaussianGalaxy2D(), uncertainty=1.0)
    first |= dict(fitter=StubFitter(), checkpoint=tmp_path / "job", background="constant")
    fit_images(**first)
    other = cube.copy()
    other[4, 0, 0] += 1e-6
    if "images" in change:
        change = dict(images=other if change["images"] == "other" else cube[:4])
    with pytest.raises(ValueError, match=r"another job|other pixels"):
        fit_images(**(first | change))


def test_file_that_is_no_checkpoint_is_left_alone(tmp_path, cube):
    path = tmp_path / "thesis.txt"
    path.write_text("precious")
    with pytest.raises(ValueError, match="not a galmorph checkpoint"):
        fit(cube, uncertainty=1.0, checkpoint=path)
    assert path.read_text() == "precious"


# -- memory ----------------------------------------------------------------------------

MEMORY = """
import sys
import numpy as np
from galmorph import GaussianGalaxy2D, fit_images
from stub_fitter import StubFitter

class Forgetful(StubFitter):
    def fit_stamps(self, batch, model, *, background):
        self._seen.clear()
        return super().fit_stamps(batch, model, background=background)

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

path = sys.argv[1]
images = np.load(path, mmap_mode="r") if path.endswith("npy") else path
fit_images(np.arange(320.0).reshape(1, 16, 20), GaussianGalaxy2D(), Forgetful(), uncertainty=1.0)
before = rss()
peak = []
result = fit_images(images, GaussianGalaxy2D(), Forgetful(), uncertainty=1.0,
                    progress=lambda done, total: peak.append(rss()))
print(len(result), max(peak) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["npy", "fits"])
def test_memory_does_not_grow_with_the_cube(tmp_path, kind):
    n, side = 12_000, 64  # 188 MiB
    path = tmp_path / f"cube.{kind}"
    plane = np.arange(side * side, dtype=np.float32).reshape(side, side)
    if kind == "npy":
        cube = np.lib.format.open_memmap(path, "w+", np.float32, (n, side, side))
        cube[:] = plane
        cube.flush()
    else:
        fits.writeto(path, np.broadcast_to(plane, (n, side, side)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    count, growth = done.stdout.split()
    assert int(count) == n
    assert float(growth) < 80
