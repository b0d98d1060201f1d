"""The learned galaxy: drawing, the astropy model, fits."""

import pickle

import astropy.units as u
import numpy as np
import pytest
from astropy.modeling.fitting import TRFLSQFitter
from astropy.modeling.models import Const2D
from numpy.testing import assert_allclose

from galmorph import (
    PSF,
    EncoderFitter,
    FitFlag,
    FitResult,
    LearnedGalaxy2D,
    MAPFitter,
    Normal,
    SersicGalaxy2D,
    fit_images,
)

torch = pytest.importorskip("torch")


def gaussian_psf(sigma=1.4, size=25):
    y, x = np.mgrid[:size, :size] - size // 2
    return PSF(np.exp(-0.5 * (x**2 + y**2) / sigma**2))


@pytest.fixture(scope="module")
def psf():
    return gaussian_psf()


@pytest.fixture(scope="module", params=[16, 0], ids=["hidden", "linear"])
def small(request):
    """An untrained network with structure: what it draws is smooth and far from Sérsic."""
    from galmorph.nets.learned import LearnedShape, galmorph_preset

    torch.manual_seed(3)
    vae = galmorph_preset(latent_dim=5, hidden=request.param, features=8)
    count = vae.decoder.draw.in_features
    with torch.no_grad():
        maps = torch.nn.functional.interpolate(
            torch.randn(count, 1, 7, 7), size=(48, 48), mode="bicubic", align_corners=True
        )
        maps = (3.0 if request.param else 0.3) * maps
        vae.decoder.draw.weight.copy_(maps.reshape(count, -1).T)
    return LearnedShape(vae)


@pytest.fixture
def galaxy(small, psf):
    return LearnedGalaxy2D(
        100.0, 20.3, 19.6, 5.0, 0.4, 0.3, -0.4, 0.8, -1.2, 0.5, shape=small, psf=psf
    )


