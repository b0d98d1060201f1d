"""fit_images with MAPFitter: truth is recovered, remarks are made, nothing else matters."""

import numpy as np
import pytest
from astropy.modeling.models import Moffat2D

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    FitFlag,
    GaussianGalaxy2D,
    LogNormal,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    decode_flags,
    fit_images,
)

STAR = PSF.from_any(Moffat2D(1, 0, 0, 2.2, 3.0))
SHAPE = (45, 49)
CENTRE = (24.3, 21.8)

TRUTH = {
    "gaussian": GaussianGalaxy2D(500, *CENTRE, 3.5, 0.35, 0.6),
    "sersic": SersicGalaxy2D(500, *CENTRE, 3.5, 1.7, 0.35, 0.6),
    "flat sersic": SersicGalaxy2D(500, *CENTRE, 5.0, 0.6, 0.2, -1.1),
    "steep sersic": SersicGalaxy2D(500, *CENTRE, 5.0, 4.5, 0.5, 1.4),
    "bulge and disk": BulgeDiskGalaxy2D(500, *CENTRE, 0.4, 1.5, 3.0, 0.1, 0.3, 6.0, 0.5, 1.0),
    "point": PointSource2D(500, *CENTRE),
}
EXACT = MAPFitter(priors={}, dtype="float64", max_iter=200)


def fresh(name):
    """A model of the same class that knows nothing of the truth."""
    return type(TRUTH[name])()


def image_of(name, psf=STAR):
    model = TRUTH[name].copy()
    model.psf = psf
    return model.render(SHAPE)


def slope():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return 0.02 * (x - 24.0), -0.03 * (y - 22.0)


def assert_recovered(result, name, *, rtol=1e-3, galaxy=0):
    truth = TRUTH[name].parameters
    for value, parameter, true in zip(
        result.params[galaxy], result.param_names, truth, strict=True
    ):
        if parameter.startswith("theta"):
            assert np.cos(2 * (value - true)) == pytest.approx(1, abs=1e-4), parameter
        else:
            assert value == pytest.approx(true, rel=rtol, abs=rtol), parameter


def has(result, flag):
    return (result.flags & flag) != 0


def noisy(name, count, sigma, seed=1, psf=STAR):
    rng = np.random.default_rng(seed)
    return image_of(name, psf) + rng.normal(0, sigma, (count, *SHAPE))


# -- recovery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRUTH)
def test_recovery(name):
    result = fit_images(image_of(name), fresh(name), EXACT, uncertainty=0.01, psf=STAR)
    assert_recovered(result, name)
    assert result.flags[0] == 0, decode_flags(result.flags[0])
    assert result.chi2[0] < 1


@pytest.mark.parametrize("name", ["gaussian", "sersic", "steep sersic"])
def test_recovery_without_psf(name):
    result = fit_images(image_of(name, None), fresh(name), EXACT, uncertainty=0.01)
    assert_recovered(result, name)
    assert result.flags[0] == 0, decode_flags(result.flags[0])


@pytest.mark.parametrize("kind", ["odd", "even", "oversampled", "pixel-free", "a model"])
def test_recovery_with_any_psf(kind):
    at = {"odd": np.arange(-12, 13), "even": np.arange(-12, 13)[:-1] + 0.5}.get(
        kind, np.arange(-36, 37) / 3
    )
    samples = np.exp(-0.5 * (at[:, None] ** 2 + at**2) / 1.4**2)
    psf = {
        "odd": samples,
        "even": samples,
        "oversampled": PSF(samples, oversampling=3),
        "pixel-free": PSF(samples, oversampling=3, includes_pixel=False),
        "a model": Moffat2D(1, 0, 0, 2.2, 3.0),
    }[kind]
    image = image_of("sersic", psf)
    assert_recovered(
        fit_images(image, SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=psf), "sersic"
    )
    assert_recovered(fit_images(image, SersicGalaxy2D(psf=psf), EXACT, uncertainty=0.01), "sersic")


def test_single_precision_is_precise_enough():
    result = fit_images(image_of("sersic"), SersicGalaxy2D(), uncertainty=0.1, psf=STAR)
    error = np.abs(result.params[0] - TRUTH["sersic"].parameters) / result.stds[0]
    assert error.max() < 0.1


@pytest.mark.parametrize("name", ["sersic", "point", "gaussian"])
def test_constant_background(name):
    result = fit_images(
        image_of(name) + 7.5,
        fresh(name),
        EXACT,
        uncertainty=0.01,
        psf=STAR,
        background="constant",
    )
    assert_recovered(result, name, rtol=2e-3)
    assert result.background[0] == pytest.approx([7.5], abs=1e-3)
    assert result.background_cov.shape == (1, 1, 1)


