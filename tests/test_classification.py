"""Classes without labels: the mixture, its probabilities, and what must not matter."""

import numpy as np
import pytest
from scipy import stats

from galmorph import (
    EncoderFitter,
    FitFlag,
    GalaxyClassifier,
    GalaxyVAE,
    LearnedGalaxy2D,
    MAPFitter,
    SersicGalaxy2D,
    fit_images,
)
from galmorph._tensorfile import read_arrays, write_arrays
from galmorph.classification import choose_n_components
from galmorph.latents import Latents, Morphology, measure_latents, nearest


def blobs(rng, n=300):
    at = np.array([[0, 0], [6, 0], [0, 7]])
    truth = rng.integers(0, 3, n)
    return at[truth] + rng.normal(0, 1, (n, 2)), truth


def exact(points):
    return Latents(points, np.zeros(points.shape))


@pytest.fixture(scope="module")
def stamps():
    """Sixty bright galaxies on 64 x 64 pixels, noise of 1."""
    rng = np.random.default_rng(5)
    n = 60
    model = SersicGalaxy2D()
    params = np.stack(
        [
            rng.uniform(4e4, 1e5, n),
            rng.normal(31.5, 0.5, n),
            rng.normal(31.5, 0.5, n),
            rng.uniform(5, 9, n),
            rng.uniform(0.7, 4, n),
            rng.uniform(0, 0.6, n),
            rng.uniform(-1.5, 1.5, n),
        ],
        -1,
    )
    return model.render((64, 64), params=params) + rng.normal(0, 1, (n, 64, 64))


def test_the_mixture_agrees_with_scikit_learn():
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(1)
    points, truth = blobs(rng)
    fit = GalaxyClassifier(3, calibration=0.0, reg_covar=1e-6, rng=1).fit(exact(points))
    theirs = GaussianMixture(3, n_init=5, random_state=1).fit(points)
    order = np.argsort(-theirs.weights_)
    assert np.allclose(fit.means_, theirs.means_[order], atol=0.02)
    assert np.allclose(fit.predict_proba(points), theirs.predict_proba(points)[:, order], atol=1e-3)
    assert np.allclose(fit.score_samples(points), theirs.score_samples(points), atol=1e-2)
    assert fit.bic_ == pytest.approx(theirs.bic(points), abs=1.0)
    assert (stats.mode(truth[fit.predict(points) == 0]).count) > 0.9 * 300 * fit.weights_[0]


def test_uncertain_galaxies_have_uncertain_classes():
    """Against the integral over the posterior on a grid."""
    weights, means, variances = [0.7, 0.3], [[0.0], [2.0]], np.array([0.5, 1.5])
    classes = GalaxyClassifier.from_mixture(weights, means, variances[:, None, None])
    for centre, std in [(0.3, 0.2), (1.0, 1.0), (1.5, 3.0)]:
        grid = np.linspace(centre - 8 * std, centre + 8 * std, 20001)
        joint = np.array(weights) * stats.norm.pdf(
            grid[:, None], np.ravel(means), np.sqrt(variances)
        )
        share = joint / joint.sum(1, keepdims=True)
        wanted = np.average(share, axis=0, weights=stats.norm.pdf(grid, centre, std))
        latents = Latents([[centre]], [[[std**2]]])
        assert np.allclose(classes.predict_proba(latents)[0], wanted, atol=0.02)


def test_a_galaxy_does_not_depend_on_its_neighbours(stamps):
    classifier = GalaxyClassifier.from_pretrained()
    together = classifier.predict_proba(stamps, uncertainty=1.0)
    alone = np.concatenate(
        [classifier.predict_proba(stamps[i : i + 1], uncertainty=1.0) for i in range(10)]
    )
    assert np.allclose(together[:10], alone, atol=1e-9)
    assert np.allclose(together.sum(1), 1)
    small = classifier.predict_proba(stamps, uncertainty=1.0, batch_size=7)
    assert np.allclose(together, small, atol=1e-9)


