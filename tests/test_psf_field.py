"""PSFs that change over an image: the field itself, and fits with it."""

import numpy as np
import pytest
from astropy.nddata import NDData
from numpy.testing import assert_allclose, assert_array_equal
from photutils.psf import GriddedPSFModel

from galmorph import (
    PSF,
    FitFlag,
    PointSource2D,
    PSFField,
    SersicGalaxy2D,
    deblend,
    deblend_bands,
    fit_images,
    forced_photometry,
    photometry,
)
from galmorph.detection import gaussian_psf

pytest.importorskip("torch")

SHAPE = (200, 420)
NOISE = 0.2


def changing(x, y):
    """FWHM from 2.5 to 4.5 pixels across the image."""
    return gaussian_psf(2.5 + 2 * x / (SHAPE[1] - 1), size=27)


# -- the field -------------------------------------------------------------------------------


def test_it_is_that_of_the_middle_of_the_cell():
    field = PSFField(changing, cell=10)
    # pixels -0.5 to 9.5 are the first cell
    assert field.at(-0.4, 3) is field.at(9.4, 3)
    assert field.at(9.4, 3) is not field.at(9.6, 3)
    assert field.at(5, 5) == changing(4.5, 4.5)
    assert field.at(205, 5) == changing(204.5, 4.5)
    assert field.at(5, 5) is field.at(5, 95)  # equal ones are one


def test_the_function_is_called_once_a_cell():
    calls = []

    def counted(x, y):
        calls.append((x, y))
        return gaussian_psf(3.0)

    field = PSFField(counted)
    for x in np.linspace(0, 63, 50):
        field.at(x, x)
    assert field.cell == 64
    assert calls == [(31.5, 31.5)]


def grid(values=None, oversampling=2, shape=(25, 25)):
    """Gaussians on a grid of 3 x 3, 200 x 90 pixels apart, and their positions."""
    xy = [(x, y) for y in (10, 100, 190) for x in (10, 210, 410)]
    v, u = ((np.arange(n) - (n - 1) / 2) / oversampling for n in shape)
    psfs = []
    for x, y in xy:
        sigma = 1.1 + 0.8 * x / 420 + 0.1 * y / 200
        psfs.append(np.exp(-0.5 * np.add.outer(v**2, u**2) / sigma**2))
        psfs[-1] /= psfs[-1].sum() / oversampling**2
    meta = {"grid_xypos": xy, "oversampling": oversampling}
    return GriddedPSFModel(NDData(np.array(psfs), meta=meta)), np.array(psfs), np.array(xy)


@pytest.mark.parametrize("shape", [(25, 25), (24, 30)])
def test_a_grid_is_as_photutils_has_it(shape):
    model, _, _ = grid(shape=shape)
    field = PSFField(model)
    assert field.cell == 90 / 4
    middle = field._cell_of(133), field._cell_of(71)
    psf = field.at(133, 71)
    assert (psf.shape, psf.oversampling, psf.includes_pixel) == (shape, 2, True)
    v, u = ((np.arange(n) - (n - 1) / 2) / 2 for n in shape)
    x, y = np.meshgrid(u + middle[0], v + middle[1])
    expected = model.evaluate(x, y, 1.0, *middle)
    assert_allclose(psf.data, expected / expected.sum(), atol=1e-9)


def test_axes_of_a_grid_that_are_sampled_differently():
    _, psfs, xy = grid()
    uneven = NDData(psfs[:, ::2], meta={"grid_xypos": xy, "oversampling": (1, 2)})
    field = PSFField(GriddedPSFModel(uneven), cell=21)
    psf = field.at(10, 10)  # the middle of a cell
    assert (psf.shape, psf.oversampling) == ((25, 25), 2)
    rows = psf.data[::2]
    assert_allclose(rows / rows.sum(), psfs[0, ::2] / psfs[0, ::2].sum(), atol=1e-9)


def test_a_grid_of_one_is_the_same_everywhere():
    _, psfs, _ = grid()
    one = NDData(psfs[:1], meta={"grid_xypos": [(0, 0)], "oversampling": 2})
    field = PSFField(GriddedPSFModel(one))
    assert field.at(0, 0) is field.at(1e4, -1e4)


def test_repr_says_what_it_is_of():
    assert repr(PSFField(changing, cell=32)) == "PSFField(changing, cell=32)"
    assert repr(PSFField(grid()[0])) == "PSFField(GriddedPSFModel, cell=22.5)"


