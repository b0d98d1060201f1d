"""Comparison of models: against closed forms, known distributions and known truths."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from astropy import units as u
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, optimize, stats

from galmorph import (
    FitFlag,
    FitResult,
    GaussianGalaxy2D,
    MAPFitter,
    SersicGalaxy2D,
    fit_images,
    plot,
)
from galmorph.comparison import ModelComparison, compare
from galmorph.goodness import misfit_map, posterior_predictive, regier_tests, simulate_pixels
from galmorph.images import stamp_source
from galmorph.noise import (
    CorrelatedNoise,
    GaussianNoise,
    NoiseModel,
    PoissonNoise,
    StudentTNoise,
)

SIDE = 25
FIXED = ("x_0", "y_0", "r_eff", "ellip", "theta")
#: White noise under a kernel [1, 1] along x.
NEIGHBOURS = CorrelatedNoise([[0.5, 1.0, 0.5]])


def flux_only(r_eff, flux=300.0):
    """A model that is linear: its template is known and its flux is free."""
    model = GaussianGalaxy2D(flux=flux, x_0=12, y_0=12.3, r_eff=r_eff, ellip=0.2, theta=0.4)
    for name in FIXED:
        model.fixed[name] = True
    return model


@pytest.fixture(scope="module")
def linear():
    """Six stamps, of which one has a mask, and fits by two templates to 80 % of the pixels."""
    rng = np.random.default_rng(3)
    sigma = rng.uniform(0.8, 1.5, (6, SIDE, SIDE))
    data = flux_only(3.0).render((SIDE, SIDE)) + sigma * rng.standard_normal(sigma.shape)
    mask = np.zeros(data.shape, dtype=bool)
    mask[2, :8] = True
    fitter = MAPFitter(dtype="float64")
    return {
        name: fit_images(
            data,
            flux_only(r_eff),
            fitter,
            uncertainty=sigma,
            mask=mask,
            held_out=0.2,
            held_out_seed=1,
        )
        for name, r_eff in {"right": 3.0, "wrong": 4.5}.items()
    }


def templates(result):
    """Template, data and uncertainty of the only parameter, and which pixels were fitted."""
    for i in range(len(result)):
        data, inv_sigma, _ = result.stamp(i)
        out = result.held_out_mask(i)
        yield result.model.render((SIDE, SIDE)) / 300, data, inv_sigma, (inv_sigma > 0) & ~out, out


def synthetic(log_evidence, **options):
    """A comparison of which only the evidences matter."""
    log_evidence = np.asarray(log_evidence, dtype=float)
    n, m = log_evidence.shape
    values = dict(
        names=tuple("abcdef"[:m]),
        ids=np.arange(n) + 7,
        snr=np.full((n, m), 20.0),
        log_likelihood=log_evidence + 3,
        chi2=np.full((n, m), 90.0),
        dof=np.full((n, m), 100),
        n_params=np.full((n, m), 2),
        n_pixels=np.full(n, 102),
        held_out=np.full((n, m), np.nan),
        log_evidence=log_evidence,
        log_evidence_err=np.full((n, m), 0.3),
        prior=np.full(m, 1 / m),
        meta={"evidence": "importance"},
    )
    return ModelComparison(**(values | options))


class TestCriteria:
    @pytest.fixture(scope="module")
    def comparison(self, linear):
        return compare(linear, evidence=None)

    def test_likelihood_and_criteria(self, linear, comparison):
        for k, result in enumerate(linear.values()):
            for i, (_, data, inv_sigma, fitted, _) in enumerate(templates(result)):
                image = result.stamp(i)[2]
                sigma = 1 / inv_sigma[fitted]
                expected = stats.norm.logpdf(data[fitted], image[fitted], sigma).sum()
                assert_allclose(comparison.log_likelihood[i, k], expected)
                assert comparison.n_pixels[i] == fitted.sum()
                assert_allclose(comparison.aic[i, k], 2 - 2 * expected)
                assert_allclose(comparison.bic[i, k], np.log(fitted.sum()) - 2 * expected)
        assert_allclose(comparison.reduced_chi2[:, 0], linear["right"].reduced_chi2)

    def test_parameters_of_background_and_noise_count(self, linear):
        stamps = np.random.default_rng(1).normal(size=(1, 21, 21))
        model = SersicGalaxy2D()
        model.n.fixed = True
        results = {
            "fixed": fit_images(stamps, model, uncertainty=1.0, background="tilted"),
            "free": fit_images(stamps, SersicGalaxy2D(), uncertainty=1.0),
        }
        assert_array_equal(compare(results, evidence=None).n_params, [[9, 7]])
        free = {k: replace(r, noise=GaussianNoise(scale="free")) for k, r in results.items()}
        assert_array_equal(compare(free, evidence=None).n_params, [[10, 8]])

    def test_best_is_of_the_lowest_bic(self, comparison):
        assert_array_equal(comparison.best == "right", comparison.bic[:, 0] < comparison.bic[:, 1])
        assert np.mean(comparison.best == "right") > 0.5

    def test_held_out_at_the_best_fit(self, linear, comparison):
        for k, result in enumerate(linear.values()):
            for i, (_, data, inv_sigma, _, out) in enumerate(templates(result)):
                image, sigma = result.stamp(i)[2][out], 1 / inv_sigma[out]
                expected = stats.norm.logpdf(data[out], image, sigma).sum()
                assert_allclose(comparison.held_out[i, k], expected)

    def test_held_out_over_the_posterior(self, linear):
        """The predictive density of a linear model is normal, the variance of the flux in it."""
        result = linear["right"][:3]
        expected = []
        for template, data, inv_sigma, fitted, out in templates(result):
            weight = np.where(fitted, inv_sigma, 0.0) ** 2
            variance = 1 / (template**2 * weight).sum()
            flux = variance * (template * weight * data).sum()
            spread = np.sqrt(inv_sigma[out] ** -2.0 + template[out] ** 2 * variance)
            expected.append(stats.norm.logpdf(data[out], flux * template[out], spread).sum())
        pair = {"a": result, "b": result}
        found = [compare(pair, evidence=None, draws=100, rng=k).held_out for k in range(4)]
        found = np.concatenate(found, axis=1)  # each column from other draws
        error = found.std(axis=1, ddof=1) / np.sqrt(found.shape[1])
        assert np.all(np.abs(found.mean(axis=1) - expected) < 5 * error)
        plug_in = compare(pair, evidence=None).held_out[:, 0]
        assert np.any(np.abs(plug_in - expected) > 5 * error)

    def test_no_pixels_held_out(self):
        stamps = np.random.default_rng(1).normal(size=(2, SIDE, SIDE))
        results = {
            k: fit_images(stamps, flux_only(r), uncertainty=1.0) for k, r in (("a", 3), ("b", 4))
        }
        comparison = compare(results, evidence=None)
        assert np.isnan(comparison.held_out).all()
        assert "held_out_a" not in comparison.to_table().colnames

    def test_correlated_noise(self, linear):
        """The likelihood of the fitted pixels is not that of all, less that of the others."""
        results = {k: replace(r, noise=NEIGHBOURS) for k, r in linear.items()}
        comparison = compare(results, evidence=None)
        data, inv_sigma, image = results["right"].stamp(0)
        fitted = np.where(results["right"].held_out_mask(0), 0.0, inv_sigma)
        expected = NEIGHBOURS.log_prob(data[None], image[None], fitted[None]).sum()
        assert_allclose(comparison.log_likelihood[0, 0], expected)

    def test_repeats_exactly(self, linear):
        first, second = (compare(linear, evidence=None, draws=5, rng=4) for _ in range(2))
        assert_array_equal(first.held_out, second.held_out)
        assert np.any(compare(linear, evidence=None, draws=5, rng=5).held_out != first.held_out)

    def test_failed_fit(self, linear):
        flags = linear["wrong"].flags.copy()
        flags[1] |= FitFlag.BAD_PSF
        comparison = compare(
            linear | {"wrong": replace(linear["wrong"], flags=flags)}, evidence=None
        )
        assert_array_equal(np.argwhere(np.isnan(comparison.log_likelihood)), [[1, 1]])
        assert comparison.best[1] == ""
        assert_array_equal(comparison.summary()["failed"], [0, 1])


class TestEvidence:
    """Of a linear model with a flat prior of the flux the evidence is known."""

    @pytest.fixture(scope="module")
    def pair(self, linear):
        return {name: result[:3] for name, result in linear.items()}

    @pytest.fixture(scope="module")
    def importance(self, pair):
        return compare(pair, rng=1)

    @pytest.mark.parametrize("method", ["importance", "laplace"])
    def test_closed_form(self, pair, importance, method):
        comparison = importance if method == "importance" else compare(pair, evidence=method)
        for k, result in enumerate(pair.values()):
            for i, (template, data, inv_sigma, fitted, _) in enumerate(templates(result)):
                weight = np.where(fitted, inv_sigma, 0.0) ** 2
                variance = 1 / (template**2 * weight).sum()
                # the range that the prior gives to a flux, by what is seen
                noise = np.sqrt((inv_sigma[fitted] ** -2.0).sum())
                widest = 10 * max(abs(data[fitted].sum()), 10 * noise)
                expected = (
                    comparison.log_likelihood[i, k]
                    + 0.5 * np.log(2 * np.pi * variance)
                    - np.log(2 * widest)
                )
                # single precision of a sum of some 500 pixels; draws have an error that they know
                error = np.nan_to_num(comparison.log_evidence_err[i, k])
                assert abs(comparison.log_evidence[i, k] - expected) < 5 * error + 1e-3

    def test_bayes_factor_and_best(self, pair, importance):
        value, error = importance.log_bayes_factor("right", "wrong")
        assert_array_equal(importance.best == "right", value > 0)
        assert_allclose(
            value, -np.diff(np.log(importance.probability), axis=1)[:, 0], atol=1e-9, rtol=1e-9
        )
        assert_allclose(error, np.hypot(*importance.log_evidence_err.T))
        exact, _ = compare(pair, evidence="laplace").log_bayes_factor("right", "wrong")
        assert np.all(np.abs(value - exact) < 5 * error + 1e-3)

    def test_repeats_exactly(self, pair, importance):
        again = compare(pair, rng=np.random.default_rng(1))
        assert_array_equal(again.log_evidence, importance.log_evidence)


class TestProbabilities:
    def test_by_hand(self):
        comparison = synthetic([[0, np.log(3)], [-1000, -1002]], prior=np.array([0.75, 0.25]))
        p = 1 / (1 + np.exp(-2) / 3)
        assert_allclose(comparison.probability, [[0.5, 0.5], [p, 1 - p]])
        assert_array_equal(comparison.best[1:], ["a"])

    def test_sum_is_one(self):
        rng = np.random.default_rng(1)
        comparison = synthetic(rng.normal(-1e4, 300, (50, 4)))
        assert_allclose(comparison.probability.sum(axis=1), 1)

    def test_impossible_model(self):
        comparison = synthetic([[0.0, 500.0]], prior=np.array([1.0, 0.0]))
        assert_array_equal(comparison.probability, [[1, 0]])
        assert comparison.best[0] == "a"

    def test_missing_evidence_says_nothing(self):
        comparison = synthetic([[0.0, np.nan], [0.0, 1.0]])
        assert_array_equal(np.isnan(comparison.probability[:, 0]), [True, False])
        assert_array_equal(comparison.best, ["", "b"])

    def test_without_evidence(self):
        comparison = synthetic([[0.0, 1.0]], meta={"evidence": None})
        for call in (lambda: comparison.log_bayes_factor("a", "b"), comparison.sample_fractions):
            with pytest.raises(ValueError, match="no evidence"):
                call()
        assert "probability_a" not in comparison.to_table().colnames
        with pytest.raises(KeyError, match="models are a, b"):
            comparison.index("Sérsic")


class TestFractions:
    def test_against_quadrature(self):
        """The posterior of one share, integrated."""
        log_evidence = np.random.default_rng(2).normal(0, 1.5, (12, 2))
        likelihood = np.exp(log_evidence)

        def density(f, power):
            return f**power * np.prod(f * likelihood[:, 0] + (1 - f) * likelihood[:, 1])

        total, first, second = (integrate.quad(density, 0, 1, args=(k,))[0] for k in range(3))
        mean, std = first / total, np.sqrt(second / total - (first / total) ** 2)
        table = synthetic(log_evidence).sample_fractions(draws=20000, rng=1)
        # draws of a Gibbs sampler are correlated: some 20000 / 10 are independent
        assert abs(table["fraction"][0] - mean) < 5 * std / np.sqrt(2000)
        assert_allclose(table["fraction_err"][0], std, rtol=0.06)
        assert_allclose(table["fraction"].sum(), 1)
        assert_allclose(table["log_evidence"], log_evidence.sum(axis=0))
        assert_allclose(table["log_evidence_err"], 0.3 * np.sqrt(12))

    def test_known_truth(self):
        """Data that were drawn from three models in known shares."""
        rng = np.random.default_rng(5)
        share = np.array([0.6, 0.3, 0.1])
        x = rng.normal(2.0 * rng.choice(3, 1500, p=share), 1.0)
        log_evidence = stats.norm.logpdf(x[:, None], [0.0, 2.0, 4.0], 1.0)
        table = synthetic(log_evidence).sample_fractions(rng=1)
        pull = (table["fraction"] - share) / table["fraction_err"]
        assert np.all(np.abs(pull) < 4)
        assert np.all(table["fraction_err"] < 0.05)

    def test_galaxies_without_evidence_are_left_out(self):
        table = synthetic([[0, np.nan], [0, 0], [1, 0]]).sample_fractions(draws=10)
        assert table.meta["galaxies"] == 2
        with pytest.raises(ValueError, match="no galaxy"):
            synthetic([[0, np.nan]]).sample_fractions()
        with pytest.raises(ValueError, match="draws"):
            synthetic([[0, 0]]).sample_fractions(draws=0)

    def test_repeats_exactly(self):
        comparison = synthetic(np.random.default_rng(2).normal(size=(9, 3)))
        first, second = (comparison.sample_fractions(draws=50, rng=3) for _ in range(2))
        assert_array_equal(first["fraction"], second["fraction"])


class TestTables:
    def test_one_row_a_galaxy(self):
        comparison = synthetic([[0, 1], [2, 1], [5, 0]])
        table = comparison.to_table()
        assert_array_equal(table["id"], [7, 8, 9])
        assert_array_equal(table["best"], ["b", "a", "a"])
        assert_allclose(table["probability_a"], comparison.probability[:, 0])
        assert_allclose(table["bic_b"], comparison.bic[:, 1])
        assert table["bic_b"].info.description == "Bayesian information criterion"
        assert table.meta["evidence"] == "importance"

    def test_one_row_a_model(self):
        comparison = synthetic([[0, 1], [2, 1], [5, 0], [np.nan, 1]])
        table = comparison.summary()
        assert_array_equal(table["n_best"], [2, 1])
        assert_allclose(table["total_log_evidence"], [7, 2])
        assert_allclose(table["aic"], comparison.aic[:3].mean(axis=0))
        assert table.meta["galaxies"] == 3

    def test_written_and_read(self, linear, tmp_path):
        table = compare(linear, evidence=None).to_table()
        table.write(tmp_path / "comparison.ecsv")
        again = type(table).read(tmp_path / "comparison.ecsv")
        assert_allclose(again["aic_right"], table["aic_right"])
        assert again.meta["held_out"] == {"fraction": 0.2, "seed": 1}

    def test_part(self):
        comparison = synthetic([[0, 1], [2, 1], [5, 0]])
        part = comparison[comparison.best == "a"]
        assert len(part) == 2
        assert_array_equal(part.ids, [8, 9])
        assert_allclose(part.probability, comparison.probability[1:])
        assert repr(part) == "<ModelComparison: 2 galaxies, a, b>"


class TestRefusals:
    @pytest.fixture(scope="module")
    def data(self):
        return np.random.default_rng(1).normal(size=(3, SIDE, SIDE))

    @pytest.fixture(scope="module")
    def result(self, data):
        return fit_images(data, flux_only(3.0), uncertainty=1.0)

    @pytest.mark.parametrize(
        ("what", "options"),
        [
            ("uncertainty", {"uncertainty": 1.1}),
            ("held-out pixels", {"uncertainty": 1.0, "held_out": 0.1}),
            ("mask", {"uncertainty": 1.0, "mask": np.eye(SIDE, dtype=bool)}),
        ],
    )
    def test_other_options(self, data, result, what, options):
        other = fit_images(data, flux_only(3.0), **options)
        with pytest.raises(ValueError, match=f"'a' and 'b' differ in their|the.*{what}"):
            compare({"a": result, "b": other})

    def test_other_pixels(self, data, result):
        data = data.copy()
        data[1, 3, 4] += 1e-6
        other = fit_images(data, flux_only(3.0), uncertainty=1.0)
        with pytest.raises(ValueError, match="pixels of their stamps, as of id 1"):
            compare({"a": result, "b": other})

    def test_other_galaxies(self, result):
        with pytest.raises(ValueError, match="number of galaxies: 3 and 2"):
            compare({"a": result, "b": result[:2]})
        with pytest.raises(ValueError, match="ids"):
            compare({"a": result, "b": result[::-1]})

    def test_other_noise_or_unit(self, result):
        with pytest.raises(ValueError, match=r"noise model: GaussianNoise\(\) and StudentT"):
            compare({"a": result, "b": replace(result, noise=StudentTNoise())})
        with pytest.raises(ValueError, match="unit: None and ct"):
            compare({"a": result, "b": replace(result, data_unit=u.ct)})

    def test_other_held_out_pixels_with_the_same_seed(self, data):
        whole, part = (
            fit_images(d, flux_only(3.0), uncertainty=1.0, held_out=0.2) for d in (data, data[1:])
        )
        with pytest.raises(ValueError, match=r"ids|held-out"):
            compare({"a": whole[1:], "b": part})
        same_ids = replace(whole[1:], ids=part.ids)
        with pytest.raises(ValueError, match="held-out pixels of their stamps"):
            compare({"a": same_ids, "b": part})

    def test_files(self, result, tmp_path):
        result.write(tmp_path / "fit.ecsv")
        with pytest.raises(ValueError, match=r"\['b'\] were read from files"):
            compare({"a": result, "b": FitResult.read(tmp_path / "fit.ecsv")})

    def test_arguments(self, result):
        pair = {"a": result, "b": result}
        for wrong in ([result, result], {1: result, "b": result}, {"a": result, "b": 3}):
            with pytest.raises(TypeError):
                compare(wrong)
        with pytest.raises(ValueError, match="two models"):
            compare({"a": result})
        with pytest.raises(ValueError, match="evidence must be one of"):
            compare(pair, evidence="magic")
        with pytest.raises(ValueError, match="draws"):
            compare(pair, draws=-1)
        with pytest.raises(ValueError, match="priors are of"):
            compare(pair, priors={"a": 1})
        with pytest.raises(ValueError, match="not negative"):
            compare(pair, priors={"a": 1, "b": -1})


# -- goodness of fit ---------------------------------------------------------------------


class TestSimulatePixels:
    shape = (40, 50, 50)

    def draw(self, noise, level=20.0, sigma=2.0):
        model, inv_sigma = np.full(self.shape, level), np.full(self.shape, 1 / sigma)
        inv_sigma[:, 0] = 0.0
        pixels = simulate_pixels(model, inv_sigma, noise=noise, rng=8)
        assert_array_equal(pixels, simulate_pixels(model, inv_sigma, noise=noise, rng=8))
        assert_array_equal(pixels[:, 0], 0)
        return pixels[:, 1:]

    def test_gaussian(self):
        assert stats.kstest(self.draw(None).ravel(), stats.norm(20, 2).cdf).pvalue > 0.01
        width = np.hypot(1.5 * 2, 4)
        pixels = self.draw(GaussianNoise(scale=1.5, floor=4.0))
        assert stats.kstest(pixels.ravel(), stats.norm(20, width).cdf).pvalue > 0.01

    def test_student(self):
        pixels = self.draw(StudentTNoise(dof=3.0))
        assert stats.kstest(pixels.ravel(), stats.t(3, 20, 2).cdf).pvalue > 0.01

    def test_poisson(self):
        counts = self.draw(PoissonNoise(gain=0.5, background=4.0)) * 0.5 + 2.0
        assert_allclose(counts, np.round(counts), atol=1e-9)
        values = np.arange(3, 24)
        seen = (np.round(counts).ravel()[:, None] == values).sum(axis=0)
        expected = counts.size * stats.poisson(12).pmf(values)
        chi2 = ((seen - expected) ** 2 / expected).sum()
        assert stats.chi2(len(values) - 1).sf(chi2) > 0.01

    def test_read_noise(self):
        pixels = self.draw(PoissonNoise(gain=2.0, read_noise=5.0))
        expected = (2 * 20 + 25) / 4
        assert abs(pixels.var() / expected - 1) < 5 * np.sqrt(2 / pixels.size)

    def test_correlated(self):
        pixels = (self.draw(NEIGHBOURS) - 20) / 2
        error = 1 / np.sqrt(pixels.size)
        for (dy, dx), rho in {(0, 1): 0.5, (0, 2): 0.0, (1, 0): 0.0, (0, 0): 1.0}.items():
            ny, nx = pixels.shape[1:]
            product = pixels[:, : ny - dy, : nx - dx] * pixels[:, dy:, dx:]
            assert abs(product.mean() - rho) < 6 * error

    def test_unknown_noise(self):
        with pytest.raises(ValueError, match="how to draw"):
            simulate_pixels(np.zeros((2, 2)), np.ones((2, 2)), noise=NoiseModel())


NOISES = [
    GaussianNoise(),
    GaussianNoise(scale=1.3),
    StudentTNoise(dof=4.0),
    PoissonNoise(gain=1.5, read_noise=2.0, background=30.0),
    NEIGHBOURS,
]


def truth(count, noise, *, n=1.0, seed=2, side=SIDE):
    """Stamps with given noise, the uncertainty in them, and the parameters of the galaxies."""
    rng = np.random.default_rng(seed)
    params = np.column_stack(
        [
            np.full(count, 500.0),
            12 + rng.uniform(-0.5, 0.5, (count, 2)),
            rng.uniform(2, 4, count),
            np.full(count, n),
            rng.uniform(0.1, 0.5, count),
            rng.uniform(-1.5, 1.5, count),
        ]
    )
    images = SersicGalaxy2D().render((side, side), params=params)
    sigma = np.broadcast_to(1.0 + 0.03 * np.arange(side)[:, None], (side, side))
    mask = np.zeros((side, side), dtype=bool)
    mask[4:6, 15:18] = True
    data = simulate_pixels(images, np.broadcast_to(1 / sigma, images.shape), noise=noise, rng=rng)
    return data, sigma, mask, params


class TestPosteriorPredictive:
    @pytest.fixture(scope="module")
    def right(self):
        data, sigma, mask, _ = truth(100, GaussianNoise())
        model = SersicGalaxy2D(n=1.0)
        model.n.fixed = True
        return fit_images(data, model, uncertainty=sigma, mask=mask)

    @pytest.mark.parametrize("statistic", ["chi2", "max", "moran"])
    def test_uniform_for_the_right_model(self, right, statistic):
        p = posterior_predictive(right, draws=40, statistic=statistic)
        dithered = (40 * p + np.random.default_rng(1).random(len(p))) / 41
        assert stats.kstest(dithered, "uniform").pvalue > 0.01

    @pytest.mark.parametrize("noise", NOISES, ids=repr)
    def test_uniform_under_any_noise(self, noise):
        """With the true parameters in place of a fit."""
        data, sigma, mask, params = truth(100, noise)
        result = at_truth(data, sigma, mask, params, noise)
        p = posterior_predictive(result, draws=40)
        dithered = (40 * p + np.random.default_rng(1).random(len(p))) / 41
        assert stats.kstest(dithered, "uniform").pvalue > 0.01

    def test_wrong_model(self):
        data, sigma, mask, _ = truth(20, GaussianNoise(), n=4.0)
        result = fit_images(data * 6, GaussianGalaxy2D(), uncertainty=6 * sigma / 4, mask=mask)
        for statistic in ("chi2", "moran"):
            assert np.all(posterior_predictive(result, draws=40, statistic=statistic) < 0.05)

    def test_outlier(self, right):
        data, sigma, mask, _ = truth(5, GaussianNoise())
        data[3, 20, 20] += 12
        result = fit_images(data, right.model, uncertainty=sigma, mask=mask)
        p = posterior_predictive(result, draws=50, statistic="max")
        assert p[3] == 0
        assert np.all(p[[0, 1, 2, 4]] > 0)

    def test_uncertainty_too_large(self):
        data, sigma, mask, _ = truth(10, GaussianNoise())
        result = fit_images(data, SersicGalaxy2D(), uncertainty=1.4 * sigma, mask=mask)
        assert np.all(posterior_predictive(result, draws=40) > 0.95)

    def test_held_out_pixels_do_not_count(self):
        data, sigma, mask, _ = truth(1, GaussianNoise())
        first = fit_images(data, flux_only(3.0), uncertainty=sigma, mask=mask, held_out=0.3)
        data[0][first.held_out_mask(0)] += 50
        again = fit_images(data, flux_only(3.0), uncertainty=sigma, mask=mask, held_out=0.3)
        assert_array_equal(posterior_predictive(first), posterior_predictive(again))

    def test_own_statistic(self, right):
        def below(residual, used):
            return -residual.sum(axis=(1, 2))

        p = posterior_predictive(right[:10], statistic=below, draws=20)
        assert np.all((p >= 0) & (p <= 1))
        assert np.ptp(p) > 0

    def test_failed_fit(self, right):
        flags = right.flags[:3].copy()
        flags[1] |= FitFlag.BAD_PSF
        p = posterior_predictive(replace(right[:3], flags=flags), draws=5)
        assert_array_equal(np.isnan(p), [False, True, False])

    def test_arguments(self, right):
        with pytest.raises(ValueError, match="statistic must be one of"):
            posterior_predictive(right, statistic="F")
        with pytest.raises(ValueError, match="draws"):
            posterior_predictive(right, draws=0)


def at_truth(data, sigma, mask, params, noise):
    """A result whose parameters are the true ones, without uncertainty."""
    stub = fit_images(data[:1], flux_only(3.0), uncertainty=sigma, mask=mask)
    n, p = params.shape
    return replace(
        stub,
        model=SersicGalaxy2D(),
        params=params,
        cov=np.zeros((n, p, p)),
        background=np.zeros((n, 0)),
        background_cov=np.zeros((n, 0, 0)),
        **{name: np.zeros(n) for name in ("chi2", "n_iter")},
        dof=np.full(n, 600),
        flags=np.zeros(n, dtype=np.int32),
        origin=np.zeros((n, 2), dtype=int),
        shapes=np.tile(data.shape[1:], (n, 1)),
        ids=np.arange(n),
        stamps=stamp_source(data, uncertainty=sigma, mask=mask),
        noise=noise,
    )


class TestMisfitMap:
    @pytest.mark.parametrize("noise", NOISES, ids=repr)
    def test_unit_normal(self, noise):
        count = 30 if noise.correlated else 120
        data, sigma, mask, params = truth(count, noise)
        result = at_truth(data, sigma, mask, params, noise)
        maps = np.stack([misfit_map(result, i, smooth=1.5) for i in range(count)])
        assert_array_equal(np.isnan(maps[0]), mask)
        for y, x in ((0, 0), (12, 12), (5, 14), (24, 10)):
            assert stats.kstest(maps[:, y, x], "norm").pvalue > 0.001
        # about one independent value for each 4 pi smooth^2 pixels
        independent = count * (~mask).sum() / (4 * np.pi * 1.5**2)
        assert abs(np.nanmean(maps**2) - 1) < 5 * np.sqrt(2 / independent)

    def test_blob(self):
        """Without noise the significance is the S/N of the blob, at its place."""
        sigma = np.full((SIDE, SIDE), 0.7)
        params = np.array([[500.0, 12, 12, 3, 1, 0.2, 0.4]])
        y, x = np.mgrid[:SIDE, :SIDE]
        blob = 2.0 * np.exp(-((x - 19) ** 2 + (y - 6) ** 2) / (2 * 2.0**2))
        data = SersicGalaxy2D().render((SIDE, SIDE), params=params) + blob
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[6:8, 20:22] = True
        result = at_truth(data, sigma, mask, params, GaussianNoise())
        found = misfit_map(result)
        expected = np.sqrt(((blob / sigma)[~mask] ** 2).sum())
        assert_allclose(found[6, 19], expected, rtol=1e-3)
        assert np.unravel_index(np.nanargmax(found), found.shape) == (6, 19)

    def test_correlated_and_independent_agree(self):
        """A correlation of zero is none."""
        data, sigma, mask, params = truth(1, GaussianNoise())
        one, other = (
            misfit_map(at_truth(data, sigma, mask, params, noise))
            for noise in (GaussianNoise(), CorrelatedNoise([[1.0]]))
        )
        assert_allclose(one, other, rtol=1e-6, atol=1e-9)

    def test_failed_fit_and_arguments(self):
        data, sigma, mask, params = truth(2, GaussianNoise())
        result = at_truth(data, sigma, mask, params, GaussianNoise())
        result.flags[1] = FitFlag.BAD_PSF
        assert np.isnan(misfit_map(result, 1)).all()
        assert np.isfinite(misfit_map(result, -2)).any()
        with pytest.raises(IndexError):
            misfit_map(result, 2)
        with pytest.raises(ValueError, match="smooth"):
            misfit_map(result, smooth=0)


class TestRegier:
    @pytest.fixture(scope="module")
    def fits(self):
        data, sigma, mask, _ = truth(40, GaussianNoise(), n=4.0)
        sigma = np.full_like(sigma, 1.4)
        return [
            fit_images(4 * data, m, uncertainty=4 * sigma, mask=mask)
            for m in (SersicGalaxy2D(), GaussianGalaxy2D())
        ]

    def test_against_the_definition(self, fits):
        result, reference = fits
        tests = regier_tests(result, reference)
        for i in range(0, 40, 9):
            data, inv_sigma, mean = result.stamp(i)
            used, x_hat = inv_sigma > 0, reference.stamp(i)[2]

            def worse(log_sigma, d=data, m=x_hat, used=used):
                return -stats.norm.logpdf(d[used], m[used], np.exp(log_sigma)).sum()

            best = -optimize.minimize_scalar(worse, bounds=(-3, 5), method="bounded").fun
            own = stats.norm.logpdf(data[used], mean[used], 1 / inv_sigma[used]).sum()
            assert_allclose(tests.gain[i], own - best, atol=1e-3)
            assert_allclose(tests.mse[i], ((data - mean)[used] ** 2).mean())
        assert_array_equal(tests.lower_error, tests.mse < tests.reference_mse)

    def test_fractions(self, fits):
        tests = regier_tests(*fits)
        p, error = tests.error_fraction
        assert_allclose(p, tests.lower_error.mean())
        assert_allclose(error, np.sqrt(p * (1 - p) / 40))
        assert p > 0.9
        q, _ = tests.likelihood_fraction
        assert_allclose(q, np.mean(tests.gain > 0))

    def test_a_model_does_not_beat_itself(self, fits):
        tests = regier_tests(fits[1], fits[1])
        assert tests.error_fraction == (0.0, 0.0)

    def test_reconstructions(self, fits):
        result, reference = fits
        mean = result.model_images
        std = np.full_like(mean, 5.6)
        tests = regier_tests((mean, std), reference)
        assert_allclose(tests.gain, regier_tests(result, reference).gain)
        # the noise that is known to be larger than it is makes the pixels less probable
        assert np.all(regier_tests((mean, 3 * std), reference).gain < tests.gain)

    def test_a_failed_fit_has_lost(self, fits):
        result, reference = (replace(f, flags=f.flags.copy()) for f in fits)
        result.flags[2] |= FitFlag.BAD_PSF
        reference.flags[5] |= FitFlag.BAD_PSF
        tests = regier_tests(result, reference)
        assert not tests.lower_error[2]
        assert not tests.more_probable[2]
        assert_array_equal(np.flatnonzero(~tests.tested), [5])
        assert "39 galaxies" in repr(tests)

    def test_errors(self, fits):
        result, reference = fits
        with pytest.raises(ValueError, match="independent Gaussian"):
            regier_tests(replace(result, noise=StudentTNoise()), reference)
        with pytest.raises(ValueError, match="different stamps"):
            regier_tests(result[:3], reference)
        with pytest.raises(ValueError, match="different pixels"):
            regier_tests(result[::-1], reference)
        with pytest.raises(ValueError, match="3 images for 40"):
            regier_tests((np.ones((3, SIDE, SIDE)),) * 2, reference)
        with pytest.raises(ValueError, match="images of the stamps"):
            regier_tests((np.ones((40, 3, 3)),) * 2, reference)
        with pytest.raises(ValueError, match="positive"):
            regier_tests((np.ones((40, SIDE, SIDE)), np.zeros((40, SIDE, SIDE))), reference)


# -- figures -----------------------------------------------------------------------------


class TestPlots:
    @pytest.fixture(autouse=True)
    def _draw_and_close(self):
        """Draw every figure, for errors that show only then."""
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")

    @pytest.mark.parametrize("count", [5, 200])
    def test_probabilities_are_stacked(self, count):
        log_evidence = np.random.default_rng(1).normal(0, 2, (count, 3))
        log_evidence[0, 1] = np.nan
        comparison = synthetic(log_evidence)
        ax = plot.model_probabilities(comparison)
        heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
        assert heights.shape == (3, count - 1)
        assert_allclose(heights.sum(axis=0), 1)
        assert_allclose(
            np.sort(heights[0]), np.sort(comparison.probability[1:, 0]), rtol=1e-9, atol=1e-12
        )
        assert np.all(np.diff(heights.argmax(axis=0)) >= 0)
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b", "c"]

    def test_no_probabilities(self):
        with pytest.raises(ValueError, match="no galaxy"):
            plot.model_probabilities(synthetic([[0, np.nan]]))

    def test_evidence_differences(self):
        log_evidence = np.array([[0.0, 3.0], [50.0, 1.0], [np.nan, 0.0]])
        comparison = synthetic(log_evidence, snr=np.array([[10.0] * 2, [30.0] * 2, [5.0] * 2]))
        _, own = plt.subplots()
        ax = plot.evidence_differences(comparison, "a", "b", ax=own)
        assert ax is own
        points = np.concatenate([c.lines[0].get_xydata() for c in ax.containers])
        assert_allclose(points[np.argsort(points[:, 0])], [[10, -3], [30, 49]])
        assert ax.get_ylabel() == "ln Z(a) − ln Z(b)"

    def test_misfit(self):
        data, sigma, mask, params = truth(2, GaussianNoise())
        data[0, 18:22, 18:22] += 3.0
        data[0, 2:6, 2:6] -= 3.0
        result = at_truth(data, sigma, mask, params, GaussianNoise())
        ax = plot.misfit(result, levels=(4,))
        residual = np.ma.masked_array(ax.images[0].get_array())
        image, inv_sigma = result.stamp(0)[2], result.stamp(0)[1]
        assert_allclose(
            residual.compressed(), ((data[0] - image) * inv_sigma)[~mask], rtol=1e-6, atol=1e-9
        )
        inside = [
            np.array([path.contains_point(p) for path in c.get_paths()]).any()
            for c, p in zip(ax.collections, ((19.5, 19.5), (3.5, 3.5)), strict=True)
        ]
        assert all(inside)
        assert not plot.misfit(result, 1, levels=(6,)).collections

    def test_misfit_of_a_failed_fit(self):
        data, sigma, mask, params = truth(1, GaussianNoise())
        result = at_truth(data, sigma, mask, params, GaussianNoise())
        result.flags[0] = FitFlag.BAD_PSF
        assert plot.misfit(result).texts[0].get_text() == "no fit"
        with pytest.raises(ValueError, match="levels"):
            plot.misfit(result, levels=(-1,))
