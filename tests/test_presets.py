"""The published networks: what they are, and that the faults of the originals stay behind."""

import math

import numpy as np
import pytest
import torch
from astropy.table import MaskedColumn, Table
from numpy.testing import assert_allclose, assert_array_equal
from torch.distributions import Independent, Normal

from galmorph import GalaxyVAE, nets
from galmorph.cli import main
from galmorph.nets.vae import divergence, draw
from galmorph.training import (
    Augmentation,
    CyclicalAnnealing,
    StampDataset,
    TrainingBatch,
    read_log,
    train,
)
from galmorph.training.schedules import beta_per_epoch, learning_rate_factor

SIDE = 16
SMALL = {
    "astrovader2020": {"channels": (4, 4, 4), "latent_size": 3, "components": 2},
    "beta_vae": {"filters": 4, "latent_size": 3},
    "cvae": {"filters": 4, "latent_size": 3},
    "cvae2": {"filters": 4, "latent_size": 3},
    "fancy_cvae": {"filters": 4, "latent_size": 3},
}
CONDITIONAL = ("cvae", "cvae2", "fancy_cvae")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    options = {"image_shape": (SIDE, SIDE), **SMALL[name], **options}
    return GalaxyVAE.from_preset(name, **options)


def galaxies(n=80, seed=1, side=SIDE):
    """Blobs from 0 to 255, and their brightness, which is the condition."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    size, flux = rng.uniform(1.5, 3, (n, 1, 1)), rng.uniform(40, 200, (n, 1, 1))
    images = flux * np.exp(-(x**2 + y**2) / (2 * size**2)) + rng.uniform(0, 5, (n, side, side))
    return images.astype(np.float32), flux[:, 0, 0] / 100


@pytest.fixture
def images():
    return galaxies(9)[0]


def mixture(vae, spread=2.0, seed=3):
    """A network whose prior has become a mixture of components that overlap."""
    rng = np.random.default_rng(seed)
    prior = vae.prior
    k, d = prior.means.shape
    prior.start(rng.uniform(1, 3, k), rng.normal(0, spread, (k, d)), rng.uniform(0.3, 2, (k, d)))
    return vae


# -- what they are -------------------------------------------------------------------------


def test_astrovader_as_published():
    """Pairs of 64, 64 and 16 channels, 3 x 3 then 5 x 5, and mirrored."""
    vae = nets.astrovader2020()

    def convolutions(part):
        found = [m for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
        return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in found]

    assert convolutions(vae.encoder) == [
        (1, 64, 3), (64, 64, 3), (64, 64, 5), (64, 64, 5), (64, 16, 5), (16, 16, 5),
    ]  # fmt: skip
    assert convolutions(vae.decoder) == [
        (16, 16, 5), (16, 16, 5), (16, 64, 5), (64, 64, 5), (64, 64, 5), (64, 64, 5), (64, 1, 3),
    ]  # fmt: skip
    slopes = {m.negative_slope for m in vae.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.1}
    assert {m.mode for m in vae.modules() if isinstance(m, torch.nn.Upsample)} == {"bilinear"}
    assert vae.encoder.mean.in_features == 16 * 16 * 16
    assert vae.latent_size == 20
    assert len(vae.prior.weights) == 12


def test_beta_vae_as_published():
    vae = nets.beta_vae()
    assert vae.latent_size == 32
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    for part in (vae.encoder, vae.decoder):
        layers = [m for m in part.modules() if isinstance(m, kinds)]
        widths = [max(m.in_channels, m.out_channels) for m in layers]
        assert sorted(widths) == [64, 128, 256, 512]
        assert {(m.kernel_size, m.stride) for m in layers} == {((4, 4), (2, 2))}


@pytest.mark.parametrize("name", SMALL)
def test_any_shape_and_config(name, images):
    """Images of any shape; the config builds the network again."""
    vae = make(name, image_shape=(21, 34))
    again = nets.from_config(vae.config)
    again.load_state_dict(vae.state_dict())
    stamps = np.random.default_rng(1).uniform(0, 255, (3, 21, 34))
    mean, std = vae.reconstruct(stamps)
    assert mean.shape == std.shape == stamps.shape
    assert np.all((mean >= 0) & (std > 0))
    assert_array_equal(again.reconstruct(stamps)[0], mean)
    assert again.config == vae.config
    with pytest.raises(ValueError, match="image_shape"):
        make(name, image_shape=(7, 7))


@pytest.mark.parametrize("name", SMALL)
def test_no_layer_is_narrower_than_the_latents(name):
    """The originals squeezed 32 latents through 16 or 25 numbers."""
    vae = nets.GalaxyVAE.from_preset(name, image_shape=(64, 64))
    widths = []

    def count(module, inputs, output):
        if isinstance(output, torch.Tensor):
            widths.append(output[0].numel())

    for part in (vae.encoder, vae.decoder):
        for module in part.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
    z = vae.encode(torch.rand(2, 64, 64)).mean
    vae.decode(z)
    assert min(widths) >= vae.latent_size


@pytest.mark.parametrize("name", SMALL)
def test_loss_is_the_summed_squared_error(name, images):
    """Over 128 x 128 pixels; up to a constant."""
    vae = make(name)
    batch = TrainingBatch(torch.as_tensor(images))
    first = vae.elbo(batch, generator=torch.Generator().manual_seed(2))
    noise = (0.5 * SIDE * SIDE) ** 0.5 / 128
    constant = -SIDE * SIDE * math.log(noise * math.sqrt(2 * math.pi))
    error = first["squared_error"] * 128**2
    assert_allclose(first["log_likelihood"].detach(), constant - error.detach(), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": 0}, "filters"),
        ({"noise": -1.0}, "noise"),
        ({"scale": 0}, "scale"),
        ({"image_shape": (64,)}, "image_shape"),
        ({"conditions": ()}, "names of columns"),
        ({"conditions": ("z", "z")}, "different names"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"components": -1}, "components"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nets.cvae(**options)
    with pytest.raises(ValueError, match="three"):
        nets.astrovader2020(channels=(4, 4))


# -- batch norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_nothing_depends_on_the_batch(name, images):
    """A network, new or trained, describes each galaxy by itself, and learns nothing from it."""
    stamps, flux = galaxies(24)
    vae = make(name)
    condition = flux if name in CONDITIONAL else None
    own = {} if condition is None else {"conditions": condition}
    for trained in (False, True):
        if trained:
            train(vae, stamps, **own, epochs=1, batch_size=8, rng=1, progress=False)
        assert not vae.training
        before = {k: v.clone() for k, v in vae.state_dict().items()}
        one = vae.encode(torch.as_tensor(stamps[:1])).mean
        many = vae.encode(torch.as_tensor(stamps)).mean
        assert_allclose(one.detach(), many[:1].detach(), atol=1e-5)
        vae.train()
        mean, _ = vae.reconstruct(stamps)
        vae.sample(2, rng=1)
        assert vae.training
        vae.eval()
        assert_array_equal(mean, vae.reconstruct(stamps)[0])
        assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())


# -- the mixture ---------------------------------------------------------------------------


def test_mixture_is_normal_until_it_starts():
    """And does not learn before."""
    prior = nets.DiagonalMixture(4, 3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    z = torch.randn(50, 3)
    density = prior().log_prob(z)
    assert_allclose(density.detach(), nets.StandardNormal(3)().log_prob(z), rtol=1e-5)
    density.sum().backward()
    assert all(float(p.grad.abs().max()) == 0 for p in prior.parameters())
    q = Independent(Normal(torch.randn(50, 3), torch.rand(50, 3) + 0.1), 1)
    closed = divergence(q, nets.StandardNormal(3)(), z)
    assert_allclose(divergence(q, prior(), z).detach(), closed, rtol=1e-4)


def test_weights_sum_to_one():
    """Also where the parameters have gone far (the original's weights summed to 28)."""
    vae = mixture(make("astrovader2020", components=5))
    assert_allclose(vae.prior.weights.sum().item(), 1, rtol=1e-6)
    train(vae, galaxies()[0], epochs=2, learning_rate=0.05, rng=1, progress=False)
    assert_allclose(vae.prior.weights.sum().item(), 1, rtol=1e-6)
    assert_allclose(vae.prior().mixture_distribution.probs.sum().item(), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="shapes"):
        vae.prior.start(np.ones(4), np.zeros((4, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="positive"):
        vae.prior.start(np.ones(5), np.zeros((5, 3)), np.zeros((5, 3)))


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_mixture_term_is_the_divergence(spread):
    """One draw of it is unbiased, and on average below the bound of VaDE."""
    rng = np.random.default_rng(5)
    k, d, n = 4, 3, 40_000
    prior = nets.DiagonalMixture(k, d)
    prior.start(rng.uniform(1, 3, k), rng.normal(0, spread, (k, d)), rng.uniform(0.2, 2, (k, d)))
    p = prior()
    for _ in range(3):
        mu, std = (
            torch.as_tensor(a).float() for a in (rng.normal(0, 2, d), rng.uniform(0.2, 1, d))
        )
        q = Independent(Normal(mu.expand(n, d), std.expand(n, d)), 1)
        z = draw(q, torch.Generator().manual_seed(int(rng.integers(1000))))
        ours = divergence(q, p, z).detach().double().numpy()
        plain = (q.log_prob(z) - p.log_prob(z)).detach().double().numpy()
        error = np.hypot(ours.std(), plain.std()) / np.sqrt(n)
        assert abs(ours.mean() - plain.mean()) < 4 * error
        # minus the logarithm of sum_k weight_k exp(-KL[q || component k]), VaDE at its best gamma
        means, deviations = prior.means.detach(), prior.log_std.exp().detach()
        square = (std**2 + (mu - means) ** 2) / deviations**2
        each = 0.5 * (square - 1).sum(1) + (deviations / std).log().sum(1)
        bound = -torch.logsumexp(prior.weights.log() - each, 0).item()
        assert bound > ours.mean() - 4 * error


def test_mixture_term_hardly_scatters():
    """Where one component holds the posterior it is known from one draw."""
    prior = nets.DiagonalMixture(2, 3)
    prior.start([1.0, 3.0], [[0.0] * 3, [50.0] * 3], np.ones((2, 3)))
    q = Independent(Normal(torch.full((500, 3), 0.3), torch.full((500, 3), 0.5)), 1)
    z = draw(q, torch.Generator().manual_seed(1))
    closed = 3 * (0.5 * (0.3**2 + 0.5**2 - 1) - math.log(0.5)) + math.log(4)
    assert_allclose(divergence(q, prior(), z).detach(), closed, rtol=1e-4)
    assert (q.log_prob(z) - prior().log_prob(z)).std() > 0.5


def test_training_maximises_the_right_bound(images):
    """The loss of the network is the negative bound with that divergence."""
    vae = mixture(make("astrovader2020"))
    batch = TrainingBatch(torch.as_tensor(images))
    found = vae.elbo(batch, beta=0.7, generator=torch.Generator().manual_seed(4))
    q = vae.encode(torch.as_tensor(images))
    z = draw(q, torch.Generator().manual_seed(4))
    assert_allclose(found["kl"].detach(), divergence(q, vae.prior(), z).detach(), rtol=1e-5)
    total = 0.7 * found["kl"] - found["log_likelihood"]
    assert_allclose(found["loss"].detach(), total.detach(), rtol=1e-6)
    found["loss"].sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in vae.prior.parameters())


def test_responsibilities_are_exact():
    """By Bayes' theorem, averaged over the posterior; against many draws in double precision."""
    vae = mixture(make("astrovader2020", components=4, seed=2), spread=1.0)
    stamps = galaxies(5)[0]
    got = vae.responsibilities(stamps)
    assert got.dtype == np.float64
    assert_allclose(got.sum(1), 1, rtol=1e-12)
    mean, std = vae.latents(stamps)
    z = mean + std * np.random.default_rng(1).normal(size=(20_000, *mean.shape))
    weights, means, deviations = (
        t.detach().double().numpy()
        for t in (vae.prior.weights, vae.prior.means, vae.prior.log_std.exp())
    )
    log = -0.5 * (((z[:, :, None] - means) / deviations) ** 2).sum(-1)
    log += np.log(weights) - np.log(deviations).sum(-1)
    joint = np.exp(log - log.max(-1, keepdims=True))
    expected = (joint / joint.sum(-1, keepdims=True)).mean(0)
    assert_allclose(got, expected, atol=0.01)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_responsibilities_do_not_depend_on_the_batch(chunk):
    """The original rescaled them by the extremes of each batch."""
    vae = mixture(make("astrovader2020", components=6), spread=30.0)  # sharp classes
    stamps = galaxies(40)[0]
    whole = vae.responsibilities(stamps)
    assert_allclose(vae.responsibilities(stamps, chunk=chunk), whole, atol=1e-9)
    assert_allclose(vae.responsibilities(stamps[11:12], chunk=chunk)[0], whole[11], atol=1e-9)
    wild = np.concatenate([stamps[:3], 1e6 * stamps[:1]])  # far from every component
    assert_allclose(vae.responsibilities(wild, chunk=chunk)[:3], whole[:3], atol=1e-9)
    assert np.isfinite(vae.responsibilities(wild)).all()
    with pytest.raises(ValueError, match="no mixture"):
        make("beta_vae").responsibilities(stamps)


# -- the published schedule ----------------------------------------------------------------


def two_kinds(n=60):
    """Half of the images bright on the left, half on the right."""
    rng = np.random.default_rng(2)
    images = rng.uniform(0, 20, (n, SIDE, SIDE)).astype(np.float32)
    images[: n // 2, :, :8] += 200
    images[n // 2 :, :, 8:] += 200
    return images


SCHEDULE = dict(
    epochs=5, prior_warmup=2, batch_size=16, learning_rate=3e-3, final_learning_rate=1e-6,
    schedule="exponential", beta=CyclicalAnnealing(rise=1, hold=1, warmup=2), augment=False,
    rng=4, progress=False,
)  # fmt: skip


def test_start_of_the_mixture_is_applied():
    """What k-means and the mixture find is what the network holds; the original lost it."""
    images = two_kinds()
    vae = make("astrovader2020")
    # at first the network learns to tell the two kinds, with N(0, I)
    learning = {"learning_rate": 1e-2, "schedule": "constant", "final_learning_rate": None}
    train(vae, images, **SCHEDULE | learning | {"epochs": 25, "prior_warmup": 24, "beta": 0.1})
    start = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.prior.started.zero_()
    still = learning | {"learning_rate": 1e-12}
    result = train(vae, images, **SCHEDULE | still | {"epochs": 3, "beta": 1.0})
    assert result.best_epoch == 3
    assert float(vae.prior.started) == 1
    probability = vae.responsibilities(images)
    first = probability[:30].argmax(1), probability[30:].argmax(1)
    assert len(set(first[0])) == len(set(first[1])) == 1
    assert first[0][0] != first[1][0]
    assert probability.max(1).min() > 0.9
    # the components lie on the latents of the two kinds
    mean, _ = vae.latents(images)
    for half, which in zip((mean[:30], mean[30:]), (first[0][0], first[1][0]), strict=True):
        assert_allclose(vae.prior.means[which].detach(), half.mean(0), atol=0.5)
    moved = start["encoder.mean.weight"] - vae.state_dict()["encoder.mean.weight"]
    assert moved.abs().max() < 1e-6


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 12, 13, 15, 22])
@pytest.mark.parametrize("name", ["astrovader2020", "fancy_cvae"])
def test_resume_in_any_phase(name, stop, tmp_path, monkeypatch):
    """Stopped in the warm-up, at the start of the mixture, or after: as if it had not been."""
    images, flux = galaxies(64)
    options = dict(SCHEDULE, checkpoint_minutes=1e-9)
    if name == "fancy_cvae":
        flux = np.where(np.arange(64) % 3 == 0, np.nan, flux)
        options |= {"prior_warmup": None, "conditions": flux}
    whole = make(name)
    expected = train(whole, images, **options)
    elbo, calls = GalaxyVAE.elbo, []

    def stopping(self, batch, **others):
        calls.append(1)
        if len(calls) == stop:
            raise Killed
        return elbo(self, batch, **others)

    monkeypatch.setattr(GalaxyVAE, "elbo", stopping)
    with pytest.raises(Killed):
        train(make(name), images, checkpoint=tmp_path / "run", **options)
    monkeypatch.setattr(GalaxyVAE, "elbo", elbo)
    vae = make(name)
    result = train(vae, images, checkpoint=tmp_path / "run", **options)
    for column in set(expected.history) - {"seconds"}:
        assert_array_equal(result.history[column], expected.history[column], err_msg=column)
    theirs = whole.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in vae.state_dict().items())
    assert result.best_epoch == expected.best_epoch


def test_best_epoch_is_one_with_the_mixture():
    """Also where epochs of the warm-up had a lower loss."""
    vae = make("astrovader2020")
    beta = [0.0, 0.0, 1.0, 1.0, 1.0]
    result = train(vae, galaxies()[0], **SCHEDULE | {"beta": beta})
    assert result.best_epoch > 2
    assert float(vae.prior.started) == 1
    assert result.history["beta"].tolist() == beta


def test_prior_warmup_needs_a_mixture():
    images = galaxies(20)[0]
    with pytest.raises(ValueError, match="learned mixture"):
        train(make("beta_vae"), images, **SCHEDULE)
    with pytest.raises(ValueError, match="prior_warmup must be below epochs"):
        train(make("astrovader2020"), images, **SCHEDULE | {"prior_warmup": 5})


def test_exponential_learning_rate():
    vae = make("beta_vae")
    options = dict(SCHEDULE, prior_warmup=None, epochs=3, warmup=0.0)
    result = train(vae, galaxies(40)[0], **options)
    steps = np.array([3, 6, 9]) - 1  # the last of each epoch
    assert_allclose(result.history["learning_rate"], 3e-3 * (1e-6 / 3e-3) ** (steps / 9))
    with pytest.raises(ValueError, match="needs a final_learning_rate"):
        train(vae, galaxies(20)[0], **options | {"final_learning_rate": None})
    with pytest.raises(ValueError, match="final_learning_rate must be positive"):
        train(vae, galaxies(20)[0], **options | {"final_learning_rate": 0.0})
    assert learning_rate_factor(5, 10, schedule="cosine", final=0.2) == pytest.approx(0.6)


def test_cyclical_annealing():
    cycle = CyclicalAnnealing(rise=4, hold=2, warmup=3, peak=0.5)
    values = beta_per_epoch(cycle, 15)
    assert values[:3] == [0.5] * 3
    assert_allclose(values[3:9], 0.5 * np.array([0, 1 / 4, 2 / 4, 3 / 4, 1, 1]) ** 3)
    assert values[9:15] == values[3:9]
    assert beta_per_epoch(CyclicalAnnealing(rise=0, hold=2), 3) == [1.0] * 3
    assert beta_per_epoch(CyclicalAnnealing(rise=2, hold=1, low=0.4, power=1), 3) == [0.4, 0.7, 1.0]
    for bad in ({"rise": -1}, {"rise": 0, "hold": 0}, {"peak": -1.0}, {"low": 2.0}, {"hold": 1.5}):
        with pytest.raises(ValueError, match=r"epochs|anneal"):
            CyclicalAnnealing(**bad)


# -- conditions ----------------------------------------------------------------------------


def test_conditions_of_a_data_set(tmp_path):
    """Tables, dicts, arrays and files; what is missing is NaN; rows stay with their stamps."""
    images = galaxies(6)[0]
    images[1] = np.nan
    redshift = np.arange(6) / 10
    column = MaskedColumn(redshift, mask=np.arange(6) == 3)
    table = Table({"name": list("abcdef"), "redshift": column, "r_50": np.arange(6)})
    table.write(tmp_path / "t.ecsv")
    for given in (table, tmp_path / "t.ecsv", {k: table[k] for k in table.colnames}):
        data = StampDataset(images, conditions=given)
        assert data.condition_names == ("redshift", "r_50")
        batch, skipped = data.batch([3, 1, 5])
        assert set(skipped) == {1}
        assert_allclose(batch.condition, [[np.nan, 3], [0.5, 5]])
        turned = Augmentation()(batch, rng=1)
        assert turned.condition is batch.condition
    plain = StampDataset(images, conditions=redshift)
    assert plain.conditions.shape == (6, 1)
    assert plain.condition_names is None
    for bad, message in [
        (redshift[:4], "conditions holds 4 rows"),
        ({"a": [1, 2], "b": [1]}, "conditions: .*one length"),
        ({"name": list("abcdef")}, "conditions: must be numbers"),
        ("nowhere.ecsv", "nowhere.ecsv"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            StampDataset(images, conditions=bad)


@pytest.mark.parametrize(
    "condition",
    [
        [[0.1, 4.0], [np.nan, 5.0]],
        {"redshift": [0.1, None], "r_50": [4.0, 5.0]},
        Table({"r_50": [4.0, 5.0], "redshift": [0.1, np.nan], "mag": [1, 2]}),
        torch.tensor([[0.1, 4.0], [math.nan, 5.0]]),
    ],
)
def test_forms_of_conditions(condition):
    conditions = nets.Conditions(["redshift", "r_50"])
    assert_allclose(conditions.read(condition, 2), [[0.1, 4], [np.nan, 5]], rtol=1e-6)
    assert_allclose(conditions.read({"redshift": 0.3}, 2), [[0.3, np.nan]] * 2, rtol=1e-6)
    assert conditions.read(None, 3).isnan().all()
    assert nets.Conditions("redshift").read(0.2, 3).tolist() == [[pytest.approx(0.2)]] * 3
    assert nets.Conditions("redshift").read([1, 2, 3], 3).shape == (3, 1)


@pytest.mark.parametrize("bad", [[0.1, 0.2], {"mag": 1.0}, np.zeros((3, 2)), 0.1])
def test_bad_conditions(bad):
    with pytest.raises(ValueError, match="condition"):
        nets.Conditions(["redshift", "r_50"]).read(bad, 2)


def test_conditions_are_standardised_once():
    """By the training galaxies; a column that does not vary is only shifted."""
    rng = np.random.default_rng(1)
    values = np.c_[rng.normal(7, 3, 500), np.full(500, 2.0)]
    values[::5, 0] = np.nan
    conditions = nets.Conditions(["a", "b"])
    conditions.learn(values)
    told = conditions(torch.as_tensor(values).float())
    known = np.isfinite(values[:, 0])
    assert_allclose(told[known, 0].mean(), 0, atol=1e-5)
    assert_allclose(told[known, 0].std(correction=0), 1, rtol=1e-5)
    assert told[~known, 0].abs().max() == 0
    assert_array_equal(told[:, 2], ~known)
    assert_array_equal(told[:, 1], 0)
    assert_array_equal(told[:, 3], 0)
    conditions.learn(100 * values)
    assert_array_equal(conditions(torch.as_tensor(values).float()), told)
    with pytest.raises(ValueError, match="'b' is missing everywhere"):
        nets.Conditions(["a", "b"]).learn(np.c_[np.ones(3), np.full(3, np.nan)])


def test_columns_are_found_by_name():
    images, flux = galaxies(30)
    table = {"mag": np.zeros(30), "flux": flux, "r_50": flux**2}
    one, other = (make("cvae", conditions=("r_50", "flux")) for _ in range(2))
    options = dict(epochs=1, rng=1, progress=False)
    train(one, images, conditions=table, **options)
    train(other, images, conditions=np.c_[flux**2, flux], **options)
    theirs = other.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in one.state_dict().items())
    for vae, conditions, message in [
        (one, {"flux": flux}, "conditions lacks r_50"),
        (one, flux, "1 columns"),
        (one, None, "needs conditions: r_50, flux"),
        (make("beta_vae"), flux, "knows none"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(vae, images, conditions=conditions, **options)
    with pytest.raises(ValueError, match="knows none"):
        make("beta_vae").encode(images, condition=flux)
    with pytest.raises(ValueError, match="belong into the StampDataset"):
        train(one, StampDataset(images), conditions=table, **options)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_where_the_condition_goes(name, images):
    """Encoder and decoder both see it; missing is something else than the mean."""
    vae = make(name)
    vae.learn_conditions(np.linspace(0, 1, 9)[:, None])
    stamps = torch.as_tensor(images)
    low, high, missing = (vae.encode(stamps, condition=c).mean for c in (0.1, 0.9, None))
    assert (low - high).abs().max() > 1e-4
    z = torch.zeros(9, 3)
    drawn = [vae.decode(z, c).mean for c in (0.1, 0.9, None, 0.5)]
    for i in range(4):
        for k in range(i):
            assert (drawn[i] - drawn[k]).abs().max() > 1e-5
    nan = vae.encode(stamps, condition=np.full(9, np.nan)).mean
    assert torch.equal(nan, missing)
    assert torch.equal(vae.decode(z[0], 0.1).mean, drawn[0][0])
    several = vae.decode(torch.zeros(2, 9, 3), np.linspace(0, 1, 9)).mean
    assert several.shape == (2, 9, SIDE, SIDE)
    assert torch.equal(several[0], several[1])


def test_conditions_are_hidden_in_training_only():
    conditions = nets.Conditions(["a"], dropout=0.3)
    values = torch.ones(4000, 1)
    assert torch.equal(conditions.eval().hide(values), values)
    conditions.train()
    first, second = (conditions.hide(values, torch.Generator().manual_seed(2)) for _ in range(2))
    assert_array_equal(first, second)
    assert first.isnan().float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.fixture(scope="module")
def trained():
    """The networks that are told how bright the galaxies are, trained."""
    images, flux = galaxies(160)
    flux = np.where(np.arange(160) % 4 == 0, np.nan, flux)  # not known of a quarter

    def fit(name):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        vae = GalaxyVAE.from_preset(
            name, image_shape=(SIDE, SIDE), **SMALL[name], conditions=["flux"]
        )
        train(vae, images, conditions={"flux": flux}, epochs=25, batch_size=16,
              learning_rate=5e-3, beta=1.0, rng=1, progress=False)  # fmt: skip
        return vae

    return {name: fit(name) for name in CONDITIONAL}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_samples(trained, name):
    """Galaxies that are asked to be bright are; the bound knows what the right condition is."""
    vae = trained[name]
    levels = [vae.sample(30, rng=1, condition={"flux": c})[:, 6:10, 6:10].mean((1, 2))
              for c in (0.5, 1.2, 1.9)]  # fmt: skip
    assert np.all(levels[0] < levels[1])
    assert np.all(levels[1] < levels[2])
    images, flux = galaxies(200, seed=8)
    bounds = []
    for condition in (flux, flux[::-1].copy()):
        batch = TrainingBatch(torch.as_tensor(images),
                              condition=torch.as_tensor(condition).float()[:, None])  # fmt: skip
        found = vae.elbo(batch, generator=torch.Generator().manual_seed(1))
        bounds.append((found["log_likelihood"] - found["kl"]).detach().numpy())
    gain = bounds[0] - bounds[1]
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))


def test_predicted_condition_is_of_the_image(trained):
    """It follows the image, whatever the input said (the original gave the input back)."""
    vae = trained["fancy_cvae"]
    images, flux = galaxies(100, seed=7)
    stamps = torch.as_tensor(images)
    predicted = vae.predict_condition(stamps)
    mean, std = (t.detach().numpy()[:, 0] for t in (predicted.mean, predicted.stddev))
    assert np.corrcoef(mean, flux)[0, 1] > 0.9
    assert np.mean(np.abs(mean - flux) < 3 * std) > 0.9
    assert (mean - flux).std() < 0.5 * flux.std()
    wrong = TrainingBatch(stamps, condition=torch.as_tensor(flux[::-1].copy()).float()[:, None],
                          condition_names=("flux",))  # fmt: skip
    right = TrainingBatch(stamps, condition=torch.as_tensor(flux).float()[:, None],
                          condition_names=("flux",))  # fmt: skip
    generator = torch.Generator()
    found = [vae.elbo(b, generator=generator)["condition_log_prob"] for b in (right, wrong)]
    standard = vae.predictor(vae._pixels(stamps)).base_dist
    for batch, log_prob in zip((right, wrong), found, strict=True):
        true = (batch.condition - vae.conditions.mean) / vae.conditions.scale
        expected = standard.log_prob(true)[:, 0]
        assert_allclose(log_prob.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="predicts no conditions"):
        trained["cvae"].predict_condition(stamps)


def test_missing_conditions_teach_no_prediction(images):
    vae = make("fancy_cvae").train()
    vae.learn_conditions(np.linspace(0, 1, 9)[:, None])
    batch = TrainingBatch(torch.as_tensor(images), condition=torch.full((9, 1), math.nan))
    found = vae.elbo(batch, generator=torch.Generator().manual_seed(1))
    assert found["condition_log_prob"].abs().max() == 0
    found["loss"].sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in vae.predictor.parameters())
    assert all(torch.isfinite(p.grad).all() for p in vae.decoder.parameters())


def test_prediction_stands_in(trained):
    """Where a condition is missing, it is as if the prediction had been told, marked as such."""
    vae = trained["fancy_cvae"]
    stamps = torch.as_tensor(galaxies(6, seed=3)[0])
    pixels = vae._pixels(stamps)
    guess = vae.predictor(pixels).mean
    told = torch.cat([guess, torch.ones_like(guess)], 1)
    expected = vae.encoder(pixels, told).mean
    assert_allclose(vae.encode(stamps).mean.detach(), expected.detach(), rtol=1e-5)


# -- drawing galaxies ----------------------------------------------------------------------


def test_samples_repeat():
    vae = mixture(make("astrovader2020"))
    state = torch.get_rng_state()
    first = vae.sample(7, rng=3)
    assert first.shape == (7, SIDE, SIDE)
    assert first.dtype == np.float32
    assert_array_equal(vae.sample(7, rng=np.random.default_rng(3)), first)
    assert_allclose(vae.sample(7, rng=3, chunk=2), first, rtol=1e-5)
    assert (vae.sample(7, rng=4) != first).any()
    assert torch.equal(state, torch.get_rng_state())
    noisy = vae.sample(200, rng=3, noise=True) - vae.sample(200, rng=3)
    assert noisy.std() == pytest.approx(255 * vae.likelihood.std, rel=0.02)


def test_samples_of_classes():
    """Each comes from the component that was asked for."""
    vae = make("astrovader2020", components=3)
    means = 40.0 * np.eye(3)
    vae.prior.start(np.ones(3), means, np.full((3, 3), 1e-6))
    each = vae.decode(torch.as_tensor(means).float()).mean.detach().numpy() * 255
    which = np.array([2, 0, 1, 1])
    assert_allclose(vae.sample(4, rng=1, classes=which), each[which], rtol=0.02, atol=0.05)
    assert_allclose(vae.sample(2, rng=1, classes=1), each[[1, 1]], rtol=0.02, atol=0.05)
    for bad in (3, -1, [0, 1], 0.5, ["a"] * 4):
        with pytest.raises(ValueError, match="classes"):
            vae.sample(4, rng=1, classes=bad)
    with pytest.raises(ValueError, match="another prior"):
        make("beta_vae").sample(4, rng=1, classes=0)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="n must be"):
            vae.sample(bad)


