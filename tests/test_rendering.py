"""Images of galaxies with a PSF, against GalSim, closed forms and finite differences."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from astropy.modeling.models import Gaussian2D, Moffat2D  # noqa: E402

from galmorph import (  # noqa: E402
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    PointSource2D,
    SersicGalaxy2D,
)
from galmorph.rendering import Component, FourierRenderer, make_transfer  # noqa: E402
from galmorph.rendering.evaluate import evaluate_grid  # noqa: E402

SIZE = 64
MIDDLE = (SIZE - 1) / 2


def gaussian_psf(sigma=1.3, size=25, *, oversampling=1):
    """Samples of a round Gaussian: an effective PSF that is known everywhere."""
    at = (np.arange(size) - (size - 1) / 2) / oversampling
    return PSF(np.exp(-0.5 * (at[:, None] ** 2 + at**2) / sigma**2), oversampling=oversampling)


def gaussian_image(shape, x_0, y_0, covariance, flux=1.0):
    """Samples of a bivariate Gaussian density."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    inverse = np.linalg.inv(covariance)
    offset = np.stack([x - x_0, y - y_0])
    power = np.einsum("iyx,ij,jyx->yx", offset, inverse, offset)
    return flux * np.exp(-0.5 * power) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))


# -- GalSim ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sky():
    """What GalSim makes of galaxies under one PSF, and that PSF in every form we take."""
    return _Sky(fwhm=3.0)


class _Sky:
    def __init__(self, fwhm, beta=3.0):
        galsim = pytest.importorskip("galsim")
        # light that wraps around is spread over the whole, large box of GalSim's transform
        self.settings = galsim.GSParams(
            folding_threshold=2e-3,
            maxk_threshold=1e-4,
            kvalue_accuracy=1e-6,
            maximum_fft_size=16384,
        )
        self.galsim = galsim
        self.light = galsim.Moffat(beta=beta, fwhm=fwhm, gsparams=self.settings)
        self.effective = galsim.Convolve(self.light, galsim.Pixel(1), gsparams=self.settings)
        self.moffat = Moffat2D(1, 0, 0, self.light.scale_radius, beta)

    def sample(self, scene, size, scale=1.0):
        image = scene.drawImage(nx=size, ny=size, scale=scale, method="no_pixel", dtype=float)
        return image.array

    def psf(self, kind):
        if kind == "oversampled":
            return PSF(self.sample(self.effective, 205, 0.25), oversampling=4)
        if kind == "oversampled, even":
            return PSF(self.sample(self.effective, 204, 0.25), oversampling=4)
        if kind == "pixel-free":
            return PSF(self.sample(self.light, 153, 1 / 3), oversampling=3, includes_pixel=False)
        if kind == "pixel-free, even":
            return PSF(self.sample(self.light, 154, 1 / 3), oversampling=3, includes_pixel=False)
        if kind == "native":
            return PSF(self.sample(self.effective, 51))
        if kind == "native, even":
            return PSF(self.sample(self.effective, 50))
        return self.moffat

    def draw(self, x_0, y_0, r_eff, n, ellip, theta, *, psf=None):
        galsim, q = self.galsim, 1 - ellip
        galaxy = galsim.Sersic(n, half_light_radius=r_eff * np.sqrt(q), gsparams=self.settings)
        galaxy = galaxy.shear(q=q, beta=theta * galsim.radians)
        galaxy = galaxy.shift(x_0 - MIDDLE, y_0 - MIDDLE)
        scene = galsim.Convolve(galaxy, psf or self.effective, gsparams=self.settings)
        return self.sample(scene, SIZE)


def grid_of_galaxies():
    rng = np.random.default_rng(5)
    for n in (0.5, 1.0, 4.0, 6.0):
        for r_eff in (1.0, 3.0, 10.0):
            for q in (0.1, 0.4, 1.0):
                centre = MIDDLE + rng.uniform(-2, 2, 2)
                yield (*centre, r_eff, n, 1 - q, rng.uniform(0, np.pi))


@pytest.fixture(scope="module")
def truth(sky):
    galaxies = np.array(list(grid_of_galaxies()))
    return galaxies, np.array([sky.draw(*g) for g in galaxies])


