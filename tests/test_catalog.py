"""From an image to a catalogue: what is found and measured, written, resumed; bad input."""

import warnings

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.nddata import CCDData, InverseVariance, StdDevUncertainty
from astropy.table import QTable, Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal

import galmorph
from galmorph import FitFlag, PointSource2D, SersicGalaxy2D, photometry
from galmorph.catalog import output_files
from galmorph.cli import main
from galmorph.detection import gaussian_psf

pytest.importorskip("torch")

SHAPE = (340, 400)
NOISE = 0.5
PIXEL = 0.2  # arcsec
FWHM = 3.0


def make_wcs(shape, angle=0.0):
    """Tangential, north up, turned by an angle."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.2]
    wcs.wcs.crpix = [shape[1] / 2, shape[0] / 2]
    c, s = np.cos(angle) * PIXEL / 3600, np.sin(angle) * PIXEL / 3600
    wcs.wcs.cd = [[-c, s], [s, c]]
    wcs.wcs.cunit = ["deg", "deg"]
    return wcs


@pytest.fixture(scope="module")
def psf():
    return gaussian_psf(FWHM)


@pytest.fixture(scope="module")
def truth():
    """Ten stars and twenty galaxies."""
    rng = np.random.default_rng(21)
    x, y = np.meshgrid(np.arange(6) * 66 + 35, np.arange(5) * 66 + 38)
    star = np.arange(30) % 3 == 0
    return {
        "flux": np.exp(rng.uniform(np.log(150), np.log(1200), 30)),
        "x_0": x.ravel() + rng.uniform(-6, 6, 30),
        "y_0": y.ravel() + rng.uniform(-6, 6, 30),
        "r_eff": np.where(star, 0.0, rng.uniform(2.0, 4.0, 30)),
        "n": rng.uniform(0.8, 1.8, 30),
        "ellip": rng.uniform(0.1, 0.6, 30),
        "theta": rng.uniform(-1.5, 1.5, 30),
        "star": star,
    }


@pytest.fixture(scope="module")
def image(truth, psf):
    """What a telescope gives: sources on a sky that is not flat, in microjansky."""
    rng = np.random.default_rng(22)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    pixels = 20 + 0.001 * x - 0.0005 * y + rng.normal(0, NOISE, SHAPE)
    for i in range(30):
        low = int(truth["x_0"][i]) - 30, int(truth["y_0"][i]) - 30
        at = {"flux": truth["flux"][i]}
        at |= {f"{a}_0": truth[f"{a}_0"][i] - o for a, o in zip("xy", low, strict=True)}
        shape = {name: truth[name][i] for name in ("r_eff", "n", "ellip", "theta")}
        star = truth["star"][i]
        model = PointSource2D(**at, psf=psf) if star else SersicGalaxy2D(**at, **shape, psf=psf)
        there = tuple(slice(max(o, 0), o + 61) for o in low[::-1])
        stamp = model.render((61, 61))[max(-low[1], 0) :, max(-low[0], 0) :]
        part = pixels[there]
        part += stamp[: part.shape[0], : part.shape[1]]
    return CCDData(pixels, unit="uJy", uncertainty=StdDevUncertainty(NOISE), wcs=make_wcs(SHAPE))


@pytest.fixture(scope="module")
def field(psf):
    """Three galaxies and a star, far from each other; nothing but noise else."""
    rng = np.random.default_rng(1)
    shapes = [(800, 40, 50, 3), (600, 130, 60, 4), (500, 110, 120, 2.5)]
    pixels = rng.normal(0, 1, (160, 160)) + PointSource2D(900, 60, 110, psf=psf).render((160, 160))
    for flux, x, y, r in shapes:
        model = SersicGalaxy2D(flux, x, y, r_eff=r, n=1.2, ellip=0.3, psf=psf)
        pixels += model.render((160, 160))
    return pixels, np.array([[40, 50], [130, 60], [110, 120], [60, 110]]), [800, 600, 500, 900]


@pytest.fixture(scope="module")
def found(image, psf):
    half = CCDData(0.5 * image.data, unit="uJy", uncertainty=StdDevUncertainty(0.5 * NOISE))
    bands = {"half": (half, {"psf": psf, "background": "constant"})}
    return photometry(image, psf=psf, model="sersic", bands=bands)


@pytest.fixture(scope="module")
def table(found):
    return found.to_table()


@pytest.fixture(scope="module")
def match(found, truth):
    """Row of the catalogue of every source that there is."""
    xy = np.array([p[1:3] for p in found.scene.params])
    apart = np.hypot(*(xy[None] - np.column_stack([truth["x_0"], truth["y_0"]])[:, None]).T).T
    assert apart.min(1).max() < 1.0
    return apart.argmin(1)


# -- what is measured ------------------------------------------------------------------------


def test_every_source_is_found_once(found, match):
    assert len(found) == 30
    assert len(set(match)) == 30
    assert (found.scene.flags == 0).all()
    assert repr(found) == "<Photometry: 30 sources, 10 stars, 0 flagged>"


@pytest.mark.parametrize("name", ["flux", "x_0", "y_0"])
def test_errors_cover(table, truth, match, name):
    value, error = (u.Quantity(table[n]).value[match] for n in (name, f"{name}_err"))
    pull = (value - truth[name]) / error
    # 30 standard normal numbers; the noise of areas may be taken for a bit larger
    assert abs(pull.mean()) < 3.5 / np.sqrt(30)
    assert 0.6 < pull.std() < 1.5


def test_stars_are_told_from_galaxies(table, truth, match):
    assert_array_equal(np.asarray(table["star_probability"])[match] > 0.5, truth["star"])
    assert_array_equal(np.asarray(table["model"])[match] == "PointSource2D", truth["star"])
    radius = table["r_half"][match]
    assert radius.unit == u.pix
    assert_array_equal(radius[truth["star"]].value, 0)
    galaxy = ~truth["star"]
    assert_allclose(radius[galaxy].value, truth["r_eff"][galaxy], rtol=0.35)
    assert_allclose(
        table["r_half_arcsec"].to_value(u.arcsec), table["r_half"].value * PIXEL, rtol=1e-3
    )


def test_magnitudes_of_a_unit(table, truth, match):
    flux = u.Quantity(table["flux"])
    assert flux.unit == u.uJy
    assert_allclose(table["mag"].value, flux.to(u.ABmag).value)
    relative = u.Quantity(table["flux_err"]).value / flux.value
    assert_allclose(table["mag_err"].value, 2.5 / np.log(10) * relative)
    exact = (truth["flux"] * u.uJy).to(u.ABmag).value
    assert np.all(np.abs(table["mag"].value[match] - exact) < 5 * table["mag_err"].value[match])


def test_places_on_the_sky(table, truth, match, image):
    sky = image.wcs.pixel_to_world(truth["x_0"], truth["y_0"])
    assert table["sky_centroid"][match].separation(sky).to_value(u.arcsec).max() < 0.5 * PIXEL
    good = (~truth["star"]) & (truth["ellip"] > 0.3)
    # +x is west and +y north: from north through east is from +y towards -x
    angle = np.degrees(truth["theta"]) - 90
    miss = table["position_angle"][match][good].to_value(u.deg) - angle[good]
    assert np.abs((miss + 90) % 180 - 90).max() < 15


def test_classes_are_of_bright_galaxies(table, truth, match):
    names = [n for n in table.colnames if n.startswith("p_class_")]
    total = sum(np.asarray(table[n], dtype=float) for n in names)[match]
    bright = ~truth["star"] & (np.asarray(table["snr"])[match] > 20)
    assert bright.sum() > 10
    assert_allclose(total[bright], 1, rtol=1e-5)
    assert np.isnan(total[~bright]).all()
    assert_array_equal(np.ma.getmaskarray(table["class"])[match], ~bright)


def test_fluxes_of_another_band(table):
    flux, other = u.Quantity(table["flux"]).value, u.Quantity(table["flux_half"]).value
    error = u.Quantity(table["flux_half_err"]).value
    assert np.abs((other - 0.5 * flux) / error).max() < 3
    assert {"mag_half", "mag_half_err", "flags_half"} <= set(table.colnames)


def test_provenance(found, image):
    meta = found.to_table().meta
    assert meta["psf"] == "given"
    assert meta["noise"] == "given"
    assert meta["galmorph"] == galmorph.__version__
    assert meta["zero_point"] == pytest.approx(23.9, abs=0.01)
    assert meta["detection"]["threshold"] == 1.5


def stars_of(image, truth, **options):
    """Fluxes of three stars only, quickly."""
    xy = np.column_stack([truth["x_0"], truth["y_0"]])[truth["star"]][:3]
    plain = {"model": {"star": PointSource2D()}, "classes": False, "find_missed": None}
    return photometry(image, xy, **plain, **options)


def test_a_zero_point_is_of_the_numbers(image, truth, psf):
    options = {"psf": psf, "uncertainty": NOISE}
    table = stars_of(image.data, truth, zero_point=27, **options).to_table()
    assert_allclose(table["mag"].value, 27 - 2.5 * np.log10(table["flux"]))
    assert "mag" not in stars_of(image.data, truth, **options).to_table().colnames
    table = stars_of(CCDData(image.data, unit="adu"), truth, zero_point=27, **options).to_table()
    assert_allclose(table["mag"].value, 27 - 2.5 * np.log10(table["flux"].value))


def test_noise_and_psf_are_measured_if_they_must(image, truth):
    found = stars_of(image.data, truth)
    assert (found.scene.flags & int(FitFlag.NOISE_ESTIMATED) != 0).all()
    assert "FWHM" in found.psf_statement
    assert found.scene.psf.sigma == pytest.approx(FWHM / 2.355, rel=0.06)
    assert_allclose(np.median(found.detection.rms), NOISE, rtol=0.1)


# -- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    found.write(folder / "field.ecsv", images=False, report=False)
    return found.write(folder / "field.fits")


def _numbers(column):
    """Of a column, without its mask and unit."""
    column = getattr(column, "unmasked", column)
    return getattr(column, "value", column)


def said_in(table, key):
    """From the meta data; names are in capitals in a FITS header."""
    return table.meta.get(key, table.meta.get(key.upper()))


@pytest.mark.parametrize("kind", ["fits", "ecsv"])
def test_tables_come_back(written, table, kind):
    back = QTable.read(written[0].with_suffix(f".{kind}"))
    assert back.colnames == table.colnames
    for name in table.colnames:
        own, other = table[name], back[name]
        assert (own.info.unit, own.info.description) == (other.info.unit, other.info.description)
        if name == "sky_centroid":
            assert own.separation(other).max() < 1e-6 * u.arcsec
        elif name in ("model", "class"):
            keep = ~np.ma.getmaskarray(own)
            assert_array_equal(np.asarray(own)[keep], np.asarray(other)[keep].astype(str))
        else:
            first, second = (np.ma.asarray(_numbers(c), dtype=float) for c in (own, other))
            hidden = [np.broadcast_to(getattr(c, "mask", False), len(c)) for c in (own, other)]
            first, second = (
                np.where(h, np.nan, np.ma.filled(v, np.nan))
                for h, v in zip(hidden, (first, second), strict=True)
            )
            assert_allclose(first, second, rtol=1e-6)
            if kind == "ecsv":  # in FITS what is NaN is masked
                assert_array_equal(*hidden)
    assert said_in(back, "psf") == "given"


def test_images_are_of_the_field(written, found, image):
    with fits.open(written[1]) as hdus:
        names = ["MODEL", "RESIDUAL", "SEGMENTATION", "BACKGROUND", "RMS"]
        assert [h.name for h in hdus[1:]] == names
        for name in names:
            assert hdus[name].shape == SHAPE
            wcs = WCS(hdus[name].header)
            assert_allclose(
                wcs.pixel_to_world_values(10, 20), image.wcs.pixel_to_world_values(10, 20)
            )
        assert hdus["MODEL"].header["BUNIT"] == "uJy"
        assert "BUNIT" not in hdus["SEGMENTATION"].header
        total = sum(hdus[n].data.astype(float) for n in ("MODEL", "RESIDUAL", "BACKGROUND"))
        assert_allclose(total, image.data, atol=1e-4)
        # nothing is left but noise
        assert np.std(hdus["RESIDUAL"].data) == pytest.approx(NOISE, rel=0.05)
        assert hdus["SEGMENTATION"].data.max() <= 30


def test_the_report_is_written(written):
    assert written[2].name == "field.html"
    assert "field" in written[2].read_text()


def test_files_are_not_replaced_unasked(written, found):
    before = written[0].read_bytes()
    with pytest.raises(OSError, match="overwrite=True"):
        found.write(written[0])
    assert written[0].read_bytes() == before
    assert found.write(written[0], images=False, report=False, overwrite=True) == written[:1]


def test_names_of_files():
    assert [f.name for f in output_files("a/b.ecsv")] == ["b.ecsv", "b_images.fits", "b.html"]
    with pytest.raises(ValueError, match=r"fits or \.ecsv"):
        output_files("catalog.csv")


# -- jobs that are stopped -------------------------------------------------------------------


def test_a_job_that_was_stopped_goes_on(image, truth, psf, tmp_path, monkeypatch):
    from galmorph import _scenefit

    fits_done = []
    fit_scenes = _scenefit.fit_scenes

    def counted(*args, **options):
        fits_done.append(1)
        return fit_scenes(*args, **options)

    monkeypatch.setattr(_scenefit, "fit_scenes", counted)
    model = {"disk": SersicGalaxy2D(n=1, fixed={"n": True})}
    xy = np.column_stack([truth["x_0"], truth["y_0"]])[:12]
    xy = np.vstack([xy, xy[:2] + 6])  # groups of one and of two, which are fitted apart
    options = {"sources": xy, "psf": psf, "model": model, "classes": False, "find_missed": None}
    whole = photometry(image, **options)
    all_fits = len(fits_done)

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    file = tmp_path / "job.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        photometry(image, **options, checkpoint=file, progress=stop)
    assert file.exists()
    fits_done.clear()
    again = photometry(image, **options, checkpoint=file)
    assert 0 < len(fits_done) < all_fits
    fits_done.clear()
    third = photometry(image, **options, checkpoint=file)
    assert not fits_done
    for one in (again, third):
        for name in ("flux", "flux_err", "x_0", "r_eff", "chi2", "flags"):
            values = (np.asarray(u.Quantity(p.to_table()[name])) for p in (whole, one))
            assert_allclose(*values, rtol=1e-6)


# -- the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(field, psf, tmp_path_factory):
    """Files as observatories ship them."""
    path = tmp_path_factory.mktemp("cli")
    pixels = field[0].astype(np.float32)
    header = make_wcs(pixels.shape).to_header()
    header["BUNIT"] = "uJy"
    kernel = fits.ImageHDU(psf.data, fits.Header({"OVERSAMP": psf.oversampling}), name="PSF")
    error = fits.ImageHDU(np.ones_like(pixels), name="ERR")
    science = fits.ImageHDU(pixels, header, name="SCI")
    fits.HDUList([fits.PrimaryHDU(), science, error, kernel]).writeto(path / "field.fits")
    bands = [fits.PrimaryHDU()]
    for band, factor in (("R", 1.0), ("G", 0.5)):
        own = header.copy()
        own["NOISERMS"] = factor
        bands.append(fits.ImageHDU(factor * pixels, own, name=f"SCI_{band}"))
        bands.append(fits.ImageHDU(psf.data, kernel.header, name=f"PSF_{band}"))
    fits.HDUList(bands).writeto(path / "bands.fits")
    noise = np.random.default_rng(3).normal(0, 1, (90, 90)).astype(np.float32)
    fits.PrimaryHDU(noise).writeto(path / "empty.fits")
    fits.PrimaryHDU(np.full((40, 40), np.nan)).writeto(path / "nan.fits")
    fits.PrimaryHDU(np.stack([pixels, pixels])).writeto(path / "cube.fits")
    Table({"x": [1000.0], "y": [20.0]}).write(path / "outside.csv")
    return path


@pytest.fixture
def run(folder, tmp_path, capsys):
    def run(image, *options, output="out.fits"):
        quick = ["--model", "sersic", "--no-classes", "--find-missed", "0"]
        code = main(
            ["catalog", str(folder / image), "-o", str(tmp_path / output), *quick, *options]
        )
        return code, tmp_path / output, capsys.readouterr()

    return run


def test_a_file_with_all_that_is_needed(run, field):
    code, path, said = run("field.fits")
    assert code == 0
    names = ["out.fits", "out.html", "out_images.fits"]
    assert sorted(p.name for p in path.parent.iterdir()) == names  # and no checkpoint
    out = QTable.read(path)
    assert len(out) == 4
    assert "4 sources" in said.out
    assert "1 stars, 3 galaxies, 0 not fitted" in said.out
    xy = np.column_stack([out["x_0"].value, out["y_0"].value])
    order = np.hypot(*(xy[None] - field[1][:, None]).T).T.argmin(1)
    flux, error = (u.Quantity(out[n]).to_value(u.uJy)[order] for n in ("flux", "flux_err"))
    assert np.abs((flux - field[2]) / error).max() < 4
    sky = make_wcs((160, 160)).pixel_to_world(*field[1].T)
    assert out["sky_centroid"][order].separation(sky).to_value(u.arcsec).max() < 0.5 * PIXEL
    assert said_in(out, "psf") == "from the image"
    assert said_in(out, "noise") == "given"
    # the files are there: it is refused before the fit
    code, _, said = run("field.fits")
    assert code == 2
    assert "--overwrite" in said.err


def test_bands_of_a_file(run, folder):
    name = str(folder / "bands.fits")
    code, path, _ = run("bands.fits[SCI_R]", "--band", f"g={name}[SCI_G]", "--no-report")
    assert code == 0
    out = QTable.read(path)
    assert said_in(out, "psf") == "from the image"
    assert said_in(out, "noise") == "given"
    ratio = u.Quantity(out["flux_g"]).value / u.Quantity(out["flux"]).value
    assert_allclose(ratio, 0.5, rtol=0.02)


def test_an_image_without_a_source(run):
    """Everything is written, and nothing is wrong."""
    code, path, said = run("empty.fits", "--zero-point", "25")
    assert code == 0
    assert "0 sources" in said.out
    out = QTable.read(path)
    assert len(out) == 0
    assert {"flux", "flux_err", "r_eff", "mag", "star_probability", "flags"} <= set(out.colnames)
    assert said_in(out, "psf").startswith("Gaussian of FWHM 2.00 pixels")
    with fits.open(path.with_name("out_images.fits")) as hdus:
        assert not hdus["MODEL"].data.any()
        assert not hdus["SEGMENTATION"].data.any()
    assert path.with_suffix(".html").exists()


def test_not_one_source_can_be_fitted(run, folder):
    code, path, _ = run("field.fits", "--positions", str(folder / "outside.csv"))
    assert code == 1
    assert QTable.read(path)["flags"].tolist() == [int(FitFlag.OUTSIDE)]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("nowhere.fits", (), "no such file"),
        ("nan.fits", (), "no usable pixel"),
        ("cube.fits", (), "one image"),
        ("field.fits", ("--uncertainty", "0"), "positive"),
        ("field.fits", ("--psf", "fwhm=-1"), "positive number"),
        ("field.fits", ("--star-prior", "2"), "star_prior"),
        ("field.fits", ("--band", "g=nowhere.fits"), "nowhere.fits"),
    ],
)
def test_one_clear_line(run, image, options, message):
    code, path, said = run(image, *options)
    assert code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not path.exists()


# -- bad input -------------------------------------------------------------------------------


def measure(pixels, sources=None, **options):
    defaults = {"uncertainty": 1.0, "model": "sersic", "classes": False, "find_missed": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return photometry(pixels, sources, **{**defaults, **options})


def assert_right(found, field, rows=range(4), flags=0):
    """Sources have their fluxes, and no flags but those given."""
    _, xy, flux = field
    where = np.array([p[1:3] for p in found.scene.params])
    for k in rows:
        own = np.nanargmin(np.hypot(*(where - xy[k]).T))
        assert np.hypot(*(where[own] - xy[k])) < 0.7
        assert abs(found.scene.flux[own] - flux[k]) < 4 * found.scene.flux_err[own]
        assert found.scene.flags[own] & ~int(flags) == 0


def test_borders_without_data(field, psf):
    pixels = field[0].copy()
    pixels[:12], pixels[-15:], pixels[:, :9] = np.nan, np.nan, np.nan
    found = measure(pixels, psf=psf)
    assert len(found) == 4
    assert_right(found, field)
    assert np.isnan(found.scene.residual_image[:12]).all()


@pytest.mark.parametrize("core", ["plateau", "nan"])
def test_a_saturated_star(field, psf, core):
    """It is flagged; no source is larger than the image, and those that are far are right."""
    y, x = np.mgrid[:160, :160]
    star = 2e4 * (1 + ((x - 85) ** 2 + (y - 85) ** 2) / 2.5**2) ** -2.2
    pixels = field[0] + star + 50
    full = star > 1500
    pixels[full] = 1550 if core == "plateau" else np.nan
    found = measure(pixels, psf=psf, find_missed=6)
    scene = found.scene
    assert np.isfinite(scene.flux[~scene.failed]).all()
    wrong = FitFlag.SATURATED if core == "plateau" else FitFlag.BAD_CENTER
    at = np.array([p[1:3] for p in scene.params])
    own = np.hypot(*(at - 85).T).argmin()
    assert scene.flags[own] & int(wrong)
    for params in scene.params:
        if len(params) > 3:
            assert params[3] <= 160 * 1.001
    assert (np.hypot(*(at[scene.flags == 0] - 85).T) > 20).all()
    for k in range(4):  # on a halo that is none of the models
        near = np.hypot(*(at - field[1][k]).T).argmin()
        assert scene.flux[near] == pytest.approx(field[2][k], rel=0.3)


def test_no_psf_is_said(field):
    found = measure(field[0])
    assert found.psf_statement.startswith("Gaussian of FWHM 3.0")
    assert found.to_table().meta["psf"] == found.psf_statement
    assert_right(found, field)


def test_no_noise_is_said(field, psf):
    found = measure(field[0], psf=psf, uncertainty=None)
    assert found.meta["noise"] == "measured"
    assert_right(found, field, flags=FitFlag.NOISE_ESTIMATED)


TAN = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0}


@pytest.mark.parametrize(
    ("cards", "sky"),
    [
        ({"CTYPE1": "WAVE", "CTYPE2": "FREQ", "CDELT1": 1.0, "CDELT2": 2.0}, False),
        ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, None),
        ({**TAN, "CD1_1": 1e-4, "CD1_2": 1e-4, "CD2_1": 1e-4, "CD2_2": 1e-4}, None),
        ({**TAN, "CD1_1": 0.0, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 0.0}, None),
        ({**TAN, "CD1_1": -4e-5, "CD1_2": 3e-5, "CD2_1": 3e-5, "CD2_2": 4e-5}, True),
    ],
)
def test_headers_with_an_odd_sky(field, psf, cards, sky, tmp_path):
    hdu = fits.PrimaryHDU(field[0])
    hdu.header.update(cards)
    star = PointSource2D()
    found = measure(hdu, field[1], psf=psf, model={"star": star}, detection={"deblend": False})
    table = found.to_table()
    assert len(found.write(tmp_path / "out.fits")) == 3
    assert not found.scene.failed.any()
    if sky is not None:
        assert ("sky_centroid" in table.colnames) == sky
    if sky:
        assert np.isfinite(table["sky_centroid"].ra.deg).all()


def test_weights_of_zero(field, psf):
    weight = np.ones((160, 160))
    weight[:75] = 0
    found = measure(field[0], psf=psf, uncertainty=InverseVariance(weight))
    assert len(found) == 2
    assert_right(found, field, rows=(2, 3))
    given = measure(field[0], field[1], psf=psf, uncertainty=InverseVariance(weight))
    assert_array_equal(given.scene.flags[:2], int(FitFlag.NO_DATA))
    assert_right(given, field, rows=(2, 3))
    with pytest.raises(ValueError, match="no usable pixel"):
        measure(field[0], psf=psf, uncertainty=InverseVariance(0 * weight))


@pytest.mark.parametrize(
    "sources", [[], np.empty((0, 2)), Table({"x": np.empty(0), "y": np.empty(0)})]
)
def test_no_positions(field, psf, sources, tmp_path):
    found = measure(field[0], sources, psf=psf, classes=True, zero_point=25)
    assert len(found) == 0
    assert len(found.write(tmp_path / "out.fits")) == 3
    full = measure(field[0], field[1][:1], psf=psf, classes=True, zero_point=25).to_table()
    assert set(full.colnames) <= set(QTable.read(tmp_path / "out.fits").colnames)


def test_positions_that_are_wrong(field, psf):
    """Two on one pixel share its light; those outside are flagged; the others are as ever."""
    xy = [*field[1], (40, 50), (400, 50), (-30, 2), (np.nan, 3)]
    found = measure(field[0], xy, psf=psf)
    outside = found.scene.flags & int(FitFlag.OUTSIDE) != 0
    assert_array_equal(outside, np.arange(8) > 4)
    assert np.isnan(found.scene.flux[outside]).all()
    assert_right(found, field, rows=(1, 2, 3))
    pair = np.ix_([0, 4], [0, 4])
    error = np.sqrt(found.scene.flux_cov[pair].sum())
    assert abs(found.scene.flux[[0, 4]].sum() - 800) < 4 * max(error, 15)


def test_images_that_are_hardly_any(psf):
    with pytest.raises(ValueError, match="no usable pixel"):
        measure(np.full((50, 50), np.nan), psf=psf)
    with pytest.raises(ValueError, match="one image"):
        measure(np.zeros((2, 20, 20)), psf=psf)
    assert len(measure(np.zeros((64, 64)), psf=psf, uncertainty=None)) == 0
    assert len(measure(np.zeros((1, 1)), psf=psf)) == 0
    tiny = measure(np.pad(np.full((1, 1), 100.0), 2), [(2, 2)], psf=psf)
    assert len(tiny) == 1
    assert tiny.scene.flags[0]


@pytest.mark.parametrize("kind", [">f4", ">f8", "<i2", ">i4"])
def test_numbers_of_any_kind(field, psf, kind):
    if "i" in kind:
        found = measure(np.rint(10 * field[0] + 200).astype(kind), psf=psf, uncertainty=10.0)
        scaled = (*field[:2], 10 * np.array(field[2]))
    else:
        found, scaled = measure(field[0].astype(kind), psf=psf), field
    assert len(found) == 4
    assert_right(found, scaled)


def test_one_group_that_fails_is_flagged_and_the_others_are_done(field, psf, monkeypatch):
    from galmorph import _scenefit

    fit_scenes = _scenefit.fit_scenes

    def failing(setups, batch, **options):
        if np.isclose(batch.data, 12345.0).any():
            raise RuntimeError("it broke")
        return fit_scenes(setups, batch, **options)

    monkeypatch.setattr(_scenefit, "fit_scenes", failing)
    large = np.pad(field[0], ((0, 60), (0, 60)))
    large[50, 40] = 12345.0
    found = measure(large, field[1], psf=psf, detection={"background": "none"})
    assert np.isnan(found.scene.flux[0])
    assert found.scene.flags[0] & int(FitFlag.NOT_CONVERGED)
    assert found.scene.meta["errors"] == {"0": "RuntimeError: it broke"}
    assert_right(found, field, rows=(1, 2, 3))