def test_tilted_background():
    by_x, by_y = slope()
    result = fit_images(
        image_of("sersic") + 3 + by_x + by_y,
        SersicGalaxy2D(),
        EXACT,
        uncertainty=0.01,
        psf=STAR,
        background="tilted",
    )
    assert_recovered(result, "sersic", rtol=2e-3)
    assert result.background[0] == pytest.approx([3, 0.02, -0.03], abs=1e-4)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_huge_background(level):
    """Counts with the sky in them: ten thousand times the noise."""
    data = noisy("sersic", 3, 1.0)
    flat = fit_images(data, SersicGalaxy2D(), uncertainty=1.0, psf=STAR, background="constant")
    high = fit_images(
        data + level, SersicGalaxy2D(), uncertainty=1.0, psf=STAR, background="constant"
    )
    np.testing.assert_allclose(high.background - level, flat.background, atol=2e-2)
    shift = np.abs(high.params - flat.params) / flat.stds
    assert shift.max() < 0.1
    np.testing.assert_allclose(high.stds, flat.stds, rtol=0.02)


def test_mask():
    """Bad pixels and a whole corner: what is masked may hold anything."""
    rng = np.random.default_rng(3)
    image = image_of("sersic")
    mask = rng.random(SHAPE) < 0.1
    mask[:15, :20] = True
    image[mask] = rng.normal(0, 1e4, mask.sum())
    image[5, 5] = np.nan
    result = fit_images(image, SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=STAR, mask=mask)
    assert_recovered(result, "sersic")
    assert result.dof[0] == (~mask).sum() - 7


def test_masked_neighbour():
    neighbour = SersicGalaxy2D(5000, 40, 35, 2, 1, 0.2, 0, psf=STAR).render(SHAPE)
    mask = neighbour > 1e-3
    result = fit_images(
        image_of("sersic") + neighbour,
        SersicGalaxy2D(),
        MAPFitter(priors={}, dtype="float64"),
        uncertainty=0.05,
        psf=STAR,
        mask=mask,
    )
    assert_recovered(result, "sersic", rtol=0.02)


def test_neighbour_does_not_steal_the_fit():
    """Unmasked and as bright, 19 pixels off: the galaxy in the middle is fitted."""
    neighbour = SersicGalaxy2D(500, 41, 31, 1.5, 1, 0.2, 0, psf=STAR).render(SHAPE)
    data = image_of("sersic") + neighbour + np.random.default_rng(1).normal(0, 0.2, SHAPE)
    for positions in (None, [CENTRE]):
        result = fit_images(
            data[None], SersicGalaxy2D(), uncertainty=0.2, psf=STAR, positions=positions
        )
        assert np.hypot(*(result.params[0, 1:3] - CENTRE)) < 2