def assert_same_images(images, expected, galaxies, limit):
    """Flux of the stamp, and every pixel against the peak."""
    flux = np.abs(images.sum((1, 2)) / expected.sum((1, 2)) - 1)
    pixel = np.abs(images - expected).max((1, 2)) / expected.max((1, 2))
    worst = galaxies[flux.argmax()], galaxies[pixel.argmax()]
    assert flux.max() < min(limit, 1e-3), f"flux {flux.max():.1e} at {worst[0]}"
    assert pixel.max() < limit, f"pixel {pixel.max():.1e} at {worst[1]}"


@pytest.mark.parametrize(
    "kind", ["oversampled", "oversampled, even", "pixel-free", "pixel-free, even"]
)
def test_galsim(sky, truth, kind):
    galaxies, expected = truth
    params = np.column_stack([np.ones(len(galaxies)), galaxies])
    images = SersicGalaxy2D(psf=sky.psf(kind)).render((SIZE, SIZE), params=params)
    assert_same_images(images, expected, galaxies, 1e-3)


@pytest.mark.parametrize(("kind", "limit"), [("native", 1e-3), ("native, even", 3e-3)])
def test_galsim_with_native_samples(sky, truth, kind, limit):
    """Three samples across the half maximum lose next to nothing."""
    galaxies, expected = truth
    params = np.column_stack([np.ones(len(galaxies)), galaxies])
    images = SersicGalaxy2D(psf=sky.psf(kind)).render((SIZE, SIZE), params=params)
    assert_same_images(images, expected, galaxies, limit)


def test_galsim_with_a_model_as_psf(sky):
    """Its values are taken to hold the pixel: GalSim's PSF is the profile itself."""
    galaxies = np.array(list(grid_of_galaxies()))[1::3]
    expected = np.array([sky.draw(*g, psf=sky.light) for g in galaxies])
    params = np.column_stack([np.ones(len(galaxies)), galaxies])
    images = SersicGalaxy2D(psf=sky.moffat).render((SIZE, SIZE), params=params)
    assert_same_images(images, expected, galaxies, 1e-3)


@pytest.mark.parametrize(("fwhm", "native_limit"), [(2.0, 1e-2), (1.6, 3e-2)])
def test_galsim_under_a_sharp_psf(fwhm, native_limit):
    """An oversampled PSF is as exact as ever; a native one is not, and only for small galaxies."""
    sky = _Sky(fwhm)
    galaxies = np.array(list(grid_of_galaxies()))
    galaxies = galaxies[np.isin(galaxies[:, 2], (1, 3))][::2]
    expected = np.array([sky.draw(*g) for g in galaxies])
    params = np.column_stack([np.ones(len(galaxies)), galaxies])
    for kind, limit in (
        ("oversampled", 1e-3),
        ("pixel-free", 1e-3),
        ("native", native_limit),
    ):
        images = SersicGalaxy2D(psf=sky.psf(kind)).render((SIZE, SIZE), params=params)
        assert_same_images(images, expected, galaxies, limit)


# -- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "centre"),
    [
        ((64, 64), (31.5, 31.5)),
        ((31, 47), (20.3, 14.8)),
        ((5, 7), (3.1, 1.9)),
        ((1, 1), (0.2, -0.3)),
        ((1, 40), (19.7, 0.1)),
        ((32, 32), (-4.0, 36.5)),
        ((200, 300), (260.2, 30.9)),
    ],
)
@pytest.mark.parametrize("n_column", [True, False], ids=["Sersic", "Gaussian"])
def test_gaussian_of_any_shape_anywhere(shape, centre, n_column):
    """Gaussian on Gaussian is a Gaussian: any stamp, the centre outside it as well."""
    covariance = np.array([[9.0, 2.0], [2.0, 4.0]])
    gaussian = GaussianGalaxy2D.from_covariance(50.0, *centre, covariance)
    if n_column:
        g = gaussian
        model = SersicGalaxy2D(50, *centre, g.r_eff.value, 0.5, g.ellip.value, g.theta.value)
    else:
        model = gaussian
    model.psf = gaussian_psf(1.3, 21)
    expected = gaussian_image(shape, *centre, covariance + 1.3**2 * np.eye(2), 50.0)
    peak = 50 / (2 * np.pi * np.sqrt(np.linalg.det(covariance + 1.3**2 * np.eye(2))))
    assert np.abs(model.render(shape) - expected).max() < 2e-5 * peak


