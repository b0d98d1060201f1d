"""Figures of classes: what they show."""

import sys
import types

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
import pytest
from astropy.table import Table
from numpy.testing import assert_allclose, assert_array_equal

from galmorph import plot
from galmorph.agreement import (
    agreement,
    class_profiles,
    completeness_by_votes,
    overlap_matrix,
)


@pytest.fixture(autouse=True)
def _draw_and_close():
    """Draw every figure, for errors that show only then."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def stamps(rng):
    """Twenty stamps whose value says which they are."""
    return np.arange(20.0)[:, None, None] + rng.uniform(0, 0.1, (20, 6, 8))


@pytest.fixture
def proba():
    """Even galaxies are of class 0, the more so the later; one is not known."""
    p = np.linspace(0.6, 0.98, 20)
    p = np.where(np.arange(20) % 2, 1 - p, p)
    p[18] = np.nan
    return np.column_stack([p, 1 - p])


def shown(ax):
    """Which stamps are drawn, from the left to the right."""
    images = sorted(ax.images, key=lambda image: image.get_extent()[0])
    return [int(image.get_array().mean()) for image in images]


def texts(ax):
    return [text.get_text() for text in ax.texts]


class TestSheet:
    def test_most_probable_first(self, stamps, proba):
        axes = plot.class_sheet(stamps, proba, names=["smooth", "disc"], n=3)
        assert [shown(ax) for ax in axes] == [[16, 14, 12], [19, 17, 15]]
        assert texts(axes[0])[0] == "0.92"
        fraction = np.nanmean(proba[:, 0])
        assert texts(axes[0])[-1] == f"smooth\n{100 * fraction:.0f} %\nn = 9"

    def test_random_ones_are_members_and_repeat(self, stamps, proba):
        first, again, other = (
            [shown(ax) for ax in plot.class_sheet(stamps, proba, which="random", n=4, rng=r)]
            for r in (1, 1, 2)
        )
        assert first == again != other
        assert all(i % 2 == k and i != 18 for k, row in enumerate(first) for i in row)
        assert len(set(first[0])) == 4

    def test_order_and_few_members(self, stamps, proba):
        axes = plot.class_sheet(stamps, proba, classes=[1], n=12)
        assert len(axes) == 1
        assert len(axes[0].images) == 10
        empty = np.column_stack([proba, np.zeros(20)])
        axes = plot.class_sheet(stamps, empty)
        assert not axes[2].images
        assert texts(axes[2]) == ["2\n0.0 %\nn = 0"]

    def test_triplets(self, stamps, proba):
        models = stamps - 1
        sigma = np.full(stamps.shape, 0.5)
        sigma[16, 0, 0] = 0
        stamps[16, 1, 1] = np.nan
        (ax, _) = plot.class_sheet(stamps, proba, models=models, uncertainty=sigma, n=2)
        data, model, residual = ax.images[:3]
        assert data.norm is model.norm
        assert_allclose(model.get_array(), models[16])
        assert_allclose(residual.get_array().compressed(), 2)
        assert_array_equal(np.argwhere(residual.get_array().mask), [[0, 0], [1, 1]])
        assert_array_equal(data.get_array().mask, residual.get_array().mask)
        assert residual.get_clim() == (-5, 5)
        tops = [image.get_extent()[3] for image in (data, model, residual)]
        assert tops[0] > tops[1] > tops[2]

    def test_residuals_without_an_uncertainty_are_in_units_of_their_scatter(self, proba, rng):
        models = rng.normal(0, 3, (20, 30, 30))
        images = models + rng.normal(0, 7, models.shape)
        ax = plot.class_sheet(images, proba, models=models, n=1)[0]
        assert 0.9 < ax.images[2].get_array().std() < 1.1

    def test_stamps_of_any_shape_are_read_only_when_drawn(self, proba):
        read = []

        class Stamps:
            def __len__(self):
                return 20

            def __getitem__(self, i):
                read.append(int(i))
                return np.full((4 + i, 9), float(i))

        axes = plot.class_sheet(Stamps(), proba, n=2, uncertainty=1.0)
        assert sorted(read) == [14, 16, 17, 19]
        left, right, bottom, top = axes[0].images[0].get_extent()
        assert_allclose((right - left) / (top - bottom), 9 / 20)

    def test_nothing_but_holes(self, proba):
        images = np.full((20, 5, 5), np.nan)
        plot.class_sheet(images, proba, models=np.ones((20, 5, 5)), n=2)
        plot.class_sheet(images, proba, uncertainty=np.zeros(20), n=2)

    def test_failed_fit(self, stamps, proba):
        models = stamps - 1
        models[16] = np.nan
        ax = plot.class_sheet(stamps, proba, models=models, n=2)[0]
        assert texts(ax)[:3] == ["no fit", "no fit", "0.92"]
        assert len(ax.images) == 1 + 3

    def test_given_axes(self, stamps, proba):
        _, given = plt.subplots(2)
        assert list(plot.class_sheet(stamps, proba, axes=given)) == list(given)

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"proba": np.ones((3, 2))}, "20 images"),
            ({"models": np.ones((3, 6, 8))}, "3 models"),
            ({"models": np.ones((20, 5, 5))}, "a model has shape"),
            ({"names": ["a"]}, "1 names for 2 classes"),
            ({"classes": [2]}, "classes must be some of 0 … 1"),
            ({"which": "best"}, "probable or random"),
            ({"n": 0}, "n must be"),
            ({"residual_limit": 0}, "residual_limit"),
            ({"proba": np.full((20, 2), np.nan)}, "no galaxy"),
            ({"axes": []}, "axes must be 2"),
            ({"images": np.ones((20, 3))}, "not \\(ny, nx\\)"),
        ],
    )
    def test_rejects(self, stamps, proba, changed, match):
        arguments = {"images": stamps, "proba": proba} | changed
        with pytest.raises(ValueError, match=match):
            plot.class_sheet(**arguments)


class TestProfiles:
    def table(self, rng):
        proba = np.eye(2)[rng.integers(0, 2, 200)]
        r = rng.lognormal(0, 0.3, 200) * np.where(proba[:, 0], 1, 100)
        columns = {"r_50": r * u.arcsec, "ellip": rng.uniform(0, 1, 200)}
        return class_profiles(proba, columns, class_names=["small", "large"])

    def test_medians_and_ranges(self, rng):
        table = self.table(rng)
        axes = plot.class_profiles(table)
        assert axes[0].get_xlabel() == "$r_{50}$ [$\\mathrm{{}^{\\prime\\prime}}$]"
        assert [ax.get_xscale() for ax in axes] == ["log", "linear"]
        assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["small", "large"]
        for k, bars in enumerate(axes[1].containers):
            point, _, (segments,) = bars.lines
            assert point.get_xydata().tolist() == [[table["ellip"][k], k]]
            ((start, stop),) = segments.get_segments()
            assert_allclose([start[0], stop[0]], [table[f"ellip_p{p}"][k] for p in (16, 84)])
        low, high = axes[0].get_ylim()
        assert low > high  # the first class on top

    def test_chosen_columns(self, rng):
        _, ax = plt.subplots()
        (drawn,) = plot.class_profiles(self.table(rng), ["ellip"], axes=[ax])
        assert drawn is ax
        with pytest.raises(KeyError, match="no quantity 'n'"):
            plot.class_profiles(self.table(rng), ["n"])
        with pytest.raises(ValueError, match="no quantities"):
            plot.class_profiles(Table({"class": ["a"]}))

    def test_class_without_galaxies(self):
        plot.class_profiles(class_profiles([[1.0, 0], [1, 0]], {"n": [1, 2]}))


def test_overlap():
    matrix = overlap_matrix([1, 1], [[0.0], [9.0]], [[[1.0]]] * 2)
    ax = plot.class_overlap(matrix, names=["a", "b"])
    assert_array_equal(ax.images[0].get_array(), matrix)
    assert texts(ax) == ["1.00", "", "", "1.00"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Class", "Assigned class")
    with pytest.raises(ValueError, match="shape"):
        plot.class_overlap([[1, 0]])
    with pytest.raises(ValueError, match="names"):
        plot.class_overlap(matrix, names=["a"])


def test_confusion():
    found = agreement([0, 0, 0, 1, 1], ["E", "E", "S", "S", "S"], class_names=["a", "b", "c"])
    _, given = plt.subplots()
    ax = plot.confusion(found, ax=given)
    assert ax is given
    assert_allclose(ax.images[0].get_array(), [[2 / 3, 1 / 3], [0, 1], [0, 0]])
    assert texts(ax) == ["2", "1", "0", "2", "0", "0"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["E", "S"]
    assert ax.get_title().startswith("5 galaxies, ARI")


class TestMap:
    def test_classes_and_thumbnails(self, rng):
        """In each cell the galaxy that is nearest to its middle, framed in its class's colour."""
        embedding = np.array([[0, 0], [0.3, 0.3], [2, 2], [1.6, 0.4], [1.9, 0.1]])
        images = np.arange(5)[:, None, None] + rng.uniform(0, 0.1, (5, 4, 4))
        classes = [0, 1, 1, -1, 0]
        ax = plot.latent_map(
            np.zeros((5, 2)), classes, images, names=["E", "S"], thumbnails=2, embedding=embedding
        )
        assert sorted(shown(ax)) == [1, 2, 3]
        points = {c.get_label(): c.get_offsets() for c in ax.collections}
        assert set(points) == {"unknown", "E (2)", "S (2)"}
        assert_allclose(points["E (2)"], [[0, 0], [1.9, 0.1]])
        colors = {c.get_label(): tuple(c.get_facecolor()[0]) for c in ax.collections}
        frames = [tuple(patch.get_edgecolor()) for patch in ax.patches]
        drawn = [int(image.get_array().mean()) for image in ax.images]
        expected = {1: "S (2)", 2: "S (2)", 3: "unknown"}
        assert frames == [colors[expected[i]] for i in drawn]

    def test_many_classes_have_different_colors(self, rng):
        classes = np.arange(60) % 12
        ax = plot.latent_map(rng.normal(0, 1, (60, 2)), classes, embedding=rng.random((60, 2)))
        assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 12
        assert ax.get_xlabel() == "Coordinate 1"

    def test_tsne_is_that_of_latents_tsne(self, monkeypatch, rng):
        calls = []

        def tsne(latents, perplexity, seed):
            calls.append((latents.shape, perplexity, seed))
            return latents[:, :2]

        monkeypatch.setattr("galmorph.plot.classes._tsne", tsne)
        ax = plot.latent_map(rng.normal(0, 1, (9, 3)), ["E"] * 9, perplexity=4, rng=5)
        assert calls == [((9, 3), 4, 5)]
        assert ax.get_xlabel() == "t-SNE 1"

    def test_umap(self, monkeypatch, rng):
        class UMAP:
            def __init__(self, **options):
                self.options = options

            def fit_transform(self, latents):
                assert self.options["n_neighbors"] == len(latents) - 1
                return np.random.default_rng(self.options["random_state"]).random((9, 2))

        monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
        latents = rng.normal(0, 1, (9, 3))
        maps = [plot.latent_map(latents, [0] * 9, method="umap", rng=3) for _ in range(2)]
        assert maps[0].get_ylabel() == "UMAP 2"
        assert_array_equal(*(ax.collections[0].get_offsets() for ax in maps))

    def test_without_umap(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "umap", None)
        with pytest.raises(ImportError, match="pip install umap-learn"):
            plot.latent_map(np.zeros((4, 2)), [0] * 4, method="umap")

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"classes": [0, 1]}, "for 2 classes"),
            ({"images": np.zeros((3, 4, 4))}, "3 images for 4"),
            ({"thumbnails": 0}, "thumbnails"),
            ({"method": "pca"}, "tsne or umap"),
            ({"latents": np.full((4, 2), np.nan)}, "finite"),
            ({"embedding": np.zeros((4, 3))}, "embedding"),
        ],
    )
    def test_rejects(self, changed, match):
        arguments = {"latents": np.zeros((4, 2)), "classes": [0, 0, 1, 1]} | changed
        with pytest.raises(ValueError, match=match):
            plot.latent_map(**arguments)


