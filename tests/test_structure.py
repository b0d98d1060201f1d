"""Errors that allow for light that models do not have."""

import numpy as np
import pytest
import torch

from galmorph import PSF, MAPFitter, PointSource2D, SersicGalaxy2D
from galmorph._bandfit import fit_bands
from galmorph._scenefit import SceneBatch
from galmorph._structure import PATCHES, RINGS, SECTORS, patches_of, relative_rms
from galmorph.deblending import deblend
from galmorph.multiband import deblend_bands
from galmorph.noise import CorrelatedNoise

SIGMA = 0.3
_BEYOND = 0.35


@pytest.fixture(scope="module")
def psf():
    y, x = np.mgrid[-9:10, -9:10]
    return PSF(np.exp(-0.5 * (x**2 + y**2) / 1.3**2))


def patches(image, flux, centre, sigma=1.3):
    label, resolved = patches_of(
        torch.as_tensor(image[None]).flatten(1),
        torch.tensor([float(flux)], dtype=torch.float64),
        torch.as_tensor(np.array([centre], dtype=float)),
        sigma,
        image.shape[1],
    )
    return label[0].numpy().reshape(image.shape), float(resolved[0])


@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_rings_hold_their_light_and_sectors_share_it(theta):
    model = SersicGalaxy2D(1000, 60, 60.3, r_eff=12, n=1, ellip=0.5, theta=theta)
    image = model.render((121, 121))
    label, resolved = patches(image, 1000, (60, 60.3), sigma=0.0)
    light = np.bincount(label.ravel(), image.ravel(), PATCHES).reshape(-1, SECTORS)
    inside = light.sum(1).cumsum() / 1000
    assert np.allclose(inside[:-1], RINGS, atol=0.01)
    # sectors of an ellipse in its own frame are alike where they have many pixels
    assert np.allclose(light[2:] / light[2:].mean(1, keepdims=True), 1, atol=0.15)
    assert resolved == 1.0


def test_what_is_not_resolved_has_no_structure(psf):
    image = PointSource2D(100, 20, 20).render((41, 41), psf=psf)
    assert patches(image, 100, (20, 20), sigma=psf.sigma)[1] < 0.1
    image = SersicGalaxy2D(100, 20, 20, r_eff=6).render((41, 41), psf=psf)
    assert patches(image, 100, (20, 20), sigma=psf.sigma)[1] > 0.8
    assert not any(relative_rms(PointSource2D()))


def test_error_of_a_flux_in_closed_form(psf):
    """Only the flux is free: the estimate weighs pixels with the model."""
    held = dict.fromkeys(("x_0", "y_0", "r_eff", "n", "ellip", "theta"), True)
    model = SersicGalaxy2D(1, 20.2, 19.7, r_eff=4, n=1.5, ellip=0.3, theta=0.4, fixed=held)
    unit = model.render((41, 41), psf=psf)
    image = 800 * unit + np.random.default_rng(2).normal(0, SIGMA, unit.shape)
    options = {"model": model, "uncertainty": SIGMA, "psf": psf, "position_prior": 0}
    with_it, without = (deblend(image, [(20.2, 19.7)], structure=s, **options) for s in (1.0, 0.0))
    flux = with_it.flux[0]
    label, resolved = patches(flux * unit, flux, (20.2, 19.7), sigma=psf.sigma)
    norm = (unit**2).sum()
    assert np.isclose(without.flux_err[0], SIGMA / np.sqrt(norm), rtol=1e-3)
    rms = resolved**2 * np.repeat(relative_rms(model), SECTORS)
    own = flux * np.bincount(label.ravel(), unit.ravel(), PATCHES)
    seen = flux * np.bincount(label.ravel(), (unit**2).ravel(), PATCHES) / norm
    beyond = _BEYOND * resolved**2 * flux * (1 - unit.sum())
    expected = (rms**2 * (seen - own) ** 2).sum() + beyond**2
    found = with_it.flux_err[0] ** 2 - without.flux_err[0] ** 2
    assert np.isclose(found, expected, rtol=0.02)
    # half as much structure, a quarter of the variance
    half = deblend(image, [(20.2, 19.7)], structure=0.5, **options).flux_err[0] ** 2
    assert np.isclose(half - without.flux_err[0] ** 2, found / 4, rtol=1e-3)


