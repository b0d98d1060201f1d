"""Posteriors: densities and their slopes, samplers against each other, the one interface."""

import numpy as np
import pytest
import torch
from astropy.table import QTable
from astropy.utils.exceptions import AstropyUserWarning
from numpy.testing import assert_allclose
from scipy import integrate, stats

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    EncoderFitter,
    FitFlag,
    FitResult,
    GaussianGalaxy2D,
    ImportanceFitter,
    LearnedGalaxy2D,
    LogNormal,
    LogUniform,
    MAPFitter,
    MCMCFitter,
    NestedFitter,
    Normal,
    PointSource2D,
    SersicGalaxy2D,
    Uniform,
    fit_images,
)
from galmorph._batchfit import one_thread
from galmorph._sampling import make_target
from galmorph.derived import aperture_flux, concentration, ellipticity, light_radius, magnitude
from galmorph.evidence import log_evidence
from galmorph.inference.diagnostics import effective_sample_size, pareto_smooth, split_rhat
from galmorph.inference.mcmc import (
    Mixture,
    Proposal,
    Streams,
    adapt_mixture,
    climb,
    importance_draws,
    sample_chains,
)
from galmorph.inference.nested import Lockstep, nested_sampling
from galmorph.noise import CorrelatedNoise, GaussianNoise, PoissonNoise, StudentTNoise
from galmorph.priors import Truncated


def gaussian_psf(sigma=1.5, size=21):
    y, x = np.mgrid[:size, :size] - size // 2
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


PARAMS = np.array([[60, 15.2, 14.1, 3, 1.5, 0.4, 0.5], [80, 16, 15, 2.5, 2.5, 0.03, -1.0]])


def stamps(params, sigma, rng, model=None, shape=(32, 31), psf=None):
    clean = (model or SersicGalaxy2D()).render(shape, params=params, psf=psf or gaussian_psf())
    return clean + rng.normal(0, sigma, clean.shape)


def target_of(model, params, *, sigma=0.1, psf=None, background="constant", **options):
    noise = options.pop("noise", None)
    rng = np.random.default_rng(3)
    data = stamps(params, sigma, rng, model, psf=psf or gaussian_psf())
    inv_sigma = np.full(data.shape, 1 / sigma)
    inv_sigma[:, 3:6, 4] = 0
    setup = MAPFitter(dtype="float64", **options)._setup(model, background)
    return make_target(setup, data, inv_sigma, psf or gaussian_psf(), params, noise=noise)


CASES = {
    "sersic": (SersicGalaxy2D(), PARAMS, {}),
    "priors": (
        SersicGalaxy2D(),
        PARAMS,
        {
            "background": "tilted",
            "priors": {
                "flux": LogNormal(60, 0.5),
                "x_0": Normal(15, 1),
                "r_eff": LogNormal(3, 0.4),
                "n": LogUniform(0.3, 6),
                "ellip": Uniform(0, 0.9),
                "theta": Normal(0.3, 0.5),
            },
        },
    ),
    "bounds": (SersicGalaxy2D(bounds={"ellip": (-0.5, 0.9), "flux": (0, 200)}), PARAMS, {}),
    "fixed": (SersicGalaxy2D(n=2, fixed={"n": True, "theta": True}), PARAMS, {}),
    "no background": (GaussianGalaxy2D(), PARAMS[:, [0, 1, 2, 3, 5, 6]], {"background": "none"}),
    "point": (PointSource2D(), PARAMS[:, :3], {}),
    "bulge + disk": (
        BulgeDiskGalaxy2D(),
        np.array([[80, 15.2, 14.1, 0.3, 1.5, 3, 0.2, 0.4, 5, 0.5, 1.0]]),
        {},
    ),
    "student": (SersicGalaxy2D(), PARAMS, {"noise": StudentTNoise(5.0)}),
    "poisson": (SersicGalaxy2D(), PARAMS, {"noise": PoissonNoise(gain=50.0, read_noise=5.0)}),
    "correlated": (
        SersicGalaxy2D(),
        PARAMS,
        {"noise": CorrelatedNoise([[0.1, 0.2, 0.1], [0.2, 1, 0.2], [0.1, 0.2, 0.1]], radius=2)},
    ),
    "floor": (SersicGalaxy2D(), PARAMS, {"noise": GaussianNoise(floor=0.1)}),
}