def test_turns_mirrors_and_brightness_do_not_matter(stamps):
    classifier = GalaxyClassifier.from_pretrained()
    proba = classifier.predict_proba(stamps, uncertainty=1.0)
    others = {
        "turned": np.rot90(stamps, axes=(1, 2)),
        "upside down": stamps[:, ::-1],
        "mirrored": stamps[:, :, ::-1],
        "in other units": 1e-30 * stamps,
    }
    for name, images in others.items():
        sigma = 1e-30 if name == "in other units" else 1.0
        other = classifier.predict_proba(np.ascontiguousarray(images), uncertainty=sigma)
        assert np.abs(other - proba).max() < 1e-3, name


def test_the_shipped_classes_are_of_leading_latents(stamps):
    classifier = GalaxyClassifier.from_pretrained()
    latents = measure_latents(stamps, uncertainty=1.0)
    used = classifier.n_latents
    assert classifier.means_.shape[1] == used < latents.mean.shape[1]
    proba = classifier.predict_proba(latents)
    assert np.array_equal(proba, classifier.predict_proba(latents.leading(used)))
    latents.mean[:, used:] += 10
    assert np.array_equal(proba, classifier.predict_proba(latents))


def test_what_images_do_not_tell_is_uncertain(stamps):
    """Images tell the first latents best; noise takes from all."""
    rng = np.random.default_rng(8)

    clean = measure_latents(stamps, uncertainty=1.0)
    noisy = measure_latents(stamps + rng.normal(0, 5, stamps.shape), uncertainty=np.sqrt(26))
    assert clean.variance[:, :8].mean() < 0.5 * clean.variance[:, 32:].mean()
    assert np.median(noisy.variance / clean.variance) > 1.1
    rest = np.abs(noisy.mean - clean.mean) / np.sqrt(noisy.variance + clean.variance)
    assert (rest < 3).mean() > 0.95


def test_bad_stamps_are_flagged_and_the_others_done(stamps):
    some = stamps[:6].copy()
    some[1] = np.nan
    some[3] = 0.0
    latents = measure_latents(some, uncertainty=1.0)
    assert latents.flags[1] & FitFlag.NO_DATA
    assert not latents.good[1]
    clean = measure_latents(stamps[:6], uncertainty=1.0)
    for i in (0, 2, 4, 5):
        assert np.allclose(latents.mean[i], clean.mean[i], atol=1e-5)
    classifier = GalaxyClassifier.from_pretrained()
    assert classifier.predict(latents)[1] == -1
    assert np.isnan(classifier.predict_proba(latents)[1]).all()
    assert np.isnan(classifier.outlier_probability(latents)[1])


def test_masked_pixels_hardly_matter(stamps):
    some, mask = stamps[:20].copy(), np.zeros((20, 64, 64), bool)
    some[:, 5:13, 5:13] = 1e4
    mask[:, 5:13, 5:13] = True
    seen = measure_latents(some, uncertainty=1.0, mask=mask)
    clean = measure_latents(stamps[:20], uncertainty=1.0)
    moved = np.abs(seen.mean - clean.mean)
    assert moved[:, :8].max() < 0.5  # of the scatter of galaxies
    assert np.sqrt(np.mean(moved**2 / clean.variance)) < 0.5


def test_of_a_fit_and_of_its_images(stamps):
    result = fit_images(stamps[:4], SersicGalaxy2D(), MAPFitter(), uncertainty=1.0)
    assert np.allclose(
        measure_latents(result).mean, measure_latents(stamps[:4], uncertainty=1.0).mean
    )
    with pytest.raises(ValueError, match="knows its pixels"):
        measure_latents(result, uncertainty=1.0)
    with pytest.raises(ValueError, match="has no latents"):
        measure_latents(result, encoder="fit")


def test_variances_are_diagonal_covariances():
    rng = np.random.default_rng(3)
    mean, variance = rng.normal(0, 3, (50, 3)), rng.uniform(0.1, 4, (50, 3))
    short, full = Latents(mean, variance), Latents(mean, variance[:, :, None] * np.eye(3))
    assert np.array_equal(short.variance, full.variance)
    assert np.allclose(short[3:9].leading(2).cov, full[3:9].leading(2).variance)
    drawn = short.sample(4000, rng=1)
    assert np.allclose(drawn.mean(1), mean, atol=0.15)
    assert np.allclose(drawn.var(1), variance, rtol=0.15)
    classes = GalaxyClassifier(2, rng=1).fit(short)
    assert np.allclose(classes.predict_proba(short), classes.predict_proba(full), atol=0.05)
    with pytest.raises(ValueError, match="cov"):
        Latents(mean, variance[:, :2])


