"""The report of a scene: what is in the file, and what it does in a browser."""

import base64
import csv
import hashlib
import io
import json
import shutil
from html.parser import HTMLParser

import astropy.units as u
import numpy as np
import pytest
from astropy.table import MaskedColumn
from astropy.wcs import WCS

from galmorph import PSF, FitFlag, PointSource2D, SersicGalaxy2D
from galmorph.deblending import deblend
from galmorph.report import PER_PAGE, catalog_report

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&@@CONTENT@@'
VOID = {"meta", "input", "br", "img", "link", "image"}


class Page(HTMLParser):
    """Elements of a page: their attributes, and the text in those with an id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self.open.append((tag, attrs.get("id") or attrs.get("class") or tag))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1][1], []).append(data)

    def find(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def content(self):
        return json.loads("".join(self.texts["content"]))

    @property
    def columns(self):
        return {c["name"]: c for c in self.content["columns"]}

    @property
    def sprites(self):
        return [decoded(text) for text in self.texts.get("sprite", [])]


def decoded(text):
    """Colours (ny, nx, 3) of a picture in base64."""
    image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    return np.asarray(image).astype(int)


def sky(scale=0.3):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [150.0, 2.0], [20, 20]
    wcs.wcs.cdelt = [-scale / 3600, scale / 3600]
    return wcs


def scene(positions, *, shape=(50, 60), seed=1, model=None, **options):
    """A fitted scene of Sérsic galaxies at the positions, of fluxes 400, 800, …"""
    y, x = np.mgrid[-8:9, -8:9]
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))
    image = np.random.default_rng(seed).normal(0, 0.3, shape)
    for i, (x_0, y_0) in enumerate(positions):
        if np.isfinite([x_0, y_0]).all():
            flux = 400 * (i + 1)
            image += SersicGalaxy2D(flux, x_0, y_0, r_eff=2.5, psf=psf).render(shape)
    xy = np.array(positions, dtype=float).reshape(-1, 2)
    model = SersicGalaxy2D() if model is None else model
    return deblend(image, xy, model=model, psf=psf, uncertainty=0.3, **options)


@pytest.fixture(scope="module")
def result():
    found = scene([(20, 20), (29, 24), (45, 37)])
    found.wcs, found.data_unit = sky(), u.uJy
    return found


def written(result, folder, **options):
    path = catalog_report(result, folder / "report.html", **options)
    return Page(path.read_text(encoding="utf-8"))


# -- the file --------------------------------------------------------------------------------


def test_elements_are_closed_and_nothing_comes_from_elsewhere(result, tmp_path):
    page = written(result, tmp_path)
    assert page.open == []
    for _, attrs in page.elements:
        for name in ("src", "href", "action", "data"):
            assert attrs.get(name, "data:").startswith(("data:", "#"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_policy_of_the_page_allows_its_own_script_only(result, tmp_path):
    page = written(result, tmp_path)
    policy = next(m["content"] for m in page.find("meta") if "http-equiv" in m)
    digest = hashlib.sha256("".join(page.texts["script"]).encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def test_cells_are_those_of_the_table(result, tmp_path):
    page, table = written(result, tmp_path), result.to_table()
    assert page.content["ids"] == ["0", "1", "2"]
    for name in ("flux", "r_eff", "blendedness", "chi2"):
        expected = getattr(table[name], "value", table[name])
        np.testing.assert_allclose(page.columns[name]["cells"], expected, rtol=1e-6)
    assert page.columns["flux"]["unit"] == "uJy"
    assert page.columns["model"]["cells"] == ["SersicGalaxy2D"] * 3
    np.testing.assert_allclose(page.columns["ra"]["cells"], table["sky_centroid"].ra.deg, rtol=1e-9)


def test_cards_say_value_error_and_unit(result, tmp_path):
    card = dict(written(result, tmp_path).content["cards"][1]["lines"])
    flux, rest = card["flux"].split(" ± ")
    error, unit = rest.split()
    assert unit == "uJy"
    # To two digits of the error.
    assert abs(float(flux) - result.flux[1]) < 0.06 * result.flux_err[1]
    assert abs(float(error) - result.flux_err[1]) < 0.06 * result.flux_err[1]
    radius = float(card["radius"].split(" ± ")[0])
    assert abs(radius - 0.3 * result.params[1][3]) < 0.01
    assert card["radius"].endswith("″")
    assert card["RA, Dec"].startswith("09:59:5") or card["RA, Dec"].startswith("10:00:0")


def test_the_head_says_what_was_fitted(result, tmp_path):
    page = written(result, tmp_path, title="Field A")
    assert page.texts["h1"] == ["Field A"]
    head = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert head["sources"] == "3"
    assert head["groups"] == str(result.meta["groups"])
    assert head["median noise"] == "0.3 uJy per pixel"
    # FWHM of a Gaussian of sigma 1.3
    pixels, arcsec = head["PSF FWHM"].removesuffix("″").split(" pixels, ")
    assert abs(float(pixels) - 3.061) < 0.05
    assert abs(float(arcsec) - 0.3 * 3.061) < 0.02
    assert head["fitter"] == result.meta["fitter"]


def test_thumbnails_show_the_pixels_of_the_source(result, tmp_path):
    page = written(result, tmp_path)
    (sprite,) = page.sprites
    cell = page.content["cell"]
    for row in range(3):
        left, bottom, side, n = page.content["boxes"][row]
        assert side == n  # small enough to be shown pixel by pixel
        cells = [sprite[row * cell :][:n, k * cell :][:, :n] for k in range(4)]
        y, x = np.mgrid[bottom : bottom + side, left : left + side]
        inside = (x >= 0) & (y >= 0) & (x < 60) & (y < 50)
        inside = inside[::-1]  # pictures begin at the top
        data, model, own, residual = cells
        gray = (data[..., 0] == data[..., 1]) & (data[..., 0] == data[..., 2])
        np.testing.assert_array_equal(gray, inside)
        # Brightest where the galaxy is: the centre of the box.
        peak = np.unravel_index(own[..., 0].argmax(), own.shape[:2])
        x_0, y_0 = result.params[row][1:3]
        assert abs(peak[1] - (x_0 - left)) < 1.5
        assert abs(side - 1 - peak[0] - (y_0 - bottom)) < 1.5
        assert (model[..., 0] >= own[..., 0])[inside].all()
        # The model is right, so that few residuals are strong (red or blue).
        strong = np.abs(residual[..., 0] - residual[..., 2]) > 150
        assert strong[inside].mean() < 0.01


def test_data_and_models_share_their_stretch(tmp_path):
    """Without noise the data are the model."""
    model = SersicGalaxy2D(2000, 25, 25, r_eff=3)
    found = deblend(model.render((50, 50)), [(25, 25)], model=SersicGalaxy2D(), uncertainty=0.3)
    page = written(found, tmp_path)
    n, cell = page.content["boxes"][0][3], page.content["cell"]
    sprite = page.sprites[0][..., 0]
    assert np.ptp(sprite[:n, :n]) > 150
    assert np.abs(sprite[:n, :n] - sprite[:n, cell : cell + n]).max() <= 5  # a level
    white = page.sprites[0][:n, 3 * cell : 3 * cell + n]
    assert white.min() > 235  # no residual


def test_the_field_is_drawn_upright_and_reduced(tmp_path):
    found = scene([(30, 1450)], shape=(1500, 60))
    page = written(found, tmp_path)
    data = next(i for i in page.find("image") if i["id"] == "field-data")
    picture = decoded(data["href"].removeprefix("data:image/png;base64,"))
    assert picture.shape[:2] == (750, 30)  # averaged by two
    assert (data["y"], data["width"], data["height"]) == ("0", "60", "1500")
    row, column = np.argwhere(picture[..., 0] == picture.max()).mean(0)
    assert abs(row - (1500 - 1450) / 2) < 2
    assert abs(column - 15) < 2


def test_neighbours_are_those_in_the_box(result, tmp_path):
    content = written(result, tmp_path).content
    for row, (left, bottom, side, _) in enumerate(content["boxes"]):
        x, y = np.array([p[:2] for p in content["places"]]).T
        inside = (x > left - 0.5) & (x < left + side - 0.5)
        inside &= (y > bottom - 0.5) & (y < bottom + side - 0.5)
        assert content["near"][row] == np.flatnonzero(inside).tolist()
        assert row in content["near"][row]
    assert 1 in content["near"][0]


def test_every_flag_has_its_meaning(result, tmp_path):
    meanings = written(result, tmp_path).content["flags"]
    single = {f.name for f in FitFlag if f.value & (f.value - 1) == 0}
    assert single <= set(meanings)
    assert all(meanings.values())
    assert "saturated" in meanings["SATURATED"]


# -- tables ----------------------------------------------------------------------------------


def test_a_table_may_say_more_and_choose(result, tmp_path):
    table = result.to_table()[[2, 0]]
    table["mag"] = u.Magnitude([20.5, 21.25], u.ABmag)
    table["mag_err"] = [0.01, 0.02] * u.mag
    table["star_probability"] = [0.9, 0.1]
    table["class"] = MaskedColumn(["disk", "?"], mask=[False, True])
    page = written(result, tmp_path, table=table)
    content = page.content
    assert content["ids"] == ["2", "0"]
    assert content["rows"] == [1, -1, 0]
    card = dict(content["cards"][0]["lines"])
    assert card["mag"] == "20.500 ± 0.010 mag(AB)"
    assert card["star"] == "0.90"
    assert dict(content["cards"][1]["lines"])["class"] == "—"
    ways = {way["by"]: way for way in content["colours"]}
    groups = [ways["star"]["names"][g] for g in ways["star"]["of"]]
    assert groups == ["not a star", "not in the table", "star"]


def test_masked_and_missing_cells_are_null(tmp_path):
    y, x = np.mgrid[-8:9, -8:9]
    star = PointSource2D(psf=PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2)))
    found = scene([(20, 20), (40, 30)], model=[SersicGalaxy2D(), star])
    page = written(found, tmp_path)
    assert page.columns["n"]["cells"][1] is None
    assert page.columns["n"]["cells"][0] > 0
    assert dict(page.content["cards"][1]["lines"])["radius"] == "—"
    assert page.content["places"][1][2] == 0


def test_columns_can_be_chosen(result, tmp_path):
    page = written(result, tmp_path, columns=["n", "sky_centroid"])
    assert list(page.columns) == ["id", "n", "ra", "dec"]
    assert all(c["shown"] for c in page.columns.values())
    with pytest.raises(ValueError, match="no column 'colour'"):
        catalog_report(result, tmp_path / "other.html", columns=["colour"])
    assert not (tmp_path / "other.html").exists()


def test_the_brightest_of_too_many(result, tmp_path):
    page = written(result, tmp_path, max_sources=2)
    assert page.content["ids"] == ["1", "2"]
    assert len(page.content["places"]) == 3
    assert "2 shown of 3" in page.texts["dd"]


@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_max_sources_must_be_a_positive_integer(result, tmp_path, number):
    with pytest.raises(ValueError, match="max_sources"):
        catalog_report(result, tmp_path / "report.html", max_sources=number)


def test_rows_must_be_sources(result, tmp_path):
    table = result.to_table()
    table["id"] = [0, 1, 9]
    with pytest.raises(ValueError, match=r"\[9\]"):
        catalog_report(result, tmp_path / "report.html", table=table)
    del table["id"]
    with pytest.raises(ValueError, match="2 rows"):
        catalog_report(result, tmp_path / "report.html", table=table[:2])
    with pytest.raises(TypeError, match="SceneResult"):
        catalog_report(table, tmp_path / "report.html")


def test_a_file_is_not_replaced_unasked(result, tmp_path):
    path = catalog_report(result, tmp_path / "report.html")
    path.write_text("mine")
    with pytest.raises(OSError, match="overwrite"):
        catalog_report(result, path)
    assert path.read_text() == "mine"
    catalog_report(result, str(path), overwrite=True)
    assert path.stat().st_size > 10_000


# -- bad input -------------------------------------------------------------------------------


def test_names_are_text_not_markup(result, tmp_path):
    table = result.to_table()
    table["name"] = [NASTY, "=1+1", "b"]
    table.meta[NASTY] = {"a": NASTY}
    page = written(result, tmp_path, table=table, title=NASTY)
    assert len(page.texts["script"]) == 1
    assert not page.find("img")
    assert "".join(page.texts["h1"]) == NASTY
    assert page.columns["name"]["cells"][0] == NASTY
    assert page.open == []


def test_no_source_at_all(tmp_path):
    page = written(scene([]), tmp_path)
    assert page.content["ids"] == []
    assert page.sprites == []
    assert page.content["size"] == [60, 50]


def test_sources_that_failed_are_there(tmp_path):
    found = scene([(20, 20), (-40, 10), (np.nan, 5)])
    assert found.failed.tolist() == [False, True, True]
    page = written(found, tmp_path)
    assert page.content["boxes"][1:] == [None, None]
    assert page.content["places"][2] is None
    assert "OUTSIDE" in page.content["cards"][1]["flags"]
    assert page.columns["flux"]["cells"][1:] == [None, None]
    assert dict(page.content["cards"][1]["lines"])["flux"] == "—"
    way = page.content["colours"][0]
    assert way["names"][way["of"][1]] == "failed"


def test_no_usable_pixel(tmp_path):
    image = np.full((30, 30), np.nan)
    found = deblend(image, [(15, 15)], model=SersicGalaxy2D(), uncertainty=1.0)
    page = written(found, tmp_path)
    assert "no usable pixel" in page.texts["dd"]
    assert "no PSF" in page.texts["dd"]
    n, cell = page.content["boxes"][0][3], page.content["cell"]
    for panel in (0, 3):  # data and residual
        colours = page.sprites[0][:n, panel * cell :][:, :n].reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) == 1
        assert len(np.unique(colours[0])) == 3  # neither black, gray nor white


# -- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    own = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield started
        started.close()


def test_a_person_pages_sorts_filters_and_saves(browser, tmp_path):
    xy = [(x, y) for y in range(12, 200, 24) for x in range(12, 200, 24)]
    found = scene(xy, shape=(204, 204), model=PointSource2D())
    table = found.to_table()
    table["name"] = [NASTY] + ["=1+1"] * (len(table) - 1)
    path = catalog_report(found, tmp_path / "report.html", table=table)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(path.as_uri())

    cards = page.locator(".card")
    assert len(xy) == 64
    assert cards.count() == PER_PAGE
    page.click("#forward")
    assert cards.count() == len(xy) - PER_PAGE
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    assert cards.count() == PER_PAGE

    page.click("[data-view=sheet]")
    first = page.locator("tbody tr").first.locator("td").first
    page.click("th button:text-matches('^flux(?!_)')")
    page.click("th button:text-matches('^flux(?!_)')")
    assert first.inner_text() == str(int(found.ids[found.flux.argmax()]))
    assert page.locator("th[aria-sort=descending]").count() == 1

    limit = float(np.sort(found.flux)[-6:].mean())
    page.fill("#query", f"flux > {limit}")
    assert page.locator("tbody tr").count() == np.count_nonzero(found.flux > limit)
    page.fill("#query", "not flags is none")
    assert page.locator("tbody tr").count() == min(PER_PAGE, np.count_nonzero(found.flags))
    page.fill("#query", "fluxx > 3")
    assert "no column" in page.inner_text("#message")

    middle = float(np.median(found.flux))
    page.fill("#query", f"flux > {middle} and id < 60")
    page.click("#help summary")
    page.check("label:text-is('name') >> input")
    with page.expect_download() as download:
        page.click("#save")
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = (found.flux > middle) & (found.ids < 60)
    assert sorted(int(r["id"]) for r in rows) == found.ids[chosen].tolist()
    assert {r["name"] for r in rows} == {"'=1+1"}

    # A click on the field leads to the source, even if the filter had hidden it.
    box = page.locator("#field").bounding_box()
    x, y = found.params[2][1:3]
    page.locator("#field").click(
        position={
            "x": (x + 0.5) / 204 * box["width"],
            "y": (203.5 - y) / 204 * box["height"],
        }
    )
    page.wait_for_function("location.hash === '#source=2'")
    page.locator("tr.chosen").wait_for()
    assert page.locator("tr.chosen td").first.inner_text() == "2"

    page.goto("about:blank")
    page.goto(f"{path.as_uri()}#source=60")
    page.locator(".card.chosen").wait_for()
    assert page.locator(".card.chosen h3 a").inner_text() == "Source 60"
    # The thumbnail is drawn: the pixels of the data panel differ.
    page.wait_for_function(
        "new Set(document.querySelector('.card.chosen canvas').getContext('2d')"
        ".getImageData(0, 0, 128, 128).data).size > 20"
    )
    assert errors == []
    page.close()


def test_a_phone_needs_no_sideways_scroll(browser, result, tmp_path):
    path = catalog_report(result, tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 375, "height": 700})
    page.goto(path.as_uri())
    for view in ("cards", "sheet"):
        page.click(f"[data-view={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.close()