class TestTarget:
    @pytest.mark.parametrize("name", CASES)
    def test_slope_is_that_of_the_density(self, name):
        model, params, options = CASES[name]
        target = target_of(model, params, **options)
        with one_thread(), torch.no_grad():
            values = torch.as_tensor(params)
            none = torch.zeros(len(params), len(target.templates), dtype=torch.float64)
            target.settle(values, none)
            rng = np.random.default_rng(1)
            v = target.from_params(values, none)
            v = v + 0.01 * torch.as_tensor(rng.normal(size=v.shape))
            rows = torch.arange(len(params))
            density, slope = target.log_prob_and_slope(v, rows)
            assert_allclose(target.log_prob(v, rows), density, rtol=1e-12)
            h = 1e-5
            for k in range(target.size):
                step = torch.zeros_like(v)
                step[:, k] = h
                up, down = (target.log_prob(v + s * step, rows) for s in (1, -1))
                expected = ((up - down) / (2 * h)).numpy()
                scale = np.abs(slope.numpy()).max(1)
                assert_allclose(slope[:, k].numpy(), expected, atol=2e-5 * scale.max(), rtol=1e-4)

    def test_learned_slope(self):
        model = LearnedGalaxy2D.from_pretrained(flux=60, x_0=15.3, y_0=14.8, r_50=4, theta=0.7)
        params = model.sample(2, rng=1)
        for priors in ({}, {"flux": LogNormal(60, 0.3), "r_50": LogNormal(4, 0.2)}):
            target = target_of(model, params, priors=priors)
            with one_thread(), torch.no_grad():
                none = torch.zeros(2, 1, dtype=torch.float64)
                v = target.from_params(target.of_galaxies(torch.as_tensor(params)), none)
                v = v + 0.01 * torch.as_tensor(np.random.default_rng(1).normal(size=v.shape))
                rows = torch.arange(2)
                density, slope = target.log_prob_and_slope(v, rows)
                assert_allclose(target.log_prob(v, rows), density, rtol=1e-12)
                direction = torch.as_tensor(np.random.default_rng(2).normal(size=v.shape))
                h = 1e-6
                up, down = (target.log_prob(v + s * h * direction, rows) for s in (1, -1))
                assert_allclose((slope * direction).sum(1), (up - down) / (2 * h), rtol=1e-3)

    @pytest.mark.parametrize("name", ["sersic", "priors", "bounds", "bulge + disk"])
    def test_prior_integrates_to_one(self, name):
        """Draws through the unit cube have the density that the target says."""
        model, params, options = CASES[name]
        target = target_of(model, params, **options)
        with torch.no_grad():
            none = torch.zeros(len(params), len(target.templates), dtype=torch.float64)
            target.settle(torch.as_tensor(params), none)
            rng = np.random.default_rng(2)
            count = 100000
            share = rng.random((count, target.size))
            rows = torch.zeros(count, dtype=torch.long)
            v = target.from_unit(share, rows)
            density = target.log_prior(v, rows)
            assert torch.isfinite(density).all()
            # the mean of 1 / density over the draws within a box is its volume
            v = v.numpy()
            low, high = np.percentile(v, [20, 80], axis=0)
            inside = ((v > low) & (v < high)).all(1)
            ratio = np.where(inside, np.exp(-density.numpy()), 0.0) / np.prod(high - low)
            assert inside.sum() > 100
            assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(count)

    def test_prior_of_an_ellipse(self):
        """Uniform in ellip and theta, in coordinates of any power."""
        target = target_of(SersicGalaxy2D(), PARAMS)
        with torch.no_grad():
            none = torch.zeros(2, 1, dtype=torch.float64)
            target.settle(torch.as_tensor(PARAMS), none)
            axis = next(a for a in target.axes if a.kind == "disc")
            powers = target._powers(axis)
            assert powers[0] < 1.2 < 1.8 < powers[1] <= 2
            for row in (0, 1):
                where = torch.tensor([row])

                def density(y, x, where=where):
                    place = torch.tensor([[x, y]]).double()
                    return float(torch.exp(target._flat(axis, place, where))[0])

                radius = float(0.99 ** (1 / powers[row]))
                total, _ = integrate.dblquad(
                    lambda phi, r: r * density(r * np.sin(phi), r * np.cos(phi)),
                    1e-6,
                    radius,
                    0,
                    2 * np.pi,
                    epsabs=1e-4,
                )
                assert total == pytest.approx(1, abs=5e-3)


class _Banana:
    """A bent normal distribution of two coordinates, known in closed form."""

    size = 2

    def log_prob(self, v, rows):
        x, y = v.unbind(1)
        return -0.5 * (x**2 + (y - 0.5 * x**2) ** 2 / 0.25) - np.log(2 * np.pi * 0.5)

    def log_prob_and_slope(self, v, rows):
        x, y = v.unbind(1)
        off = (y - 0.5 * x**2) / 0.25
        return self.log_prob(v, rows), torch.stack([-x + off * x, -off], 1)

    def curvature(self, v):
        x = v[:, 0]
        rows = [torch.stack([1 + 4 * x**2, -4 * x], 1), torch.stack([-4 * x, 0 * x + 4], 1)]
        return torch.stack(rows, 1)


class _TwoModes:
    """Two normal distributions far apart, with 30 and 70 % of the probability."""

    size = 2

    def log_prob(self, v, rows):
        each = [
            np.log(share / (2 * np.pi)) - 0.5 * (v - place).square().sum(1)
            for share, place in ((0.3, -4.0), (0.7, 4.0))
        ]
        return torch.logsumexp(torch.stack(each), 0)

    def log_prob_and_slope(self, v, rows):
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            value = self.log_prob(v, rows)
            (slope,) = torch.autograd.grad(value.sum(), v)
        return value.detach(), slope