class TestVotes:
    def test_fractions_and_numbers(self):
        table = completeness_by_votes([1, 0, 1, 1], [0.1, 0.2, 0.9, 0.9], bins=4)
        ax = plot.votes(table, label="ours")
        assert texts(ax) == ["2", "0", "0", "2"]
        point, _, (_, bars) = ax.containers[0].lines
        assert_allclose(point.get_xydata(), [[0.125, 0.5], [0.875, 1]])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        assert_allclose(ends[0], [table["fraction_low"][0], table["fraction_high"][0]])
        assert plot.votes(table, label="theirs", ax=ax) is ax
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ours", "theirs"]
        colors = {bars.lines[0].get_color() for bars in ax.containers}
        assert len(colors) == 2
        assert len(ax.texts) == 4

    def test_nothing(self):
        with pytest.raises(ValueError, match="no galaxy"):
            plot.votes(completeness_by_votes([np.nan], [0.5]))


class TestSelection:
    TABLE = Table({"n_components": [3, 1, 2], "bic": [4.0, 9, 6], "stability": [0.5, 1, 0.8]})

    def test_best(self):
        axes = plot.model_selection(self.TABLE)
        for ax, values, best in ((axes[0], [5, 2, 0], [3, 0]), (axes[1], [1, 0.8, 0.5], [2, 0.8])):
            curve, circle = ax.lines
            assert_allclose(curve.get_xydata(), np.column_stack([[1, 2, 3], values]))
            assert_allclose(circle.get_xydata(), [best])  # one class is always stable

    def test_errors(self):
        table = self.TABLE.copy()
        table["stability_err"] = [0.3, 0.1, 0.2]
        _, bottom = plot.model_selection(table)
        (bars,) = bottom.containers[0].lines[2]
        assert_allclose([np.ptp(s[:, 1]) for s in bars.get_segments()], [0.2, 0.4, 0.6])

    def test_missing_column(self):
        with pytest.raises(KeyError, match="stability"):
            plot.model_selection(self.TABLE["n_components", "bic"])
