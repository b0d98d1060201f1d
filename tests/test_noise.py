"""The noise that is estimated from a stamp, and the likelihood of a pixel."""

import copy
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.ndimage import gaussian_filter

from galmorph import LearnedGalaxy2D, MAPFitter, SersicGalaxy2D, fit_images
from galmorph.noise import (
    CorrelatedNoise,
    GaussianNoise,
    LearnedNoise,
    NoiseModel,
    PoissonNoise,
    StudentTNoise,
    estimate_correlation,
    estimate_noise,
)


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e5])
def test_noise_of_a_blank_sky(rng, sigma):
    images = rng.normal(3 * sigma, sigma, (200, 41, 45))
    noise = estimate_noise(images)
    assert noise.shape == (200,)
    assert_allclose(noise.mean() / sigma, 1, atol=0.006)
    assert noise.std() / sigma < 0.04


@pytest.mark.parametrize("flux", [100, 10_000])
def test_galaxy_hardly_matters(rng, flux):
    galaxy = SersicGalaxy2D(flux=flux, x_0=32, y_0=32, r_eff=5, n=2, ellip=0.4).render((65, 65))
    noise = estimate_noise(rng.normal(0, 1, (100, 65, 65)) + galaxy)
    assert_allclose(noise.mean(), 1, atol=0.02)


def test_stars_in_the_outskirts_are_clipped(rng):
    images = rng.normal(0, 1, (100, 41, 41))
    images[:, 2:5, 2:5] += 100
    images[:, 36:39, 20] -= 100
    assert_allclose(estimate_noise(images).mean(), 1, atol=0.02)


def test_masked_and_infinite_pixels_are_left_out(rng):
    image = rng.normal(0, 1, (41, 41))
    expected = estimate_noise(image)
    mask = np.zeros(image.shape, bool)
    mask[:, :3] = True
    left_out = estimate_noise(image, mask)
    assert left_out != expected
    image[:, :3] = 1e30
    assert estimate_noise(image, mask) == left_out
    image[:, :3] = np.nan
    assert estimate_noise(image) == left_out


def test_inside_is_used_if_the_outskirts_are_masked(rng):
    image = rng.normal(0, 1, (41, 41))
    mask = np.ones(image.shape, bool)
    mask[10:30, 10:30] = False
    assert_allclose(estimate_noise(image, mask), 1, atol=0.15)


def test_nothing_to_see():
    assert estimate_noise(np.zeros((20, 20))) == 0
    assert np.isnan(estimate_noise(np.full((20, 20), np.nan)))
    assert np.isnan(estimate_noise(np.arange(6.0).reshape(2, 3)))


def test_wrong_shapes():
    with pytest.raises(ValueError, match="2-D or 3-D"):
        estimate_noise(np.zeros(5))
    with pytest.raises(ValueError, match="mask has shape"):
        estimate_noise(np.zeros((5, 5)), np.zeros((5, 6), bool))


def test_log_prob_is_a_density(rng):
    """Its exponential integrates to one over the data."""
    grid = np.linspace(-12, 14, 20001)[None]
    log_prob = GaussianNoise().log_prob(grid, 1.0, 1 / 1.7)
    assert_allclose(np.trapezoid(np.exp(log_prob), grid), 1)
    assert_allclose(grid[0, log_prob.argmax()], 1, atol=2e-3)


def test_log_prob_of_unused_pixels_is_exactly_zero():
    data = np.array([1.0, np.nan, np.inf, 1e300])
    with np.errstate(over="ignore", invalid="ignore"):
        values = GaussianNoise().log_prob(data, 0.0, [2.0, 0, 0, 0])
    assert_array_equal(values[1:], 0)
    assert_allclose(values[0], -2 - 0.5 * np.log(2 * np.pi) + np.log(2))


def exponential(dx, dy):
    """Correlation for which Vecchia's approximation is exact."""
    return 0.6 ** np.abs(dx) * 0.4 ** np.abs(dy)


def smooth(width):
    """Correlation of white noise under a Gaussian kernel."""
    return lambda dx, dy: np.exp(-(dx**2 + dy**2) / (4 * width**2))


def covariance(correlation, inv_sigma):
    """Dense covariance of the used pixels of an image."""
    y, x = np.nonzero(inv_sigma)
    rho = correlation(x[:, None] - x, y[:, None] - y)
    sigma = 1 / inv_sigma[y, x]
    return rho * sigma[:, None] * sigma