class TestSamplers:
    def test_chains_follow_a_bent_density(self):
        """Means over many independent problems, in which both coordinates become normal."""
        g = 100
        proposal = Proposal(
            torch.zeros(g, 2, dtype=torch.float64), torch.eye(2).double().repeat(g, 1, 1)
        )
        streams = Streams([(1, i) for i in range(g)])
        start = torch.zeros(g, 4, 2, dtype=torch.float64)
        # of fixed length: chains that stop as soon as they agree have seen too little of the tails
        chains = sample_chains(_Banana(), proposal, start, streams, rhat=0.0, blocks=2)
        assert (chains.rhat < 1.05).mean() > 0.9
        x, y = chains.v.flatten(1, 2).numpy().transpose(2, 0, 1)
        for normal in (x, (y - 0.5 * x**2) / 0.5):
            for value, expected in (
                (normal, 0.0),
                (normal**2, 1.0),
                (np.abs(normal) > 2, 2 * stats.norm.sf(2)),
            ):
                mean = value.mean(1)
                assert abs(mean.mean() - expected) < 4 * mean.std() / np.sqrt(g)

    def test_importance_knows_the_integral(self):
        proposal = Proposal(
            torch.tensor([[0.0, 0.5]]).double(), (1.2 * torch.eye(2)).double()[None]
        )
        drawn = importance_draws(_Banana(), proposal, torch.tensor([0]), 4000, Streams([(5,)]))
        assert abs(drawn.log_evidence[0]) < 4 * drawn.log_evidence_err[0] < 0.2
        assert drawn.khat[0] < 0.7

    def test_mixture_finds_the_share_of_modes(self):
        """Proposals that are too narrow, and share wrongly, become those of a known density."""
        g, target = 2, _TwoModes()
        modes = [
            Proposal(torch.full((g, 2), c).double(), 0.4 * torch.eye(2).double().repeat(g, 1, 1))
            for c in (-3.8, 4.2)
        ]
        mixture = Mixture.of(modes, torch.tensor([[1.0, 0.0]] * g).double())
        rows, streams = torch.arange(g), Streams([(3, i) for i in range(g)])
        adapt_mixture(target, mixture, rows, (200, 300, 500), streams)
        drawn = importance_draws(target, mixture, rows, 2000, streams)
        assert (np.abs(drawn.log_evidence) < 4 * drawn.log_evidence_err).all()
        assert (drawn.khat < 0.5).all()
        assert (drawn.ess > 1000).all()
        share = (torch.exp(drawn.log_weight) * (drawn.v[..., 0] > 0)).sum(1).numpy()
        assert_allclose(share, 0.7, atol=4 * np.sqrt(0.21 / drawn.ess.min()))
        chains = sample_chains(
            target, mixture.moments(), drawn.v[:, :4], streams, mixture=mixture, ess=200
        )
        share = (chains.v[..., 0] > 0).double().mean((1, 2)).numpy()
        assert_allclose(share, 0.7, atol=4 * np.sqrt(0.21 / chains.ess.min()))

    def test_climbs_to_the_mode(self):
        start = torch.tensor([[2.0, 3.0], [-1.0, -1.0]]).double()
        assert_allclose(climb(_Banana(), start, steps=30), np.zeros((2, 2)), atol=1e-3)

    def test_streams_do_not_depend_on_company(self):
        all_rows, second = torch.tensor([0, 1, 2]), torch.tensor([1])
        many = Streams([(7, 0), (7, 1), (7, 2)]).normal(all_rows, 3)
        alone = Streams([(7, 0), (7, 1), (7, 2)]).normal(second, 3)
        assert torch.equal(many[1], alone[0])


class TestDiagnostics:
    def test_effective_size_of_an_autoregression(self):
        rng = np.random.default_rng(1)
        rho, length = 0.8, 4000
        noise = rng.normal(size=(4, length))
        chain = np.empty_like(noise)
        chain[:, 0] = noise[:, 0] / np.sqrt(1 - rho**2)
        for t in range(1, length):
            chain[:, t] = rho * chain[:, t - 1] + noise[:, t]
        expected = 4 * length * (1 - rho) / (1 + rho)
        assert effective_sample_size(chain) == pytest.approx(expected, rel=0.2)
        assert split_rhat(chain) < 1.01

    def test_rhat_sees_what_differs(self):
        chains = np.random.default_rng(1).normal(size=(4, 500))
        chains[0] += 2
        assert split_rhat(chains) > 1.1
        drifting = np.random.default_rng(1).normal(size=(4, 500)) + np.linspace(0, 3, 500)
        assert split_rhat(drifting) > 1.1

    @pytest.mark.parametrize("shape", [0.3, 0.6, 1.0])
    def test_khat_is_the_shape_of_the_tail(self, shape):
        weights = stats.genpareto(shape).rvs((40, 4000), random_state=2)
        _, khat = pareto_smooth(np.log(weights))
        assert khat.mean() == pytest.approx(shape, abs=0.08)

    def test_smoothed_weights(self):
        log_weights = np.random.default_rng(1).normal(size=(3, 1000))
        log_weights[2] = -np.inf
        smooth, khat = pareto_smooth(log_weights)
        assert_allclose(np.exp(smooth[:2]).sum(1), 1)
        assert np.isinf(khat[2])
        assert np.isfinite(khat[:2]).all()

    def test_agrees_with_arviz(self):
        arviz = pytest.importorskip("arviz")
        chains = np.random.default_rng(1).normal(size=(4, 400)).cumsum(1) * 0.1
        assert split_rhat(chains) == pytest.approx(arviz.rhat(chains, method="split"), rel=1e-6)
        own = effective_sample_size(chains)
        assert own == pytest.approx(float(arviz.ess(chains, method="mean")), rel=0.1)