def test_fluxes_of_structured_galaxies_are_covered(psf):
    """Patches that differ as the errors say: 68 % of intervals hold, which else are too short."""
    rng = np.random.default_rng(3)
    count, shape = 150, (48, 48)
    model = SersicGalaxy2D(psf=psf)
    params = np.empty((count, 2, 7))
    angle = rng.uniform(0, 2 * np.pi, count)
    for k, sign in enumerate((-4.5, 4.5)):
        params[:, k, 0] = rng.uniform(4000, 8000, count)
        params[:, k, 1:3] = 23.5 + sign * np.stack([np.cos(angle), np.sin(angle)], 1)
        params[:, k, 3] = rng.uniform(3, 4.5, count)
        params[:, k, 4] = np.exp(rng.normal(np.log(1.2), 0.2, count))
        params[:, k, 5] = rng.uniform(0.1, 0.5, count)
        params[:, k, 6] = rng.uniform(0, np.pi, count)
    data, truth = np.zeros((count, *shape)), np.zeros((count, 2))
    level = np.repeat(relative_rms(model), SECTORS)
    for k in (0, 1):
        images = model.render(shape, params=params[:, k])
        for i, image in enumerate(images):
            label, resolved = patches(image, params[i, k, 0], params[i, k, 1:3], psf.sigma)
            factor = 1 + resolved**2 * level * rng.standard_normal(PATCHES)
            seen = image * factor[label]
            data[i] += seen
            truth[i, k] = params[i, k, 0] + (seen - image).sum()
    data += rng.normal(0, SIGMA, data.shape)
    held = {}
    for structure in (0.0, 1.0):
        results = deblend(
            data,
            list(params[:, :, 1:3]),
            model=SersicGalaxy2D(),
            uncertainty=SIGMA,
            psf=psf,
            position_prior=0.5,
            structure=structure,
        )
        pull = np.array([(r.flux - t) / r.flux_err for r, t in zip(results, truth, strict=True)])
        held[structure] = np.mean(np.abs(pull) < 1)
    assert held[0.0] < 0.4
    # light of the two is not independent: as many standard errors of half as many
    assert abs(held[1.0] - 0.683) < 3 * np.sqrt(0.217 / count)


# -- several bands -------------------------------------------------------------------------------


def test_errors_of_fluxes_of_two_bands_in_closed_form(psf):
    """Only the fluxes are free; bands have other PSFs, and the same structure."""
    y, x = np.mgrid[-12:13, -12:13]
    psfs = {"r": psf, "g": PSF(np.exp(-0.5 * (x**2 + y**2) / 2.0**2))}
    fluxes = {"r": 800, "g": 300}
    held = dict.fromkeys(("x_0", "y_0", "r_eff", "n", "ellip", "theta"), True)
    model = SersicGalaxy2D(1, 20.2, 19.7, r_eff=4, n=1.5, ellip=0.3, theta=0.4, fixed=held)
    units = {b: model.render((41, 41), psf=psfs[b]) for b in psfs}
    images = {b: fluxes[b] * units[b] for b in psfs}
    options = {"model": model, "uncertainty": SIGMA, "psf": psfs, "position_prior": 0}
    with_it, without = (
        deblend_bands(images, [(20.2, 19.7)], structure=s, **options) for s in (1.0, 0.0)
    )
    errors, beyond = [], []
    for band, unit in units.items():
        flux = with_it[band].flux[0]
        label, resolved = patches(flux * unit, flux, (20.2, 19.7), sigma=psfs[band].sigma)
        rms = resolved**2 * np.repeat(relative_rms(model), SECTORS)
        own = flux * np.bincount(label.ravel(), unit.ravel(), PATCHES)
        seen = flux * np.bincount(label.ravel(), (unit**2).ravel(), PATCHES) / (unit**2).sum()
        errors.append(rms * (seen - own))
        beyond.append(_BEYOND * resolved**2 * flux * (1 - unit.sum()))
    expected = np.array(errors) @ np.array(errors).T + np.outer(beyond, beyond)
    assert np.allclose(with_it.flux_cov - without.flux_cov, expected, rtol=0.02)
    assert np.allclose(with_it["g"].flux_err, with_it.flux_err[:, 1])
    assert np.allclose(with_it["g"].snr, without.flux[:, 1] / without.flux_err[:, 1])


