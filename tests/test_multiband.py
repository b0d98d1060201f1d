"""Several bands: forced photometry and joint fits."""

import astropy.units as u
import numpy as np
import pytest
from astropy.nddata import CCDData, StdDevUncertainty
from astropy.wcs import WCS
from numpy.testing import assert_allclose

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    FitFlag,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    MAPFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    deblend,
)
from galmorph.multiband import deblend_bands, forced_photometry
from galmorph.noise import LearnedNoise

pytest.importorskip("torch")

SHAPE = (41, 45)
EXACT = MAPFitter(dtype="float64", priors={})


def gaussian_psf(sigma=1.3, size=25):
    y, x = np.mgrid[:size, :size] - size // 2
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


SHARP, WIDE = gaussian_psf(1.2), gaussian_psf(1.8)
#: A blend of two Sérsic profiles.
PAIR = np.array([[500, 18, 20, 3, 1.5, 0.3, 0.4], [300, 25, 22, 2.5, 1, 0.2, 1.2]])


def drawn(params, flux, psf, shape=SHAPE, model=SersicGalaxy2D):
    """Image of all sources with other fluxes."""
    params = np.array(params, dtype=float)
    params[:, 0] = flux
    return model().render(shape, params=params, psf=psf).sum(0)


@pytest.fixture(scope="module")
def red():
    """The blend in one band, fitted without priors, its centres free."""
    image = drawn(PAIR, [500, 300], SHARP)
    image += np.random.default_rng(3).normal(0, 0.1, SHAPE)
    result = deblend(
        image,
        PAIR[:, 1:3],
        model=SersicGalaxy2D(),
        fitter=EXACT,
        psf=SHARP,
        uncertainty=0.1,
        position_prior=1e3,
        structure=0,
    )
    return image, result


# -- forced photometry: closed forms ---------------------------------------------------------


@pytest.mark.parametrize("background", ["none", "constant"])
def test_forced_fluxes_are_those_of_the_linear_model(red, rng, background):
    _, result = red
    sigma = rng.uniform(0.2, 0.5, SHAPE)
    image = drawn(PAIR, [100, 200], WIDE) + rng.normal(0, sigma) + 2 * (background == "constant")
    image[5:9, 30:33] = np.nan
    found = forced_photometry(result, image, psf=WIDE, uncertainty=sigma, background=background)
    params = np.array(result.params)
    params[:, 0] = 1.0
    unit = SersicGalaxy2D().render(SHAPE, params=params, psf=WIDE)
    # a source counts in a box, here as large as the light that is left beyond is nothing
    columns = [*unit, np.ones(SHAPE)] if background == "constant" else list(unit)
    use = np.isfinite(image)
    if background == "constant":  # the constant is that of the boxes
        use &= found.background_image != 0
    white = np.array([c[use] / sigma[use] for c in columns])
    cov = np.linalg.inv(white @ white.T)
    best = cov @ white @ (image / sigma)[use]
    error = np.sqrt(np.diag(cov))
    assert_allclose(found.flux, best[:2], atol=0.02 * error[:2].min())
    assert_allclose(found.flux_cov.toarray(), cov[:2, :2], rtol=2e-3)
    assert_allclose(found.flux_err, error[:2], rtol=2e-3)
    if background == "constant":
        assert_allclose(found.background, best[2], atol=0.02 * error[2])
    rest = (image - found.model_image - found.background_image)[use]
    assert_allclose(found.residual_image[use], rest, atol=1e-9)
    assert np.isnan(found.residual_image[~np.isfinite(image)]).all()
    assert not found.flags.any()


def test_with_uncertain_shapes_errors_are_those_of_the_joint_fit(red):
    # Schur: given the shapes the inverse of G, and what the marginal covariance of shapes adds
    image, result = red
    found = forced_photometry(result, image, psf=SHARP, uncertainty=0.1, shape_uncertainty=True)
    assert_allclose(found.flux, result.flux, rtol=1e-3)
    assert_allclose(found.flux_cov.toarray(), result.flux_cov, rtol=5e-3)
    sure = forced_photometry(result, image, psf=SHARP, uncertainty=0.1)
    assert (sure.flux_err < 0.5 * result.flux_err).all()


