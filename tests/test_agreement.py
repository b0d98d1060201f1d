"""Classes against labels, each other and other quantities: closed forms and known distributions."""

import subprocess
import sys

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, QTable, Table
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from galmorph.agreement import (
    agreement,
    class_profiles,
    cluster_quality,
    completeness_by_votes,
    linear_probe,
    mutual_information,
    overlap_matrix,
)


@pytest.fixture
def _one_thread():
    """scikit-learn's threads wait for each other on a busy machine."""
    import threadpoolctl  # of scikit-learn

    with threadpoolctl.threadpool_limits(1):
        yield


class TestAgreement:
    def test_perfect_under_other_names(self):
        labels = np.array(["E", "S0", "S", "S", "E", "S0", "S"])
        classes = np.select([labels == "E", labels == "S"], [7, 2], 4)
        found = agreement(classes, labels)
        assert_allclose([found.ari, found.nmi, found.ami], 1)
        assert_allclose([*found.purity, *found.completeness], 1)
        assert (found.overall_purity, found.overall_completeness) == (1, 1)
        assert found.class_names == ("2", "4", "7")
        assert_array_equal(found.majority_label, ["S", "S0", "E"])

    def test_unrelated(self, rng):
        found = agreement(rng.integers(0, 4, 5000), rng.integers(0, 3, 5000))
        assert abs(found.ari) < 0.005
        assert abs(found.ami) < 0.005
        assert 0 < found.nmi < 0.005  # chance is not taken out

    def test_by_hand(self):
        classes = [0] * 10 + [1] * 5 + [2] * 5
        labels = ["E"] * 8 + ["S"] * 2 + ["S"] * 5 + ["S"] * 3 + ["E"] * 2
        found = agreement(classes, labels)
        assert_array_equal(found.confusion, [[8, 2], [0, 5], [2, 3]])
        assert_allclose(found.purity, [0.8, 1, 0.6])
        assert_allclose(found.completeness, [0.8, 0.5, 0.3])
        assert found.overall_purity == (8 + 5 + 3) / 20
        assert found.overall_completeness == (8 + 5) / 20
        # Hubert & Arabie (1985), pairs counted by hand
        together = 28 + 1 + 10 + 1 + 3
        ours, theirs, all_pairs = 45 + 10 + 10, 45 + 45, 190
        chance = ours * theirs / all_pairs
        assert_allclose(found.ari, (together - chance) / ((ours + theirs) / 2 - chance))
        p = found.confusion / 20
        outer = p.sum(1, keepdims=True) * p.sum(0)
        information = sum(a * np.log(a / b) for a, b in zip(p.flat, outer.flat, strict=True) if a)
        entropies = [-np.sum(q * np.log(q)) for q in (p.sum(0), p.sum(1))]
        assert_allclose(found.nmi, 2 * information / sum(entropies))

    def test_table(self):
        found = agreement([0, 0, 1], ["E", "S", "S"], class_names=["a", "b", "c"])
        table = found.to_table()
        assert table.colnames == [
            "class", "n", "majority_label", "purity", "completeness", "n_E", "n_S",
        ]  # fmt: skip
        assert list(table["n"]) == [2, 1, 0]
        assert list(table["majority_label"]) == ["E", "S", ""]
        assert_allclose(table["purity"], [0.5, 1, np.nan])
        assert_allclose(table["completeness"], [1, 0.5, np.nan])
        assert table.meta["purity"] == found.overall_purity
        assert table.meta["n_used"] == 3

    @pytest.mark.parametrize(
        "labels",
        [
            np.ma.masked_array([1, 0, 5, 1], [0, 0, 1, 0]),
            MaskedColumn([b"S", b"E", b"?", b"S"], mask=[0, 0, 1, 0]),
            np.array([1, 0, np.nan, 1]),
            np.array([1, 0, -1, 1]),
            [1, 0, None, 1],
            ["S", "E", None, "S"],
            ["S", "E", " ", "S"],
            np.array(["S", "E", np.nan, "S"], dtype=object),
            np.array([True, False, None, True]),
        ],
    )
    def test_unknown_labels_are_left_out_and_counted(self, labels):
        found = agreement(["x", "y", "y", "x"], labels)
        assert (found.n_used, found.n_left_out) == (3, 1)
        assert_array_equal(found.confusion, [[0, 2], [1, 0]])
        turned = agreement(labels, ["x", "y", "y", "x"])  # classes may be unknown as well
        assert_array_equal(turned.confusion, found.confusion.T)

    def test_order_of_names(self):
        types = ["E", "S0", "early S"]
        found = agreement([1, 0, 0], ["early S", "E", "E"], label_names=types)
        assert found.label_names == tuple(types)
        assert_array_equal(found.confusion, [[2, 0, 0], [0, 0, 1]])
        by_number = agreement([1, 0, 0], [2, 0, 0], label_names=types)
        assert_array_equal(by_number.confusion, found.confusion)
        assert agreement([0, 1], [True, False]).label_names == ("False", "True")

    def test_probabilities(self):
        classes, labels = np.array([0, 0, 1, 1]), ["E", "S", "S", "S"]
        certain = agreement(classes, labels, proba=np.eye(2)[classes])
        assert_allclose(certain.confusion, agreement(classes, labels).confusion)
        proba = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [np.nan, np.nan]]
        soft = agreement(classes, labels, proba=proba, class_names=["a", "b"])
        assert_allclose(soft.confusion, [[0.9, 0.8], [0.1, 1.2]])
        assert_allclose(soft.purity, [0.9 / 1.7, 1.2 / 1.3])
        assert soft.n_left_out == 1

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (([0, 1], ["E"]), "lengths differ"),
            (([0, 1], [0.5, 1]), "whole numbers"),
            (([0, 1], [None, -1]), "no galaxy"),
            (([[0, 1]], ["E", "S"]), "shape"),
            (([0, 1], np.array(["E", 3], dtype=object)), "all names or all numbers"),
            (([0, 1], [1j, 2]), "whole numbers"),
        ],
    )
    def test_rejects(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            agreement(*arguments)

    def test_rejects_names(self):
        with pytest.raises(ValueError, match=r"labels \['S'\] are not among"):
            agreement([0, 1], ["E", "S"], label_names=["E"])
        with pytest.raises(ValueError, match="classes go up to 2"):
            agreement([0, 2], ["E", "S"], class_names=["a", "b"])
        with pytest.raises(ValueError, match="class_names for 2"):
            agreement([0, 1], ["E", "S"], proba=np.eye(2), class_names=["a"])
        with pytest.raises(ValueError, match="negative"):
            agreement([0, 1], ["E", "S"], proba=-np.eye(2))


@pytest.mark.usefixtures("_one_thread")
class TestClusterQuality:
    def test_by_hand(self):
        latents = np.array([0.0, 1, 2, 10, 11, 12, np.nan])[:, None]
        table = cluster_quality(latents, ["a"] * 3 + ["b"] * 4)
        assert list(table["method"]) == ["classes", "k-means", "mixture"]
        silhouette = (3 - 1.5 / 11 - 1 / 10 - 1.5 / 9) / 3
        assert_allclose(table["silhouette"], silhouette)
        assert_allclose(table["calinski_harabasz"], (6 * 25 / 1) / (4 / 4))
        assert (table.meta["n_used"], table.meta["n_left_out"]) == (6, 1)

    def test_random_classes_are_worse(self, rng):
        latents = rng.normal(0, 1, (300, 3)) + 6 * rng.integers(0, 3, 300)[:, None]
        table = cluster_quality(latents, rng.integers(0, 3, 300), rng=1)
        assert table["silhouette"][0] < 0.05
        assert table["silhouette"][1:].min() > 0.6
        again = cluster_quality(latents, rng.integers(0, 3, 300), rng=1)
        assert_array_equal(table["silhouette"][1:], again["silhouette"][1:])

    def test_many_galaxies(self, rng):
        classes = rng.integers(0, 2, 5200)
        table = cluster_quality(5.0 * classes[:, None] + rng.normal(0, 1, (5200, 1)), classes)
        assert table.meta["n_silhouette"] == 5000
        assert_allclose(table["silhouette"], table["silhouette"][0], atol=0.02)

    def test_rejects(self):
        with pytest.raises(ValueError, match="1 classes"):
            cluster_quality(np.zeros((9, 2)), np.zeros(9, int))
        with pytest.raises(ValueError, match="lengths differ"):
            cluster_quality(np.zeros((9, 2)), np.zeros(8, int))
        with pytest.raises(ValueError, match="latents must have shape"):
            cluster_quality(np.zeros(9), np.zeros(9, int))


class TestOverlap:
    DRAWS = 40_000

    def check(self, found, expected):
        expected = np.asarray(expected)
        error = np.sqrt(expected * (1 - expected) / self.DRAWS)
        assert np.all(np.abs(found - expected) < 4 * error + 1e-12)
        assert_allclose(found.sum(axis=1), 1)

    def test_two_normals(self):
        """Of weights w the border is at the middle + s² ln(w_0 / w_1) / distance."""
        for w, distance, s in ((0.5, 2.0, 1.0), (0.8, 3.0, 1.7)):
            border = distance / 2 + s**2 * np.log(w / (1 - w)) / distance
            p, q = norm.cdf(border / s), norm.cdf((border - distance) / s)
            found = overlap_matrix(
                [w, 1 - w], [[0.0], [distance]], [[[s**2]]] * 2, draws=self.DRAWS, rng=2
            )
            self.check(found, [[p, 1 - p], [q, 1 - q]])

    def test_one_inside_the_other(self):
        """Normals of one centre, σ 1 and 3: the borders are where the densities are equal."""
        border = np.sqrt(2 * np.log(3) / (1 - 1 / 9))
        p, q = (2 * norm.cdf(border / s) - 1 for s in (1, 3))
        found = overlap_matrix([2, 2], [[5.0]] * 2, [[[1.0]], [[9.0]]], draws=self.DRAWS, rng=3)
        self.check(found, [[p, 1 - p], [q, 1 - q]])

    def test_correlated_latents(self, rng):
        """Of equal covariances only the Mahalanobis distance counts."""
        root = rng.normal(0, 1, (4, 4))
        mean = rng.normal(0, 1, 4)
        distance = np.linalg.norm(np.linalg.solve(root, mean))
        p = norm.cdf(distance / 2)
        found = overlap_matrix(
            [1, 1], [np.zeros(4), mean], [root @ root.T] * 2, draws=self.DRAWS, rng=4
        )
        self.check(found, [[p, 1 - p], [1 - p, p]])

    def test_empty_class_gets_nothing(self):
        found = overlap_matrix([1, 0], [[0.0], [0.1]], [[[1.0]], [[1.0]]], draws=50)
        assert_array_equal(found, [[1, 0], [1, 0]])

    def test_repeats(self):
        args = [0.5, 0.5], [[0.0], [1.0]], [[[1.0]], [[1.0]]]
        first, second, other = (overlap_matrix(*args, draws=500, rng=r) for r in (1, 1, 2))
        assert_array_equal(first, second)
        assert not np.array_equal(first, other)

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"weights": [1]}, "fit together"),
            ({"weights": [1, -1]}, "weights"),
            ({"covariances": [[[1.0]], [[-1.0]]]}, "positive definite"),
            ({"draws": 0}, "draws"),
        ],
    )
    def test_rejects(self, changed, match):
        good = {"weights": [1, 1], "means": [[0.0], [1.0]], "covariances": [[[1.0]], [[1.0]]]}
        with pytest.raises(ValueError, match=match):
            overlap_matrix(**good | changed)