# -- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_psf", [True, False])
def test_derivatives(galaxy, with_psf):
    """Against central differences, by every parameter."""
    # without a PSF integrals over pixels have jumps of 1e-9 of the flux, where their order
    # changes, which differences see
    step, tolerance = (1e-4, 1e-6) if with_psf else (1e-4, 2e-4)
    y, x = np.mgrid[:41, :43].astype(float)
    if not with_psf:
        galaxy.psf = None
    slopes = galaxy.fit_deriv(x, y, *galaxy.parameters)
    for i, name in enumerate(galaxy.param_names):
        ends = []
        for sign in (1, -1):
            p = galaxy.parameters.copy()
            p[i] += sign * step
            ends.append(galaxy.evaluate(x, y, *p))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert_allclose(slopes[i], expected, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("z", [(0.0, 0.0), (1.2, -0.8), (-0.9, 1.5)])
def test_sersic_is_nested(small, psf, z):
    """With all other latents at zero the galaxy is a Sérsic profile, cusp, wings and all."""
    learned = LearnedGalaxy2D(50, 30.2, 31.1, 6.0, 0.7, *z, shape=small, psf=psf)
    decoder = small.decoder(torch.float64)
    n, q = (
        float(v[0]) for v in decoder.profile(torch.tensor([[*z, 0, 0, 0]], dtype=torch.float64))
    )
    sersic = SersicGalaxy2D(50, 30.2, 31.1, 6.0, n, 1 - q, 0.7, psf=psf)
    expected = sersic.render((64, 64))
    assert_allclose(learned.render((64, 64)), expected, atol=2e-5 * expected.max())


def test_flux_and_radius_are_what_they_say(small):
    """The light of a large image is the flux, and half of it is within the ellipse of r_50."""
    galaxy = LearnedGalaxy2D(10, 150, 150, 12, 0.5, -1.2, 0.2, 1.0, 0.7, -0.6, shape=small)
    galaxy.psf = gaussian_psf(0.8)
    image = galaxy.render((301, 301))
    assert_allclose(image.sum(), 10, rtol=3e-3)
    _, q = small.decoder(torch.float64).profile(torch.as_tensor(galaxy.parameters[None, 5:]))
    y, x = np.mgrid[:301, :301] - 150.0
    along, across = np.cos(0.5) * x + np.sin(0.5) * y, np.cos(0.5) * y - np.sin(0.5) * x
    within = np.hypot(along, across / float(q[0])) < 12
    assert_allclose(image[within].sum(), 5, rtol=0.02)


def test_small_and_large_are_one_shape(small):
    """A galaxy drawn small and a binned image of it drawn large agree."""
    wide, narrow = gaussian_psf(6.0, 81), gaussian_psf(1.5, 41)
    z = 0.1, 0.3, 0.9, -0.8, 0.4
    large = LearnedGalaxy2D(1, 129.5, 129.5, 12, 0.3, *z, shape=small, psf=wide).render((260, 260))
    small_one = LearnedGalaxy2D(1, 32, 32, 3, 0.3, *z, shape=small, psf=narrow).render((65, 65))
    # four pixels in one, without the smoothing of the bins: the middle of each four
    middle = large[1:].reshape(259, 260)[:, 1:]
    sampled = (
        16 * 0.25 * (large[1::4, 1::4] + large[2::4, 1::4] + large[1::4, 2::4] + large[2::4, 2::4])
    )
    assert middle.shape == (259, 259)
    assert_allclose(sampled, small_one, atol=5e-3 * small_one.max())


def test_float32_draws_the_same(galaxy):
    double = galaxy.render((41, 41))
    assert_allclose(galaxy.render((41, 41), dtype="float32"), double, atol=3e-5 * double.max())


# -- the astropy model -----------------------------------------------------------------------


def test_names_and_copies(galaxy, small):
    assert galaxy.param_names[:6] == ("flux", "x_0", "y_0", "r_50", "theta", "z0")
    assert galaxy.latent_names == ("z0", "z1", "z2", "z3", "z4")
    copy = galaxy.copy()
    assert copy.shape is small
    copy.z0 = 2.0
    copy.x_0.fixed = True
    assert galaxy.z0 == 0.3
    assert not galaxy.x_0.fixed
    other = LearnedGalaxy2D(1, 2, 3, 4, shape=small)
    assert other.z0 == 0


def test_pickle(galaxy):
    y, x = np.mgrid[:31, :31].astype(float)
    again = pickle.loads(pickle.dumps(galaxy))
    assert_allclose(again(x, y), galaxy(x, y), rtol=1e-12)
    shipped = LearnedGalaxy2D.from_pretrained(flux=3.0, x_0=10, y_0=11, r_50=4)
    text = pickle.dumps(shipped)
    assert len(text) < 20_000  # the name of the weights, not the weights
    assert pickle.loads(text).shape is shipped.shape


def test_write_and_read(galaxy, tmp_path):
    path = tmp_path / "mine.safetensors"
    galaxy.write(path)
    again = LearnedGalaxy2D.read(path)
    for name in galaxy.param_names:
        setattr(again, name, getattr(galaxy, name).value)
    again.psf = galaxy.psf
    assert_allclose(again.render((40, 40)), galaxy.render((40, 40)), rtol=1e-12)


def test_other_networks_are_refused():
    from galmorph import GalaxyVAE
    from galmorph.nets.learned import LearnedShape

    with pytest.raises(TypeError, match="preset 'galmorph'"):
        LearnedShape(GalaxyVAE.from_preset("regier2015", image_shape=(9, 9)))


def test_model_set_and_compound(small, psf):
    y, x = np.mgrid[:31, :33].astype(float)
    many = LearnedGalaxy2D(
        [1, 2], [15, 16], [15, 14], [3, 4], [0, 1], shape=small, psf=psf, n_models=2
    )
    images = many(x, y, model_set_axis=False)
    one = LearnedGalaxy2D(2, 16, 14, 4, 1, shape=small, psf=psf)
    assert_allclose(images[1], one(x, y), rtol=1e-9, atol=1e-12)
    total = one + Const2D(0.5) + SersicGalaxy2D(5, 8, 9, 2, psf=psf)
    assert_allclose((total(x, y) - one(x, y)).min(), 0.5, atol=0.01)


def test_units(small, psf):
    y, x = np.mgrid[:31, :31] * u.pix
    galaxy = LearnedGalaxy2D(
        5 * u.uJy, 15 * u.pix, 14 * u.pix, 3 * u.pix, 20 * u.deg, shape=small, psf=psf
    )
    image = galaxy(x, y)
    assert image.unit == u.uJy
    bare = LearnedGalaxy2D(5, 15, 14, 3, np.deg2rad(20), shape=small, psf=psf)
    assert_allclose(image.value, bare(x.value, y.value), rtol=1e-12)


def test_samples_follow_the_prior():
    galaxy = LearnedGalaxy2D.from_pretrained(flux=10, x_0=20, y_0=20, r_50=4)
    draws = galaxy.sample(500, rng=5)
    assert draws.shape == (500, len(galaxy.param_names))
    assert_allclose(draws, galaxy.sample(500, rng=np.random.default_rng(5)))
    assert np.all(draws[:, 0] == 10)
    latents = draws[:, 5:]
    typical = galaxy.prior.log_prob(latents).mean()
    assert typical > galaxy.prior.log_prob(latents + 3.0).mean() + 5
    images = galaxy.render((41, 41), params=draws[:20], psf=gaussian_psf())
    assert np.all(images.min((1, 2)) > -1e-3 * images.max((1, 2)))


# -- the prior as a sum of squares -----------------------------------------------------------


def test_mixture_residuals():
    """Their squares are -2 ln p and a constant; slopes give its exact gradient."""
    from galmorph._learnedfit import mixture_residuals

    g = torch.Generator().manual_seed(1)
    means = torch.randn(3, 4, generator=g, dtype=torch.float64)
    factors = torch.linalg.cholesky(
        torch.eye(4, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    )
    logits = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64)
    z = torch.randn(20, 4, generator=g, dtype=torch.float64, requires_grad=True)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.MultivariateNormal(means, scale_tril=factors),
    )
    energy = -2 * mixture.log_prob(z)
    (expected,) = torch.autograd.grad(energy.sum(), z)
    with torch.no_grad():
        root, slope = mixture_residuals(z, logits, means, factors)
    offset = root.square().sum(1) - energy.detach()
    assert_allclose(offset, offset[0].expand(20), rtol=1e-10)
    gradient = 2 * torch.einsum("bqi,bq->bi", slope, root)
    assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)


