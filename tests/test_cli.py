"""The command line, on files as users have them: what it writes, says and returns."""

import subprocess
import sys

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose

import galmorph
from galmorph import cli, fitting
from galmorph.cli import main
from galmorph.detection import gaussian_psf

SIDE, NOISE, LEVEL = 260, 0.5, 7.0
N = 16


def make_wcs():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.2]
    wcs.wcs.crpix = [131, 131]
    wcs.wcs.cdelt = [-0.2 / 3600, 0.2 / 3600]
    wcs.wcs.cunit = ["deg", "deg"]
    return wcs


@pytest.fixture(scope="module")
def truth():
    """Parameters of the galaxies of the field, on a jittered grid."""
    rng = np.random.default_rng(11)
    grid = np.mgrid[36 : SIDE - 30 : 62, 36 : SIDE - 30 : 62].reshape(2, -1)[:, :N]
    return {
        "flux": rng.uniform(1500, 4000, N),
        "x_0": grid[1] + rng.uniform(-2, 2, N),
        "y_0": grid[0] + rng.uniform(-2, 2, N),
        "r_eff": rng.uniform(2.5, 4, N),
        "n": rng.uniform(0.8, 2, N),
        "ellip": rng.uniform(0.1, 0.6, N),
        "theta": rng.uniform(-1.5, 1.5, N),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, truth):
    """A field with WCS and unit, its uncertainty, mask, PSF and positions; and a cube."""
    path = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(12)
    psf = gaussian_psf(2.5)
    image = np.full((SIDE, SIDE), LEVEL)
    for values in zip(*truth.values(), strict=True):
        parameters = dict(zip(truth, values, strict=True))
        x, y = (round(parameters[name]) - 30 for name in ("x_0", "y_0"))
        parameters |= {"x_0": parameters["x_0"] - x, "y_0": parameters["y_0"] - y}
        stamp = galmorph.SersicGalaxy2D(**parameters).render((61, 61), psf=psf)
        image[y : y + 61, x : x + 61] += stamp
    image += rng.normal(0, NOISE, image.shape)
    header = make_wcs().to_header()
    header["BUNIT"] = "nJy"
    fits.PrimaryHDU(image, header).writeto(path / "field.fits")
    sigma = np.full(image.shape, NOISE, dtype=np.float32)
    fits.PrimaryHDU(sigma).writeto(path / "sigma.fits")
    fits.PrimaryHDU(sigma**-2).writeto(path / "ivar.fits")
    fits.PrimaryHDU(np.zeros(image.shape, np.uint8)).writeto(path / "mask.fits")
    fits.PrimaryHDU(psf.data).writeto(path / "psf.fits")  # sampled 4 times a pixel
    positions = Table({"x": truth["x_0"], "y": truth["y_0"]})
    positions.write(path / "positions.csv")
    sky = make_wcs().pixel_to_world(truth["x_0"], truth["y_0"])
    QTable({"ra": sky.ra, "dec": sky.dec}).write(path / "sky.ecsv")
    cube = []
    for x, y in np.rint(np.column_stack([truth["x_0"], truth["y_0"]])).astype(int):
        cube.append(image[y - 20 : y + 21, x - 20 : x + 21])
    fits.PrimaryHDU(np.array(cube)).writeto(path / "cube.fits")
    np.save(path / "cube.npy", np.array(cube))
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(cube[0], name="SCI")]).writeto(
        path / "stamp.fits"
    )
    return path


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Run ``galmorph fit`` on a file of the folder; returns exit code, table, and what it said."""

    def run(image, *options, output="out.ecsv", psf=True):
        args = ["fit", str(folder / image), "-o", str(tmp_path / output)]
        if psf:
            args += ["--psf", str(folder / "psf.fits"), "--psf-oversampling", "4"]
        args += [str(folder / o) if str(o).endswith((".fits", ".csv", ".ecsv")) else str(o)
                 for o in options]  # fmt: skip
        code = main(args)
        said = capsys.readouterr()
        table = QTable.read(tmp_path / output) if (tmp_path / output).exists() else None
        return code, table, said

    return run


def assert_recovered(table, truth, order=slice(None), pixels=True):
    """Every parameter within five of its standard errors, and errors that are not huge."""
    for name, values in truth.items():
        if name in {"x_0", "y_0"} and not pixels:
            continue
        column = u.Quantity(table[name])[order]
        error = u.Quantity(table[f"{name}_err"])[order]
        if name == "theta":
            miss = column.to_value(u.rad) - values
            miss = (miss + np.pi / 2) % np.pi - np.pi / 2
            error = error.to_value(u.rad)
        else:
            miss, error = column.value - values, error.value
        assert np.all(np.abs(miss) < 5 * error), name
        if name in {"flux", "r_eff"}:
            assert np.all(error < 0.2 * values), name


# -- fit: what works -----------------------------------------------------------------------


@pytest.mark.parametrize("output", ["out.fits", "out.ecsv"])
def test_field_with_positions(run, truth, tmp_path, output):
    code, table, said = run(
        "field.fits", "--positions", "positions.csv", "--uncertainty", NOISE, "--size", 41,
        "--mask", "mask.fits", output=output,
    )  # fmt: skip
    assert code == cli.OK
    assert len(table) == N
    assert table["flux"].unit == u.nJy
    assert_recovered(table, truth)
    assert_allclose(table["r_eff_arcsec"].to_value(u.arcsec), 0.2 * table["r_eff"].value, rtol=1e-4)
    assert f"{N} galaxies, {N} fitted" in said.out
    assert not list(tmp_path.glob("*.checkpoint"))
    assert len(galmorph.FitResult.read(tmp_path / output)) == N


def test_field_with_sky_positions_and_ivar(run, truth):
    code, table, _ = run(
        "field.fits", "--positions", "sky.ecsv", "--uncertainty", "ivar.fits",
        "--uncertainty-type", "ivar", "--size", 41,
    )  # fmt: skip
    assert code == cli.OK
    assert_recovered(table, truth)
    world = table["sky"] if "sky" in table.colnames else None
    if world is not None:
        expected = make_wcs().pixel_to_world(truth["x_0"], truth["y_0"])
        assert np.all(world.separation(expected) < 0.1 * u.arcsec)


def test_detect(run, truth):
    code, table, said = run("field.fits", "--detect", "--threshold", 3, "--n-pixels", 8)
    assert code == cli.OK
    assert "detected" in said.err
    distance = np.hypot(
        *(np.column_stack([table["x_0"].value, table["y_0"].value])[:, None]
          - np.column_stack([truth["x_0"], truth["y_0"]])).T
    )  # fmt: skip
    assert np.all(distance.min(axis=1) < 0.3)
    nearest = distance.argmin(axis=1)
    assert_allclose(table["flux"].value[nearest], truth["flux"], rtol=0.1)


@pytest.mark.parametrize("image", ["cube.fits", "cube.npy"])
def test_cube(run, truth, image):
    code, table, _ = run(image, "--uncertainty", NOISE**2, "--uncertainty-type", "var")
    assert code == cli.OK
    assert_recovered(table, truth, pixels=False)


def test_single_stamp_without_uncertainty(run):
    code, table, _ = run("stamp.fits", "--model", "gaussian", "--background", "tilted")
    assert code == cli.OK
    assert len(table) == 1
    assert galmorph.FitFlag(int(table["flags"][0])) & galmorph.FitFlag.NOISE_ESTIMATED


def test_extension(run):
    code, table, _ = run("stamp.fits", "--ext", "SCI", "--uncertainty", NOISE)
    assert (code, len(table)) == (cli.OK, 1)
    code, _, said = run("stamp.fits", "--ext", "ERR", output="b.ecsv")
    assert code == cli.BAD_INPUT
    assert "no extension" in said.err


def test_fixed_parameters(run):
    code, table, _ = run("stamp.fits", "--fix", "n=1", "--fix", "theta=30", "--uncertainty", NOISE)
    assert code == cli.OK
    assert table["n"][0] == 1
    assert table["n_err"][0] == 0
    assert_allclose(u.Quantity(table["theta"])[0].to_value(u.deg), 30)


def test_gaussian_psf_by_width(run, truth):
    code, table, _ = run("cube.fits", "--uncertainty", NOISE, "--psf", "fwhm=2.5", psf=False)
    assert code == cli.OK
    assert_recovered(table, truth, pixels=False)


def test_psf_of_the_image(folder, tmp_path, capsys):
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:200, :200]
    image = rng.normal(0, 1, (200, 200))
    for x0, y0 in np.mgrid[20:200:40, 20:200:40].reshape(2, -1).T + rng.uniform(-2, 2, (25, 2)):
        image += 150 * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 1.3**2))
    fits.PrimaryHDU(image).writeto(tmp_path / "stars.fits")
    args = ["fit", str(tmp_path / "stars.fits"), "--detect", "--threshold", "5", "--psf", "auto"]
    assert main([*args, "--model", "point", "-o", str(tmp_path / "out.ecsv")]) == cli.OK
    assert "PSF: Effective PSF" in capsys.readouterr().err
    table = QTable.read(tmp_path / "out.ecsv")
    assert_allclose(table["flux"], 150 * 2 * np.pi * 1.3**2, rtol=0.1)


def test_plots(run, tmp_path):
    code, _, _ = run("stamp.fits", "--uncertainty", NOISE, "--plots", tmp_path / "figures")
    assert code == cli.OK
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"sheet-1.png", "fit-0.png", "profile-0.png"}


def test_quiet(run):
    code, _, said = run("stamp.fits", "--uncertainty", NOISE, "--quiet")
    assert code == cli.OK
    assert said.out == said.err == ""


# -- fit: interruption ---------------------------------------------------------------------


def test_interrupted_job_goes_on(run, tmp_path, monkeypatch, truth):
    """What was finished before an interruption is not fitted again."""
    real = fitting.MAPFitter.fit_stamps
    fitted = []

    def interrupted(self, batch, *args, **kwargs):
        if len(fitted) >= 8:
            raise KeyboardInterrupt
        fitted.extend(batch.index)
        return real(self, batch, *args, **kwargs)

    monkeypatch.setattr(fitting.MAPFitter, "fit_stamps", interrupted)
    options = ("cube.fits", "--uncertainty", NOISE, "--batch-size", 4)
    code, table, said = run(*options)
    assert code == cli.INTERRUPTED
    assert table is None
    assert "goes on" in said.err
    assert (tmp_path / "out.ecsv.checkpoint").exists()

    monkeypatch.setattr(
        fitting.MAPFitter,
        "fit_stamps",
        lambda self, batch, *a, **k: (fitted.extend(batch.index), real(self, batch, *a, **k))[1],
    )
    # another job must not take the checkpoint for its own
    code, _, said = run(*options, "--background", "none")
    assert code == cli.BAD_INPUT
    assert "another job" in said.err

    code, table, said = run(*options)
    assert code == cli.OK
    assert "going on" in said.err
    assert sorted(fitted) == list(range(N))
    assert_recovered(table, truth, pixels=False)
    assert not (tmp_path / "out.ecsv.checkpoint").exists()


def test_restart(run, tmp_path):
    (tmp_path / "out.ecsv.checkpoint").write_text("no checkpoint")
    code, _, said = run("stamp.fits")
    assert code == cli.BAD_INPUT
    assert "checkpoint" in said.err
    code, table, _ = run("stamp.fits", "--restart")
    assert (code, len(table)) == (cli.OK, 1)


# -- bad input -----------------------------------------------------------------------------


def test_nothing_fitted(run, folder):
    fits.PrimaryHDU(np.full((2, 21, 21), np.nan)).writeto(folder / "nan.fits", overwrite=True)
    code, table, said = run("nan.fits", "--uncertainty", "1")
    assert code == cli.NOTHING_FITTED
    assert len(table) == 2
    assert "NO_DATA 2" in said.out


def write_bad_files(folder):
    good = (folder / "cube.fits").read_bytes()
    (folder / "truncated.fits").write_bytes(good[: len(good) // 2])
    (folder / "text.fits").write_text("this is no FITS file")
    (folder / "empty.fits").write_bytes(b"")
    (folder / "bad.npy").write_text("neither")
    fits.PrimaryHDU(np.zeros((5, 5))).writeto(folder / "zero.fits", overwrite=True)
    fits.PrimaryHDU(np.zeros((3, 5, 5))).writeto(folder / "small.fits", overwrite=True)
    fits.BinTableHDU(Table({"a": [1]})).writeto(folder / "table.fits", overwrite=True)
    (folder / "letters.csv").write_text("a,b\n1,2\n")
    fits.PrimaryHDU(np.zeros((200, 200))).writeto(folder / "blank.fits", overwrite=True)


BAD = {
    "missing image": (["missing.fits"], "no such file"),
    "truncated": (["truncated.fits"], "truncated.fits"),
    "not FITS": (["text.fits"], "cannot be read"),
    "empty": (["empty.fits"], "empty.fits"),
    "not an array": (["bad.npy"], "bad.npy"),
    "only a table": (["table.fits"], "holds no image"),
    "no such extension": (["stamp.fits", "--ext", "7"], "no extension 7"),
    "extension twice": (["stamp.fits[SCI]", "--ext", "1"], "leave --ext out"),
    "missing psf": (["stamp.fits", "--psf", "missing.fits"], "no such file"),
    "truncated psf": (["stamp.fits", "--psf", "truncated.fits"], "truncated.fits"),
    "psf not FITS": (["stamp.fits", "--psf", "text.fits"], "text.fits"),
    "zero psf": (["stamp.fits", "--psf", "zero.fits"], "positive sum"),
    "no width": (["stamp.fits", "--psf", "fwhm=wide"], "FWHM"),
    "negative width": (["stamp.fits", "--psf", "fwhm=-2"], "FWHM"),
    "wrong number of psfs": (["cube.fits", "--psf", "small.fits"], "3 PSFs for 16"),
    "psf of a cube": (["cube.fits", "--psf", "auto"], "one image"),
    "sampling of no file": (["stamp.fits", "--psf-oversampling", "2"], "describe a PSF file"),
    "missing uncertainty": (["stamp.fits", "--uncertainty", "missing.fits"], "no such file"),
    "shape of uncertainty": (["stamp.fits", "--uncertainty", "zero.fits"], "shape"),
    "zero uncertainty": (["stamp.fits", "--uncertainty", "0"], "positive"),
    "nan uncertainty": (["stamp.fits", "--uncertainty", "nan"], "positive"),
    "missing mask": (["stamp.fits", "--mask", "missing.fits"], "no such file"),
    "shape of mask": (["stamp.fits", "--mask", "zero.fits"], "mask has shape"),
    "missing positions": (["field.fits", "--positions", "missing.csv"], "no such file"),
    "positions without columns": (["field.fits", "--positions", "letters.csv"], "columns"),
    "positions no table": (["field.fits", "--positions", "truncated.fits"], "truncated.fits"),
    "nothing to detect": (["blank.fits", "--detect"], "no source"),
    "cube to detect on": (["cube.fits", "--detect"], "one image"),
    "threshold alone": (["stamp.fits", "--threshold", "2"], "--detect"),
    "unknown parameter": (["stamp.fits", "--fix", "slope=1"], "r_eff"),
    "two kinds of positions": (
        ["field.fits", "--detect", "--positions", "positions.csv"],
        "not allowed",
    ),
    "no number": (["stamp.fits", "--size", "big"], "positive integer"),
    "unknown model": (["stamp.fits", "--model", "cube"], "invalid choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, tmp_path, capsys):
    """One clear line on the standard error, exit code 2, no catalogue, no traceback."""
    write_bad_files(folder)
    options, message = BAD[case]
    paths = (".fits", ".csv", ".npy", "]")
    args = [str(folder / option) if option.endswith(paths) else option for option in options]
    assert main(["fit", *args, "-o", str(tmp_path / "out.fits")]) == cli.BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert "Traceback" not in said.err
    if "usage:" not in said.err:
        lines = [line for line in said.err.splitlines() if "warning" not in line]
        assert len(lines) == 1
        assert lines[0].startswith("galmorph: error: ")
    assert not (tmp_path / "out.fits").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("out.txt", "must end in"), ("nowhere/out.fits", "no such folder"), ("there.fits", "exists")],
)
def test_bad_output(output, message, folder, tmp_path, capsys):
    (tmp_path / "there.fits").write_text("something dear")
    args = ["fit", str(folder / "stamp.fits"), "-o", str(tmp_path / output)]
    assert main(args) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.fits").read_text() == "something dear"


def test_overwrite(run, tmp_path):
    (tmp_path / "out.fits").write_text("nothing dear")
    code, table, _ = run("stamp.fits", "--overwrite", output="out.fits")
    assert (code, len(table)) == (cli.OK, 1)


def test_internal_error(folder, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("galmorph.images.fit_images", broken)
    args = ["fit", str(folder / "stamp.fits"), "-o", str(tmp_path / "out.fits")]
    assert main(args) == cli.INTERNAL
    assert "oops" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main([*args, "--debug"])


# -- the program ---------------------------------------------------------------------------


def test_help_and_version(capsys):
    for args in (["--help"], ["fit", "--help"], ["demo", "-h"]):
        assert main(args) == cli.OK
        assert "usage: galmorph" in capsys.readouterr().out
    assert main(["--version"]) == cli.OK
    assert capsys.readouterr().out.split() == ["galmorph", galmorph.__version__]
    assert main([]) == cli.BAD_INPUT
    assert main(["fly"]) == cli.BAD_INPUT


def test_help_explains_exit_codes(capsys):
    main(["fit", "--help"])
    text = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "3 ", "130 "):
        assert f"\n  {code}" in text


def test_python_m_and_light_help():
    """``python -m galmorph --help`` works, and imports nothing heavy."""
    code = (
        "import sys; from galmorph.cli import main; main(['fit', '--help']);"
        "heavy = {'torch', 'photutils', 'matplotlib', 'tqdm', 'skimage'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "galmorph", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("galmorph ")