NOISES = [
    GaussianNoise(),
    GaussianNoise(scale=1.3, floor=0.4),
    GaussianNoise(scale=np.array([1.3, 0.7])[:, None, None]),
    PoissonNoise(gain=1.7, read_noise=2.0, background=3.0),
    PoissonNoise(gain=np.linspace(1, 2, 30).reshape(5, 6), background=4.0),
    StudentTNoise(3.0),
    CorrelatedNoise(exponential, radius=2),
]


@pytest.fixture
def stamps(rng):
    """Data, model and inverse sigma of two images with an unused corner and a bad pixel."""
    model = rng.uniform(2, 20, (2, 5, 6))
    sigma = rng.uniform(0.5, 3, model.shape)
    data = rng.normal(model, sigma)
    inv_sigma = 1 / sigma
    inv_sigma[0, :2, :3] = 0
    inv_sigma[1, 2, 4] = 0
    return data, model, inv_sigma


@pytest.mark.parametrize("noise", NOISES, ids=repr)
class TestEveryNoise:
    """What holds for all of them."""

    def test_unused_pixels(self, noise, stamps):
        data, model, inv_sigma = stamps
        expected = noise.log_prob(data, model, inv_sigma)
        assert expected.shape == data.shape
        assert np.all(expected[inv_sigma > 0] != 0)
        broken = np.where(inv_sigma > 0, data, np.nan)
        values = noise.log_prob(broken, model, inv_sigma)
        assert_array_equal(values[inv_sigma == 0], 0)
        assert_array_equal(values, expected)
        _, weight = noise.working(data, model, inv_sigma)
        assert_array_equal(weight > 0, inv_sigma > 0)

    def test_torch_agrees_and_has_a_gradient(self, noise, stamps):
        data, model, inv_sigma = stamps
        expected = noise.log_prob(data, model, inv_sigma)
        image = torch.tensor(model, requires_grad=True)
        broken = torch.tensor(np.where(inv_sigma > 0, data, np.nan))
        values = noise.log_prob(broken, image, torch.tensor(inv_sigma))
        assert_allclose(values.detach().numpy(), expected, rtol=1e-12)
        (gradient,) = torch.autograd.grad(values.sum(), image)
        assert_array_equal(gradient.numpy()[inv_sigma == 0], 0)
        step = 1e-5
        for at in [(0, 3, 2), (1, 2, 3), (1, 0, 0), (0, 0, 3)]:
            up, down = model.copy(), model.copy()
            up[at] += step
            down[at] -= step
            high, low = (noise.log_prob(data, m, inv_sigma).sum() for m in (up, down))
            assert_allclose(gradient[at], (high - low) / (2 * step), rtol=1e-6, atol=1e-8)

    # torch itself, at the first forward derivative
    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
    def test_torch_transforms(self, noise, stamps):
        """Forward derivatives and batches of models, as samplers and fitters use them."""
        data, model, inv_sigma = stamps
        image = torch.tensor(model)

        def likelihood(x):
            return noise.log_prob(data, x, inv_sigma).sum()

        tangent = torch.linspace(-1, 1, model.size, dtype=image.dtype).reshape(model.shape)
        value, along = torch.func.jvp(likelihood, (image,), (tangent,))
        assert_allclose(along, (torch.func.grad(likelihood)(image) * tangent).sum(), rtol=1e-10)
        many = torch.func.vmap(likelihood)(torch.stack([image, image + 1]))
        assert_allclose(many, [value, likelihood(image + 1)], rtol=1e-12)

    def test_working_has_the_gradient(self, noise, stamps):
        data, model, inv_sigma = stamps
        image = torch.tensor(model, requires_grad=True)
        noise.log_prob(data, image, inv_sigma).sum().backward()
        target, weight = noise.working(data, model, inv_sigma)
        pull = (target - model) * weight
        if noise.correlated:
            whiten = noise.whitening(weight)
            unit = np.eye(model[0].size).reshape(1, -1, *model.shape[1:]) * weight[:, None]
            gradient = np.einsum("bkyx,byx->bk", whiten(unit), whiten(pull)).reshape(model.shape)
        else:
            gradient = pull * weight
        assert_allclose(gradient, image.grad.numpy(), rtol=1e-10, atol=1e-12)
        if noise.gaussian:
            again = noise.working(data, 2 * model, inv_sigma)
            assert_array_equal(again, (target, weight))

    def test_single_precision_and_mixed_arguments(self, noise, stamps):
        data, model, inv_sigma = stamps
        expected = noise.log_prob(data, model, inv_sigma)
        values = noise.log_prob(data, torch.tensor(model, dtype=torch.float32), inv_sigma)
        assert values.dtype == torch.float32
        assert_allclose(values.numpy(), expected, rtol=2e-4, atol=2e-5)

    def test_repr_and_copies(self, noise, stamps):
        assert repr(noise) == repr(copy.deepcopy(noise)) == repr(pickle.loads(pickle.dumps(noise)))
        assert "0x" not in repr(noise)
        assert isinstance(noise, NoiseModel)

    def test_nothing_to_fit(self, noise, stamps):
        values = noise.fitted(*stamps, 3)
        assert values.shape == (2, len(noise.parameter_names)) == (2, 0)
        known = noise.with_parameters(values)
        assert_array_equal(known.log_prob(*stamps), noise.log_prob(*stamps))
        with pytest.raises(ValueError, match="values have shape"):
            noise.with_parameters(np.ones((2, 1)))