@pytest.mark.parametrize("size", [24, 25])
def test_point_source_is_the_psf(size):
    psf = gaussian_psf(1.4, size)
    star = PointSource2D(3.0, 20.0, 18.0, psf=psf)
    shape = (37, 41)
    expected = gaussian_image(shape, 20, 18, 1.4**2 * np.eye(2), 3)
    # between the samples, what waves beyond the pixels' hold of this Gaussian: exp(-σ² π² / 2)
    assert np.abs(star.render(shape) - expected).max() < 1e-4 * expected.max()
    if size % 2:  # on a pixel, the very samples
        patch = star.render(shape)[18 - 12 : 18 + 13, 20 - 12 : 20 + 13]
        np.testing.assert_allclose(patch, 3 * psf.data, atol=1e-12)


def test_asymmetric_psf_is_not_mirrored():
    """An L of three pixels comes out where it is: up is up and right is right."""
    kernel = np.zeros((5, 5))
    kernel[2, 2], kernel[2, 4], kernel[3, 2] = 4, 2, 1
    image = PointSource2D(7, 6, 5, psf=kernel).render((12, 13))
    expected = np.zeros((12, 13))
    expected[5, 6], expected[5, 8], expected[6, 6] = 4, 2, 1
    np.testing.assert_allclose(image, expected, atol=1e-12)


def test_small_galaxy_is_a_point():
    psf = gaussian_psf()
    star = PointSource2D(1, 20.3, 19.6, psf=psf).render((41, 41))
    galaxy = SersicGalaxy2D(1, 20.3, 19.6, 0.05, 1.0, psf=psf).render((41, 41))
    assert np.abs(star - galaxy).max() < 2e-3 * star.max()


@pytest.mark.parametrize("n", [0.5, 1.0, 4.0])
def test_no_psf_is_a_pixel_free_point(n):
    """Integrated over the pixels exactly, or through the PSF that does only that."""
    values = dict(flux=10, x_0=30.2, y_0=31.4, r_eff=4, n=n, ellip=0.4, theta=0.7)
    exact = SersicGalaxy2D(**values).render((64, 64))
    # a delta function sampled finely; the pixel is what limits the waves
    fine = np.zeros((33, 33))
    fine[16, 16] = 1
    point = PSF(fine, oversampling=11, includes_pixel=False)
    waves = SersicGalaxy2D(**values, psf=point).render((64, 64))
    limit = {0.5: 1e-4, 1.0: 5e-3, 4.0: 2e-2}[n]  # a cusp holds waves of any length
    assert np.abs(exact - waves).max() < limit * exact.max()


# -- what must hold for any profile ---------------------------------------------------------------

MODELS = {
    "gaussian": GaussianGalaxy2D(20, 15.3, 14.1, 3.0, 0.35, 0.6),
    "sersic": SersicGalaxy2D(20, 15.3, 14.1, 3.0, 2.3, 0.35, 0.6),
    "steep": SersicGalaxy2D(20, 15.3, 14.1, 3.0, 5.5, 0.6, -1.2),
    "flat": SersicGalaxy2D(20, 15.3, 14.1, 5.0, 0.4, 0.2, 2.0),
    "bulge and disk": BulgeDiskGalaxy2D(20, 15.3, 14.1, 0.3, 1.5, 3.0, 0.2, 0.3, 4.0, 0.5, 1.0),
    "point": PointSource2D(20, 15.3, 14.1),
}
WITH_AND_WITHOUT = [
    pytest.param(name, psf, id=f"{name}, {'PSF' if psf else 'no PSF'}")
    for name in MODELS
    for psf in (True, False)
    if psf or name != "point"
]


def make(name, psf=True, **changes):
    model = MODELS[name].copy()
    if psf:
        model.psf = Moffat2D(1, 0, 0, 2.0, 3.0)
    for parameter, value in changes.items():
        setattr(model, parameter, value)
    return model


@pytest.mark.parametrize(("name", "psf"), WITH_AND_WITHOUT)
def test_linear_in_the_flux(name, psf):
    one, many = make(name, psf, flux=1.0), make(name, psf, flux=-3e7)
    np.testing.assert_allclose(-3e7 * one.render((30, 33)), many.render((30, 33)), rtol=1e-10)


