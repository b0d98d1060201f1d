"""The networks: shapes, what they compute, masks, units, and that they are rebuilt as they were."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from galmorph import GalaxyVAE, nets
from galmorph.nets.vae import divergence, draw
from galmorph.training import TrainingBatch

SHAPE = (11, 9)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return GalaxyVAE.from_preset("regier2015", **{"image_shape": SHAPE, **options}).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are faster so, on a busy machine above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(rng):
    """Smooth blobs of different brightness, positive."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    blob = np.exp(-((x - 4) ** 2 + (y - 5) ** 2) / 8)
    return rng.uniform(20, 200, (6, 1, 1)) * blob + rng.uniform(1, 3, (6, *SHAPE))


def test_the_published_sizes():
    vae = nets.regier2015()
    sizes = {name: tuple(p.shape) for name, p in vae.named_parameters() if "weight" in name}
    assert sizes == {
        "encoder.trunk.0.weight": (128, 4761),
        "encoder.trunk.2.weight": (128, 128),
        "encoder.mean.weight": (8, 128),
        "encoder.log_std.weight": (8, 128),
        "decoder.trunk.0.weight": (128, 8),
        "decoder.trunk.2.weight": (128, 128),
        "decoder.mean.weight": (4761, 128),
        "decoder.log_std.weight": (4761, 128),
    }
    assert sum(isinstance(m, torch.nn.ReLU) for m in vae.modules()) == 4
    assert vae.preset == "regier2015"
    assert vae.latent_size == 8


def test_distributions(images):
    vae = make()
    posterior = vae.encode(images)
    assert (posterior.batch_shape, posterior.event_shape) == ((6,), (8,))
    pixels = vae.decode(posterior.sample((4,)))
    assert (pixels.batch_shape, pixels.event_shape) == ((4, 6), SHAPE)
    assert bool((pixels.stddev > 0).all())
    assert vae.prior().event_shape == (8,)


def test_reconstruct_is_the_plug_in(images):
    """Mean and deviation at the posterior mean, by hand."""
    vae = make(scale=255.0)
    mean, std = vae.reconstruct(images)
    x = torch.tensor(images / 255, dtype=torch.float32).flatten(1)

    def layer(name, value):
        part = vae.get_submodule(name)
        return value @ part.weight.T + part.bias

    hidden = layer("encoder.trunk.2", layer("encoder.trunk.0", x).clamp(min=0)).clamp(min=0)
    z = layer("encoder.mean", hidden)
    hidden = layer("decoder.trunk.2", layer("decoder.trunk.0", z).clamp(min=0)).clamp(min=0)
    by_hand = layer("decoder.mean", hidden), layer("decoder.log_std", hidden).exp()
    for ours, theirs in zip((mean, std), by_hand, strict=True):
        assert_allclose(ours, 255 * theirs.detach().numpy().reshape(ours.shape), rtol=1e-4)


def test_reconstruct_forms(images):
    """One image, several, integers, float64, chunks: the same numbers, in the type given."""
    vae = make()
    mean, std = vae.reconstruct(images)
    assert mean.dtype == np.float64
    one = vae.reconstruct(images[2])
    assert_allclose(one, (mean[2], std[2]), rtol=1e-4)
    assert_allclose(vae.reconstruct(images, chunk=4), (mean, std), rtol=1e-4)
    counts = np.rint(images).astype(np.uint8)
    assert vae.reconstruct(counts)[0].dtype == np.float32
    assert_allclose(vae.reconstruct(counts), vae.reconstruct(counts.astype(float)), rtol=1e-4)
    assert vae.reconstruct(images[:0])[0].shape == (0, *SHAPE)


def test_reconstruct_leaves_the_mode(images):
    vae = make().train()
    vae.reconstruct(images)
    assert vae.training


def test_units(images):
    """In other units the same is drawn, in those units."""
    vae = make(scale="rms")
    for factor in (1e-30, 3.7, 1e25):
        got = vae.reconstruct(factor * images)
        assert_allclose(got, factor * np.asarray(vae.reconstruct(images)), rtol=1e-4)
    mean, std = vae.reconstruct(np.zeros(SHAPE))
    assert np.isfinite(mean).all()
    assert (std > 0).all()