@pytest.fixture(scope="module")
def fits():
    """The same two galaxies with every kind of posterior."""
    data = stamps(PARAMS, 0.12, np.random.default_rng(8))
    fitters = {
        "map": MAPFitter(),
        "importance": ImportanceFitter(rng=1, n_samples=2000),
        "mcmc": MCMCFitter(rng=1),
        "emcee": MCMCFitter(sampler="emcee", rng=1, blocks=2, draws=400),
    }
    options = {"uncertainty": 0.12, "psf": gaussian_psf(), "background": "constant"}
    return {
        name: fit_images(data, SersicGalaxy2D(), fitter, **options)
        for name, fitter in fitters.items()
    }


class TestFitters:
    def test_methods_agree(self, fits):
        reference = fits["mcmc"].posterior
        for name in ("importance", "emcee"):
            other = fits[name].posterior
            shift = (other.mean - reference.mean) / reference.std
            assert np.abs(shift).max() < 0.25, name
            # widths by quantiles: the tails of r_eff are long
            widths = [np.diff(p.quantile([0.16, 0.84]), axis=0)[0] for p in (other, reference)]
            assert_allclose(widths[0], widths[1], rtol=0.25)

    def test_converged(self, fits):
        result = fits["mcmc"]
        assert (result.extra["rhat"] < 1.01).all()
        assert (result.extra["ess"] > 400).all()
        assert not (result.flags & FitFlag.CHAINS).any()
        table = result.to_table()
        assert {"rhat", "ess"} <= set(table.colnames)

    def test_covariance_of_the_result_is_that_of_the_draws(self, fits):
        for name in ("importance", "mcmc"):
            result = fits[name]
            assert_allclose(result.stds, result.posterior.std[:, :7], rtol=1e-6)

    def test_repeats(self):
        data = stamps(PARAMS[:1], 0.2, np.random.default_rng(8))
        options = {"uncertainty": 0.2, "psf": gaussian_psf()}
        for fitter in (ImportanceFitter(rng=3), MCMCFitter(rng=3, draws=50, blocks=1)):
            one, two = (fit_images(data, SersicGalaxy2D(), fitter, **options) for _ in range(2))
            assert np.array_equal(one.extra["samples"], two.extra["samples"])

    def test_unconverged_chains_are_flagged(self):
        data = stamps(PARAMS[:1], 0.2, np.random.default_rng(8))
        fitter = MCMCFitter(rng=3, draws=20, blocks=1)
        result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=0.2, psf=gaussian_psf())
        assert result.flags[0] & FitFlag.CHAINS

    def test_bad_galaxies_do_not_harm(self):
        data = stamps(np.repeat(PARAMS, 2, 0), 0.2, np.random.default_rng(8))
        data[1] = np.nan
        result = fit_images(
            data, SersicGalaxy2D(), ImportanceFitter(rng=1), uncertainty=0.2, psf=gaussian_psf()
        )
        assert result.flags[1] & FitFlag.NO_DATA
        assert np.isnan(result.posterior.mean[1]).all()
        assert np.isfinite(result.posterior.mean[[0, 2, 3]]).all()
        assert np.isnan(result.posterior.sample(5, rng=1)[1]).all()

    def test_resumes(self, tmp_path):
        data = stamps(np.repeat(PARAMS, 3, 0), 0.2, np.random.default_rng(8))
        options = {"uncertainty": 0.2, "psf": gaussian_psf(), "batch_size": 2}
        fitter = ImportanceFitter(rng=1, n_samples=100)
        whole = fit_images(data, SersicGalaxy2D(), fitter, **options)
        kept = tmp_path / "kept"

        def stop(done, total):
            if done >= 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_images(data, SersicGalaxy2D(), fitter, checkpoint=kept, progress=stop, **options)
        again = fit_images(data, SersicGalaxy2D(), fitter, checkpoint=kept, **options)
        for name, values in whole.extra.items():
            assert_allclose(again.extra[name], values, err_msg=name)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="sampler"):
            MCMCFitter(sampler="gibbs")
        with pytest.raises(ValueError, match="proposal"):
            ImportanceFitter(proposal="guess")
        with pytest.raises(ValueError, match="n_samples"):
            ImportanceFitter(n_samples=1)
        with pytest.raises(ValueError, match="two chains"):
            MCMCFitter(chains=1)
        with pytest.raises(TypeError, match="noise model"):
            MAPFitter(noise=3.0)

    def test_learned_galaxies_may_point_either_way(self):
        """What is symmetric has two directions, and no more than noise prefers one."""
        model = LearnedGalaxy2D.from_pretrained(flux=100, x_0=20, y_0=20, r_50=4)
        shape = SersicGalaxy2D(flux=100, x_0=20, y_0=20, r_eff=4, n=1, ellip=0.5, theta=0.3)
        clean = shape.render((41, 41), psf=gaussian_psf())
        data = clean + np.random.default_rng(2).normal(0, 0.5, clean.shape)
        fitter = ImportanceFitter(rng=1, n_samples=300, fallback=False)
        result = fit_images(data, model, fitter, uncertainty=0.5, psf=gaussian_psf())
        posterior = result.posterior
        off = posterior.samples[0, :, 4] - result.params[0, 4]
        opposite = posterior.weights[0][np.abs(off) > np.pi / 2].sum()
        assert 0.1 < opposite < 0.9

    def test_learned(self):
        model = LearnedGalaxy2D.from_pretrained(flux=600, x_0=20, y_0=20, r_50=4)
        params = model.sample(1, rng=4)
        data = stamps(params, 0.5, np.random.default_rng(1), model, (41, 41))
        options = {"uncertainty": 0.5, "psf": gaussian_psf()}
        laplace = fit_images(data, model, **options)
        for fitter in (
            ImportanceFitter(rng=1, n_samples=200, fallback=False),
            ImportanceFitter(rng=1, n_samples=100, fallback=False, proposal="encoder"),
            MCMCFitter(rng=1, draws=40, blocks=1, n_samples=100),
        ):
            result = fit_images(data, model, fitter, **options)
            posterior = result.posterior
            assert abs(posterior.mean[0, 0] - 600) < 6 * laplace.stds[0, 0]
            assert result.derive(light_radius(0.5), n=20).mean[0] == pytest.approx(4, rel=0.5)
        with pytest.raises(TypeError, match="MAPFitter"):
            fit_images(data, SersicGalaxy2D(), ImportanceFitter(proposal="encoder"), **options)