def test_masked_middle():
    """No pixel within two of the centre: fitted by what is around, and said."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    mask = np.hypot(x - CENTRE[0], y - CENTRE[1]) < 2
    result = fit_images(
        image_of("sersic"), SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=STAR, mask=mask
    )
    assert_recovered(result, "sersic", rtol=5e-3)
    assert has(result, FitFlag.BAD_CENTER)[0]


@pytest.mark.parametrize("radius", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("q", [1.0, 0.15])
def test_round_thin_small_and_large(radius, q):
    truth = SersicGalaxy2D(500, *CENTRE, radius, 1.2, 1 - q, 0.7, psf=STAR)
    result = fit_images(truth.render(SHAPE), SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=STAR)
    expected = truth.parameters
    assert result.params[0, :5] == pytest.approx(expected[:5], rel=1e-2)
    assert result.params[0, 5] == pytest.approx(1 - q, abs=0.01)


def test_own_psf_each():
    psfs = [PSF.from_any(Moffat2D(1, 0, 0, g, 3.0)) for g in (1.6, 2.2, 3.2)]
    images = np.stack([image_of("sersic", psf) for psf in psfs])
    result = fit_images(images, SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=psfs)
    for i in range(3):
        assert_recovered(result, "sersic", galaxy=i)
    # odd and even, native and oversampled together
    at = np.arange(-12, 13)
    kinds = [
        np.exp(-0.5 * (at[:, None] ** 2 + at**2) / 1.5**2),
        np.exp(-0.5 * ((at[1:, None] - 0.5) ** 2 + (at[1:] - 0.5) ** 2) / 1.5**2),
        psfs[1],
    ]
    images = np.stack([image_of("sersic", psf) for psf in kinds])
    result = fit_images(images, SersicGalaxy2D(), EXACT, uncertainty=0.01, psf=kinds)
    for i in range(3):
        assert_recovered(result, "sersic", galaxy=i)


@pytest.mark.parametrize("centre", [(10.2, 8.4), (38.6, 36.1)])
def test_off_centre_galaxies(centre):
    """Anywhere on the stamp, found without a hint or with a rough one."""
    truth = SersicGalaxy2D(500, *centre, 3, 1, 0.3, 0.2, psf=STAR)
    rng = np.random.default_rng(0)
    data = truth.render(SHAPE) + rng.normal(0, 0.3, SHAPE)
    hint = [(centre[0] + 1.5, centre[1] - 1.5)]
    for positions in (None, hint):
        result = fit_images(
            data[None], SersicGalaxy2D(), uncertainty=0.3, psf=STAR, positions=positions
        )
        assert np.abs(result.params[0, 1:3] - centre).max() < 0.3


def test_weights_count():
    """Where the uncertainty says so, pixels are ignored: half of the stamp is wrong."""
    image = image_of("sersic")
    sigma = np.full(SHAPE, 0.01)
    image[:, 30:] += 50
    sigma[:, 30:] = 1e6
    result = fit_images(image, SersicGalaxy2D(), EXACT, uncertainty=sigma, psf=STAR)
    assert_recovered(result, "sersic", rtol=5e-3)


# -- what must not matter -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    """Galaxies of all kinds, bright and faint, and their fits together."""
    rng = np.random.default_rng(8)
    count = 24
    params = np.column_stack(
        [
            np.full(count, 500.0),
            rng.uniform(22, 26, count),
            rng.uniform(20, 24, count),
            rng.uniform(2, 6, count),
            rng.uniform(0.5, 5, count),
            rng.uniform(0, 0.8, count),
            rng.uniform(-1.5, 1.5, count),
        ]
    )
    clean = SersicGalaxy2D().render(SHAPE, params=params, psf=STAR)
    sigma = np.sqrt((clean**2).sum((1, 2)) / rng.uniform(8, 150, count) ** 2)
    sigma = np.broadcast_to(sigma[:, None, None], clean.shape).copy()
    data = clean + sigma * rng.standard_normal(clean.shape)
    return data, sigma, fit_images(data, SersicGalaxy2D(), uncertainty=sigma, psf=STAR)


def assert_same_fits(result, expected, limit=0.02):
    """To a small part of the uncertainty."""
    shift = np.abs(result.params - expected.params)
    shift[:, 6] = np.abs((shift[:, 6] + np.pi / 2) % np.pi - np.pi / 2)
    assert (shift / expected.stds).max() < limit
    np.testing.assert_allclose(result.chi2, expected.chi2, rtol=1e-3)
    np.testing.assert_allclose(result.stds, expected.stds, rtol=0.03)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_size_of_batches(mixed, batch_size):
    data, sigma, expected = mixed
    result = fit_images(data, SersicGalaxy2D(), uncertainty=sigma, psf=STAR, batch_size=batch_size)
    assert_same_fits(result, expected)
    np.testing.assert_array_equal(result.flags, expected.flags)


def test_window_of_the_fitter(mixed):
    data, sigma, expected = mixed
    result = fit_images(
        data, SersicGalaxy2D(), MAPFitter(batch_size=5), uncertainty=sigma, psf=STAR
    )
    assert_same_fits(result, expected)


def test_company_in_the_batch(mixed):
    """In another order, and beside stamps of noise, NaN and a neighbour's image."""
    data, sigma, expected = mixed
    rng = np.random.default_rng(5)
    order = rng.permutation(len(data))
    bad = np.stack([np.full(SHAPE, np.nan), rng.normal(0, 1, SHAPE), 1e8 * data[0]])
    result = fit_images(
        np.concatenate([bad, data[order]]),
        SersicGalaxy2D(),
        uncertainty=np.concatenate([np.ones_like(bad), sigma[order]]),
        psf=STAR,
    )
    assert_same_fits(result[3:], expected[order])


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_unit_of_the_data(mixed, unit):
    data, sigma, expected = mixed
    result = fit_images(data * unit, SersicGalaxy2D(), uncertainty=sigma * unit, psf=STAR)
    scaled = result.params.copy()
    scaled[:, 0] /= unit
    np.testing.assert_allclose(scaled, expected.params, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.stds[:, 0] / unit, expected.stds[:, 0], rtol=0.02)
    np.testing.assert_array_equal(result.flags, expected.flags)


