"""Calibration: fits whose posterior is known exactly pass it, and wrong ones do not."""

import numpy as np
import pytest
from astropy.table import QTable
from numpy.testing import assert_allclose, assert_array_equal

from galmorph import (
    EncoderFitter,
    FitFlag,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    LogNormal,
    LogUniform,
    MAPFitter,
    Normal,
    PointSource2D,
    Uniform,
    plot,
)
from galmorph.calibration import Calibration, _offset, calibrate
from galmorph.cli import main
from galmorph.detection import gaussian_psf
from galmorph.fitting import StampFits
from galmorph.noise import StudentTNoise
from galmorph.priors import Truncated

SHAPE, SIGMA = (7, 7), 2.0
PRIOR = {"flux": Normal(200.0, 50.0), "background": Normal(0.5, 3.0)}
STAR = gaussian_psf(4.0)
GALAXIES = {
    "r_eff": LogNormal(3.0, 0.3),
    "ellip": Uniform(0.2, 0.6),
    "theta": Uniform(-np.pi / 2, np.pi / 2),
}


class LinearFitter:
    """The exact posterior of flux and background of a point source at a known place.

    Both are linear and have normal priors, so that the posterior is normal.

    Parameters
    ----------
    stretch : float, optional
        Factor on the standard deviations.
    correlated : bool, optional
        Whether the posterior knows that flux and background are correlated.
    """

    def __init__(self, *, stretch=1.0, correlated=True):
        self.stretch, self.correlated = stretch, correlated

    def fit_stamps(self, batch, model, *, background="constant"):
        n = len(batch)
        star = model.render(batch.data.shape[1:], params=[[1.0, model.x_0.value, model.y_0.value]])
        design = np.stack([star.ravel(), np.ones(star.size)], 1) * batch.inv_sigma.max()
        mean = np.array([prior.mean for prior in PRIOR.values()])
        weight = np.diag([prior.std**-2 for prior in PRIOR.values()])
        cov = np.linalg.inv(design.T @ design + weight)
        told = (batch.data * batch.inv_sigma).reshape(n, -1) @ design
        best = (told + weight @ mean) @ cov
        cov = cov * self.stretch**2
        if not self.correlated:
            cov = np.diag(np.diag(cov))
        params = np.tile(model.parameters, (n, 1))
        params[:, 0] = best[:, 0]
        full = np.zeros((n, 3, 3))
        full[:, 0, 0] = cov[0, 0]
        extra = {}
        if self.correlated:  # covariances of parameters and background only draws can tell
            rng = np.random.default_rng([8, batch.index[0]])
            draws = rng.multivariate_normal([0, 0], cov, (n, 500))
            samples = np.tile(params[:, None], (1, 500, 1))
            samples[..., 0] += draws[..., 0]
            extra["samples"] = np.dstack([samples, best[:, None, 1:] + draws[..., 1:]])
        return StampFits(
            params=params,
            cov=full,
            background=best[:, 1:],
            background_cov=np.full((n, 1, 1), cov[1, 1]),
            chi2=np.ones(n),
            dof=np.ones(n),
            n_iter=np.ones(n, dtype=int),
            flags=np.array(batch.flags),
            extra=extra,
        )


def linear(n=1000, rng=3, **options):
    model = PointSource2D(x_0=3.2, y_0=2.9, psf=STAR)
    model.x_0.fixed = model.y_0.fixed = True
    return calibrate(
        model,
        LinearFitter(**options),
        prior=PRIOR,
        noise=SIGMA,
        shape=SHAPE,
        background="constant",
        n=n,
        rng=rng,
    )


@pytest.fixture(scope="module")
def exact():
    return linear()


@pytest.fixture(scope="module")
def gaussian():
    return calibrate(
        GaussianGalaxy2D(), prior=GALAXIES, snr=100, psf=gaussian_psf(2.5), shape=(40, 40), n=60
    )


def by_hand(ranks, draws, **options):
    """A calibration of one parameter with these ranks, joint ranks alike."""
    ranks = np.asarray(ranks)
    column = ranks[:, None]
    values = {"truth": column * 1.0, "pulls": column * 1.0, "flags": np.zeros(len(ranks), int)}
    return Calibration(
        param_names=("flux",), ranks=column, joint_ranks=ranks, draws=draws, **(values | options)
    )


# -- posteriors that are known ---------------------------------------------------------------