def test_latents_of_any_network(stamps):
    vae = GalaxyVAE.from_pretrained("beta_vae")
    latents = measure_latents(stamps[:5], encoder=vae, uncertainty=1.0)
    mean, std = vae.latents(stamps[:5])
    assert np.allclose(latents.mean, mean, atol=1e-5)
    assert np.allclose(np.sqrt(latents.variance), std, rtol=1e-4)
    classes = GalaxyClassifier(2, encoder=vae, calibration=0.0, rng=1)
    told = classes.fit(stamps[:5], uncertainty=1.0).predict(stamps[:5], uncertainty=1.0)
    assert set(told) <= {0, 1}
    with pytest.raises(ValueError, match="takes images of the shape"):
        measure_latents(stamps[:1, 1:], encoder=vae, uncertainty=1.0)


def test_latents_of_a_fit(stamps):
    result = fit_images(
        stamps[:3], LearnedGalaxy2D.from_pretrained(), EncoderFitter(), uncertainty=1.0
    )
    latents = measure_latents(result, encoder="fit")
    assert np.array_equal(latents.mean, result.params[:, 5:])
    assert np.array_equal(latents.cov, result.cov[:, 5:, 5:])


def test_outliers_have_calibrated_probabilities():
    rng = np.random.default_rng(3)
    points, _ = blobs(rng, 2000)
    fit = GalaxyClassifier(3, rng=1).fit(exact(points))
    fresh, _ = blobs(rng, 1000)
    p = fit.outlier_probability(exact(fresh))
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert fit.outlier_probability(np.array([[30.0, 30.0]]))[0] < 0.01