@pytest.mark.parametrize("scale", ["rms", 255.0])
def test_bad_pixels_are_not_looked_at(images, scale):
    vae = make(scale=scale)
    mask = np.zeros(images.shape, bool)
    mask[:, 2, 3:6] = True
    wild = np.where(mask, 1e8, images)
    expected = vae.reconstruct(images, mask=mask)
    assert_allclose(vae.reconstruct(wild, mask=mask), expected)
    assert_allclose(vae.reconstruct(np.where(mask, np.nan, images)), expected)
    whole = vae.reconstruct(np.full(SHAPE, np.nan))
    assert np.isfinite(whole).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((9, 11)), r"\(11, 9\), not \(9, 11\)"),
        (np.zeros(9), "shape"),
        (np.zeros((1, 1, *SHAPE)), "shape"),
        (np.zeros(SHAPE, complex), "real"),
        (np.full(SHAPE, "a"), "real"),
    ],
)
def test_bad_images(bad, message):
    with pytest.raises(ValueError, match=message):
        make().reconstruct(bad)


def test_bad_mask_and_chunk(images):
    with pytest.raises(ValueError, match="mask has the shape"):
        make().reconstruct(images, mask=np.zeros(SHAPE, bool))
    with pytest.raises(ValueError, match="chunk"):
        make().reconstruct(images, chunk=0)


# -- the bound -----------------------------------------------------------------------------


def test_elbo(images):
    """Each term against its formula; the loss is what is minimised."""
    vae = make(scale=100.0)
    tensor = torch.tensor(images, dtype=torch.float32)
    batch = TrainingBatch(tensor)
    got = vae.elbo(batch, beta=0.5, generator=torch.Generator().manual_seed(3))
    posterior = vae.encode(tensor)
    z = draw(posterior, torch.Generator().manual_seed(3))
    pixels = vae.decode(z)
    x = tensor / 100
    density = -0.5 * ((x - pixels.mean) / pixels.stddev) ** 2 - pixels.stddev.log()
    log_likelihood = (density - 0.5 * math.log(2 * math.pi)).sum((1, 2))
    mu, sigma = posterior.mean, posterior.stddev
    kl = (0.5 * (mu**2 + sigma**2 - 1) - sigma.log()).sum(1)
    for name, value in {
        "log_likelihood": log_likelihood,
        "kl": kl,
        "loss": 0.5 * kl - log_likelihood,
        "squared_error": (x - pixels.mean).square().mean((1, 2)),
    }.items():
        assert got[name].shape == (6,)
        assert_allclose(got[name].detach(), value.detach(), rtol=1e-4)


def test_elbo_leaves_bad_pixels_out(images):
    """Nothing changes if a bad pixel changes; all weights above 0 are the same."""
    vae = make(scale=100.0)
    tensor = torch.tensor(images, dtype=torch.float32)
    weight = torch.ones_like(tensor)
    weight[:, 1, 2] = 0
    wild = tensor.clone()
    wild[:, 1, 2] = float("nan")

    def bound(x, w):
        return vae.elbo(TrainingBatch(x, w), generator=torch.Generator().manual_seed(1))

    plain, other = bound(tensor, weight), bound(wild, 7 * weight)
    for name, value in plain.items():
        assert torch.equal(value, other[name])
    other["loss"].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in vae.parameters())
    none, ones = bound(tensor, None), bound(tensor, torch.ones_like(tensor))
    assert_allclose(none["loss"].detach(), ones["loss"].detach(), rtol=1e-4)


