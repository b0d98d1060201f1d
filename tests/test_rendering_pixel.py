"""Pixel-integrated Sérsic profiles, against closed forms, brute force and GalSim."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammainc, gammaincinv, gammaln

torch = pytest.importorskip("torch")

from galmorph.rendering.pixel import (  # noqa: E402
    sersic_pixel_flux,
    sersic_pixel_flux_jacobian,
)

NAMES = ("x_0", "y_0", "r_eff", "n", "ellip", "theta")

# x_0, y_0, r_eff, n, ellip, theta
GALAXIES = {
    "disk": (0.2, -0.3, 4.0, 1.0, 0.3, 0.5),
    "de Vaucouleurs in a corner": (0.5, 0.5, 5.0, 4.0, 0.4, 2.2),
    "steep, on an edge": (0.5, 0.1, 20.0, 8.0, 0.2, -0.7),
    "tiny": (0.1, 0.4, 0.1, 1.0, 0.0, 0.0),
    "tiny, cuspy, centred": (0.0, 0.0, 0.3, 5.5, 0.8, 1.0),
    "hard-edged": (-0.4, 0.3, 1.0, 0.3, 0.5, 0.2),
    "needle": (0.5, -0.3, 10.0, 0.5, 0.95, 0.0),
    "oblique needle": (0.5, 0.5, 7.0, 0.41, 0.95, -2.06),
    "huge": (0.0, 0.0, 50.0, 2.5, 0.6, 3.0),
    "small hard-edged needle": (0.53473, 0.4999995, 0.34, 0.36, 0.95, 0.0),
    "cusp beside an edge": (0.5 - 2e-3, 0.1, 5.0, 7.0, 0.0, 0.0),
    "almost on an edge": (0.5 - 1e-9, 0.5 + 1e-6, 3.0, 6.0, 0.7, 0.0),
}


def grid(half_x, half_y=None):
    """Positions of all pixels within so many pixels of the origin, flattened."""
    half_y = half_x if half_y is None else half_y
    y, x = np.mgrid[-half_y : half_y + 1, -half_x : half_x + 1].astype(float)
    return torch.tensor(x.ravel()), torch.tensor(y.ravel())


def brute_force(x, y, x_0, y_0, r_eff, n, ellip, theta):
    """Flux in one pixel: its brightness, on squares that shrink towards the centre."""
    minor = r_eff * (1 - ellip)
    b = gammaincinv(2 * n, 0.5)
    log_norm = 2 * n * np.log(b) - np.log(np.pi) - gammaln(2 * n + 1) - np.log(r_eff * minor)
    cos, sin = np.cos(theta), np.sin(theta)
    node, weight = np.polynomial.legendre.leggauss(12)
    node_x, node_y = np.meshgrid(node / 2, node / 2)
    weight = np.outer(weight, weight) / 4

    def radius(dx, dy):
        return np.hypot((cos * dx + sin * dy) / r_eff, (cos * dy - sin * dx) / minor)

    cells, size, flux = np.array([[x - x_0, y - y_0]]), 1.0, 0.0
    for _ in range(42):
        half = 0.5 * size * max(radius(1, 1), radius(1, -1))
        u = radius(*cells.T)
        steepness = b * u ** (1 / n) / n * half / np.maximum(u, 1e-30)
        dark = b * np.maximum(u - half, 0) ** (1 / n) > 50
        done = (u > 2.5 * half) & ((steepness < 3) | dark)
        dx, dy = cells[done].T[..., None, None]
        value = np.exp(log_norm - b * radius(dx + size * node_x, dy + size * node_y) ** (1 / n))
        flux += np.sum(value * weight) * size**2
        size /= 2
        corners = size / 2 * np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
        cells = (cells[~done][:, None] + corners).reshape(-1, 2)
    return flux


@pytest.mark.parametrize("params", GALAXIES.values(), ids=GALAXIES)
def test_against_brute_force(params):
    x, y = grid(3)
    far = torch.tensor([7.0, -12.0, 25.0])
    x, y = torch.cat((x, far)), torch.cat((y, far.flip(0)))
    image = sersic_pixel_flux(x, y, *params)[0].numpy()
    expected = np.array([brute_force(a, b, *params) for a, b in zip(x, y, strict=True)])
    assert np.abs(image - expected).max() < 5e-6 * expected.max()


@pytest.mark.parametrize("x_0", [0.0, 0.5, 0.123])
@pytest.mark.parametrize(("r_eff", "ellip"), [(0.2, 0.0), (1.5, 0.5), (12.0, 0.9)])
def test_gaussian_closed_form(x_0, r_eff, ellip):
    y_0 = -0.37
    x, y = grid(10)
    image = sersic_pixel_flux(x, y, x_0, y_0, r_eff, 0.5, ellip, 0.0)[0]

    def inside(position, half_light):
        scale = math.sqrt(math.log(2)) / half_light  # exp(-ln2 u²)
        low, high = ((position + side) * scale for side in (-0.5, 0.5))
        return 0.5 * (torch.erf(high) - torch.erf(low))

    expected = inside(x - x_0, r_eff) * inside(y - y_0, r_eff * (1 - ellip))
    assert (image - expected).abs().max() < 1e-6 * expected.max()


@pytest.mark.parametrize(
    ("n", "r_eff", "ellip", "theta", "center"),
    [
        (0.5, 2.0, 0.4, 0.6, (0.2, 0.1)),
        (1.0, 3.0, 0.3, 2.0, (0.5, 0.5)),
        (2.5, 4.0, 0.6, -0.5, (0.0, 0.0)),
        (4.0, 5.0, 0.2, 1.1, (0.3, -0.4)),
        (6.0, 6.0, 0.5, 0.3, (0.5, -0.25)),
    ],
)
def test_against_galsim(n, r_eff, ellip, theta, center):
    galsim = pytest.importorskip("galsim")
    axis_ratio = 1 - ellip
    precise = galsim.GSParams(realspace_relerr=1e-7, realspace_abserr=1e-9)
    galaxy = galsim.Sersic(n=n, half_light_radius=r_eff * math.sqrt(axis_ratio), gsparams=precise)
    galaxy = galaxy.shear(q=axis_ratio, beta=theta * galsim.radians).shift(*center)
    # the convolution with the pixel in real space: exact at the cusp, unlike FFTs
    square = galsim.Convolve(galaxy, galsim.Pixel(1.0), real_space=True, gsparams=precise)
    half = 2
    image = galsim.Image(2 * half + 1, 2 * half + 1, dtype=float)
    square.drawImage(image, scale=1.0, method="no_pixel")
    ours = sersic_pixel_flux(*grid(half), *center, r_eff, n, ellip, theta)[0].numpy()
    assert np.abs(ours - image.array.ravel()).max() < 1e-5 * ours.max()


@pytest.mark.parametrize("n", [0.5, 1.0, 4.0, 8.0])
def test_total_flux(n):
    # the square of 61 pixels lies between two circles, whose flux is known
    r_eff = 4.0
    total = float(sersic_pixel_flux(*grid(30), 0.0, 0.0, r_eff, n, 0.0, 0.0).sum())
    b = gammaincinv(2 * n, 0.5)
    inner, outer = (gammainc(2 * n, b * (30.5 * f / r_eff) ** (1 / n)) for f in (1.0, math.sqrt(2)))
    assert inner - 1e-6 < total < outer + 1e-6


@given(
    x_0=st.floats(-0.5, 0.5),
    y_0=st.floats(-0.5, 0.5),
    r_eff=st.floats(0.1, 20),
    n=st.floats(0.3, 8),
    ellip=st.floats(0, 0.95),
    theta=st.floats(-3.2, 3.2),
)
def test_pixel_is_the_sum_of_its_quarters(x_0, y_0, r_eff, n, ellip, theta):
    x, y = grid(2)
    whole = sersic_pixel_flux(x, y, x_0, y_0, r_eff, n, ellip, theta)
    quarters = sum(
        sersic_pixel_flux(2 * x + i, 2 * y + j, 2 * x_0, 2 * y_0, 2 * r_eff, n, ellip, theta)
        for i in (-0.5, 0.5)
        for j in (-0.5, 0.5)
    )
    assert (whole - quarters).abs().max() < 2e-5 * whole.max()


@pytest.mark.parametrize("n", [0.3, 1.0, 4.0, 8.0])
def test_four_pixels_around_a_corner_are_equal(n):
    x, y = (torch.tensor(t) for t in ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]))
    image = sersic_pixel_flux(x, y, 0.5, 0.5, 2.0, n, 0.0, 0.4)[0]
    assert float(image.max() - image.min()) < 1e-7 * float(image.max())


@pytest.mark.parametrize("y_0", [0.5, 0.0, 0.3])
@pytest.mark.parametrize("n", [0.5, 4.0, 7.0])
def test_continuous_where_the_centre_crosses_an_edge(n, y_0):
    x, y = grid(2)
    x_0 = 0.5 + torch.tensor([-1e-7, -1e-10, -1e-14, 0.0, 1e-14, 1e-10, 1e-7])
    images, slopes = sersic_pixel_flux_jacobian(x, y, x_0, y_0, 3.0, n, 0.3, 0.7)
    assert torch.isfinite(slopes).all()
    # The images may differ by no more than the slope allows.
    assert (images - images[3]).abs().max() < 2e-7 * slopes[3].abs().max() + 1e-6 * images.max()
    change = (slopes - slopes[3]).abs().amax(2) / slopes[3].abs().amax(1)
    assert change.max() < 2e-3


@pytest.mark.parametrize("params", GALAXIES.values(), ids=GALAXIES)
def test_jacobian_is_the_slope(params):
    # Not at a cusp on an edge, where differences of finite steps say little.
    params = np.array(params, dtype=float)
    params[:2] = np.clip(params[:2], -0.4, 0.4)
    x, y = grid(5)
    image, slopes = sersic_pixel_flux_jacobian(x, y, *params)
    assert torch.equal(image, sersic_pixel_flux(x, y, *params))
    assert slopes.shape == (1, 6, len(x))
    scale = np.array([params[2], params[2], params[2], params[3], 1.0, 1.0]) * (1 - params[4])
    for k, name in enumerate(NAMES):
        step = np.eye(6)[k] * 2e-3 * np.minimum(scale, 1.0)
        if name == "ellip" and params[4] == 0:
            continue  # a negative ellipticity is no galaxy's
        f = [sersic_pixel_flux(x, y, *(params + m * step))[0] for m in (-2, -1, 1, 2)]
        expected = (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * step[k])
        # the rules' own error, divided by the step
        noise = 2e-6 * float(image.max()) / step[k]
        error = (slopes[0, k] - expected).abs().max()
        assert error < 1e-3 * expected.abs().max() + noise, name


# the first use of forward mode compiles scripts inside torch, which warns about itself
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jacobian_agrees_with_autograd():
    x, y = grid(6)
    rows = [GALAXIES[k] for k in ("disk", "steep, on an edge", "oblique needle")]
    params = [p.requires_grad_() for p in torch.tensor(rows, dtype=torch.float64).T.clone()]
    weight = torch.cos(torch.arange(3 * len(x), dtype=torch.float64)).reshape(3, -1)
    image, slopes = sersic_pixel_flux_jacobian(x, y, *params)
    assert not slopes.requires_grad
    direct = sersic_pixel_flux(x, y, *params)
    assert torch.equal(image, direct)
    gradient = torch.autograd.grad((weight * direct).sum(), params)
    expected = (weight[:, None] * slopes).sum(-1).T
    torch.testing.assert_close(torch.stack(gradient), expected, rtol=1e-9, atol=1e-12)
    # forward mode, in one direction
    direction = tuple(torch.full_like(p, 0.1 * (i + 1)) for i, p in enumerate(params))
    _, tangent = torch.func.jvp(
        lambda *p: sersic_pixel_flux(x, y, *p), tuple(p.detach() for p in params), direction
    )
    along = 0.1 * torch.arange(1, 7, dtype=torch.float64)
    torch.testing.assert_close(tangent, along @ slopes, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    x, y = grid(2, 1)
    rows = [(0.2, -0.3, 2.0, 1.3, 0.3, 0.5), (0.31, 0.12, 3.0, 4.0, 0.5, 2.0)]
    params = [p.requires_grad_() for p in torch.tensor(rows, dtype=torch.float64).T.clone()]
    assert torch.autograd.gradcheck(
        lambda *p: sersic_pixel_flux(x, y, *p), params, eps=1e-6, atol=1e-6, rtol=1e-4
    )


def test_batch_is_the_same_as_one_by_one():
    x, y = grid(20)
    rows = torch.tensor(list(GALAXIES.values()), dtype=torch.float64)
    images, slopes = sersic_pixel_flux_jacobian(x, y, *rows.T)
    for row, image, slope in zip(rows, images, slopes, strict=True):
        alone, alone_slope = sersic_pixel_flux_jacobian(x, y, *row)
        torch.testing.assert_close(image, alone[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(slope, alone_slope[0], rtol=1e-9, atol=1e-12)


def test_positions_of_each_galaxy_and_off_the_grid():
    x, y = grid(4)
    shift = torch.tensor([[0.0], [3.3]])
    image = sersic_pixel_flux(x + shift, y - shift, shift[:, 0], -shift[:, 0], 2.0, 1.5, 0.2, 0.3)
    torch.testing.assert_close(image[0], image[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("position", "value"),
    [(2, 0.0), (2, -1.0), (3, 0.0), (3, math.nan), (4, 1.0), (0, math.nan), (5, math.nan)],
)
def test_no_galaxy_is_nan_and_does_not_spoil_the_batch(position, value):
    x, y = grid(3)
    rows = torch.tensor([GALAXIES["disk"]] * 2, dtype=torch.float64)
    good = sersic_pixel_flux(x, y, *rows[0])
    rows[1, position] = value
    images, slopes = sersic_pixel_flux_jacobian(x, y, *rows.T)
    torch.testing.assert_close(images[:1], good)
    assert torch.isfinite(slopes[0]).all()
    assert torch.isnan(images[1]).all()
    assert torch.isnan(sersic_pixel_flux(x, y, *rows.T)[1]).all()


def test_shapes_that_do_not_fit():
    x, y = grid(2)
    disk = GALAXIES["disk"]
    with pytest.raises(ValueError, match="same shape"):
        sersic_pixel_flux(x, y[1:], *disk)
    with pytest.raises(ValueError, match="galaxies"):
        sersic_pixel_flux(torch.stack((x, x)), torch.stack((y, y)), torch.zeros(3), *disk[1:])
    with pytest.raises(ValueError, match="parameters"):
        sersic_pixel_flux(x, y, torch.zeros(2, 2), *disk[1:])


def test_inference_mode_first():
    from galmorph.rendering import pixel

    pixel._line_rule.cache_clear()
    pixel._square_rule.cache_clear()
    x, y = grid(10)
    with torch.inference_mode():
        expected = sersic_pixel_flux(x, y, *GALAXIES["disk"])
    image, slopes = sersic_pixel_flux_jacobian(x, y, *GALAXIES["disk"])
    assert torch.equal(image, expected)
    assert slopes.abs().max() > 0


def test_no_pixels_and_single_precision():
    empty = torch.zeros(0)
    image, slopes = sersic_pixel_flux_jacobian(empty, empty, *GALAXIES["disk"])
    assert image.shape == (1, 0)
    assert slopes.shape == (1, 6, 0)
    assert sersic_pixel_flux(empty, empty, *GALAXIES["disk"]).shape == (1, 0)
    x, y = (t.float() for t in grid(1))
    assert sersic_pixel_flux(x, y, *GALAXIES["disk"]).dtype == torch.float64