@pytest.mark.parametrize("background", ["constant", "tilted"])
@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_unit_of_the_background(mixed, background, unit):
    data, sigma, _ = mixed
    options = dict(psf=STAR, background=background)
    one = fit_images(data[:6], SersicGalaxy2D(), uncertainty=sigma[:6], **options)
    other = fit_images(data[:6] * unit, SersicGalaxy2D(), uncertainty=sigma[:6] * unit, **options)
    error = np.sqrt(np.diagonal(one.background_cov, axis1=1, axis2=2))
    np.testing.assert_array_less(np.abs(other.background / unit - one.background), 0.05 * error)
    np.testing.assert_allclose(other.background_cov / unit**2, one.background_cov, rtol=0.05)


def test_both_precisions(mixed):
    data, sigma, expected = mixed
    result = fit_images(
        data, SersicGalaxy2D(), MAPFitter(dtype="float64"), uncertainty=sigma, psf=STAR
    )
    assert_same_fits(result, expected, limit=0.05)


def test_rows_and_columns(mixed):
    """Images with x and y exchanged give galaxies with x and y exchanged."""
    data, sigma, expected = mixed
    result = fit_images(
        data.transpose(0, 2, 1),
        SersicGalaxy2D(),
        uncertainty=sigma.transpose(0, 2, 1),
        psf=STAR,
    )
    params = result.params[:, [0, 2, 1, 3, 4, 5, 6]]
    shift = np.abs(params - expected.params)[:, :6] / expected.stds[:, :6]
    assert shift.max() < 0.1
    turned = np.pi / 2 - params[:, 6] - expected.params[:, 6]
    turned = np.abs((turned + np.pi / 2) % np.pi - np.pi / 2)
    assert (turned / expected.stds[:, 6]).max() < 0.1


def test_same_call_same_answer(mixed):
    data, sigma, expected = mixed
    result = fit_images(data, SersicGalaxy2D(), uncertainty=sigma, psf=STAR)
    np.testing.assert_array_equal(result.params, expected.params)


def test_values_of_the_model_are_no_hint(mixed):
    """fit_images starts from the image: the model says only what is free."""
    data, sigma, expected = mixed
    far = SersicGalaxy2D(1e9, -50, 900, 40, 8, 0.9, 3)
    result = fit_images(data, far, uncertainty=sigma, psf=STAR)
    np.testing.assert_allclose(result.params, expected.params, rtol=1e-6)


# -- constraints and priors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fixed",
    [
        {"n": 1.7},
        {"x_0": CENTRE[0], "y_0": CENTRE[1]},
        {"ellip": 0.35, "theta": 0.6},
        {"r_eff": 3.5},
        {"flux": 500.0},
        {"theta": 0.6},
    ],
    ids=str,
)
def test_fixed(fixed):
    model = SersicGalaxy2D(**fixed, fixed=dict.fromkeys(fixed, True))
    result = fit_images(image_of("sersic"), model, EXACT, uncertainty=0.01, psf=STAR)
    assert_recovered(result, "sersic")
    for name, value in fixed.items():
        i = result.param_names.index(name)
        assert result.params[0, i] == value
        assert result.stds[0, i] == 0
    free = [i for i, name in enumerate(result.param_names) if name not in fixed]
    assert (result.stds[0, free] > 0).all()
    assert result.dof[0] == image_of("sersic").size - len(free)


def test_fixed_at_a_wrong_value():
    model = SersicGalaxy2D(n=4, fixed={"n": True})
    result = fit_images(noisy("sersic", 1, 0.1), model, uncertainty=0.1, psf=STAR)
    assert result.params[0, 4] == 4
    assert has(result, FitFlag.POOR_FIT)[0]


def test_knowing_more_is_knowing_better():
    data = noisy("sersic", 4, 0.1)
    free = fit_images(data, SersicGalaxy2D(), EXACT, uncertainty=0.1, psf=STAR)
    model = SersicGalaxy2D(n=1.7, fixed={"n": True})
    fixed = fit_images(data, model, EXACT, uncertainty=0.1, psf=STAR)
    assert (fixed.stds[:, 0] < 0.9 * free.stds[:, 0]).all()
    pull = (fixed.params[:, 0] - 500) / fixed.stds[:, 0]
    assert np.abs(pull).max() < 4


