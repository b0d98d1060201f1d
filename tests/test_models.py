"""The galaxy models as astropy models: units, sets, copies, constraints, points anywhere."""

import copy
import pickle

import astropy.units as u
import numpy as np
import pytest
from astropy.modeling.models import Const2D, Gaussian2D, Moffat2D

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    PointSource2D,
    SersicGalaxy2D,
)

STAR = Moffat2D(1, 0, 0, 2.2, 3.0)
# how far two ways to draw the same pixel may differ, as a part of the peak
SAME = 1e-4

MODELS = {
    "gaussian": GaussianGalaxy2D(20, 10.3, 9.1, 3.0, 0.35, 0.6),
    "sersic": SersicGalaxy2D(20, 10.3, 9.1, 3.0, 2.3, 0.35, 0.6),
    "bulge and disk": BulgeDiskGalaxy2D(20, 10.3, 9.1, 0.3, 1.5, 3.0, 0.2, 0.3, 4.0, 0.5, 1.0),
    "point": PointSource2D(20, 10.3, 9.1),
}
EVERY = pytest.mark.parametrize("name", MODELS)
GALAXIES = pytest.mark.parametrize("name", [n for n in MODELS if n != "point"])


def make(name, psf=STAR):
    model = MODELS[name].copy()
    model.psf = psf
    return model


@pytest.fixture
def grid():
    y, x = np.mgrid[:19, :21]
    return x, y


# -- parameters ------------------------------------------------------------------------------------


@EVERY
def test_first_parameters_are_those_photutils_looks_for(name):
    assert MODELS[name].param_names[:3] == ("flux", "x_0", "y_0")


@EVERY
def test_models_are_made_without_arguments(name):
    model = type(MODELS[name])()
    assert model.flux.value == 1
    assert model.psf is None


@pytest.mark.parametrize(
    ("covariance", "r_eff", "ellip", "theta"),
    [
        ([[4, 0], [0, 1]], 2, 0.5, 0),
        ([[1, 0], [0, 4]], 2, 0.5, np.pi / 2),
        ([[2.5, 1.5], [1.5, 2.5]], 2, 0.5, np.pi / 4),
        ([[2.5, -1.5], [-1.5, 2.5]], 2, 0.5, -np.pi / 4),
        ([[3, 0], [0, 3]], np.sqrt(3), 0, None),
    ],
)
def test_gaussian_from_covariance(covariance, r_eff, ellip, theta):
    model = GaussianGalaxy2D.from_covariance(7, 1, 2, covariance, psf=STAR)
    assert model.r_eff.value == pytest.approx(np.sqrt(2 * np.log(2)) * r_eff)
    assert model.ellip.value == pytest.approx(ellip, abs=1e-12)
    if theta is not None:
        assert np.cos(2 * (model.theta.value - theta)) == pytest.approx(1)
    np.testing.assert_allclose(model.covariance, covariance, atol=1e-12)
    assert model.psf is not None
    # second moments of the image are the covariance and the pixel's own 1/12
    free = GaussianGalaxy2D.from_covariance(1, 30, 30, covariance)
    image = free.render((61, 61))
    y, x = np.mgrid[:61, :61] - 30
    moments = [np.sum(image * a) for a in (x * x, x * y, y * y)]
    expected = np.array(covariance) + np.eye(2) / 12
    np.testing.assert_allclose(
        moments, [expected[0, 0], expected[0, 1], expected[1, 1]], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "bad", [[[1, 2], [2, 1]], [[1, 0.5], [0, 1]], [[0, 0], [0, 0]], np.eye(3), [1, 2], np.nan]
)
def test_what_is_no_covariance(bad):
    with pytest.raises(ValueError, match="covariance must be"):
        GaussianGalaxy2D.from_covariance(1, 0, 0, bad)