@pytest.mark.parametrize("name", ["beta_vae", "cvae", "astrovader2020"])
def test_fitted_prior_follows_the_latents(name, tmp_path):
    """Latents that are not N(0, I), as at beta = 0.1: draws have their moments."""
    stamps = galaxies(400)[0]
    vae = make(name)
    with torch.no_grad():  # latents of widths of their own, somewhere
        vae.encoder.mean.weight.mul_(20.0)
        vae.encoder.mean.bias.copy_(torch.tensor([3.0, -2.0, 0.0]))
        vae.encoder.log_std.bias.fill_(-1.0)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    new = nets.fit_prior(vae, stamps, n_components=3, rng=1)
    mean, std = vae.latents(stamps)
    torch.manual_seed(0)
    drawn = new.prior().sample((100_000,)).double().numpy()
    assert_allclose(drawn.mean(0), mean.mean(0), atol=0.15)
    total = mean.var(0) + (std**2).mean(0)
    assert_allclose(drawn.var(0), total, rtol=0.15)
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    again = nets.fit_prior(vae, stamps, n_components=3, rng=1)
    assert_array_equal(again.sample(3, rng=1), new.sample(3, rng=1))
    about = {"training_data": "blobs", "training_data_hash": "none", "licence": "CC0"}
    new.write(tmp_path / "new.safetensors", metadata=about)
    read = GalaxyVAE.read(tmp_path / "new.safetensors")
    assert_array_equal(read.sample(3, rng=1), new.sample(3, rng=1))
    assert read.responsibilities(stamps[:4]).shape == (4, 3)
    with pytest.raises(ValueError, match="positive"):
        nets.fit_prior(vae, stamps, n_components=0)
    with pytest.raises(ValueError, match="mixture of 10"):
        nets.fit_prior(vae, stamps[:1], draws=1)