# -- fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1.0, 4.0])
def test_noiseless_sersic(psf, n):
    """A learned fit of a Sérsic galaxy has its flux."""
    truth = SersicGalaxy2D(200, 40.2, 39.7, 7, n, 0.4, 0.6, psf=psf)
    image = truth.render((81, 81))
    fit = fit_images(
        image, LearnedGalaxy2D.from_pretrained(), uncertainty=1e-3 * image.max(), psf=psf
    )
    assert_allclose(fit.params[0, 0], 200, rtol=0.01)
    assert_allclose(fit.params[0, 3], 7, rtol=0.02)
    assert_allclose(fit.params[0, 1:3], [40.2, 39.7], atol=0.01)


def simulated(galaxy, psf, rng, n=24, sigma=0.02):
    params = galaxy.sample(n, rng)
    params[:, 0] = 100
    params[:, 1:3] = 24 + rng.uniform(-0.5, 0.5, (n, 2))
    params[:, 3] = rng.uniform(3, 6, n)
    params[:, 4] = rng.uniform(-np.pi, np.pi, n)
    clean = galaxy.render((49, 49), params=params, psf=psf)
    return params, clean, clean + rng.normal(0, sigma, clean.shape)


def test_fit_recovers_its_own(psf):
    """Galaxies drawn from the prior: chi2 is that of noise, fluxes are right and cover."""
    rng = np.random.default_rng(11)
    galaxy = LearnedGalaxy2D.from_pretrained()
    _, clean, data = simulated(galaxy, psf, rng)
    result = fit_images(data, galaxy, uncertainty=0.02, psf=psf, background="none")
    reduced = result.chi2 / result.dof
    assert np.median(reduced) < 1.1
    pull = (result.params[:, 0] - 100) / result.stds[:, 0]
    assert abs(np.median(pull)) < 1
    assert np.mean(np.abs(pull) < 3) > 0.9
    error = np.abs(result.model_images - clean).mean((1, 2))
    assert np.median(error) < 0.6 * 0.02
    sersic = fit_images(data, SersicGalaxy2D(), uncertainty=0.02, psf=psf, background="none")
    assert np.mean(result.chi2 < sersic.chi2) > 0.9


