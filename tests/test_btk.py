"""The deblender for BlendingToolKit, with it or with a stand-in of its documented classes."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy.table import Table
from astropy.wcs import WCS

from galmorph import SersicGalaxy2D

galsim = pytest.importorskip("galsim")
pytest.importorskip("torch")

SIZE, SCALE, SIGMA = 45, 0.2, 20.0


@dataclass
class _DeblendExample:
    max_n_sources: int
    catalog: Table
    n_bands: int | None = None
    image_size: int | None = None
    segmentation: Any = None
    deblended_images: Any = None


@dataclass
class _DeblendBatch:
    batch_size: int
    max_n_sources: int
    catalog_list: list
    n_bands: int | None = None
    image_size: int | None = None
    segmentation: Any = None
    deblended_images: Any = None


class _Deblender:
    def __init__(self, max_n_sources):
        self.max_n_sources = max_n_sources

    def __call__(self, blend_batch, njobs=1, **kwargs):
        return self.batch_call(blend_batch, njobs, **kwargs)


@pytest.fixture
def plug_in(monkeypatch):
    """`galmorph.btk`, with BlendingToolKit or the stand-in."""
    import galmorph.btk

    try:
        import btk.deblend  # noqa: F401
    except ImportError:
        package, deblend, batch = (ModuleType(f"btk{n}") for n in ("", ".deblend", ".blend_batch"))
        deblend.Deblender = _Deblender
        batch.DeblendExample, batch.DeblendBatch = _DeblendExample, _DeblendBatch
        for module in (package, deblend, batch):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        yield importlib.reload(galmorph.btk)
        monkeypatch.undo()
        importlib.reload(galmorph.btk)
    else:
        yield galmorph.btk


def _survey():
    try:
        from btk.survey import get_surveys
    except ImportError:
        import astropy.units as u

        return SimpleNamespace(pixel_scale=SCALE * u.arcsec, available_filters=list("ugrizy"))
    return get_surveys("LSST")


@pytest.fixture
def blends(plug_in):
    """Six blends of two disks in the r band; the others hold noise."""
    rng, count = np.random.default_rng(4), 6
    psf = galsim.Moffat(beta=2.5, fwhm=0.7)
    isolated = np.zeros((count, 2, 6, SIZE, SIZE))
    flux = np.array([30000.0, 12000.0])
    catalogs = []
    for i in range(count):
        angle = rng.uniform(0, 2 * np.pi)
        at = np.array([[0, 0], [np.cos(angle), np.sin(angle)]]) * rng.uniform(1.6, 2.2)
        at += rng.uniform(-0.2, 0.2, 2)
        for k in range(2):
            disk = galsim.Exponential(half_light_radius=rng.uniform(0.3, 0.5), flux=flux[k])
            light = galsim.Convolve(disk, psf).shift(*at[k])
            isolated[i, k, 2] = light.drawImage(nx=SIZE, ny=SIZE, scale=SCALE).array
        pixel = at / SCALE + (SIZE - 1) / 2
        catalogs.append(Table({"x_peak": pixel[:, 0], "y_peak": pixel[:, 1]}))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [SCALE / 3600, SCALE / 3600]
    wcs.wcs.crpix = [(SIZE + 1) / 2] * 2
    values = {
        "batch_size": count,
        "max_n_sources": 2,
        "stamp_size": SIZE * SCALE + 1e-3,
        "survey": _survey(),
        "blend_images": isolated.sum(1) + rng.normal(0, SIGMA, (count, 6, SIZE, SIZE)),
        "isolated_images": isolated,
        "catalog_list": catalogs,
        "psf": [psf] * 6,
    }
    try:
        from btk.blend_batch import BlendBatch
    except ImportError:
        return SimpleNamespace(image_size=SIZE, wcs=wcs, **values), flux
    return BlendBatch(**values), flux


def test_a_batch_is_deblended_with_true_centres(plug_in, blends):
    batch, flux = blends
    deblender = plug_in.GalmorphDeblender(
        3, band=2, model=SersicGalaxy2D(), true_centres=True, uncertainty=SIGMA
    )
    out = deblender(batch)
    assert out.deblended_images.shape == (6, 3, 1, SIZE, SIZE)
    assert out.segmentation.shape == (6, 3, SIZE, SIZE)
    assert set(np.unique(out.segmentation)) <= {False, True}
    found = np.array([c["flux"] for c in out.catalog_list])
    error = np.array([c["flux_err"] for c in out.catalog_list])
    assert (np.abs(found - flux) < 4 * error).all()
    truth = batch.isolated_images[:, :, 2]
    images = out.deblended_images[:, :2, 0]
    norm = np.sqrt((truth**2).sum((2, 3)) * (images**2).sum((2, 3)))
    assert ((truth * images).sum((2, 3)) / norm > 0.995).all()
    assert not out.deblended_images[:, 2].any()  # no third source
    for catalog, given in zip(out.catalog_list, batch.catalog_list, strict=True):
        assert np.abs(catalog["x_peak"] - given["x_peak"]).max() < 1
        # sky coordinates are in arcseconds
        sky = 3600 * np.array(batch.wcs.pixel_to_world_values(catalog["x_peak"], catalog["y_peak"]))
        np.testing.assert_allclose([catalog["ra"], catalog["dec"]], sky)


def test_one_example_is_as_in_the_batch(plug_in, blends):
    batch, _ = blends
    deblender = plug_in.GalmorphDeblender(2, band=2, model=SersicGalaxy2D(), find_missed=5)
    out, one = deblender(batch), deblender.deblend(1, batch)
    np.testing.assert_allclose(one.catalog["flux"], out.catalog_list[1]["flux"], rtol=1e-3)
    peak = one.deblended_images.max()
    np.testing.assert_allclose(one.deblended_images, out.deblended_images[1], atol=1e-3 * peak)


def test_the_search_finds_what_detection_missed(plug_in, blends):
    batch, _ = blends
    options = {"band": 2, "model": SersicGalaxy2D(), "detection": {"deblend": False}}
    plain = plug_in.GalmorphDeblender(3, **options)(batch)
    more = plug_in.GalmorphDeblender(3, find_missed=5, **options)(batch)
    count = [sum(len(c) for c in out.catalog_list) for out in (plain, more)]
    assert count[0] < count[1] <= 12
    assert any(c["added"].any() for c in more.catalog_list)


def test_the_brightest_are_returned_and_nothing_is_nothing(plug_in, blends):
    batch, flux = blends
    one = plug_in.GalmorphDeblender(
        1, band=2, model=SersicGalaxy2D(), true_centres=True, uncertainty=SIGMA
    )(batch)
    assert [len(c) for c in one.catalog_list] == [1] * 6
    assert all(c["flux"][0] > flux.mean() for c in one.catalog_list)
    empty = plug_in.GalmorphDeblender(
        2, band=0, model=SersicGalaxy2D(), detection={"threshold": 5.0}
    )(batch)
    assert [len(c) for c in empty.catalog_list] == [0] * 6


def test_wrong_arguments_are_told(plug_in, blends):
    with pytest.raises(ValueError, match="uncertainty"):
        plug_in.GalmorphDeblender(2, uncertainty=-1)
    with pytest.raises(TypeError, match="speed"):
        plug_in.GalmorphDeblender(2, model=SersicGalaxy2D())(blends[0], speed=3)


def test_without_it_the_module_is_importable_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['btk'] = None\n"
        "from galmorph.deblending import GalmorphDeblender\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    GalmorphDeblender(2)\n"
        "except ImportError as error:\n    assert 'pip install' in str(error)\n"
        "else:\n    raise SystemExit('made')\n"
        "import galmorph.deblending\n"
        "assert not hasattr(galmorph.deblending, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
