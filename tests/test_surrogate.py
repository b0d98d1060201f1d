"""Draws through stand-ins for a density, against densities that are known."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats

from galmorph import PSF, FitFlag, ImportanceFitter, LearnedGalaxy2D, MCMCFitter, fit_images
from galmorph._batchfit import one_thread
from galmorph.inference.mcmc import Proposal, Streams
from galmorph.inference.surrogate import (
    Surrogate,
    _Frame,
    _Lessons,
    learn_modes,
    sample_through_surrogates,
    weigh_surrogates,
)

SIZE = 30
# ln of the integral of `_Bent`
VOLUME = SIZE * 0.5 * np.log(2 * np.pi) - np.log(2) + 28 * np.log(3)


class _Squares:
    """A density of residuals a(v), which a subclass says, with their derivatives."""

    size, window = SIZE, 64

    def log_prob(self, v, rows):
        return -0.5 * self.residuals(v)[0].square().sum(1)

    def model_at(self, v, rows):
        return torch.zeros(len(v), 1)

    def expanded(self, v, rows, reference):
        rest, by = self.residuals(v)
        slope = -(by @ rest[..., None])[..., 0]
        return self.log_prob(v, rows), slope, rest.float(), by.float()


class _Bent(_Squares):
    """Normal in (v_0, v_1 - 0.5 v_0^2 - bend v_0^3, v_2 / 3, ...): beyond what stand-ins know.

    A wave is no parabola, and one of the third order only near the middle.
    """

    def __init__(self, bend=0.0, wave=0.0):
        self.bend, self.wave = bend, wave

    def residuals(self, v):
        rest, by = v.clone(), torch.eye(v.shape[1]).double().repeat(len(v), 1, 1)
        x = v[:, 0]
        rest[:, 1] = 2 * (v[:, 1] - 0.5 * x**2 - self.bend * x**3 - self.wave * torch.sin(3 * x))
        by[:, 1, 1] = 2.0
        slope = x + 3 * self.bend * x**2 + 3 * self.wave * torch.cos(3 * x)
        by[:, 0, 1] = -2 * slope
        rest[:, 2:], by[:, 2:] = rest[:, 2:] / 3, by[:, 2:] / 3
        return rest, by

    def normals(self, v):
        """What is standard normal, (N, D)."""
        return self.residuals(torch.as_tensor(v))[0].numpy()


class _Student(_Squares):
    """Independent Student t of 8 degrees of freedom, which are no squares of any residual."""

    dof = 8.0

    def residuals(self, v):
        return v, torch.eye(v.shape[1]).double().repeat(len(v), 1, 1)

    def log_prob(self, v, rows):
        return -0.5 * (self.dof + 1) * torch.log1p(v.square() / self.dof).sum(1)

    def expanded(self, v, rows, reference):
        rest, by = self.residuals(v)
        slope = -(self.dof + 1) * v / (self.dof + v.square())
        return self.log_prob(v, rows), slope, rest.float(), by.float()


class _TwoModes(_Squares):
    """Two normal distributions of different width, with 30 and 70 % of the probability."""

    def log_prob(self, v, rows):
        return torch.logsumexp(self._each(v), 0)

    def _each(self, v):
        offset, width = v.clone(), torch.tensor([1.0, 0.5]).double()
        parts = []
        for share, place, w in zip((0.3, 0.7), (-6.0, 6.0), width, strict=True):
            offset = v.clone()
            offset[:, 0] -= place
            norm = SIZE * (torch.log(w) + 0.5 * np.log(2 * np.pi))
            parts.append(np.log(share) - norm - 0.5 * (offset / w).square().sum(1))
        return torch.stack(parts)

    def residuals(self, v):
        left = (v[:, :1] < 0).double()
        width = left + 0.5 * (1 - left)
        rest = v.clone()
        rest[:, :1] -= 6.0 - 12.0 * left
        eye = torch.eye(v.shape[1]).double().repeat(len(v), 1, 1)
        return rest / width, eye / width[..., None]

    def expanded(self, v, rows, reference):
        rest, by = self.residuals(v)
        return (
            self.log_prob(v, rows),
            -(by @ rest[..., None])[..., 0],
            rest.float(),
            by.float(),
        )


def near(place, width=1.0, g=1):
    """Normal approximations of problems (g,), all alike."""
    centre = torch.zeros(g, SIZE, dtype=torch.float64)
    centre[:, 0] = place
    root = width * torch.eye(SIZE, dtype=torch.float64)
    return Proposal(centre, root.repeat(g, 1, 1))


def chains_of(target, modes, *, g=1, seed=1, first=0, **options):
    rows, streams = torch.arange(g), Streams([(seed, first + i) for i in range(g)])
    with one_thread(), torch.no_grad():
        known = learn_modes(target, modes, rows, streams)
        return sample_through_surrogates(target, known, rows, streams, **options)


def check_moments(values, expected):
    """Means of values (G, n) are as expected, by the scatter of problems (1e-4 by chance)."""
    mean = values.mean(1)
    error = mean.std(ddof=1) / np.sqrt(len(mean))
    assert abs(mean.mean() - expected) < stats.t(len(mean) - 1).isf(5e-5) * error + 1e-3


@pytest.mark.parametrize(("bend", "wave"), [(0.0, 0.0), (0.15, 0.0), (0.0, 0.1)])
def test_chains_have_the_moments_of_a_bent_density(bend, wave):
    """Also where the stand-ins cannot be right: a wave is no parabola."""
    g, target = 20, _Bent(bend, wave)
    made = chains_of(target, [near(0.0, g=g)], g=g, chains=4, draws=100, blocks=1, rhat=0.0)
    normal = np.stack([target.normals(v) for v in made.v.flatten(1, 2)])
    for k in (0, 1, 2, 29):
        check_moments(normal[..., k], 0.0)
        check_moments(normal[..., k] ** 2, 1.0)
        check_moments(np.abs(normal[..., k]) > 1.96, 0.05)
    assert np.median(made.ess) > 50
    thin = normal[:, ::40, :2].reshape(-1, 2)
    for k in (0, 1):
        assert stats.kstest(thin[:, k], "norm").pvalue > 1e-3


def test_chains_have_the_tails_of_a_student_distribution():
    g, target = 12, _Student()
    made = chains_of(target, [near(0.0, g=g)], g=g, chains=4, draws=300, blocks=1, rhat=0.0)
    v = made.v.flatten(1, 2).numpy()
    for k in (0, 17):
        check_moments(v[..., k], 0.0)
        check_moments(v[..., k] ** 2, 8.0 / 6.0)
        check_moments(np.abs(v[..., k]) > stats.t(8).isf(0.01), 0.02)


def test_shares_of_two_modes():
    g, target = 12, _TwoModes()
    modes = [near(-6.3, 0.8, g), near(6.0, 0.6, g)]
    made = chains_of(target, modes, g=g, chains=4, draws=100, blocks=1, rhat=0.0)
    v = made.v.flatten(1, 2).numpy()
    check_moments(v[..., 0] > 0, 0.7)
    left = v[v[..., 0] < 0]
    right = v[v[..., 0] > 0]
    assert_allclose(left.std(0).mean(), 1.0, atol=0.02)
    assert_allclose(right.std(0).mean(), 0.5, atol=0.01)


def test_weights_and_evidence():
    g, rows = 4, torch.arange(4)
    for target, modes, integral in (
        (_TwoModes(), [near(-6.3, 0.8, g), near(6.0, 0.6, g)], 0.0),
        (
            _Bent(0.1),
            [near(0.0, 1.0, g)],
            VOLUME,
        ),
    ):
        streams = Streams([(2, i) for i in range(g)])
        with one_thread(), torch.no_grad():
            known = learn_modes(target, modes, rows, streams)
            drawn = weigh_surrogates(target, known, rows, 1000, streams)
        assert (drawn.khat < 0.7).all()
        assert (np.abs(drawn.log_evidence - integral) < 5 * drawn.log_evidence_err).all()
        assert (drawn.log_evidence_err < 0.4).all()


def test_modes_that_are_one_are_kept_once():
    target, rows, streams = _Bent(), torch.tensor([0]), Streams([(1, 0)])
    with one_thread(), torch.no_grad():
        known = learn_modes(target, [near(0.0), near(0.1), near(400.0)], rows, streams)
    assert [len(own) for own in known] == [1]


def test_company_changes_nothing():
    target, modes = _Bent(0.1), [near(0.0, g=3)]
    many = chains_of(target, modes, g=3, draws=30, blocks=2)
    again = chains_of(target, modes, g=3, draws=30, blocks=2)
    alone = chains_of(target, [near(0.0)], g=1, first=1, draws=30, blocks=2)
    assert torch.equal(many.v, again.v)
    assert torch.equal(many.v[1], alone.v[0])


def test_what_repeats_itself_is_drawn_once():
    """Half of a normal distribution, which the stand-ins know nothing of."""
    made = chains_of(
        _Bent(), [near(0.0, g=6)], g=6, draws=200, blocks=1, rhat=0.0,
        inside=lambda v, rows: v[:, 5] > 0,
    )  # fmt: skip
    kept = made.v.flatten(1, 2).numpy()[..., 5]
    assert kept.min() > 0
    check_moments(kept, 3 * np.sqrt(2 / np.pi))


def test_no_density_is_no_chain():
    class Nothing(_Bent):
        def log_prob(self, v, rows):
            return torch.full((len(v),), -torch.inf).double()

        def expanded(self, v, rows, reference):
            own = super().expanded(v, rows, reference)
            return (self.log_prob(v, rows), *own[1:])

    made = chains_of(Nothing(), [near(0.0)], draws=20, blocks=1)
    assert np.isinf(made.rhat[0])
    assert torch.isnan(made.v).all()


def test_surrogates_know_cubic_residuals():
    """Lessons of residuals of the third order are learned exactly, and the slope is theirs."""
    rng = np.random.default_rng(1)
    target = _Bent(0.2)
    v = torch.as_tensor(rng.normal(size=(300, SIZE)))
    rows = torch.zeros(len(v), dtype=torch.long)
    lessons = _Lessons(v, *target.expanded(v, rows, None))
    frame = _Frame.of(near(0.2), 0)
    made = Surrogate.fitted(frame, lessons, torch.ones(300, dtype=torch.float64))
    y = torch.as_tensor(0.7 * rng.normal(size=(50, SIZE)))
    value, slope = made.log_prob(y)
    exact = target.log_prob(made.frame.place(y), rows[:50])
    assert (value - exact).std() < 0.1 < exact.std() / 10
    step = torch.as_tensor(rng.normal(size=y.shape))
    up, down = (made.log_prob(y + s * 1e-2 * step)[0] for s in (1, -1))
    assert_allclose((slope * step).sum(1), (up - down) / 2e-2, rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def galaxies():
    y, x = np.mgrid[:15, :15] - 7
    psf = PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))
    model = LearnedGalaxy2D.from_pretrained(flux=600, x_0=12, y_0=12, r_50=3.5, psf=psf)
    params = model.sample(2, rng=3)
    clean = model.render((25, 25), params=params)
    return model, params, clean + np.random.default_rng(4).normal(0, 0.5, clean.shape)


def test_learned_galaxies_by_weights_and_chains(galaxies):
    model, params, data = galaxies
    fitters = {
        "weights": ImportanceFitter(rng=1, fallback=False),
        "chains": MCMCFitter(rng=1, draws=250, blocks=1),
    }
    found = {n: fit_images(data, model, f, uncertainty=0.5) for n, f in fitters.items()}
    assert (found["weights"].extra["khat"] < 0.7).all()
    assert not (found["weights"].flags & FitFlag.WEIGHTS).any()
    assert (found["chains"].extra["rhat"] < 1.1).all()
    one, other = found["weights"].posterior, found["chains"].posterior
    shift = (one.mean - other.mean) / other.std
    away = [0, 1, 2, 3, *range(5, 37)]
    assert np.abs(shift[:, away]).max() < 0.5
    assert np.abs(one.std / other.std - 1)[:, away].max() < 0.4
    pull = (params - one.mean) / one.std
    assert np.abs(pull[:, away]).max() < 5