def test_bad_galaxy_is_flagged(psf):
    rng = np.random.default_rng(12)
    galaxy = LearnedGalaxy2D.from_pretrained()
    _, _, data = simulated(galaxy, psf, rng, n=3)
    data[1] = np.nan
    result = fit_images(data, galaxy, uncertainty=0.02, psf=psf)
    assert result.flags[1] & FitFlag.NO_DATA
    assert np.isnan(result.params[1]).all()
    assert np.isfinite(result.params[[0, 2]]).all()


def test_fixed_bounds_priors(psf):
    """What is asked of flux and r_50 holds exactly, though the fit walks elsewhere."""
    rng = np.random.default_rng(13)
    galaxy = LearnedGalaxy2D.from_pretrained()
    _, _, data = simulated(galaxy, psf, rng, n=2)
    keep = {"uncertainty": 0.02, "psf": psf, "background": "none"}
    galaxy.flux = 97.0
    galaxy.flux.fixed = True
    held = fit_images(data, galaxy, **keep)
    assert_allclose(held.params[:, 0], 97, rtol=1e-6)
    assert np.all(held.stds[:, 0] == 0)
    galaxy.flux.fixed = False
    free = fit_images(data, galaxy, **keep)
    galaxy.r_50.bounds = (None, 0.9 * float(free.params[:, 3].min()))
    bound = fit_images(data, galaxy, **keep)
    assert np.all(bound.params[:, 3] <= 0.9 * free.params[:, 3].min() * (1 + 1e-6))
    assert np.all(bound.flags & FitFlag.AT_BOUND)
    galaxy.r_50.bounds = (0.05, None)
    tight = MAPFitter(priors={"flux": Normal(90, 0.01), "r_50": Normal(4, 0.001)})
    prior = fit_images(data, galaxy, tight, **keep)
    assert_allclose(prior.params[:, 0], 90, atol=0.1)
    assert_allclose(prior.params[:, 3], 4, atol=0.01)
    galaxy.x_0.tied = lambda m: m.y_0
    with pytest.raises(ValueError, match="tie"):
        fit_images(data, galaxy, **keep)


def test_astropy_fitters(galaxy):
    """TRFLSQFitter and MAPFitter, each the astropy way, reach the truth."""
    y, x = np.mgrid[:41, :41].astype(float)
    image = galaxy(x, y)
    start = galaxy.copy()
    start.flux, start.r_50, start.z3 = 95.0, 4.8, -1.0
    for name in ("z1", "z2", "z4"):  # an untrained network does not pin all latents down
        getattr(start, name).fixed = True
    for fitter in (TRFLSQFitter(), MAPFitter(dtype="float64")):
        fit = fitter(start, x, y, image, weights=np.full(image.shape, 1e4))
        assert_allclose(fit.flux.value, 100, rtol=1e-3)
        assert_allclose(fit.z3.value, -1.2, atol=0.01)


def test_photutils(psf):
    photutils_psf = pytest.importorskip("photutils.psf")
    from astropy.table import QTable

    rng = np.random.default_rng(14)
    galaxy = LearnedGalaxy2D.from_pretrained(r_50=4.0)
    _, _, data = simulated(galaxy, psf, rng, n=1)
    galaxy.psf = psf
    phot = photutils_psf.PSFPhotometry(galaxy, fit_shape=(41, 41), fitter=MAPFitter())
    init = QTable({"x": [24.0], "y": [24.0], "flux": [80.0]})
    table = phot(data[0], error=np.full(data[0].shape, 0.02), init_params=init)
    assert_allclose(table["flux_fit"][0], 100, rtol=0.1)


# -- the encoder -----------------------------------------------------------------------------


def test_encoder_covers(psf):
    """Galaxies drawn from the prior: its intervals hold what they say, and it repeats exactly."""
    galaxy = LearnedGalaxy2D.from_pretrained()
    params, _, data = simulated(galaxy, psf, np.random.default_rng(21), n=300, sigma=0.06)
    keep = {"uncertainty": 0.06, "psf": psf, "background": "constant"}
    result = fit_images(data, galaxy, EncoderFitter(), **keep)
    inside = np.abs(result.params[:, :4] - params[:, :4]) < result.stds[:, :4]
    # the binomial scatter of each is 2.7 %
    assert np.all((inside.mean(0) > 0.56) & (inside.mean(0) < 0.80)), inside.mean(0)
    assert np.median(result.chi2 / result.dof) < 1.2
    again = fit_images(data[:5], galaxy, EncoderFitter(), **keep)
    # in single precision, by another number of galaxies at once; latents may be near zero
    assert_allclose(again.params, result.params[:5], rtol=1e-4, atol=1e-5)