def test_bulge_and_disk_is_the_sum_of_its_parts():
    whole = make("bulge and disk")
    p = {name: getattr(whole, name).value for name in whole.param_names}
    bulge = SersicGalaxy2D(
        6.0, p["x_0"], p["y_0"], p["r_bulge"], 3.0, p["ellip_bulge"], p["theta_bulge"]
    )
    disk = SersicGalaxy2D(
        14.0, p["x_0"], p["y_0"], p["r_disk"], 1.0, p["ellip_disk"], p["theta_disk"]
    )
    bulge.psf = disk.psf = whole.psf
    expected = bulge.render((30, 33)) + disk.render((30, 33))
    np.testing.assert_allclose(whole.render((30, 33)), expected, atol=1e-9 * expected.max())


@pytest.mark.parametrize(("name", "psf"), WITH_AND_WITHOUT)
def test_one_pixel_further(name, psf):
    """A shift of the centre by whole pixels shifts the image, exactly."""
    here = make(name, psf).render((30, 33))
    there = make(name, psf, x_0=17.3, y_0=11.1).render((30, 33))
    peak = here.max()
    assert np.abs(there[:-3, 2:] - here[3:, :-2]).max() < 1e-4 * peak


@pytest.mark.parametrize(("name", "psf"), WITH_AND_WITHOUT)
def test_a_larger_stamp_shows_the_same(name, psf):
    small = make(name, psf).render((30, 33))
    large = make(name, psf, x_0=15.3 + 20, y_0=14.1 + 11).render((70, 75))
    assert np.abs(large[11:41, 20:53] - small).max() < 1e-4 * small.max()


@pytest.mark.parametrize("name", MODELS)
def test_quarter_turn(name):
    """Turning every angle by 90 degrees turns the image: x and y are treated alike."""
    model = make(name, x_0=15.0, y_0=15.0)
    turned = model.copy()
    for parameter in turned.param_names:
        if parameter.startswith("theta"):
            setattr(turned, parameter, getattr(turned, parameter).value + np.pi / 2)
    # counter-clockwise with y upwards: (x, y) -> (-y, x)
    expected = np.rot90(model.render((31, 31)), -1)
    assert np.abs(turned.render((31, 31)) - expected).max() < 1e-6 * expected.max()