def test_exact_posterior(exact):
    assert exact.param_names == ("flux", "background")  # the place is fixed
    assert exact.failed_fraction == 0
    assert (exact.rank_test()["p_value"] > 0.001).all()
    table = exact.coverage()
    assert (np.abs(table["coverage"] - table["level"]) < 4 * table["error"]).all()
    summary = exact.to_table()[:-1]
    assert (np.abs(summary["bias"]) < 4 * summary["bias_err"]).all()
    assert (np.abs(summary["scatter"] - 1) < 4 * summary["scatter_err"]).all()


def test_too_narrow_posterior():
    """Standard deviations that are 30 % too small are found."""
    found = linear(stretch=0.7)
    assert (found.rank_test()["p_value"] < 1e-6).all()
    counts, _ = found.rank_counts(10)
    assert (counts[:2, [0, -1]].min() > counts[:2, 4:6].max()).all()  # a U
    table = found.to_table()
    assert (table["coverage_68"] < 0.68 - 5 * table["coverage_68_err"]).all()
    assert_allclose(table["scatter"][:2], 1 / 0.7, rtol=0.1)


def test_joint_rank_sees_correlation():
    """Right standard deviations, no correlation: each parameter passes, all together do not."""
    flux, background, joint = linear(correlated=False).rank_test()["p_value"]
    assert min(flux, background) > 0.001
    assert joint < 1e-6


def test_laplace_approximation(gaussian):
    """At S/N 100 the posterior is nearly normal."""
    assert gaussian.failed_fraction == 0
    assert gaussian.param_names == gaussian.result.param_names
    assert (gaussian.rank_test()["p_value"] > 0.001).all()
    table = gaussian.coverage([0.68])
    assert (np.abs(table["coverage"] - 0.68) < 3.5 * table["error"]).all()


def test_angles_are_near_the_truth(gaussian):
    """An axis at 89 degrees is near one at -89 degrees."""
    k = gaussian.param_names.index("theta")
    plain = (gaussian.result.params[:, k] - gaussian.truth[:, k]) / gaussian.result.stds[:, k]
    assert np.abs(plain).max() > 20
    assert np.abs(gaussian.pulls[:, k]).max() < 5


def test_repeats():
    first, again, other = (linear(40, rng) for rng in (5, 5, 6))
    assert_array_equal(first.ranks, again.ranks)
    assert_array_equal(first.truth, again.truth)
    assert (first.truth != other.truth).all()


# -- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [9, 10, 199])
@pytest.mark.parametrize("bins", [2, 3, 10])
def test_uniform_ranks(draws, bins):
    """Ranks that are exactly uniform have exactly the right statistics, evenly binned or not."""
    found = by_hand(np.arange(draws + 1), draws)
    assert_allclose(found.coverage([0.5, 0.68, 0.9])["coverage"], [0.5, 0.68, 0.9] * 2)
    counts, probability = found.rank_counts(bins)
    assert_allclose(counts, [probability * (draws + 1)] * 2)
    assert_allclose(found.rank_test(bins)["chi2"], 0)
    assert_allclose(found.rank_test(bins)["p_value"], 1)


def test_rank_test_is_a_chi_square():
    found = by_hand([0] * 60 + [1] * 40, 1)
    table = found.rank_test(2)
    assert_allclose(table["chi2"], 4)
    assert_allclose(table["p_value"], 0.04550026)  # two sigma


@pytest.mark.parametrize("bins", [1, 12, 2.5])
def test_impossible_bins(bins):
    with pytest.raises(ValueError, match="bins must be"):
        by_hand(np.arange(11), 10).rank_counts(bins)


@pytest.mark.parametrize("levels", [0, 1, [0.5, 1.2], [np.nan]])
def test_impossible_levels(levels):
    with pytest.raises(ValueError, match="between 0 and 1"):
        by_hand(np.arange(11), 10).coverage(levels)


def noisy(images, rng):
    """Noise of one; no data in the second image."""
    data = images + rng.standard_normal(images.shape)
    data[1] = np.nan
    return data, 1.0


def test_failed_fits_are_counted():
    found = calibrate(
        GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.4), prior={}, noise=noisy, shape=(32, 32), n=20
    )
    assert found.failed_fraction == pytest.approx(0.05)
    assert_array_equal(found.used, np.arange(20) != 1)
    assert found.flags[1] & FitFlag.NO_DATA
    assert (found.ranks[1] == -1).all()
    assert np.isnan(found.pulls[1]).all()
    assert found.rank_counts()[0].sum(1).tolist() == [19] * 7
    assert np.isfinite(found.to_table()["bias"][:-1]).all()
    assert "1 failed" in repr(found)


