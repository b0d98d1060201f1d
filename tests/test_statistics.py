"""Are the errors as small as can be, and as large as is said?  A thousand simulated galaxies.

The galaxies are those on which fitters are compared in ``benchmarks/``, but drawn by our own
renderer (which is tested against GalSim elsewhere): what is tested here is the inference.
"""

import numpy as np
import pytest
from astropy.modeling.models import Moffat2D

from galmorph import (
    PSF,
    FitFlag,
    GaussianGalaxy2D,
    MAPFitter,
    PointSource2D,
    SersicGalaxy2D,
    fit_images,
)
from galmorph.rendering.evaluate import evaluate_grid

SIZE = 64
COUNT = 1000
NAMES = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
STAR = PSF.from_any(Moffat2D(1, 0, 0, 3 / (2 * np.sqrt(2 ** (1 / 3) - 1)), 3.0))


class Simulation:
    """Truth, data, the bound on the errors, and the fits."""

    def __init__(self, count, seed, *, background="none"):
        rng = np.random.default_rng(seed)
        self.truth = np.column_stack(
            [
                np.full(count, 1000.0),
                (SIZE - 1) / 2 + rng.uniform(-0.5, 0.5, (count, 2)),
                2 * 5 ** rng.random(count),
                rng.uniform(0.5, 6, count),
                1 - rng.uniform(0.2, 1, count),
                rng.uniform(-np.pi / 2, np.pi / 2, count),
            ]
        )
        model = SersicGalaxy2D(psf=STAR)
        snr = 20 * 10 ** rng.random(count)
        self.bound = np.empty((count, 7))
        data, sigma = np.empty((count, SIZE, SIZE)), np.empty(count)
        for i in range(0, count, 50):
            rows = slice(i, i + 50)
            images, slopes = evaluate_grid(
                model.ellipses(),
                NAMES,
                self.truth[rows],
                (SIZE, SIZE),
                psf=STAR,
                derivatives=True,
            )
            sigma[rows] = np.sqrt((images**2).sum((1, 2))) / snr[rows]
            noise = rng.standard_normal(images.shape)
            data[rows] = images + sigma[rows, None, None] * noise
            design = slopes.reshape(len(images), 7, -1) / sigma[rows, None, None]
            if background == "constant":
                ones = np.ones((len(images), 1, SIZE**2)) / sigma[rows, None, None]
                design = np.concatenate([design, ones], 1)
            fisher = design @ design.transpose(0, 2, 1)
            scale = np.sqrt(np.einsum("bii->bi", fisher))
            inverse = np.linalg.inv(fisher / scale[:, :, None] / scale[:, None])
            self.bound[rows] = (np.sqrt(np.einsum("bii->bi", inverse)) / scale)[:, :7]
        self.result = fit_images(
            data,
            model,
            uncertainty=np.broadcast_to(sigma[:, None, None], data.shape),
            background=background,
        )
        self.error = self.result.params - self.truth
        self.error[:, 6] = (self.error[:, 6] + np.pi / 2) % np.pi - np.pi / 2
        self.pull = self.error / self.result.stds


@pytest.fixture(scope="module")
def simulation():
    return Simulation(COUNT, seed=1)


def robust_width(values):
    """Half of the interval that holds the middle 68.27 %."""
    low, high = np.percentile(values, [15.865, 84.135])
    return 0.5 * (high - low)


def assert_fraction(inside, expected, slack):
    """A fraction within ``slack`` of what it should be, and three standard deviations of luck."""
    luck = 3 * np.sqrt(expected * (1 - expected) / len(inside))
    assert abs(inside.mean() - expected) < slack + luck, f"{inside.mean():.3f}"


def test_nothing_goes_astray(simulation):
    result = simulation.result
    assert not (result.flags & (FitFlag.FAILED | FitFlag.NOT_CONVERGED)).any()
    assert np.isfinite(result.stds).all()
    # none more than a factor of three or a pixel off
    ratio = result.params[:, [0, 3]] / simulation.truth[:, [0, 3]]
    assert ((ratio > 1 / 3) & (ratio < 3)).all()
    assert np.abs(simulation.error[:, 1:3]).max() < 1


@pytest.mark.parametrize("name", ["flux", "r_eff", "n", "ellip"])
def test_errors_are_at_the_bound(simulation, name):
    """Median error over that of an estimator at the Cramér-Rao bound: of all, and one by one."""
    i = NAMES.index(name)
    error, bound = np.abs(simulation.error[:, i]), simulation.bound[:, i]
    true = simulation.truth[:, i] if name != "ellip" else 1 - simulation.truth[:, i]
    of_all = np.median(error / true) / np.median(0.6745 * bound / true)
    assert of_all < 1.05, f"{of_all:.3f}"
    one_by_one = np.median(error / bound) / 0.6745
    assert one_by_one < 1.05, f"{one_by_one:.3f}"