def test_gaussian_is_a_sersic_of_half():
    gaussian, sersic = make("gaussian"), make("sersic")
    sersic.n = 0.5
    expected = gaussian.render((25, 25))
    assert np.abs(sersic.render((25, 25)) - expected).max() < 1e-5 * expected.max()


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5, 4.0])
def test_half_of_the_light_is_within_the_half_light_ellipse(n):
    r_eff, ellip, theta = 40.0, 0.4, 0.5
    y, x = np.mgrid[-50:51, -50:51]
    image = SersicGalaxy2D(1, 0, 0, r_eff, n, ellip, theta)(x, y)
    along, across = (
        np.cos(theta) * x + np.sin(theta) * y,
        -np.sin(theta) * x + np.cos(theta) * y,
    )
    inside = np.hypot(along, across / (1 - ellip)) <= r_eff
    assert image[inside].sum() == pytest.approx(0.5, abs=1e-3)


def test_theta_turns_counter_clockwise_from_x():
    image = SersicGalaxy2D(1, 30, 30, 6, 0.5, 0.7, np.pi / 6).render((61, 61))
    y, x = np.mgrid[:61, :61] - 30
    xx, xy, yy = (np.sum(image * a) for a in (x * x, x * y, y * y))
    assert 0.5 * np.arctan2(2 * xy, xx - yy) == pytest.approx(np.pi / 6, abs=1e-3)


# -- units -----------------------------------------------------------------------------------------


@EVERY
def test_units(name, grid):
    plain = make(name)
    x, y = grid
    values = {}
    for parameter in plain.param_names:
        value = getattr(plain, parameter).value
        unit = u.dimensionless_unscaled
        if parameter == "flux":
            unit = u.nJy
        elif parameter in ("x_0", "y_0") or parameter.startswith("r_"):
            unit = u.pix
        elif parameter.startswith("theta"):
            value, unit = np.degrees(value), u.deg
        values[parameter] = value if unit == u.dimensionless_unscaled else value * unit
    model = type(plain)(**values, psf=STAR)
    image = model(x * u.pix, y * u.pix)
    assert image.unit == u.nJy
    np.testing.assert_allclose(image.value, plain(x, y), rtol=1e-10)
    np.testing.assert_allclose(model.render((19, 21)), plain(x, y), rtol=1e-10)
    stripped = model.without_units_for_data(x=x * u.pix, y=y * u.pix, z=image)
    np.testing.assert_allclose(stripped.parameters, plain.parameters, rtol=1e-12)
    again = plain.with_units_from_data(x=x * u.pix, y=y * u.pix, z=image)
    assert again.flux.unit == u.nJy
    np.testing.assert_allclose(again(x * u.pix, y * u.pix).value, image.value, rtol=1e-10)


def test_wrong_units(grid):
    x, y = grid
    model = SersicGalaxy2D(1 * u.Jy, 10 * u.pix, 9 * u.pix, 3 * u.pix, 1, 0.1, 0 * u.rad)
    with pytest.raises(u.UnitsError):
        model(x * u.s, y * u.s)


# -- model sets --------------------------------------------------------------------------------


def set_of_three(name, psf=STAR):
    single = MODELS[name]
    columns = [np.full(3, value) for value in single.parameters]
    columns[0] = np.array([1.0, 20.0, 300.0])
    columns[1] = np.array([9.0, 10.5, 11.2])
    if len(columns) > 3:
        columns[3] = columns[3] * np.array([0.8, 1.0, 1.2])
    singles = [type(single)(*row, psf=psf) for row in np.transpose(columns)]
    return type(single)(*columns, n_models=3, psf=psf), singles


@EVERY
def test_model_set_at_the_same_points(name, grid):
    models, singles = set_of_three(name)
    x, y = grid
    images = models(x, y, model_set_axis=False)
    assert images.shape == (3, 19, 21)
    for image, single in zip(images, singles, strict=True):
        np.testing.assert_allclose(image, single(x, y), atol=SAME * image.max())
    np.testing.assert_allclose(models.render((19, 21)), images, atol=SAME * images.max())


@EVERY
def test_model_set_with_points_each(name, grid):
    models, singles = set_of_three(name)
    x, y = (np.stack([a, a + 1, a + 2]) for a in grid)
    images = models(x, y)
    assert images.shape == (3, 19, 21)
    for i, single in enumerate(singles):
        np.testing.assert_allclose(images[i], single(x[i], y[i]), atol=SAME * images[i].max())