@pytest.mark.parametrize("name", ["n", "r_eff", "ellip", "flux", "x_0"])
def test_bounds(name):
    """The truth is outside: the fit ends at the bound, and says so."""
    i = SersicGalaxy2D.param_names.index(name)
    true = TRUTH["sersic"].parameters[i]
    low, high = (0.3 * true, 0.95 * true) if name != "x_0" else (20.0, 24.0)
    model = SersicGalaxy2D(bounds={name: (low, high)})
    result = fit_images(image_of("sersic"), model, EXACT, uncertainty=0.1, psf=STAR)
    assert result.params[0, i] == pytest.approx(high, rel=1e-6)
    assert has(result, FitFlag.AT_BOUND)[0]
    wide = SersicGalaxy2D(bounds={name: (low, 2 * true)})
    result = fit_images(image_of("sersic"), wide, EXACT, uncertainty=0.01, psf=STAR)
    assert_recovered(result, "sersic")
    assert not has(result, FitFlag.AT_BOUND)[0]


def test_bounds_of_the_angle():
    model = SersicGalaxy2D(theta=0.5, bounds={"theta": (0, np.pi)})
    truth = SersicGalaxy2D(500, *CENTRE, 3.5, 1.7, 0.35, 2.5, psf=STAR)
    result = fit_images(truth.render(SHAPE), model, EXACT, uncertainty=0.01, psf=STAR)
    angle = result.params[0, 6]
    assert np.cos(2 * (angle - 2.5)) == pytest.approx(1, abs=1e-6)
    assert 0 <= angle <= np.pi


def test_tied():
    model = BulgeDiskGalaxy2D(
        n_bulge=3, fixed={"n_bulge": True}, tied={"theta_bulge": lambda m: m.theta_disk}
    )
    truth = BulgeDiskGalaxy2D(500, *CENTRE, 0.4, 1.5, 3.0, 0.3, 1.0, 6.0, 0.5, 1.0, psf=STAR)
    result = fit_images(truth.render(SHAPE), model, EXACT, uncertainty=0.01, psf=STAR)
    names = result.param_names
    bulge, disk = (result.params[0, names.index(f"theta_{part}")] for part in ("bulge", "disk"))
    assert bulge == pytest.approx(disk, abs=1e-12)
    np.testing.assert_allclose(result.params[0], truth.parameters, rtol=5e-3)
    bulge, disk = (result.stds[0, names.index(f"theta_{part}")] for part in ("bulge", "disk"))
    assert bulge == pytest.approx(disk, rel=1e-4)  # carried through the tie
    assert disk > 0


def test_tied_radius():
    model = SersicGalaxy2D(tied={"r_eff": lambda m: 2.5 + 0.0 * m.n + 0.4 * (m.n - 0.0)})
    truth = SersicGalaxy2D(500, *CENTRE, 3.18, 1.7, 0.35, 0.6, psf=STAR)
    result = fit_images(truth.render(SHAPE), model, EXACT, uncertainty=0.01, psf=STAR)
    np.testing.assert_allclose(result.params[0], truth.parameters, rtol=2e-3)


def test_prior_pulls_by_its_weight():
    """One datum more: the mode is between likelihood and prior, by their precisions."""
    data = noisy("sersic", 5, 0.2, seed=3)
    free = fit_images(data, SersicGalaxy2D(), MAPFitter(priors={}), uncertainty=0.2, psf=STAR)
    width = float(free.stds[:, 3].mean())
    prior = Normal(3.5 - width, width)
    with_prior = fit_images(
        data, SersicGalaxy2D(), MAPFitter(priors={"r_eff": prior}), uncertainty=0.2, psf=STAR
    )
    precision = 1 / free.stds[:, 3] ** 2 + 1 / prior.std**2
    mode = (free.params[:, 3] / free.stds[:, 3] ** 2 + prior.mean / prior.std**2) / precision
    assert np.abs(with_prior.params[:, 3] - mode).max() < 0.1 * width
    np.testing.assert_allclose(with_prior.stds[:, 3], precision**-0.5, rtol=0.1)


def test_narrow_prior_holds_the_index():
    data = noisy("sersic", 3, 5.0, seed=3)
    fitter = MAPFitter(priors={"n": LogNormal(1.7, 0.01)})
    result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=5.0, psf=STAR)
    np.testing.assert_allclose(result.params[:, 4], 1.7, rtol=0.03)
    assert (result.stds[:, 4] < 0.03).all()


def test_default_prior_matters_to_faint_galaxies_only():
    for sigma, limit in ((0.05, 0.02), (0.3, 0.3)):
        data = noisy("sersic", 4, sigma)
        default = fit_images(data, SersicGalaxy2D(), uncertainty=sigma, psf=STAR)
        none = fit_images(data, SersicGalaxy2D(), MAPFitter(priors={}), uncertainty=sigma, psf=STAR)
        shift = np.abs(default.params - none.params)[:, :6] / none.stds[:, :6]
        assert shift.max() < limit
    faint = noisy("sersic", 40, 8.0)
    default = fit_images(faint, SersicGalaxy2D(), uncertainty=8.0, psf=STAR)
    none = fit_images(faint, SersicGalaxy2D(), MAPFitter(priors={}), uncertainty=8.0, psf=STAR)
    assert np.ptp(default.params[:, 4]) < np.ptp(none.params[:, 4])
    assert (default.params[:, 4] < 7).all()