class TestAstropyWay:
    @pytest.mark.parametrize("fitter", [ImportanceFitter(rng=1), MCMCFitter(rng=1)])
    def test_as_for_images(self, fitter):
        data = stamps(PARAMS[:1], 0.2, np.random.default_rng(8))[0]
        y, x = np.mgrid[:32, :31] + np.array([100.0, 50.0])[:, None, None]
        start = SersicGalaxy2D(50, 65.0, 114.5, r_eff=2.5, n=1, ellip=0.3, theta=0.4)
        start.psf = gaussian_psf()
        weights = np.full(data.shape, 5.0)
        fitted = fitter(start, x, y, data, weights=weights)
        samples = fitter.fit_info["samples"]
        assert samples.shape == (1000, 7)
        own = fit_images(
            data, SersicGalaxy2D(), type(fitter)(rng=1, priors={}), uncertainty=0.2,
            psf=gaussian_psf(),
        )  # fmt: skip
        expected = own.params[0] + np.array([0, 50, 100, 0, 0, 0, 0])
        assert_allclose(fitted.parameters[:4], expected[:4], rtol=1e-3)
        spread = samples.std(0)
        assert np.abs(np.median(samples, 0) - fitted.parameters)[:3].max() < spread[:3].max()
        assert np.sqrt(np.diag(fitter.fit_info["param_cov"])).shape == (7,)

    def test_refusals(self):
        data, (y, x) = np.zeros((5, 5)), np.mgrid[:5, :5]
        two = SersicGalaxy2D() + SersicGalaxy2D()
        with pytest.raises(TypeError, match="one galmorph model"):
            MCMCFitter()(two, x, y, data, weights=data + 1)
        with pytest.raises(ValueError, match="weights"):
            MCMCFitter()(SersicGalaxy2D(), x, y, data)