class TestClassProfiles:
    def test_certain_classes_are_plain_percentiles(self, rng):
        classes = rng.integers(0, 3, 301)
        radius = rng.lognormal(1, 0.5, 301)
        table = class_profiles(np.eye(3)[classes], {"r": radius * u.arcsec})
        for k in range(3):
            member = radius[classes == k]
            assert_allclose(table["r"][k].to_value(u.arcsec), np.median(member))
            expected = np.percentile(member, [16, 84], method="hazen")
            found = [table[f"r_p{p}"][k].to_value(u.arcsec) for p in (16, 84)]
            assert_allclose(found, expected)
        assert_allclose(table["fraction"], np.bincount(classes) / 301)
        assert_allclose(table["n_effective"], np.bincount(classes))

    def test_weights(self, rng):
        """Uniform numbers of weight x have the cumulative distribution x²."""
        x = rng.uniform(0, 1, 20000)
        table = class_profiles(np.column_stack([x, 1 - x]), {"x": x})
        found = [table[name][0] for name in ("x_p16", "x", "x_p84")]
        assert_allclose(found, np.sqrt([0.16, 0.5, 0.84]), atol=0.015)
        assert_allclose(table["n_effective"], [15000, 15000], rtol=0.02)  # N (1/2)² / (1/3)

    def test_bad_values(self):
        proba = [[1, 0], [1, 0], [1, 0], [np.nan, np.nan], [1, 0]]
        columns = {
            "nan": [1, np.nan, 3, 99, np.nan],
            "masked": np.ma.masked_array([1, 2, 3, 99, 50], [0, 0, 0, 0, 1]),
        }
        table = class_profiles(proba, columns, class_names=["a", "b"])
        assert table["nan"][0] == 2
        assert table["masked"][0] == 2
        assert np.isnan(table["nan"][1])  # a class without galaxies
        assert (table["fraction"][1], table["n_effective"][0]) == (0, 4)
        assert (table.meta["n_used"], table.meta["n_left_out"]) == (4, 1)

    def test_columns_of_a_table(self):
        table = QTable()
        table["id"] = ["a", "b"]
        table["center"] = SkyCoord([1, 2], [3, 4], unit="deg")
        table["r"] = [2.0, 2.0] * u.kpc
        table["mag"] = u.Magnitude([20.0, 20.0], u.ABmag)
        table["cov"] = np.zeros((2, 3, 3))
        table["n"] = MaskedColumn([4.0, 1.0], mask=[False, True])
        found = class_profiles([[1.0], [1.0]], table)
        assert [name for name in found.colnames if name.endswith("_p16")] == [
            "r_p16", "mag_p16", "n_p16",
        ]  # fmt: skip
        assert found["r"][0] == 2 * u.kpc
        assert found["mag"][0] == 20 * u.ABmag
        assert found["n"][0] == 4
        old = Table({"r": table["r"]})
        old["r"].unit = u.kpc
        assert class_profiles([[1.0], [1.0]], old)["r"].unit == u.kpc

    def test_rejects(self):
        with pytest.raises(ValueError, match="lengths differ: proba of 2, n of 3"):
            class_profiles([[1.0], [1.0]], {"n": [1, 2, 3]})
        with pytest.raises(ValueError, match="none of the columns"):
            class_profiles([[1.0], [1.0]], {"id": ["a", "b"]})
        with pytest.raises(ValueError, match="2 class_names for 1"):
            class_profiles([[1.0]], {"n": [1]}, class_names=["a", "b"])
        with pytest.raises(ValueError, match="no galaxy"):
            class_profiles([[np.nan]], {"n": [1]})