def test_magnitudes_by_a_zero_point(red):
    image, result = red
    options = {"psf": SHARP, "uncertainty": 0.1, "band": "g"}
    assert "mag_g" not in forced_photometry(result, image, **options).to_table().colnames
    table = forced_photometry(result, image, zero_point=25.0, **options).to_table()
    assert_allclose(table["mag_g"].value, 25 - 2.5 * np.log10(table["flux_g"]))
    with pytest.raises(ValueError, match="zero_point"):
        forced_photometry(result, image, zero_point=np.nan, **options)


def test_chi2_of_a_source_is_that_of_its_box(red, rng):
    _, result = red
    image = drawn(PAIR, [100, 200], WIDE) + rng.normal(0, 0.3, SHAPE)
    found = forced_photometry(result, image, psf=WIDE, uncertainty=0.3)
    spread = np.sqrt(2 * found.n_pixels)
    assert (np.abs(found.chi2 - found.n_pixels) < 4 * spread).all()
    assert (found.n_pixels <= image.size).all()


def test_components_have_fluxes_of_their_own(rng):
    names = BulgeDiskGalaxy2D().param_names
    values = {"flux": 900, "x_0": 22, "y_0": 20, "bulge_fraction": 0.4, "r_bulge": 1.5}
    values |= {"n_bulge": 2.5, "ellip_bulge": 0.1, "theta_bulge": 0.2, "r_disk": 5}
    values |= {"ellip_disk": 0.3, "theta_disk": 0.2}
    params = np.array([[values[n] for n in names]])
    model = BulgeDiskGalaxy2D()
    image = model.render(SHAPE, params=params, psf=SHARP)[0] + rng.normal(0, 0.1, SHAPE)
    fit = deblend(image, params[:, 1:3], model=model, psf=SHARP, uncertainty=0.1)
    found = fit.params.copy()
    parts = []
    for share in (1.0, 0.0):
        found[:, 0], found[:, names.index("bulge_fraction")] = 1.0, share
        parts.append(model.render(SHAPE, params=found, psf=WIDE)[0])
    other = 50 * parts[0] + 700 * parts[1]
    forced = forced_photometry(fit, other, psf=WIDE, uncertainty=0.1, components=True)
    assert_allclose(forced.component_flux, [[50, 700]], rtol=1e-3)
    assert_allclose(forced.flux, 750, rtol=1e-3)
    white = np.array(parts).reshape(2, -1) / 0.1
    cov = np.linalg.inv(white @ white.T)
    assert_allclose(forced.component_flux_err[0], np.sqrt(np.diag(cov)), rtol=1e-2)
    assert_allclose(forced.flux_err, np.sqrt(cov.sum()), rtol=1e-2)
    assert {"flux_bulge", "flux_disk_err"} <= set(forced.to_table().colnames)
    total = forced_photometry(fit, other, psf=WIDE, uncertainty=0.1)
    assert total.component_flux is None


def test_all_kinds_of_sources(rng):
    models = [
        PointSource2D(),
        GaussianGalaxy2D(),
        SersicGalaxy2D(),
        LearnedGalaxy2D.from_pretrained(),
    ]
    learned = models[3].sample(1, rng=3)[0]
    learned[:5] = [600, 12, 28, 3, 0.5]
    params = [
        [300, 20, 12],
        [300, 32, 30, 2.5, 0.2, 0.5],
        [400, 30, 14, 2.5, 1.5, 0.3, 0.1],
        learned,
    ]

    def image(flux, psf):
        own = [np.array([[f, *p[1:]]]) for f, p in zip(flux, params, strict=True)]
        return sum(m.render(SHAPE, params=p, psf=psf)[0] for m, p in zip(models, own, strict=True))

    fit = deblend(
        image([300, 300, 400, 600], SHARP) + rng.normal(0, 0.1, SHAPE),
        [p[1:3] for p in params],
        model=models,
        psf=SHARP,
        uncertainty=0.1,
    )
    truth = np.array([50, 100, 150, 200])
    other = image(truth, WIDE) + rng.normal(0, 0.1, SHAPE)
    found = forced_photometry(fit, other, psf=WIDE, uncertainty=0.1, shape_uncertainty=True)
    assert (np.abs(found.flux - truth) < 4 * found.flux_err).all()


# -- forced photometry: other grids ----------------------------------------------------------