def test_nothing_fitted():
    found = by_hand([-1, -1], 10)
    assert found.failed_fraction == 1
    with pytest.raises(ValueError, match="not one galaxy"):
        found.to_table()


# -- simulation ------------------------------------------------------------------------------


def test_snr_sets_the_flux(gaussian):
    images = GaussianGalaxy2D().render((40, 40), params=gaussian.truth, psf=gaussian_psf(2.5))
    assert_allclose(np.sqrt((images**2).sum((1, 2))), 100)


def test_snr_in_uneven_noise():
    noise = np.linspace(1, 3, 24 * 20).reshape(24, 20)
    found = calibrate(
        GaussianGalaxy2D(), prior=GALAXIES, snr=LogUniform(30, 60), noise=noise, shape=(24, 20), n=8
    )
    images = GaussianGalaxy2D().render((24, 20), params=found.truth)
    snr = np.sqrt(((images / noise) ** 2).sum((1, 2)))
    assert ((snr > 30) & (snr < 60)).all()
    assert np.ptp(snr) > 1
    stamps = found.result.stamps.get(np.arange(8))
    assert_allclose(stamps.inv_sigma[3], 1 / noise, rtol=1e-6)


def test_data_are_model_background_and_noise(exact):
    batch = exact.result.stamps.get(np.arange(500))
    flux, background = exact.truth[:500].T
    model = PointSource2D(psf=STAR)
    params = np.column_stack([flux, np.full(500, 3.2), np.full(500, 2.9)])
    rest = batch.data - model.render(SHAPE, params=params) - background[:, None, None]
    assert abs(rest.mean()) < 4 * SIGMA / np.sqrt(rest.size)
    assert_allclose(rest.std(), SIGMA, rtol=4 / np.sqrt(2 * rest.size))


def test_priors_stay_within_bounds():
    model = GaussianGalaxy2D(flux=2000, bounds={"r_eff": (2.5, 3.5)})
    found = calibrate(model, prior=GALAXIES, shape=(32, 32), n=50)
    r_eff = found.truth[:, found.param_names.index("r_eff")]
    assert ((r_eff > 2.5) & (r_eff < 3.5)).all()
    inside = Truncated(GALAXIES["r_eff"], 2.5, 3.5).cdf(r_eff)
    assert inside.min() < 0.1
    assert inside.max() > 0.9


def test_fitter_gets_the_prior():
    """One without priors, a copy of it; one that has some (none are some) keeps them."""
    prior = {"r_eff": Normal(3, 1e-4)}
    model = GaussianGalaxy2D(flux=300, r_eff=3, ellip=0.3)
    own, plain = MAPFitter(priors={}), MAPFitter()
    kept, given = (
        calibrate(model, fitter, prior=prior, shape=(24, 24), n=5) for fitter in (own, plain)
    )
    k = given.param_names.index("r_eff")
    assert (given.result.stds[:, k] < 2e-4).all()
    assert (kept.result.stds[:, k] > 0.01).all()
    assert plain.priors is None


def test_noise_model():
    model = GaussianGalaxy2D(flux=900, r_eff=3, ellip=0.3)
    found = calibrate(model, noise_model=StudentTNoise(3.0), prior={}, shape=(24, 24), n=5)
    assert repr(found.result.noise) == repr(StudentTNoise(3.0))
    with pytest.raises(TypeError, match="takes no noise model"):
        calibrate(model, LinearFitter(), prior={}, noise_model=StudentTNoise(3.0))


def test_learned_galaxies():
    """Latents come from the prior of the network, but for those that have another."""
    model = LearnedGalaxy2D.from_pretrained()
    prior = {"theta": Uniform(-np.pi, np.pi), "z1": Normal(1.0, 0.01)}
    found = calibrate(
        model, EncoderFitter(), prior=prior, snr=50, shape=(32, 32), n=40, psf=gaussian_psf(3.0)
    )
    truth = dict(zip(found.param_names, found.truth.T, strict=True))
    others = np.array([truth[name] for name in model.latent_names if name != "z1"])
    assert abs(others.mean()) < 4 / np.sqrt(others.size)
    assert abs(others.std() - 1) < 4 / np.sqrt(2 * others.size)
    assert_allclose(truth["z1"], 1, atol=0.05)
    assert found.used.all()