class TestVotes:
    def test_by_hand(self):
        votes = [0, 0.24, 0.25, 0.9, 1, 1, np.nan, 0.1]
        proba = [0.1, 0.6, 0.7, 0.9, 0.6, 0.5, 0.9, np.nan]
        table = completeness_by_votes(proba, votes, 4)
        assert_allclose(table["votes_low"], [0, 0.25, 0.5, 0.75])
        assert list(table["n"]) == [2, 1, 0, 3]
        assert_allclose(table["fraction"], [0.5, 1, np.nan, 2 / 3])
        assert_allclose(table["mean_proba"], [0.35, 0.7, np.nan, 2 / 3])
        assert (table.meta["n_used"], table.meta["n_left_out"]) == (6, 2)
        # Wilson (1927) for one standard deviation
        p, n = 2 / 3, 3
        middle, half = (p + 0.5 / n) / (1 + 1 / n), np.sqrt(p / 3 / n + 0.25 / n**2) / (1 + 1 / n)
        assert_allclose(table["fraction_low"][3], middle - half, rtol=1e-3)
        assert_allclose(table["fraction_high"][3], middle + half, rtol=1e-3)
        assert np.isnan(table["fraction_low"][2])

    def test_given_edges_and_threshold(self):
        table = completeness_by_votes([0.4, 0.2, 0.9], [0.5, 0.6, 0.1], [0.4, 0.6], threshold=0.3)
        assert (table["n"][0], table["fraction"][0]) == (2, 0.5)
        assert table.meta["n_left_out"] == 1

    def test_classes_given_outright(self):
        table = completeness_by_votes(np.array([True, False]), [0.9, 0.8], bins=1)
        assert table["fraction"][0] == 0.5

    def test_intervals_hold_the_truth(self, rng):
        votes = rng.uniform(0, 1, 20000)
        table = completeness_by_votes(rng.random(20000) < 0.3, votes, bins=100)
        inside = (table["fraction_low"] < 0.3) & (table["fraction_high"] > 0.3)
        assert abs(inside.mean() - 0.683) < 0.15

    def test_rejects(self):
        with pytest.raises(ValueError, match="from 0 to 1"):
            completeness_by_votes([0.5], [55])
        for bins in (0, [0.5], [0, 0.5, 0.5]):
            with pytest.raises(ValueError, match="bins"):
                completeness_by_votes([0.5], [0.5], bins)
        with pytest.raises(ValueError, match="lengths differ"):
            completeness_by_votes([0.5], [0.5, 0.6])