@pytest.mark.parametrize("name", NAMES)
def test_pulls(simulation, name):
    pull = simulation.pull[:, NAMES.index(name)]
    assert 0.9 < robust_width(pull) < 1.1, f"{robust_width(pull):.3f}"
    assert (np.abs(pull) > 5).sum() <= COUNT * 0.003


@pytest.mark.parametrize("name", NAMES)
def test_coverage(simulation, name):
    pull = np.abs(simulation.pull[:, NAMES.index(name)])
    assert_fraction(pull < 1, 0.6827, 0.03)
    assert_fraction(pull < 2, 0.9545, 0.02)


@pytest.mark.parametrize("name", ["flux", "x_0", "y_0", "r_eff", "n"])
def test_bias(simulation, name):
    """A tenth of the error is the most that the average may be off, by the median."""
    pull = simulation.pull[:, NAMES.index(name)]
    assert abs(np.median(pull)) < 0.1 + 3 * 1.2533 / np.sqrt(COUNT)


def test_chi_square(simulation):
    """Of a right model: mean and scatter of the chi-square distribution."""
    result = simulation.result
    z = (result.chi2 - result.dof) / np.sqrt(2 * result.dof)
    assert abs(z.mean()) < 4 / np.sqrt(COUNT)
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * COUNT)
    assert not (result.flags & FitFlag.POOR_FIT).any()


def test_all_parameters_at_once(simulation):
    """The ellipsoid of the covariance: chi-square with seven degrees of freedom, where bright."""
    from scipy.stats import chi2

    snr = simulation.result.params[:, 0] / simulation.result.stds[:, 0]
    bright = (snr > 30) & (simulation.truth[:, 5] > 0.3)
    error, cov = simulation.error[bright], simulation.result.cov[bright]
    distance = np.einsum("bi,bij,bj->b", error, np.linalg.inv(cov), error)
    assert_fraction(distance < chi2(7).ppf(0.6827), 0.6827, 0.03)


def test_with_a_background():
    made = Simulation(300, seed=2, background="constant")
    for name in ("flux", "r_eff", "n", "ellip"):
        i = NAMES.index(name)
        # 300 galaxies tell the width of the pulls to 6 %
        assert 0.82 < robust_width(made.pull[:, i]) < 1.18, name
        assert_fraction(np.abs(made.pull[:, i]) < 1, 0.6827, 0.03)
    level = made.result.background[:, 0]
    pull = level / np.sqrt(made.result.background_cov[:, 0, 0])
    assert_fraction(np.abs(pull) < 1, 0.6827, 0.03)


def test_stars():
    """Linear problem plus a position: exact statistics."""
    rng = np.random.default_rng(3)
    truth = np.column_stack([np.full(500, 1000.0), 12 + rng.uniform(-1, 1, (500, 2))])
    data = PointSource2D().render((25, 25), params=truth, psf=STAR) + rng.normal(
        0, 4, (500, 25, 25)
    )
    result = fit_images(data, PointSource2D(), MAPFitter(), uncertainty=4.0, psf=STAR)
    pull = (result.params - truth) / result.stds
    for i in range(3):
        assert abs(pull[:, i].mean()) < 4 / np.sqrt(500)
        assert abs(pull[:, i].std() - 1) < 4 / np.sqrt(1000)


def test_gaussians():
    """Two half-light radii of the PSF and less, S/N as above."""
    rng = np.random.default_rng(4)
    count = 1000
    truth = np.column_stack(
        [
            np.full(count, 1000.0),
            20 + rng.uniform(-0.5, 0.5, (count, 2)),
            2 * 3 ** rng.random(count),
            1 - rng.uniform(0.2, 0.8, count),
            rng.uniform(-np.pi / 2, np.pi / 2, count),
        ]
    )
    images = GaussianGalaxy2D().render((41, 41), params=truth, psf=STAR)
    sigma = np.sqrt((images**2).sum((1, 2))) / (20 * 10 ** rng.random(count))
    sigma = np.broadcast_to(sigma[:, None, None], images.shape)
    data = images + sigma * rng.standard_normal(images.shape)
    result = fit_images(data, GaussianGalaxy2D(), uncertainty=sigma, psf=STAR)
    error = result.params - truth
    error[:, 5] = (error[:, 5] + np.pi / 2) % np.pi - np.pi / 2
    pull = error / result.stds
    for i, name in enumerate(result.param_names):
        # of a galaxy that is nearly round, the angle is anything within half a turn
        rows = truth[:, 4] > 3 * result.stds[:, 4] if name == "theta" else slice(None)
        width = robust_width(pull[rows, i])
        assert 0.9 < width < 1.1, f"{name} {width:.3f}"
        assert_fraction(np.abs(pull[rows, i]) < 1, 0.6827, 0.03)
