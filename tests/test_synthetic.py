"""Synthetic galaxies: populations, fields and their truth."""

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable
from numpy.testing import assert_allclose
from scipy import stats

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    GaussianGalaxy2D,
    LearnedGalaxy2D,
    SersicGalaxy2D,
    fit_images,
)
from galmorph.cli import main
from galmorph.detection import gaussian_psf
from galmorph.synthetic import (
    SizeRelation,
    canonical_images,
    draw_galaxies,
    mock_field,
    mock_stamps,
    to_galsim,
    truth_table,
)

torch = pytest.importorskip("torch")

from galmorph.nets.flow import FlowPrior, Population  # noqa: E402
from galmorph.nets.weights import WeightsError  # noqa: E402


@pytest.fixture(scope="module")
def learned():
    return LearnedGalaxy2D.from_pretrained(psf=gaussian_psf(3.0))


def shrunk(rng, n=4000, errors=(0.3, 1.5)):
    """Posteriors under N(0, I) of values of N((1, -1), 0.5^2), measured with various errors."""
    truth = [1.0, -1.0] + 0.5 * rng.standard_normal((n, 2))
    variance = rng.uniform(*errors, (n, 1)) ** 2
    measured = truth + np.sqrt(variance) * rng.standard_normal((n, 2))
    cov = np.eye(2) / (1 + 1 / variance[:, :, None])
    return measured / (1 + variance), cov


# -- populations -----------------------------------------------------------------------------


def test_mixture_takes_errors_and_prior_away(rng):
    """Means of posteriors scatter otherwise than the galaxies; the population does not."""
    mean, cov = shrunk(rng, n=2500)
    population = Population.fit(mean, cov, n_components=1, tolerance=1e-6, max_iterations=150)
    drawn = population.sample(40000, rng=1)
    assert_allclose(drawn.mean(0), [1, -1], atol=0.05)
    assert_allclose(drawn.std(0), 0.5, atol=0.05)
    assert abs(mean[:, 0].mean() - 1) > 0.2


def test_flow_takes_errors_and_prior_away(rng):
    mean, cov = shrunk(rng, n=2000, errors=(0.2, 0.6))
    population = Population.fit(
        mean, cov, kind="flow", rng=2, epochs=6, draws=8, transforms=1, hidden=(16,)
    )
    drawn = population.sample(20000, rng=1)
    assert_allclose(drawn.mean(0), [1, -1], atol=0.08)
    assert_allclose(drawn.std(0), 0.5, atol=0.08)


def test_flow_bends(rng):
    """A ring, which no normal is like."""
    angle = rng.uniform(0, 2 * np.pi, 3000)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.standard_normal((3000, 2))
    population = Population.fit(
        ring,
        np.zeros((3000, 2, 2)),
        kind="flow",
        prior_precision=0.0,
        rng=1,
        epochs=8,
        draws=1,
    )
    radius = np.hypot(*population.sample(4000, rng=2).T)
    assert np.mean(radius < 0.6) < 0.05
    assert stats.wasserstein_distance(radius, np.hypot(*ring.T)) < 0.05