@GALAXIES
def test_model_set_without_psf(name, grid):
    models, singles = set_of_three(name, None)
    x, y = grid
    images = models(x, y, model_set_axis=False)
    for image, single in zip(images, singles, strict=True):
        np.testing.assert_allclose(image, single(x, y), atol=1e-6 * image.max())


def test_model_set_along_another_axis(grid):
    x, y = grid
    flux = np.array([[1.0, 2.0, 3.0]])
    models = GaussianGalaxy2D(
        flux,
        *(np.full((1, 3), v) for v in (10.0, 9.0, 3.0, 0.2, 0.4)),
        n_models=3,
        model_set_axis=1,
        psf=STAR,
    )
    images = models(x, y, model_set_axis=False)
    single = GaussianGalaxy2D(1, 10, 9, 3, 0.2, 0.4, psf=STAR)(x, y)
    assert images.size == 3 * single.size
    stack = np.moveaxis(images, 1, 0).reshape(3, -1)
    np.testing.assert_allclose(stack, np.outer([1, 2, 3], single.ravel()), rtol=1e-9)


# -- points ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("psf", [STAR, None], ids=["PSF", "no PSF"])
def test_points_in_any_order(name, psf, grid, rng):
    if name == "point" and psf is None:
        pytest.skip("a point has no image")
    model = make(name, psf)
    x, y = grid
    expected = model(x, y)
    limit = SAME * expected.max()
    some = rng.permutation(x.size)[:40]
    scattered = model(x.ravel()[some], y.ravel()[some])
    assert np.abs(scattered - expected.ravel()[some]).max() < limit
    by_columns = model(x.T, y.T)
    assert np.abs(by_columns - expected.T).max() < limit
    one = model(10.0, 9.0)
    assert np.ndim(one) == 0
    assert abs(one - expected[9, 10]) < limit
    assert model(np.array([]), np.array([])).shape == (0,)
    far = model(np.array([10, 1000000.0]), np.array([9, -3000000.0]))
    assert far == pytest.approx([expected[9, 10], 0], abs=limit)


@EVERY
@pytest.mark.parametrize("psf", [STAR, None], ids=["PSF", "no PSF"])
def test_points_between_pixels(name, psf, rng):
    """A point at (x, y) shows what the pixel shows of a galaxy that is moved by as much."""
    if name == "point" and psf is None:
        pytest.skip("a point has no image")
    model = make(name, psf)
    x, y = rng.uniform(2, 17, (2, 12))
    peak = model(10.0, 9.0)
    values = model(x, y)
    for value, px, py in zip(values, x, y, strict=True):
        moved = model.copy()
        moved.x_0, moved.y_0 = model.x_0.value + 8 - px, model.y_0.value + 8 - py
        assert value == pytest.approx(moved.render((17, 17))[8, 8], abs=SAME * peak)


def test_half_pixel_grid(grid):
    """A grid that is shifted as a whole is still a grid."""
    x, y = grid
    model = make("sersic")
    moved = model.copy()
    moved.x_0, moved.y_0 = model.x_0.value + 0.5, model.y_0.value - 0.25
    np.testing.assert_allclose(moved(x + 0.5, y - 0.25), model(x, y), atol=1e-6)


@EVERY
def test_fit_deriv_at_scattered_points(name, grid, rng):
    model = make(name)
    x, y = grid
    full = model.fit_deriv(x, y, *model.parameters)
    some = rng.permutation(x.size)[:30]
    few = model.fit_deriv(x.ravel()[some], y.ravel()[some], *model.parameters)
    for a, b in zip(full, few, strict=True):
        np.testing.assert_allclose(b, a.ravel()[some], atol=1e-4 * np.abs(a).max())


# -- compounds, copies ---------------------------------------------------------------------------


def test_compound(grid):
    x, y = grid
    a, b = make("sersic"), make("point")
    scene = a + b + Const2D(3.0)
    np.testing.assert_allclose(scene(x, y), a(x, y) + b(x, y) + 3, rtol=1e-12)
    assert scene.flux_0.value == scene.flux_1.value == 20
    np.testing.assert_allclose((2 * a(x, y)), (a + a)(x, y), rtol=1e-12)