def tangent(scale, angle, pixel, parity=1):
    """A WCS with pixels of ``scale`` arcsec, turned; parity -1 has east to the right."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [150.0, 2.0]
    wcs.wcs.crpix = np.array(pixel) + 1.0
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-parity, 1.0])
    wcs.wcs.cd = turn * scale / 3600
    return wcs


@pytest.mark.parametrize("parity", [1, -1])
def test_sizes_and_angles_go_from_one_grid_to_another(parity):
    first, second = tangent(0.2, 0.0, (22, 20)), tangent(0.3, 0.7, (30, 33), parity)
    sigma = 0.05
    # what a position angle of 40 degrees, 0.8 arcsec and an axis ratio of 0.5 are in pixels
    pa = np.radians(40)
    north_east = np.array([np.cos(pa), np.sin(pa)])

    def pixels(wcs, scale, x, y):
        step = np.linalg.solve(wcs.wcs.cd * 3600, north_east[::-1])  # (east, north) to (x, y)
        return [1.0, x, y, 0.8 / scale, 1.2, 0.5, np.arctan2(step[1], step[0])]

    def image(wcs, scale, xy, shape, flux):
        return flux * SersicGalaxy2D().render(
            shape, params=[pixels(wcs, scale, *xy)], psf=gaussian_psf(0.35 / scale)
        ).sum(0)

    one = image(first, 0.2, (22, 20), SHAPE, 400)
    two = image(second, 0.3, (30, 33), (61, 63), 250)
    options = {"uncertainty": StdDevUncertainty(np.full(SHAPE, sigma)), "unit": "uJy"}
    fit = deblend(
        CCDData(one, wcs=first, **options),
        [(22, 20)],
        model=SersicGalaxy2D(),
        fitter=EXACT,
        psf=gaussian_psf(0.35 / 0.2),
    )
    options["uncertainty"] = StdDevUncertainty(np.full((61, 63), sigma))
    found = forced_photometry(
        fit, CCDData(two, wcs=second, **options), psf=gaussian_psf(0.35 / 0.3)
    )
    assert_allclose(found.flux, 250, rtol=2e-3)
    assert_allclose(found.xy, [[30, 33]], atol=1e-2)
    assert np.abs(found.residual_image).max() < 5e-3 * two.max()
    table = found.to_table()
    assert table["flux"].unit == u.uJy
    sky = second.pixel_to_world(30, 33)
    assert table["sky_centroid"].separation(sky).arcsec.max() < 1e-2


def test_learned_galaxies_have_mirror_images():
    model = LearnedGalaxy2D.from_pretrained()
    params = model.sample(1, rng=5)
    params[:, :5] = [[900, 21, 19, 5, 0.6]]
    image = model.render(SHAPE, params=params, psf=SHARP)[0]
    wcs, mirror = (tangent(0.2, 0.0, (22, 20), parity) for parity in (1, -1))
    options = {"uncertainty": StdDevUncertainty(np.full(SHAPE, 0.05)), "unit": "uJy"}
    fit = deblend(
        CCDData(image, wcs=wcs, **options), [(21, 19)], model=model, psf=SHARP, position_prior=0.2
    )
    same = forced_photometry(fit, CCDData(image, wcs=wcs, **options), psf=SHARP)
    # the pixel at (22, 20) is that of the same sky in both
    flipped = forced_photometry(fit, CCDData(image[:, ::-1], wcs=mirror, **options), psf=SHARP)
    assert_allclose(flipped.flux, same.flux, rtol=1e-4)
    assert_allclose(flipped.model_image[:, ::-1], same.model_image, atol=1e-4 * image.max())
    mirror.wcs.cd = mirror.wcs.cd @ np.diag([1.2, 1.0])
    sheared = CCDData(image, wcs=mirror, **options)
    with pytest.raises(ValueError, match="sheared"):
        forced_photometry(fit, sheared, psf=SHARP)


# -- forced photometry: fields and what goes wrong -------------------------------------------


def test_pulls_of_forced_fluxes_in_a_field_are_standard_normal(rng):
    side, count = 300, 150
    params = np.column_stack([np.full(count, 500.0), rng.uniform(10, side - 10, (count, 2))])
    star = {"model": PointSource2D, "shape": (side, side)}
    image = drawn(params, params[:, 0], SHARP, **star)
    fit = deblend(
        image + rng.normal(0, 0.5, image.shape),
        params[:, 1:3],
        model=PointSource2D(),
        psf=SHARP,
        uncertainty=0.5,
        position_prior=0,
    )
    flux = rng.uniform(50, 1000, count)
    other = drawn(params, flux, WIDE, **star) + rng.normal(0, 1.0, image.shape)
    found = forced_photometry(fit, other, psf=WIDE, uncertainty=1.0)
    pulls = (found.flux - flux) / found.flux_err
    assert abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.217 / len(pulls))
    assert abs(pulls.mean()) < 3.5 / np.sqrt(len(pulls))
    touching = found.flux_cov.toarray()[np.triu_indices(len(pulls), 1)]
    assert (touching < 0).sum() > 10
    assert np.nanstd(found.residual_image) < 1.02


def test_sources_that_cannot_be_measured_are_flagged(red, rng):
    image, _ = red
    xy = np.array([*PAIR[:, 1:3], [40.0, 36.0], [200.0, 3.0]])
    fit = deblend(image, xy, model=SersicGalaxy2D(), psf=SHARP, uncertainty=0.1)
    other = drawn(PAIR, [100, 200], WIDE) + rng.normal(0, 0.3, SHAPE)
    other[28:, 32:] = np.nan
    found = forced_photometry(fit, other, psf=WIDE, uncertainty=0.3)
    assert np.isnan(found.flux).tolist() == [False, False, True, True]
    assert np.isnan(found.flux_err).tolist() == [False, False, True, True]
    assert found.flags[2] & FitFlag.NO_DATA
    assert found.flags[3] & FitFlag.OUTSIDE
    assert (np.abs(found.flux[:2] - [100, 200]) < 4 * found.flux_err[:2]).all()
    assert len(found.to_table()) == 4


def test_two_sources_that_are_the_same_cannot_be_told_apart(rng):
    star = PointSource2D(fixed={"x_0": True, "y_0": True})
    image = star.render(SHAPE, params=[[300, 20, 20]], psf=SHARP)[0] + rng.normal(0, 0.3, SHAPE)
    models = [PointSource2D(1, 20, 20, fixed=star.fixed) for _ in range(2)]
    fit = deblend(
        image, [(20, 20), (20, 20)], model=models, psf=SHARP, uncertainty=0.3, position_prior=0
    )
    found = forced_photometry(fit, image, psf=SHARP, uncertainty=0.3)
    assert (found.flags & FitFlag.BAD_COVARIANCE).all()
    assert np.isnan(found.flux_err).all()
    assert_allclose(found.flux.sum(), 300, rtol=0.02)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"psf": None}, ValueError, "needs that of this one"),
        ({"background": "tilted"}, ValueError, "background"),
        ({"image": np.zeros((5, 5))}, ValueError, "celestial WCS"),
        ({"image": np.zeros((2, *SHAPE))}, ValueError, "one image"),
        ({"result": "red"}, TypeError, "SceneResult"),
    ],
)
def test_wrong_arguments_of_forced_photometry(red, change, error, text):
    arguments = {"result": red[1], "image": red[0], "psf": SHARP, "uncertainty": 0.1} | change
    result, image = arguments.pop("result"), arguments.pop("image")
    with pytest.raises(error, match=text):
        forced_photometry(result, image, **arguments)


# -- joint fits: closed forms ----------------------------------------------------------------


@pytest.mark.parametrize("structure", [0.0, 1.0])
def test_bands_in_proportion_are_one_band_with_less_noise(rng, structure):
    # d_2 = c d_1: shapes as from d_1 with 1 / s^2 = 1 / s_1^2 + c^2 / s_2^2
    image = drawn(PAIR, [500, 300], SHARP) + rng.normal(0, 0.1, SHAPE)
    c, s_1, s_2 = 0.6, 0.2, 0.15
    options = {"model": SersicGalaxy2D(), "psf": SHARP, "fitter": EXACT, "position_prior": 0.3}
    images, sigmas = {"r": image, "g": c * image}, {"r": s_1, "g": s_2}
    together = deblend_bands(
        images, PAIR[:, 1:3], uncertainty=sigmas, structure=structure, **options
    )
    sigma = 1 / np.sqrt(s_1**-2 + c**2 * s_2**-2)
    alone, true = (
        deblend(image, PAIR[:, 1:3], uncertainty=sigma, structure=s, **options)
        for s in (structure, 0)
    )
    errors = np.sqrt(np.diagonal(alone.cov)).reshape(2, 7)
    for k in range(2):
        found = together.params[k]
        assert_allclose(found[2:], alone.params[k, 1:], atol=0.02 * errors[k, 1:].min())
        assert_allclose(found[0], alone.flux[k], atol=0.02 * errors[k, 0])
        assert_allclose(found[1] / found[0], c, rtol=1e-3)
    shape = np.array([i for i in range(16) if i % 8 > 1])
    single = np.array([i for i in range(14) if i % 7])
    # the curvature depends a little on where the fit stops
    assert_allclose(np.diagonal(together.cov)[shape], np.diagonal(alone.cov)[single], rtol=2e-2)
    # fluxes: what each band knows given the shapes, and what both do not know of the shapes
    forced = forced_photometry(true, image, psf=SHARP, uncertainty=s_1, shape_uncertainty=True)
    # light that models do not have does the same to the flux in r as in one band
    missed = alone.flux_cov - true.flux_cov
    assert (missed.any() and structure) or not structure
    assert_allclose(together.flux_cov[::2, ::2], forced.flux_cov.toarray() + missed, rtol=2e-2)
    # and nothing to the colour: it is the same in both
    color_errors = [
        deblend_bands(images, PAIR[:, 1:3], uncertainty=sigmas, structure=s, **options)
        .color("g", "r")[1]
        for s in (structure, 0)
    ]  # fmt: skip
    assert_allclose(*color_errors, rtol=1e-3)
    assert_allclose(together["g"].flux_cov, together.flux_cov[1::2, 1::2], rtol=1e-6)
    assert_allclose(together["r"].flux_cov, together.flux_cov[::2, ::2], rtol=1e-6)


def test_one_source_in_a_large_image(rng):
    truth = SersicGalaxy2D(900, 210, 64, r_eff=4, n=1.5, ellip=0.3, theta=0.5)
    image = truth.render((180, 320), psf=SHARP)
    images = {"r": image + rng.normal(0, 0.2, image.shape), "g": image / 2}
    options = {"psf": SHARP, "uncertainty": {"r": 0.2, "g": 0.2}, "model": SersicGalaxy2D()}
    result = deblend_bands(images, [(210, 64)], **options)
    assert_allclose(result.flux[0], [900, 450], rtol=0.1)


def test_a_prior_counts_once():
    image = PointSource2D().render(SHAPE, params=[[40, 20, 20]], psf=SHARP)[0]
    options = {"model": PointSource2D(), "psf": SHARP, "uncertainty": 1.0, "fitter": EXACT}
    width = 0.3
    loose, tight = (
        deblend_bands([image] * 3, [(20, 20)], position_prior=p, **options) for p in (1e3, width)
    )
    precision = [1 / np.diagonal(r.cov)[3:] for r in (loose, tight)]
    assert_allclose(precision[1] - precision[0], 1 / width**2, rtol=1e-3)


def test_backgrounds_of_each_band_are_marginalised(rng):
    xy = np.array([[18.0, 20.0], [21.5, 20.5]])
    star = PointSource2D()
    levels, sigmas, psfs = (2.0, -1.0), (0.7, 0.4), (SHARP, WIDE)
    images, expected = [], []
    for level, sigma, psf in zip(levels, sigmas, psfs, strict=True):
        unit = star.render(SHAPE, params=np.column_stack([np.ones(2), xy]), psf=psf).reshape(2, -1)
        columns = np.concatenate([unit, np.ones((1, unit.shape[1]))])
        image = [300, 200, level] @ columns + rng.normal(0, sigma, columns.shape[1])
        cov = np.linalg.inv(columns @ columns.T) * sigma**2
        expected.append((cov @ columns @ image / sigma**2, cov))
        images.append(image.reshape(SHAPE))
    result = deblend_bands(
        images,
        xy,
        model=star,
        psf=list(psfs),
        uncertainty=list(sigmas),
        fitter=EXACT,
        background="constant",
        position_prior=0,
    )
    for b, (best, cov) in enumerate(expected):
        assert_allclose(result.flux[:, b], best[:2], rtol=1e-5)
        assert_allclose(result.flux_cov[b::2, b::2], cov[:2, :2], rtol=1e-4)
        assert_allclose(result[str(b)].background_image, best[2], rtol=1e-4)
    assert_allclose(result.flux_cov[0::2, 1::2], 0, atol=1e-8)  # nothing in common


# -- joint fits: statistics ------------------------------------------------------------------


@pytest.fixture(scope="module")
def colored():
    """A hundred bulges and disks of different colours in one field, and their joint fit."""
    rng = np.random.default_rng(11)
    names = BulgeDiskGalaxy2D().param_names
    step, rows = 50, 10
    count = rows**2
    y, x = np.mgrid[:rows, :rows] * step + step // 2
    params = np.zeros((count, len(names)))
    put = dict(zip(names, params.T, strict=True))
    put["x_0"][:], put["y_0"][:] = (a.ravel() + rng.uniform(-2, 2, count) for a in (x, y))
    put["r_bulge"][:], put["r_disk"][:] = rng.uniform(1.5, 2, count), rng.uniform(5, 6, count)
    put["n_bulge"][:] = 2.0
    put["ellip_bulge"][:], put["ellip_disk"][:] = rng.uniform(0.1, 0.5, (2, count))
    put["theta_bulge"][:], put["theta_disk"][:] = rng.uniform(0, np.pi, (2, count))
    flux = np.stack(
        [
            np.column_stack([rng.uniform(400, 800, count), rng.uniform(1000, 2000, count)]),
            np.column_stack([rng.uniform(800, 1200, count), rng.uniform(800, 1500, count)]),
        ],
        1,
    )  # galaxy, band, component
    model = BulgeDiskGalaxy2D(n_bulge=2.0, fixed={"n_bulge": True})
    images = {}
    for b, (band, psf) in enumerate((("g", WIDE), ("r", SHARP))):
        put["flux"][:] = flux[:, b].sum(1)
        put["bulge_fraction"][:] = flux[:, b, 0] / flux[:, b].sum(1)
        image = np.zeros((rows * step,) * 2)
        own = params.copy()
        corner = np.rint(params[:, 1:3]).astype(int) - 60
        own[:, 1:3] -= corner
        padded = np.pad(image, 100)
        for (x0, y0), light in zip(
            corner + 100, model.render((121, 121), params=own, psf=psf), strict=True
        ):
            padded[y0 : y0 + 121, x0 : x0 + 121] += light
        images[band] = padded[100:-100, 100:-100] + rng.normal(0, 0.4, image.shape)
    result = deblend_bands(
        images,
        params[:, 1:3],
        model=model,
        psf={"g": WIDE, "r": SHARP},
        uncertainty=0.4,
        component_colors=True,
        position_prior=0.5,
        structure=0,  # models are true
        max_group=2,
    )
    return flux, images, result


def test_colors_of_components_are_recovered(colored):
    flux, _, result = colored
    for i, part in enumerate(("bulge", "disk")):
        truth = -2.5 * np.log10(flux[:, 0, i] / flux[:, 1, i])
        color, error = result.color("g", "r", component=part)
        pulls = (color - truth) / error
        held = np.mean(np.abs(pulls) < 1)
        assert abs(held - 0.683) < 3 * np.sqrt(0.683 * 0.317 / len(pulls))
        assert abs(np.median(pulls)) < 3 * 1.25 / np.sqrt(len(pulls))
        assert np.median(error) < 0.15
    pulls = (result.component_flux - flux) / result.component_flux_err
    assert abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.217 / 200)


def test_fluxes_and_colors_of_a_field_are_recovered(colored):
    flux, images, result = colored
    total = flux.sum(2)
    pulls = (result.flux - total) / result.flux_err
    # shapes are common: the two bands of a galaxy are not independent
    assert abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.217 / len(pulls))
    color, error = result.color("g", "r")
    pulls = (color + 2.5 * np.log10(total[:, 0] / total[:, 1])) / error
    assert abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.217 / len(pulls))
    # errors that are common to both bands cancel
    apart = np.hypot(*(result.flux_err / result.flux).T) * 2.5 / np.log(10)
    assert np.median(error / apart) < 0.95
    for band in images:
        assert np.nanstd(result.residual_image(band)) < 1.01 * 0.4
        assert_allclose(result[band].flux, result.flux[:, result.bands.index(band)])
    assert_allclose(
        np.sqrt(np.diagonal(result.flux_cov)).reshape(-1, 2), result.flux_err, rtol=1e-6
    )
    assert result.meta["groups"] > 40


def test_groups_in_turns_agree_with_all_at_once(rng):
    flux = np.array([[500, 300], [250, 260]])
    images = [
        drawn(PAIR, f, p) + rng.normal(0, 0.2, SHAPE)
        for f, p in zip(flux, (SHARP, WIDE), strict=True)
    ]
    options = {"model": SersicGalaxy2D(), "psf": [SHARP, WIDE], "uncertainty": 0.2}
    together = deblend_bands(images, PAIR[:, 1:3], **options)
    calls = []
    in_turns = deblend_bands(
        images,
        PAIR[:, 1:3],
        max_group=1,
        progress=lambda done, total: calls.append((done, total)),
        **options,
    )
    assert in_turns["0"].group.tolist() == [0, 1]
    assert (np.abs(together.flux - in_turns.flux) < 0.5 * together.flux_err).all()
    assert calls[-1] == (4, 4)


def test_learned_galaxies_in_two_bands(rng):
    model = LearnedGalaxy2D.from_pretrained()
    params = model.sample(2, rng=3)
    params[:, :5] = [[2000, 18, 20, 4, 0.3], [1200, 27, 23, 3.5, 2.0]]
    flux = np.array([[2000, 900], [1200, 1500]])
    images = [
        drawn(params, flux[:, b], psf, model=lambda: model) + rng.normal(0, 0.5, SHAPE)
        for b, psf in enumerate((SHARP, WIDE))
    ]
    options = {"psf": [SHARP, WIDE], "uncertainty": 0.5, "structure": 0}
    result = deblend_bands(images, params[:, 1:3], **options)  # the default model
    assert (np.abs(result.flux - flux) < 3.5 * result.flux_err).all()
    for band in result.bands:
        assert np.nanstd(result.residual_image(band)) < 1.1 * 0.5
    single = deblend(images[1], params[:, 1:3], psf=WIDE, uncertainty=0.5, structure=0)
    assert (result.flux_err[:, 1] < single.flux_err).all()
    wary = deblend_bands(
        images, params[:, 1:3], model=model, fitter=MAPFitter(noise=LearnedNoise()), **options
    )
    assert (np.abs(wary.flux - flux) < 3.5 * wary.flux_err).all()
    for band in result.bands:  # what may be off by the misfit counts less
        assert (wary[band].chi2 < result[band].chi2).all()


# -- joint fits: what goes in and comes out --------------------------------------------------


@pytest.mark.parametrize("hole", ["g", "r"])
def test_a_band_without_data_of_one_source_is_flagged(rng, hole):
    params = np.array([*PAIR, [400, 12, 72, 2.5, 1, 0.2, 0.3]])
    flux = {"g": [200, 250, 300], "r": [500, 300, 400]}
    shape = (90, 45)
    images = {
        b: drawn(params, f, SHARP, shape) + rng.normal(0, 0.2, shape) for b, f in flux.items()
    }
    images[hole][55:] = np.nan
    for max_group in (8, 2):
        result = deblend_bands(
            images,
            params[:, 1:3],
            model=SersicGalaxy2D(),
            psf=SHARP,
            uncertainty=0.2,
            reference="r",
            max_group=max_group,
        )
        b = result.bands.index(hole)
        missing = np.zeros((3, 2), dtype=bool)
        missing[2, b] = True
        assert (np.isnan(result.flux) == missing).all()
        assert (np.isnan(result.flux_err) == missing).all()
        assert result.flags[2, b] & FitFlag.NO_DATA
        truth = np.array(list(flux.values())).T
        good = ~missing
        assert (np.abs(result.flux - truth) < 4 * result.flux_err)[good].all()
        assert np.isfinite(result.params[2][2:]).all()
        assert np.isnan(result.color("g", "r")[0]).tolist() == [False, False, True]


def test_a_source_that_no_band_has_and_a_blank_band(rng):
    images = np.stack([drawn(PAIR, [500, 300], SHARP)] * 3) + rng.normal(0, 0.2, (3, *SHAPE))
    images[1] = np.nan
    xy = [*PAIR[:, 1:3], (200, 10)]
    result = deblend_bands(images, xy, model=SersicGalaxy2D(), psf=SHARP, uncertainty=0.2)
    assert np.isnan(result.flux[:, 1]).all()
    assert np.isnan(result.flux[2]).all()
    assert (result.flags[2] & FitFlag.OUTSIDE).all()
    assert (np.abs(result.flux[:2, ::2] - [[500], [300]]) < 4 * result.flux_err[:2, ::2]).all()
    assert len(result.to_table()) == 3


def test_the_table_has_units_and_magnitudes(rng):
    wcs = tangent(0.2, 0.0, (22, 20))
    images = {}
    for band, unit, flux in (("g", u.uJy, [200, 250]), ("r", u.nJy, [5e5, 3e5])):
        noise = np.full(SHAPE, flux[0] / 1000)
        data = drawn(PAIR, flux, SHARP) + rng.normal(0, noise)
        images[band] = CCDData(data, unit=unit, wcs=wcs, uncertainty=StdDevUncertainty(noise))
    sky = wcs.pixel_to_world(*PAIR[:, 1:3].T)
    result = deblend_bands(images, sky, model=SersicGalaxy2D(), psf=SHARP)
    table = result.to_table()
    assert table["flux_g"].unit == u.uJy
    assert table["flux_r_err"].unit == u.nJy
    # 1 uJy is 23.9 mag
    assert_allclose(table["mag_g"].value, 23.9 - 2.5 * np.log10(result.flux[:, 0]), atol=1e-3)
    assert table["mag_g"].unit == u.mag
    color = table["mag_g"].value - table["mag_r"].value
    assert_allclose(table["color_g_r"].to_value(u.mag), color, atol=1e-9)
    assert table["sky_centroid"].separation(sky).arcsec.max() < 0.1
    assert {"r_eff_arcsec", "position_angle", "flags_g", "chi2_r"} <= set(table.colnames)
    assert "flux" not in table.colnames
    forced = forced_photometry(result["r"], images["g"], psf=SHARP, band="g").to_table()
    assert_allclose(forced["mag_g"].value, table["mag_g"].value, atol=0.05)
    assert (
        "mag_g"
        not in forced_photometry(
            result["r"], images["g"].data, psf=SHARP, uncertainty=0.2, band="g"
        )
        .to_table()
        .colnames
    )


def test_nothing_to_fit_is_an_empty_result():
    images = np.random.default_rng(1).normal(size=(2, 30, 30))
    result = deblend_bands(images, np.empty((0, 2)), model=SersicGalaxy2D(), uncertainty=1.0)
    assert len(result) == 0
    assert result.flux.shape == (0, 2)
    assert len(result.to_table()) == 0
    assert_allclose(result.residual_image("0"), images[0])
    found = forced_photometry(result["0"], images[1], uncertainty=1.0, background="constant")
    assert len(found.to_table()) == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": np.zeros((30, 30))}, TypeError, "dict, a list or a cube"),
        ({"images": [np.eye(30), np.eye(31)]}, ValueError, "same pixels"),
        ({"bands": ["g"]}, ValueError, "1 names for 2"),
        ({"bands": ["g", "g"]}, ValueError, "different names"),
        ({"reference": "z"}, ValueError, "reference"),
        ({"psf": [SHARP]}, ValueError, "1 of psf for 2"),
        ({"psf": [SHARP, None]}, ValueError, "others have none"),
        ({"uncertainty": {"0": 1.0}}, ValueError, "no uncertainty of band '1'"),
        ({"model": SersicGalaxy2D(fixed={"flux": True})}, ValueError, "flux of its own"),
        ({"fitter": MAPFitter(priors={"flux": Normal(1, 1)})}, ValueError, "flux of its own"),
        ({"background": "steep"}, ValueError, "background"),
        ({"max_group": 0}, ValueError, "max_group"),
        ({"structure": -1}, ValueError, "structure"),
        ({"structure": np.nan}, ValueError, "structure"),
    ],
)
def test_wrong_arguments_of_joint_fits(change, error, text):
    arguments = {"images": np.zeros((2, 30, 30)) + np.eye(30), "model": SersicGalaxy2D()}
    arguments |= {"uncertainty": 1.0} | change
    with pytest.raises(error, match=text):
        deblend_bands(arguments.pop("images"), [(10, 10), (14, 10)], **arguments)
    result = deblend_bands([np.eye(30)], [(10, 10)], model=SersicGalaxy2D(), uncertainty=1.0)
    with pytest.raises(KeyError, match="no band"):
        result["z"]
    with pytest.raises(ValueError, match="component"):
        result.color("0", "0", component="bar")