def test_fluxes_and_colours_of_structured_galaxies_are_covered(psf):
    """The same patches in all bands: 68 % of intervals hold, of fluxes and of colours."""
    rng = np.random.default_rng(5)
    count, shape = 60, (42, 42)
    model = SersicGalaxy2D()
    y, x = np.mgrid[-12:13, -12:13]
    bands = {1.3: 1.0, 1.9: 0.6}  # width of the PSF, noise
    psfs = [PSF(np.exp(-0.5 * (x**2 + y**2) / s**2)) for s in bands]
    params = np.empty((count, 2, 7))
    angle = rng.uniform(0, 2 * np.pi, count)
    for k, sign in enumerate((-4.5, 4.5)):
        params[:, k, 1:3] = 20.5 + sign * np.stack([np.cos(angle), np.sin(angle)], 1)
        params[:, k, 3] = rng.uniform(3, 4.5, count)
        params[:, k, 4] = np.exp(rng.normal(np.log(1.2), 0.2, count))
        params[:, k, 5] = rng.uniform(0.1, 0.5, count)
        params[:, k, 6] = rng.uniform(0, np.pi, count)
    position = params[:, :, 1:3].copy()
    level = np.repeat(relative_rms(model), SECTORS)
    fraction = rng.standard_normal((count, 2, PATCHES))
    truth, batches, start = np.empty((2, count, 2)), [], []
    for b, (own, noise) in enumerate(zip(psfs, bands.values(), strict=True)):
        params[:, :, 0] = rng.uniform(4000, 8000, (count, 2))
        data = rng.normal(0, noise * SIGMA, (count, *shape))
        for k in (0, 1):
            images = model.render(shape, params=params[:, k], psf=own).reshape(count, -1)
            label, resolved = (
                a.numpy()
                for a in patches_of(*map(torch.as_tensor, (images, params[:, k, 0],
                                    params[:, k, 1:3])), own.sigma, shape[1])
            )  # fmt: skip
            factor = resolved[:, None] ** 2 * level * fraction[:, k]
            missed = images * np.take_along_axis(factor, label, 1)
            data[:] += (images + missed).reshape(data.shape)
            truth[b, :, k] = params[:, k, 0] + missed.sum(1)
        inv_sigma = np.full(data.shape, 1 / (noise * SIGMA))
        batches.append(SceneBatch(data, inv_sigma, own, position, np.full((count, 2), 0.5)))
        start.append([params[:, k].copy() for k in (0, 1)])
    setup = MAPFitter()._setup(model, "none")
    fits = fit_bands([setup, setup], batches, start, structure=1.0)
    flux = np.stack([[p[:, b] for p in fits.params] for b in (0, 1)]).transpose(0, 2, 1)
    at = np.array([[8 * k + b for k in (0, 1)] for b in (0, 1)])
    cov = fits.cov[:, at[:, :, None, None], at]  # scene, band, source, band, source
    var = np.einsum("ibkbk->bik", cov)
    relative = np.log((flux[0] / flux[1]) / (truth[0] / truth[1]))
    between = np.einsum("ikk->ik", cov[:, 0, :, 1])
    color_var = (var / flux**2).sum(0) - 2 * between / flux.prod(0)
    noise_alone = np.stack([own.flux_noise for own in fits.bands])
    assert np.mean(np.abs(flux - truth) < noise_alone) < 0.2
    held = [np.mean(np.abs(flux[b] - truth[b]) < np.sqrt(var[b])) for b in (0, 1)]
    held.append(np.mean(np.abs(relative) < np.sqrt(color_var)))
    # light of the two is not independent: as many standard errors of half as many
    assert np.all(np.abs(np.array(held) - 0.683) < 3 * np.sqrt(0.217 / count)), held
    assert (color_var < (var / flux**2).sum(0)).all()  # in part it cancels


def test_correlated_noise_takes_the_same_way(psf):
    image = SersicGalaxy2D(3000, 18, 20, r_eff=4).render((41, 41), psf=psf)
    image += SersicGalaxy2D(2000, 25, 21, r_eff=3).render((41, 41), psf=psf)
    image += np.random.default_rng(1).normal(0, SIGMA, image.shape)
    options = {"model": SersicGalaxy2D(), "uncertainty": SIGMA, "psf": psf}
    white = deblend(image, [(18, 20), (25, 21)], **options)
    nearly = MAPFitter(noise=CorrelatedNoise([[1e-4, 1.0, 1e-4]]))
    other = deblend(image, [(18, 20), (25, 21)], fitter=nearly, **options)
    assert np.allclose(white.flux_cov, other.flux_cov, rtol=0.02)


def test_signal_to_noise_is_that_of_noise(psf):
    image = SersicGalaxy2D(9000, 20, 20, r_eff=5).render((41, 41), psf=psf)
    image += np.random.default_rng(1).normal(0, SIGMA, image.shape)
    options = {"model": SersicGalaxy2D(), "uncertainty": SIGMA, "psf": psf}
    without = deblend(image, [(20, 20)], structure=0, **options)
    found = deblend(image, [(20, 20)], **options)
    assert np.allclose(without.snr, without.flux / without.flux_err)
    assert np.allclose(found.snr, without.snr)
    assert (found.flux_err > without.flux_err).all()
    assert np.allclose(found.to_table()["snr"], found.snr)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_bad_structure(bad):
    with pytest.raises(ValueError, match="structure"):
        deblend(np.ones((9, 9)), [(4, 4)], model=SersicGalaxy2D(), structure=bad)
