"""Figures of what a network has learned."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from galmorph import GalaxyVAE, plot
from galmorph.plot import latents as module


@pytest.fixture(autouse=True)
def _draw_and_close():
    """Draw every figure, for errors that show only then."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def stamps(rng):
    y, x = np.mgrid[:16, :20]
    truth = rng.uniform(20, 90, (3, 1, 1)) * np.exp(-((x - 9) ** 2 + (y - 8) ** 2) / 20)
    return truth, truth + rng.normal(0, 2, truth.shape)


@pytest.fixture
def vae():
    return GalaxyVAE.from_preset("regier2015", image_shape=(6, 8), latent_size=3, hidden=(8,))


def shown(ax):
    (image,) = ax.images
    return image.get_array()


def test_reconstructions(stamps):
    truth, images = stamps
    images[1, 3, 4] = np.nan
    axes = plot.reconstructions(images, (truth, np.full_like(truth, 4)), truth - 1)
    assert axes.shape == (3, 5)
    assert [ax.get_title() for ax in axes[0]] == [
        "Data", "Learned", "Residual", "Sérsic", "Residual",
    ]  # fmt: skip
    assert_allclose(shown(axes[0, 2]), (images[0] - truth[0]) / 4)
    assert_allclose(shown(axes[0, 4]), (images[0] - truth[0] + 1) / 4)
    assert shown(axes[1, 0]).mask[3, 4]
    norms = [ax.images[0].norm for ax in axes[2, [0, 1, 3]]]
    assert norms[0] is norms[1] is norms[2]
    assert axes[0, 2].images[0].get_clim() == (-5, 5)


def test_reconstructions_units_of_the_residual(stamps):
    """The uncertainty if there is one, else what is left over."""
    truth, images = stamps
    axes = plot.reconstructions(images, truth, uncertainty=2.0, max_galaxies=2, names=["Net"])
    assert axes.shape == (2, 3)
    assert axes[0, 1].get_title() == "Net"
    assert_allclose(shown(axes[1, 2]), (images[1] - truth[1]) / 2)
    axes = plot.reconstructions(images, truth, mask=truth < 10)
    assert shown(axes[0, 0]).mask.sum() == (truth[0] < 10).sum()
    assert 0.7 < np.ma.std(shown(axes[0, 2])) < 1.3


def test_reconstructions_of_nothing_but_holes(stamps):
    truth, images = stamps
    images[:] = np.nan
    plot.reconstructions(images, (truth, truth + 1))


def test_reconstructions_reject(stamps):
    truth, images = stamps
    with pytest.raises(ValueError, match="models of"):
        plot.reconstructions(images, truth[:, :5])
    with pytest.raises(ValueError, match="learned must have shape"):
        plot.reconstructions(images, truth[0])
    with pytest.raises(ValueError, match="no galaxies"):
        plot.reconstructions(images[:0], truth[:0])
    with pytest.raises(ValueError, match="uncertainty must be positive"):
        plot.reconstructions(images, truth, uncertainty=0.0)
    with pytest.raises(ValueError, match="residual_limit"):
        plot.reconstructions(images, truth, residual_limit=0)


def test_posterior_draws(stamps):
    truth, images = stamps
    axes = plot.posterior_draws(images[0], truth, truth / 10 + 1)
    assert axes.shape == (2, 4)
    assert_array_equal(shown(axes[0, 3]), truth[2])
    assert_array_equal(shown(axes[1, 3]), truth[2] / 10 + 1)
    assert len({id(ax.images[0].norm) for ax in axes[0]}) == 1
    assert len({id(ax.images[0].norm) for ax in axes[1, 1:]}) == 1
    with pytest.raises(ValueError, match="means of"):
        plot.posterior_draws(images[0], truth, truth[:2])


