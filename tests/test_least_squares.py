"""The batched Levenberg-Marquardt on problems with known answers; no galaxy in sight."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.optimize import least_squares, minimize  # noqa: E402

from galmorph.inference.least_squares import (  # noqa: E402
    Linearisation,
    levenberg_marquardt,
)

TIME = torch.linspace(0, 5, 60, dtype=torch.float64)


class Decay:
    """data ~ a exp(-t / exp(u)) + c: an amplitude, a logarithmic rate, a background."""

    def __init__(self, data, weight, *, background=True, linear=True, prior=None):
        self.data, self.weight = data, weight
        ones = torch.ones_like(data[:1])
        self.templates = ones if background else ones[:0]
        self.linear_amplitude = linear
        self.prior = prior  # (mean, std) of the first coordinate
        self.calls = 0

    def linearise(self, u, rows):
        self.calls += 1
        scale = torch.exp(u[:, :1])
        light = torch.exp(-TIME / scale)
        columns = torch.stack([light, light * TIME / scale], 1)  # by u
        chain = u.new_zeros((len(u), 1, u.shape[1]))
        chain[:, 0, 0] = 1.0
        result = Linearisation(columns.to(self.data.dtype), chain)
        if not self.linear_amplitude:
            result.amplitude = u[:, 1]
            result.amplitude_chain = torch.zeros_like(u)
            result.amplitude_chain[:, 1] = 1.0
        if self.prior is not None:
            mean, std = self.prior
            result.penalty = (u[:, :1] - mean) / std
            result.penalty_chain = u.new_zeros((len(u), 1, u.shape[1]))
            result.penalty_chain[:, 0, 0] = 1 / std
        return result

    def project(self, u, rows):
        return u


class Line:
    """data ~ a (1 + u t): linear in all, so that the answer is that of normal equations."""

    linear_amplitude = False

    def __init__(self, data, weight, *, prior=None, dtype=torch.float64):
        self.data, self.weight = data.to(dtype), weight.to(dtype)
        self.templates = self.data[:0]
        self.prior = prior

    def linearise(self, u, rows):
        ones = torch.ones_like(TIME)
        columns = torch.stack([0 * ones, ones, TIME]).expand(len(u), -1, -1)
        # image = u0 + u1 t enters through raw derivatives and a template of its values
        image = u[:, :1] + u[:, 1:] * TIME
        columns = torch.cat([image[:, None], columns[:, 1:]], 1)
        chain = torch.eye(2, dtype=u.dtype).expand(len(u), -1, -1)
        result = Linearisation(columns.to(self.data.dtype), chain)
        result.amplitude = torch.ones_like(u[:, 0])
        result.amplitude_chain = torch.zeros_like(u)
        if self.prior is not None:
            mean, std = self.prior
            result.penalty = (u - mean) / std
            result.penalty_chain = torch.diag(1 / std).expand(len(u), -1, -1)
        return result

    def project(self, u, rows):
        return u


def noisy_decays(count, seed=4, noise=0.05):
    rng = np.random.default_rng(seed)
    amplitude, scale = rng.uniform(1, 5, count), rng.uniform(0.5, 3, count)
    level = rng.uniform(-1, 1, count)
    clean = amplitude[:, None] * np.exp(-TIME.numpy() / scale[:, None]) + level[:, None]
    sigma = noise * rng.uniform(0.5, 2, clean.shape)
    data = torch.as_tensor(clean + sigma * rng.standard_normal(clean.shape))
    return data, torch.as_tensor(1 / sigma), np.stack([amplitude, np.log(scale), level], -1)


def solve(problem, start=0.0, low=-torch.inf, high=torch.inf, **options):
    size = 1 if problem.linear_amplitude else 2
    u = torch.as_tensor(start, dtype=torch.float64).expand(len(problem.data), size).clone()
    lower, upper = (torch.as_tensor(b, dtype=torch.float64).expand_as(u) for b in (low, high))
    options = {"tolerance": 1e-12} | options
    return levenberg_marquardt(problem, u, lower=lower, upper=upper, **options)


def scipy_answer(data, weight, prior=None):
    """The same minimum, found by scipy with everything nonlinear."""
    t, y, w = TIME.numpy(), data.numpy(), weight.numpy()

    def residual(p):
        r = (y - p[0] * np.exp(-t / np.exp(p[1])) - p[2]) * w
        return r if prior is None else np.append(r, (p[1] - prior[0]) / prior[1])

    found = least_squares(residual, [1, 0, 0], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    return found.x, 2 * found.cost, np.linalg.inv(found.jac.T @ found.jac)


def test_separable_fit_is_the_full_fit():
    data, weight, _ = noisy_decays(6)
    result = solve(Decay(data, weight))
    assert result.converged.all()
    for i in range(6):
        expected, chi2, cov = scipy_answer(data[i], weight[i])
        ours = [float(result.linear[i, 0]), float(result.u[i, 0]), float(result.linear[i, 1])]
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        assert float(result.chi2[i]) == pytest.approx(chi2, rel=1e-9)
        # the order of the unknowns is coordinates, amplitude, templates
        inverse = np.linalg.inv(result.hessian[i].numpy())
        order = [1, 0, 2]
        np.testing.assert_allclose(inverse, cov[np.ix_(order, order)], rtol=1e-3)


def test_amplitude_as_a_coordinate_is_the_same_fit():
    data, weight, _ = noisy_decays(4)
    one = solve(Decay(data, weight))
    other = solve(Decay(data, weight, linear=False), [0.0, 1.0])
    torch.testing.assert_close(one.u[:, 0], other.u[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.linear, other.linear, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.chi2, other.chi2)


def test_exact_data_give_exact_parameters():
    data, _, truth = noisy_decays(5, noise=1e-300)
    result = solve(Decay(data, torch.full_like(data, 1e3)), max_iter=100)
    assert result.converged.all()
    np.testing.assert_allclose(result.u[:, 0], truth[:, 1], atol=1e-8)
    np.testing.assert_allclose(result.linear, truth[:, [0, 2]], rtol=1e-7)


@pytest.mark.parametrize("start", [-2.0, 3.0])
def test_far_starts(start):
    data, weight, _ = noisy_decays(20)
    near, far = solve(Decay(data, weight)), solve(Decay(data, weight), start, max_iter=200)
    assert far.converged.all()
    torch.testing.assert_close(far.chi2, near.chi2, rtol=1e-8, atol=1e-8)


def test_default_tolerance_is_a_small_part_of_the_error():
    data, weight, _ = noisy_decays(30)
    exact, quick = solve(Decay(data, weight)), solve(Decay(data, weight), tolerance=1e-3)
    error = torch.linalg.inv(exact.hessian)[:, 0, 0].sqrt()
    assert ((quick.u - exact.u)[:, 0].abs() / error).max() < 0.03
    assert quick.n_iter.sum() < exact.n_iter.sum()


# -- closed forms --------------------------------------------------------------------------------


def test_line_is_linear_regression():
    rng = np.random.default_rng(2)
    data = torch.as_tensor(rng.normal(size=(3, 60)))
    weight = torch.as_tensor(rng.uniform(0.5, 2, (3, 60)))
    result = solve(Line(data, weight))
    design = np.stack([np.ones(60), TIME.numpy()], -1)
    for i in range(3):
        a = design * weight[i].numpy()[:, None]
        b = (data[i] * weight[i]).numpy()
        expected, rest, *_ = np.linalg.lstsq(a, b, rcond=None)
        np.testing.assert_allclose(result.u[i], expected, rtol=1e-7)
        assert float(result.chi2[i]) == pytest.approx(rest[0], rel=1e-10)
        np.testing.assert_allclose(result.hessian[i], a.T @ a, rtol=1e-10)


def test_prior_is_a_penalty():
    """Line with a normal prior: mode and covariance of the posterior in closed form."""
    rng = np.random.default_rng(3)
    data = torch.as_tensor(rng.normal(1, 1, (2, 60)))
    weight = torch.full((2, 60), 0.5, dtype=torch.float64)
    mean, std = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.1, 0.05]).double()
    result = solve(Line(data, weight, prior=(mean, std)))
    design = np.stack([np.ones(60), TIME.numpy()], -1) * 0.5
    precision = design.T @ design + np.diag(1 / std.numpy() ** 2)
    for i in range(2):
        right = design.T @ (0.5 * data[i].numpy()) + (mean / std**2).numpy()
        np.testing.assert_allclose(result.u[i], np.linalg.solve(precision, right), rtol=1e-7)
        np.testing.assert_allclose(result.hessian[i], precision, rtol=1e-10)
        penalty = float((((result.u[i] - mean) / std) ** 2).sum())
        assert float(result.cost[i] - result.chi2[i]) == pytest.approx(penalty, rel=1e-6)


def test_prior_on_a_nonlinear_coordinate():
    data, weight, _ = noisy_decays(5, noise=0.5)
    prior = (0.2, 0.1)
    result = solve(Decay(data, weight, prior=prior))
    for i in range(5):
        expected, cost, cov = scipy_answer(data[i], weight[i], prior)
        assert float(result.u[i, 0]) == pytest.approx(expected[1], rel=1e-5)
        assert float(result.cost[i]) == pytest.approx(cost, rel=1e-9)
        assert float(result.chi2[i]) < cost
        assert np.linalg.inv(result.hessian[i])[0, 0] == pytest.approx(cov[1, 1], rel=1e-3)


# -- bounds ---------------------------------------------------------------------------------------


def test_bounds_hold_and_are_reported():
    data, weight, _ = noisy_decays(20)
    free = solve(Decay(data, weight))
    high = float(free.u.median()) + 1e-3
    result = solve(Decay(data, weight), start=high - 1, high=high)
    assert result.converged.all()
    assert (result.u <= high).all()
    outside = free.u[:, 0] > high
    assert outside.any()
    assert not outside.all()
    torch.testing.assert_close(result.at_bound[:, 0], outside)
    torch.testing.assert_close(result.u[outside, 0], torch.full_like(result.u[outside, 0], high))
    torch.testing.assert_close(result.u[~outside], free.u[~outside], rtol=1e-5, atol=1e-6)
    # what is solved for is solved for at the bound
    row = int(torch.nonzero(outside)[0, 0])
    light = np.exp(-TIME.numpy() / np.exp(high))
    design = np.stack([light, np.ones(60)], -1) * weight[row].numpy()[:, None]
    right = (data[row] * weight[row]).numpy()
    expected = np.linalg.lstsq(design, right, rcond=None)[0]
    np.testing.assert_allclose(result.linear[row], expected, rtol=1e-7)


def test_start_outside_the_bounds_is_brought_inside():
    data, weight, _ = noisy_decays(3)
    result = solve(Decay(data, weight), start=40.0, low=-2.0, high=2.0)
    assert result.converged.all()
    torch.testing.assert_close(result.chi2, solve(Decay(data, weight)).chi2)


def test_bounds_that_meet_hold_a_coordinate():
    data, weight, _ = noisy_decays(3)
    result = solve(Decay(data, weight), start=0.0, low=0.4, high=0.4)
    assert (result.u == 0.4).all()
    assert result.converged.all()


def test_bound_that_is_left_again():
    """A start at the wrong bound does not stay there."""
    data, weight, _ = noisy_decays(10)
    result = solve(Decay(data, weight), start=-3.0, low=-3.0, high=5.0, max_iter=200)
    torch.testing.assert_close(result.chi2, solve(Decay(data, weight)).chi2)
    assert not result.at_bound.any()


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 128])
def test_problems_do_not_see_each_other(window):
    data, weight, _ = noisy_decays(9)
    together = solve(Decay(data, weight), window=window)
    for i in range(9):
        alone = solve(Decay(data[i : i + 1], weight[i : i + 1]))
        torch.testing.assert_close(together.u[i], alone.u[0], rtol=1e-10, atol=1e-10)
        assert int(together.n_iter[i]) == int(alone.n_iter[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_data_spoil_their_own_problem_only(bad):
    data, weight, _ = noisy_decays(7)
    good = solve(Decay(data, weight))
    broken = data.clone()
    broken[3, 5] = bad
    result = solve(Decay(broken, weight))
    others = [0, 1, 2, 4, 5, 6]
    for name in ("u", "linear", "cost", "chi2", "hessian"):
        ours, theirs = getattr(result, name)[others], getattr(good, name)[others]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not result.converged[3]
    assert result.converged[others].all()
    assert int(result.n_iter[3]) <= 60


def test_no_weight_at_all():
    data, weight, _ = noisy_decays(3)
    weight[1] = 0
    result = solve(Decay(data, weight))
    assert torch.isfinite(result.u).all()
    expected = solve(Decay(data[[0, 2]], weight[[0, 2]]))
    torch.testing.assert_close(result.u[[0, 2]], expected.u, rtol=1e-10, atol=1e-10)


def test_some_rows_only():
    data, weight, _ = noisy_decays(5)
    full = solve(Decay(data, weight))
    result = solve(Decay(data, weight), start=0.1, rows=torch.tensor([1, 4]))
    torch.testing.assert_close(result.u[[1, 4]], full.u[[1, 4]], rtol=1e-5, atol=1e-6)
    assert (result.u[[0, 2, 3]] == 0.1).all()
    assert torch.equal(result.n_iter == 0, torch.tensor([True, False, True, True, False]))


def test_limit_of_iterations():
    data, weight, _ = noisy_decays(5)
    result = solve(Decay(data, weight), start=3.0, max_iter=2)
    assert (result.n_iter <= 2).all()
    assert not result.converged.any()


def test_cost_never_rises():
    """However few steps are allowed, more steps are never worse."""
    data, weight, _ = noisy_decays(10)
    costs = [
        solve(Decay(data, weight), start=2.5, max_iter=n).cost for n in (1, 2, 3, 5, 8, 13, 30)
    ]
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + 1e-12)).all()


def test_finished_problems_leave_the_batch():
    """Work is done for those that need it: one hard problem does not keep the others."""
    data, weight, _ = noisy_decays(50)
    left = []
    solve(Decay(data, weight), tolerance=1e-3, monitor=left.append)
    assert left[0] == 50
    assert left[-1] < 50
    assert all(b <= a for a, b in itertools.pairwise(left))


def test_single_precision_finds_the_same():
    data, weight, _ = noisy_decays(10)
    double = solve(Decay(data, weight), tolerance=1e-3)
    single = Decay(data.float(), weight.float())
    result = solve(single, tolerance=1e-3, relative_tolerance=1e-6)
    assert result.converged.all()
    error = torch.linalg.inv(double.hessian)[:, 0, 0].sqrt()
    assert ((result.u - double.u)[:, 0].abs() / error).max() < 0.02


def test_flat_directions_do_no_harm():
    """Two templates that are the same: the sum is known, the solution is finite."""
    data, weight, _ = noisy_decays(3)
    problem = Decay(data, weight)
    problem.templates = torch.cat([problem.templates] * 2)
    result = solve(problem)
    expected = solve(Decay(data, weight))
    assert torch.isfinite(result.linear).all()
    torch.testing.assert_close(result.chi2, expected.chi2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.u, expected.u, rtol=1e-3, atol=1e-3)


def test_inputs_are_left_alone():
    data, weight, _ = noisy_decays(3)
    problem = Decay(data.clone(), weight.clone())
    start = torch.full((3, 1), 0.5, dtype=torch.float64)
    low, high = torch.full_like(start, -5), torch.full_like(start, 5)
    levenberg_marquardt(problem, start, lower=low, upper=high)
    assert (start == 0.5).all()
    assert (low == -5).all()
    assert torch.equal(problem.data, data)
    assert torch.equal(problem.weight, weight)


# -- where the curvature of Gauss and Newton is not enough -----------------------------------------


class Edge:
    """data ~ exp(2 u) + v t, with a normal prior of u and data that ask for less than nothing.

    The image hardly depends on u where it ends, between the prior and data that can't be reached.
    """

    linear_amplitude = False

    def __init__(self, data):
        self.data, self.weight = data, torch.ones_like(data)
        self.templates = data[:0]

    def linearise(self, u, rows):
        rest = torch.exp(2 * u[:, :1])
        image = rest + u[:, 1:] * TIME
        columns = torch.stack([image, (2 * rest).expand_as(image), TIME.expand_as(image)], 1)
        penalty_chain = u.new_zeros((len(u), 1, 2))
        penalty_chain[:, 0, 0] = 1.0
        return Linearisation(
            columns=columns,
            chain=torch.eye(2, dtype=u.dtype).expand(len(u), -1, -1),
            amplitude=torch.ones_like(u[:, 0]),
            amplitude_chain=torch.zeros_like(u),
            penalty=u[:, :1],
            penalty_chain=penalty_chain,
        )

    def project(self, u, rows):
        return u


def test_curvature_that_is_learned_from_steps():
    rng = np.random.default_rng(5)
    level = rng.uniform(-60, -10, (20, 1))
    data = torch.as_tensor(level + rng.uniform(1, 3, (20, 1)) * TIME.numpy())
    edge = Edge(data)
    plain = solve(edge, -1.0, max_iter=1000, tolerance=1e-9)
    learned = solve(edge, -1.0, max_iter=1000, tolerance=1e-9, stiffen=True)
    assert learned.converged.all()
    assert learned.n_iter.sum() < 0.9 * plain.n_iter.sum()
    for i in range(20):
        y, t = data[i].numpy(), TIME.numpy()

        def cost(p, y=y, t=t):
            return ((y - np.exp(2 * p[0]) - p[1] * t) ** 2).sum() + p[0] ** 2

        expected = minimize(cost, [-3.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9})
        assert float(learned.cost[i]) == pytest.approx(expected.fun, abs=1e-5)


@pytest.mark.parametrize("stiffen", [False, True])
def test_longest_step(stiffen):
    """No step is longer than it may be, and the end is the same."""
    data, weight, _ = noisy_decays(8)
    free = solve(Decay(data, weight))

    class Watched(Decay):
        places = ()

        def linearise(self, u, rows):
            self.places = [*self.places, u.clone()]
            return super().linearise(u, rows)

    watched = Watched(data, weight)
    short = solve(
        watched, -2.0, longest=torch.tensor([0.1]).double(), max_iter=200, stiffen=stiffen, window=8
    )
    torch.testing.assert_close(short.u, free.u, rtol=1e-6, atol=1e-6)
    steps = torch.cat([(b - a).abs() for a, b in itertools.pairwise(watched.places[:8])])
    assert steps.max() < 0.1 + 1e-6