@pytest.mark.parametrize("bad", [None, 3.0, np.ones((5, 5)), gaussian_psf(3.0), "psf.fits", PSF])
def test_what_is_no_field_is_refused(bad):
    with pytest.raises(TypeError, match="GriddedPSFModel or a function"):
        PSFField(bad)


@pytest.mark.parametrize("cell", [0, -3, np.nan, "8", [8]])
def test_cells_have_a_size(cell):
    with pytest.raises(ValueError, match="cell must be a positive number"):
        PSFField(changing, cell=cell)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((5, 5), np.nan), "NaN"),
        (np.zeros((5, 5)), "positive sum"),
        (np.ones(5), "two-dimensional"),
        (object(), "float"),
        (None, "None"),
    ],
)
def test_rubbish_of_the_function(value, message):
    field = PSFField(lambda x, y: value)
    with pytest.raises(ValueError, match=rf"no PSF at \(3.0, 4.0\).*{message}"):
        field.at(3, 4)


def test_positions_that_are_none():
    with pytest.raises(ValueError, match="no PSF at"):
        PSFField(changing).at(np.nan, 3)


# -- fits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def field():
    """Stars and galaxies, one row each, in an image whose PSF changes: parameters and pixels."""
    rng = np.random.default_rng(5)
    x = np.linspace(25, SHAPE[1] - 26, 12) + rng.uniform(-3, 3, (4, 12))
    y = np.array([28, 76, 124, 172])[:, None] + rng.uniform(-3, 3, (4, 12))
    x, y = x.ravel(), y.ravel()
    star = np.arange(48) < 24
    image = rng.normal(0, NOISE, SHAPE)
    for i in range(48):
        low = int(x[i]) - 22, int(y[i]) - 22
        psf = changing(x[i], y[i])
        at = {"flux": 400, "x_0": x[i] - low[0], "y_0": y[i] - low[1]}
        galaxy = SersicGalaxy2D(**at, r_eff=2.5, n=1, ellip=0.3, theta=i, psf=psf)
        drawn = PointSource2D(**at, psf=psf) if star[i] else galaxy
        there = slice(max(low[1], 0), low[1] + 45), slice(max(low[0], 0), low[0] + 45)
        stamp = drawn.render((45, 45))[there[0].start - low[1] :, there[1].start - low[0] :]
        part = image[there]
        part += stamp[: part.shape[0], : part.shape[1]]
    return image, np.column_stack([x, y]), star


def fitted(field, psf, **options):
    image, xy, star = field
    exponential = SersicGalaxy2D(n=1, fixed={"n": True})
    models = [PointSource2D() if s else exponential for s in star]
    return deblend(image, xy, model=models, psf=psf, uncertainty=NOISE, **options)


def errors(result, rows, column):
    """Of fluxes or sizes, in standard deviations."""
    truth = (400.0, 2.5)[column != 0]
    sizes = np.cumsum([0, *(len(p) for p in result.params)])
    sigma = np.sqrt(np.diagonal(result.cov))
    return np.array(
        [
            (result.params[k][column] - truth) / sigma[sizes[k] + column]
            for k in np.flatnonzero(rows)
        ]
    )


def test_fluxes_and_sizes_are_those_of_the_local_psf(field):
    star, x = field[2], field[1][:, 0]
    result = fitted(field, PSFField(changing, cell=8))
    assert not result.failed.any()
    for rows, column in ((star, 0), (~star, 0), (~star, 3)):
        pull = errors(result, rows, column)
        # 24 standard normal numbers
        assert abs(pull.mean()) < 3.5 / np.sqrt(len(pull))
        assert 0.55 < pull.std() < 1.55
    wrong = fitted(field, changing(SHAPE[1] / 2, 0))
    for rows, column in ((star, 0), (~star, 3)):
        pull = errors(wrong, rows, column)
        left = x[rows] < SHAPE[1] / 2
        # narrower than the PSF: too much flux, too small; and the reverse
        sign = 1 if column == 0 else -1
        assert sign * pull[left].mean() > 3
        assert sign * pull[~left].mean() < -3


def test_a_field_that_is_the_same_everywhere_is_a_psf(field):
    part = field[0][:100], field[1][:24], field[2][:24]
    psf = gaussian_psf(3.5)
    options = {"find_missed": 6, "missed_model": SersicGalaxy2D()}
    one, other = (fitted(part, p, **options) for p in (psf, lambda x, y: gaussian_psf(3.5)))
    assert len(one) == len(other)
    for a, b in zip(one.params, other.params, strict=True):
        assert_array_equal(a, b)
    assert_array_equal(one.cov, other.cov)
    assert_array_equal(one.flags, other.flags)