def test_module_does_not_import_torch():
    code = (
        "import sys, numpy as np, galmorph.noise as n;"
        "n.CorrelatedNoise(np.ones((1, 1))).log_prob(np.ones((3, 3)), 0, np.ones((3, 3)));"
        "n.PoissonNoise().log_prob(1, 1, 1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gaussian_against_scipy(stamps):
    data, model, inv_sigma = stamps
    used = inv_sigma > 0
    sigma = np.sqrt((1.5 / inv_sigma[used]) ** 2 + 0.7**2)
    values = GaussianNoise(scale=1.5, floor=0.7).log_prob(*stamps)
    assert_allclose(values[used], stats.norm.logpdf(data[used], model[used], sigma), rtol=1e-12)


def test_poisson_against_scipy(rng):
    rate = 10 ** rng.uniform(-2, 4, 2000)
    counts = rng.poisson(rate)
    noise = PoissonNoise(gain=4.0, background=0.25)
    values = noise.log_prob(counts / 4 - 0.25, rate / 4 - 0.25, np.ones(2000))
    assert_allclose(values, stats.poisson.logpmf(counts, rate) + np.log(4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 2.0, 100.0])
def test_poisson_with_read_noise(rate):
    """Against the sum over counts of Gaussians: the skewness is all that is wrong."""
    read_noise = 5.0
    skewness = read_noise**2 / (rate + read_noise**2) ** 1.5
    counts = np.arange(stats.poisson.ppf(1 - 1e-12, rate) + 1)
    data = np.linspace(rate - 12, rate + 15, 400)
    exact = stats.norm.pdf(data[:, None], counts, read_noise) @ stats.poisson.pmf(counts, rate)
    noise = PoissonNoise(read_noise=read_noise)
    density = np.exp(noise.log_prob(data, rate, np.ones_like(data)))
    # next term of the Edgeworth series, (x**3 - 3 x) exp(-x**2 / 2) skewness / 6
    assert_allclose(density, exact, rtol=0, atol=1.1 * 1.38 * skewness / 6 * exact.max())


def test_poisson_curvature_is_the_expected_information(rng):
    noise = PoissonNoise(gain=3.0, read_noise=1.5, background=0.5)
    model = 2.0
    electrons = rng.poisson(3 * 2.5, 400_000) + rng.normal(0, 1.5, 400_000)
    image = torch.full((400_000,), model, dtype=torch.float64, requires_grad=True)
    data = electrons / 3 - 0.5
    noise.log_prob(data, image, 1.0).sum().backward()
    _, inv_sigma = noise.working(data, model, 1.0)
    assert_allclose(image.grad.numpy().var(), inv_sigma**2, rtol=0.02)
    assert_allclose(image.grad.numpy().mean(), 0, atol=0.01)


def test_poisson_of_an_impossible_model_points_back():
    noise = PoissonNoise(gain=2.0)
    data, inv_sigma = np.array([5.0, 5.0, 0.0, -3.0]), np.ones(4)
    image = torch.tensor([-4.0, 0.0, -1.0, -1.0], requires_grad=True)
    values = noise.log_prob(data, image, inv_sigma)
    assert torch.isfinite(values).all()
    values.sum().backward()
    assert (image.grad[:2] > 0).all()
    assert_array_equal(image.grad[2:], 0)  # never better to be more negative
    target, weight = noise.working(data, image.detach().numpy(), inv_sigma)
    gradient = (target - image.detach().numpy()) * weight**2
    assert_allclose(gradient, image.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("dof", [1.0, 4.0, 30.0])
def test_student_against_scipy(stamps, dof):
    data, model, inv_sigma = stamps
    used = inv_sigma > 0
    expected = stats.t.logpdf(data[used], dof, model[used], 1 / inv_sigma[used])
    assert_allclose(StudentTNoise(dof).log_prob(*stamps)[used], expected, rtol=1e-12)


def test_student_information(rng):
    """The variance of the score, and the mean of the working curvature."""
    noise = StudentTNoise(4.0)
    data = 2 * stats.t.rvs(4.0, size=400_000, random_state=rng)
    _, weight = noise.working(data, 0.0, 0.5)
    assert_allclose((weight**2).mean(), 0.25, rtol=0.01)
    assert_allclose((data * weight**2).var(), 0.25 * noise.information, rtol=0.01)


def test_student_majorises(rng):
    """The working problem lies below the log-likelihood and touches it at the model."""
    noise = StudentTNoise(3.0)
    data, model = rng.normal(0, 4, (2, 500))
    _, weight = noise.working(data, model, 1.0)
    other = model + rng.normal(0, 3, 500)
    bound = ((data - model) ** 2 - (data - other) ** 2) * weight**2 / 2
    gain = noise.log_prob(data, other, 1.0) - noise.log_prob(data, model, 1.0)
    assert np.all(gain >= bound - 1e-12)


SIDE = 48


def noisy(rng, count, *, scale=1.0, floor=0.0):
    """Images of noise about zero, a tenth of the pixels unused, as fitted() takes them."""
    sigma = np.exp(rng.normal(0, 0.8, (count, SIDE, SIDE)))
    data = rng.normal(0, np.sqrt((scale * sigma) ** 2 + floor**2))
    inv_sigma = np.where(rng.random(sigma.shape) < 0.1, 0, 1 / sigma)
    return np.where(inv_sigma > 0, data, np.nan), np.zeros_like(data), inv_sigma


def fisher(scale, floor, inv_sigma):
    """Information about scale and floor."""
    sigma = 1 / inv_sigma[inv_sigma > 0]
    slope = np.stack([2 * scale * sigma**2, np.full_like(sigma, 2 * floor)])
    slope /= scale**2 * sigma**2 + floor**2
    return slope @ slope.T / 2


@pytest.mark.parametrize("scale", [1e-8, 0.8, 3.0])
@pytest.mark.parametrize("floor", [0.5, 2.0])
@pytest.mark.parametrize("free", [("scale", "floor"), ("scale",), ("floor",)], ids="+".join)
def test_free_noise_is_recovered(rng, scale, floor, free):
    count, truth = 60, {"scale": scale, "floor": floor * scale}
    data, model, inv_sigma = noisy(rng, count, **truth)
    noise = GaussianNoise(**(truth | dict.fromkeys(free, "free")))
    assert noise.parameter_names == free
    values = noise.fitted(data, model, inv_sigma, 0)
    assert values.shape == (count, len(free))
    keep = [name in free for name in truth]
    information = fisher(**truth, inv_sigma=inv_sigma)[keep][:, keep] / count
    error = np.sqrt(np.diag(np.linalg.inv(information)))
    expected = np.array([truth[name] for name in free])
    assert np.all(np.abs(values.mean(0) - expected) < 3 * error / np.sqrt(count))
    assert_allclose(values.std(0), error, rtol=0.3)

    def likelihood(values):
        known = noise.with_parameters(values)
        assert known.parameter_names == ()
        return known.log_prob(data, model, inv_sigma).sum((1, 2))

    best = likelihood(values)
    for k in range(len(free)):
        for factor in (0.99, 1.01):
            assert np.all(
                likelihood(values * np.where(np.arange(len(free)) == k, factor, 1)) < best
            )


def test_scale_counts_the_parameters(rng):
    data = rng.normal(0, 2, (4000, 5, 5))
    model = np.broadcast_to(data.mean((1, 2), keepdims=True), data.shape)
    inv_sigma = np.ones_like(data)
    noise = GaussianNoise(scale="free")
    squares = noise.fitted(data, model, inv_sigma, 1) ** 2
    assert_allclose(squares.mean(), 4, rtol=0.02)
    uncorrected = noise.fitted(data, model, inv_sigma, np.zeros(4000)) ** 2
    assert_allclose(squares / uncorrected, 25 / 24)


def test_no_floor_is_found_where_there_is_none(rng):
    data, model, inv_sigma = noisy(rng, 40)
    values = GaussianNoise(scale="free", floor="free").fitted(data, model, inv_sigma, 0)
    assert (values[:, 1] == 0).sum() > 8  # half of them but for noise
    assert np.median(values[:, 1]) < 0.15
    assert_allclose(values[:, 0].mean(), 1, atol=0.02)


def test_only_floor_is_left_if_sigma_says_nothing(rng):
    data, model, inv_sigma = noisy(rng, 10, scale=1e-9, floor=1.0)
    values = GaussianNoise(scale="free", floor="free").fitted(data, model, inv_sigma, 0)
    assert_allclose(values[:, 1].mean(), 1, atol=0.02)


@pytest.mark.parametrize("free", [("scale", "floor"), ("scale",), ("floor",)], ids="+".join)
def test_free_noise_of_odd_images(free):
    """Perfect fits, no pixels at all, one standard deviation, more parameters than pixels."""
    data = np.zeros((5, 4, 4))
    data[1:] += np.random.default_rng(3).normal(size=(4, 4, 4))
    inv_sigma = np.ones_like(data)
    inv_sigma[2] = 0
    inv_sigma[3, 1:] = 0
    model = data.copy()
    model[3:] = 0
    noise = GaussianNoise(**dict.fromkeys(free, "free"))
    values = noise.fitted(data, model, inv_sigma, 7)
    assert np.all(np.isfinite(values))
    known = noise.with_parameters(values)
    assert np.all(np.isfinite(known.log_prob(data, model, inv_sigma)))
    if free == ("scale", "floor"):
        assert_array_equal(values[:, 1], 0)
        assert_allclose(values[4, 0], np.sqrt((data[4] ** 2).sum() / 9))


def test_fits_of_free_noise_are_fast(rng):
    data, model, inv_sigma = noisy(rng, 64)
    noise = GaussianNoise(scale="free", floor="free")
    start = time.perf_counter()
    noise.fitted(data, model, inv_sigma, 7)
    assert time.perf_counter() - start < 2


def test_before_they_are_fitted_free_parameters_change_nothing(stamps):
    noise = GaussianNoise(scale="free", floor="free")
    assert_array_equal(noise.log_prob(*stamps), GaussianNoise().log_prob(*stamps))


def test_names_of_noises():
    assert repr(GaussianNoise()) == "GaussianNoise()"
    assert repr(GaussianNoise(scale=1, floor="free")) == "GaussianNoise(floor='free')"
    assert repr(PoissonNoise(gain=2)) == "PoissonNoise(gain=2.0, read_noise=0.0, background=0.0)"
    assert repr(StudentTNoise(3)) == "StudentTNoise(dof=3.0)"
    first, same, other = (GaussianNoise(scale=np.full((2, 1, 1), v)) for v in (2.0, 2.0, 2.1))
    assert repr(first) == repr(same) != repr(other)
    a, b = (repr(CorrelatedNoise([[c, 1.0, c]])) for c in (0.1, 0.2))
    assert a != b


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(scale=0), "scale of the noise must be positive"),
        (lambda: GaussianNoise(scale="loose"), "a number, an array or"),
        (lambda: GaussianNoise(floor=-1), "floor of the noise must not be negative"),
        (lambda: GaussianNoise(floor=np.nan), "floor must be finite"),
        (lambda: PoissonNoise(gain=-1), "gain must be positive"),
        (lambda: PoissonNoise(read_noise=-1), "read noise must not be negative"),
        (lambda: PoissonNoise(background="dark"), "background must be a number"),
        (lambda: StudentTNoise(0), "degrees of freedom"),
        (lambda: StudentTNoise([1, 2]), "degrees of freedom"),
        (lambda: CorrelatedNoise([[1.0]], radius=0), "from 1 to 5"),
        (lambda: CorrelatedNoise([[1.0]], radius=1.5), "from 1 to 5"),
        (lambda: CorrelatedNoise([1.0]), "2-D array with odd sides"),
        (lambda: CorrelatedNoise([[0.1, 1.0]]), "2-D array with odd sides"),
        (lambda: CorrelatedNoise([[0.1, 0.9, 0.1]]), "1 at no offset"),
        (lambda: CorrelatedNoise([[0.1, 1.0, 0.2]]), "same at"),
        (lambda: CorrelatedNoise([[0.9, 1.0, 0.9]]), "not positive definite"),
        (lambda: CorrelatedNoise([[np.nan, 1.0, np.nan]]), "NaN"),
        (lambda: CorrelatedNoise([[1.0]]).whitening(np.ones(3)), "two or more axes"),
        (
            lambda: CorrelatedNoise([[1.0]]).whitening(np.ones((2, 3, 3)))(np.ones((2, 3, 4))),
            "can't be whitened",
        ),
        (lambda: GaussianNoise(scale="free").fitted(*np.ones((3, 5, 5)), 0), "batches"),
        (lambda: estimate_correlation(np.zeros(4)), "2-D or 3-D"),
        (lambda: estimate_correlation(np.zeros((4, 4)), np.zeros((4, 5))), "mask has shape"),
        (lambda: estimate_correlation(np.zeros((4, 4)), radius=0), "positive whole number"),
        (lambda: estimate_correlation(np.zeros((20, 20))), "no sky"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_correlated_without_correlation_is_gaussian(stamps):
    assert_allclose(
        CorrelatedNoise(np.ones((1, 1))).log_prob(*stamps),
        GaussianNoise().log_prob(*stamps),
        rtol=1e-12,
    )


def test_correlated_is_exact_for_exponentials(rng):
    model = rng.normal(size=(12, 12))
    inv_sigma = rng.uniform(0.3, 2, model.shape)
    matrix = covariance(exponential, inv_sigma)
    data = rng.multivariate_normal(model.ravel(), matrix)
    expected = stats.multivariate_normal(model.ravel(), matrix).logpdf(data)
    for radius in (1, 3):
        values = CorrelatedNoise(exponential, radius=radius).log_prob(
            data.reshape(12, 12), model, inv_sigma
        )
        assert_allclose(values.sum(), expected, rtol=1e-10)


def test_correlated_with_a_mask_is_exact_if_all_is_in_reach(rng):
    """An image as small as the neighbourhood, where nothing is left out."""
    inv_sigma = rng.uniform(0.5, 2, (5, 4)) * (rng.random((5, 4)) > 0.3)
    matrix = covariance(smooth(0.6), inv_sigma)
    used = inv_sigma > 0
    data = np.zeros((5, 4))
    data[used] = rng.multivariate_normal(np.zeros(len(matrix)), matrix)
    values = CorrelatedNoise(smooth(0.6), radius=5).log_prob(data, 0.0, inv_sigma)
    expected = stats.multivariate_normal(None, matrix).logpdf(data[used])
    assert_allclose(values.sum(), expected, rtol=1e-9)


@pytest.mark.parametrize("hidden", [0.0, 0.15])
def test_correlated_is_close_for_smooth_noise(rng, hidden):
    inv_sigma = rng.uniform(0.5, 2, (12, 12)) * (rng.random((12, 12)) >= hidden)
    used = inv_sigma > 0
    difference = {}
    for width in (0.5, 0.6):
        matrix = covariance(smooth(width), inv_sigma)
        data = np.zeros((50, 12, 12))
        data[:, used] = rng.multivariate_normal(np.zeros(len(matrix)), matrix, 50)
        expected = stats.multivariate_normal(None, matrix, allow_singular=True).logpdf(
            data[:, used]
        )
        for radius in (1, 2, 3, 4):
            values = CorrelatedNoise(smooth(width), radius=radius).log_prob(data, 0.0, inv_sigma)
            difference[width, radius] = (values.sum((1, 2)) - expected) / np.abs(expected)
    assert np.abs(difference[0.5, 3]).max() < 0.01
    assert np.abs(difference[0.6, 3].mean()) < 0.01
    for width in (0.5, 0.6):
        errors = [difference[width, radius].std() for radius in (1, 2, 3, 4)]
        assert errors == sorted(errors, reverse=True)


def simulate(rng, width, shape):
    """Smoothed white noise of unit variance, no edges."""
    images = np.stack([gaussian_filter(i, width, mode="wrap") for i in rng.normal(size=shape)])
    return images / images.std()


def test_whitened_noise_is_white(rng):
    width = 0.7
    images = simulate(rng, width, (40, 64, 64))
    kernel = np.zeros((33, 33))
    kernel[16, 16] = 1
    kernel = gaussian_filter(kernel, width)
    shifted = [[np.roll(kernel, (y, x), (0, 1)) for x in range(-6, 7)] for y in range(-6, 7)]
    correlation = (kernel * np.array(shifted)).sum((2, 3)) / (kernel**2).sum()
    noise = CorrelatedNoise(correlation)
    inv_sigma = np.ones(images.shape)
    inv_sigma[:, rng.random((64, 64)) < 0.02] = 0
    white = noise.whitening(inv_sigma)(images * inv_sigma)
    assert_array_equal(white[inv_sigma == 0], 0)
    used = inv_sigma > 0
    assert_allclose(white[used].var(), 1, atol=0.01)
    assert_allclose(white[used].mean(), 0, atol=0.02)
    for dy, dx in [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 3)]:
        first, second = white[:, : 64 - dy, 4:-4], white[:, dy:, 4 + dx : 60 + dx]
        both = (first != 0) & (second != 0)
        assert abs((first[both] * second[both]).mean()) < 0.03
        assert abs(correlation[6 + dy, 6 + dx]) > 0.1 or dx + dy > 2  # there was something
    # the edges and the surroundings of bad pixels have coefficients of their own
    odd = np.zeros((64, 64), bool)
    odd[:3] = odd[:, :3] = odd[:, -3:] = True
    odd = used & odd
    assert_allclose(white[odd].var(), 1, atol=0.02)


def test_whitening_of_many_images(rng):
    noise = CorrelatedNoise(smooth(0.6))
    inv_sigma = (rng.random((3, 9, 8)) > 0.1).astype(float)
    whiten = noise.whitening(inv_sigma)
    images = rng.normal(size=(3, 5, 9, 8))
    white = whiten(images)
    for k in range(5):
        assert_allclose(whiten(images[:, k]), white[:, k], rtol=1e-14)
    assert_allclose(whiten.rows([2, 0])(images[[2, 0]]), white[[2, 0]])
    assert_allclose(whiten.rows(np.array([False, True, False]))(images[1:2]), white[1:2])
    assert_allclose(whiten.rows(slice(1, 3)).log_det, whiten.log_det[1:])
    single = whiten(images.astype(np.float32))
    assert single.dtype == np.float32
    assert_allclose(single, white, atol=1e-5)
    tensor = torch.tensor(images, requires_grad=True)
    assert_allclose(whiten(tensor).detach().numpy(), white, rtol=1e-12)
    corner = noise.whitening(inv_sigma[:1, :4, :4])
    assert torch.autograd.gradcheck(corner, (tensor[:1, :, :4, :4],))
    assert_allclose(whiten(np.ones((3, 9, 8), int)), whiten(np.ones((3, 9, 8))))


def test_log_det_is_that_of_the_matrix(rng):
    inv_sigma = np.where(rng.random((1, 5, 5)) < 0.2, 0, 1.0)
    whiten = CorrelatedNoise(smooth(0.5), radius=5).whitening(inv_sigma)
    _, expected = np.linalg.slogdet(covariance(smooth(0.5), inv_sigma[0]))
    assert_allclose(whiten.log_det.sum(), -expected / 2)
    assert_array_equal(whiten.log_det[inv_sigma == 0], 0)


def test_whitenings_are_remembered_but_not_forever(rng, monkeypatch):
    monkeypatch.setattr("galmorph.noise._MAX_PATTERNS", 300)
    noise, fresh = CorrelatedNoise(smooth(0.6)), CorrelatedNoise(smooth(0.6))
    inv_sigma = np.ones((2, 16, 16))
    assert noise.whitening(inv_sigma) is noise.whitening(inv_sigma.copy())
    image = rng.normal(size=(2, 16, 16))
    for _ in range(30):
        inv_sigma = (rng.random((2, 16, 16)) > 0.1).astype(float)
        whiten = noise.whitening(inv_sigma)
        assert len(noise._whitenings) <= 4
        assert len(noise._known[0]) < 600
        fresh._known = tuple(a[[0, -1]] for a in fresh._known)
        fresh._whitenings.clear()
        assert_allclose(whiten(image), fresh.whitening(inv_sigma)(image), rtol=1e-10, atol=1e-12)


def test_whitening_is_fast(rng):
    inv_sigma = (rng.random((64, 64, 64)) > 0.01).astype(float)
    noise = CorrelatedNoise(smooth(0.6))
    start = time.perf_counter()
    noise.whitening(inv_sigma)(inv_sigma)
    assert time.perf_counter() - start < 2.5


def test_correlation_is_estimated(rng):
    images = simulate(rng, 0.6, (300, 48, 48))
    galaxy = SersicGalaxy2D(flux=500, x_0=24, y_0=24, r_eff=3, n=1).render((48, 48))
    images = (images + galaxy) * rng.uniform(0.1, 10, (300, 1, 1)) + 3
    images[:, 2, 5] = 1e6
    images[3, :, 7] = np.nan
    mask = np.zeros(images.shape, bool)
    mask[:, :, :2] = True
    images[mask] = -1e5
    found = estimate_correlation(images, mask)
    assert found.shape == (7, 7)
    assert_array_equal(found, found[::-1, ::-1])
    assert found[3, 3] == 1
    kernel = np.zeros((33, 33))
    kernel[16, 16] = 1
    kernel = gaussian_filter(kernel, 0.6)
    for dy, dx in [(0, 0), (0, 1), (1, 0), (1, 1), (1, -1), (2, 0), (3, 3)]:
        expected = (kernel * np.roll(kernel, (dy, dx), (0, 1))).sum() / (kernel**2).sum()
        assert_allclose(found[3 + dy, 3 + dx], expected, atol=0.03)
    assert estimate_correlation(images[0], mask[0], radius=2).shape == (5, 5)


def test_correlation_keeps_its_sense(rng):
    """Streaks along one diagonal."""
    white = rng.normal(size=(60, 41, 41))
    found = estimate_correlation(white[:, 1:, 1:] + white[:, :-1, :-1], radius=1)
    assert_allclose(found[[0, 2], [0, 2]], 0.5, atol=0.03)  # (dx, dy) = (1, 1)
    assert_allclose(found[[0, 2], [2, 0]], 0, atol=0.03)
    noise = CorrelatedNoise(
        lambda dx, dy: 0.5 * (dx == dy) * (abs(dx) == 1) + (dx == 0) * (dy == 0)
    )
    pair = noise.log_prob(np.eye(2), 0.0, np.eye(2))
    other = noise.log_prob(np.eye(2)[::-1], 0.0, np.eye(2)[::-1])
    assert pair.sum() > other.sum() + 0.3


def test_estimated_correlation_can_be_used(rng):
    """Even that of one small image of noise so smooth that its errors make it impossible."""
    image = gaussian_filter(rng.normal(size=(40, 40)), 1.5)
    for radius in (1, 3, 5):
        CorrelatedNoise(estimate_correlation(image, radius=radius), radius=radius)


class TestLearnedNoise:
    def test_adds_the_misfit_to_the_variance(self):
        rng = np.random.default_rng(1)
        data, model = rng.normal(size=(2, 3, 8, 9))
        misfit = rng.uniform(0, 2, data.shape)
        inv_sigma = rng.uniform(0.5, 2, data.shape)
        inv_sigma[:, 2, 3] = 0
        noise = LearnedNoise(scale=0.7)
        found = noise.bind(misfit).log_prob(data, model, inv_sigma)
        with np.errstate(divide="ignore"):
            total = np.hypot(1 / inv_sigma, 0.7 * misfit)
        expected = np.where(inv_sigma > 0, stats.norm(model, total).logpdf(data), 0)
        assert_allclose(found, expected, atol=1e-12)
        some = noise.bind(misfit).rows([2, 0])
        assert_allclose(
            some.log_prob(data[[2, 0]], model[[2, 0]], inv_sigma[[2, 0]]), expected[[2, 0]]
        )
        # without a fit there is no misfit
        plain = GaussianNoise().log_prob(data, model, inv_sigma)
        assert_allclose(noise.log_prob(data, model, inv_sigma), plain)
        with pytest.raises(ValueError, match="negative"):
            LearnedNoise(scale=-1)

    def test_fits_feel_it(self):
        galaxy = LearnedGalaxy2D.from_pretrained(flux=3000, x_0=20, y_0=20, r_50=4)
        params = galaxy.sample(2, rng=4)
        data = galaxy.render((41, 41), params=params) + np.random.default_rng(1).normal(
            size=(2, 41, 41)
        )
        plain = fit_images(data, galaxy, uncertainty=1.0)
        result = fit_images(data, galaxy, MAPFitter(noise=LearnedNoise()), uncertainty=1.0)
        assert (result.stds[:, 0] > plain.stds[:, 0]).all()
        # bright pixels count less than faint ones
        bound = LearnedNoise().bind(result.model_std_images)
        expected = bound.log_prob(data, result.model_images, np.ones_like(data))
        assert_allclose(result.log_likelihood_map, expected)
        assert_allclose(result[1].log_likelihood_map[0], expected[1])