def test_bad_priors():
    image = image_of("sersic")
    with pytest.raises(ValueError, match="no parameter 'index'"):
        fit_images(image, SersicGalaxy2D(), MAPFitter(priors={"index": Normal(1, 1)}))
    with pytest.raises(TypeError, match="prior of 'n'"):
        MAPFitter(priors={"n": 3.0})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"max_iter": 0},
        {"batch_size": 0},
        {"max_shift": -1.0},
        {"max_shift": np.nan},
        {"device": "abacus"},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises((ValueError, RuntimeError), match=next(iter(options))):
        fit_images(image_of("point"), PointSource2D(), MAPFitter(**options), psf=STAR)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        MAPFitter({})


def test_point_source_without_psf():
    with pytest.raises(ValueError, match="PSF"):
        fit_images(image_of("point"), PointSource2D(), uncertainty=0.1)


def test_max_shift():
    """The centre stays where it was given."""
    position = (CENTRE[0] + 3, CENTRE[1])
    result = fit_images(
        image_of("sersic")[None],
        SersicGalaxy2D(),
        MAPFitter(max_shift=0.5),
        uncertainty=0.1,
        psf=STAR,
        positions=[position],
    )
    assert np.abs(result.params[0, 1:3] - position).max() <= 1.0 + 1e-6
    assert has(result, FitFlag.AT_BOUND)[0]


# -- covariance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["none", "constant"])
def test_covariance_is_that_of_the_likelihood(background):
    """Inverse Fisher matrix from the model's own derivatives, at high S/N."""
    sigma = 0.05
    result = fit_images(
        image_of("sersic"), SersicGalaxy2D(), EXACT, uncertainty=sigma, psf=STAR,
        background=background,
    )  # fmt: skip
    model = TRUTH["sersic"].copy()
    model.psf = STAR
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    design = [d.ravel() for d in model.fit_deriv(x, y, *model.parameters)]
    if background == "constant":
        design.append(np.ones(x.size))
    cov = np.linalg.inv(np.array(design) @ np.array(design).T) * sigma**2
    np.testing.assert_allclose(result.stds[0], np.sqrt(np.diag(cov))[:7], rtol=0.02)
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))[:7, :7]
    np.testing.assert_allclose(result.cov[0] / scale, cov[:7, :7] / scale, atol=0.03)
    if background == "constant":
        assert result.background_cov[0, 0, 0] == pytest.approx(cov[7, 7], rel=0.03)


def test_covariances_are_covariances(mixed):
    _, _, result = mixed
    np.testing.assert_allclose(result.cov, result.cov.transpose(0, 2, 1), rtol=1e-8, atol=1e-12)
    for cov in result.cov:
        scale = np.sqrt(np.diag(cov))
        assert np.linalg.eigvalsh(cov / np.outer(scale, scale)).min() > -1e-8


def test_chi2_is_that_of_the_model_image(mixed):
    data, sigma, result = mixed
    model = result.model.render(SHAPE, params=result.params, psf=STAR)
    chi2 = (((data - model) / sigma) ** 2).sum((1, 2))
    np.testing.assert_allclose(result.chi2, chi2, rtol=1e-3)
    assert (result.dof == data[0].size - 7).all()


# -- flags --------------------------------------------------------------------------------------


def test_good_fits_have_no_flags(mixed):
    _, _, result = mixed
    bright = result.params[:, 0] > 20 * result.stds[:, 0]
    assert bright.sum() > 10
    assert (result.flags[bright] & ~np.int32(FitFlag.AT_BOUND) == 0).all()


def test_not_converged():
    result = fit_images(
        noisy("sersic", 3, 0.1), SersicGalaxy2D(), MAPFitter(max_iter=1), uncertainty=0.1, psf=STAR
    )
    assert has(result, FitFlag.NOT_CONVERGED).all()
    assert np.isfinite(result.params).all()