class TestInterface:
    @pytest.mark.parametrize("name", ["map", "importance", "mcmc", "emcee"])
    def test_one_interface(self, fits, name):
        result = fits[name]
        posterior = result.posterior
        assert posterior.param_names[-1] == "background"
        draws = posterior.sample(3000, rng=1)
        assert draws.shape == (2, 3000, 8)
        assert np.array_equal(draws, posterior.sample(3000, rng=1))
        error = posterior.std / np.sqrt(150)
        assert (np.abs(draws.mean(1) - posterior.mean) < 5 * error + 0.35 * posterior.std).all()
        low, high = posterior.quantile([0.16, 0.84])
        assert_allclose(0.5 * (high - low)[0], posterior.std[0], rtol=0.3)
        assert posterior.quantile(0.5).shape == (2, 8)
        density = posterior.log_prob(draws[:, :5])
        assert density.shape == (2, 5)
        assert np.isfinite(density).all()
        assert (result.params[:, 3] > 0).all()
        assert (draws[..., 3] > 0).all()
        assert ((draws[..., 5] >= 0) & (draws[..., 5] < 1)).all()

    def test_density_of_draws_is_highest_at_the_fit(self, fits):
        result = fits["map"]
        best = np.concatenate([result.params, result.background], 1)
        draws = result.posterior.sample(50, rng=1)
        assert (result.posterior.log_prob(draws).max(1) < result.posterior.log_prob(best) + 2).all()

    def test_density_is_normalised_with_the_evidence(self):
        """One free parameter: the density integrates to one."""
        model = SersicGalaxy2D(
            x_0=15.2, y_0=14.1, r_eff=3, n=1.5, ellip=0.4, theta=0.5,
            fixed=dict.fromkeys(("x_0", "y_0", "n", "ellip", "theta", "r_eff"), True),
        )  # fmt: skip
        data = stamps(PARAMS[:1], 0.3, np.random.default_rng(1))
        result = fit_images(
            data, model, ImportanceFitter(rng=1), uncertainty=0.3, psf=gaussian_psf()
        )
        flux = result.params[0, 0] + result.stds[0, 0] * np.linspace(-8, 8, 801)
        params = np.repeat(result.params, len(flux), 0)
        params[:, 0] = flux
        density = np.exp(result.posterior.log_prob(params[None]))[0]
        assert integrate.simpson(density, x=flux) == pytest.approx(1, abs=0.02)
        # the closed form of a linear model
        value, _ = log_evidence(result, method="importance", rng=2)
        laplace, _ = log_evidence(result, method="laplace")
        assert abs(value[0] - laplace[0]) < 0.05

    def test_angles_stay_near_the_fit(self, fits):
        for result in fits.values():
            theta = result.posterior.sample(500, rng=1)[..., 6]
            assert (np.abs(theta - result.params[:, None, 6]) <= np.pi / 2 + 1e-9).all()

    @pytest.mark.parametrize("suffix", ["ecsv", "fits"])
    def test_written_and_read(self, fits, tmp_path, suffix):
        for name in ("map", "importance", "mcmc"):
            path = tmp_path / f"{name}.{suffix}"
            if suffix == "ecsv" and name != "map":
                with pytest.warns(AstropyUserWarning, match="too many"):
                    fits[name].write(path)
                again = FitResult.read(path)
                assert_allclose(again.stds, fits[name].stds)
                assert again.posterior.kind == "normal"
                continue
            fits[name].write(path)
            again = FitResult.read(path)
            assert again.posterior.kind == fits[name].posterior.kind
            assert_allclose(again.posterior.mean, fits[name].posterior.mean)
            assert_allclose(
                again.posterior.sample(10, rng=1), fits[name].posterior.sample(10, rng=1)
            )
            with pytest.raises(ValueError, match="no pixels"):
                again.posterior.log_prob(fits[name].posterior.mean)
            QTable.read(path)

    def test_selections(self, fits):
        part = fits["importance"][1]
        assert_allclose(part.posterior.mean[0], fits["importance"].posterior.mean[1])

    def test_arviz(self, fits):
        pytest.importorskip("arviz")
        data = fits["mcmc"].posterior.to_arviz(0)
        assert data.posterior["flux"].shape[0] == 4
        assert float(data.posterior["flux"].mean()) == pytest.approx(
            fits["mcmc"].posterior.mean[0, 0], rel=1e-6
        )

    def test_samples_of_learned_galaxies_with_encoder(self):
        model = LearnedGalaxy2D.from_pretrained(flux=600, x_0=32, y_0=32, r_50=6)
        data = stamps(model.sample(1, rng=4), 0.5, np.random.default_rng(1), model, (65, 65))
        result = fit_images(data, model, EncoderFitter(), uncertainty=0.5, psf=gaussian_psf())
        assert result.posterior.sample(20, rng=1).shape == (1, 20, 37)


class TestDerived:
    def test_of_a_sersic_profile(self, fits):
        """In the limit of a round galaxy these are known in closed form."""
        from scipy.special import gammaincinv

        model = SersicGalaxy2D(
            flux=100, x_0=15, y_0=15, r_eff=4, n=2, ellip=0, fixed={"ellip": True, "theta": True}
        )
        image = model.render((31, 31), psf=gaussian_psf())
        result = fit_images(image, model, uncertainty=1e-3, psf=gaussian_psf())
        b = gammaincinv(4, 0.5)
        assert result.derive(light_radius(0.5)).mean[0] == pytest.approx(4, rel=5e-3)
        assert result.derive(aperture_flux(4.0)).mean[0] == pytest.approx(50, rel=1e-2)
        exact = 5 * np.log10((gammaincinv(4, 0.8) / gammaincinv(4, 0.2)) ** 2)
        assert result.derive(concentration()).mean[0] == pytest.approx(exact, rel=1e-2)
        assert b > 0

    def test_of_two_parts(self):
        model = BulgeDiskGalaxy2D(
            flux=100, x_0=31, y_0=31, bulge_fraction=0.4, r_bulge=2, n_bulge=2, r_disk=6,
            ellip_disk=0.3, theta_disk=0.4,
        )  # fmt: skip
        image = model.render((63, 63), psf=gaussian_psf())
        params = np.array([getattr(model, n).value for n in model.param_names])
        result = fit_images(image, BulgeDiskGalaxy2D(), uncertainty=1e-3, psf=gaussian_psf())
        assert_allclose(result.params[0, :4], params[:4], rtol=1e-2)
        inside = result.derive(aperture_flux(5.0)).mean[0]
        fine = 8  # the light itself, on a fine grid
        scaled = params.copy()
        scaled[[1, 2]] = (params[[1, 2]] + 0.5) * fine - 0.5
        scaled[[4, 8]] *= fine
        sharp = BulgeDiskGalaxy2D().render((63 * fine, 63 * fine), params=scaled[None])[0]
        y, x = (np.mgrid[: 63 * fine, : 63 * fine] + 0.5) / fine - 0.5
        expected = sharp[np.hypot(x - 31, y - 31) < 5].sum()
        assert inside == pytest.approx(expected, rel=1e-2)
        assert 0 < result.derive(ellipticity()).mean[0] < 0.3

    def test_errors_follow_the_posterior(self, fits):
        result = fits["mcmc"]
        derived = result.derive(magnitude(25.0), n=900, rng=1)
        flux = result.posterior.mean[:, 0]
        expected = 2.5 / np.log(10) * result.posterior.std[:, 0] / flux
        assert_allclose(derived.std, expected, rtol=0.15)
        assert derived.quantile([0.1, 0.9]).shape == (2, 2)

    def test_bad_functions(self, fits):
        with pytest.raises(ValueError, match="shape"):
            fits["map"].derive(lambda p: p["flux"][0])
        with pytest.raises(KeyError, match="there are"):
            fits["map"].derive(lambda p: p["r_50"])
        with pytest.raises(ValueError, match="radius"):
            aperture_flux(-1)