@pytest.mark.parametrize("shape", [(200, 300), (1, 1), (5, 7)])
def test_flux_is_conserved(shape):
    """What is off the stamp is what is missing: no wrapped light, whatever the stamp."""
    middle = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    model = SersicGalaxy2D(1, *middle, 8.0, 4.0, 0.3, 0.5, psf=gaussian_psf())
    without = SersicGalaxy2D(1, *middle, 8.0, 4.0, 0.3, 0.5)
    # the PSF hardly moves light across the edge of a large stamp
    inside = without.render(shape).sum()
    if min(shape) > 50:
        assert abs(model.render(shape).sum() - inside) < 1e-3
    else:
        wide = model.copy()
        wide.x_0, wide.y_0 = 100.0, 100.0
        image = wide.render((201, 201))
        half = shape[0] // 2, shape[1] // 2
        patch = image[100 - half[0] : 101 + half[0], 100 - half[1] : 101 + half[1]]
        np.testing.assert_allclose(model.render(shape), patch, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision(name):
    model = make(name)
    double, single = (model.render((30, 33), dtype=d) for d in ("float64", "float32"))
    assert double.dtype == np.float64
    difference = np.abs(double - single).max()
    assert 0 < difference < 2e-5 * double.max()


def test_each_galaxy_its_own_psf():
    """As if each were drawn alone, PSFs of several sizes together."""
    psfs = [gaussian_psf(1.0, 15), gaussian_psf(1.6, 25), gaussian_psf(2.2, 25)]
    params = np.array(
        [
            [1, 16, 15, 2, 1, 0.1, 0],
            [2, 14.5, 15.5, 3, 4, 0.4, 1],
            [3, 15.1, 16, 1, 0.6, 0.7, 2],
        ]
    )
    together = SersicGalaxy2D().render((31, 32), params=params, psf=psfs)
    for image, row, psf in zip(together, params, psfs, strict=True):
        alone = SersicGalaxy2D(*row, psf=psf).render((31, 32))
        assert np.abs(image - alone).max() < 1e-5 * alone.max()
    assert (
        np.abs(together[0] - SersicGalaxy2D(*params[0], psf=psfs[2]).render((31, 32))).max() > 0.01
    )


def test_psfs_of_different_kinds():
    """Odd with even, native with oversampled: drawn all the same, or refused in words."""
    psfs = [gaussian_psf(1.5, 25), gaussian_psf(1.5, 24)]
    params = np.tile([1, 15.2, 15, 2, 1, 0.1, 0], (2, 1))
    with pytest.raises(ValueError, match="odd or all be even"):
        SersicGalaxy2D().render((31, 32), params=params, psf=psfs)
    psfs[1] = gaussian_psf(1.5, 101, oversampling=4)
    with pytest.raises(ValueError, match="share their oversampling"):
        SersicGalaxy2D().render((31, 32), params=params, psf=psfs)


def test_rows_that_are_not_finite_do_not_hurt_others():
    params = np.tile([1, 15.2, 15, 2, 1, 0.1, 0.0], (3, 1))
    params[1, 3] = np.nan
    for psf in (gaussian_psf(), [gaussian_psf()] * 3):
        images = SersicGalaxy2D().render((31, 32), params=params, psf=psf)
        assert np.isnan(images[1]).all()
        assert np.isfinite(images[[0, 2]]).all()
        np.testing.assert_array_equal(images[0], images[2])


# -- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "psf"), WITH_AND_WITHOUT)
def test_fit_deriv(name, psf):
    """Central differences, extrapolated to steps of zero, parameter by parameter."""
    model = make(name, psf)
    y, x = np.mgrid[:29, :31]
    exact = model.fit_deriv(x, y, *model.parameters)
    # without a PSF images are exact to 1e-6 of the peak, and their differences less so
    step, limit = (2e-3, 1e-5) if psf else (0.06, 2e-4)
    assert len(exact) == len(model.param_names)

    def image(i, step):
        params = model.parameters.copy()
        params[i] += step
        return model.evaluate(x, y, *params)

    for i, parameter in enumerate(model.param_names):
        a, b, c = ((image(i, h) - image(i, -h)) / (2 * h) for h in (step, step / 2, step / 4))
        expected = (16 * (4 * c - b) - (4 * b - a)) / 45
        error = np.abs(exact[i] - expected).max() / np.abs(expected).max()
        assert error < limit, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("n", [None, 0.5, 1.7])
def test_autograd(n):
    """Derivatives by backpropagation, through PSF, repetitions and tail."""
    transfer = make_transfer(gaussian_psf(1.2, 9), (9, 10))
    renderer = FourierRenderer((9, 10), transfer)
    shape = torch.tensor([[6.0, 1.0, 3.0], [2.0, -0.5, 4.0]], dtype=torch.float64)
    index = torch.tensor([1.3, 3.1], dtype=torch.float64) if n is None else n
    weight = torch.tensor([0.4, 0.9], dtype=torch.float64)
    x_0 = torch.tensor([4.2, 5.1], dtype=torch.float64)
    y_0 = torch.tensor([3.9, 4.4], dtype=torch.float64)
    inputs = [shape, weight, x_0, y_0] + ([index] if n is None else [])
    for tensor in inputs:
        tensor.requires_grad_()

    def image(shape, weight, x_0, y_0, *rest):
        parts = [Component(shape, rest[0] if rest else n, weight), Component(None)]
        return renderer(parts, x_0, y_0).image

    assert torch.autograd.gradcheck(image, inputs, eps=1e-5, atol=1e-6, rtol=1e-4)


def test_derivatives_of_the_renderer_are_those_of_autograd():
    transfer = make_transfer(gaussian_psf(1.2, 9), (12, 10))
    renderer = FourierRenderer((12, 10), transfer)
    values = torch.tensor([4.2, 5.1, 6.0, 1.0, 3.0, 2.2], dtype=torch.float64)

    def image(v):
        return renderer([Component(v[None, 2:5], v[5:6])], v[:1], v[1:2]).image[0]

    with torch.no_grad():
        parts = [Component(values[None, 2:5], values[5:6])]
        exact = renderer(parts, values[:1], values[1:2], derivatives=True).derivatives[0]
    expected = torch.autograd.functional.jacobian(image, values).permute(2, 0, 1)
    # the cubic pieces of the table are not quite each other's derivative in n
    assert (exact - expected).abs().amax((1, 2)).max() < 1e-6 * expected.abs().max()


def test_grid_and_its_derivatives_have_the_shapes_they_say():
    model = make("bulge and disk")
    params = np.tile(model.parameters, (3, 1))
    images, slopes = evaluate_grid(
        model.ellipses(), model.param_names, params, (9, 11), psf=model.psf, derivatives=True
    )
    assert images.shape == (3, 9, 11)
    assert slopes.shape == (3, 11, 9, 11)


def test_render_leaves_torch_as_it_was():
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    make("sersic").render((20, 20))
    after = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    assert before == after


def test_galaxy_larger_than_its_stamp():
    """A galaxy of which only the middle is seen, against a stamp that holds all of it."""
    psf = Gaussian2D(1, 0, 0, 1.3, 1.3)
    small = SersicGalaxy2D(1, 7.2, 7.9, 30, 1.5, 0.3, 0.4, psf=psf).render((16, 16))
    large = SersicGalaxy2D(1, 107.2, 107.9, 30, 1.5, 0.3, 0.4, psf=psf).render((216, 216))
    assert np.abs(small - large[100:116, 100:116]).max() < 1e-3 * small.max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_gpu(name):
    model = make(name)
    expected = model.render((30, 33))
    image = model.render((30, 33), device="cuda")
    assert np.abs(image - expected).max() < 1e-9 * expected.max()


# -- learned galaxies ---------------------------------------------------------------------------


def learned_with_structure(r_50):
    """A galaxy with arms as sharp as the spline of the network can be, and a steep cusp."""
    from galmorph import LearnedGalaxy2D
    from galmorph.nets.learned import LearnedShape, galmorph_preset

    torch.manual_seed(5)
    vae = galmorph_preset(latent_dim=4)
    with torch.no_grad():
        rough = torch.randn(4, 1, 24, 24)
        fine = torch.nn.functional.interpolate(rough, (48, 48), mode="bicubic", align_corners=True)
        vae.decoder.draw.weight.copy_(0.3 * fine.flatten(1).T)
    z = (0.7, 0.3, 1.0, -1.0)
    return LearnedGalaxy2D(1.0, 16.3, 15.6, r_50, 0.6, *z, shape=LearnedShape(vae))


@pytest.mark.parametrize("r_50", [1.2, 2.5, 5.0, 11.0])
def test_learned_galaxy_by_brute_force(r_50):
    """Pixels are sums over points, dense at the centre, of light times a Gaussian PSF."""
    from galmorph.rendering.learned import REACH, canonical_light
    from galmorph.rendering.learned_model import to_profile

    galaxy, sigma = learned_with_structure(r_50), 1.1
    image = galaxy.render((32, 32), psf=gaussian_psf(sigma, 25))
    decoder = galaxy.shape.decoder(torch.float64)
    with torch.no_grad():
        geometry, flux, z = to_profile(decoder, torch.as_tensor(galaxy.parameters[None]))
        # evenly spaced in angle, and in the root of the radius
        root = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        psi = 2 * np.pi * (torch.arange(360, dtype=torch.float64) + 0.5) / 360
        u, psi = (a.flatten() for a in torch.meshgrid(REACH * root**2, psi, indexing="ij"))
        points = torch.stack([u * torch.cos(psi), u * torch.sin(psi)], 1)
        row = torch.zeros(len(u), dtype=torch.long)
        whole, profile = canonical_light(geometry, points, row, decoder.coefficients(z))
        area = 2 * REACH * root.repeat_interleave(360) / 400 * u * 2 * np.pi / 360
        missed = (whole - profile) * area * geometry.r**2 * geometry.q * flux
        x, y = (c[0].numpy() for c in geometry.from_canonical(points))
    pixels = np.arange(32)
    by_x, by_y = (
        np.exp(-0.5 * ((pixels[:, None] - c) / sigma) ** 2) / (np.sqrt(2 * np.pi) * sigma)
        for c in (x, y)
    )
    expected = (by_y * missed.numpy()) @ by_x.T
    # where what is missed is nothing there is a Sérsic profile
    n, q, r = (float(v[0]) for v in (geometry.n, geometry.q, geometry.r))
    sersic = SersicGalaxy2D(float(flux[0]), 16.3, 15.6, r, n, 1 - q, 0.6)
    expected += sersic.render((32, 32), psf=gaussian_psf(sigma, 25))
    assert np.abs(image - expected).max() < 1e-3 * expected.max()
    if r_50 < 3:  # the stamp holds what is missed
        assert abs(image.sum() - expected.sum()) < 1e-3


def test_learned_flux_of_a_large_image():
    """The flux is the light of the image, whatever the structure and the sampling."""
    psf = gaussian_psf(1.3)
    for r_50 in (1.5, 3.0):
        galaxy = learned_with_structure(r_50)
        galaxy.x_0 = galaxy.y_0 = 120.0
        image = galaxy.render((241, 241), psf=psf)
        decoder = galaxy.shape.decoder(torch.float64)
        n, _ = decoder.profile(torch.as_tensor(galaxy.parameters[None, 5:]))
        # of the profile, which alone reaches so far, some is beyond
        beyond = (
            1 - SersicGalaxy2D(1, 120, 120, r_50, float(n[0]), 0).render((241, 241), psf=psf).sum()
        )
        assert abs(image.sum() - 1) < 1e-3 + 2 * beyond


# -- the ends of the range ----------------------------------------------------------------------


@pytest.mark.parametrize("n", [0.3, 0.5, 2.0, 8.0])
@pytest.mark.parametrize(("r_eff", "ellip"), [(1.0, 0.3), (6.0, 0.8), (4.0, 0.0)])
def test_convolution_by_brute_force(n, r_eff, ellip):
    """Pixel-integrated light on a fine grid, convolved with the samples of a Gaussian PSF."""
    from scipy.signal import fftconvolve

    fine, half, sigma = 5, 12, 1.4
    size = 2 * half + 1
    # cells of a fifth of a pixel, out to where the PSF brings no more light in
    reach = (half + 10) * fine + fine // 2
    cells = 2 * reach + 1
    centre = 0.3, -0.2
    light = SersicGalaxy2D(
        1, reach + centre[0] * fine, reach + centre[1] * fine, r_eff * fine, n, ellip, 0.6
    ).render((cells, cells))
    at = np.arange(-50, 51) / fine
    kernel = np.exp(-0.5 * (at[:, None] ** 2 + at**2) / sigma**2)
    kernel /= 2 * np.pi * sigma**2
    blurred = fftconvolve(light, kernel, mode="same")
    middle = reach + fine * np.arange(-half, half + 1)
    expected = blurred[np.ix_(middle, middle)]
    # the cells widen the light by their own variance
    psf = gaussian_psf(np.sqrt(sigma**2 + 1 / (12 * fine**2)), 4 * 61 + 1, oversampling=4)
    model = SersicGalaxy2D(1, half + centre[0], half + centre[1], r_eff, n, ellip, 0.6, psf=psf)
    image = model.render((size, size))
    assert np.abs(image - expected).max() < 1e-3 * expected.max()


@pytest.mark.parametrize("psf", [True, False], ids=["PSF", "no PSF"])
@pytest.mark.parametrize(
    "changes",
    [
        {"r_eff": 1e-6},
        {"r_eff": 0.0},
        {"r_eff": 1e4},
        {"n": 0.1},
        {"n": 30.0},
        {"ellip": 1.0},
        {"ellip": 0.9999},
        {"flux": 0.0},
        {"flux": -1e30},
        {"x_0": -3e3},
        {"x_0": 400.0, "y_0": -400.0},
        {"theta": 1e6},
    ],
    ids=str,
)
def test_extreme_parameters_give_numbers(psf, changes):
    """A fitter may ask for anything: the answer is finite, and its derivatives are too."""
    model = make("sersic", psf, **changes)
    image = model.render((20, 22))
    assert np.isfinite(image).all()
    assert np.abs(image.sum()) <= 1.01 * abs(model.flux.value)
    y, x = np.mgrid[:20, :22]
    for slope in model.fit_deriv(x, y, *model.parameters):
        assert np.isfinite(slope).all()