def test_density_of_flow_is_that_of_its_samples(rng):
    """ln p integrates to one, by importance sampling from a wide normal."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = FlowPrior(2, transforms=2, hidden=(16,))
    flow.loc += 1.5
    flow.scale *= 0.5
    population = Population(flow)
    wide = stats.multivariate_normal([1.5, 1.5], 1.5**2 * np.eye(2), seed=3)
    points = wide.rvs(40000)
    assert_allclose(np.exp(population.log_prob(points) - wide.logpdf(points)).mean(), 1, atol=0.03)
    inside = (np.abs(points - 1.5) < 0.4).all(1)
    share = (inside * np.exp(population.log_prob(points) - wide.logpdf(points))).mean()
    drawn = population.sample(40000, rng=4)
    assert_allclose((np.abs(drawn - 1.5) < 0.4).all(1).mean(), share, atol=0.02)


def test_what_the_prior_decided_is_not_stretched():
    """A mean far off in a direction without information says nothing of the population."""
    rng = np.random.default_rng(1)
    mean = np.stack([rng.normal(2, 0.3, 500), rng.normal(0, 3, 500)], 1)
    cov = np.tile(np.diag([0.01, 0.9999]), (500, 1, 1))
    drawn = Population.fit(mean, cov, n_components=1).sample(2000, rng=1)
    assert drawn[:, 1].std() < 4
    assert_allclose(drawn[:, 0].mean(), 2.0, atol=0.05)


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_files(tmp_path, rng, kind):
    mean, cov = shrunk(rng, n=200)
    options = {"epochs": 1} if kind == "flow" else {"n_components": 2}
    population = Population.fit(mean, cov, kind=kind, rng=1, **options)
    population.metadata["what"] = "test"
    population.write(tmp_path / "a.population", half=False)
    again = Population.read(tmp_path / "a.population")
    assert again.metadata == {"what": "test"}
    assert again.size == 2
    assert_allclose(again.log_prob(mean), population.log_prob(mean), rtol=1e-6)
    assert_allclose(again.sample(5, rng=3), population.sample(5, rng=3))
    (tmp_path / "b.population").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        Population.read(tmp_path / "b.population")


def test_classes_are_components(rng):
    group = rng.integers(2, size=600)
    values = np.array([[-4.0, 0.0], [4.0, 0.0]])[group] + 0.3 * rng.standard_normal((600, 2))
    population = Population.fit(
        values, np.zeros((600, 2, 2)), n_components=2, prior_precision=0.0, rng=1
    )
    for one in (0, 1):
        drawn = population.sample(100, rng=1, classes=one)
        assert len(set(np.sign(drawn[:, 0]))) == 1
    assert len(set(np.sign(population.sample(100, 1, classes=[0, 1])[:, 0]))) == 2
    with pytest.raises(ValueError, match="components"):
        population.sample(3, classes=2)


def test_bad_populations(rng):
    with pytest.raises(ValueError, match="shape"):
        Population.fit(np.zeros((5, 2)), np.zeros((5, 3, 3)))
    with pytest.raises(ValueError, match="too few"):
        Population.fit(np.zeros((5, 2)), np.zeros((5, 2, 2)))
    with pytest.raises(ValueError, match="kind"):
        Population.fit(np.zeros((5, 2)), np.zeros((5, 2, 2)), kind="other")
    with pytest.raises(WeightsError, match="default"):
        Population.from_pretrained("nowhere")


def test_sample_of_the_model(learned):
    class Fixed:
        def sample(self, n, rng, classes=None):
            return np.full((n, 32), 0.0 if classes is None else classes)

    class Conditional:
        def sample(self, n, condition, rng):
            return np.full((n, 32), condition["redshift"])

    assert_allclose(learned.sample(2, 1, population=Fixed(), classes=3)[:, 5:], 3)
    drawn = learned.sample(2, 1, population=Conditional(), condition={"redshift": 0.4})
    assert_allclose(drawn[:, 5:], 0.4)
    assert_allclose(learned.sample(3, 1), learned.sample(3, 1))
    with pytest.raises(ValueError, match="need a population"):
        learned.sample(2, classes=1)


def test_shipped_populations(learned):
    """They belong to the default weights and draw more structure than the prior of the network."""
    drawn = learned.sample(500, rng=1, population="default")
    assert np.isfinite(drawn).all()
    assert drawn[:, 7:].std() > 1.2
    assert np.abs(drawn[:, 5:]).max() == Population.from_pretrained().metadata["limit"]
    for model in (SersicGalaxy2D(), BulgeDiskGalaxy2D()):
        params = draw_galaxies(model, 200, shape=(100, 100), rng=1)
        for name, (low, high) in model.default_bounds().items():
            column = params[:, model.param_names.index(name)]
            assert low is None or column.min() >= low, name
            assert high is None or column.max() <= high, name


# -- galaxies --------------------------------------------------------------------------------


def test_counts_and_sizes():
    """Magnitudes follow the power law, centres are even, numbers are those of the density."""
    model = SersicGalaxy2D()
    drawn = draw_galaxies(
        model, 4000, shape=(500, 800), magnitudes=(19, 23), slope=0.4, zero_point=27, rng=1
    )
    magnitude = 27 - 2.5 * np.log10(drawn[:, 0])
    rate = 0.4 * np.log(10)
    expected = stats.truncexpon(rate * 4, scale=1 / rate)
    assert stats.kstest(23 - magnitude, expected.cdf).pvalue > 1e-3
    assert stats.kstest(drawn[:, 1], stats.uniform(-0.5, 800).cdf).pvalue > 1e-3
    assert stats.kstest(drawn[:, 2], stats.uniform(-0.5, 500).cdf).pvalue > 1e-3
    assert stats.kstest(drawn[:, 6], stats.uniform(0, 2 * np.pi).cdf).pvalue > 1e-3
    relation = SizeRelation()
    off = np.log10(drawn[:, 3] * 0.2) - np.log10(relation.radius)
    off -= relation.slope * (magnitude - relation.magnitude)
    assert stats.kstest(off / relation.scatter, "norm").pvalue > 1e-3
    numbers = [
        len(draw_galaxies(model, shape=(600, 600), density=10 / u.arcmin**2, rng=i))
        for i in range(30)
    ]
    assert_allclose(np.mean(numbers), 40, atol=4 * np.sqrt(40 / 30))


def test_given_magnitudes():
    drawn = draw_galaxies(SersicGalaxy2D(), shape=(50, 50), magnitudes=[20.0, 21, 22], rng=1)
    assert_allclose(drawn[:, 0], 10 ** (-0.4 * (np.array([20, 21, 22]) - 25)))
    with pytest.raises(ValueError, match="bright, faint"):
        draw_galaxies(SersicGalaxy2D(), shape=(50, 50), magnitudes=(24, 20))
    with pytest.raises(TypeError, match="Gaussian"):
        draw_galaxies(GaussianGalaxy2D(), 3, shape=(50, 50))
    with pytest.raises(ValueError, match="pixel_scale"):
        draw_galaxies(SersicGalaxy2D(), 3, shape=(50, 50), pixel_scale=0)


def test_canonical_images(learned):
    """Of one size, flux and axis: half of the light is in the ellipse."""
    params = learned.sample(3, rng=2)
    params[:, :5] = [700, 3, 4, 1.5, 1.0]
    images = canonical_images(learned, params, size=160, r_50=15)
    axis_ratio = 1 - learned.derived(params, 0 * params)["ellip"][0]
    y, x = np.mgrid[:160, :160] - 79.5
    within = np.hypot(x, y / axis_ratio[:, None, None]) < 15
    assert_allclose((images * within).sum((1, 2)), 0.5, atol=0.02)
    params[:, :5] = [1, 0, 0, 9, -0.3]
    assert_allclose(canonical_images(learned, params, size=160, r_50=15), images)
    with pytest.raises(TypeError, match="canonical"):
        canonical_images(BulgeDiskGalaxy2D(), np.zeros((1, 11)))


@pytest.mark.parametrize("kind", ["learned", "sersic"])
def test_galsim(learned, kind):
    """Drawn by GalSim through the same PSF it has the same flux and pixels."""
    galsim = pytest.importorskip("galsim")
    if kind == "learned":
        model = learned.copy()
        # large: the renderer samples what the profile misses once a pixel
        model.parameters = learned.sample(1, rng=5)[0]
        model.flux, model.x_0, model.y_0, model.r_50, model.theta = 50, 40, 40, 14, 0.7
    else:
        model = SersicGalaxy2D(50, 40, 40, 5, n=1.5, ellip=0.4, theta=0.7)
    galaxy = to_galsim(model, pixel_scale=0.2, oversampling=2 if kind == "learned" else 4)
    assert_allclose(galaxy.flux, 50)
    seen = galsim.Convolve(galaxy, galsim.Gaussian(fwhm=0.8))
    drawn = seen.drawImage(nx=81, ny=81, scale=0.2, method="no_pixel").array
    ours = model.render((81, 81), psf=gaussian_psf(4.0))
    assert_allclose(drawn.sum(), ours.sum(), rtol=1e-3)
    assert_allclose(drawn, ours, atol=3e-3 * ours.max())


# -- fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "sersic", "bulge-disk"])
def test_field_is_the_sum_of_its_galaxies(learned, kind):
    """Stamps as large as the light needs lose less than a tenth of the noise of a pixel."""
    psf = gaussian_psf(3.0)
    model = {
        "learned": learned,
        "sersic": SersicGalaxy2D(psf=psf),
        "bulge-disk": BulgeDiskGalaxy2D(psf=psf),
    }[kind]
    params = draw_galaxies(
        model, 12, shape=(150, 180), magnitudes=(19.0, 23.0), population=fixed(kind), rng=1
    )
    field = mock_field(model, params, (150, 180), rms=0.05, rng=2)
    whole = model.render((150, 180), params=params).sum(0)
    assert np.abs(field.light - whole).max() < 0.1 * 0.05 * 2
    assert_allclose(field.light.sum(), whole.sum(), rtol=1e-2)
    pull = (field.data - field.light) / field.uncertainty
    assert stats.kstest(pull.ravel(), "norm").pvalue > 1e-3


def fixed(kind):
    """A population that does not come from a file."""
    columns = {"learned": 32, "sersic": 2, "bulge-disk": 5}[kind]

    class Drawn:
        def sample(self, n, rng):
            return 0.5 * np.random.default_rng(rng).standard_normal((n, columns))

    return Drawn()


def test_texture(learned):
    """A random field of the strength of the misfit; none for models of which none is known."""
    params = learned.sample(60, rng=1)
    params[:, :5] = [100, 31, 31, 7, 0.3]
    plain = mock_stamps(learned, params, (64, 64)).data
    rough = mock_stamps(learned, params, (64, 64), texture=0.5, rng=2).data
    misfit = learned.render_misfit((64, 64), params=params)
    middle = np.s_[:, 20:44, 20:44]
    assert_allclose(((rough - plain) / misfit)[middle].std(), 0.5, rtol=0.1)
    assert_allclose(mock_stamps(learned, params, (64, 64), texture=0.5, rng=2).data, rough)
    sersic = SersicGalaxy2D(100, 20, 20, 4)
    params = sersic.parameters[None]
    again = mock_stamps(sersic, params, (41, 41), texture=0.5, rng=2).data
    assert_allclose(again, mock_stamps(sersic, params, (41, 41)).data)
    with pytest.raises(ValueError, match="texture"):
        mock_stamps(sersic, params, (41, 41), texture=-1)


def test_poisson_noise_of_light_and_sky():
    model = SersicGalaxy2D(psf=gaussian_psf(3.0))
    params = np.array([[2000.0, 60, 60, 15, 1, 0.2, 0.3]])
    field = mock_field(model, params, (121, 121), gain=5.0, sky=3.0, rms=0.4, rng=3)
    assert_allclose(field.uncertainty, np.sqrt(0.16 + (field.light + 3) / 5), rtol=1e-12)
    pull = (field.data - field.light) / field.uncertainty
    assert abs(pull.mean()) < 4 / 121
    assert_allclose(pull.std(), 1, atol=4 / 121 / np.sqrt(2))
    for wrong in ({"rms": -1.0}, {"gain": 0.0}, {"sky": 1.0}):
        with pytest.raises(ValueError, match="must"):
            mock_field(model, params, (9, 9), **wrong)


def test_segmentation_is_of_the_dominant_galaxy():
    psf = gaussian_psf(2.5)
    model = SersicGalaxy2D(psf=psf)
    params = np.array([[300.0, 40, 40, 4, 1, 0, 0], [100.0, 52, 40, 4, 1, 0, 0]])
    field = mock_field(model, params, (81, 91), rms=0.1, threshold=1.5, rng=1)
    each = model.render((81, 91), params=params)
    expected = np.where(each.max(0) > 0.15, each.argmax(0) + 1, 0)
    assert np.mean(field.segmentation != expected) < 1e-3
    assert_allclose(field.catalog["n_pixels"], np.bincount(expected.ravel())[1:], atol=5)
    snr = np.sqrt((each**2).sum((1, 2))) / 0.1
    assert_allclose(field.catalog["snr"], snr, rtol=1e-2)


def test_field_through_an_oversampled_psf_without_the_pixel():
    fine = np.zeros((41, 41))
    y, x = np.mgrid[-20:21, -20:21] / 4
    fine = np.exp(-0.5 * (x**2 + y**2) / 1.2**2)
    psf = PSF(fine, oversampling=4, includes_pixel=False)
    model = SersicGalaxy2D()
    params = np.array([[300.0, 40.3, 39.1, 4, 1.5, 0.3, 0.5]])
    field = mock_field(model, params, (81, 81), psf=psf)
    assert_allclose(field.light, model.render((81, 81), params=params[0:1], psf=psf)[0], atol=1e-3)
    assert field.psf == psf


def test_field_files(tmp_path, learned):
    """What is written is read again, and fitted as it is."""
    params = draw_galaxies(
        learned, 6, shape=(200, 220), magnitudes=(18, 20), population=None, rng=7
    )
    field = mock_field(learned, params, (200, 220), rms=0.3, pixel_scale=0.25, rng=1)
    path = tmp_path / "mock.fits"
    field.write(path)
    table = QTable.read(path, hdu="TRUTH")
    assert_allclose(table["z"], params[:, 5:])
    assert table["r_50_arcsec"].unit == u.arcsec
    assert_allclose(table["r_50_arcsec"].value, 0.25 * params[:, 3])
    x, y = field.wcs.world_to_pixel(table["sky"])
    assert_allclose(x, params[:, 1], atol=1e-6)
    assert_allclose(y, params[:, 2], atol=1e-6)
    assert_allclose(table["magnitude"].value, 25 - 2.5 * np.log10(params[:, 0]))
    with fits.open(path) as file:
        assert [h.name for h in file] == ["PRIMARY", "SCI", "ERR", "SEG", "LIGHT", "PSF", "TRUTH"]
        assert_allclose(file["SEG"].data, field.segmentation)
    inner = np.flatnonzero((np.abs(params[:, 1:3] - [110, 100]) < [70, 60]).all(1))[:2]
    result = fit_images(
        str(path), SersicGalaxy2D(), positions=params[inner, 1:3], size=41, background="constant"
    )
    assert not result.failed.any()
    assert_allclose(result.params[:, 0] / params[inner, 0], 1, atol=0.5)


def test_stamps(learned):
    params = draw_galaxies(learned, 5, shape=(90, 90), magnitudes=(18, 19), population=None, rng=1)
    mock = mock_stamps(learned, params, (64, 64), gain=10.0, rms=0.1, rng=2)
    again = mock_stamps(learned, params, (64, 64), gain=10.0, rms=0.1, rng=2)
    assert_allclose(mock.data, again.data)
    x = np.tile(np.arange(64), (64, 1))
    light = mock_stamps(learned, params, (64, 64)).data
    brightest = light.reshape(5, -1).argmax(1)
    assert np.abs(x.ravel()[brightest] - 31).max() < 8
    assert_allclose(mock.uncertainty, np.sqrt(0.01 + light.clip(0) / 10), rtol=1e-6)


def test_truth_of_learned_galaxies(learned):
    params = learned.sample(3, rng=1)
    table = truth_table(learned, params)
    assert table["z"].shape == (3, 32)
    assert_allclose(table["n"], learned.derived(params, 0 * params)["n"][0])
    assert "z0" not in table.colnames


# -- the command -----------------------------------------------------------------------------


def test_command_makes_a_field(tmp_path, capsys):
    psf = tmp_path / "psf.fits"
    fits.writeto(psf, gaussian_psf(3.0, size=21).data)
    out = tmp_path / "mock.fits"
    line = ["generate", "--field", "160", "120", "--model", "sersic", "--rms", "0.1", "--seed", "3"]
    line += ["--density", "60", "--psf", f"{psf}", "--psf-oversampling", "3"]
    assert main([*line, "-o", f"{out}"]) == 0
    assert "galaxies on 160 x 120 pixels" in capsys.readouterr().out
    assert main([*line, "-o", f"{tmp_path / 'again.fits'}", "-q"]) == 0
    with fits.open(out) as one, fits.open(tmp_path / "again.fits") as two:
        assert one["SCI"].data.shape == (120, 160)
        assert_allclose(one["SCI"].data, two["SCI"].data)
        assert one["PSF"].header["OVERSAMP"] == 3
        assert len(one["TRUTH"].data) == one["TRUTH"].data["id"].max()
    assert main([*line, "-o", f"{out}"]) == 2
    assert "exists" in capsys.readouterr().err


def test_command_makes_stamps(tmp_path):
    out = tmp_path / "stamps.fits"
    line = ["generate", "--n", "3", "--population", "none", "--size", "40", "-o", f"{out}"]
    assert main([*line, "--psf", "fwhm=3", "--rms", "0.2"]) == 0
    with fits.open(out) as file:
        assert file["SCI"].data.shape == (3, 40, 40)
        noise = file["SCI"].data - file["LIGHT"].data
        assert_allclose(noise.std(), 0.2, rtol=0.05)
    assert main([*line, "--canonical", "--overwrite"]) == 0
    light = fits.getdata(out, "SCI")
    assert_allclose(light.sum((1, 2)), 1, atol=0.25)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "--n N"),
        (["--n", "0"], "positive"),
        (["--field", "10", "20", "30"], "NX NY"),
        (["--field", "10", "--canonical"], "stamps"),
        (["--n", "2", "--psf-oversampling", "2"], "PSF file"),
        (["--n", "2", "--psf", "fwhm=x"], "FWHM"),
        (["--n", "2", "--magnitudes", "24", "20"], "BRIGHT"),
        (["--n", "2", "--rms", "-1", "--population", "none"], "rms"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, wrong, said):
    assert main(["generate", *wrong, "-o", str(tmp_path / "x.fits")]) == 2
    assert said in capsys.readouterr().err