def test_a_grid_agrees_with_a_function(field):
    model, psfs, _ = grid()
    step = np.array([200, 90])

    def bilinear(x, y):
        s, t = np.clip((np.array([x, y]) - 10) / step, 0, 2)
        i, j = (min(int(v), 1) for v in (s, t))
        s, t = s - i, t - j
        at = 3 * j + i
        low, high = ((1 - s) * psfs[k] + s * psfs[k + 1] for k in (at, at + 3))
        return PSF((1 - t) * low + t * high, oversampling=2)

    part = field[0], field[1][::4], field[2][::4]
    one = fitted(part, model)
    other = fitted(part, PSFField(bilinear, cell=22.5))
    assert isinstance(one.psf, PSFField)
    for a, b in zip(one.params, other.params, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_psf_sources_are_flagged(field):
    def half(x, y):
        return changing(x, y) if x < 200 else np.full((9, 9), np.nan)

    result = fitted(field, PSFField(half, cell=8), find_missed=6, missed_model=SersicGalaxy2D())
    known = field[1][:, 0] < 200
    bad = (result.flags & int(FitFlag.BAD_PSF)) != 0
    assert_array_equal(bad[:48], ~known)
    assert result.failed[:48][~known].all()
    assert not result.failed[:48][known].any()
    assert np.isfinite(result.flux[:48][known]).all()
    assert np.isnan(result.flux[:48][~known]).all()
    assert (result.xy[48:, 0] < 200).all()  # no one is looked for where nothing can be fitted


def test_a_mistake_in_the_function_is_told(field):
    with pytest.raises(TypeError, match="argument"):
        fitted(field, lambda x: changing(x, 0))


def test_stars_are_told_from_galaxies_everywhere(field):
    image, rows = field[0][52:148], slice(12, 36)  # one row of each
    xy, star = field[1][rows] - [0, 52], field[2][rows]
    options = {"model": "sersic", "uncertainty": NOISE, "find_missed": None, "classes": False}
    found = photometry(image, xy, psf=PSFField(changing, cell=30), **options)
    probability = found.to_table()["star_probability"]
    assert (probability[star] > 0.5).all()
    assert (probability[~star] < 0.5).all()
    assert found.psf_statement == "given"


def test_stamps_of_an_image(field):
    image, xy, star = field
    rows = np.flatnonzero(star)[:12]
    where = {"positions": xy[rows], "size": 31, "uncertainty": NOISE}
    local = fit_images(image, PointSource2D(), psf=PSFField(changing, cell=8), **where)
    each = fit_images(
        np.stack(
            [image[y - 15 : y + 16, x - 15 : x + 16] for x, y in np.rint(xy[rows]).astype(int)]
        ),
        PointSource2D(),
        psf=[PSFField(changing, cell=8).at(*at) for at in xy[rows]],
        positions=xy[rows] - np.rint(xy[rows]).astype(int) + 15,
        uncertainty=NOISE,
        batch_size=1,
    )
    assert_allclose(local.params[:, 0], each.params[:, 0], rtol=1e-3)
    with pytest.raises(TypeError, match="positions"):
        fit_images(image, PointSource2D(), psf=changing, uncertainty=NOISE)


def test_forced_fluxes(field):
    image, star = field[0], field[2]
    result = fitted(field, PSFField(changing, cell=8))
    again = forced_photometry(result, image, psf=PSFField(changing, cell=8), uncertainty=NOISE)
    assert_allclose(again.flux, result.flux, atol=0.2 * result.flux_err.max())
    other = forced_photometry(result, image, psf=changing(SHAPE[1] / 2, 0), uncertainty=NOISE)
    assert np.abs((other.flux - result.flux) / result.flux_err)[star].max() > 5
    partly = PSFField(lambda x, y: changing(x, y) if x < 200 else None, cell=8)
    some = forced_photometry(result, image, psf=partly, uncertainty=NOISE)
    known = field[1][:, 0] < 200
    assert_array_equal((some.flags & int(FitFlag.BAD_PSF)) != 0, ~known)
    assert_allclose(some.flux[known], again.flux[known], rtol=0.05)


def test_joint_fits_of_bands_refuse_it(field):
    image, xy, _ = field
    with pytest.raises(TypeError, match="one PSF each"):
        deblend_bands(
            {"g": image, "r": image}, xy[:2], model=SersicGalaxy2D(), psf=changing, uncertainty=1.0
        )