def test_traversal(vae):
    """One latent at a time moves; the middle column is one image."""
    import torch

    vae.train()
    axes = plot.traversal(vae, steps=(-2, 0, 2), latents=[2, 0])
    assert vae.training
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["−2σ", "mean", "+2σ"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["$z_{2}$", "$z_{0}$"]
    assert_allclose(shown(axes[0, 1]), shown(axes[1, 1]), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = vae.decode(torch.tensor([0.0, 0, 2])).mean.numpy()
    assert_allclose(shown(axes[0, 2]), expected, rtol=1e-4, atol=1e-6)


def test_traversal_about_given_latents(vae):
    import torch

    mean, std = np.array([1.0, 2, 3]), np.array([0.1, 0.2, 0.3])
    axes = plot.traversal(vae, steps=[-1, 1], mean=mean, std=std, stretch="linear")
    with torch.no_grad():
        expected = vae.decode(torch.tensor([1.0, 1.8, 3])).mean.numpy()
    assert_allclose(shown(axes[1, 0]), expected, rtol=1e-4, atol=1e-6)


class Learned:
    """Stands in for a LearnedGalaxy2D: its image says its parameters."""

    param_names = ("flux", "x_0", "z0", "z1")
    latent_names = ("z0", "z1")

    def sample(self, n, rng):
        z = np.random.default_rng(rng).normal([1, -1], [2, 0.5], (n, 2))
        return np.column_stack([np.full(n, 7.0), np.zeros(n), z])

    def render(self, shape, *, params):
        images = np.zeros((len(params), *shape))
        images[:, 0, :4] = params
        return images


def test_traversal_of_a_model():
    axes = plot.traversal(Learned(), steps=(0, 2), shape=(5, 6))
    flux, x_0, z0, z1 = shown(axes[0, 1])[0, :4]
    assert (flux, x_0) == (7, 0)
    assert_allclose([z0, z1], [1 + 2 * 2, -1], atol=0.2)
    with pytest.raises(ValueError, match="shape"):
        plot.traversal(Learned())


def test_traversal_rejects(vae):
    with pytest.raises(TypeError, match="not Normal"):
        plot.traversal(plt.Normalize())
    with pytest.raises(ValueError, match="latents must be some of 0 … 2"):
        plot.traversal(vae, latents=[3])
    with pytest.raises(ValueError, match="mean must be 3 numbers"):
        plot.traversal(vae, mean=[0, 0])
    with pytest.raises(ValueError, match="stretch"):
        plot.traversal(vae, stretch="log")


def test_tsne_thumbnails(rng):
    """Each cell shows the galaxy that is nearest to its middle."""
    embedding = np.array([[0, 0], [0.3, 0.3], [2, 2], [1.6, 0.4], [1.9, 0.1]])
    images = np.arange(5)[:, None, None] + rng.uniform(0, 0.1, (5, 4, 4))
    ax = plot.latents_tsne(np.zeros((5, 2)), images, embedding=embedding, cells=2)
    found = {round(float(i.get_array().mean() - 0.05)): i.get_extent() for i in ax.images}
    assert found == {1: [0, 1, 0, 1], 2: [1, 2, 1, 2], 3: [1, 2, 0, 1]}
    assert ax.get_title() == "3 of 5 galaxies"


def test_tsne_parts_groups(rng):
    """Two groups in the latents are two groups in the plane, and the seed repeats them."""
    pytest.importorskip("sklearn")
    import threadpoolctl  # of scikit-learn

    latents = rng.normal(0, 0.1, (24, 5))
    latents[12:, 0] += 5
    with threadpoolctl.threadpool_limits(1):  # its threads wait for each other on a busy machine
        places = [module._tsne(latents, 30.0, 3) for _ in range(2)]
    ax = plot.latents_tsne(latents, rng.normal(0, 1, (24, 4, 4)), cells=3, rng=3)
    assert_array_equal(*places)
    first, second = places[0][:12], places[0][12:]
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    assert gap > 2 * max(first.std(), second.std())
    assert len(ax.images) > 1


def test_tsne_rejects(rng):
    images = rng.normal(0, 1, (4, 5, 5))
    with pytest.raises(ValueError, match="latents of shape"):
        plot.latents_tsne(np.zeros((3, 2)), images)
    with pytest.raises(ValueError, match="embedding must have shape"):
        plot.latents_tsne(np.zeros((4, 2)), images, embedding=np.zeros((4, 3)))
    with pytest.raises(ValueError, match="cells"):
        plot.latents_tsne(np.zeros((4, 2)), images, cells=0)


def test_tsne_without_scikit_learn(monkeypatch, rng):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        plot.latents_tsne(np.zeros((4, 2)), rng.normal(0, 1, (4, 5, 5)))