@EVERY
@pytest.mark.parametrize(
    "duplicate",
    [
        lambda m: m.copy(),
        lambda m: m.deepcopy(),
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["copy()", "deepcopy()", "deepcopy", "copy", "pickle"],
)
def test_copies(name, duplicate, grid):
    model = make(name)
    model.x_0.fixed = True
    model.flux.bounds = (0, 50)
    other = duplicate(model)
    assert type(other) is type(model)
    assert other.psf == model.psf
    assert other.x_0.fixed
    assert other.flux.bounds == (0, 50)
    np.testing.assert_array_equal(other(*grid), model(*grid))


@EVERY
def test_copies_are_their_own(name):
    model = make(name)
    other = model.copy()
    other.flux = 1.0
    other.psf = np.ones((3, 3))
    other.x_0.fixed = True
    assert model.flux.value == 20
    assert model.psf.shape != (3, 3)
    assert not model.x_0.fixed


def test_pickles_of_compounds(grid):
    scene = make("sersic") + Const2D(1.0)
    again = pickle.loads(pickle.dumps(scene))
    np.testing.assert_array_equal(again(*grid), scene(*grid))


def test_constraints_of_one_instance_are_not_those_of_another():
    one = SersicGalaxy2D(n=4, fixed={"n": True}, bounds={"r_eff": (1, 5)})
    other = SersicGalaxy2D()
    assert one.n.fixed
    assert not other.n.fixed
    assert one.r_eff.bounds == (1, 5)
    assert other.r_eff.bounds != (1, 5)


def test_tied():
    model = SersicGalaxy2D(tied={"y_0": lambda m: 2 * m.x_0})
    assert model.has_tied
    assert model.tied["y_0"] is not False


# -- the PSF of a model ---------------------------------------------------------------------------


def test_psf_is_set_and_removed(grid):
    model = SersicGalaxy2D(20, 10.3, 9.1, 3.0, 2.3, 0.35, 0.6)
    bare = model(*grid)
    model.psf = Gaussian2D(1, 0, 0, 1.5, 1.5)
    assert isinstance(model.psf, PSF)
    blurred = model(*grid)
    assert blurred.max() < bare.max()
    model.psf = None
    np.testing.assert_array_equal(model(*grid), bare)


def test_psf_of_render_takes_the_place_of_the_models_own(grid):
    model = make("sersic")
    sharp = np.zeros((5, 5))
    sharp[2, 2] = 1
    own = model.render((19, 21))
    other = model.render((19, 21), psf=sharp)
    assert np.abs(own - other).max() > 0.05 * own.max()
    model.psf = sharp
    np.testing.assert_allclose(model.render((19, 21)), other, atol=1e-12)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((3, 3)), "positive sum"),
        (np.full((3, 3), np.nan), "NaN"),
        (np.ones((0, 3)), "empty"),
        (np.ones(3), "two-dimensional"),
    ],
)
def test_bad_psf(bad, message):
    with pytest.raises(ValueError, match=message):
        SersicGalaxy2D(psf=bad)
    model = make("sersic")
    with pytest.raises(ValueError, match=message):
        model.psf = bad
    assert model.psf is not None  # as it was


def test_point_without_psf_says_what_is_missing(grid):
    with pytest.raises(ValueError, match="give psf="):
        PointSource2D(1, 3, 3)(*grid)
    with pytest.raises(ValueError, match="give psf="):
        PointSource2D(1, 3, 3).render((5, 5))


@pytest.mark.parametrize("shape", [(0, 5), (5,), 5, (5, 5, 5), (-3, 4), (4.5, 4)])
def test_bad_shapes_to_render(shape):
    with pytest.raises((ValueError, TypeError), match="shape"):
        make("sersic").render(shape)


def test_bad_params_to_render():
    with pytest.raises(ValueError, match=r"7|param"):
        make("sersic").render((5, 5), params=np.ones((2, 5)))
    with pytest.raises(ValueError, match="PSF"):
        make("sersic").render((5, 5), params=np.ones((2, 7)), psf=[STAR])