def test_encoder_any_size_and_refined(psf):
    """Odd shapes, masks and NaN; going on with a fit ends where a fit ends."""
    galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=30, y_0=24, r_50=5, theta=0.3, psf=psf)
    galaxy.z2 = 1.0
    rng = np.random.default_rng(22)
    image = galaxy.render((51, 70)) + rng.normal(0, 0.03, (51, 70))
    image[:8, 60:] = np.nan
    keep = {"uncertainty": 0.03, "psf": psf}
    quick = fit_images(image, galaxy, EncoderFitter(), **keep)
    assert abs(quick.params[0, 0] - 100) < 5 * quick.stds[0, 0]
    assert_allclose(quick.params[0, 1:3], [30, 24], atol=0.3)
    fitted = fit_images(image, galaxy, MAPFitter(), **keep)
    refined = fit_images(image, galaxy, EncoderFitter(refine=True), **keep)
    assert abs(refined.chi2[0] - fitted.chi2[0]) < 10
    assert refined.chi2[0] < quick.chi2[0]


def test_encoder_refuses(small, psf):
    image = np.random.default_rng(1).normal(1, 1, (31, 31))
    with pytest.raises(TypeError, match="EncoderFitter fits LearnedGalaxy2D"):
        fit_images(image, SersicGalaxy2D(), EncoderFitter(), uncertainty=1.0)
    with pytest.raises(TypeError, match="not trained"):
        fit_images(image, LearnedGalaxy2D(shape=small), EncoderFitter(), uncertainty=1.0)
    galaxy = LearnedGalaxy2D.from_pretrained()
    galaxy.x_0.fixed = True
    with pytest.raises(Exception, match="fixed"):
        fit_images(image, galaxy, EncoderFitter(), uncertainty=1.0)


def test_encoder_the_astropy_way(psf):
    galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=31, y_0=30, r_50=5, psf=psf)
    y, x = np.mgrid[:61, :61]
    image = galaxy(x, y) + np.random.default_rng(23).normal(0, 0.05, (61, 61))
    start = LearnedGalaxy2D.from_pretrained(x_0=31, y_0=30, psf=psf)
    fit = EncoderFitter()(start, x, y, image, weights=np.full(image.shape, 20.0))
    assert_allclose(fit.flux.value, 100, rtol=0.15)


# -- what else comes back --------------------------------------------------------------------


def test_misfit_and_draws(psf):
    galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=24, y_0=24, r_50=5, psf=psf)
    image = galaxy.render((49, 49)) + np.random.default_rng(31).normal(0, 0.05, (49, 49))
    result = fit_images(image, galaxy, uncertainty=0.05)
    std = result.model_std_images[0]
    assert std.shape == (49, 49)
    assert np.all(std >= 0)
    assert 0.003 < std.sum() / result.model_images[0].sum() < 1
    draws = result.sample(4000, rng=3)
    assert draws.shape == (1, 4000, len(result.param_names))
    assert_allclose(draws[0].std(0), result.stds[0], rtol=0.1)
    assert_allclose(result.sample(5, rng=3), result.sample(5, rng=np.random.default_rng(3)))
    sersic = fit_images(image, SersicGalaxy2D(), uncertainty=0.05, psf=psf)
    assert np.all(sersic.model_std_images == 0)