class TestNoise:
    def test_outliers_do_not_pull(self):
        rng = np.random.default_rng(4)
        data = stamps(PARAMS[:1], 0.1, rng)
        bad = rng.random(data.shape) < 0.02
        data[bad] += 3.0
        options = {"uncertainty": 0.1, "psf": gaussian_psf()}
        plain = fit_images(data, SersicGalaxy2D(), **options)
        robust = fit_images(data, SersicGalaxy2D(), MAPFitter(noise=StudentTNoise(3.0)), **options)
        off = [abs(r.params[0, 0] - PARAMS[0, 0]) for r in (plain, robust)]
        assert off[1] < 0.3 * off[0]
        assert off[1] < 4 * robust.stds[0, 0]
        assert robust.noise.log_prob is not None

    def test_free_scale(self):
        data = stamps(np.repeat(PARAMS, 10, 0), 0.2, np.random.default_rng(4))
        fitter = MAPFitter(noise=GaussianNoise(scale="free"))
        result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=0.1, psf=gaussian_psf())
        assert_allclose(result.extra["noise_parameters"][:, 0], 2, rtol=0.1)
        right = fit_images(data, SersicGalaxy2D(), uncertainty=0.2, psf=gaussian_psf())
        assert_allclose(result.stds[:, 0], right.stds[:, 0], rtol=0.15)
        total = [np.sum(r.log_likelihood_map, (1, 2)) for r in (result, right)]
        assert (total[0] > total[1] - 1).all()

    def test_correlated_noise_covers(self):
        """Fluxes scatter as much as is said, and not as independent pixels would have it."""
        from scipy.ndimage import gaussian_filter

        rng = np.random.default_rng(5)
        count = 150
        clean = SersicGalaxy2D().render((32, 31), params=PARAMS[:1], psf=gaussian_psf())
        noise = np.array(
            [gaussian_filter(rng.normal(size=(64, 62)), 0.6)[16:48, 16:47] for _ in range(count)]
        )
        sigma = noise.std()
        offsets = np.zeros((41, 41))
        offsets[20, 20] = 1
        kernel = gaussian_filter(gaussian_filter(offsets, 0.6), 0.6)
        model_noise = CorrelatedNoise(kernel[14:27, 14:27] / kernel[20, 20], radius=3)
        data = clean + noise * (0.15 / sigma)
        options = {"uncertainty": 0.15, "psf": gaussian_psf()}
        result = fit_images(data, SersicGalaxy2D(), MAPFitter(noise=model_noise), **options)
        plain = fit_images(data, SersicGalaxy2D(), **options)
        pulls = [(r.params[:, 0] - 60) / r.stds[:, 0] for r in (result, plain)]
        assert np.std(pulls[1]) > 1.25
        assert np.std(pulls[0]) < 1.2
        # chi-square of whitened residuals is as it should be
        assert np.median(result.reduced_chi2) == pytest.approx(1, abs=0.05)

    def test_poisson(self):
        rng = np.random.default_rng(6)
        gain, sky = 4.0, 2.0
        clean = SersicGalaxy2D().render(
            (32, 31), params=PARAMS[:1] * [5, 1, 1, 1, 1, 1, 1], psf=gaussian_psf()
        )
        data = rng.poisson(gain * (clean + sky), (80, 32, 31)) / gain - sky
        fitter = MAPFitter(noise=PoissonNoise(gain=gain, background=sky))
        result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=1.0, psf=gaussian_psf())
        pull = (result.params[:, 0] - 300) / result.stds[:, 0]
        assert abs(pull.mean()) < 0.4
        assert 0.75 < pull.std() < 1.3

    def test_held_out_pixels_are_not_fitted(self):
        data = stamps(PARAMS, 0.1, np.random.default_rng(4))
        options = {"uncertainty": 0.1, "psf": gaussian_psf(), "held_out": 0.2, "held_out_seed": 3}
        result = fit_images(data, SersicGalaxy2D(), **options)
        mask = result.held_out_mask(1)
        assert mask.mean() == pytest.approx(0.2, abs=0.05)
        assert result.dof[1] == (~mask).sum() - 7
        assert np.array_equal(result[1].held_out_mask(0), mask)
        spoiled = data.copy()
        spoiled[1][mask] = 1e3
        again = fit_images(spoiled, SersicGalaxy2D(), **options)
        assert np.array_equal(again.params[1], result.params[1])
        with pytest.raises(ValueError, match="held_out"):
            fit_images(data, SersicGalaxy2D(), psf=gaussian_psf(), held_out=1.5)


