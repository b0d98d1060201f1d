"""The demonstration, small: what it writes, and that it says what it has done."""

import sys

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable

from galmorph import FitResult
from galmorph.cli import main

N = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("skimage")
    from galmorph import demo

    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "galaxy-123456789-fits.png").write_text("of an earlier run")
    (folder / "galaxy-mine.png").write_text("the user's own")
    whole = demo.load_deep_field()
    assert whole.shape == (872, 1000, 3)
    with pytest.MonkeyPatch.context() as patch:  # a corner of the field, to save time
        patch.setattr(demo, "load_deep_field", lambda: whole[:560, :440])
        patch.setattr(demo, "_N_SINGLE", 1)
        return demo.run_demo(folder, n_max=N, progress=False)


def test_fits(demo):
    assert len(demo.gaussian) == len(demo.sersic) == len(demo.table) == N
    assert not (demo.sersic.failed | demo.gaussian.failed).any()
    assert np.array_equal(demo.gaussian.ids, demo.sersic.ids)
    # the largest spiral of the field
    x, y = demo.sersic.params[:, 1:3].T
    assert np.hypot(x - 123.2, y - 470).min() < 2
    # a Gaussian is a Sersic of n = 0.5, so it cannot fit better
    assert np.all(np.asarray(demo.table["delta_chi2"]) > -1)
    assert np.sum(demo.table["delta_chi2"] > 9) >= N - 1
    # a Sersic is a learned galaxy without latents; these are bright, so that the prior gives way
    assert len(demo.learned) == N
    assert not demo.learned.failed.any()
    assert np.all(np.asarray(demo.table["delta_chi2_learned"]) > 0)


def test_noise_and_psf(demo):
    assert 1.1 < demo.noise_factor < 2
    assert 1.5 < demo.psf.fwhm < 2.5
    assert demo.psf.method == "compact sources"
    assert np.all(demo.sigma >= demo.noise_factor * np.nanmin(demo.detection.rms))
    bright = demo.image > 150
    assert np.median(demo.sigma[bright]) > 10 * np.median(demo.sigma)


def test_files(demo):
    """Every file is explained, every explained file is there and can be read."""
    text = (demo.output / "README.txt").read_text(encoding="utf-8")
    written = {path.name for path in demo.output.iterdir()} - {"README.txt", "galaxy-mine.png"}
    assert written == set(demo.files)
    assert all(name in text for name in written)
    assert {"demo.png", "map.png", "contact-sheet-1.png"} <= written
    assert (demo.output / "galaxy-mine.png").read_text() == "the user's own"
    for kind in ("fits", "ecsv"):
        for name in ("sersic", "learned"):
            assert len(FitResult.read(demo.output / f"catalog-{name}.{kind}")) == N
    table = QTable.read(demo.output / "comparison.ecsv")
    assert list(table["label"]) == list(demo.sersic.ids)
    with fits.open(demo.output / "field.fits") as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["SCI", "ERR", "SEGMENTS", "PSF"]
        assert hdus["PSF"].header["OVERSAMP"] == demo.psf.psf.oversampling


def test_readme_says_what_was_assumed(demo):
    text = " ".join((demo.output / "README.txt").read_text(encoding="utf-8").split())
    for words in (
        "stretched for display",
        "no WCS",
        f"{demo.noise_factor:.2f} times more",
        "upper limit",
        "clips at 255",
        "photon noise",
    ):
        assert words in text


def test_summary(demo):
    from galmorph.demo import summary

    text = summary(demo, n_rows=2)
    assert "±" in text
    assert "Sersic beats Gaussian" in text
    assert "learned galaxy beats Sersic" in text
    assert "and 4 more" in text


def test_field_can_be_fitted_again(demo, tmp_path):
    """The file that the demo leaves is an input of ``galmorph fit``, PSF and noise included."""
    from galmorph.images import fit_images
    from galmorph.models import SersicGalaxy2D

    with fits.open(demo.output / "field.fits") as hdus:
        segments = hdus["SEGMENTS"].data.astype(int)
    chosen = QTable({"x": demo.sersic.params[:1, 1], "y": demo.sersic.params[:1, 2]})
    again = fit_images(
        demo.output / "field.fits", SersicGalaxy2D(), positions=chosen, background="constant",
        segmentation=segments, size=tuple(demo.sersic.shapes[0]),
    )  # fmt: skip
    flux, error = demo.sersic.params[0, 0], demo.sersic.stds[0, 0]
    assert abs(again.params[0, 0] - flux) < error


def test_needs_scikit_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_bad_arguments(tmp_path, capsys):
    pytest.importorskip("skimage")
    from galmorph.demo import run_demo

    with pytest.raises(ValueError, match="n_max"):
        run_demo(tmp_path, n_max=0)
    (tmp_path / "file").write_text("")
    assert main(["demo", "-o", str(tmp_path / "file"), "-q"]) == 2
    assert "file" in capsys.readouterr().err