@pytest.mark.parametrize("name", ["sersic", "gaussian", "point", "bulge and disk"])
@pytest.mark.parametrize("background", ["none", "constant"])
def test_noise_is_never_a_confident_detection(name, background):
    count = 200 if name in ("sersic", "point") else 60
    data = np.random.default_rng(11).normal(0, 2.5, (count, 33, 33))
    result = fit_images(data, fresh(name), uncertainty=2.5, psf=STAR, background=background)
    with np.errstate(invalid="ignore"):
        faint = ~(result.params[:, 0] / result.stds[:, 0] >= 5)
    said = has(result, FitFlag.LOW_SNR)
    sure = ~faint | ~said
    assert not sure.any(), [
        (i, result.params[i], result.stds[i], decode_flags(result.flags[i]))
        for i in np.flatnonzero(sure)
    ]


def test_noise_with_estimated_uncertainty():
    data = np.random.default_rng(12).normal(3, 2.5, (100, 33, 33))
    result = fit_images(data, SersicGalaxy2D(), psf=STAR, background="constant")
    assert has(result, FitFlag.NOISE_ESTIMATED).all()
    assert has(result, FitFlag.LOW_SNR).all()


def test_holes_are_no_detections():
    data = -noisy("sersic", 5, 0.3)
    result = fit_images(data, SersicGalaxy2D(), uncertainty=0.3, psf=STAR)
    assert has(result, FitFlag.LOW_SNR).all()


def test_all_masked():
    data = noisy("sersic", 3, 0.3)
    mask = np.zeros(data.shape, dtype=bool)
    mask[1] = True
    result = fit_images(data, SersicGalaxy2D(), uncertainty=0.3, psf=STAR, mask=mask)
    assert has(result, FitFlag.NO_DATA).tolist() == [False, True, False]
    assert np.isnan(result.params[1]).all()
    assert np.isnan(result.stds[1]).all()
    assert np.isfinite(result.params[[0, 2]]).all()


@pytest.mark.parametrize("pixels", [1, 3, 6, 7])
def test_few_pixels(pixels):
    """As many pixels as unknowns leave nothing to judge by."""
    data = noisy("sersic", 2, 0.3)
    mask = np.ones(data.shape, dtype=bool)
    mask[1] = False
    mask[0].ravel()[1000 : 1000 + pixels] = False
    result = fit_images(data, SersicGalaxy2D(), uncertainty=0.3, psf=STAR, mask=mask)
    assert has(result, FitFlag.FEW_PIXELS).tolist() == [True, False]
    assert np.isnan(result.params[0]).all()


@pytest.mark.parametrize("shape", [(5, 7), (3, 40), (9, 9)])
def test_tiny_stamps(shape):
    """Whatever can be said is said without an error, and the point is found."""
    star = PointSource2D(500, shape[1] / 2 - 0.3, shape[0] / 2 - 0.6, psf=STAR)
    image = star.render(shape)
    result = fit_images(image, PointSource2D(), uncertainty=0.1, psf=STAR)
    assert result.params[0] == pytest.approx(star.parameters, rel=0.01)
    galaxy = fit_images(image, SersicGalaxy2D(), uncertainty=0.1, psf=STAR)
    assert galaxy.params.shape == (1, 7)


def test_edge():
    galaxy = SersicGalaxy2D(500, 0.8, 22, 3, 1, 0.3, 0.2, psf=STAR).render(SHAPE)
    result = fit_images(
        galaxy[None], SersicGalaxy2D(), uncertainty=0.1, psf=STAR, positions=[(1, 22)]
    )
    assert has(result, FitFlag.EDGE)[0]
    assert result.params[0, 1] == pytest.approx(0.8, abs=0.1)


def test_poor_fit():
    rings = np.zeros(SHAPE)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    r = np.hypot(x - CENTRE[0], y - CENTRE[1])
    rings[(r > 6) & (r < 8)] = 20
    result = fit_images(image_of("sersic") + rings, SersicGalaxy2D(), uncertainty=0.5, psf=STAR)
    assert has(result, FitFlag.POOR_FIT)[0]
    good = fit_images(noisy("sersic", 50, 0.5), SersicGalaxy2D(), uncertainty=0.5, psf=STAR)
    assert not has(good, FitFlag.POOR_FIT).any()


def test_saturated():
    clipped = np.minimum(image_of("sersic"), 8.0)
    result = fit_images(clipped, SersicGalaxy2D(), uncertainty=0.1, psf=STAR)
    assert has(result, FitFlag.SATURATED)[0]


def test_thin_galaxy_is_at_its_bound():
    line = np.zeros(SHAPE)
    line[22, 4:45] = 30
    result = fit_images(line, SersicGalaxy2D(), uncertainty=0.5, psf=STAR)
    assert np.isfinite(result.params).all()
    assert has(result, FitFlag.AT_BOUND | FitFlag.POOR_FIT)[0]


