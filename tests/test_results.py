"""Parameters become a catalogue with units, on the sky too, and files give them back."""

import gzip

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.nddata import CCDData, NDData
from astropy.table import QTable, Table
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from stub_fitter import StubFitter

import galmorph
from galmorph import (
    BulgeDiskGalaxy2D,
    FitFlag,
    FitResult,
    GaussianGalaxy2D,
    PointSource2D,
    SersicGalaxy2D,
)

MODELS = [GaussianGalaxy2D, SersicGalaxy2D, BulgeDiskGalaxy2D, PointSource2D]
SHAPED = dict(flux=100, r_eff=3.0, ellip=0.4, theta=0.3)
ARRAYS = (
    "params",
    "cov",
    "background",
    "background_cov",
    "chi2",
    "dof",
    "flags",
    "n_iter",
    "origin",
    "shapes",
    "ids",
)


def fit_images(*args, background="constant", **options):
    return galmorph.fit_images(*args, background=background, **options)


def sky_wcs(matrix=((-0.05, 0.0), (0.0, 0.05)), crval=(150.0, 2.0)):
    """WCS with a matrix in arcsec per pixel."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval = crval
    wcs.wcs.crpix = 20.0, 15.0
    wcs.wcs.cd = np.array(matrix) / 3600
    return wcs


@pytest.fixture
def cube(rng):
    return rng.normal(10, 1, (4, 13, 15))


@pytest.fixture
def result(cube):
    cube[1] = np.nan
    return fit_images(cube, GaussianGalaxy2D(**SHAPED), StubFitter(), uncertainty=0.5)


def field_result(wcs, model=None, rng=None):
    image = NDData(np.random.default_rng(1).normal(0, 1, (40, 50)), wcs=wcs)
    model = GaussianGalaxy2D(**SHAPED) if model is None else model
    positions = [(20.3, 14.8), (33.0, 25.0), (np.nan, 1)]
    return fit_images(image, model, StubFitter(), positions=positions, size=9, uncertainty=1.0)


def assert_same(a, b):
    for name in ARRAYS:
        assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name
    assert a.param_names == b.param_names
    assert type(a.model) is type(b.model)
    assert a.model.bounds == b.model.bounds
    assert a.model.fixed == b.model.fixed
    assert_array_equal(a.model.parameters, b.model.parameters)
    assert a.data_unit == b.data_unit
    assert a.meta == b.meta


# -- rows ------------------------------------------------------------------------------


def test_standard_deviations_are_of_the_covariance(result):
    assert_allclose(result.stds[0], np.linspace(0.1, 0.2, 6))
    assert np.isnan(result.stds[1]).all()


def test_reduced_chi2_needs_degrees_of_freedom(result):
    result.dof[0] = 0
    assert np.isnan(result.reduced_chi2[0])
    assert result.reduced_chi2[2] == result.chi2[2] / result.dof[2]


@pytest.mark.parametrize(
    ("item", "rows"),
    [
        (2, [2]),
        (-1, [3]),
        (np.int64(1), [1]),
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        (np.array([True, False, False, True]), [0, 3]),
        (slice(0, 0), []),
    ],
)
def test_parts_of_a_result(result, item, rows):
    part = result[item]
    for name in ARRAYS:
        assert_array_equal(getattr(part, name), getattr(result, name)[rows])
    if rows:
        assert_allclose(part.model_images, result.model_images[rows], rtol=1e-12)
    assert len(part.to_table()) == len(rows)
    for k, row in enumerate(rows):
        assert_array_equal(part.stamp(k)[0], result.stamp(row)[0])
        assert_array_equal(part[k : k + 1].stamp(0)[0], result.stamp(row)[0])


def test_row_that_is_not_there(result):
    for use in (lambda: result[4], lambda: result.stamp(4), lambda: result.model_at(4)):
        with pytest.raises(IndexError):
            use()


def test_result_is_iterated_by_galaxy(result):
    assert [one.ids[0] for one in result] == [0, 1, 2, 3]


def test_repr_counts(result):
    assert repr(result) == "<FitResult: 4 galaxies, GaussianGalaxy2D, 1 flagged>"


def test_result_owns_its_model(cube):
    model = GaussianGalaxy2D(**SHAPED)
    result = fit_images(cube, model, StubFitter(), uncertainty=0.5)
    model.flux = -1
    assert result.model.flux == 100


# -- images ----------------------------------------------------------------------------


def test_images_are_model_and_background(result, cube):
    expected = result.model_at(2).render((13, 15)) + 0.25
    assert_allclose(result.model_images[2], expected)
    assert_allclose(result.residual_images[2], cube[2] - expected)
    assert np.isnan(result.model_images[1]).all()
    assert np.isnan(result.residual_images[1]).all()
    assert np.isnan(result.log_likelihood_map[1]).all()


def test_tilted_background_is_about_the_centre_of_the_stamp(cube):
    result = fit_images(
        cube, GaussianGalaxy2D(), StubFitter(), uncertainty=1.0, background="tilted"
    )
    plane = result.model_images[0] - result.model_at(0).render((13, 15))
    y, x = np.mgrid[:13, :15]
    assert_allclose(plane, 0.25 + 0.01 * (x - 7) - 0.02 * (y - 6))


def test_log_likelihood_is_that_of_a_gaussian(cube):
    stats = pytest.importorskip("scipy.stats")
    mask = np.zeros(cube.shape, bool)
    mask[:, 3, 4] = True
    result = fit_images(cube, GaussianGalaxy2D(), StubFitter(), uncertainty=0.5, mask=mask)
    expected = stats.norm(result.model_images, 0.5).logpdf(cube)
    expected[mask] = 0
    assert_allclose(result.log_likelihood_map, expected)
    assert np.isnan(result.residual_images[mask]).all()


def test_images_use_each_galaxys_psf(cube):
    wide, narrow = np.ones((5, 5)), np.ones((1, 1))
    psfs = [wide, narrow, wide, np.zeros((3, 3))]
    model = GaussianGalaxy2D(r_eff=1.5)
    result = fit_images(cube, model, StubFitter(), uncertainty=1.0, psf=psfs, background="none")
    images = result.model_images
    for i in range(3):
        alone = result.model_at(i)
        assert alone.psf.shape == psfs[i].shape
        assert_allclose(images[i], alone.render((13, 15)))
    assert images[1].max() / result.params[1, 0] > 1.2 * images[0].max() / result.params[0, 0]
    assert np.isnan(images[3]).all()


def test_images_of_nddata_with_and_without_psf(cube):
    images = [NDData(cube[0], psf=np.ones((5, 5))), NDData(cube[1])]
    model = GaussianGalaxy2D(r_eff=1.5)
    result = fit_images(images, model, StubFitter(), uncertainty=1.0, background="none")
    for i in range(2):
        assert_allclose(result.model_images[i], result.model_at(i).render((13, 15)))
    assert result.model_at(1).psf is None


# -- models ----------------------------------------------------------------------------


def test_model_at_is_a_copy_in_image_coordinates():
    result = field_result(None, GaussianGalaxy2D(**SHAPED, fixed={"ellip": True}))
    model = result.model_at(1)
    assert_allclose(model.parameters, result.params[1])
    assert (model.x_0.value, model.y_0.value) == (33.0, 25.0)
    assert model.fixed["ellip"]
    model.flux = 0
    assert result.model.flux == 100


def test_model_at_keeps_the_units_of_the_model(cube):
    model = GaussianGalaxy2D(
        flux=1 * u.mJy,
        x_0=1 * u.pix,
        y_0=1 * u.pix,
        r_eff=3 * u.pix,
        ellip=0.4,
        theta=20 * u.deg,
    )
    result = fit_images(cube * u.Jy, model, StubFitter(), uncertainty=0.5)
    fitted = result.model_at(0)
    assert_allclose(fitted.flux.quantity.to_value(u.Jy), result.params[0, 0])
    assert fitted.flux.unit == u.mJy
    assert_allclose(fitted.theta.quantity.to_value(u.rad), result.params[0, 5])


# -- catalogue -------------------------------------------------------------------------


def test_table_has_a_row_a_galaxy_with_units(cube):
    cube[1] = np.nan
    result = fit_images(cube * u.Jy, GaussianGalaxy2D(**SHAPED), StubFitter(), uncertainty=0.5)
    table = result.to_table()
    assert isinstance(table, QTable)
    assert len(table) == 4
    assert table["flux"].unit == table["flux_err"].unit == table["background"].unit == u.Jy
    assert table["x_0"].unit == table["r_eff"].unit == u.pix
    assert table["theta"].unit == u.deg
    assert_allclose(table["theta"].to_value(u.rad)[0], result.params[0, 5])
    assert_allclose(table["theta_err"].to_value(u.rad)[0], result.stds[0, 5])
    assert_allclose(table["flux"].value, result.params[:, 0])
    assert_allclose(table["snr"][0], result.params[0, 0] / 0.1)
    assert_allclose(table["background"].value[0], 0.25)
    assert table["flags"].tolist() == [0, FitFlag.NO_DATA, 0, 0]
    assert np.isnan(table["flux"].value[1])
    assert table.meta["model"] == "GaussianGalaxy2D"
    assert "(0, 0)" in table.meta["conventions"]["position"]


def test_table_without_units_or_wcs(result):
    table = result.to_table()
    assert not hasattr(table["flux"], "unit") or table["flux"].unit is None
    assert not any("sky" in name or "arcsec" in name for name in table.colnames)


def test_fixed_flux_has_no_signal_to_noise(cube):
    class Held(StubFitter):
        def fit_stamps(self, *args, **options):
            fits = super().fit_stamps(*args, **options)
            fits.cov[:, 0] = fits.cov[:, :, 0] = 0
            return fits

    table = fit_images(cube, GaussianGalaxy2D(), Held(), uncertainty=0.5).to_table()
    assert table["flux_err"].tolist() == [0] * 4
    assert np.isnan(table["snr"]).all()


def test_tilted_background_has_columns(cube):
    result = fit_images(
        cube * u.Jy, GaussianGalaxy2D(), StubFitter(), uncertainty=1.0, background="tilted"
    )
    table = result.to_table()
    assert table["background_slope_x"].unit == u.Jy / u.pix
    assert_allclose(table["background_slope_y"].value, -0.02)
    assert_allclose(table["background_slope_y_err"].value, 0.01)


# -- sky -------------------------------------------------------------------------------

CELESTIAL = {
    "north up, east left": ((-0.05, 0), (0, 0.05)),
    "rotated": ((-0.04, 0.03), (0.03, 0.04)),
    "mirrored": ((0.05, 0), (0, 0.05)),
    "mirrored and rotated": ((0.04, 0.03), (-0.03, 0.04)),
    "not square": ((-0.05, 0), (0, 0.09)),
    "sheared": ((-0.05, 0.01), (0.02, 0.07)),
}


def ellipse_on_the_sky(model, wcs):
    """Longest and shortest radius and where the longest points, from points on the ellipse."""
    t = np.linspace(0, 2 * np.pi, 20001)
    a, q, theta = model.r_eff.value, 1 - model.ellip.value, model.theta.value
    dx, dy = a * np.cos(t), a * q * np.sin(t)
    x = model.x_0.value + dx * np.cos(theta) - dy * np.sin(theta)
    y = model.y_0.value + dx * np.sin(theta) + dy * np.cos(theta)
    centre = wcs.pixel_to_world(model.x_0.value, model.y_0.value).icrs
    points = wcs.pixel_to_world(x, y).icrs
    radii = centre.separation(points).to_value(u.arcsec)
    k = radii.argmax()
    angle = centre.position_angle(points[k]).to_value(u.deg) % 180
    return centre, radii.max(), 1 - radii.min() / radii.max(), angle


@pytest.mark.parametrize("crval", [(150.0, 2.0), (0.0001, -75.0)])
@pytest.mark.parametrize("name", CELESTIAL)
def test_ellipse_on_the_sky(name, crval):
    wcs = sky_wcs(CELESTIAL[name], crval)
    result = field_result(wcs)
    table = result.to_table()
    for i in range(2):
        centre, radius, ellip, angle = ellipse_on_the_sky(result.model_at(i), wcs)
        assert table["sky_centroid"][i].separation(centre) < 1e-6 * u.arcsec
        assert_allclose(table["r_eff_arcsec"][i].value, radius, rtol=1e-6)
        assert_allclose(table["ellip_sky"][i], ellip, rtol=1e-4)
        difference = table["position_angle"][i].to_value(u.deg) - angle
        assert abs((difference + 90) % 180 - 90) < 0.05
    assert np.isnan(table["sky_centroid"].ra[2])
    assert np.isnan(table["r_eff_arcsec"][2])


def test_position_angle_of_a_plain_image():
    """North up and east left: along x is east-west (90), along y north-south (0)."""
    for theta, expected in ((0.0, 90), (np.pi / 2, 0), (np.pi / 4, 135)):
        model = GaussianGalaxy2D(flux=1, r_eff=3, ellip=0.5, theta=theta)
        angle = field_result(sky_wcs(), model).to_table()["position_angle"][0].to_value(u.deg)
        assert abs((angle - expected + 90) % 180 - 90) < 1e-3


def test_frame_of_the_wcs_does_not_matter():
    """The same sky through a galactic WCS has the same angle from celestial north."""
    result = field_result(sky_wcs())
    here = result.to_table()
    centre = here["sky_centroid"][0].galactic
    # Galactic WCS with the same pixels at that place: rotate by the angle between the poles.
    north = SkyCoord(0 * u.deg, 90 * u.deg, frame="galactic").icrs
    turn = here["sky_centroid"][0].position_angle(north).rad
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[-0.05, 0], [0, 0.05]])
    wcs = sky_wcs(matrix, (centre.l.deg, centre.b.deg))
    wcs.wcs.ctype = "GLON-TAN", "GLAT-TAN"
    wcs.wcs.crpix = result.params[0, 1] + 1, result.params[0, 2] + 1
    there = field_result(wcs).to_table()
    assert there["sky_centroid"][0].separation(here["sky_centroid"][0]) < 1e-6 * u.arcsec
    assert_allclose(there["position_angle"][0].value, here["position_angle"][0].value, atol=0.01)


@pytest.mark.parametrize("name", ["rotated", "not square"])
def test_errors_on_the_sky_are_those_of_random_ellipses(name, rng):
    wcs = sky_wcs(CELESTIAL[name])
    result = field_result(wcs)[:1]
    result.cov[0] = 0
    block = np.ix_([3, 4, 5], [3, 4, 5])
    result.cov[0][block] = [[0.01, 0.0005, 0], [0.0005, 1e-4, 0], [0, 0, 4e-4]]
    table = result.to_table()
    many = result[np.zeros(4000, int)]
    many.params[:, 3:] = rng.multivariate_normal(result.params[0, 3:], result.cov[0][block], 4000)
    sample = many.to_table()
    for column in ("r_eff_arcsec", "ellip_sky", "position_angle"):
        values = u.Quantity(sample[column]).value
        error = u.Quantity(table[f"{column}_err"]).value[0]
        assert_allclose(error, values.std(), rtol=0.06, err_msg=column)


def test_circles_have_a_radius_and_finite_columns():
    result = field_result(sky_wcs(), GaussianGalaxy2D(flux=1, r_eff=3, ellip=0.0, theta=0.3))
    table = result.to_table()
    assert_allclose(table["r_eff_arcsec"][0].value, 0.15, rtol=1e-6)
    assert np.isfinite(table["position_angle"][0].value)
    assert np.isfinite(table["r_eff_arcsec_err"][0].value)


def test_models_with_two_ellipses_or_none():
    table = field_result(sky_wcs(), BulgeDiskGalaxy2D(r_bulge=1, r_disk=4)).to_table()
    assert_allclose(table["r_disk_arcsec"][0].value, 0.2, rtol=1e-3)
    assert {"position_angle_bulge", "position_angle_disk", "ellip_sky_disk"} <= set(table.colnames)
    table = field_result(sky_wcs(), PointSource2D()).to_table()
    assert "sky_centroid" in table.colnames
    assert not any("arcsec" in name for name in table.colnames)


def test_each_image_of_a_list_has_its_wcs(cube):
    images = [
        CCDData(cube[0], unit="adu", wcs=sky_wcs(crval=(10, 0))),
        NDData(cube[1], unit="adu"),
        CCDData(cube[2], unit="adu", wcs=sky_wcs(crval=(20, 0))),
    ]
    result = fit_images(images, GaussianGalaxy2D(**SHAPED), StubFitter(), uncertainty=1.0)
    ra = result.to_table()["sky_centroid"].ra.deg
    assert_allclose(ra[[0, 2]], [10, 20], atol=1e-3)
    assert np.isnan(ra[1])
    assert_allclose(result[2].to_table()["sky_centroid"].ra.deg, 20, atol=1e-3)


def test_wcs_that_is_not_of_the_sky_is_ignored():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "LINEAR", "LINEAR"
    assert "sky_centroid" not in field_result(wcs).to_table().colnames


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ecsv", "fits", "fits.gz"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("background", ["none", "tilted"])
def test_files_give_back_everything(tmp_path, cube, ending, model, background):
    cube[1] = np.nan
    constraints = dict(fixed={"x_0": True}, bounds={"flux": (0.1, None)})
    template = model(flux=3.25, psf=np.ones((3, 3)), **constraints)
    result = fit_images(cube * u.Jy, template, StubFitter(), uncertainty=0.5, background=background)
    result.params[0] *= 1 / 3  # digits that decimal text would round
    path = tmp_path / f"result.{ending}"
    result.write(path)
    same = FitResult.read(path)
    assert_same(same, result)
    assert same.stamps is None
    assert_array_equal(same.model_images, result.model_images)
    assert_array_equal(same.model_at(2).parameters, result.model_at(2).parameters)
    again, table = same.to_table(), result.to_table()
    assert again.colnames == table.colnames
    for name in table.colnames:
        assert_array_equal(again[name], table[name])
    assert again.meta == table.meta
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("ending", ["ecsv", "fits"])
def test_files_are_ordinary_tables(tmp_path, ending):
    result = field_result(sky_wcs())
    path = tmp_path / f"result.{ending}"
    result.write(path)
    table = QTable.read(path)
    assert_allclose(table["x_0"].to_value(u.pix), result.params[:, 1])
    assert isinstance(table["sky_centroid"], SkyCoord)


@pytest.mark.parametrize("ending", ["ecsv", "fits"])
@pytest.mark.parametrize("of_model", [True, False])
def test_files_keep_the_psf(tmp_path, cube, ending, of_model):
    from galmorph import PSF

    psf = PSF(np.arange(1.0, 26).reshape(5, 5), oversampling=2, includes_pixel=False)
    model = GaussianGalaxy2D(psf=psf if of_model else None)
    result = fit_images(cube, model, StubFitter(), uncertainty=1.0, psf=None if of_model else psf)
    path = tmp_path / f"result.{ending}"
    result.write(path)
    same = FitResult.read(path)
    assert (same.model.psf if of_model else same.psf) == psf
    assert_array_equal(same.model_images, result.model_images)


@pytest.mark.parametrize("ending", ["ecsv", "fits"])
def test_files_keep_the_wcs(tmp_path, cube, ending):
    one = field_result(sky_wcs(CELESTIAL["sheared"]))
    images = [CCDData(cube[k], unit="adu", wcs=sky_wcs(crval=(k, 0))) for k in (1, 2)]
    images.append(CCDData(cube[3], unit="adu"))
    many = fit_images(images, GaussianGalaxy2D(**SHAPED), StubFitter(), uncertainty=1.0)
    for k, result in enumerate((one, many)):
        path = tmp_path / f"{k}.{ending}"
        result.write(path)
        old, new = result.to_table(), FitResult.read(path).to_table()
        assert_allclose(new["sky_centroid"].ra.deg, old["sky_centroid"].ra.deg, rtol=1e-11)
        assert_allclose(new["position_angle"].value, old["position_angle"].value, rtol=1e-6)


@pytest.mark.parametrize("ending", ["ecsv", "fits"])
def test_empty_results_can_be_written(tmp_path, result, ending):
    path = tmp_path / f"result.{ending}"
    result[:0].write(path)
    assert len(FitResult.read(path)) == 0


def test_files_are_not_replaced_unasked(tmp_path, result):
    path = tmp_path / "result.fits"
    path.write_text("precious")
    with pytest.raises(OSError, match="exists"):
        result.write(path)
    assert path.read_text() == "precious"
    result.write(path, overwrite=True)
    assert len(FitResult.read(path)) == 4


def test_a_failed_write_leaves_nothing(tmp_path, result, monkeypatch):
    monkeypatch.setattr("galmorph._resultio.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.write(tmp_path / "result.fits")
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_missing_files(tmp_path, result):
    for use in (result.write, FitResult.read):
        with pytest.raises(ValueError, match=r"\.ecsv, \.fits or \.fits\.gz"):
            use(tmp_path / "result.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.fits"):
        FitResult.read(tmp_path / "nowhere.fits")


@pytest.mark.parametrize("ending", ["ecsv", "fits", "fits.gz"])
def test_damaged_files_are_errors_with_their_name(tmp_path, result, ending):
    path = tmp_path / f"result.{ending}"
    result.write(path)
    content = path.read_bytes()
    for damaged in (b"", content[:300], content[: len(content) // 3], b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises((OSError, ValueError), match="result"):
            FitResult.read(path)


def test_other_peoples_tables_are_not_results(tmp_path):
    table = Table({"flux": [1.0]})
    for ending in ("ecsv", "fits"):
        path = tmp_path / f"theirs.{ending}"
        table.write(path)
        with pytest.raises(ValueError, match="not a table written by"):
            FitResult.read(path)


class Mine(GaussianGalaxy2D):
    """A model that the package does not know."""


def test_models_of_others_are_not_imported(tmp_path, cube):
    model = Mine(flux=2)
    result = fit_images(cube, model, StubFitter(), uncertainty=1.0)
    path = tmp_path / "result.fits"
    result.write(path)
    with pytest.raises(ValueError, match="model="):
        FitResult.read(path)
    assert_array_equal(FitResult.read(path, model=Mine()).params, result.params)
    with pytest.raises(ValueError, match="holds fits of Mine"):
        FitResult.read(path, model=SersicGalaxy2D())


def test_ties_by_functions_are_lost_with_a_warning(tmp_path, cube):
    model = GaussianGalaxy2D(tied={"y_0": lambda m: m.x_0})
    fit_images(cube, model, StubFitter(), uncertainty=1.0).write(tmp_path / "result.fits")
    with pytest.warns(AstropyUserWarning, match="y_0 were tied"):
        assert not FitResult.read(tmp_path / "result.fits").model.tied["y_0"]


def test_large_psf_is_left_out_of_text(tmp_path, cube):
    psf = np.ones((201, 201))
    result = fit_images(cube, GaussianGalaxy2D(), StubFitter(), uncertainty=1.0, psf=psf)
    with pytest.warns(AstropyUserWarning, match="too large"):
        result.write(tmp_path / "result.ecsv")
    assert FitResult.read(tmp_path / "result.ecsv").psf is None
    result.write(tmp_path / "result.fits")
    assert FitResult.read(tmp_path / "result.fits").psf.shape == (201, 201)


def test_compressed_file_is_compressed(tmp_path, result):
    result.write(tmp_path / "result.fits.gz")
    with gzip.open(tmp_path / "result.fits.gz") as file:
        assert file.read(6) == b"SIMPLE"


def test_result_of_a_file_has_no_pixels(tmp_path, result):
    result.write(tmp_path / "result.fits")
    same = FitResult.read(tmp_path / "result.fits")
    for use in (lambda: same.residual_images, lambda: same.stamp(0)):
        with pytest.raises(ValueError, match="no pixels"):
            use()