class TestPriors:
    @pytest.mark.parametrize(
        "prior",
        [
            Normal(1.0, 0.5),
            LogNormal(2.0, 0.7),
            Uniform(-1.0, 3.0),
            LogUniform(0.5, 6.0),
            Truncated(LogNormal(2.0, 0.7), 0.3, 5.0),
            Truncated(Normal(0.0, 1.0), -0.5, 2.0),
        ],
    )
    def test_density_slope_and_quantiles_belong_together(self, prior):
        x = prior.ppf(np.linspace(0.05, 0.95, 19))
        h = 1e-6
        slope = (prior.log_prob(x + h) - prior.log_prob(x - h)) / (2 * h)
        assert_allclose(prior.slope(x), slope, atol=1e-5)
        density = (prior.cdf(x + h) - prior.cdf(x - h)) / (2 * h)
        assert_allclose(np.exp(prior.log_prob(x)), density, rtol=1e-5)
        assert_allclose(prior.cdf(x), np.linspace(0.05, 0.95, 19), rtol=1e-9)
        assert stats.kstest(prior.sample(2000, rng=1), prior.cdf).pvalue > 1e-3

    def test_uniform_priors_are_bounds(self):
        data = stamps(PARAMS[:1], 0.1, np.random.default_rng(4))
        fitter = MAPFitter(priors={"n": Uniform(2.0, 4.0)})
        result = fit_images(data, SersicGalaxy2D(), fitter, uncertainty=0.1, psf=gaussian_psf())
        assert result.params[0, 4] == pytest.approx(2.0)
        assert result.flags[0] & FitFlag.AT_BOUND


class TestNested:
    def test_agrees_with_importance_sampling(self):
        pytest.importorskip("dynesty")
        params = PARAMS[:1, [0, 1, 2, 3, 5, 6]]
        data = stamps(params, 0.3, np.random.default_rng(8), GaussianGalaxy2D())
        priors = {"flux": LogNormal(60, 0.5), "x_0": Normal(15, 1), "y_0": Normal(14, 1)}
        priors |= {"r_eff": LogNormal(3, 0.5)}
        options = {"uncertainty": 0.3, "psf": gaussian_psf()}
        fitter = NestedFitter(live=100, rng=1, priors=priors)
        nested = fit_images(data, GaussianGalaxy2D(), fitter, **options)
        fitter = ImportanceFitter(rng=1, priors=priors)
        other = fit_images(data, GaussianGalaxy2D(), fitter, **options)
        difference = nested.extra["log_evidence"] - other.extra["log_evidence"]
        error = np.hypot(nested.extra["log_evidence_err"], other.extra["log_evidence_err"])
        assert abs(difference[0]) < 3 * error[0]
        assert_allclose(nested.posterior.std, other.posterior.std, rtol=0.25)

    def test_repeats(self):
        pytest.importorskip("dynesty")

        def log_likelihood(u):
            return -0.5 * np.square((u - 0.5) / 0.1).sum(1)

        one, two = (
            nested_sampling(log_likelihood, 2, rng=np.random.default_rng(4), live=60)
            for _ in range(2)
        )
        assert np.array_equal(one.u, two.u)
        exact = np.log(2 * np.pi * 0.1**2)
        assert abs(one.log_evidence - exact) < 4 * one.log_evidence_err
        assert np.exp(one.log_weight).sum() == pytest.approx(1)

    def test_lockstep(self):
        """What is asked at the same time is evaluated together, in the same order always."""
        asked = []

        def evaluate(points):
            asked.append(points[:, 0].tolist())
            return 2 * points[:, 0]

        def countdown(start):
            return sum(pool(np.array([float(i)])) for i in range(start, 0, -1))

        with Lockstep(evaluate, 3) as pool:
            assert pool.map(countdown, [3, 1, 2, 2]) == [12, 2, 6, 6]
            assert asked == [[3, 1, 2], [2, 1], [1], [2], [1]]
            with pytest.raises(ZeroDivisionError):
                pool.map(lambda i: pool(np.ones(1)) / (1 // i), [1, 0])
            assert pool(np.array([4.0])) == 8