def test_star_as_a_galaxy():
    """Unresolved: a tiny radius or a bound, and the right flux all the same."""
    data = noisy("point", 5, 0.3)
    result = fit_images(data, SersicGalaxy2D(), uncertainty=0.3, psf=STAR)
    assert (result.params[:, 3] < 0.7).all()
    np.testing.assert_allclose(result.params[:, 0], 500, rtol=0.05)
    assert np.abs(result.params[:, 1:3] - CENTRE).max() < 0.1


def test_max_iter_is_a_limit_for_each_start():
    result = fit_images(
        noisy("sersic", 3, 0.1), SersicGalaxy2D(), MAPFitter(max_iter=60), uncertainty=0.1, psf=STAR
    )
    assert (result.n_iter > 0).all()
    assert (result.n_iter < 60).all()


def test_model_is_left_alone():
    model = SersicGalaxy2D(3, 1, 2, 9, 4, 0.5, 1.0)
    before = model.parameters.copy()
    fit_images(image_of("sersic"), model, uncertainty=0.1, psf=STAR)
    np.testing.assert_array_equal(model.parameters, before)
    assert model.psf is None


def test_torch_is_left_alone():
    import torch

    torch.set_num_threads(2)
    state = torch.get_rng_state()
    fit_images(image_of("sersic"), SersicGalaxy2D(), uncertainty=0.1, psf=STAR)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    torch.set_num_threads(1)


def test_other_models_are_refused():
    from astropy.modeling.models import Gaussian2D

    with pytest.raises(TypeError, match="galmorph model"):
        fit_images(image_of("sersic"), Gaussian2D(), uncertainty=0.1)


# -- global minima ------------------------------------------------------------------------------


def random_params(kind, count, rng):
    """Galaxies of all sorts, the angle free to be anything."""
    lead = [
        np.full(count, 1000.0),
        24 + rng.uniform(-3, 3, count),
        22 + rng.uniform(-3, 3, count),
    ]
    ellip, theta = lambda: rng.uniform(0, 0.85, count), lambda: rng.uniform(-1.5, 1.5, count)
    radius = 1.0 * 10 ** rng.random(count)
    if kind is GaussianGalaxy2D:
        return np.column_stack([*lead, radius, ellip(), theta()])
    if kind is SersicGalaxy2D:
        return np.column_stack([*lead, radius, rng.uniform(0.4, 6, count), ellip(), theta()])
    if kind is BulgeDiskGalaxy2D:
        disk = rng.uniform(3, 8, count)
        bulge = [rng.uniform(0.1, 0.7, count), disk * rng.uniform(0.2, 0.5, count)]
        shape = [rng.uniform(1, 5, count), 0.5 * ellip(), theta()]
        return np.column_stack([*lead, *bulge, *shape, disk, ellip(), theta()])
    return np.column_stack(lead)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (GaussianGalaxy2D, 150),
        (SersicGalaxy2D, 200),
        (PointSource2D, 150),
        (BulgeDiskGalaxy2D, 50),
    ],
)
@pytest.mark.parametrize("background", ["none", "constant"])
def test_fit_is_at_least_as_good_as_the_truth(kind, count, background):
    """Maximum likelihood means that no parameters, the true ones included, are more likely."""
    rng = np.random.default_rng(21)
    truth = random_params(kind, count, rng)
    clean = kind().render(SHAPE, params=truth, psf=STAR)
    sigma = np.sqrt((clean**2).sum((1, 2))) / (10 * 30 ** rng.random(len(truth)))
    sigma = np.broadcast_to(sigma[:, None, None], clean.shape)
    noise = rng.standard_normal(clean.shape)
    result = fit_images(
        clean + sigma * noise,
        kind(),
        MAPFitter(priors={}),
        uncertainty=sigma,
        psf=STAR,
        background=background,
    )
    worse = result.chi2 - (noise**2).sum((1, 2))
    bad = np.flatnonzero(worse > 1.0)
    assert len(bad) == 0, [
        (round(worse[i], 1), truth[i].round(2), result.params[i].round(2), int(result.flags[i]))
        for i in bad
    ]


def test_tolerance_must_not_be_negative():
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        MAPFitter(tolerance=-1)


def test_tolerance_saves_evaluations_and_costs_a_part_of_the_error():
    data = noisy("sersic", 60, 0.3)
    full, quick = (
        fit_images(data, SersicGalaxy2D(), MAPFitter(tolerance=t), uncertainty=0.3, psf=STAR)
        for t in (0.0, 1.0)
    )
    assert quick.n_iter.sum() < full.n_iter.sum()
    shift = np.abs(quick.params - full.params) / full.stds
    assert np.quantile(shift, 0.95) < 0.5