def test_masked_and_bad_images(images):
    """Latents of masked images do not see the masked pixels."""
    vae = make("beta_vae")
    mask = np.zeros(images.shape, bool)
    mask[:, 3, 4:7] = True
    wild = np.where(mask, 1e9, images)
    expected = vae.latents(images, mask=mask)
    assert_array_equal(vae.latents(wild, mask=mask), expected)
    assert_array_equal(vae.latents(np.where(mask, np.nan, images)), expected)
    with pytest.raises(ValueError, match=r"\(N, ny, nx\)"):
        vae.latents(images[0])


# -- the command line ----------------------------------------------------------------------

CONFIG = """
[model]
preset = "{preset}"
options = {{{options}}}
[data]
images = "stamps.npy"
{conditions}
[training]
epochs = 3
batch_size = 16
learning_rate = 1e-3
final_learning_rate = 1e-6
schedule = "exponential"
beta = {{rise = 1, hold = 1, warmup = 1}}
{training}
seed = 4
[output]
weights = "mine.safetensors"
"""


@pytest.mark.parametrize("preset", ["astrovader2020", "cvae"])
def test_train_command(preset, tmp_path, capsys):
    """Mixture, schedule and conditions from a file; the weights know all of it."""
    images, flux = galaxies(40)
    np.save(tmp_path / "stamps.npy", images)
    Table({"flux": flux}).write(tmp_path / "catalog.fits")
    parts = {
        "astrovader2020": {
            "options": "channels = [4, 4, 4], latent_size = 3, components = 2",
            "conditions": "",
            "training": "prior_warmup = 1",
        },
        "cvae": {
            "options": 'filters = 4, conditions = ["flux"]',
            "conditions": 'conditions = "catalog.fits"',
            "training": "",
        },
    }[preset]
    path = tmp_path / "train.toml"
    path.write_text(CONFIG.format(preset=preset, **parts))
    assert main(["train", str(path), "-q"]) == 0, capsys.readouterr().err
    vae = GalaxyVAE.read(tmp_path / "mine.safetensors")
    assert vae.config["options"]["image_shape"] == [SIDE, SIDE]
    assert read_log(tmp_path / "mine.csv")["beta"].tolist() == [1.0, 0.0, 1.0]
    if preset == "cvae":
        assert vae.conditions.mean.item() == pytest.approx(flux.mean(), rel=0.1)
    else:
        assert float(vae.prior.started) == 1
    path.write_text(path.read_text().replace("rise = 1", "raise = 1"))
    assert main(["train", str(path), "-q", "--overwrite"]) == 2
    assert "raise" in capsys.readouterr().err