@pytest.mark.usefixtures("_one_thread")
class TestLinearProbe:
    def test_two_normals(self, rng):
        """The area under the curve of normals a distance d apart is Phi(d / sqrt 2)."""
        spiral = rng.random(4000) < 0.4
        latents = rng.normal(0, 1, (4000, 3)) * [1, 100, 1e-3]
        latents[:, 2] += 1.5e-3 * spiral
        probe = linear_probe(latents, spiral)
        assert probe.measure == "auc"
        assert abs(probe.score - norm.cdf(1.5 / np.sqrt(2))) < 0.02
        assert 0 < probe.score_err < 0.02
        assert np.isnan(probe.rms)

    def test_separable(self, rng):
        labels = np.repeat(["E", "S", "Irr"], 40)
        latents = rng.normal(0, 0.1, (120, 2)) + np.repeat([[0, 0], [3, 0], [0, 3]], 40, axis=0)
        probe = linear_probe(latents, labels)
        assert (probe.measure, probe.score, probe.score_err) == ("accuracy", 1, 0)
        assert_array_equal(np.array(probe.label_names)[probe.predictions.astype(int)], labels)
        assert linear_probe(latents, labels == "E").score == 1

    def test_unrelated_is_chance_even_where_a_fit_is_perfect(self, rng):
        """With half as many latents as galaxies any labels can be fitted, but not foretold."""
        probe = linear_probe(rng.normal(0, 1, (400, 200)), np.arange(400) % 2)
        assert abs(probe.score - 0.5) < 0.1

    def test_numbers(self, rng):
        latents = rng.normal(0, 1, (3000, 5))
        hubble_type = -2 + 4 * latents[:, 3] + rng.normal(0, 1, 3000)
        hubble_type[7], latents[9, 0] = np.nan, np.nan
        probe = linear_probe(latents, hubble_type, tolerance=1.5)
        assert probe.measure == "within"
        assert abs(probe.score - (2 * norm.cdf(1.5) - 1)) < 0.03
        assert_allclose(probe.rms, 1, rtol=0.06)
        assert (probe.n_used, probe.n_left_out) == (2998, 2)  # negative types are used
        assert_array_equal(np.flatnonzero(np.isnan(probe.predictions)), [7, 9])
        assert "within=" in repr(probe)

    def test_unknown_labels(self, rng):
        labels = np.tile([0, 1, -1], 30)
        probe = linear_probe(rng.normal(0, 1, (90, 2)), labels)
        assert (probe.measure, probe.n_left_out) == ("auc", 30)
        assert_array_equal(np.isnan(probe.predictions), labels < 0)

    def test_repeats(self, rng):
        latents, labels = rng.normal(0, 1, (60, 2)), np.arange(60) % 2
        first, second, other = (linear_probe(latents, labels, rng=r).score for r in (1, 1, 2))
        assert first == second != other

    def test_rejects(self):
        latents = np.arange(40.0).reshape(20, 2)
        with pytest.raises(ValueError, match="two kinds"):
            linear_probe(latents, np.zeros(20, int))
        with pytest.raises(ValueError, match="3 galaxies only, fewer than 5 folds"):
            linear_probe(latents, np.arange(20) < 3)
        with pytest.raises(ValueError, match="whole numbers"):
            linear_probe(latents, np.linspace(0, 1, 20))
        with pytest.raises(ValueError, match="tolerance"):
            linear_probe(latents, np.arange(20), tolerance=0)
        with pytest.raises(ValueError, match="folds"):
            linear_probe(latents, np.arange(20) % 2, folds=1)
        with pytest.raises(ValueError, match="too few"):
            linear_probe(latents[:5], np.arange(5), tolerance=1)
        with pytest.raises(ValueError, match="must be numbers"):
            linear_probe(latents, ["E"] * 20, tolerance=1)