def test_draws_repeat():
    q = Independent(Normal(torch.zeros(400, 2), 2 * torch.ones(400, 2)), 1)
    first, second = (draw(q, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert_allclose(first.std(), 2, rtol=0.1)


def test_draws_of_correlated_latents():
    covariance = torch.tensor([[2.0, 0.9], [0.9, 1.0]])
    q = MultivariateNormal(torch.ones(20000, 2), covariance)
    z = draw(q, torch.Generator().manual_seed(5))
    assert_allclose(z.T.cov(), covariance, atol=0.06)
    with pytest.raises(TypeError, match="MixtureSameFamily"):
        draw(nets.GaussianMixture.empty(2, 3)(), torch.Generator())


def test_training_lowers_the_loss(images):
    """A few steps on six blobs; the start from the mean image is already a fair one."""
    vae = make(scale=100.0).train()
    x = torch.tensor(images, dtype=torch.float32)
    vae.decoder.start_from((x / 100).mean(0), (x / 100).std(0))
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(300):
        loss = vae.elbo(TrainingBatch(x), generator=generator)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 50
    mean, _ = vae.eval().reconstruct(images)
    assert np.mean((mean - images) ** 2) < 0.1 * np.mean((images.mean(0) - images) ** 2)


# -- parts ---------------------------------------------------------------------------------


def test_positive_mean(images):
    assert (make(positive_mean=True).reconstruct(images - 500)[0] > 0).all()
    start = torch.rand(SHAPE) + 0.1
    for positive in (True, False):
        decoder = nets.MLPDecoder(SHAPE, positive_mean=positive)
        decoder.start_from(start, 2 * start, gain=0.0)
        mean, std = decoder(torch.randn(3, 8))
        assert_allclose(mean.detach(), start.expand(3, *SHAPE), rtol=1e-4)
        assert_allclose(std.detach(), 2 * start.expand(3, *SHAPE), rtol=1e-4)


def test_standard_normal():
    prior = nets.StandardNormal(3)
    assert not prior.state_dict()
    assert_allclose(prior().log_prob(torch.zeros(3)), -1.5 * math.log(2 * math.pi), rtol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        nets.StandardNormal(0)


def test_mixture(rng):
    """Density against scipy; draws have its moments; buffers go through a state_dict."""
    from scipy.stats import multivariate_normal

    weights, means = np.array([1.0, 3.0]), np.array([[0.0, 1.0], [3.0, -1.0]])
    covariances = np.array([[[1.0, 0.5], [0.5, 2.0]], [[0.5, -0.2], [-0.2, 0.3]]])
    prior = nets.GaussianMixture(weights, means, covariances)
    z = rng.normal(size=(50, 2))
    parts = zip(weights / 4, means, covariances, strict=True)
    density = sum(w * multivariate_normal(m, c).pdf(z) for w, m, c in parts)
    assert_allclose(prior().log_prob(torch.tensor(z).float()), np.log(density), rtol=1e-4)
    torch.manual_seed(1)
    draws = prior().sample((20000,))
    assert_allclose(draws.mean(0), prior().mean, atol=0.04)
    assert_allclose(draws.var(0), prior().variance, rtol=0.05)
    other = nets.GaussianMixture.empty(2, 2)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other().log_prob(draws), prior().log_prob(draws))
    assert not list(prior.parameters())


def test_divergence_from_a_mixture():
    """Estimated at one draw, where there is no closed form; on average it is right."""
    q = Independent(Normal(torch.ones(20000, 2), torch.full((20000, 2), 0.5)), 1)
    z = draw(q, torch.Generator().manual_seed(2))
    prior = nets.StandardNormal(2)()
    estimate = divergence(q, nets.GaussianMixture.empty(1, 2)(), z).mean()
    assert_allclose(estimate, kl_divergence(q, prior).mean(), rtol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([1.0], [[0.0]], [[[-1.0]]]), "positive definite"),
        (([-1.0, 2.0], [[0.0], [1.0]], [[[1.0]], [[1.0]]]), "positive and finite"),
        (([1.0, 2.0], [[0.0]], [[[1.0]]]), r"\(K, d\)"),
        (([1.0], [[0.0]], [[1.0]]), "covariances must have the shape"),
    ],
)
def test_bad_mixtures(values, message):
    with pytest.raises(ValueError, match=message):
        nets.GaussianMixture(*values)


# -- presets -------------------------------------------------------------------------------


def test_config_builds_the_same_network(images):
    vae = make(hidden=(16, 12), latent_size=3, scale=10.0, positive_mean=True)
    again = nets.from_config(vae.config)
    again.load_state_dict(vae.state_dict())
    assert_allclose(again.reconstruct(images), vae.reconstruct(images))
    vae.config["options"]["scale"] = 3
    assert vae.config == again.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (69,)}, "image_shape"),
        ({"image_shape": (0, 4)}, "image_shape"),
        ({"hidden": ()}, "hidden"),
        ({"latent_size": 1.5}, "latent_size"),
        ({"scale": 0}, "scale"),
        ({"scale": "mean"}, "'mean'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nets.regier2015(**options)


def test_unknown_presets():
    with pytest.raises(ValueError, match=r"no preset 'resnet'; there are .*regier2015"):
        GalaxyVAE.from_preset("resnet")
    for config in (None, {}, {"preset": "regier2015"}, {"preset": "regier2015", "options": 3}):
        with pytest.raises(ValueError, match="config"):
            nets.from_config(config)


def test_put_together_by_hand(images):
    """Any parts; without a config, which it says."""
    vae = GalaxyVAE(
        nets.MLPEncoder(SHAPE), nets.MLPDecoder(SHAPE), nets.GaussianMixture.empty(4, 8)
    )
    batch = TrainingBatch(torch.tensor(images, dtype=torch.float32))
    assert vae.elbo(batch)["loss"].shape == (6,)
    assert vae.preset is None
    with pytest.raises(ValueError, match="by hand"):
        vae.config  # noqa: B018