def test_result_on_disk(psf, tmp_path, small):
    """A file knows the weights by name; those that have none must be given."""
    galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=20, y_0=20, r_50=4, psf=psf)
    image = galaxy.render((41, 41)) + np.random.default_rng(33).normal(0, 0.1, (41, 41))
    result = fit_images(image, galaxy, uncertainty=0.1)
    for file in ("fit.ecsv", "fit.fits"):
        result.write(tmp_path / file)
        again = FitResult.read(tmp_path / file)
        assert again.model.shape is galaxy.shape
        table = again.to_table()
        assert_allclose(table["ellip"], 0.31, atol=0.1)  # of z1 = 0
        assert np.all(table["n_err"] > 0)
        assert_allclose(again.params, result.params, rtol=1e-12)
        assert_allclose(again.model_images, result.model_images, rtol=1e-9, atol=1e-12)
    own = LearnedGalaxy2D(shape=small, psf=psf)
    fit_images(image, own, uncertainty=0.1).write(tmp_path / "own.fits")
    with pytest.raises(ValueError, match="model="):
        FitResult.read(tmp_path / "own.fits")
    assert len(FitResult.read(tmp_path / "own.fits", model=own)) == 1


def test_reconstruct(psf):
    """Beats the best-fitting Gaussian, in error and in likelihood."""
    from galmorph import GalaxyVAE, GaussianGalaxy2D

    rng = np.random.default_rng(32)
    galaxy = LearnedGalaxy2D.from_pretrained()
    _, _, data = simulated(galaxy, psf, rng, n=6, sigma=0.1)
    vae = GalaxyVAE.from_pretrained()
    mean, std = vae.reconstruct(data)
    gaussian = fit_images(data, GaussianGalaxy2D(), uncertainty=0.1, background="none")
    theirs = np.mean((data - gaussian.model_images) ** 2, (1, 2))
    ours = np.mean((data - mean) ** 2, (1, 2))
    assert np.all(ours < theirs)
    each = -0.5 * ((data - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    assert np.all(each.mean((1, 2)) > -0.5 * (np.log(2 * np.pi * theirs) + 1))
    posterior = vae.encode(data, psf=psf)
    assert posterior.batch_shape == (6,)
    assert posterior.event_shape == (vae.latent_size,)


def test_canonical_light(small):
    """`decode` draws the light of unit flux before the PSF."""
    z = torch.zeros(2, 5)
    z[1, 0] = 1.0
    light = small.vae.decode(z)
    assert light.mean.shape == (2, 64, 64)
    total = light.mean.sum((1, 2)) * (8 / 64) ** 2
    # what a Sérsic profile of these n has within a square of four half-light radii
    assert_allclose(total[0], 0.974, atol=0.01)
    assert total[1] < total[0]


# -- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(15, 15), (16, 12)])
def test_psf_transfer(size):
    """The waves of an array of any size are those of the PSF that the fitters see."""
    from galmorph.rendering.transfer import make_transfer
    from galmorph.training.learned import psf_transfer

    y, x = (np.arange(n) - (n - 1) / 2 for n in size)
    array = np.exp(-0.5 * ((x / 1.5) ** 2 + (y[:, None] / 2.0) ** 2)) * (1 + 0.1 * x)
    array /= array.sum()
    theirs = make_transfer(PSF(array), (32, 40), drift=0.0)
    ours = psf_transfer(torch.as_tensor(array)[None], theirs.box)
    assert_allclose(ours.kx, theirs.kx, atol=1e-6)
    assert_allclose(ours.amplitude, theirs.amplitude, atol=1e-6)


def test_trains_through_the_psf(psf):
    """Trained on galaxies with structure, seen through a PSF, it fits them better than a Sérsic."""
    from galmorph import GalaxyVAE
    from galmorph.nets.learned import LearnedShape
    from galmorph.training import train

    rng = np.random.default_rng(41)
    galaxy = LearnedGalaxy2D.from_pretrained()
    _, _, data = simulated(galaxy, psf, rng, n=160, sigma=0.015)
    torch.manual_seed(1)
    vae = GalaxyVAE.from_preset("galmorph", latent_dim=8, channels=(8, 8, 8), encoder_hidden=48)
    result = train(
        vae, data, uncertainty=0.015, psf=psf.data, epochs=12, batch_size=16, rng=1, progress=False
    )
    losses = result.history["validation_loss"]
    assert losses[-1] < losses[0] - 100
    learned = LearnedGalaxy2D(shape=LearnedShape(vae))
    keep = {"uncertainty": 0.015, "psf": psf}
    ours = fit_images(data[:12], learned, **keep)
    sersic = fit_images(data[:12], SersicGalaxy2D(), **keep)
    assert np.mean(ours.chi2 < sersic.chi2 - 10) > 0.7