class TestMutualInformation:
    def test_no_bias_of_few_galaxies(self, rng):
        """Eight classes of 300 galaxies have 0.13 nats by chance, which are taken out."""
        values, errors = np.transpose(
            [
                mutual_information(
                    rng.integers(0, 8, 300), rng.uniform(0, np.pi, 300), shuffles=100, rng=rng
                )
                for _ in range(30)
            ]
        )
        assert abs(values.mean()) < 4 * errors.mean() / np.sqrt(30)
        assert 0.6 < values.std(ddof=1) / errors.mean() < 1.5

    def test_known_dependence(self, rng):
        """Two classes, one of which is preferred along the x axis, by the integral over bins."""
        n, a = 40_000, 0.5
        angle = rng.uniform(0, np.pi, n)
        classes = rng.random(n) < 0.5 * (1 + a * np.cos(2 * angle))
        edges = np.linspace(0, np.pi, 13)
        p = 0.5 * (1 + a * np.diff(np.sin(2 * edges)) / 2 / np.diff(edges))
        terms = np.array([2 * p, 2 * (1 - p)])
        expected = np.mean(0.5 * terms * np.log(terms)) * 2
        spread = np.sqrt((np.mean(0.5 * terms * np.log(terms) ** 2) * 2 - expected**2) / n)
        value, err = mutual_information(classes, angle)
        assert abs(value - expected) < 4 * spread
        assert value > 20 * err

    def test_angle_is_circular_and_has_units(self, rng):
        classes, angle = rng.integers(0, 3, 500), rng.uniform(0, np.pi, 500)
        value = mutual_information(classes, angle, rng=1)
        turned = angle + np.pi * rng.integers(-3, 4, 500)
        assert_allclose(mutual_information(classes, turned, rng=1), value)
        for degrees in (np.degrees(angle) * u.deg, Table({"pa": np.degrees(angle) * u.deg})["pa"]):
            found = mutual_information(classes, degrees, period=180 * u.deg, rng=1)
            assert_allclose(found, value)
        assert mutual_information(classes, angle, rng=2) != value
        # the direction is in the second half turn only
        direction = angle + np.pi * (classes == 2)
        axis, _ = mutual_information(classes == 2, direction, rng=1)
        whole, _ = mutual_information(classes == 2, direction, period=2 * np.pi, rng=1)
        assert axis < 0.05 < 0.5 < whole

    def test_left_out(self, rng):
        angle = rng.uniform(0, np.pi, 300)
        classes = rng.integers(0, 3, 300)
        some = np.arange(300) % 5 > 0
        expected = mutual_information(classes[some], angle[some], rng=1)
        unknown = mutual_information(np.where(some, classes, -1), angle, rng=1)
        assert unknown == expected
        assert mutual_information(classes, np.where(some, angle, np.nan), rng=1) == expected

    def test_rejects(self):
        with pytest.raises(ValueError, match="no galaxy"):
            mutual_information([0, 1], [np.nan, np.nan])
        with pytest.raises(ValueError, match="period"):
            mutual_information([0, 1], [0, 1], period=0)
        with pytest.raises(ValueError, match="bins"):
            mutual_information([0, 1], [0, 1], bins=1)
        with pytest.raises(u.UnitsError):
            mutual_information([0, 1], [0, 1] * u.kpc)


def test_import_leaves_torch_and_sklearn_alone():
    code = (
        "import sys, galmorph.agreement; "
        "sys.exit(bool({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