def test_files(tmp_path):
    points, _ = blobs(np.random.default_rng(2))
    fit = GalaxyClassifier(3, rng=1).fit(exact(points))
    fit.class_names = ["a", "b", "c"]
    fit.write(tmp_path / "mine.classes")
    again = GalaxyClassifier.read(tmp_path / "mine.classes")
    assert again.class_names == ["a", "b", "c"]
    assert np.allclose(again.predict_proba(points), fit.predict_proba(points))
    assert np.allclose(again.outlier_probability(points), fit.outlier_probability(points))
    with pytest.raises(ValueError, match="holds no morphology"):
        Morphology.read(tmp_path / "mine.classes")
    (tmp_path / "cut").write_bytes((tmp_path / "mine.classes").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        GalaxyClassifier.read(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        GalaxyClassifier.read(tmp_path / "none")


def test_leading_latents_make_the_classes(tmp_path):
    rng = np.random.default_rng(6)
    points, _ = blobs(rng)
    more = np.concatenate([points, 50 * rng.normal(size=(300, 3))], 1)
    cov = np.tile(np.diag([0.3, 0.3, 9.0, 9.0, 9.0]), (300, 1, 1))
    latents = Latents(more, cov)
    assert np.array_equal(latents.leading(2).cov, cov[:, :2, :2])
    few = GalaxyClassifier(3, rng=1).fit(latents.leading(2))
    fit = GalaxyClassifier(3, n_latents=2, rng=1).fit(latents)
    fit.write(tmp_path / "mine.classes")
    again = GalaxyClassifier.read(tmp_path / "mine.classes")
    assert again.n_latents == 2
    for what in ("predict", "predict_proba", "score_samples", "outlier_probability"):
        wanted = getattr(few, what)(latents.leading(2))
        assert np.array_equal(getattr(fit, what)(latents), wanted), what
        assert np.array_equal(getattr(again, what)(latents), wanted), what
    arrays, header = read_arrays(tmp_path / "mine.classes", kind="classes")
    del header["n_latents"]  # as in files of the first version
    write_arrays(tmp_path / "old.classes", arrays, kind="classes", header=header)
    old = GalaxyClassifier.read(tmp_path / "old.classes")
    assert np.array_equal(old.predict(latents.leading(2)), few.predict(latents.leading(2)))
    with pytest.raises(ValueError, match="classes are of 2 latents, not 5"):
        old.predict(latents)
    table = choose_n_components(more, [3], n_latents=2, rng=1, n_resamplings=2)
    assert table["stability"][0] > 0.95


def test_repeats_exactly_and_the_number_is_found():
    points, _ = blobs(np.random.default_rng(2))
    one, two = (GalaxyClassifier(4, rng=7).fit(exact(points)) for _ in range(2))
    assert np.array_equal(one.means_, two.means_)
    table = choose_n_components(points, range(2, 5), rng=1, n_resamplings=3)
    assert table["n_components"][np.argmin(table["bic"])] == 3
    assert table["stability"][1] > 0.95
    drawn, classes = one.sample(50, classes=2, rng=1)
    assert drawn.shape == (50, 2)
    assert set(classes) == {2}


def test_nearest():
    rng = np.random.default_rng(4)
    points = rng.normal(size=(50, 3)) * [1, 10, 100]
    latents = exact(points)
    index, distance = nearest(latents[[3, 7]], latents, n=4)
    scaled = points / points.std(0)
    for row, i in enumerate((3, 7)):
        far = np.linalg.norm(scaled - scaled[i], axis=1)
        assert index[row].tolist() == np.argsort(far)[:4].tolist()
        assert np.allclose(distance[row], np.sort(far)[:4])
    few, far = nearest(latents[:1], latents[:2], n=3)
    assert few[0, 2] == -1
    assert np.isinf(far[0, 2])


def test_latents_without_information_do_not_rule_what_is_nearest():
    """Galaxies seen twice, with latents N(0, 1) and posteriors as Bayes has them."""
    rng = np.random.default_rng(9)
    sigma = np.array([0.1, 0.1, 0.2, 0.2] + 20 * [5.0])
    truth = rng.normal(size=(400, len(sigma)))
    shrink = 1 / (1 + sigma**2)
    cov = np.tile(sigma**2 * shrink, (400, 1))
    one, two = (Latents(shrink * rng.normal(truth, sigma), cov) for _ in range(2))
    index, distance = nearest(two, one, n=2)
    # scaled by the scatter of the means, noise would rule
    ruled, _ = nearest(exact(two.mean), exact(one.mean), n=1)
    itself = (index[:, 0] == np.arange(400)).mean()
    assert itself > 3 * (ruled[:, 0] == np.arange(400)).mean()

    def apart(found):  # what the distance stands for
        return np.square(truth - truth[found[:, 0]]).sum(1).mean()

    assert apart(index) < 0.8 * apart(ruled)
    width = np.sqrt(one.mean.var(0) + cov[0])
    far = np.linalg.norm((two.mean[0] - one.mean[index[0, 0]]) / width)
    assert distance[0, 0] == pytest.approx(far)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_components": 0}, "at least 1"),
        ({"n_components": 2.5}, "integer"),
        ({"covariance_type": "round"}, "covariance_type"),
        ({"calibration": 1.0}, "calibration"),
        ({"n_latents": 3}, "there are 2 latents, not 3"),
        ({"n_latents": 0}, "there are 2 latents, not 0"),
        ({"n_latents": 1.5}, "n_latents must be an integer"),
        ({"n_components": 400}, "at least 800 galaxies"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        GalaxyClassifier(**options).fit(blobs(np.random.default_rng(0))[0])


def test_more_errors(stamps):
    with pytest.raises(ValueError, match="was not fitted"):
        GalaxyClassifier().predict(stamps)
    with pytest.raises(ValueError, match="no parameter"):
        GalaxyClassifier().set_params(classes=3)
    with pytest.raises(TypeError, match="posterior or encode"):
        measure_latents(stamps[:1], encoder=3.0)
    with pytest.raises(ValueError, match="of 2 latents"):
        GalaxyClassifier.from_mixture([1], [[0, 0]], [np.eye(2)]).predict(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="there are 4 latents, not 5"):
        GalaxyClassifier.from_pretrained().set_params(n_latents=5).predict(np.zeros((3, 4)))