def test_half_turn_of_learned_galaxies():
    """Where the same image has two descriptions, that near the fit is taken."""
    import torch

    from galmorph.nets.learned import LearnedShape, galmorph_preset

    torch.manual_seed(1)
    vae = galmorph_preset(latent_dim=10, parities=(2, 2, 2, 2))
    model = LearnedGalaxy2D(shape=LearnedShape(vae))
    params = model.sample(6, 1)
    params[:, :5] = [100, 15.3, 14.8, 5, 0.4]
    turned = params.copy()
    turned[:, 4] += np.pi
    turned[:, 5:] *= vae.decoder.signs[2].numpy()
    assert (turned[:, 5:] != params[:, 5:]).any()
    images = [model.render((31, 31), params=p) for p in (params, turned)]
    assert_allclose(*images, atol=1e-5 * images[0].max())

    class Result:
        param_names = model.param_names

    Result.model = model
    assert_allclose(_offset(turned[:, None], params, Result), 0, atol=1e-12)
    near = params + 0.01
    assert_allclose(_offset(near[:, None], params, Result), 0.01, atol=1e-12)


BRIGHT = {"flux": Uniform(500, 900)}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": GaussianGalaxy2D}, TypeError, "one galmorph model"),
        ({"prior": {"n": Uniform(1, 2)}}, ValueError, "no parameter 'n'"),
        ({"prior": {"background": Uniform(1, 2)}}, ValueError, "no parameter 'background'"),
        ({"prior": {"flux": 3.0}}, TypeError, "no method sample"),
        ({"model": GaussianGalaxy2D(fixed={"flux": True})}, ValueError, "'flux' is fixed"),
        ({"model": GaussianGalaxy2D(tied={"y_0": lambda m: m.x_0})}, ValueError, "tied"),
        ({"snr": 10}, ValueError, "snr sets the flux"),
        ({"snr": -10, "prior": {}}, ValueError, "snr must be"),
        ({"snr": 10, "prior": {}, "noise": noisy}, ValueError, "does not depend"),
        ({"noise": 0}, ValueError, "noise must be positive"),
        ({"noise": np.ones((3, 3))}, ValueError, "broadcast"),
        ({"noise": lambda images, rng: (images[0], 1.0)}, ValueError, "must return data"),
        ({"noise_model": 3}, TypeError, "NoiseModel"),
        ({"shape": (3,)}, ValueError, "shape must be"),
        ({"background": "flat"}, ValueError, "background must be"),
        ({"n": 0}, ValueError, "n must be"),
        ({"draws": 1.5}, ValueError, "draws must be"),
    ],
)
def test_bad_arguments(options, error, match):
    given = {"model": GaussianGalaxy2D(), "prior": BRIGHT, "n": 4, "shape": (24, 24)} | options
    with pytest.raises(error, match=match):
        calibrate(given.pop("model"), **given)


# -- files and figures -----------------------------------------------------------------------


def test_write_and_read(gaussian, tmp_path):
    path = tmp_path / "calibration.ecsv"
    gaussian.write(path)
    with pytest.raises(OSError, match="overwrite"):
        gaussian.write(path)
    same = Calibration.read(path)
    for name in ("truth", "ranks", "joint_ranks", "pulls", "flags"):
        assert_array_equal(getattr(same, name), getattr(gaussian, name))
    assert (same.param_names, same.draws) == (gaussian.param_names, gaussian.draws)
    assert same.meta == gaussian.meta
    assert_array_equal(same.to_table()["p_value"], gaussian.to_table()["p_value"])
    assert QTable.read(path)["theta_true"].unit == "rad"


def test_read_another_table(tmp_path):
    path = tmp_path / "table.ecsv"
    QTable({"x": [1]}).write(path)
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.read(path)


def test_rank_histograms(exact):
    axes = plot.rank_histograms(exact, bins=10)
    assert [ax.get_title() for ax in axes] == ["$F$", "background", "joint"]
    counts, _ = exact.rank_counts(10)
    for ax, bars in zip(axes, counts, strict=True):
        band, middle, drawn = (patch.get_data() for patch in ax.patches)
        assert_array_equal(drawn.values, bars)
        assert_allclose(middle.values, 100, atol=1)
        # of the binomial distribution, 99 % within: 100 -24 +25, and half a galaxy
        assert_allclose([band.baseline[0], band.values[0]], [76, 125], atol=2)
    with pytest.raises(ValueError, match="axes must be 3 axes"):
        plot.rank_histograms(exact, axes=axes[:2])


def test_coverage_figure(exact):
    ax = plot.coverage(exact)
    lines = {line.get_label(): line.get_data() for line in ax.get_lines()}
    x, y = lines["$F$"]
    assert_allclose(y, exact.coverage(x)["coverage"][: len(x)])
    assert "joint" in lines
    (band,) = ax.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert low < 0.02
    assert high > 0.98


def test_coverage_of_many_parameters():
    """Those farthest off have names."""
    rng = np.random.default_rng(1)
    ranks = rng.integers(0, 100, (500, 14))
    ranks[:, 12] //= 2
    found = by_hand(ranks[:, 0], 99)
    found.param_names, found.ranks = tuple(f"z{k}" for k in range(14)), ranks
    names = [text.get_text() for text in plot.coverage(found).get_legend().get_texts()]
    assert len(names) == 11
    assert "$z_{12}$" in names


def test_pulls_figure(exact):
    axes = plot.pulls(exact)
    assert len(axes) == 2
    for ax in axes:
        assert ax.patches[0].get_data().values.sum() == len(exact)
        assert_allclose(ax.get_lines()[0].get_xdata()[[0, -1]], [-4, 4])


# -- the command -----------------------------------------------------------------------------


CONFIG = """
model = "gaussian"
shape = [32, 32]
snr = 100
n = 7
[prior]
r_eff = "lognormal:3:0.3"
ellip = "uniform:0.2:0.6"
"""


def test_command(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(CONFIG)
    output = tmp_path / "calibration.ecsv"
    command = ["calibrate", str(tmp_path / "config.toml"), "-o", str(output), "--psf", "fwhm=2.5"]
    command += ["--n", "40", "--prior", "theta=uniform:-90:90", "--prior", "ellip=uniform:0.3:0.6"]
    assert main([*command, "--plots", str(tmp_path / "figures")]) == 0
    found = Calibration.read(output)
    assert len(found) == 40  # the command line goes before the file
    truth = dict(zip(found.param_names, found.truth.T, strict=True))
    assert truth["ellip"].min() > 0.3
    assert np.abs(truth["theta"]).max() > 1.2  # degrees became radians
    assert np.abs(truth["theta"]).max() < np.pi / 2
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "ranks.png",
        "coverage.png",
        "pulls.png",
    }
    told = capsys.readouterr().out
    assert "40 galaxies, 0 failed" in told
    assert "r_eff" in told
    assert main(command) == 2  # it is there already


def test_command_repeats_and_reads_files(tmp_path):
    noise = np.full((24, 24), 2.0)
    np.save(tmp_path / "sigma.npy", noise)
    command = ["calibrate", "--model", "gaussian", "--snr", "uniform:50:60", "--shape", "24", "24"]
    command += ["--fix", "ellip=0.4", "--set", "r_eff=2", "--n", "6", "--seed", "3", "-q"]
    paths = [tmp_path / name for name in ("a.ecsv", "b.ecsv")]
    (tmp_path / "noise.toml").write_text('noise = "sigma.npy"')  # beside it
    assert main([*command, "--noise", "2", "-o", str(paths[0])]) == 0
    assert main([*command, str(tmp_path / "noise.toml"), "-o", str(paths[1])]) == 0
    first, second = (Calibration.read(path) for path in paths)
    assert_array_equal(first.ranks, second.ranks)
    assert "ellip" not in first.param_names
    assert_array_equal(first.truth[:, first.param_names.index("r_eff")], 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "how bright"),
        (["--snr", "bright"], "not a number"),
        (["--prior", "flux=1:2"], "must be as uniform:0:1"),
        (["--prior", "flux=uniform:1:2:3"], "must be as uniform:0:1"),
        (["--prior", "flux=uniform:2:1"], "lower one first"),
        (["--snr", "9", "--set", "n_disk=1"], "sersic has the parameters"),
        (["--snr", "9", "--weights", "default"], "learned model"),
        (["--snr", "9", "--psf", "auto"], "no"),
        (["--snr", "9", "--psf", "nowhere.fits"], "no such file"),
        (["nowhere.toml"], "nowhere.toml"),
    ],
)
def test_command_says_what_is_wrong(options, text, tmp_path, capsys):
    assert main(["calibrate", *options, "-o", str(tmp_path / "out.ecsv")]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("line", ["galaxies = 3", 'n = "many"', "n = ", 'model = "spiral"'])
def test_bad_configuration(line, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text(line)
    assert main(["calibrate", str(tmp_path / "bad.toml"), "-o", str(tmp_path / "o.ecsv")]) == 2
    assert "bad.toml" in capsys.readouterr().err
